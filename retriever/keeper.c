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

enum { DEAD_SHARE = 5, EXTEND_SHARE = 2 }; /* of the rows: rebuild above 1/5 dead, 1/2 new */

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

typedef struct keys_work {
    ibidi_retriever *r;
    ibidi_collection *c;
    ibid_snap *snap;
    ibidi_view view; /* copy */
    ibidi_keyindex_stamp stamp;
    bool scans;
} keys_work;

/* What of the view the index has not got, and what it has too much. */
static void drift(const ibidi_keyindex *x, const ibidi_view *v, uint64_t *missing, uint64_t *dead) {
    *missing = 0;
    for (size_t i = 0; i < v->n; i++)
        if (!ibidi_keyindex_has(x, v->blocks[i].block)) *missing += v->blocks[i].n_tokens;
    *dead = ibidi_keyindex_dead_rows(x, v);
}

static ibid_err build(keys_work *w, ibidi_keyindex **out) {
    uint64_t start = ibid_now_ns();
    ibid_err e = ibidi_keyindex_build(&w->r->o.keys, &w->stamp, w->snap, &w->view, out);
    if (!e)
        ibid_log(IBID_LOG_INFO, "key index of %s built: %s, %" PRIu64 " rows, %.0f ms", w->c->name,
                 ibidi_keyindex_kind(*out), ibidi_keyindex_rows(*out), ibid_ms_since(start));
    return e;
}

/* From the file if it is sound and near enough, else anew. *write: the file must be written. */
static ibid_err load_or_build(keys_work *w, ibidi_keyindex **out, bool *write) {
    uint64_t missing, dead;
    *write = false;
    ibid_err e = ibidi_keyindex_load(w->c->dir, &w->stamp, &w->r->o.keys, out);
    if (!e) {
        drift(*out, &w->view, &missing, &dead);
        if (!missing && !dead) return IBID_OK;
        *write = true;
        if (missing * EXTEND_SHARE < ibidi_keyindex_trained_rows(*out) &&
            dead * DEAD_SHARE < ibidi_keyindex_rows(*out))
            return ibidi_keyindex_extend(*out, w->snap, &w->view, w->stamp.generation);
        ibidi_keyindex_close(*out);
        *out = NULL;
    } else if (e == IBID_CORRUPT || e == IBID_MISMATCH)
        ibid_log(IBID_LOG_WARN, "key index of %s is thrown away and built again: %s", w->c->name,
                 ibid_err_detail());
    else if (e != IBID_NOTFOUND)
        return e;
    *write = true;
    return build(w, out);
}

static void describe(ibidi_collection *c, const ibidi_keyindex *x) {
    c->keys_rows = ibidi_keyindex_rows(x);
    c->keys_calibration = ibidi_keyindex_stamped(x)->calibration;
    snprintf(c->keys_kind, sizeof c->keys_kind, "%s", ibidi_keyindex_kind(x));
}

/* A collection that is scanned whole needs the file only for the day it grows: made and let go. */
static ibid_err make_file(keys_work *w) {
    ibidi_keyindex *x = NULL;
    bool write;
    ibid_err e = load_or_build(w, &x, &write);
    if (!e && write) e = ibidi_keyindex_save(x, w->c->dir);
    pthread_rwlock_wrlock(&w->c->lock);
    if (!e) {
        describe(w->c, x);
        w->c->keys_generation = w->stamp.generation;
    }
    ibidi_keyindex_close(w->c->keys); /* it shrank: no longer searched with */
    w->c->keys = NULL;
    pthread_rwlock_unlock(&w->c->lock);
    ibidi_keyindex_close(x);
    return e;
}

/* The index a large collection is searched with: extended in place, or built aside and swapped. */
static ibid_err refresh_resident(keys_work *w) {
    ibidi_collection *c = w->c;
    ibidi_keyindex *x = NULL;
    uint64_t missing = 0, dead = 0;
    bool write = true, usable = false;
    ibid_err e = IBID_OK;
    if (c->keys) { /* only this function replaces it, and `building` is held */
        const ibidi_keyindex_stamp *s = ibidi_keyindex_stamped(c->keys);
        drift(c->keys, &w->view, &missing, &dead);
        usable = s->dim == w->stamp.dim &&
                 ibid_hash_cmp(&s->calibration, &w->stamp.calibration) == 0 &&
                 missing * EXTEND_SHARE < ibidi_keyindex_trained_rows(c->keys) &&
                 dead * DEAD_SHARE < ibidi_keyindex_rows(c->keys);
    }
    if (!c->keys)
        e = load_or_build(w, &x, &write);
    else if (!usable)
        e = build(w, &x);
    if (e) return e;
    pthread_rwlock_wrlock(&c->lock);
    if (x) {
        ibidi_keyindex_close(c->keys);
        c->keys = x;
    } else
        e = ibidi_keyindex_extend(c->keys, w->snap, &w->view, w->stamp.generation);
    describe(c, c->keys);
    pthread_rwlock_unlock(&c->lock);
    pthread_rwlock_rdlock(&c->lock);
    if (!e && write) e = ibidi_keyindex_save(c->keys, c->dir);
    pthread_rwlock_unlock(&c->lock);
    if (e) return e;
    pthread_rwlock_wrlock(&c->lock);
    c->keys_generation = w->stamp.generation;
    pthread_rwlock_unlock(&c->lock);
    return IBID_OK;
}

ibid_err ibidi_engine_keys(ibidi_retriever *r, ibidi_collection *c) {
    keys_work w = {.r = r, .c = c};
    ibid_calibration *cal = ibid_alloc(sizeof *cal);
    if (!cal) return ibid_fail(IBID_NOMEM, "out of memory for a calibration");
    pthread_mutex_lock(&c->building);
    ibid_err e = ibidi_engine_snap(r, &w.snap);
    if (!e) e = ibidi_engine_current(r, c, w.snap);
    if (e) goto done;
    bool calibrated = ibidi_engine_calibration(w.snap, &c->model, cal);
    bool stale = !c->keys_generation || c->keys_generation < c->changed ||
                 (calibrated && ibid_hash_cmp(&c->keys_calibration, &cal->id) != 0) ||
                 (!c->keys && !ibidi_engine_scans(r, c));
    w.scans = ibidi_engine_scans(r, c);
    w.stamp = (ibidi_keyindex_stamp){c->generation, cal->id, cal->dim};
    if (calibrated && stale && c->view.n) e = copy_blocks(&c->view, &w.view);
    pthread_rwlock_unlock(&c->lock);
    if (e || !calibrated || !stale || !w.view.n) goto done;
    if (!(e = ibid_snap_renew(w.snap))) e = w.scans ? make_file(&w) : refresh_resident(&w);
done:
    pthread_mutex_unlock(&c->building);
    ibidi_view_fini(&w.view);
    if (w.snap) ibid_snap_end(w.snap);
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
    if (!e) pthread_rwlock_unlock(&c->lock);
    if (snap) ibid_snap_end(snap);
    if (e) return e;
    if (!now && ibid_ms_since(c->changed_ns) < (double)r->o.quiet_ms) {
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
