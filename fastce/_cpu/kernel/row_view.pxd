"""Where the row kernel finds the operands of a row, block by block."""
from fastce._cpu.layout.convert cimport NATIVE, Format, is_array
from fastce._cpu.layout.copied_rows cimport load_block
from fastce._cpu.math cimport real
from fastce._cpu.prefetch cimport CACHE_LINE
from fastce._cpu.task cimport LEAST_BLOCK, Matrix, Task, block_size, row_offset


# Where the operands of a row start, NULL if absent, and one of its blocks.
cdef struct RowView:
    const char* given    # the logits as the caller has them
    char* logits         # of the arithmetic's type: there, or a copy
    const char* prob
    char* out
    Py_ssize_t start     # the block's first class
    Py_ssize_t n         # how many it has
    const void* x        # their logits
    Format format        # of these numbers
    double block_max
    void* capped         # scratch memory for the block under a softcap


cdef inline const Task* given_by_caller(const Task* task) noexcept nogil:
    """Return the task as the caller gave it, without copies."""
    return task if task.source == NULL else task.source


cdef inline char* start_of_row(const Task* task, const Matrix* matrix, Py_ssize_t i) noexcept nogil:
    return NULL if matrix.data == NULL else matrix.data + row_offset(task, matrix, i)


cdef inline RowView locate_row(const Task* task, Py_ssize_t i) noexcept nogil:
    cdef const Task* given = given_by_caller(task)
    cdef RowView row
    row.given = start_of_row(given, &given.logits, i)
    row.logits = start_of_row(task, &task.logits, i)
    row.prob = start_of_row(task, &task.prob, i)
    row.out = start_of_row(task, &task.out, i)
    row.start = row.n = 0
    row.x = row.logits
    row.format = NATIVE
    row.block_max = 0
    row.capped = NULL
    return row


cdef inline Py_ssize_t scratch_size(const Task* task) noexcept nogil:
    """Return how many numbers there must be room for where a block is kept, wherever in a cache line it starts."""
    return task.block + LEAST_BLOCK + CACHE_LINE // 4


cdef inline const real* prob_block(
    const Task* task, const char* prob, Py_ssize_t start, real* buffer
) noexcept nogil:
    """Return the class probabilities of a block as an array, converted if need be; NULL without any."""
    cdef Py_ssize_t stride = task.prob.class_stride
    if prob == NULL:
        return NULL
    prob += start * stride
    if task.prob.format == NATIVE and is_array(prob, NATIVE, stride, buffer[0]):
        return <const real*>prob
    load_block(prob, task.prob.format, stride, block_size(task, start), buffer)
    return buffer


cdef inline const real* weight_block(const Task* task, Py_ssize_t start, real like) noexcept nogil:
    if task.weight == NULL:
        return NULL
    return <const real*>task.weight + start
