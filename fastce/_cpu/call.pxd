"""Every rule of a call, once: what Python gives is read into structs of C, and checked there.

Design
------
1. An array is read once, into an `Operand`: its address, shape and strides. From then on nobody looks at it again, for
   other threads may give it another shape as soon as they run. Whatever needs an array works on a view that is made of
   the operand.
2. A rule that is broken has a name, which `_messages` has a text for, and names the argument. Rules are checked in one
   order: options, then arrays, then their shapes; all before anything is written.
3. Arrays may have any strides. What the kernels read one after the other is copied if it lies otherwise.
4. What only Python can read (a list, a number of another type, a dtype that no kernel reads) breaks a rule, too. Python
   converts it and calls again.
5. Arrays on a GPU come as views of the same bounds that must not be read: the same rules hold, but for those that look
   at numbers.
"""
from cpython.object cimport PyObject
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

cimport numpy as cnp

from fastce._cpu.layout.convert cimport magnitude
from fastce._cpu.task cimport MAX_DIMS, Vector, vector_item


cdef extern from "numpy/arrayobject.h":  # what Cython's own declarations lack
    enum: NPY_USERDEF
    object PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, void* dtype, int subok)
    object PyArray_Scalar(void* data, cnp.dtype dtype, object base)

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object number, int* overflow)

cdef extern from "host/arrays.h":
    double FAR "FASTCE_FAR"
    object new_view "fastce_view"(
        int type_num, int is_native, int n_dims, cnp.npy_intp* shape, cnp.npy_intp* strides, void* data,
        int is_writable, object owner)


cdef enum:
    DEFAULT_IGNORE_INDEX = -100  # torch's; the only one with class probabilities


cdef enum Kind:
    OTHER          # no real numbers, or nothing that results can be written to
    BOOLEAN
    INTEGER
    FLOATING       # of a type or byte order that the kernels do not read
    KERNEL_FLOAT   # float32, float64, float16, bfloat16


cdef struct Operand:
    PyObject* array      # which owns the memory, and is kept by the caller; NULL if there is no operand
    char* data
    const char* start    # the bytes between which it lies; none if it is empty
    const char* stop
    int type_num
    Kind kind
    bint is_native
    bint is_ready        # aligned, in native byte order, in C order
    bint is_dense        # the same, but in C or Fortran order
    bint is_writable
    int n_dims
    Py_ssize_t itemsize
    cnp.npy_intp shape[MAX_DIMS]
    cnp.npy_intp strides[MAX_DIMS]


# The options that are numbers or names.
cdef struct Options:
    int64_t ignore_index
    bint is_uint64         # whether that has the bits of a number beyond int64
    bint is_mean
    bint is_per_row        # neither the mean nor the sum of the losses
    double on_empty
    double label_smoothing
    double logit_scale
    double softcap         # 0 without
    double z_loss
    int n_threads          # 0: the library chooses
    bint has_axis
    int64_t axis


cdef struct Call:
    # the rule that is broken, of which argument, and where or with which number; read only if a check returns False
    const char* rule
    const char* name
    double value
    const char* other      # what a result overlaps
    bint on_gpu
    bint is_taken_in       # all arguments are Python's or NumPy's own types
    bint is_scaled         # weights are as near to 1 as they can be
    int far                # which weights are far from 1: bit 1 is for those of classes, bit 2 for those of rows
    Options options
    int axis
    Py_ssize_t n_rows
    Py_ssize_t n_classes
    bint has_classes       # else class probabilities
    int arithmetic         # the type's number
    double grad_output     # for all rows
    Operand logits
    Operand target
    Operand weight
    Operand sample_weight
    Operand grad_outputs   # per row, or one number in an array
    Operand v
    Operand out
    Operand hess_out


cdef inline bint fail(Call* call, const char* rule, const char* name, double value) noexcept:
    """Note which rule is broken."""
    call.rule = rule
    call.name = name
    call.value = value
    return False


# ----- options

cdef inline bint read_word(Call* call, object given, const char* name) noexcept:
    """Return True if this is Python's own string; those of derived types have their own comparison."""
    return True if type(given) is str else fail(call, "kind", name, 0)


cdef inline bint read_integer(Call* call, object given, const char* name, int64_t* number, int* overflow) except -1:
    """Read Python's own integer; `overflow` is 1 or -1 where that is beyond int64."""
    if type(given) is not int:
        return fail(call, "kind", name, 0)
    number[0] = PyLong_AsLongLongAndOverflow(given, overflow)
    return True


cdef inline bint read_number(
    Call* call, object given, const char* name, double least, double most, bint is_open, double* number
) except -1:
    """Read a float or an integer between these bounds; an open interval excludes them."""
    if isinstance(given, float):
        number[0] = given
    elif type(given) is int:
        try:
            number[0] = given
        except OverflowError:
            return fail(call, "range", name, 0)
    else:
        return fail(call, "kind", name, 0)
    if (least < number[0] < most) if is_open else (least <= number[0] <= most):
        return True
    return fail(call, "range", name, 0)


cdef inline bint read_ignore_index(Call* call, object given) except -1:
    cdef int overflow = 0
    cdef uint64_t bits
    if not read_integer(call, given, "ignore_index", &call.options.ignore_index, &overflow):
        return False
    call.options.is_uint64 = overflow > 0
    if overflow > 0:
        try:
            bits = given
        except OverflowError:
            overflow = -1
        else:
            call.options.ignore_index = <int64_t>bits
    return overflow >= 0 or fail(call, "range", "ignore_index", 0)


cdef inline bint read_threads_and_axis(Call* call, object n_threads, object axis) except -1:
    cdef int overflow = 0
    cdef int64_t number
    call.options.n_threads = 0
    if n_threads is not None:
        if not read_integer(call, n_threads, "n_threads", &number, &overflow):
            return False
        if overflow < 0 or (overflow == 0 and number < 1):
            return fail(call, "range", "n_threads", 0)
        # An upper limit: more than any machine has, in a number that C can hold.
        call.options.n_threads = <int>min(number, 0x7fffffff) if overflow == 0 else 0x7fffffff
    call.options.has_axis = axis is not None
    if axis is not None:
        if not read_integer(call, axis, "axis", &call.options.axis, &overflow):
            return False
        if overflow != 0:  # no axis either
            call.options.axis = 0x7fffffff
    return True


cdef inline bint read_options(Call* call, tuple given, object n_threads, object axis) except -1:
    """Read the options, those of the tuple in the order of `_options.NUMBERS_AND_NAMES`."""
    cdef Options* options = &call.options
    ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss = given
    if not read_word(call, reduction, "reduction"):
        return False
    options.is_mean = <str>reduction == "mean"
    options.is_per_row = not options.is_mean and <str>reduction == "none"
    if not (options.is_mean or options.is_per_row or <str>reduction == "sum"):
        return fail(call, "range", "reduction", 0)
    if not read_word(call, on_empty, "on_empty"):
        return False
    if <str>on_empty == "nan":
        options.on_empty = NAN
    elif <str>on_empty == "zero":
        options.on_empty = 0
    else:
        return fail(call, "range", "on_empty", 0)
    options.softcap = 0
    return (
        read_ignore_index(call, ignore_index)
        and read_number(call, label_smoothing, "label_smoothing", 0, 1, False, &options.label_smoothing)
        and read_number(call, logit_scale, "logit_scale", 0, INFINITY, True, &options.logit_scale)
        and (softcap is None or read_number(call, softcap, "softcap", 0, INFINITY, True, &options.softcap))
        and read_number(call, z_loss, "z_loss", 0, DBL_MAX, False, &options.z_loss)
        and read_threads_and_axis(call, n_threads, axis))


cdef inline bint check_scale(Call* call, double scale, const char* name) noexcept:
    """Refuse a factor that is 0 or infinite in the arithmetic's type."""
    if call.arithmetic == cnp.NPY_FLOAT64 or 0 < <float>scale < INFINITY:
        return True
    return fail(call, "scale", name, <float>scale)


cdef inline bint check_scales(Call* call) noexcept:
    cdef double quotient, most = DBL_MAX if call.arithmetic == cnp.NPY_FLOAT64 else FLT_MAX
    if not check_scale(call, call.options.logit_scale, "logit_scale"):
        return False
    if call.options.softcap == 0:
        return True
    # The kernels multiply by the quotient inside tanh. One that is too small does no harm.
    quotient = call.options.logit_scale / call.options.softcap
    return check_scale(call, call.options.softcap, "softcap") and (
        quotient <= most or fail(call, "quotient", "softcap", quotient))


# ----- arrays

cdef inline Kind kind_of(cnp.ndarray array) except? OTHER:
    cdef int type_num = cnp.PyArray_TYPE(array)
    if type_num == cnp.NPY_FLOAT32 or type_num == cnp.NPY_FLOAT64 or type_num == cnp.NPY_FLOAT16:
        return KERNEL_FLOAT if cnp.PyArray_ISNOTSWAPPED(array) else FLOATING
    if cnp.PyTypeNum_ISINTEGER(type_num):
        return INTEGER
    if cnp.PyTypeNum_ISBOOL(type_num):
        return BOOLEAN
    if cnp.PyTypeNum_ISFLOAT(type_num):
        return FLOATING
    # Types from other packages have numbers that depend on the order of imports.
    if type_num >= NPY_USERDEF and array.dtype.type.__name__ == "bfloat16":
        return KERNEL_FLOAT if cnp.PyArray_ISNOTSWAPPED(array) else FLOATING
    return OTHER


cdef inline bint set_operand(Operand* operand, cnp.ndarray array) except -1:
    """Read an array."""
    cdef int k
    cdef Py_ssize_t length
    cdef bint is_empty = False
    operand.kind = kind_of(array)  # first: it runs Python
    operand.array = <PyObject*>array
    operand.data = cnp.PyArray_BYTES(array)
    operand.type_num = cnp.PyArray_TYPE(array)
    operand.is_native = cnp.PyArray_ISNOTSWAPPED(array)
    operand.is_ready = cnp.PyArray_ISCARRAY_RO(array)
    operand.is_dense = operand.is_ready or cnp.PyArray_ISFARRAY_RO(array)
    operand.is_writable = cnp.PyArray_ISWRITEABLE(array)
    operand.n_dims = cnp.PyArray_NDIM(array)
    operand.itemsize = cnp.PyArray_ITEMSIZE(array)
    operand.start = operand.data
    operand.stop = operand.data + operand.itemsize
    for k in range(operand.n_dims):
        operand.shape[k] = cnp.PyArray_DIM(array, k)
        operand.strides[k] = cnp.PyArray_STRIDE(array, k)
        length = (operand.shape[k] - 1) * operand.strides[k]
        operand.start += min(length, 0)
        operand.stop += max(length, 0)
        is_empty |= operand.shape[k] == 0
    if is_empty:
        operand.stop = operand.start
    return True


cdef inline bint read_array(Call* call, Operand* operand, object given, const char* name) except -1:
    """Read an array if there is one; Python takes in what is none, or of a derived type."""
    if given is None:
        operand.array = NULL
        return True
    return set_operand(operand, given) if cnp.PyArray_CheckExact(given) else fail(call, "array", name, 0)


cdef inline bint read_needed(Call* call, Operand* operand, object given, const char* name) except -1:
    """Read an array that must be there."""
    return fail(call, "array", name, 0) if given is None else read_array(call, operand, given, name)


cdef inline bint read_result(Call* call, Operand* operand, object given, const char* name) except -1:
    """Read an array that is written to, if there is one; what is no array is refused when all else is right."""
    if not call.is_taken_in or given is None or cnp.PyArray_CheckExact(given):
        return read_array(call, operand, given, name)
    memset(operand, 0, sizeof(operand[0]))
    operand.array = <PyObject*>given
    operand.kind = OTHER
    return True


cdef inline bint read_grad_output(Call* call, object given) except -1:
    """Read an upstream gradient: a number, or an array."""
    call.grad_output = 1
    call.grad_outputs.array = NULL
    if given is None:
        return True
    if not call.options.is_per_row:
        if isinstance(given, float):
            call.grad_output = given
            return True
        if type(given) is int and -0x100000000 < given < 0x100000000:
            call.grad_output = given
            return True
    return read_array(call, &call.grad_outputs, given, "grad_output")


cdef inline object view_of(const Operand* operand):
    """Return an array of an operand's shape and memory, whatever has become of its own array."""
    return new_view(
        operand.type_num, operand.is_native, operand.n_dims, <cnp.npy_intp*>operand.shape,
        <cnp.npy_intp*>operand.strides, operand.data, operand.is_writable, <object>operand.array)


cdef inline bint is_like(const Operand* operand, const Operand* other) noexcept:
    """Return True if two arrays have the same shape."""
    cdef int k
    if operand.n_dims != other.n_dims:
        return False
    for k in range(operand.n_dims):
        if operand.shape[k] != other.shape[k]:
            return False
    return True


cdef inline bint has_row_shape(const Call* call, const Operand* operand) noexcept:
    """Return True if an array has the shape of the logits without the class axis."""
    cdef int k
    if operand.n_dims != call.logits.n_dims - 1:
        return False
    for k in range(operand.n_dims):
        if operand.shape[k] != call.logits.shape[k + (k >= call.axis)]:
            return False
    return True


cdef inline bint is_real(const Operand* operand) noexcept:
    return operand.kind >= INTEGER


cdef inline bint is_float(const Operand* operand) noexcept:
    return operand.kind >= FLOATING


cdef inline bint check_alignment(Call* call, const Operand* operand, const char* name) noexcept:
    """Refuse what a GPU cannot read: numbers at addresses that are no multiples of their size."""
    cdef int k
    cdef Py_ssize_t rest
    if not call.on_gpu or operand.array == NULL:
        return True
    rest = <Py_ssize_t>operand.data % operand.itemsize
    for k in range(operand.n_dims):
        rest |= operand.strides[k] % operand.itemsize
    return rest == 0 or fail(call, "alignment", name, 0)


cdef inline bint check_float(Call* call, const Operand* operand, const char* name) noexcept:
    """Refuse arrays that the kernels do not know."""
    if operand.kind != KERNEL_FLOAT:
        return fail(call, "dtype", name, 0)
    if operand.n_dims == 0:
        return fail(call, "scalar", name, 0)
    return check_alignment(call, operand, name)


cdef inline bint check_axis(Call* call, int n_dims, int default_axis) noexcept:
    """Make a number of the class axis that is not negative."""
    call.axis = default_axis
    if call.options.has_axis:
        if not -n_dims <= call.options.axis < n_dims:
            return fail(call, "axis", "axis", n_dims)
        call.axis = <int>call.options.axis + (n_dims if call.options.axis < 0 else 0)
    return True


cdef inline void measure(Call* call) noexcept:
    """Say how many rows and classes there are."""
    cdef int k
    call.n_rows = 1
    for k in range(call.logits.n_dims):
        if k != call.axis:
            call.n_rows *= call.logits.shape[k]
    call.n_classes = call.logits.shape[call.axis]


cdef inline bint check_logits(Call* call) noexcept:
    cdef const Operand* logits = &call.logits
    if (logits.kind == INTEGER or logits.kind == BOOLEAN) and is_float(&call.target) and (
            logits.n_dims == call.target.n_dims - 1):
        return fail(call, "exchanged", "logits", 0)
    if not check_float(call, logits, "logits"):
        return False
    call.arithmetic = cnp.NPY_FLOAT64 if logits.type_num == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32
    if not (check_scales(call) and check_axis(call, logits.n_dims, 1 if logits.n_dims > 1 else 0)):
        return False
    measure(call)
    return True


cdef inline bint check_target(Call* call) noexcept:
    """Tell class indices from class probabilities, and refuse anything between."""
    cdef const Operand* target = &call.target
    call.has_classes = target.kind == INTEGER
    if call.has_classes:
        if not has_row_shape(call, target):
            return fail(call, "one-hot" if is_like(target, &call.logits) else "index shape", "target", 0)
    elif not is_float(target):
        return fail(call, "target kind", "target", 0)
    elif not is_like(target, &call.logits):
        return fail(call, "float index" if has_row_shape(call, target) else "probability shape", "target", 0)
    if call.n_classes == 0 and call.n_rows > 0:
        return fail(call, "no classes", "logits", 0)
    if not call.has_classes and (
            call.options.is_uint64 or call.options.ignore_index != DEFAULT_IGNORE_INDEX):
        return fail(call, "ignored probabilities", "ignore_index", 0)
    return check_alignment(call, target, "target")


cdef enum Shape:
    ONE_FOR_ALL
    PER_CLASS
    PER_ROW
    PER_LOGIT


cdef inline bint has_shape(const Call* call, const Operand* operand, Shape shape) noexcept:
    if shape == ONE_FOR_ALL:
        return operand.n_dims == 0
    if shape == PER_CLASS:
        return operand.n_dims == 1 and operand.shape[0] == call.n_classes
    return has_row_shape(call, operand) if shape == PER_ROW else is_like(operand, &call.logits)


cdef inline bint check_factors(Call* call, const Operand* factors, const char* name, Shape shape) noexcept:
    """Refuse factors, if there are any, that are no real numbers, or not one for each of what they should be for."""
    if factors.array == NULL:
        return True
    if not is_real(factors):
        return fail(call, "real", name, 0)
    return (has_shape(call, factors, shape) or fail(call, "shape", name, 0)) and check_alignment(call, factors, name)


# ----- results

cdef inline bint are_same(const Operand* a, const Operand* b) noexcept:
    """Return True if two arrays of one shape have every number at the same place."""
    cdef int k
    if a.data != b.data or a.type_num != b.type_num or a.is_native != b.is_native:
        return False
    for k in range(a.n_dims):
        if a.shape[k] != 1 and a.strides[k] != b.strides[k]:
            return False
    return True


cdef inline bint has_own_elements(const Operand* operand) except -1:
    """Return True if no two numbers of an array share memory; False also if it is too intricate to tell."""
    cdef bint is_done[MAX_DIMS]
    cdef Py_ssize_t step, span = operand.itemsize  # what the axes so far extend over
    cdef int k, nearest, n_left = operand.n_dims
    if operand.is_dense:
        return True
    memset(is_done, 0, sizeof(is_done))
    while n_left > 0:
        # The axis of the shortest steps that is left. It is safe if it steps over all numbers of those before.
        nearest = -1
        for k in range(operand.n_dims):
            if not is_done[k] and (nearest < 0 or magnitude(operand.strides[k]) < magnitude(operand.strides[nearest])):
                nearest = k
        is_done[nearest] = True
        n_left -= 1
        if operand.shape[nearest] == 1:
            continue
        step = magnitude(operand.strides[nearest])
        if step < span:
            from fastce._cpu._rules import has_own_elements as count_exactly

            return step != 0 and count_exactly(view_of(operand))
        span += (operand.shape[nearest] - 1) * step
    return True


cdef inline bint share_memory(const Operand* a, const Operand* b) except -1:
    """Return True if two arrays share a number, or are too intricate to tell."""
    if a.stop <= b.start or b.stop <= a.start or a.start == a.stop or b.start == b.stop:
        return False
    if a.is_dense and b.is_dense:
        return True
    from fastce._cpu._rules import share_memory as solve_exactly

    return solve_exactly(view_of(a), view_of(b))


cdef inline bint check_apart(
    Call* call, const Operand* result, const char* name, const Operand* other, const char* other_name, bint in_place
) except -1:
    """Refuse a result that overlaps another array, unless it is that, where this may be worked on `in_place`."""
    if other.array == NULL or (in_place and are_same(result, other)) or not share_memory(result, other):
        return True
    call.other = other_name
    return fail(call, "overlap", name, 0)


cdef inline bint check_like(Call* call, const Operand* result, const Operand* like, const char* name) except -1:
    """Refuse what a result shaped `like` an operand cannot be written to."""
    if result.kind == OTHER and result.data == NULL:
        return fail(call, "result kind", name, 0)
    if not check_alignment(call, result, name):
        return False
    if not is_like(result, like):
        return fail(call, "result shape", name, 0)
    if result.type_num != like.type_num or not result.is_native:
        return fail(call, "result dtype", name, 0)
    if not (result.is_writable or call.on_gpu):
        return fail(call, "read-only", name, 0)
    if result.start != result.stop and not has_own_elements(result):
        return fail(call, "own elements", name, 0)
    return True


cdef inline bint check_result(Call* call, const Operand* result, const char* name, bint in_place) except -1:
    """Refuse a result that does not fit, or overlaps an input."""
    if result.array == NULL:
        return True
    return (
        check_like(call, result, &call.logits, name)
        and check_apart(call, result, name, &call.logits, "logits", in_place)
        and check_apart(call, result, name, &call.v, "v", in_place)
        and check_apart(call, result, name, &call.target, "target", False)
        and check_apart(call, result, name, &call.weight, "weight", False)
        and check_apart(call, result, name, &call.sample_weight, "sample_weight", False)
        and check_apart(call, result, name, &call.grad_outputs, "grad_output", False))


cdef inline bint check_results(Call* call) except -1:
    """Refuse results that do not fit: the gradient or the product, which may be in place, and a diagonal."""
    return (
        check_result(call, &call.out, "out", True) and check_result(call, &call.hess_out, "hess_out", False)
        and (call.hess_out.array == NULL
             or check_apart(call, &call.hess_out, "hess_out", &call.out, "out", False)))


# ----- numbers

cdef inline bint is_vector(const Operand* operand) noexcept:
    """Return True for float and double, which the kernels read as factors."""
    return operand.type_num == cnp.NPY_FLOAT32 or operand.type_num == cnp.NPY_FLOAT64


cdef inline object make_ready(const Operand* operand, int type_num):
    """Return an array that has an operand's numbers one after the other, in this type: its own if it has them so."""
    if operand.type_num == type_num and operand.is_ready:
        return <object>operand.array
    return cnp.PyArray_Cast(view_of(operand), type_num)  # new, in C order


cdef inline object read_vector(const Operand* operand, Vector* vector):
    """Describe factors, if there are any; return the array that has them as they are described."""
    vector.data = NULL
    vector.is_double = False
    if operand.array == NULL or not is_vector(operand):
        return None
    ready = make_ready(operand, operand.type_num)
    # The address in the operand: another thread may have moved the array's memory.
    vector.data = operand.data if ready is <object>operand.array else cnp.PyArray_BYTES(ready)
    vector.is_double = operand.type_num == cnp.NPY_FLOAT64
    return ready


cdef inline int is_near(double factor) noexcept:
    """Return True for 0 and for finite numbers that are not far from 1."""
    return <int>(factor == 0) | (<int>(fabs(factor) >= 1 / FAR) & <int>(fabs(factor) <= FAR))


cdef inline bint are_near(const Vector* factors, Py_ssize_t n) noexcept:
    """Return True if all numbers are 0 or not far from 1."""
    cdef Py_ssize_t i
    cdef int all_are = True
    if factors.is_double:
        for i in range(n):  # vectorised: no exit
            all_are &= is_near((<const double*>factors.data)[i])
    else:
        for i in range(n):
            all_are &= is_near((<const float*>factors.data)[i])
    return all_are


cdef inline bint check_finite(
    Call* call, const Vector* factors, Py_ssize_t n, const char* name, bint is_rounded, int bit
) noexcept:
    """Refuse numbers that are not finite, also after they are rounded to float if they will be; note far ones."""
    cdef Py_ssize_t i
    cdef double factor, largest = 0
    if factors.data == NULL or are_near(factors, n):
        return True
    for i in range(n):
        factor = fabs(vector_item(factors, i))
        if not factor < INFINITY or (is_rounded and not <float>factor < INFINITY):
            return fail(call, "finite", name, <double>i)
        largest = max(largest, factor)
    if not is_near(largest):
        call.far |= bit
    return True


cdef inline bint check_convertible(Call* call, const Operand* operand, const char* name, bint is_matrix) noexcept:
    """Ask for another type of numbers that the kernels do not read."""
    if operand.array == NULL or (operand.kind == KERNEL_FLOAT if is_matrix else is_vector(operand)):
        return True
    return fail(call, "conversion", name, 0)


cdef inline bint check_conversions(Call* call) noexcept:
    """Ask for what is left to Python, when all else is right."""
    return (
        (call.has_classes or check_convertible(call, &call.target, "target", True))
        and check_convertible(call, &call.v, "v", True)
        and check_convertible(call, &call.weight, "weight", False)
        and check_convertible(call, &call.sample_weight, "sample_weight", False)
        and check_convertible(call, &call.grad_outputs, "grad_output", False)
        and (call.is_scaled or call.far == 0 or fail(call, "far", "weight", call.far)))
