"""The families of functions, one class for each function: how to call it, and what the definition says."""

from typing import ClassVar

import ml_dtypes
import numpy as np
from scipy import sparse

import fastce
import fuzz_truth
from fastce import _reference
from fastce._curvature import CURVATURES
from fuzz_calls import Operation, exercise
from fuzz_problems import (
    FLOATS,
    INTEGERS,
    LOGITS_DTYPES,
    Problem,
    as_dtype_that_holds,
    draw_logits,
    draw_shape,
    draw_weights,
)

STATS = fastce.CrossEntropyStats._fields
GRADS = ("features", "linear_weight", "linear_bias")


class Loss(Operation):
    """Any function of the loss family."""

    def __init__(self, calls, problem):
        dice = calls.dice
        self.problem, self.rows, self.axis = problem, problem.rows, problem.axis
        keywords = {**problem.axis_given, **problem.options}
        super().__init__(calls, {"logits": problem.logits, "target": problem.target}, keywords)
        # By a CrossEntropyLoss; what of these is given to its call is not an option of its own.
        self.as_object = dice.often(0.15)
        self.at_call = (*self.own, *self.outs.values(), *(["sample_weight"] if dice.often(0.5) else []))
        self.draw()
        self.convert()

    def draw(self):
        """Draw what the function takes besides."""

    def convert(self):
        """Give what is no array now and then."""
        dice = self.calls.dice
        if self.problem.is_index and self.arrays["target"].size and dice.often(0.03):
            self.arrays["target"] = self.arrays["target"].tolist()
        if not self.outs and self.problem.dtype == np.float64 and self.problem.logits.size and dice.often(0.03):
            self.arrays["logits"] = self.arrays["logits"].tolist()

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
        own = {name: keywords.pop(name) for name in self.at_call if name in keywords}
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
        if problem.reduction == "mean" or not all(isinstance(value, np.ndarray) for value in self.arrays.values()):
            return None
        at_class = (*rows[: self.axis], slice(None), *rows[self.axis :])

        def cut(name, value):
            return value[at_class] if np.ndim(value) == len(at_class) else value[rows]

        arrays = {name: cut(name, value) for name, value in self.arrays.items()}
        few = self.with_arrays(**arrays)
        few.keywords = dict(self.keywords)
        for name in ("sample_weight", "grad_output"):
            value = few.keywords.get(name)
            if value is not None and (name == "sample_weight" or np.ndim(value)):
                few.keywords[name] = value[rows]
        names = [name for name in self.result_names() if not (name == "loss" and problem.reduction == "sum")]
        return few, names, cut

    def result_names(self):
        """Return the names of all results."""
        raise NotImplementedError


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
    own = ("grad_output", "return_stats")
    outs: ClassVar = {"grad": "out"}

    def draw(self):
        self.add_grad_output()
        self.has_stats = self.calls.dice.often(0.4)
        if self.has_stats:
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
    outs: ClassVar = {"product": "out"}

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
    outs: ClassVar = {"grad": "out", "hess": "hess_out"}

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
        problem, weighing = self.problem, bounds.work.rows.weighing
        with np.errstate(all="ignore"):
            cost = _reference._times(np.abs(weighing.share), np.abs(bounds.x)).sum(axis=1)
            bounds.cost, bounds.amount = cost, 0 * bounds.amount
            numbers = np.where(np.isfinite(bounds.x), bounds.x, 0)
            is_too_large = _reference._times(np.abs(weighing.share), np.abs(numbers)).sum(axis=1) > bounds.largest
        if is_too_large.any():
            return  # its terms cancel, or their sum is infinite, of either sign
        bounds.hold_loss(results["loss"], expected, f"loss of {problem.dtype}")


def log_probs(calls):
    """Make calls of `nll_loss`."""
    exercise(calls, GivenLogProbs(calls, Problem(calls.dice, calls.memory)))


# ---- softmax


def _lse_of_rows(rows):
    return np.broadcast_to(_reference._softmax_of_rows(rows).lse, rows.shape)


class SoftmaxFamily(Operation):
    """Softmax, log-softmax and log-sum-exp, along one axis, several or all."""

    def __init__(self, calls):
        dice = calls.dice
        self.function_name = dice.choice(("softmax", "log_softmax", "logsumexp"))
        self.function = getattr(fastce, self.function_name)
        self.is_lse = self.function_name == "logsumexp"
        shape, axis = draw_shape(dice)
        x, _ = draw_logits(dice, shape, axis)
        dtype = dice.choice(LOGITS_DTYPES)
        if dice.often(0.03):
            shape, axis, x = (), -1, x.flat[0] if x.size else np.float64(1)
        if self.is_lse and dice.often(0.08):
            dtype, x = dice.choice(INTEGERS), np.rint(np.clip(np.nan_to_num(x), 0, 100))
        x = calls.memory.input("x", x, dtype)
        self.exact, self.shape = x.copy(), shape
        n_dims = max(1, len(shape))
        self.axes = (axis % n_dims,)
        keywords = (
            {} if self.axes == (n_dims - 1,) and dice.often(0.5) else {"axis": axis % n_dims - n_dims * dice.often(0.3)}
        )
        if dice.often(0.2):
            self.axes = tuple(dice.sample(range(n_dims), dice.integer(0, n_dims)))
            keywords = {"axis": tuple(k - n_dims * dice.often(0.3) for k in self.axes)}
        if dice.often(0.1):
            self.axes, keywords = tuple(range(n_dims)), {"axis": None}
        self.rows = tuple(n for k, n in enumerate(shape or (1,)) if k not in self.axes)
        self.outs = {"result": "out"}
        self.out_dtype, self.out_shape = dtype, shape
        if self.is_lse:
            self.out_shape = self.rows
            self._draw_of_sums(calls, keywords)
            # As NumPy promotes, with at least float32; integers alone are float64.
            given = [dtype] if self.b is None else [dtype, self.b.dtype]
            given = [np.dtype(np.float32) if t in (np.float16, ml_dtypes.bfloat16) else t for t in given]
            is_single = np.result_type(*given) == np.float32
            self.out_dtype = np.dtype(np.float32 if is_single else np.float64)
        super().__init__(calls, {"x": x}, keywords)

    def _draw_of_sums(self, calls, keywords):
        """Draw what only `logsumexp` takes."""
        dice = calls.dice
        self.b = None
        if dice.often(0.2):
            keywords["keepdims"] = True
            self.out_shape = tuple(1 if k in self.axes else n for k, n in enumerate(self.shape or (1,)))
        if dice.often(0.3) and len(self.shape) > 0 and np.prod(self.rows) <= 64:
            values = draw_weights(dice, self.shape[dice.integer(0, len(self.shape)) :])
            keywords["b"] = calls.memory.input("b", values, as_dtype_that_holds(dice, values))
            self.b = keywords["b"].copy()
        if dice.often(0.3):
            keywords["return_sign"] = True

    def like_out(self):
        return np.broadcast_to(np.empty((), self.out_dtype), self.out_shape)

    def in_place_names(self):
        return [] if self.is_lse else ["x"]

    def name(self, results):
        return (
            dict(zip(("result", "sign"), results, strict=True))
            if "return_sign" in self.keywords
            else {"result": results}
        )

    def of_rows(self, rows):
        if self.is_lse and (self.b is not None or "keepdims" in self.keywords):
            return None
        kept = iter(rows)
        place = tuple(slice(None) if k in self.axes else next(kept) for k in range(len(self.shape)))

        def cut(name, value):
            return value[rows if self.is_lse else place]

        few = self.with_arrays(x=self.arrays["x"][place])
        return few, ["result", "sign"] if "return_sign" in self.keywords else ["result"], cut

    @np.errstate(all="ignore")
    def check(self, results):
        x, axes, result = self.exact, self.axes, results["result"]
        assert result.dtype == self.out_dtype
        assert result.shape == self.out_shape
        wide = np.atleast_1d(x).astype(np.float64)
        size = np.max(np.abs(wide), axis=axes, keepdims=True, where=np.isfinite(wide), initial=0)
        n = int(np.prod([wide.shape[k] for k in axes]))
        work = np.float64 if self.out_dtype == np.float64 else np.float32
        unit, spread = fuzz_truth.unit_of(work, n), 1 + np.log(max(1, n))
        if self.is_lse:
            self._check_sums(results, wide, unit, size, spread)
            return
        expected = getattr(_reference, self.function_name)(x, axis=axes).reshape(self.shape)
        size = np.broadcast_to(size, wide.shape).reshape(self.shape)
        if self.function_name == "softmax":
            bound = unit * (2 * size + spread) * expected
        else:
            bound = unit * (np.abs(expected) + spread)
        fuzz_truth.hold(result, expected, bound + fuzz_truth.half_unit(expected, self.out_dtype), self.function_name)

    def _check_sums(self, results, x, unit, size, spread):
        """Hold log-sum-exp, and the sums' signs. What cancels makes the logarithm worse by as much."""
        b = np.ones(()) if self.b is None else self.b.astype(np.float64)
        if self.b is None:
            soft = _reference._along(x, self.axes, _lse_of_rows)
            expected = soft.max(axis=self.axes) if soft.size else np.full(self.rows, -np.inf)
            sign = np.where(np.isnan(expected), np.nan, expected > -np.inf)
            cancels = 1.0
        else:
            expected, sign = _reference.logsumexp(x, axis=self.axes, b=b, return_sign=True)
            top = np.max(np.where(b == 0, -np.inf, x), axis=self.axes, keepdims=True, initial=-np.inf)
            terms = _reference._times(np.broadcast_to(b, x.shape), np.exp(x - np.where(np.isfinite(top), top, 0)))
            cancels = np.abs(terms).sum(axis=self.axes) / np.abs(terms.sum(axis=self.axes))
            if "return_sign" not in self.keywords:
                expected = np.where(sign < 0, np.nan, expected)
        is_sure = ~(cancels * unit > 1 / 8)
        size = np.abs(expected) + size.max(axis=self.axes, initial=0)
        bound = np.where(is_sure, unit * (size + spread) * cancels, np.nan)
        bound = np.where(np.isfinite(expected), bound, np.where(is_sure, 0.0, np.nan))
        fuzz_truth.hold(results["result"].reshape(self.rows), np.reshape(expected, self.rows), bound, "log of sum")
        if "sign" in results:
            given = results["sign"].reshape(self.rows)
            fuzz_truth.hold(given, np.reshape(sign, self.rows), np.where(is_sure, 0.0, np.nan), "sign")


def softmaxes(calls):
    """Make calls of one function of the softmax family."""
    exercise(calls, SoftmaxFamily(calls))


# ---- a linear layer


class LinearProblem(Problem):
    """Features, the weight and the bias of a linear layer, of any number of leading dimensions and positions."""

    def __init__(self, dice, memory):
        self.dice, self.memory = dice, memory
        lead = dice.choice(((), (0,), (1,), (2,), (3,), (5,), (16,), (17,), (40,), (2, 3), (1, 2, 2)))
        positions = dice.choice(((), (), (), (1,), (3,), (2, 2)))
        n_classes, n_features = dice.choice((1, 2, 3, 7, 10, 33, 64, 130)), dice.choice((0, 1, 2, 3, 8, 17))
        self.shape, self.axis = (*lead, n_classes, *positions), len(lead)
        self.rows, self.n_classes = (*lead, *positions), n_classes
        self.dtype = dice.choice(LOGITS_DTYPES)
        self.options = self._draw_options()
        self.is_index = dice.often(0.65)
        self.target = self._draw_indices() if self.is_index else self._draw_probabilities()
        features = dice.numbers.standard_normal((*lead, n_features)) * dice.choice((0.1, 1.0, 3.0))
        if dice.often(0.1):
            features = np.where(dice.numbers.random((*lead, 1)) < 0.2, dice.choice((np.nan, np.inf)), features)
        weight = dice.numbers.standard_normal((n_classes, *positions, n_features))
        self.features = memory.input("features", features, self.dtype)
        self.linear_weight = memory.input("linear_weight", weight, self.dtype)
        self.exact_target, self.exact_features = self.target.copy(), self.features.copy()
        self.exact_weight = self.linear_weight.copy()
        self.bias = self.exact_bias = None
        if dice.often(0.5):
            self.bias = memory.input("linear_bias", dice.numbers.standard_normal((n_classes, *positions)), self.dtype)
            self.exact_bias = self.bias.copy()


class Linear(Operation):
    """The loss of a linear layer, with or without gradients."""

    def __init__(self, calls):
        dice = calls.dice
        problem = self.problem = LinearProblem(dice, calls.memory)
        features = problem.features
        if problem.dtype.itemsize >= 4 and features.ndim == 2 and dice.often(0.15):
            features = sparse.csr_array(features)
        arrays = {"features": features, "linear_weight": problem.linear_weight, "target": problem.target}
        keywords = dict(problem.options)
        if problem.bias is not None:
            keywords["linear_bias"] = problem.bias
        if dice.often(0.4):
            keywords["chunk_rows"] = dice.choice((1, 2, 7, 1000))
        self.has_stats = dice.often(0.25)
        if self.has_stats:
            keywords["return_stats"] = True
        self.grad_output = None
        self.with_grad = dice.often(0.7)
        self.function = fastce.linear_cross_entropy_with_grad if self.with_grad else fastce.linear_cross_entropy
        self.wrt = GRADS
        if self.with_grad:
            self.grad_output = problem.draw_grad_output()
            if self.grad_output is not None:
                keywords["grad_output"] = self.grad_output
            if dice.often(0.3):
                self.wrt = tuple(dice.sample(GRADS, dice.integer(0, 3)))
                keywords["wrt"] = self.wrt
        super().__init__(calls, arrays, keywords)

    def name(self, results):
        if not isinstance(results, tuple):
            return {"loss": results}
        named = {"loss": results[0]}
        if self.with_grad:
            for name, grad in zip(GRADS, results[1:4], strict=True):
                is_there = name in self.wrt and (name != "linear_bias" or self.problem.bias is not None)
                assert (grad is not None) == is_there, name
                if is_there:
                    named[name] = grad
        return {**named, **results[-1]._asdict()} if self.has_stats else named

    @np.errstate(all="ignore")
    def check(self, results):
        problem = self.problem
        options = {**problem.options, "axis": problem.axis}
        if self.grad_output is not None:
            options["grad_output"] = self.grad_output
        features, weight = problem.exact_features.astype(np.float64), problem.exact_weight.astype(np.float64)
        bias = np.zeros(()) if problem.bias is None else problem.exact_bias.astype(np.float64)
        target = problem.exact_target
        expected = _reference.linear_cross_entropy(features, weight, target, linear_bias=bias, **options)
        logits = np.tensordot(features, weight, (-1, -1)) + bias
        bounds = fuzz_truth.Bounds(logits, target, dtype=problem.dtype, **options)
        # A product of n numbers is off by n eps times the sum of their magnitudes, whatever the order.
        magnitude = np.tensordot(np.abs(features), np.abs(weight), (-1, -1)) + np.abs(bias)
        magnitude = _reference._to_rows(magnitude, problem.axis).max(axis=1, initial=0)
        bounds.add_error_of_logits(magnitude * bounds.eps * (features.shape[-1] + 4))
        bounds.hold_loss(results["loss"], expected.loss, "loss")
        if self.has_stats:
            stats = fastce.CrossEntropyStats(*(results[name] for name in STATS))
            bounds.hold_stats(stats, expected.stats, "stats")
        if not self.with_grad:
            return
        grad = _reference.cross_entropy(logits, target, **options).grad
        n_products = 4 + sum(grad.shape)
        error = bounds.like_logits(bounds.grad_bound()) + bounds.eps * n_products * np.abs(grad)
        lead, of_class = problem.axis, tuple(range(problem.axis, grad.ndim))
        counts = np.expand_dims(bounds.work.counts.reshape(problem.rows), problem.axis)
        error = np.where(counts, error, 0.0)
        is_kept = counts.any(axis=of_class)[..., None]
        features = np.where(is_kept, np.abs(features), 0.0)
        rows = tuple(range(lead))
        grads = {
            "features": (
                expected.grad_features,
                np.tensordot(error, np.abs(weight), (of_class, tuple(range(weight.ndim - 1)))),
            ),
            "linear_weight": (expected.grad_linear_weight, np.tensordot(error, features, (rows, rows))),
            "linear_bias": (expected.grad_linear_bias, error.sum(axis=rows)),
        }
        for name, (value, bound) in grads.items():
            if name in results:
                assert results[name].dtype == problem.dtype, name
                bound = np.where(np.isfinite(value), bound + fuzz_truth.half_unit(value, problem.dtype), np.nan)
                fuzz_truth.hold(results[name], value, bound, name)


def linear(calls):
    """Make calls of the loss of a linear layer."""
    exercise(calls, Linear(calls))


FAMILIES = (*(losses,) * 11, *(softmaxes,) * 3, log_probs, linear)
