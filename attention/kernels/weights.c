/* The block layouts of the quantised types (ggml-common.h), decoded group by group: the one place
 * that knows them for every use that is not bound by it. */
#include "attention/kernels/internal.h"

static float half(const uint8_t *p) {
    return ibid_f16_to_f32(ibidi_u16_at(p));
}

/* The low nibbles, then the high ones. */
static void split_nibbles(const uint8_t *q, uint8_t u[32]) {
    for (size_t j = 0; j < 16; j++) {
        u[j] = q[j] & 15;
        u[j + 16] = q[j] >> 4;
    }
}

/* The same with bit j of high as the fifth bit of weight j. */
static void split_fives(const uint8_t *high, const uint8_t *q, uint8_t u[32]) {
    split_nibbles(q, u);
    for (size_t j = 0; j < 32; j++) u[j] |= (uint8_t)((high[j / 8] >> (j % 8) & 1) << 4);
}

/* The 6-bit factors of scale and offset of group g of a Q4_K or Q5_K block. */
static void k_factors(const uint8_t *p, size_t g, float *s, float *t) {
    if (g < 4) {
        *s = (float)(p[g] & 63);
        *t = (float)(p[g + 4] & 63);
    } else {
        *s = (float)((p[g + 4] & 15) | p[g - 4] >> 6 << 4);
        *t = (float)(p[g + 4] >> 4 | p[g] >> 6 << 4);
    }
}

static void split_k(const uint8_t *p, size_t g, const uint8_t *high, const uint8_t *q,
                    uint8_t u[32], float *d, float *m) {
    float s, t;
    k_factors(p + 4, g, &s, &t);
    *d = half(p) * s;
    *m = -half(p + 2) * t;
    for (size_t j = 0; j < 32; j++) {
        u[j] = (uint8_t)(q[g / 2 * 32 + j] >> (g % 2 * 4) & 15);
        if (high) u[j] |= (uint8_t)((high[j] >> g & 1) << 4);
    }
}

static void split_q6_k(const uint8_t *p, size_t g, uint8_t u[32], float d[2], float m[2]) {
    const uint8_t *low = p + g / 4 * 64 + g % 2 * 32, *high = p + 128 + g / 4 * 32;
    for (size_t j = 0; j < 32; j++) {
        u[j] = (uint8_t)((low[j] >> (g % 4 / 2 * 4) & 15) | (high[j] >> (g % 4 * 2) & 3) << 4);
    }
    for (size_t i = 0; i < 2; i++) {
        d[i] = half(p + 208) * (float)(int8_t)p[192 + 2 * g + i];
        m[i] = -32 * d[i];
    }
}

/* The same d and m for all 32. */
static void split_32(ibid_type type, const uint8_t *row, size_t group, uint8_t u[32], float *d,
                     float *m) {
    const uint8_t *p;
    switch (type) {
    case IBID_Q4_0:
        p = row + group * IBIDI_Q4_0_BYTES;
        split_nibbles(p + 2, u);
        *d = half(p);
        *m = -8 * *d;
        return;
    case IBID_Q4_1:
        p = row + group * IBIDI_Q4_1_BYTES;
        split_nibbles(p + 4, u);
        *d = half(p);
        *m = half(p + 2);
        return;
    case IBID_Q5_0:
        p = row + group * IBIDI_Q5_0_BYTES;
        split_fives(p + 2, p + 6, u);
        *d = half(p);
        *m = -16 * *d;
        return;
    case IBID_Q5_1:
        p = row + group * IBIDI_Q5_1_BYTES;
        split_fives(p + 4, p + 8, u);
        *d = half(p);
        *m = half(p + 2);
        return;
    case IBID_Q8_0:
        p = row + group * IBIDI_Q8_0_BYTES;
        for (size_t j = 0; j < 32; j++) u[j] = p[2 + j] ^ 128;
        *d = half(p);
        *m = -128 * *d;
        return;
    case IBID_Q4_K:
        p = row + group / 8 * IBIDI_Q4_K_BYTES;
        split_k(p, group % 8, NULL, p + 16, u, d, m);
        return;
    case IBID_Q5_K:
        p = row + group / 8 * IBIDI_Q5_K_BYTES;
        split_k(p, group % 8, p + 16, p + 48, u, d, m);
        return;
    case IBID_Q6_K:
    case IBID_F32:
    case IBID_F16:
    case IBID_BF16:
        break;
    }
    memset(u, 0, 32);
    *d = *m = 0;
}

void ibid_weights_split(ibid_type type, const void *row, size_t group, uint8_t u[32], float d[2],
                        float m[2]) {
    if (type == IBID_Q6_K) {
        split_q6_k((const uint8_t *)row + group / 8 * IBIDI_Q6_K_BYTES, group % 8, u, d, m);
        return;
    }
    split_32(type, row, group, u, &d[0], &m[0]);
    d[1] = d[0];
    m[1] = m[0];
}
