"""How far the results of random problems may be from those of the definition.

The bounds are those of oracle.py, with what random options need besides:

1. What errors are proportional to does not cancel where results do: a row's amount is the sum of |w_k q_k|, its cost
   that of |w_k q_k| n_k.
2. f(x) is off by eps times its size, which under a softcap is at most the cap; where the cap is larger than the logits
   it is they that count.
3. The divisor of a mean is a float64 sum, exact for weights that are multiples of 1/16. Others have one sign, and the
   sum is off by n eps of float64 at most: for float64 logits as well that is among the few eps which are granted.
4. What overflows in the arithmetic's type is infinite. What comes of an infinite log-sum-exp in a z-loss, or of a sum
   over rows one of which is too large for the type, has no bound.
"""

import numpy as np

from cases import finfo
from fastce import _reference
from oracle import SLACK, arithmetic, half_unit

_UNIT = 2 * SLACK  # options combine here


def hold(actual, expected, bound, what):
    """Raise an AssertionError unless numbers are within the bound; NaN and infinities are themselves.

    Where the bound is NaN anything goes.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    info = finfo(actual.dtype)
    with np.errstate(all="ignore"):
        wide = actual.astype(np.float64)
        # Below the least normal number the last places are cut off, once for each step.
        bound = bound + 4 * float(info.smallest_subnormal)
        good = (np.abs(wide - expected) <= bound) | np.isnan(bound)
        if good.all():
            return
        good |= (wide == expected) | (np.isnan(wide) & np.isnan(expected))
        largest = float(info.max) * (1 - float(info.eps))
        good |= (expected + bound > largest) & (wide == np.inf)
        good |= (expected - bound < -largest) & (wide == -np.inf)
    if not good.all():
        bad = np.argwhere(~good)
        where = tuple(bad[0].tolist())
        limit = float(np.broadcast_to(bound, good.shape)[where])
        raise AssertionError(
            f"{what}: {len(bad)} of {good.size} differ; at {where} got {float(wide[where])!r}, "
            f"expected {float(expected[where])!r}, within {limit:.3g}"
        )


def unit_of(dtype, n_classes):
    """Return what is meant by "a few eps".

    The roundings of additions one after the other, for each of 16 lanes in a block, are a random walk; but equal terms,
    which are not rare here, are rounded alike.
    """
    lengths = np.sqrt(n_classes) / 8 + min(n_classes, 4096) / 128
    return _UNIT * float(np.finfo(dtype).eps) * (1 + lengths)


class Bounds:
    """How far the results of a problem of the loss family may be from the definition."""

    @np.errstate(all="ignore")
    def __init__(self, logits, target, grad_output=None, dtype=None, **options):
        work = _reference._work(logits, target, grad_output=1.0 if grad_output is None else grad_output, **options)
        self.work, self.logits, self.options = work, logits, options
        soft, weighing, axis = work.rows.soft, work.rows.weighing, work.rows.axis
        n_classes = soft.p.shape[1]
        self.row_shape = _reference._row_shape(logits.shape, axis)
        self.dtype = arithmetic(logits.dtype if dtype is None else dtype)
        self.largest = float(np.finfo(self.dtype).max)
        self.eps = float(np.finfo(self.dtype).eps)
        self.unit = unit_of(self.dtype, n_classes)
        self.z = options.get("z_loss", 0.0)
        self.scale = options.get("logit_scale", 1.0)
        cap = options.get("softcap") or np.inf
        self.x = _reference._to_rows(logits, axis)
        magnitude = np.abs(self.x)
        size = self.scale * np.max(magnitude, axis=1, where=np.isfinite(magnitude), initial=0)
        self.size = np.minimum(size, cap)
        self.spread = 1 + np.log(max(1, n_classes)) + (0.0 if cap == np.inf else self.size)
        self.bends = 1 + 1 / cap
        self.lse = np.abs(soft.lse[:, 0])
        share = np.abs(weighing.share)
        self.amount = share.sum(axis=1)
        self.cost = _reference._times(share, soft.minus_log_p).sum(axis=1)
        # Infinite costs of either sign, for a negative probability: they may meet before they are mixed by smoothing.
        self.is_mixed = np.isinf(self.cost) & (weighing.prob < 0).any(axis=1)
        self.kept = weighing.kept
        self.row_weight = np.where(self.kept, np.abs(weighing.row_weight), 0.0)
        self.has_bound = ~self.kept | (self.z == 0) | ~(self.lse > self.largest)
        self.given_error = 0.0
        # The definition multiplies the logits before it takes their differences, and rounds the largest.
        self.logits_error = 0.0 * size if np.frexp(self.scale)[0] == 0.5 else 2.0**-53 * size
        self.has_bound &= ~self.kept | ~(self.logits_error > 1 / 8)
        # Sums over the classes are kept 2^16 times smaller, so that they do not overflow, and what is below the least
        # normal number then loses its last places.
        self.smallest = smallest = float(np.finfo(self.dtype).smallest_subnormal)
        weight = options.get("weight")
        self.heaviest = 1.0 if weight is None else 1 + float(np.max(np.abs(weight)))
        self.least = n_classes * self.heaviest * 2.0**17 * smallest
        self.least_factor = 4 * smallest * self.heaviest * max(1, self.scale)

    def _per_row(self, values):
        return np.broadcast_to(values, self.kept.shape).reshape(self.row_shape)

    def like_logits(self, values):
        """Return a number for each row, or each of their classes, in the shape of the logits."""
        values = np.broadcast_to(values, self.work.rows.soft.p.shape)
        return _reference._from_rows(values, self.logits, self.work.rows.axis)

    @np.errstate(all="ignore")
    def hold_loss(self, actual, expected, what):
        """Hold the loss."""
        assert actual.dtype == self.dtype, f"{what}: {actual.dtype}"
        z_part = 0.0 if self.z == 0 else self.z * (self.lse**2 + self.lse * (self.size + self.spread))
        bound = self.unit * self.row_weight * (self.cost + self.amount * self.spread + z_part)
        bound = bound + self.row_weight * self.least
        steep = self.amount + (0.0 if self.z == 0 else self.z * (self.lse + 1))
        bound = bound + 2 * self.row_weight * steep * self.logits_error
        bound = np.where(self.kept, np.where(self.has_bound, bound, np.nan), 0.0)
        reduction = self.options.get("reduction", "mean")
        bound = np.where(self.is_mixed, np.nan, bound)
        if reduction == "none":
            hold(actual, expected, self._per_row(bound), what)
            return
        losses = self.row_weight * (self.cost + (0.0 if self.z == 0 else self.z * self.lse**2))
        is_too_large = np.isfinite(self.cost) & ~(losses <= self.largest)
        if is_too_large.any() or not self.has_bound.all() or self.is_mixed.any():
            return
        total = np.sum(bound, where=np.isfinite(bound))
        if reduction == "mean":
            total = total / abs(self.work.rows.weighing.normalizer or 1.0)
        hold(actual, expected, total, what)

    def add_error_of_logits(self, error):
        """Let every logit of a row be off by that much; by more than 1/8 leaves the row without a bound."""
        self.given_error = error
        self.logits_error = self.logits_error + self.scale * error
        self.has_bound &= ~self.kept | ~(self.logits_error > 1 / 8)

    def grad_bound(self, least_lse=0.0):
        """Return a column. What a z-loss bends does not vanish with lse: then that is at least 1.

        A row whose factors' product is no number of the type has no bound. Factors below the least normal number lose
        their last places before they are multiplied by class weights and slopes.
        """
        counts = self.work.counts[:, 0]
        z_part = 0.0 if self.z == 0 else 2 * self.z * (self.lse + least_lse + self.size)
        factor = np.abs(self.work.factor[:, 0])
        bound = self.unit * factor * (self.amount + z_part) * self.spread * self.scale
        # By the second derivatives; see `hold_product` for what they are at most.
        bends = 4 * self.bends * (self.amount + (0.0 if self.z == 0 else 2 * self.z * (self.lse + 1)))
        bound = bound + factor * self.scale * bends * self.logits_error
        bound = bound + self.least_factor
        most = factor * self.scale * np.maximum(self.heaviest, self.amount + z_part)
        has_bound = self.has_bound & (bound < self.unit * self.largest) & (most < self.largest)
        return np.where(counts, np.where(has_bound, bound, np.nan), 0.0)[:, None]

    def _hold_second(self, actual, expected, size, what):
        """Hold second derivatives, times a vector of such a size: another slope of f, or its bend.

        A row where their product is no number of the type has no bound.
        """
        steep = 4 * self.scale * self.bends
        bound = steep * size * self.grad_bound(least_lse=1.0) + size * self.least_factor
        bound = np.where(self.scale * steep < self.largest, bound, np.nan)
        self._hold_matrix(actual, expected, np.where(bound < self.unit * self.largest, bound, np.nan), what)

    def _hold_matrix(self, actual, expected, bound, what):
        assert actual.dtype == self.logits.dtype, f"{what}: {actual.dtype}"
        # The last rounding, of the least values of some diagonals too.
        bound = self.like_logits(bound) + half_unit(expected, actual.dtype) + self.eps * np.abs(expected)
        hold(actual, expected, bound, what)

    @np.errstate(all="ignore")
    def hold_grad(self, actual, expected, what):
        """Hold the gradient."""
        self._hold_matrix(actual, expected, self.grad_bound(), what)

    @np.errstate(all="ignore")
    def hold_product(self, actual, expected, v, what):
        """Hold the product of the Hessian and v, whose products with probabilities may be subnormal."""
        size = np.max(np.abs(_reference._to_rows(v, self.work.rows.axis)), axis=1, keepdims=True, initial=0)
        size = size + 4 * self.smallest / self.unit
        self._hold_second(actual, expected, size, what)

    @np.errstate(all="ignore")
    def hold_diagonal(self, actual, expected, curvature):
        """Hold a diagonal of curvature."""
        if curvature == "absolute":
            self._hold_matrix(actual, expected, self.grad_bound(), curvature)
            return
        self._hold_second(actual, expected, 1.0, curvature)

    @np.errstate(all="ignore")
    def hold_stats(self, actual, expected, what):
        """Hold the statistics."""
        soft, prob = self.work.rows.soft, np.abs(self.work.rows.weighing.prob)
        cost = _reference._times(prob, soft.minus_log_p).sum(axis=1)
        mass = prob.sum(axis=1)
        has_none = self.kept & np.isnan(soft.nan[:, 0])
        bounds = {
            "lse": self.unit * (self.lse + self.size + self.spread) + self.logits_error,
            "log_prob": self.unit * (cost + mass * self.spread) + self.least + 2 * mass * self.logits_error,
            "entropy": self.unit * self.spread + self.least + 2 * self.spread * self.logits_error,
        }
        for name, bound in bounds.items():
            values = getattr(actual, name)
            assert values.dtype == self.dtype, f"{what} {name}: {values.dtype}"
            # A row without a softmax has no promise but that none of it is finite.
            wanted = np.where(self._per_row(has_none) & ~np.isfinite(values), values, getattr(expected, name))
            hold(values, wanted, self._per_row(bound), f"{what} {name}")
        assert actual.argmax.dtype == np.int64, f"{what} argmax"
        assert actual.argmax.shape == self.row_shape, f"{what} argmax"
        self._hold_argmax(actual.argmax.reshape(-1), what)

    def _hold_argmax(self, argmax, what):
        x, slack = self.x, 2 * self.given_error
        is_exact = np.ndim(slack) == 0
        cap = self.options.get("softcap")
        if cap is not None:
            # Logits that the cap rounds to the same number are equals.
            is_exact = False
            x, slack = np.tanh(self.scale * x / cap), 4 * self.eps + slack * self.scale / cap
        top = x.max(axis=1, initial=-np.inf)
        chosen = np.take_along_axis(x, np.maximum(argmax, 0)[:, None], axis=1)[:, 0] if x.size else top
        good = (argmax >= 0) & (argmax < max(1, x.shape[1])) & (chosen >= top - slack)
        if is_exact and x.size:
            good &= argmax == x.argmax(axis=1)
        # A row without a softmax has no most probable class, but may have a largest logit.
        good |= np.isnan(self.work.rows.soft.nan[:, 0]) & (argmax >= -1) & (argmax < x.shape[1])
        good = np.where(self.kept, good, argmax == -1)
        assert good.all(), f"{what} argmax: row {int(good.argmin())} got {int(argmax[good.argmin()])}"
