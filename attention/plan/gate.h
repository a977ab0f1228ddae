/* How close one way of computing is to another: compares logits position by position.
 *
 * For a position with distributions P (reference) and Q (under test) over the vocabulary, the
 * divergence is KL(P || Q) = sum p log(p / q) in nats, computed in double from the logits. A KV
 * type may be used with a model when the mean divergence that it alone causes is small and the
 * likeliest token nearly always stays the same (docs/design.md, section 4). */
#ifndef IBID_ATTENTION_GATE_H
#define IBID_ATTENTION_GATE_H

#include "attention/engine.h"

typedef struct ibid_gate_score {
    size_t n; /* positions */
    double kl_mean, kl_p99;
    double top1;              /* share of positions with the same likeliest token, 0..1 */
    double ppl_ref, ppl_test; /* perplexity over the positions whose next token is known */
} ibid_gate_score;

/* What has been compared so far; all zero to begin with. */
typedef struct ibid_gate_tally {
    double *kl; /* [n] */
    size_t n, room;
    size_t same, n_known;
    double nll_ref, nll_test; /* summed over the n_known positions */
} ibid_gate_tally;

/* Compares one position: logits [n_vocab] of both; next is the token that follows in the text, -1
 * if unknown. A logit that is not a number makes the position's divergence infinite. Errors: NOMEM.
 */
ibid_err ibid_gate_add(ibid_gate_tally *t, const float *ref, const float *test, size_t n_vocab,
                       int32_t next);
/* Sorts t->kl. Nothing compared: all zero. */
ibid_gate_score ibid_gate_score_of(ibid_gate_tally *t);
void ibid_gate_fini(ibid_gate_tally *t);

/* Live rows [row0, row0 + n) as stored KV of a type, at their global positions: *out [n_layers]
 * views over memory of the same allocation (ibid_free). Errors: INVAL (q8_0 needs a head size that
 * is a multiple of 32), NOMEM. */
ibid_err ibid_gate_store(const ibid_model *m, const ibid_seq *s, size_t row0, size_t n,
                         ibid_kv_type type, ibid_kv_view **out);
#endif
