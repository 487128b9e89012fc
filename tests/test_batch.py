"""A row has the same bits in every batch: alone or among others, anywhere, with `out` or without.

They may depend on the instruction set, on the memory order of the logits and on what is asked for: the loss with
statistics comes from another kernel than the loss without.
"""

import numpy as np
import pytest

import fastce
from cases import make_logits, make_target
from oracle import assert_equal

N_ROWS = 100  # more than the 64 that go together
PARTS = [(0, 1), (3, 4), (7, 10), (0, 3), (1, 16), (60, 100), (99, 100)]
# Around tiles, the choice of a kernel, by bytes of a row and by options, and blocks.
CLASSES = [1, 2, 3, 10, 63, 64, 65, 111, 127, 128, 200, 224, 1000, 2049, 5000]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"z_loss": 0.01, "logit_scale": 1.7},
    {"logit_scale": 0.3},
]
# Logits as they lie in memory.
LAYOUTS = {
    "C": lambda x: x,
    "F": np.asfortranarray,
    "step": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "far": lambda x: np.repeat(x, 7, axis=1)[:, ::7],
    "reversed": lambda x: x[:, ::-1].copy()[:, ::-1],
    "padded": lambda x: np.pad(x, ((0, 0), (0, 3)))[:, : x.shape[1]],
    "planes": lambda x: x.T.copy().reshape(x.shape[1], -1, 10).swapaxes(0, 1).copy(),
}


def results(x, target, v, **options):
    """Return what the functions say of each row, and whether `out` is given makes no difference to that."""
    per_row = {"reduction": "none", **options}
    loss, grad = fastce.cross_entropy_with_grad(x, target, **per_row)
    alone = fastce.cross_entropy(x, target, **per_row)
    assert_equal(alone, loss)
    out = np.full(x.shape, 7, x.dtype)
    fastce.cross_entropy_with_grad(x, target, out=out, **per_row)
    assert_equal(out, grad)
    return {
        "loss": loss,
        "grad": grad,
        **fastce.cross_entropy_stats(x, target, **per_row)._asdict(),
        "product": fastce.cross_entropy_hvp(x, target, v, **per_row),
        "diagonal": fastce.cross_entropy_grad_hess(x, target, **per_row)[1],
        "softmax": fastce.softmax(x, axis=1),
        "log_softmax": fastce.log_softmax(x, axis=1),
        "logsumexp": fastce.logsumexp(x, axis=1),
    }


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_classes", CLASSES)
def test_a_row_has_the_same_bits_in_every_batch(n_classes, layout, rng):
    n_rows = N_ROWS if n_classes <= 200 else 20  # of many classes no more than 16 rows go together
    for i, dtype in enumerate((np.float32, np.float64, np.float16, np.float32, np.float64)):
        x = LAYOUTS[layout](make_logits(rng, (n_rows, n_classes), dtype))
        v = rng.standard_normal(x.shape).astype(dtype)
        target = make_target(rng, ("index", "prob")[i % 2], x.shape)
        whole = results(x, target, v, **OPTIONS[i])
        for start, stop in PARTS:
            part = slice(start, stop)
            if stop > len(x):
                continue
            for name, values in results(x[part], target[part], v[part], **OPTIONS[i]).items():
                message = f"{name} {np.dtype(dtype)} {OPTIONS[i]} {part}"
                assert_equal(values, whole[name][part], message)


@pytest.mark.every_isa
@pytest.mark.parametrize("n_classes", CLASSES)
def test_a_row_has_the_same_bits_in_compact_batches_of_one_memory_order(n_classes, rng):
    """A copy of few rows in Fortran order, or of few positions of an image, has its classes nearer to each other."""
    for i, dtype in enumerate((np.float32, np.float64, np.float16, np.float32, np.float64)):
        x = np.asfortranarray(make_logits(rng, (20, n_classes), dtype))
        v = rng.standard_normal(x.shape).astype(dtype)
        target = make_target(rng, ("index", "prob")[i % 2], x.shape)
        whole = results(x, target, v, **OPTIONS[i])
        for n in (2, 3, 4, 5, 17):
            few = np.asfortranarray(x[:n])
            for name, values in results(few, target[:n], v[:n], **OPTIONS[i]).items():
                assert_equal(values, whole[name][:n], f"{name} {np.dtype(dtype)} {OPTIONS[i]} {n} rows")
        images = np.ascontiguousarray(x.T)[None]
        for n in (2, 3, 4, 5, 17):
            assert_equal(fastce.softmax(images[:, :, :n].copy(), axis=1), fastce.softmax(images, axis=1)[:, :, :n])


@pytest.mark.every_isa
@pytest.mark.parametrize("n_classes", [10, 130])
def test_probabilities_and_indices_in_batches_of_any_size(n_classes, rng):
    x = make_logits(rng, (40, n_classes), np.float32)
    for kind in ("index", "prob"):
        target = make_target(rng, kind, x.shape)
        whole = fastce.cross_entropy_with_grad(x, target, reduction="none")
        for n in range(1, 40):
            part = fastce.cross_entropy_with_grad(x[:n], target[:n], reduction="none")
            for values, of_whole in zip(part, whole, strict=True):
                assert_equal(values, of_whole[:n])


@pytest.mark.every_isa
def test_sums_over_integers_have_the_same_bits_in_every_batch(rng):
    """They are converted first, and a part's memory order must not make another of it."""
    x = rng.integers(-9, 9, (5, 200, 20, 3)).astype(np.int32)
    whole = fastce.logsumexp(x, axis=1)
    for part in (np.s_[:, :, 11:12, :1], np.s_[2:3, :], np.s_[:, :, :, 1:2]):
        rows = (part[0], *part[2:])
        assert_equal(fastce.logsumexp(x[part], axis=1), whole[rows])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"return_stats": True}, {"z_loss": 1e-3}, {"softcap": 200.0}], ids=str)
@pytest.mark.parametrize("n_classes", [5, 40, 100, 160, 300])
def test_tiny_factors_of_other_rows_do_not_show(n_classes, options, dtype, rng):
    """A tiny factor is taken out of its own row's exponentials, of which the small ones then lose digits."""
    tiny = np.finfo(dtype).smallest_normal
    logits = np.linspace(np.log(tiny) - 8, np.log(tiny) + 3, n_classes).astype(dtype) * np.ones((20, 1), dtype)
    logits[:, 0] = 0
    target = rng.integers(1, n_classes, 20)
    grad_output = np.full(20, 0.7, dtype)
    _, alone, *_ = fastce.cross_entropy_with_grad(
        logits[:1], target[:1], grad_output=grad_output[:1], reduction="none", **options
    )
    grad_output[1::2] = 8 * tiny
    _, grad, *_ = fastce.cross_entropy_with_grad(logits, target, grad_output=grad_output, reduction="none", **options)
    assert_equal(grad[:1], alone)
