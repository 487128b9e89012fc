"""What the compiled rules have in Python: an exception for what breaks them, and what NumPy searches for."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Candidate solutions that a search for shared numbers may look at. Any: NumPy's stubs know -1 and 0 only.
_MAX_WORK: Any = 100_000

# Numbers of an intricate array that are looked at one by one.
_MOST_NUMBERS = 10_000_000


class RuleError(Exception):
    """A rule that an argument breaks, see `rule.pxd`: the rule's name, the argument's, and what belongs to the rule.

    That is a position or a number, and the argument that a result overlaps. Never seen by users: whoever calls what is
    compiled converts the argument and calls again, or raises the exception of `_messages`.
    """


def share_memory(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Return True if two arrays share a number, or are too intricate to tell."""
    try:
        return np.shares_memory(a, b, max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        return True


def has_own_elements(array: NDArray[Any]) -> bool:
    """Return True if no two numbers of an array share memory; False also if they are too many to tell."""
    if array.size > _MOST_NUMBERS:
        return False
    places = np.zeros((), np.int64)
    for size, stride in zip(array.shape, array.strides, strict=True):
        places = np.add.outer(places, stride * np.arange(size))
    return bool(np.diff(np.sort(places, axis=None)).min(initial=array.itemsize) >= array.itemsize)
