"""The column kernel's part for plain calls: class indices without options, 64 rows at a time.

Design
------
1. With few classes the scalars of a row weigh more than its classes. So they are vectors here as well, of the logits'
   own type: float64 would double their cost and, without options, none of them needs it. 64 rows are 4 independent
   chains of 400 cycles, which hide each other.
2. Whatever has options, or fewer than 64 rows, goes through `_columns`, which does the same in float64.
3. Every loop runs over a constant number of lanes and stores one array, or GCC leaves it scalar.
"""
from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from fastce._cpu._math cimport exp, exp_unit, log1p, real
from fastce._cpu._task cimport GRADIENT, Task
from fastce._cpu._tiles cimport LANES, TILE, unless_one


cdef inline bint is_plain_call(const Task* task) noexcept nogil:
    """Tell whether this file can do a call: no options but a scale, and factors whose products do not overflow."""
    return (
        task.target != NULL and not task.extras and not task.normalized and task.weight == NULL
        and task.sample_weight.data == NULL and task.grad_output.data == NULL and task.z_loss == 0
        and task.logit_scale >= 1 and task.softcap == 0 and task.lse == NULL and task.log_prob == NULL
        and task.out_kind == GRADIENT and 1e-30 < fabs(task.factor * task.logit_scale)
        and fabs(task.factor * task.logit_scale) <= 4)


cdef inline void sweep_plain(
    real* x, Py_ssize_t n_classes, real scale, real* top, real* all_terms, real* rest
) noexcept nogil:
    """Turn 16 rows of logits into exponentials; write maximum and sums."""
    cdef real m[LANES]
    cdef real a[LANES]
    cdef real r[LANES]
    cdef Py_ssize_t j, k
    for j in range(LANES):
        m[j] = x[j]
    for k in range(1, n_classes):
        for j in range(LANES):
            m[j] = x[k * LANES + j] if x[k * LANES + j] > m[j] else m[j]
    for j in range(LANES):
        top[j] = m[j]
    for j in range(LANES):
        m[j] = <real>0 if m[j] == -INFINITY else m[j]
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
    for j in range(LANES):
        all_terms[j] = a[j]
    for j in range(LANES):
        rest[j] = r[j]


cdef inline double process_plain(
    const Task* task, Py_ssize_t start, real* stage, Py_ssize_t size
) noexcept nogil:
    """Do 64 rows, staged in four groups of `size` numbers; return the sum of their losses."""
    cdef int64_t y[TILE]
    cdef real top[TILE]
    cdef real x_peak[TILE]
    cdef real all_terms[TILE]
    cdef real rest[TILE]
    cdef real inverse[TILE]
    cdef real log_sum[TILE]
    cdef real d_peak[TILE]
    cdef real loss[TILE]
    cdef double lanes[LANES]
    cdef int64_t ignored = task.ignore_index
    cdef int64_t n_skipped = 0
    cdef real unit = <real>1 / exp_unit(stage[0])
    cdef real scale = <real>task.logit_scale
    cdef real factor = <real>(task.factor * task.logit_scale)
    cdef Py_ssize_t g, j, k
    cdef real* x
    memcpy(y, task.target + start, sizeof(y))
    for j in range(TILE):
        n_skipped += y[j] == ignored
    for j in range(TILE):
        y[j] = 0 if y[j] == ignored else y[j]
    for j in range(TILE):
        x_peak[j] = stage[j // LANES * size + y[j] * LANES + j % LANES]
    for g in range(4):
        sweep_plain(
            stage + g * size, task.n_classes, scale, top + g * LANES, all_terms + g * LANES, rest + g * LANES)
    # As `rest_of` does it. top - top: NaN where no logit is above -inf.
    for j in range(TILE):
        rest[j] = rest[j] * unit if all_terms[j] < <real>2 / unit else all_terms[j] * unit - <real>1
    for j in range(TILE):
        rest[j] += top[j] - top[j]
    for j in range(TILE):
        inverse[j] = <real>1 / (<real>1 + rest[j])
    for j in range(TILE):
        log_sum[j] = log1p(rest[j], inverse[j])
    for j in range(TILE):
        d_peak[j] = scale * (top[j] - x_peak[j])
    for j in range(TILE):
        loss[j] = log_sum[j] + d_peak[j]
    # the gradient of the peak, from the other classes' terms; divided, so that it is -1 exactly where p is 0
    for j in range(TILE):
        x_peak[j] = -factor * ((rest[j] + (<real>1 - exp(-d_peak[j]) * unit)) / (<real>1 + rest[j]))
    for j in range(TILE):
        inverse[j] = factor * inverse[j]
    if n_skipped:
        for j in range(TILE):
            if task.target[start + j] == ignored:
                loss[j] = 0
    if task.loss != NULL:
        memcpy(<real*>task.loss + start, loss, sizeof(loss))
    for j in range(LANES):
        lanes[j] = (<double>loss[j] + <double>loss[j + 16]) + (<double>loss[j + 32] + <double>loss[j + 48])
    if task.out.data != NULL:
        for g in range(4):
            x = stage + g * size
            for k in range(task.n_classes):
                for j in range(LANES):
                    x[k * LANES + j] = x[k * LANES + j] * unit * inverse[g * LANES + j]
        for j in range(TILE):
            stage[j // LANES * size + y[j] * LANES + j % LANES] = x_peak[j]
        if n_skipped:
            for j in range(TILE):
                if task.target[start + j] == ignored:
                    for k in range(task.n_classes):
                        stage[j // LANES * size + k * LANES + j % LANES] = 0
    return ((lanes[0] + lanes[8]) + (lanes[4] + lanes[12])) + ((lanes[2] + lanes[10]) + (lanes[6] + lanes[14])) + (
        ((lanes[1] + lanes[9]) + (lanes[5] + lanes[13])) + ((lanes[3] + lanes[11]) + (lanes[7] + lanes[15])))
