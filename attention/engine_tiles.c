/* Steps of many rows: their context is laid side by side first, tile by tile, each layer anew.
 *
 * Stored keys stand at local positions, so every row's query has to be turned back for every segment
 * (engine_attend.c). Once there are more rows than tokens in a segment it is cheaper to turn the
 * segment's keys instead: once per layer, not once per row. They are rounded again on the way, which
 * costs as much as rounding them cost at first (docs/performance.md). Then nothing is left of
 * segments, masks and pages: one context, of which a row sees what stands before it. */
#include "attention/engine_internal.h"

#include <string.h>

/* Position of a live row, of those before the running step or of the step. */
static uint32_t live_position(const ibidi_piece *p, size_t live) {
    const ibid_seq *s = p->seq;
    return live < s->base ? s->positions[live] : p->step->positions[live - s->base];
}

static bool wants_tiles(const ibid_engine *e, const ibidi_piece *p) {
    const ibid_seq *s = p->seq;
    if (!e->k->attn_tiles || e->attn != e->k->attn_i8 || e->live_type != IBID_KV_Q8_0) return false;
    if (e->m->head_dim % 64 || e->m->head_dim > 256) return false;
    if (p->step->n < IBIDI_MANY || p->n_splits > 1 || p->pick) return false;
    for (size_t i = 0; i < s->n_segs; i++) /* f16 is kept for its precision */
        if (s->segs[i].s.layers[0].type != IBID_KV_Q8_0) return false;
    return true;
}

/* All tokens the piece's last row sees, in the order of their positions. */
static void list_slots(const ibidi_piece *p, ibidi_slot *slots, uint32_t *sees, size_t *n_slots) {
    const ibid_seq *s = p->seq;
    size_t n = 0, segment = 0, token = 0;
    for (size_t live = 0; live < p->end; live++) {
        uint32_t position = live_position(p, live);
        for (; segment < s->n_segs; segment++, token = 0) {
            const ibidi_seg *g = &s->segs[segment];
            for (; token < g->n_tokens && g->start + token < position; token++) {
                if (g->s.masked && (g->s.masked[token / 64] >> token % 64 & 1)) continue;
                slots[n++] = (ibidi_slot){(uint32_t)segment, (uint32_t)token};
            }
            if (token < g->n_tokens) break;
        }
        slots[n++] = (ibidi_slot){(uint32_t)s->n_segs, (uint32_t)live};
        if (live >= p->live0) sees[live - p->live0] = (uint32_t)n;
    }
    *n_slots = n;
}

/* Room in all pieces' tiles and lists; kept for later calls. */
static ibid_err reserve(ibid_engine *e, size_t n_slots, size_t n_rows, size_t n_tiles) {
    ibidi_context *c = &e->context;
    size_t bytes;
    if (n_slots > c->slot_room) {
        ibid_free(c->slots);
        c->slots = ibid_calloc(n_slots, sizeof *c->slots);
        c->slot_room = c->slots ? n_slots : 0;
    }
    if (n_rows > c->row_room) {
        ibid_free(c->sees);
        c->sees = ibid_calloc(n_rows, sizeof *c->sees);
        c->row_room = c->sees ? n_rows : 0;
    }
    if (n_tiles > c->tile_room) {
        ibid_free(c->tiles);
        c->tiles = ibid_mul_size(n_tiles, e->k->kv_tile_bytes(e->m->head_dim), &bytes)
                       ? ibid_alloc_aligned(64, bytes)
                       : NULL;
        c->tile_room = c->tiles ? n_tiles : 0;
    }
    if (n_slots > c->slot_room || n_rows > c->row_room || n_tiles > c->tile_room)
        return ibid_fail(IBID_NOMEM, "no memory to lay out a context of %zu tokens", n_slots);
    return IBID_OK;
}

ibid_err ibidi_plan_tiles(ibid_engine *e) {
    size_t n_slots = 0, n_rows = 0, n_tiles = 0;
    e->context.n_tiles = 0;
    for (size_t i = 0; i < e->n_pieces; i++) {
        ibidi_piece *p = &e->pieces[i];
        if (!(p->laid = wants_tiles(e, p))) continue;
        size_t most = p->seq->n_stored + p->end;
        p->slot0 = n_slots;
        p->sees0 = n_rows;
        p->live0 = p->seq->base + p->row0;
        n_slots += most;
        n_rows += p->n;
        n_tiles += (most + IBID_KV_TILE - 1) / IBID_KV_TILE * e->m->n_kv_heads;
    }
    if (n_slots == 0) return IBID_OK;
    ibid_err err = reserve(e, n_slots, n_rows, n_tiles);
    for (size_t i = 0; !err && i < e->n_pieces; i++) {
        ibidi_piece *p = &e->pieces[i];
        if (!p->laid) continue;
        list_slots(p, e->context.slots + p->slot0, e->context.sees + p->sees0, &p->n_slots);
        p->tile0 = e->context.n_tiles;
        p->n_tiles = (p->n_slots + IBID_KV_TILE - 1) / IBID_KV_TILE;
        e->context.n_tiles += p->n_tiles * e->m->n_kv_heads;
    }
    return err;
}

uint8_t *ibidi_tiles_of(const ibid_engine *e, const ibidi_piece *p, size_t head) {
    return e->context.tiles +
           (p->tile0 + head * p->n_tiles) * e->k->kv_tile_bytes(e->m->head_dim);
}

uint32_t ibidi_row_sees(const ibid_engine *e, const ibidi_piece *p, size_t live) {
    return e->context.sees[p->sees0 + live - p->live0];
}

/* ---- Laying ---- */

typedef struct lay_job {
    ibid_engine *e;
    size_t layer;
} lay_job;

/* Slots [i, end) are of one segment, or all live. Their keys and values in f32, keys spread. */
static void lay_slots(const ibid_engine *e, const ibidi_piece *p, size_t layer, size_t head,
                      const ibidi_slot *slot, size_t n, float *k, float *v) {
    const ibid_seq *s = p->seq;
    const ibid_model *m = e->m;
    const ibidi_seg *g = slot->segment < s->n_segs ? &s->segs[slot->segment] : NULL;
    size_t dim = m->head_dim, each = g ? g->n_tokens : e->page_tokens;
    bool spread = true;
    for (size_t i = 0, run; i < n; i += run) {
        size_t token = slot[i].token, left = each - token % each;
        for (run = 1; i + run < n && run < left && slot[i + run].token == token + run;) run++;
        ibid_kv_view view = g ? g->s.layers[layer] : ibidi_page_view(s, token / each, layer, head);
        ibidi_unpack(e->k, &view, g ? head : 0, token % each, run, k + i * dim, v + i * dim);
        spread = view.type == IBID_KV_Q8_0;
    }
    if (g && g->cos) {
        if (spread) e->k->hadamard(k, n * dim);
        spread = false;
        e->k->rope(m->rope.pairing, k, n, dim, m->rope.n_rot, g->cos, g->forth);
    }
    if (!spread) e->k->hadamard(k, n * dim);
}

/* NULL if it has no rows left in this layer. */
static const ibidi_piece *piece_of_tile(const ibid_engine *e, size_t tile) {
    for (size_t i = 0; i < e->n_pieces; i++) {
        const ibidi_piece *p = &e->pieces[i];
        if (p->laid && tile >= p->tile0 && tile - p->tile0 < p->n_tiles * e->m->n_kv_heads)
            return p;
    }
    return NULL;
}

static void lay_part(void *arg, size_t part, size_t thread) {
    const lay_job *j = arg;
    ibid_engine *e = j->e;
    const ibidi_piece *p = piece_of_tile(e, part);
    if (!p) return;
    size_t dim = e->m->head_dim;
    size_t head = (part - p->tile0) / p->n_tiles, tile = (part - p->tile0) % p->n_tiles;
    size_t from = tile * IBID_KV_TILE, n = p->n_slots - from;
    if (n > IBID_KV_TILE) n = IBID_KV_TILE;
    const ibidi_slot *slot = e->context.slots + p->slot0 + from;
    float *k = e->threads[thread].laid, *v = k + IBID_KV_TILE * dim;
    for (size_t at = 0, end; at < n; at = end) {
        for (end = at + 1; end < n && slot[end].segment == slot[at].segment;) end++;
        lay_slots(e, p, j->layer, head, slot + at, end - at, k + at * dim, v + at * dim);
    }
    e->k->kv_tile_pack(k, v, n, dim, e->context.tiles + part * e->k->kv_tile_bytes(dim));
}

void ibidi_lay_tiles(ibid_engine *e, size_t layer) {
    lay_job j = {.e = e, .layer = layer};
    if (e->context.n_tiles) ibid_pool_run(e->pool, e->context.n_tiles, lay_part, &j);
}

void ibidi_tiles_close(ibid_engine *e) {
    ibid_free(e->context.slots);
    ibid_free(e->context.sees);
    ibid_free(e->context.tiles);
}
