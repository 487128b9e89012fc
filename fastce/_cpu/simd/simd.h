/* Registers of floats, where AVX2 or AVX-512 are to be had. */
#ifndef FASTCE_SIMD_H
#define FASTCE_SIMD_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "simd/compiler.h"

/* The type of the numbers in memory. */
typedef enum { FASTCE_NATIVE, FASTCE_FLOAT, FASTCE_DOUBLE, FASTCE_HALF, FASTCE_BFLOAT16 } fastce_format;
#if defined(__AVX512BW__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define FASTCE_WIDTH 16
#define FASTCE_V(name) _mm512_##name
typedef __m512 fastce_floats;
typedef __m512d fastce_doubles;
typedef __m512i fastce_ints;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define FASTCE_WIDTH 8
#define FASTCE_V(name) _mm256_##name
typedef __m256 fastce_floats;
typedef __m256d fastce_doubles;
typedef __m256i fastce_ints;
#endif
#if defined(FASTCE_WIDTH)
#define FASTCE_HAS_REGISTERS 1
FASTCE_INLINE fastce_floats fastce_fill(float value) { return FASTCE_V(set1_ps)(value); }
FASTCE_INLINE fastce_floats fastce_load(const float* source) { return FASTCE_V(loadu_ps)(source); }
FASTCE_INLINE void fastce_store(float* target, fastce_floats x) { FASTCE_V(storeu_ps)(target, x); }
FASTCE_INLINE fastce_ints fastce_load_ints(const int32_t* source) {
    fastce_ints x;
    memcpy(&x, source, sizeof(x));
    return x;
}
#endif
#if FASTCE_WIDTH == 16
FASTCE_INLINE fastce_floats fastce_load_halves(const uint16_t* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source));
}
FASTCE_INLINE fastce_floats fastce_load_bfloat16s(const uint16_t* source) {
    /* Each to the upper half of its float; zeros below. */
    const __m512i place = _mm512_set_epi16(
        15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)source));
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, place, words));
}
/* 0 where e is one, else e */
FASTCE_INLINE fastce_floats fastce_zero_if_equal(fastce_floats e, fastce_floats one) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(e, one, _CMP_NEQ_UQ), e);
}
/* x where y is k, else other */
FASTCE_INLINE fastce_floats fastce_choose(fastce_ints y, int32_t k, fastce_floats x, fastce_floats other) {
    return _mm512_mask_mov_ps(other, _mm512_cmpeq_epi32_mask(y, _mm512_set1_epi32(k)), x);
}
/* x in the lanes from `first` on, other before; the register's first lane is `lane` */
FASTCE_INLINE fastce_floats fastce_from_lane(int lane, int first, fastce_floats x, fastce_floats other) {
    const fastce_ints lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mask_mov_ps(x, _mm512_cmplt_epi32_mask(lanes, _mm512_set1_epi32(first - lane)), other);
}
FASTCE_INLINE fastce_ints fastce_bits(fastce_floats x) { return _mm512_castps_si512(x); }
FASTCE_INLINE fastce_floats fastce_floats_of(fastce_ints bits) { return _mm512_castsi512_ps(bits); }
/* Of 16 numbers those that the low 4 bits count. */
FASTCE_INLINE fastce_ints fastce_look_up(fastce_ints table, fastce_ints k) {
    return _mm512_permutexvar_epi32(k, table);
}
FASTCE_INLINE fastce_floats fastce_gather(const float* source, fastce_ints place) {
    return _mm512_i32gather_ps(place, source, 4);
}
#elif FASTCE_WIDTH == 8
FASTCE_INLINE fastce_floats fastce_load_halves(const uint16_t* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source));
}
FASTCE_INLINE fastce_floats fastce_load_bfloat16s(const uint16_t* source) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FASTCE_INLINE fastce_floats fastce_zero_if_equal(fastce_floats e, fastce_floats one) {
    return _mm256_and_ps(_mm256_cmp_ps(e, one, _CMP_NEQ_UQ), e);
}
FASTCE_INLINE fastce_floats fastce_choose(fastce_ints y, int32_t k, fastce_floats x, fastce_floats other) {
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(y, _mm256_set1_epi32(k))));
}
FASTCE_INLINE fastce_floats fastce_from_lane(int lane, int first, fastce_floats x, fastce_floats other) {
    const fastce_ints lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const fastce_ints before = _mm256_cmpgt_epi32(_mm256_set1_epi32(first - lane), lanes);
    return _mm256_blendv_ps(x, other, _mm256_castsi256_ps(before));
}
FASTCE_INLINE fastce_ints fastce_bits(fastce_floats x) { return _mm256_castps_si256(x); }
FASTCE_INLINE fastce_floats fastce_floats_of(fastce_ints bits) { return _mm256_castsi256_ps(bits); }
/* Of 4 numbers, given twice, those that the low 2 bits count. */
FASTCE_INLINE fastce_ints fastce_look_up(fastce_ints table, fastce_ints k) {
    return _mm256_castps_si256(_mm256_permutevar_ps(_mm256_castsi256_ps(table), k));
}
FASTCE_INLINE fastce_floats fastce_gather(const float* source, fastce_ints place) {
    return _mm256_i32gather_ps(source, place, 4);
}
#else
#define FASTCE_HAS_REGISTERS 0
#endif
#if FASTCE_HAS_REGISTERS
FASTCE_INLINE float fastce_float_of(fastce_format format, uint16_t bits) {
    __m128i word = _mm_cvtsi32_si128(bits);
    return _mm_cvtss_f32(format == FASTCE_HALF ? _mm_cvtph_ps(word) : _mm_castsi128_ps(_mm_slli_epi32(word, 16)));
}
/* The smallest of integers without a sign, the largest of those with one. */
FASTCE_INLINE uint16_t fastce_min_word(fastce_ints x) {
#if FASTCE_WIDTH == 16
    __m256i y = _mm256_min_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
#else
    __m256i y = x;
#endif
    __m128i z = _mm_min_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    return (uint16_t)_mm_cvtsi128_si32(_mm_minpos_epu16(z));
}
FASTCE_INLINE uint16_t fastce_max_word(fastce_ints x) {
    return 0x7FFF - fastce_min_word(FASTCE_V(sub_epi16)(FASTCE_V(set1_epi16)(0x7FFF), x));
}
/* The sum of 16 floats in double and their maximum, halves added to each other. */
FASTCE_INLINE double fastce_sum_lanes(const float* x) {
    __m256d low = _mm256_add_pd(_mm256_cvtps_pd(_mm_loadu_ps(x)), _mm256_cvtps_pd(_mm_loadu_ps(x + 8)));
    __m256d high = _mm256_add_pd(_mm256_cvtps_pd(_mm_loadu_ps(x + 4)), _mm256_cvtps_pd(_mm_loadu_ps(x + 12)));
    __m256d four = _mm256_add_pd(low, high);
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
FASTCE_INLINE float fastce_max_lanes(const float* x) {
    __m256 eight = _mm256_max_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
/* A register from the k-th number on, floats or of 16 bits. */
FASTCE_INLINE fastce_floats fastce_load_as(fastce_format format, const void* source, ptrdiff_t k) {
    if (format == FASTCE_HALF) return fastce_load_halves((const uint16_t*)source + k);
    if (format == FASTCE_BFLOAT16) return fastce_load_bfloat16s((const uint16_t*)source + k);
    return fastce_load((const float*)source + k);
}
/* Memory is read in the order of the loop: what GCC made of these loads otherwise changed from build to build, and
   where lines came out of order the loss of rows that are not in cache took a tenth longer. */
#define FASTCE_KEEP_ORDER(x) __asm__ volatile("" : "+v"(x) : : "memory")
/* The maximum of n >= 64 numbers, NaN left out; the last tile overlaps the one before. */
FASTCE_INLINE float fastce_max_of(fastce_format format, const void* x, ptrdiff_t n) {
    fastce_floats m[64 / FASTCE_WIDTH];
    float lanes[16];
    for (int g = 0; g < 64 / FASTCE_WIDTH; g++) m[g] = fastce_fill(-INFINITY);
    for (ptrdiff_t k = 0; k < n; k += 64) {
        if (k > n - 64) k = n - 64;
        for (int g = 0; g < 64 / FASTCE_WIDTH; g++) {
            m[g] = FASTCE_V(max_ps)(fastce_load_as(format, x, k + g * FASTCE_WIDTH), m[g]);
            FASTCE_KEEP_ORDER(m[g]);
        }
    }
    for (int g = 16 / FASTCE_WIDTH; g < 64 / FASTCE_WIDTH; g++)
        m[g % (16 / FASTCE_WIDTH)] = FASTCE_V(max_ps)(m[g], m[g % (16 / FASTCE_WIDTH)]);
    for (int g = 0; g < 16 / FASTCE_WIDTH; g++) fastce_store(lanes + g * FASTCE_WIDTH, m[g]);
    return fastce_max_lanes(lanes);
}
FASTCE_INLINE double fastce_max_of_doubles(const double* x, ptrdiff_t n) {
    fastce_doubles m[8];
    double lanes[FASTCE_WIDTH / 2];
    for (int g = 0; g < 8; g++) m[g] = FASTCE_V(set1_pd)(-INFINITY);
    for (ptrdiff_t k = 0; k < n; k += 4 * FASTCE_WIDTH) {
        if (k > n - 4 * FASTCE_WIDTH) k = n - 4 * FASTCE_WIDTH;
        for (int g = 0; g < 8; g++) {
            m[g] = FASTCE_V(max_pd)(FASTCE_V(loadu_pd)(x + k + g * FASTCE_WIDTH / 2), m[g]);
            FASTCE_KEEP_ORDER(m[g]);
        }
    }
    for (int g = 1; g < 8; g++) m[0] = FASTCE_V(max_pd)(m[g], m[0]);
    FASTCE_V(storeu_pd)(lanes, m[0]);
    for (int j = 1; j < FASTCE_WIDTH / 2; j++) lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
    return lanes[0];
}
/* The same of 16 bits, taken for integers, 2 instructions for a register of them. With a sign, the largest is the
   maximum unless all are negative; then it is the smallest without. Where that is NaN, NaN must be left out. */
FASTCE_INLINE float fastce_max_of_16_bits(fastce_format format, const uint16_t* x, ptrdiff_t n) {
    fastce_ints high[64 / (2 * FASTCE_WIDTH)], low[64 / (2 * FASTCE_WIDTH)];
    uint16_t found;
    for (int g = 0; g < 64 / (2 * FASTCE_WIDTH); g++) {
        high[g] = FASTCE_V(set1_epi16)(-0x8000);
        low[g] = FASTCE_V(set1_epi16)(-1);
    }
    for (ptrdiff_t k = 0; k < n; k += 64) {
        if (k > n - 64) k = n - 64;
        for (int g = 0; g < 64 / (2 * FASTCE_WIDTH); g++) {
            fastce_ints words = fastce_load_ints((const int32_t*)(x + k + 2 * FASTCE_WIDTH * g));
            high[g] = FASTCE_V(max_epi16)(high[g], words);
            low[g] = FASTCE_V(min_epu16)(low[g], words);
        }
    }
    for (int g = 1; g < 64 / (2 * FASTCE_WIDTH); g++) {
        high[0] = FASTCE_V(max_epi16)(high[0], high[g]);
        low[0] = FASTCE_V(min_epu16)(low[0], low[g]);
    }
    found = fastce_max_word(high[0]);
    if (found & 0x8000) found = fastce_min_word(low[0]);
    if ((found & 0x7FFF) > (format == FASTCE_HALF ? 0x7C00 : 0x7F80)) return fastce_max_of(format, x, n);
    return fastce_float_of(format, found);
}
FASTCE_INLINE float fastce_max(fastce_format format, const void* x, ptrdiff_t n) {
    if (format == FASTCE_HALF) return fastce_max_of_16_bits(FASTCE_HALF, (const uint16_t*)x, n);
    if (format == FASTCE_BFLOAT16) return fastce_max_of_16_bits(FASTCE_BFLOAT16, (const uint16_t*)x, n);
    return fastce_max_of(FASTCE_NATIVE, x, n);
}
#else
#define fastce_max(format, x, n) 0.0f
#define fastce_max_of_doubles(x, n) 0.0
#define fastce_sum_lanes(x) 0.0
#define fastce_max_lanes(x) 0.0f
#endif

#endif
