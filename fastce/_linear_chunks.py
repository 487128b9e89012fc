"""The loss of a linear layer, computed chunk by chunk.

Design
------
1. The logits of all rows never exist. A chunk of rows is multiplied into one buffer, the kernels turn it into its own
   gradient there, and what the layer's gradients need is multiplied out of it before the next chunk comes.
2. What a mean divides by is known from the targets and weights alone, so every chunk is given its share of the whole
   batch's mean. Chunks leave the losses of their rows, which are summed once: their sum does not know the chunks.
3. Skipped rows are left out before anything is multiplied. That saves their time, and a NaN in their features cannot
   reach the gradient of the weight, where 0 * NaN would be NaN.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce import _cpu
from fastce._arguments import GRAD, LOSS
from fastce._array import Array
from fastce._axes import can_merge
from fastce._dispatch import call
from fastce._linear_grads import LayerGrads, Rows, for_blas
from fastce._linear_layer import Layer
from fastce._logits import Shape
from fastce._loss import Loss
from fastce._stats import CrossEntropyStats

# Logits of a chunk. The more rows, the less adding to the gradient of the weight costs: 8192 x 512 features and 32000
# classes take 1.30, 1.20, 1.15, 1.13 and 1.11 times as long as their products with 16, 32, 48, 64 and 96 MiB, by
# asv_bench/linear.py on two cores of a Zen 4. The limit is memory: 128 MiB besides the results.
LOGITS_BYTES = 2**26


def solve(layer: Layer, grads: LayerGrads | None, has_stats: bool) -> tuple[Loss, CrossEntropyStats | None]:
    """Return the loss, and statistics if there are to be any; add to the gradients."""
    arguments, normalizer = layer.arguments, layer.normalizer
    row_shape, reduction = arguments.row_shape, arguments.option("reduction")
    is_mean = reduction == "mean"
    has_divisor = not is_mean or normalizer != 0
    loss = np.zeros((prod(layer.lead), *layer.outer), layer.dtype)
    stats = _skipped(loss) if has_stats else None
    with np.errstate(all="ignore"):  # infinities, NaN and what underflows are results like others
        factors = np.ones(()) if arguments.grad_output is None else arguments.grad_output
        if is_mean and has_divisor:
            factors = factors.astype(np.float64) / normalizer
        # Each chunk is a call of its own; the sums over all rows are made below.
        arguments = arguments.with_named(
            target=arguments.target if arguments.is_prob else arguments.target.reshape(loss.shape),
            sample_weight=None if arguments.sample_weight is None else arguments.sample_weight.reshape(loss.shape),
            grad_output=np.broadcast_to(factors, row_shape).reshape(loss.shape),
            reduction="none",
            is_scaled=True,
        )
        if has_divisor or has_stats:  # rows of weights that add up to 0 have statistics
            _run_chunks(layer._replace(arguments=arguments), loss, grads if has_divisor else None, stats)
        if stats is not None:
            stats = CrossEntropyStats(*(field.reshape(row_shape) for field in stats))
        if reduction == "none":
            return loss.reshape(row_shape), stats
        value = _cpu.kernels.total(loss)
        if is_mean:
            value = value / normalizer if has_divisor else np.nan if arguments.option("on_empty") == "nan" else 0.0
        return layer.dtype.type(value), stats


def _skipped(loss: Array) -> CrossEntropyStats:
    """Return the statistics of skipped rows, for those of the others to be written over."""
    return CrossEntropyStats(
        np.zeros_like(loss), np.zeros_like(loss), np.full_like(loss, -1, np.int64), np.zeros_like(loss)
    )


def _run_chunks(layer: Layer, loss: Array, grads: LayerGrads | None, stats: CrossEntropyStats | None) -> None:
    """Write the losses of the rows that are not skipped, and their statistics, and add up the gradients."""
    kept = _find_kept(layer)
    chunks = list(_split(layer, kept))
    if not chunks:
        return
    # Once for all chunks. What SciPy multiplies by is read along the classes.
    weight = layer.weight.astype(layer.dtype, copy=False)
    weight = np.asfortranarray(weight) if layer.is_sparse else for_blas(weight)
    bias = None if layer.bias is None else layer.bias.astype(layer.dtype)
    layer = layer._replace(weight=weight, bias=bias)
    buffer = None if layer.is_sparse else np.empty((max(map(_count, chunks)), len(weight)), layer.dtype)

    def run(rows: Rows) -> None:
        features, logits = _multiply(layer, rows, buffer)
        results = _solve_chunk(layer, rows, logits, grads is not None, stats is not None)
        loss[rows] = results[0] if type(results) is tuple else results
        if stats is not None:
            for field, values in zip(stats, results[-1], strict=True):
                field[rows] = values
        if grads is not None:
            grads.add(weight, rows, logits, features, None if kept is None else kept[rows])

    for rows in chunks:
        run(rows)  # a function, so that nothing of a chunk is kept while the next is multiplied


def _find_kept(layer: Layer) -> NDArray[np.bool_] | None:
    """Return which positions of which rows are not skipped, a matrix; None if that is all of them."""
    arguments = layer.arguments
    kept = np.ones((prod(layer.lead), prod(layer.outer)), bool)
    if not arguments.is_prob:
        kept &= (arguments.target != arguments.option("ignore_index")).reshape(kept.shape)
    if arguments.sample_weight is not None:
        kept &= (arguments.sample_weight != 0).reshape(kept.shape)
    return None if kept.all() else kept


def _split(layer: Layer, kept: NDArray[np.bool_] | None) -> Iterator[Rows]:
    """Return the chunks: slices, or the numbers of the rows where some are left out."""
    chosen = None if kept is None or kept.any(axis=1).all() else np.flatnonzero(kept.any(axis=1))
    n_rows = prod(layer.lead) if chosen is None else len(chosen)
    if n_rows == 0 or 0 in layer.outer:
        return
    at_once = layer.chunk_rows
    if at_once is None:
        target = layer.arguments.target
        row_bytes = len(layer.weight) * layer.dtype.itemsize
        if layer.arguments.is_prob and (chosen is not None or not can_merge(target, range(len(layer.lead)))):
            row_bytes += len(layer.weight) * target.itemsize  # which are copied
        at_once = max(1, LOGITS_BYTES // row_bytes)
        at_once = -(-n_rows // -(-n_rows // at_once))  # no small one at the end
    for start in range(0, n_rows, at_once):
        rows = slice(start, min(start + at_once, n_rows))
        yield rows if chosen is None else chosen[rows]


def _count(rows: Rows) -> int:
    count: int = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    return count


def _multiply(layer: Layer, rows: Rows, buffer: Array | None) -> tuple[Any, Array]:
    """Return the features of some rows, as they are multiplied, and the logits, a matrix."""
    count, features, weight = _count(rows), layer.features, layer.weight
    if buffer is None:
        if count < features.shape[0]:  # SciPy's slices are copies
            features = features[rows]
        logits = features @ weight.T
    else:
        features = for_blas(_take(features, layer.lead, rows).astype(buffer.dtype, copy=False))
        logits = np.matmul(features, weight.T, out=buffer[:count])
    if layer.bias is not None:
        logits += layer.bias
    return features, logits


def _solve_chunk(layer: Layer, rows: Rows, logits: Array, has_grad: bool, has_stats: bool) -> Any:
    """Return what the compiled `call` does of some rows; with a gradient, that replaces the logits."""
    given = layer.arguments
    logits = logits.reshape(len(logits), layer.n_classes, *layer.outer)
    part = given._replace(
        logits=logits,
        target=_take(given.target, layer.lead, rows) if given.is_prob else given.target[rows],
        axis=1,
        sample_weight=None if given.sample_weight is None else given.sample_weight[rows],
        grad_output=given.grad_output[rows],
        out=logits if has_grad else None,
        make_stats=CrossEntropyStats if has_stats else None,
    )
    return call(GRAD if has_grad else LOSS, *part)


def _take(array: Array, lead: Shape, rows: Rows) -> Array:
    """Return some rows, counted in C order over the leading dimensions: a view if that is possible."""
    if can_merge(array, range(len(lead))):
        return array.reshape(prod(lead), *array.shape[len(lead) :])[rows]
    numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    return array[np.unravel_index(numbers, lead)]
