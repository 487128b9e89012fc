"""From a public function to the backend of its arrays, and from a rule that is broken to what follows.

Design
------
1. A call goes to the compiled `call` as it is: that is all for NumPy arrays and plain numbers.
2. If it breaks a rule, everything is taken in first: numbers, names and arrays of others become Python's own and
   NumPy's (or CuPy's). That runs their code, which may change any other argument, so all are views that nobody else
   has; then `call` looks again. What it still cannot read is converted, and whatever else it says is an error
   (`_messages`).
3. Arrays on a GPU go the second way. `call` checks views of their bounds, and the GPU's backend computes.
4. Weights far from 1 are scaled by powers of two, which is exact. Else the sum that a mean divides by need not be a
   normal number, and a product of two weights may leave the type although the result would be in it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastce import _cpu
from fastce._array import Array, array_module, bounds_view, device_of, is_synchronous, take_in
from fastce._cpu._rules import RuleError
from fastce._messages import Broken, class_error, exception_for, row_shape
from fastce._options import NUMBERS_AND_NAMES, OPTIONS, as_integer

# What the compiled `call` computes: see there.
LOSS: int = _cpu.kernels.LOSS
NLL: int = _cpu.kernels.NLL
GRAD: int = _cpu.kernels.GRAD
STATS: int = _cpu.kernels.STATS
PRODUCT: int = _cpu.kernels.PRODUCT
DIAGONAL: int = _cpu.kernels.DIAGONAL
NORMALIZER: int = _cpu.kernels.NORMALIZER

_INT64 = np.iinfo(np.int64)

# The arrays of a call, in the order in which they are taken in.
_ARRAYS = ("logits", "target", "weight", "sample_weight", "v", "out", "hess_out", "grad_output")
_RESULTS = ("out", "hess_out")
# What is computed for NumPy arrays only.
_ON_HOST = (PRODUCT, DIAGONAL)


class CrossEntropyStats(NamedTuple):
    """Per-row statistics of the softmax after `logit_scale` and `softcap`, each of the shape of an index target.

    Skipped rows hold 0, 0, -1 and 0.
    """

    lse: Array
    """log of the sum of the exponentials; float64 for float64 logits, else float32."""
    log_prob: Array
    """log p_y, or sum_c t_c log p_c under class probabilities; dtype of `lse`."""
    argmax: NDArray[np.int64]
    """The most probable class, the first of equals; int64; -1 where there is none (NaN)."""
    entropy: Array
    """-sum_c p_c log p_c in nats; dtype of `lse`."""


class Arguments(NamedTuple):
    """The arguments of the compiled `call`, after what it computes; see there."""

    logits: Any
    target: Any
    axis: Any
    weight: Any
    sample_weight: Any
    options: tuple[Any, ...]
    n_threads: Any
    grad_output: Any = None
    out: Any = None
    make_stats: Callable[..., Any] | None = None
    v: Any = None
    hess_out: Any = None
    curvature: tuple[Any, ...] | None = None
    is_taken_in: bool = False
    is_scaled: bool = False

    def by_name(self) -> dict[str, Any]:
        """Return all arguments by their names."""
        return self._asdict() | dict(zip(NUMBERS_AND_NAMES, self.options, strict=True))


def call(*arguments: Any) -> Any:
    """Compute the first argument, of the others: those of the compiled `call`."""
    try:
        return _cpu.kernels.call(*arguments)
    except RuleError:
        pass
    what, *others = arguments
    return _call_again(what, Arguments(*others))


def _call_again(what: int, given: Arguments) -> Any:
    """Compute what was given with something that breaks a rule, or raise its exception."""
    options, n_threads, axis = plain_options(given.options, given.n_threads, given.axis)
    xp = np if what in _ON_HOST else array_module(given.logits)
    like = "log_probs" if what == NLL else "logits"  # what the caller calls them
    names = {name: like if name == "logits" else name for name in _ARRAYS if name != "v" or what == PRODUCT}
    taken = take_in(xp, [(word, getattr(given, name)) for name, word in names.items()])
    arrays: dict[str, Any] = {name: taken[word] for name, word in names.items() if word in taken}
    arguments = given._replace(options=options, n_threads=n_threads, axis=axis, **arrays)
    if xp is np:
        results, arguments = settle(what, arguments, like)
    else:
        _, arguments = settle(NORMALIZER, arguments, like)
        results = _launch_gpu(what, arguments)
    # The very objects that were given, not views of them.
    own = {id(getattr(arguments, name)): getattr(given, name) for name in _RESULTS if getattr(given, name) is not None}
    if type(results) is tuple:
        return tuple(own.get(id(result), result) for result in results)
    return own.get(id(results), results)


def plain_options(
    options: tuple[Any, ...], n_threads: Any, axis: Any
) -> tuple[tuple[Any, ...], int | None, int | None]:
    """Return options as numbers and strings of Python's own types, after all checks that need no arrays."""
    given = {**dict(zip(NUMBERS_AND_NAMES, options, strict=True)), "n_threads": n_threads, "axis": axis}
    plain = dict(given)
    while True:
        try:
            numbers_and_names = tuple(plain[name] for name in NUMBERS_AND_NAMES)
            _cpu.kernels.check_options(numbers_and_names, plain["n_threads"], plain["axis"])
        except RuleError as error:
            broken = Broken(*error.args)
        else:
            return numbers_and_names, plain["n_threads"], plain["axis"]
        convert = OPTIONS[broken.name].convert
        if broken.rule != "kind" or convert is None:
            raise exception_for(broken, given)
        plain[broken.name] = convert(given[broken.name], broken.name)


def settle(what: int, arguments: Arguments, like: str = "logits") -> tuple[Any, Arguments]:
    """Compute something of arguments that were taken in; return it, and the arguments that it was computed of.

    For arrays on a GPU nothing is computed: they are checked only. `like` is what messages call the logits.
    """
    arguments = arguments._replace(is_taken_in=True)
    on_gpu = array_module(arguments.logits) is not np
    while True:
        try:
            if not on_gpu:
                return _cpu.kernels.call(what, *arguments), arguments
            far = _check_on_gpu(what, arguments)
            if not far:
                return None, arguments
            broken = Broken("far", "weight", far, None)
        except RuleError as error:
            broken = Broken(*error.args)
        if broken.rule == "conversion":
            arguments = _convert(arguments, broken.name)
        elif broken.rule == "far":
            arguments = _scale_weights(arguments, int(broken.value))
        else:
            in_place = () if broken.name == "hess_out" else ("logits",) if arguments.v is None else ("logits", "v")
            raise exception_for(broken, arguments.by_name(), like=like, in_place=in_place)


def _check_on_gpu(what: int, arguments: Arguments) -> int:
    """Check arrays on a GPU by their bounds, and weights if that may be waited for; return which are far from 1."""
    bounds: dict[str, Any] = {name: bounds_view(getattr(arguments, name)) for name in _ARRAYS}
    _cpu.kernels.call(what, *arguments._replace(**bounds), on_gpu=True)
    far = 0
    if is_synchronous() and not arguments.is_scaled:
        rounds = arithmetic(arguments.logits.dtype) == np.float32
        for bit, name in ((1, "weight"), (2, "sample_weight")):
            factors = getattr(arguments, name)
            if factors is not None and _cpu.kernels.is_far(factors.get(), name, rounds and name == "weight"):
                far |= bit
    return far


def _convert(arguments: Arguments, name: str) -> Arguments:
    """Convert an array to a type that the kernels read."""
    dtype = arithmetic(arguments.logits.dtype) if name in ("target", "v") else np.dtype(np.float64)
    with np.errstate(over="ignore", under="ignore"):  # infinities are results like others, or refused later
        converted = getattr(arguments, name).astype(dtype)
    return arguments._replace(**{name: converted})


def _scale_weights(arguments: Arguments, far: int) -> Arguments:
    """Return arguments whose weights are not far from 1, for the same loss and gradient.

    The loss of a row is a (sum of w n + z lse^2), and a mean divides by the sum of a w, or of a under probabilities. So
    what divides w divides z, too, and multiplies a, but for a mean over class indices, which does not change; and no
    mean changes with what divides a. Of `far` bit 1 stands for w, and bit 2 for a.
    """
    given = arguments.by_name()
    weight, sample_weight, z_loss = arguments.weight, arguments.sample_weight, given["z_loss"]
    xp = array_module(arguments.logits)
    is_mean = given["reduction"] == "mean"
    of_sample_weight = _exponent(sample_weight) if far & 2 else 0
    if far & 1 and not (is_mean and arguments.target.dtype.kind not in "iu"):
        of_weight = _exponent(weight)
        rows = xp.ones(row_shape(given)) if sample_weight is None else sample_weight.astype(np.float64)
        moved = rows if is_mean else _ldexp(rows, of_weight)
        if np.isfinite(moved).all() and ((moved == 0) == (rows == 0)).all():
            sample_weight = sample_weight if is_mean else moved
            weight = _ldexp(weight.astype(np.float64), -of_weight)
            z_loss = min(float(_ldexp(np.float64(z_loss), -of_weight)), float(np.finfo(np.float64).max))
    if of_sample_weight and is_mean:
        moved = _ldexp(sample_weight.astype(np.float64), -of_sample_weight)
        least = np.copysign(np.finfo(np.float64).smallest_subnormal, sample_weight)
        sample_weight = xp.where((moved == 0) & (sample_weight != 0), least, moved)  # rows of weight 0 are skipped
    options = tuple(z_loss if name == "z_loss" else given[name] for name in NUMBERS_AND_NAMES)
    return arguments._replace(weight=weight, sample_weight=sample_weight, options=options, is_scaled=True)


def _exponent(factors: Array) -> int:
    return int(np.frexp(max(float(factors.max()), -float(factors.min())))[1])


def _ldexp(array: Any, exponent: int) -> Any:
    with np.errstate(over="ignore", under="ignore"):
        return array_module(array).asarray(np.ldexp(array, exponent))  # for NumPy makes a scalar of no dimensions


# ----- the GPU


def _launch_gpu(what: int, arguments: Arguments) -> Any:
    """Start a checked call on the GPU; return its results, which are not computed yet."""
    from fastce import _cuda  # needs CuPy, which whoever has such arrays has

    given = arguments.by_name()
    logits, target, reduction = arguments.logits, arguments.target, given["reduction"]
    xp = array_module(logits)
    axis = _cpu.kernels.find_axis(logits.ndim, arguments.axis, min(logits.ndim - 1, 1))
    rows, dtype = row_shape(given), arithmetic(logits.dtype)
    is_prob = target.dtype.kind not in "iu"
    n_classes, ignore_index = logits.shape[axis], given["ignore_index"]
    on_empty = np.nan if given["on_empty"] == "nan" else 0.0
    grad = stats = None
    with device_of(logits):
        if what == GRAD:
            grad = xp.empty_like(logits, order="K", subok=None) if arguments.out is None else arguments.out
        if arguments.make_stats is not None:
            stats = arguments.make_stats(*(xp.empty(rows, kind) for kind in (dtype, dtype, np.int64, dtype)))
    factors = arguments.grad_output
    factor = float(factors) if isinstance(factors, np.ndarray) else 1.0
    if 0 in rows:
        value = on_empty if reduction == "mean" else 0.0
        with device_of(logits):
            loss = xp.full(rows if reduction == "none" else (), value, dtype)
    else:
        loss = _cuda.run(
            put_last(logits, axis),
            None if is_prob else target,
            put_last(target, axis) if is_prob else None,
            None if grad is None else put_last(grad, axis),
            weight=_as_vector(arguments.weight, xp, dtype),
            sample_weight=_as_vector(arguments.sample_weight, xp),
            grad_output=None if isinstance(factors, np.ndarray) else _as_vector(factors, xp),
            factor=factor,
            reduction=reduction,
            on_empty=on_empty,
            loss_dtype=dtype,
            **({} if stats is None else stats._asdict()),
            normalized=what == NLL,
            ignore_index=_comparable(ignore_index, target.dtype),
            label_smoothing=given["label_smoothing"],
            z_loss=given["z_loss"],
            logit_scale=given["logit_scale"],
            softcap=given["softcap"] or 0.0,
            make_error=None if is_prob else lambda row: class_error(target, row, n_classes, ignore_index),
            wait=is_synchronous(),
        )
    if what == STATS:
        return stats
    if grad is None:
        return loss
    return (loss, grad) if stats is None else (loss, grad, stats)


def _as_vector(array: Any, xp: Any, dtype: Any = None) -> Any:
    """Return the elements one after the other, in C order."""
    return None if array is None else xp.ascontiguousarray(array, dtype).reshape(-1)


def _comparable(ignore_index: int, dtype: np.dtype[Any]) -> int:
    """Return ignore_index as int64: with the bits of a uint64 if targets are such, else a number that no target is."""
    if dtype.kind == "u" and dtype.itemsize == 8:
        return (ignore_index - _INT64.min) % 2**64 + _INT64.min
    return ignore_index if ignore_index <= _INT64.max else _INT64.min


# ----- for functions that are more than a loss


def arithmetic(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that logits of the given one are computed in, which is that of losses and statistics."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def put_last(array: Array, axis: int) -> Array:
    """Return a view with the given axis last."""
    return array if axis == array.ndim - 1 else np.moveaxis(array, axis, -1)


def check_array(array: Array, name: str) -> None:
    """Refuse arrays that the kernels do not know."""
    _check("check_array", bounds_view(array), name, not isinstance(array, np.ndarray), given={name: array})


def find_axis(axis: int | None, n_dims: int, default: int) -> int:
    """Return an axis as a number that is not negative."""
    number: int = _check("find_axis", n_dims, axis, default, given={"axis": axis})
    return number


def check_n_threads(n_threads: int | None) -> int | None:
    """Return None or a positive integer."""
    if n_threads is None:
        return None
    plain = as_integer(n_threads, "n_threads")
    _check("find_n_threads", plain, given={"n_threads": plain})
    return plain


def find_result(out: Any, like: Array, name: str, inputs: Sequence[tuple[str, Array]], *, in_place: bool) -> Array:
    """Return where a result goes: `out` if it fits, else a new array in the memory order of `like`, of this name."""
    xp = array_module(like)
    if out is None:
        with device_of(like):
            new: Array = xp.empty_like(like, order="K", subok=False if xp is np else None)
        return new
    bounds = [(word, bounds_view(array)) for word, array in inputs]
    place = bounds_view(out) if isinstance(out, type(like)) else out
    given = {"logits": like, "out": out}
    arguments = place, bounds_view(like), bounds, in_place, xp is not np
    _check("check_result", *arguments, given=given, like=name, in_place=(name,) if in_place else ())
    result: Array = out
    return result


def _check(rule: str, *arguments: Any, given: dict[str, Any], **words: Any) -> Any:
    """Call one of the compiled checks."""
    try:
        return getattr(_cpu.kernels, rule)(*arguments)
    except RuleError as error:
        broken = Broken(*error.args)
    raise exception_for(broken, given, **words)


def try_along_axis(x: Any, axis: Any, n_threads: Any, out: Any, **kind: bool) -> Array | None:
    """Return the softmax along an axis, or its logarithm; None if that breaks a rule: if `axis` is several, say."""
    try:
        result: Array = _cpu.kernels.along_axis(x, axis, n_threads, out, **kind)
    except RuleError:
        return None
    return result


def along_axis(x: Array, *, n_threads: int | None, **outputs: Any) -> None:
    """Write the softmax along the last axis, or its logarithm, to `out`, or the log-sum-exp to `lse`."""
    if isinstance(x, np.ndarray):
        _cpu.kernels.along_axis(x, x.ndim - 1, n_threads, **outputs)
        return
    from fastce import _cuda

    _cuda.run(x, **outputs)


def total(values: NDArray[Any]) -> float:
    """Return the float64 sum of contiguous numbers, the same whatever the number of threads."""
    result: float = _cpu.kernels.total(values)
    return result
