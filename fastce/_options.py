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

# More threads than any machine has, in a number that every part of the package can hold.
MOST_THREADS = 2**31 - 1

_BOOLEANS = (bool, np.bool_)
# Although float() takes them, as it takes NumPy's complex numbers: it drops their imaginary part, with a warning.
_NO_NUMBERS = (*_BOOLEANS, str, bytes, bytearray, memoryview)
_MOST_CHARACTERS = 80  # of a value in a message


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
    """Check the options that are numbers or names; what is returned holds Python's own types, and no code of others."""
    reduction = check_name(reduction, "reduction", REDUCTIONS)
    on_empty = check_name(on_empty, "on_empty", ON_EMPTY)
    ignore_index = check_integer(ignore_index, "ignore_index")
    if not INT64.min <= ignore_index < 2**64:
        raise ValueError(f"ignore_index must fit in 64 bits, got {shown(ignore_index)}")
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
    """Return None or a positive number of threads. It is an upper limit, so any number will do."""
    if n_threads is None:
        return None
    number = check_integer(n_threads, "n_threads")
    if number < 1:
        raise ValueError(f"n_threads must be None or at least 1, got {shown(number)}")
    return min(number, MOST_THREADS)


def check_name(value: object, name: str, allowed: tuple[str, ...]) -> str:
    """Return a word that is one of the allowed ones."""
    if not isinstance(value, str) or (word := str.__str__(value)) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")
    return word


def check_integer(value: Any, name: str) -> int:
    """Return an int; booleans are not numbers here."""
    if isinstance(value, _BOOLEANS):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None
    return int.__index__(number)  # for `number` may be of a subclass, whose comparisons are not int's


def check_number(value: Any, name: str, rule: str, is_allowed: Callable[[float], bool]) -> float:
    """Return a float that obeys the rule."""
    try:
        if isinstance(value, _NO_NUMBERS) or getattr(getattr(value, "dtype", None), "kind", None) == "c":
            raise TypeError
        number = float(value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {shown(value)}") from None
    except OverflowError:  # an integer beyond all floats
        number = np.inf if value > 0 else -np.inf
    if not is_allowed(number):
        raise ValueError(f"{name} must be {rule}, got {shown(value)}")
    return number


def check_scales(options: Options, dtype: np.dtype[Any]) -> None:
    """Refuse scales that are 0 or infinite in the arithmetic's dtype."""
    for name, scale in (("logit_scale", options.logit_scale), ("softcap", options.softcap)):
        if scale is None or 1e-30 < scale < 1e30:  # nearly all, in a thirtieth of the time
            continue
        with np.errstate(over="ignore", under="ignore"):
            rounded = dtype.type(scale)
        if not 0 < rounded < np.inf:
            raise ValueError(
                f"{name} must be positive and finite in {dtype.name}, in which these logits are computed with; "
                f"got {scale!r}, which is {rounded} there"
            )
    # The kernels multiply by it inside tanh. A quotient that is too small is none of their concerns.
    if options.softcap is not None and not options.logit_scale / options.softcap <= float(np.finfo(dtype).max):
        raise ValueError(
            f"logit_scale / softcap must be finite in {dtype.name}, in which these logits are computed with; "
            f"got {options.logit_scale!r} / {options.softcap!r}"
        )


def shown(value: object) -> str:
    """Return a value as messages show it: on one line, not too long, and whatever its own `repr` does."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."
