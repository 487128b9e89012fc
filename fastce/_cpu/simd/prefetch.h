/* Prefetching: a hint where the compiler has one, else nothing. */
#ifndef FASTCE_PREFETCH_H
#define FASTCE_PREFETCH_H

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
    do {                                      \
        if (is_long)                          \
            FASTCE_PREFETCH_L2(address);      \
        else                                  \
            FASTCE_PREFETCH_L1(address);      \
    } while (0)

#endif
