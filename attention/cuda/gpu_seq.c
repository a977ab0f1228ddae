#include "attention/cuda/gpu.h"
#include "rpc/base/log.h"

#include <string.h>

enum { PAGES_MORE = 64 }; /* of live rows, before tables and summaries are made anew */

static void unpin_blocks(struct ibidi_gpu *g, struct ibidi_gpu_seq *q) {
    for (size_t i = 0; i < q->n_blocks; i++) ibidi_pages_unpin(g->pages, q->blocks[i]);
    q->n_blocks = 0;
}

static void stream(struct ibidi_gpu *g, ibid_seq *s) {
    ibidi_pages_stats look = ibidi_pages_look(g->pages);
    unpin_blocks(g, s->gpu);
    s->gpu->streamed = true;
    s->gpu->serial = ++g->serial;
    ibid_log(IBID_LOG_WARN,
             "the KV of %zu tokens has no room in the GPU's pool (%zu of %zu pages in use): it is "
             "brought from memory for every step; --gpu-pool gives the pool more",
             s->n_stored, look.in_use, look.cells);
}

static ibid_err pin_blocks(struct ibidi_gpu *g, ibid_seq *s) {
    struct ibidi_gpu_seq *q = s->gpu;
    if (q->streamed || q->n_blocks == s->n_segs) return IBID_OK;
    ibidi_block **b = ibid_realloc(q->blocks, s->n_segs * sizeof *b);
    if (!b) return ibid_fail(IBID_NOMEM, "no memory for a sequence of %zu blocks", s->n_segs);
    q->blocks = b;
    while (q->n_blocks < s->n_segs) {
        const ibidi_seg *seg = &s->segs[q->n_blocks];
        ibid_err err = ibidi_pages_pin(g->pages, seg->s.id, g->m->n_layers,
                                       ibidi_gpu_pages_of(seg->n_tokens), &q->blocks[q->n_blocks]);
        if (err) return err;
        q->n_blocks++;
    }
    return IBID_OK;
}

static ibid_err take_live(struct ibidi_gpu *g, struct ibidi_gpu_seq *q, size_t n_pages) {
    size_t n_layers = g->m->n_layers;
    if (n_pages > q->live_room) {
        size_t room = n_pages > 2 * q->live_room ? n_pages : 2 * q->live_room;
        uint32_t *live = ibid_realloc(q->live, room * n_layers * sizeof *live);
        if (!live) return ibid_fail(IBID_NOMEM, "no memory for a sequence of %zu pages", n_pages);
        q->live = live;
        q->live_room = room;
    }
    for (; q->n_live < n_pages; q->n_live++) {
        for (size_t l = 0; l < n_layers; l++) {
            ibid_err err = ibidi_pages_take(g->pages, &q->live[q->n_live * n_layers + l]);
            if (!err) continue;
            while (l) ibidi_pages_give(g->pages, q->live[q->n_live * n_layers + --l]);
            return err;
        }
    }
    return IBID_OK;
}

/* Pages on the host: of segments, then live ones. */
static ibid_err list_pages(const ibid_seq *s) {
    struct ibidi_gpu_seq *q = s->gpu;
    size_t n = q->n_live, at = 0;
    for (size_t i = 0; i < s->n_segs; i++) n += ibidi_gpu_pages_of(s->segs[i].n_tokens);
    if (n > q->page_room) {
        size_t room = n + PAGES_MORE > 2 * q->page_room ? n + PAGES_MORE : 2 * q->page_room;
        ibidi_cu_page *p = ibid_realloc(q->pages, room * sizeof *p);
        if (p) q->pages = p;
        uint32_t *owner = p ? ibid_realloc(q->owner, room * sizeof *owner) : NULL;
        if (!owner) return ibid_fail(IBID_NOMEM, "no memory for a sequence of %zu pages", n);
        q->owner = owner;
        q->page_room = room;
    }
    memset(q->pages, 0, n * sizeof *q->pages); /* padding too: it is compared */
    q->n_turns = 0;
    for (size_t i = 0; i < s->n_segs; i++) {
        const ibidi_seg *seg = &s->segs[i];
        uint32_t turn = seg->cos ? (uint32_t)++q->n_turns : 0;
        for (size_t t = 0; t < seg->n_tokens; t += IBIDI_CU_PAGE) {
            q->owner[at] = (uint32_t)i;
            ibidi_cu_page *p = &q->pages[at++];
            size_t left = seg->n_tokens - t;
            p->keep = seg->s.masked ? ~seg->s.masked[t / 64] : UINT64_MAX;
            p->start = (uint32_t)(seg->start + t);
            p->n = (uint32_t)(left < IBIDI_CU_PAGE ? left : IBIDI_CU_PAGE);
            p->turn = turn;
        }
    }
    q->n_stored_pages = at;
    for (size_t i = 0; i < q->n_live; i++) {
        ibidi_cu_page *p = &q->pages[at++];
        p->keep = UINT64_MAX;
        p->start = (uint32_t)(i * IBIDI_CU_PAGE);
        p->n = IBIDI_CU_PAGE;
        p->live = 1;
    }
    q->n_pages = at;
    return IBID_OK;
}

static void list_cells(const struct ibidi_gpu *g, const struct ibidi_gpu_seq *q, uint32_t *cells) {
    for (size_t l = 0; l < g->m->n_layers; l++) {
        uint32_t *to = cells + l * q->page_room;
        if (q->window)
            memcpy(to, q->window->cells + l % q->window->n_layers * q->n_stored_pages,
                   q->n_stored_pages * sizeof *to);
        if (q->streamed) to += q->n_stored_pages; /* else unknown until chosen */
        for (size_t i = 0; i < q->n_blocks; i++) {
            const ibidi_block *b = q->blocks[i];
            memcpy(to, b->cells + l * b->n_pages, b->n_pages * sizeof *to);
            to += b->n_pages;
        }
        for (size_t i = 0; i < q->n_live; i++) *to++ = q->live[i * g->m->n_layers + l];
    }
}

static ibid_err update_table(struct ibidi_gpu *g, const ibid_seq *s) {
    struct ibidi_gpu_seq *q = s->gpu;
    size_t n_rot = g->shape.n_rot, cells_at = ibid_align_up(q->page_room * sizeof *q->pages, 256);
    size_t turns_at =
        ibid_align_up(cells_at + g->m->n_layers * q->page_room * sizeof(uint32_t), 256);
    size_t bytes = turns_at + (q->n_turns + 1) * n_rot * sizeof(float), turn = 0;
    uint8_t *next = ibid_calloc(1, bytes);
    if (!next) return ibid_fail(IBID_NOMEM, "no memory for a sequence's tables");
    memcpy(next, q->pages, q->n_pages * sizeof *q->pages);
    list_cells(g, q, (uint32_t *)(void *)(next + cells_at));
    for (size_t i = 0; i < s->n_segs; i++) {
        if (!s->segs[i].cos) continue;
        memcpy(next + turns_at + turn++ * n_rot * sizeof(float), s->segs[i].cos,
               n_rot * sizeof(float));
    }
    if (bytes == q->uploaded_bytes && memcmp(next, q->uploaded, bytes) == 0) {
        ibid_free(next);
        return IBID_OK;
    }
    ibid_err err = ibid_device_sync(g->d, g->work); /* the last table may still be on its way */
    ibid_free(q->uploaded);
    q->uploaded = next;
    q->uploaded_bytes = 0;
    if (!err) err = ibidi_gpu_reserve(g, &q->table, bytes);
    if (!err) err = ibid_device_upload(g->d, g->work, q->table.p, next, bytes);
    if (err) return err;
    q->uploaded_bytes = bytes;
    const uint8_t *at = q->table.p;
    q->view = (ibidi_cu_seq){.pages = (const ibidi_cu_page *)(const void *)at,
                             .cells = (const uint32_t *)(const void *)(at + cells_at),
                             .turns = (const float *)(const void *)(at + turns_at),
                             .room = (uint32_t)q->page_room,
                             .first_live = (uint32_t)q->n_stored_pages};
    return IBID_OK;
}

ibid_err ibidi_gpu_seq_ready(struct ibidi_gpu *g, ibid_seq *s, size_t n_live) {
    ibid_err err;
    if (!s->gpu && !(s->gpu = ibid_calloc(1, sizeof *s->gpu)))
        return ibid_fail(IBID_NOMEM, "no memory for a sequence");
    size_t n = ibidi_gpu_pages_of(n_live);
    if (!(err = pin_blocks(g, s))) err = take_live(g, s->gpu, n);
    if (err == IBID_NOMEM && !s->gpu->streamed && s->n_segs) {
        stream(g, s);
        err = take_live(g, s->gpu, n);
    }
    return err ? err : list_pages(s);
}

ibid_err ibidi_gpu_seq_place(struct ibidi_gpu *g, ibid_seq *s, bool all) {
    struct ibidi_gpu_seq *q = s->gpu;
    ibid_err err = IBID_OK;
    if (q->streamed && all && !q->window && q->n_stored_pages)
        err =
            ibidi_pages_pin(g->pages, 0, g->m->n_layers < 2 ? 1 : 2, q->n_stored_pages, &q->window);
    return err ? err : update_table(g, s);
}

void ibidi_gpu_seq_leave(struct ibidi_gpu *g, ibid_seq *s) {
    if (!s->gpu || !s->gpu->window) return;
    ibidi_pages_unpin(g->pages, s->gpu->window);
    s->gpu->window = NULL;
}

void ibidi_gpu_seq_close(struct ibidi_gpu *g, struct ibidi_gpu_seq *q) {
    if (!q) return;
    unpin_blocks(g, q);
    for (size_t i = 0; i < q->n_live * g->m->n_layers; i++) ibidi_pages_give(g->pages, q->live[i]);
    ibid_device_free(g->d, q->table.p);
    ibid_device_free(g->d, q->summaries.p);
    ibid_free(q->summed);
    ibid_free(q->blocks);
    ibid_free(q->live);
    ibid_free(q->pages);
    ibid_free(q->owner);
    ibid_free(q->uploaded);
    ibid_free(q->mirror);
    ibid_free(q);
}

/* ---- Reading back ---- */

ibid_err ibidi_gpu_seq_read(const ibid_seq *s, size_t layer, size_t row0, size_t n) {
    struct ibidi_gpu *g = s->engine->gpu;
    struct ibidi_gpu_seq *q = s->gpu;
    size_t cell_bytes = ibidi_pages_cell_bytes(g->pages), first = row0 / IBIDI_CU_PAGE;
    size_t count = n ? (row0 + n - 1) / IBIDI_CU_PAGE - first + 1 : 0;
    ibid_err err = IBID_OK;
    if (count == 0) return IBID_OK;
    if (count * cell_bytes > q->mirror_bytes) {
        uint8_t *m = ibid_realloc(q->mirror, count * cell_bytes);
        if (!m) return ibid_fail(IBID_NOMEM, "no memory to read %zu pages", count);
        q->mirror = m;
        q->mirror_bytes = count * cell_bytes;
    }
    q->mirror_page0 = first;
    q->mirror_layer = layer;
    for (size_t i = 0; !err && i < count; i++) {
        size_t cell = q->live[(first + i) * g->m->n_layers + layer];
        err = ibid_device_download(g->d, g->work, q->mirror + i * cell_bytes,
                                   ibidi_pages_memory(g->pages) + cell * cell_bytes, cell_bytes);
    }
    ibid_err e = ibid_device_sync(g->d, g->work);
    return err ? err : e;
}

const uint8_t *ibidi_gpu_page(const ibid_seq *s, size_t page, size_t layer, size_t head) {
    const struct ibidi_gpu *g = s->engine->gpu;
    const struct ibidi_gpu_seq *q = s->gpu;
    (void)layer; /* the one read last */
    return q->mirror + (page - q->mirror_page0) * ibidi_pages_cell_bytes(g->pages) +
           head * ibidi_cu_head_bytes(g->shape.head_dim, g->shape.q8);
}
