from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from numpy.typing import NDArray

class _BuildInfo(TypedDict):
    cython: str
    compiler: str
    openmp: bool

def build_info() -> _BuildInfo: ...
def cpu_supports() -> tuple[str, ...]: ...
def max_threads() -> int: ...
def wants_team(n_threads: int, n_numbers: int) -> bool: ...
def startable_threads(n_threads: int) -> int: ...
def forget_threads() -> None: ...
def set_thread_policy(choose_n_threads: Callable[[int], int]) -> None: ...
def check_options(options: tuple[Any, ...], n_threads: object, axis: object) -> None: ...
def check_array(array: NDArray[Any], name: str, on_gpu: bool = False) -> None: ...
def find_axis(n_dims: int, axis: object, default_axis: int) -> int: ...
def find_n_threads(n_threads: object) -> int: ...
def is_far(factors: NDArray[Any], name: str, is_rounded: bool) -> bool: ...
def check_result(
    out: object,
    like: NDArray[Any],
    inputs: Sequence[tuple[str, NDArray[Any]]],
    in_place: bool,
    on_gpu: bool = False,
) -> None: ...
def call(
    what: int,
    logits: object,
    target: object,
    axis: object,
    weight: object,
    sample_weight: object,
    options: tuple[Any, ...],
    n_threads: object,
    grad_output: object = None,
    out: object = None,
    make_stats: Callable[..., Any] | None = None,
    v: object = None,
    hess_out: object = None,
    curvature: tuple[Any, ...] | None = None,
    is_taken_in: bool = False,
    is_scaled: bool = False,
    on_gpu: bool = False,
) -> Any: ...
def along_axis(
    x: object,
    axis: object,
    n_threads: object,
    out: object = None,
    lse: NDArray[Any] | None = None,
    log_softmax: bool = False,
) -> Any: ...
def total(values: NDArray[Any]) -> float: ...

DEFAULT_IGNORE_INDEX: int
LOSS: int
NLL: int
GRAD: int
STATS: int
PRODUCT: int
DIAGONAL: int
NORMALIZER: int
