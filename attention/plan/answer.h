/* One answer over placed blocks: the question's pass, then tokens until the turn ends. Knows no
 * store and no messages. */
#ifndef IBID_ATTENTION_ANSWER_H
#define IBID_ATTENTION_ANSWER_H

#include "attention/plan/encode.h"
#include "attention/plan/recompute.h"

typedef struct ibid_answer_plan {
    const ibid_placed_block *blocks; /* in position order: the best one last */
    size_t n_blocks;
    const int32_t *question; /* ibid_prompt_question */
    size_t n_question;
    double share; /* recomputed, 0..1 */
    size_t max_tokens;
    double temperature, top_p;
    uint64_t seed;
    ibid_select *select; /* of the answer's tokens but the first; NULL: full attention */
    /* Attention of the answer's tokens over the blocks' stored rows, summed: mass[b][t] +=. NULL:
     * not wanted. heads: bitmap over layer * n_heads + head. */
    const uint64_t *heads;
    float *const *mass;
    /* Called before each step, outside the engine's turn; what the blocks borrow may be renewed
     * here. An error ends the answer. */
    ibid_err (*tick)(void *arg);
    /* NULL, or called in the question's pass before a layer's stored KV is read, inside the engine's
     * turn (ibid_step). */
    ibid_err (*ready)(void *arg, size_t layer);
    /* Text to append: whole UTF-8 characters. */
    ibid_err (*text)(void *arg, const char *s, size_t n);
    void *arg;
    const atomic_bool *cancel;
} ibid_answer_plan;

typedef struct ibid_answered {
    ibid_buf text;      /* the whole answer; ibid_buf_fini */
    const char *finish; /* "stop" or "length" */
    size_t recomputed_tokens, completion_tokens;
    uint64_t first_token_ns; /* ibid_now_ns() when the first token was known */
} ibid_answered;

enum { IBID_ANSWER_TEXT_MAX = 4 * 1024 * 1024 };

/* out->text is valid (perhaps part of an answer) whatever the outcome. The text is led and ended by
 * no white space, in the pieces as in the whole. Errors: CONTEXT, CANCELLED, those of tick and
 * text. */
ibid_err ibid_answer_run(const ibid_reader *r, const ibid_answer_plan *p, ibid_answered *out);
/* Share that `auto` stands for in a generated answer: one block is exact as it is stored. Of 50
 * XQuAD questions the default model's answers hold the gold answer, at shares of 0.15, 0.3, 0.5 and
 * 1, for 38, 40, 38 and 36 % with two blocks, and for 38, 40, 46 and 44 % with three. */
double ibid_recompute_auto(size_t n_blocks);

/* Turns bytes of tokens into whole characters. Bytes that are no UTF-8 become U+FFFD. Leading white
 * space is dropped; white space is held back until something follows it. */
typedef struct ibid_utf8_stream {
    char tail[4]; /* the start of a character */
    size_t n_tail;
    ibid_buf held; /* white space */
    bool started;
} ibid_utf8_stream;
void ibid_utf8_stream_init(ibid_utf8_stream *s);
void ibid_utf8_stream_fini(ibid_utf8_stream *s);
/* Appends what can be said by now to out. end: the text is over; a broken tail is replaced. */
ibid_err ibid_utf8_stream_put(ibid_utf8_stream *s, const char *bytes, size_t n, bool end,
                              ibid_buf *out);
#endif
