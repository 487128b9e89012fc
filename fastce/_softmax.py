"""Softmax, log-softmax and log-sum-exp along one axis, by the kernels of the losses."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._array import array_module, device_of
from fastce._backend import backend_of
from fastce._options import check_n_threads
from fastce._problem import arithmetic, check_axis, check_logits, check_out, put_last


def softmax(
    x: ArrayLike, *, axis: int = -1, out: NDArray[Any] | None = None, n_threads: int | None = None
) -> NDArray[Any]:
    """Return exp(x) divided by its sum along an axis.

    Parameters
    ----------
    x : array_like of at least one dimension, float32, float64, float16 or bfloat16
        Logits, of any strides.
    axis : int, default -1
        The axis along which the result sums to 1.
    out : ndarray like `x`, optional
        Receives the result. May be `x` itself; any other overlap is an error.
    n_threads : int, optional
        At most this many threads; never changes the result.

    Returns
    -------
    p : ndarray
        Shape and dtype of `x`; `out` if that was given. NaN along an axis that holds NaN, +inf or nothing but -inf.

    Raises
    ------
    ValueError, TypeError
        For an axis out of range, an unsuitable `out` or dtype.

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
    return _along_axis(x, axis, out, n_threads)


def log_softmax(
    x: ArrayLike, *, axis: int = -1, out: NDArray[Any] | None = None, n_threads: int | None = None
) -> NDArray[Any]:
    """Return the logarithm of the softmax along an axis.

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
    log p_c = (x_c - m) - log1p(sum of exp(x_k - m) without the maximum's own term): the log-probability of a dominant
    class keeps full relative accuracy, where ``scipy.special.log_softmax`` gives 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> print(fastce.log_softmax(np.array([0.0, 50.0])))
    [-5.00000000e+01 -1.92874985e-22]
    """
    return _along_axis(x, axis, out, n_threads, log_softmax=True)


def logsumexp(x: ArrayLike, *, axis: int = -1, n_threads: int | None = None) -> np.floating[Any] | NDArray[Any]:
    """Return the logarithm of the sum of exponentials along an axis.

    Parameters
    ----------
    x, axis, n_threads
        As for `softmax`.

    Returns
    -------
    lse : ndarray or scalar
        The shape of `x` without the axis; float64 for float64, else float32. -inf where there is nothing but -inf (or
        nothing at all), +inf where there is +inf and no NaN.

    Raises
    ------
    ValueError, TypeError
        For an axis out of range or an unsuitable dtype.

    Notes
    -----
    m + log1p(sum of exp(x_k - m) without the maximum's own term); see ``scipy.special.logsumexp``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> print(fastce.logsumexp(np.array([[1000.0, 1000.0], [0.0, -np.inf]])).round(4))
    [1000.6931    0.    ]
    """
    x = check_logits(x, "x")
    n_threads = check_n_threads(n_threads)
    rows = put_last(x, check_axis(axis, x, x.ndim - 1))
    xp = array_module(x)
    with device_of(x):
        lse = xp.full(rows.shape[:-1], -np.inf, arithmetic(x.dtype))
    if rows.size:
        backend_of(x).run(rows, lse=lse, n_threads=n_threads)
        if xp is np:  # the GPU's kernel sees to it itself
            odd = np.isnan(lse)
            if odd.any():
                # A maximum that is infinite, or NaN, is the sum too; only kernels for the loss call all of that NaN.
                lse[odd] = rows[odd].max(axis=-1)
    result: NDArray[Any] = lse[()]
    return result


def _along_axis(x: ArrayLike, axis: int, out: NDArray[Any] | None, n_threads: int | None, **kind: Any) -> NDArray[Any]:
    """Write what a kernel makes of `x` along an axis."""
    x = check_logits(x, "x")
    axis = check_axis(axis, x, x.ndim - 1)
    n_threads = check_n_threads(n_threads)
    result = check_out(out, x, [], "x")
    if x.size:
        backend_of(x).run(put_last(x, axis), out=put_last(result, axis), n_threads=n_threads, **kind)
    return result if out is None else out
