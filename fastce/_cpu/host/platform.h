/* Compiler, OpenMP and CPU, and what they say of themselves. */
#ifndef FASTCE_PLATFORM_H
#define FASTCE_PLATFORM_H

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <stddef.h>
#include <stdint.h>

#include "simd/compiler.h"
#if defined(_MSC_VER)
#include <intrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
#include <pthread.h>
#include <stdlib.h>
#endif

#ifdef _OPENMP
#define FASTCE_OPENMP 1
#define fastce_max_threads() omp_get_max_threads()
#else
#define FASTCE_OPENMP 0
#define fastce_max_threads() 1
#endif
#if defined(__clang__)
#define FASTCE_COMPILER "Clang " __clang_version__
#elif defined(__GNUC__)
#define FASTCE_COMPILER "GCC " __VERSION__
#elif defined(_MSC_VER)
#define FASTCE_COMPILER "MSVC"
#else
#define FASTCE_COMPILER "unknown"
#endif
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
/* These also ask whether the operating system saves the registers. */
FASTCE_NOINLINE int fastce_has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
FASTCE_NOINLINE int fastce_has_avx512(void) {
    return fastce_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#else
FASTCE_NOINLINE int fastce_has_avx2(void) { return 0; }
FASTCE_NOINLINE int fastce_has_avx512(void) { return 0; }
#endif
/* The size of the last cache: what the CPU says, or else what most have. */
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
FASTCE_NOINLINE ptrdiff_t fastce_find_cache_bytes(void) {
    unsigned a, b, c, d, leaf = 4;
    ptrdiff_t n_bytes = 0;
    /* AMD has a leaf of its own for what Intel's says. */
    if (__get_cpuid(0x80000001, &a, &b, &c, &d) && (c & 1 << 22)) leaf = 0x8000001D;
    for (unsigned i = 0; i < 8 && __get_cpuid_count(leaf, i, &a, &b, &c, &d) && (a & 31) != 0; i++)
        n_bytes = (ptrdiff_t)((b >> 22) + 1) * ((b >> 12 & 1023) + 1) * ((b & 4095) + 1) * (c + 1);
    return n_bytes;
}
#else
FASTCE_NOINLINE ptrdiff_t fastce_find_cache_bytes(void) { return 0; }
#endif
FASTCE_INLINE ptrdiff_t fastce_cache_bytes(void) {
    static ptrdiff_t n_bytes = 0; /* as much for every thread that asks */
    if (n_bytes == 0) n_bytes = fastce_find_cache_bytes();
    if (n_bytes == 0) n_bytes = 32 << 20;
    return n_bytes;
}
/* How many of n threads, this one included, can be there at once: libgomp ends the process where it cannot start
   one. So as many as it will start are started here first, for nothing but that, unless this thread had as many
   before. */
#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
static __thread int fastce_n_started = 1;
FASTCE_NOINLINE void* fastce_wait(void* gate) {
    pthread_mutex_lock((pthread_mutex_t*)gate);
    pthread_mutex_unlock((pthread_mutex_t*)gate);
    return NULL;
}
FASTCE_NOINLINE int fastce_startable(int n) {
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t* threads;
    int started = 0;
    if (n <= fastce_n_started) return n;
    threads = (pthread_t*)malloc((size_t)n * sizeof(pthread_t));
    if (threads == NULL) return 1;
    pthread_mutex_lock(&gate);
    while (started < n - 1 && pthread_create(&threads[started], NULL, fastce_wait, &gate) == 0) started++;
    pthread_mutex_unlock(&gate);
    for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
    free(threads);
    if (started == n - 1) fastce_n_started = n;
    return started + 1;
}
FASTCE_NOINLINE void fastce_forget_started(void) { fastce_n_started = 1; }
#else
FASTCE_NOINLINE int fastce_startable(int n) { return n; }
FASTCE_NOINLINE void fastce_forget_started(void) {}
#endif
/* Clears the upper halves of the vector registers. Compilers do so where they see that a function has used them, which
   inline assembly hides from them; with the halves in use all SSE code of this thread is slower from then on: trees of
   XGBoost took 1.4 times as long. */
FASTCE_INLINE void fastce_end_vectors(void) {
#if defined(__AVX__)
    _mm256_zeroupper();
#endif
}
/* The same function, or address, but no compiler knows that: none inlines it, or knows what is there. */
FASTCE_INLINE void* fastce_own_function(void* function) {
#if defined(__GNUC__)
    __asm__("" : "+r"(function));
#endif
    return function;
}
/* Compilers may read memory twice, and what is read for the second time may be something else. Not behind this: a
   copy there was made before, and none of what is behind reads the original. */
FASTCE_INLINE void fastce_read_once(const void* copy) {
#if defined(__GNUC__)
    __asm__ volatile("" : : "r"(copy) : "memory");
#elif defined(_MSC_VER)
    _ReadWriteBarrier();
#endif
}

/* One read, whatever other threads do meanwhile: what is checked is what is used. */
FASTCE_INLINE int64_t fastce_read_target(const int64_t* target) {
#if defined(__GNUC__)
    return __atomic_load_n(target, __ATOMIC_RELAXED);
#else
    return *(const volatile int64_t*)target;
#endif
}

#endif
