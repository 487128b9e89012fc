/* The loops of the kernel of few classes over 64 staged rows, in registers. */
#ifndef FASTCE_FEW_H
#define FASTCE_FEW_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "simd/prefetch.h"
#include "simd/simd.h"
#include "simd/tile.h"

#define FASTCE_PIECE 64
typedef struct {
    const char* at;
    ptrdiff_t n_left, run, run_left, jump;
} fastce_walk;
typedef struct {
    fastce_walk logits, asked;
    char* stage;
    ptrdiff_t stage_jump, strip, ahead, turn;
} fastce_feed;
/* Go a piece of so many bytes further; tell whether a run ended. */
FASTCE_INLINE int fastce_step(fastce_walk* walk, ptrdiff_t n_bytes) {
    walk->at += n_bytes;
    walk->n_left--;
    if (--walk->run_left > 0) return 0;
    walk->run_left = walk->run;
    walk->at += walk->jump;
    return 1;
}
/* Fetch 64 numbers of so many bytes. In C, where the loop in `_plain_tile` needs it. */
FASTCE_INLINE void fastce_fetch_piece(fastce_feed* feed, ptrdiff_t size) {
    const ptrdiff_t n_bytes = FASTCE_PIECE * size;
    if (feed->asked.n_left > 0) {
        for (ptrdiff_t j = 0; j < n_bytes; j += 64) FASTCE_PREFETCH_L2(feed->asked.at + j);
        fastce_step(&feed->asked, n_bytes);
    }
    if (feed->logits.n_left == 0) return;
    if (feed->stage == NULL) {
        for (ptrdiff_t j = 0; j < n_bytes; j += 64) FASTCE_PREFETCH_L1(feed->logits.at + j);
        fastce_step(&feed->logits, n_bytes);
        return;
    }
    memcpy(feed->stage, feed->logits.at, n_bytes);
    feed->stage += n_bytes;
    if (fastce_step(&feed->logits, n_bytes)) feed->stage += feed->stage_jump;
}

#if FASTCE_HAS_REGISTERS
#define FASTCE_TOGETHER 4 /* registers of rows */
FASTCE_INLINE void fastce_tops_and_peaks(
    const float* x, ptrdiff_t pitch, int n_classes, const int32_t* y, int pick, float* top, float* x_peak) {
    for (int i = 0; i < 64; i += FASTCE_TOGETHER * FASTCE_WIDTH) {
        fastce_floats m[FASTCE_TOGETHER], p[FASTCE_TOGETHER], logit;
        fastce_ints t[FASTCE_TOGETHER];
        for (int g = 0; g < FASTCE_TOGETHER; g++) {
            t[g] = fastce_load_ints(y + i + g * FASTCE_WIDTH);
            m[g] = fastce_load(x + i + g * FASTCE_WIDTH);
            p[g] = fastce_fill(0);
        }
        for (int k = 0; k < n_classes; k++)
            for (int g = 0; g < FASTCE_TOGETHER; g++) {
                logit = fastce_load(x + k * pitch + i + g * FASTCE_WIDTH);
                m[g] = FASTCE_V(max_ps)(logit, m[g]);
                if (pick) p[g] = fastce_choose(t[g], k, logit, p[g]);
            }
        for (int g = 0; g < FASTCE_TOGETHER; g++) {
            fastce_store(top + i + g * FASTCE_WIDTH, m[g]);
            if (pick) fastce_store(x_peak + i + g * FASTCE_WIDTH, p[g]);
        }
    }
}
FASTCE_INLINE void fastce_gather_peaks(const float* x, ptrdiff_t pitch, const int32_t* y, float* x_peak) {
    int32_t place[64];
    for (int i = 0; i < 64; i++) place[i] = (y[i] > 0 ? y[i] : 0) * (int32_t)pitch + i;
    for (int i = 0; i < 64; i += FASTCE_WIDTH) fastce_store(x_peak + i, fastce_gather(x, fastce_load_ints(place + i)));
}
/* n = 4, 2 or 1 classes from class k on */
FASTCE_INLINE void fastce_exp_classes(float* x, ptrdiff_t pitch, int n_rows, int n, const float* top, const int32_t* y,
    int32_t k, float* others, fastce_feed* feed) {
    for (int i = 0; i < n_rows; i += FASTCE_WIDTH) {
        fastce_floats e[4];
        const fastce_floats m = fastce_load(top + i);
        const fastce_ints t = fastce_load_ints(y + i);
        for (int g = 0; g < n; g++)
            e[g] = fastce_exp_of_other(FASTCE_V(sub_ps)(fastce_load(x + (k + g) * pitch + i), m), t, k + g);
        for (int g = 0; g < n; g++) fastce_store(x + (k + g) * pitch + i, e[g]);
        fastce_add_to(others + i, fastce_total(e, n));
        if ((i + FASTCE_WIDTH) % (64 / n) == 0) fastce_fetch_piece(feed, sizeof(float));
    }
}
FASTCE_INLINE void fastce_exp_and_sum(float* x, ptrdiff_t pitch, int n_rows, int n_classes, const float* top,
    const int32_t* y, float* others, fastce_feed* feed) {
    int32_t k = 0;
    for (int i = 0; i < n_rows; i += FASTCE_WIDTH) fastce_store(others + i, fastce_fill(0)); /* no call of memset */
    for (; k + 4 <= n_classes; k += 4) fastce_exp_classes(x, pitch, n_rows, 4, top, y, k, others, feed);
    if (k + 2 <= n_classes) {
        fastce_exp_classes(x, pitch, n_rows, 2, top, y, k, others, feed);
        k += 2;
    }
    if (k < n_classes) fastce_exp_classes(x, pitch, n_rows, 1, top, y, k, others, feed);
}
/* Of fewer rows than a tile: code of its own, for the loops of whole tiles must be short of no register. */
FASTCE_NOINLINE void fastce_exp_and_sum_part(float* x, ptrdiff_t pitch, int n_rows, int n_classes, const float* top,
    const int32_t* y, float* others, fastce_feed* feed) {
    fastce_exp_and_sum(x, pitch, n_rows, n_classes, top, y, others, feed);
}
FASTCE_INLINE void fastce_scale_and_put(const float* x, ptrdiff_t pitch, ptrdiff_t n, int n_classes, const float* alpha,
    const int32_t* y, const float* grad_peak, float* out, ptrdiff_t out_pitch) {
    for (ptrdiff_t i = 0; i < n; i += FASTCE_TOGETHER * FASTCE_WIDTH) {
        fastce_floats a[FASTCE_TOGETHER], p[FASTCE_TOGETHER], e;
        fastce_ints t[FASTCE_TOGETHER];
        for (int g = 0; g < FASTCE_TOGETHER; g++) {
            t[g] = fastce_load_ints(y + i + g * FASTCE_WIDTH);
            a[g] = fastce_load(alpha + i + g * FASTCE_WIDTH);
            p[g] = fastce_load(grad_peak + i + g * FASTCE_WIDTH);
        }
        for (int k = 0; k < n_classes; k++)
            for (int g = 0; g < FASTCE_TOGETHER; g++) {
                e = fastce_load(x + k * pitch + i + g * FASTCE_WIDTH);
                fastce_store(out + k * out_pitch + i + g * FASTCE_WIDTH,
                    fastce_choose(t[g], k, p[g], FASTCE_V(mul_ps)(e, a[g])));
            }
    }
}
#else
#define fastce_tops_and_peaks(x, pitch, n_classes, y, pick, top, x_peak) ((void)0)
#define fastce_gather_peaks(x, pitch, y, x_peak) ((void)0)
#define fastce_exp_and_sum(x, pitch, n_rows, n_classes, top, y, others, feed) ((void)0)
#define fastce_exp_and_sum_part(x, pitch, n_rows, n_classes, top, y, others, feed) ((void)0)
#define fastce_scale_and_put(x, pitch, n, n_classes, alpha, y, grad_peak, out, out_pitch) ((void)0)
#endif

FASTCE_INLINE int fastce_any_negative(const int32_t* y) {
#if FASTCE_WIDTH == 16
    const __m512i low = _mm512_or_si512(fastce_load_ints(y), fastce_load_ints(y + 16));
    const __m512i high = _mm512_or_si512(fastce_load_ints(y + 32), fastce_load_ints(y + 48));
    return _mm512_movepi32_mask(_mm512_or_si512(low, high)) != 0;
#else
    int32_t signs = 0;
    for (int i = 0; i < 64; i++) signs |= y[i];
    return signs < 0;
#endif
}
#if FASTCE_WIDTH == 16
/* An estimate of 14 bits and one step of Newton's. */
FASTCE_INLINE void fastce_invert(const float* x, float* inverse) {
    const fastce_floats y = fastce_load(x), r = _mm512_rcp14_ps(y);
    fastce_store(inverse, _mm512_fmadd_ps(r, _mm512_fnmadd_ps(y, r, fastce_fill(1)), r));
}
#else
FASTCE_INLINE void fastce_invert(const float* x, float* inverse) {
    for (int i = 0; i < 16; i++) inverse[i] = 1 / x[i];
}
#endif

#endif
