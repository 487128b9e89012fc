"""The second pass of the row kernel: what the sweep left in a row becomes its gradient, softmax or log-softmax."""
from libc.math cimport fabs
from libc.string cimport memset

from fastce._cpu._convert cimport NATIVE, is_array, size_of, write_converted
from fastce._cpu._math cimport exp_unit, real
from fastce._cpu._scalars cimport Scalars, cap_factor_of, scale_of, unscaled_exp
from fastce._cpu._spans cimport (
    RowView, TileRange, locate_row, logit_tile, prob_at, prob_tile, row_tile, span_at, weight_tile
)
from fastce._cpu._staged cimport store_block
from fastce._cpu._task cimport LOG_SOFTMAX, OutKind, Task
from fastce._cpu._tiles cimport (
    LANES, TILE, cap_slopes, exp_and_fold, fill, multiply, product, scale_exp, store, write_gradient,
    write_gradient_in_place, write_log
)


cdef inline void write_plain(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const RowView* row, const double* block_max, char* target,
    real like
) noexcept nogil:
    """Turn exponentials into the gradient or the softmax, where every operand is an ordinary array.

    They stay in the row if `target` is NULL; else they are stored there, block by block.
    """
    cdef real* out = <real*>row.out
    cdef const real* w = <const real*>task.weight
    cdef real unit = <real>1 / exp_unit(like)
    cdef real t_buffer[TILE]
    cdef Py_ssize_t n, j, k = 0, step
    cdef double factor
    while k < task.n_classes:
        n = min(task.block, task.n_classes - k)
        factor = rows.alpha[lane]
        if task.n_classes > task.block and block_max[k // task.block] != rows.row_max[lane]:
            factor *= unscaled_exp(scale_of(task) * (block_max[k // task.block] - rows.row_max[lane]))
        if fabs(factor) < unit:
            # Freed of exp_unit it might become subnormal; the exponentials are, instead.
            multiply(out + k, n, unit)
        else:
            factor *= unit
        if task.has_option_sums:
            # All at once, unless probabilities must be converted tile by tile.
            step = TILE if row.prob != NULL and task.prob.format != NATIVE else n
            j = 0
            while j < n:
                step = min(step, n - j)
                write_gradient_in_place(
                    out + k + j, step, <real>factor, <real>rows.beta[lane], w if w == NULL else w + k + j,
                    <real>rows.gamma[lane], prob_at(task, row, k + j, step, t_buffer))
                j += step
            factor = 1
        if target != NULL:
            # An exponential that is NaN makes the row's factor NaN.
            store_block(task.source, out, <real>factor, task.has_option_sums or factor != factor, k, n, target)
        elif not task.has_option_sums:
            multiply(out + k, n, <real>factor)
        k += n


cdef inline void write_row(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const RowView* row, const double* block_max, real like
) noexcept nogil:
    """Write the row's gradient, softmax or log-softmax.

    The sweep left exponentials in row.out, relative to `block_max`.
    """
    cdef real x_buffer[TILE]
    cdef real w_buffer[TILE]
    cdef real t_buffer[TILE]
    cdef real e[TILE]
    cdef real g[TILE]
    cdef real row_max[LANES]
    cdef real alpha[LANES]
    cdef real beta[LANES]
    cdef real gamma[LANES]
    cdef const real* x
    cdef real scale = <real>scale_of(task)
    cdef real cap_factor = <real>cap_factor_of(task)
    cdef Py_ssize_t stride = task.out.class_stride
    cdef Py_ssize_t n_classes = task.n_classes
    cdef bint has_option_sums = task.has_option_sums
    cdef OutKind kind = task.out_kind
    cdef TileRange span
    cdef Py_ssize_t k = 0
    fill(row_max, 0, LANES, <real>rows.row_max[lane])
    fill(alpha, 0, LANES, <real>(rows.log_sumexp[lane] if kind == LOG_SOFTMAX else rows.alpha[lane]))
    fill(beta, 0, LANES, <real>rows.beta[lane])
    fill(gamma, 0, LANES, <real>rows.gamma[lane])
    while k < n_classes:
        if cap_factor == 0 and kind != LOG_SOFTMAX and n_classes > task.block and k % task.block == 0:
            fill(alpha, 0, LANES, <real>(rows.alpha[lane] * unscaled_exp(
                scale_of(task) * (block_max[k // task.block] - rows.row_max[lane]))))
        span = span_at(k, n_classes)
        k += TILE
        if kind == LOG_SOFTMAX or cap_factor != 0:
            x = logit_tile(row.logits, task.logits.class_stride, cap_factor, span, x_buffer)
        else:
            x = row_tile(row.out, stride, span, <real>0, e)
        if kind == LOG_SOFTMAX:
            write_log(x, row_max, scale, alpha, g)
        else:
            if cap_factor != 0:
                exp_and_fold(x, LANES, 4, row_max, scale, e, LANES, NULL, NULL)
                x = e
            if has_option_sums:
                write_gradient(
                    x, alpha, beta, weight_tile(<const real*>task.weight, span, w_buffer),
                    gamma, prob_tile(task, row, span, t_buffer), g)
            else:
                scale_exp(x, alpha, g)
            if cap_factor != 0:
                cap_slopes(row_tile(row.logits, task.logits.class_stride, span, <real>0, x_buffer), cap_factor, e)
                product(g, e, g)
        store(row.out + (span.k + span.first) * stride, stride, span.limit - span.first, g + span.first)


cdef inline void write_zeros(const Task* task, char* out, real like) noexcept nogil:
    cdef Py_ssize_t k
    if task.out.class_stride == size_of(task.out.format, like):
        memset(out, 0, task.n_classes * task.out.class_stride)
    else:
        for k in range(task.n_classes):
            write_converted(out + k * task.out.class_stride, task.out.format, <real>0)


cdef inline void write_lane(
    const Task* task, const Scalars* rows, Py_ssize_t lane, const double* block_max, real like
) noexcept nogil:
    """Do the second pass over the row of a lane."""
    cdef bint stores = task.stores_rows
    cdef RowView row = locate_row(task, rows.start + lane, like)
    cdef const Task* holder = task.source if stores else task
    cdef char* target = locate_row(task.source, rows.start + lane, like).out if stores else NULL
    cdef char* result = target if stores else row.out
    if rows.kept[lane] == 0:
        write_zeros(holder, result, like)
        return
    if task.softcap == 0 and task.out_kind != LOG_SOFTMAX and (
            row.prob == NULL or is_array(row.prob, task.prob.format, task.prob.class_stride, like)):
        write_plain(task, rows, lane, &row, block_max, target, like)
    else:
        write_row(task, rows, lane, &row, block_max, like)
        if stores:
            store_block(task.source, <const real*>row.out, <real>1, True, 0, task.n_classes, target)
    if rows.patch_class[lane] >= 0:
        write_converted(
            result + rows.patch_class[lane] * holder.out.class_stride, holder.out.format, <real>rows.grad_patch[lane])
