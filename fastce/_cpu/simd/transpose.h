/* Transposition by blocks. */
#ifndef FASTCE_TRANSPOSE_H
#define FASTCE_TRANSPOSE_H

#include <stddef.h>
#include <string.h>

#include "simd/simd.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTCE_SHUFFLE 1
#endif
#endif
/* Four numbers from each of four places, `from` numbers apart, to four places `to` numbers apart, transposed. */
#if defined(FASTCE_SHUFFLE)
typedef float fastce_float4 __attribute__((vector_size(16)));
typedef double fastce_double2 __attribute__((vector_size(16)));
FASTCE_INLINE void fastce_transpose_4(const float* source, ptrdiff_t from, float* target, ptrdiff_t to) {
    fastce_float4 a, b, c, d, p, q, r, s;
    memcpy(&a, source, 16);
    memcpy(&b, source + from, 16);
    memcpy(&c, source + 2 * from, 16);
    memcpy(&d, source + 3 * from, 16);
    p = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    q = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    r = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    s = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    a = __builtin_shufflevector(p, r, 0, 1, 4, 5);
    b = __builtin_shufflevector(p, r, 2, 3, 6, 7);
    c = __builtin_shufflevector(q, s, 0, 1, 4, 5);
    d = __builtin_shufflevector(q, s, 2, 3, 6, 7);
    memcpy(target, &a, 16);
    memcpy(target + to, &b, 16);
    memcpy(target + 2 * to, &c, 16);
    memcpy(target + 3 * to, &d, 16);
}
/* Likewise two doubles. */
FASTCE_INLINE void fastce_transpose_2(const double* source, ptrdiff_t from, double* target, ptrdiff_t to) {
    fastce_double2 a, b, p, q;
    memcpy(&a, source, 16);
    memcpy(&b, source + from, 16);
    p = __builtin_shufflevector(a, b, 0, 2);
    q = __builtin_shufflevector(a, b, 1, 3);
    memcpy(target, &p, 16);
    memcpy(target + to, &q, 16);
}
#else
FASTCE_INLINE void fastce_transpose_4(const float* source, ptrdiff_t from, float* target, ptrdiff_t to) {
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k++) target[k * to + i] = source[i * from + k];
}
FASTCE_INLINE void fastce_transpose_2(const double* source, ptrdiff_t from, double* target, ptrdiff_t to) {
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 2; k++) target[k * to + i] = source[i * from + k];
}
#endif
#if defined(__AVX__)
/* Likewise eight floats. */
FASTCE_INLINE void fastce_transpose_8(const float* source, ptrdiff_t from, float* target, ptrdiff_t to) {
    __m256 x[8], y[8];
    for (int i = 0; i < 8; i++) x[i] = _mm256_loadu_ps(source + i * from);
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            x[i + 2 * k] = _mm256_shuffle_ps(y[i + k], y[i + k + 2], 0x44);
            x[i + 2 * k + 1] = _mm256_shuffle_ps(y[i + k], y[i + k + 2], 0xEE);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(target + i * to, _mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
        _mm256_storeu_ps(target + (i + 4) * to, _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
    }
}
#endif
/* m <= 16 lines of n numbers by such blocks; the last overlap those before. Loops of known length are unrolled. */
#define FASTCE_TRANSPOSE_STRIP(side, block)                                                             \
    for (ptrdiff_t k = 0; k < n; k += side) {                                                           \
        if (k > n - side) k = n - side;                                                                 \
        if (m == 16)                                                                                    \
            for (ptrdiff_t i = 0; i < 16; i += side) block(x + i * from + k, from, y + k * to + i, to); \
        else                                                                                            \
            for (ptrdiff_t i = 0; i < m; i += side) {                                                   \
                if (i > m - side) i = m - side;                                                         \
                block(x + i * from + k, from, y + k * to + i, to);                                      \
            }                                                                                           \
    }
FASTCE_NOINLINE void fastce_transpose_floats(
    const float* x, ptrdiff_t from, ptrdiff_t m, ptrdiff_t n, float* y, ptrdiff_t to) {
#if defined(__AVX__)
    if (m >= 8 && n >= 8) {
        FASTCE_TRANSPOSE_STRIP(8, fastce_transpose_8)
        return;
    }
#endif
    FASTCE_TRANSPOSE_STRIP(4, fastce_transpose_4)
}
FASTCE_NOINLINE void fastce_transpose_doubles(
    const double* x, ptrdiff_t from, ptrdiff_t m, ptrdiff_t n, double* y, ptrdiff_t to) {
    FASTCE_TRANSPOSE_STRIP(2, fastce_transpose_2)
}

#define fastce_transpose(x, from, m, n, y, to) FASTCE_OF_VECTORS(transpose, *(x))(x, from, m, n, y, to)

#endif
