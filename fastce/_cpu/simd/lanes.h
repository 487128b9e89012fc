/* The loops over a block of classes of 16 rows side by side: class k has the numbers 16 k to 16 k + 15.

   What differs between rows has 16 lanes, and stays in registers through a loop. The classes go 4 at a time, as many
   vectors as hide each other's latency, and the last ones one by one. */
#ifndef FASTCE_LANES_H
#define FASTCE_LANES_H

#include <math.h>

#include "simd/math.h"
#include "simd/simd.h"
#include "simd/sums.h"

#define FASTCE_TEMPLATE "simd/lanes.h"
#include "simd/for_types.h"

#define fastce_find_lane_maxima(x, n, row_max) FASTCE_OF_VECTORS(find_lane_maxima, *(x))(x, n, row_max)
#define fastce_find_in_lanes(x, n, values, found) FASTCE_OF_VECTORS(find_in_lanes, *(x))(x, n, values, found)
#define fastce_sweep_lanes(block, row_max, scale) FASTCE_OF_VECTORS(sweep_lanes, *(row_max))(block, row_max, scale)
#define fastce_sum_targets_in_lanes(block, row_max) FASTCE_OF_VECTORS(sum_targets_in_lanes, *(row_max))(block, row_max)
#define fastce_write_lane_gradients(e, n, alpha, beta, w, gamma, t)               \
    FASTCE_OF_VECTORS(write_lane_gradients, *(e))(e, n, alpha, beta, w, gamma, t)
#define fastce_write_lane_logs(x, n, row_max, scale, log_sum)               \
    FASTCE_OF_VECTORS(write_lane_logs, *(x))(x, n, row_max, scale, log_sum)

#elif defined(REAL)

/* Lane j of 4 classes, or of one. */
FASTCE_INLINE void F(load_classes)(const REAL* x, ptrdiff_t k, int j, int n, VEC* some) {
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) some[g] = F(load)(x + 16 * (k + g) + j);
}

/* The maximum of each row; NaN is left out. */
FASTCE_NOINLINE void F(find_lane_maxima)(const REAL* x, ptrdiff_t n, REAL* row_max) {
    for (int j = 0; j < 16; j += WIDTH) {
        VEC m[4], y[4];
        ptrdiff_t k;
        FASTCE_UNROLL
        for (int g = 0; g < 4; g++) m[g] = F(fill)(-INFINITY);
        for (k = 0; k + 4 <= n; k += 4) {
            F(load_classes)(x, k, j, 4, y);
            FASTCE_UNROLL
            for (int g = 0; g < 4; g++) m[g] = F(max)(y[g], m[g]);
        }
        for (; k < n; k++) {
            F(load_classes)(x, k, j, 1, y);
            m[0] = F(max)(y[0], m[0]);
        }
        F(store)(row_max + j, F(max)(F(max)(m[0], m[1]), F(max)(m[2], m[3])));
    }
}

/* The first class of each row whose number is that row's value, or FASTCE_NO_CLASS. */
FASTCE_NOINLINE void F(find_in_lanes)(const REAL* x, ptrdiff_t n, const REAL* values, int32_t* found) {
    for (int j = 0; j < 16; j++) found[j] = FASTCE_NO_CLASS;
    for (ptrdiff_t k = n - 1; k >= 0; k--)
        for (int j = 0; j < 16; j++) found[j] = x[16 * k + j] == values[j] ? (int32_t)k : found[j];
}

/* ---- sums ---- */

FASTCE_INLINE void F(sweep_lanes_of)(fastce_block* b, const REAL* row_max, REAL scale, int sums_entropy) {
    VEC m[16 / WIDTH], shift[16 / WIDTH], all[16 / WIDTH], rest[16 / WIDTH], x[4];
    REAL lanes[16], sums[16];
    const REAL* const given = (const REAL*)b->x;
    REAL* const e = (REAL*)b->e;
    const ptrdiff_t n = b->n;
    ptrdiff_t k;
    for (int j = 0; j < 16; j++) sums[j] = 0;
    for (int j = 0; j < 16; j += WIDTH) {
        m[j / WIDTH] = F(load)(row_max + j);
        shift[j / WIDTH] = m[j / WIDTH] * (REAL)FASTCE_D_UNIT;
        all[j / WIDTH] = rest[j / WIDTH] = F(fill)(0);
    }
    for (k = 0; k + 4 <= n; k += 4)
        for (int j = 0; j < 16; j += WIDTH) {
            F(load_classes)(given, k, j, 4, x);
            F(exp_some)(x, 4, 0, m[j / WIDTH], scale, e + 16 * k + j, 16, &all[j / WIDTH], &rest[j / WIDTH],
                shift[j / WIDTH], sums_entropy ? sums + j : NULL);
        }
    for (; k < n; k++)
        for (int j = 0; j < 16; j += WIDTH) {
            F(load_classes)(given, k, j, 1, x);
            F(exp_some)(x, 1, 0, m[j / WIDTH], scale, e + 16 * k + j, 16, &all[j / WIDTH], &rest[j / WIDTH],
                shift[j / WIDTH], sums_entropy ? sums + j : NULL);
        }
    for (int j = 0; j < 16; j += WIDTH) F(store)(lanes + j, all[j / WIDTH]);
    F(widen)(lanes, b->sums[FASTCE_ALL]);
    for (int j = 0; j < 16; j += WIDTH) F(store)(lanes + j, rest[j / WIDTH]);
    F(widen)(lanes, b->sums[FASTCE_REST]);
    F(widen)(sums, b->sums[FASTCE_E_D]);
}

FASTCE_NOINLINE void F(sweep_plain_lanes)(fastce_block* b, const REAL* row_max) { F(sweep_lanes_of)(b, row_max, 1, 0); }

FASTCE_NOINLINE void F(sweep_scaled_lanes)(fastce_block* b, const REAL* row_max, REAL scale) {
    F(sweep_lanes_of)(b, row_max, scale, 0);
}

FASTCE_NOINLINE void F(sweep_entropy_lanes)(fastce_block* b, const REAL* row_max, REAL scale) {
    F(sweep_lanes_of)(b, row_max, scale, 1);
}

/* Sums up the exponentials of a block, with and without the terms that are 1, and leaves them in e. */
FASTCE_INLINE void F(sweep_lanes)(fastce_block* b, const REAL* row_max, REAL scale) {
    if (b->sums_entropy)
        F(sweep_entropy_lanes)(b, row_max, scale);
    else if (scale == 1)
        F(sweep_plain_lanes)(b, row_max);
    else
        F(sweep_scaled_lanes)(b, row_max, scale);
}

FASTCE_INLINE void F(sum_lanes_of)(fastce_block* b, const REAL* row_max, const REAL* t, fastce_asked_sums asked) {
    REAL sums[16 * FASTCE_N_SUMS];
    const REAL *const given = (const REAL*)b->x, *const w = (const REAL*)b->w;
    const ptrdiff_t n = b->n;
    for (int j = 0; j < 16 * FASTCE_N_SUMS; j++) sums[j] = 0;
    for (int j = 0; j < 16; j += WIDTH) {
        const VEC shift = F(load)(row_max + j) * (REAL)FASTCE_D_UNIT;
        VEC x[4], some_w[4], some_t[4];
        ptrdiff_t k;
        for (k = 0; k + 4 <= n; k += 4) {
            F(load_classes)(given, k, j, 4, x);
            if (t != NULL) F(load_classes)(t, k, j, 4, some_t);
            FASTCE_UNROLL
            for (int g = 0; g < 4; g++) some_w[g] = F(fill)(w == NULL ? 1 : w[k + g]);
            F(sum_some)(x, some_w, some_t, 4, shift, t != NULL, 0, &asked, sums + j);
        }
        for (; k < n; k++) {
            F(load_classes)(given, k, j, 1, x);
            if (t != NULL) F(load_classes)(t, k, j, 1, some_t);
            some_w[0] = F(fill)(w == NULL ? 1 : w[k]);
            F(sum_some)(x, some_w, some_t, 1, shift, t != NULL, 0, &asked, sums + j);
        }
    }
    for (int j = FASTCE_W_D; j < FASTCE_N_SUMS; j++) F(widen)(sums + 16 * j, b->sums[j]);
}

FASTCE_NOINLINE void F(sum_smoothing_in_lanes)(fastce_block* b, const REAL* row_max) {
    F(sum_lanes_of)(b, row_max, NULL, b->asked);
}

FASTCE_NOINLINE void F(sum_any_in_lanes)(fastce_block* b, const REAL* row_max) {
    F(sum_lanes_of)(b, row_max, (const REAL*)b->t, b->asked);
}

/* Sums up what label smoothing and class probabilities ask for. */
FASTCE_INLINE void F(sum_targets_in_lanes)(fastce_block* b, const REAL* row_max) {
    if (b->t == NULL)
        F(sum_smoothing_in_lanes)(b, row_max);
    else
        F(sum_any_in_lanes)(b, row_max);
}

/* ---- results ---- */

/* alpha e + (beta + gamma t) w over e itself; without t if that is NULL, with w = 1 likewise; alpha e alone if beta is NULL.
   Exponentials are freed of EXP_UNIT before anything else: a tiny factor freed of it would be subnormal. */
FASTCE_INLINE void F(write_lane_gradients_of)(
    REAL* e, ptrdiff_t n, const REAL* alpha, const REAL* beta, const REAL* w, const REAL* gamma, const REAL* t) {
    for (int j = 0; j < 16; j += WIDTH) {
        const VEC a = F(load)(alpha + j), b = beta == NULL ? a : F(load)(beta + j),
                  c = gamma == NULL ? a : F(load)(gamma + j);
        for (ptrdiff_t k = 0; k < n; k++) {
            const VEC p = F(load_freed)(e + 16 * k + j) * a;
            const VEC f = t == NULL ? b : b + c * F(load)(t + 16 * k + j);
            F(store)(e + 16 * k + j, beta == NULL ? p : p + (w == NULL ? f : f * F(fill)(w[k])));
        }
    }
}

FASTCE_NOINLINE void F(write_lane_gradients)(
    REAL* e, ptrdiff_t n, const REAL* alpha, const REAL* beta, const REAL* w, const REAL* gamma, const REAL* t) {
    if (beta == NULL)
        F(write_lane_gradients_of)(e, n, alpha, NULL, NULL, NULL, NULL);
    else if (t == NULL)
        F(write_lane_gradients_of)(e, n, alpha, beta, w, NULL, NULL);
    else
        F(write_lane_gradients_of)(e, n, alpha, beta, w, gamma, t);
}

/* scale * (x - row_max) - log_sum over x itself */
FASTCE_NOINLINE void F(write_lane_logs)(REAL* x, ptrdiff_t n, const REAL* row_max, REAL scale, const REAL* log_sum) {
    for (ptrdiff_t k = 0; k < n; k++)
        for (int j = 0; j < 16; j += WIDTH)
            F(store)(x + 16 * k + j, scale * (F(load)(x + 16 * k + j) - F(load)(row_max + j)) - F(load)(log_sum + j));
}

#endif
