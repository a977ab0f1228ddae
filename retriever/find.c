/* Find in one document: exact occurrences at once, then sentences whose tokens answer the question.
 */
#include "retriever/find.h"

#include "retriever/engine.h"
#include "retriever/folded.h"
#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MATCHES_MAX = 1000, QUERY_MAX = 1 << 20 };
#define FOLDED_SCORE 0.95 /* of an exact match that differs in case or form */

void ibidi_span_scores(const ibid_kernels *k, const ibidi_asking *q, const int8_t *keys,
                       const uint64_t *ends, size_t n_tokens, const ibidi_sentence *s, size_t n,
                       int32_t *best, float *score) {
    size_t from = 0;
    for (size_t i = 0; i < n; i++) {
        while (from < n_tokens && ends[from] <= s[i].start) from++;
        size_t to = from;
        while (to < n_tokens && (to ? ends[to - 1] : 0) < s[i].end) to++;
        score[i] =
            to > from ? (float)ibidi_maxsim_keys(k, q, keys + from * q->dim, to - from, best) : 0;
    }
}

void ibidi_align_ends(const int32_t *ids, size_t n, const int32_t *have, const uint64_t *have_ends,
                      size_t n_have, uint64_t bytes, uint64_t *out) {
    size_t front = 0, back = 0;
    while (front < n && front < n_have && ids[front] == have[front]) {
        out[front] = have_ends[front];
        front++;
    }
    while (back < n - front && back < n_have - front &&
           ids[n - 1 - back] == have[n_have - 1 - back]) {
        out[n - 1 - back] = have_ends[n_have - 1 - back];
        back++;
    }
    /* The token before the matching tail ends where that tail begins. */
    uint64_t lo = front ? out[front - 1] : 0, hi = bytes;
    if (back && n_have > back) hi = have_ends[n_have - 1 - back];
    if (back && n_have == back) hi = lo;
    size_t gap = n - front - back;
    for (size_t i = 0; i < gap; i++) out[front + i] = lo + (hi - lo) * (i + 1) / gap;
}

/* ---- The list of matches ---- */
typedef struct span {
    uint64_t start, end;
    double score;
    size_t chunk;
    bool exact;
} span;

typedef struct finder {
    ibidi_retriever *r;
    ibidi_collection *c;
    ibid_snap *snap;
    const ibid_find_request *q;
    ibidi_question question;
    ibid_document doc;
    const ibid_chunk *chunks;
    size_t n_chunks;
    ibid_buf text;
    span *spans;
    size_t n, room, n_exact;
    double threshold;
    size_t scored; /* chunks */
} finder;

static ibid_err add_span(finder *f, span s) {
    if (f->n == f->room) {
        size_t room = f->room ? f->room * 2 : 64;
        span *more = ibid_realloc(f->spans, room * sizeof *more);
        if (!more) return ibid_fail(IBID_NOMEM, "out of memory for matches");
        f->spans = more;
        f->room = room;
    }
    f->spans[f->n++] = s;
    return IBID_OK;
}

static size_t chunk_at(const finder *f, uint64_t offset) {
    size_t lo = 0, hi = f->n_chunks;
    while (hi - lo > 1) {
        size_t mid = (lo + hi) / 2;
        if (f->chunks[mid].start <= offset)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

static size_t most(const finder *f) {
    return f->q->max_matches ? f->q->max_matches : MATCHES_MAX;
}

static ibid_err find_exact(finder *f) {
    ibidi_occurrence *o = NULL;
    size_t n = 0;
    ibid_str text = {f->text.data, f->text.len};
    ibid_err e = f->text.len ? ibidi_occurrences(text, f->q->query, most(f), &o, &n) : IBID_OK;
    for (size_t i = 0; i < n && !e; i++)
        e = add_span(f, (span){o[i].start, o[i].end, o[i].same ? 1.0 : FOLDED_SCORE,
                               chunk_at(f, o[i].start), true});
    f->n_exact = f->n;
    ibid_free(o);
    return e;
}

/* ---- Semantic spans ---- */
static bool holds_exact(const finder *f, uint64_t start, uint64_t end) {
    size_t lo = 0, hi = f->n_exact;
    while (lo < hi) { /* exact ones are in order of position */
        size_t mid = (lo + hi) / 2;
        if (f->spans[mid].end <= start)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < f->n_exact && f->spans[lo].start < end;
}

typedef struct chunk_work {
    size_t chunk;
    ibid_block block;
    ibid_keys keys;
    ibid_str text;
} chunk_work;

/* The block's token ends in its chunk's text. */
static ibid_err token_ends(finder *f, const chunk_work *w, uint64_t *out) {
    ibid_tokens t = {.ids = NULL};
    size_t n = w->block.n_tokens - w->block.n_title;
    if (!f->r->o.hooks.tokenize)
        return ibid_fail(IBID_UNAVAIL, "no attention room to ask for tokens");
    ibid_err e = f->r->o.hooks.tokenize(f->r->o.hooks.arg, &f->c->model, w->text, &t);
    if (!e)
        ibidi_align_ends(w->block.tokens + w->block.n_title, n, t.ids, t.ends, t.n, w->text.n, out);
    ibid_free(t.ids);
    return e;
}

static ibid_err add_sentences(finder *f, const chunk_work *w, const ibidi_sentence *s,
                              const float *score, size_t n) {
    ibid_err e = IBID_OK;
    uint64_t base = f->chunks[w->chunk].start;
    for (size_t i = 0; i < n && !e; i++) {
        if ((double)score[i] < f->threshold) continue;
        span sp = {base + s[i].start, base + s[i].end, (double)score[i], w->chunk, false};
        if (!holds_exact(f, sp.start, sp.end)) e = add_span(f, sp);
    }
    return e;
}

static ibid_err find_in_chunk(finder *f, const chunk_work *w, int32_t *best) {
    size_t n = 0, tokens = w->block.n_tokens - w->block.n_title;
    ibidi_sentence *s = NULL;
    float *score = NULL;
    uint64_t *ends = ibid_calloc(tokens, sizeof *ends);
    ibid_err e = ends ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for a chunk");
    if (!e) e = token_ends(f, w, ends);
    if (!e) e = ibidi_sentences(w->text, &s, &n);
    if (!e && !(score = ibid_calloc(n, sizeof *score)))
        e = ibid_fail(IBID_NOMEM, "out of memory for a chunk");
    if (!e) {
        ibidi_span_scores(f->r->kernels, &f->question.asking,
                          w->keys.data + w->block.n_title * w->keys.dim, ends, tokens, s, n, best,
                          score);
        e = add_sentences(f, w, s, score, n);
    }
    ibid_free(score);
    ibid_free(s);
    ibid_free(ends);
    return e;
}

/* A chunk whose best tokens together stay under the threshold has no sentence above it. */
static ibid_err try_chunk(finder *f, size_t i, int32_t *best) {
    chunk_work w = {.chunk = i};
    const ibid_chunk *c = &f->chunks[i];
    const ibidi_asking *q = &f->question.asking;
    ibid_err e = ibid_snap_keys(f->snap, c->block, &w.keys);
    if (!e) e = ibid_snap_block(f->snap, c->block, &w.block);
    if (e == IBID_NOTFOUND) return IBID_OK;
    if (e) return e;
    if (w.keys.dim != q->dim || ibid_hash_cmp(&w.keys.calibration, &q->calibration) != 0 ||
        w.block.n_title > w.block.n_tokens || w.keys.n_tokens != w.block.n_tokens)
        return IBID_OK;
    f->scored++;
    size_t tokens = w.block.n_tokens - w.block.n_title;
    double bound =
        ibidi_maxsim_keys(f->r->kernels, q, w.keys.data + w.block.n_title * q->dim, tokens, best);
    if (bound < f->threshold) return IBID_OK;
    w.text = (ibid_str){f->text.data + c->start, (size_t)(c->end - c->start)};
    return find_in_chunk(f, &w, best);
}

static int by_place(const void *a, const void *b) {
    const span *x = a, *y = b;
    if (x->start != y->start) return x->start < y->start ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

static int best_span(const void *a, const void *b) {
    const span *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return by_place(a, b);
}

/* Overlapping semantic spans become one with the better score; then best first. */
static void merge(finder *f) {
    size_t n = f->n - f->n_exact, kept = 0;
    if (!n) return;
    span *s = f->spans + f->n_exact;
    qsort(s, n, sizeof *s, by_place);
    for (size_t i = 0; i < n; i++) {
        if (kept && s[i].start < s[kept - 1].end) {
            if (s[i].end > s[kept - 1].end) s[kept - 1].end = s[i].end;
            s[kept - 1].score = fmax(s[kept - 1].score, s[i].score);
        } else
            s[kept++] = s[i];
    }
    qsort(s, kept, sizeof *s, best_span);
    f->n = f->n_exact + kept;
}

static ibid_err find_semantic(finder *f) {
    ibid_err e = ibidi_question_weigh(&f->question, &f->c->view);
    int32_t *best = ibid_calloc(f->question.keys.n, sizeof *best);
    if (!best && !e) e = ibid_fail(IBID_NOMEM, "out of memory for a question");
    for (size_t i = 0; i < f->n_chunks && !e; i++) {
        if (f->chunks[i].start > f->chunks[i].end || f->chunks[i].end > f->text.len)
            e = ibid_fail(IBID_CORRUPT, "chunk %zu lies outside its document's text", i);
        else
            e = try_chunk(f, i, best);
    }
    ibid_free(best);
    if (e == IBID_UNAVAIL || e == IBID_TIMEOUT) { /* no token offsets: exact matches still stand */
        f->question.why = "the attention room does not answer";
        f->n = f->n_exact;
        e = IBID_OK;
    }
    merge(f);
    return e;
}

/* ---- The whole ---- */
static ibid_err fill(finder *f, ibidi_matches *out) {
    size_t n = f->n < most(f) ? f->n : most(f);
    out->matches = ibid_arena_alloc(out->arena, n * sizeof *out->matches);
    if (!out->matches) return ibid_fail(IBID_NOMEM, "out of memory for %zu matches", n);
    for (size_t i = 0; i < n; i++) {
        const span *s = &f->spans[i];
        ibid_str locator = f->n_chunks ? f->chunks[s->chunk].locator : (ibid_str){"", 0};
        size_t len = (size_t)(s->end - s->start);
        const char *text = ibid_arena_copy(out->arena, f->text.data + s->start, len);
        const char *place = ibid_arena_copy(out->arena, locator.s ? locator.s : "", locator.n);
        if (!text || !place) return ibid_fail(IBID_NOMEM, "out of memory for %zu matches", n);
        out->matches[out->n++] =
            (ibid_match){s->start, s->end, {text, len}, {place, locator.n}, s->score, s->exact};
    }
    return IBID_OK;
}

static ibid_err find_document(finder *f) {
    ibid_err e = ibid_snap_document(f->snap, f->q->collection, f->q->document, &f->doc);
    if (e == IBID_NOTFOUND)
        return ibid_fail(e, "there is no document %.*s in %s", (int)f->q->document.n,
                         f->q->document.s, f->c->name);
    if (!e) e = ibid_snap_chunks(f->snap, f->doc.number, &f->chunks, &f->n_chunks);
    if (e == IBID_NOTFOUND) e = IBID_OK;
    if (!e && f->doc.text_bytes) e = ibid_snap_text(f->snap, f->doc.number, &f->text);
    return e;
}

static ibid_err run(finder *f, ibidi_matches *out) {
    ibid_calibration *cal = ibid_alloc(sizeof *cal);
    if (!cal) return ibid_fail(IBID_NOMEM, "out of memory for a calibration");
    ibid_err e = find_document(f);
    if (!e) e = find_exact(f);
    bool calibrated =
        !e && f->question.usable && ibidi_engine_calibration(f->snap, &f->c->model, cal);
    f->threshold = f->q->min_score >= 0 ? f->q->min_score : calibrated ? (double)cal->find : 2;
    if (!e && f->question.usable && !f->q->exact_only && f->n < most(f)) e = find_semantic(f);
    if (!e && f->n_chunks) out->coverage = (double)f->scored / (double)f->n_chunks;
    if (f->q->exact_only) out->coverage = 1;
    if (!e) e = fill(f, out);
    out->degraded = f->q->exact_only ? NULL : f->question.why;
    ibid_free(cal);
    return e;
}

static ibid_err check(const ibid_find_request *q) {
    size_t i = 0;
    while (i < q->query.n && strchr(" \t\r\n", q->query.s[i])) i++;
    if (i == q->query.n) return ibid_fail(IBID_INVAL, "the query is empty");
    if (q->query.n > QUERY_MAX)
        return ibid_fail(IBID_TOOBIG, "a query of %zu bytes; at most %d", q->query.n, QUERY_MAX);
    return IBID_OK;
}

ibid_err ibidi_retriever_find(ibidi_retriever *r, const ibid_find_request *q, ibidi_matches *out) {
    uint64_t start = ibid_now_ns();
    ibid_collection c;
    finder f = {.r = r, .q = q};
    *out = (ibidi_matches){.n = 0};
    ibid_buf_init(&f.text, (size_t)4 << 30);
    ibid_err e = check(q);
    if (!e) e = ibid_arena_open((size_t)4 << 30, &out->arena);
    if (!e) e = ibidi_engine_snap(r, &f.snap);
    if (!e && (e = ibid_snap_collection(f.snap, q->collection, &c)))
        e = ibid_fail(e == IBID_NOTFOUND ? IBID_NOCOLLECTION : e, "there is no collection %.*s",
                      (int)q->collection.n, q->collection.s);
    if (!e) e = ibidi_engine_acquire(r, &c, &f.c);
    if (e) goto done;
    ibid_snap_end(f.snap);
    f.snap = NULL;
    if (!q->exact_only) ibidi_question_get(r, &f.c->model, q->query, &f.question);
    if ((e = ibidi_engine_snap(r, &f.snap)) || (e = ibidi_engine_current(r, f.c, f.snap)))
        goto done;
    e = run(&f, out);
    pthread_rwlock_unlock(&f.c->lock);
done:
    ibidi_engine_release(r, f.c);
    if (f.snap) ibid_snap_end(f.snap);
    ibidi_question_fini(&f.question);
    ibid_buf_fini(&f.text);
    ibid_free(f.spans);
    if (e) ibidi_matches_close(out);
    out->total_ms = ibid_ms_since(start);
    return e;
}

void ibidi_matches_close(ibidi_matches *m) {
    ibid_arena_close(m->arena);
    *m = (ibidi_matches){.n = 0};
}
