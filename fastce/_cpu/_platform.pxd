"""What depends on the compiler, OpenMP and the CPU, and what they have to say of themselves."""

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define FASTCE_OPENMP 1
    #define fastce_max_threads() omp_get_max_threads()
    #else
    #define FASTCE_OPENMP 0
    #define fastce_max_threads() 1
    #endif
    #if defined(__clang__)
    #define FASTCE_COMPILER "Clang " __clang_version__
    #elif defined(__GNUC__)
    #define FASTCE_COMPILER "GCC " __VERSION__
    #elif defined(_MSC_VER)
    #define FASTCE_COMPILER "MSVC"
    #else
    #define FASTCE_COMPILER "unknown"
    #endif
    #if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    /* These also ask whether the operating system saves the registers. */
    static int fastce_has_avx2(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
    static int fastce_has_avx512(void) {
        return fastce_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    }
    #else
    static int fastce_has_avx2(void) { return 0; }
    static int fastce_has_avx512(void) { return 0; }
    #endif
    /* The same function, but no compiler knows that, so that none inlines it. */
    static CYTHON_INLINE void* fastce_own_function(void* function) {
    #if defined(__GNUC__)
        __asm__("" : "+r"(function));
    #endif
        return function;
    }
    """
    const int CYTHON_HEX_VERSION
    const int FASTCE_OPENMP
    const char* FASTCE_COMPILER
    int fastce_max_threads() noexcept nogil
    int fastce_has_avx2() noexcept nogil
    int fastce_has_avx512() noexcept nogil
    void* own_function "fastce_own_function"(void* function) noexcept nogil
