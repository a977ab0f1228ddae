/* Search over one collection: candidates from token keys and from words, filters, fusion, hits. */
#include "retriever/engine.h"
#include "retriever/fuse.h"
#include "retriever/relevance.h"
#include "retriever/smooth.h"
#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    TOP_MAX = 1000,
    DEPTH = 200,             /* documents wanted of each search before fusion, besides 4 * top */
    CANDIDATE_BLOCKS = 2000, /* asked of the key index's cells, to be scored exactly */
    CHUNKS_EACH = 8,
    QUESTION_MAX = 1 << 20
};
/* ---- A map of u64 to an index ---- */
typedef struct map {
    uint64_t *keys; /* key + 1; 0 = free */
    uint32_t *at;
    size_t n, room;
} map;

static size_t map_slot(const map *m, uint64_t key) {
    size_t i = (size_t)(key * 0x9E3779B97F4A7C15u >> 32) & (m->room - 1);
    while (m->keys[i] && m->keys[i] != key + 1) i = (i + 1) & (m->room - 1);
    return i;
}

static bool map_get(const map *m, uint64_t key, uint32_t *at) {
    if (!m->room) return false;
    size_t i = map_slot(m, key);
    if (!m->keys[i]) return false;
    *at = m->at[i];
    return true;
}

static ibid_err map_put(map *m, uint64_t key, uint32_t at) {
    if (m->n * 2 >= m->room) {
        map big = {.room = m->room ? m->room * 2 : 1024};
        big.keys = ibid_calloc(big.room, sizeof *big.keys);
        big.at = ibid_calloc(big.room, sizeof *big.at);
        if (!big.keys || !big.at) {
            ibid_free(big.keys);
            ibid_free(big.at);
            return ibid_fail(IBID_NOMEM, "out of memory for candidates");
        }
        for (size_t i = 0; i < m->room; i++)
            if (m->keys[i]) {
                size_t j = map_slot(&big, m->keys[i] - 1);
                big.keys[j] = m->keys[i];
                big.at[j] = m->at[i];
            }
        big.n = m->n;
        ibid_free(m->keys);
        ibid_free(m->at);
        *m = big;
    }
    size_t i = map_slot(m, key);
    m->keys[i] = key + 1;
    m->at[i] = at;
    m->n++;
    return IBID_OK;
}

static void map_fini(map *m) {
    ibid_free(m->keys);
    ibid_free(m->at);
}

/* ---- What a search gathers ---- */
typedef struct doc {
    ibid_document d;
    const ibid_chunk *chunks; /* looked up when first needed */
    size_t n_chunks;
    bool pass;    /* in the collection, and all filters hold */
    uint8_t seen; /* bit per source: counted among its documents */
} doc;

typedef struct gather {
    ibidi_retriever *r;
    ibidi_collection *c;
    ibid_snap *snap;
    const ibid_search_request *q;
    ibidi_question *question;
    doc **docs;
    size_t n_docs, room_docs;
    map doc_map, cand_map;
    ibidi_candidate *cands;
    size_t n, room;
    size_t wanted;     /* passing documents (or chunks) per source, for a fair fusion */
    size_t needed;     /* and at least, where the collection has that many */
    size_t counted[2]; /* so far, of keys and of words */
    size_t taken[2];   /* chunks so far */
    bool lexical_all;
    struct block_score
        *scored; /* compared by their keys; one may stand there twice until the end */
    size_t n_scored, room_scored;
    ibid_arena *arena;
} gather;

enum { FROM_KEYS, FROM_WORDS };

/* ---- Filters ---- */
static bool value_is(const json_t *v, ibid_str want) {
    char number[64];
    const char *s = number;
    size_t n, i;
    json_t *item;
    if (json_is_array(v)) {
        json_array_foreach(v, i, item) if (value_is(item, want)) return true;
        return false;
    }
    if (json_is_string(v))
        s = json_string_value(v);
    else if (json_is_integer(v))
        snprintf(number, sizeof number, "%" JSON_INTEGER_FORMAT, json_integer_value(v));
    else if (json_is_real(v))
        snprintf(number, sizeof number, "%.15g", json_real_value(v));
    else if (json_is_boolean(v))
        s = json_is_true(v) ? "true" : "false";
    else if (json_is_null(v))
        s = "null";
    else
        return false;
    n = json_is_string(v) ? json_string_length(v) : strlen(s);
    return n == want.n && (n == 0 || memcmp(s, want.s, n) == 0);
}

/* A key as it stands, else along dots into objects. */
static const json_t *member(const json_t *o, const char *key, size_t n) {
    const json_t *v = json_object_getn(o, key, n);
    for (size_t i = 1; !v && i + 1 < n; i++)
        if (key[i] == '.') {
            const json_t *inner = json_object_getn(o, key, i);
            if (json_is_object(inner)) v = member(inner, key + i + 1, n - i - 1);
        }
    return v;
}

static bool is_document(ibid_str key) {
    return key.n == sizeof IBID_FILTER_DOCUMENT - 1 &&
           memcmp(key.s, IBID_FILTER_DOCUMENT, key.n) == 0;
}

static bool filters_hold(const ibid_search_request *q, ibid_str id, ibid_str metadata) {
    if (!q->n_filters) return true;
    json_t *o = json_loadb(metadata.s ? metadata.s : "", metadata.n, JSON_DECODE_ANY, NULL);
    bool hold = true;
    for (size_t i = 0; i < q->n_filters && hold; i++) {
        ibid_str key = q->filters[i].key, value = q->filters[i].value;
        if (is_document(key)) {
            hold = id.n == value.n && memcmp(id.s, value.s, id.n) == 0;
            continue;
        }
        const json_t *v = json_is_object(o) ? member(o, key.s, key.n) : NULL;
        hold = v && value_is(v, value);
    }
    json_decref(o);
    return hold;
}

/* ---- Documents and candidates ---- */
static ibid_err doc_get(gather *g, uint64_t number, doc **out) {
    uint32_t at;
    if (map_get(&g->doc_map, number, &at)) {
        *out = g->docs[at];
        return IBID_OK;
    }
    doc *d = ibid_arena_alloc(g->arena, sizeof *d);
    if (!d) return ibid_fail(IBID_NOMEM, "out of memory for candidates");
    ibid_err e = ibidi_collection_holds(g->c, g->snap, number, &d->d);
    if (e && e != IBID_NOTFOUND) return e;
    d->pass = !e && filters_hold(g->q, d->d.id, d->d.metadata);
    if (g->n_docs == g->room_docs) {
        size_t room = g->room_docs ? g->room_docs * 2 : 256;
        doc **more = ibid_realloc(g->docs, room * sizeof *more);
        if (!more) return ibid_fail(IBID_NOMEM, "out of memory for candidates");
        g->docs = more;
        g->room_docs = room;
    }
    g->docs[g->n_docs] = d;
    *out = d;
    return map_put(&g->doc_map, number, (uint32_t)g->n_docs++);
}

static ibid_err doc_chunks(gather *g, doc *d) {
    if (d->chunks) return IBID_OK;
    ibid_err e = ibid_snap_chunks(g->snap, d->d.number, &d->chunks, &d->n_chunks);
    return e == IBID_NOTFOUND ? IBID_OK : e;
}

static uint64_t chunk_key(uint64_t document, uint64_t chunk) {
    return document << 24 | chunk;
}

static ibid_err candidate(gather *g, doc *d, uint64_t chunk, uint64_t block, int source,
                          ibidi_candidate **out) {
    uint32_t at;
    ibid_err e = IBID_OK;
    if (!map_get(&g->cand_map, chunk_key(d->d.number, chunk), &at)) {
        if (g->n == g->room) {
            size_t room = g->room ? g->room * 2 : 512;
            ibidi_candidate *more = ibid_realloc(g->cands, room * sizeof *more);
            if (!more) return ibid_fail(IBID_NOMEM, "out of memory for candidates");
            g->cands = more;
            g->room = room;
        }
        at = (uint32_t)g->n++;
        g->cands[at] = (ibidi_candidate){
            .document = d->d.number, .chunk = chunk, .block = block, .keys = NAN, .lexical = NAN};
        e = map_put(&g->cand_map, chunk_key(d->d.number, chunk), at);
    }
    if (g->q->chunks || !(d->seen & 1u << source)) g->counted[source]++;
    d->seen |= (uint8_t)(1u << source);
    g->taken[source]++;
    *out = &g->cands[at];
    return e;
}

static bool served(const gather *g, int source) {
    return !g->q->n_filters && g->counted[source] >= g->needed;
}

/* A few long documents never make up the number: many of their chunks do. */
static bool enough(const gather *g, int source) {
    return g->counted[source] >= g->wanted ||
           (served(g, source) && g->taken[source] >= CHUNKS_EACH * g->wanted);
}

/* ---- Words ---- */
static ibid_err add_lexical(gather *g, const ibidi_lexical_hit *h) {
    doc *d;
    ibidi_candidate *c;
    ibid_err e = doc_get(g, h->document, &d);
    if (e || !d->pass) return e;
    e = doc_chunks(g, d);
    if (e || h->chunk >= d->n_chunks) return e;
    e = candidate(g, d, h->chunk, d->chunks[h->chunk].block, FROM_WORDS, &c);
    if (!e) c->lexical = h->score;
    return e;
}

/* Asks for more and more until enough hits pass the filters or there are no more. */
static ibid_err gather_words(gather *g) {
    ibid_err e = IBID_OK;
    size_t done = 0;
    bool repaired = false;
    for (size_t limit = g->wanted * 2; !e; limit *= 4) {
        ibidi_lexical_hit *hits = NULL;
        size_t n = 0;
        e = ibidi_lexical_search(g->c->lexical, g->q->question, limit, &hits, &n, &g->lexical_all);
        if (e == IBID_CORRUPT && done == 0 && !repaired) {
            repaired = true;
            limit /= 4;
            e = ibidi_engine_repair(g->r, g->c, g->snap);
            continue;
        }
        for (; done < n && !e; done++) e = add_lexical(g, &hits[done]);
        ibid_free(hits);
        if (g->lexical_all || enough(g, FROM_WORDS)) break;
    }
    return e;
}

/* ---- Keys ---- */
typedef struct block_score {
    uint64_t block;
    float score;
} block_score;

static int best_block(const void *a, const void *b) {
    const block_score *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return (x->block > y->block) - (x->block < y->block);
}

static int by_block(const void *a, const void *b) {
    const block_score *x = a, *y = b;
    return (x->block > y->block) - (x->block < y->block);
}

typedef struct uses {
    gather *g;
    uint64_t block;
    float score;
} uses;

static ibid_err add_use(void *arg, uint64_t document, uint64_t chunk) {
    uses *u = arg;
    doc *d;
    ibidi_candidate *c;
    ibid_err e = doc_get(u->g, document, &d);
    if (e || !d->pass) return e;
    e = candidate(u->g, d, chunk, u->block, FROM_KEYS, &c);
    if (!e) c->keys = u->score;
    return e;
}

/* Candidates from scored blocks, best first, until enough pass; then the keys' scores of those that
 * words alone had found. */
static ibid_err take_blocks(gather *g, block_score *s, size_t n) {
    ibid_err e = IBID_OK;
    if (n) qsort(s, n, sizeof *s, best_block);
    for (size_t i = 0; i < n && !e && !enough(g, FROM_KEYS); i++) {
        uses u = {g, s[i].block, s[i].score};
        e = ibid_snap_each_use(g->snap, s[i].block, add_use, &u);
        if (e == IBID_NOTFOUND) e = IBID_OK;
    }
    if (n) qsort(s, n, sizeof *s, by_block);
    for (size_t i = 0; i < g->n && n && !e; i++) {
        block_score want = {g->cands[i].block, 0};
        const block_score *have = bsearch(&want, s, n, sizeof *s, by_block);
        if (have) g->cands[i].keys = have->score;
    }
    return e;
}

static ibid_err note_scored(gather *g, const block_score *s, size_t n) {
    if (g->n_scored + n > g->room_scored) {
        size_t room = 2 * (g->n_scored + n);
        block_score *more = ibid_realloc(g->scored, room * sizeof *more);
        if (!more) return ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", n);
        g->scored = more;
        g->room_scored = room;
    }
    if (n) memcpy(g->scored + g->n_scored, s, n * sizeof *s);
    g->n_scored += n;
    return IBID_OK;
}

static ibid_err score_blocks(gather *g, const uint64_t *blocks, size_t n, block_score **out,
                             size_t *n_out) {
    size_t scored = 0;
    float *scores = ibid_alloc(n * sizeof *scores);
    *out = ibid_alloc(n * sizeof **out);
    *n_out = 0;
    ibid_err e =
        scores && *out ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", n);
    if (!e)
        e = ibidi_engine_score(g->r, g->c, g->snap, &g->question->asking, blocks, n, scores,
                               &scored);
    for (size_t i = 0; i < n && !e; i++)
        if (!isnan(scores[i])) (*out)[(*n_out)++] = (block_score){blocks[i], scores[i]};
    ibid_free(scores);
    if (!e) e = note_scored(g, *out, *n_out);
    if (!e && n && !scored && !g->question->why)
        g->question->why = "stored token keys are of another calibration; run ibid reindex";
    return e;
}

static ibid_err scan_all(gather *g) {
    const ibidi_view *v = &g->c->view;
    block_score *s = NULL;
    size_t n = 0;
    uint64_t *blocks = ibid_alloc(v->n * sizeof *blocks);
    if (!blocks) return ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", v->n);
    for (size_t i = 0; i < v->n; i++) blocks[i] = v->blocks[i].block;
    ibid_err e = score_blocks(g, blocks, v->n, &s, &n);
    if (!e) e = take_blocks(g, s, n);
    ibid_free(s);
    ibid_free(blocks);
    return e;
}

static int by_number(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Candidate blocks: those of near cells, of the words' hits, and those the key index has not got
 * yet. */
static ibid_err candidate_blocks(gather *g, size_t probes, size_t max, uint64_t **out, size_t *n,
                                 bool *all) {
    ibidi_keyindex_facts f = ibidi_keyindex_told(g->c->keys);
    size_t near = 0;
    uint64_t *b = ibid_alloc((max + g->n + f.n_extra) * sizeof *b);
    if (!b) return ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", max + f.n_extra);
    ibid_err e =
        ibidi_engine_candidates(g->r, g->c, &g->question->asking, probes, b, max, &near, all);
    size_t m = near;
    for (size_t i = 0; i < g->n && !e; i++) b[m++] = g->cands[i].block;
    for (size_t i = 0; i < f.n_extra && !e; i++) b[m++] = f.extra[i];
    *n = 0;
    if (m) qsort(b, m, sizeof *b, by_number);
    for (size_t i = 0; i < m; i++)
        if (!*n || b[*n - 1] != b[i]) b[(*n)++] = b[i];
    *out = b;
    return e;
}

static ibid_err search_index(gather *g) {
    ibid_err e = IBID_OK;
    bool all = false;
    size_t probes = ibidi_keyindex_told(g->c->keys).probes, max = CANDIDATE_BLOCKS;
    for (int i = 0; i < 3 && !e && !all && !served(g, FROM_KEYS) && !enough(g, FROM_KEYS);
         i++, probes *= 4, max *= 4) {
        uint64_t *blocks = NULL;
        block_score *s = NULL;
        size_t n = 0, m = 0;
        e = candidate_blocks(g, probes, max, &blocks, &n, &all);
        if (!e) e = score_blocks(g, blocks, n, &s, &m);
        if (!e) e = take_blocks(g, s, m);
        ibid_free(s);
        ibid_free(blocks);
    }
    /* A filter that few documents pass: look at all of them rather than answer too few. */
    if (!e && !enough(g, FROM_KEYS) && g->q->n_filters) e = scan_all(g);
    return e;
}

static ibid_err gather_keys(gather *g) {
    ibidi_keyindex_facts f = {.cells = 0};
    if (g->c->keys) f = ibidi_keyindex_told(g->c->keys);
    bool usable = f.cells && f.stamp.dim == g->question->asking.dim &&
                  ibid_hash_cmp(&f.stamp.calibration, &g->question->asking.calibration) == 0;
    return usable && !ibidi_engine_scans(g->r, g->c) ? search_index(g) : scan_all(g);
}

/* ---- Hits ---- */
static ibid_str keep(ibid_arena *a, ibid_str s) {
    char *p = ibid_arena_copy(a, s.s ? s.s : "", s.n);
    return (ibid_str){p ? p : "", p ? s.n : 0};
}

static ibid_err fill_hit(gather *g, const ibidi_candidate *c, ibid_buf *text, ibidi_found *out) {
    doc *d;
    ibid_err e = doc_get(g, c->document, &d);
    if (!e) e = doc_chunks(g, d);
    if (e) return e;
    if (c->chunk >= d->n_chunks) return IBID_OK;
    const ibid_chunk *ch = &d->chunks[c->chunk];
    ibid_buf_clear(text);
    if ((e = ibid_snap_text(g->snap, c->document, text))) return e;
    if (ch->start > ch->end || ch->end > text->len)
        return ibid_fail(IBID_CORRUPT,
                         "chunk %" PRIu64 " of document %" PRIu64 " lies outside its text",
                         c->chunk, c->document);
    ibid_str body = {text->data + ch->start, (size_t)(ch->end - ch->start)};
    out->hits[out->n++] = (ibid_hit){.document = c->document,
                                     .chunk = c->chunk,
                                     .block = ch->block,
                                     .id = keep(out->arena, d->d.id),
                                     .title = keep(out->arena, d->d.title),
                                     .locator = keep(out->arena, ch->locator),
                                     .start = ch->start,
                                     .end = ch->end,
                                     .text = keep(out->arena, body),
                                     .score = c->score,
                                     .keys = isnan(c->keys) ? 0 : c->keys,
                                     .lexical = isnan(c->lexical) ? 0 : c->lexical};
    return IBID_OK;
}

enum { TAKEN = 4 }; /* bit of doc.seen */

static ibid_err fill_hits(gather *g, size_t top, ibidi_found *out) {
    ibid_buf text;
    ibid_err e = IBID_OK;
    ibid_buf_init(&text, (size_t)4 << 30);
    out->hits = ibid_arena_alloc(out->arena, top * sizeof *out->hits);
    if (!out->hits) e = ibid_fail(IBID_NOMEM, "out of memory for %zu hits", top);
    for (size_t i = 0; i < g->n && out->n < top && !e; i++) {
        doc *d;
        e = doc_get(g, g->cands[i].document, &d);
        if (e || (!g->q->chunks && d->seen & TAKEN)) continue;
        d->seen |= TAKEN;
        e = fill_hit(g, &g->cands[i], &text, out);
    }
    ibid_buf_fini(&text);
    return e;
}

/* Chunks that hold the code or the few words that were asked for come first, whatever keys say:
 * they are made candidates if they are not. */
static ibid_err mark_exact(gather *g) {
    ibidi_lexical_hit *hits = NULL;
    size_t n = 0;
    ibid_err e = ibidi_lexical_exact(g->c->lexical, g->q->question, &hits, &n);
    for (size_t i = 0; i < n && !e; i++) {
        doc *d;
        ibidi_candidate *c;
        e = doc_get(g, hits[i].document, &d);
        if (e || !d->pass) continue;
        e = doc_chunks(g, d);
        if (e || hits[i].chunk >= d->n_chunks) continue;
        e = candidate(g, d, hits[i].chunk, d->chunks[hits[i].chunk].block, FROM_WORDS, &c);
        if (!e) c->exact = true;
    }
    ibid_free(hits);
    return e;
}

/* Ascending blocks, once each. */
static void settle_scored(gather *g) {
    size_t n = 0;
    if (g->n_scored) qsort(g->scored, g->n_scored, sizeof *g->scored, by_block);
    for (size_t i = 0; i < g->n_scored; i++)
        if (!n || g->scored[n - 1].block != g->scored[i].block) g->scored[n++] = g->scored[i];
    g->n_scored = n;
}

/* Of all blocks that were scored; where filters hold, of the candidates, which passed. */
static ibid_err weigh_keys(const gather *g, const ibid_calibration *cal, ibidi_evidence *v,
                           bool *any) {
    size_t n = g->q->n_filters ? g->n : g->n_scored;
    double *keys = ibid_alloc((n + 1) * sizeof *keys);
    if (!keys) return ibid_fail(IBID_NOMEM, "out of memory for %zu scores", n);
    for (size_t i = 0; i < n; i++)
        keys[i] = g->q->n_filters ? g->cands[i].keys : (double)g->scored[i].score;
    *any =
        ibidi_evidence_keys(keys, n, g->c->view.n, (double)cal->null_mean, (double)cal->null_sd, v);
    ibid_free(keys);
    return IBID_OK;
}

/* By keys and words; by the words' share alone where there are no keys to go by. */
static ibid_err judge(gather *g, const ibid_calibration *cal, ibidi_found *out) {
    ibidi_evidence v = {0};
    bool keys = false;
    if (!out->n) return IBID_OK;
    ibid_err e = ibidi_lexical_share(g->c->lexical, g->q->question, out->hits[0].title,
                                     out->hits[0].text, &v.share);
    if (!e && cal && cal->null_sd > 0) e = weigh_keys(g, cal, &v, &keys);
    if (e) return e;
    out->relevance = keys ? ibidi_relevance(&v) : v.share;
    out->relevant = out->relevance >= IBIDI_RELEVANT;
    return IBID_OK;
}

/* ---- Coverage ---- */
static uint64_t tokens_of(const gather *g, uint64_t block) {
    size_t i = ibidi_view_at(&g->c->view, block);
    return i < g->c->view.n ? g->c->view.blocks[i].n_tokens : 0;
}

/* The blocks of the document that a filter asks for, ascending and once each; NULL: no such filter.
 */
static ibid_err wanted_document(gather *g, const uint64_t **blocks, size_t *n) {
    *blocks = NULL;
    for (size_t f = 0; f < g->q->n_filters && !*blocks; f++) {
        if (!is_document(g->q->filters[f].key)) continue;
        for (size_t i = 0; i < g->n_docs && !*blocks; i++) {
            doc *d = g->docs[i];
            if (!d->pass) continue;
            ibid_err e = doc_chunks(g, d);
            uint64_t *b = e ? NULL : ibid_arena_alloc(g->arena, (d->n_chunks + 1) * sizeof *b);
            if (e || !b) return e ? e : ibid_fail(IBID_NOMEM, "out of memory for a document");
            for (size_t k = 0; k < d->n_chunks; k++) b[k] = d->chunks[k].block;
            qsort(b, d->n_chunks, sizeof *b, by_number);
            *n = 0;
            for (size_t k = 0; k < d->n_chunks; k++)
                if (!*n || b[*n - 1] != b[k]) b[(*n)++] = b[k];
            *blocks = b;
        }
    }
    return IBID_OK;
}

static bool was_scored(const gather *g, uint64_t block) {
    block_score want = {block, 0};
    return g->n_scored && bsearch(&want, g->scored, g->n_scored, sizeof want, by_block);
}

/* ibid_search_result.coverage. Words look at every chunk there is. */
static ibid_err cover(gather *g, bool by_keys, ibidi_found *out) {
    const uint64_t *blocks;
    size_t n = 0;
    uint64_t all = 0, seen = 0;
    out->coverage = 1;
    if (!by_keys) return IBID_OK;
    ibid_err e = wanted_document(g, &blocks, &n);
    if (e) return e;
    for (size_t i = 0; i < n; i++) {
        uint64_t tokens = tokens_of(g, blocks[i]);
        all += tokens;
        if (was_scored(g, blocks[i])) seen += tokens;
    }
    for (size_t i = 0; i < g->n_scored && !blocks; i++) seen += tokens_of(g, g->scored[i].block);
    if (!blocks) all = g->c->view.tokens;
    if (all) out->coverage = (double)seen / (double)all;
    return IBID_OK;
}

/* ---- The whole ---- */
static ibid_err check(const ibid_search_request *q) {
    size_t i = 0;
    while (i < q->question.n && strchr(" \t\r\n", q->question.s[i])) i++;
    if (i == q->question.n) return ibid_fail(IBID_INVAL, "the question is empty");
    if (q->question.n > QUESTION_MAX)
        return ibid_fail(IBID_TOOBIG, "a question of %zu bytes; at most %d", q->question.n,
                         QUESTION_MAX);
    if (q->keys_only && q->lexical_only)
        return ibid_fail(IBID_INVAL, "keys_only and lexical_only exclude each other");
    return IBID_OK;
}

static ibid_err run(gather *g, size_t top, ibidi_found *out) {
    ibid_err e = ibidi_question_weigh(g->question, &g->c->view);
    bool words = !g->q->keys_only || !g->question->usable;
    ibid_calibration cal;
    double most = 0;
    uint64_t start = ibid_now_ns();
    if (!e && words) e = gather_words(g);
    out->lexical_ms = ibid_ms_since(start);
    start = ibid_now_ns();
    if (!e && g->question->usable && !g->q->lexical_only) e = gather_keys(g);
    out->keys_ms += ibid_ms_since(start);
    for (size_t i = 0; i < g->n && words; i++)
        if (isnan(g->cands[i].lexical) && g->lexical_all) g->cands[i].lexical = 0;
    bool fuses = words && g->question->usable && !g->q->lexical_only;
    bool calibrated = g->question->usable && ibidi_engine_calibration(g->snap, &g->c->model, &cal);
    if (!e && fuses) e = ibidi_lexical_most(g->c->lexical, g->q->question, &most);
    if (!e && fuses) e = mark_exact(g);
    double gate = ibidi_fuse(g->cands, g->n, calibrated ? (double)cal.keys_weight : 0, most);
    if (!e) e = ibidi_smooth(g->cands, g->n, &g->c->view, gate);
    if (!e) e = fill_hits(g, top, out);
    settle_scored(g);
    if (!e) e = judge(g, calibrated ? &cal : NULL, out);
    if (!e) e = cover(g, g->question->usable && !g->q->lexical_only, out);
    out->generation = g->c->generation;
    out->degraded = g->q->lexical_only ? NULL : g->question->why;
    return e;
}

static ibid_err find_collection(ibid_snap *snap, ibid_str name, ibid_collection *out) {
    ibid_err e = ibid_snap_collection(snap, name, out);
    if (e == IBID_NOCOLLECTION || e == IBID_NOTFOUND)
        return ibid_fail(IBID_NOCOLLECTION, "there is no collection %.*s", (int)name.n, name.s);
    return e;
}

ibid_err ibidi_retriever_search(ibidi_retriever *r, const ibid_search_request *q,
                                ibidi_found *out) {
    uint64_t start = ibid_now_ns(), asked;
    size_t top = q->top ? q->top : 10;
    ibid_snap *snap = NULL;
    ibidi_question question = {.usable = false};
    ibid_collection c;
    gather g = {.r = r, .q = q, .question = &question, .lexical_all = false};
    *out = (ibidi_found){.n = 0};
    if (top > TOP_MAX) top = TOP_MAX;
    g.wanted = DEPTH + 4 * top;
    g.needed = top;
    ibid_err e = check(q);
    if (!e) e = ibid_arena_open((size_t)1 << 30, &out->arena);
    if (!e) e = ibid_arena_open((size_t)1 << 30, &g.arena);
    if (!e) e = ibidi_engine_snap(r, &snap);
    if (!e) e = find_collection(snap, q->collection, &c);
    if (!e) e = ibidi_engine_acquire(r, &c, &g.c);
    if (e) goto done;
    if (g.needed > (q->chunks ? c.chunks : c.documents))
        g.needed = (size_t)(q->chunks ? c.chunks : c.documents);
    ibid_snap_end(snap); /* the attention room may take a while; hold no snapshot meanwhile */
    snap = NULL;
    asked = ibid_now_ns();
    if (!q->lexical_only) ibidi_question_get(r, &g.c->model, q->question, &question);
    out->keys_ms = ibid_ms_since(asked);
    if ((e = ibidi_engine_snap(r, &snap)) || (e = ibidi_engine_current(r, g.c, snap))) goto done;
    g.snap = snap;
    e = run(&g, top, out);
    pthread_rwlock_unlock(&g.c->lock);
done:
    ibidi_engine_release(r, g.c);
    if (snap) ibid_snap_end(snap);
    ibidi_question_fini(&question);
    map_fini(&g.doc_map);
    map_fini(&g.cand_map);
    ibid_free(g.docs);
    ibid_free(g.cands);
    ibid_free(g.scored);
    ibid_arena_close(g.arena);
    if (e) ibidi_found_close(out);
    out->total_ms = ibid_ms_since(start);
    return e;
}

void ibidi_found_close(ibidi_found *f) {
    ibid_arena_close(f->arena);
    *f = (ibidi_found){.n = 0};
}
