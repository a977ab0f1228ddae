/* Picks the next token from a row of logits: greedy, or seeded temperature and top-p.
 *
 * Temperature t > 0: token i has weight exp((logit[i] - max) / t). top_p in (0, 1): only the
 * smallest set of heaviest tokens whose share of all weight reaches top_p (ties: the lower id
 * first) takes part (nucleus sampling, arXiv:1904.09751). Random numbers come from PCG32 (XSH-RR
 * 64/32, O'Neill 2014), so that a seed gives the same tokens on every machine. Not thread-safe. */
#ifndef IBID_ATTENTION_SAMPLER_H
#define IBID_ATTENTION_SAMPLER_H

#include "rpc/base/err.h"

#include <stddef.h>
#include <stdint.h>

typedef struct ibid_sampler ibid_sampler;

/* temperature 0: greedy, the seed unused. top_p 0 or 1: all tokens take part. Errors: INVAL
 * (negative or not finite, top_p above 1), NOMEM. */
ibid_err ibid_sampler_open(size_t n_vocab, double temperature, double top_p, uint64_t seed,
                           ibid_sampler **out);
void ibid_sampler_close(ibid_sampler *s);
/* logits [n_vocab]; one that is not a number counts as -infinity. Errors: INVAL (no logit above
 * -infinity). Allocates nothing. */
ibid_err ibid_sampler_pick(ibid_sampler *s, const float *logits, int32_t *token);
/* The next random number, in [0, 1), for a token drawn elsewhere (ibid_draw). */
double ibid_sampler_unit(ibid_sampler *s);
#endif
