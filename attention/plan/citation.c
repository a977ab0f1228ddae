#include "attention/plan/citation.h"
#include "rpc/base/mem.h"

#include <ctype.h>
#include <math.h>
#include <string.h>
#include <strings.h>

enum { QUOTES_DEFAULT = 3, QUOTE_BYTES_DEFAULT = 300, WORDS_MAX = 1024 };

/* How much the two witnesses count, and which share of the best quote's weight a further one needs.
 */
static const double attention_weight = 0.5, question_word = 0.25, further_share = 0.45;

/* ---- Words ---- */

typedef struct word {
    const char *s;
    size_t n;
    double weight;
} word;

static bool is_word(char c) {
    return isalnum((unsigned char)c) || (c & 0x80);
}

/* The next word at or after *at; a dot or comma between digits belongs to its number. */
static bool next_word(const char *t, size_t n, size_t *at, word *out) {
    while (*at < n && !is_word(t[*at])) ++*at;
    size_t start = *at;
    while (*at < n && (is_word(t[*at]) ||
                       ((t[*at] == '.' || t[*at] == ',') && *at > start && *at + 1 < n &&
                        isdigit((unsigned char)t[*at - 1]) && isdigit((unsigned char)t[*at + 1]))))
        ++*at;
    *out = (word){.s = t + start, .n = *at - start};
    return out->n > 0;
}

static bool same_word(const word *a, const word *b) {
    return a->n == b->n && strncasecmp(a->s, b->s, a->n) == 0;
}

/* Same, or one is the other with a short ending: "tower" and "towers". */
static bool kindred(const word *a, const word *b) {
    const word *s = a->n <= b->n ? a : b, *l = a->n <= b->n ? b : a;
    if (same_word(a, b)) return true;
    return s->n >= 4 && l->n - s->n <= 2 && !isdigit((unsigned char)s->s[0]) &&
           strncasecmp(s->s, l->s, s->n) == 0;
}

static bool text_has(const char *t, size_t n, const word *w) {
    word x;
    for (size_t at = 0; next_word(t, n, &at, &x);)
        if (kindred(&x, w)) return true;
    return false;
}

static bool common_word(const word *w) {
    static const char *const words[] = {
        "a",    "an",    "and",  "are",  "as",   "at",  "be",   "by",   "for", "from",
        "had",  "has",   "have", "he",   "her",  "his", "in",   "is",   "it",  "its",
        "of",   "on",    "or",   "she",  "that", "the", "they", "this", "to",  "was",
        "were", "which", "who",  "with", "not",  "no",  "yes",  "their"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (w->n == strlen(words[i]) && strncasecmp(w->s, words[i], w->n) == 0) return true;
    return false;
}

/* The answer's distinct words, each weighted by its rarity among the blocks; words of the question
 * count for a quarter. */
static size_t answer_words(const char *answer, size_t n_answer, const char *question,
                           size_t n_question, const ibid_cite_block *blocks, size_t n_blocks,
                           word *out) {
    size_t n = 0;
    word w;
    for (size_t at = 0; n < WORDS_MAX && next_word(answer, n_answer, &at, &w);) {
        bool seen = common_word(&w);
        for (size_t i = 0; i < n && !seen; i++) seen = same_word(&out[i], &w);
        if (seen) continue;
        size_t holders = 0;
        for (size_t b = 0; b < n_blocks; b++)
            holders += text_has(blocks[b].text, blocks[b].n_text, &w);
        w.weight = log(1 + (double)(n_blocks + 1) / (double)(holders + 1)) + 0.3;
        if (isdigit((unsigned char)w.s[0]) || isupper((unsigned char)w.s[0])) w.weight *= 1.5;
        if (text_has(question, n_question, &w)) w.weight *= question_word;
        out[n++] = w;
    }
    return n;
}

/* ---- Sentences ---- */

size_t ibid_sentence_end(const char *text, size_t n, size_t from) {
    for (size_t i = from; i < n; i++) {
        char c = text[i];
        if (c == '\n' && (i + 1 >= n || text[i + 1] == '\n')) return i;
        if (c != '.' && c != '!' && c != '?') continue;
        size_t end = i + 1;
        while (end < n && strchr("\"')]", text[end]) && text[end]) end++;
        while (end + 2 < n && memcmp(text + end, "\xE2\x80\x9D", 3) == 0) end += 3;
        if (end < n && !isspace((unsigned char)text[end])) continue;
        bool initial = c == '.' && i > from && isupper((unsigned char)text[i - 1]) &&
                       (i - from == 1 || !is_word(text[i - 2]));
        if (!initial) return end;
    }
    return n;
}

static size_t skip_space(const char *t, size_t n, size_t at) {
    while (at < n && isspace((unsigned char)t[at])) at++;
    return at;
}

static double overlap(const char *t, size_t n, const word *words, size_t n_words) {
    double sum = 0;
    for (size_t i = 0; i < n_words; i++)
        if (text_has(t, n, &words[i])) sum += words[i].weight;
    return sum;
}

/* Attention mass of the tokens that end in (start, end]. */
static double mass_between(const ibid_cite_block *b, size_t start, size_t end) {
    double sum = 0;
    for (size_t i = 0; b->mass && i < b->n_tokens; i++)
        if (b->ends[i] > start && b->ends[i] <= end) sum += b->mass[i];
    return sum;
}

static bool utf8_inside(const char *t, size_t n, size_t at) {
    return at < n && (t[at] & 0xC0) == 0x80;
}

/* Where a window of at most `limit` bytes from `from` ends: after a whole word where there is one.
 */
static size_t window_end(const ibid_cite_block *b, size_t from, size_t stop, size_t limit) {
    const char *t = b->text;
    if (stop - from <= limit) return stop;
    size_t end = from + limit, back = end;
    while (back > from && is_word(t[back - 1]) && is_word(t[back])) back--;
    if (back > from) end = back;
    while (end > from && utf8_inside(t, b->n_text, end)) end--;
    while (end > from && isspace((unsigned char)t[end - 1])) end--;
    return end;
}

/* Cuts a sentence that is too long to the window, from word to word, that holds the most weight. */
static void cut(const ibid_cite_block *b, const word *words, size_t n_words, size_t limit,
                ibid_cite *c) {
    if (c->end - c->start <= limit) return;
    const char *t = b->text;
    size_t start = c->start, end = window_end(b, c->start, c->end, limit);
    double most = -1;
    word w;
    for (size_t at = c->start; next_word(t, c->end, &at, &w);) {
        size_t from = (size_t)(w.s - t), to = window_end(b, from, c->end, limit);
        double sum =
            overlap(t + from, to - from, words, n_words) + 1e-6 * mass_between(b, from, to);
        if (sum > most) {
            most = sum;
            start = from;
            end = to;
        }
        if (to == c->end) break;
    }
    c->start = start;
    c->end = end;
}

/* ---- Choice ---- */

struct pool {
    ibid_cite *items;
    size_t n, room;
};

static ibid_err add(struct pool *p, ibid_cite c) {
    if (p->n == p->room) {
        size_t room = p->room ? 2 * p->room : 64;
        ibid_cite *items = ibid_realloc(p->items, room * sizeof *items);
        if (!items) return ibid_fail(IBID_NOMEM, "out of memory for citations");
        p->items = items;
        p->room = room;
    }
    p->items[p->n++] = c;
    return IBID_OK;
}

/* All sentences of one block with their weight: overlap as a share of all the answer's weight,
 * times a factor that grows with their share of the attention. */
static ibid_err weigh(const ibid_cite_block *blocks, size_t index, const word *words,
                      size_t n_words, double all_words, double all_mass, struct pool *p) {
    const ibid_cite_block *b = &blocks[index];
    ibid_err e = IBID_OK;
    for (size_t at = skip_space(b->text, b->n_text, 0); !e && at < b->n_text;) {
        size_t end = ibid_sentence_end(b->text, b->n_text, at);
        if (end <= at) end = at + 1;
        double shared = overlap(b->text + at, end - at, words, n_words) / all_words;
        double seen = all_mass > 0 ? mass_between(b, at, end) / all_mass : 0;
        size_t stop = end;
        while (stop > at && isspace((unsigned char)b->text[stop - 1])) stop--;
        if (shared > 0 && stop > at)
            e = add(p, (ibid_cite){index, at, stop,
                                   shared * (1 - attention_weight + 2 * attention_weight * seen)});
        at = skip_space(b->text, b->n_text, end);
    }
    return e;
}

/* Words that a chosen quote holds are covered: a further quote must bring others. */
static double uncovered(const ibid_cite_block *b, const ibid_cite *c, const word *words,
                        size_t n_words, const bool *covered) {
    double fresh = 0, all = 0;
    for (size_t i = 0; i < n_words; i++) {
        if (!text_has(b->text + c->start, c->end - c->start, &words[i])) continue;
        all += words[i].weight;
        if (!covered[i]) fresh += words[i].weight;
    }
    return all > 0 ? fresh / all : 0;
}

ibid_err ibid_cite_choose(const char *answer, size_t n_answer, const char *question,
                          size_t n_question, const ibid_cite_block *blocks, size_t n_blocks,
                          const ibid_cite_options *o, ibid_cite *out, size_t *n_out) {
    size_t max = o && o->max_quotes ? o->max_quotes : QUOTES_DEFAULT;
    size_t limit = o && o->quote_bytes ? o->quote_bytes : QUOTE_BYTES_DEFAULT;
    struct pool p = {0};
    bool covered[WORDS_MAX] = {false};
    double all_words = 0, all_mass = 0, first = 0;
    ibid_err e = IBID_OK;
    *n_out = 0;
    word *words = ibid_calloc(WORDS_MAX, sizeof *words);
    if (!words) return ibid_fail(IBID_NOMEM, "out of memory for citations");
    size_t n_words = answer_words(answer, n_answer, question, n_question, blocks, n_blocks, words);
    for (size_t i = 0; i < n_words; i++) all_words += words[i].weight;
    for (size_t b = 0; b < n_blocks; b++) all_mass += mass_between(&blocks[b], 0, blocks[b].n_text);
    for (size_t b = 0; b < n_blocks && n_words && !e; b++)
        e = weigh(blocks, b, words, n_words, all_words, all_mass, &p);
    while (!e && *n_out < max) {
        size_t best = p.n;
        double most = 0;
        for (size_t i = 0; i < p.n; i++) {
            const ibid_cite_block *b = &blocks[p.items[i].block];
            double w = p.items[i].weight *
                       (*n_out ? uncovered(b, &p.items[i], words, n_words, covered) : 1);
            if (w > most) {
                most = w;
                best = i;
            }
        }
        if (best == p.n || (*n_out && most < further_share * first)) break;
        ibid_cite c = p.items[best];
        p.items[best].weight = 0;
        if (*n_out == 0) first = most;
        const ibid_cite_block *b = &blocks[c.block];
        cut(b, words, n_words, limit, &c);
        if (c.end == c.start) continue;
        for (size_t i = 0; i < n_words; i++)
            covered[i] |= text_has(b->text + c.start, c.end - c.start, &words[i]);
        c.weight = most;
        out[(*n_out)++] = c;
    }
    ibid_free(words);
    ibid_free(p.items);
    return e;
}
