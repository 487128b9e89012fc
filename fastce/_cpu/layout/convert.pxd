"""Between the number formats in memory and the arithmetic's; those of 16 bits in C, see `simd/convert.h`."""
from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memcpy

from fastce._cpu.math cimport real
from fastce._cpu.platform cimport not_inlined

cdef extern from "simd/convert.h" nogil:
    ctypedef enum Format "fastce_format":
        NATIVE "FASTCE_NATIVE"      # the arithmetic's
        FLOAT "FASTCE_FLOAT"
        DOUBLE "FASTCE_DOUBLE"
        HALF "FASTCE_HALF"          # IEEE binary16
        BFLOAT16 "FASTCE_BFLOAT16"  # the upper half of a float
    const bint SWEEPS_16_BITS "FASTCE_SWEEPS_16_BITS"
    float float_of_half "fastce_float_of_half"(uint32_t half)
    float float_of_bfloat16 "fastce_float_of_bfloat16"(uint32_t bits)
    uint32_t half_of_float "fastce_half_of_float"(float value)
    uint32_t bfloat16_of_float "fastce_bfloat16_of_float"(float value)
    void widen_16_of "fastce_widen_16"(Format format, const uint16_t* source, float* target)
    # Rounds 16 or 32 floats times a factor; NaN may become infinity or a number unless it is said that it may be there.
    void narrow_16_of "fastce_narrow_16"(
        Format format, const float* source, float factor, bint may_be_nan, uint16_t* target)
    void narrow_32_of "fastce_narrow_32"(
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


cdef inline void widen_16(const uint16_t* source, Format format, float* target) noexcept nogil:
    """Convert 16 numbers of 16 bits to float."""
    if format == HALF:
        widen_16_of(HALF, source, target)
    else:
        widen_16_of(BFLOAT16, source, target)


cdef inline void narrow_16(const float* source, Format format, uint16_t* target) noexcept nogil:
    """Round 16 floats to 16 bits."""
    if format == HALF:
        narrow_16_of(HALF, source, 1, True, target)
    else:
        narrow_16_of(BFLOAT16, source, 1, True, target)


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
    """Round the first of n floats times a factor, 32 at a time; return how many."""
    cdef Py_ssize_t k = 0
    if format == HALF:
        while k + 32 <= n:
            narrow_32_of(HALF, source + k, factor, may_be_nan, target + k)
            k += 32
    elif may_be_nan:
        while k + 32 <= n:
            narrow_32_of(BFLOAT16, source + k, factor, True, target + k)
            k += 32
    else:
        while k + 32 <= n:
            narrow_32_of(BFLOAT16, source + k, factor, False, target + k)
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
    address = <const char*>not_inlined(<void*>address)
    if format == FLOAT:
        memcpy(&single, address, sizeof(single))
        return <real>single
    if format == DOUBLE:
        memcpy(&wide, address, sizeof(wide))
        return <real>wide
    memcpy(&half, address, sizeof(half))
    return <real>(float_of_half(half) if format == HALF else float_of_bfloat16(half))


cdef inline void write_converted(char* address, Format format, real value) noexcept nogil:
    """Write a number, rounded to the nearest of its format; only NATIVE and the formats of 16 bits are written."""
    cdef uint16_t half
    if format == NATIVE:
        write(address, value)
        return
    half = <uint16_t>(half_of_float(<float>value) if format == HALF else bfloat16_of_float(<float>value))
    memcpy(address, &half, sizeof(half))


cdef inline bint is_array(const char* address, Format format, Py_ssize_t stride, real like) noexcept nogil:
    """Return True if numbers `stride` bytes apart are a contiguous, aligned array."""
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
