/* What the CUDA kernels and the host code before them agree on: layouts in device memory and the
 * tables of a pass. Plain C, read by C, CUDA and the tests' emulator alike.
 *
 * Pages. The KV of 64 consecutive tokens at one layer, all kv heads, is a page: per kv head K [64,
 * dim], V [64, dim], then for q8_0 the scales of K and of V [64, dim / 32] f16. q8_0 keys lie in
 * the Walsh-Hadamard basis, as stored (attention/tensor.h). A page is a cell of the pool; a
 * sequence lists its pages, first those of its segments, then live ones.
 *
 * Weights. 16 rows times 64 columns are a tile, in the order in which the lanes of a warp hold the
 * left operand of mma.m16n8k16: lane 4g + t, product j (0..3), register r, half s hold row
 * g + 8 (r & 1), column 16 t + 4 j + 2 (r >> 1) + s. So a lane meets 16 consecutive columns of the
 * other operand, and every load is 16 bytes wide and dense. A row of tiles follows the other;
 * missing rows and columns are zeros.
 * - F16: [j][lane] 16 bytes, registers 0..3
 * - I8 (w = d q): [j / 2][lane] 16 bytes; those of product j: r0 s0, r0 s1, r1 s0, ..., r3 s1;
 *   then d, f16 [g][t / 2][row g, row g + 8]
 * - U4 (w = d u + m): [lane] 16 bytes, word j: nibble r is (r, s = 0), nibble r + 4 (r, s = 1);
 * then d, m, f16 [g][t / 2][row g, row g + 8][d, m] */
#ifndef IBID_ATTENTION_CUDA_LAYOUT_H
#define IBID_ATTENTION_CUDA_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define IBIDI_CU_BOTH static inline __host__ __device__
#else
#define IBIDI_CU_BOTH static inline
#endif

enum {
    IBIDI_CU_PAGE = 64,     /* tokens of a page: one word of a mask */
    IBIDI_CU_ROWS = 16,     /* weight rows of a tile */
    IBIDI_CU_COLS = 64,     /* and columns */
    IBIDI_CU_FEW = 64,      /* rows of activations the product kernel takes at once */
    IBIDI_CU_MATS = 3,      /* matrices with the same input that one launch multiplies */
    IBIDI_CU_TILE = 16,     /* query rows (token rows times heads) of an attention tile ... */
    IBIDI_CU_TILE_FINE = 8, /* ... and of a fine one, whose queries are held twice as precisely */
    IBIDI_CU_TURNED = 32,   /* bytes of a tile's turned queries a dimension, at most */
    IBIDI_CU_LOW = 254,     /* units of a query's low plane of bytes in one of its high plane */
    IBIDI_CU_RESIDENT = 3,  /* thread blocks of attention that a unit of an H200 runs at once */
    IBIDI_CU_DIM_MAX = 256
};

typedef enum ibidi_cu_type { IBIDI_CU_F16 = 0, IBIDI_CU_I8 = 1, IBIDI_CU_U4 = 2 } ibidi_cu_type;

/* Bytes of a tile of weights. */
IBIDI_CU_BOTH uint32_t ibidi_cu_tile_bytes(ibidi_cu_type t) {
    return t == IBIDI_CU_U4 ? 512 + 128 : t == IBIDI_CU_I8 ? 1024 + 64 : 2048;
}

/* A matrix [rows, cols] on the device, in tiles. */
typedef struct ibidi_cu_matrix {
    ibidi_cu_type type;
    uint32_t rows, cols;
    uint32_t panels, k_tiles; /* rows / 16 and cols / 64, rounded up */
    const uint8_t *data;
} ibidi_cu_matrix;

/* Bytes of one kv head in a page, and of its K (or V) plane. q8: 1 for q8_0, 0 for f16. */
IBIDI_CU_BOTH uint32_t ibidi_cu_plane_bytes(uint32_t dim, int q8) {
    return (uint32_t)IBIDI_CU_PAGE * dim * (q8 ? 1u : 2u);
}
IBIDI_CU_BOTH uint32_t ibidi_cu_scale_bytes(uint32_t dim, int q8) {
    return q8 ? (uint32_t)IBIDI_CU_PAGE * (dim / 32) * 2u : 0;
}
IBIDI_CU_BOTH uint32_t ibidi_cu_head_bytes(uint32_t dim, int q8) {
    return 2 * (ibidi_cu_plane_bytes(dim, q8) + ibidi_cu_scale_bytes(dim, q8));
}

/* A page of a sequence. */
typedef struct ibidi_cu_page {
    uint64_t keep;  /* bit j: token j may be seen */
    uint32_t start; /* position of its first token; of a live page, the live number */
    uint32_t n;     /* tokens in it */
    uint32_t turn;  /* which turning of the queries it wants; 0: none */
    uint32_t live;
} ibidi_cu_page;

/* A sequence's pages; all pointers to device memory. */
typedef struct ibidi_cu_seq {
    const ibidi_cu_page *pages; /* [n_pages] */
    const uint32_t *cells;      /* [n_layers, room] where in the pool */
    const float *turns;         /* [n_turns, n_rot] cos, then sin, of turn i + 1 */
    uint32_t room;
    uint32_t first_live; /* number of the first live page */
} ibidi_cu_seq;

/* A row of a pass. */
typedef struct ibidi_cu_row {
    uint32_t seq;      /* in the pass's sequences */
    uint32_t position; /* global */
    uint32_t live;     /* live number in its sequence */
    uint32_t token;
    uint32_t tile0; /* first attention tile of its step, kv head 0 */
    uint32_t tiles; /* tiles per kv head of its step */
    uint32_t tile_rows;
    uint32_t pair0; /* number of the row in its step times group */
} ibidi_cu_row;

/* A tile: query rows pair0 .. pair0 + n - 1 of a step at one kv head; pair i is row
 * row0 + i / group, head kv_head * group + i % group. */
typedef struct ibidi_cu_tile {
    uint32_t seq, kv_head;
    uint32_t row0, pair0, n;
    uint32_t turned0;  /* its queries, turned: [n_turns + 1] fragments from here on, coarse: twice */
    uint32_t n_turned; /* how many of them */
    uint32_t partial0, n_partials;
} ibidi_cu_tile;

/* Work of one thread block: pages [page0, page1) of a tile. page0 == page1: none. */
typedef struct ibidi_cu_item {
    uint32_t tile, page0, page1, partial;
} ibidi_cu_item;

/* A model's shape as the kernels need it. */
typedef struct ibidi_cu_shape {
    uint32_t n_embd, n_heads, n_kv_heads, head_dim, n_rot, n_ff;
    uint32_t group;
    int32_t pair_next; /* RoPE turns 2i with 2i + 1, else i with i + n_rot / 2 */
    int32_t q8;        /* pages are q8_0, else f16 */
    float eps;
    float score_scale; /* log2(e) / sqrt(head_dim): scores are in base 2 */
} ibidi_cu_shape;
#endif
