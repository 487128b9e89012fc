"""What the operating system reports about the machine."""

import os
import platform
from math import inf
from pathlib import Path


def read_proc(path: str, key: str) -> str | None:
    """Return the value of a key in one of Linux's lists, or None."""
    try:
        lines = Path("/proc", path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def read_bytes(path: str, key: str) -> float:
    """Return a number of bytes in one of Linux's lists; infinity where that is not known."""
    value = read_proc(path, key)
    return inf if value is None else int(value.split()[0]) * 1024


def available_memory() -> float:
    """Return the bytes that can be had without swapping; infinity where that is not known."""
    return read_bytes("meminfo", "MemAvailable")


def describe_machine() -> dict[str, str | int | None]:
    """Return what speed depends on."""
    return {
        "processor": read_proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "n_processors": os.cpu_count(),
        "memory": read_proc("meminfo", "MemTotal"),
        "system": platform.platform(),
    }
