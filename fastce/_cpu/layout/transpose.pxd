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
from fastce._cpu.layout.convert cimport Format, load_array, store_array
from fastce._cpu.math cimport real

cdef extern from "simd/transpose.h" nogil:
    void transpose_strip "fastce_transpose"(
        const void* x, Py_ssize_t x_step, Py_ssize_t m, Py_ssize_t n, void* y, Py_ssize_t y_step)


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
