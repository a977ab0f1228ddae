/* Words of a text with their shapes, for the span miner. */
#include "retriever/spans_words.h"

#include "retriever/lexicon.h"

#include <string.h>
#include <utf8proc.h>

enum { FORM_MAX = 64 }; /* bytes of a form that is looked up in the word lists */

typedef struct splitter {
    ibid_str t;
    ibidi_text_words *w;
    size_t line; /* index of the first word of the line */
    uint64_t line_start;
} splitter;

typedef enum class { BREAK, LETTER, DIGIT, MARK } class;

typedef struct letter {
    int32_t c;
    size_t len;
    class k;
    bool upper, lower;
} letter;

static letter next_wide(ibid_str t, size_t i);

static inline letter next_letter(ibid_str t, size_t i) {
    letter l = {(unsigned char)t.s[i], 1, BREAK, false, false};
    if (l.c < 0x80) {
        l.upper = l.c >= 'A' && l.c <= 'Z';
        l.lower = l.c >= 'a' && l.c <= 'z';
        l.k = l.upper || l.lower ? LETTER : l.c >= '0' && l.c <= '9' ? DIGIT : BREAK;
        return l;
    }
    return next_wide(t, i);
}

static letter next_wide(ibid_str t, size_t i) {
    letter l = {0, 1, BREAK, false, false};
    utf8proc_ssize_t n =
        utf8proc_iterate((const utf8proc_uint8_t *)t.s + i, (utf8proc_ssize_t)(t.n - i), &l.c);
    if (n <= 0) {
        l.c = 0xFFFD; /* a byte that is not UTF-8 */
        return l;
    }
    l.len = (size_t)n;
    switch (utf8proc_category(l.c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LT:
        l.upper = true;
        l.k = LETTER;
        break;
    case UTF8PROC_CATEGORY_LL:
        l.lower = true;
        l.k = LETTER;
        break;
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
        l.k = LETTER;
        break;
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
        l.k = MARK;
        break;
    case UTF8PROC_CATEGORY_ND:
        l.k = DIGIT;
        break;
    default:
        break;
    }
    return l;
}

/* ---- One word ---- */
typedef struct reading {
    size_t n_upper, n_lower, n_letters;
    bool first_upper, first_digit, dotted, address, hyphen;
    size_t part; /* letters since the last period inside */
} reading;

static void count(reading *r, const letter *l, bool first) {
    if (first) {
        r->first_upper = l->upper;
        r->first_digit = l->k == DIGIT;
    }
    r->n_upper += l->upper;
    r->n_lower += l->lower;
    r->n_letters += l->k == LETTER;
    r->part += l->k == LETTER;
}

/* Whether the character at i, between word characters, stays inside the word. */
static bool inside(ibid_str t, size_t i, const letter *l, reading *r) {
    size_t at = i + l->len;
    if (at >= t.n) return false;
    letter next = next_letter(t, at);
    if (next.k == BREAK) return false;
    if (l->c == '\'' || l->c == 0x2019) return next.k == LETTER;
    if (l->c == '-' || l->c == 0x2010 || l->c == 0x2011) {
        if (r->first_upper && next.lower) return false;
        return r->hyphen = true;
    }
    if (l->c == '@') return r->address = r->n_letters > 0;
    if (l->c == '&') return r->n_upper == r->n_letters && next.upper;
    if (l->c == ',') return r->first_digit && !r->n_letters && next.k == DIGIT;
    if (l->c == '.' || l->c == '_') {
        if (r->first_digit && !r->n_letters) return next.k == DIGIT;
        if (r->part <= 1 && r->n_lower == 0 && next.upper) { /* U.S */
            r->part = 0;
            return r->dotted = true;
        }
        if (l->c == '.' && r->part >= 1 && (next.lower || next.k == DIGIT)) {
            r->part = 0;
            return r->dotted = true;
        }
        return l->c == '_';
    }
    return false;
}

static uint8_t shape_of(const reading *r) {
    if (r->address) return IBIDI_SHAPE_ADDRESS;
    if (r->first_digit) return IBIDI_SHAPE_NUMBER;
    if (!r->n_upper && !r->n_lower) return IBIDI_SHAPE_OTHER;
    if (r->dotted && r->n_lower) return IBIDI_SHAPE_MIXED;
    if (r->first_upper && !r->n_lower)
        return r->n_upper == 1 ? IBIDI_SHAPE_INITIAL : IBIDI_SHAPE_UPPER;
    if (r->first_upper) return IBIDI_SHAPE_CAPITAL;
    return r->n_upper ? IBIDI_SHAPE_MIXED : IBIDI_SHAPE_LOWER;
}

/* ---- Forms of words ---- */
static uint64_t mix(uint64_t h, uint64_t c) {
    h = (h ^ c) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 29;
}

static uint64_t hash_form(ibid_str t, size_t from, size_t to, char form[FORM_MAX], size_t *n) {
    uint64_t h = 0x51ED270B27B4A7D1u;
    *n = 0;
    for (size_t i = from; i < to;) {
        letter l = next_letter(t, i);
        int32_t c = l.c < 0x80 ? (l.upper ? l.c + 32 : l.c) : utf8proc_tolower(l.c);
        h = mix(h, (uint64_t)c);
        if (c == 0x2019) c = '\'';
        if (*n < FORM_MAX) form[(*n)++] = c < 0x80 ? (char)c : (char)0xFF;
        i += l.len;
    }
    return h;
}

static ibid_err grow_forms(ibidi_text_words *w) {
    if (w->n_ids == w->room_ids) {
        size_t room = w->room_ids ? w->room_ids * 2 : 512;
        ibidi_word_stats *s = ibid_realloc(w->stats, room * sizeof *s);
        if (!s) return ibid_fail(IBID_NOMEM, "out of memory for words of a text");
        w->stats = s;
        w->room_ids = room;
    }
    if (w->n_ids * 2 < w->n_slots) return IBID_OK;
    size_t n = w->n_slots ? w->n_slots * 2 : 1024;
    uint32_t *slots = ibid_calloc(n, sizeof *slots);
    if (!slots) return ibid_fail(IBID_NOMEM, "out of memory for words of a text");
    for (size_t id = 0; id < w->n_ids; id++) {
        size_t i = (size_t)w->stats[id].hash & (n - 1);
        while (slots[i]) i = (i + 1) & (n - 1);
        slots[i] = (uint32_t)id + 1;
    }
    ibid_free(w->slots);
    w->slots = slots;
    w->n_slots = n;
    return IBID_OK;
}

/* Forms are told apart by 64 bits of hash: two that meet would only share their counts. */
static ibid_err intern(ibidi_text_words *w, uint64_t hash, uint32_t *id) {
    ibid_err e = grow_forms(w);
    if (e) return e;
    size_t i = (size_t)hash & (w->n_slots - 1);
    while (w->slots[i] && w->stats[w->slots[i] - 1].hash != hash) i = (i + 1) & (w->n_slots - 1);
    if (!w->slots[i]) {
        w->stats[w->n_ids] = (ibidi_word_stats){.hash = hash};
        w->slots[i] = (uint32_t)++w->n_ids;
    }
    *id = w->slots[i] - 1;
    return IBID_OK;
}

/* ---- What stands between two words ---- */
static bool abbreviation(ibid_str t, const ibidi_text_word *w) {
    if (w->shape == IBIDI_SHAPE_INITIAL) return true;
    if (w->lists & IBIDI_LEX_ABBREVIATION && w->shape == IBIDI_SHAPE_CAPITAL) return true;
    return w->shape == IBIDI_SHAPE_UPPER && memchr(t.s + w->start, '.', w->end - w->start);
}

static uint8_t gap_of(ibid_str t, size_t from, size_t to, const ibidi_text_word *before) {
    uint8_t gap = IBIDI_GAP_SPACE;
    size_t i = from;
    if (before && i < to && t.s[i] == '.' && abbreviation(t, before)) i++;
    for (; i < to; i++) {
        unsigned char c = (unsigned char)t.s[i];
        uint8_t g = IBIDI_GAP_OTHER;
        if (c == ' ' || c == '\t' || c == '\r') continue;
        if (c == 0xC2 && i + 1 < to && (unsigned char)t.s[i + 1] == 0xA0) { /* no-break space */
            i++;
            continue;
        }
        if (c == '\n') g = IBIDI_GAP_LINE;
        if (c == ',') g = IBIDI_GAP_COMMA;
        if (c == '&') g = IBIDI_GAP_AMPERSAND;
        if (c == '.' || c == '!' || c == '?' || c == ';' || c == ':') g = IBIDI_GAP_SENTENCE;
        if (c == '"') g = IBIDI_GAP_QUOTE;
        if (c == 0xE2 && i + 2 < to && (unsigned char)t.s[i + 1] == 0x80) {
            unsigned char d = (unsigned char)t.s[i + 2];
            g = d >= 0x98 && d <= 0x9F ? IBIDI_GAP_QUOTE : IBIDI_GAP_OTHER;
            if (d == 0xA6) g = IBIDI_GAP_SENTENCE;
            i += 2;
        }
        if (gap == IBIDI_GAP_AMPERSAND) gap = IBIDI_GAP_OTHER; /* not alone */
        if (g > gap) gap = g;
    }
    return gap;
}

static bool starts(uint8_t gap) {
    return gap >= IBIDI_GAP_QUOTE;
}

/* ---- Lines ---- */
/* A line whose words are nearly all capitalised, without a period at its end, is a heading. */
static void end_line(splitter *s) {
    ibidi_text_words *w = s->w;
    size_t capitals = 0, lower = 0, n = w->n - s->line;
    for (size_t i = s->line; i < w->n; i++) {
        const ibidi_text_word *x = &w->v[i];
        capitals += x->shape == IBIDI_SHAPE_CAPITAL || x->shape == IBIDI_SHAPE_UPPER;
        lower += x->shape == IBIDI_SHAPE_LOWER && x->end - x->start > 3;
    }
    bool begins = n && w->v[s->line].shape != IBIDI_SHAPE_LOWER;
    if (n >= 2 && begins && capitals >= 2 && capitals >= 4 * lower) {
        uint64_t end = w->v[w->n - 1].end;
        bool period = end < s->t.n && (s->t.s[end] == '.' || s->t.s[end] == '"');
        for (size_t i = s->line; i < w->n && !period; i++) w->v[i].flags |= IBIDI_WORD_HEADING;
    }
    s->line = w->n;
}

static ibid_err add_word(splitter *s, size_t start, size_t end, const reading *r) {
    ibidi_text_words *w = s->w;
    char form[FORM_MAX];
    size_t n;
    if (w->n == w->room) {
        size_t room = w->room ? w->room * 2 : 1024;
        ibidi_text_word *v = ibid_realloc(w->v, room * sizeof *v);
        if (!v) return ibid_fail(IBID_NOMEM, "out of memory for words of a text");
        w->v = v;
        w->room = room;
    }
    ibidi_text_word x = {.start = start, .end = end, .shape = shape_of(r)};
    size_t cut = 0; /* 's */
    if (end - start > 2 && s->t.s[end - 1] == 's' && s->t.s[end - 2] == '\'') cut = 2;
    if (end - start > 4 && s->t.s[end - 1] == 's' &&
        memcmp(s->t.s + end - 4, "\xE2\x80\x99", 3) == 0)
        cut = 4;
    x.end -= cut;
    if (cut) x.flags |= IBIDI_WORD_POSSESSIVE;
    if (cut && r->first_upper && r->n_lower == 1) /* JCC's */
        x.shape = r->n_upper == 1 ? IBIDI_SHAPE_INITIAL : IBIDI_SHAPE_UPPER;
    ibid_err e = intern(w, hash_form(s->t, start, x.end, form, &n), &x.id);
    if (e) return e;
    x.lists = ibidi_lexicon(form, n);
    ibidi_text_word *before = w->n ? &w->v[w->n - 1] : NULL;
    uint64_t from = before ? before->end : 0;
    if (before && before->flags & IBIDI_WORD_POSSESSIVE) /* its 's is no gap */
        from += s->t.s[from] == '\'' ? 2 : 4;
    x.gap = before ? gap_of(s->t, from, start, before) : IBIDI_GAP_LINE;
    if (x.gap == IBIDI_GAP_SPACE && before && before->flags & IBIDI_WORD_POSSESSIVE)
        x.gap = IBIDI_GAP_POSSESSIVE;
    /* "... in the U.S. The ...": the abbreviation ended a sentence after all. */
    if (x.gap == IBIDI_GAP_SPACE && before && start > from && s->t.s[from] == '.' &&
        x.shape == IBIDI_SHAPE_CAPITAL && x.lists & IBIDI_LEX_FUNCTION)
        x.gap = IBIDI_GAP_SENTENCE;
    if (x.gap == IBIDI_GAP_LINE && before) end_line(s);
    if (starts(x.gap)) x.flags |= IBIDI_WORD_STARTS;
    w->v[w->n++] = x;
    return IBID_OK;
}

static size_t read_address(ibid_str t, size_t i) {
    while (i < t.n && (unsigned char)t.s[i] > ' ' && !strchr("\"<>)]", t.s[i])) i++;
    while (i && strchr(".,;:!?", t.s[i - 1])) i--;
    return i;
}

static ibid_err read_word(splitter *s, size_t *at) {
    size_t start = *at, i = start;
    reading r = {0};
    while (i < s->t.n) {
        letter l = next_letter(s->t, i);
        if (l.k == BREAK && !inside(s->t, i, &l, &r)) break;
        count(&r, &l, i == start);
        i += l.len;
    }
    if (s->t.n - i >= 3 && memcmp(s->t.s + i, "://", 3) == 0) {
        i = read_address(s->t, i);
        r.address = true;
    }
    *at = i;
    return add_word(s, start, i, &r);
}

static void count_forms(ibidi_text_words *w) {
    for (size_t i = 0; i < w->n; i++) {
        const ibidi_text_word *x = &w->v[i];
        ibidi_word_stats *s = &w->stats[x->id];
        if (x->shape == IBIDI_SHAPE_LOWER)
            s->lower++;
        else if (x->flags & (IBIDI_WORD_STARTS | IBIDI_WORD_HEADING))
            s->starts++;
        else
            s->middle++;
    }
}

ibid_err ibidi_text_words_split(ibid_str text, ibidi_text_words *out) {
    splitter s = {.t = text, .w = out};
    *out = (ibidi_text_words){.n = 0};
    if (text.n >= UINT32_MAX) return ibid_fail(IBID_TOOBIG, "a text of %zu bytes", text.n);
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < text.n && !e;) {
        letter l = next_letter(text, i);
        if (l.k == LETTER || l.k == DIGIT)
            e = read_word(&s, &i);
        else
            i += l.len;
    }
    if (!e && out->n > s.line) end_line(&s);
    if (!e) count_forms(out);
    return e;
}

void ibidi_text_words_fini(ibidi_text_words *w) {
    ibid_free(w->v);
    ibid_free(w->stats);
    ibid_free(w->slots);
    *w = (ibidi_text_words){.n = 0};
}
