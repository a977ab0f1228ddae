/* How likely a model finds texts as continuations of a prompt: the prompt is read once, all texts
 * behind it in few forward passes. Pure of stores and messages. */
#ifndef IBID_ATTENTION_LIKELIHOOD_H
#define IBID_ATTENTION_LIKELIHOOD_H

#include "attention/engine.h"
#include "attention/plan/prompt.h"
#include "attention/plan/scheduler.h"

enum { IBID_LIKELIHOOD_TEXTS = 256, IBID_LIKELIHOOD_TOKENS = 32, IBID_LIKELIHOOD_PROMPT = 256 };

/* out[i] = ln P(tokens of texts[i] | prompt), from position 0, no prefix. Longer texts count by
 * their first IBID_LIKELIHOOD_TOKENS tokens; an empty text gives 0. The caller is between
 * ibid_sched_question_begin and _end. Errors: TOOBIG (prompt or number of texts), INVAL (an empty
 * prompt), NOMEM, and those of ibid_engine_forward. */
ibid_err ibid_likelihoods(ibid_engine *e, ibid_sched *sched, const ibid_ids *prompt,
                          const ibid_ids *texts, size_t n, double *out);

/* ln of the sum of e^x[i]; n > 0. Relative accuracy of the sum 1e-5. */
double ibid_log_sum_exp(const float *x, size_t n);
#endif
