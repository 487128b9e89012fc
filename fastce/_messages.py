"""Which exception a broken rule is, and its text: the only wording.

Every message has one form: the argument, the rule, what was got, and what to do where that can be told.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastce._array import Array, array_module, article, is_host_readable

Shape = tuple[int, ...]
Given = Mapping[str, Any]

_MOST_CHARACTERS = 80  # of a value in a message
_LARGEST_INDEX = np.iinfo(np.int64).max


class Broken(NamedTuple):
    """A rule that an argument breaks, as the compiled rules say it; see `_cpu._rules.RuleError`."""

    rule: str
    name: str
    value: float
    other: str | None


def exception_for(broken: Broken, given: Given, *, like: str = "logits", in_place: tuple[str, ...] = ()) -> Exception:
    """Return the exception for a broken rule.

    `given` has the arguments by name. `like` is what the caller's "logits" are called, and `in_place` are the names of
    the arrays that a result may be.
    """
    if broken.name == "logits":
        broken = broken._replace(name=like)
    if broken.other == "logits":
        broken = broken._replace(other=like)
    if like not in given and "logits" in given:
        given = {**given, like: given["logits"]}
    if broken.rule in _OF_RESULTS:
        return _OF_RESULTS[broken.rule](broken, given, like, in_place)
    return _EXCEPTIONS[broken.rule](broken, given)


def shown(value: object) -> str:
    """Return a value as messages show it: on one line, not too long, and whatever its own `repr` does."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


def one_of(names: tuple[str, ...]) -> str:
    """Return the rule for a name that must be one of several."""
    return f"one of {', '.join(map(repr, names))}"


# ----- options

# The options that are names, and these.
NAMES = {"reduction": ("none", "mean", "sum"), "on_empty": ("nan", "zero")}
_RANGES = {
    "ignore_index": "must fit in 64 bits",
    "label_smoothing": "must be in [0, 1]",
    **{name: f"must be {one_of(names)}" for name, names in NAMES.items()},
    "logit_scale": "must be positive and finite",
    "softcap": "must be None, or positive and finite",
    "z_loss": "must be finite and not negative",
    "n_threads": "must be None or at least 1",
}


def wrong_kind(name: str, kind: str, value: object) -> TypeError:
    """Return the exception for an option that is no number of the kind that it must be."""
    return TypeError(f"{name} must be {kind}, got {shown(value)}")


def not_one_of(name: str, names: tuple[str, ...], value: object) -> ValueError:
    """Return the exception for an option that is none of the names that there are."""
    return ValueError(f"{name} must be {one_of(names)}, got {shown(value)}")


def _range(broken: Broken, given: Given) -> Exception:
    return ValueError(f"{broken.name} {_RANGES[broken.name]}, got {shown(given[broken.name])}")


def _axis(broken: Broken, given: Given) -> Exception:
    n_dims = int(broken.value)
    return ValueError(f"axis must be in [{-n_dims}, {n_dims - 1}] for {n_dims} dimensions, got {shown(given['axis'])}")


def _scale(broken: Broken, given: Given) -> Exception:
    return ValueError(
        f"{broken.name} must be positive and finite in {_arithmetic(given)}, in which these logits are computed with; "
        f"got {float(given[broken.name])!r}, which is {broken.value} there"
    )


def _quotient(broken: Broken, given: Given) -> Exception:
    return ValueError(
        f"logit_scale / softcap must be finite in {_arithmetic(given)}, in which these logits are computed with; "
        f"got {float(given['logit_scale'])!r} / {float(given['softcap'])!r}"
    )


def _arithmetic(given: Given) -> str:
    return "float64" if given["logits"].dtype == np.float64 else "float32"


def _ignored_probabilities(broken: Broken, given: Given) -> Exception:
    return ValueError(
        f"ignore_index must be left alone with class probabilities (give such rows a sample_weight of 0), "
        f"got {given['ignore_index']}"
    )


# ----- logits


def _dtype(broken: Broken, given: Given) -> Exception:
    name, array = broken.name, given[broken.name]
    dtype, hint = array.dtype, ""
    if not dtype.isnative:
        hint = f" in another byte order: convert it with {name}.astype({name}.dtype.newbyteorder('='))"
    elif dtype.kind in "biuO":
        hint = f": convert it with {array_module(array).__name__}.asarray({name}, dtype='float32')"
    elif dtype.kind == "f" and dtype.itemsize > 8:
        hint = f": convert it with {name}.astype('float64')"
    return TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {dtype.name}{hint}")


def _scalar(broken: Broken, given: Given) -> Exception:
    return ValueError(f"{broken.name} must have at least one dimension, got a scalar")


def _exchanged(broken: Broken, given: Given) -> Exception:
    logits, target = given["logits"], given["target"]
    return TypeError(
        f"logits must come first and target second, got {logits.dtype.name} of shape {logits.shape} and "
        f"{target.dtype.name} of shape {target.shape}: exchange them"
    )


def _no_classes(broken: Broken, given: Given) -> Exception:
    logits, axis = given["logits"], _class_axis(given)
    return ValueError(f"logits must have at least one class, got shape {logits.shape} with class axis {axis}")


def _alignment(broken: Broken, given: Given) -> Exception:
    return ValueError(
        f"{broken.name} must be aligned to its numbers' size on a GPU, got strides {given[broken.name].strides}"
    )


# ----- target


def _class_axis(given: Given) -> int:
    n_dims: int = given["logits"].ndim
    return min(n_dims - 1, 1) if given["axis"] is None else given["axis"] % n_dims


def row_shape(given: Given) -> Shape:
    """Return the shape of the logits without the class axis."""
    shape, axis = given["logits"].shape, _class_axis(given)
    rows: Shape = shape[:axis] + shape[axis + 1 :]
    return rows


def _one_hot(broken: Broken, given: Given) -> Exception:
    target, shape, axis = given["target"], given["logits"].shape, _class_axis(given)
    if _has_two_classes(target):
        return TypeError(
            f"target must be one class index for logits of shape {shape}, which are a single row, got "
            f"{target.dtype.name} of shape {target.shape}: if these are the scores of a two-class model, give the "
            f"logits of both classes, np.stack([np.zeros_like(logits), logits], axis=1)"
        )
    return TypeError(
        f"target must hold one class index per row, shape {row_shape(given)}, or class probabilities of a floating "
        f"dtype; got {target.dtype.name} of the logits' shape {shape}, which looks one-hot: convert it with "
        f"target.astype(logits.dtype), or with target.argmax({axis}) to indices"
    )


def _has_two_classes(target: Array) -> bool:
    """Return True for labels of a two-class model, one for each of one-dimensional logits, not for a one-hot row."""
    if target.ndim != 1 or not is_host_readable(target):
        return False
    return bool(((target == 0) | (target == 1)).all() and target.sum() != 1)


def _index_shape(broken: Broken, given: Given) -> Exception:
    target, rows = given["target"], row_shape(given)
    hint = ": remove its last axis" if target.shape == (*rows, 1) else ""
    return ValueError(
        f"target of class indices must have shape {rows} for logits of shape {given['logits'].shape} with class axis "
        f"{_class_axis(given)}, got {target.shape}{hint}"
    )


def _probability_shape(broken: Broken, given: Given) -> Exception:
    return ValueError(
        f"target of class probabilities must have the logits' shape {given['logits'].shape}, got "
        f"{given['target'].shape}"
    )


def _float_index(broken: Broken, given: Given) -> Exception:
    target = given["target"]
    return TypeError(
        f"target of shape {target.shape} must hold class indices of an integer dtype, got {target.dtype.name}"
        f"{_advice_for_floats(target, given['ignore_index'])}"
    )


def _advice_for_floats(target: Array, ignore_index: int) -> str:
    """Return what to do with class indices of a floating dtype: not to make classes of NaN."""
    if not is_host_readable(target) or target.size == 0:
        return ": convert it with target.astype(np.int64)"
    missing = np.isnan(target)
    if missing.any():
        return (
            f" with NaN at {_place(int(missing.argmax()), target.shape)}: give such rows the value of ignore_index, "
            f"np.nan_to_num(target, nan={ignore_index}).astype(np.int64)"
        )
    with np.errstate(all="ignore"):  # such a bound is infinite in float16
        odd = (target != np.floor(target)) | (np.abs(target) >= _LARGEST_INDEX)
    if odd.any():
        bad = int(odd.argmax())
        return f" with {target.reshape(-1)[bad]} at {_place(bad, target.shape)}, which is no class"
    return ": convert it with target.astype(np.int64)"


def _target_kind(broken: Broken, given: Given) -> Exception:
    target = given["target"]
    axis = _class_axis(given) if target.shape == given["logits"].shape else None
    return TypeError(
        f"target must be of an integer dtype (class indices) or floating (probabilities), got {target.dtype}"
        f"{_advice_for_objects(target, axis, given['ignore_index'])}"
    )


def _advice_for_objects(target: Array, axis: int | None, ignore_index: int) -> str:
    """Return what to do with a target that holds no numbers; `axis` is the classes' if it is one-hot."""
    if target.dtype.kind == "b":
        return f": convert it with target.{'astype(np.int64)' if axis is None else f'argmax({axis})'}"
    items = target.reshape(-1).tolist() if target.dtype.kind in "OUST" else []
    if any(isinstance(item, str | bytes) for item in items):
        return ": number the classes with classes, target = np.unique(labels, return_inverse=True)"
    for i, item in enumerate(items):
        if item is None or type(item).__name__ in ("NAType", "NaTType") or (type(item) is float and np.isnan(item)):
            return (
                f" with a missing value, {item}, at {_place(i, target.shape)}: give such rows the value of "
                f"ignore_index, in pandas target.fillna({ignore_index}).astype('int64')"
            )
    return ": convert it with target.astype(np.int64)" if items and all(isinstance(item, int) for item in items) else ""


def _place(row: int, shape: Shape) -> str:
    """Return the index of the row-th element, counted in C order, as it is written after a name."""
    return f"[{', '.join(str(i) for i in np.unravel_index(row, shape))}]" if shape else "[()]"


def _class(broken: Broken, given: Given) -> Exception:
    n_classes = given["logits"].shape[_class_axis(given)]
    return class_error(given["target"], int(broken.value), n_classes, given["ignore_index"])


def class_error(target: Array, row: int, n_classes: int, ignore_index: int) -> IndexError:
    """Return the error for the row-th target, counted in C order."""
    place = _place(row, target.shape) if target.ndim else ""
    value = target.reshape(-1)[row] if target.ndim else target[()]
    hint = ""
    if n_classes == 1:
        hint = (
            "; if these are the scores of a two-class model, give the logits of both classes, "
            "np.concatenate([np.zeros_like(logits), logits], axis=1)"
        )
    return IndexError(
        f"target{place} is {value}, but there are {n_classes} classes (0..{n_classes - 1}) "
        f"and ignore_index is {ignore_index}{hint}"
    )


# ----- weights and other factors


def _real(broken: Broken, given: Given) -> Exception:
    name, array = broken.name, given[broken.name]
    return TypeError(f"{name} must be real numbers, got {array.dtype}{_advice_for_weight(name, array)}")


def _advice_for_weight(name: str, weight: Array) -> str:
    """Return what to do with weights that are words or objects, as scikit-learn has them."""
    item = weight[()] if weight.ndim == 0 and weight.dtype.kind in "OUT" else None
    if item is None or name not in ("weight", "sample_weight"):
        return ""
    if name == "sample_weight":
        return ": give an array of one number for each row"
    if isinstance(item, dict):
        return ", a dict: give an array in the order of the classes, [weight[k] for k in range(n_classes)]"
    if isinstance(item, str) and item == "balanced":
        return ": give an array, target.size / (n_classes * np.bincount(target.ravel(), minlength=n_classes))"
    return ": give an array of one number for each class"


def _shape(broken: Broken, given: Given) -> Exception:
    name, logits = broken.name, given["logits"]
    got = given[name].shape
    if name == "v":
        return ValueError(f"v must have the shape of logits, {logits.shape}, got {got}")
    if name == "grad_output":
        shape, reduction = row_shape(given) if given["reduction"] == "none" else (), given["reduction"]
        return ValueError(f"grad_output must have the loss's shape {shape} under reduction={reduction!r}, got {got}")
    shape = (logits.shape[_class_axis(given)],) if name == "weight" else row_shape(given)
    return ValueError(f"{name} must have shape {shape}, got {got}")


def _finite(broken: Broken, given: Given) -> Exception:
    name, place = broken.name, int(broken.value)
    array = given[name]
    value = array.reshape(-1)[place]
    word = f" in {_arithmetic(given)}" if name == "weight" and np.isfinite(value) else ""
    return ValueError(f"{name} must be finite{word}, got {value} at {_place(place, array.shape)}")


def _normalizer(broken: Broken, given: Given) -> Exception:
    return ValueError(
        f"weight and sample_weight must have products whose sum, over the rows that count, a mean can divide by, "
        f"got {broken.value}: such large and small ones are too much for float64"
    )


# ----- results


def _result_kind(broken: Broken, given: Given, like: str, in_place: tuple[str, ...]) -> Exception:
    return TypeError(f"{broken.name} must be a NumPy array, got {article(given[broken.name])}")


def _result_shape(broken: Broken, given: Given, like: str, in_place: tuple[str, ...]) -> Exception:
    return ValueError(
        f"{broken.name} must have the shape of {like}, {given[like].shape}, got {given[broken.name].shape}"
    )


def _result_dtype(broken: Broken, given: Given, like: str, in_place: tuple[str, ...]) -> Exception:
    return ValueError(
        f"{broken.name} must have the dtype of {like}, {given[like].dtype.name}, got {given[broken.name].dtype.str}"
    )


def _read_only(broken: Broken, given: Given, like: str, in_place: tuple[str, ...]) -> Exception:
    return ValueError(f"{broken.name} must be writable, got a read-only array")


def _own_elements(broken: Broken, given: Given, like: str, in_place: tuple[str, ...]) -> Exception:
    return ValueError(
        f"{broken.name} must have an element of its own for every entry, got strides {given[broken.name].strides}"
    )


def _overlap(broken: Broken, given: Given, like: str, in_place: tuple[str, ...]) -> Exception:
    allowed = " or ".join(f"{name} itself" for name in in_place)
    return ValueError(
        f"{broken.name} must {f'be {allowed} or ' if allowed else ''}share no memory with the inputs, got an "
        f"overlap with {broken.other}"
    )


_EXCEPTIONS: dict[str, Callable[[Broken, Given], Exception]] = {
    "range": _range,
    "scale": _scale,
    "quotient": _quotient,
    "axis": _axis,
    "ignored probabilities": _ignored_probabilities,
    "dtype": _dtype,
    "scalar": _scalar,
    "exchanged": _exchanged,
    "no classes": _no_classes,
    "alignment": _alignment,
    "one-hot": _one_hot,
    "index shape": _index_shape,
    "probability shape": _probability_shape,
    "float index": _float_index,
    "target kind": _target_kind,
    "class": _class,
    "real": _real,
    "shape": _shape,
    "finite": _finite,
    "normalizer": _normalizer,
}
_OF_RESULTS: dict[str, Callable[[Broken, Given, str, tuple[str, ...]], Exception]] = {
    "result kind": _result_kind,
    "result shape": _result_shape,
    "result dtype": _result_dtype,
    "read-only": _read_only,
    "own elements": _own_elements,
    "overlap": _overlap,
}
