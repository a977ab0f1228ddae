/* Measures of a ranking, and what two systems' differences are worth. Pure. */
#ifndef IBID_FRONT_EVAL_RANK_H
#define IBID_FRONT_EVAL_RANK_H

#include "rpc/base/err.h"

#include <stdint.h>

enum { IBIDI_RECALLS = 4 };
extern const size_t ibidi_recall_depths[IBIDI_RECALLS]; /* 1, 5, 10, 100 */

typedef struct ibidi_rank_scores {
    double ndcg10, mrr10, recall[IBIDI_RECALLS];
} ibidi_rank_scores;

/* One question. gains [n]: the judged gain of each ranked document, best first, 0 for the unjudged;
 * judged [n_judged]: every positive gain of the question, in any order (sorted here).
 * nDCG@10 is trec_eval's ndcg_cut.10: gain = the judgement itself (not 2^g - 1), discount
 * 1 / log2(rank + 1), divided by the best possible sum over the judged. recall@k: relevant among
 * the first k, over all relevant. MRR@10: 1 / rank of the first relevant one, 0 beyond 10.
 * All 0 when nothing is judged relevant. */
void ibidi_rank(const double *gains, size_t n, double *judged, size_t n_judged,
                ibidi_rank_scores *out);

typedef struct ibidi_interval {
    double mean, low, high; /* 95 %: percentiles 2.5 and 97.5 of the resampled means */
} ibidi_interval;
enum { IBIDI_RESAMPLES = 10000 };
#define IBIDI_EVAL_SEED 0x1b1dULL

/* Paired bootstrap over questions (Efron; for retrieval: Smucker, Allan, Carterette, CIKM 2007):
 * the mean of b - a and its interval over IBIDI_RESAMPLES resamples of the n questions. a NULL: of
 * b. Deterministic in seed. Errors: INVAL (n = 0), NOMEM. */
ibid_err ibidi_bootstrap(const double *a, const double *b, size_t n, uint64_t seed,
                         ibidi_interval *out);

double ibidi_mean(const double *v, size_t n); /* 0 for none */
/* Nearest rank; sorts v. p in 0..1; 0 for none. */
double ibidi_percentile(double *v, size_t n, double p);
/* Which of `folds` parts a question belongs to, by its id alone: FNV-1a 64 modulo folds. */
size_t ibidi_fold(const char *id, size_t folds);
/* A generator for drawing and shuffling: SplitMix64. */
uint64_t ibidi_random(uint64_t *state);
#endif
