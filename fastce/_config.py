"""What this build of fastce is and how it will run here."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, overload

import numpy as np

from fastce import _cpu

# Read now, when `_cpu` reads it too: a later change of the environment changes nothing.
_FORCED_ISA = os.environ.get("FASTCE_ISA")


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print versions, instruction sets and threads of this installation.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default="stdout"
        Whether to print the configuration or to return it.

    Returns
    -------
    dict or None
        With ``mode="dicts"`` the groups ``"versions"``, ``"build"``, ``"isa"`` and ``"threads"``, each a dict; else
        None.

    Raises
    ------
    ValueError
        If `mode` is neither of the two.

    Examples
    --------
    >>> import fastce
    >>> config = fastce.show_config(mode="dicts")
    >>> config["isa"]["selected"] in config["isa"]["supported"]
    True
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    config = _collect()
    if mode == "dicts":
        return config
    for group, entries in config.items():
        print(f"{group}:")
        for name, value in entries.items():
            print(f"  {name.replace('_', ' ')}: {_readable(value)}")
    return None


def _collect() -> dict[str, Any]:
    n_threads, reason = _cpu.effective_n_threads()
    return {
        "versions": {
            "fastce": version("fastce"),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "cupy": _cupy_version(),
        },
        "build": {
            "cython": _cpu.build_info["cython"],
            "compiler": _cpu.build_info["compiler"],
            "openmp": _cpu.build_info["openmp"],
        },
        "isa": {
            "compiled": _cpu.compiled_isas,
            "supported": _cpu.supported_isas,
            "selected": _cpu.isa,
            "chosen_by": "this processor and operating system" if _FORCED_ISA is None else "FASTCE_ISA",
        },
        "threads": {"effective": n_threads, "decided_by": reason, "waiting": _cpu.describe_waiting()},
    }


def _cupy_version() -> str:
    """Return CuPy's version without importing it, which would start CUDA; it comes in one package for each CUDA."""
    for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy"):
        try:
            return f"{version(name)} ({name})"
        except PackageNotFoundError:
            continue
    return "not installed"


def _readable(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value)
