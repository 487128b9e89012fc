/* The loops over a block of classes: of one row, where they lie side by side, or of 16 rows, where class k has the numbers
   16 k to 16 k + 15. What differs between those is a constant, `by_rows`.

   Design
   ------
   1. Either way number i belongs to lane i % 16. Lanes are partial sums of a row, or the rows. So one loop does both:
      what is the same for all classes has 16 lanes and stays in registers.
   2. The exponentials of one row, where most time goes, have a loop of their own: see `row_sweep.h`. */
#ifndef FASTCE_BLOCK_H
#define FASTCE_BLOCK_H

#include <math.h>

#include "simd/convert.h"
#include "simd/math.h"
#include "simd/prefetch.h"
#include "simd/row_sweep.h"
#include "simd/simd.h"
#include "simd/sums.h"

#define FASTCE_TEMPLATE "simd/block.h"
#include "simd/for_types.h"

#define fastce_lane_maxima(x, n, row_max) FASTCE_OF_VECTORS(lane_maxima, *(x))(x, n, row_max)
#define fastce_find_in_lanes(x, n, values, found) FASTCE_OF_VECTORS(find_in_lanes, *(x))(x, n, values, found)
#define fastce_sum_exps(block, row_max, scale) FASTCE_OF_VECTORS(sum_exps, *(row_max))(block, row_max, scale)
#define fastce_sum_targets(block, row_max) FASTCE_OF_VECTORS(sum_targets, *(row_max))(block, row_max)
#define fastce_cap(x, n, factor, out) FASTCE_OF_VECTORS(cap, *(out))(x, n, factor, out)
#define fastce_multiply_slopes(g, n, x, factor, out) FASTCE_OF_VECTORS(multiply_slopes, *(out))(g, n, x, factor, out)
#define fastce_write_gradient(by_rows, e, n, alpha, beta, w, gamma, t)               \
    FASTCE_OF_VECTORS(write_gradient, *(e))(by_rows, e, n, alpha, beta, w, gamma, t)
#define fastce_write_log(x, n, row_max, scale, log_sum, out)                 \
    FASTCE_OF_VECTORS(write_log, *(out))(x, n, row_max, scale, log_sum, out)

#elif defined(REAL)

enum { F(vectors) = 16 / WIDTH }; /* of 16 lanes */
#define VECTORS F(vectors)

/* ---- loads ---- */

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
FASTCE_INLINE void F(load_groups)(const REAL* x, ptrdiff_t k, VEC* groups) {
    FASTCE_UNROLL
    for (int g = 0; g < 4; g++) groups[g] = F(load)(x + k + 16 * g);
}

/* ---- maxima ---- */

/* The maximum of each of 16 rows; NaN is left out. */
FASTCE_NOINLINE void F(lane_maxima)(const REAL* x, ptrdiff_t n, REAL* row_max) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC m[4], y[4];
        ptrdiff_t k;
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) m[g] = F(fill)(-INFINITY);
        for (k = 0; k + 64 <= n; k += 64) {
            F(load_groups)(x, k + j, y);
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

/* ---- exponentials and sums of 16 rows; e is exp(scale * (x - row_max)) * EXP_UNIT ---- */

/* Of n vectors, 4 or 1, 16 numbers apart: writes exponentials, and adds them to `all`, to `excl_max` without the terms
   that are 1, and, if asked, times d to `ed`. */
FASTCE_INLINE void F(exp_groups)(
    const VEC* x, int n, VEC half_max, REAL half, REAL scale, REAL* e, VEC* all, VEC* excl_max, REAL* ed) {
    VEC d[4], y[4], z[4];
    F(exps)(x, n, half_max, half, scale, d, y);
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) F(store)(e + 16 * g, y[g]);
    *all = *all + F(total)(y, n);
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) z[g] = F(unless_largest)(y[g]);
    *excl_max = *excl_max + F(total)(z, n);
    if (ed == NULL) return;
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) z[g] = F(times)(y[g], d[g]);
    F(add_to)(ed, F(total)(z, n));
}

FASTCE_INLINE void F(sum_lanes_of)(int sums_entropy, fastce_block* b, const REAL* row_max, REAL scale) {
    VEC m[VECTORS], all[VECTORS], excl_max[VECTORS], x[4];
    REAL lanes[16], sums[16];
    /* Copies, for compilers must assume that stores to e change the block. */
    const REAL* const given = (const REAL*)b->x;
    REAL* const e = (REAL*)b->e;
    const REAL half = F(half)(scale);
    const ptrdiff_t n = b->n;
    ptrdiff_t k;
    F(load_lanes)(0, row_max, m);
    for (int j = 0; j < 16; j++) sums[j] = 0;
    for (int v = 0; v < VECTORS; v++) {
        m[v] = m[v] * half;
        all[v] = excl_max[v] = F(fill)(0);
    }
    for (k = 0; k + 64 <= n; k += 64)
        for (int j = 0, v = 0; j < 16; j += WIDTH, v++) {
            F(load_groups)(given, k + j, x);
            F(exp_groups)(x, 4, m[v], half, scale, e + k + j, &all[v], &excl_max[v], sums_entropy ? sums + j : NULL);
        }
    for (; k < n; k += 16)
        for (int j = 0, v = 0; j < 16; j += WIDTH, v++) {
            x[0] = F(load)(given + k + j);
            F(exp_groups)(x, 1, m[v], half, scale, e + k + j, &all[v], &excl_max[v], sums_entropy ? sums + j : NULL);
        }
    F(store_lanes)(all, lanes);
    F(widen)(lanes, b->sums[FASTCE_ALL]);
    F(store_lanes)(excl_max, lanes);
    F(widen)(lanes, b->sums[FASTCE_EXCL_MAX]);
    if (sums_entropy) F(widen)(sums, b->sums[FASTCE_E_D]);
}

/* Constants again, see `row_sweep.h`. */
FASTCE_NOINLINE void F(sum_lanes_plain)(fastce_block* b, const REAL* row_max) { F(sum_lanes_of)(0, b, row_max, 1); }
FASTCE_NOINLINE void F(sum_lanes_scaled)(fastce_block* b, const REAL* row_max, REAL scale) {
    F(sum_lanes_of)(0, b, row_max, scale);
}
FASTCE_NOINLINE void F(sum_lanes_entropy)(fastce_block* b, const REAL* row_max, REAL scale) {
    F(sum_lanes_of)(1, b, row_max, scale);
}

/* Sums up the exponentials of a block, and leaves them in e. */
FASTCE_INLINE void F(sum_exps)(fastce_block* b, const REAL* row_max, REAL scale) {
    if (b->by_rows)
        F(sweep)(b, row_max[0], scale);
    else if (b->sums_entropy)
        F(sum_lanes_entropy)(b, row_max, scale);
    else if (scale == 1)
        F(sum_lanes_plain)(b, row_max);
    else
        F(sum_lanes_scaled)(b, row_max, scale);
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
            for (int j = 0; j < 64 * (int)sizeof(REAL); j += 64) {
                FASTCE_PREFETCH_L1((const char*)(t + k) + 2048 + j);
                FASTCE_PREFETCH_L2(ahead_t + k * size + j);
            }
        for (int j = 0, v = 0; j < 16; j += WIDTH, v++) {
            F(load_groups)(given, k + j, x);
            F(load_weights)(by_rows, w, k + j, 4, w_some);
            if (t != NULL) F(load_groups)(t, k + j, t_some);
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
