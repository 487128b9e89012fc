"""The losses: softmax cross-entropy with and without gradient and statistics, and the negative log-likelihood."""

from typing import NamedTuple

import numpy as np

from fastce._backend import backend_of
from fastce._problem import check_options, check_out, check_problem, class_error


class CrossEntropyStats(NamedTuple):
    """Per-row statistics of the softmax after `logit_scale` and `softcap`, each of the shape of an index target.

    Skipped rows hold 0, 0, -1 and 0.
    """

    lse: np.ndarray
    """log of the sum of the exponentials; float64 for float64 logits, else float32."""
    log_prob: np.ndarray
    """log p_y, or sum_c t_c log p_c under class probabilities; dtype of `lse`."""
    argmax: np.ndarray
    """The most probable class, the first of equals; int64; -1 where there is none (NaN)."""
    entropy: np.ndarray
    """-sum_c p_c log p_c in nats; dtype of `lse`."""


def cross_entropy(
    logits,
    target,
    *,
    axis=None,
    weight=None,
    sample_weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="mean",
    on_empty="nan",
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    n_threads=None,
):
    """Return the softmax cross-entropy between logits and targets.

    Parameters
    ----------
    logits : array_like, shape (N, C), (N, C, d1, ...) or (C,), float32 or float64
        Unnormalised scores, of any strides; read-only arrays will do. Never modified.
    target : array_like
        Class indices of any integer dtype, shaped like `logits` without the class axis; or class probabilities of any
        floating dtype, shaped like `logits`, whose rows need not sum to one.
    axis : int, optional
        The class axis of `logits`. ``None`` means 1, or 0 for one-dimensional logits.
    weight : array_like, shape (C,), optional
        One factor w_c per class, finite and not negative. ``None`` means 1.
    sample_weight : array_like, shaped like an index target, optional
        One factor a_i per row, finite and not negative. Rows of weight 0 are skipped. ``None`` means 1.
    ignore_index : int, default -100
        Rows with this class index are skipped: no loss, no gradient, no part in the mean, whatever their logits hold.
        Must be left alone with class probabilities.
    label_smoothing : float in [0, 1], default 0
        e in q' = (1 - e) q + e / C, which replaces the target distribution q.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides by the sum of a_i w_y over the rows that are not skipped (class indices), or by the sum of a_i (class
        probabilities); smoothing does not change that.
    on_empty : {"nan", "zero"}, default "nan"
        What a mean is whose divisor is 0.
    logit_scale : float, default 1
        Positive factor of the logits, the inverse of a temperature.
    softcap : float, optional
        Positive bound: logits become ``softcap * tanh(logits / softcap)``, after `logit_scale`.
    z_loss : float, default 0
        Each kept row adds ``z_loss * lse**2``, times its sample weight.
    n_threads : int, optional
        At most this many threads. ``None`` lets the library choose. Never changes the result.

    Returns
    -------
    loss : scalar, or ndarray shaped like an index target if ``reduction="none"``
        float64 for float64 logits, else float32. 0 in skipped rows.

    Raises
    ------
    IndexError
        If a class index is outside 0 .. C-1 and is not `ignore_index`.
    ValueError
        If a shape does not fit, a number is out of its range, or a name is unknown.
    TypeError
        If an argument is of the wrong kind: integer logits, one-hot integer targets, float class indices, masked arrays.

    See Also
    --------
    cross_entropy_with_grad : The same with the gradient, in place if wanted.

    Notes
    -----
    With x the logits of a row, m their maximum, n_c = log(sum_k exp(x_k - m)) - (x_c - m) = -log p_c, and q' as above, the
    loss of a row is

        a [ sum_c w_c q'_c n_c + z lse^2 ],    lse = m + log(sum_k exp(x_k - m)),

    as in ``torch.nn.CrossEntropyLoss``, whose defaults are kept. Terms with w_c q'_c = 0 are 0 even where n_c is infinite.
    Where the target is the largest logit, n_y = log1p(sum of the other exponentials): a confident row keeps full relative
    accuracy, where log(1 + ...) would be 0. A row with NaN, +inf, or nothing but -inf has the loss NaN.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    >>> print(f"{fastce.cross_entropy(logits, [0, 2]):.6f}")
    1.667234
    >>> print(fastce.cross_entropy(logits, [0, 2], reduction="none").round(6))
    [0.239545 3.094923]
    >>> print(fastce.cross_entropy(np.float32([60, 0]), 0))  # log1p(e**-60)
    8.756511e-27
    """
    problem, _ = check_problem(
        logits,
        target,
        axis=axis,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        on_empty=on_empty,
        logit_scale=logit_scale,
        softcap=softcap,
        z_loss=z_loss,
        n_threads=n_threads,
    )
    return _solve(problem)[0]


def cross_entropy_with_grad(
    logits,
    target,
    *,
    grad_output=None,
    out=None,
    return_stats=False,
    axis=None,
    weight=None,
    sample_weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="mean",
    on_empty="nan",
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    n_threads=None,
):
    """Return the softmax cross-entropy and its gradient with respect to the logits.

    ``out=logits`` turns the logits into the gradient where they are; no other array of their size exists at any time.

    Parameters
    ----------
    logits, target
        As for `cross_entropy`.
    grad_output : float, or array_like shaped like the loss if ``reduction="none"``, optional
        The upstream gradient, by which the gradient is multiplied. ``None`` means 1. With ``reduction="sum"`` and
        ``grad_output=1 / total`` the gradients of micro-batches add up to that of their mean.
    out : ndarray like `logits`, optional
        Receives the gradient. May be `logits` itself; any other overlap with an input is an error. ``None`` makes a
        new array in the memory order of the logits.
    return_stats : bool, default False
        Whether to return the statistics of `cross_entropy_stats` too, which the same sweep computes.
    axis, weight, sample_weight, ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss, n_threads
        As for `cross_entropy`.

    Returns
    -------
    loss : scalar or ndarray
        As from `cross_entropy`.
    grad : ndarray
        d loss / d logits, times `grad_output`; shape and dtype of the logits; `out` if that was given. Exactly 0 in skipped
        rows, and everywhere if the divisor of a mean is 0.
    stats : CrossEntropyStats
        Only with ``return_stats=True``.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `cross_entropy`, and for an unsuitable `out` or `grad_output`. Nothing was written then.

    Notes
    -----
    With the notation of `cross_entropy`, A = sum_c w_c q'_c and p the softmax, the gradient of a row is

        a [ p_j (A + 2 z lse) - w_j q'_j ],

    times 1 - tanh^2 under a softcap, times `logit_scale`. At the target, p_y - 1 is formed as minus the sum of the other
    probabilities, so that it keeps full relative accuracy however close to 1 p_y is.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    >>> loss, grad = fastce.cross_entropy_with_grad(logits, [0, 2], out=logits)
    >>> grad is logits
    True
    >>> print(logits.round(4))
    [[-0.1065  0.0533  0.0533]
     [ 0.0226  0.4547 -0.4774]]
    """
    problem, class_axis = check_problem(
        logits,
        target,
        axis=axis,
        weight=weight,
        sample_weight=sample_weight,
        grad_output=grad_output,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        on_empty=on_empty,
        logit_scale=logit_scale,
        softcap=softcap,
        z_loss=z_loss,
        n_threads=n_threads,
    )
    grad = check_out(
        out,
        np.moveaxis(problem.logits, -1, class_axis),
        [
            ("target", target),
            ("weight", weight),
            ("sample_weight", sample_weight),
            ("grad_output", grad_output),
        ],
    )
    loss, stats = _solve(problem, np.moveaxis(grad, class_axis, -1), return_stats)
    return (loss, grad, stats) if return_stats else (loss, grad)


def cross_entropy_stats(
    logits,
    target,
    *,
    axis=None,
    weight=None,
    sample_weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="mean",
    on_empty="nan",
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    n_threads=None,
):
    """Return per-row statistics of the softmax: log-sum-exp, log-probability of the target, arg-max and entropy.

    Parameters
    ----------
    logits, target
        As for `cross_entropy`.
    axis, sample_weight, ignore_index, logit_scale, softcap, n_threads
        As for `cross_entropy`.
    weight, label_smoothing, reduction, on_empty, z_loss
        Accepted and checked as by `cross_entropy`, so that one set of options serves both; no statistic depends on them.

    Returns
    -------
    stats : CrossEntropyStats
        Named tuple of arrays `lse`, `log_prob`, `argmax`, `entropy`, each shaped like an index target. Skipped rows hold
        0, 0, -1 and 0.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `cross_entropy`.

    Notes
    -----
    lse = log(sum_c exp(x_c)) and the entropy is -sum_c p_c log p_c, for the logits x after `logit_scale` and `softcap`;
    `log_prob` is log p_y, or sum_c t_c log p_c under class probabilities t, without weights and smoothing.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> stats = fastce.cross_entropy_stats(np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), [0, 1])
    >>> print(stats.argmax, stats.entropy.round(4))
    [0 0] [0.6656 1.0986]
    """
    problem, _ = check_problem(
        logits,
        target,
        axis=axis,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        on_empty=on_empty,
        logit_scale=logit_scale,
        softcap=softcap,
        z_loss=z_loss,
        n_threads=n_threads,
    )
    return _solve(problem, return_stats=True)[1]


def nll_loss(
    log_probs,
    target,
    *,
    weight=None,
    sample_weight=None,
    ignore_index=-100,
    reduction="mean",
    on_empty="nan",
    axis=None,
):
    """Return the negative log-likelihood of targets under given log-probabilities.

    ``nll_loss(log_softmax(x, axis=1), target)`` is ``cross_entropy(x, target)``, in two sweeps instead of one.

    Parameters
    ----------
    log_probs : array_like, shape (N, C), (N, C, d1, ...) or (C,), float32 or float64
        Log-probabilities, as from `log_softmax`.
    target, weight, sample_weight, ignore_index, reduction, on_empty, axis
        As for `cross_entropy`.

    Returns
    -------
    loss : scalar, or ndarray shaped like an index target if ``reduction="none"``
        float64 for float64 log-probabilities, else float32.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `cross_entropy`.

    Notes
    -----
    The loss of a row is -a w_y log p_y for class indices and -a sum_c w_c t_c log p_c for class probabilities; see
    ``torch.nn.NLLLoss``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> print(fastce.nll_loss(np.log([[0.5, 0.5], [0.1, 0.9]]), [0, 1], reduction="none").round(4))
    [0.6931 0.1054]
    """
    problem, _ = check_problem(
        log_probs,
        target,
        axis=axis,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        on_empty=on_empty,
    )
    return _solve(problem, normalized=True)[0]


class CrossEntropyLoss:
    """Softmax cross-entropy with its options fixed.

    Parameters
    ----------
    **options
        The options of `cross_entropy`, all keyword-only, with its defaults; checked here as far as they can be without
        logits. Also attributes of the object.

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy`, for options that are unknown or out of range.

    Notes
    -----
    ``CrossEntropyLoss(**options)(logits, target)`` is ``cross_entropy(logits, target, **options)``, where the formula stands.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> loss = fastce.CrossEntropyLoss(label_smoothing=0.1)
    >>> loss
    CrossEntropyLoss(label_smoothing=0.1)
    >>> print(f"{loss(np.zeros((4, 10)), np.arange(4)):.4f}")
    2.3026
    """

    def __init__(self, **options):
        unknown = options.keys() - cross_entropy.__kwdefaults__.keys()
        if unknown:
            raise TypeError(f"options must be those of cross_entropy, got {', '.join(sorted(unknown))}")
        check_options(**{name: options[name] for name in options.keys() - {"axis", "weight", "sample_weight"}})
        self.__dict__.update(cross_entropy.__kwdefaults__)
        self.__dict__.update(options)

    def __repr__(self):
        """Show the options that differ from their defaults."""
        changed = (
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not (
                value is cross_entropy.__kwdefaults__[name] or np.array_equal(value, cross_entropy.__kwdefaults__[name])
            )
        )
        return f"CrossEntropyLoss({', '.join(changed)})"

    def __call__(self, logits, target):
        """Return the loss, as `cross_entropy` does."""
        return cross_entropy(logits, target, **vars(self))

    def with_grad(self, logits, target, *, grad_output=None, out=None):
        """Return the loss and its gradient, as `cross_entropy_with_grad` does."""
        return cross_entropy_with_grad(logits, target, grad_output=grad_output, out=out, **vars(self))


def _solve(problem, grad=None, return_stats=False, normalized=False):
    """Run a problem; return the loss and, if wanted, the statistics."""
    options = problem.options
    backend = backend_of(problem.logits)
    logits = problem.logits
    row_shape = problem.row_shape
    n_classes = logits.shape[-1]
    normalizer = _normalizer(problem, backend)
    mean = options.reduction == "mean"
    loss = np.zeros(row_shape, logits.dtype)
    stats = None
    if return_stats:
        stats = CrossEntropyStats(
            *(np.empty(row_shape, dtype) for dtype in (*[logits.dtype] * 2, np.int64, logits.dtype))
        )
    if loss.size:
        per_row = isinstance(problem.grad_output, np.ndarray)
        factor = 1.0 if per_row else problem.grad_output
        if mean and normalizer != 0:
            factor /= normalizer
        backend.run(
            logits,
            problem.target,
            problem.prob,
            grad if normalizer != 0 or not mean else None,
            weight=problem.weight,
            weight_sum=float(n_classes) if problem.weight is None else backend.total(problem.weight),
            sample_weight=problem.sample_weight,
            grad_output=problem.grad_output if per_row else None,
            factor=factor,
            loss=loss,
            **(stats._asdict() if return_stats else {}),
            normalized=normalized,
            ignore_index=problem.ignore_index,
            label_smoothing=options.label_smoothing,
            z_loss=options.z_loss,
            logit_scale=options.logit_scale,
            softcap=options.softcap or 0.0,
            n_threads=options.n_threads,
        )
    if mean and normalizer == 0 and grad is not None:
        grad[...] = 0
    if options.reduction == "none":
        return loss, stats
    value = backend.total(loss)
    if mean:
        value = value / normalizer if normalizer != 0 else {"nan": np.nan, "zero": 0.0}[options.on_empty]
    with np.errstate(over="ignore"):  # inf, as the losses of single rows are
        return logits.dtype.type(value), stats


def _normalizer(problem, backend):
    """Return what a mean divides by; raise IndexError for the first class that does not exist."""
    if problem.target is None:
        if problem.sample_weight is None:
            return float(np.prod(problem.row_shape))
        return backend.total(problem.sample_weight)
    bad, normalizer = backend.scan(
        problem.target,
        problem.ignore_index,
        problem.logits.shape[-1],
        problem.weight,
        problem.sample_weight,
    )
    if bad >= 0:
        raise class_error(problem.given_target, bad, problem.logits.shape[-1], problem.options.ignore_index)
    return normalizer
