"""The definition (fastce/_reference.py), computed once for each problem of a test.

A test compares several calls with it: with statistics and without, with every instruction set, with tolerances that
follow from it too. Results are remembered by the inputs' bytes until the next test begins, and are read-only.
"""

import functools

import numpy as np

from fastce import _reference

_known = {}
_FUNCTIONS = (
    "_work_of_rows",
    "cross_entropy",
    "cross_entropy_grad_hess",
    "cross_entropy_hvp",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "nll_loss",
    "softmax",
)


def forget():
    """Drop all results."""
    _known.clear()


def remember(function):
    """Return a function that computes each result once."""

    @functools.wraps(function)
    def known(*args, **kwargs):
        key = function, _key_of(args), _key_of(kwargs)
        if key not in _known:
            _known[key] = _protect(function(*args, **kwargs))
        return _known[key]

    return known


def _key_of(value):
    """Return what tells one argument from others, whatever its strides."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return tuple((name, _key_of(value[name])) for name in sorted(value))
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_key_of, value))
    return type(value), repr(value)


def _protect(result):
    """Make arrays read-only, those of a tuple included."""
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
    elif isinstance(result, tuple):
        for part in result:
            _protect(part)
    return result


def install():
    """Let everybody in this process have what is known already."""
    for name in _FUNCTIONS:
        setattr(_reference, name, remember(getattr(_reference, name)))
