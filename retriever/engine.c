#include "retriever/engine.h"

#include "retriever/candidates.h"
#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { POOL_TOKENS = 32768 }; /* fewer are scanned faster by one thread */

/* ---- Opening ---- */
ibid_err ibidi_retriever_open(const ibidi_retriever_opts *o, ibidi_retriever **out) {
    ibidi_retriever *r = ibid_calloc(1, sizeof *r);
    if (!r) return ibid_fail(IBID_NOMEM, "out of memory for the retriever");
    r->o = *o;
    if (!r->o.exact_tokens) r->o.exact_tokens = 2000000;
    if (!r->o.quiet_ms) r->o.quiet_ms = 3000;
    ibid_err e = IBID_OK;
    if (snprintf(r->data_dir, sizeof r->data_dir, "%s", o->data_dir) >= (int)sizeof r->data_dir)
        e = ibid_fail(IBID_INVAL, "path too long: %s", o->data_dir);
    r->o.data_dir = r->data_dir;
    snprintf(r->index_dir, sizeof r->index_dir, "%s/index", r->data_dir);
    const char *kernels = o->kernels && *o->kernels ? o->kernels : NULL;
    if (!e) e = ibid_kernels_get(kernels, &r->kernels);
    if (!e) e = ibidi_candidate_cache_open(&r->candidates);
    if (!e) e = ibid_pool_open(o->threads, &r->pool);
    if (e) {
        ibidi_candidate_cache_close(r->candidates);
        ibid_free(r);
        return e;
    }
    if (!r->o.keys.threads)
        r->o.keys.threads = (ibid_pool_size(r->pool) + 1) / 2; /* others search */
    r->o.keys.kernels = r->kernels;
    pthread_mutex_init(&r->pool_mu, NULL);
    pthread_mutex_init(&r->mu, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&r->wake, &attr);
    pthread_condattr_destroy(&attr);
    *out = r;
    return IBID_OK;
}

void ibidi_retriever_close(ibidi_retriever *r) {
    if (!r) return;
    ibidi_engine_keeper_stop(r);
    for (size_t i = 0; i < r->n_slots; i++) ibidi_collection_close(r->slots[i].c);
    ibid_free(r->slots);
    ibidi_candidate_cache_close(r->candidates);
    if (r->store) ibid_store_close(r->store);
    ibid_pool_close(r->pool);
    pthread_mutex_destroy(&r->pool_mu);
    pthread_mutex_destroy(&r->mu);
    pthread_cond_destroy(&r->wake);
    ibid_free(r);
}

ibid_err ibidi_engine_snap(ibidi_retriever *r, ibid_snap **out) {
    char dir[4112];
    ibid_err e = IBID_OK;
    pthread_mutex_lock(&r->mu);
    if (!r->store) {
        snprintf(dir, sizeof dir, "%s/" IBID_STORE_FOLDER, r->data_dir);
        ibid_store_opts o = {.dir = dir, .readonly = true, .map_size = r->o.map_size};
        e = ibid_store_open(&o, &r->store);
        if (e == IBID_NOTFOUND)
            e = ibid_fail(IBID_UNAVAIL, "the store %s does not exist yet; is ibid-kvstore running?",
                          dir);
    }
    pthread_mutex_unlock(&r->mu);
    return e ? e : ibid_snap_begin(r->store, out);
}

/* ---- Collections ---- */
static ibidi_slot *slot_of(ibidi_retriever *r, uint64_t number) {
    for (size_t i = 0; i < r->n_slots; i++)
        if (r->slots[i].c->number == number) return &r->slots[i];
    return NULL;
}

static ibid_err slot_open(ibidi_retriever *r, const ibid_collection *c, ibidi_slot **out) {
    if (r->n_slots == r->room_slots) {
        size_t room = r->room_slots ? r->room_slots * 2 : 8;
        ibidi_slot *more = ibid_realloc(r->slots, room * sizeof *more);
        if (!more) return ibid_fail(IBID_NOMEM, "out of memory for %zu collections", room);
        r->slots = more;
        r->room_slots = room;
    }
    ibidi_slot *s = &r->slots[r->n_slots];
    *s = (ibidi_slot){NULL, 0};
    ibid_err e = ibidi_collection_open(r->index_dir, c, &s->c);
    if (e) return e;
    r->n_slots++;
    *out = s;
    return IBID_OK;
}

ibid_err ibidi_engine_acquire(ibidi_retriever *r, const ibid_collection *c,
                              ibidi_collection **out) {
    ibid_err e = IBID_OK;
    pthread_mutex_lock(&r->mu);
    ibidi_slot *s = slot_of(r, c->number);
    if (!s) e = slot_open(r, c, &s);
    if (!e) {
        s->refs++;
        *out = s->c;
    }
    pthread_mutex_unlock(&r->mu);
    return e;
}

void ibidi_engine_release(ibidi_retriever *r, ibidi_collection *c) {
    if (!c) return;
    pthread_mutex_lock(&r->mu);
    ibidi_slot *s = slot_of(r, c->number);
    if (s) s->refs--;
    pthread_mutex_unlock(&r->mu);
}

static bool is_current(const ibidi_collection *c, ibid_snap *snap) {
    uint64_t g = ibid_snap_generation(snap);
    return c->loaded && c->lexical && c->generation == g &&
           ibidi_lexical_generation(c->lexical) == g;
}

ibid_err ibidi_engine_current(ibidi_retriever *r, ibidi_collection *c, ibid_snap *snap) {
    ibid_err e = IBID_OK;
    bool moved, any = false;
    for (int i = 0; !e; i++) {
        pthread_rwlock_rdlock(&c->lock);
        if (c->loaded && c->generation > ibid_snap_generation(snap)) e = ibid_snap_renew(snap);
        /* While documents stream in, the store moves on all the time: what was true at the
         * request's start is in, and whatever is newer does no harm. */
        if (!e && (is_current(c, snap) || (i >= 4 && c->loaded && c->lexical))) break;
        pthread_rwlock_unlock(&c->lock);
        if (e) break;
        pthread_rwlock_wrlock(&c->lock);
        e = ibidi_collection_catch_up(c, snap, &moved);
        any = any || moved;
        pthread_rwlock_unlock(&c->lock);
    }
    if (any) ibidi_retriever_notify(r);
    return e;
}

ibid_err ibidi_engine_repair(ibidi_retriever *r, ibidi_collection *c, ibid_snap *snap) {
    bool moved;
    pthread_rwlock_unlock(&c->lock);
    pthread_rwlock_wrlock(&c->lock);
    ibid_log(IBID_LOG_WARN, "lexical index of %s is thrown away and built again: %s", c->name,
             ibid_err_detail());
    ibid_err e = ibidi_lexical_reset(c->lexical);
    if (!e) e = ibidi_collection_catch_up(c, snap, &moved);
    pthread_rwlock_unlock(&c->lock);
    if (!e) e = ibidi_engine_current(r, c, snap);
    if (e) pthread_rwlock_rdlock(&c->lock);
    return e;
}

bool ibidi_engine_scans(const ibidi_retriever *r, const ibidi_collection *c) {
    return c->view.tokens <= r->o.exact_tokens;
}

ibid_err ibidi_engine_score(ibidi_retriever *r, const ibidi_collection *c, ibid_snap *snap,
                            const ibidi_asking *q, const uint64_t *blocks, size_t n, float *scores,
                            size_t *scored) {
    if (n < POOL_TOKENS / 128 || ibid_pool_size(r->pool) == 1)
        return ibidi_maxsim_blocks(r->kernels, NULL, snap, c->keys, q, blocks, n, scores, scored);
    pthread_mutex_lock(&r->pool_mu);
    ibid_err e =
        ibidi_maxsim_blocks(r->kernels, r->pool, snap, c->keys, q, blocks, n, scores, scored);
    pthread_mutex_unlock(&r->pool_mu);
    return e;
}

ibid_err ibidi_engine_candidates(ibidi_retriever *r, const ibidi_collection *c,
                                 const ibidi_asking *q, size_t probes, uint64_t *blocks, size_t max,
                                 size_t *n, bool *all) {
    pthread_mutex_lock(&r->pool_mu);
    ibid_err e =
        ibidi_keyindex_candidates(c->keys, r->kernels, r->pool, q, probes, blocks, max, n, all);
    pthread_mutex_unlock(&r->pool_mu);
    return e;
}

bool ibidi_engine_calibration(ibid_snap *snap, const ibid_hash *model, ibid_calibration *out) {
    static const ibid_hash none;
    ibid_model_record m;
    if (ibid_snap_model(snap, model, &m) != IBID_OK || !m.calibration.n ||
        ibid_hash_cmp(&m.calibration_id, &none) == 0)
        return false;
    return ibid_calibration_decode_brief(m.calibration.s, m.calibration.n, &m.calibration_id,
                                         out) == IBID_OK &&
           out->dim > 0;
}

/* ---- The question ---- */
void ibidi_question_get(ibidi_retriever *r, const ibid_hash *model, ibid_str text,
                        ibidi_question *out) {
    *out = (ibidi_question){.usable = false};
    if (!r->o.hooks.question_keys) {
        out->why = "no attention room";
        return;
    }
    ibid_err e = r->o.hooks.question_keys(r->o.hooks.arg, model, text, &out->keys);
    if (e) {
        ibid_log(IBID_LOG_WARN, "searching words only: %s: %s", ibid_err_code(e),
                 ibid_err_detail());
        out->keys = (ibid_question_keys){.ids = NULL};
        out->why = "the attention room gave no keys for the question";
    } else if (out->keys.dim == 0)
        out->why = "the model has no retrieval head; run ibid model calibrate";
    else if (out->keys.n == 0 || out->keys.dim % 32)
        out->why = "the question has no tokens that could be searched with";
    else
        out->usable = true;
}

ibid_err ibidi_question_weigh(ibidi_question *q, const ibidi_view *v) {
    if (!q->usable) return IBID_OK;
    if (!q->weights) q->weights = ibid_alloc(q->keys.n * sizeof *q->weights);
    if (!q->weights) return ibid_fail(IBID_NOMEM, "out of memory for a question");
    double sum;
    ibidi_view_idf(v, q->keys.ids, q->keys.n, q->weights, &sum);
    q->asking = (ibidi_asking){.ids = q->keys.ids,
                               .keys = q->keys.keys,
                               .n = q->keys.n,
                               .dim = q->keys.dim,
                               .calibration = q->keys.calibration,
                               .weights = q->weights,
                               .sum = sum > 0 ? sum : 1};
    return IBID_OK;
}

void ibidi_question_fini(ibidi_question *q) {
    ibid_free(q->keys.ids);
    ibid_free(q->weights);
    *q = (ibidi_question){.usable = false};
}

void ibidi_retriever_notify(ibidi_retriever *r) {
    pthread_mutex_lock(&r->mu);
    r->notified = true;
    pthread_cond_signal(&r->wake);
    pthread_mutex_unlock(&r->mu);
}
