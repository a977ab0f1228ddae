#include "rpc/front/eval/text.h"

#include <string.h>
#include <utf8proc.h>

enum { TEXT_MAX = 64 << 20 };

static bool is_space(int32_t c) {
    if (c == ' ' || (c >= '\t' && c <= '\r') || (c >= 0x1C && c <= 0x1F) || c == 0x85) return true;
    utf8proc_category_t k = utf8proc_category(c);
    return k == UTF8PROC_CATEGORY_ZS || k == UTF8PROC_CATEGORY_ZL || k == UTF8PROC_CATEGORY_ZP;
}

static bool is_ascii_punctuation(int32_t c) {
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
           (c >= '{' && c <= '~');
}

static bool is_punctuation(ibidi_norm how, int32_t c) {
    if (is_ascii_punctuation(c)) return true;
    if (how == IBIDI_NORM_KTRLF || c < 0x80) return false;
    utf8proc_category_t k = utf8proc_category(c);
    return k >= UTF8PROC_CATEGORY_PC && k <= UTF8PROC_CATEGORY_PO;
}

/* Scripts written without spaces between words: Thai, Lao, Khmer, Myanmar, kana, Han, and what lies
 * between the last two. Hangul has spaces. */
static bool is_spaceless(int32_t c) {
    return (c >= 0x0E00 && c <= 0x0EFF) || (c >= 0x1000 && c <= 0x109F) ||
           (c >= 0x1780 && c <= 0x17FF) || (c >= 0x2E80 && c <= 0x312F) ||
           (c >= 0x3190 && c <= 0x9FFF) || (c >= 0xF900 && c <= 0xFAFF) ||
           (c >= 0x20000 && c <= 0x3FFFF);
}

ibid_err ibidi_eval_points(ibid_str text, int32_t **out, size_t *n) {
    *out = NULL;
    *n = 0;
    size_t bytes = 0;
    if (text.n > TEXT_MAX || !ibid_mul_size(text.n + 1, sizeof(int32_t), &bytes))
        return ibid_fail(IBID_TOOBIG, "a text of %zu bytes is too long to be measured", text.n);
    int32_t *p = ibid_alloc(bytes);
    if (!p) return IBID_NOMEM;
    const utf8proc_uint8_t *s = (const utf8proc_uint8_t *)text.s;
    for (size_t i = 0; i < text.n;) {
        utf8proc_int32_t c = -1;
        utf8proc_ssize_t len = utf8proc_iterate(s + i, (utf8proc_ssize_t)(text.n - i), &c);
        if (len > 0) p[(*n)++] = c;
        i += len > 0 ? (size_t)len : 1;
    }
    *out = p;
    return IBID_OK;
}

static bool is_article(const int32_t *w, size_t n) {
    return (n == 1 && w[0] == 'a') || (n == 2 && w[0] == 'a' && w[1] == 'n') ||
           (n == 3 && w[0] == 't' && w[1] == 'h' && w[2] == 'e');
}

static ibid_err put_word(const int32_t *w, size_t n, ibid_buf *out, size_t start) {
    if (n == 0 || is_article(w, n)) return IBID_OK;
    ibid_err e = out->len > start ? ibid_buf_puts(out, " ") : IBID_OK;
    for (size_t i = 0; !e && i < n; i++) {
        utf8proc_uint8_t b[4];
        utf8proc_ssize_t len = utf8proc_encode_char(w[i], b);
        e = ibid_buf_append(out, b, (size_t)len);
    }
    return e;
}

/* A regular expression's \b lies between word and other characters; after the punctuation is gone,
 * what is neither space nor word is a symbol or a mark, and an article beside one stays as it is
 * here: rare, and the same for both sides of a comparison. */
ibid_err ibidi_eval_normal(ibidi_norm how, ibid_str text, ibid_buf *out) {
    int32_t *p = NULL;
    size_t n = 0, kept = 0, word = 0, start = out->len;
    ibid_err e = ibidi_eval_points(text, &p, &n);
    for (size_t i = 0; !e && i < n; i++) {
        int32_t c = utf8proc_tolower(p[i]);
        if (!is_punctuation(how, c)) p[kept++] = c;
    }
    for (size_t i = 0; !e && i <= kept; i++) {
        if (i < kept && !is_space(p[i])) continue;
        e = put_word(p + word, i - word, out, start);
        word = i + 1;
    }
    ibid_free(p);
    return e;
}

size_t ibidi_eval_word_count(ibid_str text) {
    int32_t *p = NULL;
    size_t n = 0, words = 0;
    bool inside = false;
    if (ibidi_eval_points(text, &p, &n) != IBID_OK) return 0;
    for (size_t i = 0; i < n; i++) {
        bool alone = is_spaceless(p[i]), space = is_space(p[i]);
        words += alone || (!space && !inside);
        inside = !space && !alone;
    }
    ibid_free(p);
    return words;
}

/* ---- words of a normalised text, by their places in its code points ---- */

struct words {
    int32_t *p;
    size_t *at, *len, n;
};

static void words_fini(struct words *w) {
    ibid_free(w->p);
    ibid_free(w->at);
    *w = (struct words){0};
}

static ibid_err words_of(ibid_str text, struct words *w) {
    ibid_buf b;
    size_t n = 0;
    *w = (struct words){0};
    ibid_buf_init(&b, TEXT_MAX);
    ibid_err e = ibidi_eval_normal(IBIDI_NORM_SQUAD, text, &b);
    if (!e) e = ibidi_eval_points((ibid_str){b.data ? b.data : "", b.len}, &w->p, &n);
    if (!e && !(w->at = ibid_calloc(2 * n + 2, sizeof(size_t)))) e = IBID_NOMEM;
    w->len = w->at ? w->at + n + 1 : NULL;
    for (size_t i = 0; !e && i < n;) {
        if (w->p[i] == ' ') {
            i++;
            continue;
        }
        size_t end = i + 1;
        while (!is_spaceless(w->p[i]) && end < n && w->p[end] != ' ' && !is_spaceless(w->p[end]))
            end++;
        w->at[w->n] = i;
        w->len[w->n++] = end - i;
        i = end;
    }
    ibid_buf_fini(&b);
    if (e) words_fini(w);
    return e;
}

static bool same_word(const struct words *a, size_t i, const struct words *b, size_t j) {
    return a->len[i] == b->len[j] &&
           memcmp(a->p + a->at[i], b->p + b->at[j], a->len[i] * sizeof *a->p) == 0;
}

/* How many words of b find one of their own in a; each word of a is used once. */
static ibid_err shared_words(const struct words *a, const struct words *b, size_t *out) {
    bool *used = ibid_calloc(a->n + 1, sizeof *used);
    *out = 0;
    if (!used) return IBID_NOMEM;
    for (size_t j = 0; j < b->n; j++)
        for (size_t i = 0; i < a->n; i++)
            if (!used[i] && same_word(a, i, b, j)) {
                used[i] = true;
                ++*out;
                break;
            }
    ibid_free(used);
    return IBID_OK;
}

static bool holds(const struct words *a, const struct words *gold) {
    for (size_t i = 0; gold->n && i + gold->n <= a->n; i++) {
        size_t k = 0;
        while (k < gold->n && same_word(a, i + k, gold, k)) k++;
        if (k == gold->n) return true;
    }
    return false;
}

ibid_err ibidi_eval_qa(ibid_str answer, ibid_str gold, ibidi_qa_scores *out) {
    struct words a, g = {0};
    size_t shared = 0;
    ibid_err e = words_of(answer, &a);
    if (!e) e = words_of(gold, &g);
    if (!e) e = shared_words(&a, &g, &shared);
    *out = (ibidi_qa_scores){0};
    if (!e) {
        bool contains = holds(&a, &g);
        out->contains = contains;
        out->exact = a.n == g.n && (contains || a.n == 0);
        if (a.n + g.n == 0) out->f1 = 1;
        if (shared) out->f1 = 2.0 * (double)shared / (double)(a.n + g.n);
    }
    words_fini(&a);
    words_fini(&g);
    return e;
}

ibid_err ibidi_eval_qa_best(ibid_str answer, const ibid_str *golds, size_t n,
                            ibidi_qa_scores *out) {
    ibid_err e = IBID_OK;
    *out = (ibidi_qa_scores){0};
    for (size_t i = 0; !e && i < n; i++) {
        ibidi_qa_scores one;
        e = ibidi_eval_qa(answer, golds[i], &one);
        if (one.exact > out->exact) out->exact = one.exact;
        if (one.f1 > out->f1) out->f1 = one.f1;
        if (one.contains > out->contains) out->contains = one.contains;
    }
    return e;
}
