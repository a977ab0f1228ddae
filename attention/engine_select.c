/* Which pages of its context a decoding row reads. Pages are listed once a step selects, their
 * summaries made layer by layer when a step first needs them, then kept; live pages join them once
 * they are full and no longer among the last. Summaries are turned to the pages' places, so that
 * one product with the row's query, as it is for live keys, scores all of a head's pages. */
#include "attention/engine_internal.h"
#include "attention/kernels/select.h"

#include <math.h>
#include <string.h>

enum {
    LIVE_LAST = 128, /* live tokens that are always read, at least */
    LEAST = 256,     /* tokens read by default */
    ALIGN = 64,
    ROOM_MORE = 16 /* pages */
};

static ibid_page_shape shape_of(const ibid_model *m) {
    return (ibid_page_shape){
        .head_dim = m->head_dim, .n_rot = m->rope.n_rot, .pairing = m->rope.pairing};
}

static size_t stored_units(const ibid_seq *s) {
    size_t n = 0;
    for (size_t i = 0; i < s->n_segs; i++)
        n += (s->segs[i].n_tokens + IBID_PAGE_TOKENS - 1) / IBID_PAGE_TOKENS;
    return n;
}

static size_t live_units(const ibid_seq *s) {
    return s->base > LIVE_LAST ? (s->base - LIVE_LAST) / IBID_PAGE_TOKENS : 0;
}

/* ---- Memory ---- */

typedef struct arrays {
    uint8_t *base;
    size_t used;
    bool ok;
} arrays;

static void *take(arrays *a, size_t n, size_t size) {
    size_t bytes = 0, end = 0;
    if (!ibid_mul_size(n, size, &bytes) || !ibid_add_size(a->used, bytes, &end) ||
        end > SIZE_MAX - ALIGN) {
        a->ok = false;
        return NULL;
    }
    void *p = a->base ? a->base + a->used : NULL;
    a->used = ibid_align_up(end, ALIGN);
    return p;
}

static void lay_out(const ibid_model *m, ibidi_pick *p, arrays *a) {
    ibid_page_shape shape = shape_of(m);
    size_t kv = m->n_kv_heads, heads = m->n_heads, all = 0;
    if (!ibid_mul_size(m->n_layers * kv * ibid_page_bytes(&shape), p->room, &all)) a->ok = false;
    p->summaries = take(a, all, 1);
    p->spread = take(a, m->n_layers * kv, 2 * m->head_dim * sizeof *p->spread);
    p->units = take(a, p->room, sizeof *p->units);
    p->tokens = take(a, p->room, sizeof *p->tokens);
    p->done = take(a, m->n_layers, sizeof *p->done);
    p->rank = take(a, kv, m->head_dim / 4 * sizeof *p->rank);
    p->quads = take(a, kv, ibid_page_quads(&shape) * sizeof *p->quads);
    p->unit = take(a, heads, sizeof *p->unit);
    p->padded = take(a, heads, ibid_page_padded(&shape) * sizeof *p->padded);
    p->query = take(a, heads, 4 * ibid_page_quads(&shape) * sizeof *p->query);
    p->scores = take(a, heads, p->room * sizeof *p->scores);
    p->weight = take(a, kv, p->room * sizeof *p->weight);
    p->heap = take(a, kv, p->room * sizeof *p->heap);
    p->chosen = take(a, kv, p->room / 64 * sizeof *p->chosen);
    p->picked = take(a, kv, sizeof *p->picked);
}

/* A pick with room for n units that lists those of `old` (NULL: none); summaries, which lie by
 * rooms, are made again. */
static ibid_err grow(const ibid_model *m, const ibidi_pick *old, size_t n, ibidi_pick **out) {
    arrays a = {.ok = true};
    ibidi_pick *p = ibid_calloc(1, sizeof *p);
    if (!p) return ibid_fail(IBID_NOMEM, "no memory to select among %zu pages", n);
    if (old) {
        *p = *old;
        p->block = NULL;
    }
    p->room = ibid_align_up(n + n / 4 + ROOM_MORE, 64);
    lay_out(m, p, &a);
    if (a.ok) p->block = ibid_alloc_aligned(ALIGN, a.used);
    if (!p->block) {
        ibid_free(p);
        return ibid_fail(IBID_NOMEM, "no memory to select among %zu pages", n);
    }
    memset(p->block, 0, a.used);
    a = (arrays){.base = p->block, .ok = true};
    lay_out(m, p, &a);
    if (old) {
        memcpy(p->units, old->units, old->n * sizeof *p->units);
        memcpy(p->tokens, old->tokens, old->n * sizeof *p->tokens);
    }
    *out = p;
    return IBID_OK;
}

void ibidi_pick_close(ibidi_pick *p) {
    if (!p) return;
    ibid_free(p->block);
    ibid_free(p);
}

/* ---- The pages ---- */

static void add_unit(ibidi_pick *p, ibidi_unit u) {
    p->tokens[p->n] = (uint32_t)__builtin_popcountll(u.seen);
    p->units[p->n++] = u;
}

static void list_stored(ibidi_pick *p, const ibid_seq *s) {
    size_t start = 0;
    for (size_t i = 0; i < s->n_segs; i++) {
        const ibidi_seg *g = &s->segs[i];
        for (size_t t = 0; t < g->n_tokens; t += IBID_PAGE_TOKENS) {
            size_t left = g->n_tokens - t, n = left < IBID_PAGE_TOKENS ? left : IBID_PAGE_TOKENS;
            uint64_t all = n == 64 ? ~UINT64_C(0) : (UINT64_C(1) << n) - 1;
            uint64_t seen = g->s.masked ? all & ~g->s.masked[t / 64] : all;
            add_unit(p, (ibidi_unit){i, t, start + t, n, seen});
        }
        start += g->n_tokens;
    }
    p->n_stored = p->n;
    p->n_segs = s->n_segs;
}

ibid_err ibidi_pick_ready(ibid_engine *e, const ibid_step *step) {
    ibid_seq *s = step->seq;
    ibid_err err = IBID_OK;
    s->picks = false;
    /* A row that does not see all that is stored, or too large a head, reads everything. */
    if (!step->select || step->select->share >= 1 || step->n != 1 || step->positions[0] < s->end ||
        e->m->head_dim > IBID_PAGE_DIM_MAX || e->m->head_dim % 4)
        return IBID_OK;
    if (s->pick && s->pick->n_segs != s->n_segs) {
        ibidi_pick_close(s->pick);
        s->pick = NULL;
    }
    size_t n = stored_units(s) + live_units(s);
    if (!s->pick || s->pick->room < n) {
        ibidi_pick *p = NULL;
        if ((err = grow(e->m, s->pick, n, &p))) return err;
        if (!s->pick) list_stored(p, s);
        ibidi_pick_close(s->pick);
        s->pick = p;
    }
    ibidi_pick *p = s->pick;
    for (size_t i = p->n - p->n_stored; i < live_units(s); i++)
        add_unit(p,
                 (ibidi_unit){s->n_segs, i * IBID_PAGE_TOKENS, s->n_stored + i * IBID_PAGE_TOKENS,
                              IBID_PAGE_TOKENS, ~UINT64_C(0)});
    p->seen = s->base + 1;
    for (size_t i = 0; i < p->n_stored; i++) p->seen += p->tokens[i];
    s->picks = true;
    return IBID_OK;
}

void ibidi_pick_truncate(ibid_seq *s) {
    ibidi_pick *p = s->pick;
    if (!p) return;
    size_t n = p->n_stored + s->n_live / IBID_PAGE_TOKENS;
    if (n >= p->n) return;
    p->n = n;
    for (size_t l = 0; l < s->engine->m->n_layers; l++)
        if (p->done[l] > n) p->done[l] = n ? n - 1 : 0; /* so that spreads are made again */
}

/* ---- Summaries ---- */

typedef struct job {
    ibid_engine *e;
    const ibidi_piece *p;
    size_t layer, from;
} job;

static ibid_page_sums sums_of(const ibid_model *m, const ibidi_pick *p, size_t layer, size_t head) {
    ibid_page_shape shape = shape_of(m);
    size_t i = layer * m->n_kv_heads + head;
    return ibid_page_sums_at(&shape, p->summaries + i * p->room * ibid_page_bytes(&shape), p->room);
}

/* Two rows: of each dimension, steps' spread and the largest. */
static float *spread_of(const ibid_model *m, const ibidi_pick *p, size_t layer, size_t head) {
    return p->spread + (layer * m->n_kv_heads + head) * 2 * m->head_dim;
}

/* Keys of a page at a head, in f32, in RoPE's dimensions. */
static void page_keys(const ibid_engine *e, const ibid_seq *s, const ibidi_unit *u, size_t layer,
                      size_t head, float *out) {
    ibid_kv_view v;
    if (u->segment < s->n_segs) {
        v = ibidi_slice(&s->segs[u->segment].s.layers[layer], head, u->t0, u->t0 + u->n);
    } else { /* live pages are whole numbers of these */
        size_t from = u->t0 % e->page_tokens;
        ibid_kv_view page = ibidi_page_view(s, u->t0 / e->page_tokens, layer, head);
        v = ibidi_slice(&page, 0, from, from + u->n);
    }
    e->k->kv_unpack(v.type, v.k, v.k_scale, u->n * v.head_dim, out);
    if (v.type == IBID_KV_Q8_0) e->k->hadamard(out, u->n * v.head_dim);
}

static void summarise_part(void *arg, size_t part, size_t thread) {
    const job *j = arg;
    const ibid_model *m = j->e->m;
    const ibid_seq *s = j->p->seq;
    ibid_page_shape shape = shape_of(m);
    size_t unit = j->from + part;
    const ibidi_unit *u = &j->p->pick->units[unit];
    float back[IBID_PAGE_DIM_MAX / 2], *keys = j->e->threads[thread].q; /* room for 96 rows */
    const ibidi_seg *g = u->segment < s->n_segs ? &s->segs[u->segment] : NULL;
    if (!u->seen) return;
    /* A segment's sin turns queries back; keys go the other way. */
    for (size_t i = 0; g && g->cos && i < shape.n_rot / 2; i++) back[i] = -g->sin[i];
    for (size_t h = 0; h < m->n_kv_heads; h++) {
        page_keys(j->e, s, u, j->layer, h, keys);
        if (g && g->cos)
            j->e->k->rope(shape.pairing, keys, u->n, shape.head_dim, shape.n_rot, g->cos, back);
        ibid_page_sums sums = sums_of(m, j->p->pick, j->layer, h);
        ibid_page_summary(&shape, keys, u->n, u->seen, &sums, unit);
    }
}

void ibidi_pick_summarise(ibid_engine *e, const ibidi_piece *p, size_t layer) {
    job j = {.e = e, .p = p, .layer = layer, .from = p->pick->done[layer]};
    if (j.from >= p->pick->n) return;
    ibid_pool_run(e->pool, p->pick->n - j.from, summarise_part, &j);
    p->pick->done[layer] = p->pick->n;
    ibid_page_shape shape = shape_of(e->m);
    for (size_t h = 0; h < e->m->n_kv_heads; h++) {
        /* Of all pages, not of the new ones: rows may have been dropped since. */
        ibid_page_sums sums = sums_of(e->m, p->pick, layer, h);
        float *spread = spread_of(e->m, p->pick, layer, h);
        ibid_page_spread(&shape, &sums, p->pick->n, spread, spread + e->m->head_dim);
    }
}

/* ---- Choosing ---- */

static size_t budget_of(const ibidi_pick *p, const ibid_select *s) {
    uint64_t least = s->least ? s->least : LEAST;
    double want = ceil(s->share * (double)p->seen);
    return want > (double)least ? (size_t)want : (size_t)least;
}

/* scores [group, room] of a head's pages for the queries q [group, head_dim] that share its keys.
 */
static void score_pages(const ibid_engine *e, const ibidi_pick *p, size_t layer, size_t head,
                        const float *q, float *scores, ibidi_thread *th) {
    const ibid_model *m = e->m;
    ibid_page_shape shape = shape_of(m);
    size_t width = ibid_page_padded(&shape), n_quads = ibid_page_quads(&shape);
    const float *spread = spread_of(m, p, layer, head);
    float *padded = p->padded + head * e->group * width;
    ibid_page_sums sums = sums_of(m, p, layer, head);
    ibid_tensor means = {.type = IBID_F16,
                         .rows = p->n,
                         .cols = width,
                         .row_bytes = width * sizeof *sums.means,
                         .data = sums.means};
    for (size_t g = 0; g < e->group; g++) /* what is behind head_dim stays 0 */
        memcpy(padded + g * width, q + g * m->head_dim, m->head_dim * sizeof *padded);
    e->k->matmul(&means, 0, p->n, padded, width, e->group, scores, p->room, th->matmul);
    ibid_page_query ask = {.quads = p->quads + head * n_quads,
                           .q = p->query + head * e->group * 4 * n_quads,
                           .unit = p->unit + head * e->group,
                           .rank = p->rank + head * (m->head_dim / 4)};
    ibid_page_ask(&shape, q, e->group, spread, spread + m->head_dim, &ask);
    ibid_page_look look = {.steps = sums.steps,
                           .codes = sums.codes,
                           .quads = ask.quads,
                           .q = ask.q,
                           .unit = ask.unit,
                           .room = sums.room,
                           .n = n_quads,
                           .group = e->group};
    e->k->page_scores(&look, p->n, scores, p->room);
}

const uint64_t *ibidi_pick_choose(const ibid_engine *e, const ibidi_piece *piece, size_t layer,
                                  size_t head, const float *q, ibidi_thread *th) {
    ibidi_pick *p = piece->pick;
    size_t words = p->room / 64, last = p->seen;
    float *weight = p->weight + head * p->room;
    float *scores = p->scores + head * e->group * p->room;
    uint64_t *chosen = p->chosen + head * words;
    score_pages(e, p, layer, head, q, scores, th);
    memset(weight, 0, p->n * sizeof *weight);
    for (size_t g = 0; g < e->group; g++)
        ibid_page_weigh(scores + g * p->room, p->tokens, p->n, weight);
    memset(chosen, 0, words * sizeof *chosen);
    if (p->n) chosen[0] = 1; /* where the sink is */
    for (size_t i = 0; i < p->n; i++) last -= p->tokens[i];
    size_t budget = budget_of(p, piece->step->select);
    p->picked[head].read =
        last + ibid_page_choose(weight, p->tokens, p->n, budget > last ? budget - last : 0,
                                p->heap + head * p->room, chosen);
    p->picked[head].recall = 0;
    return chosen;
}

bool ibidi_pick_has(const ibidi_pick *p, size_t head, size_t segment, size_t t0) {
    size_t lo = 0, hi = p->n_stored;
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        const ibidi_unit *u = &p->units[mid];
        if (u->segment < segment || (u->segment == segment && u->t0 <= t0))
            lo = mid;
        else
            hi = mid;
    }
    return p->chosen[head * (p->room / 64) + lo / 64] >> lo % 64 & 1;
}

void ibidi_pick_count(const ibid_engine *e, const ibidi_piece *piece) {
    const ibidi_pick *p = piece->pick;
    ibid_select *s = piece->step->select;
    for (size_t h = 0; h < e->m->n_kv_heads; h++) {
        s->read += p->picked[h].read;
        s->seen += p->seen;
        if (!s->measure) continue;
        s->recall += p->picked[h].recall;
        s->n_recall += e->group;
    }
}
