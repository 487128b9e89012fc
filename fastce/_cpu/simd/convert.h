/* Between 16 bits and floats.

   Design
   ------
   1. Numbers are converted 16 at a time, exactly or to the nearest, of two the even one. Subnormals are numbers like
      any other, whatever the CPU's flush modes; AVX-512's instruction for bfloat16 is not used, for it takes them for
      zero.
   2. AVX2, AVX-512 and NEON have code of their own: binary16 has instructions, and of loops over 16-bit integers GCC
      used half of each register (bfloat16 took 3 cycles more per 16 numbers). The loops for everybody else vectorise
      too.
   3. Rounding to bfloat16 works on 32 numbers at a time in registers of 512 bits, in halves that are taken apart, and
      leaves NaN out of account where there cannot be any: 5 instead of 10 instructions per 16 numbers. */
#ifndef FASTCE_CONVERT_H
#define FASTCE_CONVERT_H

#include "simd/simd.h"

/* The type of the numbers in memory; NATIVE is the arithmetic's. */
typedef enum { FASTCE_NATIVE, FASTCE_FLOAT, FASTCE_DOUBLE, FASTCE_HALF, FASTCE_BFLOAT16 } fastce_format;

/* Whether loops may read and round 16 bits in registers, as fast as floats. */
#define FASTCE_SWEEPS_16_BITS (FASTCE_IS_WIDE || FASTCE_IS_NEON)

/* ---- one number ---- */

FASTCE_INLINE uint32_t fastce_bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

FASTCE_INLINE float fastce_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* Exponent and fraction are moved into place, then the exponent's bias is made good. */
FASTCE_INLINE float fastce_float_of_half(uint32_t half) {
#if defined(__F16C__)
    return _cvtsh_ss((unsigned short)half);
#else
    const uint32_t bits = (half & 0x7FFF) << 13;
    const uint32_t sign = (half & 0x8000) << 16;
    const uint32_t finite = fastce_bits_of(fastce_of_bits(bits) * 5.192296858534828e33f); /* 2^112 */
    /* infinity and NaN: the largest exponent of either format */
    return fastce_of_bits(sign | (bits < 0x0F800000u ? finite : bits | 0x7F800000u));
#endif
}

FASTCE_INLINE float fastce_float_of_bfloat16(uint32_t bits) { return fastce_of_bits(bits << 16); }

FASTCE_INLINE uint32_t fastce_half_of_float(float value) {
    const uint32_t sign = fastce_bits_of(value) >> 16 & 0x8000;
    const uint32_t bits = fastce_bits_of(value) & 0x7FFFFFFFu;
    /* Normal numbers: the bias of the exponent, half a unit in the last place, and one bit more if the place is odd. */
    const uint32_t normal = (bits - 0x38000000u + 0xFFFu + (bits >> 13 & 1)) >> 13;
    /* Others: in a sum with 1/2 the last place has the weight 2^-24 of the smallest subnormal, and the sum is rounded.
     */
    const uint32_t subnormal = fastce_bits_of(fastce_of_bits(bits) + 0.5f) - 0x3F000000u;
    /* From 65520 on infinity, and NaN stays NaN. */
    const uint32_t huge = bits > 0x7F800000u ? 0x7E00 : 0x7C00;
    const uint32_t finite = bits < 0x38800000u ? subnormal : normal;
    return sign | (bits >= 0x477FF000u ? huge : finite);
}

FASTCE_INLINE uint32_t fastce_bfloat16_of_float(float value) {
    const uint32_t bits = fastce_bits_of(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16 | 0x40) : rounded;
}

/* ---- vectors ---- */

#if FASTCE_VECTOR_BYTES == 64
FASTCE_INLINE fastce_vec_floats fastce_load_halves(const uint16_t* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source));
}

FASTCE_INLINE fastce_vec_floats fastce_load_bfloat16s(const uint16_t* source) {
    /* Each to the upper half of its float; zeros below. */
    const __m512i place = _mm512_set_epi16(
        15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)source));
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, place, words));
}

FASTCE_INLINE void fastce_store_halves(fastce_vec_floats x, uint16_t* target) {
    __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i*)target, halves);
}

/* Upper halves, and 1 more where the lower half is more than 0x8000, or as much and the upper one is odd. */
FASTCE_INLINE __m512i fastce_round_bfloat16s(fastce_vec_floats x, fastce_vec_floats y, int may_be_nan) {
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

#elif FASTCE_VECTOR_BYTES == 32
FASTCE_INLINE fastce_vec_floats fastce_load_halves(const uint16_t* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source));
}

FASTCE_INLINE fastce_vec_floats fastce_load_bfloat16s(const uint16_t* source) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

FASTCE_INLINE void fastce_store_halves(fastce_vec_floats x, uint16_t* target) {
    _mm_storeu_si128((__m128i*)target, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif FASTCE_IS_NEON
FASTCE_INLINE fastce_vec_floats fastce_load_halves(const uint16_t* source) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source)));
}

FASTCE_INLINE fastce_vec_floats fastce_load_bfloat16s(const uint16_t* source) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(source), 16));
}

FASTCE_INLINE void fastce_store_halves(fastce_vec_floats x, uint16_t* target) {
    vst1_u16(target, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
#endif

#if FASTCE_SWEEPS_16_BITS && FASTCE_VECTOR_BYTES < 64
FASTCE_INLINE fastce_bits_floats fastce_round_bfloat16s(fastce_vec_floats x, int may_be_nan) {
    const fastce_bits_floats bits = fastce_bits_of_floats(x);
    fastce_vec_floats rounded = fastce_of_bits_floats(bits + 0x7FFF + (bits >> 16 & 1));
    if (may_be_nan) rounded = fastce_select_floats(x != x, fastce_of_bits_floats(bits | 0x400000), rounded);
    return fastce_bits_of_floats(rounded) >> 16;
}
#endif

/* 16 numbers of 16 bits to floats. */
FASTCE_INLINE void fastce_widen_16(fastce_format format, const uint16_t* source, float* target) {
#if FASTCE_SWEEPS_16_BITS
    for (int j = 0; j < 16; j += FASTCE_FLOATS)
        fastce_store_floats(
            target + j, format == FASTCE_HALF ? fastce_load_halves(source + j) : fastce_load_bfloat16s(source + j));
#else
    if (format == FASTCE_HALF)
        for (int j = 0; j < 16; j++) target[j] = fastce_float_of_half(source[j]);
    else
        for (int j = 0; j < 16; j++) target[j] = fastce_float_of_bfloat16(source[j]);
#endif
}

/* Rounds 16 floats times a factor; NaN may become infinity or a number unless it is said that it may be there. */
FASTCE_INLINE void fastce_narrow_16(
    fastce_format format, const float* source, float factor, int may_be_nan, uint16_t* target) {
#if FASTCE_VECTOR_BYTES == 64
    const fastce_vec_floats x = fastce_load_floats(source) * factor;
    if (format == FASTCE_HALF)
        fastce_store_halves(x, target);
    else
        _mm256_storeu_si256((__m256i*)target, _mm512_castsi512_si256(fastce_round_bfloat16s(x, x, may_be_nan)));
#elif FASTCE_VECTOR_BYTES == 32
    const fastce_vec_floats x = fastce_load_floats(source) * factor, y = fastce_load_floats(source + 8) * factor;
    if (format == FASTCE_HALF) {
        fastce_store_halves(x, target);
        fastce_store_halves(y, target + 8);
    } else {
        /* Packing works within 128 bits; the permutation puts the quarters in order. */
        const __m256i packed = _mm256_packus_epi32(
            (__m256i)fastce_round_bfloat16s(x, may_be_nan), (__m256i)fastce_round_bfloat16s(y, may_be_nan));
        _mm256_storeu_si256((__m256i*)target, _mm256_permute4x64_epi64(packed, 0xD8));
    }
#elif FASTCE_IS_NEON
    for (int j = 0; j < 16; j += 4) {
        const fastce_vec_floats x = fastce_load_floats(source + j) * factor;
        if (format == FASTCE_HALF)
            fastce_store_halves(x, target + j);
        else
            vst1_u16(target + j, vmovn_u32(fastce_round_bfloat16s(x, may_be_nan)));
    }
#else
    (void)may_be_nan;
    if (format == FASTCE_HALF)
        for (int j = 0; j < 16; j++) target[j] = (uint16_t)fastce_half_of_float(source[j] * factor);
    else
        for (int j = 0; j < 16; j++) target[j] = (uint16_t)fastce_bfloat16_of_float(source[j] * factor);
#endif
}

/* Rounds 32 in the same way. */
FASTCE_INLINE void fastce_narrow_32(
    fastce_format format, const float* source, float factor, int may_be_nan, uint16_t* target) {
#if FASTCE_VECTOR_BYTES == 64
    if (format == FASTCE_BFLOAT16) {
        const fastce_vec_floats x = fastce_load_floats(source) * factor, y = fastce_load_floats(source + 16) * factor;
        _mm512_storeu_si512(target, fastce_round_bfloat16s(x, y, may_be_nan));
        return;
    }
#endif
    fastce_narrow_16(format, source, factor, may_be_nan, target);
    fastce_narrow_16(format, source + 16, factor, may_be_nan, target + 16);
}

#endif
