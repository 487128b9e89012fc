"""Numbers at the ends of the formats: huge, tiny, far apart; and the least and the most an option may be."""

import numpy as np
import pytest

import fastce
from cases import as_kind, make_logits, make_target
from fastce import _reference
from oracle import SLACK, Bounds, assert_matches_reference, assert_within, with_grad

pytestmark = pytest.mark.every_isa

KINDS = ["index", "prob"]


def check(logits, target, what="", **options):
    with_grad(logits, target, **options)
    assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, what, reduction="none", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_full_smoothing_forgets_the_target(problem, n_classes, dtype, kind):
    logits, y = problem
    target = as_kind(y, kind, n_classes, dtype)
    check(logits, target, label_smoothing=1)
    uniform = np.full(logits.shape, 1 / n_classes, dtype)
    loss, grad = with_grad(logits, target, label_smoothing=1)
    expected_loss, expected_grad = with_grad(logits, uniform)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(loss, expected_loss, rtol=8 * eps)
    np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=eps)


@pytest.mark.parametrize("n_classes", [2, 3, 40, 127, 300, 5000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_differences_that_overflow_unless_they_are_scaled(n_classes, dtype):
    """The largest logits of both signs, and a scale that makes 4 of the largest."""
    largest, scale = float(np.finfo(dtype).max), float(np.finfo(dtype).smallest_normal)
    target = np.array([0, n_classes // 2, n_classes - 1])
    logits = np.full((3, n_classes), -largest, dtype)
    logits[:, n_classes // 2] = 0
    logits[:, 0] = largest
    # Multiplied beforehand, which is exact: the scale is a power of two.
    x = logits.astype(np.longdouble) * scale
    rows = np.arange(3)
    log_probs = x - np.log(np.exp(x).sum(1, keepdims=True))
    probs = np.exp(log_probs)
    eps = 8 * float(np.finfo(dtype).eps)
    options = {"reduction": "none", "logit_scale": scale}
    # The scale is a factor of the gradient, too, and is taken out again.
    loss, grad = with_grad(logits, target, grad_output=np.full(3, 1 / scale), **options)
    np.testing.assert_allclose(loss, -log_probs[rows, target], rtol=eps)
    stats = fastce.cross_entropy_stats(logits, target, logit_scale=scale)
    np.testing.assert_allclose(stats.log_prob, log_probs[rows, target], rtol=eps)
    np.testing.assert_allclose(stats.entropy, -(probs * log_probs).sum(1), rtol=eps)
    probs[rows, target] -= 1
    np.testing.assert_allclose(grad, probs, rtol=2 * eps, atol=eps / n_classes)
    smooth = fastce.cross_entropy(logits, target, label_smoothing=0.1, **options)
    expected = -0.9 * log_probs[rows, target] - 0.1 * log_probs.mean(1)
    np.testing.assert_allclose(smooth, expected, rtol=eps)


@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_large_logits(problem, n_classes, dtype, kind, size):
    """Differences up to twice the size: at 3e38 they overflow in float32, and the loss with them."""
    logits, y = problem
    logits *= dtype(size / np.abs(logits).max())
    check(logits, as_kind(y, kind, n_classes, dtype))
    check(logits, as_kind(y, kind, n_classes, dtype), sample_weight=np.linspace(0.5, 1, len(y)), z_loss=1e-9)


def test_sums_of_large_logits_do_not_overflow(n_classes, dtype, order):
    """Smoothing adds C terms, in float32 of almost the largest number; their mean is finite."""
    largest = min(float(np.finfo(dtype).max) / 2, 1e300)
    logits = np.zeros((20, n_classes), dtype, order)
    target = np.arange(20) % n_classes
    logits[np.arange(20), target] = largest
    for smoothing in (0.1, 1.0):
        loss, grad = with_grad(logits, target, reduction="none", label_smoothing=smoothing)
        expected = smoothing * (1 - 1 / n_classes) * largest
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_between_rows(problem, n_classes, dtype, kind):
    """Every row is shifted by its own maximum: an offset of 1e8 costs the rows nothing but their input's rounding."""
    logits, y = problem
    logits += np.linspace(-1e8, 1e8, len(y)).astype(dtype)[:, None]
    check(logits, as_kind(y, kind, n_classes, dtype))


def subnormal(logits, dtype):
    """Return multiples of a subnormal number, of either sign, all below the least normal one."""
    logits = np.rint(logits * 50).astype(dtype) * (np.finfo(dtype).smallest_normal / 1024)
    assert np.abs(logits).max() < np.finfo(dtype).smallest_normal
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_subnormal_logits_are_as_good_as_equal(problem, n_classes, dtype, kind):
    logits, y = problem
    check(subnormal(logits, dtype), as_kind(y, kind, n_classes, dtype))


def test_subnormal_logits_are_not_flushed(problem, dtype):
    """Scaled up by a large factor they move the results by a hundredth."""
    logits, y = problem
    logits = subnormal(logits, dtype)
    options = {"logit_scale": float(1 / (128 * np.finfo(dtype).smallest_normal)), "reduction": "none"}
    expected = _reference.cross_entropy(logits, y, **options)
    bounds = Bounds(expected, logits, y, **options)
    loss, grad = with_grad(logits, y, **options)
    assert_within(loss, expected.loss, bounds.loss, "loss")
    assert_within(grad, expected.grad, bounds.grad, "grad")


def test_gradients_that_are_subnormal_are_not_flushed(dtype, order):
    smallest = np.finfo(dtype).smallest_subnormal
    lowest, highest = (85, 103) if dtype == np.float32 else (705, 744)
    for n_classes in (2, 10, 70):
        lead = np.linspace(lowest, highest, 20).astype(dtype)
        logits = np.zeros((20, n_classes), dtype, order)
        logits[:, 1] = lead
        loss, grad = with_grad(logits, np.ones(20, int), reduction="none")
        expected = (n_classes - 1) * np.exp(-np.float64(lead))
        # the promise of the accuracy tests, and the last places of each of the others
        atol = n_classes * smallest + (6 + lead) * np.finfo(dtype).eps * expected
        assert np.all(np.abs(loss - expected) <= atol)
        assert np.all(np.abs(-grad[:, 1] - expected) <= atol)
        assert loss[-1] > 0
        assert grad[-1, 1] < 0


def test_a_call_leaves_the_floating_point_environment_alone(dtype):
    logits = np.ones((2000, 100), dtype)
    fastce.cross_entropy_with_grad(logits, np.zeros(2000, int))
    tiny = np.full(64, np.finfo(dtype).smallest_subnormal)
    assert np.all(tiny * dtype(3) > tiny)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_scale": 2.0**-100},
        {"logit_scale": 2.0**100},  # a power of two, so that the definition rounds no product
        {"logit_scale": 1e-3, "softcap": 1e-3},
        {"softcap": 1e-3},  # every logit is capped
        {"softcap": 1e6},  # none is
        {"softcap": 1e30},
        {"softcap": 50.0, "logit_scale": 1e3},
        {"z_loss": 1e3},
        {"z_loss": 1e-30},
        {"label_smoothing": 1e-30},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_options(problem, n_classes, dtype, kind, options):
    logits, y = problem
    check(logits, as_kind(y, kind, n_classes, dtype), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_one_row(dtype, kind, rng):
    for n_classes in (1, 2, 17, 64, 65, 1000, 9000):
        for shape in [(1, n_classes), (n_classes,), (1, n_classes, 1)]:
            logits = make_logits(rng, shape, dtype)
            assert_matches_reference(fastce.cross_entropy_with_grad, logits, make_target(rng, kind, shape), str(shape))


@pytest.mark.parametrize(("softcap", "logit_scale"), [
    (1e30, 1e-30),  # float32's quotient is 0
    (1e20, 1e-20),  # and here subnormal
    (1e38, 1.0),
    (1e38, 1e-3),
    (1e10, 1e-30),
    (1.0, 1e-40),
])  # fmt: skip
def test_a_softcap_that_is_out_of_reach_caps_nothing(dtype, order, softcap, logit_scale, rng):
    """The bounds are those of logits about 1: scaled up here, so that what the scale leaves of them is."""
    for n_classes in (2, 10, 300, 3000):
        unit = rng.standard_normal((20, n_classes))
        logits = np.clip(unit / logit_scale, -3e38, 3e38).astype(dtype).copy(order=order)
        target = make_target(rng, "index", logits.shape)
        options = {"softcap": softcap, "logit_scale": logit_scale, "reduction": "none"}
        expected = _reference.cross_entropy(logits, target, **options)
        scaled = (logits.astype(np.float64) * logit_scale).astype(np.float64)
        bounds = Bounds(expected, scaled, target, reduction="none", eps=np.finfo(dtype).eps)
        for fill in (7, np.nan):
            out = np.full_like(logits, fill)
            loss, grad = fastce.cross_entropy_with_grad(logits, target, out=out, **options)
            assert_within(loss, expected.loss, bounds.loss, "loss")
            # Such gradients end at the least numbers, where each rounding is wrong by up to half of one, whatever is
            # rounded: the row's factor, its product with the exponential, and that with the softcap's slope.
            least = 1.5 * float(np.finfo(dtype).smallest_subnormal)
            assert_within(grad, expected.grad, bounds.grad * logit_scale + least, "grad")
        stats = fastce.cross_entropy_stats(logits, target, **options)
        assert_within(stats.lse, expected.stats.lse, bounds.lse, "lse")
        v = rng.standard_normal(logits.shape).astype(dtype)
        product = fastce.cross_entropy_hvp(logits, target, v, **options)
        expected_product = _reference.cross_entropy_hvp(logits, target, v, **options)
        size = np.abs(v).max() * logit_scale**2
        assert_within(product, expected_product, 4 * bounds.grad * size + least, "product")


@pytest.mark.parametrize("size", [1e20, 1e28, 1e30, 1e36, 3e38])
def test_products_with_large_vectors(dtype, order, size, rng):
    """Sums of exponentials times v overflow long before the product does, and so do differences of two v."""
    for n_classes in (2, 10, 300, 3000):
        logits = make_logits(rng, (20, n_classes), dtype).copy(order=order)
        target = make_target(rng, "index", logits.shape)
        v = rng.uniform(-1, 1, logits.shape)
        v[::2] /= 1e20  # rows next to each other, of very different sizes
        v = (v * size * (1 if dtype == np.float32 else 1e269)).astype(dtype)
        for options in ({}, {"reduction": "sum", "grad_output": 7.0}, {"softcap": 4.0}, {"logit_scale": 1e-3}):
            product = fastce.cross_entropy_hvp(logits, target, v, **options)
            expected = _reference.cross_entropy_hvp(logits, target, v.astype(np.longdouble) / 2**40, **options)
            expected = np.asarray(expected, np.float64)
            factor = np.abs(v).max(axis=1, keepdims=True).astype(np.float64) / 2**40
            scale = options.get("logit_scale", 1.0)
            # as oracle.assert_curvatures has it, for rows whose weights and targets are 1
            spread = 1 + np.log(n_classes) + options.get("softcap", 0.0)
            unit = SLACK * np.finfo(dtype).eps * (1 + np.sqrt(n_classes) / 8) * spread * 4
            bound = unit * factor * scale**2 * options.get("grad_output", 1 / len(v))
            largest = float(np.finfo(dtype).max) / 2**40
            fits = np.abs(expected) < 0.99 * largest
            error = np.abs(product.astype(np.longdouble) / 2**40 - expected)
            assert np.all((error <= bound)[fits]), (n_classes, options)
