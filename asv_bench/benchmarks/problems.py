"""What is measured: cases, and the arrays that they need."""

import contextlib
import functools
from dataclasses import dataclass, replace

import numpy as np

import fastce
from fastce import _cpu
from fastce._floor import COPY, IN_PLACE, READ

with contextlib.suppress(ImportError):  # NumPy does not know bfloat16 without it
    import ml_dtypes  # noqa: F401

# Each for its reason. Names rather than tuples, which asv would take apart.
SHAPES = [
    "65536x1000",  # image classes, far out of cache
    "4096x32000",  # a vocabulary
    "1024x128256",  # a large vocabulary: a row is half a megabyte
    "400000x32",  # about one vector to a row
    "65536x100",  # short rows, near the size of a cache
    "1000000x10",  # few classes: every per-row cost shows
    "1000000x3",
    "1000000x2",  # binary: nothing but per-row costs
    "256x1000",  # in cache
    "32x10",  # the cost of a call
]
IMAGES = ["16x21x512x512", "1x150x512x512"]  # segmentation: classes second of four axes, 1 MiB apart
DTYPES = ["float32", "float64", "float16", "bfloat16"]
LAYOUTS = ["C", "F", "strided"]
# Keyword arguments by name; `make_arguments` knows their values.
OPTIONS = {
    "plain": (),
    "label_smoothing": ("label_smoothing",),
    "weight": ("weight",),
    "sample_weight": ("sample_weight",),
    "four": ("weight", "sample_weight", "label_smoothing", "z_loss"),
    "probabilities": ("target",),
    "softcap": ("softcap",),
    "losses": ("reduction",),
    "stats": ("return_stats",),
}
# All, not this build's: asv compares machines only where they have the same parameters.
ISAS = ["baseline", "avx2", "avx512"]
THREADS = [1, 2]
CALLS = ["loss", "loss+gradient", "new gradient", "product", "gradient+diagonal", "numpy", "floor"]

# Repeated to fill the logits: drawing them all would take longer than timing. Prime, so that no two rows are alike.
N_RANDOM = 1_000_003


def parse_shape(name):
    """Return the numbers in a shape's name."""
    return tuple(int(n) for n in name.split("x"))


@dataclass(frozen=True)
class Case:
    """One point of the map; what is not said is as in the base case."""

    shape: str = "65536x1000"
    dtype: str = "float32"
    layout: str = "C"
    option: str = "plain"
    call: str = "loss+gradient"  # in place
    isa: str = _cpu.isa
    n_threads: int = 2

    @property
    def logits_key(self):
        """What `make_logits` wants to know: cases of the same can share them."""
        return parse_shape(self.shape), self.dtype, self.layout

    @property
    def floors(self):
        """NumPy's ways to move the bytes that the call cannot do without, in as many threads: the fastest counts."""
        kind = {"loss": READ, "new gradient": COPY}.get(self.call, IN_PLACE)
        ways = range(1 if self.n_threads == 1 else 2)
        return [replace(self, option="plain", call=f"floor:{kind}:{way}", isa=_cpu.isa) for way in ways]

    def is_supported(self):
        """Tell whether this machine and the fastce at hand can run it."""
        return self.isa in _cpu.supported_isas and takes_dtype(self.dtype)


@functools.cache
def takes_dtype(name):
    """Try it: older versions refuse 16-bit logits, and NumPy alone does not know bfloat16."""
    try:
        fastce.cross_entropy(np.zeros((1, 2), name), np.zeros(1, int))
    except TypeError:
        return False
    return True


@functools.cache
def random_numbers(dtype):
    """Return normal numbers of standard deviation 3, as the logits of a half-trained model."""
    return (3 * np.random.default_rng(0).standard_normal(N_RANDOM)).astype(dtype)


def fill(numbers, shape, layout):
    """Return a new array of these numbers over and over."""
    if layout == "F":
        return np.resize(numbers, shape[::-1]).T
    if layout == "strided":  # every other number of an array twice as wide
        return np.resize(numbers, (*shape[:-1], 2 * shape[-1]))[..., ::2]
    return np.resize(numbers, shape)


def make_logits(shape, dtype, layout):
    """Return new logits."""
    return fill(random_numbers(dtype), shape, layout)


def make_arguments(option, shape, dtype, layout):
    """Return new keyword arguments, the target among them: class indices unless `option` says otherwise."""
    rng = np.random.default_rng(1)
    n_classes, rows = shape[1], (shape[0], *shape[2:])
    values = {
        "weight": lambda: (0.5 + rng.random(n_classes)).astype(dtype),
        "sample_weight": lambda: 0.5 + rng.random(rows),
        "label_smoothing": lambda: 0.1,
        "z_loss": lambda: 1e-4,
        "target": lambda: fill(abs(random_numbers(dtype)), shape, layout),  # nobody asks that they sum to one
        "softcap": lambda: 30.0,
        "reduction": lambda: "none",
        "return_stats": lambda: True,
    }
    arguments = {name: values[name]() for name in OPTIONS[option]}
    if "target" not in arguments:
        arguments["target"] = rng.integers(n_classes, size=rows)
    return arguments
