"""The scalars of up to 16 rows: from the sums of the vector code to loss, statistics and the gradient's factors.

Design
------
1. Loops run over 16 lanes, one row each, and most store one array without branches, so that they become vector code.
   Arithmetic is float64 for all dtypes.
2. Options end here. With d = scale (f(x) - row_max) and e = exp(d) the gradient of a row is

       alpha e_k + beta w_k + gamma w_k t_k        times the slope of the softcap where there is one,

   and one number `grad_patch` is stored over it at class `patch_class`: the target, or the arg-max under probability
   targets. All formulas are those of `formula.h`.
3. The loss is formed from log1p(sumexp_excl_max) and x_y - row_max, never from lse - x_y.
4. A row whose logits are all -inf has row_max = -inf and sumexp_excl_max = -1, the empty sum. It becomes NaN here.
"""
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from fastce._cpu.formula cimport (
    grad_alpha, grad_beta, grad_gamma, grad_of_class, nan_unless_finite, row_entropy, row_log_prob, row_loss, row_lse,
    shift_exp_sum, shift_sum, smooth, sumexp_excl, times, z_loss_slope, z_loss_term
)
from fastce._cpu.kernel.blocks cimport cap
from fastce._cpu.lanes cimport D_UNIT, LANES, fill, wide_lane_sum
from fastce._cpu.layout.convert cimport read_converted
from fastce._cpu.math cimport difference, exp, exp_unit, log1p, real, sech2
from fastce._cpu.platform cimport read_once
from fastce._cpu.task cimport E_D, N_SUMS, T, T_D, W_D, WT, WT_D, Task, is_curvature, row_offset, vector_item, weight_of

cdef extern from "simd/compiler.h" nogil:
    ctypedef Py_ssize_t aligned_index "fastce_aligned_index"


cdef struct Scalars:
    int64_t kept[LANES]             # 0 for rows that are skipped and lanes without a row
    double sample_weight[LANES]
    # what the sweep found: sums over all classes as named in `task`
    double row_max[LANES]
    double sumexp_excl_max[LANES]   # sum of exp(d) without the largest term
    double sums[N_SUMS][LANES]
    int64_t argmax[LANES]
    # the class whose gradient is stored by itself
    int64_t patch_class[LANES]      # -1: none
    double x_patch[LANES]           # f(logit)
    double slope_patch[LANES]
    double weight_patch[LANES]
    # the factors of losses and gradients
    double log_sumexp[LANES]        # log of the sum of exp(d)
    double alpha[LANES]
    double beta[LANES]
    double gamma[LANES]
    double grad_patch[LANES]
    aligned_index start             # the first row
    Py_ssize_t n                    # how many; further lanes hold harmless numbers
    Py_ssize_t n_kept


cdef inline double unscaled_exp(double x) noexcept nogil:
    return exp(x) / exp_unit(x)


cdef inline real read_logit(const Task* task, Py_ssize_t i, Py_ssize_t k, real like) noexcept nogil:
    """Return the logit of class k in row i, as the caller gave it."""
    cdef const Task* given = task if task.source == NULL else task.source
    return read_converted(
        given.logits.data + row_offset(given, &given.logits, i) + k * given.logits.class_stride,
        given.logits.format, like)


cdef inline void read_patch_logit(const Task* task, Scalars* rows, Py_ssize_t lane, real like) noexcept nogil:
    """Read the logit of a row's patch class, before anything is stored into `out`, which may be the logits."""
    rows.x_patch[lane] = read_logit(task, rows.start + lane, rows.patch_class[lane], like)


cdef inline void read_patch_logits(const Task* task, Scalars* rows, real like) noexcept nogil:
    """Read those of all rows."""
    cdef Py_ssize_t j
    for j in range(rows.n):
        if rows.patch_class[j] >= 0:
            read_patch_logit(task, rows, j, like)


cdef inline void cap_patch_logits(const Task* task, Scalars* rows, real like) noexcept nogil:
    """Apply the softcap, if there is one, to the logits that were read."""
    cdef real x[LANES]
    cdef real factor = <real>task.cap_factor
    cdef Py_ssize_t j
    if factor == 0:
        return
    fill(x, 0, LANES, <real>0)
    for j in range(rows.n):
        if rows.patch_class[j] >= 0:
            x[j] = <real>rows.x_patch[j]
            rows.slope_patch[j] = sech2(<double>(x[j] * factor))
    cap(x, LANES, factor, x)  # the rows' own code, so that the arg-max has the very bits of `row_max`
    for j in range(rows.n):
        rows.x_patch[j] = x[j]


cdef inline void begin(const Task* task, Scalars* rows, Py_ssize_t start, Py_ssize_t n, real like) noexcept nogil:
    """Start with n rows: which are kept, and, under class indices, their patch classes."""
    cdef int64_t y[LANES]
    cdef int64_t ignored = task.ignore_index
    cdef uint64_t n_classes = task.n_classes
    cdef int64_t n_kept = 0
    cdef Py_ssize_t j, k
    rows.start = start
    rows.n = n
    for j in range(LANES):
        y[j] = ignored
    # What the rows keep if they are not swept. One loop per array, or GCC unrolls them into scalar stores.
    fill(rows.row_max, 0, LANES, <double>0)
    fill(rows.sumexp_excl_max, 0, LANES, <double>0)
    fill(rows.x_patch, 0, LANES, <double>0)
    fill(rows.slope_patch, 0, LANES, <double>1)
    fill(rows.weight_patch, 0, LANES, <double>1)
    fill(rows.sample_weight, 0, LANES, <double>1)
    for j in range(LANES):
        rows.argmax[j] = -1
    for k in range(task.n_sums):
        fill(rows.sums[task.sums[k]], 0, LANES, <double>0)
    if task.target == NULL:
        for j in range(LANES):
            rows.kept[j] = j < n
            rows.patch_class[j] = -1
    else:
        if n == LANES:
            memcpy(y, task.target + start, sizeof(y))
        else:
            memcpy(y, task.target + start, n * sizeof(int64_t))
        # Checked again, for another thread may have written to the targets since: a class is an index from here on.
        read_once(y)
        for j in range(LANES):
            rows.kept[j] = <int>(y[j] != ignored) & <int>(<uint64_t>y[j] < n_classes)
        for j in range(LANES):
            rows.patch_class[j] = -1 if rows.kept[j] == 0 else y[j]
    if task.sample_weight.data != NULL:
        for j in range(n):
            rows.sample_weight[j] = vector_item(&task.sample_weight, start + j)
            if rows.sample_weight[j] == 0:
                rows.kept[j] = 0
                rows.patch_class[j] = -1
    for j in range(LANES):
        n_kept += rows.kept[j]
    rows.n_kept = n_kept
    if task.weight != NULL and task.target != NULL:
        for j in range(n):
            if rows.patch_class[j] >= 0:
                rows.weight_patch[j] = weight_of(task, rows.patch_class[j], like)


cdef inline Py_ssize_t next_kept(const Scalars* rows, Py_ssize_t lane) noexcept nogil:
    """Return the first lane from `lane` on whose row is not skipped; beyond the last one if there is none."""
    while lane < rows.n and rows.kept[lane] == 0:
        lane += 1
    return lane


cdef inline double sum_factor(int k, real scale) noexcept nogil:
    """Return what is missing to a sum: the logits' scale to those of d, or `exp_unit`."""
    if k == E_D:
        return 1 / exp_unit(scale)
    return <real>1 if k == WT or k == T else scale


cdef inline void take(
    const Task* task, Scalars* rows, Py_ssize_t lane, const Scalars* block, Py_ssize_t n
) noexcept nogil:
    """Start n rows, from `lane` on, with their first block of classes."""
    cdef Py_ssize_t j, k
    for j in range(n):
        rows.row_max[lane + j] = block.row_max[j]
        rows.sumexp_excl_max[lane + j] = block.sumexp_excl_max[j]
        rows.argmax[lane + j] = block.argmax[j]
        for k in range(task.n_sums):
            rows.sums[task.sums[k]][lane + j] = block.sums[task.sums[k]][j]


cdef inline void add(const Task* task, Scalars* rows, Py_ssize_t lane, const Scalars* block) noexcept nogil:
    """Add a block of classes, relative to the maximum of those before and without a larger one, to a row."""
    cdef Py_ssize_t k
    rows.sumexp_excl_max[lane] += block.sumexp_excl_max[0]
    for k in range(task.n_sums):
        rows.sums[task.sums[k]][lane] += block.sums[task.sums[k]][0]


cdef inline void merge(
    const Task* task, Scalars* rows, Py_ssize_t lane, const Scalars* block, Py_ssize_t n, Py_ssize_t b
) noexcept nogil:
    """Add the b-th block of classes to what is known of the n rows from `lane` on."""
    cdef double factor, d, shift, factor_block, d_block, shift_block
    cdef double scale = task.scale
    cdef double w = task.block_weights[b] if task.sum_weight else 0  # of the classes before this block
    cdef double w_block = task.block_weights[b + 1] - w if task.sum_weight else 0
    cdef Py_ssize_t c, i, j, k
    for j in range(n):
        i = lane + j
        factor = factor_block = 1
        d = d_block = shift = shift_block = 0
        if block.row_max[j] > rows.row_max[i]:
            d = difference(rows.row_max[i], block.row_max[j], scale)
            factor = unscaled_exp(d)
            shift = scale * (rows.row_max[i] * D_UNIT - block.row_max[j] * D_UNIT)
        elif block.row_max[j] < rows.row_max[i]:
            d_block = difference(block.row_max[j], rows.row_max[i], scale)
            factor_block = unscaled_exp(d_block)
            shift_block = scale * (block.row_max[j] * D_UNIT - rows.row_max[i] * D_UNIT)
        for c in range(task.n_sums):
            k = task.sums[c]
            if k == E_D:
                rows.sums[k][i] = (
                    shift_exp_sum(rows.sums[k][i], 1 + rows.sumexp_excl_max[i], d, factor)
                    + shift_exp_sum(block.sums[k][j], 1 + block.sumexp_excl_max[j], d_block, factor_block))
            elif k == W_D:
                rows.sums[k][i] = (
                    shift_sum(rows.sums[k][i], w, shift) + shift_sum(block.sums[k][j], w_block, shift_block))
            elif k == WT_D or k == T_D:
                rows.sums[k][i] = (
                    shift_sum(rows.sums[k][i], rows.sums[k - 1][i], shift)
                    + shift_sum(block.sums[k][j], block.sums[k - 1][j], shift_block))
            else:
                rows.sums[k][i] += block.sums[k][j]
        if block.row_max[j] > rows.row_max[i]:
            rows.sumexp_excl_max[i] = block.sumexp_excl_max[j] + (1 + rows.sumexp_excl_max[i]) * factor
            rows.row_max[i] = block.row_max[j]
            rows.argmax[i] = block.argmax[j]
        else:
            rows.sumexp_excl_max[i] += (1 + block.sumexp_excl_max[j]) * factor_block


cdef inline void describe_argmax_patches(const Task* task, Scalars* rows, real like) noexcept nogil:
    """Complete the patch classes under probability targets: the arg-max, whose gradient would cancel."""
    cdef Py_ssize_t j
    cdef real x
    for j in range(rows.n):
        rows.x_patch[j] = rows.row_max[j]
        rows.slope_patch[j] = 1
        if task.softcap != 0 and rows.patch_class[j] >= 0:
            # The logits are still there: a softcap's sweep stores nothing.
            x = read_logit(task, rows.start + j, rows.patch_class[j], like)
            rows.slope_patch[j] = sech2(<double>(x * <real>task.cap_factor))


cdef inline void read_prob_target(
    const Task* task, Scalars* rows, double* wt, double* wtd, double* patch_wt, real like
) noexcept nogil:
    """Write the sums of w t and w t d under class probabilities, and w t of the patch class."""
    cdef Py_ssize_t j
    cdef const char* prob
    for j in range(LANES):
        wt[j] = rows.sums[WT][j]
    for j in range(LANES):
        wtd[j] = rows.sums[WT_D][j] / D_UNIT
    fill(patch_wt, 0, LANES, <double>0)
    for j in range(rows.n):
        if rows.patch_class[j] >= 0:
            prob = task.prob.data + row_offset(task, &task.prob, rows.start + j)
            rows.weight_patch[j] = weight_of(task, rows.patch_class[j], like)
            # Rounded as it was when it was summed up: the sum over the others is a difference.
            patch_wt[j] = <real>(rows.weight_patch[j] * read_converted(
                prob + rows.patch_class[j] * task.prob.class_stride, task.prob.format, like))


cdef inline void put(const Scalars* rows, const double* values, real* out) noexcept nogil:
    """Write a number per row where `out`, for the first of all rows, is not NULL."""
    cdef real buffer[LANES]
    cdef Py_ssize_t j
    if out == NULL:
        return
    for j in range(LANES):
        buffer[j] = <real>values[j]
    if rows.n == LANES:
        memcpy(out + rows.start, buffer, sizeof(buffer))
    else:
        memcpy(out + rows.start, buffer, rows.n * sizeof(real))


cdef inline void put_kept(const Scalars* rows, double* values, real* out) noexcept nogil:
    """Write a number per row, 0 for those that are skipped."""
    cdef Py_ssize_t j
    for j in range(LANES):
        values[j] = 0 if rows.kept[j] == 0 else values[j]
    put(rows, values, out)


cdef inline void find_upstream(const Task* task, const Scalars* rows, double* upstream) noexcept nogil:
    """Write what the gradients with respect to the scaled logits are multiplied by, the scale included."""
    cdef double factor = task.factor * task.logit_scale
    cdef Py_ssize_t j
    for j in range(LANES):
        upstream[j] = factor * rows.sample_weight[j]
    if task.grad_output.data != NULL:
        for j in range(rows.n):
            upstream[j] *= vector_item(&task.grad_output, rows.start + j)


cdef inline bint needs_gradient(const Task* task) noexcept nogil:
    """Return True unless the task is a product that goes without."""
    return not task.is_product or task.softcap != 0


cdef inline void finish(const Task* task, Scalars* rows, real like) noexcept nogil:
    """Turn the sums into losses, statistics and gradient factors; write the former, unless only the latter matter."""
    cdef bint has_loss = not is_curvature(task), with_gradient = needs_gradient(task)
    cdef double scale = task.scale
    cdef double one_minus_eps = 1 - task.label_smoothing
    cdef double eps_over_c = task.label_smoothing / task.n_classes
    cdef double weight_sum = task.weight_sum
    cdef double z_loss = task.z_loss
    cdef double inverse[LANES]    # 1 / (1 + sumexp_excl_max)
    cdef double lse[LANES]
    cdef double d[LANES]          # of the patch class
    cdef double e[LANES]          # exp(d)
    cdef double wt[LANES]         # sum of w t
    cdef double wtd[LANES]        # sum of w t d
    cdef double patch_wt[LANES]   # w t of the patch class
    cdef double sum_q[LANES]
    cdef double z_slope[LANES]
    cdef double loss[LANES]
    cdef double values[LANES]     # a statistic
    cdef double g[LANES]
    cdef Py_ssize_t j
    cdef bint is_nan
    if task.normalized:
        for j in range(LANES):
            rows.row_max[j] = rows.sumexp_excl_max[j] = 0
    # NaN where no logit is above -inf.
    for j in range(LANES):
        rows.sumexp_excl_max[j] += nan_unless_finite(rows.row_max[j])
    for j in range(LANES):
        inverse[j] = 1 / (1 + rows.sumexp_excl_max[j])
    if has_loss or z_loss != 0 or task.prob.data != NULL:
        for j in range(LANES):
            rows.log_sumexp[j] = log1p(rows.sumexp_excl_max[j], inverse[j])
            lse[j] = row_lse(scale * rows.row_max[j], rows.log_sumexp[j])
    if task.target == NULL and task.prob.data == NULL:
        for j in range(LANES):
            rows.alpha[j] = inverse[j]
            rows.beta[j] = rows.gamma[j] = 0
        put(rows, lse, <real*>task.lse)
        return
    for j in range(LANES):
        d[j] = difference(rows.x_patch[j], rows.row_max[j], scale)
    if with_gradient:
        for j in range(LANES):
            e[j] = unscaled_exp(d[j])
    if task.target == NULL:
        read_prob_target(task, rows, wt, wtd, patch_wt, like)
    else:
        for j in range(LANES):
            wt[j] = patch_wt[j] = rows.weight_patch[j]
        for j in range(LANES):
            wtd[j] = times(wt[j], d[j])
    for j in range(LANES):
        sum_q[j] = smooth(one_minus_eps, wt[j], eps_over_c, weight_sum)
    for j in range(LANES):
        z_slope[j] = 0
    if z_loss != 0:
        for j in range(LANES):
            z_slope[j] = z_loss_slope(z_loss, lse[j])
    find_upstream(task, rows, g)
    for j in range(LANES):
        rows.alpha[j] = grad_alpha(g[j], sum_q[j] + z_slope[j], inverse[j])
        rows.beta[j] = grad_beta(g[j], eps_over_c)
        rows.gamma[j] = grad_gamma(g[j], one_minus_eps)
    if not with_gradient:
        return
    for j in range(LANES):
        # dloss_dlse less q is what the other classes and the z-loss make of it, not a difference.
        rows.grad_patch[j] = rows.slope_patch[j] * g[j] * grad_of_class(
            e[j] * inverse[j],
            sumexp_excl(rows.sumexp_excl_max[j], <double>1, e[j]) / (1 + rows.sumexp_excl_max[j]),
            smooth(one_minus_eps, patch_wt[j], eps_over_c, rows.weight_patch[j]),
            smooth(one_minus_eps, wt[j] - patch_wt[j], eps_over_c, weight_sum - rows.weight_patch[j]) + z_slope[j])
    if not has_loss:
        return
    for j in range(LANES):
        wtd[j] = times(one_minus_eps, wtd[j])
    if eps_over_c != 0:
        for j in range(LANES):
            wtd[j] += eps_over_c * (rows.sums[W_D][j] / D_UNIT)
    for j in range(LANES):
        loss[j] = row_loss(sum_q[j], wtd[j], rows.log_sumexp[j])
    if z_loss != 0:
        for j in range(LANES):
            loss[j] += z_loss_term(z_loss, lse[j])
    for j in range(LANES):
        # A row with NaN is NaN even where its class weighs nothing.
        loss[j] = rows.sample_weight[j] * (loss[j] + nan_unless_finite(rows.sumexp_excl_max[j]))
    if rows.n_kept < LANES:
        for j in range(LANES):
            if rows.kept[j] == 0:
                loss[j] = lse[j] = 0
    task.loss_parts[rows.start // task.part_rows] = wide_lane_sum(loss)
    put(rows, loss, <real*>task.loss)
    put(rows, lse, <real*>task.lse)
    if task.log_prob != NULL:
        for j in range(LANES):
            values[j] = row_log_prob(1, d[j], rows.log_sumexp[j]) if task.target != NULL else row_log_prob(
                rows.sums[T][j], rows.sums[T_D][j] / D_UNIT, rows.log_sumexp[j])
        put_kept(rows, values, <real*>task.log_prob)
    if task.entropy != NULL:
        for j in range(LANES):
            values[j] = row_entropy(rows.sums[E_D][j], inverse[j], rows.log_sumexp[j])
        put_kept(rows, values, <real*>task.entropy)
    if task.argmax != NULL:
        for j in range(rows.n):
            # None is the most probable where the softmax is NaN.
            is_nan = rows.sumexp_excl_max[j] != rows.sumexp_excl_max[j]
            task.argmax[rows.start + j] = -1 if rows.kept[j] == 0 or is_nan else rows.argmax[j]
