"""Whose arrays: NumPy's, or CuPy's and those of others on a GPU, and how either are taken in.

Design
------
1. The logits decide; every other array must live where they do. CuPy is imported for arrays on a GPU only.
2. What is on a GPU is found by DLPack's protocol or by the CUDA array interface, and taken in without a copy. Copying
   between host and device is left to the caller, who will want to know of it.
3. Looking at numbers on a GPU means waiting for it. Only whoever asks for it, by `synchronous_checks`, does.
4. To take in an object that is no array runs its own code, say `__array__`, which may do anything to the other
   arguments: give them another shape, or move their memory. So all of that comes first (`take_in`). What is checked and
   worked on are views made after it, of arrays of derived classes too. Nobody else has these, so their shapes stay, and
   they hold the memory: a resize fails while there are other references to it, unless its `refcheck=False` asks NumPy
   not to look.
"""

import contextlib
import contextvars
import sys
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce._wording import article

Array = NDArray[Any]

_DLPACK_CUDA = (2, 13)  # device types: memory of a GPU, and memory managed for it

# A constant, for this is asked of every argument of every call, and a union would be made anew each time.
_ON_HOST = (np.ndarray, np.generic, int, float, list, tuple, type(None))

# Arguments that results are written to, and those for which None stands for nothing.
RESULTS = ("out", "hess_out")
_NEEDED = ("logits", "log_probs", "target", "v", "x", "features", "linear_weight")

_is_synchronous = contextvars.ContextVar("fastce_is_synchronous", default=False)


def is_on_gpu(value: object) -> bool:
    """Return True for an array on a GPU."""
    kind = type(value)
    if issubclass(kind, _ON_HOST):
        return False
    if not _is_from(kind, "cupy") and hasattr(kind, "__dlpack_device__"):
        return value.__dlpack_device__()[0] in _DLPACK_CUDA  # type: ignore[attr-defined]
    return hasattr(kind, "__cuda_array_interface__")


def array_module(value: object) -> Any:
    """Return NumPy, or CuPy for arrays on a GPU."""
    if not is_on_gpu(value):
        return np
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"arrays on a GPU need CuPy, got {article(value)}: pip install 'fastce[cuda]' for CUDA 13, "
            f"'fastce[cuda12]' for CUDA 12",
            name=error.name,
        ) from error
    return cupy


def _is_from(kind: type, package: str) -> bool:
    """Return True if a type, or one that it is derived from, comes from a package."""
    return any(base.__module__.partition(".")[0] == package for base in kind.__mro__)


def is_masked(value: object) -> bool:
    """Return True for a masked array, without importing the module: until somebody else has, there are none."""
    ma = sys.modules.get("numpy.ma")
    return ma is not None and issubclass(type(value), ma.MaskedArray)


def take_in(xp: Any, given: Iterable[tuple[str, object]]) -> dict[str, Array]:
    """Return all arguments, (name, value) pairs, as arrays of the module `xp` that nobody else has.

    Those that are None are left out, as far as they need not be there, and so is what no result can be written to: that
    is refused when all else is right.
    """
    taken: dict[str, Array] = {}
    for name, value in given:
        if name == "grad_output" and xp is not np and isinstance(value, int | float | np.generic):
            taken[name] = np.asarray(value)  # a number, which needs none of the GPU's memory
        elif name in RESULTS:
            if xp is not np and value is not None:
                taken[name] = _on_gpu(value, name, xp)
            elif _is_plain(value):
                taken[name] = value  # type: ignore[assignment]
        elif value is not None or name in _NEEDED:
            taken[name] = _convert(value, name, xp)
    return {name: _view(array) for name, array in taken.items()}  # all at the end: see 4 above


def _view(array: Any) -> Array:
    view: Array = (np.asarray(array) if isinstance(array, np.ndarray) else array).view()
    return view


def _is_plain(value: object) -> bool:
    """Return True for a NumPy array that is not masked, by its type: what `isinstance` goes by may be pretended."""
    return issubclass(type(value), np.ndarray) and not is_masked(value)


def _convert(value: object, name: str, xp: Any) -> Array:
    """Return an array, by code of others where it is none yet."""
    if xp is np and _is_plain(value):
        return value  # type: ignore[return-value]  # nearly all there is
    _check_kind(value, name)
    if xp is not np:
        return _on_gpu(value, name, xp)
    if is_on_gpu(value):
        owner = "a CuPy array" if _is_from(type(value), "cupy") else "an array on a GPU"
        raise TypeError(f"{name} must be a NumPy array like every other argument, got {owner}")
    try:
        array = np.asarray(value)
    except ValueError as error:  # such as rows of differing lengths
        raise ValueError(f"{name} must be an array or like one, got {article(value)}: {error}") from error
    except (TypeError, RuntimeError) as error:  # such as a type that NumPy does not know
        raise TypeError(f"{name} must be an array or like one, got {article(value)}: {error}") from error
    # An empty list of classes has no kind of its own.
    return array.astype(np.int64) if name == "target" and array.size == 0 and isinstance(value, list | tuple) else array


def _check_kind(value: object, name: str) -> None:
    """Refuse what NumPy would take in as something else than its owner means."""
    if is_masked(value):
        advice = ", and give skipped rows a sample_weight of 0" if name in ("logits", "target") else ""
        raise TypeError(f"{name} must not be a masked array (fill it{advice})")
    if _is_from(type(value), "torch") and getattr(value, "requires_grad", False):
        raise TypeError(
            f"{name} must not be a tensor that requires a gradient, which would not reach it: "
            f"use fastce.torch.cross_entropy, or give {name}.detach()"
        )
    if type(value).__module__.startswith("scipy.sparse"):
        raise TypeError(f"{name} must be a dense array, got {article(value)}: convert it with {name}.toarray()")


def _on_gpu(value: Any, name: str, xp: Any) -> Array:
    array: Array
    if issubclass(type(value), xp.ndarray):
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


def bounds_view(array: Any) -> Array:
    """Return an array with the address, shape, strides and dtype of this one, whose numbers must not be read."""
    if array is None or isinstance(array, np.ndarray):
        return array  # type: ignore[return-value]
    bounds = SimpleNamespace(
        __array_interface__={
            "version": 3,
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.itemsize}",
            "data": (address_of(array), False),
        }
    )
    return np.asarray(bounds).view(array.dtype)


def device_of(array: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which new arrays are made where this one is."""
    place: contextlib.AbstractContextManager[Any] = (
        contextlib.nullcontext() if isinstance(array, np.ndarray) else array.device
    )
    return place


def is_host_readable(array: object) -> bool:
    """Return True if an array's numbers may be looked at."""
    return isinstance(array, np.ndarray) or is_synchronous()


def is_synchronous() -> bool:
    """Return True if checks wait for the GPU."""
    return _is_synchronous.get()


@contextlib.contextmanager
def synchronous_checks() -> Iterator[None]:
    """Check everything before anything is written, on the GPU too.

    Arrays on a GPU are not looked at otherwise: NaN and infinite weights go unnoticed, and class indices that do not
    exist are reported late, see `check_errors`. Within this context calls wait for the GPU, and raise as those of NumPy
    arrays do.

    Examples
    --------
    >>> import fastce.cuda
    >>> with fastce.cuda.synchronous_checks():
    ...     pass  # loss, grad = fastce.cross_entropy_with_grad(logits, target)
    """
    token = _is_synchronous.set(True)
    try:
        yield
    finally:
        _is_synchronous.reset(token)
