"""Targets that do not exist, found by a kernel while nobody waits for it.

Design
------
1. The kernel never follows such a target. It lowers a word of pinned memory, which the host reads without asking the
   device: no copy, no event, no stall. The word is the first bad row, or `NONE`.
2. Calls have words of their own, in turn, so that an error can be told with its call's numbers; these are kept until
   the word is used again.
"""

import threading
from collections.abc import Callable

import numpy as np

N_WORDS = 64
NONE = np.iinfo(np.int64).max

# Makes the error for a row.
MakeError = Callable[[int], Exception]


class _Words:
    """The words of all devices: pinned memory belongs to none."""

    def __init__(self) -> None:
        import cupy

        memory = cupy.cuda.alloc_pinned_memory(8 * N_WORDS)
        self.address = int(memory.ptr)
        self.words = np.frombuffer(memory, np.int64, N_WORDS)  # keeps the memory alive
        self.words[:] = NONE
        self.makers: list[MakeError | None] = [None] * N_WORDS
        self.n_used = 0


_words: _Words | None = None
_lock = threading.Lock()  # so that no two calls have one word


def raise_pending() -> None:
    """Raise the error of the earliest call known to have met a bad target; forget that one."""
    if _words is None or (_words.words == NONE).all():
        return
    oldest = _words.n_used % N_WORDS
    for i in (*range(oldest, N_WORDS), *range(oldest)):
        row, make = int(_words.words[i]), _words.makers[i]
        if row != NONE:
            _words.words[i] = NONE
            if make is not None:
                raise make(row)


def word_for(make: MakeError) -> int:
    """Return the address of a word for one call."""
    global _words
    with _lock:
        if _words is None:
            _words = _Words()
        i = _words.n_used % N_WORDS
        _words.n_used += 1
        _words.makers[i] = make
        return _words.address + 8 * i
