"""What is summed over rows: by one thread and in a fixed order, so that no bit depends on the number of threads."""
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset

from fastce._cpu.task cimport Vector, vector_item

cdef extern from "host/platform.h" nogil:
    int64_t read_target "fastce_read_target"(const int64_t* target)


cdef enum:
    SUM_BLOCK = 1024  # numbers that are added up in 16 lanes before the sums of such blocks are added in pairs
    MAX_LEVELS = 64   # of pairs of pairs


# Sums of 2^k blocks each, k falling: added in pairs, so that the rounding error grows with log n only.
cdef struct PairwiseSum:
    double sums[MAX_LEVELS]
    Py_ssize_t n_blocks


cdef inline void add_block(PairwiseSum* total, const double* lanes) noexcept nogil:
    """Add a block, whose sums of 16 lanes are given."""
    cdef double t[16]
    cdef Py_ssize_t j, n = 8, level = 0, b = total.n_blocks
    memcpy(t, lanes, sizeof(t))
    while n > 0:
        for j in range(n):
            t[j] += t[j + n]
        n //= 2
    while b & 1:
        t[0] += total.sums[level]
        level += 1
        b >>= 1
    total.sums[level] = t[0]
    total.n_blocks += 1


cdef inline double sum_of_blocks(const PairwiseSum* total) noexcept nogil:
    """Return the sum of all blocks."""
    cdef double result = 0
    cdef Py_ssize_t level = 0, b = total.n_blocks
    while b > 0:
        if b & 1:
            result += total.sums[level]
        level += 1
        b >>= 1
    return result


cdef inline double sum_vector(const Vector* vector, Py_ssize_t n) noexcept nogil:
    """Return the sum of n numbers, in an order that depends on n alone."""
    cdef PairwiseSum total
    cdef double lanes[16]
    cdef Py_ssize_t i = 0, j, stop
    total.n_blocks = 0
    while i < n:
        memset(lanes, 0, sizeof(lanes))
        stop = min(n, i + SUM_BLOCK)
        while i + 16 <= stop:
            if vector.is_double:
                for j in range(16):
                    lanes[j] += (<const double*>vector.data)[i + j]
            else:
                for j in range(16):
                    lanes[j] += (<const float*>vector.data)[i + j]
            i += 16
        for i in range(i, stop):
            lanes[i % 16] += vector_item(vector, i)
        i = stop
        add_block(&total, lanes)
    return sum_of_blocks(&total)


# What a piece of the targets adds up to.
cdef struct TargetCount:
    int64_t n_bad      # classes that do not exist
    double weight      # sum of a_i w_y over kept rows


cdef inline double sum_weights(
    const int64_t* target, Py_ssize_t start, Py_ssize_t stop, int64_t ignore_index, int64_t n_classes,
    const Vector* weight, const Vector* sample_weight
) noexcept nogil:
    """Return the sum of a_i w_y over the kept ones of the rows start .. stop - 1."""
    cdef PairwiseSum total
    cdef double lanes[16]
    cdef Py_ssize_t i = start
    cdef int64_t y
    total.n_blocks = 0
    while i < stop:
        memset(lanes, 0, sizeof(lanes))
        for i in range(i, min(stop, i + SUM_BLOCK)):
            y = read_target(target + i)
            # In bounds, although that was checked: another thread may have written to the targets since.
            if y != ignore_index and <uint64_t>y < <uint64_t>n_classes:
                lanes[i % 16] += vector_item(sample_weight, i) * vector_item(weight, y)
        i += 1
        add_block(&total, lanes)
    return sum_of_blocks(&total)


cdef inline TargetCount count_targets(
    const int64_t* target, Py_ssize_t start, Py_ssize_t stop, int64_t ignore_index, int64_t n_classes,
    const Vector* weight, const Vector* sample_weight
) noexcept nogil:
    """Look at the rows start .. stop - 1."""
    cdef TargetCount count
    cdef Py_ssize_t i
    cdef int64_t n_kept = 0, n_bad = 0
    cdef bint kept
    for i in range(start, stop):  # vectorised: no exit, no gather
        kept = target[i] != ignore_index
        n_kept += kept
        n_bad += kept & (<uint64_t>target[i] >= <uint64_t>n_classes)
    count.n_bad = n_bad
    count.weight = <double>n_kept
    if n_bad == 0 and (weight.data != NULL or sample_weight.data != NULL):
        count.weight = sum_weights(target, start, stop, ignore_index, n_classes, weight, sample_weight)
    return count


cdef inline Py_ssize_t first_bad(
    const int64_t* target, Py_ssize_t n_rows, int64_t ignore_index, int64_t n_classes
) noexcept nogil:
    """Return the first row whose class does not exist, or -1."""
    cdef Py_ssize_t i
    for i in range(n_rows):
        if target[i] != ignore_index and <uint64_t>target[i] >= <uint64_t>n_classes:
            return i
    return -1
