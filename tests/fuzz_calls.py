"""What a case does with a function: calls of it in several ways, which must all come to the same.

An *operation* is a function with its arguments; it knows what it may write to and what the definition says.
"""

import contextlib
from typing import ClassVar

import numpy as np

from fuzz_problems import draw_n_threads

PATTERNS = (0xA5, 0xFF, 0x00, 0x7F)  # what `out` is full of; the second is NaN in every type, the last a large number


class Calls:
    """The calls that one case makes, and the memory that they work on."""

    def __init__(self, dice, memory):
        self.dice, self.memory = dice, memory
        self.is_strict = dice.often(0.15)  # whether floating-point errors are raised
        self.n_made = 0
        self.last = None

    def make(self, function, *arguments, **keywords):
        """Call a function, and remember how."""
        self.n_made += 1
        self.last = function, arguments, keywords
        with np.errstate(all="raise") if self.is_strict else contextlib.nullcontext():
            return function(*arguments, **keywords)

    def describe(self):
        """Describe the last call."""
        if self.last is None:
            return "no call yet"
        function, arguments, keywords = self.last
        parts = [_outline(value) for value in arguments]
        parts += [f"{name}={_outline(value)}" for name, value in keywords.items()]
        if owner := getattr(function, "__self__", None):
            parts.append(f"on {' '.join(repr(owner).split())}")
        strict = "under np.errstate(all='raise') " if self.is_strict else ""
        return f"{strict}{function.__qualname__}({', '.join(parts)})"

    def check_inputs(self):
        """Raise if an input was written to."""
        changed = self.memory.changed_inputs()
        assert not changed, f"{', '.join(changed)} was written to"


def _outline(value):
    if isinstance(value, np.ndarray) and value.ndim:
        address = value.__array_interface__["data"][0]
        return f"<{value.dtype} {value.shape} strides {value.strides} at {address % 64} mod 64>"
    return " ".join(repr(value).split())[:200]


def assert_same_bits(one, other, what):
    """Raise unless two results have the same bits; a NaN is as good as another, and a zero of either sign."""
    for name, value in one.items():
        a, b = np.asarray(value), np.asarray(other[name])
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {name} {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        if a.tobytes() == b.tobytes():
            continue
        bad = ~((a == b) | ((a != a) & (b != b)))
        if bad.any():
            where = tuple(np.argwhere(bad)[0].tolist())
            raise AssertionError(
                f"{what}: {name} has other bits at {int(bad.sum())} of {bad.size} places; "
                f"at {where} {a[where]!r} and {b[where]!r}"
            )


def error_of(call, kinds, what):
    """Return the message of the exception that a call must raise."""
    try:
        call()
    except kinds as error:
        return str(error)
    raise AssertionError(f"{what} was taken")


class Operation:
    """A function and its arguments.

    `like` is the array whose shape, dtype and, in place, memory `out` has; `outs` are the names of results that can be
    written to an array that is given, with the keywords for that.
    """

    function = None
    outs: ClassVar = {}

    def __init__(self, calls, arrays, keywords):
        self.calls, self.arrays, self.keywords = calls, arrays, keywords

    def call(self, **more):
        """Return the results by name."""
        return self.name(self.calls.make(self.function, *self.arrays.values(), **self.keywords, **more))

    def name(self, results):
        """Return results by name."""
        raise NotImplementedError

    def check(self, results):
        """Hold results against the definition."""
        raise NotImplementedError

    def with_arrays(self, **arrays):
        """Return the same operation on other arrays."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.arrays = {**self.arrays, **arrays}
        return other

    def like_out(self):
        """Return an array with the shape and the dtype of `out`."""
        return next(iter(self.arrays.values()))

    def in_place_names(self):
        """Return the names of arrays that may be `out`."""
        return [next(iter(self.arrays))]

    rows = ()  # how many there are, along each axis but that of the classes

    def of_rows(self, rows):
        """Return the same operation for some rows, and the names of results that must be the same; None if none are."""


def exercise(calls, operation):
    """Make an operation in several ways, and hold what comes."""
    dice = calls.dice
    expected = operation.call(**draw_n_threads(dice))
    calls.check_inputs()
    operation.check(expected)
    ways = [_with_other_threads]
    if operation.outs:
        ways = [_into_out, _into_out]
        if operation.in_place_names():
            ways += [_in_place, _apart_in_one_array]
    if dice.often(0.7):
        dice.choice(ways)(calls, operation, expected)
        calls.check_inputs()
    if dice.often(0.4):
        _for_some_rows(calls, operation, expected)
        calls.check_inputs()


def _with_other_threads(calls, operation, expected):
    n_threads = calls.dice.choice((1, 2, 3, 4))
    assert_same_bits(expected, operation.call(n_threads=n_threads), f"n_threads={n_threads}")


def _check_written(expected, given, operands, what):
    """Hold what was written to operands, and what lies around it."""
    for name, operand in operands.items():
        assert given[name] is operand.array, f"{what}: {name} is not what was given"
        result, is_clean = operand.take_result()
        assert is_clean, f"{what}: bytes around {name} were written to"
        given = {**given, name: result}
    assert_same_bits(expected, given, what)


def _into_out(calls, operation, expected):
    dice, memory = calls.dice, calls.memory
    like = operation.like_out()
    names = list(operation.outs)
    if len(names) > 1 and dice.often(0.3):
        names = [dice.choice(names)]
    pattern = dice.choice(PATTERNS)
    operands = {name: memory.operand(like.shape, like.dtype, fill=pattern) for name in names}
    given = {operation.outs[name]: operand.array for name, operand in operands.items()}
    results = operation.call(**given, **draw_n_threads(dice))
    _check_written(expected, results, operands, f"out full of {pattern:#x}")


def _in_place(calls, operation, expected):
    dice, memory = calls.dice, calls.memory
    name = dice.choice(operation.in_place_names())
    array = operation.arrays[name]
    strides = array.strides
    if any(stride == 0 and n > 1 for stride, n in zip(strides, array.shape, strict=True)) or dice.often(0.2):
        strides = None
    operand = memory.operand(array.shape, array.dtype, strides=strides)
    operand.array[...] = array
    operand.freeze()
    arrays = {name: operand.array}
    for other, value in operation.arrays.items():
        if value is array and other in operation.in_place_names():
            arrays[other] = operand.array
    if strides is None:
        # The bits may depend on the memory order.
        expected = operation.with_arrays(**arrays).call()
    result, keyword = next(iter(operation.outs.items()))
    results = operation.with_arrays(**arrays).call(**{keyword: operand.array}, **draw_n_threads(dice))
    _check_written(expected, results, {result: operand}, f"out={name}")


def _apart_in_one_array(calls, operation, expected):
    """Let the first argument and `out` be parts of one array: with an element in common that must be refused."""
    dice, memory = calls.dice, calls.memory
    name, like = next(iter(operation.arrays.items()))
    result, keyword = next(iter(operation.outs.items()))
    if not like.ndim or not like.size:
        return
    axis = dice.integer(0, like.ndim - 1)
    step = dice.choice((1, 1, 2, 3))
    shift = dice.integer(0, 2 * step)
    n = like.shape[axis]
    shape = list(like.shape)
    shape[axis] = n * step + shift
    operand = memory.operand(tuple(shape), like.dtype)
    both = [(slice(None),) * axis + (slice(start, start + n * step, step),) for start in (0, shift)]
    if dice.often(0.5):
        both.reverse()
    source, out = (operand.array[index] for index in both)
    if dice.often(0.2):
        out = np.flip(out, axis)
    source[...] = like
    operand.freeze()
    other = operation.with_arrays(**{name: source})
    strides = zip(source.shape, source.strides, out.strides, strict=True)
    is_same = source.ctypes.data == out.ctypes.data and all(n == 1 or one == other for n, one, other in strides)
    if np.shares_memory(source, out) and not is_same:
        message = error_of(lambda: other.call(**{keyword: out}), ValueError, f"{keyword} that overlaps with {name}")
        assert keyword in message, f"no word of {keyword} in: {message}"
        assert operand.is_unchanged(), f"{keyword} was written to although it overlaps"
        return
    expected = other.call()
    results = other.call(**{keyword: out}, **draw_n_threads(dice))
    assert results[result] is out
    results = {**results, result: out.copy()}
    assert_same_bits(expected, results, f"{keyword} beside {name}")
    if not is_same:
        kept = source.copy()
        operand.take_result()
        assert_same_bits({name: kept}, {name: source}, f"{name} beside {keyword}")
    else:
        operand.take_result()
    assert operand.is_unchanged(), "bytes around were written to"


def _for_some_rows(calls, operation, expected):
    """Hold the results of one row, or of a few, against theirs among all."""
    dice = calls.dice
    rows = []
    for n in operation.rows:
        if n == 0:
            return
        start = dice.integer(0, n - 1)
        stop = start + 1 if dice.often(0.6) else dice.integer(start + 1, n)
        rows.append(slice(start, stop) if not dice.often(0.3) else slice(0, n))
    part = operation.of_rows(tuple(rows))
    if part is None:
        return
    few, names, cut = part
    actual = few.call(**draw_n_threads(dice))
    assert_same_bits({name: cut(name, expected[name]) for name in names}, actual, f"rows {rows}")
