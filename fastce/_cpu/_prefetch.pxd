"""Asking for memory before it is needed: a hint where the compiler has one, else nothing."""

cdef extern from *:
    r"""
    #if defined(__GNUC__)
    #define FASTCE_PREFETCH(address, locality) __builtin_prefetch(address, 0, locality)
    #else
    #define FASTCE_PREFETCH(address, locality) ((void)(address))
    #endif
    #if defined(__GNUC__)
    #define FASTCE_PREFETCH_WRITE(address) __builtin_prefetch(address, 1, 3)
    #else
    #define FASTCE_PREFETCH_WRITE(address) ((void)(address))
    #endif
    #define FASTCE_PREFETCH_L1(address) FASTCE_PREFETCH(address, 3)
    #define FASTCE_PREFETCH_L2(address) FASTCE_PREFETCH(address, 2)
    /* Of rows that follow each other at once to L1. Of long rows there is time, and L1 has few places to wait for
       memory in: 4096 x 32000 takes a tenth less by L2. */
    #define FASTCE_PREFETCH_ROW(address, is_long) \
        do { if (is_long) FASTCE_PREFETCH_L2(address); else FASTCE_PREFETCH_L1(address); } while (0)
    """
    void prefetch_row "FASTCE_PREFETCH_ROW"(const void* address, bint is_long) noexcept nogil
    void prefetch "FASTCE_PREFETCH_L1"(const void* address) noexcept nogil
    void prefetch_to_write "FASTCE_PREFETCH_WRITE"(const void* address) noexcept nogil
    # L1 has no room for a block of probabilities besides the two of logits.
    void prefetch_to_l2 "FASTCE_PREFETCH_L2"(const void* address) noexcept nogil


cdef enum:
    CACHE_LINE = 64
