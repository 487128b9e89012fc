"""What only arrays on a GPU need: errors that come late, and checks that wait.

The functions of `fastce` take CuPy arrays, and whatever else is on a GPU and speaks DLPack or the CUDA array interface,
as they take NumPy's: with the same options, in place or not, on the current stream of the logits' device. Results are
CuPy arrays. Everything but numbers has to be on that device; nothing is copied between host and device unasked.

A row's results have the same bits in every batch and with every `out`, as long as it begins at the same place within 16
bytes, which may decide which thread adds up what. Rows without gaps whose length is a multiple of 16 bytes all do.

Calls return before the GPU has done anything, so what it finds wrong is told later (`check_errors`), or by who waits
(`synchronous_checks`). The first call of its kind compiles a kernel, for a second or so, which CuPy keeps on disk.
"""

from fastce._array import synchronous_checks
from fastce._cuda import check_errors

__all__ = ["check_errors", "synchronous_checks"]
