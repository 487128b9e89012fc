/* The sweep over a block of a row, whose classes lie side by side: its exponentials and their sum.

   Design
   ------
   1. Arithmetic hides the time of memory only within one loop, for a core looks a few hundred instructions ahead. So
      the maximum of the block that comes next is found in the loop of this one's exponentials, an earlier block whose
      factor is known is multiplied by it, and memory further on is asked for, lines far ahead into L2 and nearer ones
      into L1: of lines that are still in DRAM L1 can wait for few. With one thread 65536 x 1000 took 0.6 of the time of
      separate loops.
   2. A vector of AVX-512 fills a cache line, and one that lies across two takes twice as long. There the loop runs on
      whole lines of the exponentials, and masks cut its ends. So a class may be in any lane, depending on where the
      row lies in memory, but the bits of the sums do not depend on it: numbers so many vectors apart are added up in
      order, whichever lane they have, and these partial sums in a tree that is the same when they are rotated.
   3. Numbers of 16 bits are compared as integers, which AVX2 does faster in a loop of its own.
   4. Elsewhere the last vector of a row overlaps the one before. In place it is loaded before anything is stored: a
      load from lines that were just stored in pieces waits for them, which cost 25 ns a row, and filling it up piece
      by piece 50. */
#ifndef FASTCE_ROW_SWEEP_H
#define FASTCE_ROW_SWEEP_H

#include <math.h>

#include "simd/convert.h"
#include "simd/math.h"
#include "simd/prefetch.h"
#include "simd/simd.h"
#include "simd/sums.h"

/* Whether rows are swept by whole lines. */
#define FASTCE_BY_LINES (FASTCE_VECTOR_BYTES == 64)

#if FASTCE_IS_WIDE
#if FASTCE_VECTOR_BYTES == 64
typedef __m512i fastce_words;
#else
typedef __m256i fastce_words;
#endif

/* The maximum of numbers of 16 bits, taken for integers: 2 instructions for a register of them. With a sign, the largest
   is the maximum unless all are negative; then it is the smallest without. */
enum { FASTCE_WORDS = FASTCE_VECTOR_BYTES / 2, FASTCE_OF_WORDS = 64 / FASTCE_WORDS };
typedef struct {
    fastce_words high[FASTCE_OF_WORDS], low[FASTCE_OF_WORDS];
} fastce_largest_words;

FASTCE_INLINE void fastce_begin_words(fastce_largest_words* largest) {
    FASTCE_UNROLL
    for (int g = 0; g < FASTCE_OF_WORDS; g++) {
        largest->high[g] = FASTCE_X86(set1_epi16)(-0x8000);
        largest->low[g] = FASTCE_X86(set1_epi16)(-1);
    }
}

/* Takes in 64 numbers. */
FASTCE_INLINE void fastce_take_words(fastce_largest_words* largest, const uint16_t* x) {
    FASTCE_UNROLL
    for (int g = 0; g < FASTCE_OF_WORDS; g++) {
        fastce_words words;
        memcpy(&words, x + FASTCE_WORDS * g, sizeof(words));
        largest->high[g] = FASTCE_X86(max_epi16)(largest->high[g], words);
        largest->low[g] = FASTCE_X86(min_epu16)(largest->low[g], words);
    }
}

/* The smallest of integers without a sign, the largest of those with one. */
FASTCE_INLINE uint16_t fastce_min_word(fastce_words x) {
#if FASTCE_VECTOR_BYTES == 64
    __m256i y = _mm256_min_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
#else
    __m256i y = x;
#endif
    __m128i z = _mm_min_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    return (uint16_t)_mm_cvtsi128_si32(_mm_minpos_epu16(z));
}

FASTCE_INLINE uint16_t fastce_max_word(fastce_words x) {
    return 0x7FFF - fastce_min_word(FASTCE_X86(sub_epi16)(FASTCE_X86(set1_epi16)(0x7FFF), x));
}
#endif

/* Rows that are one block each and are swept one after the other, and earlier rows of as many classes, which are
   multiplied by their factors meanwhile. */
typedef struct {
    int n_rows, n_done;
    ptrdiff_t n_classes;
    ptrdiff_t ahead_l1, ahead_l2; /* bytes from a row to what is asked for meanwhile */
    const void* x[FASTCE_LANES];
    void* e[FASTCE_LANES];        /* where exponentials go; may be x; may be the same memory for all rows */
    int64_t target[FASTCE_LANES]; /* a class whose logit is wanted, or -1 */
    void* done[FASTCE_LANES];     /* exponentials of the earlier rows */
    double factor[FASTCE_LANES];
    /* results, of the rows that are swept */
    double row_max[FASTCE_LANES], x_target[FASTCE_LANES];
    double all_terms[FASTCE_LANES]; /* sums of exponentials */
    double excl_max[FASTCE_LANES];  /* without those that are 1, where that is needed */
} fastce_swept_rows;

#define FASTCE_TEMPLATE "simd/row_sweep.h"
#include "simd/for_types.h"

#define fastce_sweep_rows(rows, scale, like) FASTCE_OF_VECTORS(sweep_rows, like)(rows, scale)
#define fastce_row_max(format, x, n, like) FASTCE_OF_VECTORS(row_max, like)(format, x, n)
#define fastce_find(x, n, value) FASTCE_OF_VECTORS(find, *(x))(x, n, value)
#define fastce_sum_excl_max(e, n) FASTCE_OF_VECTORS(sum_excl_max, *(e))(e, n)
#define fastce_multiply(e, n, factor) FASTCE_OF_VECTORS(multiply, *(e))(e, n, factor)

#elif defined(REAL)

/* 64 numbers, or 4 lines, are 4 vectors so many times, and have so many partial sums. */
enum {
    F(step) = FASTCE_BY_LINES ? 4 * WIDTH : 64,
    F(fours) = F(step) / (4 * WIDTH),
    F(n_parts) = FASTCE_BY_LINES ? 4 : F(fours)
};
#define STEP F(step)
#define FOURS F(fours)
#define N_PARTS F(n_parts)

/* ---- maxima; NaN is left out. A block of a row has at least 64 classes. ---- */

/* In registers: through memory it took 4 ns more a row. */
FASTCE_INLINE REAL F(largest_lane)(VEC m) {
#if WIDTH == 1
    return m;
#elif FASTCE_VECTOR_BYTES == 64
    return FASTCE_NAME(_mm512_reduce_max, PS, )(m);
#elif defined(FASTCE_X86)
#if FASTCE_VECTOR_BYTES == 32
    __m128 half = _mm256_castps256_ps128((__m256)m), other = _mm256_extractf128_ps((__m256)m, 1);
#else
    __m128 half = (__m128)m, other = half;
#endif
#if IS_FLOAT
    half = _mm_max_ps(half, other);
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
#else
    const __m128d two = _mm_max_pd((__m128d)half, (__m128d)other);
    return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
#endif
#elif FASTCE_IS_NEON
    return FASTCE_NAME(vmaxvq, NEON, )(m);
#else
    REAL largest = m[0];
    for (int j = 1; j < WIDTH; j++) largest = m[j] > largest ? m[j] : largest;
    return largest;
#endif
}

FASTCE_INLINE REAL F(max_of)(fastce_format format, const void* x, ptrdiff_t n) {
    enum { N = WIDTH > 8 ? 64 / WIDTH : 8 };
    VEC m[N];
    FASTCE_UNROLL
    for (int g = 0; g < N; g++) m[g] = F(fill)(-INFINITY);
    for (ptrdiff_t k = 0; k < n; k += N * WIDTH) {
        if (k > n - N * WIDTH) k = n - N * WIDTH;
        FASTCE_UNROLL
        for (int g = 0; g < N; g++) {
            m[g] = F(max)(F(load_as)(format, x, k + g * WIDTH), m[g]);
            FASTCE_KEEP_ORDER(m[g]);
        }
    }
    FASTCE_UNROLL
    for (int g = 1; g < N; g++) m[0] = F(max)(m[g], m[0]);
    return F(largest_lane)(m[0]);
}

#if IS_FLOAT && FASTCE_IS_WIDE
/* What was found in n numbers; where that is NaN, they are looked at again without it. */
FASTCE_INLINE float fastce_end_words(
    const fastce_largest_words* largest, fastce_format format, const uint16_t* x, ptrdiff_t n) {
    fastce_words high = largest->high[0], low = largest->low[0];
    uint16_t found;
    FASTCE_UNROLL
    for (int g = 1; g < FASTCE_OF_WORDS; g++) {
        high = FASTCE_X86(max_epi16)(high, largest->high[g]);
        low = FASTCE_X86(min_epu16)(low, largest->low[g]);
    }
    found = fastce_max_word(high);
    if (found & 0x8000) found = fastce_min_word(low);
    if ((found & 0x7FFF) > (format == FASTCE_HALF ? 0x7C00 : 0x7F80)) return fastce_max_of_floats(format, x, n);
    return format == FASTCE_HALF ? fastce_float_of_half(found) : fastce_float_of_bfloat16(found);
}

FASTCE_INLINE float fastce_max_of_16_bits(fastce_format format, const uint16_t* x, ptrdiff_t n) {
    fastce_largest_words largest;
    fastce_begin_words(&largest);
    for (ptrdiff_t k = 0; k < n; k += 64) fastce_take_words(&largest, x + (k > n - 64 ? n - 64 : k));
    return fastce_end_words(&largest, format, x, n);
}
#endif

/* The maximum of n classes of a row. */
FASTCE_NOINLINE REAL F(row_max)(fastce_format format, const void* x, ptrdiff_t n) {
#if IS_FLOAT && FASTCE_IS_WIDE
    if (format == FASTCE_HALF) return fastce_max_of_16_bits(FASTCE_HALF, (const uint16_t*)x, n);
    if (format == FASTCE_BFLOAT16) return fastce_max_of_16_bits(FASTCE_BFLOAT16, (const uint16_t*)x, n);
#endif
    return F(max_of)(format, x, n);
}

/* The place of the first of n numbers that is `value`, or -1. */
FASTCE_NOINLINE ptrdiff_t F(find)(const REAL* x, ptrdiff_t n, REAL value) {
    for (ptrdiff_t k = 0; k < n; k += 64) {
        const ptrdiff_t stop = n - k < 64 ? n : k + 64;
        int found = 0;
        for (ptrdiff_t j = k; j < stop; j++) found |= x[j] == value; /* vectorised: no exit */
        for (ptrdiff_t j = k; found && j < stop; j++)
            if (x[j] == value) return j;
    }
    return -1;
}

/* ---- lines ---- */

/* How many numbers the first line has before the one at `x`. */
FASTCE_INLINE int F(lane_of)(const void* x) { return FASTCE_BY_LINES ? (int)((uintptr_t)x / sizeof(REAL) % WIDTH) : 0; }

#if FASTCE_BY_LINES
FASTCE_INLINE MASK F(lanes_between)(int first, int stop) { return (MASK)((1u << stop) - (1u << first)); }

/* Some lanes of the numbers k .. k + WIDTH - 1; the others are -inf, and nothing is read there. */
FASTCE_INLINE VEC F(load_part)(fastce_format format, const void* x, ptrdiff_t k, MASK lanes) {
    const VEC none = F(fill)(-INFINITY);
#if IS_FLOAT
    if (format != FASTCE_NATIVE) {
        uint16_t words[16];
        _mm256_storeu_si256((__m256i*)words, _mm256_maskz_loadu_epi16(lanes, (const uint16_t*)x + k));
        return F(select)(lanes, F(load_as)(format, words, 0), none);
    }
#else
    (void)format;
#endif
    return FASTCE_NAME(_mm512_mask_loadu, PS, )(none, lanes, (const REAL*)x + k);
}

FASTCE_INLINE void F(store_part)(REAL* x, MASK lanes, VEC y) { FASTCE_NAME(_mm512_mask_storeu, PS, )(x, lanes, y); }
#endif

/* ---- products: e becomes e * f ---- */

/* What comes before whole lines; returns how much that was. */
FASTCE_INLINE ptrdiff_t F(multiply_first)(REAL* e, REAL factor) {
#if FASTCE_BY_LINES
    const VEC f = F(fill)(factor);
    const int first = F(lane_of)(e);
    const MASK lanes = F(lanes_between)(first, WIDTH);
    if (first == 0) return 0;
    F(store_part)(e - first, lanes, F(load_part)(FASTCE_NATIVE, e, -first, lanes) * f);
    return WIDTH - first;
#else
    (void)e, (void)factor;
    return 0;
#endif
}

FASTCE_INLINE void F(multiply_step)(REAL* e, int n, VEC f) {
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) F(store)(e + g * WIDTH, F(load)(e + g * WIDTH) * f);
}

/* The numbers k .. n - 1. Several vectors a turn: loops of one took a tenth of a call longer where they lay across two
   cache lines. */
FASTCE_INLINE void F(multiply_rest)(REAL* e, ptrdiff_t k, ptrdiff_t n, REAL factor) {
    const VEC f = F(fill)(factor);
    for (; k + 4 * WIDTH <= n; k += 4 * WIDTH) F(multiply_step)(e + k, 4, f);
#if FASTCE_BY_LINES
    for (; k < n; k += WIDTH) {
        const MASK lanes = F(lanes_between)(0, n - k < WIDTH ? (int)(n - k) : WIDTH);
        F(store_part)(e + k, lanes, F(load_part)(FASTCE_NATIVE, e, k, lanes) * f);
    }
#else
    for (; k < n; k++) e[k] *= factor;
#endif
}

/* ---- exponentials and sums ---- */

/* Adds n vectors that follow each other, 4 or 1, to the partial sums of their place. */
FASTCE_INLINE void F(add_parts)(const VEC* y, int n, int part, VEC* parts) {
#if FASTCE_BY_LINES
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) parts[part + g] = parts[part + g] + y[g];
#else
    parts[part] = parts[part] + F(total)(y, n);
#endif
}

/* Adds exponentials to `all`, and times d to `ed`. */
FASTCE_INLINE void F(add_exps)(const VEC* d, const VEC* y, int n, int part, int sums_entropy, VEC* all, VEC* ed) {
    VEC z[4];
    F(add_parts)(y, n, part, all);
    if (!sums_entropy) return;
    FASTCE_UNROLL
    for (int g = 0; g < n; g++) z[g] = F(times)(y[g], d[g]);
    F(add_parts)(z, n, part, ed);
}

/* The sum of all parts, in the order of `wide_lane_sum`. */
FASTCE_INLINE double F(sum_of_parts)(const VEC* parts) {
#if FASTCE_BY_LINES
    const VEC sum = (parts[0] + parts[2]) + (parts[1] + parts[3]);
#if IS_FLOAT
    const __m512d wide = _mm512_cvtps_pd(_mm512_castps512_ps256(sum)) + _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1));
#else
    const __m512d wide = sum;
#endif
    const __m256d four = _mm512_castpd512_pd256(wide) + _mm512_extractf64x4_pd(wide, 1);
    const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
#else
    REAL lanes[16];
    for (int v = 0; v < N_PARTS; v++) F(store)(lanes + v * WIDTH, parts[v]);
    return F(lane_sum)(lanes);
#endif
}

FASTCE_INLINE void F(sweep_of)(
    fastce_format format, int sums_entropy, int multiplies, fastce_block* b, REAL row_max, REAL scale) {
    VEC all[N_PARTS], ed[N_PARTS], largest[4], x[4], d[4], y[4];
    /* Copies, for compilers must assume that stores to e change the block. */
    const void* const given = b->x;
    const void* const next = b->next;
    REAL* const e = (REAL*)b->e;
    const REAL half = F(half)(scale);
    const VEC m = F(fill)(row_max * half);
    const char* const ahead_l1 = b->ahead_l1;
    const char* const ahead_l2 = b->ahead_l2;
    REAL* const done = (REAL*)b->done;
    const REAL factor = (REAL)b->factor;
    const VEC f = F(fill)(factor);
    const ptrdiff_t n = b->n, size = b->ahead_size, n_done = multiplies ? b->n_done : 0;
    ptrdiff_t k = 0, i = 0, n_next = 0, w = 0;
#if IS_FLOAT && FASTCE_BY_LINES
    fastce_largest_words words; /* of the next block */
    fastce_begin_words(&words);
#endif
    for (int v = 0; v < N_PARTS; v++) all[v] = ed[v] = F(fill)(0);
    for (int g = 0; g < 4; g++) largest[g] = F(fill)(-INFINITY);
    if (n_done > 0) w = F(multiply_first)(done, factor);
    if (next != NULL) {
        n_next = b->n_next;
#if IS_FLOAT && FASTCE_BY_LINES
        if (format != FASTCE_NATIVE) fastce_take_words(&words, (const uint16_t*)next + n_next - 64);
#endif
        largest[0] = F(max)(F(load_as)(format, next, 0), largest[0]);
        largest[1] = F(max)(F(load_as)(format, next, n_next - WIDTH), largest[1]);
        if (format == FASTCE_NATIVE) i = (WIDTH - F(lane_of)(next)) % WIDTH; /* where its first whole line is */
    }
#if FASTCE_BY_LINES
    if (F(lane_of)(e) > 0) {
        /* The line before those that the loop takes has the last partial sum, as every fourth one. */
        const int first = F(lane_of)(e);
        const MASK lanes = F(lanes_between)(first, WIDTH);
        x[0] = F(load_part)(format, given, -first, lanes);
        F(exps)(x, 1, m, half, scale, d, y);
        F(store_part)(e - first, lanes, y[0]);
        y[0] = F(keep)(lanes, y[0]);
        F(add_exps)(d, y, 1, 3, sums_entropy, all, ed);
        k = WIDTH - first;
    }
#else
    const VEC last = F(load_as)(format, given, n - WIDTH); /* before stores to e, which may be x */
#endif
    for (; k + STEP <= n; k += STEP) {
        /* Of 16 bits some lines twice: a variable count took half a cycle more per 16 numbers. */
        for (int j = 0; j < (format == FASTCE_NATIVE ? STEP * (int)sizeof(REAL) : 2 * STEP); j += 64) {
            FASTCE_PREFETCH_L1(ahead_l1 + k * size + j);
            FASTCE_PREFETCH_L2(ahead_l2 + k * size + j);
        }
        if (format != FASTCE_NATIVE) /* in place, what is written has just been read */
            for (int j = 0; j < STEP; j += 16) FASTCE_PREFETCH_L1(e + k + 256 + j);
        for (int v = 0; v < FOURS; v++) {
            REAL* const to = e + k + 4 * WIDTH * v;
            FASTCE_UNROLL
            for (int g = 0; g < 4; g++) x[g] = F(load_as)(format, given, k + (4 * v + g) * WIDTH);
            F(exps)(x, 4, m, half, scale, d, y);
            FASTCE_UNROLL
            for (int g = 0; g < 4; g++) F(store)(to + g * WIDTH, y[g]);
            F(add_exps)(d, y, 4, FASTCE_BY_LINES ? 0 : v, sums_entropy, all, ed);
        }
        if (i + STEP <= n_next) {
#if IS_FLOAT && FASTCE_BY_LINES
            if (format != FASTCE_NATIVE)
                fastce_take_words(&words, (const uint16_t*)next + i);
            else
#endif
                for (int v = 0; v < FOURS; v++) {
                    FASTCE_UNROLL
                    for (int g = 0; g < 4; g++)
                        largest[g] = F(max)(F(load_as)(format, next, i + (4 * v + g) * WIDTH), largest[g]);
                }
            i += STEP;
        }
        if (w + STEP <= n_done) {
            for (int v = 0; v < FOURS; v++) F(multiply_step)(done + w + 4 * WIDTH * v, 4, f);
            w += STEP;
        }
    }
    if (n_done > 0) F(multiply_rest)(done, w, n_done, factor);
    for (ptrdiff_t j = k * size; j < n * size; j += 64) {
        FASTCE_PREFETCH_L1(ahead_l1 + j);
        FASTCE_PREFETCH_L2(ahead_l2 + j);
    }
#if FASTCE_BY_LINES
    FASTCE_UNROLL
    for (int g = 0; g < 4; g++, k += WIDTH)
        if (k < n) {
            const MASK lanes = F(lanes_between)(0, n - k < WIDTH ? (int)(n - k) : WIDTH);
            x[0] = F(load_part)(format, given, k, lanes);
            F(exps)(x, 1, m, half, scale, d, y);
            F(store_part)(e + k, lanes, y[0]);
            y[0] = F(keep)(lanes, y[0]);
            F(add_exps)(d, y, 1, g, sums_entropy, all, ed);
        }
#else
    for (; k + WIDTH <= n; k += WIDTH) {
        x[0] = F(load_as)(format, given, k);
        F(exps)(x, 1, m, half, scale, d, y);
        F(store)(e + k, y[0]);
        F(add_exps)(d, y, 1, 0, sums_entropy, all, ed);
    }
    if (k < n) {
        F(exps)(&last, 1, m, half, scale, d, y);
        F(store)(e + n - WIDTH, y[0]);
        y[0] = F(from_lane)((int)(WIDTH - (n - k)), y[0], F(fill)(0));
        F(add_exps)(d, y, 1, 0, sums_entropy, all, ed);
    }
#endif
    b->sums[FASTCE_ALL][0] = F(sum_of_parts)(all);
    if (sums_entropy) b->sums[FASTCE_E_D][0] = F(sum_of_parts)(ed);
    if (next == NULL) return;
#if IS_FLOAT && FASTCE_BY_LINES
    if (format != FASTCE_NATIVE) {
        for (; i + 64 <= n_next; i += 64) fastce_take_words(&words, (const uint16_t*)next + i);
        b->next_max = fastce_end_words(&words, format, (const uint16_t*)next, n_next);
        return;
    }
#endif
    for (; i + WIDTH <= n_next; i += WIDTH) largest[2] = F(max)(F(load_as)(format, next, i), largest[2]);
    FASTCE_UNROLL
    for (int g = 1; g < 4; g++) largest[0] = F(max)(largest[g], largest[0]);
    b->next_max = F(largest_lane)(largest[0]);
}

/* Each set of constants has a function of its own: a choice within the loop took a tenth of the time with AVX2, and as
   much as many loops in one function, whose constants then had no registers. */
#define SWEEP(name, format, sums_entropy, multiplies, scale_of)                \
    FASTCE_NOINLINE void F(name)(fastce_block * b, REAL row_max, REAL scale) { \
        F(sweep_of)(format, sums_entropy, multiplies, b, row_max, scale_of);   \
    }
#if IS_FLOAT && FASTCE_SWEEPS_16_BITS
SWEEP(sweep_half, FASTCE_HALF, 0, 0, ((void)scale, 1))
SWEEP(sweep_bfloat16, FASTCE_BFLOAT16, 0, 0, ((void)scale, 1))
#endif
SWEEP(sweep_plain, FASTCE_NATIVE, 0, 0, ((void)scale, 1))
SWEEP(sweep_and_multiply, FASTCE_NATIVE, 0, 1, ((void)scale, 1))
SWEEP(sweep_scaled, FASTCE_NATIVE, 0, 1, scale)
SWEEP(sweep_entropy, FASTCE_NATIVE, 1, 1, scale)
#undef SWEEP

/* Sums up the exponentials of a block of a row, and leaves them in e. Terms that are 1 are not left out, see
   `sum_excl_max`. */
FASTCE_INLINE void F(sweep)(fastce_block* b, REAL row_max, REAL scale) {
    if (b->sums_entropy) F(sweep_entropy)(b, row_max, scale);
#if IS_FLOAT && FASTCE_SWEEPS_16_BITS
    else if (b->format == FASTCE_HALF)
        F(sweep_half)(b, row_max, scale);
    else if (b->format == FASTCE_BFLOAT16)
        F(sweep_bfloat16)(b, row_max, scale);
#endif
    else if (scale != 1)
        F(sweep_scaled)(b, row_max, scale);
    else if (b->n_done > 0)
        F(sweep_and_multiply)(b, row_max, scale);
    else
        F(sweep_plain)(b, row_max, scale);
}

/* The sum of n exponentials of a row without the terms that are 1. */
FASTCE_NOINLINE double F(sum_excl_max)(const REAL* e, ptrdiff_t n) {
    REAL lanes[16];
    ptrdiff_t k;
    for (int j = 0; j < 16; j++) lanes[j] = 0;
    for (k = 0; k + 64 <= n; k += 64)
        for (int j = 0; j < 16; j += WIDTH) {
            VEC z[4];
            FASTCE_UNROLL
            for (int g = 0; g < 4; g++) z[g] = F(unless_largest)(F(load)(e + k + 16 * g + j));
            F(add_to)(lanes + j, F(total)(z, 4));
        }
    for (; k + WIDTH <= n; k += WIDTH) F(add_to)(lanes, F(unless_largest)(F(load)(e + k)));
    if (k < n)
        F(add_to)(lanes, F(unless_largest)(F(from_lane)((int)(WIDTH - (n - k)), F(load)(e + n - WIDTH), F(fill)(0))));
    return F(lane_sum)(lanes);
}

FASTCE_NOINLINE void F(multiply)(REAL* e, ptrdiff_t n, REAL factor) {
    F(multiply_rest)(e, F(multiply_first)(e, factor), n, factor);
}

/* ---- rows that are one block each ---- */

FASTCE_INLINE void F(sweep_rows_of)(int multiplies, fastce_swept_rows* rows, REAL scale) {
    fastce_block b;
    REAL largest = F(row_max)(FASTCE_NATIVE, rows->x[0], rows->n_classes);
    b.n = b.n_next = rows->n_classes;
    b.next_max = 0;
    b.done = NULL;
    b.factor = 1;
    b.ahead_size = sizeof(REAL);
    for (int i = 0; i < rows->n_rows; i++) {
        const REAL* const x = rows->x[i];
        const int is_last = i + 1 == rows->n_rows;
        const int64_t target = rows->target[i];
        double all;
        b.x = x;
        b.e = rows->e[i];
        b.next = is_last ? NULL : rows->x[i + 1];
        b.ahead_l1 = (const char*)x + rows->ahead_l1;
        b.ahead_l2 = (const char*)x + rows->ahead_l2;
        b.n_done = i < rows->n_done ? rows->n_classes : 0;
        if (b.n_done > 0) {
            b.done = rows->done[i];
            b.factor = rows->factor[i];
        }
        rows->row_max[i] = largest;
        if (target >= 0) rows->x_target[i] = x[target];
        F(sweep_of)(FASTCE_NATIVE, 0, multiplies, &b, largest == -INFINITY ? 0 : largest, scale);
        largest = (REAL)b.next_max;
        all = rows->all_terms[i] = b.sums[FASTCE_ALL][0];
        if (fastce_needs_excl_max(all, EXP_UNIT)) rows->excl_max[i] = F(sum_excl_max)((const REAL*)b.e, b.n);
    }
}

FASTCE_NOINLINE void F(sweep_rows_plain)(fastce_swept_rows* rows) { F(sweep_rows_of)(0, rows, 1); }
FASTCE_NOINLINE void F(sweep_rows_and_multiply)(fastce_swept_rows* rows) { F(sweep_rows_of)(1, rows, 1); }
FASTCE_NOINLINE void F(sweep_rows_scaled)(fastce_swept_rows* rows, REAL scale) { F(sweep_rows_of)(1, rows, scale); }

FASTCE_INLINE void F(sweep_rows)(fastce_swept_rows* rows, REAL scale) {
    if (scale != 1)
        F(sweep_rows_scaled)(rows, scale);
    else if (rows->n_done > 0)
        F(sweep_rows_and_multiply)(rows);
    else
        F(sweep_rows_plain)(rows);
}

#undef N_PARTS
#undef FOURS
#undef STEP

#endif
