#include "retriever/words.h"

#include "rpc/base/mem.h"

#include <libstemmer.h>
#include <string.h>
#include <unicode/uscript.h>
#include <utf8proc.h>

enum {
    PARTS_MAX = 8,        /* words joined by connectors that still make one code */
    RUN_BYTES = 4096,     /* of a run of characters without spaces handled at once */
    FOLD_ROOM = 4 * 1024, /* code points of one folded piece */
    JOINED_MAX = IBIDI_WORD_MAX * 2
};

struct ibidi_words {
    struct sb_stemmer *stemmer;
    utf8proc_int32_t points[FOLD_ROOM];
};

typedef struct walk {
    ibidi_words *w;
    const char *text;
    size_t n;
    bool query;
    int (*fn)(void *, const ibidi_word *);
    void *arg;
} walk;

/* Sorted. Function words of English questions: they match everywhere and decide nothing. */
static const char *const stop_words[] = {
    "a",     "about", "after", "all",    "also",  "an",      "and",    "any",   "are",   "as",
    "at",    "be",    "been",  "before", "being", "between", "both",   "but",   "by",    "can",
    "could", "did",   "do",    "does",   "for",   "from",    "had",    "has",   "have",  "he",
    "her",   "here",  "him",   "his",    "how",   "i",       "if",     "in",    "into",  "is",
    "it",    "its",   "me",    "more",   "most",  "my",      "no",     "nor",   "not",   "of",
    "on",    "one",   "or",    "other",  "our",   "she",     "should", "so",    "some",  "such",
    "than",  "that",  "the",   "their",  "them",  "then",    "there",  "these", "they",  "this",
    "those", "to",    "us",    "was",    "we",    "were",    "what",   "when",  "where", "which",
    "while", "who",   "whom",  "whose",  "why",   "will",    "with",   "would", "you",   "your"};

static bool is_stop(const char *s, size_t n) {
    size_t lo = 0, hi = sizeof stop_words / sizeof *stop_words;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2, m = strlen(stop_words[mid]);
        int c = memcmp(s, stop_words[mid], n < m ? n : m);
        if (c == 0 && n == m) return true;
        if (c < 0 || (c == 0 && n < m))
            hi = mid;
        else
            lo = mid + 1;
    }
    return false;
}

ibid_err ibidi_words_open(ibidi_words **out) {
    ibidi_words *w = ibid_calloc(1, sizeof *w);
    if (!w) return ibid_fail(IBID_NOMEM, "out of memory for a word splitter");
    w->stemmer = sb_stemmer_new("english", NULL);
    if (!w->stemmer) {
        ibid_free(w);
        return ibid_fail(IBID_NOMEM, "the English stemmer of libstemmer did not start");
    }
    *out = w;
    return IBID_OK;
}

void ibidi_words_close(ibidi_words *w) {
    if (!w) return;
    sb_stemmer_delete(w->stemmer);
    ibid_free(w);
}

/* ---- Classes of characters ---- */
typedef enum kind { SPACE, LETTER, DIGIT, UNSPACED, MARK, SYMBOL, SILENT } kind;

static bool unspaced(int32_t c) {
    static const UScriptCode scripts[] = {USCRIPT_HAN,    USCRIPT_HIRAGANA, USCRIPT_KATAKANA,
                                          USCRIPT_HANGUL, USCRIPT_BOPOMOFO, USCRIPT_THAI,
                                          USCRIPT_LAO,    USCRIPT_KHMER,    USCRIPT_MYANMAR};
    if (c < 0x0E00) return false;
    for (size_t i = 0; i < sizeof scripts / sizeof *scripts; i++)
        if (uscript_hasScript(c, scripts[i])) return true;
    return false;
}

static kind ascii_kind(int32_t c) {
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return LETTER;
    return c >= '0' && c <= '9' ? DIGIT : SPACE;
}

static kind kind_of(int32_t c) {
    if (c < 0x80) return ascii_kind(c);
    if (c >= 0x1F3FB && c <= 0x1F3FF) return MARK; /* skin tones belong to the emoji before */
    switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
        return unspaced(c) ? UNSPACED : LETTER;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
        return unspaced(c) ? UNSPACED : DIGIT;
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
        return MARK;
    case UTF8PROC_CATEGORY_SO:
    case UTF8PROC_CATEGORY_SC:
    case UTF8PROC_CATEGORY_SM:
        return SYMBOL;
    case UTF8PROC_CATEGORY_CF:
        return SILENT; /* soft hyphen, joiners */
    default:
        return SPACE;
    }
}

/* Code point at i; its length, or 1 with *c = -1 for a byte that is not UTF-8. */
static size_t point_at(const char *s, size_t n, size_t i, int32_t *c) {
    if ((unsigned char)s[i] < 0x80) return *c = s[i], 1;
    utf8proc_ssize_t k =
        utf8proc_iterate((const utf8proc_uint8_t *)s + i, (utf8proc_ssize_t)(n - i), c);
    if (k > 0) return (size_t)k;
    *c = -1;
    return 1;
}

static kind kind_at(const walk *k, size_t i, size_t *len) {
    int32_t c;
    *len = point_at(k->text, k->n, i, &c);
    return c < 0 ? SPACE : kind_of(c);
}

/* ---- Folding ---- */
static bool dropped_mark(int32_t c) {
    return (c >= 0x0300 && c <= 0x036F) || (c >= 0x0591 && c <= 0x05C7) ||
           (c >= 0x064B && c <= 0x065F) || c == 0x0670 || (c >= 0xFE00 && c <= 0xFE0F);
}

/* NFKC case folding without diacritics, into out [room]; cut at a whole character. */
static size_t fold(ibidi_words *w, const char *s, size_t n, char *out, size_t room) {
    size_t len = 0;
    bool ascii = true;
    for (size_t i = 0; i < n && ascii; i++) ascii = (unsigned char)s[i] < 0x80;
    if (ascii) {
        for (; len < n && len < room; len++)
            out[len] = (char)(s[len] >= 'A' && s[len] <= 'Z' ? s[len] + 32 : s[len]);
        return len;
    }
    const utf8proc_option_t how = UTF8PROC_COMPAT | UTF8PROC_DECOMPOSE | UTF8PROC_CASEFOLD |
                                  UTF8PROC_IGNORE | UTF8PROC_STABLE;
    utf8proc_ssize_t k = utf8proc_decompose((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n,
                                            w->points, FOLD_ROOM, how);
    if (k <= 0 || k > FOLD_ROOM) return 0;
    utf8proc_ssize_t kept = 0;
    for (utf8proc_ssize_t i = 0; i < k; i++)
        if (!dropped_mark(w->points[i])) w->points[kept++] = w->points[i];
    kept = utf8proc_normalize_utf32(w->points, kept, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    for (utf8proc_ssize_t i = 0; i < kept; i++) {
        utf8proc_uint8_t b[4];
        size_t m = (size_t)utf8proc_encode_char(w->points[i], b);
        if (len + m > room) break;
        memcpy(out + len, b, m);
        len += m;
    }
    return len;
}

/* ---- Giving words ---- */
static int give(const walk *k, const char *s, size_t n, size_t start, size_t end, bool extra,
                bool stop) {
    if (n == 0) return 0;
    if (n > IBIDI_WORD_MAX) {
        n = IBIDI_WORD_MAX;
        while (n > 0 && ((unsigned char)s[n] & 0xC0) == 0x80) n--;
    }
    ibidi_word word = {s, n, start, end, extra, stop};
    return k->fn(k->arg, &word);
}

static bool all_letters(const char *s, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!((s[i] >= 'a' && s[i] <= 'z') || s[i] == '\'')) return false;
    return true;
}

/* A folded word without connectors, stemmed if it is English-looking. */
static int give_stemmed(const walk *k, const char *s, size_t n, size_t start, size_t end,
                        bool extra) {
    bool stop = is_stop(s, n);
    if (n >= 3 && n <= IBIDI_WORD_MAX && all_letters(s, n)) {
        const sb_symbol *stem = sb_stemmer_stem(k->w->stemmer, (const sb_symbol *)s, (int)n);
        if (stem)
            return give(k, (const char *)stem, (size_t)sb_stemmer_length(k->w->stemmer), start, end,
                        extra, stop);
    }
    return give(k, s, n, start, end, extra, stop);
}

static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

/* A folded word; one that mixes ASCII letters and digits also in its parts. */
static int give_word(const walk *k, const char *s, size_t n, size_t start, size_t end, bool extra) {
    bool digit = false, other = false;
    for (size_t i = 0; i < n; i++)
        if (is_digit(s[i]))
            digit = true;
        else
            other = true;
    int stop = give_stemmed(k, s, n, start, end, extra);
    if (stop || !digit || !other || n > 32) return stop;
    for (size_t i = 0, j; i < n && !stop; i = j) {
        for (j = i + 1; j < n && is_digit(s[j]) == is_digit(s[i]); j++) {
        }
        stop = give_stemmed(k, s + i, j - i, start, end, true);
    }
    return stop;
}

/* ---- Words joined by connectors: codes, names, contractions ---- */
typedef struct part {
    size_t start, end; /* source bytes */
    char join;         /* the connector after it, 0 for the last */
} part;

/* The connector at i, as one ASCII character, or 0. Typographic forms count as the plain ones. */
static char connector(const walk *k, size_t i, size_t *len) {
    int32_t c;
    if (i >= k->n) return 0;
    *len = point_at(k->text, k->n, i, &c);
    if (c == 0x2019 || c == 0x02BC) return '\'';
    if (c == 0x2010 || c == 0x2011) return '-';
    return c > 0 && c < 0x80 && strchr("-._/:@&+',", (int)c) ? (char)c : 0;
}

static bool word_kind(kind c) {
    return c == LETTER || c == DIGIT;
}

static size_t part_end(const walk *k, size_t i) {
    while (i < k->n) {
        size_t len;
        kind c = kind_at(k, i, &len);
        if (!word_kind(c) && c != MARK && c != SILENT) break;
        i += len;
    }
    return i;
}

/* "1,000": one to three digits, a comma at `comma`, three digits and no more. */
static bool thousands(const walk *k, size_t start, size_t comma) {
    size_t digits = 0;
    if (comma - start > 3 || comma + 3 >= k->n) return false;
    for (size_t i = start; i < comma; i++)
        if (!is_digit(k->text[i])) return false;
    while (comma + 1 + digits < k->n && is_digit(k->text[comma + 1 + digits])) digits++;
    return digits == 3;
}

/* Collects the parts of a compound that starts at i; returns its end. */
static size_t compound(const walk *k, size_t i, part *parts, size_t *n_parts) {
    *n_parts = 0;
    for (;;) {
        size_t end = part_end(k, i), len = 0, next_len;
        parts[(*n_parts)++] = (part){i, end, 0};
        if (*n_parts == PARTS_MAX) return end;
        char join = connector(k, end, &len);
        if (!join || end + len >= k->n || !word_kind(kind_at(k, end + len, &next_len))) return end;
        if (join == ',' && !thousands(k, i, end)) return end;
        parts[*n_parts - 1].join = join;
        i = end + len;
    }
}

typedef struct joined {
    char s[JOINED_MAX];
    size_t n;
} joined;

static void join_add(joined *j, const char *s, size_t n) {
    if (n > JOINED_MAX - j->n) n = JOINED_MAX - j->n;
    memcpy(j->s + j->n, s, n);
    j->n += n;
}

static bool contraction(const char *s, size_t n) {
    return (n == 1 && (*s == 't' || *s == 'd' || *s == 'm')) ||
           (n == 2 &&
            (memcmp(s, "re", 2) == 0 || memcmp(s, "ve", 2) == 0 || memcmp(s, "ll", 2) == 0));
}

/* All connectors are commas between groups of three digits: one number. */
static bool is_number(const part *p, size_t n) {
    for (size_t i = 0; i + 1 < n; i++)
        if (p[i].join != ',') return false;
    return n > 1;
}

/* Hyphens vanish ("X-15" is x15, "e-mail" email) unless digits stand on both sides; so do
 * apostrophes; the others stay, because "1.5" is not "15". */
static void join_mark(joined *j, const walk *k, const part *p, char next) {
    bool digits = is_digit(k->text[p->end - 1]) && is_digit(next);
    if (p->join == '\'' || p->join == ',' || (p->join == '-' && !digits)) return;
    join_add(j, &p->join, 1);
}

static int give_compound(const walk *k, part *p, size_t n) {
    char folded[PARTS_MAX][IBIDI_WORD_MAX];
    size_t len[PARTS_MAX];
    joined whole = {.n = 0};
    for (size_t i = 0; i < n; i++)
        len[i] = fold(k->w, k->text + p[i].start, p[i].end - p[i].start, folded[i], IBIDI_WORD_MAX);
    /* "Watson's" is "watson", "don't" one word. */
    if (n > 1 && p[n - 2].join == '\'') {
        size_t last = n - 1;
        bool own = len[last] == 1 && folded[last][0] == 's';
        if (own || (n == 2 && contraction(folded[last], len[last]))) {
            if (!own && len[0] + 1 + len[1] <= IBIDI_WORD_MAX) {
                folded[0][len[0]] = '\'';
                memcpy(folded[0] + len[0] + 1, folded[1], len[1]);
                len[0] += 1 + len[1];
            }
            p[last - 1].join = 0;
            n--;
        }
    }
    for (size_t i = 0; i < n; i++) {
        join_add(&whole, folded[i], len[i]);
        if (i + 1 < n) join_mark(&whole, k, &p[i], k->text[p[i + 1].start]);
    }
    size_t start = p[0].start, end = p[n - 1].end;
    if (n == 1 || is_number(p, n)) return give_word(k, whole.s, whole.n, start, end, false);
    int stop = give(k, whole.s, whole.n, start, end, true, false);
    for (size_t i = 0; i < n && !stop; i++)
        stop = give_word(k, folded[i], len[i], p[i].start, p[i].end, false);
    return stop;
}

/* "C++", "C#": the whole as another form of the word. */
static int give_suffixed(const walk *k, size_t start, size_t end, size_t *next) {
    size_t i = end;
    while (i < k->n && i - end < 2 && (k->text[i] == '+' || k->text[i] == '#')) i++;
    if (i == end || end - start > 3 || (k->text[end] == '+' && i - end != 2)) return 0;
    char s[8];
    size_t n = fold(k->w, k->text + start, end - start, s, 4);
    memcpy(s + n, k->text + end, i - end);
    *next = i;
    return give(k, s, n + (i - end), start, i, true, false);
}

static int word_run(const walk *k, size_t i, size_t *next) {
    part parts[PARTS_MAX];
    size_t n;
    *next = compound(k, i, parts, &n);
    int stop = give_compound(k, parts, n);
    if (!stop && n == 1) stop = give_suffixed(k, parts[0].start, parts[0].end, next);
    return stop;
}

/* ---- Runs of characters without spaces ---- */
static size_t unit_at(const char *s, size_t n, size_t i) {
    int32_t c;
    size_t len = point_at(s, n, i, &c);
    while (i + len < n) { /* with its marks */
        size_t m = point_at(s, n, i + len, &c);
        if (c < 0 || kind_of(c) != MARK) break;
        len += m;
    }
    return len;
}

static int unspaced_run(const walk *k, size_t i, size_t *next) {
    size_t end = i, len;
    for (kind c; end < k->n && end - i < RUN_BYTES; end += len) {
        c = kind_at(k, end, &len);
        if (c != UNSPACED && c != MARK && c != SILENT) break;
    }
    *next = end;
    char run[RUN_BYTES + 64];
    size_t n = fold(k->w, k->text + i, end - i, run, sizeof run), last = 0, last_len = 0;
    int stop = 0;
    for (size_t at = 0; at < n && !stop; at += len) {
        len = unit_at(run, n, at);
        if (last_len && len + last_len <= IBIDI_WORD_MAX)
            stop = give(k, run + last, last_len + len, i, end, false, false);
        bool alone = at == 0 && len == n;
        if (!stop && (alone || !k->query)) stop = give(k, run + at, len, i, end, !alone, false);
        last = at;
        last_len = len;
    }
    return stop;
}

int ibidi_words_each(ibidi_words *w, const char *text, size_t n, bool query,
                     int (*fn)(void *, const ibidi_word *), void *arg) {
    walk k = {w, text, n, query, fn, arg};
    int stop = 0;
    for (size_t i = 0, len; i < n && !stop;) {
        switch (kind_at(&k, i, &len)) {
        case LETTER:
        case DIGIT:
            stop = word_run(&k, i, &i);
            break;
        case UNSPACED:
            stop = unspaced_run(&k, i, &i);
            break;
        case SYMBOL: {
            char s[32];
            stop = give(&k, s, fold(w, text + i, len, s, sizeof s), i, i + len, false, false);
            i += len;
            break;
        }
        default:
            i += len;
        }
    }
    return stop;
}
