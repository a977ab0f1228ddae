/* Find in one document: exact occurrences at once, forms of the query's words, then the entities
 * that answer it (rank.h) with all their mentions, or sentences where there are none. */
#include "retriever/find.h"

#include "retriever/find_internal.h"
#include "retriever/folded.h"
#include "rpc/base/clock.h"

#include <string.h>

enum { MATCHES_MAX = 1000000, QUERY_MAX = 1 << 20 };
#define FOLDED_SCORE 0.95 /* of an exact match that differs in case or form */
#define STEMMED_SCORE 0.9 /* of other forms of the query's words */

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
static const char *const kind_names[] = {"exact", "form",   "name",  "sentence",
                                         "date",  "number", "quote", "address"};

ibid_err ibidi_find_add(ibidi_finder *f, ibidi_match_span s) {
    if (f->n == f->room) {
        size_t room = f->room ? f->room * 2 : 64;
        ibidi_match_span *more = ibid_realloc(f->spans, room * sizeof *more);
        if (!more) return ibid_fail(IBID_NOMEM, "out of memory for matches");
        f->spans = more;
        f->room = room;
    }
    f->spans[f->n++] = s;
    return IBID_OK;
}

static size_t chunk_at(const ibidi_finder *f, uint64_t offset) {
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

ibid_str ibidi_find_text(const ibidi_finder *f) {
    return (ibid_str){f->text.data ? f->text.data : "", f->text.len};
}

size_t ibidi_find_exact_after(const ibidi_finder *f, uint64_t start) {
    size_t lo = 0, hi = f->n_exact;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (f->spans[mid].end <= start)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

bool ibidi_find_holds_exact(const ibidi_finder *f, uint64_t start, uint64_t end) {
    size_t at = ibidi_find_exact_after(f, start);
    return at < f->n_exact && f->spans[at].start < end;
}

static ibid_err find_exact(ibidi_finder *f) {
    ibidi_occurrence *o = NULL;
    size_t n = 0;
    ibid_err e = f->text.len
                     ? ibidi_occurrences(ibidi_find_text(f), f->q->query, f->most + 1, &o, &n)
                     : IBID_OK;
    for (size_t i = 0; i < n && !e; i++)
        e = ibidi_find_add(f,
                           (ibidi_match_span){o[i].start, o[i].end, o[i].same ? 1.0 : FOLDED_SCORE,
                                              IBIDI_MATCH_EXACT, UINT32_MAX});
    f->n_exact = f->n;
    ibid_free(o);
    return e;
}

static ibid_err find_stemmed(ibidi_finder *f) {
    ibidi_occurrence *o = NULL;
    ibidi_words *words = NULL;
    size_t n = 0;
    ibid_err e = ibidi_words_open(&words);
    if (!e && f->text.len)
        e = ibidi_stemmed_occurrences(words, ibidi_find_text(f), f->q->query, f->most + 1, &o, &n);
    for (size_t i = 0; i < n && !e; i++)
        if (!ibidi_find_holds_exact(f, o[i].start, o[i].end))
            e = ibidi_find_add(f, (ibidi_match_span){o[i].start, o[i].end, STEMMED_SCORE,
                                                     IBIDI_MATCH_FORM, UINT32_MAX});
    ibidi_words_close(words);
    ibid_free(o);
    return e;
}

ibid_str ibidi_find_name(const ibidi_finder *f, size_t i) {
    const ibidi_mined *m = &f->found->spans.v[f->found->spans.entities[i].first];
    return (ibid_str){f->text.data + m->start, (size_t)(m->end - m->start)};
}

/* ---- The whole ---- */
static ibid_err fill_one(ibidi_finder *f, const ibidi_match_span *s, ibidi_matches *out) {
    ibid_str locator = f->n_chunks ? f->chunks[chunk_at(f, s->start)].locator : (ibid_str){"", 0};
    ibid_str name = {"", 0};
    size_t len = (size_t)(s->end - s->start);
    if (s->entity != UINT32_MAX) name = ibidi_find_name(f, s->entity);
    const char *text = ibid_arena_copy(out->arena, f->text.data + s->start, len);
    const char *place = ibid_arena_copy(out->arena, locator.s ? locator.s : "", locator.n);
    const char *whole = ibid_arena_copy(out->arena, name.s, name.n);
    if (!text || !place || !whole) return ibid_fail(IBID_NOMEM, "out of memory for matches");
    out->matches[out->n++] = (ibid_match){s->start,
                                          s->end,
                                          {text, len},
                                          {place, locator.n},
                                          s->score,
                                          s->kind == IBIDI_MATCH_EXACT,
                                          {kind_names[s->kind], strlen(kind_names[s->kind])},
                                          s->entity == UINT32_MAX ? 0 : (uint64_t)s->entity + 1,
                                          {whole, name.n}};
    return IBID_OK;
}

static ibid_err fill(ibidi_finder *f, ibidi_matches *out) {
    size_t n = f->n < f->most ? f->n : f->most;
    out->more |= f->n > n;
    out->matches = ibid_arena_alloc(out->arena, n * sizeof *out->matches);
    ibid_err e = out->matches ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for %zu matches", n);
    for (size_t i = 0; i < n && !e; i++) e = fill_one(f, &f->spans[i], out);
    return e;
}

static ibid_err find_document(ibidi_finder *f) {
    ibid_err e = ibid_snap_document(f->snap, f->q->collection, f->q->document, &f->doc);
    if (e == IBID_NOTFOUND)
        return ibid_fail(e, "there is no document %.*s in %s", (int)f->q->document.n,
                         f->q->document.s, f->c->name);
    if (!e) e = ibid_snap_chunks(f->snap, f->doc.number, &f->chunks, &f->n_chunks);
    if (e == IBID_NOTFOUND) e = IBID_OK;
    if (!e && f->doc.text_bytes) e = ibid_snap_text(f->snap, f->doc.number, &f->text);
    return e;
}

static ibid_err run(ibidi_finder *f, ibidi_matches *out) {
    ibid_calibration *cal = ibid_alloc(sizeof *cal);
    if (!cal) return ibid_fail(IBID_NOMEM, "out of memory for a calibration");
    ibid_err e = find_document(f);
    if (!e) e = find_exact(f);
    if (!e && !f->q->exact_only) e = find_stemmed(f);
    bool calibrated =
        !e && f->question.usable && ibidi_engine_calibration(f->snap, &f->c->model, cal);
    f->find_keys = calibrated && cal->find > 0 ? (double)cal->find : 1;
    f->threshold = f->q->min_score >= 0 ? f->q->min_score : 1;
    if (!e && f->question.usable && !f->q->exact_only) {
        out->more = f->n >= f->most; /* there is no place for what else there may be */
        if (!out->more) e = ibidi_find_semantic(f, out);
    }
    if (!e && f->n_chunks) out->coverage = (double)f->scored / (double)f->n_chunks;
    if (f->q->exact_only) out->coverage = 1;
    if (!e) e = fill(f, out);
    out->threshold = f->threshold;
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
    ibidi_finder f = {.r = r, .q = q, .most = q->max_matches ? q->max_matches : MATCHES_MAX};
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
    ibidi_candidates_release(r, f.found);
    ibid_free(f.spans);
    ibid_free(f.best);
    ibid_free(f.scores);
    ibid_free(f.features);
    if (e) ibidi_matches_close(out);
    out->total_ms = ibid_ms_since(start);
    return e;
}

void ibidi_matches_close(ibidi_matches *m) {
    ibid_arena_close(m->arena);
    *m = (ibidi_matches){.n = 0};
}
