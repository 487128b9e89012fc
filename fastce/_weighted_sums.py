"""Sums of factors times exponentials, by their logarithms: `logsumexp` with `b`, computed by NumPy.

Design
------
1. These sums are NumPy's, in float64 and piece by piece. The kernels would need x + log b instead of x, whose rounding
   costs the sum as many units in the last place as x is large: too many where the result is close to 0, where the
   largest term alone is 1 and all depends on the others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import log, prod

import numpy as np
from numpy.typing import NDArray

from fastce._array import Array
from fastce._logits import Shape, put_last

Operands = tuple[NDArray[np.float64], NDArray[np.float64]]

# Numbers that are worked on at a time where NumPy does it: as many as make its calls cheap, too few to fill memory.
PIECE = 2**16
# log 2 in two parts, the first of 32 bits: its products with the integers here are exact.
_LOG2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
_LOG2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
# exp(x) is 0 below, whatever finite number of float64 it is multiplied by.
_NO_TERM = -5000.0
_SMALLEST_NORMAL = float(np.finfo(np.float64).tiny)
# Below, in units of what has cancelled, other terms may have lost digits: far above the smallest normal number.
_SMALL = 2.0**-900


def write_weighted(x: Array, b: Array, axes: Sequence[int], lse: Array, sign: Array) -> None:
    """Write the logarithms and the signs of the sums of b exp(x)."""
    n_kept = x.ndim - len(axes)
    x, b = put_last(x, axes), put_last(b, axes)
    if n_kept == 0:
        x, b, n_kept = x[None], b[None], 1
    lse, sign = lse.reshape(x.shape[:n_kept]), sign.reshape(x.shape[:n_kept])
    blocks = list(_pieces(x.shape[n_kept:], PIECE))
    with np.errstate(all="ignore"):
        for rows in _pieces(x.shape[:n_kept], max(1, PIECE // prod(x.shape[n_kept:]))):
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
