/* Does anything that was found answer the question? Decided from three things that mean the same in
 * a collection of one chunk and in one of thousands, and for every model. Pure.
 *
 * best: how far the best MaxSim lies above what the best wrong chunk has at calibration, in its
 * deviations. ahead: how far it lies above the mean of the next ones, likewise: the next 28th of
 * the collection, 5 to 2000 chunks; where there are fewer than 5, those that are missing count as
 * wrong chunks at calibration. share: the part of the question's word weight that the best hit
 * holds. A z-score among the candidates says less than it seems to: the right chunk itself makes
 * most of their spread. The weights are those of a logistic regression (docs/quality.md has its
 * data). */
#ifndef IBID_RETRIEVER_RELEVANCE_H
#define IBID_RETRIEVER_RELEVANCE_H

#include <stdbool.h>
#include <stddef.h>

/* From here on a hit is relevant. */
#define IBIDI_RELEVANT 0.5

typedef struct ibidi_evidence {
    double best, ahead, share;
} ibidi_evidence;

/* keys [n]: MaxSim of chunks, in any order, sorted here; NAN is passed over. blocks: of the
 * collection. null_mean and null_sd (above 0) as calibration has them. Sets best and ahead. False:
 * there is no number. */
bool ibidi_evidence_keys(double *keys, size_t n, size_t blocks, double null_mean, double null_sd,
                         ibidi_evidence *out);
/* 0..1. */
double ibidi_relevance(const ibidi_evidence *e);
#endif
