/* Decode-time selection of pages (select.h): summaries of a page's keys, their scores against a
 * row's queries, and the heaviest ones in order. Quest's bounds (arXiv:2406.10774) with the
 * departures of attention/kernels/select.h, whose functions are the oracle. */
#include "attention/cuda/dialect.h"
#include "attention/cuda/select.h"

enum {
    PAIRS = IBIDI_CU_DIM_MAX / 64, /* of a lane, at most */
    SCORE_WARPS = 4,
    THREADS = 256
};

#define SPREAD 0.5f /* IBID_PAGE_SPREAD */

/* The dimensions that RoPE turns together as pair i; those past n_rot with their neighbours. */
IBIDI_DEV void pair_of(const ibidi_cu_shape &m, unsigned i, unsigned *a, unsigned *b) {
    bool half = !m.pair_next && i < m.n_rot / 2;
    *a = half ? i : 2 * i;
    *b = half ? i + m.n_rot / 2 : 2 * i + 1;
}

/* A token's key into space [dim], out of the Walsh-Hadamard basis if it is stored there. */
IBIDI_DEV void load_key(const ibidi_cu_shape &m, const uint8_t *head, unsigned token,
                        float *space) {
    unsigned lane = threadIdx.x % 32, dim = m.head_dim;
    const uint16_t *scales =
        (const uint16_t *)(const void *)(head + 2 * ibidi_cu_plane_bytes(dim, m.q8));
    for (unsigned i = 0; i < dim / 32; i++) {
        size_t at = (size_t)token * dim + 32 * i + lane;
        float v = m.q8 ? (float)(int8_t)head[at] * f16_to_f32(scales[token * (dim / 32) + i])
                       : f16_to_f32(((const uint16_t *)(const void *)head)[at]);
        for (int mask = 1; m.q8 && mask < 32; mask *= 2) {
            float other = shuffle_xor(v, mask);
            v = lane & (unsigned)mask ? other - v : v + other;
        }
        space[32 * i + lane] = m.q8 ? v * 0.17677669529663687f : v;
    }
    sync_warp();
}

IBIDI_DEV uint16_t *summary_of(const ibidi_cu_shape &m, const ibidi_cu_choosing &a, unsigned layer,
                               unsigned head, unsigned page) {
    return a.summaries + (((size_t)layer * m.n_kv_heads + head) * a.room + page) *
                             ibidi_cu_summary_width(m.head_dim);
}

/* The least f16 that is not below a value. */
IBIDI_DEV uint16_t half_above(float v) {
    uint16_t h = f32_to_f16(v);
    return f16_to_f32(h) < v && h < 0x7c00 ? (uint16_t)(h + 1) : h;
}

/* A warp makes the summary of a page at a kv head; a lane has pairs lane, lane + 32, ... */
__global__ void __launch_bounds__(32)
    summary_kernel(ibidi_cu_shape m, const ibidi_cu_choosing *table, unsigned layer) {
    __shared__ float space[IBIDI_CU_DIM_MAX];
    const ibidi_cu_choosing a = *table;
    unsigned lane = threadIdx.x, dim = m.head_dim, head = blockIdx.y;
    unsigned page = a.from[layer] + blockIdx.x;
    if (page >= a.last) return;
    const ibidi_cu_page p = a.seq.pages[page];
    const uint8_t *keys =
        a.pool + ((size_t)a.seq.cells[(size_t)layer * a.seq.room + page] * m.n_kv_heads + head) *
                     ibidi_cu_head_bytes(dim, m.q8);
    uint16_t *out = summary_of(m, a, layer, head, page);
    float x[PAIRS] = {}, y[PAIRS] = {}, far[PAIRS] = {};
    unsigned count = 0, first, second;
    for (int pass = 0; pass < 2; pass++) {
        for (unsigned t = 0; t < p.n; t++) {
            if (!(p.keep >> t & 1)) continue;
            load_key(m, keys, t, space);
#pragma unroll
            for (unsigned j = 0; j < PAIRS; j++) {
                unsigned i = lane + 32 * j;
                if (i >= dim / 2) break;
                pair_of(m, i, &first, &second);
                if (!pass) {
                    x[j] += space[first];
                    y[j] += space[second];
                } else {
                    float dx = space[first] - x[j], dy = space[second] - y[j];
                    far[j] = fmaxf(far[j], dx * dx + dy * dy);
                }
            }
            if (!pass) count++;
            sync_warp();
        }
        float inverse = count ? 1 / (float)count : 0;
#pragma unroll
        for (unsigned j = 0; !pass && j < PAIRS; j++) {
            x[j] *= inverse;
            y[j] *= inverse;
        }
    }
    const float *c = p.turn ? a.seq.turns + (size_t)(p.turn - 1) * m.n_rot : NULL;
#pragma unroll
    for (unsigned j = 0; j < PAIRS; j++) {
        unsigned i = lane + 32 * j;
        if (i >= dim / 2) break;
        float u = x[j], v = y[j];
        if (c && i < m.n_rot / 2) { /* turns take queries back; keys go the other way */
            float cos = c[i], sin = -c[m.n_rot / 2 + i];
            u = x[j] * cos - y[j] * sin;
            v = x[j] * sin + y[j] * cos;
        }
        pair_of(m, i, &first, &second);
        out[first] = f32_to_f16(u);
        out[second] = f32_to_f16(v);
        float du = u - f16_to_f32(out[first]), dv = v - f16_to_f32(out[second]);
        float r = sqrtf(far[j]) + sqrtf(du * du + dv * dv) + 1e-6f * sqrtf(u * u + v * v);
        out[dim + i] = half_above(r * (1 + 1e-6f));
    }
    for (unsigned i = dim + dim / 2 + lane; i < ibidi_cu_summary_width(dim); i += 32) out[i] = 0;
}

/* A warp scores a page for the queries that share a kv head. */
__global__ void __launch_bounds__(32 * SCORE_WARPS)
    score_kernel(ibidi_cu_shape m, const ibidi_cu_choosing *table, unsigned layer, const float *q) {
    const ibidi_cu_choosing a = *table;
    unsigned lane = threadIdx.x % 32, page = blockIdx.x * SCORE_WARPS + threadIdx.x / 32;
    unsigned head = blockIdx.y, dim = m.head_dim, first, second;
    if (page >= a.last) return;
    const uint16_t *sum = summary_of(m, a, layer, head, page);
    float *scores = a.weight + (size_t)head * (m.group + 1) * a.room + page;
    for (unsigned g = 0; g < m.group; g++) {
        const float *at = q + ((size_t)head * m.group + g) * dim;
        float score = 0;
        for (unsigned i = lane; i < dim / 2; i += 32) {
            pair_of(m, i, &first, &second);
            float u = at[first], v = at[second];
            score += u * f16_to_f32(sum[first]) + v * f16_to_f32(sum[second]) +
                     SPREAD * sqrtf(u * u + v * v) * f16_to_f32(sum[dim + i]);
        }
        score = warp_sum(score);
        if (lane == 0) scores[(size_t)g * a.room] = score;
    }
}

IBIDI_DEV unsigned tokens_of(const ibidi_cu_page &p) {
    return bits_of(p.keep & (p.n < 64 ? (UINT64_C(1) << p.n) - 1 : UINT64_MAX));
}

/* How a page ranks: its weight's bits, for they ascend with it; more if it is always read, 0 if
 * nothing is to be read in it. */
IBIDI_DEV uint32_t rank_of(const ibidi_cu_choosing &a, float weight, unsigned i) {
    uint32_t bits;
    if (i == 0 || i >= a.last) return UINT32_MAX;
    if (!tokens_of(a.seq.pages[i])) return 0;
    memcpy(&bits, &weight, sizeof bits);
    return bits < 0x7f800000u ? bits + 1 : 1; /* what is no number comes last */
}

/* A thread block chooses for a kv head. */
__global__ void __launch_bounds__(THREADS)
    choose_kernel(ibidi_cu_shape m, const ibidi_cu_choosing *table, unsigned layer) {
    __shared__ float space[33];
    __shared__ unsigned above[THREADS + 1], equal[THREADS + 1];
    const ibidi_cu_choosing a = *table;
    unsigned head = blockIdx.x, me = threadIdx.x, n = a.n;
    const float *scores = a.weight + (size_t)head * (m.group + 1) * a.room;
    float *weight = a.weight + ((size_t)head * (m.group + 1) + m.group) * a.room;
    uint32_t *ranks = (uint32_t *)(void *)weight; /* instead of the weights, in the end */
    /* Pages that are always read have no summaries, and no weight. */
    for (unsigned i = me; i < n; i += THREADS) weight[i] = 0;
    for (unsigned g = 0; g < m.group; g++, scores += a.room) {
        float most = -INFINITY, sum = 0;
        for (unsigned i = me; i < a.last; i += THREADS)
            if (tokens_of(a.seq.pages[i])) most = fmaxf(most, scores[i]);
        most = block_reduce<true>(most, space);
        __syncthreads();
        for (unsigned i = me; i < a.last; i += THREADS)
            if (scores[i] <= most && tokens_of(a.seq.pages[i])) sum += exp2f(scores[i] - most);
        sum = block_reduce<false>(sum, space);
        __syncthreads();
        float inverse = sum > 0 ? 1 / sum : 0;
        for (unsigned i = me; i < a.last; i += THREADS)
            if (scores[i] <= most && tokens_of(a.seq.pages[i]))
                weight[i] += exp2f(scores[i] - most) * inverse;
    }
    for (unsigned i = me; i < n; i += THREADS) ranks[i] = rank_of(a, weight[i], i);
    __syncthreads();
    /* The largest rank that n_chosen pages reach, bit by bit. */
    uint32_t rank = 0;
    for (uint32_t bit = UINT32_C(1) << 31; bit; bit >>= 1) {
        float count = 0;
        for (unsigned i = me; i < n; i += THREADS) count += ranks[i] >= (rank | bit);
        count = block_reduce<false>(count, space);
        __syncthreads();
        if (count >= (float)a.n_chosen) rank |= bit;
    }
    if (rank == 0) rank = 1; /* too few have anything to read */
    /* Each thread has a run of pages, so that the chosen ones come out in order. */
    unsigned each = (n + THREADS - 1) / THREADS, from = me * each, to = from + each;
    if (to > n) to = n;
    unsigned more = 0, same = 0;
    for (unsigned i = from; i < to; i++) {
        uint32_t r = ranks[i];
        more += r > rank;
        same += r == rank;
    }
    above[me] = more;
    equal[me] = same;
    __syncthreads();
    if (me == 0) { /* sums of those before */
        more = same = 0;
        for (unsigned i = 0; i <= THREADS; i++) {
            unsigned x = i < THREADS ? above[i] : 0, y = i < THREADS ? equal[i] : 0;
            above[i] = more;
            equal[i] = same;
            more += x;
            same += y;
        }
    }
    __syncthreads();
    unsigned left = a.n_chosen - above[THREADS]; /* of the equals, the first ones */
    unsigned taken = equal[THREADS] < left ? equal[THREADS] : left;
    unsigned end = above[THREADS] + taken, at, read = 0;
    same = equal[me];
    at = above[me] + (same < taken ? same : taken);
    size_t base = (size_t)head * a.n_chosen;
    for (unsigned i = from; i < to; i++) {
        uint32_t r = ranks[i];
        if (r < rank || (r == rank && same++ >= taken)) continue;
        a.pages[base + at] = a.seq.pages[i];
        a.cells[base + at] = a.seq.cells[(size_t)layer * a.seq.room + i];
        a.which[base + at++] = i;
        if (i < a.last) read += tokens_of(a.seq.pages[i]);
    }
    for (unsigned i = end + me; i < a.n_chosen; i += THREADS) {
        ibidi_cu_page none = {0, 0, 0, 0, 0};
        a.pages[base + i] = none;
        a.cells[base + i] = a.seq.cells[(size_t)layer * a.seq.room]; /* it is not looked at */
        a.which[base + i] = UINT32_MAX;
    }
    float all = block_reduce<false>((float)read, space);
    if (me == 0) a.read[head] += (uint32_t)all;
}

__global__ void __launch_bounds__(IBIDI_CU_PAGE)
    spread_kernel(const uint32_t *which, unsigned n_stored, const float *chosen, float *mass) {
    uint32_t page = which[blockIdx.x];
    if (page >= n_stored) return;
    mass[(size_t)page * IBIDI_CU_PAGE + threadIdx.x] +=
        chosen[(size_t)blockIdx.x * IBIDI_CU_PAGE + threadIdx.x];
}

__global__ void __launch_bounds__(32)
    recall_kernel(const float *chosen, const float *all, unsigned n_heads, float *sum) {
    float part = 0;
    for (unsigned h = threadIdx.x; h < n_heads; h += 32)
        part += exp2f(fminf(chosen[h] - all[h], 0.0f));
    part = warp_sum(part);
    if (threadIdx.x == 0) sum[0] += part;
}

__global__ void __launch_bounds__(THREADS)
    land_kernel(const uint64_t *slot, const uint8_t *heads, size_t bytes, uint8_t *pool) {
    const uint4 *from = (const uint4 *)(const void *)(heads + blockIdx.x * bytes);
    uint4 *to = (uint4 *)(void *)(pool + slot[blockIdx.x] * bytes);
    for (unsigned i = threadIdx.x; i < bytes / 16; i += THREADS) to[i] = from[i];
}

extern "C" ibid_err ibidi_cu_summarise(ibidi_cu_stream s, const ibidi_cu_shape *m,
                                       const ibidi_cu_choosing *a, size_t layer, size_t n) {
    if (n == 0) return IBID_OK;
    return launch("summarise", summary_kernel, dim3((unsigned)n, m->n_kv_heads), 32, 0, s, *m, a,
                  (unsigned)layer);
}

extern "C" ibid_err ibidi_cu_choose(ibidi_cu_stream s, const ibidi_cu_shape *m,
                                    const ibidi_cu_choosing *a, size_t layer, size_t n,
                                    const float *q) {
    if (n == 0) return IBID_OK;
    ibid_err err = launch("page scores", score_kernel,
                          dim3((unsigned)((n + SCORE_WARPS - 1) / SCORE_WARPS), m->n_kv_heads),
                          32 * SCORE_WARPS, 0, s, *m, a, (unsigned)layer, q);
    return err ? err
               : launch("choose", choose_kernel, dim3(m->n_kv_heads), THREADS, 0, s, *m, a,
                        (unsigned)layer);
}

extern "C" ibid_err ibidi_cu_spread_mass(ibidi_cu_stream s, const uint32_t *which, size_t n_chosen,
                                         size_t n_stored, const float *chosen, float *mass) {
    if (n_chosen == 0) return IBID_OK;
    return launch("spread mass", spread_kernel, dim3((unsigned)n_chosen), IBIDI_CU_PAGE, 0, s,
                  which, (unsigned)n_stored, chosen, mass);
}

extern "C" ibid_err ibidi_cu_recall(ibidi_cu_stream s, const float *chosen, const float *all,
                                    size_t n_heads, float *sum) {
    return launch("recall", recall_kernel, dim3(1), 32, 0, s, chosen, all, (unsigned)n_heads, sum);
}

extern "C" ibid_err ibidi_cu_land(ibidi_cu_stream s, const uint64_t *slot, const uint8_t *heads,
                                  size_t n, size_t bytes, uint8_t *pool) {
    if (n == 0) return IBID_OK;
    return launch("landing", land_kernel, dim3((unsigned)n), THREADS, 0, s, slot, heads, bytes,
                  pool);
}
