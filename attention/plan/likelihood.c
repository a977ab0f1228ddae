#include "attention/plan/likelihood.h"

#include "attention/plan/encode.h"

#include <math.h>
#include <string.h>

enum { ROWS = 64, LANES = 16 }; /* rows a pass: their logits are all kept */

/* ---- Sums of exponentials ---- */

/* e^x for x <= 0, as 2^whole times a polynomial of the rest in [-0.5, 0.5] (Taylor of 2^r). Written
 * without branches so that a compiler makes vector code of it. */
static inline float exp_below_0(float x) {
    float t = fmaxf(x * 1.44269504f, -126.0f);
    float whole = floorf(t + 0.5f), r = t - whole;
    float p =
        1.0f +
        r * (0.693147181f +
             r * (0.240226507f + r * (0.0555041087f + r * (0.00961812911f + r * 0.00133335581f))));
    int32_t bits = ((int32_t)whole + 127) * (1 << 23);
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

double ibid_log_sum_exp(const float *x, size_t n) {
    float top = x[0], lane[LANES] = {0};
    double sum = 0;
    size_t i = 0;
    for (size_t j = 1; j < n; j++) top = x[j] > top ? x[j] : top;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++) lane[j] += exp_below_0(x[i + j] - top);
    for (size_t j = 0; j < LANES; j++) sum += (double)lane[j];
    for (; i < n; i++) sum += (double)exp_below_0(x[i] - top);
    return (double)top + log(sum);
}

/* ---- Passes ---- */
typedef struct reading {
    ibid_engine *engine;
    ibid_sched *sched;
    const ibid_model *model;
    ibid_kv_blob prompt;
    size_t n_prompt;
    uint32_t *positions; /* [n_prompt + IBID_LIKELIHOOD_TOKENS] */
    float *logits;       /* [ROWS, n_vocab] */
} reading;

static ibid_err pass(reading *r, ibid_step *steps, size_t n) {
    ibid_sched_enter(r->sched, true);
    ibid_err e = ibid_engine_forward(r->engine, steps, n, NULL);
    ibid_sched_leave(r->sched);
    return e;
}

/* The prompt's KV, and in logits what it expects next. */
static ibid_err read_prompt(reading *r, const ibid_ids *prompt) {
    ibid_seq *s = NULL;
    ibid_step step = {.tokens = prompt->ids,
                      .positions = r->positions,
                      .n = prompt->n,
                      .n_logits = 1,
                      .logits = r->logits};
    ibid_err e = ibid_seq_open(r->engine, prompt->n, &s);
    step.seq = s;
    if (!e) e = pass(r, &step, 1);
    if (!e) e = ibid_kv_blob_export(r->model, s, 0, prompt->n, 0, IBID_KV_F16, &r->prompt);
    ibid_seq_close(s);
    return e;
}

static size_t tokens_of(const ibid_ids *t) {
    return t->n < IBID_LIKELIHOOD_TOKENS ? t->n : IBID_LIKELIHOOD_TOKENS;
}

/* Adds what the tokens behind the first one contribute, for texts [from, to): at most ROWS rows. */
static ibid_err read_texts(reading *r, const ibid_ids *texts, size_t from, size_t to, double *out) {
    ibid_step steps[ROWS];
    size_t n = 0, row = 0, vocab = r->model->n_vocab;
    ibid_segment segment = {.layers = r->prompt.layers};
    ibid_err e = IBID_OK;
    memset(steps, 0, sizeof steps);
    for (size_t i = from; i < to && !e; i++) {
        size_t rows = tokens_of(&texts[i]);
        if (rows < 2) continue;
        ibid_step *s = &steps[n++];
        e = ibid_seq_open(r->engine, rows - 1, &s->seq);
        if (!e) e = ibid_seq_add_segment(s->seq, &segment);
        s->tokens = texts[i].ids;
        s->positions = r->positions + r->n_prompt;
        s->n = s->n_logits = rows - 1;
        s->logits = r->logits + row * vocab;
        row += rows - 1;
    }
    if (!e && n) e = pass(r, steps, n);
    for (size_t i = from, k = 0; i < to && !e; i++) {
        size_t rows = tokens_of(&texts[i]);
        if (rows < 2) continue;
        const float *l = steps[k++].logits;
        for (size_t t = 1; t < rows; t++, l += vocab)
            out[i] += (double)l[texts[i].ids[t]] - ibid_log_sum_exp(l, vocab);
    }
    for (size_t k = 0; k < n; k++) ibid_seq_close(steps[k].seq);
    return e;
}

static ibid_err check(const ibid_model *m, const ibid_ids *prompt, const ibid_ids *texts,
                      size_t n) {
    if (!prompt->n) return ibid_fail(IBID_INVAL, "an empty prompt");
    if (prompt->n > IBID_LIKELIHOOD_PROMPT || n > IBID_LIKELIHOOD_TEXTS)
        return ibid_fail(IBID_TOOBIG, "%zu texts behind %zu tokens; at most %d behind %d", n,
                         prompt->n, IBID_LIKELIHOOD_TEXTS, IBID_LIKELIHOOD_PROMPT);
    for (size_t i = 0; i < n; i++)
        for (size_t t = 0; t < tokens_of(&texts[i]); t++)
            if (texts[i].ids[t] < 0 || (size_t)texts[i].ids[t] >= m->n_vocab)
                return ibid_fail(IBID_INVAL, "token %d is not in the vocabulary", texts[i].ids[t]);
    return IBID_OK;
}

/* Rows whose logits a pass needs at most; the prompt needs one. */
static size_t most_rows(const ibid_ids *texts, size_t n) {
    size_t rows = 1;
    for (size_t i = 0; i < n && rows < ROWS; i++) rows += tokens_of(&texts[i]);
    return rows < ROWS ? rows : ROWS;
}

ibid_err ibid_likelihoods(ibid_engine *e, ibid_sched *sched, const ibid_ids *prompt,
                          const ibid_ids *texts, size_t n, double *out) {
    reading r = {.engine = e, .sched = sched, .model = ibid_engine_model(e), .n_prompt = prompt->n};
    ibid_err err = check(r.model, prompt, texts, n);
    if (err) return err;
    size_t positions = prompt->n + IBID_LIKELIHOOD_TOKENS;
    r.positions = ibid_alloc(positions * sizeof *r.positions);
    r.logits = ibid_alloc(most_rows(texts, n) * r.model->n_vocab * sizeof *r.logits);
    if (!r.positions || !r.logits) err = ibid_fail(IBID_NOMEM, "no memory for likelihoods");
    for (size_t i = 0; i < positions && !err; i++) r.positions[i] = (uint32_t)i;
    if (!err) err = read_prompt(&r, prompt);
    if (!err) {
        double all = ibid_log_sum_exp(r.logits, r.model->n_vocab);
        for (size_t i = 0; i < n; i++)
            out[i] = texts[i].n ? (double)r.logits[texts[i].ids[0]] - all : 0;
    }
    for (size_t from = 0; from < n && !err;) {
        size_t to = from, rows = 0;
        while (to < n && rows + tokens_of(&texts[to]) <= ROWS) rows += tokens_of(&texts[to++]);
        err = read_texts(&r, texts, from, to, out);
        from = to;
    }
    ibid_kv_blob_fini(&r.prompt);
    ibid_free(r.positions);
    ibid_free(r.logits);
    return err;
}
