"""Problems to try: sizes with the reason for each, memory layouts, options, targets."""

import ml_dtypes
import numpy as np
import pytest

from guard import before_a_guard, behind_a_guard

# Numbers of classes. A kernel works on tiles of 16 to 64 numbers and on blocks of 8 KiB of one row.
FEW_CLASSES = (
    1,  # p = 1 whatever the logits
    2,
    3,
    10,  # less than one vector of any instruction set
    31,  # around half a tile, where the kernel for few classes may give way to the one for many
    32,
    33,
    63,  # around a whole tile: no full one, no remainder, a remainder of one
    64,
    65,
    130,  # several tiles and a remainder
)
MANY_CLASSES = (
    1000,
    1025,  # two blocks of float64
    2048,  # exactly one block of float32
    2049,  # a second block with a single class
    5000,  # three blocks
)
CLASSES = FEW_CLASSES + MANY_CLASSES

# Numbers of rows. Rows of few classes are taken 16 at a time.
ROWS = (
    0,
    1,
    15,  # one short of a full group, full, one over
    16,
    17,
    100,  # several groups and a remainder
)

# Options by name; "all" has every one of them. `options_for` makes their values.
OPTION_SETS = {
    "plain": (),
    "weight": ("weight",),
    "sample_weight": ("sample_weight",),
    "ignore_index": ("ignore_index",),
    "label_smoothing": ("label_smoothing",),
    "logit_scale": ("logit_scale",),
    "softcap": ("softcap",),
    "z_loss": ("z_loss",),
    "smoothing_weight": ("label_smoothing", "weight"),  # the one pair that shares a sum over the classes
    "all": (
        "weight",
        "sample_weight",
        "ignore_index",
        "label_smoothing",
        "logit_scale",
        "softcap",
        "z_loss",
    ),
}


def finfo(dtype):
    """Return the limits of a floating type; NumPy has none for bfloat16."""
    return ml_dtypes.finfo(dtype)


def class_axis(shape, axis=None):
    if axis is None:
        return 0 if len(shape) == 1 else 1
    return axis


def row_shape(shape, axis=None):
    return tuple(np.delete(shape, class_axis(shape, axis)).tolist())


def make_logits(rng, shape, dtype, spread=3.0):
    return (spread * rng.standard_normal(shape)).astype(dtype)


def make_target(rng, kind, shape, axis=None):
    """Return class indices, or rows of probabilities that sum to one and hold some zeros."""
    axis = class_axis(shape, axis)
    if kind == "index":
        return rng.integers(0, shape[axis], row_shape(shape, axis))
    prob = rng.random(shape) * (rng.random(shape) < 0.7) + 1e-3
    return prob / prob.sum(axis=axis, keepdims=True)


def options_for(rng, names, kind, shape, axis=None):
    """Return values for the options of these names; rows with a weight of zero are among them."""
    n_classes = shape[class_axis(shape, axis)]
    weight = rng.uniform(0.5, 2.0, n_classes)
    weight[n_classes // 2 :: 7] = 0 if n_classes > 1 else 1
    rows = row_shape(shape, axis)
    values = {
        "weight": weight,
        "sample_weight": rng.uniform(0.5, 2.0, rows) * (rng.random(rows) < 0.8),
        "ignore_index": n_classes // 3,
        "label_smoothing": 0.1,
        "logit_scale": 1.7,
        "softcap": 4.0,
        "z_loss": 0.01,
    }
    return {name: values[name] for name in names if not (name == "ignore_index" and kind == "prob")}


def slow_except(kept, values):
    """Return parameters of which only those in `kept` belong to the default tier of the tests."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


EDGE_ROWS = 84  # the 64 that go together if there are no options, a group of 16 and a remainder


def as_kind(target, kind, n_classes, dtype):
    """Return class indices as they are, or one-hot."""
    return target if kind == "index" else np.eye(n_classes, dtype=dtype)[target]


def edge_places(n_classes):
    """Return classes at the edges of vectors, tiles and blocks."""
    candidates = (0, 1, 15, 16, 31, 63, 64, 69, 1023, 1024, 2047, 2048, n_classes - 1)
    return sorted({k for k in candidates if k < n_classes})


def edge_options(n_classes):
    """Return the options that reach into a row, each alone and all together; fewer for long rows, which take long."""
    alone = [
        {},
        {"weight": np.linspace(0.5, 2, n_classes)},
        {"label_smoothing": 0.1},
        {"logit_scale": 2.0},
        {"z_loss": 0.01},
        {"sample_weight": np.linspace(0.5, 2, EDGE_ROWS)},
    ]
    together = {name: value for options in alone for name, value in options.items()}
    return [*alone, together] if n_classes <= 1000 else [{}, together]


def _embed(x, index, shape):
    """Return a view, equal to x, of a larger array whose other numbers are NaN, or no class."""
    base = np.full(shape, np.nan if x.dtype.kind == "f" else -7, x.dtype)
    base[index] = x
    return base[index]


def _step(x):
    return _embed(x, tuple(slice(1, None, 2) for _ in x.shape), tuple(2 * n + 1 for n in x.shape))


def _unaligned(x):
    base = np.zeros(x.nbytes + 1, np.uint8)
    view = base[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def _swapped(x):
    return x.swapaxes(0, -1).copy().swapaxes(0, -1) if x.ndim else x.copy()


# Each makes an array equal to its argument with other strides.
LAYOUTS = {
    "C": lambda x: x.copy(order="C"),
    "F": lambda x: x.copy(order="F"),
    "reversed": lambda x: np.flip(np.flip(x).copy()),  # every stride negative
    "step": _step,  # no stride is the size of a number
    "padded": lambda x: _embed(x, tuple(slice(0, n) for n in x.shape), tuple(n + 3 for n in x.shape)),
    "swapped": _swapped,  # neither C nor F from three dimensions on
    "unaligned": _unaligned,  # an odd address, as in a packed record
    # Whoever reads or writes a byte beyond the array crashes.
    "behind a guard": behind_a_guard,
    "before a guard": before_a_guard,
}
