/* Which names are forms of one entity: the same words, their plural, initials, a person's last or
 * first name behind the full one. */
#include "retriever/lexicon.h"
#include "retriever/spans_words.h"

#include <stdlib.h>
#include <string.h>

enum { PERSON_WORDS = 4 };

/* A map of 64-bit hashes to a number; hashes are taken as identities. */
typedef struct table {
    uint64_t *keys;
    uint32_t *values; /* value + 1; 0 = free */
    size_t n, room;
} table;

static ibid_err table_grow(table *t) {
    if (t->n * 2 < t->room) return IBID_OK;
    table big = {.room = t->room ? t->room * 2 : 256};
    big.keys = ibid_calloc(big.room, sizeof *big.keys);
    big.values = ibid_calloc(big.room, sizeof *big.values);
    if (!big.keys || !big.values) {
        ibid_free(big.keys);
        ibid_free(big.values);
        return ibid_fail(IBID_NOMEM, "out of memory for names of a text");
    }
    for (size_t i = 0; i < t->room; i++) {
        if (!t->values[i]) continue;
        size_t at = (size_t)t->keys[i] & (big.room - 1);
        while (big.values[at]) at = (at + 1) & (big.room - 1);
        big.keys[at] = t->keys[i];
        big.values[at] = t->values[i];
    }
    big.n = t->n;
    ibid_free(t->keys);
    ibid_free(t->values);
    *t = big;
    return IBID_OK;
}

/* The value slot of a key, 0 in it if it is new; valid until the next call. NULL: no memory. */
static uint32_t *table_at(table *t, uint64_t key) {
    if (table_grow(t)) return NULL;
    size_t i = (size_t)(key ^ key >> 32) & (t->room - 1);
    key ^= key >> 32;
    while (t->values[i] && t->keys[i] != key) i = (i + 1) & (t->room - 1);
    if (!t->values[i]) {
        t->keys[i] = key;
        t->n++;
    }
    return &t->values[i];
}

static void table_fini(table *t) {
    ibid_free(t->keys);
    ibid_free(t->values);
}

/* ---- Forms ---- */
typedef struct form { /* one spelling, in lower case, of a name */
    size_t span;      /* where it stands first */
    uint32_t mentions, place, person;
    uint32_t parent; /* the form it belongs to, or itself */
} form;

typedef struct grouping {
    ibid_str text;
    const ibidi_text_words *w;
    const size_t *first, *last;
    ibidi_spans *out;
    form *forms;
    size_t n, room;
    uint32_t *form_of; /* [out->n] */
} grouping;

static const ibidi_text_word *word(const grouping *g, size_t i) {
    return &g->w->v[i];
}

static uint64_t words_hash(const grouping *g, size_t from, size_t to) {
    uint64_t h = 0x7A3F;
    for (size_t i = from; i <= to; i++)
        h = (h ^ g->w->stats[word(g, i)->id].hash) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 31;
}

static unsigned before(const grouping *g, size_t i) { /* lists of the word before, in its clause */
    if (i == 0 || word(g, i)->gap > IBIDI_GAP_POSSESSIVE) return 0;
    return word(g, i - 1)->lists;
}

static bool is_the(const grouping *g, size_t i) {
    const ibidi_text_word *w = word(g, i);
    return w->end - w->start == 3 && (memcmp(g->text.s + w->start, "the", 3) == 0 ||
                                      memcmp(g->text.s + w->start, "The", 3) == 0);
}

static bool place_before(const grouping *g, size_t i) {
    return i && word(g, i)->gap == IBIDI_GAP_SPACE && before(g, i) & IBIDI_LEX_PREPOSITION;
}

static bool person_around(const grouping *g, size_t from, size_t to) {
    if (from && word(g, from)->gap == IBIDI_GAP_SPACE && word(g, from - 1)->lists & IBIDI_LEX_TITLE)
        return true;
    if (to + 1 >= g->w->n) return false;
    const ibidi_text_word *next = word(g, to + 1);
    if (next->gap <= IBIDI_GAP_COMMA && next->lists & IBIDI_LEX_SPEECH) return true;
    /* ", 34," */
    if (next->gap == IBIDI_GAP_COMMA && next->shape == IBIDI_SHAPE_NUMBER &&
        next->end - next->start == 2)
        return true;
    return from && before(g, from) & IBIDI_LEX_SPEECH && word(g, from)->gap == IBIDI_GAP_SPACE;
}

static ibid_err find_forms(grouping *g) {
    table t = {.n = 0};
    ibid_err e = IBID_OK;
    for (size_t s = 0; s < g->out->n && !e; s++) {
        if (g->out->v[s].kind != IBIDI_SPAN_NAME) continue;
        uint32_t *at = table_at(&t, words_hash(g, g->first[s], g->last[s]));
        if (at && !*at) {
            if (g->n == g->room) {
                size_t room = g->room ? g->room * 2 : 128;
                form *more = ibid_realloc(g->forms, room * sizeof *more);
                if (more) g->forms = more;
                if (more) g->room = room;
            }
            if (g->n < g->room) {
                g->forms[g->n] = (form){.span = s, .parent = (uint32_t)g->n};
                *at = (uint32_t)++g->n;
            }
        }
        if (!at || !*at) {
            e = ibid_fail(IBID_NOMEM, "out of memory for names of a text");
            break;
        }
        form *f = &g->forms[*at - 1];
        g->form_of[s] = *at - 1;
        f->mentions++;
        f->place += place_before(g, g->first[s]);
        f->person += person_around(g, g->first[s], g->last[s]);
    }
    table_fini(&t);
    return e;
}

static uint32_t root(const grouping *g, uint32_t f) {
    while (g->forms[f].parent != f) f = g->forms[f].parent;
    return f;
}

static size_t n_words(const grouping *g, uint32_t f) {
    return g->last[g->forms[f].span] - g->first[g->forms[f].span] + 1;
}

static unsigned form_lists(const grouping *g, uint32_t f) {
    unsigned all = 0;
    for (size_t i = g->first[g->forms[f].span]; i <= g->last[g->forms[f].span]; i++)
        all |= word(g, i)->lists;
    return all;
}

static const unsigned HEADS = IBIDI_LEX_ORG | IBIDI_LEX_PLACE | IBIDI_LEX_EVENT;

/* Two to four plain words that name no organisation, place or event. */
static bool like_person(const grouping *g, uint32_t f) {
    const form *m = &g->forms[f];
    size_t from = g->first[m->span], to = g->last[m->span];
    if (to == from || to - from >= PERSON_WORDS || m->place) return false;
    bool given = word(g, from)->lists & IBIDI_LEX_GIVEN;
    for (size_t i = from; i <= to; i++) {
        const ibidi_text_word *w = word(g, i);
        if (w->shape == IBIDI_SHAPE_INITIAL) continue;
        if (w->shape != IBIDI_SHAPE_CAPITAL && !(w->shape == IBIDI_SHAPE_LOWER && i > from))
            return false;
        if (w->lists & (HEADS | IBIDI_LEX_FUNCTION) && !given) return false;
    }
    return true;
}

/* ---- Plurals and initials ---- */
static uint64_t text_hash(ibid_str t, size_t from, size_t to) {
    uint64_t h = 0x1D;
    for (size_t i = from; i < to; i++) {
        unsigned char c = (unsigned char)t.s[i];
        if (c == '.' || c == ' ') continue;
        h = (h ^ (uint64_t)(c >= 'A' && c <= 'Z' ? c + 32 : c)) * 0x9E3779B97F4A7C15u;
    }
    return h ^ h >> 31;
}

/* Hash of the initials of a name's words, small ones left out; 0 if fewer than two remain. */
static uint64_t initials_hash(const grouping *g, uint32_t f, bool all) {
    uint64_t h = 0x1D;
    size_t n = 0;
    for (size_t i = g->first[g->forms[f].span]; i <= g->last[g->forms[f].span]; i++) {
        const ibidi_text_word *w = word(g, i);
        unsigned char c = (unsigned char)g->text.s[w->start];
        if (w->shape == IBIDI_SHAPE_LOWER && !all) continue;
        h = (h ^ (uint64_t)(c >= 'A' && c <= 'Z' ? c + 32 : c)) * 0x9E3779B97F4A7C15u;
        n++;
    }
    return n < 2 ? 0 : h ^ h >> 31;
}

static bool acronym(const grouping *g, uint32_t f) {
    return n_words(g, f) == 1 && word(g, g->first[g->forms[f].span])->shape == IBIDI_SHAPE_UPPER;
}

static void join(grouping *g, uint32_t child, uint32_t parent) {
    child = root(g, child);
    parent = root(g, parent);
    if (child != parent) g->forms[child].parent = parent;
}

static ibid_err join_acronyms_and_plurals(grouping *g) {
    table t = {.n = 0};
    ibid_err e = IBID_OK;
    for (uint32_t f = 0; f < g->n && !e; f++) {
        const ibidi_mined *s = &g->out->v[g->forms[f].span];
        uint32_t *at = table_at(&t, text_hash(g->text, s->start, s->end));
        if (!at) e = ibid_fail(IBID_NOMEM, "out of memory for names of a text");
        if (at && !*at) *at = f + 1;
    }
    for (uint32_t f = 0; f < g->n && !e; f++) {
        const ibidi_mined *s = &g->out->v[g->forms[f].span];
        if (s->end - s->start > 3 && g->text.s[s->end - 1] == 's') {
            uint32_t *at = table_at(&t, text_hash(g->text, s->start, s->end - 1));
            if (at && *at) join(g, f, *at - 1);
            if (!at) e = ibid_fail(IBID_NOMEM, "out of memory for names of a text");
        }
        for (int all = 0; all < 2 && !e && n_words(g, f) > 1; all++) {
            uint64_t h = initials_hash(g, f, all);
            uint32_t *at = h ? table_at(&t, h) : NULL;
            if (at && *at && acronym(g, *at - 1)) join(g, *at - 1, f);
        }
    }
    table_fini(&t);
    return e;
}

/* ---- Parts of persons' names ---- */
/* A lone word that is the last (or first) one of a person named in full before it. */
static ibid_err join_parts(grouping *g) {
    table t = {.n = 0};
    ibid_err e = IBID_OK;
    for (uint32_t f = 0; f < g->n && !e; f++) {
        size_t span = g->forms[f].span;
        if (like_person(g, f)) {
            size_t ends[2] = {g->last[span], g->first[span]};
            for (int k = 0; k < 2; k++) {
                uint32_t *at = table_at(&t, g->w->stats[word(g, ends[k])->id].hash);
                if (!at) return table_fini(&t), ibid_fail(IBID_NOMEM, "out of memory for names");
                if (!*at) *at = f + 1;
            }
        } else if (n_words(g, f) == 1 && !g->forms[f].place &&
                   word(g, g->first[span])->shape == IBIDI_SHAPE_CAPITAL) {
            uint32_t *at = table_at(&t, g->w->stats[word(g, g->first[span])->id].hash);
            if (!at) e = ibid_fail(IBID_NOMEM, "out of memory for names of a text");
            if (at && *at) join(g, f, *at - 1);
        }
    }
    table_fini(&t);
    return e;
}

/* ---- Entities of the forms ---- */
static uint8_t head_of(unsigned lists, unsigned last) {
    if (last & IBIDI_LEX_ORG) return IBIDI_HEAD_ORGANIZATION;
    if (last & IBIDI_LEX_PLACE) return IBIDI_HEAD_PLACE;
    if (last & IBIDI_LEX_EVENT) return IBIDI_HEAD_EVENT;
    if (lists & IBIDI_LEX_ORG) return IBIDI_HEAD_ORGANIZATION;
    if (lists & IBIDI_LEX_PLACE) return IBIDI_HEAD_PLACE;
    return lists & IBIDI_LEX_EVENT ? IBIDI_HEAD_EVENT : IBIDI_HEAD_NONE;
}

static void describe(grouping *g, size_t s, ibidi_entity *x) {
    uint32_t f = g->form_of[s];
    size_t from = g->first[s], to = g->last[s];
    if (!x->mentions || to - from + 1 > x->words) {
        x->first = (uint32_t)s;
        x->words = (uint32_t)(to - from + 1);
        x->head = to > from ? head_of(form_lists(g, f), word(g, to)->lists) : IBIDI_HEAD_NONE;
        x->given = to > from && word(g, from)->lists & IBIDI_LEX_GIVEN;
    }
    x->mentions++;
    x->place += place_before(g, from);
    x->person += person_around(g, from, to);
    x->article += from && word(g, from)->gap == IBIDI_GAP_SPACE && is_the(g, from - 1);
    x->acronyms += from == to && word(g, from)->shape == IBIDI_SHAPE_UPPER;
}

static ibid_err make_entities(grouping *g) {
    uint32_t *entity = ibid_alloc(g->n * sizeof *entity), n = 0;
    g->out->entities = ibid_calloc(g->n, sizeof *g->out->entities);
    if (!entity || !g->out->entities) {
        ibid_free(entity);
        return ibid_fail(IBID_NOMEM, "out of memory for names of a text");
    }
    for (size_t f = 0; f < g->n; f++) entity[f] = UINT32_MAX;
    for (size_t s = 0; s < g->out->n; s++) {
        if (g->out->v[s].kind != IBIDI_SPAN_NAME) continue;
        uint32_t r = root(g, g->form_of[s]);
        if (entity[r] == UINT32_MAX) entity[r] = n++;
        g->out->v[s].entity = entity[r];
        describe(g, s, &g->out->entities[entity[r]]);
    }
    g->out->n_entities = n;
    ibid_free(entity);
    return IBID_OK;
}

ibid_err ibidi_entities_find(ibid_str text, const ibidi_text_words *w, const size_t *first,
                             const size_t *last, ibidi_spans *out) {
    grouping g = {.text = text, .w = w, .first = first, .last = last, .out = out};
    if (!out->n) return IBID_OK;
    g.form_of = ibid_calloc(out->n, sizeof *g.form_of);
    ibid_err e = g.form_of ? find_forms(&g) : ibid_fail(IBID_NOMEM, "out of memory for names");
    if (!e) e = join_acronyms_and_plurals(&g);
    if (!e) e = join_parts(&g);
    if (!e) e = make_entities(&g);
    ibid_free(g.forms);
    ibid_free(g.form_of);
    return e;
}

/* ---- Order ---- */
typedef struct placed {
    ibidi_mined m;
    uint32_t at;
} placed;

static int by_place(const void *a, const void *b) {
    const placed *x = a, *y = b;
    if (x->m.start != y->m.start) return x->m.start < y->m.start ? -1 : 1;
    if (x->m.end != y->m.end) return x->m.end > y->m.end ? -1 : 1;
    return x->m.kind < y->m.kind ? -1 : x->m.kind > y->m.kind;
}

ibid_err ibidi_spans_order(ibidi_spans *s) {
    placed *p = ibid_alloc(s->n * sizeof *p);
    uint32_t *to = ibid_alloc(s->n * sizeof *to);
    if (!p || !to) {
        ibid_free(p);
        ibid_free(to);
        return ibid_fail(IBID_NOMEM, "out of memory for spans of a text");
    }
    for (size_t i = 0; i < s->n; i++) p[i] = (placed){s->v[i], (uint32_t)i};
    if (s->n) qsort(p, s->n, sizeof *p, by_place);
    for (size_t i = 0; i < s->n; i++) {
        s->v[i] = p[i].m;
        to[p[i].at] = (uint32_t)i;
    }
    for (size_t i = 0; i < s->n_entities; i++) s->entities[i].first = to[s->entities[i].first];
    ibid_free(p);
    ibid_free(to);
    return IBID_OK;
}
