/* Jobs: one at a time, on the room's worker thread. A job passes twice over its files: the first
 * pass reads, cuts and counts (what is new, how long it will take, how much room it needs), the
 * second encodes and commits. Nothing is kept between passes or over a restart but what the store
 * holds: a resumed job finds committed documents by their content hash and encoded blocks by
 * theirs. */
#include "indexer/internal.h"
#include "rpc/base/clock.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

/* ---- A set of ids ---- */

static uint64_t id_key(ibid_str id) {
    uint64_t h = ibid_checksum(id.s, id.n);
    return h ? h : 1; /* 0 marks a free slot */
}

static size_t slot_of(const ibidi_ix_seen *s, uint64_t key) {
    size_t i = (size_t)key & (s->room - 1);
    while (s->slots[i] && s->slots[i] != key) i = (i + 1) & (s->room - 1);
    return i;
}

bool ibidi_ix_seen_has(const ibidi_ix_seen *s, ibid_str id) {
    return s->room && s->slots[slot_of(s, id_key(id))] != 0;
}

ibid_err ibidi_ix_seen_add(ibidi_ix_seen *s, ibid_str id) {
    if (2 * s->n >= s->room) {
        ibidi_ix_seen grown = {.room = s->room ? s->room * 2 : 1024, .n = s->n};
        grown.slots = ibid_calloc(grown.room, sizeof *grown.slots);
        if (!grown.slots) return ibid_fail(IBID_NOMEM, "out of memory for a set of documents");
        for (size_t i = 0; i < s->room; i++)
            if (s->slots[i]) grown.slots[slot_of(&grown, s->slots[i])] = s->slots[i];
        ibid_free(s->slots);
        *s = grown;
    }
    uint64_t key = id_key(id);
    size_t i = slot_of(s, key);
    s->n += s->slots[i] == 0;
    s->slots[i] = key;
    return IBID_OK;
}

/* ---- Steering and reporting ---- */

ibid_err ibidi_ix_check(ibidi_ix_work *w) {
    (void)pthread_mutex_lock(&w->room->mutex);
    bool stop = w->room->want != IBIDI_WANT_RUN;
    (void)pthread_mutex_unlock(&w->room->mutex);
    return stop ? ibid_fail(IBID_CANCELLED, "stopped as asked") : IBID_OK;
}

bool ibidi_ix_again(ibidi_ix_work *w, ibid_err *e, uint64_t *start) {
    if (*e != IBID_UNAVAIL && *e != IBID_TIMEOUT && *e != IBID_BUSY) return false;
    if (*start == 0) {
        *start = ibid_now_ns();
        ibid_log(IBID_LOG_WARN, "job %llu waits: %s", (unsigned long long)w->job->id,
                 ibid_err_detail());
    }
    if (ibid_ms_since(*start) > (double)w->room->retry_ms) return false;
    struct timespec until;
    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 300 * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    (void)pthread_mutex_lock(&w->room->mutex);
    if (w->room->want == IBIDI_WANT_RUN)
        (void)pthread_cond_timedwait(&w->room->work, &w->room->mutex, &until);
    bool stop = w->room->want != IBIDI_WANT_RUN;
    (void)pthread_mutex_unlock(&w->room->mutex);
    if (stop) *e = ibid_fail(IBID_CANCELLED, "stopped as asked");
    return !stop;
}

static void count_state(ibidi_ix_counts *c, const char *state) {
#define X(name)                                                                                    \
    if (strcmp(state, #name) == 0) c->name++;
    X(ready)
    X(partial)
    X(empty)
    X(unsupported)
    X(failed)
    X(unchanged)
    X(removed)
#undef X
    c->documents++;
}

ibid_err ibidi_ix_report(ibidi_ix_work *w, ibid_str path, ibid_str id, const char *state,
                         ibid_str reason, uint64_t chunks, uint64_t encoded, uint64_t reused) {
    (void)pthread_mutex_lock(&w->room->mutex);
    ibid_err e = ibidi_ix_result_add(w->job, path, id, state, reason, chunks, encoded, reused);
    if (!e) count_state(&w->job->counts, state);
    (void)pthread_cond_broadcast(&w->room->news);
    (void)pthread_mutex_unlock(&w->room->mutex);
    ibidi_ix_progress(w, false);
    return e;
}

ibid_err ibidi_ix_job_save(ibidi_ix_room *r, ibidi_ix_job *j) {
    ibid_enc spec, report;
    uint64_t id = j->id;
    (void)pthread_mutex_lock(&r->mutex);
    ibid_err e = ibidi_ix_job_encode(j, &spec, &report);
    ibid_job row = {.id = j->id,
                    .kind = ibidi_ix_istr("index"),
                    .collection = ibidi_ix_istr(j->collection),
                    .state = ibidi_ix_istr(j->state),
                    .stage = ibidi_ix_istr(j->stage),
                    .spec = {spec.buf.data, spec.buf.len},
                    .report = {report.buf.data, report.buf.len},
                    .error = j->error,
                    .error_text = ibidi_ix_istr(j->error_text),
                    .created_ms = j->created_ms,
                    .updated_ms = ibid_wall_ms()};
    (void)pthread_mutex_unlock(&r->mutex);
    if (!e) e = ibid_kvc_job_put(r->kv, &row, &id);
    if (!e && j->id == 0) j->id = id; /* a new job is nobody else's yet */
    ibid_enc_fini(&spec);
    ibid_enc_fini(&report);
    return e;
}

void ibidi_ix_progress(ibidi_ix_work *w, bool now) {
    if (!now && ibid_ms_since(w->saved_ns) < 1000) return;
    /* A row that cannot be written now is written later; the job does not depend on it. */
    if (ibidi_ix_job_save(w->room, w->job))
        ibid_log(IBID_LOG_WARN, "job %llu: its progress was not saved: %s",
                 (unsigned long long)w->job->id, ibid_err_detail());
    w->saved_ns = ibid_now_ns();
}

static void set_stage(ibidi_ix_work *w, const char *stage) {
    (void)pthread_mutex_lock(&w->room->mutex);
    w->job->stage = stage;
    (void)pthread_cond_broadcast(&w->room->news);
    (void)pthread_mutex_unlock(&w->room->mutex);
    ibidi_ix_progress(w, true);
}

/* ---- Stages ---- */

uint64_t ibidi_ix_block_bytes(const ibid_model_info *m, size_t n_tokens) {
    /* Size classes of one layer's value, then half a page a layer lost to page ends, then keys. */
    uint64_t padded = n_tokens <= 64 ? 64 : n_tokens <= 128 ? 128 : 256;
    return padded * m->kv_bytes_per_token + m->n_layers * 2048 + n_tokens * 128;
}

static int by_path(const void *a, const void *b) {
    return strcmp(((const ibid_walk_file *)a)->path, ((const ibid_walk_file *)b)->path);
}

static ibid_err scan(ibidi_ix_work *w, ibid_walk *walk) {
    struct stat st;
    if (stat(w->room->data_dir, &st) == 0) {
        walk->skip_dev = st.st_dev;
        walk->skip_ino = st.st_ino;
    }
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < w->job->n_paths; i++) e = ibid_walk_add(walk, w->job->paths[i]);
    if (e) return e;
    /* Paths may overlap: each file once. */
    if (walk->n > 1) qsort(walk->files, walk->n, sizeof *walk->files, by_path);
    size_t kept = 0;
    for (size_t i = 0; i < walk->n; i++) {
        if (kept && strcmp(walk->files[kept - 1].path, walk->files[i].path) == 0)
            ibid_free(walk->files[i].path);
        else
            walk->files[kept++] = walk->files[i];
    }
    walk->n = kept;
    if (walk->unread) w->keep_all = true;
    (void)pthread_mutex_lock(&w->room->mutex);
    w->job->counts.files_total = walk->n;
    (void)pthread_mutex_unlock(&w->room->mutex);
    return IBID_OK;
}

static ibid_err pass(ibidi_ix_work *w, const ibid_walk *walk, bool measure) {
    ibid_err e = IBID_OK;
    w->measure = measure;
    ibid_free(w->seen.slots);
    w->seen = (ibidi_ix_seen){0};
    for (size_t i = 0; !e && i < walk->n; i++) {
        e = ibidi_ix_check(w);
        if (!e) e = ibidi_ix_file(w, &walk->files[i]);
    }
    return e;
}

static const char *human(uint64_t bytes, char out[32]) {
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    double v = (double)bytes;
    size_t u = 0;
    while (v >= 1024 && u < 4) v /= 1024, u++;
    (void)snprintf(out, 32, u ? "%.1f %s" : "%.0f %s", v, units[u]);
    return out;
}

/* Is there room for it, on the disk and in the budget? */
static ibid_err forecast(ibidi_ix_work *w) {
    struct statvfs fs;
    ibid_snap *n = NULL;
    ibid_store_stats stats = {0};
    char a[32], b[32], c[32];
    if (statvfs(w->room->store_dir, &fs) != 0)
        return ibid_fail_errno(errno, "cannot see the free space of", w->room->store_dir);
    ibid_err e = ibid_snap_begin(w->store, &n);
    if (!e) e = ibid_snap_stats(n, &stats);
    if (n) ibid_snap_end(n);
    if (e) return e;
    (void)pthread_mutex_lock(&w->room->mutex);
    ibidi_ix_counts *k = &w->job->counts;
    k->free_bytes = (uint64_t)fs.f_bavail * fs.f_frsize;
    k->forecast_s =
        w->room->tokens_per_s > 0 ? (double)k->forecast_tokens / w->room->tokens_per_s : -1;
    k->seconds_left = k->forecast_s;
    uint64_t need = k->forecast_bytes, room = k->free_bytes;
    (void)pthread_cond_broadcast(&w->room->news);
    (void)pthread_mutex_unlock(&w->room->mutex);
    /* Pages of replaced and deleted values are used again, so part of the store's file is room too;
     * it is not counted: better to ask for too much than to fill the disk. */
    if (w->job->dry_run || need == 0) return IBID_OK;
    if (need > room)
        return ibid_fail(IBID_DISKFULL,
                         "this needs about %s, the disk has %s left: index less, or "
                         "put the data folder on a larger disk",
                         human(need, a), human(room, b));
    if (stats.kv_budget && !w->job->force && stats.kv_bytes + need > stats.kv_budget)
        return ibid_fail(IBID_BUDGET,
                         "this needs about %s beside the %s kept, %s more than the KV "
                         "budget: raise the budget, or force it (older KV is evicted)",
                         human(need, a), human(stats.kv_bytes, b),
                         human(stats.kv_bytes + need - stats.kv_budget, c));
    return IBID_OK;
}

struct prune {
    ibidi_ix_work *w;
    char **ids;
    size_t n, room;
};

static bool below(ibid_str source, const char *root) {
    size_t n = strlen(root);
    if (source.n < n || memcmp(source.s, root, n) != 0) return false;
    return source.n == n || source.s[n] == '/' || root[n - 1] == '/';
}

static ibid_err gone(void *arg, const ibid_document *d) {
    struct prune *p = arg;
    bool ours = false;
    for (size_t i = 0; i < p->w->job->n_paths; i++) ours |= below(d->source, p->w->job->paths[i]);
    if (!ours || ibidi_ix_seen_has(&p->w->seen, d->id)) return IBID_OK;
    if (p->n == p->room) {
        size_t room = p->room ? p->room * 2 : 64;
        char **grown = ibid_realloc(p->ids, room * sizeof *grown);
        if (!grown) return ibid_fail(IBID_NOMEM, "out of memory for pruning");
        p->ids = grown;
        p->room = room;
    }
    p->ids[p->n] = ibid_strndup(d->id.s, d->id.n);
    if (!p->ids[p->n]) return ibid_fail(IBID_NOMEM, "out of memory for pruning");
    p->n++;
    return IBID_OK;
}

static ibid_err delete_document(ibidi_ix_work *w, ibid_str id) {
    uint64_t generation = 0, start = 0;
    ibid_err e;
    do
        e = ibid_kvc_document_delete(w->room->kv, ibidi_ix_istr(w->job->collection), id,
                                     &generation);
    while (ibidi_ix_again(w, &e, &start));
    if (!e) w->generation = generation;
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

static ibid_err prune(ibidi_ix_work *w) {
    struct prune p = {.w = w};
    ibid_snap *n = NULL;
    if (w->keep_all)
        return ibidi_ix_report(
            w, ibidi_ix_istr(""), ibidi_ix_istr(""), "failed",
            ibidi_ix_istr("nothing was pruned: a file or folder could not be read"), 0, 0, 0);
    ibid_err e = ibid_snap_begin(w->store, &n);
    if (!e) e = ibid_snap_each_document(n, ibidi_ix_istr(w->job->collection), 0, gone, &p);
    if (n) ibid_snap_end(n);
    for (size_t i = 0; i < p.n; i++) {
        if (!e) e = ibidi_ix_check(w);
        if (!e) e = delete_document(w, ibidi_ix_istr(p.ids[i]));
        if (!e)
            e = ibidi_ix_report(w, ibidi_ix_istr(p.ids[i]), ibidi_ix_istr(p.ids[i]), "removed",
                                ibidi_ix_istr(""), 0, 0, 0);
        ibid_free(p.ids[i]);
    }
    ibid_free(p.ids);
    return e;
}

/* ---- The cache of `find` ---- */

struct cached {
    char *id;
    uint64_t indexed_ms, bytes;
};

struct cache {
    ibidi_ix_work *w;
    ibid_snap *snap;
    struct cached *docs;
    size_t n, room;
    uint64_t total;
};

static ibid_err weigh(void *arg, const ibid_document *d) {
    struct cache *c = arg;
    const ibid_chunk *chunks = NULL;
    size_t n = 0;
    uint64_t bytes = 0;
    ibid_err e = ibid_snap_chunks(c->snap, d->number, &chunks, &n);
    for (size_t i = 0; !e && i < n; i++) {
        ibid_block b;
        if (ibid_snap_block(c->snap, chunks[i].block, &b) == IBID_OK && b.has_kv)
            bytes += ibidi_ix_block_bytes(&c->w->model, b.n_tokens);
    }
    if (!e && c->n == c->room) {
        size_t room = c->room ? c->room * 2 : 64;
        struct cached *grown = ibid_realloc(c->docs, room * sizeof *grown);
        if (!grown) return ibid_fail(IBID_NOMEM, "out of memory for the cache's list");
        c->docs = grown;
        c->room = room;
    }
    if (e) return e;
    c->docs[c->n] = (struct cached){ibid_strndup(d->id.s, d->id.n), d->indexed_ms, bytes};
    if (!c->docs[c->n].id) return ibid_fail(IBID_NOMEM, "out of memory for the cache's list");
    c->n++;
    c->total += bytes;
    return IBID_OK;
}

static int oldest_first(const void *a, const void *b) {
    const struct cached *x = a, *y = b;
    return (x->indexed_ms > y->indexed_ms) - (x->indexed_ms < y->indexed_ms);
}

/* Removes the oldest documents of the cache until it is within its quota; what this job brought
 * stays, whatever its size. */
static ibid_err trim_cache(ibidi_ix_work *w) {
    struct cache c = {.w = w};
    ibid_err e = ibid_snap_begin(w->store, &c.snap);
    if (!e) e = ibid_snap_each_document(c.snap, ibidi_ix_istr(w->job->collection), 0, weigh, &c);
    if (c.snap) ibid_snap_end(c.snap);
    if (c.n > 1) qsort(c.docs, c.n, sizeof *c.docs, oldest_first);
    for (size_t i = 0; i < c.n; i++) {
        bool old = !ibidi_ix_seen_has(&w->seen, ibidi_ix_istr(c.docs[i].id));
        if (!e && old && c.total > w->room->cache_quota) {
            e = delete_document(w, ibidi_ix_istr(c.docs[i].id));
            c.total -= c.docs[i].bytes;
        }
        ibid_free(c.docs[i].id);
    }
    ibid_free(c.docs);
    return e;
}

/* ---- The whole ---- */

/* The collection may have come into being with another model since the job was submitted. */
static ibid_err check_model(ibidi_ix_work *w) {
    ibid_snap *n = NULL;
    ibid_collection c;
    ibid_err e = ibid_snap_begin(w->store, &n);
    if (!e) e = ibid_snap_collection(n, ibidi_ix_istr(w->job->collection), &c);
    if (!e && ibid_hash_cmp(&c.model, &w->job->model) != 0)
        e = ibid_fail(IBID_MISMATCH, "collection %s was made with another model: use another one",
                      w->job->collection);
    if (n) ibid_snap_end(n);
    return e;
}

static ibid_err prepare(ibidi_ix_work *w) {
    char hex[65];
    uint64_t start = 0;
    ibid_snap *n = NULL;
    ibid_model_record m;
    ibid_err e;
    ibid_hash_hex(&w->job->model, hex);
    do e = ibid_attn_model_info(w->room->attn, hex, &w->model);
    while (ibidi_ix_again(w, &e, &start));
    if (!e) e = ibidi_ix_room_store(w->room, &w->store);
    if (!e) e = ibid_snap_begin(w->store, &n);
    if (!e) e = ibid_snap_model(n, &w->job->model, &m);
    if (!e) w->record = (ibid_model_record){.prefix = m.prefix, .kv_type = m.kv_type};
    if (n) ibid_snap_end(n);
    if (e) return e;
    start = 0;
    do
        e = ibid_kvc_collection_create(w->room->kv, ibidi_ix_istr(w->job->collection),
                                       &w->job->model);
    while (ibidi_ix_again(w, &e, &start));
    return e == IBID_EXISTS ? check_model(w) : e;
}

static void reset_counts(ibidi_ix_job *j) {
    j->counts = (ibidi_ix_counts){.seconds_left = -1, .forecast_s = -1};
    for (size_t i = 0; i < j->n_results; i++) {
        ibid_free(j->results[i].path);
        ibid_free(j->results[i].id);
        ibid_free(j->results[i].reason);
    }
    j->n_results = 0;
}

static ibid_err run(ibidi_ix_work *w) {
    ibid_walk walk = {0};
    (void)pthread_mutex_lock(&w->room->mutex);
    reset_counts(w->job);
    w->job->state = "running";
    w->job->error = IBID_OK;
    w->job->error_text[0] = '\0';
    (void)pthread_mutex_unlock(&w->room->mutex);
    set_stage(w, "scan");
    ibid_err e = prepare(w);
    if (!e) e = scan(w, &walk);
    if (!e) {
        set_stage(w, "extract");
        e = pass(w, &walk, true);
    }
    if (!e) {
        set_stage(w, "forecast");
        e = forecast(w);
    }
    if (!e && !w->job->dry_run) {
        set_stage(w, "encode");
        e = pass(w, &walk, false);
    }
    if (!e && !w->job->dry_run) {
        set_stage(w, "commit");
        if (w->job->prune) e = prune(w);
        if (!e && w->job->cache) e = trim_cache(w);
    }
    ibid_walk_fini(&walk);
    ibid_free(w->seen.slots);
    return e;
}

/* The state a job ends in. Errors that pass (a room is away, the disk is full) leave it paused: it
 * can be resumed when they are over. */
static const char *end_state(ibid_err e, ibidi_ix_want want) {
    if (!e) return "done";
    if (want == IBIDI_WANT_CANCEL) return "cancelled";
    if (want == IBIDI_WANT_PAUSE) return "paused";
    switch (e) {
    case IBID_CANCELLED:
    case IBID_UNAVAIL:
    case IBID_TIMEOUT:
    case IBID_BUSY:
    case IBID_IO:
    case IBID_NOMEM:
        return "paused";
    default:
        return "failed";
    }
}

/* Returns the store's generation after its last commit, 0 if there was none. */
static uint64_t run_job(ibidi_ix_room *r, ibidi_ix_job *j) {
    ibidi_ix_work w = {.room = r, .job = j};
    ibid_err e = run(&w);
    char detail[sizeof j->error_text];
    (void)snprintf(detail, sizeof detail, "%s", e ? ibid_err_detail() : "");
    (void)pthread_mutex_lock(&r->mutex);
    ibidi_ix_want want = r->want;
    /* The room closes: the row stays "running", and the next start goes on with it. */
    bool stopped = e == IBID_CANCELLED && want == IBIDI_WANT_STOP;
    if (!stopped) {
        j->state = end_state(e, want);
        /* Disk full before anything was encoded is a refusal; in the midst, an interruption. */
        if (e == IBID_DISKFULL && strcmp(j->stage, "forecast") != 0) j->state = "paused";
        bool asked = e == IBID_CANCELLED;
        j->error = asked ? IBID_OK : e;
        (void)snprintf(j->error_text, sizeof j->error_text, "%s", asked ? "" : detail);
        if (!e) j->counts.seconds_left = 0;
    }
    (void)pthread_mutex_unlock(&r->mutex);
    if (e && !stopped && e != IBID_CANCELLED)
        ibid_log(IBID_LOG_WARN, "job %llu ends as %s: %s", (unsigned long long)j->id, j->state,
                 detail);
    /* The end must reach the row, or a restart would run the job again (harmless, but odd). */
    uint64_t start = 0;
    ibid_err saved;
    do saved = ibidi_ix_job_save(r, j);
    while (!stopped && ibidi_ix_again(&w, &saved, &start));
    return stopped ? 0 : w.generation;
}

void ibidi_ix_room_forget(ibidi_ix_room *r, uint64_t id) {
    for (ibidi_ix_job **at = &r->recent; *at;) {
        ibidi_ix_job *j = *at;
        if (j->id == id) {
            *at = j->next;
            ibidi_ix_job_free(j);
        } else {
            at = &j->next;
        }
    }
}

/* Moves the job from the live ones to the recent ones, of which a few are kept. */
static void end_job(ibidi_ix_room *r, ibidi_ix_job *j) {
    enum { RECENT = 8 };
    ibidi_ix_job **at = &r->jobs;
    while (*at && *at != j) at = &(*at)->next;
    if (*at) *at = j->next;
    ibidi_ix_room_forget(r, j->id);
    j->live = false;
    j->next = r->recent;
    r->recent = j;
    size_t n = 0;
    for (at = &r->recent; *at && n < RECENT; n++) at = &(*at)->next;
    if (*at) ibidi_ix_room_forget(r, (*at)->id);
    r->running = 0;
    r->want = r->closing ? IBIDI_WANT_STOP : IBIDI_WANT_RUN;
    atomic_store(&r->stop_child, r->closing);
    (void)pthread_cond_broadcast(&r->news);
}

void *ibidi_ix_worker(void *arg) {
    ibidi_ix_room *r = arg;
    (void)pthread_mutex_lock(&r->mutex);
    while (!r->closing) {
        ibidi_ix_job *j = r->jobs;
        if (!j) {
            (void)pthread_cond_wait(&r->work, &r->mutex);
            continue;
        }
        r->running = j->id;
        r->want = IBIDI_WANT_RUN;
        atomic_store(&r->stop_child, false);
        (void)pthread_mutex_unlock(&r->mutex);
        uint64_t generation = run_job(r, j);
        (void)pthread_mutex_lock(&r->mutex);
        end_job(r, j);
        if (!generation) continue;
        (void)pthread_mutex_unlock(&r->mutex);
        /* A hint only: the retriever looks at the store's generation before each search. */
        (void)ibid_ret_notify(r->ret, generation);
        (void)pthread_mutex_lock(&r->mutex);
    }
    (void)pthread_mutex_unlock(&r->mutex);
    return NULL;
}
