"""The loss of a linear layer: softmax cross-entropy of ``features @ linear_weight.T + linear_bias``, chunk by chunk.

Design
------
1. The logits of all rows never exist. A chunk of rows is multiplied into one buffer, the kernels turn it into its own
   gradient there, and what the layer's gradients need is multiplied out of it before the next chunk comes.
2. The products are BLAS's, through NumPy, and SciPy's for sparse features. Only the sum over chunks is made here:
   NumPy cannot ask BLAS to add to what is there. So ``grad.T @ features`` is made for a block of classes at a time,
   small enough to be added while it is in cache; whole, it would take as much memory again as the layer's weight.
3. What a mean divides by is known from the targets and weights alone, so every chunk is given its share of the whole
   batch's mean. Chunks leave the losses of their rows, which are summed once: their sum does not know the chunks.
4. Skipped rows are left out before anything is multiplied. That saves their time, and a NaN in their features cannot
   reach the gradient of the weight, where 0 * NaN would be NaN.
5. All checks are those of the logits, by a stand-in of their shape that holds a single number.
6. SciPy is never imported: whoever has a sparse matrix has SciPy, and the matrix brings its operators.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._array import Array, check_array
from fastce._backend import backend_of
from fastce._options import check_integer
from fastce._problem import Problem, arithmetic, check_logits, check_problem
from fastce._solve import find_normalizer, reduce_loss, solve

Loss = np.floating[Any] | NDArray[Any]
Grads = tuple[Loss, NDArray[Any], NDArray[Any], NDArray[Any] | None]
Rows = slice | NDArray[np.intp]

# Logits of a chunk. The more rows, the less adding to the gradient of the weight costs: 8192 x 512 features and 32000
# classes take 1.30, 1.20, 1.15, 1.13 and 1.11 times as long as their products with 16, 32, 48, 64 and 96 MiB, by
# asv_bench/linear.py on two cores of a Zen 4. The limit is memory: 128 MiB besides the results.
_LOGITS_BYTES = 2**26
# A block of the product that is added to the gradient of the weight: two or more fit in a cache of 16 MiB or more, with
# what they are added to. Derived, not measured.
_PRODUCT_BYTES = 2**22


class _Layer(NamedTuple):
    """A checked call. `features` is a matrix or CSR; the logits of `problem` have their shape and no numbers."""

    features: Any
    is_sparse: bool
    weight: Array
    bias: Array | None
    chunk_rows: int | None
    problem: Problem


class _Grads:
    """The gradients while they are summed: that of the features row by row, the others over all chunks."""

    def __init__(self, layer: _Layer) -> None:
        features, weight, work = layer.features, layer.weight, layer.problem.logits.dtype
        self.features: Array = np.zeros(
            features.shape, features.dtype, order="C" if layer.is_sparse else _order(features)
        )
        self.weight: Array = np.zeros(weight.shape, work, order=_order(weight))
        self.bias: Array | None = None if layer.bias is None else np.zeros(len(weight), work)
        self.is_empty = True


def linear_cross_entropy(
    features: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    chunk_rows: int | None = None,
    axis: int | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    on_empty: str = "nan",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    n_threads: int | None = None,
) -> Loss:
    """Return the softmax cross-entropy of a linear layer's output, without ever holding all of its logits.

    Parameters
    ----------
    features : array_like, shape (N, d), float32, float64, float16 or bfloat16; or SciPy CSR, float32 or float64
        The layer's input, of any strides. Of SciPy's sparse formats CSR alone is taken, as array or as matrix.
    linear_weight : array_like, shape (C, d), dtype of `features`
        The layer's weight, one row per class. Copied whole to float32 if it is of 16 bits.
    target : array_like
        Class indices, shape (N,), or class probabilities, shape (N, C), as for `cross_entropy`.
    linear_bias : array_like, shape (C,), dtype of `features`, optional
        The layer's bias. ``None`` means 0.
    chunk_rows : int, optional
        So many rows are worked on at a time. ``None`` lets the library choose: logits of 64 MiB. Changes the result by
        rounding only.
    axis : {None, 1}, optional
        As for `cross_entropy`; the logits have no other class axis.
    weight, sample_weight, ignore_index, label_smoothing, reduction, on_empty
        As for `cross_entropy`. `weight` is that of the classes.
    logit_scale, softcap, z_loss
        As for `cross_entropy`.
    n_threads : int, optional
        As for `cross_entropy`, of which it never changes the result. The products are BLAS's, which has threads and
        rounding of its own.

    Returns
    -------
    loss : scalar, or ndarray of shape (N,) if ``reduction="none"``
        float64 for float64 features, else float32.

    Raises
    ------
    IndexError, ValueError
        As `cross_entropy`, and if the shapes of `features`, `linear_weight` and `linear_bias` do not fit, `axis` is
        not 1, or `chunk_rows` is less than 1.
    TypeError
        As `cross_entropy`, and if the dtypes of `features`, `linear_weight` and `linear_bias` differ, or `features` is
        sparse in another format than CSR. Arrays on a GPU are refused.

    See Also
    --------
    linear_cross_entropy_with_grad : The same with the gradients.

    Notes
    -----
    The result is that of ``cross_entropy(features @ linear_weight.T + linear_bias, target, ...)`` but for rounding.
    Features and weights of 16 bits are multiplied in float32, and the logits are not rounded to 16 bits in between.

    Besides the logits of a chunk, memory is taken for what BLAS cannot read as it is: a weight that is neither C- nor
    Fortran-ordered, one of 16 bits, and for sparse features one that is not Fortran-ordered, are copied whole.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> features = np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> linear_weight = np.array([[2.0, 0.0], [0.0, 1.5], [0.0, 0.0]])
    >>> print(f"{fastce.linear_cross_entropy(features, linear_weight, [0, 2]):.6f}")
    1.667234
    """
    options = {
        "axis": axis,
        "weight": weight,
        "sample_weight": sample_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "on_empty": on_empty,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "z_loss": z_loss,
        "n_threads": n_threads,
    }
    layer, normalizer = _check_layer(features, linear_weight, target, linear_bias, chunk_rows, options)
    return _solve_layer(layer, normalizer, None)


def linear_cross_entropy_with_grad(
    features: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    chunk_rows: int | None = None,
    grad_output: ArrayLike | None = None,
    axis: int | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    on_empty: str = "nan",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    n_threads: int | None = None,
) -> Grads:
    """Return the softmax cross-entropy of a linear layer's output and its gradients with respect to the layer.

    Neither the logits nor their gradient are ever held whole.

    Parameters
    ----------
    features, linear_weight, target, linear_bias, chunk_rows
        As for `linear_cross_entropy`.
    grad_output : float, or array_like of shape (N,) if ``reduction="none"``, optional
        The upstream gradient, by which the gradients are multiplied. ``None`` means 1.
    axis, weight, sample_weight, ignore_index, label_smoothing, reduction, on_empty
        As for `linear_cross_entropy`.
    logit_scale, softcap, z_loss, n_threads
        As for `linear_cross_entropy`.

    Returns
    -------
    loss : scalar or ndarray
        As from `linear_cross_entropy`.
    grad_features : ndarray, shape (N, d)
        d loss / d features, times `grad_output`; dtype of `features`; dense for sparse features too, where it has a
        number for what was not stored. Exactly 0 in skipped rows.
    grad_linear_weight : ndarray, shape (C, d)
        d loss / d linear_weight, times `grad_output`; dtype of `linear_weight`.
    grad_linear_bias : ndarray, shape (C,), or None
        d loss / d linear_bias, times `grad_output`; dtype of `linear_bias`; None without one.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `linear_cross_entropy`, and for an unsuitable `grad_output`.

    Notes
    -----
    With G the gradient that `cross_entropy_with_grad` returns for the logits,

        grad_features = G W,    grad_linear_weight = G^T X,    grad_linear_bias = sum_i G_i.

    The sums over rows are made chunk by chunk, in float32 for 16 bits, and only the results are rounded to 16 bits. All
    gradients are 0 if the divisor of a mean is 0. A NaN in the features of a row that is not skipped makes the gradient
    of the weight NaN.

    Of the memory besides the results, 64 MiB are the logits of a chunk and 4 MiB a part of a product. Sparse features
    take a gradient of the weight more, and so do 16 bits.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> features = np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> linear_weight = np.array([[2.0, 0.0], [0.0, 1.5], [0.0, 0.0]])
    >>> loss, grad_features, grad_weight, grad_bias = fastce.linear_cross_entropy_with_grad(
    ...     features, linear_weight, [0, 2], linear_bias=np.zeros(3)
    ... )
    >>> print(grad_weight.round(4))
    [[-0.1065  0.0453]
     [ 0.0533  0.9094]
     [ 0.0533 -0.9547]]
    >>> print(grad_bias.round(4))
    [-0.0839  0.508  -0.4241]
    """
    options = {
        "grad_output": grad_output,
        "axis": axis,
        "weight": weight,
        "sample_weight": sample_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "on_empty": on_empty,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "z_loss": z_loss,
        "n_threads": n_threads,
    }
    layer, normalizer = _check_layer(features, linear_weight, target, linear_bias, chunk_rows, options)
    grads = _Grads(layer)
    loss = _solve_layer(layer, normalizer, grads)
    dtype = layer.weight.dtype
    with np.errstate(over="ignore"):
        grad_weight = grads.weight.astype(dtype, copy=False)
        grad_bias = None if grads.bias is None else grads.bias.astype(dtype, copy=False)
    return loss, grads.features, grad_weight, grad_bias


def _check_layer(
    features: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    linear_bias: ArrayLike | None,
    chunk_rows: int | None,
    options: dict[str, Any],
) -> tuple[_Layer, float]:
    """Check everything, the classes of all rows included; return the call and what its mean divides by."""
    is_sparse = _is_sparse(features)
    if is_sparse:
        _check_csr(features)
    else:
        features = _check_matrix(features, "features", "(N, d)")
    weight = _check_matrix(linear_weight, "linear_weight", "(C, d)")
    n_rows, n_features = features.shape
    n_classes = len(weight)
    if weight.shape[1] != n_features:
        raise ValueError(
            f"linear_weight must have shape (C, {n_features}) for features of shape {features.shape}, "
            f"got {weight.shape}"
        )
    _check_dtype(weight, "linear_weight", features.dtype)
    bias = None
    if linear_bias is not None:
        bias = check_array(linear_bias, "linear_bias")
        if bias.shape != (n_classes,):
            raise ValueError(f"linear_bias must have shape {(n_classes,)}, got {bias.shape}")
        _check_dtype(bias, "linear_bias", features.dtype)
    if chunk_rows is not None:
        chunk_rows = check_integer(chunk_rows, "chunk_rows")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be None or at least 1, got {chunk_rows}")
    if options["axis"] is not None and check_integer(options["axis"], "axis") != 1:
        raise ValueError(f"axis must be None or 1, got {options['axis']}")
    logits = np.broadcast_to(np.zeros((), arithmetic(features.dtype)), (n_rows, n_classes))
    problem, _ = check_problem(logits, target, **options)
    normalizer = find_normalizer(problem, backend_of(problem.logits))
    return _Layer(features, is_sparse, weight, bias, chunk_rows, problem), normalizer


def _is_sparse(value: object) -> bool:
    """Tell SciPy's sparse arrays and matrices, and what is derived from them."""
    return any(kind.__module__.startswith("scipy.sparse") for kind in type(value).__mro__)


def _check_csr(features: Any) -> None:
    """Refuse sparse features that are no matrix of floats in the CSR format."""
    if features.format != "csr":
        raise TypeError(
            f"features must be dense or of SciPy's CSR format, got {features.format}: convert it with features.tocsr()"
        )
    if features.ndim != 2:
        raise ValueError(f"features must have shape (N, d), got {features.shape}")
    dtype = check_logits(features.data, "features").dtype
    if dtype != arithmetic(dtype):
        raise TypeError(f"features of SciPy's CSR format must be float32 or float64, got {dtype.name}")


def _check_matrix(value: ArrayLike, name: str, shape: str) -> Array:
    array = check_logits(check_array(value, name), name)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array


def _check_dtype(array: Array, name: str, dtype: np.dtype[Any]) -> None:
    if array.dtype != dtype:
        hint = " in another byte order" if array.dtype.newbyteorder() == dtype else ""
        raise TypeError(f"{name} must have the dtype of features, {dtype.name}, got {array.dtype.name}{hint}")


def _solve_layer(layer: _Layer, normalizer: float, grads: _Grads | None) -> Loss:
    """Run a checked call and return the loss; add to the gradients, if there are any."""
    problem = layer.problem
    options = problem.options
    mean = options.reduction == "mean"
    loss = np.zeros(problem.row_shape, problem.logits.dtype)
    if not (mean and normalizer == 0):
        kept = _find_kept(problem)
        grad_output = problem.grad_output / normalizer if mean else problem.grad_output
        # Each chunk is a call of its own; the sums over all rows are made below.
        part = problem._replace(grad_output=grad_output, options=options._replace(reduction="none"))
        with np.errstate(all="ignore"):  # infinities and NaN are results like others
            _run_chunks(layer._replace(problem=part), kept, loss, grads)
    if options.reduction == "none":
        return loss
    return reduce_loss(backend_of(loss).total(loss), normalizer, options, loss.dtype)


def _find_kept(problem: Problem) -> NDArray[np.intp] | None:
    """Return the rows that are not skipped; None if that is all of them."""
    kept = np.ones(problem.row_shape, bool)
    if problem.target is not None:
        kept &= problem.target != problem.ignore_index
    if problem.sample_weight is not None:
        kept &= problem.sample_weight != 0
    return None if kept.all() else np.flatnonzero(kept)


def _run_chunks(layer: _Layer, kept: NDArray[np.intp] | None, loss: Array, grads: _Grads | None) -> None:
    work = layer.problem.logits.dtype
    n_classes = len(layer.weight)
    chunks = list(_split(layer, kept))
    if not chunks:
        return
    # Once for all chunks. What SciPy multiplies by is read along the classes.
    weight = layer.weight.astype(work, copy=False)
    weight = np.asfortranarray(weight) if layer.is_sparse else _for_blas(weight)
    layer = layer._replace(weight=weight, bias=None if layer.bias is None else layer.bias.astype(work))
    most = max(_count(rows) for rows in chunks)
    buffer = None if layer.is_sparse else np.empty((most, n_classes), work)
    for rows in chunks:
        _run_chunk(layer, rows, buffer, loss, grads)


def _split(layer: _Layer, kept: NDArray[np.intp] | None) -> Iterator[Rows]:
    """Return the chunks: slices, or the numbers of the rows where some are left out."""
    n_rows = layer.features.shape[0] if kept is None else len(kept)
    if n_rows == 0:
        return
    at_once = layer.chunk_rows
    if at_once is None:
        row_bytes = len(layer.weight) * layer.problem.logits.itemsize
        if kept is not None and layer.problem.prob is not None:
            row_bytes += len(layer.weight) * layer.problem.prob.itemsize  # which are copied, to leave rows out
        at_once = max(1, _LOGITS_BYTES // row_bytes)
        at_once = -(-n_rows // -(-n_rows // at_once))  # no small one at the end
    for start in range(0, n_rows, at_once):
        rows = slice(start, min(start + at_once, n_rows))
        yield rows if kept is None else kept[rows]


def _count(rows: Rows) -> int:
    count: int = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    return count


def _run_chunk(layer: _Layer, rows: Rows, buffer: Array | None, loss: Array, grads: _Grads | None) -> None:
    """Write the losses of some rows and add their part of the gradients."""
    problem, weight = layer.problem, layer.weight
    features = layer.features
    if _count(rows) < features.shape[0] or not layer.is_sparse:  # SciPy's slices are copies
        features = features[rows]
    if buffer is None:
        logits = features @ weight.T
    else:
        features = _for_blas(features.astype(buffer.dtype, copy=False))
        logits = np.matmul(features, weight.T, out=buffer[: _count(rows)])
    if layer.bias is not None:
        logits += layer.bias
    chunk = problem._replace(
        logits=logits,
        target=None if problem.target is None else problem.target[rows],
        prob=None if problem.prob is None else problem.prob[rows],
        sample_weight=None if problem.sample_weight is None else problem.sample_weight[rows],
        grad_output=problem.grad_output if isinstance(problem.grad_output, float) else problem.grad_output[rows],
        row_shape=(_count(rows),),
    )
    loss[rows] = solve(chunk, None if grads is None else logits)
    if grads is None:
        return
    grad = logits  # the kernels have written it there
    if isinstance(rows, slice) and grads.features.dtype == grad.dtype:
        np.matmul(grad, weight, out=grads.features[rows])
    else:
        grads.features[rows] = grad @ weight
    if grads.bias is not None:
        grads.bias += grad.sum(axis=0)
    if not layer.is_sparse:
        _add_product(grads, grad, features)
    elif grads.is_empty:
        grads.weight = (features.T @ grad).T
    else:
        grads.weight += (features.T @ grad).T
    grads.is_empty = False


def _add_product(grads: _Grads, grad: Array, features: Array) -> None:
    """Add ``grad.T @ features`` to the gradient of the weight."""
    if grads.is_empty:
        np.matmul(grad.T, features, out=grads.weight)
        return
    n_classes, n_features = grads.weight.shape
    size = max(1, _PRODUCT_BYTES // max(1, n_features * grad.itemsize))
    product = np.empty((min(size, n_classes), n_features), grad.dtype)
    for start in range(0, n_classes, size):
        total = grads.weight[start : start + size]
        total += np.matmul(grad[:, start : start + size].T, features, out=product[: len(total)])


def _order(array: Array) -> Literal["C", "F"]:
    """Return the memory order of a matrix, as a word for NumPy."""
    return "F" if array.flags.fnc else "C"


def _for_blas(matrix: Array) -> Array:
    """Return a matrix that BLAS can read, a copy if need be: without BLAS, NumPy multiplies many times slower."""
    size = matrix.itemsize
    for rows in (matrix, matrix.T):
        row, number = rows.strides
        if matrix.flags.aligned and number == size and row % size == 0 and row >= rows.shape[1] * size:
            return matrix
    return np.ascontiguousarray(matrix)
