"""Training steps: matrix products with a loss in between, as users have them.

Design
------
1. A loss that is fast alone may be slow between products: its threads and those of BLAS share the processors. So whole
   steps are timed, many after one another, without a pause: logits = X W, loss and gradient, and the products that
   carry the gradient on, to W and to X.
2. Everybody's loss meets the same products, which are NumPy's.
3. Each takes its turn in every round, for some tenths of a second: waking threads, and those that still spin from the
   turn before, count for little.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Run = Callable[[], object]
Call = Callable[[], tuple[Any, Any]]


class Step(NamedTuple):
    """A linear layer and its batch."""

    n_rows: int
    n_features: int
    n_classes: int

    @property
    def name(self) -> str:
        """How the command line calls it."""
        return f"step-{self.n_rows}x{self.n_features}x{self.n_classes}"


STEPS = [Step(64, 256, 1000), Step(1024, 256, 1000), Step(4096, 784, 10), Step(512, 64, 100)]


def make_step(step: Step, prepare: Callable[[Array, Array, int | None], Call], n_threads: int | None) -> Run:
    """Return a function that makes a step.

    `prepare` gets logits, target and `n_threads`, and returns what computes loss and gradient; that may overwrite the
    logits.
    """
    rng = np.random.default_rng(0)
    features = rng.standard_normal((step.n_rows, step.n_features), np.float32)
    weight = rng.standard_normal((step.n_features, step.n_classes), np.float32) / np.float32(step.n_features**0.5)
    target = rng.integers(step.n_classes, size=step.n_rows)
    logits = np.empty((step.n_rows, step.n_classes), np.float32)
    grad_weight, grad_features = np.empty_like(weight), np.empty_like(features)
    loss_and_grad = prepare(logits, target, n_threads)

    def run() -> None:
        np.matmul(features, weight, out=logits)
        _, grad = loss_and_grad()
        grad = np.asarray(grad)
        np.matmul(features.T, grad, out=grad_weight)
        np.matmul(grad, weight.T, out=grad_features)

    return run


def run_in_turn(runs: Mapping[str, Run], rounds: int, turn: float, pause: float) -> dict[str, float]:
    """Return the seconds of each: lower quartiles of its turns, of so many seconds, each after such a pause."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            seconds[name].append(_time_turn(runs[name], turn))
    return {name: lower_quartile(times) for name, times in seconds.items()}


def _time_turn(run: Run, turn: float) -> float:
    run()
    n_runs = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < turn or n_runs == 0:
        run()
        n_runs += 1
    return elapsed / n_runs


def lower_quartile(seconds: list[float]) -> float:
    """Return the time that a quarter of the rounds kept within: what disturbs a machine only ever adds to it."""
    return sorted(seconds)[len(seconds) // 4]
