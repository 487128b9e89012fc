"""From NumPy arrays to the structs of a task, and from its loss to a NumPy scalar."""
from libc.stdint cimport int64_t
from libc.string cimport memset

cimport numpy as cnp

from fastce._cpu._convert cimport BFLOAT16, DOUBLE, FLOAT, HALF, NATIVE, Format
from fastce._cpu._task cimport MAX_DIMS, Matrix, Task, Vector

cdef extern from "numpy/arrayobject.h":  # what Cython's own declarations lack
    enum: NPY_USERDEF
    object PyArray_Scalar(void* data, cnp.dtype dtype, object base)


cdef inline Format format_of(int type_num, int arithmetic) noexcept:
    if type_num == arithmetic:
        return NATIVE
    if type_num == cnp.NPY_FLOAT32:
        return FLOAT
    if type_num == cnp.NPY_FLOAT64:
        return DOUBLE
    return HALF if type_num == cnp.NPY_FLOAT16 else BFLOAT16


cdef inline int arithmetic_of(cnp.ndarray logits) noexcept:
    """Return the number of the type in which logits are computed with."""
    return cnp.NPY_FLOAT64 if cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32


cdef inline void set_matrix(
    Matrix* matrix, cnp.ndarray array, Py_ssize_t axis, int arithmetic, const Py_ssize_t* kept, Py_ssize_t n_dims
) noexcept:
    """Describe `array`, whose classes are along `axis`, by the row axes that are left after merging."""
    cdef Py_ssize_t k
    if array is None:
        return
    matrix.data = cnp.PyArray_BYTES(array)
    matrix.class_stride = cnp.PyArray_STRIDE(array, axis)
    matrix.format = format_of(cnp.PyArray_TYPE(array), arithmetic)
    matrix.row_strides[0] = 0
    for k in range(n_dims):
        matrix.row_strides[k] = cnp.PyArray_STRIDE(array, kept[k])


cdef inline bint can_merge(cnp.ndarray array, Py_ssize_t outer, Py_ssize_t inner) noexcept:
    """Tell whether one axis continues where another ends."""
    return array is None or (
        cnp.PyArray_STRIDE(array, outer) == cnp.PyArray_STRIDE(array, inner) * cnp.PyArray_DIM(array, inner))


cdef inline void set_vector(Vector* vector, cnp.ndarray array) noexcept:
    vector.data = NULL
    vector.is_double = False
    if array is not None:
        vector.data = cnp.PyArray_BYTES(array)
        vector.is_double = cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64


cdef inline void* address(cnp.ndarray array) noexcept:
    return NULL if array is None else cnp.PyArray_DATA(array)


cdef inline void set_matrices(
    Task* task, Py_ssize_t axis, cnp.ndarray logits, cnp.ndarray prob, cnp.ndarray out, cnp.ndarray second
) noexcept:
    """Describe the operands with a class axis by as few row axes as their strides allow."""
    cdef Py_ssize_t kept[MAX_DIMS]
    cdef Py_ssize_t k, last = 0
    cdef int arithmetic = arithmetic_of(logits)
    task.row_shape[0] = 1
    for k in range(cnp.PyArray_NDIM(logits)):
        if k == axis or cnp.PyArray_DIM(logits, k) == 1:
            continue
        if task.n_dims > 0 and (
                can_merge(logits, last, k) and can_merge(prob, last, k) and can_merge(out, last, k)
                and can_merge(second, last, k)):
            task.n_dims -= 1
            task.row_shape[task.n_dims] *= cnp.PyArray_DIM(logits, k)
        else:
            task.row_shape[task.n_dims] = cnp.PyArray_DIM(logits, k)
        kept[task.n_dims] = last = k
        task.n_dims += 1
    set_matrix(&task.logits, logits, axis, arithmetic, kept, task.n_dims)
    set_matrix(&task.prob, prob, axis, arithmetic, kept, task.n_dims)
    set_matrix(&task.out, out, axis, arithmetic, kept, task.n_dims)
    set_matrix(&task.second, second, axis, arithmetic, kept, task.n_dims)
    task.n_dims = max(task.n_dims, 1)


cdef inline void describe(
    Task* task, Py_ssize_t axis, cnp.ndarray logits, cnp.ndarray target, cnp.ndarray prob, cnp.ndarray out,
    cnp.ndarray second
) noexcept:
    """Start a task with its operands, whose classes are along `axis`, and neutral options."""
    memset(task, 0, sizeof(task[0]))
    task.n_classes = cnp.PyArray_DIM(logits, axis)
    task.n_rows = cnp.PyArray_SIZE(logits) // task.n_classes
    set_matrices(task, axis, logits, prob, out, second)
    task.target = <const int64_t*>address(target)
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


cdef inline object scalar_of(double value, int type_num):
    """Return a NumPy scalar, float or double."""
    cdef float rounded = <float>value
    return PyArray_Scalar(
        <void*>&value if type_num == cnp.NPY_FLOAT64 else <void*>&rounded, cnp.PyArray_DescrFromType(type_num), None)


cdef inline bint is_ordinary(object array) noexcept:
    """Tell whether this is an array, no subclass, with its elements aligned, in C order and in native byte order."""
    return cnp.PyArray_CheckExact(array) and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>array)


cdef inline bint is_dense(object array) noexcept:
    """Tell whether this is such an array in C or Fortran order."""
    return cnp.PyArray_CheckExact(array) and (
        cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>array) or cnp.PyArray_ISFARRAY_RO(<cnp.ndarray>array))


cdef inline bint are_logits(cnp.ndarray array):
    """Tell whether the elements are of a type that logits can have."""
    cdef int type_num = cnp.PyArray_TYPE(array)
    if type_num == cnp.NPY_FLOAT32 or type_num == cnp.NPY_FLOAT64 or type_num == cnp.NPY_FLOAT16:
        return True
    # Types from other packages have numbers that depend on the order of imports.
    return type_num >= NPY_USERDEF and array.dtype.type.__name__ == "bfloat16"


cdef inline bint share_bytes(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Tell whether two dense arrays overlap."""
    cdef const char* start_a = cnp.PyArray_BYTES(a)
    cdef const char* start_b = cnp.PyArray_BYTES(b)
    return start_a < start_b + cnp.PyArray_NBYTES(b) and start_b < start_a + cnp.PyArray_NBYTES(a)
