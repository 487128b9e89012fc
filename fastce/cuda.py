"""Arrays on a GPU: when errors are reported.

The functions of `fastce` take CuPy arrays, and others on a GPU that speak DLPack or the CUDA array interface, just like
NumPy arrays: with the same options, in place or not, on the current stream of the logits' device. Results are CuPy
arrays. All arrays of a call must be on that device; nothing is copied between host and device unasked.

A row's results are the same bits in every batch and with every `out`, if the row begins at the same offset within 16
bytes, which decides which thread sums what. Rows without gaps whose length is a multiple of 16 bytes all do.

Calls return before the GPU has done anything. So a class out of range is reported later, by the next call or by
`check_errors`; within `synchronous_checks` each call waits for the check. The first call of its kind compiles a kernel,
which takes about a second. CuPy keeps it on disk.
"""

from fastce._array import synchronous_checks
from fastce._cuda import check_errors

__all__ = ["check_errors", "synchronous_checks"]
