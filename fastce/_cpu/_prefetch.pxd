"""Asking for memory before it is needed: a hint where the compiler has one, else nothing."""

cdef extern from *:
    """
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
    """
    void prefetch "FASTCE_PREFETCH_L1"(const void* address) noexcept nogil
    void prefetch_to_write "FASTCE_PREFETCH_WRITE"(const void* address) noexcept nogil
    # L1 has no room for a block of probabilities besides the two of logits.
    void prefetch_to_l2 "FASTCE_PREFETCH_L2"(const void* address) noexcept nogil


cdef enum:
    CACHE_LINE = 64
