"""Print what a round of boosting takes by fastce's objectives and by the built-in ones: python asv_bench/boosting.py.

Of each library that is installed, XGBoost and LightGBM, one model learns by its own objective, one by fastce's, one by
plain NumPy; they take turns round by round, and lower quartiles count. Also printed: what of a round is the objective,
and how far the margins are from those of the built-in objective. Needs scikit-learn and a quiet machine.
"""

import argparse
import importlib

import numpy as np
from sklearn.datasets import load_digits

import fastce
from fastce._benchmarks.timing import clock, lower_quartile, run_rounds
from fastce.boosting import lightgbm_objective, xgboost_objective

SEED = 0


def make_numpy_objective(bound):
    """Return the objective that one would write, with `bound` p (1 - p) as its second derivative."""

    def objective(preds, data):
        p = np.exp(preds - preds.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        hess = np.maximum(bound * p * (1 - p), 1e-16)
        p[np.arange(len(p)), data.get_label().astype(np.int64)] -= 1
        return p, hess

    return objective


class Timed:
    """An objective that keeps how long its calls took."""

    def __init__(self, objective):
        self.objective = objective
        self.seconds = []

    def __call__(self, preds, data):
        seconds, result = clock(lambda: self.objective(preds, data))
        self.seconds.append(seconds)
        return result


def start_xgboost(library, features, target, n_classes, n_threads):
    """Return a function that starts a model: it returns one for a round, and one for margins."""
    data = library.DMatrix(features, label=target)
    params = {"objective": "multi:softprob", "num_class": n_classes, "base_score": 0.5, "nthread": n_threads}

    def start(objective):
        booster = library.Booster(params, [data])
        rounds = iter(range(10**9))
        return (
            lambda: booster.update(data, next(rounds), fobj=objective),
            lambda: booster.predict(data, output_margin=True),
        )

    return start


def start_lightgbm(library, features, target, n_classes, n_threads):
    """Return the same for LightGBM."""
    params = {"num_class": n_classes, "boost_from_average": False, "num_threads": n_threads, "verbose": -1}
    data = library.Dataset(features, target, params={"verbose": -1, "num_threads": n_threads}).construct()

    def start(objective):
        booster = library.Booster({**params, "objective": "none" if objective else "multiclass"}, data)
        return lambda: booster.update(fobj=objective), lambda: booster.predict(features, raw_score=True)

    return start


LIBRARIES = {
    "xgboost": (start_xgboost, xgboost_objective, lambda n_classes: 2),
    "lightgbm": (start_lightgbm, lightgbm_objective, lambda n_classes: n_classes / (n_classes - 1)),
}


def make_data(n_rows, n_features, n_classes):
    """Return features and the classes that a noisy linear model gives them."""
    rng = np.random.default_rng(SEED)
    features = rng.standard_normal((n_rows, n_features), np.float32)
    scores = features @ rng.standard_normal((n_features, n_classes), np.float32)
    return features, (scores + 2 * rng.gumbel(size=scores.shape)).argmax(axis=1)


def compare(name, library, features, target, n_classes, rounds, n_threads):
    """Let one library's models take turns; print a line for each."""
    start_library, make_objective, find_bound = LIBRARIES[name]
    start = start_library(library, features, target, n_classes, n_threads)
    objectives = {
        "built-in": None,
        "fastce": Timed(make_objective(n_threads=n_threads)),
        "NumPy": Timed(make_numpy_objective(find_bound(n_classes))),
    }
    models = {who: start(objective) for who, objective in objectives.items()}
    updates = {who: [lambda update=update: clock(update)[0]] for who, (update, _) in models.items()}
    seconds = run_rounds(updates, rounds)
    own_margins = models["built-in"][1]()
    for who, (_, margins) in models.items():
        title = f"{name} {library.__version__}, {who}:"
        ratio = seconds[who] / seconds["built-in"]
        line = f"  {title:26} {1e3 * seconds[who]:8.2f} ms a round, ratio {ratio:.3f}"
        if objectives[who] is not None:
            of_it = 1e3 * lower_quartile(objectives[who].seconds)
            line += f", objective {of_it:.2f} ms, margins differ by {np.abs(margins() - own_margins).max():.1e}"
        print(line, flush=True)


def main(arguments=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", nargs=3, type=int, default=(100000, 20, 10), metavar=("N", "d", "C"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--n-threads", type=int, default=fastce.show_config(mode="dicts")["threads"]["effective"])
    options = parser.parse_args(arguments)
    libraries = {}
    for name in LIBRARIES:
        try:
            libraries[name] = importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed")
    data = {"digits": load_digits(return_X_y=True), "made up": make_data(*options.shape)}
    for what, (features, target) in data.items():
        n_classes = int(target.max()) + 1
        print(f"{what}: {len(features)} x {features.shape[1]}, {n_classes} classes, {options.rounds} rounds")
        for name, library in libraries.items():
            compare(name, library, features, target, n_classes, options.rounds, options.n_threads)


if __name__ == "__main__":
    main()
