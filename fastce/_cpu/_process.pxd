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
from fastce._cpu._halves cimport choose_stage, row_bytes, task_on_stage
from fastce._cpu._math cimport real
from fastce._cpu._plain_columns cimport process_plain
from fastce._cpu._platform cimport own_function
from fastce._cpu._rows cimport block_bytes, process_rows, row_group
from fastce._cpu._task cimport Task
from fastce._cpu._team cimport process_all, process_t


cdef inline void process_by_rows(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    cdef Py_ssize_t i = start
    cdef Py_ssize_t step = row_group(task, like)
    while i < stop:
        process_rows(task, i, min(stop - i, step), <real*>workspace, <double*>(workspace + block_bytes(task, like)))
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


cdef inline void rows_16_bit(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    cdef Task staged = task_on_stage(task)
    cdef process_t process = rows_float
    cdef Py_ssize_t i = start
    cdef Py_ssize_t step = row_group(task, <float>0)
    cdef char* stage = workspace + workspace_bytes(task, ROWS, <float>0) - align(step * row_bytes(task))
    while i < stop:
        choose_stage(&staged, i, stage)
        (<process_t>own_function(<void*>process))(&staged, i, min(i + step, stop), workspace)
        i += step


cdef inline void rows_double(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    process_by_rows(task, start, stop, workspace, <double>0)


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


cdef inline process_t kernel_of_doubles(Kernel kernel) noexcept:
    if kernel == ROWS:
        return rows_double
    if kernel == CURVATURE:
        return curvature_double
    return columns_double if kernel == COLUMNS else plain_columns_double


cdef inline process_t kernel_of_floats(Kernel kernel, int itemsize) noexcept:
    if kernel == ROWS:
        return rows_16_bit if itemsize == 2 else rows_float
    if kernel == CURVATURE:
        return curvature_float
    return columns_float if kernel == COLUMNS else plain_columns_float


cdef inline double process_task(Task* task, int itemsize, int n_threads) except? -1:
    """Run the kernel for a task; return the sum of the losses."""
    cdef Kernel kernel = choose_kernel(task, itemsize)
    if kernel == CURVATURE:
        task.by_rows = goes_by_rows(task, itemsize)
    if itemsize == 8:
        return process_all(task, kernel_of_doubles(kernel), kernel, n_threads, <double>0)
    return process_all(task, kernel_of_floats(kernel, itemsize), kernel, n_threads, <float>0)
