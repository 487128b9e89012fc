"""The kernels as Python sees them: one module for each instruction set, all compiled from this source.

Design
------
1. `call` is the one way to the kernels of losses, for arrays of any strides. What it returns is ready for the user. It
   raises `RuleError` before anything is written: see `rule.pxd`.
2. Whoever has read an array makes results of what was read: the array itself may have another shape since.
"""
from libc.stdint cimport int64_t

cimport numpy as cnp

from fastce._cpu.arrays cimport new_per_row, new_result, scalar_of
from fastce._cpu.call cimport (
    ONE_FOR_ALL, PER_LOGIT, PER_ROW, Call, are_far, check_conversions, check_factors, check_logits, check_normalizer,
    check_results, check_target, measure, read_grad_output, read_grad_outputs, read_sample_weight, read_vector,
    read_weight
)
from fastce._cpu.operand cimport (
    Operand, arithmetic_of, check_apart, check_float, check_like, make_contiguous, read_array, read_optional,
    read_required, read_result, view_of
)
from fastce._cpu.options cimport DEFAULT_IGNORE_INDEX as _DEFAULT_IGNORE_INDEX
from fastce._cpu.options cimport Options, find_axis as axis_of, read_axis, read_n_threads, read_options
from fastce._cpu.plan cimport describe, round_weights, scan_classes, set_curvature, set_options
from fastce._cpu.platform cimport (
    CYTHON_HEX_VERSION, FASTCE_COMPILER, FASTCE_OPENMP, fastce_forget_started, fastce_has_avx2, fastce_has_avx512,
    fastce_max_threads, fastce_startable
)
from fastce._cpu.reductions cimport sum_vector
from fastce._cpu.rule cimport fail
from fastce._cpu.schedule cimport process_task
from fastce._cpu.task cimport GRADIENT, LOG_SOFTMAX, Task, Vector
from fastce._cpu.teamwork cimport pays_to_share

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


def check_options(tuple options, n_threads, axis):
    """Check what a call can be refused for without its arrays."""
    cdef Options read
    read_options(&read, options, n_threads, axis)


def check_array(array, str name, bint on_gpu=False):
    """Check that an array is one of logits."""
    cdef Operand logits
    read_array(&logits, array)
    check_float(&logits, name, on_gpu)


def find_axis(int n_dims, axis, int default_axis):
    """Return the class axis as a number that is not negative."""
    cdef Options options
    read_axis(&options, axis)
    return axis_of(&options, n_dims, default_axis)


def find_n_threads(n_threads):
    """Return the largest number of threads, 0 if the library chooses."""
    cdef Options options
    read_n_threads(&options, n_threads)
    return options.n_threads


def is_far(factors, str name, bint is_rounded):
    """Return True if factors, float or double, are far from 1; they must be finite, also as float if `is_rounded`."""
    cdef Operand operand
    cdef Vector vector
    read_array(&operand, factors)
    kept = read_vector(&operand, &vector)
    return are_far(&vector, cnp.PyArray_SIZE(kept), name, is_rounded)


def check_result(out, like, inputs, bint in_place, bint on_gpu=False):
    """Check that a result like this one can go to `out`, which may be `like` itself if that is worked on `in_place`.

    `inputs` are (name, array) pairs.
    """
    cdef Operand result, first, other
    read_array(&first, like)
    read_result(&result, out, "out", True)
    check_like(&result, &first, "out", on_gpu)
    check_apart(&result, "out", &first, "logits", in_place)
    for name, array in inputs:
        read_array(&other, array)
        check_apart(&result, "out", &other, name, False)


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
    cdef double normalizer, divisor, loss = 0
    cdef bint is_diagonal = what == DIAGONAL, is_product = what == PRODUCT
    cdef bint with_grad = is_diagonal or is_product or what == GRAD
    cdef int team
    c.on_gpu, c.is_scaled, c.far = on_gpu, is_scaled, 0
    read_options(&c.options, options, n_threads, axis)
    read_required(&c.logits, logits, "logits")
    read_required(&c.target, target, "target")
    read_optional(&c.weight, weight, "weight")
    read_optional(&c.sample_weight, sample_weight, "sample_weight")
    read_grad_output(&c, grad_output)
    c.v.array = NULL
    if is_product:
        read_required(&c.v, v, "v")
    read_result(&c.out, out, "out", is_taken_in)
    read_result(&c.hess_out, hess_out, "hess_out", is_taken_in)
    check_logits(&c)
    check_target(&c)
    # From here on others may run: copies and the search for shared memory let them. All is read.
    weight = read_weight(&c)
    sample_weight = read_sample_weight(&c)
    check_factors(&c, &c.grad_output, "grad_output", PER_ROW if c.options.is_per_row else ONE_FOR_ALL)
    check_factors(&c, &c.v, "v", PER_LOGIT)
    check_results(&c)
    check_conversions(&c)
    if on_gpu:
        return None
    grad_output = read_grad_outputs(&c)
    weight = round_weights(&c, weight)
    team = choose_team(c.options.n_threads, c.n_rows * c.n_classes)
    if c.has_classes:
        target = make_contiguous(&c.target, cnp.NPY_INT64, &c.target.data)
        normalizer = scan_classes(&c, team)
    else:
        normalizer = c.n_rows if sample_weight is None else sum_vector(&c.sample_weights, c.n_rows)
    divisor = 1
    if c.options.is_mean:
        check_normalizer(normalizer)
        divisor = normalizer
    if what == NORMALIZER:
        return normalizer

    if with_grad and out is None:
        out = new_result(&c.out, &c.logits)
    if is_diagonal and hess_out is None:
        hess_out = new_result(&c.hess_out, &c.logits)
    describe(&task, &c, divisor != 0)
    set_options(&task, &c, divisor)
    task.normalized = what == NLL
    if is_diagonal:
        set_curvature(&task, curvature)
    losses = lse = log_prob = argmax = entropy = None
    if c.options.is_per_row and (what == LOSS or what == NLL or what == GRAD):
        losses = new_per_row(&c, c.arithmetic)
        task.loss = cnp.PyArray_DATA(losses)
    if make_stats is not None:
        lse, log_prob = new_per_row(&c, c.arithmetic), new_per_row(&c, c.arithmetic)
        argmax, entropy = new_per_row(&c, cnp.NPY_INT64), new_per_row(&c, c.arithmetic)
        task.lse, task.log_prob = cnp.PyArray_DATA(lse), cnp.PyArray_DATA(log_prob)
        task.entropy, task.argmax = cnp.PyArray_DATA(entropy), <int64_t*>cnp.PyArray_DATA(argmax)
    if c.n_rows > 0 and (divisor != 0 or make_stats is not None):
        loss = process_task(&task, <int>c.logits.itemsize, team)
    if divisor == 0:
        if with_grad:
            view_of(&c.out)[...] = 0
        if is_diagonal:
            view_of(&c.hess_out)[...] = 0
    if is_product:
        return out
    if is_diagonal:
        return out, hess_out
    stats = None if make_stats is None else make_stats(lse, log_prob, argmax, entropy)
    if what == STATS:
        return stats
    if not c.options.is_per_row:
        losses = scalar_of(loss / divisor if divisor != 0 else c.options.on_empty, c.arithmetic)
    if stats is None:
        return (losses, out) if with_grad else losses
    return (losses, out, stats) if with_grad else (losses, stats)


def along_axis(x, axis, n_threads, out=None, lse=None, bint log_softmax=False):
    """Check every rule; return the softmax along an axis, or its logarithm, which goes to `out` if that is given.

    Raise `RuleError` for the first rule that is broken, before anything is written. If `lse` is given, contiguous and
    trusted, the log-sum-exp goes there, and there is no softmax unless `out` is given. No axis is the only one.
    """
    cdef Call c
    cdef Task task
    read_n_threads(&c.options, n_threads)
    read_axis(&c.options, axis)
    read_required(&c.logits, x, "x")
    read_result(&c.out, out, "out", False)
    check_float(&c.logits, "x", False)
    c.arithmetic = arithmetic_of(&c.logits)
    c.axis = axis_of(&c.options, c.logits.n_dims, 0)
    if axis is None and c.logits.n_dims > 1:
        fail("axis", "axis", c.logits.n_dims)
    if out is not None:
        check_like(&c.out, &c.logits, "out", False)
        check_apart(&c.out, "out", &c.logits, "x", True)
    measure(&c)
    if out is None and lse is None:
        out = new_result(&c.out, &c.logits)
    if c.n_rows == 0 or c.n_classes == 0:
        return out
    c.has_classes = True
    c.v.array = c.hess_out.array = NULL
    describe(&task, &c, True)
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
