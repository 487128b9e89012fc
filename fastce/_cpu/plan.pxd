"""From a call that is checked to the task of a kernel.

Design
------
1. The row axes are merged where the strides of all operands allow it: most tasks have one.
2. Weights of classes are in the arithmetic's type, class indices are int64, and both lie one after the other.
"""
from libc.stdint cimport int64_t
from libc.string cimport memset

cimport numpy as cnp

from fastce._cpu.call cimport Call
from fastce._cpu.layout.convert cimport BFLOAT16, DOUBLE, FLOAT, HALF, NATIVE, Format
from fastce._cpu.operand cimport Operand
from fastce._cpu.options cimport Options
from fastce._cpu.reductions cimport first_bad, sum_vector
from fastce._cpu.rule cimport fail
from fastce._cpu.schedule cimport scan_targets
from fastce._cpu.task cimport MAX_DIMS, Matrix, Task, vector_item


# ----- operands with a class axis

cdef inline Format format_of(int type_num, int arithmetic) noexcept:
    if type_num == arithmetic:
        return NATIVE
    if type_num == cnp.NPY_FLOAT32:
        return FLOAT
    if type_num == cnp.NPY_FLOAT64:
        return DOUBLE
    return HALF if type_num == cnp.NPY_FLOAT16 else BFLOAT16


cdef inline void set_matrix(
    Matrix* matrix, const Operand* operand, const Call* call, const int* kept, Py_ssize_t n_dims
) noexcept:
    """Describe an operand, if it is there, by the row axes that are left after merging."""
    cdef Py_ssize_t k
    matrix.data = NULL
    matrix.format = NATIVE
    if operand == NULL:
        return
    matrix.data = operand.data
    matrix.class_stride = operand.strides[call.axis]
    matrix.format = format_of(operand.type_num, call.arithmetic)
    matrix.row_strides[0] = 0
    for k in range(n_dims):
        matrix.row_strides[k] = operand.strides[kept[k]]


cdef inline bint can_merge(const Operand* operand, int outer, int inner) noexcept:
    """Return True if one axis continues where another ends."""
    return operand == NULL or operand.strides[outer] == operand.strides[inner] * operand.shape[inner]


cdef inline const Operand* if_there(const Operand* operand, bint is_wanted) noexcept:
    if is_wanted and operand.array != NULL:
        return operand
    return NULL


cdef inline void describe(Task* task, const Call* call, bint with_results) noexcept:
    """Start a task with the operands that have a class axis, by as few row axes as their strides allow."""
    cdef const Operand* logits = &call.logits
    cdef const Operand* prob = if_there(&call.target, not call.has_classes)
    cdef const Operand* out = if_there(&call.out, with_results)
    cdef const Operand* v = if_there(&call.v, with_results)
    cdef const Operand* hess = if_there(&call.hess_out, with_results)
    cdef int kept[MAX_DIMS]
    cdef int k, last = 0
    memset(task, 0, <char*>task.row_shape - <char*>task)
    task.n_rows = call.n_rows
    task.n_classes = call.n_classes
    task.row_shape[0] = 1
    task.is_product = v != NULL
    for k in range(logits.n_dims):
        if k == call.axis or logits.shape[k] == 1:
            continue
        if task.n_dims > 0 and (
                can_merge(logits, last, k) and can_merge(prob, last, k) and can_merge(out, last, k)
                and can_merge(v, last, k) and can_merge(hess, last, k)):
            task.n_dims -= 1
            task.row_shape[task.n_dims] *= logits.shape[k]
        else:
            task.row_shape[task.n_dims] = logits.shape[k]
        kept[task.n_dims] = last = k
        task.n_dims += 1
    set_matrix(&task.logits, logits, call, kept, task.n_dims)
    set_matrix(&task.prob, prob, call, kept, task.n_dims)
    set_matrix(&task.out, out, call, kept, task.n_dims)
    task.out_is_new = out != NULL and out.is_new
    set_matrix(&task.v, v, call, kept, task.n_dims)
    set_matrix(&task.hess, hess, call, kept, task.n_dims)
    task.n_dims = max(task.n_dims, 1)
    # neutral options
    task.logit_scale = 1
    task.factor = 1
    task.curvature.factor = task.curvature.z_factor = 1  # the Hessian's own, as products have it
    task.curvature.bends = True


# ----- class indices, weights and options

cdef inline object round_weights(Call* call, object weight):
    """Put weights of classes into the arithmetic's type, whatever NumPy would say to their rounding."""
    cdef Py_ssize_t k
    cdef cnp.npy_intp n = call.n_classes
    cdef bint is_double = call.arithmetic == cnp.NPY_FLOAT64
    if weight is None or call.weights.is_double == is_double:
        return weight
    rounded = cnp.PyArray_EMPTY(1, &n, call.arithmetic, 0)
    for k in range(n):
        if is_double:
            (<double*>cnp.PyArray_DATA(rounded))[k] = vector_item(&call.weights, k)
        else:
            (<float*>cnp.PyArray_DATA(rounded))[k] = <float>vector_item(&call.weights, k)
    call.weights.data = cnp.PyArray_BYTES(rounded)
    call.weights.is_double = is_double
    return rounded


cdef inline double scan_classes(Call* call, int team) except? -1:
    """Refuse classes that do not exist; return what a mean divides by.

    Targets of uint64 have the bits of int64 here. Then a number that `ignore_index` is not may have its bits.
    """
    cdef const int64_t* target = <const int64_t*>call.target.data
    cdef Options* options = &call.options
    cdef bint is_uint64 = cnp.PyTypeNum_ISUNSIGNED(call.target.type_num) and call.target.itemsize == 8
    cdef Py_ssize_t bad = -1
    cdef double normalizer = 0
    if options.is_uint64 != is_uint64 and (options.is_uint64 or options.ignore_index < 0):
        bad = first_bad(target, call.n_rows, 0, call.n_classes)
        options.ignore_index = -1  # which is no target
    if bad < 0:
        bad = scan_targets(
            target, call.n_rows, options.ignore_index, call.n_classes, &call.weights, &call.sample_weights, team,
            &normalizer)
    if bad >= 0:
        fail("class", "target", <double>bad)
    return normalizer


cdef inline void set_options(Task* task, const Call* call, double divisor) noexcept:
    """Add what a loss depends on beside its matrices; without a divisor its gradient is not asked for."""
    cdef const Options* options = &call.options
    task.target = <const int64_t*>call.target.data if call.has_classes else NULL
    task.weight = call.weights.data
    task.weight_sum = call.n_classes if task.weight == NULL else sum_vector(&call.weights, call.n_classes)
    task.sample_weight = call.sample_weights
    task.grad_output = call.grad_outputs
    task.factor = call.grad_factor / divisor if divisor != 0 else call.grad_factor
    task.ignore_index = options.ignore_index
    task.label_smoothing = options.label_smoothing
    task.z_loss = options.z_loss
    task.logit_scale = options.logit_scale
    task.softcap = options.softcap


cdef inline int set_curvature(Task* task, object fields) except -1:
    """Say which diagonal is wanted, by the fields of Python's `Curvature`."""
    cdef bint per_class
    task.curvature.factor, task.curvature.z_factor, task.curvature.bends, task.curvature.absolute, \
        task.curvature.floor, per_class = fields
    if per_class:
        task.curvature.factor *= task.n_classes / <double>max(1, task.n_classes - 1)
