#include "attention/plan/extract.h"
#include "attention/plan/chars.h"
#include "attention/plan/extract_words.h"

#include "rpc/base/mem.h"

#include <math.h>
#include <string.h>

enum { ASKED_MAX = 64, QUESTION_BYTES = 4096 };

typedef struct asked { /* a word of the question */
    uint64_t stem;
    double weight;
    size_t in; /* sentences */
} asked;

typedef struct page {
    const ibid_str *texts;
    ibidi_text_words t;
    asked q[ASKED_MAX];
    size_t n_asked;
    double total, most; /* of the weights; the best sentence's evidence */
    ibid_wants wants;
    unsigned measures; /* what quantities the question asks for */
    ibidi_cuts cuts;
} page;

/* ---- The question ---- */

static bool has(const char *text, const char *phrase) {
    return strstr(text, phrase) != NULL;
}

static bool has_one(const char *text, const char *const *phrases, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (has(text, phrases[i])) return true;
    return false;
}

/* Lower case, every run of other characters one space, one at both ends. */
static void plain_words(ibid_str s, char *out, size_t room) {
    size_t k = 0, len;
    out[k++] = ' ';
    for (size_t at = 0; at < s.n && k + 6 < room; at += len) {
        int32_t c = ibidi_char_at(s.s + at, s.n - at, &len);
        if (ibidi_is_word_char(c))
            k += ibidi_lower(s.s + at, len, out + k, room - k - 2);
        else if (out[k - 1] != ' ')
            out[k++] = ' ';
    }
    if (out[k - 1] != ' ') out[k++] = ' ';
    out[k] = '\0';
}

#define HAS_ONE(text, list) has_one(text, list, sizeof(list) / sizeof *(list))

static bool asks_what(const char *q, const char *kinds) {
    static const char *const asks[] = {" what ", " which ", " what was the ", " what is the "};
    for (size_t i = 0; i < sizeof asks / sizeof *asks; i++) {
        size_t n = strlen(asks[i]);
        for (const char *at = q; (at = strstr(at, asks[i])) != NULL; at++) {
            const char *w = at + n, *end = strchr(w, ' ');
            if (end && ibidi_listed(kinds, w, (size_t)(end - w))) return true;
        }
    }
    return false;
}

ibid_wants ibid_question_wants(ibid_str question) {
    static const char *const many[] = {" how many ", " how much ",  " how long ",  " how old ",
                                       " how far ",  " how large ", " how big ",   " how tall ",
                                       " how high ", " how fast ",  " how often ", " how wide ",
                                       " how deep ", " how heavy ", " how thick ", " how strong "};
    char q[QUESTION_BYTES];
    plain_words(question, q, sizeof q);
    if (HAS_ONE(q, many)) return IBID_WANTS_NUMBER;
    if (has(q, " when ") || asks_what(q, " year century month day date decade "))
        return IBID_WANTS_TIME;
    if (has(q, " who ") || has(q, " whom ") || has(q, " whose ")) return IBID_WANTS_PERSON;
    if (has(q, " where ") || asks_what(q, " country city state region area location place "
                                          "continent county town river street "))
        return IBID_WANTS_PLACE;
    if (has(q, " why ") || has(q, " how ")) return IBID_WANTS_MANNER;
    if (asks_what(q, " percent percentage number amount ")) return IBID_WANTS_NUMBER;
    if (asks_what(q, " person people group company organization team player actor scientist "
                     "philosopher name "))
        return IBID_WANTS_PERSON;
    return IBID_WANTS_THING;
}

static bool begins_with_one(const char *text, const char *const *phrases, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (strncmp(text, phrases[i], strlen(phrases[i])) == 0) return true;
    return false;
}

bool ibid_question_wants_fact(ibid_str question) {
    static const char *const facts[] = {
        " what ",      " which ",    " who ",       " whom ",      " whose ",      " when ",
        " where ",     " how many ", " how much ",  " how long ",  " how old ",    " how far ",
        " how large ", " how big ",  " how tall ",  " how high ",  " how fast ",   " how often ",
        " how wide ",  " how deep ", " how heavy ", " how thick ", " how strong ", " how did ",
        " how was ",   " how were ", " how is ",    " how are ",   " name "};
    static const char *const talk[] = {
        " why ", " how do ", " how does ", " how can ", " how should ", " summary of ", " summary ",
        " tell me about ", " tell me more ", " overview ", " in detail ", " step by step ",
        " the difference between ", " pros and cons ", " explain how ", " explain why ",
        /* two questions: one span is half an answer */
        " and how ", " and when ", " and what ", " and who ", " and where ", " and why ",
        " and which "};
    static const char *const orders[] = {" explain ",   " describe ", " summarise ", " summarize ",
                                         " compare ",   " discuss ",  " outline ",   " argue ",
                                         " elaborate ", " write ",    " translate "};
    static const char *const polite[] = {" please ", " can you ", " could you "};
    char q[QUESTION_BYTES];
    const char *at = q;
    plain_words(question, q, sizeof q);
    for (size_t i = 0; i < sizeof polite / sizeof *polite; i++)
        if (strncmp(at, polite[i], strlen(polite[i])) == 0) at += strlen(polite[i]) - 1;
    if (begins_with_one(at, orders, sizeof orders / sizeof *orders)) return false;
    return !HAS_ONE(q, talk) && HAS_ONE(q, facts);
}

static unsigned asked_measures(const char *q) {
    static const struct {
        unsigned of;
        const char *words[12];
    } asks[] = {
        {OF_LENGTH,
         {" how tall ", " how high ", " how wide ", " how deep ", " how far ", " how long ",
          " height ", " length ", " distance ", " width ", " depth "}},
        {OF_TIME, {" how long ", " how old ", " duration ", " age "}},
        {OF_MONEY,
         {" cost ", " costs ", " price ", " paid ", " pay ", " worth ", " spend ", " spent ",
          " money ", " revenue ", " salary ", " income "}},
        {OF_SHARE, {" percent ", " percentage ", " proportion ", " share ", " fraction "}},
        {OF_WEIGHT, {" how heavy ", " weight ", " weigh ", " mass "}},
    };
    unsigned m = 0;
    for (size_t i = 0; i < sizeof asks / sizeof *asks; i++)
        for (size_t k = 0; k < 12 && asks[i].words[k]; k++)
            if (has(q, asks[i].words[k])) m |= asks[i].of;
    return m;
}

static void read_question(page *p, ibid_str question) {
    char q[QUESTION_BYTES];
    plain_words(question, q, sizeof q);
    p->wants = ibid_question_wants(question);
    p->measures = asked_measures(q);
    p->cuts = (ibidi_cuts){.parts = asks_what(q, " year years month day decade century "),
                           .manner = p->wants == IBID_WANTS_MANNER,
                           .whose = has(q, " whose ")};
    for (size_t at = 0; at < question.n;) {
        if (ibidi_is_space(question.s[at])) {
            at++;
            continue;
        }
        ibidi_word w = ibidi_word_at(question.s, at, question.n);
        at = w.end;
        for (size_t i = 0; i < w.n_parts && p->n_asked < ASKED_MAX && !(w.is & STOP); i++) {
            bool seen = false;
            for (size_t k = 0; k < p->n_asked; k++) seen = seen || p->q[k].stem == w.part[i];
            if (!seen) p->q[p->n_asked++] = (asked){.stem = w.part[i]};
        }
    }
}

static bool is_part(const ibidi_word *w, uint64_t stem) {
    for (size_t i = 0; i < w->n_parts; i++)
        if (w->part[i] == stem) return true;
    return false;
}

static bool sentence_has(const page *p, const ibidi_text_sentence *s, uint64_t stem) {
    for (size_t i = 0; i < s->n_words; i++)
        if (is_part(&p->t.w[s->word0 + i], stem)) return true;
    return false;
}

/* The question's words weigh by how few sentences have them. */
static void weigh(page *p) {
    for (size_t k = 0; k < p->n_asked; k++) {
        asked *q = &p->q[k];
        for (size_t i = 0; i < p->t.n; i++) q->in += sentence_has(p, &p->t.s[i], q->stem);
        q->weight = log(1 + (double)p->t.n / (double)(q->in ? q->in : 1));
        p->total += q->weight;
    }
    for (size_t i = 0; i < p->t.n; i++) {
        ibidi_text_sentence *s = &p->t.s[i];
        for (size_t k = 0; k < p->n_asked; k++)
            if (sentence_has(p, s, p->q[k].stem)) s->evidence += p->q[k].weight;
        s->evidence = p->total > 0 ? s->evidence / p->total : 0;
        p->most = s->evidence > p->most ? s->evidence : p->most;
    }
    for (size_t i = 0; i < p->t.n_words; i++)
        for (size_t k = 0; k < p->n_asked; k++)
            if (is_part(&p->t.w[i], p->q[k].stem) && p->q[k].weight > p->t.w[i].hit)
                p->t.w[i].hit = p->q[k].weight;
}

/* ---- Features ---- */

static double nearness(const page *p, const ibidi_text_sentence *s, size_t i, size_t j) {
    const ibidi_word *w = p->t.w + s->word0;
    double sum = 0;
    for (size_t k = 0; k < s->n_words; k++) {
        if (!(w[k].hit > 0) || (k >= i && k <= j)) continue;
        size_t away = k < i ? i - k : k - j;
        sum += w[k].hit / (1 + 0.3 * (double)away);
    }
    return p->total > 0 ? sum / p->total : 0;
}

static bool hit_between(const ibidi_word *w, size_t from, size_t to) {
    for (size_t k = from; k < to; k++)
        if (w[k].hit > 0) return true;
    return false;
}

typedef struct inside { /* of a span's words */
    unsigned any, all;  /* of the content words' kinds */
    unsigned any_word;  /* of all words' */
    unsigned measures;
    size_t content, hits, first, last;
} inside;

static inside look_inside(const ibidi_word *w, size_t i, size_t j) {
    inside in = {.all = ~0U};
    for (size_t k = i; k <= j; k++) {
        in.any_word |= w[k].is;
        in.measures |= w[k].measures;
        if (!(w[k].is & IS_WORD)) in.any_word |= JOINS; /* a comma */
        if (!(w[k].is & IS_WORD) || w[k].is & STOP) continue;
        if (in.content++ == 0) in.first = k;
        in.last = k;
        in.any |= w[k].is;
        in.all &= w[k].is;
        in.hits += w[k].hit > 0;
    }
    return in;
}

static void edges(const ibidi_word *w, size_t n, size_t i, size_t j, const inside *in, float *f) {
    unsigned before = i ? w[i - 1].is : 0, after = j + 1 < n ? w[j + 1].is : 0;
    bool name = in->all & CAPITAL && in->any & CAPITAL;
    f[13] = (w[i].is & STOP) && !(w[i].is & ARTICLE);
    f[14] = (w[i].is & ARTICLE) != 0;
    f[15] = (before & PREP) != 0;
    f[16] = (before & ARTICLE) != 0;
    f[17] = !(before & IS_WORD);
    f[18] = (before & STOP) && !(before & (PREP | ARTICLE));
    f[19] = !(after & IS_WORD);
    f[20] = (after & PREP) != 0;
    f[21] = (after & JOINS) != 0;
    f[22] = (after & STOP) && !(after & (PREP | JOINS));
    f[23] = (before & CAPITAL) && !(before & STOP) && w[in->first].is & CAPITAL;
    f[24] = (after & CAPITAL) && w[in->last].is & CAPITAL;
    f[29] = (after & DIGIT) && in->any & DIGIT;
    f[30] = (before & DIGIT) && in->any & DIGIT;
    f[31] = hit_between(w, i > 3 ? i - 3 : 0, i);
    f[32] = hit_between(w, j + 1, j + 4 < n ? j + 4 : n);
    f[33] = (w[j].is & LY) != 0;
    f[34] = (w[i].is & PARTICIPLE) != 0;
    f[35] = name && i > 0 && !(before & CAPITAL) && !(after & CAPITAL);
}

static void of_kind(const char *text, const ibidi_word *w, size_t i, size_t j, const inside *in,
                    float *f) {
    char low[16];
    size_t n = 0;
    if (i && w[i - 1].end - w[i - 1].start < 8)
        n = ibidi_lower(text + w[i - 1].start, w[i - 1].end - w[i - 1].start, low, sizeof low);
    f[0] = (in->all & CAPITAL) != 0;
    f[1] = (in->any & CAPITAL) != 0;
    f[2] = (in->any & DIGIT) != 0;
    f[3] = (in->any & YEAR) != 0;
    f[4] = (in->any & CALENDAR) != 0;
    f[5] = (in->any & NUMERAL) != 0;
    f[6] = (in->any & UNIT) != 0;
    f[7] = (float)(j - i + 1);
    f[8] = i == j;
    f[9] = ibidi_listed(" in at from on to ", low, n);
    f[10] = ibidi_listed(" by ", low, n);
    f[11] = (in->any_word & PREP) != 0;
}

static void features(const page *p, const ibidi_text_sentence *s, size_t i, size_t j,
                     const inside *in, float *f) {
    const ibidi_word *w = p->t.w + s->word0;
    size_t words = j - i + 1;
    memset(f, 0, IBID_EXTRACT_FEATURES * sizeof *f);
    f[0] = (float)s->evidence;
    f[1] = s->evidence >= p->most;
    f[2] = (float)(s->evidence - p->most);
    f[3] = (float)nearness(p, s, i, j);
    f[4] = (float)in->hits / (float)in->content;
    f[5] = in->hits == in->content;
    f[6] = w[in->first].hit > 0;
    f[7] = w[in->last].hit > 0;
    f[8] = words == 1;
    f[9] = words == 2;
    f[10] = words == 3;
    f[11] = (float)words;
    f[12] = (float)in->content;
    edges(w, s->n_words, i, j, in, f);
    f[25] = (in->any_word & JOINS) != 0;
    f[26] = (in->any_word & PREP) != 0;
    f[27] = (in->any_word & VERB) != 0;
    f[28] = s->start == 0;
    f[37] = (in->measures & p->measures) != 0;
    f[38] = p->measures && in->measures && !(in->measures & p->measures);
    f[36] = (float)s->text; /* how far down the list of texts */
    of_kind(p->texts[s->text].s, w, i, j, in,
            f + IBID_EXTRACT_COMMON + (size_t)p->wants * IBID_EXTRACT_OF_KIND);
}

/* ---- Spans ---- */

typedef ibid_err (*visitor)(void *arg, const ibid_span *s, const float *features);

static ibid_err spans_from(const page *p, const ibidi_text_sentence *s, size_t i, visitor visit,
                           void *arg) {
    const ibidi_word *w = p->t.w + s->word0;
    float f[IBID_EXTRACT_FEATURES];
    ibid_err e = IBID_OK;
    for (size_t j = i; !e && j < s->n_words && j < i + IBID_EXTRACT_WORDS_MAX; j++) {
        if (w[j].is & BREAKS) break;
        if (!ibidi_cut_well(w, s->n_words, i, j, &p->cuts)) continue;
        inside in = look_inside(w, i, j);
        ibid_span span = {.block = s->text,
                          .start = w[i].start,
                          .end =
                              p->cuts.whose ? w[j].end : ibidi_cut_end(p->texts[s->text].s, &w[j]),
                          .sentence_start = s->start,
                          .sentence_end = s->end,
                          .evidence = s->evidence};
        features(p, s, i, j, &in, f);
        for (size_t k = 0; k < IBID_EXTRACT_FEATURES; k++)
            span.score += (double)(ibidi_extract_weights[k] * f[k]);
        e = visit(arg, &span, f);
    }
    return e;
}

ibid_err ibidi_extract_each(ibid_str question, const ibid_str *texts, size_t n, visitor visit,
                            void *arg) {
    page p = {.texts = texts};
    ibid_err e = IBID_OK;
    read_question(&p, question);
    for (size_t i = 0; !e && i < n; i++) e = ibidi_text_words_read(&p.t, i, texts[i]);
    if (!e) weigh(&p);
    for (size_t i = 0; !e && i < p.t.n; i++)
        for (size_t k = 0; !e && k < p.t.s[i].n_words; k++)
            e = spans_from(&p, &p.t.s[i], k, visit, arg);
    ibidi_text_words_fini(&p.t);
    return e;
}

typedef struct best {
    ibid_span *out;
    size_t max, n;
} best;

static ibid_err keep(void *arg, const ibid_span *s, const float *f) {
    best *b = arg;
    (void)f;
    size_t at = b->n;
    while (at > 0 && b->out[at - 1].score < s->score) at--;
    if (at >= b->max) return IBID_OK;
    size_t last = b->n < b->max ? b->n++ : b->max - 1;
    memmove(b->out + at + 1, b->out + at, (last - at) * sizeof *b->out);
    b->out[at] = *s;
    return IBID_OK;
}

ibid_err ibid_extract_spans(ibid_str question, const ibid_str *texts, size_t n, size_t max,
                            ibid_span *out, size_t *n_out) {
    best b = {.out = out, .max = max};
    ibid_err e = ibidi_extract_each(question, texts, n, keep, &b);
    *n_out = b.n;
    return e;
}
