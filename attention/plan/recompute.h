/* A question over stored blocks, some of whose tokens are computed again in context.
 *
 * Method (query-aware selection after ProphetKV, arXiv:2602.02579). Pass 1 runs the question's rows
 * over the stored KV at all layers and sums, per block token, the attention they give it over rows,
 * heads and layers. The ceil(share * all block tokens) tokens with the most mass are chosen (ties:
 * the earlier position). Their stored rows are masked at every layer, and pass 2 runs them and the
 * question in position order: each recomputed row sees, causally, the prefix, the blocks' unmasked
 * rows before it and the recomputed rows before it. Departures: (1) the first block is never chosen
 * if it stands where it was encoded, right behind the prefix: its stored KV is exact already, so
 * that a share may choose fewer tokens than asked; (2) share 1 recomputes every block token, the
 * first block's too, without a pass 1: this equals one ordinary causal pass; (3) share 0 is one
 * pass of the question over the stored KV. */
#ifndef IBID_ATTENTION_RECOMPUTE_H
#define IBID_ATTENTION_RECOMPUTE_H

#include "attention/engine.h"

/* A block at its place. Token j stands at global position local0 + offset + j. Borrowed. */
typedef struct ibid_placed_block {
    const ibid_kv_view *layers; /* [n_layers] */
    const int32_t *tokens;      /* [layers[0].n_tokens] */
    uint64_t local0, offset;
    uint64_t id; /* as in ibid_segment */
} ibid_placed_block;

/* Which tokens of each block are recomputed. */
typedef struct ibid_choice {
    uint64_t **masks; /* [n_blocks] bitmaps over the block's tokens, set = recomputed */
    size_t n_blocks;
    int32_t *tokens;     /* [n_rows] the chosen tokens in position order */
    uint32_t *positions; /* [n_rows] global */
    size_t n_rows;
} ibid_choice;

/* Allocates c for the blocks with nothing chosen. Errors: INVAL, NOMEM. */
ibid_err ibid_choice_init(ibid_choice *c, const ibid_placed_block *blocks, size_t n_blocks);
void ibid_choice_fini(ibid_choice *c);
/* mass[b][j]: what token j of block b got; may be NULL at share 0 and 1. */
ibid_err ibid_choose(ibid_choice *c, const ibid_placed_block *blocks, float *const *mass,
                     double share);

typedef struct ibid_question {
    const ibid_segment *prefix;      /* NULL: none */
    const ibid_placed_block *blocks; /* ascending, not overlapping */
    size_t n_blocks;
    const int32_t *tokens; /* [n] the question, at the positions after the last stored token */
    size_t n;
    double share;          /* 0..1 */
    const uint64_t *heads; /* bitmap over layer * n_heads + head that choose; NULL = all */
    bool will_select;      /* as in ibid_step */
    ibid_err (*ready)(void *arg, size_t layer); /* as in ibid_step: the blocks' KV at a layer */
    void *ready_arg;
} ibid_question;

/* A question ready to be continued: decode by giving seq one row after another, from position on.
 * Owns the sequence and the masks it borrows; the blocks' KV must stay valid. */
typedef struct ibid_asked {
    ibid_seq *seq;
    ibid_choice choice;       /* n_rows: tokens recomputed */
    uint32_t position;        /* of the next token */
    double probe_ms, main_ms; /* pass 1 and 2 */
} ibid_asked;

/* logits [n_vocab] of the question's last token. live_hint: rows expected afterwards (the answer).
 * Errors: INVAL, CONTEXT, NOMEM, CANCELLED; out is then empty. Caller closes. */
ibid_err ibid_question_run(ibid_engine *e, const ibid_question *q, size_t live_hint,
                           const atomic_bool *cancel, ibid_asked *out, float *logits);
void ibid_asked_close(ibid_asked *a);
#endif
