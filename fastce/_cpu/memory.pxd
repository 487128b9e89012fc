"""Memory for one call, kept for the next: the pages of new memory took a tenth of some calls' time."""
from libc.stdlib cimport free, malloc

cdef extern from "host/memory.h" nogil:
    void* exchange_spare "fastce_exchange_spare"(void* memory) noexcept

cdef enum:
    MOST_SPARE_BYTES = 4194304
    HEADER_BYTES = 16  # the size stands in front; what follows is aligned as malloc aligns


cdef inline char* acquire_workspace(Py_ssize_t n_bytes) except NULL:
    """Return memory of at least so many bytes."""
    cdef char* memory = <char*>exchange_spare(NULL)
    if memory == NULL or (<Py_ssize_t*>memory)[0] < n_bytes:
        free(memory)
        memory = <char*>malloc(HEADER_BYTES + n_bytes)
        if memory == NULL:
            raise MemoryError(f"no {n_bytes} bytes for the workspace")
        (<Py_ssize_t*>memory)[0] = n_bytes
    return memory + HEADER_BYTES


cdef inline void release_workspace(char* memory) noexcept:
    """Keep it for the next call instead of what was kept before; much is freed."""
    cdef void* unneeded = memory - HEADER_BYTES
    if (<Py_ssize_t*>unneeded)[0] <= MOST_SPARE_BYTES:
        unneeded = exchange_spare(unneeded)
    free(unneeded)
