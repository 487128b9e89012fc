"""Arrays that go with the logits: of any type, strides and address, in any combination, against the definition."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose

import fastce
from cases import LAYOUTS, class_axis, finfo, make_logits, make_target, row_shape
from fastce import _reference
from oracle import Bounds, arithmetic, assert_curvatures, assert_matches_reference, assert_within

REALS = ["f2", "f4", "f8", "g", ">f4", ">f8", "i1", "u1", "i4", ">i4", "u8", ml_dtypes.bfloat16]
INTEGERS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "longlong", ">i2", ">i8", ">u8"]
# For numbers of any type: `LAYOUTS` puts -7 or NaN between them.
WAYS = {
    "C": LAYOUTS["C"],
    "reversed": LAYOUTS["reversed"],
    "every other": lambda x: np.repeat(x, 2, axis=0)[::2],
    "unaligned": LAYOUTS["unaligned"],
}
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0, "logit_scale": 1.7}


@pytest.mark.parametrize("layout", WAYS)
@pytest.mark.parametrize("name", INTEGERS)
def test_targets_of_any_integers(rng, dtype, name, layout):
    """Negative ones are ignored, where there are such."""
    logits, target = make_logits(rng, (32, 10), dtype), make_target(rng, "index", (32, 10))
    if np.dtype(name).kind == "i":
        target[3:7] = -1
    given = WAYS[layout](target.astype(name))
    assert_matches_reference(fastce.cross_entropy_with_grad, logits, given, ignore_index=-1)
    given[5] = 10
    with pytest.raises(IndexError, match=r"target\[5\] is 10"):
        fastce.cross_entropy(logits, given, ignore_index=-1)


@pytest.mark.parametrize("layout", WAYS)
@pytest.mark.parametrize("kind", REALS, ids=str)
def test_factors_of_any_real_numbers(rng, dtype, kind, layout):
    logits, target = make_logits(rng, (40, 7), dtype), make_target(rng, "index", (40, 7))
    n = {"weight": 7, "sample_weight": 40, "grad_output": 40}
    factors = {name: WAYS[layout](rng.integers(1, 4, n[name]).astype(kind)) for name in n}
    assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, reduction="none", **factors)
    loss, grad = fastce.cross_entropy_with_grad(logits, target, grad_output=np.asarray(3).astype(kind))
    expected = _reference.cross_entropy(logits, target, grad_output=3)
    bounds = Bounds(expected, logits, target, grad_output=3)
    assert_within(loss, expected.loss, bounds.loss, "loss")
    assert_within(grad, expected.grad, bounds.grad, "gradient")


@pytest.mark.parametrize("layout", WAYS)
@pytest.mark.parametrize("kind", REALS, ids=str)
def test_vectors_and_probabilities_of_any_real_numbers(rng, dtype, kind, layout):
    logits, v = make_logits(rng, (40, 7), dtype), rng.integers(1, 4, (40, 7)).astype(kind)
    prob = make_target(rng, "prob", (40, 7))
    if v.dtype.kind not in "iu":
        prob = WAYS[layout](prob.astype(kind))
        assert_matches_reference(fastce.cross_entropy_with_grad, logits, prob)
    assert_curvatures(logits, prob, WAYS[layout](v), curvatures=["exact"])


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((32, 10), 1),
        ((10, 32), 0),
        ((130, 5), -2),
        ((2, 3, 4, 5), None),
        ((2, 3, 4, 5), 2),
        ((1, 21, 30, 40), 1),
        ((4, 8, 10), -1),
        ((3, 2, 150), 2),
        ((1, 1, 6, 1), -2),
        ((2,) * 9, 8),
        ((7,), None),
    ],
)
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_any_axis_of_arrays_of_different_layouts(rng, dtype, kind, shape, axis):
    """Logits, target, result and the rest each with strides of its own."""
    rows, n_classes = row_shape(shape, axis), shape[class_axis(shape, axis)]
    names = ("C", "F", "reversed", "step", "padded", "swapped", "unaligned")
    for of_logits, of_others in itertools.product(names, ("C", "F", "step", "unaligned")):
        logits = LAYOUTS[of_logits](make_logits(rng, shape, dtype))
        target = LAYOUTS[of_others](make_target(rng, kind, shape, axis))
        options = {
            "weight": LAYOUTS["step"](rng.uniform(0.5, 2, n_classes)),
            "sample_weight": LAYOUTS[of_others](rng.uniform(0.5, 2, rows).astype(dtype)),
            "grad_output": LAYOUTS[of_logits](rng.uniform(0.5, 2, rows)),
            "reduction": "none",
            "axis": axis,
            **OPTIONS,
        }
        what = f"{of_logits} {of_others}"
        expected, bounds = assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, what, **options)
        for out in (LAYOUTS[of_others](np.zeros(shape, dtype)), logits.copy(order="K"), logits):
            in_place = out if out.strides == logits.strides else logits
            if in_place is out:
                out[...] = logits
            grad = fastce.cross_entropy_with_grad(in_place, target, out=out, **options)[1]
            assert grad is out
            assert_within(grad, expected.grad, bounds.grad, f"{what}, out")


def test_a_new_gradient_has_the_memory_order_of_the_logits(rng, dtype):
    x = rng.standard_normal((4, 5, 6)).astype(dtype)
    for logits in (x, np.asfortranarray(x), x.transpose(1, 2, 0), x[:, ::2], x[::-1]):
        target = make_target(rng, "index", logits.shape)
        grad, hess = fastce.cross_entropy_grad_hess(logits, target)
        for array in (grad, hess, fastce.cross_entropy_with_grad(logits, target)[1]):
            assert array.strides == np.empty_like(logits).strides
            assert array.base is None


def test_options_of_other_types_mean_their_numbers(rng, dtype):
    logits, target = make_logits(rng, (32, 10), dtype), make_target(rng, "index", (32, 10))
    given = {
        "axis": np.int64(-1),
        "ignore_index": np.uint8(3),
        "label_smoothing": np.float32(0.25),
        "logit_scale": np.array(0.5),
        "softcap": 5,
        "z_loss": np.float16(0.5),
        "n_threads": np.int8(1),
        "grad_output": np.float32(-2.5),
    }
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in given.items()}
    expected = _reference.cross_entropy(
        logits, target, **{name: value for name, value in plain.items() if name != "n_threads"}
    )
    bounds = Bounds(expected, logits, target, **{name: v for name, v in plain.items() if name != "n_threads"})
    loss, grad = fastce.cross_entropy_with_grad(logits, target, **given)
    assert_within(loss, expected.loss, bounds.loss, "loss")
    assert_within(grad, expected.grad, bounds.grad, "gradient")


@pytest.mark.parametrize("n_threads", [1, 2**31, 2**63, 2**70])
def test_any_number_of_threads_is_a_limit(rng, dtype, n_threads):
    logits, target = make_logits(rng, (32, 10), dtype), make_target(rng, "index", (32, 10))
    assert fastce.cross_entropy(logits, target, n_threads=n_threads) == fastce.cross_entropy(logits, target)


@pytest.mark.every_isa(by_default=True)
@pytest.mark.parametrize("layout", ["C", "step", "reversed", "unaligned"])
@pytest.mark.parametrize("block", [512, 1024, 2048, 4096])
def test_copies_of_long_rows_keep_each_block(block, layout, dtype, rng):
    """A row is copied block by block, and its last block, up to 63 classes longer, must leave the one before alone."""
    for n_classes in (n * block + rest for n in (2, 3, 4, 5) for rest in (0, 1, 30, 63, 64)):
        x = np.zeros((4, n_classes), dtype)
        # The largest logit at the beginning of a block, and the second largest at the end of the row.
        for row, k in enumerate((0, block + 5, (n_classes // block - 1) * block + 5, n_classes - 70)):
            x[row, k], x[row, -5] = 20, 18
        target = rng.integers(n_classes, size=len(x))
        logits = LAYOUTS[layout](x)
        wide = x.astype(np.float64)
        lse = 20 + np.log(np.exp(wide - 20).sum(axis=1))
        expected = lse - wide[range(len(x)), target]
        per_row = {"reduction": "none"}
        few = {"rtol": 100 * np.finfo(arithmetic(dtype)).eps, "atol": 1e-7}
        rounded = {"rtol": max(few["rtol"], float(finfo(dtype).eps)), "atol": 1e-7}
        assert_allclose(fastce.cross_entropy(logits, target, **per_row), expected, **few)
        assert_allclose(fastce.cross_entropy_stats(logits, target).lse, lse, **few)
        assert_allclose(fastce.logsumexp(logits, axis=1).astype(np.float64), lse, **rounded)
        smooth = fastce.cross_entropy(logits, target, label_smoothing=0.1, **per_row)
        assert_allclose(smooth, 0.9 * expected + 0.1 * (lse - wide.mean(axis=1)), **few)
        loss, grad = fastce.cross_entropy_with_grad(logits, target, out=np.empty(x.shape, dtype), **per_row)
        assert_allclose(loss, expected, **few)
        truth = np.exp(wide - lse[:, None])
        truth[range(len(x)), target] -= 1
        assert_allclose(grad.astype(np.float64), truth, **rounded)
