"""From the operands of a call to the structs of a task, and from its loss to a NumPy scalar."""
from libc.string cimport memset

cimport numpy as cnp

from fastce._cpu.call cimport Call, Operand, PyArray_NewLikeArray, PyArray_Scalar, view_of
from fastce._cpu.layout.convert cimport BFLOAT16, DOUBLE, FLOAT, HALF, NATIVE, Format
from fastce._cpu.task cimport MAX_DIMS, Matrix, Task


cdef inline Format format_of(int type_num, int arithmetic) noexcept:
    if type_num == arithmetic:
        return NATIVE
    if type_num == cnp.NPY_FLOAT32:
        return FLOAT
    if type_num == cnp.NPY_FLOAT64:
        return DOUBLE
    return HALF if type_num == cnp.NPY_FLOAT16 else BFLOAT16


cdef inline void set_matrix(
    Matrix* matrix, const Operand* operand, int axis, int arithmetic, const int* kept, Py_ssize_t n_dims
) noexcept:
    """Describe an operand, whose classes are along `axis`, by the row axes that are left after merging."""
    cdef Py_ssize_t k
    if operand == NULL:
        return
    matrix.data = operand.data
    matrix.class_stride = operand.strides[axis]
    matrix.format = format_of(operand.type_num, arithmetic)
    matrix.row_strides[0] = 0
    for k in range(n_dims):
        matrix.row_strides[k] = operand.strides[kept[k]]


cdef inline bint can_merge(const Operand* operand, int outer, int inner) noexcept:
    """Return True if one axis continues where another ends."""
    return operand == NULL or operand.strides[outer] == operand.strides[inner] * operand.shape[inner]


cdef inline void describe(
    Task* task, const Operand* logits, int axis, const Operand* prob, const Operand* out, const Operand* v,
    const Operand* hess
) noexcept:
    """Start a task with the operands that have a class axis, by as few row axes as their strides allow."""
    cdef int kept[MAX_DIMS]
    cdef int k, last = 0
    cdef int arithmetic = cnp.NPY_FLOAT64 if logits.type_num == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32
    memset(task, 0, sizeof(task[0]))
    task.n_classes = logits.shape[axis]
    task.n_rows = 1
    task.row_shape[0] = 1
    for k in range(logits.n_dims):
        if k == axis or logits.shape[k] == 1:
            continue
        task.n_rows *= logits.shape[k]
        if task.n_dims > 0 and (
                can_merge(logits, last, k) and can_merge(prob, last, k) and can_merge(out, last, k)
                and can_merge(v, last, k) and can_merge(hess, last, k)):
            task.n_dims -= 1
            task.row_shape[task.n_dims] *= logits.shape[k]
        else:
            task.row_shape[task.n_dims] = logits.shape[k]
        kept[task.n_dims] = last = k
        task.n_dims += 1
    set_matrix(&task.logits, logits, axis, arithmetic, kept, task.n_dims)
    set_matrix(&task.prob, prob, axis, arithmetic, kept, task.n_dims)
    set_matrix(&task.out, out, axis, arithmetic, kept, task.n_dims)
    set_matrix(&task.v, v, axis, arithmetic, kept, task.n_dims)
    set_matrix(&task.hess, hess, axis, arithmetic, kept, task.n_dims)
    task.n_dims = max(task.n_dims, 1)
    # neutral options
    task.logit_scale = 1
    task.factor = 1
    task.curvature.factor = task.curvature.z_factor = 1  # the Hessian's own, as products have it
    task.curvature.bends = True


cdef inline int set_curvature(Task* task, object fields) except -1:
    """Say which diagonal is wanted, by the fields of Python's `Curvature`."""
    cdef bint per_class
    task.curvature.factor, task.curvature.z_factor, task.curvature.bends, task.curvature.absolute, \
        task.curvature.floor, per_class = fields
    if per_class:
        task.curvature.factor *= task.n_classes / <double>max(1, task.n_classes - 1)
    return 0


cdef inline cnp.ndarray new_like(const Operand* logits):
    """Return an array for a result, in the memory order of the logits."""
    if logits.is_dense:
        return cnp.PyArray_EMPTY(
            logits.n_dims, <cnp.npy_intp*>logits.shape, logits.type_num, not logits.is_ready)
    return PyArray_NewLikeArray(view_of(logits), cnp.NPY_KEEPORDER, NULL, 0)


cdef inline cnp.ndarray new_per_row(const Call* call, int type_num):
    """Return an array for one number for each row."""
    cdef cnp.npy_intp shape[MAX_DIMS]
    cdef int k, n = 0
    for k in range(call.logits.n_dims):
        if k != call.axis:
            shape[n] = call.logits.shape[k]
            n += 1
    return cnp.PyArray_EMPTY(n, shape, type_num, 0)


cdef inline object scalar_of(double value, int type_num):
    """Return a NumPy scalar, float or double."""
    cdef float rounded = <float>value
    return PyArray_Scalar(
        <void*>&value if type_num == cnp.NPY_FLOAT64 else <void*>&rounded, cnp.PyArray_DescrFromType(type_num), None)
