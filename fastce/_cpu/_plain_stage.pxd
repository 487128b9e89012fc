"""Between memory and the stage of the plain column kernel, and what is fetched while that computes.

Design
------
1. A stage holds up to 512 rows, class by class, so that memory delivers long runs from each plane. It is also needed
   where nothing is transposed: planes a power of two apart share the same few cache sets, and would evict each other
   between the passes. For the same reason a class is followed by a gap of one cache line.
2. Rows whose classes lie side by side are transposed; their stage stays small enough for L1, for they come as one run
   anyway.
3. The logits of the next rows are fetched piece by piece while the exponentials of these are computed, which takes
   memory no time of its own: reading planes is waiting for memory, and it was half of the time of 21 planes. Each line
   is asked for a few pieces before it is copied, so that no cache has to keep more than a few lines of one set.
"""
from libc.string cimport memcpy, memset

from fastce._cpu._convert cimport NATIVE, is_16_bit, load_array, size_of, store_array, write_converted
from fastce._cpu._math cimport real
from fastce._cpu._prefetch cimport CACHE_LINE, prefetch
from fastce._cpu._task cimport Matrix, Task, row_offset
from fastce._cpu._tiles cimport TILE
from fastce._cpu._transpose cimport transpose, transpose_from_16, transpose_to_16

cdef enum:
    PLAIN_STAGE_BYTES = 163840  # fits into any L2 cache; 64 rows of 512 floats
    L1_STAGE_BYTES = 12288  # two of them in an L1 of 32 KiB; 32768 took a fifteenth longer for 32 classes
    MAX_ROWS = 512       # 256 took a tenth longer for 10 and 21 planes
    FEWEST_GROUPS = 16
    PIECES_AHEAD = 48    # 1500 cycles' work with AVX-512; half or twice of it was no better
    GAP = 16             # a cache line of floats


cdef inline Py_ssize_t plain_group(const Task* task, real like) noexcept nogil:
    """Return how many rows are staged at once; 0 if not even 64 fit."""
    cdef Py_ssize_t class_bytes = task.n_classes * <Py_ssize_t>sizeof(real)
    cdef Py_ssize_t most = PLAIN_STAGE_BYTES // class_bytes - GAP
    if task.logits.class_stride < task.logits.row_strides[task.n_dims - 1]:
        most = min(most, max(<Py_ssize_t>TILE, L1_STAGE_BYTES // class_bytes - GAP))
    # Threads share groups, so there must be some.
    most = min(most, max(<Py_ssize_t>TILE, task.n_rows // FEWEST_GROUPS))
    return min(<Py_ssize_t>MAX_ROWS, most // TILE * TILE)


cdef inline Py_ssize_t run_length(const Task* task, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    """Return how many of n rows from `start` on are one stride apart from each other."""
    cdef Py_ssize_t last = task.row_shape[task.n_dims - 1]
    return n if task.n_dims == 1 else min(n, last - start % last)


cdef inline void load_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* stage, Py_ssize_t pitch
) noexcept nogil:
    """Stage n rows; `pitch` numbers lead from class to class."""
    cdef const Matrix* x = &task.logits
    cdef Py_ssize_t row_stride = x.row_strides[task.n_dims - 1]
    cdef Py_ssize_t size = size_of(x.format, stage[0])
    cdef Py_ssize_t i = 0, k, m
    cdef const char* first
    while i < n:
        m = run_length(task, start + i, n - i)
        first = x.data + row_offset(task, x, start + i)
        if x.format == NATIVE and row_stride == size:
            for k in range(task.n_classes):
                memcpy(stage + k * pitch + i, first + k * x.class_stride, m * sizeof(real))
        elif x.format == NATIVE and x.class_stride == size and row_stride % size == 0 and <size_t>first % size == 0:
            transpose(<const real*>first, row_stride // size, m, task.n_classes, stage + i, pitch)
        elif is_16_bit(x.format) and x.class_stride == 2:
            transpose_from_16(first, x.format, row_stride, m, task.n_classes, stage + i, pitch)
        else:
            for k in range(task.n_classes):
                load_array(first + k * x.class_stride, x.format, row_stride, m, stage + k * pitch + i)
        i += m


# The rows to come: their logits are fetched piece by piece, 64 numbers of a class, while exponentials are computed.
cdef struct Feed:
    Py_ssize_t n_left        # pieces
    const char* source
    Py_ssize_t ahead         # from there to what is asked for
    char* stage              # NULL: only asked for
    Py_ssize_t run           # pieces that follow each other in memory, and of them
    Py_ssize_t run_left
    Py_ssize_t source_jump   # from the end of a run to the next
    Py_ssize_t stage_jump
    Py_ssize_t runs_to_wrap  # after so many the first classes of the rows after these are asked for
    Py_ssize_t wrap


cdef inline Feed plan_feed(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* stage, Py_ssize_t pitch
) noexcept nogil:
    """Describe how to fetch n rows, or none: planes as a copy, rows whose classes lie side by side into the caches."""
    cdef Feed feed
    cdef const Matrix* x = &task.logits
    cdef Py_ssize_t row_stride = x.row_strides[task.n_dims - 1]
    cdef Py_ssize_t size = size_of(x.format, stage[0])
    cdef Py_ssize_t piece = TILE * <Py_ssize_t>sizeof(real)
    cdef Py_ssize_t planes_ahead
    memset(&feed, 0, sizeof(feed))
    if n == 0 or run_length(task, start, n) < n:
        return feed
    feed.source = x.data + row_offset(task, x, start)
    if x.format == NATIVE and row_stride == size and n % TILE == 0:
        feed.stage = <char*>stage
        feed.run = n // TILE
        feed.n_left = feed.run * task.n_classes
        feed.source_jump = x.class_stride - feed.run * piece
        feed.stage_jump = (pitch - n) * <Py_ssize_t>sizeof(real)
        planes_ahead = min(task.n_classes, (PIECES_AHEAD + feed.run - 1) // feed.run)
        feed.ahead = planes_ahead * x.class_stride
        feed.runs_to_wrap = task.n_classes - planes_ahead
        feed.wrap = n * size - task.n_classes * x.class_stride
        if feed.runs_to_wrap == 0:
            feed.ahead += feed.wrap
    elif x.class_stride == size and 0 < row_stride and row_stride <= 2 * task.n_classes * size:
        feed.n_left = feed.run = n * row_stride // piece
    feed.run_left = feed.run
    return feed


cdef inline void fetch_piece(Feed* feed, real like) noexcept nogil:
    cdef Py_ssize_t j
    if feed.n_left == 0:
        return
    for j in range(TILE * <Py_ssize_t>sizeof(real) // CACHE_LINE):
        prefetch(feed.source + feed.ahead + j * CACHE_LINE)
    if feed.stage != NULL:
        memcpy(feed.stage, feed.source, TILE * sizeof(real))
        feed.stage += TILE * sizeof(real)
    feed.source += TILE * sizeof(real)
    feed.n_left -= 1
    feed.run_left -= 1
    if feed.run_left == 0:
        feed.run_left = feed.run
        feed.source += feed.source_jump
        if feed.stage != NULL:
            feed.stage += feed.stage_jump
        feed.runs_to_wrap -= 1
        if feed.runs_to_wrap == 0:
            feed.ahead += feed.wrap


cdef inline void store_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t n, const real* stage, Py_ssize_t pitch
) noexcept nogil:
    """Write n staged rows."""
    cdef const Matrix* out = &task.out
    cdef Py_ssize_t row_stride = out.row_strides[task.n_dims - 1]
    cdef Py_ssize_t size = size_of(out.format, stage[0])
    cdef Py_ssize_t i = 0, j, k, m
    cdef char* first
    while i < n:
        m = run_length(task, start + i, n - i)
        first = out.data + row_offset(task, out, start + i)
        if out.format == NATIVE and row_stride == size:
            for k in range(task.n_classes):
                memcpy(first + k * out.class_stride, stage + k * pitch + i, m * sizeof(real))
        elif out.format == NATIVE and out.class_stride == size and row_stride % size == 0 and <size_t>first % size == 0:
            transpose(stage + i, pitch, task.n_classes, m, <real*>first, row_stride // size)
        elif is_16_bit(out.format) and out.class_stride == 2:
            transpose_to_16(stage + i, pitch, m, task.n_classes, first, out.format, row_stride)
        elif out.format == NATIVE:
            for k in range(task.n_classes):
                for j in range(m):
                    write_converted(
                        first + k * out.class_stride + j * row_stride, out.format, stage[k * pitch + i + j])
        else:
            for k in range(task.n_classes):
                store_array(
                    stage + k * pitch + i, <real>1, True, m, first + k * out.class_stride, out.format, row_stride)
        i += m
