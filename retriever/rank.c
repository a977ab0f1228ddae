#include "retriever/rank.h"

#include "retriever/lexicon.h"
#include "retriever/spans_words.h"

#include <math.h>
#include <string.h>

uint64_t ibidi_stem_hash(const char *s, size_t n) {
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)s[i]) * 0x100000001B3u;
    return h;
}

/* ---- The question ---- */
typedef struct stems {
    ibidi_asked *q;
    size_t head_end;
} stems;

static int take_stem(void *arg, const ibidi_word *w) {
    stems *s = arg;
    if (w->stop || w->extra) return 0;
    bool head = w->start < s->head_end;
    size_t *n = head ? &s->q->n_head : &s->q->n_rest;
    uint64_t *list = head ? s->q->head : s->q->rest;
    if (*n < IBIDI_STEMS_MAX) list[(*n)++] = ibidi_stem_hash(w->s, w->n);
    return 0;
}

static void ask_kinds(uint32_t lists, size_t i, ibidi_asked *q) {
    if (lists & IBIDI_LEX_ASK_DATE) q->kinds |= 1u << IBIDI_SPAN_DATE;
    if (lists & IBIDI_LEX_ASK_NUMBER) q->kinds |= 1u << IBIDI_SPAN_NUMBER;
    if (lists & IBIDI_LEX_ASK_QUOTE) q->kinds |= 1u << IBIDI_SPAN_QUOTE;
    if (lists & IBIDI_LEX_ASK_ADDRESS) q->kinds |= 1u << IBIDI_SPAN_ADDRESS;
    if (i == 0 && lists & IBIDI_LEX_ASK_SENTENCE) q->sentence = true;
}

/* What is asked for stands before the first "in", "that", "of" ... behind a word that names a kind
 * of thing: "High schools | in Texas". */
static size_t head_of(const ibidi_text_words *t, size_t bytes, ibidi_asked *q) {
    bool kind = false;
    for (size_t i = 0; i < t->n; i++) {
        uint32_t l = t->v[i].lists;
        if (kind && l & IBIDI_LEX_LINK) return t->v[i].start;
        q->person |= (l & IBIDI_LEX_ASK_PERSON) != 0;
        q->place |= (l & IBIDI_LEX_ASK_PLACE) != 0;
        q->organization |= (l & IBIDI_LEX_ASK_ORG) != 0;
        q->work |= (l & IBIDI_LEX_ASK_WORK) != 0;
        if (i < 3) ask_kinds(l, i, q);
        kind = q->person || q->place || q->organization || q->work || q->kinds;
    }
    return bytes;
}

ibid_err ibidi_asked_of(ibidi_words *w, ibid_str question, ibidi_asked *out) {
    ibidi_text_words t;
    *out = (ibidi_asked){.n_head = 0};
    ibid_err e = ibidi_text_words_split(question, &t);
    if (!e) {
        stems s = {out, head_of(&t, question.n, out)};
        /* "what companies ..." is a list all the same */
        if (out->person || out->place || out->organization || out->work) out->sentence = false;
        (void)ibidi_words_each(w, question.s, question.n, false, take_stem, &s);
    }
    ibidi_text_words_fini(&t);
    return e;
}

/* ---- Features ---- */
static bool shares(const ibidi_evidence *v, const uint64_t *list, size_t n) {
    for (size_t i = 0; i < v->n_stems; i++)
        for (size_t j = 0; j < n; j++)
            if (v->stems[i] == list[j]) return true;
    return false;
}

typedef struct spread {
    double mean, sd;
} spread;

/* Of one field of the evidence, where it is a number. */
static spread spread_of(const ibidi_evidence *v, size_t n, bool gain) {
    double sum = 0, squares = 0;
    size_t known = 0;
    for (size_t i = 0; i < n; i++) {
        double x = gain ? v[i].gain : v[i].keys;
        if (isnan(x)) continue;
        sum += x;
        known++;
    }
    spread s = {known ? sum / (double)known : 0, 0};
    for (size_t i = 0; i < n; i++) {
        double x = gain ? v[i].gain : v[i].keys;
        if (!isnan(x)) squares += (x - s.mean) * (x - s.mean);
    }
    if (known > 1) s.sd = sqrt(squares / (double)known);
    return s;
}

static double standard(double x, spread s) {
    return isnan(x) || s.sd <= 1e-9 ? 0 : (x - s.mean) / s.sd;
}

static void fill(const ibidi_asked *q, const ibidi_entity *e, const ibidi_evidence *v, double *f) {
    double person = e->person || e->given, place = (double)e->place / (double)e->mentions;
    f[IBIDI_F_MENTIONS] = log((double)e->mentions);
    f[IBIDI_F_TOKENS] = v->tokens;
    f[IBIDI_F_WORDS] = e->words < 5 ? e->words : 5;
    f[IBIDI_F_PERSON] = e->person > 0;
    f[IBIDI_F_PLACE] = place;
    f[IBIDI_F_ARTICLE] = e->article > 0;
    f[IBIDI_F_ACRONYM] = e->acronyms > 0;
    f[IBIDI_F_HEAD_ORGANIZATION] = e->head == IBIDI_HEAD_ORGANIZATION;
    f[IBIDI_F_HEAD_PLACE] = e->head == IBIDI_HEAD_PLACE;
    f[IBIDI_F_HEAD_EVENT] = e->head == IBIDI_HEAD_EVENT;
    f[IBIDI_F_PERSON_PERSON] = q->person * person;
    f[IBIDI_F_PERSON_PLACE] = q->person * place;
    f[IBIDI_F_PLACE_PERSON] = q->place * person;
    f[IBIDI_F_PLACE_PLACE] = q->place * place;
    f[IBIDI_F_ORGANIZATION_PERSON] = q->organization * person;
    f[IBIDI_F_ORGANIZATION_PLACE] = q->organization * place;
    f[IBIDI_F_ORGANIZATION_ORGANIZATION] =
        q->organization && e->head == IBIDI_HEAD_ORGANIZATION ? 1 : 0;
    f[IBIDI_F_WORK_PERSON] = q->work * person;
    f[IBIDI_F_NAME_HEAD] = shares(v, q->head, q->n_head);
    f[IBIDI_F_NAME_REST] = shares(v, q->rest, q->n_rest);
}

void ibidi_rank_features(const ibidi_asked *q, const ibidi_entity *e, const ibidi_evidence *v,
                         size_t n, double *out) {
    spread keys = spread_of(v, n, false), gain = spread_of(v, n, true);
    for (size_t i = 0; i < n; i++) {
        double *f = out + i * IBIDI_FEATURES;
        fill(q, &e[i], &v[i], f);
        f[IBIDI_F_KEYS] = standard(v[i].keys, keys);
        f[IBIDI_F_GAIN] = isnan(v[i].gain) ? 0 : v[i].gain;
        f[IBIDI_F_GAIN_STANDARD] = standard(v[i].gain, gain);
    }
}

/* ---- The models ---- */
typedef struct linear {
    double bias, w[IBIDI_FEATURES];
    ibidi_rank_limits limits;
} linear;

static const linear MODELS[2] = {
#include "retriever/rank_weights.inc"
};

double ibidi_rank_score(const double f[IBIDI_FEATURES], bool with_gain) {
    const linear *m = &MODELS[with_gain];
    double s = m->bias;
    for (size_t i = 0; i < IBIDI_FEATURES; i++) s += m->w[i] * f[i];
    return s;
}

ibidi_rank_limits ibidi_rank_defaults(bool with_gain) {
    return MODELS[with_gain].limits;
}
