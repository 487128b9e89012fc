/* Includes the header FASTCE_TEMPLATE once for vectors of floats and once for vectors of doubles, and if FASTCE_SCALARS
   is defined once for each type alone. Such a header has two parts: what all types share, which ends by including this
   file, and, for each type, functions in terms of

       REAL     float or double; IS_FLOAT says which
       VEC      a vector of WIDTH such numbers, or one number
       INTS     as many integers of the same size
       BITS     as many unsigned ones
       MASK     the result of a comparison
       F(name)  the name for this type: fastce_name_floats, _doubles, _float or _double

   Vectors are GCC's and Clang's: operators work on them as on numbers, on all instruction sets. Compilers without get
   "vectors" of one number. PS, EPI and NEON end the names of intrinsics. No header may include a template from its part
   for each type. */

#ifdef FASTCE_TEMPLATE

#define FASTCE_PASTE_3(a, b, c) a##b##c
#define FASTCE_NAME(a, b, c) FASTCE_PASTE_3(a, b, c)
#define F(name) FASTCE_NAME(fastce_, name, SUFFIX)
#define VEC F(vec)
#define INTS F(ints)
#define BITS F(bits)
#define MASK F(mask)

#define REAL float
#define INT int32_t
#define UINT uint32_t
#define IS_FLOAT 1
#define PS _ps
#define NEON _f32
#define EPI _epi32
#define EXP_UNIT 4294967296.0f /* 2^32, what `exp` returns for 0 */
#define SUFFIX _floats
#define WIDTH FASTCE_FLOATS
#include FASTCE_TEMPLATE
#undef WIDTH
#undef SUFFIX
#ifdef FASTCE_SCALARS
#define SUFFIX _float
#define WIDTH 1
#include FASTCE_TEMPLATE
#undef WIDTH
#undef SUFFIX
#endif
#undef EXP_UNIT
#undef EPI
#undef NEON
#undef PS
#undef IS_FLOAT
#undef UINT
#undef INT
#undef REAL

#define REAL double
#define INT int64_t
#define UINT uint64_t
#define IS_FLOAT 0
#define PS _pd
#define NEON _f64
#define EPI _epi64
#define EXP_UNIT 18446744073709551616.0 /* 2^64 */
#define SUFFIX _doubles
#define WIDTH FASTCE_DOUBLES
#include FASTCE_TEMPLATE
#undef WIDTH
#undef SUFFIX
#ifdef FASTCE_SCALARS
#define SUFFIX _double
#define WIDTH 1
#include FASTCE_TEMPLATE
#undef WIDTH
#undef SUFFIX
#endif
#undef EXP_UNIT
#undef EPI
#undef NEON
#undef PS
#undef IS_FLOAT
#undef UINT
#undef INT
#undef REAL

#undef MASK
#undef BITS
#undef INTS
#undef VEC
#undef F
#undef FASTCE_NAME
#undef FASTCE_PASTE_3
#undef FASTCE_SCALARS
#undef FASTCE_TEMPLATE

#endif
