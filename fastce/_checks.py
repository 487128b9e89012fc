"""Single rules of the compiled ones, with their exceptions, for functions that are more than one loss."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastce import _cpu
from fastce._array import Array, bounds_view
from fastce._cpu._rules import RuleError
from fastce._messages import Broken, exception_for
from fastce._options import as_integer


def check_array(array: Array, name: str) -> None:
    """Refuse arrays that the kernels do not know."""
    _check("check_array", bounds_view(array), name, not isinstance(array, np.ndarray), given={name: array})


def find_axis(axis: int | None, n_dims: int, default: int) -> int:
    """Return an axis as a number that is not negative."""
    number: int = _check("find_axis", n_dims, axis, default, given={"axis": axis})
    return number


def check_n_threads(n_threads: int | None) -> int | None:
    """Return None or a positive integer."""
    if n_threads is None:
        return None
    plain = as_integer(n_threads, "n_threads")
    _check("find_n_threads", plain, given={"n_threads": plain})
    return plain


def check_result(out: Any, like: Array, name: str, inputs: Sequence[tuple[str, Array]] = (), *, in_place: bool) -> None:
    """Refuse an `out` that does not fit a result `like` this one, of this name; `in_place` it may be `like` itself."""
    place = bounds_view(out) if isinstance(out, type(like)) else out
    bounds = [(word, bounds_view(array)) for word, array in inputs]
    arguments = place, bounds_view(like), bounds, in_place, not isinstance(like, np.ndarray)
    given = {"logits": like, "out": out}
    _check("check_result", *arguments, given=given, like=name, in_place=in_place)


def _check(rule: str, *arguments: Any, given: dict[str, Any], **words: Any) -> Any:
    """Call one of the compiled checks."""
    try:
        return getattr(_cpu.kernels, rule)(*arguments)
    except RuleError as error:
        broken = Broken(*error.args)
    raise exception_for(broken, given, **words)
