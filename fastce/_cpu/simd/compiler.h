/* What the compiler is told beyond the language: how to inline. */
#ifndef FASTCE_COMPILER_H
#define FASTCE_COMPILER_H

/* FASTCE_INLINE: the functions of a tile must become one loop with their callers'; left to itself, GCC calls some of
   them. FASTCE_NOINLINE: code that must not take registers from its callers, or must have the same bits in each. */
#if defined(__GNUC__)
#define FASTCE_INLINE static inline __attribute__((always_inline, unused))
#define FASTCE_NOINLINE static __attribute__((noinline, unused))
#elif defined(_MSC_VER)
#define FASTCE_INLINE static __forceinline
#define FASTCE_NOINLINE static __declspec(noinline)
#else
#define FASTCE_INLINE static inline
#define FASTCE_NOINLINE static
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
