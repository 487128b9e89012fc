"""The second pass of the row kernel: what the sweep left in a row becomes its gradient, softmax or log-softmax."""
from libc.string cimport memset

from fastce._cpu.kernel.blocks cimport Block, cap, multiply, multiply_slopes, sum_exps, write_log
from fastce._cpu.kernel.gradient cimport fill_lanes_of, find_alpha, write_gradient
from fastce._cpu.kernel.row_view cimport RowView, locate_row, prob_block, scratch_size, start_of_row
from fastce._cpu.kernel.scalars cimport Scalars, next_kept
from fastce._cpu.kernel.sums cimport describe_block, narrow_maxima
from fastce._cpu.lanes cimport LANES
from fastce._cpu.layout.convert cimport size_of, write_converted
from fastce._cpu.layout.copied_rows cimport store_block, stream_block
from fastce._cpu.math cimport real
from fastce._cpu.task cimport GRADIENT, LOG_SOFTMAX, Task, block_size


cdef inline void write_log_softmax(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const RowView* row, Py_ssize_t start, real* scratch
) noexcept nogil:
    """Write the log-softmax of a block."""
    cdef const real* x = <const real*>row.logits + start
    cdef real row_max[LANES]
    cdef real log_sum[LANES]
    cdef Py_ssize_t n = block_size(task, start)
    if task.softcap != 0:
        cap(x, n, task.cap_factor, scratch)
        x = scratch
    fill_lanes_of(True, rows.row_max, lane, row_max)
    fill_lanes_of(True, rows.log_sumexp, lane, log_sum)
    write_log(x, n, row_max, task.scale, log_sum, <real*>row.out + start)


cdef inline void find_capped_exps(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const RowView* row, Py_ssize_t start, real* scratch
) noexcept nogil:
    """Put the exponentials of a block under the softcap into scratch memory."""
    cdef real row_max[LANES]
    cdef Block b = describe_block(task, True)
    b.n = block_size(task, start)
    b.ahead_l1 = b.ahead_l2 = <const char*>scratch  # nothing
    b.ahead_size = sizeof(real)
    b.x = b.e = scratch
    b.sums_entropy = False
    cap(<const real*>row.logits + start, b.n, task.cap_factor, scratch)
    narrow_maxima(True, &rows.row_max[lane], row_max)
    sum_exps(&b, row_max, task.scale)


cdef inline void write_row(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const RowView* row, const double* block_max,
    real* scratch, char* target
) noexcept nogil:
    """Write a row block by block, where the task has it, or if `target` is not NULL, there."""
    cdef real* out
    cdef real* probs = scratch + 2 * scratch_size(task)
    cdef Py_ssize_t n, k = 0
    cdef const double* row_max
    cdef double alpha, factor, patch
    cdef bint may_be_nan = task.has_option_sums or task.softcap != 0 or task.out_kind == LOG_SOFTMAX
    while k < task.n_classes:
        n = block_size(task, k)
        out = <real*>row.out + k
        if task.out_kind == LOG_SOFTMAX:
            write_log_softmax(task, rows, lane, row, k, scratch)
            factor = 1
        elif task.softcap != 0:
            find_capped_exps(task, rows, lane, row, k, scratch)
            factor = write_gradient(
                task, True, rows, lane, &rows.alpha[lane], k, n, scratch, prob_block(task, row.prob, k, probs))
            multiply(scratch, n, factor)
            multiply_slopes(scratch, n, <const real*>row.logits + k, task.cap_factor, out)
            factor = 1
        else:
            row_max = block_max + k // task.block if task.n_classes > task.block else rows.row_max + lane
            find_alpha(task, True, rows, lane, row_max, &alpha)
            factor = write_gradient(
                task, True, rows, lane, &alpha, k, n, out, prob_block(task, row.prob, k, probs))
        if task.streams:
            patch = rows.grad_patch[lane] if rows.patch_class[lane] >= 0 else 0
            stream_block(<real*>row.out, <real>factor, rows.patch_class[lane], <real>patch, k, n, target)
        elif target != NULL:
            # An exponential that is NaN makes the row's factor NaN.
            store_block(task.source, <real*>row.out, <real>factor, may_be_nan or factor != factor, k, n, target)
        elif factor != 1:
            multiply(out, n, factor)
        k += n


cdef inline void write_patch(
    const Task* task, const Scalars* rows, Py_ssize_t lane, char* result, real like
) noexcept nogil:
    """Write the gradient that is stored by itself, if the row has one."""
    cdef const Task* holder = task.source if task.stores_rows else task
    if rows.patch_class[lane] >= 0:
        write_converted(
            result + rows.patch_class[lane] * holder.out.class_stride, holder.out.format, <real>rows.grad_patch[lane])


cdef inline void write_zeros(const Task* task, char* out, real like) noexcept nogil:
    cdef Py_ssize_t k
    if task.out.class_stride == size_of(task.out.format, like):
        memset(out, 0, task.n_classes * task.out.class_stride)
    else:
        for k in range(task.n_classes):
            write_converted(out + k * task.out.class_stride, task.out.format, <real>0)


cdef inline void write_lane(
    const Task* task, const Scalars* rows, Py_ssize_t lane, real* scratch, const double* block_max
) noexcept nogil:
    """Do the second pass over the row of a lane."""
    cdef Py_ssize_t i = rows.start + lane
    cdef RowView row = locate_row(task, i)
    cdef const Task* holder = task.source if task.stores_rows else task
    cdef char* result = start_of_row(holder, &holder.out, i)
    if rows.kept[lane] == 0:
        write_zeros(holder, result, scratch[0])
        return
    write_row(task, rows, lane, &row, block_max, scratch, result if task.stores_rows else NULL)
    if not task.streams:
        write_patch(task, rows, lane, result, scratch[0])


# Rows that have been swept and wait for the second pass, which is a product: it is done block by block within the sweep
# of the rows after them.
cdef struct WaitingRows:
    Scalars rows
    double* block_max
    Py_ssize_t lane   # of the row whose block is next; beyond the last when all are done
    Py_ssize_t start  # the block's first class


cdef inline bint can_wait(const Task* task) noexcept nogil:
    """Return True if the second pass multiplies each block by a factor, and nothing else.

    Gradients of 16 bits are also rounded and stored, so the sweep of logits of 16 bits never meets a block that waits.
    """
    return (
        task.out.data != NULL and task.out_kind == GRADIENT and task.softcap == 0
        and not (task.sum_weight or task.sum_prob or task.stores_rows))


cdef inline void begin_waiting(const Task* task, WaitingRows* waiting, real like) noexcept nogil:
    """Start with the second pass over rows whose scalars are there; those that are skipped get zeros at once."""
    cdef Py_ssize_t lane
    for lane in range(waiting.rows.n):
        if waiting.rows.kept[lane] == 0:
            write_zeros(task, start_of_row(task, &task.out, waiting.rows.start + lane), like)
    waiting.lane = next_kept(&waiting.rows, 0)
    waiting.start = 0


cdef inline void take_waiting_block(const Task* task, WaitingRows* waiting, Block* b, real like) noexcept nogil:
    """Describe the block that is to be multiplied next; of no numbers if none waits."""
    cdef Py_ssize_t lane = waiting.lane, k = waiting.start
    cdef const double* row_max
    cdef double alpha
    cdef real* out
    b.done = NULL
    b.n_done = 0
    b.factor = 1
    if lane >= waiting.rows.n:
        return
    out = <real*>start_of_row(task, &task.out, waiting.rows.start + lane) + k
    row_max = waiting.block_max + k // task.block if task.n_classes > task.block else waiting.rows.row_max + lane
    find_alpha(task, True, &waiting.rows, lane, row_max, &alpha)
    b.done = out
    b.n_done = block_size(task, k)
    b.factor = write_gradient(task, True, &waiting.rows, lane, &alpha, k, b.n_done, out, NULL)


cdef inline void end_waiting_block(const Task* task, WaitingRows* waiting, const Block* b, real like) noexcept nogil:
    """Go on after a block that has been multiplied."""
    if b.n_done == 0:
        return
    waiting.start += b.n_done
    if waiting.start == task.n_classes:
        write_patch(
            task, &waiting.rows, waiting.lane, start_of_row(task, &task.out, waiting.rows.start + waiting.lane), like)
        waiting.lane = next_kept(&waiting.rows, waiting.lane + 1)
        waiting.start = 0


cdef inline void finish_waiting(const Task* task, WaitingRows* waiting, real like) noexcept nogil:
    """Multiply what still waits."""
    cdef Block b
    while waiting.lane < waiting.rows.n:
        take_waiting_block(task, waiting, &b, like)
        multiply(<real*>b.done, b.n_done, b.factor)
        end_waiting_block(task, waiting, &b, like)
