"""The second pass of the row kernel: what the sweep left in a row becomes its gradient, softmax or log-softmax."""
from libc.math cimport fabs
from libc.string cimport memset

from fastce._cpu.kernel.blocks cimport (
    Block, cap_row, multiply, multiply_slopes, sweep, write_row_gradient, write_row_log
)
from fastce._cpu.kernel.row_view cimport RowView, block_size, locate_row, prob_block, start_of_row, weight_block
from fastce._cpu.kernel.scalars cimport Scalars, unscaled_exp
from fastce._cpu.layout.convert cimport NATIVE, size_of, write_converted
from fastce._cpu.layout.staged_rows cimport store_block
from fastce._cpu.math cimport exp_unit, real
from fastce._cpu.task cimport LOG_SOFTMAX, Task


cdef inline void write_log_softmax(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const RowView* row, Py_ssize_t start, real* scratch
) noexcept nogil:
    """Write the log-softmax of a block."""
    cdef const real* x = <const real*>row.logits + start
    cdef Py_ssize_t n = block_size(task, start)
    if task.softcap != 0:
        cap_row(x, n, task.cap_factor, scratch)
        x = scratch
    write_row_log(x, n, rows.row_max[lane], task.scale, rows.log_sumexp[lane], <real*>row.out + start)


cdef inline void find_capped_exps(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const RowView* row, Py_ssize_t start, real* scratch
) noexcept nogil:
    """Put the exponentials of a block under the softcap into scratch memory."""
    cdef Block b
    memset(&b, 0, sizeof(b))
    b.n = block_size(task, start)
    b.ahead = row.logits + start * <Py_ssize_t>sizeof(real)
    b.ahead_size = sizeof(real)
    b.x = b.e = scratch
    b.format = NATIVE
    cap_row(<const real*>row.logits + start, b.n, task.cap_factor, scratch)
    sweep(&b, rows.row_max[lane], task.scale, scratch[0])


cdef inline double write_gradient(
    const Task* task, const Scalars* rows, Py_ssize_t lane, Py_ssize_t start, Py_ssize_t n, double factor, real* e,
    const real* t
) noexcept nogil:
    """Turn n exponentials of a row, `factor` of which are in the gradient, into it; return a factor that is left.

    They are those of the classes from `start` on, and t are the probabilities of these, if there are any.
    """
    cdef real unit = <real>1 / exp_unit(e[0])
    if fabs(factor) < unit:
        # Freed of exp_unit it might become subnormal; the exponentials are, instead.
        multiply(e, n, unit)
    else:
        factor *= unit
    if not (task.sum_weight or task.sum_prob):
        return factor
    write_row_gradient(e, n, factor, rows.beta[lane], weight_block(task, start, e[0]), rows.gamma[lane], t)
    return 1


cdef inline void write_row(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const RowView* row, const double* block_max,
    real* scratch, char* target
) noexcept nogil:
    """Write a row block by block, where the task has it, or if `target` is not NULL, there."""
    cdef real* out
    cdef real* probs = scratch + 2 * task.block
    cdef Py_ssize_t n, k = 0
    cdef double factor
    cdef bint may_be_nan = task.has_option_sums or task.softcap != 0 or task.out_kind == LOG_SOFTMAX
    while k < task.n_classes:
        n = block_size(task, k)
        out = <real*>row.out + k
        factor = rows.alpha[lane]
        if task.out_kind == LOG_SOFTMAX:
            write_log_softmax(task, rows, lane, row, k, scratch)
            factor = 1
        elif task.softcap != 0:
            find_capped_exps(task, rows, lane, row, k, scratch)
            factor = write_gradient(task, rows, lane, k, n, factor, scratch, prob_block(task, row.prob, k, probs))
            multiply(scratch, n, factor)
            multiply_slopes(scratch, n, <const real*>row.logits + k, task.cap_factor, out)
            factor = 1
        else:
            if task.n_classes > task.block and block_max[k // task.block] != rows.row_max[lane]:
                factor *= unscaled_exp(task.scale * (block_max[k // task.block] - rows.row_max[lane]))
            factor = write_gradient(task, rows, lane, k, n, factor, out, prob_block(task, row.prob, k, probs))
        if target != NULL:
            # An exponential that is NaN makes the row's factor NaN.
            store_block(task.source, <real*>row.out, <real>factor, may_be_nan or factor != factor, k, n, target)
        elif factor != 1:
            multiply(out, n, factor)
        k += n


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
    if rows.patch_class[lane] >= 0:
        write_converted(
            result + rows.patch_class[lane] * holder.out.class_stride, holder.out.format, <real>rows.grad_patch[lane])
