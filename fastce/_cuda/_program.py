"""From what a kernel is for to its source, and to the kernel itself, compiled when it is first needed.

Design
------
1. One flat name and macros in front of the source: CuPy's cache on disk then tells variants by their text alone, and
   its options, which it compiles an empty program for, are always the same.
2. The files that ``kernels.cu`` includes count as well: a digest of them stands in the text.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastce._cuda._geometry import Geometry
from fastce._cuda._task import TASK

DIRECTORY = Path(__file__).parent
NAME = "fastce"

_TYPES = {"float32": "float", "float64": "double", "float16": "half_t", "bfloat16": "bfloat_t"}
_OUT = {None: 0, "grad": 1, "softmax": 2, "log_softmax": 3}


class Variant(NamedTuple):
    """What a kernel computes, beside its geometry."""

    dtype: str = "float32"
    prob_dtype: str | None = None
    is_smoothed: bool = False
    out: str | None = None  # "grad", "softmax" or "log_softmax"
    has_softcap: bool = False
    has_stats: bool = False
    is_normalized: bool = False


@functools.cache
def digest() -> str:
    """Return what changes whenever an included file does."""
    files = [*sorted(DIRECTORY.glob("*.cuh")), DIRECTORY.parent / "_shared" / "formula.h"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def source_of(variant: Variant, geometry: Geometry) -> str:
    """Return the text of a kernel."""
    macros = {
        "FC_NAME": NAME,
        "FC_FAMILY": geometry.family,
        "FC_THREADS": geometry.threads,
        "FC_PER_SM": geometry.per_sm if variant.dtype != "float64" else 1,
        "FC_LANES": geometry.lanes,
        "FC_GRANULES": geometry.granules,
        "FC_CLUSTER": geometry.cluster,
        "FC_CLASSES": geometry.classes,
        "FC_T": _TYPES[variant.dtype],
        "FC_DOUBLE": int(variant.dtype == "float64"),
        "FC_PROB": _TYPES[variant.prob_dtype or "float32"],
        "FC_TARGET": 2 if variant.prob_dtype else int(variant.is_smoothed),
        "FC_OUT": _OUT[variant.out],
        "FC_CAP": int(variant.has_softcap),
        "FC_STATS": int(variant.has_stats),
        "FC_NORMALIZED": int(variant.is_normalized),
        "FC_TASK_BYTES": TASK.itemsize,
    }
    lines = [f"/* {digest()} */", *(f"#define {name} {value}" for name, value in macros.items())]
    return "\n".join([*lines, (DIRECTORY / "kernels.cu").read_text()])


@functools.cache
def kernel_of(variant: Variant, geometry: Geometry, device: int) -> Callable[..., None]:
    """Return a compiled kernel; `geometry` without its grid, which changes nothing.

    Geometries with the same macros share one function, whose maximum of shared memory is therefore never lowered.
    """
    import cupy

    module = cupy.RawModule(code=source_of(variant, geometry), options=("-std=c++17", f"-I{DIRECTORY}"))
    kernel: Any = module.get_function(NAME)
    if geometry.shared_bytes > kernel.max_dynamic_shared_size_bytes:
        kernel.max_dynamic_shared_size_bytes = geometry.shared_bytes
    function: Callable[..., None] = kernel
    return function


def launch(variant: Variant, geometry: Geometry, device: int, task: Any) -> None:
    """Start a kernel on the current stream."""
    kernel = kernel_of(variant, geometry._replace(grid=0), device)
    kernel((geometry.grid,), (geometry.threads,), (task,), shared_mem=geometry.shared_bytes)
