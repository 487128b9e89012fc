"""Solvers for the objective of linear models: L-BFGS and Newton-CG by SciPy, and stochastic steps by Adam.

SciPy minimises in other coordinates, in which the Hessian at the start is about the identity; see `Scaling`.
Convergence is judged in the original ones, as scikit-learn does: no entry of the gradient above `tol`.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse

from fastce._sklearn_objective import Floats, Objective

# Evaluations of the objective that finding the basis of `Scaling` may cost.
_BASIS_WORTH = 10

# Units of rounding, of the largest variance, that are none. Derived: the noise of a gradient, of one unit, is stretched
# by the root of the inverse, to 4e-5 in float32 and 2e-9 in float64.
_NO_VARIANCE = 64
# How far below `tol` the solvers go on. Where they stop at `tol` itself, the objective of features without correlation
# ends a millionth above scikit-learn's; with 0.7 it ended below on all data of asv_bench/logistic.py, for 4 iterations.
_MARGIN = 0.7
# The share of its loss at which a solver takes new coordinates.
_RESCALE = 0.25

_BATCH_ROWS = 128
# Adam with its authors' decays. The step, in coordinates in which the Hessian is about 1, shrinks with the t-th step
# like 1 / sqrt(1 + t / 10). Of 0.01, 0.03 and 0.1, and of 10, 30 and 100, these were never worse than 0.012 of the
# objective on iris, digits, make_classification and Gaussian clouds of 10 and 100 classes, within 100 passes.
_STEP, _STEP_AGE, _DECAY, _SQUARE_DECAY, _TINY = 0.1, 10, 0.9, 0.999, 1e-8
# The average of the parameters weighs step t by about t^3, which soon forgets where they began.
_AVERAGE_POWER = 3
_PATIENCE = 5  # passes without progress


class Scaling:
    """Coordinates in which the Hessian of the objective at `theta` is about the identity.

    Its block of class k in the coefficients is the mean of p_k (1 - p_k) x x^T over the rows, plus l2. Here all classes
    share the rows' weights, omega = sum_k p_k (1 - p_k), and the block is h_k cov(X) + l2, with h_k the mean of
    p_k (1 - p_k), and h_k for the intercept, if features are centred first; what couples classes is left out. With
    cov(X) = Q diag(lambda) Q^T the coordinates are Q^T theta times the square roots of h_k lambda_j + l2.

    Böhning's bound [1]_ is the same with omega = 1 and h_k = 1/2, which is far too large for many classes, and where
    the model has become sure of most rows.

    .. [1] D. Böhning, "Multinomial logistic regression algorithm", Annals of the Institute of Statistical Mathematics
       44, 1992.
    """

    def __init__(self, objective: Objective, theta: Floats, may_mix: bool = True) -> None:
        layer, n, d = objective.layer, objective.n_rows, objective.n_features
        is_sparse = scipy.sparse.issparse(objective.rows.X)
        # In multiplications: n d^2 for the covariance and about 25 d^3 for its eigenvectors, against 2 n d for every
        # class in one evaluation, which is no faster with few classes than with ten: it waits for memory.
        full = may_mix and not is_sparse and n * d + 25 * d**2 <= 2 * _BASIS_WORTH * n * max(layer.n_classes, 10)
        curvature, self.mean, squares = objective.curvature(theta, layer.fit_intercept, full)
        self.basis: Floats | None = None
        if full:
            squares, self.basis = np.linalg.eigh(squares)
        # What rounding leaves of no variance must not be stretched.
        least = _NO_VARIANCE * np.finfo(objective.rows.X.dtype).eps
        squares = np.where(squares > least * squares.max(initial=0), squares, squares.mean())
        curvature = np.maximum(curvature, least * curvature.max())
        scale = np.vstack([np.outer(squares, curvature) + objective.l2, curvature])
        self.scale = np.sqrt(np.where(scale > 0, scale, 1))

    def to_theta(self, z: Floats) -> Floats:
        """Return the parameters."""
        theta: Floats = z / self.scale
        if self.basis is not None:
            theta[:-1] = self.basis @ theta[:-1]
        theta[-1] -= self.mean @ theta[:-1]
        return theta

    def from_theta(self, theta: Floats) -> Floats:
        """Undo `to_theta`."""
        z = theta.copy()
        z[-1] += self.mean @ theta[:-1]
        if self.basis is not None:
            z[:-1] = self.basis.T @ z[:-1]
        z *= self.scale
        return z

    def pull_back(self, grad: Floats) -> Floats:
        """Return the gradient by these coordinates."""
        z = grad.copy()
        z[:-1] -= self.mean[:, None] * grad[-1]
        if self.basis is not None:
            z[:-1] = self.basis.T @ z[:-1]
        z /= self.scale
        return z


class Outcome(NamedTuple):
    """Where a solver stopped; `complaint` is empty if it converged."""

    theta: Floats
    n_iter: int
    complaint: str


def minimize(objective: Objective, theta: Floats, method: str, tol: float, max_iter: int, report: Any) -> Outcome:
    """Minimise by one of SciPy's methods, starting from `theta`."""
    n_iter = 0
    while True:
        descent = _Descent(objective, theta, tol, report)
        if descent.has_converged:
            return Outcome(theta, n_iter, "")
        result = descent.run(method, max_iter - n_iter)
        theta = descent.theta
        n_iter += result.nit
        if descent.met_tol or result.status == 0:
            return Outcome(theta, n_iter, "")
        if not descent.wants_rescaling or n_iter >= max_iter:
            return Outcome(theta, n_iter, f"{result.message} (largest gradient {descent.steepest:.2e}, tol {tol:.2e})")


class _Descent:
    """One run of a method of SciPy's, in coordinates that suit where it starts."""

    def __init__(self, objective: Objective, theta: Floats, tol: float, report: Any) -> None:
        self._objective, self._tol, self._report = objective, tol, report
        self._scaling = Scaling(objective, theta)
        self._start = self._scaling.from_theta(theta)
        self._x: Floats = np.full(theta.size, np.nan)
        # At any place: where rounding rules, the gradient may grow again while the objective falls.
        self.met_tol = False
        self._evaluate(self._start.ravel())
        self._first_loss = self._loss

    def _evaluate(self, x: Floats) -> tuple[float, Floats]:
        """Return value and gradient; they are kept, for SciPy and its callback ask for the same place again."""
        if not np.array_equal(x, self._x):
            self.theta = self._scaling.to_theta(x.reshape(self._start.shape))
            self._value, grad = self._objective.loss_and_grad(self.theta)
            self._loss = self._value - self._objective.penalty(self.theta)
            self.steepest = float(np.abs(grad).max(initial=0))
            self.met_tol = self.met_tol or self.steepest <= self._tol
            self._grad = self._scaling.pull_back(grad).ravel()
            self._x[:] = x
        return self._value, self._grad

    def _hvp(self, x: Floats, p: Floats) -> Floats:
        theta, v = (self._scaling.to_theta(a.reshape(self._start.shape)) for a in (x, p))
        return self._scaling.pull_back(self._objective.hvp(theta, v)).ravel()

    @property
    def has_converged(self) -> bool:
        """Tell whether the gradient is small enough."""
        return self.steepest <= _MARGIN * self._tol

    @property
    def wants_rescaling(self) -> bool:
        """Tell whether the curvature is no longer what it was: p (1 - p) is less than the loss of its row."""
        return self._loss < _RESCALE * self._first_loss

    def _callback(self, intermediate_result: Any) -> None:
        self._evaluate(intermediate_result.x)
        self._report(self._value, self.steepest)
        if self.has_converged or self.wants_rescaling:
            raise StopIteration

    def run(self, method: str, max_iter: int) -> Any:
        """Return SciPy's result; the attributes are of its place."""
        if method == "L-BFGS-B":
            # scikit-learn's, but for the tolerance of the gradient, which is the callback's business.
            options = {"maxiter": max_iter, "maxls": 50, "gtol": 0.0, "ftol": 64 * np.finfo(float).eps}
        else:
            options = {"maxiter": max_iter, "xtol": 0.0}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[lL]ine.[sS]earch")
            result = scipy.optimize.minimize(
                self._evaluate,
                self._start.ravel(),
                method=method,
                jac=True,
                hessp=self._hvp if method == "Newton-CG" else None,
                callback=self._callback,
                options=options,
            )
        self._evaluate(result.x)
        return result


class Adam:
    """Stochastic steps in scaled coordinates, of which an average is kept.

    Adam [1]_ on mini-batches. The average weighs late steps more, by a polynomial of their number [2]_. The coordinates
    are those of `Scaling` for the first rows that it sees.

    .. [1] D. P. Kingma and J. Ba, "Adam: a method for stochastic optimization", ICLR 2015.
    .. [2] O. Shamir and T. Zhang, "Stochastic gradient descent for non-smooth optimization: convergence results and
       optimal averaging schemes", ICML 2013.
    """

    def __init__(self, objective: Objective, theta: Floats) -> None:
        # Mixing costs a step n_features^2 times the classes, and wants rows enough to know what belongs together.
        may_mix = objective.n_features <= min(_BATCH_ROWS, objective.n_rows // 10)
        self._scaling = Scaling(objective, theta, may_mix)
        self._z = self._scaling.from_theta(theta)
        self._average, self._mean, self._square = self._z.copy(), np.zeros_like(self._z), np.zeros_like(self._z)
        self._n_steps = 0

    @property
    def theta(self) -> Floats:
        """The parameters, on average."""
        return self._scaling.to_theta(self._average)

    def _step(self, grad: Floats) -> None:
        """Move against a gradient, which is overwritten."""
        self._n_steps += 1
        t = self._n_steps
        self._mean += (1 - _DECAY) * (grad - self._mean)
        grad *= grad
        self._square += (1 - _SQUARE_DECAY) * (grad - self._square)
        size = _STEP / (1 + t / _STEP_AGE) ** 0.5 / (1 - _DECAY**t)
        root = np.sqrt(self._square / (1 - _SQUARE_DECAY**t), out=grad)
        root += _TINY
        self._z -= size * self._mean / root
        self._average += (_AVERAGE_POWER + 1) / (t + _AVERAGE_POWER) * (self._z - self._average)

    def run(self, objective: Objective, l2: float, rng: np.random.RandomState) -> None:
        """Go through the rows once, in random order."""
        layer, rows, n_rows = objective.layer, objective.rows, objective.n_rows
        workspace = np.empty((1, min(n_rows, _BATCH_ROWS), layer.n_classes), rows.X.dtype)
        order = rng.permutation(n_rows)
        for start in range(0, n_rows, _BATCH_ROWS):
            batch = rows.take(order[start : start + _BATCH_ROWS])
            theta = self._scaling.to_theta(self._z)
            _, grad = layer.loss_and_grad(theta, [batch], workspace)
            grad *= n_rows / objective.total_weight / len(batch.target)
            grad[:-1] += l2 * theta[:-1]
            self._step(self._scaling.pull_back(grad))


def descend(objective: Objective, adam: Adam, tol: float, max_iter: int, rng: Any, report: Any) -> Outcome:
    """Let `adam` go through the rows until the objective of its average gets no lower than by `tol`."""
    best, n_idle = np.inf, 0
    for n_iter in range(1, max_iter + 1):
        adam.run(objective, objective.l2, rng)
        value, grad = objective.loss_and_grad(adam.theta)
        report(value, float(np.abs(grad).max(initial=0)))
        n_idle = 0 if value < best - tol else n_idle + 1
        best = min(best, value)
        if n_idle == _PATIENCE:
            return Outcome(adam.theta, n_iter, "")
    return Outcome(adam.theta, max_iter, f"the objective still falls by more than tol={tol:.2e}")
