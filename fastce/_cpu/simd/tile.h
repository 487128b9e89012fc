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

/* The sum of 16 lanes, halves added to each other. */
FASTCE_INLINE double fastce_wide_lane_sum(const double* lanes) {
    double t[8];
    for (int j = 0; j < 8; j++) t[j] = lanes[j] + lanes[j + 8];
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

/* Sums over the classes of a row. d is the shifted logit x - row_max, to be multiplied by the logits' scale; sums of it
   are those of d * FASTCE_D_UNIT, so that a block of 3e38 in one lane does not overflow. */
enum {
    FASTCE_ALL,  /* exp(d) */
    FASTCE_REST, /* exp(d), but for terms that are 1 */
    FASTCE_E_D,  /* exp(d) d */
    FASTCE_W_D,  /* w d */
    FASTCE_WT,   /* w t */
    FASTCE_WT_D, /* w t d */
    FASTCE_T,    /* t */
    FASTCE_T_D,  /* t d */
    FASTCE_N_SUMS
};
#define FASTCE_D_UNIT 1.52587890625e-05 /* 2^-16 */

/* Which of them label smoothing and class probabilities ask for. */
typedef struct {
    int w_d;
    int has_zero_w; /* among the weights */
    int has_w;      /* else all weights are 1 */
    int t_d;        /* and T, besides WT and WT_D */
} fastce_asked_sums;

/* A block of classes, of one row or of 16 rows side by side, and what is asked of it. */
typedef struct {
    const void* x;     /* logits: REAL, or of 16 bits; under a softcap tanh of them */
    ptrdiff_t n;       /* classes */
    void* e;           /* where the exponentials go; may be x */
    const char* ahead; /* what is asked for meanwhile, numbers of so many bytes */
    ptrdiff_t ahead_size;
    const void* w; /* class weights; NULL: all are 1 */
    const void* t; /* class probabilities, or NULL */
    const char* ahead_t;
    ptrdiff_t ahead_t_size;
    double sums[FASTCE_N_SUMS][FASTCE_LANES]; /* result; of one row in the first lane */
    fastce_format format;                     /* of x */
    int is_long;                              /* more blocks follow */
    fastce_asked_sums asked;
    int sums_entropy; /* E_D */
} fastce_block;

#define FASTCE_TEMPLATE "simd/tile.h"
#include "simd/for_types.h"

#define fastce_fill_range(tile, start, stop, value) FASTCE_OF_VECTORS(fill_range, *(tile))(tile, start, stop, value)
#define fastce_widen(lanes, wide) FASTCE_OF_VECTORS(widen, *(lanes))(lanes, wide)
#define fastce_narrow(wide, lanes) FASTCE_OF_VECTORS(narrow, *(lanes))(wide, lanes)
#define fastce_copy(source, tile) FASTCE_OF_VECTORS(copy, *(tile))(source, tile)
#define fastce_cap(x, factor) FASTCE_OF_VECTORS(cap, *(x))(x, factor)
#define fastce_cap_slopes(x, factor, out) FASTCE_OF_VECTORS(cap_slopes, *(x))(x, factor, out)
#define fastce_fold_max(x, row_max) FASTCE_OF_VECTORS(fold_max, *(x))(x, row_max)
#define fastce_lane_max(lanes) FASTCE_OF_VECTORS(lane_max, *(lanes))(lanes)
#define fastce_lane_sum(lanes) FASTCE_OF_VECTORS(lane_sum, *(lanes))(lanes)
#define fastce_exp_and_fold(x, pitch, n_groups, row_max, scale, e, e_pitch, all, rest)               \
    FASTCE_OF_VECTORS(exp_and_fold, *(x))(x, pitch, n_groups, row_max, scale, e, e_pitch, all, rest)
#define fastce_fold(a, sums) FASTCE_OF_VECTORS(fold, *(a))(a, sums)
#define fastce_fold_argmax(x, row_max, base, group_step, lane_step, first)               \
    FASTCE_OF_VECTORS(fold_argmax, *(x))(x, row_max, base, group_step, lane_step, first)
#define fastce_fold_max_and_w(x, w, row_max, w_at_max) FASTCE_OF_VECTORS(fold_max_and_w, *(x))(x, w, row_max, w_at_max)
#define fastce_fold_moment(e, w, w_at_max, sums) FASTCE_OF_VECTORS(fold_moment, *(e))(e, w, w_at_max, sums)
#define fastce_product(a, b, out) FASTCE_OF_VECTORS(product, *(a))(a, b, out)
#define fastce_scale_exp(e, alpha, out) FASTCE_OF_VECTORS(scale_exp, *(e))(e, alpha, out)
#define fastce_write_gradient(e, alpha, beta, w, gamma, t, out)               \
    FASTCE_OF_VECTORS(write_gradient, *(e))(e, alpha, beta, w, gamma, t, out)

#elif defined(REAL)

/* ---- copies ---- */

FASTCE_INLINE void F(fill_range)(REAL* tile, ptrdiff_t start, ptrdiff_t stop, REAL value) {
    for (ptrdiff_t j = start; j < stop; j++) tile[j] = value;
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

/* ---- exponentials and sums; e is exp(scale * (x - row_max)) * EXP_UNIT, and the largest term is exactly EXP_UNIT ---- */

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

/* a * d, where nothing of an infinite d is nothing. */
FASTCE_INLINE VEC F(times)(VEC a, VEC d) { return F(keep)(F(differs)(a, F(fill)(0)), a * d); }

/* Writes the exponentials of n vectors, 4, 2 or 1, `pitch` numbers apart, and adds them to sums that are not NULL: to
   `rest` without the terms that are 1, to `ed` times d, see FASTCE_D_UNIT. Lanes before `first` are in the sums already.
   */
FASTCE_INLINE void F(exp_some)(const VEC* x, int n, int first, VEC row_max, REAL scale, REAL* e, ptrdiff_t pitch,
    VEC* all, VEC* rest, VEC shift, REAL* ed) {
    const VEC zero = F(fill)(0);
    VEC y[4], z[4];
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) y[g] = F(exp_of)(x[g], row_max, scale);
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) F(store)(e + g * pitch, y[g]);
    if (first > 0) y[0] = F(from_lane)(0, first, y[0], zero);
    if (all != NULL) *all = *all + F(total)(y, n);
    if (rest != NULL) {
        FASTCE_UNROLL
        for (int g = 0; g < n; g++) z[g] = F(unless_largest)(y[g]);
        *rest = *rest + F(total)(z, n);
    }
    if (ed != NULL) {
        FASTCE_UNROLL
        for (int g = 0; g < n; g++) z[g] = F(times)(y[g], x[g] * (REAL)FASTCE_D_UNIT - shift);
        F(add_to)(ed, F(total)(z, n));
    }
}

/* The same for groups of 16 lanes, to sums in memory. `e` may be `x`. */
FASTCE_INLINE void F(exp_and_fold)(const REAL* x, ptrdiff_t pitch, int n_groups, const REAL* row_max, REAL scale,
    REAL* e, ptrdiff_t e_pitch, REAL* all, REAL* rest) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC y[4], a = F(fill)(0), r = F(fill)(0);
        FASTCE_UNROLL
        for (int g = 0; g < n_groups; g++) y[g] = F(load)(x + g * pitch + j);
        F(exp_some)(y, n_groups, 0, F(load)(row_max + j), scale, e + j, e_pitch, all == NULL ? NULL : &a,
            rest == NULL ? NULL : &r, a, NULL);
        if (all != NULL) F(add_to)(all + j, a);
        if (rest != NULL) F(add_to)(rest + j, r);
    }
}

FASTCE_INLINE void F(fold)(const REAL* a, REAL* sums) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC y[4];
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) y[g] = F(load)(a + 16 * g + j);
        F(add_to)(sums + j, F(total)(y, 4));
    }
}

/* The sum of 16 lanes in double, halves added to each other. */
FASTCE_INLINE double F(lane_sum)(const REAL* lanes) {
    double wide[16];
    F(widen)(lanes, wide);
    return fastce_wide_lane_sum(wide);
}

FASTCE_INLINE void F(product)(const REAL* a, const REAL* b, REAL* out) {
    for (int j = 0; j < 64; j += WIDTH) F(store)(out + j, F(load)(a + j) * F(load)(b + j));
}

/* Adds what label smoothing and class probabilities ask for of n vectors, 4 or 1, to sums of 16 lanes each. Without
   weights, w are 1; without probabilities t is not looked at. */
FASTCE_INLINE void F(sum_some)(const VEC* x, const VEC* w, const VEC* t, int n, VEC shift, int has_t, int has_zeros,
    const fastce_asked_sums* asked, REAL* sums) {
    VEC d[4], wt[4], y[4];
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) d[g] = x[g] * (REAL)FASTCE_D_UNIT - shift;
    if (asked->w_d) {
        FASTCE_UNROLL
        for (int g = 0; g < n; g++)
            y[g] = has_zeros || asked->has_zero_w ? F(times)(w[g], d[g]) : asked->has_w ? w[g] * d[g] : d[g];
        F(add_to)(sums + 16 * FASTCE_W_D, F(total)(y, n));
    }
    if (!has_t) return;
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) wt[g] = asked->has_w ? w[g] * t[g] : t[g];
    F(add_to)(sums + 16 * FASTCE_WT, F(total)(wt, n));
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) y[g] = F(times)(wt[g], d[g]);
    F(add_to)(sums + 16 * FASTCE_WT_D, F(total)(y, n));
    if (!asked->t_d) return;
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) y[g] = F(times)(t[g], d[g]);
    F(add_to)(sums + 16 * FASTCE_T, F(total)(t, n));
    F(add_to)(sums + 16 * FASTCE_T_D, F(total)(y, n));
}

/* e * (w - w_at_max) */
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

#endif
