"""What follows from logits alone, on the CPU and on a GPU: the dtype of the arithmetic, and which axis is which."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastce._array import Array

Shape = tuple[int, ...]


def arithmetic(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that logits of the given one are computed in, which is that of losses and statistics."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def class_axis(logits: Array, axis: int | None) -> int:
    """Return the class axis as a number that is not negative."""
    return min(logits.ndim - 1, 1) if axis is None else axis % logits.ndim


def row_shape(logits: Array, axis: int | None) -> Shape:
    """Return the shape of the logits without the class axis."""
    k = class_axis(logits, axis)
    return logits.shape[:k] + logits.shape[k + 1 :]


def put_last(array: Array, axes: Sequence[int]) -> Array:
    """Return the array, or a view of it, with these axes last, in their order."""
    if axes == (array.ndim - 1,):
        return array
    return array.transpose((*[k for k in range(array.ndim) if k not in axes], *axes))
