/* Transposition between memory and registers: a vector of rows whose classes lie side by side, 2 to 16 of them, a
   constant.

   16 bytes of each row are taken at a time: parts of several rows fill a vector, and instructions that stay within 16
   bytes do the rest. The last 16 bytes of a row may overlap those before. */
#ifndef FASTCE_TRANSPOSE_FEW_H
#define FASTCE_TRANSPOSE_FEW_H

#include <stddef.h>
#include <stdint.h>

#include "simd/simd.h"

#define FASTCE_TEMPLATE "simd/transpose_few.h"
#include "simd/for_types.h"

#elif defined(REAL)

#if WIDTH > 1
#define SIDE (16 / (int)sizeof(REAL)) /* of a square that is transposed */

/* 16 bytes from each of as many places as fit into a vector, and back. */
FASTCE_INLINE VEC F(load_parts)(const REAL* x, ptrdiff_t step) {
#if FASTCE_VECTOR_BYTES == 16
    (void)step;
    return F(load)(x);
#else
    const __m256 low = _mm256_insertf128_ps(
        _mm256_castps128_ps256(_mm_loadu_ps((const float*)x)), _mm_loadu_ps((const float*)(x + step)), 1);
#if FASTCE_VECTOR_BYTES == 32
    return (VEC)low;
#else
    const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps((const float*)(x + 2 * step))),
        _mm_loadu_ps((const float*)(x + 3 * step)), 1);
    return (VEC)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#endif
#endif
}

FASTCE_INLINE void F(store_parts)(REAL* out, ptrdiff_t step, VEC x) {
#if FASTCE_VECTOR_BYTES == 16
    (void)step;
    F(store)(out, x);
#elif FASTCE_VECTOR_BYTES == 32
    _mm_storeu_ps((float*)out, _mm256_castps256_ps128((__m256)x));
    _mm_storeu_ps((float*)(out + step), _mm256_extractf128_ps((__m256)x, 1));
#else
    _mm_storeu_ps((float*)out, _mm512_castps512_ps128((__m512)x));
    _mm_storeu_ps((float*)(out + step), _mm512_extractf32x4_ps((__m512)x, 1));
    _mm_storeu_ps((float*)(out + 2 * step), _mm512_extractf32x4_ps((__m512)x, 2));
    _mm_storeu_ps((float*)(out + 3 * step), _mm512_extractf32x4_ps((__m512)x, 3));
#endif
}

/* Within each 16 bytes: numbers i and j of a, and k and l of b. */
#if IS_FLOAT && defined(FASTCE_X86)
#define PICK(a, b, i, j, k, l) FASTCE_NAME(FASTCE_X86(shuffle), PS, )(a, b, (i) | (j) << 2 | (k) << 4 | (l) << 6)
#elif IS_FLOAT && defined(__clang__)
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k + 4, l + 4)
#elif IS_FLOAT
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (INTS){i, j, k + 4, l + 4})
#endif
/* Of doubles i of a and j of b. */
#if !IS_FLOAT && FASTCE_VECTOR_BYTES == 64
#define PICK(a, b, i, j) _mm512_shuffle_pd(a, b, ((i) | (j) << 1) * 0x55)
#elif !IS_FLOAT && FASTCE_VECTOR_BYTES == 32
#define PICK(a, b, i, j) _mm256_shuffle_pd(a, b, ((i) | (j) << 1) * 5)
#elif !IS_FLOAT && defined(FASTCE_X86)
#define PICK(a, b, i, j) _mm_shuffle_pd(a, b, (i) | (j) << 1)
#elif !IS_FLOAT && defined(__clang__)
#define PICK(a, b, i, j) __builtin_shufflevector(a, b, i, j + 2)
#elif !IS_FLOAT
#define PICK(a, b, i, j) __builtin_shuffle(a, b, (INTS){i, j + 2})
#endif

/* Squares of numbers become transposed squares. */
FASTCE_INLINE void F(transpose_square)(VEC* x) {
#if IS_FLOAT
    const VEC p = PICK(x[0], x[1], 0, 1, 0, 1), q = PICK(x[0], x[1], 2, 3, 2, 3);
    const VEC r = PICK(x[2], x[3], 0, 1, 0, 1), s = PICK(x[2], x[3], 2, 3, 2, 3);
    x[0] = PICK(p, r, 0, 2, 0, 2);
    x[1] = PICK(p, r, 1, 3, 1, 3);
    x[2] = PICK(q, s, 0, 2, 0, 2);
    x[3] = PICK(q, s, 1, 3, 1, 3);
#else
    const VEC p = x[0];
    x[0] = PICK(p, x[1], 0, 0);
    x[1] = PICK(p, x[1], 1, 1);
#endif
}

#if IS_FLOAT && FASTCE_VECTOR_BYTES == 64
/* Up to 4 classes of 16 rows fill as many vectors, and instructions that take any number of two vectors are as fast as
   those that stay within 16 bytes. */
#define FEWEST_PARTS 5
static const int32_t fastce_triples[48] = {/* row + 16 * class, as they lie in memory */
    0, 16, 32, 1, 17, 33, 2, 18, 34, 3, 19, 35, 4, 20, 36, 5, 21, 37, 6, 22, 38, 7, 23, 39, 8, 24, 40, 9, 25, 41, 10,
    26, 42, 11, 27, 43, 12, 28, 44, 13, 29, 45, 14, 30, 46, 15, 31, 47};

FASTCE_INLINE void F(split_few)(const int n_classes, VEC* x) {
    const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const VEC a = x[0], b = x[1], c = x[n_classes - 1];
    if (n_classes == 4) {
        const __m512i swapped = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        F(transpose_square)(x);
        FASTCE_UNROLL
        for (int k = 0; k < 4; k++) x[k] = _mm512_permutexvar_ps(swapped, x[k]);
    } else if (n_classes == 3) {
        const __m512i place = (__m512i)((INTS)row * 3);
        FASTCE_UNROLL
        for (int k = 0; k < 3; k++) {
            const __m512i at = (__m512i)((INTS)place + k);
            x[k] = _mm512_mask_permutexvar_ps(
                _mm512_permutex2var_ps(a, at, b), k < 2 ? 0xF800 : 0xFC00, at, c); /* the last are in c */
        }
    } else {
        const __m512i place = (__m512i)((INTS)row * 2);
        x[0] = _mm512_permutex2var_ps(a, place, b);
        x[1] = _mm512_permutex2var_ps(a, (__m512i)((INTS)place + 1), b);
    }
}

FASTCE_INLINE void F(join_few)(const int n_classes, VEC* x) {
    const VEC a = x[0], b = x[1], c = x[n_classes - 1];
    if (n_classes == 4) {
        const __m512i swapped = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        FASTCE_UNROLL
        for (int k = 0; k < 4; k++) x[k] = _mm512_permutexvar_ps(swapped, x[k]);
        F(transpose_square)(x);
    } else if (n_classes == 3) {
        FASTCE_UNROLL
        for (int k = 0; k < 3; k++) {
            const __m512i from = _mm512_loadu_si512(fastce_triples + 16 * k);
            const __mmask16 are_last = k == 0 ? 0x4924 : k == 1 ? 0x2492 : 0x9249; /* of class 2 */
            x[k] = _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(a, from, b), are_last, from, c);
        }
    } else {
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        x[0] = _mm512_permutex2var_ps(a, low, b);
        x[1] = _mm512_permutex2var_ps(a, (__m512i)((INTS)low + 8), b);
    }
}

#elif IS_FLOAT
#define FEWEST_PARTS 4
/* Pairs and triples of 4 rows are taken apart and put together; they fill 2 and 3 times 16 bytes. */
FASTCE_INLINE void F(split_few)(const int n_classes, VEC* x) {
    const VEC a = x[0], b = x[1], c = x[n_classes - 1];
    if (n_classes == 2) {
        x[0] = PICK(a, b, 0, 2, 0, 2);
        x[1] = PICK(a, b, 1, 3, 1, 3);
    } else {
        const VEC p = PICK(a, b, 1, 2, 0, 1), q = PICK(b, c, 2, 3, 1, 2);
        x[0] = PICK(a, q, 0, 3, 0, 2);
        x[1] = PICK(p, q, 0, 2, 1, 3);
        x[2] = PICK(p, c, 1, 3, 0, 3);
    }
}

FASTCE_INLINE void F(join_few)(const int n_classes, VEC* x) {
    const VEC a = x[0], b = x[1], c = x[n_classes - 1];
    if (n_classes == 2) {
        const VEC p = PICK(a, b, 0, 1, 0, 1), q = PICK(a, b, 2, 3, 2, 3);
        x[0] = PICK(p, p, 0, 2, 1, 3);
        x[1] = PICK(q, q, 0, 2, 1, 3);
    } else {
        const VEC p = PICK(a, b, 0, 2, 0, 2), q = PICK(b, c, 1, 3, 1, 3), r = PICK(c, a, 0, 2, 1, 3);
        x[0] = PICK(p, r, 0, 2, 0, 2);
        x[1] = PICK(q, p, 0, 2, 1, 3);
        x[2] = PICK(r, q, 1, 3, 1, 3);
    }
}
#else
#define FEWEST_PARTS 2
FASTCE_INLINE void F(split_few)(const int n_classes, VEC* x) { (void)n_classes, (void)x; }
FASTCE_INLINE void F(join_few)(const int n_classes, VEC* x) { (void)n_classes, (void)x; }
#endif
#undef PICK

/* The k-th vector of few classes as they lie in memory: parts of 16 bytes of different rows, or as it is. */
FASTCE_INLINE VEC F(load_mixed)(const int n_classes, const REAL* rows, int k) {
    if (FEWEST_PARTS > SIDE) return F(load)(rows + k * WIDTH);
    return F(load_parts)(rows + SIDE * k, (ptrdiff_t)SIDE * n_classes);
}
FASTCE_INLINE void F(store_mixed)(const int n_classes, REAL* rows, int k, VEC x) {
    if (FEWEST_PARTS > SIDE)
        F(store)(rows + k * WIDTH, x);
    else
        F(store_parts)(rows + SIDE * k, (ptrdiff_t)SIDE * n_classes, x);
}
#endif

/* A vector of rows whose classes lie side by side, and back: x has a vector for each class. */
FASTCE_INLINE void F(load_few)(const int n_classes, const REAL* rows, VEC* x) {
#if WIDTH == 1
    for (int k = 0; k < n_classes; k++) x[k] = rows[k];
#else
    if (n_classes < FEWEST_PARTS) {
        FASTCE_UNROLL
        for (int k = 0; k < n_classes; k++) x[k] = F(load_mixed)(n_classes, rows, k);
        F(split_few)(n_classes, x);
        return;
    }
    FASTCE_UNROLL
    for (int k = 0; k < n_classes; k += SIDE) {
        const int first = k < n_classes - SIDE ? k : n_classes - SIDE;
        VEC square[SIDE];
        FASTCE_UNROLL
        for (int j = 0; j < SIDE; j++)
            square[j] = F(load_parts)(rows + j * n_classes + first, (ptrdiff_t)SIDE * n_classes);
        F(transpose_square)(square);
        FASTCE_UNROLL
        for (int j = 0; j < SIDE; j++) x[first + j] = square[j];
    }
#endif
}

FASTCE_INLINE void F(store_few)(const int n_classes, VEC* x, REAL* rows) {
#if WIDTH == 1
    for (int k = 0; k < n_classes; k++) rows[k] = x[k];
#else
    if (n_classes < FEWEST_PARTS) {
        F(join_few)(n_classes, x);
        FASTCE_UNROLL
        for (int k = 0; k < n_classes; k++) F(store_mixed)(n_classes, rows, k, x[k]);
        return;
    }
    FASTCE_UNROLL
    for (int k = 0; k < n_classes; k += SIDE) {
        const int first = k < n_classes - SIDE ? k : n_classes - SIDE;
        VEC square[SIDE];
        FASTCE_UNROLL
        for (int j = 0; j < SIDE; j++) square[j] = x[first + j];
        F(transpose_square)(square);
        FASTCE_UNROLL
        for (int j = 0; j < SIDE; j++)
            F(store_parts)(rows + j * n_classes + first, (ptrdiff_t)SIDE * n_classes, square[j]);
    }
#endif
}

#undef SIDE
#undef FEWEST_PARTS
#endif
