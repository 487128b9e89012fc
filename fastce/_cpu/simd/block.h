/* The loops over a block of classes: of one row, where they lie side by side, or of 16 rows, where class k has the numbers
   16 k to 16 k + 15. What differs between those is a constant, `by_rows`.

   Design
   ------
   1. Either way number i belongs to lane i % 16. Lanes are partial sums of a row, or the rows. So one loop does both:
      what is the same for all classes has 16 lanes and stays in registers.
   2. The last vector of a row overlaps the one before. In place it is loaded before anything is stored: a load from
      lines that were just stored in pieces waits for them, which cost 25 ns a row, and filling it up piece by piece 50.
   3. Memory further on is asked for in every loop over a row: that of the maximum is too short for the hardware
      prefetcher to get ahead, and waited for memory half of its time. */
#ifndef FASTCE_BLOCK_H
#define FASTCE_BLOCK_H

#include <math.h>

#include "simd/convert.h"
#include "simd/math.h"
#include "simd/prefetch.h"
#include "simd/simd.h"
#include "simd/sums.h"

#define FASTCE_TEMPLATE "simd/block.h"
#include "simd/for_types.h"

#define fastce_row_max(format, x, n, like) FASTCE_OF_VECTORS(row_max, like)(format, x, n)
#define fastce_find(x, n, value) FASTCE_OF_VECTORS(find, *(x))(x, n, value)
#define fastce_lane_maxima(x, n, row_max) FASTCE_OF_VECTORS(lane_maxima, *(x))(x, n, row_max)
#define fastce_find_in_lanes(x, n, values, found) FASTCE_OF_VECTORS(find_in_lanes, *(x))(x, n, values, found)
#define fastce_sum_exps(block, row_max, scale) FASTCE_OF_VECTORS(sum_exps, *(row_max))(block, row_max, scale)
#define fastce_sum_targets(block, row_max) FASTCE_OF_VECTORS(sum_targets, *(row_max))(block, row_max)
#define fastce_sum_excl_max(e, n) FASTCE_OF_VECTORS(sum_excl_max, *(e))(e, n)
#define fastce_cap(x, n, factor, out) FASTCE_OF_VECTORS(cap, *(out))(x, n, factor, out)
#define fastce_multiply_slopes(g, n, x, factor, out) FASTCE_OF_VECTORS(multiply_slopes, *(out))(g, n, x, factor, out)
#define fastce_multiply(e, n, factor) FASTCE_OF_VECTORS(multiply, *(e))(e, n, factor)
#define fastce_write_gradient(by_rows, e, n, alpha, beta, w, gamma, t)               \
    FASTCE_OF_VECTORS(write_gradient, *(e))(by_rows, e, n, alpha, beta, w, gamma, t)
#define fastce_write_log(x, n, row_max, scale, log_sum, out)                 \
    FASTCE_OF_VECTORS(write_log, *(out))(x, n, row_max, scale, log_sum, out)

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

enum { F(vectors) = 16 / WIDTH }; /* of 16 lanes */
#define VECTORS F(vectors)

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

/* Lanes that may differ between rows, or the first of them as all. */
FASTCE_INLINE void F(load_lanes)(int by_rows, const REAL* lanes, VEC* x) {
    for (int j = 0; j < 16; j += WIDTH) x[j / WIDTH] = by_rows ? F(fill)(lanes[0]) : F(load)(lanes + j);
}

FASTCE_INLINE void F(store_lanes)(const VEC* x, REAL* lanes) {
    for (int j = 0; j < 16; j += WIDTH) F(store)(lanes + j, x[j / WIDTH]);
}

/* The sums of 16 rows, or of one from its 16 parts. */
FASTCE_INLINE void F(put_sum)(int by_rows, const REAL* lanes, double* sums) {
    if (by_rows)
        sums[0] = F(lane_sum)(lanes);
    else
        F(widen)(lanes, sums);
}

/* 4 groups of 16 numbers, WIDTH of each. */
FASTCE_INLINE void F(load_groups)(fastce_format format, const void* x, ptrdiff_t k, VEC* groups) {
    FASTCE_UNROLL
    for (int g = 0; g < 4; g++) groups[g] = F(load_as)(format, x, k + 16 * g);
}

/* ---- maxima; NaN is left out. A block of a row has at least 64 classes. ---- */

FASTCE_INLINE REAL F(max_of)(fastce_format format, const void* x, ptrdiff_t n) {
    enum { N = WIDTH > 8 ? 64 / WIDTH : 8 };
    VEC m[N];
    REAL lanes[WIDTH], row_max;
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

/* The place of the first of n numbers that is `value`, or -1. */
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

/* The maximum of each of 16 rows; NaN is left out. */
FASTCE_NOINLINE void F(lane_maxima)(const REAL* x, ptrdiff_t n, REAL* row_max) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC m[4], y[4];
        ptrdiff_t k;
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) m[g] = F(fill)(-INFINITY);
        for (k = 0; k + 64 <= n; k += 64) {
            F(load_groups)(FASTCE_NATIVE, x, k + j, y);
            FASTCE_UNROLL
            for (int g = 0; g < 4; g++) m[g] = F(max)(y[g], m[g]);
        }
        for (; k < n; k += 16) m[0] = F(max)(F(load)(x + k + j), m[0]);
        F(store)(row_max + j, F(max)(F(max)(m[0], m[1]), F(max)(m[2], m[3])));
    }
}

/* The first class of each of 16 rows whose number is that row's value, or FASTCE_NO_CLASS. */
FASTCE_NOINLINE void F(find_in_lanes)(const REAL* x, ptrdiff_t n, const REAL* values, int32_t* found) {
    for (int j = 0; j < 16; j++) found[j] = FASTCE_NO_CLASS;
    for (ptrdiff_t k = n / 16 - 1; k >= 0; k--)
        for (int j = 0; j < 16; j++) found[j] = x[16 * k + j] == values[j] ? (int32_t)k : found[j];
}

/* ---- exponentials and sums; e is exp(scale * (x - row_max)) * EXP_UNIT ---- */

/* By rows the terms that are 1 are not left out, see `sum_excl_max`. */
FASTCE_INLINE void F(sum_exps_of)(fastce_format format, int by_rows, int sums_entropy, int is_long, fastce_block* b,
    const REAL* row_max, REAL scale) {
    VEC m[VECTORS], all[VECTORS], excl_max[VECTORS], x[4];
    REAL lanes[16], sums[16];
    /* Copies, for compilers must assume that stores to e change the block. */
    const void* const given = b->x;
    REAL* const e = (REAL*)b->e;
    const REAL half = F(half)(scale);
    const char* const ahead = b->ahead;
    const ptrdiff_t n = b->n, size = b->ahead_size;
    const VEC last = F(load_as)(format, given, n - WIDTH); /* before stores to e, which may be x */
    ptrdiff_t k;
    F(load_lanes)(by_rows, row_max, m);
    for (int j = 0; j < 16; j++) sums[j] = 0;
    for (int v = 0; v < VECTORS; v++) {
        m[v] = m[v] * half;
        all[v] = excl_max[v] = F(fill)(0);
    }
    for (k = 0; k + 64 <= n; k += 64) {
        /* Of 16 bits some lines twice: a variable count took half a cycle more per 16 numbers. */
        for (int j = 0; by_rows && j < (format == FASTCE_NATIVE ? 64 * (int)sizeof(REAL) : 128); j += 64)
            FASTCE_PREFETCH_ROW(ahead + k * size + j, is_long);
        if (format != FASTCE_NATIVE) /* in place, what is written has just been read */
            for (int j = 0; j < 64; j += 16) FASTCE_PREFETCH_L1(e + k + 256 + j);
        for (int j = 0, v = 0; j < 16; j += WIDTH, v++) {
            F(load_groups)(format, given, k + j, x);
            F(exp_some)(x, 4, 0, m[v], half, scale, e + k + j, &all[v], by_rows ? NULL : &excl_max[v],
                sums_entropy ? sums + j : NULL);
        }
    }
    for (ptrdiff_t j = k * size; by_rows && j < n * size; j += 64) FASTCE_PREFETCH_ROW(ahead + j, is_long);
    for (; !by_rows && k < n; k += 16)
        for (int j = 0, v = 0; j < 16; j += WIDTH, v++) {
            x[0] = F(load)((const REAL*)given + k + j);
            F(exp_some)(x, 1, 0, m[v], half, scale, e + k + j, &all[v], &excl_max[v], sums_entropy ? sums + j : NULL);
        }
    for (; k + WIDTH <= n; k += WIDTH) {
        x[0] = F(load_as)(format, given, k);
        F(exp_some)(x, 1, 0, m[0], half, scale, e + k, all, NULL, sums_entropy ? sums : NULL);
    }
    if (k < n)
        F(exp_some)(
            &last, 1, (int)(WIDTH - (n - k)), m[0], half, scale, e + n - WIDTH, all, NULL, sums_entropy ? sums : NULL);
    F(store_lanes)(all, lanes);
    F(put_sum)(by_rows, lanes, b->sums[FASTCE_ALL]);
    F(store_lanes)(excl_max, lanes);
    if (!by_rows) F(put_sum)(0, lanes, b->sums[FASTCE_EXCL_MAX]);
    if (sums_entropy) F(put_sum)(by_rows, sums, b->sums[FASTCE_E_D]);
}

/* Each set of constants has a function of its own: a choice within the loop took a tenth of the time with AVX2, and as
   much as many loops in one function, whose constants then had no registers. */
#define SUM_EXPS(name, format, by_rows, sums_entropy, is_long, scale_of)                  \
    FASTCE_NOINLINE void F(name)(fastce_block * block, const REAL* row_max, REAL scale) { \
        F(sum_exps_of)(format, by_rows, sums_entropy, is_long, block, row_max, scale_of); \
    }
#if IS_FLOAT && FASTCE_SWEEPS_16_BITS
SUM_EXPS(sum_exps_half, FASTCE_HALF, 1, 0, 0, ((void)scale, 1))
SUM_EXPS(sum_exps_bfloat16, FASTCE_BFLOAT16, 1, 0, 0, ((void)scale, 1))
#endif
SUM_EXPS(sum_exps_short, FASTCE_NATIVE, 1, 0, 0, ((void)scale, 1))
SUM_EXPS(sum_exps_long, FASTCE_NATIVE, 1, 0, 1, ((void)scale, 1))
SUM_EXPS(sum_exps_scaled, FASTCE_NATIVE, 1, 0, 0, scale)
SUM_EXPS(sum_exps_scaled_long, FASTCE_NATIVE, 1, 0, 1, scale)
SUM_EXPS(sum_exps_entropy, FASTCE_NATIVE, 1, 1, block->is_long, scale)
SUM_EXPS(sum_exps_lanes, FASTCE_NATIVE, 0, 0, 0, ((void)scale, 1))
SUM_EXPS(sum_exps_scaled_lanes, FASTCE_NATIVE, 0, 0, 0, scale)
SUM_EXPS(sum_exps_entropy_lanes, FASTCE_NATIVE, 0, 1, 0, scale)
#undef SUM_EXPS

/* Sums up the exponentials of a block, and leaves them in e. */
FASTCE_INLINE void F(sum_exps)(fastce_block* b, const REAL* row_max, REAL scale) {
    if (!b->by_rows && b->sums_entropy)
        F(sum_exps_entropy_lanes)(b, row_max, scale);
    else if (!b->by_rows && scale == 1)
        F(sum_exps_lanes)(b, row_max, scale);
    else if (!b->by_rows)
        F(sum_exps_scaled_lanes)(b, row_max, scale);
#if IS_FLOAT && FASTCE_SWEEPS_16_BITS
    else if (b->format == FASTCE_HALF)
        F(sum_exps_half)(b, row_max, scale);
    else if (b->format == FASTCE_BFLOAT16)
        F(sum_exps_bfloat16)(b, row_max, scale);
#endif
    else if (b->sums_entropy)
        F(sum_exps_entropy)(b, row_max, scale);
    else if (scale == 1 && b->is_long)
        F(sum_exps_long)(b, row_max, scale);
    else if (scale == 1)
        F(sum_exps_short)(b, row_max, scale);
    else if (b->is_long)
        F(sum_exps_scaled_long)(b, row_max, scale);
    else
        F(sum_exps_scaled)(b, row_max, scale);
}

/* ---- the other sums: a loop before that of the exponentials, which may take the place of the logits ---- */

/* Class weights for n vectors, 4 or 1, whose numbers are 16 apart; 1 where there are none. */
FASTCE_INLINE void F(load_weights)(int by_rows, const REAL* w, ptrdiff_t k, int n, VEC* some) {
    FASTCE_UNROLL
    for (int g = 0; g < n; g++)
        some[g] = w == NULL ? F(fill)(1) : by_rows ? F(load)(w + k + 16 * g) : F(fill)(w[(size_t)k / 16 + g]);
}

FASTCE_INLINE void F(sum_targets_of)(
    int by_rows, fastce_block* b, const REAL* row_max, const REAL* w, const REAL* t, fastce_asked_sums asked) {
    REAL sums[16 * FASTCE_N_SUMS];
    VEC shift[VECTORS], x[4], w_some[4], t_some[4];
    const REAL* const given = (const REAL*)b->x;
    const char* const ahead_t = b->ahead_t;
    const ptrdiff_t n = b->n, size = b->ahead_t_size;
    ptrdiff_t k;
    F(load_lanes)(by_rows, row_max, shift);
    for (int v = 0; v < VECTORS; v++) shift[v] = shift[v] * (REAL)FASTCE_D_UNIT;
    for (int j = 0; j < 16 * FASTCE_N_SUMS; j++) sums[j] = 0;
    for (k = 0; k + 64 <= n; k += 64) {
        if (by_rows && t != NULL)
            for (int j = 0; j < 64 * (int)sizeof(REAL); j += 64) FASTCE_PREFETCH_L2(ahead_t + k * size + j);
        for (int j = 0, v = 0; j < 16; j += WIDTH, v++) {
            F(load_groups)(FASTCE_NATIVE, given, k + j, x);
            F(load_weights)(by_rows, w, k + j, 4, w_some);
            if (t != NULL) F(load_groups)(FASTCE_NATIVE, t, k + j, t_some);
            F(sum_some)(x, w_some, t_some, 4, shift[v], t != NULL, 0, &asked, sums + j);
        }
    }
    for (; !by_rows && k < n; k += 16)
        for (int j = 0, v = 0; j < 16; j += WIDTH, v++) {
            x[0] = F(load)(given + k + j);
            F(load_weights)(0, w, k + j, 1, w_some);
            if (t != NULL) t_some[0] = F(load)(t + k + j);
            F(sum_some)(x, w_some, t_some, 1, shift[v], t != NULL, 0, &asked, sums + j);
        }
    for (; k < n; k += WIDTH) { /* the last vector overlaps the one before */
        const int first = (int)(n - k < WIDTH ? WIDTH - (n - k) : 0);
        const ptrdiff_t start = n - k < WIDTH ? n - WIDTH : k;
        x[0] = F(load)(given + start);
        F(load_weights)(1, w, start, 1, w_some);
        w_some[0] = F(from_lane)(first, w_some[0], F(fill)(0));
        if (t != NULL) t_some[0] = F(from_lane)(first, F(load)(t + start), F(fill)(0));
        F(sum_some)(x, w_some, t_some, 1, shift[0], t != NULL, 1, &asked, sums);
    }
    for (int j = FASTCE_W_D; j < FASTCE_N_SUMS; j++)
        if (j == FASTCE_W_D ? asked.w_d : t != NULL && (j < FASTCE_T || asked.t_d))
            F(put_sum)(by_rows, sums + 16 * j, b->sums[j]);
}

/* Label smoothing without and with weights, class probabilities, and everything together. */
#define SUM_TARGETS(name, by_rows, w, t, ...)                                          \
    FASTCE_NOINLINE void F(name)(fastce_block * b, const REAL* row_max) {              \
        const fastce_asked_sums asked = __VA_ARGS__;                                   \
        F(sum_targets_of)(by_rows, b, row_max, (const REAL*)w, (const REAL*)t, asked); \
    }
SUM_TARGETS(sum_smoothing, 1, NULL, NULL, {1, 0, 0, 0})
SUM_TARGETS(sum_weighted, 1, b->w, NULL, {1, 0, 1, 0})
SUM_TARGETS(sum_prob, 1, NULL, b->t, {0, 0, 0, 0})
SUM_TARGETS(sum_any, 1, b->w, b->t, b->asked)
SUM_TARGETS(sum_smoothing_lanes, 0, NULL, NULL, {1, 0, 0, 0})
SUM_TARGETS(sum_weighted_lanes, 0, b->w, NULL, {1, 0, 1, 0})
SUM_TARGETS(sum_prob_lanes, 0, NULL, b->t, {0, 0, 0, 0})
SUM_TARGETS(sum_any_lanes, 0, b->w, b->t, b->asked)
#undef SUM_TARGETS

/* Sums up what label smoothing and class probabilities ask for. */
FASTCE_INLINE void F(sum_targets)(fastce_block* b, const REAL* row_max) {
    if (b->t == NULL && b->w == NULL)
        b->by_rows ? F(sum_smoothing)(b, row_max) : F(sum_smoothing_lanes)(b, row_max);
    else if (b->t == NULL && !b->asked.has_zero_w)
        b->by_rows ? F(sum_weighted)(b, row_max) : F(sum_weighted_lanes)(b, row_max);
    else if (b->t != NULL && b->w == NULL && !b->asked.w_d && !b->asked.t_d)
        b->by_rows ? F(sum_prob)(b, row_max) : F(sum_prob_lanes)(b, row_max);
    else
        b->by_rows ? F(sum_any)(b, row_max) : F(sum_any_lanes)(b, row_max);
}

/* The sum of n exponentials of a row without the terms that are 1. */
FASTCE_NOINLINE double F(sum_excl_max)(const REAL* e, ptrdiff_t n) {
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
        F(add_to)(lanes, F(unless_largest)(F(from_lane)((int)(WIDTH - (n - k)), F(load)(e + n - WIDTH), F(fill)(0))));
    return F(lane_sum)(lanes);
}

/* ---- softcap ---- */

/* tanh(x * factor), with the same bits wherever a number stands. */
FASTCE_NOINLINE void F(cap)(const REAL* x, ptrdiff_t n, REAL factor, REAL* out) {
    REAL some[WIDTH];
    ptrdiff_t k = 0;
    for (; k + WIDTH <= n; k += WIDTH) F(store)(out + k, F(tanh)(F(load)(x + k) * factor));
    if (k == n) return;
    for (int j = 0; j < WIDTH; j++) some[j] = 0;
    memcpy(some, x + k, (n - k) * sizeof(REAL));
    F(store)(some, F(tanh)(F(load)(some) * factor));
    memcpy(out + k, some, (n - k) * sizeof(REAL));
}

/* out = g * (1 - tanh(x * factor)^2); `out` may be x. */
FASTCE_NOINLINE void F(multiply_slopes)(const REAL* g, ptrdiff_t n, const REAL* x, REAL factor, REAL* out) {
    REAL some[WIDTH], slopes[WIDTH];
    ptrdiff_t k = 0;
    for (; k + WIDTH <= n; k += WIDTH) F(store)(out + k, F(load)(g + k) * F(sech2)(F(load)(x + k) * factor));
    if (k == n) return;
    for (int j = 0; j < WIDTH; j++) some[j] = 0;
    memcpy(some, x + k, (n - k) * sizeof(REAL));
    F(store)(slopes, F(sech2)(F(load)(some) * factor));
    for (ptrdiff_t j = 0; k + j < n; j++) out[k + j] = g[k + j] * slopes[j];
}

/* ---- results ---- */

/* Several vectors a turn: loops of one took a tenth of a call longer where they lay across two cache lines. */
FASTCE_NOINLINE void F(multiply)(REAL* e, ptrdiff_t n, REAL factor) {
    const VEC f = F(fill)(factor);
    ptrdiff_t k = 0;
    for (; k + 4 * WIDTH <= n; k += 4 * WIDTH) {
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) F(store)(e + k + g * WIDTH, F(load)(e + k + g * WIDTH) * f);
    }
    for (; k < n; k++) e[k] *= factor;
}

/* alpha e + (beta + gamma t) w over e itself, alpha freed of EXP_UNIT; without t if that is NULL, with w = 1 likewise. */
FASTCE_INLINE void F(gradient_of)(int by_rows, REAL* e, ptrdiff_t n, const REAL* alpha, const REAL* beta, const REAL* w,
    const REAL* gamma, const REAL* t) {
    VEC a[VECTORS], b[VECTORS], c[VECTORS];
    ptrdiff_t k;
    F(load_lanes)(by_rows, alpha, a);
    F(load_lanes)(by_rows, beta, b);
    F(load_lanes)(by_rows, gamma, c);
    for (k = 0; k + 16 <= n; k += 16)
        for (int j = 0, v = 0; j < 16; j += WIDTH, v++) {
            const VEC added = t == NULL ? b[v] : b[v] + c[v] * F(load)(t + k + j);
            VEC weight;
            F(load_weights)(by_rows, w, k + j, 1, &weight);
            F(store)(e + k + j, F(load)(e + k + j) * a[v] + (w == NULL ? added : added * weight));
        }
    for (; k < n; k++) {
        const REAL added = t == NULL ? beta[0] : beta[0] + gamma[0] * t[k];
        e[k] = e[k] * alpha[0] + (w == NULL ? added : added * w[k]);
    }
}

/* Without weights, without probabilities, with both: constants again. */
#define GRADIENT(name, by_rows)                                                                                        \
    FASTCE_NOINLINE void F(name)(                                                                                      \
        REAL * e, ptrdiff_t n, const REAL* alpha, const REAL* beta, const REAL* w, const REAL* gamma, const REAL* t) { \
        if (w == NULL && t == NULL)                                                                                    \
            F(gradient_of)(by_rows, e, n, alpha, beta, NULL, gamma, NULL);                                             \
        else if (t == NULL)                                                                                            \
            F(gradient_of)(by_rows, e, n, alpha, beta, w, gamma, NULL);                                                \
        else if (w == NULL)                                                                                            \
            F(gradient_of)(by_rows, e, n, alpha, beta, NULL, gamma, t);                                                \
        else                                                                                                           \
            F(gradient_of)(by_rows, e, n, alpha, beta, w, gamma, t);                                                   \
    }
GRADIENT(write_row_gradient, 1)
GRADIENT(write_lane_gradients, 0)
#undef GRADIENT

FASTCE_INLINE void F(write_gradient)(int by_rows, REAL* e, ptrdiff_t n, const REAL* alpha, const REAL* beta,
    const REAL* w, const REAL* gamma, const REAL* t) {
    if (by_rows)
        F(write_row_gradient)(e, n, alpha, beta, w, gamma, t);
    else
        F(write_lane_gradients)(e, n, alpha, beta, w, gamma, t);
}

/* scale * (x - row_max) - log_sum; `out` may be x. */
FASTCE_NOINLINE void F(write_log)(
    const REAL* x, ptrdiff_t n, const REAL* row_max, REAL scale, const REAL* log_sum, REAL* out) {
    const VEC last = F(load)(x + n - WIDTH); /* before stores to `out` */
    VEC m[VECTORS], s[VECTORS];
    ptrdiff_t k;
    F(load_lanes)(0, row_max, m);
    F(load_lanes)(0, log_sum, s);
    for (k = 0; k + 16 <= n; k += 16)
        for (int j = 0, v = 0; j < 16; j += WIDTH, v++)
            F(store)(out + k + j, F(difference)(F(load)(x + k + j), m[v], scale) - s[v]);
    for (; k + WIDTH <= n; k += WIDTH) F(store)(out + k, F(difference)(F(load)(x + k), m[0], scale) - s[0]);
    if (k < n) F(store)(out + n - WIDTH, F(difference)(last, m[0], scale) - s[0]);
}

#undef VECTORS

#endif
