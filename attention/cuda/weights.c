#include "attention/cuda/weights.h"
#include "attention/kernels/kernels.h"
#include "rpc/base/mem.h"

#include <math.h>
#include <string.h>

enum { ROWS = IBIDI_CU_ROWS, COLS = IBIDI_CU_COLS, GROUP = 32 };

ibidi_cu_matrix ibidi_cu_matrix_of(const ibid_tensor *t) {
    ibidi_cu_matrix m = {
        .type = IBIDI_CU_F16, .rows = (uint32_t)t->rows, .cols = (uint32_t)t->cols};
    if (t->type == IBID_Q4_0 || t->type == IBID_Q4_1 || t->type == IBID_Q4_K) m.type = IBIDI_CU_U4;
    if (t->type == IBID_Q8_0) m.type = IBIDI_CU_I8;
    m.panels = (m.rows + ROWS - 1) / ROWS;
    m.k_tiles = (m.cols + COLS - 1) / COLS;
    return m;
}

size_t ibidi_cu_panel_bytes(const ibidi_cu_matrix *m) {
    return (size_t)m->k_tiles * ibidi_cu_tile_bytes(m->type);
}

size_t ibidi_cu_matrix_bytes(const ibidi_cu_matrix *m) {
    return m->panels * ibidi_cu_panel_bytes(m);
}

/* Where in a tile (row, col) of 16 x 64 lies: product j, lane, register r, half s. */
typedef struct spot {
    size_t j, lane, r, s;
} spot;

static spot spot_of(size_t row, size_t col) {
    size_t in = col % 16;
    return (spot){
        .j = in / 4, .lane = row % 8 * 4 + col / 16, .r = row / 8 + 2 * (in % 4 / 2), .s = in % 2};
}

static void put_half(uint8_t *to, float f) {
    uint16_t h = ibid_f32_to_f16(f);
    memcpy(to, &h, sizeof h);
}

static ibid_err put_f16(const float *w, size_t row, size_t n, uint8_t *tile) {
    for (size_t c = 0; c < n; c++) {
        spot p = spot_of(row, c);
        if (!(fabsf(w[c]) <= 65504))
            return ibid_fail(IBID_NOTSUP, "a weight of %g is too large for the GPU's f16",
                             (double)w[c]);
        put_half(tile + (p.j * 32 + p.lane) * 16 + p.r * 4 + p.s * 2, w[c]);
    }
    return IBID_OK;
}

/* Group `half` (0, 1) of a row of the tile. */
static void put_i8(const uint8_t u[32], float d, size_t row, size_t half, uint8_t *tile) {
    for (size_t c = 0; c < GROUP; c++) {
        spot p = spot_of(row, half * GROUP + c);
        tile[(p.j / 2 * 32 + p.lane) * 16 + p.j % 2 * 8 + p.r * 2 + p.s] = u[c] ^ 128;
    }
    put_half(tile + 1024 + ((row % 8 * 2 + half) * 2 + row / 8) * 2, d);
}

static void put_u4(const uint8_t u[32], float d, float m, size_t row, size_t half, uint8_t *tile) {
    for (size_t c = 0; c < GROUP; c++) {
        spot p = spot_of(row, half * GROUP + c);
        size_t nibble = p.r + 4 * p.s;
        tile[p.lane * 16 + p.j * 4 + nibble / 2] |= (uint8_t)(u[c] << (nibble % 2 * 4));
    }
    uint8_t *scale = tile + 512 + ((row % 8 * 2 + half) * 2 + row / 8) * 4;
    put_half(scale, d);
    put_half(scale + 2, m);
}

static ibid_err put_tile_row(const ibid_tensor *t, const ibidi_cu_matrix *m, const uint8_t *from,
                             size_t row, size_t k, const float *all, uint8_t *tile) {
    size_t n = t->cols - k * COLS < COLS ? t->cols - k * COLS : COLS;
    if (m->type == IBIDI_CU_F16) return put_f16(all + k * COLS, row, n, tile);
    for (size_t half = 0; half * GROUP < n; half++) {
        uint8_t u[32];
        float d[2], offset[2];
        ibid_weights_split(t->type, from, k * 2 + half, u, d, offset);
        if (m->type == IBIDI_CU_I8)
            put_i8(u, d[0], row, half, tile);
        else
            put_u4(u, d[0], offset[0], row, half, tile);
    }
    return IBID_OK;
}

ibid_err ibidi_cu_pack_panel(const ibid_tensor *t, const ibidi_cu_matrix *m, size_t panel,
                             uint8_t *to) {
    const ibid_kernels *k = NULL;
    size_t bytes = ibidi_cu_tile_bytes(m->type);
    ibid_err err = ibid_kernels_get(NULL, &k);
    float *all = NULL;
    if (!err && m->type == IBIDI_CU_F16 && !(all = ibid_alloc(t->cols * sizeof *all)))
        err = ibid_fail(IBID_NOMEM, "no memory to pack weights");
    memset(to, 0, ibidi_cu_panel_bytes(m));
    for (size_t i = 0; !err && i < ROWS && panel * ROWS + i < t->rows; i++) {
        const uint8_t *from = (const uint8_t *)t->data + (panel * ROWS + i) * t->row_bytes;
        if (all) k->dequantize(t->type, from, all, t->cols);
        for (size_t c = 0; !err && c < m->k_tiles; c++)
            err = put_tile_row(t, m, from, i, c, all, to + c * bytes);
    }
    ibid_free(all);
    return err;
}
