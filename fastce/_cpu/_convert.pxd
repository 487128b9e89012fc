"""Between the number formats in memory and the arithmetic's.

Design
------
1. Numbers of 16 bits are converted 16 at a time, exactly or to the nearest, of two the even one. Subnormals are numbers
   like any other, whatever the CPU's flush modes; AVX-512's instruction for bfloat16 is not used, for it takes them for
   zero.
2. AVX2 and AVX-512 have code of their own: binary16 has instructions, and of loops over 16-bit integers GCC used half
   of each register (bfloat16 took 3 cycles more per 16 numbers). The loops for everybody else vectorise too.
"""
from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memcpy

from fastce._cpu._math cimport bits_of_float, float_of_bits, real

cdef extern from *:
    """
    #include <stdint.h>
    #if defined(__AVX512BW__)
    #include <immintrin.h>
    #define FASTCE_HAS_CONVERSIONS 1
    static CYTHON_INLINE void fastce_floats_of_halves(const uint16_t* source, float* target) {
        _mm512_storeu_ps(target, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source)));
    }
    static CYTHON_INLINE void fastce_halves_of_floats(const float* source, uint16_t* target) {
        __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(source), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256((__m256i*)target, halves);
    }
    static CYTHON_INLINE void fastce_floats_of_bfloat16s(const uint16_t* source, float* target) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)source));
        _mm512_storeu_si512(target, _mm512_slli_epi32(wide, 16));
    }
    static CYTHON_INLINE void fastce_bfloat16s_of_floats(const float* source, uint16_t* target) {
        __m512 x = _mm512_loadu_ps(source);
        __m512i bits = _mm512_castps_si512(x);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
        __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        sum = _mm512_mask_or_epi32(sum, is_nan, bits, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256((__m256i*)target, _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
    }
    #elif defined(__AVX2__) && defined(__F16C__)
    #include <immintrin.h>
    #define FASTCE_HAS_CONVERSIONS 1
    static CYTHON_INLINE void fastce_floats_of_halves(const uint16_t* source, float* target) {
        for (int i = 0; i < 16; i += 8)
            _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(source + i))));
    }
    static CYTHON_INLINE void fastce_halves_of_floats(const float* source, uint16_t* target) {
        for (int i = 0; i < 16; i += 8) {
            __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128((__m128i*)(target + i), halves);
        }
    }
    static CYTHON_INLINE void fastce_floats_of_bfloat16s(const uint16_t* source, float* target) {
        for (int i = 0; i < 16; i += 8) {
            __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(source + i)));
            _mm256_storeu_si256((__m256i*)(target + i), _mm256_slli_epi32(wide, 16));
        }
    }
    static CYTHON_INLINE __m256i fastce_round_bfloat16s(const float* source) {
        __m256 x = _mm256_loadu_ps(source);
        __m256i bits = _mm256_castps_si256(x);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        return _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, is_nan), 16);
    }
    static CYTHON_INLINE void fastce_bfloat16s_of_floats(const float* source, uint16_t* target) {
        /* Packing works within 128 bits; the permutation puts the quarters in order. */
        __m256i packed = _mm256_packus_epi32(fastce_round_bfloat16s(source), fastce_round_bfloat16s(source + 8));
        _mm256_storeu_si256((__m256i*)target, _mm256_permute4x64_epi64(packed, 0xD8));
    }
    #else
    #define FASTCE_HAS_CONVERSIONS 0
    #define fastce_floats_of_halves(source, target) ((void)0)
    #define fastce_halves_of_floats(source, target) ((void)0)
    #define fastce_floats_of_bfloat16s(source, target) ((void)0)
    #define fastce_bfloat16s_of_floats(source, target) ((void)0)
    #endif
    """
    const bint HAS_CONVERSIONS "FASTCE_HAS_CONVERSIONS"
    void floats_of_halves "fastce_floats_of_halves"(const uint16_t* source, float* target) noexcept nogil
    void halves_of_floats "fastce_halves_of_floats"(const float* source, uint16_t* target) noexcept nogil
    void floats_of_bfloat16s "fastce_floats_of_bfloat16s"(const uint16_t* source, float* target) noexcept nogil
    void bfloat16s_of_floats "fastce_bfloat16s_of_floats"(const float* source, uint16_t* target) noexcept nogil


# The type of the numbers in memory.
cdef enum Format:
    NATIVE = 0    # the arithmetic's
    FLOAT = 1
    DOUBLE = 2
    HALF = 3      # IEEE binary16
    BFLOAT16 = 4  # the upper half of a float


cdef inline Py_ssize_t size_of(Format format, real like) noexcept nogil:
    """Return the size of a number in bytes."""
    if format == NATIVE:
        return sizeof(real)
    if format == DOUBLE:
        return 8
    return 4 if format == FLOAT else 2


cdef inline bint is_16_bit(Format format) noexcept nogil:
    return format == HALF or format == BFLOAT16


cdef inline float float_of_half(uint32_t half) noexcept nogil:
    """Return the value of a binary16: exponent and fraction moved into place, then the exponent's bias made good."""
    cdef uint32_t bits = (half & 0x7FFF) << 13
    cdef uint32_t sign = (half & 0x8000) << 16
    cdef uint32_t finite = bits_of_float(float_of_bits(bits) * <float>5.192296858534828e33)  # 2^112
    # infinity and NaN: the largest exponent of either format
    return float_of_bits(sign | (finite if bits < <uint32_t>0x0F800000 else bits | <uint32_t>0x7F800000))


cdef inline uint32_t half_of_float(float value) noexcept nogil:
    """Return the nearest binary16, of two the even one."""
    cdef uint32_t sign = bits_of_float(value) >> 16 & 0x8000
    cdef uint32_t bits = bits_of_float(value) & <uint32_t>0x7FFFFFFF
    # Normal numbers: the bias of the exponent, half a unit in the last place, and one bit more if the place is odd.
    cdef uint32_t normal = (bits - <uint32_t>0x38000000 + <uint32_t>0xFFF + (bits >> 13 & 1)) >> 13
    # Others: in a sum with 1/2 the last place has the weight 2^-24 of the smallest subnormal, and the sum is rounded.
    cdef uint32_t subnormal = bits_of_float(float_of_bits(bits) + <float>0.5) - <uint32_t>0x3F000000
    # From 65520 on infinity, and NaN stays NaN.
    cdef uint32_t huge = 0x7E00 if bits > <uint32_t>0x7F800000 else 0x7C00
    cdef uint32_t finite = subnormal if bits < <uint32_t>0x38800000 else normal
    return sign | (huge if bits >= <uint32_t>0x477FF000 else finite)


cdef inline uint32_t bfloat16_of_float(float value) noexcept nogil:
    """Return the nearest bfloat16, of two the even one."""
    cdef uint32_t bits = bits_of_float(value)
    cdef uint32_t rounded = (bits + <uint32_t>0x7FFF + (bits >> 16 & 1)) >> 16
    return (bits >> 16 | 0x40) if (bits & <uint32_t>0x7FFFFFFF) > <uint32_t>0x7F800000 else rounded


cdef inline void widen_16(const uint16_t* source, Format format, float* target) noexcept nogil:
    """Convert 16 numbers of 16 bits to float."""
    cdef int j
    if HAS_CONVERSIONS and format == HALF:
        floats_of_halves(source, target)
    elif HAS_CONVERSIONS:
        floats_of_bfloat16s(source, target)
    elif format == HALF:
        for j in range(16):
            target[j] = float_of_half(source[j])
    else:
        for j in range(16):
            target[j] = float_of_bits(<uint32_t>source[j] << 16)


cdef inline void narrow_16(const float* source, Format format, uint16_t* target) noexcept nogil:
    """Round 16 floats to 16 bits."""
    cdef int j
    if HAS_CONVERSIONS and format == HALF:
        halves_of_floats(source, target)
    elif HAS_CONVERSIONS:
        bfloat16s_of_floats(source, target)
    elif format == HALF:
        for j in range(16):
            target[j] = <uint16_t>half_of_float(source[j])
    else:
        for j in range(16):
            target[j] = <uint16_t>bfloat16_of_float(source[j])


cdef inline void widen_array(const char* source, Format format, Py_ssize_t n, float* target) noexcept nogil:
    """Convert n numbers of 16 bits, side by side and aligned, to float."""
    cdef uint16_t rest[16]
    cdef float wide[16]
    cdef Py_ssize_t k = 0
    while k + 16 <= n:
        widen_16(<const uint16_t*>source + k, format, target + k)
        k += 16
    if k < n:
        memcpy(rest, source + 2 * k, (n - k) * 2)
        widen_16(rest, format, wide)
        memcpy(target + k, wide, (n - k) * sizeof(float))


cdef inline void narrow_array(
    const float* source, float factor, Format format, Py_ssize_t n, char* target
) noexcept nogil:
    """Round n floats times a factor to 16 bits, side by side and aligned."""
    cdef uint16_t rest[16]
    cdef float wide[16]
    cdef Py_ssize_t j, k = 0
    while k + 16 <= n:
        for j in range(16):
            wide[j] = source[k + j] * factor
        narrow_16(wide, format, <uint16_t*>target + k)
        k += 16
    if k < n:
        for j in range(n - k):
            wide[j] = source[k + j] * factor
        narrow_16(wide, format, rest)
        memcpy(target + 2 * k, rest, (n - k) * 2)


cdef inline real read(const char* address, real like) noexcept nogil:
    """Return the number at any alignment; `like` only chooses the type."""
    cdef real value
    memcpy(&value, address, sizeof(real))
    return value


cdef inline void write(char* address, real value) noexcept nogil:
    memcpy(address, &value, sizeof(real))


cdef inline real read_converted(const char* address, Format format, real like) noexcept nogil:
    """Return the number at any alignment, in any format."""
    cdef float single
    cdef double wide
    cdef uint16_t half
    if format == NATIVE:
        return read(address, like)
    if format == FLOAT:
        memcpy(&single, address, sizeof(single))
        return <real>single
    if format == DOUBLE:
        memcpy(&wide, address, sizeof(wide))
        return <real>wide
    memcpy(&half, address, sizeof(half))
    return <real>(float_of_half(half) if format == HALF else float_of_bits(<uint32_t>half << 16))


cdef inline void write_converted(char* address, Format format, real value) noexcept nogil:
    """Write a number, rounded to the nearest of its format; only NATIVE and the formats of 16 bits are written."""
    cdef uint16_t half
    if format == NATIVE:
        write(address, value)
        return
    half = <uint16_t>(half_of_float(<float>value) if format == HALF else bfloat16_of_float(<float>value))
    memcpy(address, &half, sizeof(half))


cdef inline bint is_array(const char* address, Format format, Py_ssize_t stride, real like) noexcept nogil:
    """Tell whether numbers `stride` bytes apart are an ordinary C array."""
    return stride == size_of(format, like) and <size_t>address % <size_t>stride == 0


cdef inline void load_array(
    const char* source, Format format, Py_ssize_t stride, Py_ssize_t n, real* target
) noexcept nogil:
    """Convert n numbers, `stride` bytes apart at any address, to the arithmetic's type."""
    cdef float wide[16]
    cdef Py_ssize_t j, k = 0
    if is_array(source, format, stride, target[0]):
        if format == DOUBLE:
            for k in range(n):
                target[k] = <real>(<const double*>source)[k]
            return
        if format == FLOAT:
            for k in range(n):
                target[k] = <real>(<const float*>source)[k]
            return
        if real is float and is_16_bit(format):
            widen_array(source, format, n, target)
            return
        while is_16_bit(format) and k + 16 <= n:
            widen_16(<const uint16_t*>source + k, format, wide)
            for j in range(16):
                target[k + j] = <real>wide[j]
            k += 16
    for k in range(k, n):
        target[k] = read_converted(source + k * stride, format, target[0])


cdef inline void store_array(
    const real* source, real factor, Py_ssize_t n, char* target, Format format, Py_ssize_t stride
) noexcept nogil:
    """Round n numbers times a factor to a format of 16 bits, `stride` bytes apart at any address."""
    cdef Py_ssize_t k
    if real is float and is_array(target, format, stride, factor):
        narrow_array(source, factor, format, n, target)
        return
    for k in range(n):
        write_converted(target + k * stride, format, source[k] * factor)
