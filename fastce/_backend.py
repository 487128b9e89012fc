"""The junction: from the type of an array to the backend that computes on it."""

from fastce import _cpu


def backend_of(array):
    """Return the backend for `array`; all of them offer the same functions."""
    return _cpu
