"""Exponentials of a tile and their sums: the loop in which most of the time is spent.

Design
------
1. A tile is up to 4 groups of 16 lanes, `pitch` numbers apart: 64 classes of a row, or 4 classes of 16 rows. Groups are
   added to each other before they are added to the sums, as everywhere (see `_tiles`).
2. Between their exponentials and the sums the vectors stay in registers, where these have names: else the sums read
   what had just been stored, which took a third of the loop's time.
3. Numbers are looked up in a register: e^x = 2^n (1 + fraction) with n in sixteenths, with AVX2 in quarters, and a
   fraction so small that half of the polynomial of `_math` does, which took 0.8 and 0.9 of the time. Eighths with AVX2
   took 1.1 times as long as the polynomial: only within 4 floats does it look numbers up in one instruction.
"""
from fastce._cpu._math cimport exp, exp_unit, real
from fastce._cpu._registers cimport HAS_REGISTERS, Format

cdef extern from "simd/tile.h" nogil:
    void exp_and_fold_floats "fastce_exp_and_fold"(
        const float* x, Py_ssize_t pitch, int n_groups, const float* top, float scale, float* e, Py_ssize_t e_pitch,
        float* all_terms, float* rest)
    # n >= 64 classes of a row, floats or of 16 bits; asks for what lies as far behind `ahead`, numbers of so many bytes
    void exp_row_floats "fastce_exp_row"(
        Format format, const void* x, Py_ssize_t n, float top, float scale, float* e, const char* ahead,
        Py_ssize_t size, bint is_long, float* sums)


cdef enum:
    LANES = 16
    TILE = 64


cdef inline real unless_one(real e) noexcept nogil:
    return <real>0 if e == exp_unit(e) else e


cdef inline void fold_groups(const real* e, Py_ssize_t pitch, int n_groups, real* sums) noexcept nogil:
    cdef Py_ssize_t j
    if n_groups == 4:
        for j in range(LANES):
            sums[j] += (e[j] + e[pitch + j]) + (e[2 * pitch + j] + e[3 * pitch + j])
    elif n_groups == 2:
        for j in range(LANES):
            sums[j] += e[j] + e[pitch + j]
    else:
        for j in range(LANES):
            sums[j] += e[j]


cdef inline void fold_rest_of_groups(const real* e, Py_ssize_t pitch, int n_groups, real* rest) noexcept nogil:
    """Do the same without the terms that are 1."""
    cdef Py_ssize_t j
    if n_groups == 4:
        for j in range(LANES):
            rest[j] += (unless_one(e[j]) + unless_one(e[pitch + j])) + (
                unless_one(e[2 * pitch + j]) + unless_one(e[3 * pitch + j]))
    elif n_groups == 2:
        for j in range(LANES):
            rest[j] += unless_one(e[j]) + unless_one(e[pitch + j])
    else:
        for j in range(LANES):
            rest[j] += unless_one(e[j])


cdef inline void exp_and_fold(
    const real* x, Py_ssize_t pitch, int n_groups, const real* top, real scale, real* e, Py_ssize_t e_pitch,
    real* all_terms, real* rest
) noexcept nogil:
    """Write exp(scale * (x - top)) * exp_unit for 4, 2 or 1 groups of 16 lanes; add them to sums that are not NULL.

    `rest` goes without the terms that are 1; `e` may be `x`.
    """
    cdef Py_ssize_t g, j
    if real is float:
        if HAS_REGISTERS:
            exp_and_fold_floats(x, pitch, n_groups, top, scale, e, e_pitch, all_terms, rest)
            return
    for g in range(n_groups):
        if scale == 1:
            for j in range(LANES):
                e[g * e_pitch + j] = exp(x[g * pitch + j] - top[j])
        else:
            for j in range(LANES):
                e[g * e_pitch + j] = exp(scale * (x[g * pitch + j] - top[j]))
    if all_terms != NULL:
        fold_groups(e, e_pitch, n_groups, all_terms)
    if rest != NULL:
        fold_rest_of_groups(e, e_pitch, n_groups, rest)
