#include "attention/plan/extract.h"
#include "attention/plan/chars.h"

#include "rpc/base/mem.h"

#include <math.h>
#include <string.h>
#include <utf8proc.h>

enum { PARTS_MAX = 4, ASKED_MAX = 64, QUESTION_BYTES = 4096 };

enum { /* what a word is */
       IS_WORD = 1,
       STOP = 2,
       ARTICLE = 4,
       PREP = 8,
       JOINS = 16, /* and, or */
       VERB = 32,  /* is, has, which, ... : a span that runs over one is rather a clause */
       CAPITAL = 64,
       DIGIT = 128,
       YEAR = 256,
       CALENDAR = 512,
       NUMERAL = 1024,
       UNIT = 2048,
       LY = 4096,
       PARTICIPLE = 8192,
       BREAKS = 16384, /* punctuation that no span runs over */
};

typedef struct word {
    size_t start, end;
    unsigned is;
    uint64_t part[PARTS_MAX]; /* stems: "well-known" has two */
    size_t n_parts;
    double hit; /* weight of the question's word it is, or 0 */
} word;

typedef struct sentence {
    size_t text, word0, n_words, start, end;
    double evidence;
} sentence;

typedef struct asked { /* a word of the question */
    uint64_t stem;
    double weight;
    size_t in; /* sentences */
} asked;

typedef struct page {
    const ibid_str *texts;
    word *w;
    size_t n_words, word_room;
    sentence *s;
    size_t n, room;
    asked q[ASKED_MAX];
    size_t n_asked;
    double total, most; /* of the weights; the best sentence's evidence */
    ibid_wants wants;
} page;

/* ---- Lists of words; lower case, a space on both sides of each ---- */

static const char stop_words[] =
    " a an the of in on at to for from by with and or but as is are was were be been being it its "
    "this that these those which who whom whose what when where why how do does did has have had "
    "not no than then their his her they he she we you i there also into over under about after "
    "before between during such can could may might would will should shall must if so because "
    "while up out only other some any each both more most very just our your my them him us one "
    "all many much same s t ";
static const char prepositions[] =
    " of in on at to for from by with as into over under about after before between during than ";
static const char verbs[] = " is was are were has had have be been which that who ";
static const char calendar[] =
    " january february march april may june july august september october november december "
    "monday tuesday wednesday thursday friday saturday sunday century ";
static const char numerals[] =
    " one two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty "
    "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen half "
    "third quarter first second ";
static const char units[] =
    " percent years year months days miles km kilometers metres meters feet people million billion "
    "% hours degrees students species ";

static bool listed(const char *list, const char *w, size_t n) {
    char key[40];
    if (n == 0 || n > sizeof key - 3) return false;
    key[0] = ' ';
    memcpy(key + 1, w, n);
    key[n + 1] = ' ';
    key[n + 2] = '\0';
    return strstr(list, key) != NULL;
}

/* ---- Characters ---- */

static bool is_money(int32_t c) {
    return c == '$' || c == '%' || c == 0xA3 || c == 0x20AC;
}

static bool is_upper(int32_t c) {
    return c >= 0 && utf8proc_category(c) == UTF8PROC_CATEGORY_LU;
}

static bool is_space(char c) {
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

/* Between letters these join a word: 3.5, it's, well-known, 2010/11. */
static bool joins(int32_t c) {
    return c == '.' || c == ',' || c == '\'' || c == '-' || c == '/' || c == 0x2019 || c == 0x2013;
}

static size_t lower(const char *s, size_t n, char *out, size_t room) {
    size_t at = 0, k = 0, len;
    while (at < n && k + 4 <= room) {
        int32_t c = ibidi_char_at(s + at, n - at, &len);
        at += len;
        if (c < 0) continue;
        utf8proc_ssize_t put =
            utf8proc_encode_char(utf8proc_tolower(c), (utf8proc_uint8_t *)(out + k));
        k += put > 0 ? (size_t)put : 0;
    }
    return k;
}

static bool ends_with(const char *w, size_t n, const char *suffix) {
    size_t k = strlen(suffix);
    return n >= k && memcmp(w + n - k, suffix, k) == 0;
}

/* A rough stem: enough to see that "invaded" and "invasion" may differ and "invades" does not. */
static uint64_t stem_of(const char *w, size_t n) {
    static const char *const suffixes[] = {"ations", "ation", "ings", "ing", "ies",
                                           "ed",     "es",    "s",    "ly",  "e"};
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        if (!ends_with(w, n, suffixes[i]) || n - strlen(suffixes[i]) < 3) continue;
        n -= strlen(suffixes[i]);
        break;
    }
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)w[i]) * UINT64_C(0x100000001b3);
    return h;
}

/* ---- Words ---- */

static bool is_year(const char *s, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (s[i] < '0' || s[i] > '9') return false;
    return n == 4 && (s[0] == '1' || (s[0] == '2' && s[1] == '0'));
}

static void classify(word *w, const char *text) {
    char low[256];
    const char *s = text + w->start;
    size_t bytes = w->end - w->start, n, len;
    int32_t c = ibidi_char_at(s, bytes, &len);
    if (!ibidi_is_word_char(c) && !is_money(c)) {
        w->is = strchr(";:()\".?!", c < 128 && c > 0 ? c : ' ') || c == 0x201C || c == 0x201D
                    ? BREAKS
                    : 0;
        return;
    }
    n = lower(s, bytes, low, sizeof low);
    w->is = IS_WORD;
    if (listed(stop_words, low, n)) w->is |= STOP;
    if (listed(" a an the ", low, n)) w->is |= ARTICLE;
    if (listed(prepositions, low, n)) w->is |= PREP;
    if (listed(" and or ", low, n)) w->is |= JOINS;
    if (listed(verbs, low, n)) w->is |= VERB;
    if (listed(calendar, low, n)) w->is |= CALENDAR;
    if (listed(numerals, low, n)) w->is |= NUMERAL;
    if (listed(units, low, n)) w->is |= UNIT;
    if (is_upper(c)) w->is |= CAPITAL;
    if ((c >= '0' && c <= '9') || (is_money(c) && c != '%')) w->is |= DIGIT;
    if (is_year(s, bytes)) w->is |= YEAR;
    if (ends_with(low, n, "ly")) w->is |= LY;
    if (ends_with(low, n, "ed") || ends_with(low, n, "ing")) w->is |= PARTICIPLE;
    for (size_t at = 0; at < n && w->n_parts < PARTS_MAX;) {
        size_t from = at;
        while (at < n && ibidi_is_word_char(ibidi_char_at(low + at, n - at, &len))) at += len;
        if (at > from)
            w->part[w->n_parts++] = stem_of(low + from, at - from);
        else
            at += len;
    }
}

/* The word or mark at `at`, which is no white space. */
static word next_word(const char *text, size_t at, size_t end) {
    word w = {.start = at};
    size_t len, next_len;
    int32_t c = ibidi_char_at(text + at, end - at, &len);
    at += len;
    if (ibidi_is_word_char(c) || is_money(c)) {
        while (at < end) {
            c = ibidi_char_at(text + at, end - at, &len);
            bool go = ibidi_is_word_char(c) || is_money(c);
            if (!go && joins(c) && at + len < end) {
                int32_t d = ibidi_char_at(text + at + len, end - at - len, &next_len);
                go = ibidi_is_word_char(d) || d == '%';
            }
            if (!go) break;
            at += len;
        }
    }
    w.end = at;
    classify(&w, text);
    return w;
}

static ibid_err grow(void **p, size_t *room, size_t n, size_t size) {
    size_t want = *room ? 2 * *room : 256, bytes;
    if (n < *room) return IBID_OK;
    void *q = ibid_mul_size(want, size, &bytes) ? ibid_realloc(*p, bytes) : NULL;
    if (!q) return ibid_fail(IBID_NOMEM, "no memory to look for spans");
    *p = q;
    *room = want;
    return IBID_OK;
}

/* ---- Sentences ---- */

static bool is_abbreviation(const char *text, size_t start, size_t dot) {
    static const char known[] = " mr mrs ms dr st no vs jr sr lt col ca cf prof mt ";
    char low[16];
    size_t at = dot;
    while (at > start && !is_space(text[at - 1]) && text[at - 1] != '(') at--;
    if (dot - at == 1 && text[at] >= 'A' && text[at] <= 'Z') return true;
    if (dot - at >= 3 && dot - at <= 7 && text[dot - 2] == '.') return true; /* "U.S" */
    return dot - at < 8 && listed(known, low, lower(text + at, dot - at, low, sizeof low));
}

static size_t sentence_end(const char *t, size_t start, size_t end) {
    size_t len;
    for (size_t at = start; at < end; at++) {
        if (t[at] == '\n') return at + 1;
        if (end - at >= 3 &&
            (memcmp(t + at, "\xE3\x80\x82", 3) == 0 || memcmp(t + at, "\xEF\xBC\x9F", 3) == 0))
            return at + 3;
        if (t[at] != '.' && t[at] != '!' && t[at] != '?') continue;
        size_t after = at + 1;
        while (after < end &&
               (t[after] == '"' || t[after] == '\'' || t[after] == ')' || t[after] == ']'))
            after++;
        if (after == end) return end;
        if (!is_space(t[after]) || (t[at] == '.' && is_abbreviation(t, start, at))) continue;
        while (after < end && is_space(t[after])) after++;
        if (after == end) return end;
        int32_t c = ibidi_char_at(t + after, end - after, &len);
        if (ibidi_is_word_char(c) && !is_upper(c) && !(c >= '0' && c <= '9') && c < 0x250) continue;
        return after;
    }
    return end;
}

static ibid_err add_sentence(page *p, size_t text, size_t start, size_t end) {
    const char *t = p->texts[text].s;
    sentence s = {.text = text, .word0 = p->n_words};
    while (end > start && is_space(t[end - 1])) end--;
    s.start = start;
    s.end = end;
    for (size_t at = start; at < end;) {
        if (is_space(t[at])) {
            at++;
            continue;
        }
        ibid_err e = grow((void **)&p->w, &p->word_room, p->n_words, sizeof *p->w);
        if (e) return e;
        p->w[p->n_words] = next_word(t, at, end);
        at = p->w[p->n_words++].end;
    }
    s.n_words = p->n_words - s.word0;
    ibid_err e = grow((void **)&p->s, &p->room, p->n, sizeof *p->s);
    if (!e && s.n_words) p->s[p->n++] = s;
    return e;
}

static ibid_err read_text(page *p, size_t text) {
    ibid_str t = p->texts[text];
    ibid_err e = IBID_OK;
    for (size_t at = 0; !e && at < t.n;) {
        while (at < t.n && is_space(t.s[at])) at++;
        if (at == t.n) break;
        size_t end = sentence_end(t.s, at, t.n);
        e = add_sentence(p, text, at, end);
        at = end > at ? end : at + 1;
    }
    return e;
}

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
            k += lower(s.s + at, len, out + k, room - k - 2);
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
            if (end && listed(kinds, w, (size_t)(end - w))) return true;
        }
    }
    return false;
}

ibid_wants ibid_question_wants(ibid_str question) {
    static const char *const many[] = {" how many ", " how much ",  " how long ", " how old ",
                                       " how far ",  " how large ", " how big ",  " how tall ",
                                       " how high ", " how fast ",  " how often "};
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
        " what ",      " which ",    " who ",      " whom ",     " whose ",    " when ",
        " where ",     " how many ", " how much ", " how long ", " how old ",  " how far ",
        " how large ", " how big ",  " how tall ", " how high ", " how fast ", " how often ",
        " how did ",   " how was ",  " how were ", " how is ",   " how are ",  " name "};
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

static void read_question(page *p, ibid_str question) {
    p->wants = ibid_question_wants(question);
    for (size_t at = 0; at < question.n;) {
        if (is_space(question.s[at])) {
            at++;
            continue;
        }
        word w = next_word(question.s, at, question.n);
        at = w.end;
        for (size_t i = 0; i < w.n_parts && p->n_asked < ASKED_MAX && !(w.is & STOP); i++) {
            bool seen = false;
            for (size_t k = 0; k < p->n_asked; k++) seen = seen || p->q[k].stem == w.part[i];
            if (!seen) p->q[p->n_asked++] = (asked){.stem = w.part[i]};
        }
    }
}

static bool is_part(const word *w, uint64_t stem) {
    for (size_t i = 0; i < w->n_parts; i++)
        if (w->part[i] == stem) return true;
    return false;
}

static bool sentence_has(const page *p, const sentence *s, uint64_t stem) {
    for (size_t i = 0; i < s->n_words; i++)
        if (is_part(&p->w[s->word0 + i], stem)) return true;
    return false;
}

/* The question's words weigh by how few sentences have them. */
static void weigh(page *p) {
    for (size_t k = 0; k < p->n_asked; k++) {
        asked *q = &p->q[k];
        for (size_t i = 0; i < p->n; i++) q->in += sentence_has(p, &p->s[i], q->stem);
        q->weight = log(1 + (double)p->n / (double)(q->in ? q->in : 1));
        p->total += q->weight;
    }
    for (size_t i = 0; i < p->n; i++) {
        sentence *s = &p->s[i];
        for (size_t k = 0; k < p->n_asked; k++)
            if (sentence_has(p, s, p->q[k].stem)) s->evidence += p->q[k].weight;
        s->evidence = p->total > 0 ? s->evidence / p->total : 0;
        p->most = s->evidence > p->most ? s->evidence : p->most;
    }
    for (size_t i = 0; i < p->n_words; i++)
        for (size_t k = 0; k < p->n_asked; k++)
            if (is_part(&p->w[i], p->q[k].stem) && p->q[k].weight > p->w[i].hit)
                p->w[i].hit = p->q[k].weight;
}

/* ---- Features ---- */

static double nearness(const page *p, const sentence *s, size_t i, size_t j) {
    const word *w = p->w + s->word0;
    double sum = 0;
    for (size_t k = 0; k < s->n_words; k++) {
        if (!(w[k].hit > 0) || (k >= i && k <= j)) continue;
        size_t away = k < i ? i - k : k - j;
        sum += w[k].hit / (1 + 0.3 * (double)away);
    }
    return p->total > 0 ? sum / p->total : 0;
}

static bool hit_between(const word *w, size_t from, size_t to) {
    for (size_t k = from; k < to; k++)
        if (w[k].hit > 0) return true;
    return false;
}

typedef struct inside { /* of a span's words */
    unsigned any, all;  /* of the content words' kinds */
    unsigned any_word;  /* of all words' */
    size_t content, hits, first, last;
} inside;

static inside look_inside(const word *w, size_t i, size_t j) {
    inside in = {.all = ~0U};
    for (size_t k = i; k <= j; k++) {
        in.any_word |= w[k].is;
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

static void edges(const word *w, size_t n, size_t i, size_t j, const inside *in, float *f) {
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

static void of_kind(const char *text, const word *w, size_t i, size_t j, const inside *in,
                    float *f) {
    char low[16];
    size_t n = 0;
    if (i && w[i - 1].end - w[i - 1].start < 8)
        n = lower(text + w[i - 1].start, w[i - 1].end - w[i - 1].start, low, sizeof low);
    f[0] = (in->all & CAPITAL) != 0;
    f[1] = (in->any & CAPITAL) != 0;
    f[2] = (in->any & DIGIT) != 0;
    f[3] = (in->any & YEAR) != 0;
    f[4] = (in->any & CALENDAR) != 0;
    f[5] = (in->any & NUMERAL) != 0;
    f[6] = (in->any & UNIT) != 0;
    f[7] = (float)(j - i + 1);
    f[8] = i == j;
    f[9] = listed(" in at from on to ", low, n);
    f[10] = listed(" by ", low, n);
    f[11] = (in->any_word & PREP) != 0;
}

static void features(const page *p, const sentence *s, size_t i, size_t j, const inside *in,
                     float *f) {
    const word *w = p->w + s->word0;
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
    f[36] = (float)s->text; /* how far down the list of texts */
    of_kind(p->texts[s->text].s, w, i, j, in,
            f + IBID_EXTRACT_COMMON + (size_t)p->wants * IBID_EXTRACT_OF_KIND);
}

/* ---- Spans ---- */

static bool may_end(const word *w) {
    return w->is & IS_WORD && !(w->is & STOP);
}

typedef ibid_err (*visitor)(void *arg, const ibid_span *s, const float *features);

static ibid_err spans_from(const page *p, const sentence *s, size_t i, visitor visit, void *arg) {
    const word *w = p->w + s->word0;
    float f[IBID_EXTRACT_FEATURES];
    ibid_err e = IBID_OK;
    for (size_t j = i; !e && j < s->n_words && j < i + IBID_EXTRACT_WORDS_MAX; j++) {
        if (w[j].is & BREAKS) break;
        if (!may_end(&w[j])) continue;
        inside in = look_inside(w, i, j);
        ibid_span span = {.block = s->text,
                          .start = w[i].start,
                          .end = w[j].end,
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
    for (size_t i = 0; !e && i < n; i++) e = read_text(&p, i);
    if (!e) weigh(&p);
    for (size_t i = 0; !e && i < p.n; i++)
        for (size_t k = 0; !e && k < p.s[i].n_words; k++)
            if (p.w[p.s[i].word0 + k].is & IS_WORD) e = spans_from(&p, &p.s[i], k, visit, arg);
    ibid_free(p.w);
    ibid_free(p.s);
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
