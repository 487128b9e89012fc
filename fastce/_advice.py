"""What to do about an argument that cannot be taken, found by looking at it: the ends of messages.

Arrays on a GPU are not looked at, unless it may be waited for.
"""

import numpy as np

from fastce._array import Array, array_module, is_host_readable
from fastce._wording import place_of

_LARGEST_INDEX = np.iinfo(np.int64).max


def about_dtype(name: str, array: Array) -> str:
    """Return what to do with an array of a dtype that logits cannot have."""
    if not array.dtype.isnative:
        return f" in another byte order: convert it with {name}.astype({name}.dtype.newbyteorder('='))"
    if array.dtype.kind in "biuO":
        return f": convert it with {array_module(array).__name__}.asarray({name}, dtype='float32')"
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return f": convert it with {name}.astype('float64')"
    return ""


def has_two_classes(target: Array) -> bool:
    """Return True for labels of a two-class model, one for each of one-dimensional logits, not for a one-hot row."""
    if target.ndim != 1 or not is_host_readable(target):
        return False
    return bool(((target == 0) | (target == 1)).all() and target.sum() != 1)


def about_floats(target: Array, ignore_index: int) -> str:
    """Return what to do with class indices of a floating dtype: not to make classes of NaN."""
    if not is_host_readable(target) or target.size == 0:
        return ": convert it with target.astype(np.int64)"
    missing = np.isnan(target)
    if missing.any():
        return (
            f" with NaN at {place_of(int(missing.argmax()), target.shape)}: give such rows the value of ignore_index, "
            f"np.nan_to_num(target, nan={ignore_index}).astype(np.int64)"
        )
    with np.errstate(all="ignore"):  # such a bound is infinite in float16
        odd = (target != np.floor(target)) | (np.abs(target) >= _LARGEST_INDEX)
    if odd.any():
        bad = int(odd.argmax())
        return f" with {target.reshape(-1)[bad]} at {place_of(bad, target.shape)}, which is no class"
    return ": convert it with target.astype(np.int64)"


def about_objects(target: Array, axis: int | None, ignore_index: int) -> str:
    """Return what to do with a target that holds no numbers; `axis` is the classes' if it is one-hot."""
    if target.dtype.kind == "b":
        return f": convert it with target.{'astype(np.int64)' if axis is None else f'argmax({axis})'}"
    items = target.reshape(-1).tolist() if target.dtype.kind in "OUST" else []
    if any(isinstance(item, str | bytes) for item in items):
        return ": number the classes with classes, target = np.unique(labels, return_inverse=True)"
    for i, item in enumerate(items):
        if item is None or type(item).__name__ in ("NAType", "NaTType") or (type(item) is float and np.isnan(item)):
            return (
                f" with a missing value, {item}, at {place_of(i, target.shape)}: give such rows the value of "
                f"ignore_index, in pandas target.fillna({ignore_index}).astype('int64')"
            )
    return ": convert it with target.astype(np.int64)" if items and all(isinstance(item, int) for item in items) else ""


def about_weights(name: str, weight: Array) -> str:
    """Return what to do with weights that are words or objects, as scikit-learn has them."""
    item = weight[()] if weight.ndim == 0 and weight.dtype.kind in "OUT" else None
    if item is None or name not in ("weight", "sample_weight"):
        return ""
    if name == "sample_weight":
        return ": give an array of one number for each row"
    if isinstance(item, dict):
        return ", a dict: give an array in the order of the classes, [weight[k] for k in range(n_classes)]"
    if isinstance(item, str) and item == "balanced":
        return ": give an array, target.size / (n_classes * np.bincount(target.ravel(), minlength=n_classes))"
    return ": give an array of one number for each class"
