"""Curvature kernel: products with the Hessian, or the gradient and a diagonal of curvature, in one sweep.

Design
------
1. What it works on are *units* (see `units`): a row whose classes fill the vector, or 16 rows side by side. The sums
   of exponentials are those of the row and the column kernel; the other loops do both, with factors of 16 lanes.
2. A unit goes through three passes while it is in cache: the maximum; exponentials, which wait in the workspace, and
   sums (both in `curvature_sums`); the results (`curvature_writes`).
3. With d = scale (f(x) - row_max), e = exp(d), s the sum of e and w = f'(x) v, the Hessian of a row is
   K (diag(p) - p p^T) + 2 z p p^T between two slopes, plus f'' times the gradient, and its product with v is

       slope e_k (first (w_k - w_at_max) + other) + bend_k grad_k v_k.

   w_at_max is that of the largest logit. Differences from the mean <p, w> would cancel in rows the model is sure of;
   those from w_at_max do not, and the mean's own distance from w_at_max is a sum over the other classes, the moment.
4. The diagonal has p (1 - p) = e / s (1 - e / s), where 1 - e / s is formed from the sum of the others for the largest
   term, and is at least 1/2 for others.
5. Gradient and scalars are those of the other kernels, `begin` and `finish`, which here leaves out the losses.
"""
from fastce._cpu.kernel.curvature_sums cimport Moments, sweep_unit
from fastce._cpu.kernel.curvature_writes cimport Factors, find_factors, write_unit
from fastce._cpu.kernel.rows cimport row_block
from fastce._cpu.kernel.scalars cimport (
    Scalars, begin, cap_patch_logits, describe_argmax_patches, finish, needs_gradient, read_patch_logits
)
from fastce._cpu.kernel.spec cimport KernelSpec, align, make_spec
from fastce._cpu.kernel.units cimport (
    Unit, load_all_groups, locate_unit, plan_units, store_all_groups, store_unit, units_bytes
)
from fastce._cpu.lanes cimport LANES, fill
from fastce._cpu.math cimport real
from fastce._cpu.task cimport Task


cdef inline void process_units(
    const Task* task, Py_ssize_t start, Py_ssize_t n, Py_ssize_t u, real* arrays
) noexcept nogil:
    """Do n <= 16 rows: so many units, or the u-th, which is in the workspace already."""
    cdef real like = arrays[0]
    cdef Scalars rows
    cdef Moments moments
    cdef Factors factors
    cdef Unit units[LANES]
    cdef bint by_rows = task.by_rows
    cdef Py_ssize_t i, n_units = n if by_rows else 1
    begin(task, &rows, start, n, like)
    fill(moments.w_at_max, 0, LANES, <double>0)
    fill(moments.moment, 0, LANES, <double>0)
    fill(moments.unscale, 0, LANES, <double>1)
    moments.is_scaled = False
    if by_rows and task.target != NULL and needs_gradient(task):
        read_patch_logits(task, &rows, like)
        cap_patch_logits(task, &rows, like)
    for i in range(n_units):
        locate_unit(task, start + i, u + i, arrays, &units[i])
        if not by_rows or rows.kept[i] != 0:
            sweep_unit(task, &units[i], i, &rows, &moments, like)
    if task.needs_argmax_patch:
        for i in range(n):
            rows.patch_class[i] = -1 if rows.kept[i] == 0 else rows.argmax[i]
        describe_argmax_patches(task, &rows, like)
    finish(task, &rows, like)
    find_factors(task, &rows, &moments, &factors, like)
    for i in range(n_units):
        write_unit(task, &units[i], i, &rows, &moments, &factors, like)
        if by_rows:
            store_unit(task, &units[i], start + i, like)


cdef inline void process_curvature(
    const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace, real like
) noexcept nogil:
    """Do the rows start .. stop - 1."""
    cdef real* arrays = <real*>workspace
    cdef Py_ssize_t i = start, k, n
    cdef Py_ssize_t step = task.unit_rows
    while i < stop:
        n = min(stop - i, step)
        if not task.by_rows:
            load_all_groups(task, i, n, arrays)
        k = 0
        while k < n:
            process_units(task, i + k, min(n - k, <Py_ssize_t>LANES), k // LANES, arrays)
            k += LANES
        if not task.by_rows:
            store_all_groups(task, i, n, arrays)
        i += step


cdef inline void do_curvature(const Task* task, Py_ssize_t start, Py_ssize_t stop, char* workspace) noexcept nogil:
    if task.is_float:
        process_curvature(task, start, stop, workspace, <float>0)
    else:
        process_curvature(task, start, stop, workspace, <double>0)


cdef inline KernelSpec plan_curvature(Task* task, bint by_rows, real like) noexcept nogil:
    task.by_rows = by_rows
    task.block = row_block(task, like)
    plan_units(task, like)
    return make_spec(
        do_curvature, task.unit_rows, min(task.unit_rows, <Py_ssize_t>LANES), align(units_bytes(task, like)))
