"""Rows that are one block each are swept one after the other, and the rows before them multiplied meanwhile.

What is skipped, where rows begin in a cache line and how many there are decides which rows meet in one turn.
"""

import numpy as np
import pytest

import fastce
from oracle import assert_equal, assert_matches_reference

pytestmark = pytest.mark.every_isa

# Around vectors and steps of 64; rows of 2048 floats or 1024 doubles are one block.
CLASSES = (128, 129, 143, 191, 192, 193, 255, 300, 1000, 1023, 1024, 1025, 1500, 2047, 2048, 2049)
ROWS = (1, 2, 15, 16, 17, 33, 70)


def skips(n_rows, rng):
    """Return targets' rows that are skipped, by name: some, most, whole groups of 16, the first or the last of them."""
    place = np.arange(n_rows) % 16
    return {
        "none": np.zeros(n_rows, bool),
        "some": rng.random(n_rows) < 0.3,
        "most": rng.random(n_rows) < 0.9,
        "every other group": np.arange(n_rows) // 16 % 2 == 1,
        "first": place == 0,
        "last": place == 15,
        "all": np.ones(n_rows, bool),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_classes", CLASSES)
def test_skipped_rows_do_not_show(n_classes, dtype, rng):
    for n_rows in ROWS:
        logits = (3 * rng.standard_normal((n_rows, n_classes))).astype(dtype)
        logits[::3, 5] = 40  # confident: the other terms' sum is formed again
        target = rng.integers(0, n_classes, n_rows)
        losses, grads = fastce.cross_entropy_with_grad(logits, target, reduction="none")
        for name, skipped in skips(n_rows, rng).items():
            some = np.where(skipped, -100, target)
            work = np.where(skipped[:, None], np.nan, logits).astype(dtype)
            what = f"{n_rows} rows, {name}"
            assert_equal(fastce.cross_entropy(work, some, reduction="none"), np.where(skipped, 0, losses), what)
            loss, grad = fastce.cross_entropy_with_grad(work, some, reduction="none", out=work)
            assert_equal(loss, np.where(skipped, 0, losses), what)
            assert_equal(grad, np.where(skipped[:, None], 0, grads), what)


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3}, {"logit_scale": 7.0}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_classes", CLASSES)
def test_rows_match_the_definition(n_classes, dtype, options, rng):
    """Also rows with gaps between them, rows all but whose target is tiny or -inf, and a row that is skipped."""
    for n_rows in (5, 40):
        memory = rng.standard_normal((n_rows, n_classes + 7)).astype(dtype)
        logits = memory[:, 3 : 3 + n_classes]
        logits[:: n_rows // 5] *= 20
        logits[1, 1:] = -np.inf
        logits[2] = -np.inf
        logits[2, -1] = 0
        target = rng.integers(0, n_classes, n_rows)
        target[1:3] = 0, n_classes - 1
        target[3] = -100
        assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, f"{n_rows} rows", **options)


@pytest.mark.parametrize("n_classes", [129, 300, 1000])
def test_what_lies_between_rows_is_left_alone(n_classes, rng):
    for shift in range(0, 17, 4):
        memory = np.full((40, n_classes + 21), 7, np.float32)
        logits = memory[:, shift : shift + n_classes]
        logits[...] = rng.standard_normal(logits.shape)
        fastce.cross_entropy_with_grad(logits, rng.integers(0, n_classes, 40), out=logits)
        assert (memory[:, :shift] == 7).all()
        assert (memory[:, shift + n_classes :] == 7).all()
