#include "attention/plan/citation.h"
#include "attention/plan/chars.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum { WORDS_MAX = 4096 }; /* of an answer that are looked at */

typedef struct word {
    uint64_t hash;
    uint64_t start, end; /* bytes */
} word;

typedef struct words {
    word *w;
    size_t n, room;
} words;

typedef struct sentence {
    size_t block;
    uint64_t start, end;
    size_t word0, n_words; /* in the pool */
    double score, overlap;
    bool used;
} sentence;

typedef struct finder {
    const ibid_cite_block *blocks;
    size_t n_blocks;
    words answer, question, pool;
    sentence *s;
    size_t n, room;
    uint64_t *key;  /* [n_keys] distinct words of the answer, sorted */
    double *weight; /* [n_keys] */
    bool *covered;  /* [n_keys] */
    size_t n_keys;
    double total;
} finder;

/* ---- Words ---- */

static ibid_err grow(void **p, size_t *room, size_t n, size_t size) {
    size_t want = *room ? 2 * *room : 64, bytes;
    if (n < *room) return IBID_OK;
    void *q = ibid_mul_size(want, size, &bytes) ? ibid_realloc(*p, bytes) : NULL;
    if (!q) return ibid_fail(IBID_NOMEM, "no memory to look for citations");
    *p = q;
    *room = want;
    return IBID_OK;
}

/* Scripts written without spaces: each character stands for a word. */
static bool stands_alone(int32_t c) {
    return (c >= 0x2E80 && c < 0xAC00) || (c >= 0xF900 && c < 0xFB00) || c >= 0x20000;
}

static uint64_t mix(uint64_t h, int32_t c) {
    return (h ^ (uint64_t)(uint32_t)utf8proc_tolower(c)) * UINT64_C(0x100000001b3);
}

static ibid_err add_words(words *to, ibid_str text, uint64_t start, uint64_t end, size_t most) {
    size_t len, n = 0;
    for (uint64_t at = start; at < end && n < most;) {
        int32_t c = ibidi_char_at(text.s + at, (size_t)(end - at), &len);
        if (!ibidi_is_word_char(c)) {
            at += len;
            continue;
        }
        word w = {UINT64_C(0xcbf29ce484222325), at, at};
        bool alone = stands_alone(c);
        while (at < end && ibidi_is_word_char(c) && (alone || !stands_alone(c))) {
            w.hash = mix(w.hash, c);
            w.end = at += len;
            if (alone) break;
            if (at < end) c = ibidi_char_at(text.s + at, (size_t)(end - at), &len);
        }
        ibid_err e = grow((void **)&to->w, &to->room, to->n, sizeof *to->w);
        if (e) return e;
        to->w[to->n++] = w;
        n++;
    }
    return IBID_OK;
}

/* ---- Sentences ---- */

static bool is_space(char c) {
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

/* "J." and the like end no sentence. */
static bool is_initial(const char *text, uint64_t start, uint64_t dot) {
    static const char *const known[] = {"Mr", "Mrs", "Ms",   "Dr",  "St", "No", "vs", "e.g", "i.e",
                                        "cf", "ca",  "Prof", "Fig", "Jr", "Sr", "Mt", "Lt",  "Col"};
    uint64_t at = dot;
    while (at > start && !is_space(text[at - 1]) && text[at - 1] != '(') at--;
    size_t n = (size_t)(dot - at);
    if (n == 1 && text[at] >= 'A' && text[at] <= 'Z') return true;
    if (n >= 3 && n <= 7 && text[dot - 2] == '.') return true; /* "U.S" */
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strlen(known[i]) == n && memcmp(known[i], text + at, n) == 0) return true;
    return false;
}

/* Where the sentence that starts at `start` ends. */
static uint64_t sentence_end(const char *t, uint64_t start, uint64_t end) {
    for (uint64_t at = start; at < end; at++) {
        if (t[at] == '\n') return at;
        if (end - at >= 3 &&
            (memcmp(t + at, "\xE3\x80\x82", 3) == 0 || memcmp(t + at, "\xEF\xBC\x9F", 3) == 0 ||
             memcmp(t + at, "\xEF\xBC\x81", 3) == 0))
            return at + 3;
        if (t[at] != '.' && t[at] != '!' && t[at] != '?') continue;
        uint64_t after = at + 1;
        while (after < end && strchr("\"')]", t[after]) && t[after]) after++;
        if (after == end) return end;
        if (!is_space(t[after]) || (t[at] == '.' && is_initial(t, start, at))) continue;
        uint64_t next = after;
        while (next < end && is_space(t[next])) next++;
        if (next < end && t[next] >= 'a' && t[next] <= 'z') continue;
        return after;
    }
    return end;
}

static ibid_err add_sentence(finder *f, size_t block, uint64_t start, uint64_t end) {
    const ibid_cite_block *b = &f->blocks[block];
    while (start < end && is_space(b->text.s[start])) start++;
    while (end > start && is_space(b->text.s[end - 1])) end--;
    if (start == end) return IBID_OK;
    ibid_err e = grow((void **)&f->s, &f->room, f->n, sizeof *f->s);
    if (e) return e;
    sentence s = {.block = block, .start = start, .end = end, .word0 = f->pool.n};
    e = add_words(&f->pool, b->text, start, end, SIZE_MAX);
    s.n_words = f->pool.n - s.word0;
    if (!e && s.n_words) f->s[f->n++] = s;
    return e;
}

static ibid_err split(finder *f) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < f->n_blocks; i++) {
        const ibid_cite_block *b = &f->blocks[i];
        uint64_t end = b->end < b->text.n ? b->end : b->text.n;
        for (uint64_t at = b->start; !e && at < end;) {
            uint64_t stop = sentence_end(b->text.s, at, end);
            e = add_sentence(f, i, at, stop);
            at = stop > at ? stop : at + 1;
        }
    }
    return e;
}

/* ---- Weights of the answer's words ---- */

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static size_t key_of(const finder *f, uint64_t hash) {
    const uint64_t *p =
        f->n_keys ? bsearch(&hash, f->key, f->n_keys, sizeof *f->key, by_value) : NULL;
    return p ? (size_t)(p - f->key) : SIZE_MAX;
}

static bool has_word(const word *w, size_t n, uint64_t hash) {
    for (size_t i = 0; i < n; i++)
        if (w[i].hash == hash) return true;
    return false;
}

static ibid_err weigh(finder *f) {
    size_t n = f->answer.n;
    f->key = ibid_calloc(n + 1, sizeof *f->key);
    f->weight = ibid_calloc(n + 1, sizeof *f->weight);
    f->covered = ibid_calloc(n + 1, sizeof *f->covered);
    if (!f->key || !f->weight || !f->covered)
        return ibid_fail(IBID_NOMEM, "no memory to look for citations");
    for (size_t i = 0; i < n; i++) f->key[i] = f->answer.w[i].hash;
    qsort(f->key, n, sizeof *f->key, by_value);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || f->key[i] != f->key[f->n_keys - 1]) f->key[f->n_keys++] = f->key[i];
    for (size_t k = 0; k < f->n_keys; k++) {
        size_t in = 0;
        for (size_t i = 0; i < f->n; i++)
            in += has_word(f->pool.w + f->s[i].word0, f->s[i].n_words, f->key[k]);
        double w = log(1 + (double)f->n / (double)(in ? in : 1));
        /* A word no sentence has tells nothing about where the answer is from. */
        f->weight[k] = in == 0 ? 0.25 * w : w;
        if (has_word(f->question.w, f->question.n, f->key[k])) f->weight[k] *= 0.5;
        f->total += f->weight[k];
    }
    return IBID_OK;
}

/* ---- Scores ---- */

static double longest_run(const finder *f, const sentence *s) {
    size_t best = 0;
    for (size_t i = 0; i < f->answer.n; i++) {
        for (size_t k = 0; k < s->n_words; k++) {
            size_t n = 0;
            while (i + n < f->answer.n && k + n < s->n_words &&
                   f->answer.w[i + n].hash == f->pool.w[s->word0 + k + n].hash)
                n++;
            best = n > best ? n : best;
        }
    }
    return f->answer.n ? (double)best / (double)f->answer.n : 0;
}

static double mass_of(const ibid_cite_block *b, uint64_t start, uint64_t end) {
    double sum = 0;
    for (size_t t = 0; b->mass && b->token_ends && t < b->n_tokens; t++) {
        uint64_t from = t ? b->token_ends[t - 1] : b->start;
        if (from < end && b->token_ends[t] > start && isfinite(b->mass[t])) sum += b->mass[t];
    }
    return sum;
}

static double overlap_of(const finder *f, const sentence *s) {
    double sum = 0;
    for (size_t k = 0; k < f->n_keys; k++)
        if (has_word(f->pool.w + s->word0, s->n_words, f->key[k])) sum += f->weight[k];
    return f->total > 0 ? sum / f->total : 0;
}

static void score(finder *f) {
    double most = 0;
    for (size_t i = 0; i < f->n; i++) {
        sentence *s = &f->s[i];
        s->score = mass_of(&f->blocks[s->block], s->start, s->end);
        most = s->score > most ? s->score : most;
    }
    for (size_t i = 0; i < f->n; i++) {
        sentence *s = &f->s[i];
        double mass = most > 0 ? s->score / most : 0;
        s->overlap = overlap_of(f, s);
        s->score = 0.6 * s->overlap + 0.2 * longest_run(f, s) + 0.2 * mass;
    }
}

/* ---- Choosing ---- */

/* What a sentence says of the answer that no chosen one says. */
static double newly_covered(const finder *f, const sentence *s) {
    double sum = 0;
    for (size_t k = 0; k < f->n_keys; k++)
        if (!f->covered[k] && has_word(f->pool.w + s->word0, s->n_words, f->key[k]))
            sum += f->weight[k];
    return f->total > 0 ? sum / f->total : 0;
}

/* The words [*from, *to) of a sentence, at most room bytes long, that hold most of the answer;
 * among equals those with the most of it near the middle come by widening to both sides. */
static void best_window(const finder *f, const sentence *s, size_t room, size_t *from, size_t *to) {
    const word *w = f->pool.w + s->word0;
    double best = -1, sum = 0;
    size_t lo = 0;
    *from = *to = 0;
    for (size_t hi = 0; hi < s->n_words; hi++) {
        size_t k = key_of(f, w[hi].hash);
        sum += k < SIZE_MAX ? f->weight[k] : 0;
        while (lo <= hi && w[hi].end - w[lo].start > room) {
            k = key_of(f, w[lo++].hash);
            sum -= k < SIZE_MAX ? f->weight[k] : 0;
        }
        if (lo <= hi && sum > best + 1e-9) {
            best = sum;
            *from = lo;
            *to = hi + 1;
        }
    }
}

/* The sentence, or as much of it as fits. False if nothing does. */
static bool quote(const finder *f, const sentence *s, size_t room, ibid_cite *out) {
    const word *w = f->pool.w + s->word0;
    size_t from, to;
    *out = (ibid_cite){.block = s->block, .start = s->start, .end = s->end, .weight = s->score};
    if (s->end - s->start <= room) return true;
    best_window(f, s, room, &from, &to);
    if (from == to) return false;
    while (to < s->n_words && w[to].end - w[from].start <= room) to++;
    while (from > 0 && w[to - 1].end - w[from - 1].start <= room) from--;
    out->start = from == 0 && w[to - 1].end - s->start <= room ? s->start : w[from].start;
    out->end = to == s->n_words && s->end - out->start <= room ? s->end : w[to - 1].end;
    return true;
}

static ibid_err choose(finder *f, size_t max_quotes, size_t quote_bytes, ibid_cite *out,
                       size_t *n_out) {
    double best_score = 0;
    size_t n = 0;
    while (n < max_quotes) {
        sentence *best = NULL;
        for (size_t i = 0; i < f->n; i++) {
            sentence *s = &f->s[i];
            double fresh = newly_covered(f, s);
            bool enough =
                n == 0 ? s->overlap >= 0.2 : fresh >= 0.15 && s->score >= 0.4 * best_score;
            if (s->used || !enough) continue;
            if (!best || s->score > best->score + 1e-9) best = s;
        }
        if (!best) break;
        best->used = true;
        if (n == 0) best_score = best->score;
        for (size_t k = 0; k < f->n_keys; k++)
            if (has_word(f->pool.w + best->word0, best->n_words, f->key[k])) f->covered[k] = true;
        if (quote(f, best, quote_bytes, &out[n])) n++;
    }
    *n_out = n;
    return IBID_OK;
}

ibid_err ibid_cite_find(ibid_str answer, ibid_str question, const ibid_cite_block *blocks, size_t n,
                        size_t max_quotes, size_t quote_bytes, ibid_cite *out, size_t *n_out) {
    finder f = {.blocks = blocks, .n_blocks = n};
    *n_out = 0;
    ibid_err e = add_words(&f.answer, answer, 0, answer.n, WORDS_MAX);
    if (!e && f.answer.n == 0) goto done;
    if (!e) e = add_words(&f.question, question, 0, question.n, WORDS_MAX);
    if (!e) e = split(&f);
    if (!e) e = weigh(&f);
    if (!e) {
        score(&f);
        e = choose(&f, max_quotes, quote_bytes, out, n_out);
    }
done:
    ibid_free(f.answer.w);
    ibid_free(f.question.w);
    ibid_free(f.pool.w);
    ibid_free(f.s);
    ibid_free(f.key);
    ibid_free(f.weight);
    ibid_free(f.covered);
    return e;
}

static bool cuts_word(ibid_str text, uint64_t at) {
    return at > 0 && at < text.n && !is_space(text.s[at]) && !is_space(text.s[at - 1]);
}

void ibid_cite_around(ibid_str text, uint64_t start, uint64_t end, uint64_t from, uint64_t to,
                      size_t quote_bytes, ibid_cite *out) {
    if (to - from > quote_bytes) {
        uint64_t room = end - start < quote_bytes ? quote_bytes - (end - start) : 0;
        uint64_t before = start - from, after = to - end;
        uint64_t left = before < room / 2 ? before : after < room / 2 ? room - after : room / 2;
        from = start - (left < before ? left : before);
        while (from < start && cuts_word(text, from)) from++;
        to = to - from > quote_bytes ? from + quote_bytes : to;
        while (to > end && cuts_word(text, to)) to--;
        if (to < end) to = end;
    }
    while (from < start && is_space(text.s[from])) from++;
    while (to > end && is_space(text.s[to - 1])) to--;
    out->start = from;
    out->end = to;
}

void ibid_cite_token_ends(ibid_str text, uint64_t start, uint64_t end, const ibid_str *pieces,
                          size_t n, uint64_t *ends) {
    uint64_t at = start, stop = end < text.n ? end : text.n;
    for (size_t t = 0; t < n; t++) {
        for (size_t i = 0; i < pieces[t].n; i++) {
            uint64_t p = at; /* skip bytes without a token, but never far */
            while (p < stop && p - at < 64 && text.s[p] != pieces[t].s[i]) p++;
            if (p < stop && text.s[p] == pieces[t].s[i]) at = p + 1;
        }
        ends[t] = at;
    }
}
