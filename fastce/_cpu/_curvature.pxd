"""Curvature kernel: products with the Hessian, or the gradient and a diagonal of curvature, in one sweep.

Design
------
1. What it works on are *units* of whole tiles (see `_tiles`): a row whose classes fill the vector, or 16 rows side by
   side, class after class. The same loops do both; in a unit of one row all lanes have the same factors.
2. A unit goes through three passes while it is in cache: the maximum; exponentials, which wait in the workspace, and
   sums; the results. An operand that is an ordinary row is read where it is, but for its last, short tile. Whatever
   else there is, 16 bits, strides, several rows, is staged in the workspace first and comes back from there.
3. With d = scale (f(x) - top), e = exp(d), s = 1 + rest and w = f'(x) v, the Hessian of a row is K (diag(p) - p p^T) +
   2 z p p^T between two slopes, plus f'' times the gradient, and its product with v is

       slope e_k (first (w_k - w_top) + second) + bend_k grad_k v_k.

   w_top is that of the largest logit, found with the maximum. Differences from the mean <p, w> would cancel in rows the
   model is sure of; those from w_top do not, and the mean's own distance from w_top is a sum over the other classes.
4. The diagonal has p (1 - p) = e (s - e) / s^2, where s - e is `rest` for the largest term and at least 1 for others.
5. Gradient and scalars are those of the other kernels, `begin` and `finish`; the losses that these add up mean nothing.
"""
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy

from fastce._cpu._columns cimport MAX_GROUPS, column_block, load_weights, note_peaks
from fastce._cpu._convert cimport NATIVE, load_array, store_array
from fastce._cpu._math cimport exp_unit, real, sech2
from fastce._cpu._rows cimport row_group
from fastce._cpu._scalars cimport (
    Scalars, begin, cap_factor_of, describe_argmax_peaks, find_upstream, finish, read_peaks, scale_of
)
from fastce._cpu._stage cimport (
    SIDE_BY_SIDE, Lanes, load_classes, load_planes, locate, pad, store_classes, store_planes
)
from fastce._cpu._task cimport ALL, REST, WT, Matrix, Task, row_offset
from fastce._cpu._tiles cimport *

cdef enum:
    FLUSH_TILES = 32  # additions to a sum of the arithmetic's type before it goes to one of doubles


# Arrays of the workspace, each with room for all units that are done together.
cdef enum:
    EXPS = 0     # in the end the product, or the diagonal
    SECOND = 1   # v, or in the end the gradient
    PROB = 2
    CAPPED = 3   # f(x)
    SLOPES = 4   # 1 - tanh^2
    N_ARRAYS = 5


# What is multiplied or added lane by lane in the last pass.
cdef enum:
    ALPHA = 0    # of the gradient, as in `_scalars`
    BETA = 1
    GAMMA = 2
    PEAK = 3     # the gradient at the peak
    FIRST = 4    # of w - w_top; of e (s - e)
    OTHER = 5    # what is added to that; of e^2
    W_TOP = 6
    AT_TOP = 7   # the diagonal's first factor times `rest`
    TOTAL = 8    # s
    N_FACTORS = 9


# What 16 rows come down to, besides their `Scalars`.
cdef struct Curves:
    double w_top[LANES]                  # of slope v; the scale is left out
    double moment[LANES]                 # the sum of e (w - w_top)
    double factors[N_FACTORS][LANES]
    int32_t peak[LANES]
    int32_t kept[LANES]


# Tiles of one operand: those before `n_body` follow each other at `body`, all others at `stage`.
cdef struct Tiles:
    char* body
    char* stage
    Py_ssize_t n_body


cdef struct Unit:
    Tiles x        # f(logits)
    Tiles exps
    Tiles v
    Tiles prob
    Tiles slopes
    Tiles out
    Tiles hess


cdef inline real* tile_of(const Tiles* tiles, Py_ssize_t t, real like) noexcept nogil:
    return <real*>(tiles.body if t < tiles.n_body else tiles.stage) + t * TILE


cdef inline bint needs_gradient(const Task* task) noexcept nogil:
    return not task.is_product or task.softcap != 0


cdef inline Py_ssize_t classes_of_tile(const Task* task) noexcept nogil:
    return TILE if task.by_rows else TILE // LANES


cdef inline Py_ssize_t tiles_of_unit(const Task* task) noexcept nogil:
    return (task.n_classes + classes_of_tile(task) - 1) // classes_of_tile(task)


cdef inline int n_arrays(const Task* task) noexcept nogil:
    if task.softcap != 0:
        return N_ARRAYS
    return PROB + 1 if task.prob.data != NULL else SECOND + 1


cdef inline Py_ssize_t curvature_group(const Task* task, real like) noexcept nogil:
    """Return how many rows are done together."""
    cdef Py_ssize_t size = tiles_of_unit(task) * (TILE // LANES) * n_arrays(task)
    if task.by_rows:
        return row_group(task, like)
    return LANES * max(1, min(<Py_ssize_t>MAX_GROUPS, column_block(like) // size))


cdef inline Py_ssize_t array_size(const Task* task, real like) noexcept nogil:
    """Return the size of an array of the workspace, in numbers."""
    cdef Py_ssize_t n_units = curvature_group(task, like)
    return (n_units if task.by_rows else n_units // LANES) * tiles_of_unit(task) * TILE


cdef inline Py_ssize_t curvature_bytes(const Task* task, real like) noexcept nogil:
    return n_arrays(task) * array_size(task, like) * <Py_ssize_t>sizeof(real)


cdef inline Tiles staged_tiles(real* stage) noexcept nogil:
    cdef Tiles tiles
    tiles.body = tiles.stage = <char*>stage
    tiles.n_body = 0
    return tiles


cdef inline Tiles row_tiles(const Task* task, const Matrix* matrix, Py_ssize_t i, real* stage) noexcept nogil:
    """Locate the tiles of row i: where they are as far as they are ordinary, else in `stage`."""
    cdef Tiles tiles = staged_tiles(stage)
    if matrix.data == NULL:
        return tiles
    tiles.body = matrix.data + row_offset(task, matrix, i)
    if matrix.format == NATIVE and is_plain(tiles.body, matrix.class_stride, stage[0]):
        tiles.n_body = task.n_classes // TILE
    return tiles


cdef inline void load_row(const Task* task, const Matrix* matrix, const Tiles* tiles, real padding) noexcept nogil:
    """Stage what is not read where it is."""
    cdef real* stage = <real*>tiles.stage
    cdef Py_ssize_t k = tiles.n_body * TILE, n = task.n_classes - k
    if matrix.data == NULL or n == 0:
        return
    load_array(tiles.body + k * matrix.class_stride, matrix.format, matrix.class_stride, n, stage + k)
    fill(stage, k + n, k + (n + TILE - 1) // TILE * TILE, padding)


cdef inline void store_row(const Task* task, const Matrix* matrix, const Tiles* tiles, real like) noexcept nogil:
    """Write what was staged."""
    cdef const real* stage = <const real*>tiles.stage
    cdef Py_ssize_t k = tiles.n_body * TILE, n = task.n_classes - k
    if matrix.data == NULL or n == 0:
        return
    if matrix.format == NATIVE:
        store(tiles.body + k * matrix.class_stride, matrix.class_stride, n, stage + k)
    else:
        store_array(stage + k, <real>1, n, tiles.body + k * matrix.class_stride, matrix.format, matrix.class_stride)


cdef inline void locate_unit(const Task* task, Py_ssize_t i, Py_ssize_t u, real* arrays, Unit* unit) noexcept nogil:
    """Locate the u-th unit: row i, or 16 rows that are in the workspace already."""
    cdef Py_ssize_t k, size = array_size(task, arrays[0])
    cdef real* stage[N_ARRAYS]
    for k in range(N_ARRAYS):
        stage[k] = arrays + k * size + u * tiles_of_unit(task) * TILE
    unit.exps = unit.hess = staged_tiles(stage[EXPS])
    unit.x = staged_tiles(stage[EXPS if task.softcap == 0 else CAPPED])
    unit.v = staged_tiles(stage[SECOND])
    unit.out = unit.exps if task.is_product else unit.v
    unit.prob = staged_tiles(stage[PROB])
    unit.slopes = staged_tiles(stage[SLOPES])
    if not task.by_rows:
        return
    unit.out = row_tiles(task, &task.out, i, <real*>unit.out.stage)
    unit.x = row_tiles(task, &task.logits, i, <real*>unit.x.stage)
    if task.softcap != 0:
        unit.x.n_body = 0  # nothing is read where it is: f(x) takes its place
    unit.prob = row_tiles(task, &task.prob, i, <real*>unit.prob.stage)
    if task.is_product:
        unit.v = row_tiles(task, &task.second, i, <real*>unit.v.stage)
    else:
        unit.hess = row_tiles(task, &task.second, i, <real*>unit.hess.stage)


cdef inline void find_slopes(const Task* task, const Unit* unit, real like) noexcept nogil:
    """Write the slopes of the softcap."""
    cdef real factor = <real>cap_factor_of(task)
    cdef real y[TILE]
    cdef const real* x
    cdef Py_ssize_t j, t
    for t in range(tiles_of_unit(task)):
        x = tile_of(&unit.x, t, like)
        for j in range(TILE):
            y[j] = sech2(x[j] * factor)
        copy(y, tile_of(&unit.slopes, t, like))


cdef inline void load_unit(const Task* task, const Unit* unit, real like) noexcept nogil:
    """Stage what a row needs."""
    cdef real* last
    cdef Py_ssize_t t, n_tiles = tiles_of_unit(task)
    load_row(task, &task.logits, &unit.x, <real>-INFINITY)
    load_row(task, &task.prob, &unit.prob, <real>0)
    if task.is_product:
        load_row(task, &task.second, &unit.v, <real>0)
    if task.softcap != 0:
        find_slopes(task, unit, like)
        for t in range(n_tiles):
            cap(tile_of(&unit.x, t, like), <real>cap_factor_of(task))
        last = tile_of(&unit.x, n_tiles - 1, like)
        fill(last, task.n_classes - (n_tiles - 1) * TILE, TILE, <real>-INFINITY)


cdef inline void fold_max_and_w(const real* x, const real* w, real* top, real* w_top) noexcept nogil:
    """Do the maximum's pass over a tile, and take w along."""
    cdef real a, b, w_a, w_b
    cdef Py_ssize_t j
    for j in range(LANES):
        a = x[j] if x[j] > x[j + 16] else x[j + 16]
        w_a = w[j] if x[j] > x[j + 16] else w[j + 16]
        b = x[j + 32] if x[j + 32] > x[j + 48] else x[j + 48]
        w_b = w[j + 32] if x[j + 32] > x[j + 48] else w[j + 48]
        w_a = w_a if a > b else w_b
        a = a if a > b else b
        w_top[j] = w_a if a > top[j] else w_top[j]
        top[j] = a if a > top[j] else top[j]


cdef inline void fold_moment(const real* e, const real* w, const real* w_top, real* total) noexcept nogil:
    """Add e * (w - w_top) to a sum."""
    cdef Py_ssize_t j
    for j in range(LANES):
        total[j] += (e[j] * (w[j] - w_top[j]) + e[j + 16] * (w[j + 16] - w_top[j])) + (
            e[j + 32] * (w[j + 32] - w_top[j]) + e[j + 48] * (w[j + 48] - w_top[j]))


cdef inline const real* w_tile(const Task* task, const Unit* unit, Py_ssize_t t, real* buffer) noexcept nogil:
    """Return a tile of slope * v; the scale is left out."""
    cdef const real* v = tile_of(&unit.v, t, buffer[0])
    if task.softcap == 0:
        return v
    product(v, tile_of(&unit.slopes, t, buffer[0]), buffer)
    return buffer


cdef inline const real* weights_at(const Task* task, Py_ssize_t t, real* buffer) noexcept nogil:
    """Return the class weights of a tile."""
    cdef Py_ssize_t k = t * classes_of_tile(task)
    cdef Py_ssize_t n = task.n_classes - k
    if not task.by_rows:
        load_weights(task, k, task.n_classes, buffer)
        return buffer
    if task.weight != NULL and n >= TILE:
        return <const real*>task.weight + k
    fill(buffer, 0, TILE, <real>(task.weight == NULL))
    if n < TILE:
        fill(buffer, n, TILE, <real>0)
        if task.weight != NULL:
            memcpy(buffer, <const real*>task.weight + k, n * sizeof(real))
    return buffer


cdef inline void spread_top(real* top, real* w_top) noexcept nogil:
    """Find the largest of the lanes, partial results of one row; give it to all."""
    cdef real largest = lane_max(top), w = w_top[0]
    cdef Py_ssize_t j
    for j in range(LANES):
        if top[j] == largest:
            w = w_top[j]
            break
    fill(top, 0, LANES, largest)
    fill(w_top, 0, LANES, w)


cdef inline void take_sum(const Task* task, const double* lanes, Py_ssize_t lane, double* sums) noexcept nogil:
    """Write a unit's sum: that of its only row, in `lane`, or one for each lane."""
    cdef Py_ssize_t j
    if task.by_rows:
        sums[lane] = wide_lane_sum(lanes)
    else:
        for j in range(LANES):
            sums[j] = lanes[j]


cdef inline void sweep_unit(
    const Task* task, const Unit* unit, Py_ssize_t lane, Scalars* rows, Curves* curves, real like
) noexcept nogil:
    """Do the passes for the maximum and for the sums; `lane` is that of a single row."""
    cdef real top[LANES]
    cdef real w_top[LANES]
    cdef real e[TILE]
    cdef real w[TILE]
    cdef real y[TILE]
    cdef real sums[4 * LANES]        # ALL, REST, the moment and the targets' sum
    cdef double wide[4 * LANES]
    cdef int32_t first[LANES]
    cdef bint is_product = task.is_product, has_prob = task.prob.data != NULL
    cdef real scale = <real>scale_of(task)
    cdef Py_ssize_t j, t, stop, n_tiles = tiles_of_unit(task)
    cdef Py_ssize_t step = classes_of_tile(task)
    fill(top, 0, LANES, <real>-INFINITY)
    fill(w_top, 0, LANES, <real>0)
    if is_product:
        for t in range(n_tiles):
            fold_max_and_w(tile_of(&unit.x, t, like), w_tile(task, unit, t, w), top, w_top)
    else:
        for t in range(n_tiles):
            fold_max(tile_of(&unit.x, t, like), top)
    if task.by_rows:
        spread_top(top, w_top)
        rows.top[lane] = top[0]
        curves.w_top[lane] = w_top[0]
    else:
        widen(top, rows.top)
        widen(w_top, curves.w_top)
    if task.find_peak:
        for j in range(LANES):
            first[j] = NO_CLASS
        for t in range(n_tiles):
            fold_argmax(
                tile_of(&unit.x, t, like), top, <int32_t>(t * step), LANES if task.by_rows else 1, task.by_rows, first)
        if task.by_rows:
            rows.argmax[lane] = NO_CLASS
        for j in range(LANES):
            if task.by_rows:
                rows.argmax[lane] = min(rows.argmax[lane], <int64_t>first[j])
            else:
                rows.argmax[j] = first[j]
    for j in range(LANES):
        top[j] = <real>0 if top[j] == -INFINITY else top[j]
    fill(wide, 0, 4 * LANES, <double>0)
    t = 0
    while t < n_tiles:
        stop = min(t + FLUSH_TILES, n_tiles)
        fill(sums, 0, 4 * LANES, <real>0)
        for t in range(t, stop):
            exp_and_fold(
                tile_of(&unit.x, t, like), LANES, 4, top, scale, e, LANES, sums + 16 * ALL, sums + 16 * REST)
            if is_product:
                fold_moment(e, w_tile(task, unit, t, w), w_top, sums + 2 * LANES)
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
        rows.rest[lane] = rest_of(wide_lane_sum(wide + 16 * ALL), wide_lane_sum(wide + 16 * REST), like)
    else:
        for j in range(LANES):
            rows.rest[j] = rest_of(wide[16 * ALL + j], wide[16 * REST + j], like)
    take_sum(task, wide + 2 * LANES, lane, curves.moment)
    if has_prob:
        take_sum(task, wide + 3 * LANES, lane, rows.sums[WT])


cdef inline void find_factors(const Task* task, const Scalars* rows, Curves* curves, real like) noexcept nogil:
    """Turn the sums into the factors of the last pass; `finish` came before."""
    cdef double scale = task.logit_scale
    cdef double z_slope = 2 * task.z_loss * task.curvature.z_factor
    cdef double upstream[LANES]
    cdef double inverse, shift
    cdef Py_ssize_t j
    find_upstream(task, rows, upstream)
    for j in range(LANES):
        curves.factors[ALPHA][j] = rows.alpha[j]
        curves.factors[BETA][j] = rows.beta[j]
        curves.factors[GAMMA][j] = rows.gamma[j]
        curves.factors[PEAK][j] = rows.grad_peak[j]
        curves.factors[W_TOP][j] = curves.w_top[j]
        curves.factors[TOTAL][j] = 1 + rows.rest[j]
    if task.is_product:
        for j in range(LANES):
            inverse = 1 / (1 + rows.rest[j])
            shift = scale * (curves.moment[j] / exp_unit(like)) * inverse  # the mean's distance from w_top
            curves.factors[FIRST][j] = rows.alpha[j] * scale
            curves.factors[OTHER][j] = -rows.alpha[j] * shift
            if z_slope != 0:
                curves.factors[OTHER][j] += upstream[j] * z_slope * inverse * (scale * curves.w_top[j] + shift)
    else:
        for j in range(LANES):
            inverse = 1 / (1 + rows.rest[j])
            curves.factors[FIRST][j] = task.curvature.factor * rows.alpha[j] * scale * inverse
            curves.factors[OTHER][j] = upstream[j] * z_slope * scale * inverse * inverse
            curves.factors[AT_TOP][j] = curves.factors[FIRST][j] * rows.rest[j]
    for j in range(LANES):
        curves.peak[j] = <int32_t>rows.peak[j]
        curves.kept[j] = <int32_t>rows.kept[j]


cdef inline void gradient_tile(
    const Task* task, const Unit* unit, Py_ssize_t t, const real* factors, const Curves* curves, Py_ssize_t peak,
    real* grad
) noexcept nogil:
    """Write the gradient; `peak` is that of a single row."""
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
                grad[16 * g + j] = factors[16 * PEAK + j] if curves.peak[j] == k + g else grad[16 * g + j]
    elif t * TILE <= peak and peak < t * TILE + TILE:
        grad[peak - t * TILE] = factors[16 * PEAK]


cdef inline void product_tile(
    const Task* task, const Unit* unit, Py_ssize_t t, const real* factors, const real* grad, real* out
) noexcept nogil:
    """Write the product of the Hessian and v."""
    cdef real buffer[TILE]
    cdef real y[TILE]
    cdef real unscale = <real>1 / exp_unit(factors[0])
    cdef real bend = <real>(-2 * cap_factor_of(task))
    cdef const real* e = tile_of(&unit.exps, t, unscale)
    cdef const real* w = w_tile(task, unit, t, buffer)
    cdef const real* v
    cdef const real* u
    cdef const real* slope
    cdef Py_ssize_t g, j
    for g in range(TILE // LANES):
        for j in range(LANES):
            y[16 * g + j] = e[16 * g + j] * unscale * (
                factors[16 * FIRST + j] * (w[16 * g + j] - factors[16 * W_TOP + j]) + factors[16 * OTHER + j])
    if task.softcap == 0:
        copy(y, out)
        return
    v = tile_of(&unit.v, t, unscale)
    u = tile_of(&unit.x, t, unscale)
    slope = tile_of(&unit.slopes, t, unscale)
    for j in range(TILE):
        out[j] = y[j] * slope[j] + bend * u[j] * grad[j] * v[j]


cdef inline void diagonal_tile(
    const Task* task, const Unit* unit, Py_ssize_t t, const real* factors, const real* grad, real* out
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
                value = factors[16 * AT_TOP + j] if p == 1 else value
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
    const Task* task, const Unit* unit, Py_ssize_t lane, const Scalars* rows, const Curves* curves, real like
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
            fill(factors, 16 * k, 16 * k + 16, <real>curves.factors[k][lane])
        else:
            for j in range(LANES):
                factors[16 * k + j] = <real>curves.factors[k][j]
    for t in range(tiles_of_unit(task)):
        if has_gradient:
            gradient_tile(task, unit, t, factors, curves, rows.peak[lane], grad)
        if is_product:
            product_tile(task, unit, t, factors, grad, y)
            if clears:
                clear_skipped(curves.kept, y)
            copy(y, tile_of(&unit.out, t, like))
            continue
        diagonal_tile(task, unit, t, factors, grad, y)
        if clears:
            clear_skipped(curves.kept, y)
            clear_skipped(curves.kept, grad)
        copy(grad, tile_of(&unit.out, t, like))
        copy(y, tile_of(&unit.hess, t, like))


cdef inline void clear_unit(const Task* task, const Unit* unit, real like) noexcept nogil:
    """Write zeros for a row that is skipped."""
    cdef Py_ssize_t t
    for t in range(tiles_of_unit(task)):
        fill(tile_of(&unit.out, t, like), 0, TILE, <real>0)
        if not task.is_product:
            fill(tile_of(&unit.hess, t, like), 0, TILE, <real>0)


cdef inline bint locate_groups(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, Lanes* lanes, real like
) noexcept nogil:
    """Locate groups of 16 rows; tell whether all lie side by side."""
    cdef bint side_by_side = True
    cdef Py_ssize_t g
    for g in range((n + LANES - 1) // LANES):
        locate(task, matrix, start + g * LANES, min(n - g * LANES, <Py_ssize_t>LANES), &lanes[g], like)
        side_by_side = side_by_side and lanes[g].way == SIDE_BY_SIDE
    return side_by_side


cdef inline void load_groups(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, real padding, real* stage
) noexcept nogil:
    """Stage an operand of n rows, 16 to a unit."""
    cdef Lanes lanes[MAX_GROUPS]
    cdef Py_ssize_t g, n_groups = (n + LANES - 1) // LANES, size = tiles_of_unit(task) * TILE
    if matrix.data == NULL:
        return
    if locate_groups(task, matrix, start, n, lanes, stage[0]):
        load_planes(lanes, n_groups, task.n_classes, stage, size)
        for g in range(n_groups):
            pad(&lanes[g], task.n_classes, padding, stage + g * size)
    else:
        for g in range(n_groups):
            load_classes(&lanes[g], 0, task.n_classes, padding, stage + g * size)


cdef inline void store_groups(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, const real* stage
) noexcept nogil:
    cdef Lanes lanes[MAX_GROUPS]
    cdef Py_ssize_t g, n_groups = (n + LANES - 1) // LANES, size = tiles_of_unit(task) * TILE
    if locate_groups(task, matrix, start, n, lanes, stage[0]):
        store_planes(lanes, n_groups, task.n_classes, stage, size)
    else:
        for g in range(n_groups):
            store_classes(&lanes[g], 0, task.n_classes, stage + g * size)


cdef inline void move_groups(
    const Task* task, Py_ssize_t start, Py_ssize_t n, bint loads, real* arrays
) noexcept nogil:
    """Stage the operands of n rows, or write their results."""
    cdef Py_ssize_t size = array_size(task, arrays[0])
    if loads:
        load_groups(
            task, &task.logits, start, n, <real>-INFINITY, arrays + (EXPS if task.softcap == 0 else CAPPED) * size)
        load_groups(task, &task.prob, start, n, <real>0, arrays + PROB * size)
        if task.is_product:
            load_groups(task, &task.second, start, n, <real>0, arrays + SECOND * size)
    else:
        store_groups(task, &task.out, start, n, arrays + (EXPS if task.is_product else SECOND) * size)
        if not task.is_product:
            store_groups(task, &task.second, start, n, arrays + EXPS * size)


cdef inline void process_units(
    const Task* task, Py_ssize_t start, Py_ssize_t n, Py_ssize_t u, real* arrays
) noexcept nogil:
    """Do n <= 16 rows: so many units, or the u-th, which is in the workspace already."""
    cdef real like = arrays[0]
    cdef Scalars rows
    cdef Curves curves
    cdef Unit units[LANES]
    cdef bint by_rows = task.by_rows
    cdef Py_ssize_t i, n_units = n if by_rows else 1
    begin(task, &rows, start, n, like)
    fill(curves.w_top, 0, LANES, <double>0)
    fill(curves.moment, 0, LANES, <double>0)
    if by_rows and task.target != NULL and needs_gradient(task):
        read_peaks(task, &rows, like)
    for i in range(n_units):
        locate_unit(task, start + i, u + i, arrays, &units[i])
        if not by_rows:
            if task.softcap != 0:
                find_slopes(task, &units[i], like)
            if needs_gradient(task):
                note_peaks(task, &rows, 0, task.n_classes, <real*>units[i].x.stage)
        elif rows.kept[i] == 0:
            continue
        else:
            load_unit(task, &units[i], like)
        sweep_unit(task, &units[i], i, &rows, &curves, like)
    if task.find_peak:
        for i in range(n):
            rows.peak[i] = -1 if rows.kept[i] == 0 or rows.argmax[i] == NO_CLASS else rows.argmax[i]
        describe_argmax_peaks(task, &rows, like)
    finish(task, &rows, like)
    find_factors(task, &rows, &curves, like)
    for i in range(n_units):
        if by_rows and rows.kept[i] == 0:
            clear_unit(task, &units[i], like)
        else:
            write_unit(task, &units[i], i, &rows, &curves, like)
        if by_rows:
            store_row(task, &task.out, &units[i].out, like)
            if not task.is_product:
                store_row(task, &task.second, &units[i].hess, like)


cdef inline void process_curvature(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    """Do the rows start .. stop - 1."""
    cdef real* arrays = <real*>workspace
    cdef Py_ssize_t i = start, k, n
    cdef Py_ssize_t step = curvature_group(task, like)
    while i < stop:
        n = min(stop - i, step)
        if not task.by_rows:
            move_groups(task, i, n, True, arrays)
        k = 0
        while k < n:
            process_units(task, i + k, min(n - k, <Py_ssize_t>LANES), k // LANES, arrays)
            k += LANES
        if not task.by_rows:
            move_groups(task, i, n, False, arrays)
        i += step
