"""The loss of a linear layer: softmax cross-entropy of ``features @ linear_weight.T + linear_bias``, chunk by chunk.

Design
------
1. The logits of all rows never exist. A chunk of rows is multiplied into one buffer, the kernels turn it into its own
   gradient there, and what the layer's gradients need is multiplied out of it before the next chunk comes.
2. The products are BLAS's, through NumPy, and SciPy's for sparse features. Only the sum over chunks is made here:
   NumPy cannot ask BLAS to add to what is there. So ``grad.T @ features`` is made for a block of classes at a time,
   small enough to be added while it is in cache; whole, it would take as much memory again as the layer's weight.
3. What a mean divides by is known from the targets and weights alone, so every chunk is given its share of the whole
   batch's mean. Chunks leave the losses of their rows, which are summed once: their sum does not know the chunks.
4. Skipped rows are left out before anything is multiplied. That saves their time, and a NaN in their features cannot
   reach the gradient of the weight, where 0 * NaN would be NaN.
5. All checks are those of the logits, by a stand-in of their shape that holds a single number.
6. SciPy is never imported: whoever has a sparse matrix has SciPy, and the matrix brings its operators.
7. Features of any leading shape are rows of a matrix, and a weight of shape (C, d1, ..., dK, d) is a matrix of
   C d1 ... dK rows: one product makes the logits of all positions of a row of features. Here a *row* is such a row of
   features, with one softmax for each of its positions; where K is 0 there is one position.
8. A row of features may be skipped at some of its positions. Its gradient is 0 there, and goes through the products
   with the rest. Where that would make NaN of 0 times infinity or NaN, the products are made position by position.
9. What runs code of the caller's (conversions of arguments) is done before any shape is looked at: such code may
   reshape or resize the other arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import prod
from typing import Any, Literal, NamedTuple, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._array import Array, take_in
from fastce._dispatch import (
    GRAD,
    LOSS,
    NORMALIZER,
    Arguments,
    CrossEntropyStats,
    arithmetic,
    call,
    check_array,
    find_axis,
    plain_options,
    settle,
    total,
)
from fastce._options import NUMBERS_AND_NAMES, LossOptions, as_integer

Shape = tuple[int, ...]
Loss = np.floating[Any] | NDArray[Any]
Grad = NDArray[Any] | None
Rows = slice | NDArray[np.intp]

# The gradients that there are, in the order in which they are returned.
_LEAVES = ("features", "linear_weight", "linear_bias")
# Arrays of factors, of classes and of rows.
_FACTORS = ("weight", "sample_weight", "grad_output")

# Logits of a chunk. The more rows, the less adding to the gradient of the weight costs: 8192 x 512 features and 32000
# classes take 1.30, 1.20, 1.15, 1.13 and 1.11 times as long as their products with 16, 32, 48, 64 and 96 MiB, by
# asv_bench/linear.py on two cores of a Zen 4. The limit is memory: 128 MiB besides the results.
_LOGITS_BYTES = 2**26
# A block of the product that is added to the gradient of the weight: two or more fit in a cache of 16 MiB or more, with
# what they are added to. Derived, not measured.
_PRODUCT_BYTES = 2**22


class _Layer(NamedTuple):
    """A checked call, with `arguments` of the loss whose logits have their shape and no numbers.

    What these have for each row, class indices included, is flat.
    `features` is an array of shape (*lead, d), or CSR of two dimensions; `weight` and `bias` are a matrix and a vector
    of one entry for each class and position, in this order; `outer` is (d1, ..., dK).
    """

    features: Any
    is_sparse: bool
    lead: Shape
    n_classes: int
    outer: Shape
    weight: Array
    bias: Array | None
    chunk_rows: int | None
    arguments: Arguments
    named: dict[str, Any]  # the same options by name
    row_shape: Shape
    is_prob: bool
    is_finite: bool = True  # the weight, as far as that matters


class _Grads:
    """The gradients that are wanted, while they are summed: of the features row by row, the others over all chunks."""

    def __init__(self, layer: _Layer, wanted: frozenset[str]) -> None:
        features, weight, work = layer.features, layer.weight, layer.arguments.logits.dtype
        self.features: Grad = None
        self.weight: Grad = None
        self.bias: Grad = None
        if "features" in wanted:
            order = "C" if layer.is_sparse or len(layer.lead) != 1 else _order(features)
            self.features = np.zeros((prod(layer.lead), weight.shape[1]), features.dtype, order)
        if "linear_weight" in wanted:
            self.weight = np.zeros(weight.shape, work, _order(weight))
        if "linear_bias" in wanted and layer.bias is not None:
            self.bias = np.zeros(len(weight), work)
        self.are_any = not (self.features is None and self.weight is None and self.bias is None)
        self.is_empty = True


@overload
def linear_cross_entropy(
    features: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    chunk_rows: int | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Loss: ...
@overload
def linear_cross_entropy(
    features: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    chunk_rows: int | None = None,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Loss, CrossEntropyStats]: ...
def linear_cross_entropy(
    features: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    chunk_rows: int | None = None,
    return_stats: bool = False,
    axis: int | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    on_empty: str = "nan",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    n_threads: int | None = None,
) -> Loss | tuple[Loss, CrossEntropyStats]:
    """Return the softmax cross-entropy of a linear layer's output, without ever holding all of its logits.

    Parameters
    ----------
    features : array_like, shape (..., d), float32, float64, float16 or bfloat16; or SciPy CSR, float32 or float64
        The layer's input, of any strides and any number of leading dimensions: (N, d), (B, T, d), or (d,) for a single
        row. CSR is the only sparse format that is accepted, as array or as matrix.
    linear_weight : array_like, shape (C, d) or (C, d1, ..., dK, d), dtype of `features`
        The layer's weight, one row per class. With d1, ..., dK every row of features has d1 ... dK positions, each with
        its own softmax. A half-precision weight is copied whole to float32.
    target : array_like
        As for `cross_entropy` of the logits, whose shape is (..., C), or (..., C, d1, ..., dK): class indices of shape
        (...), or (..., d1, ..., dK); or class probabilities shaped like the logits.
    linear_bias : array_like, shape (C,) or (C, d1, ..., dK), dtype of `features`, optional
        The layer's bias. ``None`` means 0.
    chunk_rows : int, optional
        Number of rows of features per chunk. ``None`` means as many as make 64 MiB of logits. Changes the result by
        rounding only.
    return_stats : bool, default False
        Whether to return the statistics of `cross_entropy_stats` too, from the same sweep.
    axis : int, optional
        The class axis of the logits, as for `cross_entropy`. No other axis is accepted, so it may be left out.
    weight, sample_weight, ignore_index, label_smoothing, reduction, on_empty
        As for `cross_entropy`. `weight` has one number per class.
    logit_scale, softcap, z_loss
        As for `cross_entropy`.
    n_threads : int, optional
        As for `cross_entropy`; never changes the result. The products are computed by BLAS, which has its own threads
        and rounding.

    Returns
    -------
    loss : scalar, or ndarray shaped like an index target if ``reduction="none"``
        float64 for float64 features, else float32.
    stats : CrossEntropyStats
        Only with ``return_stats=True``: `lse`, `log_prob`, `argmax` and `entropy`, shaped like an index target.

    Raises
    ------
    IndexError, ValueError
        As `cross_entropy`, and if the shapes of `features`, `linear_weight` and `linear_bias` do not fit, `axis` is
        not the class axis, `chunk_rows` is less than 1, or sparse features have indices out of bounds.
    TypeError
        As `cross_entropy`, and if the dtypes of `features`, `linear_weight` and `linear_bias` differ, or `features` is
        sparse in a format other than CSR. Arrays on a GPU are refused.

    See Also
    --------
    linear_cross_entropy_with_grad : The loss and its gradients.

    Notes
    -----
    The logits are x_ck = sum_j linear_weight[c, k, j] features[j] + linear_bias[c, k] for each row of features, with k
    the position in d1, ..., dK; for a weight of two dimensions ``features @ linear_weight.T + linear_bias``. The result
    is that of `cross_entropy` along their class axis, up to rounding, and that of
    ``torch.nn.functional.linear_cross_entropy``. Half-precision features and weights are multiplied in float32, and the
    logits are not rounded to half precision in between.

    Besides the logits of a chunk, memory is needed for a weight that BLAS cannot read. It is copied whole if it has two
    dimensions and is neither C- nor Fortran-ordered, if it has more and is not C-ordered, if it has half precision, or
    if the features are sparse and it is not Fortran-ordered.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> features = np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> linear_weight = np.array([[2.0, 0.0], [0.0, 1.5], [0.0, 0.0]])
    >>> print(f"{fastce.linear_cross_entropy(features, linear_weight, [0, 2]):.6f}")
    1.667234
    >>> _, stats = fastce.linear_cross_entropy(features, linear_weight, [0, 2], return_stats=True)
    >>> print(stats.argmax, stats.log_prob.round(4))
    [0 1] [-0.2395 -3.0949]
    """
    options = (ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss)
    given = Arguments(None, target, axis, weight, sample_weight, options, n_threads)
    has_stats = bool(return_stats)
    layer, normalizer = _check_layer(features, linear_weight, linear_bias, chunk_rows, given)
    stats = _no_stats(layer) if has_stats else None
    loss = _solve_layer(layer, normalizer, None, stats)
    return loss if stats is None else (loss, stats)


@overload
def linear_cross_entropy_with_grad(
    features: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    chunk_rows: int | None = None,
    grad_output: ArrayLike | None = None,
    return_stats: Literal[False] = False,
    wrt: str | Iterable[str] = _LEAVES,
    **options: Unpack[LossOptions],
) -> tuple[Loss, Grad, Grad, Grad]: ...
@overload
def linear_cross_entropy_with_grad(
    features: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    chunk_rows: int | None = None,
    grad_output: ArrayLike | None = None,
    return_stats: Literal[True],
    wrt: str | Iterable[str] = _LEAVES,
    **options: Unpack[LossOptions],
) -> tuple[Loss, Grad, Grad, Grad, CrossEntropyStats]: ...
def linear_cross_entropy_with_grad(
    features: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    chunk_rows: int | None = None,
    grad_output: ArrayLike | None = None,
    return_stats: bool = False,
    wrt: str | Iterable[str] = _LEAVES,
    axis: int | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    on_empty: str = "nan",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    n_threads: int | None = None,
) -> tuple[Loss, Grad, Grad, Grad] | tuple[Loss, Grad, Grad, Grad, CrossEntropyStats]:
    """Return the softmax cross-entropy of a linear layer's output and its gradients with respect to the layer.

    Neither the logits nor their gradient are ever held whole.

    Parameters
    ----------
    features, linear_weight, target, linear_bias, chunk_rows
        As for `linear_cross_entropy`.
    grad_output : float, or array_like shaped like the loss if ``reduction="none"``, optional
        The upstream gradient, by which the gradients are multiplied. ``None`` means 1.
    return_stats : bool, default False
        As for `linear_cross_entropy`.
    wrt : str or iterable of str, default ("features", "linear_weight", "linear_bias")
        The arguments to differentiate with respect to. The other gradients are None, and cost neither products nor
        memory: leave out what is frozen.
    axis, weight, sample_weight, ignore_index, label_smoothing, reduction, on_empty
        As for `linear_cross_entropy`.
    logit_scale, softcap, z_loss, n_threads
        As for `linear_cross_entropy`.

    Returns
    -------
    loss : scalar or ndarray
        As from `linear_cross_entropy`.
    grad_features : ndarray shaped like `features`, or None
        d loss / d features, times `grad_output`; dtype of `features`. Dense even if the features are sparse. Exactly 0
        in skipped rows.
    grad_linear_weight : ndarray shaped like `linear_weight`, or None
        d loss / d linear_weight, times `grad_output`; dtype of `linear_weight`.
    grad_linear_bias : ndarray shaped like `linear_bias`, or None
        d loss / d linear_bias, times `grad_output`; dtype of `linear_bias`; None without a bias.
    stats : CrossEntropyStats
        Only with ``return_stats=True``: as from `linear_cross_entropy`.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `linear_cross_entropy`, and for an unsuitable `grad_output` or an unknown name in `wrt`.

    Notes
    -----
    With G the gradient that `cross_entropy_with_grad` returns for the logits of a weight of two dimensions,

        grad_features = G W,    grad_linear_weight = G^T X,    grad_linear_bias = sum_i G_i,

    and with more dimensions the same for each position, with the gradient of the features summed over them. The sums
    over rows are made chunk by chunk, in float32 for half precision, and only the results are rounded. All gradients
    are 0 if the divisor of a mean is 0. A NaN in the features of a row that is not skipped makes the gradient of the
    weight NaN.

    Besides the results, the logits of a chunk take 64 MiB and a part of a product 4 MiB. The gradient of the weight
    takes its own size again for sparse features, and twice its size for half precision.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> features = np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> linear_weight = np.array([[2.0, 0.0], [0.0, 1.5], [0.0, 0.0]])
    >>> loss, grad_features, grad_weight, grad_bias = fastce.linear_cross_entropy_with_grad(
    ...     features, linear_weight, [0, 2], linear_bias=np.zeros(3)
    ... )
    >>> print(grad_weight.round(4))
    [[-0.1065  0.0453]
     [ 0.0533  0.9094]
     [ 0.0533 -0.9547]]
    >>> print(grad_bias.round(4))
    [-0.0839  0.508  -0.4241]

    A frozen layer, which only passes the gradient on:

    >>> fastce.linear_cross_entropy_with_grad(features, linear_weight, [0, 2], wrt="features")[2:]
    (None, None)
    """
    options = (ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss)
    given = Arguments(None, target, axis, weight, sample_weight, options, n_threads, grad_output)
    has_stats, wanted = bool(return_stats), _check_wrt(wrt)
    layer, normalizer = _check_layer(features, linear_weight, linear_bias, chunk_rows, given)
    grads = _Grads(layer, wanted)
    stats = _no_stats(layer) if has_stats else None
    loss = _solve_layer(layer, normalizer, grads if grads.are_any else None, stats)
    found = loss, *_finish(layer, grads)
    return found if stats is None else (*found, stats)


def _check_wrt(wrt: str | Iterable[str]) -> frozenset[str]:
    """Return the names of the gradients that are wanted."""
    try:
        names: tuple[Any, ...] = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    except TypeError:
        raise TypeError(f"wrt must be one or more of {', '.join(map(repr, _LEAVES))}, got {wrt!r}") from None
    for name in names:
        if not isinstance(name, str) or name not in _LEAVES:
            raise ValueError(f"wrt must be one or more of {', '.join(map(repr, _LEAVES))}, got {name!r}")
    return frozenset(names)


def _check_layer(
    features: Any, linear_weight: ArrayLike, linear_bias: ArrayLike | None, chunk_rows: int | None, given: Arguments
) -> tuple[_Layer, float]:
    """Check everything, the classes of all rows included; return the call and what its mean divides by.

    `given` has no logits.
    """
    if chunk_rows is not None:
        chunk_rows = as_integer(chunk_rows, "chunk_rows")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be None or at least 1, got {chunk_rows}")
    options, n_threads, axis = plain_options(given.options, given.n_threads, given.axis)
    is_sparse = _is_sparse(features)
    arrays: dict[str, Any] = take_in(
        np,
        [
            *(() if is_sparse else [("features", features)]),
            ("linear_weight", linear_weight),
            ("target", given.target),
            ("linear_bias", linear_bias),
            *((name, getattr(given, name)) for name in _FACTORS),
        ],
    )
    if is_sparse:
        _check_csr(features)
    else:
        features = arrays["features"]
        check_array(features, "features")
    weight = arrays["linear_weight"]
    check_array(weight, "linear_weight")
    if weight.ndim < 2:
        raise ValueError(f"linear_weight must have shape (C, d) or (C, d1, ..., dK, d), got {weight.shape}")
    *lead, n_features = features.shape
    n_classes, *outer = weight.shape[:-1]
    if weight.shape[-1] != n_features:
        raise ValueError(
            f"linear_weight must have shape (C, {n_features}) or (C, d1, ..., dK, {n_features}) for features of shape "
            f"{features.shape}, got {weight.shape}"
        )
    _check_dtype(weight, "linear_weight", features.dtype)
    bias = arrays.get("linear_bias")
    if bias is not None:
        if bias.shape != weight.shape[:-1]:
            raise ValueError(
                f"linear_bias must have shape {weight.shape[:-1]} for linear_weight of shape {weight.shape}, got "
                f"{bias.shape}"
            )
        _check_dtype(bias, "linear_bias", features.dtype)
    logits = np.broadcast_to(np.zeros((), arithmetic(features.dtype)), (*lead, n_classes, *outer))
    class_axis = len(lead)
    if find_axis(axis, logits.ndim, class_axis) != class_axis:
        raise ValueError(
            f"axis must be None or {class_axis}, the class axis of logits of shape {logits.shape}, got {axis}"
        )
    taken = {name: arrays[name] for name in ("target", *_FACTORS) if name in arrays}
    normalizer, arguments = settle(
        NORMALIZER, given._replace(logits=logits, axis=class_axis, options=options, n_threads=n_threads, **taken)
    )
    is_prob = arguments.target.dtype.kind not in "iu"
    arguments = arguments._replace(
        target=arguments.target if is_prob else arguments.target.reshape(-1),
        sample_weight=None if arguments.sample_weight is None else arguments.sample_weight.reshape(-1),
        grad_output=None if arguments.grad_output is None else arguments.grad_output.reshape(-1),
    )
    layer = _Layer(
        features=features.reshape(1, n_features).tocsr() if is_sparse and not lead else features,
        is_sparse=is_sparse,
        lead=tuple(lead),
        n_classes=n_classes,
        outer=tuple(outer),
        weight=weight.reshape(n_classes * prod(outer), n_features),
        bias=None if bias is None else bias.reshape(-1),
        chunk_rows=chunk_rows,
        arguments=arguments,
        named=arguments.by_name(),
        row_shape=(*lead, *outer),
        is_prob=is_prob,
    )
    return layer, normalizer


def _is_sparse(value: object) -> bool:
    """Return True for SciPy's sparse arrays and matrices, and what is derived from them."""
    return any(kind.__module__.startswith("scipy.sparse") for kind in type(value).__mro__)


def _check_csr(features: Any) -> None:
    """Refuse sparse features that are not floats in the CSR format.

    What SciPy multiplies without a look, and reads or writes elsewhere if it is wrong, is looked at here.
    """
    if features.format != "csr":
        raise TypeError(
            f"features must be dense or of SciPy's CSR format, got {features.format}: convert it with features.tocsr()"
        )
    check_array(features.data, "features")
    dtype = features.data.dtype
    if dtype != arithmetic(dtype):
        raise TypeError(f"features of SciPy's CSR format must be float32 or float64, got {dtype.name}")
    n_rows, n_features = features.shape if features.ndim == 2 else (1, features.shape[0])
    ends, columns = features.indptr, features.indices
    n_stored = min(len(columns), len(features.data))
    if len(ends) != n_rows + 1 or ends[0] != 0 or ends[-1] > n_stored or (ends[1:] < ends[:-1]).any():
        raise ValueError(
            f"features.indptr must be {n_rows + 1} ascending numbers from 0 to at most {n_stored}, got {ends}"
        )
    columns = columns[: ends[-1]]
    if len(columns) and not 0 <= columns.min() <= columns.max() < n_features:
        bad = columns.min() if columns.min() < 0 else columns.max()
        raise ValueError(f"features.indices must be in [0, {n_features - 1}] for {n_features} features, got {bad}")


def _check_dtype(array: Array, name: str, dtype: np.dtype[Any]) -> None:
    if array.dtype != dtype:
        hint = " in another byte order" if array.dtype.newbyteorder() == dtype else ""
        raise TypeError(f"{name} must have the dtype of features, {dtype.name}, got {array.dtype.name}{hint}")


def _no_stats(layer: _Layer) -> CrossEntropyStats:
    """Return the statistics of skipped rows, for those of the others to be written over."""
    dtype = layer.arguments.logits.dtype
    kinds = (dtype, dtype, np.dtype(np.int64), dtype)
    return CrossEntropyStats(
        *(np.full(layer.row_shape, value, kind) for value, kind in zip((0, 0, -1, 0), kinds, strict=True))
    )


def _finish(layer: _Layer, grads: _Grads) -> tuple[Grad, Grad, Grad]:
    """Return the gradients, which are sums now, in the shapes and the dtype of what they belong to."""
    dtype, of_logits = layer.weight.dtype, (layer.n_classes, *layer.outer)
    features, weight, bias = grads.features, grads.weight, grads.bias
    with np.errstate(all="ignore"):  # 16 bits may overflow and underflow
        return (
            None if features is None else features.reshape(*layer.lead, features.shape[1]),
            None if weight is None else weight.astype(dtype, copy=False).reshape(*of_logits, weight.shape[1]),
            None if bias is None else bias.astype(dtype, copy=False).reshape(of_logits),
        )


def _solve_layer(layer: _Layer, normalizer: float, grads: _Grads | None, stats: CrossEntropyStats | None) -> Loss:
    """Run a checked call and return the loss; add to the gradients and write the statistics, if there are any."""
    named, dtype = layer.named, layer.arguments.logits.dtype
    is_mean = named["reduction"] == "mean"
    loss = np.zeros(layer.row_shape, dtype)
    with np.errstate(all="ignore"):  # infinities, NaN and what underflows are results like others
        if not is_mean or normalizer != 0:
            # Each chunk is a call of its own; the sums over all rows are made below.
            factors = layer.arguments.grad_output
            factors = np.ones(1) if factors is None else factors
            part = layer.arguments._replace(grad_output=factors.astype(np.float64) / normalizer if is_mean else factors)
            _run_chunks(layer._replace(arguments=part), loss, grads, stats)
        elif stats is not None:  # rows of weights that add up to 0 have statistics
            _run_chunks(layer, loss, None, stats)
        if named["reduction"] == "none":
            return loss
        value = total(loss)
        if is_mean:
            value = value / normalizer if normalizer != 0 else np.nan if named["on_empty"] == "nan" else 0.0
        result: Loss = dtype.type(value)
        return result


def _find_kept(layer: _Layer) -> NDArray[np.bool_] | None:
    """Return which positions of which rows are not skipped, a matrix; None if that is all of them."""
    arguments = layer.arguments
    kept = np.ones(prod(layer.row_shape), bool)
    if not layer.is_prob:
        kept &= arguments.target != layer.named["ignore_index"]
    if arguments.sample_weight is not None:
        kept &= arguments.sample_weight != 0
    return None if kept.all() else kept.reshape(prod(layer.lead), prod(layer.outer))


def _run_chunks(layer: _Layer, loss: Array, grads: _Grads | None, stats: CrossEntropyStats | None) -> None:
    work = layer.arguments.logits.dtype
    kept = _find_kept(layer)
    chunks = list(_split(layer, kept))
    if not chunks:
        return
    # Once for all chunks. What SciPy multiplies by is read along the classes.
    weight = layer.weight.astype(work, copy=False)
    weight = np.asfortranarray(weight) if layer.is_sparse else _for_blas(weight)
    layer = layer._replace(
        weight=weight,
        bias=None if layer.bias is None else layer.bias.astype(work),
        is_finite=kept is None or not layer.outer or _is_finite(weight),
    )
    most = max(_count(rows) for rows in chunks)
    buffer = None if layer.is_sparse else np.empty((most, len(weight)), work)
    for rows in chunks:
        _run_chunk(layer, rows, None if kept is None else kept[rows], buffer, loss, grads, stats)


def _split(layer: _Layer, kept: NDArray[np.bool_] | None) -> Iterator[Rows]:
    """Return the chunks: slices, or the numbers of the rows where some are left out."""
    chosen = None if kept is None or kept.any(axis=1).all() else np.flatnonzero(kept.any(axis=1))
    n_rows = prod(layer.lead) if chosen is None else len(chosen)
    if n_rows == 0 or 0 in layer.outer:
        return
    at_once = layer.chunk_rows
    if at_once is None:
        target = layer.arguments.target
        row_bytes = len(layer.weight) * layer.arguments.logits.itemsize
        if layer.is_prob and (chosen is not None or not _can_merge(target, layer.lead)):
            row_bytes += len(layer.weight) * target.itemsize  # which are copied
        at_once = max(1, _LOGITS_BYTES // row_bytes)
        at_once = -(-n_rows // -(-n_rows // at_once))  # no small one at the end
    for start in range(0, n_rows, at_once):
        rows = slice(start, min(start + at_once, n_rows))
        yield rows if chosen is None else chosen[rows]


def _count(rows: Rows) -> int:
    count: int = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    return count


def _can_merge(array: Array, lead: Shape) -> bool:
    """Return True if a view can merge the leading dimensions of an array into one."""
    steps = [(size, step) for size, step in zip(lead, array.strides, strict=False) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(steps))


def _take(array: Array, lead: Shape, rows: Rows) -> Array:
    """Return some rows, counted in C order over the leading dimensions: a view if that is possible."""
    if len(lead) == 1:
        return array[rows]
    if _can_merge(array, lead):
        return array.reshape(prod(lead), *array.shape[len(lead) :])[rows]
    numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    return array[np.unravel_index(numbers, lead)]


def _run_chunk(
    layer: _Layer,
    rows: Rows,
    kept: NDArray[np.bool_] | None,
    buffer: Array | None,
    loss: Array,
    grads: _Grads | None,
    stats: CrossEntropyStats | None,
) -> None:
    """Write the losses of some rows, and their statistics, and add their part of the gradients."""
    given, weight, lead, outer = layer.arguments, layer.weight, layer.lead, layer.outer
    count = _count(rows)
    features = layer.features
    if buffer is None:
        if count < features.shape[0]:  # SciPy's slices are copies
            features = features[rows]
        logits = features @ weight.T
    else:
        features = _for_blas(_take(features, lead, rows).astype(buffer.dtype, copy=False))
        logits = np.matmul(features, weight.T, out=buffer[:count])
    if layer.bias is not None:
        logits += layer.bias

    def take_rows(vector: Array) -> Array:
        return vector.reshape(prod(lead), prod(outer))[rows].reshape(count, *outer)

    all_rows = prod(lead), *outer
    chunk_logits = logits.reshape(count, layer.n_classes, *outer)
    factors = np.ones(1) if given.grad_output is None else given.grad_output
    part = given._replace(
        logits=chunk_logits,
        target=_take(given.target, lead, rows) if layer.is_prob else take_rows(given.target),
        axis=1,
        sample_weight=None if given.sample_weight is None else take_rows(given.sample_weight),
        options=tuple("none" if name == "reduction" else layer.named[name] for name in NUMBERS_AND_NAMES),
        grad_output=np.broadcast_to(factors, (count, *outer)) if factors.size == 1 else take_rows(factors),
        out=None if grads is None else chunk_logits,
        make_stats=None if stats is None else CrossEntropyStats,
        is_scaled=True,
    )
    results = call(LOSS if grads is None else GRAD, *part)
    losses = results[0] if type(results) is tuple else results
    loss.reshape(all_rows)[rows] = losses
    if stats is not None:
        for field, values in zip(stats, results[-1], strict=True):
            field.reshape(all_rows)[rows] = values
    if grads is not None:
        _add_grads(layer, grads, rows, logits, features, kept)


def _add_grads(
    layer: _Layer, grads: _Grads, rows: Rows, grad: Array, features: Any, kept: NDArray[np.bool_] | None
) -> None:
    """Add to the gradients what comes of some rows, whose gradient of the logits is given."""
    weight = layer.weight
    if grads.bias is not None:
        grads.bias += grad.sum(axis=0)
    if kept is not None and not kept.all():
        partly = np.flatnonzero(~kept.all(axis=1))
        if not (layer.is_finite and _is_finite(features[partly])):
            _add_by_position(layer, grads, rows, grad, features, kept)
            return
    if grads.features is not None:
        if isinstance(rows, slice) and grads.features.dtype == grad.dtype:
            np.matmul(grad, weight, out=grads.features[rows])
        else:
            grads.features[rows] = grad @ weight
    if grads.weight is not None:
        if not layer.is_sparse:
            _add_product(grads.weight, grad, features, grads.is_empty)
        elif grads.is_empty:
            grads.weight = (features.T @ grad).T
        else:
            grads.weight += (features.T @ grad).T
    grads.is_empty = False


def _is_finite(values: Any) -> bool:
    """Return True if 0 times any of these numbers is 0, but where their sum overflows perhaps not."""
    return bool(np.isfinite(values.sum()))


def _add_by_position(
    layer: _Layer, grads: _Grads, rows: Rows, grad: Array, features: Any, kept: NDArray[np.bool_]
) -> None:
    """Add to the gradients of features and weight, at each position for the rows that are not skipped there."""
    count, n_positions = kept.shape
    grad = grad.reshape(count, layer.n_classes, n_positions)
    weight = layer.weight.reshape(layer.n_classes, n_positions, -1)
    of_features = np.zeros((count, weight.shape[2]), grad.dtype)
    of_weight = None if grads.weight is None else grads.weight.reshape(weight.shape)
    for position in range(n_positions):
        chosen = np.flatnonzero(kept[:, position])
        part = grad[chosen, :, position]
        if grads.features is not None:
            of_features[chosen] += part @ weight[:, position]
        if of_weight is not None:
            of_weight[:, position] += (features[chosen].T @ part).T
    if grads.features is not None:
        grads.features[rows] = of_features
    grads.is_empty = False


def _add_product(total: Array, grad: Array, features: Array, is_empty: bool) -> None:
    """Add ``grad.T @ features`` to the gradient of the weight."""
    if is_empty:
        np.matmul(grad.T, features, out=total)
        return
    n_classes, n_features = total.shape
    size = max(1, _PRODUCT_BYTES // max(1, n_features * grad.itemsize))
    product = np.empty((min(size, n_classes), n_features), grad.dtype)
    for start in range(0, n_classes, size):
        part = total[start : start + size]
        part += np.matmul(grad[:, start : start + size].T, features, out=product[: len(part)])


def _order(array: Array) -> Literal["C", "F"]:
    """Return the memory order of a matrix, as a word for NumPy."""
    return "F" if array.flags.fnc else "C"


def _for_blas(matrix: Array) -> Array:
    """Return a matrix that BLAS can read, a copy if need be: without BLAS, NumPy multiplies many times slower."""
    size = matrix.itemsize
    for rows in (matrix, matrix.T):
        row, number = rows.strides
        if matrix.flags.aligned and number == size and row % size == 0 and row >= rows.shape[1] * size:
            return matrix
    return np.ascontiguousarray(matrix)
