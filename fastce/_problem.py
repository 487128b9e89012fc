"""The rules: arguments are checked and completed here, once, into one immutable problem.

Design
------
1. Nothing below this floor checks again, and nothing is written before everything here has passed. The one check that
   has to look at every row, whether its class exists, is left to the backend's scan, which also adds up the normalizer.
2. Backends see one shape: the class axis last, class indices as contiguous int64, per-row factors as contiguous float32
   or float64, class weights in the arithmetic's dtype, which is float32 for logits of 16 bits. A GPU takes class
   indices as they are, and the numbers in its arrays are not looked at unless the caller is willing to wait.
3. Every message has one form: the argument, the rule, what was got, and what to do where that can be told.
4. Code of others runs first: whatever makes numbers of options and arrays of arguments. Only then are shapes looked at.
5. Weights far from 1 are scaled by powers of two, which is exact. Else the sum that a mean divides by need not be a
   normal number, and a product of two weights may leave the type although the result would be in it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce._array import (
    Array,
    address_of,
    array_module,
    check_array,
    check_result,
    device_of,
    may_look_at,
    outline,
    take_in,
)
from fastce._options import DEFAULT_IGNORE_INDEX, INT64, Options, check_integer, check_options, check_scales

Shape = tuple[int, ...]

# By name: bfloat16 comes from a package, ml_dtypes, that need not be there.
DTYPES = ("float32", "float64", "float16", "bfloat16")

# Candidate solutions that a search for shared elements may look at. Any: NumPy's stubs know -1 and 0 only.
_MAX_WORK: Any = 100_000

# Weights are scaled if the largest is larger than this, or smaller than the inverse. Those of ordinary calls, which are
# checked in C, are not: there all weights but 0 are between these bounds.
_FAR = 2.0**40

# Arguments that no result may overlap.
_INPUTS = ("target", "weight", "sample_weight", "grad_output")


class Problem(NamedTuple):
    """A call with everything checked and completed.

    `target` holds class indices and `prob` class probabilities; one of the two is None. `ignore_index` is the option's
    value as it compares with `target`. `grad_output` is a float, or an array under ``reduction="none"``. `given` has
    the arrays as the caller knows them, by name, as far as there are such.
    """

    logits: Array
    target: NDArray[np.int64] | None
    prob: Array | None
    given: dict[str, Array]
    ignore_index: int
    weight: Array | None
    sample_weight: Array | None
    grad_output: float | Array
    options: Options
    row_shape: Shape

    @property
    def inputs(self) -> list[tuple[str, Array]]:
        """The arrays that no result may overlap, with their names."""
        return [(name, self.given[name]) for name in _INPUTS if name in self.given]


def check_problem(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int | None,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    grad_output: ArrayLike | None = None,
    others: Iterable[tuple[str, object]] = (),
    on_host: bool = False,
    **single_options: Any,
) -> tuple[Problem, int]:
    """Check the arguments of a loss; return the problem and the class axis.

    `others` are (name, value) pairs of arrays that are taken in, too, and not checked; with `on_host` all arrays have
    to be NumPy's.
    """
    options = check_options(**single_options)
    axis = None if axis is None else check_integer(axis, "axis")
    xp = np if on_host else array_module(logits)
    is_list = isinstance(target, list | tuple)  # an empty one has no kind of its own
    arrays = [("logits", logits), ("target", target), ("weight", weight), ("sample_weight", sample_weight), *others]
    if xp is np or not isinstance(grad_output, int | float | np.generic):
        arrays.append(("grad_output", grad_output))
        given = take_in(xp, arrays)
    else:  # a number, which needs none of the GPU's memory
        number = np.asarray(grad_output)
        given = take_in(xp, arrays)
        given["grad_output"] = number
    del logits, target, weight, sample_weight, grad_output, others, arrays  # from here on only what was taken in
    if xp is np and is_list and given["target"].size == 0:
        given["target"] = given["target"].astype(np.int64)
    return _check_arrays(given, axis, options, xp)


def _check_arrays(given: dict[str, Array], axis: int | None, options: Options, xp: Any) -> tuple[Problem, int]:
    """Check arrays that nobody else has, of the module `xp`."""
    logits, target = given["logits"], given["target"]
    check_order(logits, target)
    check_logits_array(logits, "logits", xp)
    dtype = arithmetic(logits.dtype)
    check_scales(options, dtype)
    axis = check_axis(axis, logits, default=min(logits.ndim - 1, 1))
    n_classes = logits.shape[axis]
    row_shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    is_prob = check_target(target, logits.shape, axis, row_shape, options.ignore_index)
    if n_classes == 0 and 0 not in row_shape:
        raise ValueError(f"logits must have at least one class, got shape {logits.shape} with class axis {axis}")
    if is_prob and options.ignore_index != DEFAULT_IGNORE_INDEX:
        raise ValueError(
            f"ignore_index must be left alone with class probabilities (give such rows a sample_weight of 0), "
            f"got {options.ignore_index}"
        )
    if xp is not np:
        for name in ("target", "weight", "sample_weight"):
            if name in given:
                check_alignment(given[name], name)
    weight, of_weight = check_weight(given.get("weight"), "weight", (n_classes,), xp, dtype)
    sample_weight, of_sample_weight = check_weight(given.get("sample_weight"), "sample_weight", row_shape, xp)
    if of_weight or of_sample_weight:
        weight, sample_weight, options = scale_weights(
            weight, of_weight, sample_weight, of_sample_weight, options, is_prob, row_shape
        )
    problem = Problem(
        logits=put_last(logits, axis),
        target=None if is_prob else as_int64(target, n_classes, options.ignore_index) if xp is np else target,
        prob=put_last(as_float(target, dtype, DTYPES), axis) if is_prob else None,
        given=given,
        ignore_index=as_comparable(options.ignore_index, target.dtype),
        weight=None if weight is None else _rounded(weight, dtype),
        sample_weight=sample_weight,
        grad_output=check_grad_output(given.get("grad_output"), options.reduction, row_shape),
        options=options,
        row_shape=row_shape,
    )
    return problem, axis


def put_last(array: Array, axis: int) -> Array:
    """Return a view with the given axis last; the array itself, 6 microseconds sooner, if it is."""
    return array if axis == array.ndim - 1 else np.moveaxis(array, axis, -1)


def put_back(array: Array, axis: int) -> Array:
    """Undo `put_last`."""
    return array if axis == array.ndim - 1 else np.moveaxis(array, -1, axis)


def check_logits(logits: ArrayLike, name: str = "logits") -> Array:
    """Return the logits as an array of a dtype that the kernels know."""
    xp = array_module(logits)
    array = check_array(logits, name, xp)
    check_logits_array(array, name, xp)
    return array


def check_logits_array(logits: Array, name: str, xp: Any) -> None:
    """Refuse arrays of the module `xp` that the kernels do not know."""
    dtype = logits.dtype
    if not is_one_of(dtype, DTYPES):
        hint = ""
        if not dtype.isnative:
            hint = f" in another byte order: convert it with {name}.astype({name}.dtype.newbyteorder('='))"
        elif dtype.kind in "biuO":
            hint = f": convert it with {xp.__name__}.asarray({name}, dtype='float32')"
        elif dtype.kind == "f" and dtype.itemsize > 8:
            hint = f": convert it with {name}.astype('float64')"
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {dtype.name}{hint}")
    if logits.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")
    if xp is not np:
        check_alignment(logits, name)


def check_order(logits: Array, target: Array) -> None:
    """Refuse a target that was given as the logits, and these as the target."""
    if logits.dtype.kind in "biu" and is_real(target.dtype, "f") and logits.ndim == target.ndim - 1:
        raise TypeError(
            f"logits must come first and target second, got {logits.dtype.name} of shape {logits.shape} and "
            f"{target.dtype.name} of shape {target.shape}: exchange them"
        )


def check_alignment(array: Array, name: str) -> None:
    """Refuse what a GPU cannot read: numbers at addresses that are no multiples of their size."""
    if any(place % array.itemsize for place in (address_of(array), *array.strides)):
        raise ValueError(f"{name} must be aligned to its numbers' size on a GPU, got strides {array.strides}")


def arithmetic(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that logits of the given one are computed in, which is that of losses and statistics."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def is_one_of(dtype: np.dtype[Any], names: tuple[str, ...]) -> bool:
    """Tell whether a dtype has one of these names and native byte order; `dtype.name` would take 3 microseconds."""
    return dtype.type.__name__ in names and dtype.isnative


def is_real(dtype: np.dtype[Any], kinds: str = "iuf") -> bool:
    """Tell whether numbers are of these kinds, NumPy's letters; bfloat16 calls itself void, and counts as "f"."""
    return dtype.kind in kinds or ("f" in kinds and dtype.type.__name__ == "bfloat16")


def check_axis(axis: int | None, logits: Array, default: int) -> int:
    """Return the class axis as a non-negative number."""
    if axis is None:
        return default
    number = check_integer(axis, "axis")
    if not -logits.ndim <= number < logits.ndim:
        raise ValueError(
            f"axis must be in [{-logits.ndim}, {logits.ndim - 1}] for {logits.ndim} dimensions, got {axis}"
        )
    return number % logits.ndim


def check_target(target: Array, shape: Shape, axis: int, row_shape: Shape, ignore_index: int) -> bool:
    """Tell class probabilities (True) from class indices (False); refuse anything between."""
    kind = target.dtype.kind
    if kind in "iu":
        if target.shape == row_shape:
            return False
        if target.shape == shape and _has_two_classes(target):
            raise TypeError(
                f"target must be one class index for logits of shape {shape}, which are a single row, got "
                f"{target.dtype.name} of shape {target.shape}: if these are the scores of a two-class model, give the "
                f"logits of both classes, np.stack([np.zeros_like(logits), logits], axis=1)"
            )
        if target.shape == shape:
            raise TypeError(
                f"target must hold one class index per row, shape {row_shape}, or class probabilities of a floating "
                f"dtype; got {target.dtype.name} of the logits' shape {shape}, which looks one-hot: convert it with "
                f"target.astype(logits.dtype), or with target.argmax({axis}) to indices"
            )
        hint = ": remove its last axis" if target.shape == (*row_shape, 1) else ""
        raise ValueError(
            f"target of class indices must have shape {row_shape} for logits of shape {shape} with class axis {axis}, "
            f"got {target.shape}{hint}"
        )
    if is_real(target.dtype, "f"):
        if target.shape == shape:
            return True
        if target.shape == row_shape:
            raise TypeError(
                f"target of shape {row_shape} must hold class indices of an integer dtype, got {target.dtype.name}"
                f"{_advice_for_floats(target, ignore_index)}"
            )
        raise ValueError(f"target of class probabilities must have the logits' shape {shape}, got {target.shape}")
    raise TypeError(
        f"target must be of an integer dtype (class indices) or floating (probabilities), got {target.dtype}"
        f"{_advice_for_objects(target, axis if target.shape == shape else None, ignore_index)}"
    )


def _has_two_classes(target: Array) -> bool:
    """Tell labels of a two-class model, one for each of one-dimensional logits, from a single one-hot row."""
    if target.ndim != 1 or not may_look_at(target):
        return False
    return bool(((target == 0) | (target == 1)).all() and target.sum() != 1)


def _advice_for_floats(target: Array, ignore_index: int) -> str:
    """Return what to do with class indices of a floating dtype: not to make classes of NaN."""
    if not may_look_at(target) or target.size == 0:
        return ": convert it with target.astype(np.int64)"
    missing = np.isnan(target)
    if missing.any():
        return (
            f" with NaN at {_place(int(missing.argmax()), target.shape)}: give such rows the value of ignore_index, "
            f"np.nan_to_num(target, nan={ignore_index}).astype(np.int64)"
        )
    with np.errstate(all="ignore"):  # such a bound is infinite in float16
        odd = (target != np.floor(target)) | (np.abs(target) >= INT64.max)
    if odd.any():
        bad = int(odd.argmax())
        return f" with {target.reshape(-1)[bad]} at {_place(bad, target.shape)}, which is no class"
    return ": convert it with target.astype(np.int64)"


def _advice_for_objects(target: Array, axis: int | None, ignore_index: int) -> str:
    """Return what to do with a target that holds no numbers; `axis` is the classes' if it is one-hot."""
    if target.dtype.kind == "b":
        return f": convert it with target.{'astype(np.int64)' if axis is None else f'argmax({axis})'}"
    items = target.reshape(-1).tolist() if target.dtype.kind in "OUST" else []
    if any(isinstance(item, str | bytes) for item in items):
        return ": number the classes with classes, target = np.unique(labels, return_inverse=True)"
    for i, item in enumerate(items):
        if item is None or type(item).__name__ in ("NAType", "NaTType") or (type(item) is float and np.isnan(item)):
            return (
                f" with a missing value, {item}, at {_place(i, target.shape)}: give such rows the value of "
                f"ignore_index, in pandas target.fillna({ignore_index}).astype('int64')"
            )
    return ": convert it with target.astype(np.int64)" if items and all(isinstance(item, int) for item in items) else ""


def _place(row: int, shape: Shape) -> str:
    """Return the index of the row-th element, counted in C order, as it is written after a name."""
    return f"[{', '.join(str(i) for i in np.unravel_index(row, shape))}]" if shape else "[()]"


def as_int64(target: Array, n_classes: int, ignore_index: int) -> NDArray[np.int64]:
    """Return class indices as contiguous int64."""
    if is_uint64(target.dtype) and target.size and target.max() > INT64.max:
        # Such values wrap around in int64; ignore_index alone may do so, for the backend wraps it alike.
        bad = (target > INT64.max) & (target != ignore_index)
        if bad.any():
            raise class_error(target, int(bad.argmax()), n_classes, ignore_index)
    return as_vector(target.astype(np.int64, copy=False), np)


def is_uint64(dtype: np.dtype[Any]) -> bool:
    """Tell 64-bit integers without a sign, of either byte order."""
    return dtype.kind == "u" and dtype.itemsize == 8


def as_comparable(ignore_index: int, dtype: np.dtype[Any]) -> int:
    """Return ignore_index as int64: with the bits of a uint64 if targets are such, else a number that no target is."""
    if is_uint64(dtype):
        return (ignore_index - INT64.min) % 2**64 + INT64.min
    return ignore_index if ignore_index <= INT64.max else INT64.min


def class_error(target: Array, row: int, n_classes: int, ignore_index: int) -> IndexError:
    """Return the error for the row-th target, counted in C order."""
    place = _place(row, target.shape) if target.ndim else ""
    value = target.reshape(-1)[row] if target.ndim else target[()]
    hint = ""
    if n_classes == 1:
        hint = (
            "; if these are the scores of a two-class model, give the logits of both classes, "
            "np.concatenate([np.zeros_like(logits), logits], axis=1)"
        )
    return IndexError(
        f"target{place} is {value}, but there are {n_classes} classes (0..{n_classes - 1}) "
        f"and ignore_index is {ignore_index}{hint}"
    )


def as_float(array: Array, dtype: DTypeLike, names: tuple[str, ...] = ("float32", "float64")) -> Array:
    """Return arrays of a dtype that backends read as they are, others in `dtype`."""
    if is_one_of(array.dtype, names):
        return array
    return _rounded(array, np.dtype(dtype))  # infinities are results like others, or refused later


def as_vector(array: Array, xp: Any) -> Array:
    """Return the elements one after the other, in C order and at addresses that are multiples of their size."""
    array = xp.ascontiguousarray(array)
    if xp is np and not array.flags.aligned:
        array = array.copy()
    return array.reshape(-1)


def check_weight(
    weight: Array | None, name: str, shape: Shape, xp: Any, dtype: np.dtype[Any] | None = None
) -> tuple[Array | None, int]:
    """Return finite factors of the given shape, flat, as float32 or float64, and by how much to scale them.

    They are finite in `dtype`, too. The scale is an exponent of 2, that of the largest, or 0 if that is not far from 1.
    """
    if weight is None:
        return None, 0
    if not is_real(weight.dtype):
        raise TypeError(f"{name} must be real numbers, got {weight.dtype}{_advice_for_weight(name, weight)}")
    if weight.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {weight.shape}")
    array = as_vector(as_float(weight, np.float64), xp)
    if array.size == 0 or not may_look_at(array):
        return array, 0
    largest = max(float(array.max()), -float(array.min()))
    if largest == 0 or 1 / _FAR <= largest <= _FAR:
        return array, 0
    word, rounded = "", array
    if largest < np.inf and dtype is not None:
        word, rounded = f" in {dtype.name}", _rounded(array, dtype)
    is_finite = xp.isfinite(rounded)
    if not is_finite.all():
        bad = int((~is_finite).argmax())
        raise ValueError(f"{name} must be finite{word}, got {weight.reshape(-1)[bad]} at {_place(bad, shape)}")
    return array, int(np.frexp(largest)[1])


def _advice_for_weight(name: str, weight: Array) -> str:
    """Return what to do with weights that are words or objects, as scikit-learn has them."""
    item = weight[()] if weight.ndim == 0 and weight.dtype.kind in "OUT" else None
    if name == "sample_weight":
        return "" if item is None else ": give an array of one number for each row"
    if isinstance(item, dict):
        return ", a dict: give an array in the order of the classes, [weight[k] for k in range(n_classes)]"
    if isinstance(item, str) and item == "balanced":
        return ": give an array, target.size / (n_classes * np.bincount(target.ravel(), minlength=n_classes))"
    return "" if item is None else ": give an array of one number for each class"


def _rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return array.astype(dtype, copy=False)


def scale_weights(
    weight: Array | None,
    of_weight: int,
    sample_weight: Array | None,
    of_sample_weight: int,
    options: Options,
    is_prob: bool,
    row_shape: Shape,
) -> tuple[Array | None, Array | None, Options]:
    """Return weights that are not far from 1, and options that go with them, for the same loss and gradient.

    The loss of a row is a (sum of w n + z lse^2), and a mean divides by the sum of a w, or of a under probabilities. So
    what divides w divides z, too, and multiplies a, but for a mean over class indices, which does not change; and no
    mean changes with what divides a. `of_weight` and `of_sample_weight` are what `check_weight` says.
    """
    is_mean = options.reduction == "mean"
    if weight is not None and of_weight and not (is_mean and is_prob):
        rows = np.ones(row_shape).reshape(-1) if sample_weight is None else sample_weight.astype(np.float64)
        moved = rows if is_mean else _ldexp(rows, of_weight)
        if np.isfinite(moved).all() and np.array_equal(moved == 0, rows == 0):
            sample_weight = sample_weight if is_mean else moved
            weight = _ldexp(weight.astype(np.float64), -of_weight)
            z_loss = min(float(_ldexp(np.float64(options.z_loss), -of_weight)), np.finfo(np.float64).max)
            options = options._replace(z_loss=z_loss)
    if sample_weight is not None and of_sample_weight and is_mean:
        moved = _ldexp(sample_weight.astype(np.float64), -of_sample_weight)
        least = np.copysign(np.finfo(np.float64).smallest_subnormal, sample_weight)
        sample_weight = np.where((moved == 0) & (sample_weight != 0), least, moved)  # rows of weight 0 are skipped
    return weight, sample_weight, options


def _ldexp(array: Any, exponent: int) -> Any:
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(array, exponent)


def check_grad_output(grad_output: Array | None, reduction: str, row_shape: Shape) -> float | Array:
    """Return the upstream gradient: a float, contiguous factors per row, or, on a GPU, one factor for all of them."""
    if grad_output is None:
        return 1.0
    if not is_real(grad_output.dtype):
        raise TypeError(f"grad_output must be real numbers, got {grad_output.dtype}")
    shape = row_shape if reduction == "none" else ()
    if grad_output.shape != shape:
        raise ValueError(
            f"grad_output must have the loss's shape {shape} under reduction={reduction!r}, got {grad_output.shape}"
        )
    xp = array_module(grad_output)
    if xp is not np:
        check_alignment(grad_output, "grad_output")
    elif shape == ():
        return float(grad_output)
    return as_vector(as_float(grad_output, np.float64), xp)


def check_out(
    out: object,
    like: Array,
    inputs: Sequence[tuple[str, object]],
    name: str = "logits",
    *,
    also: Sequence[tuple[str, object]] = (),
    is_result: str = "out",
    in_place: bool = True,
) -> Array:
    """Return where the result goes, shaped like `like`: `out` if it fits, else a new array in the same memory order.

    `like` itself may be `out`, unless it must not be worked on in place, and so may those of `also`; any other overlap
    with these or with one of `inputs`, (name, array) pairs, is refused. `is_result` is what `out` is called.
    """
    xp = array_module(like)
    if out is None:
        with device_of(like):
            new: Array = xp.empty_like(like, order="K", subok=False if xp is np else None)
        return new
    out = check_result(out, is_result, xp).view()
    if xp is not np:
        check_alignment(out, is_result)
    if out.shape != like.shape:
        raise ValueError(f"{is_result} must have the shape of {name}, {like.shape}, got {out.shape}")
    if out.dtype != like.dtype or not out.dtype.isnative:
        raise ValueError(f"{is_result} must have the dtype of {name}, {like.dtype.name}, got {out.dtype.str}")
    if xp is np and not out.flags.writeable:
        raise ValueError(f"{is_result} must be writable, got a read-only array")
    if out.size and any(stride == 0 and size > 1 for stride, size in zip(out.strides, out.shape, strict=True)):
        raise ValueError(f"{is_result} must have an element of its own for every entry, got strides {out.strides}")
    for other_name, other, may_be in (
        (name, like, in_place),
        *((*pair, True) for pair in also),
        *((*pair, False) for pair in inputs),
    ):
        if xp is not np and array_module(other) is xp:
            other = check_array(other, other_name, xp)
        if isinstance(other, xp.ndarray) and not (may_be and _is_same(out, other)) and overlap(out, other):
            allowed = " or ".join(f"{word} itself" for word, _ in ((name, like), *also)) if in_place else ""
            raise ValueError(
                f"{is_result} must {f'be {allowed} or ' if allowed else ''}share no memory with the inputs, got an "
                f"overlap with {other_name}"
            )
    return out


def _is_same(a: Any, b: Any) -> bool:
    """Tell whether two arrays of one shape have every number at the same place."""
    same: bool = a is b or (address_of(a) == address_of(b) and a.strides == b.strides and a.dtype == b.dtype)
    return same


def overlap(a: Array, b: Array) -> bool:
    """Tell whether two arrays share an element, or are too intricate to tell."""
    try:
        return np.shares_memory(outline(a), outline(b), max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        return True
