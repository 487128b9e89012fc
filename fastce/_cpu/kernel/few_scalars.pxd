"""The targets of rows in the kernel of few classes, and the sums of their losses."""
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.string cimport memcpy

from fastce._cpu.kernel.few_blocks cimport any_negative
from fastce._cpu.lanes cimport LANES, TILE, fill, wide_lane_sum
from fastce._cpu.math cimport real
from fastce._cpu.prefetch cimport CACHE_LINE, prefetch
from fastce._cpu.task cimport Task

cdef enum:
    TARGETS_AHEAD = 256  # rows; they come from memory, for nothing has read them for the length of a sweep


cdef inline bint read_targets(const Task* task, Py_ssize_t start, Py_ssize_t n, int32_t* y) noexcept nogil:
    """Write the targets of n rows, and -1 for rows that are skipped or fill up the tile; return True if any is."""
    cdef int64_t last[TILE]
    cdef const int64_t* target = task.target + start
    cdef int64_t ignored = task.ignore_index
    cdef uint32_t n_classes = <uint32_t>task.n_classes
    cdef int32_t k
    cdef int is_kept
    cdef Py_ssize_t j
    for j in range(TILE * <Py_ssize_t>sizeof(int64_t) // CACHE_LINE):
        prefetch(<const char*>(target + TARGETS_AHEAD) + j * CACHE_LINE)
    if n < TILE:
        for j in range(TILE):
            last[j] = ignored
        memcpy(last, target, n * sizeof(int64_t))
        target = last
    # Checked again, for another thread may have written to the targets since: a class is an index from here on. What is
    # checked is the number that is stored.
    for j in range(TILE):
        k = <int32_t>target[j]
        is_kept = <int>(target[j] != ignored) & <int>(<uint32_t>k < n_classes)
        y[j] = k if is_kept else -1
    return any_negative(y)


cdef inline double sum_of_part(const real* loss) noexcept nogil:
    """Return the sum of the losses of 64 rows."""
    cdef double sums[LANES]
    cdef Py_ssize_t j
    for j in range(LANES):
        sums[j] = (<double>loss[j] + loss[j + 16]) + (<double>loss[j + 32] + loss[j + 48])
    return wide_lane_sum(sums)


cdef inline void sum_losses(const Task* task, Py_ssize_t start, Py_ssize_t n, bint is_last, real* loss) noexcept nogil:
    """Sum the losses of rows 0 .. 63, 64 .. 127 and so on, so that no bit depends on where groups of rows begin.

    Those of n rows from `start` on follow in `loss` what the last call left there, start % 64 losses.
    """
    cdef Py_ssize_t i = 0, part = start // TILE
    n += start % TILE
    while i + TILE <= n:
        task.loss_parts[part] = sum_of_part(loss + i)
        part += 1
        i += TILE
    if i > 0:
        memcpy(loss, loss + i, TILE * sizeof(real))
    if is_last and i < n:
        fill(loss, n - i, TILE, <real>0)
        task.loss_parts[part] = sum_of_part(loss)
