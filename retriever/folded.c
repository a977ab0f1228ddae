#include "retriever/folded.h"

#include <string.h>
#include <utf8proc.h>

enum { SEGMENT = 1 << 18, EXPANSION_MAX = 32 };

typedef struct item { /* one folded code point */
    int32_t c;
    uint8_t ccc;
    bool first, last; /* of what its character became */
    uint64_t start, end;
} item;

typedef struct items {
    item *v;
    size_t n, room;
} items;

static ibid_err push(items *a, item it) {
    if (a->n == a->room) {
        size_t room = a->room ? a->room * 2 : 1024;
        item *more = ibid_realloc(a->v, room * sizeof *more);
        if (!more) return ibid_fail(IBID_NOMEM, "out of memory for folded text");
        a->v = more;
        a->room = room;
    }
    /* Canonical order: marks sort by class behind their base (Unicode D108). */
    size_t at = a->n++;
    while (it.ccc && at && a->v[at - 1].ccc > it.ccc) {
        a->v[at] = a->v[at - 1];
        at--;
    }
    a->v[at] = it;
    return IBID_OK;
}

static bool is_space(int32_t c) {
    if (c < 0x80) return c == ' ' || (c >= '\t' && c <= '\r');
    utf8proc_category_t k = utf8proc_category(c);
    return c == 0x85 || k == UTF8PROC_CATEGORY_ZS || k == UTF8PROC_CATEGORY_ZL ||
           k == UTF8PROC_CATEGORY_ZP;
}

static uint8_t class_of(int32_t c) {
    return c < 0x300 ? 0 : (uint8_t)utf8proc_get_property(c)->combining_class;
}

static size_t decode(const char *s, size_t n, int32_t *c) {
    if ((unsigned char)*s < 0x80) return *c = *s, 1;
    utf8proc_ssize_t k = utf8proc_iterate((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n, c);
    if (k > 0) return (size_t)k;
    *c = 0xFFFD; /* a byte that is not UTF-8 */
    return 1;
}

static ibid_err fold_one(items *a, int32_t c, uint64_t start, uint64_t end) {
    int32_t out[EXPANSION_MAX];
    int bound = 0;
    utf8proc_ssize_t k = 1;
    if (is_space(c)) {
        if (a->n && a->v[a->n - 1].c == ' ') {
            a->v[a->n - 1].end = end;
            return IBID_OK;
        }
        return push(a, (item){' ', 0, true, true, start, end});
    }
    if (c < 0x80)
        out[0] = c >= 'A' && c <= 'Z' ? c + 32 : c;
    else
        k = utf8proc_decompose_char(
            c, out, EXPANSION_MAX,
            UTF8PROC_COMPAT | UTF8PROC_DECOMPOSE | UTF8PROC_CASEFOLD | UTF8PROC_IGNORE, &bound);
    if (k < 0 || k > EXPANSION_MAX) {
        out[0] = c;
        k = 1;
    }
    ibid_err e = IBID_OK;
    for (utf8proc_ssize_t i = 0; i < k && !e; i++)
        e = push(a, (item){out[i], class_of(out[i]), i == 0, i == k - 1, start, end});
    return e;
}

/* Where to stop reading at about `want`: before a character that is no mark. */
static size_t segment_end(ibid_str t, size_t at, size_t want) {
    if (want >= t.n - at) return t.n;
    size_t i = at + want;
    while (i < t.n && ((unsigned char)t.s[i] & 0xC0) == 0x80) i++;
    while (i < t.n) {
        int32_t c;
        size_t len = decode(t.s + i, t.n - i, &c);
        if (!class_of(c)) break;
        i += len;
    }
    return i;
}

static ibid_err fold_range(items *a, ibid_str t, size_t from, size_t to) {
    ibid_err e = IBID_OK;
    for (size_t i = from; i < to && !e;) {
        int32_t c;
        size_t len = decode(t.s + i, t.n - i, &c);
        e = fold_one(a, c, i, i + len);
        i += len;
    }
    return e;
}

static bool matches(const items *a, size_t i, const items *q) {
    for (size_t j = 0; j < q->n; j++)
        if (a->v[i + j].c != q->v[j].c) return false;
    if (!a->v[i].first || !a->v[i + q->n - 1].last) return false;
    return i + q->n == a->n || !a->v[i + q->n].ccc;
}

typedef struct found {
    ibidi_occurrence *v;
    size_t n, room, max;
} found;

static ibid_err note(found *f, const items *a, size_t i, size_t len, ibid_str text,
                     ibid_str query) {
    if (f->n == f->room) {
        size_t room = f->room ? f->room * 2 : 64;
        ibidi_occurrence *more = ibid_realloc(f->v, room * sizeof *more);
        if (!more) return ibid_fail(IBID_NOMEM, "out of memory for matches");
        f->v = more;
        f->room = room;
    }
    uint64_t start = a->v[i].start, end = 0;
    for (size_t j = i; j < i + len; j++) /* sorted marks may stand in another order in the text */
        if (a->v[j].end > end) end = a->v[j].end;
    bool same = end - start == query.n && memcmp(text.s + start, query.s, query.n) == 0;
    f->v[f->n++] = (ibidi_occurrence){start, end, same};
    return IBID_OK;
}

static ibid_str trim(ibid_str s) {
    while (s.n && strchr(" \t\r\n\v\f", s.s[0]) && s.s[0]) s.s++, s.n--;
    while (s.n && strchr(" \t\r\n\v\f", s.s[s.n - 1]) && s.s[s.n - 1]) s.n--;
    return s;
}

static ibid_err scan(ibid_str text, ibid_str query, const items *q, found *f) {
    items a = {.n = 0};
    ibid_err e = IBID_OK;
    for (size_t at = 0; at < text.n && !e && f->n < f->max;) {
        size_t end = segment_end(text, at, SEGMENT), i = 0;
        e = fold_range(&a, text, at, end);
        while (!e && i + q->n <= a.n && f->n < f->max) {
            if (a.v[i].c == q->v[0].c && matches(&a, i, q)) {
                e = note(f, &a, i, q->n, text, query);
                i += q->n;
            } else
                i++;
        }
        if (i > a.n) i = a.n;
        memmove(a.v, a.v + i,
                (a.n - i) * sizeof *a.v); /* an occurrence may go on in the next one */
        a.n -= i;
        at = end;
    }
    ibid_free(a.v);
    return e;
}

ibid_err ibidi_occurrences(ibid_str text, ibid_str query, size_t max, ibidi_occurrence **out,
                           size_t *n) {
    items q = {.n = 0};
    found f = {.max = max};
    query = trim(query);
    ibid_err e = fold_range(&q, query, 0, query.n);
    while (q.n && q.v[q.n - 1].c == ' ') q.n--;
    size_t lead = 0;
    while (lead < q.n && q.v[lead].c == ' ') lead++;
    items body = {q.n ? q.v + lead : NULL, q.n - lead, 0};
    if (!e && body.n) e = scan(text, query, &body, &f);
    ibid_free(q.v);
    if (e) {
        ibid_free(f.v);
        return e;
    }
    *out = f.v;
    *n = f.n;
    return IBID_OK;
}

/* ---- Other forms of the query's words ---- */
enum { STEMS_MAX = 32 };

typedef struct stemmed {
    uint64_t want[STEMS_MAX]; /* hashes of the query's stems */
    size_t n_want;
    bool content; /* one of them is no function word */
    struct {
        uint64_t start, end, hash;
    } last[STEMS_MAX]; /* a ring of the text's last words */
    size_t seen;
    found f;
} stemmed;

static uint64_t stem_hash(const char *s, size_t n) {
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)s[i]) * 0x100000001B3u;
    return h;
}

static int want_stem(void *arg, const ibidi_word *w) {
    stemmed *s = arg;
    if (w->extra) return 0;
    if (s->n_want < STEMS_MAX) s->want[s->n_want] = stem_hash(w->s, w->n);
    s->n_want++;
    s->content |= !w->stop;
    return 0;
}

static int meet_stem(void *arg, const ibidi_word *w) {
    stemmed *s = arg;
    if (w->extra) return 0;
    size_t at = s->seen++ % STEMS_MAX, first = 0;
    s->last[at].start = w->start;
    s->last[at].end = w->end;
    s->last[at].hash = stem_hash(w->s, w->n);
    if (s->seen < s->n_want) return 0;
    for (size_t i = 0; i < s->n_want; i++) {
        first = (s->seen - 1 - i) % STEMS_MAX;
        if (s->last[first].hash != s->want[s->n_want - 1 - i]) return 0;
    }
    found *f = &s->f;
    if (f->n && f->v[f->n - 1].end > s->last[first].start) return 0;
    if (f->n == f->max) return IBID_CANCELLED; /* enough */
    if (f->n == f->room) {
        size_t room = f->room ? f->room * 2 : 64;
        ibidi_occurrence *more = ibid_realloc(f->v, room * sizeof *more);
        if (!more) return IBID_NOMEM;
        f->v = more;
        f->room = room;
    }
    f->v[f->n++] = (ibidi_occurrence){s->last[first].start, w->end, false};
    return 0;
}

ibid_err ibidi_stemmed_occurrences(ibidi_words *w, ibid_str text, ibid_str query, size_t max,
                                   ibidi_occurrence **out, size_t *n) {
    stemmed s = {.f.max = max};
    int e = ibidi_words_each(w, query.s, query.n, true, want_stem, &s);
    if (!e && s.content && s.n_want <= STEMS_MAX && max)
        e = ibidi_words_each(w, text.s, text.n, true, meet_stem, &s);
    if (e == IBID_NOMEM) {
        ibid_free(s.f.v);
        return ibid_fail(IBID_NOMEM, "out of memory for matches");
    }
    *out = s.f.v;
    *n = s.f.n;
    return IBID_OK;
}
