"""Print what loss and gradient take, by where the gradient is written: python asv_bench/gradients.py.

Into a new array in each call, into one array by `out=grad`, into the one that `CrossEntropyLoss(reuse_grad=True)`
keeps, and over the logits. Milliseconds, lower quartiles of interleaved rounds; to free a new array is not counted.
Needs a quiet machine and 3 GiB.
"""

import argparse
from functools import partial

import numpy as np

import fastce
from fastce._benchmarks.cases import Case, Logits, make_arguments, parse_shape
from fastce._benchmarks.measure import make_sampler
from fastce._benchmarks.report import Table
from fastce._benchmarks.timing import ROUNDS, run_rounds


def make_calls(logits, target, n_threads):
    """Return the ways to get a gradient."""
    with_grad = partial(fastce.cross_entropy_with_grad, logits, target, n_threads=n_threads)
    loss = fastce.CrossEntropyLoss(reuse_grad=True, n_threads=n_threads)
    return {
        "new array": with_grad,
        "out=grad": partial(with_grad, out=np.zeros_like(logits)),
        "reuse_grad": partial(loss.with_grad, logits, target),
        "out=logits": partial(with_grad, out=logits),
    }


def main(arguments=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxCLASSES", default=["65536x1000", "4096x32000"])
    parser.add_argument("--n-threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    table = None
    for name in options.shapes:
        case = Case(parse_shape(name), n_threads=options.n_threads)
        logits = Logits(case)
        calls = make_calls(logits.array, make_arguments(case)["target"], case.n_threads)
        samplers = {way: [make_sampler(case, call, logits)] for way, call in calls.items()}
        seconds = run_rounds(samplers, options.rounds, name)
        table = table or Table(["logits", *seconds], options.shapes)
        table.print(name, *(f"{1e3 * value:.2f}" for value in seconds.values()))


if __name__ == "__main__":
    main()
