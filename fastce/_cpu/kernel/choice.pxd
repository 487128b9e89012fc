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
    # Rows with contiguous classes are faster in a column kernel, a vector of them at a time, while what a row costs
    # besides its classes weighs more than transposition. Of the row kernel's time with AVX-512 and AVX2 took, without
    # options, 127 floats 0.84 and 0.98, 160 floats 1.02 and 1.12, 64 doubles 0.88 and 0.98, 80 doubles 1.03 and 1.06.
    COLUMN_BYTES = 512
    # The same where several sums or second derivatives are asked for: 200 floats took 0.83 and 0.93 with smoothing,
    # 0.88 and 0.91 with statistics, 0.79 and 0.86 for Hessian products; 256 floats 0.95 and 1.10. Under class
    # probabilities, which are transposed as well, it was 1.08 and 1.15.
    COLUMN_BYTES_OF_SUMS = 896


cdef inline bint goes_by_rows(const Task* task, real like) noexcept nogil:
    """Return True if the row kernel is to do a task: choose between rows and columns.

    By classes, whether they lie side by side, the type and the options alone: a row must have the same bits in every
    batch. Classes two numbers apart would be faster by rows, but so lie those of two rows in Fortran order.
    """
    cdef bint has_sums = is_curvature(task) or (task.has_option_sums and not task.sum_prob)
    cdef Py_ssize_t most = COLUMN_BYTES_OF_SUMS if has_sums else COLUMN_BYTES
    return (
        task.n_classes * <Py_ssize_t>sizeof(real) >= most
        and magnitude(task.logits.class_stride) == size_of(task.logits.format, like))


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
