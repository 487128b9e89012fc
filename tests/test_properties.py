"""Properties: the definition holds whatever the shape, axis, strides, types and options; and invariants."""

import numpy as np
import pytest

import fastce
from cases import row_shape
from fastce import _reference
from oracle import Bounds, assert_curvatures, assert_equal, assert_matches_reference, assert_within

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
pytestmark = pytest.mark.every_isa(by_default=True)

INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
SPECIAL = (-np.inf, 0.0, -0.0, 1e4, -1e4, 3e38, 1e-40, 88.0, -104.0)  # of a logit now and then
settings = hypothesis.settings(
    max_examples=100,
    deadline=None,  # the first call of a process starts threads
    derandomize=True,  # the same examples in every run
    database=None,
)


def strided(draw, array, rng):
    """Return an equal array with the dimensions in any order in memory, steps and directions."""
    order = draw(st.permutations(range(array.ndim)))
    steps = [draw(st.sampled_from((1, 1, 2, -1, -3))) for _ in order]
    base = rng.integers(0, 7, [abs(step) * array.shape[k] for k, step in zip(order, steps, strict=True)])
    view = np.asarray(base, array.dtype)[(*(slice(None, None, step) for step in steps), ...)]
    view = view.transpose(np.argsort(order))
    view[...] = array
    return view


def assert_equal_but_for_subnormals(actual, expected):
    """Powers of two do not round, except where the last places are cut off."""
    atol = 4 * np.finfo(expected.dtype).smallest_subnormal
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@st.composite
def problems(draw, special=True):
    """Return logits, target and options, all of them drawn; the numbers come from a drawn seed."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    n_classes = draw(st.one_of(st.integers(1, 12), st.sampled_from((16, 31, 64, 65, 200))))
    shape = tuple(n_classes if k == axis % len(shape) else n for k, n in enumerate(shape))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = draw(st.sampled_from((0.1, 3, 30))) * rng.standard_normal(shape)
    if special and draw(st.booleans()):
        logits = np.where(rng.random(shape) < 0.1, rng.choice(SPECIAL, shape), logits)
    dtype = draw(st.sampled_from((np.float32, np.float64)))
    logits = strided(draw, logits.astype(dtype), rng)

    rows = row_shape(shape, axis)
    options = {"axis": axis, "reduction": draw(st.sampled_from(("none", "mean", "sum")))}
    if draw(st.booleans()):
        integers = [name for name in INTEGERS if np.iinfo(name).max >= n_classes]
        target = strided(draw, rng.integers(0, n_classes, rows).astype(draw(st.sampled_from(integers))), rng)
        if draw(st.booleans()):
            options["ignore_index"] = draw(st.integers(-1, n_classes))
    else:
        target = rng.random(shape) * (rng.random(shape) < 0.6)
        target = strided(draw, target.astype(draw(st.sampled_from((np.float32, np.float64)))), rng)
    values = {
        "weight": rng.uniform(0, 2, n_classes) * (rng.random(n_classes) < 0.8),
        "sample_weight": rng.uniform(0, 2, rows) * (rng.random(rows) < 0.8),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1, 1.0))),
        "logit_scale": draw(st.sampled_from((0.5, 1.0, 2.7))),
        "softcap": draw(st.sampled_from((0.7, 30.0))),
        "z_loss": draw(st.sampled_from((0.0, 0.01))),
        "on_empty": draw(st.sampled_from(("nan", "zero"))),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(values)))) if draw(st.booleans()) else set()
    options |= {name: values[name] for name in sorted(chosen)}
    return logits, target, options


@settings
@hypothesis.given(problems(), st.integers(0, 2**32))
def test_everything_at_once_matches_the_definition(problem, seed):
    logits, target, options = problem
    rng = np.random.default_rng(seed)
    rows = row_shape(logits.shape, options["axis"])
    grad_output = rng.standard_normal(rows) if options["reduction"] == "none" else rng.standard_normal()
    assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, grad_output=grad_output, **options)


@hypothesis.settings(settings, max_examples=50)  # each holds seven sweeps against the definition
@hypothesis.given(problems(), st.data(), st.integers(0, 2**32))
def test_second_derivatives_match_the_definition(problem, data, seed):
    logits, target, options = problem
    rng = np.random.default_rng(seed)
    v = strided(data.draw, rng.standard_normal(logits.shape).astype(logits.dtype), rng)
    rows = row_shape(logits.shape, options["axis"])
    grad_output = rng.standard_normal(rows) if options["reduction"] == "none" else rng.standard_normal()
    assert_curvatures(logits, target, v, grad_output=grad_output, **options)


@settings
@hypothesis.given(problems(), st.integers(1, 4))
def test_the_ways_to_ask_agree(problem, n_threads):
    """In place, with other threads, as an object, over the last gradient: the same bits."""
    logits, target, options = problem
    loss, grad = fastce.cross_entropy_with_grad(logits, target, **options)
    work = logits.copy(order="K")
    other_loss, _ = fastce.cross_entropy_with_grad(work, target, out=work, n_threads=n_threads, **options)
    assert_equal(other_loss, loss)
    assert_equal(work, grad)
    for reuse_grad in (False, True):
        as_object = fastce.CrossEntropyLoss(**options, reuse_grad=reuse_grad)
        as_object.with_grad(np.negative(logits), target)
        other_loss, other = as_object.with_grad(logits, target)
        assert_equal(other_loss, loss)
        assert_equal(other, grad)


@settings
@hypothesis.given(problems(special=False), st.integers(-1000, 1000))
def test_a_shift_of_the_logits_changes_nothing(problem, shift):
    """Multiples of 1/8 take the shift without rounding: the same bits."""
    logits, target, options = problem
    hypothesis.assume("softcap" not in options and not options.get("z_loss"))
    logits = np.rint(8 * logits) / logits.dtype.type(8)
    loss, grad = fastce.cross_entropy_with_grad(logits, target, **options)
    other_loss, other = fastce.cross_entropy_with_grad(logits + logits.dtype.type(shift), target, **options)
    assert_equal(other_loss, loss)
    assert_equal(other, grad)


@settings
@hypothesis.given(problems(special=False), st.integers(0, 2**32))
def test_a_permutation_of_the_classes_permutes_the_gradient(problem, seed):
    logits, target, options = problem
    axis = options["axis"]
    order = np.random.default_rng(seed).permutation(logits.shape[axis])
    moved = dict(options)
    if target.dtype.kind == "f":
        moved_target = np.take(target, order, axis)
    else:
        moved_target = np.argsort(order)[target]
        if "ignore_index" in options:
            moved_target = np.where(target == moved.pop("ignore_index"), -100, moved_target)
    if "weight" in options:
        moved["weight"] = options["weight"][order]
    loss, grad = fastce.cross_entropy_with_grad(np.take(logits, order, axis), moved_target, **moved)
    expected_loss, expected = fastce.cross_entropy_with_grad(logits, target, **options)
    bounds = Bounds(_reference.cross_entropy(logits, target, **options), logits, target, **options)
    assert_within(loss, expected_loss, 2 * bounds.loss, "loss")
    assert_within(
        grad, np.take(expected, order, axis), 2 * np.take(np.broadcast_to(bounds.grad, grad.shape), order, axis), "grad"
    )


@settings
@hypothesis.given(problems())
def test_one_hot_probabilities_equal_indices(problem):
    """Except for the mean, whose divisor then knows no class weights."""
    logits, target, options = problem
    hypothesis.assume(target.dtype.kind != "f")
    options = {**options, "reduction": "none"}
    axis = options["axis"] % logits.ndim
    expected = fastce.cross_entropy_with_grad(logits, target, **options)
    bounds = Bounds(_reference.cross_entropy(logits, target, **options), logits, target, **options)
    if "ignore_index" in options:
        ignored = target == options.pop("ignore_index")
        options["sample_weight"] = np.where(ignored, 0, options.get("sample_weight", 1.0))
    classes = np.arange(logits.shape[axis]).reshape([-1 if k == axis else 1 for k in range(logits.ndim)])
    one_hot = (np.expand_dims(target, axis) == classes).astype(logits.dtype)
    loss, grad = fastce.cross_entropy_with_grad(logits, one_hot, **options)
    assert_within(loss, expected[0], 2 * bounds.loss, "loss")
    assert_within(grad, expected[1], 2 * bounds.grad, "grad")


@settings
@hypothesis.given(problems(special=False))
def test_the_sum_is_the_mean_times_its_divisor(problem):
    logits, target, options = problem
    rows = row_shape(logits.shape, options["axis"])
    factor = np.broadcast_to(options.get("sample_weight", 1.0), rows)
    if target.dtype.kind != "f":
        factor = np.where(target == options.get("ignore_index", -100), 0, factor)
        factor = factor * np.broadcast_to(options.get("weight", 1.0), logits.shape[options["axis"]])[target]
    divisor = factor.sum()
    hypothesis.assume(divisor > 0)
    eps = 8 * np.finfo(logits.dtype).eps
    total, total_grad = fastce.cross_entropy_with_grad(logits, target, **{**options, "reduction": "sum"})
    mean, mean_grad = fastce.cross_entropy_with_grad(logits, target, **{**options, "reduction": "mean"})
    each = fastce.cross_entropy(logits, target, **{**options, "reduction": "none"})
    np.testing.assert_allclose(total, each.sum(dtype=np.float64), rtol=eps)
    np.testing.assert_allclose(mean * divisor, total, rtol=eps)
    options["reduction"] = "sum"
    bounds = Bounds(_reference.cross_entropy(logits, target, **options), logits, target, **options)
    assert_within(mean_grad * divisor, total_grad, bounds.grad, "grad")


@settings
@hypothesis.given(problems(), st.sampled_from((0.0, np.nan, np.inf, -np.inf)))
def test_skipped_rows_leave_the_others_untouched(problem, bad):
    """The same bits, whatever the skipped rows hold."""
    logits, target, options = problem
    options["reduction"] = "sum" if options["reduction"] == "mean" else options["reduction"]
    rows = row_shape(logits.shape, options["axis"])
    kept = np.random.default_rng(0).random(rows) < 0.5
    options["sample_weight"] = np.where(kept, options.get("sample_weight", 1.0), 0)
    logits = logits.copy(order="K")
    expected_loss, expected = fastce.cross_entropy_with_grad(logits, target, **options)
    np.copyto(logits, bad, where=~np.expand_dims(kept, options["axis"]))
    loss, grad = fastce.cross_entropy_with_grad(logits, target, **options)
    assert_equal(loss, expected_loss)
    assert_equal(grad, expected)


@settings
@hypothesis.given(problems())
def test_weights_of_one_change_nothing(problem):
    logits, target, options = problem
    options.pop("weight", None)
    options.pop("sample_weight", None)
    expected_loss, expected = fastce.cross_entropy_with_grad(logits, target, **options)
    bounds = Bounds(_reference.cross_entropy(logits, target, **options), logits, target, **options)
    ones = {
        "weight": np.ones(logits.shape[options["axis"]], logits.dtype),
        "sample_weight": np.ones(row_shape(logits.shape, options["axis"])),
    }
    for names in (["weight"], ["sample_weight"], ["weight", "sample_weight"]):
        given = {name: ones[name] for name in names}
        loss, grad = fastce.cross_entropy_with_grad(logits, target, **options, **given)
        assert_within(loss, expected_loss, bounds.loss, f"loss {names}")
        assert_within(grad, expected, bounds.grad, f"grad {names}")


@settings
@hypothesis.given(problems(special=False))
def test_doubled_weights_double_the_sum_and_leave_the_mean(problem):
    """A power of two: the same bits, but for subnormal numbers. A z-loss is not weighted by class."""
    logits, target, options = problem
    hypothesis.assume(not options.get("z_loss"))
    weight = options.pop("weight", np.ones(logits.shape[options["axis"]]))
    by_class = target.dtype.kind != "f" and options["reduction"] == "mean"
    loss, grad = fastce.cross_entropy_with_grad(logits, target, weight=weight, **options)
    doubled_loss, doubled = fastce.cross_entropy_with_grad(logits, target, weight=2 * weight, **options)
    factor = logits.dtype.type(1 if by_class else 2)
    assert_equal_but_for_subnormals(doubled_loss, factor * loss)
    assert_equal_but_for_subnormals(doubled, factor * grad)


@settings
@hypothesis.given(problems(special=False))
def test_a_logit_scale_is_a_factor_of_the_logits(problem):
    """A power of two: the same bits, with twice the gradient."""
    logits, target, options = problem
    options.pop("logit_scale", None)
    loss, grad = fastce.cross_entropy_with_grad(2 * logits, target, **options)
    scaled_loss, scaled = fastce.cross_entropy_with_grad(logits, target, logit_scale=2.0, **options)
    assert_equal_but_for_subnormals(scaled_loss, loss)
    assert_equal_but_for_subnormals(scaled, 2 * grad)
