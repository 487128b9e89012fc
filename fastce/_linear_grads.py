"""The gradients of a linear layer, summed over chunks of rows.

Design
------
1. The products are BLAS's, through NumPy, and SciPy's for sparse features. Only the sum over chunks is made here:
   NumPy cannot ask BLAS to add to what is there. So ``grad.T @ features`` is made for a block of classes at a time,
   small enough to be added while it is in cache; whole, it would take as much memory again as the layer's weight.
2. A row of features may be skipped at some of its positions. Its gradient is 0 there, and goes through the products
   with the rest. Where that would make NaN of 0 times infinity or NaN, the products are made position by position.
"""

from collections.abc import Iterable
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastce._array import Array
from fastce._linear_layer import Layer

Grad = NDArray[Any] | None
Rows = slice | NDArray[np.intp]

# The gradients that there are, in the order in which they are returned.
LEAVES = ("features", "linear_weight", "linear_bias")

# A block of the product that is added to the gradient of the weight: two or more fit in a cache of 16 MiB or more, with
# what they are added to. Derived, not measured.
PRODUCT_BYTES = 2**22


def check_wrt(wrt: str | Iterable[str]) -> frozenset[str]:
    """Return the names of the gradients that are wanted."""
    rule = f"wrt must be one or more of {', '.join(map(repr, LEAVES))}"
    try:
        names: tuple[Any, ...] = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    except TypeError:
        raise TypeError(f"{rule}, got {wrt!r}") from None
    for name in names:
        if not isinstance(name, str) or name not in LEAVES:
            raise ValueError(f"{rule}, got {name!r}")
    return frozenset(names)


class LayerGrads:
    """The gradients that are wanted, while they are summed: of the features row by row, the others over all chunks.

    They are matrices, and a vector, in the arithmetic's dtype, but for that of the features.
    """

    def __init__(self, layer: Layer, wanted: frozenset[str]) -> None:
        features, weight = layer.features, layer.weight
        order = "C" if layer.is_sparse or len(layer.lead) != 1 else _order(features)
        has_bias = "linear_bias" in wanted and layer.bias is not None
        self._layer = layer
        self._is_empty = True
        self._features: Grad = (
            np.zeros((prod(layer.lead), weight.shape[1]), features.dtype, order) if "features" in wanted else None
        )
        self._weight: Grad = np.zeros(weight.shape, layer.dtype, _order(weight)) if "linear_weight" in wanted else None
        self._bias: Grad = np.zeros(len(weight), layer.dtype) if has_bias else None
        self.are_any = not (self._features is None and self._weight is None and self._bias is None)

    def add(self, weight: Array, rows: Rows, grad: Array, features: Any, kept: NDArray[np.bool_] | None) -> None:
        """Add what comes of some rows, whose gradient of the logits is given, a matrix.

        `weight` and `features` are as they were multiplied. `kept` says which positions of these rows are not skipped.
        """
        if self._bias is not None:
            self._bias += grad.sum(axis=0)
        if kept is not None and not _are_skipped_by_zeros(weight, features, kept):
            self._add_by_position(weight, rows, grad, features, kept)
        else:
            if self._features is not None:
                if isinstance(rows, slice) and self._features.dtype == grad.dtype:
                    np.matmul(grad, weight, out=self._features[rows])
                else:
                    self._features[rows] = grad @ weight
            if self._weight is not None:
                if isinstance(features, np.ndarray):
                    _add_product(self._weight, grad, features, self._is_empty)
                elif self._is_empty:
                    self._weight = (features.T @ grad).T
                else:
                    self._weight += (features.T @ grad).T
        self._is_empty = False

    def _add_by_position(self, weight: Array, rows: Rows, grad: Array, features: Any, kept: NDArray[np.bool_]) -> None:
        """Add to the gradients of features and weight, at each position for the rows that are not skipped there."""
        count, n_positions = kept.shape
        n_classes, n_features = len(weight) // n_positions, weight.shape[1]
        grad = grad.reshape(count, n_classes, n_positions)
        weight = weight.reshape(n_classes, n_positions, n_features)
        of_features = np.zeros((count, n_features), grad.dtype)
        of_weight = None if self._weight is None else self._weight.reshape(weight.shape)
        for position in range(n_positions):
            chosen = np.flatnonzero(kept[:, position])
            part = grad[chosen, :, position]
            if self._features is not None:
                of_features[chosen] += part @ weight[:, position]
            if of_weight is not None:
                of_weight[:, position] += (features[chosen].T @ part).T
        if self._features is not None:
            self._features[rows] = of_features

    def results(self) -> tuple[Grad, Grad, Grad]:
        """Return the gradients in the shapes and the dtype of what they belong to."""
        layer, features, weight, bias = self._layer, self._features, self._weight, self._bias
        dtype, of_logits, n_features = layer.weight.dtype, (layer.n_classes, *layer.outer), layer.weight.shape[1]
        with np.errstate(all="ignore"):  # 16 bits may overflow and underflow
            return (
                None if features is None else features.reshape(*layer.lead, n_features),
                None if weight is None else weight.astype(dtype, copy=False).reshape(*of_logits, n_features),
                None if bias is None else bias.astype(dtype, copy=False).reshape(of_logits),
            )


def _are_skipped_by_zeros(weight: Array, features: Any, kept: NDArray[np.bool_]) -> bool:
    """Return True if a gradient of 0 in a product leaves a skipped position out, for all factors there are finite."""
    partly = np.flatnonzero(~kept.all(axis=1))
    return len(partly) == 0 or (_is_finite(weight) and _is_finite(features[partly]))


def _is_finite(values: Any) -> bool:
    """Return True if 0 times any of these numbers is 0, but where their sum overflows perhaps not."""
    return bool(np.isfinite(values.sum()))


def _add_product(total: Array, grad: Array, features: Array, is_empty: bool) -> None:
    """Add ``grad.T @ features`` to the gradient of the weight."""
    if is_empty:
        np.matmul(grad.T, features, out=total)
        return
    n_classes, n_features = total.shape
    size = max(1, PRODUCT_BYTES // max(1, n_features * grad.itemsize))
    product = np.empty((min(size, n_classes), n_features), grad.dtype)
    for start in range(0, n_classes, size):
        part = total[start : start + size]
        part += np.matmul(grad[:, start : start + size].T, features, out=product[: len(part)])


def _order(array: Array) -> Literal["C", "F"]:
    """Return the memory order of a matrix, as a word for NumPy."""
    return "F" if array.flags.fnc else "C"


def for_blas(matrix: Array) -> Array:
    """Return a matrix that BLAS can read, a copy if need be: without BLAS, NumPy multiplies many times slower."""
    size = matrix.itemsize
    for rows in (matrix, matrix.T):
        row, number = rows.strides
        if matrix.flags.aligned and number == size and row % size == 0 and row >= rows.shape[1] * size:
            return matrix
    return np.ascontiguousarray(matrix)
