"""Which exception a broken rule is, and its text: the only wording.

Every message has one form: the argument, the rule, what was got, and what to do where that can be told (`_advice`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastce._advice import about_dtype, about_floats, about_objects, about_weights, has_two_classes
from fastce._array import Array
from fastce._logits import arithmetic, class_axis, row_shape
from fastce._options import NAMES
from fastce._wording import article, one_of, place_of, shown

_RANGES = {
    "ignore_index": "must fit in 64 bits",
    "label_smoothing": "must be in [0, 1]",
    **{name: f"must be {one_of(names)}" for name, names in NAMES.items()},
    "logit_scale": "must be positive and finite",
    "softcap": "must be None, or positive and finite",
    "z_loss": "must be finite and not negative",
    "n_threads": "must be None or at least 1",
}


class Broken(NamedTuple):
    """A rule that an argument breaks, as the compiled rules say it; see `_cpu._rules.RuleError`."""

    rule: str
    name: str
    value: float
    other: str | None


def exception_for(
    broken: Broken, given: Mapping[str, Any], *, like: str = "logits", in_place: bool = True
) -> Exception:
    """Return the exception for a broken rule.

    `given` has the arguments by name. `like` is what the caller's "logits" are called. They may be worked on `in_place`
    or not.
    """
    got, value = given[broken.name], broken.value
    name = like if broken.name == "logits" else broken.name
    logits: Any = given.get("logits")
    target: Any = given.get("target")
    ignore_index: Any = given.get("ignore_index")

    def computed() -> str:
        return arithmetic(logits.dtype).name

    def axis() -> int:
        return class_axis(logits, given["axis"])

    def rows() -> tuple[int, ...]:
        return row_shape(logits, given["axis"])

    match broken.rule:
        # options
        case "range":
            return ValueError(f"{name} {_RANGES[name]}, got {shown(got)}")
        case "axis":
            return ValueError(
                f"axis must be in [{-int(value)}, {int(value) - 1}] for {int(value)} dimensions, got {shown(got)}"
            )
        case "scale":
            return ValueError(
                f"{name} must be positive and finite in {computed()}, which these logits are computed in; "
                f"got {float(got)!r}, which is {value} there"
            )
        case "quotient":
            return ValueError(
                f"logit_scale / softcap must be finite in {computed()}, which these logits are computed in; "
                f"got {float(given['logit_scale'])!r} / {float(got)!r}"
            )
        case "ignored probabilities":
            return ValueError(
                f"ignore_index must be left alone with class probabilities (give such rows a sample_weight of 0), "
                f"got {ignore_index}"
            )
        # logits
        case "dtype":
            return TypeError(
                f"{name} must be float32, float64, float16 or bfloat16, got {got.dtype.name}{about_dtype(name, got)}"
            )
        case "scalar":
            return ValueError(f"{name} must have at least one dimension, got a scalar")
        case "exchanged":
            return TypeError(
                f"logits must come first and target second, got {logits.dtype.name} of shape {logits.shape} and "
                f"{target.dtype.name} of shape {target.shape}: exchange them"
            )
        case "no classes":
            return ValueError(f"{like} must have at least one class, got shape {logits.shape} with class axis {axis()}")
        case "alignment":
            return ValueError(f"{name} must be aligned to its numbers' size on a GPU, got strides {got.strides}")
        # target
        case "one-hot" if has_two_classes(target):
            return TypeError(
                f"target must be one class index for logits of shape {logits.shape}, which are a single row, got "
                f"{target.dtype.name} of shape {target.shape}: if these are the scores of a two-class model, give the "
                f"logits of both classes, np.stack([np.zeros_like(logits), logits], axis=1)"
            )
        case "one-hot":
            return TypeError(
                f"target must hold one class index per row, shape {rows()}, or class probabilities of a floating "
                f"dtype; got {target.dtype.name} of the logits' shape {logits.shape}, which looks one-hot: convert it "
                f"with target.astype(logits.dtype), or with target.argmax({axis()}) to indices"
            )
        case "index shape":
            hint = ": remove its last axis" if target.shape == (*rows(), 1) else ""
            return ValueError(
                f"target of class indices must have shape {rows()} for {like} of shape {logits.shape} with class axis "
                f"{axis()}, got {target.shape}{hint}"
            )
        case "probability shape":
            return ValueError(
                f"target of class probabilities must have the logits' shape {logits.shape}, got {target.shape}"
            )
        case "float index":
            return TypeError(
                f"target of shape {target.shape} must hold class indices of an integer dtype, got {target.dtype.name}"
                f"{about_floats(target, ignore_index)}"
            )
        case "target kind":
            one_hot_axis = axis() if target.shape == logits.shape else None
            return TypeError(
                f"target must be of an integer dtype (class indices) or floating (probabilities), got {target.dtype}"
                f"{about_objects(target, one_hot_axis, ignore_index)}"
            )
        case "class":
            return class_error(target, int(value), logits.shape[axis()], ignore_index)
        # weights and other factors
        case "real":
            return TypeError(f"{name} must be real numbers, got {got.dtype}{about_weights(name, got)}")
        case "shape" if name == "v":
            return ValueError(f"v must have the shape of logits, {logits.shape}, got {got.shape}")
        case "shape" if name == "grad_output":
            reduction = given["reduction"]
            return ValueError(
                f"grad_output must have the loss's shape {rows() if reduction == 'none' else ()} under "
                f"reduction={reduction!r}, got {got.shape}"
            )
        case "shape":
            shape = (logits.shape[axis()],) if name == "weight" else rows()
            return ValueError(f"{name} must have shape {shape}, got {got.shape}")
        case "finite":
            number = got.reshape(-1)[int(value)]
            where = f" in {computed()}" if name == "weight" and np.isfinite(number) else ""
            return ValueError(f"{name} must be finite{where}, got {number} at {place_of(int(value), got.shape)}")
        case "normalizer":
            return ValueError(
                f"weight and sample_weight must have products whose sum, over the rows that count, a mean can divide "
                f"by, got {value}: such large and small ones are too much for float64"
            )
        # results
        case "result kind":
            return TypeError(f"{name} must be a NumPy array, got {article(got)}")
        case "result shape":
            return ValueError(f"{name} must have the shape of {like}, {logits.shape}, got {got.shape}")
        case "result dtype":
            return ValueError(f"{name} must have the dtype of {like}, {logits.dtype.name}, got {got.dtype.str}")
        case "read-only":
            return ValueError(f"{name} must be writable, got a read-only array")
        case "own elements":
            return ValueError(f"{name} must have an element of its own for every entry, got strides {got.strides}")
        case "overlap":
            may_be = () if name == "hess_out" or not in_place else (like,) if given.get("v") is None else (like, "v")
            itself = "".join(f"{word} itself or " for word in may_be)
            return ValueError(
                f"{name} must {'be ' if itself else ''}{itself}share no memory with the inputs, got an overlap with "
                f"{like if broken.other == 'logits' else broken.other}"
            )
    raise NotImplementedError(broken.rule)


def class_error(target: Array, row: int, n_classes: int, ignore_index: int) -> IndexError:
    """Return the error for the row-th target, counted in C order."""
    place = place_of(row, target.shape) if target.ndim else ""
    hint = ""
    if n_classes == 1:
        hint = (
            "; if these are the scores of a two-class model, give the logits of both classes, "
            "np.concatenate([np.zeros_like(logits), logits], axis=1)"
        )
    return IndexError(
        f"target{place} is {target.reshape(-1)[row]}, but there are {n_classes} classes (0..{n_classes - 1}) "
        f"and ignore_index is {ignore_index}{hint}"
    )
