/* Spans of a text that may answer a question, ranked by what the text alone shows: how much of the
 * question the sentence holds, how near to it the span stands, whether it looks like what is asked
 * for (a number, a date, a name), and whether it is cut where phrases are. Pure: no model, no
 * store.
 *
 * The ranking is a log-linear model over few features of English text; its weights are trained by
 * tools/train-extract (recipe there, measures in docs/quality.md). In other languages the parts
 * that know no language remain: words in common, nearness, capitals, digits, punctuation. */
#ifndef IBID_ATTENTION_EXTRACT_H
#define IBID_ATTENTION_EXTRACT_H

#include "kvstore/kvstore.h"

enum {
    IBID_EXTRACT_WORDS_MAX = 8, /* of a span */
    IBID_EXTRACT_KINDS = 6,     /* of questions */
    IBID_EXTRACT_COMMON = 39,   /* features that all kinds share */
    IBID_EXTRACT_OF_KIND = 12,
    IBID_EXTRACT_FEATURES = IBID_EXTRACT_COMMON + IBID_EXTRACT_KINDS * IBID_EXTRACT_OF_KIND
};

typedef enum ibid_wants { /* what a question asks for */
                          IBID_WANTS_THING = 0,
                          IBID_WANTS_NUMBER = 1,
                          IBID_WANTS_TIME = 2,
                          IBID_WANTS_PERSON = 3,
                          IBID_WANTS_PLACE = 4,
                          IBID_WANTS_MANNER = 5, /* how, why: a span may still say it */
} ibid_wants;

ibid_wants ibid_question_wants(ibid_str question);
/* Whether a question wants a fact, which a span can be; else an explanation: why, how, describe,
 * summarise, compare, ... or no question at all. */
bool ibid_question_wants_fact(ibid_str question);

typedef struct ibid_span {
    size_t block;                        /* index of its text */
    size_t start, end;                   /* bytes in that text */
    size_t sentence_start, sentence_end; /* the sentence that holds it */
    double evidence;                     /* share of the question's words in that sentence, 0..1 */
    double score;                        /* higher is better; comparable within one call only */
} ibid_span;

/* At most max spans in descending score into out [max]; ties: the earlier. texts [n] in descending
 * relevance. Errors: NOMEM. */
ibid_err ibid_extract_spans(ibid_str question, const ibid_str *texts, size_t n, size_t max,
                            ibid_span *out, size_t *n_out);

/* Every span with its features, for training. */
ibid_err ibidi_extract_each(ibid_str question, const ibid_str *texts, size_t n,
                            ibid_err (*visit)(void *arg, const ibid_span *s, const float *features),
                            void *arg);
extern const float ibidi_extract_weights[IBID_EXTRACT_FEATURES];
#endif
