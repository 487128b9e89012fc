"""The rules for single options, those that are numbers or names, and what types all options have."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike

DEFAULT_IGNORE_INDEX = -100
REDUCTIONS = ("none", "mean", "sum")
ON_EMPTY = ("nan", "zero")

INT64 = np.iinfo(np.int64)

_BOOLEANS = (bool, np.bool_)
_NO_NUMBERS = (*_BOOLEANS, str, bytes)  # although float() takes them


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


class Options(NamedTuple):
    """The checked options that are numbers or names."""

    ignore_index: int = DEFAULT_IGNORE_INDEX
    label_smoothing: float = 0.0
    reduction: str = "mean"
    on_empty: str = "nan"
    logit_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    n_threads: int | None = None


def check_options(
    *,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    on_empty: str = "nan",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    n_threads: int | None = None,
) -> Options:
    """Check the options that are numbers or names."""
    check_name(reduction, "reduction", REDUCTIONS)
    check_name(on_empty, "on_empty", ON_EMPTY)
    ignore_index = check_integer(ignore_index, "ignore_index")
    if not INT64.min <= ignore_index < 2**64:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")
    return Options(
        ignore_index=ignore_index,
        label_smoothing=check_number(label_smoothing, "label_smoothing", "in [0, 1]", lambda x: 0 <= x <= 1),
        reduction=reduction,
        on_empty=on_empty,
        logit_scale=check_number(logit_scale, "logit_scale", "positive and finite", lambda x: 0 < x < np.inf),
        softcap=None
        if softcap is None
        else check_number(softcap, "softcap", "None, or positive and finite", lambda x: 0 < x < np.inf),
        z_loss=check_number(z_loss, "z_loss", "finite and not negative", lambda x: 0 <= x < np.inf),
        n_threads=check_n_threads(n_threads),
    )


def check_n_threads(n_threads: int | None) -> int | None:
    """Return None or a positive number of threads."""
    if n_threads is None:
        return None
    number = check_integer(n_threads, "n_threads")
    if number < 1:
        raise ValueError(f"n_threads must be None or at least 1, got {number}")
    return number


def check_name(value: object, name: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not one of the allowed ones."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_integer(value: Any, name: str) -> int:
    """Return an int; booleans are not numbers here."""
    if isinstance(value, _BOOLEANS):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def check_number(value: Any, name: str, rule: str, is_allowed: Callable[[float], bool]) -> float:
    """Return a float that obeys the rule."""
    try:
        if isinstance(value, _NO_NUMBERS):
            raise TypeError
        number = float(value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not is_allowed(number):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return number
