/* Plain rounding of floats to ggml's block types, for test models: not the best quantisers, but
 * every field of every block is used. f16 numbers come from the caller. */
#ifndef IBID_TEST_QUANTISE_H
#define IBID_TEST_QUANTISE_H

#include "attention/tensor.h"

#include <math.h>
#include <string.h>

enum { TEST_SUPER = 256 }; /* weights in a block of a K type, the largest */

static void test_put_half(uint8_t *p, uint16_t h) {
    memcpy(p, &h, sizeof h);
}

static unsigned test_clamped(float v, float most) {
    return (unsigned)lrintf(fminf(fmaxf(v, 0), most));
}

/* Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 weights. Returns the block's bytes. */
static size_t test_quantise_32(ibid_type type, const float x[32], uint16_t (*half)(float),
                               uint8_t *out) {
    float low = x[0], high = x[0], most = 0;
    for (size_t i = 0; i < 32; i++) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
        most = fmaxf(most, fabsf(x[i]));
    }
    bool five = type == IBID_Q5_0 || type == IBID_Q5_1;
    bool offset = type == IBID_Q4_1 || type == IBID_Q5_1;
    float top = type == IBID_Q8_0 ? 127 : five ? 15 : 7;
    float d = offset ? (high - low) / (five ? 31.0f : 15.0f) : most / top;
    float base = offset ? low : (five ? -16.0f : -8.0f) * d;
    uint8_t *p = out;
    test_put_half(p, half(d));
    p += 2;
    if (offset) {
        test_put_half(p, half(low));
        p += 2;
    }
    if (type == IBID_Q8_0) {
        for (size_t i = 0; i < 32; i++) p[i] = (uint8_t)(int8_t)lrintf(d > 0 ? x[i] / d : 0);
        return (size_t)(p + 32 - out);
    }
    uint8_t *bits = p, *q = five ? p + 4 : p;
    memset(bits, 0, (size_t)(q - bits) + 16);
    for (size_t i = 0; i < 32; i++) {
        unsigned v = test_clamped(d > 0 ? (x[i] - base) / d : 0, five ? 31.0f : 15.0f);
        q[i % 16] |= (uint8_t)((v & 15) << i / 16 * 4);
        if (five) bits[i / 8] |= (uint8_t)(v >> 4 << i % 8);
    }
    return (size_t)(q + 16 - out);
}

/* The 6-bit factors of group g of 8 into their 12 bytes, zero before. */
static void test_put_factors(uint8_t *p, size_t g, unsigned s, unsigned t) {
    if (g < 4) {
        p[g] |= (uint8_t)s;
        p[g + 4] |= (uint8_t)t;
        return;
    }
    p[g + 4] |= (uint8_t)((s & 15) | (t & 15) << 4);
    p[g - 4] |= (uint8_t)(s >> 4 << 6);
    p[g] |= (uint8_t)(t >> 4 << 6);
}

static size_t test_quantise_k(bool five, const float x[TEST_SUPER], uint16_t (*half)(float),
                              uint8_t *out) {
    float most = five ? 31 : 15, scale[8], min[8], d = 0, m = 0;
    for (size_t g = 0; g < 8; g++) {
        float low = 0, high = x[32 * g];
        for (size_t i = 32 * g; i < 32 * (g + 1); i++) {
            low = fminf(low, x[i]);
            high = fmaxf(high, x[i]);
        }
        scale[g] = (high - low) / most;
        min[g] = -low;
        d = fmaxf(d, scale[g] / 63);
        m = fmaxf(m, min[g] / 63);
    }
    uint8_t *high_bits = out + 16, *q = out + (five ? 48 : 16);
    memset(out, 0, five ? 176 : 144);
    test_put_half(out, half(d));
    test_put_half(out + 2, half(m));
    for (size_t g = 0; g < 8; g++) {
        unsigned s = test_clamped(d > 0 ? scale[g] / d : 0, 63);
        unsigned t = test_clamped(m > 0 ? min[g] / m : 0, 63);
        test_put_factors(out + 4, g, s, t);
        for (size_t i = 0; i < 32; i++) {
            float step = d * (float)s, v = x[32 * g + i] + m * (float)t;
            unsigned u = test_clamped(step > 0 ? v / step : 0, most);
            q[g / 2 * 32 + i] |= (uint8_t)((u & 15) << g % 2 * 4);
            if (five) high_bits[i] |= (uint8_t)(u >> 4 << g);
        }
    }
    return five ? 176 : 144;
}

static size_t test_quantise_q6_k(const float x[TEST_SUPER], uint16_t (*half)(float), uint8_t *out) {
    float most[16] = {0}, d = 0;
    for (size_t i = 0; i < TEST_SUPER; i++) most[i / 16] = fmaxf(most[i / 16], fabsf(x[i]));
    for (size_t i = 0; i < 16; i++) d = fmaxf(d, most[i] / 31 / 127);
    memset(out, 0, 210);
    for (size_t i = 0; i < TEST_SUPER; i++) {
        size_t part = i / 16, n = i / 128, k = i / 32 % 4, j = i % 32;
        /* Every other factor is negative: the sign is a field, too. */
        int s = (int)lrintf(d > 0 ? most[part] / 31 / d : 0) * (part % 2 ? -1 : 1);
        float step = d * (float)s;
        unsigned u = test_clamped(s != 0 ? x[i] / step + 32 : 32, 63);
        out[192 + part] = (uint8_t)(int8_t)s;
        out[64 * n + 32 * (k % 2) + j] |= (uint8_t)((u & 15) << k / 2 * 4);
        out[128 + 32 * n + j] |= (uint8_t)(u >> 4 << 2 * k);
    }
    test_put_half(out + 208, half(d));
    return 210;
}

/* One block of any quantised type; x holds its 32 or 256 weights. Returns its bytes. */
static size_t test_quantise(ibid_type type, const float *x, uint16_t (*half)(float),
                            uint8_t out[TEST_SUPER]) {
    if (type == IBID_Q4_K || type == IBID_Q5_K)
        return test_quantise_k(type == IBID_Q5_K, x, half, out);
    if (type == IBID_Q6_K) return test_quantise_q6_k(x, half, out);
    return test_quantise_32(type, x, half, out);
}
#endif
