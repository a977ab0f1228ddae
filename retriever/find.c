/* Find in one document: exact occurrences at once, forms of the query's words, then the entities
 * that answer it (rank.h) with all their mentions, or sentences where there are none. */
#include "retriever/find.h"

#include "retriever/candidates.h"
#include "retriever/engine.h"
#include "retriever/folded.h"
#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MATCHES_MAX = 1000,
    QUERY_MAX = 1 << 20,
    ASKED_MAX = 8,      /* entities the model is asked about, the best by all else */
    PROMPT_MAX = 512,   /* bytes of the query it is asked with */
    SENTENCES_MAX = 20, /* returned where no entity answers */
    FEATURES = IBIDI_FEATURES
};
#define FOLDED_SCORE 0.95    /* of an exact match that differs in case or form */
#define STEMMED_SCORE 0.9    /* of other forms of the query's words */
#define SAME_NAME_SCORE 0.85 /* of other forms of the name the query is */

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
typedef enum kind { EXACT, FORM, NAME, SENTENCE, DATE, NUMBER, QUOTE, ADDRESS } kind;
static const char *const kind_names[] = {"exact", "form",   "name",  "sentence",
                                         "date",  "number", "quote", "address"};

typedef struct span {
    uint64_t start, end;
    double score;
    kind kind;
    uint32_t entity; /* or UINT32_MAX */
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
    ibidi_candidates *found;
    span *spans;
    size_t n, room, n_exact;
    double threshold, find_keys; /* of entities; of sentences, by the calibration */
    bool with_gain;
    size_t scored;  /* chunks */
    int32_t *best;  /* [n_entities, question tokens] */
    double *scores; /* [n_entities] probabilities */
    ibidi_asked asked;
    double *features; /* [n_entities, FEATURES] */
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

static ibid_str text_of(const finder *f) {
    return (ibid_str){f->text.data ? f->text.data : "", f->text.len};
}

/* The exact matches are in order of position. */
static bool holds_exact(const finder *f, uint64_t start, uint64_t end) {
    size_t lo = 0, hi = f->n_exact;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (f->spans[mid].end <= start)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < f->n_exact && f->spans[lo].start < end;
}

static ibid_err find_exact(finder *f) {
    ibidi_occurrence *o = NULL;
    size_t n = 0;
    ibid_err e =
        f->text.len ? ibidi_occurrences(text_of(f), f->q->query, most(f), &o, &n) : IBID_OK;
    for (size_t i = 0; i < n && !e; i++)
        e = add_span(
            f, (span){o[i].start, o[i].end, o[i].same ? 1.0 : FOLDED_SCORE, EXACT, UINT32_MAX});
    f->n_exact = f->n;
    ibid_free(o);
    return e;
}

static ibid_err find_stemmed(finder *f) {
    ibidi_occurrence *o = NULL;
    ibidi_words *words = NULL;
    size_t n = 0;
    ibid_err e = ibidi_words_open(&words);
    if (!e && f->text.len)
        e = ibidi_stemmed_occurrences(words, text_of(f), f->q->query, most(f), &o, &n);
    for (size_t i = 0; i < n && !e; i++)
        if (!holds_exact(f, o[i].start, o[i].end))
            e = add_span(f, (span){o[i].start, o[i].end, STEMMED_SCORE, FORM, UINT32_MAX});
    ibidi_words_close(words);
    ibid_free(o);
    return e;
}

/* ---- What keys say of entities and sentences ---- */
typedef struct chunk_keys {
    size_t chunk; /* SIZE_MAX: none yet */
    const int8_t *keys;
    size_t n; /* 0: not to be had */
} chunk_keys;

/* The keys of a chunk's own tokens. */
static ibid_err keys_of(finder *f, size_t chunk, chunk_keys *k) {
    ibid_keys keys;
    ibid_block block;
    const ibidi_asking *q = &f->question.asking;
    if (k->chunk == chunk) return IBID_OK;
    *k = (chunk_keys){chunk, NULL, 0};
    ibid_err e = ibid_snap_keys(f->snap, f->chunks[chunk].block, &keys);
    if (!e) e = ibid_snap_block(f->snap, f->chunks[chunk].block, &block);
    if (e == IBID_NOTFOUND) return IBID_OK;
    if (e) return e;
    if (keys.dim != q->dim || ibid_hash_cmp(&keys.calibration, &q->calibration) != 0 ||
        block.n_title > block.n_tokens || keys.n_tokens != block.n_tokens)
        return IBID_OK;
    k->keys = keys.data + block.n_title * q->dim;
    k->n = block.n_tokens - block.n_title;
    return IBID_OK;
}

static bool within(const chunk_keys *k, const ibidi_place *p) {
    return p->to > p->from && p->to <= k->n;
}

/* best[entity][t]: the highest product of question token t with a token of its mentions. */
static ibid_err score_mentions(finder *f) {
    const ibidi_candidates *c = f->found;
    const ibidi_asking *q = &f->question.asking;
    chunk_keys k = {.chunk = SIZE_MAX};
    int32_t *one = ibid_calloc(q->n, sizeof *one);
    ibid_err e = one ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for a question");
    for (size_t i = 0; i < c->spans.n && !e; i++) {
        if (c->spans.v[i].kind != IBIDI_SPAN_NAME || c->places[i].chunk >= f->n_chunks) continue;
        const ibidi_place *p = &c->places[i];
        if ((e = keys_of(f, p->chunk, &k)) || !within(&k, p)) continue;
        (void)ibidi_maxsim_keys(f->r->kernels, q, k.keys + p->from * q->dim, p->to - p->from, one);
        int32_t *best = f->best + c->spans.v[i].entity * q->n;
        for (size_t t = 0; t < q->n; t++)
            if (one[t] > best[t]) best[t] = one[t];
    }
    ibid_free(one);
    return e;
}

static ibid_err count_scored(finder *f) {
    chunk_keys k = {.chunk = SIZE_MAX};
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < f->n_chunks && !e; i++) {
        e = keys_of(f, i, &k);
        f->scored += k.n > 0;
    }
    return e;
}

/* The question's tokens count alike: what is rare in the collection says little here. */
static double keys_of_entity(const finder *f, size_t i) {
    size_t n = f->question.asking.n;
    int64_t sum = 0;
    for (size_t t = 0; t < n; t++) {
        int32_t b = f->best[i * n + t];
        sum += b == INT32_MIN ? 0 : b;
    }
    return (double)sum / (double)n / (127.0 * 127.0);
}

/* ---- What the model says of entities ---- */
static ibid_str best_form(const finder *f, size_t i) {
    const ibidi_mined *m = &f->found->spans.v[f->found->spans.entities[i].first];
    return (ibid_str){f->text.data + m->start, (size_t)(m->end - m->start)};
}

typedef struct ranked {
    double score;
    size_t entity;
} ranked;

static int best_ranked(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return (x->entity > y->entity) - (x->entity < y->entity);
}

/* ln P(name | prompt) of entities, names led by a space; NAN where the model cannot be asked. */
static ibid_err ask_model(finder *f, ibid_str prompt, const size_t *entities, size_t n,
                          double *out) {
    ibid_str texts[ASKED_MAX];
    ibid_buf names;
    size_t at[ASKED_MAX + 1] = {0};
    ibid_buf_init(&names, (size_t)1 << 24);
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < n && !e; i++) {
        ibid_str s = best_form(f, entities[i]);
        e = ibid_buf_append(&names, " ", 1);
        if (!e) e = ibid_buf_append(&names, s.s, s.n);
        at[i + 1] = names.len;
    }
    for (size_t i = 0; i < n && !e; i++)
        texts[i] = (ibid_str){names.data + at[i], at[i + 1] - at[i]};
    if (!e) e = f->r->o.hooks.likelihoods(f->r->o.hooks.arg, &f->c->model, prompt, texts, n, out);
    ibid_buf_fini(&names);
    return e;
}

/* Asks about the given entities: what the question adds to their names' likelihood. Likelihoods
 * without it are kept with the document. */
static ibid_err ask_gains(finder *f, const ranked *top, size_t n, ibidi_evidence *v) {
    size_t asked[ASKED_MAX], fresh[ASKED_MAX], n_fresh = 0;
    double with[ASKED_MAX], base[ASKED_MAX];
    char prompt[PROMPT_MAX + 2];
    size_t len = f->q->query.n < PROMPT_MAX ? f->q->query.n : PROMPT_MAX;
    memcpy(prompt, f->q->query.s, len);
    prompt[len] = ':';
    pthread_mutex_lock(&f->r->candidates->mu);
    for (size_t i = 0; i < n; i++) {
        asked[i] = top[i].entity;
        if (isnan(f->found->base[asked[i]])) fresh[n_fresh++] = asked[i];
    }
    pthread_mutex_unlock(&f->r->candidates->mu);
    ibid_err e = n_fresh ? ask_model(f, (ibid_str){"Names:", 6}, fresh, n_fresh, base) : IBID_OK;
    if (!e) e = ask_model(f, (ibid_str){prompt, len + 1}, asked, n, with);
    if (e) return e;
    pthread_mutex_lock(&f->r->candidates->mu);
    for (size_t i = 0; i < n_fresh; i++) f->found->base[fresh[i]] = base[i];
    for (size_t i = 0; i < n; i++) v[asked[i]].gain = with[i] - f->found->base[asked[i]];
    pthread_mutex_unlock(&f->r->candidates->mu);
    return IBID_OK;
}

/* ---- Ranking ---- */
static double odds_to_share(double ln_odds) {
    return 1 / (1 + exp(-ln_odds));
}

static ibid_err gather_evidence(finder *f, ibidi_evidence *v) {
    const ibidi_candidates *c = f->found;
    for (size_t i = 0; i < c->spans.n_entities; i++)
        v[i] = (ibidi_evidence){.tokens = (double)c->tokens[i],
                                .keys = keys_of_entity(f, i),
                                .gain = NAN,
                                .stems = c->stems + c->stem_at[i],
                                .n_stems = c->stem_at[i + 1] - c->stem_at[i]};
    return IBID_OK;
}

/* Ranks all entities without the model, then asks it about the best. Those it was not asked about
 * stay below those it was. */
static ibid_err rank(finder *f, const ibidi_asked *asked, ibidi_evidence *v, ranked *order) {
    const ibidi_entity *entities = f->found->spans.entities;
    size_t n = f->found->spans.n_entities, top = n < ASKED_MAX ? n : ASKED_MAX;
    ibidi_rank_features(asked, entities, v, n, f->features);
    for (size_t i = 0; i < n; i++)
        order[i] = (ranked){ibidi_rank_score(f->features + i * FEATURES, false), i};
    qsort(order, n, sizeof *order, best_ranked);
    ibid_err e = IBID_OK;
    f->with_gain = f->r->o.hooks.likelihoods && !f->q->fast;
    if (f->with_gain && (e = ask_gains(f, order, top, v))) {
        if (e != IBID_UNAVAIL && e != IBID_TIMEOUT && e != IBID_NOTSUP) return e;
        f->with_gain = false;
    }
    if (f->with_gain) {
        ibidi_rank_features(asked, entities, v, n, f->features);
        double least = INFINITY;
        for (size_t k = 0; k < top; k++) {
            order[k].score = ibidi_rank_score(f->features + order[k].entity * FEATURES, true);
            least = fmin(least, order[k].score);
        }
        for (size_t k = top; k < n; k++) order[k].score = fmin(order[k].score, least) - 1;
        qsort(order, top, sizeof *order, best_ranked);
    }
    for (size_t k = 0; k < n; k++) f->scores[order[k].entity] = odds_to_share(order[k].score);
    return IBID_OK;
}

/* How many of the ranked entities, from the best on, are matches. */
static size_t chosen(finder *f, const ranked *order, const ibidi_evidence *v, size_t n) {
    ibidi_rank_limits l = ibidi_rank_defaults(f->with_gain);
    size_t k = 0;
    bool given = f->q->min_score >= 0, any = !f->with_gain || given;
    for (size_t i = 0; i < n && !any; i++) any = v[i].gain >= l.floor; /* NAN is not */
    f->threshold = given ? f->q->min_score : l.threshold;
    while (any && k < n &&
           (odds_to_share(order[k].score) >= f->threshold ||
            (!given && order[k].score >= order[0].score - l.within)))
        k++;
    return k;
}

/* Other forms of the name that an exact match is. */
static ibid_err add_same_names(finder *f, bool *taken) {
    const ibidi_spans *s = &f->found->spans;
    for (size_t i = 0; i < s->n; i++)
        if (s->v[i].kind == IBIDI_SPAN_NAME && holds_exact(f, s->v[i].start, s->v[i].end)) {
            size_t lo = 0; /* the whole name must be found, not a part of it */
            while (lo < f->n_exact && f->spans[lo].end < s->v[i].end) lo++;
            if (lo < f->n_exact && f->spans[lo].start <= s->v[i].start)
                taken[s->v[i].entity] = true;
        }
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < s->n && !e; i++)
        if (s->v[i].kind == IBIDI_SPAN_NAME && taken[s->v[i].entity] &&
            !holds_exact(f, s->v[i].start, s->v[i].end))
            e = add_span(f,
                         (span){s->v[i].start, s->v[i].end, SAME_NAME_SCORE, FORM, s->v[i].entity});
    return e;
}

static ibid_err add_entities(finder *f, const ranked *order, size_t n) {
    const ibidi_spans *s = &f->found->spans;
    bool *taken = ibid_calloc(s->n_entities, sizeof *taken);
    if (!taken) return ibid_fail(IBID_NOMEM, "out of memory for matches");
    ibid_err e = f->n_exact ? add_same_names(f, taken) : IBID_OK;
    for (size_t k = 0; k < n; k++) {
        if (taken[order[k].entity]) f->scores[order[k].entity] = 0; /* there already */
        taken[order[k].entity] = true;
    }
    for (size_t i = 0; i < s->n && !e; i++) {
        if (s->v[i].kind != IBIDI_SPAN_NAME || !taken[s->v[i].entity]) continue;
        double score = f->scores[s->v[i].entity];
        bool listed = false;
        for (size_t k = 0; k < n && !listed; k++) listed = order[k].entity == s->v[i].entity;
        if (listed && score > 0 && !holds_exact(f, s->v[i].start, s->v[i].end))
            e = add_span(f, (span){s->v[i].start, s->v[i].end, score, NAME, s->v[i].entity});
    }
    ibid_free(taken);
    return e;
}

/* ---- Dates, numbers, quotes, addresses ---- */
/* All of the kinds the question asks for; the better its words fit those around one, the higher. */
static ibid_err add_kinds(finder *f) {
    static const kind kinds[] = {[IBIDI_SPAN_DATE] = DATE,
                                 [IBIDI_SPAN_NUMBER] = NUMBER,
                                 [IBIDI_SPAN_QUOTE] = QUOTE,
                                 [IBIDI_SPAN_ADDRESS] = ADDRESS};
    const ibidi_candidates *c = f->found;
    const ibidi_asking *q = &f->question.asking;
    chunk_keys k = {.chunk = SIZE_MAX};
    int32_t *best = ibid_calloc(q->n, sizeof *best);
    ibid_err e = best ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for a question");
    for (size_t i = 0, s = 0; i < c->spans.n && !e; i++) {
        const ibidi_mined *m = &c->spans.v[i];
        if (m->kind == IBIDI_SPAN_NAME || !(f->asked.kinds & 1u << m->kind)) continue;
        while (s < c->n_sentences && c->sentences[s].end <= m->start) s++;
        const ibidi_place *p = s < c->n_sentences ? &c->sentences[s].at : &c->places[i];
        double score = 0;
        if (p->chunk < f->n_chunks && !(e = keys_of(f, p->chunk, &k)) && within(&k, p))
            score = ibidi_maxsim_keys(f->r->kernels, q, k.keys + p->from * q->dim, p->to - p->from,
                                      best);
        score = 0.5 + 0.3 * fmax(0, fmin(1, score));
        if (!e && score >= f->threshold && !holds_exact(f, m->start, m->end))
            e = add_span(f, (span){m->start, m->end, score, kinds[m->kind], UINT32_MAX});
    }
    ibid_free(best);
    return e;
}

/* ---- Sentences ---- */
static ibid_err add_sentences(finder *f) {
    const ibidi_candidates *c = f->found;
    const ibidi_asking *q = &f->question.asking;
    chunk_keys k = {.chunk = SIZE_MAX};
    int32_t *best = ibid_calloc(q->n, sizeof *best);
    ibid_err e = best ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for a question");
    for (size_t i = 0; i < c->n_sentences && !e; i++) {
        const ibidi_sentence_at *s = &c->sentences[i];
        if (s->at.chunk >= f->n_chunks || (e = keys_of(f, s->at.chunk, &k)) || !within(&k, &s->at))
            continue;
        double score = ibidi_maxsim_keys(f->r->kernels, q, k.keys + s->at.from * q->dim,
                                         s->at.to - s->at.from, best);
        /* On the scale of entities: the calibration's threshold meets theirs. */
        score = fmax(0, fmin(0.8, score / f->find_keys * f->threshold));
        if (score >= f->threshold && !holds_exact(f, s->start, s->end))
            e = add_span(f, (span){s->start, s->end, score, SENTENCE, UINT32_MAX});
    }
    ibid_free(best);
    return e;
}

/* ---- The whole of semantic matches ---- */
static ibid_err explain(finder *f, const ranked *order, ibidi_matches *out) {
    size_t n = f->found->spans.n_entities;
    ibid_find_candidate *list = ibid_arena_alloc(out->arena, n * sizeof *list);
    if (!list) return ibid_fail(IBID_NOMEM, "out of memory for %zu candidates", n);
    for (size_t k = 0; k < n; k++) {
        size_t i = order[k].entity;
        ibid_str name = best_form(f, i);
        const char *copy = ibid_arena_copy(out->arena, name.s, name.n);
        const double *features =
            ibid_arena_copy(out->arena, f->features + i * FEATURES, FEATURES * sizeof *features);
        if (!copy || !features) return ibid_fail(IBID_NOMEM, "out of memory for candidates");
        list[k] = (ibid_find_candidate){{copy, name.n},
                                        f->found->spans.entities[i].mentions,
                                        odds_to_share(order[k].score),
                                        features,
                                        FEATURES};
    }
    out->candidates = list;
    out->n_candidates = n;
    return IBID_OK;
}

static ibid_err find_entities(finder *f, ibidi_matches *out) {
    size_t n = f->found->spans.n_entities, tokens = f->question.asking.n;
    ibidi_words *words = NULL;
    ibidi_evidence *v = ibid_calloc(n, sizeof *v);
    ranked *order = ibid_calloc(n, sizeof *order);
    f->scores = ibid_calloc(n, sizeof *f->scores);
    f->features = ibid_calloc(n * FEATURES, sizeof *f->features);
    f->best = ibid_calloc(n * tokens, sizeof *f->best);
    ibid_err e = v && order && f->scores && f->features && f->best
                     ? ibidi_words_open(&words)
                     : ibid_fail(IBID_NOMEM, "out of memory for %zu candidates", n);
    for (size_t i = 0; i < n * tokens && !e; i++) f->best[i] = INT32_MIN;
    if (!e) e = ibidi_asked_of(words, f->q->query, &f->asked);
    if (!e) e = score_mentions(f);
    if (!e) e = gather_evidence(f, v);
    if (!e) e = rank(f, &f->asked, v, order);
    if (!e)
        e = add_entities(f, order,
                         f->asked.kinds || f->asked.sentence ? 0 : chosen(f, order, v, n));
    if (!e && f->q->explain) e = explain(f, order, out);
    ibidi_words_close(words);
    ibid_free(v);
    ibid_free(order);
    return e;
}

static int by_score(const void *a, const void *b) {
    const span *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    if (x->start != y->start) return x->start < y->start ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

/* Drops all but the best sentences. */
static void few_sentences(finder *f, size_t before) {
    size_t kept = before, sentences = 0;
    for (size_t i = before; i < f->n; i++)
        if (f->spans[i].kind != SENTENCE || sentences++ < SENTENCES_MAX)
            f->spans[kept++] = f->spans[i];
    f->n = kept;
}

static ibid_err find_semantic(finder *f, ibidi_matches *out) {
    size_t before = f->n;
    ibidi_searched d = {f->r, f->snap, &f->doc, &f->c->model, text_of(f), f->chunks, f->n_chunks};
    ibid_err e = ibidi_question_weigh(&f->question, &f->c->view);
    if (!e) e = ibidi_candidates_get(&d, &f->found);
    if (!e) e = count_scored(f);
    if (!e) e = find_entities(f, out);
    if (!e && f->asked.kinds) e = add_kinds(f);
    if (!e && f->n == before) e = add_sentences(f);
    if (e == IBID_UNAVAIL || e == IBID_TIMEOUT) { /* no token offsets: exact matches still stand */
        f->question.why = "the attention room does not answer";
        f->n = before;
        e = IBID_OK;
    }
    if (f->n > before) qsort(f->spans + before, f->n - before, sizeof *f->spans, by_score);
    if (f->q->min_score < 0) few_sentences(f, before);
    return e;
}

/* ---- The whole ---- */
static ibid_err fill_one(finder *f, const span *s, ibidi_matches *out) {
    ibid_str locator = f->n_chunks ? f->chunks[chunk_at(f, s->start)].locator : (ibid_str){"", 0};
    ibid_str name = {"", 0};
    size_t len = (size_t)(s->end - s->start);
    if (s->entity != UINT32_MAX) name = best_form(f, s->entity);
    const char *text = ibid_arena_copy(out->arena, f->text.data + s->start, len);
    const char *place = ibid_arena_copy(out->arena, locator.s ? locator.s : "", locator.n);
    const char *whole = ibid_arena_copy(out->arena, name.s, name.n);
    if (!text || !place || !whole) return ibid_fail(IBID_NOMEM, "out of memory for matches");
    out->matches[out->n++] = (ibid_match){s->start,
                                          s->end,
                                          {text, len},
                                          {place, locator.n},
                                          s->score,
                                          s->kind == EXACT,
                                          {kind_names[s->kind], strlen(kind_names[s->kind])},
                                          s->entity == UINT32_MAX ? 0 : (uint64_t)s->entity + 1,
                                          {whole, name.n}};
    return IBID_OK;
}

static ibid_err fill(finder *f, ibidi_matches *out) {
    size_t n = f->n < most(f) ? f->n : most(f);
    out->matches = ibid_arena_alloc(out->arena, n * sizeof *out->matches);
    ibid_err e = out->matches ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for %zu matches", n);
    for (size_t i = 0; i < n && !e; i++) e = fill_one(f, &f->spans[i], out);
    return e;
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
    if (!e && !f->q->exact_only) e = find_stemmed(f);
    bool calibrated =
        !e && f->question.usable && ibidi_engine_calibration(f->snap, &f->c->model, cal);
    f->find_keys = calibrated && cal->find > 0 ? (double)cal->find : 1;
    f->threshold = f->q->min_score >= 0 ? f->q->min_score : 1;
    if (!e && f->question.usable && !f->q->exact_only && f->n < most(f)) e = find_semantic(f, out);
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
