"""Random problems: shapes, memory layouts, data types, numbers and options, all drawn from one seed.

Design
------
1. Most problems are tiny, because faults are found by combinations; some are just large enough for the paths that small
   ones never take: groups of 16 and 64 rows, tiles of 64 classes, blocks of 1024 to 4096 of them.
2. Weights are multiples of 1/16 that every floating type holds, so that their sums are exact whatever the order: a
   divisor that cancels to 0 does so for everybody. A few are extreme; those have one sign.
3. Operands live between guards (see guard.py), each at an end of its block that is drawn.
"""

import random

import ml_dtypes
import numpy as np

from cases import row_shape
from guard import Operand

LOGITS_DTYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
FLOATS = [*LOGITS_DTYPES, np.dtype(np.longdouble)]
INTEGERS = [np.dtype(t) for t in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i2", ">i4", ">u8")]

# Around a vector, half a tile, a tile and several; the choice between kernels at 512 and 896 bytes; around blocks.
FEW_CLASSES = [1, 2, 3, 4, 5, 7, 8, 10, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 111, 112]
CLASSES = [*FEW_CLASSES, 126, 127, 128, 129, 130, 190, 223, 224, 257]
MANY_CLASSES = [1000, 1023, 1024, 1025, 2047, 2048, 2049, 2100, 3000, 4095, 4096, 4097, 5000, 8193, 9000]
ROWS = [0, 1, 1, 2, 3, 4, 5, 8, 15, 16, 17, 20, 31, 33]
MANY_ROWS = [47, 63, 64, 65, 66, 80, 100, 127, 128, 129, 130, 150, 192, 200]
VERY_MANY_ROWS = [511, 512, 513, 600, 777, 1024, 1025, 1500]
MOST_NUMBERS = 40_000  # of a problem: a hundred times as long as a tiny one, under the definition

FINITE = (0.0, -0.0, 1e4, -1e4, 88.0, -104.0, 700.0, -745.0, 1e-40, -1e-310, 65504.0, 1e8)
EXTREME = (-np.inf, -np.inf, -np.inf, 3e38, -3e38, 3.4e38, 1e-45, 1e30)
BAD = (np.inf, np.nan, -np.nan)


class Dice:
    """Random numbers of one case: a function of seed and index alone."""

    def __init__(self, seed, index):
        self._random = random.Random(f"{seed} {index}")
        self.random = self._random.random
        self.choice = self._random.choice
        self.integer = self._random.randint  # both ends included
        self.shuffle = self._random.shuffle
        self.sample = self._random.sample
        self.numbers = np.random.Generator(np.random.SFC64(self._random.getrandbits(64)))

    def often(self, probability):
        """Return True that often."""
        return self.random() < probability


def draw_shape(dice, at_least=1):
    """Return a shape of 1 to 5 dimensions and the class axis."""
    size = dice.random()
    if size < 0.88:
        n_classes, n_rows = dice.choice(CLASSES[:20]), dice.choice(ROWS)
        if n_classes * n_rows > 600:
            n_rows = dice.integer(1, max(1, 600 // n_classes))
    elif size < 0.95:
        n_classes, n_rows = dice.choice(CLASSES), dice.choice(MANY_ROWS)
    elif size < 0.98:
        n_classes, n_rows = dice.choice(MANY_CLASSES), dice.choice((1, 1, 2, 3, 4, 5, 16, 17))
    else:
        n_classes, n_rows = dice.choice(CLASSES), dice.choice(VERY_MANY_ROWS)
    if n_rows == 0 and dice.often(0.2):
        n_classes = 0
    n_rows = min(n_rows, max(1, MOST_NUMBERS // max(1, n_classes)))
    n_dims = dice.choice((1, 2, 2, 2, 2, 2, 3, 3, 4, 5))
    n_dims = max(n_dims, at_least)
    if n_dims == 1:
        return (max(1, n_classes),), 0
    rows = [n_rows]
    while len(rows) < n_dims - 1:
        # Split one of the dimensions, by a divisor if there is one, else with ones.
        k = dice.integer(0, len(rows) - 1)
        divisor = dice.choice([d for d in (1, 2, 3, 4, 5, 7, 16) if rows[k] % d == 0])
        rows[k : k + 1] = [divisor, rows[k] // divisor] if dice.often(0.5) else [rows[k] // divisor, divisor]
    axis = 1 if dice.often(0.5) else dice.integer(0, n_dims - 1)
    return (*rows[:axis], n_classes, *rows[axis:]), axis


def draw_strides(dice, shape, itemsize, may_repeat=False):
    """Return strides in bytes: any order of the dimensions, steps, directions, gaps, and repetition."""
    n_dims = len(shape)
    order = list(range(n_dims - 1, -1, -1))
    steps = [1] * n_dims
    unit, gap = itemsize, 0
    kind = dice.random()
    if kind < 0.45:
        pass  # C order
    elif kind < 0.6:
        order.reverse()
    else:
        if dice.often(0.5):
            dice.shuffle(order)
        if dice.often(0.5):
            steps = [dice.choice((1, 1, 1, 2, 3, -1, -2)) for _ in range(n_dims)]
        if dice.often(0.2):
            unit += dice.choice((1, 3, itemsize, 7))  # a field of packed records
        if dice.often(0.3):
            gap = dice.choice((1, itemsize, 3 * itemsize, 64))  # a part of a larger array
        if may_repeat and n_dims and dice.often(0.25):
            steps[dice.integer(0, n_dims - 1)] = 0
    strides = [0] * n_dims
    for axis in order:
        strides[axis] = steps[axis] * unit
        if steps[axis]:
            unit = abs(steps[axis]) * unit * max(1, shape[axis]) + gap
    return strides


class Memory:
    """Where the operands of one case live."""

    def __init__(self, dice, pool):
        self.dice = dice
        self.pool = pool
        self.inputs = {}

    def place(self):
        """Return where an operand goes, and how far from the guard."""
        draw = self.dice.random()
        shift = self.dice.integer(1, 15) if self.dice.often(0.12) else 0
        return ("end" if draw < 0.45 else "start" if draw < 0.9 else "heap"), shift

    def operand(self, shape, dtype, may_repeat=False, strides=None, fill=0xA5):
        """Return an operand in a layout that is drawn, or that is given."""
        if strides is None:
            strides = draw_strides(self.dice, shape, np.dtype(dtype).itemsize, may_repeat)
        return Operand(self.pool, shape, dtype, strides, *self.place(), fill)

    def input(self, name, values, dtype, may_repeat=True, strides=None):
        """Return an array that holds these values, as far as layout and type allow."""
        operand = self.operand(np.shape(values), dtype, may_repeat, strides)
        with np.errstate(all="ignore"):
            operand.array[...] = values
        operand.freeze()
        if self.dice.often(0.2):
            operand.array.flags.writeable = False
        self.inputs[name] = operand
        return operand.array

    def changed_inputs(self):
        """Return the names of the inputs that were written to."""
        return [name for name, operand in self.inputs.items() if not operand.is_unchanged()]


def draw_logits(dice, shape, axis):
    """Return float64 numbers for logits, and whether there is anything but finite numbers of ordinary size."""
    numbers = dice.numbers
    x = numbers.standard_normal(shape) * dice.choice((0.1, 1.0, 3.0, 3.0, 30.0))
    kind = dice.random()
    if kind < 0.5 or not x.size:
        return x, False
    if kind < 0.56:
        return np.rint(x), False  # ties
    if kind < 0.6:
        return np.zeros(shape) + dice.choice((0.0, 1.0, -5e4)), False
    rows = row_shape(shape, axis)
    if kind < 0.7:  # confident rows
        k = numbers.integers(0, shape[axis], rows)
        top = np.expand_dims(k, axis) == np.arange(shape[axis]).reshape([-1 if d == axis else 1 for d in range(x.ndim)])
        return x + top * dice.choice((10.0, 40.0, 90.0, 400.0)), False
    if kind < 0.75:  # offsets between rows
        return x + np.expand_dims(numbers.standard_normal(rows), axis) * dice.choice((1e2, 1e4, 1e8)), False
    if kind < 0.8:
        return x * dice.choice((1e-38, 1e-41, 1e-45, 1e-310)), False
    extreme = dice.often(0.5)
    choices = FINITE + EXTREME if extreme else FINITE
    if dice.often(0.4):
        choices += BAD
        extreme = True
    x = np.where(numbers.random(shape) < dice.choice((0.02, 0.1, 0.5)), numbers.choice(choices, shape), x)
    if dice.often(0.3):  # rows of one number
        hit = np.expand_dims(numbers.random(rows) < 0.2, axis)
        x = np.where(hit, dice.choice((-np.inf, np.nan, np.inf, 0.0)), x)
        extreme = True
    return x, extreme


def draw_weights(dice, shape):
    """Return float64 factors: multiples of 1/16 with zeros among them, or extreme ones of one sign."""
    numbers = dice.numbers
    kind = dice.random()
    if kind < 0.08:
        return np.zeros(shape)
    if kind < 0.2:
        return np.exp2(numbers.integers(-60, 60, shape))
    low = dice.choice((-48, 0))
    weights = numbers.integers(low, 49, shape) / 16
    if dice.often(0.7):
        weights = np.where(numbers.random(shape) < 0.2, 0.0, weights)
    return weights


def as_dtype_that_holds(dice, values):
    """Return a type that holds these factors exactly."""
    dtypes = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
    if np.all(values == np.rint(values)):
        dtypes += [np.dtype(np.int8), np.dtype(np.int64)]
    dice.shuffle(dtypes)
    with np.errstate(all="ignore"):
        return next((t for t in dtypes[:2] if np.array_equal(values.astype(t).astype(np.float64), values)), np.float64)


class Problem:
    """Logits, target and options of one case, as the functions take them and as the definition does.

    `options` are what both take, but for `n_threads`; the arrays in `exact` are what the definition takes in the place
    of those that a function is given.
    """

    def __init__(self, dice, memory):
        self.dice, self.memory = dice, memory
        self.shape, self.axis = draw_shape(dice)
        self.rows = row_shape(self.shape, self.axis)
        self.n_classes = self.shape[self.axis]
        self.dtype = dice.choice(LOGITS_DTYPES)
        values, self.is_extreme = draw_logits(dice, self.shape, self.axis)
        self.strides = draw_strides(dice, self.shape, self.dtype.itemsize, may_repeat=True)
        self.logits = memory.input("logits", values, self.dtype, strides=self.strides)
        self.exact_logits = self.logits.copy()
        self.options = self._draw_options()
        is_index = dice.often(0.65)
        self.target = self._draw_indices() if is_index else self._draw_probabilities()
        self.is_index = is_index
        self.exact_target = self.target.copy()
        self.axis_given = self._draw_axis()

    def _draw_axis(self):
        default = 0 if len(self.shape) == 1 else 1
        if self.axis == default and self.dice.often(0.6):
            return {}
        return {"axis": self.axis - (len(self.shape) if self.dice.often(0.3) else 0)}

    def _draw_indices(self):
        dice, n = self.dice, self.n_classes
        dtype = dice.choice([t for t in INTEGERS if np.iinfo(t).max >= n] if dice.often(0.6) else [np.dtype(np.int64)])
        y = dice.numbers.integers(0, max(1, n), self.rows)
        ignore_index = -100
        if dice.often(0.3):
            ignore_index = dice.choice((0, -1, max(0, n - 1), n, 10**6, -(2**40)))
            self.options["ignore_index"] = ignore_index
        info = np.iinfo(dtype)
        if info.min <= ignore_index <= info.max and dice.often(0.5):
            y = np.where(dice.numbers.random(self.rows) < dice.choice((0.1, 0.5, 1.0)), ignore_index, y)
        elif n == 0:
            y = np.zeros(self.rows, int)
        return self.memory.input("target", y, dtype)

    def _draw_probabilities(self):
        dice, numbers = self.dice, self.dice.numbers
        self.options.pop("ignore_index", None)
        kind = dice.random()
        prob = numbers.random(self.shape)
        if kind < 0.6:
            prob = prob * (numbers.random(self.shape) < 0.7) + 1e-3
            prob /= prob.sum(axis=self.axis, keepdims=True)
        elif kind < 0.7:
            prob = np.rint(prob)
        elif kind < 0.75:
            prob = prob - 0.3
        elif kind < 0.8:
            prob = np.zeros(self.shape)
        if dice.often(0.04) and self.options.get("label_smoothing") != 1:  # which leaves nothing of the target
            prob = np.where(numbers.random(self.shape) < 0.05, np.nan, prob)
        return self.memory.input("target", prob, dice.choice(FLOATS))

    def _draw_options(self):
        dice = self.dice
        options = {}
        if dice.often(0.85):
            options["reduction"] = dice.choice(("none", "none", "mean", "sum"))
        if dice.often(0.35):
            return options
        draws = {
            "on_empty": lambda: dice.choice(("nan", "zero")),
            "label_smoothing": lambda: dice.choice((0.0, 0.1, 0.1, 0.5, 1.0, 1e-30)),
            "logit_scale": lambda: dice.choice((0.5, 1.0, 2.7, 1e-3, 20.0, 2.0**-100, 2.0**100)),
            "softcap": lambda: dice.choice((None, 0.7, 5.0, 30.0, 1e-3, 1e6)),
            "z_loss": lambda: dice.choice((0.0, 1e-4, 0.01, 3.0)),
            "weight": lambda: self._draw_factors("weight", (self.n_classes,)),
            "sample_weight": lambda: self._draw_factors("sample_weight", self.rows),
        }
        for name, draw in draws.items():
            if dice.often(0.35):
                options[name] = draw()
        return options

    def _draw_factors(self, name, shape):
        values = draw_weights(self.dice, shape)
        return self.memory.input(name, values, as_dtype_that_holds(self.dice, values))

    @property
    def reduction(self):
        """Return what becomes of the rows' losses."""
        return self.options.get("reduction", "mean")

    def draw_grad_output(self):
        """Return an upstream gradient of the loss's shape, or None."""
        dice = self.dice
        if dice.often(0.5):
            return None
        if self.reduction != "none":
            return dice.choice((1.5, -0.25, 0, 3, np.float32(0.75), np.array(2.0), 2.0**-90, 2.0**90))
        values = dice.numbers.integers(-64, 65, self.rows) / 32
        return self.memory.input("grad_output", values, as_dtype_that_holds(dice, values))

    def for_definition(self, names=None):
        """Return the options as the definition takes them."""
        options = {name: value for name, value in self.options.items() if names is None or name in names}
        return {"axis": self.axis, **options}


def draw_n_threads(dice):
    """Return keyword arguments that say how many threads, or leave it to the library."""
    return {} if dice.often(0.5) else {"n_threads": dice.choice((1, 2, 3, 4))}
