/* The reading half: snapshots, in any process. */
#include "kvstore/store_internal.h"
#include "rpc/base/clock.h"

#include <sys/mman.h>
#include <unistd.h>

#define ARENA_CAP ((size_t)4 << 30)

const char *ibid_doc_state_name(ibid_doc_state s) {
    switch (s) {
    case IBID_DOC_READY:
        return "ready";
    case IBID_DOC_PARTIAL:
        return "partial";
    case IBID_DOC_EMPTY:
        return "empty";
    case IBID_DOC_UNSUPPORTED:
        return "unsupported";
    case IBID_DOC_FAILED:
        return "failed";
    }
    return "unknown";
}

static ibid_err begin(ibid_snap *n) {
    ibid_err e = ibidi_txn_begin(n->store->env, false, &n->t);
    if (!e) e = ibidi_state_get(&n->t, &n->state);
    n->begun_ns = ibid_now_ns();
    if (e) ibidi_txn_abort(&n->t);
    return e;
}

ibid_err ibid_snap_begin(ibid_store *s, ibid_snap **out) {
    ibid_snap *n = ibid_calloc(1, sizeof *n);
    if (!n) return ibid_fail(IBID_NOMEM, "out of memory for a snapshot");
    n->store = s;
    ibid_err e = ibid_arena_open(ARENA_CAP, &n->arena);
    if (!e) e = begin(n);
    if (e)
        ibid_snap_end(n);
    else
        *out = n;
    return e;
}

ibid_err ibid_snap_renew(ibid_snap *n) {
    ibidi_txn_abort(&n->t);
    ibid_arena_reset(n->arena);
    return begin(n);
}

void ibid_snap_end(ibid_snap *n) {
    if (!n) return;
    ibidi_txn_abort(&n->t);
    ibid_arena_close(n->arena);
    ibid_free(n);
}

uint64_t ibid_snap_generation(const ibid_snap *n) {
    return n->state.generation;
}

/* An old snapshot keeps every page freed since from being used again. */
static ibid_err alive(const ibid_snap *n) {
    if (!n->t.mdb) return ibid_fail(IBID_BUSY, "the snapshot could not be renewed; begin another");
    if (ibid_now_ns() - n->begun_ns <= n->store->shared->snap_age_ns) return IBID_OK;
    return ibid_fail(IBID_BUSY,
                     "the snapshot is older than its cap; renew it and look blocks up again");
}

ibid_err ibid_snap_stats(ibid_snap *n, ibid_store_stats *out) {
    ibid_err e = alive(n);
    if (e) return e;
    const ibidi_state *s = &n->state;
    *out = (ibid_store_stats){.generation = s->generation,
                              .collections = s->collections,
                              .documents = s->documents,
                              .chunks = s->chunks,
                              .blocks = s->blocks,
                              .blocks_evicted = s->blocks_evicted,
                              .kv_bytes = s->kv_bytes,
                              .key_bytes = s->key_bytes,
                              .text_bytes = s->text_bytes,
                              .kv_budget = s->kv_budget,
                              .orphan_blocks = s->orphans};
    ibidi_env_info(n->store->env, &out->file_bytes, &out->map_size);
    return IBID_OK;
}

/* ---- Collections and documents ------------------------------------------------------------------
 */

ibid_err ibid_snap_collection(ibid_snap *n, ibid_str name, ibid_collection *out) {
    ibid_err e = alive(n);
    return e ? e : ibidi_collection_get(&n->t, name, out);
}

ibid_err ibid_snap_collection_by_number(ibid_snap *n, uint64_t number, ibid_collection *out) {
    ibid_err e = alive(n);
    return e ? e : ibidi_collection_by_number(&n->t, number, out);
}

/* The document must lie in `collection` (0 = any), whose name is filled in. */
static ibid_err document_full(ibid_snap *n, uint64_t number, uint64_t collection,
                              ibid_document *out) {
    ibidi_document d;
    ibid_collection c;
    ibid_err e = ibidi_document_get(&n->t, number, &d);
    if (e) return e;
    ibidi_key k = ibidi_key_1(number);
    if (collection && d.collection != collection) return ibidi_corrupt(IBIDI_DOCUMENT, k.b, k.n);
    e = ibidi_collection_by_number(&n->t, d.collection, &c);
    if (e == IBID_NOCOLLECTION) return ibidi_corrupt(IBIDI_DOCUMENT, k.b, k.n);
    if (e) return e;
    *out = d.d;
    out->collection = c.name;
    return IBID_OK;
}

ibid_err ibid_snap_document(ibid_snap *n, ibid_str collection, ibid_str id, ibid_document *out) {
    ibid_collection c;
    uint64_t number;
    ibid_err e = alive(n);
    if (!e) e = ibidi_collection_get(&n->t, collection, &c);
    if (!e) e = ibidi_document_lookup(&n->t, c.number, id, &number);
    if (e) return e;
    e = document_full(n, number, c.number, out);
    ibidi_key k = ibidi_document_id_key(c.number, id);
    bool wrong = !e && (out->id.n != id.n || memcmp(out->id.s, id.s, id.n) != 0);
    return e == IBID_NOTFOUND || wrong ? ibidi_corrupt(IBIDI_DOCUMENT_ID, k.b, k.n) : e;
}

ibid_err ibid_snap_document_by_number(ibid_snap *n, uint64_t number, ibid_document *out) {
    ibid_err e = alive(n);
    return e ? e : document_full(n, number, 0, out);
}

ibid_err ibid_snap_text(ibid_snap *n, uint64_t document, ibid_buf *out) {
    ibidi_document d;
    ibid_err e = alive(n);
    if (!e) e = ibidi_document_get(&n->t, document, &d);
    return e ? e : ibidi_text_get(&n->t, document, d.d.text_bytes, out);
}

ibid_err ibid_snap_chunks(ibid_snap *n, uint64_t document, const ibid_chunk **out, size_t *n_out) {
    ibidi_document d;
    ibid_chunk *c;
    ibid_err e = alive(n);
    if (!e) e = ibidi_document_get(&n->t, document, &d);
    if (!e) e = ibidi_chunks_get(&n->t, document, d.d.n_chunks, n->arena, &c);
    if (e) return e;
    *out = c;
    *n_out = d.d.n_chunks;
    return IBID_OK;
}

/* ---- Blocks -------------------------------------------------------------------------------------
 */

ibid_err ibid_snap_block(ibid_snap *n, uint64_t block, ibid_block *out) {
    ibidi_block_state st;
    ibid_err e = alive(n);
    if (!e) e = ibidi_block_get(&n->t, block, n->arena, out);
    if (!e) e = ibidi_block_state_get(&n->t, block, &st);
    if (!e) ibidi_block_state_show(&st, out);
    return e;
}

ibid_err ibid_snap_block_find(ibid_snap *n, const ibid_hash *hash, size_t n_title,
                              const int32_t *tokens, size_t n_tokens, ibid_block *out) {
    uint64_t number;
    ibid_err e = alive(n);
    if (!e) e = ibidi_block_number(&n->t, hash, &number);
    if (e == IBID_NOTFOUND) return ibid_fail(e, "no such block is stored");
    if (!e) e = ibid_snap_block(n, number, out);
    ibidi_key k = ibidi_key_hash(hash);
    if (e == IBID_NOTFOUND || (!e && ibid_hash_cmp(&out->hash, hash) != 0))
        return ibidi_corrupt(IBIDI_BLOCK_HASH, k.b, k.n);
    if (e) return e;
    if (out->n_title != n_title || out->n_tokens != n_tokens ||
        memcmp(out->tokens, tokens, n_tokens * sizeof *tokens) != 0)
        return ibid_fail(IBID_NOTFOUND, "a block with this hash has other tokens");
    return IBID_OK;
}

/* Header always, checksum on this process's first reading. The epoch tells a rewritten value apart.
 */
static ibid_err open_value(ibid_store *s, ibidi_slice v, uint64_t owner, uint64_t known_as,
                           uint64_t epoch, size_t layer, ibid_kv_view *out) {
    ibidi_verified *seen = s->shared->verified;
    bool deep = !ibidi_verified_has(seen, known_as, epoch, layer);
    uint64_t got_owner;
    size_t got_layer;
    ibid_err e = ibid_kv_value_open(v.p, v.n, deep, &got_owner, &got_layer, out);
    if (e) return e;
    if (got_owner != owner || got_layer != layer)
        return ibid_fail(
            IBID_CORRUPT, "the KV value of owner %llu, layer %zu says it is of %llu, %zu",
            (unsigned long long)owner, layer, (unsigned long long)got_owner, got_layer);
    if (deep) ibidi_verified_add(seen, known_as, epoch, layer);
    return IBID_OK;
}

/* Layers [layer0, layer1) of a block. */
static ibid_err places(ibid_snap *n, uint64_t block, size_t layer0, size_t layer1,
                       ibid_kv_place *out) {
    ibidi_block_state st;
    ibid_err e = alive(n);
    if (!e) e = ibidi_block_state_get(&n->t, block, &st);
    if (e) return e;
    if (st.n_layers == 0)
        return ibid_fail(IBID_NOTFOUND, "the KV of block %llu was evicted; encode it again",
                         (unsigned long long)block);
    if (layer1 > st.n_layers)
        return ibid_fail(IBID_NOTFOUND, "block %llu has %llu layers, not layer %zu",
                         (unsigned long long)block, (unsigned long long)st.n_layers, layer1 - 1);
    for (size_t layer = layer0; layer < layer1; layer++) {
        ibidi_key k = ibidi_key_u64_u16(block, layer);
        ibidi_slice v;
        e = ibidi_raw_get(&n->t, IBIDI_KV, &k, &v);
        if (e == IBID_NOTFOUND || (!e && v.n != st.value_size))
            return ibidi_corrupt(IBIDI_KV, k.b, k.n);
        if (e) return e;
        out[layer - layer0] = (ibid_kv_place){v.p, v.n, layer, block, st.epoch};
    }
    return IBID_OK;
}

ibid_err ibid_snap_kv_places(ibid_snap *n, uint64_t block, size_t n_layers, ibid_kv_place *out) {
    return places(n, block, 0, n_layers, out);
}

ibid_err ibid_kv_place_open(ibid_store *s, const ibid_kv_place *p, ibid_kv_view *out) {
    return open_value(s, (ibidi_slice){p->value, p->size}, p->block, p->block, p->epoch, p->layer,
                      out);
}

ibid_err ibid_snap_kv(ibid_snap *n, uint64_t block, size_t layer, ibid_kv_view *out) {
    ibid_kv_place p;
    if (layer >= SIZE_MAX) return ibid_fail(IBID_NOTFOUND, "no layer %zu", layer);
    ibid_err e = places(n, block, layer, layer + 1, &p);
    return e ? e : ibid_kv_place_open(n->store, &p, out);
}

/* Whole pages around [p, p + n). */
static size_t pages_of(const void *p, size_t n, void **first) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), at = (uintptr_t)p & ~(page - 1);
    *first = (void *)at;
    return ((uintptr_t)p + n - at + page - 1) / page;
}

size_t ibid_kv_place_missing(const ibid_kv_place *p) {
    unsigned char there[256];
    size_t page = (size_t)sysconf(_SC_PAGESIZE), missing = 0;
    void *first;
    size_t n = pages_of(p->value, p->size, &first);
    for (size_t i = 0; i < n; i += sizeof there) {
        size_t some = n - i < sizeof there ? n - i : sizeof there;
        if (mincore((unsigned char *)first + i * page, some * page, there) != 0) return 0;
        for (size_t k = 0; k < some; k++) missing += !(there[k] & 1);
    }
    return missing * page;
}

void ibid_kv_places_willneed(const ibid_kv_place *p, size_t n) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), len = 0;
    unsigned char *from = NULL;
    for (size_t i = 0; i < n; i++) {
        void *first;
        size_t bytes = pages_of(p[i].value, p[i].size, &first) * page;
        if (from && (unsigned char *)first == from + len) {
            len += bytes;
            continue;
        }
        if (from) (void)madvise(from, len, MADV_WILLNEED);
        from = first;
        len = bytes;
    }
    if (from) (void)madvise(from, len, MADV_WILLNEED);
}

ibid_err ibid_snap_prefix_kv(ibid_snap *n, const ibid_hash *prefix, size_t layer,
                             ibid_kv_view *out) {
    ibidi_slice v;
    ibid_err e = alive(n);
    if (e) return e;
    if (layer > UINT16_MAX) return ibid_fail(IBID_NOTFOUND, "no layer %zu", layer);
    ibidi_key k = ibidi_key_hash_u16(prefix, layer);
    e = ibidi_raw_get(&n->t, IBIDI_PREFIX, &k, &v);
    if (e == IBID_NOTFOUND) return ibid_fail(e, "this prefix has no KV at layer %zu", layer);
    uint64_t owner = ibidi_prefix_owner(prefix);
    /* Block numbers count up from 1, so a set top bit keeps prefixes apart from them. */
    return e ? e : open_value(n->store, v, owner, owner | (uint64_t)1 << 63, 1, layer, out);
}

ibid_err ibid_snap_keys(ibid_snap *n, uint64_t block, ibid_keys *out) {
    ibid_err e = alive(n);
    return e ? e : ibidi_keys_get(&n->t, block, out);
}

ibid_err ibid_snap_model(ibid_snap *n, const ibid_hash *fingerprint, ibid_model_record *out) {
    ibid_err e = alive(n);
    ibidi_key k = ibidi_key_hash(fingerprint);
    ibidi_rd r;
    if (!e) e = ibidi_get(&n->t, IBIDI_MODEL, &k, &r);
    if (e == IBID_NOTFOUND) return ibid_fail(e, "no such model; add it with ibid model add");
    return e ? e : ibidi_model_decode((ibidi_slice){k.b, k.n}, r, n->arena, out);
}

ibid_err ibid_snap_job(ibid_snap *n, uint64_t id, ibid_job *out) {
    ibid_err e = alive(n);
    ibidi_key k = ibidi_key_1(id);
    ibidi_rd r;
    if (!e) e = ibidi_get(&n->t, IBIDI_JOB, &k, &r);
    if (e == IBID_NOTFOUND) return ibid_fail(e, "no job %llu", (unsigned long long)id);
    return e ? e : ibidi_job_decode(id, r, out);
}

/* ---- Iterations ---------------------------------------------------------------------------------
 */

typedef struct each {
    ibid_snap *n;
    void *arg;
    union {
        ibid_err (*collection)(void *, const ibid_collection *);
        ibid_err (*model)(void *, const ibid_model_record *);
        ibid_err (*document)(void *, const ibid_document *);
        ibid_err (*use)(void *, uint64_t, uint64_t);
        ibid_err (*block)(void *, const ibid_block *);
        ibid_err (*change)(void *, const ibid_change *);
        ibid_err (*job)(void *, const ibid_job *);
    } fn;
    uint64_t number; /* the leading number of the keys walked, where there is one */
} each;

/* Rows from `from` on (NULL = the first) whose keys are key_n long (0 = any) and start with the
 * first `shared` bytes of from. */
static ibid_err walk(each *w, ibidi_table tab, const ibidi_key *from, size_t shared, size_t key_n,
                     ibid_err (*row)(each *, ibidi_slice key, ibidi_rd r)) {
    ibidi_cursor c;
    ibid_err e = alive(w->n);
    if (!e) e = ibidi_cursor_open(&w->n->t, tab, &c);
    if (e) return e;
    for (e = from ? ibidi_cursor_seek(&c, from) : ibidi_cursor_first(&c); !e;
         e = ibidi_cursor_next(&c)) {
        if (shared && (c.key.n < shared || memcmp(c.key.p, from->b, shared) != 0)) break;
        ibidi_rd r;
        e = key_n && c.key.n != key_n ? ibidi_corrupt(tab, c.key.p, c.key.n)
                                      : ibidi_cursor_record(&c, &r);
        if (!e) e = row(w, c.key, r);
        if (e) {
            ibidi_cursor_close(&c);
            return e; /* a NOTFOUND of the row's own stays one */
        }
        if ((e = alive(w->n))) break;
    }
    ibidi_cursor_close(&c);
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

static ibid_err row_collection(each *w, ibidi_slice key, ibidi_rd r) {
    ibid_collection c;
    ibid_err e = ibidi_collection_decode(key, r, &c);
    return e ? e : w->fn.collection(w->arg, &c);
}

ibid_err ibid_snap_each_collection(ibid_snap *n, ibid_err (*fn)(void *, const ibid_collection *),
                                   void *arg) {
    each w = {.n = n, .arg = arg, .fn.collection = fn};
    return walk(&w, IBIDI_COLLECTION, NULL, 0, 0, row_collection);
}

static ibid_err row_model(each *w, ibidi_slice key, ibidi_rd r) {
    ibid_model_record m;
    ibid_err e = ibidi_model_decode(key, r, w->n->arena, &m);
    return e ? e : w->fn.model(w->arg, &m);
}

ibid_err ibid_snap_each_model(ibid_snap *n, ibid_err (*fn)(void *, const ibid_model_record *),
                              void *arg) {
    each w = {.n = n, .arg = arg, .fn.model = fn};
    return walk(&w, IBIDI_MODEL, NULL, 0, IBID_HASH_SIZE, row_model);
}

static ibid_err row_member(each *w, ibidi_slice key, ibidi_rd r) {
    (void)r;
    ibid_document d;
    ibid_err e = document_full(w->n, ibidi_load64be(key.p + 8), w->number, &d);
    if (e == IBID_NOTFOUND) return ibidi_corrupt(IBIDI_MEMBER, key.p, key.n);
    return e ? e : w->fn.document(w->arg, &d);
}

ibid_err ibid_snap_each_document(ibid_snap *n, ibid_str collection, uint64_t after,
                                 ibid_err (*fn)(void *, const ibid_document *), void *arg) {
    ibid_collection c;
    ibid_err e = alive(n);
    if (!e) e = ibidi_collection_get(&n->t, collection, &c);
    if (e || after == UINT64_MAX) return e;
    each w = {.n = n, .arg = arg, .fn.document = fn, .number = c.number};
    ibidi_key k = ibidi_key_2(c.number, after + 1);
    return walk(&w, IBIDI_MEMBER, &k, 8, 16, row_member);
}

static ibid_err row_use(each *w, ibidi_slice key, ibidi_rd r) {
    (void)r;
    return w->fn.use(w->arg, ibidi_load64be(key.p + 8), ibidi_load64be(key.p + 16));
}

ibid_err ibid_snap_each_use(ibid_snap *n, uint64_t block,
                            ibid_err (*fn)(void *, uint64_t document, uint64_t chunk), void *arg) {
    each w = {.n = n, .arg = arg, .fn.use = fn};
    ibidi_key k = ibidi_key_3(block, 0, 0);
    return walk(&w, IBIDI_USE, &k, 8, 24, row_use);
}

static ibid_err row_block(each *w, ibidi_slice key, ibidi_rd r) {
    uint64_t number = ibidi_load64be(key.p);
    ibid_block b;
    ibidi_block_state st;
    ibid_err e = ibidi_block_decode(number, r, w->n->arena, &b);
    if (!e) e = ibidi_block_state_get(&w->n->t, number, &st);
    if (e == IBID_NOTFOUND) return ibidi_corrupt(IBIDI_BLOCK_STATE, key.p, key.n);
    if (e) return e;
    ibidi_block_state_show(&st, &b);
    return w->fn.block(w->arg, &b);
}

ibid_err ibid_snap_each_block(ibid_snap *n, ibid_err (*fn)(void *, const ibid_block *), void *arg) {
    each w = {.n = n, .arg = arg, .fn.block = fn};
    return walk(&w, IBIDI_BLOCK, NULL, 0, 8, row_block);
}

static ibid_err row_change(each *w, ibidi_slice key, ibidi_rd r) {
    uint64_t generation = ibidi_load64be(key.p);
    ibid_change c;
    if (generation != w->number + 1) return ibidi_corrupt(IBIDI_CHANGE, key.p, key.n);
    w->number = generation;
    ibid_err e = ibidi_change_decode(generation, r, w->n->arena, &c);
    return e ? e : w->fn.change(w->arg, &c);
}

ibid_err ibid_snap_each_change(ibid_snap *n, uint64_t after,
                               ibid_err (*fn)(void *, const ibid_change *), void *arg) {
    if (after < n->state.history_floor || after > n->state.generation)
        return ibid_fail(IBID_NOTFOUND,
                         "changes after generation %llu are not kept (%llu to %llu are); "
                         "rebuild from the documents",
                         (unsigned long long)after, (unsigned long long)n->state.history_floor,
                         (unsigned long long)n->state.generation);
    each w = {.n = n, .arg = arg, .fn.change = fn, .number = after};
    ibidi_key k = ibidi_key_1(after + 1);
    ibid_err e = walk(&w, IBIDI_CHANGE, &k, 0, 8, row_change);
    if (!e && w.number != n->state.generation) return ibidi_corrupt(IBIDI_CHANGE, k.b, k.n);
    return e;
}

static ibid_err row_job(each *w, ibidi_slice key, ibidi_rd r) {
    ibid_job j;
    ibid_err e = ibidi_job_decode(ibidi_load64be(key.p), r, &j);
    return e ? e : w->fn.job(w->arg, &j);
}

ibid_err ibid_snap_each_job(ibid_snap *n, ibid_err (*fn)(void *, const ibid_job *), void *arg) {
    each w = {.n = n, .arg = arg, .fn.job = fn};
    return walk(&w, IBIDI_JOB, NULL, 0, 8, row_job);
}
