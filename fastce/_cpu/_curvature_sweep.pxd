"""The first passes of the curvature kernel over a unit: maximum, exponentials and sums."""
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t

from fastce._cpu._math cimport real
from fastce._cpu._prefetch cimport CACHE_LINE, prefetch_to_l2
from fastce._cpu._rows cimport GROUP_BYTES
from fastce._cpu._scalars cimport Scalars, scale_of
from fastce._cpu._task cimport ALL, REST, WT, Task
from fastce._cpu._tiles cimport *
from fastce._cpu._units cimport RowGroup, classes_of_tile, scale_w, small_scale, tile_of, w_tile, weights_at

cdef enum:
    FLUSH_TILES = 32  # additions to a sum of the arithmetic's type before it goes to one of doubles
    # Of a row, these are looked through for a larger maximum before w is taken along: few but the first have one.
    # It took 0.9 of the time with AVX-512 and AVX2, and twice the time with the baseline.
    PIECE_TILES = 8


# What a product asks of 16 rows besides their `Scalars`; w is slope * v, the scale left out.
cdef struct Moments:
    double w_at_max[LANES]    # of the largest logit
    double moment[LANES]   # the sum of e (w - w_top)
    double unscale[LANES]  # what undoes the scale of w in both, a power of two; 1 but where they would overflow


cdef inline bint has_larger(
    const RowGroup* unit, Py_ssize_t start, Py_ssize_t stop, const real* row_max
) noexcept nogil:
    """Return True if a row has logits in some of its tiles that are larger than all before."""
    cdef real largest[LANES]
    cdef Py_ssize_t t
    fill(largest, 0, LANES, <real>-INFINITY)
    for t in range(start, stop):
        fold_max(tile_of(&unit.x, t, row_max[0]), largest)
    return lane_max(largest) > lane_max(row_max)


cdef inline void spread_max(real* row_max, real* w_at_max) noexcept nogil:
    """Find the largest of the lanes, partial results of one row; give it to all."""
    cdef real largest = lane_max(row_max), w = w_at_max[0]
    cdef Py_ssize_t j
    for j in range(LANES):
        if row_max[j] == largest:
            w = w_at_max[j]
            break
    fill(row_max, 0, LANES, largest)
    fill(w_at_max, 0, LANES, w)


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


cdef inline void take_sum(const Task* task, const double* lanes, Py_ssize_t lane, double* sums) noexcept nogil:
    """Write a unit's sum: that of its only row, in `lane`, or one for each lane."""
    cdef Py_ssize_t j
    if task.by_rows:
        sums[lane] = wide_lane_sum(lanes)
    else:
        for j in range(LANES):
            sums[j] = lanes[j]


cdef inline void sum_unit(
    const Task* task, const RowGroup* unit, Py_ssize_t lane, Scalars* rows, Moments* moments, real like
) noexcept nogil:
    """Do the passes for the maximum and for the sums; `lane` is that of a single row."""
    cdef real row_max[LANES]
    cdef real w_at_max[LANES]
    cdef real e[TILE]
    cdef real w[TILE]
    cdef real y[TILE]
    cdef real sums[4 * LANES]        # ALL, REST, the moment and the targets' sum
    cdef double wide[4 * LANES]
    cdef int32_t first[LANES]
    cdef bint is_product = task.is_product, has_prob = task.prob.data != NULL
    # The next of the longest rows would push this one out of L2: 32000 floats took 1.3 times as long.
    cdef bint asks_ahead = task.by_rows and task.n_tiles * TILE * <Py_ssize_t>sizeof(real) <= GROUP_BYTES
    cdef real scale = <real>scale_of(task)
    cdef Py_ssize_t j, t, stop, n_tiles = task.n_tiles
    cdef Py_ssize_t step = classes_of_tile(task)
    fill(row_max, 0, LANES, <real>-INFINITY)
    fill(w_at_max, 0, LANES, <real>0)
    if is_product and task.by_rows and IS_WIDE:
        t = 0
        while t < n_tiles:
            stop = min(t + PIECE_TILES, n_tiles)
            if has_larger(unit, t, stop, row_max):
                for t in range(t, stop):
                    fold_max_and_w(tile_of(&unit.x, t, like), w_tile(task, unit, t, w), row_max, w_at_max)
            t = stop
    elif is_product:
        for t in range(n_tiles):
            fold_max_and_w(tile_of(&unit.x, t, like), w_tile(task, unit, t, w), row_max, w_at_max)
    else:
        for t in range(n_tiles):
            fold_max(tile_of(&unit.x, t, like), row_max)
    if task.by_rows:
        spread_max(row_max, w_at_max)
        rows.row_max[lane] = row_max[0]
        moments.w_at_max[lane] = w_at_max[0]
    else:
        widen(row_max, rows.row_max)
        widen(w_at_max, moments.w_at_max)
    # A row without a largest logit has none that equals 0 either: else its arg-max would be padding, which is -inf.
    for j in range(LANES):
        row_max[j] = <real>0 if row_max[j] == -INFINITY else row_max[j]
    if task.needs_argmax_patch:
        for j in range(LANES):
            first[j] = NO_CLASS
        for t in range(n_tiles):
            fold_argmax(
                tile_of(&unit.x, t, like), row_max, <int32_t>(t * step), LANES if task.by_rows else 1, task.by_rows,
                first)
        if task.by_rows:
            rows.argmax[lane] = NO_CLASS
        for j in range(LANES):
            if task.by_rows:
                rows.argmax[lane] = min(rows.argmax[lane], <int64_t>first[j])
            else:
                rows.argmax[j] = first[j]
    fill(wide, 0, 4 * LANES, <double>0)
    t = 0
    while t < n_tiles:
        stop = min(t + FLUSH_TILES, n_tiles)
        fill(sums, 0, 4 * LANES, <real>0)
        for t in range(t, stop):
            if asks_ahead:
                for j in range(TILE * <Py_ssize_t>sizeof(real) // CACHE_LINE):
                    prefetch_to_l2(unit.ahead_x + t * TILE * <Py_ssize_t>sizeof(real) + j * CACHE_LINE)
                    if is_product:
                        prefetch_to_l2(unit.ahead_v + t * TILE * <Py_ssize_t>sizeof(real) + j * CACHE_LINE)
            exp_and_fold(
                tile_of(&unit.x, t, like), LANES, 4, row_max, scale, e, LANES, sums + 16 * ALL, sums + 16 * REST)
            if is_product:
                fold_moment(e, w_tile(task, unit, t, w), w_at_max, sums + 2 * LANES)
            if has_prob and task.weight == NULL:
                fold(tile_of(&unit.prob, t, like), sums + 3 * LANES)
            elif has_prob:
                product(tile_of(&unit.prob, t, like), weights_at(task, t, w), y)
                fold(y, sums + 3 * LANES)
            copy(e, tile_of(&unit.exps, t, like))
        for j in range(4 * LANES):
            wide[j] += sums[j]
        t = stop
    if task.by_rows:
        rows.sumexp_excl_max[lane] = rest_of(wide_lane_sum(wide + 16 * ALL), wide_lane_sum(wide + 16 * REST), like)
    else:
        for j in range(LANES):
            rows.sumexp_excl_max[j] = rest_of(wide[16 * ALL + j], wide[16 * REST + j], like)
    take_sum(task, wide + 2 * LANES, lane, moments.moment)
    if has_prob:
        take_sum(task, wide + 3 * LANES, lane, rows.sums[WT])


cdef inline void sum_scaled_moment(
    const Task* task, const RowGroup* unit, Py_ssize_t lane, Moments* moments, real like
) noexcept nogil:
    """Sum up the moment again, with scales of w, from the exponentials that are there."""
    cdef real w_at_max[LANES]
    cdef real w[TILE]
    cdef real sums[LANES]
    cdef double wide[LANES]
    cdef Py_ssize_t j, t
    for j in range(LANES):
        w_at_max[j] = <real>moments.w_at_max[lane if task.by_rows else j]
    fill(wide, 0, LANES, <double>0)
    for t in range(task.n_tiles):
        fill(sums, 0, LANES, <real>0)
        fold_moment(tile_of(&unit.exps, t, like), w_tile(task, unit, t, w), w_at_max, sums)
        for j in range(LANES):
            wide[j] += sums[j]
    if task.by_rows:
        moments.moment[lane] = wide_lane_sum(wide)
        return
    for j in range(LANES):
        if moments.unscale[j] != 1:  # the others keep their bits
            moments.moment[j] = wide[j]


cdef inline void sweep_unit(
    const Task* task, RowGroup* unit, Py_ssize_t lane, Scalars* rows, Moments* moments, real like
) noexcept nogil:
    """Do the first passes; `lane` is that of a single row."""
    sum_unit(task, unit, lane, rows, moments, like)
    if task.is_product and overflows(task, rows, lane, moments):
        scale_w(task, unit, lane, moments.unscale)
        sum_scaled_moment(task, unit, lane, moments, like)
