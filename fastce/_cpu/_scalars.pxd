"""The scalars of up to 16 rows: from the sums of the vector code to loss, statistics and the gradient's factors.

Design
------
1. Every loop runs over lanes, one row each, without branches that depend on the data: a row kernel passes one lane, a
   column kernel 16. Arithmetic is float64 for all dtypes.
2. Options end here. With d = scale (f(x) - top), e = exp(d) and s = 1 + rest, the gradient of a row is

       alpha e_k + beta w_k + gamma w_k t_k        times the slope of the softcap where there is one,

   and one number `grad_peak` is stored over it at class `peak`: the target, or the arg-max under probability targets.
3. There 1 - p is formed from the other classes' terms, (rest + (1 - e_peak)) / s: it keeps full relative accuracy
   however near to 1 p is. For the arg-max e_peak is exactly 1. The loss likewise is log1p(rest) + (top - x_y), never
   lse - x_y.
4. A row whose logits are all -inf has rest = -1, the empty sum; it becomes NaN here.
"""
from libc.math cimport INFINITY, NAN
from libc.stdint cimport int64_t

from fastce._cpu._math cimport exp, exp_unit, log1p, real, sech2
from fastce._cpu._task cimport (
    E_D, N_SUMS, T, T_D, W_D, WT, WT_D, Task, is_skipped, read, read_converted, row_offset, vector_item, weight_of
)
from fastce._cpu._tiles cimport LANES, TILE, cap, d_unit, fill, times

cdef struct Scalars:
    Py_ssize_t start                # the first row
    Py_ssize_t n                    # how many
    bint skipped[LANES]
    # what the sweep found; sums as named in _task, over all classes, with d in d_unit
    double top[LANES]
    double rest[LANES]              # sum of exp(d) without the largest term
    double sums[N_SUMS][LANES]
    int64_t argmax[LANES]
    # the class whose gradient is stored by itself
    int64_t peak[LANES]             # -1: none
    double x_peak[LANES]            # f(logit)
    double slope_peak[LANES]
    # what the rows' options come down to
    double log_sum[LANES]           # log of the sum of exp(d)
    double alpha[LANES]
    double beta[LANES]
    double gamma[LANES]
    double grad_peak[LANES]


cdef inline double unscaled_exp(double x) noexcept nogil:
    return exp(x) / exp_unit(x)


cdef inline double scale_of(const Task* task) noexcept nogil:
    """Return the factor of f(x) - f(top): tanh spans 1 and the softcap; else f is the identity."""
    return task.softcap if task.softcap != 0 else task.logit_scale


cdef inline double cap_factor_of(const Task* task) noexcept nogil:
    """Return the factor inside f(x) = tanh(factor x), or 0 without a softcap."""
    return task.logit_scale / task.softcap if task.softcap != 0 else 0


cdef inline void read_peaks(const Task* task, Scalars* rows, real like) noexcept nogil:
    """Read the logits of the peaks; must precede any store into `out`, which may be the logits."""
    cdef real x[TILE]
    cdef real factor = <real>cap_factor_of(task)
    cdef Py_ssize_t j
    for j in range(rows.n):
        rows.slope_peak[j] = 1
        if rows.peak[j] >= 0:
            rows.x_peak[j] = read(
                task.logits.data + row_offset(task, &task.logits, rows.start + j)
                + rows.peak[j] * task.logits.class_stride, like)
    if factor == 0:
        return
    fill(x, 0, TILE, <real>0)
    for j in range(rows.n):
        if rows.peak[j] >= 0:
            x[j] = <real>rows.x_peak[j]
            rows.slope_peak[j] = sech2(<double>(x[j] * factor))
    cap(x, factor)  # the tile's own code, so that the arg-max has the very bits of `top`
    for j in range(rows.n):
        rows.x_peak[j] = x[j]


cdef inline void begin(const Task* task, Scalars* rows, Py_ssize_t start, Py_ssize_t n, real like) noexcept nogil:
    cdef Py_ssize_t j, k
    rows.start = start
    rows.n = n
    for j in range(n):
        rows.skipped[j] = is_skipped(task, start + j)
        rows.peak[j] = -1 if task.target == NULL or rows.skipped[j] else task.target[start + j]
        rows.argmax[j] = -1
        rows.top[j] = rows.rest[j] = 0  # as they stay for rows that are not swept
        for k in range(task.n_sums):
            rows.sums[task.sums[k]][j] = 0
    if task.target != NULL:
        read_peaks(task, rows, like)


cdef inline double sum_factor(int k, real scale) noexcept nogil:
    """Return what is missing to a sum: the logits' scale to those of d, and `exp_unit`."""
    if k == E_D:
        return scale / exp_unit(scale)
    return <real>1 if k == WT or k == T else scale


cdef inline void take(
    const Task* task, Scalars* rows, Py_ssize_t lane, const Scalars* block, Py_ssize_t n
) noexcept nogil:
    """Start n rows, from `lane` on, with their first block of classes."""
    cdef Py_ssize_t j, k
    for j in range(n):
        rows.top[lane + j] = block.top[j]
        rows.rest[lane + j] = block.rest[j]
        rows.argmax[lane + j] = block.argmax[j]
        for k in range(task.n_sums):
            rows.sums[task.sums[k]][lane + j] = block.sums[task.sums[k]][j]


cdef inline void merge(
    const Task* task, Scalars* rows, Py_ssize_t lane, const Scalars* block, Py_ssize_t n, Py_ssize_t b
) noexcept nogil:
    """Add the b-th block of classes to what is known of the n rows from `lane` on."""
    cdef double factor, shift, factor_block, shift_block
    cdef double scale = scale_of(task)
    cdef double w = task.block_weights[b] if task.sum_weight else 0  # of the classes before this block
    cdef double w_block = task.block_weights[b + 1] - w if task.sum_weight else 0
    cdef Py_ssize_t c, i, j, k
    for j in range(n):
        i = lane + j
        factor = factor_block = 1
        shift = shift_block = 0
        if block.top[j] > rows.top[i]:
            factor = unscaled_exp(scale * (rows.top[i] - block.top[j]))
            shift = scale * (rows.top[i] * d_unit() - block.top[j] * d_unit())
        elif block.top[j] < rows.top[i]:
            factor_block = unscaled_exp(scale * (block.top[j] - rows.top[i]))
            shift_block = scale * (block.top[j] * d_unit() - rows.top[i] * d_unit())
        for c in range(task.n_sums):
            k = task.sums[c]
            if k == E_D:
                rows.sums[k][i] = (
                    times(factor, rows.sums[k][i] + times(1 + rows.rest[i], shift))
                    + times(factor_block, block.sums[k][j] + times(1 + block.rest[j], shift_block)))
            elif k == W_D:
                rows.sums[k][i] += times(w, shift) + block.sums[k][j] + times(w_block, shift_block)
            elif k == WT_D or k == T_D:
                rows.sums[k][i] += (
                    times(rows.sums[k - 1][i], shift) + block.sums[k][j] + times(block.sums[k - 1][j], shift_block))
            else:
                rows.sums[k][i] += block.sums[k][j]
        if block.top[j] > rows.top[i]:
            rows.rest[i] = block.rest[j] + (1 + rows.rest[i]) * factor
            rows.top[i] = block.top[j]
            rows.argmax[i] = block.argmax[j]
        else:
            rows.rest[i] += (1 + block.rest[j]) * factor_block


cdef inline void describe_argmax_peaks(const Task* task, Scalars* rows, real like) noexcept nogil:
    """Complete the peaks under probability targets: there the gradient that cancels is the arg-max's."""
    cdef Py_ssize_t j
    cdef real x
    for j in range(rows.n):
        rows.x_peak[j] = rows.top[j]
        rows.slope_peak[j] = 1
        if task.softcap != 0 and rows.peak[j] >= 0:
            # The logits are still there: a softcap's sweep stores nothing.
            x = read(
                task.logits.data + row_offset(task, &task.logits, rows.start + j)
                + rows.peak[j] * task.logits.class_stride, like)
            rows.slope_peak[j] = sech2(<double>(x * <real>cap_factor_of(task)))


cdef inline void finish(const Task* task, Scalars* rows, real like) noexcept nogil:
    """Turn the sums into losses, statistics and gradient factors; write the former."""
    cdef double scale = scale_of(task)
    cdef double hard = 1 - task.label_smoothing
    cdef double even = task.label_smoothing / task.n_classes
    cdef double d_size = 1 / d_unit()
    cdef double s, lse, d_peak, e_peak, w_peak, share, total, residue, loss, log_prob, z_slope, g
    cdef const char* prob
    cdef Py_ssize_t i, j, k
    for j in range(rows.n):
        if task.normalized:
            rows.top[j] = rows.rest[j] = 0
        rows.rest[j] = NAN if rows.rest[j] == -1 else rows.rest[j]
        rows.log_sum[j] = log1p(rows.rest[j])
    for j in range(rows.n):
        i = rows.start + j
        k = rows.peak[j]
        s = 1 + rows.rest[j]
        lse = scale * rows.top[j] + rows.log_sum[j]
        if task.target == NULL and task.prob.data == NULL:
            rows.alpha[j] = 1 / s
            rows.beta[j] = rows.gamma[j] = 0
            if task.lse != NULL:
                (<real*>task.lse)[i] = <real>lse
            continue
        d_peak = scale * (rows.top[j] - rows.x_peak[j]) if k >= 0 else 0
        e_peak = unscaled_exp(-d_peak) if task.out.data != NULL else 0
        w_peak = weight_of(task, k, like) if k >= 0 else 0
        # total: what multiplies p; share: the one-hot's part of the target; residue = total - q_peak w_peak
        if task.target != NULL:
            share = hard * w_peak
            total = share + even * task.weight_sum
            residue = even * (task.weight_sum - w_peak)
            loss = times(share, rows.log_sum[j] + d_peak)
            log_prob = -(rows.log_sum[j] + d_peak)
        else:
            total = hard * rows.sums[WT][j] + even * task.weight_sum
            share = 0
            if k >= 0:
                prob = task.prob.data + row_offset(task, &task.prob, i) + k * task.prob.class_stride
                share = hard * w_peak * read_converted(prob, task.prob.format, like)
            residue = total - share - even * w_peak
            loss = times(hard, rows.sums[WT][j]) * rows.log_sum[j] - times(hard, rows.sums[WT_D][j]) * d_size
            log_prob = 0
            if task.log_prob != NULL:
                log_prob = rows.sums[T_D][j] * d_size - rows.sums[T][j] * rows.log_sum[j]
        if even != 0:
            loss += even * (task.weight_sum * rows.log_sum[j] - rows.sums[W_D][j] * d_size)
        z_slope = 2 * task.z_loss * lse if task.z_loss != 0 else 0
        # 0 * log_sum: a row with NaN is NaN even where its class weighs nothing.
        loss = vector_item(&task.sample_weight, i) * (loss + 0.5 * z_slope * lse + 0 * rows.log_sum[j])
        g = task.factor * task.logit_scale * vector_item(&task.sample_weight, i) * vector_item(&task.grad_output, i)
        rows.alpha[j] = g * (total + z_slope) / s
        rows.beta[j] = -g * even
        rows.gamma[j] = -g * hard
        rows.grad_peak[j] = rows.slope_peak[j] * g * (
            residue - total * ((rows.rest[j] + (1 - e_peak)) / s) + z_slope * (e_peak / s))
        if rows.skipped[j]:
            loss = lse = log_prob = 0
        if task.loss != NULL:
            (<real*>task.loss)[i] = <real>loss
        if task.lse != NULL:
            (<real*>task.lse)[i] = <real>lse
        if task.log_prob != NULL:
            (<real*>task.log_prob)[i] = <real>log_prob
        if task.entropy != NULL:
            (<real*>task.entropy)[i] = <real>0 if rows.skipped[j] else <real>(
                rows.log_sum[j] - rows.sums[E_D][j] * d_size / s)
        if task.argmax != NULL:
            task.argmax[i] = -1 if rows.skipped[j] else rows.argmax[j]
