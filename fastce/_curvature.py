"""Second derivatives of the loss: Hessian-vector products, and the gradient with a diagonal second derivative.

Design
------
1. The Hessian is never formed. Both functions sweep once over the logits, like the gradient, with its options.
2. What a diagonal is asked for depends on who asks: a curvature is a name for a few numbers, all in one table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._arguments import DIAGONAL, PRODUCT
from fastce._dispatch import call
from fastce._options import as_name


class Curvature(NamedTuple):
    """A diagonal: f'^2 times ``factor * K p (1 - p) + z_factor * 2 z p^2``, plus f'' times the gradient if it bends."""

    factor: float = 1.0
    z_factor: float = 0.0
    bends: bool = False
    absolute: bool = False  # the gradient's absolute value instead
    floor: float = -np.inf  # the least value
    per_class: bool = False  # whether the factor is still to be multiplied by C / (C - 1)


CURVATURES = {
    "exact": Curvature(z_factor=1.0, bends=True),
    "gauss_newton": Curvature(z_factor=1.0),
    "xgboost": Curvature(factor=2.0, floor=1e-16),
    "absolute": Curvature(absolute=True, floor=1e-16),
    "lightgbm": Curvature(per_class=True),
}


def cross_entropy_hvp(
    logits: ArrayLike,
    target: ArrayLike,
    v: ArrayLike,
    *,
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
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
) -> NDArray[Any]:
    """Return the exact product of the Hessian of the softmax cross-entropy and a vector, in one sweep.

    Parameters
    ----------
    logits, target
        As for `cross_entropy`, but NumPy arrays only.
    v : array_like of real numbers, shaped like `logits`
        The vector, of any strides and any floating dtype.
    grad_output : float, or array_like shaped like the loss if ``reduction="none"``, optional
        The upstream gradient, by which the product is multiplied. ``None`` means 1.
    out : ndarray like `logits`, optional
        Receives the product. May be `logits` itself or `v` itself; any other overlap with an input is an error.
        ``None`` makes a new array in the memory order of the logits.
    axis, weight, sample_weight, ignore_index, label_smoothing, reduction, on_empty
        As for `cross_entropy`.
    logit_scale, softcap, z_loss, n_threads
        As for `cross_entropy`.

    Returns
    -------
    product : ndarray
        The Hessian of the loss with respect to the logits, times `grad_output`, times `v`; shape and dtype of the
        logits; `out` if that was given. Exactly 0 in skipped rows, and everywhere if the divisor of a mean is 0. With
        ``reduction="none"`` it is the Hessian of the sum of all losses times their `grad_output`.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `cross_entropy`, and for an unsuitable `v`, `out` or `grad_output`. Nothing has been written then. Arrays on
        a GPU are refused.

    See Also
    --------
    cross_entropy_grad_hess : The gradient and a diagonal.

    Notes
    -----
    The loss of a row depends on the logits of that row only, so the Hessian is one C x C matrix per row. With f the
    function by which `logit_scale` and `softcap` transform a logit, p the softmax of f(x), b_c = w_c q'_c as for
    `cross_entropy_with_grad`, K = sum_c b_c + 2 z lse, g_j = p_j K - b_j, u = f' v and m = sum_c p_c u_c, the product
    of a row is

        a { f'_j p_j [ K (u_j - m) + 2 z m ] + f''_j g_j v_j },

    the derivative of the gradient in the direction v, as ``torch.autograd.functional.hvp`` computes it by two passes
    of differentiation. u_j - m is computed from the differences to the u of the largest logit, so it keeps its digits
    where p is nearly 1. A logit of -inf contributes 0; a NaN or an infinity in `v` makes its whole row non-finite.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits, v = np.array([[2.0, 0.0, 0.0]]), np.array([[1.0, 0.0, 0.0]])
    >>> print(fastce.cross_entropy_hvp(logits, [0], v).round(6))
    [[ 0.167639 -0.08382  -0.08382 ]]
    >>> print(f"{fastce.cross_entropy_hvp(np.float32([60, 0]), 0, np.float32([1, 0]))[0]:.4e}")  # p_1 p_0
    8.7565e-27
    """
    options = (ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss)
    product: NDArray[Any] = call(
        PRODUCT, logits, target, axis, weight, sample_weight, options, n_threads, grad_output, out, None, v
    )
    return product


def cross_entropy_grad_hess(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    curvature: str = "exact",
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    hess_out: NDArray[Any] | None = None,
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
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the gradient of the softmax cross-entropy and a diagonal second derivative, in one sweep.

    With ``reduction="sum"``, this is what boosting libraries ask of an objective. Diagonal preconditioners use it too.

    Parameters
    ----------
    logits, target
        As for `cross_entropy`, but NumPy arrays only.
    curvature : {"exact", "gauss_newton", "xgboost", "absolute", "lightgbm"}, default "exact"
        Which diagonal; see Notes.
    grad_output : float, or array_like shaped like the loss if ``reduction="none"``, optional
        The upstream gradient, by which gradient and diagonal are multiplied. ``None`` means 1.
    out : ndarray like `logits`, optional
        Receives the gradient. May be `logits` itself; any other overlap is an error. ``None`` makes a new array in the
        memory order of the logits.
    hess_out : ndarray like `logits`, optional
        Receives the diagonal. Must share no memory with anything else. ``None`` makes a new array as for `out`.
    axis, weight, sample_weight, ignore_index, label_smoothing, reduction, on_empty
        As for `cross_entropy`.
    logit_scale, softcap, z_loss, n_threads
        As for `cross_entropy`.

    Returns
    -------
    grad : ndarray
        As from `cross_entropy_with_grad`.
    hess : ndarray
        The diagonal, shape and dtype of the logits; `hess_out` if that was given. Exactly 0 in skipped rows, and
        everywhere if the divisor of a mean is 0.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `cross_entropy`, and for an unsuitable `out`, `hess_out` or `grad_output`, or an unknown `curvature`. Nothing
        has been written then. Arrays on a GPU are refused.

    See Also
    --------
    cross_entropy_hvp : The whole Hessian times a vector.

    Notes
    -----
    In the notation of `cross_entropy_hvp`, for each row and times its factors,

    - "exact": f'_j^2 [ K p_j (1 - p_j) + 2 z p_j^2 ] + f''_j g_j, the diagonal of the Hessian. Without options it is
      p (1 - p), as in scikit-learn's ``HalfMultinomialLoss``. Under a softcap it may be negative.
    - "gauss_newton": the same without f'' g, the diagonal of a positive semi-definite matrix.
    - "xgboost": 2 K p_j (1 - p_j) f'_j^2, at least 1e-16, as in XGBoost's ``multi:softprob`` until September 2026
      (dmlc/xgboost#10258). By Gershgorin's theorem this diagonal matrix bounds the Hessian of the softmax from above.
    - "absolute": the absolute value of g_j f'_j, at least 1e-16. Without options it is that of p - y, as in XGBoost
      since then (dmlc/xgboost#12537). It does not vanish where a rare class is mispredicted.
    - "lightgbm": C / (C - 1) K p_j (1 - p_j) f'_j^2, as in LightGBM's ``multiclass``.

    1 - p_j of the largest logit is computed as the sum of the other probabilities, so it keeps its digits. The lower
    bounds of 1e-16 apply after all factors; half-precision results are rounded afterwards, in float16 to 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> grad, hess = fastce.cross_entropy_grad_hess(np.array([[2.0, 0.0, 0.0]]), [0])
    >>> print(grad.round(6), hess.round(6))
    [[-0.213014  0.106507  0.106507]] [[0.167639 0.095163 0.095163]]
    """
    diagonal = CURVATURES[as_name(curvature, "curvature", tuple(CURVATURES))]
    options = (ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss)
    results: tuple[NDArray[Any], NDArray[Any]] = call(
        DIAGONAL, logits, target, axis, weight, sample_weight, options, n_threads, grad_output, out, None, None,
        hess_out, diagonal,
    )  # fmt: skip
    return results
