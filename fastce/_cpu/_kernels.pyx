"""The kernels as Python sees them: one module for each instruction set, all compiled from this source.

Design
------
1. `call` is the one way to the kernels of losses, for arrays of any strides. What it returns is ready for the user. It
   raises `RuleError` before anything is written: see `call.pxd`.
2. Shapes and addresses are read before anything lets other threads run, and once. Results are made from what was read.
"""
from libc.math cimport INFINITY, fabs
from libc.float cimport DBL_MIN
from libc.stdint cimport int64_t

cimport numpy as cnp

from fastce._cpu.arrays cimport describe, new_like, new_per_row, scalar_of, set_curvature
from fastce._cpu.call cimport (
    DEFAULT_IGNORE_INDEX as _DEFAULT_IGNORE_INDEX, ONE_FOR_ALL, PER_CLASS, PER_LOGIT, PER_ROW, Call, Operand, Options,
    check_apart, check_axis, check_conversions, check_factors, check_finite, check_float, check_like, check_logits,
    check_results, check_target, fail, make_ready, measure, read_array, read_grad_output, read_needed, read_options,
    read_result, read_threads_and_axis, read_vector, set_operand, view_of
)
from fastce._cpu.platform cimport (
    CYTHON_HEX_VERSION, FASTCE_COMPILER, FASTCE_OPENMP, fastce_forget_started, fastce_has_avx2, fastce_has_avx512,
    fastce_max_threads, fastce_startable
)
from fastce._cpu.reductions cimport first_bad, sum_vector
from fastce._cpu.schedule cimport process_task, scan_targets
from fastce._cpu.task cimport GRADIENT, LOG_SOFTMAX, Task, Vector, vector_item
from fastce._cpu.teamwork cimport pays_to_share

from fastce._cpu._rules import RuleError

cdef extern from *:
    bint unlikely(bint condition) noexcept nogil  # Cython's own macro: what is rare must not be what is made fast

cnp.import_array()

# What `call` computes: the loss; the same of log-probabilities; ...; what a mean divides by.
cpdef enum:
    LOSS
    NLL
    GRAD
    STATS
    PRODUCT
    DIAGONAL
    NORMALIZER

cdef enum:
    SHARED_NUMBERS = 1024  # below which there is nothing to share, whatever is asked for: a group of rows or few


def build_info():
    """Return what this module was built with."""
    return {
        "cython": ".".join(str(CYTHON_HEX_VERSION >> shift & 255) for shift in (24, 16, 8)),
        "compiler": FASTCE_COMPILER.decode(),
        "openmp": bool(FASTCE_OPENMP),
    }


def cpu_supports():
    """Return the instruction sets beyond the architecture's own that CPU and operating system support."""
    return (("avx2",) if fastce_has_avx2() else ()) + (("avx512",) if fastce_has_avx512() else ())


def max_threads():
    """Return the team size that OpenMP would choose for the calling thread."""
    return fastce_max_threads()


cpdef bint wants_team(int n_threads, Py_ssize_t n_numbers) noexcept:
    """Return True if threads are to share so many numbers: at most `n_threads`, or, if that is 0, if it pays."""
    if n_threads == 0:
        return pays_to_share(n_numbers)
    return n_threads > 1 and n_numbers >= SHARED_NUMBERS


def startable_threads(int n_threads):
    """Return how many of so many threads, the calling one included, the system can give the calling thread's team."""
    return fastce_startable(n_threads)


def forget_threads():
    """Forget how many threads the calling thread's team has: they were released."""
    fastce_forget_started()


cdef object _choose_n_threads


def set_thread_policy(choose_n_threads):
    """Say who chooses how many threads share a call that several are to share, of at most so many, or 0: any number."""
    global _choose_n_threads
    _choose_n_threads = choose_n_threads


cdef int choose_team(int n_threads, Py_ssize_t n_numbers) except -1:
    return <int>_choose_n_threads(n_threads) if wants_team(n_threads, n_numbers) else 1


cdef broken(const Call* call):
    """Return the exception for a rule that is broken."""
    return RuleError(
        call.rule.decode(), call.name.decode(), call.value, None if call.other == NULL else call.other.decode())


def check_options(tuple options, n_threads, axis):
    """Check what a call can be refused for without its arrays."""
    cdef Call c
    c.other = NULL
    if not read_options(&c, options, n_threads, axis):
        raise broken(&c)


def check_array(array, str name, bint on_gpu=False):
    """Check that an array is one of logits."""
    cdef Call c
    cdef bytes encoded = name.encode()
    c.other = NULL
    c.on_gpu = on_gpu
    set_operand(&c.logits, array)
    if not check_float(&c, &c.logits, encoded):
        raise broken(&c)


def find_axis(int n_dims, axis, int default_axis):
    """Return the class axis as a number that is not negative."""
    cdef Call c
    c.other = NULL
    if not (read_threads_and_axis(&c, None, axis) and check_axis(&c, n_dims, default_axis)):
        raise broken(&c)
    return c.axis


def find_n_threads(n_threads):
    """Return the largest number of threads, 0 if the library chooses."""
    cdef Call c
    c.other = NULL
    if not read_threads_and_axis(&c, n_threads, None):
        raise broken(&c)
    return c.options.n_threads


def is_far(factors, str name, bint is_rounded):
    """Return True if factors, float or double, are far from 1; they must be finite, also as float if `is_rounded`."""
    cdef Call c
    cdef Vector vector
    cdef bytes encoded = name.encode()
    c.other = NULL
    c.far = 0
    set_operand(&c.weight, factors)
    kept = read_vector(&c.weight, &vector)
    if not check_finite(&c, &vector, cnp.PyArray_SIZE(kept), encoded, is_rounded, 1):
        raise broken(&c)
    return c.far != 0


def check_result(out, like, inputs, bint in_place, bint on_gpu=False):
    """Check that a result like this one can go to `out`, which may be `like` itself if that is worked on `in_place`.

    `inputs` are (name, array) pairs.
    """
    cdef Call c
    cdef Operand other
    cdef bytes encoded
    c.other = NULL
    c.on_gpu = on_gpu
    c.is_taken_in = True
    set_operand(&c.logits, like)
    if not (
        read_result(&c, &c.out, out, "out") and check_like(&c, &c.out, &c.logits, "out")
        and check_apart(&c, &c.out, "out", &c.logits, "logits", in_place)
    ):
        raise broken(&c)
    for name, array in inputs:
        encoded = name.encode()
        set_operand(&other, array)
        if not check_apart(&c, &c.out, "out", &other, encoded, False):
            raise broken(&c)


cdef rounded(weight, Vector* vector, cnp.npy_intp n, int type_num):
    """Put weights of classes into the arithmetic's type, whatever NumPy would say to their rounding."""
    cdef Py_ssize_t k
    cdef bint is_double = type_num == cnp.NPY_FLOAT64
    if weight is None or vector.is_double == is_double:
        return weight
    result = cnp.PyArray_EMPTY(1, &n, type_num, 0)
    if is_double:
        for k in range(n):
            (<double*>cnp.PyArray_DATA(result))[k] = vector_item(vector, k)
    else:
        for k in range(n):
            (<float*>cnp.PyArray_DATA(result))[k] = <float>vector_item(vector, k)
    vector.data = cnp.PyArray_BYTES(result)
    vector.is_double = is_double
    return result


cdef read_classes(Call* c):
    """Put class indices one after the other as int64, whose address goes to the operand; return what keeps them."""
    ready = make_ready(&c.target, cnp.NPY_INT64)
    if ready is not <object>c.target.array:
        c.target.data = cnp.PyArray_BYTES(ready)
    return ready


cdef Py_ssize_t scan_classes(
    Call* c, const Vector* weights, const Vector* sample_weights, int team, double* normalizer
) except -2:
    """Return the first row whose class does not exist, or -1; write what a mean divides by.

    Targets of uint64 have the bits of int64 here. Then a number that `ignore_index` is not may have its bits.
    """
    cdef const int64_t* target = <const int64_t*>c.target.data
    cdef Options* options = &c.options
    cdef bint is_uint64 = cnp.PyTypeNum_ISUNSIGNED(c.target.type_num) and c.target.itemsize == 8
    cdef Py_ssize_t bad
    if options.is_uint64 != is_uint64 and (options.is_uint64 or options.ignore_index < 0):
        bad = first_bad(target, c.n_rows, 0, c.n_classes)
        if bad >= 0:
            return bad
        options.ignore_index = -1  # which is no target
    return scan_targets(
        target, c.n_rows, options.ignore_index, c.n_classes, weights, sample_weights, team, normalizer)


def call(
    int what, logits, target, axis, weight, sample_weight, tuple options, n_threads, grad_output=None, out=None,
    make_stats=None, v=None, hess_out=None, curvature=None, bint is_taken_in=False, bint is_scaled=False,
    bint on_gpu=False,
):
    """Check every rule, and compute `what`; raise `RuleError` for the first that is broken, before anything is written.

    - LOSS, and NLL for logits that are log-probabilities already: the loss.
    - GRAD: the loss and the gradient, in `out` if that is given. Like LOSS with what `make_stats`, if that is given,
      makes of the statistics as the last part of the result.
    - STATS: what `make_stats` makes of the statistics.
    - PRODUCT: the product of the Hessian and `v`, in `out`.
    - DIAGONAL: the gradient in `out`, and the diagonal that `curvature`, a `Curvature`, describes in `hess_out`.
    - NORMALIZER: what a mean divides by, after all checks of a gradient's arguments; None if the arrays are views of
      the bounds of arrays `on_gpu`, in which there is nothing to look at.

    `options` are in the order of `_options.NUMBERS_AND_NAMES`. What only Python can convert breaks a rule, too. After
    it has taken in all arguments it says so, and that weights are as near to 1 as they can be (`is_scaled`).
    """
    cdef Call c
    cdef Task task
    cdef Vector weights, sample_weights, grad_outputs
    cdef double normalizer = 0, loss = 0
    cdef bint is_diagonal = what == DIAGONAL, is_product = what == PRODUCT
    cdef bint with_grad = is_diagonal or is_product or what == GRAD
    cdef bint is_second = is_diagonal or is_product
    cdef bint has_divisor
    cdef Py_ssize_t bad = -1
    cdef int team
    c.other = NULL
    c.is_taken_in = is_taken_in
    c.is_scaled = is_scaled
    c.far = 0
    c.on_gpu = on_gpu
    if unlikely(not (
        read_options(&c, options, n_threads, axis)
        and read_needed(&c, &c.logits, logits, "logits") and read_needed(&c, &c.target, target, "target")
        and read_array(&c, &c.weight, weight, "weight")
        and read_array(&c, &c.sample_weight, sample_weight, "sample_weight")
        and read_grad_output(&c, grad_output)
        and (read_needed(&c, &c.v, v, "v") if is_product else read_array(&c, &c.v, None, "v"))
        and read_result(&c, &c.out, out, "out") and read_result(&c, &c.hess_out, hess_out, "hess_out")
        and check_logits(&c) and check_target(&c)
    )):
        raise broken(&c)
    # From here on others may run: `make_ready` and the search for shared memory let them. All is read.
    if unlikely(not check_factors(&c, &c.weight, "weight", PER_CLASS)):
        raise broken(&c)
    weight = None if on_gpu else read_vector(&c.weight, &weights)
    if unlikely(not (
        (on_gpu or check_finite(&c, &weights, c.n_classes, "weight", c.arithmetic == cnp.NPY_FLOAT32, 1))
        and check_factors(&c, &c.sample_weight, "sample_weight", PER_ROW)
    )):
        raise broken(&c)
    sample_weight = None if on_gpu else read_vector(&c.sample_weight, &sample_weights)
    if unlikely(not (
        (on_gpu or check_finite(&c, &sample_weights, c.n_rows, "sample_weight", False, 2))
        and check_factors(&c, &c.grad_outputs, "grad_output", PER_ROW if c.options.is_per_row else ONE_FOR_ALL)
        and check_factors(&c, &c.v, "v", PER_LOGIT) and check_results(&c) and check_conversions(&c)
    )):
        raise broken(&c)
    if unlikely(on_gpu):
        return None
    grad_output = read_vector(&c.grad_outputs, &grad_outputs)
    if grad_output is not None and not c.options.is_per_row:
        c.grad_output = vector_item(&grad_outputs, 0)
        grad_outputs.data = NULL
    weight = rounded(weight, &weights, c.n_classes, c.arithmetic)
    team = choose_team(c.options.n_threads, c.n_rows * c.n_classes)
    if c.has_classes:
        target = read_classes(&c)
        bad = scan_classes(&c, &weights, &sample_weights, team, &normalizer)
        if unlikely(bad >= 0):
            fail(&c, "class", "target", <double>bad)
            raise broken(&c)
    else:
        normalizer = c.n_rows if sample_weight is None else sum_vector(&sample_weights, c.n_rows)
    if unlikely(c.options.is_mean and normalizer != 0 and not DBL_MIN <= fabs(normalizer) < INFINITY):
        fail(&c, "normalizer", "weight", normalizer)
        raise broken(&c)
    if what == NORMALIZER:
        return normalizer

    has_divisor = not c.options.is_mean or normalizer != 0
    if with_grad and out is None:
        out = new_like(&c.logits)
        set_operand(&c.out, out)
    if is_diagonal and hess_out is None:
        hess_out = new_like(&c.logits)
        set_operand(&c.hess_out, hess_out)
    describe(
        &task, &c.logits, c.axis, NULL if c.has_classes else &c.target,
        &c.out if with_grad and has_divisor else NULL,
        &c.v if is_product and has_divisor else NULL, &c.hess_out if is_diagonal and has_divisor else NULL)
    task.target = <const int64_t*>c.target.data if c.has_classes else NULL
    task.sample_weight, task.grad_output = sample_weights, grad_outputs
    task.is_product = is_product
    task.normalized = what == NLL
    if is_diagonal:
        set_curvature(&task, curvature)
    losses = lse = log_prob = argmax = entropy = None
    if c.options.is_per_row and not is_second and what != STATS:
        losses = new_per_row(&c, c.arithmetic)
        task.loss = cnp.PyArray_DATA(losses)
    if make_stats is not None:
        lse, log_prob = new_per_row(&c, c.arithmetic), new_per_row(&c, c.arithmetic)
        argmax, entropy = new_per_row(&c, cnp.NPY_INT64), new_per_row(&c, c.arithmetic)
        task.lse, task.log_prob = cnp.PyArray_DATA(lse), cnp.PyArray_DATA(log_prob)
        task.entropy, task.argmax = cnp.PyArray_DATA(entropy), <int64_t*>cnp.PyArray_DATA(argmax)
    task.weight = weights.data
    task.weight_sum = c.n_classes if weight is None else sum_vector(&weights, c.n_classes)
    task.ignore_index = c.options.ignore_index
    task.label_smoothing = c.options.label_smoothing
    task.z_loss = c.options.z_loss
    task.logit_scale = c.options.logit_scale
    task.softcap = c.options.softcap
    task.factor = c.grad_output
    if c.options.is_mean and has_divisor:
        task.factor /= normalizer
    if c.n_rows > 0 and (has_divisor or make_stats is not None):
        loss = process_task(&task, <int>c.logits.itemsize, team)
    if unlikely(not has_divisor):
        if with_grad:
            view_of(&c.out)[...] = 0
        if is_diagonal:
            view_of(&c.hess_out)[...] = 0
    if is_second:
        return (out, hess_out) if is_diagonal else out
    if what == STATS:
        return make_stats(lse, log_prob, argmax, entropy)
    if c.options.is_per_row:
        result = losses
    elif c.options.is_mean:
        result = scalar_of(loss / normalizer if has_divisor else c.options.on_empty, c.arithmetic)
    else:
        result = scalar_of(loss, c.arithmetic)
    if make_stats is None:
        return (result, out) if with_grad else result
    stats = make_stats(lse, log_prob, argmax, entropy)
    return (result, out, stats) if with_grad else (result, stats)


def along_axis(x, axis, n_threads, out=None, lse=None, bint log_softmax=False):
    """Check every rule; return the softmax along an axis, or its logarithm, which goes to `out` if that is given.

    Raise `RuleError` for the first rule that is broken, before anything is written. If `lse` is given, contiguous and
    trusted, the log-sum-exp goes there, and there is no softmax unless `out` is given. No axis is the only one.
    """
    cdef Call c
    cdef Task task
    c.other = NULL
    c.on_gpu = c.is_taken_in = False
    if unlikely(not (
        read_threads_and_axis(&c, n_threads, axis)
        and read_needed(&c, &c.logits, x, "x") and read_result(&c, &c.out, out, "out")
        and check_float(&c, &c.logits, "x") and check_axis(&c, c.logits.n_dims, 0)
        and (c.options.has_axis or c.logits.n_dims == 1 or fail(&c, "axis", "axis", c.logits.n_dims))
        and (out is None or (
            check_like(&c, &c.out, &c.logits, "out") and check_apart(&c, &c.out, "out", &c.logits, "x", True)))
    )):
        raise broken(&c)
    measure(&c)
    if out is None and lse is None:
        out = new_like(&c.logits)
        set_operand(&c.out, out)
    if c.n_rows == 0 or c.n_classes == 0:
        return out
    describe(&task, &c.logits, c.axis, NULL, NULL if out is None else &c.out, NULL, NULL)
    task.ignore_index = _DEFAULT_IGNORE_INDEX
    task.out_kind = LOG_SOFTMAX if log_softmax else GRADIENT
    if lse is not None:
        task.lse = cnp.PyArray_DATA(<cnp.ndarray>lse)
    process_task(&task, <int>c.logits.itemsize, choose_team(c.options.n_threads, c.n_rows * c.n_classes))
    return out


def total(cnp.ndarray values not None):
    """Return the float64 sum of a contiguous float array, in an order that depends on its length alone."""
    cdef Vector vector
    cdef double result
    vector.data = cnp.PyArray_BYTES(values)
    vector.is_double = cnp.PyArray_TYPE(values) == cnp.NPY_FLOAT64
    with nogil:
        result = sum_vector(&vector, cnp.PyArray_SIZE(values))
    return result


DEFAULT_IGNORE_INDEX = _DEFAULT_IGNORE_INDEX
