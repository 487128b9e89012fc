"""The integration: fastce.sklearn against scikit-learn, and against its own objective where that lacks an option.

Exact solvers stop where no entry of the gradient exceeds `tol`, so two of them differ by at most the sum of both
tolerances over the least curvature of the objective. The penalty alone makes that 1 / (C A), with A the sum of weights;
coefficients are compared within `apart`, which is made of these numbers. The intercepts' curvature comes from the data:
probabilities are compared for them. No `tol` asked for here is below TOL, for an objective near 1 is rounded to 1e-16,
and so does not tell gradients below the root of that from 0.
"""

import copy
import doctest
import functools
import inspect
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")
pytest.importorskip("scipy")

import joblib
import scipy.optimize
import scipy.sparse
import sklearn.datasets
import sklearn.linear_model
import threadpoolctl
from sklearn._loss.loss import HalfMultinomialLoss as SklearnLoss
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model._linear_loss import LinearModelLoss
from sklearn.utils.estimator_checks import estimator_checks_generator

import fastce.sklearn
from fastce import _reference, _sklearn_objective
from fastce.sklearn import HalfMultinomialLoss, LogisticRegression

EXACT = ("lbfgs", "newton-cg")
SOLVERS = (*EXACT, "sgd")
TOL = 2e-8
Exact = functools.partial(LogisticRegression, tol=TOL, max_iter=10_000)
Sklearn = functools.partial(sklearn.linear_model.LogisticRegression, solver="newton-cg", tol=TOL, max_iter=1000)


def make_data(rng, n_classes, n_rows=90, n_features=5, dtype=np.float64):
    """Return correlated features, not centred, and classes that overlap and differ in number."""
    y = rng.integers(0, n_classes, n_rows) * rng.integers(0, 2, n_rows)
    y[:n_classes] = np.arange(n_classes)
    X = rng.standard_normal((n_rows, n_features)) @ rng.standard_normal((n_features, n_features)) + 2
    X[:, 0] += y
    return X.astype(dtype), y


def apart(C, total_weight, n_parameters, tol=TOL):
    """Return how far two minima may be apart: see above. In norm, hence the root."""
    return 2 * tol * n_parameters**0.5 * C * total_weight


def assert_same_fit(model, peer, X, total_weight=None):
    """Hold a fit against another; of `X` dense features are needed, which all rows were made of."""
    total_weight = len(X) if total_weight is None else total_weight
    assert model.coef_.shape == peer.coef_.shape
    assert model.intercept_.shape == peer.intercept_.shape
    assert model.coef_.dtype == peer.coef_.dtype
    atol = apart(model.C, total_weight, model.coef_.size + model.intercept_.size)
    np.testing.assert_allclose(model.coef_, peer.coef_, rtol=0, atol=atol)
    np.testing.assert_allclose(model.predict_proba(X), peer.predict_proba(X), rtol=0, atol=atol * abs(X).max())
    np.testing.assert_array_equal(model.predict(X), peer.predict(X))


def objective_of(parameters, X, y, n_classes, C, sample_weight, label_smoothing):
    """Return the objective by the definition of the loss, and its gradient."""
    theta = parameters.reshape(n_classes, -1)
    logits = X @ theta[:, :-1].T + theta[:, -1]
    options = {"sample_weight": sample_weight, "label_smoothing": label_smoothing, "reduction": "sum"}
    result = _reference.cross_entropy(logits, y, **options)
    grad = np.hstack([result.grad.T @ X, result.grad.sum(axis=0)[:, None]])
    grad[:, :-1] += theta[:, :-1] / C
    total = sample_weight.sum()
    return (result.loss + (theta[:, :-1] ** 2).sum() / (2 * C)) / total, grad.ravel() / total


CHECKS = [
    pytest.param(*pair, id=f"{solver}-{getattr(pair[1], 'func', pair[1]).__name__}")
    for solver in SOLVERS
    for pair in estimator_checks_generator(LogisticRegression(solver=solver))
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # as scikit-learn's own tests have it
@pytest.mark.parametrize(("estimator", "check"), CHECKS)
def test_scikit_learn_finds_no_fault(estimator, check):
    check(estimator)


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"C": 0.01},
        {"C": 30.0},
        {"fit_intercept": False},
        {"class_weight": "balanced"},
        {"class_weight": {0: 3.0, 1: 0.5}, "fit_intercept": False},
    ],
    ids=str,
)
def test_fits_equal_those_of_scikit_learn(rng, n_classes, solver, options):
    X, y = make_data(rng, n_classes)
    for sample_weight in (None, rng.integers(0, 4, len(y)) * 0.5):
        if options == {"class_weight": "balanced"} and sample_weight is not None:
            # scikit-learn before 1.8 balances the numbers of rows; since then it does what is written out here.
            counts = np.bincount(y, sample_weight)
            peer = Sklearn().fit(X, y, sample_weight * (counts.sum() / n_classes / counts)[y])
        else:
            peer = Sklearn(**options).fit(X, y, sample_weight)
        model = Exact(solver=solver, **options).fit(X, y, sample_weight)
        assert_same_fit(model, peer, X, 6 * len(y))  # the largest weights are 2 of a sample and 3 of a class
        assert model.n_iter_.shape == peer.n_iter_.shape
        assert model.n_iter_.dtype == peer.n_iter_.dtype
        decision = model.decision_function(X)
        assert decision.shape == peer.decision_function(X).shape
        np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), model.predict_proba(X), rtol=1e-12)
        assert model.score(X, y, sample_weight) == peer.score(X, y, sample_weight)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_without_a_penalty(rng, n_classes):
    """The features' curvature is the data's then, of the order of 0.1: so is the tolerance's factor."""
    X, y = make_data(rng, n_classes, n_rows=300)
    y[::3] = rng.integers(0, n_classes, 100)  # no separating plane
    model, peer = Exact(C=np.inf).fit(X, y), Sklearn(C=np.inf).fit(X, y)
    np.testing.assert_allclose(model.coef_, peer.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.intercept_, peer.intercept_, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("solver", EXACT)
def test_label_smoothing_minimises_its_objective(rng, n_classes, solver):
    """The definition has a column for every class: for two, the penalty of the difference is half its square."""
    X, y = make_data(rng, n_classes)
    sample_weight = rng.uniform(0.5, 2, len(y))
    model = Exact(solver=solver, label_smoothing=0.2, C=2.0).fit(X, y, sample_weight)
    C = model.C if n_classes > 2 else model.C / 2
    arguments = X, y, n_classes, C, sample_weight, 0.2
    start = np.zeros(n_classes * (X.shape[1] + 1))
    expected = scipy.optimize.minimize(objective_of, start, args=arguments, jac=True, options={"gtol": 1e-8})
    theta = np.hstack([model.coef_, model.intercept_[:, None]])
    theta = theta if n_classes > 2 else np.vstack([-theta, theta]) / 2
    value, grad = objective_of(theta.ravel(), *arguments)
    assert value <= expected.fun * (1 + 1e-15 * len(y))
    assert np.abs(grad).max() <= TOL * np.abs(X).max()
    np.testing.assert_allclose(theta.ravel(), expected.x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_sparse_features_give_the_same(rng, n_classes, solver):
    X, y = make_data(rng, n_classes)
    X[rng.random(X.shape) < 0.6] = 0
    make = functools.partial(LogisticRegression, solver=solver, random_state=0, max_iter=1000)
    options = {"tol": TOL} if solver in EXACT else {}
    for options["fit_intercept"] in (True, False):
        sample_weight = rng.integers(0, 3, len(y))
        dense = make(**options).fit(X, y, sample_weight)
        for container in (scipy.sparse.csr_array, scipy.sparse.csc_matrix):
            sparse = make(**options).fit(container(X), y, sample_weight)
            if solver in EXACT:
                assert_same_fit(sparse, dense, X)
            else:  # other coordinates, hence other steps
                assert abs(log_loss(sparse, X, y) - log_loss(dense, X, y)) < 0.05
            np.testing.assert_allclose(sparse.predict_proba(container(X)), sparse.predict_proba(X), rtol=1e-12)
    coef = dense.coef_
    assert scipy.sparse.issparse(dense.sparsify().coef_)
    np.testing.assert_array_equal(dense.densify().coef_, coef)


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_is_kept(rng, solver):
    """And the objective is that of float64, within the tolerance's square over the least curvature."""
    X, y = make_data(rng, 3, dtype=np.float32)
    options = {"solver": solver, "random_state": 0, "tol": 1e-4, "max_iter": 1000}
    model, wide = (LogisticRegression(**options).fit(x, y) for x in (X, X.astype(np.float64)))
    assert wide.coef_.dtype == wide.intercept_.dtype == wide.predict_proba(X).dtype == np.float64
    for array in (model.coef_, model.intercept_, *(getattr(model, f"predict{p}_proba")(X) for p in ("", "_log"))):
        assert array.dtype == np.float32
    ones = np.ones(len(y))
    values = [
        objective_of(np.hstack([m.coef_, m.intercept_[:, None]]).astype(float).ravel(), X, y, 3, 1.0, ones, 0.0)[0]
        for m in (model, wide)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("solver", EXACT)
def test_chunks_and_threads_change_rounding_only(rng, solver, sparse, monkeypatch):
    X, y = make_data(rng, 3)
    sample_weight = rng.integers(0, 3, len(y))
    features = scipy.sparse.csr_array(X) if sparse else X
    whole = Exact(solver=solver).fit(features, y, sample_weight)
    monkeypatch.setattr(_sklearn_objective, "_CHUNK_ENTRIES", 60)
    monkeypatch.setattr(_sklearn_objective, "_LEAST_CHUNK_ROWS", 1)
    for n_threads in (1, 3, None):
        model = Exact(solver=solver, n_threads=n_threads).fit(features, y, sample_weight)
        assert_same_fit(model, whole, X, sample_weight.sum())
        again = Exact(solver=solver, n_threads=n_threads).fit(features, y, sample_weight)
        np.testing.assert_array_equal(model.coef_, again.coef_)


def test_features_of_any_scale_and_correlation_cost_few_iterations(rng):
    """Which is what the solvers' coordinates are for: scikit-learn's L-BFGS takes more than 1000."""
    X, y = make_data(rng, 3, n_rows=200)
    X = np.hstack([X, X[:, :1] + 1e-3 * rng.standard_normal((200, 1))]) * [1e3, 1.0, 1.0, 1e-2, 1.0, 1e3]
    for solver in EXACT:
        model = LogisticRegression(solver=solver, tol=1e-6).fit(X, y)
        assert model.n_iter_[0] <= 100
    assert_gradient(model, X, y, 1e-6)


def assert_gradient(model, X, y, tol):
    """Hold the fit against what `tol` promises, by the definition; TOL, of the features' size, is rounding's."""
    theta = np.hstack([model.coef_, model.intercept_[:, None]])
    grad = objective_of(theta.ravel(), X, y, len(model.classes_), model.C, np.ones(len(y)), 0.0)[1]
    assert np.abs(grad).max() <= tol + TOL * np.abs(X).max()


@pytest.mark.parametrize("solver", EXACT)
def test_confident_models_converge(rng, solver):
    """Where classes can be separated, the curvature falls by orders of magnitude on the way."""
    X, y = make_data(rng, 4, n_rows=200)
    X[:, :4] += 20 * np.eye(4)[y]
    model = LogisticRegression(solver=solver, C=100.0, tol=1e-7, max_iter=1000).fit(X, y)
    assert_gradient(model, X, y, 1e-7)
    assert model.score(X, y) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_warm_start_continues(rng, solver):
    X, y = make_data(rng, 3)
    model = LogisticRegression(solver=solver, warm_start=True, random_state=0, max_iter=1000).fit(X, y)
    first = model.n_iter_[0]
    coef = model.coef_.copy()
    model.fit(X, y)
    if solver in EXACT:
        assert first > 0 == model.n_iter_[0]
        np.testing.assert_allclose(model.coef_, coef, rtol=1e-12)
    else:
        assert model.n_iter_[0] < first
    model.sparsify().fit(X, y)
    with pytest.raises(ValueError, match=r"coef_ must have shape \(1, 5\) to start from, got \(3, 5\)"):
        model.fit(X, y > 0)


@pytest.mark.parametrize("labels", [["no", "yes"], ["a", "b", "c"], [-1, 1], [2.0, 3.0, 7.0]], ids=str)
def test_labels_of_any_kind(rng, labels):
    X, y = make_data(rng, len(labels))
    labels = np.array(labels)
    model, peer = Exact().fit(X, labels[y]), Sklearn().fit(X, labels[y])
    np.testing.assert_array_equal(model.classes_, labels)
    assert model.predict(X).dtype == labels.dtype
    assert_same_fit(model, peer, X)
    if len(labels) == 2:
        assert model.coef_.shape == (1, 5)
        assert model.decision_function(X).shape == (len(y),)
        np.testing.assert_array_equal(model.predict(X) == labels[1], model.decision_function(X) > 0)


def test_confident_log_probabilities_keep_their_digits():
    model = Exact(C=1e3).fit(np.array([[0.0], [1.0], [2.0], [3.0]]), [0, 0, 1, 1])
    far = np.array([[50.0]])
    z = model.decision_function(far)[0]
    assert z > 50  # the other class's probability is below the last digit of 1
    assert model.predict_log_proba(far)[0, 1] == pytest.approx(-np.exp(-z), rel=1e-12)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_sgd_comes_close_to_the_minimum(rng, n_classes):
    X, y = make_data(rng, n_classes, n_rows=2000)
    model = LogisticRegression(solver="sgd", random_state=0, max_iter=1000).fit(X, y)
    exact = LogisticRegression(max_iter=1000).fit(X, y)
    values = [log_loss(m, X, y) for m in (model, exact)]
    assert values[0] - values[1] < 0.01
    same = LogisticRegression(solver="sgd", random_state=0, max_iter=1000).fit(X, y)
    np.testing.assert_array_equal(same.coef_, model.coef_)


def log_loss(model, X, y):
    return -model.predict_log_proba(X)[np.arange(len(y)), np.searchsorted(model.classes_, y)].mean()


@pytest.mark.parametrize("n_classes", [2, 4])
def test_partial_fit_learns_from_batches(rng, n_classes):
    """Batches that lack classes, in single passes; a batch's sample weights of 0 leave rows out."""
    X, y = make_data(rng, n_classes, n_rows=20_000)
    order = np.argsort(y[:2000], kind="stable")  # the first batches have one class each
    X[:2000], y[:2000] = X[order], y[order]
    model = LogisticRegression(random_state=0, class_weight={0: 1.0})
    model.partial_fit(X[:200], y[:200], classes=np.arange(n_classes))
    np.testing.assert_array_equal(model.classes_, np.arange(n_classes))
    for start in range(200, len(y), 200):
        assert model.partial_fit(X[start : start + 200], y[start : start + 200]) is model
    exact = LogisticRegression(max_iter=1000).fit(X, y)
    ignorant = -np.log(np.bincount(y)[y] / len(y)).mean()
    assert log_loss(model, X, y) - log_loss(exact, X, y) < 0.2 * (ignorant - log_loss(exact, X, y))

    twins = [pickle.loads(pickle.dumps(model)) for _ in range(2)]
    kept = np.arange(100) % 2
    twins[0].partial_fit(X[:100], y[:100], sample_weight=kept)
    twins[1].partial_fit(X[:100][kept == 1], y[:100][kept == 1])
    np.testing.assert_allclose(twins[0].coef_, twins[1].coef_, rtol=1e-9)
    assert not np.array_equal(twins[0].coef_, model.coef_)


def test_partial_fit_continues_what_fit_began(rng):
    X, y = make_data(rng, 3, n_rows=500)
    model = LogisticRegression(max_iter=1000, random_state=0).fit(X, y)
    before = log_loss(model, X, y)
    model.partial_fit(X, y)
    assert abs(log_loss(model, X, y) - before) < 0.05


def test_partial_fit_refuses(rng):
    X, y = make_data(rng, 3)
    with pytest.raises(ValueError, match="classes must be given to the first call of partial_fit, got None"):
        LogisticRegression().partial_fit(X, y)
    with pytest.raises(ValueError, match="classes must have at least 2 labels"):
        LogisticRegression().partial_fit(X, y, classes=[1])
    with pytest.raises(ValueError, match=r"y must have labels of classes, \[0 1\], got .*2"):
        LogisticRegression().partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="class_weight must be a dict or None for partial_fit"):
        LogisticRegression(class_weight="balanced").partial_fit(X, y, classes=[0, 1, 2])
    model = LogisticRegression().partial_fit(X, y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="classes must be those of the first call"):
        model.partial_fit(X, y, classes=[0, 1, 2, 3])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"C": 0}, ValueError, "C must be positive, got 0"),
        ({"C": np.nan}, ValueError, "C must be positive, got nan"),
        ({"C": "1"}, TypeError, "C must be an instance of float"),
        ({"tol": -1}, ValueError, "tol must not be negative, got -1"),
        ({"max_iter": 1.5}, TypeError, "max_iter must be an instance of int"),
        (
            {"solver": "saga"},
            ValueError,
            "solver must be one of 'lbfgs', 'newton-cg', 'sgd', got 'saga': 'lbfgs' finds",
        ),
        (
            {"solver": "liblinear"},
            ValueError,
            "got 'liblinear': 'lbfgs' does what it does but for penalising the inter",
        ),
        ({"solver": ["lbfgs"]}, ValueError, r"solver must be one of .*, got \['lbfgs'\]$"),
        ({"penalty": "l1"}, ValueError, "penalty must be 'l2' or None, got 'l1': for others use sklearn.linear_model"),
        ({"penalty": "none"}, ValueError, "penalty must be 'l2' or None, got 'none'"),
        ({"l1_ratio": 0.5}, ValueError, "l1_ratio must be 0 or None, got 0.5: for others use .* with solver='saga'"),
        ({"dual": True}, ValueError, "dual must be False, got True: for others use .* with solver='liblinear'"),
        ({"n_jobs": "all"}, TypeError, "n_jobs must be an instance of int"),
        ({"intercept_scaling": 0}, ValueError, "intercept_scaling must be positive, got 0"),
        ({"class_weight": "even"}, ValueError, "class_weight must be None, a dict or 'balanced', got 'even'"),
        ({"label_smoothing": 2}, ValueError, r"label_smoothing must be in \[0, 1\], got 2"),
        ({"n_threads": 0}, ValueError, "n_threads must be None or at least 1, got 0"),
    ],
    ids=str,
)
def test_parameters_out_of_range(rng, options, error, message):
    X, y = make_data(rng, 3)
    with pytest.raises(error, match=message):
        LogisticRegression(**options).fit(X, y)


CLASSES = {"fit": {}, "partial_fit": {"classes": [0, 1, 2]}}


def test_data_that_cannot_be_fitted(rng):
    X, y = make_data(rng, 3)
    with pytest.raises(ValueError, match="y must have at least 2 classes, but the data contains one class: 1"):
        LogisticRegression().fit(X, np.ones(len(y), int))
    with pytest.raises(ValueError, match=r"[Ss]ample.weight"):  # scikit-learn's words, if it looks
        LogisticRegression().fit(X, y, np.zeros(len(y)))
    message = "sample_weight, times class_weight, must have a positive sum, got "
    with pytest.raises(ValueError, match=f"{message}0.0"):
        LogisticRegression(class_weight={0: 0, 1: 0, 2: 0}).fit(X, y)
    for method in ("fit", "partial_fit"):
        with pytest.raises(ValueError, match=f"{message}-{len(y)}.0"):
            getattr(LogisticRegression(), method)(X, y, sample_weight=-np.ones(len(y)), **CLASSES[method])
        with pytest.raises(ValueError, match=r"[Ss]ample.weight contains NaN"):
            getattr(LogisticRegression(), method)(X, y, sample_weight=np.full(len(y), np.nan), **CLASSES[method])
    with pytest.raises(NotFittedError):
        LogisticRegression().predict_proba(X)


@pytest.mark.parametrize("solver", SOLVERS)
def test_too_few_iterations_are_told(rng, solver, capsys):
    X, y = make_data(rng, 3)
    with pytest.warns(ConvergenceWarning, match=f"{solver} did not converge in 2 iterations.*increase max_iter=2"):
        LogisticRegression(solver=solver, max_iter=2, tol=1e-12, verbose=1).fit(X, y)
    assert capsys.readouterr().out.count("objective") == 2


def test_models_are_cloned_and_pickled(rng):
    X, y = make_data(rng, 3)
    model = LogisticRegression(label_smoothing=0.1, C=0.5, n_threads=1).fit(X, y)
    assert clone(model).get_params() == model.get_params()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), model.predict_proba(X))
    defaults = sklearn.linear_model.LogisticRegression().get_params()
    shared = LogisticRegression().get_params().keys() & defaults.keys()
    assert len(shared) == len(LogisticRegression().get_params()) - 2
    shared -= {"penalty", "l1_ratio"}  # whose defaults there changed with a deprecation
    assert all(LogisticRegression().get_params()[name] == defaults[name] for name in shared)


SAME_MEANING = [
    {"penalty": "l2"},
    {"penalty": "deprecated"},
    {"l1_ratio": 0},
    {"l1_ratio": None},
    {"dual": False},
    {"dual": np.False_},
    {"intercept_scaling": 7.5},
    {"n_jobs": -1},
    {"n_jobs": None},
]


@pytest.mark.parametrize("options", SAME_MEANING, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_parameters_with_but_one_meaning_are_accepted(rng, solver, options):
    X, y = make_data(rng, 3)
    plain = LogisticRegression(solver=solver, random_state=0, max_iter=1000)
    model = clone(plain).set_params(**options)
    assert {name: model.get_params()[name] for name in options} == options
    np.testing.assert_array_equal(clone(model).fit(X, y).coef_, plain.fit(X, y).coef_)
    model.partial_fit(X, y, classes=[0, 1, 2])


def test_all_parameters_of_scikit_learns_estimator_are_accepted(rng):
    X, y = make_data(rng, 3)
    peer = Sklearn(C=0.3).set_params(tol=TOL, solver="lbfgs", max_iter=10_000)
    params = {name: value for name, value in peer.get_params().items() if name != "multi_class"}  # gone since 1.8
    model = LogisticRegression(**params).fit(X, y)
    assert_same_fit(model, Sklearn(C=0.3).fit(X, y), X)
    assert LogisticRegression("l2", C=2.0).get_params()["penalty"] == "l2"  # by position, as the first there


def test_no_penalty(rng):
    X, y = make_data(rng, 3, n_rows=300)
    y[::3] = rng.integers(0, 3, 100)  # no separating plane
    model, peer = Exact(penalty=None).fit(X, y), Sklearn(C=np.inf).fit(X, y)
    np.testing.assert_allclose(model.coef_, peer.coef_, rtol=0, atol=1e-6)  # as in test_without_a_penalty
    with pytest.warns(UserWarning, match="penalty=None has no use for C, got C=0.1: leave it out"):
        same = Exact(penalty=None, C=0.1).fit(X, y)
    np.testing.assert_array_equal(same.coef_, model.coef_)
    batches = [
        LogisticRegression(random_state=0, **options).partial_fit(X, y, classes=[0, 1, 2])
        for options in ({"penalty": None}, {"C": np.inf}, {})
    ]
    np.testing.assert_array_equal(batches[0].coef_, batches[1].coef_)
    assert not np.array_equal(batches[0].coef_, batches[2].coef_)


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("solver", EXACT)
def test_weights_of_any_sign_are_those_of_scikit_learn(rng, n_classes, solver):
    """Few enough that the objective stays convex: where every row is there three times, and once with -1/2."""
    X, y = make_data(rng, n_classes)
    X, y = np.vstack([X, X]), np.hstack([y, y])
    sample_weight = np.repeat([1.5, -0.5], len(y) // 2)
    # With the same features and classes, what is left of each pair is one row.
    assert_same_fit(Exact(solver=solver).fit(X, y, sample_weight), Sklearn().fit(X[: len(y) // 2], y[: len(y) // 2]), X)
    sample_weight = np.where(rng.random(len(y)) < 0.1, -0.1, 1.0)
    model, peer = Exact(solver=solver).fit(X, y, sample_weight), Sklearn().fit(X, y, sample_weight)
    assert_same_fit(model, peer, X, sample_weight.sum())


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_a_minimum_a_warning_is_all(rng, solver):
    """A class whose weights sum to less than 0 has an unpenalised intercept that only falls."""
    X, y = make_data(rng, 3)
    sample_weight = np.where(y == 1, -0.5, 1.0)
    model = LogisticRegression(solver=solver, tol=1e-8, max_iter=20, random_state=0)
    with np.errstate(all="raise"), pytest.warns(ConvergenceWarning, match="With negative weights there may be no min"):
        model.fit(X, y, sample_weight)
    assert np.isfinite(model.coef_).all()
    assert solver == "sgd" or model.intercept_.argmin() == 1


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("solver", SOLVERS)
def test_models_that_are_read_only_go_on(rng, solver, tmp_path):
    """As joblib hands them out, and as it hands out large arguments."""
    X, y = (read_only(array) for array in make_data(rng, 3, n_rows=300))
    weight = read_only(rng.uniform(0.5, 2, 300))
    model = LogisticRegression(solver=solver, warm_start=True, random_state=0, max_iter=1000).fit(X, y, weight)
    model.partial_fit(X, y, sample_weight=weight)
    path = tmp_path / "model.joblib"
    joblib.dump(model, path)
    before = path.read_bytes()
    shared = joblib.load(path, mmap_mode="r")
    assert not shared.coef_.flags.writeable
    np.testing.assert_array_equal(shared.predict_proba(X), model.predict_proba(X))
    twins = [shared, copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))]
    model.partial_fit(X, y, sample_weight=weight)
    for twin in twins:
        twin.partial_fit(X, y, sample_weight=weight)
        np.testing.assert_array_equal(twin.coef_, model.coef_)
    for method, rows in (("fit", X), ("partial_fit", scipy.sparse.csr_array(X))):
        if method == "partial_fit":
            for part in (rows.data, rows.indices, rows.indptr):
                part.flags.writeable = False
        expected, again = (
            pickle.loads(pickle.dumps(model)),
            joblib.load(path, mmap_mode="r").partial_fit(X, y, None, weight),
        )
        np.testing.assert_array_equal(getattr(again, method)(rows, y).coef_, getattr(expected, method)(rows, y).coef_)
    assert path.read_bytes() == before


def test_small_numbers_do_not_raise_where_numpy_is_told_to_raise(rng):
    """They are meant to be 0: products in the logits, and numbers of float64 in float32."""
    for dtype in (np.float32, np.float64):
        X, y = make_data(rng, 3, dtype=dtype)
        tiny = np.float64(np.finfo(dtype).tiny)
        weight = np.where(np.arange(len(y)) < 5, tiny / 1e9, 1.0)
        model = LogisticRegression().fit(X, y)
        model.coef_ *= dtype(1e-20)
        with np.errstate(all="raise"):
            for name in ("predict", "predict_proba", "predict_log_proba", "decision_function"):
                getattr(model, name)(X * dtype(np.sqrt(tiny)) * dtype(1e-15))
            model._finish(np.full((6, 3), 1e-60) * rng.random((6, 3)), 1, np.dtype(dtype))
            LogisticRegression(class_weight="balanced").fit(X, y, weight)
            LogisticRegression(class_weight={0: 1e-30, 1: 1.0}).fit(X, y, weight)
            LogisticRegression().partial_fit(X, y, classes=[0, 1, 2], sample_weight=weight)


METHODS = {
    "loss": ("loss_out",),
    "loss_gradient": ("loss_out", "gradient_out"),
    "gradient": ("gradient_out",),
    "gradient_hessian": ("gradient_out", "hessian_out"),
    "gradient_proba": ("gradient_out", "proba_out"),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_methods_of_the_loss_equal_those_of_scikit_learn(rng, dtype, method, weighted):
    """Both round to float32 within some units of 1, the size of the largest gradient of weight 1."""
    raw = rng.standard_normal((40, 5)).astype(dtype) * 3
    y = rng.integers(0, 5, 40)
    options = {"sample_weight": rng.uniform(0, 2, 40).astype(dtype) if weighted else None}
    expected = getattr(SklearnLoss(n_classes=5), method)(y.astype(dtype), raw, **options)
    call = getattr(HalfMultinomialLoss(n_classes=5), method)
    expected = expected if isinstance(expected, tuple) else (expected,)
    atol = 64 * np.finfo(dtype).eps
    for target in (y, y.astype(dtype), y.astype(np.int32)):
        for layout in ("C", "F"):
            logits = np.asarray(raw, order=layout)
            for kind in (None, dtype, np.float64, np.float32):
                outs = {
                    name: None if kind is None else np.empty_like(result, kind)
                    for name, result in zip(METHODS[method], expected, strict=True)
                }
                results = call(target, logits, n_threads=2, **outs, **options)
                results = results if isinstance(results, tuple) else (results,)
                for got, wanted, out in zip(results, expected, outs.values(), strict=True):
                    assert out is None or got is out
                    assert got.dtype == (kind or dtype)
                    np.testing.assert_allclose(got, wanted, rtol=0, atol=max(atol, 64 * np.finfo(got.dtype).eps))
            np.testing.assert_array_equal(logits, raw)


def test_the_loss_checks_before_it_writes(rng):
    raw, y = rng.standard_normal((6, 3)), np.array([0, 1, 2, 0, 1, 2])
    loss = HalfMultinomialLoss(n_classes=3)
    strings, missing, half, far = y.astype(str), y.astype(float), y + 0.5, y - 100
    missing[4] = np.nan
    whole = r"y_true = np.unique\(y_true, return_inverse=True\)"
    columns = r"raw_prediction must have shape \(n_samples, n_classes\) with n_classes=3, got "
    for target, logits, weight, error, message in (
        (strings, raw, None, TypeError, f"y_true must be class indices 0, 1, ... of a numeric dtype.*{whole}"),
        (strings.astype(object), raw, None, TypeError, whole),
        (missing, raw, None, ValueError, "y_true must be whole numbers, got nan"),
        (half, raw, None, ValueError, "y_true must be whole numbers, got 0.5"),
        (y + 1, raw, None, IndexError, r"y_true\[2\] is 3, but there are 3 classes \(0..2\)"),
        (far, raw, None, IndexError, r"y_true\[0\] is -100, but there are 3"),  # the default of ignore_index
        (y[:5], raw, None, ValueError, r"must have shape \(6,\)"),
        (y, raw, np.ones(5), ValueError, r"sample_weight must have shape \(6,\), got \(5,\)"),
        (y, raw, np.full(6, np.inf), ValueError, "sample_weight must be finite"),
        (y, raw[:, :2], None, ValueError, rf"{columns}\(6, 2\)"),
        (y, raw[:, :1], None, ValueError, rf"{columns}\(6, 1\)"),
        (y, raw[:, 0], None, ValueError, rf"{columns}\(6,\)"),
    ):
        for method, outs in METHODS.items():
            places = {name: np.full(6 if name == "loss_out" else logits.shape, 7.0) for name in outs}
            with np.errstate(all="raise"), pytest.raises(error, match=message):
                getattr(loss, method)(target, logits, weight, **places)
            assert all((place == 7).all() for place in places.values())
    for method, outs in METHODS.items():
        for name in outs:
            shape = (6,) if name == "loss_out" else raw.shape
            for bad, message in (
                (np.full((1, *shape), 7.0), rf"{name} must have shape .*, got \(1, 6"),
                (np.full(shape, 7.0), f"{name} must be writable, got a read-only array"),
            ):
                bad.flags.writeable = bad.ndim > len(shape)
                places = {other: np.full(6 if other == "loss_out" else raw.shape, 7.0) for other in outs} | {name: bad}
                with pytest.raises(ValueError, match=message):
                    getattr(loss, method)(y, raw, **places)
                assert all((place == 7).all() for place in places.values())


def test_small_results_of_the_loss_do_not_raise_where_numpy_is_told_to_raise(rng):
    """Gradients of confident rows, in a place of float32; they are what NumPy makes of those in float64."""
    raw, y = 50 * rng.standard_normal((40, 5)), rng.integers(0, 5, 40)
    loss = HalfMultinomialLoss(n_classes=5)
    for method, outs in METHODS.items():
        expected = getattr(loss, method)(y, raw)
        places = {name: np.empty(40 if name == "loss_out" else raw.shape, np.float32) for name in outs}
        with np.errstate(all="raise"):
            results = getattr(loss, method)(y, raw, **places)
        for got, wanted in zip(results, expected, strict=True) if len(outs) > 1 else [(results, expected)]:
            with np.errstate(under="ignore"):
                np.testing.assert_array_equal(got, wanted.astype(np.float32))
    X, y = sklearn.datasets.load_digits(return_X_y=True)
    model = HistGradientBoostingClassifier(loss=HalfMultinomialLoss(n_classes=10), learning_rate=1.0, max_iter=20)
    with np.errstate(all="raise"), threadpoolctl.threadpool_limits(1):  # of whose threads each would wait for the rest
        model.fit(X, y).predict_proba(X)


def test_boosting_with_another_number_of_classes_is_told_what_to_use(rng):
    X, y = make_data(rng, 4, n_rows=60)
    for n_classes, labels, message in (
        (
            2,
            y > 0,
            "n_classes must be at least 3 in HistGradientBoostingClassifier, .* got 2: leave its loss='log_loss'",
        ),
        (3, y > 0, "n_classes must be 1 more than the last class in y_true, got 3: leave loss='log_loss'"),
        (3, y, r"n_classes must be 1 more .*, got 3: use HalfMultinomialLoss\(n_classes=4\)"),
        (9, y, r"n_classes must be 1 more .*, got 9: use HalfMultinomialLoss\(n_classes=4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            HistGradientBoostingClassifier(loss=HalfMultinomialLoss(n_classes=n_classes)).fit(X, labels)


def test_the_loss_takes_weights_of_any_sign(rng):
    raw, y = rng.standard_normal((40, 5)), rng.integers(0, 5, 40)
    weight = rng.standard_normal(40)
    for method in METHODS:
        got, wanted = (
            getattr(kind(n_classes=5), method)(y.astype(float), raw, weight)
            for kind in (HalfMultinomialLoss, SklearnLoss)
        )
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-14)


def test_the_loss_writes_over_raw_predictions(rng):
    raw, y = rng.standard_normal((40, 5)), rng.integers(0, 5, 40)
    loss = HalfMultinomialLoss(n_classes=5)
    for method in METHODS.keys() - {"loss"}:
        work = raw.copy()
        results = getattr(loss, method)(y, work, gradient_out=work)
        expected = getattr(loss, method)(y, raw)
        if method == "gradient":
            results, expected = (results,), (expected,)
        assert any(result is work for result in results)
        for got, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_the_rest_of_the_loss_is_scikit_learns(rng):
    raw, y = rng.standard_normal((40, 5)), rng.integers(0, 5, 40).astype(float)
    weight = rng.uniform(0, 2, 40)
    loss, peer = HalfMultinomialLoss(n_classes=5), SklearnLoss(n_classes=5)
    assert isinstance(loss, SklearnLoss)
    assert loss(y, raw, weight) == pytest.approx(peer(y, raw, weight), rel=1e-14)
    np.testing.assert_array_equal(loss.fit_intercept_only(y, weight), peer.fit_intercept_only(y, weight))
    np.testing.assert_allclose(loss.predict_proba(raw), peer.predict_proba(raw), rtol=1e-14)
    assert loss.in_y_true_range(y)
    assert not loss.in_y_true_range(y - 1)


def test_the_loss_serves_scikit_learns_models(rng):
    X, y = make_data(rng, 4, n_rows=400)
    base = HistGradientBoostingClassifier(max_iter=10, random_state=0)
    boosted = clone(base).set_params(loss=HalfMultinomialLoss(n_classes=4)).fit(X, y)
    np.testing.assert_allclose(boosted.predict_proba(X), base.fit(X, y).predict_proba(X), atol=1e-6)
    coef = rng.standard_normal((4, 6), np.float64).copy(order="F")
    arguments = coef, X, y.astype(float)
    models = [LinearModelLoss(loss(n_classes=4), fit_intercept=True) for loss in (HalfMultinomialLoss, SklearnLoss)]
    for method in ("loss_gradient", "gradient_hessian"):
        one, other = (getattr(model, method)(*arguments, l2_reg_strength=0.1) for model in models)
        for got, wanted in zip(one[:2], other[:2], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", fastce.sklearn.__all__)
def test_it_is_documented_with_an_example_that_runs(name):
    thing = getattr(fastce.sklearn, name)
    text = inspect.getdoc(thing)
    for section in ("Parameters", "Raises", "Notes", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in text
    for parameter in inspect.signature(thing).parameters:
        assert parameter in text
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(recurse=False).find(thing, name, globs={}):
        runner.run(example, out=report.append)
    assert runner.tries > 0
    assert runner.failures == 0, "".join(report)


def test_an_extra_that_is_missing_is_named():
    code = "import sys; sys.modules['sklearn'] = None; import fastce.sklearn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert re.search(
        r"\nModuleNotFoundError: fastce.sklearn needs scikit-learn 1.6 or later, got: .*sklearn.*pip install "
        r"'fastce\[sklearn\]'\n",
        done.stderr,
    )


def test_the_name_shadows_nothing():
    """Inside, `sklearn` is scikit-learn; and the package does without."""
    code = "import fastce, sys; assert 'sklearn' not in sys.modules and not hasattr(fastce, 'sklearn')"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
