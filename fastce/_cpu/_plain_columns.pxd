"""The column kernel's part for plain calls: class indices without options, 64 rows at a time.

Design
------
1. With few classes the scalars of a row weigh more than its classes. So they are vectors here as well, of the logits'
   own type: float64 would double their cost and, without options, none of them needs it.
2. 64 rows are 4 groups of independent vectors. Maxima, exponentials and scalars of all 4 are separate passes, so that
   the latency of one group hides behind the others.
3. The gradients of the targets are put in by comparing each class with them: GCC would make scatter instructions of
   indexed stores, which are slow. (Picking the targets' logits likewise was slower than 64 indexed loads.)
4. Fewer rows are filled up to 64, so that the bits of a row do not depend on how many others there are. Whatever has
   options goes through `_columns`, which does the same in float64.
5. Every loop over lanes stores one array, or GCC leaves it scalar. Accumulators and what they are compared with are
   local arrays, or GCC tests for overlap in every turn and keeps them in memory: three times slower.
"""
from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from fastce._cpu._math cimport exp, exp_unit, log1p, real
from fastce._cpu._task cimport GRADIENT, Task, vector_item
from fastce._cpu._tiles cimport LANES, TILE, unless_one, wide_lane_sum


cdef inline bint is_plain_call(const Task* task) noexcept nogil:
    """Tell whether this file can do a call: no options but a scale, and factors whose products do not overflow."""
    return (
        task.target != NULL and not task.extras and not task.normalized and task.weight == NULL
        and task.sample_weight.data == NULL and task.z_loss == 0
        and task.logit_scale >= 1 and task.softcap == 0 and task.lse == NULL and task.log_prob == NULL
        and task.out_kind == GRADIENT and 1e-24 < fabs(task.factor * task.logit_scale)
        and fabs(task.factor * task.logit_scale) < 1e30)


cdef inline void find_tops(const real* x, Py_ssize_t n_classes, real* top) noexcept nogil:
    """Write the maximum of 16 rows."""
    cdef real m[LANES]
    cdef Py_ssize_t j, k
    memcpy(m, x, sizeof(m))
    for k in range(1, n_classes):
        for j in range(LANES):
            m[j] = x[k * LANES + j] if x[k * LANES + j] > m[j] else m[j]
    memcpy(top, m, sizeof(m))


cdef inline void exp_and_sum(
    real* x, Py_ssize_t n_classes, real scale, const real* shift, real* all_terms, real* rest
) noexcept nogil:
    """Turn the logits of 16 rows into exponentials; write their sums."""
    cdef real m[LANES]
    cdef real a[LANES]
    cdef real r[LANES]
    cdef Py_ssize_t j, k
    memcpy(m, shift, sizeof(m))
    for j in range(LANES):
        a[j] = 0
    for j in range(LANES):
        r[j] = 0
    for k in range(n_classes):
        for j in range(LANES):
            x[k * LANES + j] = exp(scale * (x[k * LANES + j] - m[j]))
        for j in range(LANES):
            a[j] += x[k * LANES + j]
        for j in range(LANES):
            r[j] += unless_one(x[k * LANES + j])
    memcpy(all_terms, a, sizeof(a))
    memcpy(rest, r, sizeof(r))


cdef inline void scale_and_put(
    real* x, Py_ssize_t n_classes, const real* alpha, const real* y, const real* grad_peak
) noexcept nogil:
    """Turn the exponentials of 16 rows into gradients."""
    cdef real a[LANES]
    cdef real p[LANES]
    cdef real t[LANES]
    cdef Py_ssize_t j, k
    cdef real g
    memcpy(a, alpha, sizeof(a))
    memcpy(p, grad_peak, sizeof(p))
    memcpy(t, y, sizeof(t))
    for k in range(n_classes):
        for j in range(LANES):
            g = x[k * LANES + j] * a[j]
            x[k * LANES + j] = p[j] if t[j] == <real>k else g


cdef inline void multiply_rows(real* x, Py_ssize_t n_classes, const real* factor) noexcept nogil:
    """Multiply each of 16 rows by its factor."""
    cdef real f[LANES]
    cdef Py_ssize_t j, k
    memcpy(f, factor, sizeof(f))
    for k in range(n_classes):
        for j in range(LANES):
            x[k * LANES + j] *= f[j]


cdef inline void process_plain(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* stage, Py_ssize_t size
) noexcept nogil:
    """Do n <= 64 rows, staged in four groups of `size` numbers; the rest of the stage holds any finite numbers."""
    cdef int64_t target[TILE]
    cdef real y[TILE]  # as numbers of the vectors' own type
    cdef real top[TILE]
    cdef real shift[TILE]
    cdef real x_peak[TILE]
    cdef real all_terms[TILE]
    cdef real rest[TILE]
    cdef real inverse[TILE]
    cdef real log_sum[TILE]
    cdef real d_peak[TILE]
    cdef real loss[TILE]
    cdef real grad_peak[TILE]
    cdef real unscaled[TILE]   # the factor of the gradient, freed of `exp_unit`
    cdef real rest_units[TILE]
    cdef double sums[LANES]
    cdef int64_t ignored = task.ignore_index
    cdef int64_t n_skipped = 0
    cdef real unit = <real>1 / exp_unit(stage[0])
    cdef real scale = <real>task.logit_scale
    cdef double factor = task.factor * task.logit_scale
    cdef Py_ssize_t g, j, k
    if n == TILE:
        memcpy(target, task.target + start, sizeof(target))
    else:
        for j in range(TILE):
            target[j] = ignored
        memcpy(target, task.target + start, n * sizeof(int64_t))
    for j in range(TILE):
        n_skipped += target[j] == ignored
    for j in range(TILE):
        y[j] = <real>target[j]
    for g in range(4):
        find_tops(stage + g * size, task.n_classes, top + g * LANES)
    for g in range(4):
        for j in range(LANES):
            k = target[g * LANES + j]
            x_peak[g * LANES + j] = stage[g * size + (0 if k == ignored else k) * LANES + j]
    for j in range(TILE):
        shift[j] = <real>0 if top[j] == -INFINITY else top[j]
    for g in range(4):
        exp_and_sum(
            stage + g * size, task.n_classes, scale, shift + g * LANES, all_terms + g * LANES, rest + g * LANES)
    # As `rest_of` does it, still times exp_unit. top - top: NaN where no logit is above -inf.
    for j in range(TILE):
        rest_units[j] = rest[j] if all_terms[j] < <real>2 / unit else all_terms[j] - <real>1 / unit
    for j in range(TILE):
        rest_units[j] += top[j] - top[j]
    for j in range(TILE):
        rest[j] = rest_units[j] * unit
    for j in range(TILE):
        inverse[j] = <real>1 / (<real>1 + rest[j])
    for j in range(TILE):
        log_sum[j] = log1p(rest[j], inverse[j])
    for j in range(TILE):
        d_peak[j] = scale * (top[j] - x_peak[j])
    for j in range(TILE):
        loss[j] = log_sum[j] + d_peak[j]
    if n_skipped:
        for j in range(TILE):
            loss[j] = <real>0 if y[j] == <real>ignored else loss[j]
    if task.loss != NULL:
        if n == TILE:
            memcpy(<real*>task.loss + start, loss, sizeof(loss))
        else:
            memcpy(<real*>task.loss + start, loss, n * sizeof(real))
    for j in range(LANES):
        sums[j] = (<double>loss[j] + loss[j + 16]) + (<double>loss[j + 32] + loss[j + 48])
    task.loss_parts[start // task.part_rows] = wide_lane_sum(sums)
    if task.out.data != NULL:
        for j in range(TILE):
            unscaled[j] = <real>(factor * unit)
        # From the other classes' terms, times exp_unit: tiny ones are no normal numbers without. Divided, so that it is
        # -1 exactly where p is 0.
        for j in range(TILE):
            grad_peak[j] = -unscaled[j] * (
                (rest_units[j] + (<real>1 / unit - exp(-d_peak[j]))) / (<real>1 + rest[j]))
        for j in range(TILE):
            inverse[j] = unscaled[j] * inverse[j]
        for g in range(4):
            scale_and_put(
                stage + g * size, task.n_classes, inverse + g * LANES, y + g * LANES, grad_peak + g * LANES)
        if task.grad_output.data != NULL:
            # Not before: tiny ones, freed of `exp_unit`, would be no normal numbers.
            for j in range(n):
                unscaled[j] = <real>vector_item(&task.grad_output, start + j)
            for g in range(4):
                multiply_rows(stage + g * size, task.n_classes, unscaled + g * LANES)
        if n_skipped:
            for j in range(TILE):
                if target[j] == ignored:
                    for k in range(task.n_classes):
                        stage[j // LANES * size + k * LANES + j % LANES] = 0
