"""The type of the arithmetic, and the elementary functions of single numbers: see `simd/math.h`."""

cdef extern from "simd/math.h" nogil:
    double exp "fastce_exp_double"(double x)  # times exp_unit
    double difference "fastce_difference_double"(double x, double y, double scale)
    # The same functions for float and double: C chooses by the first argument.
    double log1p "fastce_log1p"(double x, double inverse)  # `inverse` is 1 / (1 + x)
    double sech2 "fastce_sech2"(double x)

ctypedef fused real:
    float
    double


cdef inline real exp_unit(real like) noexcept nogil:
    """Return what `exp` returns for 0; `like` only chooses the type."""
    if real is float:
        return <float>4294967296.0
    else:
        return 18446744073709551616.0
