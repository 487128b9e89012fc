"""Class labels as other libraries keep them, in numbers of any kind, taken in as the class indices that they are."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def as_index(labels: ArrayLike, name: str, hint: str = "") -> NDArray[Any]:
    """Return labels that are whole numbers as integers; `hint` ends what is said of those that are not."""
    array = np.asarray(labels)
    if array.dtype.kind in "iu":
        return array
    if array.dtype.kind not in "bf" and array.dtype.name != "bfloat16":
        raise TypeError(
            f"{name} must be class indices 0, 1, ... of a numeric dtype, got {array.dtype}: make them by "
            f"classes, {name} = np.unique({name}, return_inverse=True)"
        )
    with np.errstate(invalid="ignore"):  # NaN and infinity, refused below
        index = array.astype(np.int64)
    is_whole = index == array
    if not is_whole.all():
        raise ValueError(f"{name} must be whole numbers, got {array[~is_whole][0]}{hint}")
    return index
