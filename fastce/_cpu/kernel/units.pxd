"""Units of the curvature kernel: the operands of a row, or of 16 rows side by side, as arrays.

An operand of a row that is an array of the arithmetic's type is read and written where it is. Whatever else there is,
16 bits, strides, 16 rows, comes into the workspace first and goes back from there.
"""
from fastce._cpu.kernel.columns cimport column_block
from fastce._cpu.lanes cimport LANES
from fastce._cpu.kernel.row_view cimport start_of_row
from fastce._cpu.kernel.rows cimport GROUP_BYTES, row_group
from fastce._cpu.layout.convert cimport NATIVE, is_array, store_array
from fastce._cpu.layout.row_groups cimport MAX_GROUPS, RowGroupView, load_groups, store_groups
from fastce._cpu.layout.copied_rows cimport load_block
from fastce._cpu.math cimport real
from fastce._cpu.task cimport Matrix, Task


# Arrays of the workspace, each with room for all units that are done together.
cdef enum:
    AHEAD_BYTES = 16384  # how far ahead memory is asked for
    EXPS = 0     # in the end the product, or the diagonal
    SECOND = 1   # v, or in the end the gradient
    PROB = 2
    CAPPED = 3   # f(x)
    SLOPES = 4   # 1 - tanh^2
    SCALED = 5   # w, where that is not v
    N_ARRAYS = 6
    N_OPERANDS = 3


cdef struct Unit:
    Py_ssize_t n       # numbers of each operand
    Py_ssize_t width   # of a class: 1 or 16
    char* x            # logits
    char* exps
    char* v
    char* prob
    char* capped       # f(logits); without a softcap x
    char* slopes
    char* scaled       # memory for w, and w itself: slope * v, perhaps scaled
    char* w
    char* out          # the product or the gradient, and the diagonal
    char* hess
    const char* next_x   # rows to come, of which memory is asked while this one computes: the next to L1, others to L2
    const char* ahead_x
    const char* ahead_v


cdef inline int n_arrays(const Task* task) noexcept nogil:
    """Return how many arrays of the workspace are in use."""
    if task.softcap != 0:
        return N_ARRAYS
    return PROB + 1 if task.prob.data != NULL else SECOND + 1


cdef inline int n_operands(const Task* task) noexcept nogil:
    """Return how many of logits, probabilities and v may be there."""
    return N_OPERANDS if task.is_product else N_OPERANDS - 1


cdef inline void plan_units(Task* task, real like) noexcept nogil:
    """Decide how many rows are done together; kept in the task, for divisions took a tenth of the time."""
    if task.by_rows:
        task.unit_rows = row_group(task, like)
        task.unit_size = (task.n_classes + LANES - 1) // LANES * LANES
        task.array_size = task.unit_rows * task.unit_size
    else:
        task.unit_size = task.n_classes * LANES
        task.unit_rows = LANES * max(
            1, min(<Py_ssize_t>MAX_GROUPS, column_block(like) * LANES // (task.unit_size * n_arrays(task))))
        task.array_size = task.unit_rows // LANES * task.unit_size


cdef inline Py_ssize_t units_bytes(const Task* task, real like) noexcept nogil:
    return N_ARRAYS * task.array_size * <Py_ssize_t>sizeof(real)


cdef inline bint is_in_place(const Matrix* matrix, const char* row, real like) noexcept nogil:
    """Return True if a row is an array of the arithmetic's type."""
    return matrix.format == NATIVE and is_array(row, NATIVE, matrix.class_stride, like)


cdef inline char* load_row(
    const Task* task, const Matrix* matrix, Py_ssize_t i, char* scratch, real like
) noexcept nogil:
    """Return the operand's row i as an array, in `scratch` if it must be."""
    cdef char* row = start_of_row(task, matrix, i)
    if row == NULL or is_in_place(matrix, row, like):
        return row
    load_block(row, matrix.format, matrix.class_stride, task.n_classes, <real*>scratch)
    return scratch


cdef inline char* place_row(
    const Task* task, const Matrix* matrix, Py_ssize_t i, char* scratch, real like
) noexcept nogil:
    """Return where a result's row is written: where it belongs if it can be, else in `scratch`."""
    cdef char* row = start_of_row(task, matrix, i)
    return row if is_in_place(matrix, row, like) else scratch


cdef inline void store_row(
    const Task* task, const Matrix* matrix, Py_ssize_t i, const char* result, real like
) noexcept nogil:
    """Write a result's row if it is in scratch memory."""
    cdef char* row = start_of_row(task, matrix, i)
    if result != row:
        store_array(
            <const real*>result, <real>1, True, task.n_classes, row, matrix.format, matrix.class_stride)


cdef inline void locate_unit(const Task* task, Py_ssize_t i, Py_ssize_t u, real* arrays, Unit* unit) noexcept nogil:
    """Locate the u-th unit: row i, or 16 rows that are in the workspace already."""
    cdef Py_ssize_t ahead, k
    cdef char* scratch[N_ARRAYS]
    cdef bint is_capped = task.softcap != 0
    for k in range(N_ARRAYS):
        scratch[k] = <char*>(arrays + k * task.array_size + u * task.unit_size)
    unit.width = 1 if task.by_rows else LANES
    unit.n = task.n_classes * unit.width
    unit.exps = unit.hess = scratch[EXPS]
    unit.x = scratch[CAPPED if is_capped else EXPS]
    unit.v = scratch[SECOND]
    unit.out = scratch[EXPS if task.is_product else SECOND]
    unit.prob = scratch[PROB]
    unit.slopes = scratch[SLOPES]
    unit.scaled = scratch[SCALED]
    if task.by_rows:
        unit.x = load_row(task, &task.logits, i, unit.x, arrays[0])
        unit.prob = load_row(task, &task.prob, i, unit.prob, arrays[0])
        unit.out = place_row(task, &task.out, i, unit.out, arrays[0])
        if task.is_product:
            unit.v = load_row(task, &task.v, i, unit.v, arrays[0])
        else:
            unit.hess = place_row(task, &task.hess, i, unit.hess, arrays[0])
    unit.capped = scratch[CAPPED] if is_capped else unit.x
    unit.w = unit.v
    unit.next_x = unit.x + 2048  # of a long row, which is in L2
    unit.ahead_x = unit.x
    unit.ahead_v = unit.v
    # The next of the longest rows would push this one out of L2: 32000 floats took 1.3 times as long.
    if task.by_rows and task.unit_size * <Py_ssize_t>sizeof(real) <= GROUP_BYTES:
        ahead = min(i + 1 + AHEAD_BYTES // (task.unit_size * <Py_ssize_t>sizeof(real)), task.n_rows - 1)
        unit.next_x = start_of_row(task, &task.logits, min(i + 1, task.n_rows - 1))
        unit.ahead_x = start_of_row(task, &task.logits, ahead)
        unit.ahead_v = start_of_row(task, &task.v, ahead)


cdef inline void store_unit(const Task* task, const Unit* unit, Py_ssize_t i, real like) noexcept nogil:
    """Write those of a row's results that are in scratch memory."""
    store_row(task, &task.out, i, unit.out, like)
    if not task.is_product:
        store_row(task, &task.hess, i, unit.hess, like)


cdef inline void load_all_groups(const Task* task, Py_ssize_t start, Py_ssize_t n, real* arrays) noexcept nogil:
    """Copy all operands of n rows to the workspace."""
    cdef const Matrix* matrices[N_OPERANDS]
    cdef Py_ssize_t places[N_OPERANDS]
    cdef RowGroupView lanes[MAX_GROUPS]
    cdef Py_ssize_t k, size = task.array_size
    matrices[0], matrices[1], matrices[2] = &task.logits, &task.prob, &task.v
    places[0], places[1], places[2] = EXPS if task.softcap == 0 else CAPPED, PROB, SECOND
    for k in range(n_operands(task)):
        load_groups(task, matrices[k], start, n, LANES, lanes, arrays + places[k] * size)


cdef inline void store_all_groups(const Task* task, Py_ssize_t start, Py_ssize_t n, const real* arrays) noexcept nogil:
    """Write the results of n rows."""
    cdef const Matrix* matrices[2]
    cdef Py_ssize_t places[2]
    cdef Py_ssize_t k, size = task.array_size
    matrices[0], matrices[1] = &task.out, &task.hess
    places[0], places[1] = EXPS if task.is_product else SECOND, EXPS
    for k in range(1 if task.is_product else 2):
        store_groups(task, matrices[k], start, n, arrays + places[k] * size)
