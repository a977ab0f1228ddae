#include "attention/plan/recompute.h"

#include "rpc/base/clock.h"
#include "rpc/base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static size_t mask_words(const ibid_placed_block *b) {
    return (b->layers[0].n_tokens + 63) / 64;
}

static size_t n_block_tokens(const ibid_placed_block *b, size_t n) {
    size_t total = 0;
    for (size_t i = 0; i < n; i++) total += b[i].layers[0].n_tokens;
    return total;
}

/* ---- Choosing ---- */

ibid_err ibid_choice_init(ibid_choice *c, const ibid_placed_block *blocks, size_t n_blocks) {
    memset(c, 0, sizeof *c);
    if (n_blocks == 0) return IBID_OK;
    c->masks = ibid_calloc(n_blocks, sizeof *c->masks);
    if (!c->masks) return ibid_fail(IBID_NOMEM, "no memory to choose from %zu blocks", n_blocks);
    c->n_blocks = n_blocks;
    for (size_t i = 0; i < n_blocks; i++) {
        c->masks[i] = ibid_calloc(mask_words(&blocks[i]), sizeof **c->masks);
        if (!c->masks[i]) {
            ibid_choice_fini(c);
            return ibid_fail(IBID_NOMEM, "no memory to choose from %zu blocks", n_blocks);
        }
    }
    return IBID_OK;
}

void ibid_choice_fini(ibid_choice *c) {
    for (size_t i = 0; i < c->n_blocks; i++) ibid_free(c->masks[i]);
    ibid_free(c->masks);
    ibid_free(c->tokens);
    ibid_free(c->positions);
    memset(c, 0, sizeof *c);
}

typedef struct candidate {
    float mass;
    uint32_t block, token;
} candidate;

static int heavier_first(const void *x, const void *y) {
    const candidate *a = x, *b = y;
    if (a->mass != b->mass) return a->mass > b->mass ? -1 : 1;
    if (a->block != b->block) return a->block < b->block ? -1 : 1;
    return (a->token > b->token) - (a->token < b->token);
}

/* Sets the bits of the `want` heaviest tokens; those of block 0 take part if it is not exact. */
static ibid_err mark_heaviest(ibid_choice *c, const ibid_placed_block *blocks, float *const *mass,
                              size_t want) {
    size_t first = blocks[0].offset == 0 ? 1 : 0, n = 0;
    size_t total = n_block_tokens(blocks + first, c->n_blocks - first);
    candidate *all = NULL;
    if (total == 0) return IBID_OK;
    if (!(all = ibid_calloc(total, sizeof *all)))
        return ibid_fail(IBID_NOMEM, "no memory to choose from %zu tokens", total);
    for (size_t b = first; b < c->n_blocks; b++) {
        for (size_t t = 0; t < blocks[b].layers[0].n_tokens; t++) {
            float m = mass[b][t];
            all[n++] = (candidate){isnan(m) ? 0 : m, (uint32_t)b, (uint32_t)t};
        }
    }
    qsort(all, n, sizeof *all, heavier_first);
    for (size_t i = 0; i < n && i < want; i++) {
        c->masks[all[i].block][all[i].token / 64] |= UINT64_C(1) << all[i].token % 64;
    }
    ibid_free(all);
    return IBID_OK;
}

/* The rows of the marked tokens, in position order. */
static ibid_err list_rows(ibid_choice *c, const ibid_placed_block *blocks, size_t room) {
    if (room == 0) return IBID_OK;
    c->tokens = ibid_calloc(room, sizeof *c->tokens);
    c->positions = ibid_calloc(room, sizeof *c->positions);
    if (!c->tokens || !c->positions)
        return ibid_fail(IBID_NOMEM, "no memory to recompute %zu tokens", room);
    for (size_t b = 0; b < c->n_blocks; b++) {
        for (size_t t = 0; t < blocks[b].layers[0].n_tokens; t++) {
            if (!(c->masks[b][t / 64] >> t % 64 & 1)) continue;
            c->tokens[c->n_rows] = blocks[b].tokens[t];
            c->positions[c->n_rows++] = (uint32_t)(blocks[b].local0 + blocks[b].offset + t);
        }
    }
    return IBID_OK;
}

ibid_err ibid_choose(ibid_choice *c, const ibid_placed_block *blocks, float *const *mass,
                     double share) {
    size_t total = n_block_tokens(blocks, c->n_blocks);
    size_t want = (size_t)ceil(share * (double)total);
    ibid_err err = IBID_OK;
    if (want > total) want = total;
    if (want == 0) return IBID_OK;
    if (share >= 1) {
        for (size_t b = 0; b < c->n_blocks; b++) {
            memset(c->masks[b], 0xff, mask_words(&blocks[b]) * sizeof **c->masks);
        }
    } else {
        err = mark_heaviest(c, blocks, mass, want);
    }
    return err ? err : list_rows(c, blocks, want);
}

/* ---- The question ---- */

/* mass[i + shift] of n segments; all in one block of memory. */
static ibid_err open_masses(const ibid_question *q, size_t shift, float ***out) {
    size_t total = n_block_tokens(q->blocks, q->n_blocks), n = q->n_blocks + shift;
    float **mass = ibid_calloc(1, n * sizeof *mass + total * sizeof **mass);
    if (!mass) return ibid_fail(IBID_NOMEM, "no memory for the attention of %zu tokens", total);
    float *next = (float *)(void *)(mass + n);
    for (size_t b = 0; b < q->n_blocks; b++) {
        mass[b + shift] = next;
        next += q->blocks[b].layers[0].n_tokens;
    }
    *out = mass;
    return IBID_OK;
}

static ibid_err add_segments(ibid_seq *s, const ibid_question *q, const ibid_choice *c) {
    ibid_err err = q->prefix ? ibid_seq_add_segment(s, q->prefix) : IBID_OK;
    for (size_t b = 0; !err && b < q->n_blocks; b++) {
        const ibid_placed_block *p = &q->blocks[b];
        ibid_segment g = {
            .layers = p->layers, .local0 = p->local0, .offset = p->offset, .id = p->id};
        if (q->share > 0) g.masked = c->masks[b];
        err = ibid_seq_add_segment(s, &g);
    }
    return err;
}

static uint64_t question_position(const ibid_question *q) {
    const ibid_placed_block *last = q->n_blocks ? &q->blocks[q->n_blocks - 1] : NULL;
    if (last) return last->local0 + last->offset + last->layers[0].n_tokens;
    return q->prefix ? q->prefix->local0 + q->prefix->offset + q->prefix->layers[0].n_tokens : 0;
}

/* Pass 1: what each block token gets of the question's attention. */
static ibid_err probe(ibid_engine *e, const ibid_question *q, ibid_seq *s,
                      const uint32_t *positions, float *const *mass, const atomic_bool *cancel) {
    ibid_probe p = {.heads = q->heads, .mass = mass, .n_rows = q->n};
    ibid_step step = {.seq = s,
                      .tokens = q->tokens,
                      .positions = positions,
                      .n = q->n,
                      .probe = &p,
                      .ready = q->ready,
                      .ready_arg = q->ready_arg};
    size_t before = ibid_seq_live_count(s);
    ibid_err err = ibid_engine_forward(e, &step, 1, cancel);
    if (!err) ibid_seq_truncate(s, before);
    return err;
}

/* Pass 2: the chosen rows, then the question. room: ids and positions of both, the question's last.
 */
static ibid_err answer(ibid_engine *e, const ibid_question *q, ibid_asked *a, int32_t *tokens,
                       uint32_t *positions, const atomic_bool *cancel, float *logits) {
    const ibid_choice *c = &a->choice;
    if (c->n_rows) {
        memcpy(tokens, c->tokens, c->n_rows * sizeof *tokens);
        memcpy(positions, c->positions, c->n_rows * sizeof *positions);
    }
    for (size_t i = 0; i < q->n; i++) {
        tokens[c->n_rows + i] = q->tokens[i];
        positions[c->n_rows + i] = a->position + (uint32_t)i;
    }
    ibid_step step = {.seq = a->seq,
                      .tokens = tokens,
                      .positions = positions,
                      .n = c->n_rows + q->n,
                      .n_logits = 1,
                      .logits = logits,
                      .will_select = q->will_select,
                      .ready = q->ready,
                      .ready_arg = q->ready_arg};
    return ibid_engine_forward(e, &step, 1, cancel);
}

static ibid_err check_question(const ibid_engine *e, const ibid_question *q) {
    size_t n_ctx = ibid_engine_model(e)->n_ctx;
    uint64_t first = question_position(q);
    if (q->n == 0 || !(q->share >= 0 && q->share <= 1))
        return ibid_fail(IBID_INVAL, "a question of %zu tokens, recompute %g (0..1)", q->n,
                         q->share);
    if (first > n_ctx || q->n > n_ctx - first)
        return ibid_fail(IBID_CONTEXT, "%llu tokens are needed; the model's context has %zu",
                         (unsigned long long)first + q->n, n_ctx);
    return IBID_OK;
}

ibid_err ibid_question_run(ibid_engine *e, const ibid_question *q, size_t live_hint,
                           const atomic_bool *cancel, ibid_asked *out, float *logits) {
    ibid_asked a = {0};
    float **mass = NULL;
    int32_t *tokens = NULL;
    uint32_t *positions = NULL;
    size_t shift = q->prefix ? 1 : 0, most;
    uint64_t start = ibid_now_ns();
    memset(out, 0, sizeof *out);
    ibid_err err = check_question(e, q);
    if (err) return err;
    a.position = (uint32_t)question_position(q);
    most = q->n + (q->share > 0 ? n_block_tokens(q->blocks, q->n_blocks) : 0);
    tokens = ibid_calloc(most, sizeof *tokens);
    positions = ibid_calloc(most, sizeof *positions);
    if (!tokens || !positions) {
        err = ibid_fail(IBID_NOMEM, "no memory for a question of %zu rows", most);
        goto done;
    }
    if ((err = ibid_choice_init(&a.choice, q->blocks, q->n_blocks)) ||
        (err = ibid_seq_open(e, q->n + live_hint, &a.seq)) ||
        (err = add_segments(a.seq, q, &a.choice)))
        goto done;
    if (q->share > 0 && q->share < 1 && q->n_blocks) {
        for (size_t i = 0; i < q->n; i++) positions[i] = a.position + (uint32_t)i;
        if ((err = open_masses(q, shift, &mass)) ||
            (err = probe(e, q, a.seq, positions, mass, cancel)))
            goto done;
        a.probe_ms = ibid_ms_since(start);
    }
    if (q->share > 0 && q->n_blocks &&
        (err = ibid_choose(&a.choice, q->blocks, mass ? mass + shift : NULL, q->share)))
        goto done;
    if ((err = answer(e, q, &a, tokens, positions, cancel, logits))) goto done;
    a.position += (uint32_t)q->n;
    a.main_ms = ibid_ms_since(start) - a.probe_ms;
    *out = a;
    memset(&a, 0, sizeof a);
done:
    ibid_asked_close(&a);
    ibid_free(mass);
    ibid_free(tokens);
    ibid_free(positions);
    return err;
}

void ibid_asked_close(ibid_asked *a) {
    ibid_seq_close(a->seq);
    ibid_choice_fini(&a->choice);
    memset(a, 0, sizeof *a);
}
