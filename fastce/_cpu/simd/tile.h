/* One tile: straight loops over 64 numbers. Cython's loops over rows and blocks call these; see `_tiles.pxd`.

   Design
   ------
   1. A tile is 4 groups of 16 lanes. A row kernel fills it with 64 consecutive classes of one row; a column kernel
      with 4 consecutive classes of 16 rows. Sums and maxima fold the groups into 16 lanes, which are partial results
      of one row in the first case and the results of 16 rows in the second. So both kernel families run this code.
   2. Trip counts are constants and every result lands in a local array, so that compilers vectorise without remainder
      loops and without checks for overlap. Short tiles are padded by the caller: logits with -inf, weights with 0.
   3. Loops over exponentials and maxima name their vectors, which compilers else store and load again between
      exponentials and sums: that took a third of the time of floats and half of that of doubles. The others are
      plain.
   4. Folding four groups before touching the accumulator keeps the chain through it short: one chain per element was
      3 times slower. Summing per lane also bounds the rounding error: n classes are at most n / 64 additions deep. */
#ifndef FASTCE_TILE_H
#define FASTCE_TILE_H

#include <math.h>

#include "simd/convert.h"
#include "simd/math.h"
#include "simd/prefetch.h"
#include "simd/simd.h"

#define FASTCE_LANES 16
#define FASTCE_TILE 64
#define FASTCE_NO_CLASS 0x7FFFFFFF

#if FASTCE_IS_WIDE
#if FASTCE_VECTOR_BYTES == 64
typedef __m512i fastce_words;
#else
typedef __m256i fastce_words;
#endif
#endif

/* The sum of 16 lanes, halves added to each other. */
FASTCE_INLINE double fastce_wide_lane_sum(const double* lanes) {
    double t[8];
    for (int j = 0; j < 8; j++) t[j] = lanes[j] + lanes[j + 8];
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

/* Where the sums of 16 lanes are that label smoothing and class probabilities ask for; NULL: not asked for. */
typedef struct {
    void* wd;       /* w d, with d = x - top */
    int has_zero_w; /* among the weights */
    void* wt;       /* w t; and w t d */
    void* wtd;
    int has_w; /* else all weights are 1 */
    void* t;   /* t; and t d */
    void* td;
} fastce_target_sums;

#define FASTCE_TEMPLATE "simd/tile.h"
#include "simd/for_types.h"

#define fastce_fill_range(tile, start, stop, value) FASTCE_OF_VECTORS(fill_range, *(tile))(tile, start, stop, value)
#define fastce_gather(data, stride, n, tile) FASTCE_OF_VECTORS(gather, *(tile))(data, stride, n, tile)
#define fastce_keep_lanes(first, source, other, tile) FASTCE_OF_VECTORS(keep_lanes, *(tile))(first, source, other, tile)
#define fastce_store_lanes(first, tile, out) FASTCE_OF_VECTORS(store_lanes, *(tile))(first, tile, out)
#define fastce_widen(lanes, wide) FASTCE_OF_VECTORS(widen, *(lanes))(lanes, wide)
#define fastce_narrow(wide, lanes) FASTCE_OF_VECTORS(narrow, *(lanes))(wide, lanes)
#define fastce_copy(source, tile) FASTCE_OF_VECTORS(copy, *(tile))(source, tile)
#define fastce_store_tile(data, stride, n, tile) FASTCE_OF_VECTORS(store_tile, *(tile))(data, stride, n, tile)
#define fastce_cap(x, factor) FASTCE_OF_VECTORS(cap, *(x))(x, factor)
#define fastce_cap_slopes(x, factor, out) FASTCE_OF_VECTORS(cap_slopes, *(x))(x, factor, out)
#define fastce_fold_max(x, row_max) FASTCE_OF_VECTORS(fold_max, *(x))(x, row_max)
#define fastce_lane_max(lanes) FASTCE_OF_VECTORS(lane_max, *(lanes))(lanes)
#define fastce_lane_sum(lanes) FASTCE_OF_VECTORS(lane_sum, *(lanes))(lanes)
#define fastce_exp_and_fold(x, pitch, n_groups, row_max, scale, e, e_pitch, all, rest)               \
    FASTCE_OF_VECTORS(exp_and_fold, *(x))(x, pitch, n_groups, row_max, scale, e, e_pitch, all, rest)
#define fastce_exp_row(format, x, n, row_max, scale, e, ahead, size, is_long, sums)               \
    FASTCE_OF_VECTORS(exp_row, *(e))(format, x, n, row_max, scale, e, ahead, size, is_long, sums)
#define fastce_fold(a, sums) FASTCE_OF_VECTORS(fold, *(a))(a, sums)
#define fastce_fold_rest(e, sums) FASTCE_OF_VECTORS(fold_rest, *(e))(e, sums)
#define fastce_fold_shifted(a, x, row_max, has_zeros, sums)               \
    FASTCE_OF_VECTORS(fold_shifted, *(a))(a, x, row_max, has_zeros, sums)
#define fastce_fold_targets(x, row_max, w, is_padded, t, sums)               \
    FASTCE_OF_VECTORS(fold_targets, *(x))(x, row_max, w, is_padded, t, sums)
#define fastce_fold_argmax(x, row_max, base, group_step, lane_step, first)               \
    FASTCE_OF_VECTORS(fold_argmax, *(x))(x, row_max, base, group_step, lane_step, first)
#define fastce_fold_max_and_w(x, w, row_max, w_at_max) FASTCE_OF_VECTORS(fold_max_and_w, *(x))(x, w, row_max, w_at_max)
#define fastce_fold_moment(e, w, w_at_max, sums) FASTCE_OF_VECTORS(fold_moment, *(e))(e, w, w_at_max, sums)
#define fastce_product(a, b, out) FASTCE_OF_VECTORS(product, *(a))(a, b, out)
#define fastce_scale_exp(e, alpha, out) FASTCE_OF_VECTORS(scale_exp, *(e))(e, alpha, out)
#define fastce_multiply(e, n, factor) FASTCE_OF_VECTORS(multiply, *(e))(e, n, factor)
#define fastce_write_gradient(e, alpha, beta, w, gamma, t, out)               \
    FASTCE_OF_VECTORS(write_gradient, *(e))(e, alpha, beta, w, gamma, t, out)
#define fastce_write_gradient_in_place(e, n, alpha, beta, w, gamma, t)               \
    FASTCE_OF_VECTORS(write_gradient_in_place, *(e))(e, n, alpha, beta, w, gamma, t)
#define fastce_write_log(x, row_max, scale, log_sum, out)               \
    FASTCE_OF_VECTORS(write_log, *(x))(x, row_max, scale, log_sum, out)

#if FASTCE_IS_WIDE
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

/* The maximum of n >= 64 classes of a row, floats or of 16 bits; NaN is left out. */
FASTCE_INLINE float fastce_max_of_row(fastce_format format, const void* x, ptrdiff_t n) {
#if FASTCE_SWEEPS_16_BITS
    if (format == FASTCE_HALF) return fastce_max_of_16_bits(FASTCE_HALF, (const uint16_t*)x, n);
    if (format == FASTCE_BFLOAT16) return fastce_max_of_16_bits(FASTCE_BFLOAT16, (const uint16_t*)x, n);
#endif
    return fastce_max_of_floats(format, x, n);
}

#elif defined(REAL)

/* ---- copies ---- */

FASTCE_INLINE void F(fill_range)(REAL* tile, ptrdiff_t start, ptrdiff_t stop, REAL value) {
    for (ptrdiff_t j = start; j < stop; j++) tile[j] = value;
}

/* n numbers that lie `stride` bytes apart, on any alignment. */
FASTCE_INLINE void F(gather)(const char* data, ptrdiff_t stride, ptrdiff_t n, REAL* tile) {
    if (stride == sizeof(REAL))
        memcpy(tile, data, n * sizeof(REAL));
    else
        for (ptrdiff_t j = 0; j < n; j++) memcpy(tile + j, data + j * stride, sizeof(REAL));
}

/* A tile but for the lanes before `first`, which become `other`. */
FASTCE_INLINE void F(keep_lanes)(int32_t first, const REAL* source, REAL other, REAL* tile) {
    for (int j = 0; j < 64; j += WIDTH) F(store)(tile + j, F(from_lane)(j, first, F(load)(source + j), F(fill)(other)));
}

/* Overwrites `out` but for the lanes before `first`. */
FASTCE_INLINE void F(store_lanes)(int32_t first, const REAL* tile, REAL* out) {
    for (int j = 0; j < 64; j += WIDTH) F(store)(out + j, F(from_lane)(j, first, F(load)(tile + j), F(load)(out + j)));
}

FASTCE_INLINE void F(widen)(const REAL* lanes, double* wide) {
    for (int j = 0; j < 16; j++) wide[j] = lanes[j];
}

FASTCE_INLINE void F(narrow)(const double* wide, REAL* lanes) {
    for (int j = 0; j < 16; j++) lanes[j] = (REAL)wide[j];
}

FASTCE_INLINE void F(copy)(const REAL* source, REAL* tile) {
    for (int j = 0; j < 64; j += WIDTH) F(store)(tile + j, F(load)(source + j));
}

/* n numbers of a tile to places `stride` bytes apart, on any alignment. */
FASTCE_INLINE void F(store_tile)(char* data, ptrdiff_t stride, ptrdiff_t n, const REAL* tile) {
    if (stride != sizeof(REAL))
        for (ptrdiff_t j = 0; j < n; j++) memcpy(data + j * stride, tile + j, sizeof(REAL));
    else if (n == 64)
        F(copy)(tile, (REAL*)data);
    else
        memcpy(data, tile, n * sizeof(REAL));
}

/* ---- softcap ---- */

/* x becomes tanh(x * factor). */
FASTCE_INLINE void F(cap)(REAL* x, REAL factor) {
    for (int j = 0; j < 64; j += WIDTH) F(store)(x + j, F(tanh)(F(load)(x + j) * factor));
}

/* 1 - tanh(x * factor)^2 */
FASTCE_INLINE void F(cap_slopes)(const REAL* x, REAL factor, REAL* out) {
    for (int j = 0; j < 64; j += WIDTH) F(store)(out + j, F(sech2)(F(load)(x + j) * factor));
}

/* ---- maxima; NaN is left out ---- */

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

FASTCE_INLINE void F(fold_max)(const REAL* x, REAL* row_max) {
    for (int j = 0; j < 16; j += WIDTH) {
        const VEC a = F(max)(F(load)(x + j), F(load)(x + j + 16));
        const VEC b = F(max)(F(load)(x + j + 32), F(load)(x + j + 48));
        F(store)(row_max + j, F(max)(F(max)(a, b), F(load)(row_max + j)));
    }
}

FASTCE_INLINE REAL F(lane_max)(const REAL* lanes) {
#if IS_FLOAT && FASTCE_IS_WIDE
    __m256 eight = _mm256_max_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    REAL t[8];
    for (int j = 0; j < 8; j++) t[j] = lanes[j] > lanes[j + 8] ? lanes[j] : lanes[j + 8];
    for (int n = 4; n > 0; n /= 2)
        for (int j = 0; j < n; j++) t[j] = t[j] > t[j + n] ? t[j] : t[j + n];
    return t[0];
#endif
}

/* Of n >= 64 numbers; the last vectors overlap those before. */
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

/* The smallest class whose logit is `row_max`; classes count from `base` by group and by lane. */
FASTCE_INLINE void F(fold_argmax)(
    const REAL* x, const REAL* row_max, int32_t base, int32_t group_step, int32_t lane_step, int32_t* first) {
    FASTCE_UNROLL
    for (int g = 0; g < 4; g++)
        for (int j = 0; j < 16; j++) {
            int32_t k = base + g * group_step + j * lane_step;
            k = x[16 * g + j] == row_max[j] ? k : FASTCE_NO_CLASS;
            first[j] = k < first[j] ? k : first[j];
        }
}

/* The maximum, and the w that belongs to it. */
FASTCE_INLINE void F(fold_max_and_w)(const REAL* x, const REAL* w, REAL* row_max, REAL* w_at_max) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC m = F(load)(row_max + j), w_m = F(load)(w_at_max + j);
        VEC a = F(load)(x + j), b = F(load)(x + j + 16), c = F(load)(x + j + 32), d = F(load)(x + j + 48);
        VEC w_a = F(load)(w + j), w_b = F(load)(w + j + 16), w_c = F(load)(w + j + 32), w_d = F(load)(w + j + 48);
        w_a = F(select)(F(is_greater)(a, b), w_a, w_b);
        a = F(max)(a, b);
        w_c = F(select)(F(is_greater)(c, d), w_c, w_d);
        c = F(max)(c, d);
        w_a = F(select)(F(is_greater)(a, c), w_a, w_c);
        a = F(max)(a, c);
        F(store)(w_at_max + j, F(select)(F(is_greater)(a, m), w_a, w_m));
        F(store)(row_max + j, F(max)(a, m));
    }
}

/* ---- exponentials and sums; e is exp(scale * (x - top)) * EXP_UNIT, and the largest term is exactly EXP_UNIT ---- */

FASTCE_INLINE VEC F(exp_of)(VEC x, VEC row_max, REAL scale) {
    const VEC d = x - row_max;
    return F(exp)(scale == 1 ? d : scale * d);
}

/* The sum of 4, 2 or 1 groups. */
FASTCE_INLINE VEC F(total)(const VEC* y, int n_groups) {
    VEC total = y[0];
    if (n_groups > 1) total = total + y[1];
    return n_groups < 4 ? total : total + (y[2] + y[3]);
}

FASTCE_INLINE void F(add_to)(REAL* sum, VEC x) { F(store)(sum, F(load)(sum) + x); }

FASTCE_INLINE VEC F(unless_largest)(VEC e) { return F(keep)(F(differs)(e, F(fill)(EXP_UNIT)), e); }

/* Writes the exponentials of 4, 2 or 1 groups of 16 lanes, `pitch` numbers apart, and adds them to sums that are not
   NULL: to `rest` without the terms that are 1. `e` may be `x`. */
FASTCE_INLINE void F(exp_and_fold)(const REAL* x, ptrdiff_t pitch, int n_groups, const REAL* row_max, REAL scale,
    REAL* e, ptrdiff_t e_pitch, REAL* all, REAL* rest) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC y[4];
        const VEC m = F(load)(row_max + j);
        FASTCE_UNROLL
        for (int g = 0; g < n_groups; g++) y[g] = F(exp_of)(F(load)(x + g * pitch + j), m, scale);
        FASTCE_UNROLL
        for (int g = 0; g < n_groups; g++) F(store)(e + g * e_pitch + j, y[g]);
        if (all != NULL) F(add_to)(all + j, F(total)(y, n_groups));
        if (rest != NULL) {
            FASTCE_UNROLL
            for (int g = 0; g < n_groups; g++) y[g] = F(unless_largest)(y[g]);
            F(add_to)(rest + j, F(total)(y, n_groups));
        }
    }
}

/* 64 classes of a row, from class k on; the lanes before `first` were done before and stay what they are in `e`. */
FASTCE_INLINE void F(exp_lanes)(
    fastce_format format, const void* x, ptrdiff_t k, int first, VEC row_max, REAL scale, REAL* e, VEC* sums) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC y[4];
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) {
            y[g] = F(load_as)(format, x, k + 16 * g + j);
            if (first > 0) y[g] = F(from_lane)(16 * g + j, first, y[g], F(fill)(-INFINITY));
            y[g] = F(exp_of)(y[g], row_max, scale);
        }
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) {
            VEC all = y[g];
            if (first > 0) all = F(from_lane)(16 * g + j, first, all, F(load)(e + k + 16 * g + j));
            F(store)(e + k + 16 * g + j, all);
        }
        sums[j / WIDTH] = sums[j / WIDTH] + F(total)(y, 4);
    }
}

FASTCE_INLINE void F(exp_row_of)(fastce_format format, const void* x, ptrdiff_t n, REAL row_max, REAL scale, REAL* e,
    const char* ahead, ptrdiff_t size, int is_long, REAL* sums) {
    VEC s[16 / WIDTH];
    const VEC m = F(fill)(row_max);
    ptrdiff_t k;
    for (int j = 0; j < 16; j += WIDTH) s[j / WIDTH] = F(load)(sums + j);
    for (k = 0; k + 64 <= n; k += 64) {
        for (int j = 0; j < (format == FASTCE_NATIVE ? 64 * (int)sizeof(REAL) : 128); j += 64)
            FASTCE_PREFETCH_ROW(ahead + k * size + j, is_long);
        if (format != FASTCE_NATIVE) /* in place, what is written has just been read */
            for (int j = 0; j < 64; j += 16) FASTCE_PREFETCH_L1(e + k + 256 + j);
        F(exp_lanes)(format, x, k, 0, m, scale, e, s);
    }
    for (ptrdiff_t j = k * size; j < n * size; j += 64) FASTCE_PREFETCH_ROW(ahead + j, is_long);
    if (k < n) F(exp_lanes)(format, x, n - 64, (int)(64 - (n - k)), m, scale, e, s);
    for (int j = 0; j < 16; j += WIDTH) F(store)(sums + j, s[j / WIDTH]);
}

/* What is constant makes a function of its own: a choice within the loop took a tenth of the time with AVX2, and as
   much as many loops in one function, whose constants then had no registers. */
#define EXP_ROW(name, format, scale_of, is_long)                                                                   \
    FASTCE_NOINLINE void F(name)(const void* x, ptrdiff_t n, REAL row_max, REAL scale, REAL* e, const char* ahead, \
        ptrdiff_t size, REAL* sums) {                                                                              \
        F(exp_row_of)(format, x, n, row_max, scale_of, e, ahead, size, is_long, sums);                             \
    }
#if IS_FLOAT && FASTCE_SWEEPS_16_BITS
EXP_ROW(exp_row_half, FASTCE_HALF, ((void)scale, 1), 0)
EXP_ROW(exp_row_bfloat16, FASTCE_BFLOAT16, ((void)scale, 1), 0)
#endif
EXP_ROW(exp_row_short, FASTCE_NATIVE, ((void)scale, 1), 0)
EXP_ROW(exp_row_long, FASTCE_NATIVE, ((void)scale, 1), 1)
EXP_ROW(exp_row_scaled, FASTCE_NATIVE, scale, 0)
EXP_ROW(exp_row_scaled_long, FASTCE_NATIVE, scale, 1)
#undef EXP_ROW

/* n >= 64 classes of a row, of REAL or of 16 bits; asks for what lies as far behind `ahead`, numbers of so many
   bytes. */
FASTCE_INLINE void F(exp_row)(fastce_format format, const void* x, ptrdiff_t n, REAL row_max, REAL scale, REAL* e,
    const char* ahead, ptrdiff_t size, int is_long, REAL* sums) {
#if IS_FLOAT && FASTCE_SWEEPS_16_BITS
    if (format == FASTCE_HALF)
        F(exp_row_half)(x, n, row_max, scale, e, ahead, size, sums);
    else if (format == FASTCE_BFLOAT16)
        F(exp_row_bfloat16)(x, n, row_max, scale, e, ahead, size, sums);
    else
#else
    (void)format;
#endif
        if (scale == 1 && is_long)
        F(exp_row_long)(x, n, row_max, scale, e, ahead, size, sums);
    else if (scale == 1)
        F(exp_row_short)(x, n, row_max, scale, e, ahead, size, sums);
    else if (is_long)
        F(exp_row_scaled_long)(x, n, row_max, scale, e, ahead, size, sums);
    else
        F(exp_row_scaled)(x, n, row_max, scale, e, ahead, size, sums);
}

FASTCE_INLINE void F(fold)(const REAL* a, REAL* sums) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC y[4];
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) y[g] = F(load)(a + 16 * g + j);
        F(add_to)(sums + j, F(total)(y, 4));
    }
}

/* Exponentials without the terms that are 1. */
FASTCE_INLINE void F(fold_rest)(const REAL* e, REAL* sums) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC z[4];
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) z[g] = F(unless_largest)(F(load)(e + 16 * g + j));
        F(add_to)(sums + j, F(total)(z, 4));
    }
}

/* The sum of 16 lanes in double, halves added to each other. */
FASTCE_INLINE double F(lane_sum)(const REAL* lanes) {
    double wide[16];
    F(widen)(lanes, wide);
    return fastce_wide_lane_sum(wide);
}

/* a * d, where nothing of an infinite d is nothing. */
FASTCE_INLINE VEC F(times)(VEC a, VEC d) { return F(keep)(F(differs)(a, F(fill)(0)), a * d); }

/* a * (x - top) at 2^-16 of its size, so that a block of 3e38 in one lane does not overflow. */
FASTCE_INLINE void F(fold_shifted)(const REAL* a, const REAL* x, const REAL* row_max, int has_zeros, REAL* sums) {
    const REAL u = (REAL)1.52587890625e-05;
    for (int j = 0; j < 16; j += WIDTH) {
        VEC y[4];
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) {
            const VEC w = F(load)(a + 16 * g + j), d = F(load)(x + 16 * g + j) * u - F(load)(row_max + j) * u;
            y[g] = has_zeros ? F(times)(w, d) : w * d;
        }
        F(add_to)(sums + j, F(total)(y, 4));
    }
}

FASTCE_INLINE void F(product)(const REAL* a, const REAL* b, REAL* out) {
    for (int j = 0; j < 64; j += WIDTH) F(store)(out + j, F(load)(a + j) * F(load)(b + j));
}

/* What label smoothing and class probabilities ask for; t is NULL without the latter. */
FASTCE_INLINE void F(fold_targets)(
    const REAL* x, const REAL* row_max, const REAL* w, int is_padded, const REAL* t, const fastce_target_sums* sums) {
    REAL wt[64];
    if (sums->wd != NULL) F(fold_shifted)(w, x, row_max, is_padded || sums->has_zero_w, (REAL*)sums->wd);
    if (t == NULL) return;
    if (sums->has_w) {
        F(product)(w, t, wt);
        F(fold)(wt, (REAL*)sums->wt);
        F(fold_shifted)(wt, x, row_max, 1, (REAL*)sums->wtd);
    } else {
        F(fold)(t, (REAL*)sums->wt);
        F(fold_shifted)(t, x, row_max, 1, (REAL*)sums->wtd);
    }
    if (sums->t == NULL) return;
    F(fold)(t, (REAL*)sums->t);
    F(fold_shifted)(t, x, row_max, 1, (REAL*)sums->td);
}

/* e * (w - w_top) */
FASTCE_INLINE void F(fold_moment)(const REAL* e, const REAL* w, const REAL* w_at_max, REAL* sums) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC y[4];
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) y[g] = F(load)(e + 16 * g + j) * (F(load)(w + 16 * g + j) - F(load)(w_at_max + j));
        F(add_to)(sums + j, F(total)(y, 4));
    }
}

/* ---- results ---- */

/* Exponentials freed of EXP_UNIT. Before anything else is multiplied: a tiny factor freed of it would be subnormal. */
FASTCE_INLINE VEC F(load_freed)(const REAL* e) { return F(load)(e) * (1 / EXP_UNIT); }

/* e * alpha, freed of EXP_UNIT. `out` may be `e`. */
FASTCE_INLINE void F(scale_exp)(const REAL* e, const REAL* alpha, REAL* out) {
    for (int g = 0; g < 64; g += 16)
        for (int j = 0; j < 16; j += WIDTH) F(store)(out + g + j, F(load_freed)(e + g + j) * F(load)(alpha + j));
}

FASTCE_INLINE void F(multiply)(REAL* e, ptrdiff_t n, REAL factor) {
    for (ptrdiff_t j = 0; j < n; j++) e[j] *= factor;
}

/* alpha e + beta w, or alpha e + (beta + gamma t) w if t is not NULL. */
FASTCE_INLINE void F(write_gradient)(
    const REAL* e, const REAL* alpha, const REAL* beta, const REAL* w, const REAL* gamma, const REAL* t, REAL* out) {
    for (int g = 0; g < 64; g += 16)
        for (int j = 0; j < 16; j += WIDTH) {
            const VEC p = F(load_freed)(e + g + j) * F(load)(alpha + j), b = F(load)(beta + j);
            const VEC v = F(load)(w + g + j);
            F(store)(out + g + j, t == NULL ? p + b * v : p + (b + F(load)(gamma + j) * F(load)(t + g + j)) * v);
        }
}

/* The same for n classes of one row over e itself; alpha is freed of EXP_UNIT, NULL for w means 1. */
FASTCE_INLINE void F(write_gradient_in_place)(
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

/* scale * (x - top) - log_sum */
FASTCE_INLINE void F(write_log)(const REAL* x, const REAL* row_max, REAL scale, const REAL* log_sum, REAL* out) {
    for (int g = 0; g < 64; g += 16)
        for (int j = 0; j < 16; j += WIDTH)
            F(store)(out + g + j, scale * (F(load)(x + g + j) - F(load)(row_max + j)) - F(load)(log_sum + j));
}

#endif
