"""What is read of an array, and the rules that look at one or two arrays alone.

Design
------
1. An array is read once, into an `Operand`: its address, shape and strides. From then on nobody looks at it again, for
   other threads may give it another shape as soon as they run. Whatever needs an array works on a view that is made of
   the operand.
2. Arrays may have any strides. What the kernels read one after the other is copied if it lies otherwise.
3. Only NumPy's own arrays are read: Python takes in what is none, or of a derived type, and calls again.
4. Arrays on a GPU come as views of the same bounds that must not be read, and need numbers at multiples of their size.
"""
from cpython.object cimport PyObject

cimport numpy as cnp

from fastce._cpu.layout.convert cimport magnitude
from fastce._cpu.rule cimport fail
from fastce._cpu.task cimport MAX_DIMS

cdef extern from "host/arrays.h":
    object new_view "fastce_view"(
        int type_num, int is_native, int n_dims, cnp.npy_intp* shape, cnp.npy_intp* strides, void* data,
        int is_writable, object owner)


cdef enum Kind:
    NO_ARRAY       # given for a result
    OTHER          # no real numbers
    BOOLEAN
    INTEGER
    FLOATING       # of a type or byte order that the kernels do not read
    KERNEL_FLOAT   # float32, float64, float16, bfloat16


cdef struct Operand:
    PyObject* array      # which owns the memory, and is kept by the caller; NULL if there is no operand
    char* data
    const char* start    # the bytes between which it lies; none if it is empty
    const char* stop
    int type_num
    Kind kind
    bint is_native
    bint is_contiguous   # aligned, in native byte order, in C order
    bint is_dense        # the same, but in C or Fortran order
    bint is_writable
    bint is_new          # made for this call: nobody has touched its memory yet
    int n_dims
    Py_ssize_t itemsize
    cnp.npy_intp shape[MAX_DIMS]
    cnp.npy_intp strides[MAX_DIMS]


cdef inline Kind kind_of(cnp.ndarray array) except NO_ARRAY:
    cdef int type_num = cnp.PyArray_TYPE(array)
    if type_num == cnp.NPY_FLOAT32 or type_num == cnp.NPY_FLOAT64 or type_num == cnp.NPY_FLOAT16 or (
            # Types from other packages have numbers that depend on the order of imports.
            cnp.PyTypeNum_ISUSERDEF(type_num) and array.dtype.type.__name__ == "bfloat16"):
        return KERNEL_FLOAT if cnp.PyArray_ISNOTSWAPPED(array) else FLOATING
    if cnp.PyTypeNum_ISINTEGER(type_num):
        return INTEGER
    if cnp.PyTypeNum_ISBOOL(type_num):
        return BOOLEAN
    return FLOATING if cnp.PyTypeNum_ISFLOAT(type_num) else OTHER


cdef inline int read_array(Operand* operand, cnp.ndarray array) except -1:
    cdef int k
    cdef Py_ssize_t length
    cdef bint is_empty = False
    operand.kind = kind_of(array)  # first: it runs Python
    operand.array = <PyObject*>array
    operand.data = cnp.PyArray_BYTES(array)
    operand.type_num = cnp.PyArray_TYPE(array)
    operand.is_native = cnp.PyArray_ISNOTSWAPPED(array)
    operand.is_contiguous = cnp.PyArray_ISCARRAY_RO(array)
    operand.is_dense = operand.is_contiguous or cnp.PyArray_ISFARRAY_RO(array)
    operand.is_writable = cnp.PyArray_ISWRITEABLE(array)
    operand.is_new = False
    operand.n_dims = cnp.PyArray_NDIM(array)
    operand.itemsize = cnp.PyArray_ITEMSIZE(array)
    operand.start = operand.data
    operand.stop = operand.data + operand.itemsize
    for k in range(operand.n_dims):
        operand.shape[k] = cnp.PyArray_DIM(array, k)
        operand.strides[k] = cnp.PyArray_STRIDE(array, k)
        length = (operand.shape[k] - 1) * operand.strides[k]
        operand.start += min(length, 0)
        operand.stop += max(length, 0)
        is_empty |= operand.shape[k] == 0
    if is_empty:
        operand.stop = operand.start


cdef inline int read_optional(Operand* operand, object given, str name) except -1:
    """Read an array if there is one."""
    if given is None:
        operand.array = NULL
    elif cnp.PyArray_CheckExact(given):
        read_array(operand, <cnp.ndarray>given)
    else:
        fail("array", name)


cdef inline int read_required(Operand* operand, object given, str name) except -1:
    if given is None:
        fail("array", name)
    read_optional(operand, given, name)


cdef inline int read_result(Operand* operand, object given, str name, bint is_taken_in) except -1:
    """Read an array that is written to, if there is one. One that Python cannot take in is refused by `check_like`."""
    if is_taken_in and given is not None and not cnp.PyArray_CheckExact(given):
        operand.array = <PyObject*>given
        operand.kind = NO_ARRAY
    else:
        read_optional(operand, given, name)


cdef inline object view_of(const Operand* operand):
    """Return an array of an operand's shape and memory, whatever has become of its own array."""
    return new_view(
        operand.type_num, operand.is_native, operand.n_dims, <cnp.npy_intp*>operand.shape,
        <cnp.npy_intp*>operand.strides, operand.data, operand.is_writable, <object>operand.array)


cdef inline object make_contiguous(const Operand* operand, int type_num, char** data):
    """Return an array that has an operand's numbers one after the other, in this type, and write where they are."""
    data[0] = operand.data  # not what the array says now: another thread may have moved its memory
    if operand.type_num == type_num and operand.is_contiguous:
        return <object>operand.array
    array = cnp.PyArray_Cast(view_of(operand), type_num)  # new, in C order
    data[0] = cnp.PyArray_BYTES(array)
    return array


cdef inline bint is_real(const Operand* operand) noexcept:
    return operand.kind >= INTEGER


cdef inline bint is_float(const Operand* operand) noexcept:
    return operand.kind >= FLOATING


cdef inline bint is_factor(const Operand* operand) noexcept:
    """Return True for float and double, which the kernels read as factors."""
    return operand.type_num == cnp.NPY_FLOAT32 or operand.type_num == cnp.NPY_FLOAT64


cdef inline int arithmetic_of(const Operand* logits) noexcept:
    """Return the number of the type that logits are computed in."""
    return cnp.NPY_FLOAT64 if logits.type_num == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32


cdef inline bint is_like(const Operand* operand, const Operand* other) noexcept:
    """Return True if two arrays have the same shape."""
    cdef int k
    if operand.n_dims != other.n_dims:
        return False
    for k in range(operand.n_dims):
        if operand.shape[k] != other.shape[k]:
            return False
    return True


cdef inline bint are_same(const Operand* a, const Operand* b) noexcept:
    """Return True if two arrays of one shape have every number at the same place."""
    cdef int k
    if a.data != b.data or a.type_num != b.type_num or a.is_native != b.is_native:
        return False
    for k in range(a.n_dims):
        if a.shape[k] != 1 and a.strides[k] != b.strides[k]:
            return False
    return True


cdef inline bint has_own_elements(const Operand* operand) except -1:
    """Return True if no two numbers of an array share memory; False also if it is too intricate to tell."""
    cdef Py_ssize_t span, step, other
    cdef int j, k
    if operand.is_dense or operand.start == operand.stop:
        return True
    # It is safe if every axis steps over all numbers of the axes with shorter steps.
    for k in range(operand.n_dims):
        step = magnitude(operand.strides[k])
        span = operand.itemsize
        for j in range(operand.n_dims):
            other = magnitude(operand.strides[j])
            if other < step or (other == step and j < k):
                span += (operand.shape[j] - 1) * other
        if step < span and operand.shape[k] > 1:
            from fastce._cpu._rules import has_own_elements as count_exactly

            return step != 0 and count_exactly(view_of(operand))
    return True


cdef inline bint share_memory(const Operand* a, const Operand* b) except -1:
    """Return True if two arrays share a number, or are too intricate to tell."""
    if a.stop <= b.start or b.stop <= a.start or a.start == a.stop or b.start == b.stop:
        return False
    if a.is_dense and b.is_dense:
        return True
    from fastce._cpu._rules import share_memory as solve_exactly

    return solve_exactly(view_of(a), view_of(b))


cdef inline int check_alignment(const Operand* operand, str name, bint on_gpu) except -1:
    """Refuse what a GPU cannot read: numbers at addresses that are no multiples of their size."""
    cdef int k
    cdef Py_ssize_t rest
    if on_gpu:
        rest = <Py_ssize_t>operand.data % operand.itemsize
        for k in range(operand.n_dims):
            rest |= operand.strides[k] % operand.itemsize
        if rest != 0:
            fail("alignment", name)


cdef inline int check_float(const Operand* operand, str name, bint on_gpu) except -1:
    """Refuse arrays that the kernels do not know."""
    if operand.kind != KERNEL_FLOAT:
        fail("dtype", name)
    if operand.n_dims == 0:
        fail("scalar", name)
    check_alignment(operand, name, on_gpu)


cdef inline int check_like(const Operand* result, const Operand* like, str name, bint on_gpu) except -1:
    """Refuse what a result shaped `like` an operand cannot be written to."""
    if result.kind == NO_ARRAY:
        fail("result kind", name)
    check_alignment(result, name, on_gpu)
    if not is_like(result, like):
        fail("result shape", name)
    if result.type_num != like.type_num or not result.is_native:
        fail("result dtype", name)
    if not (result.is_writable or on_gpu):
        fail("read-only", name)
    if not has_own_elements(result):
        fail("own elements", name)


cdef inline int check_apart(
    const Operand* result, str name, const Operand* other, str other_name, bint in_place
) except -1:
    """Refuse a result that overlaps another array, unless it is that, where this may be worked on `in_place`."""
    if other.array != NULL and not (in_place and are_same(result, other)) and share_memory(result, other):
        fail("overlap", name, 0, other_name)
