"""Training steps: matrix products with a loss in between, as users have them.

Design
------
1. A loss that is fast alone may be slow between products: its threads and those of BLAS share the cores. So whole
   steps are timed, many after one another: logits = X W, loss and gradient, and the products that carry the gradient
   on, to W and to X.
2. Every peer's loss meets the same products, which are NumPy's.
3. A sample takes some tenths of a second: threads that wake, or still spin from the sample before, count for little.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fastce._benchmarks.peers import PEERS
from fastce._benchmarks.timing import run_calls

TURN = 0.3  # s: a sample


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


def make_step(step: Step, peer: str, n_threads: int | None) -> Callable[[], None]:
    """Return a function that makes a step with this peer's loss."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((step.n_rows, step.n_features), np.float32)
    weight = rng.standard_normal((step.n_features, step.n_classes), np.float32) / np.float32(step.n_features**0.5)
    target = rng.integers(step.n_classes, size=step.n_rows)
    logits = np.empty((step.n_rows, step.n_classes), np.float32)
    grad_weight, grad_features = np.empty_like(weight), np.empty_like(features)
    loss_and_grad = PEERS[peer].prepare(logits, target, n_threads)

    def run() -> None:
        np.matmul(features, weight, out=logits)
        _, grad = loss_and_grad()
        grad = np.asarray(grad)
        np.matmul(features.T, grad, out=grad_weight)
        np.matmul(grad, weight.T, out=grad_features)

    return run


def run_steps(steps: Mapping[str, Callable[[], object]], rounds: int, turn: float | None = None) -> dict[str, float]:
    """Return the seconds of each step, from samples of so many seconds."""
    return run_calls(steps, rounds, at_least=TURN if turn is None else turn, after_pause=True)
