from collections.abc import Callable
from typing import Any, TypedDict

from numpy.typing import NDArray

class _BuildInfo(TypedDict):
    cython: str
    compiler: str
    openmp: bool

def build_info() -> _BuildInfo: ...
def cpu_supports() -> tuple[str, ...]: ...
def max_threads() -> int: ...
def wants_team(n_threads: int | None, n_numbers: int) -> bool: ...
def startable_threads(n_threads: int) -> int: ...
def forget_threads() -> None: ...
def run(
    logits: NDArray[Any],
    target: NDArray[Any] | None = None,
    prob: NDArray[Any] | None = None,
    out: NDArray[Any] | None = None,
    *,
    weight: NDArray[Any] | None = None,
    sample_weight: NDArray[Any] | None = None,
    grad_output: NDArray[Any] | None = None,
    loss: NDArray[Any] | None = None,
    lse: NDArray[Any] | None = None,
    log_prob: NDArray[Any] | None = None,
    entropy: NDArray[Any] | None = None,
    argmax: NDArray[Any] | None = None,
    log_softmax: bool = False,
    normalized: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    weight_sum: float = 0.0,
    factor: float = 1.0,
    n_threads: int = 1,
    v: NDArray[Any] | None = None,
    hess: NDArray[Any] | None = None,
    curvature: tuple[Any, ...] | None = None,
) -> float: ...
def solve_ordinary(
    logits: object,
    target: object,
    out: object,
    axis: object,
    with_grad: bool,
    make_stats: Callable[..., Any] | None,
    weight: object,
    sample_weight: object,
    grad_output: object,
    given: tuple[object, ...],
    n_threads: object,
    v: object,
    hess: object,
    curvature: tuple[Any, ...] | None,
    choose_n_threads: Callable[[int | None], int],
) -> Any: ...
def scan(
    target: NDArray[Any],
    ignore_index: int,
    n_classes: int,
    weight: NDArray[Any] | None,
    sample_weight: NDArray[Any] | None,
    n_threads: int,
) -> tuple[int, float]: ...
def total(values: NDArray[Any]) -> float: ...
