"""Loops over a block of classes in C, of one row or of 16 side by side.

See `simd/row_sweep.h`, `simd/block.h` and `simd/curvature.h`.

Arrays are of the arithmetic's type, which C knows by their pointers' types.
"""
from libc.stdint cimport int32_t, int64_t

from fastce._cpu.lanes cimport LANES, AskedSums
from fastce._cpu.layout.convert cimport Format
from fastce._cpu.task cimport N_SUMS

cdef extern from "simd/sums.h" nogil:
    # A block of classes, and what is asked of it.
    ctypedef struct Block "fastce_block":
        bint by_rows           # of one row
        const void* x          # logits: of the arithmetic's type, or of 16 bits; under a softcap tanh of them
        Py_ssize_t n           # numbers: as many as classes, or 16 times as many
        void* e                # where the exponentials go; may be x
        const void* w          # class weights; NULL: all are 1
        const void* t          # class probabilities, or NULL
        # of one row: the block that comes next, whose maximum is found meanwhile; NULL: none
        const void* next
        Py_ssize_t n_next
        double next_max        # result
        # of one row: an earlier block of exponentials, multiplied by its factor meanwhile
        void* done
        Py_ssize_t n_done
        double factor
        # of one row: what is asked for meanwhile, numbers of so many bytes
        const char* ahead_l1
        const char* ahead_l2
        Py_ssize_t ahead_size
        const char* ahead_t
        Py_ssize_t ahead_t_size
        double sums[N_SUMS][LANES]  # result; of one row in the first lane
        Format format          # of x
        AskedSums asked
        bint sums_entropy

cdef extern from "simd/row_sweep.h" nogil:
    const bint BY_LINES "FASTCE_BY_LINES"  # whether rows are swept by whole lines
    # Rows that are one block each, swept one after the other.
    ctypedef struct SweptRows "fastce_swept_rows":
        int n_rows
        int n_done
        Py_ssize_t n_classes
        Py_ssize_t ahead_l1  # bytes from a row to what is asked for meanwhile
        Py_ssize_t ahead_l2
        const void* x[LANES]
        void* e[LANES]       # where exponentials go; may be x; may be the same memory for all rows
        int64_t target[LANES]  # a class whose logit is wanted, or -1
        void* done[LANES]    # earlier rows of exponentials, multiplied by their factors meanwhile
        double factor[LANES]
        # results
        double row_max[LANES]
        double x_target[LANES]
        double all_terms[LANES]  # sums of exponentials
        double excl_max[LANES]  # without those that are 1, where that is needed
    void sweep_one_by_one "fastce_sweep_rows"(SweptRows* rows, double scale, double like)
    # of a row; the type is that of `like`
    double find_row_max "fastce_row_max"(Format format, const void* x, Py_ssize_t n, double like)
    Py_ssize_t find "fastce_find"(const void* x, Py_ssize_t n, double value)
    double sum_excl_max "fastce_sum_excl_max"(const void* e, Py_ssize_t n)
    void multiply "fastce_multiply"(void* e, Py_ssize_t n, double factor)

cdef extern from "simd/block.h" nogil:
    # of 16 rows
    void find_lane_maxima "fastce_lane_maxima"(const void* x, Py_ssize_t n, void* row_max)
    void find_in_lanes "fastce_find_in_lanes"(const void* x, Py_ssize_t n, const void* values, int32_t* found)
    # of either; what differs between rows is an array of 16 numbers
    void sum_targets "fastce_sum_targets"(Block* block, const void* row_max)
    void sum_exps "fastce_sum_exps"(Block* block, const void* row_max, double scale)
    void cap "fastce_cap"(const void* x, Py_ssize_t n, double factor, void* out)
    void multiply_slopes "fastce_multiply_slopes"(
        const void* g, Py_ssize_t n, const void* x, double factor, void* out)
    void combine_gradient "fastce_write_gradient"(
        bint by_rows, void* e, Py_ssize_t n, const void* alpha, const void* beta, const void* w, const void* gamma,
        const void* t)
    void write_log "fastce_write_log"(
        const void* x, Py_ssize_t n, const void* row_max, double scale, const void* log_sum, void* out)

cdef extern from "simd/curvature.h" nogil:
    cdef enum:
        FIRST "FASTCE_FIRST"
        OTHER "FASTCE_OTHER"
        W_AT_MAX "FASTCE_W_AT_MAX"
        LAST "FASTCE_LAST"
        UNSCALE "FASTCE_UNSCALE"
        AT_MAX "FASTCE_AT_MAX"
        INVERSE "FASTCE_INVERSE"
        N_FACTORS "FASTCE_N_FACTORS"
    void sum_moment "fastce_sum_moment"(
        const void* e, const void* w, Py_ssize_t n, const void* w_at_max, const char* ahead, double* sums)
    void find_slopes "fastce_find_slopes"(const void* x, Py_ssize_t n, double factor, void* slopes)
    void multiply_by "fastce_multiply_by"(const void* a, const void* b, Py_ssize_t n, const void* scale, void* out)
    void write_product "fastce_write_product"(
        const void* e, const void* w, Py_ssize_t n, const void* factors, bint is_scaled, void* out)
    void write_diagonal "fastce_write_diagonal"(
        const void* e, Py_ssize_t n, const void* factors, double least, void* out)
    void write_absolute "fastce_write_absolute"(const void* grad, Py_ssize_t n, double least, void* out)
    void write_bent "fastce_write_bent"(
        const void* y, const void* slopes, const void* u, const void* grad, const void* v, Py_ssize_t n, double bend,
        double least, void* out)
