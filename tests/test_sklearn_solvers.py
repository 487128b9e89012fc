"""The solvers under fastce.sklearn: they end where `tol` says, or say why not, and leave the process as it was.

The truth is the objective in float64 by SciPy's logsumexp, and scikit-learn's minima. An objective near 1 is rounded to
some 1e-16, its gradient to that times the largest feature.
"""

import os
import threading
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")
pytest.importorskip("scipy")

import scipy.sparse
import sklearn.linear_model
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_info, threadpool_limits

from fastce import _sklearn_solvers as solvers
from fastce._sklearn_objective import Layer, Objective, Rows
from fastce.sklearn import LogisticRegression

EXACT = ("lbfgs", "newton-cg")


def evaluate(model, X, y):
    """Return the objective of a model of three or more classes, and the largest entry of its gradient."""
    X, coef = X.astype(np.float64), model.coef_.astype(np.float64)
    logits = X @ coef.T + model.intercept_
    lse = logsumexp(logits, axis=1)
    rows, total = np.arange(len(y)), model.C * len(y)
    value = (lse - logits[rows, y]).mean() + (coef**2).sum() / (2 * total)
    residual = np.exp(logits - lse[:, None])
    residual[rows, y] -= 1
    grad = np.vstack([X.T @ residual / len(y) + coef.T / total, residual.mean(axis=0)])
    return value, np.abs(grad).max()


def make_imbalanced(rng, n_rows=1000):
    """Return five classes, of 90 to half a per cent."""
    y = rng.choice(5, n_rows, p=[0.9, 0.06, 0.02, 0.015, 0.005])
    y[:5] = np.arange(5)
    return rng.standard_normal((n_rows, 8)) + rng.standard_normal((5, 8))[y], y


def make_scales(rng, dtype):
    """Return features on scales from 1e-3 to 1e4."""
    X = rng.standard_normal((1000, 8))
    y = (X @ rng.standard_normal((8, 3)) / 2 + rng.gumbel(size=(1000, 3))).argmax(axis=1)
    return (X * np.logspace(-3, 4, 8)).astype(dtype), y


def make_words(rng, n_rows=400, n_words=1500, n_classes=5):
    """Return documents in the manner of tf-idf: few of many words, of length 1, more words than documents."""
    common = 1 / np.arange(1, n_words + 1)
    topics = np.array([rng.permutation(common) for _ in range(n_classes)])
    y = rng.integers(0, n_classes, n_rows)
    p = 0.7 * common + 0.3 * topics[y]
    counts = np.array([rng.multinomial(60, row / row.sum()) for row in p])
    X = np.log1p(counts) * np.log(n_rows / (1 + (counts > 0).sum(axis=0)))
    return scipy.sparse.csr_array(X / np.linalg.norm(X, axis=1, keepdims=True)), y


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("solver", EXACT)
def test_the_gradient_ends_below_a_tight_tol(rng, solver):
    """Rare classes made other solvers stop where the objective's rounding hid its fall; 1e-12 is the gradient's."""
    X, y = make_imbalanced(rng)
    model = LogisticRegression(solver=solver, tol=1e-8).fit(X, y)
    assert evaluate(model, X, y)[1] <= 1e-8 + 1e-12


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_of_many_scales_end_at_the_minimum(rng, solver, dtype):
    """At scikit-learn's minimum by Newton's method; float32 is within some units of its rounding."""
    X, y = make_scales(rng, dtype)
    model = LogisticRegression(solver=solver, tol=1e-2 if dtype == np.float32 else 1e-8).fit(X, y)
    wide = X.astype(np.float64)
    peer = sklearn.linear_model.LogisticRegression(solver="newton-cholesky", tol=1e-12).fit(wide, y)
    rounding = 16 * np.finfo(dtype).eps
    assert evaluate(model, X, y)[0] <= evaluate(peer, X, y)[0] * (1 + rounding)


@pytest.mark.parametrize("solver", EXACT)
def test_what_rounding_forbids_is_told(rng, solver):
    X, y = make_imbalanced(rng, 200)
    with pytest.warns(
        ConvergenceWarning, match=r"largest gradient .*tol 0.00e\+00. Rounding in float64 allows no more"
    ):
        model = LogisticRegression(solver=solver, tol=0, max_iter=1000).fit(X, y)
    assert evaluate(model, X, y)[1] < 1e-10  # and it went on until then


@pytest.mark.parametrize("solver", [*EXACT, "sgd"])
def test_no_iterations_leave_the_start(rng, solver):
    X, y = make_imbalanced(rng, 200)
    with pytest.warns(ConvergenceWarning, match="in 0 iterations.*increase max_iter=0"):
        model = LogisticRegression(solver=solver, max_iter=0).fit(X, y)
    assert model.n_iter_[0] == 0
    assert not model.coef_.any()
    assert not model.intercept_.any()


@pytest.mark.parametrize("solver", EXACT)
def test_every_end_by_max_iter_names_it(rng, solver):
    """Also where the coordinates have just been changed: classes that are far apart change them at once."""
    y = rng.integers(0, 4, 100)
    X = rng.standard_normal((100, 4)) + 20 * np.eye(4)[y]
    for max_iter in range(1, 6):
        with pytest.warns(ConvergenceWarning, match=f"increase max_iter={max_iter}$"):
            LogisticRegression(solver=solver, C=100.0, tol=1e-12, max_iter=max_iter).fit(X, y)


@pytest.mark.parametrize("C", [1e3, 1e5])
def test_words_end_no_higher_than_scikit_learns(rng, C):
    """Small entries make small gradients: `tol` alone is met far above the minimum."""
    X, y = make_words(rng)
    peer = sklearn.linear_model.LogisticRegression(C=C, max_iter=1000).fit(X, y)
    for solver in EXACT:
        model = LogisticRegression(C=C, solver=solver, max_iter=1000).fit(X, y)
        assert evaluate(model, X, y)[0] <= evaluate(peer, X, y)[0]


def test_strict_floating_point_errors_find_nothing():
    X, y = load_digits(return_X_y=True)
    with np.errstate(all="raise"):
        LogisticRegression(C=1e4, max_iter=1000).fit(X, y)


def make_objective():
    rng = np.random.default_rng(0)
    rows = Rows(rng.standard_normal((30, 3)), np.arange(30) % 3, None)
    return Objective(Layer(3, 0.0, True), rows, 1.0, 1)


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_objectives_that_overlap_give_blas_its_threads_back():
    """In both orders, and after an exception."""
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        for order in ((0, 1), (1, 0)):
            pair = make_objective(), make_objective()
            for objective in pair:
                objective.__enter__()
            assert set(blas_threads()) <= {1}
            pair[order[0]].__exit__(None, None, None)
            assert set(blas_threads()) <= {1}
            pair[order[1]].__exit__(None, None, None)
            assert blas_threads() == before
        with pytest.raises(RuntimeError, match="stop"), make_objective():
            raise RuntimeError("stop")
        assert blas_threads() == before


def test_what_others_set_meanwhile_stays():
    with threadpool_limits(2, user_api="blas"):
        with make_objective():
            threadpool_limits(3, user_api="blas")
            with make_objective():
                assert set(blas_threads()) <= {1}
        now = blas_threads()
    assert set(now) <= {3}


def test_fits_in_threads_give_blas_its_threads_back(rng):
    X, y = make_imbalanced(rng, 200)
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        threads = [threading.Thread(target=lambda: LogisticRegression().fit(X, y)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert blas_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")  # JAX's, if another test has imported it
def test_a_process_forked_meanwhile_gets_them_too():
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with make_objective():
            child = os.fork()
            if child == 0:
                os._exit(0 if blas_threads() == before else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert set(blas_threads()) <= {1}
        assert blas_threads() == before


@pytest.mark.parametrize("solver", EXACT)
def test_solvers_leave_the_warnings_filters_alone(solver, monkeypatch):
    """They are the process's: two threads that save and restore them restore each other's."""

    def refuse(*args, **kwargs):
        raise AssertionError("warnings.catch_warnings is not safe in threads")

    monkeypatch.setattr(warnings, "catch_warnings", refuse)
    with make_objective() as objective:
        outcome = solvers.minimize(objective, np.zeros((4, 3)), solver, 1e-6, 100, lambda *numbers: None)
    monkeypatch.undo()
    assert not outcome.complaint
