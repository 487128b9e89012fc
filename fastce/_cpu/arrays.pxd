"""The arrays and scalars that are made for results."""
cimport numpy as cnp

from fastce._cpu.call cimport Call
from fastce._cpu.operand cimport Operand, read_array, view_of
from fastce._cpu.task cimport MAX_DIMS

cdef extern from "numpy/arrayobject.h":  # what Cython's own declarations lack
    object PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, void* dtype, int subok)
    object PyArray_Scalar(void* data, cnp.dtype dtype, object base)


cdef inline cnp.ndarray new_result(Operand* result, const Operand* like):
    """Return an array for a result that none is given for, in the memory order of another."""
    cdef cnp.ndarray array
    if like.is_dense:
        array = cnp.PyArray_EMPTY(like.n_dims, <cnp.npy_intp*>like.shape, like.type_num, not like.is_contiguous)
    else:
        array = PyArray_NewLikeArray(view_of(like), cnp.NPY_KEEPORDER, NULL, 0)
    read_array(result, array)
    result.is_new = True
    return array


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
