"""What a tile's code in C offers, and what depends on the task: see `simd/tile.h`.

Design
------
1. C chooses the function for float or double by the type of the array it is given.
2. The largest term of a sum of exponentials is exactly `exp_unit`. Where it outweighs the others, loss and gradient
   come from a sum that leaves it out, `REST`, and so keeps the digits of the others however small they are. `ALL` is
   enough elsewhere, and where the sum can be repeated it alone is formed first: `REST` took a fifth of the sweep.
3. Sums of logits run at 2^-16 of their size (`d_unit`), so that a block of 3e38 in one lane does not overflow.
4. Options are tests per tile, outside the loops.
"""
from libc.stdint cimport int32_t

from fastce._cpu._convert cimport Format
from fastce._cpu._math cimport exp_unit, real
from fastce._cpu._task cimport T, T_D, W_D, WT, WT_D, Task

cdef enum:
    LANES = 16
    TILE = 64
    NO_CLASS = 0x7FFFFFFF

cdef extern from "simd/tile.h" nogil:
    const bint IS_WIDE "FASTCE_IS_WIDE"  # vectors of more than 16 bytes
    void fill "fastce_fill_range"(void* tile, Py_ssize_t start, Py_ssize_t stop, double value)
    void gather "fastce_gather"(const char* data, Py_ssize_t stride, Py_ssize_t n, void* tile)
    void keep_lanes "fastce_keep_lanes"(int32_t first, const void* source, double other, void* tile)
    void store_lanes "fastce_store_lanes"(int32_t first, const void* tile, void* out)
    void widen "fastce_widen"(const void* lanes, double* wide)
    void narrow "fastce_narrow"(const double* wide, void* lanes)
    void copy "fastce_copy"(const void* source, void* tile)
    void cap "fastce_cap"(void* x, double factor)
    void cap_slopes "fastce_cap_slopes"(const void* x, double factor, void* out)
    void fold_max "fastce_fold_max"(const void* x, void* row_max)
    double lane_max "fastce_lane_max"(const void* lanes)
    double lane_sum "fastce_lane_sum"(const void* lanes)
    double wide_lane_sum "fastce_wide_lane_sum"(const double* lanes)
    float max_of_floats "fastce_max_of_row"(Format format, const void* x, Py_ssize_t n)
    double max_of_doubles "fastce_max_of_doubles"(Format format, const void* x, Py_ssize_t n)
    void exp_and_fold "fastce_exp_and_fold"(
        const void* x, Py_ssize_t pitch, int n_groups, const void* row_max, double scale, void* e, Py_ssize_t e_pitch,
        void* all_terms, void* rest)
    void exp_row "fastce_exp_row"(
        Format format, const void* x, Py_ssize_t n, double row_max, double scale, void* e, const char* ahead,
        Py_ssize_t size, bint is_long, void* sums)
    void fold "fastce_fold"(const void* a, void* sums)
    void fold_rest "fastce_fold_rest"(const void* e, void* sums)
    void fold_shifted "fastce_fold_shifted"(
        const void* a, const void* x, const void* row_max, bint has_zeros, void* sums)
    ctypedef struct TargetSums "fastce_target_sums":
        void* wd
        bint has_zero_w
        void* wt
        void* wtd
        bint has_w
        void* t
        void* td
    void fold_targets "fastce_fold_targets"(
        const void* x, const void* row_max, const void* w, bint is_padded, const void* t, const TargetSums* sums)
    void fold_argmax "fastce_fold_argmax"(
        const void* x, const void* row_max, int32_t base, int32_t group_step, int32_t lane_step, int32_t* first)
    void fold_max_and_w "fastce_fold_max_and_w"(const void* x, const void* w, void* row_max, void* w_at_max)
    void fold_moment "fastce_fold_moment"(const void* e, const void* w, const void* w_at_max, void* sums)
    void product "fastce_product"(const void* a, const void* b, void* out)
    void scale_exp "fastce_scale_exp"(const void* e, const void* alpha, void* out)
    void multiply "fastce_multiply"(void* e, Py_ssize_t n, double factor)
    void write_gradient "fastce_write_gradient"(
        const void* e, const void* alpha, const void* beta, const void* w, const void* gamma, const void* t, void* out)
    void write_gradient_in_place "fastce_write_gradient_in_place"(
        void* e, Py_ssize_t n, double alpha, double beta, const void* w, double gamma, const void* t)
    void store "fastce_store_tile"(char* data, Py_ssize_t stride, Py_ssize_t n, const void* tile)
    void write_log "fastce_write_log"(
        const void* x, const void* row_max, double scale, const void* log_sum, void* out)


cdef inline double d_unit() noexcept nogil:
    return 1.52587890625e-05


cdef inline bint is_plain(const void* data, Py_ssize_t stride, real like) noexcept nogil:
    """Return True if numbers `stride` bytes apart from `data` on are an ordinary C array."""
    return stride == <Py_ssize_t>sizeof(real) and <size_t>data % sizeof(real) == 0


cdef inline bint needs_rest(double all_terms, real like) noexcept nogil:
    """Return True if a sum of exponentials is less than twice its largest term: only there does 1 - p cancel."""
    return <int>(exp_unit(like) <= all_terms) & <int>(all_terms < 2 * exp_unit(like))  # `and` would be a jump


cdef inline double rest_of(double all_terms, double rest, real like) noexcept nogil:
    """Return the sum of exponentials without one of the largest, from those with all and, if needed, with none."""
    return (rest if needs_rest(all_terms, like) else all_terms - exp_unit(like)) / exp_unit(like)


cdef inline TargetSums target_sums(const Task* task, real* sums) noexcept nogil:
    """Return which of `sums` label smoothing and class probabilities ask for."""
    cdef TargetSums asked
    asked.wd = sums + 16 * W_D if task.sum_weight else NULL
    asked.has_zero_w = task.has_zero_weight
    asked.wt = sums + 16 * WT
    asked.wtd = sums + 16 * WT_D
    asked.has_w = task.weight != NULL
    asked.t = sums + 16 * T if task.log_prob != NULL else NULL
    asked.td = sums + 16 * T_D
    return asked
