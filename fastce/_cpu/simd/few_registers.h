/* The kernel of up to 16 classes: a vector of rows at a time, all classes of them in registers.

   Design
   ------
   1. The number of classes is a constant of the code, which is written once and compiled for each number. Logits stay
      in registers until they are exponentials; where these are too few, the compiler puts some on the stack.
   2. Tiles of 64 rows take three loops: exponentials and sums, what follows from the sums, gradients. Scalars are a
      chain of a hundred cycles: in one loop, everything after it stands in the way of the next vector of rows, and 10
      classes took 1.15 times as long. And what follows from the sums is not compiled for each number of classes.
   3. Rows whose classes lie side by side are transposed between memory and registers, see `transpose_few.h`. One copy of
      the arithmetic stands between two ways in and two ways out, so that a row has the same bits whichever it takes.
   4. The rows that do not fill a vector are copied to where rows that are skipped fill it up.
   5. Targets are compared with classes and are never an index, so they need not be checked again.
   6. Of two classes one is the largest and the other what remains: one exponential does, log(1 + x) has an x of at most
      1, and one gradient is the other's negative.

   Of 10 floats with AVX-512 on Zen 4, a third of the time goes to exponentials, a third to transposition, an eighth to
   what follows from the sums; rows in L2 take nine tenths of the time of those that are not. Rejected: two or four
   vectors of rows side by side, the gradients of one tile between the exponentials of the next, stores of 32 bytes, and
   lines asked for into L2 farther ahead. None took less than 0.97 of the time of 10 classes. */
#ifndef FASTCE_FEW_REGISTERS_H
#define FASTCE_FEW_REGISTERS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "formula.h"
#include "simd/few_scalars.h"
#include "simd/math.h"
#include "simd/prefetch.h"
#include "simd/simd.h"
#include "simd/sums.h"
#include "simd/transpose_few.h"

#define FASTCE_MOST_IN_REGISTERS 16
#define FASTCE_FEW_TILE 64 /* rows */

/* What is done to some rows. A pitch is the distance of a row's classes, in numbers, where the rows lie side by side; 0
   where the classes do, and the rows follow each other. */
typedef struct {
    const void* x;
    void* out; /* where gradients go; may be x; NULL: they are not asked for */
    ptrdiff_t x_pitch, out_pitch;
    const int64_t* target;
    const void* upstream; /* a factor for each row's gradient, or NULL */
    void* loss;
    double scale, factor; /* of the logits, at least 1, and of the gradient */
    int64_t ignore_index; /* the lower half of it must be no class, unless it is that class */
} fastce_few_task;

/* Bytes from what is loaded to what is asked for: rows whose classes lie side by side, and each plane. */
enum { FASTCE_FEW_ROWS_AHEAD = 4096, FASTCE_FEW_PLANES_AHEAD = 1024 };

#define FASTCE_TEMPLATE "simd/few_registers.h"
#include "simd/for_types.h"

#define fastce_do_few_rows(like, task, n, n_classes) FASTCE_OF_VECTORS(do_few_rows, like)(task, n, n_classes)

#elif defined(REAL)

/* ---- masks ---- */

FASTCE_INLINE int F(any)(MASK mask) {
#if WIDTH == 1 || FASTCE_VECTOR_BYTES == 64
    return mask != 0;
#elif FASTCE_VECTOR_BYTES == 32
    return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(FASTCE_X86)
    return _mm_movemask_ps((__m128)mask) != 0;
#else
    int any = 0;
    for (int j = 0; j < WIDTH; j++) any |= mask[j] != 0;
    return any;
#endif
}

FASTCE_INLINE MASK F(equal)(INTS x, INTS y) {
#if WIDTH > 1 && FASTCE_VECTOR_BYTES == 64
    return FASTCE_NAME(_mm512_cmpeq, EPI, _mask)((__m512i)x, (__m512i)y);
#else
    return x == y;
#endif
}
FASTCE_INLINE INTS F(fill_ints)(INT value) {
#if WIDTH == 1
    return value;
#else
    return value - (INTS){0};
#endif
}

/* ---- targets ---- */

/* The low halves where numbers have 32 bits. */
FASTCE_INLINE INTS F(load_targets)(const int64_t* target) {
    INTS y;
#if WIDTH == 1
    y = (INT)*target;
#elif !IS_FLOAT
    memcpy(&y, target, sizeof(y));
#elif FASTCE_VECTOR_BYTES == 64
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    y = (INTS)_mm512_permutex2var_epi32(_mm512_loadu_si512(target), even, _mm512_loadu_si512(target + 8));
#elif FASTCE_VECTOR_BYTES == 32
    const __m256 low = _mm256_loadu_ps((const float*)target), high = _mm256_loadu_ps((const float*)(target + 4));
    y = (INTS)_mm256_permute4x64_epi64((__m256i)_mm256_shuffle_ps(low, high, 0x88), 0xD8);
#elif defined(FASTCE_X86)
    y = (INTS)_mm_shuffle_ps(_mm_loadu_ps((const float*)target), _mm_loadu_ps((const float*)(target + 2)), 0x88);
#else
    for (int j = 0; j < WIDTH; j++) y[j] = (INT)target[j];
#endif
    return y;
}

/* ---- arithmetic ---- */

/* What passes from one loop over a tile to the next. Of pairs, `d` is the distance from the other class, and `target_e`
   the smaller term. */
typedef struct {
    REAL e[FASTCE_MOST_IN_REGISTERS * FASTCE_FEW_TILE]; /* exponentials: of a vector of rows class by class */
    REAL d[FASTCE_FEW_TILE];                            /* the target's distance from the largest logit */
    REAL excl_target[FASTCE_FEW_TILE];                  /* the sum of all terms but the target's */
    REAL target_e[FASTCE_FEW_TILE];                     /* that term */
    INT y[FASTCE_FEW_TILE];
    REAL alpha[FASTCE_FEW_TILE]; /* of other classes the gradient, from exponentials; of pairs that of the first */
    REAL patch[FASTCE_FEW_TILE]; /* the gradient of the target */
} F(few_tile);

FASTCE_INLINE INTS F(load_own_ints)(const INT* source) {
    INTS x;
    memcpy(&x, source, sizeof(x));
    return x;
}

/* The largest of a few vectors, by halves, for short chains; x is overwritten. */
FASTCE_INLINE VEC F(max_of_few)(const int n, VEC* x) {
    FASTCE_UNROLL
    for (int step = 1; step < 16; step *= 2) {
        FASTCE_UNROLL
        for (int k = 0; k + step < n; k += 2 * step) x[k] = F(max)(x[k + step], x[k]);
    }
    return x[0];
}

/* Exponentials of a vector of rows, and their sums; returns whether any row is skipped. */
FASTCE_INLINE int F(exp_few)(
    const int n_classes, VEC* x, INTS y, INTS ignored, REAL scale, F(few_tile) * tile, int at) {
    const VEC zero = F(fill)(0);
    VEC m[FASTCE_MOST_IN_REGISTERS], e[FASTCE_MOST_IN_REGISTERS], d = zero, target_e = zero, excl_target = zero;
    const MASK skipped = F(equal)(y, ignored);
    const int has_skipped = F(any)(skipped);
    if (has_skipped) { /* whatever is there, NaN included */
        FASTCE_UNROLL
        for (int k = 0; k < n_classes; k++) x[k] = F(select)(skipped, zero, x[k]);
    }
    FASTCE_UNROLL
    for (int k = 0; k < n_classes; k++) m[k] = x[k];
    m[0] = F(max_of_few)(n_classes, m);
    if (scale != 1) {
        FASTCE_UNROLL
        for (int k = 0; k < n_classes; k++) x[k] = scale * (x[k] - m[0]);
        m[0] = zero;
    }
    FASTCE_UNROLL
    for (int k = 0; k < n_classes; k++) {
        const MASK is_target = F(is)(y, k);
        const VEC shifted = x[k] - m[0];
        e[k] = F(exp)(shifted);
        d = F(select)(is_target, shifted, d);
        target_e = F(select)(is_target, e[k], target_e);
        F(store)(tile->e + at * n_classes + k * WIDTH, e[k]);
        e[k] = F(unless)(y, k, e[k]);
    }
    /* In the order of few.h, by which some planes go: a row has the same bits in all. */
    FASTCE_UNROLL
    for (int k = 0; k + 4 <= n_classes; k += 4) excl_target = excl_target + F(total)(e + k, 4);
    if (n_classes % 4 >= 2) excl_target = excl_target + F(total)(e + n_classes / 4 * 4, 2);
    if (n_classes % 2 == 1) excl_target = excl_target + e[n_classes - 1];
    F(store)(tile->d + at, d);
    F(store)(tile->target_e + at, target_e);
    F(store)(tile->excl_target + at, excl_target);
    return has_skipped;
}

/* From sums to losses and what makes gradients of exponentials: two loops, for a core looks only so many instructions
   ahead. */
FASTCE_NOINLINE void F(finish_few)(F(few_tile) * tile, int n, VEC unscaled, REAL* loss) {
    const REAL unit = 1 / EXP_UNIT;
    VEC excl_max[FASTCE_FEW_TILE / WIDTH], inverse[FASTCE_FEW_TILE / WIDTH];
    for (int i = 0, v = 0; i < n; i += WIDTH, v++) {
        const VEC excl_target = F(load)(tile->excl_target + i), e = F(load)(tile->target_e + i);
        const VEC whole = (excl_target + e) * unit;
        excl_max[v] = F(sumexp_excl)(excl_target, e, F(fill)(EXP_UNIT)) * unit;
        inverse[v] = F(inverse)(whole);
        F(store)(tile->alpha + i, F(grad_alpha)(unscaled, F(fill)(1), inverse[v]));
        F(store)(tile->patch + i, F(gradient_of_target)(excl_target, whole, inverse[v], unscaled));
    }
    for (int i = 0, v = 0; i < n; i += WIDTH, v++)
        F(store)(loss + i, F(loss)(F(load)(tile->d + i), excl_max[v], inverse[v]));
}

/* Changes the sign of the second class's. */
FASTCE_INLINE VEC F(of_first)(INTS y, VEC x) { return F(of_bits)(F(bits_of)(x) ^ (BITS)y << (8 * sizeof(REAL) - 1)); }

/* Rows of two classes: the target's distance from the other class, and the exponential of its negative size. */
FASTCE_INLINE void F(exp_pair)(const VEC* x, INTS y, REAL scale, F(few_tile) * tile, int at) {
    const VEC z = scale * F(of_first)(y, x[0] - x[1]);
    /* Infinite logits give NaN unless they are negative. */
    const VEC infinite = F(nan_unless_finite)(F(max_or_nan)(x[0], x[1]));
    F(store)(tile->d + at, z);
    F(store)(tile->target_e + at, F(exp)(F(negative)(z)) + infinite);
}

/* From there to losses and gradients of the first class. */
FASTCE_NOINLINE void F(finish_pairs)(F(few_tile) * tile, int n, VEC unscaled, REAL* loss) {
    const VEC zero = F(fill)(0);
    for (int i = 0; i < n; i += WIDTH) {
        const VEC z = F(load)(tile->d + i), smaller = F(load)(tile->target_e + i), e = smaller * (1 / EXP_UNIT);
        const VEC excl_target = F(select)(F(is_greater)(zero, z), F(fill)(EXP_UNIT), smaller), whole = 1 + e;
        const VEC g = F(gradient_of_target)(excl_target, whole, F(inverse)(whole), unscaled);
        F(store)(tile->alpha + i, F(of_first)(F(load_own_ints)(tile->y + i), g));
        F(store)(loss + i, F(log1p_of_fraction)(e, F(inverse)(2 + e)) + F(max_or_nan)(zero, -z));
    }
}

/* Of rows that are skipped nothing is left. */
FASTCE_NOINLINE void F(clear_few)(F(few_tile) * tile, int n, INTS ignored, REAL* loss) {
    const VEC zero = F(fill)(0);
    for (int i = 0; i < n; i += WIDTH) {
        const MASK skipped = F(equal)(F(load_own_ints)(tile->y + i), ignored);
        F(store)(loss + i, F(select)(skipped, zero, F(load)(loss + i)));
        F(store)(tile->alpha + i, F(select)(skipped, zero, F(load)(tile->alpha + i)));
        F(store)(tile->patch + i, F(select)(skipped, zero, F(load)(tile->patch + i)));
    }
}

/* A vector of rows: from logits to exponentials and sums; returns whether any row is skipped. */
FASTCE_INLINE int F(read_few)(const int n_classes, const REAL* x, ptrdiff_t pitch, const int64_t* target, INTS ignored,
    REAL scale, F(few_tile) * tile, int at) {
    VEC classes[FASTCE_MOST_IN_REGISTERS];
    const INTS y = F(load_targets)(target);
    memcpy(tile->y + at, &y, sizeof(y));
    if (pitch == 0) {
        F(load_few)(n_classes, x, classes);
        for (int k = 0; k < n_classes * WIDTH * (int)sizeof(REAL); k += 64)
            FASTCE_PREFETCH_L1((const char*)x + FASTCE_FEW_ROWS_AHEAD + k);
    } else {
        FASTCE_UNROLL
        for (int k = 0; k < n_classes; k++) {
            FASTCE_PREFETCH_L1((const char*)(x + k * pitch) + FASTCE_FEW_PLANES_AHEAD);
            classes[k] = F(load)(x + k * pitch);
        }
    }
    if (n_classes > 2) return F(exp_few)(n_classes, classes, y, ignored, scale, tile, at);
    F(exp_pair)(classes, y, scale, tile, at);
    return F(any)(F(equal)(y, ignored));
}

/* A vector of rows: from exponentials to gradients. */
FASTCE_INLINE void F(write_few)(const int n_classes, const F(few_tile) * tile, int at, INTS ignored,
    const REAL* upstream, REAL* out, ptrdiff_t pitch) {
    VEC classes[FASTCE_MOST_IN_REGISTERS];
    const INTS y = F(load_own_ints)(tile->y + at);
    const VEC alpha = F(load)(tile->alpha + at);
    if (n_classes == 2) {
        classes[0] = alpha;
        classes[1] = -alpha;
    } else {
        const VEC patch = F(load)(tile->patch + at);
        FASTCE_UNROLL
        for (int k = 0; k < n_classes; k++)
            classes[k] = F(select)(F(is)(y, k), patch, F(load)(tile->e + at * n_classes + k * WIDTH) * alpha);
    }
    /* Not before: tiny ones, freed of EXP_UNIT, would be no normal numbers. */
    if (upstream != NULL) {
        const VEC factor = F(select)(F(equal)(y, ignored), F(fill)(0), F(load)(upstream));
        FASTCE_UNROLL
        for (int k = 0; k < n_classes; k++) classes[k] = classes[k] * factor;
    }
    if (pitch == 0)
        F(store_few)(n_classes, classes, out);
    else {
        FASTCE_UNROLL
        for (int k = 0; k < n_classes; k++) F(store)(out + k * pitch, classes[k]);
    }
}

/* n rows, whole vectors of them. */
FASTCE_INLINE void F(few_rows)(const int n_classes, const fastce_few_task* task, ptrdiff_t n) {
    const REAL* const x = task->x;
    REAL* const out = task->out;
    REAL* const loss = task->loss;
    const REAL* const upstream = task->upstream;
    const int64_t* const target = task->target;
    const ptrdiff_t x_pitch = task->x_pitch, out_pitch = task->out_pitch;
    const ptrdiff_t x_step = x_pitch ? 1 : n_classes, out_step = out_pitch ? 1 : n_classes; /* from row to row */
    const REAL scale = (REAL)task->scale;
    const VEC unscaled = F(fill)((REAL)(task->factor * (1 / EXP_UNIT))); /* the gradient's factor, freed of EXP_UNIT */
    const INTS ignored = F(fill_ints)((INT)task->ignore_index);
    F(few_tile) tile;
    for (ptrdiff_t start = 0; start < n; start += FASTCE_FEW_TILE) {
        const int rows = n - start < FASTCE_FEW_TILE ? (int)(n - start) : FASTCE_FEW_TILE;
        int has_skipped = 0;
        for (int i = 0; i < rows; i += WIDTH)
            has_skipped |=
                F(read_few)(n_classes, x + (start + i) * x_step, x_pitch, target + start + i, ignored, scale, &tile, i);
        if (n_classes == 2)
            F(finish_pairs)(&tile, rows, unscaled, loss + start);
        else
            F(finish_few)(&tile, rows, unscaled, loss + start);
        if (has_skipped) F(clear_few)(&tile, rows, ignored, loss + start);
        for (int i = 0; i < rows && out != NULL; i += WIDTH)
            F(write_few)(n_classes, &tile, i, ignored, upstream == NULL ? NULL : upstream + start + i,
                out + (start + i) * out_step, out_pitch);
    }
}

#define FASTCE_FEW(n_classes)                                                                \
    FASTCE_NOINLINE void F(few_rows_##n_classes)(const fastce_few_task* task, ptrdiff_t n) { \
        F(few_rows)(n_classes, task, n);                                                     \
    }
FASTCE_FEW(2)
FASTCE_FEW(3)
FASTCE_FEW(4)
FASTCE_FEW(5)
FASTCE_FEW(6)
FASTCE_FEW(7)
FASTCE_FEW(8)
FASTCE_FEW(9)
FASTCE_FEW(10)
FASTCE_FEW(11)
FASTCE_FEW(12)
FASTCE_FEW(13)
FASTCE_FEW(14)
FASTCE_FEW(15)
FASTCE_FEW(16)
#undef FASTCE_FEW

FASTCE_INLINE void F(few_vectors)(const fastce_few_task* task, ptrdiff_t n, int n_classes) {
    static void (*const kernels[])(const fastce_few_task*, ptrdiff_t) = {F(few_rows_2), F(few_rows_3), F(few_rows_4),
        F(few_rows_5), F(few_rows_6), F(few_rows_7), F(few_rows_8), F(few_rows_9), F(few_rows_10), F(few_rows_11),
        F(few_rows_12), F(few_rows_13), F(few_rows_14), F(few_rows_15), F(few_rows_16)};
    kernels[n_classes - 2](task, n);
}

/* n rows to another place; both pitches are 0, or neither is. */
FASTCE_INLINE void F(copy_few)(
    const REAL* from, ptrdiff_t from_pitch, ptrdiff_t n, int n_classes, REAL* to, ptrdiff_t to_pitch) {
    if (from_pitch == 0)
        memcpy(to, from, n * n_classes * sizeof(REAL));
    else
        for (int k = 0; k < n_classes; k++) memcpy(to + k * to_pitch, from + k * from_pitch, n * sizeof(REAL));
}

/* n rows. */
FASTCE_NOINLINE void F(do_few_rows)(const fastce_few_task* task, ptrdiff_t n, int n_classes) {
    const ptrdiff_t rest = n % WIDTH, whole = n - rest;
    if (whole > 0) F(few_vectors)(task, whole, n_classes);
    if (rest > 0) {
        REAL x[FASTCE_MOST_IN_REGISTERS * WIDTH] = {0}, loss[WIDTH], upstream[WIDTH] = {0};
        int64_t target[WIDTH];
        const REAL* first = (const REAL*)task->x + whole * (task->x_pitch ? 1 : n_classes);
        fastce_few_task part = *task;
        part.x = x;
        part.x_pitch = task->x_pitch ? WIDTH : 0;
        part.target = target;
        part.loss = loss;
        F(copy_few)(first, task->x_pitch, rest, n_classes, x, part.x_pitch);
        for (int j = 0; j < WIDTH; j++) target[j] = j < rest ? task->target[whole + j] : task->ignore_index;
        if (task->upstream != NULL) {
            memcpy(upstream, (const REAL*)task->upstream + whole, rest * sizeof(REAL));
            part.upstream = upstream;
        }
        if (task->out != NULL) {
            part.out = x;
            part.out_pitch = task->out_pitch ? WIDTH : 0;
        }
        F(few_vectors)(&part, WIDTH, n_classes);
        memcpy((REAL*)task->loss + whole, loss, rest * sizeof(REAL));
        if (task->out != NULL)
            F(copy_few)(x, part.out_pitch, rest, n_classes,
                (REAL*)task->out + whole * (task->out_pitch ? 1 : n_classes), task->out_pitch);
    }
}
#endif
