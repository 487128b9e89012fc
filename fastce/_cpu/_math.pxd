"""Elementary functions that compilers can vectorise.

Design
------
1. Every function is straight-line code: no branch with side effects, no call, no table. A choice is a conditional
   expression between values that exist already, which GCC and Clang turn into a blend.
2. Rounding to an integer adds 1.5 * 2^(mantissa bits); powers of two are made by moving that integer into the exponent
   bits. Both would break under -fassociative-math, which the build therefore never passes.
3. The polynomials are Chebyshev fits (mpmath.chebyfit, 40 digits) on the reduced range; each states its own error.
4. exp returns its result times 2^32 (float) or 2^64 (double). Results too small for a normal number thereby keep their
   digits at no cost, and the factor disappears into the row's scalars. `exp_unit` is that factor.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "simd/math.h" nogil:
    const bint HAS_FMA "FASTCE_HAS_FMA"
    const float EXP_FLOOR "FASTCE_EXP_FLOOR"

cdef extern from "formula.h" nogil:
    float softcap_slope_float "fastce_softcap_slope_float"(float e) noexcept
    double softcap_slope_double "fastce_softcap_slope_double"(double e) noexcept

ctypedef fused real:
    float
    double


cdef inline uint32_t bits_of_float(float value) noexcept nogil:
    cdef uint32_t bits
    memcpy(&bits, &value, sizeof(bits))
    return bits


cdef inline float float_of_bits(uint32_t bits) noexcept nogil:
    cdef float value
    memcpy(&value, &bits, sizeof(value))
    return value


cdef inline uint64_t bits_of_double(double value) noexcept nogil:
    cdef uint64_t bits
    memcpy(&bits, &value, sizeof(bits))
    return bits


cdef inline double double_of_bits(uint64_t bits) noexcept nogil:
    cdef double value
    memcpy(&value, &bits, sizeof(value))
    return value


cdef inline real exp_unit(real like) noexcept nogil:
    """Return what `exp` returns for 0; `like` only chooses the type."""
    if real is float:
        return <float>4294967296.0
    else:
        return 18446744073709551616.0


cdef inline real exp_floor(real like) noexcept nogil:
    """Return an argument from which on downwards e^x is less than half of the smallest subnormal."""
    if real is float:
        return EXP_FLOOR
    else:
        return -746.5


cdef inline void split_exp(real x, real* power, real* fraction) noexcept nogil:
    """Write e^x = 2^n (1 + fraction) as power = 2^n * exp_unit and fraction, for exp_floor <= x <= 1 or NaN."""
    cdef real n, r, p
    if real is float:
        # 1.5 * 2^23 + 127 + 32: the low bits of the sum are the exponent field of 2^n * exp_unit.
        n = x * <float>1.4426950408889634 + <float>12583071.0
        power[0] = float_of_bits(bits_of_float(n) << 23)
        n = n - <float>12583071.0
        if HAS_FMA:
            # One rounding; the error of ln 2 as a float costs another 1/20 ulp for each unit of x.
            r = x - n * <float>0.6931471805599453
        else:
            # ln 2 in two parts; the first has 11 bits, so that its product with n is exact.
            r = (x - n * <float>0.693359375) - n * <float>-0.00021219444005469058
        # error of 1 + fraction: 8e-9
        p = <float>0.0013926183587713494542
        p = p * r + <float>0.0083631790527225773704
        p = p * r + <float>0.041666554617204574203
        p = p * r + <float>0.16666576989698775683
        p = p * r + <float>0.5
    else:
        # 1.5 * 2^52 + 1023 + 64
        n = x * 1.4426950408889634 + 6755399441056831.0
        power[0] = double_of_bits(bits_of_double(n) << 52)
        n = n - 6755399441056831.0
        # The first part has 33 bits.
        r = (x - n * 0.6931471804855391) - n * 7.4406171100123967e-11
        # error of 1 + fraction: 1.3e-17
        p = 2.5100385495510319078e-8
        p = p * r + 2.7620088445409748161e-7
        p = p * r + 2.7557268459997064772e-6
        p = p * r + 0.000024801521295954375131
        p = p * r + 0.00019841269863053616878
        p = p * r + 0.0013888888917213716901
        p = p * r + 0.0083333333333300618325
        p = p * r + 0.041666666666624127873
        p = p * r + 0.16666666666666667453
        p = p * r + 0.50000000000000010221
    fraction[0] = p * (r * r) + r


cdef inline real exp(real x) noexcept nogil:
    """Return e^x * exp_unit for x <= 1, within 1 ulp; -inf gives 0 and NaN gives NaN."""
    cdef real power, fraction
    split_exp(x, &power, &fraction)
    # NaN fails the comparison and stays; below the floor the parts are meaningless.
    return <real>0 if x < exp_floor(x) else fraction * power + power


cdef inline real tanh(real x) noexcept nogil:
    """Return tanh(x) within 3 ulp."""
    cdef real power, fraction, t
    t = x if x < 0 else -x
    t = <real>-30 if t < -30 else t  # tanh is 1 to the last bit long before
    split_exp(2 * t, &power, &fraction)
    power = power / exp_unit(x)
    t = fraction * power + (power - 1)  # expm1(-2|x|)
    t = t / (2 + t)
    return t if x < 0 else -t


cdef inline real sech2(real x) noexcept nogil:
    """Return 1 - tanh(x)^2 with full relative accuracy."""
    cdef real t = x if x < 0 else -x
    t = exp(2 * t) / exp_unit(x)
    if real is float:
        return softcap_slope_float(t)
    else:
        return softcap_slope_double(t)


cdef inline void split_log1p(real x, real inverse, real* k, real* f, real* lost) noexcept nogil:
    """Write log(1 + x) as k log(2) + log(1 + f) + lost with 1 + f in [sqrt(1/2), sqrt(2)); for x >= 0 or NaN.

    `inverse` is 1 / (1 + x).
    """
    # u = 1 + x loses the low bits of x; `lost` brings them back, for log(u + t) = log(u) + t / u.
    cdef real u = <real>1 + x
    cdef uint32_t bits32
    cdef uint64_t bits
    lost[0] = (x - (u - <real>1)) * inverse
    # The constants hold the bits of sqrt(1/2), 1 and 2^(mantissa bits).
    if real is float:
        bits32 = bits_of_float(u) - <uint32_t>0x3F3504F3
        k[0] = float_of_bits((bits32 >> 23) | <uint32_t>0x4B000000) - <float>8388608.0
        f[0] = float_of_bits((bits32 & <uint32_t>0x007FFFFF) + <uint32_t>0x3F3504F3) - <real>1
    else:
        bits = bits_of_double(u) - <uint64_t>0x3FE6A09E667F3BCD
        k[0] = double_of_bits((bits >> 52) | <uint64_t>0x4330000000000000) - 4503599627370496.0
        f[0] = double_of_bits((bits & <uint64_t>0x000FFFFFFFFFFFFF) + <uint64_t>0x3FE6A09E667F3BCD) - <real>1


cdef inline real join_log1p(real k, real f, real s, real lost) noexcept nogil:
    """Return log(1 + x) from its parts and s = f / (2 + f)."""
    # log(1 + f) = f - f^2/2 + s (f^2/2 + z P(z)), z = s^2; error 3e-9 and 1e-17
    cdef real z = s * s
    cdef real h = <real>0.5 * f * f
    cdef real p
    if real is float:
        p = <float>0.29579949392007568008
        p = p * z + <float>0.39988780566020703557
        p = p * z + <float>0.66666685039575864407
        return k * <float>0.693145751953125 + (f - (h - (s * (h + z * p) + (lost + k * <float>1.4286068203094172e-6))))
    else:
        p = 0.14617807153417324964
        p = p * z + 0.15331611722055007885
        p = p * z + 0.18182892432536871201
        p = p * z + 0.22222211089379496214
        p = p * z + 0.28571428626253837606
        p = p * z + 0.39999999999898890514
        p = p * z + 0.66666666666666697077
        return k * 0.6931471803691238 + (f - (h - (s * (h + z * p) + (lost + k * 1.9082149292705877e-10))))


cdef inline real log1p(real x, real inverse) noexcept nogil:
    """Return log(1 + x) within 2 ulp for x >= 0; `inverse` is 1 / (1 + x). NaN gives NaN."""
    cdef real k, f, lost
    split_log1p(x, inverse, &k, &f, &lost)
    return join_log1p(k, f, f / (<real>2 + f), lost)
