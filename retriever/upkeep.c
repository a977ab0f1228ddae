/* Reindex, verify and status. */
#include "retriever/engine.h"
#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SAMPLE = 64 }; /* documents and blocks looked at closely */

typedef struct each {
    ibidi_retriever *r;
    ibid_str only; /* "" = every collection */
    ibidi_collection **c;
    size_t n, room;
} each;

static ibid_err take(void *arg, const ibid_collection *c) {
    each *a = arg;
    if (a->only.n && (a->only.n != c->name.n || memcmp(a->only.s, c->name.s, c->name.n) != 0))
        return IBID_OK;
    if (a->n == a->room) {
        size_t room = a->room ? a->room * 2 : 16;
        ibidi_collection **more = ibid_realloc(a->c, room * sizeof *more);
        if (!more) return ibid_fail(IBID_NOMEM, "out of memory for %zu collections", room);
        a->c = more;
        a->room = room;
    }
    ibid_err e = ibidi_engine_acquire(a->r, c, &a->c[a->n]);
    if (!e) a->n++;
    return e;
}

static ibid_err take_all(each *a, ibid_snap *snap) {
    ibid_err e = ibid_snap_each_collection(snap, take, a);
    if (!e && a->only.n && !a->n)
        e = ibid_fail(IBID_NOCOLLECTION, "there is no collection %.*s", (int)a->only.n, a->only.s);
    return e;
}

static void release_all(each *a) {
    for (size_t i = 0; i < a->n; i++) ibidi_engine_release(a->r, a->c[i]);
    ibid_free(a->c);
}

/* ---- Reindex ---- */
static ibid_err reindex(ibidi_retriever *r, ibidi_collection *c) {
    ibid_snap *snap = NULL;
    pthread_mutex_lock(&c->building);
    pthread_rwlock_wrlock(&c->lock);
    ibid_err e = ibidi_collection_forget(c);
    ibidi_keyindex_remove(c->dir);
    pthread_rwlock_unlock(&c->lock);
    pthread_mutex_unlock(&c->building);
    if (!e) e = ibidi_engine_snap(r, &snap);
    if (!e) e = ibidi_engine_current(r, c, snap);
    if (!e) pthread_rwlock_unlock(&c->lock);
    if (snap) ibid_snap_end(snap);
    return e ? e : ibidi_engine_keys(r, c);
}

ibid_err ibidi_retriever_reindex(ibidi_retriever *r, ibid_str collection) {
    each a = {.r = r, .only = collection};
    ibid_snap *snap = NULL;
    ibid_err e = ibidi_engine_snap(r, &snap);
    if (!e) e = take_all(&a, snap);
    if (snap) ibid_snap_end(snap);
    for (size_t i = 0; i < a.n && !e; i++) e = reindex(r, a.c[i]);
    release_all(&a);
    return e;
}

/* ---- Verify ---- */
typedef struct verify {
    ibidi_retriever *r;
    ibidi_collection *c;
    ibid_snap *snap;
    ibid_buf *faults;
    uint64_t *n;
} verify;

static void fault(const verify *v, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void fault(const verify *v, const char *fmt, ...) {
    char line[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    ++*v->n;
    (void)ibid_buf_printf(v->faults, "%s: %s\n", v->c->name, line);
}

typedef struct totals {
    uint64_t chunks;
    size_t n, seen;
    const verify *v;
    uint64_t sample[SAMPLE], sample_chunks[SAMPLE];
} totals;

/* A sample spread over the documents by a fixed stride pattern: the latest of every slot. */
static ibid_err count_document(void *arg, const ibid_document *d) {
    totals *t = arg;
    t->chunks += d->n_chunks;
    t->sample[t->seen % SAMPLE] = d->number;
    t->sample_chunks[t->seen % SAMPLE] = d->n_chunks;
    t->seen++;
    return IBID_OK;
}

static ibid_err verify_lexical(const verify *v) {
    totals t = {.v = v};
    uint64_t rows = 0;
    ibidi_collection *c = v->c;
    ibid_err e = ibidi_lexical_check(c->lexical);
    if (e == IBID_CORRUPT) {
        fault(v, "%s", ibid_err_detail());
        return IBID_OK;
    }
    if (!e)
        e = ibid_snap_each_document(v->snap, (ibid_str){c->name, strlen(c->name)}, 0,
                                    count_document, &t);
    if (!e) e = ibidi_lexical_rows(c->lexical, &rows);
    if (!e && rows != t.chunks)
        fault(v, "lexical index has %" PRIu64 " rows for %" PRIu64 " chunks", rows, t.chunks);
    for (size_t i = 0; i < SAMPLE && i < t.seen && !e; i++) {
        e = ibidi_lexical_document_rows(c->lexical, t.sample[i], &rows);
        if (!e && rows != t.sample_chunks[i])
            fault(v,
                  "lexical index has %" PRIu64 " rows for the %" PRIu64
                  " chunks of document %" PRIu64,
                  rows, t.sample_chunks[i], t.sample[i]);
    }
    return e;
}

static ibid_err verify_view(const verify *v) {
    ibidi_view *w = &v->c->view;
    for (size_t i = 0; i < w->n; i++) {
        ibid_block b;
        ibid_err e = ibid_snap_block(v->snap, w->blocks[i].block, &b);
        if (e == IBID_NOTFOUND)
            fault(v, "block %" PRIu64 " is searched but not stored", w->blocks[i].block);
        else if (e)
            return e;
    }
    return IBID_OK;
}

static ibid_err verify_keys(const verify *v) {
    ibidi_keyindex *x = NULL;
    uint64_t differ = 0;
    ibid_calibration *cal = ibid_alloc(sizeof *cal);
    if (!cal) return ibid_fail(IBID_NOMEM, "out of memory for a calibration");
    ibid_err e = IBID_NOTFOUND;
    if (ibidi_engine_calibration(v->snap, &v->c->model, cal)) {
        ibidi_keyindex_stamp want = {v->c->generation, cal->id, cal->dim};
        e = ibidi_keyindex_load(v->c->dir, &want, &x);
    }
    if (e == IBID_CORRUPT) fault(v, "%s", ibid_err_detail());
    if (!e) {
        uint64_t blocks = v->c->view.n / SAMPLE;
        e = ibidi_keyindex_compare(x, v->snap, blocks ? (size_t)blocks : 1, &differ);
        if (!e && differ)
            fault(v,
                  "key index differs from the stored keys in %" PRIu64 " of the blocks looked at",
                  differ);
    }
    ibidi_keyindex_close(x);
    ibid_free(cal);
    return e == IBID_NOTFOUND || e == IBID_MISMATCH || e == IBID_CORRUPT ? IBID_OK : e;
}

static ibid_err verify_one(verify *v) {
    ibid_err e = ibidi_engine_current(v->r, v->c, v->snap);
    if (e) return e;
    pthread_rwlock_unlock(&v->c->lock);
    pthread_mutex_lock(&v->c->building); /* keeps the key files still */
    pthread_rwlock_wrlock(&v->c->lock);  /* and the counts: nothing moves while they are compared */
    bool moved;
    e = ibid_snap_renew(v->snap);
    if (!e) e = ibidi_collection_catch_up(v->c, v->snap, &moved);
    if (!e) e = verify_view(v);
    if (!e) e = verify_lexical(v);
    if (!e) e = verify_keys(v);
    pthread_rwlock_unlock(&v->c->lock);
    pthread_mutex_unlock(&v->c->building);
    return e;
}

ibid_err ibidi_retriever_verify(ibidi_retriever *r, ibid_buf *faults, uint64_t *n_faults) {
    each a = {.r = r};
    verify v = {.r = r, .faults = faults, .n = n_faults};
    *n_faults = 0;
    ibid_err e = ibidi_engine_snap(r, &v.snap);
    if (!e) e = take_all(&a, v.snap);
    for (size_t i = 0; i < a.n && !e; i++) {
        v.c = a.c[i];
        e = ibid_snap_renew(v.snap);
        if (!e) e = verify_one(&v);
    }
    if (v.snap) ibid_snap_end(v.snap);
    release_all(&a);
    return e;
}

/* ---- Status ---- */
static void status_one(ibidi_retriever *r, ibidi_collection *c, ibid_enc *e) {
    uint64_t rows = 0;
    pthread_rwlock_rdlock(&c->lock);
    ibid_enc_map(e, NULL);
    ibid_enc_cstr(e, "name", c->name);
    ibid_enc_u64(e, "number", c->number);
    ibid_enc_u64(e, "generation", c->generation);
    ibid_enc_u64(e, "blocks", c->view.n);
    ibid_enc_u64(e, "tokens", c->view.tokens);
    ibidi_keyindex_facts keys = {.rows = 0};
    if (c->keys) keys = ibidi_keyindex_told(c->keys);
    ibid_enc_cstr(e, "search", ibidi_engine_scans(r, c) || !keys.cells ? "scan" : "index");
    if (c->lexical) {
        if (ibidi_lexical_rows(c->lexical, &rows) == IBID_OK) ibid_enc_u64(e, "lexical_rows", rows);
        ibid_enc_u64(e, "lexical_generation", ibidi_lexical_generation(c->lexical));
        ibid_enc_u64(e, "lexical_bytes", ibidi_lexical_bytes(c->lexical));
    }
    ibid_enc_u64(e, "keys_generation", keys.stamp.generation);
    ibid_enc_u64(e, "keys_rows", keys.rows);
    ibid_enc_u64(e, "keys_cells", keys.cells);
    ibid_enc_u64(e, "keys_extra", keys.extra_rows);
    ibid_enc_u64(e, "keys_dead", keys.dead_rows);
    ibid_enc_end(e);
    pthread_rwlock_unlock(&c->lock);
}

ibid_err ibidi_retriever_status(ibidi_retriever *r, ibid_enc *e) {
    each a = {.r = r};
    ibid_snap *snap = NULL;
    ibid_enc_cstr(e, "kernels", r->kernels->name);
    ibid_enc_u64(e, "threads", ibid_pool_size(r->pool));
    ibid_enc_u64(e, "exact_tokens", r->o.exact_tokens);
    ibid_err err = ibidi_engine_snap(r, &snap);
    if (!err) err = take_all(&a, snap);
    if (!err) ibid_enc_u64(e, "generation", ibid_snap_generation(snap));
    if (snap) ibid_snap_end(snap);
    ibid_enc_array(e, "collections");
    for (size_t i = 0; i < a.n; i++) status_one(r, a.c[i], e);
    ibid_enc_end(e);
    release_all(&a);
    return err == IBID_UNAVAIL ? IBID_OK : err;
}
