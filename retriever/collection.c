#include "retriever/collection.h"

#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static ibid_err make_dir(const char *path) {
    if (mkdir(path, 0700) != 0 && errno != EEXIST) return ibid_fail_errno(errno, "create", path);
    return IBID_OK;
}

ibid_err ibidi_collection_open(const char *index_dir, const ibid_collection *c,
                               ibidi_collection **out) {
    ibidi_collection *n = ibid_calloc(1, sizeof *n);
    if (!n) return ibid_fail(IBID_NOMEM, "out of memory for a collection");
    n->number = c->number;
    n->created_ms = c->created_ms;
    n->model = c->model;
    snprintf(n->name, sizeof n->name, "%.*s", (int)c->name.n, c->name.s);
    ibid_err e = IBID_OK;
    if (snprintf(n->dir, sizeof n->dir, "%s/%" PRIu64, index_dir, n->number) >= (int)sizeof n->dir)
        e = ibid_fail(IBID_INVAL, "path too long: %s", index_dir);
    if (!e) e = make_dir(index_dir);
    if (!e) e = make_dir(n->dir);
    if (e) {
        ibid_free(n);
        return e;
    }
    pthread_rwlock_init(&n->lock, NULL);
    pthread_mutex_init(&n->building, NULL);
    *out = n;
    return IBID_OK;
}

void ibidi_collection_close(ibidi_collection *c) {
    if (!c) return;
    ibidi_lexical_close(c->lexical);
    ibidi_keyindex_close(c->keys);
    ibidi_view_fini(&c->view);
    pthread_rwlock_destroy(&c->lock);
    pthread_mutex_destroy(&c->building);
    ibid_free(c);
}

ibid_err ibidi_collection_holds(const ibidi_collection *c, ibid_snap *snap, uint64_t document,
                                ibid_document *out) {
    size_t n = strlen(c->name);
    ibid_err e = ibid_snap_document_by_number(snap, document, out);
    if (!e && (out->collection.n != n || memcmp(out->collection.s, c->name, n) != 0))
        e = ibid_fail(IBID_NOTFOUND, "document %" PRIu64 " is in another collection", document);
    return e;
}

/* ---- Lists of numbers ---- */
typedef struct numbers {
    uint64_t *v;
    size_t n, room;
} numbers;

static ibid_err numbers_add(numbers *a, uint64_t v) {
    if (a->n == a->room) {
        size_t room = a->room ? a->room * 2 : 256;
        uint64_t *more = ibid_realloc(a->v, room * sizeof *more);
        if (!more) return ibid_fail(IBID_NOMEM, "out of memory for %zu numbers", room);
        a->v = more;
        a->room = room;
    }
    a->v[a->n++] = v;
    return IBID_OK;
}

static int by_number(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void numbers_sort(numbers *a) {
    size_t kept = 0;
    if (a->n) qsort(a->v, a->n, sizeof *a->v, by_number);
    for (size_t i = 0; i < a->n; i++)
        if (!kept || a->v[kept - 1] != a->v[i]) a->v[kept++] = a->v[i];
    a->n = kept;
}

static ibid_err add_document(void *arg, const ibid_document *d) {
    return numbers_add(arg, d->number);
}

static ibid_err all_documents(const ibidi_collection *c, ibid_snap *snap, numbers *out) {
    return ibid_snap_each_document(snap, (ibid_str){c->name, strlen(c->name)}, 0, add_document,
                                   out);
}

/* A snapshot is renewed now and then: it ages, and its arena grows. */
enum { RENEW_EVERY = 64 };

static ibid_err renew_sometimes(ibid_snap *snap, size_t i) {
    return i % RENEW_EVERY == RENEW_EVERY - 1 ? ibid_snap_renew(snap) : IBID_OK;
}

/* ---- The view ---- */
static ibid_err view_add(ibidi_view *v, ibid_snap *snap, uint64_t block) {
    ibid_block b;
    ibid_err e = ibid_snap_block(snap, block, &b);
    if (e == IBID_NOTFOUND) return IBID_OK; /* dropped since; its change is still to come */
    return e ? e : ibidi_view_add(v, &b);
}

static ibid_err view_load(ibidi_collection *c, ibid_snap *snap) {
    numbers docs = {.n = 0}, blocks = {.n = 0};
    ibidi_view_fini(&c->view);
    ibid_err e = all_documents(c, snap, &docs);
    for (size_t i = 0; i < docs.n && !e; i++) {
        const ibid_chunk *chunks = NULL;
        size_t n = 0;
        e = ibid_snap_chunks(snap, docs.v[i], &chunks, &n);
        if (e == IBID_NOTFOUND) e = IBID_OK;
        for (size_t j = 0; j < n && !e; j++) e = numbers_add(&blocks, chunks[j].block);
        if (!e) e = renew_sometimes(snap, i);
    }
    numbers_sort(&blocks);
    for (size_t i = 0; i < blocks.n && !e; i++) {
        e = view_add(&c->view, snap, blocks.v[i]);
        if (!e) e = renew_sometimes(snap, i);
    }
    ibid_free(docs.v);
    ibid_free(blocks.v);
    return e;
}

typedef struct usage {
    const ibidi_collection *c;
    ibid_snap *snap;
    bool used;
} usage;

static ibid_err see_use(void *arg, uint64_t document, uint64_t chunk) {
    usage *u = arg;
    ibid_document d;
    (void)chunk;
    ibid_err e = ibidi_collection_holds(u->c, u->snap, document, &d);
    u->used = !e;
    return e == IBID_OK         ? IBID_EXISTS
           : e == IBID_NOTFOUND ? IBID_OK
                                : e; /* EXISTS stops the walk */
}

static ibid_err view_refresh(ibidi_collection *c, ibid_snap *snap, uint64_t block) {
    usage u = {c, snap, false};
    ibid_err e = ibid_snap_each_use(snap, block, see_use, &u);
    if (e && e != IBID_EXISTS && e != IBID_NOTFOUND) return e;
    size_t at = ibidi_view_at(&c->view, block);
    size_t n_tokens = at < c->view.n ? c->view.blocks[at].n_tokens : 0;
    e = IBID_OK;
    if (u.used)
        e = view_add(&c->view, snap, block);
    else
        ibidi_view_drop(&c->view, block);
    at = ibidi_view_at(&c->view, block);
    bool alive = at < c->view.n;
    if (alive) n_tokens = c->view.blocks[at].n_tokens;
    return e || !c->keys ? e : ibidi_keyindex_follow(c->keys, block, n_tokens, alive);
}

/* ---- The lexical index ---- */
static ibid_err lexical_add(ibidi_collection *c, ibid_snap *snap, uint64_t document,
                            ibid_buf *text) {
    ibid_document d;
    const ibid_chunk *chunks;
    size_t n;
    ibid_err e = ibidi_collection_holds(c, snap, document, &d);
    if (!e) e = ibid_snap_chunks(snap, document, &chunks, &n);
    if (e == IBID_NOTFOUND || (!e && n == 0)) return IBID_OK; /* removed meanwhile, or no text */
    ibid_buf_clear(text);
    if (!e) e = ibid_snap_text(snap, document, text);
    for (size_t i = 0; i < n && !e; i++) {
        if (chunks[i].start > chunks[i].end || chunks[i].end > text->len)
            return ibid_fail(IBID_CORRUPT,
                             "chunk %zu of document %" PRIu64 " lies outside its text", i,
                             document);
        ibid_str s = {text->data + chunks[i].start, (size_t)(chunks[i].end - chunks[i].start)};
        e = ibidi_lexical_add(c->lexical, document, i, d.title, s);
    }
    return e;
}

/* Writes documents in batches; only the last commit carries the stamp. */
enum { COMMIT_EVERY = 256 };

static ibid_err lexical_write(ibidi_collection *c, ibid_snap *snap, const numbers *docs, bool fresh,
                              uint64_t generation) {
    ibid_buf text;
    ibid_buf_init(&text, (size_t)4 << 30);
    ibid_err e = ibidi_lexical_begin(c->lexical);
    for (size_t i = 0; i < docs->n && !e; i++) {
        if (!fresh) e = ibidi_lexical_remove(c->lexical, docs->v[i]);
        if (!e) e = lexical_add(c, snap, docs->v[i], &text);
        if (!e) e = ibid_snap_renew(snap); /* one large document may have taken long */
        if (!e && i % COMMIT_EVERY == COMMIT_EVERY - 1) {
            e = ibidi_lexical_commit(c->lexical, 0);
            if (!e) e = ibidi_lexical_begin(c->lexical);
        }
    }
    if (!e) e = ibidi_lexical_commit(c->lexical, generation);
    if (e) ibidi_lexical_rollback(c->lexical);
    ibid_buf_fini(&text);
    return e;
}

static ibid_err lexical_fill(ibidi_collection *c, ibid_snap *snap, uint64_t generation) {
    numbers docs = {.n = 0};
    uint64_t start = ibid_now_ns();
    ibid_err e = ibidi_lexical_reset(c->lexical);
    if (!e) e = all_documents(c, snap, &docs);
    if (!e) e = lexical_write(c, snap, &docs, true, generation);
    if (!e && docs.n)
        ibid_log(IBID_LOG_INFO, "lexical index of %s built from %zu documents in %.0f ms", c->name,
                 docs.n, ibid_ms_since(start));
    ibid_free(docs.v);
    return e;
}

static ibid_err lexical_open(ibidi_collection *c) {
    char path[IBIDI_DIR_MAX + 32], identity[128];
    if (c->lexical) return IBID_OK;
    snprintf(path, sizeof path, "%s/words.sqlite", c->dir);
    snprintf(identity, sizeof identity, "%" PRIu64 " %s %" PRIu64, c->number, c->name,
             c->created_ms);
    return ibidi_lexical_open(path, identity, &c->lexical);
}

/* ---- Replay ---- */
typedef struct replay {
    uint64_t collection;
    numbers docs, blocks;
} replay;

static ibid_err note_change(void *arg, const ibid_change *ch) {
    replay *r = arg;
    if (ch->collection != r->collection) return IBID_OK;
    ibid_err e = numbers_add(&r->docs, ch->document);
    for (size_t i = 0; i < ch->n_added && !e; i++) e = numbers_add(&r->blocks, ch->added[i]);
    for (size_t i = 0; i < ch->n_dropped && !e; i++) e = numbers_add(&r->blocks, ch->dropped[i]);
    return e;
}

/* What happened after `from`. NOTFOUND: that history is gone. */
static ibid_err collect(ibidi_collection *c, ibid_snap *snap, uint64_t from, replay *r) {
    *r = (replay){.collection = c->number};
    ibid_err e = ibid_snap_each_change(snap, from, note_change, r);
    numbers_sort(&r->docs);
    numbers_sort(&r->blocks);
    return e;
}

static void replay_fini(replay *r) {
    ibid_free(r->docs.v);
    ibid_free(r->blocks.v);
}

static ibid_err view_replay(ibidi_collection *c, ibid_snap *snap, const replay *r) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < r->blocks.n && !e; i++) {
        e = view_refresh(c, snap, r->blocks.v[i]);
        if (!e) e = renew_sometimes(snap, i);
    }
    return e;
}

/* One step to `to`, the snapshot's generation at its start. */
static ibid_err advance_view(ibidi_collection *c, ibid_snap *snap, uint64_t to, bool *moved) {
    replay r = {.collection = 0};
    ibid_err e = IBID_NOTFOUND;
    if (c->loaded && c->generation <= to) {
        e = collect(c, snap, c->generation, &r);
        if (!e) e = view_replay(c, snap, &r);
        if (!e && r.blocks.n + r.docs.n) *moved = true;
    }
    replay_fini(&r);
    if (e == IBID_NOTFOUND) {
        *moved = true;
        e = view_load(c, snap);
        if (!e && c->keys) e = ibidi_keyindex_sync(c->keys, &c->view);
    }
    c->loaded = !e;
    if (!e) c->generation = to;
    if (*moved) c->changed = to;
    return e;
}

static ibid_err advance_lexical(ibidi_collection *c, ibid_snap *snap, uint64_t to) {
    replay r = {.collection = 0};
    uint64_t have = ibidi_lexical_generation(c->lexical);
    ibid_err e = IBID_NOTFOUND;
    if (have == to && have) return IBID_OK;
    if (have > to)
        ibid_log(IBID_LOG_WARN, "lexical index of %s is newer than the store: built again",
                 c->name);
    else if (have) {
        e = collect(c, snap, have, &r);
        if (!e) e = lexical_write(c, snap, &r.docs, false, to);
    }
    replay_fini(&r);
    return e == IBID_NOTFOUND ? lexical_fill(c, snap, to) : e;
}

static ibid_err lexical_step(ibidi_collection *c, ibid_snap *snap, uint64_t to) {
    ibid_err e = lexical_open(c);
    if (!e) e = advance_lexical(c, snap, to);
    if (e == IBID_CORRUPT) {
        ibid_log(IBID_LOG_WARN, "lexical index of %s is thrown away and built again: %s", c->name,
                 ibid_err_detail());
        e = lexical_fill(c, snap, to);
    }
    return e;
}

ibid_err ibidi_collection_catch_up(ibidi_collection *c, ibid_snap *snap, bool *moved) {
    ibid_err e = IBID_OK;
    uint64_t have = c->loaded ? c->generation : 0;
    *moved = false;
    if (c->lexical && ibidi_lexical_generation(c->lexical) > have)
        have = ibidi_lexical_generation(c->lexical);
    /* Another thread went further while this snapshot waited for the lock. */
    if (have > ibid_snap_generation(snap)) e = ibid_snap_renew(snap);
    /* Work on a large collection renews the snapshot, so its generation may have moved: again. */
    for (int i = 0; i < 16 && !e; i++) {
        uint64_t to = ibid_snap_generation(snap);
        if (c->loaded && c->lexical && c->generation == to &&
            ibidi_lexical_generation(c->lexical) == to)
            break;
        e = advance_view(c, snap, to, moved);
        if (!e) e = lexical_step(c, snap, to);
    }
    if (*moved) c->changed_ns = ibid_now_ns();
    return e;
}

ibid_err ibidi_collection_forget(ibidi_collection *c) {
    c->loaded = false;
    c->generation = 0;
    ibidi_view_fini(&c->view);
    ibidi_keyindex_close(c->keys);
    c->keys = NULL;
    ibid_err e = lexical_open(c);
    return e ? e : ibidi_lexical_reset(c->lexical);
}
