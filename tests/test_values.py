"""Loss, gradient and statistics against the definition: sizes, options, memory layouts, data types."""

import numpy as np
import pytest

import fastce
from cases import CLASSES, FEW_CLASSES, LAYOUTS, OPTION_SETS, ROWS, make_logits, make_target, options_for, row_shape
from fastce import _reference
from oracle import Bounds, assert_matches_reference, assert_within

pytestmark = pytest.mark.every_isa(by_default=True)

KINDS = ["index", "prob"]
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "intp", ">i4", ">u2")
NLL_OPTIONS = ("weight", "sample_weight", "ignore_index")
FLOATS = ("float16", "float32", "float64", "longdouble")


def rows_for(n_classes):
    """Return every number of rows where that is cheap, and for many classes a few that fill a group and more."""
    return ROWS if n_classes <= 130 else (1, 2, 17)


@pytest.mark.parametrize("names", OPTION_SETS.values(), ids=OPTION_SETS.keys())
@pytest.mark.parametrize("n_classes", CLASSES)
def test_every_size_and_option_matches_the_definition(dtype, n_classes, names, rng):
    for n_rows in rows_for(n_classes):
        for kind in KINDS:
            shape = (n_rows, n_classes)
            logits = make_logits(rng, shape, dtype)
            target = make_target(rng, kind, shape)
            options = options_for(rng, names, kind, shape)
            assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, f"{shape} {kind}", **options)


@pytest.mark.parametrize("names", OPTION_SETS.values(), ids=OPTION_SETS.keys())
@pytest.mark.parametrize("n_classes", [1, 2, 10, 33, 64, 1000, 4097])
def test_strided_classes_match_the_definition(dtype, n_classes, names, rng):
    """Fortran order takes the other kernel family."""
    for n_rows in (1, 15, 17, 100) if n_classes < 1000 else (1, 17):
        for kind in KINDS:
            shape = (n_rows, n_classes)
            logits = make_logits(rng, shape, dtype).copy(order="F")
            target = make_target(rng, kind, shape).copy(order="F")
            options = options_for(rng, names, kind, shape)
            assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, f"{shape} {kind}", **options)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("n_classes", [1, 2, 3, 10, 100, 300, 1000])
def test_a_row_has_the_same_bits_in_any_batch(dtype, n_classes, order, rng):
    """Whichever place in a group of rows is its own. (Fewer than 4 rows may take another kernel.)"""
    logits = make_logits(rng, (150, n_classes), dtype).copy(order=order)
    target = make_target(rng, "index", logits.shape)
    loss, grad = fastce.cross_entropy_with_grad(logits, target, reduction="none")
    for rows in (slice(0, 5), slice(3, 20), slice(64, 128), slice(70, 149)):
        few_loss, few_grad = fastce.cross_entropy_with_grad(logits[rows].copy(order), target[rows], reduction="none")
        assert np.array_equal(few_loss, loss[rows]), rows
        assert np.array_equal(few_grad, grad[rows]), rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target_layout", LAYOUTS)
def test_every_layout_matches_the_definition(dtype, layout, target_layout, rng):
    for shape in [(70,), (20, 7), (5, 70), (3, 5, 18), (2, 3, 2, 5)]:
        for kind in KINDS:
            for names in ("plain", "all"):
                logits = LAYOUTS[layout](make_logits(rng, shape, dtype))
                target = LAYOUTS[target_layout](make_target(rng, kind, shape).astype(int if kind == "index" else dtype))
                options = options_for(rng, OPTION_SETS[names], kind, shape)
                what = f"{shape} {kind} {names}"
                assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, what, **options)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
def test_every_axis_matches_the_definition(axis, rng):
    shape = (3, 4, 5, 2)
    for kind in KINDS:
        logits = make_logits(rng, shape, np.float32)
        target = make_target(rng, kind, shape, axis)
        options = options_for(rng, OPTION_SETS["all"], kind, shape, axis)
        assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, kind, axis=axis, **options)


def test_broadcast_logits_match_the_definition(rng):
    """A stride of zero: one row seen many times, and one number seen as every class."""
    one_row = np.broadcast_to(make_logits(rng, (40,), np.float32), (30, 40))
    one_column = np.broadcast_to(make_logits(rng, (30, 1), np.float32), (30, 40))
    for logits in (one_row, one_column):
        for kind in KINDS:
            target = make_target(rng, kind, logits.shape)
            assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, kind)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("names", ["plain", "all"])
def test_every_reduction_matches_the_definition(dtype, reduction, names, rng):
    for shape in [(9,), (33, 7), (4, 70, 3)]:
        for kind in KINDS:
            logits = make_logits(rng, shape, dtype)
            target = make_target(rng, kind, shape)
            options = options_for(rng, OPTION_SETS[names], kind, shape)
            options["reduction"] = reduction
            grad_output = rng.standard_normal(row_shape(shape)) if reduction == "none" else -1.75
            assert_matches_reference(
                fastce.cross_entropy_with_grad, logits, target, f"{shape} {kind}", grad_output=grad_output, **options
            )


@pytest.mark.parametrize("kind", KINDS)
def test_loss_alone_and_statistics_alone_match_the_definition(dtype, kind, rng):
    for shape in [(50, n_classes) for n_classes in FEW_CLASSES] + [(3, 9000), (4, 70, 3)]:
        for names in ("plain", "all"):
            logits = make_logits(rng, shape, dtype)
            target = make_target(rng, kind, shape)
            options = options_for(rng, OPTION_SETS[names], kind, shape)
            expected = _reference.cross_entropy(logits, target, **options)
            bounds = Bounds(expected, logits, target, **options)
            loss = fastce.cross_entropy(logits, target, **options)
            assert_within(loss, expected.loss, bounds.loss, f"{shape} {names} loss")
            stats = fastce.cross_entropy_stats(logits, target, **options)
            together = fastce.cross_entropy_with_grad(logits, target, return_stats=True, **options)[2]
            for name, value in stats._asdict().items():
                other = getattr(together, name)
                if name == "argmax":
                    assert np.array_equal(value, other)
                else:
                    assert_within(
                        value, getattr(expected.stats, name), getattr(bounds, name), f"{shape} {names} {name}"
                    )


@pytest.mark.parametrize("integer", INTEGERS)
def test_every_integer_type_serves_as_target(integer, rng):
    logits = make_logits(rng, (40, 100), np.float32)
    target = make_target(rng, "index", logits.shape)
    expected = fastce.cross_entropy_with_grad(logits, target)
    actual = fastce.cross_entropy_with_grad(logits, target.astype(integer))
    assert actual[0] == expected[0]
    assert np.array_equal(actual[1], expected[1])


@pytest.mark.parametrize("integer", ["int8", "int32", "int64"])
def test_the_default_ignore_index_works_in_every_signed_type(integer, rng):
    logits = make_logits(rng, (6, 4), np.float32)
    target = np.array([0, -100, 3, 1, -100, 2], integer)
    assert_matches_reference(fastce.cross_entropy_with_grad, logits, target)


def test_the_largest_unsigned_number_may_be_the_ignore_index(rng):
    """It has no place among the signed 64-bit numbers, so a plain conversion would lose it."""
    largest = 2**64 - 1
    logits = make_logits(rng, (3, 4), np.float32)
    target = np.array([1, largest, 2], np.uint64)
    loss, grad = fastce.cross_entropy_with_grad(logits, target, ignore_index=largest)
    expected_loss, expected_grad = fastce.cross_entropy_with_grad(logits, np.array([1, -100, 2]))
    assert loss == expected_loss
    assert np.array_equal(grad, expected_grad)


@pytest.mark.parametrize("floating", FLOATS)
def test_every_floating_type_serves_as_probabilities(dtype, floating, rng):
    for shape in [(40, 7), (5, 100)]:
        logits = make_logits(rng, shape, dtype)
        target = make_target(rng, "prob", shape).astype(floating)
        assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, str(shape))


@pytest.mark.parametrize("floating", ["float16", "float32", "float64", "int64"])
def test_weights_of_every_type_match_the_definition(dtype, floating, rng):
    logits = make_logits(rng, (40, 7), dtype)
    target = make_target(rng, "index", logits.shape)
    weight = rng.integers(0, 4, 7).astype(floating)
    sample_weight = rng.integers(0, 4, 40).astype(floating)
    assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, weight=weight, sample_weight=sample_weight)


def test_probabilities_need_not_sum_to_one(dtype, rng):
    for shape in [(40, 7), (5, 100)]:
        logits = make_logits(rng, shape, dtype)
        for factor in (0.0, 0.25, 3.0):
            target = factor * make_target(rng, "prob", shape)
            assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, f"{shape} {factor}")


def test_argmax_takes_the_first_of_equals(dtype):
    for n_classes in (2, 10, 33, 65, 1000, 9000):
        for order in "CF":
            logits = np.zeros((20, n_classes), dtype, order)
            first = np.arange(20) * 7 % n_classes
            for i, k in enumerate(first):
                logits[i, k:] = 1  # the greatest number from class k on
            stats = fastce.cross_entropy_stats(logits, np.zeros(20, int))
            assert np.array_equal(stats.argmax, first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_softmax_family_matches_the_definition(dtype, name, layout, rng):
    eps = np.finfo(dtype).eps
    for shape in [(1,), (70,), (20, 7), (5, 9000), (3, 5, 18), (2, 3, 2, 5), (0, 4)]:
        for axis in {0, len(shape) - 1, -1} if shape != (0, 4) else {1}:
            x = LAYOUTS[layout](make_logits(rng, shape, dtype))
            expected = getattr(_reference, name)(x, axis=axis)
            actual = getattr(fastce, name)(x, axis=axis)
            assert actual.dtype == dtype
            # p is off by a few eps of itself per unit of log p; log p and lse by a few eps of the largest logit
            size = 1 + np.abs(x).max(initial=0) + np.log(shape[axis])
            bound = 4 * eps * size * (expected if name == "softmax" else 1)
            assert_within(actual, expected, bound, f"{name} {shape} {axis}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nll_loss_matches_the_definition(dtype, kind, reduction, rng):
    for shape in [(9,), (33, 7), (5, 1000), (4, 70, 3)]:
        for names in [(), ("weight",), ("sample_weight",), ("ignore_index",), NLL_OPTIONS]:
            log_probs = fastce.log_softmax(make_logits(rng, shape, dtype), axis=0 if len(shape) == 1 else 1)
            target = make_target(rng, kind, shape)
            options = options_for(rng, names, kind, shape)
            expected = _reference.nll_loss(log_probs, target, reduction=reduction, **options)
            actual = fastce.nll_loss(log_probs, target, reduction=reduction, **options)
            size = np.abs(log_probs).max() * np.max(options.get("weight", 1)) * 2
            bound = 4 * np.finfo(dtype).eps * size * (log_probs.size if reduction == "sum" else 1)
            assert_within(actual, expected, bound, f"{shape} {kind} {names}")
