"""The options of a loss, once: names, defaults and types; and how their values become Python's own types."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from fastce import _cpu
from fastce._wording import one_of, shown

DEFAULT_IGNORE_INDEX: int = _cpu.kernels.DEFAULT_IGNORE_INDEX
# The options that are names, and these.
NAMES = {"reduction": ("none", "mean", "sum"), "on_empty": ("nan", "zero")}

_BOOLEANS = (bool, np.bool_)
# Although float() takes them, as it takes NumPy's complex numbers: it drops their imaginary part, with a warning.
_NO_NUMBERS = (*_BOOLEANS, str, bytes, bytearray, memoryview)


class LossOptions(TypedDict, total=False):
    """The options of `cross_entropy`, as its callers give them."""

    axis: int | None
    weight: ArrayLike | None
    sample_weight: ArrayLike | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    on_empty: str
    logit_scale: float
    softcap: float | None
    z_loss: float
    n_threads: int | None


def as_integer(value: Any, name: str) -> int:
    """Return an int; booleans are not numbers here."""
    try:
        if isinstance(value, _BOOLEANS):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None
    return int.__index__(number)  # for `number` may be of a subclass, whose comparisons are not int's


def as_number(value: Any, name: str) -> float:
    """Return a float."""
    try:
        if isinstance(value, _NO_NUMBERS) or getattr(getattr(value, "dtype", None), "kind", None) == "c":
            raise TypeError
        return float(value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {shown(value)}") from None
    except OverflowError:  # an integer beyond all floats
        return np.inf if value > 0 else -np.inf


def as_name(value: object, name: str, names: tuple[str, ...] = ()) -> str:
    """Return Python's own string, which is one of these names, or of the option's."""
    names = names or NAMES[name]
    if not isinstance(value, str) or (word := str.__str__(value)) not in names:
        raise ValueError(f"{name} must be {one_of(names)}, got {shown(value)}")
    return word


class Option(NamedTuple):
    """An option: its default and annotation in signatures, its type in docstrings, and what makes it a plain value."""

    default: Any
    annotation: Any
    documented: str
    convert: Callable[[Any, str], Any] | None = None


# In the order of the signatures. Arrays are not converted one by one.
OPTIONS = {
    "axis": Option(None, int | None, "int, optional", as_integer),
    "weight": Option(None, ArrayLike | None, "array_like, shape (C,), optional"),
    "sample_weight": Option(None, ArrayLike | None, "array_like, shaped like an index target, optional"),
    "ignore_index": Option(DEFAULT_IGNORE_INDEX, int, f"int, default {DEFAULT_IGNORE_INDEX}", as_integer),
    "label_smoothing": Option(0.0, float, "float in [0, 1], default 0", as_number),
    "reduction": Option("mean", str, '{"mean", "sum", "none"}, default "mean"', as_name),
    "on_empty": Option("nan", str, '{"nan", "zero"}, default "nan"', as_name),
    "logit_scale": Option(1.0, float, "float, default 1", as_number),
    "softcap": Option(None, float | None, "float, optional", as_number),
    "z_loss": Option(0.0, float, "float, default 0", as_number),
    "n_threads": Option(None, int | None, "int, optional", as_integer),
}
# The order in which `call` takes those that are numbers or names.
NUMBERS_AND_NAMES = (
    "ignore_index",
    "label_smoothing",
    "reduction",
    "on_empty",
    "logit_scale",
    "softcap",
    "z_loss",
)
DEFAULTS = tuple(OPTIONS[name].default for name in NUMBERS_AND_NAMES)
