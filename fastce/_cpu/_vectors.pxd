"""What is summed over rows: by one thread and in a fixed order, so that no bit depends on the number of threads."""
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from fastce._cpu._task cimport Vector, vector_item


cdef inline double sum_vector(const Vector* vector, Py_ssize_t n) noexcept nogil:
    """Return the sum of n numbers, in an order that depends on n alone."""
    cdef double lanes[16]
    cdef Py_ssize_t i, j
    memset(lanes, 0, sizeof(lanes))
    for i in range(n // 16):
        if vector.is_double:
            for j in range(16):
                lanes[j] += (<const double*>vector.data)[16 * i + j]
        else:
            for j in range(16):
                lanes[j] += (<const float*>vector.data)[16 * i + j]
    for i in range(n // 16 * 16, n):
        lanes[i % 16] += vector_item(vector, i)
    n = 8
    while n > 0:
        for j in range(n):
            lanes[j] += lanes[j + n]
        n //= 2
    return lanes[0]


# What a piece of the targets adds up to.
cdef struct TargetCount:
    int64_t n_bad      # classes that do not exist
    double weight      # sum of a_i w_y over kept rows


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
        count.weight = 0
        for i in range(start, stop):
            if target[i] != ignore_index:
                count.weight += vector_item(sample_weight, i) * vector_item(weight, target[i])
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
