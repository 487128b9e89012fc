/* Sums over a few vectors: what the loops over the classes of one row and of 16 rows share, see block.h.

   Design
   ------
   1. 4 groups of 16 lanes are 64 consecutive classes of one row, or 4 of 16 rows. The groups are added up before
      the sum so far is touched, which keeps the chain through it short: one chain per number was 3 times slower. And
      sums of 16 lanes, partial ones of a row or those of 16 rows, bound the rounding error: n classes are at most n / 64
      additions deep.
   2. Vectors have names. Compilers else store and load them again between exponentials and sums: that took a third of
      the time of floats and half of that of doubles.
   3. What is asked for are constants where a loop is compiled, or tests outside of it. */
#ifndef FASTCE_SUMS_H
#define FASTCE_SUMS_H

#include <math.h>

#include "simd/convert.h"
#include "simd/math.h"
#include "simd/prefetch.h"
#include "simd/simd.h"

#define FASTCE_LANES 16
#define FASTCE_NO_CLASS 0x7FFFFFFF

/* The sum of 16 lanes, halves added to each other: by vectors, where compilers took numbers one by one, which cost 2 ns
   more a row. */
#if FASTCE_VECTOR_BYTES
typedef double fastce_pair __attribute__((vector_size(16)));
FASTCE_INLINE double fastce_wide_lane_sum(const double* lanes) {
    fastce_pair t[8];
    memcpy(t, lanes, sizeof(t));
    for (int n = 4; n > 0; n /= 2)
        for (int j = 0; j < n; j++) t[j] = t[j] + t[j + n];
    return t[0][0] + t[0][1];
}
#else
FASTCE_INLINE double fastce_wide_lane_sum(const double* lanes) {
    double t[8];
    for (int j = 0; j < 8; j++) t[j] = lanes[j] + lanes[j + 8];
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}
#endif

/* Sums over the classes of a row. d is the shifted logit x - row_max, to be multiplied by the logits' scale; sums of it
   are those of d * FASTCE_D_UNIT, so that a block of 3e38 in one lane does not overflow. Times exp(d) it is scaled. */
enum {
    FASTCE_ALL,      /* exp(d) */
    FASTCE_EXCL_MAX, /* exp(d), but for terms that are 1 */
    FASTCE_E_D,      /* exp(d) d */
    FASTCE_W_D,      /* w d */
    FASTCE_WT,       /* w t */
    FASTCE_WT_D,     /* w t d */
    FASTCE_T,        /* t */
    FASTCE_T_D,      /* t d */
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

/* Whether a sum of exponentials times `unit` is less than twice its largest term: only there does 1 - p cancel. */
FASTCE_INLINE int fastce_needs_excl_max(double all_terms, double unit) {
    return (unit <= all_terms) & (all_terms < 2 * unit); /* && would be a jump */
}

/* A block of classes, of one row or of 16 rows side by side, and what is asked of it. */
typedef struct {
    int by_rows;   /* of one row */
    const void* x; /* logits: REAL, or of 16 bits; under a softcap tanh of them */
    ptrdiff_t n;   /* numbers: as many as classes, or 16 times as many */
    void* e;       /* where the exponentials go; may be x */
    const void* w; /* class weights; NULL: all are 1 */
    const void* t; /* class probabilities, or NULL */
    /* of one row: the block that comes next, whose maximum is found meanwhile, and NaN left out; NULL: none */
    const void* next;
    ptrdiff_t n_next;
    double next_max; /* result */
    /* of one row: an earlier block of exponentials, multiplied by its factor meanwhile */
    void* done;
    ptrdiff_t n_done;
    double factor;
    /* of one row: what is asked for meanwhile, numbers of so many bytes */
    const char* ahead_l1;
    const char* ahead_l2;
    ptrdiff_t ahead_size;
    const char* ahead_t;
    ptrdiff_t ahead_t_size;
    double sums[FASTCE_N_SUMS][FASTCE_LANES]; /* result; of one row in the first lane */
    fastce_format format;                     /* of x */
    fastce_asked_sums asked;
    int sums_entropy; /* E_D */
} fastce_block;

#define FASTCE_TEMPLATE "simd/sums.h"
#include "simd/for_types.h"

#define fastce_fill_range(x, start, stop, value) FASTCE_OF_VECTORS(fill_range, *(x))(x, start, stop, value)
#define fastce_widen(lanes, wide) FASTCE_OF_VECTORS(widen, *(lanes))(lanes, wide)
#define fastce_narrow(wide, lanes) FASTCE_OF_VECTORS(narrow, *(lanes))(wide, lanes)

#elif defined(REAL)

/* ---- copies ---- */

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

FASTCE_INLINE void F(fill_range)(REAL* x, ptrdiff_t start, ptrdiff_t stop, REAL value) {
    for (ptrdiff_t j = start; j < stop; j++) x[j] = value;
}

FASTCE_INLINE void F(widen)(const REAL* lanes, double* wide) {
    for (int j = 0; j < 16; j++) wide[j] = lanes[j];
}

FASTCE_INLINE void F(narrow)(const double* wide, REAL* lanes) {
    for (int j = 0; j < 16; j++) lanes[j] = (REAL)wide[j];
}

/* ---- exponentials and sums; e is exp(scale * (x - row_max)) * EXP_UNIT, and the largest term is exactly EXP_UNIT ---- */

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

/* The exponentials y of n vectors, 4, 2 or 1, and the scaled d. The maximum comes times `half`, see `difference`. */
FASTCE_INLINE void F(exps)(const VEC* x, int n, VEC half_max, REAL half, REAL scale, VEC* d, VEC* y) {
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) {
        d[g] = (scale / half) * (half * x[g] - half_max);
        y[g] = F(exp)(d[g]);
    }
}

/* The sum of 16 lanes in double, halves added to each other. */
FASTCE_INLINE double F(lane_sum)(const REAL* lanes) {
    double wide[16];
    F(widen)(lanes, wide);
    return fastce_wide_lane_sum(wide);
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

/* Exponentials freed of EXP_UNIT. Before anything else is multiplied: a tiny factor freed of it would be subnormal. */
FASTCE_INLINE VEC F(load_freed)(const REAL* e) { return F(load)(e) * (1 / EXP_UNIT); }

#endif
