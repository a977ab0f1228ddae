/* Exact late interaction over stored token keys, read in place from the store's map.
 *
 * score(block) = sum over question tokens t of idf(t) * max over block tokens j of <k_t, k_j>,
 * divided by the sum of idf (ColBERT's MaxSim, arXiv:2004.12832, with weights of arXiv:2511.16106;
 * a token no block holds weighs most, so that a rare name counts). Title tokens take part. Keys are
 * int8 with value q / 127, so a dot product is divided by 127 * 127. */
#ifndef IBID_RETRIEVER_MAXSIM_H
#define IBID_RETRIEVER_MAXSIM_H

#include "attention/kernels/kernels.h"
#include "attention/kernels/pool.h"
#include "kvstore/kvstore.h"
#include "retriever/key_index.h"

typedef struct ibidi_asking { /* a question's tokens; borrowed */
    const int32_t *ids;       /* [n] */
    const int8_t *keys;       /* [n, dim] */
    size_t n, dim;            /* dim a multiple of 32 */
    ibid_hash calibration;
    const double *weights; /* [n] */
    double sum;            /* of weights, above 0 */
} ibidi_asking;

/* The score of a block whose tokens' best are best [q->n]. */
double ibidi_maxsim_sum(const ibidi_asking *q, const int32_t *best);
/* One block's keys that are at hand. */
double ibidi_maxsim_keys(const ibid_kernels *k, const ibidi_asking *q, const int8_t *keys,
                         size_t n_tokens, int32_t *best /* scratch [q->n] */);

/* scores[i] of blocks[i]; NAN where the store has no keys of this calibration and dimension.
 * *scored counts the others. x: where the collection's keys lie side by side, or NULL; what it
 * lacks comes from the store. pool NULL: this thread only; else the caller holds the pool. Errors:
 * NOMEM, BUSY (renew the snapshot), CORRUPT. */
ibid_err ibidi_maxsim_blocks(const ibid_kernels *k, ibid_pool *pool, ibid_snap *snap,
                             const ibidi_keyindex *x, const ibidi_asking *q, const uint64_t *blocks,
                             size_t n, float *scores, size_t *scored);
#endif
