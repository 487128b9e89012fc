"""The junction: from the type of an array to the backend that computes on it."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastce import _cpu


class Backend(Protocol):
    """What every backend offers."""

    def run(
        self,
        logits: NDArray[Any],
        target: NDArray[Any] | None = None,
        prob: NDArray[Any] | None = None,
        out: NDArray[Any] | None = None,
        *,
        n_threads: int | None = None,
        **options: Any,
    ) -> float:
        """Sweep once over the logits and write what is asked for; return the float64 sum of the losses."""

    def scan(
        self,
        target: NDArray[Any],
        ignore_index: int,
        n_classes: int,
        weight: NDArray[Any] | None,
        sample_weight: NDArray[Any] | None,
        n_threads: int | None,
    ) -> tuple[int, float]:
        """Return the first row with an invalid target, or -1, and the normalizer of the mean."""

    def total(self, values: NDArray[Any]) -> float:
        """Return the float64 sum, the same whatever the number of threads."""


def backend_of(array: object) -> Backend:
    """Return the backend for `array`, whose other operands are of the same kind."""
    if isinstance(array, np.ndarray):
        return _cpu
    from fastce import _cuda  # needs CuPy, which whoever has such an array has

    return _cuda  # type: ignore[return-value]


# Ordinary calls, before any check: arrays of other kinds than the CPU's are not ordinary.
solve_ordinary = _cpu.solve_ordinary
