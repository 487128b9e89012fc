"""The first pass of the row kernel over a block of a row's classes: maximum, exponentials and sums.

Design
------
1. Ordinary arrays have loops of their own, in which constants stay in registers (13 against 10 cycles per 16 floats
   with AVX-512). All loops do the same arithmetic in the same order.
2. The last, short tile overlaps the one before: lanes that were already done are masked. Filling it up piece by piece
   cost 200 cycles a row in failed store forwarding.
"""
from libc.math cimport INFINITY
from libc.stdint cimport int32_t
from libc.string cimport memcpy

from fastce._cpu._convert cimport NATIVE, SWEEPS_16_BITS, is_16_bit, is_array, size_of
from fastce._cpu._math cimport exp_unit, real
from fastce._cpu._prefetch cimport CACHE_LINE, prefetch_row, prefetch_to_l2
from fastce._cpu._scalars cimport Scalars, cap_factor_of, scale_of, sum_factor
from fastce._cpu._spans cimport RowView, TileRange, logit_tile, prob_at, prob_tile, row_tile, span_at, weight_tile
from fastce._cpu._task cimport ALL, E_D, LOG_SOFTMAX, N_SUMS, REST, Task
from fastce._cpu._tiles cimport *

cdef enum:
    BLOCK_BYTES = 8192  # logits, what is prefetched for the next block, and as much of class probabilities fit into L1


cdef inline bint sweeps_16_bits(const Task* task, real like) noexcept nogil:
    """Return True if the sweep can read logits of 16 bits that are an array, which need not be widened then."""
    return (
        real is float and SWEEPS_16_BITS and not task.has_option_sums and not task.find_argmax and not task.normalized
        and task.softcap == 0 and task.logit_scale == 1 and task.out_kind != LOG_SOFTMAX)


cdef inline Py_ssize_t row_block(const Task* task, real like) noexcept nogil:
    """Return how many of the caller's classes make a block."""
    cdef bint narrow = is_16_bit(task.logits.format) and sweeps_16_bits(task, like)
    return BLOCK_BYTES // (2 if narrow else <Py_ssize_t>sizeof(real))


cdef inline Py_ssize_t tile_lines(real like) noexcept nogil:
    """Return the number of cache lines in a tile."""
    return TILE * <Py_ssize_t>sizeof(real) // CACHE_LINE


cdef inline void max_plain(const real* x, Py_ssize_t n, real* row_max) noexcept nogil:
    """Do the maximum's pass over n classes of an ordinary array."""
    cdef real buffer[TILE]
    cdef Py_ssize_t k = 0
    while k + TILE <= n:
        fold_max(x + k, row_max)
        k += TILE
    if k < n:
        fold_max(row_tile(<const char*>x, sizeof(real), span_at(k, n), <real>-INFINITY, buffer), row_max)


cdef inline void exp_plain(
    const Task* task, const RowView* row, Py_ssize_t start, Py_ssize_t n, const real* row_max, real scale, real* sums
) noexcept nogil:
    """Do the exponentials' pass in the same order, where every operand is an ordinary array."""
    cdef real e[TILE]
    cdef real x_buffer[TILE]
    cdef real w_buffer[TILE]
    cdef real t_buffer[TILE]
    cdef const real* x = <const real*>row.logits + start
    cdef const real* w = w_buffer
    cdef const real* t
    cdef real* out = <real*>row.exps
    cdef Py_ssize_t w_step = 0
    cdef bint has_option_sums = task.has_option_sums
    cdef bint entropy = task.sum_entropy
    cdef bint in_place = <const real*>out == x and not entropy
    cdef TargetSums asked
    cdef TileRange span
    cdef Py_ssize_t j, k = 0
    if not has_option_sums and n >= TILE:
        exp_row(
            row.format, row.logits + start * size_of(row.format, scale), n, row_max[0], scale, out, row.ahead_logits,
            row.size_logits, row.is_long, sums + 16 * ALL)
        return
    asked = target_sums(task, sums)
    if task.weight != NULL:
        w = <const real*>task.weight + start
        w_step = 1
    elif has_option_sums:
        fill(w_buffer, 0, TILE, <real>1)
    while k + TILE <= n:
        # Some lines twice, if the logits are shorter numbers: a variable count took half a cycle more per 16 numbers.
        for j in range(tile_lines(row_max[0])):
            prefetch_row(row.ahead_logits + k * row.size_logits + j * CACHE_LINE, row.is_long)
        if has_option_sums:
            t = prob_at(task, row, start + k, TILE, t_buffer)
            if t != NULL:
                for j in range(tile_lines(row_max[0])):
                    prefetch_to_l2(row.ahead_prob + k * row.size_prob + j * CACHE_LINE)
            fold_targets(x + k, row_max, w + k * w_step, False, t, &asked)
        if in_place:
            exp_and_fold(out + k, LANES, 4, row_max, scale, out + k, LANES, sums + 16 * ALL, NULL)
            k += TILE
            continue
        exp_and_fold(x + k, LANES, 4, row_max, scale, e, LANES, sums + 16 * ALL, NULL)
        if entropy:
            fold_shifted(e, x + k, row_max, True, sums + 16 * E_D)
        copy(e, out + k)
        k += TILE
    if k == n:
        return
    for j in range((n - k) * row.size_logits // CACHE_LINE + 1):
        prefetch_row(row.ahead_logits + k * row.size_logits + j * CACHE_LINE, row.is_long)
    span = span_at(k, n)
    x = row_tile(<const char*>x, sizeof(real), span, <real>-INFINITY, x_buffer)
    exp_and_fold(x, LANES, 4, row_max, scale, e, LANES, sums + 16 * ALL, NULL)
    if has_option_sums:
        w = weight_tile(w if w_step == 1 else NULL, span, w_buffer)
        span.k += start
        fold_targets(x, row_max, w, True, prob_tile(task, row, span, t_buffer), &asked)
        span.k -= start
        if entropy:
            fold_shifted(e, x, row_max, True, sums + 16 * E_D)
    if span.first > 0:
        store_lanes(<int32_t>span.first, e, out + span.k)
    else:
        memcpy(out + k, e, (n - k) * sizeof(real))


cdef inline real find_max(
    const Task* task, const RowView* row, Py_ssize_t start, Py_ssize_t stop, real like
) noexcept nogil:
    """Return the maximum of a row's classes start .. stop - 1."""
    cdef real buffer[TILE]
    cdef real row_max[LANES]
    cdef real cap_factor = <real>cap_factor_of(task)
    cdef Py_ssize_t stride = task.logits.class_stride
    cdef Py_ssize_t k = start
    cdef const char* first
    if task.normalized:
        return 0
    if stop - start >= TILE and cap_factor == 0 and (row.format != NATIVE or is_plain(row.logits, stride, like)):
        first = row.logits + start * size_of(row.format, like)
        if real is float:
            return max_of_floats(row.format, first, stop - start)
        else:
            return max_of_doubles(NATIVE, first, stop - start)
    fill(row_max, 0, LANES, <real>-INFINITY)
    if is_plain(row.logits, stride, like) and cap_factor == 0:
        max_plain(<const real*>row.logits + start, stop - start, row_max)
        k = stop
    while k < stop:
        fold_max(logit_tile(row.logits, stride, cap_factor, span_at(k, stop), buffer), row_max)
        k += TILE
    return lane_max(row_max)


cdef inline bint sweep_block(
    const Task* task, const RowView* row, Py_ssize_t start, Py_ssize_t stop, real m, double known, Scalars* block
) noexcept nogil:
    """Sum up the classes start .. stop - 1 of one row, m the largest; leave the exponentials in row.exps.

    They are relative to `known`, the maximum of the blocks before, unless that is smaller (or NaN). Return whether they
    are: then the largest term is elsewhere, and block.sumexp_excl_max is the sum of all terms.
    """
    cdef real x_buffer[TILE]
    cdef real w_buffer[TILE]
    cdef real t_buffer[TILE]
    cdef real e[TILE]
    cdef real row_max[LANES]
    cdef real sums[N_SUMS * LANES]
    cdef int32_t first[LANES]
    cdef const real* x
    cdef bint is_lower
    cdef double all_terms
    # Locals, because the compiler must assume that a store into `out` changes what `task` points to.
    cdef real scale = <real>scale_of(task)
    cdef real cap_factor = <real>cap_factor_of(task)
    cdef Py_ssize_t stride = task.logits.class_stride
    cdef Py_ssize_t exp_stride = row.exp_stride
    cdef bint normalized = task.normalized
    cdef bint plain = row.format != NATIVE or (
        is_plain(row.logits, stride, m) and cap_factor == 0 and not normalized)
    cdef TargetSums asked
    cdef TileRange span
    cdef Py_ssize_t j, k
    is_lower = m <= known
    m = <real>known if is_lower else m
    block.row_max[0] = m
    # Nothing but -inf (or NaN): any finite shift gives 0 (or NaN).
    fill(row_max, 0, LANES, <real>0 if m == -INFINITY else m)
    fill(sums, 0, (REST + 1) * LANES, <real>0)
    for j in range(task.n_sums):
        fill(sums + 16 * task.sums[j], 0, LANES, <real>0)
    k = start
    if plain and not task.find_argmax and is_plain(row.exps, exp_stride, m) and (
            row.prob == NULL or is_array(row.prob, task.prob.format, task.prob.class_stride, m)):
        exp_plain(task, row, start, stop - start, row_max, scale, sums)
        k = stop
    for j in range(LANES):
        first[j] = NO_CLASS
    if task.has_option_sums and k < stop:
        asked = target_sums(task, sums)
    while k < stop:
        span = span_at(k, stop)
        x = logit_tile(row.logits, stride, cap_factor, span, x_buffer)
        if not normalized:
            exp_and_fold(x, LANES, 4, row_max, scale, e, LANES, sums + 16 * ALL, NULL)
        if task.has_option_sums:
            fold_targets(
                x, row_max, weight_tile(<const real*>task.weight, span, w_buffer), True,
                prob_tile(task, row, span, t_buffer), &asked)
            if task.sum_entropy:
                fold_shifted(e, x, row_max, True, sums + 16 * E_D)
            if task.find_argmax:
                fold_argmax(x, row_max, <int32_t>(span.k - start), 16, 1, first)
        if not normalized:
            store(row.exps + (span.k + span.first - start) * exp_stride, exp_stride, span.limit - span.first,
                  e + span.first)
        k += TILE
    all_terms = lane_sum(sums + 16 * ALL)
    if is_lower:
        block.sumexp_excl_max[0] = all_terms / exp_unit(m)
    elif needs_rest(all_terms, m):
        k = 0
        while k < stop - start:
            fold_rest(row_tile(row.exps, exp_stride, span_at(k, stop - start), <real>0, e), sums + 16 * REST)
            k += TILE
        block.sumexp_excl_max[0] = lane_sum(sums + 16 * REST) / exp_unit(m)
    else:
        block.sumexp_excl_max[0] = all_terms / exp_unit(m) - 1
    for j in range(task.n_sums):
        block.sums[task.sums[j]][0] = lane_sum(sums + 16 * task.sums[j]) * sum_factor(task.sums[j], scale)
    block.argmax[0] = -1
    if task.find_argmax:
        k = NO_CLASS
        for j in range(LANES):
            k = min(k, first[j])
        block.argmax[0] = -1 if k == NO_CLASS else start + k
    return is_lower
