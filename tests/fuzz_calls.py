"""The calls of a case: each family makes a problem, calls functions in several ways and holds what they return.

An *operation* is a function with its arguments; it knows what it may write to and what the definition says. Everything
that is done to all operations alike stands in `exercise`.
"""

import contextlib
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np

import fastce
import fuzz_truth
from fastce import _reference
from fastce._curvature import CURVATURES
from fuzz_problems import (
    FLOATS,
    INTEGERS,
    LOGITS_DTYPES,
    Problem,
    draw_logits,
    draw_n_threads,
    draw_shape,
)

DOCUMENTED = (TypeError, ValueError, IndexError)
PATTERNS = (0xA5, 0xFF, 0x00, 0x7F)  # the second is NaN in every type, the last a large number


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
    return repr(value)[:200]


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


class Operation:
    """A function and its arguments.

    `like` is the array whose shape, dtype and, in place, memory `out` has; `outs` are the names of results that can be
    written to an array that is given, with the keywords for that.
    """

    function = None
    outs = {}

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

    def in_place_names(self):
        """Return the names of arrays that may be `out`."""
        return [next(iter(self.arrays))]

    rows = ()  # how many there are, along each axis but that of the classes

    def of_rows(self, rows):
        """Return the same operation for some rows, and the names of results that must be the same; None if none are."""
        return None


def exercise(calls, operation):
    """Make an operation in several ways, and hold what comes."""
    dice = calls.dice
    expected = operation.call(**draw_n_threads(dice))
    calls.check_inputs()
    operation.check(expected)
    ways = [_with_other_threads]
    if operation.outs:
        ways = [_into_out, _into_out, _in_place, _apart_in_one_array]
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
    like = next(iter(operation.arrays.values()))
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
    is_same = source.strides == out.strides and source.ctypes.data == out.ctypes.data
    if np.shares_memory(source, out) and not is_same:
        before = operand.array.tobytes()
        try:
            other.call(**{keyword: out})
        except ValueError as error:
            assert keyword in str(error), f"no word of {keyword} in: {error}"
        else:
            raise AssertionError(f"{keyword} overlaps with {name} and was taken")
        assert operand.array.tobytes() == before, f"{keyword} was written to although it overlaps"
        assert operand.is_unchanged(), "memory was written to by a call that raised"
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


# ---- the losses


class Loss(Operation):
    """Any function of the loss family."""

    def __init__(self, calls, problem):
        dice = calls.dice
        self.problem, self.rows, self.axis = problem, problem.rows, problem.axis
        keywords = {**problem.axis_given, **problem.options}
        super().__init__(calls, {"logits": problem.logits, "target": problem.target}, keywords)
        self.as_object = dice.often(0.15)
        self.draw()

    def draw(self):
        """Draw what the function takes besides."""

    def add_grad_output(self):
        """Draw an upstream gradient."""
        self.grad_output = self.problem.draw_grad_output()
        if self.grad_output is not None:
            self.keywords["grad_output"] = self.grad_output

    grad_output = None
    method = None  # of CrossEntropyLoss
    own = ()  # keywords that are no options

    def call(self, **more):
        if not self.as_object or self.method is None:
            return super().call(**more)
        keywords = {**self.keywords, **more}
        own = {name: keywords.pop(name) for name in (*self.own, *self.outs.values()) if name in keywords}
        loss = fastce.CrossEntropyLoss(**keywords)
        return self.name(self.calls.make(getattr(loss, self.method), *self.arrays.values(), **own))

    def of_definition(self, function, *arrays, **more):
        """Return what the definition says."""
        problem = self.problem
        return function(problem.exact_logits, problem.exact_target, *arrays, **self.definition_options(), **more)

    def definition_options(self):
        """Return options, and the upstream gradient, as the definition takes them."""
        options = self.problem.for_definition()
        if self.grad_output is not None:
            options["grad_output"] = self.grad_output
        return options

    def bounds(self):
        """Return how far results may be from the definition."""
        problem = self.problem
        return fuzz_truth.Bounds(problem.exact_logits, problem.exact_target, **self.definition_options())

    def check(self, results):
        problem = self.problem
        if problem.n_classes == 0:
            assert all(np.asarray(value).size == 0 for name, value in results.items() if name != "loss")
            return
        self.check_values(results, self.bounds())

    def of_rows(self, rows):
        problem = self.problem
        if problem.reduction == "mean":
            return None
        at_class = (*rows[: self.axis], slice(None), *rows[self.axis :])

        def cut(name, value):
            return value[at_class] if np.ndim(value) == len(at_class) else value[rows]

        arrays = {name: cut(name, value) for name, value in self.arrays.items()}
        few = self.with_arrays(**arrays)
        few.keywords = dict(self.keywords)
        for name in ("sample_weight", "grad_output"):
            value = few.keywords.get(name)
            if name == "sample_weight" and value is not None or np.ndim(value):
                few.keywords[name] = value[rows]
        names = [name for name in self.result_names() if not (name == "loss" and problem.reduction == "sum")]
        return few, names, cut

    def result_names(self):
        """Return the names of all results."""
        raise NotImplementedError


STATS = ("lse", "log_prob", "argmax", "entropy")


class LossAlone(Loss):
    function = staticmethod(fastce.cross_entropy)
    method = "__call__"

    def name(self, results):
        return {"loss": results}

    def result_names(self):
        return ["loss"]

    def check_values(self, results, bounds):
        bounds.hold_loss(results["loss"], self.of_definition(_reference.cross_entropy).loss, "loss")


class WithGrad(Loss):
    function = staticmethod(fastce.cross_entropy_with_grad)
    method = "with_grad"
    own = ("grad_output",)
    outs = {"grad": "out"}

    def draw(self):
        self.add_grad_output()
        self.has_stats = self.calls.dice.often(0.4)
        if self.has_stats:
            self.as_object = False
            self.keywords["return_stats"] = True

    def name(self, results):
        named = {"loss": results[0], "grad": results[1]}
        return {**named, **results[2]._asdict()} if self.has_stats else named

    def result_names(self):
        return ["loss", "grad", *(STATS if self.has_stats else ())]

    def check_values(self, results, bounds):
        expected = self.of_definition(_reference.cross_entropy)
        bounds.hold_loss(results["loss"], expected.loss, "loss")
        bounds.hold_grad(results["grad"], expected.grad, "grad")
        if self.has_stats:
            bounds.hold_stats(fastce.CrossEntropyStats(*(results[name] for name in STATS)), expected.stats, "stats")


class StatsAlone(Loss):
    function = staticmethod(fastce.cross_entropy_stats)

    def name(self, results):
        return results._asdict()

    def result_names(self):
        return list(STATS)

    def check_values(self, results, bounds):
        expected = self.of_definition(_reference.cross_entropy).stats
        bounds.hold_stats(fastce.CrossEntropyStats(**results), expected, "stats")


class Product(Loss):
    function = staticmethod(fastce.cross_entropy_hvp)
    method = "hvp"
    own = ("grad_output",)
    outs = {"product": "out"}

    def draw(self):
        self.add_grad_output()
        dice, problem = self.calls.dice, self.problem
        v = dice.numbers.standard_normal(problem.shape) * dice.choice((1.0, 1.0, 1.0, 1e-3, 1e3))
        if dice.often(0.05):
            v = np.where(dice.numbers.random(problem.shape) < 0.1, dice.choice((np.nan, np.inf, -np.inf)), v)
        if dice.often(0.04):
            self.arrays["v"] = problem.logits
        elif dice.often(0.05):
            self.arrays["v"] = self.calls.memory.input("v", np.rint(np.nan_to_num(v)), dice.choice(INTEGERS[:4]))
        else:
            dtype = problem.dtype if dice.often(0.6) else dice.choice(FLOATS)
            self.arrays["v"] = self.calls.memory.input("v", v, dtype)
        self.exact_v = self.arrays["v"].copy()

    def in_place_names(self):
        return ["logits", "v"] if self.arrays["v"].dtype == self.problem.dtype else ["logits"]

    def name(self, results):
        return {"product": results}

    def result_names(self):
        return ["product"]

    def check_values(self, results, bounds):
        problem = self.problem
        v = self.exact_v.astype(np.float64)
        product = self.of_definition(_reference.cross_entropy_hvp, v)
        bad = ~np.isfinite(v).all(axis=problem.axis, keepdims=True)
        if bad.any():
            # Not finite, in one way or another.
            actual = results["product"]
            product = np.where(bad & ~np.isfinite(actual), actual.astype(np.float64), product)
        bounds.hold_product(results["product"], product, v, "product")


class Diagonal(Loss):
    function = staticmethod(fastce.cross_entropy_grad_hess)
    method = "grad_hess"
    own = ("grad_output", "curvature")
    outs = {"grad": "out", "hess": "hess_out"}

    def draw(self):
        self.add_grad_output()
        self.curvature = self.calls.dice.choice(tuple(CURVATURES))
        if self.curvature != "exact" or self.calls.dice.often(0.3):
            self.keywords["curvature"] = self.curvature

    def name(self, results):
        return {"grad": results[0], "hess": results[1]}

    def result_names(self):
        return ["grad", "hess"]

    def check_values(self, results, bounds):
        grad, hess = self.of_definition(_reference.cross_entropy_grad_hess, curvature=self.curvature)
        bounds.hold_grad(results["grad"], grad, "grad")
        bounds.hold_diagonal(results["hess"], hess, self.curvature)


LOSSES = (LossAlone, WithGrad, WithGrad, StatsAlone, Product, Diagonal)


def losses(calls):
    """Make calls of one function of the loss family."""
    problem = Problem(calls.dice, calls.memory)
    exercise(calls, calls.dice.choice(LOSSES)(calls, problem))


# ---- log-probabilities that are given


class GivenLogProbs(Loss):
    function = staticmethod(fastce.nll_loss)

    def __init__(self, calls, problem):
        for name in ("label_smoothing", "logit_scale", "softcap", "z_loss"):
            problem.options.pop(name, None)
        super().__init__(calls, problem)

    def call(self, **more):
        more.pop("n_threads", None)
        return super().call(**more)

    def name(self, results):
        return {"loss": results}

    def result_names(self):
        return ["loss"]

    def check_values(self, results, bounds):
        expected = self.of_definition(_reference.nll_loss)
        problem, weighing = self.problem, bounds.work.weighing
        with np.errstate(all="ignore"):
            cost = _reference._times(np.abs(weighing.share), np.abs(bounds.x)).sum(axis=1)
            bounds.cost, bounds.amount = cost, 0 * bounds.amount
            is_too_large = np.isfinite(cost) & (cost > bounds.largest)
        if is_too_large.any():
            return  # its terms cancel, or their sum is infinite
        bounds.hold_loss(results["loss"], expected, f"loss of {problem.dtype}")


def log_probs(calls):
    """Make calls of `nll_loss`."""
    exercise(calls, GivenLogProbs(calls, Problem(calls.dice, calls.memory)))


# ---- softmax


class SoftmaxFamily(Operation):
    """Softmax, log-softmax and log-sum-exp."""

    def __init__(self, calls):
        dice = calls.dice
        self.function_name = dice.choice(("softmax", "log_softmax", "logsumexp"))
        self.function = getattr(fastce, self.function_name)
        shape, self.axis = draw_shape(dice)
        self.rows = (*shape[: self.axis], *shape[self.axis + 1 :])
        self.dtype = dice.choice(LOGITS_DTYPES)
        x, _ = draw_logits(dice, shape, self.axis)
        x = calls.memory.input("x", x, self.dtype)
        self.exact = x.copy()
        keywords = {} if self.axis == len(shape) - 1 and dice.often(0.5) else {"axis": self.axis - len(shape) * dice.often(0.3)}
        self.outs = {} if self.function_name == "logsumexp" else {"result": "out"}
        super().__init__(calls, {"x": x}, keywords)

    def name(self, results):
        return {"result": results}

    def of_rows(self, rows):
        at_class = (*rows[: self.axis], slice(None), *rows[self.axis :])

        def cut(name, value):
            return value[at_class] if np.ndim(value) == len(at_class) else value[rows]

        return self.with_arrays(x=self.arrays["x"][at_class]), ["result"], cut

    def check(self, results):
        x, axis, result = self.exact, self.axis, results["result"]
        is_lse = self.function_name == "logsumexp"
        n = x.shape[axis]
        work = np.float64 if self.dtype == np.float64 else np.float32
        assert result.dtype == (work if is_lse else self.dtype)
        if n == 0:
            assert result.shape == (self.rows if is_lse else x.shape)
            return
        expected = getattr(_reference, self.function_name)(x, axis=axis)
        with np.errstate(all="ignore"):
            wide = x.astype(np.float64)
            size = np.max(np.abs(wide), axis=axis, keepdims=True, where=np.isfinite(wide), initial=0)
            unit = fuzz_truth.unit_of(work, n)
            if is_lse:
                bound = unit * (size.squeeze(axis) + 1 + np.log(n))
            elif self.function_name == "softmax":
                bound = unit * (2 * size + 1 + np.log(n)) * expected
                bound = bound + fuzz_truth.half_unit(expected, self.dtype)
            else:
                bound = unit * (np.abs(expected) + 1 + np.log(n)) + fuzz_truth.half_unit(expected, self.dtype)
        fuzz_truth.hold(result, expected, bound, self.function_name)


def softmaxes(calls):
    """Make calls of one function of the softmax family."""
    exercise(calls, SoftmaxFamily(calls))


# ---- a linear layer


class Linear(Operation):
    """The loss of a linear layer, with or without gradients."""

    def __init__(self, calls):
        dice, memory = calls.dice, calls.memory
        n, d = dice.choice((0, 1, 2, 3, 5, 16, 17, 40)), dice.choice((0, 1, 2, 3, 8, 17))
        n_classes = dice.choice((1, 2, 3, 7, 10, 33, 64, 130))
        self.dtype = dice.choice(LOGITS_DTYPES)
        numbers = dice.numbers
        problem = self.problem = Problem.__new__(Problem)
        problem.dice, problem.memory = dice, memory
        problem.shape, problem.axis, problem.rows, problem.n_classes = (n, n_classes), 1, (n,), n_classes
        problem.options = problem._draw_options()
        if problem.options.get("logit_scale", 1) > 100:
            del problem.options["logit_scale"]
        problem.is_index = dice.often(0.65)
        problem.target = problem._draw_indices() if problem.is_index else problem._draw_probabilities()
        problem.exact_target = problem.target.copy()
        features = numbers.standard_normal((n, d)) * dice.choice((0.1, 1.0, 3.0))
        if dice.often(0.1):
            features = np.where(numbers.random((n, 1)) < 0.2, dice.choice((np.nan, np.inf)), features)
        arrays = {
            "features": memory.input("features", features, self.dtype),
            "linear_weight": memory.input("linear_weight", numbers.standard_normal((n_classes, d)), self.dtype),
            "target": problem.target,
        }
        self.exact = {name: array.copy() for name, array in arrays.items()}
        keywords = dict(problem.options)
        self.bias = None
        if dice.often(0.5):
            bias = memory.input("linear_bias", numbers.standard_normal(n_classes), self.dtype)
            self.bias = bias.copy()
            keywords["linear_bias"] = bias
        if dice.often(0.4):
            keywords["chunk_rows"] = dice.choice((1, 2, 7, 1000))
        self.grad_output = None
        self.with_grad = dice.often(0.7)
        self.function = fastce.linear_cross_entropy_with_grad if self.with_grad else fastce.linear_cross_entropy
        if self.with_grad:
            self.grad_output = problem.draw_grad_output()
            if self.grad_output is not None:
                keywords["grad_output"] = self.grad_output
        super().__init__(calls, arrays, keywords)

    def name(self, results):
        if not self.with_grad:
            return {"loss": results}
        names = ["loss", "grad_features", "grad_linear_weight"]
        if self.bias is not None:
            names.append("grad_linear_bias")
        else:
            assert results[3] is None
        return dict(zip(names, results, strict=False))

    @np.errstate(all="ignore")
    def check(self, results):
        options = self.problem.for_definition()
        del options["axis"]
        if self.grad_output is not None:
            options["grad_output"] = self.grad_output
        features, weight, target = (value.astype(np.float64) if name != "target" else value for name, value in self.exact.items())
        bias = None if self.bias is None else self.bias.astype(np.float64)
        expected = _reference.linear_cross_entropy(features, weight, target, linear_bias=bias, **options)
        logits = features @ weight.T + (0.0 if bias is None else bias)
        bounds = fuzz_truth.Bounds(logits, target, dtype=self.dtype, **options)
        magnitude = np.abs(features) @ np.abs(weight).T + (0.0 if bias is None else np.abs(bias))
        # Products of d numbers are off by d eps times the sum of their magnitudes, in any order.
        bounds.add_error_of_logits(np.max(magnitude, axis=1, initial=0) * bounds.eps * (features.shape[1] + 4))
        bounds.hold_loss(results["loss"], expected.loss, "loss")
        if not self.with_grad:
            return
        error = bounds.grad_bound()
        grad = _reference.cross_entropy(logits, target, **options).grad
        error = error + bounds.eps * (4 + sum(grad.shape)) * np.abs(grad)
        error, features = (np.where(bounds.work.counts, value, 0.0) for value in (error, features))
        pairs = {
            "grad_features": (expected.grad_features, error @ np.abs(weight)),
            "grad_linear_weight": (expected.grad_linear_weight, error.T @ np.abs(features)),
            "grad_linear_bias": (expected.grad_linear_bias, error.sum(axis=0)),
        }
        for name, (value, bound) in pairs.items():
            if value is None:
                continue
            assert results[name].dtype == self.dtype, name
            bound = np.where(np.isfinite(value), bound + fuzz_truth.half_unit(value, self.dtype), np.nan)
            fuzz_truth.hold(results[name], value, bound, name)


def linear(calls):
    """Make calls of the loss of a linear layer."""
    exercise(calls, Linear(calls))


# ---- calls that are wrong


def mistakes(calls):
    """Make a call that is wrong in one respect: it must say so, and write nothing."""
    dice = calls.dice
    problem = Problem(dice, calls.memory)
    operation = dice.choice(LOSSES)(calls, problem)
    operation.as_object = False
    like = problem.logits
    keywords = {keyword: calls.memory.operand(like.shape, like.dtype) for keyword in operation.outs.values()}
    outs = dict(keywords)
    arrays, changes, kinds, word = dict(operation.arrays), {}, ValueError, None
    name = dice.choice([*_WRONG, *_BY_SHAPE])
    if name in _WRONG:
        values, kinds = dice.choice(_WRONG[name])
        word = name
        changes[name] = dice.choice(values)
    else:
        wrong = _BY_SHAPE[name](operation, arrays, outs)
        if wrong is None:
            return
        word, kinds, changes = wrong
    before = [operand.array.tobytes() for operand in keywords.values()]
    arguments = {**operation.keywords, **{k: o.array if hasattr(o, "array") else o for k, o in outs.items()}, **changes}
    if word in ("n_threads",) and operation.function is fastce.nll_loss:
        return
    first = {k: arguments.pop(k, v) for k, v in arrays.items()}
    try:
        calls.make(operation.function, *first.values(), **arguments)
    except DOCUMENTED as error:
        assert isinstance(error, kinds), f"{type(error).__name__} where {kinds} was due: {error}"
        assert word in str(error), f"no word of {word} in: {error}"
    else:
        raise AssertionError(f"{word} was taken")
    calls.check_inputs()
    for (keyword, operand), bytes_before in zip(keywords.items(), before, strict=True):
        assert operand.array.tobytes() == bytes_before and operand.is_unchanged(), f"{keyword} was written to"


_WRONG = {
    "label_smoothing": [((-0.1, 1.5, np.nan, np.inf, 2), ValueError), (("a", None, [], True, 1j, object()), TypeError)],
    "logit_scale": [((0, -1.0, np.nan, np.inf), ValueError), (("a", None, (1, 2), True), TypeError)],
    "softcap": [((0, -1.0, np.nan, np.inf), ValueError), (("a", [1.0, 2.0], True), TypeError)],
    "z_loss": [((-1, np.nan, np.inf), ValueError), (("a", None, True), TypeError)],
    "reduction": [(("avg", "", None, 3, ("mean",), b"mean"), ValueError)],
    "on_empty": [(("NaN", None, 0.0, math.nan), ValueError)],
    "ignore_index": [((2**64, -(2**63) - 1), ValueError), ((1.5, "a", None, True), TypeError)],
    "n_threads": [((0, -1, -(2**40)), ValueError), ((1.5, "a", True), TypeError)],
    "axis": [((7, -8, 2**70), ValueError), ((0.5, "a", True, (1,)), TypeError)],
}


def _wrong_class(operation, arrays, outs):
    problem = operation.problem
    target = problem.target
    info = np.iinfo(target.dtype) if problem.is_index else None
    ignored = problem.options.get("ignore_index", -100)
    if not problem.is_index or not target.size:
        return None
    bad = [problem.n_classes, problem.n_classes + 100, -1, -100, 2**31, -(2**63), 2**63, int(info.max)]
    bad = [c for c in bad if info.min <= c <= info.max and c != ignored and not 0 <= c < problem.n_classes]
    if not bad:
        return None
    dice = operation.calls.dice
    y = target.copy(order="K")
    y[tuple(dice.integer(0, n - 1) for n in y.shape)] = dice.choice(bad)
    arrays["target"] = operation.calls.memory.input("target", y, target.dtype, may_repeat=False)
    return "target", IndexError, {}


def _wrong_logits(operation, arrays, outs):
    x = arrays["logits"]
    dice = operation.calls.dice
    wrong = dice.choice(("int", "complex", "object", "bool", "scalar", "longdouble"))
    with np.errstate(all="ignore"):
        x = np.nan_to_num(x.astype(np.float64))
    if wrong == "scalar":
        arrays["logits"] = np.float32(1)
        return "logits", ValueError, {}
    kinds = {"int": int, "complex": complex, "object": object, "bool": bool, "longdouble": np.longdouble}
    with np.errstate(all="ignore"):
        arrays["logits"] = (np.clip(x, -1e9, 1e9) if wrong == "int" else x).astype(kinds[wrong])
    return "logits", TypeError, {}


def _wrong_target(operation, arrays, outs):
    problem = operation.problem
    dice = operation.calls.dice
    if problem.is_index and problem.rows != problem.shape:
        way = dice.choice((float, bool, object, complex, str, "more"))
        if way == "more":
            arrays["target"] = np.zeros((*problem.rows, 2), int)
            return "target", (TypeError, ValueError), {}
        arrays["target"] = np.zeros(problem.rows).astype(way)
        return "target", (TypeError if way is not float else (TypeError, ValueError)), {}
    arrays["target"] = np.zeros((*problem.shape, 2), problem.target.dtype)
    return "target", (TypeError, ValueError), {}


def _wrong_factors(operation, arrays, outs):
    dice, problem = operation.calls.dice, operation.problem
    name = dice.choice(("weight", "sample_weight"))
    shape = (problem.n_classes,) if name == "weight" else problem.rows
    way = dice.choice(("shape", "number", "kind"))
    if way == "shape":
        return name, ValueError, {name: np.ones((*shape, 2))}
    if way == "kind":
        return name, TypeError, {name: np.ones(shape, dice.choice((complex, object, str, bool)))}
    values = np.ones(shape)
    if not values.size:
        return None
    values.reshape(-1)[dice.integer(0, values.size - 1)] = dice.choice((np.nan, np.inf, -np.inf))
    return name, ValueError, {name: values.astype(dice.choice((np.float64, np.float32, np.float16)))}


def _wrong_out(operation, arrays, outs):
    dice, problem = operation.calls.dice, operation.problem
    if not outs:
        return None
    keyword = dice.choice(list(outs))
    x = problem.logits
    way = dice.choice(("shape", "dtype", "readonly", "repeated", "list", "swapped"))
    if way == "shape":
        outs[keyword] = np.empty((*x.shape, 1), x.dtype)
    elif way == "dtype":
        outs[keyword] = np.empty(x.shape, dice.choice([t for t in LOGITS_DTYPES if t != x.dtype]))
    elif way == "swapped":
        if x.dtype.itemsize == 2:
            return None
        outs[keyword] = np.empty(x.shape, x.dtype.newbyteorder())
    elif way == "readonly":
        outs[keyword] = np.empty(x.shape, x.dtype)
        outs[keyword].flags.writeable = False
    elif way == "repeated":
        if x.size == 0 or max(x.shape) == 1:
            return None
        outs[keyword] = np.lib.stride_tricks.as_strided(np.empty((), x.dtype), x.shape, (0,) * x.ndim)
    else:
        outs[keyword] = x.tolist()
        return keyword, TypeError, {}
    return keyword, ValueError, {}


def _wrong_grad_output(operation, arrays, outs):
    dice, problem = operation.calls.dice, operation.problem
    if operation.function in (fastce.cross_entropy, fastce.cross_entropy_stats):
        return None
    if dice.often(0.5):
        return "grad_output", ValueError, {"grad_output": np.ones((3, *problem.rows))}
    return "grad_output", TypeError, {"grad_output": dice.choice((1j, "a", object(), np.ones(problem.rows, complex)))}


def _wrong_v(operation, arrays, outs):
    if "v" not in arrays:
        return None
    shape = operation.problem.shape
    if operation.calls.dice.often(0.5):
        arrays["v"] = np.ones((*shape, 1))
        return "v", ValueError, {}
    arrays["v"] = np.ones(shape, operation.calls.dice.choice((complex, object)))
    return "v", TypeError, {}


def _wrong_curvature(operation, arrays, outs):
    if not isinstance(operation, Diagonal):
        return None
    return "curvature", ValueError, {"curvature": operation.calls.dice.choice(("newton", None, 3, ("exact",)))}


def _wrong_ignore_index(operation, arrays, outs):
    return None if operation.problem.is_index else ("ignore_index", ValueError, {"ignore_index": 0})


_BY_SHAPE = {
    "class": _wrong_class,
    "logits": _wrong_logits,
    "target": _wrong_target,
    "factors": _wrong_factors,
    "out": _wrong_out,
    "grad_output": _wrong_grad_output,
    "v": _wrong_v,
    "curvature": _wrong_curvature,
    "ignored probabilities": _wrong_ignore_index,
}


def anything(calls):
    """Give an option just anything: a result or a documented exception, and in that case nothing written."""
    dice = calls.dice
    problem = Problem(dice, calls.memory)
    operation = dice.choice(LOSSES)(calls, problem)
    operation.as_object = False
    like = problem.logits
    outs = {keyword: calls.memory.operand(like.shape, like.dtype) for keyword in operation.outs.values()}
    names = ["logits", "target", "axis", "weight", "sample_weight", "ignore_index", "label_smoothing", "reduction"]
    names += ["on_empty", "logit_scale", "softcap", "z_loss", "n_threads", *outs]
    keywords = {**operation.keywords, **{keyword: operand.array for keyword, operand in outs.items()}}
    arrays = dict(operation.arrays)
    for name in dice.sample(names, dice.choice((1, 1, 2))):
        value = dice.choice(_ANYTHING)
        if name in arrays:
            arrays[name] = value
        else:
            keywords[name] = value
    if dice.often(0.5):
        keywords["n_threads"] = 1
    before = [operand.array.tobytes() for operand in outs.values()]
    try:
        calls.make(operation.function, *arrays.values(), **keywords)
    except DOCUMENTED as error:
        assert str(error), "an exception without a message"
        for (keyword, operand), bytes_before in zip(outs.items(), before, strict=True):
            assert operand.array.tobytes() == bytes_before, f"{keyword} was written to"
    for keyword, operand in outs.items():
        operand.take_result()
        assert operand.is_unchanged(), f"bytes around {keyword} were written to"
    calls.check_inputs()


_ANYTHING = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**40, 2**64, 2**100, -(2**100), 0.0, 0.5, 1.0, -1.0, 1e39, 1e-46, 1e308,
    1e-320, math.inf, -math.inf, math.nan, 1j, "mean", "none", "", "1", b"1", (), [], [1.0], [1], (1, 2), {}, {1: 2},
    set(), object(), int, len, Fraction(1, 3), Decimal("0.5"), np.float16(0.5), np.float32(0.5), np.float64(0.5),
    np.longdouble(0.5), np.int8(1), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1), np.datetime64("2024-01-01"),
    np.array(0.5), np.array(1), np.array([0.5]), np.array([[1.0, 2.0]]), np.array("a"), np.array(None), np.zeros(0),
    np.zeros((0, 3)), np.zeros((2, 0)), np.ones((1, 1, 1, 1, 1, 1)), np.ones(3, ">f8"), np.ones(2, "f4,f4"),
    np.ma.masked_array([1.0]), slice(3), Ellipsis,
    [[1.0], [1.0, 2.0]], [object()], range(3), memoryview(b"abc"), bytearray(b"abc"),
)  # fmt: skip


FAMILIES = (*(losses,) * 11, *(softmaxes,) * 3, log_probs, linear, *(mistakes,) * 2, anything)
