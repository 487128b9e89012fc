"""Curvature kernel: products with the Hessian, or the gradient and a diagonal of curvature, in one sweep.

Design
------
1. What it works on are *units* of whole tiles (see `_tiles`): a row whose classes fill the vector, or 16 rows side by
   side, class after class. The same loops do both; in a unit of one row all lanes have the same factors.
2. A unit goes through three passes while it is in cache: the maximum; exponentials, which wait in the workspace, and
   sums; the results. An operand that is an ordinary row is read where it is, but for its last, short tile. Whatever
   else there is, 16 bits, strides, several rows, is staged in the workspace first and comes back from there.
3. With d = scale (f(x) - top), e = exp(d), s = 1 + rest and w = f'(x) v, the Hessian of a row is K (diag(p) - p p^T) +
   2 z p p^T between two slopes, plus f'' times the gradient, and its product with v is

       slope e_k (first (w_k - w_top) + second) + bend_k grad_k v_k.

   w_top is that of the largest logit, found with the maximum. Differences from the mean <p, w> would cancel in rows the
   model is sure of; those from w_top do not, and the mean's own distance from w_top is a sum over the other classes.
4. The diagonal has p (1 - p) = e (s - e) / s^2, where s - e is `rest` for the largest term and at least 1 for others.
5. Gradient and scalars are those of the other kernels, `begin` and `finish`, which here leaves out the losses.
"""
from fastce._cpu._columns cimport note_patch_logits
from fastce._cpu._curvature_sweep cimport Moments, sweep_unit
from fastce._cpu._curvature_writes cimport Factors, clear_unit, find_factors, write_unit
from fastce._cpu._math cimport real
from fastce._cpu._scalars cimport (
    Scalars, begin, describe_argmax_patches, finish, needs_gradient, read_patch_logits
)
from fastce._cpu._task cimport Task
from fastce._cpu._tiles cimport LANES, NO_CLASS, fill
from fastce._cpu._units cimport (
    RowGroup, cap_row, find_slopes, load_all_groups, load_unit, locate_unit, store_all_groups, store_unit
)


cdef inline void process_units(
    const Task* task, Py_ssize_t start, Py_ssize_t n, Py_ssize_t u, real* arrays
) noexcept nogil:
    """Do n <= 16 rows: so many units, or the u-th, which is in the workspace already."""
    cdef real like = arrays[0]
    cdef Scalars rows
    cdef Moments moments
    cdef Factors factors
    cdef RowGroup units[LANES]
    cdef bint by_rows = task.by_rows
    cdef Py_ssize_t i, n_units = n if by_rows else 1
    begin(task, &rows, start, n, like)
    fill(moments.w_at_max, 0, LANES, <double>0)
    fill(moments.moment, 0, LANES, <double>0)
    fill(moments.unscale, 0, LANES, <double>1)
    if by_rows and task.target != NULL and needs_gradient(task):
        read_patch_logits(task, &rows, like)
    for i in range(n_units):
        locate_unit(task, start + i, u + i, arrays, &units[i])
        if by_rows and rows.kept[i] == 0:
            continue
        if by_rows:
            load_unit(task, &units[i], like)
        if task.softcap != 0:
            find_slopes(task, &units[i], like)
        if not by_rows and needs_gradient(task):
            note_patch_logits(task, &rows, 0, task.n_classes, <real*>units[i].x.stage)
        elif task.softcap != 0:
            cap_row(task, &units[i], like)
        sweep_unit(task, &units[i], i, &rows, &moments, like)
    if task.needs_argmax_patch:
        for i in range(n):
            rows.patch_class[i] = -1 if rows.kept[i] == 0 or rows.argmax[i] == NO_CLASS else rows.argmax[i]
        describe_argmax_patches(task, &rows, like)
    finish(task, &rows, like)
    find_factors(task, &rows, &moments, &factors, like)
    for i in range(n_units):
        if by_rows and rows.kept[i] == 0:
            clear_unit(task, &units[i], like)
        else:
            write_unit(task, &units[i], i, &rows, &factors, like)
        if by_rows:
            store_unit(task, &units[i], like)


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
