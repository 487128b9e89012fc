"""The CPU backend: picks the kernels for this machine and hands problems to them.

Design
------
1. Every instruction set is an extension module of its own, compiled from the same source. The widest that the compiler
   could build and that both CPU and operating system support is chosen at import; ``FASTCE_ISA`` forces one, and an
   unknown or unsupported name is an error there and then, never a silent fallback.
2. OpenMP's threads do not survive a fork, and the child would wait for them for ever. GNU's are released before every
   fork of a process that has used some, and started anew when next needed. LLVM's runtime does so itself.
3. GNU's runtime ends the process if it cannot start a thread. So the system is asked first, and if there is no room for
   all threads, in memory or by a limit of their number, fewer do the work.
4. Whoever sets OpenMP's number of threads, by the environment or at run time, is obeyed. Otherwise that number is the
   machine's, or what the affinity was when OpenMP was loaded, and must be held against what the process may use now.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from fastce._cpu import _runtime
from fastce._cpu._quota import cpu_quota

_ISAS = ("baseline", "neon", "avx2", "avx512")  # narrowest first
compiled_isas = tuple(isa for isa in _ISAS if importlib.util.find_spec(f"{__name__}._kernels_{isa}"))

with _runtime.starting():
    # Runs on every processor of this architecture, and asks this one about the others.
    _narrowest = importlib.import_module(f"{__name__}._kernels_{compiled_isas[0] if compiled_isas else _ISAS[0]}")
    _MAXIMUM = _narrowest.max_threads()  # the first call of OpenMP, which starts it

supported_isas = compiled_isas[:1] + tuple(isa for isa in compiled_isas[1:] if isa in _narrowest.cpu_supports())
build_info = _narrowest.build_info()

_used_threads = False


_N_PROCESSORS = os.cpu_count() or 1  # of the machine; asked once, for that takes as long as a small call


def _load(isa: str) -> ModuleType:
    return importlib.import_module(f"{__name__}._kernels_{isa}")


def _select() -> str:
    isa = os.environ.get("FASTCE_ISA")
    if isa is None:
        return supported_isas[-1]
    if isa not in supported_isas:
        raise ImportError(
            f"FASTCE_ISA must be one of {', '.join(supported_isas)} on this machine with this build, got {isa!r}"
        )
    return isa


isa = _select()
_kernels = _load(isa)

# As OpenMP found them when it was loaded: it looks at the environment once.
_OMP_NUM_THREADS = os.environ.get("OMP_NUM_THREADS")


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run with another instruction set for a while; for tests and benchmarks, in one thread."""
    global isa, _kernels
    before = isa, _kernels
    isa, _kernels = name, _load(name)
    try:
        yield
    finally:
        isa, _kernels = before


def effective_n_threads() -> tuple[int, str]:
    """Return how many threads a large problem gets without `n_threads`, and the rule that decided."""
    if not build_info["openmp"]:
        return 1, "built without OpenMP"
    maximum = _kernels.max_threads()
    if maximum != _MAXIMUM:  # the calling thread's own, as set by threadpoolctl
        return maximum, "a limit set at run time"
    if _OMP_NUM_THREADS:
        return maximum, "OMP_NUM_THREADS"
    usable = _count_processors()
    quota = cpu_quota() or maximum
    if quota < min(usable, maximum):
        return quota, "CPU quota of the control group"
    if usable < maximum:
        return usable, "CPU affinity"
    return maximum, "OpenMP's maximum"


def run(
    logits: NDArray[Any],
    target: NDArray[Any] | None = None,
    prob: NDArray[Any] | None = None,
    out: NDArray[Any] | None = None,
    *,
    n_threads: int | None = None,
    **options: Any,
) -> float:
    """Sweep over `logits`, whose last axis holds the classes; see ``_kernels.run`` for arguments and result.

    Without `n_threads` several threads share it only if that pays.
    """
    n_threads = _choose_n_threads(n_threads) if _kernels.wants_team(n_threads, logits.size) else 1
    total_loss: float = _kernels.run(logits, target, prob, out, n_threads=n_threads, **options)
    return total_loss


def _choose_n_threads(n_threads: int | None) -> int:
    """Return how many threads share a problem that several are to share."""
    global _used_threads
    n_threads = effective_n_threads()[0] if n_threads is None else min(n_threads, most_threads())
    if n_threads > 1:
        n_threads = _kernels.startable_threads(n_threads)
        _used_threads = True
    return n_threads


def describe_waiting() -> str:
    """Return how long threads without work wait before they sleep, and what decided that."""
    return _runtime.describe_waiting(str(_narrowest.__file__)) if build_info["openmp"] else "no threads"


def most_threads() -> int:
    """Return the number of threads beyond which more cannot help: a processor each, or as many as OpenMP was told."""
    maximum: int = _kernels.max_threads()
    return max(maximum, _N_PROCESSORS)


def _count_processors() -> int:
    """Return how many processors the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    options: tuple[object, ...],
    n_threads: object,
    v: object = None,
    hess: object = None,
    curvature: tuple[Any, ...] | None = None,
) -> Any:
    """Do a whole call that is ordinary; else return None. See ``_kernels.solve_ordinary``."""
    return _kernels.solve_ordinary(
        logits,
        target,
        out,
        axis,
        with_grad,
        make_stats,
        weight,
        sample_weight,
        grad_output,
        options,
        n_threads,
        v,
        hess,
        curvature,
        _choose_n_threads,
    )


def scan(
    target: NDArray[Any],
    ignore_index: int,
    n_classes: int,
    weight: NDArray[Any] | None,
    sample_weight: NDArray[Any] | None,
    n_threads: int | None,
) -> tuple[int, float]:
    """Return the first row with an invalid target, or -1, and the normalizer of the mean."""
    n_threads = _choose_n_threads(n_threads) if _kernels.wants_team(n_threads, target.size) else 1
    found: tuple[int, float] = _kernels.scan(target, ignore_index, n_classes, weight, sample_weight, n_threads)
    return found


def total(values: NDArray[Any]) -> float:
    """Return the float64 sum of contiguous `values`, the same whatever the number of threads."""
    result: float = _kernels.total(values)
    return result


def _release_threads() -> None:
    """End the calling thread's OpenMP team, where the runtime is GNU's: LLVM's sees to forks itself."""
    extension = str(_narrowest.__file__)
    if not _runtime.is_llvm(extension):
        with contextlib.suppress(AttributeError):  # OpenMP before 5.0 cannot
            ctypes.CDLL(extension).omp_pause_resource_all(1)  # 1: omp_pause_soft
            _kernels.forget_threads()


if build_info["openmp"] and hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: _release_threads() if _used_threads else None)
