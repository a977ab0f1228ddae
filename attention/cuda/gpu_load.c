/* Stored KV to the pool: laid out as pages in pinned memory by the CPU, then copied on a stream of
 * its own, while the layer before is computed. Several buffers take turns. */
#include "attention/cuda/gpu.h"

#include <string.h>

static const size_t width[] = {[IBID_KV_F32] = 4, [IBID_KV_F16] = 2, [IBID_KV_Q8_0] = 1};

/* n tokens of a plane at a head from token t0 on, of whatever type, into a page's plane. */
static void put_plane(const struct ibidi_gpu *g, const ibid_kv_view *v, size_t head, size_t t0,
                      size_t n, bool values, uint8_t *to, uint16_t *scales) {
    size_t dim = v->head_dim, at = (head * v->n_tokens + t0) * dim;
    const uint8_t *from = (const uint8_t *)(values ? v->v : v->k) + at * width[v->type];
    const uint16_t *scale =
        v->type == IBID_KV_Q8_0 ? (values ? v->v_scale : v->k_scale) + at / 32 : NULL;
    if (v->type == g->kv_type) {
        memcpy(to, from, n * dim * width[v->type]);
        if (scale) memcpy(scales, scale, n * dim / 32 * sizeof *scales);
        return;
    }
    for (size_t t = 0; t < n; t++) {
        float row[IBIDI_CU_DIM_MAX];
        g->k->kv_unpack(v->type, from + t * dim * width[v->type],
                        scale ? scale + t * dim / 32 : NULL, dim, row);
        /* q8_0's keys are spread, others' are not; spreading undoes itself. */
        if (!values && (v->type == IBID_KV_Q8_0 || g->kv_type == IBID_KV_Q8_0))
            g->k->hadamard(row, dim);
        g->k->kv_pack(g->kv_type, row, dim, to + t * dim * width[g->kv_type],
                      scales ? scales + t * dim / 32 : NULL);
    }
}

static void put_page(const struct ibidi_gpu *g, const ibid_kv_view *v, size_t t0, uint8_t *to) {
    size_t n = v->n_tokens - t0 < IBIDI_CU_PAGE ? v->n_tokens - t0 : IBIDI_CU_PAGE;
    size_t dim = g->shape.head_dim, plane = ibidi_cu_plane_bytes((uint32_t)dim, g->shape.q8);
    size_t scale = ibidi_cu_scale_bytes((uint32_t)dim, g->shape.q8), bytes = 2 * (plane + scale);
    if (n < IBIDI_CU_PAGE) memset(to, 0, v->n_kv_heads * bytes);
    for (size_t h = 0; h < v->n_kv_heads; h++, to += bytes) {
        uint8_t *scales = to + 2 * plane;
        put_plane(g, v, h, t0, n, false, to, scale ? (uint16_t *)(void *)scales : NULL);
        put_plane(g, v, h, t0, n, true, to + plane,
                  scale ? (uint16_t *)(void *)(scales + scale) : NULL);
    }
}

/* Room for a page in a staging buffer whose copies are done. */
static ibid_err stage_page(struct ibidi_gpu *g, uint8_t **out) {
    size_t bytes = ibidi_pages_cell_bytes(g->pages);
    ibid_err err = IBID_OK;
    if (g->staged + bytes > g->stage_bytes) {
        if ((err = ibid_device_record(g->d, g->stages[g->stage].done, g->copy))) return err;
        g->stages[g->stage].open = true;
        g->stage = (g->stage + 1) % IBIDI_GPU_STAGES;
        g->staged = 0;
    }
    if (g->staged == 0 && g->stages[g->stage].open) {
        if ((err = ibid_device_event_sync(g->d, g->stages[g->stage].done))) return err;
        g->stages[g->stage].open = false;
    }
    *out = g->stages[g->stage].p + g->staged;
    g->staged += bytes;
    return IBID_OK;
}

static ibid_err load_block(struct ibidi_gpu *g, const ibidi_block *b, const ibid_kv_view *v,
                           size_t layer) {
    size_t bytes = ibidi_pages_cell_bytes(g->pages);
    ibid_err err = IBID_OK;
    for (size_t p = 0; !err && p < b->n_pages; p++) {
        uint8_t *space = NULL;
        if ((err = stage_page(g, &space))) break;
        put_page(g, v, p * IBIDI_CU_PAGE, space);
        size_t cell = b->cells[layer * b->n_pages + p];
        err = ibid_device_upload(g->d, g->copy, ibidi_pages_memory(g->pages) + cell * bytes, space,
                                 bytes);
    }
    return err;
}

ibid_err ibidi_gpu_load(struct ibidi_gpu *g, const ibid_step *step, size_t layer) {
    const ibid_seq *s = step->seq;
    ibid_err err = IBID_OK;
    bool asked = false;
    for (size_t i = 0; !err && i < s->n_segs; i++) {
        ibidi_block *b = s->gpu->blocks[i];
        if (b->loaded > layer) continue;
        if (!asked && step->ready) err = step->ready(step->ready_arg, layer);
        asked = true;
        if (!err) err = load_block(g, b, &s->segs[i].s.layers[layer], layer);
        if (!err) b->loaded = layer + 1;
    }
    return err;
}

ibid_err ibidi_gpu_loaded(struct ibidi_gpu *g) {
    ibid_err err = ibid_device_record(g->d, g->copied, g->copy);
    return err ? err : ibid_device_wait(g->d, g->work, g->copied);
}
