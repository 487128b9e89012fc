"""Vector code: straight loops over one tile of 64 numbers.

Design
------
1. A tile is 4 groups of 16 lanes. A row kernel fills it with 64 consecutive classes of one row; a column kernel with 4
   consecutive classes of 16 rows. Sums and maxima fold the groups into 16 lanes, which are partial results of one row
   in the first case and the results of 16 rows in the second. So both kernel families run this code.
2. Trip counts are constants and every result lands in a local array, so that compilers vectorise without remainder
   loops and without checks for overlap. Short tiles are padded by the caller: logits with -inf, weights with 0.
3. Folding four groups before touching the accumulator keeps the chain through it short: one chain per element was 3
   times slower. Summing per lane also bounds the rounding error: n classes are at most n / 64 additions deep.
4. The largest term of a sum of exponentials is exactly `exp_unit`. Where it outweighs the others, loss and gradient
   come from a sum that leaves it out, `REST`, and so keeps the digits of the others however small they are. `ALL` is
   enough elsewhere, and where the sum can be repeated it alone is formed first: `REST` took a fifth of the sweep.
5. Sums of logits run at 2^-16 of their size (`d_unit`), so that a block of 3e38 in one lane does not overflow.
6. Options are tests per tile, outside the loops.
"""
from libc.stdint cimport int32_t
from libc.string cimport memcpy

from fastce._cpu._exp_tile cimport LANES, TILE, exp_and_fold, fold_groups, fold_rest_of_groups
from fastce._cpu._formula cimport times
from fastce._cpu._math cimport exp_unit, real, sech2, tanh
from fastce._cpu._registers cimport HAS_REGISTERS, max_lanes_of_floats, sum_lanes_of_floats
from fastce._cpu._task cimport REST, T, T_D, W_D, WT, WT_D, Task

cdef enum:
    NO_CLASS = 0x7FFFFFFF


cdef inline double d_unit() noexcept nogil:
    return 1.52587890625e-05


cdef inline void fill(real* tile, Py_ssize_t start, Py_ssize_t stop, real value) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(start, stop):
        tile[j] = value


cdef inline void gather(const char* data, Py_ssize_t stride, Py_ssize_t n, real* tile) noexcept nogil:
    """Copy n numbers that lie `stride` bytes apart, on any alignment."""
    cdef Py_ssize_t j
    if stride == <Py_ssize_t>sizeof(real):
        memcpy(tile, data, n * sizeof(real))
    else:
        for j in range(n):
            memcpy(tile + j, data + j * stride, sizeof(real))


cdef inline void keep_lanes(int32_t first, const real* source, real other, real* tile) noexcept nogil:
    """Copy a tile but for the lanes before `first`, which become `other`."""
    cdef int32_t j  # as wide as a float: wider indices would halve the vectors
    cdef real value
    for j in range(TILE):
        value = source[j]
        tile[j] = other if j < first else value


cdef inline void store_lanes(int32_t first, const real* tile, real* out) noexcept nogil:
    """Overwrite `out` but for the lanes before `first`."""
    cdef int32_t j
    cdef real left, value
    cdef real merged[TILE]
    for j in range(TILE):
        left = out[j]
        value = tile[j]
        merged[j] = left if j < first else value
    copy(merged, out)


cdef inline bint is_plain(const void* data, Py_ssize_t stride, real like) noexcept nogil:
    """Tell whether numbers `stride` bytes apart from `data` on are an ordinary C array."""
    return stride == <Py_ssize_t>sizeof(real) and <size_t>data % sizeof(real) == 0


cdef inline void widen(const real* lanes, double* wide) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(LANES):
        wide[j] = lanes[j]


cdef inline void narrow(const double* wide, real* lanes) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(LANES):
        lanes[j] = <real>wide[j]


cdef inline void copy(const real* source, real* tile) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(TILE):
        tile[j] = source[j]


cdef inline void store(char* data, Py_ssize_t stride, Py_ssize_t n, const real* tile) noexcept nogil:
    cdef Py_ssize_t j
    if stride != <Py_ssize_t>sizeof(real):
        for j in range(n):
            memcpy(data + j * stride, tile + j, sizeof(real))
    elif n == TILE and is_plain(data, stride, tile[0]):
        copy(tile, <real*>data)
    else:
        memcpy(data, tile, n * sizeof(real))


cdef inline void cap(real* x, real factor) noexcept nogil:
    """Replace x by tanh(x * factor)."""
    cdef Py_ssize_t j
    for j in range(TILE):
        x[j] = tanh(x[j] * factor)


cdef inline void fold_max(const real* x, real* top) noexcept nogil:
    cdef Py_ssize_t j
    cdef real a, b
    for j in range(LANES):
        a = x[j] if x[j] > x[j + 16] else x[j + 16]
        b = x[j + 32] if x[j + 32] > x[j + 48] else x[j + 48]
        a = a if a > b else b
        top[j] = a if a > top[j] else top[j]


cdef inline void exp_tile(const real* x, const real* top, real scale, real* e) noexcept nogil:
    """Write exp(scale * (x - top)) * exp_unit; `e` may be `x`."""
    exp_and_fold(x, LANES, 4, top, scale, e, LANES, NULL, NULL)


cdef inline void fold(const real* a, real* sum_a) noexcept nogil:
    fold_groups(a, LANES, 4, sum_a)


cdef inline void fold_rest(const real* e, real* sums) noexcept nogil:
    fold_rest_of_groups(e, LANES, 4, sums + 16 * REST)


cdef inline bint needs_rest(double all_terms, real like) noexcept nogil:
    """Tell whether a sum of exponentials is less than twice its largest term: only there does 1 - p cancel."""
    return <int>(exp_unit(like) <= all_terms) & <int>(all_terms < 2 * exp_unit(like))  # `and` would be a jump


cdef inline double rest_of(double all_terms, double rest, real like) noexcept nogil:
    """Return the sum of exponentials without one of the largest, from those with all and, if needed, with none."""
    return (rest if needs_rest(all_terms, like) else all_terms - exp_unit(like)) / exp_unit(like)


cdef inline void fold_shifted(
    const real* a, const real* x, const real* top, bint has_zeros, real* sum_ad
) noexcept nogil:
    """Add a * (x - top), in `d_unit`, to a sum."""
    cdef Py_ssize_t j
    cdef real u = <real>d_unit()
    if not has_zeros:
        for j in range(LANES):
            sum_ad[j] += (a[j] * (x[j] * u - top[j] * u) + a[j + 16] * (x[j + 16] * u - top[j] * u)) + (
                a[j + 32] * (x[j + 32] * u - top[j] * u) + a[j + 48] * (x[j + 48] * u - top[j] * u))
        return
    for j in range(LANES):
        sum_ad[j] += (times(a[j], x[j] * u - top[j] * u) + times(a[j + 16], x[j + 16] * u - top[j] * u)) + (
            times(a[j + 32], x[j + 32] * u - top[j] * u) + times(a[j + 48], x[j + 48] * u - top[j] * u))


cdef inline void fold_argmax(
    const real* x, const real* top, int32_t base, int32_t group_step, int32_t lane_step, int32_t* first
) noexcept nogil:
    """Keep in `first` the smallest class whose logit is `top`; classes count from `base` by group and by lane."""
    cdef Py_ssize_t g, j
    cdef int32_t k
    for g in range(4):
        for j in range(LANES):
            k = base + <int32_t>g * group_step + <int32_t>j * lane_step
            k = k if x[16 * g + j] == top[j] else NO_CLASS
            first[j] = k if k < first[j] else first[j]


cdef inline void product(const real* a, const real* b, real* out) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(TILE):
        out[j] = a[j] * b[j]


cdef inline void fold_targets(
    const Task* task, const real* x, const real* top, const real* w, bint is_padded, const real* t, real* sums
) noexcept nogil:
    """Add what label smoothing and class probabilities sum up; t is NULL without the latter."""
    cdef real wt[TILE]
    if task.sum_weight:
        fold_shifted(w, x, top, is_padded or task.has_zero_weight, sums + 16 * W_D)
    if task.sum_prob and task.weight != NULL:
        product(w, t, wt)
        fold(wt, sums + 16 * WT)
        fold_shifted(wt, x, top, True, sums + 16 * WT_D)
    elif task.sum_prob:
        fold(t, sums + 16 * WT)
        fold_shifted(t, x, top, True, sums + 16 * WT_D)
    if task.sum_prob and task.log_prob != NULL:
        fold(t, sums + 16 * T)
        fold_shifted(t, x, top, True, sums + 16 * T_D)


cdef inline void scale_exp(const real* e, const real* alpha, real* out) noexcept nogil:
    """Write e * alpha, freed of `exp_unit`: first that, for a tiny alpha must not become subnormal."""
    cdef Py_ssize_t g, j
    cdef real unit = <real>1 / exp_unit(e[0])
    for g in range(4):
        for j in range(LANES):
            out[16 * g + j] = e[16 * g + j] * unit * alpha[j]


cdef inline void scale_exp_in_place(real* e, const real* alpha) noexcept nogil:
    """Do the same over e itself."""
    cdef Py_ssize_t g, j
    cdef real unit = <real>1 / exp_unit(e[0])
    for g in range(4):
        for j in range(LANES):
            e[16 * g + j] = e[16 * g + j] * unit * alpha[j]


cdef inline void multiply(real* e, Py_ssize_t n, real factor) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        e[j] *= factor


cdef inline void write_gradient(
    const real* e, const real* alpha, const real* beta, const real* w, const real* gamma, const real* t, real* out
) noexcept nogil:
    """Write alpha e + beta w, or alpha e + (beta + gamma t) w if t is not NULL."""
    cdef Py_ssize_t g, j
    cdef real unit = <real>1 / exp_unit(e[0])
    if t == NULL:
        for g in range(4):
            for j in range(LANES):
                out[16 * g + j] = e[16 * g + j] * unit * alpha[j] + beta[j] * w[16 * g + j]
    else:
        for g in range(4):
            for j in range(LANES):
                out[16 * g + j] = e[16 * g + j] * unit * alpha[j] + (
                    beta[j] + gamma[j] * t[16 * g + j]) * w[16 * g + j]


cdef inline void write_gradient_in_place(
    real* e, Py_ssize_t n, real alpha, real beta, const real* w, real gamma, const real* t
) noexcept nogil:
    """Do the same for n classes of one row over e itself; alpha is freed of `exp_unit`, NULL for w means 1."""
    cdef Py_ssize_t j
    if w == NULL and t == NULL:
        for j in range(n):
            e[j] = e[j] * alpha + beta
    elif t == NULL:
        for j in range(n):
            e[j] = e[j] * alpha + beta * w[j]
    elif w == NULL:
        for j in range(n):
            e[j] = e[j] * alpha + (beta + gamma * t[j])
    else:
        for j in range(n):
            e[j] = e[j] * alpha + (beta + gamma * t[j]) * w[j]


cdef inline void multiply_cap_slope(const real* x, real factor, real* out) noexcept nogil:
    """Multiply by 1 - tanh(x * factor)^2."""
    cdef Py_ssize_t j
    for j in range(TILE):
        out[j] *= sech2(x[j] * factor)


cdef inline void write_log(const real* x, const real* top, real scale, const real* log_sum, real* out) noexcept nogil:
    """Write scale * (x - top) - log_sum."""
    cdef Py_ssize_t g, j
    for g in range(4):
        for j in range(LANES):
            out[16 * g + j] = scale * (x[16 * g + j] - top[j]) - log_sum[j]


cdef inline double wide_lane_sum(const double* lanes) noexcept nogil:
    cdef double t[8]
    cdef Py_ssize_t j
    for j in range(8):
        t[j] = lanes[j] + lanes[j + 8]
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]))


cdef inline double lane_sum(const real* lanes) noexcept nogil:
    cdef double wide[LANES]
    if real is float:
        if HAS_REGISTERS:
            return sum_lanes_of_floats(lanes)
    widen(lanes, wide)
    return wide_lane_sum(wide)


cdef inline real lane_max(const real* lanes) noexcept nogil:
    cdef real t[8]
    cdef Py_ssize_t j
    if real is float:
        if HAS_REGISTERS:
            return max_lanes_of_floats(lanes)
    for j in range(8):
        t[j] = lanes[j] if lanes[j] > lanes[j + 8] else lanes[j + 8]
    for j in range(4):
        t[j] = t[j] if t[j] > t[j + 4] else t[j + 4]
    for j in range(2):
        t[j] = t[j] if t[j] > t[j + 2] else t[j + 2]
    return t[0] if t[0] > t[1] else t[1]
