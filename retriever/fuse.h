/* Fusion of the two searches' scores. Pure. */
#ifndef IBID_RETRIEVER_FUSE_H
#define IBID_RETRIEVER_FUSE_H

#include "rpc/base/err.h"

#include <stdint.h>

/* One candidate: a score of NAN means that this search has nothing to say about it. */
typedef struct ibidi_candidate {
    uint64_t document, chunk, block;
    double keys, lexical, score;
} ibidi_candidate;

/* score = weight * z(keys) + (1 - weight) * z(lexical), z over the candidates that have the score,
 * a missing one counting as the lowest seen (convex combination; arXiv:2210.11934 finds it above
 * reciprocal rank fusion). With one search only, its raw score. Then sorts by descending score;
 * ties by document and chunk, so that an answer never depends on the order of its input. */
void ibidi_fuse(ibidi_candidate *c, size_t n, double keys_weight);
#endif
