"""Weights far from 1, scaled by powers of two, which is exact.

Else the sum that a mean divides by need not be a normal number, and a product of two weights may leave the type
although the result would be in it.
"""

from typing import Any

import numpy as np

from fastce._arguments import Arguments
from fastce._array import Array, array_module


def scale_weights(arguments: Arguments, far: int) -> Arguments:
    """Return arguments whose weights are not far from 1, for the same loss and gradient.

    The loss of a row is a (sum of w n + z lse^2), and a mean divides by the sum of a w, or of a under probabilities. So
    what divides w divides z, too, and multiplies a, but for a mean over class indices, which does not change; and no
    mean changes with what divides a. Of `far` bit 1 stands for w, and bit 2 for a.
    """
    given = arguments.by_name()
    weight, sample_weight, z_loss = arguments.weight, arguments.sample_weight, given["z_loss"]
    xp = array_module(arguments.logits)
    is_mean = given["reduction"] == "mean"
    if far & 1 and not (is_mean and arguments.is_prob):
        of_weight = _exponent(weight)
        rows = xp.ones(arguments.row_shape) if sample_weight is None else sample_weight.astype(np.float64)
        moved = rows if is_mean else _ldexp(rows, of_weight)
        if np.isfinite(moved).all() and ((moved == 0) == (rows == 0)).all():
            sample_weight = sample_weight if is_mean else moved
            weight = _ldexp(weight.astype(np.float64), -of_weight)
            z_loss = min(float(_ldexp(np.float64(z_loss), -of_weight)), float(np.finfo(np.float64).max))
    if far & 2 and is_mean:
        moved = _ldexp(sample_weight.astype(np.float64), -_exponent(sample_weight))
        least = np.copysign(np.finfo(np.float64).smallest_subnormal, sample_weight)
        sample_weight = xp.where((moved == 0) & (sample_weight != 0), least, moved)  # rows of weight 0 are skipped
    return arguments.with_named(weight=weight, sample_weight=sample_weight, z_loss=z_loss, is_scaled=True)


def _exponent(factors: Array) -> int:
    return int(np.frexp(max(float(factors.max()), -float(factors.min())))[1])


def _ldexp(array: Any, exponent: int) -> Any:
    with np.errstate(over="ignore", under="ignore"):
        return array_module(array).asarray(np.ldexp(array, exponent))  # for NumPy makes a scalar of no dimensions
