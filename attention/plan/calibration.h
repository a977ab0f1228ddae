/* What `calibrate` finds out about a model: how its keys become token keys (head.h), the heads
 * whose attention shows where an answer came from, and where relevance starts. Its own encoding is
 * stored in the model record; its id stands with every token key. Own small library
 * (ibid_calibration): the retriever reads it too. */
#ifndef IBID_ATTENTION_CALIBRATION_H
#define IBID_ATTENTION_CALIBRATION_H

#include "attention/plan/head.h"
#include "rpc/base/err.h"
#include "rpc/base/hash.h"
#include "rpc/base/mem.h"

#include <stdint.h>

enum { IBID_HEADS_MAX = 8, IBID_NOTE_MAX = 1000 };
#define IBID_KEYS_WEIGHT 0.6f /* of raw keys, fused with words */

typedef struct ibid_calibration {
    /* Of what makes token keys: the map, not the numbers. All zero: no retrieval head (lexical
     * search only). */
    ibid_hash id;
    uint32_t n_heads, head_dim;
    ibid_head heads[IBID_HEADS_MAX]; /* whose raw keys find text best, best first */
    uint32_t dim;                    /* of a token key; 0: no retrieval head */
    /* MaxSim scores (0..1) of the best wrong chunk for a pseudo-question, over the sample: */
    float null_mean, null_sd;
    float relevant;               /* a best hit scoring below this is "not in the documents" */
    float find;                   /* a span scoring below this is no semantic match */
    float recall1, margin;        /* on the sample, for the report */
    float keys_weight;            /* of the keys when they are fused with words, 0..1 */
    bool old;                     /* of version 1, and encoded so: its id is of that encoding */
    bool has_model;               /* model is set */
    ibid_hash model;              /* fingerprint; of heads that come with the program */
    char note[IBID_NOTE_MAX + 1]; /* how the head was made, for a person */
    ibid_keymap
        *map; /* NULL: no retrieval head, or decoded in brief. Borrowed by copies of this
               * struct; whoever decoded or calibrated ends it with ibid_calibration_fini. */
} ibid_calibration;

/* MessagePack encoding (docs/format.md); sets c->id and c->dim from c->map. Errors: INVAL. */
ibid_err ibid_calibration_encode(ibid_calibration *c, ibid_buf *out);
/* Errors: CORRUPT, NOTSUP (newer version), NOMEM. On error *out is untouched. */
ibid_err ibid_calibration_decode(const void *data, size_t n, ibid_calibration *out);
/* All but the map, for who needs no keys made; id as stored beside the encoding. Nothing to free.
 */
ibid_err ibid_calibration_decode_brief(const void *data, size_t n, const ibid_hash *id,
                                       ibid_calibration *out);
void ibid_calibration_fini(ibid_calibration *c);
#endif
