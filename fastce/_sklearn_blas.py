"""A context in which BLAS has one thread, for work that has threads of its own.

The number is the process's: if each user saved and restored it, one that ended before another would leave what the
other had set. So all are in one context, which knows how many they are.
"""

import functools
import os
import threading
from typing import Any

from threadpoolctl import ThreadpoolController


class _BlasLimit:
    """How many are in the context, and the numbers of threads otherwise."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._n_users = 0
        self._before: dict[Any, int] = {}

    def __enter__(self) -> None:
        """Limit BLAS; a number that somebody has set since the last call is the one to come back to."""
        with self.lock:
            if self._n_users == 0:
                self._before = {}
            self._n_users += 1
            for library in _find_blas():
                n_threads = library.num_threads
                if n_threads != 1:
                    self._before[library] = n_threads
                    library.set_num_threads(1)

    def __exit__(self, *exception: object) -> None:
        """Undo it if nobody else needs it; but what somebody else has set since then stays."""
        with self.lock:
            self._n_users -= 1
            if self._n_users == 0:
                self._restore()

    def start_child(self) -> None:
        """Undo it in a forked process, where none but the thread that holds the lock lives on."""
        if self._n_users:
            self._n_users = 0
            self._restore()
        self.lock.release()

    def _restore(self) -> None:
        for library, n_threads in self._before.items():
            if library.num_threads == 1:
                library.set_num_threads(n_threads)


one_blas_thread = _BlasLimit()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=one_blas_thread.lock.acquire,
        after_in_parent=one_blas_thread.lock.release,
        after_in_child=one_blas_thread.start_child,
    )


@functools.cache
def _find_blas() -> list[Any]:
    """Return threadpoolctl's controllers: it looks through all loaded libraries, which takes some milliseconds."""
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)
