"""Between the caller's memory and the scratch memory of the kernel of few classes, and what is fetched meanwhile.

Design
------
1. 64 rows are copied class by class. Planes need that too: a power of two apart they share the same few cache sets, and
   would evict each other between the passes. For the same reason a class is followed by a gap of one cache line.
2. The logits of the next rows are fetched piece by piece while the exponentials of these are computed, which takes
   memory no time of its own: reading planes is waiting for memory, and it was half of the time of 21 planes.
3. Each line is asked for long before it is fetched, in strips: 2 KiB of one plane after the other, in which memory and
   its prefetchers are fast, and into L2, for L1 has room for few and a core can wait for few lines of L1 at a time.
   Against asking for the same lines 12 KiB ahead into L1, 21 planes took 0.8 and 150 planes 0.7 of the time.
"""
from libc.string cimport memcpy, memset

from fastce._cpu.kernel.few_blocks cimport Prefetcher, ChunkCursor
from fastce._cpu.lanes cimport TILE
from fastce._cpu.layout.convert cimport NATIVE, load_array, magnitude, size_of, store_array
from fastce._cpu.layout.transpose cimport transpose, transpose_from, transpose_to
from fastce._cpu.math cimport real
from fastce._cpu.platform cimport not_inlined
from fastce._cpu.prefetch cimport CACHE_LINE
from fastce._cpu.task cimport Matrix, Task, row_offset

cdef enum:
    STRIPS_BYTES = 163840  # of all classes, fits into any L2 cache
    FEWEST_TRANSPOSED = 4  # classes; 2 reversed ones took twice as long through rows in a buffer
    GAP = 16             # a cache line of floats, so that planes a power of two apart do not evict each other
    STRIP_BYTES = 2048   # of each class
    AHEAD_BYTES = 131072  # of all classes; a part of any L2 cache


cdef inline Py_ssize_t run_length(const Task* task, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    """Return how many of n rows from `start` on are one stride apart from each other."""
    cdef Py_ssize_t last = task.row_shape[task.n_dims - 1]
    return n if task.n_dims == 1 else min(n, last - start % last)


cdef inline Py_ssize_t rows_to_line(const Task* task, Py_ssize_t start) noexcept nogil:
    """Return how many rows to do first, so that the others begin with a cache line; 0 if they do, or none can."""
    cdef const Matrix* matrix = &task.logits if task.out.data == NULL else &task.out
    cdef const char* first = matrix.data + row_offset(task, matrix, start)
    cdef Py_ssize_t n
    for n in range(CACHE_LINE):
        if <size_t>(first + n * matrix.row_strides[task.n_dims - 1]) % CACHE_LINE == 0:
            return n
    return 0


cdef inline void load_any_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, Py_ssize_t pitch
) noexcept nogil:
    """Load n rows; `pitch` numbers lead from class to class."""
    cdef const Matrix* x = &task.logits
    cdef Py_ssize_t row_stride = x.row_strides[task.n_dims - 1]
    cdef Py_ssize_t size = size_of(x.format, scratch[0])
    cdef Py_ssize_t i = 0, k, m
    cdef const char* first
    while i < n:
        m = run_length(task, start + i, n - i)
        first = x.data + row_offset(task, x, start + i)
        if x.format == NATIVE and row_stride == size:
            for k in range(task.n_classes):
                memcpy(scratch + k * pitch + i, first + k * x.class_stride, m * sizeof(real))
        elif x.format == NATIVE and x.class_stride == size and row_stride % size == 0 and <size_t>first % size == 0:
            transpose(<const real*>first, row_stride // size, m, task.n_classes, scratch + i, pitch)
        elif task.n_classes >= FEWEST_TRANSPOSED and magnitude(x.class_stride) < magnitude(row_stride):
            transpose_from(first, x.format, x.class_stride, row_stride, m, task.n_classes, scratch + i, pitch)
        else:
            for k in range(task.n_classes):
                load_array(first + k * x.class_stride, x.format, row_stride, m, scratch + k * pitch + i)
        i += m


ctypedef void (*load_t)(const Task*, Py_ssize_t, Py_ssize_t, real*, Py_ssize_t) noexcept nogil
ctypedef void (*store_t)(const Task*, Py_ssize_t, Py_ssize_t, const real*, Py_ssize_t) noexcept nogil


cdef inline void load_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, Py_ssize_t pitch
) noexcept nogil:
    """Load n rows, by a call: inlined, that is most of a kernel."""
    cdef load_t load = load_any_rows
    (<load_t>not_inlined(<void*>load))(task, start, n, scratch, pitch)


cdef inline Prefetcher begin_prefetch(const Task* task, Py_ssize_t start, real like) noexcept nogil:
    """Return what fetches nothing yet; tiles of rows are to be fetched from row `start` on."""
    cdef Prefetcher prefetcher
    cdef Py_ssize_t row_bytes = task.n_classes * <Py_ssize_t>sizeof(real)
    cdef Py_ssize_t last = task.row_shape[task.n_dims - 1]
    memset(&prefetcher, 0, sizeof(prefetcher))
    prefetcher.strip = min(<Py_ssize_t>STRIP_BYTES // <Py_ssize_t>sizeof(real), STRIPS_BYTES // row_bytes)
    if task.n_dims > 1:
        prefetcher.strip = min(prefetcher.strip, last // 4)  # strips end where a plane ends
    prefetcher.strip = max(<Py_ssize_t>1, prefetcher.strip // TILE) * TILE
    prefetcher.ahead = max(<Py_ssize_t>1, AHEAD_BYTES // (prefetcher.strip * row_bytes)) * prefetcher.strip
    prefetcher.next_strip_start = start
    return prefetcher


cdef inline ChunkCursor chunk_cursor(
    const char* first, Py_ssize_t run, Py_ssize_t n_runs, Py_ssize_t distance, real like
) noexcept nogil:
    """Return the way through runs of so many pieces whose beginnings are `distance` bytes apart."""
    cdef ChunkCursor cursor
    cursor.at = first
    cursor.n_left = run * n_runs
    cursor.run = run
    cursor.run_left = run
    cursor.run_stride = distance - run * TILE * <Py_ssize_t>sizeof(real)
    return cursor


cdef inline void start_prefetch(Prefetcher* prefetcher, const Task* task, Py_ssize_t start, real like) noexcept nogil:
    """Ask for a strip of planes from row `start` on, if there is one, instead of what has been asked for."""
    cdef Py_ssize_t n
    prefetcher.prefetch_cursor.n_left = 0
    if start < task.n_rows:
        n = run_length(task, start, min(prefetcher.strip, task.n_rows - start))
        prefetcher.prefetch_cursor = chunk_cursor(
            task.logits.data + row_offset(task, &task.logits, start), (n + TILE - 1) // TILE, task.n_classes,
            task.logits.class_stride, like)


cdef inline void plan_prefetch(
    Prefetcher* prefetcher, const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, Py_ssize_t pitch
) noexcept nogil:
    """Describe how to fetch n rows, or none: planes as a copy, rows whose classes lie side by side into the caches."""
    cdef real like = scratch[0]
    cdef const Matrix* x = &task.logits
    cdef Py_ssize_t row_stride = x.row_strides[task.n_dims - 1]
    cdef Py_ssize_t size = size_of(x.format, like)
    cdef const char* first
    prefetcher.logits.n_left = 0
    prefetcher.target = NULL
    if n == 0 or run_length(task, start, n) < n:
        return
    first = x.data + row_offset(task, x, start)
    if x.format == NATIVE and row_stride == size and n % TILE == 0:
        prefetcher.target = <char*>scratch
        prefetcher.target_stride = (pitch - n) * <Py_ssize_t>sizeof(real)
        prefetcher.logits = chunk_cursor(first, n // TILE, task.n_classes, x.class_stride, like)
        if start >= prefetcher.next_strip_start:
            start_prefetch(prefetcher, task, start + prefetcher.ahead, like)
            prefetcher.next_strip_start = start + prefetcher.strip
    elif x.class_stride == size and 0 < row_stride and row_stride <= 2 * task.n_classes * size:
        prefetcher.logits = chunk_cursor(first, n * row_stride // (TILE * <Py_ssize_t>sizeof(real)), 1, 0, like)


cdef inline void store_any_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t n, const real* scratch, Py_ssize_t pitch
) noexcept nogil:
    """Write n rows."""
    cdef const Matrix* out = &task.out
    cdef Py_ssize_t row_stride = out.row_strides[task.n_dims - 1]
    cdef Py_ssize_t size = size_of(out.format, scratch[0])
    cdef Py_ssize_t i = 0, k, m
    cdef char* first
    while i < n:
        m = run_length(task, start + i, n - i)
        first = out.data + row_offset(task, out, start + i)
        if out.format == NATIVE and row_stride == size:
            for k in range(task.n_classes):
                memcpy(first + k * out.class_stride, scratch + k * pitch + i, m * sizeof(real))
        elif out.format == NATIVE and out.class_stride == size and row_stride % size == 0 and <size_t>first % size == 0:
            transpose(scratch + i, pitch, task.n_classes, m, <real*>first, row_stride // size)
        elif task.n_classes >= FEWEST_TRANSPOSED and magnitude(out.class_stride) < magnitude(row_stride):
            transpose_to(
                scratch + i, pitch, m, task.n_classes, first, out.format, out.class_stride, row_stride)
        else:
            for k in range(task.n_classes):
                store_array(
                    scratch + k * pitch + i, <real>1, True, m, first + k * out.class_stride, out.format, row_stride)
        i += m


cdef inline void store_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t n, const real* scratch, Py_ssize_t pitch
) noexcept nogil:
    """Write n rows, by a call."""
    cdef store_t store = store_any_rows
    (<store_t>not_inlined(<void*>store))(task, start, n, scratch, pitch)
