"""The largest logits of a block of classes and the sums over it, of one row or of 16 rows side by side.

Sums are formed by pieces that fit into L1, and the sums of pieces added up in double.
"""
from libc.math cimport INFINITY
from libc.stdint cimport int32_t

from fastce._cpu.kernel.blocks cimport (
    Block, find, find_in_lanes, find_lane_maxima, find_row_max, sum_exps, sum_excl_max, sum_targets
)
from fastce._cpu.kernel.row_view cimport weight_block
from fastce._cpu.kernel.scalars cimport Scalars, sum_factor
from fastce._cpu.lanes cimport LANES, NO_CLASS, asked_sums, choose_excl_max, fill, needs_excl_max, narrow, widen
from fastce._cpu.layout.convert cimport NATIVE, Format
from fastce._cpu.math cimport exp_unit, real
from fastce._cpu.task cimport ALL, EXCL_MAX, LEAST_BLOCK, N_SUMS, Task

cdef enum:
    # Classes of 16 rows that make a piece; of one row it is a block, or `block_size` classes of a longer array.
    PIECE = 128


cdef struct Totals:
    double all_terms[LANES]
    double excl_max[LANES]
    double sums[N_SUMS][LANES]  # of options


cdef inline void find_maxima(
    bint by_rows, Format format, const void* x, Py_ssize_t n, double* row_max, real like
) noexcept nogil:
    """Find the largest of n numbers in each row."""
    cdef real found[LANES]
    if by_rows:
        row_max[0] = find_row_max(format, x, n, like)
        return
    find_lane_maxima(<const real*>x, n, found)
    widen(found, row_max)


cdef inline void find_argmax(
    bint by_rows, const real* x, Py_ssize_t n, Py_ssize_t start, Scalars* rows, Py_ssize_t lane
) noexcept nogil:
    """Find the class of each row's maximum, which is known, from class `start` on; -1 where there is none."""
    cdef real row_max[LANES]
    cdef int32_t found[LANES]
    cdef Py_ssize_t j
    if by_rows:
        j = -1 if rows.row_max[lane] == -INFINITY else find(x, n, rows.row_max[lane])
        rows.argmax[lane] = -1 if j < 0 else start + j
        return
    narrow(rows.row_max, row_max)
    find_in_lanes(x, n, row_max, found)
    for j in range(LANES):
        rows.argmax[j] = -1 if found[j] == NO_CLASS or row_max[j] == -INFINITY else start + found[j]


cdef inline void narrow_maxima(bint by_rows, const double* maxima, real* row_max) noexcept nogil:
    """Write what logits are shifted by: nothing but -inf (or NaN) gives 0 (or NaN) by any finite shift."""
    cdef Py_ssize_t j
    if by_rows:
        row_max[0] = <real>(0 if maxima[0] == -INFINITY else maxima[0])
    else:
        for j in range(LANES):
            row_max[j] = <real>(0 if maxima[j] == -INFINITY else maxima[j])


cdef inline Block describe_block(const Task* task, bint by_rows) noexcept nogil:
    """Return what all blocks of a task have in common."""
    cdef Block b
    b.by_rows = by_rows
    b.format = NATIVE
    b.ahead_l1 = b.ahead_l2 = b.ahead_t = NULL
    b.ahead_size = b.ahead_t_size = 0
    b.x = b.w = b.t = b.next = NULL
    b.n_next = 0
    b.next_max = 0
    b.done = NULL
    b.n_done = 0
    b.factor = 1
    b.e = NULL
    b.n = 0
    b.asked = asked_sums(task)
    b.sums_entropy = task.sum_entropy
    return b


# Loops over 16 lanes have a constant length, so that they become vector code.
cdef inline void clear_lanes(bint by_rows, double* lanes) noexcept nogil:
    if by_rows:
        lanes[0] = 0
    else:
        fill(lanes, 0, LANES, <double>0)


cdef inline void add_lanes(bint by_rows, const double* lanes, double* total) noexcept nogil:
    cdef Py_ssize_t j
    if by_rows:
        total[0] += lanes[0]
    else:
        for j in range(LANES):
            total[j] += lanes[j]


cdef inline void begin_totals(const Task* task, bint by_rows, Totals* totals) noexcept nogil:
    cdef Py_ssize_t c
    clear_lanes(by_rows, totals.all_terms)
    clear_lanes(by_rows, totals.excl_max)
    for c in range(task.n_sums):
        clear_lanes(by_rows, totals.sums[task.sums[c]])


cdef inline void add_piece(
    const Task* task, bint by_rows, Block* b, Py_ssize_t start, const real* row_max, Totals* totals
) noexcept nogil:
    """Add the sums over a piece, which `b` describes but for the weights of its classes, from class `start` on."""
    cdef Py_ssize_t c
    if b.asked.w_d or task.sum_prob:
        b.w = weight_block(task, start, row_max[0])
        sum_targets(b, row_max)
    if not task.normalized:
        sum_exps(b, row_max, task.scale)
        add_lanes(by_rows, b.sums[ALL], totals.all_terms)
        if not by_rows:
            add_lanes(False, b.sums[EXCL_MAX], totals.excl_max)
    for c in range(task.n_sums):
        add_lanes(by_rows, b.sums[task.sums[c]], totals.sums[task.sums[c]])


cdef inline double sum_excl_max_of_row(const real* e, Py_ssize_t n, Py_ssize_t block) noexcept nogil:
    """Return the sum of a row's exponentials without the terms that are 1."""
    cdef Py_ssize_t k = 0
    cdef double total = 0
    while n - k >= block + LEAST_BLOCK:
        total += sum_excl_max(e + k, block)
        k += block
    return total + sum_excl_max(e + k, n - k)


cdef inline void take_totals(
    const Task* task, bint by_rows, bint is_lower, Totals* totals, const real* e, Py_ssize_t n, Scalars* rows,
    Py_ssize_t lane
) noexcept nogil:
    """Write the sums of n numbers whose exponentials are e; `is_lower`: the largest term of their row is elsewhere."""
    cdef real scale = <real>task.scale
    cdef Py_ssize_t c, j
    if by_rows:
        if is_lower:
            rows.sumexp_excl_max[lane] = totals.all_terms[0] / exp_unit(scale)
        else:
            if needs_excl_max(totals.all_terms[0], scale):
                totals.excl_max[0] = sum_excl_max_of_row(e, n, task.block)
            rows.sumexp_excl_max[lane] = choose_excl_max(totals.all_terms[0], totals.excl_max[0], scale)
        for c in range(task.n_sums):
            rows.sums[task.sums[c]][lane] = totals.sums[task.sums[c]][0] * sum_factor(task.sums[c], scale)
        return
    for j in range(LANES):
        rows.sumexp_excl_max[j] = choose_excl_max(totals.all_terms[j], totals.excl_max[j], scale)
    for c in range(task.n_sums):
        for j in range(LANES):
            rows.sums[task.sums[c]][j] = totals.sums[task.sums[c]][j] * sum_factor(task.sums[c], scale)
