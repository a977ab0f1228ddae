#include "retriever/candidates.h"

#include "retriever/find.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    PIECE_BYTES = 1 << 20, /* of text tokenised in one message */
    CACHE_BYTES = 256 << 20
};

/* ---- The cache ---- */
ibid_err ibidi_candidate_cache_open(ibidi_candidate_cache **out) {
    ibidi_candidate_cache *c = ibid_calloc(1, sizeof *c);
    if (!c) return ibid_fail(IBID_NOMEM, "out of memory for the retriever");
    pthread_mutex_init(&c->mu, NULL);
    *out = c;
    return IBID_OK;
}

static void candidates_free(ibidi_candidates *c) {
    ibidi_spans_fini(&c->spans);
    ibid_free(c->places);
    ibid_free(c->sentences);
    ibid_free(c->stems);
    ibid_free(c->stem_at);
    ibid_free(c->tokens);
    ibid_free(c->base);
    ibid_free(c);
}

void ibidi_candidate_cache_close(ibidi_candidate_cache *c) {
    if (!c) return;
    while (c->first) {
        ibidi_candidates *next = c->first->next;
        candidates_free(c->first);
        c->first = next;
    }
    pthread_mutex_destroy(&c->mu);
    ibid_free(c);
}

/* Drops what is used least and by nobody, down to the quota; the newest stays. */
static void shrink(ibidi_candidate_cache *c) {
    while (c->bytes > CACHE_BYTES) {
        ibidi_candidates **last = NULL;
        for (ibidi_candidates **at = &c->first; *at; at = &(*at)->next)
            if (!(*at)->refs && at != &c->first) last = at;
        if (!last) return;
        ibidi_candidates *gone = *last;
        *last = gone->next;
        c->bytes -= gone->bytes;
        candidates_free(gone);
    }
}

static ibidi_candidates *look_up(ibidi_candidate_cache *c, const ibidi_searched *d) {
    for (ibidi_candidates **at = &c->first; *at; at = &(*at)->next) {
        ibidi_candidates *x = *at;
        if (x->document != d->doc->number || x->generation != d->doc->generation ||
            ibid_hash_cmp(&x->model, d->model) != 0 ||
            ibid_hash_cmp(&x->content, &d->doc->content) != 0)
            continue;
        *at = x->next;
        x->next = c->first;
        c->first = x;
        x->refs++;
        return x;
    }
    return NULL;
}

void ibidi_candidates_release(ibidi_retriever *r, ibidi_candidates *c) {
    if (!c) return;
    pthread_mutex_lock(&r->candidates->mu);
    c->refs--;
    shrink(r->candidates);
    pthread_mutex_unlock(&r->candidates->mu);
}

/* ---- Where tokens end ---- */
typedef struct tokens { /* of the text from `from` on */
    ibid_tokens t;
    uint64_t from, to;
    size_t at; /* first token of the next chunk */
} tokens;

/* Tokenises a piece of the text that holds whole chunks, from chunk i on. */
static ibid_err next_piece(const ibidi_searched *d, size_t i, tokens *t) {
    uint64_t from = d->chunks[i].start, to = d->chunks[i].end;
    while (i + 1 < d->n_chunks && d->chunks[i + 1].start >= to &&
           d->chunks[i + 1].end - from <= PIECE_BYTES)
        to = d->chunks[++i].end;
    ibid_free(t->t.ids);
    *t = (tokens){.from = from, .to = to};
    if (!d->r->o.hooks.tokenize)
        return ibid_fail(IBID_UNAVAIL, "no attention room to ask for tokens");
    ibid_str s = {d->text.s + from, (size_t)(to - from)};
    return d->r->o.hooks.tokenize(d->r->o.hooks.arg, d->model, s, &t->t);
}

/* The tokens of the piece that begin in [start, end), ends made relative to start, clipped. */
static size_t slice(tokens *t, uint64_t start, uint64_t end, uint64_t *ends, size_t *first) {
    size_t i = t->at, n = 0;
    while (i < t->t.n && t->from + t->t.ends[i] <= start) i++;
    *first = i;
    for (; i < t->t.n && (i == *first || t->from + t->t.ends[i - 1] < end); i++) {
        uint64_t e = t->from + t->t.ends[i];
        ends[n++] = (e < end ? e : end) - start;
    }
    t->at = i ? i - 1 : 0;
    return n;
}

typedef struct builder {
    const ibidi_searched *d;
    ibidi_candidates *c;
    tokens t;
    uint64_t *ends, *have; /* [room] of the chunk's tokens, stored and anew */
    size_t room, n_ends;
    size_t span, sentence; /* the first that does not end before the chunk */
} builder;

static ibid_err room_for(builder *b, size_t n) {
    if (n <= b->room) return IBID_OK;
    size_t room = n + 256;
    uint64_t *ends = ibid_realloc(b->ends, room * sizeof *ends);
    if (ends) b->ends = ends;
    uint64_t *have = ends ? ibid_realloc(b->have, room * sizeof *have) : NULL;
    if (have) b->have = have;
    if (!have) return ibid_fail(IBID_NOMEM, "out of memory for a chunk");
    b->room = room;
    return IBID_OK;
}

/* Ends of the stored tokens of chunk i in its text; none if it has no block any more. */
static ibid_err chunk_ends(builder *b, size_t i) {
    const ibid_chunk *c = &b->d->chunks[i];
    ibid_block block;
    size_t first = 0;
    b->n_ends = 0;
    if (c->start > c->end || c->end > b->d->text.n)
        return ibid_fail(IBID_CORRUPT, "chunk %zu lies outside its document's text", i);
    ibid_err e = ibid_snap_block(b->d->snap, c->block, &block);
    if (e == IBID_NOTFOUND || (!e && block.n_title > block.n_tokens)) return IBID_OK;
    if (!e && (!b->t.t.ids || c->start < b->t.from || c->end > b->t.to))
        e = next_piece(b->d, i, &b->t);
    if (!e) e = room_for(b, b->t.t.n > block.n_tokens ? b->t.t.n : block.n_tokens);
    if (e) return e;
    size_t n = slice(&b->t, c->start, c->end, b->have, &first);
    b->n_ends = block.n_tokens - block.n_title;
    ibidi_align_ends(block.tokens + block.n_title, b->n_ends, b->t.t.ids + first, b->have, n,
                     c->end - c->start, b->ends);
    return IBID_OK;
}

/* The chunk's tokens that touch bytes [start, end) of the text. */
static ibidi_place tokens_at(const builder *b, size_t chunk, uint64_t start, uint64_t end) {
    uint64_t base = b->d->chunks[chunk].start;
    size_t lo = 0, hi = b->n_ends;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (b->ends[mid] + base <= start)
            lo = mid + 1;
        else
            hi = mid;
    }
    ibidi_place p = {(uint32_t)chunk, (uint32_t)lo, (uint32_t)lo};
    while (p.to < b->n_ends && (p.to ? b->ends[p.to - 1] : 0) + base < end) p.to++;
    return p;
}

static ibid_err place_chunk(builder *b, size_t i) {
    const ibid_chunk *c = &b->d->chunks[i];
    ibidi_candidates *x = b->c;
    ibid_err e = chunk_ends(b, i);
    for (; !e && b->span < x->spans.n && x->spans.v[b->span].start < c->end; b->span++) {
        const ibidi_mined *s = &x->spans.v[b->span];
        x->places[b->span] = tokens_at(b, i, s->start > c->start ? s->start : c->start, s->end);
    }
    for (; !e && b->sentence < x->n_sentences && x->sentences[b->sentence].start < c->end;
         b->sentence++) {
        ibidi_sentence_at *s = &x->sentences[b->sentence];
        s->at = tokens_at(b, i, s->start, s->end);
    }
    return e;
}

/* ---- Sentences ---- */
static ibid_err split_sentences(const ibidi_searched *d, ibidi_candidates *c) {
    size_t room = 0;
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < d->n_chunks && !e; i++) {
        const ibid_chunk *k = &d->chunks[i];
        ibidi_sentence *s = NULL;
        size_t n = 0;
        if (k->start > k->end || k->end > d->text.n) continue;
        e = ibidi_sentences((ibid_str){d->text.s + k->start, (size_t)(k->end - k->start)}, &s, &n);
        if (!e && c->n_sentences + n > room) {
            size_t more = (c->n_sentences + n) * 2;
            ibidi_sentence_at *v = ibid_realloc(c->sentences, more * sizeof *v);
            if (v) {
                c->sentences = v;
                room = more;
            } else
                e = ibid_fail(IBID_NOMEM, "out of memory for sentences");
        }
        for (size_t j = 0; j < n && !e; j++)
            c->sentences[c->n_sentences++] =
                (ibidi_sentence_at){k->start + s[j].start, k->start + s[j].end, {0, 0, 0}};
        ibid_free(s);
    }
    return e;
}

/* ---- Entities: stems and tokens ---- */
typedef struct stem_list {
    uint64_t *v;
    size_t n, room, from; /* from: of the entity at hand */
} stem_list;

static int add_stem(void *arg, const ibidi_word *w) {
    stem_list *s = arg;
    uint64_t h = ibidi_stem_hash(w->s, w->n);
    if (w->stop || w->extra) return 0;
    for (size_t i = s->from; i < s->n; i++)
        if (s->v[i] == h) return 0;
    if (s->n - s->from >= IBIDI_STEMS_MAX) return 0;
    if (s->n == s->room) {
        size_t room = s->room ? s->room * 2 : 256;
        uint64_t *v = ibid_realloc(s->v, room * sizeof *v);
        if (!v) return IBID_NOMEM;
        s->v = v;
        s->room = room;
    }
    s->v[s->n++] = h;
    return 0;
}

/* Spans in order of their entity: order[at[i]] to order[at[i + 1]) are entity i's. */
static ibid_err by_entity(const ibidi_spans *s, size_t **at, size_t **order) {
    *at = ibid_calloc(s->n_entities + 2, sizeof **at);
    *order = ibid_calloc(s->n, sizeof **order);
    if (!*at || !*order) return ibid_fail(IBID_NOMEM, "out of memory for names of a text");
    for (size_t i = 0; i < s->n; i++)
        if (s->v[i].kind == IBIDI_SPAN_NAME) (*at)[s->v[i].entity + 2]++;
    for (size_t i = 0; i < s->n_entities; i++) (*at)[i + 2] += (*at)[i + 1];
    for (size_t i = 0; i < s->n; i++)
        if (s->v[i].kind == IBIDI_SPAN_NAME) (*order)[(*at)[s->v[i].entity + 1]++] = i;
    return IBID_OK;
}

static ibid_err describe_entities(const ibidi_searched *d, ibidi_candidates *c) {
    size_t *at = NULL, *order = NULL, n = c->spans.n_entities;
    ibidi_words *words = NULL;
    stem_list s = {.n = 0};
    ibid_err e = by_entity(&c->spans, &at, &order);
    if (!e) e = ibidi_words_open(&words);
    for (size_t i = 0; i < n && !e; i++) {
        s.from = c->stem_at[i] = s.n;
        uint64_t last = 0;
        for (size_t k = at[i]; k < at[i + 1] && !e && k - at[i] < 1000; k++) {
            const ibidi_mined *m = &c->spans.v[order[k]];
            size_t len = (size_t)(m->end - m->start);
            uint64_t h = ibidi_stem_hash(d->text.s + m->start, len);
            if (h == last) continue; /* the same form again */
            last = h;
            e = (ibid_err)ibidi_words_each(words, d->text.s + m->start, len, false, add_stem, &s);
        }
        const ibidi_entity *x = &c->spans.entities[i];
        const ibidi_place *p = &c->places[x->first];
        c->tokens[i] = (float)(p->to - p->from) / (float)x->words;
        c->base[i] = NAN;
    }
    c->stem_at[n] = s.n;
    c->stems = s.v;
    if (e == IBID_NOMEM) e = ibid_fail(e, "out of memory for names of a text");
    ibidi_words_close(words);
    ibid_free(at);
    ibid_free(order);
    return e;
}

/* ---- The whole ---- */
static ibid_err build(const ibidi_searched *d, ibidi_candidates *c) {
    builder b = {.d = d, .c = c};
    ibid_err e = ibidi_spans_mine(d->text, &c->spans);
    if (!e) e = split_sentences(d, c);
    if (e) return e;
    c->places = ibid_calloc(c->spans.n, sizeof *c->places);
    c->stem_at = ibid_calloc(c->spans.n_entities + 1, sizeof *c->stem_at);
    c->tokens = ibid_calloc(c->spans.n_entities, sizeof *c->tokens);
    c->base = ibid_calloc(c->spans.n_entities, sizeof *c->base);
    if (!c->places || !c->stem_at || !c->tokens || !c->base)
        return ibid_fail(IBID_NOMEM, "out of memory for candidates");
    for (size_t i = 0; i < d->n_chunks && !e; i++) e = place_chunk(&b, i);
    ibid_free(b.t.t.ids);
    ibid_free(b.ends);
    ibid_free(b.have);
    if (!e) e = describe_entities(d, c);
    c->bytes = sizeof *c + c->spans.n * (sizeof *c->spans.v + sizeof *c->places) +
               c->spans.n_entities * (sizeof *c->spans.entities + 64) +
               c->n_sentences * sizeof *c->sentences;
    return e;
}

ibid_err ibidi_candidates_get(const ibidi_searched *d, ibidi_candidates **out) {
    ibidi_candidate_cache *cache = d->r->candidates;
    pthread_mutex_lock(&cache->mu);
    *out = look_up(cache, d);
    pthread_mutex_unlock(&cache->mu);
    if (*out) return IBID_OK;
    ibidi_candidates *c = ibid_calloc(1, sizeof *c);
    if (!c) return ibid_fail(IBID_NOMEM, "out of memory for candidates");
    c->document = d->doc->number;
    c->generation = d->doc->generation;
    c->content = d->doc->content;
    c->model = *d->model;
    ibid_err e = build(d, c);
    if (e) {
        candidates_free(c);
        return e;
    }
    pthread_mutex_lock(&cache->mu);
    ibidi_candidates *other = look_up(cache, d); /* made meanwhile */
    if (other) {
        candidates_free(c);
        c = other;
    } else {
        c->refs = 1;
        c->next = cache->first;
        cache->first = c;
        cache->bytes += c->bytes;
        shrink(cache);
    }
    pthread_mutex_unlock(&cache->mu);
    *out = c;
    return IBID_OK;
}
