"""Rows as blocks and tiles: which classes they hold, and where the numbers are."""
from libc.math cimport INFINITY
from libc.stdint cimport int32_t

from fastce._cpu._convert cimport NATIVE, Format, load_array, size_of
from fastce._cpu._math cimport real
from fastce._cpu._task cimport Task, row_offset
from fastce._cpu._tiles cimport TILE, cap, copy, fill, gather, is_plain, keep_lanes


# Where the operands of one row start; NULL if absent.
cdef struct RowView:
    const char* logits
    Format format             # of the logits there: 16 bits where a block is read without having been widened
    const char* prob
    char* out
    char* exps                # where a block's exponentials go, in `out` or in scratch memory
    Py_ssize_t exp_stride
    const char* ahead_logits  # what to prefetch during a block, and the sizes of its numbers in bytes
    const char* ahead_prob
    Py_ssize_t size_logits
    Py_ssize_t size_prob
    bint is_long              # more than a block, of the arithmetic's numbers


# The classes of one tile: lane j is class k + j, for first <= j < limit.
cdef struct TileRange:
    Py_ssize_t k
    Py_ssize_t first
    Py_ssize_t limit


cdef inline RowView locate_row(const Task* task, Py_ssize_t i, real like) noexcept nogil:
    cdef RowView row
    row.logits = task.logits.data + row_offset(task, &task.logits, i)
    row.format = NATIVE
    row.prob = NULL if task.prob.data == NULL else task.prob.data + row_offset(task, &task.prob, i)
    row.out = NULL if task.out.data == NULL else task.out.data + row_offset(task, &task.out, i)
    row.exps = row.out
    row.exp_stride = task.out.class_stride
    row.ahead_logits = row.logits
    row.ahead_prob = row.prob
    row.size_logits = size_of(task.logits.format, like)
    row.size_prob = size_of(task.prob.format, like)
    row.is_long = task.n_classes > task.block and task.logits.format == NATIVE
    return row


cdef inline TileRange span_at(Py_ssize_t k, Py_ssize_t stop) noexcept nogil:
    """Return the span that starts with class k, or ends with it where fewer classes than a tile are left."""
    cdef TileRange span
    span.k = k
    span.first = 0
    span.limit = min(stop - k, TILE)
    if span.limit < TILE and stop >= TILE:
        span.first = TILE - span.limit
        span.k = k - span.first
        span.limit = TILE
    return span


cdef inline const real* row_tile(
    const char* row, Py_ssize_t stride, TileRange span, real padding, real* buffer
) noexcept nogil:
    """Return a row's numbers as a tile: where they are if they fill it as an ordinary array, else in `buffer`."""
    cdef const char* data = row + span.k * stride
    cdef const real* x = <const real*>data
    if span.limit == TILE and is_plain(data, stride, padding):
        if span.first == 0:
            return x
        keep_lanes(<int32_t>span.first, x, padding, buffer)
        return buffer
    fill(buffer, 0, TILE, padding)
    gather(data + span.first * stride, stride, span.limit - span.first, buffer + span.first)
    return buffer


cdef inline const real* logit_tile(
    const char* row, Py_ssize_t stride, real cap_factor, TileRange span, real* buffer
) noexcept nogil:
    """Return a tile of f(logits); a cap_factor of 0 means no softcap."""
    cdef const real* x = row_tile(row, stride, span, <real>-INFINITY, buffer)
    if cap_factor == 0:
        return x
    if x != buffer:
        copy(x, buffer)
    cap(buffer, cap_factor)
    fill(buffer, 0, span.first, <real>-INFINITY)
    fill(buffer, span.limit, TILE, <real>-INFINITY)
    return buffer


cdef inline const real* prob_tile(const Task* task, const RowView* row, TileRange span, real* buffer) noexcept nogil:
    if row.prob == NULL:
        return NULL
    if task.prob.format == NATIVE:
        return row_tile(row.prob, task.prob.class_stride, span, <real>0, buffer)
    fill(buffer, 0, TILE, <real>0)
    load_array(
        row.prob + (span.k + span.first) * task.prob.class_stride, task.prob.format, task.prob.class_stride,
        span.limit - span.first, buffer + span.first)
    return buffer


cdef inline const real* prob_at(
    const Task* task, const RowView* row, Py_ssize_t k, Py_ssize_t n, real* buffer
) noexcept nogil:
    """Return n <= 64 class probabilities from class k on, which in memory are an ordinary array; NULL without any."""
    cdef const char* prob = row.prob + k * task.prob.class_stride
    if row.prob == NULL:
        return NULL
    if task.prob.format == NATIVE:
        return <const real*>prob
    load_array(prob, task.prob.format, task.prob.class_stride, n, buffer)
    return buffer


cdef inline const real* weight_tile(const real* weight, TileRange span, real* buffer) noexcept nogil:
    if weight != NULL:
        return row_tile(<const char*>weight, sizeof(real), span, <real>0, buffer)
    fill(buffer, 0, TILE, <real>0)
    fill(buffer, span.first, span.limit, <real>1)
    return buffer
