"""The loops of the kernel of few classes over a tile of 64 rows, in C: see `simd/few.h`."""
from libc.stdint cimport int32_t

cdef extern from "simd/few.h" nogil:
    # A way through memory in pieces: 64 numbers of a class.
    ctypedef struct ChunkCursor "fastce_chunk_cursor":
        const char* at
        Py_ssize_t n_left    # pieces
        Py_ssize_t run       # pieces that follow each other in memory, and of them
        Py_ssize_t run_left
        Py_ssize_t run_stride  # from the end of a run to the next
    # The rows to come: their logits are fetched piece by piece while exponentials are computed.
    ctypedef struct Prefetcher "fastce_prefetcher":
        ChunkCursor logits
        ChunkCursor prefetch_cursor  # the strip that is asked for
        char* target         # where the next piece goes; NULL: the logits are only asked for
        Py_ssize_t target_stride
        Py_ssize_t strip     # rows
        Py_ssize_t ahead     # rows from what is fetched to what is asked for
        Py_ssize_t next_strip_start  # the row that begins the next strip
    void fetch_piece "fastce_fetch_piece"(Prefetcher* prefetcher, Py_ssize_t size)
    void find_maxima_and_targets "fastce_maxima_and_targets"(
        const void* x, Py_ssize_t pitch, int n_classes, const int32_t* y, void* row_max, void* x_patch)
    void shift_and_scale "fastce_shift_and_scale"(
        void* x, Py_ssize_t pitch, int n_classes, double scale, void* shift)
    # The next rows are fetched meanwhile.
    void exp_and_sum "fastce_exp_and_sum"(
        void* x, Py_ssize_t pitch, int n_rows, int n_classes, const void* row_max, const int32_t* y, void* excl_target,
        Prefetcher* prefetcher)
    void scale_and_patch "fastce_scale_and_patch"(
        const void* x, Py_ssize_t pitch, Py_ssize_t n, int n_classes, const void* alpha, const int32_t* y,
        const void* grad_patch, void* out, Py_ssize_t out_pitch)
    bint any_negative "fastce_any_negative"(const int32_t* y)  # of 64
    void finish_rows "fastce_finish_rows"(
        int n_rows, double scale, double factor, bint with_grad, const int32_t* y, bint has_skipped,
        const void* row_max, const void* x_patch, const void* terms, void* loss, void* alpha, void* grad_patch)
