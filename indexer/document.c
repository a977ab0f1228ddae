/* One file's documents: read by the extractor, cut, encoded, committed.
 *
 * A document longer than PART_MAX bytes becomes several: the id, then id#2, id#3, ... each
 * committed as soon as it is encoded, so that a file of any length needs little memory and a
 * resumed job goes on in its middle. Each part's content hash says whether another follows; a file
 * is unchanged when the chain of its parts is stored up to one that ends it. */
#include "indexer/chunk.h"
#include "indexer/internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { PART_MAX = 8 * 1024 * 1024, BATCH = 32, TITLE_ROOM = 64 };

struct place {
    uint64_t at;
    size_t name, n; /* in doc.names */
};

struct doc {
    ibidi_ix_work *w;
    const ibid_walk_file *file;
    ibid_hash file_hash;
    bool of_file; /* the document is the file itself, not a line of it */
    ibid_buf id, title, metadata, text, names, part_id;
    struct place *places;
    size_t n_places, places_room;
    uint64_t part;                    /* number of the part being gathered, from 1 */
    bool skip;                        /* a second document with an id seen before */
    uint64_t chunks, encoded, reused; /* of all parts so far */
    size_t changed;                   /* parts that were not stored already */
    ibid_buf last_title;              /* what title_tokens belong to */
    bool title_known;
    int32_t title_tokens[TITLE_ROOM];
    size_t n_title;
};

static ibid_str str_of(const ibid_buf *b) {
    return (ibid_str){b->data ? b->data : "", b->len};
}

static ibid_err set(ibid_buf *b, ibid_str s) {
    ibid_buf_clear(b);
    return ibid_buf_append(b, s.s, s.n);
}

/* The id of part number `part` of a document. */
static ibid_err part_id(ibid_buf *out, ibid_str id, uint64_t part) {
    ibid_err e = set(out, id);
    if (!e && part > 1) e = ibid_buf_printf(out, "#%llu", (unsigned long long)part);
    return e;
}

static ibid_hash file_content(const ibid_hash *file, uint64_t part, bool last) {
    ibid_hasher h;
    ibid_hasher_init(&h);
    ibid_hasher_field(&h, "file", 4);
    ibid_hasher_u64(&h, IBID_EXTRACT_VERSION);
    ibid_hasher_field(&h, file->b, sizeof file->b);
    ibid_hasher_u64(&h, part);
    ibid_hasher_u64(&h, last);
    return ibid_hasher_final(&h);
}

static ibid_hash content_of(const struct doc *d, bool last) {
    if (d->of_file) return file_content(&d->file_hash, d->part, last);
    ibid_hasher h;
    ibid_hasher_init(&h);
    ibid_hasher_field(&h, "line", 4);
    ibid_hasher_u64(&h, IBID_EXTRACT_VERSION);
    ibid_hasher_field(&h, d->title.data, d->title.len);
    ibid_hasher_field(&h, d->metadata.data, d->metadata.len);
    ibid_hasher_field(&h, d->text.data, d->text.len);
    ibid_hasher_u64(&h, last);
    return ibid_hasher_final(&h);
}

/* What is stored under an id. */
struct stored {
    bool exists, mine; /* mine: from the file at hand */
    ibid_doc_state state;
    ibid_hash content;
    bool by_this_job;
    uint64_t n_chunks;
    char reason[256];
};

static ibid_err look_up(ibidi_ix_work *w, ibid_str id, const char *path, struct stored *out) {
    ibid_snap *n = NULL;
    ibid_document d;
    *out = (struct stored){0};
    ibid_err e = ibid_snap_begin(w->store, &n);
    if (!e) e = ibid_snap_document(n, ibidi_ix_istr(w->job->collection), id, &d);
    if (!e) {
        out->exists = true;
        out->mine = ibidi_ix_str_is(d.source, ibidi_ix_istr(path));
        out->state = d.state;
        out->content = d.content;
        out->by_this_job = d.indexed_ms >= w->job->created_ms;
        out->n_chunks = d.n_chunks;
        (void)snprintf(out->reason, sizeof out->reason, "%.*s", (int)d.reason.n, d.reason.s);
    }
    if (n) ibid_snap_end(n);
    return e == IBID_NOTFOUND || e == IBID_NOCOLLECTION ? IBID_OK : e;
}

static bool same(const struct stored *s, const ibid_hash *content) {
    return s->exists && s->state != IBID_DOC_FAILED && ibid_hash_cmp(&s->content, content) == 0;
}

/* ---- Committing ---- */

static ibid_err put_document(ibidi_ix_work *w, const ibid_document_put *put) {
    uint64_t number = 0, generation = 0, start = 0;
    ibid_err e;
    do e = ibid_kvc_document_put(w->room->kv, put, &number, &generation);
    while (ibidi_ix_again(w, &e, &start));
    if (!e) w->generation = generation;
    return e;
}

static ibid_err delete_document(ibidi_ix_work *w, ibid_str id) {
    uint64_t generation = 0, start = 0;
    ibid_err e;
    do
        e = ibid_kvc_document_delete(w->room->kv, ibidi_ix_istr(w->job->collection), id,
                                     &generation);
    while (ibidi_ix_again(w, &e, &start));
    if (!e) w->generation = generation;
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

/* A document without text: empty, unsupported or failed. A failure never hides an earlier version
 * that can be read: that one stays, and only the job's result tells of the failure. */
static ibid_err put_state(ibidi_ix_work *w, const char *path, ibid_str id, ibid_str title,
                          ibid_doc_state state, const ibid_hash *content, const char *reason) {
    struct stored old;
    char text[IBID_EXTRACT_REASON_MAX + 64];
    ibid_err e = ibidi_ix_seen_add(&w->seen, id);
    if (e || w->measure) return e;
    e = look_up(w, id, path, &old);
    (void)snprintf(text, sizeof text, "%s", reason);
    bool readable = old.state == IBID_DOC_READY || old.state == IBID_DOC_PARTIAL;
    if (!e && state == IBID_DOC_FAILED && old.exists && readable) {
        (void)snprintf(text, sizeof text, "%s; the version indexed before stays", reason);
    } else if (!e) {
        const ibid_document_put put = {.collection = ibidi_ix_istr(w->job->collection),
                                       .id = id,
                                       .title = title,
                                       .source = ibidi_ix_istr(path),
                                       .metadata = {"", 0},
                                       .reason = ibidi_ix_istr(text),
                                       .content = *content,
                                       .state = state,
                                       .text = {"", 0},
                                       .job = w->job->id};
        e = put_document(w, &put);
    }
    if (e) return e;
    return ibidi_ix_report(w, ibidi_ix_istr(path), id, ibid_doc_state_name(state),
                           ibidi_ix_istr(text), 0, 0, 0);
}

static ibid_err put_failed(ibidi_ix_work *w, const char *path, ibid_str id, const char *reason) {
    const ibid_hash none = {{0}};
    const char *slash = strrchr(path, '/');
    return put_state(w, path, id, ibidi_ix_istr(slash ? slash + 1 : path), IBID_DOC_FAILED, &none,
                     reason);
}

/* ---- Tokens ---- */

struct tokens {
    int32_t *ids;
    uint64_t *ends;
    size_t n, room;
};

static void tokens_fini(struct tokens *t) {
    ibid_free(t->ids);
    ibid_free(t->ends);
    *t = (struct tokens){0};
}

static ibid_err ask_tokens(ibidi_ix_work *w, ibid_str text, ibid_tokens *out) {
    uint64_t start = 0;
    ibid_err e;
    *out = (ibid_tokens){0};
    do e = ibid_attn_tokenize(w->room->attn, &w->job->model, text, out);
    while (ibidi_ix_again(w, &e, &start));
    return e;
}

/* Appends one slab's tokens, which begin at byte `base`. */
static ibid_err append_tokens(struct tokens *t, const ibid_tokens *more, uint64_t base) {
    size_t need, bytes;
    if (!ibid_add_size(t->n, more->n, &need) || !ibid_mul_size(need, 2 * sizeof(uint64_t), &bytes))
        return ibid_fail(IBID_TOOBIG, "too many tokens");
    if (need > t->room) {
        size_t room = need + need / 2;
        int32_t *ids = ibid_realloc(t->ids, room * sizeof *ids);
        if (ids) t->ids = ids;
        uint64_t *ends = ids ? ibid_realloc(t->ends, room * sizeof *ends) : NULL;
        if (!ends) return ibid_fail(IBID_NOMEM, "out of memory for %zu tokens", room);
        t->ends = ends;
        t->room = room;
    }
    for (size_t i = 0; i < more->n; i++) {
        t->ids[t->n + i] = more->ids[i];
        t->ends[t->n + i] = base + more->ends[i];
    }
    t->n = need;
    return IBID_OK;
}

static ibid_err tokenize(ibidi_ix_work *w, ibid_str text, struct tokens *out) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < text.n;) {
        ibid_tokens slab;
        size_t n = ibid_chunk_slab(text.s + i, text.n - i);
        e = ibidi_ix_check(w);
        if (!e) e = ask_tokens(w, (ibid_str){text.s + i, n}, &slab);
        if (!e) {
            e = append_tokens(out, &slab, i);
            ibid_free(slab.ids);
        }
        i += n;
    }
    return e;
}

/* The title line's tokens, kept while the title stays the same. */
static ibid_err title_line(struct doc *d) {
    ibid_tokens t = {0};
    ibid_str title = str_of(&d->title);
    if (d->title_known && ibidi_ix_str_is(str_of(&d->last_title), title)) return IBID_OK;
    d->title_known = false;
    d->n_title = 0;
    ibid_err e = set(&d->last_title, title);
    if (e || !title.n) return d->title_known = !e, e;
    e = ask_tokens(d->w, title, &t);
    size_t keep = e ? 0 : ibid_chunk_title(title, t.ends, t.n);
    ibid_free(t.ids);
    /* With the line feed a tokenizer may split otherwise: cut words until it fits. */
    while (!e && keep > 0) {
        ibid_buf line;
        ibid_buf_init(&line, 4096);
        e = ibid_buf_append(&line, title.s, keep);
        if (!e) e = ibid_buf_append(&line, "\n", 1);
        t = (ibid_tokens){0};
        if (!e) e = ask_tokens(d->w, str_of(&line), &t);
        ibid_buf_fini(&line);
        if (!e && t.n <= IBID_TITLE_TOKENS + 1) {
            memcpy(d->title_tokens, t.ids, t.n * sizeof *t.ids);
            d->n_title = t.n;
            ibid_free(t.ids);
            break;
        }
        ibid_free(t.ids);
        keep--;
        while (keep > 0 && (title.s[keep] != ' ')) keep--;
    }
    d->title_known = !e;
    return e;
}

/* ---- One part ---- */

static void locators_of(const struct doc *d, ibid_locator *out) {
    for (size_t i = 0; i < d->n_places; i++)
        out[i] =
            (ibid_locator){d->places[i].at, {d->names.data + d->places[i].name, d->places[i].n}};
}

/* First pass: which of these blocks are stored already? */
static ibid_err count_blocks(struct doc *d, const struct tokens *t, const ibid_cut *cuts,
                             size_t n) {
    ibidi_ix_work *w = d->w;
    ibid_snap *snap = NULL;
    int32_t tokens[IBID_BLOCK_TOKENS_MAX];
    uint64_t total = 0, fresh = 0, bytes = 0;
    ibid_err e = ibid_snap_begin(w->store, &snap);
    memcpy(tokens, d->title_tokens, d->n_title * sizeof *tokens);
    for (size_t i = 0; !e && i < n; i++) {
        size_t n_tokens = d->n_title + cuts[i].n_tokens;
        ibid_block b;
        memcpy(tokens + d->n_title, t->ids + cuts[i].token0, cuts[i].n_tokens * sizeof *tokens);
        ibid_hash hash = ibid_block_hash(&w->job->model, &w->record.prefix, w->record.kv_type,
                                         d->n_title, tokens, n_tokens);
        ibid_err found = ibid_snap_block_find(snap, &hash, d->n_title, tokens, n_tokens, &b);
        total += n_tokens;
        if (found == IBID_OK && b.has_kv) continue;
        if (found != IBID_OK && found != IBID_NOTFOUND) e = found;
        fresh += n_tokens;
        bytes += ibidi_ix_block_bytes(&w->model, n_tokens);
    }
    if (snap) ibid_snap_end(snap);
    (void)pthread_mutex_lock(&w->room->mutex);
    w->job->counts.tokens_total += total;
    w->job->counts.forecast_tokens += fresh;
    w->job->counts.forecast_bytes += bytes + d->text.len / 2;
    (void)pthread_mutex_unlock(&w->room->mutex);
    return e;
}

static ibid_err encode_batch(struct doc *d, const struct tokens *t, const ibid_cut *cuts, size_t n,
                             ibid_chunk *chunks) {
    ibidi_ix_work *w = d->w;
    int32_t tokens[BATCH][IBID_BLOCK_TOKENS_MAX];
    ibid_encode_block blocks[BATCH];
    uint64_t numbers[BATCH], total = 0, start = 0;
    ibid_encode_result r = {0};
    for (size_t i = 0; i < n; i++) {
        memcpy(tokens[i], d->title_tokens, d->n_title * sizeof **tokens);
        memcpy(tokens[i] + d->n_title, t->ids + cuts[i].token0, cuts[i].n_tokens * sizeof **tokens);
        blocks[i] = (ibid_encode_block){d->n_title, d->n_title + cuts[i].n_tokens, tokens[i]};
        total += blocks[i].n_tokens;
    }
    ibid_err e = ibidi_ix_check(w);
    if (e) return e;
    do e = ibid_attn_encode(w->room->attn, &w->job->model, w->job->id, blocks, n, numbers, &r);
    while (ibidi_ix_again(w, &e, &start));
    if (e) return e;
    for (size_t i = 0; i < n; i++)
        chunks[i] = (ibid_chunk){cuts[i].start, cuts[i].end, cuts[i].locator, numbers[i]};
    d->encoded += r.encoded_tokens;
    d->reused += r.reused_tokens;

    (void)pthread_mutex_lock(&w->room->mutex);
    ibidi_ix_counts *c = &w->job->counts;
    w->encode_ms += r.encoded_tokens ? r.ms : 0;
    c->encoded_tokens += r.encoded_tokens;
    c->reused_tokens += r.reused_tokens;
    c->kv_bytes += r.encoded_tokens * w->model.kv_bytes_per_token;
    c->tokens_done += total;
    if (w->encode_ms > 0) {
        c->tokens_per_s = (double)c->encoded_tokens * 1000 / w->encode_ms;
        w->room->tokens_per_s = c->tokens_per_s;
    }
    uint64_t left =
        c->forecast_tokens > c->encoded_tokens ? c->forecast_tokens - c->encoded_tokens : 0;
    c->seconds_left = c->tokens_per_s > 0 ? (double)left / c->tokens_per_s : -1;
    (void)pthread_cond_broadcast(&w->room->news);
    (void)pthread_mutex_unlock(&w->room->mutex);
    ibidi_ix_progress(w, false);
    return IBID_OK;
}

static ibid_err commit_part(struct doc *d, const struct tokens *t, const ibid_cut *cuts, size_t n,
                            const ibid_hash *content, ibid_doc_state state, const char *reason) {
    ibid_err e = IBID_OK;
    ibid_chunk *chunks = ibid_calloc(n, sizeof *chunks);
    if (!chunks) return ibid_fail(IBID_NOMEM, "out of memory for %zu chunks", n);
    /* Blocks are held for the job, so NOTFOUND is rare (a store restored from a copy): once more.
     */
    const ibid_document_put put = {.collection = ibidi_ix_istr(d->w->job->collection),
                                   .id = str_of(&d->part_id),
                                   .title = str_of(&d->title),
                                   .source = ibidi_ix_istr(d->file->path),
                                   .metadata = str_of(&d->metadata),
                                   .reason = ibidi_ix_istr(reason),
                                   .content = *content,
                                   .state = state,
                                   .text = str_of(&d->text),
                                   .chunks = chunks,
                                   .n_chunks = n,
                                   .job = d->w->job->id};
    for (int attempt = 0; attempt < 2; attempt++) {
        e = IBID_OK;
        for (size_t i = 0; !e && i < n; i += BATCH)
            e = encode_batch(d, t, cuts + i, n - i < BATCH ? n - i : BATCH, chunks + i);
        if (!e) e = put_document(d->w, &put);
        if (e != IBID_NOTFOUND) break;
    }
    if (!e) d->chunks += n;
    ibid_free(chunks);
    return e;
}

/* The gathered text is a part: cut it, then count or commit it. */
static ibid_err end_part(struct doc *d, bool last, ibid_doc_state state, const char *reason) {
    struct tokens t = {0};
    struct stored old;
    ibid_cut *cuts = NULL;
    size_t n = 0;
    ibid_hash content = content_of(d, last);
    ibid_locator *locators = NULL;
    ibid_err e = part_id(&d->part_id, str_of(&d->id), d->part);
    if (!e) e = ibidi_ix_seen_add(&d->w->seen, str_of(&d->part_id));
    if (!e) e = look_up(d->w, str_of(&d->part_id), d->file->path, &old);
    if (e) return e;
    if (same(&old, &content) && old.mine) {
        d->chunks += old.n_chunks;
        return IBID_OK;
    }
    d->changed++;
    locators = ibid_calloc(d->n_places, sizeof *locators);
    if (!locators) return ibid_fail(IBID_NOMEM, "out of memory for locators");
    locators_of(d, locators);
    e = title_line(d);
    if (!e) e = tokenize(d->w, str_of(&d->text), &t);
    if (!e)
        e = ibid_chunk_cut(str_of(&d->text), t.ends, t.n, locators, d->n_places,
                           IBID_BLOCK_TOKENS_MAX - d->n_title, &cuts, &n);
    if (!e && d->w->measure) e = count_blocks(d, &t, cuts, n);
    if (!e && !d->w->measure) e = commit_part(d, &t, cuts, n, &content, state, reason);
    ibid_free(cuts);
    ibid_free(locators);
    tokens_fini(&t);
    return e;
}

/* Where a text of more than PART_MAX bytes is cut: behind a paragraph, a line, a word, a character.
 */
static size_t part_end(ibid_str t) {
    for (size_t i = t.n - 1; i > t.n / 2; i--)
        if (t.s[i - 1] == '\n' && t.s[i - 2] == '\n') return i;
    for (size_t i = t.n - 1; i > t.n / 2; i--)
        if (t.s[i - 1] == '\n' || t.s[i - 1] == ' ') return i;
    size_t i = t.n - 1;
    while (i > 1 && ((unsigned char)t.s[i] & 0xC0) == 0x80) i--;
    return i;
}

/* Ends a part inside a document; what is left begins the next one. */
static ibid_err split(struct doc *d) {
    size_t cut = part_end(str_of(&d->text)), end = cut, first = cut;
    ibid_buf rest;
    struct place before = {0};
    bool any = false;
    while (end > 0 && (d->text.data[end - 1] == '\n' || d->text.data[end - 1] == ' ')) end--;
    while (first < d->text.len && (d->text.data[first] == '\n' || d->text.data[first] == ' '))
        first++;
    ibid_buf_init(&rest, PART_MAX);
    ibid_err e = ibid_buf_append(&rest, d->text.data + first, d->text.len - first);
    if (!e && end > 0) {
        d->text.len = end;
        e = end_part(d, false, IBID_DOC_READY, "");
        d->part++;
    }
    size_t kept = 0;
    for (size_t i = 0; i < d->n_places; i++) {
        if (d->places[i].at <= first) {
            before = d->places[i];
            any = true;
            continue;
        }
        if (any) { /* the place in force at the cut comes first */
            d->places[kept++] = (struct place){0, before.name, before.n};
            any = false;
        }
        d->places[kept] = d->places[i];
        d->places[kept++].at -= first;
    }
    if (any) d->places[kept++] = (struct place){0, before.name, before.n};
    d->n_places = kept;
    ibid_buf_clear(&d->text);
    if (!e) e = ibid_buf_append(&d->text, rest.data, rest.len);
    ibid_buf_fini(&rest);
    return e;
}

/* ---- Frames ---- */

static ibid_err begin(struct doc *d, const ibid_frame *f) {
    d->of_file = f->id.n == 0;
    d->part = 1;
    d->n_places = 0;
    d->chunks = d->encoded = d->reused = d->changed = 0;
    ibid_buf_clear(&d->text);
    ibid_buf_clear(&d->names);
    ibid_err e = set(&d->id, d->of_file ? ibidi_ix_istr(d->file->path) : f->id);
    if (!e) e = set(&d->title, f->title);
    if (!e) e = set(&d->metadata, f->metadata);
    d->skip = !e && ibidi_ix_seen_has(&d->w->seen, str_of(&d->id));
    return e;
}

static ibid_err locator(struct doc *d, ibid_str name) {
    if (d->n_places == d->places_room) {
        size_t room = d->places_room ? d->places_room * 2 : 64;
        struct place *grown = ibid_realloc(d->places, room * sizeof *grown);
        if (!grown) return ibid_fail(IBID_NOMEM, "out of memory for locators");
        d->places = grown;
        d->places_room = room;
    }
    d->places[d->n_places++] = (struct place){d->text.len, d->names.len, name.n};
    return ibid_buf_append(&d->names, name.s, name.n);
}

/* Parts of an older, longer version: id#k and on. */
static ibid_err drop_parts(struct doc *d, uint64_t part) {
    ibid_err e = IBID_OK;
    for (bool more = true; !e && more && !d->w->measure; part++) {
        struct stored old;
        e = part_id(&d->part_id, str_of(&d->id), part);
        if (!e) e = look_up(d->w, str_of(&d->part_id), d->file->path, &old);
        more = !e && old.exists && old.mine;
        if (more) e = delete_document(d->w, str_of(&d->part_id));
    }
    return e;
}

static ibid_err end(struct doc *d, const ibid_frame *f) {
    char reason[IBID_EXTRACT_REASON_MAX];
    (void)snprintf(reason, sizeof reason, "%.*s", (int)f->text.n, f->text.s);
    ibid_str id = str_of(&d->id), path = ibidi_ix_istr(d->file->path);
    if (d->skip) {
        if (d->w->measure) return IBID_OK;
        return ibidi_ix_report(d->w, path, id, "failed",
                               ibidi_ix_istr("another document of this job has the same id"), 0, 0,
                               0);
    }
    if (f->state == IBID_DOC_FAILED) return put_failed(d->w, d->file->path, id, reason);
    ibid_err e = IBID_OK;
    if (f->state == IBID_DOC_EMPTY || f->state == IBID_DOC_UNSUPPORTED) {
        struct stored old;
        ibid_hash content = content_of(d, true);
        e = ibidi_ix_seen_add(&d->w->seen, id);
        if (!e) e = look_up(d->w, id, d->file->path, &old);
        if (!e && same(&old, &content) && old.mine && !d->of_file && !d->w->measure)
            return ibidi_ix_report(d->w, path, id, "unchanged", ibidi_ix_istr(""), 0, 0, 0);
        if (!e)
            e = put_state(d->w, d->file->path, id, str_of(&d->title), f->state, &content, reason);
        return e ? e : drop_parts(d, 2);
    }
    e = end_part(d, true, f->state, reason);
    if (!e) e = drop_parts(d, d->part + 1);
    if (e || d->w->measure) return e;
    const char *state = d->changed ? ibid_doc_state_name(f->state) : "unchanged";
    return ibidi_ix_report(d->w, path, id, state, ibidi_ix_istr(d->changed ? reason : ""),
                           d->chunks, d->encoded, d->reused);
}

static ibid_err note(struct doc *d, const ibid_frame *f) {
    char reason[IBID_EXTRACT_REASON_MAX + 32];
    (void)snprintf(reason, sizeof reason, "line %llu: %.*s", (unsigned long long)f->line,
                   (int)f->text.n, f->text.s);
    /* A line that cannot be read now must not count as gone. */
    ibid_err e = f->id.n ? ibidi_ix_seen_add(&d->w->seen, f->id) : IBID_OK;
    if (e || d->w->measure) return e;
    return ibidi_ix_report(d->w, ibidi_ix_istr(d->file->path), f->id, "failed",
                           ibidi_ix_istr(reason), 0, 0, 0);
}

static ibid_err take(struct doc *d, const ibid_frame *f) {
    ibid_err e;
    switch (f->kind) {
    case IBID_FRAME_BEGIN:
        return begin(d, f);
    case IBID_FRAME_LOCATOR:
        return d->skip ? IBID_OK : locator(d, f->text);
    case IBID_FRAME_TEXT:
        if (d->skip) return IBID_OK;
        e = d->text.len + f->text.n > PART_MAX ? split(d) : IBID_OK;
        return e ? e : ibid_buf_append(&d->text, f->text.s, f->text.n);
    case IBID_FRAME_END:
        return end(d, f);
    case IBID_FRAME_NOTE:
        return note(d, f);
    default:
        return IBID_OK;
    }
}

/* ---- One file ---- */

static ibid_err hash_file(ibidi_ix_work *w, int fd, ibid_hash *out) {
    char *buf = ibid_alloc(256 * 1024);
    ibid_hasher h;
    ibid_err e = buf ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory");
    ibid_hasher_init(&h);
    while (!e) {
        ssize_t n = read(fd, buf, 256 * 1024);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) e = ibid_fail_errno(errno, "reading", "the file");
        if (n <= 0) break;
        ibid_hasher_raw(&h, buf, (size_t)n);
        e = ibidi_ix_check(w);
    }
    *out = ibid_hasher_final(&h);
    ibid_free(buf);
    return e;
}

/* Is the file stored as it is now? Then its documents count as seen, and are reported. */
static ibid_err unchanged(struct doc *d, bool *yes) {
    struct stored first = {0}, s = {0};
    uint64_t chunks = 0, part = 1;
    ibid_str path = ibidi_ix_istr(d->file->path);
    ibid_err e = IBID_OK;
    bool over = false;
    *yes = false;
    while (!e && !over) {
        ibid_hash more = file_content(&d->file_hash, part, false);
        ibid_hash last = file_content(&d->file_hash, part, true);
        e = part_id(&d->part_id, path, part);
        if (!e) e = look_up(d->w, str_of(&d->part_id), d->file->path, &s);
        if (part == 1) first = s;
        *yes = !e && same(&s, &last) && s.mine;
        over = *yes || !same(&s, &more) || !s.mine;
        chunks += s.n_chunks;
        part++;
    }
    for (uint64_t k = 1; !e && *yes && k < part; k++) {
        e = part_id(&d->part_id, path, k);
        if (!e) e = ibidi_ix_seen_add(&d->w->seen, str_of(&d->part_id));
    }
    if (e || !*yes || d->w->measure) return e;
    /* Committed by this very job before it was interrupted: the result is its own. */
    const char *state = first.by_this_job ? ibid_doc_state_name(s.state) : "unchanged";
    return ibidi_ix_report(d->w, path, path, state, ibidi_ix_istr(s.reason), chunks, 0, 0);
}

static ibid_err extract(struct doc *d, int fd, ibid_format format) {
    ibid_extraction *x = NULL;
    ibid_frame f = {0};
    const char *slash = strrchr(d->file->path, '/');
    const ibid_extract_limits limits = {.stop = &d->w->room->stop_child};
    bool child_failed = false;
    ibid_err e = ibid_extraction_open(d->w->room->program, fd, slash ? slash + 1 : d->file->path,
                                      format, &limits, &x);
    while (!e && f.kind != IBID_FRAME_DONE) {
        e = ibid_extraction_next(x, &f);
        child_failed = e && e != IBID_CANCELLED && e != IBID_NOMEM;
        if (!e) e = take(d, &f);
    }
    ibid_extraction_close(x);
    if (!child_failed) return e;
    char reason[IBID_EXTRACT_REASON_MAX];
    (void)snprintf(reason, sizeof reason, "%s", ibid_err_detail());
    d->w->keep_all |= format == IBID_FORMAT_JSONL; /* lines after it are unknown */
    return put_failed(d->w, d->file->path, ibidi_ix_istr(d->file->path), reason);
}

static ibid_err open_and_read(struct doc *d) {
    ibidi_ix_work *w = d->w;
    ibid_str path = ibidi_ix_istr(d->file->path);
    ibid_format format = ibid_format_of(d->file->path);
    int fd = -1;
    uint64_t size = 0;
    bool done = false;
    if (d->file->reason) { /* nothing to read; a vanished file is the pruning's business */
        if (w->measure) return IBID_OK;
        return ibidi_ix_report(w, path, path, "failed", ibidi_ix_istr(d->file->reason), 0, 0, 0);
    }
    if (format == IBID_FORMAT_NONE) {
        ibid_hash content = ibid_hash_bytes("unsupported", 11);
        struct stored old;
        ibid_err e = look_up(w, path, d->file->path, &old);
        if (!e && same(&old, &content) && !w->measure) {
            e = ibidi_ix_seen_add(&w->seen, path);
            return e ? e : ibidi_ix_report(w, path, path, "unchanged", ibidi_ix_istr(""), 0, 0, 0);
        }
        const char *slash = strrchr(d->file->path, '/');
        return e ? e
                 : put_state(w, d->file->path, path,
                             ibidi_ix_istr(slash ? slash + 1 : d->file->path), IBID_DOC_UNSUPPORTED,
                             &content, "not a format ibid reads (.txt .md .html .pdf .jsonl)");
    }
    ibid_err e = ibid_walk_open(d->file->path, &fd, &size);
    if (e == IBID_IO || e == IBID_NOTFOUND || e == IBID_NOTSUP) {
        char reason[IBID_EXTRACT_REASON_MAX];
        (void)snprintf(reason, sizeof reason, "%s", ibid_err_detail());
        return put_failed(w, d->file->path, path, reason);
    }
    if (!e) e = hash_file(w, fd, &d->file_hash);
    if (!e && format != IBID_FORMAT_JSONL) e = unchanged(d, &done);
    if (!e && !done) e = extract(d, fd, format);
    /* A row about the whole file, from when it was empty or failed, is over once its lines are
     * read. */
    if (!e && format == IBID_FORMAT_JSONL && !w->measure && !ibidi_ix_seen_has(&w->seen, path)) {
        struct stored old;
        e = look_up(w, path, d->file->path, &old);
        if (!e && old.exists && old.mine) e = delete_document(w, path);
    }
    if (fd >= 0) (void)close(fd);
    return e;
}

/* Messages carry text: a path must be UTF-8. The frame reader's own check tells. */
static bool is_utf8(const char *s) {
    ibid_frame f = {.kind = IBID_FRAME_TEXT};
    return ibidi_xt_frame_payload(s, strlen(s), &f) == IBID_OK;
}

ibid_err ibidi_ix_file(ibidi_ix_work *w, const ibid_walk_file *f) {
    struct doc d = {.w = w, .file = f};
    ibid_buf *bufs[] = {&d.id, &d.title, &d.metadata, &d.text, &d.names, &d.part_id, &d.last_title};
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++)
        ibid_buf_init(bufs[i], (size_t)2 * PART_MAX);
    ibid_err e;
    if (is_utf8(f->path))
        e = open_and_read(&d);
    else if (w->measure)
        e = IBID_OK;
    else
        e = ibidi_ix_report(w, ibidi_ix_istr("(a name that is not UTF-8)"), ibidi_ix_istr(""),
                            "failed", ibidi_ix_istr("its path is not UTF-8: rename it"), 0, 0, 0);
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++) ibid_buf_fini(bufs[i]);
    ibid_free(d.places);
    if (e) return e;
    (void)pthread_mutex_lock(&w->room->mutex);
    if (!w->measure) w->job->counts.files_done++;
    (void)pthread_cond_broadcast(&w->room->news);
    (void)pthread_mutex_unlock(&w->room->mutex);
    ibidi_ix_progress(w, false);
    return IBID_OK;
}
