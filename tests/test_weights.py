"""Weights of classes and rows: of any sign, of any size."""

import numpy as np
import pytest

import fastce
from cases import make_logits, make_target
from fastce import _reference
from oracle import arithmetic, assert_curvatures, assert_equal, assert_matches_reference, with_grad

pytestmark = pytest.mark.every_isa

KINDS = ["index", "prob"]
ROWS = 84  # the 64 that go together without options, a group of 16 and a remainder


def signed(rng, n):
    """Return factors of both signs, some of them 0, whose sum is not near 0: that would magnify all rounding."""
    values = rng.uniform(0.5, 2, n) * np.where(rng.random(n) < 0.3, -1, 1)
    values[n // 2 :: 7] = 0
    values[0] = 1 + abs(values[1:].sum())
    return values


OPTIONS = {
    "weights alone": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 4.0, "logit_scale": 1.7},
    "all": {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0, "logit_scale": 1.7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [1, 2, 10, 70, 2500])
def test_weights_of_any_sign_match_the_definition(rng, dtype, order, n_classes, kind, options):
    shape = (ROWS, n_classes)
    logits, target = make_logits(rng, shape, dtype).copy(order=order), make_target(rng, kind, shape)
    for names in (["weight"], ["sample_weight"], ["weight", "sample_weight"]):
        lengths = {"weight": n_classes, "sample_weight": ROWS}
        factors = {name: signed(rng, lengths[name]).astype(rng.choice([np.float32, np.float64])) for name in names}
        v = make_logits(rng, shape, dtype)
        for reduction in ("none", "mean", "sum"):
            given = {**factors, **options, "reduction": reduction}
            what = f"{names} {reduction}"
            assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, what, **given)
            if n_classes <= 70:
                assert_curvatures(logits, target, v, what, **given)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [2, 10, 70])
def test_negative_class_weights_match_torch(rng, dtype, n_classes, kind, label_smoothing, reduction):
    """In float64, from the same numbers. Sums of 84 rows: 64 eps of the largest number is far more than they differ."""
    torch = pytest.importorskip("torch")
    shape = (ROWS, n_classes)
    logits, target = make_logits(rng, shape, dtype), make_target(rng, kind, shape)
    weight = signed(rng, n_classes).astype(dtype)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    if kind == "index":
        target[::5] = 0
        options["ignore_index"] = 0 if n_classes > 2 else -100
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        x, torch.tensor(target), weight=torch.tensor(weight, dtype=torch.float64), **options
    )
    expected.sum().backward()
    loss, grad = with_grad(logits, target, weight=weight, **options)
    for actual, truth in ((loss, expected.detach().numpy()), (grad, x.grad.numpy())):
        np.testing.assert_allclose(actual, truth, rtol=0, atol=64 * np.finfo(dtype).eps * np.abs(truth).max())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_cancel_have_no_mean(rng, dtype, kind):
    logits, target = make_logits(rng, (4, 5), dtype), make_target(rng, kind, (4, 5))
    weight = [1.0, -1.0, 0.5, -0.5]
    for on_empty, expected in (("nan", np.nan), ("zero", 0.0)):
        loss, grad = with_grad(logits, target, sample_weight=weight, on_empty=on_empty)
        np.testing.assert_equal(float(loss), expected)
        assert not grad.any()
    loss, grad = with_grad(logits, target, sample_weight=weight, reduction="sum")
    assert loss != 0 and grad.any()
    if kind == "index":
        loss, grad = with_grad(logits, np.array([0, 1, 0, 1]), weight=[1, -1, 1, 1, 1], on_empty="zero")
        assert loss == 0 and not grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weight_zero_of_either_sign_are_skipped(rng, dtype, kind):
    logits, target = make_logits(rng, (6, 5), dtype), make_target(rng, kind, (6, 5))
    logits[[1, 4]] = np.nan
    weight = np.array([-1.0, 0.0, 2.0, 3.0, -0.0, -0.5])
    loss, grad, stats = fastce.cross_entropy_with_grad(logits, target, sample_weight=weight, return_stats=True)
    assert np.isfinite(loss) and np.isfinite(grad).all()
    assert not grad[[1, 4]].any()
    assert (stats.argmax[[1, 4]] == -1).all()
    kept = weight != 0
    expected = fastce.cross_entropy(logits[kept], target[kept], sample_weight=weight[kept])
    assert abs(loss - expected) <= 4 * np.finfo(dtype).eps * abs(expected)


def test_a_row_of_weight_minus_one_takes_back_a_row(rng, dtype):
    """Policy gradients: the gradient of a negative weight has the other sign, to the bit."""
    logits, target = make_logits(rng, (30, 9), dtype), make_target(rng, "index", (30, 9))
    weight = np.where(np.arange(30) % 3 == 0, -1.0, 1.0)
    plain = with_grad(logits, target, reduction="none", sample_weight=np.ones(30))
    for options in ({"sample_weight": weight}, {"sample_weight": weight.astype(np.float32)}):
        loss, grad = with_grad(logits, target, reduction="none", **options)
        assert_equal(loss, weight * plain[0])
        assert_equal(grad, weight[:, None] * plain[1])


# A mean does not know a common factor of its weights. Powers of two, so that the factor changes no digit; subnormal
# ones are of too few digits for anything but the same number everywhere.
FAR = [2.0**-1040, 2.0**-1000, 2.0**-600, 2.0**-140, 2.0**-90, 2.0**90, 2.0**600, 2.0**1020]


def close(actual, expected, dtype, slack=16):
    """Compare with what differs by roundings alone."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=slack * np.finfo(dtype).eps * np.max(np.abs(expected)))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("factor", FAR)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_knows_no_common_factor_of_the_rows(rng, dtype, kind, factor, options):
    """Whether the sum of the weights is subnormal, beyond all numbers or neither."""
    logits, target = make_logits(rng, (40, 7), dtype), make_target(rng, kind, (40, 7))
    weight = np.where(np.arange(40) % 3 == 0, -1.0, 1.0)
    expected = _reference.cross_entropy(logits, target, sample_weight=weight, z_loss=0.01, **options)
    loss, grad = with_grad(logits, target, sample_weight=factor * weight, z_loss=0.01, **options)
    close(loss, expected.loss, dtype)
    close(grad, expected.grad, dtype)
    hess = fastce.cross_entropy_grad_hess(logits, target, sample_weight=factor * weight, **options)[1]
    expected = _reference.cross_entropy_grad_hess(logits, target, sample_weight=weight, **options)[1]
    close(hess, expected, dtype)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("factor", FAR)
def test_a_mean_over_class_indices_knows_no_common_factor_of_the_classes(rng, dtype, factor, options):
    """In float32 most of these are 0, or are refused for being infinite."""
    logits, target = make_logits(rng, (40, 7), dtype), make_target(rng, "index", (40, 7))
    weight = np.array([1.0, 2.0, -0.5, 1.0, 0.0, 1.0, 4.0])
    given = factor * weight if factor > 2.0**-1030 else factor * np.ones(7)
    weight = given / factor
    if dtype == np.float32 and factor > 2.0**120:
        with pytest.raises(ValueError, match="weight must be finite in float32"):
            fastce.cross_entropy(logits, target, weight=given)
        return
    if factor > 2.0**1000:
        given = given / 8  # else a weight of 4 would be infinite
    expected = _reference.cross_entropy(logits, target, weight=weight, **options)
    loss, grad = with_grad(logits, target, weight=given, **options)
    close(loss, expected.loss, dtype)
    close(grad, expected.grad, dtype)
    for z_loss in (0.01 * factor, 0.0):
        if np.isfinite(100 * factor):  # of which the loss's scale is
            scaled = {"weight": weight, "z_loss": z_loss / factor, **options}
            expected = _reference.cross_entropy(logits, target, **scaled)
            loss, grad = with_grad(logits, target, weight=given, z_loss=z_loss, **options)
            close(loss, expected.loss, dtype)
            close(grad, expected.grad, dtype)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"z_loss": 0.01}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_product_of_both_weights_must_be_a_number(rng, dtype, kind, reduction, options):
    """Rows of 2^100, or 2^-100, and classes of the inverse: either alone is beyond float32, or beyond its digits."""
    logits, target = make_logits(rng, (40, 7), dtype), make_target(rng, kind, (40, 7))
    row, weight = np.where(np.arange(40) % 3 == 0, -1.0, 1.0), np.array([1.0, 2.0, -0.5, 1.0, 0.0, 1.0, 4.0])
    for factor in (2.0**100, 2.0**-100, 2.0**140):
        z_loss = options.get("z_loss", 0.0)
        expected = _reference.cross_entropy(
            logits, target, sample_weight=row, weight=weight, reduction=reduction, **{**options, "z_loss": z_loss}
        )
        loss, grad = with_grad(
            logits,
            target,
            sample_weight=row * factor,
            weight=weight / factor,
            reduction=reduction,
            **{**options, "z_loss": z_loss / factor},
        )
        close(loss, expected.loss, dtype)
        close(grad, expected.grad, dtype)


def test_rows_that_vanish_beside_another_are_kept(rng, dtype):
    """Their weight is not 0, so their statistics are known and their NaN counts."""
    logits = make_logits(rng, (3, 5), dtype)
    logits[1] = np.nan
    weight = np.array([1e300, 1e-300, 1.0])
    loss, _, stats = fastce.cross_entropy_with_grad(logits, [0, 1, 2], sample_weight=weight, return_stats=True)
    assert np.isnan(loss)
    assert_equal(stats.argmax[[0, 2]], logits[[0, 2]].argmax(axis=1))
    assert np.isnan(stats.lse[1])


def test_weights_too_far_apart_for_a_mean_are_refused(rng):
    """The products of the rows that count are subnormal, beside a class that does not occur: their digits are lost."""
    logits, out = make_logits(rng, (3, 2), np.float64), np.full((3, 2), 7.0)
    for function in (fastce.cross_entropy, lambda *a, **k: fastce.cross_entropy_with_grad(*a, out=out, **k)):
        for options in (
            {"weight": [1.0, 1e-315]},
            {"weight": [1e15, 1e-300], "sample_weight": [1e-15, 0, 1e-15]},
        ):
            with pytest.raises(ValueError, match=r"weight and sample_weight must .* got [1-9].*e-31[456]"):
                function(logits, [1, 1, 1], **options)
    assert (out == 7).all()
    assert np.isfinite(with_grad(logits, [1, 1, 1], weight=[1.0, 1e-160], sample_weight=[1e-155, 0.0, 1e-154])[0])


def test_a_weight_without_dimensions_may_be_far_from_1():
    """One row's, where NumPy makes scalars of arrays."""
    loss = fastce.cross_entropy(np.zeros(4), np.array(1), sample_weight=np.array(2**60), reduction="none")
    np.testing.assert_allclose(loss, 2**60 * np.log(4), rtol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_unaligned_weights_are_read_as_they_are(rng, dtype, kind):
    """At odd addresses, as in a packed record."""
    logits, target = make_logits(rng, (40, 7), dtype), make_target(rng, kind, (40, 7))
    arrays = {
        "target": target,
        "weight": signed(rng, 7).astype(dtype),
        "sample_weight": signed(rng, 40),
        "grad_output": rng.random(40),
    }
    moved = {}
    for name, array in arrays.items():
        memory = np.zeros(array.nbytes + 1, np.uint8)
        moved[name] = memory[1:].view(array.dtype).reshape(array.shape)
        moved[name][...] = array
        assert not moved[name].flags.aligned
    expected = with_grad(logits, reduction="none", **arrays)
    actual = with_grad(logits, reduction="none", **moved)
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other)
    assert actual[0].dtype == arithmetic(dtype)


@pytest.mark.parametrize("softcap", [None, 1000.0])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("n_classes", [2, 5, 200, 5000])
def test_the_gradient_of_the_only_class_with_a_target_keeps_its_digits(dtype, n_classes, order, softcap):
    """-w t (1 - p): the products w t of the other classes add up to nothing, not to what rounding left of the first.

    1 - p is the sum of the other terms, each within a few ulp.
    """
    logits = np.zeros((3, n_classes), dtype).copy(order=order)
    logits[:, 1] = 40
    target = np.zeros_like(logits)
    target[:, 1] = np.array([0.7, 0.3, 1.1])
    weight = np.full(n_classes, 0.3, dtype)
    grad = with_grad(logits, target, weight=weight, softcap=softcap, reduction="sum")[1]
    x = 40 if softcap is None else softcap * np.tanh(40 / softcap)
    slope = 1 if softcap is None else 1 - np.tanh(40 / softcap) ** 2
    others = (n_classes - 1) * np.exp(-x)
    expected = -slope * float(weight[1]) * target[:, 1].astype(float) * others / (1 + others)
    # An error of the capped logit, 2 ulp of 40, is one of exp(-x) as large.
    rtol = (16 if softcap is None else 16 + 4 * 40) * np.finfo(dtype).eps
    np.testing.assert_allclose(grad[:, 1].astype(float), expected, rtol=rtol)
