"""Column kernel: 16 rows fill the vector, one class after the other.

Design
------
1. It serves class axes that are not contiguous, (N, C, d1, ...) and Fortran order, and rows of few classes, see
   `choice.pxd`. The logits of 16 rows are copied class by class to scratch memory, transposed on the way if need be;
   the loops over them share the row kernel's sums.
2. Up to 2048 classes (float32) stay there from the first read to the last write. More go block by block, and
   their exponentials wait in `out`, as in the row kernel; where that has 16 bits, they are computed twice.
3. The copy is not only for transposition: planes a power of two apart share the same few cache sets, and would evict
   each other between the passes. For the same reason as many rows are copied at once as fit, up to 256: memory then
   delivers runs of whole cache lines from each plane.
"""
from fastce._cpu.kernel.blocks cimport Block, cap, multiply_slopes, sum_exps, write_log
from fastce._cpu.kernel.gradient cimport fill_lanes_of, find_alpha, write_gradient
from fastce._cpu.kernel.scalars cimport Scalars, begin, describe_argmax_patches, finish, merge, take
from fastce._cpu.kernel.spec cimport KernelSpec, align, make_spec
from fastce._cpu.kernel.sums cimport (
    PIECE, Totals, add_piece, begin_totals, describe_block, find_argmax, find_maxima, narrow_maxima, take_totals
)
from fastce._cpu.lanes cimport LANES
from fastce._cpu.layout.convert cimport NATIVE
from fastce._cpu.layout.row_groups cimport (
    ASKED, MAX_GROUPS, RowGroupView, load_classes, load_groups, locate, prefetch_classes, store_classes, store_groups
)
from fastce._cpu.math cimport real, sech2
from fastce._cpu.task cimport LEAST_BLOCK, LOG_SOFTMAX, Task, block_size

cdef enum:
    SCRATCH_BYTES = 131072  # fits into any L2 cache


cdef inline Py_ssize_t column_block(real like) noexcept nogil:
    """Return the number of classes in a block."""
    return SCRATCH_BYTES // (LANES * <Py_ssize_t>sizeof(real))


cdef inline Py_ssize_t scratch_bytes(real like) noexcept nogil:
    """Return the size of scratch memory that has room for any block."""
    return SCRATCH_BYTES + LEAST_BLOCK * LANES * <Py_ssize_t>sizeof(real)


cdef inline Py_ssize_t column_group(const Task* task, real like) noexcept nogil:
    """Return how many rows are copied at once."""
    return LANES * max(1, min(MAX_GROUPS, column_block(like) // task.n_classes))


cdef inline void note_patch_logits(
    const Task* task, Scalars* rows, Py_ssize_t start, Py_ssize_t stop, real* scratch
) noexcept nogil:
    """Take the patch classes' logits from a block of them, and apply the softcap to the block."""
    cdef real factor = <real>task.cap_factor
    cdef Py_ssize_t j, k
    if factor != 0:
        for j in range(rows.n):
            k = rows.patch_class[j] - start
            if 0 <= k and k < stop - start:
                rows.slope_patch[j] = sech2(<double>(scratch[k * LANES + j] * factor))
        cap(scratch, (stop - start) * LANES, factor, scratch)
    if task.target != NULL:
        for j in range(rows.n):
            k = rows.patch_class[j] - start
            if 0 <= k and k < stop - start:
                rows.x_patch[j] = scratch[k * LANES + j]


cdef inline void sweep_classes(
    const Task* task, const RowGroupView* logits, const RowGroupView* prob, Py_ssize_t start, Py_ssize_t stop,
    bint keep_logits, real* scratch, Scalars* block
) noexcept nogil:
    """Sum up a block of classes from scratch memory; leave the exponentials there, or the logits."""
    cdef real exps[PIECE * LANES]
    cdef real probs[PIECE * LANES]
    cdef real row_max[LANES]
    cdef Py_ssize_t j, k = 0, n = (stop - start) * LANES
    cdef Totals totals
    cdef Block b = describe_block(task, False)
    if not task.normalized:
        find_maxima(False, NATIVE, scratch, n, block.row_max, scratch[0])
    else:
        for j in range(LANES):
            block.row_max[j] = 0
    if task.find_argmax or task.needs_argmax_patch:
        find_argmax(False, scratch, n, start, block, 0)
    narrow_maxima(False, block.row_max, row_max)
    begin_totals(task, False, &totals)
    while k < n:
        b.n = min(n - k, <Py_ssize_t>PIECE * LANES)
        prefetch_classes(logits, ASKED, LANES - ASKED, start + k // LANES, start + (k + b.n) // LANES)
        b.x = b.e = scratch + k
        if keep_logits:
            b.e = exps
        if task.sum_prob:
            load_classes(prob, start + k // LANES, start + (k + b.n) // LANES, probs)
            b.t = probs
        add_piece(task, False, &b, start + k // LANES, row_max, &totals)
        k += b.n
    take_totals(task, False, False, &totals, scratch, n, block, 0)


cdef inline void write_classes(
    const Task* task, const Scalars* rows, const RowGroupView* logits, const RowGroupView* prob, Py_ssize_t start,
    Py_ssize_t stop, bint from_logits, const double* block_max, real* scratch
) noexcept nogil:
    """Turn a block in scratch memory, exponentials relative to `block_max` or logits, into what `out` shall hold."""
    cdef real buffer[PIECE * LANES]
    cdef real row_max[LANES]
    cdef real log_sum[LANES]
    cdef double alpha[LANES]
    cdef const real* t = NULL
    cdef Py_ssize_t j, k = start, m, n = stop - start
    cdef real* e = scratch
    cdef Block b
    if from_logits:
        fill_lanes_of(False, rows.row_max, 0, row_max)
    if task.out_kind == LOG_SOFTMAX:
        fill_lanes_of(False, rows.log_sumexp, 0, log_sum)
        write_log(scratch, n * LANES, row_max, task.scale, log_sum, scratch)
    else:
        if from_logits:
            b = describe_block(task, False)
            b.x = b.e = scratch
            b.n = n * LANES
            b.sums_entropy = False
            sum_exps(&b, row_max, task.scale)
            block_max = <const double*>rows.row_max
        find_alpha(task, False, rows, 0, block_max, alpha)
        while k < stop:
            m = min(stop - k, <Py_ssize_t>PIECE) if task.sum_prob or task.softcap != 0 else n
            if task.sum_prob:
                load_classes(prob, k, k + m, buffer)
                t = buffer
            write_gradient(task, False, rows, 0, alpha, k, m * LANES, e, t)
            if task.softcap != 0:
                load_classes(logits, k, k + m, buffer)
                multiply_slopes(e, m * LANES, buffer, task.cap_factor, e)
            e += m * LANES
            k += m
    for j in range(rows.n):
        if rows.n_kept < LANES and rows.kept[j] == 0:
            for k in range(n):
                scratch[k * LANES + j] = 0
        k = rows.patch_class[j] - start
        if 0 <= k and k < n:
            scratch[k * LANES + j] = <real>rows.grad_patch[j]


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


cdef inline void process_group(
    const Task* task, Py_ssize_t start, const RowGroupView* logits, real* scratch
) noexcept nogil:
    """Do up to 16 rows, all of whose classes are in scratch memory, and leave the result there."""
    cdef Scalars rows
    cdef RowGroupView prob
    cdef Py_ssize_t n = logits.n
    locate(task, &task.prob, start, n, &prob, scratch[0])
    begin(task, &rows, start, n, scratch[0])
    note_patch_logits(task, &rows, 0, task.n_classes, scratch)
    if task.has_option_sums or not task.normalized:
        sweep_classes(task, logits, &prob, 0, task.n_classes, keeps_logits(task), scratch, &rows)
    choose_argmax_patches(task, &rows, scratch[0])
    finish(task, &rows, scratch[0])
    if task.out.data != NULL:
        write_classes(task, &rows, logits, &prob, 0, task.n_classes, keeps_logits(task), rows.row_max, scratch)


cdef inline void process_blocks(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, double* block_max
) noexcept nogil:
    """Do n <= 16 rows of more classes than scratch memory holds; `block_max` has room for 16 numbers per block."""
    cdef Scalars rows
    cdef Scalars block
    cdef RowGroupView logits
    cdef RowGroupView prob
    cdef RowGroupView out
    cdef bint keep_logits = keeps_logits(task) or task.out.data == NULL or task.out.format != NATIVE
    cdef Py_ssize_t j, stop, k = 0
    locate(task, &task.logits, start, n, &logits, scratch[0])
    locate(task, &task.prob, start, n, &prob, scratch[0])
    locate(task, &task.out, start, n, &out, scratch[0])
    begin(task, &rows, start, n, scratch[0])
    while k < task.n_classes:
        stop = k + block_size(task, k)
        load_classes(&logits, k, stop, scratch)
        note_patch_logits(task, &rows, k, stop, scratch)
        sweep_classes(task, &logits, &prob, k, stop, keep_logits, scratch, &block)
        for j in range(LANES):
            block_max[k // task.block * LANES + j] = block.row_max[j]
        if k == 0:
            take(task, &rows, 0, &block, LANES)
        else:
            merge(task, &rows, 0, &block, LANES, k // task.block)
        if not keep_logits:
            store_classes(&out, k, stop, scratch)
        k = stop
    choose_argmax_patches(task, &rows, scratch[0])
    finish(task, &rows, scratch[0])
    if task.out.data == NULL:
        return
    k = 0
    while k < task.n_classes:
        stop = k + block_size(task, k)
        if keep_logits:
            load_classes(&logits, k, stop, scratch)
            if task.softcap != 0:
                cap(scratch, (stop - k) * LANES, task.cap_factor, scratch)
        else:
            load_classes(&out, k, stop, scratch)
        write_classes(task, &rows, &logits, &prob, k, stop, keep_logits, block_max + k // task.block * LANES, scratch)
        store_classes(&out, k, stop, scratch)
        k = stop


cdef inline void process_columns(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, double* block_max
) noexcept nogil:
    """Do n rows, at most `column_group` of them."""
    cdef RowGroupView lanes[MAX_GROUPS]
    cdef Py_ssize_t g
    if task.n_classes > column_block(scratch[0]):
        process_blocks(task, start, n, scratch, block_max)
        return
    load_groups(task, &task.logits, start, n, ASKED, lanes, scratch)
    for g in range((n + LANES - 1) // LANES):
        process_group(task, start + g * LANES, &lanes[g], scratch + g * task.n_classes * LANES)
    if task.out.data != NULL:
        store_groups(task, &task.out, start, n, scratch)


cdef inline void process_by_columns(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    cdef Py_ssize_t i = start
    cdef Py_ssize_t step = column_group(task, like)
    while i < stop:
        process_columns(task, i, min(stop - i, step), <real*>workspace, <double*>(workspace + scratch_bytes(like)))
        i += step


cdef inline void do_columns(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    if task.is_float:
        process_by_columns(task, start, stop, workspace, <float>0)
    else:
        process_by_columns(task, start, stop, workspace, <double>0)


cdef inline KernelSpec plan_columns(Task* task, real like) noexcept nogil:
    cdef Py_ssize_t group = column_group(task, like)
    cdef Py_ssize_t workspace  # scratch memory, and 16 maxima for each block
    task.block = column_block(like)
    workspace = scratch_bytes(like) + align((task.n_classes // task.block + 1) * LANES * <Py_ssize_t>sizeof(double))
    return make_spec(do_columns, group, LANES, workspace)
