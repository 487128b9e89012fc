/* The formulas of a row: from sums over its classes to loss, statistics and gradient. For C and for CUDA.

   With x the logits after scale and softcap, m = max x, and sums over the classes c,

       d_c = x_c - m,  e_c = exp(d_c),  s = sum e_c,  p_c = e_c / s,  lse = m + log s,
       q_c = (1 - eps) w_c t_c + eps / C w_c       the target, for an index t_y = 1 and all others 0
       loss = sum q_c (log s - d_c) + z lse^2
       dloss / dx_k = p_k dloss_dlse - q_k         where dloss_dlse = sum q_c + 2 z lse

   Design
   ------
   1. Sums of exponentials leave out one term: the largest, which is 1, or the target's. So log s =
      log1p(sumexp_excl_max) and 1 - p_k = (sum of the others) / s keep their full relative accuracy however near to 0
      they are.
   2. For all classes at once the gradient is alpha e_k + beta w_k + gamma w_k t_k. That cancels where p_k is near to 1
      and the target is k: there `grad_of_class` is stored over it, at one class of a row, or used for all.
   3. Arithmetic only. exp, log1p and tanh are not the same functions everywhere, so callers pass their values. There is
      no branch, and a choice is a conditional expression between values that exist: loops over rows become vector code.
   4. CUDA has one type per kernel: it defines FC_REAL, and FC_FUNCTION(name) as the name. C gets all functions for
      float and double, with the type in their names, for this file then includes itself. With FC_VECTORS, FC_REAL is a
      vector: the functions in which there is a choice, or a call of one, are left out, for C has none for vectors. */
#ifndef FC_REAL
#ifndef FASTCE_FORMULA_H
#define FASTCE_FORMULA_H

#if defined(FC_INLINE)
#elif defined(_MSC_VER)
#define FC_INLINE static __forceinline
#elif defined(__GNUC__)
#define FC_INLINE static inline __attribute__((always_inline, unused))
#else
#define FC_INLINE static inline
#endif

#define FC_REAL float
#define FC_FUNCTION(name) fastce_##name##_float
#include "formula.h"
#undef FC_FUNCTION
#undef FC_REAL

#define FC_REAL double
#define FC_FUNCTION(name) fastce_##name##_double
#include "formula.h"
#undef FC_FUNCTION
#undef FC_REAL

#endif
#else

/* ---- sums ---- */

/* 0, or NaN where x is infinite or NaN: added to what must be NaN then. */
FC_INLINE FC_REAL FC_FUNCTION(nan_unless_finite)(FC_REAL x) { return x - x; }

/* From the sum of all terms but `left_out` to that of all but `now`: the difference comes first, for it may be 0. */
FC_INLINE FC_REAL FC_FUNCTION(sumexp_excl)(FC_REAL sumexp, FC_REAL left_out, FC_REAL now) {
    return sumexp + (left_out - now);
}

#ifndef FC_VECTORS
/* a * d, where nothing of an infinite d is nothing. */
FC_INLINE FC_REAL FC_FUNCTION(times)(FC_REAL a, FC_REAL d) { return a == 0 ? (FC_REAL)0 : a * d; }

/* sum a d, from that relative to a maximum to that relative to another, from which the former is `shift` away. */
FC_INLINE FC_REAL FC_FUNCTION(shift_sum)(FC_REAL sum_ad, FC_REAL sum_a, FC_REAL shift) {
    return sum_ad + FC_FUNCTION(times)(sum_a, shift);
}

/* sum e d, moved in the same way; `factor` is exp(shift). */
FC_INLINE FC_REAL FC_FUNCTION(shift_exp_sum)(FC_REAL sum_ed, FC_REAL sumexp, FC_REAL shift, FC_REAL factor) {
    return FC_FUNCTION(times)(factor, FC_FUNCTION(shift_sum)(sum_ed, sumexp, shift));
}
#endif

/* q from w t and w: of a class, of all classes, or of some. */
FC_INLINE FC_REAL FC_FUNCTION(smooth)(FC_REAL one_minus_eps, FC_REAL wt, FC_REAL eps_over_c, FC_REAL w) {
    return one_minus_eps * wt + eps_over_c * w;
}

/* ---- loss and statistics ---- */

FC_INLINE FC_REAL FC_FUNCTION(row_lse)(FC_REAL row_max, FC_REAL log_sumexp) { return row_max + log_sumexp; }

/* The loss from sum q and sum q d, but for the z-loss. */
FC_INLINE FC_REAL FC_FUNCTION(row_loss)(FC_REAL sum_q, FC_REAL sum_qd, FC_REAL log_sumexp) {
    return sum_q * log_sumexp - sum_qd;
}

/* sum t log p from sum t and sum t d. */
FC_INLINE FC_REAL FC_FUNCTION(row_log_prob)(FC_REAL sum_t, FC_REAL sum_td, FC_REAL log_sumexp) {
    return sum_td - sum_t * log_sumexp;
}

FC_INLINE FC_REAL FC_FUNCTION(row_entropy)(FC_REAL sum_ed, FC_REAL inverse_sumexp, FC_REAL log_sumexp) {
    return log_sumexp - sum_ed * inverse_sumexp;
}

#ifndef FC_VECTORS
/* The z-loss of a row, and its derivative by lse. Without one an infinite lse does no harm. */
FC_INLINE FC_REAL FC_FUNCTION(z_loss_term)(FC_REAL z, FC_REAL lse) { return z == 0 ? (FC_REAL)0 : z * lse * lse; }
FC_INLINE FC_REAL FC_FUNCTION(z_loss_slope)(FC_REAL z, FC_REAL lse) { return z == 0 ? (FC_REAL)0 : 2 * z * lse; }
#endif

/* ---- gradient; `upstream` is what all of a row's is multiplied by ---- */

FC_INLINE FC_REAL FC_FUNCTION(grad_alpha)(FC_REAL upstream, FC_REAL dloss_dlse, FC_REAL inverse_sumexp) {
    return upstream * dloss_dlse * inverse_sumexp;
}
FC_INLINE FC_REAL FC_FUNCTION(grad_beta)(FC_REAL upstream, FC_REAL eps_over_c) { return -upstream * eps_over_c; }
FC_INLINE FC_REAL FC_FUNCTION(grad_gamma)(FC_REAL upstream, FC_REAL one_minus_eps) { return -upstream * one_minus_eps; }

/* p dloss_dlse - q where dloss_dlse is q: an index without label smoothing and z-loss. */
FC_INLINE FC_REAL FC_FUNCTION(grad_of_only_class)(FC_REAL one_minus_p, FC_REAL q) { return -one_minus_p * q; }
/* p dloss_dlse - q without cancellation, from dloss_dlse - q. From e and s - e instead of p and 1 - p it is s times
   that. */
FC_INLINE FC_REAL FC_FUNCTION(grad_of_class)(FC_REAL p, FC_REAL one_minus_p, FC_REAL q, FC_REAL dloss_dlse_less_q) {
    return p * dloss_dlse_less_q + FC_FUNCTION(grad_of_only_class)(one_minus_p, q);
}

/* ---- softcap: f(x) = cap tanh(u) with u = logit_scale x / cap ---- */

/* The slope 1 - tanh(u)^2 without that difference, from e = exp(-2 |u|); a macro for vectors. */
#ifndef FC_SOFTCAP_SLOPE
#define FC_SOFTCAP_SLOPE(e) (4 * (e) / ((1 + (e)) * (1 + (e))))
#endif
FC_INLINE FC_REAL FC_FUNCTION(softcap_slope)(FC_REAL e) { return FC_SOFTCAP_SLOPE(e); }

#ifndef FC_VECTORS
/* From which |u| on downwards tanh(u) is u, and the slope 1, to rounding: u^2 / 3 is less than half a unit in the last
   place. */
FC_INLINE FC_REAL FC_FUNCTION(softcap_identity)(void) {
    return sizeof(FC_REAL) == 8 ? (FC_REAL)7.450580596923828e-9 /* 2^-27 */ : (FC_REAL)2.44140625e-4 /* 2^-12 */;
}

/* The scales of f(x) = scale * tanh(cap_factor * x), or of f(x) = scale * x where `cap_factor` is 0: without a softcap
   (0), and where it is the identity for all finite x. A factor inside tanh that is below the least normal number is
   rounded to few digits, for which the factor outside makes up: where such a factor gives differences that matter, tanh
   is about linear. */
FC_INLINE void FC_FUNCTION(softcap_scales)(
        double logit_scale, double softcap, double least_normal, double largest, double* scale, double* cap_factor) {
    const double factor = softcap == 0 ? 0 : logit_scale / softcap;
    const int has_cap = factor * largest >= (double)FC_FUNCTION(softcap_identity)();
    *cap_factor = has_cap ? (double)(FC_REAL)factor : 0;
    *scale = !has_cap ? logit_scale : factor >= least_normal ? softcap : logit_scale / *cap_factor;
}
#endif

#endif
