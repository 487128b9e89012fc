"""The kernel of few classes in copies of 64 rows: more than fit into registers, class indices without options.

Some planes of fewer classes go by it as well, see `few_registers.fits_registers`.

Design
------
1. With few classes the scalars of a row weigh more than its classes. So they are vectors here as well, of the logits'
   own type: float64 would double their cost and, without options, none of them needs it.
2. 64 rows are a few independent vectors, whatever the instruction set. Maxima and exponentials are separate passes over
   all of them, so that the latency of one vector hides behind the others. The loops are those of `simd/few.h`.
3. Exponentials are relative to the largest logit, but their sum leaves out the target: -(1 - p) of the target is that
   sum over the whole, without cancellation, and the loss has what it needs in it as well. One sum does where `columns`
   needs two, for a comparison with the class is all that it takes.
4. Groups of rows begin with a cache line where planes allow it: a store across two lines costs twice.
5. Fewer rows are filled up to 64, so that the bits of a row do not depend on how many others there are; what costs
   most is done by 16 rows, as far as there are any. Whatever has options goes through `columns`, in float64.
"""
from libc.math cimport INFINITY
from libc.stdint cimport int32_t
from libc.string cimport memcpy

from fastce._cpu.kernel.columns cimport column_block
from fastce._cpu.kernel.few_blocks cimport (
    Prefetcher, exp_and_sum, fetch_piece, find_maxima_and_targets, finish_rows, scale_and_patch,
    shift_and_scale
)
from fastce._cpu.kernel.few_scalars cimport read_targets, sum_losses
from fastce._cpu.kernel.few_rows cimport (
    GAP, begin_prefetch, load_rows, plan_prefetch, rows_to_line, run_length, store_rows
)
from fastce._cpu.lanes cimport LANES, TILE, fill
from fastce._cpu.kernel.spec cimport CHUNK_NUMBERS, KernelSpec, make_spec
from fastce._cpu.layout.convert cimport NATIVE, is_array, size_of
from fastce._cpu.math cimport real
from fastce._cpu.task cimport Matrix, Task, row_offset, vector_item


cdef enum:
    PITCH = TILE + GAP   # numbers from class to class of a copy
    # Of a copy, which must fit into any L2 cache. All copies begin so far apart, also those of different threads: next
    # to each other they took 1.1 times as long with two threads.
    MOST_BYTES = 163840


cdef inline Py_ssize_t tile_bytes(const Task* task, real like) noexcept nogil:
    return task.n_classes * PITCH * <Py_ssize_t>sizeof(real)


cdef inline bint are_planes(const Task* task, real like) noexcept nogil:
    """Return True if the results of rows lie side by side."""
    cdef const Matrix* matrix = &task.logits if task.out.data == NULL else &task.out
    return matrix.row_strides[task.n_dims - 1] == size_of(matrix.format, like)


cdef inline void multiply_rows(
    real* x, Py_ssize_t pitch, Py_ssize_t n, Py_ssize_t n_classes, const real* factor
) noexcept nogil:
    """Multiply each of n rows by its factor."""
    cdef Py_ssize_t j, k
    for k in range(n_classes):
        for j in range(n):
            x[k * pitch + j] *= factor[j]


cdef inline void find_gradients(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, Prefetcher* prefetcher, int32_t* y, real* loss,
    real* alpha, real* grad_patch
) noexcept nogil:
    """Do n <= 64 rows in scratch memory, up to the factors of the gradient; what is there beyond them is finite.

    y is -1 for rows that are skipped, and the factors of rows beyond are 0.
    """
    cdef real row_max[TILE]
    cdef real shift[TILE]
    cdef real x_patch[TILE]
    cdef real terms[TILE]  # times exp_unit
    cdef bint has_skipped = read_targets(task, start, n, y)
    cdef real scale = <real>task.logit_scale
    cdef double factor = task.factor * task.logit_scale
    cdef Py_ssize_t j, k, n_classes = task.n_classes
    cdef int n_filled = <int>((n + LANES - 1) // LANES * LANES)
    cdef bint with_grad = task.out.data != NULL
    if has_skipped:
        # whatever is there, NaN included
        for j in range(n):
            if y[j] < 0:
                for k in range(n_classes):
                    scratch[k * PITCH + j] = 0
    find_maxima_and_targets(scratch, PITCH, n_classes, y, row_max, x_patch)
    for j in range(TILE):
        shift[j] = <real>0 if row_max[j] == -INFINITY else row_max[j]
    if scale != 1:
        shift_and_scale(scratch, PITCH, n_classes, scale, shift)
    exp_and_sum(scratch, PITCH, n_filled, n_classes, shift, y, terms, prefetcher)
    finish_rows(n_filled, scale, factor, with_grad, y, has_skipped, row_max, x_patch, terms, loss, alpha, grad_patch)
    if n_filled < TILE:
        fill(alpha, n_filled, TILE, <real>0)
        fill(grad_patch, n_filled, TILE, <real>0)


cdef inline void write_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, real* alpha, const int32_t* y,
    const real* grad_patch
) noexcept nogil:
    """Write the gradients of n <= 64 rows in scratch memory."""
    cdef const Matrix* out = &task.out
    cdef char* first = out.data + row_offset(task, out, start)
    cdef Py_ssize_t j
    if (n == TILE and run_length(task, start, n) == n and task.grad_output.data == NULL
            and out.format == NATIVE and is_array(first, NATIVE, out.row_strides[task.n_dims - 1], scratch[0])
            and out.class_stride % <Py_ssize_t>sizeof(real) == 0):
        # Where the rows lie side by side, nothing has to be stored twice.
        scale_and_patch(
            scratch, PITCH, n, task.n_classes, alpha, y, grad_patch, <real*>first,
            out.class_stride // <Py_ssize_t>sizeof(real))
        return
    scale_and_patch(scratch, PITCH, TILE, task.n_classes, alpha, y, grad_patch, scratch, PITCH)
    if task.grad_output.data != NULL:
        # Not before: tiny ones, freed of `exp_unit`, would be no normal numbers.
        for j in range(n):
            alpha[j] = <real>vector_item(&task.grad_output, start + j) if y[j] >= 0 else <real>0
        multiply_rows(scratch, PITCH, n, task.n_classes, alpha)
    store_rows(task, start, n, scratch, PITCH)


cdef inline void process_tile(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, Prefetcher* prefetcher, real* loss
) noexcept nogil:
    """Do n <= 64 rows in scratch memory; write their losses."""
    cdef real alpha[TILE]
    cdef int32_t y[TILE]
    cdef real grad_patch[TILE]
    cdef Py_ssize_t j, k
    for k in range(task.n_classes if n < TILE else 0):
        for j in range(n, TILE):
            scratch[k * PITCH + j] = 0
    find_gradients(task, start, n, scratch, prefetcher, y, loss, alpha, grad_patch)
    if task.loss != NULL:
        memcpy(<real*>task.loss + start, loss, n * sizeof(real))
    if task.out.data != NULL:
        write_rows(task, start, n, scratch, alpha, y, grad_patch)


cdef inline void process_few_classes(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    """Do the rows start .. stop - 1."""
    cdef Prefetcher prefetcher
    cdef real losses[2 * TILE]
    cdef Py_ssize_t i = start, n = 0, after = 0
    cdef real* scratch = <real*>workspace
    cdef real* other = <real*>(workspace + MOST_BYTES)
    if are_planes(task, like):
        after = rows_to_line(task, start)
    after = min(stop - i, <Py_ssize_t>TILE if after == 0 else after)
    prefetcher = begin_prefetch(task, start, like)
    plan_prefetch(&prefetcher, task, i, after, other, PITCH)
    while True:
        if prefetcher.target == NULL:
            load_rows(task, i + n, after, other, PITCH)
        while prefetcher.target != NULL and prefetcher.logits.n_left > 0:
            fetch_piece(&prefetcher, sizeof(real))
        scratch, other = other, scratch
        i += n
        n = after
        if n == 0:
            return
        after = min(stop - i - n, <Py_ssize_t>TILE)
        plan_prefetch(&prefetcher, task, i + n, after, other, PITCH)
        process_tile(task, i, n, scratch, &prefetcher, losses + i % TILE)
        sum_losses(task, i, n, i + n == stop, losses)


cdef inline void do_few_classes(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    if task.is_float:
        process_few_classes(task, start, stop, workspace, <float>0)
    else:
        process_few_classes(task, start, stop, workspace, <double>0)


cdef inline bint fits_few_classes(const Task* task, real like) noexcept nogil:
    """Return True if this kernel can do a task, if it has no options."""
    return tile_bytes(task, like) <= MOST_BYTES


cdef inline KernelSpec plan_few_classes(Task* task, real like) noexcept nogil:
    cdef KernelSpec spec = make_spec(do_few_classes, TILE, TILE, 2 * MOST_BYTES)
    task.block = column_block(like)
    # Of planes the first 128 KiB are not asked for ahead: 21 planes took a tenth longer in small chunks.
    spec.chunk_numbers = 8 * CHUNK_NUMBERS
    return spec
