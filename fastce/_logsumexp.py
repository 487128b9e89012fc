"""Log-sum-exp along any axes: by the kernels of the losses, or with factors by NumPy."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._array import Array, array_module, device_of, take_in
from fastce._axes import Axis, along_last, at_least_1d, find_axes, merge, plain_axis
from fastce._checks import check_array, check_n_threads, check_result
from fastce._logits import arithmetic
from fastce._weighted_sums import PIECE, write_weighted
from fastce._wording import shown

Result = np.floating[Any] | NDArray[Any]

_INTEGERS = "iub"  # by NumPy's letters, the booleans among them
_HALVES = ("float16", "bfloat16")


class SumOptions(TypedDict, total=False):
    """The options of `logsumexp` on which the type of its result does not depend."""

    axis: Axis
    b: ArrayLike | None
    keepdims: bool
    out: NDArray[Any] | None
    n_threads: int | None


@overload
def logsumexp(x: ArrayLike, *, return_sign: Literal[False] = False, **options: Unpack[SumOptions]) -> Result: ...
@overload
def logsumexp(x: ArrayLike, *, return_sign: Literal[True], **options: Unpack[SumOptions]) -> tuple[Result, Result]: ...
@overload
def logsumexp(x: ArrayLike, *, return_sign: bool, **options: Unpack[SumOptions]) -> Result | tuple[Result, Result]: ...
def logsumexp(
    x: ArrayLike,
    *,
    axis: Axis = -1,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    out: NDArray[Any] | None = None,
    n_threads: int | None = None,
) -> Result | tuple[Result, Result]:
    """Return the logarithm of the sum of exponentials along an axis, by default the last.

    Parameters
    ----------
    x : array_like, float32, float64, float16, bfloat16, integers or booleans
        Of any strides. A scalar counts as an array of one element. Integers and booleans are converted to float64.
    axis : int, tuple of int or None, default -1
        The axis or axes to sum along; None means all. SciPy's default is None.
    b : array_like of real numbers, optional
        Factors of the exponentials, of any sign. `x` and `b` are broadcast against each other. Where `b` is 0 the term
        is 0, even if `x` is infinite or NaN. Not for arrays on a GPU.
    keepdims : bool, default False
        Whether the result keeps the axes, with length 1.
    return_sign : bool, default False
        Whether to return the sign of the sum too. Without it, the logarithm of a negative sum is NaN.
    out : ndarray, optional
        Receives `lse`, with exactly its shape and dtype. Must share no memory with `x` or `b`.
    n_threads : int, optional
        Maximum number of threads; never changes the result.

    Returns
    -------
    lse : ndarray or scalar
        The logarithm of the absolute value of the sum, shaped like `x` without the axis; `out` if that was given.
        float64 if `x`, or an array `b`, is float64 or has an integer dtype that NumPy promotes to it, else float32.
        -inf where the sum is 0 or has no terms, +inf where there is +inf and no NaN.
    sign : ndarray or scalar
        Only with ``return_sign=True``: 1, 0, -1 or NaN, with the shape and dtype of `lse`.

    Raises
    ------
    ValueError, TypeError
        For an axis that is out of range or repeated, shapes that do not broadcast, or an unsuitable `out` or dtype;
        complex numbers are refused.

    Notes
    -----
    m + log1p(sum of exp(x_k - m) without the term of the maximum); see ``scipy.special.logsumexp``. With `b` the terms
    are relative to the largest |b_k| exp(x_k), however far apart the factors are. These sums are computed by NumPy in
    float64 and in one thread, without copies of `x` or `b`. The sign of a sum without terms is 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> print(fastce.logsumexp(np.array([[1000.0, 1000.0], [0.0, -np.inf]])).round(4))
    [1000.6931    0.    ]
    >>> lse, sign = fastce.logsumexp([1, 2], b=[1, -1], return_sign=True)
    >>> print(lse.round(4), sign)
    1.5413 -1.0
    """
    n_threads = check_n_threads(n_threads)
    axis = plain_axis(axis)
    keepdims, return_sign = bool(keepdims), bool(return_sign)
    xp = array_module(x)
    if xp is not np and b is not None:
        raise TypeError(f"b must be None where x is on a GPU, got {shown(b)}: add log(b) to x, or use x.get()")
    given = take_in(xp, (("x", x), ("b", b), ("out", out)))
    terms, factors = _check_operands(at_least_1d(given["x"]), given.get("b"))
    dtype = _result_dtype(terms.dtype, None if factors is None or type(b) in (bool, int, float) else factors.dtype)
    axes = find_axes(axis, terms)
    shape = tuple(1 if k in axes else n for k, n in enumerate(terms.shape) if keepdims or k not in axes)
    with device_of(terms):
        lse = xp.full(shape, -np.inf, dtype)
    place: Any = given.get("out", out)
    if out is not None:
        inputs = [("x", given["x"]), *(() if factors is None else (("b", factors),))]
        check_result(place, lse, "the result", inputs, in_place=False)
    if factors is None:
        if terms.size:
            _write_lse(merge(terms, axes), lse, n_threads)
        sign = np.where(np.isnan(lse), lse, lse > -np.inf) if return_sign else lse
    else:
        sign = np.zeros_like(lse)
        if terms.size:
            write_weighted(terms, factors, axes, lse, sign)
        if not return_sign:
            lse[sign < 0] = np.nan
    if out is not None:
        place[...] = lse
    result: Result = lse[()] if out is None else out
    return (result, sign[()]) if return_sign else result


def _check_operands(x: Array, b: Array | None) -> tuple[Array, Array | None]:
    """Return terms, of integers and booleans too, and their factors, real numbers, in one shape."""
    if x.dtype.kind == "c":
        raise TypeError(f"x must be real numbers, got {x.dtype}: scipy.special.logsumexp takes complex ones")
    if x.dtype.kind not in _INTEGERS:
        check_array(x, "x")
    if b is None:
        return x, None
    if b.dtype.kind not in "iufb" and b.dtype.type.__name__ != "bfloat16":
        raise TypeError(f"b must be real numbers, got {b.dtype}")
    try:
        x, b = np.broadcast_arrays(x, b)
    except ValueError:
        raise ValueError(f"b must have a shape that broadcasts with that of x, {x.shape}, got {b.shape}") from None
    return x, b


def _result_dtype(x: np.dtype[Any], b: np.dtype[Any] | None) -> np.dtype[Any]:
    """Return the dtype of a sum: what NumPy promotes the operands to, but at least float32, and a floating one."""
    if b is None and x.kind not in _INTEGERS:
        return arithmetic(x)
    known = [np.dtype(np.float32) if dtype.type.__name__ in _HALVES else dtype for dtype in (x, b) if dtype is not None]
    return np.dtype(np.float32 if np.result_type(*known) == np.float32 else np.float64)


def _write_lse(rows: Array, lse: Array, n_threads: int | None) -> None:
    """Write the log-sum-exp along the last axis."""
    if rows.dtype.kind in _INTEGERS:
        # Terms side by side, whatever lies beside them: a row must have the same bits in every batch.
        rows = rows.astype(np.float64, order="C")
    if rows.ndim == 1:
        rows = rows[None]
    lse = lse.reshape(rows.shape[:-1])
    along_last(rows, n_threads, lse=lse)
    if not isinstance(rows, np.ndarray):
        return  # the GPU's kernel sees to infinities itself
    is_odd = np.isnan(lse)
    if not is_odd.any():
        return
    # A maximum that is infinite, or NaN, is the sum too; only kernels for the loss call all of that NaN.
    odd = np.flatnonzero(is_odd)
    step = max(1, PIECE // rows.shape[-1])
    with np.errstate(invalid="ignore"):  # NaN may be signaling, and any is to bfloat16's maximum
        for start in range(0, odd.size, step):
            place = np.unravel_index(odd[start : start + step], lse.shape)
            lse[place] = rows[place].astype(lse.dtype).max(axis=-1)
