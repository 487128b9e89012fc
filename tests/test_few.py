"""Each number of classes that fits into registers has code of its own, and so has what leads there and back."""

import numpy as np
import pytest

import fastce
from oracle import assert_equal, assert_matches_reference, with_grad

pytestmark = pytest.mark.every_isa

N_ROWS = 151  # two tiles and a part, and a part of a vector
CLASSES = range(2, 19)  # and some that do not fit
OPTIONS = [
    {},
    {"logit_scale": 2.5},
    {"ignore_index": 1, "reduction": "none"},
    {"ignore_index": 2**32 + 1},  # whose lower half is a class
    {"ignore_index": -(2**32)},
    {"ignore_index": 2**63 - 1, "reduction": "sum"},
]


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_classes", CLASSES)
def test_each_number_of_classes_matches_the_definition(n_classes, dtype, order, rng):
    logits = np.asarray(4 * rng.standard_normal((N_ROWS, n_classes)), dtype, order=order)
    for options in OPTIONS:
        target = rng.integers(0, n_classes, N_ROWS)
        target[::5] = options.get("ignore_index", -100)
        loss, grad = with_grad(logits, target, **options)
        assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, str(options), **options)
        assert_equal(fastce.cross_entropy(logits, target, **options), loss)
        assert grad.flags.c_contiguous if order == "C" else grad.flags.f_contiguous


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("n_classes", CLASSES)
def test_a_factor_of_each_row(n_classes, order, rng):
    logits = np.asarray(rng.standard_normal((N_ROWS, n_classes)), np.float32, order=order)
    target = rng.integers(0, n_classes, N_ROWS)
    target[::7] = -100
    grad_output = rng.standard_normal(N_ROWS)
    assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, grad_output=grad_output, reduction="none")
    grad_output[::7] = np.nan  # of no row that counts
    _, grad = fastce.cross_entropy_with_grad(logits, target, grad_output=grad_output, reduction="none")
    assert_equal(grad[::7], np.zeros_like(grad[::7]))
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_classes", CLASSES)
def test_rows_begin_anywhere(n_classes, dtype, rng):
    """Long batches begin with a cache line, if they can; memory around stays as it was."""
    n_rows = 2100
    logits = rng.standard_normal((n_rows, n_classes)).astype(dtype)
    target = rng.integers(0, n_classes, n_rows)
    losses, grads = fastce.cross_entropy_with_grad(logits, target, reduction="none")
    for shift in range(1, 17, 3):
        memory = np.full(logits.size + 64, 7, dtype)
        shifted = memory[shift : shift + logits.size].reshape(logits.shape)
        shifted[...] = logits
        loss, _ = fastce.cross_entropy_with_grad(shifted, target, out=shifted, reduction="none", n_threads=2)
        assert_equal(loss, losses)
        assert_equal(shifted, grads)
        assert (memory[:shift] == 7).all()
        assert (memory[shift + logits.size :] == 7).all()


@pytest.mark.parametrize("n_classes", CLASSES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_in_its_row(n_classes, value, rng):
    logits = rng.standard_normal((N_ROWS, n_classes)).astype(np.float32)
    target = rng.integers(0, n_classes, N_ROWS)
    target[3] = -100
    expected = fastce.cross_entropy_with_grad(logits, target, reduction="none")
    for k in range(n_classes):
        spoiled = logits.copy()
        spoiled[3] = value
        spoiled[20, k] = value
        spoiled[40] = value
        loss, grad = fastce.cross_entropy_with_grad(spoiled, target, reduction="none")
        for result, usual in zip((loss, grad), expected, strict=True):
            others = np.delete(np.arange(N_ROWS), [20, 40])
            assert_equal(result[others], usual[others])
            assert np.isnan(result[40]).all()
        if value == -np.inf:
            assert np.isfinite(grad[20]).all()
            assert np.isinf(loss[20]) if target[20] == k else np.isfinite(loss[20])
        else:
            assert np.isnan(grad[20]).all()
            assert np.isnan(loss[20])
