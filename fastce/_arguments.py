"""What the compiled `call` computes, and of which arguments, as one value that can be changed and sent on."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fastce import _cpu
from fastce._logits import Shape, row_shape
from fastce._options import NUMBERS_AND_NAMES

# What is computed: see `call`.
LOSS: int = _cpu.kernels.LOSS
NLL: int = _cpu.kernels.NLL
GRAD: int = _cpu.kernels.GRAD
STATS: int = _cpu.kernels.STATS
PRODUCT: int = _cpu.kernels.PRODUCT
DIAGONAL: int = _cpu.kernels.DIAGONAL
NORMALIZER: int = _cpu.kernels.NORMALIZER

# The arguments that are arrays, in the order in which they are taken in.
ARRAYS = ("logits", "target", "weight", "sample_weight", "v", "out", "hess_out", "grad_output")


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
        """Return all arguments by their names, each option by its own."""
        return self._asdict() | dict(zip(NUMBERS_AND_NAMES, self.options, strict=True))

    def with_named(self, **changed: Any) -> "Arguments":
        """Return the arguments with others under these names."""
        named = zip(NUMBERS_AND_NAMES, self.options, strict=True)
        return self._replace(options=tuple(changed.pop(name, value) for name, value in named), **changed)

    def option(self, name: str) -> Any:
        """Return an option that is a number or a name."""
        return self.options[NUMBERS_AND_NAMES.index(name)]

    @property
    def row_shape(self) -> Shape:
        """The shape of the logits without the class axis, if they were taken in."""
        return row_shape(self.logits, self.axis)

    @property
    def is_prob(self) -> bool:
        """Whether the target, if it was taken in and is right, holds class probabilities."""
        return self.target.dtype.kind not in "iu"
