"""The demo: train a classifier of real handwritten digits and compare losses.

Design
------
1. The training loop is what a user would write: plain NumPy, with the gradient written over the logits.
2. NumPy's and scikit-learn's losses get copies of the same logits in the same step, in turn, so that all three meet the
   same numbers and the same state of the machine. Times taken one after the other differ by more than the losses do.
3. Only the loss is timed, not the copies, the matrix products or the update.
4. Last the same classifier is fitted to its minimum, by scikit-learn's estimator and by the one that replaces it.
"""

import sys
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastce._benchmarks.peers import PEERS, TOLERANCE, disagreement
from fastce._benchmarks.report import Table, show_progress
from fastce._benchmarks.timing import Rounds, clock

Floats = npt.NDArray[np.float32]
Classes = npt.NDArray[np.int64]

HELD_OUT = 360  # images, a fifth of all
MAX_INTENSITY = 16.0  # of a pixel in this data set
LEARNING_RATE = 0.5
MOMENTUM = 0.9


class Digits(NamedTuple):
    """Images, one per row, and what they show: to learn from, and held out."""

    images: Floats
    target: Classes
    held_out_images: Floats
    held_out_target: Classes


class Comparison:
    """The same logits through several losses: seconds of each step and the largest disagreement with the first."""

    NAMES = ("fastce", "NumPy", "scikit-learn")

    def __init__(self, n_threads: int | None) -> None:
        self.n_threads = n_threads
        self.rounds: Rounds[str] = Rounds()
        self.errors = {name: np.zeros(2) for name in self.NAMES}  # of loss and gradient

    def compare(self, logits: Floats, target: Classes) -> tuple[float, Floats]:
        """Return loss and gradient by the first, which works on `logits` itself."""
        first, *_ = self.NAMES
        calls = {
            name: PEERS[name].prepare(logits if name == first else logits.copy(), target, self.n_threads)
            for name in self.NAMES
        }
        results = {}

        def take(name: str) -> float:
            seconds, results[name] = clock(calls[name])
            return seconds

        self.rounds.run({name: partial(take, name) for name in self.NAMES})
        for name, result in results.items():
            # NumPy's maximum keeps a NaN, and then the comparison with the tolerance fails.
            self.errors[name] = np.maximum(self.errors[name], disagreement(result, results[first], len(target)))
        loss, grad = results[first]
        return float(loss), grad

    def report(self, batch_shape: tuple[int, int]) -> bool:
        """Print times and disagreements; return whether all agree."""
        print(f"\nloss and gradient of {self.rounds.n} batches of up to {batch_shape[0]} x {batch_shape[1]}, float32:")
        table = Table(
            ["", "sum, ms", "lower quartile, us", "ratio", "differs by (loss, gradient)", "agrees"], self.NAMES
        )
        quartiles = self.rounds.lower_quartiles()
        agree = {name: bool((errors <= TOLERANCE).all()) for name, errors in self.errors.items()}
        for name in self.NAMES:
            table.print(
                name,
                f"{sum(self.rounds.seconds[name]) * 1e3:.2f}",
                f"{quartiles[name] * 1e6:.1f}",
                f"{quartiles[name] / quartiles[self.NAMES[0]]:.2f}",
                "{:.1e}, {:.1e}".format(*self.errors[name]),
                "yes" if agree[name] else "no",
            )
        if all(agree.values()):
            print("all agree")
            return True
        print(f"they do not agree: {TOLERANCE:.0e} is allowed", file=sys.stderr)
        return False


def run(epochs: int, batch_size: int, seed: int, n_threads: int | None) -> int:
    """Train, report and return the exit status: 0 if all losses agree."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

        from fastce.sklearn import LogisticRegression
    except ImportError as error:
        print(f"the demo needs scikit-learn (pip install 'fastce[demo]'): {error}", file=sys.stderr)
        return 1

    comparison = Comparison(n_threads)
    digits = split(load_digits(), seed)
    train(digits, comparison, epochs, batch_size, seed)
    agree = comparison.report((batch_size, 10))
    fit(
        digits,
        {
            "fastce": LogisticRegression(max_iter=1000, n_threads=n_threads),
            "scikit-learn": SklearnLogisticRegression(max_iter=1000),
        },
    )
    return 0 if agree else 1


def fit(digits: Digits, models: dict[str, Any]) -> None:
    """Fit estimators to the same images; print a row for each."""
    print("\nfitted to the minimum, as LogisticRegression().fit does:")
    table = Table(["", "ms", "iterations", "held-out accuracy"], models)
    for name, model in models.items():
        model.fit(digits.images[:100], digits.target[:100])  # starts threads and looks for libraries
        seconds, _ = clock(partial(model.fit, digits.images, digits.target))
        accuracy = model.score(digits.held_out_images, digits.held_out_target)
        table.print(name, f"{seconds * 1e3:.2f}", str(model.n_iter_[0]), f"{accuracy:.1%}")


def split(bunch: Any, seed: int) -> Digits:
    """Shuffle scikit-learn's digits and hold some out."""
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    images = (bunch.data[order] / MAX_INTENSITY).astype(np.float32)
    target = bunch.target[order].astype(np.int64)
    return Digits(images[HELD_OUT:], target[HELD_OUT:], images[:HELD_OUT], target[:HELD_OUT])


def train(digits: Digits, comparison: Comparison, epochs: int, batch_size: int, seed: int) -> None:
    """Train a linear classifier by gradient descent with momentum; print one line per epoch."""
    rng = np.random.default_rng(seed)
    n_images, n_pixels = digits.images.shape
    weight = np.zeros((n_pixels, 10), np.float32)
    bias = np.zeros(10, np.float32)
    weight_step, bias_step = np.zeros_like(weight), np.zeros_like(bias)
    starts = range(0, n_images, batch_size)
    print(f"{n_images} images of digits to learn from, {HELD_OUT} held out; {n_pixels} pixels, 10 classes")
    for epoch in range(1, epochs + 1):
        order = rng.permutation(n_images)
        total = 0.0
        for step, start in enumerate(starts, 1):
            show_progress(f"epoch {epoch}/{epochs}, batch {step}/{len(starts)}")
            rows = order[start : start + batch_size]
            images, target = digits.images[rows], digits.target[rows]
            logits = images @ weight
            logits += bias
            loss, grad = comparison.compare(logits, target)  # grad lies where the logits were
            total += loss * len(rows)
            weight_step = MOMENTUM * weight_step - LEARNING_RATE * (images.T @ grad)
            bias_step = MOMENTUM * bias_step - LEARNING_RATE * grad.sum(axis=0)
            weight += weight_step
            bias += bias_step
        guess = (digits.held_out_images @ weight + bias).argmax(axis=1)
        accuracy = (guess == digits.held_out_target).mean()
        show_progress("")
        print(f"epoch {epoch:3}: loss {total / n_images:.4f}, held-out accuracy {accuracy:.1%}", flush=True)
