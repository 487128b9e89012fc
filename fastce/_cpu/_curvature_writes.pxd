"""The last pass of the curvature kernel over a unit: from exponentials to products, gradients and diagonals."""
from libc.math cimport fabs
from libc.stdint cimport int32_t, int64_t

from fastce._cpu._curvature_sweep cimport Moments
from fastce._cpu._math cimport exp_unit, real
from fastce._cpu._scalars cimport Scalars, cap_factor_of, find_upstream, needs_gradient
from fastce._cpu._task cimport Task
from fastce._cpu._tiles cimport *
from fastce._cpu._units cimport RowGroup, tile_of, w_tile, weights_at


# What is multiplied or added lane by lane in the last pass.
cdef enum:
    ALPHA = 0    # of the gradient, as in `_scalars`
    BETA = 1
    GAMMA = 2
    GRAD_PATCH = 3     # the gradient at the patch class
    FIRST = 4    # of w - w_top, at most 1; of e (s - e)
    OTHER = 5    # what is added to that; of e^2
    W_AT_MAX = 6
    AT_MAX = 7   # the diagonal's first factor times `rest`
    TOTAL = 8    # s
    LAST = AT_MAX     # of a product: of e
    UNSCALE = TOTAL   # of a product: undoes the scale of w
    N_FACTORS = 9


cdef struct Factors:
    double of[N_FACTORS][LANES]
    int32_t patch_class[LANES]
    int32_t kept[LANES]


cdef inline void find_factors(
    const Task* task, const Scalars* rows, const Moments* moments, Factors* factors, real like
) noexcept nogil:
    """Turn the sums into the factors of the last pass; `finish` came before."""
    cdef double scale = task.logit_scale
    cdef double z_slope = 2 * task.z_loss * task.curvature.z_factor
    cdef double upstream[LANES]
    cdef double inverse, last, shift
    cdef int64_t is_large = 0
    cdef Py_ssize_t j
    find_upstream(task, rows, upstream)
    for j in range(LANES):
        factors.of[ALPHA][j] = rows.alpha[j]
        factors.of[BETA][j] = rows.beta[j]
        factors.of[GAMMA][j] = rows.gamma[j]
        factors.of[GRAD_PATCH][j] = rows.grad_patch[j]
        factors.of[W_AT_MAX][j] = moments.w_at_max[j]
    if task.is_product:
        for j in range(LANES):
            inverse = 1 / (1 + rows.sumexp_excl_max[j])
            shift = scale * (moments.moment[j] / exp_unit(like)) * inverse  # the mean's distance from w_top
            factors.of[FIRST][j] = rows.alpha[j] * scale
            factors.of[OTHER][j] = -rows.alpha[j] * shift
            if z_slope != 0:
                factors.of[OTHER][j] += upstream[j] * z_slope * inverse * (scale * moments.w_at_max[j] + shift)
        fill(factors.of[LAST], 0, LANES, 1 / <double>exp_unit(like))
        for j in range(LANES):
            factors.of[UNSCALE][j] = moments.unscale[j]
        # What is more than 1 comes last: w alone may be near to the largest number.
        for j in range(LANES):
            is_large |= <int64_t>(fabs(factors.of[FIRST][j]) > 1)
        if is_large:
            for j in range(LANES):
                last = max(fabs(factors.of[FIRST][j]), 1)
                factors.of[FIRST][j] /= last
                factors.of[OTHER][j] /= last
                factors.of[LAST][j] *= last
    else:
        for j in range(LANES):
            inverse = 1 / (1 + rows.sumexp_excl_max[j])
            factors.of[FIRST][j] = task.curvature.factor * rows.alpha[j] * scale * inverse
            factors.of[OTHER][j] = upstream[j] * z_slope * scale * inverse * inverse
            factors.of[AT_MAX][j] = factors.of[FIRST][j] * rows.sumexp_excl_max[j]
            factors.of[TOTAL][j] = 1 + rows.sumexp_excl_max[j]
    for j in range(LANES):
        factors.patch_class[j] = <int32_t>rows.patch_class[j]
        factors.kept[j] = <int32_t>rows.kept[j]


cdef inline void gradient_tile(
    const Task* task, const RowGroup* unit, Py_ssize_t t, const real* factors, const int32_t* patch_classes,
    Py_ssize_t patch_class, real* grad
) noexcept nogil:
    """Write the gradient; `patch_class` is that of a single row."""
    cdef real y[TILE]
    cdef real like = factors[0]
    cdef const real* e = tile_of(&unit.exps, t, like)
    cdef int32_t k = <int32_t>(t * (TILE // LANES))
    cdef Py_ssize_t g, j
    if task.sum_weight or task.sum_prob:
        write_gradient(
            e, factors + 16 * ALPHA, factors + 16 * BETA, weights_at(task, t, y), factors + 16 * GAMMA,
            tile_of(&unit.prob, t, like) if task.sum_prob else NULL, grad)
    else:
        scale_exp(e, factors + 16 * ALPHA, grad)
    if task.softcap != 0:
        product(grad, tile_of(&unit.slopes, t, like), y)
        copy(y, grad)
    if not task.by_rows:
        for g in range(TILE // LANES):
            for j in range(LANES):
                grad[16 * g + j] = factors[16 * GRAD_PATCH + j] if patch_classes[j] == k + g else grad[16 * g + j]
    elif t * TILE <= patch_class and patch_class < t * TILE + TILE:
        grad[patch_class - t * TILE] = factors[16 * GRAD_PATCH]


cdef inline void product_tile(
    const Task* task, const RowGroup* unit, Py_ssize_t t, const real* factors, const real* grad, real* out
) noexcept nogil:
    """Write the product of the Hessian and v."""
    cdef real buffer[TILE]
    cdef real y[TILE]
    cdef real bend = <real>(-2 * cap_factor_of(task))
    cdef const real* e = tile_of(&unit.exps, t, bend)
    cdef const real* w = w_tile(task, unit, t, buffer)
    cdef const real* v
    cdef const real* u
    cdef const real* slope
    cdef Py_ssize_t g, j
    for g in range(TILE // LANES):
        for j in range(LANES):
            y[16 * g + j] = e[16 * g + j] * factors[16 * LAST + j] * (
                factors[16 * FIRST + j] * (w[16 * g + j] - factors[16 * W_AT_MAX + j]) + factors[16 * OTHER + j])
    if unit.scales_w:
        for g in range(TILE // LANES):
            for j in range(LANES):
                y[16 * g + j] = y[16 * g + j] * factors[16 * UNSCALE + j]
    if task.softcap == 0:
        copy(y, out)
        return
    v = tile_of(&unit.v, t, bend)
    u = tile_of(&unit.x, t, bend)
    slope = tile_of(&unit.slopes, t, bend)
    for j in range(TILE):
        out[j] = y[j] * slope[j] + bend * u[j] * grad[j] * v[j]


cdef inline void diagonal_tile(
    const Task* task, const RowGroup* unit, Py_ssize_t t, const real* factors, const real* grad, real* out
) noexcept nogil:
    """Write the diagonal of the curvature that was chosen."""
    cdef real y[TILE]
    cdef real unit_of_exp = exp_unit(factors[0])
    cdef real unscale = <real>1 / unit_of_exp
    cdef real bend = <real>(-2 * cap_factor_of(task))
    cdef real least = <real>task.curvature.floor
    cdef real value, p
    cdef const real* e = tile_of(&unit.exps, t, unscale)
    cdef const real* slope
    cdef const real* u
    cdef Py_ssize_t g, j
    if task.curvature.absolute:
        for j in range(TILE):
            y[j] = -grad[j] if grad[j] < 0 else grad[j]
    else:
        for g in range(TILE // LANES):
            for j in range(LANES):
                p = e[16 * g + j] * unscale
                value = factors[16 * FIRST + j] * (factors[16 * TOTAL + j] - p)
                value = factors[16 * AT_MAX + j] if p == 1 else value
                y[16 * g + j] = p * (value + factors[16 * OTHER + j] * p)
        if task.softcap != 0:
            slope = tile_of(&unit.slopes, t, unscale)
            for j in range(TILE):
                y[j] = y[j] * slope[j] * slope[j]
            if task.curvature.bends:
                u = tile_of(&unit.x, t, unscale)
                for j in range(TILE):
                    y[j] = y[j] + bend * u[j] * grad[j]
    for j in range(TILE):
        out[j] = least if y[j] < least else y[j]  # NaN stays


cdef inline void clear_skipped(const int32_t* kept, real* tile) noexcept nogil:
    cdef Py_ssize_t g, j
    for g in range(TILE // LANES):
        for j in range(LANES):
            tile[16 * g + j] = <real>0 if kept[j] == 0 else tile[16 * g + j]


cdef inline void write_unit(
    const Task* task, const RowGroup* unit, Py_ssize_t lane, const Scalars* rows, const Factors* given, real like
) noexcept nogil:
    """Do the last pass."""
    cdef real factors[N_FACTORS * LANES]
    cdef real grad[TILE]
    cdef real y[TILE]
    cdef bint is_product = task.is_product, has_gradient = needs_gradient(task)
    cdef bint clears = rows.n_kept < LANES and not task.by_rows
    cdef Py_ssize_t j, k, t
    for k in range(N_FACTORS):
        if task.by_rows:
            fill(factors, 16 * k, 16 * k + 16, <real>given.of[k][lane])
        else:
            for j in range(LANES):
                factors[16 * k + j] = <real>given.of[k][j]
    for t in range(task.n_tiles):
        if has_gradient:
            gradient_tile(task, unit, t, factors, given.patch_class, rows.patch_class[lane], grad)
        if is_product:
            product_tile(task, unit, t, factors, grad, y)
            if clears:
                clear_skipped(given.kept, y)
            copy(y, tile_of(&unit.out, t, like))
            continue
        diagonal_tile(task, unit, t, factors, grad, y)
        if clears:
            clear_skipped(given.kept, y)
            clear_skipped(given.kept, grad)
        copy(grad, tile_of(&unit.out, t, like))
        copy(y, tile_of(&unit.hess, t, like))


cdef inline void clear_unit(const Task* task, const RowGroup* unit, real like) noexcept nogil:
    """Write zeros for a row that is skipped."""
    cdef Py_ssize_t t
    for t in range(task.n_tiles):
        fill(tile_of(&unit.out, t, like), 0, TILE, <real>0)
        if not task.is_product:
            fill(tile_of(&unit.hess, t, like), 0, TILE, <real>0)
