"""The kernel of few classes, but more than fit into registers: class indices without options, 64 rows at a time.

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
from libc.math cimport INFINITY, fabs
from libc.stdint cimport int32_t
from libc.string cimport memcpy

from fastce._cpu.kernel.columns cimport column_block
from fastce._cpu.kernel.few_blocks cimport (
    Prefetcher, exp_and_sum, fetch_piece, find_maxima_and_targets, finish_rows, scale_and_patch,
    shift_and_scale
)
from fastce._cpu.kernel.few_scalars cimport read_targets, sum_losses
from fastce._cpu.kernel.few_rows cimport (
    GAP, MAX_ROWS, FEW_BYTES, begin_prefetch, load_rows, few_group, plan_prefetch, rows_to_line, run_length,
    store_rows
)
from fastce._cpu.lanes cimport LANES, TILE, fill
from fastce._cpu.kernel.spec cimport CHUNK_NUMBERS, KernelSpec, make_spec
from fastce._cpu.layout.convert cimport NATIVE, is_array
from fastce._cpu.math cimport real
from fastce._cpu.task cimport GRADIENT, Matrix, Task, row_offset, vector_item


cdef inline bint has_no_options(const Task* task) noexcept nogil:
    """Return True if a kernel of few classes can do a call: no options but a scale, no products that overflow."""
    return (
        task.target != NULL and not task.has_option_sums and not task.normalized and task.weight == NULL
        and task.sample_weight.data == NULL and task.z_loss == 0
        and task.logit_scale >= 1 and task.softcap == 0 and task.lse == NULL and task.log_prob == NULL
        and task.out_kind == GRADIENT and 1e-24 < fabs(task.factor * task.logit_scale)
        and fabs(task.factor * task.logit_scale) < 1e30)


cdef inline void multiply_rows(
    real* x, Py_ssize_t pitch, Py_ssize_t n, Py_ssize_t n_classes, const real* factor
) noexcept nogil:
    """Multiply each of n rows by its factor."""
    cdef Py_ssize_t j, k
    for k in range(n_classes):
        for j in range(n):
            x[k * pitch + j] *= factor[j]


cdef inline void process_tile(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, Py_ssize_t pitch, Prefetcher* prefetcher,
    int32_t* y, real* loss,
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
                    scratch[k * pitch + j] = 0
    find_maxima_and_targets(scratch, pitch, n_classes, y, row_max, x_patch)
    for j in range(TILE):
        shift[j] = <real>0 if row_max[j] == -INFINITY else row_max[j]
    if scale != 1:
        shift_and_scale(scratch, pitch, n_classes, scale, shift)
    exp_and_sum(scratch, pitch, n_filled, n_classes, shift, y, terms, prefetcher)
    finish_rows(n_filled, scale, factor, with_grad, y, has_skipped, row_max, x_patch, terms, loss, alpha, grad_patch)
    if n_filled < TILE:
        fill(alpha, n_filled, TILE, <real>0)
        fill(grad_patch, n_filled, TILE, <real>0)


cdef inline void write_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t n, Py_ssize_t filled, real* scratch, Py_ssize_t pitch,
    real* alpha, const int32_t* y, const real* grad_patch
) noexcept nogil:
    """Write the gradients of n rows in scratch memory; so many numbers of each class are `filled`."""
    cdef const Matrix* out = &task.out
    cdef char* first = out.data + row_offset(task, out, start)
    cdef Py_ssize_t j
    if (n == filled and run_length(task, start, n) == n and task.grad_output.data == NULL
            and out.format == NATIVE and is_array(first, NATIVE, out.row_strides[task.n_dims - 1], scratch[0])
            and out.class_stride % <Py_ssize_t>sizeof(real) == 0):
        # Where the rows lie side by side, nothing has to be stored twice.
        scale_and_patch(
            scratch, pitch, n, task.n_classes, alpha, y, grad_patch, <real*>first,
            out.class_stride // <Py_ssize_t>sizeof(real))
        return
    scale_and_patch(scratch, pitch, filled, task.n_classes, alpha, y, grad_patch, scratch, pitch)
    if task.grad_output.data != NULL:
        # Not before: tiny ones, freed of `exp_unit`, would be no normal numbers.
        for j in range(n):
            alpha[j] = <real>vector_item(&task.grad_output, start + j) if y[j] >= 0 else <real>0
        multiply_rows(scratch, pitch, n, task.n_classes, alpha)
    store_rows(task, start, n, scratch, pitch)


cdef inline void process_group(
    const Task* task, Py_ssize_t start, Py_ssize_t n, real* scratch, Py_ssize_t pitch, Prefetcher* prefetcher,
    real* loss
) noexcept nogil:
    """Do n rows in scratch memory; write their losses."""
    cdef real alpha[MAX_ROWS]
    cdef int32_t y[MAX_ROWS]
    cdef real grad_patch[MAX_ROWS]
    cdef Py_ssize_t i, j, k, filled = (n + TILE - 1) // TILE * TILE
    for k in range(task.n_classes if n < filled else 0):
        for j in range(n, filled):
            scratch[k * pitch + j] = 0
    i = 0
    while i < n:
        process_tile(
            task, start + i, min(n - i, <Py_ssize_t>TILE), scratch + i, pitch, prefetcher, y + i, loss + i, alpha + i,
            grad_patch + i)
        i += TILE
    if task.loss != NULL:
        memcpy(<real*>task.loss + start, loss, n * sizeof(real))
    if task.out.data != NULL:
        write_rows(task, start, n, filled, scratch, pitch, alpha, y, grad_patch)


cdef inline void process_few_classes(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    """Do the rows start .. stop - 1."""
    cdef Prefetcher prefetcher
    cdef real losses[MAX_ROWS + TILE]
    cdef Py_ssize_t i = start, n, after, group = few_group(task, like)
    cdef Py_ssize_t pitch = group + GAP
    cdef real* scratch = <real*>workspace
    cdef real* other = <real*>(workspace + FEW_BYTES)
    n = 0
    after = min(stop - i, rows_to_line(task, start, group, like))
    prefetcher = begin_prefetch(task, start, group, like)
    plan_prefetch(&prefetcher, task, i, after, other, pitch)
    while True:
        if prefetcher.target == NULL:
            load_rows(task, i + n, after, other, pitch)
        while prefetcher.target != NULL and prefetcher.logits.n_left > 0:
            fetch_piece(&prefetcher, sizeof(real))
        scratch, other = other, scratch
        i += n
        n = after
        if n == 0:
            return
        after = min(stop - i - n, group)
        plan_prefetch(&prefetcher, task, i + n, after, other, pitch)
        process_group(task, i, n, scratch, pitch, &prefetcher, losses + i % TILE)
        sum_losses(task, i, n, i + n == stop, losses)


cdef inline void do_few_classes(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    if task.is_float:
        process_few_classes(task, start, stop, workspace, <float>0)
    else:
        process_few_classes(task, start, stop, workspace, <double>0)


cdef inline bint fits_few_classes(const Task* task, real like) noexcept nogil:
    """Return True if this kernel can do a task."""
    return has_no_options(task) and few_group(task, like) > 0


cdef inline KernelSpec plan_few_classes(Task* task, real like) noexcept nogil:
    cdef KernelSpec spec = make_spec(do_few_classes, few_group(task, like), TILE, 2 * FEW_BYTES)
    task.block = column_block(like)
    # Of planes the first 128 KiB are not asked for ahead: 21 planes took a tenth longer in small chunks.
    spec.chunk_numbers = 8 * CHUNK_NUMBERS
    return spec
