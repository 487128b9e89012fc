"""Row kernel: the classes of a row lie side by side and fill the vector.

Design
------
1. A row is swept in blocks of 4 or 8 KiB, which stay in L1: maximum, then exp relative to the largest so far. So a row
   of any length is read from memory once by the sweep; a row-wide maximum first would read a long row twice. A second
   pass turns exponentials into the gradient, with one factor per block. (Relative to each block's own maximum, two
   exponentials of scalars per block took a tenth of the time.) The maximum of the block that comes next, of this row or
   the next one, is found while this one's exponentials are computed, see `simd/row_sweep.h`.
2. The exponentials wait in `out`, which may be the logits themselves: no N x C memory besides. Under a softcap, whose
   slope needs the logit again, they go into scratch memory, and the second pass computes them anew.
3. Up to 16 short rows go through the first pass, the scalars and the second pass together: the scalars of one row are a
   chain of 300 cycles, those of 16 rows hide each other's. If each is one block, and nothing is asked for but a sum of
   exponentials, C does the first pass over all: 1000 floats took 0.9 of the time with AVX-512, and 128 floats 0.7.
4. Every block is an array of the arithmetic's type when C gets it: it lies there, or was copied (see `copied_rows`), or
   the softcap was applied to it on the way into scratch memory. Only the loop for rows of 16 bits without options reads
   them as they are.
"""
from libc.math cimport NAN

from fastce._cpu.kernel.blocks cimport BY_LINES, Block, SweptRows, cap, find, sweep_one_by_one
from fastce._cpu.kernel.row_view cimport (
    RowView, given_by_caller, locate_row, prob_block, scratch_size, start_of_row
)
from fastce._cpu.kernel.row_writes cimport (
    WaitingRows, begin_waiting, can_wait, end_waiting_block, finish_waiting, take_waiting_block, write_lane, write_patch
)
from fastce._cpu.kernel.scalars cimport (
    Scalars, add, begin, cap_patch_logits, describe_argmax_patches, finish, merge, next_kept,
    read_patch_logit, read_patch_logits, take
)
from fastce._cpu.kernel.spec cimport KernelSpec, align, make_spec, process_t
from fastce._cpu.kernel.sums cimport (
    Totals, add_piece, begin_totals, describe_block, find_argmax, find_maxima, narrow_maxima, take_totals
)
from fastce._cpu.lanes cimport LANES, choose_excl_max
from fastce._cpu.layout.convert cimport NATIVE, SWEEPS_16_BITS, is_16_bit, is_array, size_of
from fastce._cpu.layout.copied_rows cimport (
    end_streams, place_copies, load_block, needs_copies, row_bytes, copied_group, store_columns, task_of_copies
)
from fastce._cpu.math cimport exp_unit, real
from fastce._cpu.platform cimport not_inlined
from fastce._cpu.prefetch cimport CACHE_LINE
from fastce._cpu.task cimport GRADIENT, LOG_SOFTMAX, Matrix, Task, block_size, is_curvature

cdef enum:
    BLOCK_BYTES = 8192   # this block of logits, the next, and as much of class probabilities fit into L1
    # Of rows of several blocks, where a block costs little besides: AVX2 took 1.03 of the time with it.
    LONG_BLOCK_BYTES = 4096
    # How far ahead memory is asked for: beyond the next block to L1, and farther to L2. Half of either was too late.
    L1_AHEAD_BYTES = 12288
    L2_AHEAD_BYTES = 24576
    AHEAD_BYTES = 12288   # the same for a second operand, to L2
    GROUP_BYTES = 65536  # a small part of any L2 cache, where the rows wait for their second pass
    # Blocks of scratch memory: for exponentials or capped logits of this row, capped logits of the next, probabilities.
    N_SCRATCH = 3


cdef inline bint sweeps_16_bits(const Task* task, real like) noexcept nogil:
    """Return True if the sweep can read logits of 16 bits that are an array, which need not be widened then."""
    return (
        real is float and SWEEPS_16_BITS and not task.has_option_sums and not task.find_argmax and not task.normalized
        and task.softcap == 0 and task.logit_scale == 1 and task.out_kind != LOG_SOFTMAX)


cdef inline Py_ssize_t row_block(const Task* task, real like) noexcept nogil:
    """Return how many of the caller's classes make a block."""
    cdef bint narrow = is_16_bit(task.logits.format) and sweeps_16_bits(task, like)
    cdef Py_ssize_t size = 2 if narrow else <Py_ssize_t>sizeof(real)
    cdef bint is_light = BY_LINES and not is_curvature(task)
    return (LONG_BLOCK_BYTES if is_light and task.n_classes * size > BLOCK_BYTES else BLOCK_BYTES) // size


cdef inline Py_ssize_t row_group(const Task* task, real like) noexcept nogil:
    """Return how many rows go through each pass together; long rows, which need `block_max`, go alone."""
    if task.n_classes > task.block:
        return 1
    return max(1, min(LANES, GROUP_BYTES // (task.n_classes * <Py_ssize_t>sizeof(real))))


cdef inline Py_ssize_t scratch_bytes(const Task* task, real like) noexcept nogil:
    return N_SCRATCH * scratch_size(task) * <Py_ssize_t>sizeof(real)


cdef inline Py_ssize_t maxima_bytes(const Task* task) noexcept nogil:
    return align((task.n_classes // task.block + 1) * <Py_ssize_t>sizeof(double))


cdef inline void begin_block(const Task* task, RowView* row, Py_ssize_t start, real* capped) noexcept nogil:
    """Find the block that starts with class `start`, which may be copied and capped for that."""
    cdef const Matrix* given = &given_by_caller(task).logits
    cdef const char* first = row.given + start * given.class_stride
    cdef real* x = <real*>row.logits + start
    cdef Py_ssize_t n = block_size(task, start)
    row.start = start
    row.n = n
    row.x = x
    row.format = NATIVE
    row.capped = capped
    if task.copies_logits and sweeps_16_bits(task, capped[0]) and is_array(
            first, given.format, given.class_stride, capped[0]):
        row.x = first
        row.format = given.format
    elif task.copies_logits:
        if not task.copies_out and task.softcap == 0 and task.out_kind == GRADIENT:
            # Nothing comes back to these logits: a block may overwrite the last but one. The row's last block may be
            # longer than the others, and has its own place.
            if start + n < task.n_classes:
                x = <real*>row.logits + start // task.block % 2 * task.block
            row.x = x
        load_block(first, given.format, given.class_stride, n, x)
    if task.softcap != 0:
        cap(x, n, task.cap_factor, capped)
        row.x = capped


cdef inline void find_block_max(RowView* row, real like) noexcept nogil:
    find_maxima(True, row.format, row.x, row.n, &row.block_max, like)


cdef inline Py_ssize_t find_argmax_patch(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const RowView* row, const double* block_max, real* scratch
) noexcept nogil:
    """Return the arg-max if its probability exceeds 1/2, else -1: below, its gradient does not cancel."""
    cdef Py_ssize_t n, found, k = 0
    if not rows.sumexp_excl_max[lane] < 1:
        return -1
    while k < task.n_classes:
        n = block_size(task, k)
        found = -1
        if block_max[k // task.block] == rows.row_max[lane]:
            if task.softcap == 0:
                found = find(<real*>row.out + k, n, exp_unit(scratch[0]))  # the sweep left exponentials there
            else:
                cap(<real*>row.logits + k, n, task.cap_factor, scratch)
                found = find(scratch, n, rows.row_max[lane])
        if found >= 0:
            return k + found
        k += n
    return -1


cdef inline const char* ahead_of(
    const Task* task, const Matrix* matrix, Py_ssize_t i, Py_ssize_t k, Py_ssize_t n_ahead
) noexcept nogil:
    """Return what lies so many classes after class k of row i: within rows that are long, else where one starts."""
    if task.n_classes <= task.block:
        i += n_ahead // task.n_classes + 1
    else:
        k += n_ahead
        if k >= task.n_classes:
            k -= task.n_classes
            i += 1
    return start_of_row(task, matrix, min(i, task.n_rows - 1)) + k * matrix.class_stride


cdef inline Block describe_blocks(const Task* task, real like) noexcept nogil:
    """Return what all blocks have in common."""
    cdef const Task* given = given_by_caller(task)
    cdef Block b = describe_block(task, True)
    b.ahead_size = size_of(given.logits.format, like)
    b.ahead_t_size = size_of(task.prob.format, like)
    return b


cdef inline void sweep_block(
    const Task* task, Scalars* rows, Py_ssize_t lane, const RowView* row, RowView* next_row, WaitingRows* waiting,
    Block* b, real* scratch, double* block_max
) noexcept nogil:
    """Do the first pass over a block, and the second over one that waits.

    Find the maximum of the block that comes next, unless `next_row` is NULL.
    """
    cdef real shift[LANES]
    cdef Scalars block
    cdef Totals totals
    cdef const Task* given = given_by_caller(task)
    cdef Py_ssize_t i = rows.start + lane, k = row.start
    cdef double known = rows.row_max[lane] if k > 0 else NAN
    # Relative to the maximum of the blocks before, unless that is smaller (or NaN).
    cdef bint is_lower = row.block_max <= known
    block.row_max[0] = known if is_lower else row.block_max
    block.argmax[0] = -1
    if task.find_argmax and not is_lower:
        find_argmax(True, <const real*>row.x, row.n, k, &block, 0)
    b.n = row.n
    b.x = row.x
    b.format = row.format
    b.e = <real*>row.capped
    if task.softcap == 0:
        # Scratch memory begins as far from a cache line as the logits do, for loads and stores of whole lines.
        b.e = scratch + <size_t>row.x % CACHE_LINE // sizeof(real)
        if task.out.data != NULL and task.out_kind == GRADIENT:
            b.e = <real*>row.out + k
    b.ahead_l1 = ahead_of(given, &given.logits, i, k, L1_AHEAD_BYTES // b.ahead_size)
    b.ahead_l2 = ahead_of(given, &given.logits, i, k, L2_AHEAD_BYTES // b.ahead_size)
    if row.prob != NULL:
        b.t = prob_block(task, row.prob, k, scratch + 2 * scratch_size(task))
        b.ahead_t = ahead_of(task, &task.prob, i, k, AHEAD_BYTES // b.ahead_t_size)
    b.next = NULL  # is looked at by itself
    if next_row != NULL and next_row.format == row.format and (BY_LINES or row.format == NATIVE):
        b.next = next_row.x
        b.n_next = next_row.n
    if not task.normalized:
        take_waiting_block(task, waiting, b, scratch[0])
    narrow_maxima(True, block.row_max, shift)
    begin_totals(task, True, &totals)
    add_piece(task, True, b, k, shift, &totals)
    end_waiting_block(task, waiting, b, scratch[0])
    take_totals(task, True, is_lower, &totals, <const real*>b.e, b.n, &block, 0)
    block_max[k // task.block] = block.row_max[0]
    if k == 0:
        take(task, rows, lane, &block, 1)
    elif is_lower:
        add(task, rows, lane, &block)
    else:
        merge(task, rows, lane, &block, 1, k // task.block)
    if next_row != NULL and not task.normalized:
        if b.next == NULL:
            find_block_max(next_row, scratch[0])
        else:
            next_row.block_max = b.next_max


cdef inline void sweep_rows(
    const Task* task, Scalars* rows, WaitingRows* waiting, real* scratch, double* block_max
) noexcept nogil:
    """Do the first pass over all rows that are not skipped, block by block."""
    cdef Block b = describe_blocks(task, scratch[0])
    cdef RowView row, next_row
    cdef real* next_capped = scratch + scratch_size(task)
    cdef Py_ssize_t lane, next_lane = next_kept(rows, 0)
    if next_lane == rows.n:
        return
    next_row = locate_row(task, rows.start + next_lane)
    begin_block(task, &next_row, 0, scratch)
    if not task.normalized:
        find_block_max(&next_row, scratch[0])
    while next_lane < rows.n:
        lane, row = next_lane, next_row
        if row.start + row.n < task.n_classes:
            begin_block(task, &next_row, row.start + row.n, next_capped)
        else:
            next_lane = next_kept(rows, lane + 1)
            if next_lane < rows.n:
                next_row = locate_row(task, rows.start + next_lane)
                begin_block(task, &next_row, 0, next_capped)
        next_capped = <real*>row.capped
        if row.start == 0 and rows.patch_class[lane] >= 0:
            read_patch_logit(task, rows, lane, scratch[0])
        sweep_block(
            task, rows, lane, &row, &next_row if next_lane < rows.n else NULL, waiting, &b, scratch, block_max)
        if next_lane != lane and task.needs_argmax_patch:
            rows.patch_class[lane] = find_argmax_patch(task, rows, lane, &row, block_max, <real*>row.capped)


cdef inline bint are_single_blocks(const Task* task) noexcept nogil:
    """Return True if rows are arrays of the arithmetic's type, one block each, and need the plain sum only."""
    return (
        task.n_classes <= task.block and not task.copies_logits and task.softcap == 0 and not task.has_option_sums
        and not task.normalized and not task.needs_argmax_patch)


cdef inline void sweep_single_blocks(
    const Task* task, Scalars* rows, WaitingRows* waiting, real* scratch
) noexcept nogil:
    """Do the first pass over all rows that are not skipped, and the second over as many that wait."""
    cdef const Task* given = given_by_caller(task)
    cdef SweptRows swept
    cdef Block b
    cdef Py_ssize_t lanes[LANES]
    cdef Py_ssize_t done_lanes[LANES]
    cdef Py_ssize_t row_stride = given.logits.row_strides[task.n_dims - 1]
    cdef Py_ssize_t n_bytes = task.n_classes * <Py_ssize_t>sizeof(real)
    cdef Py_ssize_t lane
    cdef bint in_out = task.out.data != NULL and task.out_kind == GRADIENT
    cdef int i
    swept.n_rows = swept.n_done = 0
    swept.n_classes = task.n_classes
    swept.ahead_l1 = (L1_AHEAD_BYTES // n_bytes + 1) * row_stride
    swept.ahead_l2 = (L2_AHEAD_BYTES // n_bytes + 1) * row_stride
    for lane in range(rows.n):
        if rows.kept[lane] == 0:
            continue
        i = swept.n_rows
        lanes[i] = lane
        swept.x[i] = start_of_row(task, &task.logits, rows.start + lane)
        if in_out:
            swept.e[i] = start_of_row(task, &task.out, rows.start + lane)
        else:
            # Scratch memory begins as far from a cache line as the logits do, for loads and stores of whole lines.
            swept.e[i] = scratch + <size_t>swept.x[i] % CACHE_LINE // sizeof(real)
        swept.target[i] = rows.patch_class[lane]
        swept.n_rows += 1
    if swept.n_rows == 0:
        return
    while waiting.lane < waiting.rows.n and swept.n_done < swept.n_rows:
        take_waiting_block(task, waiting, &b, scratch[0])
        i = swept.n_done
        swept.done[i] = b.done
        swept.factor[i] = b.factor
        done_lanes[i] = waiting.lane
        waiting.lane = next_kept(&waiting.rows, waiting.lane + 1)
        swept.n_done += 1
    sweep_one_by_one(&swept, task.scale, scratch[0])
    for i in range(swept.n_rows):
        lane = lanes[i]
        rows.row_max[lane] = swept.row_max[i]
        rows.x_patch[lane] = swept.x_target[i] if swept.target[i] >= 0 else 0
        rows.sumexp_excl_max[lane] = choose_excl_max(swept.all_terms[i], swept.excl_max[i], <real>task.scale)
    for i in range(swept.n_done):
        write_patch(
            task, &waiting.rows, done_lanes[i], start_of_row(task, &task.out, waiting.rows.start + done_lanes[i]),
            scratch[0])


cdef inline void process_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t n, WaitingRows* before, WaitingRows* group, real* scratch
) noexcept nogil:
    """Do n <= 16 rows, at most `row_group` of them, but what can wait; there is room for `block_max` of all blocks."""
    cdef Scalars* rows = &group.rows
    cdef Py_ssize_t lane
    begin(task, rows, start, n, scratch[0])
    group.lane = n
    if are_single_blocks(task):
        sweep_single_blocks(task, rows, before, scratch)
    elif task.has_option_sums or not task.normalized:
        sweep_rows(task, rows, before, scratch, group.block_max)
    elif task.target != NULL:
        read_patch_logits(task, rows, scratch[0])
    if task.target != NULL:
        cap_patch_logits(task, rows, scratch[0])
    if task.needs_argmax_patch:
        describe_argmax_patches(task, rows, scratch[0])
    finish(task, rows, scratch[0])
    finish_waiting(task, before, scratch[0])
    if can_wait(task):
        begin_waiting(task, group, scratch[0])
    elif task.out.data != NULL:
        for lane in range(n):
            write_lane(task, rows, lane, scratch, group.block_max)


cdef inline void process_by_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    cdef WaitingRows groups[2]
    cdef real* scratch = <real*>workspace
    cdef Py_ssize_t i = start, which = 0
    cdef Py_ssize_t step = row_group(task, like)
    for which in range(2):
        groups[which].block_max = <double*>(workspace + scratch_bytes(task, like) + which * maxima_bytes(task))
        groups[which].rows.n = groups[which].lane = 0
    while i < stop:
        which = 1 - which
        process_rows(task, i, min(stop - i, step), &groups[1 - which], &groups[which], scratch)
        i += step
    finish_waiting(task, &groups[which], like)


cdef inline void do_rows(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    if task.is_float:
        process_by_rows(task, start, stop, workspace, <float>0)
    else:
        process_by_rows(task, start, stop, workspace, <double>0)


cdef inline Py_ssize_t scratch_and_maxima(const Task* task, real like) noexcept nogil:
    """Return what a thread needs: scratch memory, and a maximum for each block of the rows of two groups."""
    return scratch_bytes(task, like) + 2 * maxima_bytes(task)


cdef inline void process_copied_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    cdef Task copy_task = task_of_copies(task, like)
    cdef process_t process = do_rows
    cdef Py_ssize_t i = start, n
    cdef Py_ssize_t step = copied_group(task, row_group(task, like), like)
    cdef char* copies = workspace + scratch_and_maxima(task, like)
    while i < stop:
        n = min(step, stop - i)
        place_copies(&copy_task, i, n, copies, like)
        (<process_t>not_inlined(<void*>process))(&copy_task, i, i + n, workspace)
        if copy_task.copies_out and not copy_task.stores_rows:
            store_columns(&copy_task, i, n, like)
        i += step
    if copy_task.streams:
        end_streams()


cdef inline void do_copied_rows(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    if task.is_float:
        process_copied_rows(task, start, stop, workspace, <float>0)
    else:
        process_copied_rows(task, start, stop, workspace, <double>0)


cdef inline KernelSpec plan_rows(Task* task, real like) noexcept nogil:
    cdef KernelSpec spec
    cdef Py_ssize_t group
    task.block = row_block(task, like)
    group = row_group(task, like)
    spec = make_spec(do_rows, group, min(group, LANES), scratch_and_maxima(task, like))
    if needs_copies(task, like):
        spec.process = do_copied_rows
        spec.share = copied_group(task, group, like)
        spec.workspace += align(spec.share * row_bytes(task, like)) + CACHE_LINE
    return spec
