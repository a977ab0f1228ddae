/* What the backends share: block geometry, the tables, and the CPU checks. Internal to kernels/. */
#ifndef IBID_ATTENTION_KERNELS_INTERNAL_H
#define IBID_ATTENTION_KERNELS_INTERNAL_H

#include "attention/kernels/kernels.h"

#include <math.h>
#include <string.h>

enum {
    IBIDI_BLOCK = 32,                /* weights per quantised block */
    IBIDI_Q4_0_BYTES = 2 + 16,       /* f16 d, nibbles */
    IBIDI_Q4_1_BYTES = 2 + 2 + 16,   /* f16 d, f16 m, nibbles */
    IBIDI_Q5_0_BYTES = 2 + 4 + 16,   /* f16 d, high bits, nibbles */
    IBIDI_Q5_1_BYTES = 4 + 4 + 16,   /* f16 d, f16 m, high bits, nibbles */
    IBIDI_Q8_0_BYTES = 2 + 32,       /* f16 d, int8 */
    IBIDI_Q4_K_BYTES = 4 + 12 + 128, /* of 256 weights; tensor.h has the fields */
    IBIDI_Q5_K_BYTES = 4 + 12 + 32 + 128,
    IBIDI_Q6_K_BYTES = 128 + 64 + 16 + 2,
    IBIDI_KEY_TILE = 64 /* keys an attention step takes: one word of the mask */
};

extern const ibid_kernels ibidi_kernels_reference;
#ifdef IBIDI_KERNELS_X86
extern const ibid_kernels ibidi_kernels_avx2;
extern const ibid_kernels ibidi_kernels_avxvnni;
extern const ibid_kernels ibidi_kernels_avx512;
extern const ibid_kernels ibidi_kernels_avx512vnni;
bool ibidi_cpu_avx2(void);
bool ibidi_cpu_avxvnni(void);
bool ibidi_cpu_avx512(void);
bool ibidi_cpu_avx512vnni(void);
#endif

/* Blocks lie at even addresses at best: read their scales bytewise. */
static inline uint16_t ibidi_u16_at(const void *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline float ibidi_bf16_to_f32(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Which of the 64 tokens from t0 (a multiple of 64) a row that sees [0, visible) may use. */
static inline uint64_t ibidi_visible_bits(const ibid_attn_args *a, size_t row, size_t t0) {
    size_t end = a->visible[row] < a->kv->n_tokens ? a->visible[row] : a->kv->n_tokens;
    if (end <= t0) return 0;
    uint64_t bits = end - t0 >= 64 ? ~UINT64_C(0) : (UINT64_C(1) << (end - t0)) - 1;
    return a->masked ? bits & ~a->masked[t0 / 64] : bits;
}
#endif
