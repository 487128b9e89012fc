/* Stores past the caches, for results that exceed them: a line that is written whole need not be read before.

   A line that is stored to in two ways is written twice, and one that is read after such a store comes from memory. So
   whatever belongs into a line is put there first. */
#ifndef FASTCE_STREAM_H
#define FASTCE_STREAM_H

#include "simd/simd.h"

/* Whether there are such stores, and vectors wide enough for memory to be what is waited for. */
#if FASTCE_IS_WIDE
#define FASTCE_STREAMS 1
/* Other threads see what comes after this not before what came before it. */
FASTCE_INLINE void fastce_end_streams(void) { _mm_sfence(); }
#else
#define FASTCE_STREAMS 0
FASTCE_INLINE void fastce_end_streams(void) {}
#endif

#define FASTCE_TEMPLATE "simd/stream.h"
#include "simd/for_types.h"

#define fastce_stream_product(e, n, factor, patch, value, out)                 \
    FASTCE_OF_VECTORS(stream_product, *(out))(e, n, factor, patch, value, out)

#elif defined(REAL)

#if FASTCE_STREAMS
enum { F(line) = 64 / sizeof(REAL) };
#define LINE F(line)

/* The whole lines of `out` from k to `stop`. */
FASTCE_INLINE void F(stream_lines)(const REAL* e, ptrdiff_t k, ptrdiff_t stop, VEC f, REAL* out) {
    for (; k < stop; k += LINE) {
        FASTCE_UNROLL
        for (int j = 0; j < LINE; j += WIDTH)
            FASTCE_NAME(FASTCE_X86(stream), PS, )(out + k + j, F(load)(e + k + j) * f);
    }
}
#endif

/* out = e * factor, but `value` at `patch`, if that is one of the n. */
FASTCE_NOINLINE void F(stream_product)(
    const REAL* e, ptrdiff_t n, REAL factor, ptrdiff_t patch, REAL value, REAL* out) {
    ptrdiff_t k = 0;
#if FASTCE_STREAMS
    const VEC f = F(fill)(factor);
    const ptrdiff_t head = (ptrdiff_t)(-((uintptr_t)out / sizeof(REAL)) % LINE);
    if (head + LINE <= n) {
        const ptrdiff_t stop = head + (n - head) / LINE * LINE;
        REAL line[LINE];
        for (; k < head; k++) out[k] = e[k] * factor;
        if (head <= patch && patch < stop) {
            k = head + (patch - head) / LINE * LINE;
            for (int j = 0; j < LINE; j++) line[j] = e[k + j] * factor;
            line[patch - k] = value;
            F(stream_lines)(e, head, k, f, out);
            F(stream_lines)(line, 0, LINE, F(fill)(1), out + k);
            k += LINE;
            patch = -1;
        }
        F(stream_lines)(e, k, stop, f, out);
        k = stop;
    }
#endif
    for (; k < n; k++) out[k] = e[k] * factor;
    if (0 <= patch && patch < n) out[patch] = value;
}

#undef LINE
#endif
