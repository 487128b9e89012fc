"""From a checked problem to its results, by whichever backend its arrays belong to."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastce._array import Array, array_module, device_of, waits
from fastce._backend import Backend, backend_of
from fastce._options import Options
from fastce._problem import Problem, arithmetic, class_error

_LEAST = float(np.finfo(np.float64).tiny)  # whose inverse is a number
_LARGEST = {np.dtype(kind): float(np.finfo(kind).max) for kind in (np.float32, np.float64)}


class CrossEntropyStats(NamedTuple):
    """Per-row statistics of the softmax after `logit_scale` and `softcap`, each of the shape of an index target.

    Skipped rows hold 0, 0, -1 and 0.
    """

    lse: Array
    """log of the sum of the exponentials; float64 for float64 logits, else float32."""
    log_prob: Array
    """log p_y, or sum_c t_c log p_c under class probabilities; dtype of `lse`."""
    argmax: NDArray[np.int64]
    """The most probable class, the first of equals; int64; -1 where there is none (NaN)."""
    entropy: Array
    """-sum_c p_c log p_c in nats; dtype of `lse`."""


def empty_stats(problem: Problem) -> CrossEntropyStats:
    """Return statistics to be written."""
    shape, dtype = problem.row_shape, arithmetic(problem.logits.dtype)
    xp = array_module(problem.logits)
    with device_of(problem.logits):
        return CrossEntropyStats(
            lse=xp.empty(shape, dtype),
            log_prob=xp.empty(shape, dtype),
            argmax=xp.empty(shape, np.int64),
            entropy=xp.empty(shape, dtype),
        )


def solve(
    problem: Problem,
    grad: Array | None = None,
    stats: CrossEntropyStats | None = None,
    normalized: bool = False,
    **second: Any,
) -> np.floating[Any] | Array:
    """Run a problem and return the loss; write the gradient and the statistics that are given.

    `second` asks for second derivatives, on the CPU: `v` for the product of the Hessian and that, in place of the
    gradient; or `hess`, where a diagonal of curvature goes, and `curvature`, its numbers. No loss is known then.
    """
    options = problem.options
    what_for = {
        "weight": problem.weight,
        "sample_weight": problem.sample_weight,
        "grad_output": problem.grad_output if not isinstance(problem.grad_output, float) else None,
        **(stats._asdict() if stats is not None else {}),
        "normalized": normalized,
        "ignore_index": problem.ignore_index,
        "label_smoothing": options.label_smoothing,
        "z_loss": options.z_loss,
        "logit_scale": options.logit_scale,
        "softcap": options.softcap or 0.0,
        "n_threads": options.n_threads,
    }
    factor = problem.grad_output if isinstance(problem.grad_output, float) else 1.0
    if array_module(problem.logits) is np:
        return _solve_at_once(problem, grad, factor, what_for, second)
    return _solve_later(problem, grad, factor, what_for)


def _solve_at_once(
    problem: Problem, grad: Array | None, factor: float, what_for: dict[str, Any], second: dict[str, Any]
) -> np.floating[Any] | Array:
    """Run a problem on the CPU."""
    options = problem.options
    backend = backend_of(problem.logits)
    loss_dtype = arithmetic(problem.logits.dtype)
    n_classes = problem.logits.shape[-1]
    normalizer = find_normalizer(problem, backend)
    mean = options.reduction == "mean"
    per_row_loss = np.zeros(problem.row_shape, loss_dtype) if options.reduction == "none" else None
    total = 0.0
    zeros: list[Array] = []
    if mean and normalizer == 0:
        # Written at the end: they may be the logits, of which there are statistics all the same.
        zeros = [result for result in (grad, second.get("hess")) if result is not None]
        grad, second = None, {}
    elif mean:
        factor /= normalizer
    if 0 not in problem.row_shape:
        total = backend.run(
            problem.logits,
            problem.target,
            problem.prob,
            grad,
            weight_sum=float(n_classes) if problem.weight is None else backend.total(problem.weight),
            factor=factor,
            loss=per_row_loss,
            **what_for,
            **second,
        )
    for result in zeros:
        result[...] = 0
    if per_row_loss is not None:
        return per_row_loss
    return reduce_loss(total, normalizer, options, loss_dtype)


def reduce_loss(total: float, normalizer: float, options: Options, loss_dtype: np.dtype[Any]) -> np.floating[Any]:
    """Return the sum or the mean, of losses whose sum is given."""
    value = total
    if options.reduction == "mean":
        value = total / normalizer if normalizer != 0 else _value_of_nothing(options.on_empty)
    if abs(value) > _LARGEST[loss_dtype]:
        value = np.copysign(np.inf, value)  # what a cast gives too, but with a warning
    scalar: np.floating[Any] = loss_dtype.type(value)
    return scalar


def _solve_later(problem: Problem, grad: Array | None, factor: float, what_for: dict[str, Any]) -> Array:
    """Start a problem on a GPU, which adds up for itself what a mean divides by; return where the loss will be."""
    options = problem.options
    logits, given = problem.logits, problem.given["target"]
    xp = array_module(logits)
    loss_dtype = arithmetic(logits.dtype)
    loss: Array
    if 0 in problem.row_shape:
        value = _value_of_nothing(options.on_empty) if options.reduction == "mean" else 0.0
        with device_of(logits):
            loss = xp.full(problem.row_shape if options.reduction == "none" else (), value, loss_dtype)
        return loss
    loss = backend_of(logits).run(  # type: ignore[assignment]
        logits,
        problem.target,
        problem.prob,
        grad,
        factor=factor,
        reduction=options.reduction,
        on_empty=_value_of_nothing(options.on_empty),
        loss_dtype=loss_dtype,
        make_error=None
        if problem.target is None
        else lambda row: class_error(given, row, logits.shape[-1], options.ignore_index),
        wait=waits(),
        **what_for,
    )
    return loss


def _value_of_nothing(on_empty: str) -> float:
    return {"nan": np.nan, "zero": 0.0}[on_empty]


def find_normalizer(problem: Problem, backend: Backend) -> float:
    """Return what a mean divides by; raise IndexError for the first class that does not exist."""
    normalizer = _sum_weights(problem, backend)
    if problem.options.reduction == "mean" and not (normalizer == 0 or _LEAST <= abs(normalizer) < np.inf):
        raise ValueError(
            f"weight and sample_weight must have products whose sum, over the rows that count, a mean can divide by, "
            f"got {normalizer}: such large and small ones are too much for float64"
        )
    return normalizer


def _sum_weights(problem: Problem, backend: Backend) -> float:
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
        problem.options.n_threads,
    )
    if bad >= 0:
        raise class_error(problem.given["target"], bad, problem.logits.shape[-1], problem.options.ignore_index)
    return normalizer
