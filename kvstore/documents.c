/* Documents: put, replace, delete, each in one transaction with its chunk list, text, uses,
 * reference counts and change row. */
#include "kvstore/store_internal.h"
#include "rpc/base/clock.h"

#include <stdlib.h>
#include <zstd.h>

enum { ZSTD_LEVEL = 3, ID_MAX = 65536, FIELD_MAX = 16 * 1024 * 1024, CHUNKS_MAX = 1 << 24 };
#define TEXT_MAX ((size_t)4 << 30)

/* ---- The text, compressed before the transaction begins ---- */
typedef struct packed_row {
    uint64_t first;
    size_t at, n;
} packed_row;

typedef struct packed_text {
    ibid_buf frames;
    packed_row *rows;
    size_t n_rows;
} packed_text;

static void packed_fini(packed_text *p) {
    ibid_buf_fini(&p->frames);
    ibid_free(p->rows);
}

static ibid_err pack(ibid_str text, packed_text *p) {
    *p = (packed_text){.n_rows = (text.n + IBIDI_TEXT_PER_ROW - 1) / IBIDI_TEXT_PER_ROW};
    ibid_buf_init(&p->frames, SIZE_MAX / 2);
    p->rows = ibid_calloc(p->n_rows, sizeof *p->rows);
    if (!p->rows) return ibid_fail(IBID_NOMEM, "out of memory for a text");
    for (size_t i = 0; i < p->n_rows; i++) {
        size_t first = i * IBIDI_TEXT_PER_ROW, left = text.n - first;
        size_t n = left < IBIDI_TEXT_PER_ROW ? left : IBIDI_TEXT_PER_ROW,
               bound = ZSTD_compressBound(n);
        ibid_err e = ibid_buf_reserve(&p->frames, bound);
        if (e) return e;
        size_t got =
            ZSTD_compress(p->frames.data + p->frames.len, bound, text.s + first, n, ZSTD_LEVEL);
        if (ZSTD_isError(got))
            return ibid_fail(IBID_NOMEM, "cannot compress a text: %s", ZSTD_getErrorName(got));
        p->rows[i] = (packed_row){first, p->frames.len, got};
        p->frames.len += got;
    }
    return IBID_OK;
}

static ibid_err text_put(ibidi_txn *t, uint64_t document, const packed_text *p) {
    ibid_err e = IBID_OK;
    ibidi_wr w;
    ibidi_wr_init(&w);
    for (size_t i = 0; i < p->n_rows && !e; i++) {
        const packed_row *r = &p->rows[i];
        ibidi_key k = ibidi_key_2(document, r->first);
        ibid_buf_clear(&w.b);
        ibidi_wr_u64(&w, r->n);
        ibidi_wr_bytes(&w, p->frames.data + r->at, r->n);
        e = ibidi_put_wr(t, IBIDI_TEXT, &k, &w);
    }
    ibidi_wr_fini(&w);
    return e;
}

/* ---- Uses: which (block, chunk) pairs a document has, before and after ---- */
typedef struct use {
    uint64_t block, chunk;
} use;

static int by_block(const void *a, const void *b) {
    const use *x = a, *y = b;
    if (x->block != y->block) return x->block < y->block ? -1 : 1;
    return x->chunk < y->chunk ? -1 : x->chunk > y->chunk;
}

static use *sorted_uses(ibid_arena *a, const ibid_chunk *c, size_t n) {
    use *u = ibid_arena_alloc(a, n * sizeof *u);
    for (size_t i = 0; u && i < n; i++) u[i] = (use){c[i].block, i};
    if (u && n) qsort(u, n, sizeof *u, by_block);
    return u;
}

typedef struct use_list {
    const use *u;
    size_t n, at;
} use_list;

typedef struct moves { /* what the change row says */
    uint64_t *added, *dropped;
    size_t n_added, n_dropped;
} moves;

typedef struct use_change {
    ibidi_writer *w;
    uint64_t document, job;
    const ibid_hash *model; /* new blocks must be of this one */
} use_change;

static ibid_err use_row(ibidi_writer *w, const use *u, uint64_t document, bool put) {
    ibidi_key k = ibidi_key_3(u->block, document, u->chunk);
    if (put) return ibidi_put(&w->t, IBIDI_USE, &k, NULL, 0);
    ibid_err e = ibidi_del(&w->t, IBIDI_USE, &k);
    return e == IBID_NOTFOUND ? ibidi_corrupt(IBIDI_USE, k.b, k.n) : e;
}

/* One block's uses, both lists standing at it: rows that differ are written, the count moves by the
 * difference once, so that a block that stays is never an orphan in between. */
static ibid_err block_uses(const use_change *ch, uint64_t block, use_list *old, use_list *now,
                           moves *out) {
    ibidi_writer *w = ch->w;
    size_t had = 0, has = 0;
    ibid_err e = IBID_OK;
    for (;;) {
        const use *o = old->at < old->n && old->u[old->at].block == block ? &old->u[old->at] : NULL;
        const use *v = now->at < now->n && now->u[now->at].block == block ? &now->u[now->at] : NULL;
        if (!o && !v) break;
        if (!v || (o && o->chunk < v->chunk))
            e = use_row(w, o, ch->document, false), v = NULL;
        else if (!o || v->chunk < o->chunk)
            e = use_row(w, v, ch->document, true), o = NULL;
        if (e) return e;
        if (o) old->at++, had++;
        if (v) now->at++, has++;
    }
    ibidi_block_state st, next;
    if ((e = ibidi_block_state_get(&w->t, block, &st))) return e;
    ibid_block b;
    if (has && !had) {
        if ((e = ibidi_block_get(&w->t, block, w->arena, &b))) return e;
        if (ibid_hash_cmp(&b.model, ch->model) != 0)
            return ibid_fail(IBID_MISMATCH,
                             "block %llu was made by another model than the collection's",
                             (unsigned long long)block);
    }
    if (st.refcount < had) {
        ibidi_key k = ibidi_key_1(block);
        return ibidi_corrupt(IBIDI_BLOCK_STATE, k.b, k.n);
    }
    next = st;
    next.refcount = st.refcount - had + has;
    if (has) e = ibidi_hold_drop(w, ch->job, block, &next);
    if (!e && memcmp(&st, &next, sizeof st) != 0) e = ibidi_block_update(w, block, &st, &next);
    if (has && !had) out->added[out->n_added++] = block;
    if (had && !has) out->dropped[out->n_dropped++] = block;
    return e;
}

static ibid_err change_uses(const use_change *ch, const ibid_chunk *old, size_t n_old,
                            const ibid_chunk *now, size_t n_now, moves *out) {
    ibid_arena *a = ch->w->arena;
    use_list o = {sorted_uses(a, old, n_old), n_old, 0}, v = {sorted_uses(a, now, n_now), n_now, 0};
    *out = (moves){.added = ibid_arena_alloc(a, n_now * sizeof *out->added),
                   .dropped = ibid_arena_alloc(a, n_old * sizeof *out->dropped)};
    if (!o.u || !v.u || !out->added || !out->dropped)
        return ibid_fail(IBID_NOMEM, "out of memory for the chunks of a document");
    while (o.at < o.n || v.at < v.n) {
        uint64_t ob = o.at < o.n ? o.u[o.at].block : UINT64_MAX;
        uint64_t vb = v.at < v.n ? v.u[v.at].block : UINT64_MAX;
        ibid_err e = block_uses(ch, ob < vb ? ob : vb, &o, &v, out);
        if (e) return e;
    }
    return IBID_OK;
}

/* ---- The change row, with a bounded history ---- */
static ibid_err record_change(ibidi_writer *w, uint64_t collection, uint64_t document, bool removed,
                              const moves *m) {
    ibid_change c = {.generation = ++w->st.generation,
                     .collection = collection,
                     .document = document,
                     .removed = removed,
                     .added = m->added,
                     .dropped = m->dropped,
                     .n_added = m->n_added,
                     .n_dropped = m->n_dropped};
    ibid_err e = ibidi_change_write(&w->t, &c);
    while (!e && w->st.generation - w->st.history_floor > w->store->shared->history_max) {
        ibidi_key k = ibidi_key_1(++w->st.history_floor);
        e = ibidi_del(&w->t, IBIDI_CHANGE, &k);
        if (e == IBID_NOTFOUND) e = ibidi_corrupt(IBIDI_CHANGE, k.b, k.n);
    }
    return e;
}

/* ---- Put ---- */
typedef struct put_args {
    const ibid_document_put *d;
    const packed_text *text;
    uint64_t number, generation;
} put_args;

static ibid_err index_rows(ibidi_writer *w, uint64_t collection, ibid_str id, uint64_t number) {
    uint8_t no[8];
    ibidi_store64(no, number);
    ibidi_key k = ibidi_document_id_key(collection, id), m = ibidi_key_2(collection, number);
    ibid_err e = ibidi_put(&w->t, IBIDI_DOCUMENT_ID, &k, no, sizeof no);
    return e ? e : ibidi_put(&w->t, IBIDI_MEMBER, &m, NULL, 0);
}

static ibid_err no_such_block(ibid_err e) {
    return e == IBID_NOTFOUND
               ? ibid_fail(e, "a chunk names a block that is not stored; put the block again")
               : e;
}

static ibid_err document_put(ibidi_writer *w, void *arg) {
    put_args *a = arg;
    const ibid_document_put *d = a->d;
    ibid_collection c;
    ibidi_document old = {.collection = 0};
    ibid_chunk *old_chunks = NULL;
    ibid_err e = ibidi_collection_get(&w->t, d->collection, &c);
    if (e) return e;
    e = ibidi_document_lookup(&w->t, c.number, d->id, &a->number);
    bool fresh = e == IBID_NOTFOUND;
    if (fresh)
        a->number = w->st.next_document++;
    else if (!e)
        e = ibidi_document_get(&w->t, a->number, &old);
    if (e && !fresh) return e;
    e = ibidi_chunks_get(&w->t, a->number, old.d.n_chunks, w->arena, &old_chunks);
    if (e) return e;

    use_change ch = {w, a->number, d->job, &c.model};
    moves m;
    e = no_such_block(change_uses(&ch, old_chunks, old.d.n_chunks, d->chunks, d->n_chunks, &m));
    if (!e) e = ibidi_rows_trim(&w->t, IBIDI_CHUNK, a->number, d->n_chunks);
    if (!e) e = ibidi_chunks_put(&w->t, a->number, d->chunks, d->n_chunks);
    if (!e) e = ibidi_rows_trim(&w->t, IBIDI_TEXT, a->number, d->text.n);
    if (!e) e = text_put(&w->t, a->number, a->text);
    if (!e && fresh) e = index_rows(w, c.number, d->id, a->number);
    if (!e) e = record_change(w, c.number, a->number, false, &m);
    if (e) return e;

    c.documents += fresh;
    w->st.documents += fresh;
    c.chunks += d->n_chunks - old.d.n_chunks;
    w->st.chunks += d->n_chunks - old.d.n_chunks;
    c.text_bytes += d->text.n - old.d.text_bytes;
    w->st.text_bytes += d->text.n - old.d.text_bytes;
    a->generation = w->st.generation;
    ibidi_document now = {.collection = c.number,
                          .d = {.number = a->number,
                                .id = d->id,
                                .title = d->title,
                                .source = d->source,
                                .metadata = d->metadata,
                                .reason = d->reason,
                                .content = d->content,
                                .state = d->state,
                                .text_bytes = d->text.n,
                                .n_chunks = d->n_chunks,
                                .generation = a->generation,
                                .indexed_ms = ibid_wall_ms()}};
    e = ibidi_document_write(&w->t, &now);
    return e ? e : ibidi_collection_put(&w->t, &c);
}

static ibid_err check_put(const ibid_document_put *d) {
    if (d->id.n == 0 || d->id.n > ID_MAX)
        return ibid_fail(IBID_INVAL, "a document's id has 1 to %d bytes", ID_MAX);
    if (d->title.n > FIELD_MAX || d->source.n > FIELD_MAX || d->metadata.n > FIELD_MAX ||
        d->reason.n > FIELD_MAX || d->n_chunks > CHUNKS_MAX || d->text.n > TEXT_MAX)
        return ibid_fail(IBID_TOOBIG,
                         "a document's title, metadata, text or chunks are beyond the limits");
    if (d->state < IBID_DOC_READY || d->state > IBID_DOC_FAILED)
        return ibid_fail(IBID_INVAL, "unknown document state %d", (int)d->state);
    bool has_text = d->state == IBID_DOC_READY || d->state == IBID_DOC_PARTIAL;
    if (!has_text && (d->text.n || d->n_chunks))
        return ibid_fail(IBID_INVAL, "a document that is %s has no text and no chunks",
                         ibid_doc_state_name(d->state));
    for (size_t i = 0; i < d->n_chunks; i++)
        if (d->chunks[i].start > d->chunks[i].end || d->chunks[i].end > d->text.n ||
            d->chunks[i].locator.n > FIELD_MAX)
            return ibid_fail(IBID_INVAL, "chunk %zu lies outside its document's text", i);
    return IBID_OK;
}

ibid_err ibid_store_document_put(ibid_store *s, const ibid_document_put *d, uint64_t *number,
                                 uint64_t *generation) {
    packed_text text = {.n_rows = 0};
    ibid_err e = check_put(d);
    if (e) return e;
    put_args a = {.d = d, .text = &text};
    e = pack(d->text, &text);
    if (!e) e = ibidi_write(s, document_put, &a);
    packed_fini(&text);
    if (!e && number) *number = a.number;
    if (!e && generation) *generation = a.generation;
    return e;
}

/* ---- Delete ---- */

/* Everything of the document but its collection's counts. */
static ibid_err remove_document(ibidi_writer *w, ibid_collection *c, uint64_t number, ibid_str id) {
    ibidi_document d;
    ibid_chunk *chunks = NULL;
    ibid_err e = ibidi_document_get(&w->t, number, &d);
    if (e) return e;
    /* The record's strings do not outlive the first write below. */
    ibidi_key k = ibidi_document_id_key(c->number, id.s ? id : d.d.id);
    ibidi_key no = ibidi_key_1(number), member = ibidi_key_2(c->number, number);
    e = ibidi_chunks_get(&w->t, number, d.d.n_chunks, w->arena, &chunks);
    use_change ch = {w, number, 0, &c->model};
    moves m;
    if (!e) e = change_uses(&ch, chunks, d.d.n_chunks, NULL, 0, &m);
    if (!e) e = ibidi_rows_trim(&w->t, IBIDI_CHUNK, number, 0);
    if (!e) e = ibidi_rows_trim(&w->t, IBIDI_TEXT, number, 0);
    if (!e) e = ibidi_del(&w->t, IBIDI_DOCUMENT_ID, &k);
    if (!e) e = ibidi_del(&w->t, IBIDI_MEMBER, &member);
    if (!e) e = ibidi_del(&w->t, IBIDI_DOCUMENT, &no);
    if (!e) e = record_change(w, c->number, number, true, &m);
    if (e == IBID_NOTFOUND) return ibidi_corrupt(IBIDI_DOCUMENT, no.b, no.n);
    if (e) return e;
    c->documents--;
    c->chunks -= d.d.n_chunks;
    c->text_bytes -= d.d.text_bytes;
    w->st.documents--;
    w->st.chunks -= d.d.n_chunks;
    w->st.text_bytes -= d.d.text_bytes;
    return IBID_OK;
}

typedef struct delete_args {
    ibid_str collection, id;
    uint64_t generation;
} delete_args;

static ibid_err document_delete(ibidi_writer *w, void *arg) {
    delete_args *a = arg;
    ibid_collection c;
    uint64_t number;
    ibid_err e = ibidi_collection_get(&w->t, a->collection, &c);
    if (!e) e = ibidi_document_lookup(&w->t, c.number, a->id, &number);
    if (!e) e = remove_document(w, &c, number, a->id);
    if (!e) e = ibidi_collection_put(&w->t, &c);
    a->generation = w->st.generation;
    return e;
}

ibid_err ibid_store_document_delete(ibid_store *s, ibid_str collection, ibid_str id,
                                    uint64_t *generation) {
    delete_args a = {collection, id, 0};
    ibid_err e = ibidi_write(s, document_delete, &a);
    if (!e && generation) *generation = a.generation;
    return e;
}

ibid_err ibidi_documents_drop(ibidi_writer *w, ibid_collection *c) {
    for (;;) {
        ibidi_cursor at;
        ibidi_key k = ibidi_key_2(c->number, 0);
        ibid_err e = ibidi_cursor_open(&w->t, IBIDI_MEMBER, &at);
        if (e) return e;
        e = ibidi_cursor_seek(&at, &k);
        bool mine = !e && at.key.n == 16 && ibidi_load64be(at.key.p) == c->number;
        uint64_t number = mine ? ibidi_load64be(at.key.p + 8) : 0;
        ibidi_cursor_close(&at);
        if (e == IBID_NOTFOUND || (!e && !mine)) return IBID_OK;
        if (!e) e = remove_document(w, c, number, (ibid_str){NULL, 0});
        if (e) return e;
        ibid_arena_reset(w->arena);
    }
}
