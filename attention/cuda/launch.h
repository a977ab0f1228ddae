/* The kernels, each as one function that puts it on a stream: compiled by nvcc, and for tests by a
 * C++ compiler against the emulator of a grid (tests/support/emulator). Pointers are to device
 * memory unless said otherwise. Sizes were checked before. Errors: BACKEND (with the library's
 * words; a lost device shows up here too), NOTSUP (head size). */
#ifndef IBID_ATTENTION_CUDA_LAUNCH_H
#define IBID_ATTENTION_CUDA_LAUNCH_H

#include "attention/cuda/device.h"
#include "attention/cuda/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- rows.cu: one thread block a row ---- */

/* Rounds rows for a product: h = f16(v / scale), scale a power of two that brings the row's largest
 * value between 8 and 16, so that nothing overflows. h [n, ldh], columns from n on are zeroed. */

/* x[r] += y[r] * y_scale[r] + bias, then h, scale = round(rmsnorm(x[r]) * w). y, y_scale, bias may
 * be NULL. rows: NULL, or the numbers of the rows of x (and y) to take: h is dense then and x is
 * left as it was. */
ibid_err ibidi_cu_norm(ibidi_cu_stream s, float *x, const float *y, size_t ldy,
                       const float *y_scale, const float *bias, const float *w, float eps,
                       const uint32_t *rows, size_t n, size_t width, uint16_t *h, size_t ldh,
                       float *scale);
/* h, scale = round(silu(g) u), g = y[r][0 .. n_ff) y_scale[r], u = y[r][n_ff ..) y_scale[r]. */
ibid_err ibidi_cu_swiglu(ibidi_cu_stream s, const float *y, size_t ldy, const float *y_scale,
                         size_t n, size_t n_ff, uint16_t *h, size_t ldh, float *scale);
/* y[r] *= scale[r] */
ibid_err ibidi_cu_scale_rows(ibidi_cu_stream s, float *y, size_t ldy, const float *scale, size_t n,
                             size_t width);

/* ---- product.cu ---- */

/* y[i][y0[m] + r] = sum_c w[m][r, c] h[i, c] for i < n <= IBIDI_CU_FEW, on tensor cores, sums in
 * f32. h [.., ldh] f16, ldh a multiple of 64, columns past cols zero; rows of h from n up to the
 * next multiple of 8 are read (and must exist). mats is host memory. */
ibid_err ibidi_cu_product(ibidi_cu_stream s, const ibidi_cu_matrix *mats, size_t n_mats,
                          const uint16_t *h, size_t ldh, size_t n, float *y, size_t ldy);
/* Rows [row0, row0 + n) of a matrix as f16 [n, 64 k_tiles], for a library's product. row0 a
 * multiple of 16. */
ibid_err ibidi_cu_unpack(ibidi_cu_stream s, const ibidi_cu_matrix *w, size_t row0, size_t n,
                         uint16_t *out);
/* x[i] = row rows[i].token of the matrix. */
ibid_err ibidi_cu_embed(ibidi_cu_stream s, const ibidi_cu_matrix *w, const ibidi_cu_row *rows,
                        size_t n, float *x);

/* ---- heads.cu ---- */

/* y [n, ldy]: queries, keys, values of each row, times y_scale; adds biases, normalises heads (all
 * may be NULL), turns queries and keys by the rows' cos and sin [n, n_rot / 2]; queries times
 * score_scale go to q [n, n_heads * head_dim], keys and values to the rows' places in live pages.
 */
typedef struct ibidi_cu_heads {
    const float *y, *y_scale;
    size_t ldy;
    const float *bq, *bk, *bv, *q_norm, *k_norm;
    const float *cos, *sin;
    const ibidi_cu_row *rows;
    const ibidi_cu_seq *seqs;
    uint32_t layer;
    uint8_t *pool;
    float *q;
} ibidi_cu_heads;
ibid_err ibidi_cu_finish_heads(ibidi_cu_stream s, const ibidi_cu_shape *m, const ibidi_cu_heads *a,
                               size_t n);

/* The queries of tiles [0, n_tiles) turned for each of their sequence's turns, as fragments of the
 * left operand of mma; turned: [turned0 + turn] (coarse tiles: [turned0 + 2 turn], two of them) of
 * IBIDI_CU_TURNED head_dim bytes. For f16 pages f16: [dim / 16][lane] 16 bytes. For q8_0 ones two
 * planes of bytes, q = scale (high + low / 254): [dim / 32][lane] 16 bytes a plane, then scale [16]
 * f32. Fine tiles hold each query's rounding error, or low plane, in rows 8 to 15; coarse ones in
 * fragments of its own behind the first. max_turned: the largest n_turned. */
ibid_err ibidi_cu_turn(ibidi_cu_stream s, const ibidi_cu_shape *m, const ibidi_cu_tile *tiles,
                       size_t n_tiles, size_t max_turned, int fine, const ibidi_cu_seq *seqs,
                       const float *q, uint16_t *turned);

/* ---- attend.cu ---- */

typedef struct ibidi_cu_attend {
    const ibidi_cu_tile *tiles;
    const ibidi_cu_item *items;
    const ibidi_cu_row *rows;
    const ibidi_cu_seq *seqs;
    const uint8_t *pool;
    const uint16_t *turned;
    uint32_t layer;
    float *acc;   /* [n_partials, tile rows, head_dim], unnormalised */
    float *state; /* [n_partials, tile rows, 2] largest score, sum of 2^(score - largest) */
} ibidi_cu_attend;
/* One thread block an item. */
ibid_err ibidi_cu_attention(ibidi_cu_stream s, const ibidi_cu_shape *m, const ibidi_cu_attend *a,
                            size_t n_items, int fine);
/* Merges each row's partials in order: h [n, ldh] f16, lse [n, n_heads] in base 2. */
ibid_err ibidi_cu_merge(ibidi_cu_stream s, const ibidi_cu_shape *m, const ibidi_cu_attend *a,
                        size_t n, uint16_t *h, size_t ldh, float *lse);
/* mass[64 page + j] += sum over the tiles' rows in [row_lo, row_hi) and heads whose bit of `heads`
 * [n_heads bits, NULL: all] is set, of 2^(score - lse), for pages [0, n_pages). */
ibid_err ibidi_cu_mass(ibidi_cu_stream s, const ibidi_cu_shape *m, const ibidi_cu_attend *a,
                       size_t tile0, size_t n_tiles, int fine, size_t n_pages,
                       const uint64_t *heads, uint32_t row_lo, uint32_t row_hi, const float *lse,
                       float *mass);

/* ---- sample.cu ---- */

/* One token of each row of logits [n, ld]. temperature[i] 0: the largest (the first of equals);
 * else the smallest set of most probable tokens whose probability reaches top_p[i] (with all that
 * are as probable as the last), one of them drawn by uniform[i] in [0, 1), in order of their
 * numbers. One that is not a number counts as -infinity; UINT32_MAX if all are that. */
ibid_err ibidi_cu_sample(ibidi_cu_stream s, const float *logits, size_t ld, size_t n, size_t vocab,
                         const float *temperature, const float *top_p, const float *uniform,
                         uint32_t *token);

#ifdef __cplusplus
}
#endif
#endif
