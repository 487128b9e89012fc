"""Units of the curvature kernel: rows as whole tiles, where they are or staged in the workspace.

Design
------
A unit is a row whose classes fill the vector, tile after tile, or 16 rows side by side, four classes to a tile. An
operand that is an ordinary row is read and written where it is, but for its last, short tile. Whatever else there is,
16 bits, strides, 16 rows, comes into the workspace first and goes back from there.
"""
from libc.math cimport INFINITY
from libc.string cimport memcpy

from fastce._cpu._columns cimport MAX_GROUPS, column_block, load_weights, prefetch_group
from fastce._cpu._convert cimport NATIVE, load_array, store_array
from fastce._cpu._math cimport real
from fastce._cpu._rows cimport AHEAD_BYTES, row_group
from fastce._cpu._scalars cimport cap_factor_of
from fastce._cpu._stage cimport (
    UNIT_ROW_STRIDE, RowGroupView, load_classes, load_planes, locate, pad, store_classes, store_planes
)
from fastce._cpu._task cimport Matrix, Task, row_offset
from fastce._cpu._tiles cimport LANES, TILE, cap, cap_slopes, fill, is_plain, product


# Arrays of the workspace, each with room for all units that are done together.
cdef enum:
    EXPS = 0     # in the end the product, or the diagonal
    SECOND = 1   # v, or in the end the gradient
    PROB = 2
    CAPPED = 3   # f(x)
    SLOPES = 4   # 1 - tanh^2
    N_ARRAYS = 5
    # Loops over operands, not calls for each: the code that stages them is large, and would be there as often.
    N_OPERANDS = 3


# Tiles of one operand: those before `n_body` follow each other at `body`, all others at `stage`.
cdef struct Tiles:
    char* body
    char* stage
    Py_ssize_t n_body


cdef struct RowGroup:
    Tiles x        # f(logits)
    Tiles exps
    Tiles v
    Tiles prob
    Tiles slopes
    Tiles out
    Tiles hess
    bint scales_w
    double w_scale[LANES]  # w is multiplied by them, if it is scaled
    const char* ahead_x  # rows to come, of which memory is asked while this one computes
    const char* ahead_v


cdef inline real* tile_of(const Tiles* tiles, Py_ssize_t t, real like) noexcept nogil:
    return <real*>(tiles.body if t < tiles.n_body else tiles.stage) + t * TILE


cdef inline Py_ssize_t classes_of_tile(const Task* task) noexcept nogil:
    return TILE if task.by_rows else TILE // LANES


cdef inline int n_arrays(const Task* task) noexcept nogil:
    if task.softcap != 0:
        return N_ARRAYS
    return PROB + 1 if task.prob.data != NULL else SECOND + 1


cdef inline int n_operands(const Task* task) noexcept nogil:
    """Return how many of logits, probabilities and v may be there."""
    return N_OPERANDS if task.is_product else N_OPERANDS - 1


cdef inline void plan_curvature(Task* task, real like) noexcept nogil:
    """Decide how many rows are done together; kept in the task, for divisions took a tenth of the time."""
    cdef Py_ssize_t step = classes_of_tile(task)
    task.is_float = sizeof(real) == sizeof(float)
    task.n_tiles = (task.n_classes + step - 1) // step
    if task.by_rows:
        task.unit_rows = row_group(task, like)
        task.array_size = task.unit_rows * task.n_tiles * TILE
    else:
        task.unit_rows = LANES * max(
            1, min(<Py_ssize_t>MAX_GROUPS, column_block(like) // (task.n_tiles * step * n_arrays(task))))
        task.array_size = task.unit_rows // LANES * task.n_tiles * TILE


cdef inline Py_ssize_t curvature_bytes(const Task* task, real like) noexcept nogil:
    return n_arrays(task) * task.array_size * <Py_ssize_t>sizeof(real)


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
    store_array(stage + k, <real>1, True, n, tiles.body + k * matrix.class_stride, matrix.format, matrix.class_stride)


cdef inline void locate_unit(const Task* task, Py_ssize_t i, Py_ssize_t u, real* arrays, RowGroup* unit) noexcept nogil:
    """Locate the u-th unit: row i, or 16 rows that are in the workspace already."""
    cdef Py_ssize_t ahead, k, size = task.array_size
    cdef real* stage[N_ARRAYS]
    for k in range(N_ARRAYS):
        stage[k] = arrays + k * size + u * task.n_tiles * TILE
    unit.exps = unit.hess = staged_tiles(stage[EXPS])
    unit.x = staged_tiles(stage[EXPS if task.softcap == 0 else CAPPED])
    unit.v = staged_tiles(stage[SECOND])
    unit.out = unit.exps if task.is_product else unit.v
    unit.prob = staged_tiles(stage[PROB])
    unit.slopes = staged_tiles(stage[SLOPES])
    unit.scales_w = False
    if not task.by_rows:
        return
    ahead = min(i + 1 + AHEAD_BYTES // (task.n_tiles * TILE * <Py_ssize_t>sizeof(real)), task.n_rows - 1)
    unit.ahead_x = task.logits.data + row_offset(task, &task.logits, ahead)
    unit.ahead_v = task.second.data + row_offset(task, &task.second, ahead)
    unit.out = row_tiles(task, &task.out, i, <real*>unit.out.stage)
    unit.x = row_tiles(task, &task.logits, i, <real*>unit.x.stage)
    if task.softcap != 0:
        unit.x.n_body = 0  # nothing is read where it is: f(x) takes its place
    unit.prob = row_tiles(task, &task.prob, i, <real*>unit.prob.stage)
    if task.is_product:
        unit.v = row_tiles(task, &task.second, i, <real*>unit.v.stage)
    else:
        unit.hess = row_tiles(task, &task.second, i, <real*>unit.hess.stage)


cdef inline void find_slopes(const Task* task, const RowGroup* unit, real like) noexcept nogil:
    """Write the slopes of the softcap."""
    cdef real factor = <real>cap_factor_of(task)
    cdef Py_ssize_t t
    for t in range(task.n_tiles):
        cap_slopes(tile_of(&unit.x, t, like), factor, tile_of(&unit.slopes, t, like))


cdef inline void load_unit(const Task* task, const RowGroup* unit, real like) noexcept nogil:
    """Stage what a row needs."""
    cdef const Matrix* matrices[N_OPERANDS]
    cdef const Tiles* tiles[N_OPERANDS]
    cdef Py_ssize_t k
    matrices[0], matrices[1], matrices[2] = &task.logits, &task.prob, &task.second
    tiles[0], tiles[1], tiles[2] = &unit.x, &unit.prob, &unit.v
    for k in range(n_operands(task)):
        load_row(task, matrices[k], tiles[k], <real>(-INFINITY if k == 0 else 0))


cdef inline void cap_row(const Task* task, const RowGroup* unit, real like) noexcept nogil:
    """Apply the softcap to a row."""
    cdef Py_ssize_t t, n_tiles = task.n_tiles
    for t in range(n_tiles):
        cap(tile_of(&unit.x, t, like), <real>cap_factor_of(task))
    fill(
        tile_of(&unit.x, n_tiles - 1, like), task.n_classes - (n_tiles - 1) * TILE, TILE, <real>-INFINITY)


cdef inline void store_unit(const Task* task, const RowGroup* unit, real like) noexcept nogil:
    """Write what was staged of a row's results."""
    cdef const Matrix* matrices[2]
    cdef const Tiles* tiles[2]
    cdef Py_ssize_t k
    matrices[0], matrices[1] = &task.out, &task.second
    tiles[0], tiles[1] = &unit.out, &unit.hess
    for k in range(1 if task.is_product else 2):
        store_row(task, matrices[k], tiles[k], like)


cdef inline const real* w_tile(const Task* task, const RowGroup* unit, Py_ssize_t t, real* buffer) noexcept nogil:
    """Return a tile of w = slope * v, times its scale if it has one; the logits' scale is left out."""
    cdef const real* v = tile_of(&unit.v, t, buffer[0])
    cdef Py_ssize_t g, j
    if task.softcap != 0:
        product(v, tile_of(&unit.slopes, t, buffer[0]), buffer)
        v = buffer
    if unit.scales_w:
        for g in range(TILE // LANES):
            for j in range(LANES):
                buffer[16 * g + j] = v[16 * g + j] * <real>unit.w_scale[j]
        v = buffer
    return v


cdef inline double small_scale(const Task* task) noexcept nogil:
    """Return a scale under which no difference of two w, times `exp_unit` and summed up in a lane, overflows."""
    return 3.552713678800501e-15 if task.is_float else 8.271806125530277e-25  # 2^-48, 2^-80


cdef inline void scale_w(const Task* task, RowGroup* unit, Py_ssize_t lane, const double* unscale) noexcept nogil:
    """Let w be scaled, by what undoes the scale of a single row or those of 16."""
    cdef Py_ssize_t j
    unit.scales_w = True
    for j in range(LANES):
        unit.w_scale[j] = 1 / unscale[lane if task.by_rows else j]


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


cdef inline bint locate_groups(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, RowGroupView* lanes, real like
) noexcept nogil:
    """Locate groups of 16 rows; return True if all lie side by side."""
    cdef bint has_unit_stride = True
    cdef Py_ssize_t g
    for g in range((n + LANES - 1) // LANES):
        locate(task, matrix, start + g * LANES, min(n - g * LANES, <Py_ssize_t>LANES), &lanes[g], like)
        has_unit_stride = has_unit_stride and lanes[g].layout == UNIT_ROW_STRIDE
    return has_unit_stride


cdef inline void load_groups(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, real padding, real* stage
) noexcept nogil:
    """Stage an operand of n rows, 16 to a unit."""
    cdef RowGroupView lanes[MAX_GROUPS]
    cdef Py_ssize_t g, n_groups = (n + LANES - 1) // LANES, size = task.n_tiles * TILE
    if matrix.data == NULL:
        return
    if locate_groups(task, matrix, start, n, lanes, stage[0]):
        load_planes(lanes, n_groups, task.n_classes, stage, size)
        for g in range(n_groups):
            pad(&lanes[g], task.n_classes, padding, stage + g * size)
    else:
        for g in range(n_groups):
            load_classes(&lanes[g], 0, task.n_classes, padding, stage + g * size)
    for g in range(n_groups):
        if start + n + (g + 1) * LANES <= task.n_rows:
            prefetch_group(&lanes[g], n, task.n_classes)


cdef inline void store_groups(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, const real* stage
) noexcept nogil:
    cdef RowGroupView lanes[MAX_GROUPS]
    cdef Py_ssize_t g, n_groups = (n + LANES - 1) // LANES, size = task.n_tiles * TILE
    if locate_groups(task, matrix, start, n, lanes, stage[0]):
        store_planes(lanes, n_groups, task.n_classes, stage, size)
    else:
        for g in range(n_groups):
            store_classes(&lanes[g], 0, task.n_classes, stage + g * size)


cdef inline void load_all_groups(const Task* task, Py_ssize_t start, Py_ssize_t n, real* arrays) noexcept nogil:
    """Stage all operands of n rows."""
    cdef const Matrix* matrices[N_OPERANDS]
    cdef Py_ssize_t places[N_OPERANDS]
    cdef Py_ssize_t k, size = task.array_size
    matrices[0], matrices[1], matrices[2] = &task.logits, &task.prob, &task.second
    places[0], places[1], places[2] = EXPS if task.softcap == 0 else CAPPED, PROB, SECOND
    for k in range(n_operands(task)):
        load_groups(
            task, matrices[k], start, n, <real>(-INFINITY if k == 0 else 0), arrays + places[k] * size)


cdef inline void store_all_groups(const Task* task, Py_ssize_t start, Py_ssize_t n, const real* arrays) noexcept nogil:
    """Write the results of n rows."""
    cdef const Matrix* matrices[2]
    cdef Py_ssize_t places[2]
    cdef Py_ssize_t k, size = task.array_size
    matrices[0], matrices[1] = &task.out, &task.second
    places[0], places[1] = EXPS if task.is_product else SECOND, EXPS
    for k in range(1 if task.is_product else 2):
        store_groups(task, matrices[k], start, n, arrays + places[k] * size)
