/* Products of few rows of activations with packed weights, bound by the weights' bytes: each tile
 * of weights is read once, 16 bytes a lane, turned into the tensor core's left operand in
 * registers, and meets up to 64 rows. A thread block takes one panel of 16 weight rows; its warps
 * share out the panel's tiles and add up at the end, in a fixed order. */
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

/* Two int8 of a word as halves: bytes 2i, 2i + 1 of w with their signs' bits flipped are unsigned;
 * behind 0x64 they are halves from 1024 on. */
IBIDI_DEV uint32_t two_bytes(uint32_t w, int i) {
    return h2_sub(bytes_of(w ^ 0x80808080u, 0x64646464u, i ? 0x4342u : 0x4140u), 0x64806480u);
}

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
        for (int r = 0; r < 4; r++) { /* nibbles behind 0x64 are halves from 1024 on */
            uint32_t u = h2_sub((v >> (4 * r) & 0x000f000fu) | 0x64006400u, 0x64006400u);
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

/* NT: tiles of 8 rows of activations. */
template <int type, int NT>
IBIDI_DEV void product_panel(const product_args &a, const ibidi_cu_matrix &w, unsigned panel,
                             float acc[NT][4]) {
    constexpr int DEEP = type == IBIDI_CU_F16  ? 1
                         : type == IBIDI_CU_I8 ? 2
                                               : 4; /* tiles under way */
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    size_t bytes = ibidi_cu_tile_bytes((ibidi_cu_type)type);
    const uint8_t *tiles = w.data + (size_t)panel * w.k_tiles * bytes;
    const uint16_t *h = a.h + (size_t)(lane / 4) * a.ldh + 16 * (lane % 4);
    part<type> p[DEEP];
    for (unsigned k0 = warp; k0 < w.k_tiles; k0 += WARPS * DEEP) {
#pragma unroll
        for (int i = 0; i < DEEP; i++) {
            unsigned k = k0 + (unsigned)i * WARPS;
            if (k < w.k_tiles) p[i].load(tiles + k * bytes, lane);
        }
#pragma unroll
        for (int i = 0; i < DEEP; i++) {
            unsigned k = k0 + (unsigned)i * WARPS;
            if (k >= w.k_tiles) break;
            uint32_t f[4][4];
#pragma unroll
            for (int j = 0; j < 4; j++) p[i].expand(j, f[j]);
#pragma unroll
            for (int t = 0; t < NT; t++) {
                const uint4 *b =
                    (const uint4 *)(const void *)(h + (size_t)(8 * t) * a.ldh + k * COLS);
                uint4 b0 = b[0], b1 = b[1];
                mma_f16(acc[t], f[0][0], f[0][1], f[0][2], f[0][3], b0.x, b0.y);
                mma_f16(acc[t], f[1][0], f[1][1], f[1][2], f[1][3], b0.z, b0.w);
                mma_f16(acc[t], f[2][0], f[2][1], f[2][2], f[2][3], b1.x, b1.y);
                mma_f16(acc[t], f[3][0], f[3][1], f[3][2], f[3][3], b1.z, b1.w);
            }
        }
    }
}

template <int NT> __global__ void __launch_bounds__(THREADS) product_kernel(product_args a) {
    IBIDI_DYNAMIC_SHARED(memory);
    float *sums = (float *)memory; /* [WARPS, 8 NT, ROWS] */
    unsigned panel = blockIdx.x, m = 0, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    while (panel >= a.w[m].panels) panel -= a.w[m++].panels;
    float acc[NT][4] = {};
    if (a.w[m].type == IBIDI_CU_U4)
        product_panel<IBIDI_CU_U4, NT>(a, a.w[m], panel, acc);
    else if (a.w[m].type == IBIDI_CU_I8)
        product_panel<IBIDI_CU_I8, NT>(a, a.w[m], panel, acc);
    else
        product_panel<IBIDI_CU_F16, NT>(a, a.w[m], panel, acc);
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

extern "C" ibid_err ibidi_cu_product(ibidi_cu_stream s, const ibidi_cu_matrix *mats, size_t n_mats,
                                     const uint16_t *h, size_t ldh, size_t n, float *y,
                                     size_t ldy) {
    product_args a = {};
    unsigned panels = 0, y0 = 0;
    if (n == 0) return IBID_OK;
    for (size_t i = 0; i < n_mats && i < IBIDI_CU_MATS; i++) {
        a.w[i] = mats[i];
        a.y0[i] = y0;
        y0 += mats[i].rows;
        panels += mats[i].panels;
    }
    a.n_mats = (uint32_t)n_mats;
    a.n = (uint32_t)n;
    a.h = h;
    a.ldh = ldh;
    a.ldy = ldy;
    a.y = y;
    size_t tiles = (n + 7) / 8, room = tiles <= 1 ? 1 : tiles <= 2 ? 2 : tiles <= 4 ? 4 : 8;
    size_t shared = WARPS * 8 * room * ROWS * sizeof(float);
    if (room == 1) return launch("product", product_kernel<1>, dim3(panels), THREADS, shared, s, a);
    if (room == 2) return launch("product", product_kernel<2>, dim3(panels), THREADS, shared, s, a);
    if (room == 4) return launch("product", product_kernel<4>, dim3(panels), THREADS, shared, s, a);
    return launch("product", product_kernel<8>, dim3(panels), THREADS, shared, s, a);
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
