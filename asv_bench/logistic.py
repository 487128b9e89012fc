"""Print how fastce.sklearn's LogisticRegression compares with scikit-learn's: python asv_bench/logistic.py.

First how far the coefficients of both are apart at a tight tolerance. Then the times to fit by L-BFGS, lower quartiles
of interleaved rounds, with the objectives that both end at, computed anew in float64. The classes are Gaussian clouds
around centres that are Gaussian as well, of a third of their width in every direction; to each feature a random mixture
of all is added, which correlates them. Both have the same tolerance and as many threads. Needs a quiet machine.
"""

import argparse
import functools
import warnings

import numpy as np
from scipy.special import logsumexp
from sklearn.datasets import load_digits, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as Sklearn

from fastce._benchmarks.timing import run_calls
from fastce.sklearn import LogisticRegression

SHAPES = ((100_000, 64, 10), (20_000, 64, 1000))


def make_clouds(n_rows, n_features, n_classes, dtype, mixed=True):
    """Return features and classes."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, n_classes, n_rows)
    centres = rng.standard_normal((n_classes, n_features)) / 3
    features = centres[target] + rng.standard_normal((n_rows, n_features))
    if mixed:
        features = features + features @ (rng.standard_normal((n_features, n_features)) / n_features**0.5)
    return features.astype(dtype), target


def objective(model, features, target):
    """Return what both minimise, in float64."""
    coef = model.coef_.astype(np.float64)
    logits = features.astype(np.float64) @ coef.T + model.intercept_
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(target)), target]
    return losses.mean() + (coef**2).sum() / (2 * model.C * len(target))


def compare_coefficients(tol):
    """Print how far coefficients are apart."""
    many = make_classification(20_000, 50, n_informative=20, n_classes=20, random_state=0)
    digits = load_digits(return_X_y=True)
    print(f"largest differences from scikit-learn's newton-cg, tol={tol:g}, float64")
    for name, (features, target) in {"digits": (digits[0] / 16, digits[1]), "20000 x 50, 20 classes": many}.items():
        peer = Sklearn(solver="newton-cg", tol=tol, max_iter=1000).fit(features, target)
        for solver in ("lbfgs", "newton-cg"):
            model = LogisticRegression(solver=solver, tol=tol, max_iter=10_000).fit(features, target)
            apart = (np.abs(getattr(model, a) - getattr(peer, a)).max() for a in ("coef_", "intercept_"))
            size = np.abs(peer.coef_).max()
            print(f"  {name}, {solver}: coef_ {next(apart):.1e} of up to {size:.2g}, intercept_ {next(apart):.1e}")


def compare_times(shape, dtype, mixed, rounds, tol):
    """Print times to fit."""
    features, target = make_clouds(*shape, dtype, mixed)
    models = {
        "scikit-learn": Sklearn(tol=tol, max_iter=1000),
        "fastce": LogisticRegression(tol=tol, max_iter=1000),
    }
    fits = {name: functools.partial(model.fit, features, target) for name, model in models.items()}
    seconds = run_calls(fits, rounds)
    print("{} x {}, {} classes, {}:".format(*shape, dtype.__name__))
    for name, model in models.items():
        found = f"{model.n_iter_[0]:3} iterations, objective {objective(model, features, target):.9f}"
        print(f"  {name:12} {seconds[name]:7.3f} s, {found}")
    print(f"  {seconds['scikit-learn'] / seconds['fastce']:.2f} times as fast", flush=True)


def main(arguments=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tol", type=float, default=1e-4)
    parser.add_argument("--classes", type=int, nargs="*", default=[10, 1000], help="time only these shapes")
    parser.add_argument("--unmixed", action="store_true", help="time with features that are not correlated")
    parser.add_argument("--skip-coefficients", action="store_true")
    options = parser.parse_args(arguments)
    warnings.simplefilter("error", ConvergenceWarning)
    if not options.skip_coefficients:
        compare_coefficients(1e-9)
    for shape in (shape for shape in SHAPES if shape[2] in options.classes):
        for dtype in (np.float32, np.float64):
            compare_times(shape, dtype, not options.unmixed, options.rounds, options.tol)


if __name__ == "__main__":
    main()
