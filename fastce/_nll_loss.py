"""The negative log-likelihood of given log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._arguments import NLL
from fastce._dispatch import call
from fastce._options import DEFAULTS

# What log-probabilities have no use for.
_, _SMOOTHING, _, _, *_OTHERS = DEFAULTS


def nll_loss(
    log_probs: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    on_empty: str = "nan",
    axis: int | None = None,
) -> np.floating[Any] | NDArray[Any]:
    """Return the negative log-likelihood of the targets for given log-probabilities.

    ``nll_loss(log_softmax(x, axis=1), target)`` is ``cross_entropy(x, target)``, in two sweeps instead of one.

    Parameters
    ----------
    log_probs : array_like, shape (N, C), (N, C, d1, ...) or (C,), of the dtypes of `cross_entropy`
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
    options = (ignore_index, _SMOOTHING, reduction, on_empty, *_OTHERS)
    loss: np.floating[Any] | NDArray[Any] = call(NLL, log_probs, target, axis, weight, sample_weight, options, None)
    return loss
