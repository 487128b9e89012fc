"""The memory of new gradients, which is sooner there than what PyTorch allocates.

For large gradients on the host Linux is asked for large pages, as NumPy asks for its own arrays, and the memory of the
last one is used again once nobody else holds it. To touch new memory for the first time takes longer than all else:
forward and backward of 4096 x 32000 logits of float32 take 36 ms instead of 103, and 475 in PyTorch
(asv_bench/training.py, two cores of a Zen 4).
"""

import ctypes
import mmap
import sys
from collections.abc import Callable

import torch

LARGE = 4 * 2**20  # bytes from which large pages pay; NumPy's own limit

# The memory of the last large gradient, as a tensor of bytes that nobody else has; or nothing.
kept: list[torch.Tensor] = []

# What asks the system for large pages, if it has any.
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None

# How many hold a storage. Nothing public tells; where this is missing, no two are the same: memory is not used again.
_count_holders: Callable[[int], object] = getattr(torch._C, "_storage_Use_Count", lambda storage: object())


def empty_like(input: torch.Tensor) -> torch.Tensor:  # noqa: A002
    """Return what `torch.empty_like` returns, strides included, in memory that is sooner there."""
    if input.device.type != "cpu" or input.nbytes < LARGE:
        return torch.empty_like(input)
    like = torch.empty_like(input, device="meta")
    # A tensor of its own for whoever gets it: the one that is kept is not handed out.
    empty = torch.empty(0, dtype=input.dtype, device="cpu")
    return empty.set_(_lend(like.nbytes).untyped_storage(), 0, like.shape, like.stride())


def _lend(n_bytes: int) -> torch.Tensor:
    """Return memory, and keep hold of it."""
    try:
        memory = kept.pop()  # so that no other thread finds it
    except IndexError:
        memory = None
    if memory is None or not _is_free(memory) or not n_bytes <= memory.untyped_storage().nbytes() <= 2 * n_bytes:
        # There is none, others hold it, or it is too small, or too much to hold for so little.
        memory = torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
        _ask_for_large_pages(memory)
    kept[:] = [memory]
    return memory


def _is_free(memory: torch.Tensor) -> bool:
    """Return True if nothing else holds the storage of a tensor, in this process or in another."""
    return _holders(memory) == _ALONE and not memory.is_shared()


def _holders(memory: torch.Tensor) -> tuple[object, int]:
    """Return how many hold a storage: in PyTorch, and in Python, which share one reference."""
    storage = memory.untyped_storage()
    return _count_holders(storage._cdata), sys.getrefcount(storage)


_ALONE = _holders(torch.empty(1, device="cpu"))


def _ask_for_large_pages(memory: torch.Tensor) -> None:
    """Ask Linux to back memory by large pages; nothing is lost if it will not."""
    if _madvise is None:
        return
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (memory.data_ptr() + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_HUGEPAGE))
