/* What the compiler is told beyond the language: how to inline and to align. */
#ifndef FASTCE_COMPILER_H
#define FASTCE_COMPILER_H

#include <stddef.h>

/* FASTCE_INLINE: what a loop is made of must become one with it; left to itself, GCC calls some of that.
   FASTCE_NOINLINE: code that must not take registers from its callers, or must have the same bits in each.
   FASTCE_COLD: code that hardly ever runs. */
#if defined(__GNUC__)
#define FASTCE_INLINE static inline __attribute__((always_inline, unused))
#define FASTCE_NOINLINE static __attribute__((noinline, unused))
#define FASTCE_COLD static __attribute__((cold, noinline, unused))
#elif defined(_MSC_VER)
#define FASTCE_INLINE static __forceinline
#define FASTCE_NOINLINE static __declspec(noinline)
#define FASTCE_COLD static __declspec(noinline)
#else
#define FASTCE_INLINE static inline
#define FASTCE_NOINLINE static
#define FASTCE_COLD static
#endif

/* A member of this type gives a struct the alignment of whole cache lines, and so the vectors in it, which take twice as
   long across two lines. */
#if defined(__GNUC__)
typedef ptrdiff_t fastce_aligned_index __attribute__((aligned(64)));
#else
typedef ptrdiff_t fastce_aligned_index;
#endif

/* Before a loop over vectors that shall stay in registers. */
#if defined(__clang__)
#define FASTCE_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define FASTCE_UNROLL _Pragma("GCC unroll 16")
#else
#define FASTCE_UNROLL
#endif

#endif
