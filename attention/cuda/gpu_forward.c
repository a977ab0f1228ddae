/* A forward pass on the device. Pieces of steps travel through all layers together, as on the CPU,
 * and the CPU puts kernels on a stream; it waits only for stored KV that is missing, and at the
 * end. */
#include "attention/cuda/gpu.h"

#include <string.h>

enum {
    WEIGHT_SLICE = 64 * 1024 * 1024, /* bytes of f16 weights unpacked at once for the library */
    ITEM_STEP = 64,                  /* grids of recorded passes grow by so many blocks, */
    TURN_STEP = 32                   /* and by so many turns */
};

/* Rows [row0, row0 + n) of a step at rows [at, at + n) of the pass. */
typedef struct part {
    ibid_step *step;
    size_t row0, n, at, mass_at; /* mass_at: its first page among the pass's masses */
} part;

typedef struct pass {
    struct ibidi_gpu *g;
    part *parts;
    ibidi_cu_piece *pieces;
    ibidi_gpu_choice *choices; /* of the parts */
    bool selects;              /* at least one of them */
    bool streams;              /* at least one part reads a window */
    /* Rows that select and measure what they miss: their copies, which read everything, follow the
     * others in tables, queries and log-sum-exps, and nowhere else. */
    size_t n_copies;
    size_t n_parts, n_rows, n_layers;
    ibidi_cu_row *rows; /* in host_tables, as the next */
    ibidi_cu_seq *seqs;
    float *cos, *sin;
    uint64_t *heads; /* [n_layers, words] of each part */
    size_t words;
    /* The same on the device. */
    const ibidi_cu_row *d_rows;
    const ibidi_cu_seq *d_seqs;
    const float *d_cos, *d_sin;
    const ibidi_cu_tile *d_tiles;
    const ibidi_cu_item *d_items;
    const uint64_t *d_heads;
    ibidi_gpu_choosings choosings; /* of the choices */
    const uint32_t *d_wanted;
    const float *d_draw;
    uint32_t *wanted; /* rows whose logits are wanted, */
    float *draw;      /* and how tokens are drawn from them: [3, n_rows] */
    size_t n_wanted, n_mass_pages;
    bool draws; /* at least one of them */
} pass;

/* ---- Scratch and tables ---- */

static size_t lined(size_t n) {
    return ibid_align_up(n, IBIDI_CU_COLS);
}

static size_t largest(size_t a, size_t b) {
    return a > b ? a : b;
}

static ibid_err reserve(struct ibidi_gpu *g, const pass *p) {
    const ibid_model *m = g->m;
    size_t all = p->n_rows + p->n_copies, n = ibid_align_up(all, 8), qkv = g->q_dim + 2 * g->kv_dim;
    size_t wide = largest(largest(m->n_embd, m->n_ff), g->q_dim), f = sizeof(float);
    size_t out = n < IBIDI_GPU_LOGITS ? n : IBIDI_GPU_LOGITS;
    ibid_err err;
    if ((err = ibidi_gpu_reserve(g, &g->x, n * m->n_embd * f)) ||
        (err =
             ibidi_gpu_reserve(g, &g->y, n * largest(largest(qkv, 2 * m->n_ff), m->n_embd) * f)) ||
        (err = ibidi_gpu_reserve(g, &g->h, n * lined(wide) * 2)) ||
        (err = ibidi_gpu_reserve(g, &g->h_scale, n * f)) ||
        (err = ibidi_gpu_reserve(g, &g->y_scale, n * f)) ||
        (err = ibidi_gpu_reserve(g, &g->q, n * g->q_dim * f)) ||
        (err = ibidi_gpu_reserve(g, &g->lse, n * m->n_heads * f)) ||
        (err =
             ibidi_gpu_reserve(g, &g->turned, g->plan.n_turned * m->head_dim * IBIDI_CU_TURNED)) ||
        (err = ibidi_gpu_reserve(g, &g->acc, g->plan.n_states * m->head_dim * f)) ||
        (err = ibidi_gpu_reserve(g, &g->state, g->plan.n_states * 2 * f)) ||
        (err = ibidi_gpu_reserve(g, &g->mass, p->n_mass_pages * IBIDI_CU_PAGE * f)) ||
        (p->n_wanted && (err = ibidi_gpu_reserve(g, &g->logits, out * m->n_vocab * f))))
        return err;
    return IBID_OK;
}

typedef struct layout {
    size_t used;
} layout;

static size_t take(layout *l, size_t n, size_t size) {
    size_t at = l->used;
    l->used = ibid_align_up(at + n * size, 256);
    return at;
}

/* One block of memory on each side, laid out alike, so that one copy brings all tables. */
static ibid_err make_tables(pass *p) {
    struct ibidi_gpu *g = p->g;
    layout l = {0};
    size_t half = g->shape.n_rot / 2, n_tiles = 0, n_items = 0, seqs, cos, sin, tiles, items, heads;
    /* Tiles: as plan.c counts them, at most; items: each tile's, at most. */
    for (size_t i = 0; i < p->n_parts + p->n_copies; i++) {
        size_t n = i < p->n_parts ? p->parts[i].n : 1;
        size_t t = (n * g->shape.group + 7) / 8 * g->shape.n_kv_heads;
        n_tiles += t;
        n_items += IBIDI_CU_BLOCKS + 3 * t;
    }
    n_items += ITEM_STEP;
    size_t rows = take(&l, p->n_rows + p->n_copies, sizeof *p->rows);
    seqs = take(&l, p->n_parts * (1 + g->m->n_kv_heads), sizeof *p->seqs); /* and choices' */
    cos = take(&l, p->n_rows * half, sizeof(float));
    sin = take(&l, p->n_rows * half, sizeof(float));
    heads = take(&l, p->n_parts * g->m->n_layers * p->words, sizeof *p->heads);
    size_t wanted = take(&l, p->n_rows, sizeof *p->wanted);
    size_t draw = take(&l, 3 * p->n_rows, sizeof *p->draw);
    size_t choosings = take(&l, p->n_parts, sizeof *p->choosings.c);
    size_t from = take(&l, p->n_parts * g->m->n_layers, sizeof *p->choosings.from);
    tiles = take(&l, n_tiles, sizeof *p->d_tiles);
    items = take(&l, n_items, sizeof *p->d_items);
    ibid_err err = ibidi_gpu_reserve(g, &g->tables, l.used);
    if (!err) err = ibidi_gpu_reserve_host(g, &g->host_tables, l.used);
    if (err) return err;
    uint8_t *h = g->host_tables.p;
    const uint8_t *d = g->tables.p;
    p->rows = (void *)(h + rows);
    p->seqs = (void *)(h + seqs);
    p->cos = (void *)(h + cos);
    p->sin = (void *)(h + sin);
    p->heads = (void *)(h + heads);
    p->wanted = (void *)(h + wanted);
    p->draw = (void *)(h + draw);
    p->d_draw = (const void *)(d + draw);
    p->choosings = (ibidi_gpu_choosings){.seqs = p->seqs + p->n_parts,
                                         .c = (void *)(h + choosings),
                                         .from = (void *)(h + from),
                                         .d_c = (const void *)(d + choosings),
                                         .d_from = (const void *)(d + from)};
    p->d_rows = (const void *)(d + rows);
    p->d_seqs = (const void *)(d + seqs);
    p->d_cos = (const void *)(d + cos);
    p->d_sin = (const void *)(d + sin);
    p->d_heads = (const void *)(d + heads);
    p->d_wanted = (const void *)(d + wanted);
    p->d_tiles = (const void *)(d + tiles);
    p->d_items = (const void *)(d + items);
    return IBID_OK;
}

static void set_heads(const struct ibidi_gpu *g, const ibid_probe *probe, size_t words,
                      uint64_t *out) {
    size_t n_heads = g->m->n_heads;
    for (size_t bit = 0; bit < g->m->n_layers * n_heads; bit++) {
        if (probe->heads && !(probe->heads[bit / 64] >> bit % 64 & 1)) continue;
        size_t head = bit % n_heads;
        out[bit / n_heads * words + head / 64] |= UINT64_C(1) << head % 64;
    }
}

/* The row's logits; a token is drawn from them, if only for the sake of those beside it. */
static void want_row(pass *p, const ibid_step *s, size_t at) {
    size_t i = p->n_wanted++;
    p->wanted[i] = (uint32_t)at;
    p->draw[i] = s->draw ? s->draw->temperature : 0;
    p->draw[p->n_rows + i] = s->draw ? s->draw->top_p : 1;
    p->draw[2 * p->n_rows + i] = s->draw ? s->draw->uniform : 0;
    p->draws |= s->draw != NULL;
}

static bool is_measured(const ibidi_gpu_choice *c) {
    return c->select && c->select->measure;
}

static ibidi_cu_piece piece_of(const pass *p, size_t i, size_t at, size_t n) {
    const struct ibidi_gpu_seq *q = p->parts[i].step->seq->gpu;
    const ibidi_cu_row *last = &p->rows[at + n - 1];
    return (ibidi_cu_piece){.seq = (uint32_t)i,
                            .row0 = (uint32_t)at,
                            .n = (uint32_t)n,
                            .pages = q->pages,
                            .first_live = (uint32_t)q->n_stored_pages,
                            .n_turned = (uint32_t)q->n_turns + 1,
                            .last_position = last->position,
                            .last_live = last->live};
}

/* Rows that measure what they miss, once more. */
static void fill_copies(pass *p) {
    for (size_t i = 0, at = p->n_rows; i < p->n_parts; i++) {
        if (!is_measured(&p->choices[i])) continue;
        p->choices[i].copy = at;
        p->rows[at] = p->rows[p->parts[i].at];
        p->pieces[p->n_parts + at - p->n_rows] = piece_of(p, i, at, 1);
        at++;
    }
}

static void fill_tables(pass *p) {
    struct ibidi_gpu *g = p->g;
    size_t half = g->shape.n_rot / 2, per = g->m->n_layers * p->words;
    memset(p->heads, 0, p->n_parts * per * sizeof *p->heads);
    p->n_wanted = p->n_mass_pages = 0;
    p->draws = false;
    for (size_t i = 0; i < p->n_parts; i++) {
        part *t = &p->parts[i];
        const ibid_step *s = t->step;
        const struct ibidi_gpu_seq *q = s->seq->gpu;
        p->seqs[i] = q->view;
        for (size_t r = 0; r < t->n; r++) {
            size_t at = t->at + r, row = t->row0 + r;
            p->rows[at] = (ibidi_cu_row){.seq = (uint32_t)i,
                                         .position = s->positions[row],
                                         .live = (uint32_t)(s->seq->base + row),
                                         .token = (uint32_t)s->tokens[row]};
            ibidi_rope_table(&g->m->rope, s->positions[row], 1, p->cos + at * half,
                             p->sin + at * half);
            if (row >= s->n - s->n_logits) want_row(p, s, at);
        }
        p->pieces[i] = piece_of(p, i, t->at, t->n);
        p->pieces[i].n_chosen = p->choices[i].c.n_chosen;
        p->pieces[i].chosen_seq = (uint32_t)(p->n_parts + i * g->m->n_kv_heads);
        t->mass_at = p->n_mass_pages;
        if (!s->probe) continue;
        p->n_mass_pages += q->n_stored_pages;
        set_heads(g, s->probe, p->words, p->heads + i * per);
    }
    fill_copies(p);
}

static ibid_err upload_tables(pass *p) {
    struct ibidi_gpu *g = p->g;
    const ibidi_cu_plan *plan = &g->plan;
    size_t tiles_at = (size_t)((const uint8_t *)p->d_tiles - (const uint8_t *)g->tables.p);
    size_t items_at = (size_t)((const uint8_t *)p->d_items - (const uint8_t *)g->tables.p);
    size_t n_tiles = plan->n_tiles[0] + plan->n_tiles[1],
           n_items = plan->n_items[0] + plan->n_items[1];
    size_t end = items_at + n_items * sizeof *plan->items;
    if (end > g->host_tables.bytes || tiles_at + n_tiles * sizeof *plan->tiles > items_at)
        return ibid_fail(IBID_INTERNAL, "a plan of %zu tiles, %zu items outgrew its room", n_tiles,
                         n_items);
    uint8_t *host = g->host_tables.p;
    memcpy(host + tiles_at, plan->tiles, n_tiles * sizeof *plan->tiles);
    memcpy(host + items_at, plan->items, n_items * sizeof *plan->items);
    return ibid_device_upload(g->d, g->work, g->tables.p, host, end);
}

/* ---- Layers ---- */

/* y[i, ..] of several matrices side by side. */
static ibid_err linear(struct ibidi_gpu *g, const ibidi_cu_matrix *w, size_t n_w, size_t n,
                       float *y, size_t ldy) {
    size_t ldh = (size_t)w->k_tiles * IBIDI_CU_COLS, y0 = 0;
    ibid_err err = IBID_OK;
    if (n <= IBIDI_CU_FEW) return ibidi_cu_product(g->work, w, n_w, g->h.p, ldh, n, y, ldy);
    size_t each = WEIGHT_SLICE / (ldh * 2) / IBIDI_CU_ROWS * IBIDI_CU_ROWS;
    if (each == 0) each = IBIDI_CU_ROWS;
    if ((err = ibidi_gpu_reserve(g, &g->unpacked, each * ldh * 2))) return err;
    for (size_t m = 0; m < n_w; y0 += w[m++].rows) {
        for (size_t r = 0; !err && r < w[m].rows; r += each) {
            size_t rows = w[m].rows - r < each ? w[m].rows - r : each;
            if (!(err = ibidi_cu_unpack(g->work, &w[m], r, rows, g->unpacked.p)))
                err = ibid_device_matmul(g->d, g->work, g->unpacked.p, rows, ldh, g->h.p, n,
                                         y + y0 + r, ldy);
        }
    }
    return err;
}

static ibidi_cu_attend attend_args(const pass *p, size_t layer) {
    const struct ibidi_gpu *g = p->g;
    return (ibidi_cu_attend){.tiles = p->d_tiles,
                             .items = p->d_items,
                             .rows = p->d_rows,
                             .seqs = p->d_seqs,
                             .pool = ibidi_pages_memory(g->pages),
                             .turned = g->turned.p,
                             .layer = (uint32_t)layer,
                             .acc = g->acc.p,
                             .state = g->state.p};
}

static ibid_err probe(const pass *p, size_t layer) {
    struct ibidi_gpu *g = p->g;
    ibidi_cu_attend a = attend_args(p, layer);
    ibid_err err = IBID_OK;
    for (size_t i = 0; !err && i < p->n_parts; i++) {
        const part *t = &p->parts[i];
        const ibid_probe *pr = t->step->probe;
        if (!pr) continue;
        size_t lo = pr->row0 > t->row0 ? pr->row0 : t->row0, hi = pr->row0 + pr->n_rows;
        if (hi > t->row0 + t->n) hi = t->row0 + t->n;
        if (lo >= hi) continue;
        const ibidi_cu_row *r = &p->rows[t->at];
        if (p->choices[i].select) {
            err = ibidi_gpu_choice_mass(g, &p->choices[i], &a, r,
                                        p->d_heads + (i * g->m->n_layers + layer) * p->words,
                                        (uint32_t)t->at, (uint32_t)t->at + 1,
                                        (float *)g->mass.p + t->mass_at * IBIDI_CU_PAGE);
            continue;
        }
        err = ibidi_cu_mass(g->work, &g->shape, &a, r->tile0, r->tiles * g->m->n_kv_heads,
                            r->tile_rows == IBIDI_CU_TILE_FINE, t->step->seq->gpu->n_stored_pages,
                            p->d_heads + (i * g->m->n_layers + layer) * p->words,
                            (uint32_t)(t->at + lo - t->row0), (uint32_t)(t->at + hi - t->row0),
                            g->lse.p, (float *)g->mass.p + t->mass_at * IBIDI_CU_PAGE);
    }
    return err;
}

static ibid_err choose(const pass *p, size_t layer) {
    struct ibidi_gpu *g = p->g;
    float *q = g->q.p;
    ibid_err err = IBID_OK;
    for (size_t i = 0; !err && i < p->n_parts; i++) {
        const ibidi_gpu_choice *c = &p->choices[i];
        const float *mine = q + p->parts[i].at * g->q_dim;
        if (!ibidi_gpu_has_table(c)) continue;
        err = ibidi_gpu_choose(g, c, layer, mine);
        if (!err && is_measured(c))
            err =
                ibid_device_copy(g->d, g->work, q + c->copy * g->q_dim, mine, g->q_dim * sizeof *q);
    }
    for (size_t i = 0; !err && i < p->n_parts; i++)
        if (p->choices[i].fetches) err = ibidi_gpu_fetch(g, &p->choices[i], layer);
    return err;
}

static ibid_err measure(const pass *p) {
    struct ibidi_gpu *g = p->g;
    const float *lse = g->lse.p;
    size_t heads = g->m->n_heads;
    ibid_err err = IBID_OK;
    for (size_t i = 0; !err && i < p->n_parts; i++) {
        const ibidi_gpu_choice *c = &p->choices[i];
        if (is_measured(c))
            err = ibidi_cu_recall(g->work, lse + p->parts[i].at * heads, lse + c->copy * heads,
                                  heads, c->recall);
    }
    return err;
}

static ibid_err attend(const pass *p, size_t layer) {
    struct ibidi_gpu *g = p->g;
    const ibidi_cu_plan *plan = &g->plan;
    ibidi_cu_attend a = attend_args(p, layer);
    ibid_err err = p->selects ? choose(p, layer) : IBID_OK;
    for (int fine = 1; !err && fine >= 0; fine--) {
        size_t tile = fine ? 0 : plan->n_tiles[1];
        a.items = p->d_items + (fine ? 0 : plan->n_items[1]);
        if (!(err = ibidi_cu_turn(g->work, &g->shape, p->d_tiles + tile, plan->n_tiles[fine],
                                  plan->max_turned, fine, p->d_seqs, g->q.p, g->turned.p)))
            err = ibidi_cu_attention(g->work, &g->shape, &a, plan->n_items[fine], fine);
    }
    if (!err)
        err = ibidi_cu_merge(g->work, &g->shape, &a, p->n_rows + p->n_copies, g->h.p,
                             lined(g->q_dim), g->lse.p);
    if (!err) err = measure(p);
    return err ? err : probe(p, layer);
}

/* y, with y_scale, holds what the layer before adds to x; NULL at the first. */
static ibid_err run_layer(const pass *p, size_t layer) {
    struct ibidi_gpu *g = p->g;
    const ibid_model *m = g->m;
    const ibidi_gpu_layer *l = &g->layers[layer];
    size_t n = p->n_rows, qkv = g->q_dim + 2 * g->kv_dim, embd = m->n_embd;
    const float *added = layer ? g->y.p : NULL;
    ibidi_cu_heads heads = {.y = g->y.p,
                            .y_scale = g->h_scale.p,
                            .ldy = qkv,
                            .bq = l->bq,
                            .bk = l->bk,
                            .bv = l->bv,
                            .q_norm = l->q_norm,
                            .k_norm = l->k_norm,
                            .cos = p->d_cos,
                            .sin = p->d_sin,
                            .rows = p->d_rows,
                            .seqs = p->d_seqs,
                            .layer = (uint32_t)layer,
                            .pool = ibidi_pages_memory(g->pages),
                            .q = g->q.p};
    ibid_err err;
    if ((err = ibidi_cu_norm(g->work, g->x.p, added, embd, layer ? g->y_scale.p : NULL, NULL,
                             l->attn_norm, m->norm_eps, NULL, n, embd, g->h.p, lined(embd),
                             g->h_scale.p)) ||
        (err = linear(g, l->qkv, 3, n, g->y.p, qkv)) ||
        (err = ibidi_cu_finish_heads(g->work, &g->shape, &heads, n)) || (err = attend(p, layer)) ||
        (err = linear(g, &l->wo, 1, n, g->y.p, embd)) ||
        (err = ibidi_cu_norm(g->work, g->x.p, g->y.p, embd, NULL, l->bo, l->ffn_norm, m->norm_eps,
                             NULL, n, embd, g->h.p, lined(embd), g->h_scale.p)) ||
        (err = linear(g, l->ffn, 2, n, g->y.p, 2 * m->n_ff)) ||
        (err = ibidi_cu_swiglu(g->work, g->y.p, 2 * m->n_ff, g->h_scale.p, n, m->n_ff, g->h.p,
                               lined(m->n_ff), g->y_scale.p)) ||
        (err = linear(g, &l->down, 1, n, g->y.p, embd)))
        return err;
    return IBID_OK;
}

/* ---- Logits and tokens ---- */

static ibid_err put_head(const pass *p, size_t i, size_t n) {
    struct ibidi_gpu *g = p->g;
    const ibid_model *m = g->m;
    size_t embd = m->n_embd, vocab = m->n_vocab;
    ibid_err err;
    if ((err = ibidi_cu_norm(g->work, g->x.p, g->y.p, embd, g->y_scale.p, NULL, g->output_norm,
                             m->norm_eps, p->d_wanted + i, n, embd, g->h.p, lined(embd),
                             g->h_scale.p)) ||
        (err = linear(g, &g->output, 1, n, g->logits.p, vocab)) ||
        (err = ibidi_cu_scale_rows(g->work, g->logits.p, vocab, g->h_scale.p, n, vocab)))
        return err;
    if (!p->draws) return IBID_OK;
    const float *t = p->d_draw + i;
    err = ibidi_cu_sample(g->work, g->logits.p, vocab, n, vocab, t, t + p->n_rows,
                          t + 2 * p->n_rows, g->drawn.p);
    if (!err)
        err = ibid_device_download(g->d, g->work, g->host_drawn, g->drawn.p,
                                   n * sizeof *g->host_drawn);
    return err;
}

/* Logits that were asked for come here; tokens, once the stream has been waited for. */
static ibid_err fetch_head(const pass *p, size_t i, size_t n) {
    struct ibidi_gpu *g = p->g;
    size_t vocab = g->m->n_vocab;
    ibid_err err = IBID_OK;
    for (size_t k = 0; !err && k < n; k++) {
        size_t row = p->wanted[i + k];
        const part *t = &p->parts[p->rows[row].seq];
        const ibid_step *s = t->step;
        if (s->draw) continue;
        size_t at = t->row0 + row - t->at - (s->n - s->n_logits);
        err = ibid_device_download(g->d, g->work, s->logits + at * vocab,
                                   (float *)g->logits.p + k * vocab, vocab * sizeof(float));
    }
    if (!p->draws) return err;
    ibid_err e = ibid_device_sync(g->d, g->work);
    for (size_t k = 0; !err && !e && k < n; k++) {
        ibid_draw *d = p->parts[p->rows[p->wanted[i + k]].seq].step->draw;
        if (d && g->host_drawn[k] >= vocab)
            err = ibid_fail(IBID_INVAL, "no logit is above -infinity");
        else if (d)
            d->token = (int32_t)g->host_drawn[k];
    }
    return err ? err : e;
}

static ibid_err run_head(const pass *p) {
    ibid_err err = IBID_OK;
    for (size_t i = 0; !err && i < p->n_wanted; i += IBIDI_GPU_LOGITS) {
        size_t n = p->n_wanted - i < IBIDI_GPU_LOGITS ? p->n_wanted - i : IBIDI_GPU_LOGITS;
        if (!(err = put_head(p, i, n))) err = fetch_head(p, i, n);
    }
    return err;
}

/* Masses of the pass, added to the caller's. */
static ibid_err give_masses(const pass *p) {
    struct ibidi_gpu *g = p->g;
    size_t n = p->n_mass_pages * IBIDI_CU_PAGE;
    if (n == 0) return IBID_OK;
    float *mass = ibid_alloc(n * sizeof *mass);
    if (!mass) return ibid_fail(IBID_NOMEM, "no memory for the attention of %zu tokens", n);
    ibid_err err = ibid_device_download(g->d, g->work, mass, g->mass.p, n * sizeof *mass);
    ibid_err e = ibid_device_sync(g->d, g->work);
    for (size_t i = 0; !err && !e && i < p->n_parts; i++) {
        const part *t = &p->parts[i];
        const ibid_seq *s = t->step->seq;
        const float *from = mass + t->mass_at * IBIDI_CU_PAGE;
        for (size_t b = 0; t->step->probe && b < s->n_segs; b++) {
            float *to = t->step->probe->mass[b];
            for (size_t j = 0; to && j < s->segs[b].n_tokens; j++) to[j] += from[j];
            from += ibidi_gpu_pages_of(s->segs[b].n_tokens) * IBIDI_CU_PAGE;
        }
    }
    ibid_free(mass);
    return err ? err : e;
}

static ibid_err put_start(const pass *p) {
    struct ibidi_gpu *g = p->g;
    ibid_err err = IBID_OK;
    if (p->n_mass_pages)
        err = ibid_device_fill(g->d, g->work, g->mass.p, 0,
                               p->n_mass_pages * IBIDI_CU_PAGE * sizeof(float));
    if (!err && p->selects) err = ibidi_gpu_choices_start(g, p->choices, p->n_parts);
    return err ? err : ibidi_cu_embed(g->work, &g->embed, p->d_rows, p->n_rows, g->x.p);
}

static ibid_err run_layers(pass *p, const atomic_bool *cancel) {
    struct ibidi_gpu *g = p->g;
    ibid_err err = put_start(p);
    for (size_t layer = 0; !err && layer < p->n_layers; layer++) {
        if (cancel && atomic_load_explicit(cancel, memory_order_relaxed))
            return ibid_fail(IBID_CANCELLED, "cancelled before layer %zu", layer);
        for (size_t i = 0; !err && i < p->n_parts; i++)
            err = ibidi_gpu_load(g, p->parts[i].step, layer);
        if (!err) err = ibidi_gpu_loaded(g);
        if (!err) err = run_layer(p, layer);
        if (!err && p->streams) err = ibid_device_record(g->d, g->passed[layer % 2], g->work);
    }
    return err ? err : run_head(p);
}

/* ---- Steady passes ---- */

static bool all_loaded(const ibid_seq *s, size_t n_layers) {
    if (s->gpu->streamed) return false;
    for (size_t i = 0; i < s->n_segs; i++)
        if (s->gpu->blocks[i]->loaded < n_layers) return false;
    return true;
}

/* Decoding with all KV there: one row of each sequence. */
static bool is_steady(const pass *p) {
    if (p->g->no_graphs || p->n_rows != p->n_parts || p->n_rows > IBIDI_GPU_PARTS) return false;
    for (size_t i = 0; i < p->n_parts; i++)
        if (p->parts[i].n != 1 || !all_loaded(p->parts[i].step->seq, p->n_layers) ||
            !ibidi_gpu_choice_steady(&p->choices[i]))
            return false;
    return p->n_wanted <= IBIDI_GPU_LOGITS;
}

/* What was put on the stream when the pass was like this one. */
static ibidi_gpu_key key_of(const pass *p) {
    const struct ibidi_gpu *g = p->g;
    const ibidi_cu_plan *plan = &g->plan;
    ibidi_gpu_key k;
    const void *memory[] = {g->x.p,     g->y.p,    g->h.p,      g->h_scale.p, g->y_scale.p,
                            g->q.p,     g->lse.p,  g->tables.p, g->turned.p,  g->acc.p,
                            g->state.p, g->mass.p, g->logits.p, g->chosen.p};
    memset(&k, 0, sizeof k);
    k.n_rows = p->n_rows;
    k.n_layers = p->n_layers;
    k.n_wanted = p->n_wanted;
    k.max_turned = plan->max_turned;
    k.draws = p->draws;
    memcpy(k.memory, memory, sizeof memory);
    for (size_t i = 0; i < 2; i++) {
        k.n_tiles[i] = plan->n_tiles[i];
        k.n_items[i] = plan->n_items[i];
    }
    for (size_t i = 0; i < p->n_parts; i++) {
        const ibid_step *s = p->parts[i].step;
        const ibidi_gpu_choice *c = &p->choices[i];
        if (c->select) {
            k.parts[i].selects = 1;
            k.parts[i].measured = is_measured(c);
            k.parts[i].grid = c->grid;
            k.parts[i].room = c->c.room;
            k.parts[i].n_chosen = s->probe ? c->c.n_chosen : 0;
        }
        if (!s->probe) continue;
        k.parts[i].n_pages = s->seq->gpu->n_stored_pages + 1; /* probed, even if there are none */
        k.parts[i].lo = s->probe->row0;
        k.parts[i].hi = s->probe->row0 + s->probe->n_rows;
    }
    return k;
}

static ibid_err put_steady(const void *arg) {
    const pass *p = arg;
    ibid_err err = put_start(p);
    for (size_t layer = 0; !err && layer < p->n_layers; layer++) err = run_layer(p, layer);
    return !err && p->n_wanted ? put_head(p, 0, p->n_wanted) : err;
}

static ibid_err run_steady(const pass *p, const atomic_bool *cancel) {
    ibidi_gpu_key key = key_of(p);
    if (cancel && atomic_load_explicit(cancel, memory_order_relaxed))
        return ibid_fail(IBID_CANCELLED, "cancelled before a step");
    ibid_err err = ibidi_gpu_put_recorded(p->g, &key, put_steady, p);
    return err ? err : fetch_head(p, 0, p->n_wanted);
}

static void look_at_parts(pass *p) {
    p->selects = p->streams = false;
    p->n_copies = 0;
    for (size_t i = 0; i < p->n_parts; i++) {
        p->selects |= ibidi_gpu_has_table(&p->choices[i]);
        p->streams |= p->parts[i].step->seq->gpu->window != NULL;
        p->n_copies += is_measured(&p->choices[i]);
    }
    p->g->noted.streamed_steps += p->streams;
}

/* Whatever happens, nothing of the pass is under way afterwards: pages may go to others then. */
static ibid_err run_pass(pass *p, const atomic_bool *cancel) {
    struct ibidi_gpu *g = p->g;
    look_at_parts(p);
    ibid_err err = make_tables(p);
    if (err) return err;
    fill_tables(p);
    if (p->selects) err = ibidi_gpu_choices_place(g, p->choices, p->n_parts, &p->choosings);
    if (!err)
        err = ibidi_cu_plan_make(&g->shape, p->pieces, p->n_parts + p->n_copies, p->rows, &g->plan);
    bool steady = is_steady(p);
    if (!err && steady) err = ibidi_cu_plan_pad(&g->plan, ITEM_STEP);
    if (steady) g->plan.max_turned = ibid_align_up(g->plan.max_turned, TURN_STEP);
    if (!err) err = reserve(g, p);
    if (!err) err = upload_tables(p);
    if (!err) err = steady ? run_steady(p, cancel) : run_layers(p, cancel);
    ibid_err copied = ibid_device_sync(g->d, g->copy), worked = ibid_device_sync(g->d, g->work);
    if (!err) err = copied ? copied : worked;
    if (!err && p->selects) err = ibidi_gpu_choices_done(g, p->choices, p->n_parts, p->n_layers);
    ibidi_gpu_choices_drop(g, p->choices, p->n_parts);
    return err ? err : give_masses(p);
}

/* ---- Steps ---- */

static size_t layers_of(const struct ibidi_gpu *g, const ibid_step *s) {
    return s->n_layers ? s->n_layers : g->m->n_layers;
}

/* Rows of a step that a pass takes at most: a property of the step. */
static size_t most_rows(const struct ibidi_gpu *g, const ibid_step *s) {
    size_t turns = s->seq->gpu->n_turns + 1;
    size_t each = turns * g->q_dim * 4, most = IBIDI_GPU_TURNED / each;
    if (most > IBIDI_GPU_CHUNK) return IBIDI_GPU_CHUNK;
    return most > 16 ? most / 16 * 16 : 16;
}

/* Everything a step needs on the device but its stored KV. */
static ibid_err ready_step(struct ibidi_gpu *g, ibid_step *s, ibidi_gpu_choice *c) {
    ibid_err err = ibidi_gpu_seq_ready(g, s->seq, s->seq->base + s->n);
    if (!err) err = ibidi_gpu_choice_plan(g, s, c);
    return err ? err : ibidi_gpu_seq_place(g, s->seq, !c->fetches);
}

/* Steps from *i on, the first from its row *row on, as many as a pass takes. */
static void fill_pass(pass *p, const ibidi_gpu_choice *choices, ibid_step *steps, size_t n_steps,
                      size_t *i, size_t *row) {
    struct ibidi_gpu *g = p->g;
    p->n_parts = p->n_rows = 0;
    p->n_layers = layers_of(g, &steps[*i]);
    while (*i < n_steps && layers_of(g, &steps[*i]) == p->n_layers) {
        ibid_step *s = &steps[*i];
        size_t most = most_rows(g, s), left = s->n - *row, n = left < most ? left : most;
        if (n && p->n_parts && p->n_rows + n > IBIDI_GPU_CHUNK) break;
        if (n) {
            p->choices[p->n_parts] = choices[*i];
            p->parts[p->n_parts++] = (part){.step = s, .row0 = *row, .n = n, .at = p->n_rows};
        }
        p->n_rows += n;
        *row += n;
        if (*row < s->n) break;
        ++*i;
        *row = 0;
    }
}

ibid_err ibidi_gpu_forward(ibid_engine *e, ibid_step *steps, size_t n_steps,
                           const atomic_bool *cancel) {
    struct ibidi_gpu *g = e->gpu;
    ibid_err err = IBID_OK;
    size_t room = n_steps ? n_steps : 1;
    pass p = {.g = g, .words = (g->m->n_heads + 63) / 64};
    ibidi_gpu_choice *choices = ibid_calloc(room, sizeof *choices);
    p.parts = ibid_calloc(room, sizeof *p.parts);
    p.pieces = ibid_calloc(2 * room, sizeof *p.pieces); /* copies too */
    p.choices = ibid_calloc(room, sizeof *p.choices);
    if (!p.parts || !p.pieces || !p.choices || !choices)
        err = ibid_fail(IBID_NOMEM, "no memory for %zu steps", n_steps);
    for (size_t i = 0; !err && i < n_steps; i++) err = ready_step(g, &steps[i], &choices[i]);
    for (size_t i = 0, row = 0; !err && i < n_steps;) {
        fill_pass(&p, choices, steps, n_steps, &i, &row);
        if (p.n_rows) err = run_pass(&p, cancel);
    }
    for (size_t i = 0; i < n_steps; i++) ibidi_gpu_seq_leave(g, steps[i].seq);
    ibid_free(choices);
    ibid_free(p.parts);
    ibid_free(p.pieces);
    ibid_free(p.choices);
    ibidi_gpu_note(g);
    return err;
}
