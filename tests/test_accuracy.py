"""Loss and target-class gradient against 60-digit arithmetic on the given floating-point logits.

The promise: within 6 ulp, plus 1 ulp per unit by which the target leads the other classes, since rounding x - max costs
that much already. An ulp is the spacing of the data type's numbers at the correct result, subnormal ones included.

`python tests/test_accuracy.py` prints the worst errors of every instruction set.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

import fastce

mpmath = pytest.importorskip("mpmath")

ULPS = 6
# Classes and rows of each problem. Two classes are a sigmoid, 1000 take the kernel for long rows; the time of the
# 60-digit sums decides the number of rows.
SIZES = {2: 400, 3: 400, 10: 300, 100: 100, 1000: 40}
DTYPES = ("float32", "float64")


def ordinary(rng, shape):
    return 3 * rng.standard_normal(shape), rng.integers(0, shape[1], shape[0])


def confident(rng, shape):
    """The target leads by 15 to 80: in float32, 1 - p_y is out of reach of a subtraction from 17 on."""
    x, y = ordinary(rng, shape)
    rows = np.arange(shape[0])
    x[rows, y] = -np.inf
    x[rows, y] = x.max(axis=1) + rng.uniform(15, 80, shape[0])
    return x, y


def spread(rng, shape):
    """Rows spread over hundreds: most classes underflow, subnormal losses are among the results."""
    return 60 * rng.standard_normal(shape), rng.integers(0, shape[1], shape[0])


def offset(amount):
    def shifted(rng, shape):
        x, y = ordinary(rng, shape)
        return x + amount, y

    return shifted


KINDS = {
    "ordinary": ordinary,
    "confident": confident,
    "offset +1e3": offset(1e3),
    "offset -1e3": offset(-1e3),
    "offset +3e4": offset(3e4),
    "spread": spread,
}


class Truth(NamedTuple):
    """A problem and its results as unevaluated sums of two doubles, high and low."""

    logits: np.ndarray
    target: np.ndarray
    lead: np.ndarray
    loss: np.ndarray  # (2, n_rows)
    grad: np.ndarray  # (2, n_rows), at the target class


def two_doubles(number):
    high = float(number)
    return high, float(number - mpmath.mpf(high))


@cache
def truth(dtype, kind, n_classes):
    """Return a problem with its 60-digit results; made once for all instruction sets."""
    rng = np.random.default_rng([n_classes, list(KINDS).index(kind)])
    logits, target = KINDS[kind](rng, (SIZES[n_classes], n_classes))
    logits = logits.astype(dtype)
    lead, loss, grad = [], [], []
    with mpmath.workdps(60):
        for row, y in zip(logits.tolist(), target, strict=True):
            x_y = mpmath.mpf(row.pop(y))
            others = mpmath.fsum(mpmath.exp(x - x_y) for x in row)  # relative to the target's term
            lead.append(max(0.0, float(x_y) - max(row)))
            loss.append(two_doubles(mpmath.log1p(others)))
            grad.append(two_doubles(-others / (1 + others)))
    return Truth(logits, target, np.array(lead), np.transpose(loss), np.transpose(grad))


def ulps(actual, exact):
    """Return the error of `actual` in units of its type's spacing at the correctly rounded result."""
    high, low = exact
    spacing = np.spacing(np.abs(high.astype(actual.dtype))).astype(np.float64)
    return np.abs((actual.astype(np.float64) - high) - low) / spacing


def errors(dtype, kind, n_classes, order):
    """Return the errors of loss and target-class gradient in ulp, and the rows' leads."""
    problem = truth(dtype, kind, n_classes)
    logits = problem.logits.copy(order=order)
    rows = np.arange(len(logits))
    loss, grad = fastce.cross_entropy_with_grad(logits, problem.target, reduction="none")
    alone = fastce.cross_entropy(logits, problem.target, reduction="none")
    loss_error = np.maximum(ulps(loss, problem.loss), ulps(alone, problem.loss))
    return loss_error, ulps(grad[rows, problem.target], problem.grad), problem.lead


def worst_errors(isa):
    """Return {(dtype, kind): (worst loss, worst gradient, worst of either beyond the lead)}, in ulp."""
    worst = {}
    with fastce._cpu.use_isa(isa):
        for dtype in DTYPES:
            for kind in KINDS:
                for n_classes in SIZES:
                    for order in "CF":
                        loss, grad, lead = errors(dtype, kind, n_classes, order)
                        beyond = max((loss - lead).max(), (grad - lead).max())
                        found = np.array([loss.max(), grad.max(), beyond])
                        worst[dtype, kind] = np.maximum(worst.get((dtype, kind), -np.inf), found)
    return worst


@pytest.mark.every_isa(by_default=True)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("n_classes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradient_are_within_the_promised_ulps(dtype, kind, n_classes, order, record_property):
    loss, grad, lead = errors(dtype, kind, n_classes, order)
    record_property("worst loss, ulp", float(loss.max()))
    record_property("worst gradient, ulp", float(grad.max()))
    for name, error in (("loss", loss), ("gradient", grad)):
        beyond = error - lead
        i = beyond.argmax()
        assert beyond[i] <= ULPS, f"{name} of row {i}: {error[i]:.2f} ulp at a lead of {lead[i]:.1f}"


def test_the_measure_sees_one_ulp():
    """A result moved by one unit in the last place is measured as one ulp off, on either side of a power of two."""
    for dtype in DTYPES:
        for number in (0.7, 1.5, 3e-39, 1e-30):  # 3e-39 is subnormal in float32
            rounded = np.array([number], dtype)
            exact = np.array([rounded.astype(np.float64), [0.0]])
            assert ulps(rounded, exact) == 0
            assert ulps(np.nextafter(rounded, np.inf, dtype=dtype), exact) == 1


def main():
    print(f"{'isa':9} {'dtype':8} {'kind':12} {'loss':>8} {'gradient':>8} {'beyond the lead':>16}   (worst, ulp)")
    for isa in fastce._cpu.supported_isas:
        for (dtype, kind), (loss, grad, beyond) in worst_errors(isa).items():
            print(f"{isa:9} {dtype:8} {kind:12} {loss:8.2f} {grad:8.2f} {beyond:16.2f}")


if __name__ == "__main__":
    main()
