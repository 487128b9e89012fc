"""Arguments of ordinary calls, read and checked in C; whatever might break a rule is left to the checks in Python."""
from libc.math cimport INFINITY
from libc.stdint cimport int64_t
from libc.string cimport memset

cimport numpy as cnp

from fastce._cpu._arrays cimport are_logits, arithmetic_of, is_ordinary, share_bytes


# The options that are numbers or names.
cdef struct Options:
    int64_t ignore_index
    double label_smoothing
    double logit_scale
    double softcap   # 0 without
    double z_loss
    double grad_output
    bint is_mean     # else the sum


cdef inline bint read_number(object given, double* number) noexcept:
    """Read a float, or an integer that no conversion changes."""
    if not (isinstance(given, float) or (type(given) is int and -0x100000000 < given < 0x100000000)):
        return False
    number[0] = given
    return True


cdef inline bint read_options(tuple given, object grad_output, Options* options) noexcept:
    """Read options in the order of Python's `Options`; tell whether all are valid and no loss per row is asked for."""
    memset(options, 0, sizeof(options[0]))
    ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss = given
    if not (type(ignore_index) is int and -0x100000000 < ignore_index < 0x100000000):
        return False
    options.ignore_index = ignore_index
    if not (isinstance(reduction, str) and isinstance(on_empty, str)):
        return False
    options.is_mean = <str>reduction == "mean"
    if not (options.is_mean or <str>reduction == "sum") or not (<str>on_empty == "nan" or <str>on_empty == "zero"):
        return False
    if softcap is not None and not (read_number(softcap, &options.softcap) and 0 < options.softcap < INFINITY):
        return False
    options.grad_output = 1
    return (
        read_number(label_smoothing, &options.label_smoothing) and 0 <= options.label_smoothing <= 1
        and read_number(logit_scale, &options.logit_scale) and 0 < options.logit_scale < INFINITY
        and read_number(z_loss, &options.z_loss) and 0 <= options.z_loss < INFINITY
        and (grad_output is None or read_number(grad_output, &options.grad_output)))


cdef inline bint are_targets(object target, object logits) noexcept:
    """Tell whether logits are such a matrix, with anything in it, and the target is a class for each of its rows."""
    return (
        is_ordinary(logits, 2) and are_logits(logits) and cnp.PyArray_SIZE(logits) > 0
        and is_ordinary(target, 1) and cnp.PyArray_TYPE(target) == cnp.NPY_INT64
        and cnp.PyArray_DIM(target, 0) == cnp.PyArray_DIM(logits, 0))


cdef inline bint is_out(object out, cnp.ndarray logits) noexcept:
    """Tell whether the gradient can go there: None, the logits, or an array like them that is apart from them."""
    return out is None or (
        is_ordinary(out, 2) and cnp.PyArray_ISWRITEABLE(out) and cnp.PyArray_TYPE(out) == cnp.PyArray_TYPE(logits)
        and cnp.PyArray_DIM(out, 0) == cnp.PyArray_DIM(logits, 0)
        and cnp.PyArray_DIM(out, 1) == cnp.PyArray_DIM(logits, 1)
        and (out is logits or not share_bytes(out, logits)))


cdef inline bint are_factors(const void* data, Py_ssize_t n, bint is_double) noexcept:
    """Tell whether n numbers are finite and not negative."""
    cdef Py_ssize_t i
    cdef int all_are = True
    if is_double:
        for i in range(n):  # vectorised: no exit
            all_are &= <int>((<const double*>data)[i] >= 0) & <int>((<const double*>data)[i] < INFINITY)
    else:
        for i in range(n):
            all_are &= <int>((<const float*>data)[i] >= 0) & <int>((<const float*>data)[i] < <float>INFINITY)
    return all_are


cdef inline bint is_weight(object weight, Py_ssize_t n, bint may_be_float, bint may_be_double, object out) noexcept:
    """Tell whether weights are None, or n valid ones of a type that the kernels read, apart from `out`."""
    cdef bint is_double
    if weight is None:
        return True
    if not (is_ordinary(weight, 1) and cnp.PyArray_DIM(weight, 0) == n):
        return False
    is_double = cnp.PyArray_TYPE(weight) == cnp.NPY_FLOAT64
    return (
        (may_be_double if is_double else may_be_float and cnp.PyArray_TYPE(weight) == cnp.NPY_FLOAT32)
        and are_factors(cnp.PyArray_DATA(weight), n, is_double) and (out is None or not share_bytes(out, weight)))


cdef inline bint is_ordinary_call(
    object logits, object target, object out, object weight, object sample_weight
) noexcept:
    """Tell whether these arrays can be taken as they are."""
    cdef bint is_double
    if not (are_targets(target, logits) and is_out(out, logits) and (out is None or not share_bytes(out, target))):
        return False
    is_double = arithmetic_of(logits) == cnp.NPY_FLOAT64
    return (
        is_weight(weight, cnp.PyArray_DIM(logits, 1), not is_double, is_double, out)
        and is_weight(sample_weight, cnp.PyArray_DIM(logits, 0), True, True, out))
