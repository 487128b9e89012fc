"""The rules: arguments are checked and completed here, once, into one immutable problem.

Design
------
1. Nothing below this floor checks again, and nothing is written before everything here has passed. The one check that has
   to look at every row, whether its class exists, is left to the backend's scan, which also adds up the normalizer.
2. Backends see one shape: the class axis last, class indices as contiguous int64, per-row factors as contiguous float32 or
   float64, class weights in the dtype of the logits.
3. Every message has one form: the argument, the rule, what was got.
"""

import operator
from typing import Any, NamedTuple

import numpy as np

DEFAULT_IGNORE_INDEX = -100
REDUCTIONS = ("none", "mean", "sum")
ON_EMPTY = ("nan", "zero")
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
PROB_DTYPES = ("float32", "float64", "float16", "bfloat16")

_INT64 = np.iinfo(np.int64)


class Options(NamedTuple):
    """The checked options that are numbers or names."""

    ignore_index: int = DEFAULT_IGNORE_INDEX
    label_smoothing: float = 0.0
    reduction: str = "mean"
    on_empty: str = "nan"
    logit_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    n_threads: int | None = None


class Problem(NamedTuple):
    """A call with everything checked and completed.

    `target` holds class indices and `prob` class probabilities; one of the two is None. `ignore_index` is the option's value
    as it compares with `target`. `grad_output` is a float, or an array
    under ``reduction="none"``. `given_target` is the target as the caller knows it, for messages.
    """

    logits: Any
    target: Any
    prob: Any
    given_target: Any
    ignore_index: int
    weight: Any
    sample_weight: Any
    grad_output: Any
    options: Options
    row_shape: tuple[int, ...]


def check_problem(logits, target, *, axis, weight, sample_weight, grad_output=None, **options):
    """Check the arguments of a loss; return the problem and the class axis."""
    logits = check_logits(logits)
    axis = check_axis(axis, logits, default=min(logits.ndim - 1, 1))
    options = check_options(**options)
    n_classes = logits.shape[axis]
    row_shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    given = check_array(target, "target")
    if given.size == 0 and not isinstance(target, np.ndarray):
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
        logits=np.moveaxis(logits, axis, -1),
        target=None if is_prob else as_int64(given, n_classes, options.ignore_index),
        prob=np.moveaxis(as_float(given, logits.dtype, PROB_DTYPES), axis, -1) if is_prob else None,
        given_target=given,
        ignore_index=as_comparable(options.ignore_index, given.dtype),
        weight=check_weight(weight, "weight", (n_classes,), logits.dtype),
        sample_weight=check_weight(sample_weight, "sample_weight", row_shape),
        grad_output=check_grad_output(grad_output, options.reduction, row_shape),
        options=options,
        row_shape=row_shape,
    )
    return problem, axis


def check_array(value, name):
    """Return `value` as a plain array."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array (fill it, and give skipped rows a sample_weight of 0)")
    if type(value).__module__.partition(".")[0] == "cupy":
        raise TypeError(f"{name} must be a NumPy array like every other argument, got a CuPy array")
    return np.asarray(value)


def check_logits(logits, name="logits"):
    """Return the logits as an array of a dtype that the kernels know."""
    logits = check_array(logits, name)
    if logits.dtype not in DTYPES:
        hint = "" if logits.dtype.isnative else " in another byte order"
        raise TypeError(f"{name} must be float32 or float64, got {logits.dtype.name}{hint}")
    if logits.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")
    return logits


def check_axis(axis, logits, default):
    """Return the class axis as a non-negative number."""
    if axis is None:
        return default
    number = check_integer(axis, "axis")
    if not -logits.ndim <= number < logits.ndim:
        raise ValueError(
            f"axis must be in [{-logits.ndim}, {logits.ndim - 1}] for {logits.ndim} dimensions, got {axis}"
        )
    return number % logits.ndim


def check_target(target, shape, axis, row_shape):
    """Tell class probabilities (True) from class indices (False); refuse anything between."""
    kind = target.dtype.kind
    if kind in "iu":
        if target.shape == row_shape:
            return False
        if target.shape == shape:
            raise TypeError(
                f"target must hold one class index per row, shape {row_shape}, or class probabilities of a floating dtype; "
                f"got {target.dtype.name} of the logits' shape {shape}, which looks one-hot: convert it with "
                f"target.astype(logits.dtype), or with target.argmax({axis}) to indices"
            )
        hint = ": remove its last axis" if target.shape == (*row_shape, 1) else ""
        raise ValueError(
            f"target of class indices must have shape {row_shape} for logits of shape {shape} with class axis {axis}, "
            f"got {target.shape}{hint}"
        )
    if kind == "f" or target.dtype.name == "bfloat16":
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


def as_int64(target, n_classes, ignore_index):
    """Return class indices as contiguous int64."""
    if target.dtype == np.uint64 and target.size and target.max() > _INT64.max:
        # Such values wrap around in int64; ignore_index alone may do so, for the backend wraps it alike.
        bad = (target > _INT64.max) & (target != ignore_index)
        if bad.any():
            raise class_error(target, int(bad.argmax()), n_classes, ignore_index)
    return np.ascontiguousarray(target, dtype=np.int64).reshape(-1)


def as_comparable(ignore_index, dtype):
    """Return ignore_index as int64: with the bits of a uint64 if targets are such, else a number that no target is."""
    if dtype == np.uint64:
        return (ignore_index - _INT64.min) % 2**64 + _INT64.min
    return ignore_index if ignore_index <= _INT64.max else _INT64.min


def class_error(target, row, n_classes, ignore_index):
    """Return the error for the row-th target, counted in C order."""
    place = ", ".join(str(i) for i in np.unravel_index(row, target.shape))
    value = target.reshape(-1)[row] if target.ndim else target[()]
    return IndexError(
        f"target{f'[{place}]' if place else ''} is {value}, but there are {n_classes} classes (0..{n_classes - 1}) "
        f"and ignore_index is {ignore_index}"
    )


def as_float(array, dtype, names=("float32", "float64")):
    """Return arrays of a dtype that backends read as they are, others in `dtype`."""
    return array if array.dtype.name in names and array.dtype.isnative else array.astype(dtype)


def check_weight(weight, name, shape, dtype=None):
    """Return finite, non-negative factors of the given shape, contiguous; flat unless `dtype` fixes their type."""
    if weight is None:
        return None
    array = check_array(weight, name)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if array.size and not (array.min() >= 0 and array.max() < np.inf):
        bad = int(np.argmin((array >= 0) & (array < np.inf)))
        raise ValueError(f"{name} must be finite and not negative, got {array.reshape(-1)[bad]}")
    with np.errstate(over="ignore"):  # refused below
        array = np.ascontiguousarray(array.astype(dtype, copy=False) if dtype else as_float(array, np.float64))
    if dtype and array.size and not array.max() < np.inf:
        raise ValueError(f"{name} must be finite in {np.dtype(dtype).name}, got {np.max(weight)}")
    return array.reshape(-1)


def check_grad_output(grad_output, reduction, row_shape):
    """Return the upstream gradient: a float, or contiguous factors per row."""
    if grad_output is None:
        return 1.0
    array = check_array(grad_output, "grad_output")
    if array.dtype.kind not in "iuf":
        raise TypeError(f"grad_output must be real numbers, got {array.dtype}")
    shape = row_shape if reduction == "none" else ()
    if array.shape != shape:
        raise ValueError(
            f"grad_output must have the loss's shape {shape} under reduction={reduction!r}, got {array.shape}"
        )
    if shape == ():
        return float(array)
    return np.ascontiguousarray(as_float(array, np.float64)).reshape(-1)


def check_options(
    *,
    ignore_index=DEFAULT_IGNORE_INDEX,
    label_smoothing=0.0,
    reduction="mean",
    on_empty="nan",
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    n_threads=None,
):
    """Check the options that are numbers or names."""
    check_name(reduction, "reduction", REDUCTIONS)
    check_name(on_empty, "on_empty", ON_EMPTY)
    ignore_index = check_integer(ignore_index, "ignore_index")
    if not _INT64.min <= ignore_index < 2**64:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")
    return Options(
        ignore_index=ignore_index,
        label_smoothing=check_number(label_smoothing, "label_smoothing", "in [0, 1]", lambda x: 0 <= x <= 1),
        reduction=reduction,
        on_empty=on_empty,
        logit_scale=check_number(logit_scale, "logit_scale", "positive and finite", lambda x: 0 < x < np.inf),
        softcap=None
        if softcap is None
        else check_number(softcap, "softcap", "None, or positive and finite", lambda x: 0 < x < np.inf),
        z_loss=check_number(z_loss, "z_loss", "finite and not negative", lambda x: 0 <= x < np.inf),
        n_threads=check_n_threads(n_threads),
    )


def check_n_threads(n_threads):
    """Return None or a positive number of threads."""
    if n_threads is None:
        return None
    number = check_integer(n_threads, "n_threads")
    if number < 1:
        raise ValueError(f"n_threads must be None or at least 1, got {number}")
    return number


def check_name(value, name, allowed):
    """Refuse a word that is not one of the allowed ones."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_integer(value, name):
    """Return an int; booleans are not numbers here."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def check_number(value, name, rule, is_allowed):
    """Return a float that obeys the rule."""
    try:
        if isinstance(value, bool | np.bool_ | str | bytes):
            raise TypeError
        number = float(value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not is_allowed(number):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return number


def check_out(out, like, inputs, name="logits"):
    """Return where the result goes, shaped like `like`: `out` if it fits, else a new array in the same memory order.

    `like` itself may be `out`; any other overlap with it or with one of `inputs`, (name, array) pairs, is refused.
    """
    if out is None:
        return np.empty_like(like, subok=False)
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    if out.shape != like.shape:
        raise ValueError(f"out must have the shape of {name}, {like.shape}, got {out.shape}")
    if out.dtype != like.dtype or not out.dtype.isnative:
        raise ValueError(f"out must have the dtype of {name}, {like.dtype.name}, got {out.dtype.str}")
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    if out.size and any(stride == 0 and size > 1 for stride, size in zip(out.strides, out.shape, strict=True)):
        raise ValueError(f"out must have an element of its own for every entry, got strides {out.strides}")
    same = out.ctypes.data == like.ctypes.data and out.strides == like.strides
    for other_name, other in inputs if same else ((name, like), *inputs):
        if isinstance(other, np.ndarray) and overlap(out, other):
            raise ValueError(
                f"out must be {name} itself or share no memory with the inputs, got an overlap with {other_name}"
            )
    return out


def overlap(a, b):
    """Tell whether two arrays share an element, or are too intricate to tell."""
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True
