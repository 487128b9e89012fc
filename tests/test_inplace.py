"""Where the gradient goes: over the logits, into another array or into a new one, always with the same bits."""

import numpy as np
import pytest

import fastce
from cases import LAYOUTS, OPTION_SETS, make_logits, make_target, options_for, row_shape
from guard import before_a_guard, behind_a_guard
from oracle import assert_equal

SHAPES = [(70,), (20, 7), (40, 64), (5, 300), (2, 5000), (3, 5, 18), (2, 3, 2, 5)]
KINDS = ["index", "prob"]


def problems(rng, dtype, kind):
    for shape in SHAPES:
        for names in ("plain", "softcap", "all"):
            options = options_for(rng, OPTION_SETS[names], kind, shape)
            yield f"{shape} {names}", make_logits(rng, shape, dtype), make_target(rng, kind, shape), options


@pytest.mark.every_isa(by_default=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_has_the_bits_of_a_new_gradient(dtype, kind, layout, rng):
    for what, x, target, options in problems(rng, dtype, kind):
        logits = LAYOUTS[layout](x)
        loss, grad = fastce.cross_entropy_with_grad(logits, target, **options)
        assert_equal(logits, x, err_msg=what)
        in_place_loss, in_place = fastce.cross_entropy_with_grad(logits, target, out=logits, **options)
        assert in_place is logits
        assert_equal(in_place_loss, loss, err_msg=what)
        assert_equal(logits, grad, err_msg=what)


@pytest.mark.every_isa(by_default=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_out_does_not_change_the_bits(dtype, kind, layout, rng):
    for what, logits, target, options in problems(rng, dtype, kind):
        loss, grad = fastce.cross_entropy_with_grad(logits, target, **options)
        out = LAYOUTS[layout](np.full(logits.shape, 7, dtype))
        out_loss, returned = fastce.cross_entropy_with_grad(logits, target, out=out, **options)
        assert returned is out
        assert_equal(out_loss, loss, err_msg=what)
        assert_equal(out, grad, err_msg=what)


@pytest.mark.parametrize("shape", [(20, 7), (3, 5, 18), (2, 3, 4, 5)])
def test_a_new_gradient_keeps_the_memory_order(shape, rng):
    target = make_target(rng, "index", shape)
    for permutation in (range(len(shape)), reversed(range(len(shape))), np.roll(range(len(shape)), 1)):
        permutation = list(permutation)
        memory = np.zeros([shape[k] for k in permutation], np.float32)
        logits = memory.transpose(np.argsort(permutation))
        assert logits.shape == shape
        grad = fastce.cross_entropy_with_grad(logits, target)[1]
        assert grad.strides == logits.strides
        assert not np.shares_memory(grad, logits)
        assert fastce.softmax(logits).strides == logits.strides


def test_gaps_in_the_logits_are_not_copied(rng):
    """The new gradient of a strided view is dense."""
    logits = make_logits(rng, (20, 70), np.float32)[::2, ::7]
    grad = fastce.cross_entropy_with_grad(logits, make_target(rng, "index", logits.shape))[1]
    assert grad.flags.c_contiguous


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_never_written(dtype, kind, rng):
    """All of them read-only: a write would end the process or raise."""
    for _, logits, target, options in problems(rng, dtype, kind):
        rows = row_shape(logits.shape)
        arrays = [logits, target, grad_output := rng.random(rows)]
        arrays += [value for value in options.values() if isinstance(value, np.ndarray)]
        for array in arrays:
            array.flags.writeable = False
        before = [array.tobytes() for array in arrays]
        fastce.cross_entropy(logits, target, **options)
        fastce.cross_entropy_stats(logits, target, **options)
        fastce.cross_entropy_with_grad(logits, target, reduction="none", grad_output=grad_output, **options)
        fastce.softmax(logits)
        fastce.log_softmax(logits)
        fastce.logsumexp(logits)
        assert [array.tobytes() for array in arrays] == before


def test_memory_mapped_files_serve_as_logits_and_as_out(tmp_path, rng):
    logits = make_logits(rng, (40, 30), np.float32)
    target = make_target(rng, "index", logits.shape)
    expected_loss, expected = fastce.cross_entropy_with_grad(logits, target)
    path = tmp_path / "logits"
    logits.tofile(path)
    mapped = np.memmap(path, np.float32, mode="r", shape=logits.shape)
    loss, grad = fastce.cross_entropy_with_grad(mapped, target)
    assert loss == expected_loss
    assert type(grad) is np.ndarray
    assert_equal(grad, expected)
    writable = np.memmap(path, np.float32, mode="r+", shape=logits.shape)
    loss, grad = fastce.cross_entropy_with_grad(writable, target, out=writable)
    writable.flush()
    assert loss == expected_loss
    assert_equal(np.fromfile(path, np.float32).reshape(logits.shape), expected)


def test_lists_and_other_array_likes_are_converted():
    logits = [[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]
    expected_loss, expected = fastce.cross_entropy_with_grad(np.array(logits), np.array([1, 2]))
    loss, grad = fastce.cross_entropy_with_grad(logits, [1, 2])
    assert loss == expected_loss
    assert_equal(grad, expected)
    assert logits == [[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]
    weighted = fastce.cross_entropy(logits, [1, 2], weight=[1, 2, 3], sample_weight=[0.5, 1])
    assert weighted == fastce.cross_entropy(
        np.array(logits), np.array([1, 2]), weight=np.array([1, 2, 3]), sample_weight=np.array([0.5, 1])
    )
    prob = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert fastce.cross_entropy(logits, prob) == pytest.approx(expected_loss, rel=1e-15)
    assert fastce.cross_entropy([0.0, 0.0], 1) == np.log(2)
    assert np.isnan(fastce.cross_entropy(np.empty((0, 3)), []))


@pytest.mark.every_isa(by_default=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_works_in_place(dtype, name, layout, rng):
    function = getattr(fastce, name)
    for shape in SHAPES:
        for axis in range(len(shape)):
            x = LAYOUTS[layout](make_logits(rng, shape, dtype))
            expected = function(x, axis=axis)
            other = np.full_like(x, 7)
            assert function(x, axis=axis, out=other) is other
            assert_equal(other, expected)
            assert function(x, axis=axis, out=x) is x
            assert_equal(x, expected)


@pytest.mark.every_isa
@pytest.mark.parametrize("place", [behind_a_guard, before_a_guard])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "float_type"),
    [((10_000, 1001), "f4"), ((80_000, 129), "f4"), ((300, 35_001), "f4"), ((5000, 1003), "f8")],
)
def test_large_gradients_go_past_the_caches(shape, float_type, smoothing, place, rng):
    """More than 32 MB, which many caches hold, into an array between guards; rows begin anywhere in a cache line."""
    logits = 3 * rng.standard_normal(shape, float_type)
    target = rng.integers(shape[1], size=shape[0])
    target[::7] = -100
    target[:4] = [0, shape[1] - 1, 15, 16]  # at the ends of lines
    out = place(np.full(shape, np.nan, float_type))
    loss, grad = fastce.cross_entropy_with_grad(
        logits,
        target,
        out=out,
        reduction="none",
        label_smoothing=smoothing,
        grad_output=np.full(shape[0], 0.5, float_type),
    )
    assert grad is out
    spread = 1 + np.log(shape[1])
    few_eps = 8 * np.finfo(float_type).eps * spread
    for rows in np.array_split(np.arange(shape[0]), 20):
        shifted = logits[rows] - logits[rows].max(axis=1, keepdims=True).astype(np.float64)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        kept = target[rows] >= 0
        q = np.full(log_p.shape, smoothing / shape[1])
        q[np.arange(len(rows))[kept], target[rows][kept]] += 1 - smoothing
        expected = 0.5 * kept[:, None] * (np.exp(log_p) - q)
        # p and q are off by a few eps each, p by one more for each unit of its logarithm.
        np.testing.assert_array_less(abs(grad[rows] - expected), few_eps * (np.exp(log_p) * (1 - log_p) + q) + 1e-300)
        np.testing.assert_allclose(loss[rows], -(q * log_p).sum(axis=1) * kept, rtol=few_eps, atol=few_eps)
