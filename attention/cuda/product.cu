/* Products of few rows of activations with packed weights, bound by the weights' bytes: each tile
 * of weights is read once, 16 bytes a lane, turned into the tensor core's left operand in
 * registers, and meets up to 64 rows. A thread block takes a panel of 16 weight rows, or two where
 * rows are so many that reading them (8 KiB for a tile's 1 KiB) would take longer than reading
 * weights; its warps share out the panels' tiles and add up at the end, in a fixed order. */
#include "attention/cuda/dialect.h"

enum { WARPS = 8, THREADS = 32 * WARPS, ROWS = IBIDI_CU_ROWS, COLS = IBIDI_CU_COLS };

/* A lane's part of a tile. */
template <int type> struct part;

template <> struct part<IBIDI_CU_F16> {
    uint4 w[4];
    IBIDI_DEV_METHOD void load(const uint8_t *tile, unsigned lane) {
        const uint4 *p = (const uint4 *)(const void *)tile;
        for (int j = 0; j < 4; j++) w[j] = load_stream(p + j * 32 + lane);
    }
    IBIDI_DEV_METHOD void expand(int j, uint32_t a[4]) const {
        a[0] = w[j].x, a[1] = w[j].y, a[2] = w[j].z, a[3] = w[j].w;
    }
};

template <> struct part<IBIDI_CU_I8> {
    uint4 w[2];
    uint32_t scale; /* of rows g and g + 8 */
    IBIDI_DEV_METHOD void load(const uint8_t *tile, unsigned lane) {
        const uint4 *p = (const uint4 *)(const void *)tile;
        for (int j = 0; j < 2; j++) w[j] = load_stream(p + j * 32 + lane);
        scale = ((const uint32_t *)(const void *)(tile + 1024))[lane / 4 * 2 + lane % 4 / 2];
    }
    IBIDI_DEV_METHOD void expand(int j, uint32_t a[4]) const {
        uint32_t lo = bytes_of(scale, 0, 0x1010u), hi = bytes_of(scale, 0, 0x3232u);
        uint32_t w0 = j % 2 ? w[j / 2].z : w[j / 2].x, w1 = j % 2 ? w[j / 2].w : w[j / 2].y;
        a[0] = h2_mul(two_bytes(w0, 0), lo), a[1] = h2_mul(two_bytes(w0, 1), hi);
        a[2] = h2_mul(two_bytes(w1, 0), lo), a[3] = h2_mul(two_bytes(w1, 1), hi);
    }
};

template <> struct part<IBIDI_CU_U4> {
    uint4 w;
    uint2 scale; /* d, m of row g; of row g + 8 */
    IBIDI_DEV_METHOD void load(const uint8_t *tile, unsigned lane) {
        w = load_stream((const uint4 *)(const void *)tile + lane);
        scale = ((const uint2 *)(const void *)(tile + 512))[lane / 4 * 2 + lane % 4 / 2];
    }
    IBIDI_DEV_METHOD void expand(int j, uint32_t a[4]) const {
        uint32_t v = j == 0 ? w.x : j == 1 ? w.y : j == 2 ? w.z : w.w;
        uint32_t d[2] = {bytes_of(scale.x, 0, 0x1010u), bytes_of(scale.y, 0, 0x1010u)};
        uint32_t m[2] = {bytes_of(scale.x, 0, 0x3232u), bytes_of(scale.y, 0, 0x3232u)};
        for (int r = 0; r < 4; r++) {
            uint32_t x = r < 2 ? v : v >> 8, u;
            if (r % 2 == 0) /* nibbles behind 0x64 are halves from 1024 on, */
                u = h2_sub(and_or(x, 0x000f000fu, 0x64006400u), 0x64006400u);
            else /* and one place higher 16 times as far on: / 16 - 64 */
                u = h2_fma(and_or(x, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd400d400u);
            a[r] = h2_fma(u, d[r & 1], m[r & 1]);
        }
    }
};

struct product_args {
    ibidi_cu_matrix w[IBIDI_CU_MATS];
    uint32_t y0[IBIDI_CU_MATS];
    uint32_t n_mats, n;
    const uint16_t *h;
    size_t ldh, ldy;
    float *y;
};

/* A warp's tiles of a round: DEEP of each of MT panels. Where a panel is missing, the first again.
 */
template <int type, int MT, int DEEP> struct batch {
    part<type> p[DEEP][MT];
    IBIDI_DEV_METHOD void load(const ibidi_cu_matrix &w, unsigned panel0, unsigned k0) {
        unsigned lane = threadIdx.x % 32;
        size_t bytes = ibidi_cu_tile_bytes((ibidi_cu_type)type), row = w.k_tiles * bytes;
#pragma unroll
        for (int i = 0; i < DEEP; i++) {
            unsigned k = k0 + (unsigned)i * WARPS;
            if (k >= w.k_tiles) break;
#pragma unroll
            for (unsigned q = 0; q < MT; q++) {
                unsigned panel = panel0 + q < w.panels ? panel0 + q : panel0;
                p[i][q].load(w.data + panel * row + k * bytes, lane);
            }
        }
    }
};

/* NT: tiles of 8 rows of activations; MT: panels, from panel0 on. */
template <int type, int NT, int MT>
IBIDI_DEV void product_panels(const product_args &a, const ibidi_cu_matrix &w, unsigned panel0,
                              float acc[MT][NT][4]) {
    constexpr int ALL = type == IBIDI_CU_F16 ? 1 : type == IBIDI_CU_I8 ? 2 : 4;
    constexpr int DEEP = MT > 1 ? 1 : ALL;
    constexpr unsigned STEP = WARPS * DEEP;
    /* With many rows few warps fit a unit: the next round's tiles come during this one's products.
     */
    constexpr bool EARLY = MT > 1;
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint16_t *h = a.h + (size_t)(lane / 4) * a.ldh + 16 * (lane % 4);
    batch<type, MT, DEEP> now, next;
    if (EARLY && warp < w.k_tiles) next.load(w, panel0, warp);
    for (unsigned k0 = warp; k0 < w.k_tiles; k0 += STEP) {
        if (EARLY) {
            now = next;
            if (k0 + STEP < w.k_tiles) next.load(w, panel0, k0 + STEP);
        } else
            now.load(w, panel0, k0);
#pragma unroll
        for (int i = 0; i < DEEP; i++) {
            unsigned k = k0 + (unsigned)i * WARPS;
            if (k >= w.k_tiles) break;
            uint32_t f[MT][4][4];
#pragma unroll
            for (int q = 0; q < MT; q++)
                for (int j = 0; j < 4; j++) now.p[i][q].expand(j, f[q][j]);
#pragma unroll
            for (int t = 0; t < NT; t++) {
                if (t && 8 * (unsigned)t >= a.n) break; /* rows that there may not be */
                const uint4 *b =
                    (const uint4 *)(const void *)(h + (size_t)(8 * t) * a.ldh + k * COLS);
                uint4 b0 = b[0], b1 = b[1];
#pragma unroll
                for (int q = 0; q < MT; q++) {
                    uint32_t(*g)[4] = f[q];
                    mma_f16(acc[q][t], g[0][0], g[0][1], g[0][2], g[0][3], b0.x, b0.y);
                    mma_f16(acc[q][t], g[1][0], g[1][1], g[1][2], g[1][3], b0.z, b0.w);
                    mma_f16(acc[q][t], g[2][0], g[2][1], g[2][2], g[2][3], b1.x, b1.y);
                    mma_f16(acc[q][t], g[3][0], g[3][1], g[3][2], g[3][3], b1.z, b1.w);
                }
            }
        }
    }
}

/* The warps' parts of a panel added up. sums [WARPS, 8 NT, ROWS]. */
template <int NT>
IBIDI_DEV void add_up(const product_args &a, unsigned m, unsigned panel, const float acc[NT][4],
                      float *sums) {
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int t = 0; t < NT; t++) {
        for (int i = 0; i < 4; i++) {
            unsigned row = lane / 4 + 8 * (unsigned)(i / 2),
                     col = 8 * (unsigned)t + 2 * (lane % 4) + (unsigned)(i % 2);
            sums[(warp * 8 * NT + col) * ROWS + row] = acc[t][i];
        }
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < ROWS * a.n; i += THREADS) {
        unsigned row = panel * ROWS + i % ROWS;
        float sum = 0;
        for (unsigned v = 0; v < WARPS; v++) sum += sums[v * 8 * NT * ROWS + i];
        if (row < a.w[m].rows) a.y[i / ROWS * a.ldy + a.y0[m] + row] = sum;
    }
}

template <int NT, int MT>
__global__ void __launch_bounds__(THREADS) product_kernel(product_args a) {
    IBIDI_DYNAMIC_SHARED(memory);
    unsigned group = blockIdx.x, m = 0;
    while (group >= (a.w[m].panels + MT - 1) / MT) group -= (a.w[m++].panels + MT - 1) / MT;
    unsigned panel = group * MT;
    float acc[MT][NT][4] = {};
    if (a.w[m].type == IBIDI_CU_U4)
        product_panels<IBIDI_CU_U4, NT, MT>(a, a.w[m], panel, acc);
    else if (a.w[m].type == IBIDI_CU_I8)
        product_panels<IBIDI_CU_I8, NT, MT>(a, a.w[m], panel, acc);
    else
        product_panels<IBIDI_CU_F16, NT, MT>(a, a.w[m], panel, acc);
#pragma unroll
    for (int q = 0; q < MT; q++) {
        if (panel + (unsigned)q >= a.w[m].panels) break;
        add_up<NT>(a, m, panel + (unsigned)q, acc[q], (float *)(void *)memory);
        if (q + 1 < MT) __syncthreads();
    }
}

template <int NT, int MT> static ibid_err start(ibidi_cu_stream s, const product_args &a) {
    unsigned groups = 0;
    for (unsigned i = 0; i < a.n_mats; i++) groups += (a.w[i].panels + MT - 1) / MT;
    return launch("product", product_kernel<NT, MT>, dim3(groups), THREADS,
                  WARPS * 8 * NT * ROWS * sizeof(float), s, a);
}

extern "C" ibid_err ibidi_cu_product(ibidi_cu_stream s, const ibidi_cu_matrix *mats, size_t n_mats,
                                     const uint16_t *h, size_t ldh, size_t n, float *y,
                                     size_t ldy) {
    product_args a = {};
    unsigned y0 = 0;
    if (n == 0) return IBID_OK;
    for (size_t i = 0; i < n_mats && i < IBIDI_CU_MATS; i++) {
        a.w[i] = mats[i];
        a.y0[i] = y0;
        y0 += mats[i].rows;
    }
    a.n_mats = (uint32_t)n_mats;
    a.n = (uint32_t)n;
    a.h = h;
    a.ldh = ldh;
    a.ldy = ldy;
    a.y = y;
    if (n <= 8) return start<1, 1>(s, a);
    if (n <= 16) return start<2, 1>(s, a);
    if (n <= 32) return start<4, 2>(s, a);
    return start<8, 2>(s, a);
}

/* ---- Weights as rows of f16 ---- */

template <int type>
IBIDI_DEV void expand_tile(const uint8_t *tile, unsigned lane, uint32_t f[4][4]) {
    part<type> p;
    p.load(tile, lane);
#pragma unroll
    for (int j = 0; j < 4; j++) p.expand(j, f[j]);
}

IBIDI_DEV void expand_any(const ibidi_cu_matrix &w, unsigned panel, unsigned k, unsigned lane,
                          uint32_t f[4][4]) {
    const uint8_t *tile = w.data + ((size_t)panel * w.k_tiles + k) * ibidi_cu_tile_bytes(w.type);
    if (w.type == IBIDI_CU_U4)
        expand_tile<IBIDI_CU_U4>(tile, lane, f);
    else if (w.type == IBIDI_CU_I8)
        expand_tile<IBIDI_CU_I8>(tile, lane, f);
    else
        expand_tile<IBIDI_CU_F16>(tile, lane, f);
}

/* A warp a tile. */
__global__ void __launch_bounds__(THREADS)
    unpack_kernel(ibidi_cu_matrix w, unsigned row0, unsigned n, uint16_t *out) {
    unsigned lane = threadIdx.x % 32, k = blockIdx.x * WARPS + threadIdx.x / 32;
    if (k >= w.k_tiles) return;
    uint32_t f[4][4];
    expand_any(w, row0 / ROWS + blockIdx.y, k, lane, f);
    for (unsigned half = 0; half < 2; half++) {
        unsigned row = blockIdx.y * ROWS + lane / 4 + 8 * half;
        if (row >= n) break;
        uint2 *to =
            (uint2 *)(void *)(out + (size_t)row * w.k_tiles * COLS + k * COLS + 16 * (lane % 4));
        for (int j = 0; j < 4; j++) to[j] = uint2{f[j][half], f[j][2 + half]};
    }
}

__global__ void __launch_bounds__(THREADS)
    embed_kernel(ibidi_cu_matrix w, const ibidi_cu_row *rows, float *x) {
    unsigned lane = threadIdx.x % 32, k = blockIdx.x * WARPS + threadIdx.x / 32;
    unsigned token = rows[blockIdx.y].token, half = token % ROWS / 8;
    if (k >= w.k_tiles || lane / 4 != token % 8) return;
    uint32_t f[4][4];
    expand_any(w, token / ROWS, k, lane, f);
    for (unsigned j = 0; j < 4; j++) {
        for (unsigned i = 0; i < 4; i++) {
            unsigned col = k * COLS + 16 * (lane % 4) + 4 * j + i;
            uint32_t pair = f[j][half + (i & 2)];
            if (col < w.cols)
                x[(size_t)blockIdx.y * w.cols + col] =
                    f16_to_f32((uint16_t)(i % 2 ? pair >> 16 : pair & 0xffffu));
        }
    }
}

extern "C" ibid_err ibidi_cu_unpack(ibidi_cu_stream s, const ibidi_cu_matrix *w, size_t row0,
                                    size_t n, uint16_t *out) {
    if (n == 0) return IBID_OK;
    dim3 grid((w->k_tiles + WARPS - 1) / WARPS, (unsigned)((n + ROWS - 1) / ROWS));
    return launch("unpack", unpack_kernel, grid, THREADS, 0, s, *w, (unsigned)row0, (unsigned)n,
                  out);
}

extern "C" ibid_err ibidi_cu_embed(ibidi_cu_stream s, const ibidi_cu_matrix *w,
                                   const ibidi_cu_row *rows, size_t n, float *x) {
    if (n == 0) return IBID_OK;
    dim3 grid((w->k_tiles + WARPS - 1) / WARPS, (unsigned)n);
    return launch("embed", embed_kernel, grid, THREADS, 0, s, *w, rows, x);
}
