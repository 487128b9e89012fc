"""The device's functions against the definition: the CPU's test bodies, over arrays and kernels of the GPU.

Every kernel family, with every option, type and layout it meets. Where there is no GPU the same kernels run on the host
(fake_cupy.py), on a device with so little shared memory that short rows will do.
"""

import re

import ml_dtypes
import numpy as np
import pytest

import fake_cupy
import fastce
import fastce.cuda
from cases import OPTION_SETS, make_logits, make_target, options_for, row_shape, slow_except
from device import LAYOUTS, call_on, solve_on, to_device
from fastce import _reference
from oracle import Bounds, assert_matches_reference, assert_within

# float32 on the host's small device.
SHAPES = {
    "TILE": (300, 10),
    "TILE of 128": (130, 61),
    "WARP of 4": (33, 32),
    "WARP of 16": (9, 100),
    "WARP": (5, 1003),
    "BLOCK": (3, 2003),
    "BLOCK of 2": (3, 5003),
    "BLOCK of 8": (2, 20011),
    "STREAM": (2, 40009),
    "COLUMN in registers": (3, 5, 70),
    "COLUMN": (2, 50, 33),
}
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
FEW = ("TILE", "WARP", "BLOCK of 2", "STREAM", "COLUMN")
# Options that are no part of a kernel's source, and all options at once.
FEW_KERNELS = ("plain", "weight", "sample_weight", "ignore_index", "logit_scale", "z_loss", "all")


def geometries(since=0):
    """Return the family of each launch that works on rows, as in SHAPES."""
    names = []
    for launch in fake_cupy.launches[since:]:
        macro = dict(re.findall(r"#define FC_(\w+) (\w+)", launch["code"]))
        names.append((macro["FAMILY"], int(macro["THREADS"]), int(macro["LANES"]), int(macro["CLUSTER"])))
    return [name for name in names if name[0] != "TOTAL"]


@pytest.mark.parametrize("family", SHAPES)
def test_the_shapes_reach_their_families(xp, family, rng):
    if xp is not fake_cupy:
        pytest.skip("for the small device")
    start = len(fake_cupy.launches)
    logits = make_logits(rng, SHAPES[family], np.float32)
    call_on(xp, fastce.cross_entropy_with_grad, logits, make_target(rng, "index", logits.shape))
    ((name, threads, lanes, cluster),) = geometries(start)
    _, _, detail = family.partition(" of ")
    assert family.split()[0] == name
    if detail:
        assert int(detail) == {"TILE": threads, "WARP": lanes, "BLOCK": cluster}[name]


@pytest.mark.parametrize("dtype", slow_except([np.float32], DTYPES), ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("family", SHAPES)
def test_every_family_and_type_matches_the_definition(xp, family, dtype, rng):
    logits = make_logits(rng, SHAPES[family], dtype)
    target = make_target(rng, "index", logits.shape)
    target.flat[0] = -100
    assert_matches_reference(solve_on(xp), logits, target, family)


@pytest.mark.parametrize("kind", slow_except(["index"], ["index", "prob"]))
@pytest.mark.parametrize("names", slow_except(FEW_KERNELS, OPTION_SETS))
@pytest.mark.parametrize("family", FEW)
def test_every_option_matches_the_definition(xp, family, names, kind, rng):
    logits = make_logits(rng, SHAPES[family], np.float32)
    target = make_target(rng, kind, logits.shape).astype(int if kind == "index" else np.float32)
    options = options_for(rng, OPTION_SETS[names], kind, logits.shape)
    assert_matches_reference(solve_on(xp), logits, target, f"{family} {kind}", **options)


@pytest.mark.parametrize("dtype", slow_except([np.float32], DTYPES), ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("prob_dtype", slow_except([np.float64], DTYPES), ids=lambda t: np.dtype(t).name)
def test_every_type_of_probabilities_matches_the_definition(xp, dtype, prob_dtype, rng):
    logits = make_logits(rng, (5, 40), dtype)
    target = make_target(rng, "prob", logits.shape).astype(prob_dtype)
    assert_matches_reference(solve_on(xp), logits, target)


@pytest.mark.parametrize("layout", slow_except([], LAYOUTS))
def test_every_layout_matches_the_definition(xp, layout, rng):
    for shape in [(70,), (20, 7), (5, 170), (3, 5, 18), (2, 3, 2, 5)]:
        for kind in ("index", "prob"):
            logits = make_logits(rng, shape, np.float32)
            target = make_target(rng, kind, shape).astype(int if kind == "index" else np.float32)
            options = options_for(rng, OPTION_SETS["all"], kind, shape)
            assert_matches_reference(solve_on(xp, layout), logits, target, f"{shape} {kind}", **options)


@pytest.mark.parametrize(
    "dtype", slow_except([np.float32], [np.float32, ml_dtypes.bfloat16]), ids=lambda t: np.dtype(t).name
)
@pytest.mark.parametrize("n_classes", [999, 2003])
def test_rows_may_begin_and_end_anywhere(xp, n_classes, dtype, rng):
    """Whatever is beside them is neither read nor written; the gradient may lie otherwise than the logits."""
    for before, after in [(0, 0), (1, 0), (3, 4), (7, 2)]:
        wide = make_logits(rng, (3, before + n_classes + after), dtype)
        inside = slice(before, before + n_classes)
        expected = _reference.cross_entropy(wide[:, inside], np.arange(3))
        bounds = Bounds(expected, wide[:, inside], np.arange(3))
        wide[:, :before] = wide[:, before + n_classes :] = np.nan
        x, y = xp.asarray(wide), xp.arange(3) if hasattr(xp, "arange") else xp.asarray(np.arange(3))
        out = xp.full((3, n_classes + 1), 7, dtype)[:, 1:]
        _, grad = fastce.cross_entropy_with_grad(x[:, inside], y, out=out)
        fastce.cross_entropy_with_grad(x[:, inside], y, out=x[:, inside])
        half = np.abs(expected.grad) * float(ml_dtypes.finfo(dtype).eps)
        assert_within(grad.get(), expected.grad, bounds.grad + half, f"{before} {after}")
        assert np.array_equal(x.get()[:, inside], grad.get())
        assert np.isnan(x.get()[:, :before].astype(float)).all()
        assert np.isnan(x.get()[:, before + n_classes :].astype(float)).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_reduction_matches_the_definition(xp, reduction, rng):
    for shape in [(9,), (33, 7), (4, 70, 3)]:
        logits = make_logits(rng, shape, np.float32)
        target = make_target(rng, "index", shape)
        options = options_for(rng, OPTION_SETS["all"], "index", shape)
        grad_output = np.asarray(rng.standard_normal(row_shape(shape)) if reduction == "none" else -1.75)
        for value in (grad_output, float(grad_output)) if reduction != "none" else (grad_output,):
            assert_matches_reference(
                solve_on(xp), logits, target, f"{shape}", grad_output=value, reduction=reduction, **options
            )


def test_long_batches_are_summed_by_many_blocks(xp, rng):
    logits = make_logits(rng, (5000, 3), np.float32)
    target = make_target(rng, "index", logits.shape)
    options = options_for(rng, OPTION_SETS["all"], "index", logits.shape)
    assert_matches_reference(solve_on(xp), logits, target, **options)


@pytest.mark.parametrize("family", slow_except(["WARP"], FEW))
def test_softmax_and_its_relatives_match_the_definition(xp, family, rng):
    x = make_logits(rng, SHAPES[family], np.float32)
    axis = 1
    eps = np.finfo(np.float32).eps
    p, log_p, lse = (getattr(_reference, name)(x, axis=axis) for name in ("softmax", "log_softmax", "logsumexp"))
    slack = 16 * eps
    assert_within(call_on(xp, fastce.softmax, x, axis=axis), p, slack * p, "softmax")
    assert_within(call_on(xp, fastce.log_softmax, x, axis=axis), log_p, slack * (1 + np.abs(log_p)), "log_softmax")
    assert_within(call_on(xp, fastce.logsumexp, x, axis=axis), lse, slack * (1 + np.abs(lse)), "logsumexp")
    target = make_target(rng, "index", x.shape)
    got = call_on(xp, fastce.nll_loss, log_p.astype(np.float32), target, axis=axis, reduction="none")
    assert_within(got, _reference.nll_loss(log_p, target, axis=axis, reduction="none"), slack * 40, "nll_loss")
    prob = make_target(rng, "prob", x.shape)
    got = call_on(xp, fastce.nll_loss, log_p.astype(np.float32), prob, axis=axis, reduction="none")
    assert_within(got, _reference.nll_loss(log_p, prob, axis=axis, reduction="none"), slack * 40, "nll_loss")


def test_logsumexp_of_infinite_rows(xp):
    rows = np.float32([[-np.inf, -np.inf], [np.inf, 0], [np.inf, np.nan], [0, -np.inf], [np.inf, np.inf], [3e38, 3e38]])
    assert np.array_equal(
        call_on(xp, fastce.logsumexp, rows), np.float32([-np.inf, np.inf, np.nan, 0, np.inf, 3e38]), equal_nan=True
    )


@pytest.mark.parametrize("family", slow_except(["TILE", "STREAM"], FEW))
def test_statistics_alone_and_loss_alone_match_the_definition(xp, family, rng):
    logits = make_logits(rng, SHAPES[family], np.float32)
    target = make_target(rng, "index", logits.shape)
    expected = _reference.cross_entropy(logits, target)
    bounds = Bounds(expected, logits, target)
    stats = call_on(xp, fastce.cross_entropy_stats, logits, target)
    for name in ("lse", "log_prob", "entropy"):
        assert_within(getattr(stats, name), getattr(expected.stats, name), getattr(bounds, name), name)
    assert np.array_equal(stats.argmax, expected.stats.argmax)
    assert_within(call_on(xp, fastce.cross_entropy, logits, target), expected.loss, bounds.loss, "loss")


@pytest.mark.parametrize("family", SHAPES)
def test_confident_rows_keep_their_accuracy(xp, family, rng):
    """1 - p and -log p, where a subtraction from 1 would leave nothing."""
    logits = make_logits(rng, SHAPES[family], np.float32, spread=1.0)
    target = make_target(rng, "index", logits.shape)
    at = np.expand_dims(target, 1)
    np.put_along_axis(logits, at, np.float32(40), 1)
    expected = _reference.cross_entropy(logits, target, reduction="none")
    loss, grad = solve_on(xp)(logits, target, reduction="none")
    assert expected.loss.max() < 1e-10
    assert_within(loss, expected.loss, 1e-5 * expected.loss, "loss")
    wanted = np.take_along_axis(expected.grad, at, 1)
    assert_within(np.take_along_axis(grad, at, 1), wanted, 1e-5 * np.abs(wanted), "gradient of the target")


@pytest.mark.parametrize("family", FEW)
def test_what_is_not_finite_stays_in_its_row(xp, family, rng):
    logits = make_logits(rng, (5, *SHAPES[family][1:]), np.float32)
    y = np.zeros(row_shape(logits.shape), int)
    logits[0, 3] = np.nan
    logits[1, 4] = np.inf
    logits[2] = -np.inf
    logits[3, 1:] = -np.inf
    with np.errstate(invalid="ignore"):
        expected = _reference.cross_entropy(logits, y, reduction="none")
    loss, grad, stats = solve_on(xp)(logits, y, reduction="none", return_stats=True)
    assert np.array_equal(np.isnan(loss), np.isnan(expected.loss))
    assert np.isnan(loss[:3]).all() and np.isnan(grad[:3]).all() and (stats.argmax[:3] == -1).all()
    assert not loss[3].any() and not grad[3].any() and np.isfinite(grad[4]).all()
    only_other = np.ones_like(y)
    loss, grad = solve_on(xp)(logits, only_other, reduction="none")
    assert (loss[3] == np.inf).all() and (grad[3, 1] == -1).all() and (grad[3, 0] == 1).all()


@pytest.mark.parametrize("family", FEW)
def test_skipped_rows_are_zero_whatever_they_hold(xp, family, rng):
    logits = make_logits(rng, (6, *SHAPES[family][1:]), np.float32)
    y = make_target(rng, "index", logits.shape)
    logits[1] = logits[4] = np.nan
    y[1] = -100
    weights = np.ones(y.shape)
    weights[4] = 0
    loss, grad, stats = solve_on(xp)(logits, y, sample_weight=weights, return_stats=True)
    assert np.isfinite(loss)
    for i in (1, 4):
        assert not grad[i].any() and not stats.lse[i].any() and (stats.argmax[i] == -1).all()
    loss, grad = solve_on(xp)(logits, np.full_like(y, -100))
    assert np.isnan(loss) and not grad.any()
    assert call_on(xp, fastce.cross_entropy, logits, np.full_like(y, -100), on_empty="zero") == 0


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_every_integer_type_is_a_target(xp, dtype, rng):
    logits = make_logits(rng, (40, 10), np.float32)
    target = make_target(rng, "index", logits.shape)
    largest = np.iinfo(dtype).max
    target = target.astype(dtype)
    target[3] = largest
    assert_matches_reference(solve_on(xp), logits, target, ignore_index=int(largest))


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("bad", [-1, "C", 2**40])
def test_a_bad_target_is_told_late_and_harms_nothing(xp, family, bad, rng):
    logits = make_logits(rng, SHAPES[family], np.float32)
    target = make_target(rng, "index", logits.shape)
    value = logits.shape[1] if bad == "C" else bad
    target.flat[1] = value
    x, y = xp.asarray(logits), xp.asarray(target)
    loss, grad = fastce.cross_entropy_with_grad(x, y, reduction="none")
    rest = np.delete(np.arange(target.size), 1)
    good_loss = _reference.cross_entropy(logits, np.where(target == value, 0, target), reduction="none").loss
    assert np.isnan(loss.get().flat[1])
    assert np.allclose(loss.get().flat[rest], good_loss.flat[rest], rtol=1e-4)
    assert not np.moveaxis(grad.get(), 1, -1).reshape(-1, logits.shape[1])[1].any()
    place = ", ".join(str(i) for i in np.unravel_index(1, target.shape))
    message = re.escape(f"target[{place}] is {value}, but there are {logits.shape[1]} classes")
    with pytest.raises(IndexError, match=message):
        fastce.cuda.check_errors()
    fastce.cuda.check_errors()  # told once
    assert np.isnan(float(fastce.cross_entropy(x, y)))
    if xp is not fake_cupy:
        xp.cuda.Device().synchronize()
    with pytest.raises(IndexError, match=message):
        fastce.softmax(x)
    with fastce.cuda.synchronous_checks(), pytest.raises(IndexError, match=message):
        fastce.cross_entropy_with_grad(x, y, out=x)
    assert np.array_equal(x.get(), logits)


@pytest.mark.parametrize("name", ["weight", "sample_weight"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_by_who_waits(xp, name, bad, rng):
    x, y = xp.asarray(make_logits(rng, (3, 3), np.float32)), xp.asarray(np.array([0, 1, 2]))
    fastce.cross_entropy(x, y, **{name: xp.asarray(np.array([1.0, bad, 1.0]))})
    with fastce.cuda.synchronous_checks():
        fastce.cross_entropy(x, y, **{name: xp.asarray(np.array([1.0, -1.0, 2.0]))})
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            fastce.cross_entropy(x, y, **{name: xp.asarray(np.array([1.0, bad, 1.0]))})


@pytest.mark.parametrize("name", ["logits", "target", "prob", "weight", "sample_weight", "grad_output", "out"])
def test_numbers_at_odd_addresses_are_refused(xp, name, rng):
    """A device that reads such a number stops for good."""
    logits, target = make_logits(rng, (6, 3), np.float32), rng.integers(0, 3, 6)
    prob = make_target(rng, "prob", logits.shape)
    arrays = {
        "logits": logits,
        "target": target,
        "weight": np.ones(3),
        "sample_weight": np.ones(6),
        "grad_output": np.ones(6),
        "out": np.zeros_like(logits),
    }
    if name == "prob":
        name, arrays["target"] = "target", prob
    moved = {key: xp.asarray(array) for key, array in arrays.items()}
    odd = xp.zeros(arrays[name].nbytes + 1, np.uint8)[1:].view(arrays[name].dtype).reshape(arrays[name].shape)
    moved[name] = odd
    x, y = moved.pop("logits"), moved.pop("target")
    with pytest.raises(ValueError, match=f"{name} must be aligned"):
        fastce.cross_entropy_with_grad(x, y, reduction="none", **moved)
    if name != "out":
        assert not moved["out"].get().any()


def test_host_and_device_do_not_mix(xp, rng):
    logits, target = make_logits(rng, (4, 3), np.float32), np.array([0, 1, 2, 0])
    x, y = xp.asarray(logits), xp.asarray(target)
    with pytest.raises(TypeError, match="target must be on the GPU like the logits, got ndarray on the host"):
        fastce.cross_entropy(x, target)
    with pytest.raises(TypeError, match="weight must be on the GPU like the logits, got list on the host"):
        fastce.cross_entropy(x, y, weight=[1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="target must be a NumPy array like every other argument, got a CuPy array"):
        fastce.cross_entropy(logits, y)
    with pytest.raises(TypeError, match="out must be on the GPU"):
        fastce.cross_entropy_with_grad(x, y, out=logits)
    with pytest.raises(TypeError, match="out must be a NumPy array"):
        fastce.cross_entropy_with_grad(logits, target, out=x)


def test_a_bad_out_is_refused(xp, rng):
    x, y = xp.asarray(make_logits(rng, (6, 3), np.float32)), xp.asarray(np.zeros(6, int))
    with pytest.raises(ValueError, match="out must be logits itself or share no memory"):
        fastce.cross_entropy_with_grad(x[1:], y[1:], out=x[:-1])
    with pytest.raises(ValueError, match="out must have the shape of logits"):
        fastce.cross_entropy_with_grad(x, y, out=x[1:])
    with pytest.raises(ValueError, match="out must have the dtype of logits"):
        fastce.cross_entropy_with_grad(x, y, out=xp.empty((6, 3), np.float64))


def test_nothing_in_nothing_out(xp):
    x, y = xp.empty((0, 5), np.float32), xp.empty((0,), np.int64)
    assert np.isnan(float(fastce.cross_entropy(x, y)))
    assert float(fastce.cross_entropy(x, y, on_empty="zero")) == 0
    assert float(fastce.cross_entropy(x, y, reduction="sum")) == 0
    loss, grad = fastce.cross_entropy_with_grad(x, y, reduction="none")
    assert loss.shape == (0,) and grad.shape == (0, 5)
    with pytest.raises(ValueError, match="at least one class"):
        fastce.cross_entropy(xp.empty((2, 0), np.float32), xp.asarray(np.zeros(2, int)))


@pytest.mark.parametrize("family", FEW)
def test_the_same_call_gives_the_same_bits(xp, family, rng):
    logits = make_logits(rng, SHAPES[family], np.float32)
    target = make_target(rng, "index", logits.shape)
    first = solve_on(xp)(logits, target)
    again = solve_on(xp)(logits, target)
    assert first[0] == again[0] and np.array_equal(first[1], again[1])


class Foreign:
    """An array of another library, which speaks the CUDA array interface and nothing else."""

    def __init__(self, array):
        self.array = array

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__


def test_arrays_of_other_libraries_are_taken_as_they_are(xp, rng):
    logits, target = make_logits(rng, (6, 3), np.float32), np.array([0, 1, 2, 0, 1, 2])
    expected = _reference.cross_entropy(logits, target)
    x, y = xp.asarray(logits), xp.asarray(target)
    out = Foreign(x)
    loss, grad = fastce.cross_entropy_with_grad(Foreign(x), Foreign(y), out=out)
    assert grad is out
    assert np.allclose(float(loss), expected.loss, rtol=1e-6)
    assert np.allclose(x.get(), expected.grad, atol=1e-7)


def test_the_loss_object_takes_them_too(xp, rng):
    logits, target = make_logits(rng, (6, 3), np.float32), np.array([0, 1, 2, 0, 1, 2])
    loss = fastce.CrossEntropyLoss(label_smoothing=0.1)
    got = call_on(xp, loss, logits, target)
    assert np.allclose(got, _reference.cross_entropy(logits, target, label_smoothing=0.1).loss, rtol=1e-6)


def test_a_mean_is_three_launches_and_nothing_else(xp, rng):
    if xp is not fake_cupy:
        pytest.skip("launches are recorded on the host")
    x, y = to_device(xp, make_logits(rng, (6, 3), np.float32)), xp.asarray(np.zeros(6, int))
    fastce.cross_entropy_with_grad(x, y, out=x)
    start = len(fake_cupy.launches)
    fastce.cross_entropy_with_grad(x, y, out=x)
    assert len(fake_cupy.launches) - start == 3
    start = len(fake_cupy.launches)
    fastce.cross_entropy_with_grad(x, y, out=x, reduction="none")
    assert len(fake_cupy.launches) - start == 1
