"""Asking for memory before it is needed: a hint where the compiler has one, else nothing."""

cdef extern from "simd/prefetch.h" nogil:
    void prefetch "FASTCE_PREFETCH_L1"(const void* address)
    void prefetch_to_write "FASTCE_PREFETCH_WRITE"(const void* address)
    # L1 has no room for a block of probabilities besides the two of logits.
    void prefetch_to_l2 "FASTCE_PREFETCH_L2"(const void* address)


cdef enum:
    CACHE_LINE = 64
