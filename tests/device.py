"""Problems on a GPU for tests that hold NumPy arrays: moved there, solved, and moved back.

The device is CuPy's if there is one, and always its stand-in, whose kernels run on the host (fake_cupy.py).
"""

import contextlib
import shutil

import numpy as np
import pytest

import fake_cupy
import fastce
from fastce import _cuda
from fastce._cuda import _errors, _program

# So little shared memory that a few thousand classes need a cluster, and 40000 are streamed: the host is slow.
SMALL = {
    "MaxSharedMemoryPerBlockOptin": 12 * 1024,
    "MaxSharedMemoryPerMultiprocessor": 39 * 1024,
    "MultiProcessorCount": 4,
}


def copy_sources(folder):
    """Copy the CUDA sources, and what they include, for changes; return where they are."""
    for name in ("_cuda", "_shared"):
        shutil.copytree(_program.DIRECTORY.parent / name, folder / name)
    return folder / "_cuda"


def has_gpu():
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:  # no CuPy, no driver, no device: each has an error of its own
        return False


PLACES = [
    pytest.param("host", marks=pytest.mark.skipif(not fake_cupy.compiler(), reason="no C++ compiler")),
    *([pytest.param("gpu", marks=pytest.mark.gpu)] if has_gpu() else []),
]


@contextlib.contextmanager
def device(place):
    """Give the module that is CuPy for a while."""
    with pytest.MonkeyPatch.context() as patch:
        if place == "host":
            fake_cupy.install(patch)
            patch.setattr(fake_cupy.settings, "attributes", SMALL)
        _forget()
        try:
            import cupy

            yield cupy
        finally:
            _forget()


def _forget():
    """Drop what belongs to the module that was CuPy before."""
    _cuda._limits.clear()
    _cuda._workspaces.clear()
    _program.kernel_of.cache_clear()
    _errors._words = None


def _inside(xp, x, grow, index):
    """Copy into a view of a larger array that is full of what must be neither read nor written."""
    whole = xp.full(tuple(map(grow, x.shape)), -7 if x.dtype.kind in "iu" else np.nan, x.dtype)
    view = whole[tuple(index for _ in x.shape)]
    view[...] = x
    return view


# Each makes an array on the device that is equal to its argument there.
LAYOUTS = {
    "C": lambda xp, x: x,
    "F": lambda xp, x: x.T.copy().T,
    "padded": lambda xp, x: _inside(xp, x, lambda n: n + 3, slice(1, -2)),  # rows begin at odd places
    "step": lambda xp, x: _inside(xp, x, lambda n: 2 * n + 1, slice(1, None, 2)),
    "reversed": lambda xp, x: x[tuple(slice(None, None, -1) for _ in x.shape)].copy()[
        tuple(slice(None, None, -1) for _ in x.shape)
    ],
}


def to_device(xp, value, layout="C"):
    """Move a NumPy array; let everything else pass."""
    return LAYOUTS[layout](xp, xp.asarray(value)) if isinstance(value, np.ndarray) else value


def to_host(value):
    """Move an array back, or those of a tuple."""
    if isinstance(value, tuple):
        moved = map(to_host, value)
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value.get()


def call_on(xp, function, *arrays, layout="C", **options):
    """Do what a function of NumPy arrays does, on the device; the options' arrays are not laid out anew."""
    moved = {name: to_device(xp, value) for name, value in options.items()}
    return to_host(function(*(to_device(xp, array, layout) for array in arrays), **moved))


def solve_on(xp, layout="C"):
    """Return `cross_entropy_with_grad` on the device, which checks that working in place makes no difference there."""

    def solve(logits, target, **options):
        moved = {name: to_device(xp, value) for name, value in options.items()}
        x, y = to_device(xp, logits, layout), to_device(xp, target, layout)
        result = fastce.cross_entropy_with_grad(x, y, **moved)
        assert all(isinstance(array, xp.ndarray) for array in result[:2])
        in_place = fastce.cross_entropy_with_grad(x, y, out=x, **moved)
        assert in_place[1] is x
        result, in_place = to_host(result), to_host(in_place)
        for got, again in zip(result[:2], in_place[:2], strict=True):
            assert np.array_equal(got, again, equal_nan=True)
        return result

    return solve
