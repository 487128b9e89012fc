"""The device where arithmetic or weights are at their limits, and whether a row's bits are its own.

The truth is the definition in float64 or, where that is out of range as well, mpmath. The host's kernels take small
numbers for 0 where a test says so (`flush`), as the device's float32 does.
"""

import math

import mpmath
import numpy as np
import pytest

import fake_cupy
import fastce
import fastce.cuda
from cases import make_logits, make_target, row_shape, slow_except
from device import call_on, to_device, to_host
from fastce import _reference
from fastce._cuda import _task
from oracle import Bounds, assert_stats, assert_within
from test_cuda import DTYPES, FEW, SHAPES


@pytest.fixture
def flush(monkeypatch):
    """Small numbers are 0, as they are on the device anyway."""
    monkeypatch.setattr(fake_cupy, "compiler_flags", [*fake_cupy.compiler_flags, "-DFC_HOST_FLUSH"])
    fastce._cuda._program.kernel_of.cache_clear()
    yield
    fastce._cuda._program.kernel_of.cache_clear()


# logit_scale, softcap, logits of one row. The quotient of the two, or a product with a logit, is out of range.
FLOAT32 = [
    (1e-30, 1e30, [1, 2, -3, 0]),
    (1e-30, 1e30, [3e30, 1e30, -2e30, 0]),
    (1e-30, 1e30, [3e38, 1e38, -3e38, 0]),
    (1.0, 3e38, [1, 2, -3, 0]),
    (1.0, 1e38, [1, 2, -3, 3e38]),
    (0.5, 1e38, [3e38, 2.999e38, -3e38, 0]),
    (2.0, 3e38, [2e38, 1.9e38, 1, 0]),
    (1e3, 1e38, [1e37, 1, -2, 0]),
    (1e-20, 1e30, [1e20, 2e20, -1e20, 0]),
    (1e38, 1e38, [2e-38, 3e-38, 1, -2e-37]),
    (1e38, 5.0, [2e-38, 3e-38, 1e-37, -2e-38]),
    (1.0, 4.0, [3e38, -3e38, 1, 0]),
    (1.0, 4.0, [1e-30, -3e-38, 1e-4, 0]),
    (1.0, 4.0, [math.inf, -math.inf, 1, 0]),
    (1e-30, 1e30, [3e30, -math.inf, -2e30, 0]),
    (1e-38, None, [3e38, 1e38, -3e38, 0]),
    (1e-40, None, [3e38, 1e38, -3e38, 0]),
    (1e-40, None, [3e38, -math.inf, -3e38, 0]),
    (1e-40, None, [1, 2, -3, 0]),
    (1e-40, 1e-3, [3e38, 1e38, -3e38, 0]),
    (1e-40, 1e30, [3e38, 1e38, -3e38, 0]),
    (0.25, None, [3e38, 1e38, -3e38, 0]),
    (1e38, None, [2e-38, 3e-38, 1e-37, -1e-36]),
]
FLOAT64 = [
    (1e-300, 1e300, [1, 2, -3, 0]),
    (1e-300, 1e300, [3e300, 1e300, -2e300, 0]),
    (1.0, 1.7e308, [1, 2, -3, 0]),
    (0.5, 1e308, [1.7e308, 1.6e308, -1e308, 0]),
    (2.0, 1e308, [1.7e308, 1e308, 1, 0]),
    (1e308, 1e308, [1e-308, 3e-308, 1, 0]),
    (1e-308, None, [1.7e308, 1e308, -1.7e308, 0]),
    (1e-310, None, [1.7e308, -math.inf, -1.7e308, 0]),
    (1e-310, 1e-300, [1.7e308, 1e308, -1.7e308, 0]),
]


def exact(row, y, scale, cap):
    """Return the loss, the gradient and the largest logit after scale and cap that is finite, of exact inputs."""
    values, places, counts = np.unique(row, return_inverse=True, return_counts=True)
    with mpmath.workdps(700):  # tanh and 1 - tanh^2 of arguments down to 1e-340
        scale = mpmath.mpf(scale)
        x = [scale * mpmath.mpf(float(v)) for v in values]
        slopes = [scale] * len(x)
        if cap is not None:
            slopes = [scale * mpmath.sech(v / cap) ** 2 if mpmath.isfinite(v) else mpmath.mpf(0) for v in x]
            x = [cap * (mpmath.tanh(v / cap) if mpmath.isfinite(v) else mpmath.sign(v)) for v in x]
        top = max(x)
        e = [mpmath.exp(v - top) for v in x]
        s = mpmath.fsum(int(n) * v for n, v in zip(counts, e, strict=True))
        p = [v / s for v in e]
        loss = mpmath.log(s) + top - x[places[y]]
        grad = [slopes[i] * (p[i] - (k == y)) for k, i in enumerate(places)]
        size = max(abs(v) for v in x if mpmath.isfinite(v))
        return float(loss), np.array([float(g) for g in grad]), float(size)


@pytest.mark.parametrize("width", slow_except([4], [4, 40]), ids=["TILE", "WARP"])
@pytest.mark.parametrize(("dtype", "cases"), [(np.float32, FLOAT32), (np.float64, FLOAT64)], ids=["float32", "float64"])
@pytest.mark.parametrize("is_flushed", slow_except([False], [False, True]), ids=["kept", "flushed"])
def test_scale_and_softcap_out_of_range_of_their_quotient(xp, request, dtype, cases, is_flushed, width):
    if is_flushed:
        if dtype == np.float64:
            pytest.skip("float64 has its small numbers on a device as well")
        request.getfixturevalue("flush")
    eps, tiny = (float(getattr(np.finfo(dtype), name)) for name in ("eps", "tiny"))
    for scale, cap, values in cases:
        row = np.array(values, dtype)
        row = np.concatenate([row, np.full(width - len(row), row.min(), dtype)])
        scale, cap = dtype(scale), cap if cap is None else dtype(cap)  # what the arithmetic gets is exact then
        for y in range(3):
            loss, grad, size = exact(row, y, float(scale), None if cap is None else float(cap))
            got_loss, got_grad = call_on(
                xp,
                fastce.cross_entropy_with_grad,
                row[None],
                np.array([y]),
                logit_scale=float(scale),
                softcap=None if cap is None else float(cap),
            )
            what = f"{scale} {cap} {values} {y}"
            # A logit after scale and cap has a few roundings of its size, which an exponential turns into as much of
            # itself. What the device takes for 0 is less than `tiny`.
            slack = 8 * eps * (1 + size)
            assert_within(got_loss, loss, slack + 8 * eps * abs(loss) + tiny, f"{what} loss")
            assert_within(got_grad[0], grad, min(slack, 1) * float(scale) + tiny, f"{what} grad")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steps_are_in_range_and_make_the_quotient(dtype, rng):
    info = np.finfo(dtype)
    largest, least = float(info.max), float(info.smallest_subnormal)
    numbers = [least, float(info.tiny), 1e-20, 0.3, 1.0, 2.0, 50.0, 1e20, largest / 2, largest]
    for a in numbers:
        for b in numbers:
            first, rest = _task.steps_of(a, b, np.dtype(dtype))
            for step in (first, rest):
                assert info.tiny <= dtype(step) <= info.max
            assert not (first > 2 and rest < 1) and not (first < 0.5 and rest > 1)
            with mpmath.workdps(40):
                quotient = mpmath.mpf(a) / mpmath.mpf(b)
                product = mpmath.mpf(first) * mpmath.mpf(rest)
                if max(quotient, product) * largest < 2**-30 or min(quotient, product) * least > 1000:
                    continue  # tanh is the identity, or 1, whatever the logit
                assert abs(product / quotient - 1) < 4 * np.finfo(float).eps, (a, b)
    assert _task.steps_of(1.0, math.inf, np.dtype(dtype)) == (0, 0)


def signed(rng, shape):
    """Return weights of both signs, some of them 0, whose sum is not near 0."""
    return rng.uniform(0.5, 2, shape) * np.where(rng.random(shape) < 0.3, -1, 1) * (rng.random(shape) < 0.8)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("smoothing", slow_except([0.0], [0.0, 0.1]))
@pytest.mark.parametrize("family", FEW)
def test_weights_may_have_any_sign(xp, family, kind, smoothing, reduction, rng):
    """Every loss and gradient is linear in the weights, and a mean divides by their signed sum."""
    logits = make_logits(rng, SHAPES[family], np.float32)
    target = make_target(rng, kind, logits.shape)
    rows = row_shape(logits.shape)
    weight, sample_weight = signed(rng, logits.shape[1]).astype(np.float32), signed(rng, rows)
    sample_weight.flat[0] = 0  # skipped, whatever it holds
    at_first = np.unravel_index(0, rows)
    logits[(at_first[0], slice(None), *at_first[1:])] = np.nan
    options = {"label_smoothing": smoothing, "z_loss": 0.01}
    # The definition takes row weights without their sign here, which is put back afterwards.
    expected = _reference.cross_entropy(
        logits, target, weight=weight, sample_weight=np.abs(sample_weight), reduction="none", **options
    )
    bounds = Bounds(
        expected,
        logits,
        target,
        weight=np.abs(weight),
        sample_weight=np.abs(sample_weight),
        reduction="none",
        **options,
    )
    sign = np.sign(sample_weight)
    kept = sample_weight != 0
    loss, grad = expected.loss * sign, expected.grad * np.expand_dims(sign, 1)
    loss_bound, grad_bound = bounds.loss, bounds.grad
    if reduction != "none":
        normalizer = 1.0
        if reduction == "mean":
            normalizer = (
                math.fsum((sample_weight * weight[target])[kept]) if kind == "index" else math.fsum(sample_weight.flat)
            )
            if abs(normalizer) < 0.1:  # which would make errors of the terms, too, ten times as large
                pytest.skip("the weights cancel")
        loss = math.fsum(loss[kept]) / normalizer
        loss_bound = np.sum(bounds.loss[kept]) / abs(normalizer)
        grad, grad_bound = grad / normalizer, grad_bound / abs(normalizer)
    grad = np.where(np.expand_dims(kept, 1), grad, 0)
    x = to_device(xp, logits)
    got_loss, got_grad, stats = to_host(
        fastce.cross_entropy_with_grad(
            x,
            xp.asarray(target),
            weight=xp.asarray(weight),
            sample_weight=xp.asarray(sample_weight),
            reduction=reduction,
            return_stats=True,
            out=x,
            **options,
        )
    )
    assert_within(got_loss, loss, loss_bound, "loss")
    assert_within(got_grad, grad, grad_bound, "grad")
    assert_stats(stats, expected.stats, bounds, logits, family)


@pytest.mark.parametrize("on_empty", ["nan", "zero"])
@pytest.mark.parametrize("weights", ["zero", "cancelling"])
@pytest.mark.parametrize("family", FEW)
def test_statistics_in_place_of_a_mean_without_a_divisor(xp, family, weights, on_empty, rng):
    logits = make_logits(rng, SHAPES[family], np.float32)
    target = np.zeros(row_shape(logits.shape), int)
    target.flat[::2] = 1
    weight, sample_weight = np.ones(logits.shape[1]), np.ones(target.shape)
    if weights == "zero":
        weight[:] = 0
    else:
        sample_weight.flat[1:] = 0
        sample_weight.flat[0], sample_weight.flat[-1] = -3, 3
    kept = sample_weight != 0
    plain = _reference.cross_entropy(logits, target, sample_weight=np.abs(sample_weight))
    bounds = Bounds(plain, logits, target)
    x = to_device(xp, logits)
    loss, grad, stats = to_host(
        fastce.cross_entropy_with_grad(
            x,
            xp.asarray(target),
            weight=xp.asarray(weight),
            sample_weight=xp.asarray(sample_weight),
            on_empty=on_empty,
            out=x,
            return_stats=True,
        )
    )
    assert np.array_equal(loss, np.float32("nan" if on_empty == "nan" else 0), equal_nan=True)
    assert not grad.any()
    assert (stats.argmax[kept] >= 0).all()
    assert_stats(stats, plain.stats, bounds, logits, family)


@pytest.mark.parametrize("n_rows", [8000, 100_000])
def test_normalizers_of_long_batches_are_exact_to_rounding(xp, n_rows, rng):
    """A thread adds a few numbers, and the rest is a tree: its depth bounds the roundings, not the number of rows."""
    sample_weight = rng.uniform(0.5, 2, n_rows)
    x, y = xp.asarray(rng.standard_normal((n_rows, 2))), xp.asarray(rng.integers(0, 2, n_rows))
    a = xp.asarray(sample_weight)
    mean, grad = to_host(fastce.cross_entropy_with_grad(x, y, sample_weight=a))
    _, whole = to_host(fastce.cross_entropy_with_grad(x, y, sample_weight=a, reduction="sum"))
    losses = call_on(xp, fastce.cross_entropy, x, y, reduction="none")
    normalizer = math.fsum(sample_weight)
    depth = 2 * np.log2(n_rows)
    eps = np.finfo(float).eps
    assert abs(float(mean) * normalizer / math.fsum(losses * sample_weight) - 1) < depth * eps
    assert np.abs(grad * normalizer / whole - 1).max() < depth * eps


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-300, 1e300])
def test_normalizers_whose_inverse_is_out_of_range(xp, size):
    """A row's share of the whole is in range: 1/3, 2/3."""
    logits, target = np.array([[1.0, 2.0], [0.5, -0.5]]), np.array([0, 1])
    shares = np.array([1.0, 2.0])
    expected = _reference.cross_entropy(logits, target, sample_weight=shares)
    _, grad = call_on(xp, fastce.cross_entropy_with_grad, logits, target, sample_weight=size * shares)
    assert_within(grad, expected.grad, 1e-15, "grad")


def relatives(xp, logits, i):
    """Yield the i-th row of a matrix on the device in batches of its own, and what it is called there."""
    row = logits[i : i + 1].get()
    yield "a slice of the batch", logits[i : i + 1]
    yield "a slice of one dimension", logits[i]
    yield "a slice of two axes", logits[i : i + 1, None]
    if logits.shape[1] * logits.itemsize % 16 == 0 or logits.shape[1] * logits.itemsize <= 256:
        yield "alone", xp.asarray(row)
        yield "alone, of one dimension", xp.asarray(row[0])
        yield "last of many", xp.asarray(np.concatenate([np.zeros_like(row)] * 300 + [row]))
        padded = xp.full((3, logits.shape[1] + 16), np.nan, logits.dtype)[:, :-16]
        padded[...] = xp.asarray(np.repeat(row, 3, 0))
        yield "among rows with gaps", padded
        batch = xp.full((2, 3, 2, logits.shape[1]), np.nan, logits.dtype)[:, 1:]
        batch[...] = xp.asarray(np.broadcast_to(row, (2, 2, 2, row.shape[1])))
        yield "in a part of more axes", batch


@pytest.mark.parametrize("dtype", slow_except([np.float32], DTYPES), ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("n_classes", slow_except([100], [2, 10, 13, 32, 61, 100, 1000, 1003, 1020, 2003, 5008]))
def test_a_row_has_the_same_bits_in_every_batch(xp, n_classes, dtype, rng):
    """Alone, at any place, with any gaps, and wherever its gradient goes.

    Rows that are longer than 256 bytes have to begin at the same place within 16: that decides which thread adds what.
    """
    logits = xp.asarray(make_logits(rng, (7, n_classes), dtype))
    y = rng.integers(0, n_classes, 7)

    def solve(x, out=None):
        """Return the bits of the last row's results."""
        target = xp.full(x.shape[:-1], y[i], np.int64)
        axis = x.ndim - 1
        loss, grad, stats = fastce.cross_entropy_with_grad(
            x, target, axis=axis, label_smoothing=0.1, reduction="none", return_stats=True, out=out
        )
        alone = fastce.cross_entropy(x, target, axis=axis, label_smoothing=0.1, reduction="none")
        lse = fastce.logsumexp(x, axis=axis)
        arrays = (loss, alone, stats.lse, lse, stats.entropy, stats.log_prob, grad)
        p, log_p = fastce.softmax(x, axis=axis), fastce.log_softmax(x, axis=axis)
        return [a.get().reshape(-1)[-1:].tobytes() for a in arrays[:-1]] + [
            a.get().reshape(-1, n_classes)[-1].tobytes() for a in (grad, p, log_p)
        ]

    i = 5
    expected = solve(logits[: i + 1])
    for name, x in relatives(xp, logits, i):
        assert solve(x) == expected, name
        layouts = {
            "C": xp.empty(x.shape, dtype),
            "F": xp.empty(x.shape, dtype, order="F"),
            "padded": xp.empty((*x.shape[:-1], n_classes + 3), dtype)[..., 1:-2],
            "step": xp.empty((*x.shape[:-1], 2 * n_classes), dtype)[..., ::2],
            "reversed": xp.empty(x.shape, dtype)[..., ::-1],
        }
        for layout, out in layouts.items():
            assert solve(x, out) == expected, f"{name}, into {layout}"


def test_a_column_has_the_same_bits_in_every_batch(xp, rng):
    for n_classes in (7, 50):
        logits = make_logits(rng, (4, n_classes, 33), np.float32)
        y = rng.integers(0, n_classes, (4, 33))
        whole = call_on(xp, fastce.cross_entropy_with_grad, logits, y, reduction="none")
        part = call_on(xp, fastce.cross_entropy_with_grad, logits[2:3, :, 30:32], y[2:3, 30:32], reduction="none")
        assert np.array_equal(whole[0][2:3, 30:32], part[0]) and np.array_equal(whole[1][2:3, :, 30:32], part[1])


def test_more_than_32_bits_can_count_is_refused(xp):
    if xp is not fake_cupy:
        pytest.skip("NumPy makes such arrays of a single number")
    before = len(fake_cupy.launches)
    x = np.broadcast_to(xp.zeros((1, 1), np.float16), (1, 2**31 - 15))
    with pytest.raises(ValueError, match=r"logits must have at most 2\*\*31 - 16 classes on a GPU, got 2147483633"):
        fastce.cross_entropy(x, xp.zeros(1, np.int64))
    x = np.broadcast_to(xp.zeros((1, 2003), np.float32), (2**31, 2003))
    y = np.broadcast_to(xp.zeros(1, np.int64), (2**31,))
    with pytest.raises(ValueError, match="logits must have fewer rows on a GPU, got 2147483648 of 2003 classes"):
        fastce.cross_entropy(x, y)
    assert len(fake_cupy.launches) == before
