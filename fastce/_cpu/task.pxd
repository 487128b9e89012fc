"""What a kernel is asked to do: operands, options and outputs, as plain C structs.

A *row* is one softmax; rows are numbered 0 .. n_rows - 1 in C order over `row_shape`. N x C operands keep the caller's
memory: strides count bytes. Per-row operands and outputs are contiguous. A NULL pointer means that an operand is
absent.
"""
from libc.float cimport DBL_MAX, DBL_MIN, FLT_MAX, FLT_MIN
from libc.stdint cimport int64_t

from fastce._cpu.formula cimport softcap_scales_double, softcap_scales_float
from fastce._cpu.layout.convert cimport Format
from fastce._cpu.math cimport real

cdef enum:
    MAX_DIMS = 64     # NumPy's own limit
    LEAST_BLOCK = 64  # classes, so that any block has a whole vector


cdef enum OutKind:
    GRADIENT = 0     # alpha p + ..., the softmax itself where there is no target
    LOG_SOFTMAX = 1


# Sums over the classes of a row, see `sums.h`: d is the shifted logit x - row_max, to be multiplied by the scale.
cdef extern from "simd/sums.h" nogil:
    cdef enum:
        ALL "FASTCE_ALL"            # exp(d)
        EXCL_MAX "FASTCE_EXCL_MAX"  # exp(d), but for terms that are 1
        # what options ask for
        E_D "FASTCE_E_D"    # exp(d) d
        W_D "FASTCE_W_D"    # w d
        WT "FASTCE_WT"      # w t
        WT_D "FASTCE_WT_D"  # w t d
        T "FASTCE_T"        # t
        T_D "FASTCE_T_D"    # t d
        N_SUMS "FASTCE_N_SUMS"

cdef enum:
    N_OPTION_SUMS = 6


cdef struct Matrix:
    char* data
    Format format
    Py_ssize_t class_stride
    Py_ssize_t row_strides[MAX_DIMS]


cdef struct Vector:
    const char* data
    bint is_double  # else float


# Which diagonal of curvature: slope^2 times factor * K p (1 - p) + z_factor * 2 z p^2, and f'' times the gradient.
cdef struct Curvature:
    double factor
    double z_factor
    bint bends             # whether the last term is there
    bint absolute          # the gradient's absolute value instead
    double floor           # the least value


cdef struct Task:
    bint is_float          # the arithmetic's type, else double
    Py_ssize_t n_rows
    Py_ssize_t n_classes
    Py_ssize_t n_dims
    # operands
    const int64_t* target  # class indices; at most one of the two is there
    const void* weight     # per class, in the arithmetic's type
    double weight_sum      # W
    const double* block_weights  # the sum of w over the classes before each of the kernel's blocks, and over all
    Vector sample_weight
    Vector grad_output
    const Task* source     # the caller's task, if this one works on copies of rows, see `copied_rows`; else NULL
    bint copies_logits
    bint copies_out
    bint stores_rows       # from the copies, one by one
    bint streams           # past the caches
    bint out_is_new        # nobody has touched its memory yet
    Py_ssize_t block       # how many classes of a row the kernel does at once, see `block_size`
    # options
    int64_t ignore_index
    double label_smoothing
    double z_loss
    double logit_scale
    double softcap         # 0 without: the one predicate
    double scale           # of differences f(x) - f(row's maximum), where f(x) = tanh(cap_factor x) or x
    double cap_factor
    bint normalized        # the logits are log-probabilities already (nll_loss)
    double factor          # of every gradient: 1 / normalizer and a scalar grad_output
    # which sums beyond the exponentials the options ask for
    bint sum_weight
    bint has_zero_weight   # among the classes' weights, if they are summed
    bint sum_prob
    bint sum_entropy
    bint find_argmax
    bint has_option_sums   # any of the above
    bint needs_argmax_patch         # the arg-max, where its gradient would cancel
    int n_sums
    int sums[N_OPTION_SUMS]  # which these are
    # outputs
    OutKind out_kind
    # what the curvature kernel is asked for
    bint is_product
    bint by_rows           # a row fills the vector, or 16 rows do
    Py_ssize_t unit_size   # numbers of a row, or of 16 side by side, with the gap after them
    Py_ssize_t unit_rows   # rows that are done together
    Py_ssize_t array_size  # numbers of an operand that they have, with the gaps
    Curvature curvature
    void* loss             # these in the arithmetic's type
    void* lse
    void* log_prob
    void* entropy
    int64_t* argmax
    double* loss_parts     # sums over part_rows rows each
    Py_ssize_t part_rows
    # what is long, and comes last: a new task has zeros in all but this
    Py_ssize_t row_shape[MAX_DIMS]
    Matrix logits
    Matrix prob            # class probabilities
    Matrix out
    Matrix v               # the vector of a product
    Matrix hess            # where the diagonal goes


cdef inline bint is_curvature(const Task* task) noexcept nogil:
    """Return True if a product or a diagonal is asked for."""
    return task.v.data != NULL or task.hess.data != NULL


cdef inline Py_ssize_t row_offset(const Task* task, const Matrix* matrix, Py_ssize_t i) noexcept nogil:
    """Return where row i starts, in bytes."""
    cdef Py_ssize_t k, offset = 0
    if task.n_dims == 1:
        return i * matrix.row_strides[0]
    for k in range(task.n_dims - 1, -1, -1):
        offset += (i % task.row_shape[k]) * matrix.row_strides[k]
        i = i // task.row_shape[k]
    return offset


cdef inline Py_ssize_t block_size(const Task* task, Py_ssize_t start) noexcept nogil:
    """Return how many classes are in the block that starts with class `start`; the last takes in too short a one."""
    cdef Py_ssize_t n = task.n_classes - start
    return n if n < task.block + LEAST_BLOCK else task.block


cdef inline double vector_item(const Vector* vector, Py_ssize_t i) noexcept nogil:
    if vector.data == NULL:
        return 1.0
    if vector.is_double:
        return (<const double*>vector.data)[i]
    return (<const float*>vector.data)[i]


cdef inline real weight_of(const Task* task, Py_ssize_t k, real like) noexcept nogil:
    return <real>1 if task.weight == NULL else (<const real*>task.weight)[k]


cdef inline void choose_scale(Task* task, real like) noexcept:
    """Choose the factors of the logits, and drop a softcap that changes no number of the arithmetic's type."""
    if real is float:
        softcap_scales_float(task.logit_scale, task.softcap, FLT_MIN, FLT_MAX, &task.scale, &task.cap_factor)
    else:
        softcap_scales_double(task.logit_scale, task.softcap, DBL_MIN, DBL_MAX, &task.scale, &task.cap_factor)
    if task.cap_factor == 0:
        task.softcap = 0


cdef inline void add_sum(Task* task, int k) noexcept:
    task.sums[task.n_sums] = k
    task.n_sums += 1


cdef inline void choose_sums(Task* task) noexcept:
    """Say what operands, options and outputs need summed up."""
    task.sum_weight = task.label_smoothing != 0
    task.sum_prob = task.prob.data != NULL
    task.sum_entropy = task.entropy != NULL
    task.find_argmax = task.argmax != NULL
    task.needs_argmax_patch = task.sum_prob and task.out.data != NULL and (not task.is_product or task.softcap != 0)
    # sums of t d before those of t: `merge` needs the latter as they were
    if task.sum_entropy:
        add_sum(task, E_D)
    if task.sum_weight and not is_curvature(task):
        add_sum(task, W_D)
    if task.sum_prob:
        add_sum(task, WT_D)
        add_sum(task, WT)
    if task.sum_prob and task.log_prob != NULL:
        add_sum(task, T_D)
        add_sum(task, T)
    task.has_option_sums = task.sum_weight or task.sum_prob or task.sum_entropy or task.find_argmax
