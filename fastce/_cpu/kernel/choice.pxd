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
    # Rows with contiguous classes are faster in a kernel that has a vector of rows, while what a row costs besides its
    # classes weighs more than transposition. Times with AVX-512 and AVX2 in units of the row kernel's, without options:
    # 100 floats 0.73 and 0.85, 127 floats 0.84 and 0.98, 160 floats 1.02 and 1.12. Doubles: 64 0.88 and 0.98, 127 1.26
    # and 1.11; but their errors are smaller, for the sum of the others leaves out the target.
    FEW_CLASSES = 127
    # Bytes of a row from which on the row kernel is faster, with options that need no further sums. Times of the column
    # kernel with weights: 100 floats 1.02 and 1.04, 127 floats 1.11 and 1.09, 80 doubles 1.25 and 1.16. With
    # probabilities: 0.74 and 0.81, 0.77 and 0.94, 0.99 and 0.97; 200 floats 1.08 and 1.15.
    ROW_BYTES = 512
    # The same where several sums or second derivatives are asked for. With label smoothing: 200 floats 0.83 and 0.93,
    # 255 floats 0.95 and 1.10. With statistics: 0.88 and 0.91, 0.95 and 0.95. Hessian products: 0.79 and 0.86, 0.86 and
    # 0.91.
    ROW_BYTES_OF_SUMS = 896


cdef inline bint has_no_options(const Task* task) noexcept nogil:
    """Return True if the kernels of few classes can do a call: no options but a scale, no products that overflow."""
    return (
        task.target != NULL and not task.has_option_sums and not task.normalized and task.weight == NULL
        and task.sample_weight.data == NULL and task.z_loss == 0
        and task.logit_scale >= 1 and task.softcap == 0 and task.lse == NULL and task.log_prob == NULL
        and task.out_kind == GRADIENT and 1e-24 < fabs(task.factor * task.logit_scale)
        and fabs(task.factor * task.logit_scale) < 1e30)


cdef inline bint goes_by_rows(const Task* task, real like) noexcept nogil:
    """Return True if the row kernel is to do a task.

    By classes, whether they lie side by side, the type and the options alone: a row must have the same bits in every
    batch. Classes two numbers apart would be faster by rows, but so lie those of two rows in Fortran order. The row
    kernel needs at least `LEAST_BLOCK` classes.
    """
    cdef Py_ssize_t n_bytes = task.n_classes * <Py_ssize_t>sizeof(real)
    if magnitude(task.logits.class_stride) != size_of(task.logits.format, like):
        return False
    if is_curvature(task) or (task.has_option_sums and not task.sum_prob):
        return n_bytes >= ROW_BYTES_OF_SUMS
    return task.n_classes > FEW_CLASSES if has_no_options(task) else n_bytes >= ROW_BYTES


cdef inline KernelSpec choose_kernel(Task* task, real like) noexcept nogil:
    """Choose the kernel for a task, and plan the task for it."""
    cdef bint by_rows = goes_by_rows(task, like)
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
