/* The loops of the curvature kernel over n numbers, of one row or of 16 rows side by side.

   16 numbers at a time have factors of their own: those of 16 rows, or the same ones for all classes of a row. So one
   loop does both. Loads come before stores, for a result may take the place of an operand. */
#ifndef FASTCE_CURVATURE_H
#define FASTCE_CURVATURE_H

#include <string.h>

#include "simd/math.h"
#include "simd/prefetch.h"
#include "simd/simd.h"
#include "simd/sums.h"

/* What is multiplied or added in 16 lanes each, for a product; for a diagonal. */
enum {
    FASTCE_FIRST,                    /* of w - w_at_max, at most 1; of e (1 - e / s), with s the sum of all e */
    FASTCE_OTHER,                    /* what is added to that; of e^2 */
    FASTCE_W_AT_MAX,                 /* w of the largest logit */
    FASTCE_LAST,                     /* of a product: of e */
    FASTCE_UNSCALE,                  /* of a product: undoes the scale of w */
    FASTCE_AT_MAX = FASTCE_LAST,     /* of a diagonal: FIRST times 1 - e / s for the largest e */
    FASTCE_INVERSE = FASTCE_UNSCALE, /* of a diagonal: 1 / s */
    FASTCE_N_FACTORS
};

#define FASTCE_TEMPLATE "simd/curvature.h"
#include "simd/for_types.h"

#define fastce_sum_moment(e, w, n, w_at_max, ahead, sums)               \
    FASTCE_OF_VECTORS(sum_moment, *(e))(e, w, n, w_at_max, ahead, sums)
#define fastce_find_slopes(x, n, factor, slopes) FASTCE_OF_VECTORS(find_slopes, *(slopes))(x, n, factor, slopes)
#define fastce_multiply_by(a, b, n, scale, out) FASTCE_OF_VECTORS(multiply_by, *(out))(a, b, n, scale, out)
#define fastce_write_product(e, w, n, factors, is_scaled, out)                 \
    FASTCE_OF_VECTORS(write_product, *(out))(e, w, n, factors, is_scaled, out)
#define fastce_write_diagonal(e, n, factors, least, out)                 \
    FASTCE_OF_VECTORS(write_diagonal, *(out))(e, n, factors, least, out)
#define fastce_write_absolute(grad, n, least, out) FASTCE_OF_VECTORS(write_absolute, *(out))(grad, n, least, out)
#define fastce_write_bent(y, slopes, u, grad, v, n, bend, least, out)                 \
    FASTCE_OF_VECTORS(write_bent, *(out))(y, slopes, u, grad, v, n, bend, least, out)

#elif defined(REAL)

/* n < 16 numbers, zeros behind. */
FASTCE_INLINE const REAL* F(padded)(const REAL* x, ptrdiff_t n, REAL* lanes) {
    if (x == NULL) return NULL;
    for (int j = 0; j < 16; j++) lanes[j] = 0;
    memcpy(lanes, x, n * sizeof(REAL));
    return lanes;
}

/* Adds e (w - w_at_max) to the sums of 16 lanes; asks for what lies as far behind `ahead`. */
FASTCE_NOINLINE void F(sum_moment)(
    const REAL* e, const REAL* w, ptrdiff_t n, const REAL* w_at_max, const char* ahead, double* sums) {
    VEC s[16 / WIDTH], y[4];
    REAL lanes[16];
    ptrdiff_t k;
    for (int j = 0; j < 16 / WIDTH; j++) s[j] = F(fill)(0);
    for (k = 0; k + 64 <= n; k += 64) {
        for (int j = 0; j < 64 * (int)sizeof(REAL); j += 64) FASTCE_PREFETCH_L2(ahead + k * sizeof(REAL) + j);
        for (int j = 0; j < 16; j += WIDTH) {
            FASTCE_UNROLL
            for (int g = 0; g < 4; g++)
                y[g] = F(load)(e + k + 16 * g + j) * (F(load)(w + k + 16 * g + j) - F(load)(w_at_max + j));
            s[j / WIDTH] = s[j / WIDTH] + F(total)(y, 4);
        }
    }
    for (; k + 16 <= n; k += 16)
        for (int j = 0; j < 16; j += WIDTH)
            s[j / WIDTH] = s[j / WIDTH] + F(load)(e + k + j) * (F(load)(w + k + j) - F(load)(w_at_max + j));
    for (int j = 0; j < 16; j += WIDTH) F(store)(lanes + j, s[j / WIDTH]);
    for (int j = 0; j < 16; j++) sums[j] += lanes[j];
    for (; k < n; k++) sums[k % 16] += e[k] * (w[k] - w_at_max[k % 16]);
}

/* ---- number by number ---- */

/* 1 - tanh(x * factor)^2 */
FASTCE_INLINE void F(slopes_of)(const REAL* x, REAL factor, REAL* slopes) {
    for (int j = 0; j < 16; j += WIDTH) F(store)(slopes + j, F(sech2)(F(load)(x + j) * factor));
}

FASTCE_NOINLINE void F(find_slopes)(const REAL* x, ptrdiff_t n, REAL factor, REAL* slopes) {
    REAL some_x[16], some[16];
    ptrdiff_t k;
    for (k = 0; k + 16 <= n; k += 16) F(slopes_of)(x + k, factor, slopes + k);
    if (k == n) return;
    F(slopes_of)(F(padded)(x + k, n - k, some_x), factor, some);
    memcpy(slopes + k, some, (n - k) * sizeof(REAL));
}

/* a b scale, with b = 1 if it is NULL. */
FASTCE_INLINE void F(products_of)(const REAL* a, const REAL* b, const REAL* scale, REAL* out) {
    for (int j = 0; j < 16; j += WIDTH) {
        const VEC y = b == NULL ? F(load)(a + j) : F(load)(a + j) * F(load)(b + j);
        F(store)(out + j, y * F(load)(scale + j));
    }
}

FASTCE_NOINLINE void F(multiply_by)(const REAL* a, const REAL* b, ptrdiff_t n, const REAL* scale, REAL* out) {
    REAL some_a[16], some_b[16], some[16];
    ptrdiff_t k;
    for (k = 0; k + 16 <= n; k += 16) F(products_of)(a + k, b == NULL ? NULL : b + k, scale, out + k);
    if (k == n) return;
    F(products_of)(F(padded)(a + k, n - k, some_a), F(padded)(b == NULL ? NULL : b + k, n - k, some_b), scale, some);
    memcpy(out + k, some, (n - k) * sizeof(REAL));
}

/* The product of the Hessian and v, but for what a softcap makes of it. */
FASTCE_INLINE void F(product_of)(const REAL* e, const REAL* w, const REAL* f, int is_scaled, REAL* out) {
    for (int j = 0; j < 16; j += WIDTH) {
        const VEC d = F(load)(w + j) - F(load)(f + 16 * FASTCE_W_AT_MAX + j);
        const VEC y = F(load)(e + j) * F(load)(f + 16 * FASTCE_LAST + j) *
                      (F(load)(f + 16 * FASTCE_FIRST + j) * d + F(load)(f + 16 * FASTCE_OTHER + j));
        F(store)(out + j, is_scaled ? y * F(load)(f + 16 * FASTCE_UNSCALE + j) : y);
    }
}

FASTCE_NOINLINE void F(write_product)(
    const REAL* e, const REAL* w, ptrdiff_t n, const REAL* f, int is_scaled, REAL* out) {
    REAL some_e[16], some_w[16], some[16];
    ptrdiff_t k = 0;
    if (is_scaled)
        for (; k + 16 <= n; k += 16) F(product_of)(e + k, w + k, f, 1, out + k);
    else
        for (; k + 16 <= n; k += 16) F(product_of)(e + k, w + k, f, 0, out + k);
    if (k == n) return;
    F(product_of)(F(padded)(e + k, n - k, some_e), F(padded)(w + k, n - k, some_w), f, is_scaled, some);
    memcpy(out + k, some, (n - k) * sizeof(REAL));
}

/* x, or `least` where it is less; NaN stays. */
FASTCE_INLINE VEC F(at_least)(VEC x, VEC least) { return F(select)(F(is_greater)(least, x), least, x); }

/* The diagonal, but for what a softcap makes of it. */
FASTCE_INLINE void F(diagonal_of)(const REAL* e, const REAL* f, REAL least, REAL* out) {
    for (int j = 0; j < 16; j += WIDTH) {
        const VEC p = F(load_freed)(e + j), one = F(fill)(1);
        const VEC other = F(load)(f + 16 * FASTCE_FIRST + j) * (1 - p * F(load)(f + 16 * FASTCE_INVERSE + j));
        const VEC value = F(select)(F(differs)(p, one), other, F(load)(f + 16 * FASTCE_AT_MAX + j));
        F(store)(out + j, F(at_least)(p * (value + F(load)(f + 16 * FASTCE_OTHER + j) * p), F(fill)(least)));
    }
}

FASTCE_NOINLINE void F(write_diagonal)(const REAL* e, ptrdiff_t n, const REAL* f, REAL least, REAL* out) {
    REAL some_e[16], some[16];
    ptrdiff_t k;
    for (k = 0; k + 16 <= n; k += 16) F(diagonal_of)(e + k, f, least, out + k);
    if (k == n) return;
    F(diagonal_of)(F(padded)(e + k, n - k, some_e), f, least, some);
    memcpy(out + k, some, (n - k) * sizeof(REAL));
}

/* The absolute values of the gradient as the diagonal. */
FASTCE_NOINLINE void F(write_absolute)(const REAL* grad, ptrdiff_t n, REAL least, REAL* out) {
    for (ptrdiff_t j = 0; j < n; j++) {
        const REAL y = grad[j] < 0 ? -grad[j] : grad[j];
        out[j] = y < least ? least : y;
    }
}

/* What a softcap makes of a product, y slope + bend u grad v, and of a diagonal, where v is NULL: y slope^2 + bend u
   grad, or without the latter if bend is 0. */
FASTCE_INLINE void F(bent_of)(const REAL* y, const REAL* slopes, const REAL* u, const REAL* grad, const REAL* v,
    REAL bend, REAL least, REAL* out) {
    for (int j = 0; j < 16; j += WIDTH) {
        const VEC s = F(load)(slopes + j), last = v == NULL ? s : F(load)(v + j);
        const VEC straight = v == NULL ? F(load)(y + j) * s * s : F(load)(y + j) * s;
        const VEC bent = bend * F(load)(u + j) * F(load)(grad + j);
        const VEC sum = bend == 0 ? straight : straight + (v == NULL ? bent : bent * last);
        F(store)(out + j, v == NULL ? F(at_least)(sum, F(fill)(least)) : sum);
    }
}

FASTCE_NOINLINE void F(write_bent)(const REAL* y, const REAL* slopes, const REAL* u, const REAL* grad, const REAL* v,
    ptrdiff_t n, REAL bend, REAL least, REAL* out) {
    REAL some_y[16], some_s[16], some_u[16], some_g[16], some_v[16], some[16];
    ptrdiff_t k;
    for (k = 0; k + 16 <= n; k += 16)
        F(bent_of)(y + k, slopes + k, u + k, grad + k, v == NULL ? NULL : v + k, bend, least, out + k);
    if (k == n) return;
    F(bent_of)(F(padded)(y + k, n - k, some_y), F(padded)(slopes + k, n - k, some_s), F(padded)(u + k, n - k, some_u),
        F(padded)(grad + k, n - k, some_g), F(padded)(v == NULL ? NULL : v + k, n - k, some_v), bend, least, some);
    memcpy(out + k, some, (n - k) * sizeof(REAL));
}

#endif
