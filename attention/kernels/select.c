#include "attention/kernels/select.h"

#include "attention/kernels/kernels.h"

#include <math.h>
#include <string.h>

/* The dimensions of pair i; those past n_rot are paired with their neighbours. */
static void pair_of(const ibid_page_shape *s, size_t i, size_t *a, size_t *b) {
    bool half = s->pairing == IBID_PAIR_HALF && i < s->n_rot / 2;
    *a = half ? i : 2 * i;
    *b = half ? i + s->n_rot / 2 : 2 * i + 1;
}

size_t ibid_page_width(const ibid_page_shape *s) {
    return (s->head_dim + s->head_dim / 2 + 31) / 32 * 32;
}

/* The least f16 that is not below a value. */
static uint16_t half_above(float v) {
    uint16_t h = ibid_f32_to_f16(v);
    while (ibid_f16_to_f32(h) < v && h < 0x7c00) h++;
    return h;
}

static void mean_of(const ibid_page_shape *s, const float *keys, size_t n, uint64_t seen,
                    float *mean) {
    size_t count = 0;
    for (size_t d = 0; d < s->head_dim; d++) mean[d] = 0;
    for (size_t t = 0; t < n; t++) {
        if (!(seen >> t & 1)) continue;
        for (size_t d = 0; d < s->head_dim; d++) mean[d] += keys[t * s->head_dim + d];
        count++;
    }
    float inverse = count ? 1 / (float)count : 0;
    for (size_t d = 0; d < s->head_dim; d++) mean[d] *= inverse;
}

void ibid_page_summary(const ibid_page_shape *s, const float *keys, size_t n, uint64_t seen,
                       const float *cos, const float *sin, uint16_t *out) {
    float mean[IBID_PAGE_DIM_MAX], square[IBID_PAGE_DIM_MAX / 2];
    size_t dim = s->head_dim, a, b;
    mean_of(s, keys, n, seen, mean);
    memset(square, 0, sizeof square);
    for (size_t t = 0; t < n; t++) {
        if (!(seen >> t & 1)) continue;
        for (size_t i = 0; i < dim / 2; i++) {
            pair_of(s, i, &a, &b);
            float x = keys[t * dim + a] - mean[a], y = keys[t * dim + b] - mean[b];
            square[i] = fmaxf(square[i], x * x + y * y);
        }
    }
    for (size_t i = 0; i < dim / 2; i++) {
        pair_of(s, i, &a, &b);
        float x = mean[a], y = mean[b];
        if (cos && i < s->n_rot / 2) {
            x = mean[a] * cos[i] - mean[b] * sin[i];
            y = mean[a] * sin[i] + mean[b] * cos[i];
        }
        out[a] = ibid_f32_to_f16(x);
        out[b] = ibid_f32_to_f16(y);
        /* What rounding moved, and a little for that of the sums here. */
        float off = hypotf(x - ibid_f16_to_f32(out[a]), y - ibid_f16_to_f32(out[b]));
        float far = sqrtf(square[i]) + off + 1e-6f * hypotf(x, y);
        out[dim + i] = half_above(far * (1 + 1e-6f));
    }
    size_t used = dim + dim / 2;
    memset(out + used, 0, (ibid_page_width(s) - used) * sizeof *out);
}

void ibid_page_query(const ibid_page_shape *s, const float *q, float spread, float *out) {
    size_t dim = s->head_dim, used = dim + dim / 2, a, b;
    memcpy(out, q, dim * sizeof *out);
    for (size_t i = 0; i < dim / 2; i++) {
        pair_of(s, i, &a, &b);
        out[dim + i] = spread * sqrtf(q[a] * q[a] + q[b] * q[b]);
    }
    memset(out + used, 0, (ibid_page_width(s) - used) * sizeof *out);
}

void ibid_page_weigh(float *scores, const uint32_t *tokens, size_t n, float *weight) {
    float max = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++)
        if (tokens[i]) max = fmaxf(max, scores[i]);
    for (size_t i = 0; i < n; i++) {
        /* What is no number is no page to read: it would make all of them nothing. */
        float e = tokens[i] && scores[i] <= max ? expf(scores[i] - max) : 0;
        scores[i] = e;
        sum += e;
    }
    float inverse = sum > 0 ? 1 / sum : 0;
    for (size_t i = 0; i < n; i++) weight[i] += scores[i] * inverse;
}

/* Whether page a goes before page b. */
static bool before(const float *weight, uint32_t a, uint32_t b) {
    return weight[a] != weight[b] ? weight[a] > weight[b] : a < b;
}

static void sink(const float *weight, uint32_t *heap, size_t n, size_t i) {
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(weight, heap[child + 1], heap[child])) child++;
        if (!before(weight, heap[child], heap[i])) return;
        uint32_t other = heap[i];
        heap[i] = heap[child];
        heap[child] = other;
    }
}

size_t ibid_page_choose(const float *weight, const uint32_t *tokens, size_t n, size_t budget,
                        uint32_t *heap, uint64_t *chosen) {
    size_t have = 0, left = 0;
    for (size_t i = 0; i < n; i++) {
        if (chosen[i / 64] >> i % 64 & 1)
            have += tokens[i];
        else if (tokens[i])
            heap[left++] = (uint32_t)i;
    }
    if (have >= budget) return have;
    for (size_t i = left / 2; i > 0; i--) sink(weight, heap, left, i - 1);
    while (left && have < budget) {
        uint32_t best = heap[0];
        chosen[best / 64] |= UINT64_C(1) << best % 64;
        have += tokens[best];
        heap[0] = heap[--left];
        sink(weight, heap, left, 0);
    }
    return have;
}
