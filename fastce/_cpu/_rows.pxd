"""Row kernel: the classes of a row lie side by side and fill the vector.

Design
------
1. A row is swept in blocks of 8 KiB, which stay in L1: maximum, then exp relative to the largest so far. So a row of
   any length is read from memory once by the sweep; a row-wide maximum first would read a long row twice. A second pass
   turns exponentials into the gradient, with one factor per block. (Relative to each block's own maximum, two
   exponentials of scalars per block took a tenth of the time.)
2. The exponentials wait in `out`, which may be the logits themselves: no N x C memory besides. Under a softcap, whose
   slope needs the logit again, they go into scratch memory, and the second pass computes them anew.
3. While a block's exponentials are computed, logits further on are prefetched: the maximum's pass is too short for the
   hardware prefetcher to get ahead, and waited for memory half of its time (1.9 x instead of 1.2 x the floor).
4. Up to 16 short rows go through the first pass, the scalars and the second pass together: the scalars of one row are a
   chain of 300 cycles, those of 16 rows hide each other's. And the maximum of the next row is found before this row's
   exponentials, so that these need not wait for theirs.
"""
from libc.math cimport NAN
from libc.stdint cimport int32_t
from libc.string cimport memset

from fastce._cpu._convert cimport NATIVE, is_array
from fastce._cpu._math cimport exp_unit, real
from fastce._cpu._row_sweep cimport find_max, sweep_block, sweeps_16_bits
from fastce._cpu._row_writes cimport write_lane
from fastce._cpu._scalars cimport (
    Scalars, add, begin, cap_factor_of, describe_argmax_patches, finish, merge, read_patch_logits, take
)
from fastce._cpu._spans cimport RowView, TileRange, locate_row, logit_tile, row_tile, span_at
from fastce._cpu._staged cimport load_staged
from fastce._cpu._task cimport GRADIENT, Matrix, Task, row_offset
from fastce._cpu._tiles cimport LANES, NO_CLASS, TILE, fill, fold_argmax

cdef enum:
    AHEAD_BYTES = 8192   # how far ahead memory is asked for; half of it was too late for logits of 16 bits
    GROUP_BYTES = 65536  # a small part of any L2 cache, where the rows wait for their second pass


cdef inline Py_ssize_t row_group(const Task* task, real like) noexcept nogil:
    """Return how many rows go through each pass together; long rows, which need `block_max`, go alone."""
    if task.n_classes > task.block:
        return 1
    return max(1, min(LANES, GROUP_BYTES // (task.n_classes * <Py_ssize_t>sizeof(real))))


cdef inline Py_ssize_t block_bytes(const Task* task, real like) noexcept nogil:
    """Return the size of a block's exponentials."""
    return task.block * <Py_ssize_t>sizeof(real)


cdef inline Py_ssize_t find_argmax_patch(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const RowView* row, const double* block_max, real like
) noexcept nogil:
    """Return the arg-max if its probability exceeds 1/2, else -1: below, its gradient does not cancel."""
    cdef real buffer[TILE]
    cdef real row_max[LANES]
    cdef int32_t first[LANES]
    cdef const real* x
    cdef Py_ssize_t j, stop, start, k = 0
    cdef TileRange span
    # The sweep left exponentials in row.out, or, under a softcap, the logits untouched.
    cdef bint in_out = task.softcap == 0
    if not rows.sumexp_excl_max[lane] < 1:
        return -1
    fill(row_max, 0, LANES, exp_unit(like) if in_out else <real>rows.row_max[lane])
    while k < task.n_classes:
        start = k
        stop = min(k + task.block, task.n_classes)
        if block_max[k // task.block] != rows.row_max[lane]:
            k = stop
            continue
        for j in range(LANES):
            first[j] = NO_CLASS
        while k < stop:
            span = span_at(k, stop)
            x = row_tile(row.out, task.out.class_stride, span, <real>0, buffer) if in_out else logit_tile(
                row.logits, task.logits.class_stride, <real>cap_factor_of(task), span, buffer)
            fold_argmax(x, row_max, <int32_t>(span.k - start), 16, 1, first)
            k += TILE
        for j in range(LANES):
            if first[j] != NO_CLASS:
                return start + first[j]
    return -1


cdef inline const char* ahead_of(
    const char* here, const char* after, const Matrix* matrix, Py_ssize_t k, Py_ssize_t n_classes
) noexcept nogil:
    """Return where class k of a row is, or, beyond the last, where the row after it starts."""
    return here + k * matrix.class_stride if k < n_classes else after


cdef inline Py_ssize_t stop_of_block(const Task* task, Py_ssize_t start) noexcept nogil:
    return min(start + task.block, task.n_classes)


cdef inline void load_block(const Task* task, RowView* row, Py_ssize_t i, Py_ssize_t start, real like) noexcept nogil:
    """Put a block of logits that are staged where the sweep finds it, on the row's stage if it must."""
    cdef const Matrix* given
    cdef const char* logits
    cdef Py_ssize_t n = stop_of_block(task, start) - start
    if not task.stages_logits:
        return
    given = &task.source.logits
    logits = given.data + row_offset(task.source, given, i)
    if sweeps_16_bits(task, like) and n >= TILE and is_array(logits, given.format, given.class_stride, like):
        row.logits = logits
        row.format = given.format
        return
    row.logits = task.logits.data + row_offset(task, &task.logits, i)
    row.format = NATIVE
    if not task.stages_out and task.softcap == 0 and task.out_kind == GRADIENT:
        # Nothing comes back to these logits: each block may overwrite the one before.
        row.logits -= start * <Py_ssize_t>sizeof(real)
    load_staged(logits + start * given.class_stride, given.format, given.class_stride, n, <real*>row.logits + start)


cdef inline real begin_row(const Task* task, Py_ssize_t i, RowView* row, real like) noexcept nogil:
    """Locate a row; return the maximum of its first block."""
    row[0] = locate_row(task, i, like)
    load_block(task, row, i, 0, like)
    return find_max(task, row, 0, stop_of_block(task, 0), like)


cdef inline void sweep_row(
    const Task* task, Scalars* rows, Py_ssize_t lane, const RowView* begun, real row_max, real* scratch,
    double* block_max
) noexcept nogil:
    """Do the first pass over the row of a lane, where it is and the maximum of its first block being known."""
    cdef real like = scratch[0]
    cdef Scalars block
    cdef const Task* given = task if task.source == NULL else task.source
    cdef Py_ssize_t i = rows.start + lane
    cdef Py_ssize_t k = 0, stop
    cdef Py_ssize_t step = task.block
    cdef bint in_out = task.out.data != NULL and task.softcap == 0 and task.out_kind == GRADIENT
    cdef RowView row = begun[0]
    cdef RowView here = row if task.source == NULL else locate_row(given, i, like)
    cdef Py_ssize_t far = (2 if here.is_long else 1) * AHEAD_BYTES // here.size_logits
    # After short rows one more: the next one has been read already.
    cdef Py_ssize_t rows_ahead = 1 if task.n_classes > step else max(2, far // task.n_classes + 1)
    cdef RowView after = locate_row(given, min(i + rows_ahead, task.n_rows - 1), like)
    cdef bint is_lower
    row.size_logits = here.size_logits
    row.is_long = here.is_long
    if not in_out:
        row.exps = <char*>scratch
        row.exp_stride = sizeof(real)
    while k < task.n_classes:
        stop = stop_of_block(task, k)
        row.ahead_logits = ahead_of(here.logits, after.logits, &given.logits, k + far, task.n_classes)
        if row.prob != NULL:
            row.ahead_prob = ahead_of(here.prob, after.prob, &given.prob, k + far, task.n_classes)
        if k > 0:
            load_block(task, &row, i, k, like)
            row_max = find_max(task, &row, k, stop, like)
        if in_out:
            row.exps = row.out + k * row.exp_stride
        is_lower = sweep_block(task, &row, k, stop, row_max, NAN if k == 0 else rows.row_max[lane], &block)
        block_max[k // step] = block.row_max[0]
        if k == 0:
            take(task, rows, lane, &block, 1)
        elif is_lower:
            add(task, rows, lane, &block)
        else:
            merge(task, rows, lane, &block, 1, k // step)
        k = stop
    if task.needs_argmax_patch:
        rows.patch_class[lane] = find_argmax_patch(task, rows, lane, &row, block_max, like)


cdef inline Py_ssize_t next_kept(const Scalars* rows, Py_ssize_t lane) noexcept nogil:
    """Return the first lane from `lane` on whose row is not skipped; beyond the last one if there is none."""
    while lane < rows.n and rows.kept[lane] == 0:
        lane += 1
    return lane


cdef inline void sweep_rows(const Task* task, Scalars* rows, real* scratch, double* block_max) noexcept nogil:
    """Do the first pass over all rows that are not skipped."""
    cdef RowView row, next_row
    cdef real row_max, next_max = 0
    cdef Py_ssize_t lane, next_lane = next_kept(rows, 0)
    memset(&next_row, 0, sizeof(next_row))  # for compilers that do not see that it is never read before
    if next_lane < rows.n:
        next_max = begin_row(task, rows.start + next_lane, &next_row, scratch[0])
    while next_lane < rows.n:
        lane, row, row_max = next_lane, next_row, next_max
        next_lane = next_kept(rows, lane + 1)
        if next_lane < rows.n:
            next_max = begin_row(task, rows.start + next_lane, &next_row, scratch[0])
        sweep_row(task, rows, lane, &row, row_max, scratch, block_max)


cdef inline void process_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, double* block_max
) noexcept nogil:
    """Do n <= 16 rows, at most `row_group` of them; there is room for a block and for one of `block_max` per block."""
    cdef Scalars rows
    cdef real like = scratch[0]
    cdef Py_ssize_t lane
    begin(task, &rows, start, n, like)
    if task.target != NULL:
        read_patch_logits(task, &rows, like)
    if task.has_option_sums or not task.normalized:
        sweep_rows(task, &rows, scratch, block_max)
    if task.needs_argmax_patch:
        describe_argmax_patches(task, &rows, like)
    finish(task, &rows, like)
    if task.out.data != NULL:
        for lane in range(n):
            write_lane(task, &rows, lane, block_max, like)
