/* One block of memory, kept from call to call. */
#ifndef FASTCE_MEMORY_H
#define FASTCE_MEMORY_H

#include <stddef.h>

#include "simd/compiler.h"
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

/* What an earlier call left, or NULL. Exchanged in one step, for Python may run without its lock. */
static void* fastce_spare = NULL;
FASTCE_NOINLINE void* fastce_exchange_spare(void* memory) {
#if defined(_MSC_VER) && !defined(__clang__)
    return _InterlockedExchangePointer(&fastce_spare, memory);
#else
    return __atomic_exchange_n(&fastce_spare, memory, __ATOMIC_ACQ_REL);
#endif
}

#endif
