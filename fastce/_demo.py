"""The demo: train a classifier of real handwritten digits and compare losses.

Design
------
1. The training loop is what a user would write: plain NumPy, with the gradient written over the logits.
2. NumPy's and scikit-learn's losses get copies of the same logits in the same step, in turn, so that all three meet the
   same numbers and the same state of the machine. Times taken one after the other differ by more than the losses do.
3. Only the loss is timed, not the copies, the matrix products or the update.
4. Last the same classifier is fitted to its minimum, by the estimator that stands in for scikit-learn's and by that.
"""

import sys
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastce._contenders import CONTENDERS, TOLERANCE, Contender, disagreement
from fastce._progress import show_progress

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


class Contest:
    """The same logits through several losses: seconds of each step and the largest disagreement with the first."""

    def __init__(self, contenders: dict[str, Contender], n_threads: int | None) -> None:
        self.contenders = contenders
        self.n_threads = n_threads
        self.seconds: dict[str, list[float]] = {name: [] for name in contenders}
        self.loss_error = dict.fromkeys(contenders, 0.0)
        self.grad_error = dict.fromkeys(contenders, 0.0)
        self.n_steps = 0

    def compare(self, logits: Floats, target: Classes) -> tuple[float, Floats]:
        """Return loss and gradient by the first contender, which works on `logits` itself."""
        names = list(self.contenders)
        calls = {
            name: contender.prepare(logits if name == names[0] else logits.copy(), target, self.n_threads)
            for name, contender in self.contenders.items()
        }
        results = {}
        # Each takes its turn at every position: the first in a step finds colder caches.
        turn = self.n_steps % len(names)
        for name in names[turn:] + names[:turn]:
            before = perf_counter()
            results[name] = calls[name]()
            self.seconds[name].append(perf_counter() - before)
        loss, grad = results[names[0]]
        for name, result in results.items():
            loss_error, grad_error = disagreement(result, (loss, grad), len(target))
            # Python's max may drop a NaN; NumPy's keeps it, and then the comparison with the tolerance fails.
            self.loss_error[name] = float(np.maximum(self.loss_error[name], loss_error))
            self.grad_error[name] = float(np.maximum(self.grad_error[name], grad_error))
        self.n_steps += 1
        return float(loss), grad

    def agrees(self, name: str) -> bool:
        """Tell whether a loss stayed within the tolerance; NaN did not."""
        return self.loss_error[name] <= TOLERANCE and self.grad_error[name] <= TOLERANCE

    def report(self, batch_shape: tuple[int, int]) -> bool:
        """Print times and disagreements; return whether all agree."""
        first = next(iter(self.contenders))
        yardstick = median(self.seconds[first])
        print(f"\nloss and gradient of {self.n_steps} batches of up to {batch_shape[0]} x {batch_shape[1]}, float32:")
        print(f"  {'':12}  sum, ms  median, us  ratio  differs by (loss, gradient)")
        for name, seconds in self.seconds.items():
            difference = "-" if name == first else f"{self.loss_error[name]:.1e}, {self.grad_error[name]:.1e}"
            verdict = "" if self.agrees(name) else "  too much"
            middle = median(seconds)
            print(
                f"  {name:12} {sum(seconds) * 1e3:8.2f} {middle * 1e6:11.1f} {middle / yardstick:6.2f}  "
                f"{difference}{verdict}"
            )
        if all(self.agrees(name) for name in self.contenders):
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

    contest = Contest({name: CONTENDERS[name] for name in ("fastce", "NumPy", "scikit-learn")}, n_threads)
    digits = split(load_digits(), seed)
    train(digits, contest, epochs, batch_size, seed)
    agree = contest.report((batch_size, 10))
    fit(
        digits,
        {
            "fastce": LogisticRegression(max_iter=1000, n_threads=n_threads),
            "scikit-learn": SklearnLogisticRegression(max_iter=1000),
        },
    )
    return 0 if agree else 1


def fit(digits: Digits, models: dict[str, Any]) -> None:
    """Fit estimators to the same images; print a line for each."""
    print("\nfitted to the minimum, as LogisticRegression().fit does:")
    for name, model in models.items():
        model.fit(digits.images[:100], digits.target[:100])  # starts threads and looks for libraries
        before = perf_counter()
        model.fit(digits.images, digits.target)
        seconds = perf_counter() - before
        accuracy = model.score(digits.held_out_images, digits.held_out_target)
        print(
            f"  {name:12} {seconds * 1e3:8.2f} ms, {model.n_iter_[0]:4} iterations, held-out accuracy {accuracy:.1%}",
            flush=True,
        )


def split(bunch: Any, seed: int) -> Digits:
    """Shuffle scikit-learn's digits and hold some out."""
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    images = (bunch.data[order] / MAX_INTENSITY).astype(np.float32)
    target = bunch.target[order].astype(np.int64)
    return Digits(images[HELD_OUT:], target[HELD_OUT:], images[:HELD_OUT], target[:HELD_OUT])


def train(digits: Digits, contest: Contest, epochs: int, batch_size: int, seed: int) -> None:
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
            loss, grad = contest.compare(logits, target)  # grad lies where the logits were
            total += loss * len(rows)
            weight_step = MOMENTUM * weight_step - LEARNING_RATE * (images.T @ grad)
            bias_step = MOMENTUM * bias_step - LEARNING_RATE * grad.sum(axis=0)
            weight += weight_step
            bias += bias_step
        guess = (digits.held_out_images @ weight + bias).argmax(axis=1)
        accuracy = (guess == digits.held_out_target).mean()
        show_progress("")
        print(f"epoch {epoch:3}: loss {total / n_images:.4f}, held-out accuracy {accuracy:.1%}", flush=True)
