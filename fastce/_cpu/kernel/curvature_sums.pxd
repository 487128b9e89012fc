"""The first passes of the curvature kernel over a unit: slopes, the largest logits, exponentials and the sums of them.

The exponentials wait in the workspace for the last pass, see `curvature_writes`.
"""
from libc.stdint cimport int64_t

from fastce._cpu.kernel.blocks cimport Block, cap, find_slopes, multiply_by, sum_moment
from fastce._cpu.kernel.columns cimport note_patch_logits
from fastce._cpu.kernel.gradient cimport fill_lanes_of
from fastce._cpu.kernel.scalars cimport Scalars, needs_gradient
from fastce._cpu.kernel.sums cimport (
    PIECE, Totals, add_piece, begin_totals, describe_block, find_argmax, find_maxima, narrow_maxima, take_totals
)
from fastce._cpu.kernel.units cimport Unit
from fastce._cpu.lanes cimport LANES, fill, wide_lane_sum
from fastce._cpu.layout.convert cimport NATIVE
from fastce._cpu.math cimport real
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
        # To L1 the next row only: it has no room for more of two operands; 65536 x 1000 took a fifth longer.
        b.ahead_l1 = unit.next_x + at * size
        b.ahead_l2 = unit.ahead_x + at * size
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
