/* The calls of indexer.h as messages. */
#include "indexer/indexer.h"

#include <stdio.h>
#include <string.h>

enum { REQUEST_MAX = 4 * 1024 * 1024, SUBMIT_MS = 120000 };

ibid_err ibid_idx_submit(ibid_client *c, const ibid_index_request *q, uint64_t *job) {
    ibid_enc e;
    ibid_reply r;
    ibid_request_begin(&e, REQUEST_MAX);
    ibid_enc_str(&e, "collection", q->collection.s, q->collection.n);
    if (q->model.n) ibid_enc_str(&e, "model", q->model.s, q->model.n);
    ibid_enc_array(&e, "paths");
    for (size_t i = 0; i < q->n_paths; i++) ibid_enc_str(&e, NULL, q->paths[i].s, q->paths[i].n);
    ibid_enc_end(&e);
    ibid_enc_bool(&e, "prune", q->prune);
    ibid_enc_bool(&e, "force", q->force);
    ibid_enc_bool(&e, "dry_run", q->dry_run);
    ibid_err err = ibid_request_finish(c, "indexer.submit", &e, SUBMIT_MS, &r);
    if (err) return err;
    *job = ibid_get_u64(r.body, "job", 0);
    ibid_reply_close(&r);
    return IBID_OK;
}

static ibid_err steer(ibid_client *c, const char *method, uint64_t job, uint64_t *n) {
    ibid_enc e;
    ibid_reply r;
    ibid_request_begin(&e, REQUEST_MAX);
    ibid_enc_u64(&e, "job", job);
    ibid_err err = ibid_request_finish(c, method, &e, 0, &r);
    if (err) return err;
    if (n) *n = ibid_get_u64(r.body, "n", 0);
    ibid_reply_close(&r);
    return IBID_OK;
}

ibid_err ibid_idx_resume(ibid_client *c, uint64_t job, uint64_t *n) {
    return steer(c, "indexer.resume", job, n);
}
ibid_err ibid_idx_pause(ibid_client *c, uint64_t job) {
    return steer(c, "indexer.pause", job, NULL);
}
ibid_err ibid_idx_cancel(ibid_client *c, uint64_t job) {
    return steer(c, "indexer.cancel", job, NULL);
}

static ibid_str text_of(const ibid_val *map, const char *key) {
    const char *s;
    size_t n;
    return ibid_get_str(map, key, &s, &n) ? (ibid_str){s, n} : (ibid_str){"", 0};
}

static void read_counts(const ibid_val *b, ibid_job_status *o) {
#define U64(name) o->name = ibid_get_u64(b, #name, 0)
    U64(id), U64(files_total), U64(files_done), U64(documents), U64(tokens_total);
    U64(tokens_done), U64(encoded_tokens), U64(reused_tokens), U64(kv_bytes), U64(ready);
    U64(partial), U64(empty), U64(unsupported), U64(failed), U64(unchanged), U64(removed);
    U64(forecast_tokens), U64(forecast_bytes), U64(free_bytes), U64(next);
#undef U64
    o->tokens_per_s = ibid_get_f64(b, "tokens_per_s", 0);
    o->seconds_left = ibid_get_f64(b, "seconds_left", -1);
    o->forecast_s = ibid_get_f64(b, "forecast_s", -1);
}

static ibid_err read_status(ibid_job_status *o) {
    const ibid_val *b = o->reply.body, *files = ibid_val_get(b, "files");
    char code[64];
    ibid_str c = text_of(b, "code");
    o->state = text_of(b, "state");
    o->stage = text_of(b, "stage");
    o->collection = text_of(b, "collection");
    o->error_text = text_of(b, "error_text");
    (void)snprintf(code, sizeof code, "%.*s", (int)(c.n < sizeof code ? c.n : 0), c.s);
    o->error = c.n ? ibid_err_from_code(code) : IBID_OK;
    read_counts(b, o);
    size_t n = ibid_val_count(files);
    o->storage = ibid_calloc(n, sizeof *o->storage);
    if (!o->storage) return ibid_fail(IBID_NOMEM, "out of memory for a job's results");
    for (size_t i = 0; i < n; i++) {
        const ibid_val *f = ibid_val_at(files, i);
        o->storage[i] = (ibid_file_result){.path = text_of(f, "path"),
                                           .id = text_of(f, "id"),
                                           .state = text_of(f, "state"),
                                           .reason = text_of(f, "reason"),
                                           .chunks = ibid_get_u64(f, "chunks", 0),
                                           .encoded_tokens = ibid_get_u64(f, "encoded_tokens", 0),
                                           .reused_tokens = ibid_get_u64(f, "reused_tokens", 0)};
    }
    o->files = o->storage;
    o->n_files = n;
    return IBID_OK;
}

ibid_err ibid_idx_status(ibid_client *c, uint64_t job, uint64_t from, uint64_t wait_ms,
                         ibid_job_status *out) {
    ibid_enc e;
    memset(out, 0, sizeof *out);
    ibid_request_begin(&e, REQUEST_MAX);
    ibid_enc_u64(&e, "job", job);
    ibid_enc_u64(&e, "from", from);
    ibid_enc_u64(&e, "wait_ms", wait_ms);
    ibid_err err = ibid_request_finish(c, "indexer.status", &e, 0, &out->reply);
    if (err) return err;
    err = read_status(out);
    if (err) ibid_job_status_close(out);
    return err;
}

void ibid_job_status_close(ibid_job_status *s) {
    ibid_free(s->storage);
    ibid_reply_close(&s->reply);
    memset(s, 0, sizeof *s);
}

ibid_err ibid_idx_remove(ibid_client *c, ibid_str collection, ibid_str id) {
    ibid_enc e;
    ibid_request_begin(&e, REQUEST_MAX);
    ibid_enc_str(&e, "collection", collection.s, collection.n);
    ibid_enc_str(&e, "id", id.s, id.n);
    return ibid_request_finish(c, "indexer.remove", &e, 0, NULL);
}

/* Follows a cache job to its end; fails unless its one file can be read. */
static ibid_err wait_cached(ibid_client *c, uint64_t job) {
    for (;;) {
        ibid_job_status s;
        ibid_err e = ibid_idx_status(c, job, 0, 5000, &s);
        if (e) return e;
        bool over = !(s.state.n == 6 && memcmp(s.state.s, "queued", 6) == 0) &&
                    !(s.state.n == 7 && memcmp(s.state.s, "running", 7) == 0);
        if (over && s.error)
            e = ibid_fail(s.error, "%.*s", (int)s.error_text.n, s.error_text.s);
        else if (over && !(s.state.n == 4 && memcmp(s.state.s, "done", 4) == 0))
            e = ibid_fail(IBID_CANCELLED, "reading the file was stopped");
        else if (over && s.empty)
            e = ibid_fail(IBID_EMPTY, "there is no text in the file");
        else if (over && (s.unsupported || s.failed) && s.n_files)
            e = ibid_fail(s.failed ? IBID_IO : IBID_NOTSUP, "%.*s", (int)s.files[0].reason.n,
                          s.files[0].reason.s);
        ibid_job_status_close(&s);
        if (over || e) return e;
    }
}

ibid_err ibid_idx_cache_file(ibid_client *c, ibid_str model, ibid_str path, char *id,
                             size_t id_room) {
    ibid_enc e;
    ibid_reply r;
    ibid_request_begin(&e, REQUEST_MAX);
    if (model.n) ibid_enc_str(&e, "model", model.s, model.n);
    ibid_enc_str(&e, "path", path.s, path.n);
    ibid_err err = ibid_request_finish(c, "indexer.cache_file", &e, SUBMIT_MS, &r);
    if (err) return err;
    ibid_str got = text_of(r.body, "id");
    uint64_t job = ibid_get_u64(r.body, "job", 0);
    if (got.n >= id_room)
        err = ibid_fail(IBID_INVAL, "the file's path is too long");
    else
        (void)snprintf(id, id_room, "%.*s", (int)got.n, got.s);
    ibid_reply_close(&r);
    return err ? err : wait_cached(c, job);
}
