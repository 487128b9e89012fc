"""Print what whole steps take, with the loss by fastce, by NumPy and by others in between: python asv_bench/steps.py.

Training steps of a linear layer (product, loss and gradient, two products), `predict_proba`, and rounds of boosting,
all with default threads; fastce also with one. Lower quartiles of rounds in turn. The last column of a run holds fastce
against the better of the NumPy step and its own with one thread, or against the library's own. With --busy another
process keeps one core busy meanwhile, and fastce is held against one thread. Needs scikit-learn and a quiet machine.
"""

import argparse
import contextlib
import functools
import importlib
import subprocess
import sys
import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import fastce.sklearn
from boosting import LIBRARIES, make_data
from fastce._benchmarks.report import format_seconds
from fastce._benchmarks.steps import STEPS, TURN, make_step, run_steps

ONE_THREAD = "one thread"
PREDICTED_ROWS = (1, 100, 1797, 20000)


@contextlib.contextmanager
def busy_process(is_wanted):
    """Have another process compute meanwhile."""
    if not is_wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def make_steps(step, with_torch):
    """Return the step with the loss of each peer."""
    names = ["fastce", "NumPy", "scikit-learn", *["PyTorch"] * with_torch]
    losses = {name: (name, None) for name in names} | {ONE_THREAD: ("fastce", 1)}
    return {title: make_step(step, *loss) for title, loss in losses.items()}


@functools.cache
def fit_models():
    """Return scikit-learn's model and ours, fitted to digits."""
    features, target = load_digits(return_X_y=True)
    models = {
        "fastce": fastce.sklearn.LogisticRegression(max_iter=20),
        ONE_THREAD: fastce.sklearn.LogisticRegression(max_iter=20, n_threads=1),
        "scikit-learn": LogisticRegression(max_iter=20),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that few iterations are not enough
        return {name: model.fit(features, target) for name, model in models.items()}


def make_predictions(n_rows):
    """Return `predict_proba` by each model."""
    features = np.resize(load_digits().data, (n_rows, 64))
    return {name: functools.partial(model.predict_proba, features) for name, model in fit_models().items()}


def make_boosters(name, shape, n_rounds):
    """Return how a library learns by its own objective and by ours; default threads."""
    library = importlib.import_module(name)
    start_library, make_objective, _ = LIBRARIES[name]
    features, target = make_data(*shape)
    start = start_library(library, features, target, shape[-1], 0)
    objectives = {"fastce": make_objective(), name: None}

    def learn(objective):
        update, _ = start(objective)
        for _ in range(n_rounds):
            update()

    return {who: functools.partial(learn, objective) for who, objective in objectives.items()}


def print_run(title, calls, rivals, rounds, turn):
    """Time and print a line; return the ratio of fastce to the fastest rival."""
    seconds = run_steps(calls, rounds, turn)
    ratio = seconds["fastce"] / min(seconds[name] for name in rivals)
    print(f"  {title}: {format_seconds(seconds)}; ratio {ratio:.2f}", flush=True)
    return ratio


def main(arguments=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1, help="of everything, one after the other")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--turn", type=float, default=TURN, metavar="SECONDS", help="that each has in a round")
    parser.add_argument("--busy", action="store_true", help="beside a process that keeps a core busy")
    parser.add_argument("--torch", action="store_true", help="also with PyTorch's loss")
    parser.add_argument("--boosting", nargs=4, type=int, default=(20000, 20, 10, 30), metavar=("N", "d", "C", "ROUNDS"))
    parser.add_argument("--skip", nargs="*", default=(), choices=("steps", "predictions", "boosting"))
    options = parser.parse_args(arguments)
    config = fastce.show_config(mode="dicts")
    print(f"threads: {config['threads']['effective']}; waiting: {config['threads']['waiting']}")
    worst = {}

    def measure(title, calls, rivals):
        ratio = print_run(title, calls, rivals, options.rounds, options.turn)
        worst[title] = max(worst.get(title, 0), ratio)

    with busy_process(options.busy):
        for number in range(options.runs):
            print(f"run {number + 1}")
            for step in () if "steps" in options.skip else STEPS:
                rivals = [ONE_THREAD] if options.busy else [ONE_THREAD, "NumPy"]
                measure(step.name, make_steps(step, options.torch), rivals)
            for n_rows in () if "predictions" in options.skip else PREDICTED_ROWS:
                measure(f"predict_proba-{n_rows}x64x10", make_predictions(n_rows), ["scikit-learn"])
            for name in () if "boosting" in options.skip else LIBRARIES:
                *shape, n_rounds = options.boosting
                calls = make_boosters(name, shape, n_rounds)
                measure(f"{name}-{'x'.join(map(str, shape))}, {n_rounds} rounds", calls, [name])
    print("worst ratios:", ", ".join(f"{title} {ratio:.2f}" for title, ratio in worst.items()))


if __name__ == "__main__":
    main()
