/* Block attention of query rows over pages, on tensor cores. A thread block takes an item: some
 * pages of one tile of query rows at one kv head. Each warp takes slices of 16 tokens of its own,
 * brought in by asynchronous copies several slices ahead, so that warps wait for each other only at
 * the end, when their softmax states are merged; items of a tile are merged by merge_kernel.
 *
 * Over q8_0 pages scores are products of bytes: the stored keys as they are with both planes of the
 * queries, scaled per 32 dimensions behind the product; values become halves, and the weights take
 * their scales. Over f16 pages both are products of halves. In fine tiles rows 8 to 15 of the left
 * operand hold the rounding errors (or low planes) of rows 0 to 7, of queries and then of weights:
 * their sum is as good as f32, at no cost, since decoding has no more rows than that to fill the
 * tensor core with. Coarse tiles multiply keys with what rounding their queries left, too, half as
 * much work again: scores of sharp attention are large, and their errors with them. Online softmax:
 * arXiv:1805.02867; splitting and merging by log-sum-exp: arXiv:2205.14135. */
#include "attention/cuda/dialect.h"

enum { SLICE = 16, SLICES = IBIDI_CU_PAGE / SLICE };

/* How a slice lies in shared memory: rows padded so that lanes meet different banks. */
template <int P, bool q8> struct slice {
    static constexpr int DIM = 32 * P, ROW = DIM * (q8 ? 1 : 2);
    static constexpr int K_ROW =
        q8 ? (ROW % 128 == 96 ? ROW : ROW + 32) : (ROW % 128 == 64 ? ROW : ROW + 64);
    static constexpr int V_ROW = ROW + 16;
    static constexpr int SCALES = q8 ? SLICE * P * 2 : 0;
    static constexpr int V = SLICE * K_ROW, K_SCALE = V + SLICE * V_ROW, V_SCALE = K_SCALE + SCALES;
    static constexpr int BYTES = V_SCALE + SCALES;
    static constexpr int WARPS = 4 * 2 * BYTES > 98304 ? 2 : 4;
    /* Several thread blocks share the 228 KiB of a unit of an H100 or H200 where two stages allow
     * it: their warps hide each other's waits, and together as many bytes are on the way. */
    static constexpr int SHARE = 233472 / IBIDI_CU_RESIDENT - 1024, FIT = SHARE / (WARPS * BYTES);
    static constexpr int STAGES = FIT > 4 ? 4 : FIT < 2 ? 98304 / (WARPS * BYTES) : FIT;
    static_assert(STAGES >= 2, "a slice is computed while the next one is on its way");
    static_assert(WARPS * STAGES * BYTES <= 99 * 1024, "what compute capability 8.6 and 8.9 have");
    static_assert(WARPS * IBIDI_CU_TILE * (DIM + 2) * 4 <= WARPS * STAGES * BYTES,
                  "the warps' states are laid down there at the end");
};

/* Bytes of two words, of each the ones in the same place side by side, as halves. */
IBIDI_DEV void halves_of(uint32_t first, uint32_t second, uint32_t out[4]) {
    uint32_t a = bytes_of(first, second, 0x5140u), b = bytes_of(first, second, 0x7362u);
    out[0] = two_bytes(a, 0), out[1] = two_bytes(a, 1);
    out[2] = two_bytes(b, 0), out[3] = two_bytes(b, 1);
}

/* Rows g and g + 8 of a lane: how far they see. */
struct sight {
    uint32_t position[2], live[2];
    IBIDI_DEV_METHOD unsigned of(const ibidi_cu_page &p, int i) const {
        uint32_t see = p.live ? live[i] : position[i];
        if (see <= p.start) return 0;
        return see - p.start < p.n ? see - p.start : p.n;
    }
};

IBIDI_DEV sight look(const ibidi_cu_shape &m, const ibidi_cu_tile &t, const ibidi_cu_row *rows,
                     bool fine) {
    sight s = {{0, 0}, {0, 0}};
    for (int i = 0; i < (fine ? 1 : 2); i++) {
        unsigned j = threadIdx.x % 32 / 4 + 8 * (unsigned)i;
        if (j >= t.n) continue;
        const ibidi_cu_row &r = rows[t.row0 + (t.pair0 + j) / m.group];
        s.position[i] = r.position;
        s.live[i] = r.live + 1;
    }
    return s;
}

/* The queries of a tile as a turn wants them. rest: where what rounding coarse ones left lies; fine
 * ones hold it beside them. */
template <int P, bool q8, bool fine> struct query {
    static constexpr int N = q8 ? P : 2 * P; /* 16 bytes of a lane */
    uint4 high[N];
    const uint4 *rest;
    float scale[2]; /* of rows g, g + 8, for the low plane's unit; q8 only */

    IBIDI_DEV_METHOD void load(const uint16_t *turned, const ibidi_cu_tile &tile, uint32_t turn) {
        size_t n = fine ? 1 : 2, at = (size_t)tile.turned0 + n * turn;
        const uint8_t *from =
            (const uint8_t *)(const void *)turned + at * (32 * P * IBIDI_CU_TURNED);
        const uint4 *mine = (const uint4 *)(const void *)from + threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < N; i++) high[i] = mine[i * 32];
        rest = mine + N * 32;
        if (!q8) return;
        const float *s = (const float *)(const void *)(from + n * N * 512) + threadIdx.x % 32 / 4;
        scale[0] = s[0] * (1.0f / (float)IBIDI_CU_LOW);
        if (!fine) scale[1] = s[8] * (1.0f / (float)IBIDI_CU_LOW);
    }
};

/* Scores of a lane: s[0..3] of tokens 2t, 2t + 1 in rows g, g + 8; s[4..7] of tokens 8 later; of
 * fine tiles those of row g are the sums with those of row g + 8. row: K of token g; step: bytes
 * from one token's K to the next; scale: of token 0, P to a token. */
template <int P, bool fine>
IBIDI_DEV void score(const query<P, true, fine> &q, const uint8_t *row, size_t step,
                     const uint16_t *scale, float s[8]) {
    unsigned t = threadIdx.x % 4;
    for (int i = 0; i < 8; i++) s[i] = 0;
#pragma unroll
    for (int p = 0; p < P; p++) {
        uint4 low = {0, 0, 0, 0};
        if (!fine) low = q.rest[p * 32];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint8_t *k = row + (size_t)(8 * half) * step;
            const uint16_t *sc = scale + (8 * half + 2 * (int)t) * P;
            uint2 w = ((const uint2 *)(const void *)k)[4 * p + (int)t];
            int32_t c[4], d[4] = {0, 0, 0, 0};
            float s0 = f16_to_f32(sc[p]), s1 = f16_to_f32(sc[P + p]);
            mma_s8(c, q.high[p], w.x, w.y);
            if (!fine) mma_s8(d, low, w.x, w.y);
            s[4 * half] += (float)(c[0] * IBIDI_CU_LOW + (fine ? c[2] : d[0])) * s0;
            s[4 * half + 1] += (float)(c[1] * IBIDI_CU_LOW + (fine ? c[3] : d[1])) * s1;
            if (!fine) s[4 * half + 2] += (float)(c[2] * IBIDI_CU_LOW + d[2]) * s0;
            if (!fine) s[4 * half + 3] += (float)(c[3] * IBIDI_CU_LOW + d[3]) * s1;
        }
    }
    for (int i = 0; i < 8; i++) {
        if (i % 4 < 2)
            s[i] *= q.scale[0];
        else if (!fine)
            s[i] *= q.scale[1];
    }
}

/* Both halves of a product of 32 dimensions. */
IBIDI_DEV void multiply(float c[4], const uint4 q[2], const uint4 &b) {
    mma_f16(c, q[0].x, q[0].y, q[0].z, q[0].w, b.x, b.y);
    mma_f16(c, q[1].x, q[1].y, q[1].z, q[1].w, b.z, b.w);
}

template <int P, bool fine>
IBIDI_DEV void score(const query<P, false, fine> &q, const uint8_t *row, size_t step,
                     const uint16_t *scale, float s[8]) {
    (void)scale;
    for (int i = 0; i < 8; i++) s[i] = 0;
#pragma unroll
    for (int p = 0; p < P; p++) {
        uint4 low[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        if (!fine) low[0] = q.rest[2 * p * 32], low[1] = q.rest[(2 * p + 1) * 32];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint8_t *k = row + (size_t)(8 * half) * step;
            uint4 w = ((const uint4 *)(const void *)k)[4 * p + (int)(threadIdx.x % 4)];
            multiply(s + 4 * half, q.high + 2 * p, w);
            if (!fine) multiply(s + 4 * half, low, w);
        }
    }
    if (fine)
        for (int i = 0; i < 8; i++) s[i] += i % 4 < 2 ? s[i + 2] : 0;
}

/* acc += weights a times the slice's values, of q8_0: the scales go to the weights. fine: rows 8 to
 * 15 of a hold what rounding rows 0 to 7 left, and get what rounding their products leaves. on:
 * ones where a token may be read, those of a lane as a's words have them. */
template <int P, bool fine>
IBIDI_DEV void add_values_q8(const uint32_t a[4], const uint8_t *v, const uint16_t *scale,
                             const uint32_t on[2], float acc[4 * P][4]) {
    constexpr int ROW = slice<P, true>::V_ROW;
    unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint8_t *at = v + 2 * t * ROW + 4 * g;
    const uint16_t *s = scale + 2 * t * P;
#pragma unroll
    for (int p = 0; p < P; p++) {
        uint32_t w[4], b[4], v0[4], v1[4];
        uint32_t s0 = ((uint32_t)s[p] | (uint32_t)s[P + p] << 16) & on[0];
        uint32_t s1 = ((uint32_t)s[8 * P + p] | (uint32_t)s[9 * P + p] << 16) & on[1];
        for (int i = 0; i < 4; i++)
            w[i] = *(const uint32_t *)(const void *)(at + 32 * p + (i % 2 + i / 2 * 8) * ROW);
        b[0] = h2_mul(a[0], s0);
        b[2] = h2_mul(a[2], s1);
        if (fine) {
            b[1] = h2_fma(a[1], s0, h2_fma(a[0], s0, h2_minus(b[0])));
            b[3] = h2_fma(a[3], s1, h2_fma(a[2], s1, h2_minus(b[2])));
        } else {
            b[1] = h2_mul(a[1], s0);
            b[3] = h2_mul(a[3], s1);
        }
        halves_of(w[0], w[1], v0);
        halves_of(w[2], w[3], v1);
#pragma unroll
        for (int j = 0; j < 4; j++) mma_f16(acc[4 * p + j], b[0], b[1], b[2], b[3], v0[j], v1[j]);
    }
}

/* The same of f16, whose values may be anything where no token may be read. */
template <int P>
IBIDI_DEV void add_values_f16(const uint32_t a[4], const uint8_t *v, const uint32_t on[2],
                              float acc[4 * P][4]) {
    constexpr int ROW = slice<P, false>::V_ROW;
    unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint8_t *at = v + 2 * t * ROW + 8 * g;
#pragma unroll
    for (int p = 0; p < P; p++) {
        uint2 w[4];
        for (int i = 0; i < 4; i++)
            w[i] = *(const uint2 *)(const void *)(at + 64 * p + (i % 2 + i / 2 * 8) * ROW);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t pick = j % 2 ? 0x7632u : 0x5410u; /* the high halves, or the low ones */
            uint32_t b0 = bytes_of(j / 2 ? w[0].y : w[0].x, j / 2 ? w[1].y : w[1].x, pick) & on[0];
            uint32_t b1 = bytes_of(j / 2 ? w[2].y : w[2].x, j / 2 ? w[3].y : w[3].x, pick) & on[1];
            mma_f16(acc[4 * p + j], a[0], a[1], a[2], a[3], b0, b1);
        }
    }
}

template <int P, bool q8, bool fine>
IBIDI_DEV void add_values(const uint32_t a[4], const uint8_t *v, const uint16_t *scale,
                          unsigned valid, float acc[4 * P][4]) {
    unsigned t = threadIdx.x % 4;
    uint32_t on[2] = {UINT32_MAX, UINT32_MAX};
    for (unsigned i = 0; valid != 0xffffu && i < 2; i++) {
        unsigned bits = valid >> (2 * t + 8 * i);
        on[i] = (bits & 1 ? 0xffffu : 0) | (bits & 2 ? 0xffff0000u : 0);
    }
    if constexpr (q8)
        add_values_q8<P, fine>(a, v, scale, on, acc);
    else
        add_values_f16<P>(a, v, on, acc);
}

IBIDI_DEV uint32_t cell_of(const ibidi_cu_attend &a, const ibidi_cu_seq &s, unsigned page) {
    return s.cells[(size_t)a.layer * s.room + page];
}

template <int P, bool q8>
IBIDI_DEV const uint8_t *head_of(const ibidi_cu_shape &m, const ibidi_cu_attend &a, uint32_t cell,
                                 unsigned kv_head) {
    return a.pool + ((size_t)cell * m.n_kv_heads + kv_head) * ibidi_cu_head_bytes(32 * P, q8);
}

/* Begins to copy a slice; head: the page at its kv head. */
template <int P, bool q8> IBIDI_DEV void fetch(uint8_t *to, const uint8_t *head, unsigned n_slice) {
    using S = slice<P, q8>;
    constexpr int CHUNKS = S::ROW / 16;
    constexpr size_t PLANE = (size_t)IBIDI_CU_PAGE * S::ROW, SCALE = (size_t)SLICES * S::SCALES;
    const uint8_t *k = head + (size_t)n_slice * SLICE * S::ROW, *v = k + PLANE;
    if (32 % CHUNKS == 0) { /* a lane stays in its column, and its rows are known beforehand */
        int lane = (int)(threadIdx.x % 32), row = lane / CHUNKS, column = lane % CHUNKS * 16;
        uint8_t *to_k = to + row * S::K_ROW + column, *to_v = to + S::V + row * S::V_ROW + column;
#pragma unroll
        for (int i = 0; i < SLICE * CHUNKS / 32; i++) {
            constexpr int ROWS = 32 / CHUNKS;
            copy16_async(to_k + i * ROWS * S::K_ROW, k + lane * 16 + i * 512);
            copy16_async(to_v + i * ROWS * S::V_ROW, v + lane * 16 + i * 512);
        }
    } else {
#pragma unroll 4
        for (int i = (int)(threadIdx.x % 32); i < SLICE * CHUNKS; i += 32) {
            copy16_async(to + i / CHUNKS * S::K_ROW + i % CHUNKS * 16, k + (size_t)i * 16);
            copy16_async(to + S::V + i / CHUNKS * S::V_ROW + i % CHUNKS * 16, v + (size_t)i * 16);
        }
    }
    if (!q8) return;
    const uint8_t *scale = head + 2 * PLANE + (size_t)n_slice * S::SCALES;
    for (int i = (int)(threadIdx.x % 32); i < S::SCALES / 16; i += 32) {
        copy16_async(to + S::K_SCALE + i * 16, scale + i * 16);
        copy16_async(to + S::V_SCALE + i * 16, scale + SCALE + i * 16);
    }
}

/* Weights are 2^(score - largest + LIFT), so that small ones do not vanish as halves, nor when they
 * take the values' scales. */
#define LIFT 6.0f

/* The softmax state of a lane's rows g and g + 8 (the same one twice in fine tiles). sum is the
 * lane's own share. */
template <int P> struct running {
    float max[2], sum[2];
    float acc[4 * P][4];
};

template <int P, bool q8, bool fine>
IBIDI_DEV void attend_slice(running<P> &r, const query<P, q8, fine> &q, const uint8_t *at,
                            const ibidi_cu_page &page, unsigned n_slice, unsigned valid,
                            const sight &see) {
    using S = slice<P, q8>;
    unsigned t = threadIdx.x % 4, token0 = n_slice * SLICE;
    float s[8], p[8];
    score<P, fine>(q, at + (threadIdx.x % 32 / 4) * S::K_ROW, S::K_ROW,
                   (const uint16_t *)(const void *)(at + S::K_SCALE), s);
    float factor[2] = {1, 1};
#pragma unroll
    for (int h = 0; h < (fine ? 1 : 2); h++) {
        unsigned seen = see.of(page, h), lasts = seen > token0 ? seen - token0 : 0;
        float largest = -INFINITY;
        if (valid != 0xffffu || lasts < SLICE)
            for (int i = 0; i < 4; i++) {
                unsigned j = 2 * t + (unsigned)(i % 2 + i / 2 * 8);
                if (!(valid >> j & 1) || j >= lasts) s[i % 2 + i / 2 * 4 + 2 * h] = -INFINITY;
            }
        for (int i = 0; i < 4; i++) largest = fmaxf(largest, s[i % 2 + i / 2 * 4 + 2 * h]);
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        largest = fmaxf(largest, shuffle_xor(largest, 2));
        float max = fmaxf(r.max[h], largest);
        float unit = max > -INFINITY ? max - LIFT : 0; /* else nothing is seen yet */
        factor[h] = max == r.max[h] ? 1 : exp2_of(r.max[h] - max);
        r.max[h] = max;
        r.sum[h] *= factor[h];
        for (int i = 0; i < 4; i++) {
            int k = i % 2 + i / 2 * 4 + 2 * h;
            p[k] = exp2_of(s[k] - unit);
            r.sum[h] += p[k];
        }
    }
    if (fine) {
        factor[1] = factor[0];
        for (int i = 0; i < 8; i += 4) {
            for (int k = i; k < i + 2; k++) p[k + 2] = p[k] - f16_to_f32(f32_to_f16(p[k]));
        }
    }
    if (factor[0] != 1 || factor[1] != 1) { /* seldom, once much was seen */
#pragma unroll
        for (int i = 0; i < 4 * P; i++) {
            for (int k = 0; k < 4; k++) r.acc[i][k] *= factor[k / 2];
        }
    }
    uint32_t a[4] = {h2_of(p[0], p[1]), h2_of(p[2], p[3]), h2_of(p[4], p[5]), h2_of(p[6], p[7])};
    add_values<P, q8, fine>(a, at + S::V, (const uint16_t *)(const void *)(at + S::V_SCALE), valid,
                            r.acc);
}

/* Lays a warp's state down: rows [n], then accumulators [n, DIM]. */
template <int P, bool fine> IBIDI_DEV void lay_down(const running<P> &r, float *state, float *acc) {
    constexpr int DIM = 32 * P;
    unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < (fine ? 1 : 2); h++) {
        float sum = r.sum[h];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        unsigned row = g + 8 * (unsigned)h;
        if (t == 0) {
            state[2 * row] = r.max[h] - LIFT;
            state[2 * row + 1] = sum;
        }
#pragma unroll
        for (int i = 0; i < 4 * P; i++) {
            for (int k = 0; k < 2; k++) {
                unsigned dim =
                    32 * (unsigned)(i / 4) + 4 * (2 * t + (unsigned)k) + (unsigned)(i % 4);
                acc[row * DIM + dim] = fine ? r.acc[i][k] + r.acc[i][k + 2] : r.acc[i][k + 2 * h];
            }
        }
    }
}

/* A slice's number in an item counts over its pages. */
template <int P, bool q8, bool fine>
__global__ void __launch_bounds__(32 * slice<P, q8>::WARPS, P > 4 ? 1 : IBIDI_CU_RESIDENT)
    attention_kernel(ibidi_cu_shape m, ibidi_cu_attend a) {
    using S = slice<P, q8>;
    constexpr unsigned DIM = 32 * P, ROWS = fine ? IBIDI_CU_TILE_FINE : IBIDI_CU_TILE;
    IBIDI_DYNAMIC_SHARED(memory);
    const ibidi_cu_item item = a.items[blockIdx.x];
    if (item.page0 == item.page1) return;
    const ibidi_cu_tile tile = a.tiles[item.tile];
    const ibidi_cu_seq seq = a.seqs[tile.seq];
    unsigned warp = threadIdx.x / 32, n = (item.page1 - item.page0) * SLICES;
    uint8_t *stages = memory + warp * S::STAGES * S::BYTES;
    sight see = look(m, tile, a.rows, fine);
    query<P, q8, fine> q;
    uint32_t turn = UINT32_MAX;
    running<P> r = {{-INFINITY, -INFINITY}, {0, 0}, {}};
    constexpr unsigned AHEAD = (S::STAGES - 1) * S::WARPS;
#pragma unroll
    for (unsigned i = 0; i < AHEAD; i += S::WARPS) {
        unsigned next = warp + i;
        if (next < n)
            fetch<P, q8>(
                stages + i / S::WARPS * S::BYTES,
                head_of<P, q8>(m, a, cell_of(a, seq, item.page0 + next / SLICES), tile.kv_head),
                next % SLICES);
        copy_commit();
    }
    /* What the next round needs of the tables is read in this one. */
    uint32_t cell = 0;
    ibidi_cu_page coming = {0, 0, 0, 0, 0};
    if (warp + AHEAD < n) cell = cell_of(a, seq, item.page0 + (warp + AHEAD) / SLICES);
    if (warp < n) coming = seq.pages[item.page0 + warp / SLICES];
    int stage = 0;
    for (unsigned i = warp; i < n; i += S::WARPS) {
        unsigned next = i + AHEAD, n_slice = i % SLICES;
        const ibidi_cu_page page = coming;
        copy_wait<S::STAGES - 2>();
        sync_warp();
        if (next < n)
            fetch<P, q8>(stages + (stage + S::STAGES - 1) % S::STAGES * S::BYTES,
                         head_of<P, q8>(m, a, cell, tile.kv_head), next % SLICES);
        copy_commit();
        next += S::WARPS;
        if (next < n) cell = cell_of(a, seq, item.page0 + next / SLICES);
        if (i + S::WARPS < n) coming = seq.pages[item.page0 + (i + S::WARPS) / SLICES];
        unsigned left = page.n > n_slice * SLICE ? page.n - n_slice * SLICE : 0;
        unsigned valid = (unsigned)(page.keep >> (n_slice * SLICE)) & 0xffffu;
        if (left < SLICE) valid &= (1u << left) - 1;
        if (valid) {
            if (page.turn != turn) q.load(a.turned, tile, page.turn);
            turn = page.turn;
            attend_slice<P, q8, fine>(r, q, stages + stage * S::BYTES, page, n_slice, valid, see);
        }
        stage = (stage + 1) % S::STAGES;
    }
    copy_wait<0>();
    __syncthreads();
    float *states = (float *)(void *)memory, *accs = states + S::WARPS * ROWS * 2;
    lay_down<P, fine>(r, states + warp * ROWS * 2, accs + warp * ROWS * DIM);
    __syncthreads();
    for (unsigned i = threadIdx.x; i < tile.n * DIM; i += 32 * S::WARPS) {
        unsigned row = i / DIM;
        float max = -INFINITY, sum = 0, out = 0;
        for (unsigned w = 0; w < S::WARPS; w++) max = fmaxf(max, states[(w * ROWS + row) * 2]);
        for (unsigned w = 0; w < S::WARPS; w++) {
            const float *st = &states[(w * ROWS + row) * 2];
            float f = st[0] > -INFINITY ? exp2f(st[0] - max) : 0;
            sum += st[1] * f;
            out += accs[w * ROWS * DIM + i] * f;
        }
        a.acc[(size_t)item.partial * ROWS * DIM + i] = out;
        if (i % DIM) continue;
        a.state[((size_t)item.partial * ROWS + row) * 2] = max;
        a.state[((size_t)item.partial * ROWS + row) * 2 + 1] = sum;
    }
}

/* ---- Merging ---- */

enum { MERGE_WARPS = 4, PARTS = IBIDI_CU_DIM_MAX / 32 };

__global__ void __launch_bounds__(32 * MERGE_WARPS)
    merge_kernel(ibidi_cu_shape m, ibidi_cu_attend a, uint16_t *h, size_t ldh, float *lse) {
    unsigned lane = threadIdx.x % 32, head = blockIdx.x * MERGE_WARPS + threadIdx.x / 32;
    unsigned dim = m.head_dim, parts = dim / 32;
    size_t row = blockIdx.y;
    if (head >= m.n_heads) return;
    const ibidi_cu_row r = a.rows[row];
    unsigned pair = r.pair0 + head % m.group;
    const ibidi_cu_tile *t = &a.tiles[r.tile0 + head / m.group * r.tiles + pair / r.tile_rows];
    size_t slot = pair % r.tile_rows, first = (size_t)t->partial0 * r.tile_rows + slot;
    float max = -INFINITY, sum = 0, v[PARTS] = {};
    for (unsigned i = lane; i < t->n_partials; i += 32)
        max = fmaxf(max, a.state[(first + (size_t)i * r.tile_rows) * 2]);
    max = warp_max(max);
    for (unsigned i = 0; i < t->n_partials; i++) {
        size_t at = first + (size_t)i * r.tile_rows;
        float top = a.state[at * 2], f = top > -INFINITY ? exp2f(top - max) : 0;
        sum += a.state[at * 2 + 1] * f;
#pragma unroll
        for (unsigned p = 0; p < PARTS; p++)
            if (p < parts) v[p] += a.acc[at * dim + 32 * p + lane] * f;
    }
    float inverse = sum > 0 ? 1 / sum : 0;
#pragma unroll
    for (unsigned p = 0; p < PARTS; p++)
        if (p < parts)
            h[row * ldh + head * dim + 32 * p + lane] =
                f32_to_f16(fminf(fmaxf(v[p] * inverse, -65504.0f), 65504.0f));
    for (size_t i = (size_t)m.n_heads * dim + lane; head == 0 && i < ldh; i += 32)
        h[row * ldh + i] = 0;
    if (lane == 0) lse[row * m.n_heads + head] = log2f(sum) + max;
}

/* ---- Attention mass ---- */

template <int P, bool q8, bool fine>
__global__ void __launch_bounds__(32 * SLICES)
    mass_kernel(ibidi_cu_shape m, ibidi_cu_attend a, unsigned tile0, unsigned n_tiles,
                const uint64_t *heads, unsigned row_lo, unsigned row_hi, const float *lse,
                float *mass) {
    using S = slice<P, q8>;
    unsigned n_slice = threadIdx.x / 32, lane = threadIdx.x % 32;
    const ibidi_cu_seq seq = a.seqs[a.tiles[tile0].seq];
    const ibidi_cu_page page = seq.pages[blockIdx.x];
    unsigned valid = (unsigned)(page.keep >> (n_slice * SLICE)) & 0xffffu;
    float sums[4] = {0, 0, 0, 0}; /* tokens 2t, 2t + 1, 2t + 8, 2t + 9 */
    for (unsigned k = 0; k < n_tiles; k++) {
        const ibidi_cu_tile t = a.tiles[tile0 + k];
        const uint8_t *head = head_of<P, q8>(m, a, cell_of(a, seq, blockIdx.x), t.kv_head);
        sight see = look(m, t, a.rows, fine);
        query<P, q8, fine> q;
        float s[8];
        q.load(a.turned, t, page.turn);
        const uint16_t *scale = (const uint16_t *)(const void *)(head + 2 * IBIDI_CU_PAGE * S::ROW);
        score<P, fine>(q, head + (size_t)(n_slice * SLICE + lane / 4) * S::ROW, S::ROW,
                       scale + (q8 ? n_slice * SLICE * P : 0), s);
        for (int h = 0; h < 2; h++) {
            unsigned j = lane / 4 + 8 * (unsigned)h, pair = t.pair0 + j;
            unsigned row = t.row0 + pair / m.group, hd = t.kv_head * m.group + pair % m.group;
            if ((h && fine) || j >= t.n || row < row_lo || row >= row_hi) continue;
            if (heads && !(heads[hd / 64] >> (hd % 64) & 1)) continue;
            float end = lse[(size_t)row * m.n_heads + hd];
            unsigned seen = see.of(page, h);
            for (int i = 0; i < 4; i++) {
                unsigned token = 2 * (lane % 4) + (unsigned)(i % 2 + i / 2 * 8);
                int at = i % 2 + i / 2 * 4 + 2 * h;
                if (valid >> token & 1 && n_slice * SLICE + token < seen)
                    sums[i] += exp2f(s[at] - end);
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int g = 4; g < 32; g *= 2) sums[i] += shuffle_xor(sums[i], g);
        unsigned token = n_slice * SLICE + 2 * (lane % 4) + (unsigned)(i % 2 + i / 2 * 8);
        if (lane < 4) mass[(size_t)blockIdx.x * IBIDI_CU_PAGE + token] += sums[i];
    }
}

/* ---- Launching ---- */

template <int P, bool q8, bool fine>
static ibid_err start(ibidi_cu_stream s, const ibidi_cu_shape *m, const ibidi_cu_attend *a,
                      size_t n_items) {
    using S = slice<P, q8>;
    return launch("attention", attention_kernel<P, q8, fine>, dim3((unsigned)n_items),
                  32 * S::WARPS, (size_t)S::WARPS * S::STAGES * S::BYTES, s, *m, *a);
}

template <int P>
static ibid_err start_any(ibidi_cu_stream s, const ibidi_cu_shape *m, const ibidi_cu_attend *a,
                          size_t n, int fine) {
    if (m->q8) return fine ? start<P, true, true>(s, m, a, n) : start<P, true, false>(s, m, a, n);
    return fine ? start<P, false, true>(s, m, a, n) : start<P, false, false>(s, m, a, n);
}

static ibid_err no_such_head(const ibidi_cu_shape *m) {
    return ibid_fail(IBID_NOTSUP, "heads of %u dimensions on the GPU; it takes 64, 96, 128 or 256",
                     m->head_dim);
}

extern "C" ibid_err ibidi_cu_attention(ibidi_cu_stream s, const ibidi_cu_shape *m,
                                       const ibidi_cu_attend *a, size_t n_items, int fine) {
    if (n_items == 0) return IBID_OK;
    switch (m->head_dim) {
    case 64:
        return start_any<2>(s, m, a, n_items, fine);
    case 96:
        return start_any<3>(s, m, a, n_items, fine);
    case 128:
        return start_any<4>(s, m, a, n_items, fine);
    case 256:
        return start_any<8>(s, m, a, n_items, fine);
    default:
        return no_such_head(m);
    }
}

extern "C" ibid_err ibidi_cu_merge(ibidi_cu_stream s, const ibidi_cu_shape *m,
                                   const ibidi_cu_attend *a, size_t n, uint16_t *h, size_t ldh,
                                   float *lse) {
    if (n == 0) return IBID_OK;
    dim3 grid((m->n_heads + MERGE_WARPS - 1) / MERGE_WARPS, (unsigned)n);
    return launch("merge", merge_kernel, grid, 32 * MERGE_WARPS, 0, s, *m, *a, h, ldh, lse);
}

template <int P>
static ibid_err start_mass(ibidi_cu_stream s, const ibidi_cu_shape *m, const ibidi_cu_attend *a,
                           size_t tile0, size_t n_tiles, int fine, size_t n_pages,
                           const uint64_t *heads, uint32_t lo, uint32_t hi, const float *lse,
                           float *mass) {
    auto kernel = m->q8  ? fine ? mass_kernel<P, true, true> : mass_kernel<P, true, false>
                   : fine ? mass_kernel<P, false, true>
                         : mass_kernel<P, false, false>;
    return launch("mass", kernel, dim3((unsigned)n_pages), 32 * SLICES, 0, s, *m, *a,
                  (unsigned)tile0, (unsigned)n_tiles, heads, (unsigned)lo, (unsigned)hi, lse, mass);
}

extern "C" ibid_err ibidi_cu_mass(ibidi_cu_stream s, const ibidi_cu_shape *m,
                                  const ibidi_cu_attend *a, size_t tile0, size_t n_tiles, int fine,
                                  size_t n_pages, const uint64_t *heads, uint32_t lo, uint32_t hi,
                                  const float *lse, float *mass) {
    if (n_pages == 0 || n_tiles == 0 || lo >= hi) return IBID_OK;
    switch (m->head_dim) {
    case 64:
        return start_mass<2>(s, m, a, tile0, n_tiles, fine, n_pages, heads, lo, hi, lse, mass);
    case 96:
        return start_mass<3>(s, m, a, tile0, n_tiles, fine, n_pages, heads, lo, hi, lse, mass);
    case 128:
        return start_mass<4>(s, m, a, tile0, n_tiles, fine, n_pages, heads, lo, hi, lse, mass);
    case 256:
        return start_mass<8>(s, m, a, tile0, n_tiles, fine, n_pages, heads, lo, hi, lse, mass);
    default:
        return no_such_head(m);
    }
}
