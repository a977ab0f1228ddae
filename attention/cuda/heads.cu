/* Between a layer's first products and attention: queries, keys and values are finished head by
 * head (a warp a head), keys and values stored into live pages, and queries turned for each
 * segment: R(-d) R(p) q = R(p - d) q (docs/design.md section 4). */
#include "attention/cuda/dialect.h"

enum { WARPS = 4, THREADS = 32 * WARPS, PARTS = IBIDI_CU_DIM_MAX / 32 };

/* A head in a warp: lane l holds dimensions 32 i + l in v[i], i < dim / 32. space: [dim] of the
 * warp. pair: how RoPE pairs dimensions; sin times sign. */
IBIDI_DEV void turn_head(float v[PARTS], unsigned parts, unsigned n_rot, int pair_next,
                         const float *cos, const float *sin, float *space) {
    unsigned lane = threadIdx.x % 32, half = n_rot / 2;
#pragma unroll
    for (unsigned i = 0; i < PARTS; i++)
        if (i < parts) space[32 * i + lane] = v[i];
    sync_warp();
#pragma unroll
    for (unsigned i = 0; i < PARTS; i++) {
        unsigned d = 32 * i + lane;
        if (i >= parts || d >= n_rot) continue;
        unsigned angle = pair_next ? d / 2 : d % half,
                 other = pair_next ? d ^ 1u : (d + half) % n_rot;
        bool first = pair_next ? d % 2 == 0 : d < half;
        float s = sin[angle];
        v[i] = v[i] * cos[angle] + space[other] * (first ? -s : s);
    }
    sync_warp();
}

/* Each 32 dimensions times the Walsh-Hadamard matrix over sqrt(32). */
IBIDI_DEV void spread_head(float v[PARTS], unsigned parts) {
    unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (unsigned i = 0; i < PARTS; i++) {
        if (i >= parts) break;
        for (int m = 1; m < 32; m *= 2) {
            float other = shuffle_xor(v[i], m);
            v[i] = lane & (unsigned)m ? other - v[i] : v[i] + other;
        }
        v[i] *= 0.17677669529663687f;
    }
}

IBIDI_DEV void norm_head(float v[PARTS], unsigned parts, const float *w, float eps) {
    float sum = 0;
#pragma unroll
    for (unsigned i = 0; i < PARTS; i++)
        if (i < parts) sum += v[i] * v[i];
    float inverse = 1 / sqrtf(warp_sum(sum) / (float)(32 * parts) + eps);
#pragma unroll
    for (unsigned i = 0; i < PARTS; i++)
        if (i < parts) v[i] *= inverse * w[32 * i + threadIdx.x % 32];
}

/* One token of a plane of a page; scales NULL for f16. */
IBIDI_DEV void put_head(const float v[PARTS], unsigned parts, uint8_t *plane, uint16_t *scales,
                        unsigned token) {
    unsigned lane = threadIdx.x % 32, at = token * 32 * parts + lane;
#pragma unroll
    for (unsigned i = 0; i < PARTS; i++) {
        if (i >= parts) break;
        if (!scales) {
            ((uint16_t *)(void *)plane)[at + 32 * i] = f32_to_f16(v[i]);
            continue;
        }
        uint16_t scale = f32_to_f16(warp_max(fabsf(v[i])) / 127);
        float d = f16_to_f32(scale), inverse = d > 0 ? 1 / d : 0;
        float q = fminf(fmaxf(rintf(v[i] * inverse), -127), 127);
        ((int8_t *)plane)[at + 32 * i] = (int8_t)q;
        if (lane == 0) scales[token * parts + i] = scale;
    }
}

__global__ void __launch_bounds__(THREADS) finish_kernel(ibidi_cu_shape m, ibidi_cu_heads a) {
    __shared__ float space[WARPS][IBIDI_CU_DIM_MAX];
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x * WARPS + warp;
    unsigned row = blockIdx.y, dim = m.head_dim, parts = dim / 32;
    if (head >= m.n_heads + 2 * m.n_kv_heads) return;
    bool is_q = head < m.n_heads, is_k = !is_q && head < m.n_heads + m.n_kv_heads;
    unsigned kv_head = is_k ? head - m.n_heads : head - m.n_heads - m.n_kv_heads;
    const float *y = a.y + row * a.ldy + head * dim, *bias = is_q ? a.bq : is_k ? a.bk : a.bv;
    const float *norm = is_q ? a.q_norm : is_k ? a.k_norm : NULL;
    if (bias) bias += (is_q ? head : kv_head) * dim;
    float v[PARTS] = {}, scale = a.y_scale[row];
#pragma unroll
    for (unsigned i = 0; i < PARTS; i++) {
        if (i >= parts) break;
        v[i] = y[32 * i + lane] * scale + (bias ? bias[32 * i + lane] : 0);
    }
    if (norm) norm_head(v, parts, norm, m.eps);
    if (is_q || is_k)
        turn_head(v, parts, m.n_rot, m.pair_next, a.cos + row * (m.n_rot / 2),
                  a.sin + row * (m.n_rot / 2), space[warp]);
    if (is_q) {
#pragma unroll
        for (unsigned i = 0; i < PARTS; i++)
            if (i < parts)
                a.q[((size_t)row * m.n_heads + head) * dim + 32 * i + lane] = v[i] * m.score_scale;
        return;
    }
    const ibidi_cu_row *r = &a.rows[row];
    const ibidi_cu_seq *s = &a.seqs[r->seq];
    unsigned page = s->first_live + r->live / IBIDI_CU_PAGE;
    size_t head_bytes = ibidi_cu_head_bytes(dim, m.q8), plane = ibidi_cu_plane_bytes(dim, m.q8);
    uint8_t *at =
        a.pool +
        (s->cells[(size_t)a.layer * s->room + page] * (size_t)m.n_kv_heads + kv_head) * head_bytes;
    uint8_t *scales = m.q8 ? at + 2 * plane + (is_k ? 0 : ibidi_cu_scale_bytes(dim, 1)) : NULL;
    if (is_k && m.q8) spread_head(v, parts);
    put_head(v, parts, is_k ? at : at + plane, (uint16_t *)(void *)scales, r->live % IBIDI_CU_PAGE);
}

/* A turned query, in two parts: as halves and what that rounding left, or as bytes of two planes.
 */
template <bool q8>
IBIDI_DEV void split_head(const float v[PARTS], unsigned parts, uint16_t *high, uint16_t *low,
                          float *scale) {
    unsigned lane = threadIdx.x % 32;
    float largest = 0;
    if (q8) {
#pragma unroll
        for (unsigned i = 0; i < PARTS; i++)
            if (i < parts) largest = fmaxf(largest, fabsf(v[i]));
        largest = warp_max(largest);
        if (lane == 0) *scale = largest * (1.0f / 127);
    }
    float inverse = largest > 0 ? 127 / largest : 0;
#pragma unroll
    for (unsigned i = 0; i < PARTS; i++) {
        if (i >= parts) break;
        if (q8) {
            float h = fminf(fmaxf(rintf(v[i] * inverse), -127.0f), 127.0f);
            float l =
                fminf(fmaxf(rintf((v[i] * inverse - h) * (float)IBIDI_CU_LOW), -127.0f), 127.0f);
            high[32 * i + lane] = (uint8_t)(int8_t)h;
            low[32 * i + lane] = (uint8_t)(int8_t)l;
        } else {
            uint16_t h = f32_to_f16(v[i]);
            high[32 * i + lane] = h;
            low[32 * i + lane] = f32_to_f16(v[i] - f16_to_f32(h));
        }
    }
}

/* A block turns the queries of a tile for one turn; y: the turn. */
template <bool q8>
__global__ void __launch_bounds__(THREADS)
    turn_kernel(ibidi_cu_shape m, const ibidi_cu_tile *tiles, int fine, const ibidi_cu_seq *seqs,
                const float *q, uint16_t *turned) {
    __shared__ float space[WARPS][IBIDI_CU_DIM_MAX], scales[IBIDI_CU_TILE];
    __shared__ uint16_t rounded[2 * IBIDI_CU_TILE][IBIDI_CU_DIM_MAX + 8];
    const ibidi_cu_tile t = tiles[blockIdx.x];
    unsigned turn = blockIdx.y, dim = m.head_dim, parts = dim / 32;
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (turn >= t.n_turned) return;
    const float *c = turn ? seqs[t.seq].turns + (size_t)(turn - 1) * m.n_rot : NULL;
    unsigned n = fine ? IBIDI_CU_TILE_FINE : IBIDI_CU_TILE;
    for (unsigned j = warp; j < n; j += WARPS) {
        float v[PARTS] = {};
        unsigned pair = t.pair0 + j;
        const float *from = q + ((size_t)(t.row0 + pair / m.group) * m.n_heads +
                                 t.kv_head * m.group + pair % m.group) *
                                    dim;
#pragma unroll
        for (unsigned i = 0; i < PARTS; i++)
            if (i < parts && j < t.n) v[i] = from[32 * i + lane];
        if (c) turn_head(v, parts, m.n_rot, m.pair_next, c, c + m.n_rot / 2, space[warp]);
        if (q8) spread_head(v, parts);
        split_head<q8>(v, parts, rounded[j], rounded[j + n], &scales[j]);
    }
    __syncthreads();
    /* f16: product i of part p: lane 4g + t holds dimensions 32 p + 8 t + 4 i + {0, 1}, then + {2,
     * 3}; bytes: of part p 32 p + 8 t + {0 .. 3}, then + {4 .. 7}. */
    unsigned each = parts * (q8 ? 128 : 256), n_planes = fine ? 1 : 2;
    size_t at = (size_t)t.turned0 + n_planes * turn;
    uint32_t *to = (uint32_t *)(void *)turned + at * dim * (IBIDI_CU_TURNED / 4);
    for (unsigned k = threadIdx.x; k < n_planes * each; k += THREADS) {
        unsigned r = k % 4, l = k / 4 % 32, row = k / each * IBIDI_CU_TILE + l / 4 + 8 * (r % 2);
        const uint16_t *x = rounded[row];
        if (q8) {
            x += 32 * (k % each / 128) + 8 * (l % 4) + 4 * (r / 2);
            to[k] =
                (uint32_t)x[0] | (uint32_t)x[1] << 8 | (uint32_t)x[2] << 16 | (uint32_t)x[3] << 24;
        } else {
            x += 32 * (k % each / 256) + 8 * (l % 4) + 4 * (k / 128 % 2) + 2 * (r / 2);
            to[k] = (uint32_t)x[0] | (uint32_t)x[1] << 16;
        }
    }
    if (q8 && threadIdx.x < n) memcpy(&to[n_planes * each + threadIdx.x], &scales[threadIdx.x], 4);
}

extern "C" ibid_err ibidi_cu_finish_heads(ibidi_cu_stream s, const ibidi_cu_shape *m,
                                          const ibidi_cu_heads *a, size_t n) {
    if (n == 0) return IBID_OK;
    dim3 grid((m->n_heads + 2 * m->n_kv_heads + WARPS - 1) / WARPS, (unsigned)n);
    return launch("finish heads", finish_kernel, grid, THREADS, 0, s, *m, *a);
}

extern "C" ibid_err ibidi_cu_turn(ibidi_cu_stream s, const ibidi_cu_shape *m,
                                  const ibidi_cu_tile *tiles, size_t n_tiles, size_t max_turned,
                                  int fine, const ibidi_cu_seq *seqs, const float *q,
                                  uint16_t *turned) {
    if (n_tiles == 0 || max_turned == 0) return IBID_OK;
    dim3 grid((unsigned)n_tiles, (unsigned)max_turned);
    return launch("turn", m->q8 ? turn_kernel<true> : turn_kernel<false>, grid, THREADS, 0, s, *m,
                  tiles, fine, seqs, q, turned);
}
