"""Between the number formats in memory and the arithmetic's.

Design
------
1. Numbers of 16 bits are converted 16 at a time, exactly or to the nearest, of two the even one. Subnormals are numbers
   like any other, whatever the CPU's flush modes; AVX-512's instruction for bfloat16 is not used, for it takes them for
   zero.
2. AVX2 and AVX-512 have code of their own: binary16 has instructions, and of loops over 16-bit integers GCC used half
   of each register (bfloat16 took 3 cycles more per 16 numbers). The loops for everybody else vectorise too.
3. Rounding to bfloat16 works on 32 numbers at a time in registers of 512 bits, in halves that are taken apart, and
   leaves NaN out of account where there cannot be any: 5 instead of 10 instructions per 16 numbers.
"""
from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memcpy

from fastce._cpu._math cimport bits_of_float, float_of_bits, real
from fastce._cpu._platform cimport own_function
from fastce._cpu._registers cimport BFLOAT16, DOUBLE, FLOAT, HALF, HAS_REGISTERS, NATIVE, Format

cdef extern from "simd/convert.h" nogil:
    void widen_16_floats "fastce_widen_16"(Format format, const uint16_t* source, float* target)
    # Rounds 16 or 32 floats times a factor; NaN may become infinity or a number unless it is said that it may be there.
    void narrow_16_floats "fastce_narrow_16"(
        Format format, const float* source, float factor, bint may_be_nan, uint16_t* target)
    void narrow_32_floats "fastce_narrow_32"(
        Format format, const float* source, float factor, bint may_be_nan, uint16_t* target)


cdef inline Py_ssize_t size_of(Format format, real like) noexcept nogil:
    """Return the size of a number in bytes."""
    if format == NATIVE:
        return sizeof(real)
    if format == DOUBLE:
        return 8
    return 4 if format == FLOAT else 2


cdef inline Py_ssize_t magnitude(Py_ssize_t stride) noexcept nogil:
    return stride if stride >= 0 else -stride


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
    if HAS_REGISTERS:
        if format == HALF:
            widen_16_floats(HALF, source, target)
        else:
            widen_16_floats(BFLOAT16, source, target)
    elif format == HALF:
        for j in range(16):
            target[j] = float_of_half(source[j])
    else:
        for j in range(16):
            target[j] = float_of_bits(<uint32_t>source[j] << 16)


cdef inline void narrow_16(const float* source, Format format, uint16_t* target) noexcept nogil:
    """Round 16 floats to 16 bits."""
    cdef int j
    if HAS_REGISTERS:
        if format == HALF:
            narrow_16_floats(HALF, source, 1, True, target)
        else:
            narrow_16_floats(BFLOAT16, source, 1, True, target)
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


cdef inline Py_ssize_t narrow_pairs(
    const float* source, float factor, Format format, bint may_be_nan, Py_ssize_t n, uint16_t* target
) noexcept nogil:
    """Round the first of n floats times a factor, 32 at a time, where there are registers; return how many."""
    cdef Py_ssize_t k = 0
    if not HAS_REGISTERS:
        return 0
    if format == HALF:
        while k + 32 <= n:
            narrow_32_floats(HALF, source + k, factor, may_be_nan, target + k)
            k += 32
    elif may_be_nan:
        while k + 32 <= n:
            narrow_32_floats(BFLOAT16, source + k, factor, True, target + k)
            k += 32
    else:
        while k + 32 <= n:
            narrow_32_floats(BFLOAT16, source + k, factor, False, target + k)
            k += 32
    return k


cdef inline void narrow_array(
    const float* source, float factor, Format format, bint may_be_nan, Py_ssize_t n, char* target
) noexcept nogil:
    """Round n floats times a factor to 16 bits, side by side and aligned."""
    cdef uint16_t rest[16]
    cdef float wide[16]
    cdef Py_ssize_t j, k = narrow_pairs(source, factor, format, may_be_nan, n, <uint16_t*>target)
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
    """Return the number at any alignment, in any format.

    But for NATIVE through addresses of which compilers know nothing: GCC makes unconditional loads of what a loop reads
    in one of several branches, the longest one's for all, and thus reads beyond an array of shorter numbers.
    """
    cdef float single
    cdef double wide
    cdef uint16_t half
    if format == NATIVE:
        return read(address, like)
    address = <const char*>own_function(<void*>address)
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


cdef inline void load_strided(const char* source, Py_ssize_t stride, Py_ssize_t n, real* target) noexcept nogil:
    """Load n numbers, `stride` bytes apart at any address. Loops whose strides are constants become vector code."""
    cdef Py_ssize_t k
    cdef const real* x = <const real*>source
    if <size_t>source % sizeof(real) == 0 and stride == -<Py_ssize_t>sizeof(real):
        for k in range(n):
            target[k] = x[-k]
    elif <size_t>source % sizeof(real) == 0 and stride == 2 * <Py_ssize_t>sizeof(real):
        for k in range(n):
            target[k] = x[2 * k]
    elif stride == <Py_ssize_t>sizeof(real):
        memcpy(target, source, n * sizeof(real))
    else:
        for k in range(n):
            memcpy(target + k, source + k * stride, sizeof(real))


cdef inline void store_strided(
    const real* source, real factor, Py_ssize_t n, char* target, Py_ssize_t stride
) noexcept nogil:
    """Store n numbers times a factor, `stride` bytes apart at any address."""
    cdef Py_ssize_t k
    cdef real* x = <real*>target
    if <size_t>target % sizeof(real) == 0 and stride == <Py_ssize_t>sizeof(real):
        for k in range(n):
            x[k] = source[k] * factor
    elif <size_t>target % sizeof(real) == 0 and stride == -<Py_ssize_t>sizeof(real):
        for k in range(n):
            x[-k] = source[k] * factor
    elif <size_t>target % sizeof(real) == 0 and stride == 2 * <Py_ssize_t>sizeof(real):
        for k in range(n):
            x[2 * k] = source[k] * factor
    else:
        for k in range(n):
            write(target + k * stride, source[k] * factor)


cdef inline void load_array(
    const char* source, Format format, Py_ssize_t stride, Py_ssize_t n, real* target
) noexcept nogil:
    """Convert n numbers, `stride` bytes apart at any address, to the arithmetic's type."""
    cdef float wide[16]
    cdef Py_ssize_t j, k = 0
    if is_array(source, format, stride, target[0]):
        if format == NATIVE:
            memcpy(target, source, n * sizeof(real))
            return
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
    elif format == NATIVE:
        load_strided(source, stride, n, target)
        return
    for k in range(k, n):
        target[k] = read_converted(source + k * stride, format, target[0])


cdef inline void store_array(
    const real* source, real factor, bint may_be_nan, Py_ssize_t n, char* target, Format format, Py_ssize_t stride
) noexcept nogil:
    """Store n numbers times a factor, rounded to a format of 16 bits or not, `stride` bytes apart at any address."""
    cdef Py_ssize_t k
    if format == NATIVE:
        store_strided(source, factor, n, target, stride)
        return
    if real is float and is_array(target, format, stride, factor):
        narrow_array(source, factor, format, may_be_nan, n, target)
        return
    for k in range(n):
        write_converted(target + k * stride, format, source[k] * factor)
