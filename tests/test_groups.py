"""Rows come and go in groups: planes, strides and remainders must not show, down to the last bit.

The kernels of few classes work on 64 rows at a time, which they copy, or up to 512 where they lie; the next ones are
fetched meanwhile. Where planes allow it, rows begin with a cache line. Whatever the layout, the result for a row is the
one it has when a few rows are all there are.
"""

import ml_dtypes
import numpy as np
import pytest

import fastce
from oracle import assert_equal, assert_matches_reference

pytestmark = pytest.mark.every_isa

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
ROWS = (
    63,  # around one tile
    65,
    511,  # around a group
    513,
    1024,  # planes 4 KiB apart, which are copied if they are many
    1100,  # the first groups fetch the next ones
    9000,  # groups of full size: 16 or more
)


def by_pieces(logits, target):
    """Return losses and gradients of N x C logits, 50 rows at a time."""
    starts = range(0, len(target), 50)
    pieces = [
        fastce.cross_entropy_with_grad(logits[i : i + 50].copy(), target[i : i + 50], reduction="none") for i in starts
    ]
    return [np.concatenate(parts).astype(np.float64) for parts in zip(*pieces, strict=True)]


def layouts(logits, rng):
    """Return N x C logits under other strides, by name, each with a way back to N x C."""
    n_rows, n_classes = logits.shape
    wide = rng.standard_normal((n_rows, 2 * n_classes + 1)).astype(logits.dtype)
    wide[:, 1::2] = logits
    reverse = np.ascontiguousarray(logits[::-1])[::-1]
    shifted = np.empty(logits.size + 1, logits.dtype)[1:].reshape(logits.shape)
    shifted[...] = logits
    found = {
        "C": (logits.copy(), lambda g: g),
        "Fortran": (np.asfortranarray(logits), lambda g: g),
        "strided": (wide[:, 1::2], lambda g: g),
        "padded": (np.pad(logits, ((0, 0), (0, 3)))[:, :n_classes], lambda g: g),
        "reverse": (reverse, lambda g: g),
        "shifted": (shifted, lambda g: g),
    }
    if n_rows % 5 == 0:  # images whose runs end within tiles
        planes = np.ascontiguousarray(logits.reshape(5, n_rows // 5, n_classes).transpose(0, 2, 1))
        found["planes"] = (planes, lambda g: g.transpose(0, 2, 1).reshape(n_rows, n_classes))
        cut = np.pad(planes, ((0, 0), (0, 0), (0, 7)))[..., :-7]
        found["cut planes"] = (cut, lambda g: g.transpose(0, 2, 1).reshape(n_rows, n_classes))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize("n_classes", [1, 2, 3, 4, 7, 8, 10, 13, 16, 17, 40, 127])
def test_no_layout_shows(rng, dtype, n_rows, n_classes):
    logits = (3 * rng.standard_normal((n_rows, n_classes))).astype(dtype)
    target = rng.integers(0, n_classes, n_rows)
    target[rng.random(n_rows) < 0.1] = -100
    logits[rng.integers(0, n_rows)] = np.nan
    losses, grads = by_pieces(logits, target)
    for name, (given, back) in layouts(logits, rng).items():
        shape = target.shape if given.ndim == 2 else (5, n_rows // 5)
        for in_place in (False, True):
            work = given.copy(order="K") if in_place else given
            loss, grad = fastce.cross_entropy_with_grad(
                work, target.reshape(shape), out=work if in_place else None, reduction="none", n_threads=2
            )
            assert_equal(loss.ravel(), losses, err_msg=name)
            assert_equal(back(grad).astype(np.float64), grads, err_msg=name)


@pytest.mark.parametrize("n_classes", [1, 2, 3, 8, 21, 130, 400, 511, 520])
@pytest.mark.parametrize("shape", [(1, 40, 41), (3, 700), (2, 9, 3, 31)])
def test_images_match_the_definition(rng, n_classes, shape):
    """Any number of classes: with more than 500 no 64 rows fit into its memory."""
    logits = (3 * rng.standard_normal((shape[0], n_classes, *shape[1:]))).astype(np.float32)
    target = rng.integers(0, n_classes, shape)
    grad_output = rng.standard_normal(shape)
    assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, grad_output=grad_output, reduction="none")
    assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, ignore_index=0, logit_scale=2.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("values", [(np.inf, 0), (-np.inf, 0), (-np.inf, -np.inf), (np.nan, 0), (0, 0), (3e38, -3e38)])
def test_two_classes_at_the_extremes(dtype, values):
    """Two classes have code of their own; a third of -inf takes nothing away and sends them the usual way."""
    two = np.array([values, values[::-1]] * 40, dtype)
    three = np.pad(two, ((0, 0), (0, 1)), constant_values=-np.inf)
    for y in (0, 1):
        target = np.full(len(two), y)
        loss, grad = fastce.cross_entropy_with_grad(two, target, reduction="none")
        usual_loss, usual_grad = fastce.cross_entropy_with_grad(three, target, reduction="none")
        np.testing.assert_allclose(loss, usual_loss, rtol=4 * np.finfo(dtype).eps)
        np.testing.assert_allclose(grad, usual_grad[:, :2], rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("n_classes", [2, 3, 10, 21, 150])
@pytest.mark.parametrize("size", [40, 64, 2999])
def test_no_bit_depends_on_the_place_in_memory(rng, n_classes, size):
    """Rows are taken up from the first cache line on: neither the sum of the losses nor a gradient may show which."""
    planes = rng.standard_normal((3, n_classes, size), dtype=np.float32)
    target = rng.integers(0, n_classes, (3, size))
    target[rng.random(target.shape) < 0.1] = -100
    results = set()
    for shift in (0, 1, 4, 15):
        for n_threads in (1, 2):
            work = np.empty(planes.size + 32, np.float32)
            skip = -work.ctypes.data % 64 // 4 + shift
            work = work[skip : skip + planes.size].reshape(planes.shape)
            work[...] = planes
            loss, grad = fastce.cross_entropy_with_grad(work, target, out=work, reduction="sum", n_threads=n_threads)
            alone = fastce.cross_entropy(planes, target, reduction="sum", n_threads=n_threads)
            results.add((float(loss), float(alone), grad.tobytes()))
    assert len(results) == 1
    assert_matches_reference(fastce.cross_entropy_with_grad, planes, target, reduction="sum")
