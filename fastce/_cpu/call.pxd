"""A call of a loss: what it is given, and the rules that its arrays and numbers keep to.

Design
------
1. All of a call is read before anything runs other code than this: from then on other threads may change the arrays.
2. All rules are checked before anything is written, in one order: options, shapes, numbers, results, and last whether
   there is something that Python must convert.
3. Arrays on a GPU keep to the same rules, but for those that look at numbers.
"""
from libc.float cimport DBL_MIN
from libc.math cimport INFINITY, fabs

cimport numpy as cnp

from fastce._cpu.math cimport real
from fastce._cpu.operand cimport (
    BOOLEAN, INTEGER, KERNEL_FLOAT, Operand, arithmetic_of, check_alignment, check_apart, check_float, check_like,
    is_factor, is_float, is_like, is_real, make_contiguous, read_optional
)
from fastce._cpu.options cimport DEFAULT_IGNORE_INDEX, Options, check_scales, find_axis
from fastce._cpu.rule cimport fail
from fastce._cpu.task cimport Vector, vector_item

cdef extern from "host/arrays.h":
    double FAR "FASTCE_FAR"


cdef struct Call:
    Options options
    bint on_gpu
    bint is_scaled         # weights are as near to 1 as they can be
    Operand logits
    Operand target
    Operand weight
    Operand sample_weight
    Operand grad_output    # an array: one number, or one for each row
    Operand v
    Operand out
    Operand hess_out
    # what follows from these
    int arithmetic         # the type's number
    int axis
    Py_ssize_t n_rows
    Py_ssize_t n_classes
    bint has_classes       # else class probabilities
    Vector weights         # the numbers one after the other, where there are any
    Vector sample_weights
    Vector grad_outputs
    double grad_factor     # the upstream gradient that all rows have
    int far                # which weights are far from 1: bit 1 is for those of classes, bit 2 for those of rows


cdef inline int read_grad_output(Call* call, object given) except -1:
    """Read an upstream gradient: a number, or an array."""
    call.grad_factor = 1
    if given is not None and not call.options.is_per_row and (
            isinstance(given, float) or (type(given) is int and -0x100000000 < given < 0x100000000)):
        call.grad_factor = given
        given = None
    read_optional(&call.grad_output, given, "grad_output")


# ----- shapes

cdef inline bint has_row_shape(const Call* call, const Operand* operand) noexcept:
    """Return True if an array has the shape of the logits without the class axis."""
    cdef int k
    if operand.n_dims != call.logits.n_dims - 1:
        return False
    for k in range(operand.n_dims):
        if operand.shape[k] != call.logits.shape[k + (k >= call.axis)]:
            return False
    return True


cdef inline void measure(Call* call) noexcept:
    """Say how many rows and classes there are."""
    cdef int k
    call.n_rows = 1
    for k in range(call.logits.n_dims):
        if k != call.axis:
            call.n_rows *= call.logits.shape[k]
    call.n_classes = call.logits.shape[call.axis]


cdef inline int check_logits(Call* call) except -1:
    cdef const Operand* logits = &call.logits
    if (logits.kind == INTEGER or logits.kind == BOOLEAN) and is_float(&call.target) and (
            logits.n_dims == call.target.n_dims - 1):
        fail("exchanged", "logits")
    check_float(logits, "logits", call.on_gpu)
    call.arithmetic = arithmetic_of(logits)
    check_scales(&call.options, call.arithmetic)
    call.axis = find_axis(&call.options, logits.n_dims, 1 if logits.n_dims > 1 else 0)
    measure(call)


cdef inline int check_target(Call* call) except -1:
    """Tell class indices from class probabilities, and refuse anything between."""
    cdef const Operand* target = &call.target
    call.has_classes = target.kind == INTEGER
    if call.has_classes:
        if not has_row_shape(call, target):
            fail("one-hot" if is_like(target, &call.logits) else "index shape", "target")
    elif not is_float(target):
        fail("target kind", "target")
    elif not is_like(target, &call.logits):
        fail("float index" if has_row_shape(call, target) else "probability shape", "target")
    if call.n_classes == 0 and call.n_rows > 0:
        fail("no classes", "logits")
    if not call.has_classes and (call.options.is_uint64 or call.options.ignore_index != DEFAULT_IGNORE_INDEX):
        fail("ignored probabilities", "ignore_index")
    check_alignment(target, "target", call.on_gpu)


cdef enum Shape:
    ONE_FOR_ALL
    PER_CLASS
    PER_ROW
    PER_LOGIT


cdef inline bint has_shape(const Call* call, const Operand* operand, Shape shape) noexcept:
    if shape == ONE_FOR_ALL:
        return operand.n_dims == 0
    if shape == PER_CLASS:
        return operand.n_dims == 1 and operand.shape[0] == call.n_classes
    return has_row_shape(call, operand) if shape == PER_ROW else is_like(operand, &call.logits)


cdef inline int check_factors(const Call* call, const Operand* factors, str name, Shape shape) except -1:
    """Refuse factors, if there are any, that are no real numbers, or not one for each of what they should be for."""
    if factors.array == NULL:
        return 0
    if not is_real(factors):
        fail("real", name)
    if not has_shape(call, factors, shape):
        fail("shape", name)
    check_alignment(factors, name, call.on_gpu)


# ----- numbers

cdef inline object read_vector(const Operand* operand, Vector* vector):
    """Describe factors, if there are any; return the array that has them as they are described."""
    vector.data = NULL
    vector.is_double = False
    if operand.array == NULL or not is_factor(operand):
        return None
    vector.is_double = operand.type_num == cnp.NPY_FLOAT64
    return make_contiguous(operand, operand.type_num, <char**>&vector.data)


cdef inline int is_near(double factor) noexcept:
    """Return True for 0 and for finite numbers that are not far from 1."""
    return <int>(factor == 0) | (<int>(fabs(factor) >= 1 / FAR) & <int>(fabs(factor) <= FAR))


cdef inline bint are_near(const real* factors, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i
    cdef int all_are = True
    for i in range(n):  # vectorised: no exit
        all_are &= is_near(factors[i])
    return all_are


cdef inline bint are_far(const Vector* factors, Py_ssize_t n, str name, bint is_rounded) except -1:
    """Return True if numbers are far from 1; refuse those that are not finite, also after they are rounded to float."""
    cdef Py_ssize_t i
    cdef double factor, largest = 0
    if factors.data == NULL:
        return False
    if are_near(<const double*>factors.data, n) if factors.is_double else are_near(<const float*>factors.data, n):
        return False
    for i in range(n):
        factor = fabs(vector_item(factors, i))
        if not factor < INFINITY or (is_rounded and not <float>factor < INFINITY):
            fail("finite", name, <double>i)
        largest = max(largest, factor)
    return not is_near(largest)


cdef inline object read_weight(Call* call):
    """Check and describe the weights of classes; return what has them, None if there are none to look at."""
    check_factors(call, &call.weight, "weight", PER_CLASS)
    if call.on_gpu:
        return None
    weight = read_vector(&call.weight, &call.weights)
    if are_far(&call.weights, call.n_classes, "weight", call.arithmetic == cnp.NPY_FLOAT32):
        call.far |= 1
    return weight


cdef inline object read_sample_weight(Call* call):
    """Check and describe the weights of rows in the same way."""
    check_factors(call, &call.sample_weight, "sample_weight", PER_ROW)
    if call.on_gpu:
        return None
    sample_weight = read_vector(&call.sample_weight, &call.sample_weights)
    if are_far(&call.sample_weights, call.n_rows, "sample_weight", False):
        call.far |= 2
    return sample_weight


cdef inline object read_grad_outputs(Call* call):
    """Describe upstream gradients, of rows or one for all; return what has them, None if there are none."""
    grad_output = read_vector(&call.grad_output, &call.grad_outputs)
    if grad_output is not None and not call.options.is_per_row:
        call.grad_factor = vector_item(&call.grad_outputs, 0)
        call.grad_outputs.data = NULL
    return grad_output


cdef inline int check_normalizer(double normalizer) except -1:
    """Refuse what a mean cannot divide by: a sum that is not 0, but no normal number either."""
    if normalizer != 0 and not DBL_MIN <= fabs(normalizer) < INFINITY:
        fail("normalizer", "weight", normalizer)


# ----- results

cdef inline int check_result(const Call* call, const Operand* result, str name, bint in_place) except -1:
    """Refuse a result that does not fit, or overlaps an input."""
    if result.array == NULL:
        return 0
    check_like(result, &call.logits, name, call.on_gpu)
    check_apart(result, name, &call.logits, "logits", in_place)
    check_apart(result, name, &call.v, "v", in_place)
    check_apart(result, name, &call.target, "target", False)
    check_apart(result, name, &call.weight, "weight", False)
    check_apart(result, name, &call.sample_weight, "sample_weight", False)
    check_apart(result, name, &call.grad_output, "grad_output", False)


cdef inline int check_results(const Call* call) except -1:
    """Refuse results that do not fit: the gradient or the product, which may be in place, and a diagonal."""
    check_result(call, &call.out, "out", True)
    check_result(call, &call.hess_out, "hess_out", False)
    if call.hess_out.array != NULL:
        check_apart(&call.hess_out, "hess_out", &call.out, "out", False)


# ----- what Python must convert

cdef inline int check_matrix(const Operand* operand, str name) except -1:
    """Ask for another type of numbers, one for each logit, that the kernels do not read."""
    if operand.array != NULL and operand.kind != KERNEL_FLOAT:
        fail("conversion", name)


cdef inline int check_vector(const Operand* operand, str name) except -1:
    if operand.array != NULL and not is_factor(operand):
        fail("conversion", name)


cdef inline int check_conversions(const Call* call) except -1:
    """Ask for what is left to Python, when all else is right."""
    if not call.has_classes:
        check_matrix(&call.target, "target")
    check_matrix(&call.v, "v")
    check_vector(&call.weight, "weight")
    check_vector(&call.sample_weight, "sample_weight")
    check_vector(&call.grad_output, "grad_output")
    if call.far != 0 and not call.is_scaled:
        fail("far", "weight", call.far)
