/* The indexer's handlers, and the room's open and close. */
#include "indexer/indexer_room.h"
#include "indexer/internal.h"
#include "rpc/base/clock.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { WORKERS = 8, STATUS_FILES = 500, WAIT_MAX_MS = 10000, JOBS_KEPT = 100 };

static const char cache_name[] = ".find";

ibid_err ibidi_ix_room_store(ibidi_ix_room *r, ibid_store **out) {
    ibid_err e = IBID_OK;
    (void)pthread_mutex_lock(&r->mutex);
    if (!r->store) {
        const ibid_store_opts o = {.dir = r->store_dir, .readonly = true};
        e = ibid_store_open(&o, &r->store);
    }
    *out = r->store;
    (void)pthread_mutex_unlock(&r->mutex);
    return e;
}

static ibid_err snap_begin(ibidi_ix_room *r, ibid_snap **out) {
    ibid_store *s = NULL;
    ibid_err e = ibidi_ix_room_store(r, &s);
    return e ? e : ibid_snap_begin(s, out);
}

static ibid_str arg_str(const ibid_call *c, const char *key) {
    const char *s;
    size_t n;
    return ibid_get_str(c->body, key, &s, &n) ? (ibid_str){s, n} : (ibid_str){"", 0};
}

void ibidi_ix_room_enqueue(ibidi_ix_room *r, ibidi_ix_job *j) {
    ibidi_ix_job **at = &r->jobs;
    j->live = true;
    j->next = NULL;
    while (*at) at = &(*at)->next;
    *at = j;
    (void)pthread_cond_broadcast(&r->work);
}

/* With the mutex held. */
static ibidi_ix_job *find_live(ibidi_ix_room *r, uint64_t id) {
    ibidi_ix_job *j = r->jobs;
    while (j && j->id != id) j = j->next;
    return j;
}

static bool name_ok(ibid_str s) {
    if (s.n == 0 || s.n > 64 || s.s[0] == '.') return false;
    for (size_t i = 0; i < s.n; i++) {
        char c = s.s[i];
        bool ok = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                  c == '.' || c == '_' || c == '-';
        if (!ok) return false;
    }
    return true;
}

/* The model a collection is bound to, or is to be. A collection keeps the model it began with. */
static ibid_err bind_model(ibidi_ix_room *r, ibid_str collection, ibid_str model, bool rebind,
                           ibid_hash *out) {
    ibid_snap *n = NULL;
    ibid_collection c = {.documents = 0};
    ibid_model_info info;
    char name[256];
    bool exists = false;
    ibid_err e = snap_begin(r, &n);
    if (!e) {
        ibid_err found = ibid_snap_collection(n, collection, &c);
        exists = found == IBID_OK;
        if (found != IBID_OK && found != IBID_NOCOLLECTION && found != IBID_NOTFOUND) e = found;
    }
    ibid_hash bound = c.model;
    if (n) ibid_snap_end(n);
    if (e == IBID_NOTFOUND) e = IBID_OK; /* no store yet: no collection either */
    if (!e && exists && model.n == 0) return *out = bound, IBID_OK;
    if (!e && model.n >= sizeof name) e = ibid_fail(IBID_INVAL, "the model's name is too long");
    if (e) return e;
    (void)snprintf(name, sizeof name, "%.*s", (int)model.n, model.s);
    e = ibid_attn_model_info(r->attn, name, &info);
    if (e) return e;
    if (exists && ibid_hash_cmp(&bound, &info.fingerprint) != 0) {
        char hex[65];
        ibid_hash_hex(&bound, hex);
        if (!rebind)
            return ibid_fail(IBID_MISMATCH,
                             "collection %.*s was made with model %.12s and cannot "
                             "take documents of model %s: use another collection",
                             (int)collection.n, collection.s, hex, info.name);
        e = ibid_kvc_collection_drop(r->kv, collection);
        if (e) return e;
    }
    *out = info.fingerprint;
    return IBID_OK;
}

static ibid_err new_job(ibid_str collection, const ibid_hash *model, ibidi_ix_job **out) {
    ibidi_ix_job *j = ibid_calloc(1, sizeof *j);
    if (!j) return ibid_fail(IBID_NOMEM, "out of memory for a job");
    j->state = "queued";
    j->stage = "";
    j->model = *model;
    j->created_ms = ibid_wall_ms();
    j->counts.seconds_left = j->counts.forecast_s = -1;
    memcpy(j->collection, collection.s, collection.n);
    *out = j;
    return IBID_OK;
}

static ibid_err add_path(ibidi_ix_job *j, ibid_str path, bool must_exist) {
    struct stat st;
    char *copy = memchr(path.s, '\0', path.n) ? NULL : ibid_strndup(path.s, path.n);
    if (!copy || path.n == 0 || path.s[0] != '/') {
        ibid_free(copy);
        return ibid_fail(IBID_INVAL, "\"%.*s\" is not an absolute path", (int)path.n, path.s);
    }
    /* The canonical form, so that pruning knows what lies below it; of a path that is gone, as
     * given. */
    char *real = realpath(copy, NULL);
    if (!real && must_exist && stat(copy, &st) != 0) {
        ibid_err e = ibid_fail_errno(errno, "cannot index", copy);
        ibid_free(copy);
        return e;
    }
    if (real) {
        ibid_free(copy);
        copy = ibid_strdup(real);
        free(real); /* realpath's own allocation */
        if (!copy) return ibid_fail(IBID_NOMEM, "out of memory for a job");
    }
    j->paths[j->n_paths++] = copy;
    return IBID_OK;
}

/* Makes a new job durable, then runs it. */
static ibid_err start(ibidi_ix_room *r, ibidi_ix_job *j, uint64_t *id) {
    ibid_err e = ibidi_ix_job_save(r, j);
    if (e) {
        ibidi_ix_job_free(j);
        return e;
    }
    *id = j->id;
    (void)pthread_mutex_lock(&r->mutex);
    /* The look for interrupted jobs at start may have found its row already. */
    bool twice = find_live(r, j->id) != NULL;
    if (!twice) ibidi_ix_room_enqueue(r, j);
    (void)pthread_mutex_unlock(&r->mutex);
    if (twice) ibidi_ix_job_free(j);
    return IBID_OK;
}

static ibid_err on_submit(void *room, const ibid_call *c) {
    ibidi_ix_room *r = room;
    ibid_hash model;
    ibidi_ix_job *j = NULL;
    uint64_t id = 0;
    ibid_str collection = arg_str(c, "collection");
    const ibid_val *paths = ibid_val_get(c->body, "paths");
    size_t n = ibid_val_count(paths);
    if (!name_ok(collection))
        return ibid_fail(IBID_INVAL,
                         "\"%.*s\" is no name for a collection: 1 to 64 of A-Z a-z 0-9 "
                         ". _ -, not beginning with a dot",
                         (int)(collection.n < 80 ? collection.n : 80), collection.s);
    if (n == 0) return ibid_fail(IBID_INVAL, "no path was given");
    ibid_err e = bind_model(r, collection, arg_str(c, "model"), false, &model);
    if (!e) e = new_job(collection, &model, &j);
    if (e) return e;
    j->prune = ibid_get_bool(c->body, "prune", false);
    j->force = ibid_get_bool(c->body, "force", false);
    j->dry_run = ibid_get_bool(c->body, "dry_run", false);
    j->paths = ibid_calloc(n, sizeof *j->paths);
    if (!j->paths) e = ibid_fail(IBID_NOMEM, "out of memory for a job");
    for (size_t i = 0; !e && i < n; i++) {
        ibid_str p = {"", 0};
        (void)ibid_val_str(ibid_val_at(paths, i), &p.s, &p.n);
        e = add_path(j, p, !j->prune);
    }
    if (e) {
        ibidi_ix_job_free(j);
        return e;
    }
    e = start(r, j, &id);
    ibid_enc_u64(c->reply, "job", id);
    return e;
}

/* ---- Rows of jobs that are not at work here ---- */

struct pick {
    uint64_t *ids;
    size_t n, room;
    bool interrupted_only, finished;
};

static bool is_state(const ibid_job *j, const char *s) {
    return ibidi_ix_str_is(j->state, ibidi_ix_istr(s));
}

static ibid_err pick_job(void *arg, const ibid_job *j) {
    struct pick *p = arg;
    bool at_work = is_state(j, "queued") || is_state(j, "running");
    bool over = is_state(j, "done") || is_state(j, "cancelled") || is_state(j, "failed");
    bool take = p->finished           ? over
                : p->interrupted_only ? at_work
                                      : at_work || is_state(j, "paused");
    if (!ibidi_ix_str_is(j->kind, ibidi_ix_istr("index")) || !take) return IBID_OK;
    if (p->n == p->room) {
        size_t room = p->room ? p->room * 2 : 32;
        uint64_t *grown = ibid_realloc(p->ids, room * sizeof *grown);
        if (!grown) return ibid_fail(IBID_NOMEM, "out of memory for a list of jobs");
        p->ids = grown;
        p->room = room;
    }
    p->ids[p->n++] = j->id;
    return IBID_OK;
}

static ibid_err pick_jobs(ibidi_ix_room *r, struct pick *p) {
    ibid_snap *n = NULL;
    ibid_err e = snap_begin(r, &n);
    if (!e) e = ibid_snap_each_job(n, pick_job, p);
    if (n) ibid_snap_end(n);
    return e;
}

static ibid_err read_job(ibidi_ix_room *r, uint64_t id, ibidi_ix_job **out) {
    ibid_snap *n = NULL;
    ibid_job row;
    ibid_err e = snap_begin(r, &n);
    if (!e) e = ibid_snap_job(n, id, &row);
    if (!e && !ibidi_ix_str_is(row.kind, ibidi_ix_istr("index"))) e = IBID_NOTFOUND;
    if (!e) e = ibidi_ix_job_decode(&row, out);
    if (n) ibid_snap_end(n);
    if (e == IBID_NOTFOUND)
        e = ibid_fail(e, "there is no job %llu: ibid jobs lists them", (unsigned long long)id);
    return e;
}

/* Puts a job that is not at work to work. NOTFOUND; INVAL when it is over. */
static ibid_err resume_job(ibidi_ix_room *r, uint64_t id, bool *resumed) {
    ibidi_ix_job *j = NULL;
    *resumed = false;
    (void)pthread_mutex_lock(&r->mutex);
    bool live = find_live(r, id) != NULL;
    bool pausing = live && r->running == id && r->want != IBIDI_WANT_RUN;
    (void)pthread_mutex_unlock(&r->mutex);
    if (pausing)
        return ibid_fail(IBID_BUSY, "job %llu is still stopping: try again in a moment",
                         (unsigned long long)id);
    if (live) return IBID_OK;
    ibid_err e = read_job(r, id, &j);
    if (e) return e;
    if (strcmp(j->state, "done") == 0 || strcmp(j->state, "cancelled") == 0 ||
        strcmp(j->state, "failed") == 0) {
        e = ibid_fail(IBID_INVAL, "job %llu is %s and cannot be resumed", (unsigned long long)id,
                      j->state);
        ibidi_ix_job_free(j);
        return e;
    }
    j->state = "queued";
    e = ibidi_ix_job_save(r, j);
    if (e) {
        ibidi_ix_job_free(j);
        return e;
    }
    (void)pthread_mutex_lock(&r->mutex);
    ibidi_ix_room_forget(r, id);
    bool twice = find_live(r, id) != NULL; /* another client was quicker */
    if (!twice) ibidi_ix_room_enqueue(r, j);
    (void)pthread_mutex_unlock(&r->mutex);
    if (twice) ibidi_ix_job_free(j);
    *resumed = !twice;
    return IBID_OK;
}

static ibid_err resume_all(ibidi_ix_room *r, bool interrupted_only, uint64_t *count) {
    struct pick p = {.interrupted_only = interrupted_only};
    ibid_err e = pick_jobs(r, &p);
    for (size_t i = 0; !e && i < p.n; i++) {
        bool resumed = false;
        e = resume_job(r, p.ids[i], &resumed);
        *count += resumed;
    }
    ibid_free(p.ids);
    return e;
}

static ibid_err on_resume(void *room, const ibid_call *c) {
    ibidi_ix_room *r = room;
    uint64_t id = ibid_get_u64(c->body, "job", 0), n = 0;
    bool resumed = false;
    ibid_err e = id ? resume_job(r, id, &resumed) : resume_all(r, false, &n);
    ibid_enc_u64(c->reply, "n", id ? (uint64_t)resumed : n);
    return e;
}

/* Pauses or cancels: the running job is told, a waiting one leaves the queue, another's row
 * changes. */
static ibid_err steer(ibidi_ix_room *r, uint64_t id, ibidi_ix_want want, const char *state) {
    ibidi_ix_job *j = NULL;
    (void)pthread_mutex_lock(&r->mutex);
    bool running = id && r->running == id;
    if (running) {
        if (r->want < want) r->want = want;
        atomic_store(&r->stop_child, true);
        (void)pthread_cond_broadcast(&r->work);
    } else {
        ibidi_ix_job **at = &r->jobs;
        while (*at && (*at)->id != id) at = &(*at)->next;
        if (*at) {
            j = *at;
            *at = j->next;
        }
    }
    (void)pthread_mutex_unlock(&r->mutex);
    if (running) return IBID_OK;
    ibid_err e = j ? IBID_OK : read_job(r, id, &j);
    if (e) return e;
    bool over = strcmp(j->state, "done") == 0 || strcmp(j->state, "cancelled") == 0 ||
                strcmp(j->state, "failed") == 0;
    if (over && strcmp(j->state, state) != 0)
        e = ibid_fail(IBID_INVAL, "job %llu is %s already", (unsigned long long)id, j->state);
    if (!e && !over) {
        j->state = state;
        e = ibidi_ix_job_save(r, j);
        (void)pthread_mutex_lock(&r->mutex);
        ibidi_ix_room_forget(r, id);
        (void)pthread_mutex_unlock(&r->mutex);
    }
    ibidi_ix_job_free(j);
    return e;
}

static ibid_err on_pause(void *room, const ibid_call *c) {
    return steer(room, ibid_get_u64(c->body, "job", 0), IBIDI_WANT_PAUSE, "paused");
}

static ibid_err on_cancel(void *room, const ibid_call *c) {
    return steer(room, ibid_get_u64(c->body, "job", 0), IBIDI_WANT_CANCEL, "cancelled");
}

static void put_status(ibid_enc *e, const ibidi_ix_job *j, uint64_t from) {
    uint64_t next = from;
    /* A job is over once its row says so; until then it runs. */
    bool ending = j->live && strcmp(j->state, "queued") != 0;
    ibid_enc_u64(e, "id", j->id);
    ibid_enc_cstr(e, "state", ending ? "running" : j->state);
    ibid_enc_cstr(e, "stage", j->stage);
    ibid_enc_cstr(e, "collection", j->collection);
    ibid_enc_cstr(e, "code", ibid_err_code(j->error));
    ibid_enc_cstr(e, "error_text", j->error_text);
    ibidi_ix_report_put(e, j, (size_t)from, STATUS_FILES, &next);
    ibid_enc_u64(e, "next", next);
}

static void deadline(uint64_t ms, struct timespec *out) {
    (void)clock_gettime(CLOCK_REALTIME, out);
    out->tv_sec += (time_t)(ms / 1000);
    out->tv_nsec += (long)(ms % 1000) * 1000000L;
    out->tv_sec += out->tv_nsec / 1000000000L;
    out->tv_nsec %= 1000000000L;
}

static ibid_err on_status(void *room, const ibid_call *c) {
    ibidi_ix_room *r = room;
    uint64_t id = ibid_get_u64(c->body, "job", 0), from = ibid_get_u64(c->body, "from", 0);
    uint64_t wait = ibid_get_u64(c->body, "wait_ms", 0);
    struct timespec until;
    deadline(wait < WAIT_MAX_MS ? wait : WAIT_MAX_MS, &until);
    (void)pthread_mutex_lock(&r->mutex);
    ibidi_ix_job *j = find_live(r, id);
    const char *stage = j ? j->stage : "";
    while (j && wait && !r->closing && j->n_results <= from && j->stage == stage)
        if (pthread_cond_timedwait(&r->news, &r->mutex, &until) != 0) {
            j = find_live(r, id);
            break;
        } else {
            j = find_live(r, id);
        }
    for (ibidi_ix_job *k = j ? NULL : r->recent; k && !j; k = k->next)
        if (k->id == id) j = k;
    if (j) put_status(c->reply, j, from);
    (void)pthread_mutex_unlock(&r->mutex);
    if (j) return IBID_OK;
    ibid_err e = read_job(r, id, &j);
    if (e) return e;
    /* Of a long job the row keeps only some results: none follow those the client has. */
    put_status(c->reply, j, from < j->n_results ? from : j->n_results);
    ibidi_ix_job_free(j);
    return IBID_OK;
}

static ibid_err on_remove(void *room, const ibid_call *c) {
    ibidi_ix_room *r = room;
    ibid_str collection = arg_str(c, "collection"), id = arg_str(c, "id");
    uint64_t generation = 0;
    ibid_err e = ibid_kvc_document_delete(r->kv, collection, id, &generation);
    /* A long document's further parts. */
    for (uint64_t part = 2; !e; part++) {
        char name[IBID_EXTRACT_ID_MAX + 32];
        int n = snprintf(name, sizeof name, "%.*s#%llu", (int)id.n, id.s, (unsigned long long)part);
        ibid_snap *snap = NULL;
        ibid_document d;
        if (n < 0 || (size_t)n >= sizeof name || snap_begin(r, &snap)) break;
        ibid_err found = ibid_snap_document(snap, collection, ibidi_ix_istr(name), &d);
        bool part_of_it = found == IBID_OK && ibidi_ix_str_is(d.source, id);
        ibid_snap_end(snap);
        if (!part_of_it) break;
        e = ibid_kvc_document_delete(r->kv, collection, ibidi_ix_istr(name), &generation);
    }
    if (!e) (void)ibid_ret_notify(r->ret, generation);
    return e;
}

static ibid_err on_cache_file(void *room, const ibid_call *c) {
    ibidi_ix_room *r = room;
    ibid_hash model;
    ibidi_ix_job *j = NULL;
    uint64_t id = 0;
    ibid_str collection = ibidi_ix_istr(cache_name);
    ibid_err e = bind_model(r, collection, arg_str(c, "model"), true, &model);
    if (!e) e = new_job(collection, &model, &j);
    if (e) return e;
    j->cache = j->force = true;
    j->paths = ibid_calloc(1, sizeof *j->paths);
    e = j->paths ? add_path(j, arg_str(c, "path"), true)
                 : ibid_fail(IBID_NOMEM, "out of memory for a job");
    struct stat st;
    if (!e && (stat(j->paths[0], &st) != 0 || !S_ISREG(st.st_mode)))
        e = ibid_fail(IBID_INVAL, "%s is not a file", j->paths[0]);
    if (e) {
        ibidi_ix_job_free(j);
        return e;
    }
    ibid_enc_cstr(c->reply, "id", j->paths[0]);
    e = start(r, j, &id);
    ibid_enc_u64(c->reply, "job", id);
    return e;
}

/* ---- Open and close ---- */

static const ibid_method methods[] = {
    {"indexer.submit", on_submit},         {"indexer.resume", on_resume},
    {"indexer.pause", on_pause},           {"indexer.cancel", on_cancel},
    {"indexer.status", on_status},         {"indexer.remove", on_remove},
    {"indexer.cache_file", on_cache_file}, {NULL, NULL}};

/* Rows of jobs long over. */
static void forget_old_jobs(ibidi_ix_room *r) {
    struct pick p = {.finished = true};
    if (pick_jobs(r, &p) == IBID_OK)
        for (size_t i = 0; i + JOBS_KEPT < p.n; i++) (void)ibid_kvc_job_delete(r->kv, p.ids[i]);
    ibid_free(p.ids);
}

/* Waits for the store, then resumes what was interrupted; then works. */
static void *work(void *arg) {
    ibidi_ix_room *r = arg;
    uint64_t n = 0;
    bool waiting = true;
    while (waiting) {
        ibid_err e = ibid_client_ping(r->kv, 1000, NULL, NULL);
        if (!e) e = resume_all(r, true, &n);
        waiting = e == IBID_UNAVAIL || e == IBID_TIMEOUT || e == IBID_NOTFOUND || e == IBID_BUSY;
        if (e && !waiting)
            ibid_log(IBID_LOG_ERROR, "interrupted jobs were not resumed: %s", ibid_err_detail());
        struct timespec until;
        deadline(200, &until);
        (void)pthread_mutex_lock(&r->mutex);
        if (waiting && !r->closing) (void)pthread_cond_timedwait(&r->work, &r->mutex, &until);
        if (r->closing) waiting = false;
        (void)pthread_mutex_unlock(&r->mutex);
    }
    if (n) ibid_log(IBID_LOG_INFO, "%llu interrupted jobs go on", (unsigned long long)n);
    forget_old_jobs(r);
    return ibidi_ix_worker(r);
}

static void close_room(void *room) {
    ibidi_ix_room *r = room;
    if (!r) return;
    (void)pthread_mutex_lock(&r->mutex);
    r->closing = true;
    r->want = IBIDI_WANT_STOP;
    atomic_store(&r->stop_child, true);
    (void)pthread_cond_broadcast(&r->work);
    (void)pthread_cond_broadcast(&r->news);
    (void)pthread_mutex_unlock(&r->mutex);
    if (r->server) ibid_server_close(r->server);
    if (r->worker_runs) (void)pthread_join(r->worker, NULL);
    while (r->jobs) {
        ibidi_ix_job *j = r->jobs;
        r->jobs = j->next;
        ibidi_ix_job_free(j);
    }
    while (r->recent) ibidi_ix_room_forget(r, r->recent->id);
    if (r->kv) ibid_client_close(r->kv);
    if (r->attn) ibid_client_close(r->attn);
    if (r->ret) ibid_client_close(r->ret);
    if (r->store) ibid_store_close(r->store);
    (void)pthread_cond_destroy(&r->work);
    (void)pthread_cond_destroy(&r->news);
    (void)pthread_mutex_destroy(&r->mutex);
    ibid_free(r);
}

static ibid_err connect(const ibid_host_opts *o, const char *room, ibid_client **out) {
    char url[IBID_BUS_URL_MAX];
    ibid_err e = ibid_bus_url(o->data_dir, room, o->inproc, url);
    return e ? e : ibid_client_open(url, out);
}

static uint64_t env_bytes(const char *name, uint64_t def) {
    const char *s = getenv(name);
    char *end = NULL;
    uint64_t v = s && *s ? strtoull(s, &end, 10) : 0;
    return s && *s && end && !*end ? v : def;
}

static ibid_err open_room(const ibid_host_opts *o, void **room) {
    char url[IBID_BUS_URL_MAX];
    ibidi_ix_room *r = ibid_calloc(1, sizeof *r);
    if (!r) return ibid_fail(IBID_NOMEM, "out of memory for the indexer");
    (void)pthread_mutex_init(&r->mutex, NULL);
    (void)pthread_cond_init(&r->work, NULL);
    (void)pthread_cond_init(&r->news, NULL);
    r->cache_quota = env_bytes("IBID_FIND_CACHE_BYTES", (uint64_t)256 << 20);
    r->retry_ms = 10 * 60 * 1000;
    ibid_err e = IBID_OK;
    int n = snprintf(r->store_dir, sizeof r->store_dir, "%s/" IBID_STORE_FOLDER, o->data_dir);
    if (n < 0 || (size_t)n >= sizeof r->store_dir)
        e = ibid_fail(IBID_INVAL, "the data folder's path is too long");
    (void)snprintf(r->data_dir, sizeof r->data_dir, "%s", o->data_dir);
    if (!e) e = ibid_extract_program(r->program, sizeof r->program);
    if (!e) e = connect(o, "kvstore", &r->kv);
    if (!e) e = connect(o, "attention", &r->attn);
    if (!e) e = connect(o, "retriever", &r->ret);
    if (!e) e = ibid_bus_url(o->data_dir, "indexer", o->inproc, url);
    if (!e && pthread_create(&r->worker, NULL, work, r) != 0)
        e = ibid_fail(IBID_NOMEM, "the worker thread cannot be started");
    else if (!e)
        r->worker_runs = true;
    const ibid_server_opts so = {.url = url,
                                 .methods = methods,
                                 .n_methods = sizeof methods / sizeof *methods - 1,
                                 .room = r,
                                 .n_workers = o->workers ? o->workers : WORKERS,
                                 .name = "indexer"};
    if (!e) e = ibid_server_open(&so, &r->server);
    if (e)
        close_room(r);
    else
        *room = r;
    return e;
}

const ibid_room_vtable ibid_indexer_room = {"indexer", open_room, close_room};
