/* What answers a question in a document besides its own words: names ranked by token keys and the
 * model (rank.h), the kinds it asks for, or sentences. */
#include "retriever/find_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    ASKED_MAX = 8,      /* entities the model is asked about, the best by all else */
    PROMPT_MAX = 512,   /* bytes of the query it is asked with */
    SENTENCES_MAX = 20, /* returned where no entity answers */
    FEATURES = IBIDI_FEATURES
};
#define SAME_NAME_SCORE 0.85 /* of other forms of the name the query is */

/* ---- What keys say of entities and sentences ---- */
typedef struct chunk_keys {
    size_t chunk; /* SIZE_MAX: none yet */
    const int8_t *keys;
    size_t n; /* 0: not to be had */
} chunk_keys;

/* The keys of a chunk's own tokens. */
static ibid_err keys_of(ibidi_finder *f, size_t chunk, chunk_keys *k) {
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

/* MaxSim of the question with the tokens of a place, best [question tokens] theirs; *score is
 * -INFINITY where the place's keys are not to be had. */
static ibid_err score_place(ibidi_finder *f, const ibidi_place *p, chunk_keys *k, int32_t *best,
                            double *score) {
    const ibidi_asking *q = &f->question.asking;
    *score = -INFINITY;
    if (p->chunk >= f->n_chunks) return IBID_OK;
    ibid_err e = keys_of(f, p->chunk, k);
    if (!e && within(k, p))
        *score =
            ibidi_maxsim_keys(f->r->kernels, q, k->keys + p->from * q->dim, p->to - p->from, best);
    return e;
}

/* best[entity][t]: the highest product of question token t with a token of its mentions. */
static ibid_err score_mentions(ibidi_finder *f) {
    const ibidi_candidates *c = f->found;
    const ibidi_asking *q = &f->question.asking;
    chunk_keys k = {.chunk = SIZE_MAX};
    int32_t *one = ibid_calloc(q->n, sizeof *one);
    ibid_err e = one ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for a question");
    for (size_t i = 0; i < c->spans.n && !e; i++) {
        double score;
        if (c->spans.v[i].kind != IBIDI_SPAN_NAME) continue;
        if ((e = score_place(f, &c->places[i], &k, one, &score)) || isinf(score)) continue;
        int32_t *best = f->best + c->spans.v[i].entity * q->n;
        for (size_t t = 0; t < q->n; t++)
            if (one[t] > best[t]) best[t] = one[t];
    }
    ibid_free(one);
    return e;
}

static ibid_err count_scored(ibidi_finder *f) {
    chunk_keys k = {.chunk = SIZE_MAX};
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < f->n_chunks && !e; i++) {
        e = keys_of(f, i, &k);
        f->scored += k.n > 0;
    }
    return e;
}

/* The question's tokens count alike: what is rare in the collection says little here. */
static double keys_of_entity(const ibidi_finder *f, size_t i) {
    size_t n = f->question.asking.n;
    int64_t sum = 0;
    for (size_t t = 0; t < n; t++) {
        int32_t b = f->best[i * n + t];
        sum += b == INT32_MIN ? 0 : b;
    }
    return (double)sum / (double)n / (127.0 * 127.0);
}

/* ---- What the model says of entities ---- */
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
static ibid_err ask_model(ibidi_finder *f, ibid_str prompt, const size_t *entities, size_t n,
                          double *out) {
    ibid_str texts[ASKED_MAX];
    ibid_buf names;
    size_t at[ASKED_MAX + 1] = {0};
    ibid_buf_init(&names, (size_t)1 << 24);
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < n && !e; i++) {
        ibid_str s = ibidi_find_name(f, entities[i]);
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
static ibid_err ask_gains(ibidi_finder *f, const ranked *top, size_t n, ibidi_evidence *v) {
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

static ibid_err gather_evidence(ibidi_finder *f, ibidi_evidence *v) {
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
static ibid_err rank(ibidi_finder *f, const ibidi_asked *asked, ibidi_evidence *v, ranked *order) {
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
static size_t chosen(ibidi_finder *f, const ranked *order, const ibidi_evidence *v, size_t n) {
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
static ibid_err add_same_names(ibidi_finder *f, bool *taken) {
    const ibidi_spans *s = &f->found->spans;
    for (size_t i = 0; i < s->n; i++)
        if (s->v[i].kind == IBIDI_SPAN_NAME &&
            ibidi_find_holds_exact(f, s->v[i].start, s->v[i].end)) {
            /* The whole name must be found, not a part of it. */
            size_t at = ibidi_find_exact_after(f, s->v[i].end - 1);
            if (at < f->n_exact && f->spans[at].start <= s->v[i].start)
                taken[s->v[i].entity] = true;
        }
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < s->n && !e; i++)
        if (s->v[i].kind == IBIDI_SPAN_NAME && taken[s->v[i].entity] &&
            !ibidi_find_holds_exact(f, s->v[i].start, s->v[i].end))
            e = ibidi_find_add(f, (ibidi_match_span){s->v[i].start, s->v[i].end, SAME_NAME_SCORE,
                                                     IBIDI_MATCH_FORM, s->v[i].entity});
    return e;
}

static ibid_err add_entities(ibidi_finder *f, const ranked *order, size_t n) {
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
        if (listed && score > 0 && !ibidi_find_holds_exact(f, s->v[i].start, s->v[i].end))
            e = ibidi_find_add(f, (ibidi_match_span){s->v[i].start, s->v[i].end, score,
                                                     IBIDI_MATCH_NAME, s->v[i].entity});
    }
    ibid_free(taken);
    return e;
}

/* ---- Dates, numbers, quotes, addresses ---- */
/* All of the kinds the question asks for; the better its words fit those around one, the higher. */
static ibid_err add_kinds(ibidi_finder *f) {
    static const ibidi_match_kind kinds[] = {[IBIDI_SPAN_DATE] = IBIDI_MATCH_DATE,
                                             [IBIDI_SPAN_NUMBER] = IBIDI_MATCH_NUMBER,
                                             [IBIDI_SPAN_QUOTE] = IBIDI_MATCH_QUOTE,
                                             [IBIDI_SPAN_ADDRESS] = IBIDI_MATCH_ADDRESS};
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
        double score;
        e = score_place(f, p, &k, best, &score);
        score = 0.5 + 0.3 * fmax(0, fmin(1, score));
        if (!e && score >= f->threshold && !ibidi_find_holds_exact(f, m->start, m->end))
            e = ibidi_find_add(
                f, (ibidi_match_span){m->start, m->end, score, kinds[m->kind], UINT32_MAX});
    }
    ibid_free(best);
    return e;
}

/* ---- Sentences ---- */
static ibid_err add_sentences(ibidi_finder *f) {
    const ibidi_candidates *c = f->found;
    const ibidi_asking *q = &f->question.asking;
    chunk_keys k = {.chunk = SIZE_MAX};
    int32_t *best = ibid_calloc(q->n, sizeof *best);
    ibid_err e = best ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for a question");
    for (size_t i = 0; i < c->n_sentences && !e; i++) {
        const ibidi_sentence_at *s = &c->sentences[i];
        double score;
        if ((e = score_place(f, &s->at, &k, best, &score)) || isinf(score)) continue;
        /* On the scale of entities: the calibration's threshold meets theirs. */
        score = fmax(0, fmin(0.8, score / f->find_keys * f->threshold));
        if (score >= f->threshold && !ibidi_find_holds_exact(f, s->start, s->end))
            e = ibidi_find_add(
                f, (ibidi_match_span){s->start, s->end, score, IBIDI_MATCH_SENTENCE, UINT32_MAX});
    }
    ibid_free(best);
    return e;
}

/* ---- The whole of semantic matches ---- */
static ibid_err explain(ibidi_finder *f, const ranked *order, ibidi_matches *out) {
    size_t n = f->found->spans.n_entities;
    ibid_find_candidate *list = ibid_arena_alloc(out->arena, n * sizeof *list);
    if (!list) return ibid_fail(IBID_NOMEM, "out of memory for %zu candidates", n);
    for (size_t k = 0; k < n; k++) {
        size_t i = order[k].entity;
        ibid_str name = ibidi_find_name(f, i);
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

static ibid_err find_entities(ibidi_finder *f, ibidi_matches *out) {
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
    const ibidi_match_span *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    if (x->start != y->start) return x->start < y->start ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

/* Drops all but the best sentences. */
static void few_sentences(ibidi_finder *f, size_t before) {
    size_t kept = before, sentences = 0;
    for (size_t i = before; i < f->n; i++)
        if (f->spans[i].kind != IBIDI_MATCH_SENTENCE || sentences++ < SENTENCES_MAX)
            f->spans[kept++] = f->spans[i];
    f->n = kept;
}

ibid_err ibidi_find_semantic(ibidi_finder *f, ibidi_matches *out) {
    size_t before = f->n;
    ibidi_searched d = {f->r,      f->snap,    &f->doc, &f->c->model, ibidi_find_text(f),
                        f->chunks, f->n_chunks};
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
