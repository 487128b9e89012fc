/* Vectors of floats and doubles as wide as the instruction set's registers, and what can be done with them beyond
   operators.

   Intrinsics stand only where operators do not always lead to the instruction: the maximum, multiplication and addition
   with one rounding, masks and `select` with AVX2 and AVX-512, numbers of 16 bits (convert.h), the lookup in a
   register (math.h), parts of vectors (row_sweep.h), transposition (transpose_few.h) and stores past the caches
   (stream.h). Vectors wider than the registers were 10 to 20 times slower. */
#ifndef FASTCE_SIMD_H
#define FASTCE_SIMD_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "simd/compiler.h"

#if defined(FASTCE_NO_VECTORS) /* to see what other compilers see */
#define FASTCE_VECTOR_BYTES 0
#elif defined(__AVX512BW__) && defined(__AVX512DQ__)
#define FASTCE_VECTOR_BYTES 64
#define FASTCE_X86(name) _mm512_##name
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FASTCE_VECTOR_BYTES 32
#define FASTCE_X86(name) _mm256_##name
#elif defined(__GNUC__)
#define FASTCE_VECTOR_BYTES 16
#if defined(__SSE2__)
#define FASTCE_X86(name) _mm_##name
#endif
#else
#define FASTCE_VECTOR_BYTES 0
#endif
#if defined(FASTCE_X86)
#include <immintrin.h>
#endif
#if FASTCE_VECTOR_BYTES == 16 && defined(__aarch64__)
#define FASTCE_IS_NEON 1
#include <arm_neon.h>
#else
#define FASTCE_IS_NEON 0
#endif
#define FASTCE_FLOATS (FASTCE_VECTOR_BYTES ? FASTCE_VECTOR_BYTES / 4 : 1)
#define FASTCE_DOUBLES (FASTCE_VECTOR_BYTES ? FASTCE_VECTOR_BYTES / 8 : 1)

/* Whether there is an instruction for x * y + z with one rounding. */
#if defined(__FMA__) || (defined(__ARM_FEATURE_FMA) && defined(__aarch64__))
#define FASTCE_HAS_FMA 1
#else
#define FASTCE_HAS_FMA 0
#endif

/* Whether vectors are wider than the 16 bytes that every CPU has. */
#define FASTCE_IS_WIDE (FASTCE_VECTOR_BYTES > 16)

/* The function for the type of `x`, a number: of vectors, or of numbers. */
#define FASTCE_OF_VECTORS(name, x) _Generic((x), float: fastce_##name##_floats, double: fastce_##name##_doubles)
#define FASTCE_OF_NUMBERS(name, x) _Generic((x), float: fastce_##name##_float, double: fastce_##name##_double)

/* Memory is read in the order of the loop: what GCC made of loads otherwise changed from build to build, and where
   lines came out of order the loss of rows that are not in cache took a tenth longer. */
#if FASTCE_VECTOR_BYTES == 64
#define FASTCE_KEEP_ORDER(x) __asm__ volatile("" : "+v"(x) : : "memory")
#elif defined(FASTCE_X86)
#define FASTCE_KEEP_ORDER(x) __asm__ volatile("" : "+x"(x) : : "memory")
#elif FASTCE_IS_NEON
#define FASTCE_KEEP_ORDER(x) __asm__ volatile("" : "+w"(x) : : "memory")
#else
#define FASTCE_KEEP_ORDER(x) ((void)0)
#endif

#define FASTCE_TEMPLATE "simd/simd.h"
#define FASTCE_SCALARS
#include "simd/for_types.h"

#elif defined(REAL)

#if WIDTH == 1
typedef REAL VEC;
typedef INT INTS;
typedef UINT BITS;
typedef int MASK;
#else
typedef REAL VEC __attribute__((vector_size(FASTCE_VECTOR_BYTES)));
typedef INT INTS __attribute__((vector_size(FASTCE_VECTOR_BYTES)));
typedef UINT BITS __attribute__((vector_size(FASTCE_VECTOR_BYTES)));
#if FASTCE_VECTOR_BYTES == 64 && IS_FLOAT
typedef __mmask16 MASK;
#elif FASTCE_VECTOR_BYTES == 64
typedef __mmask8 MASK;
#else
typedef INTS MASK;
#endif
#endif

FASTCE_INLINE VEC F(load)(const REAL* source) {
    VEC x;
    memcpy(&x, source, sizeof(x));
    return x;
}

FASTCE_INLINE void F(store)(REAL* target, VEC x) { memcpy(target, &x, sizeof(x)); }

FASTCE_INLINE BITS F(bits_of)(VEC x) {
    BITS bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

FASTCE_INLINE VEC F(of_bits)(BITS bits) {
    VEC x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

#define SIGN ((UINT)1 << (8 * sizeof(REAL) - 1))

/* -|x| */
FASTCE_INLINE VEC F(negative)(VEC x) { return F(of_bits)(F(bits_of)(x) | SIGN); }

/* |x| with the sign of another. */
FASTCE_INLINE VEC F(with_sign)(VEC x, VEC sign) {
    return F(of_bits)((F(bits_of)(x) & ~SIGN) | (F(bits_of)(sign) & SIGN));
}

#undef SIGN

/* Where x > y, and where they differ, which NaN does from all; where a number is `k`, and where it is less. */
#if WIDTH > 1 && FASTCE_VECTOR_BYTES == 64
FASTCE_INLINE MASK F(is_greater)(VEC x, VEC y) { return FASTCE_NAME(_mm512_cmp, PS, _mask)(x, y, _CMP_GT_OQ); }
FASTCE_INLINE MASK F(differs)(VEC x, VEC y) { return FASTCE_NAME(_mm512_cmp, PS, _mask)(x, y, _CMP_NEQ_UQ); }
FASTCE_INLINE MASK F(is)(INTS x, INT k) {
    return FASTCE_NAME(_mm512_cmpeq, EPI, _mask)((__m512i)x, (__m512i)(k - (INTS){0}));
}
FASTCE_INLINE MASK F(is_not)(INTS x, INT k) {
    return FASTCE_NAME(_mm512_cmpneq, EPI, _mask)((__m512i)x, (__m512i)(k - (INTS){0}));
}
FASTCE_INLINE MASK F(is_less)(INTS x, INT k) {
    return FASTCE_NAME(_mm512_cmplt, EPI, _mask)((__m512i)x, (__m512i)(k - (INTS){0}));
}
#else
FASTCE_INLINE MASK F(is_greater)(VEC x, VEC y) { return x > y; }
FASTCE_INLINE MASK F(differs)(VEC x, VEC y) { return x != y; }
FASTCE_INLINE MASK F(is)(INTS x, INT k) { return x == k; }
FASTCE_INLINE MASK F(is_less)(INTS x, INT k) { return x < k; }
#endif

#if WIDTH == 1
FASTCE_INLINE VEC F(fill)(REAL value) { return value; }
FASTCE_INLINE VEC F(select)(MASK mask, VEC x, VEC other) { return mask ? x : other; }
FASTCE_INLINE VEC F(keep)(MASK mask, VEC x) { return mask ? x : 0; }
FASTCE_INLINE VEC F(unless)(INTS number, INT k, VEC x) { return number == k ? 0 : x; }
FASTCE_INLINE INTS F(load_ints)(const int32_t* source) { return *source; }
#else
FASTCE_INLINE VEC F(fill)(REAL value) { return value - (VEC){0}; }

/* x where the mask holds, else `other`. */
FASTCE_INLINE VEC F(select)(MASK mask, VEC x, VEC other) {
#if FASTCE_VECTOR_BYTES == 64
    return FASTCE_NAME(_mm512_mask_mov, PS, )(other, mask, x);
#elif FASTCE_VECTOR_BYTES == 32
    return FASTCE_NAME(_mm256_blendv, PS, )(other, x, (VEC)mask);
#elif FASTCE_IS_NEON
    return FASTCE_NAME(vbslq, NEON, )((BITS)mask, x, other);
#else
    return F(of_bits)(((BITS)mask & F(bits_of)(x)) | (~(BITS)mask & F(bits_of)(other)));
#endif
}

/* x where the mask holds, else 0. */
FASTCE_INLINE VEC F(keep)(MASK mask, VEC x) {
#if FASTCE_VECTOR_BYTES == 64
    return FASTCE_NAME(_mm512_maskz_mov, PS, )(mask, x);
#else
    return F(of_bits)((BITS)mask & F(bits_of)(x));
#endif
}

/* x, but 0 where the number is `k`. */
FASTCE_INLINE VEC F(unless)(INTS number, INT k, VEC x) {
#if FASTCE_VECTOR_BYTES == 64
    return F(keep)(F(is_not)(number, k), x);
#elif FASTCE_VECTOR_BYTES == 32
    return FASTCE_NAME(_mm256_andnot, PS, )((VEC)(number == k), x);
#else
    return F(keep)(number != k, x);
#endif
}

FASTCE_INLINE INTS F(load_ints)(const int32_t* source) {
#if IS_FLOAT
    INTS x;
    memcpy(&x, source, sizeof(x));
    return x;
#else
    typedef int32_t half __attribute__((vector_size(FASTCE_VECTOR_BYTES / 2)));
    half x;
    memcpy(&x, source, sizeof(x));
    return __builtin_convertvector(x, INTS);
#endif
}
#endif

#if FASTCE_HAS_FMA
/* x * y + z with one rounding, for results that depend on it: whether compilers contract operators to that depends on
   their flags, and under a sanitizer on its instructions. */
FASTCE_INLINE VEC F(fma)(VEC x, VEC y, VEC z) {
#if WIDTH > 1 && defined(FASTCE_X86)
    return FASTCE_NAME(FASTCE_X86(fmadd), PS, )(x, y, z);
#elif WIDTH > 1 && FASTCE_IS_NEON
    return FASTCE_NAME(vfmaq, NEON, )(z, x, y);
#elif IS_FLOAT
    return fmaf(x, y, z);
#else
    return fma(x, y, z);
#endif
}
#endif

/* The larger of two; NaN where `other` is. */
FASTCE_INLINE VEC F(max_or_nan)(VEC x, VEC other) {
#if WIDTH > 1 && defined(FASTCE_X86)
    return FASTCE_NAME(FASTCE_X86(max), PS, )(x, other);
#elif WIDTH > 1 && FASTCE_IS_NEON
    return FASTCE_NAME(vmaxq, NEON, )(x, other);
#else
    return F(select)(F(is_greater)(x, other), x, other);
#endif
}

/* The larger of two; `other` where x is NaN. */
FASTCE_INLINE VEC F(max)(VEC x, VEC other) {
#if WIDTH > 1 && FASTCE_IS_NEON
    return FASTCE_NAME(vmaxnmq, NEON, )(x, other);
#else
    return F(max_or_nan)(x, other);
#endif
}

/* x in the lanes from `first` on, `other` before. */
FASTCE_INLINE VEC F(from_lane)(int first, VEC x, VEC other) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return F(select)(F(is_less)(F(load_ints)(numbers), first), other, x);
}

#endif
