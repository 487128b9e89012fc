"""What is measured: calls, and the arrays that they need."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import fastce
from fastce import _cpu
from fastce._benchmarks.floor import COPY, IN_PLACE, READ

with contextlib.suppress(ImportError):  # NumPy does not know bfloat16 without it
    import ml_dtypes  # noqa: F401

Array = npt.NDArray[Any]


class CallKind(NamedTuple):
    """A function, and what it moves."""

    function: str
    floor: str
    n_passes: int  # over arrays of the logits' size


CALLS = {
    "loss": CallKind("cross_entropy", READ, 1),
    "loss+gradient": CallKind("cross_entropy_with_grad", IN_PLACE, 2),  # over the logits
    "new gradient": CallKind("cross_entropy_with_grad", COPY, 2),  # in new memory each time
    "into out": CallKind("cross_entropy_with_grad", COPY, 2),  # in another array that is there
    "product": CallKind("cross_entropy_hvp", IN_PLACE, 3),  # of the Hessian and an array, over the logits
    "gradient+diagonal": CallKind("cross_entropy_grad_hess", IN_PLACE, 3),  # over the logits, and into an array
}
DTYPES = ("float32", "float64", "float16", "bfloat16")
LAYOUTS = ("C", "F", "strided")
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

# Repeated to fill the logits: drawing them all would take longer than timing. Prime, so that no two rows are alike.
N_RANDOM = 1_000_003


@dataclass(frozen=True)
class Case:
    """A call; its defaults are the base that the others differ from."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "C"
    option: str = "plain"
    call: str = "loss+gradient"
    isa: str | None = None  # None: the selected one
    n_threads: int = 1

    @property
    def name(self) -> str:
        """What the command line and tables call it: the shape, and whatever is not the default."""
        layout = {"C": "", "F": "fortran"}.get(self.layout, self.layout)
        words = (self.dtype, "float32"), (layout, ""), (self.option, "plain"), (self.call, "loss+gradient")
        return "-".join([name_shape(self.shape), *(word for word, default in words if word != default)])

    @property
    def size(self) -> int:
        """How many logits there are."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """How much memory they take."""
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def logits_key(self) -> tuple[tuple[int, ...], str, str]:
        """What the logits depend on: cases of the same can share them."""
        return self.shape, self.dtype, self.layout

    def is_supported(self) -> bool:
        """Return True if this machine and the fastce at hand can run it."""
        return (self.isa is None or self.isa in _cpu.supported_isas) and takes_dtype(self.dtype)


def name_shape(shape: Sequence[int]) -> str:
    """Return the sizes with an x between."""
    return "x".join(map(str, shape))


def parse_shape(name: str) -> tuple[int, ...]:
    """Return the sizes in a shape's name."""
    return tuple(int(n) for n in name.split("x"))


def combine(cases: Sequence[Case], *changes: Mapping[str, str]) -> list[Case]:
    """Return every case with each of the changes."""
    return [replace(case, **change) for case in cases for change in changes]  # type: ignore[arg-type]


SHAPES = [
    (65536, 1000),  # image classes, far out of cache
    (4096, 32000),  # a vocabulary
    (1024, 128256),  # a large one: a row is half a megabyte
    (65536, 100),  # short rows
    (400_000, 32),  # about one vector to a row
    (1_000_000, 10),  # few classes: what a row costs shows
    (1_000_000, 3),
    (1_000_000, 2),
    (256, 1000),  # in cache
    (32, 10),  # what a call costs
]
IMAGES = [(16, 21, 512, 512), (1, 150, 512, 512)]  # segmentation: classes second of four axes, 1 MiB apart
CASES = [
    *map(Case, SHAPES),
    Case((1_000_000, 10), layout="F"),
    *map(Case, IMAGES),
    Case((4096, 32000), "float64"),
    Case((4096, 32000), "bfloat16"),
    Case((4096, 32000), "float16"),
]
QUICK_CASES = [
    Case((64, 1000)),
    Case((256, 1000)),
    Case((300, 10)),
    Case((300, 10), layout="F"),
    Case((2, 5, 8, 8)),
    Case((64, 100), "float64"),
    Case((64, 100), "bfloat16"),
    Case((64, 100), "float16"),
]
# What a change of the kernels is measured by.
MAP = [
    *CASES,
    Case((3000, 50257)),  # a vocabulary of an odd size: most rows begin within a cache line
    *combine(
        [Case((32, 10))],
        {"option": "losses"},
        {"option": "probabilities"},
        {"call": "product"},
        {"call": "gradient+diagonal"},
    ),
]
TABLE = combine(
    [*map(Case, SHAPES[:3]), Case((4096, 16000), "float64")],
    {"call": "loss"},
    {},
    {"call": "new gradient"},
    {"call": "into out"},
    {"option": "four"},
    {"option": "probabilities"},
)
SECOND = combine(
    [
        *map(Case, [(65536, 1000), (4096, 32000), (65536, 100), (1_000_000, 10), (16, 21, 256, 256)]),
        Case((1_000_000, 10), layout="F"),
    ],
    {"call": "product"},
    {"call": "product", "option": "softcap"},
    {"call": "gradient+diagonal"},
)


@functools.cache
def takes_dtype(name: str) -> bool:
    """Return True if fastce takes logits of this type: NumPy alone does not know bfloat16."""
    try:
        fastce.cross_entropy(np.zeros((1, 2), name), np.zeros(1, int))
    except TypeError:
        return False
    return True


@functools.cache
def random_numbers(dtype: str) -> Array:
    """Return normal numbers of standard deviation 3, as the logits of a half-trained model."""
    return (3 * np.random.default_rng(0).standard_normal(N_RANDOM)).astype(dtype)


def fill(numbers: Array, shape: tuple[int, ...], layout: str) -> Array:
    """Return a new array of these numbers over and over."""
    if layout == "F":
        return np.resize(numbers, shape[::-1]).T
    if layout == "strided":  # every other number of an array twice as wide
        return np.resize(numbers, (*shape[:-1], 2 * shape[-1]))[..., ::2]
    return np.resize(numbers, shape)


class Logits:
    """Logits that calls overwrite, and what they are restored from."""

    def __init__(self, case: Case) -> None:
        self.array = make_logits(case)
        self._original = self.array.copy(order="K")

    def restore(self) -> None:
        """Make them fresh."""
        np.copyto(self.array, self._original)


def make_logits(case: Case) -> Array:
    """Return new logits."""
    return fill(random_numbers(case.dtype), case.shape, case.layout)


def make_arguments(case: Case) -> dict[str, Any]:
    """Return new keyword arguments, the target among them: class indices unless the option says otherwise."""
    rng = np.random.default_rng(1)
    n_classes, rows = case.shape[1], (case.shape[0], *case.shape[2:])
    values: dict[str, Callable[[], object]] = {
        "weight": lambda: (0.5 + rng.random(n_classes)).astype(case.dtype),
        "sample_weight": lambda: 0.5 + rng.random(rows),
        "label_smoothing": lambda: 0.1,
        "z_loss": lambda: 1e-4,
        # Nobody asks that they sum to one.
        "target": lambda: fill(abs(random_numbers(case.dtype)), case.shape, case.layout),
        "softcap": lambda: 30.0,
        "reduction": lambda: "none",
        "return_stats": lambda: True,
    }
    arguments = {name: values[name]() for name in OPTIONS[case.option]}
    if "target" not in arguments:
        arguments["target"] = rng.integers(n_classes, size=rows)
    return arguments
