"""Arguments of ordinary calls, read and checked in C; whatever might break a rule is left to the checks in Python."""
from libc.math cimport INFINITY
from libc.stdint cimport int64_t
from libc.string cimport memset

cimport numpy as cnp

from fastce._cpu._arrays cimport are_logits, arithmetic_of, is_ordinary, share_bytes


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
    if not (isinstance(reduction, str) and isinstance(on_empty, str)):
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


cdef inline bint is_like(cnp.ndarray array, cnp.ndarray logits) noexcept:
    """Tell whether a matrix has the shape of the logits."""
    return (
        cnp.PyArray_DIM(array, 0) == cnp.PyArray_DIM(logits, 0)
        and cnp.PyArray_DIM(array, 1) == cnp.PyArray_DIM(logits, 1))


cdef inline bint are_targets(object target, object logits) noexcept:
    """Tell whether logits are such a matrix, with anything in it, and the target a class or probabilities per row."""
    if not (is_ordinary(logits, 2) and are_logits(logits) and cnp.PyArray_SIZE(logits) > 0):
        return False
    if is_ordinary(target, 2):
        return are_logits(target) and is_like(target, logits)
    return (
        is_ordinary(target, 1) and cnp.PyArray_TYPE(target) == cnp.NPY_INT64
        and cnp.PyArray_DIM(target, 0) == cnp.PyArray_DIM(logits, 0))


cdef inline bint is_out(object out, cnp.ndarray logits) noexcept:
    """Tell whether the gradient can go there: None, the logits, or an array like them that is apart from them."""
    return out is None or (
        is_ordinary(out, 2) and cnp.PyArray_ISWRITEABLE(out) and cnp.PyArray_TYPE(out) == cnp.PyArray_TYPE(logits)
        and is_like(out, logits) and (out is logits or not share_bytes(out, logits)))


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


cdef inline bint is_vector(object vector, Py_ssize_t n, bint may_be_float, bint may_be_double, object out) noexcept:
    """Tell whether this is None, or n numbers of a type that the kernels read, apart from `out`."""
    if vector is None:
        return True
    if not (is_ordinary(vector, 1) and cnp.PyArray_DIM(vector, 0) == n):
        return False
    if out is not None and share_bytes(out, vector):
        return False
    if cnp.PyArray_TYPE(vector) == cnp.NPY_FLOAT64:
        return may_be_double
    return may_be_float and cnp.PyArray_TYPE(vector) == cnp.NPY_FLOAT32


cdef inline bint is_weight(object weight, Py_ssize_t n, bint may_be_float, bint may_be_double, object out) noexcept:
    """Tell whether these are such, and valid weights."""
    return is_vector(weight, n, may_be_float, may_be_double, out) and (
        weight is None
        or are_factors(cnp.PyArray_DATA(weight), n, cnp.PyArray_TYPE(weight) == cnp.NPY_FLOAT64))


cdef inline bint is_ordinary_call(
    object logits, object target, object out, object weight, object sample_weight, object grad_output,
    const Options* options
) noexcept:
    """Tell whether these arrays can be taken as they are."""
    cdef bint is_double
    if not (are_targets(target, logits) and is_out(out, logits) and (out is None or not share_bytes(out, target))):
        return False
    if cnp.PyArray_NDIM(target) == 2 and options.ignore_index != NO_CLASS_IGNORED:
        return False
    is_double = arithmetic_of(logits) == cnp.NPY_FLOAT64
    return (
        is_weight(weight, cnp.PyArray_DIM(logits, 1), not is_double, is_double, out)
        and is_weight(sample_weight, cnp.PyArray_DIM(logits, 0), True, True, out)
        and (not options.is_per_row or is_vector(grad_output, cnp.PyArray_DIM(logits, 0), True, True, out)))
