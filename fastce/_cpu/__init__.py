"""The CPU backend: picks the kernels for this machine, and how many threads share a call.

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
from collections.abc import Iterator
from types import ModuleType

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


def choose_n_threads(n_threads: int) -> int:
    """Return how many threads, at most so many if that is not 0, share a call that several are to share."""
    global _used_threads
    n_threads = min(n_threads, most_threads()) if n_threads else effective_n_threads()[0]
    if n_threads > 1:
        n_threads = kernels.startable_threads(n_threads)
        _used_threads = True
    return n_threads


def _load(isa: str) -> ModuleType:
    module = importlib.import_module(f"{__name__}._kernels_{isa}")
    module.set_thread_policy(choose_n_threads)
    return module


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
kernels = _load(isa)

# As OpenMP found them when it was loaded: it looks at the environment once.
_OMP_NUM_THREADS = os.environ.get("OMP_NUM_THREADS")


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run with another instruction set for a while; for tests and benchmarks, in one thread."""
    global isa, kernels
    before = isa, kernels
    isa, kernels = name, _load(name)
    try:
        yield
    finally:
        isa, kernels = before


def effective_n_threads() -> tuple[int, str]:
    """Return how many threads a large problem gets without `n_threads`, and the rule that decided."""
    if not build_info["openmp"]:
        return 1, "built without OpenMP"
    maximum = kernels.max_threads()
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


def describe_waiting() -> str:
    """Return how long threads without work wait before they sleep, and what decided that."""
    return _runtime.describe_waiting(str(_narrowest.__file__)) if build_info["openmp"] else "no threads"


def most_threads() -> int:
    """Return the number of threads beyond which more cannot help: a processor each, or as many as OpenMP was told."""
    maximum: int = kernels.max_threads()
    return max(maximum, _N_PROCESSORS)


def _count_processors() -> int:
    """Return how many processors the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return _N_PROCESSORS


def _release_threads() -> None:
    """End the calling thread's OpenMP team, where the runtime is GNU's: LLVM's sees to forks itself."""
    extension = str(_narrowest.__file__)
    if not _runtime.is_llvm(extension):
        with contextlib.suppress(AttributeError):  # OpenMP before 5.0 cannot
            ctypes.CDLL(extension).omp_pause_resource_all(1)  # 1: omp_pause_soft
            kernels.forget_threads()


if build_info["openmp"] and hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: _release_threads() if _used_threads else None)
