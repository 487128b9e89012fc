"""Replacements for scikit-learn's multinomial logistic regression and for its loss: a script changes one import.

Needs scikit-learn and SciPy, which nothing else in this package imports.

Design
------
1. The objective is exactly scikit-learn's, in the form in which its solvers minimise it: the weighted mean of the
   losses, plus ||coef||^2 / (2 C) divided by the sum of the weights. `tol` has the same meaning in both.
2. Class weights multiply the sample weights, as in scikit-learn, also under label smoothing, where the option `weight`
   of fastce would weight the smoothed classes.
3. Parameters of scikit-learn that allow one value only are accepted too, so that a script changes nothing but the
   import. They are not deprecated here, so they do not warn where scikit-learn's do.
"""

import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    from sklearn.base import BaseEstimator
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model._base import LinearClassifierMixin, SparseCoefMixin
    from sklearn.utils import check_random_state, check_scalar, compute_class_weight
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, validate_data
except ImportError as error:
    raise type(error)(
        f"fastce.sklearn needs scikit-learn 1.6 or later, got: {error}. Install it with pip install 'fastce[sklearn]'",
        name=error.name,
        path=error.path,
    ) from error

import fastce
from fastce import _sklearn_solvers as solvers
from fastce._sklearn_loss import HalfMultinomialLoss
from fastce._sklearn_objective import Layer, Objective, Rows

__all__ = ["HalfMultinomialLoss", "LogisticRegression"]

_SOLVERS = (*solvers.METHODS, "sgd")
# Parameters of scikit-learn that allow one value here: the rule, the allowed values, and a solver for the others.
_ONLY: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "penalty": ("'l2' or None", ("l2", None, "deprecated"), "saga"),
    "l1_ratio": ("0 or None", (0, None), "saga"),
    "dual": ("False", (False,), "liblinear"),
}
# What to do instead of scikit-learn's other solvers.
_PEER = "sklearn.linear_model.LogisticRegression"
_INSTEAD = {
    "newton-cholesky": "'newton-cg' finds the same minimum",
    "sag": "'lbfgs' finds the same minimum, and 'sgd' is for very many rows",
    "saga": "'lbfgs' finds the same minimum, and 'sgd' is for very many rows",
    "liblinear": f"'lbfgs' does what it does but for penalising the intercept, which {_PEER} has",
}


class LogisticRegression(LinearClassifierMixin, SparseCoefMixin, BaseEstimator):  # type: ignore[misc]
    """Multinomial logistic regression, a replacement for ``sklearn.linear_model.LogisticRegression``.

    Parameters
    ----------
    penalty : {"l2", None}, default "l2"
        ``None`` means no penalty, whatever `C` is. "deprecated", scikit-learn's default since 1.8, means "l2".
    C : float, default 1.0
        Inverse of the strength of the penalty, positive. ``np.inf`` means no penalty.
    l1_ratio : {0, None}, default 0.0
        The share of the L1 norm in the penalty, which has none.
    dual : False
        The problem is solved in its primal form.
    tol : float, default 1e-4
        With "lbfgs" and "newton-cg", `fit` stops when no entry of the gradient exceeds `tol` and the next step promises
        to lower the objective by no more than `tol`. It warns if rounding errors stop it earlier. With "sgd", `fit`
        stops when the objective has fallen by less than `tol` within 5 passes.
    fit_intercept : bool, default True
        Whether there are intercepts; they are not penalised.
    intercept_scaling : float, default 1.0
        Positive. Without effect, as in scikit-learn where intercepts are not penalised.
    class_weight : dict or "balanced", optional
        Factors of the sample weights by class label, 1 for labels without one; "balanced" gives all classes the same
        total weight.
    random_state : int, RandomState instance or None, default None
        Determines the order of the rows in "sgd".
    solver : {"lbfgs", "newton-cg", "sgd"}, default "lbfgs"
        How the objective is minimised: see Notes.
    max_iter : int, default 100
        Maximum number of iterations; with "sgd", of passes through the rows.
    verbose : int, default 0
        If positive, print objective and largest gradient after each iteration.
    warm_start : bool, default False
        Whether `fit` starts from the coefficients of the previous call.
    n_jobs : int, optional
        Without effect, as in scikit-learn since 1.8: see `n_threads`.
    label_smoothing : float in [0, 1], default 0.0
        Share of the uniform distribution in the target.
    n_threads : int, optional
        Maximum number of threads that share the rows. ``None`` means as many as the kernels use.

    Attributes
    ----------
    coef_ : ndarray, shape (n_classes, n_features), or (1, n_features) for two classes
        Coefficients, float32 if the features are, else float64.
    intercept_ : ndarray, shape (n_classes,) or (1,)
        Intercepts; zeros if there are none.
    classes_ : ndarray, shape (n_classes,)
        The labels.
    n_iter_ : ndarray of int32, shape (1,)
        Iterations done.
    n_features_in_ : int
        The number of features.
    feature_names_in_ : ndarray of str, shape (n_features,)
        Their names, if all have one.

    Raises
    ------
    ValueError, TypeError
        From `fit` and `partial_fit`, for parameters or data out of range, and for fewer than two classes. The message
        for an unsupported parameter or solver of scikit-learn names an alternative.

    See Also
    --------
    fastce.cross_entropy : The loss, without the penalty.

    Notes
    -----
    With weights a_i, their sum A, and l_i the cross-entropy of row i (see `fastce.cross_entropy`), the objective is

        (1 / A) sum_i a_i l_i(X coef_^T + intercept_) + ||coef_||^2 / (2 C A),

    as in scikit-learn 1.9; for two classes with the logits 0 and ``X @ coef_[0] + intercept_``. Minima that differ by a
    shift common to all classes are equivalent; the one with mean 0 over the classes is returned. Weights may be
    negative, as in scikit-learn, if their sum is positive; the objective need not have a minimum then.

    "lbfgs" and "newton-cg" precondition the problem [1]_, so that correlated or unscaled features cost few iterations.
    Both are exact. "lbfgs" is usually faster, "newton-cg" is for high accuracy. "sgd" is for very many rows, and is
    what `partial_fit` does: mini-batches of 128 rows, Adam [2]_, and an average over its steps. Its objective ends some
    thousandths above the minimum. It scales the features by statistics of the first rows.

    While `fit` runs, BLAS is limited to one thread in the whole process, until the last of overlapping calls ends.

    References
    ----------
    .. [1] D. Böhning, "Multinomial logistic regression algorithm", Annals of the Institute of Statistical Mathematics
       44, 1992.
    .. [2] D. P. Kingma and J. Ba, "Adam: a method for stochastic optimization", ICLR 2015.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.sklearn import LogisticRegression
    >>> X = np.array([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])
    >>> model = LogisticRegression(label_smoothing=0.1).fit(X, ["a", "a", "b", "b", "c", "c"])
    >>> print(model.predict([[0.5], [2.5], [4.5]]))
    ['a' 'b' 'c']
    >>> print(model.predict_proba([[2.5]]).round(2))
    [[0.26 0.47 0.26]]
    """

    def __init__(
        self,
        penalty: str | None = "l2",
        *,
        C: float = 1.0,
        l1_ratio: float | None = 0.0,
        dual: bool = False,
        tol: float = 1e-4,
        fit_intercept: bool = True,
        intercept_scaling: float = 1.0,
        class_weight: dict[Any, float] | str | None = None,
        random_state: int | np.random.RandomState | None = None,
        solver: str = "lbfgs",
        max_iter: int = 100,
        verbose: int = 0,
        warm_start: bool = False,
        n_jobs: int | None = None,
        label_smoothing: float = 0.0,
        n_threads: int | None = None,
    ) -> None:
        self.penalty = penalty
        self.C = C
        self.l1_ratio = l1_ratio
        self.dual = dual
        self.tol = tol
        self.fit_intercept = fit_intercept
        self.intercept_scaling = intercept_scaling
        self.class_weight = class_weight
        self.random_state = random_state
        self.solver = solver
        self.max_iter = max_iter
        self.verbose = verbose
        self.warm_start = warm_start
        self.n_jobs = n_jobs
        self.label_smoothing = label_smoothing
        self.n_threads = n_threads

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's tags."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> "LogisticRegression":
        """Fit the model.

        Parameters
        ----------
        X : array_like or sparse, shape (n_samples, n_features)
            Features. float32 is kept, other dtypes are converted to float64, sparse matrices to CSR.
        y : array_like, shape (n_samples,)
            Class labels.
        sample_weight : array_like, shape (n_samples,), optional
            One factor per row, finite. Their sum, times the class weights, must be positive.

        Returns
        -------
        self : LogisticRegression
            The estimator.

        Warns
        -----
        ConvergenceWarning
            If `max_iter` iterations were not enough, or rounding errors ended the search early.
        """
        self._check_parameters()
        X, y = self._check_rows(X, y, reset=True)
        classes, target = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"y must have at least 2 classes, but the data contains one class: {classes.tolist()[0]!r}"
            )
        theta = self._start(X, classes, is_warm=self.warm_start)
        self.classes_ = classes
        objective = self._objective(X, target, sample_weight)
        self._adam, self._weight_seen = None, objective.total_weight  # for partial_fit
        with _quietly(), objective:
            if self.solver == "sgd":
                self._adam = solvers.Adam(objective, theta)
                rng = check_random_state(self.random_state)
                outcome = solvers.descend(objective, self._adam, self.tol, self.max_iter, rng, self._report)
            else:
                outcome = solvers.minimize(objective, theta, self.solver, self.tol, self.max_iter, self._report)
        if outcome.complaint:
            weight = objective.rows.weight
            has_signs = weight is not None and weight.min() < 0
            warnings.warn(
                f"{self.solver} did not converge in {outcome.n_iter} iterations: {outcome.complaint}"
                f"{'. With negative weights there may be no minimum' if has_signs else ''}",
                ConvergenceWarning,
                stacklevel=2,
            )
        self._finish(outcome.theta, outcome.n_iter, X.dtype)
        return self

    def partial_fit(
        self,
        X: Any,
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> "LogisticRegression":
        """Train on one batch of rows by the steps of "sgd", whatever `solver` is.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`.
        classes : array_like, shape (n_classes,), optional
            All labels that any batch may have. Required by the first call.

        Returns
        -------
        self : LogisticRegression
            The estimator.

        Notes
        -----
        The penalty is ||coef_||^2 / (2 C A) with A the total weight of all rows seen so far, so after one pass it is
        that of `fit`.
        """
        self._check_parameters()
        if isinstance(self.class_weight, str):
            raise ValueError(
                "class_weight must be a dict or None for partial_fit, which knows no other batches, "
                f"got {self.class_weight!r}"
            )
        first = not hasattr(self, "classes_")
        if first and classes is None:
            raise ValueError("classes must be given to the first call of partial_fit, got None")
        X, y = self._check_rows(X, y, reset=first)
        if classes is not None:
            labels = np.unique(np.asarray(classes))
            if len(labels) < 2:
                raise ValueError(f"classes must have at least 2 labels, got {labels}")
            if not first and not np.array_equal(labels, self.classes_):
                raise ValueError(f"classes must be those of the first call, {self.classes_}, got {labels}")
            self.classes_ = self.classes_ if not first else labels
        unknown = ~np.isin(y, self.classes_)
        if unknown.any():
            raise ValueError(f"y must have labels of classes, {self.classes_}, got {y[unknown].tolist()[0]!r}")
        target = np.searchsorted(self.classes_, y)
        objective = self._objective(X, target, sample_weight)
        with _quietly(), objective:
            adam: solvers.Adam | None = getattr(self, "_adam", None)
            if adam is None:
                self._adam = adam = solvers.Adam(objective, self._start(X, self.classes_, is_warm=True))
            else:
                _own_arrays(adam)
            self._weight_seen = getattr(self, "_weight_seen", 0.0) + objective.total_weight
            adam.run(objective, 1 / (objective.C * self._weight_seen), check_random_state(self.random_state))
        self._finish(adam.theta, 1, X.dtype)
        return self

    def decision_function(self, X: Any) -> NDArray[Any]:
        """Return the logits; for two classes those of the second class relative to the first.

        Parameters
        ----------
        X : array_like or sparse, shape (n_samples, n_features)
            Features.

        Returns
        -------
        logits : ndarray, shape (n_samples, n_classes) or (n_samples,)
            In the order of `classes_`.
        """
        with np.errstate(under="ignore"):  # products of small numbers
            return super().decision_function(X)  # type: ignore[no-any-return]

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Return the classes' probabilities.

        Parameters
        ----------
        X : array_like or sparse, shape (n_samples, n_features)
            Features.

        Returns
        -------
        proba : ndarray, shape (n_samples, n_classes)
            In the order of `classes_`.
        """
        return fastce.softmax(self._logits(X), n_threads=self.n_threads)

    def predict_log_proba(self, X: Any) -> NDArray[Any]:
        """Return the logarithms of the classes' probabilities, accurate even where these round to 0 or 1.

        Parameters
        ----------
        X : array_like or sparse, shape (n_samples, n_features)
            Features.

        Returns
        -------
        log_proba : ndarray, shape (n_samples, n_classes)
            In the order of `classes_`.
        """
        return fastce.log_softmax(self._logits(X), n_threads=self.n_threads)

    def _logits(self, X: Any) -> NDArray[Any]:
        logits: NDArray[Any] = self.decision_function(X)
        return logits if logits.ndim == 2 else np.stack([np.zeros_like(logits), logits], axis=1)

    def _check_parameters(self) -> None:
        for name, (rule, allowed, solver) in _ONLY.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be {rule}, got {value!r}: for others use {_PEER} with solver={solver!r}")
        if self.n_jobs is not None:
            check_scalar(self.n_jobs, "n_jobs", Integral)
        for name, kind in {"C": Real, "tol": Real, "intercept_scaling": Real, "max_iter": Integral}.items():
            check_scalar(getattr(self, name), name, kind)
        for name in ("C", "intercept_scaling"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("tol", "max_iter"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        if self.solver not in _SOLVERS:
            hint = f": {_INSTEAD[self.solver]}" if str(self.solver) in _INSTEAD else ""
            raise ValueError(f"solver must be one of {', '.join(map(repr, _SOLVERS))}, got {self.solver!r}{hint}")
        if not (self.class_weight is None or isinstance(self.class_weight, dict) or self.class_weight == "balanced"):
            raise ValueError(f"class_weight must be None, a dict or 'balanced', got {self.class_weight!r}")
        # These two are checked by those who own them.
        fastce.CrossEntropyLoss(label_smoothing=self.label_smoothing, n_threads=self.n_threads)

    def _inverse_strength(self) -> float:
        """Return the inverse of the penalty's strength."""
        if self.penalty is not None:
            return float(self.C)
        if self.C not in (1, np.inf):
            warnings.warn(f"penalty=None has no use for C, got C={self.C!r}: leave it out", stacklevel=4)
        return float("inf")

    def _check_rows(self, X: Any, y: ArrayLike, reset: bool) -> tuple[Any, NDArray[Any]]:
        X, labels = validate_data(
            self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], order="C", reset=reset
        )
        check_classification_targets(labels)
        return X, labels

    def _weigh(self, X: Any, target: NDArray[np.intp], sample_weight: ArrayLike | None) -> NDArray[Any] | None:
        """Return the rows' weights, or None if all are 1."""
        if sample_weight is None and self.class_weight is None:
            return None
        n_classes = len(self.classes_)
        with np.errstate(under="ignore"):  # weights too small for the features' dtype are 0 in it
            weight = _check_sample_weight(sample_weight, X, dtype=X.dtype, copy=True)
            if self.class_weight == "balanced":
                counts = np.bincount(target, weight, n_classes)
                weight *= np.divide(counts.sum() / n_classes, counts, out=np.zeros(n_classes), where=counts != 0)[
                    target
                ]
            elif self.class_weight is not None:
                factors = compute_class_weight(self.class_weight, classes=self.classes_, y=self.classes_[target])
                weight *= factors[target]
            total = weight.sum(dtype=np.float64)
        if not total > 0:
            raise ValueError(f"sample_weight, times class_weight, must have a positive sum, got {total}")
        return weight  # type: ignore[no-any-return]

    def _objective(self, X: Any, target: NDArray[np.intp], sample_weight: ArrayLike | None) -> Objective:
        layer = Layer(len(self.classes_), float(self.label_smoothing), bool(self.fit_intercept))
        rows = Rows(X, target, self._weigh(X, target, sample_weight))
        return Objective(layer, rows, self._inverse_strength(), self.n_threads)

    def _start(self, X: Any, classes: NDArray[Any], is_warm: bool) -> NDArray[np.float64]:
        """Return the parameters to start from: 0, or the coefficients if there are any."""
        shape = (1 if len(classes) == 2 else len(classes), X.shape[1])
        if not (is_warm and hasattr(self, "coef_")):
            return np.zeros((shape[1] + 1, shape[0]))
        if self.coef_.shape != shape:
            raise ValueError(f"coef_ must have shape {shape} to start from, got {self.coef_.shape}")
        coef = self.coef_.toarray() if hasattr(self.coef_, "toarray") else self.coef_
        intercept = self.intercept_ if self.fit_intercept else np.zeros(shape[0])
        return np.vstack([coef.T, intercept]).astype(np.float64)

    def _finish(self, theta: NDArray[np.float64], n_iter: int, dtype: Any) -> None:
        """Set the attributes."""
        with np.errstate(under="ignore"):  # what is too small for the features' dtype is 0 in it
            theta = solvers.center(theta)  # which shifts all logits of a row alike
            self.coef_ = np.ascontiguousarray(theta[:-1].T, dtype=dtype)
            self.intercept_ = theta[-1].astype(dtype)
        self.n_iter_ = np.array([n_iter], np.int32)

    def _report(self, value: float, steepest: float) -> None:
        if self.verbose:
            print(f"{self.solver}: objective {value:.8f}, largest gradient {steepest:.2e}")


def _quietly() -> np.errstate:
    """Ignore underflow, which is harmless, and overflow, which happens if there is no minimum."""
    return np.errstate(over="ignore", under="ignore", invalid="ignore")


def _own_arrays(state: object) -> None:
    """Copy the read-only arrays of an object: joblib's `mmap_mode` loads models with memory-mapped arrays."""
    for name, value in vars(state).items():
        if isinstance(value, np.ndarray) and not value.flags.writeable:
            setattr(state, name, np.array(value))
