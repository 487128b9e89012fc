"""The definition: the public functions in plain float64 NumPy, without a thought for speed or memory.

It has three readers: whoever wants to know exactly what an option means, the tests, which hold the kernels against it,
and the benchmarks, which take `numpy_loss_and_grad` as their baseline. Arguments are taken to be right.

Design
------
1. A class index is the one-hot row of probabilities; label smoothing mixes either with the uniform row. With w the
   class weights, q the target so far and n = -log p, a row costs sum_k w_k q_k n_k, whatever the kind of target.
2. Small numbers come from sums of small terms, never from differences of large ones: with `rest` the sum of
   exp(x_k - max) without the largest term, log s = log1p(rest), and 1 - p is the other classes' share, not a
   subtraction from 1.
3. A term whose weight is 0 is 0, even where its other factor is infinite.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class Stats(NamedTuple):
    """What is known of each row's softmax; arrays shaped like an index target."""

    lse: Array
    log_prob: Array
    argmax: Array
    entropy: Array


class Result(NamedTuple):
    """All that there is to know of a problem."""

    loss: Array | np.float64
    grad: Array
    stats: Stats


class LinearResult(NamedTuple):
    """The loss of a linear layer's output, its gradients, and the statistics of its softmax."""

    loss: Array | np.float64
    grad_features: Array
    grad_linear_weight: Array
    grad_linear_bias: Array | None
    stats: Stats


class _Softmax(NamedTuple):
    """The softmax of each row of a matrix."""

    p: Array
    one_minus_p: Array
    minus_log_p: Array
    lse: Array  # a column, of shape (n_rows, 1), as are the next two
    entropy: Array
    nan: Array  # NaN for rows that have no softmax, else 0
    argmax: Array


class _Weighing(NamedTuple):
    """A target and its weights, row by row."""

    prob: Array  # (n_rows, n_classes): the target, one-hot for indices
    share: Array  # the same, smoothed and times the class weights
    row_weight: Array
    kept: Array
    normalizer: float


def _times(weight: Array | float, value: Array) -> Array:
    return np.where(weight == 0, 0.0, weight * value)


def _class_axis(logits: Array, axis: int | None) -> int:
    if axis is None:
        return 0 if logits.ndim == 1 else 1
    return axis


def _row_shape(shape: Shape, axis: int) -> Shape:
    return tuple(np.delete(shape, axis).tolist())


def _to_rows(x: Array, axis: int) -> Array:
    """Return x as a float64 matrix of one row per softmax."""
    x = np.moveaxis(x, axis, -1).astype(np.float64)
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _from_rows(rows: Array, like: Array, axis: int) -> Array:
    """Undo `_to_rows`."""
    return np.moveaxis(rows.reshape(np.moveaxis(like, axis, -1).shape), -1, axis)


def _softmax_of_rows(x: Array) -> _Softmax:
    argmax = x.argmax(axis=1)
    largest = np.arange(x.shape[1]) == argmax[:, None]
    top = x.max(axis=1, keepdims=True)
    d = x - top
    e = np.exp(d)
    # The largest term is exactly 1, or NaN: a row with NaN or +inf, or with nothing but -inf.
    rest = np.where(largest, e - 1, e).sum(axis=1, keepdims=True)
    s = 1 + rest
    p = e / s
    return _Softmax(
        p=p,
        one_minus_p=np.where(largest, rest, s - e) / s,
        minus_log_p=np.log1p(rest) - d,
        lse=np.where(np.isinf(top), top, top + np.log1p(rest)),
        entropy=np.log1p(rest) - _times(p, d).sum(axis=1, keepdims=True),
        nan=0 * rest,
        argmax=argmax,
    )


def _weigh(
    target: npt.ArrayLike,
    shape: Shape,
    axis: int,
    weight: npt.ArrayLike | None,
    sample_weight: npt.ArrayLike | None,
    ignore_index: int,
    label_smoothing: float = 0.0,
) -> _Weighing:
    target = np.asarray(target)
    n_rows, n_classes = prod(_row_shape(shape, axis)), shape[axis]
    w = np.ones(n_classes) if weight is None else np.asarray(weight, np.float64)
    a = np.ones(n_rows) if sample_weight is None else np.array(sample_weight, np.float64).reshape(n_rows)
    kept = a != 0
    if target.dtype.kind in "iu":
        y = target.reshape(n_rows)
        kept &= y != ignore_index
        prob = np.where(y[:, None] == np.arange(n_classes), 1.0, 0.0)
        normalizer = (a[kept] * w[y[kept]]).sum()
    else:
        prob = _to_rows(target, axis)
        normalizer = a.sum()
    share = w * ((1 - label_smoothing) * prob + label_smoothing / n_classes)
    return _Weighing(prob, share, a, kept, normalizer)


def _reduce(
    row_loss: Array, row_shape: Shape, weighing: _Weighing, reduction: str, on_empty: str
) -> tuple[Array | np.float64, float]:
    """Return the loss and what the gradient of the rows' sum is to be multiplied by."""
    loss = np.where(weighing.kept, weighing.row_weight * row_loss, 0.0)
    if reduction == "none":
        return loss.reshape(row_shape)[()], 1.0
    if reduction == "sum":
        return loss.sum(), 1.0
    if weighing.normalizer == 0:
        return np.float64("nan" if on_empty == "nan" else 0), 0.0
    return loss.sum() / weighing.normalizer, 1 / weighing.normalizer


class _Rows(NamedTuple):
    """The rows' own losses and what their derivatives are made of, before a reduction."""

    loss: Array
    soft: _Softmax
    weighing: _Weighing
    slope: Array  # f'
    bend: Array  # f''
    z_slope: Array  # 2 z lse
    grad: Array  # with respect to f(x)
    axis: int


class _Work(NamedTuple):
    """A problem: its rows, the reduced loss, and how much each row's derivatives count."""

    rows: _Rows
    loss: Array | np.float64
    factor: Array  # what a row's derivatives are multiplied by
    counts: Array  # whether they count for anything

    def weigh(self, rows: Array) -> Array:
        """Return derivatives of the loss from those of the rows' own losses."""
        return np.where(self.counts, self.factor * rows, 0.0)


def _work_of_rows(
    logits: Array,
    target: npt.ArrayLike,
    *,
    axis: int | None = None,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> _Rows:
    axis = _class_axis(logits, axis)
    weighing = _weigh(target, logits.shape, axis, weight, sample_weight, ignore_index, label_smoothing)
    share = weighing.share
    x = logit_scale * _to_rows(logits, axis)
    slope, bend = np.full_like(x, logit_scale), np.zeros_like(x)
    if softcap is not None:
        slope = logit_scale / np.cosh(x / softcap) ** 2  # 1 - tanh^2, without the difference
        bend = -2 * logit_scale / softcap * np.tanh(x / softcap) * slope
        x = softcap * np.tanh(x / softcap)
    soft = _softmax_of_rows(x)
    loss = _times(share, soft.minus_log_p).sum(axis=1) + (_times(z_loss, soft.lse**2) + soft.nan)[:, 0]
    # p_j (sum_k w_k q_k + 2 z lse) - w_j q_j, with p_j w_j q_j moved from the first term to the second
    z_slope = 2 * z_loss * soft.lse
    grad = soft.p * (share.sum(axis=1, keepdims=True) - share + z_slope) - soft.one_minus_p * share
    return _Rows(loss, soft, weighing, slope, bend, z_slope, grad, axis)


def _work(
    logits: Array,
    target: npt.ArrayLike,
    *,
    grad_output: npt.ArrayLike = 1.0,
    reduction: str = "mean",
    on_empty: str = "nan",
    **options: Any,
) -> _Work:
    rows = _work_of_rows(logits, target, **options)
    row_shape = _row_shape(logits.shape, rows.axis)
    loss, factor = _reduce(rows.loss, row_shape, rows.weighing, reduction, on_empty)
    counts = rows.weighing.kept & (factor != 0)
    factor = factor * np.broadcast_to(grad_output, row_shape).reshape(counts.shape) * rows.weighing.row_weight
    return _Work(rows, loss, factor[:, None], counts[:, None])


def cross_entropy(logits: npt.ArrayLike, target: npt.ArrayLike, **options: Any) -> Result:
    """Return the loss, its gradient and the rows' statistics."""
    logits = np.asarray(logits)
    with np.errstate(all="ignore"):
        work = _work(logits, target, **options)
        rows = work.rows
        soft, kept, prob = rows.soft, rows.weighing.kept, rows.weighing.prob
        grad = work.weigh(rows.slope * rows.grad)
        log_prob = (soft.nan - _times(prob, soft.minus_log_p)).sum(axis=1)
        columns = soft.lse[:, 0], log_prob, soft.argmax, soft.entropy[:, 0]
    row_shape = _row_shape(logits.shape, rows.axis)
    skipped = 0, 0, -1, 0
    stats = [np.where(kept, column, value).reshape(row_shape) for column, value in zip(columns, skipped, strict=True)]
    return Result(work.loss, _from_rows(grad, logits, rows.axis), Stats(*stats))


def cross_entropy_hvp(logits: npt.ArrayLike, target: npt.ArrayLike, v: npt.ArrayLike, **options: Any) -> Array:
    """Return the product of the Hessian and v: the derivative of the gradient in the direction v."""
    logits, v = np.asarray(logits), np.asarray(v)
    with np.errstate(all="ignore"):
        work = _work(logits, target, **options)
        rows = work.rows
        v = _to_rows(v, rows.axis)
        p, w = rows.soft.p, rows.slope * v
        w_top = np.take_along_axis(w, rows.soft.argmax[:, None], axis=1)
        shift = (p * (w - w_top)).sum(axis=1, keepdims=True)  # <p, w> - w_top
        total = rows.weighing.share.sum(axis=1, keepdims=True) + rows.z_slope
        product = p * (total * (w - w_top - shift) + 2 * options.get("z_loss", 0.0) * (w_top + shift))
        product = work.weigh(rows.slope * product + _times(rows.bend, rows.grad * v))
    return _from_rows(product, logits, rows.axis)


def cross_entropy_grad_hess(
    logits: npt.ArrayLike, target: npt.ArrayLike, *, curvature: str = "exact", **options: Any
) -> tuple[Array, Array]:
    """Return the gradient and a diagonal of curvature."""
    logits = np.asarray(logits)
    with np.errstate(all="ignore"):
        work = _work(logits, target, **options)
        rows = work.rows
        p, n_classes = rows.soft.p, rows.soft.p.shape[1]
        grad = work.weigh(rows.slope * rows.grad)
        total = rows.weighing.share.sum(axis=1, keepdims=True) + rows.z_slope
        of_softmax = work.weigh(rows.slope**2 * total * p * rows.soft.one_minus_p)
        gauss_newton = of_softmax + work.weigh(rows.slope**2 * 2 * options.get("z_loss", 0.0) * p**2)
        hess = {
            "exact": gauss_newton + work.weigh(_times(rows.bend, rows.grad)),
            "gauss_newton": gauss_newton,
            "xgboost": np.maximum(2 * of_softmax, 1e-16),
            "absolute": np.maximum(np.abs(grad), 1e-16),
            "lightgbm": of_softmax * n_classes / max(1, n_classes - 1),
        }[curvature]
    return _from_rows(grad, logits, rows.axis), _from_rows(np.where(work.counts, hess, 0.0), logits, rows.axis)


def linear_cross_entropy(
    features: npt.ArrayLike,
    linear_weight: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    linear_bias: npt.ArrayLike | None = None,
    **options: Any,
) -> LinearResult:
    """Return the loss of a linear layer's output, and the layer's gradients.

    `features` is (..., d), `linear_weight` (C, d1, ..., dK, d); the logits are (..., C, d1, ..., dK).
    """
    features, linear_weight = np.asarray(features, np.float64), np.asarray(linear_weight, np.float64)
    lead, of_row = features.shape[:-1], linear_weight.shape[:-1]
    n_rows, n_positions, n_features = prod(lead), prod(of_row[1:]), features.shape[-1]
    x, w = features.reshape(n_rows, n_features), linear_weight.reshape(of_row[0], n_positions, n_features)
    bias = 0.0 if linear_bias is None else np.asarray(linear_bias, np.float64)
    options["axis"] = len(lead)
    with np.errstate(all="ignore"):
        logits = np.tensordot(features, linear_weight, (-1, -1)) + bias
        result = cross_entropy(logits, target, **options)
        grad = result.grad.reshape(n_rows, of_row[0], n_positions)
        # A softmax that counts for nothing adds nothing, whatever its features are: 0 times NaN included.
        weight, sample_weight = options.get("weight"), options.get("sample_weight")
        weighing = _weigh(target, logits.shape, len(lead), weight, sample_weight, options.get("ignore_index", -100))
        counts = weighing.kept & (weighing.normalizer != 0 or options.get("reduction", "mean") != "mean")
        counts = counts.reshape(n_rows, n_positions, 1)
        grad_x, grad_w = np.zeros(x.shape), np.zeros(w.shape)
        for k in range(n_positions):
            grad_x += np.where(counts[:, k], grad[:, :, k] @ w[:, k], 0.0)
            grad_w[:, k] = grad[:, :, k].T @ np.where(counts[:, k], x, 0.0)
        return LinearResult(
            loss=result.loss,
            grad_features=grad_x.reshape(features.shape),
            grad_linear_weight=grad_w.reshape(linear_weight.shape),
            grad_linear_bias=None if linear_bias is None else grad.sum(axis=0).reshape(of_row),
            stats=result.stats,
        )


def nll_loss(
    log_probs: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    axis: int | None = None,
    weight: npt.ArrayLike | None = None,
    sample_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    on_empty: str = "nan",
) -> Array | np.float64:
    """Return the loss of log-probabilities that are given."""
    log_probs = np.asarray(log_probs)
    axis = _class_axis(log_probs, axis)
    weighing = _weigh(target, log_probs.shape, axis, weight, sample_weight, ignore_index)
    with np.errstate(all="ignore"):
        row_loss = _times(weighing.share, -_to_rows(log_probs, axis)).sum(axis=1)
        return _reduce(row_loss, _row_shape(log_probs.shape, axis), weighing, reduction, on_empty)[0]


def _axes(x: Array, axis: int | Shape | None) -> list[int]:
    return list(range(x.ndim)) if axis is None else [int(k) % x.ndim for k in np.atleast_1d(axis)]


def _along(x: npt.ArrayLike, axis: int | Shape | None, function: Callable[[Array], Array]) -> Array:
    """Return what a function makes of each of the rows that some axes make together."""
    given = np.atleast_1d(x)
    axes = _axes(given, axis)
    x = np.moveaxis(given, axes, range(-len(axes), 0)).astype(np.float64)
    n_kept = x.ndim - len(axes)
    rows = x.reshape(prod(x.shape[:n_kept]), prod(x.shape[n_kept:]))
    if rows.size:
        with np.errstate(all="ignore"):
            x = function(rows).reshape(x.shape)
    return np.moveaxis(x, range(-len(axes), 0), axes)


def softmax(x: npt.ArrayLike, *, axis: int | Shape | None = -1) -> Array:
    """Return p."""
    return _along(x, axis, lambda rows: _softmax_of_rows(rows).p).reshape(np.shape(x))


def log_softmax(x: npt.ArrayLike, *, axis: int | Shape | None = -1) -> Array:
    """Return log p."""
    return _along(x, axis, lambda rows: -_softmax_of_rows(rows).minus_log_p).reshape(np.shape(x))


def _log_of_sum(x: Array, b: Array) -> tuple[Any, Any]:
    """Return log|sum of b exp(x)| and the sum's sign."""
    x, b = x[b != 0], b[b != 0]
    top = x.max(initial=-np.inf)
    if not np.isfinite(top):
        total = (b * np.where(x == np.inf, np.inf, np.exp(np.minimum(x, 0)))).sum()
        return np.log(np.abs(total)), np.sign(total)
    is_top = x == top
    equal, others = b[is_top].sum(), (b * np.exp(x - top))[~is_top].sum()
    if np.abs(others) < np.abs(equal) / 2:
        return top + np.log(np.abs(equal)) + np.log1p(others / equal), np.sign(equal)
    return top + np.log(np.abs(equal + others)), np.sign(equal + others)


def logsumexp(
    x: npt.ArrayLike,
    *,
    axis: int | Shape | None = -1,
    b: npt.ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
) -> Any:
    """Return log|sum of b exp(x)|, and the sum's sign if asked; unasked the logarithm of a negative sum is NaN."""
    x, b = (np.asarray(a, np.float64) for a in np.broadcast_arrays(np.atleast_1d(x), 1.0 if b is None else b))
    axes = _axes(x, axis)
    kept = [k for k in range(x.ndim) if k not in axes]
    lse, sign = (np.empty([x.shape[k] for k in kept]) for _ in range(2))
    with np.errstate(all="ignore"):
        for place in np.ndindex(lse.shape):
            row = tuple(place[kept.index(k)] if k in kept else slice(None) for k in range(x.ndim))
            lse[place], sign[place] = _log_of_sum(x[row].ravel(), b[row].ravel())
    if not return_sign:
        lse[sign < 0] = np.nan
    if keepdims:
        lse, sign = (np.expand_dims(a, axes) for a in (lse, sign))
    return (lse[()], sign[()]) if return_sign else lse[()]


def numpy_loss_and_grad(logits: Array, target: Array) -> tuple[Any, Array]:
    """Return the mean loss and its gradient as NumPy users write them, for a (n_rows, n_classes) matrix and indices."""
    rows = np.arange(len(target))
    shifted = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(shifted)
    s = p.sum(axis=1, keepdims=True)
    loss = np.mean(np.log(s[:, 0]) - shifted[rows, target])
    p /= s
    p[rows, target] -= 1
    p /= len(target)
    return loss, p
