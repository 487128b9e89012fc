/* Exponentials of a tile and their sums, in registers. */
#ifndef FASTCE_TILE_H
#define FASTCE_TILE_H

#include <math.h>

#include "simd/math.h"
#include "simd/prefetch.h"
#include "simd/simd.h"

#if FASTCE_HAS_REGISTERS
/* e^x * 2^32 for FASTCE_EXP_FLOOR <= x <= 1, within 2 ulp; NaN gives NaN. */
FASTCE_INLINE fastce_floats fastce_exp_in_range(fastce_floats x) {
    /* The bits of 2^(32 + j/16) or 2^(32 + j/4), less what j adds when n is shifted into the exponent's place; the
       numbers whose sum's low bits count such fractions; and (e^r - 1 - r) / r^2. Errors: 4.7e-9 and 1.1e-8. */
#if FASTCE_WIDTH == 16
    const fastce_ints powers =
        _mm512_setr_epi32(0x4F800000, 0x4F7DAAC3, 0x4F7B95C2, 0x4F79C3D3, 0x4F7837F0, 0x4F76F532, 0x4F75FED7,
            0x4F75583F, 0x4F7504F3, 0x4F7508A4, 0x4F75672A, 0x4F76248C, 0x4F7744FD, 0x4F78CCDF, 0x4F7AC0C7, 0x4F7D257D);
    const fastce_floats magic = fastce_fill(786432.0f); /* 1.5 * 2^19 */
    const int shift = 19;
#else
    const fastce_ints powers = _mm256_setr_epi32(
        0x4F800000, 0x4F7837F0, 0x4F7504F3, 0x4F7744FD, 0x4F800000, 0x4F7837F0, 0x4F7504F3, 0x4F7744FD);
    const fastce_floats magic = fastce_fill(3145728.0f); /* 1.5 * 2^21 */
    const int shift = 21;
#endif
    fastce_floats sum = FASTCE_V(fmadd_ps)(x, fastce_fill(1.4426950408889634f), magic);
    fastce_floats n = FASTCE_V(sub_ps)(sum, magic);
    fastce_floats r = FASTCE_V(fnmadd_ps)(n, fastce_fill(0.6931471805599453f), x);
    fastce_ints bits = fastce_bits(sum);
    fastce_floats power =
        fastce_floats_of(FASTCE_V(add_epi32)(fastce_look_up(powers, bits), FASTCE_V(slli_epi32)(bits, shift)));
#if FASTCE_WIDTH == 16
    fastce_floats p = FASTCE_V(fmadd_ps)(fastce_fill(0.16666862360138368816f), r, fastce_fill(0.50000978469546839687f));
#else
    fastce_floats p =
        FASTCE_V(fmadd_ps)(fastce_fill(0.041674488890576340227f), r, fastce_fill(0.16671360158338996951f));
    p = FASTCE_V(fmadd_ps)(p, r, fastce_fill(0.5f));
#endif
    p = FASTCE_V(fmadd_ps)(p, FASTCE_V(mul_ps)(r, r), r);
    return FASTCE_V(fmadd_ps)(p, power, power);
}
/* fastce_exp: likewise for all x <= 1; -inf gives 0. fastce_exp_of_other: likewise, but 0 where y is k. */
#if FASTCE_WIDTH == 16 /* masks cost nothing: the last instruction takes them */
FASTCE_INLINE fastce_floats fastce_exp(fastce_floats x) {
    __mmask16 is_in_range = _mm512_cmp_ps_mask(x, fastce_fill(FASTCE_EXP_FLOOR), _CMP_NLT_UQ);
    return _mm512_maskz_mov_ps(is_in_range, fastce_exp_in_range(x));
}
FASTCE_INLINE fastce_floats fastce_exp_of_other(fastce_floats x, fastce_ints y, int32_t k) {
    __mmask16 is_other = _mm512_cmpneq_epi32_mask(y, _mm512_set1_epi32(k));
    is_other = _mm512_mask_cmp_ps_mask(is_other, x, fastce_fill(FASTCE_EXP_FLOOR), _CMP_NLT_UQ);
    return _mm512_maskz_mov_ps(is_other, fastce_exp_in_range(x));
}
#else /* the power of the least argument is 0; max keeps NaN */
FASTCE_INLINE fastce_floats fastce_exp(fastce_floats x) {
    return fastce_exp_in_range(_mm256_max_ps(fastce_fill(FASTCE_EXP_FLOOR), x));
}
FASTCE_INLINE fastce_floats fastce_exp_of_other(fastce_floats x, fastce_ints y, int32_t k) {
    __m256i is_target = _mm256_cmpeq_epi32(y, _mm256_set1_epi32(k));
    return _mm256_andnot_ps(_mm256_castsi256_ps(is_target), fastce_exp(x));
}
#endif
FASTCE_INLINE fastce_floats fastce_exp_of(fastce_floats x, fastce_floats top, float scale) {
    fastce_floats d = FASTCE_V(sub_ps)(x, top);
    return fastce_exp(scale == 1 ? d : FASTCE_V(mul_ps)(fastce_fill(scale), d));
}
/* The sum of 4, 2 or 1 groups. */
FASTCE_INLINE fastce_floats fastce_total(const fastce_floats* y, int n_groups) {
    fastce_floats total = y[0];
    if (n_groups > 1) total = FASTCE_V(add_ps)(total, y[1]);
    return n_groups < 4 ? total : FASTCE_V(add_ps)(total, FASTCE_V(add_ps)(y[2], y[3]));
}
FASTCE_INLINE void fastce_add_to(float* sum, fastce_floats x) {
    fastce_store(sum, FASTCE_V(add_ps)(fastce_load(sum), x));
}
FASTCE_INLINE void fastce_exp_and_fold(const float* x, ptrdiff_t pitch, int n_groups, const float* top, float scale,
    float* e, ptrdiff_t e_pitch, float* all, float* rest) {
    const fastce_floats one = fastce_fill(4294967296.0f);
    for (int j = 0; j < 16; j += FASTCE_WIDTH) {
        fastce_floats y[4], z[4];
        fastce_floats m = fastce_load(top + j);
        for (int g = 0; g < n_groups; g++) y[g] = fastce_exp_of(fastce_load(x + g * pitch + j), m, scale);
        for (int g = 0; g < n_groups; g++) fastce_store(e + g * e_pitch + j, y[g]);
        if (rest != NULL)
            for (int g = 0; g < n_groups; g++) z[g] = fastce_zero_if_equal(y[g], one);
        if (all != NULL) fastce_add_to(all + j, fastce_total(y, n_groups));
        if (rest != NULL) fastce_add_to(rest + j, fastce_total(z, n_groups));
    }
}
/* 64 classes of a row, from class k on; the lanes before `first` were done before and stay what they are in `e`. */
FASTCE_INLINE void fastce_exp_lanes(fastce_format format, const void* x, ptrdiff_t k, int first, fastce_floats top,
    float scale, float* e, fastce_floats* sums) {
    for (int j = 0; j < 16; j += FASTCE_WIDTH) {
        fastce_floats y[4];
        for (int g = 0; g < 4; g++) {
            y[g] = fastce_load_as(format, x, k + 16 * g + j);
            if (first > 0) y[g] = fastce_from_lane(16 * g + j, first, y[g], fastce_fill(-INFINITY));
            y[g] = fastce_exp_of(y[g], top, scale);
        }
        for (int g = 0; g < 4; g++) {
            fastce_floats all = y[g];
            if (first > 0) all = fastce_from_lane(16 * g + j, first, all, fastce_load(e + k + 16 * g + j));
            fastce_store(e + k + 16 * g + j, all);
        }
        sums[j / FASTCE_WIDTH] = FASTCE_V(add_ps)(sums[j / FASTCE_WIDTH], fastce_total(y, 4));
    }
}
FASTCE_INLINE void fastce_exp_row_of(fastce_format format, const void* x, ptrdiff_t n, float top, float scale, float* e,
    const char* ahead, ptrdiff_t size, int is_long, float* sums) {
    fastce_floats s[16 / FASTCE_WIDTH];
    const fastce_floats m = fastce_fill(top);
    ptrdiff_t k;
    for (int j = 0; j < 16; j += FASTCE_WIDTH) s[j / FASTCE_WIDTH] = fastce_load(sums + j);
    for (k = 0; k + 64 <= n; k += 64) {
        for (int j = 0; j < (format == FASTCE_NATIVE ? 256 : 128); j += 64)
            FASTCE_PREFETCH_ROW(ahead + k * size + j, is_long);
        if (format != FASTCE_NATIVE) /* in place, what is written has just been read */
            for (int j = 0; j < 64; j += 16) FASTCE_PREFETCH_L1(e + k + 256 + j);
        fastce_exp_lanes(format, x, k, 0, m, scale, e, s);
    }
    for (ptrdiff_t j = k * size; j < n * size; j += 64) FASTCE_PREFETCH_ROW(ahead + j, is_long);
    if (k < n) fastce_exp_lanes(format, x, n - 64, (int)(64 - (n - k)), m, scale, e, s);
    for (int j = 0; j < 16; j += FASTCE_WIDTH) fastce_store(sums + j, s[j / FASTCE_WIDTH]);
}
FASTCE_INLINE void fastce_exp_row(fastce_format format, const void* x, ptrdiff_t n, float top, float scale, float* e,
    const char* ahead, ptrdiff_t size, int is_long, float* sums) {
    /* Constants, each a function of its own: a choice within the loop took a tenth of the time with AVX2. */
    if (format == FASTCE_HALF)
        fastce_exp_row_of(FASTCE_HALF, x, n, top, 1, e, ahead, size, 0, sums);
    else if (format == FASTCE_BFLOAT16)
        fastce_exp_row_of(FASTCE_BFLOAT16, x, n, top, 1, e, ahead, size, 0, sums);
    else if (scale == 1 && is_long)
        fastce_exp_row_of(FASTCE_NATIVE, x, n, top, 1, e, ahead, size, 1, sums);
    else if (scale == 1)
        fastce_exp_row_of(FASTCE_NATIVE, x, n, top, 1, e, ahead, size, 0, sums);
    else if (is_long)
        fastce_exp_row_of(FASTCE_NATIVE, x, n, top, scale, e, ahead, size, 1, sums);
    else
        fastce_exp_row_of(FASTCE_NATIVE, x, n, top, scale, e, ahead, size, 0, sums);
}
#else
#define fastce_exp_row(format, x, n, top, scale, e, ahead, size, is_long, sums) ((void)0)
#define fastce_exp_and_fold(x, pitch, n_groups, top, scale, e, e_pitch, all, rest) ((void)0)
#endif

#endif
