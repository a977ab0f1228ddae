#include "attention/plan/gate_run.h"

#include "attention/plan/calibration_run.h"
#include "rpc/base/mem.h"

#include <string.h>

enum { PIECE = 64, TOKENS_MIN = 16 }; /* rows whose logits are held at once */

static const char *const names[IBID_GATE_TYPES] = {
    [IBID_KV_F32] = "f32", [IBID_KV_F16] = "f16", [IBID_KV_Q8_0] = "q8_0"};

const char *ibid_kv_type_name(ibid_kv_type type) {
    return names[type];
}

bool ibid_kv_type_from_name(ibid_str name, ibid_kv_type *out) {
    for (size_t i = 0; i < IBID_GATE_TYPES; i++) {
        if (name.n != strlen(names[i]) || memcmp(name.s, names[i], name.n) != 0) continue;
        *out = (ibid_kv_type)i;
        return true;
    }
    return false;
}

bool ibid_kv_type_fits(const ibid_model *m, ibid_kv_type type) {
    return type != IBID_KV_Q8_0 || m->head_dim % 32 == 0;
}

bool ibid_gate_passes(const ibid_gate_score *s) {
    return s->n > 0 && s->kl_mean <= IBID_GATE_KL && s->top1 >= IBID_GATE_TOP1;
}

typedef struct run {
    const ibid_gate_job *j;
    const ibid_model *m;
    int32_t *ids; /* the text */
    size_t n_ids, window, stored, bos;
    int32_t tokens[IBID_GATE_WINDOW];
    uint32_t positions[IBID_GATE_WINDOW];
    float *ref, *test; /* [PIECE, n_vocab] */
    ibid_gate_tally tallies[IBID_GATE_TYPES];
    ibid_seq *live, *over[IBID_GATE_TYPES]; /* of the current window */
    ibid_kv_view *kv[IBID_GATE_TYPES];
} run;

static ibid_err forward(const run *r, ibid_seq *s, size_t row, size_t n, float *logits) {
    ibid_step step = {.seq = s,
                      .tokens = r->tokens + row,
                      .positions = r->positions + row,
                      .n = n,
                      .n_logits = logits ? n : 0,
                      .logits = logits};
    if (r->j->sched) ibid_sched_enter(r->j->sched, false);
    ibid_err e = ibid_engine_forward(r->j->engine, &step, 1, r->j->cancel);
    if (r->j->sched) ibid_sched_leave(r->j->sched);
    return e;
}

/* Computes the first half of the window once, and stores it in every type. */
static ibid_err begin_window(run *r) {
    ibid_engine *engine = r->j->engine;
    ibid_err e = ibid_seq_open(engine, r->window, &r->live);
    if (!e) e = forward(r, r->live, 0, r->stored, NULL);
    for (size_t i = 0; !e && i < r->j->n_types; i++) {
        e = ibid_gate_store(r->m, r->live, 0, r->stored, r->j->types[i], &r->kv[i]);
        if (!e) e = ibid_seq_open(engine, r->window - r->stored, &r->over[i]);
        ibid_segment g = {.layers = r->kv[i]};
        if (!e) e = ibid_seq_add_segment(r->over[i], &g);
    }
    return e;
}

static void end_window(run *r) {
    ibid_seq_close(r->live);
    r->live = NULL;
    for (size_t i = 0; i < r->j->n_types; i++) {
        ibid_seq_close(r->over[i]);
        ibid_free(r->kv[i]);
        r->over[i] = NULL;
        r->kv[i] = NULL;
    }
}

/* Rows [row, row + n) of the window; after: the token behind the window, or -1. */
static ibid_err score_piece(run *r, size_t row, size_t n, int32_t after) {
    ibid_err e = forward(r, r->live, row, n, r->ref);
    for (size_t i = 0; !e && i < r->j->n_types; i++) {
        e = forward(r, r->over[i], row, n, r->test);
        for (size_t k = 0; !e && k < n; k++) {
            int32_t next = row + k + 1 < r->window ? r->tokens[row + k + 1] : after;
            size_t at = k * r->m->n_vocab;
            e = ibid_gate_add(&r->tallies[i], r->ref + at, r->test + at, r->m->n_vocab, next);
        }
    }
    return e;
}

/* The window that starts at token `first` of the text; scores at most `left` rows. */
static ibid_err score_window(run *r, size_t first, size_t left) {
    size_t n = r->window - r->bos, end = r->window;
    if (r->bos) r->tokens[0] = ibid_tokenizer_bos(r->m->tokenizer);
    memcpy(r->tokens + r->bos, r->ids + first, n * sizeof *r->tokens);
    if (end - r->stored > left) end = r->stored + left;
    int32_t after = first + n < r->n_ids ? r->ids[first + n] : -1;
    ibid_err e = begin_window(r);
    for (size_t row = r->stored; !e && row < end; row += PIECE)
        e = score_piece(r, row, end - row < PIECE ? end - row : PIECE, after);
    end_window(r);
    return e;
}

static ibid_err read_text(run *r) {
    ibid_str text = r->j->text;
    ibid_token *t = NULL;
    if (!text.s) text = (ibid_str){(const char *)ibidi_sample_text, ibidi_sample_text_size};
    ibid_err e = ibid_tokenize(r->m->tokenizer, text.s, text.n, false, &t, &r->n_ids);
    if (e) return e;
    r->ids = ibid_alloc((r->n_ids + 1) * sizeof *r->ids);
    for (size_t i = 0; r->ids && i < r->n_ids; i++) r->ids[i] = t[i].id;
    ibid_free(t);
    if (!r->ids) return ibid_fail(IBID_NOMEM, "no memory for a text of %zu tokens", r->n_ids);
    if (r->n_ids < TOKENS_MIN)
        return ibid_fail(IBID_INVAL, "a text of %zu tokens; a gate needs %d or more", r->n_ids,
                         TOKENS_MIN);
    return IBID_OK;
}

static ibid_err prepare(run *r) {
    size_t limit = r->m->n_ctx < IBID_GATE_WINDOW ? r->m->n_ctx : IBID_GATE_WINDOW, bytes;
    for (size_t i = 0; i < r->j->n_types; i++) {
        if (ibid_kv_type_fits(r->m, r->j->types[i])) continue;
        return ibid_fail(IBID_NOTSUP, "%s KV needs a head size that is a multiple of 32, not %zu",
                         names[r->j->types[i]], r->m->head_dim);
    }
    ibid_err e = read_text(r);
    if (e) return e;
    r->bos = ibid_tokenizer_add_bos(r->m->tokenizer) ? 1 : 0;
    r->window = r->n_ids + r->bos < limit ? r->n_ids + r->bos : limit;
    r->stored = r->window / 2;
    if (r->stored == 0 || r->window <= r->bos)
        return ibid_fail(IBID_NOTSUP, "the model's context of %zu is too short", r->m->n_ctx);
    for (size_t i = 0; i < r->window; i++) r->positions[i] = (uint32_t)i;
    if (ibid_mul_size(r->m->n_vocab, PIECE * sizeof(float), &bytes)) {
        r->ref = ibid_alloc(bytes);
        r->test = ibid_alloc(bytes);
    }
    return r->ref && r->test ? IBID_OK : ibid_fail(IBID_NOMEM, "no memory for logits");
}

ibid_err ibid_gate_run(const ibid_gate_job *j, ibid_gate_score *out) {
    if (j->n_types > IBID_GATE_TYPES || j->positions == 0)
        return ibid_fail(IBID_INVAL, "a gate of %zu types, %zu positions", j->n_types,
                         j->positions);
    run *r = ibid_calloc(1, sizeof *r);
    if (!r) return ibid_fail(IBID_NOMEM, "no memory for a gate");
    r->j = j;
    r->m = ibid_engine_model(j->engine);
    ibid_err e = prepare(r);
    size_t n = 0, step = e ? 0 : r->window - r->bos;
    for (size_t first = 0; !e && n < j->positions && first + step <= r->n_ids; first += step) {
        e = score_window(r, first, j->positions - n);
        n += r->window - r->stored;
    }
    for (size_t i = 0; i < j->n_types; i++) {
        if (!e) out[i] = ibid_gate_score_of(&r->tallies[i]);
        ibid_gate_fini(&r->tallies[i]);
    }
    ibid_free(r->ids);
    ibid_free(r->ref);
    ibid_free(r->test);
    ibid_free(r);
    return e;
}
