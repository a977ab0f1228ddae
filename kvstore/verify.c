/* Walks the whole store inside one read transaction and reports every fault it finds: each checksum
 * and hash, counts against the rows they count, references against what they name. */
#include "kvstore/store_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define VERIFY_ARENA_CAP ((size_t)4 << 30)
#define TEXT_CAP ((size_t)5 << 30)

typedef struct walk {
    ibidi_txn *t;
    ibidi_state st;
    ibid_arena *arena; /* reset after each document or block */
    void (*report)(void *, const char *);
    void *arg;
    uint64_t faults;
    uint64_t kv_rows, key_rows, lru_rows, orphan_rows, held; /* what the blocks say there must be */
    uint64_t use_rows, chunk_rows, text_rows;                /* what the documents say */
    ibidi_state seen;                                        /* the same counts, counted anew */
} walk;

static void fault(walk *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void fault(walk *w, const char *fmt, ...) {
    char text[768];
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    w->faults++;
    if (w->report) w->report(w->arg, text);
}

/* What is wrong with the stored bytes is a fault; what keeps us from reading on is an error. */
static ibid_err note(walk *w, ibid_err e, const char *what, uint64_t number) {
    if (e != IBID_CORRUPT && e != IBID_NOTFOUND && e != IBID_NOCOLLECTION) return e;
    fault(w, "%s %llu: %s", what, (unsigned long long)number,
          e == IBID_CORRUPT || e == IBID_NOCOLLECTION ? ibid_err_detail()
                                                      : "a row of it is missing");
    return IBID_OK;
}

/* Calls row for every row of a table whose record is sound; keys must be key_n bytes (0 = any). */
static ibid_err rows(walk *w, ibidi_table tab, size_t key_n,
                     ibid_err (*row)(walk *, ibidi_slice key, ibidi_rd r)) {
    ibidi_cursor c;
    ibid_err e = ibidi_cursor_open(w->t, tab, &c);
    if (e) return e;
    for (e = ibidi_cursor_first(&c); !e; e = ibidi_cursor_next(&c)) {
        ibidi_rd r;
        e = key_n && c.key.n != key_n ? ibidi_corrupt(tab, c.key.p, c.key.n)
                                      : ibidi_cursor_record(&c, &r);
        e = e ? note(w, e, "table", (uint64_t)tab) : row(w, c.key, r);
        if (e) break;
    }
    ibidi_cursor_close(&c);
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

static void expect_rows(walk *w, ibidi_table tab, uint64_t want) {
    uint64_t have = 0;
    if (ibidi_count(w->t, tab, &have) == IBID_OK && have != want)
        fault(w, "table %s has %llu rows where %llu belong", ibidi_table_name(tab),
              (unsigned long long)have, (unsigned long long)want);
}

static void expect_count(walk *w, const char *what, uint64_t have, uint64_t want) {
    if (have != want)
        fault(w, "the store counts %llu %s; there are %llu", (unsigned long long)have, what,
              (unsigned long long)want);
}

static bool has_row(walk *w, ibidi_table tab, const ibidi_key *k) {
    ibidi_rd r;
    return ibidi_get(w->t, tab, k, &r) == IBID_OK;
}

/* ---- Models and prefixes ---- */
static ibid_err model_row(walk *w, ibidi_slice key, ibidi_rd r) {
    ibid_model_record m;
    ibid_err e = ibidi_model_decode(key, r, w->arena, &m);
    return note(w, e, "model", 0);
}

static ibid_err prefixes(walk *w) {
    ibidi_cursor c;
    ibid_err e = ibidi_cursor_open(w->t, IBIDI_PREFIX, &c);
    if (e) return e;
    for (e = ibidi_cursor_first(&c); !e; e = ibidi_cursor_next(&c)) {
        ibid_kv_view v;
        uint64_t owner = 0;
        size_t layer = 0;
        ibid_hash id;
        bool key_ok = c.key.n == IBID_HASH_SIZE + 2;
        if (key_ok) memcpy(id.b, c.key.p, sizeof id.b);
        ibid_err bad = ibid_kv_value_open(c.value.p, c.value.n, true, &owner, &layer, &v);
        if (bad)
            fault(w, "a prefix's KV: %s", ibid_err_detail());
        else if (!key_ok || owner != ibidi_prefix_owner(&id) ||
                 layer != (size_t)(c.key.p[IBID_HASH_SIZE] << 8 | c.key.p[IBID_HASH_SIZE + 1]))
            fault(w, "a prefix's KV lies under another prefix's or layer's key");
    }
    ibidi_cursor_close(&c);
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

/* ---- Collections and documents ---- */
static ibid_err collection_row(walk *w, ibidi_slice key, ibidi_rd r) {
    ibid_collection c, again;
    ibid_err e = ibidi_collection_decode(key, r, &c);
    if (e) return note(w, e, "collection", 0);
    w->seen.collections++;
    e = ibidi_collection_by_number(w->t, c.number, &again);
    if (e) return note(w, e, "collection", c.number);
    ibidi_key model = ibidi_key_hash(&c.model);
    if (!has_row(w, IBIDI_MODEL, &model))
        fault(w, "collection %llu names a model that is not stored", (unsigned long long)c.number);
    /* Its counts, from its documents. */
    uint64_t documents = 0, chunks = 0, text = 0;
    ibidi_cursor at;
    if ((e = ibidi_cursor_open(w->t, IBIDI_MEMBER, &at))) return e;
    ibidi_key from = ibidi_key_2(c.number, 0);
    for (e = ibidi_cursor_seek(&at, &from); !e; e = ibidi_cursor_next(&at)) {
        ibidi_document d = {.collection = 0};
        if (at.key.n != 16 || ibidi_load64be(at.key.p) != c.number) break;
        uint64_t number = ibidi_load64be(at.key.p + 8);
        ibid_err bad = ibidi_document_get(w->t, number, &d);
        if (!bad && d.collection != c.number)
            fault(w, "document %llu is listed in collection %llu but says %llu",
                  (unsigned long long)number, (unsigned long long)c.number,
                  (unsigned long long)d.collection);
        if ((bad = note(w, bad, "document", number))) {
            e = bad;
            break;
        }
        documents++;
        chunks += d.d.n_chunks;
        text += d.d.text_bytes;
    }
    ibidi_cursor_close(&at);
    if (e && e != IBID_NOTFOUND) return e;
    if (documents != c.documents || chunks != c.chunks || text != c.text_bytes)
        fault(w, "collection %llu counts %llu documents, %llu chunks; there are %llu, %llu",
              (unsigned long long)c.number, (unsigned long long)c.documents,
              (unsigned long long)c.chunks, (unsigned long long)documents,
              (unsigned long long)chunks);
    return IBID_OK;
}

static ibid_err document_chunks(walk *w, const ibidi_document *d) {
    uint64_t number = d->d.number;
    ibid_chunk *c = NULL;
    ibid_err e = ibidi_chunks_get(w->t, number, d->d.n_chunks, w->arena, &c);
    if (e) return note(w, e, "document", number);
    for (uint64_t i = 0; i < d->d.n_chunks; i++) {
        ibidi_key use = ibidi_key_3(c[i].block, number, i), block = ibidi_key_1(c[i].block);
        if (c[i].start > c[i].end || c[i].end > d->d.text_bytes)
            fault(w, "chunk %llu of document %llu lies outside the text", (unsigned long long)i,
                  (unsigned long long)number);
        if (!has_row(w, IBIDI_BLOCK_STATE, &block))
            fault(w, "chunk %llu of document %llu names block %llu, which is missing",
                  (unsigned long long)i, (unsigned long long)number,
                  (unsigned long long)c[i].block);
        if (!has_row(w, IBIDI_USE, &use))
            fault(w, "chunk %llu of document %llu is not among the uses of block %llu",
                  (unsigned long long)i, (unsigned long long)number,
                  (unsigned long long)c[i].block);
    }
    w->use_rows += d->d.n_chunks;
    w->chunk_rows += (d->d.n_chunks + IBIDI_CHUNKS_PER_ROW - 1) / IBIDI_CHUNKS_PER_ROW;
    w->text_rows += (d->d.text_bytes + IBIDI_TEXT_PER_ROW - 1) / IBIDI_TEXT_PER_ROW;
    return IBID_OK;
}

static ibid_err document_row(walk *w, ibidi_slice key, ibidi_rd r) {
    (void)r;
    ibidi_document d;
    uint64_t number = ibidi_load64be(key.p), looked_up;
    ibid_arena_reset(w->arena);
    ibid_err e = ibidi_document_get(w->t, number, &d);
    if (e) return note(w, e, "document", number);
    w->seen.documents++;
    w->seen.chunks += d.d.n_chunks;
    w->seen.text_bytes += d.d.text_bytes;
    ibidi_key member = ibidi_key_2(d.collection, number);
    if (!has_row(w, IBIDI_MEMBER, &member))
        fault(w, "document %llu is not listed in its collection", (unsigned long long)number);
    e = ibidi_document_lookup(w->t, d.collection, d.d.id, &looked_up);
    if (!e && looked_up != number)
        fault(w, "the id of document %llu leads to document %llu", (unsigned long long)number,
              (unsigned long long)looked_up);
    if ((e = note(w, e, "document", number))) return e;
    if (d.d.generation > w->st.generation)
        fault(w, "document %llu is of generation %llu, later than the store's",
              (unsigned long long)number, (unsigned long long)d.d.generation);
    ibid_buf text;
    ibid_buf_init(&text, TEXT_CAP);
    e = note(w, ibidi_text_get(w->t, number, d.d.text_bytes, &text), "document", number);
    ibid_buf_fini(&text);
    return e ? e : document_chunks(w, &d);
}

static ibid_err use_row(walk *w, ibidi_slice key, ibidi_rd r) {
    (void)r;
    uint64_t block = ibidi_load64be(key.p), document = ibidi_load64be(key.p + 8);
    uint64_t n = ibidi_load64be(key.p + 16);
    ibid_chunk c;
    ibid_err e = ibidi_chunk_get(w->t, document, n, &c);
    if (e == IBID_NOTFOUND || (!e && c.block != block)) {
        fault(w, "block %llu claims a use by chunk %llu of document %llu, which has none",
              (unsigned long long)block, (unsigned long long)n, (unsigned long long)document);
        return IBID_OK;
    }
    return note(w, e, "document", document);
}

/* ---- Blocks ---- */

/* Rows of tab whose keys are (number, ...) 8 * parts bytes long. */
static ibid_err count_rows(walk *w, ibidi_table tab, uint64_t number, size_t parts, uint64_t *n) {
    ibidi_cursor c;
    ibid_err e = ibidi_cursor_open(w->t, tab, &c);
    if (e) return e;
    ibidi_key from = ibidi_key_1(number);
    *n = 0;
    for (e = ibidi_cursor_seek(&c, &from); !e; e = ibidi_cursor_next(&c)) {
        if (c.key.n != 8 * parts || ibidi_load64be(c.key.p) != number) break;
        (*n)++;
    }
    ibidi_cursor_close(&c);
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

static ibid_err block_values(walk *w, const ibid_block *b, const ibidi_block_state *st) {
    for (uint64_t layer = 0; layer < st->n_layers; layer++) {
        ibidi_key k = ibidi_key_u64_u16(b->number, layer);
        ibidi_slice v;
        ibid_kv_view view;
        uint64_t owner = 0;
        size_t at = 0;
        ibid_err e = ibidi_raw_get(w->t, IBIDI_KV, &k, &v);
        if (!e) e = ibid_kv_value_open(v.p, v.n, true, &owner, &at, &view);
        if (!e && (owner != b->number || at != layer || view.n_tokens != b->n_tokens ||
                   view.type != b->kv_type || v.n != st->value_size))
            e = ibid_fail(IBID_CORRUPT, "layer %llu's KV belongs to another block, layer or shape",
                          (unsigned long long)layer);
        if ((e = note(w, e, "block", b->number))) return e;
    }
    w->kv_rows += st->n_layers;
    return IBID_OK;
}

static ibid_err block_keys(walk *w, const ibid_block *b, const ibidi_block_state *st) {
    ibid_keys keys;
    if (!st->key_bytes) return IBID_OK;
    w->key_rows++;
    ibid_err e = ibidi_keys_get(w->t, b->number, &keys);
    if (!e && (keys.n_tokens != b->n_tokens || keys.n_tokens * keys.dim != st->key_bytes))
        e = ibid_fail(IBID_CORRUPT, "its token keys are %zu x %zu for %zu tokens", keys.n_tokens,
                      keys.dim, b->n_tokens);
    return note(w, e, "block", b->number);
}

static void block_places(walk *w, uint64_t number, const ibidi_block_state *st) {
    ibidi_key k = ibidi_key_1(number), lru = ibidi_key_2(st->last_use_ms, number);
    bool orphan = st->refcount == 0 && st->holds == 0;
    if (orphan && !has_row(w, IBIDI_ORPHAN, &k))
        fault(w, "block %llu has no use and no hold but is not listed for collection",
              (unsigned long long)number);
    if (st->n_layers && !has_row(w, IBIDI_LRU, &lru))
        fault(w, "block %llu is missing from the order of eviction", (unsigned long long)number);
    w->orphan_rows += orphan;
    w->lru_rows += st->n_layers > 0;
    w->seen.blocks_evicted += st->n_layers == 0;
    w->seen.kv_bytes += st->n_layers * st->value_size;
    w->seen.key_bytes += st->key_bytes;
    w->held += st->holds;
}

static ibid_err block_row(walk *w, ibidi_slice key, ibidi_rd r) {
    ibid_block b;
    ibidi_block_state st;
    uint64_t number = ibidi_load64be(key.p), by_hash = 0, uses;
    ibid_arena_reset(w->arena);
    w->seen.blocks++;
    ibid_err e = ibidi_block_decode(number, r, w->arena, &b);
    if (!e) e = ibidi_block_state_get(w->t, number, &st);
    if (e) return note(w, e, "block", number);
    ibid_hash h = ibid_block_hash(&b.model, &b.prefix, b.kv_type, b.n_title, b.tokens, b.n_tokens);
    if (ibid_hash_cmp(&h, &b.hash) != 0)
        fault(w, "block %llu's hash is not that of its tokens", (unsigned long long)number);
    e = ibidi_block_number(w->t, &b.hash, &by_hash);
    if (!e && by_hash != number)
        fault(w, "block %llu's hash leads to block %llu", (unsigned long long)number,
              (unsigned long long)by_hash);
    e = note(w, e, "block", number);
    if (!e) e = count_rows(w, IBIDI_USE, number, 3, &uses);
    if (e) return e;
    if (uses != st.refcount)
        fault(w, "block %llu counts %llu uses; there are %llu", (unsigned long long)number,
              (unsigned long long)st.refcount, (unsigned long long)uses);
    block_places(w, number, &st);
    e = block_values(w, &b, &st);
    return e ? e : block_keys(w, &b, &st);
}

static ibid_err hold_row(walk *w, ibidi_slice key, ibidi_rd r) {
    (void)r;
    uint64_t job = ibidi_load64be(key.p), block = ibidi_load64be(key.p + 8);
    ibidi_block_state st;
    ibid_err e = ibidi_job_live(w->t, job);
    if (e == IBID_NOTFOUND || e == IBID_CANCELLED)
        fault(w, "job %llu, which has ended, still holds block %llu", (unsigned long long)job,
              (unsigned long long)block);
    else if ((e = note(w, e, "job", job)))
        return e;
    e = ibidi_block_state_get(w->t, block, &st);
    if (!e && st.holds == 0)
        fault(w, "block %llu counts no hold but job %llu holds it", (unsigned long long)block,
              (unsigned long long)job);
    return note(w, e, "held block", block);
}

/* Rows that must name a block (orphan, lru): the checks above count them; their keys are checked
 * here. */
static ibid_err sound_row(walk *w, ibidi_slice key, ibidi_rd r) {
    (void)w, (void)key, (void)r;
    return IBID_OK;
}

/* ---- Changes and jobs ---- */
static ibid_err change_row(walk *w, ibidi_slice key, ibidi_rd r) {
    ibid_change c;
    uint64_t generation = ibidi_load64be(key.p);
    ibid_arena_reset(w->arena);
    if (generation != w->seen.generation + 1)
        fault(w, "changes jump from generation %llu to %llu",
              (unsigned long long)w->seen.generation, (unsigned long long)generation);
    w->seen.generation = generation;
    return note(w, ibidi_change_decode(generation, r, w->arena, &c), "change", generation);
}

static ibid_err job_row(walk *w, ibidi_slice key, ibidi_rd r) {
    ibid_job j;
    uint64_t id = ibidi_load64be(key.p);
    return note(w, ibidi_job_decode(id, r, &j), "job", id);
}

static void totals(walk *w) {
    const ibidi_state *st = &w->st, *seen = &w->seen;
    expect_count(w, "generations", st->generation, seen->generation);
    expect_count(w, "collections", st->collections, seen->collections);
    expect_count(w, "documents", st->documents, seen->documents);
    expect_count(w, "chunks", st->chunks, seen->chunks);
    expect_count(w, "bytes of text", st->text_bytes, seen->text_bytes);
    expect_count(w, "blocks", st->blocks, seen->blocks);
    expect_count(w, "blocks without KV", st->blocks_evicted, seen->blocks_evicted);
    expect_count(w, "bytes of KV", st->kv_bytes, seen->kv_bytes);
    expect_count(w, "bytes of token keys", st->key_bytes, seen->key_bytes);
    expect_count(w, "orphans", st->orphans, w->orphan_rows);
    expect_rows(w, IBIDI_COLLECTION_NO, seen->collections);
    expect_rows(w, IBIDI_DOCUMENT_ID, seen->documents);
    expect_rows(w, IBIDI_MEMBER, seen->documents);
    expect_rows(w, IBIDI_CHUNK, w->chunk_rows);
    expect_rows(w, IBIDI_TEXT, w->text_rows);
    expect_rows(w, IBIDI_USE, w->use_rows);
    expect_rows(w, IBIDI_BLOCK_STATE, seen->blocks);
    expect_rows(w, IBIDI_BLOCK_HASH, seen->blocks);
    expect_rows(w, IBIDI_KV, w->kv_rows);
    expect_rows(w, IBIDI_KEYS, w->key_rows);
    expect_rows(w, IBIDI_LRU, w->lru_rows);
    expect_rows(w, IBIDI_ORPHAN, w->orphan_rows);
    expect_rows(w, IBIDI_HOLD, w->held);
}

static ibid_err everything(walk *w) {
    ibid_err e = ibidi_state_get(w->t, &w->st);
    if (e) return note(w, e, "state", 0);
    w->seen.generation = w->st.history_floor;
    if (!e) e = rows(w, IBIDI_MODEL, IBID_HASH_SIZE, model_row);
    if (!e) e = prefixes(w);
    if (!e) e = rows(w, IBIDI_COLLECTION, 0, collection_row);
    if (!e) e = rows(w, IBIDI_COLLECTION_NO, 8, sound_row);
    if (!e) e = rows(w, IBIDI_DOCUMENT, 8, document_row);
    if (!e) e = rows(w, IBIDI_DOCUMENT_ID, 8 + IBID_HASH_SIZE, sound_row);
    if (!e) e = rows(w, IBIDI_MEMBER, 16, sound_row);
    if (!e) e = rows(w, IBIDI_USE, 24, use_row);
    if (!e) e = rows(w, IBIDI_BLOCK, 8, block_row);
    if (!e) e = rows(w, IBIDI_HOLD, 16, hold_row);
    if (!e) e = rows(w, IBIDI_ORPHAN, 8, sound_row);
    if (!e) e = rows(w, IBIDI_LRU, 16, sound_row);
    if (!e) e = rows(w, IBIDI_CHANGE, 8, change_row);
    if (!e) e = rows(w, IBIDI_JOB, 8, job_row);
    if (!e) totals(w);
    return e;
}

ibid_err ibid_store_verify(ibid_store *s, void (*report)(void *, const char *fault), void *arg,
                           uint64_t *faults) {
    ibidi_txn t;
    walk w = {.t = &t, .report = report, .arg = arg};
    ibid_err e = ibid_arena_open(VERIFY_ARENA_CAP, &w.arena);
    if (e) return e;
    e = ibidi_txn_begin(s->env, false, &t);
    if (!e) e = everything(&w);
    ibidi_txn_abort(&t);
    ibid_arena_close(w.arena);
    *faults = w.faults;
    return e;
}
