/* Steps of many rows: their context is laid side by side first, tile by tile, each layer anew.
 *
 * Stored keys stand at local positions, so every row's query has to be turned back for every
 * segment (engine_attend.c). Once there are more rows than tokens in a segment it is cheaper to
 * turn the segment's keys instead: once per layer, not once per row. They are rounded again on the
 * way, which costs as much as rounding them cost at first (docs/performance.md). Then nothing is
 * left of segments, masks and pages: one context, of which a row sees what stands before it. */
#include "attention/engine_internal.h"

#include <string.h>

static bool wants_tiles(const ibid_engine *e, const ibidi_piece *p) {
    const ibid_seq *s = p->seq;
    if (!e->k->attn_tiles || e->attn != e->k->attn_i8 || e->live_type != IBID_KV_Q8_0) return false;
    if (e->m->head_dim % 64 || e->m->head_dim > 256) return false;
    if (p->step->n < IBIDI_MANY || p->n_splits > 1 || p->pick) return false;
    for (size_t i = 0; i < s->n_segs; i++) /* f16 is kept for its precision */
        if (s->segs[i].s.layers[0].type != IBID_KV_Q8_0) return false;
    return true;
}

void ibidi_tiles_begin(ibid_engine *e) {
    e->laid.n = 0;
}

ibidi_context *ibidi_context_of(ibid_engine *e, const ibidi_piece *p) {
    ibidi_context *c = e->laid.n ? &e->laid.contexts[e->laid.n - 1] : NULL;
    for (; c && c->step != p->step; c--)
        if (c == e->laid.contexts) return NULL;
    return c;
}

static size_t tiles_of(size_t n) {
    return (n + IBID_KV_TILE - 1) / IBID_KV_TILE;
}

/* Only notes the step; p's rows follow those of the same step that were noted before. */
ibid_err ibidi_tiles_plan(ibid_engine *e, const ibidi_piece *p) {
    ibidi_laid *l = &e->laid;
    if (!wants_tiles(e, p)) return IBID_OK;
    if (ibidi_context_of(e, p)) return IBID_OK;
    if (l->n == l->room) {
        size_t room = l->room ? 2 * l->room : 8;
        ibidi_context *more = ibid_realloc(l->contexts, room * sizeof *more);
        if (!more) return ibid_fail(IBID_NOMEM, "no memory to lay out %zu contexts", room);
        l->contexts = more;
        l->room = room;
    }
    l->contexts[l->n++] = (ibidi_context){.step = p->step, .live0 = p->seq->base + p->row0};
    return IBID_OK;
}

/* All tokens that live rows [live0, end) see, in the order of their positions. */
static size_t list_slots(const ibid_seq *s, const ibidi_context *c, size_t end, ibidi_slot *slots,
                         uint32_t *sees) {
    size_t n = 0, segment = 0, token = 0;
    for (size_t live = 0; live < end; live++) {
        uint32_t position =
            live < s->base ? s->positions[live] : c->step->positions[live - s->base];
        for (; segment < s->n_segs; segment++, token = 0) {
            const ibidi_seg *g = &s->segs[segment];
            for (; token < g->n_tokens && g->start + token < position; token++) {
                if (g->s.masked && (g->s.masked[token / 64] >> token % 64 & 1)) continue;
                slots[n++] = (ibidi_slot){(uint32_t)segment, (uint32_t)token};
            }
            if (token < g->n_tokens) break;
        }
        slots[n++] = (ibidi_slot){(uint32_t)s->n_segs, (uint32_t)live};
        if (live >= c->live0) sees[live - c->live0] = (uint32_t)n;
    }
    return n;
}

/* Room in lists and tiles; kept for later calls. */
static ibid_err reserve(ibid_engine *e, size_t n_slots, size_t n_rows, size_t n_tiles) {
    ibidi_laid *l = &e->laid;
    size_t bytes;
    if (n_slots > l->slot_room) {
        ibid_free(l->slots);
        l->slots = ibid_calloc(n_slots, sizeof *l->slots);
        l->slot_room = l->slots ? n_slots : 0;
    }
    if (n_rows > l->row_room) {
        ibid_free(l->sees);
        l->sees = ibid_calloc(n_rows, sizeof *l->sees);
        l->row_room = l->sees ? n_rows : 0;
    }
    if (n_tiles > l->tile_room) {
        ibid_free(l->tiles);
        l->tiles = ibid_mul_size(n_tiles, e->k->kv_tile_bytes(e->m->head_dim), &bytes)
                       ? ibid_alloc_aligned(64, bytes)
                       : NULL;
        l->tile_room = l->tiles ? n_tiles : 0;
    }
    if (n_slots > l->slot_room || n_rows > l->row_room || n_tiles > l->tile_room)
        return ibid_fail(IBID_NOMEM, "no memory to lay out a context of %zu tokens", n_slots);
    return IBID_OK;
}

/* Live rows of the step at the stretch's end. */
static size_t live_end(const ibid_engine *e, const ibidi_context *c) {
    const ibidi_chunk *last = &e->chunks[e->n_chunks - 1];
    bool whole = c->step != e->steps + last->step1;
    return c->step->seq->base + (whole ? c->step->n : last->row1);
}

ibid_err ibidi_tiles_ready(ibid_engine *e) {
    size_t n_slots = 0, n_rows = 0, n_tiles = 0;
    ibidi_laid *l = &e->laid;
    for (size_t i = 0; i < l->n; i++) {
        ibidi_context *c = &l->contexts[i];
        size_t end = live_end(e, c);
        c->slot0 = n_slots;
        c->sees0 = n_rows;
        c->tile0 = n_tiles;
        size_t most = c->step->seq->n_stored + end; /* masked tokens have no slot */
        n_slots += most;
        n_rows += end - c->live0;
        n_tiles += tiles_of(most) * e->m->n_kv_heads;
    }
    ibid_err err = l->n ? reserve(e, n_slots, n_rows, n_tiles) : IBID_OK;
    for (size_t i = 0; !err && i < l->n; i++) {
        ibidi_context *c = &l->contexts[i];
        size_t n =
            list_slots(c->step->seq, c, live_end(e, c), l->slots + c->slot0, l->sees + c->sees0);
        c->n_tiles = tiles_of(n);
    }
    return err;
}

void ibidi_tiles_layer(ibid_engine *e) {
    for (size_t i = 0; i < e->laid.n; i++) e->laid.contexts[i].n_laid = 0;
}

static uint8_t *tile_at(const ibid_engine *e, const ibidi_context *c, size_t head, size_t i) {
    return e->laid.tiles + (c->tile0 + head * c->n_tiles + i) * e->k->kv_tile_bytes(e->m->head_dim);
}

const uint8_t *ibidi_tiles_of(const ibid_engine *e, const ibidi_context *c, size_t head) {
    return tile_at(e, c, head, 0);
}

uint32_t ibidi_row_sees(const ibid_engine *e, const ibidi_context *c, size_t live) {
    return e->laid.sees[c->sees0 + live - c->live0];
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

static size_t n_parts_of(const ibid_engine *e, const ibidi_piece *p) {
    return p->context->n_parts * e->m->n_kv_heads;
}

static void lay_part(void *arg, size_t part, size_t thread) {
    const lay_job *j = arg;
    ibid_engine *e = j->e;
    size_t dim = e->m->head_dim;
    const ibidi_piece *p = e->pieces;
    while (!p->context || part < p->context->part0 || part - p->context->part0 >= n_parts_of(e, p))
        p++;
    const ibidi_context *c = p->context;
    size_t head = (part - c->part0) / c->n_parts;
    size_t tile = c->first + (part - c->part0) % c->n_parts;
    size_t from = tile * IBID_KV_TILE, n = c->n_laid - from;
    if (n > IBID_KV_TILE) n = IBID_KV_TILE;
    const ibidi_slot *slot = e->laid.slots + c->slot0 + from;
    float *k = e->threads[thread].laid, *v = k + IBID_KV_TILE * dim;
    for (size_t at = 0, end; at < n; at = end) {
        for (end = at + 1; end < n && slot[end].segment == slot[at].segment;) end++;
        lay_slots(e, p, j->layer, head, slot + at, end - at, k + at * dim, v + at * dim);
    }
    e->k->kv_tile_pack(k, v, n, dim, tile_at(e, c, head, tile));
}

/* What chunks before have laid stays, but for the last tile if it is not full. */
void ibidi_tiles_lay(ibid_engine *e, size_t layer) {
    lay_job j = {.e = e, .layer = layer};
    size_t n_parts = 0;
    for (size_t i = 0; i < e->n_pieces; i++) {
        const ibidi_piece *p = &e->pieces[i];
        ibidi_context *c = p->context;
        if (!c) continue;
        size_t n = ibidi_row_sees(e, c, p->seq->base + p->row0 + p->n - 1);
        c->first = c->n_laid / IBID_KV_TILE;
        c->n_laid = n;
        c->n_parts = tiles_of(n) - c->first;
        c->part0 = n_parts;
        n_parts += n_parts_of(e, p);
    }
    if (n_parts) ibid_pool_run(e->pool, n_parts, lay_part, &j);
}

void ibidi_tiles_close(ibid_engine *e) {
    ibid_free(e->laid.contexts);
    ibid_free(e->laid.slots);
    ibid_free(e->laid.sees);
    ibid_free(e->laid.tiles);
}
