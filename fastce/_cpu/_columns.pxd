"""Column kernel: 16 rows fill the vector, one class after the other.

Design
------
1. It serves class axes that are not contiguous, (N, C, d1, ...) and Fortran order, and rows of few classes, whose
   vectors a row kernel would leave half empty. The logits of 16 rows are staged class by class in a buffer, transposed
   on the way if need be; 4 classes of it make a tile, on which the row kernel's own vector code runs.
2. Up to 1024 classes (float32) stay in the stage from the first read to the last write. More go block by block, and
   their exponentials wait in `out`, as in the row kernel.
3. Staging is not only for transposition: planes a power of two apart share the same few cache sets, and would evict
   each other between the passes.
"""
from libc.math cimport INFINITY
from libc.stdint cimport int32_t
from libc.string cimport memcpy

from fastce._cpu._math cimport exp_unit, real
from fastce._cpu._scalars cimport (
    Scalars, begin, cap_factor_of, describe_argmax_peaks, finish, merge, scale_of, sum_factor, take, unscaled_exp
)
from fastce._cpu._task cimport (
    ALL, E_D, LOG_SOFTMAX, N_SUMS, NATIVE, REST, Format, Matrix, Task, read_converted, row_offset, weight_of, write
)
from fastce._cpu._tiles cimport *

cdef enum:
    STAGE_BYTES = 65536  # a small part of any L2 cache


# Where the lanes of one operand are: the row of each, and whether they are an ordinary array.
cdef struct Lanes:
    char* row[LANES]
    Py_ssize_t n
    Py_ssize_t class_stride
    bint plain
    Format format


cdef inline Py_ssize_t column_block(real like) noexcept nogil:
    """Return the number of classes in a block."""
    return STAGE_BYTES // (LANES * <Py_ssize_t>sizeof(real))


cdef inline Lanes locate(
    const Task* task, const Matrix* matrix, Py_ssize_t start, Py_ssize_t n, real like
) noexcept nogil:
    cdef Lanes lanes
    cdef Py_ssize_t j
    lanes.n = n
    lanes.class_stride = matrix.class_stride
    lanes.format = matrix.format
    lanes.plain = False
    if matrix.data == NULL:
        return lanes
    for j in range(n):
        lanes.row[j] = matrix.data + row_offset(task, matrix, start + j)
    lanes.plain = (
        n == LANES and matrix.format == NATIVE and <size_t>lanes.row[0] % sizeof(real) == 0
        and matrix.class_stride % sizeof(real) == 0)
    for j in range(1, n):
        lanes.plain = lanes.plain and lanes.row[j] == lanes.row[0] + j * <Py_ssize_t>sizeof(real)
    return lanes


cdef inline void load_class(const Lanes* lanes, Py_ssize_t k, real* x) noexcept nogil:
    cdef const real* plain
    cdef Py_ssize_t j
    if lanes.plain:
        plain = <const real*>(lanes.row[0] + k * lanes.class_stride)
        for j in range(LANES):
            x[j] = plain[j]
    elif lanes.format != NATIVE:
        for j in range(lanes.n):
            x[j] = read_converted(lanes.row[j] + k * lanes.class_stride, lanes.format, x[j])
    else:
        for j in range(lanes.n):
            memcpy(x + j, lanes.row[j] + k * lanes.class_stride, sizeof(real))


cdef inline void store_class(const Lanes* lanes, Py_ssize_t k, const real* x) noexcept nogil:
    cdef real* plain
    cdef Py_ssize_t j
    if lanes.plain:
        plain = <real*>(lanes.row[0] + k * lanes.class_stride)
        for j in range(LANES):
            plain[j] = x[j]
    else:
        for j in range(lanes.n):
            memcpy(lanes.row[j] + k * lanes.class_stride, x + j, sizeof(real))


cdef inline void load_classes(
    const Lanes* lanes, Py_ssize_t start, Py_ssize_t stop, real padding, real cap_factor, real* stage
) noexcept nogil:
    """Stage the classes start .. stop - 1, padded to whole tiles, under the softcap if there is one."""
    cdef Py_ssize_t n = stop - start
    cdef Py_ssize_t n_tiles = (n + 3) // 4
    cdef Py_ssize_t k
    if lanes.n < LANES:
        fill(stage, 0, n_tiles * TILE, <real>0)
    for k in range(n):
        load_class(lanes, start + k, stage + k * LANES)
    if cap_factor != 0:
        fill(stage, n * LANES, n_tiles * TILE, <real>0)
        for k in range(n_tiles):
            cap(stage + k * TILE, cap_factor)
    fill(stage, n * LANES, n_tiles * TILE, padding)


cdef inline void load_weights(const Task* task, Py_ssize_t start, Py_ssize_t stop, real* tile) noexcept nogil:
    """Fill a tile with the weights of up to four classes, each in all lanes."""
    cdef Py_ssize_t g
    for g in range(4):
        fill(tile, LANES * g, LANES * (g + 1),
             weight_of(task, start + g, tile[0]) if start + g < stop else <real>0)


cdef inline void sweep_classes(
    const Task* task, const Lanes* logits, const Lanes* prob, Py_ssize_t start, Py_ssize_t stop,
    bint keep_logits, real* stage, Scalars* block
) noexcept nogil:
    """Sum up a block of classes; leave the exponentials in the stage, or the logits."""
    cdef real e[TILE]
    cdef real w[TILE]
    cdef real t[TILE]
    cdef real top[LANES]
    cdef real sums[N_SUMS * LANES]
    cdef int32_t first[LANES]
    cdef real scale = <real>scale_of(task)
    cdef real* x
    cdef Py_ssize_t j, k, n_tiles = (stop - start + 3) // 4
    load_classes(logits, start, stop, <real>-INFINITY, <real>cap_factor_of(task), stage)
    fill(top, 0, LANES, <real>0 if task.normalized else <real>-INFINITY)
    if not task.normalized:
        for k in range(n_tiles):
            fold_max(stage + k * TILE, top)
    for j in range(LANES):
        first[j] = NO_CLASS
        block.top[j] = top[j]
        top[j] = <real>0 if top[j] == -INFINITY else top[j]
    fill(sums, 0, N_SUMS * LANES, <real>0)
    for k in range(n_tiles):
        x = stage + k * TILE
        if not task.normalized:
            exp_tile(x, top, scale, e)
            fold(e, sums + 16 * ALL)
            fold_rest(e, sums)
        if task.extras:
            load_weights(task, start + 4 * k, stop, w)
            if task.sum_prob:
                load_classes(prob, start + 4 * k, min(start + 4 * k + 4, stop), <real>0, <real>0, t)
            fold_targets(task, x, top, w, t if task.sum_prob else NULL, sums)
            if task.sum_entropy:
                fold_shifted(e, x, top, sums + 16 * E_D)
            if task.find_argmax or task.find_peak:
                fold_argmax(x, top, <int32_t>(4 * k), 1, 0, first)
        if not keep_logits:
            copy(e, x)
    for j in range(logits.n):
        block.rest[j] = rest_of(sums[16 * ALL + j], sums[16 * REST + j], scale)
        for k in range(task.n_sums):
            block.sums[task.sums[k]][j] = sums[16 * task.sums[k] + j] * sum_factor(task.sums[k], scale)
        block.argmax[j] = -1 if first[j] == NO_CLASS else start + first[j]


cdef inline void write_classes(
    const Task* task, const Scalars* rows, const Lanes* logits, const Lanes* prob, const Lanes* out,
    Py_ssize_t start, Py_ssize_t stop, const double* tops, real* stage
) noexcept nogil:
    """Write a block of classes from the stage, which holds exponentials relative to `tops`, or logits."""
    cdef real e[TILE]
    cdef real w[TILE]
    cdef real t[TILE]
    cdef real g[TILE]
    cdef real top[LANES]
    cdef real alpha[LANES]
    cdef real beta[LANES]
    cdef real gamma[LANES]
    cdef real scale = <real>scale_of(task)
    cdef real cap_factor = <real>cap_factor_of(task)
    cdef bint log_softmax = task.out_kind == LOG_SOFTMAX
    cdef real* x
    cdef Py_ssize_t j, k, i
    cdef double gap
    for j in range(LANES):
        top[j] = alpha[j] = beta[j] = gamma[j] = 0
    for j in range(rows.n):
        gap = 0 if cap_factor != 0 or tops[j] == rows.top[j] else scale_of(task) * (tops[j] - rows.top[j])
        top[j] = <real>rows.top[j]
        alpha[j] = <real>(rows.log_sum[j] if log_softmax else rows.alpha[j] * unscaled_exp(gap))
        beta[j] = <real>rows.beta[j]
        gamma[j] = <real>rows.gamma[j]
    for k in range((stop - start + 3) // 4):
        x = stage + k * TILE
        if log_softmax:
            write_log(x, top, scale, alpha, g)
        else:
            if cap_factor != 0:
                exp_tile(x, top, scale, e)
                x = e
            if task.extras:
                load_weights(task, start + 4 * k, stop, w)
                if task.sum_prob:
                    load_classes(prob, start + 4 * k, min(start + 4 * k + 4, stop), <real>0, <real>0, t)
                write_gradient(x, alpha, beta, w, gamma, t if task.sum_prob else NULL, g)
            else:
                scale_exp(x, alpha, g)
            if cap_factor != 0:
                load_classes(logits, start + 4 * k, min(start + 4 * k + 4, stop), <real>0, <real>0, e)
                multiply_cap_slope(e, cap_factor, g)
        for j in range(rows.n):
            if rows.skipped[j]:
                for i in range(4):
                    g[16 * i + j] = 0
        for i in range(min(4, stop - start - 4 * k)):
            store_class(out, start + 4 * k + i, g + 16 * i)


cdef inline void process_column(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* stage, double* tops
) noexcept nogil:
    """Do all of n <= 16 rows; `tops` has room for 16 numbers per block."""
    cdef Scalars rows
    cdef Scalars block
    cdef Lanes logits = locate(task, &task.logits, start, n, stage[0])
    cdef Lanes prob = locate(task, &task.prob, start, n, stage[0])
    cdef Lanes out = locate(task, &task.out, start, n, stage[0])
    cdef bint keep_logits = task.softcap != 0 or task.out_kind == LOG_SOFTMAX or task.out.data == NULL
    cdef bint single = task.n_classes <= column_block(stage[0])
    cdef Py_ssize_t step = column_block(stage[0])
    cdef Py_ssize_t i, j, stop, k = 0
    begin(task, &rows, start, n, stage[0])
    while k < task.n_classes and (task.extras or not task.normalized):
        stop = min(k + step, task.n_classes)
        sweep_classes(task, &logits, &prob, k, stop, keep_logits, stage, &block)
        for j in range(n):
            tops[k // step * LANES + j] = block.top[j]
        if k == 0:
            take(task, &rows, 0, &block, n)
        else:
            merge(task, &rows, 0, &block, n, k // step)
        if not single and not keep_logits:
            for i in range(stop - k):
                store_class(&out, k + i, stage + i * LANES)
        k = stop
    if task.find_peak:
        for j in range(n):
            rows.peak[j] = -1 if rows.skipped[j] else rows.argmax[j]
        describe_argmax_peaks(task, &rows, stage[0])
    finish(task, &rows, stage[0])
    if task.out.data == NULL:
        return
    k = 0
    while k < task.n_classes:
        stop = min(k + step, task.n_classes)
        if not single and keep_logits:
            load_classes(&logits, k, stop, <real>-INFINITY, <real>cap_factor_of(task), stage)
        elif not single:
            load_classes(&out, k, stop, <real>0, <real>0, stage)
        write_classes(task, &rows, &logits, &prob, &out, k, stop, tops + k // step * LANES, stage)
        k = stop
    for j in range(n):
        if rows.peak[j] >= 0:
            write(out.row[j] + rows.peak[j] * out.class_stride, <real>rows.grad_peak[j])
