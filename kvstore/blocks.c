/* Blocks: content-addressed put, holds, token keys, use times, collection of orphans and eviction.
 */
#include "kvstore/store_internal.h"
#include "rpc/base/log.h"

#include <stdlib.h>

enum {
    LAYOUT_VERSION = 2, /* of the KV value and of local positions; part of a block's identity */
    TOKENS_MAX = 65536,
    KEYS_DIM_MAX = 65536,
    BATCH_MAX = 65536, /* blocks in one call */
    COLLECT_MAX = 256, /* blocks deleted, and blocks evicted, in one transaction */
    TOUCH_MAX = 8192   /* use times kept in memory before they are written */
};

ibid_hash ibid_block_hash(const ibid_hash *model, const ibid_hash *prefix, ibid_kv_type type,
                          size_t n_title, const int32_t *tokens, size_t n_tokens) {
    static const char tenant[] = "", rope[] = "local-after-prefix";
    ibid_hasher h;
    ibid_hasher_init(&h);
    ibid_hasher_field(&h, tenant, 0);
    ibid_hasher_field(&h, model->b, sizeof model->b);
    ibid_hasher_u64(&h, (uint64_t)type);
    ibid_hasher_u64(&h, LAYOUT_VERSION);
    ibid_hasher_field(&h, rope, sizeof rope - 1);
    ibid_hasher_field(&h, prefix->b, sizeof prefix->b);
    ibid_hasher_u64(&h, n_title);
    ibid_hasher_field(&h, tokens, n_tokens * sizeof *tokens);
    return ibid_hasher_final(&h);
}

/* ---- Counts, and the tables that follow from them
 * ------------------------------------------------ */

static ibid_err mark(ibidi_writer *w, ibidi_table tab, const ibidi_key *k, bool was, bool is) {
    if (was == is) return IBID_OK;
    return is ? ibidi_put(&w->t, tab, k, NULL, 0) : ibidi_del(&w->t, tab, k);
}

static ibid_err gone_wrong(ibid_err e, ibidi_table tab, const ibidi_key *k) {
    return e == IBID_NOTFOUND ? ibidi_corrupt(tab, k->b, k->n) : e;
}

ibid_err ibidi_block_update(ibidi_writer *w, uint64_t number, const ibidi_block_state *old,
                            const ibidi_block_state *now) {
    bool was_orphan = old && old->refcount == 0 && old->holds == 0;
    bool is_orphan = now && now->refcount == 0 && now->holds == 0;
    ibidi_key k = ibidi_key_1(number);
    ibid_err e = gone_wrong(mark(w, IBIDI_ORPHAN, &k, was_orphan, is_orphan), IBIDI_ORPHAN, &k);
    if (e) return e;
    bool had = old && old->n_layers, has = now && now->n_layers;
    if (had && (!has || now->last_use_ms != old->last_use_ms)) {
        ibidi_key lru = ibidi_key_2(old->last_use_ms, number);
        if ((e = gone_wrong(ibidi_del(&w->t, IBIDI_LRU, &lru), IBIDI_LRU, &lru))) return e;
    }
    if (has && (!had || now->last_use_ms != old->last_use_ms)) {
        ibidi_key lru = ibidi_key_2(now->last_use_ms, number);
        if ((e = ibidi_put(&w->t, IBIDI_LRU, &lru, NULL, 0))) return e;
    }
    ibidi_state *st = &w->st;
    st->orphans += (uint64_t)is_orphan - (uint64_t)was_orphan;
    st->blocks += (uint64_t)(now != NULL) - (uint64_t)(old != NULL);
    st->blocks_evicted += (uint64_t)(now && !has) - (uint64_t)(old && !had);
    st->kv_bytes +=
        (has ? now->n_layers * now->value_size : 0) - (had ? old->n_layers * old->value_size : 0);
    st->key_bytes += (now ? now->key_bytes : 0) - (old ? old->key_bytes : 0);
    return now ? ibidi_block_state_put(&w->t, number, now)
               : ibidi_del(&w->t, IBIDI_BLOCK_STATE, &k);
}

ibid_err ibidi_hold_take(ibidi_writer *w, uint64_t job, uint64_t block, ibidi_block_state *st) {
    ibidi_key k = ibidi_key_2(job, block);
    ibidi_rd r;
    if (job == 0) return IBID_OK;
    ibid_err e = ibidi_get(&w->t, IBIDI_HOLD, &k, &r);
    if (e != IBID_NOTFOUND) return e; /* held already: one hold per job and block */
    st->holds++;
    return ibidi_put(&w->t, IBIDI_HOLD, &k, NULL, 0);
}

ibid_err ibidi_hold_drop(ibidi_writer *w, uint64_t job, uint64_t block, ibidi_block_state *st) {
    ibidi_key k = ibidi_key_2(job, block);
    if (job == 0) return IBID_OK;
    ibid_err e = ibidi_del(&w->t, IBIDI_HOLD, &k);
    if (e) return e == IBID_NOTFOUND ? IBID_OK : e;
    if (st->holds == 0) return ibidi_corrupt(IBIDI_HOLD, k.b, k.n);
    st->holds--;
    return IBID_OK;
}

ibid_err ibidi_holds_end(ibidi_writer *w, uint64_t job) {
    for (;;) {
        ibidi_cursor c;
        ibidi_key k = ibidi_key_2(job, 0);
        ibid_err e = ibidi_cursor_open(&w->t, IBIDI_HOLD, &c);
        if (e) return e;
        e = ibidi_cursor_seek(&c, &k);
        bool mine = !e && c.key.n == 16 && ibidi_load64be(c.key.p) == job;
        uint64_t block = mine ? ibidi_load64be(c.key.p + 8) : 0;
        ibidi_cursor_close(&c);
        if (e == IBID_NOTFOUND || (!e && !mine)) return IBID_OK;
        ibidi_block_state old, now;
        if (!e) e = ibidi_block_state_get(&w->t, block, &old);
        if (e) return gone_wrong(e, IBIDI_HOLD, &k);
        now = old;
        e = ibidi_hold_drop(w, job, block, &now);
        if (!e) e = ibidi_block_update(w, block, &old, &now);
        if (e) return e;
    }
}

/* ---- Putting ------------------------------------------------------------------------------------
 */

typedef struct put_args {
    const ibid_block_put *b;
    const ibid_kv_shape *shapes; /* of the values, read from their headers */
    const ibid_hash *hashes;
    size_t n;
    uint64_t *numbers;
    uint64_t now_ms;
} put_args;

static bool same_block(const ibid_block *have, const ibid_block_put *b) {
    return have->kv_type == b->kv_type && have->n_title == b->n_title &&
           have->n_tokens == b->n_tokens && ibid_hash_cmp(&have->model, &b->model) == 0 &&
           ibid_hash_cmp(&have->prefix, &b->prefix) == 0 &&
           memcmp(have->tokens, b->tokens, b->n_tokens * sizeof *b->tokens) == 0;
}

/* The block with this hash, or a new one. A hash alone is never believed. */
static ibid_err find_or_add(ibidi_writer *w, const put_args *a, size_t i, uint64_t *number,
                            ibidi_block_state *st, bool *fresh) {
    const ibid_block_put *b = &a->b[i];
    ibid_err e = ibidi_block_number(&w->t, &a->hashes[i], number);
    *fresh = e == IBID_NOTFOUND;
    if (e && !*fresh) return e;
    if (*fresh) {
        *number = w->st.next_block++;
        *st = (ibidi_block_state){.refcount = 0};
        ibid_block rec = {.number = *number,
                          .hash = a->hashes[i],
                          .model = b->model,
                          .prefix = b->prefix,
                          .kv_type = b->kv_type,
                          .n_tokens = b->n_tokens,
                          .n_title = b->n_title,
                          .tokens = b->tokens};
        return ibidi_block_write(&w->t, &rec);
    }
    ibid_block have;
    ibidi_key k = ibidi_key_hash(&a->hashes[i]);
    e = ibidi_block_get(&w->t, *number, w->arena, &have);
    if (!e) e = ibidi_block_state_get(&w->t, *number, st);
    if (e) return gone_wrong(e, IBIDI_BLOCK_HASH, &k);
    if (!same_block(&have, b))
        return ibid_fail(IBID_MISMATCH, "block %llu has this block's hash but other tokens",
                         (unsigned long long)*number);
    return IBID_OK;
}

static ibid_err write_values(ibidi_writer *w, const put_args *a, size_t i, uint64_t number,
                             ibidi_block_state *st) {
    const ibid_block_put *b = &a->b[i];
    for (size_t layer = 0; layer < b->n_layers; layer++) {
        ibidi_key k = ibidi_key_u64_u16(number, layer);
        void *room = NULL;
        ibid_err e = ibidi_raw_reserve(&w->t, IBIDI_KV, &k, b->value_size, &room);
        if (e) return e;
        memcpy(room, b->values[layer], b->value_size);
        e = ibid_kv_value_seal(&a->shapes[i], number, layer, room, b->value_size);
        if (e) return e;
    }
    st->n_layers = b->n_layers;
    st->value_size = b->value_size;
    st->epoch++;
    return IBID_OK;
}

static ibid_err write_keys(ibidi_writer *w, const ibid_keys *keys, uint64_t number,
                           ibidi_block_state *st) {
    ibid_keys have;
    ibid_err e = ibidi_keys_get(&w->t, number, &have);
    if (!e && ibid_hash_cmp(&have.calibration, &keys->calibration) == 0 && have.dim == keys->dim)
        return IBID_OK;
    if (e && e != IBID_NOTFOUND && e != IBID_CORRUPT) return e;
    st->key_bytes = keys->n_tokens * keys->dim;
    return ibidi_keys_write(&w->t, number, keys);
}

/* KV that fails its check counts as lacking: putting the block again repairs it. */
static bool values_are_whole(ibidi_writer *w, uint64_t number, const ibidi_block_state *st) {
    for (size_t layer = 0; layer < st->n_layers; layer++) {
        ibidi_key k = ibidi_key_u64_u16(number, layer);
        ibidi_slice v;
        ibid_kv_view view;
        uint64_t owner;
        size_t at;
        if (ibidi_raw_get(&w->t, IBIDI_KV, &k, &v) != IBID_OK || v.n != st->value_size ||
            ibid_kv_value_open(v.p, v.n, true, &owner, &at, &view) != IBID_OK || owner != number ||
            at != layer)
            return false;
    }
    return st->n_layers > 0;
}

static ibid_err drop_kv(ibidi_writer *w, uint64_t number, ibidi_block_state *st) {
    for (size_t layer = 0; layer < st->n_layers; layer++) {
        ibidi_key k = ibidi_key_u64_u16(number, layer);
        ibid_err e = ibidi_del(&w->t, IBIDI_KV, &k);
        if (e && e != IBID_NOTFOUND) return e; /* a lost value is no reason to keep the rest */
    }
    st->n_layers = st->value_size = 0;
    return IBID_OK;
}

static ibid_err put_one(ibidi_writer *w, const put_args *a, size_t i) {
    const ibid_block_put *b = &a->b[i];
    ibidi_block_state old, now;
    uint64_t number;
    bool fresh;
    ibid_err e = find_or_add(w, a, i, &number, &old, &fresh);
    if (e) return e;
    now = old;
    now.last_use_ms = a->now_ms > old.last_use_ms ? a->now_ms : old.last_use_ms;
    if (b->job) e = ibidi_hold_take(w, b->job, number, &now);
    if (!e && b->values && !values_are_whole(w, number, &now)) {
        e = drop_kv(w, number, &now);
        if (!e) e = write_values(w, a, i, number, &now);
    }
    ibid_keys keys = {b->calibration, b->n_tokens, b->keys_dim, b->keys};
    if (!e && b->keys) e = write_keys(w, &keys, number, &now);
    if (!e) e = ibidi_block_update(w, number, fresh ? NULL : &old, &now);
    a->numbers[i] = number;
    return e;
}

static ibid_err blocks_put(ibidi_writer *w, void *arg) {
    const put_args *a = arg;
    for (size_t i = 0; i < a->n; i++) {
        const ibid_block_put *b = &a->b[i];
        uint64_t bytes = b->values ? (uint64_t)b->n_layers * b->value_size : 0;
        if (w->st.kv_budget && bytes > w->st.kv_budget)
            return ibid_fail(IBID_BUDGET,
                             "one block's KV of %llu bytes is larger than the budget of %llu",
                             (unsigned long long)bytes, (unsigned long long)w->st.kv_budget);
        ibid_err e = IBID_OK;
        if (b->job && (i == 0 || a->b[i - 1].job != b->job)) e = ibidi_job_live(&w->t, b->job);
        if (!e) e = put_one(w, a, i);
        if (e) return e;
    }
    return IBID_OK;
}

/* Every value's header and checksum, before anything is written. */
static ibid_err check_values(const ibid_block_put *b, ibid_kv_shape *shape) {
    if (b->n_layers == 0 || b->n_layers > UINT16_MAX)
        return ibid_fail(IBID_INVAL, "a block has 1 to 65535 layers of KV, not %zu", b->n_layers);
    for (size_t layer = 0; layer < b->n_layers; layer++) {
        ibid_kv_view v;
        size_t at;
        ibid_err e = ibid_kv_value_open(b->values[layer], b->value_size, true, NULL, &at, &v);
        if (e) return e;
        if (at != layer || v.type != b->kv_type || v.n_tokens != b->n_tokens ||
            (layer && (v.n_kv_heads != shape->n_kv_heads || v.head_dim != shape->head_dim)))
            return ibid_fail(IBID_INVAL, "the KV value of layer %zu does not fit its block", layer);
        *shape = (ibid_kv_shape){v.type, v.n_tokens, v.n_kv_heads, v.head_dim};
    }
    return IBID_OK;
}

static ibid_err check_put(const ibid_block_put *b, ibid_kv_shape *shape) {
    if (b->n_tokens == 0 || b->n_tokens > TOKENS_MAX || b->n_title > b->n_tokens ||
        (unsigned)b->kv_type > IBID_KV_Q8_0)
        return ibid_fail(IBID_INVAL,
                         "a block has 1 to %d tokens, at most all of them title, and a known "
                         "KV type",
                         TOKENS_MAX);
    if (b->keys && (b->keys_dim == 0 || b->keys_dim > KEYS_DIM_MAX))
        return ibid_fail(IBID_INVAL, "token keys have 1 to %d dimensions, not %zu", KEYS_DIM_MAX,
                         b->keys_dim);
    return b->values ? check_values(b, shape) : IBID_OK;
}

ibid_err ibid_store_blocks_put(ibid_store *s, const ibid_block_put *b, size_t n,
                               uint64_t *numbers) {
    if (n == 0) return IBID_OK;
    if (n > BATCH_MAX) return ibid_fail(IBID_TOOBIG, "%zu blocks in one call; split it", n);
    ibid_kv_shape *shapes = ibid_calloc(n, sizeof *shapes);
    ibid_hash *hashes = ibid_calloc(n, sizeof *hashes);
    ibid_err e =
        shapes && hashes ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", n);
    for (size_t i = 0; i < n && !e; i++) {
        e = check_put(&b[i], &shapes[i]);
        if (!e)
            hashes[i] = ibid_block_hash(&b[i].model, &b[i].prefix, b[i].kv_type, b[i].n_title,
                                        b[i].tokens, b[i].n_tokens);
    }
    put_args a = {b, shapes, hashes, n, numbers, ibidi_clock(s)};
    if (!e) e = ibidi_write(s, blocks_put, &a);
    ibid_free(hashes);
    ibid_free(shapes);
    return e;
}

/* ---- Holds and keys -----------------------------------------------------------------------------
 */

typedef struct hold_args {
    uint64_t job;
    const uint64_t *blocks;
    size_t n;
} hold_args;

static ibid_err blocks_hold(ibidi_writer *w, void *arg) {
    const hold_args *a = arg;
    ibid_err e = ibidi_job_live(&w->t, a->job);
    for (size_t i = 0; i < a->n && !e; i++) {
        ibidi_block_state old, now;
        if ((e = ibidi_block_state_get(&w->t, a->blocks[i], &old))) break;
        now = old;
        e = ibidi_hold_take(w, a->job, a->blocks[i], &now);
        if (!e && now.holds != old.holds) e = ibidi_block_update(w, a->blocks[i], &old, &now);
    }
    return e;
}

ibid_err ibid_store_blocks_hold(ibid_store *s, uint64_t job, const uint64_t *blocks, size_t n) {
    return ibidi_write(s, blocks_hold, &(hold_args){job, blocks, n});
}

typedef struct keys_args {
    uint64_t block;
    ibid_keys keys;
} keys_args;

static ibid_err keys_put(ibidi_writer *w, void *arg) {
    const keys_args *a = arg;
    ibidi_block_state old, now;
    ibid_block b;
    ibid_err e = ibidi_block_get(&w->t, a->block, w->arena, &b);
    if (!e) e = ibidi_block_state_get(&w->t, a->block, &old);
    if (e) return e;
    if (b.n_tokens != a->keys.n_tokens)
        return ibid_fail(IBID_INVAL, "block %llu has %zu tokens; keys were given for %zu",
                         (unsigned long long)a->block, b.n_tokens, a->keys.n_tokens);
    now = old;
    now.key_bytes = a->keys.n_tokens * a->keys.dim;
    e = ibidi_keys_write(&w->t, a->block, &a->keys);
    return e ? e : ibidi_block_update(w, a->block, &old, &now);
}

ibid_err ibid_store_keys_put(ibid_store *s, const ibid_hash *calibration, uint64_t block,
                             const int8_t *keys, size_t n_tokens, size_t dim) {
    if (n_tokens == 0 || n_tokens > TOKENS_MAX || dim == 0 || dim > KEYS_DIM_MAX)
        return ibid_fail(IBID_INVAL, "token keys of %zu tokens, %zu dimensions", n_tokens, dim);
    keys_args a = {block, {*calibration, n_tokens, dim, keys}};
    return ibidi_write(s, keys_put, &a);
}

/* ---- Use times ----------------------------------------------------------------------------------
 */

typedef struct touch_args {
    const ibidi_touch *t;
    size_t n;
} touch_args;

static ibid_err touch_write(ibidi_writer *w, void *arg) {
    const touch_args *a = arg;
    for (size_t i = 0; i < a->n; i++) {
        ibidi_block_state old, now;
        ibid_err e = ibidi_block_state_get(&w->t, a->t[i].block, &old);
        if (e == IBID_NOTFOUND) continue; /* deleted since it was read */
        now = old;
        now.last_use_ms = a->t[i].ms;
        if (!e && now.last_use_ms > old.last_use_ms)
            e = ibidi_block_update(w, a->t[i].block, &old, &now);
        if (e) return e;
    }
    return IBID_OK;
}

static int by_block_latest_first(const void *a, const void *b) {
    const ibidi_touch *x = a, *y = b;
    if (x->block != y->block) return x->block < y->block ? -1 : 1;
    return x->ms > y->ms ? -1 : x->ms < y->ms;
}

ibid_err ibidi_touch_flush(ibid_store *s) {
    ibidi_shared *sh = s->shared;
    (void)pthread_mutex_lock(&sh->mu);
    ibidi_touch *t = sh->touched;
    size_t n = sh->n_touched;
    sh->touched = NULL;
    sh->n_touched = sh->room_touched = 0;
    (void)pthread_mutex_unlock(&sh->mu);
    if (n == 0) {
        ibid_free(t);
        return IBID_OK;
    }
    qsort(t, n, sizeof *t, by_block_latest_first);
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
        if (i == 0 || t[i].block != t[i - 1].block) t[kept++] = t[i];
    /* On failure these times are lost: they only steer eviction. */
    ibid_err e = ibidi_write(s, touch_write, &(touch_args){t, kept});
    ibid_free(t);
    return e;
}

void ibid_store_touch(ibid_store *s, const uint64_t *blocks, size_t n) {
    if (s->readonly) return;
    uint64_t now = ibidi_clock(s);
    ibidi_shared *sh = s->shared;
    bool full = false;
    for (size_t i = 0; i < n; i++) {
        (void)pthread_mutex_lock(&sh->mu);
        if (!sh->touched && (sh->touched = ibid_alloc(TOUCH_MAX * sizeof *sh->touched)))
            sh->room_touched = TOUCH_MAX;
        if (sh->n_touched < sh->room_touched)
            sh->touched[sh->n_touched++] = (ibidi_touch){blocks[i], now};
        full = sh->n_touched == sh->room_touched && sh->n_touched > 0;
        (void)pthread_mutex_unlock(&sh->mu);
        if (full && ibidi_touch_flush(s) != IBID_OK)
            ibid_log(IBID_LOG_WARN, "use times were not written: %s", ibid_err_detail());
    }
}

/* ---- Collecting ---------------------------------------------------------------------------------
 */

typedef struct collect_args {
    ibid_collected out;
    uint64_t last_use_max; /* orphans used later than this are left alone */
} collect_args;

/* A block whose record fails its check stays for `ibid verify` to show: its hash row is not known.
 */
static ibid_err delete_block(ibidi_writer *w, uint64_t number, bool *deleted) {
    ibidi_block_state st, now;
    ibid_block b;
    ibidi_key k = ibidi_key_1(number);
    ibid_err e = ibidi_block_state_get(&w->t, number, &st);
    if (!e) e = ibidi_block_get(&w->t, number, w->arena, &b);
    *deleted = false;
    if (e == IBID_CORRUPT || e == IBID_NOTFOUND) {
        ibid_log(IBID_LOG_ERROR, "cannot delete block %llu: %s", (unsigned long long)number,
                 ibid_err_detail());
        return IBID_OK;
    }
    if (e) return e;
    ibidi_key h = ibidi_key_hash(&b.hash);
    now = st;
    e = drop_kv(w, number, &now);
    if (!e && st.key_bytes) e = gone_wrong(ibidi_del(&w->t, IBIDI_KEYS, &k), IBIDI_KEYS, &k);
    if (!e) e = gone_wrong(ibidi_del(&w->t, IBIDI_BLOCK_HASH, &h), IBIDI_BLOCK_HASH, &h);
    if (!e) e = ibidi_del(&w->t, IBIDI_BLOCK, &k);
    if (!e) e = ibidi_block_update(w, number, &st, NULL);
    *deleted = e == IBID_OK;
    return e;
}

/* Up to max numbers, in key order, from the last 8 bytes of keys: of the orphan table those old
 * enough, of the LRU table those not held. */
static ibid_err candidates(ibidi_writer *w, ibidi_table tab, const collect_args *a, size_t max,
                           uint64_t *out, size_t *n) {
    ibidi_cursor c;
    ibid_err e = ibidi_cursor_open(&w->t, tab, &c);
    if (e) return e;
    *n = 0;
    for (e = ibidi_cursor_first(&c); !e && *n < max; e = ibidi_cursor_next(&c)) {
        ibidi_rd r;
        ibidi_block_state st;
        if ((e = ibidi_cursor_record(&c, &r))) break;
        if (c.key.n != (tab == IBIDI_LRU ? 16u : 8u)) e = ibidi_corrupt(tab, c.key.p, c.key.n);
        uint64_t number = ibidi_load64be(c.key.p + c.key.n - 8);
        if (!e) e = ibidi_block_state_get(&w->t, number, &st);
        if (e == IBID_NOTFOUND) e = ibidi_corrupt(tab, c.key.p, c.key.n);
        if (e) break;
        if (tab == IBIDI_LRU ? st.holds == 0 : st.last_use_ms <= a->last_use_max)
            out[(*n)++] = number;
    }
    ibidi_cursor_close(&c);
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

static bool over_budget(const ibidi_state *st) {
    return st->kv_budget && st->kv_bytes > st->kv_budget;
}

static ibid_err collect(ibidi_writer *w, void *arg) {
    collect_args *a = arg;
    uint64_t numbers[COLLECT_MAX], before = w->st.kv_bytes;
    size_t n;
    ibidi_block_state st, now;
    a->out = (ibid_collected){.orphans = 0};
    ibid_err e = candidates(w, IBIDI_ORPHAN, a, COLLECT_MAX, numbers, &n);
    for (size_t i = 0; i < n && !e; i++) {
        bool deleted;
        e = delete_block(w, numbers[i], &deleted);
        if (!e && deleted) a->out.orphans++;
    }
    if (!e && n == COLLECT_MAX && a->out.orphans) a->out.more = true;
    if (!e && over_budget(&w->st)) {
        e = candidates(w, IBIDI_LRU, a, COLLECT_MAX, numbers, &n);
        for (size_t i = 0; i < n && !e && over_budget(&w->st); i++) {
            e = ibidi_block_state_get(&w->t, numbers[i], &st);
            now = st;
            if (!e) e = drop_kv(w, numbers[i], &now);
            if (!e) e = ibidi_block_update(w, numbers[i], &st, &now);
            if (!e) a->out.evicted++;
        }
        /* Nothing evicted: all that is left is held, and another call would not get further. */
        if (!e && over_budget(&w->st) && a->out.evicted) a->out.more = true;
    }
    a->out.bytes = before - w->st.kv_bytes;
    return e;
}

ibid_err ibidi_collect(ibid_store *s, uint64_t min_age_ms, ibid_collected *out) {
    uint64_t now = ibidi_clock(s);
    collect_args a = {.last_use_max = min_age_ms == 0    ? UINT64_MAX
                                      : now > min_age_ms ? now - min_age_ms
                                                         : 0};
    ibid_err e = ibidi_touch_flush(s);
    if (!e) e = ibidi_write(s, collect, &a);
    if (!e && out) *out = a.out;
    return e;
}

ibid_err ibid_store_collect(ibid_store *s, ibid_collected *out) {
    return ibidi_collect(s, 0, out);
}
