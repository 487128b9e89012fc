"""Softmax cross-entropy: fused, exact, and as fast as memory allows.

Loss, gradient and statistics of softmax cross-entropy on NumPy arrays, computed in one sweep and in place if wanted.
"""

from importlib.metadata import version as _version

from fastce._config import show_config
from fastce._curvature import cross_entropy_grad_hess, cross_entropy_hvp
from fastce._linear import linear_cross_entropy, linear_cross_entropy_with_grad
from fastce._logsumexp import logsumexp
from fastce._loss import (
    cross_entropy,
    cross_entropy_with_grad,
)
from fastce._loss_object import CrossEntropyLoss
from fastce._nll_loss import nll_loss
from fastce._softmax import log_softmax, softmax
from fastce._stats import CrossEntropyStats, cross_entropy_stats

__version__ = _version("fastce")

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "cross_entropy",
    "cross_entropy_grad_hess",
    "cross_entropy_hvp",
    "cross_entropy_stats",
    "cross_entropy_with_grad",
    "linear_cross_entropy",
    "linear_cross_entropy_with_grad",
    "log_softmax",
    "logsumexp",
    "nll_loss",
    "show_config",
    "softmax",
]
