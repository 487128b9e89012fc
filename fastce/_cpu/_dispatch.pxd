"""Which kernel does a task, and what it needs for that."""
from fastce._cpu._columns cimport STAGE_BYTES, column_block, column_group
from fastce._cpu._convert cimport magnitude
from fastce._cpu._math cimport real
from fastce._cpu._plain_columns cimport is_plain_call
from fastce._cpu._plain_stage cimport PLAIN_STAGE_BYTES, plain_group
from fastce._cpu._prefetch cimport CACHE_LINE
from fastce._cpu._rows cimport row_block, row_group, scratch_bytes
from fastce._cpu._staged cimport needs_stage, row_bytes, staged_group
from fastce._cpu._task cimport Task
from fastce._cpu._lanes cimport LANES, TILE
from fastce._cpu._units cimport curvature_bytes

cdef enum:
    # Rows with contiguous classes are faster in a column kernel, 16 of them to a vector, while they do not fill the row
    # kernel's vectors: 100 floats take 0.46 (AVX-512) and 0.86 (AVX2) of the row kernel's time, with options 0.67 and
    # 0.93; 128 take 0.78 and 1.39, with options 1.10 and 1.45. Doubles: 0.77 and 0.75, then 1.16 and 1.14.
    FEW_CLASSES = 127
    # Classes so many numbers apart share cache lines, and rows read each line a few times while it is in L1. Farther
    # apart, it is 16 rows that share a line.
    NEAR_CLASSES = 4


cdef enum Kernel:
    ROWS = 0
    COLUMNS = 1
    PLAIN_COLUMNS = 2
    CURVATURE = 3


cdef inline bint goes_by_rows(const Task* task, int itemsize) noexcept:
    """Return True if the row kernel is to do a task: choose between rows and columns.

    By classes, their stride and the type alone: a row must have the same bits in every batch.
    """
    return task.n_classes > FEW_CLASSES and magnitude(task.logits.class_stride) <= NEAR_CLASSES * itemsize


cdef inline Kernel choose_kernel(const Task* task, int itemsize) noexcept:
    """Choose the kernel for a task whose logits have this size."""
    cdef bint has_room
    if task.second.data != NULL:
        return CURVATURE
    if goes_by_rows(task, itemsize):
        return ROWS
    has_room = plain_group(task, <double>0) > 0 if itemsize == 8 else plain_group(task, <float>0) > 0
    return PLAIN_COLUMNS if has_room and is_plain_call(task) else COLUMNS


cdef inline Py_ssize_t align(Py_ssize_t n_bytes) noexcept nogil:
    """Return n_bytes, or an address, up to whole cache lines, so that threads do not share one."""
    return (n_bytes + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


cdef inline Py_ssize_t group_of(const Task* task, Kernel kernel, real like) noexcept nogil:
    """Return how many rows a kernel does together."""
    if kernel == CURVATURE:
        return task.unit_rows
    if kernel == PLAIN_COLUMNS:
        return plain_group(task, like)
    return row_group(task, like) if kernel == ROWS else column_group(task, like)


cdef inline Py_ssize_t chunk_group_of(const Task* task, Kernel kernel, real like) noexcept nogil:
    """Return of how many rows a thread's share should be a multiple."""
    if kernel == ROWS and needs_stage(task, like):
        return staged_group(task, row_group(task, like), like)
    return group_of(task, kernel, like)


cdef inline Py_ssize_t block_of(const Task* task, Kernel kernel, real like) noexcept nogil:
    """Return how many classes a kernel does at once."""
    return column_block(like) if kernel == COLUMNS or kernel == PLAIN_COLUMNS else row_block(task, like)


cdef inline Py_ssize_t rows_of_part(const Task* task, Kernel kernel, real like) noexcept nogil:
    """Return over how many rows a kernel sums the losses."""
    return TILE if kernel == PLAIN_COLUMNS else min(group_of(task, kernel, like), <Py_ssize_t>LANES)


cdef inline Py_ssize_t workspace_bytes(const Task* task, Kernel kernel, real like) noexcept nogil:
    """Return what one thread needs: scratch memory and maxima per block; for the column kernels a stage and 16 maxima.

    Rows that are not worked on where they are need a stage too.
    """
    cdef Py_ssize_t size
    if kernel == CURVATURE:
        return align(curvature_bytes(task, like))
    if kernel == PLAIN_COLUMNS:
        return 2 * PLAIN_STAGE_BYTES
    if kernel == ROWS:
        size = scratch_bytes(task, like) + align((task.n_classes // task.block + 1) * <Py_ssize_t>sizeof(double))
        if needs_stage(task, like):
            size += align(staged_group(task, row_group(task, like), like) * row_bytes(task, like))
        return size
    return STAGE_BYTES + align((task.n_classes // column_block(like) + 1) * LANES * <Py_ssize_t>sizeof(double))
