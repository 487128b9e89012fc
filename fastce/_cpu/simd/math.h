/* Elementary functions on vectors, and on numbers for the scalars of a row.

   Design
   ------
   1. Every function is straight-line code. A choice is a `select` between values that exist already.
   2. Rounding to an integer adds 1.5 * 2^(mantissa bits); powers of two are made by moving that integer into the
      exponent bits. Both would break under -fassociative-math, which the build therefore never passes.
   3. The polynomials are Chebyshev fits (mpmath.chebyfit, 40 digits) on the reduced range; each states its own error.
   4. exp returns its result times EXP_UNIT, 2^32 (float) or 2^64 (double). Results too small for a normal number
      thereby keep their digits at no cost, and the factor disappears into the row's scalars.
   5. With AVX2 and AVX-512, floats look numbers up in a register, and doubles with AVX-512 in two: e^x =
      2^n (1 + fraction) with n in quarters or sixteenths, and a fraction so small that half of the polynomial does,
      which took 0.9 and 0.8 of the time.
      Eighths with AVX2 took 1.1 times as long as the polynomial: only within 4 floats does it look numbers up in one
      instruction. That is no way to e^x - 1, though: the numbers looked up are rounded. */
#ifndef FASTCE_MATH_H
#define FASTCE_MATH_H

#include "formula.h"
#include "simd/simd.h"

#define FASTCE_TEMPLATE "simd/math.h"
#define FASTCE_SCALARS
#include "simd/for_types.h"

/* For numbers: `exp` is that of doubles, for which alone it is needed. */
#define fastce_log1p(x, inverse) FASTCE_OF_NUMBERS(log1p, x)(x, inverse)
#define fastce_sech2(x) FASTCE_OF_NUMBERS(sech2, x)(x)

#elif defined(REAL)

/* The least argument of exp, -159 or -1087 times log(2): there the power of two comes out as 0, and e^x is less than
   half of the smallest subnormal number. */
#if IS_FLOAT
#define FLOOR -110.21040f
#else
#define FLOOR -753.45098575105951
#endif

/* e^x = 2^n (1 + fraction): power = 2^n * EXP_UNIT, exact, and fraction; for FLOOR <= x <= 1 or NaN. */
FASTCE_INLINE void F(split_exp)(VEC x, VEC* power, VEC* fraction) {
    VEC n, r, p;
#if IS_FLOAT
    /* 1.5 * 2^23 + 127 + 32: the low bits of the sum are the exponent field of 2^n * EXP_UNIT. */
    n = x * 1.4426950408889634f + 12583071.0f;
    *power = F(of_bits)(F(bits_of)(n) << 23);
    n = n - 12583071.0f;
#if FASTCE_HAS_FMA
    /* One rounding; the error of ln 2 as a float costs another 1/20 ulp for each unit of x. */
    r = F(fma)(n, F(fill)(-0.6931471805599453f), x);
#else
    /* ln 2 in two parts; the first has 11 bits, so that its product with n is exact. */
    r = (x - n * 0.693359375f) - n * -0.00021219444005469058f;
#endif
    /* error of 1 + fraction: 8e-9 */
    p = r * 0.0013926183587713494542f + 0.0083631790527225773704f;
    p = p * r + 0.041666554617204574203f;
    p = p * r + 0.16666576989698775683f;
    p = p * r + 0.5f;
#else
    /* 1.5 * 2^52 + 1023 + 64 */
    n = x * 1.4426950408889634 + 6755399441056831.0;
    *power = F(of_bits)(F(bits_of)(n) << 52);
    n = n - 6755399441056831.0;
    /* The first part has 33 bits. */
    r = (x - n * 0.6931471804855391) - n * 7.4406171100123967e-11;
    /* error of 1 + fraction: 1.3e-17 */
    p = r * 2.5100385495510319078e-8 + 2.7620088445409748161e-7;
    p = p * r + 2.7557268459997064772e-6;
    p = p * r + 0.000024801521295954375131;
    p = p * r + 0.00019841269863053616878;
    p = p * r + 0.0013888888917213716901;
    p = p * r + 0.0083333333333300618325;
    p = p * r + 0.041666666666624127873;
    p = p * r + 0.16666666666666667453;
    p = p * r + 0.50000000000000010221;
#endif
    *fraction = p * (r * r) + r;
}

/* e^x * EXP_UNIT for FLOOR <= x <= 1, within 1 ulp, with a lookup 2; NaN gives NaN. */
FASTCE_INLINE VEC F(exp_in_range)(VEC x) {
#if WIDTH > 1 && IS_FLOAT && FASTCE_IS_WIDE
    /* The bits of 2^(32 + j/16) or 2^(32 + j/4), less what j adds when n is shifted into the exponent's place; the
       numbers whose sum's low bits count such fractions; and (e^r - 1 - r) / r^2. Errors: 4.7e-9 and 1.1e-8. */
#if FASTCE_VECTOR_BYTES == 64
    const BITS powers = {0x4F800000, 0x4F7DAAC3, 0x4F7B95C2, 0x4F79C3D3, 0x4F7837F0, 0x4F76F532, 0x4F75FED7, 0x4F75583F,
        0x4F7504F3, 0x4F7508A4, 0x4F75672A, 0x4F76248C, 0x4F7744FD, 0x4F78CCDF, 0x4F7AC0C7, 0x4F7D257D};
    const float magic = 786432.0f; /* 1.5 * 2^19 */
    const int shift = 19;
#else
    const BITS powers = {
        0x4F800000, 0x4F7837F0, 0x4F7504F3, 0x4F7744FD, 0x4F800000, 0x4F7837F0, 0x4F7504F3, 0x4F7744FD};
    const float magic = 3145728.0f; /* 1.5 * 2^21 */
    const int shift = 21;
#endif
    VEC sum = x * 1.4426950408889634f + magic;
    VEC r = F(fma)(sum - magic, F(fill)(-0.6931471805599453f), x);
    BITS bits = F(bits_of)(sum);
#if FASTCE_VECTOR_BYTES == 64
    BITS found = (BITS)_mm512_permutexvar_epi32((__m512i)bits, (__m512i)powers);
    VEC p = r * 0.16666862360138368816f + 0.50000978469546839687f;
#else
    BITS found = (BITS)_mm256_permutevar_ps((__m256)powers, (__m256i)bits);
    VEC p = (r * 0.041674488890576340227f + 0.16671360158338996951f) * r + 0.5f;
#endif
    VEC power = F(of_bits)(found + (bits << shift));
    p = p * (r * r) + r;
    return p * power + power;
#elif WIDTH > 1 && FASTCE_VECTOR_BYTES == 64
    /* The same in sixteenths, twice 8 of them, and what the numbers looked up lack, relative to them. Error: 2.8e-17. */
    const BITS powers = {0x43F0000000000000, 0x43EFB5586CF9890F, 0x43EF72B83C7D517B, 0x43EF387A6E756238,
        0x43EF06FE0A31B715, 0x43EEDEA64C123422, 0x43EEBFDAD5362A27, 0x43EEAB07DD485429};
    const BITS more_powers = {0x43EEA09E667F3BCD, 0x43EEA11473EB0187, 0x43EEACE5422AA0DB, 0x43EEC49182A3F090,
        0x43EEE89F995AD3AD, 0x43EF199BDD85529C, 0x43EF5818DCFBA487, 0x43EFA4AFA2A490DA};
    const VEC rests = {0, 8.189317638195515e-17, -2.7939114859515733e-17, 7.826573258636076e-17, 3.3484623336251524e-17,
        3.750854201303127e-17, 1.9572585293112036e-17, 5.68648095791174e-17};
    const VEC more_rests = {-6.835808657661922e-17, -2.3591094770850053e-17, 5.1548301170786783e-17,
        1.5341410053603723e-17, 4.875160526227062e-17, 1.685487290628973e-17, 1.790126907604513e-17,
        -5.545065618639427e-17};
    const double magic = 422212465065984.0; /* 1.5 * 2^48 */
    VEC sum = x * 1.4426950408889634 + magic;
    VEC n = sum - magic;
    VEC r = (x - n * 0.6931471804855391) - n * 7.4406171100123967e-11;
    __m512i place = (__m512i)F(bits_of)(sum);
    BITS found = (BITS)_mm512_permutex2var_epi64((__m512i)powers, place, (__m512i)more_powers);
    VEC rest = (VEC)_mm512_permutex2var_pd((__m512d)rests, place, (__m512d)more_rests);
    VEC power = F(of_bits)(found + (F(bits_of)(sum) << 48));
    VEC p = r * 0.0013889034494096299 + 0.008333449817651228;
    p = p * r + 0.04166666666495703;
    p = p * r + 0.1666666666529896;
    p = p * r + 0.5;
    p = p * (r * r) + (r + rest);
    return p * power + power;
#else
    VEC power, fraction;
    F(split_exp)(x, &power, &fraction);
    return fraction * power + power;
#endif
}

/* `exp`: e^x * EXP_UNIT for x <= 1; -inf gives 0. `exp_unless`: the same, but 0 where the number is `k`. */
#if WIDTH > 1 && IS_FLOAT && FASTCE_VECTOR_BYTES == 64
/* By masks, which cost nothing: the last instruction takes them, while a maximum comes before all others. */
FASTCE_INLINE MASK F(is_in_range)(VEC x) { return FASTCE_NAME(_mm512_cmp, PS, _mask)(x, F(fill)(FLOOR), _CMP_NLT_UQ); }
FASTCE_INLINE VEC F(exp)(VEC x) { return F(keep)(F(is_in_range)(x), F(exp_in_range)(x)); }
FASTCE_INLINE VEC F(exp_unless)(INTS number, INT k, VEC x) {
    return F(keep)(F(is_in_range)(x) & F(is_not)(number, k), F(exp_in_range)(x));
}
#else
/* The power of two of FLOOR is 0. */
FASTCE_INLINE VEC F(exp)(VEC x) { return F(exp_in_range)(F(max_or_nan)(F(fill)(FLOOR), x)); }
FASTCE_INLINE VEC F(exp_unless)(INTS number, INT k, VEC x) { return F(unless)(number, k, F(exp)(x)); }
#endif

/* scale * (x - y). That difference may overflow where the scaled one does not: halves are exact and do not. */
FASTCE_INLINE REAL F(half)(REAL scale) { return scale < 1 ? (REAL)0.5 : 1; }
FASTCE_INLINE VEC F(difference)(VEC x, VEC y, REAL scale) {
    const REAL half = F(half)(scale);
    return (scale / half) * (half * x - half * y);
}

/* tanh(x) within 3 ulp. */
FASTCE_INLINE VEC F(tanh)(VEC x) {
    VEC power, fraction, t = F(max_or_nan)(F(fill)(-30), F(negative)(x)); /* tanh is 1 to the last bit long before */
    F(split_exp)(2 * t, &power, &fraction);
    power = power * (1 / EXP_UNIT);
    t = fraction * power + (power - 1); /* expm1(-2|x|) */
    return F(with_sign)(t / (2 + t), x);
}

/* 1 - tanh(x)^2 with full relative accuracy. */
FASTCE_INLINE VEC F(sech2)(VEC x) {
    const VEC t = F(exp)(2 * F(negative)(x)) * (1 / EXP_UNIT);
    return FC_SOFTCAP_SLOPE(t);
}

/* log(1 + x) = k log(2) + log(1 + f) + lost with 1 + f in [sqrt(1/2), sqrt(2)), for x >= 0 or NaN; `inverse` is
   1 / (1 + x). */
FASTCE_INLINE void F(split_log1p)(VEC x, VEC inverse, VEC* k, VEC* f, VEC* lost) {
    /* u = 1 + x loses the low bits of x; `lost` brings them back, for log(u + t) = log(u) + t / u. */
    const VEC u = 1 + x;
    /* The constants hold the bits of sqrt(1/2), 1 and 2^(mantissa bits). */
#if IS_FLOAT
    const BITS bits = F(bits_of)(u) - (UINT)0x3F3504F3;
    *k = F(of_bits)((bits >> 23) | (UINT)0x4B000000) - 8388608.0f;
    *f = F(of_bits)((bits & (UINT)0x007FFFFF) + (UINT)0x3F3504F3) - 1;
#else
    const BITS bits = F(bits_of)(u) - (UINT)0x3FE6A09E667F3BCD;
    *k = F(of_bits)((bits >> 52) | (UINT)0x4330000000000000) - 4503599627370496.0;
    *f = F(of_bits)((bits & (UINT)0x000FFFFFFFFFFFFF) + (UINT)0x3FE6A09E667F3BCD) - 1;
#endif
    *lost = (x - (u - 1)) * inverse;
}

/* log(1 + x) from its parts and s = f / (2 + f). */
FASTCE_INLINE VEC F(join_log1p)(VEC k, VEC f, VEC s, VEC lost) {
    /* log(1 + f) = f - f^2/2 + s (f^2/2 + z P(z)), z = s^2; error 3e-9 and 1e-17 */
    const VEC z = s * s, h = (REAL)0.5 * f * f;
    VEC p;
#if IS_FLOAT
    p = z * 0.29579949392007568008f + 0.39988780566020703557f;
    p = p * z + 0.66666685039575864407f;
    return k * 0.693145751953125f + (f - (h - (s * (h + z * p) + (lost + k * 1.4286068203094172e-6f))));
#else
    p = z * 0.14617807153417324964 + 0.15331611722055007885;
    p = p * z + 0.18182892432536871201;
    p = p * z + 0.22222211089379496214;
    p = p * z + 0.28571428626253837606;
    p = p * z + 0.39999999999898890514;
    p = p * z + 0.66666666666666697077;
    return k * 0.6931471803691238 + (f - (h - (s * (h + z * p) + (lost + k * 1.9082149292705877e-10))));
#endif
}

/* log(1 + x) within 2 ulp for x >= 0; NaN gives NaN. */
FASTCE_INLINE VEC F(log1p)(VEC x, VEC inverse) {
    VEC k, f, lost;
    F(split_log1p)(x, inverse, &k, &f, &lost);
    return F(join_log1p)(k, f, f / (2 + f), lost);
}

#undef FLOOR
#endif
