"""From exponentials to the gradient of a block of classes, of one row or of 16 rows side by side."""
from libc.float cimport DBL_MIN, FLT_MIN
from libc.math cimport fabs
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from fastce._cpu.kernel.blocks cimport combine_gradient, multiply, multiply_by
from fastce._cpu.kernel.row_view cimport weight_block
from fastce._cpu.kernel.scalars cimport Scalars, unscaled_exp
from fastce._cpu.lanes cimport LANES, fill, narrow
from fastce._cpu.math cimport difference, exp_unit, real
from fastce._cpu.task cimport Task


cdef inline void fill_lanes_of(
    bint by_rows, const double* values, Py_ssize_t lane, real* lanes
) noexcept nogil:
    """Write the numbers of 16 rows, or that of one row 16 times."""
    if by_rows:
        fill(lanes, 0, LANES, <real>values[lane])
    else:
        narrow(values, lanes)


cdef inline void find_alpha(
    const Task* task, bint by_rows, const Scalars* rows, Py_ssize_t lane, const double* block_max, double* alpha
) noexcept nogil:
    """Write the factors of exponentials that are relative to `block_max`."""
    cdef Py_ssize_t j, n = 1 if by_rows else LANES
    memcpy(alpha, rows.alpha + lane, n * sizeof(double))
    if block_max == rows.row_max + lane:
        return
    for j in range(n):
        if block_max[j] != rows.row_max[lane + j]:
            alpha[j] *= unscaled_exp(difference(block_max[j], rows.row_max[lane + j], task.scale))


cdef inline void free_tiny(
    bint by_rows, const double* alpha, double least, double unit, Py_ssize_t n, real* e, double* left
) noexcept nogil:
    """Free exponentials of `exp_unit` where alpha, freed of it, would be subnormal: those of that row, of 16, alone."""
    cdef real units[LANES]
    cdef Py_ssize_t j
    if by_rows:
        multiply(e, n, unit)
        left[0] = 1
        return
    for j in range(LANES):
        units[j] = 1
        if fabs(alpha[j]) < least and alpha[j] != 0:
            units[j] = <real>unit
            left[j] = 1
    multiply_by(e, NULL, n, units, e)


cdef inline double write_gradient(
    const Task* task, bint by_rows, const Scalars* rows, Py_ssize_t lane, const double* alpha, Py_ssize_t start,
    Py_ssize_t n, real* e, const real* t
) noexcept nogil:
    """Turn n exponentials, from class `start` on, into the gradient; return a factor that is left to multiply by.

    alpha of them are in the gradient, one number or 16; t are the probabilities of their classes, if there are any.
    """
    cdef real a[LANES]
    cdef real beta[LANES]
    cdef real gamma[LANES]
    cdef double unit = 1 / <double>exp_unit(e[0])
    cdef double left[LANES]  # to multiply alpha by
    cdef double least = FLT_MIN if real is float else DBL_MIN
    cdef Py_ssize_t j
    cdef int64_t is_tiny = False
    for j in range(1 if by_rows else LANES):
        is_tiny |= <int64_t>(fabs(alpha[j]) * unit < least) & <int64_t>(alpha[j] != 0)
    fill(left, 0, LANES, unit)
    if is_tiny:
        free_tiny(by_rows, alpha, least / unit, unit, n, e, left)
    if by_rows and not (task.sum_weight or task.sum_prob):
        return alpha[0] * left[0]
    for j in range(LANES):
        a[j] = <real>(alpha[0 if by_rows else j] * left[0 if by_rows else j])
    if not (task.sum_weight or task.sum_prob):
        multiply_by(e, NULL, n, a, e)
        return 1
    fill_lanes_of(by_rows, rows.beta, lane, beta)
    fill_lanes_of(by_rows, rows.gamma, lane, gamma)
    combine_gradient(by_rows, e, n, a, beta, weight_block(task, start, e[0]), gamma, t)
    return 1
