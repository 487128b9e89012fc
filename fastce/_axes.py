"""Any axes of an array as one, and the kernels along it.

Design
------
1. Several axes are merged into one: by a view where their strides allow it, else in a copy. Their order is free, so the
   one is taken in which memory has them.
2. Numbers are taken in before arrays: to take them in may change an array (`_array`, Design 4).
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from fastce import _cpu
from fastce._array import Array
from fastce._checks import find_axis
from fastce._logits import arithmetic, put_last
from fastce._options import as_integer
from fastce._wording import shown

Axis = int | tuple[int, ...] | None


def plain_axis(axis: Axis) -> Axis:
    """Return `axis` with plain integers, of no range yet."""
    try:
        if isinstance(axis, tuple):
            return tuple(as_integer(k, "axis") for k in axis)
        return None if axis is None else as_integer(axis, "axis")
    except TypeError:
        raise TypeError(f"axis must be None, an integer or a tuple of integers, got {shown(axis)}") from None


def at_least_1d(x: Array) -> Array:
    """Return scalars as one element along one axis, as SciPy does."""
    return x if x.ndim else x.reshape(1)


def find_axes(axis: Axis, x: Array) -> tuple[int, ...]:
    """Return the axes as non-negative numbers, in the order in which memory has them."""
    if isinstance(axis, int):
        return (find_axis(axis, x.ndim, 0),)
    axes = range(x.ndim) if axis is None else [find_axis(k, x.ndim, 0) for k in axis]
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must name no axis twice, got {axis} for {x.ndim} dimensions")
    return tuple(sorted(axes, key=lambda k: -abs(x.strides[k])))


def can_merge(array: Array, axes: Sequence[int]) -> bool:
    """Return True if `merge` returns a view."""
    long = [k for k in axes if array.shape[k] != 1]
    return all(array.strides[j] == array.strides[k] * array.shape[k] for j, k in pairwise(long))


def merge(array: Array, axes: Sequence[int]) -> Array:
    """Return the array with these axes as one, the last."""
    moved = put_last(array, axes)
    if len(axes) == 1:
        return moved
    n_kept = array.ndim - len(axes)
    return moved.reshape((*moved.shape[:n_kept], prod(moved.shape[n_kept:])))


def along_last(x: Array, n_threads: int | None, **outputs: Any) -> None:
    """Write the softmax along the last axis, or its logarithm, to `out`, or the log-sum-exp to `lse`."""
    if isinstance(x, np.ndarray):
        _cpu.kernels.along_axis(x, x.ndim - 1, n_threads, **outputs)
        return
    from fastce import _cuda

    _cuda.run(x, arithmetic=arithmetic(x.dtype), **outputs)
