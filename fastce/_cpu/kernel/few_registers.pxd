"""The kernel of up to 16 classes in registers: class indices without options, a vector of rows at a time.

Design
------
1. All classes of a vector of rows are in registers at once, and the number of classes is a constant: see
   `simd/few_registers.h`.
2. Rows whose classes lie side by side, and rows that lie side by side, are read and written where they are. Anything
   else goes through scratch memory, as planes. The arithmetic is the same function.
3. Where whole rows can, groups begin with a cache line, for what lies across two takes twice as long.
"""
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy

from fastce._cpu.kernel.blocks cimport BY_LINES
from fastce._cpu.kernel.columns cimport column_block
from fastce._cpu.kernel.few_rows cimport GAP, load_rows, rows_to_line, run_length, store_rows
from fastce._cpu.kernel.few_scalars cimport sum_losses
from fastce._cpu.kernel.spec cimport KernelSpec, align, make_spec
from fastce._cpu.lanes cimport TILE
from fastce._cpu.layout.convert cimport NATIVE
from fastce._cpu.math cimport real
from fastce._cpu.task cimport Matrix, Task, row_offset, vector_item

cdef extern from "simd/few_registers.h" nogil:
    const int MOST_IN_REGISTERS "FASTCE_MOST_IN_REGISTERS"
    # What is done to n rows. A pitch is the distance of a row's classes, in numbers, where the rows lie side by side; 0
    # where the classes do, and the rows follow each other.
    ctypedef struct FewTask "fastce_few_task":
        const void* x
        void* out              # may be x; NULL: no gradient is asked for
        Py_ssize_t x_pitch
        Py_ssize_t out_pitch
        const int64_t* target
        const void* upstream   # a factor for each row's gradient, or NULL
        void* loss
        double scale
        double factor
        int64_t ignore_index
    void do_few_rows "fastce_do_few_rows"(double like, const FewTask* task, Py_ssize_t n, int n_classes)

cdef enum:
    GROUP = 512         # rows
    WAYS = 8  # of L1 in most processors: so many lines it holds of those that are a multiple of 4 KiB apart
    WAY_BYTES = 4096
    FEWEST_ALIGNED = 1024  # rows that are worth to begin with a cache line


cdef inline bint fits_registers(const Task* task) noexcept nogil:
    """Return True if this kernel can do a task, if it has no options, and is the faster one.

    Of targets of 64 bits some look at the lower half: it tells whether a row is skipped.

    More planes than L1 has ways, a multiple of 4 KiB apart, push each other's lines out of it. 12 still do no harm
    where a vector is a whole line, which is loaded once. `few_classes` makes copies, which took 0.9 (AVX-512) and 0.75
    (AVX2) of the time of 16 floats. A row has the same bits either way.
    """
    cdef int64_t low = <int32_t>task.ignore_index
    cdef Py_ssize_t most = WAYS + WAYS // 2 if BY_LINES else WAYS
    cdef bint is_crowded = task.n_classes > most and task.logits.class_stride % WAY_BYTES == 0
    return 2 <= task.n_classes <= MOST_IN_REGISTERS and not is_crowded and (
        low == task.ignore_index or low < 0 or low >= task.n_classes)


cdef inline Py_ssize_t pitch_of(
    const Task* task, const Matrix* matrix, const char* first, Py_ssize_t n, real like
) noexcept nogil:
    """Return the pitch of n rows from `first` on, or -1 if they do not lie as `FewTask` wants them."""
    cdef Py_ssize_t size = <Py_ssize_t>sizeof(real)
    cdef Py_ssize_t row_stride = matrix.row_strides[task.n_dims - 1]
    if matrix.format != NATIVE or <size_t>first % size != 0:
        return -1
    if row_stride == size and matrix.class_stride % size == 0 and matrix.class_stride != 0:
        return matrix.class_stride // size
    if matrix.class_stride == size and (row_stride == size * task.n_classes or n == 1):
        return 0
    return -1


cdef inline void process_in_registers(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    """Do the rows start .. stop - 1."""
    cdef FewTask few
    cdef real losses[GROUP + TILE]
    cdef real upstream[GROUP]
    cdef real* loss
    cdef real* scratch = <real*>workspace
    cdef Py_ssize_t pitch = GROUP + GAP
    cdef Py_ssize_t i = start, j, n, n_first = 0
    few.scale = task.logit_scale
    few.factor = task.factor * task.logit_scale
    few.ignore_index = task.ignore_index
    if stop - start >= FEWEST_ALIGNED:
        n_first = rows_to_line(task, start)
    while i < stop:
        n = min(stop - i, <Py_ssize_t>GROUP if n_first == 0 else n_first)
        n_first = 0
        loss = losses + i % TILE
        few.target = task.target + i
        few.loss = loss
        few.x = task.logits.data + row_offset(task, &task.logits, i)
        few.x_pitch = few.out_pitch = -1
        few.out = NULL
        if run_length(task, i, n) == n:
            few.x_pitch = pitch_of(task, &task.logits, <const char*>few.x, n, like)
            if task.out.data != NULL:
                few.out = task.out.data + row_offset(task, &task.out, i)
                few.out_pitch = pitch_of(task, &task.out, <const char*>few.out, n, like)
        if few.x_pitch < 0:
            load_rows(task, i, n, scratch, pitch)
            few.x = scratch
            few.x_pitch = pitch
        few.upstream = NULL
        if task.out.data != NULL and few.out_pitch < 0:
            few.out = scratch
            few.out_pitch = pitch
        if task.grad_output.data != NULL:
            for j in range(n):
                upstream[j] = <real>vector_item(&task.grad_output, i + j)
            few.upstream = upstream
        do_few_rows(like, &few, n, <int>task.n_classes)
        if task.out.data != NULL and few.out == scratch:
            store_rows(task, i, n, scratch, pitch)
        if task.loss != NULL:
            memcpy(<real*>task.loss + i, loss, n * sizeof(real))
        sum_losses(task, i, n, i + n == stop, losses)
        i += n


cdef inline void do_in_registers(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    if task.is_float:
        process_in_registers(task, start, stop, workspace, <float>0)
    else:
        process_in_registers(task, start, stop, workspace, <double>0)


cdef inline KernelSpec plan_in_registers(Task* task, real like) noexcept nogil:
    cdef Py_ssize_t workspace = align(task.n_classes * (GROUP + GAP) * <Py_ssize_t>sizeof(real))
    task.block = column_block(like)
    return make_spec(do_in_registers, TILE, TILE, workspace)
