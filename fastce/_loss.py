"""The losses: softmax cross-entropy with and without its gradient, as functions."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._arguments import GRAD, LOSS
from fastce._dispatch import call
from fastce._options import LossOptions
from fastce._stats import CrossEntropyStats

Loss = np.floating[Any] | NDArray[Any]


def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
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
) -> Loss:
    """Return the softmax cross-entropy between logits and targets.

    Parameters
    ----------
    logits : array_like, shape (N, C), (N, C, d1, ...) or (C,), float32, float64, float16 or bfloat16
        Unnormalised scores, of any strides, never modified. Half-precision logits (bfloat16 is that of the package
        ml_dtypes) are widened piece by piece, and all arithmetic is float32. If they are on a GPU, the result is a CuPy
        array, and all other arrays must be on the same GPU. See `fastce.cuda`.
    target : array_like
        Class indices of any integer dtype, shaped like `logits` without the class axis; or class probabilities of any
        floating dtype, shaped like `logits`, whose rows need not sum to one.
    axis : int, optional
        The class axis of `logits`. ``None`` means 1, or 0 for one-dimensional logits.
    weight : array_like, shape (C,), optional
        One factor w_c per class, finite and of any sign. ``None`` means 1.
    sample_weight : array_like, shaped like an index target, optional
        One factor a_i per row, finite and of any sign. Rows of weight 0 are skipped. ``None`` means 1.
    ignore_index : int, default -100
        Rows with this class index are skipped: no loss, no gradient, no part in the mean, whatever their logits hold.
        Must not be given with class probabilities.
    label_smoothing : float in [0, 1], default 0
        e in q' = (1 - e) q + e / C, which replaces the target distribution q.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides by the sum of a_i w_y over the rows that are not skipped (class indices), or by the sum of a_i
        (class probabilities), signs included; smoothing does not change that.
    on_empty : {"nan", "zero"}, default "nan"
        The mean if its divisor is 0, because every row is skipped or because weights of different signs cancel.
    logit_scale : float, default 1
        Positive factor of the logits, the inverse of a temperature. Neither 0 nor infinite in the dtype of the loss.
    softcap : float, optional
        Positive bound: logits become ``softcap * tanh(logits / softcap)``, after `logit_scale`. Neither 0 nor infinite
        in the dtype of the loss.
    z_loss : float, default 0
        Each kept row adds ``z_loss * lse**2``, times its sample weight.
    n_threads : int, optional
        Maximum number of threads, at least 1. ``None`` means as many as OpenMP, the process's processors and its CPU
        quota allow, if the call is large enough to gain from them. Never changes the result.

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
        If an argument has the wrong type: integer logits, one-hot integer targets, float class indices, masked arrays.

    See Also
    --------
    cross_entropy_with_grad : The loss and its gradient.

    Notes
    -----
    With x the logits of a row, m their maximum, n_c = log(sum_k exp(x_k - m)) - (x_c - m) = -log p_c, and q' as above,
    the loss of a row is

        a [ sum_c w_c q'_c n_c + z lse^2 ],    lse = m + log(sum_k exp(x_k - m)),

    as in ``torch.nn.CrossEntropyLoss``, whose defaults are kept. Terms with w_c q'_c = 0 are 0 even where n_c is
    infinite. Where the target is the largest logit, n_y = log1p(sum of the other exponentials): a confident row keeps
    full relative accuracy, where log(1 + ...) would be 0. A row with NaN, +inf, or nothing but -inf has the loss NaN.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    >>> print(f"{fastce.cross_entropy(logits, [0, 2]):.6f}")
    1.667234
    >>> print(fastce.cross_entropy(logits, [0, 2], reduction="none").round(6))
    [0.239545 3.094923]
    >>> print(f"{fastce.cross_entropy(np.float32([60, 0]), 0):.4e}")  # log1p(e**-60)
    8.7565e-27
    """
    options = (ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss)
    loss: Loss = call(LOSS, logits, target, axis, weight, sample_weight, options, n_threads)
    return loss


@overload
def cross_entropy_with_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> tuple[Loss, NDArray[Any]]: ...
@overload
def cross_entropy_with_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Loss, NDArray[Any], CrossEntropyStats]: ...
@overload
def cross_entropy_with_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> tuple[Loss, NDArray[Any]] | tuple[Loss, NDArray[Any], CrossEntropyStats]: ...
def cross_entropy_with_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
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
) -> tuple[Loss, NDArray[Any]] | tuple[Loss, NDArray[Any], CrossEntropyStats]:
    """Return the softmax cross-entropy and its gradient with respect to the logits.

    ``out=logits`` overwrites the logits with the gradient; no other array of their size exists at any time.

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
        Whether to return the statistics of `cross_entropy_stats` too, from the same sweep.
    axis, weight, sample_weight, ignore_index, label_smoothing, reduction, on_empty
        As for `cross_entropy`.
    logit_scale, softcap, z_loss, n_threads
        As for `cross_entropy`.

    Returns
    -------
    loss : scalar or ndarray
        As from `cross_entropy`.
    grad : ndarray
        d loss / d logits, times `grad_output`; shape and dtype of the logits; `out` if that was given. Exactly 0 in
        skipped rows, and everywhere if the divisor of a mean is 0.
    stats : CrossEntropyStats
        Only with ``return_stats=True``.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `cross_entropy`, and for an unsuitable `out` or `grad_output`. Nothing has been written then.

    Notes
    -----
    With the notation of `cross_entropy`, A = sum_c w_c q'_c and p the softmax, the gradient of a row is

        a [ p_j (A + 2 z lse) - w_j q'_j ],

    times 1 - tanh^2 under a softcap, times `logit_scale`. At the target, p_y - 1 is computed as minus the sum of the
    other probabilities, so it keeps full relative accuracy however close to 1 p_y is.

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
    options = (ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss)
    make_stats = CrossEntropyStats if return_stats else None
    results: tuple[Loss, NDArray[Any]] | tuple[Loss, NDArray[Any], CrossEntropyStats] = call(
        GRAD, logits, target, axis, weight, sample_weight, options, n_threads, grad_output, out, make_stats
    )
    return results
