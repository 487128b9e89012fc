"""The loss of a linear layer: softmax cross-entropy of ``features @ linear_weight.T + linear_bias``, as functions.

The logits of all rows never exist at once: `_linear_layer` checks a call, `_linear_chunks` computes it chunk by chunk,
and `_linear_grads` sums the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Unpack, overload

from numpy.typing import ArrayLike

from fastce._arguments import Arguments
from fastce._linear_chunks import solve
from fastce._linear_grads import LEAVES, Grad, LayerGrads, check_wrt
from fastce._linear_layer import check_layer
from fastce._loss import Loss
from fastce._options import LossOptions
from fastce._stats import CrossEntropyStats


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
    loss, stats = solve(check_layer(features, linear_weight, linear_bias, chunk_rows, given), None, has_stats)
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
    wrt: str | Iterable[str] = LEAVES,
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
    wrt: str | Iterable[str] = LEAVES,
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
    wrt: str | Iterable[str] = LEAVES,
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
    has_stats, wanted = bool(return_stats), check_wrt(wrt)
    layer = check_layer(features, linear_weight, linear_bias, chunk_rows, given)
    grads = LayerGrads(layer, wanted)
    loss, stats = solve(layer, grads if grads.are_any else None, has_stats)
    found = loss, *grads.results()
    return found if stats is None else (*found, stats)
