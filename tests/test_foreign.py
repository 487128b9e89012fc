"""Arguments whose own code reaches for the other arguments: it runs before anything is looked at.

Each call either raises one of the package's errors, or computes with the arguments as they are afterwards: this is
held against the same call with those. A call that looked too early reads and writes outside of its arrays.
"""

import gc
import itertools

import numpy as np
import pytest

import fastce

SHAPE = (64, 50)
ERRORS = (ValueError, TypeError, IndexError)


class Foreign:
    """An object with values, and a trick that it plays when asked for them."""

    def __init__(self, values, trick):
        self.values, self.trick = values, trick


class Array(Foreign):
    """One that makes an array of itself."""

    def __array__(self, dtype=None, copy=None):
        self.trick()
        return self.values


class Sequence(Foreign):
    """One that NumPy takes for a list."""

    def __len__(self):
        self.trick()
        return len(self.values)

    def __getitem__(self, i):
        return self.values[i]


class Interface(Foreign):
    """One that has its data where NumPy can see it."""

    @property
    def __array_interface__(self):
        self.trick()
        return self.values.__array_interface__


class Device(Array):
    """One that says where it is: on the host."""

    def __dlpack_device__(self):
        self.trick()
        return 1, 0


class Disguised(Array):
    """One that pretends to be an array."""

    @property
    def __class__(self):
        self.trick()
        return np.ndarray


class Number(float):
    """A float with an opinion."""

    def __new__(cls, value, trick):
        self = super().__new__(cls, value)
        self.trick = trick
        return self

    def __float__(self):
        self.trick()
        return float.__float__(self)


class Scalar:
    """What is a number if asked."""

    def __init__(self, value, trick):
        self.value, self.trick = value, trick

    def __float__(self):
        self.trick()
        return float(self.value)

    def __index__(self):
        self.trick()
        return self.value

    def __bool__(self):
        self.trick()
        return bool(self.value)


class Word(str):
    """A word that compares in its own way."""

    def __new__(cls, value, trick):
        self = super().__new__(cls, value)
        self.trick = trick
        return self

    def __eq__(self, other):
        self.trick()
        return str.__eq__(self, other)

    __hash__ = str.__hash__


class Subclass(np.ndarray):
    """An array that acts when views of it are made."""

    trick = staticmethod(lambda: None)

    def __array_finalize__(self, parent):
        type(self).trick()


def reshape(array):
    array.shape = array.shape[::-1]


def flatten(array):
    array.shape = (array.size,)


def shrink(array):
    """Give the memory back; what was read from it before is gone."""
    array.resize((1,) * array.ndim, refcheck=False)


def grow(array):
    """Move the memory."""
    array.resize((4096,) * array.ndim, refcheck=False)


TRICKS = [reshape, flatten, shrink, grow]


class Arguments:
    """Arguments of a call, and a trick that is played once on one of its arrays."""

    def __init__(self, victim, trick):
        rng = np.random.default_rng(0)
        self.arrays = {
            "logits": rng.standard_normal(SHAPE).astype(np.float32),
            "target": rng.integers(0, SHAPE[1], SHAPE[0]),
            "weight": rng.random(SHAPE[1]),
            "sample_weight": rng.random(SHAPE[0]),
            "out": np.zeros(SHAPE, np.float32),
            "v": rng.standard_normal(SHAPE).astype(np.float32),
        }
        self.victim, self.trick, self.calls = victim, trick, 0

    def play(self):
        self.calls += 1
        if self.calls == 1:
            self.trick(self.arrays[self.victim])


def call(function, arrays, **options):
    """Call one of the functions with those arguments that it knows."""
    given = {**arrays, **options}
    names = {
        "cross_entropy": {"weight", "sample_weight"},
        "cross_entropy_stats": {"weight", "sample_weight"},
        "cross_entropy_with_grad": {"weight", "sample_weight", "out"},
        "cross_entropy_hvp": {"weight", "sample_weight", "out", "v"},
        "cross_entropy_grad_hess": {"weight", "sample_weight", "out"},
        "nll_loss": {"weight", "sample_weight"},
    }[function]
    keep = {name: value for name, value in given.items() if name in names | options.keys()}
    return getattr(fastce, function)(given["logits"], given["target"], **keep)


FUNCTIONS = [
    "cross_entropy",
    "cross_entropy_stats",
    "cross_entropy_with_grad",
    "cross_entropy_hvp",
    "cross_entropy_grad_hess",
    "nll_loss",
]


def flat(results):
    return [np.asarray(part) for part in (results if isinstance(results, tuple) else (results,))]


def check(function, arguments, culprit, kind):
    """Make the call with one argument disguised; compare it with the call that can be made afterwards."""
    disguised = kind(arguments.arrays[culprit], arguments.play)
    try:
        results = flat(call(function, {**arguments.arrays, culprit: disguised}))
    except ERRORS as error:
        assert arguments.calls, "the trick was not played"
        if kind is not Sequence:  # whose numbers are of another type, for which `out` may not do
            with pytest.raises(type(error)):
                call(function, arguments.arrays)
        return
    assert arguments.calls, "the trick was not played"
    results = [array.copy() for array in results]
    expected = flat(call(function, arguments.arrays))
    tolerance = 1e-5 if kind is Sequence and culprit == "logits" else 0  # float64 instead of float32
    for actual, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


VICTIMS = ["logits", "target", "weight", "sample_weight", "out", "v"]


@pytest.mark.parametrize("kind", [Array, Sequence, Interface, Device, Disguised])
@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_arrays_that_change_others(function, trick, kind):
    for victim, culprit in itertools.permutations(VICTIMS, 2):
        if culprit == "out" or ("v" in (victim, culprit) and function != "cross_entropy_hvp"):
            continue
        if victim == "out" and function in ("cross_entropy", "cross_entropy_stats", "nll_loss"):
            continue
        arguments = Arguments(victim, trick)
        check(function, arguments, culprit, kind)


@pytest.mark.parametrize("kind", [Array, Interface])
@pytest.mark.parametrize("trick", TRICKS)
def test_an_array_that_changes_itself(trick, kind):
    for name in ("logits", "target", "weight", "sample_weight", "v"):
        for function in ("cross_entropy_with_grad", "cross_entropy_hvp"):
            if name == "v" and function != "cross_entropy_hvp":
                continue
            arguments = Arguments(name, trick)
            check(function, arguments, name, kind)


def options_with(trick):
    return {
        "axis": Scalar(1, trick),
        "ignore_index": Scalar(-100, trick),
        "n_threads": Scalar(1, trick),
        "label_smoothing": Number(0.0, trick),
        "logit_scale": Scalar(1, trick),
        "softcap": None,
        "z_loss": Number(0.0, trick),
        "reduction": Word("mean", trick),
        "on_empty": Word("nan", trick),
    }


@pytest.mark.parametrize("name", [name for name, value in options_with(None).items() if value is not None])
@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("function", FUNCTIONS[:-1])
def test_options_that_change_arrays(function, trick, name):
    for victim in ("logits", "target", "out"):
        arguments = Arguments(victim, trick)
        options = options_with(arguments.play)
        try:
            results = flat(call(function, arguments.arrays, **{name: options[name]}))
        except ERRORS:
            assert arguments.calls
            continue
        expected = flat(call(function, arguments.arrays))
        if name in ("reduction", "on_empty", "label_smoothing", "z_loss"):
            assert arguments.calls <= 1  # none where its own code need not be asked
        for actual, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("victim", ["logits", "target", "out"])
def test_flags_and_names_that_change_arrays(trick, victim):
    for function, name, value in (
        ("cross_entropy_with_grad", "return_stats", Scalar(True, None)),
        ("cross_entropy_with_grad", "grad_output", Number(2.0, None)),
        ("cross_entropy_grad_hess", "curvature", Word("xgboost", None)),
    ):
        arguments = Arguments(victim, trick)
        value.trick = arguments.play
        try:
            results = flat(call(function, arguments.arrays, **{name: value}))
        except ERRORS:
            assert arguments.calls
            continue
        plain = {"return_stats": True, "grad_output": 2.0, "curvature": "xgboost"}[name]
        expected = flat(call(function, arguments.arrays, **{name: plain}))
        for actual, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("name", ["logits", "out", "target"])
def test_subclasses_that_act_on_views(trick, name):
    arguments = Arguments("v" if name == "logits" else "logits", trick)
    given = arguments.arrays[name].view(Subclass)
    Subclass.trick = staticmethod(arguments.play)
    try:
        results = call("cross_entropy_hvp", {**arguments.arrays, name: given})
    except ERRORS:
        return
    finally:
        Subclass.trick = staticmethod(lambda: None)
    if name == "out":
        assert results is given
    assert arguments.calls == 0  # plain views are made of it


def test_a_shape_that_changes_after_the_call_is_no_concern_of_the_result():
    arguments = Arguments("logits", reshape)
    loss, grad = fastce.cross_entropy_with_grad(arguments.arrays["logits"].tolist(), arguments.arrays["target"])
    assert grad.shape == SHAPE and grad.base is None and np.isfinite(loss)
    out = arguments.arrays["out"]
    returned = fastce.cross_entropy_with_grad(
        arguments.arrays["logits"][:, ::-1], arguments.arrays["target"], out=out[:, ::-1][:, ::-1]
    )[1]
    assert returned.shape == SHAPE
    gc.collect()
    out.resize((2, 2), refcheck=False)


def test_an_object_beside_out_in_one_memory_is_found():
    """It is no array before it has been taken in."""
    logits, out = np.zeros(SHAPE), np.zeros(SHAPE)
    for name, values in (("weight", out.reshape(-1)[:50]), ("sample_weight", out.reshape(-1)[-64:])):
        with pytest.raises(ValueError, match=f"overlap with {name}"):
            fastce.cross_entropy_with_grad(
                logits, np.zeros(64, int), out=out, **{name: Interface(values, lambda: None)}
            )
        with pytest.raises(ValueError, match=f"overlap with {name}"):
            fastce.cross_entropy_with_grad(logits, np.zeros(64, int), out=out, **{name: memoryview(values)})
    work = Interface(out, lambda: None)
    assert fastce.cross_entropy_with_grad(work, np.zeros(64, int), out=out)[1] is out
