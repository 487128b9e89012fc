"""The kernels as functions of one type, and the one that hands a task to the kernel for it.

Each is one C function of its own, called through a pointer, for two reasons. Copies of inlined code may be contracted
to FMA differently, and a result would depend on which of them computed it. And GCC keeps fewer constants in registers
in larger functions: row and column kernel in one cost a tenth of the speed of both.
"""
from fastce._cpu._columns cimport STAGE_BYTES, column_group, process_columns
from fastce._cpu._curvature cimport process_curvature
from fastce._cpu._dispatch cimport (
    COLUMNS, CURVATURE, ROWS, Kernel, align, choose_kernel, goes_by_rows, workspace_bytes
)
from fastce._cpu._math cimport real
from fastce._cpu._plain_columns cimport process_plain
from fastce._cpu._platform cimport own_function
from fastce._cpu._rows cimport process_rows, row_group, scratch_bytes
from fastce._cpu._staged cimport choose_stage, needs_stage, row_bytes, staged_group, store_columns, task_on_stage
from fastce._cpu._task cimport Task, choose_scale, choose_sums
from fastce._cpu._team cimport process_all, process_t


cdef inline void process_by_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    cdef Py_ssize_t i = start
    cdef Py_ssize_t step = row_group(task, like)
    while i < stop:
        process_rows(task, i, min(stop - i, step), <real*>workspace, <double*>(workspace + scratch_bytes(task, like)))
        i += step


cdef inline void process_by_columns(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    cdef Py_ssize_t i = start
    cdef Py_ssize_t step = column_group(task, like)
    while i < stop:
        process_columns(task, i, min(stop - i, step), <real*>workspace, <double*>(workspace + STAGE_BYTES))
        i += step


cdef inline void rows_float(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    """Do the rows start .. stop - 1."""
    process_by_rows(task, start, stop, workspace, <float>0)


cdef inline void rows_double(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    process_by_rows(task, start, stop, workspace, <double>0)


cdef inline void process_staged_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, process_t process, real like
) noexcept nogil:
    cdef Task staged = task_on_stage(task, like)
    cdef Py_ssize_t i = start, n
    cdef Py_ssize_t step = staged_group(task, row_group(task, like), like)
    cdef char* stage = workspace + workspace_bytes(task, ROWS, like) - align(step * row_bytes(task, like))
    while i < stop:
        n = min(step, stop - i)
        choose_stage(&staged, i, n, stage, like)
        (<process_t>own_function(<void*>process))(&staged, i, i + n, workspace)
        if staged.stages_out and not staged.stores_rows:
            store_columns(&staged, i, n, like)
        i += step


cdef inline void staged_rows_float(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    process_staged_rows(task, start, stop, workspace, rows_float, <float>0)


cdef inline void staged_rows_double(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace
) noexcept nogil:
    process_staged_rows(task, start, stop, workspace, rows_double, <double>0)


cdef inline void columns_float(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    process_by_columns(task, start, stop, workspace, <float>0)


cdef inline void columns_double(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    process_by_columns(task, start, stop, workspace, <double>0)


cdef inline void plain_columns_float(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace
) noexcept nogil:
    process_plain(task, start, stop, workspace, <float>0)


cdef inline void plain_columns_double(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace
) noexcept nogil:
    process_plain(task, start, stop, workspace, <double>0)


cdef inline void curvature_float(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    process_curvature(task, start, stop, workspace, <float>0)


cdef inline void curvature_double(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    process_curvature(task, start, stop, workspace, <double>0)


cdef inline process_t kernel_of_doubles(const Task* task, Kernel kernel) noexcept:
    if kernel == ROWS:
        return staged_rows_double if needs_stage(task, <double>0) else rows_double
    if kernel == CURVATURE:
        return curvature_double
    return columns_double if kernel == COLUMNS else plain_columns_double


cdef inline process_t kernel_of_floats(const Task* task, Kernel kernel) noexcept:
    if kernel == ROWS:
        return staged_rows_float if needs_stage(task, <float>0) else rows_float
    if kernel == CURVATURE:
        return curvature_float
    return columns_float if kernel == COLUMNS else plain_columns_float


cdef inline double process_task(Task* task, int itemsize, int n_threads) except? -1:
    """Run the kernel for a task; return the sum of the losses."""
    cdef Kernel kernel
    if itemsize == 8:
        choose_scale(task, <double>0)
    else:
        choose_scale(task, <float>0)
    choose_sums(task)
    kernel = choose_kernel(task, itemsize)
    if kernel == CURVATURE:
        task.by_rows = goes_by_rows(task, itemsize)
    if itemsize == 8:
        return process_all(task, kernel_of_doubles(task, kernel), kernel, n_threads, <double>0)
    return process_all(task, kernel_of_floats(task, kernel), kernel, n_threads, <float>0)
