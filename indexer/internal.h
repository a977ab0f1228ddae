/* What the files of the indexer room share: a job as it runs, and the room. */
#ifndef IBID_INDEXER_INTERNAL_H
#define IBID_INDEXER_INTERNAL_H

#include "attention/attention.h"
#include "indexer/extract/child.h"
#include "indexer/indexer.h"
#include "indexer/walk.h"
#include "kvstore/kvstore_client.h"
#include "retriever/retriever.h"
#include "rpc/bus/host.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct ibidi_ix_result {
    char *path, *id, *reason;
    const char *state; /* static */
    uint64_t chunks, encoded, reused;
} ibidi_ix_result;

/* Every number a job reports; written to its row and sent to who asks. X(name) */
#define IBIDI_JOB_COUNTS(X)                                                                        \
    X(files_total)                                                                                 \
    X(files_done)                                                                                  \
    X(documents)                                                                                   \
    X(tokens_total)                                                                                \
    X(tokens_done)                                                                                 \
    X(encoded_tokens)                                                                              \
    X(reused_tokens)                                                                               \
    X(kv_bytes)                                                                                    \
    X(ready)                                                                                       \
    X(partial)                                                                                     \
    X(empty)                                                                                       \
    X(unsupported)                                                                                 \
    X(failed)                                                                                      \
    X(unchanged)                                                                                   \
    X(removed)                                                                                     \
    X(forecast_tokens)                                                                             \
    X(forecast_bytes)                                                                              \
    X(free_bytes)

typedef struct ibidi_ix_counts {
#define X(name) uint64_t name;
    IBIDI_JOB_COUNTS(X)
#undef X
    double tokens_per_s, seconds_left, forecast_s;
} ibidi_ix_counts;

typedef enum ibidi_ix_want {
    IBIDI_WANT_RUN,
    IBIDI_WANT_PAUSE,
    IBIDI_WANT_CANCEL,
    IBIDI_WANT_STOP
} ibidi_ix_want;

typedef struct ibidi_ix_job {
    uint64_t id, created_ms;
    const char *state, *stage; /* static */
    char collection[65];
    ibid_hash model;
    char **paths;
    size_t n_paths;
    bool prune, force, dry_run;
    bool cache; /* fills the ".find" cache */
    ibid_err error;
    char error_text[512];
    ibidi_ix_counts counts;
    ibidi_ix_result *results;
    size_t n_results, results_room;
    struct ibidi_ix_job *next; /* in the room's list */
    bool live;                 /* queued or running here; else a record read back */
} ibidi_ix_job;

/* ---- Records (job_record.c): a job to and from its row in the store ---- */
void ibidi_ix_job_free(ibidi_ix_job *j);
ibid_err ibidi_ix_job_encode(const ibidi_ix_job *j, ibid_enc *spec, ibid_enc *report);
ibid_err ibidi_ix_job_decode(const ibid_job *row, ibidi_ix_job **out);
/* Counts and results from..from+max into an open map; *next = the first result not written. */
void ibidi_ix_report_put(ibid_enc *e, const ibidi_ix_job *j, size_t from, size_t max,
                         uint64_t *next);
ibid_err ibidi_ix_result_add(ibidi_ix_job *j, ibid_str path, ibid_str id, const char *state,
                             ibid_str reason, uint64_t chunks, uint64_t encoded, uint64_t reused);

/* ---- The room ---- */
typedef struct ibidi_ix_room {
    char data_dir[IBID_HOST_PATH_MAX], store_dir[IBID_HOST_PATH_MAX], program[IBID_HOST_PATH_MAX];
    ibid_client *kv, *attn, *ret;
    ibid_server *server;
    ibid_store *store; /* opened when first needed: the writer creates it */
    uint64_t cache_quota;
    uint64_t retry_ms; /* how long a job waits for a room that is away */
    pthread_t worker;
    bool worker_runs;
    pthread_mutex_t
        mutex; /* guards what follows, and every live job's fields but the worker's own */
    pthread_cond_t work, news;
    ibidi_ix_job *recent; /* the last few that ended, newest first, with all their results */
    ibidi_ix_job *jobs;   /* live ones: the first is the one that runs or runs next */
    uint64_t running;     /* id; 0 = none */
    ibidi_ix_want want;   /* what the running job is to do */
    bool closing;
    double tokens_per_s;    /* of the last encoding measured; 0 = none yet */
    atomic_bool stop_child; /* mirrors want: an extractor is given up */
} ibidi_ix_room;

ibid_err ibidi_ix_room_store(ibidi_ix_room *r, ibid_store **out);
/* Hands a job to the worker; the room owns it from then on. Called with the mutex held. */
void ibidi_ix_room_enqueue(ibidi_ix_room *r, ibidi_ix_job *j);
/* Forgets a recent job whose row is to change. Called with the mutex held. */
void ibidi_ix_room_forget(ibidi_ix_room *r, uint64_t id);
ibid_err ibidi_ix_job_save(ibidi_ix_room *r,
                           ibidi_ix_job *j); /* writes its row; a new job gets its id */
void *ibidi_ix_worker(void *room);

/* ---- One job at work (job.c), and one file of it (document.c) ---- */
typedef struct ibidi_ix_seen { /* a set of document ids, by hash */
    uint64_t *slots;
    size_t n, room;
} ibidi_ix_seen;
bool ibidi_ix_seen_has(const ibidi_ix_seen *s, ibid_str id);
ibid_err ibidi_ix_seen_add(ibidi_ix_seen *s, ibid_str id);

typedef struct ibidi_ix_work {
    ibidi_ix_room *room;
    ibidi_ix_job *job;
    bool measure; /* first pass: count what there is to do, change nothing */
    ibid_store *store;
    ibid_model_info model;
    ibid_model_record record; /* prefix and kv_type only; strings are not kept */
    ibidi_ix_seen seen;
    bool keep_all; /* some file or folder could not be read: nothing may be pruned */
    uint64_t generation, saved_ns;
    double encode_ms;
} ibidi_ix_work;

/* Reads one file and counts (measure) or encodes and commits its documents. Bad files are results,
 * not errors; an error ends the job. */
ibid_err ibidi_ix_file(ibidi_ix_work *w, const ibid_walk_file *f);
/* CANCELLED when the job is to pause, end or stop. */
ibid_err ibidi_ix_check(ibidi_ix_work *w);
/* True when a call that failed with *e is to be made again (the other room is away or busy): it has
 * waited a little. start: 0 before the first call. */
bool ibidi_ix_again(ibidi_ix_work *w, ibid_err *e, uint64_t *start);
/* Adds a result (second pass) and wakes who waits for news. */
ibid_err ibidi_ix_report(ibidi_ix_work *w, ibid_str path, ibid_str id, const char *state,
                         ibid_str reason, uint64_t chunks, uint64_t encoded, uint64_t reused);
void ibidi_ix_progress(ibidi_ix_work *w, bool now); /* saves the row when a second passed, or now */
/* Bytes of KV and keys a block of n tokens takes on disk, about. */
uint64_t ibidi_ix_block_bytes(const ibid_model_info *m, size_t n_tokens);

static inline ibid_str ibidi_ix_istr(const char *s) {
    return (ibid_str){s, __builtin_strlen(s)};
}
static inline bool ibidi_ix_str_is(ibid_str a, ibid_str b) {
    return a.n == b.n && (a.n == 0 || __builtin_memcmp(a.s, b.s, a.n) == 0);
}
#endif
