/* Fusion of the two searches' scores. Pure. */
#ifndef IBID_RETRIEVER_FUSE_H
#define IBID_RETRIEVER_FUSE_H

#include "rpc/base/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One candidate: a score of NAN means that this search has nothing to say about it. */
typedef struct ibidi_candidate {
    uint64_t document, chunk, block;
    double keys, lexical, score;
    bool exact; /* holds a code or the few words that were asked for */
} ibidi_candidate;

/* score = weight * keys + (1 - weight) * gate * lexical / most, most: the greatest BM25 any text
 * could have for this question; gate goes from 0 to 1 as the best lexical / most goes from 0.2 to
 * 0.3. A convex combination, which arXiv:2210.11934 finds above reciprocal rank fusion, over bounds
 * instead of the candidates' spread: where no word of the question says anything, spread would blow
 * up the noise of those that are left. Missing keys count as the lowest seen, missing words as 0.
 * With one search only, or most 0 (no word that counts), its raw score. Then sorts by descending
 * score, exact ones first; ties by document and chunk, so that an answer never depends on the order
 * of its input. Returns the gate; 0 where there was nothing to fuse. */
double ibidi_fuse(ibidi_candidate *c, size_t n, double keys_weight, double most);
void ibidi_candidates_sort(ibidi_candidate *c, size_t n); /* in that order */
#endif
