/* The loops over a block of a row: n classes that lie side by side.

   Design
   ------
   1. Constants are what is the same for all classes, so they stay in registers throughout a loop: loops that are
      given them in memory took a third longer with AVX-512.
   2. The last vector overlaps the one before. In place it is loaded before anything is stored: a load from lines that
      were just stored in pieces waits for them, which cost 25 ns a row, and filling it up piece by piece 50.
   3. Memory further on is asked for in every loop: that of the maximum is too short for the hardware prefetcher to
      get ahead, and waited for memory half of its time. */
#ifndef FASTCE_ROW_H
#define FASTCE_ROW_H

#include <math.h>

#include "simd/convert.h"
#include "simd/math.h"
#include "simd/prefetch.h"
#include "simd/simd.h"
#include "simd/sums.h"

#define FASTCE_TEMPLATE "simd/row.h"
#include "simd/for_types.h"

#define fastce_row_max(format, x, n, like) FASTCE_OF_VECTORS(row_max, like)(format, x, n)
#define fastce_find(x, n, value) FASTCE_OF_VECTORS(find, *(x))(x, n, value)
#define fastce_sweep(block, row_max, scale, like) FASTCE_OF_VECTORS(sweep, like)(block, row_max, scale)
#define fastce_sum_targets(block, row_max, like) FASTCE_OF_VECTORS(sum_targets, like)(block, row_max)
#define fastce_sum_rest(e, n) FASTCE_OF_VECTORS(sum_rest, *(e))(e, n)
#define fastce_cap_row(x, n, factor, out) FASTCE_OF_VECTORS(cap_row, *(out))(x, n, factor, out)
#define fastce_multiply_slopes(g, n, x, factor, out) FASTCE_OF_VECTORS(multiply_slopes, *(out))(g, n, x, factor, out)
#define fastce_multiply(e, n, factor) FASTCE_OF_VECTORS(multiply, *(e))(e, n, factor)
#define fastce_write_row_gradient(e, n, alpha, beta, w, gamma, t)               \
    FASTCE_OF_VECTORS(write_row_gradient, *(e))(e, n, alpha, beta, w, gamma, t)
#define fastce_write_row_log(x, n, row_max, scale, log_sum, out)                 \
    FASTCE_OF_VECTORS(write_row_log, *(out))(x, n, row_max, scale, log_sum, out)

#if FASTCE_IS_WIDE
#if FASTCE_VECTOR_BYTES == 64
typedef __m512i fastce_words;
#else
typedef __m256i fastce_words;
#endif

/* The smallest of integers without a sign, the largest of those with one. */
FASTCE_INLINE uint16_t fastce_min_word(fastce_words x) {
#if FASTCE_VECTOR_BYTES == 64
    __m256i y = _mm256_min_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
#else
    __m256i y = x;
#endif
    __m128i z = _mm_min_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    return (uint16_t)_mm_cvtsi128_si32(_mm_minpos_epu16(z));
}

FASTCE_INLINE uint16_t fastce_max_word(fastce_words x) {
    return 0x7FFF - fastce_min_word(FASTCE_X86(sub_epi16)(FASTCE_X86(set1_epi16)(0x7FFF), x));
}

/* The maximum of n >= 64 numbers of 16 bits, taken for integers, 2 instructions for a register of them. With a sign,
   the largest is the maximum unless all are negative; then it is the smallest without. Where that is NaN, NaN must be
   left out. */
FASTCE_INLINE float fastce_max_of_16_bits(fastce_format format, const uint16_t* x, ptrdiff_t n) {
    enum { WORDS = FASTCE_VECTOR_BYTES / 2, N = 64 / WORDS };
    fastce_words high[N], low[N];
    uint16_t found;
    FASTCE_UNROLL
    for (int g = 0; g < N; g++) {
        high[g] = FASTCE_X86(set1_epi16)(-0x8000);
        low[g] = FASTCE_X86(set1_epi16)(-1);
    }
    for (ptrdiff_t k = 0; k < n; k += 64) {
        if (k > n - 64) k = n - 64;
        FASTCE_UNROLL
        for (int g = 0; g < N; g++) {
            fastce_words words;
            memcpy(&words, x + k + WORDS * g, sizeof(words));
            high[g] = FASTCE_X86(max_epi16)(high[g], words);
            low[g] = FASTCE_X86(min_epu16)(low[g], words);
        }
    }
    FASTCE_UNROLL
    for (int g = 1; g < N; g++) {
        high[0] = FASTCE_X86(max_epi16)(high[0], high[g]);
        low[0] = FASTCE_X86(min_epu16)(low[0], low[g]);
    }
    found = fastce_max_word(high[0]);
    if (found & 0x8000) found = fastce_min_word(low[0]);
    if ((found & 0x7FFF) > (format == FASTCE_HALF ? 0x7C00 : 0x7F80)) return fastce_max_of_floats(format, x, n);
    return format == FASTCE_HALF ? fastce_float_of_half(found) : fastce_float_of_bfloat16(found);
}
#else
#define fastce_max_of_16_bits fastce_max_of_floats
#endif

/* The maximum of n classes of a row; NaN is left out. */
FASTCE_NOINLINE float fastce_row_max_floats(fastce_format format, const void* x, ptrdiff_t n) {
#if FASTCE_SWEEPS_16_BITS
    if (format == FASTCE_HALF) return fastce_max_of_16_bits(FASTCE_HALF, (const uint16_t*)x, n);
    if (format == FASTCE_BFLOAT16) return fastce_max_of_16_bits(FASTCE_BFLOAT16, (const uint16_t*)x, n);
#endif
    return fastce_max_of_floats(format, x, n);
}

FASTCE_NOINLINE double fastce_row_max_doubles(fastce_format format, const void* x, ptrdiff_t n) {
    return fastce_max_of_doubles(format, x, n);
}

#elif defined(REAL)

/* ---- loads ---- */

/* The numbers of a row in memory: of REAL, or floats of 16 bits. */
FASTCE_INLINE VEC F(load_as)(fastce_format format, const void* x, ptrdiff_t k) {
#if IS_FLOAT && FASTCE_SWEEPS_16_BITS
    if (format == FASTCE_HALF) return fastce_load_halves((const uint16_t*)x + k);
    if (format == FASTCE_BFLOAT16) return fastce_load_bfloat16s((const uint16_t*)x + k);
#else
    (void)format;
#endif
    return F(load)((const REAL*)x + k);
}

/* The last of n numbers as a vector; of fewer than fill it, they are its last lanes. */
FASTCE_INLINE VEC F(load_last)(const REAL* x, ptrdiff_t n, REAL other) {
    REAL lanes[WIDTH];
    if (n >= WIDTH) return F(load)(x + n - WIDTH);
    for (int j = 0; j < WIDTH; j++) lanes[j] = other;
    memcpy(lanes + WIDTH - n, x, n * sizeof(REAL));
    return F(load)(lanes);
}

/* ---- maxima; NaN is left out ---- */

FASTCE_INLINE REAL F(max_of)(fastce_format format, const void* x, ptrdiff_t n) {
    enum { N = WIDTH > 8 ? 64 / WIDTH : 8 };
    VEC m[N];
    REAL lanes[WIDTH], row_max = -INFINITY;
    if (n < N * WIDTH) {
        for (ptrdiff_t j = 0; j < n; j++) row_max = ((const REAL*)x)[j] > row_max ? ((const REAL*)x)[j] : row_max;
        return row_max;
    }
    FASTCE_UNROLL
    for (int g = 0; g < N; g++) m[g] = F(fill)(-INFINITY);
    for (ptrdiff_t k = 0; k < n; k += N * WIDTH) {
        if (k > n - N * WIDTH) k = n - N * WIDTH;
        FASTCE_UNROLL
        for (int g = 0; g < N; g++) {
            m[g] = F(max)(F(load_as)(format, x, k + g * WIDTH), m[g]);
            FASTCE_KEEP_ORDER(m[g]);
        }
    }
    FASTCE_UNROLL
    for (int g = 1; g < N; g++) m[0] = F(max)(m[g], m[0]);
    F(store)(lanes, m[0]);
    row_max = lanes[0];
    for (int j = 1; j < WIDTH; j++) row_max = lanes[j] > row_max ? lanes[j] : row_max;
    return row_max;
}

/* The class of the first of n numbers that is `value`, or -1. */
FASTCE_NOINLINE ptrdiff_t F(find)(const REAL* x, ptrdiff_t n, REAL value) {
    for (ptrdiff_t k = 0; k < n; k += 64) {
        const ptrdiff_t stop = n - k < 64 ? n : k + 64;
        int found = 0;
        for (ptrdiff_t j = k; j < stop; j++) found |= x[j] == value; /* vectorised: no exit */
        for (ptrdiff_t j = k; found && j < stop; j++)
            if (x[j] == value) return j;
    }
    return -1;
}

/* ---- exponentials and sums; e is exp(scale * (x - row_max)) * EXP_UNIT ---- */

/* A block of less than a vector. */
FASTCE_NOINLINE void F(sweep_padded)(fastce_block* b, REAL row_max, REAL scale) {
    REAL e[WIDTH], lanes[16], ed[16];
    const int first = (int)(WIDTH - b->n);
    const VEC x = F(load_last)((const REAL*)b->x, b->n, -INFINITY), shift = F(fill)(row_max * (REAL)FASTCE_D_UNIT);
    VEC sum = F(fill)(0);
    for (int j = 0; j < 16; j++) lanes[j] = ed[j] = 0;
    F(exp_some)(&x, 1, first, F(fill)(row_max), scale, e, 16, &sum, NULL, shift, ed);
    F(store)(lanes, sum);
    memcpy(b->e, e + first, b->n * sizeof(REAL));
    b->sums[FASTCE_ALL][0] = F(lane_sum)(lanes);
    b->sums[FASTCE_E_D][0] = F(lane_sum)(ed);
}

FASTCE_INLINE void F(sweep_block)(
    fastce_format format, int sums_entropy, int is_long, fastce_block* b, REAL row_max, REAL scale) {
    VEC s[16 / WIDTH], x[4];
    REAL lanes[16], sums[16];
    /* Copies, for compilers must assume that stores to e change the block. */
    const void* const given = b->x;
    REAL* const e = (REAL*)b->e;
    const char* const ahead = b->ahead;
    const ptrdiff_t n = b->n, size = b->ahead_size;
    const VEC m = F(fill)(row_max), shift = F(fill)(row_max * (REAL)FASTCE_D_UNIT);
    const VEC last = F(load_as)(format, given, n - WIDTH); /* before stores to e, which may be x */
    ptrdiff_t k;
    for (int j = 0; j < 16; j++) sums[j] = 0;
    for (int j = 0; j < 16 / WIDTH; j++) s[j] = F(fill)(0);
    for (k = 0; k + 64 <= n; k += 64) {
        /* Of 16 bits some lines twice: a variable count took half a cycle more per 16 numbers. */
        for (int j = 0; j < (format == FASTCE_NATIVE ? 64 * (int)sizeof(REAL) : 128); j += 64)
            FASTCE_PREFETCH_ROW(ahead + k * size + j, is_long);
        if (format != FASTCE_NATIVE) /* in place, what is written has just been read */
            for (int j = 0; j < 64; j += 16) FASTCE_PREFETCH_L1(e + k + 256 + j);
        for (int j = 0; j < 16; j += WIDTH) {
            FASTCE_UNROLL
            for (int g = 0; g < 4; g++) x[g] = F(load_as)(format, given, k + 16 * g + j);
            F(exp_some)(x, 4, 0, m, scale, e + k + j, 16, &s[j / WIDTH], NULL, shift, sums_entropy ? sums + j : NULL);
        }
    }
    for (ptrdiff_t j = k * size; j < n * size; j += 64) FASTCE_PREFETCH_ROW(ahead + j, is_long);
    for (; k + WIDTH <= n; k += WIDTH) {
        x[0] = F(load_as)(format, given, k);
        F(exp_some)(x, 1, 0, m, scale, e + k, 16, s, NULL, shift, sums_entropy ? sums : NULL);
    }
    if (k < n)
        F(exp_some)(
            &last, 1, (int)(WIDTH - (n - k)), m, scale, e + n - WIDTH, 16, s, NULL, shift, sums_entropy ? sums : NULL);
    for (int j = 0; j < 16; j += WIDTH) F(store)(lanes + j, s[j / WIDTH]);
    b->sums[FASTCE_ALL][0] = F(lane_sum)(lanes);
    if (sums_entropy) b->sums[FASTCE_E_D][0] = F(lane_sum)(sums);
}

/* Each set of constants has a function of its own: a choice within the loop took a tenth of the time with AVX2, and as
   much as many loops in one function, whose constants then had no registers. */
#define SWEEP(name, format, sums_entropy, is_long, scale_of)                       \
    FASTCE_NOINLINE void F(name)(fastce_block * block, REAL row_max, REAL scale) { \
        F(sweep_block)(format, sums_entropy, is_long, block, row_max, scale_of);   \
    }
#if IS_FLOAT && FASTCE_SWEEPS_16_BITS
SWEEP(sweep_half, FASTCE_HALF, 0, 0, ((void)scale, 1))
SWEEP(sweep_bfloat16, FASTCE_BFLOAT16, 0, 0, ((void)scale, 1))
#endif
SWEEP(sweep_short, FASTCE_NATIVE, 0, 0, ((void)scale, 1))
SWEEP(sweep_long, FASTCE_NATIVE, 0, 1, ((void)scale, 1))
SWEEP(sweep_scaled, FASTCE_NATIVE, 0, 0, scale)
SWEEP(sweep_scaled_long, FASTCE_NATIVE, 0, 1, scale)
SWEEP(sweep_entropy, FASTCE_NATIVE, 1, block->is_long, scale)
#undef SWEEP

/* Sums up the exponentials of a block, and leaves them in e. */
FASTCE_INLINE void F(sweep)(fastce_block* b, REAL row_max, REAL scale) {
    if (b->n < WIDTH) {
        F(sweep_padded)(b, row_max, scale);
        return;
    }
#if IS_FLOAT && FASTCE_SWEEPS_16_BITS
    if (b->format == FASTCE_HALF)
        F(sweep_half)(b, row_max, scale);
    else if (b->format == FASTCE_BFLOAT16)
        F(sweep_bfloat16)(b, row_max, scale);
    else
#endif
        if (b->sums_entropy)
        F(sweep_entropy)(b, row_max, scale);
    else if (scale == 1 && b->is_long)
        F(sweep_long)(b, row_max, scale);
    else if (scale == 1)
        F(sweep_short)(b, row_max, scale);
    else if (b->is_long)
        F(sweep_scaled_long)(b, row_max, scale);
    else
        F(sweep_scaled)(b, row_max, scale);
}

/* ---- the other sums: a loop before that of the exponentials, which may take the place of the logits ---- */

FASTCE_INLINE void F(sum_block)(fastce_block* b, REAL row_max, const REAL* w, const REAL* t, fastce_asked_sums asked) {
    REAL sums[16 * FASTCE_N_SUMS];
    VEC x[4], w_some[4], t_some[4];
    const REAL* const given = (const REAL*)b->x;
    const char* const ahead_t = b->ahead_t;
    const ptrdiff_t n = b->n, size = b->ahead_t_size;
    const VEC one = F(fill)(1), shift = F(fill)(row_max * (REAL)FASTCE_D_UNIT);
    ptrdiff_t k;
    for (int j = 0; j < 16 * FASTCE_N_SUMS; j++) sums[j] = 0;
    for (k = 0; k + 64 <= n; k += 64) {
        if (t != NULL)
            for (int j = 0; j < 64 * (int)sizeof(REAL); j += 64) FASTCE_PREFETCH_L2(ahead_t + k * size + j);
        for (int j = 0; j < 16; j += WIDTH) {
            FASTCE_UNROLL
            for (int g = 0; g < 4; g++) {
                x[g] = F(load)(given + k + 16 * g + j);
                w_some[g] = w == NULL ? one : F(load)(w + k + 16 * g + j);
                t_some[g] = t == NULL ? one : F(load)(t + k + 16 * g + j);
            }
            F(sum_some)(x, w_some, t_some, 4, shift, t != NULL, 0, &asked, sums + j);
        }
    }
    for (; k < n; k += WIDTH) { /* the last vector overlaps the one before */
        const int first = (int)(n - k < WIDTH ? WIDTH - (n - k) : 0);
        const ptrdiff_t stop = n - k < WIDTH ? n : k + WIDTH;
        x[0] = F(load_last)(given, stop, 0);
        w_some[0] = F(from_lane)(0, first, w == NULL ? one : F(load_last)(w, stop, 0), F(fill)(0));
        t_some[0] = F(from_lane)(0, first, t == NULL ? one : F(load_last)(t, stop, 0), F(fill)(0));
        F(sum_some)(x, w_some, t_some, 1, shift, t != NULL, 1, &asked, sums);
    }
    for (int j = FASTCE_W_D; j < FASTCE_N_SUMS; j++)
        if (j == FASTCE_W_D ? asked.w_d : t != NULL && (j < FASTCE_T || asked.t_d))
            b->sums[j][0] = F(lane_sum)(sums + 16 * j);
}

/* Label smoothing without and with weights, class probabilities, and everything together. */
FASTCE_NOINLINE void F(sum_smoothing)(fastce_block* b, REAL row_max) {
    const fastce_asked_sums asked = {1, 0, 0, 0};
    F(sum_block)(b, row_max, NULL, NULL, asked);
}

FASTCE_NOINLINE void F(sum_weighted)(fastce_block* b, REAL row_max) {
    const fastce_asked_sums asked = {1, 0, 1, 0};
    F(sum_block)(b, row_max, (const REAL*)b->w, NULL, asked);
}

FASTCE_NOINLINE void F(sum_prob)(fastce_block* b, REAL row_max) {
    const fastce_asked_sums asked = {0, 0, 0, 0};
    F(sum_block)(b, row_max, NULL, (const REAL*)b->t, asked);
}

FASTCE_NOINLINE void F(sum_any)(fastce_block* b, REAL row_max) {
    F(sum_block)(b, row_max, (const REAL*)b->w, (const REAL*)b->t, b->asked);
}

/* Sums up what label smoothing and class probabilities ask for. */
FASTCE_INLINE void F(sum_targets)(fastce_block* b, REAL row_max) {
    if (b->t == NULL && b->w == NULL)
        F(sum_smoothing)(b, row_max);
    else if (b->t == NULL && !b->asked.has_zero_w)
        F(sum_weighted)(b, row_max);
    else if (b->t != NULL && b->w == NULL && !b->asked.w_d && !b->asked.t_d)
        F(sum_prob)(b, row_max);
    else
        F(sum_any)(b, row_max);
}

/* The sum of n exponentials without the terms that are 1. */
FASTCE_NOINLINE double F(sum_rest)(const REAL* e, ptrdiff_t n) {
    REAL lanes[16];
    ptrdiff_t k;
    for (int j = 0; j < 16; j++) lanes[j] = 0;
    for (k = 0; k + 64 <= n; k += 64)
        for (int j = 0; j < 16; j += WIDTH) {
            VEC z[4];
            FASTCE_UNROLL
            for (int g = 0; g < 4; g++) z[g] = F(unless_largest)(F(load)(e + k + 16 * g + j));
            F(add_to)(lanes + j, F(total)(z, 4));
        }
    for (; k + WIDTH <= n; k += WIDTH) F(add_to)(lanes, F(unless_largest)(F(load)(e + k)));
    if (k < n)
        F(add_to)(lanes, F(unless_largest)(F(from_lane)(0, (int)(WIDTH - (n - k)), F(load_last)(e, n, 0), F(fill)(0))));
    return F(lane_sum)(lanes);
}

/* ---- softcap ---- */

/* tanh(x * factor), with the same bits wherever a number stands. */
FASTCE_NOINLINE void F(cap_row)(const REAL* x, ptrdiff_t n, REAL factor, REAL* out) {
    REAL rest[WIDTH];
    ptrdiff_t k = 0;
    for (; k + WIDTH <= n; k += WIDTH) F(store)(out + k, F(tanh)(F(load)(x + k) * factor));
    if (k == n) return;
    for (int j = 0; j < WIDTH; j++) rest[j] = 0;
    memcpy(rest, x + k, (n - k) * sizeof(REAL));
    F(store)(rest, F(tanh)(F(load)(rest) * factor));
    memcpy(out + k, rest, (n - k) * sizeof(REAL));
}

/* out = g * (1 - tanh(x * factor)^2); `out` may be x. */
FASTCE_NOINLINE void F(multiply_slopes)(const REAL* g, ptrdiff_t n, const REAL* x, REAL factor, REAL* out) {
    REAL rest[WIDTH], slopes[WIDTH];
    ptrdiff_t k = 0;
    for (; k + WIDTH <= n; k += WIDTH) F(store)(out + k, F(load)(g + k) * F(sech2)(F(load)(x + k) * factor));
    if (k == n) return;
    for (int j = 0; j < WIDTH; j++) rest[j] = 0;
    memcpy(rest, x + k, (n - k) * sizeof(REAL));
    F(store)(slopes, F(sech2)(F(load)(rest) * factor));
    for (ptrdiff_t j = 0; k + j < n; j++) out[k + j] = g[k + j] * slopes[j];
}

/* ---- results ---- */

FASTCE_INLINE void F(multiply)(REAL* e, ptrdiff_t n, REAL factor) {
    for (ptrdiff_t j = 0; j < n; j++) e[j] *= factor;
}

/* alpha e + (beta + gamma t) w over e itself, alpha freed of EXP_UNIT; without t if that is NULL, with w = 1 likewise. */
FASTCE_INLINE void F(write_row_gradient)(
    REAL* e, ptrdiff_t n, REAL alpha, REAL beta, const REAL* w, REAL gamma, const REAL* t) {
    if (w == NULL && t == NULL)
        for (ptrdiff_t j = 0; j < n; j++) e[j] = e[j] * alpha + beta;
    else if (t == NULL)
        for (ptrdiff_t j = 0; j < n; j++) e[j] = e[j] * alpha + beta * w[j];
    else if (w == NULL)
        for (ptrdiff_t j = 0; j < n; j++) e[j] = e[j] * alpha + (beta + gamma * t[j]);
    else
        for (ptrdiff_t j = 0; j < n; j++) e[j] = e[j] * alpha + (beta + gamma * t[j]) * w[j];
}

/* scale * (x - row_max) - log_sum */
FASTCE_INLINE void F(write_row_log)(const REAL* x, ptrdiff_t n, REAL row_max, REAL scale, REAL log_sum, REAL* out) {
    for (ptrdiff_t j = 0; j < n; j++) out[j] = scale * (x[j] - row_max) - log_sum;
}

#endif
