/* Mining of candidate spans. Words first, with their shape and what stands before them; then the
 * text's own statistics of each word; then runs of name words; then which runs are one entity
 * (entities.c). */
#include "retriever/spans.h"

#include "retriever/lexicon.h"
#include "retriever/spans_words.h"
#include "rpc/base/hash.h"

#include <string.h>

enum { QUOTE_MAX = 200, RUN_WORDS_MAX = 12 };

typedef struct miner {
    ibid_str text;
    ibidi_text_words w;
    ibidi_spans *out;
    size_t room;
    size_t *first_word, *last_word; /* of each span [room] */
} miner;

static const ibidi_text_word *word_at(const miner *m, size_t i) {
    return &m->w.v[i];
}

static ibid_err emit(miner *m, size_t first, size_t last, ibidi_span_kind kind) {
    ibidi_spans *o = m->out;
    if (o->n == m->room) {
        size_t room = m->room ? m->room * 2 : 256;
        ibidi_mined *v = ibid_realloc(o->v, room * sizeof *v);
        if (v) o->v = v;
        size_t *f = v ? ibid_realloc(m->first_word, room * sizeof *f) : NULL;
        if (f) m->first_word = f;
        size_t *l = f ? ibid_realloc(m->last_word, room * sizeof *l) : NULL;
        if (l) m->last_word = l;
        if (!l) return ibid_fail(IBID_NOMEM, "out of memory for spans of a text");
        m->room = room;
    }
    m->first_word[o->n] = first;
    m->last_word[o->n] = last;
    o->v[o->n++] =
        (ibidi_mined){word_at(m, first)->start, word_at(m, last)->end, UINT32_MAX, (uint8_t)kind};
    return IBID_OK;
}

/* ---- Names ---- */
static const ibidi_word_stats *stats(const miner *m, size_t i) {
    return &m->w.stats[word_at(m, i)->id];
}

static bool capital(const ibidi_text_word *w) {
    return w->shape == IBIDI_SHAPE_CAPITAL || w->shape == IBIDI_SHAPE_UPPER ||
           w->shape == IBIDI_SHAPE_INITIAL || w->shape == IBIDI_SHAPE_MIXED;
}

static bool trusted(const ibidi_text_word *w) {
    return !(w->flags & (IBIDI_WORD_STARTS | IBIDI_WORD_HEADING));
}

static bool joined(const miner *m, size_t i) { /* to the word before it */
    return word_at(m, i)->gap == IBIDI_GAP_SPACE || word_at(m, i)->gap == IBIDI_GAP_AMPERSAND;
}

/* Whether a word can be part of a name where it stands. */
static bool name_word(const miner *m, size_t i) {
    const ibidi_text_word *w = word_at(m, i);
    if (!capital(w)) return false;
    if (w->lists & IBIDI_LEX_DAY && !(w->lists & IBIDI_LEX_GIVEN)) /* Black Friday */
        return i && joined(m, i) && trusted(w) && trusted(word_at(m, i - 1)) &&
               word_at(m, i - 1)->shape == IBIDI_SHAPE_CAPITAL &&
               !(word_at(m, i - 1)->lists & (IBIDI_LEX_DAY | IBIDI_LEX_FUNCTION));
    if (w->shape == IBIDI_SHAPE_INITIAL && w->end - w->start == 1 && m->text.s[w->start] == 'I')
        return false;
    if (w->flags & IBIDI_WORD_HEADING)
        return stats(m, i)->middle > 0 || w->shape == IBIDI_SHAPE_MIXED;
    if (w->flags & IBIDI_WORD_STARTS && w->lists & IBIDI_LEX_FUNCTION) return false;
    return true;
}

static bool is_word(const miner *m, size_t i, const char *s) {
    const ibidi_text_word *w = word_at(m, i);
    size_t n = strlen(s);
    return w->end - w->start == n && memcmp(m->text.s + w->start, s, n) == 0;
}

static bool particle(const miner *m, size_t i) {
    static const char *const list[] = {"de",  "la",  "le",  "del", "della", "di", "da", "du",
                                       "van", "von", "der", "den", "bin",   "al", "el", "dos"};
    for (size_t k = 0; k < sizeof list / sizeof *list; k++)
        if (is_word(m, i, list[k])) return true;
    return false;
}

static unsigned lists_of(const miner *m, size_t from, size_t to) {
    unsigned all = 0;
    for (size_t i = from; i < to; i++) all |= word_at(m, i)->lists;
    return all;
}

static const unsigned HEADS = IBIDI_LEX_ORG | IBIDI_LEX_PLACE | IBIDI_LEX_EVENT;

/* The end of the run of name words that goes on after a lower-case connector at i, or 0. */
static size_t plain_run(const miner *m, size_t i) {
    size_t end = i;
    while (end < m->w.n && name_word(m, end) && (end == i || joined(m, end)) &&
           end - i < RUN_WORDS_MAX)
        end++;
    return end;
}

static size_t over_connector(const miner *m, size_t from, size_t i) {
    size_t next = i + 1;
    if (next >= m->w.n || !joined(m, i) || !joined(m, next)) return 0;
    unsigned last = word_at(m, i - 1)->lists;
    if (particle(m, i)) {
        if (next + 1 < m->w.n && particle(m, next) && joined(m, next + 1)) next++;
        return name_word(m, next) ? plain_run(m, next) : 0;
    }
    if (is_word(m, i, "of") || is_word(m, i, "for")) {
        if (is_word(m, next, "the") && next + 1 < m->w.n && joined(m, next + 1)) next++;
        bool of = is_word(m, i, "of");
        if (!(last & (of ? HEADS : IBIDI_LEX_ORG)) && !(of && i - from == 1)) return 0;
        if (i - from == 1 && last & IBIDI_LEX_TITLE && !(last & HEADS)) return 0;
        return name_word(m, next) ? plain_run(m, next) : 0;
    }
    if (is_word(m, i, "and")) {
        size_t end = plain_run(m, next);
        if (end == next) return 0;
        bool heads = false; /* Department of X and Y */
        for (size_t k = from; k < i; k++) heads |= is_word(m, k, "of");
        if (heads && lists_of(m, from, from + 1) & IBIDI_LEX_ORG) return end;
        if (end - next > 1 && word_at(m, end - 1)->lists & IBIDI_LEX_ORG && !(last & HEADS) &&
            !(word_at(m, from)->lists & (IBIDI_LEX_GIVEN | IBIDI_LEX_TITLE)) &&
            !(word_at(m, next)->lists & IBIDI_LEX_GIVEN))
            return end;
    }
    return 0;
}

/* One past the last word of the name that begins at i. */
static size_t run_end(const miner *m, size_t from) {
    size_t end = plain_run(m, from);
    while (end < m->w.n && end - from < RUN_WORDS_MAX) {
        size_t more = over_connector(m, from, end);
        if (more <= end) break;
        end = more;
    }
    return end;
}

/* A lone word at the start of a sentence is a name if the text says so elsewhere, or its
 * neighbour does. */
static bool lone_start(const miner *m, size_t i) {
    const ibidi_text_word *w = word_at(m, i);
    const ibidi_word_stats *s = stats(m, i);
    if (s->middle > s->lower) return true;
    if (s->lower || w->lists & (HEADS | IBIDI_LEX_TITLE)) return false;
    if (w->shape == IBIDI_SHAPE_MIXED || w->shape == IBIDI_SHAPE_UPPER) return true;
    if (w->flags & IBIDI_WORD_POSSESSIVE || w->lists & IBIDI_LEX_GIVEN) return true;
    if (i + 1 < m->w.n && joined(m, i + 1) && word_at(m, i + 1)->lists & IBIDI_LEX_SPEECH)
        return true;
    return s->starts >= 2;
}

static bool kept_title(const miner *m, size_t i) { /* part of how the person is called */
    static const char *const list[] = {"King",  "Queen", "Prince", "Princess", "Pope",  "Sir",
                                       "Saint", "Lord",  "Lady",   "Father",   "Sister"};
    for (size_t k = 0; k < sizeof list / sizeof *list; k++)
        if (is_word(m, i, list[k])) return true;
    return false;
}

/* Words [from, to) as one name, or parts of it. */
static ibid_err emit_run(miner *m, size_t from, size_t to) {
    while (from < to && !(word_at(m, from)->flags & IBIDI_WORD_STARTS) && to - from > 1 &&
           is_word(m, from, "The"))
        from++;
    /* What follows the last title is a person, unless it names something else. */
    for (size_t t = to - 1; t-- > from;) {
        if (!(word_at(m, t)->lists & IBIDI_LEX_TITLE) || kept_title(m, t)) continue;
        if (to - t - 1 > 4 || lists_of(m, t + 1, to) & HEADS) break;
        if (word_at(m, to - 1)->lists & IBIDI_LEX_TITLE) break;
        ibid_err e = IBID_OK;
        size_t cut = t;
        while (cut > from && word_at(m, cut - 1)->lists & IBIDI_LEX_TITLE) cut--;
        if (cut > from && capital(word_at(m, cut - 1)) && trusted(word_at(m, from)))
            e = emit_run(m, from, cut);
        if (e) return e;
        from = t + 1;
        break;
    }
    unsigned all = ~0u;
    for (size_t i = from; i < to; i++) all &= word_at(m, i)->lists;
    if (all & (IBIDI_LEX_TITLE | IBIDI_LEX_FUNCTION)) return IBID_OK;
    if (to - from == 1) {
        const ibidi_text_word *w = word_at(m, from);
        if (w->shape == IBIDI_SHAPE_INITIAL || w->lists & IBIDI_LEX_GENERIC) return IBID_OK;
        if (!trusted(w) && !lone_start(m, from)) return IBID_OK;
        if (w->lists & HEADS && stats(m, from)->lower) return IBID_OK;
    }
    return emit(m, from, to - 1, IBIDI_SPAN_NAME);
}

static ibid_err mine_names(miner *m) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < m->w.n && !e;) {
        const ibidi_text_word *w = word_at(m, i);
        if (w->shape == IBIDI_SHAPE_ADDRESS) {
            e = emit(m, i, i, IBIDI_SPAN_ADDRESS);
            i++;
            continue;
        }
        if (!name_word(m, i)) {
            i++;
            continue;
        }
        size_t end = run_end(m, i), from = i;
        /* At the start of a sentence an ordinary word may stand before the name. */
        if (end - from > 1 && w->flags & IBIDI_WORD_STARTS && stats(m, from)->lower &&
            !stats(m, from)->middle && !(w->lists & (IBIDI_LEX_TITLE | IBIDI_LEX_GIVEN)) &&
            !(lists_of(m, from + 1, end) & HEADS))
            from++;
        e = emit_run(m, from, end);
        i = end;
    }
    return e;
}

/* ---- Numbers and dates ---- */
static bool year(const miner *m, const ibidi_text_word *w) {
    if (w->end - w->start != 4) return false;
    const char *s = m->text.s + w->start;
    return (s[0] == '1' && s[1] >= '5' && s[1] <= '9') || (s[0] == '2' && s[1] == '0');
}

static bool date_part(const miner *m, size_t i) {
    const ibidi_text_word *w = word_at(m, i);
    return (w->lists & IBIDI_LEX_DAY && capital(w)) ||
           (w->shape == IBIDI_SHAPE_NUMBER && (year(m, w) || w->end - w->start <= 4));
}

static ibid_err mine_number(miner *m, size_t i, size_t *next) {
    size_t end = i + 1;
    bool date = word_at(m, i)->lists & IBIDI_LEX_DAY && capital(word_at(m, i));
    bool lone_year = year(m, word_at(m, i));
    while (end < m->w.n && end - i < 5 && word_at(m, end)->gap <= IBIDI_GAP_COMMA &&
           date_part(m, end)) {
        if (!date && !(word_at(m, end)->lists & IBIDI_LEX_DAY)) break;
        date = true;
        end++;
    }
    if (word_at(m, i)->lists & IBIDI_LEX_DAY && end == i + 1 &&
        word_at(m, i)->flags & IBIDI_WORD_STARTS && word_at(m, i)->lists & IBIDI_LEX_FUNCTION)
        date = false;
    *next = end;
    if (date || (lone_year && end == i + 1)) return emit(m, i, end - 1, IBIDI_SPAN_DATE);
    if (word_at(m, i)->shape != IBIDI_SHAPE_NUMBER) return IBID_OK;
    while (end < m->w.n && end - i < 3 && joined(m, end) && word_at(m, end)->lists & IBIDI_LEX_UNIT)
        end++;
    *next = end;
    return emit(m, i, end - 1, IBIDI_SPAN_NUMBER);
}

static ibid_err mine_numbers(miner *m) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < m->w.n && !e;) {
        const ibidi_text_word *w = word_at(m, i);
        if (w->shape == IBIDI_SHAPE_NUMBER || (w->lists & IBIDI_LEX_DAY && capital(w)))
            e = mine_number(m, i, &i);
        else
            i++;
    }
    return e;
}

/* ---- Quoted strings ---- */
static size_t quote_mark(ibid_str t, size_t i, bool *opens, bool *closes) {
    *opens = *closes = false;
    if (t.s[i] == '"') return *opens = *closes = true, 1;
    if (t.n - i < 3 || (unsigned char)t.s[i] != 0xE2 || (unsigned char)t.s[i + 1] != 0x80) return 0;
    unsigned char c = (unsigned char)t.s[i + 2];
    *opens = c == 0x9C || c == 0x9E;
    *closes = c == 0x9D;
    return c >= 0x9C && c <= 0x9F ? 3 : 0;
}

static ibid_err mine_quotes(miner *m) {
    size_t open = SIZE_MAX, from = 0;
    for (size_t i = 0; i < m->text.n; i++) {
        bool opens, closes;
        if (m->text.s[i] == '\n') open = SIZE_MAX;
        size_t n = quote_mark(m->text, i, &opens, &closes);
        if (!n) continue;
        if (closes && open != SIZE_MAX) {
            while (from < m->w.n && word_at(m, from)->start < open) from++;
            size_t to = from;
            while (to < m->w.n && word_at(m, to)->end <= i) to++;
            bool fits = to > from && i - open <= QUOTE_MAX;
            ibid_err e = fits ? emit(m, from, to - 1, IBIDI_SPAN_QUOTE) : IBID_OK;
            if (e) return e;
            open = SIZE_MAX;
        } else if (opens) {
            open = i + n;
        }
        i += n - 1;
    }
    return IBID_OK;
}

/* ---- The whole ---- */
ibid_err ibidi_spans_mine(ibid_str text, ibidi_spans *out) {
    miner m = {.text = text, .out = out};
    *out = (ibidi_spans){.n = 0};
    ibid_err e = ibidi_text_words_split(text, &m.w);
    if (!e) e = mine_names(&m);
    if (!e) e = ibidi_entities_find(text, &m.w, m.first_word, m.last_word, out);
    if (!e) e = mine_numbers(&m);
    if (!e) e = mine_quotes(&m);
    if (!e) e = ibidi_spans_order(out);
    ibidi_text_words_fini(&m.w);
    ibid_free(m.first_word);
    ibid_free(m.last_word);
    if (e) ibidi_spans_fini(out);
    return e;
}

void ibidi_spans_fini(ibidi_spans *s) {
    ibid_free(s->v);
    ibid_free(s->entities);
    *s = (ibidi_spans){.n = 0};
}
