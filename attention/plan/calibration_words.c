/* What words alone find in a sample: what keys have to come up to; see calibration_run.h. */
#include "attention/plan/calibration_run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct word {
    uint64_t hash;
    uint32_t text, token; /* which text, and where in it the word starts */
} word;

typedef struct words {
    word *w;
    size_t n, room;
} words;

static ibid_err push(words *l, word w) {
    if (l->n == l->room) {
        size_t room = l->room ? 2 * l->room : 4096;
        word *p = ibid_realloc(l->w, room * sizeof *p);
        if (!p) return ibid_fail(IBID_NOMEM, "no memory for words");
        l->w = p;
        l->room = room;
    }
    l->w[l->n++] = w;
    return IBID_OK;
}

static bool in_word(unsigned char c) {
    return c >= 0x80 || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/* Words of the tokens' bytes, ASCII letters as small ones (FNV-1a). */
static ibid_err read_words(const ibid_model *m, const int32_t *tokens, size_t n, uint32_t text,
                           words *out) {
    const uint64_t basis = UINT64_C(0xcbf29ce484222325);
    word w = {.hash = basis, .text = text};
    size_t letters = 0;
    ibid_err e = IBID_OK;
    for (size_t t = 0; !e && t <= n; t++) {
        size_t size = 0;
        const char *s = t < n ? ibid_token_bytes(m->tokenizer, tokens[t], &size) : NULL;
        for (size_t i = 0; !e && (i < size || t == n); i++) {
            unsigned char c = t < n ? (unsigned char)s[i] : ' ';
            if (in_word(c)) {
                if (!letters++) w.token = (uint32_t)t;
                c = c >= 'A' && c <= 'Z' ? (unsigned char)(c + 32) : c;
                w.hash = (w.hash ^ c) * UINT64_C(0x100000001b3);
                continue;
            }
            if (letters) e = push(out, w);
            w.hash = basis;
            letters = 0;
            if (t == n) break;
        }
    }
    return e;
}

static int by_word(const void *a, const void *b) {
    const word *x = a, *y = b;
    if (x->hash != y->hash) return x->hash < y->hash ? -1 : 1;
    if (x->text != y->text) return x->text < y->text ? -1 : 1;
    return x->token < y->token ? -1 : x->token > y->token;
}

/* The first place of a word, or n. */
static size_t place_of(const words *l, uint64_t hash) {
    size_t low = 0, high = l->n;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        if (l->w[mid].hash < hash)
            low = mid + 1;
        else
            high = mid;
    }
    return low < l->n && l->w[low].hash == hash ? low : l->n;
}

/* Adds a question's words to the scores of the chunks [n_chunks]. */
static void score(const words *chunks, size_t n_chunks, const ibid_cal_question *q,
                  const words *asked, double *scores) {
    memset(scores, 0, n_chunks * sizeof *scores);
    for (size_t i = 0; i < asked->n; i++) {
        size_t first = place_of(chunks, asked->w[i].hash), df = 0;
        size_t last = UINT32_MAX;
        for (size_t k = first; k < chunks->n && chunks->w[k].hash == asked->w[i].hash; k++) {
            df += chunks->w[k].text != last;
            last = chunks->w[k].text;
        }
        double idf = log(((double)n_chunks - (double)df + 0.5) / ((double)df + 0.5) + 1);
        last = UINT32_MAX;
        for (size_t k = first; k < chunks->n && chunks->w[k].hash == asked->w[i].hash; k++) {
            const word *w = &chunks->w[k];
            bool hidden = w->text == q->chunk && w->token >= q->mask0 && w->token < q->mask1;
            if (w->text == last || hidden) continue;
            scores[w->text] += idf;
            last = w->text;
        }
    }
}

ibid_err ibid_cal_words(const ibid_model *m, const ibid_cal_set *set, double *mrr) {
    words chunks = {NULL, 0, 0}, asked = {NULL, 0, 0};
    double *scores = ibid_calloc(set->n_chunks + 1, sizeof *scores), sum = 0;
    ibid_err e = scores ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for words");
    for (size_t c = 0; !e && c < set->n_chunks; c++)
        e = read_words(m, set->chunks[c].tokens, set->chunks[c].n, (uint32_t)c, &chunks);
    if (!e && chunks.n) qsort(chunks.w, chunks.n, sizeof *chunks.w, by_word);
    for (size_t i = 0; !e && i < set->n_questions; i++) {
        const ibid_cal_question *q = &set->questions[i];
        size_t rank = 1;
        asked.n = 0;
        if ((e = read_words(m, q->tokens, q->n, 0, &asked))) break;
        score(&chunks, set->n_chunks, q, &asked, scores);
        for (size_t c = 0; c < set->n_chunks; c++)
            rank += c != q->chunk && scores[c] >= scores[q->chunk];
        sum += 1 / (double)rank;
    }
    *mrr = set->n_questions ? sum / (double)set->n_questions : 0;
    ibid_free(chunks.w);
    ibid_free(asked.w);
    ibid_free(scores);
    return e;
}
