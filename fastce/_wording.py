"""How messages write values, types, names and places."""

from collections.abc import Sequence

import numpy as np

_MOST_CHARACTERS = 80  # of a value in a message


def shown(value: object) -> str:
    """Return a value as messages show it: on one line, not too long, and whatever its own `repr` does."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


def article(value: object) -> str:
    """Return what a value is: its type with an article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeio' else 'a'} {name}"


def one_of(names: Sequence[str]) -> str:
    """Return the rule for a name that must be one of several."""
    return f"one of {', '.join(map(repr, names))}"


def place_of(position: int, shape: tuple[int, ...]) -> str:
    """Return the index of an element, given by its position in C order, as it is written after an array's name."""
    return f"[{', '.join(str(i) for i in np.unravel_index(position, shape))}]" if shape else "[()]"
