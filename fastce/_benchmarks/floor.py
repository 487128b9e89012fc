"""The memory floor: what NumPy takes to move the bytes that a call cannot do without.

A floor has as many threads as what it is compared with. Where one core fills the memory, one call of NumPy is the
fastest; elsewhere one call per thread is, each on an equal part. So both are timed, and the faster one counts. Of the
two functions that copy, too.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Move = Callable[[Array, Array], None]

# What a call cannot do without: a loss reads the logits, a gradient in place also writes them, and one that goes into
# another array is a copy.
READ, IN_PLACE, COPY = "read", "in place", "copy"


def make_floors(kind: str, logits: Array, n_threads: int, out: Array | None = None) -> list[Callable[[], object]]:
    """Return the ways to do it: by one call of NumPy and, with several threads, by one call for each.

    `out`, of the same shape and memory order, is where `COPY` writes; by default a new array.
    """
    if kind == COPY and out is None:
        out = np.zeros_like(logits)
    x = _flatten(logits)
    y = x if out is None else _flatten(out)
    return [way for move in _MOVES[kind] for way in _share(move, x, y, min(n_threads, len(x)))]


def _share(move: Move, x: Array, y: Array, n_parts: int) -> list[Callable[[], object]]:
    one_call = functools.partial(move, x, y)
    if n_parts < 2:
        return [one_call]
    first, *others = [
        functools.partial(move, *parts)
        for parts in zip(np.array_split(x, n_parts), np.array_split(y, n_parts), strict=True)
    ]

    def one_call_per_thread() -> None:
        started = [_pool(n_parts - 1).submit(part) for part in others]
        first()
        wait(started)

    return [one_call, one_call_per_thread]


def _read(x: Array, _y: Array) -> None:
    x.max()


def _scale(x: Array, y: Array) -> None:
    np.multiply(x, x.dtype.type(1), out=y)


def _copy(x: Array, y: Array) -> None:
    np.copyto(y, x)


# Two ways to copy: the C library's, which may write past the caches, and NumPy's loop, which took a tenth less on a
# Zen 4.
_MOVES: dict[str, list[Move]] = {READ: [_read], IN_PLACE: [_scale], COPY: [_copy, _scale]}


def _flatten(array: Array) -> Array:
    """Return a view with one axis, if the array is without gaps.

    NumPy computes with 16-bit floats one by one, far from the pace of memory; integers move the same bytes.
    """
    if array.dtype.itemsize == 2:
        array = array.view(np.uint16)
    flat = array.reshape(-1, order="A")
    return flat if np.shares_memory(flat, array) else array


@functools.cache
def _pool(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n)
