/* Upkeep in the background: catching up after a notice, key index files, seals, dropped
 * collections. */
#include "retriever/engine.h"

#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Built again when this share of its rows is dead or when so many tokens are not in it yet, which
 * until then are searched exactly. */
enum { DEAD_SHARE = 5, EXTRA_SHARE = 16, EXTRA_LEAST = 65536, MIN_ROWS = 32768 };

/* ---- The key index ---- */

/* The blocks alone: an index is built from a copy, so that searches and catching up go on. */
static ibid_err copy_blocks(const ibidi_view *v, ibidi_view *out) {
    *out = (ibidi_view){.n = v->n, .room = v->n, .tokens = v->tokens};
    out->blocks = ibid_alloc(v->n * sizeof *out->blocks);
    if (!out->blocks) {
        *out = (ibidi_view){.n = 0};
        return ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", v->n);
    }
    for (size_t i = 0; i < v->n; i++)
        out->blocks[i] =
            (ibidi_live){.block = v->blocks[i].block, .n_tokens = v->blocks[i].n_tokens};
    return IBID_OK;
}

static bool worn(const ibidi_retriever *r, const ibidi_keyindex *x) {
    ibidi_keyindex_facts f = ibidi_keyindex_told(x);
    uint64_t least = r->o.keys.extra_rows ? r->o.keys.extra_rows : EXTRA_LEAST;
    return f.dead_rows * DEAD_SHARE > f.rows ||
           (f.extra_rows > least && f.extra_rows * EXTRA_SHARE > f.rows);
}

static bool of_stamp(const ibidi_keyindex *x, const ibidi_keyindex_stamp *want) {
    ibidi_keyindex_stamp s = ibidi_keyindex_told(x).stamp;
    return s.dim == want->dim && ibid_hash_cmp(&s.calibration, &want->calibration) == 0;
}

static ibid_err build(ibidi_retriever *r, const ibidi_collection *c, ibid_snap *snap,
                      const ibidi_keyindex_stamp *stamp, const ibidi_view *view,
                      ibidi_keyindex **out) {
    uint64_t start = ibid_now_ns();
    ibid_err e = ibidi_keyindex_build(&r->o.keys, stamp, snap, view, c->dir, out);
    if (e) return e;
    ibidi_keyindex_facts f = ibidi_keyindex_told(*out);
    ibid_log(IBID_LOG_INFO,
             "key index of %s built: %" PRIu64 " tokens, %zu cells, %zu probes, %.0f ms", c->name,
             f.rows, f.cells, f.probes, ibid_ms_since(start));
    return IBID_OK;
}

/* From the file if it is sound, else anew. */
static ibid_err load_or_build(ibidi_retriever *r, const ibidi_collection *c, ibid_snap *snap,
                              const ibidi_keyindex_stamp *stamp, const ibidi_view *view,
                              ibidi_keyindex **out) {
    ibid_err e = ibidi_keyindex_load(c->dir, stamp, out);
    if (!e && !(e = ibidi_keyindex_sync(*out, view)) && !worn(r, *out)) return IBID_OK;
    if (!e) {
        ibidi_keyindex_close(*out);
        *out = NULL;
    } else if (e == IBID_CORRUPT || e == IBID_MISMATCH)
        ibid_log(IBID_LOG_WARN, "key index of %s is thrown away and built again: %s", c->name,
                 ibid_err_detail());
    else if (e != IBID_NOTFOUND)
        return e;
    return build(r, c, snap, stamp, view, out);
}

/* Meanwhile blocks may have come and gone: the new index learns of them before anyone sees it. */
static ibid_err swap(ibidi_collection *c, ibidi_keyindex *x) {
    ibidi_keyindex *old = x;
    pthread_rwlock_wrlock(&c->lock);
    ibid_err e = x ? ibidi_keyindex_sync(x, &c->view) : IBID_OK;
    if (!e) {
        old = c->keys;
        c->keys = x;
    }
    pthread_rwlock_unlock(&c->lock);
    ibidi_keyindex_close(old);
    return e;
}

ibid_err ibidi_engine_keys(ibidi_retriever *r, ibidi_collection *c) {
    uint64_t least = r->o.keys.min_rows ? r->o.keys.min_rows : MIN_ROWS;
    ibid_snap *snap = NULL;
    ibidi_view view = {.n = 0}; /* copy */
    ibidi_keyindex *x = NULL;
    ibid_calibration *cal = ibid_alloc(sizeof *cal);
    if (!cal) return ibid_fail(IBID_NOMEM, "out of memory for a calibration");
    pthread_mutex_lock(&c->building);
    ibid_err e = ibidi_engine_snap(r, &snap);
    if (!e) e = ibidi_engine_current(r, c, snap);
    if (e) goto done;
    bool calibrated = ibidi_engine_calibration(snap, &c->model, cal);
    ibidi_keyindex_stamp stamp = {c->generation, cal->id, calibrated ? cal->dim : 0};
    bool wanted = calibrated && c->view.tokens >= least;
    bool stale = wanted && (!c->keys || !of_stamp(c->keys, &stamp) || worn(r, c->keys));
    bool drop = !wanted && c->keys;
    bool fresh = stale && c->keys; /* the file is the one that is worn */
    if (stale) e = copy_blocks(&c->view, &view);
    pthread_rwlock_unlock(&c->lock);
    if (!e && drop) {
        e = swap(c, NULL);
        ibidi_keyindex_remove(c->dir);
    }
    if (e || !stale) goto done;
    e = ibid_snap_renew(snap);
    if (!e)
        e = fresh ? build(r, c, snap, &stamp, &view, &x)
                  : load_or_build(r, c, snap, &stamp, &view, &x);
    if (!e) e = swap(c, x);
done:
    pthread_mutex_unlock(&c->building);
    ibidi_view_fini(&view);
    if (snap) ibid_snap_end(snap);
    ibid_free(cal);
    return e;
}

/* ---- All collections ---- */
typedef struct list {
    ibidi_retriever *r;
    ibidi_collection *c[1024];
    size_t n;
    uint64_t numbers[1024];
} list;

static ibid_err take(void *arg, const ibid_collection *c) {
    list *l = arg;
    if (l->n == sizeof l->c / sizeof *l->c) return IBID_OK;
    ibid_err e = ibidi_engine_acquire(l->r, c, &l->c[l->n]);
    if (!e) l->numbers[l->n++] = c->number;
    return e;
}

static void remove_dir(const char *path) {
    char file[IBIDI_DIR_MAX + 300];
    DIR *d = opendir(path);
    if (!d) return;
    for (struct dirent *e; (e = readdir(d));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) {
            if (snprintf(file, sizeof file, "%s/%s", path, e->d_name) < (int)sizeof file)
                unlink(file);
        }
    closedir(d);
    rmdir(path);
}

static bool listed(const list *l, uint64_t number) {
    for (size_t i = 0; i < l->n; i++)
        if (l->numbers[i] == number) return true;
    return false;
}

/* Derived state of collections that the store no longer has. */
static void sweep(ibidi_retriever *r, const list *l) {
    char path[IBIDI_DIR_MAX + 300];
    pthread_mutex_lock(&r->mu);
    for (size_t i = 0; i < r->n_slots;) {
        if (r->slots[i].refs || listed(l, r->slots[i].c->number)) {
            i++;
            continue;
        }
        ibidi_collection_close(r->slots[i].c);
        r->slots[i] = r->slots[--r->n_slots];
    }
    DIR *d = opendir(r->index_dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        char *end;
        uint64_t number = strtoull(e->d_name, &end, 10);
        bool open = false;
        if (e->d_name[0] < '0' || e->d_name[0] > '9' || *end || listed(l, number)) continue;
        for (size_t i = 0; i < r->n_slots; i++) open |= r->slots[i].c->number == number;
        if (open) continue;
        if (snprintf(path, sizeof path, "%s/%s", r->index_dir, e->d_name) < (int)sizeof path)
            remove_dir(path);
    }
    if (d) closedir(d);
    pthread_mutex_unlock(&r->mu);
}

static ibid_err upkeep(ibidi_retriever *r, ibidi_collection *c, bool now, bool *pending) {
    ibid_snap *snap = NULL;
    ibid_err e = ibidi_engine_snap(r, &snap);
    if (!e) e = ibidi_engine_current(r, c, snap);
    uint64_t changed_ns = 0;
    if (!e) {
        changed_ns = c->changed_ns;
        pthread_rwlock_unlock(&c->lock);
    }
    if (snap) ibid_snap_end(snap);
    if (e) return e;
    if (!now && ibid_ms_since(changed_ns) < (double)r->o.quiet_ms) {
        *pending = true;
        return IBID_OK;
    }
    pthread_rwlock_wrlock(&c->lock);
    if (c->lexical) e = ibidi_lexical_seal(c->lexical);
    pthread_rwlock_unlock(&c->lock);
    return e ? e : ibidi_engine_keys(r, c);
}

static bool stopping(ibidi_retriever *r) {
    pthread_mutex_lock(&r->mu);
    bool stop = r->stop;
    pthread_mutex_unlock(&r->mu);
    return stop;
}

static ibid_err round_of_upkeep(ibidi_retriever *r, bool now, bool *pending) {
    ibid_snap *snap = NULL;
    ibid_err e = IBID_OK;
    list *l = ibid_calloc(1, sizeof *l);
    if (!l) return ibid_fail(IBID_NOMEM, "out of memory for upkeep");
    l->r = r;
    *pending = false;
    e = ibidi_engine_snap(r, &snap);
    if (!e) e = ibid_snap_each_collection(snap, take, l);
    if (snap) ibid_snap_end(snap);
    if (!e && l->n < sizeof l->c / sizeof *l->c) sweep(r, l);
    for (size_t i = 0; i < l->n; i++) {
        if (!e && !stopping(r)) e = upkeep(r, l->c[i], now, pending);
        ibidi_engine_release(r, l->c[i]);
    }
    ibid_free(l);
    return e;
}

ibid_err ibidi_retriever_settle(ibidi_retriever *r) {
    bool pending;
    return round_of_upkeep(r, true, &pending);
}

static void *keep(void *arg) {
    ibidi_retriever *r = arg;
    bool pending = false;
    pthread_mutex_lock(&r->mu);
    while (!r->stop) {
        if (!r->notified) {
            struct timespec until;
            clock_gettime(CLOCK_MONOTONIC, &until);
            until.tv_sec += pending ? 1 : 30;
            pthread_cond_timedwait(&r->wake, &r->mu, &until);
        }
        if (r->stop) break;
        r->notified = false;
        pthread_mutex_unlock(&r->mu);
        ibid_err e = round_of_upkeep(r, false, &pending);
        if (e == IBID_UNAVAIL || e == IBID_NOCOLLECTION)
            pending = true; /* no store yet */
        else if (e)
            ibid_log(IBID_LOG_WARN, "upkeep: %s: %s", ibid_err_code(e), ibid_err_detail());
        pthread_mutex_lock(&r->mu);
    }
    pthread_mutex_unlock(&r->mu);
    return NULL;
}

ibid_err ibidi_engine_keeper_start(ibidi_retriever *r) {
    r->notified = true;
    if (pthread_create(&r->keeper, NULL, keep, r) != 0)
        return ibid_fail(IBID_BACKEND, "cannot start a thread");
    r->keeping = true;
    return IBID_OK;
}

void ibidi_engine_keeper_stop(ibidi_retriever *r) {
    if (!r->keeping) return;
    pthread_mutex_lock(&r->mu);
    r->stop = true;
    pthread_cond_signal(&r->wake);
    pthread_mutex_unlock(&r->mu);
    pthread_join(r->keeper, NULL);
    r->keeping = false;
}
