/* The scalars of rows in the kernels of few classes, as vectors of the logits' own type. Nothing is divided that need
   not be. */
#ifndef FASTCE_FEW_SCALARS_H
#define FASTCE_FEW_SCALARS_H

#include "formula.h"
#include "simd/math.h"
#include "simd/simd.h"

#define FASTCE_TEMPLATE "simd/few_scalars.h"
#include "simd/for_types.h"

#elif defined(REAL)

#define FC_VECTORS
#define FC_REAL VEC
#define FC_FUNCTION F
#include "formula.h"
#undef FC_FUNCTION
#undef FC_REAL
#undef FC_VECTORS

/* 1 / x within 1 ulp for normal numbers. */
FASTCE_INLINE VEC F(inverse)(VEC x) {
#if IS_FLOAT && FASTCE_VECTOR_BYTES == 64
    /* An estimate of 14 bits and one step of Newton's keep Zen 4 busy for three cycles, a division for ten. */
    const VEC r = _mm512_rcp14_ps(x);
    return (1 - x * r) * r + r;
#else
    return 1 / x;
#endif
}

/* The gradient of the target's class, from the sum of the other terms, times EXP_UNIT: tiny ones are no normal numbers
   without. That sum is divided by the whole, so that 1 - p is 1 exactly where p is 0. */
FASTCE_INLINE VEC F(gradient_of_target)(VEC excl_target, VEC whole, VEC inverse, VEC factor) {
#if FASTCE_HAS_FMA
    /* The remainder corrects the product with the inverse. */
    const VEC p = excl_target * inverse;
    return F(grad_of_only_class)(p + F(fma)(-p, whole, excl_target) * inverse, factor);
#else
    (void)inverse;
    return F(grad_of_only_class)(excl_target / whole, factor);
#endif
}

/* The loss of rows from the target's distance from the largest logit, the sum of all terms but the largest, and the
   inverse of the sum of all. */
FASTCE_INLINE VEC F(loss)(VEC d, VEC excl_max, VEC inverse) {
    VEC k, f, lost;
    F(split_log1p)(excl_max, inverse, &k, &f, &lost);
    return F(row_loss)(F(fill)(1), d, F(join_log1p)(k, f, f * F(inverse)(2 + f), lost));
}

/* log(1 + x) for 0 <= x <= 1; `inverse` is 1 / (2 + x). */
FASTCE_INLINE VEC F(log1p_of_fraction)(VEC x, VEC inverse) {
    /* As in `join_log1p`; error 2e-10 and 2e-18 */
    const VEC s = x * inverse, z = s * s, h = (REAL)0.5 * x * x;
    VEC p;
#if IS_FLOAT
    p = z * 0.23224329224233348832f + 0.21706575800880372646f;
    p = p * z + 0.28592357994302837723f;
    p = p * z + 0.39999706331929717402f;
    p = p * z + 0.66666667320527412469f;
#else
    p = z * 0.16164045611943532221 + 0.088007384861446738822;
    p = p * z + 0.12001072809590712535;
    p = p * z + 0.1331414420965493615;
    p = p * z + 0.15385570064958623103;
    p = p * z + 0.18181789436132858169;
    p = p * z + 0.22222222717427862989;
    p = p * z + 0.28571428567108757162;
    p = p * z + 0.40000000000014582673;
    p = p * z + 0.66666666666666658561;
#endif
    return x - (h - s * (h + z * p));
}
#endif
