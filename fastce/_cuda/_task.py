"""What a launch is told: `Task` of ``task.cuh``, field by field."""

from collections.abc import Sequence
from typing import Any

import numpy as np

DIMS = 8  # as FC_DIMS

_VECTOR = np.dtype([("data", "u8"), ("is_double", "i8"), ("step", "i8")])
_MATRIX = np.dtype([("data", "u8"), ("class_stride", "i8"), ("row_strides", "i8", DIMS)])
TASK = np.dtype(
    [
        ("logits", _MATRIX),
        ("prob", _MATRIX),
        ("out", _MATRIX),
        ("target", "u8"),
        ("target_strides", "i8", DIMS),
        ("target_size", "i8"),
        ("ignore_index", "i8"),
        ("weight", "u8"),
        ("sample_weight", _VECTOR),
        ("grad_output", _VECTOR),
        *((name, "u8") for name in ("loss", "lse", "log_prob", "entropy", "argmax")),
        *((name, "i8") for name in ("n_rows", "n_classes", "n_dims")),
        ("shape", "i8", DIMS),
        *((name, "f8") for name in ("factor", "label_smoothing", "z_loss", "logit_scale", "softcap")),
        *((name, "u8") for name in ("normalizer", "error", "slots", "counter", "total", "result")),
        ("on_empty", "f8"),
    ]
)


def address(array: Any) -> int:
    """Return where an array's first element is; 0 for None."""
    return 0 if array is None else array.data.ptr


def merge_axes(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring row axes wherever all operands' strides allow; return shape and strides, one list for each.

    Axes of length 1 go. At least one axis is left.
    """
    merged: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis, n in enumerate(shape):
        if n == 1:
            continue
        if merged and all(own[-1] == n * given[axis] for own, given in zip(steps, strides, strict=True)):
            merged[-1] *= n
            for own, given in zip(steps, strides, strict=True):
                own[-1] = given[axis]
        else:
            merged.append(n)
            for own, given in zip(steps, strides, strict=True):
                own.append(given[axis])
    if not merged:
        return [1], [[0] for _ in strides]
    return merged, steps


def describe(
    logits: Any,
    target: Any,
    prob: Any,
    out: Any,
    weight: Any,
    sample_weight: Any,
    grad_output: Any,
    **fields: Any,
) -> np.ndarray[Any, np.dtype[np.void]]:
    """Return a task of one element; `fields` are arrays, whose addresses count, and numbers."""
    task = np.zeros(1, TASK)
    t = task[0]
    row_shape = logits.shape[:-1]
    operands = [(name, x) for name, x in (("logits", logits), ("prob", prob), ("out", out)) if x is not None]
    strides = [x.strides[:-1] for _, x in operands]
    if target is not None:
        strides.append(target.strides)
    shape, merged = merge_axes(row_shape, strides)
    if len(shape) > DIMS:
        raise ValueError(f"logits must have at most {DIMS} row axes that cannot be merged, got shape {logits.shape}")
    for (name, x), steps in zip(operands, merged, strict=False):
        t[name]["data"] = address(x)
        t[name]["class_stride"] = x.strides[-1]
        t[name]["row_strides"][: len(shape)] = steps
    if target is not None:
        t["target"] = address(target)
        t["target_strides"][: len(shape)] = merged[-1]
        t["target_size"] = target.itemsize if target.dtype.kind == "i" else -target.itemsize
    t["weight"] = address(weight)
    for name, x in (("sample_weight", sample_weight), ("grad_output", grad_output)):
        if x is not None:
            t[name] = (address(x), x.dtype == np.float64, x.size != 1)
    t["n_rows"] = int(np.prod(row_shape))
    t["n_classes"] = logits.shape[-1]
    t["n_dims"] = len(shape)
    t["shape"][: len(shape)] = shape
    t["logit_scale"] = t["factor"] = 1
    for name, value in fields.items():
        t[name] = value if isinstance(value, int | float) else address(value)
    return task
