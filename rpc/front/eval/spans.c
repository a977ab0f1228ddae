#include "rpc/front/eval/spans.h"
#include "rpc/front/eval/text.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum { POPULAR_FROM = 200, SPANS_MAX = 100000 };

/* ---- longest common substring, difflib's way ---- */

static int by_value(const void *a, const void *b) {
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return (x > y) - (x < y);
}

/* Marks with 1 the places of b whose character occurs more often than difflib looks at. */
static void popular(const int32_t *b, size_t n, size_t *sorted, size_t *out) {
    memset(out, 0, n * sizeof *out);
    if (n < POPULAR_FROM) return;
    for (size_t j = 0; j < n; j++) sorted[j] = ((size_t)(uint32_t)b[j] << 32) | j;
    qsort(sorted, n, sizeof *sorted, by_value);
    for (size_t j = 0, end; j < n; j = end) {
        for (end = j; end < n && sorted[end] >> 32 == sorted[j] >> 32;) end++;
        if (end - j > n / 100 + 1)
            for (size_t k = j; k < end; k++) out[sorted[k] & UINT32_MAX] = 1;
    }
}

size_t ibidi_eval_common(const int32_t *a, size_t n_a, const int32_t *b, size_t n_b, size_t *work) {
    size_t *run = work, *skip = work + n_b + 1; /* run[j + 1]: common characters that end at b[j] */
    size_t at_a = 0, at_b = 0, best = 0;
    popular(b, n_b, run, skip);
    memset(run, 0, (n_b + 1) * sizeof *run);
    for (size_t i = 0; i < n_a; i++) {
        size_t before = 0; /* run[j] of the row above */
        for (size_t j = 0; j < n_b; j++) {
            size_t above = run[j + 1];
            run[j + 1] = a[i] == b[j] && !skip[j] ? before + 1 : 0;
            before = above;
            if (run[j + 1] > best) best = run[j + 1], at_a = i + 1 - best, at_b = j + 1 - best;
        }
    }
    while (at_a > 0 && at_b > 0 && a[at_a - 1] == b[at_b - 1]) at_a--, at_b--, best++;
    while (at_a + best < n_a && at_b + best < n_b && a[at_a + best] == b[at_b + best]) best++;
    return best;
}

/* ---- the two scores ---- */

struct side { /* normalised strings as code points */
    int32_t **p;
    size_t *n, count, longest;
};

static void side_fini(struct side *s) {
    for (size_t i = 0; s->p && i < s->count; i++) ibid_free(s->p[i]);
    ibid_free(s->p);
    ibid_free(s->n);
}

static ibid_err side_init(struct side *s, const ibid_str *list, size_t n) {
    ibid_buf b;
    ibid_buf_init(&b, 64 << 20);
    *s = (struct side){ibid_calloc(n + 1, sizeof *s->p), ibid_calloc(n + 1, sizeof *s->n), 0, 0};
    ibid_err e = s->p && s->n ? IBID_OK : IBID_NOMEM;
    for (size_t i = 0; !e && i < n; i++) {
        ibid_buf_clear(&b);
        e = ibidi_eval_normal(IBIDI_NORM_KTRLF, list[i], &b);
        if (!e) e = ibidi_eval_points((ibid_str){b.data ? b.data : "", b.len}, &s->p[i], &s->n[i]);
        if (!e) s->count++;
        if (s->n[i] > s->longest) s->longest = s->n[i];
    }
    ibid_buf_fini(&b);
    return e;
}

static double harmonic(double p, double r) {
    return p + r > 0 ? 2 * p * r / (p + r) : 0;
}

static size_t same_strings(const struct side *f, const struct side *g, bool *taken) {
    size_t common = 0;
    memset(taken, 0, f->count * sizeof *taken);
    for (size_t i = 0; i < g->count; i++)
        for (size_t j = 0; j < f->count; j++)
            if (!taken[j] && f->n[j] == g->n[i] &&
                memcmp(f->p[j], g->p[i], g->n[i] * sizeof **g->p) == 0) {
                taken[j] = true;
                common++;
                break;
            }
    return common;
}

static void overlap(const struct side *f, const struct side *g, bool *taken, double *share,
                    size_t *work, double *precise, double *recalled) {
    memset(taken, 0, f->count * sizeof *taken);
    memset(share, 0, f->count * sizeof *share);
    *precise = *recalled = 0;
    for (size_t i = 0; i < g->count; i++) {
        size_t pick = f->count, most = 0;
        for (size_t j = 0; j < f->count; j++) {
            size_t c = ibidi_eval_common(g->p[i], g->n[i], f->p[j], f->n[j], work);
            double s = c ? (double)c / (double)f->n[j] : 0;
            if (s > share[j]) share[j] = s;
            if (!taken[j] && (pick == f->count || c >= most)) pick = j, most = c;
        }
        if (pick < f->count) taken[pick] = true;
        if (most) *recalled += (double)most / (double)g->n[i];
    }
    for (size_t j = 0; j < f->count; j++) *precise += share[j];
}

ibid_err ibidi_eval_spans(const ibid_str *found, size_t n_found, const ibid_str *gold,
                          size_t n_gold, ibidi_span_scores *out) {
    struct side f = {0}, g = {0};
    bool *taken = NULL;
    double *share = NULL, np = n_found ? (double)n_found : 1, ng = n_gold ? (double)n_gold : 1;
    size_t *work = NULL;
    *out = (ibidi_span_scores){0};
    if (n_found > SPANS_MAX || n_gold > SPANS_MAX)
        return ibid_fail(IBID_TOOBIG, "more than %d spans in one list", SPANS_MAX);
    ibid_err e = side_init(&f, found, n_found);
    if (!e) e = side_init(&g, gold, n_gold);
    if (e) goto done;
    taken = ibid_calloc(n_found + 1, sizeof *taken);
    share = ibid_calloc(n_found + 1, sizeof *share);
    work = ibid_calloc(2 * (f.longest + 1), sizeof *work);
    e = taken && share && work ? IBID_OK : IBID_NOMEM;
    if (e) goto done;
    double common = 1, p = 1, r = 1; /* nothing sought and nothing found */
    if (n_found + n_gold) {
        common = (double)same_strings(&f, &g, taken);
        overlap(&f, &g, taken, share, work, &p, &r);
    }
    *out = (ibidi_span_scores){.em_p = common / np,
                               .em_r = common / ng,
                               .em_f1 = harmonic(common / np, common / ng),
                               .overlap_p = p / np,
                               .overlap_r = r / ng,
                               .overlap_f1 = harmonic(p / np, r / ng)};
done:
    side_fini(&f);
    side_fini(&g);
    ibid_free(taken);
    ibid_free(share);
    ibid_free(work);
    return e;
}

/* ---- the capitalised phrases ---- */

static const char *const openers[] = {
    "the",   "a",     "an",    "in",       "on",     "at",     "of",   "and",   "but",
    "or",    "for",   "to",    "from",     "by",     "with",   "as",   "if",    "it",
    "its",   "he",    "she",   "they",     "we",     "i",      "you",  "this",  "that",
    "these", "those", "his",   "her",      "their",  "our",    "my",   "your",  "who",
    "what",  "when",  "where", "why",      "how",    "is",     "are",  "was",   "were",
    "be",    "not",   "no",    "so",       "then",   "there",  "here", "after", "before",
    "while", "since", "until", "although", "though", "because"};

static bool is_opener(ibid_str w) {
    for (size_t i = 0; i < sizeof openers / sizeof *openers; i++)
        if (strlen(openers[i]) == w.n && strncasecmp(openers[i], w.s, w.n) == 0) return true;
    return false;
}

static bool is_link(ibid_str w) {
    static const char *const links[] = {"of", "the", "and", "for", "de"};
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (strlen(links[i]) == w.n && memcmp(links[i], w.s, w.n) == 0) return true;
    return false;
}

/* The word that begins at byte i: letters, digits, apostrophes and hyphens. n 0: none begins there.
 */
static ibid_str word_at(ibid_str t, size_t i, bool *capital) {
    size_t end = i;
    *capital = false;
    while (end < t.n) {
        utf8proc_int32_t c = -1;
        utf8proc_ssize_t len = utf8proc_iterate((const utf8proc_uint8_t *)t.s + end,
                                                (utf8proc_ssize_t)(t.n - end), &c);
        if (len <= 0) break;
        utf8proc_category_t k = utf8proc_category(c);
        bool letter = (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_NO) || c == '_';
        if (!letter && (end == i || (c != '\'' && c != '-' && c != 0x2019))) break;
        if (end == i) *capital = k == UTF8PROC_CATEGORY_LU || k == UTF8PROC_CATEGORY_LT;
        end += (size_t)len;
    }
    return (ibid_str){t.s + i, end - i};
}

static size_t character(ibid_str t, size_t i) {
    utf8proc_int32_t c;
    utf8proc_ssize_t len =
        utf8proc_iterate((const utf8proc_uint8_t *)t.s + i, (utf8proc_ssize_t)(t.n - i), &c);
    return len > 0 ? (size_t)len : 1;
}

/* End of the phrase whose capitalised word ends at `end`. */
static size_t phrase_end(ibid_str t, size_t end) {
    for (bool capital; end + 1 < t.n && t.s[end] == ' ';) {
        ibid_str w = word_at(t, end + 1, &capital);
        size_t next = end + 1 + w.n;
        if (!capital) {
            if (!is_link(w) || next >= t.n || t.s[next] != ' ') break;
            w = word_at(t, next + 1, &capital);
            if (!capital) break;
            next += 1 + w.n;
        }
        end = next;
    }
    return end;
}

ibid_err ibidi_eval_capitalised(ibid_str text, ibid_str **out, size_t *n) {
    ibid_str *list = ibid_calloc(text.n / 2 + 1, sizeof *list); /* a word and what parts it */
    *out = NULL;
    *n = 0;
    if (!list) return IBID_NOMEM;
    for (size_t i = 0; i < text.n;) {
        bool capital;
        ibid_str w = word_at(text, i, &capital);
        if (!capital) {
            i += w.n ? w.n : character(text, i);
            continue;
        }
        size_t from = i, end = phrase_end(text, i + w.n);
        while (from < end && (w = word_at(text, from, &capital)).n && is_opener(w))
            from += w.n + (from + w.n < end);
        if (from < end) list[(*n)++] = (ibid_str){text.s + from, end - from};
        i = end;
    }
    *out = list;
    return IBID_OK;
}
