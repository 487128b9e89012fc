"""Solvers for the objective of linear models: L-BFGS, Newton-CG, and stochastic steps by Adam.

Design
------
1. The first two are written out here. SciPy's end where the objective no longer falls by more than its rounding, which
   is where the gradient is still of the order of its root; the search along a line here goes by slopes there, which a
   convex objective allows. Nor can SciPy's coordinates be changed on the way, or a step be refused.
2. Steps are those of other coordinates, in which the Hessian is about the identity; see `Scaling`.
3. Convergence is judged in the original coordinates, as scikit-learn does: no entry of the gradient above `tol`. Small
   features, or those that are mostly 0, make all entries small long before the minimum: so the objective must not be
   about to fall by more than `tol` either, or by less if it is small itself, by what the next step promises.
"""

import collections
from typing import Any, NamedTuple

import numpy as np

from fastce._sklearn_objective import Floats, Objective

# Evaluations of the objective that finding the basis of `Scaling` may cost.
_BASIS_WORTH = 10

# Units of rounding, of the largest variance, that are none. Derived: the noise of a gradient, of one unit, is stretched
# by the root of the inverse, to 4e-5 in float32 and 2e-9 in float64.
_NO_VARIANCE = 64
# How far below `tol` the solvers go on. Where they stop at `tol` itself, the objective of features without correlation
# ends a millionth above scikit-learn's; with 0.7 it ended below on all data of asv_bench/logistic.py, for 4 iterations.
_MARGIN = 0.7
# The share of its value at which a solver takes new coordinates.
_RESCALE = 0.25
# L-BFGS: pairs that are kept, as many as scikit-learn keeps.
_N_PAIRS = 10
# Along a line, a step is good if the slope there is above 0.9 of that at the start, and the objective has fallen by
# 1e-4 of what that slope promises: Nocedal and Wright, "Numerical optimization", 2006, section 3.1.
_LESS_STEEP, _FALL = 0.9, 1e-4
_MOST_TRIALS = 30
# Iterations without progress after which rounding rules. Of 10 and 30, 30 gained nothing on any data tried.
_IDLE = 10

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

    Its block of class k in the coefficients is the mean of w_k x x^T over the rows, with w_k = p_k (1 - p_k), plus l2.
    If features are centred first, around their means under w_k, this is h_k cov_k(X) + l2, with h_k the mean of w_k,
    and the intercept is on its own, with h_k. Where a covariance matrix for every class costs too much, all have that
    of rows with the weights sum_k w_k; where one costs too much, it is diagonal.

    Each feature is divided by its own spread, or by what the penalty amounts to where that is more, and then
    decorrelated: eigenvectors of the covariances themselves are those of the largest features, and rounding in all
    others. With S = diag(spread) and S^-1 (cov(X) + l2 / h) S^-1 = Q diag(lambda) Q^T, the coordinates are Q^T S theta
    times the square roots of h_k mu_j + l2 (Q^T S^-2 Q)_jj, where mu_j is what lambda_j is without the penalty.

    What couples classes is left out, but for one thing: parameters that all classes share change no probability, and
    only the penalty sees them. A factor for each class would mix this flat direction into all others, so it is
    projected out. diag(1 / h) between two such projections is the inverse of diag(h) - h h^T / sum(h), which is about
    what the coupling would be if all rows had the same probabilities.

    Böhning's bound [1]_ is the same with w_k = 1/2, which is far too large for many classes, and where the model has
    become sure of most rows.

    .. [1] D. Böhning, "Multinomial logistic regression algorithm", Annals of the Institute of Statistical Mathematics
       44, 1992.
    """

    def __init__(self, objective: Objective, theta: Floats, may_mix: bool = True, may_split: bool = True) -> None:
        layer, n, d = objective.layer, objective.n_rows, objective.n_features
        # In multiplications: n d^2 for the covariance and about 25 d^3 for its eigenvectors, against 2 n d for every
        # class in one evaluation, which is no faster with few classes than with ten: it waits for memory.
        budget = 2 * _BASIS_WORTH * n * max(layer.n_classes, 10) / (n * d + 25 * d**2)
        full = may_mix and not objective.is_sparse and budget >= 1
        by_class = may_split and full and budget >= layer.n_outputs
        moments = objective.moments(theta, layer.fit_intercept, full, by_class)
        self._mean, peak = moments.mean, moments.peak
        # What rounding leaves of no variance must not be stretched.
        least = _NO_VARIANCE * np.finfo(objective.rows.X.dtype).eps
        curvature = np.maximum(moments.curvature, least * moments.curvature.max())
        # Of the classes that share a covariance, on average.
        shared = curvature if by_class else curvature.mean(keepdims=True)
        squares = moments.squares
        # What the penalty amounts to, as a spread.
        penalty = np.sqrt(max(objective.l2, 0) / shared)[:, None]
        spread = np.sqrt(np.einsum("kii->ki", squares) if full else squares) * peak
        spread = np.hypot(np.hypot(spread, penalty), least * peak)
        spread = np.where(spread > 0, spread, 1)
        ratio, penalties = peak / spread, (penalty / spread) ** 2
        self._basis: Floats | None = None
        self.is_mixing = full  # or else features are only scaled
        if full:
            squares = squares * ratio[:, :, None] * ratio[:, None, :] + penalties[:, :, None] * np.eye(d)
            squares, self._basis = np.linalg.eigh(squares)
            penalties = np.einsum("kij,ki->kj", self._basis**2, penalties)
            squares = squares - penalties
        else:
            squares = squares * ratio**2
        squares = np.maximum(squares, least * squares.max(initial=0))
        scale = np.vstack([squares.T * curvature + penalties.T * shared, curvature])
        self._scale = np.sqrt(np.where(scale > 0, scale, 1))
        self._spread = spread.T

    def to_theta(self, z: Floats) -> Floats:
        """Return the parameters, or a step of them."""
        theta: Floats = z / self._scale
        theta[:-1] = self._rotate(theta[:-1])
        theta[:-1] /= self._spread
        theta[-1] -= (self._mean * theta[:-1]).sum(axis=0)
        return center(theta)

    def from_theta(self, theta: Floats) -> Floats:
        """Undo `to_theta`."""
        z = center(theta)
        z[-1] += (self._mean * z[:-1]).sum(axis=0)
        z[:-1] *= self._spread
        z[:-1] = self._rotate(z[:-1], back=True)
        z *= self._scale
        return z

    def pull_back(self, grad: Floats) -> Floats:
        """Return the gradient by these coordinates."""
        z = center(grad)
        z[:-1] -= self._mean * z[-1]
        z[:-1] /= self._spread
        z[:-1] = self._rotate(z[:-1], back=True)
        z /= self._scale
        return z

    def precondition(self, grad: Floats) -> Floats:
        """Return about the inverse Hessian times a gradient."""
        return self.to_theta(self.pull_back(grad))

    def _rotate(self, coefficients: Floats, back: bool = False) -> Floats:
        """Return the products of one basis with all columns, or of each with its own."""
        if self._basis is None:
            return coefficients
        bases = self._basis.swapaxes(1, 2) if back else self._basis
        if len(bases) == 1:
            return np.asarray(bases[0] @ coefficients)
        return np.asarray(np.einsum("kij,jk->ik", bases, coefficients))


def center(theta: Floats) -> Floats:
    """Return parameters without what all classes share; of two classes there is only the difference."""
    if theta.shape[1] == 1:
        return theta.copy()
    centred: Floats = theta - theta.mean(axis=1, keepdims=True)
    return centred


class Outcome(NamedTuple):
    """Where a solver stopped; `complaint` is empty if it converged."""

    theta: Floats
    n_iter: int
    complaint: str


class _Place(NamedTuple):
    """Parameters, with what the objective is there."""

    theta: Floats
    value: float
    grad: Floats
    steepest: float


class _LBFGS:
    """The two loops of L-BFGS [1]_, around coordinates in which the Hessian is about the identity.

    .. [1] J. Nocedal, "Updating quasi-Newton matrices with limited storage", Mathematics of Computation 35, 1980.
    """

    def __init__(self, objective: Objective, tol: float) -> None:
        self._hvp = objective.hvp
        self._pairs: collections.deque[tuple[Floats, Floats, float]] = collections.deque(maxlen=_N_PAIRS)

    def direction(self, place: _Place, scaling: Scaling) -> Floats:
        """Return about minus the inverse Hessian times the gradient."""
        p = -place.grad
        factors: list[float] = []
        for step, change, product in reversed(self._pairs):
            factors.append(float(np.vdot(step, p)) / product)
            p -= factors[-1] * change
        p = scaling.precondition(p)
        if self._pairs:
            _, change, product = self._pairs[-1]
            p *= product / np.vdot(change, scaling.precondition(change))
        elif not scaling.is_mixing:
            # Correlated features curve the objective more, all together, than each by itself: the Hessian along this
            # line says how much. Of tf-idf, a step of 1 is 50 times too long, and 20 others do not make up for it.
            curvature = float(np.vdot(p, self._hvp(place.theta, p)))
            p *= -np.vdot(place.grad, p) / curvature if curvature > 0 else 1
        for (step, change, product), factor in zip(self._pairs, reversed(factors), strict=True):
            p += (factor - np.vdot(change, p) / product) * step
        return p

    def learn(self, step: Floats, change: Floats, product: float) -> None:
        """Take note of a step, of the gradient's change, and of their product."""
        if product > 0:
            self._pairs.append((step, change, product))

    def forget(self) -> None:
        """Begin anew."""
        self._pairs.clear()


class _NewtonCG:
    """Newton's step by conjugate gradients, in coordinates in which the Hessian is about the identity."""

    def __init__(self, objective: Objective, tol: float) -> None:
        self._hvp, self._tol = objective.hvp, tol

    def direction(self, place: _Place, scaling: Scaling) -> Floats:
        """Return minus the inverse Hessian times the gradient, roughly where that is enough."""
        residual = -place.grad
        p = np.zeros_like(residual)
        z = scaling.precondition(residual)
        search, square = z, float(np.vdot(residual, z))
        # Far away, superlinear convergence needs no more: Nocedal and Wright, algorithm 7.1. Where the gradient is
        # small enough, all that is asked for is what a step would gain.
        is_small = place.steepest <= _MARGIN * self._tol
        enough = square * (0.25 if is_small else min(0.25, square**0.5))
        for _ in range(2 * residual.size + 20):
            # The residual is the gradient where the step leads to, but for third derivatives.
            would_do = not is_small and square <= self._tol and np.abs(residual).max() <= 0.25 * self._tol
            if would_do or not square > enough:
                break
            product = self._hvp(place.theta, search)
            curvature = float(np.vdot(search, product))
            if not curvature > 0:  # rounding
                break
            p += square / curvature * search
            residual -= square / curvature * product
            z = scaling.precondition(residual)
            square, before = float(np.vdot(residual, z)), square
            search = z + square / before * search
        return p if p.any() else z

    def learn(self, step: Floats, change: Floats, product: float) -> None:
        """Nothing is kept."""

    def forget(self) -> None:
        """Nothing is kept."""


METHODS: dict[str, type[_LBFGS | _NewtonCG]] = {"lbfgs": _LBFGS, "newton-cg": _NewtonCG}


def minimize(objective: Objective, theta: Floats, method: str, tol: float, max_iter: int, report: Any) -> Outcome:
    """Minimise by one of `METHODS`, starting from `theta`."""
    return _Descent(objective, METHODS[method](objective, tol), tol).run(theta, max_iter, report)


class _Descent:
    """Steps downhill, until there is no more to gain."""

    def __init__(self, objective: Objective, method: _LBFGS | _NewtonCG, tol: float) -> None:
        self._objective, self._method, self._tol = objective, method, tol
        self._eps = float(np.finfo(objective.rows.X.dtype).eps)

    def _evaluate(self, theta: Floats) -> _Place:
        value, grad = self._objective.loss_and_grad(theta)
        steepest = float(np.abs(grad).max(initial=0))
        return _Place(theta, value, grad, steepest)

    def run(self, theta: Floats, max_iter: int, report: Any) -> Outcome:
        """Go on until the place is good enough, or neither value nor gradient gets any better."""
        place = self._best = self._evaluate(center(theta))
        if not np.isfinite(place.steepest):
            return Outcome(theta, 0, "the gradient at the start is not finite. Scale the features")
        self._met: _Place | None = None
        self._least_gain, self._idle, self._is_fresh = np.inf, 0, True
        scaling, scaled_value, n_iter = Scaling(self._objective, place.theta), place.value, 0
        while True:
            p = self._method.direction(place, scaling)
            slope = float(np.vdot(place.grad, p))
            self._judge(place, -0.5 * slope)
            if self._met is not None and self._met.steepest <= _MARGIN * self._tol:
                return Outcome(self._met.theta, n_iter, "")
            if n_iter == max_iter:
                return self._end(n_iter, f"Scale the features, or increase max_iter={max_iter}")
            found = self._search(place, p, slope) if self._idle < _IDLE else None
            if found is not None:
                new, step, product = found
                self._method.learn(step, new.grad - place.grad, product)
                place = new
                n_iter += 1
                report(place.value, place.steepest)
                is_outdated = place.value < _RESCALE * scaled_value
            elif not self._is_fresh:
                # What was learnt may be rounding.
                self._idle, self._is_fresh, place, is_outdated = 0, True, self._best, True
            else:
                dtype = self._objective.rows.X.dtype.name
                return self._end(n_iter, f"Rounding in {dtype} allows no more: scale the features, or raise tol")
            if is_outdated:
                self._method.forget()
                scaling, scaled_value = Scaling(self._objective, place.theta), place.value

    def _judge(self, place: _Place, gain: float) -> None:
        """Look whether a place is good enough, or better than those before; `gain` is what the next step promises."""
        is_enough = place.steepest <= self._tol and gain <= self._least_worth(place.value)
        if is_enough and (self._met is None or place.steepest <= self._met.steepest):
            self._met = place
        falls = place.value < self._best.value - self._eps * abs(self._best.value)
        if falls or gain < 0.8 * self._least_gain:
            self._best, self._least_gain, self._idle, self._is_fresh = place, gain, 0, False
        else:
            self._idle += 1

    def _least_worth(self, value: float) -> float:
        """Return what a step must gain to be worth it.

        This is `tol`, and where the objective is not much larger itself, a twentieth of it. That share has an end, for
        without a penalty the objective may fall to 0, and every step gains a share of it.
        """
        return min(self._tol, max(0.05 * value, 0.1 * self._tol))

    def _end(self, n_iter: int, advice: str) -> Outcome:
        if self._met is not None:
            return Outcome(self._met.theta, n_iter, "")
        best = self._best
        numbers = f"largest gradient {best.steepest:.2e}, tol {self._tol:.2e}"
        if best.steepest <= self._tol:
            numbers = f"objective about to fall by {self._least_gain:.2e}, tol {self._tol:.2e}"
        return Outcome(best.theta, n_iter, f"{numbers}. {advice}")

    def _search(self, place: _Place, p: Floats, slope: float) -> tuple[_Place, Floats, float] | None:
        """Return a good place along a line, the step to it, and this step times the gradient's change.

        What the objective's rounding hides, its slope tells, for it is convex: where the slope is negative, or positive
        but less than at the start, the objective has not risen, or its second derivative varies a lot. The idea is
        that of Hager and Zhang, "A new conjugate gradient method with guaranteed descent and an efficient line search",
        SIAM Journal on Optimization 16, 2005.
        """
        noise = 16 * self._eps * abs(place.value)
        t, low, low_slope, high, high_slope = 1.0, 0.0, slope, np.inf, np.inf
        for _ in range(_MOST_TRIALS if slope < 0 else 0):
            step = t * p
            new = self._evaluate(place.theta + step)
            new_slope = float(np.vdot(new.grad, p))
            falls = new.value <= place.value + _FALL * t * slope
            falls = falls or (new.value <= place.value + noise and new_slope <= (2 * _FALL - 1) * slope)
            if falls and new_slope >= _LESS_STEEP * slope:
                return new, step, t * (new_slope - slope)
            if falls:
                low, low_slope = t, new_slope
            else:  # or not finite
                high, high_slope = t, new_slope
            # Where the slope is 0, if it is linear.
            bend = (high_slope - low_slope) / (high - low) if high < np.inf else (low_slope - slope) / low
            t = low - low_slope / bend if bend > 0 and np.isfinite(bend) else np.inf
            least, most = (2 * low, 10 * low) if high == np.inf else (0.7 * low + 0.3 * high, 0.3 * low + 0.7 * high)
            if not np.isfinite(high_slope) and high < np.inf:
                t = least
            t = min(max(t, least), most)
        return None


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
        # With a covariance for each class, steps from the minimum of separable data led away from it twice as far.
        self._scaling = Scaling(objective, theta, may_mix, may_split=False)
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
    complaint = f"the objective still falls by more than tol={tol:.2e}. Scale the features, or increase {max_iter=}"
    return Outcome(adam.theta, max_iter, complaint)
