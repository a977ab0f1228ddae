/* Which pages of a long context a decoding row reads, on the device: as attention/kernels/select.h
 * and engine_select.c do it on the CPU, but with a number of pages for a budget, which grids can
 * know beforehand. What was chosen becomes a sequence of its own for each kv head (its pages and
 * cells, room 0), which attention then reads like any other. */
#ifndef IBID_ATTENTION_CUDA_SELECT_H
#define IBID_ATTENTION_CUDA_SELECT_H

#include "attention/cuda/launch.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of a page at a kv head and layer: of each (layer, kv head) there are codes [dim / 4, room,
 * 32, 4], steps f32 [dim / 4, room, 4] and means f16 [room, dim], one behind the other. */
IBIDI_CU_BOTH uint32_t ibidi_cu_summary_bytes(uint32_t dim) {
    return dim * (IBIDI_CU_PAGE / 2 + 4 + 2);
}

/* One row's choosing; pointers to device memory. It lies there itself, among the tables of a pass,
 * so that launches do not depend on what grows with the context. */
typedef struct ibidi_cu_choosing {
    ibidi_cu_seq seq;     /* the whole one */
    uint32_t room;        /* of summaries and weights, in pages; at least n */
    uint32_t n;           /* pages the row sees */
    uint32_t last;        /* those from here on are always read, and the first; at least 1 */
    uint32_t n_chosen;    /* at most n, and more than there are from `last` on */
    const uint32_t *from; /* [n_layers] pages before this one have their summaries */
    const uint8_t *pool;
    uint8_t *summaries;   /* [n_layers, n_kv_heads, room] of ibidi_cu_summary_bytes */
    float *spread;        /* [n_layers, n_kv_heads, 2, dim] of all pages, in the order of quads */
    float *weight;        /* [n_kv_heads, group + 1, room]: scores, then ranks */
    ibidi_cu_page *pages; /* [n_kv_heads, n_chosen] the result, in order; empty ones last */
    uint32_t *cells;      /* the same: where in the pool */
    uint32_t *which;      /* the same: number in seq; UINT32_MAX: empty */
    uint32_t *read;       /* [n_kv_heads] += tokens in them */
} ibidi_cu_choosing;

/* Makes the summaries of a layer's pages from `from` up to `last`, turned to their places, and the
 * spread anew if there are some; n: at least as many. */
ibid_err ibidi_cu_summarise(ibidi_cu_stream s, const ibidi_cu_shape *m, const ibidi_cu_choosing *a,
                            size_t layer, size_t n);
/* Chooses for the row with queries q [n_heads * head_dim] (those of ibidi_cu_finish_heads). n: at
 * least `last`. */
ibid_err ibidi_cu_choose(ibidi_cu_stream s, const ibidi_cu_shape *m, const ibidi_cu_choosing *a,
                         size_t layer, size_t n, const float *q);
/* mass[64 which[i] + j] += chosen[64 i + j] for the chosen pages of a kv head that are among the
 * first n_stored. */
ibid_err ibidi_cu_spread_mass(ibidi_cu_stream s, const uint32_t *which, size_t n_chosen,
                              size_t n_stored, const float *chosen, float *mass);

/* sum[0] += over heads, what the chosen pages have of full attention's weight: 2^(chosen - all), of
 * log-sum-exps [n_heads] of one row. */
ibid_err ibidi_cu_recall(ibidi_cu_stream s, const float *chosen, const float *all, size_t n_heads,
                         float *sum);
/* bytes (of a kv head in a page, a multiple of 16) from heads [n] to place slot[i] of the pool. */
ibid_err ibidi_cu_land(ibidi_cu_stream s, const uint64_t *slot, const uint8_t *heads, size_t n,
                       size_t bytes, uint8_t *pool);

#ifdef __cplusplus
}
#endif
#endif
