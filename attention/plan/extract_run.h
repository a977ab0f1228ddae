/* An answer that is a span of the blocks, word for word: spans ranked by the text (extract.h), the
 * best of them weighed by how likely the model finds them as the answer. Costs the question's pass
 * and one more over the tokens of those spans, each once for all spans that start where it does.
 * Knows no store and no messages. */
#ifndef IBID_ATTENTION_EXTRACT_RUN_H
#define IBID_ATTENTION_EXTRACT_RUN_H

#include "attention/plan/encode.h"
#include "attention/plan/extract.h"
#include "attention/plan/recompute.h"

enum {
    IBID_EXTRACT_LOOKED = 40, /* spans whose first token's likelihood is looked at */
    IBID_EXTRACT_TRIED = 12,  /* and those of them that the model reads */
    IBID_EXTRACT_TOKENS_MAX = 24
};

/* What is known of a span once the model has seen it. Natural logarithms. */
typedef struct ibid_tried {
    ibid_span span;
    size_t from, n_tokens; /* of its block's text */
    double first, rest;    /* likelihood of its first token, of the others */
    double stop;           /* that the answer ends behind it */
    double score;
    double share; /* of all that were tried: softmax over score; sums to 1 */
} ibid_tried;

typedef struct ibid_extract_plan {
    const ibid_placed_block *blocks; /* in position order: the best one last */
    const size_t *n_title; /* [n_blocks] leading tokens that are no text of the document */
    size_t n_blocks;
    ibid_str question;
    const int32_t *prompt; /* ibid_prompt_extract */
    size_t n_prompt;
    double share; /* recomputed, 0..1 */
    size_t most;  /* for training: as many spans are read, whatever they promise; 0: as above */
    ibid_err (*tick)(void *arg); /* as in ibid_answer_plan */
    ibid_err (*ready)(void *arg, size_t layer);
    void *arg;
    const atomic_bool *cancel;
} ibid_extract_plan;

typedef struct ibid_extracted {
    char *text; /* the blocks' texts one behind the other, best block first; ibid_extracted_fini */
    ibid_str *texts;   /* [n_blocks] */
    ibid_tried *tried; /* [n], best first; span.block 0 is the best block, the plan's last */
    size_t n;
    size_t recomputed_tokens, rows; /* rows: of the passes behind the question's */
    uint64_t first_ns;              /* ibid_now_ns() when the answer was known */
} ibid_extracted;

/* n is 0 where the blocks hold no span. Errors: CONTEXT, NOMEM, CANCELLED, those of tick and ready.
 */
ibid_err ibid_extract_run(const ibid_reader *r, const ibid_extract_plan *p, ibid_extracted *out);
void ibid_extracted_fini(ibid_extracted *x);
#endif
