"""What the compiled rules have in Python: an exception for what breaks them, and the one search that NumPy makes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Candidate solutions that a search for shared numbers may look at. Any: NumPy's stubs know -1 and 0 only.
_MAX_WORK: Any = 100_000


class RuleError(Exception):
    """A rule that an argument breaks: the rule's name, the argument's, and what belongs to it.

    `value` is a position or a number; `other` is the argument that a result overlaps. Never seen by users: whoever
    calls what is compiled converts the argument and calls again, or raises the exception of `_messages`.
    """

    def __init__(self, rule: str, name: str, value: float, other: str | None) -> None:
        super().__init__(rule, name, value, other)
        self.rule, self.name, self.value, self.other = rule, name, value, other


def share_memory(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Return True if two arrays share a number, or are too intricate to tell."""
    try:
        return np.shares_memory(a, b, max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        return True
