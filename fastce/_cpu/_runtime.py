"""How OpenMP's runtime library is started, and how its threads wait for work.

Design
------
1. After a call of several threads, GNU's runtime has them spin for milliseconds, LLVM's for a fifth of a second, before
   they sleep. Threads of BLAS, or of another OpenMP, that want the same processors must wait for them, and they for
   those: a loop that alternates matrix products and losses took up to thirty times as long as with one thread. If they
   spin for some microseconds only, calls that follow each other closely still find them awake.
2. The runtimes read that from the environment when they start. So it is set there until then, unless the user has set
   it, and taken back: neither the process nor its children find it. A runtime that was loaded before, by a package that
   uses the same, has started already: then what others have set stays.
3. LLVM's runtime stops its threads before a fork by itself, unless ``KMP_INIT_AT_FORK`` forbids it, which scikit-learn
   sets when it is imported. It is hidden meanwhile.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator

# How a runtime is told to wait briefly, and what else would tell it how to wait. GNU's counts rounds of spinning: 2000
# are 20 to 100 microseconds. With 500, LightGBM, which may share the runtime, took three times as long; after 20000,
# products still wait. LLVM's counts milliseconds; with 0, two threads took six times as long as one for 64 x 1000.
_GNU = ("GOMP_SPINCOUNT", "2000", ("OMP_WAIT_POLICY",))
_LLVM = ("KMP_BLOCKTIME", "1", ("OMP_WAIT_POLICY", "KMP_LIBRARY"))
_LIBRARIES = ("libgomp.so.1", "libomp.so.5", "libomp.so", "libomp.dylib", "libiomp5.so")


def is_loaded(library: str) -> bool:
    """Return whether the process has loaded the shared library of that name."""
    if not hasattr(os, "RTLD_NOLOAD"):  # Windows
        return False
    try:
        ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True


def find_choice(runtime: tuple[str, str, tuple[str, ...]]) -> str | None:
    """Return what the user has set for that runtime, or None."""
    name, _, others = runtime
    return next((f"{name}={os.environ[name]}" for name in (name, *others) if os.environ.get(name)), None)


# Found out before the runtime is loaded, for that one looks now, too.
_choices = {runtime: find_choice(runtime) for runtime in (_GNU, _LLVM)}
_loaded = [library for library in _LIBRARIES if is_loaded(library)]


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Load and start the runtime in here."""
    changes: dict[str, str | None] = {"KMP_INIT_AT_FORK": None}
    changes |= {name: brief for (name, brief, _), choice in _choices.items() if choice is None}
    before = {name: os.environ.get(name) for name in changes}
    _change_environment(changes)
    try:
        yield
    finally:
        _change_environment(before)


def _change_environment(changes: dict[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def is_llvm(extension: str) -> bool:
    """Return whether the compiled module of that path runs on LLVM's runtime; else it is GNU's, or another."""
    return hasattr(ctypes.CDLL(extension), "__kmpc_fork_call")


def describe_waiting(extension: str) -> str:
    """Return how long the runtime's threads wait, spinning, before they sleep, and what decided that."""
    runtime = _LLVM if is_llvm(extension) else _GNU
    name, brief, _ = runtime
    choice = _choices[runtime]
    if choice is not None:
        return f"{choice}, set before the import"
    if _loaded:
        return f"as set when {_loaded[0]} was loaded, before fastce"
    return f"briefly: {name}={brief} while the runtime was loaded"
