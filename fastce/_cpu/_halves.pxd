"""Rows of 16-bit logits: a stage of floats, which the row kernel takes for the logits and for the gradient.

Design
------
1. The row kernel gets a copy of the task whose logits and gradient lie in the stage, and whose `source` leads back to
   the caller's. It widens each block on its way into the sweep and rounds each block once it is done, so everything
   between is float's arithmetic, and no option needs code for 16 bits. Only the loop for ordinary rows without such
   options reads numbers of 16 bits itself: widening twice in registers costs less than to store and load them.
2. The stage is as long as the rows that go through the kernel together, 64 KiB, or a longer row. Exponentials waiting
   in 16 bits would lose what the promises keep, and computing them twice would also widen every logit twice.
"""
from fastce._cpu._convert cimport NATIVE
from fastce._cpu._task cimport Task


cdef inline Py_ssize_t row_bytes(const Task* task) noexcept nogil:
    """Return the size of a staged row."""
    return task.n_classes * <Py_ssize_t>sizeof(float)


cdef inline Task task_on_stage(const Task* source) noexcept nogil:
    """Return the same task but for its logits and gradient, which lie in a stage yet to be chosen."""
    cdef Task staged = source[0]
    cdef Py_ssize_t k, stride = row_bytes(source)
    staged.source = source
    staged.logits.format = NATIVE
    staged.logits.class_stride = sizeof(float)
    for k in range(source.n_dims - 1, -1, -1):
        staged.logits.row_strides[k] = stride
        stride *= source.row_shape[k]
    if source.out.data != NULL:
        staged.out = staged.logits
    return staged


cdef inline void choose_stage(Task* staged, Py_ssize_t start, char* stage) noexcept nogil:
    """Put the rows from `start` on at the beginning of `stage`."""
    staged.logits.data = stage - start * row_bytes(staged)
    if staged.out.data != NULL:
        staged.out.data = staged.logits.data
