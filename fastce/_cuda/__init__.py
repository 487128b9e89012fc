"""The GPU backend: picks a kernel for a problem, and starts it on the current stream of the array's device.

Design
------
1. Nothing waits for the device, unless the caller asks for that. What a mean divides by is summed on the device and
   read by the kernel; bad targets are told later (`_errors`).
2. A mean takes three launches: the normalizer, the rows, the sum of their losses. Each sum has a fixed order.
3. What the launches share, sums of blocks and the rows' losses, is kept for each stream and thread: there the next
   call comes after this one.
4. A row has the same bits in every batch: its kernel depends on how the logits' classes lie in memory, on their number
   and type, never on how many rows there are, on gaps between these or on `out`. What remains: where a row of WARP,
   BLOCK or STREAM begins within 16 bytes decides which thread adds up what. To move numbers so that it does not would
   take instructions for each of them.
"""

import threading
from typing import Any

from fastce._cuda._errors import MakeError, raise_pending, word_for
from fastce._cuda._geometry import GRANULE, TOTAL_BLOCKS, Limits, choose_geometry, total_geometry
from fastce._cuda._program import Variant, launch
from fastce._cuda._task import address, describe, is_below_normal

__all__ = ["check_errors", "run"]

_MOST_CLASSES = 2**31 - 16  # so that classes, counted in granules from before the first, have 32 bits
_MOST_BLOCKS = 2**31 - 1

_limits: dict[int, Limits] = {}
_workspaces: dict[tuple[int, int, int], "_Workspace"] = {}


class _Workspace:
    """Memory of one stream: sums of blocks and how many have ended, the normalizer, losses of rows."""

    def __init__(self) -> None:
        import cupy

        self.slots = cupy.empty(TOTAL_BLOCKS, "float64")
        self.counter = cupy.zeros(1, "uint32")
        self.normalizer = cupy.empty(1, "float64")
        self.losses = cupy.empty(0, "float32")

    def losses_for(self, n_rows: int, dtype: Any) -> Any:
        """Return room for so many losses."""
        import cupy

        if self.losses.size < n_rows or self.losses.dtype != dtype:
            self.losses = cupy.empty(n_rows, dtype)
        return self.losses


def _limits_of(device: Any) -> Limits:
    if device.id not in _limits:
        attributes = device.attributes
        _limits[device.id] = Limits(
            shared_per_block=attributes["MaxSharedMemoryPerBlockOptin"],
            shared_per_sm=attributes["MaxSharedMemoryPerMultiprocessor"],
            has_clusters=int(device.compute_capability) >= 90,
        )
    return _limits[device.id]


def _workspace(device: Any) -> _Workspace:
    import cupy

    # The thread as well: the default stream of each has the same number.
    key = (device.id, cupy.cuda.get_current_stream().ptr, threading.get_ident())
    if key not in _workspaces:
        _workspaces[key] = _Workspace()
    return _workspaces[key]


def _geometry_inputs(logits: Any, out: Any) -> dict[str, bool]:
    """Return how the rows lie in memory.

    Alone a row must be told as in a batch. So the step of an axis of length 1, which may be anything, does not count,
    and a row that is no multiple of 16 bytes long counts as misaligned: without gaps all but the first are.
    """
    n_classes = logits.shape[-1]
    steps = [step for step, n in zip(logits.strides[:-1], logits.shape[:-1], strict=True) if n > 1]
    return {
        "is_row_major": logits.strides[-1] == logits.itemsize or n_classes == 1,
        "is_dense": all(x.flags.c_contiguous for x in (logits, out) if x is not None),
        "is_aligned": all(n % GRANULE == 0 for n in (address(logits), n_classes * logits.itemsize, *steps)),
    }


def run(
    logits: Any,
    target: Any = None,
    prob: Any = None,
    out: Any = None,
    *,
    arithmetic: Any,
    weight: Any = None,
    sample_weight: Any = None,
    grad_output: Any = None,
    factor: float = 1.0,
    reduction: str | None = None,
    on_empty: float = 0.0,
    lse: Any = None,
    log_prob: Any = None,
    entropy: Any = None,
    argmax: Any = None,
    log_softmax: bool = False,
    normalized: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    make_error: MakeError | None = None,
    wait: bool = False,
) -> Any:
    """Sweep over `logits`, whose last axis holds the classes, and write what is asked for; return the loss, if any.

    `out` is like `logits`: the gradient, without a target the softmax or its logarithm. `reduction` None means no loss.
    `arithmetic` is the dtype that these logits are computed in, which the loss has.
    `target` may have any integer dtype and strides; `make_error` makes the error for a row whose target does not exist.
    With `wait` targets are looked at before anything else is done.
    """
    import cupy

    raise_pending()
    device = logits.device
    arrays = {
        "target": target,
        "target of probabilities": prob,
        "out": out,
        "weight": weight,
        "sample_weight": sample_weight,
        "grad_output": grad_output,
    }
    for name, array in arrays.items():
        if array is not None and array.device.id != device.id:
            raise ValueError(f"{name} must be on GPU {device.id} like the logits, got GPU {array.device.id}")
    with device:
        space = _workspace(device)
        n_rows, n_classes = logits.size // logits.shape[-1], logits.shape[-1]
        if n_classes > _MOST_CLASSES:
            raise ValueError(f"logits must have at most 2**31 - 16 classes on a GPU, got {n_classes}")
        geometry = choose_geometry(
            n_rows, n_classes, logits.itemsize, _limits_of(device), **_geometry_inputs(logits, out)
        )
        if geometry.grid > _MOST_BLOCKS:
            raise ValueError(
                f"logits must have fewer rows on a GPU, got {n_rows} of {n_classes} classes: give them in several calls"
            )
        mean = reduction == "mean"
        loss = result = None
        if reduction == "none":
            loss = cupy.empty(logits.shape[:-1], arithmetic)
        elif reduction is not None:
            loss = space.losses_for(n_rows, arithmetic)
            result = cupy.empty((), arithmetic)
        error, error_call = (0, 0) if make_error is None else word_for(make_error)
        task = describe(
            logits,
            target,
            prob,
            out,
            weight,
            sample_weight,
            grad_output,
            arithmetic,
            loss=loss,
            lse=lse,
            log_prob=log_prob,
            entropy=entropy,
            argmax=argmax,
            ignore_index=ignore_index,
            factor=factor,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            normalizer=space.normalizer if mean else 0,
            error=error,
            error_call=error_call,
            slots=space.slots,
            counter=space.counter,
            total=space.normalizer,
            result=result,
            on_empty=on_empty,
        )
        alone = target is None and prob is None
        written = "log_softmax" if log_softmax else "softmax" if alone else "grad"
        variant = Variant(
            dtype=logits.dtype.name,
            prob_dtype=None if prob is None else prob.dtype.name,
            is_smoothed=label_smoothing != 0 and prob is None,
            out=None if out is None else written,
            has_softcap=softcap != 0 or is_below_normal(logit_scale, arithmetic),
            has_stats=log_prob is not None or entropy is not None or argmax is not None,
            is_normalized=normalized,
        )
        summing = Variant(dtype=logits.dtype.name)
        if mean or (wait and error):
            before = task.copy()
            before["loss"] = 0
            launch(summing, total_geometry(n_rows), device.id, before)
        if wait:
            cupy.cuda.get_current_stream().synchronize()
            raise_pending()
        launch(variant, geometry, device.id, task)
        if result is None:
            return loss
        launch(summing, total_geometry(n_rows), device.id, task)
        return result


def check_errors() -> None:
    """Wait for the current device, and raise what its kernels have found wrong.

    Calls with arrays on a GPU return before the kernels have run, so a class index that does not exist is found later:
    its row has the loss NaN and the gradient 0 at once, and the next call of this package raises its error, or this
    function. That is the default because waiting would cost each step of a training more than all its checks; inside
    `synchronous_checks` every call waits for its targets to be checked before it writes anything.

    Raises
    ------
    IndexError
        For the earliest call that met a class index outside 0 .. C-1 that is not its `ignore_index`.

    Examples
    --------
    >>> import fastce.cuda
    >>> fastce.cuda.check_errors()  # doctest: +SKIP
    """
    import cupy

    cupy.cuda.Device().synchronize()
    raise_pending()
