"""How figures are shown: Markdown tables, row by row, and a progress line."""

import sys
from collections.abc import Iterable, Mapping, Sequence


def show_progress(text: str) -> None:
    """Rewrite the progress line, on a terminal only: in a file it would be noise."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print what is not in the table."""
    show_progress("")
    print(text, file=sys.stderr, flush=True)


class Table:
    """A Markdown table, numbers to the right; the first column must have room for all of `names`."""

    def __init__(self, head: Sequence[str], names: Iterable[str]) -> None:
        self._widths = [max(map(len, [head[0], *names])), *(max(len(title), 8) for title in head[1:])]
        self.print(*head)
        self.print("-" * self._widths[0], *("-" * (width - 1) + ":" for width in self._widths[1:]))

    def print(self, *cells: str) -> None:
        """Print a row at once: whoever ends the program shall have what there is."""
        show_progress("")
        first, *others = (cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))
        print("|", " | ".join([cells[0].ljust(len(first)), *others]), "|", flush=True)


def format_number(x: float | None) -> str:
    """Return three digits, or more before the point."""
    if x is None:
        return "-"
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def format_seconds(seconds: Mapping[str, float]) -> str:
    """Return names and milliseconds on one line."""
    return ", ".join(f"{name} {1e3 * value:.3f}" for name, value in seconds.items()) + " ms"
