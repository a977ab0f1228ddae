#include "indexer/chunk.h"
#include "rpc/base/hash.h"

#include <string.h>

enum { LAST_MIN = 16 };

/* Kinds of places a chunk may end at, better ones higher. */
enum place { NOWHERE, ANYWHERE, WORD, LINE, SENTENCE, LINE_SENTENCE, PARAGRAPH, SECTION };

static bool is_blank(char c) {
    return c == ' ' || c == '\n' || c == '\t';
}

/* Bytes of the sentence mark that ends at p[n]: ASCII ones and the wide ones of CJK; 0 if none. */
static size_t sentence_mark(const char *p, size_t n) {
    if (n >= 1 && (p[n - 1] == '.' || p[n - 1] == '!' || p[n - 1] == '?')) return 1;
    if (n < 3) return 0;
    static const char *const wide[] = {"\xE3\x80\x82", "\xEF\xBC\x81", "\xEF\xBC\x9F",
                                       "\xEF\xBD\xA1", "\xE2\x80\xA6"};
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        if (memcmp(p + n - 3, wide[i], 3) == 0) return 3;
    return 0;
}

/* Skips closing quotes and brackets backwards from p[n]. */
static size_t before_closers(const char *p, size_t n) {
    for (;;) {
        if (n >= 1 && strchr("\"')]}*_", p[n - 1]) && p[n - 1])
            n--;
        else if (n >= 3 && (memcmp(p + n - 3, "\xE2\x80\x9D", 3) == 0 ||
                            memcmp(p + n - 3, "\xE2\x80\x99", 3) == 0 ||
                            memcmp(p + n - 3, "\xE3\x80\x8D", 3) == 0 ||
                            memcmp(p + n - 3, "\xC2\xBB", 2) == 0))
            n -= 3;
        else
            return n;
    }
}

/* Does the text up to n end a sentence, given what follows at n? "Dr. Smith", "e.g. this", "J. Doe"
 * and "3.5" do not. */
static bool ends_sentence(const char *p, size_t n, const char *next, size_t next_n) {
    size_t stop = before_closers(p, n), mark = sentence_mark(p, stop);
    if (!mark) return false;
    if (mark == 3) return true;
    size_t i = 0;
    while (i < next_n && is_blank(next[i])) i++;
    if (i == 0 && next_n > 0) return false; /* a wide script would use a wide mark */
    if (i < next_n && next[i] >= 'a' && next[i] <= 'z') return false;
    if (p[stop - 1] != '.') return true;
    size_t w = stop - 1;
    while (w > 0 && stop - w < 16 && ((p[w - 1] | 32) >= 'a' && (p[w - 1] | 32) <= 'z')) w--;
    size_t len = stop - 1 - w;
    bool dotted = w > 0 && p[w - 1] == '.';
    if (len == 1 || (dotted && len < 4)) return false; /* an initial, "e.g." */
    static const char *const titles[] = {"Dr", "Mr",  "Mrs", "Ms",  "Prof", "St",
                                         "vs", "etc", "No",  "Fig", "Eq",   "cf",
                                         "al", "Jr",  "Sr",  "Inc", "Vol",  "pp"};
    for (size_t k = 0; k < sizeof titles / sizeof *titles; k++)
        if (len == strlen(titles[k]) && memcmp(p + w, titles[k], len) == 0) return false;
    return true;
}

/* What kind of place the byte offset `at` is: the start of white space, or of text behind a line
 * feed. */
static enum place place_at(ibid_str t, uint64_t at, bool section) {
    const char *p = t.s;
    if (at >= t.n) return SECTION;
    if (((unsigned char)p[at] & 0xC0) == 0x80) return NOWHERE; /* inside a character */
    size_t back = at;
    while (back > 0 && at - back < 64 && is_blank(p[back - 1])) back--;
    size_t feeds = 0;
    for (size_t i = back; i < at; i++) feeds += p[i] == '\n';
    if (section && back < at) return SECTION;
    if (is_blank(p[at])) {
        if (feeds) return NOWHERE; /* in the middle of a gap: its end is better */
        size_t next = at;
        while (next < t.n && p[next] == ' ') next++;
        if (next < t.n && p[next] == '\n') return NOWHERE;
        return ends_sentence(p, at, p + at, t.n - at) ? SENTENCE : WORD;
    }
    if (feeds >= 2) return PARAGRAPH;
    bool sentence = back < at && ends_sentence(p, back, p + back, t.n - back);
    if (feeds == 1) return sentence ? LINE_SENTENCE : LINE;
    if (back == at && at > 0 && sentence_mark(p, at) == 3) return SENTENCE;
    /* Behind a space: some tokenizers keep spaces apart from words. */
    return back < at ? (sentence ? SENTENCE : WORD) : ANYWHERE;
}

/* A number that only the bytes around a place decide. */
static uint64_t place_hash(ibid_str t, uint64_t at) {
    uint64_t from = at > 48 ? at - 48 : 0, to = at + 48 < t.n ? at + 48 : t.n;
    return ibid_checksum(t.s + from, (size_t)(to - from));
}

struct cutter {
    ibid_str text;
    const uint64_t *ends;
    const ibid_locator *locators;
    size_t n, n_locators, locator, max;
    ibid_cut *cuts;
    size_t n_cuts, room;
};

static uint64_t token_start(const struct cutter *c, size_t i) {
    return i ? c->ends[i - 1] : 0;
}

static bool blank_token(const struct cutter *c, size_t i) {
    for (uint64_t b = token_start(c, i); b < c->ends[i]; b++)
        if (!is_blank(c->text.s[b])) return false;
    return true;
}

/* Does a locator start at this offset? Advances nothing: a binary search. */
static bool locator_at(const struct cutter *c, uint64_t at) {
    size_t lo = 0, hi = c->n_locators;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (c->locators[mid].at < at)
            lo = mid + 1;
        else
            hi = mid;
    }
    /* Only headings and pages begin sections; lines are everywhere. */
    return lo < c->n_locators && c->locators[lo].at == at && c->locators[lo].name.n > 0 &&
           c->locators[lo].name.s[0] != 'l';
}

/* The token the chunk that starts at `first` ends before. */
static size_t choose(const struct cutter *c, size_t first) {
    size_t left = c->n - first;
    if (left <= c->max) return c->n;
    size_t from = first + IBID_CHUNK_MIN, to = first + c->max;
    if (left < c->max + LAST_MIN) to = c->n - LAST_MIN; /* no crumb at the end */
    size_t best = to;
    enum place best_place = NOWHERE;
    uint64_t best_hash = 0;
    for (size_t i = from; i <= to; i++) {
        uint64_t at = c->ends[i - 1];
        enum place place = place_at(c->text, at, locator_at(c, at));
        if (place < best_place || place == NOWHERE) continue;
        uint64_t hash = place_hash(c->text, at);
        if (place > best_place || hash < best_hash) {
            best = i;
            best_place = place;
            best_hash = hash;
        }
    }
    return best;
}

static ibid_err add(struct cutter *c, size_t first, size_t end) {
    while (first < end && blank_token(c, first)) first++;
    while (end > first && blank_token(c, end - 1)) end--;
    if (first == end) return IBID_OK;
    if (c->n_cuts == c->room) {
        size_t room = c->room ? c->room * 2 : 16, bytes;
        if (!ibid_mul_size(room, sizeof *c->cuts, &bytes)) return IBID_NOMEM;
        ibid_cut *grown = ibid_realloc(c->cuts, bytes);
        if (!grown) return ibid_fail(IBID_NOMEM, "out of memory for %zu chunks", room);
        c->cuts = grown;
        c->room = room;
    }
    uint64_t start = token_start(c, first);
    /* A token may begin with white space; the place is that of its first visible byte. */
    uint64_t seen = start;
    while (seen < c->ends[end - 1] && is_blank(c->text.s[seen])) seen++;
    while (c->locator < c->n_locators && c->locators[c->locator].at <= seen) c->locator++;
    c->cuts[c->n_cuts++] =
        (ibid_cut){.start = start,
                   .end = c->ends[end - 1],
                   .token0 = first,
                   .n_tokens = end - first,
                   .locator = c->locator ? c->locators[c->locator - 1].name : (ibid_str){"", 0}};
    return IBID_OK;
}

ibid_err ibid_chunk_cut(ibid_str text, const uint64_t *ends, size_t n_tokens,
                        const ibid_locator *locators, size_t n_locators, size_t max_tokens,
                        ibid_cut **out, size_t *n_out) {
    struct cutter c = {.text = text,
                       .ends = ends,
                       .n = n_tokens,
                       .locators = locators,
                       .n_locators = n_locators,
                       .max = max_tokens};
    uint64_t last = 0;
    for (size_t i = 0; i < n_tokens; i++) {
        if (ends[i] <= last || ends[i] > text.n)
            return ibid_fail(IBID_INVAL, "token %zu does not continue the text", i);
        last = ends[i];
    }
    if (last != text.n || max_tokens < IBID_CHUNK_MIN + 16)
        return ibid_fail(IBID_INVAL, "the tokens do not cover the text, or chunks of %zu tokens",
                         max_tokens);
    ibid_err e = IBID_OK;
    for (size_t first = 0; !e && first < n_tokens;) {
        /* The count starts at the first visible token, so that it is the chunk's own size. */
        while (first < n_tokens && blank_token(&c, first)) first++;
        if (first == n_tokens) break;
        size_t end = choose(&c, first);
        e = add(&c, first, end);
        first = end;
    }
    if (e) {
        ibid_free(c.cuts);
        return e;
    }
    *out = c.cuts;
    *n_out = c.n_cuts;
    return IBID_OK;
}

/* The last place in [min, n) at which a slab may end by force: behind a line, a word, a character.
 */
static size_t forced_end(const char *p, size_t n) {
    for (size_t i = n; i > n / 2; i--)
        if (p[i - 1] == '\n' && p[i] != '\n') return i;
    for (size_t i = n; i > n / 2; i--)
        if (p[i] == ' ' && p[i - 1] != ' ') return i;
    size_t i = n;
    while (i > 1 && ((unsigned char)p[i] & 0xC0) == 0x80) i--;
    return i;
}

size_t ibid_chunk_slab(const char *p, size_t n) {
    if (n <= IBID_SLAB_MIN) return n;
    size_t most = n < IBID_SLAB_MAX ? n : IBID_SLAB_MAX;
    for (size_t i = IBID_SLAB_MIN; i < most; i++) {
        const char *lf = memchr(p + i, '\n', most - i);
        if (!lf) break;
        i = (size_t)(lf - p);
        /* Behind a blank line; one in 16 of them, chosen by the bytes before it. */
        if (i + 1 < n && p[i - 1] == '\n' && p[i + 1] != '\n' &&
            ibid_checksum(p + i - 33, 33) % 16 == 0)
            return i + 1;
    }
    return n <= IBID_SLAB_MAX ? n : forced_end(p, IBID_SLAB_MAX);
}

size_t ibid_chunk_title(ibid_str title, const uint64_t *ends, size_t n_tokens) {
    if (n_tokens <= IBID_TITLE_TOKENS) return title.n;
    size_t at = (size_t)ends[IBID_TITLE_TOKENS - 1];
    size_t word = at;
    while (word > 0 && !(word < title.n && is_blank(title.s[word]))) word--;
    if (word == 0) { /* one long word: between characters */
        word = at;
        while (word > 0 && ((unsigned char)title.s[word] & 0xC0) == 0x80) word--;
    }
    while (word > 0 && is_blank(title.s[word - 1])) word--;
    return word;
}
