/* The records of every table: how they are written and, byte for byte untrusted, read back.
 * Formats: docs/format.md. */
#include "kvstore/store_internal.h"

#include <stdio.h>
#include <zstd.h>

/* ---- Keys ---------------------------------------------------------------------------------------
 */

static void key_u64(ibidi_key *k, uint64_t v) {
    uint64_t be = __builtin_bswap64(v);
    ibidi_store64(k->b + k->n, be);
    k->n += 8;
}

static void key_bytes(ibidi_key *k, const void *p, size_t n) {
    if (n) memcpy(k->b + k->n, p, n);
    k->n += n;
}

ibidi_key ibidi_key_1(uint64_t a) {
    ibidi_key k = {.n = 0};
    key_u64(&k, a);
    return k;
}

ibidi_key ibidi_key_2(uint64_t a, uint64_t b) {
    ibidi_key k = ibidi_key_1(a);
    key_u64(&k, b);
    return k;
}

ibidi_key ibidi_key_3(uint64_t a, uint64_t b, uint64_t c) {
    ibidi_key k = ibidi_key_2(a, b);
    key_u64(&k, c);
    return k;
}

ibidi_key ibidi_key_hash(const ibid_hash *h) {
    ibidi_key k = {.n = 0};
    key_bytes(&k, h->b, sizeof h->b);
    return k;
}

static void key_u16(ibidi_key *k, size_t v) {
    const uint8_t be[2] = {(uint8_t)(v >> 8), (uint8_t)v};
    key_bytes(k, be, sizeof be);
}

ibidi_key ibidi_key_hash_u16(const ibid_hash *h, size_t v) {
    ibidi_key k = ibidi_key_hash(h);
    key_u16(&k, v);
    return k;
}

ibidi_key ibidi_key_u64_hash(uint64_t a, const ibid_hash *h) {
    ibidi_key k = ibidi_key_1(a);
    key_bytes(&k, h->b, sizeof h->b);
    return k;
}

ibidi_key ibidi_key_u64_u16(uint64_t a, size_t v) {
    ibidi_key k = ibidi_key_1(a);
    key_u16(&k, v);
    return k;
}

ibidi_key ibidi_key_str(ibid_str s) {
    ibidi_key k = {.n = 0};
    key_bytes(&k, s.s, s.n < IBIDI_NAME_MAX ? s.n : IBIDI_NAME_MAX);
    return k;
}

/* ---- Records ------------------------------------------------------------------------------------
 */

ibid_err ibidi_corrupt(ibidi_table tab, const uint8_t *key, size_t n) {
    char hex[2 * 40 + 1] = "";
    for (size_t i = 0; i < n && i < 40; i++) (void)snprintf(hex + 2 * i, 3, "%02x", key[i]);
    return ibid_fail(IBID_CORRUPT, "the %s record under key %s fails its check; run ibid verify",
                     ibidi_table_name(tab), hex);
}

/* Over the payload, and by the key's own sum bound to its place. */
static uint64_t record_sum(ibidi_table tab, ibidi_slice key, const void *payload, size_t n) {
    uint64_t place = ibid_checksum(key.p, key.n) * 0x9e3779b97f4a7c15u + (uint64_t)tab;
    return ibid_checksum(payload, n) ^ place;
}

ibid_err ibidi_record_open(ibidi_table tab, ibidi_slice key, ibidi_slice value, ibidi_rd *out) {
    if (value.n < 8 || value.n % 8 != 0 ||
        ibidi_load64(value.p) != record_sum(tab, key, value.p + 8, value.n - 8))
        return ibidi_corrupt(tab, key.p, key.n);
    *out = (ibidi_rd){.p = value.p + 8, .n = value.n - 8};
    return IBID_OK;
}

ibid_err ibidi_get(ibidi_txn *t, ibidi_table tab, const ibidi_key *k, ibidi_rd *out) {
    ibidi_slice value;
    ibid_err e = ibidi_raw_get(t, tab, k, &value);
    return e ? e : ibidi_record_open(tab, (ibidi_slice){k->b, k->n}, value, out);
}

ibid_err ibidi_put(ibidi_txn *t, ibidi_table tab, const ibidi_key *k, const void *payload,
                   size_t n) {
    size_t padded = ibid_align_up(n, 8);
    void *room = NULL;
    ibid_err e = ibidi_raw_reserve(t, tab, k, 8 + padded, &room);
    if (e) return e;
    uint8_t *p = room;
    if (n) memcpy(p + 8, payload, n);
    memset(p + 8 + n, 0, padded - n);
    ibidi_store64(p, record_sum(tab, (ibidi_slice){k->b, k->n}, p + 8, padded));
    return IBID_OK;
}

ibid_err ibidi_put_wr(ibidi_txn *t, ibidi_table tab, const ibidi_key *k, const ibidi_wr *w) {
    return w->e ? w->e : ibidi_put(t, tab, k, w->b.data, w->b.len);
}

ibid_err ibidi_cursor_record(ibidi_cursor *c, ibidi_rd *out) {
    return ibidi_record_open(c->tab, c->key, c->value, out);
}

/* A whole array in place, or copied where the map does not align it. NULL: bad or out of memory. */
static const void *array_at(ibidi_rd *r, size_t n, size_t size, ibid_arena *a, ibid_err *e) {
    size_t bytes;
    if (!ibid_mul_size(n, size, &bytes)) {
        r->bad = true;
        return NULL;
    }
    const uint8_t *p = ibidi_rd_bytes(r, bytes);
    if (!p || (uintptr_t)p % size == 0) return p;
    void *copy = ibid_arena_copy(a, p, bytes);
    if (!copy) *e = ibid_fail(IBID_NOMEM, "out of memory for a record");
    return copy;
}

static void state_words(uint8_t *out, const uint64_t *w, size_t n) {
    for (size_t i = 0; i < n; i++) ibidi_store64(out + 8 * i, w[i]);
}

_Static_assert(sizeof(ibidi_state) % 8 == 0 && sizeof(ibidi_block_state) % 8 == 0, "u64 only");
enum { STATE_WORDS = sizeof(ibidi_state) / 8, BLOCK_STATE_WORDS = sizeof(ibidi_block_state) / 8 };

static ibidi_key state_key(void) {
    return ibidi_key_str((ibid_str){"state", 5});
}

ibid_err ibidi_state_get(ibidi_txn *t, ibidi_state *out) {
    ibidi_key k = state_key();
    ibidi_rd r;
    ibid_err e = ibidi_get(t, IBIDI_META, &k, &r);
    if (e == IBID_NOTFOUND) return ibidi_corrupt(IBIDI_META, k.b, k.n);
    if (e) return e;
    uint64_t w[STATE_WORDS];
    w[0] = ibidi_rd_u64(&r);
    if (w[0] != IBIDI_FORMAT)
        return ibid_fail(IBID_NOTSUP, "the store has format %llu; this build reads %d",
                         (unsigned long long)w[0], IBIDI_FORMAT);
    for (size_t i = 1; i < STATE_WORDS; i++) w[i] = ibidi_rd_u64(&r);
    if (!ibidi_rd_done(&r)) return ibidi_corrupt(IBIDI_META, k.b, k.n);
    memcpy(out, w, sizeof w);
    return IBID_OK;
}

ibid_err ibidi_state_put(ibidi_txn *t, const ibidi_state *s) {
    uint64_t w[STATE_WORDS];
    uint8_t le[sizeof w];
    memcpy(w, s, sizeof w);
    state_words(le, w, STATE_WORDS);
    ibidi_key k = state_key();
    return ibidi_put(t, IBIDI_META, &k, le, sizeof le);
}

/* ---- Collections --------------------------------------------------------------------------------
 */

ibid_err ibidi_collection_decode(ibidi_slice key, ibidi_rd r, ibid_collection *out) {
    *out = (ibid_collection){.name = {(const char *)key.p, key.n}};
    out->number = ibidi_rd_u64(&r);
    out->model = ibidi_rd_hash(&r);
    out->documents = ibidi_rd_u64(&r);
    out->chunks = ibidi_rd_u64(&r);
    out->text_bytes = ibidi_rd_u64(&r);
    out->created_ms = ibidi_rd_u64(&r);
    return ibidi_rd_done(&r) ? IBID_OK : ibidi_corrupt(IBIDI_COLLECTION, key.p, key.n);
}

static ibid_err no_collection(ibid_str name) {
    return ibid_fail(IBID_NOCOLLECTION, "no collection named \"%.*s\"",
                     (int)(name.n < IBIDI_NAME_MAX ? name.n : IBIDI_NAME_MAX), name.s);
}

ibid_err ibidi_collection_get(ibidi_txn *t, ibid_str name, ibid_collection *out) {
    if (name.n == 0 || name.n > IBIDI_NAME_MAX) return no_collection(name);
    ibidi_key k = ibidi_key_str(name);
    ibidi_slice v;
    ibidi_rd r;
    ibid_err e = ibidi_raw_get(t, IBIDI_COLLECTION, &k, &v);
    if (e == IBID_NOTFOUND) return no_collection(name);
    if (!e) e = ibidi_record_open(IBIDI_COLLECTION, (ibidi_slice){k.b, k.n}, v, &r);
    if (!e) e = ibidi_collection_decode((ibidi_slice){k.b, k.n}, r, out);
    out->name = name;
    return e;
}

ibid_err ibidi_collection_by_number(ibidi_txn *t, uint64_t number, ibid_collection *out) {
    ibidi_key k = ibidi_key_1(number);
    ibidi_rd r;
    ibid_err e = ibidi_get(t, IBIDI_COLLECTION_NO, &k, &r);
    if (e == IBID_NOTFOUND)
        return ibid_fail(IBID_NOCOLLECTION, "no collection has number %llu",
                         (unsigned long long)number);
    if (e) return e;
    ibid_str name = ibidi_rd_str(&r);
    if (!ibidi_rd_done(&r)) return ibidi_corrupt(IBIDI_COLLECTION_NO, k.b, k.n);
    e = ibidi_collection_get(t, name, out);
    if (e == IBID_NOCOLLECTION || (!e && out->number != number))
        return ibidi_corrupt(IBIDI_COLLECTION_NO, k.b, k.n);
    return e;
}

ibid_err ibidi_collection_put(ibidi_txn *t, const ibid_collection *c) {
    ibidi_key k = ibidi_key_str(c->name), no = ibidi_key_1(c->number);
    ibidi_wr w, name;
    ibidi_wr_init(&w);
    ibidi_wr_init(&name);
    ibidi_wr_u64(&w, c->number);
    ibidi_wr_hash(&w, &c->model);
    ibidi_wr_u64(&w, c->documents);
    ibidi_wr_u64(&w, c->chunks);
    ibidi_wr_u64(&w, c->text_bytes);
    ibidi_wr_u64(&w, c->created_ms);
    ibidi_wr_str(&name, c->name);
    ibid_err e = ibidi_put_wr(t, IBIDI_COLLECTION, &k, &w);
    if (!e) e = ibidi_put_wr(t, IBIDI_COLLECTION_NO, &no, &name);
    ibidi_wr_fini(&name);
    ibidi_wr_fini(&w);
    return e;
}

/* ---- Documents ----------------------------------------------------------------------------------
 */

ibidi_key ibidi_document_id_key(uint64_t collection, ibid_str id) {
    ibid_hash h = ibid_hash_bytes(id.s, id.n);
    return ibidi_key_u64_hash(collection, &h);
}

ibid_err ibidi_document_lookup(ibidi_txn *t, uint64_t collection, ibid_str id, uint64_t *number) {
    ibidi_key k = ibidi_document_id_key(collection, id);
    ibidi_rd r;
    ibid_err e = ibidi_get(t, IBIDI_DOCUMENT_ID, &k, &r);
    if (e == IBID_NOTFOUND)
        return ibid_fail(IBID_NOTFOUND, "no document \"%.*s\" in this collection",
                         (int)(id.n < 200 ? id.n : 200), id.s);
    if (e) return e;
    *number = ibidi_rd_u64(&r);
    return ibidi_rd_done(&r) ? IBID_OK : ibidi_corrupt(IBIDI_DOCUMENT_ID, k.b, k.n);
}

ibid_err ibidi_document_get(ibidi_txn *t, uint64_t number, ibidi_document *out) {
    ibidi_key k = ibidi_key_1(number);
    ibidi_rd r;
    ibid_err e = ibidi_get(t, IBIDI_DOCUMENT, &k, &r);
    if (e == IBID_NOTFOUND)
        return ibid_fail(IBID_NOTFOUND, "no document has number %llu", (unsigned long long)number);
    if (e) return e;
    *out = (ibidi_document){.d.number = number};
    ibid_document *d = &out->d;
    out->collection = ibidi_rd_u64(&r);
    d->content = ibidi_rd_hash(&r);
    uint64_t state = ibidi_rd_u64(&r);
    d->text_bytes = ibidi_rd_u64(&r);
    d->n_chunks = ibidi_rd_u64(&r);
    d->generation = ibidi_rd_u64(&r);
    d->indexed_ms = ibidi_rd_u64(&r);
    d->id = ibidi_rd_str(&r);
    d->title = ibidi_rd_str(&r);
    d->source = ibidi_rd_str(&r);
    d->metadata = ibidi_rd_str(&r);
    d->reason = ibidi_rd_str(&r);
    if (!ibidi_rd_done(&r) || state < IBID_DOC_READY || state > IBID_DOC_FAILED)
        return ibidi_corrupt(IBIDI_DOCUMENT, k.b, k.n);
    d->state = (ibid_doc_state)state;
    return IBID_OK;
}

ibid_err ibidi_document_write(ibidi_txn *t, const ibidi_document *doc) {
    const ibid_document *d = &doc->d;
    ibidi_key k = ibidi_key_1(d->number);
    ibidi_wr w;
    ibidi_wr_init(&w);
    ibidi_wr_u64(&w, doc->collection);
    ibidi_wr_hash(&w, &d->content);
    ibidi_wr_u64(&w, (uint64_t)d->state);
    ibidi_wr_u64(&w, d->text_bytes);
    ibidi_wr_u64(&w, d->n_chunks);
    ibidi_wr_u64(&w, d->generation);
    ibidi_wr_u64(&w, d->indexed_ms);
    ibidi_wr_str(&w, d->id);
    ibidi_wr_str(&w, d->title);
    ibidi_wr_str(&w, d->source);
    ibidi_wr_str(&w, d->metadata);
    ibidi_wr_str(&w, d->reason);
    ibid_err e = ibidi_put_wr(t, IBIDI_DOCUMENT, &k, &w);
    ibidi_wr_fini(&w);
    return e;
}

/* ---- Chunks: rows of up to 256, keyed by the first one's index ---- */

static uint64_t row_of(uint64_t n) {
    return n / IBIDI_CHUNKS_PER_ROW * IBIDI_CHUNKS_PER_ROW;
}

static void chunk_read(ibidi_rd *r, ibid_chunk *c) {
    c->start = ibidi_rd_u64(r);
    c->end = ibidi_rd_u64(r);
    c->block = ibidi_rd_u64(r);
    c->locator = ibidi_rd_str(r);
    ibidi_rd_pad(r);
}

static ibid_err chunk_row(ibidi_txn *t, uint64_t document, uint64_t first, ibidi_key *k,
                          ibidi_rd *r, uint64_t *count) {
    *k = ibidi_key_2(document, first);
    ibid_err e = ibidi_get(t, IBIDI_CHUNK, k, r);
    if (e == IBID_NOTFOUND) return ibidi_corrupt(IBIDI_CHUNK, k->b, k->n);
    if (e) return e;
    *count = ibidi_rd_u64(r);
    return *count <= IBIDI_CHUNKS_PER_ROW ? IBID_OK : ibidi_corrupt(IBIDI_CHUNK, k->b, k->n);
}

ibid_err ibidi_chunks_get(ibidi_txn *t, uint64_t document, uint64_t want, ibid_arena *a,
                          ibid_chunk **out) {
    size_t bytes;
    ibidi_key k = ibidi_key_1(document);

    if (want > UINT32_MAX || !ibid_mul_size(want, sizeof **out, &bytes))
        return ibidi_corrupt(IBIDI_DOCUMENT, k.b, k.n);
    ibid_chunk *all = ibid_arena_alloc(a, bytes);
    if (!all) return ibid_fail(IBID_NOMEM, "out of memory for %zu bytes of chunks", bytes);
    for (uint64_t first = 0; first < want; first += IBIDI_CHUNKS_PER_ROW) {
        ibidi_rd r;
        uint64_t count = 0, left = want - first;
        ibid_err e = chunk_row(t, document, first, &k, &r, &count);
        if (e) return e;
        if (count != (left < IBIDI_CHUNKS_PER_ROW ? left : IBIDI_CHUNKS_PER_ROW))
            return ibidi_corrupt(IBIDI_CHUNK, k.b, k.n);
        for (uint64_t i = 0; i < count; i++) chunk_read(&r, &all[first + i]);
        if (!ibidi_rd_done(&r)) return ibidi_corrupt(IBIDI_CHUNK, k.b, k.n);
    }
    *out = all;
    return IBID_OK;
}

ibid_err ibidi_chunk_get(ibidi_txn *t, uint64_t document, uint64_t n, ibid_chunk *out) {
    ibidi_key k = ibidi_key_2(document, row_of(n));
    ibidi_rd r;
    ibid_err e = ibidi_get(t, IBIDI_CHUNK, &k, &r);
    if (e) return e;
    uint64_t count = ibidi_rd_u64(&r), at = n - row_of(n);
    if (at >= count) return IBID_NOTFOUND;
    for (uint64_t i = 0; i <= at && !r.bad; i++) chunk_read(&r, out);
    return r.bad ? ibidi_corrupt(IBIDI_CHUNK, k.b, k.n) : IBID_OK;
}

ibid_err ibidi_chunks_put(ibidi_txn *t, uint64_t document, const ibid_chunk *c, size_t n) {
    ibid_err e = IBID_OK;
    ibidi_wr w;
    ibidi_wr_init(&w);
    for (size_t first = 0; first < n && !e; first += IBIDI_CHUNKS_PER_ROW) {
        size_t count = n - first < IBIDI_CHUNKS_PER_ROW ? n - first : IBIDI_CHUNKS_PER_ROW;
        ibid_buf_clear(&w.b);
        ibidi_wr_u64(&w, count);
        for (size_t i = first; i < first + count; i++) {
            ibidi_wr_u64(&w, c[i].start);
            ibidi_wr_u64(&w, c[i].end);
            ibidi_wr_u64(&w, c[i].block);
            ibidi_wr_str(&w, c[i].locator);
            ibidi_wr_pad(&w);
        }
        ibidi_key k = ibidi_key_2(document, first);
        e = ibidi_put_wr(t, IBIDI_CHUNK, &k, &w);
    }
    ibidi_wr_fini(&w);
    return e;
}

ibid_err ibidi_rows_trim(ibidi_txn *t, ibidi_table tab, uint64_t document, uint64_t from) {
    ibidi_cursor c;
    ibid_err e = ibidi_cursor_open(t, tab, &c);
    if (e) return e;
    ibidi_key k = ibidi_key_2(document, from);
    for (e = ibidi_cursor_seek(&c, &k); !e; e = ibidi_cursor_next(&c)) {
        if (c.key.n != 16 || ibidi_load64be(c.key.p) != document) break;
        if ((e = ibidi_cursor_del(&c))) break;
    }
    ibidi_cursor_close(&c);
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

/* ---- Text: rows of 1 MiB, each its own zstd frame, keyed by the row's first byte ---- */

ibid_err ibidi_text_get(ibidi_txn *t, uint64_t document, uint64_t bytes, ibid_buf *out) {
    for (uint64_t first = 0; first < bytes; first += IBIDI_TEXT_PER_ROW) {
        uint64_t left = bytes - first;
        size_t want = left < IBIDI_TEXT_PER_ROW ? (size_t)left : IBIDI_TEXT_PER_ROW;
        ibidi_key k = ibidi_key_2(document, first);
        ibidi_rd r;
        ibid_err e = ibidi_get(t, IBIDI_TEXT, &k, &r);
        if (e == IBID_NOTFOUND) return ibidi_corrupt(IBIDI_TEXT, k.b, k.n);
        if (e) return e;
        size_t n = ibidi_rd_u64(&r);
        const uint8_t *frame = ibidi_rd_bytes(&r, n);
        if (!frame || !ibidi_rd_done(&r)) return ibidi_corrupt(IBIDI_TEXT, k.b, k.n);
        if ((e = ibid_buf_reserve(out, want))) return e;
        size_t got = ZSTD_decompress(out->data + out->len, want, frame, n);
        if (ZSTD_isError(got) || got != want) return ibidi_corrupt(IBIDI_TEXT, k.b, k.n);
        out->len += want;
        out->data[out->len] = '\0';
    }
    return IBID_OK;
}

/* ---- Blocks -------------------------------------------------------------------------------------
 */

ibid_err ibidi_block_decode(uint64_t number, ibidi_rd r, ibid_arena *a, ibid_block *out) {
    ibidi_key k = ibidi_key_1(number);
    ibid_err e = IBID_OK;
    *out = (ibid_block){.number = number};
    out->hash = ibidi_rd_hash(&r);
    out->model = ibidi_rd_hash(&r);
    out->prefix = ibidi_rd_hash(&r);
    uint64_t type = ibidi_rd_u64(&r);
    out->n_title = ibidi_rd_u64(&r);
    out->n_tokens = ibidi_rd_u64(&r);
    out->tokens = array_at(&r, out->n_tokens, sizeof *out->tokens, a, &e);
    if (e) return e;
    if (!ibidi_rd_done(&r) || type > IBID_KV_Q8_0 || out->n_title > out->n_tokens)
        return ibidi_corrupt(IBIDI_BLOCK, k.b, k.n);
    out->kv_type = (ibid_kv_type)type;
    return IBID_OK;
}

ibid_err ibidi_block_get(ibidi_txn *t, uint64_t number, ibid_arena *a, ibid_block *out) {
    ibidi_key k = ibidi_key_1(number);
    ibidi_rd r;
    ibid_err e = ibidi_get(t, IBIDI_BLOCK, &k, &r);
    if (e == IBID_NOTFOUND)
        return ibid_fail(IBID_NOTFOUND, "no block has number %llu", (unsigned long long)number);
    return e ? e : ibidi_block_decode(number, r, a, out);
}

ibid_err ibidi_block_write(ibidi_txn *t, const ibid_block *b) {
    ibidi_key k = ibidi_key_1(b->number), h = ibidi_key_hash(&b->hash);
    uint8_t no[8];
    ibidi_store64(no, b->number);
    ibidi_wr w;
    ibidi_wr_init(&w);
    ibidi_wr_hash(&w, &b->hash);
    ibidi_wr_hash(&w, &b->model);
    ibidi_wr_hash(&w, &b->prefix);
    ibidi_wr_u64(&w, (uint64_t)b->kv_type);
    ibidi_wr_u64(&w, b->n_title);
    ibidi_wr_u64(&w, b->n_tokens);
    for (size_t i = 0; i < b->n_tokens; i++) ibidi_wr_u32(&w, (uint32_t)b->tokens[i]);
    ibid_err e = ibidi_put_wr(t, IBIDI_BLOCK, &k, &w);
    if (!e) e = ibidi_put(t, IBIDI_BLOCK_HASH, &h, no, sizeof no);
    ibidi_wr_fini(&w);
    return e;
}

ibid_err ibidi_block_number(ibidi_txn *t, const ibid_hash *hash, uint64_t *number) {
    ibidi_key k = ibidi_key_hash(hash);
    ibidi_rd r;
    ibid_err e = ibidi_get(t, IBIDI_BLOCK_HASH, &k, &r);
    if (e) return e;
    *number = ibidi_rd_u64(&r);
    return ibidi_rd_done(&r) ? IBID_OK : ibidi_corrupt(IBIDI_BLOCK_HASH, k.b, k.n);
}

ibid_err ibidi_block_state_get(ibidi_txn *t, uint64_t number, ibidi_block_state *out) {
    ibidi_key k = ibidi_key_1(number);
    ibidi_rd r;
    ibid_err e = ibidi_get(t, IBIDI_BLOCK_STATE, &k, &r);
    if (e == IBID_NOTFOUND)
        return ibid_fail(IBID_NOTFOUND, "no block has number %llu", (unsigned long long)number);
    if (e) return e;
    uint64_t w[BLOCK_STATE_WORDS];
    for (size_t i = 0; i < BLOCK_STATE_WORDS; i++) w[i] = ibidi_rd_u64(&r);
    if (!ibidi_rd_done(&r)) return ibidi_corrupt(IBIDI_BLOCK_STATE, k.b, k.n);
    memcpy(out, w, sizeof w);
    return IBID_OK;
}

ibid_err ibidi_block_state_put(ibidi_txn *t, uint64_t number, const ibidi_block_state *s) {
    uint64_t w[BLOCK_STATE_WORDS];
    uint8_t le[sizeof w];
    memcpy(w, s, sizeof w);
    state_words(le, w, BLOCK_STATE_WORDS);
    ibidi_key k = ibidi_key_1(number);
    return ibidi_put(t, IBIDI_BLOCK_STATE, &k, le, sizeof le);
}

void ibidi_block_state_show(const ibidi_block_state *s, ibid_block *out) {
    out->refcount = s->refcount;
    out->last_use_ms = s->last_use_ms;
    out->has_kv = s->n_layers > 0;
}

ibid_err ibidi_keys_get(ibidi_txn *t, uint64_t number, ibid_keys *out) {
    ibidi_key k = ibidi_key_1(number);
    ibidi_rd r;
    ibid_err e = ibidi_get(t, IBIDI_KEYS, &k, &r);
    if (e == IBID_NOTFOUND)
        return ibid_fail(IBID_NOTFOUND, "block %llu has no token keys", (unsigned long long)number);
    if (e) return e;
    *out = (ibid_keys){.calibration = ibidi_rd_hash(&r)};
    out->n_tokens = ibidi_rd_u64(&r);
    out->dim = ibidi_rd_u64(&r);
    size_t bytes;
    if (!ibid_mul_size(out->n_tokens, out->dim, &bytes)) return ibidi_corrupt(IBIDI_KEYS, k.b, k.n);
    out->data = (const int8_t *)ibidi_rd_bytes(&r, bytes);
    return ibidi_rd_done(&r) ? IBID_OK : ibidi_corrupt(IBIDI_KEYS, k.b, k.n);
}

ibid_err ibidi_keys_write(ibidi_txn *t, uint64_t number, const ibid_keys *keys) {
    ibidi_key k = ibidi_key_1(number);
    ibidi_wr w;
    ibidi_wr_init(&w);
    ibidi_wr_hash(&w, &keys->calibration);
    ibidi_wr_u64(&w, keys->n_tokens);
    ibidi_wr_u64(&w, keys->dim);
    ibidi_wr_bytes(&w, keys->data, keys->n_tokens * keys->dim);
    ibid_err e = ibidi_put_wr(t, IBIDI_KEYS, &k, &w);
    ibidi_wr_fini(&w);
    return e;
}

/* ---- Models, jobs, changes ----------------------------------------------------------------------
 */

ibid_err ibidi_model_decode(ibidi_slice key, ibidi_rd r, ibid_arena *a, ibid_model_record *out) {
    *out = (ibid_model_record){.n_layers = 0};
    if (key.n != IBID_HASH_SIZE) return ibidi_corrupt(IBIDI_MODEL, key.p, key.n);
    memcpy(out->fingerprint.b, key.p, key.n);
    ibid_err e = IBID_OK;
    out->n_layers = ibidi_rd_u64(&r);
    out->n_heads = ibidi_rd_u64(&r);
    out->n_kv_heads = ibidi_rd_u64(&r);
    out->head_dim = ibidi_rd_u64(&r);
    out->n_ctx = ibidi_rd_u64(&r);
    out->n_vocab = ibidi_rd_u64(&r);
    out->prefix = ibidi_rd_hash(&r);
    out->calibration_id = ibidi_rd_hash(&r);
    uint64_t type = ibidi_rd_u64(&r);
    out->n_prefix_tokens = ibidi_rd_u64(&r);
    out->prefix_tokens = array_at(&r, out->n_prefix_tokens, sizeof *out->prefix_tokens, a, &e);
    if (e) return e;
    out->name = ibidi_rd_str(&r);
    out->path = ibidi_rd_str(&r);
    out->arch = ibidi_rd_str(&r);
    out->calibration = ibidi_rd_str(&r);
    out->gates = (ibid_str){"", 0};
    if (!r.bad && r.n - r.at >= 4) out->gates = ibidi_rd_str(&r); /* older records end before */
    if (!ibidi_rd_done(&r) || type > IBID_KV_Q8_0) return ibidi_corrupt(IBIDI_MODEL, key.p, key.n);
    out->kv_type = (ibid_kv_type)type;
    return IBID_OK;
}

ibid_err ibidi_model_write(ibidi_txn *t, const ibid_model_record *m) {
    ibidi_key k = ibidi_key_hash(&m->fingerprint);
    ibidi_wr w;
    ibidi_wr_init(&w);
    const uint64_t dims[] = {m->n_layers, m->n_heads, m->n_kv_heads,
                             m->head_dim, m->n_ctx,   m->n_vocab};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) ibidi_wr_u64(&w, dims[i]);
    ibidi_wr_hash(&w, &m->prefix);
    ibidi_wr_hash(&w, &m->calibration_id);
    ibidi_wr_u64(&w, (uint64_t)m->kv_type);
    ibidi_wr_u64(&w, m->n_prefix_tokens);
    for (size_t i = 0; i < m->n_prefix_tokens; i++) ibidi_wr_u32(&w, (uint32_t)m->prefix_tokens[i]);
    ibidi_wr_str(&w, m->name);
    ibidi_wr_str(&w, m->path);
    ibidi_wr_str(&w, m->arch);
    ibidi_wr_str(&w, m->calibration);
    if (m->gates.n) ibidi_wr_str(&w, m->gates);
    ibid_err e = ibidi_put_wr(t, IBIDI_MODEL, &k, &w);
    ibidi_wr_fini(&w);
    return e;
}

ibid_err ibidi_job_decode(uint64_t id, ibidi_rd r, ibid_job *out) {
    ibidi_key k = ibidi_key_1(id);
    *out = (ibid_job){.id = id};
    out->created_ms = ibidi_rd_u64(&r);
    out->updated_ms = ibidi_rd_u64(&r);
    uint64_t error = ibidi_rd_u64(&r);
    out->kind = ibidi_rd_str(&r);
    out->collection = ibidi_rd_str(&r);
    out->state = ibidi_rd_str(&r);
    out->stage = ibidi_rd_str(&r);
    out->spec = ibidi_rd_str(&r);
    out->report = ibidi_rd_str(&r);
    out->error_text = ibidi_rd_str(&r);
    if (!ibidi_rd_done(&r) || error > INT32_MAX) return ibidi_corrupt(IBIDI_JOB, k.b, k.n);
    out->error = (ibid_err)error;
    return IBID_OK;
}

ibid_err ibidi_job_write(ibidi_txn *t, const ibid_job *j) {
    ibidi_key k = ibidi_key_1(j->id);
    ibidi_wr w;
    ibidi_wr_init(&w);
    ibidi_wr_u64(&w, j->created_ms);
    ibidi_wr_u64(&w, j->updated_ms);
    ibidi_wr_u64(&w, (uint64_t)j->error);
    const ibid_str texts[] = {j->kind, j->collection, j->state,     j->stage,
                              j->spec, j->report,     j->error_text};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) ibidi_wr_str(&w, texts[i]);
    ibid_err e = ibidi_put_wr(t, IBIDI_JOB, &k, &w);
    ibidi_wr_fini(&w);
    return e;
}

static bool str_is(ibid_str s, const char *lit) {
    return s.n == strlen(lit) && memcmp(s.s, lit, s.n) == 0;
}

bool ibidi_job_ended(const ibid_job *j) {
    return str_is(j->state, "done") || str_is(j->state, "cancelled") || str_is(j->state, "failed");
}

ibid_err ibidi_change_decode(uint64_t generation, ibidi_rd r, ibid_arena *a, ibid_change *out) {
    ibidi_key k = ibidi_key_1(generation);
    ibid_err e = IBID_OK;
    *out = (ibid_change){.generation = generation};
    out->collection = ibidi_rd_u64(&r);
    out->document = ibidi_rd_u64(&r);
    uint64_t removed = ibidi_rd_u64(&r);
    out->n_added = ibidi_rd_u64(&r);
    out->n_dropped = ibidi_rd_u64(&r);
    out->added = array_at(&r, out->n_added, 8, a, &e);
    out->dropped = array_at(&r, out->n_dropped, 8, a, &e);
    if (e) return e;
    if (!ibidi_rd_done(&r) || removed > 1) return ibidi_corrupt(IBIDI_CHANGE, k.b, k.n);
    out->removed = removed == 1;
    return IBID_OK;
}

ibid_err ibidi_change_write(ibidi_txn *t, const ibid_change *c) {
    ibidi_key k = ibidi_key_1(c->generation);
    ibidi_wr w;
    ibidi_wr_init(&w);
    ibidi_wr_u64(&w, c->collection);
    ibidi_wr_u64(&w, c->document);
    ibidi_wr_u64(&w, c->removed ? 1 : 0);
    ibidi_wr_u64(&w, c->n_added);
    ibidi_wr_u64(&w, c->n_dropped);
    for (size_t i = 0; i < c->n_added; i++) ibidi_wr_u64(&w, c->added[i]);
    for (size_t i = 0; i < c->n_dropped; i++) ibidi_wr_u64(&w, c->dropped[i]);
    ibid_err e = ibidi_put_wr(t, IBIDI_CHANGE, &k, &w);
    ibidi_wr_fini(&w);
    return e;
}

uint64_t ibidi_prefix_owner(const ibid_hash *prefix) {
    return ibidi_load64(prefix->b);
}
