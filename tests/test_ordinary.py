"""Ordinary calls have a short way past the checks: same results, and only they take it."""

import contextlib

import ml_dtypes
import numpy as np
import pytest

import fastce
from cases import class_axis, make_logits, make_target, row_shape
from fastce import _backend, _curvature, _loss
from fastce._curvature import CURVATURES
from fastce._options import DEFAULT_IGNORE_INDEX, Options

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
SHAPES = [(32, 10), (1, 1), (1, 300), (64, 2), (3, 5), (5, 130), (3000, 10), (20, 5000)]
OPTIONS = {
    "defaults": {},
    "ignore_index": {"ignore_index": 0},
    "sum": {"reduction": "sum", "on_empty": "zero"},
    "label_smoothing": {"label_smoothing": 0.1},
    "logit_scale": {"logit_scale": np.float64(0.3)},  # a float too
    "softcap": {"softcap": 5},
    "z_loss": {"z_loss": 1e-3, "label_smoothing": 0, "logit_scale": 1},
    "grad_output": {"grad_output": -2.5, "reduction": "sum"},
    "none": {"reduction": "none", "z_loss": 0.01},
    "all": {
        "ignore_index": 1,
        "label_smoothing": 0.2,
        "logit_scale": 0.5,
        "softcap": 3.0,
        "z_loss": 0.01,
        "grad_output": 3,
    },
}


def solve(
    logits,
    target,
    out=None,
    axis=None,
    weight=None,
    sample_weight=None,
    grad_output=None,
    n_threads=None,
    with_grad=True,
    make_stats=None,
    v=None,
    hess=None,
    curvature=None,
    **changes,
):
    """Try the short way."""
    factors, second = (weight, sample_weight, grad_output), (v, hess, curvature)
    given = tuple(Options(**changes))[:-1]
    return _backend.solve_ordinary(
        logits, target, out, axis, with_grad, make_stats, *factors, given, n_threads, *second
    )


@contextlib.contextmanager
def long_way():
    """Close the short way for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (_loss, _curvature):
            patch.setattr(module, "solve_ordinary", lambda *_, **__: None)
        yield


def solve_long(*arguments, **options):
    """Take the long way."""
    with long_way():
        return fastce.cross_entropy_with_grad(*arguments, **options)


def same(results, expected):
    """Tell whether losses, gradients, statistics have the same bits and types."""
    return len(results) == len(expected) and all(
        type(one) is type(other) and one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
        for one, other in zip(results, expected, strict=True)
    )


def check_both_ways(logits, target, **arguments):
    """Compare types and bits: apart, in place, in any order, with threads, and without the gradient."""
    expected = solve_long(logits, target, **arguments)
    in_c = np.full(logits.shape, np.nan, logits.dtype)
    assert same(solve(logits, target, **arguments), expected)
    assert same(solve(logits, target, n_threads=3, **arguments), expected)
    loss, grad = fastce.cross_entropy_with_grad(logits, target, **arguments)
    assert same((loss, grad), expected)
    assert grad.strides == expected[1].strides
    for call in (solve, fastce.cross_entropy_with_grad):
        for out in (in_c.copy(), np.asfortranarray(in_c)):
            assert same(call(logits, target, out=out, **arguments), expected)
        in_place = logits.copy("K")
        assert same(call(in_place, target, out=in_place, **arguments), expected)
    assert fastce.cross_entropy_with_grad(logits, target, out=in_c, **arguments)[1] is in_c
    arguments.pop("grad_output", None)
    assert same([solve(logits, target, with_grad=False, **arguments)], expected[:1])
    assert same([fastce.cross_entropy(logits, target, **arguments)], expected[:1])


def check_stats(logits, target, **arguments):
    """Compare the statistics, beside loss and gradient and by themselves."""
    loss, grad, stats = solve_long(logits, target, return_stats=True, **arguments)
    others = fastce.cross_entropy_with_grad(logits, target, return_stats=True, **arguments)
    assert same(others[:2], (loss, grad))
    assert type(others[2]) is fastce.CrossEntropyStats
    assert same(others[2], stats)
    short = solve(logits, target, make_stats=fastce.CrossEntropyStats, **arguments)
    assert same(short[2], stats)
    arguments.pop("grad_output", None)
    assert same(fastce.cross_entropy_stats(logits, target, **arguments), stats)
    assert same(solve(logits, target, with_grad=False, make_stats=fastce.CrossEntropyStats, **arguments)[1], stats)


def check_second(rng, logits, target, **arguments):
    """Compare products and diagonals: apart, in place, in any order, with threads."""
    v = np.asarray(rng.standard_normal(logits.shape).astype(DTYPES[rng.integers(4)]), order=rng.choice(["C", "F"]))
    name = rng.choice(list(CURVATURES)).item()
    in_c = np.full(logits.shape, np.nan, logits.dtype)
    with long_way():
        product = fastce.cross_entropy_hvp(logits, target, v, **arguments)
        diagonal = fastce.cross_entropy_grad_hess(logits, target, curvature=name, **arguments)
    for changes in ({}, {"n_threads": 3}, {"out": in_c.copy()}, {"out": np.asfortranarray(in_c)}):
        result = solve(logits, target, v=v, **changes, **arguments)
        assert same([result], [product])
        assert result is changes.get("out", result)
    result = fastce.cross_entropy_hvp(logits, target, v, **arguments)
    assert same([result], [product])
    assert result.strides == product.strides
    in_place = logits.copy("K")
    assert solve(in_place, target, in_place, v=v, **arguments) is in_place
    assert same([in_place], [product])
    if v.dtype == logits.dtype:
        assert solve(logits, target, v, v=v, **arguments) is v
        assert same([v], [product])
    for changes in ({}, {"n_threads": 3}, {"hess": np.asfortranarray(in_c)}):
        results = solve(logits, target, curvature=CURVATURES[name], **changes, **arguments)
        assert same(results, diagonal)
        assert results[1] is changes.get("hess", results[1])
    results = fastce.cross_entropy_grad_hess(logits, target, curvature=name, **arguments)
    assert same(results, diagonal)
    assert [array.strides for array in results] == [array.strides for array in diagonal]
    in_place = logits.copy("K")
    results = fastce.cross_entropy_grad_hess(in_place, target, curvature=name, out=in_place, hess_out=in_c, **arguments)
    assert results[0] is in_place and results[1] is in_c
    assert same(results, diagonal)


def make_call(rng, shape, axis, dtype, kind, weighted, options):
    """Return logits, a target and options that go with them."""
    logits, target = make_logits(rng, shape, dtype), make_target(rng, kind, shape, axis)
    n_classes, rows = shape[class_axis(shape, axis)], row_shape(shape, axis)
    arguments = dict(options)
    if kind == "prob":
        target = target.astype(DTYPES[rng.integers(4)])
        arguments.pop("ignore_index", None)
    else:
        target[..., -1] = n_classes - 1
        if n_classes == 1:
            arguments["ignore_index"] = -1  # for there must be a row
    either = [np.float32, np.float64]
    if weighted:
        arguments["weight"] = rng.uniform(-0.5, 2, n_classes).astype(rng.choice(either))
        arguments["sample_weight"] = rng.uniform(-0.5, 2, rows).astype(rng.choice(either))
        if options.get("reduction") == "none":
            arguments["grad_output"] = rng.standard_normal(rows).astype(rng.choice(either))
    return logits, target, arguments


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_give_the_same_bits(rng, dtype, kind, weighted, options, shape):
    logits, target, arguments = make_call(rng, shape, None, dtype, kind, weighted, options)
    check_both_ways(logits, target, **arguments)
    check_stats(logits, target, **arguments)
    check_second(rng, logits, target, **arguments)


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
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["defaults", "none", "all"])
@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_axis_of_arrays_in_any_order(rng, dtype, kind, name, order, shape, axis):
    logits, target, arguments = make_call(rng, shape, axis, dtype, kind, True, OPTIONS[name])
    logits = np.asarray(logits, order=order)
    check_both_ways(logits, target, axis=axis, **arguments)
    check_stats(logits, target, axis=axis, **arguments)
    check_second(rng, logits, target, axis=axis, **arguments)
    if kind == "prob":
        check_both_ways(logits, np.asarray(target, order="F" if order == "C" else "C"), axis=axis, **arguments)


@pytest.mark.parametrize("name", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "longlong"])
def test_targets_of_any_integers_that_fit_in_int64(rng, dtype, name):
    """Negative ones are ignored, where there are such."""
    logits, target = make_logits(rng, (32, 10), dtype), make_target(rng, "index", (32, 10))
    if np.dtype(name).kind == "i":
        target[3:7] = -1
    given = target.astype(name)
    assert same(solve(logits, given, ignore_index=-1), solve(logits, target, ignore_index=-1))
    assert same(solve(logits, given, ignore_index=-1), solve_long(logits, given, ignore_index=-1))
    given[5] = 10
    assert solve(logits, given, ignore_index=-1) is None
    with pytest.raises(IndexError, match=r"target\[5\] is 10"):
        fastce.cross_entropy(logits, given, ignore_index=-1)


def test_only_ordinary_calls_take_the_short_way(rng, dtype):
    """Everything else is left to the checks, and nothing is written."""
    logits, target = make_logits(rng, (32, 10), dtype), make_target(rng, "index", (32, 10))
    assert solve(logits.copy(), target) is not None
    prob = np.full((32, 10), 0.1, dtype)
    assert solve(logits.copy(), prob) is not None
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
        "axes in another order": (np.zeros((4, 2, 5), dtype).transpose(1, 2, 0), np.zeros((2, 4), int)),
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
        "uint64": (logits, target.astype(np.uint64)),
        "booleans": (logits, target == 1),
        "float classes": (logits, target.astype(np.float64)),
        "too few targets": (logits, target[:31]),
        "targets in Fortran order": (np.zeros((2, 3, 4), dtype), np.zeros((4, 2), int).T),
        "targets of another shape": (np.zeros((2, 3, 4), dtype), np.zeros(8, int)),
        "strided targets": (logits, np.repeat(target, 2)[::2]),
        "one-hot integers": (logits, np.eye(10, dtype=np.int64)[target]),
        "too few probabilities": (logits, prob[:31]),
        "too many probabilities": (logits, np.full((32, 11), 0.1, dtype)),
        "strided probabilities": (logits, wide[:, :10]),
        "other 16 bits of probabilities": (logits, prob.astype(np.float16).view(np.uint16)),
        "probabilities in out": (logits, prob, prob),
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


def test_only_ordinary_second_derivatives_take_the_short_way(rng, dtype):
    """Everything else is left to the checks, and nothing is written."""
    logits, target = make_logits(rng, (32, 10), dtype), make_target(rng, "index", (32, 10))
    weight, exact = np.ones(10, dtype), CURVATURES["exact"]
    v, out = rng.random((2, 32, 10)).astype(dtype)
    wide = rng.random((33, 11)).astype(dtype)
    read_only = v.copy()
    read_only.flags.writeable = False
    assert solve(logits, target, v=v) is not None
    assert solve(logits, target, v=read_only, weight=weight) is not None
    assert solve(logits, target, curvature=exact) is not None
    longer = np.resize(v, (33, 10))
    cases = {
        "a list": {"v": v.tolist()},
        "integers": {"v": np.ones((32, 10), int)},
        "swapped bytes": {"v": v.astype(v.dtype.newbyteorder())},
        "strided": {"v": wide[:32, :10]},
        "another shape": {"v": v[:31]},
        "overlap of out and v": {"v": longer[1:], "out": longer[:32]},
        "another view of v": {"v": v, "out": v[:]},
        "read-only out": {"v": read_only, "out": read_only},
        "strided diagonal": {"hess": wide[:32, :10], "curvature": exact},
        "diagonal in place": {"hess": logits, "curvature": exact},
        "gradient and diagonal": {"hess": out, "out": out, "curvature": exact},
        "overlap of both": {"hess": longer[1:], "out": longer[:32], "curvature": exact},
        "another type": {"hess": np.zeros((32, 10), np.float16), "curvature": exact},
        "another shape of the diagonal": {"hess": v[:31], "curvature": exact},
        "read-only diagonal": {"hess": read_only, "curvature": exact},
        "weights in the diagonal": {"hess": v, "weight": v.reshape(-1)[:10], "curvature": exact},
        "row weights in the diagonal": {"hess": v, "sample_weight": v.reshape(-1)[:32], "curvature": exact},
    }
    for name, case in cases.items():
        kept = [np.array(array) for array in (logits, *case.values())]
        assert solve(logits, target, **case) is None, name
        for before, array in zip(kept, (logits, *case.values()), strict=True):
            assert np.array_equal(before, array), name
    assert solve(logits, target, out, v=out.astype(np.float64 if dtype == np.float32 else np.float32)) is out


@pytest.mark.parametrize(
    "changes",
    [
        {"ignore_index": 2**63},
        {"ignore_index": True},
        {"ignore_index": 1.0},
        {"label_smoothing": -0.1},
        {"label_smoothing": 1.5},
        {"label_smoothing": True},
        {"label_smoothing": np.zeros(2)},
        {"label_smoothing": np.float32(0.5)},
        {"reduction": "none", "grad_output": 2.0},  # there must be one for each row
        {"reduction": "none", "grad_output": np.ones(31)},
        {"reduction": "none", "grad_output": np.ones(32, int)},
        {"reduction": "average"},
        {"reduction": None},
        {"on_empty": "one"},
        {"on_empty": 0},
        {"logit_scale": 0.0},
        {"logit_scale": True},
        {"logit_scale": float("nan")},
        {"logit_scale": float("inf")},
        {"softcap": 0},
        {"softcap": "5"},
        {"softcap": float("inf")},
        {"softcap": 1e39},  # infinite, or 0, in float32
        {"softcap": 1e-46},
        {"logit_scale": 1e20, "softcap": 1e-20},  # whose quotient is infinite
        {"logit_scale": 1e39},
        {"logit_scale": 1e-46},
        {"z_loss": -1e-4},
        {"z_loss": float("nan")},
        {"z_loss": 10**400},
        {"grad_output": np.ones(32)},
        {"grad_output": True},
        {"axis": 2},
        {"axis": -3},
        {"axis": 0},  # 32 classes and 10 rows
        {"axis": True},
        {"axis": 1.0},
        {"axis": np.int64(1)},
        {"n_threads": 0},
        {"n_threads": True},
        {"n_threads": 1.0},
        {"weight": np.ones(9, np.float32)},
        {"weight": np.ones((10, 1), np.float32)},
        {"weight": np.full(10, 1e300)},  # infinite in float32
        {"weight": np.ones(10, np.float16)},
        {"weight": np.ones(10, int)},
        {"weight": [1.0] * 10},
        {"weight": np.ones(20, np.float32)[::2]},
        {"weight": np.float32([-1e-45, *[1] * 9])},  # far from the others: may have to be scaled
        {"weight": np.float32([1e13, *[1] * 9])},
        {"weight": np.float32([*[1] * 9, np.nan])},
        {"weight": np.float32([*[1] * 9, np.inf])},
        {"sample_weight": np.ones(31)},
        {"sample_weight": np.ones((32, 1))},
        {"sample_weight": np.ones(32, np.float16)},
        {"sample_weight": np.ones(32, np.longdouble)},
        {"sample_weight": np.ma.ones(32)},
        {"sample_weight": np.full(32, -1e13)},
        {"sample_weight": np.full(32, -1e-13)},
        {"sample_weight": np.full(32, np.nan)},
        {"sample_weight": np.full(32, np.inf)},
        {"sample_weight": np.zeros(32)},  # a mean of nothing
    ],
    ids=str,
)
def test_other_options_take_the_long_way(rng, changes):
    logits, target = make_logits(rng, (32, 10), np.float32), make_target(rng, "index", (32, 10))
    assert solve(logits, target) is not None
    assert solve(logits, target, **changes) is None


def test_probabilities_and_an_ignored_class_take_the_long_way(rng):
    """Which refuses them together."""
    logits, prob = make_logits(rng, (32, 10), np.float32), make_target(rng, "prob", (32, 10))
    assert solve(logits, prob, ignore_index=DEFAULT_IGNORE_INDEX) is not None
    assert solve(logits, prob, ignore_index=3) is None


def test_weights_within_out_take_the_long_way(rng):
    """Which refuses them."""
    logits, target = make_logits(rng, (32, 10), np.float32), make_target(rng, "index", (32, 10))
    out = rng.random((32, 10), np.float32)
    kept = out.copy()
    for name, n in (("weight", 10), ("sample_weight", 32), ("grad_output", 32)):
        options = {name: out.reshape(-1)[-n:], "reduction": "none"}
        assert solve(logits, target, **options) is not None
        assert solve(logits, target, out, **options) is None
        with pytest.raises(ValueError, match=f"overlap with {name}"):
            fastce.cross_entropy_with_grad(logits, target, out=out, **options)
        assert np.array_equal(out, kept)
