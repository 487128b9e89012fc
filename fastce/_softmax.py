"""Softmax, log-softmax and log-sum-exp along any axes, by the kernels of the losses.

Design
------
1. Several axes are merged into one: by a view where their strides allow it, else in a copy. Their order is free, so the
   one is taken in which memory has them.
2. Weighted sums, `logsumexp` with `b`, are NumPy's, in float64 and piece by piece. The kernels would need x + log b
   instead of x, whose rounding costs the sum as many units in the last place as x is large: too many where the result
   is close to 0, where the largest term alone is 1 and all depends on the others.
3. Numbers and truth values are taken in before arrays: to take them in may change an array (`_array`, Design 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from math import log, prod
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._array import Array, array_module, device_of, take_in
from fastce._dispatch import (
    along_axis,
    arithmetic,
    check_array,
    check_n_threads,
    find_axis,
    find_result,
    put_last,
    try_along_axis,
)
from fastce._messages import shown
from fastce._options import as_integer

Shape = tuple[int, ...]
Axis = int | tuple[int, ...] | None
Result = np.floating[Any] | NDArray[Any]
Operands = tuple[NDArray[np.float64], NDArray[np.float64]]

_INTEGERS = "iub"  # by NumPy's letters, the booleans among them
_HALVES = ("float16", "bfloat16")

# Numbers that are worked on at a time where NumPy does it: as many as make its calls cheap, too few to fill memory.
_PIECE = 2**16
# log 2 in two parts, the first of 32 bits: its products with the integers here are exact.
_LOG2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
_LOG2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
# exp(x) is 0 below, whatever finite number of float64 it is multiplied by.
_NO_TERM = -5000.0
_SMALLEST_NORMAL = float(np.finfo(np.float64).tiny)
# Below, in units of what has cancelled, other terms may have lost digits: far above the smallest normal number.
_SMALL = 2.0**-900


def softmax(
    x: ArrayLike, *, axis: Axis = -1, out: NDArray[Any] | None = None, n_threads: int | None = None
) -> NDArray[Any]:
    """Return exp(x) divided by its sum along an axis, by default the last.

    Parameters
    ----------
    x : array_like, float32, float64, float16 or bfloat16
        Logits, of any strides. A scalar counts as one element along one axis.
    axis : int, tuple of int or None, default -1
        The axis or axes along which the result sums to 1; None means all. Axes that are not adjacent in memory need a
        copy of `x`. SciPy's default is None.
    out : ndarray like `x`, optional
        Receives the result. May be `x` itself; any other overlap is an error.
    n_threads : int, optional
        Maximum number of threads; never changes the result.

    Returns
    -------
    p : ndarray
        Shape and dtype of `x`; `out` if that was given. NaN along an axis that holds NaN, +inf or nothing but -inf.

    Raises
    ------
    ValueError, TypeError
        For an axis that is out of range or repeated, or for an unsuitable `out` or dtype.

    Notes
    -----
    p_c = exp(x_c - m) / sum_k exp(x_k - m) with m the maximum; see ``scipy.special.softmax``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> print(fastce.softmax(np.log([1.0, 2.0, 5.0])).round(6))
    [0.125 0.25  0.625]
    """
    return _along_axes(x, axis, out, n_threads)


def log_softmax(
    x: ArrayLike, *, axis: Axis = -1, out: NDArray[Any] | None = None, n_threads: int | None = None
) -> NDArray[Any]:
    """Return the logarithm of the softmax along an axis, by default the last.

    Parameters
    ----------
    x, axis, out, n_threads
        As for `softmax`.

    Returns
    -------
    log_p : ndarray
        Shape and dtype of `x`; `out` if that was given.

    Raises
    ------
    ValueError, TypeError
        As `softmax`.

    Notes
    -----
    log p_c = (x_c - m) - log1p(sum of exp(x_k - m) without the term of the maximum): the log-probability of a dominant
    class keeps full relative accuracy, where ``scipy.special.log_softmax`` gives 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> print(fastce.log_softmax(np.array([0.0, 50.0])))
    [-5.00000000e+01 -1.92874985e-22]
    """
    return _along_axes(x, axis, out, n_threads, log_softmax=True)


@overload
def logsumexp(
    x: ArrayLike,
    *,
    axis: Axis = -1,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    out: NDArray[Any] | None = None,
    n_threads: int | None = None,
) -> Result: ...
@overload
def logsumexp(
    x: ArrayLike,
    *,
    axis: Axis = -1,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[True],
    out: NDArray[Any] | None = None,
    n_threads: int | None = None,
) -> tuple[Result, Result]: ...
@overload
def logsumexp(
    x: ArrayLike,
    *,
    axis: Axis = -1,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool,
    out: NDArray[Any] | None = None,
    n_threads: int | None = None,
) -> Result | tuple[Result, Result]: ...
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
    integers = _as_integers(axis)
    keepdims, return_sign = bool(keepdims), bool(return_sign)
    xp = array_module(x)
    if xp is not np and b is not None:
        raise TypeError(f"b must be None where x is on a GPU, got {shown(b)}: add log(b) to x, or use x.get()")
    given = take_in(xp, (("x", x), ("b", b), ("out", out)))
    terms, factors = _check_terms(_at_least_1d(given["x"])), given.get("b")
    has_own_dtype = type(b) not in (bool, int, float, type(None))  # in NumPy's promotion
    if factors is not None:
        terms, factors = _broadcast(terms, _check_factors(factors))
    dtype = _result_dtype(terms.dtype, factors.dtype if factors is not None and has_own_dtype else None)
    axes = _find_axes(integers, terms)
    shape = tuple(1 if k in axes else n for k, n in enumerate(terms.shape) if keepdims or k not in axes)
    with device_of(terms):
        lse = xp.full(shape, -np.inf, dtype)
    if out is not None:
        inputs = [("x", given["x"]), *(() if factors is None else (("b", factors),))]
        place = find_result(given.get("out", out), lse, "the result", inputs, in_place=False)
    if factors is None:
        if terms.size:
            merged = _merge(terms, axes)
            if merged.dtype.kind in _INTEGERS:
                # Terms side by side, whatever lies beside them: a row must have the same bits in every batch.
                merged = merged.astype(np.float64, order="C")
            _write_lse(merged, lse, n_threads)
        sign = np.where(np.isnan(lse), lse, lse > -np.inf) if return_sign else lse
    else:
        sign = np.zeros_like(lse)
        if terms.size:
            _write_weighted(terms, factors, axes, lse, sign)
        if not return_sign:
            lse[sign < 0] = np.nan
    result: Result = lse[()]
    if out is not None:
        place[...] = lse
        result = out
    return (result, sign[()]) if return_sign else result


def _along_axes(
    x: ArrayLike, axis: Axis, out: NDArray[Any] | None, n_threads: int | None, **kind: bool
) -> NDArray[Any]:
    """Return the softmax of `x` along its axes, or its logarithm."""
    done = try_along_axis(x, axis, n_threads, out, **kind)
    if done is not None:
        return done
    n_threads = check_n_threads(n_threads)
    integers = _as_integers(axis)
    xp = array_module(x)
    given = take_in(xp, (("x", x), ("out", out)))
    logits = _at_least_1d(given["x"])
    check_array(logits, "x")
    axes = _find_axes(integers, logits)
    place = find_result(given.get("out", out), given["x"], "x", [], in_place=True)
    places = _at_least_1d(place)
    if logits.size == 0:
        pass
    elif _can_merge(logits, axes):
        # Wherever the result goes: the memory order of the logits alone may decide its bits.
        rows, moved = _merge(logits, axes), _put_last(places, axes)
        is_view = _can_merge(places, axes)
        with device_of(logits):
            target = _merge(places, axes) if is_view else xp.empty(rows.shape, logits.dtype)
        along_axis(rows, out=target, n_threads=n_threads, **kind)
        if not is_view:
            moved[...] = target.reshape(moved.shape)
    else:
        work = _put_last(logits, axes).copy(order="C")
        rows = _merge(work, range(logits.ndim - len(axes), logits.ndim))
        along_axis(rows, out=rows, n_threads=n_threads, **kind)
        _put_last(places, axes)[...] = work
    return place if out is None else out


def _as_integers(axis: Axis) -> Axis:
    """Return `axis` with plain integers, of no range yet."""
    try:
        if isinstance(axis, tuple):
            return tuple(as_integer(k, "axis") for k in axis)
        return None if axis is None else as_integer(axis, "axis")
    except TypeError:
        raise TypeError(f"axis must be None, an integer or a tuple of integers, got {shown(axis)}") from None


def _at_least_1d(x: Array) -> Array:
    """Return scalars as one element along one axis, as SciPy does."""
    return x if x.ndim else x.reshape(1)


def _find_axes(axis: Axis, x: Array) -> tuple[int, ...]:
    """Return the axes as non-negative numbers, in the order in which memory has them."""
    if isinstance(axis, int):
        return (find_axis(axis, x.ndim, 0),)
    axes = range(x.ndim) if axis is None else [find_axis(k, x.ndim, 0) for k in axis]
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must name no axis twice, got {axis} for {x.ndim} dimensions")
    return tuple(sorted(axes, key=lambda k: -abs(x.strides[k])))


def _put_last(array: Array, axes: Sequence[int]) -> Array:
    """Return a view with these axes last, in their order."""
    return array.transpose((*(k for k in range(array.ndim) if k not in axes), *axes))


def _can_merge(array: Array, axes: Sequence[int]) -> bool:
    """Return True if `_merge` returns a view."""
    if len(axes) == 1:
        return True
    long = [k for k in axes if array.shape[k] != 1]
    return all(array.strides[j] == array.strides[k] * array.shape[k] for j, k in pairwise(long))


def _merge(array: Array, axes: Sequence[int]) -> Array:
    """Return the array with these axes as one, the last."""
    if len(axes) == 1:
        return put_last(array, axes[0])
    n_kept = array.ndim - len(axes)
    moved = _put_last(array, axes)
    return moved.reshape((*moved.shape[:n_kept], prod(moved.shape[n_kept:])))


def _check_terms(x: Array) -> Array:
    """Return what `logsumexp` takes: also integers and booleans."""
    if x.dtype.kind == "c":
        raise TypeError(f"x must be real numbers, got {x.dtype}: scipy.special.logsumexp takes complex ones")
    if x.dtype.kind not in _INTEGERS:
        check_array(x, "x")
    return x


def _check_factors(b: Array) -> Array:
    """Return real numbers, booleans among them."""
    if b.dtype.kind not in "iufb" and b.dtype.type.__name__ != "bfloat16":
        raise TypeError(f"b must be real numbers, got {b.dtype}")
    return b


def _broadcast(x: Array, b: Array) -> tuple[Array, Array]:
    try:
        shape = np.broadcast_shapes(x.shape, b.shape)
    except ValueError:
        raise ValueError(f"b must have a shape that broadcasts with that of x, {x.shape}, got {b.shape}") from None
    return np.broadcast_to(x, shape), np.broadcast_to(b, shape)


def _result_dtype(x: np.dtype[Any], b: np.dtype[Any] | None) -> np.dtype[Any]:
    """Return the dtype of a sum: what NumPy promotes the operands to, but at least float32, and a floating one."""
    if b is None and x.kind not in _INTEGERS:
        return arithmetic(x)
    known = [np.dtype(np.float32) if dtype.type.__name__ in _HALVES else dtype for dtype in (x, b) if dtype is not None]
    return np.dtype(np.float32 if np.result_type(*known) == np.float32 else np.float64)


def _pieces(shape: Shape, size: int) -> Iterator[tuple[slice, ...]]:
    """Yield the places of pieces that make up an array of this shape, of `size` numbers or a few less if possible."""
    if not shape:
        yield ()
        return
    inner = prod(shape[1:])
    step = max(1, size // inner)
    for start in range(0, shape[0], step):
        here = slice(start, start + step)
        for place in _pieces(shape[1:], size) if inner > size else [(slice(None),) * (len(shape) - 1)]:
            yield here, *place


def _write_lse(rows: Array, lse: Array, n_threads: int | None) -> None:
    """Write the log-sum-exp along the last axis."""
    if rows.ndim == 1:
        rows = rows[None]
    lse = lse.reshape(rows.shape[:-1])
    along_axis(rows, lse=lse, n_threads=n_threads)
    if not isinstance(rows, np.ndarray):
        return  # the GPU's kernel sees to infinities itself
    is_odd = np.isnan(lse)
    if is_odd.any():
        # A maximum that is infinite, or NaN, is the sum too; only kernels for the loss call all of that NaN.
        odd = np.flatnonzero(is_odd)
        step = max(1, _PIECE // rows.shape[-1])
        with np.errstate(invalid="ignore"):  # NaN may be signaling, and any is to bfloat16's maximum
            for start in range(0, odd.size, step):
                place = np.unravel_index(odd[start : start + step], lse.shape)
                lse[place] = rows[place].astype(lse.dtype).max(axis=-1)


def _write_weighted(x: Array, b: Array, axes: Sequence[int], lse: Array, sign: Array) -> None:
    """Write the logarithms and the signs of the sums of b exp(x)."""
    n_kept = x.ndim - len(axes)
    x, b = _put_last(x, axes), _put_last(b, axes)
    if n_kept == 0:
        x, b, n_kept = x[None], b[None], 1
    lse, sign = lse.reshape(x.shape[:n_kept]), sign.reshape(x.shape[:n_kept])
    blocks = list(_pieces(x.shape[n_kept:], _PIECE))
    with np.errstate(all="ignore"):
        for rows in _pieces(x.shape[:n_kept], max(1, _PIECE // prod(x.shape[n_kept:]))):
            shape = lse[rows].shape
            logs, signs = _log_sums(partial(_read, x, b, rows, blocks), prod(shape))
            lse[rows], sign[rows] = logs.reshape(shape), signs.reshape(shape)


def _read(x: Array, b: Array, rows: tuple[slice, ...], blocks: Sequence[tuple[slice, ...]]) -> Iterator[Operands]:
    """Yield the blocks of some rows in turn, as float64 matrices of their own."""
    for block in blocks:
        exponents, factors = (
            array[rows + block].astype(np.float64, order="C").reshape(-1, prod(x[rows + block].shape[len(rows) :]))
            for array in (x, b)
        )
        exponents[factors == 0] = -np.inf
        yield exponents, factors


def _log_sums(read: Callable[[], Iterable[Operands]], n_rows: int, shift: int = 0) -> Operands:
    """Return log|sum| and sign of the sums of 2^shift b exp(x) along rows, which `read` gives block by block.

    With p the place of the largest |b exp(x)|, all is relative to exp(x_p) and to the power of 2 in b_p. Terms of the
    same x as p's are summed apart, without any exp: log(their sum) + log1p(others / their sum) is as precise where the
    result is close to 0.
    """
    top = np.full(n_rows, -np.inf)
    top_x = np.zeros(n_rows)
    exponent = np.zeros(n_rows, np.int32)
    infinite = np.zeros(n_rows)
    for x, b in read():
        log_term = x + np.log(np.abs(b))
        place = np.arange(n_rows), log_term.argmax(axis=1)  # the first NaN, if there is any
        largest = log_term[place]
        found = largest > top
        top_x = np.where(found, x[place], top_x)
        exponent = np.where(found, np.frexp(b[place])[1], exponent)
        top = np.maximum(top, largest)
        if np.isposinf(largest).any():
            infinite += np.where(np.isposinf(log_term), np.copysign(np.inf, b), 0).sum(axis=1)
    equal, others = np.zeros(n_rows), np.zeros(n_rows)
    for x, b in read():
        d = x - top_x[:, None]
        terms = _times_exp(b, d, exponent[:, None])
        is_equal = d == 0
        equal += np.where(is_equal, terms, 0).sum(axis=1)
        others += np.where(is_equal, 0, terms).sum(axis=1)
    total, ratio = equal + others, others / equal
    is_small = np.abs(ratio) <= 0.5  # else log1p has no advantage, and equal may be 0
    logs = top_x + _scaled_log(np.where(is_small, equal, total), exponent + shift)
    logs += np.where(is_small, np.log1p(ratio), 0)
    signs = np.sign(total)
    sums = np.where(np.isnan(top), top, infinite)
    logs = np.where(np.isfinite(top), logs, np.log(np.abs(sums)))
    signs = np.where(np.isfinite(top), signs, np.sign(sums))
    # Where the largest terms are gone, the others are too small for their scale.
    lost = np.isfinite(top) & (equal == 0) & (np.abs(others) < _SMALL)
    if lost.any():
        x, b = (np.concatenate(blocks, axis=1) for blocks in zip(*((x[lost], b[lost]) for x, b in read()), strict=True))
        x, b, more = _add_equals(x, b)
        logs[lost], signs[lost] = _log_sums(lambda: [(x, b)], len(x), shift + more)
    return logs, signs


def _times_exp(b: Array, d: Array, exponent: Array) -> Array:
    """Return b exp(d) / 2^exponent, without overflow or underflow between."""
    fraction, power = np.frexp(b)
    d = np.maximum(d, _NO_TERM)
    n = np.rint(d * (1 / _LOG2_HIGH))
    d -= n * _LOG2_HIGH
    d -= n * _LOG2_LOW
    fraction *= np.exp(d)
    power += n.astype(np.int32)
    power -= exponent
    return np.ldexp(fraction, power)


def _scaled_log(value: Array, exponent: Array) -> Array:
    """Return log|2^exponent value|."""
    whole = np.abs(np.ldexp(value, exponent))
    is_normal = (whole >= _SMALLEST_NORMAL) & (whole < np.inf)
    return np.where(is_normal, np.log(whole), np.log(np.abs(value)) + exponent * log(2))


def _add_equals(x: Array, b: Array) -> tuple[Array, Array, int]:
    """Return rows whose sums of b exp(x) are the same, and the power of 2 that they lack, with no x twice."""
    order = x.argsort(axis=1)
    x, b = np.take_along_axis(x, order, axis=1), np.take_along_axis(b, order, axis=1)
    is_first = np.ones(x.shape, bool)
    is_first[:, 1:] = x[:, 1:] != x[:, :-1]
    shift = x.shape[1].bit_length()  # so that no sum overflows
    if np.abs(b).max() < 2.0 ** (1023 - shift):
        shift = 0
    sums = np.add.reduceat(np.ldexp(b, -shift).ravel(), np.flatnonzero(is_first))
    b = np.zeros_like(b)
    b[is_first] = sums
    x[b == 0] = -np.inf
    return x, b, shift
