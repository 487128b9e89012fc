/* The loops of the kernel of few classes that copies them: over a tile of 64 rows, class by class.

   Design
   ------
   1. What is multiplied or compared row by row stays in registers: a few vectors of rows at a time, all classes of
      them.
   2. The gradients of the targets are put in by comparing each class with them: GCC would make scatter instructions
      of indexed stores, which are slow.
   3. The scalars of rows take several loops, for a core looks only so many instructions ahead: a loop that did all of
      it for one vector after the other took a fifth longer with AVX2.
   4. The next rows' logits are fetched piece by piece while exponentials are computed; see `kernel/few_rows.pxd`. */
#ifndef FASTCE_FEW_H
#define FASTCE_FEW_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "simd/few_scalars.h"
#include "simd/math.h"
#include "simd/prefetch.h"
#include "simd/simd.h"
#include "simd/sums.h"

#define FASTCE_PIECE 64
/* Bytes from rows that are asked for into L1 to those that are asked for into L2: L1 can wait for few lines at a time,
   and what comes from memory takes long. 400000 x 32 took 0.8 of the time that it took without, and 1.15 times as long
   where L1 alone was asked for 8 KiB earlier; 32 KiB were no better. */
#define FASTCE_FEW_FAR 16384

/* A way through memory in pieces: 64 numbers of a class. */
typedef struct {
    const char* at;
    ptrdiff_t n_left;        /* pieces */
    ptrdiff_t run, run_left; /* pieces that follow each other in memory, and of them */
    ptrdiff_t run_stride;    /* from the end of a run to the next */
} fastce_chunk_cursor;

/* The rows to come: their logits are fetched piece by piece while exponentials are computed. */
typedef struct {
    fastce_chunk_cursor logits, prefetch_cursor; /* `prefetch_cursor`: the strip that is asked for */
    char* target;                                /* where the next piece goes; NULL: the logits are only asked for */
    ptrdiff_t target_stride;
    ptrdiff_t strip;            /* rows */
    ptrdiff_t ahead;            /* rows from what is fetched to what is asked for */
    ptrdiff_t next_strip_start; /* the row that begins the next strip */
} fastce_prefetcher;

/* Goes a piece of so many bytes further; returns 1 if a run ended. */
FASTCE_INLINE int fastce_step(fastce_chunk_cursor* cursor, ptrdiff_t n_bytes) {
    cursor->at += n_bytes;
    cursor->n_left--;
    if (--cursor->run_left > 0) return 0;
    cursor->run_left = cursor->run;
    cursor->at += cursor->run_stride;
    return 1;
}

/* Asks for a piece; a function of its own, for loops that fetch planes must not run out of registers. */
FASTCE_NOINLINE void fastce_ask_for_piece(fastce_chunk_cursor* cursor, ptrdiff_t n_bytes) {
    for (ptrdiff_t j = 0; j < n_bytes; j += 64) {
        FASTCE_PREFETCH_L1(cursor->at + j);
        FASTCE_PREFETCH_L2(cursor->at + j + FASTCE_FEW_FAR);
    }
    fastce_step(cursor, n_bytes);
}

/* Fetches 64 numbers of so many bytes. */
FASTCE_INLINE void fastce_fetch_piece(fastce_prefetcher* prefetcher, ptrdiff_t size) {
    const ptrdiff_t n_bytes = FASTCE_PIECE * size;
    if (prefetcher->prefetch_cursor.n_left > 0) {
        for (ptrdiff_t j = 0; j < n_bytes; j += 64) FASTCE_PREFETCH_L2(prefetcher->prefetch_cursor.at + j);
        fastce_step(&prefetcher->prefetch_cursor, n_bytes);
    }
    if (prefetcher->logits.n_left == 0) return;
    if (prefetcher->target == NULL) {
        fastce_ask_for_piece(&prefetcher->logits, n_bytes);
        return;
    }
    memcpy(prefetcher->target, prefetcher->logits.at, n_bytes);
    prefetcher->target += n_bytes;
    if (fastce_step(&prefetcher->logits, n_bytes)) prefetcher->target += prefetcher->target_stride;
}

/* Whether there is a negative one among 64 numbers. */
FASTCE_INLINE int fastce_any_negative(const int32_t* y) {
    fastce_ints_floats signs = fastce_load_ints_floats(y);
    int32_t lanes[FASTCE_FLOATS], sign = 0;
    for (int i = FASTCE_FLOATS; i < 64; i += FASTCE_FLOATS) signs |= fastce_load_ints_floats(y + i);
#if FASTCE_VECTOR_BYTES == 64
    (void)lanes, (void)sign;
    return _mm512_movepi32_mask((__m512i)signs) != 0;
#else
    memcpy(lanes, &signs, sizeof(lanes));
    for (int i = 0; i < FASTCE_FLOATS; i++) sign |= lanes[i];
    return sign < 0;
#endif
}

#define FASTCE_TEMPLATE "simd/few.h"
#include "simd/for_types.h"

#define fastce_maxima_and_targets(x, pitch, n_classes, y, row_max, x_patch)               \
    FASTCE_OF_VECTORS(maxima_and_targets, *(x))(x, pitch, n_classes, y, row_max, x_patch)
#define fastce_shift_and_scale(x, pitch, n_classes, scale, shift)               \
    FASTCE_OF_VECTORS(shift_and_scale, *(x))(x, pitch, n_classes, scale, shift)
#define fastce_exp_and_sum(x, pitch, n_rows, n_classes, row_max, y, excl_target, prefetcher)               \
    FASTCE_OF_VECTORS(exp_and_sum, *(x))(x, pitch, n_rows, n_classes, row_max, y, excl_target, prefetcher)
#define fastce_scale_and_patch(x, pitch, n, n_classes, alpha, y, grad_patch, out, out_pitch)               \
    FASTCE_OF_VECTORS(scale_and_patch, *(x))(x, pitch, n, n_classes, alpha, y, grad_patch, out, out_pitch)
#define fastce_finish_rows(                                                                                 \
    n_rows, scale, factor, with_grad, y, has_skipped, row_max, x_patch, terms, loss, alpha, grad_patch)     \
    FASTCE_OF_VECTORS(finish_rows, *(loss))(                                                                \
        n_rows, scale, factor, with_grad, y, has_skipped, row_max, x_patch, terms, loss, alpha, grad_patch)
#elif defined(REAL)

enum {
    /* Vectors of rows at a time. */
    F(together) = 4
};
#define TOGETHER F(together)

/* The maximum of 64 rows. */
FASTCE_INLINE void F(maxima)(const REAL* x, ptrdiff_t pitch, int n_classes, REAL* row_max) {
    for (int i = 0; i < 64; i += TOGETHER * WIDTH) {
        VEC m[TOGETHER];
        FASTCE_UNROLL
        for (int g = 0; g < TOGETHER; g++) m[g] = F(load)(x + i + g * WIDTH);
        for (int k = 0; k < n_classes; k++) {
            FASTCE_UNROLL
            for (int g = 0; g < TOGETHER; g++) m[g] = F(max)(F(load)(x + k * pitch + i + g * WIDTH), m[g]);
        }
        FASTCE_UNROLL
        for (int g = 0; g < TOGETHER; g++) F(store)(row_max + i + g * WIDTH, m[g]);
    }
}

/* The maximum of 64 rows, and the logits of their targets, anything finite for rows without. */
FASTCE_INLINE void F(maxima_and_targets)(
    const REAL* x, ptrdiff_t pitch, int n_classes, const int32_t* y, REAL* row_max, REAL* x_patch) {
    int32_t place[64];
    F(maxima)(x, pitch, n_classes, row_max);
    for (int i = 0; i < 64; i++) place[i] = (y[i] > 0 ? y[i] : 0) * (int32_t)pitch + i;
#if IS_FLOAT && FASTCE_VECTOR_BYTES == 64
    for (int i = 0; i < 64; i += 16) F(store)(x_patch + i, _mm512_i32gather_ps((__m512i)F(load_ints)(place + i), x, 4));
#elif IS_FLOAT && FASTCE_VECTOR_BYTES == 32
    for (int i = 0; i < 64; i += 8) F(store)(x_patch + i, _mm256_i32gather_ps(x, (__m256i)F(load_ints)(place + i), 4));
#else
    for (int i = 0; i < 64; i++) x_patch[i] = x[place[i]];
#endif
}

/* x becomes scale * (x - shift), and the shift 0. */
FASTCE_INLINE void F(shift_and_scale)(REAL* x, ptrdiff_t pitch, int n_classes, REAL scale, REAL* shift) {
    for (int k = 0; k < n_classes; k++)
        for (int i = 0; i < 64; i += WIDTH)
            F(store)(x + k * pitch + i, scale * (F(load)(x + k * pitch + i) - F(load)(shift + i)));
    for (int i = 0; i < 64; i += WIDTH) F(store)(shift + i, F(fill)(0));
}

/* n = 4, 2 or 1 classes from class k on, and as many pieces fetched, spread evenly. */
FASTCE_INLINE void F(exp_classes)(REAL* x, ptrdiff_t pitch, int n_rows, int n, const REAL* row_max, const int32_t* y,
    int32_t k, REAL* excl_target, fastce_prefetcher* prefetcher) {
    for (int i = 0; i < n_rows; i += WIDTH) {
        VEC e[4];
        const VEC m = F(load)(row_max + i);
        const INTS t = F(load_ints)(y + i);
        FASTCE_UNROLL
        for (int g = 0; g < n; g++) {
            e[g] = F(exp_unless)(t, k + g, F(load)(x + (k + g) * pitch + i) - m);
        }
        FASTCE_UNROLL
        for (int g = 0; g < n; g++) F(store)(x + (k + g) * pitch + i, e[g]);
        F(add_to)(excl_target + i, F(total)(e, n));
        if ((i + WIDTH) % (64 / n) == 0) fastce_fetch_piece(prefetcher, sizeof(REAL));
    }
}

FASTCE_INLINE void F(exp_and_sum_of)(REAL* x, ptrdiff_t pitch, int n_rows, int n_classes, const REAL* row_max,
    const int32_t* y, REAL* excl_target, fastce_prefetcher* prefetcher) {
    int32_t k = 0;
    for (int i = 0; i < n_rows; i += WIDTH) F(store)(excl_target + i, F(fill)(0)); /* no call of memset */
    for (; k + 4 <= n_classes; k += 4) F(exp_classes)(x, pitch, n_rows, 4, row_max, y, k, excl_target, prefetcher);
    if (k + 2 <= n_classes) {
        F(exp_classes)(x, pitch, n_rows, 2, row_max, y, k, excl_target, prefetcher);
        k += 2;
    }
    if (k < n_classes) F(exp_classes)(x, pitch, n_rows, 1, row_max, y, k, excl_target, prefetcher);
}

/* Of fewer rows than a tile: code of its own, for the loops of whole tiles must not run out of registers. */
FASTCE_NOINLINE void F(exp_and_sum_part)(REAL* x, ptrdiff_t pitch, int n_rows, int n_classes, const REAL* row_max,
    const int32_t* y, REAL* excl_target, fastce_prefetcher* prefetcher) {
    F(exp_and_sum_of)(x, pitch, n_rows, n_classes, row_max, y, excl_target, prefetcher);
}

/* The logits of 16, 32, 48 or 64 rows become exponentials, but 0 for the targets; writes their sums. */
FASTCE_INLINE void F(exp_and_sum)(REAL* x, ptrdiff_t pitch, int n_rows, int n_classes, const REAL* row_max,
    const int32_t* y, REAL* excl_target, fastce_prefetcher* prefetcher) {
    if (n_rows == 64)
        F(exp_and_sum_of)(x, pitch, 64, n_classes, row_max, y, excl_target, prefetcher);
    else
        F(exp_and_sum_part)(x, pitch, n_rows, n_classes, row_max, y, excl_target, prefetcher);
}

/* The exponentials of n rows, whole tiles of them, become gradients. */
FASTCE_INLINE void F(scale_and_patch)(const REAL* x, ptrdiff_t pitch, ptrdiff_t n, int n_classes, const REAL* alpha,
    const int32_t* y, const REAL* grad_patch, REAL* out, ptrdiff_t out_pitch) {
    for (ptrdiff_t i = 0; i < n; i += TOGETHER * WIDTH) {
        VEC a[TOGETHER], p[TOGETHER], e;
        INTS t[TOGETHER];
        FASTCE_UNROLL
        for (int g = 0; g < TOGETHER; g++) {
            t[g] = F(load_ints)(y + i + g * WIDTH);
            a[g] = F(load)(alpha + i + g * WIDTH);
            p[g] = F(load)(grad_patch + i + g * WIDTH);
        }
        for (int k = 0; k < n_classes; k++) {
            FASTCE_UNROLL
            for (int g = 0; g < TOGETHER; g++) {
                e = F(load)(x + k * pitch + i + g * WIDTH);
                F(store)(out + k * out_pitch + i + g * WIDTH, F(select)(F(is)(t[g], k), p[g], e * a[g]));
            }
        }
    }
}

/* x, but 0 where the row is skipped. */
FASTCE_INLINE VEC F(unless_skipped)(INTS y, VEC x) { return F(select)(F(is_less)(y, 0), F(fill)(0), x); }

FASTCE_INLINE void F(clear_skipped)(int n_rows, const int32_t* y, REAL* x) {
    for (int i = 0; i < n_rows; i += WIDTH) F(store)(x + i, F(unless_skipped)(F(load_ints)(y + i), F(load)(x + i)));
}

/* From the sums of all terms but the targets', times EXP_UNIT, to losses and, if asked, what makes gradients of
   exponentials; for 16, 32, 48 or 64 rows. */
FASTCE_NOINLINE void F(finish_rows)(int n_rows, REAL scale, double factor, int with_grad, const int32_t* y,
    int has_skipped, const REAL* row_max, const REAL* x_patch, const REAL* terms, REAL* loss, REAL* alpha,
    REAL* grad_patch) {
    const REAL unit = 1 / EXP_UNIT;
    const VEC unscaled = F(fill)((REAL)(factor * unit)); /* the gradient's factor, freed of EXP_UNIT */
    VEC d[64 / WIDTH], excl_max[64 / WIDTH], inverse[64 / WIDTH];
    for (int i = 0, v = 0; i < n_rows; i += WIDTH, v++) {
        const VEC excl_target = F(load)(terms + i);
        VEC e, whole;
        d[v] = scale * (F(load)(x_patch + i) - F(load)(row_max + i));
        e = F(exp)(d[v]);
        excl_max[v] = F(sumexp_excl)(excl_target, e, F(fill)(EXP_UNIT)) * unit;
        whole = (excl_target + e) * unit;
        inverse[v] = F(inverse)(whole);
        if (!with_grad) continue;
        F(store)(grad_patch + i, F(gradient_of_target)(excl_target, whole, inverse[v], unscaled));
        F(store)(alpha + i, F(grad_alpha)(unscaled, F(fill)(1), inverse[v]));
    }
    for (int i = 0, v = 0; i < n_rows; i += WIDTH, v++) F(store)(loss + i, F(loss)(d[v], excl_max[v], inverse[v]));
    if (!has_skipped) return;
    F(clear_skipped)(n_rows, y, loss);
    if (!with_grad) return;
    F(clear_skipped)(n_rows, y, grad_patch);
    F(clear_skipped)(n_rows, y, alpha);
}

#undef TOGETHER
#endif
