#include "attention/plan/extract_run.h"

#include "rpc/base/clock.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Weights of what the model says beside what the text says (tools/train-extract): of the text's
 * score, the logarithms of the likelihoods, the tokens, and the root of the first token's surprise,
 * which keeps one unlikely first token from outweighing all the rest. early: while only the first
 * token's likelihood is known. by_word, for each of a span's first three words, is not trained: it
 * trades a little of F1 for more answers that hold the whole of what was asked for
 * (docs/quality.md). */
typedef struct weights {
    double text, first, rest, stop, token, surprise;
} weights;
static const weights early = {0.750, 0.028, 0, 0, -0.002, -0.510},
                     late = {0.513, 0.039, 0.072, 0.069, 0.053, -0.437};
static const double by_word = 0.15;

enum { GROUP_MAX = 12, GROUP_ROWS = 128 }; /* starts and rows that pass the model together */

typedef struct run {
    const ibid_reader *r;
    const ibid_extract_plan *p;
    ibid_extracted *out;
    size_t **ends; /* [n_blocks] of the tokens' text in texts[b]; best block first */
    ibid_asked asked;
    float *logits;   /* [GROUP_ROWS, n_vocab] */
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
static bool find_tokens(const run *x, ibid_tried *t) {
    const ibid_span *s = &t->span;
    const size_t *ends = x->ends[s->block];
    const char *text = x->out->texts[s->block].s;
    size_t n = n_tokens_of(x, s->block), i = 0, j;
    while (i < n && ends[i] <= s->start) i++;
    size_t begins = i ? ends[i - 1] : 0;
    if (i == n || !(begins == s->start || (begins + 1 == s->start && text[begins] == ' ')))
        return false;
    for (j = i; j < n && ends[j] < s->end; j++) {
    }
    t->from = i;
    t->n_tokens = j - i + 1;
    return j < n && ends[j] == s->end && t->n_tokens <= IBID_EXTRACT_TOKENS_MAX;
}

/* Spans by what the text says; those that tokens do not cut are left out. */
static ibid_err choose_spans(run *x) {
    size_t n = 0, most = x->p->most ? x->p->most : IBID_EXTRACT_LOOKED;
    ibid_extracted *o = x->out;
    ibid_span *spans = ibid_calloc(2 * most, sizeof *spans);
    o->tried = ibid_calloc(most, sizeof *o->tried);
    ibid_err e = spans && o->tried ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for spans");
    if (!e) e = ibid_extract_spans(x->p->question, o->texts, x->p->n_blocks, 2 * most, spans, &n);
    for (size_t i = 0; !e && i < n && o->n < most; i++) {
        o->tried[o->n] = (ibid_tried){.span = spans[i]};
        if (find_tokens(x, &o->tried[o->n])) o->n++;
    }
    ibid_free(spans);
    return e;
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
        t->first = x->logits[tokens_of(x, t->span.block)[t->from]] - x->first_norm;
    }
    return IBID_OK;
}

static bool same_start(const run *x, size_t a, size_t b) {
    const ibid_tried *t = x->out->tried;
    return t[a].span.block == t[b].span.block && t[a].from == t[b].from;
}

/* A start: a token that spans begin at, continued as far as the longest of them goes. */
typedef struct start {
    size_t first; /* the best span that begins here: its number among the tried */
    size_t n;     /* tokens */
    ibid_seq *seq;
    float *logits; /* [n, n_vocab], of the group's */
} start;

/* Starts in the order of their best spans. */
static size_t list_starts(const run *x, start *out) {
    size_t n = 0;
    for (size_t i = 0; i < x->out->n; i++) {
        size_t s = 0;
        while (s < n && !same_start(x, out[s].first, i)) s++;
        if (s == n) out[n++] = (start){.first = i};
        if (x->out->tried[i].n_tokens > out[s].n) out[s].n = x->out->tried[i].n_tokens;
    }
    return n;
}

static const int32_t *start_tokens(const run *x, const start *s) {
    const ibid_tried *t = &x->out->tried[s->first];
    return tokens_of(x, t->span.block) + t->from;
}

/* What the logits behind a start say of all spans that begin there. */
static void read_start(run *x, const start *s) {
    ibid_extracted *o = x->out;
    size_t vocab = x->r->model->n_vocab;
    const int32_t *tokens = start_tokens(x, s);
    double norm[IBID_EXTRACT_TOKENS_MAX], closing[IBID_EXTRACT_TOKENS_MAX];
    for (size_t t = 0; t < s->n; t++) norm[t] = log_norm(x, s->logits + t * vocab, &closing[t]);
    for (size_t k = s->first; k < o->n; k++) {
        if (!same_start(x, s->first, k)) continue;
        ibid_tried *d = &o->tried[k];
        for (size_t t = 0; t + 1 < d->n_tokens; t++)
            d->rest += s->logits[t * vocab + (size_t)tokens[t + 1]] - norm[t];
        d->stop = closing[d->n_tokens - 1];
    }
}

/* One pass over n starts, each in a sequence of its own behind the question. */
static ibid_err try_group(run *x, start *starts, size_t n) {
    ibid_step steps[GROUP_MAX];
    uint32_t positions[IBID_EXTRACT_TOKENS_MAX];
    size_t before = ibid_seq_live_count(x->asked.seq), rows = 0;
    for (size_t t = 0; t < IBID_EXTRACT_TOKENS_MAX; t++)
        positions[t] = x->asked.position + (uint32_t)t;
    for (size_t i = 0; i < n; i++) {
        start *s = &starts[i];
        s->logits = x->logits + rows * x->r->model->n_vocab;
        steps[i] = (ibid_step){.seq = s->seq,
                               .tokens = start_tokens(x, s),
                               .positions = positions,
                               .n = s->n,
                               .n_logits = s->n,
                               .logits = s->logits};
        rows += s->n;
    }
    ibid_sched_enter(x->r->sched, true);
    ibid_err e = ibid_engine_forward(x->r->engine, steps, n, x->p->cancel);
    ibid_sched_leave(x->r->sched);
    x->out->rows += rows;
    for (size_t i = 0; !e && i < n; i++) {
        ibid_seq_truncate(starts[i].seq, before);
        read_start(x, &starts[i]);
    }
    return e;
}

/* The first start goes on in the question's own sequence, the others in copies of it. Where those
 * cannot be had, a group is one start. */
static ibid_err fork_for(run *x, size_t want, ibid_seq **seqs, size_t *n) {
    ibid_err e = IBID_OK;
    seqs[0] = x->asked.seq;
    for (*n = 1; !e && *n < want; *n += !e)
        e = ibid_seq_fork(x->asked.seq, IBID_EXTRACT_TOKENS_MAX, &seqs[*n]);
    return e == IBID_NOTSUP ? IBID_OK : e;
}

static size_t group_of(const start *starts, size_t n, size_t seqs) {
    size_t rows = 0, i = 0;
    while (i < n && i < seqs && (i == 0 || rows + starts[i].n <= GROUP_ROWS)) rows += starts[i++].n;
    return i;
}

static ibid_err try_all(run *x) {
    ibid_extracted *o = x->out;
    start *starts = ibid_calloc(o->n + 1, sizeof *starts);
    ibid_seq *seqs[GROUP_MAX];
    size_t n = 0, n_seqs = 0;
    ibid_err e = starts ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for spans");
    if (!e) n = list_starts(x, starts);
    if (!e) e = fork_for(x, n < GROUP_MAX ? n : GROUP_MAX, seqs, &n_seqs);
    for (size_t at = 0, take; !e && at < n; at += take) {
        take = group_of(starts + at, n - at, n_seqs);
        for (size_t i = 0; i < take; i++) starts[at + i].seq = seqs[i];
        if (x->p->tick) e = x->p->tick(x->p->arg);
        if (!e) e = try_group(x, starts + at, take);
    }
    for (size_t i = 1; i < n_seqs; i++) ibid_seq_close(seqs[i]);
    ibid_free(starts);
    return e;
}

/* ---- Order ---- */

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

/* Orders what is tried, best first. */
static void rank(ibid_extracted *o, const weights *by) {
    for (size_t i = 0; i < o->n; i++) {
        ibid_tried *t = &o->tried[i];
        size_t words = n_words(o, &t->span);
        t->score = by_word * (double)(words < 3 ? words : 3) + by->text * t->span.score +
                   by->first * t->first + by->rest * t->rest + by->stop * t->stop +
                   by->token * (double)t->n_tokens +
                   by->surprise * sqrt(t->first < 0 ? -t->first : 0);
    }
    if (o->n) qsort(o->tried, o->n, sizeof *o->tried, better_first);
}

/* The model reads on only where the text and the first token promise most. */
static void narrow(run *x) {
    if (x->p->most) return;
    rank(x->out, &early);
    if (x->out->n > IBID_EXTRACT_TRIED) x->out->n = IBID_EXTRACT_TRIED;
}

static void share_out(ibid_extracted *o) {
    double sum = 0;
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
        x.logits = ibid_alloc(r->model->n_vocab * GROUP_ROWS * sizeof *x.logits);
        if (!x.logits) e = ibid_fail(IBID_NOMEM, "no memory for likelihoods");
    }
    if (!e) e = open_closes(&x);
    if (!e) e = open_texts(&x);
    if (!e) e = choose_spans(&x);
    if (!e && out->n) e = ask(&x);
    if (!e && out->n) {
        narrow(&x);
        e = try_all(&x);
    }
    if (!e) {
        rank(out, &late);
        share_out(out);
    }
    out->first_ns = ibid_now_ns();
    ibid_asked_close(&x.asked);
    for (size_t b = 0; x.ends && b < p->n_blocks; b++) ibid_free(x.ends[b]);
    ibid_free(x.ends);
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
