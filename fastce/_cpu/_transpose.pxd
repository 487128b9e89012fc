"""Transposition: the only step between rows whose classes lie side by side and vectors across rows.

Design
------
1. Scalar loops took longer than everything else at 10 classes. So it goes by blocks, of 16 bytes a side or, with AVX,
   of 8 floats, which saved a twentieth of a call of 100 classes; the last block overlaps the one before, which does no
   harm to copies.
2. GCC and Clang share a notation for shuffles that needs no instruction set; other compilers keep the scalar loop. For
   the wide blocks GCC made of it something slower than the small ones, hence intrinsics.
3. 2 and 3 classes are fewer than the side of a block: compilers know how to take pairs and triples apart.
"""
from fastce._cpu._convert cimport Format, load_array, store_array
from fastce._cpu._math cimport real

cdef extern from *:
    """
    #include <stddef.h>
    #include <string.h>
    #if defined(__AVX__)
    #include <immintrin.h>
    #endif
    #if defined(__GNUC__)
    #define FASTCE_OWN_FUNCTION __attribute__((noinline, unused))
    #else
    #define FASTCE_OWN_FUNCTION
    #endif
    #if defined(__has_builtin)
    #if __has_builtin(__builtin_shufflevector)
    #define FASTCE_SHUFFLE 1
    #endif
    #endif
    /* Four numbers from each of four places, `from` numbers apart, to four places `to` numbers apart, transposed. */
    #if defined(FASTCE_SHUFFLE)
    typedef float fastce_float4 __attribute__((vector_size(16)));
    typedef double fastce_double2 __attribute__((vector_size(16)));
    static CYTHON_INLINE void fastce_transpose_4(const float* source, ptrdiff_t from, float* target, ptrdiff_t to) {
        fastce_float4 a, b, c, d, p, q, r, s;
        memcpy(&a, source, 16);
        memcpy(&b, source + from, 16);
        memcpy(&c, source + 2 * from, 16);
        memcpy(&d, source + 3 * from, 16);
        p = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        q = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        r = __builtin_shufflevector(c, d, 0, 4, 1, 5);
        s = __builtin_shufflevector(c, d, 2, 6, 3, 7);
        a = __builtin_shufflevector(p, r, 0, 1, 4, 5);
        b = __builtin_shufflevector(p, r, 2, 3, 6, 7);
        c = __builtin_shufflevector(q, s, 0, 1, 4, 5);
        d = __builtin_shufflevector(q, s, 2, 3, 6, 7);
        memcpy(target, &a, 16);
        memcpy(target + to, &b, 16);
        memcpy(target + 2 * to, &c, 16);
        memcpy(target + 3 * to, &d, 16);
    }
    /* Likewise two doubles. */
    static CYTHON_INLINE void fastce_transpose_2(const double* source, ptrdiff_t from, double* target, ptrdiff_t to) {
        fastce_double2 a, b, p, q;
        memcpy(&a, source, 16);
        memcpy(&b, source + from, 16);
        p = __builtin_shufflevector(a, b, 0, 2);
        q = __builtin_shufflevector(a, b, 1, 3);
        memcpy(target, &p, 16);
        memcpy(target + to, &q, 16);
    }
    #else
    static void fastce_transpose_4(const float* source, ptrdiff_t from, float* target, ptrdiff_t to) {
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 4; k++) target[k * to + i] = source[i * from + k];
    }
    static void fastce_transpose_2(const double* source, ptrdiff_t from, double* target, ptrdiff_t to) {
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 2; k++) target[k * to + i] = source[i * from + k];
    }
    #endif
    #if defined(__AVX__)
    /* Likewise eight floats. */
    static CYTHON_INLINE void fastce_transpose_8(const float* source, ptrdiff_t from, float* target, ptrdiff_t to) {
        __m256 x[8], y[8];
        for (int i = 0; i < 8; i++) x[i] = _mm256_loadu_ps(source + i * from);
        for (int i = 0; i < 8; i += 2) {
            y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
            y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
        }
        for (int i = 0; i < 8; i += 4)
            for (int k = 0; k < 2; k++) {
                x[i + 2 * k] = _mm256_shuffle_ps(y[i + k], y[i + k + 2], 0x44);
                x[i + 2 * k + 1] = _mm256_shuffle_ps(y[i + k], y[i + k + 2], 0xEE);
            }
        for (int i = 0; i < 4; i++) {
            _mm256_storeu_ps(target + i * to, _mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
            _mm256_storeu_ps(target + (i + 4) * to, _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
        }
    }
    #endif
    /* m <= 16 lines of n numbers by such blocks; the last overlap those before. Loops of known length are unrolled. */
    #define FASTCE_TRANSPOSE_STRIP(side, block) \\
        for (ptrdiff_t k = 0; k < n; k += side) { \\
            if (k > n - side) k = n - side; \\
            if (m == 16) \\
                for (ptrdiff_t i = 0; i < 16; i += side) block(x + i * from + k, from, y + k * to + i, to); \\
            else \\
                for (ptrdiff_t i = 0; i < m; i += side) { \\
                    if (i > m - side) i = m - side; \\
                    block(x + i * from + k, from, y + k * to + i, to); \\
                } \\
        }
    FASTCE_OWN_FUNCTION static void fastce_transpose_floats(
        const float* x, ptrdiff_t from, ptrdiff_t m, ptrdiff_t n, float* y, ptrdiff_t to) {
    #if defined(__AVX__)
        if (m >= 8 && n >= 8) {
            FASTCE_TRANSPOSE_STRIP(8, fastce_transpose_8)
            return;
        }
    #endif
        FASTCE_TRANSPOSE_STRIP(4, fastce_transpose_4)
    }
    FASTCE_OWN_FUNCTION static void fastce_transpose_doubles(
        const double* x, ptrdiff_t from, ptrdiff_t m, ptrdiff_t n, double* y, ptrdiff_t to) {
        FASTCE_TRANSPOSE_STRIP(2, fastce_transpose_2)
    }
    """
    void transpose_floats "fastce_transpose_floats"(
        const float* x, Py_ssize_t x_step, Py_ssize_t m, Py_ssize_t n, float* y, Py_ssize_t y_step) noexcept nogil
    void transpose_doubles "fastce_transpose_doubles"(
        const double* x, Py_ssize_t x_step, Py_ssize_t m, Py_ssize_t n, double* y, Py_ssize_t y_step) noexcept nogil


cdef enum:
    STRIP = 16   # lines that are done together, so that whole cache lines are written
    WIDE = 2048  # numbers that pass between 16 bits and their transpose at once, through 8 KiB


cdef inline void split(const real* x, Py_ssize_t m, Py_ssize_t n, real* y, Py_ssize_t y_step) noexcept nogil:
    """Take m pairs or triples apart."""
    cdef Py_ssize_t j
    if n == 2:
        for j in range(m):
            y[j] = x[2 * j]
            y[y_step + j] = x[2 * j + 1]
    else:
        for j in range(m):
            y[j] = x[3 * j]
            y[y_step + j] = x[3 * j + 1]
            y[2 * y_step + j] = x[3 * j + 2]


cdef inline void join(const real* x, Py_ssize_t x_step, Py_ssize_t m, Py_ssize_t n, real* y) noexcept nogil:
    """Put n pairs or triples together."""
    cdef Py_ssize_t j
    if m == 2:
        for j in range(n):
            y[2 * j] = x[j]
            y[2 * j + 1] = x[x_step + j]
    else:
        for j in range(n):
            y[3 * j] = x[j]
            y[3 * j + 1] = x[x_step + j]
            y[3 * j + 2] = x[2 * x_step + j]


cdef inline void transpose(
    const real* x, Py_ssize_t x_step, Py_ssize_t m, Py_ssize_t n, real* y, Py_ssize_t y_step
) noexcept nogil:
    """Copy m lines of n numbers, `x_step` numbers apart, to n lines of m numbers, `y_step` numbers apart."""
    cdef Py_ssize_t side = 16 // <Py_ssize_t>sizeof(real)
    cdef Py_ssize_t i = 0, k
    if m >= side and n >= side:
        while i < m:
            i = min(i, m - side)
            if real is float:
                transpose_floats(x + i * x_step, x_step, min(STRIP, m - i), n, y + i, y_step)
            else:
                transpose_doubles(x + i * x_step, x_step, min(STRIP, m - i), n, y + i, y_step)
            i += STRIP
    elif x_step == n and (n == 2 or n == 3):
        split(x, m, n, y, y_step)
    elif y_step == m and (m == 2 or m == 3):
        join(x, x_step, m, n, y)
    else:
        for k in range(n):
            for i in range(m):
                y[k * y_step + i] = x[i * x_step + k]


cdef inline void transpose_from(
    const char* first, Format format, Py_ssize_t class_stride, Py_ssize_t row_stride, Py_ssize_t m, Py_ssize_t n,
    real* y, Py_ssize_t y_step
) noexcept nogil:
    """Load and transpose m rows, `row_stride` bytes apart, of n <= 2048 numbers of any format and stride."""
    cdef real wide[WIDE]
    cdef Py_ssize_t i = 0, j, rows
    while i < m:
        rows = min(m - i, WIDE // n)
        if row_stride == class_stride * n:
            load_array(first + i * row_stride, format, class_stride, rows * n, wide)
        else:
            for j in range(rows):
                load_array(first + (i + j) * row_stride, format, class_stride, n, wide + j * n)
        transpose(wide, n, rows, n, y + i, y_step)
        i += rows


cdef inline void transpose_to(
    const real* y, Py_ssize_t y_step, Py_ssize_t m, Py_ssize_t n, char* first, Format format, Py_ssize_t class_stride,
    Py_ssize_t row_stride
) noexcept nogil:
    """Transpose and store m rows of n <= 2048 numbers, `row_stride` bytes apart, in any format and stride."""
    cdef real wide[WIDE]
    cdef Py_ssize_t i = 0, j, rows
    while i < m:
        rows = min(m - i, WIDE // n)
        transpose(y + i, y_step, n, rows, wide, n)
        if row_stride == class_stride * n:
            store_array(wide, <real>1, True, rows * n, first + i * row_stride, format, class_stride)
        else:
            for j in range(rows):
                store_array(wide + j * n, <real>1, True, n, first + (i + j) * row_stride, format, class_stride)
        i += rows
