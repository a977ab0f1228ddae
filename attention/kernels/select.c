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

size_t ibid_page_padded(const ibid_page_shape *s) {
    return (s->head_dim + 31) / 32 * 32;
}

size_t ibid_page_quads(const ibid_page_shape *s) {
    return (s->head_dim / 4 * IBID_PAGE_READ + 7) / 8;
}

size_t ibid_page_bytes(const ibid_page_shape *s) {
    size_t padded = ibid_page_padded(s);
    return padded * (sizeof(uint16_t) + sizeof(float)) + s->head_dim * IBID_PAGE_TOKENS / 2;
}

ibid_page_sums ibid_page_sums_at(const ibid_page_shape *s, void *at, size_t room) {
    size_t padded = ibid_page_padded(s);
    uint8_t *codes = at, *steps = codes + s->head_dim * room * IBID_PAGE_TOKENS / 2;
    return (ibid_page_sums){.room = room,
                            .codes = codes,
                            .steps = (float *)(void *)steps,
                            .means = (uint16_t *)(void *)(steps + padded * room * sizeof(float))};
}

/* The dimensions in the order of quads. */
static void in_order(const ibid_page_shape *s, size_t *order) {
    for (size_t i = 0; i < s->head_dim / 2; i++) pair_of(s, i, &order[2 * i], &order[2 * i + 1]);
}

/* The mean of the keys that count, as it is stored. */
static void mean_of(const ibid_page_shape *s, const float *keys, size_t n, uint64_t seen,
                    uint16_t *stored, float *mean) {
    size_t count = 0;
    for (size_t d = 0; d < s->head_dim; d++) mean[d] = 0;
    for (size_t t = 0; t < n; t++) {
        if (!(seen >> t & 1)) continue;
        for (size_t d = 0; d < s->head_dim; d++) mean[d] += keys[t * s->head_dim + d];
        count++;
    }
    float inverse = count ? 1 / (float)count : 0;
    for (size_t d = 0; d < s->head_dim; d++) {
        stored[d] = ibid_f32_to_f16(fminf(fmaxf(mean[d] * inverse, -65504), 65504));
        mean[d] = ibid_f16_to_f32(stored[d]);
    }
    memset(stored + s->head_dim, 0, (ibid_page_padded(s) - s->head_dim) * sizeof *stored);
}

/* What is no number becomes 0. */
static uint8_t code_of(float difference, float inverse) {
    float x = difference * inverse + 8; /* rounds when it is cut */
    x = x > 0 ? x : 0;
    return (uint8_t)(int)(x < 15 ? x : 15);
}

/* Two rows of codes [2, head_dim], to the quads' places. */
static void store_codes(const ibid_page_shape *s, const uint8_t *rows, const size_t *order,
                        uint8_t *to, size_t room) {
    uint8_t both[IBID_PAGE_DIM_MAX], sorted[IBID_PAGE_DIM_MAX];
    const uint8_t *from = both;
    for (size_t d = 0; d < s->head_dim; d++)
        both[d] = (uint8_t)(rows[d] | rows[s->head_dim + d] << 4);
    if (s->pairing == IBID_PAIR_HALF) {
        for (size_t i = 0; i < s->head_dim; i++) sorted[i] = both[order[i]];
        from = sorted;
    }
    for (size_t i = 0; i < s->head_dim; i += 4)
        memcpy(to + i / 4 * room * IBID_PAGE_TOKENS * 2, from + i, 4);
}

void ibid_page_summary(const ibid_page_shape *s, const float *keys, size_t n, uint64_t seen,
                       const ibid_page_sums *out, size_t page) {
    float mean[IBID_PAGE_DIM_MAX], most[IBID_PAGE_DIM_MAX] = {0}, inverse[IBID_PAGE_DIM_MAX];
    uint8_t codes[2 * IBID_PAGE_DIM_MAX]; /* of two tokens */
    size_t dim = s->head_dim, one = seen ? (size_t)__builtin_ctzll(seen) : 0;
    size_t order[IBID_PAGE_DIM_MAX];
    in_order(s, order);
    mean_of(s, keys, n, seen, out->means + page * ibid_page_padded(s), mean);
    for (size_t t = 0; t < n; t++) {
        if (!(seen >> t & 1)) continue;
        for (size_t d = 0; d < dim; d++) {
            float far = fabsf(keys[t * dim + d] - mean[d]);
            most[d] = far > most[d] ? far : most[d];
        }
    }
    for (size_t d = 0; d < dim; d++) inverse[d] = most[d] > 0 ? 7.5f / most[d] : 0;
    for (size_t i = 0; i < dim; i++)
        out->steps[(i / 4 * out->room + page) * 4 + i % 4] = most[order[i]] / 7.5f;
    for (size_t t = 0; t < IBID_PAGE_TOKENS; t++) {
        const float *k = keys + (t < n && seen >> t & 1 ? t : one) * dim;
        uint8_t *row = codes + t % 2 * dim;
        for (size_t d = 0; d < dim; d++) row[d] = code_of(k[d] - mean[d], inverse[d]);
        if (t % 2) store_codes(s, codes, order, out->codes + (page * 32 + t / 2) * 4, out->room);
    }
}

void ibid_page_spread(const ibid_page_shape *s, const ibid_page_sums *pages, size_t n,
                      float *spread, float *most) {
    size_t order[IBID_PAGE_DIM_MAX];
    in_order(s, order);
    for (size_t i = 0; i < s->head_dim; i += 4) {
        const float *steps = pages->steps + i * pages->room;
        float sum[4] = {0}, top[4] = {0};
        for (size_t k = 0; k < 4 * n; k++) {
            sum[k % 4] += steps[k] * steps[k];
            top[k % 4] = steps[k] > top[k % 4] ? steps[k] : top[k % 4];
        }
        for (size_t k = 0; k < 4; k++) {
            spread[order[i + k]] = sqrtf(sum[k]);
            most[order[i + k]] = top[k];
        }
    }
}

void ibid_page_ask(const ibid_page_shape *s, const float *q, size_t group, const float *spread,
                   const float *most, const ibid_page_query *out) {
    size_t all = s->head_dim / 4, want = ibid_page_quads(s), n = 0, order[IBID_PAGE_DIM_MAX];
    in_order(s, order);
    for (size_t i = 0; i < all; i++) {
        out->rank[i] = 0;
        for (size_t k = 0; k < 4; k++) {
            size_t d = order[4 * i + k];
            float sum = 0;
            for (size_t g = 0; g < group; g++) sum += fabsf(q[g * s->head_dim + d]);
            out->rank[i] += spread[d] * sum;
        }
    }
    for (size_t i = 0; i < all && n < want; i++) { /* among what is no number, more come first */
        size_t before = 0;
        for (size_t j = 0; j < all; j++)
            before += out->rank[j] > out->rank[i] || (out->rank[j] == out->rank[i] && j < i);
        if (before < want) out->quads[n++] = (uint32_t)i;
    }
    for (size_t g = 0; g < group; g++) {
        float *to = out->q + 4 * g * want, largest = 0, sum = 0;
        for (size_t i = 0; i < 4 * want; i++) {
            size_t d = order[4 * out->quads[i / 4] + i % 4];
            to[i] = q[g * s->head_dim + d];
            float size = fabsf(to[i]) * most[d];
            largest = fmaxf(largest, size);
            sum += size;
        }
        float unit = fmaxf(largest / 127, sum * IBID_PAGE_UNIT);
        for (size_t i = 0; i < 4 * want; i++) to[i] = unit > 0 ? to[i] / unit : 0;
        out->unit[g] = unit;
    }
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
