"""The scalars of rows in the plain column kernel: targets, losses, and what makes gradients of exponentials.

Design
------
1. Every plain loop over rows stores one array, or GCC leaves it scalar; for 16 rows that is one vector or two, which
   stay in registers from loop to loop.
2. Nothing is divided that need not be: with 10 classes this file is a quarter of all work, and a division of 512 bits
   keeps Zen 4 busy for ten cycles, an estimate and its correction for three.
"""
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.string cimport memcpy

from fastce._cpu._few cimport any_negative, invert
from fastce._cpu._formula cimport grad_alpha, grad_of_only_class, nan_unless_finite, row_loss, sumexp_excl
from fastce._cpu._math cimport HAS_FMA, exp_unit, join_log1p, real, split_log1p
from fastce._cpu._prefetch cimport CACHE_LINE, prefetch
from fastce._cpu._task cimport Task
from fastce._cpu._tiles cimport LANES, TILE, exp_and_fold, fill, wide_lane_sum

cdef enum:
    TARGETS_AHEAD = 256  # rows; they come from memory, for nothing has read them for the length of a sweep


cdef inline bint read_targets(const Task* task, Py_ssize_t start, Py_ssize_t n, int32_t* y) noexcept nogil:
    """Write the targets of n rows, and -1 for rows that are skipped or fill up the tile; return True if any is."""
    cdef int64_t last[TILE]
    cdef const int64_t* target = task.target + start
    cdef int64_t ignored = task.ignore_index
    cdef uint32_t n_classes = <uint32_t>task.n_classes
    cdef int32_t k
    cdef int is_kept
    cdef Py_ssize_t j
    for j in range(TILE * <Py_ssize_t>sizeof(int64_t) // CACHE_LINE):
        prefetch(<const char*>(target + TARGETS_AHEAD) + j * CACHE_LINE)
    if n < TILE:
        for j in range(TILE):
            last[j] = ignored
        memcpy(last, target, n * sizeof(int64_t))
        target = last
    # Checked again, for another thread may have written to the targets since: a class is an index from here on. What is
    # checked is the number that is stored.
    for j in range(TILE):
        k = <int32_t>target[j]
        is_kept = <int>(target[j] != ignored) & <int>(<uint32_t>k < n_classes)
        y[j] = k if is_kept else -1
    return any_negative(y)


cdef inline void finish_lanes(
    real scale, double factor, bint is_pair, bint with_grad, const int32_t* y, bint has_skipped, const real* row_max,
    const real* x_patch, const real* terms, real* loss, real* alpha, real* grad_patch
) noexcept nogil:
    """Turn the terms of 16 rows, times exp_unit, into losses and, if asked, what makes gradients of exponentials.

    They are the sums of all terms but the targets', or of two classes the smaller one's term.
    """
    cdef real d[LANES]       # of the target
    cdef real zeros[LANES]
    cdef real e[LANES]       # its term; of two classes the smaller one's
    cdef real others[LANES]  # all terms but that
    cdef real rest[LANES]    # all terms but the largest one's, which is 1
    cdef real whole[LANES]
    cdef real inverse[LANES]
    cdef real k[LANES]
    cdef real f[LANES]
    cdef real lost[LANES]
    cdef real s[LANES]
    cdef real p[LANES]
    cdef real k_j, f_j, lost_j
    cdef real one = exp_unit(scale)
    cdef real unit = <real>1 / one
    cdef real unscaled = <real>(factor * unit)  # the factor of the gradient, freed of `exp_unit`
    cdef Py_ssize_t j
    for j in range(LANES):
        d[j] = scale * (x_patch[j] - row_max[j])
    if is_pair:
        for j in range(LANES):
            e[j] = terms[j] + nan_unless_finite(row_max[j])
        for j in range(LANES):
            others[j] = e[j] if x_patch[j] == row_max[j] else one
        for j in range(LANES):
            rest[j] = e[j] * unit
        for j in range(LANES):
            whole[j] = <real>1 + rest[j]
    else:
        fill(zeros, 0, LANES, <real>0)
        exp_and_fold(d, LANES, 1, zeros, <real>1, e, LANES, NULL, NULL)
        for j in range(LANES):
            others[j] = terms[j]
        for j in range(LANES):
            rest[j] = sumexp_excl(others[j], e[j], one) * unit
        for j in range(LANES):
            whole[j] = (others[j] + e[j]) * unit
    invert(whole, inverse)
    for j in range(LANES):
        split_log1p(rest[j], inverse[j], &k_j, &f_j, &lost_j)
        k[j] = k_j
    for j in range(LANES):
        split_log1p(rest[j], inverse[j], &k_j, &f_j, &lost_j)
        f[j] = f_j
    for j in range(LANES):
        split_log1p(rest[j], inverse[j], &k_j, &f_j, &lost_j)
        lost[j] = lost_j
    for j in range(LANES):
        s[j] = <real>2 + f[j]
    invert(s, s)
    for j in range(LANES):
        s[j] = f[j] * s[j]
    for j in range(LANES):
        loss[j] = row_loss(<real>1, d[j], join_log1p(k[j], f[j], s[j], lost[j]))
    if has_skipped:
        for j in range(LANES):
            loss[j] = <real>0 if y[j] < 0 else loss[j]
    if not with_grad:
        return
    # 1 - p from terms times exp_unit: tiny ones are no normal numbers without. Divided, so that it is 1 exactly where
    # p is 0: with FMA the remainder corrects the product with the inverse.
    if HAS_FMA:
        for j in range(LANES):
            p[j] = others[j] * inverse[j]
        for j in range(LANES):
            grad_patch[j] = grad_of_only_class(p[j] + (others[j] - p[j] * whole[j]) * inverse[j], unscaled)
    else:
        for j in range(LANES):
            grad_patch[j] = grad_of_only_class(others[j] / whole[j], unscaled)
    for j in range(LANES):
        alpha[j] = grad_alpha(unscaled, <real>1, inverse[j])
    if has_skipped:
        for j in range(LANES):
            alpha[j] = <real>0 if y[j] < 0 else alpha[j]
        for j in range(LANES):
            grad_patch[j] = <real>0 if y[j] < 0 else grad_patch[j]


cdef inline double sum_of_part(const real* loss) noexcept nogil:
    """Return the sum of the losses of 64 rows."""
    cdef double sums[LANES]
    cdef Py_ssize_t j
    for j in range(LANES):
        sums[j] = (<double>loss[j] + loss[j + 16]) + (<double>loss[j + 32] + loss[j + 48])
    return wide_lane_sum(sums)


cdef inline void sum_losses(const Task* task, Py_ssize_t start, Py_ssize_t n, bint is_last, real* loss) noexcept nogil:
    """Sum the losses of rows 0 .. 63, 64 .. 127 and so on, so that no bit depends on where groups of rows begin.

    Those of n rows from `start` on follow in `loss` what the last call left there, start % 64 losses.
    """
    cdef Py_ssize_t i = 0, part = start // TILE
    n += start % TILE
    while i + TILE <= n:
        task.loss_parts[part] = sum_of_part(loss + i)
        part += 1
        i += TILE
    if i > 0:
        memcpy(loss, loss + i, TILE * sizeof(real))
    if is_last and i < n:
        fill(loss, n - i, TILE, <real>0)
        task.loss_parts[part] = sum_of_part(loss)
