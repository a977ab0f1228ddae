/* Stored KV to the pool: laid out as pages in pinned memory by the CPU, then copied on a stream of
 * its own, while the layer before is computed. Several buffers take turns. Of a streamed sequence
 * either whole layers, into two windows by turns, or the pages that a row has chosen. */
#include "attention/cuda/gpu.h"
#include "rpc/base/hash.h"

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

/* A page at a kv head. */
static void put_head(const struct ibidi_gpu *g, const ibid_kv_view *v, size_t h, size_t t0,
                     uint8_t *to) {
    size_t n = v->n_tokens - t0 < IBIDI_CU_PAGE ? v->n_tokens - t0 : IBIDI_CU_PAGE;
    size_t dim = g->shape.head_dim, plane = ibidi_cu_plane_bytes((uint32_t)dim, g->shape.q8);
    size_t scale = ibidi_cu_scale_bytes((uint32_t)dim, g->shape.q8);
    uint8_t *scales = to + 2 * plane;
    if (n < IBIDI_CU_PAGE) memset(to, 0, 2 * (plane + scale));
    put_plane(g, v, h, t0, n, false, to, scale ? (uint16_t *)(void *)scales : NULL);
    put_plane(g, v, h, t0, n, true, to + plane,
              scale ? (uint16_t *)(void *)(scales + scale) : NULL);
}

static size_t head_bytes(const struct ibidi_gpu *g) {
    return ibidi_cu_head_bytes(g->shape.head_dim, g->shape.q8);
}

/* Room in a staging buffer whose copies are done. */
static ibid_err stage(struct ibidi_gpu *g, size_t bytes, uint8_t **out) {
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

/* Pages of a layer of a block into cells [n]. */
static ibid_err load_pages(struct ibidi_gpu *g, const uint32_t *cells, size_t n,
                           const ibid_kv_view *v) {
    size_t bytes = ibidi_pages_cell_bytes(g->pages);
    ibid_err err = IBID_OK;
    for (size_t p = 0; !err && p < n; p++) {
        uint8_t *space = NULL;
        if ((err = stage(g, bytes, &space))) break;
        for (size_t h = 0; h < v->n_kv_heads; h++)
            put_head(g, v, h, p * IBIDI_CU_PAGE, space + h * head_bytes(g));
        err = ibid_device_upload(g->d, g->copy, ibidi_pages_memory(g->pages) + cells[p] * bytes,
                                 space, bytes);
    }
    return err;
}

/* A whole layer into the window; what was there two layers before has been read by then. */
static ibid_err load_window(struct ibidi_gpu *g, const ibid_step *step, size_t layer) {
    const ibid_seq *s = step->seq;
    const ibidi_block *w = s->gpu->window;
    const uint32_t *cells = w->cells + layer % w->n_layers * w->n_pages;
    ibid_err err =
        layer < w->n_layers ? IBID_OK : ibid_device_wait(g->d, g->copy, g->passed[layer % 2]);
    if (!err && step->ready) err = step->ready(step->ready_arg, layer);
    for (size_t i = 0; !err && i < s->n_segs; i++) {
        size_t n = ibidi_gpu_pages_of(s->segs[i].n_tokens);
        err = load_pages(g, cells, n, &s->segs[i].s.layers[layer]);
        cells += n;
    }
    return err;
}

ibid_err ibidi_gpu_load(struct ibidi_gpu *g, const ibid_step *step, size_t layer) {
    const ibid_seq *s = step->seq;
    ibid_err err = IBID_OK;
    bool asked = false;
    if (s->gpu->window) return load_window(g, step, layer);
    for (size_t i = 0; !err && i < s->gpu->n_blocks; i++) {
        ibidi_block *b = s->gpu->blocks[i];
        if (b->loaded > layer) continue;
        if (!asked && step->ready) err = step->ready(step->ready_arg, layer);
        asked = true;
        if (!err)
            err = load_pages(g, b->cells + layer * b->n_pages, b->n_pages,
                             &s->segs[i].s.layers[layer]);
        if (!err) b->loaded = layer + 1;
    }
    return err;
}

ibid_err ibidi_gpu_loaded(struct ibidi_gpu *g) {
    ibid_err err = ibid_device_record(g->d, g->copied, g->copy);
    return err ? err : ibid_device_wait(g->d, g->work, g->copied);
}

/* ---- Chosen pages ---- */

/* Single heads of pages, many to a copy: slots [room] and then the heads themselves in a staging
 * buffer, which a kernel spreads from a landing place of the same layout. slot: cell * n_kv_heads +
 * head. */
typedef struct shipment {
    struct ibidi_gpu *g;
    uint8_t *space;
    size_t n, room, heads_at;
} shipment;

static ibid_err ship(shipment *b) {
    struct ibidi_gpu *g = b->g;
    size_t bytes = head_bytes(g);
    if (b->n == 0) return IBID_OK;
    ibid_err err = ibidi_gpu_reserve(g, &g->landing, g->stage_bytes);
    const uint8_t *landed = g->landing.p;
    if (!err)
        err = ibid_device_upload(g->d, g->copy, g->landing.p, b->space, b->heads_at + b->n * bytes);
    if (!err)
        err = ibidi_cu_land(g->copy, (const uint64_t *)(const void *)landed, landed + b->heads_at,
                            b->n, bytes, ibidi_pages_memory(g->pages));
    b->n = 0;
    b->space = NULL;
    return err;
}

static ibid_err add_head(shipment *b, const ibid_kv_view *v, size_t head, size_t t0,
                         uint64_t slot) {
    ibid_err err = b->n == b->room ? ship(b) : IBID_OK;
    if (!err && !b->space) err = stage(b->g, b->g->stage_bytes, &b->space);
    if (err) return err;
    memcpy(b->space + b->n * sizeof slot, &slot, sizeof slot);
    put_head(b->g, v, head, t0, b->space + b->heads_at + b->n++ * head_bytes(b->g));
    return IBID_OK;
}

/* Under which a page of a stored block at a layer is known in the pool; of a block without an id,
 * to its sequence alone. */
static uint64_t key_of(const struct ibidi_gpu_seq *q, const ibidi_seg *seg, size_t segment,
                       size_t page, size_t layer) {
    uint64_t id = seg->s.id;
    uint64_t what[] = {id, id ? 0 : q->serial, id ? 0 : segment, page, layer};
    uint64_t key = ibid_checksum(what, sizeof what);
    return key ? key : 1;
}

/* A stored page at a layer, pinned; the head brought if it is not there. */
static ibid_err hold(ibidi_gpu_choice *c, shipment *b, size_t page, size_t head, size_t layer,
                     uint32_t *cell) {
    const ibid_seq *s = c->seq;
    const struct ibidi_gpu_seq *q = s->gpu;
    const ibidi_seg *seg = &s->segs[q->owner[page]];
    size_t t0 = q->pages[page].start - seg->start;
    ibidi_block *p = NULL;
    ibid_err err = ibidi_pages_pin(
        b->g->pages, key_of(q, seg, q->owner[page], t0 / IBIDI_CU_PAGE, layer), 1, 1, &p);
    if (err) return err;
    c->held[c->n_held++] = p;
    *cell = p->cells[0];
    if (p->heads >> head & 1) return IBID_OK;
    uint64_t slot = (uint64_t)*cell * b->g->m->n_kv_heads + head;
    if (!(err = add_head(b, &seg->s.layers[layer], head, t0, slot)))
        p->heads |= UINT64_C(1) << head;
    return err;
}

void ibidi_gpu_unhold(struct ibidi_gpu *g, ibidi_gpu_choice *c) {
    while (c->n_held) ibidi_pages_unpin(g->pages, c->held[--c->n_held]);
}

ibid_err ibidi_gpu_fetch(struct ibidi_gpu *g, ibidi_gpu_choice *c, size_t layer) {
    const struct ibidi_gpu_seq *q = c->seq->gpu;
    size_t kv = g->m->n_kv_heads, n = c->c.n_chosen, n_layers = g->m->n_layers;
    shipment b = {.g = g, .room = (g->stage_bytes - 256) / (head_bytes(g) + sizeof(uint64_t))};
    b.heads_at = ibid_align_up(b.room * sizeof(uint64_t), 256);
    /* What earlier layers chose has been read then, too. */
    ibid_err err = ibid_device_sync(g->d, g->work);
    if (!err) ibidi_gpu_unhold(g, c);
    for (size_t i = 0; !err && i < kv * n; i++) {
        size_t page = c->which[i];
        c->cells[i] = 0; /* of an empty one */
        if (page == UINT32_MAX) continue;
        if (page < q->n_stored_pages)
            err = hold(c, &b, page, i / n, layer, &c->cells[i]);
        else
            c->cells[i] = q->live[(page - q->n_stored_pages) * n_layers + layer];
    }
    if (!err) err = ship(&b);
    if (!err) err = ibidi_gpu_loaded(g);
    if (!err)
        err = ibid_device_upload(g->d, g->work, c->c.cells, c->cells, kv * n * sizeof *c->cells);
    /* What was to be brought may not have been. */
    for (size_t i = 0; err && i < c->n_held; i++) c->held[i]->heads = 0;
    return err;
}
