"""Column kernel: 16 rows fill the vector, one class after the other.

Design
------
1. It serves class axes that are not contiguous, (N, C, d1, ...) and Fortran order, and rows of few classes, whose
   vectors a row kernel would leave half empty. The logits of 16 rows are staged class by class in a buffer, transposed
   on the way if need be; the loops over them share the row kernel's sums.
2. Up to 2048 classes (float32) stay in the stage from the first read to the last write. More go block by block, and
   their exponentials wait in `out`, as in the row kernel; where that has 16 bits, they are computed twice.
3. Staging is not only for transposition: planes a power of two apart share the same few cache sets, and would evict
   each other between the passes. For the same reason as many rows are staged at once as fit, up to 256: memory then
   delivers runs of whole cache lines from each plane.
"""
from libc.math cimport INFINITY
from libc.stdint cimport int32_t

from fastce._cpu.kernel.blocks cimport (
    Block, cap_row, find_in_lanes, find_lane_maxima, multiply_slopes, sum_targets_in_lanes, sweep_lanes,
    write_lane_gradients, write_lane_logs
)
from fastce._cpu.lanes cimport LANES, NO_CLASS, asked_sums, fill, narrow, rest_of, widen
from fastce._cpu.kernel.row_view cimport weight_block
from fastce._cpu.kernel.scalars cimport (
    Scalars, begin, describe_argmax_patches, finish, merge, sum_factor, take, unscaled_exp
)
from fastce._cpu.kernel.spec cimport KernelSpec, align, make_spec
from fastce._cpu.layout.convert cimport NATIVE
from fastce._cpu.layout.stage cimport (
    MAX_GROUPS, RowGroupView, load_classes, load_groups, locate, store_classes, store_groups
)
from fastce._cpu.math cimport real, sech2
from fastce._cpu.task cimport ALL, LOG_SOFTMAX, REST, Task

cdef enum:
    STAGE_BYTES = 131072  # fits into any L2 cache
    # Classes that may wait in a buffer. Sums are formed by them in any case: bits must not depend on what waits.
    PIECE = 128


cdef inline Py_ssize_t column_block(real like) noexcept nogil:
    """Return the number of classes in a block."""
    return STAGE_BYTES // (LANES * <Py_ssize_t>sizeof(real))


cdef inline Py_ssize_t column_group(const Task* task, real like) noexcept nogil:
    """Return how many rows are staged at once."""
    return LANES * max(1, min(MAX_GROUPS, column_block(like) // task.n_classes))


cdef inline void note_patch_logits(
    const Task* task, Scalars* rows, Py_ssize_t start, Py_ssize_t stop, real* stage
) noexcept nogil:
    """Take the patch classes' logits from a block of them, and apply the softcap to the block."""
    cdef real factor = <real>task.cap_factor
    cdef Py_ssize_t j, k
    if factor != 0:
        for j in range(rows.n):
            k = rows.patch_class[j] - start
            if 0 <= k and k < stop - start:
                rows.slope_patch[j] = sech2(<double>(stage[k * LANES + j] * factor))
        cap_row(stage, (stop - start) * LANES, factor, stage)
    if task.target != NULL:
        for j in range(rows.n):
            k = rows.patch_class[j] - start
            if 0 <= k and k < stop - start:
                rows.x_patch[j] = stage[k * LANES + j]


cdef inline void add_lanes(const double* lanes, double* total) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(LANES):
        total[j] += lanes[j]


cdef inline void sweep_classes(
    const Task* task, const RowGroupView* prob, Py_ssize_t start, Py_ssize_t stop, bint keep_logits, real* stage,
    Scalars* block
) noexcept nogil:
    """Sum up a block of classes from the stage; leave the exponentials there, or the logits."""
    cdef real exps[PIECE * LANES]
    cdef real probs[PIECE * LANES]
    cdef real row_max[LANES]
    cdef double all_terms[LANES]
    cdef double rest[LANES]
    cdef int32_t first[LANES]
    cdef real scale = <real>task.scale
    cdef Py_ssize_t c, j, k = 0, n = stop - start
    cdef Block b
    fill(row_max, 0, LANES, <real>0)
    if not task.normalized:
        find_lane_maxima(stage, n, row_max)
    widen(row_max, block.row_max)
    for j in range(LANES):
        row_max[j] = <real>0 if row_max[j] == -INFINITY else row_max[j]
    if task.find_argmax or task.needs_argmax_patch:
        find_in_lanes(stage, n, row_max, first)
        for j in range(LANES):
            block.argmax[j] = -1 if first[j] == NO_CLASS else start + first[j]
    fill(all_terms, 0, LANES, <double>0)
    fill(rest, 0, LANES, <double>0)
    for c in range(task.n_sums):
        fill(block.sums[task.sums[c]], 0, LANES, <double>0)
    b.t = NULL
    b.asked = asked_sums(task)
    b.sums_entropy = task.sum_entropy
    while k < n:
        b.n = min(n - k, <Py_ssize_t>PIECE)
        b.x = stage + k * LANES
        b.e = stage + k * LANES
        if keep_logits:
            b.e = exps
        if task.sum_weight or task.sum_prob:
            b.w = weight_block(task, start + k, scale)
            if task.sum_prob:
                load_classes(prob, start + k, start + k + b.n, probs)
                b.t = probs
            sum_targets_in_lanes(&b, row_max)
        if not task.normalized:
            sweep_lanes(&b, row_max, scale)
            add_lanes(b.sums[ALL], all_terms)
            add_lanes(b.sums[REST], rest)
        for c in range(task.n_sums):
            add_lanes(b.sums[task.sums[c]], block.sums[task.sums[c]])
        k += b.n
    for j in range(LANES):
        block.sumexp_excl_max[j] = rest_of(all_terms[j], rest[j], scale)
    for c in range(task.n_sums):
        for j in range(LANES):
            block.sums[task.sums[c]][j] *= sum_factor(task.sums[c], scale)


cdef inline void write_classes(
    const Task* task, const Scalars* rows, const RowGroupView* logits, const RowGroupView* prob, Py_ssize_t start,
    Py_ssize_t stop, bint from_logits, const double* block_max, real* stage
) noexcept nogil:
    """Turn a staged block, exponentials relative to `block_max` or logits, into what `out` shall hold."""
    cdef real buffer[PIECE * LANES]
    cdef real row_max[LANES]
    cdef real alpha[LANES]
    cdef real beta[LANES]
    cdef real gamma[LANES]
    cdef real scale = <real>task.scale
    cdef const real* added = NULL
    cdef const real* t = NULL
    cdef Py_ssize_t j, k = 0, m, n = stop - start
    cdef Block b
    if from_logits:
        narrow(rows.row_max, row_max)
    if task.out_kind == LOG_SOFTMAX:
        narrow(rows.log_sumexp, alpha)
        write_lane_logs(stage, n, row_max, scale, alpha)
    else:
        narrow(rows.alpha, alpha)
        narrow(rows.beta, beta)
        narrow(rows.gamma, gamma)
        if task.sum_weight or task.sum_prob:
            added = beta
        if not from_logits and block_max != rows.row_max:
            for j in range(LANES):
                alpha[j] = <real>(rows.alpha[j] * unscaled_exp(task.scale * (block_max[j] - rows.row_max[j])))
        if from_logits:
            b.x = b.e = stage
            b.n = n
            b.sums_entropy = False
            sweep_lanes(&b, row_max, scale)
        while k < n:
            m = min(n - k, <Py_ssize_t>PIECE) if task.sum_prob or task.softcap != 0 else n
            if task.sum_prob:
                load_classes(prob, start + k, start + k + m, buffer)
                t = buffer
            write_lane_gradients(
                stage + k * LANES, m, alpha, added, weight_block(task, start + k, scale), gamma, t)
            if task.softcap != 0:
                load_classes(logits, start + k, start + k + m, buffer)
                multiply_slopes(stage + k * LANES, m * LANES, buffer, task.cap_factor, stage + k * LANES)
            k += m
    for j in range(rows.n):
        if rows.n_kept < LANES and rows.kept[j] == 0:
            for k in range(n):
                stage[k * LANES + j] = 0
        k = rows.patch_class[j] - start
        if 0 <= k and k < n:
            stage[k * LANES + j] = <real>rows.grad_patch[j]


cdef inline bint keeps_logits(const Task* task) noexcept nogil:
    """Return True if the second pass starts from logits."""
    return task.softcap != 0 or task.out_kind == LOG_SOFTMAX


cdef inline void choose_argmax_patches(const Task* task, Scalars* rows, real like) noexcept nogil:
    """Take the arg-max for the patch class under class probabilities."""
    cdef Py_ssize_t j
    if task.needs_argmax_patch:
        for j in range(rows.n):
            rows.patch_class[j] = -1 if rows.kept[j] == 0 else rows.argmax[j]
        describe_argmax_patches(task, rows, like)


cdef inline void process_staged(
    const Task* task, Py_ssize_t start, const RowGroupView* logits, real* stage
) noexcept nogil:
    """Do up to 16 rows, all of whose classes are staged, as far as the stage."""
    cdef Scalars rows
    cdef RowGroupView prob
    cdef Py_ssize_t n = logits.n
    locate(task, &task.prob, start, n, &prob, stage[0])
    begin(task, &rows, start, n, stage[0])
    note_patch_logits(task, &rows, 0, task.n_classes, stage)
    if task.has_option_sums or not task.normalized:
        sweep_classes(task, &prob, 0, task.n_classes, keeps_logits(task), stage, &rows)
    choose_argmax_patches(task, &rows, stage[0])
    finish(task, &rows, stage[0])
    if task.out.data != NULL:
        write_classes(task, &rows, logits, &prob, 0, task.n_classes, keeps_logits(task), rows.row_max, stage)


cdef inline void process_blocks(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* stage, double* block_max
) noexcept nogil:
    """Do n <= 16 rows of more classes than the stage holds; `block_max` has room for 16 numbers per block."""
    cdef Scalars rows
    cdef Scalars block
    cdef RowGroupView logits
    cdef RowGroupView prob
    cdef RowGroupView out
    cdef bint keep_logits = keeps_logits(task) or task.out.data == NULL or task.out.format != NATIVE
    cdef Py_ssize_t step = column_block(stage[0])
    cdef Py_ssize_t j, stop, k = 0
    locate(task, &task.logits, start, n, &logits, stage[0])
    locate(task, &task.prob, start, n, &prob, stage[0])
    locate(task, &task.out, start, n, &out, stage[0])
    begin(task, &rows, start, n, stage[0])
    while k < task.n_classes:
        stop = min(k + step, task.n_classes)
        load_classes(&logits, k, stop, stage)
        note_patch_logits(task, &rows, k, stop, stage)
        sweep_classes(task, &prob, k, stop, keep_logits, stage, &block)
        for j in range(LANES):
            block_max[k // step * LANES + j] = block.row_max[j]
        if k == 0:
            take(task, &rows, 0, &block, LANES)
        else:
            merge(task, &rows, 0, &block, LANES, k // step)
        if not keep_logits:
            store_classes(&out, k, stop, stage)
        k = stop
    choose_argmax_patches(task, &rows, stage[0])
    finish(task, &rows, stage[0])
    if task.out.data == NULL:
        return
    k = 0
    while k < task.n_classes:
        stop = min(k + step, task.n_classes)
        if keep_logits:
            load_classes(&logits, k, stop, stage)
            if task.softcap != 0:
                cap_row(stage, (stop - k) * LANES, task.cap_factor, stage)
        else:
            load_classes(&out, k, stop, stage)
        write_classes(task, &rows, &logits, &prob, k, stop, keep_logits, block_max + k // step * LANES, stage)
        store_classes(&out, k, stop, stage)
        k = stop


cdef inline void process_columns(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* stage, double* block_max
) noexcept nogil:
    """Do n rows, at most `column_group` of them."""
    cdef RowGroupView lanes[MAX_GROUPS]
    cdef Py_ssize_t g
    if task.n_classes > column_block(stage[0]):
        process_blocks(task, start, n, stage, block_max)
        return
    load_groups(task, &task.logits, start, n, lanes, stage)
    for g in range((n + LANES - 1) // LANES):
        process_staged(task, start + g * LANES, &lanes[g], stage + g * task.n_classes * LANES)
    if task.out.data != NULL:
        store_groups(task, &task.out, start, n, stage)


cdef inline void process_by_columns(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    cdef Py_ssize_t i = start
    cdef Py_ssize_t step = column_group(task, like)
    while i < stop:
        process_columns(task, i, min(stop - i, step), <real*>workspace, <double*>(workspace + STAGE_BYTES))
        i += step


cdef inline void columns_float(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    process_by_columns(task, start, stop, workspace, <float>0)


cdef inline void columns_double(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    process_by_columns(task, start, stop, workspace, <double>0)


cdef inline KernelSpec plan_columns(Task* task, real like) noexcept nogil:
    cdef Py_ssize_t group = column_group(task, like)
    cdef Py_ssize_t workspace  # the stage, and 16 maxima for each block
    task.block = column_block(like)
    workspace = STAGE_BYTES + align((task.n_classes // task.block + 1) * LANES * <Py_ssize_t>sizeof(double))
    if real is float:
        return make_spec(columns_float, group, LANES, workspace)
    else:
        return make_spec(columns_double, group, LANES, workspace)
