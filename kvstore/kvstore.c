/* Handles, the frame of every writing call, and the small tables: collections, models, prefixes,
 * jobs. */
#include "kvstore/store_internal.h"
#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <ctype.h>
#include <stdio.h>

#define WRITE_ARENA_CAP ((size_t)4 << 30)

enum { TEXT_FIELD_MAX = 32 * 1024 * 1024, PREFIX_TOKENS_MAX = 65536 };

/* ---- Handles ------------------------------------------------------------------------------------
 */

static ibid_err set_budget(ibidi_writer *w, void *arg) {
    w->st.kv_budget = *(const uint64_t *)arg;
    return IBID_OK;
}

/* The state must be readable before anyone gets a handle; a new writer's budget is the one in
 * force. */
static ibid_err greet(ibid_store *s, const ibid_store_opts *o, bool first_writer) {
    ibidi_txn t;
    ibidi_state st;
    ibid_err e = ibidi_txn_begin(s->env, false, &t);
    if (e) return e;
    e = ibidi_state_get(&t, &st);
    ibidi_txn_abort(&t);
    if (!e && first_writer && st.kv_budget != o->kv_budget)
        e = ibid_store_set_budget(s, o->kv_budget);
    return e;
}

ibid_err ibid_store_open(const ibid_store_opts *o, ibid_store **out) {
    if (!o->dir || !*o->dir) return ibid_fail(IBID_INVAL, "the store needs a folder");
    ibid_store *s = ibid_calloc(1, sizeof *s);
    if (!s) return ibid_fail(IBID_NOMEM, "out of memory for a store");
    bool first = false;
    s->readonly = o->readonly;
    ibid_err e = ibidi_env_acquire(o->dir, !o->readonly, o->map_size, &s->env, &first);
    if (e) {
        ibid_free(s);
        return e;
    }
    s->shared = ibidi_env_shared(s->env);
    e = greet(s, o, first);
    /* A full disk must not keep the writer from opening: reading and deleting go on. */
    if (e == IBID_DISKFULL) {
        ibid_log(IBID_LOG_WARN, "the KV budget could not be recorded: %s", ibid_err_detail());
        e = IBID_OK;
    }
    if (e)
        ibid_store_close(s);
    else
        *out = s;
    return e;
}

void ibid_store_close(ibid_store *s) {
    if (!s) return;
    if (!s->readonly && ibidi_touch_flush(s) != IBID_OK)
        ibid_log(IBID_LOG_WARN, "use times were not written: %s", ibid_err_detail());
    ibidi_env_release(s->env, !s->readonly);
    ibid_free(s);
}

uint64_t ibidi_clock(ibid_store *s) {
    uint64_t now = ibid_wall_ms();
    (void)pthread_mutex_lock(&s->shared->mu);
    if (now > s->shared->clock_ms) s->shared->clock_ms = now;
    now = s->shared->clock_ms;
    (void)pthread_mutex_unlock(&s->shared->mu);
    return now;
}

/* ---- The frame of a writing call ----------------------------------------------------------------
 */

static ibid_err attempt(ibidi_writer *w, ibidi_write_fn fn, void *arg) {
    ibid_err e = ibidi_txn_begin(w->store->env, true, &w->t);
    if (e) return e;
    ibidi_state before;
    e = ibidi_state_get(&w->t, &w->st);
    before = w->st;
    if (!e) e = fn(w, arg);
    if (!e && memcmp(&before, &w->st, sizeof before) != 0) e = ibidi_state_put(&w->t, &w->st);
    if (!e) return ibidi_txn_commit(&w->t);
    ibidi_txn_abort(&w->t);
    return e;
}

/* Tries to make the environment good again at once; else the next writing call does. Keeps the
 * detail of the failure that led here. */
static void recover(ibid_store *s, ibid_err e) {
    char why[1024];
    (void)snprintf(why, sizeof why, "%s", ibid_err_detail());
    ibid_log(IBID_LOG_ERROR, "a write failed, nothing was changed: %s", why);
    ibidi_env_break(s->env);
    if (ibidi_env_heal(s->env) != IBID_OK)
        ibid_log(IBID_LOG_ERROR, "the store does not take writes: %s", ibid_err_detail());
    (void)ibid_fail(e, "%s", why);
}

ibid_err ibidi_write(ibid_store *s, ibidi_write_fn fn, void *arg) {
    if (s->readonly)
        return ibid_fail(IBID_INVAL, "this handle only reads; writes go to ibid-kvstore");
    ibidi_writer w = {.store = s};
    ibid_err e = ibid_arena_open(WRITE_ARENA_CAP, &w.arena);
    if (e) return e;
    (void)pthread_mutex_lock(&s->shared->write_mu);
    ibidi_env_reader_check(s->env);
    for (int tries = 0;; tries++) {
        if ((e = ibidi_env_heal(s->env))) break;
        ibid_arena_reset(w.arena);
        e = attempt(&w, fn, arg);
        if (!e || !w.t.map_full || tries) break;
        if ((e = ibidi_env_grow(s->env))) break;
        ibid_log(IBID_LOG_INFO, "the store's map grew");
    }
    if (e && w.t.failed) recover(s, e);
    (void)pthread_mutex_unlock(&s->shared->write_mu);
    ibid_arena_close(w.arena);
    return e;
}

ibid_err ibid_store_set_budget(ibid_store *s, uint64_t kv_budget) {
    return ibidi_write(s, set_budget, &kv_budget);
}

/* ---- Collections --------------------------------------------------------------------------------
 */

static ibid_err name_check(ibid_str name) {
    bool ok = name.n >= 1 && name.n <= IBIDI_NAME_MAX;
    for (size_t i = 0; ok && i < name.n; i++)
        ok = isalnum((unsigned char)name.s[i]) ? (unsigned char)name.s[i] < 128
                                               : strchr("._-", name.s[i]) && name.s[i] != '\0';
    return ok ? IBID_OK
              : ibid_fail(IBID_INVAL,
                          "a collection's name has 1 to 64 of the letters A-Z a-z 0-9 . _ -");
}

typedef struct collection_args {
    ibid_str name;
    const ibid_hash *model;
} collection_args;

static ibid_err collection_create(ibidi_writer *w, void *arg) {
    const collection_args *a = arg;
    ibid_collection c;
    ibid_err e = ibidi_collection_get(&w->t, a->name, &c);
    if (!e)
        return ibid_fail(IBID_EXISTS, "there is a collection \"%.*s\" already", (int)a->name.n,
                         a->name.s);
    if (e != IBID_NOCOLLECTION) return e;
    ibidi_key k = ibidi_key_hash(a->model);
    ibidi_rd r;
    e = ibidi_get(&w->t, IBIDI_MODEL, &k, &r);
    if (e == IBID_NOTFOUND)
        return ibid_fail(e, "no such model; add it before its first collection");
    if (e) return e;
    c = (ibid_collection){.name = a->name,
                          .model = *a->model,
                          .number = w->st.next_collection++,
                          .created_ms = ibid_wall_ms()};
    w->st.collections++;
    return ibidi_collection_put(&w->t, &c);
}

ibid_err ibid_store_collection_create(ibid_store *s, ibid_str name, const ibid_hash *model) {
    ibid_err e = name_check(name);
    return e ? e : ibidi_write(s, collection_create, &(collection_args){name, model});
}

static ibid_err collection_drop(ibidi_writer *w, void *arg) {
    const collection_args *a = arg;
    ibid_collection c;
    ibid_err e = ibidi_collection_get(&w->t, a->name, &c);
    if (!e) e = ibidi_documents_drop(w, &c);
    ibidi_key k = ibidi_key_str(a->name), no = ibidi_key_1(c.number);
    if (!e) e = ibidi_del(&w->t, IBIDI_COLLECTION, &k);
    if (!e) e = ibidi_del(&w->t, IBIDI_COLLECTION_NO, &no);
    if (!e) w->st.collections--;
    return e;
}

ibid_err ibid_store_collection_drop(ibid_store *s, ibid_str name) {
    return ibidi_write(s, collection_drop, &(collection_args){name, NULL});
}

/* ---- Models and prefixes ------------------------------------------------------------------------
 */

static ibid_err model_put(ibidi_writer *w, void *arg) {
    return ibidi_model_write(&w->t, arg);
}

ibid_err ibid_store_model_put(ibid_store *s, const ibid_model_record *m) {
    if (m->name.n == 0 || m->name.n > 4096 || m->path.n > 65536 || m->arch.n > 4096 ||
        m->calibration.n > TEXT_FIELD_MAX || m->gates.n > TEXT_FIELD_MAX || m->n_prefix_tokens > PREFIX_TOKENS_MAX ||
        (unsigned)m->kv_type > IBID_KV_Q8_0)
        return ibid_fail(IBID_INVAL,
                         "a model record needs a name, a known KV type and sane lengths");
    ibid_model_record copy = *m;
    return ibidi_write(s, model_put, &copy);
}

typedef struct prefix_args {
    const ibid_hash *prefix;
    size_t n_layers, value_size;
    const void *const *values;
    const ibid_kv_shape *shape;
} prefix_args;

/* A prefix is named by its content: one that is whole already is kept. */
static bool prefix_is_whole(ibidi_txn *t, const prefix_args *a) {
    for (size_t layer = 0; layer < a->n_layers; layer++) {
        ibidi_key k = ibidi_key_hash_u16(a->prefix, layer);
        ibidi_slice v;
        ibid_kv_view view;
        if (ibidi_raw_get(t, IBIDI_PREFIX, &k, &v) != IBID_OK || v.n != a->value_size ||
            ibid_kv_value_open(v.p, v.n, true, NULL, NULL, &view) != IBID_OK ||
            view.type != a->shape->type || view.n_tokens != a->shape->n_tokens)
            return false;
    }
    return true;
}

static ibid_err prefix_put(ibidi_writer *w, void *arg) {
    const prefix_args *a = arg;
    if (prefix_is_whole(&w->t, a)) return IBID_OK;
    for (size_t layer = 0; layer < a->n_layers; layer++) {
        ibidi_key k = ibidi_key_hash_u16(a->prefix, layer);
        void *room = NULL;
        ibid_err e = ibidi_raw_reserve(&w->t, IBIDI_PREFIX, &k, a->value_size, &room);
        if (e) return e;
        memcpy(room, a->values[layer], a->value_size);
        e = ibid_kv_value_seal(a->shape, ibidi_prefix_owner(a->prefix), layer, room, a->value_size);
        if (e) return e;
    }
    return IBID_OK;
}

ibid_err ibid_store_prefix_put(ibid_store *s, const ibid_hash *prefix, size_t n_layers,
                               const void *const *values, size_t value_size) {
    if (n_layers == 0 || n_layers > UINT16_MAX)
        return ibid_fail(IBID_INVAL, "a prefix has 1 to 65535 layers, not %zu", n_layers);
    ibid_kv_shape shape = {.n_tokens = 0};
    for (size_t layer = 0; layer < n_layers; layer++) {
        ibid_kv_view v;
        size_t at;
        ibid_err e = ibid_kv_value_open(values[layer], value_size, true, NULL, &at, &v);
        if (e) return e;
        if (at != layer)
            return ibid_fail(IBID_INVAL, "layer %zu's value says layer %zu", layer, at);
        if (layer && (v.type != shape.type || v.n_tokens != shape.n_tokens ||
                      v.n_kv_heads != shape.n_kv_heads || v.head_dim != shape.head_dim))
            return ibid_fail(IBID_INVAL, "a prefix's layers differ in shape");
        shape = (ibid_kv_shape){v.type, v.n_tokens, v.n_kv_heads, v.head_dim};
    }
    return ibidi_write(s, prefix_put, &(prefix_args){prefix, n_layers, value_size, values, &shape});
}

/* ---- Jobs ---------------------------------------------------------------------------------------
 */

static ibid_err job_get(ibidi_txn *t, uint64_t id, ibid_job *out) {
    ibidi_key k = ibidi_key_1(id);
    ibidi_rd r;
    ibid_err e = ibidi_get(t, IBIDI_JOB, &k, &r);
    if (e == IBID_NOTFOUND) return ibid_fail(e, "no job %llu", (unsigned long long)id);
    return e ? e : ibidi_job_decode(id, r, out);
}

ibid_err ibidi_job_live(ibidi_txn *t, uint64_t job) {
    ibid_job j;
    ibid_err e = job_get(t, job, &j);
    if (!e && ibidi_job_ended(&j))
        return ibid_fail(IBID_CANCELLED, "job %llu has ended", (unsigned long long)job);
    return e;
}

typedef struct job_args {
    const ibid_job *job;
    uint64_t id;
} job_args;

static ibid_err job_put(ibidi_writer *w, void *arg) {
    job_args *a = arg;
    ibid_job j = *a->job, old;
    ibid_err e = IBID_OK;
    j.updated_ms = ibid_wall_ms();
    if (j.id == 0) {
        j.id = w->st.next_job++;
        j.created_ms = j.updated_ms;
    } else {
        if ((e = job_get(&w->t, j.id, &old))) return e;
        j.created_ms = old.created_ms;
    }
    e = ibidi_job_write(&w->t, &j);
    if (!e && ibidi_job_ended(&j)) e = ibidi_holds_end(w, j.id);
    a->id = j.id;
    return e;
}

ibid_err ibid_store_job_put(ibid_store *s, const ibid_job *j, uint64_t *id) {
    if (j->kind.n == 0 || j->state.n == 0 || j->kind.n > 64 || j->state.n > 64 || j->stage.n > 64 ||
        j->collection.n > IBIDI_NAME_MAX || j->spec.n > TEXT_FIELD_MAX ||
        j->report.n > TEXT_FIELD_MAX || j->error_text.n > 65536)
        return ibid_fail(IBID_INVAL, "a job needs a kind, a state and sane lengths");
    job_args a = {.job = j};
    ibid_err e = ibidi_write(s, job_put, &a);
    if (!e && id) *id = a.id;
    return e;
}

static ibid_err job_delete(ibidi_writer *w, void *arg) {
    uint64_t id = *(const uint64_t *)arg;
    ibid_job old;
    ibid_err e = job_get(&w->t, id, &old);
    ibidi_key k = ibidi_key_1(id);
    if (!e) e = ibidi_del(&w->t, IBIDI_JOB, &k);
    return e ? e : ibidi_holds_end(w, id);
}

ibid_err ibid_store_job_delete(ibid_store *s, uint64_t id) {
    return ibidi_write(s, job_delete, &id);
}
