#include "attention/plan/extract_run.h"

#include "rpc/base/clock.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Weights of what the model says beside what the text says (tools/train-extract): of the text's
 * score, the logarithms of the likelihoods, the tokens, and the root of the first token's surprise,
 * which keeps one unlikely first token from outweighing all the rest. by_word, for each of a span's
 * first three words, is not trained: it trades one point of F1 for two more of answers that hold
 * the whole of what was asked for (docs/quality.md). */
static const double by_text = 0.56, by_first = 0.05, by_rest = 0.07, by_stop = 0.096,
                    by_token = 0.06, by_surprise = -0.32, by_word = 0.1;

enum { STARTS_MAX = 16 };

typedef struct place { /* of a span in its block's tokens */
    size_t from, n;
} place;

typedef struct run {
    const ibid_reader *r;
    const ibid_extract_plan *p;
    ibid_extracted *out;
    size_t **ends; /* [n_blocks] of the tokens' text in texts[b]; best block first */
    place *at;     /* [n] of tried */
    ibid_asked asked;
    float *logits;   /* [IBID_EXTRACT_TOKENS_MAX, n_vocab] */
    uint8_t *closes; /* [n_vocab] whether a token may follow a whole answer */
    double first_norm;
} run;

/* ---- Text ---- */

static const ibid_placed_block *block_of(const run *x, size_t b) {
    return &x->p->blocks[x->p->n_blocks - 1 - b];
}

static size_t n_tokens_of(const run *x, size_t b) {
    return block_of(x, b)->layers[0].n_tokens - x->p->n_title[x->p->n_blocks - 1 - b];
}

static const int32_t *tokens_of(const run *x, size_t b) {
    return block_of(x, b)->tokens + x->p->n_title[x->p->n_blocks - 1 - b];
}

/* The blocks' texts from their tokens, and where in them each token ends. */
static ibid_err open_texts(run *x) {
    const ibid_tokenizer *t = x->r->model->tokenizer;
    size_t bytes = 1, at = 0, n;
    for (size_t b = 0; b < x->p->n_blocks; b++)
        for (size_t i = 0; i < n_tokens_of(x, b); i++) {
            (void)ibid_token_bytes(t, tokens_of(x, b)[i], &n);
            bytes += n;
        }
    x->out->text = ibid_alloc(bytes);
    x->out->texts = ibid_calloc(x->p->n_blocks + 1, sizeof *x->out->texts);
    x->ends = ibid_calloc(x->p->n_blocks + 1, sizeof(size_t *));
    if (!x->out->text || !x->out->texts || !x->ends)
        return ibid_fail(IBID_NOMEM, "no memory for %zu bytes of text", bytes);
    for (size_t b = 0; b < x->p->n_blocks; b++) {
        size_t start = at, count = n_tokens_of(x, b);
        if (!(x->ends[b] = ibid_calloc(count + 1, sizeof **x->ends)))
            return ibid_fail(IBID_NOMEM, "no memory for %zu tokens", count);
        for (size_t i = 0; i < count; i++) {
            const char *s = ibid_token_bytes(t, tokens_of(x, b)[i], &n);
            if (n) memcpy(x->out->text + at, s, n);
            at += n;
            x->ends[b][i] = at - start;
        }
        x->out->texts[b] = (ibid_str){x->out->text + start, at - start};
    }
    return IBID_OK;
}

/* The tokens that hold a span: the first one may start with the space before it, the last one may
 * not reach past it. False: no run of tokens is the span, or it is a long one. */
static bool find_place(const run *x, const ibid_span *s, place *out) {
    const size_t *ends = x->ends[s->block];
    const char *text = x->out->texts[s->block].s;
    size_t n = n_tokens_of(x, s->block), i = 0, j;
    while (i < n && ends[i] <= s->start) i++;
    size_t begins = i ? ends[i - 1] : 0;
    if (i == n || !(begins == s->start || (begins + 1 == s->start && text[begins] == ' ')))
        return false;
    for (j = i; j < n && ends[j] < s->end; j++) {
    }
    *out = (place){i, j - i + 1};
    return j < n && ends[j] == s->end && out->n <= IBID_EXTRACT_TOKENS_MAX;
}

/* Spans by what the text says; those that tokens do not cut are left out. */
static ibid_err choose_spans(run *x) {
    ibid_span spans[2 * IBID_EXTRACT_TRIED];
    size_t n = 0;
    ibid_extracted *o = x->out;
    ibid_err e = ibid_extract_spans(x->p->question, o->texts, x->p->n_blocks,
                                    2 * IBID_EXTRACT_TRIED, spans, &n);
    if (e) return e;
    o->tried = ibid_calloc(IBID_EXTRACT_TRIED, sizeof *o->tried);
    x->at = ibid_calloc(IBID_EXTRACT_TRIED, sizeof *x->at);
    if (!o->tried || !x->at) return ibid_fail(IBID_NOMEM, "no memory for spans");
    for (size_t i = 0; i < n && o->n < IBID_EXTRACT_TRIED; i++) {
        if (!find_place(x, &spans[i], &x->at[o->n])) continue;
        o->tried[o->n] = (ibid_tried){.span = spans[i], .n_tokens = x->at[o->n].n};
        o->n++;
    }
    return IBID_OK;
}

/* ---- Likelihoods ---- */

/* Tokens that end the turn, and those that start with a mark after which an answer is whole. */
static ibid_err open_closes(run *x) {
    const ibid_tokenizer *t = x->r->model->tokenizer;
    size_t n;
    x->closes = ibid_calloc(x->r->model->n_vocab, 1);
    if (!x->closes) return ibid_fail(IBID_NOMEM, "out of memory");
    for (size_t i = 0; i < x->r->model->n_vocab; i++) {
        const char *s = ibid_token_bytes(t, (int32_t)i, &n);
        x->closes[i] =
            ibid_tokenizer_is_end(t, (int32_t)i) || (s && n && s[0] && strchr(".,;:\n!?)\"", s[0]));
    }
    return IBID_OK;
}

/* log sum exp of a row; *closing: that of the closing tokens alone, less it. */
static double log_norm(const run *x, const float *row, double *closing) {
    size_t n = x->r->model->n_vocab;
    float top = row[0];
    double sum = 0, close = 0;
    for (size_t i = 1; i < n; i++) top = row[i] > top ? row[i] : top;
    for (size_t i = 0; i < n; i++) {
        if (row[i] - top < -30) continue;
        double v = (double)expf(row[i] - top);
        sum += v;
        if (x->closes[i]) close += v;
    }
    *closing = log((close + 1e-12) / sum);
    return top + log(sum);
}

static ibid_err ask(run *x) {
    const ibid_extract_plan *p = x->p;
    ibid_question q = {.prefix = &x->r->prefix,
                       .blocks = p->blocks,
                       .n_blocks = p->n_blocks,
                       .tokens = p->prompt,
                       .n = p->n_prompt,
                       .share = p->share,
                       .ready = p->ready,
                       .ready_arg = p->arg};
    double closing;
    ibid_sched_enter(x->r->sched, true);
    ibid_err e = ibid_question_run(x->r->engine, &q, IBID_EXTRACT_TOKENS_MAX, p->cancel, &x->asked,
                                   x->logits);
    ibid_sched_leave(x->r->sched);
    if (e) return e;
    x->out->recomputed_tokens = x->asked.choice.n_rows;
    x->first_norm = log_norm(x, x->logits, &closing);
    for (size_t i = 0; i < x->out->n; i++) {
        ibid_tried *t = &x->out->tried[i];
        t->first = x->logits[tokens_of(x, t->span.block)[x->at[i].from]] - x->first_norm;
    }
    return IBID_OK;
}

static bool same_start(const run *x, size_t a, size_t b) {
    return x->out->tried[a].span.block == x->out->tried[b].span.block &&
           x->at[a].from == x->at[b].from;
}

/* All spans that start where span i does: one pass over the longest. */
static ibid_err try_start(run *x, size_t i) {
    ibid_extracted *o = x->out;
    uint32_t positions[IBID_EXTRACT_TOKENS_MAX];
    double norm[IBID_EXTRACT_TOKENS_MAX], closing[IBID_EXTRACT_TOKENS_MAX];
    const int32_t *tokens = tokens_of(x, o->tried[i].span.block) + x->at[i].from;
    size_t n = 0, vocab = x->r->model->n_vocab, before = ibid_seq_live_count(x->asked.seq);
    for (size_t k = i; k < o->n; k++)
        if (same_start(x, i, k) && x->at[k].n > n) n = x->at[k].n;
    for (size_t t = 0; t < n; t++) positions[t] = x->asked.position + (uint32_t)t;
    ibid_step s = {.seq = x->asked.seq,
                   .tokens = tokens,
                   .positions = positions,
                   .n = n,
                   .n_logits = n,
                   .logits = x->logits};
    ibid_sched_enter(x->r->sched, true);
    ibid_err e = ibid_engine_forward(x->r->engine, &s, 1, x->p->cancel);
    ibid_sched_leave(x->r->sched);
    if (e) return e;
    ibid_seq_truncate(x->asked.seq, before);
    o->rows += n;
    for (size_t t = 0; t < n; t++) norm[t] = log_norm(x, x->logits + t * vocab, &closing[t]);
    for (size_t k = i; k < o->n; k++) {
        if (!same_start(x, i, k)) continue;
        ibid_tried *d = &o->tried[k];
        for (size_t t = 0; t + 1 < x->at[k].n; t++)
            d->rest += x->logits[t * vocab + (size_t)tokens[t + 1]] - norm[t];
        d->stop = closing[x->at[k].n - 1];
    }
    return IBID_OK;
}

static ibid_err try_all(run *x) {
    ibid_extracted *o = x->out;
    size_t starts = 0, kept = 0;
    bool *seen = ibid_calloc(o->n + 1, sizeof *seen);
    ibid_err e = seen ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for spans");
    for (size_t i = 0; !e && i < o->n; i++) {
        if (seen[i] || starts == STARTS_MAX) continue;
        starts++;
        if (x->p->tick && (e = x->p->tick(x->p->arg))) break;
        e = try_start(x, i);
        for (size_t k = i; k < o->n; k++) seen[k] = seen[k] || same_start(x, i, k);
    }
    for (size_t i = 0; !e && i < o->n; i++)
        if (seen[i]) o->tried[kept++] = o->tried[i];
    if (!e) o->n = kept;
    ibid_free(seen);
    return e;
}

static int better_first(const void *a, const void *b) {
    const ibid_tried *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    if (x->span.block != y->span.block) return x->span.block < y->span.block ? -1 : 1;
    return (x->span.start > y->span.start) - (x->span.start < y->span.start);
}

static size_t n_words(const ibid_extracted *o, const ibid_span *s) {
    const char *text = o->texts[s->block].s;
    size_t n = 1;
    for (size_t i = s->start; i < s->end; i++) n += text[i] == ' ';
    return n;
}

static void rank(ibid_extracted *o) {
    double sum = 0;
    for (size_t i = 0; i < o->n; i++) {
        ibid_tried *t = &o->tried[i];
        size_t words = n_words(o, &t->span);
        t->score = by_word * (double)(words < 3 ? words : 3) + by_text * t->span.score +
                   by_first * t->first + by_rest * t->rest + by_stop * t->stop +
                   by_token * (double)t->n_tokens +
                   by_surprise * sqrt(t->first < 0 ? -t->first : 0);
    }
    if (o->n) qsort(o->tried, o->n, sizeof *o->tried, better_first);
    for (size_t i = 0; i < o->n; i++) sum += exp(o->tried[i].score - o->tried[0].score);
    for (size_t i = 0; i < o->n; i++)
        o->tried[i].share = exp(o->tried[i].score - o->tried[0].score) / sum;
}

static ibid_err check_context(const ibid_reader *r, const ibid_extract_plan *p) {
    size_t need = r->n_prefix + p->n_prompt + IBID_EXTRACT_TOKENS_MAX;
    for (size_t b = 0; b < p->n_blocks; b++) need += p->blocks[b].layers[0].n_tokens;
    if (need <= r->model->n_ctx) return IBID_OK;
    return ibid_fail(IBID_CONTEXT,
                     "the request needs %zu tokens, the model's context has %zu; use "
                     "fewer blocks",
                     need, r->model->n_ctx);
}

ibid_err ibid_extract_run(const ibid_reader *r, const ibid_extract_plan *p, ibid_extracted *out) {
    run x = {.r = r, .p = p, .out = out};
    memset(out, 0, sizeof *out);
    ibid_err e = check_context(r, p);
    if (!e) {
        x.logits = ibid_calloc(r->model->n_vocab, IBID_EXTRACT_TOKENS_MAX * sizeof *x.logits);
        if (!x.logits) e = ibid_fail(IBID_NOMEM, "no memory for likelihoods");
    }
    if (!e) e = open_closes(&x);
    if (!e) e = open_texts(&x);
    if (!e) e = choose_spans(&x);
    if (!e && out->n) e = ask(&x);
    if (!e && out->n) e = try_all(&x);
    if (!e) rank(out);
    out->first_ns = ibid_now_ns();
    ibid_asked_close(&x.asked);
    for (size_t b = 0; x.ends && b < p->n_blocks; b++) ibid_free(x.ends[b]);
    ibid_free(x.ends);
    ibid_free(x.at);
    ibid_free(x.logits);
    ibid_free(x.closes);
    if (e) ibid_extracted_fini(out);
    return e;
}

void ibid_extracted_fini(ibid_extracted *x) {
    ibid_free(x->text);
    ibid_free(x->texts);
    ibid_free(x->tried);
    memset(x, 0, sizeof *x);
}
