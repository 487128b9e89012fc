"""Memory between pages that nobody may touch, and arrays that are known down to the bytes around them.

Reading or writing a single byte beyond such a block ends the process with a segmentation fault, whatever compiled the
code. Where the system cannot protect pages, the blocks are plain memory.
"""

import ctypes
import mmap
import os

import numpy as np

PAGE = mmap.PAGESIZE
_NO_ACCESS = 0  # PROT_NONE, which Python does not name
_AROUND = 64  # bytes on a side that nothing protects, which are looked at instead: a cache line, or a vector


def _protect(address, n_bytes):
    if os.name == "posix":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")


def guarded_bytes(n_bytes):
    """Return at least so many bytes, whole pages, with an inaccessible page before and another behind them."""
    n_bytes = max(1, -(-n_bytes // PAGE)) * PAGE
    # Kept alive by the arrays that are made of it.
    whole = np.frombuffer(mmap.mmap(-1, n_bytes + 2 * PAGE), np.uint8)
    for start in (0, PAGE + n_bytes):
        _protect(whole.ctypes.data + start, PAGE)
    return whole[PAGE : PAGE + n_bytes]


def behind_a_guard(array):
    """Return a C-ordered copy that starts where an inaccessible page ends."""
    return _copy_to(guarded_bytes(array.nbytes)[: array.nbytes], array)


def before_a_guard(array):
    """Return a C-ordered copy that ends where an inaccessible page starts."""
    block = guarded_bytes(array.nbytes)
    return _copy_to(block[block.size - array.nbytes :], array)


def _copy_to(block, array):
    copy = np.ndarray(array.shape, array.dtype, block)
    copy[...] = array
    return copy


class Pool:
    """Blocks between guards, used again and again: protecting pages takes longer than a small call."""

    def __init__(self):
        self._free = {}
        self._used = []

    def take(self, n_bytes):
        """Return a block of at least so many bytes that nobody uses; what is in it is what was left there."""
        size = max(2, -(-n_bytes // PAGE)).bit_length()
        free = self._free.setdefault(size, [])
        block = free.pop() if free else guarded_bytes(PAGE << size)
        self._used.append((free, block))
        return block

    def release(self):
        """Take all blocks back."""
        for free, block in self._used:
            free.append(block)
        self._used.clear()


class Operand:
    """An array and the bytes around it.

    `place` is "end" for an array that ends where a guard starts, "start" for one that starts where a guard ends, and
    "heap" for one in a block of the allocator's that has no byte more, whose ends a sanitizer knows. `shift` moves the
    first two that many bytes away from their guard. Strides may be anything; those of 0 make elements share places.
    """

    def __init__(self, pool, shape, dtype, strides, place="end", shift=0, fill=0xA5):
        dtype = np.dtype(dtype)
        reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
        low = sum(step for step in reach if step < 0)
        n_bytes = sum(step for step in reach if step > 0) - low + dtype.itemsize if 0 not in shape else 0
        if place == "heap":
            block = np.empty(n_bytes, np.uint8)
            start, window = 0, slice(None)
        else:
            block = pool.take(n_bytes + shift + _AROUND)
            if place == "start":
                start, window = shift, slice(0, shift + n_bytes + _AROUND)
            else:
                start = block.size - shift - n_bytes
                window = slice(start - _AROUND, None)
        self._window = block[window]
        self._window[...] = fill
        self.array = np.ndarray(shape, dtype, block, start - low if n_bytes else start, strides)
        self._numbers = self.array.view(f"u{dtype.itemsize}") if dtype.itemsize <= 8 else self.array
        self.freeze()

    def freeze(self):
        """Remember what is there."""
        self._before = self._window.tobytes()
        self._elements = self._numbers.copy()

    def is_unchanged(self):
        """Return True if all bytes are as they were remembered, those between and around the elements included."""
        return self._window.tobytes() == self._before

    def take_result(self):
        """Return the elements, and tell whether all other bytes are as they were; then all are again."""
        result = self.array.copy()
        self._numbers[...] = self._elements
        return result, self.is_unchanged()
