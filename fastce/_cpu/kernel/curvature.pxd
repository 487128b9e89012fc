"""Curvature kernel: products with the Hessian, or the gradient and a diagonal of curvature, in one sweep.

Design
------
1. What it works on are *units* (see `units`): a row whose classes fill the vector, or 16 rows side by side. The sums
   of exponentials are those of the row and the column kernel; the other loops do both, with factors of 16 lanes.
2. A unit goes through three passes while it is in cache: the maximum; exponentials, which wait in the workspace, and
   sums; the results.
3. With d = scale (f(x) - row_max), e = exp(d), s the sum of e and w = f'(x) v, the Hessian of a row is
   K (diag(p) - p p^T) + 2 z p p^T between two slopes, plus f'' times the gradient, and its product with v is

       slope e_k (first (w_k - w_at_max) + other) + bend_k grad_k v_k.

   w_at_max is that of the largest logit. Differences from the mean <p, w> would cancel in rows the model is sure of;
   those from w_at_max do not, and the mean's own distance from w_at_max is a sum over the other classes, the moment.
4. The diagonal has p (1 - p) = e / s (1 - e / s), where 1 - e / s is formed from the sum of the others for the largest
   term, and is at least 1/2 for others.
5. Gradient and scalars are those of the other kernels, `begin` and `finish`, which here leaves out the losses.
"""
from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from fastce._cpu.kernel.blocks cimport (
    AT_MAX, FIRST, INVERSE, LAST, N_FACTORS, OTHER, UNSCALE, W_AT_MAX, Block, cap, find_slopes, multiply, multiply_by,
    sum_moment, write_absolute, write_bent, write_diagonal, write_product
)
from fastce._cpu.kernel.columns cimport note_patch_logits
from fastce._cpu.kernel.gradient cimport fill_lanes_of, write_gradient
from fastce._cpu.kernel.rows cimport row_block
from fastce._cpu.kernel.scalars cimport (
    Scalars, begin, describe_argmax_patches, find_upstream, finish, needs_gradient, read_patch_logits
)
from fastce._cpu.kernel.sums cimport (
    PIECE, Totals, add_piece, begin_totals, describe_block, find_argmax, find_maxima, narrow_maxima,
    take_totals
)
from fastce._cpu.kernel.spec cimport KernelSpec, align, make_spec
from fastce._cpu.kernel.units cimport (
    Unit, load_all_groups, locate_unit, plan_units, store_all_groups, store_unit, units_bytes
)
from fastce._cpu.lanes cimport LANES, fill, wide_lane_sum
from fastce._cpu.layout.convert cimport NATIVE
from fastce._cpu.math cimport exp_unit, real
from fastce._cpu.task cimport Task, block_size


# What a product asks of 16 rows besides their `Scalars`; w is slope * v, the scale left out.
cdef struct Moments:
    double w_at_max[LANES]   # of the largest logit
    double moment[LANES]     # the sum of e (w - w_at_max)
    double unscale[LANES]    # what undoes the scale of w in both, a power of two; 1 but where they would overflow
    bint is_scaled           # whether any is not 1


cdef inline double small_scale(const Task* task) noexcept nogil:
    """Return a scale under which no difference of two w, times `exp_unit` and summed up in a lane, overflows."""
    return 3.552713678800501e-15 if task.is_float else 8.271806125530277e-25  # 2^-48, 2^-80


cdef inline void find_unit_maxima(
    const Task* task, const Unit* unit, Py_ssize_t lane, Scalars* rows, Moments* moments, real like
) noexcept nogil:
    """Find the largest logits and the w that belong to them."""
    cdef const real* x = <const real*>unit.capped
    cdef const real* w = <const real*>unit.w
    cdef Py_ssize_t i, j
    find_maxima(task.by_rows, NATIVE, x, unit.n, &rows.row_max[lane], like)
    if not (task.is_product or task.needs_argmax_patch):
        return
    find_argmax(task.by_rows, x, unit.n, 0, rows, lane)
    if task.is_product:
        for j in range(unit.width):
            i = rows.argmax[lane + j]
            moments.w_at_max[lane + j] = w[i * unit.width + j] if i >= 0 else 0


cdef inline void take_moments(
    const Task* task, Py_ssize_t lane, const double* found, Moments* moments
) noexcept nogil:
    """Take the moments of 16 rows, or of one from its 16 parts."""
    cdef Py_ssize_t j
    if task.by_rows:
        moments.moment[lane] = wide_lane_sum(found)
        return
    for j in range(LANES):
        if not moments.is_scaled or moments.unscale[j] != 1:  # others keep their bits when some are summed up again
            moments.moment[j] = found[j]


cdef inline void sum_unit(
    const Task* task, const Unit* unit, Py_ssize_t lane, Scalars* rows, Moments* moments, real like
) noexcept nogil:
    """Sum up exponentials, class probabilities and the moment, piece by piece; `lane` is that of a single row."""
    cdef double moment[LANES]
    cdef real row_max[LANES]
    cdef real w_at_max[LANES]
    cdef Py_ssize_t at, k = 0, size = sizeof(real)
    cdef bint by_rows = task.by_rows
    cdef Totals totals
    cdef Block b = describe_block(task, by_rows)
    b.is_long = True  # by L2: L1 has no room for two operands; 65536 x 1000 took a fifth longer
    b.ahead_size = b.ahead_t_size = size
    narrow_maxima(by_rows, &rows.row_max[lane], row_max)
    fill_lanes_of(by_rows, moments.w_at_max, lane, w_at_max)
    fill(moment, 0, LANES, <double>0)
    begin_totals(task, by_rows, &totals)
    while k < task.n_classes:
        at = k * unit.width
        b.n = block_size(task, k) if by_rows else min(task.n_classes - k, <Py_ssize_t>PIECE) * LANES
        b.x = <const real*>unit.capped + at
        b.e = <real*>unit.exps + at
        b.ahead = unit.ahead_x + at * size
        if task.sum_prob:
            b.t = <const real*>unit.prob + at
            b.ahead_t = unit.prob + at * size
        add_piece(task, by_rows, &b, k, row_max, &totals)
        if task.is_product:
            sum_moment(
                <const real*>b.e, <const real*>unit.w + at, b.n, w_at_max, unit.ahead_v + at * size, moment)
        k += b.n // unit.width
    take_totals(task, by_rows, False, &totals, <const real*>unit.exps, unit.n, rows, lane)
    take_moments(task, lane, moment, moments)


cdef inline bint overflows(const Task* task, const Scalars* rows, Py_ssize_t lane, Moments* moments) noexcept nogil:
    """Choose smaller scales for w in rows whose moment is not finite though it may be; return True if there are any."""
    cdef Py_ssize_t j, start = lane if task.by_rows else 0, stop = lane + 1 if task.by_rows else LANES
    cdef bint found = False
    cdef int64_t is_any = 0
    for j in range(LANES):
        is_any |= <int64_t>(moments.moment[j] - moments.moment[j] != 0)
    if not is_any:
        return False
    for j in range(start, stop):
        if moments.moment[j] - moments.moment[j] != 0 and rows.sumexp_excl_max[j] - rows.sumexp_excl_max[j] == 0:
            moments.unscale[j] = 1 / small_scale(task)
            moments.w_at_max[j] *= small_scale(task)
            found = True
    return found


cdef inline void sum_scaled_moment(
    const Task* task, Unit* unit, Py_ssize_t lane, Moments* moments, real like
) noexcept nogil:
    """Scale w, and sum up the moment again from the exponentials that are there."""
    cdef real scales[LANES]
    cdef real w_at_max[LANES]
    cdef double moment[LANES]
    cdef real* exps = <real*>unit.exps
    cdef real* w = <real*>unit.scaled
    cdef Py_ssize_t j, k = 0, n
    for j in range(LANES):
        scales[j] = <real>(1 / moments.unscale[lane if task.by_rows else j])
    fill_lanes_of(task.by_rows, moments.w_at_max, lane, w_at_max)
    multiply_by(<const real*>unit.w, NULL, unit.n, scales, w)
    unit.w = unit.scaled
    moments.is_scaled = True
    fill(moment, 0, LANES, <double>0)
    while k < unit.n:
        n = min(unit.n - k, <Py_ssize_t>PIECE * LANES)
        sum_moment(exps + k, w + k, n, w_at_max, unit.w + k * <Py_ssize_t>sizeof(real), moment)
        k += n
    take_moments(task, lane, moment, moments)


cdef inline void sweep_unit(
    const Task* task, Unit* unit, Py_ssize_t lane, Scalars* rows, Moments* moments, real like
) noexcept nogil:
    """Do the first passes; `lane` is that of a single row."""
    cdef real ones[LANES]
    if task.softcap != 0:
        find_slopes(<const real*>unit.x, unit.n, task.cap_factor, <real*>unit.slopes)
    if not task.by_rows and needs_gradient(task):
        note_patch_logits(task, rows, 0, task.n_classes, <real*>unit.x)  # caps them too
    elif task.softcap != 0:
        cap(<const real*>unit.x, unit.n, task.cap_factor, <real*>unit.capped)
    if task.is_product and task.softcap != 0:
        fill(ones, 0, LANES, <real>1)
        multiply_by(<const real*>unit.v, <const real*>unit.slopes, unit.n, ones, <real*>unit.scaled)
        unit.w = unit.scaled
    find_unit_maxima(task, unit, lane, rows, moments, like)
    sum_unit(task, unit, lane, rows, moments, like)
    if task.is_product and overflows(task, rows, lane, moments):
        sum_scaled_moment(task, unit, lane, moments, like)


# ----- results

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


cdef inline void process_units(
    const Task* task, Py_ssize_t start, Py_ssize_t n, Py_ssize_t u, real* arrays
) noexcept nogil:
    """Do n <= 16 rows: so many units, or the u-th, which is in the workspace already."""
    cdef real like = arrays[0]
    cdef Scalars rows
    cdef Moments moments
    cdef Factors factors
    cdef Unit units[LANES]
    cdef bint by_rows = task.by_rows
    cdef Py_ssize_t i, n_units = n if by_rows else 1
    begin(task, &rows, start, n, like)
    fill(moments.w_at_max, 0, LANES, <double>0)
    fill(moments.moment, 0, LANES, <double>0)
    fill(moments.unscale, 0, LANES, <double>1)
    moments.is_scaled = False
    if by_rows and task.target != NULL and needs_gradient(task):
        read_patch_logits(task, &rows, like)
    for i in range(n_units):
        locate_unit(task, start + i, u + i, arrays, &units[i])
        if not by_rows or rows.kept[i] != 0:
            sweep_unit(task, &units[i], i, &rows, &moments, like)
    if task.needs_argmax_patch:
        for i in range(n):
            rows.patch_class[i] = -1 if rows.kept[i] == 0 else rows.argmax[i]
        describe_argmax_patches(task, &rows, like)
    finish(task, &rows, like)
    find_factors(task, &rows, &moments, &factors, like)
    for i in range(n_units):
        write_unit(task, &units[i], i, &rows, &moments, &factors, like)
        if by_rows:
            store_unit(task, &units[i], start + i, like)


cdef inline void process_curvature(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    """Do the rows start .. stop - 1."""
    cdef real* arrays = <real*>workspace
    cdef Py_ssize_t i = start, k, n
    cdef Py_ssize_t step = task.unit_rows
    while i < stop:
        n = min(stop - i, step)
        if not task.by_rows:
            load_all_groups(task, i, n, arrays)
        k = 0
        while k < n:
            process_units(task, i + k, min(n - k, <Py_ssize_t>LANES), k // LANES, arrays)
            k += LANES
        if not task.by_rows:
            store_all_groups(task, i, n, arrays)
        i += step


cdef inline void do_curvature(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    if task.is_float:
        process_curvature(task, start, stop, workspace, <float>0)
    else:
        process_curvature(task, start, stop, workspace, <double>0)


cdef inline KernelSpec plan_curvature(Task* task, bint by_rows, real like) noexcept nogil:
    task.by_rows = by_rows
    task.block = row_block(task, like)
    plan_units(task, like)
    return make_spec(
        do_curvature, task.unit_rows, min(task.unit_rows, <Py_ssize_t>LANES), align(units_bytes(task, like)))
