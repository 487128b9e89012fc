"""Rows that the row kernel cannot work on where they are: it gets a copy of the task whose rows are copies.

Design
------
1. The row kernel takes rows of the arithmetic's type whose classes lie side by side, at aligned addresses. Logits, or a
   gradient, that are anything else (16 bits, strides, odd addresses) are copied to scratch memory; `source` leads back
   to the caller's. Each block of logits is loaded on its way into the sweep, and each block of the gradient is stored
   once it is done. So everything between is one code with one rounding, and the bits of a row do not depend on where
   the gradient goes. Only the loop for contiguous rows of 16 bits without options reads them itself: widening twice in
   registers costs less than to store and load them.
2. There is room for the rows that go through the kernel together, 64 KiB, or a longer row. Exponentials waiting
   in 16 bits would lose what the promises keep, and computing them twice would also widen every logit twice.
3. A gradient whose rows lie side by side, as in Fortran order, is stored when all rows of the group are done: by rows,
   one number at a time would be written to every cache line, and a call took 30 times as long.
4. Into another array that exceeds the caches the gradient is copied too, though its rows are contiguous: from the copy
   it goes past the caches, see `simd/stream.h`, and its lines need not be read. That took 0.8 of the time with two
   threads and 0.65 with one; within the caches it would take 1.2. New memory is in the caches, for the system has just
   cleared it: there it took up to 1.15.
"""
from fastce._cpu.lanes cimport LANES
from fastce._cpu.layout.convert cimport NATIVE, Format, load_array, store_array
from fastce._cpu.layout.transpose cimport transpose
from fastce._cpu.math cimport real
from fastce._cpu.platform cimport cache_bytes, not_inlined
from fastce._cpu.prefetch cimport CACHE_LINE, prefetch_to_write
from fastce._cpu.task cimport Matrix, Task, row_offset

cdef extern from "simd/stream.h" nogil:
    const bint STREAMS "FASTCE_STREAMS"
    void end_streams "fastce_end_streams"()
    void stream_product "fastce_stream_product"(
        const void* e, Py_ssize_t n, double factor, Py_ssize_t patch, double value, void* out)

cdef enum:
    # Gradients that are stored class by class wait for each other: 16 rows fill a cache line of floats, and more are
    # stored in longer runs.
    GROUP_BYTES = 1048576
    MOST_ROWS = 256
    MOST_BYTES = 16777216
    RUN_CLASSES = 16


cdef inline Py_ssize_t row_bytes(const Task* task, real like) noexcept nogil:
    """Return the size of a copied row."""
    return task.n_classes * <Py_ssize_t>sizeof(real)


cdef inline bint is_contiguous(const Task* task, const Matrix* matrix, real like) noexcept nogil:
    """Return True if all rows are arrays of the arithmetic's type at aligned addresses."""
    cdef Py_ssize_t k, size = sizeof(real)
    if matrix.format != NATIVE or matrix.class_stride != size or <size_t>matrix.data % <size_t>size != 0:
        return False
    for k in range(task.n_dims):
        if matrix.row_strides[k] % size != 0:
            return False
    return True


cdef inline bint streams_out(const Task* task, real like) noexcept nogil:
    """Return True if the gradient is to go past the caches."""
    cdef Py_ssize_t n_bytes = task.n_rows * row_bytes(task, like)
    return (
        STREAMS and task.out.data != NULL and not task.out_is_new and task.out.data != task.logits.data
        and n_bytes >= cache_bytes() and is_contiguous(task, &task.out, like))


cdef inline bint copies_out(const Task* task, real like) noexcept nogil:
    """Return True if rows of the gradient must be copied."""
    return task.out.data != NULL and (not is_contiguous(task, &task.out, like) or streams_out(task, like))


cdef inline bint needs_copies(const Task* task, real like) noexcept nogil:
    """Return True if rows of the logits or of the gradient must be copied."""
    return not is_contiguous(task, &task.logits, like) or copies_out(task, like)


cdef inline void describe_copies(const Task* task, Matrix* matrix, real like) noexcept nogil:
    """Describe a matrix of copies that have no place yet."""
    cdef Py_ssize_t k, stride = row_bytes(task, like)
    matrix.format = NATIVE
    matrix.class_stride = sizeof(real)
    for k in range(task.n_dims - 1, -1, -1):
        matrix.row_strides[k] = stride
        stride *= task.row_shape[k]


cdef inline Task task_of_copies(const Task* source, real like) noexcept nogil:
    """Return the same task with copies of its logits and gradient where it needs them."""
    cdef Task copy_task = source[0]
    copy_task.source = source
    copy_task.copies_logits = not is_contiguous(source, &source.logits, like)
    copy_task.copies_out = copies_out(source, like)
    copy_task.streams = streams_out(source, like)
    if copy_task.copies_logits:
        describe_copies(source, &copy_task.logits, like)
    if copy_task.copies_out:
        describe_copies(source, &copy_task.out, like)
    return copy_task


cdef inline bint stores_columns(const Task* task, real like) noexcept nogil:
    """Return True if the rows of a gradient that must be copied lie side by side."""
    cdef const Matrix* out = &task.out
    cdef Py_ssize_t size = sizeof(real)
    return (
        out.data != NULL and out.format == NATIVE and out.class_stride != size and out.class_stride % size == 0
        and out.row_strides[task.n_dims - 1] == size)


cdef inline Py_ssize_t copied_group(const Task* task, Py_ssize_t row_group, real like) noexcept nogil:
    """Return how many rows are copied together: as many as go through the kernel, or several times that."""
    cdef Py_ssize_t rows
    if not stores_columns(task, like):
        return row_group
    rows = max(GROUP_BYTES // row_bytes(task, like), <Py_ssize_t>LANES)
    rows = min(rows, MOST_BYTES // row_bytes(task, like))
    return max(<Py_ssize_t>1, min(rows, <Py_ssize_t>MOST_ROWS) // row_group) * row_group


cdef inline void place_copies(
    Task* copy_task, Py_ssize_t start, Py_ssize_t n, char* copies, real like
) noexcept nogil:
    """Place the copies of n rows from `start` on; the gradient takes the place of the logits."""
    cdef char* first = copies - start * row_bytes(copy_task, like)
    cdef const Task* source = copy_task.source
    cdef Py_ssize_t i, last = copy_task.n_dims - 1
    if copy_task.streams:
        # As far from a line as the gradient itself; and the lines that two rows share are written in the usual way.
        first += <size_t>(source.out.data + row_offset(source, &source.out, start)) % CACHE_LINE
        for i in range(start, min(start + n + 1, source.n_rows)):
            prefetch_to_write(source.out.data + row_offset(source, &source.out, i))
    if copy_task.copies_logits:
        copy_task.logits.data = first
    if not copy_task.copies_out:
        return
    copy_task.out.data = first
    copy_task.stores_rows = not (
        stores_columns(source, like)
        and <size_t>(source.out.data + row_offset(source, &source.out, start)) % sizeof(real) == 0
        and (last == 0 or start % copy_task.row_shape[last] + n <= copy_task.row_shape[last]))


cdef inline void store_columns(const Task* copy_task, Py_ssize_t start, Py_ssize_t n, real like) noexcept nogil:
    """Store the gradient of n copied rows, class by class; ask for the lines of the next classes meanwhile."""
    cdef const Matrix* out = &copy_task.source.out
    cdef const real* copy = <const real*>(copy_task.out.data + row_offset(copy_task, &copy_task.out, start))
    cdef char* first = out.data + row_offset(copy_task.source, out, start)
    cdef Py_ssize_t j, k = 0, ahead, n_bytes = n * <Py_ssize_t>sizeof(real)
    while k < copy_task.n_classes:
        for ahead in range(k + RUN_CLASSES, min(k + 2 * RUN_CLASSES, copy_task.n_classes)):
            j = 0
            while j < n_bytes:
                prefetch_to_write(first + ahead * out.class_stride + j)
                j += CACHE_LINE
        transpose(
            copy + k, copy_task.n_classes, n, min(copy_task.n_classes - k, <Py_ssize_t>RUN_CLASSES),
            <real*>(first + k * out.class_stride), out.class_stride // <Py_ssize_t>sizeof(real))
        k += RUN_CLASSES


ctypedef void (*load_t)(const char*, Format, Py_ssize_t, Py_ssize_t, real*) noexcept nogil
ctypedef void (*store_t)(const real*, real, bint, Py_ssize_t, char*, Format, Py_ssize_t) noexcept nogil


# Both are called, not inlined: with their loops inside, the row kernel's own had too few registers.
cdef inline void load_block(
    const char* source, Format format, Py_ssize_t stride, Py_ssize_t n, real* target
) noexcept nogil:
    """Load n numbers into scratch memory."""
    cdef load_t load = load_array
    (<load_t>not_inlined(<void*>load))(source, format, stride, n, target)


cdef inline void store_block(
    const Task* source, const real* row, real factor, bint may_be_nan, Py_ssize_t k, Py_ssize_t n, char* target
) noexcept nogil:
    """Store n classes of a copied row, from class k on and times a factor, where the caller wants them."""
    cdef store_t store = store_array
    (<store_t>not_inlined(<void*>store))(
        row + k, factor, may_be_nan, n, target + k * source.out.class_stride, source.out.format,
        source.out.class_stride)


cdef inline void stream_block(
    const real* row, real factor, Py_ssize_t patch, real value, Py_ssize_t k, Py_ssize_t n, char* target
) noexcept nogil:
    """Store them past the caches, with `value` for the class `patch`."""
    stream_product(row + k, n, factor, patch - k, value, <real*>target + k)
