"""Ordinary calls have a short way past the checks: same results, and only they take it."""

import ml_dtypes
import numpy as np
import pytest

import fastce
from cases import make_logits, make_target
from fastce import _backend
from fastce._options import DEFAULT_IGNORE_INDEX, DEFAULTS, Options

SHAPES = [(32, 10), (1, 1), (1, 300), (64, 2), (3, 5), (5, 130), (3000, 10), (20, 5000)]


def solve(logits, target, out=None, options=DEFAULTS, n_threads=None):
    return _backend.solve_ordinary(logits, target, out, True, options, n_threads, DEFAULTS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_both_ways_give_the_same_bits(rng, isa, dtype, shape):
    """Another ignore_index, though no target has it, takes the long way."""
    logits, target = make_logits(rng, shape, dtype), make_target(rng, "index", shape)
    expected = fastce.cross_entropy_with_grad(logits, target, ignore_index=-7)
    apart, in_place = np.full_like(logits, np.nan), logits.copy()
    for loss, grad in (
        solve(logits, target),
        solve(logits, target, n_threads=3),
        fastce.cross_entropy_with_grad(logits, target),
        fastce.cross_entropy_with_grad(logits, target, out=apart),
        fastce.cross_entropy_with_grad(in_place, target, out=in_place),
        (fastce.cross_entropy(logits, target), expected[1]),
    ):
        assert type(loss) is (np.float64 if dtype is np.float64 else np.float32)
        assert loss == expected[0]
        assert grad.dtype == dtype
        assert np.array_equal(grad, expected[1])
    assert fastce.cross_entropy_with_grad(logits, target, out=apart)[1] is apart


def test_only_ordinary_calls_take_the_short_way(rng, dtype):
    """Everything else is left to the checks, and nothing is written."""
    logits, target = make_logits(rng, (32, 10), dtype), make_target(rng, "index", (32, 10))
    assert solve(logits.copy(), target) is not None
    wide = np.zeros((32, 11), dtype)
    aligned_wrongly = np.zeros(logits.nbytes + 1, np.uint8)[1:].view(dtype).reshape(32, 10)
    bad = target.copy()
    bad[7] = 10
    base = np.zeros((33, 10), dtype)
    memory = np.zeros(320, dtype)
    read_only = logits.copy()
    read_only.flags.writeable = False
    cases = {
        "a list": (logits.tolist(), target),
        "a subclass": (logits.view(np.matrix), target),
        "masked": (np.ma.masked_array(logits), target),
        "strided": (wide[:, :10], target),
        "Fortran order": (np.asfortranarray(logits), target),
        "swapped bytes": (logits.astype(logits.dtype.newbyteorder()), target),
        "unaligned": (aligned_wrongly, target),
        "integers": (logits.astype(int), target),
        "other 16 bits": (logits.view(np.uint16), target),
        "8 bits": (logits.astype(ml_dtypes.float8_e5m2), target),
        "three axes": (logits.reshape(32, 10, 1), target),
        "one axis": (logits[0], target[:1]),
        "no rows": (logits[:0], target[:0]),
        "no classes": (logits[:, :0], target),
        "list of targets": (logits, target.tolist()),
        "int32": (logits, target.astype(np.int32)),
        "too few targets": (logits, target[:31]),
        "strided targets": (logits, np.repeat(target, 2)[::2]),
        "probabilities": (logits, np.full((32, 10), 0.1, dtype)),
        "no such class": (logits, bad),
        "negative class": (logits, target - 11),
        "all ignored": (logits, np.full(32, DEFAULT_IGNORE_INDEX)),
        "another shape": (logits, target, np.zeros((10, 32), dtype)),
        "another dtype": (logits, target, np.zeros((32, 10), np.float16)),
        "overlap": (base[:32], target, base[1:]),
        "targets in out": (logits, memory.view(np.int64)[:32], memory.reshape(32, 10)),
        "read-only": (read_only, target, read_only),
    }
    for name, case in cases.items():
        kept = [np.array(array) for array in case]
        assert solve(*case) is None, name
        assert all(np.array_equal(before, array) for before, array in zip(kept, case, strict=True)), name


@pytest.mark.parametrize(
    "changes",
    [
        {"ignore_index": 3},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0},  # an int
        {"label_smoothing": np.float64(0)},
        {"label_smoothing": np.zeros(2)},
        {"reduction": "sum"},
        {"reduction": None},
        {"on_empty": "zero"},
        {"logit_scale": 2.0},
        {"logit_scale": True},
        {"logit_scale": float("nan")},
        {"softcap": 5.0},
        {"z_loss": 1e-4},
        {"n_threads": 0},
        {"n_threads": True},
        {"n_threads": 1.0},
    ],
)
def test_options_take_the_long_way(rng, changes):
    logits, target = make_logits(rng, (32, 10), np.float32), make_target(rng, "index", (32, 10))
    options = Options(**changes)
    assert solve(logits, target, options=tuple(options)[:-1], n_threads=options.n_threads) is None


def test_defaults_may_be_other_objects_of_the_same_value(rng):
    logits, target = make_logits(rng, (32, 10), np.float32), make_target(rng, "index", (32, 10))
    same = (int("-100"), float("0"), "".join(["me", "an"]), "nan", 1.0, None, float("0"))
    assert solve(logits, target, options=same) is not None
