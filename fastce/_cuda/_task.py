"""What a launch is told: `Task` of ``task.cuh``, field by field.

Design
------
1. A device's float32 arithmetic has no numbers below 1.2e-38: it takes them for 0. A factor that may be such, or beyond
   the largest number, is handed over as two, whose product with a logit is out of range only where the result is.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

DIMS = 8  # as FC_DIMS

_VECTOR = np.dtype([("data", "u8"), ("is_double", "i8"), ("step", "i8")])
_MATRIX = np.dtype([("data", "u8"), ("is_dense", "i8"), ("class_stride", "i8"), ("row_strides", "i8", DIMS)])
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
        *((name, "f8", 2) for name in ("scale_steps", "cap_steps")),
        *((name, "u8") for name in ("normalizer", "error")),
        ("error_call", "i8"),
        *((name, "u8") for name in ("slots", "counter", "total", "result")),
        ("on_empty", "f8"),
    ]
)


# The steps of a factor are powers of two near these at most: twice that covers what a type's numbers differ by.
_LARGEST_STEP = {np.dtype(np.float32): 120, np.dtype(np.float64): 1000}


def steps_of(numerator: float, denominator: float, arithmetic: np.dtype[Any]) -> tuple[float, float]:
    """Return two factors in the range of the arithmetic, not one large and one small, that make a quotient.

    Quotients that bring no logit into range are replaced by one that does as little. An infinite denominator gives 0.
    """
    if denominator == math.inf:
        return 0.0, 0.0
    largest = _LARGEST_STEP[arithmetic]
    (a, m), (b, n) = math.frexp(numerator), math.frexp(denominator)
    exponent = max(-2 * largest, min(2 * largest, m - n))
    half = int(exponent / 2)
    return math.ldexp(a / b, half), math.ldexp(1.0, exponent - half)


def is_below_normal(factor: float, arithmetic: np.dtype[Any]) -> bool:
    """Return True if the arithmetic may take a factor for 0."""
    return factor < float(np.finfo(arithmetic).tiny)


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
    arithmetic: np.dtype[Any],
    **fields: Any,
) -> np.ndarray[Any, np.dtype[np.void]]:
    """Return a task of one element, with the dtype that it is computed in.

    `fields` are arrays, whose addresses count, and numbers.
    """
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
        t[name]["is_dense"] = x.flags.c_contiguous
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
    scale, cap = float(t["logit_scale"]), float(t["softcap"]) or math.inf
    t["softcap"] = cap
    if is_below_normal(scale, arithmetic):
        t["scale_steps"] = steps_of(scale, 1.0, arithmetic)
    elif scale < 1 and cap == math.inf:
        t["scale_steps"] = 2 * scale, 0.5  # for differences of logits that are out of range themselves
    else:
        t["scale_steps"] = scale, 1.0
    t["cap_steps"] = steps_of(scale, cap, arithmetic)
    return task
