/* A sample text as chunks and pseudo-questions; see calibration_run.h. */
#include "attention/plan/calibration_run.h"

#include <string.h>

enum {
    CHUNK_TOKENS = 96, /* a chunk is closed once it has as many */
    CHUNKS_MAX = 256,
    SENTENCES_MAX = 32, /* of a chunk */
    PER_CHUNK = 3,
    WORDS_MIN = 5, /* of a sentence that is asked about */
    QUESTION_TOKENS = 64,
    SAMPLE_MAX = 256 * 1024
};

typedef struct span {
    size_t start, end; /* bytes of the sample */
} span;

typedef struct chunk {
    span s[SENTENCES_MAX];
    size_t n;
    span asked[PER_CHUNK]; /* written questions about it */
    size_t n_asked;
} chunk;

typedef struct builder {
    const ibid_model *m;
    ibid_str text;
    chunk *chunks; /* [CHUNKS_MAX] */
    size_t n_chunks;
    ibid_reading *readings;       /* [CHUNKS_MAX] */
    ibid_cal_question *questions; /* [CHUNKS_MAX * 2 * PER_CHUNK] */
    int32_t *chunk_ids, *question_ids;
    size_t n_chunk_ids, n_questions, n_question_ids, n_written;
    uint64_t random;
} builder;

/* splitmix64 */
static uint64_t next_random(builder *b) {
    uint64_t z = b->random += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

static double uniform(builder *b) {
    return (double)(next_random(b) >> 11) / 9007199254740992.0;
}

static bool is_space(char c) {
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

/* The next sentence from *at on, never over an empty line; false at the end. *paragraph: an empty
 * line came before it. */
static bool next_sentence(ibid_str t, size_t *at, span *out, bool *paragraph) {
    size_t lines = 0;
    while (*at < t.n && is_space(t.s[*at])) lines += t.s[(*at)++] == '\n';
    *paragraph = lines > 1;
    if (*at >= t.n) return false;
    out->start = *at;
    while (*at < t.n) {
        char c = t.s[(*at)++];
        bool end = *at >= t.n;
        if ((c == '.' || c == '!' || c == '?') && (end || is_space(t.s[*at]))) break;
        if (c == '\n' && !end && t.s[*at] == '\n') break;
    }
    out->end = *at;
    while (out->end > out->start && is_space(t.s[out->end - 1])) out->end--;
    return true;
}

/* Tokens of text [start, end) appended to ids; *n grows. */
static ibid_err put_tokens(const builder *b, const char *s, size_t n, int32_t *ids, size_t *n_ids,
                           size_t most) {
    ibid_token *t = NULL;
    size_t count = 0;
    ibid_err e = ibid_tokenize(b->m->tokenizer, s, n, false, &t, &count);
    if (count > most) count = most;
    for (size_t i = 0; !e && i < count; i++) ids[(*n_ids)++] = t[i].id;
    ibid_free(t);
    return e;
}

static size_t about_tokens(const chunk *c) {
    return c->n ? (c->s[c->n - 1].end - c->s[0].start) / 5 : 0;
}

static void cut(builder *b) {
    size_t at = 0;
    span s;
    bool paragraph;
    chunk *c = NULL;
    while (next_sentence(b->text, &at, &s, &paragraph)) {
        if (c && s.end - s.start > 3 && memcmp(b->text.s + s.start, "Q: ", 3) == 0) {
            s.start += 3;
            if (c->n_asked < PER_CHUNK) c->asked[c->n_asked++] = s;
            b->n_written++;
            continue;
        }
        if (!c || c->n_asked || c->n == SENTENCES_MAX ||
            (about_tokens(c) >= CHUNK_TOKENS / 2 && paragraph) || about_tokens(c) >= CHUNK_TOKENS) {
            if (b->n_chunks == CHUNKS_MAX) return;
            c = &b->chunks[b->n_chunks++];
        }
        c->s[c->n++] = s;
    }
}

static ibid_err read_chunks(builder *b) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < b->n_chunks; i++) {
        const chunk *c = &b->chunks[i];
        size_t start = c->s[0].start, first = b->n_chunk_ids;
        e = put_tokens(b, b->text.s + start, c->s[c->n - 1].end - start, b->chunk_ids,
                       &b->n_chunk_ids, SIZE_MAX);
        b->readings[i] =
            (ibid_reading){.tokens = b->chunk_ids + first, .n = b->n_chunk_ids - first};
    }
    return e;
}

/* Where a sentence's tokens lie in its chunk: the tokens that hold its bytes. */
static ibid_err locate(const builder *b, const chunk *c, span s, size_t *from, size_t *to) {
    ibid_token *t = NULL;
    size_t n = 0, start = c->s[0].start;
    ibid_err e = ibid_tokenize(b->m->tokenizer, b->text.s + start, c->s[c->n - 1].end - start,
                               false, &t, &n);
    *from = *to = 0;
    for (size_t i = 0; !e && i < n; i++) {
        if (t[i].end + start <= s.start) *from = *to = i + 1;
        if (t[i].start + start < s.end) *to = i + 1;
    }
    ibid_free(t);
    return e;
}

static size_t count_words(ibid_str t, span s) {
    size_t n = 0;
    for (size_t i = s.start; i < s.end; i++)
        n += !is_space(t.s[i]) && (i == s.start || is_space(t.s[i - 1]));
    return n;
}

/* A question word, then some of the sentence's words, then a question mark. */
static ibid_err phrase(builder *b, span s, double keep, ibid_buf *out) {
    static const char *const leads[] = {" What",      " Which",    " Who",     " When did",
                                        " Where was", " How many", " Why did", " How does",
                                        " What is",   " In what"};
    ibid_buf_clear(out);
    ibid_err e = ibid_buf_puts(out, leads[next_random(b) % (sizeof leads / sizeof *leads)]);
    for (size_t i = s.start; !e && i < s.end;) {
        size_t j = i;
        while (j < s.end && !is_space(b->text.s[j])) j++;
        if (uniform(b) < keep) {
            size_t n = j - i;
            while (n && strchr(".,;:!?\"()", b->text.s[i + n - 1])) n--;
            e = ibid_buf_puts(out, " ");
            if (!e) e = ibid_buf_append(out, b->text.s + i, n);
        }
        while (j < s.end && is_space(b->text.s[j])) j++;
        i = j;
    }
    return e ? e : ibid_buf_puts(out, "?");
}

static ibid_err ask(builder *b, size_t i, span s, bool leave_out, double keep, ibid_buf *scratch) {
    ibid_cal_question *q = &b->questions[b->n_questions];
    size_t first = b->n_question_ids;
    ibid_err e = IBID_OK;
    if (keep < 1) {
        e = phrase(b, s, keep, scratch);
    } else {
        ibid_buf_clear(scratch);
        e = ibid_buf_puts(scratch, " ");
        if (!e) e = ibid_buf_append(scratch, b->text.s + s.start, s.end - s.start);
    }
    if (!e)
        e = put_tokens(b, scratch->data, scratch->len, b->question_ids, &b->n_question_ids,
                       QUESTION_TOKENS);
    *q = (ibid_cal_question){
        .tokens = b->question_ids + first, .n = b->n_question_ids - first, .chunk = i};
    if (!e && leave_out) e = locate(b, &b->chunks[i], s, &q->mask0, &q->mask1);
    if (!e && q->n) b->n_questions++;
    return e;
}

/* Of each chunk: its written questions and one sentence with fewer words; or, in a sample without
 * written questions, one sentence that is left out of the chunk and two that are not. */
static ibid_err ask_chunk(builder *b, size_t i, ibid_buf *scratch) {
    const chunk *c = &b->chunks[i];
    size_t first = (size_t)(next_random(b) % c->n), asked = 0;
    size_t most = b->n_written ? 1 : PER_CHUNK;
    ibid_err e = IBID_OK;
    for (size_t k = 0; !e && k < c->n_asked; k++) e = ask(b, i, c->asked[k], false, 1, scratch);
    for (size_t k = 0; !e && k < c->n && asked < most; k++) {
        span s = c->s[(first + k) % c->n];
        if (count_words(b->text, s) < WORDS_MIN) continue;
        bool leave_out = !b->n_written && asked == 0 && c->n > 2;
        e = ask(b, i, s, leave_out, leave_out ? 0.7 : 0.4, scratch);
        asked++;
    }
    return e;
}

static ibid_err ask_all(builder *b) {
    ibid_buf scratch;
    ibid_err e = IBID_OK;
    ibid_buf_init(&scratch, 64 * 1024);
    for (size_t i = 0; !e && i < b->n_chunks; i++) e = ask_chunk(b, i, &scratch);
    ibid_buf_fini(&scratch);
    return e;
}

void ibid_cal_sample_close(ibid_cal_sample *s) {
    for (size_t i = 0; i < sizeof s->memory / sizeof *s->memory; i++) ibid_free(s->memory[i]);
    memset(s, 0, sizeof *s);
}

ibid_err ibid_cal_sample_open(const ibid_model *m, ibid_str text, ibid_cal_sample *out) {
    memset(out, 0, sizeof *out);
    builder b = {.m = m, .text = text, .random = 1};
    if (b.text.n > SAMPLE_MAX) b.text.n = SAMPLE_MAX;
    /* A token is at least a byte; a byte at most one token. */
    out->memory[0] = b.chunks = ibid_calloc(CHUNKS_MAX, sizeof *b.chunks);
    out->memory[1] = b.readings = ibid_calloc(CHUNKS_MAX, sizeof *b.readings);
    out->memory[2] = b.questions = ibid_calloc(CHUNKS_MAX * 2 * PER_CHUNK, sizeof *b.questions);
    out->memory[3] = b.chunk_ids = ibid_calloc(b.text.n + 1, sizeof *b.chunk_ids);
    out->memory[4] = b.question_ids =
        ibid_calloc(CHUNKS_MAX * 2 * PER_CHUNK * QUESTION_TOKENS, sizeof *b.question_ids);
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < sizeof out->memory / sizeof *out->memory; i++)
        if (!out->memory[i]) e = ibid_fail(IBID_NOMEM, "no memory for a sample");
    if (!e) {
        cut(&b);
        e = read_chunks(&b);
    }
    if (!e) e = ask_all(&b);
    out->set = (ibid_cal_set){b.readings, b.n_chunks, b.questions, b.n_questions};
    if (e) ibid_cal_sample_close(out);
    return e;
}
