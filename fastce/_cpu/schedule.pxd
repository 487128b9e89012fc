"""Rows shared among threads, and what is summed over them.

Threads take the rows in chunks and write results of single rows only; whatever is summed over rows is summed here, by
one thread and in a fixed order, so no bit depends on their number.
"""
from cython.parallel cimport prange, threadid
from libc.stdint cimport int64_t
from libc.string cimport memset

from fastce._cpu.kernel.choice cimport choose_kernel
from fastce._cpu.kernel.spec cimport KernelSpec, align, process_t
from fastce._cpu.math cimport real
from fastce._cpu.memory cimport release_workspace, acquire_workspace
from fastce._cpu.platform cimport end_vectors
from fastce._cpu.prefetch cimport CACHE_LINE
from fastce._cpu.reductions cimport TargetCount, count_targets, first_bad, sum_vector
from fastce._cpu.task cimport Task, Vector, block_size, choose_scale, choose_sums, weight_of
from fastce._cpu.teamwork cimport (
    Progress, Thread, begin_chunk, clock_seconds, end_chunk, learn, note_end, this_processor, this_thread
)

cdef enum:
    # A chunk has so many groups of rows that a kernel does together: the first group of each is not fetched ahead.
    # Threads get this many chunks each, or more, unless these were very small: 256 x 1000 took a twentieth longer in
    # eight than in two.
    CHUNK_GROUPS = 16
    CHUNKS_PER_THREAD = 4
    SMALL_CHUNK_NUMBERS = 131072
    # Rows whose targets are looked at as one piece, and the fewest pieces that are worth a thread: 10 microseconds.
    SCAN_ROWS = 16384
    SCAN_PIECES_PER_THREAD = 4


cdef inline void sum_block_weights(Task* task, double* sums, real like) noexcept nogil:
    """Write what merging needs under label smoothing: the weight of all classes before each block, and of all."""
    cdef Py_ssize_t b = 0, k = 0, c, n
    cdef double total = 0
    task.block_weights = sums
    if not task.sum_weight:
        return
    while k < task.n_classes:
        sums[b] = total
        n = block_size(task, k)
        if task.weight == NULL:
            total += n
        else:
            for c in range(k, k + n):
                total += weight_of(task, c, like)
                task.has_zero_weight |= weight_of(task, c, like) == 0
        b += 1
        k += n
    sums[b] = total


cdef inline double process_all(Task* task, int n_threads, real like) except? -1:
    """Run the kernel for a task; return the sum of the losses."""
    task.is_float = sizeof(real) == sizeof(float)
    choose_scale(task, like)
    choose_sums(task)
    cdef KernelSpec kernel = choose_kernel(task, like)
    cdef process_t do_rows = kernel.process
    cdef Py_ssize_t size = kernel.workspace
    cdef Py_ssize_t shared = align((task.n_classes // task.block + 2) * <Py_ssize_t>sizeof(double))
    cdef Py_ssize_t step = max(CHUNK_GROUPS * kernel.group, kernel.chunk_numbers // task.n_classes)
    cdef Py_ssize_t n_asked = min(<Py_ssize_t>n_threads, task.n_rows)
    cdef Py_ssize_t small_step = min((task.n_rows + n_asked - 1) // n_asked, SMALL_CHUNK_NUMBERS // task.n_classes)
    cdef Py_ssize_t n_chunks, n_parts, c
    cdef Vector parts
    cdef double total_loss, start
    cdef Progress* progress
    cdef int processor
    cdef Thread caller
    cdef char* memory
    cdef char* workspace
    step = max(1, min(step, max(small_step, task.n_rows // (CHUNKS_PER_THREAD * n_asked))))
    step = (step + kernel.share - 1) // kernel.share * kernel.share
    n_chunks = (task.n_rows + step - 1) // step
    n_threads = <int>min(n_asked, n_chunks)
    task.part_rows = kernel.part_rows
    n_parts = (task.n_rows + task.part_rows - 1) // task.part_rows
    memory = acquire_workspace(
        CACHE_LINE + align(n_parts * <Py_ssize_t>sizeof(double)) + shared + n_threads * (size + CACHE_LINE))
    workspace = <char*>align(<Py_ssize_t>memory)
    task.loss_parts = <double*>workspace
    memset(workspace, 0, n_parts * sizeof(double))
    workspace += align(n_parts * <Py_ssize_t>sizeof(double))
    sum_block_weights(task, <double*>workspace, like)
    workspace += shared
    if n_threads == 1:
        with nogil:
            do_rows(task, 0, task.n_rows, workspace)
        note_end(task.n_rows * task.n_classes)
    else:
        progress = <Progress*>(workspace + n_threads * size)
        memset(progress, 0, n_threads * CACHE_LINE)
        processor = this_processor()
        caller = this_thread()
        start = clock_seconds()
        # dynamic: rows that are skipped cost nothing, so chunks differ; and what a thread that comes late has not done,
        # the others have
        for c in prange(n_chunks, nogil=True, num_threads=n_threads, schedule="dynamic"):
            begin_chunk(progress, threadid(), start, processor, caller)
            do_rows(task, c * step, min((c + 1) * step, task.n_rows), workspace + threadid() * size)
            end_vectors()
            end_chunk(progress, threadid())
        learn(start, progress, n_chunks, n_threads)
    parts.data = <const char*>task.loss_parts
    parts.is_double = True
    total_loss = sum_vector(&parts, n_parts)
    release_workspace(memory)
    end_vectors()
    return total_loss


cdef inline double process_task(Task* task, int itemsize, int n_threads) except? -1:
    """Run the kernel for a task whose logits have this size; return the sum of the losses."""
    if itemsize == 8:
        return process_all(task, n_threads, <double>0)
    return process_all(task, n_threads, <float>0)


cdef inline Py_ssize_t scan_targets(
    const int64_t* target, Py_ssize_t n_rows, int64_t ignore_index, int64_t n_classes, const Vector* weight,
    const Vector* sample_weight, int n_threads, double* normalizer
) except -2:
    """Return the first row with an invalid target, or -1; write the sum of a_i w_y over kept rows."""
    cdef Py_ssize_t c, n_pieces = (n_rows + SCAN_ROWS - 1) // SCAN_ROWS
    cdef TargetCount* counts = <TargetCount*>acquire_workspace(n_pieces * <Py_ssize_t>sizeof(TargetCount))
    cdef int64_t n_bad = 0
    n_threads = <int>min(n_threads, n_pieces // SCAN_PIECES_PER_THREAD)
    if n_threads <= 1:
        with nogil:
            for c in range(n_pieces):
                counts[c] = count_targets(
                    target, c * SCAN_ROWS, min((c + 1) * SCAN_ROWS, n_rows), ignore_index, n_classes, weight,
                    sample_weight)
    else:
        for c in prange(n_pieces, nogil=True, num_threads=n_threads, schedule="static"):
            counts[c] = count_targets(
                target, c * SCAN_ROWS, min((c + 1) * SCAN_ROWS, n_rows), ignore_index, n_classes, weight,
                sample_weight)
    normalizer[0] = 0
    for c in range(n_pieces):
        normalizer[0] += counts[c].weight
        n_bad += counts[c].n_bad
    release_workspace(<char*>counts)
    return -1 if n_bad == 0 else first_bad(target, n_rows, ignore_index, n_classes)
