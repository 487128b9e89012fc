"""The rules: arguments are checked and completed here, once, into one immutable problem.

Design
------
1. Nothing below this floor checks again, and nothing is written before everything here has passed. The one check that
   has to look at every row, whether its class exists, is left to the backend's scan, which also adds up the normalizer.
2. Backends see one shape: the class axis last, class indices as contiguous int64, per-row factors as contiguous float32
   or float64, class weights in the arithmetic's dtype, which is float32 for logits of 16 bits. A GPU takes class
   indices as they are, and the numbers in its arrays are not looked at unless the caller is willing to wait.
3. Every message has one form: the argument, the rule, what was got.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce._array import Array, address_of, array_module, check_array, device_of, is_masked, may_look_at, outline
from fastce._options import DEFAULT_IGNORE_INDEX, INT64, Options, check_integer, check_options

Shape = tuple[int, ...]

# By name: bfloat16 comes from a package, ml_dtypes, that need not be there.
DTYPES = ("float32", "float64", "float16", "bfloat16")

# Candidate solutions that a search for shared elements may look at. Any: NumPy's stubs know -1 and 0 only.
_MAX_WORK: Any = 100_000


class Problem(NamedTuple):
    """A call with everything checked and completed.

    `target` holds class indices and `prob` class probabilities; one of the two is None. `ignore_index` is the option's
    value as it compares with `target`. `grad_output` is a float, or an array under ``reduction="none"``. `given_target`
    is the target as the caller knows it, for messages.
    """

    logits: Array
    target: NDArray[np.int64] | None
    prob: Array | None
    given_target: Array
    ignore_index: int
    weight: Array | None
    sample_weight: Array | None
    grad_output: float | Array
    options: Options
    row_shape: Shape


def check_problem(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int | None,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    grad_output: ArrayLike | None = None,
    **single_options: Any,
) -> tuple[Problem, int]:
    """Check the arguments of a loss; return the problem and the class axis."""
    logits = check_logits(logits)
    xp = array_module(logits)
    axis = check_axis(axis, logits, default=min(logits.ndim - 1, 1))
    options = check_options(**single_options)
    n_classes = logits.shape[axis]
    row_shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    given = check_array(target, "target", xp)
    if xp is np and given.size == 0 and not isinstance(target, np.ndarray):
        given = given.astype(np.int64)  # an empty list has no kind of its own
    is_prob = check_target(given, logits.shape, axis, row_shape)
    if n_classes == 0 and 0 not in row_shape:
        raise ValueError(f"logits must have at least one class, got shape {logits.shape} with class axis {axis}")
    if is_prob and options.ignore_index != DEFAULT_IGNORE_INDEX:
        raise ValueError(
            f"ignore_index must be left alone with class probabilities (give such rows a sample_weight of 0), "
            f"got {options.ignore_index}"
        )
    problem = Problem(
        logits=put_last(logits, axis),
        target=None if is_prob else as_int64(given, n_classes, options.ignore_index) if xp is np else given,
        prob=put_last(as_float(given, arithmetic(logits.dtype), DTYPES), axis) if is_prob else None,
        given_target=given,
        ignore_index=as_comparable(options.ignore_index, given.dtype),
        weight=check_weight(weight, "weight", (n_classes,), xp, arithmetic(logits.dtype)),
        sample_weight=check_weight(sample_weight, "sample_weight", row_shape, xp),
        grad_output=check_grad_output(grad_output, options.reduction, row_shape, xp),
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
    logits = check_array(logits, name, xp)
    if not is_one_of(logits.dtype, DTYPES):
        hint = "" if logits.dtype.isnative else " in another byte order"
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {logits.dtype.name}{hint}")
    if logits.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")
    if xp is not np:
        check_alignment(logits, name)
    return logits


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


def check_target(target: Array, shape: Shape, axis: int, row_shape: Shape) -> bool:
    """Tell class probabilities (True) from class indices (False); refuse anything between."""
    kind = target.dtype.kind
    if kind in "iu":
        if target.shape == row_shape:
            return False
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
                f"target of shape {row_shape} must hold class indices of an integer dtype, got {target.dtype.name}: "
                f"convert it with target.astype(np.int64)"
            )
        raise ValueError(f"target of class probabilities must have the logits' shape {shape}, got {target.shape}")
    raise TypeError(
        f"target must be of an integer dtype (class indices) or floating (probabilities), got {target.dtype}"
    )


def as_int64(target: Array, n_classes: int, ignore_index: int) -> NDArray[np.int64]:
    """Return class indices as contiguous int64."""
    if target.dtype == np.uint64 and target.size and target.max() > INT64.max:
        # Such values wrap around in int64; ignore_index alone may do so, for the backend wraps it alike.
        bad = (target > INT64.max) & (target != ignore_index)
        if bad.any():
            raise class_error(target, int(bad.argmax()), n_classes, ignore_index)
    return np.ascontiguousarray(target, dtype=np.int64).reshape(-1)


def as_comparable(ignore_index: int, dtype: np.dtype[Any]) -> int:
    """Return ignore_index as int64: with the bits of a uint64 if targets are such, else a number that no target is."""
    if dtype == np.uint64:
        return (ignore_index - INT64.min) % 2**64 + INT64.min
    return ignore_index if ignore_index <= INT64.max else INT64.min


def class_error(target: Array, row: int, n_classes: int, ignore_index: int) -> IndexError:
    """Return the error for the row-th target, counted in C order."""
    place = ", ".join(str(i) for i in np.unravel_index(row, target.shape))
    value = target.reshape(-1)[row] if target.ndim else target[()]
    return IndexError(
        f"target{f'[{place}]' if place else ''} is {value}, but there are {n_classes} classes (0..{n_classes - 1}) "
        f"and ignore_index is {ignore_index}"
    )


def as_float(array: Array, dtype: DTypeLike, names: tuple[str, ...] = ("float32", "float64")) -> Array:
    """Return arrays of a dtype that backends read as they are, others in `dtype`."""
    return array if is_one_of(array.dtype, names) else array.astype(dtype)


def check_weight(
    weight: ArrayLike | None, name: str, shape: Shape, xp: Any, dtype: np.dtype[Any] | None = None
) -> Array | None:
    """Return finite, non-negative factors of the given shape, contiguous; flat unless `dtype` fixes their type."""
    if weight is None:
        return None
    array = check_array(weight, name, xp)
    if not is_real(array.dtype):
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    is_known = array.size > 0 and may_look_at(array)
    if is_known and not (array.min() >= 0 and array.max() < np.inf):
        bad = int((~((array >= 0) & (array < np.inf))).argmax())
        raise ValueError(f"{name} must be finite and not negative, got {array.reshape(-1)[bad]}")
    with np.errstate(over="ignore"):  # refused below
        array = xp.ascontiguousarray(array.astype(dtype, copy=False) if dtype else as_float(array, np.float64))
    if dtype and is_known and not array.max() < np.inf:
        raise ValueError(f"{name} must be finite in {np.dtype(dtype).name}, got {check_array(weight, name, xp).max()}")
    flat: Array = array.reshape(-1)
    return flat


def check_grad_output(grad_output: ArrayLike | None, reduction: str, row_shape: Shape, xp: Any) -> float | Array:
    """Return the upstream gradient: a float, contiguous factors per row, or, on a GPU, one factor for all of them."""
    if grad_output is None:
        return 1.0
    if xp is not np and isinstance(grad_output, int | float | np.generic):
        xp = np  # and no need of the GPU's memory
    array = check_array(grad_output, "grad_output", xp)
    if not is_real(array.dtype):
        raise TypeError(f"grad_output must be real numbers, got {array.dtype}")
    shape = row_shape if reduction == "none" else ()
    if array.shape != shape:
        raise ValueError(
            f"grad_output must have the loss's shape {shape} under reduction={reduction!r}, got {array.shape}"
        )
    if shape == () and xp is np:
        return float(array)
    return xp.ascontiguousarray(as_float(array, np.float64)).reshape(-1)  # type: ignore[no-any-return]


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
    if xp is not np:
        out = check_array(out, is_result, xp)  # type: ignore[arg-type]
        check_alignment(out, is_result)
    elif not isinstance(out, np.ndarray) or is_masked(out):
        raise TypeError(f"{is_result} must be a NumPy array, got {type(out).__name__}")
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
            other = check_array(other, other_name, xp)  # type: ignore[arg-type]
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
