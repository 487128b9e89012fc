"""Command line: ``python -m fastce`` shows the configuration, ``python -m fastce demo`` trains a small classifier."""

import argparse
import sys
from collections.abc import Sequence

from fastce import _demo, show_config

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        if options.command == "demo":
            return _demo.run(options.epochs, options.batch_size, options.seed, options.n_threads)
        show_config()
    except KeyboardInterrupt:
        _demo.show_progress("")
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastce",
        description="Softmax cross-entropy for NumPy. Without a command: show versions, instruction sets and threads.",
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a classifier of handwritten digits and time the loss",
        description="Train a linear classifier on scikit-learn's 1797 handwritten digits in a NumPy mini-batch loop "
        "and compare fastce's loss and gradient with NumPy's and scikit-learn's, in value and in time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--epochs", type=at_least_one, default=20, help="how often to see every image")
    demo.add_argument("--batch-size", type=at_least_one, default=128, help="images per step")
    demo.add_argument("--seed", type=int, default=0, help="of the split and the order of the images")
    demo.add_argument("--n-threads", type=at_least_one, help="at most this many threads in the loss (None: no limit)")
    return parser


def at_least_one(text: str) -> int:
    """Return the number in the text; argparse turns the ValueError into its own message."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
