#include "attention/cuda/gpu.h"
#include "attention/engine_internal.h"
#include "rpc/base/log.h"

#include <math.h>
#include <string.h>

enum {
    LOGIT_ROWS = 16, /* rows of several steps that meet the output head together */
    STRETCH = IBIDI_CHUNKS * IBIDI_CHUNK,
    ALIGN = 64
};

/* Which groups of a layer's inputs are rounded finely (kernels.h, q8_pack), measured in
 * docs/performance.md: all around attention, which decides what is looked at; of the feed-forward's
 * inputs the few large channels, of its inner ones the larger half. The last layers' errors are not
 * mended by any after them. */
static const float FINE_ABOVE[IBIDI_WEIGHTS] = {
    [IBIDI_WQ] = 0,      [IBIDI_WK] = 0,    [IBIDI_WV] = 0,     [IBIDI_WO] = 0,
    [IBIDI_GATE] = 1.2f, [IBIDI_UP] = 1.2f, [IBIDI_DOWN] = 1.0f};
enum { ONE_LAST_LAYER_IN = 16 }; /* and one more: all groups are fine */

/* ---- Opening ---- */

/* Carves arrays out of one block: called once without a block to learn its size, then with it. */
typedef struct carver {
    uint8_t *base;
    size_t used;
    bool ok;
} carver;

static void *carve(carver *c, size_t n, size_t size) {
    size_t bytes = 0, end = 0;
    if (!ibid_mul_size(n, size, &bytes) || !ibid_add_size(c->used, bytes, &end) ||
        end > SIZE_MAX - ALIGN) {
        c->ok = false;
        return NULL;
    }
    void *p = c->base ? c->base + c->used : NULL;
    c->used = ibid_align_up(end, ALIGN);
    return p;
}

static size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

/* The widest input of a linear layer. */
static size_t max_cols(const ibid_engine *e) {
    return max_size(max_size(e->m->n_embd, e->m->n_ff), e->q_dim);
}

static size_t matmul_bytes(const ibid_engine *e) {
    size_t cols = max_size(max_cols(e), 2 * e->m->head_dim + 32); /* or a page's summary */
    return max_size(e->k->matmul_scratch(cols, 1), e->k->matmul_scratch(cols, IBIDI_CHUNK));
}

static void carve_threads(ibid_engine *e, carver *c) {
    size_t n = e->tile_rows * e->group, dim = e->m->head_dim, bytes = matmul_bytes(e);
    for (size_t i = 0; i < e->n_threads; i++) {
        ibidi_thread *t = &e->threads[i];
        t->matmul = carve(c, bytes, 1);
        t->q = carve(c, n * dim, sizeof *t->q);
        t->q_turned = carve(c, n * dim, sizeof *t->q_turned);
        t->acc = carve(c, n * dim, sizeof *t->acc);
        t->lse = carve(c, n, sizeof *t->lse);
        t->laid = carve(c, 2 * IBID_KV_TILE * dim, sizeof *t->laid);
        t->state = carve(c, n, sizeof *t->state);
        t->visible = carve(c, n, sizeof *t->visible);
    }
}

/* Of a stretch of n rows. */
static void carve_rows(ibid_engine *e, carver *c, size_t n) {
    const ibid_model *m = e->m;
    ibidi_rows *r = &e->all;
    r->x = carve(c, n, m->n_embd * sizeof(float));
    r->q = carve(c, n, e->wide * sizeof(float));
    r->cos = carve(c, n, m->rope.n_rot / 2 * sizeof(float));
    r->sin = carve(c, n, m->rope.n_rot / 2 * sizeof(float));
    if (n > IBIDI_CHUNK) n = IBIDI_CHUNK;
    r->h = carve(c, n, e->wide * sizeof(float));
    r->k = carve(c, n, e->kv_dim * sizeof(float));
    r->v = carve(c, n, e->kv_dim * sizeof(float));
    r->gate = carve(c, n, m->n_ff * sizeof(float));
    r->up = carve(c, n, m->n_ff * sizeof(float));
    r->lse = carve(c, n, m->n_heads * sizeof(float));
    size_t n_tiles = (n + IBID_Q8_TILE - 1) / IBID_Q8_TILE;
    if (e->int8) r->packed = carve(c, n_tiles, e->k->q8_bytes(ibid_align_up(max_cols(e), 32)));
}

static ibid_err open_threads(ibid_engine *e) {
    carver c = {.ok = true};
    e->threads = ibid_calloc(e->n_threads, sizeof *e->threads);
    if (!e->threads) return ibid_fail(IBID_NOMEM, "no memory for an engine");
    carve_threads(e, &c);
    if (c.ok) e->thread_block = ibid_alloc_aligned(ALIGN, c.used);
    if (!e->thread_block) return ibid_fail(IBID_NOMEM, "no memory for an engine's threads");
    c = (carver){.base = e->thread_block, .ok = true};
    carve_threads(e, &c);
    return IBID_OK;
}

/* The model reader bounds each dimension; their products are checked here, once. */
static ibid_err plan_shape(ibid_engine *e) {
    const ibid_model *m = e->m;
    size_t heads = m->n_layers * m->n_kv_heads;
    e->group = m->n_heads / m->n_kv_heads;
    e->tile_rows = e->group < IBIDI_TILE ? IBIDI_TILE / e->group : 1;
    e->scale = (float)(1 / sqrt((double)m->head_dim));
    if (!ibid_mul_size(m->n_heads, m->head_dim, &e->q_dim) ||
        !ibid_mul_size(heads, m->head_dim, &e->page_bytes) || e->page_bytes > SIZE_MAX >> 16)
        return ibid_fail(IBID_NOMEM, "the model's KV is too large for this machine");
    e->kv_dim = m->n_kv_heads * m->head_dim;
    e->wide = max_size(e->q_dim, m->n_embd);
    return IBID_OK;
}

/* How live KV is kept, and what attends to it. */
static void plan_pages(ibid_engine *e) {
    if (e->gpu) {
        e->live_type = ibidi_gpu_kv_type(e->gpu);
        e->page_tokens = IBIDI_CU_PAGE;
        e->page_bytes = e->m->n_layers * ibidi_gpu_cell_bytes(e->gpu);
        return;
    }
    e->live_type = e->int8 && e->m->head_dim % 32 == 0 ? IBID_KV_Q8_0 : IBID_KV_F32;
    e->attn = e->int8 && e->k->attn_i8 ? e->k->attn_i8 : e->k->attn;
    e->attn_mass = e->int8 && e->k->attn_mass_i8 ? e->k->attn_mass_i8 : e->k->attn_mass;
    if (e->live_type == IBID_KV_Q8_0) { /* an f16 per 32 values */
        e->page_tokens = IBIDI_PAGE_I8;
        e->page_bytes = 2 * e->page_tokens * (e->page_bytes + e->page_bytes / 16);
    } else {
        e->page_tokens = IBIDI_PAGE;
        e->page_bytes *= 2 * e->page_tokens * sizeof(float);
    }
}

/* On the GPU, if it is wanted and there. */
static ibid_err open_gpu(ibid_engine *e, const ibid_engine_opts *o) {
    if (!o || o->backend == IBID_BACKEND_CPU) return IBID_OK;
    ibid_err err = ibidi_gpu_open(e->m, o, e->pool, e->k, &e->gpu);
    bool cpu_does = err == IBID_NOTSUP || err == IBID_NOMEM || err == IBID_BACKEND;
    if (o->backend == IBID_BACKEND_AUTO && cpu_does) {
        ibid_log(err == IBID_NOTSUP ? IBID_LOG_INFO : IBID_LOG_WARN, "no GPU is used: %s",
                 ibid_err_detail());
        return IBID_OK;
    }
    return err;
}

ibid_err ibid_engine_open(const ibid_model *m, const ibid_engine_opts *o, ibid_engine **out) {
    ibid_err err;
    ibid_engine *e = ibid_calloc(1, sizeof *e);
    if (!e) return ibid_fail(IBID_NOMEM, "no memory for an engine");
    e->m = m;
    e->lost = o ? o->lost : NULL;
    e->lost_arg = o ? o->lost_arg : NULL;
    if ((err = plan_shape(e)) || (err = ibid_kernels_get(o ? o->kernels : NULL, &e->k)) ||
        (err = ibid_pool_open(o ? o->n_threads : 0, &e->pool)) || (err = open_gpu(e, o)))
        goto done;
    e->n_threads = ibid_pool_size(e->pool);
    e->int8 = o && o->int8 && e->k->matmul_q8 && !e->gpu;
    if (e->int8 && (err = ibidi_pack_open(m, o->cache, e->pool, &e->pack))) goto done;
    plan_pages(e);
    if ((err = open_threads(e))) goto done;
    *out = e;
    e = NULL;
done:
    ibid_engine_close(e);
    return err;
}

void ibid_engine_close(ibid_engine *e) {
    if (!e) return;
    ibidi_gpu_close(e->gpu);
    ibid_pool_close(e->pool);
    ibidi_pack_close(&e->pack);
    ibid_free(e->threads);
    ibid_free(e->thread_block);
    ibid_free(e->row_block);
    ibid_free(e->logits);
    ibid_free(e->pieces);
    ibid_free(e->partial_state);
    ibid_free(e->partial_acc);
    ibidi_tiles_close(e);
    ibid_free(e);
}

const ibid_model *ibid_engine_model(const ibid_engine *e) {
    return e->m;
}

const char *ibid_engine_backend(const ibid_engine *e) {
    return e->gpu ? "cuda" : "cpu";
}

bool ibid_engine_draws(const ibid_engine *e) {
    return e->gpu != NULL;
}

bool ibid_engine_lost(const ibid_engine *e) {
    return e->gpu && ibidi_gpu_lost(e->gpu);
}

bool ibid_engine_gpu_look(const ibid_engine *e, ibid_engine_gpu *out) {
    memset(out, 0, sizeof *out);
    if (e->gpu) ibidi_gpu_look(e->gpu, out);
    return e->gpu != NULL;
}

/* Whoever runs the process learns of it while this call's error is on its way to its caller. */
static void tell_lost(ibid_engine *e) {
    void (*tell)(void *arg, const char *detail) = e->lost;
    if (!tell || !ibid_engine_lost(e)) return;
    e->lost = NULL;
    tell(e->lost_arg, ibid_err_detail());
}

/* ---- Checking and scratch ---- */

static ibid_err check_rows(const ibid_model *m, const ibid_step *s) {
    const ibid_seq *q = s->seq;
    for (size_t i = 0; i < s->n; i++) {
        if (s->tokens[i] < 0 || (size_t)s->tokens[i] >= m->n_vocab)
            return ibid_fail(IBID_INVAL, "token %d is not one of the model's %zu", s->tokens[i],
                             m->n_vocab);
        bool first = i == 0 && q->n_live == 0;
        uint32_t before = i ? s->positions[i - 1] : first ? 0 : q->positions[q->n_live - 1];
        if (!first && s->positions[i] <= before)
            return ibid_fail(IBID_INVAL, "position %u after %u; positions must ascend",
                             s->positions[i], before);
    }
    if (s->n && s->positions[s->n - 1] >= m->n_ctx)
        return ibid_fail(IBID_CONTEXT, "%llu positions are needed; the model's context has %zu",
                         (unsigned long long)s->positions[s->n - 1] + 1, m->n_ctx);
    return IBID_OK;
}

static ibid_err check_step(const ibid_engine *e, const ibid_step *s) {
    const ibid_probe *p = s->probe;
    if (s->select && !(s->select->share > 0))
        return ibid_fail(IBID_INVAL, "a share of %g of the context is nothing to attend to",
                         s->select->share);
    if (!s->seq || s->seq->engine != e || s->seq->busy)
        return ibid_fail(IBID_INVAL, "a step's sequence is of another engine, or in two steps");
    if (s->draw && (!e->gpu || s->n_logits != 1))
        return ibid_fail(IBID_INVAL, "a token drawn on the %s from %zu rows",
                         ibid_engine_backend(e), s->n_logits);
    if (s->n_logits > s->n || (s->n_logits && !s->logits && !s->draw))
        return ibid_fail(IBID_INVAL, "%zu logits of %zu rows", s->n_logits, s->n);
    if (s->n_layers > e->m->n_layers ||
        (s->n_layers && s->n_layers < e->m->n_layers && s->n_logits))
        return ibid_fail(IBID_INVAL, "%zu layers of %zu, %zu logits", s->n_layers, e->m->n_layers,
                         s->n_logits);
    if (p && (!p->mass || p->row0 > s->n || p->n_rows > s->n - p->row0))
        return ibid_fail(IBID_INVAL, "probe of rows [%zu, %zu + %zu) of %zu", p->row0, p->row0,
                         p->n_rows, s->n);
    return check_rows(e->m, s);
}

/* Room for a stretch of n rows; kept for later calls. */
static ibid_err reserve_rows(ibid_engine *e, size_t n) {
    carver c = {.ok = true};
    if (n <= e->all.room) return IBID_OK;
    if (n > 8)
        n = ibid_align_up(n, IBIDI_CHUNK); /* a decoding batch, or full chunks */
    else
        n = 8;
    carve_rows(e, &c, n);
    ibid_free(e->row_block);
    e->all.room = 0;
    e->row_block = c.ok ? ibid_alloc_aligned(ALIGN, c.used) : NULL;
    if (!e->row_block) return ibid_fail(IBID_NOMEM, "no memory for %zu rows of activations", n);
    c = (carver){.base = e->row_block, .ok = true};
    carve_rows(e, &c, n);
    e->all.room = n;
    return IBID_OK;
}

static ibid_err reserve_pieces(ibid_engine *e, size_t n) {
    if (n <= e->piece_room) return IBID_OK;
    ibidi_piece *p = ibid_realloc(e->pieces, n * sizeof *p);
    if (!p) return ibid_fail(IBID_NOMEM, "no memory for %zu steps", n);
    e->pieces = p;
    e->piece_room = n;
    return IBID_OK;
}

static ibid_err reserve_partials(ibid_engine *e) {
    size_t n = ibidi_partials(e), bytes;
    if (n <= e->partial_room) return IBID_OK;
    ibid_free(e->partial_state);
    ibid_free(e->partial_acc);
    e->partial_room = 0;
    e->partial_acc = NULL;
    e->partial_state = ibid_calloc(n, sizeof *e->partial_state);
    if (ibid_mul_size(n, e->m->head_dim * sizeof(float), &bytes))
        e->partial_acc = ibid_alloc_aligned(ALIGN, ibid_align_up(bytes, ALIGN));
    if (!e->partial_state || !e->partial_acc)
        return ibid_fail(IBID_NOMEM, "no memory for %zu partial rows of attention", n);
    e->partial_room = n;
    return IBID_OK;
}

static ibid_err reserve_logits(ibid_engine *e, const ibid_step *steps, size_t n_steps) {
    size_t n = 0;
    for (size_t i = 0; i < n_steps; i++) n += steps[i].n_logits;
    if (n_steps == 1 || n == 0) return IBID_OK;
    if (n > LOGIT_ROWS) n = LOGIT_ROWS;
    if (n <= e->logit_rows) return IBID_OK;
    ibid_free(e->logits);
    e->logit_rows = 0;
    e->logits = ibid_alloc_aligned(ALIGN, n * e->m->n_vocab * sizeof *e->logits);
    if (!e->logits) return ibid_fail(IBID_NOMEM, "no memory for %zu rows of logits", n);
    e->logit_rows = n;
    return IBID_OK;
}

/* ---- The layers ---- */

const ibidi_piece *ibidi_piece_of(const ibid_engine *e, size_t row) {
    size_t lo = 0, hi = e->n_pieces;
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        if (e->pieces[mid].at <= row)
            lo = mid;
        else
            hi = mid;
    }
    return &e->pieces[lo];
}

static void embed_row(ibid_engine *e, size_t row, size_t layer) {
    const ibid_model *m = e->m;
    const ibidi_piece *p = ibidi_piece_of(e, row);
    size_t i = p->row0 + row - p->at, half = m->rope.n_rot / 2;
    const uint8_t *w =
        (const uint8_t *)m->embed.data + (size_t)p->step->tokens[i] * m->embed.row_bytes;
    (void)layer;
    e->k->dequantize(m->embed.type, w, e->rows.x + row * m->n_embd, m->n_embd);
    ibidi_rope_table(&m->rope, p->step->positions[i], 1, e->rows.cos + row * half,
                     e->rows.sin + row * half);
}

/* Adds what the layer before left in q, and normalises for this one (n_layers: for the head). */
static void start_row(ibid_engine *e, size_t row, size_t layer) {
    const ibid_model *m = e->m;
    const ibid_tensor *w = layer < m->n_layers ? &m->layers[layer].attn_norm : &m->output_norm;
    float *x = e->rows.x + row * m->n_embd;
    if (layer > 0) e->k->add(x, e->rows.q + row * e->wide, m->n_embd);
    e->k->rmsnorm(x, w->data, m->norm_eps, e->rows.h + row * e->wide, m->n_embd);
}

static void middle_row(ibid_engine *e, size_t row, size_t layer) {
    const ibid_model *m = e->m;
    float *x = e->rows.x + row * m->n_embd;
    e->k->add(x, e->rows.q + row * e->wide, m->n_embd);
    if (m->layers[layer].bo.data) e->k->add(x, m->layers[layer].bo.data, m->n_embd);
    e->k->rmsnorm(x, m->layers[layer].ffn_norm.data, m->norm_eps, e->rows.h + row * e->wide,
                  m->n_embd);
}

/* Adds a bias and normalises each head, where the model does. */
static void finish_heads(const ibid_engine *e, float *x, size_t n_heads, const ibid_tensor *bias,
                         const ibid_tensor *norm) {
    size_t dim = e->m->head_dim;
    if (bias->data) e->k->add(x, bias->data, n_heads * dim);
    for (size_t h = 0; norm->data && h < n_heads; h++) {
        e->k->rmsnorm(x + h * dim, norm->data, e->m->norm_eps, x + h * dim, dim);
    }
}

static void store_row(ibid_engine *e, size_t row, size_t layer) {
    const ibid_model *m = e->m;
    const ibidi_piece *p = ibidi_piece_of(e, row);
    size_t dim = m->head_dim, half = m->rope.n_rot / 2;
    size_t live = p->seq->base + p->row0 + row - p->at;
    float *k = e->rows.k + row * e->kv_dim;
    float *v = e->rows.v + row * e->kv_dim;
    const ibid_layer *l = &m->layers[layer];
    finish_heads(e, k, m->n_kv_heads, &l->bk, &l->k_norm);
    if (l->bv.data) e->k->add(v, l->bv.data, e->kv_dim);
    e->k->rope(m->rope.pairing, k, m->n_kv_heads, dim, m->rope.n_rot, e->rows.cos + row * half,
               e->rows.sin + row * half);
    for (size_t h = 0; h < m->n_kv_heads; h++) {
        ibid_kv_view page = ibidi_page_view(p->seq, live / e->page_tokens, layer, h);
        ibidi_put_keys(e->k, &page, 0, live % e->page_tokens, k + h * dim);
        ibidi_put_values(e->k, &page, 0, live % e->page_tokens, v + h * dim);
    }
}

static void turn_row(ibid_engine *e, size_t row, size_t layer) {
    const ibid_model *m = e->m;
    size_t half = m->rope.n_rot / 2;
    float *q = e->rows.q + row * e->wide;
    const ibid_layer *l = &m->layers[layer];
    finish_heads(e, q, m->n_heads, &l->bq, &l->q_norm);
    e->k->rope(m->rope.pairing, q, m->n_heads, m->head_dim, m->rope.n_rot, e->rows.cos + row * half,
               e->rows.sin + row * half);
    for (size_t i = 0; i < e->q_dim; i++) q[i] *= e->scale;
}

/* Rows [*lo, *hi) of a step are still needed in its last layer: for logits and, before attention,
 * for probes. */
static void needed_rows(const ibid_step *s, bool attended, size_t *lo, size_t *hi) {
    *lo = s->n - s->n_logits;
    *hi = s->n;
    if (attended || !s->probe || s->probe->n_rows == 0) return;
    if (s->n_logits == 0) *hi = s->probe->row0 + s->probe->n_rows;
    if (s->probe->row0 < *lo) *lo = s->probe->row0;
}

static void move_row(ibid_engine *e, size_t to, size_t from) {
    const ibid_model *m = e->m;
    ibidi_rows *r = &e->rows;
    size_t half = m->rope.n_rot / 2;
    if (to == from) return;
    memcpy(r->x + to * m->n_embd, r->x + from * m->n_embd, m->n_embd * sizeof(float));
    memcpy(r->h + to * e->wide, r->h + from * e->wide, e->wide * sizeof(float));
    memcpy(r->cos + to * half, r->cos + from * half, half * sizeof(float));
    memcpy(r->sin + to * half, r->sin + from * half, half * sizeof(float));
}

/* Drops rows whose last layer this is and which nothing needs any more. */
static void drop_rows(ibid_engine *e, size_t layer, bool attended) {
    size_t n_rows = 0, n_pieces = 0;
    for (size_t i = 0; i < e->n_pieces; i++) {
        ibidi_piece p = e->pieces[i];
        size_t lo = p.row0, hi = p.row0 + p.n, from;
        if (p.n_layers == layer + 1) needed_rows(p.step, attended, &lo, &hi);
        if (lo < p.row0) lo = p.row0;
        if (hi > p.row0 + p.n) hi = p.row0 + p.n;
        if (lo >= hi) continue;
        from = p.at + lo - p.row0;
        p.n = hi - lo;
        p.row0 = lo;
        p.at = n_rows;
        for (size_t r = 0; r < p.n; r++) move_row(e, n_rows++, from + r);
        e->pieces[n_pieces++] = p;
    }
    e->n_pieces = n_pieces;
    e->n_rows = n_rows;
}

static bool layer_ends(const ibid_engine *e, size_t layer) {
    for (size_t i = 0; i < e->n_pieces; i++) {
        if (e->pieces[i].n_layers == layer + 1) return true;
    }
    return false;
}

static ibidi_out out_of(const ibid_engine *e, size_t layer, ibidi_weight w, float *y, size_t ldy) {
    size_t n = e->m->n_layers;
    bool last = layer + n / ONE_LAST_LAYER_IN + 1 >= n;
    ibidi_out o = {ibidi_layer_weight(&e->m->layers[layer], w), y, ldy, NULL,
                   last ? 0 : FINE_ABOVE[w]};
    if (e->int8) o.panels = &e->pack.layers[layer * IBIDI_WEIGHTS + w];
    return o;
}

static void run_layer(ibid_engine *e, size_t layer) {
    ibidi_rows *r = &e->rows;
    bool ends = layer_ends(e, layer);
    ibidi_out qkv[] = {out_of(e, layer, IBIDI_WK, r->k, e->kv_dim),
                       out_of(e, layer, IBIDI_WV, r->v, e->kv_dim),
                       out_of(e, layer, IBIDI_WQ, r->q, e->wide)};
    ibidi_out wo = out_of(e, layer, IBIDI_WO, r->q, e->wide);
    ibidi_out ffn[] = {out_of(e, layer, IBIDI_GATE, r->gate, e->m->n_ff),
                       out_of(e, layer, IBIDI_UP, r->up, e->m->n_ff)};
    ibidi_out down = out_of(e, layer, IBIDI_DOWN, r->q, e->wide);

    ibidi_each_row(e, e->n_rows, start_row, layer);
    ibidi_linear(e, r->h, e->wide, e->n_rows, qkv, ends ? 2 : 3, false);
    ibidi_each_row(e, e->n_rows, store_row, layer);
    if (ends) {
        drop_rows(e, layer, false);
        ibidi_linear(e, r->h, e->wide, e->n_rows, &qkv[2], 1, false);
    }
    if (e->n_rows == 0) return;
    ibidi_each_row(e, e->n_rows, turn_row, layer);
    ibidi_attend(e, layer);
    if (ends) drop_rows(e, layer, true);
    if (e->n_rows == 0) return;
    ibidi_linear(e, r->h, e->wide, e->n_rows, &wo, 1, false);
    ibidi_each_row(e, e->n_rows, middle_row, layer);
    ibidi_linear(e, r->h, e->wide, e->n_rows, ffn, 2, true);
    ibidi_linear(e, r->gate, e->m->n_ff, e->n_rows, &down, 1, false);
}

static float *logits_of(const ibid_engine *e, size_t row) {
    const ibidi_piece *p = ibidi_piece_of(e, row);
    const ibid_step *s = p->step;
    return s->logits + (p->row0 + row - p->at - (s->n - s->n_logits)) * e->m->n_vocab;
}

/* All rows left have their logits wanted. */
static void run_head(ibid_engine *e) {
    size_t n_vocab = e->m->n_vocab;
    /* Its errors are the logits' own, and bytes are its limit: all groups are fine. */
    ibidi_out head = {&e->m->output, NULL, n_vocab, e->int8 ? &e->pack.head : NULL, 0};
    ibidi_each_row(e, e->n_rows, start_row, e->m->n_layers);
    if (e->n_pieces == 1) { /* its logits lie side by side */
        head.y = logits_of(e, 0);
        ibidi_linear(e, e->rows.h, e->wide, e->n_rows, &head, 1, false);
        return;
    }
    head.y = e->logits;
    for (size_t i = 0; i < e->n_rows; i += e->logit_rows) {
        size_t n = e->n_rows - i < e->logit_rows ? e->n_rows - i : e->logit_rows;
        ibidi_linear(e, e->rows.h + i * e->wide, e->wide, n, &head, 1, false);
        for (size_t j = 0; j < n; j++) {
            memcpy(logits_of(e, i + j), e->logits + j * n_vocab, n_vocab * sizeof *e->logits);
        }
    }
}

static ibid_err stored_ready(const ibid_engine *e, size_t layer) {
    ibid_err err = IBID_OK;
    for (size_t i = 0; !err && i < e->n_pieces; i++) {
        const ibid_step *s = e->pieces[i].step;
        if (s->ready && layer < e->pieces[i].n_layers) err = s->ready(s->ready_arg, layer);
    }
    return err;
}

/* ---- Chunks and stretches ---- */

/* Up to IBIDI_CHUNK rows from (step, row) on; false if none are left. Steps of few rows are not
 * cut: how attn_i8 rounds depends on how far its view of live rows goes. */
static bool next_chunk(const ibid_step *steps, size_t n_steps, size_t step, size_t row,
                       ibidi_chunk *c) {
    size_t n_rows = 0;
    *c = (ibidi_chunk){step, row, step, row};
    while (c->step1 < n_steps) {
        const ibid_step *s = &steps[c->step1];
        size_t left = s->n - c->row1, n = IBIDI_CHUNK - n_rows;
        if (n > left) n = left;
        if (n < left && s->n < IBIDI_MANY && n_rows) break;
        n_rows += n;
        c->row1 += n;
        if (c->row1 < s->n) break;
        c->step1++;
        c->row1 = 0;
    }
    return n_rows > 0;
}

/* The chunk's pieces that a layer still has, as those before have left them. */
static void take_chunk(ibid_engine *e, size_t chunk, size_t layer) {
    const ibidi_chunk *c = &e->chunks[chunk];
    const ibid_model *m = e->m;
    size_t at = chunk * IBIDI_CHUNK;
    e->n_pieces = e->n_rows = 0;
    for (size_t i = c->step0; i <= c->step1; i++) {
        size_t row0 = i == c->step0 ? c->row0 : 0, row1 = i == c->step1 ? c->row1 : e->steps[i].n;
        if (row0 >= row1) continue;
        ibid_step *s = &e->steps[i];
        ibidi_piece p = {.step = s, .seq = s->seq, .row0 = row0, .n = row1 - row0};
        p.n_layers = s->n_layers ? s->n_layers : m->n_layers;
        if (p.n_layers <= layer) continue;
        p.at = e->n_rows;
        p.end = s->seq->base + row1;
        p.pick = s->seq->picks ? s->seq->pick : NULL;
        ibidi_plan_splits(e, &p);
        p.context = ibidi_context_of(e, &p);
        e->n_rows += p.n;
        e->pieces[e->n_pieces++] = p;
    }
    e->rows = e->all;
    e->rows.x += at * m->n_embd;
    e->rows.q += at * e->wide;
    e->rows.cos += at * (m->rope.n_rot / 2);
    e->rows.sin += at * (m->rope.n_rot / 2);
}

/* Plans the stretch of the chunks, and gives its rows their first x. */
static ibid_err begin_stretch(ibid_engine *e) {
    ibid_err err = IBID_OK;
    ibidi_tiles_begin(e);
    for (size_t i = 0; !err && i < e->n_chunks; i++) {
        take_chunk(e, i, 0);
        err = reserve_partials(e);
        for (size_t p = 0; !err && p < e->n_pieces; p++) err = ibidi_tiles_plan(e, &e->pieces[p]);
        if (!err) ibidi_each_row(e, e->n_rows, embed_row, 0);
    }
    return err ? err : ibidi_tiles_ready(e);
}

static ibid_err run_stretch(ibid_engine *e, const atomic_bool *cancel) {
    ibid_err err = begin_stretch(e);
    for (size_t layer = 0; !err && layer < e->m->n_layers; layer++) {
        ibidi_tiles_layer(e);
        for (size_t i = 0; i < e->n_chunks; i++) {
            take_chunk(e, i, layer);
            if (e->n_rows == 0) continue;
            if (cancel && atomic_load_explicit(cancel, memory_order_relaxed))
                return ibid_fail(IBID_CANCELLED, "cancelled before layer %zu", layer);
            if ((err = stored_ready(e, layer))) return err;
            run_layer(e, layer);
            if (layer + 1 == e->m->n_layers && e->n_rows) run_head(e);
        }
    }
    return err;
}

static ibid_err run_steps(ibid_engine *e, ibid_step *steps, size_t n_steps,
                          const atomic_bool *cancel) {
    size_t step = 0, row = 0;
    ibid_err err = IBID_OK;
    e->steps = steps;
    for (;;) {
        for (e->n_chunks = 0; e->n_chunks < IBIDI_CHUNKS; e->n_chunks++) {
            ibidi_chunk *c = &e->chunks[e->n_chunks];
            if (!next_chunk(steps, n_steps, step, row, c)) break;
            step = c->step1;
            row = c->row1;
        }
        if (e->n_chunks == 0 || (err = run_stretch(e, cancel))) return err;
    }
}

ibid_err ibid_engine_forward(ibid_engine *e, ibid_step *steps, size_t n_steps,
                             const atomic_bool *cancel) {
    ibid_err err = IBID_OK;
    size_t n_rows = 0, n_entered = 0;
    for (; n_entered < n_steps; n_entered++) {
        ibid_step *s = &steps[n_entered];
        if ((err = check_step(e, s))) goto done;
        s->seq->busy = true;
        s->seq->base = s->seq->n_live;
        n_rows += s->n;
    }
    for (size_t i = 0; i < n_steps; i++) {
        if ((err = ibidi_seq_reserve(steps[i].seq, steps[i].seq->n_live + steps[i].n))) goto done;
    }
    for (size_t i = 0; !e->gpu && i < n_steps; i++) {
        if ((err = ibidi_pick_ready(e, &steps[i]))) goto done;
    }
    if (e->gpu) {
        if ((err = ibidi_gpu_forward(e, steps, n_steps, cancel))) goto done;
    } else if ((err = reserve_rows(e, n_rows < STRETCH ? n_rows : STRETCH)) ||
               (err = reserve_pieces(e, n_steps < IBIDI_CHUNK ? n_steps : IBIDI_CHUNK)) ||
               (err = reserve_logits(e, steps, n_steps)) ||
               (err = run_steps(e, steps, n_steps, cancel)))
        goto done;
    for (size_t i = 0; i < n_steps; i++) {
        ibid_seq *s = steps[i].seq;
        memcpy(s->positions + s->n_live, steps[i].positions, steps[i].n * sizeof *s->positions);
        s->n_live += steps[i].n;
    }
done:
    for (size_t i = 0; i < n_entered; i++) steps[i].seq->busy = false;
    if (err) tell_lost(e);
    return err;
}
