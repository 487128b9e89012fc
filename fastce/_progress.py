"""The line of a terminal that tells how far a program has come."""

import sys


def show_progress(text: str) -> None:
    """Rewrite the progress line, on a terminal only: in a file it would be noise."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
