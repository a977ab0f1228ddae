/* The indexer room, as other rooms see it: durable jobs that turn files into documents.
 * These calls send messages to ibid-indexer (room "indexer"); handlers: indexer_service.c. */
#ifndef IBID_INDEXER_H
#define IBID_INDEXER_H

#include "kvstore/kvstore.h"
#include "rpc/bus/bus.h"

typedef struct ibid_index_request {
    ibid_str collection;   /* created on first use, bound to the model */
    ibid_str model;        /* name or fingerprint; "" = the collection's, or the default one */
    const ibid_str *paths; /* absolute: files or folders */
    size_t n_paths;
    bool prune;   /* remove documents under these paths whose file is gone */
    bool force;   /* go on although the forecast exceeds the budget (evicts), never the disk */
    bool dry_run; /* forecast only */
} ibid_index_request;

/* Starts a job; it is durable when this returns. */
ibid_err ibid_idx_submit(ibid_client *c, const ibid_index_request *q, uint64_t *job);
/* Puts a paused or interrupted job back to work; job 0 = every one. *n = how many. */
ibid_err ibid_idx_resume(ibid_client *c, uint64_t job, uint64_t *n);
/* Stops after the current batch; what is committed stays. A paused job can be resumed. */
ibid_err ibid_idx_pause(ibid_client *c, uint64_t job);
ibid_err ibid_idx_cancel(ibid_client *c, uint64_t job);

typedef struct ibid_file_result {
    ibid_str path, id, state, reason; /* state: ibid_doc_state_name, or "unchanged", "removed" */
    uint64_t chunks, encoded_tokens, reused_tokens;
} ibid_file_result;

typedef struct ibid_job_status {
    uint64_t id;
    ibid_str state, stage, collection, error_text;
    ibid_err error;
    uint64_t files_total, files_done, documents, tokens_total, tokens_done;
    uint64_t encoded_tokens, reused_tokens, kv_bytes;
    uint64_t ready, partial, empty, unsupported, failed, unchanged, removed;
    double tokens_per_s, seconds_left; /* seconds_left < 0: not known yet */
    uint64_t forecast_tokens, forecast_bytes, free_bytes;
    double forecast_s;
    const ibid_file_result *files; /* results from number `from` on, in the order they ended */
    size_t n_files;
    uint64_t next; /* pass as `from` to get the ones after these */
    ibid_reply reply;
    ibid_file_result *storage;
} ibid_job_status;

/* Waits up to wait_ms for news after `from` (0 = answer at once). */
ibid_err ibid_idx_status(ibid_client *c, uint64_t job, uint64_t from, uint64_t wait_ms,
                         ibid_job_status *out);
void ibid_job_status_close(ibid_job_status *s);

/* Removes a document from a collection. NOTFOUND. */
ibid_err ibid_idx_remove(ibid_client *c, ibid_str collection, ibid_str id);
/* Makes sure one file is readable by `find`: indexes it into the hidden collection ".find" unless
 * its content is there, within that cache's quota (oldest go first). Returns its document id there.
 */
ibid_err ibid_idx_cache_file(ibid_client *c, ibid_str model, ibid_str path, char *id,
                             size_t id_room);
#endif
