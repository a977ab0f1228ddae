/* What the files of the attention room share. */
#ifndef IBID_ATTENTION_INTERNAL_H
#define IBID_ATTENTION_INTERNAL_H

#include "attention/attention.h"
#include "attention/attention_room.h"
#include "attention/plan/answer.h"
#include "attention/plan/calibration_run.h"
#include "attention/plan/gate_run.h"
#include "attention/plan/prompt.h"
#include "kvstore/kv_value.h"
#include "kvstore/kvstore_client.h"

#include <pthread.h>

/* What a gate found out about each KV type; forced: used although it failed. */
typedef struct ibidi_verdict {
    ibid_gate_score score;
    bool known, forced;
} ibidi_verdict;

typedef struct ibidi_gates {
    ibidi_verdict of[IBID_GATE_TYPES]; /* by ibid_kv_type */
} ibidi_gates;

/* A loaded model. Lives until the room closes. */
typedef struct ibidi_loaded {
    struct ibidi_loaded *next;
    ibid_model *model;
    ibid_engine *engine;
    ibid_sched sched;
    char *name, *path;
    int32_t *prefix_tokens;
    ibid_hash prefix_id;
    ibid_kv_blob prefix_kv;
    ibid_reader reader;
    ibid_load_meter meter;
    pthread_mutex_t lock; /* of what follows */
    bool calibrated;
    ibid_calibration cal; /* dim 0: no retrieval head, or not calibrated */
    ibid_keymap **retired; /* [n_retired] of earlier calibrations, while copies may be in use */
    size_t n_retired;
    ibidi_gates gates;
    uint64_t encoded_tokens, reused_tokens, answers, completion_tokens;
} ibidi_loaded;

struct ibidi_answering; /* one answer under way: attention_answer.c */

typedef struct ibidi_room {
    ibid_host_opts opts;
    ibid_store *store;
    ibid_client *kvstore;
    ibid_streams *streams;
    ibid_server *server;
    pthread_mutex_t lock; /* of models, answering, n_answering */
    pthread_cond_t idle;  /* n_answering fell to 0 */
    ibidi_loaded *models;
    struct ibidi_answering *answering;
    size_t n_answering;
    pthread_mutex_t load_lock; /* one model is opened at a time */
    ibid_kv_type kv_type;      /* for models added from now on */
    atomic_bool closing;       /* gives up what is under way */
} ibidi_room;

/* ---- attention_models.c ---- */
/* The model with this fingerprint, loaded if need be. Errors: NOTFOUND (never added, or its file is
 * gone), MISMATCH (the file is another one now). */
ibid_err ibidi_model_get(ibidi_room *r, const ibid_hash *fingerprint, ibidi_loaded **out);
/* By fingerprint in hex, name, or "" for the default. */
ibid_err ibidi_model_find(ibidi_room *r, ibid_str name, ibidi_loaded **out);
typedef struct ibidi_adding {
    ibid_str path, name, kv_type; /* name, kv_type: empty = as usual */
    bool force;                   /* although the KV type fails its gate */
} ibidi_adding;
ibid_err ibidi_model_add(ibidi_room *r, const ibidi_adding *a, ibidi_loaded **out);
/* Writes the model's record. The caller holds load_lock. */
ibid_err ibidi_model_save(ibidi_room *r, ibidi_loaded *m);
void ibidi_models_close(ibidi_room *r);
/* A copy of the current calibration; its map stays valid while the model is loaded. */
void ibidi_model_calibration(ibidi_loaded *m, ibid_calibration *out);

/* ---- attention_calibrate.c ---- */
enum { IBIDI_CALIBRATION_MAX = 8 * 1024 * 1024 }; /* bytes of a calibration's encoding */
typedef struct ibidi_calibrating {
    ibid_str sample;         /* empty: the installed one */
    ibid_str train, teacher; /* train empty: the program's own head, or head search */
    ibid_buf *report;        /* or NULL */
} ibidi_calibrating;
/* Calibrates a model, saves its record and gives its blocks new token keys. */
ibid_err ibidi_model_calibrate(ibidi_room *r, ibidi_loaded *m, const ibidi_calibrating *c);
/* Whether the program has a trained head for the model that it does not use, having raw ones or
 * those of an earlier program. What a user has trained stays. */
bool ibidi_model_outdated(ibidi_loaded *m);
/* What a teacher is to read before training on this text. */
ibid_err ibidi_model_train_texts(ibidi_loaded *m, ibid_str text, ibid_buf *out);

/* ---- attention_gate.c ---- */
/* Whether a model that is being added may keep KV of this type; measures it if nobody did. Errors:
 * INEXACT. */
ibid_err ibidi_gate_add(ibidi_room *r, ibidi_loaded *m, ibid_kv_type type, bool force);
/* The same before blocks are encoded, for the model's own type; a new verdict is saved. */
ibid_err ibidi_gate_check(ibidi_room *r, ibidi_loaded *m);
ibid_err ibidi_gates_encode(const ibidi_gates *g, ibid_buf *out);
/* What cannot be read is not known, and measured again. */
void ibidi_gates_decode(ibid_str data, ibidi_gates *out);
/* The method attention.kv_gate. */
ibid_err ibidi_kv_gate(void *room, const ibid_call *call);

/* ---- attention_encode.c ---- */
ibid_err ibidi_encode(ibidi_room *r, ibidi_loaded *m, uint64_t job, const ibid_encode_block *blocks,
                      size_t n, const ibid_call *call, uint64_t *numbers, ibid_encode_result *out);
/* Gives every block of the model token keys of its current calibration. *n: blocks done. */
ibid_err ibidi_rekey(ibidi_room *r, ibidi_loaded *m, uint64_t *n);

/* ---- attention_answer.c ---- */
ibid_err ibidi_answer_begin(ibidi_room *r, const ibid_call *call);
/* Cancels the answer of a stream at once, also within a step; after it if others share the step. */
void ibidi_answer_cancel(ibidi_room *r, uint64_t stream);
/* Cancels all and waits for their threads. */
void ibidi_answers_stop(ibidi_room *r);

/* ---- attention_load.c ---- */
typedef struct ibidi_stored { /* KV of one block in the store */
    ibid_kv_view *layers;     /* [n_layers] the caller's; readable after ibidi_load_layer */
    ibid_kv_place *places;    /* [n_layers] */
    uint64_t missing;         /* bytes not in memory when they were looked for */
    bool here;                /* the store has it, and it is to be used */
    bool damaged;             /* a value was found to be */
} ibidi_stored;
/* Fills places, layers and missing without reading a value. Errors: NOTFOUND (evicted), CORRUPT. */
ibid_err ibidi_stored_find(ibid_snap *snap, uint64_t block, const ibid_kv_shape *shape,
                           size_t n_layers, ibidi_stored *s);
void ibidi_stored_drop(ibidi_stored *s);
/* Whether encoding the block's tokens again is faster than reading it. Measures the disk on it if
 * nobody did lately, for no longer than encoding it would take; *from_disk grows by what that read.
 */
bool ibidi_stored_loses(ibid_load_meter *m, ibidi_stored *s, size_t n_layers, size_t n_tokens,
                        uint64_t *from_disk);

typedef struct ibidi_loading { /* the caller sets store to n_layers */
    ibid_store *store;
    ibid_load_meter *meter;
    ibidi_stored **blocks; /* [n] */
    size_t n, n_layers;
    size_t asked, checked, ahead; /* layers */
    uint64_t missing, begun_ns;
    uint64_t waited_ns; /* for values and their checksums */
} ibidi_loading;
/* Asks for the first layers of all blocks. */
void ibidi_load_begin(ibidi_loading *l);
/* Asks for more, and returns when the layer's values are there and checked. Layers come in order;
 * any of them again at no cost. Errors: CORRUPT (the blocks are marked). */
ibid_err ibidi_load_layer(ibidi_loading *l, size_t layer);

/* ---- small things ---- */
bool ibidi_get_hash(const ibid_val *map, const char *key, ibid_hash *out);
ibid_str ibidi_get_str(const ibid_val *map, const char *key); /* {"", 0} if absent */
#endif
