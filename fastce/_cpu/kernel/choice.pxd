"""Which kernel does a task."""
from libc.math cimport fabs

from fastce._cpu.kernel.columns cimport plan_columns
from fastce._cpu.kernel.curvature cimport plan_curvature
from fastce._cpu.kernel.few_classes cimport fits_few_classes, plan_few_classes
from fastce._cpu.kernel.few_registers cimport fits_registers, plan_in_registers
from fastce._cpu.kernel.rows cimport plan_rows
from fastce._cpu.kernel.spec cimport KernelSpec
from fastce._cpu.layout.convert cimport magnitude, size_of
from fastce._cpu.math cimport real
from fastce._cpu.task cimport GRADIENT, Task, is_curvature

cdef enum:
    # Rows with contiguous classes are faster in a column kernel, 16 of them to a vector, while they do not fill the row
    # kernel's vectors: 100 floats take 0.46 (AVX-512) and 0.86 (AVX2) of the row kernel's time, with options 0.67 and
    # 0.93; 128 take 0.78 and 1.39, with options 1.10 and 1.45. Doubles: 0.77 and 0.75, then 1.16 and 1.14.
    FEW_CLASSES = 127


cdef inline bint goes_by_rows(const Task* task, Py_ssize_t itemsize) noexcept nogil:
    """Return True if the row kernel is to do a task: choose between rows and columns.

    By classes, whether they lie side by side, and the type alone: a row must have the same bits in every batch. Classes
    two numbers apart would be faster by rows, but so lie those of two rows in Fortran order.
    """
    return task.n_classes > FEW_CLASSES and magnitude(task.logits.class_stride) == itemsize


cdef inline bint has_no_options(const Task* task) noexcept nogil:
    """Return True if the kernels of few classes can do a call: no options but a scale, no products that overflow."""
    return (
        task.target != NULL and not task.has_option_sums and not task.normalized and task.weight == NULL
        and task.sample_weight.data == NULL and task.z_loss == 0
        and task.logit_scale >= 1 and task.softcap == 0 and task.lse == NULL and task.log_prob == NULL
        and task.out_kind == GRADIENT and 1e-24 < fabs(task.factor * task.logit_scale)
        and fabs(task.factor * task.logit_scale) < 1e30)


cdef inline KernelSpec choose_kernel(Task* task, real like) noexcept nogil:
    """Choose the kernel for a task, and plan the task for it."""
    cdef bint by_rows = goes_by_rows(task, size_of(task.logits.format, like))
    if is_curvature(task):
        return plan_curvature(task, by_rows, like)
    if by_rows:
        return plan_rows(task, like)
    if has_no_options(task):
        if fits_registers(task):
            return plan_in_registers(task, like)
        if fits_few_classes(task, like):
            return plan_few_classes(task, like)
    return plan_columns(task, like)
