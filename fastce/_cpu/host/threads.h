/* Clock, processor and what a thread has learnt. */
#ifndef FASTCE_THREADS_H
#define FASTCE_THREADS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* for the processors of a thread */
#endif
#include "simd/compiler.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__linux__) && defined(_OPENMP)
#include <pthread.h>
#include <sched.h>
#endif

/* Seconds: what a number takes in the fastest calls, 64 x 1000 float32 with AVX-512; and how long threads stay
   awake, at least with GNU's runtime as `_runtime` starts it. */
#define FASTCE_SECONDS_PER_NUMBER 0.25e-9
#define FASTCE_AWAKE 50e-6
#ifdef _OPENMP
#define fastce_clock() omp_get_wtime()
#else
#define fastce_clock() 0.0
#endif
#if defined(_MSC_VER) && !defined(__clang__)
#define FASTCE_THREAD_LOCAL __declspec(thread)
#else
#define FASTCE_THREAD_LOCAL __thread
#endif
#if defined(__linux__) && defined(_OPENMP)
/* Whether this thread's processors are what was chosen here. */
static FASTCE_THREAD_LOCAL int fastce_stepped_aside = 0;
typedef pthread_t fastce_thread;
#define fastce_this_thread() pthread_self()
FASTCE_INLINE int fastce_processor(void) { return sched_getcpu(); }
/* A thread that is bound, by the user or by OpenMP's own variables, stays: so does one of a caller that is. */
FASTCE_NOINLINE void fastce_leave(int processor, fastce_thread caller) {
    cpu_set_t allowed;
    if (processor < 0 || processor >= CPU_SETSIZE || sched_getcpu() != processor) return;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) || CPU_COUNT(&allowed) < 2) {
        if (!fastce_stepped_aside) return;
    }
    if (pthread_getaffinity_np(caller, sizeof(allowed), &allowed)) return;
    CPU_CLR(processor, &allowed);
    if (CPU_COUNT(&allowed) > 0) fastce_stepped_aside = !sched_setaffinity(0, sizeof(allowed), &allowed);
}
#else
typedef int fastce_thread;
#define fastce_processor() (-1)
#define fastce_this_thread() (-1)
#define fastce_leave(processor, caller) ((void)0)
#endif
typedef struct {
    double stop;  /* the clock's time at the end of the last call that might have been shared */
    double lost;  /* seconds, by the last call that lost time */
    double grace; /* the clock's time from which that is small */
    double delay; /* by which calls were late when the thread was left alone */
    double until; /* the clock's time until which the thread works alone */
} fastce_experience;
static FASTCE_THREAD_LOCAL fastce_experience fastce_own_experience;
FASTCE_NOINLINE fastce_experience* fastce_experience_of_thread(void) { return &fastce_own_experience; }

#endif
