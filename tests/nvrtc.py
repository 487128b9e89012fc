"""CUDA's compiler from its PyPI wheels, nvidia-cuda-nvrtc and nvidia-cuda-runtime: no driver, no GPU, no CuPy.

`compile` gives machine code and what ptxas says of it, `compile_to_ptx` the assembly before that. Both release the GIL,
so that threads compile side by side. `usage_of` reads registers, spills and shared memory out of the log.
"""

import ctypes
import importlib.util
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

_LIBRARIES = ("*/bin/nvrtc64_*.dll", "*/bin/*/nvrtc64_*.dll") if sys.platform == "win32" else ("*/lib/libnvrtc.so.*",)


def _newest(paths):
    """Return the path with the largest numbers in it, None if there is no path."""
    return max(paths, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], default=None)


@cache
def find() -> tuple[Path, Path] | None:
    """Return the library and the folder of the headers, None if one of them is not installed.

    Wheels up to CUDA 12 have a folder each below the package `nvidia`, newer ones share nvidia/cu13.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    library = _newest(
        path for root in roots for pattern in _LIBRARIES for path in root.glob(pattern) if ".alt" not in path.name
    )
    headers = _newest(path.parent for root in roots for path in root.glob("*/include/cuda_bf16.h"))
    return None if library is None or headers is None else (library, headers)


@cache
def _library() -> ctypes.CDLL:
    found = find()
    if found is None:
        raise RuntimeError("NVRTC is not installed: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime")
    return ctypes.CDLL(str(found[0]))


def _fetch(program: ctypes.c_void_p, kind: str) -> bytes:
    """Return the log, the PTX or the machine code of a program."""
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{kind}")(program, data))
    return data.raw


def _check(status: int) -> None:
    if status != 0:
        name = _library().nvrtcGetErrorString
        name.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {name(status).decode()}")


def _run(kind: str, source: str, options: Sequence[str], include_dirs: Sequence[Path | str]) -> tuple[bytes, str]:
    library = _library()
    folders = [*include_dirs, find()[1]]
    flags = [flag.encode() for flag in ["-std=c++17", "-ftz=true", *(f"-I{folder}" for folder in folders), *options]]
    # Files in quotes are looked for beside the program first: that must not be the current folder.
    name = str(Path(folders[0]) / "program.cu").encode()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name, 0, None, None))
    try:
        status = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        log = _fetch(program, "ProgramLog").rstrip(b"\0").decode()
        if status != 0:
            raise RuntimeError(log)
        return _fetch(program, kind), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def compile(  # noqa: A001
    source: str, arch: int, include_dirs: Sequence[Path | str] = ()
) -> tuple[bytes, str]:
    """Return machine code for an architecture (90 is sm_90), and the log; RuntimeError holds the log of a failure."""
    return _run("CUBIN", source, [f"-arch=sm_{arch}", "--ptxas-options=-v"], include_dirs)


def compile_to_ptx(source: str, arch: int, include_dirs: Sequence[Path | str] = ()) -> str:
    """Return PTX for a virtual architecture (90 is compute_90)."""
    return _run("PTX", source, [f"-arch=compute_{arch}"], include_dirs)[0].rstrip(b"\0").decode()


def architectures() -> list[int]:
    """Return what the compiler can compile for."""
    n = ctypes.c_int()
    _check(_library().nvrtcGetNumSupportedArchs(ctypes.byref(n)))
    found = (ctypes.c_int * n.value)()
    _check(_library().nvrtcGetSupportedArchs(found))
    return list(found)


class Usage(NamedTuple):
    """What a kernel takes of the machine; bytes but for the registers."""

    registers: int
    shared: int  # beside what a launch asks for
    stack: int
    spill_stores: int
    spill_loads: int


def usage_of(log: str) -> dict[str, Usage]:
    """Return what ptxas says of each kernel."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:

        def number(pattern: str, part: str = part, default: str | None = None) -> int:
            match = re.search(pattern, part)
            if match is None and default is None:
                raise ValueError(f"no {pattern!r} in {part!r}")
            return int(match[1] if match else default)

        found[part[: part.index("'")]] = Usage(
            registers=number(r"Used (\d+) registers"),
            shared=number(r"(\d+) bytes smem", default="0"),
            stack=number(r"(\d+) bytes stack frame"),
            spill_stores=number(r"(\d+) bytes spill stores"),
            spill_loads=number(r"(\d+) bytes spill loads"),
        )
    return found
