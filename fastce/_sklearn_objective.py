"""The objective of linear models under softmax cross-entropy: mean loss and penalty, as a function of the parameters.

Design
------
1. Parameters are one float64 matrix `theta` of shape (d + 1, outputs): a column per class, the intercepts last. Two
   classes have one column, the difference of their logits, so that objective, penalty and gradient are those of the
   logistic regression that scikit-learn minimises. Without intercepts the last row's gradient is 0, and it stays 0.
2. Threads take chunks of rows, small enough for the caches: a chunk is multiplied, turned into its gradient by the
   fused loss, and multiplied again. BLAS and kernels run with one thread each meanwhile. Left to their own threads,
   OpenBLAS and OpenMP in turn, they wait for each other's, which spin: 100 instead of 34 ms for 20000 x 64 features
   and 1000 classes in float32 on two cores.
3. Whatever depends on the number of rows is allocated once.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

import fastce
from fastce._sklearn_blas import one_blas_thread

Floats = NDArray[np.float64]
Array = NDArray[Any]
T = TypeVar("T")

# Entries of a chunk's features and logits. Below 2^18 the threads' turns at Python's lock show, and above 2^20 the
# caches end: 34, 36 and 47 ms with 2^19, 2^21 and 2^22 where the text above says 34.
_CHUNK_ENTRIES = 2**19
_LEAST_CHUNK_ROWS = 256  # below, BLAS multiplies slowly however many features there are


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

    def curvature(
        self, theta: Floats, by_class: bool, chunks: Iterable[Rows], workspace: Array
    ) -> tuple[Floats, list[Rows]]:
        """Return what p (1 - p) adds up to for every output, and the rows with these as weights, or with their sums.

        They are never 0, for a model that is sure of all rows has coordinates too.
        """
        total, weighted = np.zeros(self.n_outputs), []
        for chunk in chunks:
            p = self._logits(theta, chunk.X, workspace[0])
            p = fastce.softmax(p, out=p, n_threads=1)
            p = p[:, :1] * p[:, 1:] if self.n_outputs == 1 else np.multiply(p, 1 - p, out=p)
            p += np.finfo(p.dtype).tiny
            if chunk.weight is not None:
                p *= np.abs(chunk.weight)[:, None]  # coordinates are for sizes, which have no sign
            total += p.sum(axis=0)
            weighted.append(chunk._replace(weight=p.copy() if by_class else p.sum(axis=1, keepdims=True)))
        return total, weighted

    def _options(self, chunk: Rows) -> dict[str, Any]:
        # "none", for its losses are summed in float64.
        options = {"reduction": "none", "label_smoothing": self.label_smoothing, "n_threads": 1}
        return {"sample_weight": chunk.weight, **options}

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


class Moments(NamedTuple):
    """What a quadratic model of the objective needs to know."""

    curvature: Floats  # (outputs,): the mean of p (1 - p)
    mean: Floats  # (n_features, groups), with a group for each output, or one for all
    peak: Floats  # (n_features,): the largest absolute values
    squares: Floats  # (groups, n_features, n_features) or (groups, n_features), of features divided by their peak


class Objective:
    """The mean loss of all rows and ``l2 / 2`` times the squared coefficients. Use it in a ``with`` statement."""

    def __init__(self, layer: Layer, rows: Rows, C: float, n_threads: int | None) -> None:
        self.layer, self.rows, self.C = layer, rows, C
        self.n_rows: int = rows.X.shape[0]
        self.n_features: int = rows.X.shape[1]
        self.is_sparse = scipy.sparse.issparse(rows.X)
        self.total_weight = float(self.n_rows if rows.weight is None else rows.weight.sum(dtype=np.float64))
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

    @property
    def _chunk_rows(self) -> int:
        n_classes = self.layer.n_classes
        if self.is_sparse:
            # The product of a chunk is as large as theta: let its logits be no smaller.
            return max(_CHUNK_ENTRIES // n_classes, self.n_features)
        return max(_CHUNK_ENTRIES // (self.n_features + n_classes), _LEAST_CHUNK_ROWS)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as resources:
            resources.enter_context(one_blas_thread)
            self._map: Callable[..., Iterable[Any]] = map
            if len(self._spans) > 1:
                self._map = resources.enter_context(ThreadPoolExecutor(len(self._spans))).map
            self._resources = resources.pop_all()
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

    def moments(self, theta: Floats, center: bool, full: bool, by_class: bool) -> Moments:
        """Return moments of the features, in which rows count by their curvature.

        They are covariances, or else variances, around the means or around 0, for each class or for all together.
        """
        parts = self._on_spans(functools.partial(self.layer.curvature, theta, by_class))
        curvature = np.sum([part[0] for part in parts], axis=0)
        spans, total = [part[1] for part in parts], curvature if by_class else curvature.sum(keepdims=True)
        sums, peaks = zip(*self._on_spans(_sum_rows, spans), strict=True)
        peak = np.max(peaks, axis=0)
        mean = np.sum(sums, axis=0) / total if center else np.zeros((self.n_features, len(total)))
        unit = np.divide(1, peak, out=np.zeros(self.n_features), where=peak > 0)
        squares = np.sum(self._on_spans(functools.partial(_sum_squares, mean, unit, full), spans), axis=0)
        squares /= total.reshape(-1, *[1] * (squares.ndim - 1))
        return Moments(curvature / self.total_weight, mean, peak, squares)

    def _average(self, total: Any, theta: Floats) -> Floats:
        average: Floats = total
        average /= self.total_weight
        average[:-1] += self.l2 * theta[:-1]
        return average

    def _on_spans(self, call: Callable[..., T], spans: Any = None) -> list[T]:
        return list(self._map(_in_thread, itertools.repeat(call), spans or self._spans, self._workspaces))


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def _in_thread(call: Callable[..., T], chunks: Any, workspace: Array) -> T:
    """Call it. Small products may round to 0; at a step that is too long all may overflow, which the solvers expect."""
    return call(chunks, workspace)  # the caller's settings are unknown to other threads


def _sum_rows(chunks: Iterable[Rows], _workspace: Array) -> tuple[Any, Any]:
    """Return the weighted sums of rows, and the largest absolute value of each feature."""
    total: Any = 0.0
    peak: Any = 0.0
    for x, _, weights in chunks:
        total = total + (x.T @ weights).astype(np.float64)
        if scipy.sparse.issparse(x):
            peak = np.maximum(peak, np.abs(x).max(axis=0).toarray().ravel())
        else:
            peak = np.maximum(peak, np.maximum(x.max(axis=0), -x.min(axis=0)))
    return total, peak.astype(np.float64)


def _sum_squares(means: Floats, unit: Floats, full: bool, chunks: Iterable[Rows], _workspace: Array) -> Any:
    """Return the weighted sums of squared deviations from the means, of each feature or every two, in their units."""

    def part(x: Any, weight: Any, mean: Floats) -> Any:
        if scipy.sparse.issparse(x):
            return _sum_sparse_squares(x, weight, mean, unit)
        x = x - mean.astype(x.dtype)
        x *= unit.astype(x.dtype)
        scaled = x * weight[:, None]
        product = x.T @ scaled if full else np.einsum("ij,ij->j", x, scaled)
        return product.astype(np.float64, copy=False)

    total: Any = 0.0
    for chunk in chunks:
        weights: Any = chunk.weight
        total = total + np.stack([part(chunk.X, w, m) for w, m in zip(weights.T, means.T, strict=True)])
    return total


def _sum_sparse_squares(x: Any, weight: Array, mean: Floats, unit: Floats) -> Any:
    """Return the same of CSR, where the entries that are not stored deviate by the mean."""
    weights = np.repeat(weight.astype(np.float64), np.diff(x.indptr))
    deviations = (x.data - mean[x.indices]) * unit[x.indices]
    stored = np.bincount(x.indices, weights, len(mean))
    squares = np.bincount(x.indices, weights * deviations**2, len(mean))
    missing = np.maximum(weight.sum(dtype=np.float64) - stored, 0)
    return squares + missing * (mean * unit) ** 2
