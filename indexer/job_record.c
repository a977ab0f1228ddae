/* Jobs as MessagePack: the spec (what was asked) and the report (what came of it). */
#include "indexer/internal.h"

#include <string.h>

/* Results kept in a row. Of more, only those that need a person's eye. */
enum { RESULTS_KEPT = 2000, ROW_MAX = 8 * 1024 * 1024 };

static const char *const states[] = {"queued", "running", "paused", "done", "cancelled", "failed"};
static const char *const stages[] = {"", "scan", "extract", "forecast", "encode", "commit"};
static const char *const results[] = {"ready",  "partial",   "empty",  "unsupported",
                                      "failed", "unchanged", "removed"};

/* The static name equal to s, or the first one. */
static const char *known(const char *const *names, size_t n, ibid_str s) {
    for (size_t i = 0; i < n; i++)
        if (ibidi_ix_str_is(ibidi_ix_istr(names[i]), s)) return names[i];
    return names[0];
}
#define KNOWN(names, s) known(names, sizeof names / sizeof *names, s)

void ibidi_ix_job_free(ibidi_ix_job *j) {
    if (!j) return;
    for (size_t i = 0; i < j->n_paths; i++) ibid_free(j->paths[i]);
    ibid_free(j->paths);
    for (size_t i = 0; i < j->n_results; i++) {
        ibid_free(j->results[i].path);
        ibid_free(j->results[i].id);
        ibid_free(j->results[i].reason);
    }
    ibid_free(j->results);
    ibid_free(j);
}

ibid_err ibidi_ix_result_add(ibidi_ix_job *j, ibid_str path, ibid_str id, const char *state,
                             ibid_str reason, uint64_t chunks, uint64_t encoded, uint64_t reused) {
    if (j->n_results == j->results_room) {
        size_t room = j->results_room ? j->results_room * 2 : 64;
        ibidi_ix_result *grown = ibid_realloc(j->results, room * sizeof *grown);
        if (!grown) return ibid_fail(IBID_NOMEM, "out of memory for a job's results");
        j->results = grown;
        j->results_room = room;
    }
    ibidi_ix_result r = {.path = ibid_strndup(path.s, path.n),
                         .id = ibid_strndup(id.s, id.n),
                         .reason = ibid_strndup(reason.s, reason.n),
                         .state = KNOWN(results, ibidi_ix_istr(state)),
                         .chunks = chunks,
                         .encoded = encoded,
                         .reused = reused};
    if (!r.path || !r.id || !r.reason) {
        ibid_free(r.path);
        ibid_free(r.id);
        ibid_free(r.reason);
        return ibid_fail(IBID_NOMEM, "out of memory for a job's results");
    }
    j->results[j->n_results++] = r;
    return IBID_OK;
}

static void put_result(ibid_enc *e, const ibidi_ix_result *r) {
    ibid_enc_map(e, NULL);
    ibid_enc_cstr(e, "path", r->path);
    ibid_enc_cstr(e, "id", r->id);
    ibid_enc_cstr(e, "state", r->state);
    ibid_enc_cstr(e, "reason", r->reason);
    ibid_enc_u64(e, "chunks", r->chunks);
    ibid_enc_u64(e, "encoded_tokens", r->encoded);
    ibid_enc_u64(e, "reused_tokens", r->reused);
    ibid_enc_end(e);
}

static void put_counts(ibid_enc *e, const ibidi_ix_counts *c) {
#define X(name) ibid_enc_u64(e, #name, c->name);
    IBIDI_JOB_COUNTS(X)
#undef X
    ibid_enc_f64(e, "tokens_per_s", c->tokens_per_s);
    ibid_enc_f64(e, "seconds_left", c->seconds_left);
    ibid_enc_f64(e, "forecast_s", c->forecast_s);
}

void ibidi_ix_report_put(ibid_enc *e, const ibidi_ix_job *j, size_t from, size_t max,
                         uint64_t *next) {
    size_t end = from;
    put_counts(e, &j->counts);
    ibid_enc_array(e, "files");
    for (; end < j->n_results && end - from < max; end++) put_result(e, &j->results[end]);
    ibid_enc_end(e);
    *next = end;
}

static bool plain_result(const ibidi_ix_result *r) {
    return strcmp(r->state, "ready") == 0 || strcmp(r->state, "unchanged") == 0 ||
           strcmp(r->state, "removed") == 0;
}

ibid_err ibidi_ix_job_encode(const ibidi_ix_job *j, ibid_enc *spec, ibid_enc *report) {
    ibid_enc_init(spec, ROW_MAX);
    ibid_enc_init(report, ROW_MAX);
    ibid_enc_map(spec, NULL);
    ibid_enc_bin(spec, "model", j->model.b, sizeof j->model.b);
    ibid_enc_array(spec, "paths");
    for (size_t i = 0; i < j->n_paths; i++) ibid_enc_cstr(spec, NULL, j->paths[i]);
    ibid_enc_end(spec);
    ibid_enc_bool(spec, "prune", j->prune);
    ibid_enc_bool(spec, "force", j->force);
    ibid_enc_bool(spec, "dry_run", j->dry_run);
    ibid_enc_bool(spec, "cache", j->cache);
    ibid_enc_end(spec);

    bool all = j->n_results <= RESULTS_KEPT;
    size_t kept = 0;
    ibid_enc_map(report, NULL);
    put_counts(report, &j->counts);
    ibid_enc_array(report, "files");
    for (size_t i = 0; i < j->n_results && kept < RESULTS_KEPT; i++) {
        if (!all && plain_result(&j->results[i])) continue;
        put_result(report, &j->results[i]);
        kept++;
    }
    ibid_enc_end(report);
    ibid_enc_end(report);
    ibid_err e = ibid_enc_done(spec);
    return e ? e : ibid_enc_done(report);
}

static ibid_str text_of(const ibid_val *map, const char *key) {
    ibid_str s = {"", 0};
    const char *p;
    size_t n;
    if (ibid_get_str(map, key, &p, &n)) s = (ibid_str){p, n};
    return s;
}

static ibid_err read_spec(const ibid_val *v, ibidi_ix_job *j) {
    const void *hash;
    size_t n;
    const ibid_val *paths = ibid_val_get(v, "paths");
    if (ibid_get_bin(v, "model", &hash, &n) && n == sizeof j->model.b) memcpy(j->model.b, hash, n);
    j->prune = ibid_get_bool(v, "prune", false);
    j->force = ibid_get_bool(v, "force", false);
    j->dry_run = ibid_get_bool(v, "dry_run", false);
    j->cache = ibid_get_bool(v, "cache", false);
    size_t count = ibid_val_count(paths);
    j->paths = ibid_calloc(count, sizeof *j->paths);
    if (!j->paths) return ibid_fail(IBID_NOMEM, "out of memory for a job");
    for (size_t i = 0; i < count; i++) {
        const char *s;
        if (!ibid_val_str(ibid_val_at(paths, i), &s, &n)) continue;
        j->paths[j->n_paths] = ibid_strndup(s, n);
        if (!j->paths[j->n_paths]) return ibid_fail(IBID_NOMEM, "out of memory for a job");
        j->n_paths++;
    }
    return IBID_OK;
}

static ibid_err read_report(const ibid_val *v, ibidi_ix_job *j) {
    ibid_err e = IBID_OK;
#define X(name) j->counts.name = ibid_get_u64(v, #name, 0);
    IBIDI_JOB_COUNTS(X)
#undef X
    j->counts.tokens_per_s = ibid_get_f64(v, "tokens_per_s", 0);
    j->counts.seconds_left = ibid_get_f64(v, "seconds_left", -1);
    j->counts.forecast_s = ibid_get_f64(v, "forecast_s", -1);
    const ibid_val *files = ibid_val_get(v, "files");
    for (size_t i = 0; !e && i < ibid_val_count(files); i++) {
        const ibid_val *f = ibid_val_at(files, i);
        e = ibidi_ix_result_add(j, text_of(f, "path"), text_of(f, "id"),
                                KNOWN(results, text_of(f, "state")), text_of(f, "reason"),
                                ibid_get_u64(f, "chunks", 0), ibid_get_u64(f, "encoded_tokens", 0),
                                ibid_get_u64(f, "reused_tokens", 0));
    }
    return e;
}

ibid_err ibidi_ix_job_decode(const ibid_job *row, ibidi_ix_job **out) {
    ibid_msg *spec = NULL, *report = NULL;
    ibidi_ix_job *j = ibid_calloc(1, sizeof *j);
    if (!j) return ibid_fail(IBID_NOMEM, "out of memory for a job");
    j->id = row->id;
    j->created_ms = row->created_ms;
    j->state = KNOWN(states, row->state);
    j->stage = KNOWN(stages, row->stage);
    j->error = row->error;
    j->counts.seconds_left = j->counts.forecast_s = -1;
    size_t n = row->collection.n < sizeof j->collection ? row->collection.n : 0;
    memcpy(j->collection, row->collection.s, n);
    n = row->error_text.n < sizeof j->error_text ? row->error_text.n : sizeof j->error_text - 1;
    memcpy(j->error_text, row->error_text.s, n);
    ibid_err e = row->spec.n ? ibid_msg_open(row->spec.s, row->spec.n, &spec) : IBID_OK;
    if (!e) e = read_spec(spec ? ibid_msg_root(spec) : NULL, j);
    if (!e && row->report.n) e = ibid_msg_open(row->report.s, row->report.n, &report);
    if (!e && report) e = read_report(ibid_msg_root(report), j);
    if (spec) ibid_msg_close(spec);
    if (report) ibid_msg_close(report);
    if (e)
        ibidi_ix_job_free(j);
    else
        *out = j;
    return e;
}
