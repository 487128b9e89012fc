"""A loss of arrays on a GPU: how it is checked from here, and how it starts there."""

from typing import Any

import numpy as np

from fastce import _cpu
from fastce._arguments import ARRAYS, GRAD, NLL, STATS, Arguments
from fastce._array import array_module, bounds_view, device_of, is_synchronous
from fastce._cpu._rules import RuleError
from fastce._logits import arithmetic, class_axis, put_last
from fastce._messages import class_error

_INT64 = np.iinfo(np.int64)


def check(what: int, arguments: Arguments) -> None:
    """Check arrays by their bounds, and weights if that may be waited for; raise `RuleError` as `call` does."""
    bounds: dict[str, Any] = {name: bounds_view(getattr(arguments, name)) for name in ARRAYS}
    _cpu.kernels.call(what, *arguments._replace(**bounds), on_gpu=True)
    if arguments.is_scaled or not is_synchronous():
        return
    rounds = arithmetic(arguments.logits.dtype) == np.float32
    far = 0
    for bit, name in ((1, "weight"), (2, "sample_weight")):
        factors = getattr(arguments, name)
        if factors is not None and _cpu.kernels.is_far(factors.get(), name, rounds and name == "weight"):
            far |= bit
    if far:
        raise RuleError("far", "weight", far, None)


def launch(what: int, arguments: Arguments) -> Any:
    """Start a checked call; return its results, which are not computed yet."""
    from fastce import _cuda  # needs CuPy, which whoever has such arrays has

    given = arguments.by_name()
    logits, target, reduction = arguments.logits, arguments.target, given["reduction"]
    xp, axis = array_module(logits), class_axis(logits, arguments.axis)
    rows, dtype, is_prob = arguments.row_shape, arithmetic(logits.dtype), arguments.is_prob
    n_classes, ignore_index = logits.shape[axis], given["ignore_index"]
    on_empty = np.nan if given["on_empty"] == "nan" else 0.0
    factors = arguments.grad_output
    has_factor = isinstance(factors, np.ndarray)  # one for all rows, which needs none of the GPU's memory
    grad = stats = None
    with device_of(logits):
        if what == GRAD:
            grad = xp.empty_like(logits) if arguments.out is None else arguments.out
        if arguments.make_stats is not None:
            stats = arguments.make_stats(*(xp.empty(rows, kind) for kind in (dtype, dtype, np.int64, dtype)))
        if 0 in rows:
            value = on_empty if reduction == "mean" else 0.0
            loss = xp.full(rows if reduction == "none" else (), value, dtype)
    if 0 not in rows:
        loss = _cuda.run(
            put_last(logits, (axis,)),
            None if is_prob else target,
            put_last(target, (axis,)) if is_prob else None,
            None if grad is None else put_last(grad, (axis,)),
            arithmetic=dtype,
            weight=_as_vector(arguments.weight, xp, dtype),
            sample_weight=_as_vector(arguments.sample_weight, xp),
            grad_output=None if has_factor else _as_vector(factors, xp),
            factor=float(factors) if has_factor else 1.0,
            reduction=reduction,
            on_empty=on_empty,
            **({} if stats is None else stats._asdict()),
            normalized=what == NLL,
            ignore_index=_comparable(ignore_index, target.dtype),
            label_smoothing=given["label_smoothing"],
            z_loss=given["z_loss"],
            logit_scale=given["logit_scale"],
            softcap=given["softcap"] or 0.0,
            make_error=None if is_prob else lambda row: class_error(target, row, n_classes, ignore_index),
            wait=is_synchronous(),
        )
    if what == STATS:
        return stats
    if grad is None:
        return loss
    return (loss, grad) if stats is None else (loss, grad, stats)


def _as_vector(array: Any, xp: Any, dtype: Any = None) -> Any:
    """Return the elements one after the other, in C order."""
    return None if array is None else xp.ascontiguousarray(array, dtype).reshape(-1)


def _comparable(ignore_index: int, dtype: np.dtype[Any]) -> int:
    """Return ignore_index as int64: with the bits of a uint64 if targets are such, else a number that no target is."""
    if dtype.kind == "u" and dtype.itemsize == 8:
        return (ignore_index - _INT64.min) % 2**64 + _INT64.min
    return ignore_index if ignore_index <= _INT64.max else _INT64.min
