"""What only arrays on a GPU need: errors that come late, or checks that wait.

The functions of `fastce` take CuPy arrays, and whatever else is on a GPU and speaks DLPack or the CUDA array interface,
as they take NumPy's.
"""

from fastce._array import synchronous_checks
from fastce._cuda import check_errors

__all__ = ["check_errors", "synchronous_checks"]
