/* The arithmetic of the engine: one const table of functions per backend, chosen once at run time.
 * "reference" is always built, accumulates in double and is what every other one is checked
 * against.
 *
 * All functions are pure: they own nothing, allocate nothing, keep no state, and may run on several
 * threads at once on disjoint outputs. Matrices are row-major f32 unless a type is named. Sizes are
 * trusted here: they were checked where the bytes came in.
 *
 * Within one backend results do not depend on how work is grouped, bit for bit: y[i, r] of matmul
 * depends on row i of x and row r of w only, whatever n and the split of rows over threads; a row
 * of attn depends on its q, visible, the mask and the segment only. Between backends results differ
 * by rounding (matmul: below 1e-6 of sum_c |w[r, c] x[i, c]|); kv_pack, kv_unpack, maxsim_i8,
 * maxsim_panels and, signs of zeros apart, dequantize are equal. */
#ifndef IBID_ATTENTION_KERNELS_H
#define IBID_ATTENTION_KERNELS_H

#include "attention/kernels/panel.h"
#include "attention/tensor.h"
#include "rpc/base/err.h"

#include <stdbool.h>

enum { IBID_Q8_TILE = 8, IBID_KEY_PANEL = 16, IBID_KV_TILE = 128 };

/* Running state of exact softmax attention for one query row of one head (online softmax,
 * arXiv:1805.02867). Start: max = -INFINITY, sum = 0, acc all 0. Seeing more keys, in any order and
 * any split, only updates it; states over disjoint keys merge by ibid_attn_merge (log-sum-exp). */
typedef struct ibid_attn_state {
    float max; /* largest score so far */
    float sum; /* sum of exp(score - max) */
} ibid_attn_state;

/* One kv head of one KV segment against the query rows of all query heads that share it.
 * Row r may see tokens [0, visible[r]) of the segment, except those whose bit is set in masked. */
typedef struct ibid_attn_args {
    const ibid_kv_view *kv;
    size_t kv_head;
    const float
        *q; /* [n_rows, head_dim], already rotated to p - d and scaled by 1/sqrt(head_dim) */
    size_t n_rows;
    const uint32_t *visible; /* [n_rows] */
    const uint64_t *masked;  /* bitmap over the segment's tokens, or NULL */
    ibid_attn_state *state;  /* [n_rows] */
    float *acc;              /* [n_rows, head_dim], unnormalised: divide by state.sum at the end */
} ibid_attn_args;

/* One kv head of a context in tiles of IBID_KV_TILE tokens (kv_tile_pack), all but the last full,
 * against the query rows of all query heads that share it. Row r sees tokens [0, visible[r]). */
typedef struct ibid_tiles_args {
    const void *tiles; /* 64-byte aligned, kv_tile_bytes each */
    size_t head_dim, n_rows;
    const float *q; /* [n_rows, head_dim], rotated to their positions, spread as the keys are */
    const uint32_t *visible; /* [n_rows], ascending */
    ibid_attn_state *state;  /* as in ibid_attn_args */
    float *acc;
} ibid_tiles_args;

/* Keys in panels of IBID_KEY_PANEL: byte 64 c + 4 i + b of a panel is number 4 c + b of its key i,
 * plus 128. Where the last panel has no key left the last key stands again. */
typedef struct ibid_key_panels {
    const uint8_t *panels; /* [n, dim * IBID_KEY_PANEL] */
    size_t n;              /* at least 1 */
} ibid_key_panels;
static inline size_t ibid_key_panels_of(size_t n_keys) {
    return (n_keys + IBID_KEY_PANEL - 1) / IBID_KEY_PANEL;
}
/* out: ibid_key_panels_of(n_keys) panels; dim a multiple of 4, n_keys >= 1. unpack: key i of them.
 */
void ibid_key_panels_pack(const int8_t *keys, size_t n_keys, size_t dim, uint8_t *out);
void ibid_key_panels_unpack(const uint8_t *panels, size_t i, size_t dim, int8_t *key);

/* Where pages' best tokens are looked for (select.h), for heads that share their keys. */
typedef struct ibid_page_look {
    const float *steps;    /* [dim / 4, room, 4] */
    const uint8_t *codes;  /* [dim / 4, room, 32, 4] */
    const uint32_t *quads; /* [n], n up to IBID_PAGE_LOOK_MAX */
    const float *q, *unit; /* [group, n, 4], [group] */
    size_t room, n, group;
} ibid_page_look;
enum { IBID_PAGE_LOOK_MAX = 96 };

/* Values that share a scale where kv_pack packs n of them as q8_0. */
static inline size_t ibid_kv_group(size_t n) {
    return n % 64 ? 32 : 64;
}

typedef struct ibid_kernels {
    const char *name;        /* "reference", "avx2", "avxvnni", "avx512", "avx512vnni" */
    bool (*supported)(void); /* by this CPU and operating system */

    /* dst[i] = the i-th weight of the row, i < n (n a multiple of the type's block). */
    void (*dequantize)(ibid_type type, const void *row, float *dst, size_t n);
    /* y[i, r] = sum_c w[r, c] * x[i, c] for r in [row0, row1), i < n. ldx, ldy: row strides in
     * floats; y is indexed by the absolute r. scratch: at least matmul_scratch(cols) bytes, 64-byte
     * aligned, one per thread. n = 1 streams the weights as stored; large n unpacks panels of them
     * once. */
    void (*matmul)(const ibid_tensor *w, size_t row0, size_t row1, const float *x, size_t ldx,
                   size_t n, float *y, size_t ldy, void *scratch);
    size_t (*matmul_scratch)(size_t cols, size_t n);
    /* y[i] = x[i] / sqrt(mean(x^2) + eps) * w[i] (arXiv:1910.07467); x and y may be equal. */
    void (*rmsnorm)(const float *x, const float *w, float eps, float *y, size_t n);
    /* Turns each head's first n_rot dimensions, pair i by angle[i] given as cos and sin
     * [n_rot / 2]; in place over n_heads heads of head_dim (arXiv:2104.09864). */
    void (*rope)(ibid_pairing pairing, float *x, size_t n_heads, size_t head_dim, size_t n_rot,
                 const float *cos, const float *sin);
    /* Every 32 values times the Walsh-Hadamard matrix of order 32 over sqrt(32), in place; n a
     * multiple of 32. Its own inverse, and it keeps dot products. */
    void (*hadamard)(float *x, size_t n);
    /* gate[i] = silu(gate[i]) * up[i] (arXiv:2002.05202). */
    void (*swiglu)(float *gate, const float *up, size_t n);
    void (*add)(float *x, const float *y, size_t n); /* x += y */
    void (*attn)(const ibid_attn_args *a);
    /* Optional: attn in integers for q8_0 KV with head_dim a multiple of 32, up to 256 (what else
     * it is given goes to attn); two to three times as fast. Approximate: queries are rounded to
     * int8 per 32 dimensions (multiples of max|q| / 127), weights to 8 bits, or to 16 where few
     * tokens hold most of the weight. Grouping changes no bit here either. */
    void (*attn_i8)(const ibid_attn_args *a);
    /* Optional, all NULL or none: many rows over a context that was laid into tiles first, twice as
     * fast as attn_i8 and with its errors, but that scales are of 64 numbers, not 32. head_dim: a
     * multiple of 64, up to 256. kv_tile_pack lays n tokens, 1 to IBID_KV_TILE, whose keys and
     * values are [n, head_dim], into a tile. A row's result depends on its q and the tokens it
     * sees only, bit for bit. */
    size_t (*kv_tile_bytes)(size_t head_dim);
    void (*kv_tile_pack)(const float *k, const float *v, size_t n, size_t head_dim, void *tile);
    void (*attn_tiles)(const ibid_tiles_args *a);
    /* mass[t] += exp(q_r . k_t - lse[r]) over rows r and the tokens each may see: the attention
     * each token finally got, where lse[r] = log(sum) + max of the finished row. state and acc
     * unused. */
    void (*attn_mass)(const ibid_attn_args *a, const float *lse, float *mass);
    /* Optional: the same as approximate as attn_i8 is, whose lse it wants. */
    void (*attn_mass_i8)(const ibid_attn_args *a, const float *lse, float *mass);
    /* Packs n values (a multiple of 32 for q8_0) into a KV plane; scale NULL unless q8_0. q8_0:
     * d = max|x| / 127 rounded to f16, q = round(x / d) with that d; of every
     * ibid_kv_group(n) values, the two scales of 64 being equal. A tile's scales are of
     * 64 too, so that what is laid into one unturned is not rounded twice. */
    void (*kv_pack)(ibid_kv_type type, const float *src, size_t n, void *dst, uint16_t *scale);
    void (*kv_unpack)(ibid_kv_type type, const void *src, const uint16_t *scale, size_t n,
                      float *dst);
    /* max over j < n_keys of the int8 dot product of each query with key j: best[i] = max_j
     * dot(q_i, k_j), q [n_q, dim], k [n_keys, dim], dim a multiple of 32. For MaxSim over token
     * keys; the index of the maximum goes to arg[i] unless arg is NULL. n_keys >= 1. */
    void (*maxsim_i8)(const int8_t *q, size_t n_q, const int8_t *k, size_t n_keys, size_t dim,
                      int32_t *best, uint32_t *arg);
    /* The same of keys in panels, for n blocks of them at once: best [n, n_q]. A third faster and
     * more, since nothing has to be turned. */
    void (*maxsim_panels)(const int8_t *q, size_t n_q, size_t dim, const ibid_key_panels *blocks,
                          size_t n, int32_t *best);

    /* score[g * ld + i] += unit[g] max over tokens t < 64 of the sum over quads p and their
     * dimensions j of round(q[g, p, j] steps[p, i, j]) (code[p, i, t, j] - 7.5), for pages i <
     * n_pages. Sums of 15 times all rounded sizes are below 2^15. */
    void (*page_scores)(const ibid_page_look *look, size_t n_pages, float *score, size_t ld);

    /* Optional, all NULL or none: matmul of quantised weights in panels (panel.h) with activations
     * rounded to integers; several times as fast. Approximate: each group of 32 values of x is
     * rounded to multiples of d = max|x| / 127, or of d / 128 if the group is fine, so y[i, r] is
     * off by at most sum_c |w[r, c]| d(i, c) / 2, besides rounding in f32. Fine are the groups of a
     * row whose max|x| is fine_above times the root mean square of all its groups' or more: 0 for
     * all, INFINITY for none. Grouping changes no bit here either.
     *
     * q8_pack turns n rows of x into tiles of IBID_Q8_TILE rows, q8_bytes(cols) bytes each, row i
     * in tile i / IBID_Q8_TILE; xq 64-byte aligned, cols a multiple of 32. matmul_q8 as matmul on
     * such tiles, the first n rows of them, for rows [row0, row1) of w, row0 a multiple of 16. */
    size_t (*q8_bytes)(size_t cols);
    void (*q8_pack)(const float *x, size_t ldx, size_t n, size_t cols, float fine_above, void *xq);
    void (*matmul_q8)(const ibid_panels *w, size_t row0, size_t row1, const void *xq, size_t n,
                      float *y, size_t ldy);
} ibid_kernels;

/* into = into + other, both states of the same row over disjoint keys. */
void ibid_attn_merge(ibid_attn_state *into, float *into_acc, const ibid_attn_state *other,
                     const float *other_acc, size_t head_dim);

/* The fastest supported backend, or the one named (also by environment IBID_KERNELS); NULL name =
 * choose. Errors: NOTFOUND (no such name; the detail lists them), NOTSUP (not on this CPU). */
ibid_err ibid_kernels_get(const char *name, const ibid_kernels **out);
const ibid_kernels *const *ibid_kernels_all(void); /* NULL-terminated, fastest last */

float ibid_f16_to_f32(uint16_t h);
uint16_t ibid_f32_to_f16(float f); /* round to nearest even */
#endif
