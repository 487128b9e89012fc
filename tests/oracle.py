"""Results held against expected ones, with tolerances that follow from the arithmetic.

A kernel rounds its inputs' differences, exponentials and sums a few times each. With eps the spacing at 1, A a row's
weight times its target's weights, without signs, and spread = 1 + log C + softcap, the error is at most a few eps times

    loss:      the loss itself + A spread + z (lse^2 + |lse| size)
    gradient:  (A + 2 z (|lse| + size)) spread, times the row's upstream factor

where `size` bounds the logits: lse is no better than the largest of them. A few are more for longer rows: the
roundings of C additions one after the other are a random walk. All is the row's own: a row of small weight does not
hide behind a large one. For logits of 16 bits eps is float32's, and rounding the gradient adds half a unit in its last
place. What the tests of accuracy promise is far stricter, and only for plain calls.
"""

import functools

import numpy as np

import fastce
from cases import class_axis, finfo
from definition import remember
from fastce import _reference
from fastce._curvature import CURVATURES

SLACK = 4  # "a few", for rows of few classes


def arithmetic(dtype):
    """Return the dtype that losses of logits of the given one have."""
    return np.float64 if dtype == np.float64 else np.float32


def half_unit(values, dtype):
    """Return half the distance between numbers of 16 bits around `values`; 0 for other types, whose bounds have it."""
    if np.dtype(dtype).itemsize != 2:
        return 0.0
    info = finfo(dtype)
    exponent = np.frexp(np.abs(values))[1]
    return np.maximum(np.ldexp(float(info.eps), exponent - 1), float(info.smallest_subnormal)) / 2


def _size(values):
    """Return magnitudes, 0 for those that must be met exactly."""
    return np.where(np.isfinite(values), np.abs(values), 0.0)


class Bounds:
    """How far from the expected results a problem's results may be."""

    @np.errstate(over="ignore", invalid="ignore")  # rows of infinities have no bound, and need none
    def __init__(self, expected, logits, target, grad_output=1.0, eps=None, **options):
        eps = np.finfo(arithmetic(logits.dtype)).eps if eps is None else eps
        axis = class_axis(logits.shape, options.get("axis"))
        rows = np.shape(expected.stats.lse)
        target = np.asarray(target)
        z = options.get("z_loss", 0.0)
        scale = options.get("logit_scale", 1.0)
        size = scale * np.max(np.abs(logits), axis=axis, where=np.isfinite(logits), initial=0).astype(np.float64)
        lse = np.abs(expected.stats.lse)
        mass = 1.0 if target.dtype.kind in "iu" else np.maximum(1, np.abs(target).sum(axis=axis, dtype=np.float64))
        row_weight = options.get("sample_weight")
        row_weight = np.ones(rows) if row_weight is None else np.asarray(row_weight, np.float64)
        normalizer = self._normalizer(target, row_weight, options)
        # Weights of both signs may nearly cancel, which magnifies the rounding of their sum.
        rounding = SLACK * np.finfo(np.float64).eps * self._normalizer(target, row_weight, options, np.abs) / normalizer
        row_weight = np.abs(row_weight)
        weight = options.get("weight")
        amount = mass * row_weight * (1.0 if weight is None else np.max(np.abs(weight), initial=0))
        n_classes = logits.shape[axis]
        spread = 1 + np.log(n_classes) + (options.get("softcap") or 0.0)

        plain = {**options, "reduction": "none"}
        row_loss = np.abs(_reference.cross_entropy(logits, target, **plain).loss)
        loss = row_loss + amount * spread + row_weight * z * (lse**2 + lse * size)
        grad = (amount + 2 * row_weight * z * (lse + size)) * spread * scale * np.abs(grad_output)

        unit = SLACK * eps * (1 + np.sqrt(n_classes) / 8)
        reduction = options.get("reduction", "mean")
        self.grad = unit * np.expand_dims(grad, axis)
        self.loss = unit * loss
        if reduction != "none":
            if reduction == "sum":
                normalizer, rounding = 1.0, 0.0
            self.loss = np.sum(self.loss[np.isfinite(self.loss)]) / normalizer + rounding * _size(expected.loss)
            if np.any(np.isfinite(row_loss) & (row_loss > np.finfo(arithmetic(logits.dtype)).max)):
                self.loss = np.inf  # a row that the type cannot hold makes the sum infinite
            self.grad = self.grad / normalizer + rounding * _size(expected.grad)
        self.lse = unit * (lse + size + spread)
        self.log_prob = unit * (np.abs(expected.stats.log_prob) + mass * spread)
        self.entropy = unit * spread * (1 + lse * 0)

    @staticmethod
    def _normalizer(target, row_weight, options, part=lambda x: x):
        total = row_weight
        if target.dtype.kind in "iu":
            kept = target != options.get("ignore_index", -100)
            weight = options.get("weight")
            total = row_weight[kept] * (1.0 if weight is None else np.asarray(weight)[target[kept]])
        return max(abs(np.sum(part(total))), np.finfo(np.float64).tiny)


def assert_equal(actual, expected, err_msg=""):
    """Do what `np.testing.assert_array_equal` does, in a fraction of the time where arrays are equal."""
    if not (np.array_equal(actual, expected) or _have_equal_bits(actual, expected)):
        np.testing.assert_array_equal(actual, expected, err_msg)


def _have_equal_bits(a, b):
    """Return True if two arrays are known to be equal, NaN included; False says nothing."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape):
        return False
    return a.tobytes() == b.tobytes()


@functools.cache
def _largest(dtype):
    return float(finfo(dtype).max)


def assert_within(actual, expected, bound, what):
    """Compare numbers, NaN and infinities included; what the actual type cannot hold is expected as infinite."""
    actual = np.asarray(actual)
    largest = _largest(actual.dtype)
    actual, expected = actual.astype(np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, what
    with np.errstate(invalid="ignore"):
        if np.all(np.abs(actual - expected) <= bound) and np.all(np.abs(expected) <= largest):
            return  # as nearly always, and soon
        expected = np.where(np.abs(expected) > largest, np.copysign(np.inf, expected), expected)
        bad = ~(np.abs(actual - expected) <= bound)
    bad &= ~((actual == expected) | (np.isnan(actual) & np.isnan(expected)))
    if bad.any():
        where = tuple(int(i[0]) for i in np.nonzero(bad)) if bad.ndim else ()
        limit = float(np.broadcast_to(bound, bad.shape)[where])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.size} differ; at {where} got {actual[where]!r}, "
            f"expected {expected[where]!r}, within {limit:.3g}"
        )


@remember
def truth(logits, target, **options):
    """Return what the definition says of a problem, and how far from that results may be."""
    expected = _reference.cross_entropy(logits, target, **options)
    return expected, Bounds(expected, logits, target, **options)


@remember
def curvature_truth(logits, target, v, curvatures, **options):
    """Return the gradient, the product with the Hessian and the diagonals; and how far off a gradient may be."""
    expected = _reference.cross_entropy(logits, target, **options)
    product = _reference.cross_entropy_hvp(logits, target, v, **options)
    diagonals = [_reference.cross_entropy_grad_hess(logits, target, curvature=c, **options)[1] for c in curvatures]
    # z_loss bends by 2 z p p^T, however small lse is
    stats = expected.stats._replace(lse=np.abs(expected.stats.lse) + 1)
    bound = Bounds(expected._replace(stats=stats), logits, target, **options).grad
    return expected.grad, product, tuple(diagonals), bound


def assert_stats(stats, expected, bounds, logits, what, **options):
    for name in ("lse", "log_prob", "entropy"):
        assert_within(getattr(stats, name), getattr(expected, name), getattr(bounds, name), f"{what} {name}")
    axis = class_axis(logits.shape, options.get("axis"))
    chosen = np.maximum(stats.argmax, 0)
    assert np.array_equal(stats.argmax < 0, expected.argmax < 0), what
    if options.get("softcap") is None:
        kept = expected.argmax >= 0
        assert np.array_equal(stats.argmax[kept], expected.argmax[kept]), what
    else:
        # Logits that the cap rounds to the same number are equals.
        capped = np.tanh(np.float64(logits) * options.get("logit_scale", 1.0) / options["softcap"])
        taken = np.take_along_axis(capped, np.expand_dims(chosen, axis), axis).squeeze(axis)
        kept = stats.argmax >= 0
        assert np.all((taken >= capped.max(axis=axis) - SLACK * np.finfo(arithmetic(logits.dtype)).eps)[kept]), what


def assert_matches_reference(function, logits, target, what="", **options):
    """Hold what a `cross_entropy_with_grad` says against the definition: with statistics and, a leaner way, without."""
    expected, bounds = truth(logits, target, **options)
    *with_stats, stats = function(logits, target, return_stats=True, **options)
    for loss, grad in (with_stats, function(logits, target, **options)):
        assert grad.dtype == logits.dtype and grad.shape == logits.shape, what
        assert_within(loss, expected.loss, bounds.loss, f"{what} loss")
        assert_within(grad, expected.grad, bounds.grad + half_unit(expected.grad, grad.dtype), f"{what} grad")
    options.pop("grad_output", None)
    assert_stats(stats, expected.stats, bounds, logits, what, **options)
    return expected, bounds


def with_grad(logits, target, **options):
    """Return loss and gradient, after a check that working in place makes no difference."""
    loss, grad = fastce.cross_entropy_with_grad(logits, target, **options)
    logits = logits.copy(order="K")
    in_place = fastce.cross_entropy_with_grad(logits, target, out=logits, **options)
    assert_equal(in_place[0], loss)
    assert_equal(logits, grad)
    return loss, grad


def assert_curvatures(logits, target, v, what="", curvatures=tuple(CURVATURES), **options):
    """Hold the product with the Hessian and the diagonals against the definition."""
    grad, product, diagonals, bound = curvature_truth(logits, target, v, curvatures, **options)
    axis = class_axis(logits.shape, options.get("axis"))
    size = np.max(np.abs(v), axis=axis, keepdims=True, initial=0).astype(np.float64)
    steep = 4 * options.get("logit_scale", 1.0) * (1 + 1 / (options.get("softcap") or np.inf))

    def hold(actual, expected, bound, name):
        assert actual.dtype == logits.dtype and actual.shape == logits.shape, what
        assert_within(actual, expected, bound + half_unit(expected, actual.dtype), f"{what} {name}")

    with np.errstate(invalid="ignore"):
        hold(fastce.cross_entropy_hvp(logits, target, v, **options), product, bound * steep * size, "product")
    for name, diagonal in zip(curvatures, diagonals, strict=True):
        actual_grad, hess = fastce.cross_entropy_grad_hess(logits, target, curvature=name, **options)
        hold(actual_grad, grad, bound, "grad")
        hold(hess, diagonal, bound * steep, name)
