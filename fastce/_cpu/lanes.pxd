"""Lanes and sums over them, see `simd/sums.h`.

Design
------
1. C chooses the function for float or double by the type of the array it is given.
2. The largest term of a sum of exponentials is exactly `exp_unit`. Where it outweighs the others, loss and gradient
   come from a sum that leaves it out, `EXCL_MAX`, and so keeps the digits of the others however small they are. `ALL`
   is enough elsewhere, and where the sum can be repeated it alone is formed first: `EXCL_MAX` took a fifth of the time.
3. Sums of logits run at 2^-16 of their size (`D_UNIT`), so that a block of 3e38 in one lane does not overflow.
"""
from fastce._cpu.math cimport exp_unit, real
from fastce._cpu.task cimport Task, is_curvature

cdef enum:
    LANES = 16
    TILE = 64
    NO_CLASS = 0x7FFFFFFF

cdef extern from "simd/sums.h" nogil:
    const double D_UNIT "FASTCE_D_UNIT"  # of sums of d
    void fill "fastce_fill_range"(void* x, Py_ssize_t start, Py_ssize_t stop, double value)
    void widen "fastce_widen"(const void* lanes, double* wide)
    void narrow "fastce_narrow"(const double* wide, void* lanes)
    double wide_lane_sum "fastce_wide_lane_sum"(const double* lanes)
    bint is_less_than_twice "fastce_needs_excl_max"(double all_terms, double unit)
    # Which sums label smoothing and class probabilities ask for.
    ctypedef struct AskedSums "fastce_asked_sums":
        bint w_d
        bint has_zero_w  # among the weights
        bint has_w       # else all weights are 1
        bint t_d         # and T, besides WT and WT_D


cdef inline bint needs_excl_max(double all_terms, real like) noexcept nogil:
    """Return True if a sum of exponentials is less than twice its largest term: only there does 1 - p cancel."""
    return is_less_than_twice(all_terms, exp_unit(like))


cdef inline double choose_excl_max(double all_terms, double excl_max, real like) noexcept nogil:
    """Return the sum of exponentials without one of the largest, from those with all and, if needed, with none."""
    return (excl_max if needs_excl_max(all_terms, like) else all_terms - exp_unit(like)) / exp_unit(like)


cdef inline AskedSums asked_sums(const Task* task) noexcept nogil:
    """Return which sums label smoothing and class probabilities ask for."""
    cdef AskedSums asked
    asked.w_d = task.sum_weight and not is_curvature(task)
    asked.has_zero_w = task.has_zero_weight
    asked.has_w = task.weight != NULL
    asked.t_d = task.log_prob != NULL
    return asked
