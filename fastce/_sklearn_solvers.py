"""Solvers for linear models under softmax cross-entropy: L-BFGS and Newton-CG by SciPy, and stochastic steps by Adam.

Design
------
1. Parameters are one float64 matrix `theta` of shape (d + 1, outputs): a column per class, the intercepts last. Two
   classes have one column, the difference of their logits, so that objective, penalty and gradient are those of the
   logistic regression that scikit-learn minimises. Without intercepts the last row's gradient is 0, and it stays 0.
2. Threads take chunks of rows, small enough for the caches: a chunk is multiplied, turned into its gradient by the
   fused loss, and multiplied again. BLAS and kernels run with one thread each meanwhile. Left to their own threads,
   OpenBLAS and OpenMP in turn, they wait for each other's, which spin: 100 instead of 34 ms for 20000 x 64 features
   and 1000 classes in float32 on two cores.
3. SciPy minimises in other coordinates, in which the Hessian at the start is about the identity; see `Scaling`.
   Convergence is judged in the original ones, as scikit-learn does: no entry of the gradient above `tol`.
4. Whatever depends on the number of rows is allocated once.
"""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import scipy.optimize
import scipy.sparse
from numpy.typing import NDArray
from sklearn.utils.sparsefuncs import mean_variance_axis
from threadpoolctl import ThreadpoolController

import fastce

Floats = NDArray[np.float64]
Array = NDArray[Any]
T = TypeVar("T")

# Entries of a chunk's features and logits. Below 2^18 the threads' turns at Python's lock show, and above 2^20 the
# caches end: 34, 36 and 47 ms with 2^19, 2^21 and 2^22 where the text above says 34.
_CHUNK_ENTRIES = 2**19
_LEAST_CHUNK_ROWS = 256  # below, BLAS multiplies slowly however many features there are

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


class Rows(NamedTuple):
    """Some rows: features, a matrix or CSR of float32 or float64; class indices; weights, if there are any."""

    X: Any
    target: NDArray[np.int64]
    weight: Array | None

    def take(self, rows: slice | NDArray[np.intp]) -> "Rows":
        """Return some of them."""
        weight = None if self.weight is None else self.weight[rows]
        return Rows(_view_rows(self.X, rows), self.target[rows], weight)


def _view_rows(X: Any, rows: Any) -> Any:
    """Return some rows; without a copy if they are a slice of CSR, which SciPy would copy."""
    if not (scipy.sparse.issparse(X) and isinstance(rows, slice)):
        return X[rows]
    pointers = X.indptr[rows.start : rows.stop + 1]
    span = slice(pointers[0], pointers[-1])
    part = (X.data[span], X.indices[span], pointers - pointers[0])
    return type(X)(part, shape=(len(pointers) - 1, X.shape[1]), copy=False)


def total_weight(rows: Rows) -> float:
    """Return the sum of the weights."""
    return float(len(rows.target) if rows.weight is None else rows.weight.sum(dtype=np.float64))


class Layer(NamedTuple):
    """The loss of rows, summed, as a function of the parameters."""

    n_classes: int
    label_smoothing: float
    fit_intercept: bool

    @property
    def n_outputs(self) -> int:
        """How many columns the parameters have."""
        return 1 if self.n_classes == 2 else self.n_classes

    def loss_and_grad(self, theta: Floats, chunks: Iterable[Rows], workspace: Array) -> tuple[float, Floats]:
        """Return loss and gradient."""
        loss, grad = 0.0, np.zeros_like(theta)
        for chunk in chunks:
            logits = self._logits(theta, chunk.X, workspace[0])
            losses, _ = fastce.cross_entropy_with_grad(logits, chunk.target, out=logits, **self._options(chunk))
            loss += float(np.sum(losses, dtype=np.float64))
            self._add_product(chunk.X, logits, grad)
        return loss, grad

    def hvp(self, theta: Floats, v: Floats, chunks: Iterable[Rows], workspace: Array) -> Floats:
        """Return the Hessian at `theta` times `v`. The logits are made again: keeping them takes rows x classes."""
        product = np.zeros_like(theta)
        for chunk in chunks:
            logits = self._logits(theta, chunk.X, workspace[0])
            direction = self._logits(v, chunk.X, workspace[1])
            fastce.cross_entropy_hvp(logits, chunk.target, direction, out=direction, **self._options(chunk))
            self._add_product(chunk.X, direction, product)
        return product

    def curvature(self, theta: Floats, chunks: Iterable[Rows], workspace: Array) -> tuple[Floats, list[Rows]]:
        """Return what p (1 - p) adds up to for every output, and the rows with its sum over the outputs as weight."""
        total, weighted = np.zeros(self.n_outputs), []
        for chunk in chunks:
            p = self._logits(theta, chunk.X, workspace[0])
            p = fastce.softmax(p, out=p, n_threads=1)[:, -self.n_outputs :]
            p *= 1 - p
            if chunk.weight is not None:
                p *= chunk.weight[:, None]
            total += p.sum(axis=0)
            weighted.append(chunk._replace(weight=p.sum(axis=1)))
        return total, weighted

    def _options(self, chunk: Rows) -> dict[str, Any]:
        # "none", for its losses are summed in float64.
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": self.label_smoothing, "n_threads": 1}
        return options | {"sample_weight": chunk.weight}

    def _logits(self, theta: Floats, x: Any, buffer: Array) -> Array:
        """Return the logits, in the buffer; of two classes those of the first are 0."""
        theta = theta.astype(buffer.dtype)
        logits = buffer[: x.shape[0]]
        if self.n_outputs == 1:
            logits[:, 0] = 0
            logits[:, 1] = (x @ theta[:-1, 0]) + theta[-1, 0]
        elif scipy.sparse.issparse(x):
            np.add(x @ theta[:-1], theta[-1], out=logits)
        else:
            np.matmul(x, theta[:-1], out=logits)
            logits += theta[-1]
        return logits

    def _add_product(self, x: Any, of_logits: Array, total: Floats) -> None:
        """Carry a derivative by the logits on to the parameters."""
        if self.n_outputs == 1:
            of_logits = np.ascontiguousarray(of_logits[:, 1:])
        total[:-1] += x.T @ of_logits
        if self.fit_intercept:
            total[-1] += of_logits.sum(axis=0)


class Objective:
    """The mean loss of all rows and ``l2 / 2`` times the squared coefficients. Use it in a ``with`` statement."""

    def __init__(self, layer: Layer, rows: Rows, C: float, n_threads: int | None) -> None:
        self.layer, self.rows = layer, rows
        self.n_rows: int = rows.X.shape[0]
        self.n_features: int = rows.X.shape[1]
        self.total_weight = total_weight(rows)
        self.l2 = 1 / (C * self.total_weight)
        chunks = [
            rows.take(slice(start, start + self._chunk_rows)) for start in range(0, self.n_rows, self._chunk_rows)
        ]
        n_spans = 1
        if len(chunks) > 1:
            n_spans = min(len(chunks), n_threads or fastce.show_config(mode="dicts")["threads"]["effective"])
        bounds = [i * len(chunks) // n_spans for i in range(n_spans + 1)]
        self._spans = [chunks[start:stop] for start, stop in itertools.pairwise(bounds)]
        size = (2, min(self.n_rows, self._chunk_rows), layer.n_classes)
        self._workspaces = [np.empty(size, rows.X.dtype) for _ in self._spans]
        self._resources = contextlib.ExitStack()

    @property
    def _chunk_rows(self) -> int:
        n_classes = self.layer.n_classes
        if scipy.sparse.issparse(self.rows.X):
            # The product of a chunk is as large as theta: let its logits be no smaller.
            return max(_CHUNK_ENTRIES // n_classes, self.n_features)
        return max(_CHUNK_ENTRIES // (self.n_features + n_classes), _LEAST_CHUNK_ROWS)

    def __enter__(self) -> Self:
        self._resources.enter_context(_find_thread_pools().limit(limits=1, user_api="blas"))
        self._map: Callable[..., Iterable[Any]] = map
        if len(self._spans) > 1:
            self._map = self._resources.enter_context(ThreadPoolExecutor(len(self._spans))).map
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def loss_and_grad(self, theta: Floats) -> tuple[float, Floats]:
        """Return value and gradient."""
        parts = self._on_spans(functools.partial(self.layer.loss_and_grad, theta))
        loss, grad = sum(part[0] for part in parts), sum(part[1] for part in parts)
        return loss / self.total_weight + self.penalty(theta), self._average(grad, theta)

    def hvp(self, theta: Floats, v: Floats) -> Floats:
        """Return the Hessian times `v`."""
        return self._average(sum(self._on_spans(functools.partial(self.layer.hvp, theta, v))), v)

    def penalty(self, theta: Floats) -> float:
        """Return the penalty."""
        return 0.5 * self.l2 * float(np.vdot(theta[:-1], theta[:-1]))

    def curvature(self, theta: Floats, center: bool, full: bool) -> tuple[Floats, Floats, Floats]:
        """Return the mean of p (1 - p) for every output, and moments of the features in which rows count by theirs.

        These are their means, or 0 if they are not to be centred, and their covariances, or else their variances.
        """
        parts = self._on_spans(functools.partial(self.layer.curvature, theta))
        spans = [part[1] for part in parts]
        curvature = np.sum([part[0] for part in parts], axis=0)
        if scipy.sparse.issparse(self.rows.X):
            weight = np.concatenate([chunk.weight for span in spans for chunk in span])
            mean, squares = mean_variance_axis(self.rows.X, axis=0, weights=weight)
            if not center:
                mean, squares = np.zeros_like(mean), squares + mean**2
        else:
            total = curvature.sum()
            mean = sum(self._on_spans(_sum_rows, spans)) / total if center else np.zeros(self.n_features)
            squares = sum(self._on_spans(functools.partial(_sum_squares, mean, full), spans)) / total
        return curvature / self.total_weight, mean, squares

    def _average(self, total: Any, theta: Floats) -> Floats:
        average: Floats = total
        average /= self.total_weight
        average[:-1] += self.l2 * theta[:-1]
        return average

    def _on_spans(self, call: Callable[..., T], spans: Any = None) -> list[T]:
        return list(self._map(call, spans or self._spans, self._workspaces))


@functools.cache
def _find_thread_pools() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries: some milliseconds


def _sum_rows(chunks: Iterable[Rows], _workspace: Array) -> Any:
    return sum((weight @ x).astype(np.float64) for x, _, weight in chunks)


def _sum_squares(mean: Floats, full: bool, chunks: Iterable[Rows], _workspace: Array) -> Any:
    """Return the weighted sum of squared deviations from the mean, of one feature or of every two."""

    def part(x: Array, weight: Any) -> Any:
        x = x - mean.astype(x.dtype)
        scaled = x * weight[:, None]
        product = x.T @ scaled if full else np.einsum("ij,ij->j", x, scaled)
        return product.astype(np.float64, copy=False)

    return sum(part(chunk.X, chunk.weight) for chunk in chunks)


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
