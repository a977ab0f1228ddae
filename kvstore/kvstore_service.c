/* The kvstore room: bus messages to the store's calls, and its housekeeping. */
#include "kvstore/kvstore_room.h"
#include "kvstore/store_internal.h"
#include "kvstore/wire.h"
#include "rpc/base/clock.h"
#include "rpc/bus/bus.h"

#include <limits.h>
#include <stdio.h>
#include <time.h>
#include <zstd.h>

enum {
    TICK_S = 2,
    REST_S = 60,            /* after housekeeping failed */
    FLUSH_S = 10,           /* use times are written this often */
    ORPHAN_MS = 120 * 1000, /* blocks put without a job get this long to be used */
    WORKERS = 4
};

typedef struct kvstore_room {
    ibid_store *store;
    ibid_server *server;
    pthread_t keeper;
    bool keeping, stop;
    pthread_mutex_t mu;
    pthread_cond_t wake;
} kvstore_room;

/* ---- Reading bodies. The schema has checked presence, types and caps; lengths are checked here.
 * ---- */

static ibid_str get_str(const ibid_val *m, const char *key) {
    ibid_str s = {"", 0};
    if (!ibid_get_str(m, key, &s.s, &s.n)) s = (ibid_str){"", 0};
    return s;
}

static ibid_str get_bin(const ibid_val *m, const char *key) {
    const void *p = NULL;
    size_t n = 0;
    return ibid_get_bin(m, key, &p, &n) ? (ibid_str){p, n} : (ibid_str){NULL, 0};
}

static ibid_err bad_length(const char *key) {
    return ibid_fail(IBID_PROTO, "field %s has a length that does not fit", key);
}

static ibid_err get_hash(const ibid_val *m, const char *key, ibid_hash *out) {
    ibid_str s = get_bin(m, key);
    if (s.n != sizeof out->b) return bad_length(key);
    memcpy(out->b, s.s, s.n);
    return IBID_OK;
}

/* Copied into the arena: bytes in a message have no alignment. */
static ibid_err get_u64s(const ibid_val *m, const char *key, ibid_arena *a, uint64_t **out,
                         size_t *n) {
    ibid_str s = get_bin(m, key);
    if (s.n % 8) return bad_length(key);
    *n = s.n / 8;
    *out = ibid_arena_alloc(a, s.n);
    if (!*out) return ibid_fail(IBID_NOMEM, "out of memory for a request");
    for (size_t i = 0; i < *n; i++) (*out)[i] = ibidi_load64((const uint8_t *)s.s + 8 * i);
    return IBID_OK;
}

static ibid_err get_tokens(const ibid_val *m, const char *key, ibid_arena *a, const int32_t **out,
                           size_t *n) {
    ibid_str s = get_bin(m, key);
    if (s.n % 4) return bad_length(key);
    *n = s.n / 4;
    int32_t *t = ibid_arena_alloc(a, s.n);
    if (!t) return ibid_fail(IBID_NOMEM, "out of memory for a request");
    for (size_t i = 0; i < *n; i++) t[i] = (int32_t)ibidi_load32((const uint8_t *)s.s + 4 * i);
    *out = t;
    return IBID_OK;
}

static ibid_err get_kv_type(const ibid_val *m, ibid_kv_type *out) {
    uint64_t v = ibid_get_u64(m, "kv_type", UINT64_MAX);
    if (v > IBID_KV_Q8_0) return ibid_fail(IBID_INVAL, "unknown KV type");
    *out = (ibid_kv_type)v;
    return IBID_OK;
}

/* "values": n_layers values of equal size, one after the other. */
static ibid_err get_values(const ibid_val *m, ibid_arena *a, size_t *n_layers, size_t *value_size,
                           const void *const **out) {
    ibid_str s = get_bin(m, "values");
    size_t n = ibid_get_u64(m, "n_layers", 0);
    if (n == 0 || n > UINT16_MAX || s.n == 0 || s.n % n) return bad_length("values");
    const void **v = ibid_arena_alloc(a, n * sizeof *v);
    if (!v) return ibid_fail(IBID_NOMEM, "out of memory for a request");
    for (size_t i = 0; i < n; i++) v[i] = s.s + i * (s.n / n);
    *n_layers = n;
    *value_size = s.n / n;
    *out = v;
    return IBID_OK;
}

/* ---- Handlers ---- */

static ibid_err on_collection_create(void *room, const ibid_call *c) {
    kvstore_room *r = room;
    ibid_hash model;
    ibid_err e = get_hash(c->body, "model", &model);
    return e ? e : ibid_store_collection_create(r->store, get_str(c->body, "name"), &model);
}

static ibid_err on_collection_drop(void *room, const ibid_call *c) {
    kvstore_room *r = room;
    return ibid_store_collection_drop(r->store, get_str(c->body, "name"));
}

static ibid_err with_arena(kvstore_room *r, const ibid_call *c,
                           ibid_err (*fn)(kvstore_room *, const ibid_call *, ibid_arena *)) {
    ibid_arena *a = NULL;
    ibid_err e = ibid_arena_open(IBID_BUS_MESSAGE_MAX, &a);
    if (!e) e = fn(r, c, a);
    ibid_arena_close(a);
    return e;
}

static ibid_err model_put(kvstore_room *r, const ibid_call *c, ibid_arena *a) {
    const ibid_val *b = c->body;
    ibid_model_record m = {.name = get_str(b, "name"),
                           .path = get_str(b, "path"),
                           .arch = get_str(b, "arch"),
                           .n_layers = ibid_get_u64(b, "n_layers", 0),
                           .n_heads = ibid_get_u64(b, "n_heads", 0),
                           .n_kv_heads = ibid_get_u64(b, "n_kv_heads", 0),
                           .head_dim = ibid_get_u64(b, "head_dim", 0),
                           .n_ctx = ibid_get_u64(b, "n_ctx", 0),
                           .n_vocab = ibid_get_u64(b, "n_vocab", 0),
                           .calibration = get_bin(b, "calibration"),
                           .gates = get_bin(b, "gates")};
    ibid_err e = get_hash(b, "fingerprint", &m.fingerprint);
    if (!e) e = get_hash(b, "prefix", &m.prefix);
    if (!e) e = get_hash(b, "calibration_id", &m.calibration_id);
    if (!e) e = get_kv_type(b, &m.kv_type);
    if (!e) e = get_tokens(b, "prefix_tokens", a, &m.prefix_tokens, &m.n_prefix_tokens);
    return e ? e : ibid_store_model_put(r->store, &m);
}

static ibid_err on_model_put(void *room, const ibid_call *c) {
    return with_arena(room, c, model_put);
}

static ibid_err prefix_put(kvstore_room *r, const ibid_call *c, ibid_arena *a) {
    ibid_hash prefix;
    size_t n = 0, size = 0;
    const void *const *values = NULL;
    ibid_err e = get_hash(c->body, "prefix", &prefix);
    if (!e) e = get_values(c->body, a, &n, &size, &values);
    return e ? e : ibid_store_prefix_put(r->store, &prefix, n, values, size);
}

static ibid_err on_prefix_put(void *room, const ibid_call *c) {
    return with_arena(room, c, prefix_put);
}

static ibid_err get_block(const ibid_val *m, ibid_arena *a, ibid_block_put *b) {
    *b = (ibid_block_put){.n_title = ibid_get_u64(m, "n_title", 0),
                          .job = ibid_get_u64(m, "job", 0)};
    ibid_err e = get_hash(m, "model", &b->model);
    if (!e) e = get_hash(m, "prefix", &b->prefix);
    if (!e) e = get_kv_type(m, &b->kv_type);
    if (!e) e = get_tokens(m, "tokens", a, &b->tokens, &b->n_tokens);
    if (!e && ibid_val_get(m, "values"))
        e = get_values(m, a, &b->n_layers, &b->value_size, &b->values);
    ibid_str keys = get_bin(m, "keys");
    if (e || keys.n == 0) return e;
    size_t bytes;
    b->keys = (const int8_t *)keys.s;
    b->keys_dim = ibid_get_u64(m, "keys_dim", 0);
    if (!ibid_mul_size(b->n_tokens, b->keys_dim, &bytes) || bytes != keys.n)
        return bad_length("keys");
    return get_hash(m, "calibration", &b->calibration);
}

static ibid_err blocks_put(kvstore_room *r, const ibid_call *c, ibid_arena *a) {
    const ibid_val *list = ibid_val_get(c->body, "blocks");
    size_t n = ibid_val_count(list);
    ibid_block_put *b = ibid_arena_alloc(a, n * sizeof *b);
    uint64_t *numbers = ibid_arena_alloc(a, n * sizeof *numbers);
    ibid_err e = b && numbers ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for a request");
    for (size_t i = 0; i < n && !e; i++) e = get_block(ibid_val_at(list, i), a, &b[i]);
    if (!e) e = ibid_store_blocks_put(r->store, b, n, numbers);
    if (e) return e;
    uint8_t *p = ibid_enc_bin_reserve(c->reply, "numbers", n * 8);
    for (size_t i = 0; p && i < n; i++) ibidi_store64(p + 8 * i, numbers[i]);
    return IBID_OK;
}

static ibid_err on_blocks_put(void *room, const ibid_call *c) {
    return with_arena(room, c, blocks_put);
}

static ibid_err blocks_hold(kvstore_room *r, const ibid_call *c, ibid_arena *a) {
    uint64_t *blocks;
    size_t n;
    ibid_err e = get_u64s(c->body, "blocks", a, &blocks, &n);
    return e ? e : ibid_store_blocks_hold(r->store, ibid_get_u64(c->body, "job", 0), blocks, n);
}

static ibid_err on_blocks_hold(void *room, const ibid_call *c) {
    return with_arena(room, c, blocks_hold);
}

static ibid_err on_keys_put(void *room, const ibid_call *c) {
    kvstore_room *r = room;
    ibid_hash calibration;
    ibid_str keys = get_bin(c->body, "keys");
    size_t n = ibid_get_u64(c->body, "n_tokens", 0), dim = ibid_get_u64(c->body, "dim", 0), bytes;
    ibid_err e = get_hash(c->body, "calibration", &calibration);
    if (!e && (!ibid_mul_size(n, dim, &bytes) || bytes != keys.n)) e = bad_length("keys");
    return e ? e
             : ibid_store_keys_put(r->store, &calibration, ibid_get_u64(c->body, "block", 0),
                                   (const int8_t *)keys.s, n, dim);
}

static ibid_err get_chunks(const ibid_val *m, ibid_arena *a, ibid_document_put *d) {
    ibid_str rows = get_bin(m, "chunks"), locators = get_bin(m, "locators");
    const uint8_t *p = (const uint8_t *)rows.s;
    if (rows.n % IBIDI_WIRE_CHUNK) return bad_length("chunks");
    size_t n = rows.n / IBIDI_WIRE_CHUNK, at = 0;
    ibid_chunk *c = ibid_arena_alloc(a, n * sizeof *c);
    if (!c) return ibid_fail(IBID_NOMEM, "out of memory for a request");
    for (size_t i = 0; i < n; i++, p += IBIDI_WIRE_CHUNK) {
        size_t len = ibidi_load32(p + 24);
        if (len > locators.n - at) return bad_length("locators");
        c[i] = (ibid_chunk){ibidi_load64(p), ibidi_load64(p + 8), {"", 0}, ibidi_load64(p + 16)};
        if (len) c[i].locator = (ibid_str){locators.s + at, len};
        at += len;
    }
    d->chunks = c;
    d->n_chunks = n;
    return at == locators.n ? IBID_OK : bad_length("locators");
}

/* A long text comes compressed; its claimed length is checked against the frame before it is
 * believed. */
static ibid_err get_text(const ibid_val *m, ibid_str *out, void **storage) {
    ibid_str frame = get_bin(m, "text_zstd");
    *out = get_bin(m, "text");
    if (frame.n == 0) return IBID_OK;
    uint64_t n = ibid_get_u64(m, "text_bytes", 0);
    if (n > IBIDI_WIRE_TEXT_MAX || ZSTD_getFrameContentSize(frame.s, frame.n) != n)
        return bad_length("text_zstd");
    *storage = ibid_alloc(n);
    if (!*storage)
        return ibid_fail(IBID_NOMEM, "out of memory for a text of %llu bytes",
                         (unsigned long long)n);
    if (ZSTD_decompress(*storage, n, frame.s, frame.n) != n) return bad_length("text_zstd");
    *out = (ibid_str){*storage, n};
    return IBID_OK;
}

static ibid_err document_put(kvstore_room *r, const ibid_call *c, ibid_arena *a) {
    const ibid_val *m = c->body;
    void *storage = NULL;
    uint64_t number = 0, generation = 0;
    ibid_document_put d = {.collection = get_str(m, "collection"),
                           .id = get_str(m, "id"),
                           .title = get_str(m, "title"),
                           .source = get_str(m, "source"),
                           .metadata = get_str(m, "metadata"),
                           .reason = get_str(m, "reason"),
                           .state = (ibid_doc_state)ibid_get_u64(m, "state", 0),
                           .job = ibid_get_u64(m, "job", 0)};
    ibid_err e = get_hash(m, "content", &d.content);
    if (!e) e = get_chunks(m, a, &d);
    if (!e) e = get_text(m, &d.text, &storage);
    if (!e) e = ibid_store_document_put(r->store, &d, &number, &generation);
    ibid_free(storage);
    if (e) return e;
    ibid_enc_u64(c->reply, "number", number);
    ibid_enc_u64(c->reply, "generation", generation);
    return IBID_OK;
}

static ibid_err on_document_put(void *room, const ibid_call *c) {
    return with_arena(room, c, document_put);
}

static ibid_err on_document_delete(void *room, const ibid_call *c) {
    kvstore_room *r = room;
    uint64_t generation = 0;
    ibid_err e = ibid_store_document_delete(r->store, get_str(c->body, "collection"),
                                            get_str(c->body, "id"), &generation);
    if (!e) ibid_enc_u64(c->reply, "generation", generation);
    return e;
}

static ibid_err on_job_put(void *room, const ibid_call *c) {
    kvstore_room *r = room;
    const ibid_val *m = c->body;
    uint64_t id = 0;
    ibid_job j = {.id = ibid_get_u64(m, "id", 0),
                  .kind = get_str(m, "kind"),
                  .collection = get_str(m, "collection"),
                  .state = get_str(m, "state"),
                  .stage = get_str(m, "stage"),
                  .spec = get_bin(m, "spec"),
                  .report = get_bin(m, "report"),
                  .error = (ibid_err)ibid_get_u64(m, "error", 0),
                  .error_text = get_str(m, "error_text")};
    ibid_err e = ibid_store_job_put(r->store, &j, &id);
    if (!e) ibid_enc_u64(c->reply, "id", id);
    return e;
}

static ibid_err on_job_delete(void *room, const ibid_call *c) {
    kvstore_room *r = room;
    return ibid_store_job_delete(r->store, ibid_get_u64(c->body, "id", 0));
}

static ibid_err touch(kvstore_room *r, const ibid_call *c, ibid_arena *a) {
    uint64_t *blocks;
    size_t n;
    ibid_err e = get_u64s(c->body, "blocks", a, &blocks, &n);
    if (!e) ibid_store_touch(r->store, blocks, n);
    return e;
}

static ibid_err on_touch(void *room, const ibid_call *c) {
    return with_arena(room, c, touch);
}

static ibid_err on_collect(void *room, const ibid_call *c) {
    kvstore_room *r = room;
    ibid_collected out;
    ibid_err e = ibid_store_collect(r->store, &out);
    if (e) return e;
    ibid_enc_u64(c->reply, "orphans", out.orphans);
    ibid_enc_u64(c->reply, "evicted", out.evicted);
    ibid_enc_u64(c->reply, "bytes", out.bytes);
    ibid_enc_bool(c->reply, "more", out.more);
    return IBID_OK;
}

static ibid_err on_set_budget(void *room, const ibid_call *c) {
    kvstore_room *r = room;
    return ibid_store_set_budget(r->store, ibid_get_u64(c->body, "kv_budget", 0));
}

static void add_line(void *arg, const char *fault) {
    ibid_buf *b = arg;
    size_t n = strlen(fault);
    if (b->cap - b->len <= n || ibid_buf_append(b, fault, n)) return;
    (void)ibid_buf_append(b, "\n", 1);
}

static ibid_err on_verify(void *room, const ibid_call *c) {
    kvstore_room *r = room;
    uint64_t faults = 0;
    ibid_buf text;
    ibid_buf_init(&text, IBIDI_WIRE_FAULTS_MAX);
    ibid_err e = ibid_store_verify(r->store, add_line, &text, &faults);
    if (!e) {
        ibid_enc_u64(c->reply, "n_faults", faults);
        ibid_enc_str(c->reply, "faults", text.data ? text.data : "", text.len);
    }
    ibid_buf_fini(&text);
    return e;
}

static const ibid_method methods[] = {
    {"kvstore.collection_create", on_collection_create},
    {"kvstore.collection_drop", on_collection_drop},
    {"kvstore.model_put", on_model_put},
    {"kvstore.prefix_put", on_prefix_put},
    {"kvstore.blocks_put", on_blocks_put},
    {"kvstore.blocks_hold", on_blocks_hold},
    {"kvstore.keys_put", on_keys_put},
    {"kvstore.document_put", on_document_put},
    {"kvstore.document_delete", on_document_delete},
    {"kvstore.job_put", on_job_put},
    {"kvstore.job_delete", on_job_delete},
    {"kvstore.touch", on_touch},
    {"kvstore.collect", on_collect},
    {"kvstore.set_budget", on_set_budget},
    {"kvstore.verify", on_verify},
    {NULL, NULL},
};

/* ---- Housekeeping ---- */

static bool has_work(kvstore_room *r) {
    ibid_snap *n = NULL;
    ibid_store_stats st;
    bool work = false;
    if (ibid_snap_begin(r->store, &n) == IBID_OK && ibid_snap_stats(n, &st) == IBID_OK)
        work = st.orphan_blocks > 0 || (st.kv_budget && st.kv_bytes > st.kv_budget);
    ibid_snap_end(n);
    return work;
}

/* Waits; true when the room closes. */
static bool rest(kvstore_room *r, int seconds) {
    struct timespec until;
    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += seconds;
    (void)pthread_mutex_lock(&r->mu);
    int rc = 0;
    while (!r->stop && rc == 0) rc = pthread_cond_timedwait(&r->wake, &r->mu, &until);
    bool stop = r->stop;
    (void)pthread_mutex_unlock(&r->mu);
    return stop;
}

static void *keep_house(void *arg) {
    kvstore_room *r = arg;
    uint64_t flushed = ibid_now_ns();
    int wait = TICK_S;
    while (!rest(r, wait)) {
        ibid_err e = IBID_OK;
        ibid_collected c = {.more = false};
        wait = TICK_S;
        ibidi_env_reader_check(r->store->env);
        if (ibid_ms_since(flushed) > FLUSH_S * 1000.0) {
            e = ibidi_touch_flush(r->store);
            flushed = ibid_now_ns();
        }
        if (!e && has_work(r)) e = ibidi_collect(r->store, ORPHAN_MS, &c);
        if (!e && c.orphans + c.evicted)
            ibid_log(IBID_LOG_INFO, "collected %llu blocks, evicted the KV of %llu, %llu bytes",
                     (unsigned long long)c.orphans, (unsigned long long)c.evicted,
                     (unsigned long long)c.bytes);
        if (e) ibid_log(IBID_LOG_WARN, "housekeeping failed: %s", ibid_err_detail());
        if (e)
            wait = REST_S;
        else if (c.more)
            wait = 0;
    }
    return NULL;
}

/* ---- The room ---- */

static void close_room(void *room) {
    kvstore_room *r = room;
    if (!r) return;
    ibid_server_close(r->server);
    if (r->keeping) {
        (void)pthread_mutex_lock(&r->mu);
        r->stop = true;
        (void)pthread_cond_broadcast(&r->wake);
        (void)pthread_mutex_unlock(&r->mu);
        (void)pthread_join(r->keeper, NULL);
    }
    ibid_store_close(r->store);
    (void)pthread_mutex_destroy(&r->mu);
    (void)pthread_cond_destroy(&r->wake);
    ibid_free(r);
}

static ibid_err open_room(const ibid_host_opts *o, void **room) {
    char dir[PATH_MAX], url[IBID_BUS_URL_MAX];
    kvstore_room *r = ibid_calloc(1, sizeof *r);
    if (!r) return ibid_fail(IBID_NOMEM, "out of memory for the kvstore room");
    (void)pthread_mutex_init(&r->mu, NULL);
    (void)pthread_cond_init(&r->wake, NULL);
    int n = snprintf(dir, sizeof dir, "%s/" IBID_STORE_FOLDER, o->data_dir);
    ibid_err e = n > 0 && (size_t)n < sizeof dir
                     ? IBID_OK
                     : ibid_fail(IBID_INVAL, "the data folder's path is too long");
    ibid_store_opts so = {.dir = dir, .map_size = o->map_size, .kv_budget = o->kv_budget};
    if (!e) e = ibid_store_open(&so, &r->store);
    if (!e) e = ibid_bus_url(o->data_dir, "kvstore", o->inproc, url);
    if (!e && pthread_create(&r->keeper, NULL, keep_house, r) != 0)
        e = ibid_fail(IBID_NOMEM, "cannot start the housekeeping thread");
    else if (!e)
        r->keeping = true;
    ibid_server_opts server = {.url = url,
                               .methods = methods,
                               .n_methods = sizeof methods / sizeof *methods - 1,
                               .room = r,
                               .n_workers = o->workers ? o->workers : WORKERS,
                               .name = "kvstore"};
    if (!e) e = ibid_server_open(&server, &r->server);
    if (e)
        close_room(r);
    else
        *room = r;
    return e;
}

const ibid_room_vtable ibid_kvstore_room = {"kvstore", open_room, close_room};
