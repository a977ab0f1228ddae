/* The words around documents and questions: prefix + blocks + question, as token ids.
 *
 * With a known chat template the prefix is the system turn and the opened user turn; the question
 * closes that turn and opens the reply. Without one both are plain text. Only the template's own
 * pieces are parsed for control tokens; documents and questions never are. */
#ifndef IBID_ATTENTION_PROMPT_H
#define IBID_ATTENTION_PROMPT_H

#include "attention/model/model.h"
#include "kvstore/kvstore.h"

typedef struct ibid_wording {
    const char *system;  /* what the model is told to do */
    const char *lead_in; /* between the opened user turn and the first block */
    const char *ask;     /* between the last block and the question */
    const char *answer;  /* between the question and the end of the turn */
    const char *reply;   /* how the reply is led in, or "" */
} ibid_wording;
extern const ibid_wording ibid_wording_default;

typedef struct ibid_ids { /* free with ibid_free(ids) */
    int32_t *ids;
    size_t n;
} ibid_ids;

/* Errors: NOMEM, TOOBIG. The prefix is never empty. */
ibid_err ibid_prompt_prefix(const ibid_model *m, const ibid_wording *w, ibid_ids *out);
ibid_err ibid_prompt_question(const ibid_model *m, const ibid_wording *w, ibid_str question,
                              ibid_ids *out);
/* The question as text to be continued with a few words of the blocks: shown how by examples, the
 * user's turn still open. */
ibid_err ibid_prompt_extract(const ibid_model *m, ibid_str question, ibid_ids *out);
/* The question's own tokens, as its keys are taken: led by a space, as words in running text are,
 * so that its first word has the same token as in the documents. */
ibid_err ibid_prompt_keys(const ibid_model *m, ibid_str question, ibid_ids *out);

/* BLAKE2b-256 over (model, KV type, prefix layout version, token ids). */
ibid_hash ibid_prefix_id(const ibid_model *m, ibid_kv_type type, const int32_t *ids, size_t n);
#endif
