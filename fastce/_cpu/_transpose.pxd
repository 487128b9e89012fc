"""Transposition: the only step between rows whose classes lie side by side and vectors across rows.

Design
------
1. Scalar loops took longer than everything else at 10 classes. So it goes by blocks of 16 bytes a side; the last block
   overlaps the one before, which does no harm to copies.
2. GCC and Clang share a notation for shuffles that needs no instruction set; other compilers keep the scalar loop.
3. 2 and 3 classes are fewer than the side of a block: compilers know how to take pairs and triples apart.
"""
from fastce._cpu._math cimport real

cdef extern from *:
    """
    #include <stddef.h>
    #include <string.h>
    #if defined(__has_builtin)
    #if __has_builtin(__builtin_shufflevector)
    #define FASTCE_SHUFFLE 1
    #endif
    #endif
    #if defined(FASTCE_SHUFFLE)
    typedef float fastce_float4 __attribute__((vector_size(16)));
    typedef double fastce_double2 __attribute__((vector_size(16)));
    /* Four numbers from each of four places `from` bytes apart to four places `to` bytes apart, transposed. */
    static CYTHON_INLINE void fastce_transpose_float(const char* source, ptrdiff_t from, char* target, ptrdiff_t to) {
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
    static CYTHON_INLINE void fastce_transpose_double(const char* source, ptrdiff_t from, char* target, ptrdiff_t to) {
        fastce_double2 a, b, p, q;
        memcpy(&a, source, 16);
        memcpy(&b, source + from, 16);
        p = __builtin_shufflevector(a, b, 0, 2);
        q = __builtin_shufflevector(a, b, 1, 3);
        memcpy(target, &p, 16);
        memcpy(target + to, &q, 16);
    }
    #else
    static void fastce_transpose_float(const char* source, ptrdiff_t from, char* target, ptrdiff_t to) {
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 4; k++) memcpy(target + k * to + 4 * i, source + i * from + 4 * k, 4);
    }
    static void fastce_transpose_double(const char* source, ptrdiff_t from, char* target, ptrdiff_t to) {
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 2; k++) memcpy(target + k * to + 8 * i, source + i * from + 8 * k, 8);
    }
    #endif
    """
    void transpose_float "fastce_transpose_float"(
        const char* source, Py_ssize_t source_stride, char* target, Py_ssize_t target_stride) noexcept nogil
    void transpose_double "fastce_transpose_double"(
        const char* source, Py_ssize_t source_stride, char* target, Py_ssize_t target_stride) noexcept nogil


cdef enum:
    STRIP = 16  # numbers of 4 bytes in a cache line


cdef inline void transpose_block(
    const char* source, Py_ssize_t source_stride, char* target, Py_ssize_t target_stride, real like
) noexcept nogil:
    if real is float:
        transpose_float(source, source_stride, target, target_stride)
    else:
        transpose_double(source, source_stride, target, target_stride)


cdef inline void transpose_strip(
    const real* x, Py_ssize_t x_step, Py_ssize_t m, Py_ssize_t n, real* y, Py_ssize_t y_step
) noexcept nogil:
    """Do m <= 16 lines by blocks; neither m nor n is less than the side of a block."""
    cdef Py_ssize_t side = 16 // <Py_ssize_t>sizeof(real)
    cdef Py_ssize_t i, j, k = 0
    while k < n:
        k = min(k, n - side)
        if m == STRIP:
            for j in range(STRIP // side):  # constants, or the loop is not unrolled
                i = j * side
                transpose_block(
                    <const char*>(x + i * x_step + k), x_step * sizeof(real), <char*>(y + k * y_step + i),
                    y_step * sizeof(real), y[0])
        else:
            i = 0
            while i < m:
                i = min(i, m - side)
                transpose_block(
                    <const char*>(x + i * x_step + k), x_step * sizeof(real), <char*>(y + k * y_step + i),
                    y_step * sizeof(real), y[0])
                i += side
        k += side


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
            i = max(0, min(i, m - side))
            transpose_strip(x + i * x_step, x_step, min(STRIP, m - i), n, y + i, y_step)
            i += STRIP
    elif x_step == n and (n == 2 or n == 3):
        split(x, m, n, y, y_step)
    elif y_step == m and (m == 2 or m == 3):
        join(x, x_step, m, n, y)
    else:
        for k in range(n):
            for i in range(m):
                y[k * y_step + i] = x[i * x_step + k]
