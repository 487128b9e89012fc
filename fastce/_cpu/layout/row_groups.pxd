"""Between the caller's memory and scratch memory, where each class has the numbers of 16 rows side by side.

Design
------
1. Three ways lead there. Rows that lie side by side, as in (N, C, d1, ...) and Fortran order, are copied as vectors.
   Rows whose classes lie nearer to each other than the rows do are transposed, if need be through a buffer of
   contiguous rows. Numbers of 16 bits are widened on the way in and rounded on the way out. Anything else goes number
   by number.
2. Rows that are transposed are asked for while an earlier group is loaded, and while its sums are formed. Asked for all
   at once they came too late: losses of every other class took 1.3 times as long, products of 100 classes 1.2 to 1.4.
3. All of this is called, not inlined. Inlined in its ten places it was two thirds of the column kernels, took half of
   the time to compile everything, and left the kernels too few registers: options took a tenth to a fifth longer.
"""
from libc.stdint cimport uint16_t
from libc.string cimport memcpy

from fastce._cpu.lanes cimport LANES
from fastce._cpu.layout.convert cimport (
    NATIVE, Format, is_16_bit, is_array, magnitude, narrow_16, read_converted, widen_16, write_converted
)
from fastce._cpu.layout.transpose cimport transpose, transpose_from, transpose_to
from fastce._cpu.math cimport real
from fastce._cpu.platform cimport not_inlined
from fastce._cpu.prefetch cimport CACHE_LINE, prefetch_to_l2
from fastce._cpu.task cimport Matrix, Task, row_offset

cdef enum:
    MAX_GROUPS = 16  # of 16 rows, in scratch memory
    WIDENED = 128  # classes of 16 rows that are loaded at once, and asked for
    ASKED = 8  # of 16 later rows, while these are loaded; the others while sums are formed


cdef enum Layout:
    UNIT_ROW_STRIDE = 0  # the rows lie side by side
    TRANSPOSED = 1     # the classes lie nearer to each other than the rows
    GATHER = 2


# Where one operand has the numbers of up to 16 rows.
cdef struct RowGroupView:
    char* first                # the first row
    Py_ssize_t row_stride
    char* scattered[LANES]     # the rows, where no stride leads from one to the next
    bint has_stride
    Py_ssize_t n
    Py_ssize_t ahead           # rows from these to those that are asked for meanwhile; 0: none are
    Py_ssize_t class_stride
    Layout layout
    Format format


cdef inline char* row_of(const RowGroupView* lanes, Py_ssize_t j) noexcept nogil:
    return lanes.first + j * lanes.row_stride if lanes.has_stride else lanes.scattered[j]


cdef inline void locate(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, RowGroupView* lanes, real like
) noexcept nogil:
    cdef Py_ssize_t j, last = task.n_dims - 1
    cdef Py_ssize_t size = 2 if is_16_bit(matrix.format) else <Py_ssize_t>sizeof(real)
    lanes.n = n
    lanes.ahead = 0
    lanes.class_stride = matrix.class_stride
    lanes.format = matrix.format
    lanes.layout = GATHER
    lanes.first = NULL
    lanes.row_stride = 0
    lanes.has_stride = True
    if matrix.data == NULL:
        return
    lanes.first = matrix.data + row_offset(task, matrix, start)
    lanes.row_stride = matrix.row_strides[last]
    lanes.has_stride = last == 0 or start % task.row_shape[last] + n <= task.row_shape[last]
    if not lanes.has_stride:
        for j in range(n):
            lanes.scattered[j] = matrix.data + row_offset(task, matrix, start + j)
    elif n == LANES:
        if lanes.row_stride == size and matrix.class_stride % size == 0 and <size_t>lanes.first % size == 0 and (
                matrix.format == NATIVE or (real is float and is_16_bit(matrix.format))):
            lanes.layout = UNIT_ROW_STRIDE
        elif magnitude(matrix.class_stride) < magnitude(lanes.row_stride):
            lanes.layout = TRANSPOSED


cdef inline void load_transposed(
    const RowGroupView* lanes, Py_ssize_t start, Py_ssize_t stop, real* scratch
) noexcept nogil:
    cdef const char* first = lanes.first + start * lanes.class_stride
    cdef Py_ssize_t k = 0, n = stop - start
    if is_array(first, lanes.format, lanes.class_stride, scratch[0]) and lanes.format == NATIVE and (
            lanes.row_stride % <Py_ssize_t>sizeof(real) == 0):
        transpose(<const real*>first, lanes.row_stride // <Py_ssize_t>sizeof(real), LANES, n, scratch, LANES)
        return
    while k < n:
        transpose_from(
            first + k * lanes.class_stride, lanes.format, lanes.class_stride, lanes.row_stride, LANES,
            min(n - k, <Py_ssize_t>WIDENED), scratch + LANES * k, LANES)
        k += WIDENED


cdef inline void store_transposed(
    const RowGroupView* lanes, Py_ssize_t start, Py_ssize_t stop, const real* scratch
) noexcept nogil:
    cdef char* first = lanes.first + start * lanes.class_stride
    cdef Py_ssize_t k = 0, n = stop - start
    if is_array(first, lanes.format, lanes.class_stride, scratch[0]) and lanes.format == NATIVE and (
            lanes.row_stride % <Py_ssize_t>sizeof(real) == 0):
        transpose(scratch, LANES, n, LANES, <real*>first, lanes.row_stride // <Py_ssize_t>sizeof(real))
        return
    while k < n:
        transpose_to(
            scratch + LANES * k, LANES, LANES, min(n - k, <Py_ssize_t>WIDENED), first + k * lanes.class_stride,
            lanes.format, lanes.class_stride, lanes.row_stride)
        k += WIDENED


cdef inline void load_vector(const RowGroupView* lanes, Py_ssize_t k, real* x) noexcept nogil:
    """Load a class of 16 rows that lie side by side."""
    cdef const char* first = lanes.first + k * lanes.class_stride
    if lanes.format == NATIVE:
        memcpy(x, first, LANES * sizeof(real))
    elif real is float:
        widen_16(<const uint16_t*>first, lanes.format, x)


cdef inline void store_vector(const RowGroupView* lanes, Py_ssize_t k, const real* x) noexcept nogil:
    cdef char* first = lanes.first + k * lanes.class_stride
    if lanes.format == NATIVE:
        memcpy(first, x, LANES * sizeof(real))
    elif real is float:
        narrow_16(x, lanes.format, <uint16_t*>first)


cdef inline void load_class(const RowGroupView* lanes, Py_ssize_t k, real* x) noexcept nogil:
    cdef Py_ssize_t j
    cdef Py_ssize_t offset = k * lanes.class_stride
    if lanes.layout == UNIT_ROW_STRIDE:
        load_vector(lanes, k, x)
    else:
        for j in range(lanes.n):
            x[j] = read_converted(row_of(lanes, j) + offset, lanes.format, x[j])


cdef inline void store_class(const RowGroupView* lanes, Py_ssize_t k, const real* x) noexcept nogil:
    cdef Py_ssize_t j
    cdef Py_ssize_t offset = k * lanes.class_stride
    if lanes.layout == UNIT_ROW_STRIDE:
        store_vector(lanes, k, x)
    else:
        for j in range(lanes.n):
            write_converted(row_of(lanes, j) + offset, lanes.format, x[j])


cdef inline void load_planes(
    const RowGroupView* lanes, Py_ssize_t n_groups, Py_ssize_t n_classes, real* scratch, Py_ssize_t size
) noexcept nogil:
    """Load groups of 16 rows, all side by side; class by class, so that memory is read in long runs."""
    cdef Py_ssize_t g, k, step = lanes[0].class_stride
    if lanes[0].format == NATIVE:  # a loop of its own: a test for each vector took half as long again
        for k in range(n_classes):
            for g in range(n_groups):
                memcpy(scratch + g * size + k * LANES, lanes[g].first + k * step, LANES * sizeof(real))
    else:
        for k in range(n_classes):
            for g in range(n_groups):
                load_vector(&lanes[g], k, scratch + g * size + k * LANES)


cdef inline void store_planes(
    const RowGroupView* lanes, Py_ssize_t n_groups, Py_ssize_t n_classes, const real* scratch, Py_ssize_t size
) noexcept nogil:
    """Write groups of 16 rows, all side by side."""
    cdef Py_ssize_t g, k, step = lanes[0].class_stride
    if lanes[0].format == NATIVE:
        for k in range(n_classes):
            for g in range(n_groups):
                memcpy(lanes[g].first + k * step, scratch + g * size + k * LANES, LANES * sizeof(real))
    else:
        for k in range(n_classes):
            for g in range(n_groups):
                store_vector(&lanes[g], k, scratch + g * size + k * LANES)


cdef inline void fill_lanes(const RowGroupView* lanes, Py_ssize_t n, real* scratch) noexcept nogil:
    """Write zeros for lanes without a row, of n classes."""
    cdef Py_ssize_t j, k
    if lanes.n < LANES:
        for k in range(n):
            for j in range(lanes.n, LANES):
                scratch[k * LANES + j] = 0


cdef inline void load_all_ways(
    const RowGroupView* lanes, Py_ssize_t start, Py_ssize_t stop, real* scratch
) noexcept nogil:
    cdef Py_ssize_t k
    if lanes.layout == TRANSPOSED:
        load_transposed(lanes, start, stop, scratch)
    else:
        for k in range(stop - start):
            load_class(lanes, start + k, scratch + k * LANES)
    fill_lanes(lanes, stop - start, scratch)


cdef inline void store_all_ways(
    const RowGroupView* lanes, Py_ssize_t start, Py_ssize_t stop, const real* scratch
) noexcept nogil:
    cdef Py_ssize_t k
    if lanes.layout == TRANSPOSED:
        store_transposed(lanes, start, stop, scratch)
    else:
        for k in range(stop - start):
            store_class(lanes, start + k, scratch + k * LANES)


ctypedef void (*load_t)(const RowGroupView*, Py_ssize_t, Py_ssize_t, real*) noexcept nogil
ctypedef void (*store_t)(const RowGroupView*, Py_ssize_t, Py_ssize_t, const real*) noexcept nogil


cdef inline void load_classes(
    const RowGroupView* lanes, Py_ssize_t start, Py_ssize_t stop, real* scratch
) noexcept nogil:
    """Load the classes start .. stop - 1."""
    cdef load_t load = load_all_ways
    (<load_t>not_inlined(<void*>load))(lanes, start, stop, scratch)


cdef inline void store_classes(
    const RowGroupView* lanes, Py_ssize_t start, Py_ssize_t stop, const real* scratch
) noexcept nogil:
    """Write the classes start .. stop - 1."""
    cdef store_t store = store_all_ways
    (<store_t>not_inlined(<void*>store))(lanes, start, stop, scratch)


cdef inline void prefetch_planes(const RowGroupView* lanes, Py_ssize_t n_classes) noexcept nogil:
    """Ask for 16 later rows that lie side by side."""
    cdef const char* first = lanes.first + lanes.ahead * lanes.row_stride
    cdef Py_ssize_t k
    # Lines of more planes may evict each other from L2 before they are used: 150 planes took 1.2 times as long.
    if lanes.ahead > 0 and n_classes <= 16:
        for k in range(n_classes):
            prefetch_to_l2(first + k * lanes.class_stride)


cdef inline void prefetch_classes(
    const RowGroupView* lanes, Py_ssize_t row, Py_ssize_t n, Py_ssize_t start, Py_ssize_t stop
) noexcept nogil:
    """Ask for the classes start .. stop - 1 of n of 16 later rows, from `row` on."""
    cdef const char* first = lanes.first + lanes.ahead * lanes.row_stride
    cdef Py_ssize_t j, k, step = max(<Py_ssize_t>CACHE_LINE, lanes.class_stride)
    if lanes.ahead == 0 or lanes.layout != TRANSPOSED or lanes.class_stride < 0 or lanes.row_stride < 0:
        return
    for j in range(row, row + n):
        k = start * lanes.class_stride
        while k < stop * lanes.class_stride:
            prefetch_to_l2(first + j * lanes.row_stride + k)
            k += step


cdef inline bint locate_groups(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, RowGroupView* lanes, real like
) noexcept nogil:
    """Locate groups of 16 rows; return True if all lie side by side."""
    cdef bint has_unit_stride = True
    cdef Py_ssize_t g
    for g in range((n + LANES - 1) // LANES):
        locate(task, matrix, start + g * LANES, min(n - g * LANES, <Py_ssize_t>LANES), &lanes[g], like)
        has_unit_stride = has_unit_stride and lanes[g].layout == UNIT_ROW_STRIDE
    return has_unit_stride


cdef inline void load_groups(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, Py_ssize_t n_asked, RowGroupView* lanes,
    real* scratch
) noexcept nogil:
    """Load an operand of n rows in groups of 16, if there is one; tell where they lie, and ask for the next.

    `n_asked` of 16 rows are asked for here; `prefetch_classes` can ask for the others.
    """
    cdef Py_ssize_t g, k, stop, n_groups = (n + LANES - 1) // LANES, size = task.n_classes * LANES
    cdef bint are_planes
    if matrix.data == NULL:
        return
    are_planes = locate_groups(task, matrix, start, n, lanes, scratch[0])
    for g in range(n_groups):
        lanes[g].ahead = n if start + n + (g + 1) * LANES <= task.n_rows else 0
    if are_planes:
        load_planes(lanes, n_groups, task.n_classes, scratch, size)
        for g in range(n_groups):
            fill_lanes(&lanes[g], task.n_classes, scratch + g * size)
            prefetch_planes(&lanes[g], task.n_classes)
        return
    for g in range(n_groups):
        k = 0
        while k < task.n_classes:
            stop = min(k + WIDENED, task.n_classes)
            prefetch_classes(&lanes[g], 0, n_asked, k, stop)
            load_classes(&lanes[g], k, stop, scratch + g * size + k * LANES)
            k = stop


cdef inline void store_groups(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, const real* scratch
) noexcept nogil:
    """Write groups of 16 rows, n rows in all."""
    cdef RowGroupView lanes[MAX_GROUPS]
    cdef Py_ssize_t g, n_groups = (n + LANES - 1) // LANES, size = task.n_classes * LANES
    if locate_groups(task, matrix, start, n, lanes, scratch[0]):
        store_planes(lanes, n_groups, task.n_classes, scratch, size)
    else:
        for g in range(n_groups):
            store_classes(&lanes[g], 0, task.n_classes, scratch + g * size)
