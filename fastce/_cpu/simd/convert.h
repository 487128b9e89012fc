/* Between 16 bits and floats, in registers. */
#ifndef FASTCE_CONVERT_H
#define FASTCE_CONVERT_H

#include "simd/simd.h"

#if FASTCE_HAS_REGISTERS
FASTCE_INLINE void fastce_widen_16(fastce_format format, const uint16_t* source, float* target) {
    for (int j = 0; j < 16; j += FASTCE_WIDTH) fastce_store(target + j, fastce_load_as(format, source, j));
}
FASTCE_INLINE fastce_floats fastce_load_scaled(const float* source, float factor) {
    return FASTCE_V(mul_ps)(fastce_load(source), fastce_fill(factor));
}
#endif
#if !FASTCE_HAS_REGISTERS
#define fastce_widen_16(format, source, target) ((void)0)
#define fastce_narrow_16(format, source, factor, may_be_nan, target) ((void)0)
#define fastce_narrow_32(format, source, factor, may_be_nan, target) ((void)0)
#elif FASTCE_WIDTH == 16
FASTCE_INLINE void fastce_store_halves(fastce_floats x, uint16_t* target) {
    __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i*)target, halves);
}
/* Upper halves, and 1 more where the lower half is more than 0x8000, or as much and the upper one is odd. */
FASTCE_INLINE __m512i fastce_round_bfloat16s(fastce_floats x, fastce_floats y, int may_be_nan) {
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
        24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i a = _mm512_castps_si512(x), b = _mm512_castps_si512(y);
    __m512i low = _mm512_permutex2var_epi16(a, even, b);
    __m512i high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(even, one), b);
    __m512i weight = _mm512_adds_epu16(low, _mm512_and_si512(high, one));
    __mmask32 up = _mm512_cmpgt_epu16_mask(weight, _mm512_set1_epi16((short)0x8000));
    __m512i rounded = _mm512_mask_add_epi16(high, up, high, one);
    if (may_be_nan) {
        __mmask32 nan =
            (__mmask32)_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) | (__mmask32)_mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q) << 16;
        rounded = _mm512_mask_mov_epi16(rounded, nan, _mm512_or_si512(high, _mm512_set1_epi16(0x40)));
    }
    return rounded;
}
FASTCE_INLINE void fastce_narrow_16(
    fastce_format format, const float* source, float factor, int may_be_nan, uint16_t* target) {
    fastce_floats x = fastce_load_scaled(source, factor);
    if (format == FASTCE_HALF)
        fastce_store_halves(x, target);
    else
        _mm256_storeu_si256((__m256i*)target, _mm512_castsi512_si256(fastce_round_bfloat16s(x, x, may_be_nan)));
}
FASTCE_INLINE void fastce_narrow_32(
    fastce_format format, const float* source, float factor, int may_be_nan, uint16_t* target) {
    fastce_floats x = fastce_load_scaled(source, factor), y = fastce_load_scaled(source + 16, factor);
    if (format == FASTCE_HALF) {
        fastce_store_halves(x, target);
        fastce_store_halves(y, target + 16);
    } else {
        _mm512_storeu_si512(target, fastce_round_bfloat16s(x, y, may_be_nan));
    }
}
#else
FASTCE_INLINE void fastce_store_halves(fastce_floats x, uint16_t* target) {
    _mm_storeu_si128((__m128i*)target, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
FASTCE_INLINE __m256i fastce_round_bfloat16s(fastce_floats x, int may_be_nan) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    if (may_be_nan) {
        __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        sum = _mm256_blendv_epi8(sum, quiet, is_nan);
    }
    return _mm256_srli_epi32(sum, 16);
}
FASTCE_INLINE void fastce_narrow_16(
    fastce_format format, const float* source, float factor, int may_be_nan, uint16_t* target) {
    fastce_floats x = fastce_load_scaled(source, factor), y = fastce_load_scaled(source + 8, factor);
    if (format == FASTCE_HALF) {
        fastce_store_halves(x, target);
        fastce_store_halves(y, target + 8);
    } else {
        /* Packing works within 128 bits; the permutation puts the quarters in order. */
        __m256i packed =
            _mm256_packus_epi32(fastce_round_bfloat16s(x, may_be_nan), fastce_round_bfloat16s(y, may_be_nan));
        _mm256_storeu_si256((__m256i*)target, _mm256_permute4x64_epi64(packed, 0xD8));
    }
}
FASTCE_INLINE void fastce_narrow_32(
    fastce_format format, const float* source, float factor, int may_be_nan, uint16_t* target) {
    fastce_narrow_16(format, source, factor, may_be_nan, target);
    fastce_narrow_16(format, source + 16, factor, may_be_nan, target + 16);
}
#endif

#endif
