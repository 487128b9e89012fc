"""The last pass of the curvature kernel over a unit: from sums to products, or to gradients and diagonals."""
from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from fastce._cpu.kernel.blocks cimport (
    AT_MAX, FIRST, INVERSE, LAST, N_FACTORS, OTHER, UNSCALE, W_AT_MAX, multiply, multiply_by, write_absolute,
    write_bent, write_diagonal, write_product
)
from fastce._cpu.kernel.curvature_sums cimport Moments
from fastce._cpu.kernel.gradient cimport fill_lanes_of, write_gradient
from fastce._cpu.kernel.scalars cimport Scalars, find_upstream
from fastce._cpu.kernel.units cimport Unit
from fastce._cpu.lanes cimport LANES, fill
from fastce._cpu.math cimport exp_unit, real
from fastce._cpu.task cimport Task


cdef struct Factors:
    double of[N_FACTORS][LANES]


cdef inline void find_factors(
    const Task* task, const Scalars* rows, const Moments* moments, Factors* factors, real like
) noexcept nogil:
    """Turn the sums into the factors of the last pass; `finish` came before."""
    cdef double scale = task.logit_scale
    cdef double z_slope = 2 * task.z_loss * task.curvature.z_factor
    cdef double upstream[LANES]
    cdef double inverse, first, last, shift
    cdef double least = 3.725290298461914e-09 / <double>exp_unit(like)  # 2^-28: the last factor has the rest
    cdef int64_t is_extreme = 0
    cdef Py_ssize_t j
    find_upstream(task, rows, upstream)
    for j in range(LANES):
        factors.of[W_AT_MAX][j] = moments.w_at_max[j]
    if task.is_product:
        for j in range(LANES):
            inverse = 1 / (1 + rows.sumexp_excl_max[j])
            shift = scale * (moments.moment[j] / exp_unit(like)) * inverse  # the mean's distance from w_at_max
            factors.of[FIRST][j] = rows.alpha[j] * scale
            factors.of[OTHER][j] = -rows.alpha[j] * shift
            if z_slope != 0:
                factors.of[OTHER][j] += upstream[j] * z_slope * inverse * (scale * moments.w_at_max[j] + shift)
        fill(factors.of[LAST], 0, LANES, 1 / <double>exp_unit(like))
        for j in range(LANES):
            factors.of[UNSCALE][j] = moments.unscale[j]
        # What is more than 1 comes last: w alone may be near to the largest number. So does what is too small: the
        # factor alone may be subnormal where the product is not.
        for j in range(LANES):
            first = fabs(factors.of[FIRST][j])
            is_extreme |= <int64_t>(first > 1) | <int64_t>(first < least)
        if is_extreme:
            for j in range(LANES):
                first = fabs(factors.of[FIRST][j])
                last = max(first, 1) if first >= least or first == 0 else first / least
                factors.of[FIRST][j] /= last
                factors.of[OTHER][j] /= last
                factors.of[LAST][j] *= last
    else:
        for j in range(LANES):
            inverse = 1 / (1 + rows.sumexp_excl_max[j])
            factors.of[FIRST][j] = task.curvature.factor * rows.alpha[j] * scale
            factors.of[OTHER][j] = upstream[j] * z_slope * scale * inverse * inverse
            factors.of[AT_MAX][j] = factors.of[FIRST][j] * rows.sumexp_excl_max[j] * inverse
            factors.of[INVERSE][j] = inverse


cdef inline void write_unit_gradient(
    const Task* task, const Unit* unit, Py_ssize_t lane, const Scalars* rows, real* grad
) noexcept nogil:
    """Turn exponentials into the gradient."""
    cdef real ones[LANES]
    cdef Py_ssize_t i, j
    cdef double factor = write_gradient(
        task, task.by_rows, rows, lane, &rows.alpha[lane], 0, unit.n, grad,
        <const real*>unit.prob if task.sum_prob else NULL)
    if factor != 1:
        multiply(grad, unit.n, factor)
    if task.softcap != 0:
        fill(ones, 0, LANES, <real>1)
        multiply_by(grad, <const real*>unit.slopes, unit.n, ones, grad)
    for j in range(1 if task.by_rows else rows.n):
        i = rows.patch_class[lane + j]
        if i >= 0:
            grad[i * unit.width + j] = <real>rows.grad_patch[lane + j]


cdef inline void write_unit_product(
    const Task* task, const Unit* unit, Py_ssize_t lane, const Scalars* rows, const Moments* moments,
    const real* factors
) noexcept nogil:
    cdef real* exps = <real*>unit.exps
    cdef real* straight = <real*>unit.scaled
    if task.softcap == 0:
        write_product(exps, <const real*>unit.w, unit.n, factors, moments.is_scaled, <real*>unit.out)
        return
    write_product(exps, <const real*>unit.w, unit.n, factors, moments.is_scaled, straight)
    write_unit_gradient(task, unit, lane, rows, exps)
    write_bent(
        straight, <const real*>unit.slopes, <const real*>unit.capped, exps, <const real*>unit.v, unit.n,
        -2 * task.cap_factor, -INFINITY, <real*>unit.out)


cdef inline void write_unit_diagonal(
    const Task* task, const Unit* unit, Py_ssize_t lane, const Scalars* rows, const real* factors
) noexcept nogil:
    """Write the gradient, and the diagonal of the curvature that was chosen."""
    cdef real* grad = <real*>unit.out
    cdef real* hess = <real*>unit.hess
    cdef double least = task.curvature.floor
    memcpy(grad, unit.exps, unit.n * sizeof(real))
    write_unit_gradient(task, unit, lane, rows, grad)
    if task.curvature.absolute:
        write_absolute(grad, unit.n, least, hess)
        return
    write_diagonal(<const real*>unit.exps, unit.n, factors, least if task.softcap == 0 else -INFINITY, hess)
    if task.softcap != 0:
        write_bent(
            hess, <const real*>unit.slopes, <const real*>unit.capped, grad, NULL, unit.n,
            -2 * task.cap_factor if task.curvature.bends else 0, least, hess)


cdef inline void clear_lane(const Unit* unit, Py_ssize_t lane, real* result) noexcept nogil:
    cdef Py_ssize_t k = lane
    while k < unit.n:
        result[k] = 0
        k += unit.width


cdef inline void write_unit(
    const Task* task, const Unit* unit, Py_ssize_t lane, const Scalars* rows, const Moments* moments,
    const Factors* given, real like
) noexcept nogil:
    """Do the last pass."""
    cdef real factors[N_FACTORS * LANES]
    cdef Py_ssize_t j, k
    cdef bint is_skipped = task.by_rows and rows.kept[lane] == 0
    for k in range(N_FACTORS):
        fill_lanes_of(task.by_rows, given.of[k], lane, &factors[16 * k])
    if is_skipped:
        pass
    elif task.is_product:
        write_unit_product(task, unit, lane, rows, moments, factors)
    else:
        write_unit_diagonal(task, unit, lane, rows, factors)
    if rows.n_kept == LANES:
        return
    for j in range(unit.width):
        if rows.kept[lane + j] == 0:
            clear_lane(unit, j, <real*>unit.out)
            if not task.is_product:
                clear_lane(unit, j, <real*>unit.hess)
