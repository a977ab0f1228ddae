/* What is alive in one collection: its blocks, and in how many of them each token occurs. Kept in
 * memory, made from the store when a collection is first used (milliseconds per million tokens),
 * then moved along by the store's changes. Not thread-safe. */
#ifndef IBID_RETRIEVER_VIEW_H
#define IBID_RETRIEVER_VIEW_H

#include "kvstore/kvstore.h"

typedef struct ibidi_live {
    uint64_t block;
    uint32_t n_tokens;
    uint32_t n_ids;
    int32_t *ids; /* [n_ids] distinct token ids, ascending: what to take off when the block goes */
} ibidi_live;

typedef struct ibidi_view {
    ibidi_live *blocks; /* ascending block number */
    size_t n, room;
    uint32_t *df; /* [n_df] blocks that hold token id i */
    size_t n_df;
    uint64_t tokens;
} ibidi_view;

void ibidi_view_fini(ibidi_view *v); /* also makes it empty */
/* Index of a block, or v->n. */
size_t ibidi_view_at(const ibidi_view *v, uint64_t block);
/* Adds a block that is not there yet; a block that is there is left alone. Appending in ascending
 * order costs least. Errors: NOMEM, CORRUPT (a token id below 0 or above 2^24). */
ibid_err ibidi_view_add(ibidi_view *v, const ibid_block *b);
void ibidi_view_drop(ibidi_view *v, uint64_t block); /* unknown: nothing */

/* weights[i] = ln((N - n_i + 0.5) / (n_i + 0.5) + 1), n_i the blocks that hold ids[i]; a token
 * nobody holds weighs most. *sum: their sum. */
void ibidi_view_idf(const ibidi_view *v, const int32_t *ids, size_t n, double *weights,
                    double *sum);
#endif
