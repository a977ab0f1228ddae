/* What `calibrate` finds out about a model: its retrieval heads, how to turn their keys into token
 * keys, and where relevance starts. Its own encoding is stored in the model record; its id stands
 * with every token key. Own small library (ibid_calibration): the retriever reads it too. */
#ifndef IBID_ATTENTION_CALIBRATION_H
#define IBID_ATTENTION_CALIBRATION_H

#include "rpc/base/err.h"
#include "rpc/base/hash.h"
#include "rpc/base/mem.h"

#include <stdint.h>

enum { IBID_HEADS_MAX = 8, IBID_HEAD_DIM_MAX = 256 };

typedef struct ibid_head {
    uint32_t layer, kv_head;
} ibid_head;

typedef struct ibid_calibration {
    ibid_hash id; /* of the encoding below; all zero: no retrieval head (lexical search only) */
    uint32_t n_heads, head_dim; /* token key dimension = n_heads * head_dim */
    ibid_head heads[IBID_HEADS_MAX];
    /* Subtracted from the raw key of each head, of questions as of documents, before that head's
     * 1/norm. [n_heads * head_dim] */
    float mean[IBID_HEADS_MAX * IBID_HEAD_DIM_MAX];
    /* MaxSim scores (0..1) of the best wrong chunk for a pseudo-question, over the sample: */
    float null_mean, null_sd;
    float relevant;        /* a best hit scoring below this is "not in the documents" */
    float find;            /* a span scoring below this is no semantic match */
    float recall1, margin; /* of the chosen heads on the sample, for the report */
} ibid_calibration;

/* Raw keys of n tokens, [n, n_heads * head_dim] f32 heads side by side, to token keys: centred,
 * each head's part normalised to 1/sqrt(n_heads), int8 round(127 * x). */
void ibid_token_keys(const ibid_calibration *c, const float *raw, size_t n, int8_t *out);

/* MessagePack encoding; sets c->id from it. Errors of open: CORRUPT, NOTSUP (newer version). */
ibid_err ibid_calibration_encode(ibid_calibration *c, ibid_buf *out);
ibid_err ibid_calibration_decode(const void *data, size_t n, ibid_calibration *out);
#endif
