"""Whose arrays: NumPy's, or CuPy's and those of others on a GPU, and how either are taken in.

Design
------
1. The logits decide; every other array must live where they do. CuPy is imported for arrays on a GPU only.
2. What is on a GPU is told by DLPack's protocol or by the CUDA array interface, and taken in without a copy. Copying
   between host and device is left to the caller, who will want to know of it.
3. Looking at numbers on a GPU means waiting for it. Only whoever asks for it, by `synchronous_checks`, does.
"""

import contextlib
import contextvars
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

_DLPACK_CUDA = (2, 13)  # device types: memory of a GPU, and memory managed for it

# A constant, for this is asked of every argument of every call, and a union would be made anew each time.
_ON_HOST = (np.ndarray, np.generic, int, float, list, tuple, type(None))

_waits = contextvars.ContextVar("fastce_waits", default=False)


def is_on_gpu(value: object) -> bool:
    """Tell whether an object is an array on a GPU."""
    if isinstance(value, _ON_HOST):
        return False
    kind = type(value)
    if kind.__module__.partition(".")[0] != "cupy" and hasattr(kind, "__dlpack_device__"):
        return value.__dlpack_device__()[0] in _DLPACK_CUDA  # type: ignore[attr-defined]
    return hasattr(kind, "__cuda_array_interface__")


def array_module(value: object) -> Any:
    """Return NumPy, or CuPy for arrays on a GPU."""
    if not is_on_gpu(value):
        return np
    import cupy

    return cupy


def is_masked(value: object) -> bool:
    """Tell masked arrays, without importing their module: until somebody else has, there are none."""
    ma = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(value, ma.MaskedArray)


def check_array(value: ArrayLike, name: str, xp: Any = np) -> Array:
    """Return `value` as a plain array of the module `xp`."""
    if xp is not np:
        return _on_gpu(value, name, xp)
    if is_masked(value):
        raise TypeError(f"{name} must not be a masked array (fill it, and give skipped rows a sample_weight of 0)")
    if is_on_gpu(value):
        owner = "a CuPy array" if type(value).__module__.partition(".")[0] == "cupy" else "an array on a GPU"
        raise TypeError(f"{name} must be a NumPy array like every other argument, got {owner}")
    return np.asarray(value)


def _on_gpu(value: Any, name: str, xp: Any) -> Array:
    array: Array
    if isinstance(value, xp.ndarray):
        array = value
        return array
    if isinstance(value, int | float | np.generic):
        array = xp.asarray(value)  # a number has no place
        return array
    if not is_on_gpu(value):
        raise TypeError(f"{name} must be on the GPU like the logits, got {type(value).__name__} on the host")
    array = xp.from_dlpack(value) if hasattr(value, "__dlpack__") else xp.asarray(value)
    return array


def address_of(array: Any) -> int:
    """Return where an array's first element is."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def outline(array: Any) -> Array:
    """Return an array at the same place that must not be read, for NumPy to tell what overlaps."""
    if isinstance(array, np.ndarray):
        return array

    class Outline:
        __array_interface__: ClassVar[dict[str, Any]] = {
            "version": 3,
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.itemsize}",
            "data": (address_of(array), True),
        }

    return np.asarray(Outline())


def device_of(array: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which new arrays are made where this one is."""
    place: contextlib.AbstractContextManager[Any] = (
        contextlib.nullcontext() if isinstance(array, np.ndarray) else array.device
    )
    return place


def may_look_at(array: object) -> bool:
    """Tell whether an array's numbers may be checked."""
    return isinstance(array, np.ndarray) or waits()


def waits() -> bool:
    """Tell whether checks wait for the GPU."""
    return _waits.get()


@contextlib.contextmanager
def synchronous_checks() -> Iterator[None]:
    """Check everything before anything is written, on the GPU too.

    Arrays on a GPU are not looked at otherwise: negative weights go unnoticed, and class indices that do not exist are
    told late, see `check_errors`. Within this context calls wait for the GPU, and raise as those of NumPy arrays do.

    Examples
    --------
    >>> import fastce.cuda
    >>> with fastce.cuda.synchronous_checks():
    ...     pass  # loss, grad = fastce.cross_entropy_with_grad(logits, target)
    """
    token = _waits.set(True)
    try:
        yield
    finally:
        _waits.reset(token)
