"""The loops of the plain column kernel over a tile: 64 staged rows, class by class.

Design
------
1. Every plain loop over rows stores one array, or GCC leaves it scalar. Accumulators and what they are compared with
   are local arrays, or GCC tests for overlap in every turn and keeps them in memory: three times slower.
2. The gradients of the targets are put in by comparing each class with them: GCC would make scatter instructions of
   indexed stores, which are slow. The targets' logits are picked likewise, unless the classes are many.
3. Of two classes, one is the largest and the other the rest: one exponential does, and one gradient is the other's
   negative.
"""
from libc.stdint cimport int32_t
from libc.string cimport memcpy

from fastce._cpu._exp_tile cimport LANES, TILE, fold_groups  # and for its functions in C
from fastce._cpu._math cimport exp, real
from fastce._cpu._plain_stage cimport Feed, fetch_piece
from fastce._cpu._registers cimport HAS_REGISTERS
from fastce._cpu._tiles cimport fill

cdef extern from "simd/few.h" nogil:
    void tops_and_peaks_floats "fastce_tops_and_peaks"(
        const float* x, Py_ssize_t pitch, int n_classes, const int32_t* y, bint pick, float* top, float* x_peak
    )
    void gather_peaks_floats "fastce_gather_peaks"(
        const float* x, Py_ssize_t pitch, const int32_t* y, float* x_peak)
    void exp_and_sum_floats "fastce_exp_and_sum"(
        float* x, Py_ssize_t pitch, int n_rows, int n_classes, const float* top, const int32_t* y, float* others,
        Feed* feed
    )
    void exp_and_sum_part_floats "fastce_exp_and_sum_part"(
        float* x, Py_ssize_t pitch, int n_rows, int n_classes, const float* top, const int32_t* y, float* others,
        Feed* feed
    )
    void scale_and_put_floats "fastce_scale_and_put"(
        const float* x, Py_ssize_t pitch, Py_ssize_t n, int n_classes, const float* alpha, const int32_t* y,
        const float* grad_peak, float* out, Py_ssize_t out_pitch)

cdef enum:
    FEW_TO_PICK = 16  # classes up to which comparing all with the target is faster than 64 indexed loads


cdef inline void find_tops(const real* x, Py_ssize_t pitch, Py_ssize_t n_classes, real* top) noexcept nogil:
    """Write the maximum of 64 rows."""
    cdef real m[TILE]
    cdef Py_ssize_t j, k
    memcpy(m, x, sizeof(m))
    for k in range(1, n_classes):
        for j in range(TILE):
            m[j] = x[k * pitch + j] if x[k * pitch + j] > m[j] else m[j]
    memcpy(top, m, sizeof(m))


cdef inline void pick_peaks(
    const real* x, Py_ssize_t pitch, Py_ssize_t n_classes, const int32_t* y, real* x_peak
) noexcept nogil:
    """Write the logits of the targets of 64 rows, and 0 for rows without."""
    cdef real p[TILE]
    cdef int32_t t[TILE]
    cdef Py_ssize_t j
    cdef int32_t k
    cdef real logit
    memcpy(t, y, sizeof(t))
    for j in range(TILE):
        p[j] = 0
    for k in range(<int32_t>n_classes):
        for j in range(TILE):
            logit = x[k * pitch + j]  # here, or the load would be conditional, and with SSE2 scalar
            p[j] = logit if t[j] == k else p[j]
    memcpy(x_peak, p, sizeof(p))


cdef inline void find_tops_and_peaks(
    const real* x, Py_ssize_t pitch, Py_ssize_t n_classes, const int32_t* y, real* top, real* x_peak
) noexcept nogil:
    """Write the maximum of 64 rows, and the logits of their targets, anything finite for rows without."""
    cdef bint pick = n_classes <= FEW_TO_PICK
    cdef Py_ssize_t j
    if real is float:
        if HAS_REGISTERS:
            if pick:
                tops_and_peaks_floats(x, pitch, <int>n_classes, y, True, top, x_peak)
            else:
                tops_and_peaks_floats(x, pitch, <int>n_classes, y, False, top, x_peak)
                gather_peaks_floats(x, pitch, y, x_peak)
            return
    find_tops(x, pitch, n_classes, top)
    if pick:
        pick_peaks(x, pitch, n_classes, y, x_peak)
    else:
        for j in range(TILE):
            x_peak[j] = x[max(y[j], 0) * pitch + j]


cdef inline void shift_and_scale(
    real* x, Py_ssize_t pitch, Py_ssize_t n_classes, real scale, real* shift
) noexcept nogil:
    """Replace x by scale * (x - shift), and the shift by 0."""
    cdef Py_ssize_t j, k
    for k in range(n_classes):
        for j in range(TILE):
            x[k * pitch + j] = scale * (x[k * pitch + j] - shift[j])
    for j in range(TILE):
        shift[j] = 0


cdef inline void exp_classes(
    real* x, Py_ssize_t pitch, Py_ssize_t n_rows, int n, const real* top, const int32_t* y, int32_t k, real* others,
    Feed* feed
) noexcept nogil:
    """Do the part of `exp_and_sum` for 4, 2 or 1 classes from class k on, and fetch as many pieces, spread evenly."""
    cdef real e[LANES]
    cdef int32_t t[LANES]
    cdef int32_t g
    cdef Py_ssize_t i = 0, j
    while i < n_rows:
        memcpy(t, y + i, sizeof(t))
        for g in range(n):
            for j in range(LANES):
                e[j] = exp(x[(k + g) * pitch + i + j] - top[i + j])
            for j in range(LANES):
                x[(k + g) * pitch + i + j] = <real>0 if t[j] == k + g else e[j]
        fold_groups(x + k * pitch + i, pitch, n, others + i)
        i += LANES
        if i % (TILE // n) == 0:
            fetch_piece(feed, sizeof(real))


cdef inline void exp_and_sum(
    real* x, Py_ssize_t pitch, Py_ssize_t n_rows, Py_ssize_t n_classes, const real* top, const int32_t* y, real* others,
    Feed* feed
) noexcept nogil:
    """Turn the logits of 16, 32, 48 or 64 rows into exponentials, but 0 for the targets; write their sums."""
    cdef int32_t k = 0
    if real is float:
        if HAS_REGISTERS:
            if n_rows == TILE:
                exp_and_sum_floats(x, pitch, TILE, <int>n_classes, top, y, others, feed)
            else:
                exp_and_sum_part_floats(x, pitch, <int>n_rows, <int>n_classes, top, y, others, feed)
            return
    fill(others, 0, TILE, <real>0)
    while k + 4 <= n_classes:
        exp_classes(x, pitch, n_rows, 4, top, y, k, others, feed)
        k += 4
    if k + 2 <= n_classes:
        exp_classes(x, pitch, n_rows, 2, top, y, k, others, feed)
        k += 2
    if k < n_classes:
        exp_classes(x, pitch, n_rows, 1, top, y, k, others, feed)


cdef inline void scale_and_put(
    const real* x, Py_ssize_t pitch, Py_ssize_t n, Py_ssize_t n_classes, const real* alpha, const int32_t* y,
    const real* grad_peak, real* out, Py_ssize_t out_pitch
) noexcept nogil:
    """Turn the exponentials of n rows, whole tiles of them, into gradients."""
    cdef Py_ssize_t j
    cdef int32_t k
    cdef real g, p
    if real is float:
        if HAS_REGISTERS:
            scale_and_put_floats(x, pitch, n, <int>n_classes, alpha, y, grad_peak, out, out_pitch)
            return
    for k in range(<int32_t>n_classes):
        for j in range(n):
            g = x[k * pitch + j] * alpha[j]
            p = grad_peak[j]  # here, or the load would be conditional
            out[k * out_pitch + j] = p if y[j] == k else g


cdef inline void exp_pairs(const real* x, Py_ssize_t pitch, real scale, real* top, real* rest) noexcept nogil:
    """Do what `find_tops` and `exp_and_sum` do, for 64 rows of two classes: the rest is the smaller one's term."""
    cdef real m[TILE]
    cdef real d[TILE]
    cdef Py_ssize_t j
    for j in range(TILE):
        m[j] = x[pitch + j] if x[pitch + j] > x[j] else x[j]
    for j in range(TILE):
        d[j] = (x[j] if x[pitch + j] > x[j] else x[pitch + j]) - m[j]
    for j in range(TILE):
        rest[j] = exp(scale * d[j])
    memcpy(top, m, sizeof(m))


cdef inline void put_pairs(const real* grad_peak, const int32_t* y, real* x, Py_ssize_t pitch) noexcept nogil:
    """Write the gradients of 64 rows of two classes: one is the other's negative."""
    cdef Py_ssize_t j
    for j in range(TILE):
        x[j] = grad_peak[j] if y[j] == 0 else -grad_peak[j]
    for j in range(TILE):
        x[pitch + j] = -x[j]
