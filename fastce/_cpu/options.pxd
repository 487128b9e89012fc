"""The options that are numbers or names, and their rules.

Only Python's own integers and strings are read: those of derived types have methods of their own, which may do
anything. Python makes them its own and calls again.
"""
from cpython.long cimport PyLong_AsLongLongAndOverflow
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport INFINITY, NAN
from libc.stdint cimport int64_t, uint64_t

cimport numpy as cnp

from fastce._cpu.rule cimport fail

cdef enum:
    DEFAULT_IGNORE_INDEX = -100  # torch's; the only one with class probabilities
    MOST_INT = 0x7fffffff


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
    int axis


cdef inline int read_int(object given, str name) except? -1:
    """Return Python's own integer, or the nearest of C's: no machine has so many threads, and no array such an axis."""
    cdef int overflow = 0
    cdef long long number
    if type(given) is not int:
        fail("kind", name)
    number = PyLong_AsLongLongAndOverflow(given, &overflow)
    return overflow * MOST_INT if overflow else <int>max(-MOST_INT, min(number, MOST_INT))


cdef inline double read_number(object given, str name, bint may_be_0, double most) except -1:
    """Return a float or an integer between 0 and `most`."""
    cdef double number
    if isinstance(given, float):
        number = given
    elif type(given) is int:
        try:
            number = given
        except OverflowError:
            number = INFINITY
    else:
        return fail("kind", name)
    if not 0 <= number <= most or (number == 0 and not may_be_0):
        fail("range", name)
    return number


cdef inline int read_reduction(Options* options, object given) except -1:
    if type(given) is not str:
        fail("kind", "reduction")
    options.is_mean = <str>given == "mean"
    options.is_per_row = not options.is_mean and <str>given == "none"
    if not (options.is_mean or options.is_per_row or <str>given == "sum"):
        fail("range", "reduction")


cdef inline int read_on_empty(Options* options, object given) except -1:
    if type(given) is not str:
        fail("kind", "on_empty")
    if <str>given == "nan":
        options.on_empty = NAN
    elif <str>given == "zero":
        options.on_empty = 0
    else:
        fail("range", "on_empty")


cdef inline int read_ignore_index(Options* options, object given) except -1:
    cdef int overflow = 0
    if type(given) is not int:
        fail("kind", "ignore_index")
    options.ignore_index = PyLong_AsLongLongAndOverflow(given, &overflow)
    options.is_uint64 = overflow > 0
    if overflow != 0:
        if overflow < 0 or given >> 64:
            fail("range", "ignore_index")
        options.ignore_index = <int64_t><uint64_t>given


cdef inline int read_n_threads(Options* options, object given) except -1:
    options.n_threads = 0 if given is None else read_int(given, "n_threads")
    if given is not None and options.n_threads < 1:
        fail("range", "n_threads")


cdef inline int read_axis(Options* options, object given) except -1:
    options.has_axis = given is not None
    options.axis = 0 if given is None else read_int(given, "axis")


cdef inline int read_options(Options* options, tuple given, object n_threads, object axis) except -1:
    """Read the options, those of the tuple in the order of `_options.NUMBERS_AND_NAMES`."""
    ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss = given
    read_reduction(options, reduction)
    read_on_empty(options, on_empty)
    read_ignore_index(options, ignore_index)
    options.label_smoothing = read_number(label_smoothing, "label_smoothing", True, 1)
    options.logit_scale = read_number(logit_scale, "logit_scale", False, DBL_MAX)
    options.softcap = 0 if softcap is None else read_number(softcap, "softcap", False, DBL_MAX)
    options.z_loss = read_number(z_loss, "z_loss", True, DBL_MAX)
    read_n_threads(options, n_threads)
    read_axis(options, axis)


cdef inline int find_axis(const Options* options, int n_dims, int default_axis) except -1:
    """Return the class axis as a number that is not negative."""
    if not options.has_axis:
        return default_axis
    if not -n_dims <= options.axis < n_dims:
        fail("axis", "axis", n_dims)
    return options.axis + (n_dims if options.axis < 0 else 0)


cdef inline int check_scale(double scale, str name, int arithmetic) except -1:
    """Refuse a factor that is 0 or infinite in the arithmetic's type."""
    if arithmetic != cnp.NPY_FLOAT64 and not 0 < <float>scale < INFINITY:
        fail("scale", name, <float>scale)


cdef inline int check_scales(const Options* options, int arithmetic) except -1:
    """Refuse factors of the logits that the arithmetic cannot multiply by."""
    cdef double quotient
    check_scale(options.logit_scale, "logit_scale", arithmetic)
    if options.softcap == 0:
        return 0
    check_scale(options.softcap, "softcap", arithmetic)
    # The kernels multiply by the quotient inside tanh. One that is too small does no harm.
    quotient = options.logit_scale / options.softcap
    if not quotient <= (DBL_MAX if arithmetic == cnp.NPY_FLOAT64 else FLT_MAX):
        fail("quotient", "softcap", quotient)
