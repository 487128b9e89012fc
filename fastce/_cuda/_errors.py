"""Targets that do not exist, found by a kernel while nobody waits for it.

Design
------
1. The kernel never follows such a target. It lowers a word of pinned memory, which the host reads without asking the
   device: no copy, no event, no stall. The word is `NONE`, or the call's number and in the low bits its first bad row.
2. Words are used in turn, and what makes an error's text is kept for as many calls. A device may be further behind than
   that: then the number says that the word is an older call's, whose error names the row alone.
"""

import threading
from collections.abc import Callable

import numpy as np

N_WORDS = 64
ROW_BITS = 40
CALL_NUMBERS = 1 << 22
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
        self.makers: dict[int, MakeError] = {}  # by the numbers of the last calls
        self.n_calls = 0


_words: _Words | None = None
_lock = threading.Lock()  # so that no two calls have one number


def raise_pending() -> None:
    """Raise the error of the earliest call known to have met a bad target; forget that one."""
    if _words is None:
        return
    i = int(_words.words.argmin())
    word = int(_words.words[i])
    if word == NONE:
        return
    _words.words[i] = NONE
    call, row = divmod(word, 1 << ROW_BITS)
    make = _words.makers.get(call)
    if make is not None:
        raise make(row)
    raise IndexError(
        f"target must hold classes of its logits, or ignore_index: row {row} of a call more than {N_WORDS} calls ago "
        "does not, of which no more is known"
    )


def word_for(make: MakeError) -> tuple[int, int]:
    """Return the address of a word for one call, and what the kernel adds to a row's number there."""
    global _words
    with _lock:
        if _words is None:
            _words = _Words()
        call = _words.n_calls % CALL_NUMBERS
        _words.makers[call] = make
        _words.makers.pop((call - N_WORDS) % CALL_NUMBERS, None)
        _words.n_calls += 1
        return _words.address + 8 * (call % N_WORDS), call << ROW_BITS
