/* What the boundary to Python needs of NumPy, and Cython cannot say. */
#ifndef FASTCE_ARRAYS_H
#define FASTCE_ARRAYS_H

#include <Python.h>
#include <numpy/arrayobject.h>

#include "simd/compiler.h"

/* Weights are scaled by a power of two if the largest is larger than this, or smaller than the inverse. Else the sum
   that a mean divides by need not be a normal number, and a product of two weights may leave the type. */
#define FASTCE_FAR 1099511627776.0 /* 2^40 */

/* An array over memory that another object owns. */
FASTCE_INLINE PyObject* fastce_view(int type_num, int is_native, int n_dims, npy_intp* shape, npy_intp* strides,
    void* data, int is_writable, PyObject* owner) {
    PyObject* view;
    PyArray_Descr* dtype = PyArray_DescrFromType(type_num);
    if (dtype != NULL && !is_native) {
        PyArray_Descr* native = dtype;
        dtype = PyArray_DescrNewByteorder(native, NPY_SWAP);
        Py_DECREF(native);
    }
    if (dtype == NULL) return NULL;
    view = PyArray_NewFromDescr(
        &PyArray_Type, dtype, n_dims, shape, strides, data, is_writable ? NPY_ARRAY_WRITEABLE : 0, NULL);
    if (view == NULL) return NULL;
    Py_INCREF(owner);
    if (PyArray_SetBaseObject((PyArrayObject*)view, owner) < 0) {
        Py_DECREF(view);
        return NULL;
    }
    return view;
}

#endif
