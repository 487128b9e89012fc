"""Calls that are wrong: they must say so in a documented way, and write nothing."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np

import fastce
from fuzz_calls import error_of
from fuzz_families import LOSSES, Diagonal
from fuzz_problems import LOGITS_DTYPES, Problem

DOCUMENTED = (TypeError, ValueError, IndexError)


def mistakes(calls):
    """Make a call that is wrong in one respect: it must say so, and write nothing."""
    dice = calls.dice
    problem = Problem(dice, calls.memory)
    operation = dice.choice(LOSSES)(calls, problem)
    operation.as_object = False
    like = problem.logits
    keywords = {keyword: calls.memory.operand(like.shape, like.dtype) for keyword in operation.outs.values()}
    outs = dict(keywords)
    arrays, changes, kinds, word = dict(operation.arrays), {}, ValueError, None
    name = dice.choice([*_WRONG, *_BY_SHAPE])
    if name in _WRONG:
        values, kinds = dice.choice(_WRONG[name])
        word = name
        changes[name] = dice.choice(values)
    else:
        wrong = _BY_SHAPE[name](operation, arrays, outs)
        if wrong is None:
            return
        word, kinds, changes = wrong
    before = [operand.array.tobytes() for operand in keywords.values()]
    arguments = {**operation.keywords, **{k: o.array if hasattr(o, "array") else o for k, o in outs.items()}, **changes}
    message = error_of(lambda: calls.make(operation.function, *arrays.values(), **arguments), kinds, word)
    assert word in message, f"no word of {word} in: {message}"
    calls.check_inputs()
    for (keyword, operand), bytes_before in zip(keywords.items(), before, strict=True):
        assert operand.array.tobytes() == bytes_before and operand.is_unchanged(), f"{keyword} was written to"


_WRONG = {
    "label_smoothing": [((-0.1, 1.5, np.nan, np.inf, 2), ValueError), (("a", None, [], True, 1j, object()), TypeError)],
    "logit_scale": [((0, -1.0, np.nan, np.inf), ValueError), (("a", None, (1, 2), True), TypeError)],
    "softcap": [((0, -1.0, np.nan, np.inf), ValueError), (("a", [1.0, 2.0], True), TypeError)],
    "z_loss": [((-1, np.nan, np.inf), ValueError), (("a", None, True), TypeError)],
    "reduction": [(("avg", "", None, 3, ("mean",), b"mean"), ValueError)],
    "on_empty": [(("NaN", None, 0.0, math.nan), ValueError)],
    "ignore_index": [((2**64, -(2**63) - 1), ValueError), ((1.5, "a", None, True), TypeError)],
    "n_threads": [((0, -1, -(2**40)), ValueError), ((1.5, "a", True), TypeError)],
    "axis": [((7, -8, 2**70), ValueError), ((0.5, "a", True, (1,)), TypeError)],
}


def _wrong_class(operation, arrays, outs):
    problem = operation.problem
    target = problem.target
    info = np.iinfo(target.dtype) if problem.is_index else None
    ignored = problem.options.get("ignore_index", -100)
    if not problem.is_index or not target.size:
        return None
    bad = [problem.n_classes, problem.n_classes + 100, -1, -100, 2**31, -(2**63), 2**63, int(info.max)]
    bad = [c for c in bad if info.min <= c <= info.max and c != ignored and not 0 <= c < problem.n_classes]
    if not bad:
        return None
    dice = operation.calls.dice
    y = target.copy(order="K")
    y[tuple(dice.integer(0, n - 1) for n in y.shape)] = dice.choice(bad)
    arrays["target"] = operation.calls.memory.input("target", y, target.dtype, may_repeat=False)
    return "target", IndexError, {}


def _wrong_logits(operation, arrays, outs):
    x = np.asarray(arrays["logits"])
    dice = operation.calls.dice
    wrong = dice.choice(("int", "complex", "object", "bool", "scalar", "longdouble"))
    with np.errstate(all="ignore"):
        x = np.nan_to_num(x.astype(np.float64))
    if wrong == "scalar":
        arrays["logits"] = np.float32(1)
        return "logits", ValueError, {}
    kinds = {"int": int, "complex": complex, "object": object, "bool": bool, "longdouble": np.longdouble}
    with np.errstate(all="ignore"):
        arrays["logits"] = (np.clip(x, -1e9, 1e9) if wrong == "int" else x).astype(kinds[wrong])
    return "logits", TypeError, {}


def _wrong_target(operation, arrays, outs):
    problem = operation.problem
    dice = operation.calls.dice
    if problem.is_index and problem.rows != problem.shape:
        way = dice.choice((float, bool, object, complex, str, "more"))
        if way == "more":
            arrays["target"] = np.zeros((*problem.rows, 2), int)
            return "target", (TypeError, ValueError), {}
        arrays["target"] = np.zeros(problem.rows).astype(way)
        return "target", (TypeError if way is not float else (TypeError, ValueError)), {}
    arrays["target"] = np.zeros((*problem.shape, 2), problem.target.dtype)
    return "target", (TypeError, ValueError), {}


def _wrong_factors(operation, arrays, outs):
    dice, problem = operation.calls.dice, operation.problem
    name = dice.choice(("weight", "sample_weight"))
    shape = (problem.n_classes,) if name == "weight" else problem.rows
    way = dice.choice(("shape", "number", "kind"))
    if way == "shape":
        return name, ValueError, {name: np.ones((*shape, 2))}
    if way == "kind":
        return name, TypeError, {name: np.ones(shape, dice.choice((complex, object, str, bool)))}
    values = np.ones(shape)
    if not values.size:
        return None
    values.reshape(-1)[dice.integer(0, values.size - 1)] = dice.choice((np.nan, np.inf, -np.inf))
    return name, ValueError, {name: values.astype(dice.choice((np.float64, np.float32, np.float16)))}


def _wrong_out(operation, arrays, outs):
    dice, problem = operation.calls.dice, operation.problem
    if not outs:
        return None
    keyword = dice.choice(list(outs))
    x = problem.logits
    way = dice.choice(("shape", "dtype", "readonly", "repeated", "list", "swapped"))
    if way == "shape":
        outs[keyword] = np.empty((*x.shape, 1), x.dtype)
    elif way == "dtype":
        outs[keyword] = np.empty(x.shape, dice.choice([t for t in LOGITS_DTYPES if t != x.dtype]))
    elif way == "swapped":
        if x.dtype.itemsize == 2:
            return None
        outs[keyword] = np.empty(x.shape, x.dtype.newbyteorder())
    elif way == "readonly":
        outs[keyword] = np.empty(x.shape, x.dtype)
        outs[keyword].flags.writeable = False
    elif way == "repeated":
        if x.size == 0 or max(x.shape) == 1:
            return None
        outs[keyword] = np.lib.stride_tricks.as_strided(np.empty((), x.dtype), x.shape, (0,) * x.ndim)
    else:
        outs[keyword] = x.tolist()
        return keyword, TypeError, {}
    return keyword, ValueError, {}


def _wrong_grad_output(operation, arrays, outs):
    dice, problem = operation.calls.dice, operation.problem
    if operation.function in (fastce.cross_entropy, fastce.cross_entropy_stats):
        return None
    if dice.often(0.5):
        return "grad_output", ValueError, {"grad_output": np.ones((3, *problem.rows))}
    return "grad_output", TypeError, {"grad_output": dice.choice((1j, "a", object(), np.ones(problem.rows, complex)))}


def _wrong_v(operation, arrays, outs):
    if "v" not in arrays:
        return None
    shape = operation.problem.shape
    if operation.calls.dice.often(0.5):
        arrays["v"] = np.ones((*shape, 1))
        return "v", ValueError, {}
    arrays["v"] = np.ones(shape, operation.calls.dice.choice((complex, object)))
    return "v", TypeError, {}


def _wrong_curvature(operation, arrays, outs):
    if not isinstance(operation, Diagonal):
        return None
    return "curvature", ValueError, {"curvature": operation.calls.dice.choice(("newton", None, 3, ("exact",)))}


def _wrong_ignore_index(operation, arrays, outs):
    return None if operation.problem.is_index else ("ignore_index", ValueError, {"ignore_index": 0})


_BY_SHAPE = {
    "class": _wrong_class,
    "logits": _wrong_logits,
    "target": _wrong_target,
    "factors": _wrong_factors,
    "out": _wrong_out,
    "grad_output": _wrong_grad_output,
    "v": _wrong_v,
    "curvature": _wrong_curvature,
    "ignored probabilities": _wrong_ignore_index,
}


def anything(calls):
    """Give an option just anything: a result or a documented exception, and in that case nothing written."""
    dice = calls.dice
    problem = Problem(dice, calls.memory)
    operation = dice.choice(LOSSES)(calls, problem)
    operation.as_object = False
    like = problem.logits
    outs = {keyword: calls.memory.operand(like.shape, like.dtype) for keyword in operation.outs.values()}
    names = ["logits", "target", "axis", "weight", "sample_weight", "ignore_index", "label_smoothing", "reduction"]
    names += ["on_empty", "logit_scale", "softcap", "z_loss", "n_threads", *outs]
    keywords = {**operation.keywords, **{keyword: operand.array for keyword, operand in outs.items()}}
    arrays = dict(operation.arrays)
    for name in dice.sample(names, dice.choice((1, 1, 2))):
        value = dice.choice(_ANYTHING)
        if name in arrays:
            arrays[name] = value
        else:
            keywords[name] = value
    if dice.often(0.5):
        keywords["n_threads"] = 1
    before = [operand.array.tobytes() for operand in outs.values()]
    try:
        calls.make(operation.function, *arrays.values(), **keywords)
    except DOCUMENTED:
        for (keyword, operand), bytes_before in zip(outs.items(), before, strict=True):
            assert operand.array.tobytes() == bytes_before, f"{keyword} was written to"
    for keyword, operand in outs.items():
        operand.take_result()
        assert operand.is_unchanged(), f"bytes around {keyword} were written to"
    calls.check_inputs()


_ANYTHING = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**40, 2**64, 2**100, -(2**100), 0.0, 0.5, 1.0, -1.0, 1e39, 1e-46, 1e308,
    1e-320, math.inf, -math.inf, math.nan, 1j, "mean", "none", "", "1", b"1", (), [], [1.0], [1], (1, 2), {}, {1: 2},
    set(), object(), int, len, Fraction(1, 3), Decimal("0.5"), np.float16(0.5), np.float32(0.5), np.float64(0.5),
    np.longdouble(0.5), np.int8(1), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1), np.datetime64("2024-01-01"),
    np.array(0.5), np.array(1), np.array([0.5]), np.array([[1.0, 2.0]]), np.array("a"), np.array(None), np.zeros(0),
    np.zeros((0, 3)), np.zeros((2, 0)), np.ones((1, 1, 1, 1, 1, 1)), np.ones(3, ">f8"), np.ones(2, "f4,f4"),
    np.ma.masked_array([1.0]), slice(3), Ellipsis,
    [[1.0], [1.0, 2.0]], [object()], range(3), memoryview(b"abc"), bytearray(b"abc"),
)  # fmt: skip
