"""What depends on the compiler, OpenMP and the CPU, and what they have to say of themselves."""

cdef extern from "host/platform.h" nogil:
    const int CYTHON_HEX_VERSION
    const int FASTCE_OPENMP
    const char* FASTCE_COMPILER
    int fastce_max_threads()
    int fastce_startable(int n)
    void fastce_forget_started()
    int fastce_has_avx2()
    int fastce_has_avx512()
    void read_once "fastce_read_once"(const void* copy)
    void* not_inlined "fastce_own_function"(void* function)
    void end_vectors "fastce_end_vectors"()
    Py_ssize_t cache_bytes "fastce_cache_bytes"()
