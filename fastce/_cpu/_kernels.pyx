"""The kernels as Python sees them: one module for each instruction set, all compiled from this source.

Arguments are trusted: everything was checked before.
"""
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t

cimport numpy as cnp

from fastce._cpu._arrays cimport address, arithmetic_of, describe, scalar_of, set_curvature, set_vector
from fastce._cpu._ordinary cimport (
    NO_CLASS_IGNORED, Options, are_inputs, are_results, empty_like, empty_per_row, read_axis, read_options
)
from fastce._cpu._platform cimport (
    CYTHON_HEX_VERSION, FASTCE_COMPILER, FASTCE_OPENMP, fastce_forget_started, fastce_has_avx2, fastce_has_avx512,
    fastce_max_threads, fastce_startable
)
from fastce._cpu._process cimport process_task
from fastce._cpu._task cimport GRADIENT, LOG_SOFTMAX, Task, Vector
from fastce._cpu._team cimport scan_targets
from fastce._cpu._teamwork cimport pays_to_share
from fastce._cpu._vectors cimport sum_vector

cnp.import_array()

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


cpdef bint wants_team(n_threads, Py_ssize_t n_numbers):
    """Return whether several threads are to share so many numbers, as `n_threads` or, if that is None, use allows."""
    if n_threads is None:
        return pays_to_share(n_numbers)
    return n_threads > 1 and n_numbers >= SHARED_NUMBERS


def startable_threads(int n_threads):
    """Return how many of so many threads, the calling one included, the system can give the calling thread's team."""
    return fastce_startable(n_threads)


def forget_threads():
    """Forget how many threads the calling thread's team has: they were released."""
    fastce_forget_started()


def run(
    cnp.ndarray logits not None, cnp.ndarray target=None, cnp.ndarray prob=None, cnp.ndarray out=None, *,
    cnp.ndarray weight=None, cnp.ndarray sample_weight=None, cnp.ndarray grad_output=None,
    cnp.ndarray loss=None, cnp.ndarray lse=None, cnp.ndarray log_prob=None, cnp.ndarray entropy=None,
    cnp.ndarray argmax=None, bint log_softmax=False, bint normalized=False, int64_t ignore_index=NO_CLASS_IGNORED,
    double label_smoothing=0.0, double z_loss=0.0, double logit_scale=1.0, double softcap=0.0,
    double weight_sum=0.0, double factor=1.0, int n_threads=1, cnp.ndarray v=None, cnp.ndarray hess=None,
    curvature=None,
):
    """Do one sweep over `logits`, shape (..., n_classes); return the sum of the losses.

    There must be at least one row and one class.

    Everything that is given as an output is written: `out` (like `logits`: the gradient, without a target the softmax
    or the log-softmax) and the per-row arrays `loss`, `lse`, `log_prob`, `entropy` (in the logits' dtype) and `argmax`
    (int64). `target` is int64; per-row arrays are contiguous in C order over the row axes. `softcap` 0 means none.

    With `v`, shaped like the logits, `out` gets the product of the Hessian and `v` instead; with `hess`, like the
    logits, that gets the diagonal that `curvature`, a `Curvature`, describes. Then there must be a target and `out`,
    and no losses are summed.
    """
    cdef Task task
    describe(&task, cnp.PyArray_NDIM(logits) - 1, logits, target, prob, out, hess if v is None else v)
    task.weight = address(weight)
    task.weight_sum = weight_sum
    set_vector(&task.sample_weight, sample_weight)
    set_vector(&task.grad_output, grad_output)
    task.ignore_index = ignore_index
    task.label_smoothing = label_smoothing
    task.z_loss = z_loss
    task.logit_scale = logit_scale
    task.softcap = softcap
    task.normalized = normalized
    task.factor = factor
    task.out_kind = LOG_SOFTMAX if log_softmax else GRADIENT
    task.loss = address(loss)
    task.lse = address(lse)
    task.log_prob = address(log_prob)
    task.entropy = address(entropy)
    task.argmax = <int64_t*>address(argmax)
    task.is_product = v is not None
    if curvature is not None:
        set_curvature(&task, curvature)
    return process_task(&task, <int>cnp.PyArray_ITEMSIZE(logits), n_threads)


cdef solve_arrays(
    cnp.ndarray logits, int axis, cnp.ndarray target, cnp.ndarray out, bint with_grad, make_stats, cnp.ndarray weight,
    cnp.ndarray sample_weight, cnp.ndarray grad_output, const Options* options, n_threads, cnp.ndarray v,
    cnp.ndarray hess, curvature, choose_n_threads,
):
    """Do an ordinary call, unless a class does not exist or a mean has nothing to divide by: then return None."""
    cdef Task task
    cdef double normalizer = 0
    cdef double loss
    cdef bint has_classes = cnp.PyArray_NDIM(target) < cnp.PyArray_NDIM(logits)
    cdef bint is_second = v is not None or curvature is not None
    cdef int arithmetic = arithmetic_of(logits)
    cdef Py_ssize_t bad
    cdef int team = 1
    cdef Vector class_weight
    cdef cnp.ndarray losses, lse, log_prob, argmax, entropy
    # All shapes and addresses are read before anything lets other threads run: they may give the arrays other shapes.
    if with_grad and out is None:
        out = empty_like(logits)
    if curvature is not None and hess is None:
        hess = empty_like(logits)
    describe(
        &task, axis, logits, target if has_classes else None, None if has_classes else target, out,
        hess if v is None else v)
    set_vector(&task.sample_weight, sample_weight)
    set_vector(&task.grad_output, grad_output)
    set_vector(&class_weight, weight)
    task.is_product = v is not None
    if curvature is not None:
        set_curvature(&task, curvature)
    if options.is_per_row and not is_second:
        losses = empty_per_row(logits, axis, arithmetic)
        task.loss = address(losses)
    if make_stats is not None:
        lse = empty_per_row(logits, axis, arithmetic)
        log_prob = empty_per_row(logits, axis, arithmetic)
        argmax = empty_per_row(logits, axis, cnp.NPY_INT64)
        entropy = empty_per_row(logits, axis, arithmetic)
        task.lse, task.log_prob, task.entropy = address(lse), address(log_prob), address(entropy)
        task.argmax = <int64_t*>address(argmax)
    # From here on others run. What is converted has the shape of that moment.
    if weight is not None and cnp.PyArray_TYPE(weight) != arithmetic:
        weight = cnp.PyArray_Cast(weight, arithmetic)
        if cnp.PyArray_SIZE(weight) != task.n_classes:
            return None
        set_vector(&class_weight, weight)
    if has_classes and cnp.PyArray_TYPE(target) != cnp.NPY_INT64:
        target = cnp.PyArray_Cast(target, cnp.NPY_INT64)
        if cnp.PyArray_SIZE(target) != task.n_rows:
            return None
        task.target = <const int64_t*>address(target)
    if wants_team(n_threads, task.n_rows * task.n_classes):
        team = choose_n_threads(n_threads)
    if has_classes:
        bad = scan_targets(
            task.target, task.n_rows, options.ignore_index, task.n_classes, &class_weight, &task.sample_weight, team,
            &normalizer)
        if bad >= 0:
            return None
    else:
        normalizer = task.n_rows if sample_weight is None else sum_vector(&task.sample_weight, task.n_rows)
    if options.is_mean and normalizer == 0:
        return None
    task.weight = class_weight.data
    task.weight_sum = task.n_classes if weight is None else sum_vector(&class_weight, task.n_classes)
    task.ignore_index = options.ignore_index
    task.label_smoothing = options.label_smoothing
    task.z_loss = options.z_loss
    task.logit_scale = options.logit_scale
    task.softcap = options.softcap
    task.factor = options.grad_output / normalizer if options.is_mean else options.grad_output
    loss = process_task(&task, <int>cnp.PyArray_ITEMSIZE(logits), team)
    if is_second:
        return out if v is not None else (out, hess)
    result = losses if options.is_per_row else scalar_of(loss / normalizer if options.is_mean else loss, arithmetic)
    if make_stats is not None:
        stats = make_stats(lse, log_prob, argmax, entropy)
        return (result, out, stats) if with_grad else (result, stats)
    return (result, out) if with_grad else result


def solve_ordinary(
    logits, target, out, axis, bint with_grad, make_stats, weight, sample_weight, grad_output, tuple given, n_threads,
    v, hess, curvature, choose_n_threads,
):
    """Do a whole call, checks included, if it is ordinary in every respect; else do nothing and return None.

    Ordinary is what can break no rule: aligned arrays in native byte order, all in C order but for those shaped like
    the logits, which may be in Fortran order; integers that fit in int64; any valid options. Return the loss, or a
    tuple of it and, as far as they are asked for, the gradient and what `make_stats` makes of the statistics. With `v`
    return the product of the Hessian and that instead; with `curvature`, a `Curvature`, the gradient and that
    diagonal, in `hess` if that is given. If several threads are to share it, `choose_n_threads` says how many.
    """
    cdef Options options
    cdef int class_axis
    if n_threads is not None:
        if not (type(n_threads) is int and n_threads >= 1):
            return None
        n_threads = min(n_threads, INT_MAX)
    if not read_options(given, grad_output, &options):
        return None
    if not options.is_per_row:
        grad_output = None  # is among the options
    class_axis = read_axis(axis, logits)
    if class_axis < 0 or not are_inputs(
            logits, class_axis, target, v, weight, sample_weight, grad_output, &options):
        return None
    if not are_results(out, hess, logits, target, v, weight, sample_weight, grad_output):
        return None
    return solve_arrays(
        logits, class_axis, target, out, with_grad, make_stats, weight, sample_weight, grad_output, &options, n_threads,
        v, hess, curvature, choose_n_threads)


def scan(
    cnp.ndarray target not None, int64_t ignore_index, int64_t n_classes, cnp.ndarray weight, cnp.ndarray sample_weight,
    int n_threads,
):
    """Return the first row with an invalid target, or -1, and the normalizer: the sum of a_i w_y over kept rows."""
    cdef Vector a, w
    cdef double normalizer = 0
    cdef Py_ssize_t bad
    set_vector(&a, sample_weight)
    set_vector(&w, weight)
    bad = scan_targets(
        <const int64_t*>address(target), cnp.PyArray_SIZE(target), ignore_index, n_classes, &w, &a, n_threads,
        &normalizer)
    return bad, normalizer


def total(cnp.ndarray values not None):
    """Return the float64 sum of a contiguous float array, in an order that depends on its length alone."""
    cdef Vector vector
    cdef double result
    set_vector(&vector, values)
    with nogil:
        result = sum_vector(&vector, cnp.PyArray_SIZE(values))
    return result
