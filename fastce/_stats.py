"""Per-row statistics of the softmax."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._arguments import STATS
from fastce._array import Array
from fastce._dispatch import call


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


def cross_entropy_stats(
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
) -> CrossEntropyStats:
    """Return per-row statistics of the softmax: log-sum-exp, log-probability of the target, arg-max and entropy.

    Parameters
    ----------
    logits, target
        As for `cross_entropy`.
    axis, sample_weight, ignore_index, logit_scale, softcap, n_threads
        As for `cross_entropy`.
    weight, label_smoothing, reduction, on_empty, z_loss
        Accepted and checked as by `cross_entropy`, so that both take the same options, but without effect.

    Returns
    -------
    stats : CrossEntropyStats
        Named tuple of arrays `lse`, `log_prob`, `argmax`, `entropy`, each shaped like an index target. Skipped rows
        hold 0, 0, -1 and 0.

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
    options = (ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss)
    stats: CrossEntropyStats = call(
        STATS, logits, target, axis, weight, sample_weight, options, n_threads, None, None, CrossEntropyStats
    )
    return stats
