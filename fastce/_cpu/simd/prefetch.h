/* Prefetching: a hint where the compiler has one, else nothing. */
#ifndef FASTCE_PREFETCH_H
#define FASTCE_PREFETCH_H

#if defined(__GNUC__)
/* The empty statement is an effect: GCC takes a function that does nothing but prefetch for one without, and leaves out
   its calls. */
#define FASTCE_PREFETCH(address, writes, locality)     \
    do {                                               \
        __builtin_prefetch(address, writes, locality); \
        __asm__ volatile("");                          \
    } while (0)
#else
#define FASTCE_PREFETCH(address, writes, locality) ((void)(address))
#endif
#define FASTCE_PREFETCH_WRITE(address) FASTCE_PREFETCH(address, 1, 3)
#define FASTCE_PREFETCH_L1(address) FASTCE_PREFETCH(address, 0, 3)
#define FASTCE_PREFETCH_L2(address) FASTCE_PREFETCH(address, 0, 2)

#endif
