"""A linear layer and what its loss is asked for: one call, checked before anything is computed.

Design
------
1. All checks are those of the logits, by a stand-in of their shape that holds a single number.
2. Features of any leading shape are rows of a matrix, and a weight of shape (C, d1, ..., dK, d) is a matrix of
   C d1 ... dK rows: one product makes the logits of all positions of a row of features. Here a *row* is such a row of
   features, with one softmax for each of its positions; where K is 0 there is one position.
3. What runs code of the caller's (conversions of arguments) is done before any shape is looked at: such code may
   reshape or resize the other arguments.
4. SciPy is never imported: whoever has a sparse matrix has SciPy, and the matrix brings its operators.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastce._arguments import NORMALIZER, Arguments
from fastce._array import Array, take_in
from fastce._checks import check_array, find_axis
from fastce._dispatch import settle, with_plain_options
from fastce._logits import Shape, arithmetic
from fastce._options import as_integer


class Layer(NamedTuple):
    """A checked call.

    `features` is an array of shape (*lead, d), or CSR of two dimensions; `weight` and `bias` are a matrix and a vector
    of one entry for each class and position, in this order; `outer` is (d1, ..., dK). `arguments` are those of the
    loss, with a stand-in of the logits, and `dtype` is that of all arithmetic. A mean divides by `normalizer`.
    """

    features: Any
    is_sparse: bool
    lead: Shape
    n_classes: int
    outer: Shape
    weight: Array
    bias: Array | None
    chunk_rows: int | None
    arguments: Arguments
    dtype: np.dtype[Any]
    normalizer: float


def check_layer(
    features: Any, linear_weight: ArrayLike, linear_bias: ArrayLike | None, chunk_rows: int | None, given: Arguments
) -> Layer:
    """Check everything, the classes of all rows included; `given` has no logits."""
    if chunk_rows is not None:
        chunk_rows = as_integer(chunk_rows, "chunk_rows")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be None or at least 1, got {chunk_rows}")
    given = with_plain_options(given)
    is_sparse = _is_sparse(features)
    names = [] if is_sparse else [("features", features)]
    names += [("linear_weight", linear_weight), ("target", given.target), ("linear_bias", linear_bias)]
    names += [(name, getattr(given, name)) for name in ("weight", "sample_weight", "grad_output")]
    arrays: dict[str, Any] = take_in(np, names)
    features, weight = arrays.pop("features", features), arrays.pop("linear_weight")
    bias = arrays.pop("linear_bias", None)
    if is_sparse:
        _check_csr(features)
    else:
        check_array(features, "features")
    check_array(weight, "linear_weight")
    if weight.ndim < 2:
        raise ValueError(f"linear_weight must have shape (C, d) or (C, d1, ..., dK, d), got {weight.shape}")
    *lead, n_features = features.shape
    n_classes, *outer = weight.shape[:-1]
    if weight.shape[-1] != n_features:
        raise ValueError(
            f"linear_weight must have shape (C, {n_features}) or (C, d1, ..., dK, {n_features}) for features of shape "
            f"{features.shape}, got {weight.shape}"
        )
    _check_dtype(weight, "linear_weight", features.dtype)
    if bias is not None:
        if bias.shape != weight.shape[:-1]:
            raise ValueError(
                f"linear_bias must have shape {weight.shape[:-1]} for linear_weight of shape {weight.shape}, got "
                f"{bias.shape}"
            )
        _check_dtype(bias, "linear_bias", features.dtype)
    logits = np.broadcast_to(np.zeros((), arithmetic(features.dtype)), (*lead, n_classes, *outer))
    class_axis = len(lead)
    if find_axis(given.axis, logits.ndim, class_axis) != class_axis:
        raise ValueError(
            f"axis must be None or {class_axis}, the class axis of logits of shape {logits.shape}, got {given.axis}"
        )
    normalizer, arguments = settle(NORMALIZER, given._replace(logits=logits, axis=class_axis, **arrays))
    return Layer(
        features=features.reshape(1, n_features).tocsr() if is_sparse and not lead else features,
        is_sparse=is_sparse,
        lead=tuple(lead),
        n_classes=n_classes,
        outer=tuple(outer),
        weight=weight.reshape(n_classes * prod(outer), n_features),
        bias=None if bias is None else bias.reshape(-1),
        chunk_rows=chunk_rows,
        arguments=arguments,
        dtype=logits.dtype,
        normalizer=normalizer,
    )


def _is_sparse(value: object) -> bool:
    """Return True for SciPy's sparse arrays and matrices, and what is derived from them."""
    return any(kind.__module__.startswith("scipy.sparse") for kind in type(value).__mro__)


def _check_csr(features: Any) -> None:
    """Refuse sparse features that are not floats in the CSR format.

    What SciPy multiplies without a look, and reads or writes elsewhere if it is wrong, is looked at here.
    """
    if features.format != "csr":
        raise TypeError(
            f"features must be dense or of SciPy's CSR format, got {features.format}: convert it with features.tocsr()"
        )
    check_array(features.data, "features")
    dtype = features.data.dtype
    if dtype != arithmetic(dtype):
        raise TypeError(f"features of SciPy's CSR format must be float32 or float64, got {dtype.name}")
    n_rows, n_features = features.shape if features.ndim == 2 else (1, features.shape[0])
    ends, columns = features.indptr, features.indices
    n_stored = min(len(columns), len(features.data))
    if len(ends) != n_rows + 1 or ends[0] != 0 or ends[-1] > n_stored or (ends[1:] < ends[:-1]).any():
        raise ValueError(
            f"features.indptr must be {n_rows + 1} ascending numbers from 0 to at most {n_stored}, got {ends}"
        )
    columns = columns[: ends[-1]]
    if len(columns) and not 0 <= columns.min() <= columns.max() < n_features:
        bad = columns.min() if columns.min() < 0 else columns.max()
        raise ValueError(f"features.indices must be in [0, {n_features - 1}] for {n_features} features, got {bad}")


def _check_dtype(array: Array, name: str, dtype: np.dtype[Any]) -> None:
    if array.dtype != dtype:
        hint = " in another byte order" if array.dtype.newbyteorder() == dtype else ""
        raise TypeError(f"{name} must have the dtype of features, {dtype.name}, got {array.dtype.name}{hint}")
