#include "attention/cuda/gpu.h"
#include "attention/cuda/weights.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { ALIGN = 256, PACK_BYTES = 16 * 1024 * 1024 };

ibid_err ibidi_gpu_reserve(struct ibidi_gpu *g, ibidi_gpu_room *r, size_t bytes) {
    if (bytes <= r->bytes) return IBID_OK;
    ibid_err err = r->p ? ibid_device_sync(g->d, g->work) : IBID_OK; /* it may still be read */
    if (err) return err;
    ibid_device_free(g->d, r->p);
    r->p = NULL;
    r->bytes = 0;
    if ((err = ibid_device_alloc(g->d, bytes, &r->p))) return err;
    r->bytes = bytes;
    return IBID_OK;
}

ibid_err ibidi_gpu_reserve_host(struct ibidi_gpu *g, ibidi_gpu_room *r, size_t bytes) {
    if (bytes <= r->bytes) return IBID_OK;
    ibid_device_host_free(g->d, r->p);
    r->p = NULL;
    r->bytes = 0;
    ibid_err err = ibid_device_host_alloc(g->d, bytes, &r->p);
    if (!err) r->bytes = bytes;
    return err;
}

/* ---- Weights ---- */

/* Walks over all weights twice: to learn their size, then to place and upload them. */
typedef struct walker {
    struct ibidi_gpu *g;
    ibid_pool *pool;
    uint8_t *base, *space; /* NULL in the first walk */
    size_t used;
    ibid_err err;
} walker;

static size_t place(walker *w, size_t bytes) {
    size_t at = w->used;
    w->used += ibid_align_up(bytes, ALIGN);
    return at;
}

typedef struct packing {
    const ibid_tensor *t;
    const ibidi_cu_matrix *m;
    size_t first;
    uint8_t *to;
    _Atomic int err;
} packing;

static void pack_part(void *arg, size_t part, size_t thread) {
    packing *p = arg;
    (void)thread;
    ibid_err err =
        ibidi_cu_pack_panel(p->t, p->m, p->first + part, p->to + part * ibidi_cu_panel_bytes(p->m));
    if (err) p->err = (int)err;
}

static ibidi_cu_matrix put_matrix(walker *w, const ibid_tensor *t) {
    ibidi_cu_matrix m = ibidi_cu_matrix_of(t);
    size_t bytes = ibidi_cu_panel_bytes(&m), at = place(w, ibidi_cu_matrix_bytes(&m));
    size_t each = PACK_BYTES / bytes ? PACK_BYTES / bytes : 1;
    if (!w->base) return m;
    m.data = w->base + at;
    for (size_t p = 0; !w->err && p < m.panels; p += each) {
        size_t n = m.panels - p < each ? m.panels - p : each;
        packing job = {.t = t, .m = &m, .first = p, .to = w->space};
        if ((w->err = ibid_device_sync(w->g->d, w->g->work))) break; /* space is free again */
        ibid_pool_run(w->pool, n, pack_part, &job);
        if (job.err)
            w->err = ibid_fail((ibid_err)job.err,
                               "a weight of the model is too large for the GPU's f16");
        else
            w->err = ibid_device_upload(w->g->d, w->g->work, w->base + at + p * bytes, w->space,
                                        n * bytes);
    }
    return m;
}

static const float *put_vector(walker *w, const ibid_tensor *t) {
    if (!t->data) return NULL;
    size_t bytes = t->rows * t->cols * sizeof(float), at = place(w, bytes);
    if (!w->base) return NULL;
    if (!w->err) w->err = ibid_device_upload(w->g->d, w->g->work, w->base + at, t->data, bytes);
    return (const float *)(const void *)(w->base + at);
}

static void walk(walker *w) {
    const ibid_model *m = w->g->m;
    for (size_t l = 0; l < m->n_layers; l++) {
        const ibid_layer *from = &m->layers[l];
        ibidi_gpu_layer *to = &w->g->layers[l];
        to->qkv[0] = put_matrix(w, &from->wq);
        to->qkv[1] = put_matrix(w, &from->wk);
        to->qkv[2] = put_matrix(w, &from->wv);
        to->wo = put_matrix(w, &from->wo);
        to->ffn[0] = put_matrix(w, &from->gate);
        to->ffn[1] = put_matrix(w, &from->up);
        to->down = put_matrix(w, &from->down);
        to->attn_norm = put_vector(w, &from->attn_norm);
        to->ffn_norm = put_vector(w, &from->ffn_norm);
        to->bq = put_vector(w, &from->bq);
        to->bk = put_vector(w, &from->bk);
        to->bv = put_vector(w, &from->bv);
        to->bo = put_vector(w, &from->bo);
        to->q_norm = put_vector(w, &from->q_norm);
        to->k_norm = put_vector(w, &from->k_norm);
    }
    w->g->output_norm = put_vector(w, &m->output_norm);
    w->g->embed = put_matrix(w, &m->embed);
    w->g->output = m->output.data == m->embed.data ? w->g->embed : put_matrix(w, &m->output);
}

static ibid_err upload_weights(struct ibidi_gpu *g, ibid_pool *pool) {
    walker w = {.g = g, .pool = pool};
    size_t widest = 0;
    if (!(g->layers = ibid_calloc(g->m->n_layers, sizeof *g->layers)))
        return ibid_fail(IBID_NOMEM, "no memory for a model's layers");
    walk(&w);
    for (size_t l = 0; l < g->m->n_layers; l++) {
        size_t b = ibidi_cu_panel_bytes(&g->layers[l].down),
               c = ibidi_cu_panel_bytes(&g->layers[l].wo);
        widest = b > widest ? b : widest;
        widest = c > widest ? c : widest;
    }
    size_t e = ibidi_cu_panel_bytes(&g->embed);
    widest = e > widest ? e : widest;
    ibid_err err = ibidi_gpu_reserve(g, &g->weights, w.used);
    void *space = NULL;
    if (!err) err = ibid_device_host_alloc(g->d, widest > PACK_BYTES ? widest : PACK_BYTES, &space);
    if (!err) {
        w = (walker){.g = g, .pool = pool, .base = g->weights.p, .space = space};
        walk(&w);
        err = w.err ? w.err : ibid_device_sync(g->d, g->work);
    }
    ibid_device_host_free(g->d, space);
    return err;
}

/* ---- Opening ---- */

static ibid_err check_model(const ibid_model *m) {
    size_t d = m->head_dim;
    if (d != 64 && d != 96 && d != 128 && d != 256)
        return ibid_fail(IBID_NOTSUP,
                         "heads of %zu dimensions on the GPU; it takes 64, 96, 128 or 256", d);
    if (m->n_embd * sizeof(float) > 96 * 1024 || m->n_ff * sizeof(float) > 96 * 1024)
        return ibid_fail(IBID_NOTSUP, "rows of %zu and %zu values on the GPU; it takes 24576",
                         m->n_embd, m->n_ff);
    return IBID_OK;
}

static void set_shape(struct ibidi_gpu *g, const ibid_engine_opts *o) {
    const ibid_model *m = g->m;
    g->kv_type = o && o->gpu_kv == IBID_KV_F16 ? IBID_KV_F16 : IBID_KV_Q8_0;
    g->shape = (ibidi_cu_shape){.n_embd = (uint32_t)m->n_embd,
                                .n_heads = (uint32_t)m->n_heads,
                                .n_kv_heads = (uint32_t)m->n_kv_heads,
                                .head_dim = (uint32_t)m->head_dim,
                                .n_rot = (uint32_t)m->rope.n_rot,
                                .n_ff = (uint32_t)m->n_ff,
                                .group = (uint32_t)(m->n_heads / m->n_kv_heads),
                                .pair_next = m->rope.pairing == IBID_PAIR_NEXT,
                                .q8 = g->kv_type == IBID_KV_Q8_0,
                                .eps = m->norm_eps};
    g->shape.score_scale = (float)(1.4426950408889634 / sqrt((double)m->head_dim));
    g->q_dim = m->n_heads * m->head_dim;
    g->kv_dim = m->n_kv_heads * m->head_dim;
}

/* Where tokens drawn on the device come to. */
static ibid_err open_drawn(struct ibidi_gpu *g) {
    void *p = NULL;
    ibid_err err = ibidi_gpu_reserve(g, &g->drawn, IBIDI_GPU_LOGITS * sizeof *g->host_drawn);
    if (!err) err = ibid_device_host_alloc(g->d, IBIDI_GPU_LOGITS * sizeof *g->host_drawn, &p);
    if (!err) g->host_drawn = p;
    return err;
}

/* The pool takes what was asked for, or most of what the weights have left. */
static ibid_err open_pool(struct ibidi_gpu *g, size_t bytes) {
    ibid_device_info info;
    size_t cell = g->m->n_kv_heads * ibidi_cu_head_bytes(g->shape.head_dim, g->shape.q8);
    ibid_err err = ibid_device_describe(g->d, &info);
    if (err) return err;
    (void)snprintf(g->name, sizeof g->name, "%s", info.name);
    g->memory = info.memory;
    if (!bytes) bytes = info.free_memory / 10 * 7;
    g->stage_bytes = ibid_align_up(cell, ALIGN);
    while (g->stage_bytes < 8 * 1024 * 1024) g->stage_bytes *= 2;
    for (size_t i = 0; !err && i < IBIDI_GPU_STAGES; i++) {
        void *p = NULL;
        if (!(err = ibid_device_host_alloc(g->d, g->stage_bytes, &p))) g->stages[i].p = p;
        if (!err) err = ibid_device_event_open(g->d, &g->stages[i].done);
    }
    if (err) return err;
    err = ibidi_pages_open(g->d, g->work, cell, bytes / cell, 2 * g->m->n_layers, &g->pages);
    if (!err) g->pool_bytes = ibidi_pages_look(g->pages).cells * cell;
    return err;
}

ibid_err ibidi_gpu_open(const ibid_model *m, const ibid_engine_opts *o, ibid_pool *pool,
                        const ibid_kernels *k, struct ibidi_gpu **out) {
    ibid_err err = check_model(m);
    if (err) return err;
    struct ibidi_gpu *g = ibid_calloc(1, sizeof *g);
    if (!g) return ibid_fail(IBID_NOMEM, "no memory for a GPU engine");
    g->m = m;
    g->k = k;
    set_shape(g, o);
    g->no_graphs = o && o->gpu_no_graphs;
    if (!(err = ibid_device_open(0, &g->d)) && !(err = ibid_device_stream_open(g->d, &g->work)) &&
        !(err = ibid_device_stream_open(g->d, &g->copy)) &&
        !(err = ibid_device_event_open(g->d, &g->copied)) &&
        !(err = ibid_device_event_open(g->d, &g->passed[0])) &&
        !(err = ibid_device_event_open(g->d, &g->passed[1])) && !(err = open_drawn(g)) &&
        !(err = upload_weights(g, pool)) && !(err = open_pool(g, o ? o->gpu_memory : 0))) {
        *out = g;
        g = NULL;
    }
    ibidi_gpu_close(g);
    return err;
}

ibid_kv_type ibidi_gpu_kv_type(const struct ibidi_gpu *g) {
    return g->kv_type;
}

size_t ibidi_gpu_cell_bytes(const struct ibidi_gpu *g) {
    return ibidi_pages_cell_bytes(g->pages);
}

bool ibidi_gpu_lost(const struct ibidi_gpu *g) {
    return ibid_device_lost(g->d);
}

void ibidi_gpu_note(struct ibidi_gpu *g) {
    ibidi_pages_stats s = ibidi_pages_look(g->pages);
    g->noted.used = s.in_use * ibidi_pages_cell_bytes(g->pages);
    g->noted.hits = s.hits;
    g->noted.misses = s.misses;
    g->noted.evicted = s.evicted;
}

void ibidi_gpu_look(const struct ibidi_gpu *g, ibid_engine_gpu *out) {
    (void)snprintf(out->name, sizeof out->name, "%s", g->name);
    out->memory = g->memory;
    out->pool = g->pool_bytes;
    out->pool_used = g->noted.used;
    out->hits = g->noted.hits;
    out->misses = g->noted.misses;
    out->evicted = g->noted.evicted;
    out->graph_steps = g->noted.graph_steps;
    out->streamed_steps = g->noted.streamed_steps;
}

void ibidi_gpu_close(struct ibidi_gpu *g) {
    if (!g) return;
    if (g->d) {
        ibidi_gpu_room *rooms[] = {&g->chosen,  &g->weights, &g->x,      &g->y,        &g->h,
                                   &g->h_scale, &g->y_scale, &g->q,      &g->tables,   &g->turned,
                                   &g->acc,     &g->state,   &g->lse,    &g->unpacked, &g->logits,
                                   &g->mass,    &g->drawn,   &g->landing};
        if (g->work) (void)ibid_device_sync(g->d, g->work);
        if (g->copy) (void)ibid_device_sync(g->d, g->copy);
        for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++)
            ibid_device_free(g->d, rooms[i]->p);
        ibidi_gpu_graphs_close(g);
        ibid_device_host_free(g->d, g->host_tables.p);
        ibid_device_host_free(g->d, g->host_drawn);
        ibid_device_host_free(g->d, g->host_chosen.p);
        for (size_t i = 0; i < IBIDI_GPU_STAGES; i++) {
            ibid_device_host_free(g->d, g->stages[i].p);
            ibid_device_event_close(g->d, g->stages[i].done);
        }
        ibidi_pages_close(g->pages);
        ibid_device_event_close(g->d, g->copied);
        for (size_t i = 0; i < 2; i++) ibid_device_event_close(g->d, g->passed[i]);
        ibid_device_stream_close(g->d, g->copy);
        ibid_device_stream_close(g->d, g->work);
    }
    ibid_device_close(g->d);
    ibidi_cu_plan_fini(&g->plan);
    ibid_free(g->layers);
    ibid_free(g);
}
