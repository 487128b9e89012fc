"""Arguments of ordinary calls, read and checked in C; whatever might break a rule is left to the checks in Python."""
from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t
from libc.string cimport memset

cimport numpy as cnp

from fastce._cpu._arrays cimport are_logits, arithmetic_of, is_dense, is_ordinary, share_bytes
from fastce._cpu._task cimport MAX_DIMS


cdef extern from *:
    """
    /* Weights that are larger, or smaller than the inverse, may have to be scaled, which Python does. */
    #define FASTCE_FAR 1099511627776.0 /* 2^40, as there */
    """
    const double FAR "FASTCE_FAR"


cdef enum:
    NO_CLASS_IGNORED = -100  # as torch's default has it: the only `ignore_index` with class probabilities


# The options that are numbers or names.
cdef struct Options:
    int64_t ignore_index
    double label_smoothing
    double logit_scale
    double softcap   # 0 without
    double z_loss
    double grad_output
    bint is_mean
    bint is_per_row  # neither the mean nor the sum of the losses


cdef inline bint read_number(object given, double* number) noexcept:
    """Read a float, or an integer that no conversion changes."""
    if not (isinstance(given, float) or (type(given) is int and -0x100000000 < given < 0x100000000)):
        return False
    number[0] = given
    return True


cdef inline bint read_options(tuple given, object grad_output, Options* options) noexcept:
    """Read options in the order of Python's `Options`, and a `grad_output` for all rows; tell whether all are valid."""
    memset(options, 0, sizeof(options[0]))
    ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss = given
    if not (type(ignore_index) is int and -0x100000000 < ignore_index < 0x100000000):
        return False
    options.ignore_index = ignore_index
    if not (type(reduction) is str and type(on_empty) is str):  # those derived from it have their own comparison
        return False
    options.is_mean = <str>reduction == "mean"
    options.is_per_row = <str>reduction == "none"
    if not (options.is_mean or options.is_per_row or <str>reduction == "sum"):
        return False
    if not (<str>on_empty == "nan" or <str>on_empty == "zero"):
        return False
    if softcap is not None and not (read_number(softcap, &options.softcap) and 0 < options.softcap < INFINITY):
        return False
    options.grad_output = 1
    return (
        read_number(label_smoothing, &options.label_smoothing) and 0 <= options.label_smoothing <= 1
        and read_number(logit_scale, &options.logit_scale) and 0 < options.logit_scale < INFINITY
        and read_number(z_loss, &options.z_loss) and 0 <= options.z_loss < INFINITY
        and (grad_output is None or options.is_per_row or read_number(grad_output, &options.grad_output)))


cdef inline bint is_scale(double scale, int arithmetic) noexcept:
    """Tell whether a positive scale is one in the arithmetic's type, too."""
    return arithmetic == cnp.NPY_FLOAT64 or 0 < <float>scale < INFINITY


cdef inline bint is_number(double quotient, int arithmetic) noexcept:
    """Tell whether a quotient is finite in the arithmetic's type."""
    return quotient < INFINITY and (arithmetic == cnp.NPY_FLOAT64 or <float>quotient < INFINITY)


cdef inline bint are_scales(const Options* options, int arithmetic) noexcept:
    """Tell whether the logits' factor and any bound are neither 0 nor infinite in the arithmetic's type."""
    return is_scale(options.logit_scale, arithmetic) and (
        options.softcap == 0
        or is_scale(options.softcap, arithmetic) and is_number(options.logit_scale / options.softcap, arithmetic))


cdef inline int read_axis(object axis, object logits) noexcept:
    """Return the class axis; -1 if it is none of a dense array of logits with anything in it."""
    cdef int n_dims
    if not (is_dense(logits) and are_logits(logits) and cnp.PyArray_SIZE(logits) > 0):
        return -1
    n_dims = cnp.PyArray_NDIM(logits)
    if n_dims < 2:
        return -1
    if axis is None:
        return 1
    if not (type(axis) is int and -n_dims <= axis < n_dims):
        return -1
    return <int>axis if axis >= 0 else <int>axis + n_dims


cdef inline cnp.ndarray empty_per_row(cnp.ndarray logits, int axis, int type_num):
    """Return an array for one number for each row."""
    cdef cnp.npy_intp shape[MAX_DIMS]
    cdef int k, n = 0
    for k in range(cnp.PyArray_NDIM(logits)):
        if k != axis:
            shape[n] = cnp.PyArray_DIM(logits, k)
            n += 1
    return cnp.PyArray_EMPTY(n, shape, type_num, 0)


cdef inline cnp.ndarray empty_like(cnp.ndarray logits):
    """Return an array for a result, in the memory order of the logits."""
    return cnp.PyArray_EMPTY(
        cnp.PyArray_NDIM(logits), cnp.PyArray_DIMS(logits), cnp.PyArray_TYPE(logits),
        not cnp.PyArray_IS_C_CONTIGUOUS(logits))


cdef inline bint is_like(cnp.ndarray array, cnp.ndarray logits) noexcept:
    """Tell whether an array has the shape of the logits."""
    cdef int k
    if cnp.PyArray_NDIM(array) != cnp.PyArray_NDIM(logits):
        return False
    for k in range(cnp.PyArray_NDIM(logits)):
        if cnp.PyArray_DIM(array, k) != cnp.PyArray_DIM(logits, k):
            return False
    return True


cdef inline bint are_like(object array, cnp.ndarray logits) noexcept:
    """Tell whether this is a dense array of floating numbers with the shape of the logits."""
    return is_dense(array) and are_logits(array) and is_like(array, logits)


cdef inline bint is_per_row(cnp.ndarray array, cnp.ndarray logits, int axis) noexcept:
    """Tell whether an array has the shape of the logits without the class axis."""
    cdef int k
    if cnp.PyArray_NDIM(array) != cnp.PyArray_NDIM(logits) - 1:
        return False
    for k in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, k) != cnp.PyArray_DIM(logits, k + (k >= axis)):
            return False
    return True


cdef inline bint are_classes(cnp.ndarray array) noexcept:
    """Tell whether the elements are integers that fit in int64 whatever they are."""
    cdef int type_num = cnp.PyArray_TYPE(array)
    return type_num == cnp.NPY_INT64 or (
        cnp.PyTypeNum_ISINTEGER(type_num)
        and not (cnp.PyTypeNum_ISUNSIGNED(type_num) and cnp.PyArray_ITEMSIZE(array) == 8))


cdef inline bint are_targets(object target, cnp.ndarray logits, int axis) noexcept:
    """Tell whether this holds a class per row, or class probabilities."""
    if is_ordinary(target) and is_per_row(target, logits, axis):
        return are_classes(target)
    return are_like(target, logits)


cdef inline int is_near(double factor) noexcept:
    """Tell whether a factor is 0, or finite and not far from 1."""
    return <int>(factor == 0) | (<int>(fabs(factor) >= 1 / FAR) & <int>(fabs(factor) <= FAR))


cdef inline bint are_factors(cnp.ndarray array) noexcept:
    """Tell whether all numbers, float or double, are such factors."""
    cdef const void* data = cnp.PyArray_DATA(array)
    cdef Py_ssize_t i
    cdef int all_are = True
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64:
        for i in range(cnp.PyArray_SIZE(array)):  # vectorised: no exit
            all_are &= is_near((<const double*>data)[i])
    else:
        for i in range(cnp.PyArray_SIZE(array)):
            all_are &= is_near((<const float*>data)[i])
    return all_are


cdef inline bint are_numbers(object array) noexcept:
    """Tell whether this is an array of floats or doubles."""
    return is_ordinary(array) and (
        cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64 or cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32)


cdef inline bint is_weight(object weight, cnp.ndarray logits, int axis) noexcept:
    """Tell whether this is None, or valid weights of the classes."""
    return weight is None or (
        are_numbers(weight) and cnp.PyArray_NDIM(weight) == 1
        and cnp.PyArray_DIM(weight, 0) == cnp.PyArray_DIM(logits, axis) and are_factors(weight))


cdef inline bint is_sample_weight(object weight, cnp.ndarray logits, int axis) noexcept:
    """Tell whether this is None, or valid weights of the rows."""
    return weight is None or (
        are_numbers(weight) and is_per_row(weight, logits, axis) and are_factors(weight))


cdef inline bint is_upstream(object grad_output, cnp.ndarray logits, int axis) noexcept:
    """Tell whether this is None, or a factor per row."""
    return grad_output is None or (are_numbers(grad_output) and is_per_row(grad_output, logits, axis))


cdef inline bint are_inputs(
    cnp.ndarray logits, int axis, object target, object v, object weight, object sample_weight, object grad_output,
    const Options* options
) noexcept:
    """Tell whether the arrays that go with these logits can be taken as they are, and the scales."""
    if not (are_targets(target, logits, axis) and are_scales(options, arithmetic_of(logits))):
        return False
    if cnp.PyArray_NDIM(target) == cnp.PyArray_NDIM(logits) and options.ignore_index != NO_CLASS_IGNORED:
        return False
    return (
        (v is None or are_like(v, logits)) and is_weight(weight, logits, axis)
        and is_sample_weight(sample_weight, logits, axis) and is_upstream(grad_output, logits, axis))


cdef inline bint are_apart(cnp.ndarray result, cnp.ndarray other) noexcept:
    """Tell whether a result shares no memory with another array, if there is one."""
    return other is None or not share_bytes(result, other)


cdef inline bint is_result(
    object result, cnp.ndarray logits, cnp.ndarray target, cnp.ndarray v, cnp.ndarray weight,
    cnp.ndarray sample_weight, cnp.ndarray grad_output, bint in_place
) noexcept:
    """Tell whether a result can go there: None, or an array like the logits that is apart from the inputs.

    Where it may be `in_place`, it may be the logits or the vector.
    """
    cdef cnp.ndarray array
    if result is None:
        return True
    if not is_dense(result):
        return False
    array = <cnp.ndarray>result
    return (
        cnp.PyArray_ISWRITEABLE(array) and cnp.PyArray_TYPE(array) == cnp.PyArray_TYPE(logits)
        and is_like(array, logits)
        and (array is logits and in_place or are_apart(array, logits))
        and (array is v and in_place or are_apart(array, v))
        and are_apart(array, target) and are_apart(array, weight) and are_apart(array, sample_weight)
        and are_apart(array, grad_output))


cdef inline bint are_results(
    object out, object hess, cnp.ndarray logits, cnp.ndarray target, cnp.ndarray v, cnp.ndarray weight,
    cnp.ndarray sample_weight, cnp.ndarray grad_output
) noexcept:
    """Tell whether results can go there, the gradient or the product in place."""
    return (
        is_result(out, logits, target, v, weight, sample_weight, grad_output, True)
        and is_result(hess, logits, target, v, weight, sample_weight, grad_output, False)
        and (hess is None or are_apart(hess, out)))
