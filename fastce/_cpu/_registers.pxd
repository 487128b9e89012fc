"""Registers of floats, where AVX2 or AVX-512 are to be had: what loops in C need to name them.

Compilers see the arrays of Cython's loops and keep results in memory that should stay in registers. Loops that lose
most by that are written in C for float, in `_exp_tile` and `_plain_tile`, for registers of whatever width; double and
the baseline have plain loops, whose arithmetic takes longer than that.
"""

cdef extern from "simd/simd.h" nogil:
    ctypedef enum Format "fastce_format":
        NATIVE "FASTCE_NATIVE"      # the arithmetic's
        FLOAT "FASTCE_FLOAT"
        DOUBLE "FASTCE_DOUBLE"
        HALF "FASTCE_HALF"          # IEEE binary16
        BFLOAT16 "FASTCE_BFLOAT16"  # the upper half of a float
    const bint HAS_REGISTERS "FASTCE_HAS_REGISTERS"
    double sum_lanes_of_floats "fastce_sum_lanes"(const float* x)
    # of n >= 64 floats, or numbers of 16 bits
    float max_of_floats "fastce_max"(Format format, const void* x, Py_ssize_t n)
    double max_of_doubles "fastce_max_of_doubles"(const double* x, Py_ssize_t n)
    float max_lanes_of_floats "fastce_max_lanes"(const float* x)
