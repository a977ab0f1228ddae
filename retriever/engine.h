/* The retriever without the bus: collections, search, find, upkeep. The service adds messages;
 * tests call this directly. All calls but open and close may come from several threads at once. */
#ifndef IBID_RETRIEVER_ENGINE_H
#define IBID_RETRIEVER_ENGINE_H

#include "attention/attention.h"
#include "attention/plan/calibration.h"
#include "retriever/collection.h"
#include "retriever/retriever.h"

/* What the retriever asks of the attention room. Either may fail: search then goes on with words.
 */
typedef struct ibidi_retriever_hooks {
    void *arg;
    ibid_err (*question_keys)(void *arg, const ibid_hash *model, ibid_str question,
                              ibid_question_keys *out);
    ibid_err (*tokenize)(void *arg, const ibid_hash *model, ibid_str text, ibid_tokens *out);
    /* NULL: find ranks without it. */
    ibid_err (*likelihoods)(void *arg, const ibid_hash *model, ibid_str prompt,
                            const ibid_str *texts, size_t n, double *out);
} ibidi_retriever_hooks;

typedef struct ibidi_retriever_opts {
    const char *data_dir; /* store in DIR/store, derived files in DIR/index */
    uint64_t map_size;
    size_t threads;      /* 0 = cores */
    const char *kernels; /* "" or NULL = best */
    /* Token keys up to which a collection is scanned whole; 0 = 2M. Above, candidates come from the
     * key index's cells and the lexical index. */
    uint64_t exact_tokens;
    ibidi_keyindex_opts keys;
    uint64_t quiet_ms; /* without a change before key index files are written; 0 = 3 s */
    ibidi_retriever_hooks hooks;
} ibidi_retriever_opts;

typedef struct ibidi_retriever ibidi_retriever;

/* The store need not exist yet: calls answer UNAVAIL until it does. */
ibid_err ibidi_retriever_open(const ibidi_retriever_opts *o, ibidi_retriever **out);
void ibidi_retriever_close(ibidi_retriever *r);

typedef struct ibidi_found { /* strings lie in the arena */
    ibid_arena *arena;
    ibid_hit *hits;
    size_t n;
    bool relevant;
    double relevance, coverage;
    const char *degraded; /* why only words were searched, or NULL */
    double keys_ms, lexical_ms, total_ms;
    uint64_t generation;
} ibidi_found;
ibid_err ibidi_retriever_search(ibidi_retriever *r, const ibid_search_request *q, ibidi_found *out);
void ibidi_found_close(ibidi_found *f);

typedef struct ibidi_matches {
    ibid_arena *arena;
    ibid_match *matches;
    size_t n;
    bool more;            /* the list ends at max_matches */
    const char *degraded; /* why there are exact matches only, or NULL */
    double total_ms, coverage, threshold;
    const ibid_find_candidate *candidates; /* if asked for, best first */
    size_t n_candidates;
} ibidi_matches;
ibid_err ibidi_retriever_find(ibidi_retriever *r, const ibid_find_request *q, ibidi_matches *out);
void ibidi_matches_close(ibidi_matches *m);

void ibidi_retriever_notify(ibidi_retriever *r);
ibid_err ibidi_retriever_reindex(ibidi_retriever *r, ibid_str collection);
ibid_err ibidi_retriever_verify(ibidi_retriever *r, ibid_buf *faults, uint64_t *n_faults);
/* Adds fields to an open map. */
ibid_err ibidi_retriever_status(ibidi_retriever *r, ibid_enc *e);
/* Brings every collection forward and writes key index files now (tests; the background does it).
 */
ibid_err ibidi_retriever_settle(ibidi_retriever *r);

/* ---- Shared by the files of the engine ---- */
typedef struct ibidi_slot {
    ibidi_collection *c;
    size_t refs;
} ibidi_slot;
struct ibidi_retriever {
    ibidi_retriever_opts o;
    char data_dir[4096], index_dir[4112];
    const ibid_kernels *kernels;
    ibid_pool *pool;
    pthread_mutex_t pool_mu; /* one run at a time */
    pthread_mutex_t mu;      /* the fields below */
    pthread_cond_t wake;
    ibid_store *store;
    ibidi_slot *slots; /* open collections */
    size_t n_slots, room_slots;
    pthread_t keeper;
    bool keeping, stop, notified;
    struct ibidi_candidate_cache *candidates; /* candidates.h: of documents searched lately */
};

/* A snapshot of the store, opened when it appears. UNAVAIL while there is none. */
ibid_err ibidi_engine_snap(ibidi_retriever *r, ibid_snap **out);
/* A counted reference to the derived state of a stored collection. */
ibid_err ibidi_engine_acquire(ibidi_retriever *r, const ibid_collection *c, ibidi_collection **out);
void ibidi_engine_release(ibidi_retriever *r, ibidi_collection *c);
/* Takes the read lock with c at the snapshot's generation, catching up first. The snapshot may move
 * forward. On failure the lock is not held. */
ibid_err ibidi_engine_current(ibidi_retriever *r, ibidi_collection *c, ibid_snap *snap);
/* After CORRUPT from the lexical index under the read lock: gives up the lock, builds the index
 * again, takes the lock again, whatever came of it. */
ibid_err ibidi_engine_repair(ibidi_retriever *r, ibidi_collection *c, ibid_snap *snap);
/* Scores blocks of a collection, on the pool when there are enough to gain from it. */
ibid_err ibidi_engine_score(ibidi_retriever *r, const ibidi_collection *c, ibid_snap *snap,
                            const ibidi_asking *q, const uint64_t *blocks, size_t n, float *scores,
                            size_t *scored);
/* The candidates of a collection's key index (ibidi_keyindex_candidates), likewise. */
ibid_err ibidi_engine_candidates(ibidi_retriever *r, const ibidi_collection *c,
                                 const ibidi_asking *q, size_t probes, uint64_t *blocks, size_t max,
                                 size_t *n, bool *all);
bool ibidi_engine_scans(const ibidi_retriever *r, const ibidi_collection *c);
/* Calibration of a collection's model, in brief (no map); false when it has none that can be used.
 */
bool ibidi_engine_calibration(ibid_snap *snap, const ibid_hash *model, ibid_calibration *out);
/* The key index of a collection: opened, or built aside and swapped in when it is worth it. */
ibid_err ibidi_engine_keys(ibidi_retriever *r, ibidi_collection *c);
ibid_err ibidi_engine_keeper_start(ibidi_retriever *r);
void ibidi_engine_keeper_stop(ibidi_retriever *r);

/* A question's keys with their weights; free with ibidi_asked_fini. */
typedef struct ibidi_question {
    ibid_question_keys keys;
    double *weights;
    ibidi_asking asking;
    bool usable;
    const char *why; /* not usable: in words */
} ibidi_question;
void ibidi_question_get(ibidi_retriever *r, const ibid_hash *model, ibid_str text,
                        ibidi_question *out);
/* Weights by the view; needs the collection's lock. */
ibid_err ibidi_question_weigh(ibidi_question *q, const ibidi_view *v);
void ibidi_question_fini(ibidi_question *q);
#endif
