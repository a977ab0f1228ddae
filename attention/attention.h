/* The attention room, as other rooms see it: models, tokens, encoding of blocks, question keys, answers.
 * These calls send messages to ibid-attention (room "attention"); the handlers are attention_service.c. */
#ifndef IBID_ATTENTION_H
#define IBID_ATTENTION_H

#include "kvstore/kvstore.h"
#include "rpc/bus/bus.h"

/* ---- Models ---- */

typedef struct ibid_model_info {
    ibid_hash fingerprint;
    char name[128], arch[32], path[1024], template_name[32];
    uint64_t n_layers, n_heads, n_kv_heads, head_dim, n_ctx, n_vocab, kv_bytes_per_token;
    uint64_t file_bytes;
    uint64_t key_dim; /* of a token key; 0: no retrieval head, search goes by words */
    bool calibrated, loaded;
    char backend[8]; /* that runs it: "cpu" or "cuda" */
} ibid_model_info;

/* Opens a GGUF file, encodes its prefix, calibrates it if it was not, and writes its record to the
 * store. Minutes on a slow machine: deadline 30 min. name: "" = from the file. */
ibid_err ibid_attn_model_add(ibid_client *c, const char *path, const char *name,
                             ibid_model_info *out);
typedef struct ibid_model_choice {
    const char *path, *name;
    const char *kv_type; /* "f32", "f16" or "q8_0"; NULL = q8_0 where the model's heads allow it */
    bool force;          /* use the KV type although it fails its gate */
} ibid_model_choice;
/* The same with choices. INEXACT: the KV type fails its gate. EXISTS: added before with another. */
ibid_err ibid_attn_model_add_as(ibid_client *c, const ibid_model_choice *choice,
                                ibid_model_info *out);
/* By fingerprint in hex, name, or "" for the default (the one added first). NOTFOUND names what is
 * there. Loads it if needed. */
ibid_err ibid_attn_model_info(ibid_client *c, const char *model, ibid_model_info *out);
/* Runs calibration again (sample: text, or NULL for the installed one) and derives new token keys for
 * every block from stored K. report: a table for a person. */
ibid_err ibid_attn_calibrate(ibid_client *c, const char *model, ibid_str sample, ibid_buf *report);
typedef struct ibid_calibrate_request {
    const char *model;
    ibid_str sample; /* s NULL: the installed one */
    ibid_str train;  /* text to train a retrieval head on, up to 4 MiB; s NULL: do not train */
    /* Vectors of a sentence embedding model, f32 little-endian: one for every line that `pairs`
     * gives for the same text. s NULL: train without a teacher. */
    ibid_str teacher;
    bool pairs; /* only report the chunks and questions of the training text, as JSON lines */
} ibid_calibrate_request;
/* The same with choices. A trained head is kept only where it finds more on held-out chunks than
 * raw heads do: the report says so. Without train: the head that comes with the program for this
 * model, or else the best raw heads. */
ibid_err ibid_attn_calibrate_as(ibid_client *c, const ibid_calibrate_request *q, ibid_buf *report);

typedef struct ibid_kv_verdict {
    char type[8];
    uint64_t positions;
    double kl_mean, kl_p99, top1; /* against live f32 KV; nats, nats, 0..1 */
    bool passed, forced;
} ibid_kv_verdict;
typedef struct ibid_kv_gate {
    char name[128], kv_type[8]; /* of the model; the type its KV is stored in */
    ibid_kv_verdict types[4];
    size_t n_types;
} ibid_kv_gate;
/* Measures f16 and q8_0 KV (where the model's heads allow it) on a text (s NULL: the installed
 * one), and keeps the verdicts: indexing with a type that failed is refused. force: allowed all the
 * same from now on. positions: 0 = 2,000. Minutes on a large model. */
ibid_err ibid_attn_kv_gate(ibid_client *c, const char *model, ibid_str text, uint64_t positions,
                           bool force, ibid_kv_gate *out);

/* ---- Text to blocks (used by the indexer) ---- */

typedef struct ibid_tokens { /* one allocation: ids, then ends; free with ibid_free(ids) */
    int32_t *ids;
    uint64_t *ends; /* byte offset where each token ends in the text */
    size_t n;
} ibid_tokens;
/* Text as ordinary text (no control tokens). At most 32 MiB a call. */
ibid_err ibid_attn_tokenize(ibid_client *c, const ibid_hash *model, ibid_str text,
                            ibid_tokens *out);

typedef struct ibid_encode_block {
    size_t n_title, n_tokens; /* title line's tokens first; n_tokens <= IBID_BLOCK_TOKENS_MAX */
    const int32_t *tokens;
} ibid_encode_block;
enum { IBID_BLOCK_TOKENS_MAX = 256, IBID_ENCODE_BLOCKS_MAX = 256 };

typedef struct ibid_encode_result {
    uint64_t encoded_tokens, reused_tokens, encoded_blocks;
    double ms;
} ibid_encode_result;
/* Finds each block in the store (same model, prefix, tokens, KV present, keys current) or encodes it,
 * and holds it for the job. numbers [n] out. Questions go first, so this may take longer than the
 * tokens alone; deadline 10 min. */
ibid_err ibid_attn_encode(ibid_client *c, const ibid_hash *model, uint64_t job,
                          const ibid_encode_block *blocks, size_t n, uint64_t *numbers,
                          ibid_encode_result *out);

/* ---- Questions ---- */

typedef struct ibid_question_keys { /* one allocation; free with ibid_free(ids) */
    int32_t *ids;                 /* [n] tokens of the question */
    int8_t *keys;                 /* [n, dim] */
    size_t n, dim;                /* dim 0: the model has no retrieval head */
    ibid_hash calibration;
} ibid_question_keys;
ibid_err ibid_attn_question_keys(ibid_client *c, const ibid_hash *model, ibid_str question,
                                 ibid_question_keys *out);

/* ln P(text | prompt) for each text, by the model alone: no documents. Texts are taken as they come;
 * a word in running text begins with a space. At most 256 texts, of which 32 tokens count. */
ibid_err ibid_attn_likelihoods(ibid_client *c, const ibid_hash *model, ibid_str prompt,
                               const ibid_str *texts, size_t n, double *out);

typedef struct ibid_answer_block { /* in descending relevance; the plan orders them */
    uint64_t document, chunk, block;
    double score;
} ibid_answer_block;

typedef enum ibid_answer_mode {
    IBID_ANSWER_GENERATE = 0, /* in the model's own words */
    IBID_ANSWER_EXTRACT = 1,  /* words of the blocks, as they stand there */
    IBID_ANSWER_AUTO = 2,     /* extract where the question wants a fact, else generate */
} ibid_answer_mode;

typedef struct ibid_answer_request {
    ibid_hash model;
    ibid_str question;
    const ibid_answer_block *blocks;
    size_t n_blocks;
    double recompute;   /* 0..1; negative = auto */
    uint32_t max_tokens; /* 0 = default */
    double temperature, top_p; /* temperature 0 = greedy */
    uint64_t seed;
    uint32_t max_quotes, quote_bytes; /* 0 = 3 and 300 */
    ibid_answer_mode mode;
    /* Of what a token of the answer sees, the share that it attends to, chosen anew for each (layer,
     * kv head): ibid_select in engine.h. 0: everything. recall: also measures what was missed, which
     * costs more than it saves. */
    double attention_share;
    bool attention_recall;
} ibid_answer_request;

typedef struct ibid_citation {
    uint64_t document, chunk;
    uint64_t start, end;  /* byte range in the document's normalised text */
    ibid_str quote;       /* exactly those bytes */
    double weight;
} ibid_citation;

typedef struct ibid_answer_event {
    enum { IBID_ANSWER_PROGRESS, IBID_ANSWER_TOKEN, IBID_ANSWER_DONE } kind;
    ibid_str text;  /* TOKEN: whole UTF-8 characters, to append; DONE: the whole answer */
    /* DONE only: */
    const ibid_citation *citations;
    size_t n_citations;
    const char *finish; /* "stop" or "length" */
    uint64_t prompt_tokens, reused_tokens, recomputed_tokens, encoded_tokens, completion_tokens;
    /* Why blocks were encoded for this answer, in words joined by ", ": "evicted", "damaged",
     * "slow_disk" (reading their KV from disk would have taken longer). Empty: none was. */
    char encoded_why[32];
    uint64_t kv_bytes_read, kv_bytes_from_disk; /* the second: not in memory when it was asked for */
    double kv_wait_ms; /* of that, waited for: the rest came while layers were computed */
    double recompute; /* what auto chose */
    const char *mode; /* what was done: "extract" or "generate" */
    double evidence;  /* extract: the answer's share of what was likely, 0..1; generate: 0 */
    /* Attended to, of what the answer's tokens but the first saw (1: everything), and the share of
     * full attention that lay there (-1: not measured). */
    double attention_share, attention_recall;
    double first_token_ms, total_ms;
} ibid_answer_event;

/* Runs an answer to its end. on_event is called for every event on the caller's thread, its data valid
 * for the call; it returns false to cancel. Errors: CONTEXT (with both counts), NOTFOUND (a block is
 * gone: search again), MISMATCH, CANCELLED, ... Evicted blocks are encoded again and counted in
 * encoded_tokens, as are those whose KV would come from disk slower than it is encoded. */
ibid_err ibid_attn_answer(ibid_client *c, const ibid_answer_request *q,
                          bool (*on_event)(void *, const ibid_answer_event *), void *arg);

/* Loaded models, threads, kernels, tokens encoded, queue lengths: MessagePack map for `ibid status`. */
ibid_err ibid_attn_status(ibid_client *c, ibid_reply *out);
#endif
