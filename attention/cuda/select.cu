/* Decode-time selection of pages (select.h): summaries of a page's keys, their scores against a
 * row's queries, and the heaviest ones in order. The method, its sources and the functions that are
 * the oracle: attention/kernels/select.h. */
#include "attention/cuda/dialect.h"
#include "attention/cuda/select.h"

enum {
    PAIRS = IBIDI_CU_DIM_MAX / 64, /* of a lane, at most */
    DIMS = IBIDI_CU_DIM_MAX / 32,  /* the same */
    QUADS = IBIDI_CU_DIM_MAX / 4,
    QUADS_READ = (QUADS * 3 + 7) / 8,
    SCORE_WARPS = 4,
    SCORE_PAGES = 8 * SCORE_WARPS, /* of a thread block, so that its choice of quads pays */
    SCORE_HEADS = 4,               /* of a thread block: a warp's for scaling */
    THREADS = 256
};

#define PAGE_UNIT (15.0f / 28000.0f) /* IBID_PAGE_UNIT */

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

/* Of a (layer, kv head). */
struct summaries {
    uint32_t *codes; /* [dim / 4, room, 32] */
    float4 *steps;   /* [dim / 4, room] */
    uint16_t *means; /* [room, dim] */
};

IBIDI_DEV summaries summaries_of(const ibidi_cu_shape &m, const ibidi_cu_choosing &a,
                                 unsigned layer, unsigned head) {
    size_t dim = m.head_dim, room = a.room, n = (size_t)layer * m.n_kv_heads + head;
    uint8_t *at = a.summaries + n * room * ibidi_cu_summary_bytes(m.head_dim);
    uint8_t *steps = at + dim * room * (IBIDI_CU_PAGE / 2);
    return {(uint32_t *)(void *)at, (float4 *)(void *)steps,
            (uint16_t *)(void *)(steps + dim * room * sizeof(float))};
}

/* A page's keys, and what a warp knows of them: a lane has pairs lane, lane + 32, ... */
struct page_keys {
    const ibidi_cu_shape &m;
    const uint8_t *head;
    const float *turn; /* of queries back; keys go the other way. NULL: none */
    float *space;      /* [dim] */
    float x[PAIRS] = {}, y[PAIRS] = {};

    IBIDI_DEV_METHOD void load(unsigned token) {
        load_key(m, head, token, space);
#pragma unroll
        for (unsigned j = 0; j < PAIRS; j++) {
            unsigned i = threadIdx.x % 32 + 32 * j, first, second;
            if (i >= m.head_dim / 2) break;
            pair_of(m, i, &first, &second);
            float u = space[first], v = space[second];
            bool turns = turn && i < m.n_rot / 2;
            float cos = turns ? turn[i] : 1, sin = turns ? -turn[m.n_rot / 2 + i] : 0;
            x[j] = turns ? u * cos - v * sin : u;
            y[j] = turns ? u * sin + v * cos : v;
        }
        sync_warp();
    }
};

/* What is no number becomes 0. */
IBIDI_DEV uint32_t code_of(float difference, float inverse) {
    float v = difference * inverse + 8; /* rounds when it is cut */
    v = v > 0 ? v : 0;
    return (uint32_t)(v < 15 ? v : 15);
}

IBIDI_DEV float mean_as_stored(float v, uint16_t *stored) {
    *stored = f32_to_f16(fminf(fmaxf(v, -65504.0f), 65504.0f));
    return f16_to_f32(*stored);
}

/* A warp makes the summary of a page at a kv head. */
__global__ void __launch_bounds__(32)
    summary_kernel(ibidi_cu_shape m, const ibidi_cu_choosing *table, unsigned layer) {
    __shared__ float space[IBIDI_CU_DIM_MAX];
    const ibidi_cu_choosing a = *table;
    unsigned lane = threadIdx.x, dim = m.head_dim, head = blockIdx.y;
    unsigned page = a.from[layer] + blockIdx.x;
    if (page >= a.last) return;
    const ibidi_cu_page p = a.seq.pages[page];
    size_t cell = a.seq.cells[(size_t)layer * a.seq.room + page];
    page_keys k = {m, a.pool + (cell * m.n_kv_heads + head) * ibidi_cu_head_bytes(dim, m.q8),
                   p.turn ? a.seq.turns + (size_t)(p.turn - 1) * m.n_rot : NULL, space};
    const summaries out = summaries_of(m, a, layer, head);
    float x[PAIRS] = {}, y[PAIRS] = {}, far_x[PAIRS] = {}, far_y[PAIRS] = {};
    unsigned count = 0, one = 0, first, second;
    for (unsigned t = 0; t < p.n; t++) {
        if (!(p.keep >> t & 1)) continue;
        k.load(t);
#pragma unroll
        for (unsigned j = 0; j < PAIRS; j++) {
            x[j] += k.x[j];
            y[j] += k.y[j];
        }
        if (!count++) one = t;
    }
    float inverse = count ? 1 / (float)count : 0;
#pragma unroll
    for (unsigned j = 0; j < PAIRS; j++) {
        unsigned i = lane + 32 * j;
        if (i >= dim / 2) break;
        pair_of(m, i, &first, &second);
        x[j] = mean_as_stored(x[j] * inverse, &out.means[(size_t)page * dim + first]);
        y[j] = mean_as_stored(y[j] * inverse, &out.means[(size_t)page * dim + second]);
    }
    for (unsigned t = 0; t < p.n; t++) {
        if (!(p.keep >> t & 1)) continue;
        k.load(t);
#pragma unroll
        for (unsigned j = 0; j < PAIRS; j++) {
            far_x[j] = fmaxf(far_x[j], fabsf(k.x[j] - x[j]));
            far_y[j] = fmaxf(far_y[j], fabsf(k.y[j] - y[j]));
        }
    }
#pragma unroll
    for (unsigned j = 0; j < PAIRS; j++) {
        unsigned i = lane + 32 * j;
        if (i >= dim / 2) break;
        float *steps = (float *)(out.steps + (size_t)(i / 2) * a.room + page) + i % 2 * 2;
        steps[0] = far_x[j] / 7.5f;
        steps[1] = far_y[j] / 7.5f;
        far_x[j] = far_x[j] > 0 ? 7.5f / far_x[j] : 0;
        far_y[j] = far_y[j] > 0 ? 7.5f / far_y[j] : 0;
    }
    for (unsigned t = 0; t < IBIDI_CU_PAGE; t += 2) {
        uint32_t two[PAIRS] = {};
        for (unsigned u = 0; u < 2; u++) {
            k.load(t + u < p.n && p.keep >> (t + u) & 1 ? t + u : one);
#pragma unroll
            for (unsigned j = 0; j < PAIRS; j++)
                two[j] |= (code_of(k.x[j] - x[j], far_x[j]) | code_of(k.y[j] - y[j], far_y[j]) << 8)
                          << 4 * u;
        }
#pragma unroll
        for (unsigned j = 0; j < PAIRS; j++) {
            unsigned i = lane + 32 * j;
            if (i >= dim / 2) break;
            uint32_t *word = out.codes + ((size_t)(i / 2) * a.room + page) * 32 + t / 2;
            ((uint16_t *)(void *)word)[i % 2] = (uint16_t)two[j];
        }
    }
}

/* A thread block sums up a quad's steps at a kv head. */
__global__ void __launch_bounds__(THREADS)
    steps_kernel(ibidi_cu_shape m, const ibidi_cu_choosing *table, unsigned layer) {
    __shared__ float space[33];
    const ibidi_cu_choosing a = *table;
    unsigned quad = blockIdx.x, head = blockIdx.y;
    if (a.from[layer] >= a.last) return;
    const float4 *steps = summaries_of(m, a, layer, head).steps + (size_t)quad * a.room;
    float sum[4] = {}, most[4] = {};
    for (unsigned i = threadIdx.x; i < a.last; i += THREADS) {
        const float4 v = steps[i];
        const float s[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (unsigned k = 0; k < 4; k++) {
            sum[k] += s[k] * s[k];
            most[k] = fmaxf(most[k], s[k]);
        }
    }
    float *out =
        a.spread + ((size_t)layer * m.n_kv_heads + head) * 2 * m.head_dim + (size_t)4 * quad;
#pragma unroll
    for (unsigned k = 0; k < 4; k++) {
        float all = block_reduce<false>(sum[k], space);
        __syncthreads();
        float top = block_reduce<true>(most[k], space);
        __syncthreads();
        if (threadIdx.x == 0) {
            out[k] = sqrtf(all);
            out[m.head_dim + k] = top;
        }
    }
}

/* The dimension that is number i in the order of quads. */
IBIDI_DEV unsigned in_order(const ibidi_cu_shape &m, unsigned i) {
    unsigned first, second;
    pair_of(m, i / 2, &first, &second);
    return i % 2 ? second : first;
}

/* What a thread block looks for: of heads that share keys, SCORE_HEADS. */
struct question {
    float rank[QUADS];
    uint32_t before[QUADS]; /* how many rank higher */
    uint32_t quads[QUADS_READ];
    uint32_t at[QUADS_READ];              /* of their first page's steps */
    float q[SCORE_HEADS][4 * QUADS_READ]; /* in units */
    float unit[SCORE_HEADS];
};

/* Returns how many quads are read. q [group, dim]; the block's heads are those from `from` on, and
 * zeros where there are none. */
IBIDI_DEV unsigned ask(const ibidi_cu_shape &m, const float *q, const float *spread, unsigned room,
                       unsigned from, question *out) {
    unsigned me = threadIdx.x, lane = me % 32, dim = m.head_dim, n = (dim / 4 * 3 + 7) / 8;
    for (unsigned i = me; i < dim / 4; i += 32 * SCORE_WARPS) {
        float rank = 0;
        for (unsigned k = 0; k < 4; k++) {
            unsigned d = in_order(m, 4 * i + k);
            float sum = 0;
            for (unsigned g = 0; g < m.group; g++) sum += fabsf(q[(size_t)g * dim + d]);
            rank += spread[4 * i + k] * sum;
        }
        out->rank[i] = rank;
    }
    __syncthreads();
    for (unsigned i = me; i < dim / 4; i += 32 * SCORE_WARPS) {
        unsigned before = 0;
        for (unsigned j = 0; j < dim / 4; j++)
            before += out->rank[j] > out->rank[i] || (out->rank[j] == out->rank[i] && j < i);
        out->before[i] = before;
    }
    __syncthreads();
    for (unsigned i = me; i < dim / 4; i += 32 * SCORE_WARPS) {
        unsigned at = 0;
        if (out->before[i] >= n) continue;
        for (unsigned j = 0; j < i; j++) at += out->before[j] < n;
        if (at >= n) continue; /* among what is no number, more come first */
        out->quads[at] = i;
        out->at[at] = i * room;
    }
    __syncthreads();
    unsigned g = me / 32;
    float most = 0, sum = 0;
    for (unsigned i = lane; i < 4 * n; i += 32) {
        unsigned at = 4 * out->quads[i / 4] + i % 4;
        float v = from + g < m.group ? q[(size_t)(from + g) * dim + in_order(m, at)] : 0;
        float size = fabsf(v) * spread[dim + at];
        out->q[g][i] = v;
        most = fmaxf(most, size);
        sum += size;
    }
    float unit = fmaxf(warp_max(most) / 127, warp_sum(sum) * PAGE_UNIT);
    float inverse = unit > 0 ? 1 / unit : 0;
    for (unsigned i = lane; i < 4 * n; i += 32) out->q[g][i] *= inverse;
    if (lane == 0) out->unit[g] = unit;
    __syncthreads();
    return n;
}

/* A warp's coefficients at a page, four bytes a quad, into words; base: what they add up to, of
 * this lane's. steps: of the page in the first quad. */
IBIDI_DEV void coefficients(const question &x, unsigned n, const float4 *steps,
                            uint32_t (*words)[QUADS_READ], int *base) {
    for (unsigned k = threadIdx.x % 32; k < n; k += 32) {
        const float4 s = steps[x.at[k]];
#pragma unroll
        for (unsigned g = 0; g < SCORE_HEADS; g++) {
            const float *q = x.q[g] + 4 * k;
            int a = (int)rintf(q[0] * s.x), b = (int)rintf(q[1] * s.y);
            int c = (int)rintf(q[2] * s.z), d = (int)rintf(q[3] * s.w);
            words[g][k] = ((uint32_t)a & 255) | ((uint32_t)b & 255) << 8 |
                          ((uint32_t)c & 255) << 16 | (uint32_t)d << 24;
            base[g] += a + b + c + d;
        }
    }
    sync_warp();
}

/* A warp scores pages for up to SCORE_HEADS of the queries that share a kv head; heads that are not
 * there are computed too, as zeros, so that nothing branches. */
__global__ void __launch_bounds__(32 * SCORE_WARPS)
    score_kernel(ibidi_cu_shape m, const ibidi_cu_choosing *table, unsigned layer, const float *q) {
    __shared__ question x;
    __shared__ uint32_t words[SCORE_WARPS][SCORE_HEADS][QUADS_READ];
    const ibidi_cu_choosing a = *table;
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y;
    unsigned page = blockIdx.x * SCORE_PAGES, dim = m.head_dim, from = blockIdx.z * SCORE_HEADS;
    if (page >= a.last) return;
    unsigned end = page + SCORE_PAGES < a.last ? page + SCORE_PAGES : a.last;
    unsigned heads = m.group - from;
    if (heads > SCORE_HEADS) heads = SCORE_HEADS;
    const summaries sums = summaries_of(m, a, layer, head);
    const float *spread = a.spread + ((size_t)layer * m.n_kv_heads + head) * 2 * dim;
    q += (size_t)head * m.group * dim;
    unsigned n = ask(m, q, spread, a.room, from, &x);
    float mine[DIMS][SCORE_HEADS]; /* queries */
#pragma unroll
    for (unsigned j = 0; j < DIMS; j++)
#pragma unroll
        for (unsigned g = 0; g < SCORE_HEADS; g++)
            mine[j][g] =
                lane + 32 * j < dim && g < heads ? q[(size_t)(from + g) * dim + lane + 32 * j] : 0;
    float *scores = a.weight + ((size_t)head * (m.group + 1) + from) * a.room;
    for (page += warp; page < end; page += SCORE_WARPS) {
        int base[SCORE_HEADS] = {}, even[SCORE_HEADS] = {}, odd[SCORE_HEADS] = {};
        float rest[SCORE_HEADS];
        coefficients(x, n, sums.steps + page, words[warp], base);
        const uint32_t *codes = sums.codes + (size_t)page * 32 + lane;
#pragma unroll 4
        for (unsigned k = 0; k < n; k++) {
            uint32_t w = codes[(size_t)x.at[k] * 32];
#pragma unroll
            for (unsigned g = 0; g < SCORE_HEADS; g++) {
                uint32_t c = words[warp][g][k];
                even[g] = dot4(w & 0x0f0f0f0fu, c, even[g]);
                odd[g] = dot4(w >> 4 & 0x0f0f0f0fu, c, odd[g]);
            }
        }
#pragma unroll
        for (unsigned g = 0; g < SCORE_HEADS; g++) rest[g] = -7.5f * x.unit[g] * (float)base[g];
        const uint16_t *means = sums.means + (size_t)page * dim + lane;
#pragma unroll
        for (unsigned j = 0; j < DIMS; j++) {
            if (32 * j >= dim) break;
            float v = f16_to_f32(means[32 * j]);
#pragma unroll
            for (unsigned g = 0; g < SCORE_HEADS; g++) rest[g] += mine[j][g] * v;
        }
#pragma unroll
        for (unsigned g = 0; g < SCORE_HEADS; g++) {
            float best = warp_max((float)(even[g] > odd[g] ? even[g] : odd[g]));
            float score = warp_sum(rest[g]) + x.unit[g] * best;
            if (lane == 0 && g < heads) scores[(size_t)g * a.room + page] = score;
        }
        sync_warp(); /* before the words are the next page's */
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
    ibid_err err = launch("summarise", summary_kernel, dim3((unsigned)n, m->n_kv_heads), 32, 0, s,
                          *m, a, (unsigned)layer);
    return err ? err
               : launch("steps", steps_kernel, dim3(m->head_dim / 4, m->n_kv_heads), THREADS, 0, s,
                        *m, a, (unsigned)layer);
}

extern "C" ibid_err ibidi_cu_choose(ibidi_cu_stream s, const ibidi_cu_shape *m,
                                    const ibidi_cu_choosing *a, size_t layer, size_t n,
                                    const float *q) {
    if (n == 0) return IBID_OK;
    dim3 grid((unsigned)((n + SCORE_PAGES - 1) / SCORE_PAGES), m->n_kv_heads,
              (m->group + SCORE_HEADS - 1) / SCORE_HEADS);
    ibid_err err = launch("page scores", score_kernel, grid, 32 * SCORE_WARPS, 0, s, *m, a,
                          (unsigned)layer, q);
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
