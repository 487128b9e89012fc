"""The gradient is the loss's derivative, and has the algebra that follows from it."""

import numpy as np
import pytest

import fastce
from cases import OPTION_SETS, make_logits, make_target, options_for, row_shape
from oracle import assert_within

pytestmark = pytest.mark.every_isa(by_default=True)

KINDS = ["index", "prob"]
STEP = 1e-3  # of the differences: their error is about STEP^4 and eps / STEP, both below 1e-11


def differences(loss, x):
    """Return the derivative of `loss` at x by central differences of fourth order."""
    derivative = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        values = []
        for shift in (-2, -1, 1, 2):
            moved = x.copy(order="K")
            moved[i] += shift * STEP
            values.append(loss(moved))
        derivative[i] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * STEP)
    return derivative


@pytest.mark.parametrize("names", OPTION_SETS.values(), ids=OPTION_SETS.keys())
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_finite_differences(kind, order, names, rng):
    for shape in [(6,), (17, 3), (2, 70), (2, 4, 3)]:
        for reduction in ("none", "mean", "sum"):
            logits = make_logits(rng, shape, np.float64, spread=2).copy(order=order)
            target = make_target(rng, kind, shape)
            options = {"reduction": reduction, **options_for(rng, names, kind, shape)}
            if np.isnan(fastce.cross_entropy(logits, target, **options)).any():
                continue  # the one row of one-dimensional logits is skipped
            grad_output = rng.standard_normal(row_shape(shape) if reduction == "none" else ())

            def loss(x, target=target, options=options, grad_output=grad_output):
                return np.sum(grad_output * fastce.cross_entropy(x, target, **options))

            grad = fastce.cross_entropy_with_grad(logits, target, grad_output=grad_output, **options)[1]
            assert_within(grad, differences(loss, logits), 1e-9, f"{shape} {reduction}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_rows_of_targets_that_sum_to_one_add_to_zero(dtype, kind, rng):
    for shape in [(50, 2), (50, 10), (20, 65), (3, 9000)]:
        for smoothing in (0.0, 0.3):
            logits = make_logits(rng, shape, dtype)
            target = make_target(rng, kind, shape)
            grad = fastce.cross_entropy_with_grad(logits, target, label_smoothing=smoothing, reduction="sum")[1]
            total = grad.sum(axis=1, dtype=np.float64)
            # every number is off by a few eps of itself, and by the target's own rounding
            assert_within(total, np.zeros(shape[0]), 8 * np.finfo(dtype).eps, f"{shape} {smoothing}")


def test_gradient_vanishes_where_the_target_is_the_softmax(dtype, rng):
    for shape in [(50, 2), (50, 10), (20, 65), (3, 9000)]:
        logits = make_logits(rng, shape, dtype)
        target = fastce.softmax(logits)
        grad = fastce.cross_entropy_with_grad(logits, target, reduction="sum")[1]
        # p A - q, with A off by the rounding of C probabilities and p by a few eps
        assert np.all(np.abs(grad) <= 8 * np.finfo(dtype).eps * target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_grad_output_multiplies_the_gradient(dtype, kind, reduction, rng):
    """Powers of two, so that the product is exact and the bits must be the same."""
    for shape in [(9,), (40, 10), (5, 70), (3, 20, 4)]:
        logits = make_logits(rng, shape, dtype)
        target = make_target(rng, kind, shape)
        rows = row_shape(shape)
        factor = 2.0 ** rng.integers(-3, 4, rows) if reduction == "none" else np.float32(-4)
        plain = fastce.cross_entropy_with_grad(logits, target, reduction=reduction)
        scaled = fastce.cross_entropy_with_grad(logits, target, reduction=reduction, grad_output=factor)
        assert np.array_equal(scaled[0], plain[0])
        by_class = np.expand_dims(factor, 0 if len(shape) == 1 else 1) if reduction == "none" else factor
        assert np.array_equal(scaled[1], plain[1] * by_class.astype(dtype))


def test_accumulated_batches_equal_the_whole(dtype, rng):
    """With reduction="sum" and grad_output=1/total, micro-batches add up to the mean over all."""
    logits = make_logits(rng, (60, 10), dtype)
    target = rng.integers(0, 10, 60)
    target[::7] = -100
    total = np.sum(target != -100)
    expected_loss, expected_grad = fastce.cross_entropy_with_grad(logits, target)
    loss = 0.0
    for batch in (slice(0, 13), slice(13, 45), slice(45, 60)):
        part, grad = fastce.cross_entropy_with_grad(
            logits[batch], target[batch], reduction="sum", grad_output=1 / total
        )
        loss += part / total
        np.testing.assert_allclose(grad, expected_grad[batch], rtol=2 * np.finfo(dtype).eps)
    np.testing.assert_allclose(loss, expected_loss, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_nll_loss_of_log_softmax_is_cross_entropy(dtype, kind, rng):
    """The definition, confident rows included: log p of the largest is exact to the last places."""
    eps = np.finfo(dtype).eps
    for shape in [(9,), (40, 10), (5, 700), (3, 20, 4)]:
        axis = 0 if len(shape) == 1 else 1
        for spread in (3, 20):
            logits = make_logits(rng, shape, dtype, spread=spread)
            target = make_target(rng, kind, shape)
            for names in ((), ("weight", "sample_weight", "ignore_index")):
                for reduction in ("none", "mean", "sum"):
                    options = {"reduction": reduction, **options_for(rng, names, kind, shape)}
                    expected = fastce.cross_entropy(logits, target, **options)
                    actual = fastce.nll_loss(fastce.log_softmax(logits, axis=axis), target, **options)
                    np.testing.assert_allclose(actual, expected, rtol=8 * eps, atol=0)


def test_confident_rows_keep_their_gradient(dtype):
    """A lead of 40 leaves p_y - 1 = -4e-18, which a subtraction from 1 returns as 0 in either type."""
    for n_classes in (2, 10, 70, 5000):
        for order in "CF":
            for kind in KINDS:
                logits = np.zeros((20, n_classes), dtype, order)
                target = np.arange(20) % n_classes
                logits[np.arange(20), target] = 40
                others = (n_classes - 1) * np.exp(-40.0)
                if kind == "prob":
                    target = np.eye(n_classes, dtype=dtype)[target]
                loss, grad = fastce.cross_entropy_with_grad(logits, target, reduction="none")
                chosen = grad[np.arange(20), np.arange(20) % n_classes]
                rtol = 41 * np.finfo(dtype).eps
                np.testing.assert_allclose(loss, np.log1p(others), rtol=rtol)
                np.testing.assert_allclose(chosen, -others / (1 + others), rtol=rtol)
