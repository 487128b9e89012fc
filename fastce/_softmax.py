"""Softmax and log-softmax along any axes, by the kernels of the losses."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike, NDArray

from fastce import _cpu
from fastce._array import array_module, device_of, take_in
from fastce._axes import Axis, along_last, at_least_1d, can_merge, find_axes, merge, plain_axis
from fastce._checks import check_array, check_n_threads, check_result
from fastce._cpu._rules import RuleError
from fastce._logits import put_last


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
    return _along_axes(x, axis, out, n_threads, False)


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
    return _along_axes(x, axis, out, n_threads, True)


def _along_axes(
    x: ArrayLike, axis: Axis, out: NDArray[Any] | None, n_threads: int | None, log_softmax: bool
) -> NDArray[Any]:
    """Return the softmax of `x` along its axes, or its logarithm."""
    try:
        result: NDArray[Any] = _cpu.kernels.along_axis(x, axis, n_threads, out, None, log_softmax)
        return result
    except RuleError:  # if `axis` is several, say
        pass
    n_threads = check_n_threads(n_threads)
    axis = plain_axis(axis)
    xp = array_module(x)
    given = take_in(xp, (("x", x), ("out", out)))
    logits = at_least_1d(given["x"])
    check_array(logits, "x")
    axes = find_axes(axis, logits)
    place = given.get("out", out)
    with device_of(logits):
        if place is None:
            place = xp.empty_like(given["x"])
        else:
            check_result(place, given["x"], "x", in_place=True)
        if logits.size:
            # The memory order of the logits alone may decide the bits, wherever the result goes.
            rows, places = merge(logits, axes), at_least_1d(place)
            is_view = can_merge(places, axes)
            # `rows` is a copy where the axes of the logits cannot be merged either.
            work = merge(places, axes) if is_view else xp.empty_like(rows) if can_merge(logits, axes) else rows
            along_last(rows, n_threads, out=work, log_softmax=log_softmax)
            if not is_view:
                moved = put_last(places, axes)
                moved[...] = work.reshape(moved.shape)
    return place if out is None else out
