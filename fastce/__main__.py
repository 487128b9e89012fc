"""Command line: ``python -m fastce`` shows the configuration; its commands train a small classifier and benchmark."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import fastce
from fastce._benchmarks import bench, demo
from fastce._benchmarks.cases import CASES, Case
from fastce._benchmarks.report import show_progress
from fastce._benchmarks.steps import STEPS, Step

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        if options.command == "demo":
            return demo.run(options.epochs, options.batch_size, options.seed, options.n_threads)
        if options.command == "bench":
            chosen = options.cases or (bench.QUICK if options.quick else bench.ALL)
            cases = [case for case in chosen if isinstance(case, Case)]
            steps = [step for step in chosen if isinstance(step, Step)]
            return bench.run(
                cases, steps, options.rounds, options.n_threads, options.compile, options.json, options.plot
            )
        fastce.show_config()
    except KeyboardInterrupt:
        show_progress("")
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastce",
        description="Softmax cross-entropy for NumPy. Without a command: show versions, instruction sets and threads.",
    )
    parser.add_argument("--version", action="version", version=f"fastce {fastce.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    add_demo(commands)
    add_bench(commands)
    return parser


def add_demo(commands: Commands) -> None:
    """Add the command that trains a classifier."""
    parser = commands.add_parser(
        "demo",
        help="train a classifier of handwritten digits and time the loss",
        description="Train a linear classifier on scikit-learn's 1797 handwritten digits in a NumPy mini-batch loop "
        "and compare fastce's loss and gradient with NumPy's and scikit-learn's, in value and in time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=at_least_one, default=20, help="passes through the images")
    parser.add_argument("--batch-size", type=at_least_one, default=128, help="images per step")
    parser.add_argument("--seed", type=not_negative, default=0, help="seed of the split and of the order of the images")
    parser.add_argument("--n-threads", type=at_least_one, help="maximum number of threads of the loss (None: no limit)")


def add_bench(commands: Commands) -> None:
    """Add the command that measures."""
    parser = commands.add_parser(
        "bench",
        help="time loss and gradient against other packages",
        description="Time the mean cross-entropy of class indices and its gradient with fastce, and with those of "
        "NumPy, SciPy, scikit-learn, PyTorch, JAX with optax, and Numba that are installed, in multiples of the memory "
        "floor: the time that NumPy takes to multiply the logits by 1 in place, in one call or in one per thread. "
        "Then time training steps, which multiply matrices before and after the loss, in milliseconds. The last "
        "column is the speedup of fastce over its fastest peer. Needs a quiet machine.",
        epilog=f"Cases: {list_names(CASES)}; steps: {list_names(STEPS)}; quick ones: {list_names(bench.QUICK)}.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cases", nargs="+", type=known_case, metavar="NAME", help="what to run (default: all)")
    which.add_argument("--quick", action="store_true", help="run small cases only, as a quick check")
    parser.add_argument("--rounds", type=at_least_one, default=11, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument(
        "--n-threads",
        type=at_least_one,
        metavar="N",
        help="threads, where a package can be told (default: fastce's choice, and for its peers as many as it may use)",
    )
    parser.add_argument("--compile", action="store_true", help="also time torch.compile, which needs a C++ compiler")
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="save machine, versions and lower quartiles, in seconds"
    )
    parser.add_argument("--plot", type=new_file, metavar="FILE.png", help="plot the multiples; needs matplotlib")


def list_names(cases: Iterable[Case | Step]) -> str:
    """Return the names with commas between."""
    return ", ".join(case.name for case in cases)


def known_case(text: str) -> Case | Step:
    """Return the case or step of that name."""
    cases = {case.name: case for case in (*bench.ALL, *bench.QUICK)}
    if text not in cases:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(cases)}, got {text!r}")
    return cases[text]


def new_file(text: str) -> Path:
    """Return the path if a file can be written there; after the measurements it would be late to find out."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def at_least_one(text: str) -> int:
    """Return the number in the text."""
    return whole_number(text, 1)


def not_negative(text: str) -> int:
    """Return the number in the text."""
    return whole_number(text, 0)


def whole_number(text: str, least: int) -> int:
    """Return the number in the text; argparse shows the message of ArgumentTypeError only."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
