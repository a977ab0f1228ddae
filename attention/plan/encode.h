/* Text into KV: encodes blocks behind a model's prefix, and packs what comes out as it is stored.
 * Knows no store and no messages. */
#ifndef IBID_ATTENTION_ENCODE_H
#define IBID_ATTENTION_ENCODE_H

#include "attention/engine.h"
#include "attention/plan/calibration.h"
#include "attention/plan/load.h"
#include "attention/plan/scheduler.h"

enum { IBID_ENCODE_STEP = 512 }; /* tokens of a micro-batch: what a question may have to wait for */

/* KV of some tokens at every layer, as sealed values of the store (kvstore/kv_value.h). */
typedef struct ibid_kv_blob {
    unsigned char *memory;
    const void **values;  /* [n_layers] */
    ibid_kv_view *layers; /* [n_layers] into the values */
    size_t n_layers, value_size;
} ibid_kv_blob;

ibid_err ibid_kv_blob_export(const ibid_model *m, const ibid_seq *s, size_t row0, size_t n,
                             uint64_t shift, ibid_kv_type type, ibid_kv_blob *out);
/* A copy of views that lie elsewhere (all of one shape). */
ibid_err ibid_kv_blob_copy(const ibid_kv_view *layers, size_t n_layers, ibid_kv_blob *out);
void ibid_kv_blob_fini(ibid_kv_blob *b);
/* Bytes of K, V and scales in a view. */
uint64_t ibid_kv_view_bytes(const ibid_kv_view *v);

/* A model ready to read: everything is encoded behind its prefix. */
typedef struct ibid_reader {
    const ibid_model *model;
    ibid_engine *engine;
    ibid_sched *sched;
    ibid_kv_type kv_type;
    ibid_segment prefix; /* local0 0, offset 0 */
    size_t n_prefix;
    ibid_load_meter *meter; /* told how fast texts are encoded; NULL: nobody wants to know */
    bool urgent; /* take turns as a question: the caller is between question_begin and _end */
} ibid_reader;

/* The prefix's own KV: a causal pass over its tokens. */
ibid_err ibid_read_prefix(const ibid_model *m, ibid_engine *e, ibid_sched *sched,
                          const int32_t *tokens, size_t n, ibid_kv_type type, ibid_kv_blob *out);

typedef struct ibid_reading { /* one text; the caller sets tokens and n, and frees kv and keys */
    const int32_t *tokens;
    size_t n;
    ibid_kv_blob kv;
    int8_t *keys; /* [n, dim] with ibid_free, or NULL */
} ibid_reading;

/* Encodes texts in micro-batches of about IBID_ENCODE_STEP tokens, *done of them so far, so that a
 * caller may store what is there before it goes on: call again until *done == n. want_kv: fill kv.
 * cal with a map: fill keys. Errors: INVAL (unknown token), CONTEXT, NOMEM, CANCELLED. */
ibid_err ibid_read_some(const ibid_reader *r, ibid_reading *t, size_t n, size_t *done, bool want_kv,
                        const ibid_calibration *cal, const atomic_bool *cancel);
/* Keys of a question: [n, dim] int8 into out. */
ibid_err ibid_read_question(const ibid_reader *r, const int32_t *tokens, size_t n,
                            const ibid_calibration *cal, int8_t *out);
/* Token keys of a block from its stored K. layers [n_layers of the model], those of the map's
 * inputs filled. cal has a map. out [n_tokens, dim] */
ibid_err ibid_keys_from_stored(const ibid_reader *r, const ibid_kv_view *layers,
                               const ibid_calibration *cal, int8_t *out);

/* Opens sequences behind the prefix for n texts and runs them in one forward pass of n_layers
 * layers (0: all). seqs [n]: the caller closes them. */
ibid_err ibidi_read_batch(const ibid_reader *r, const ibid_reading *t, size_t n, size_t n_layers,
                          const atomic_bool *cancel, ibid_seq **seqs);
#endif
