/* Decoding rows that read a share of their context (ibid_select), on the device: for each kv head a
 * step's chosen pages become a sequence of their own, and attention's tiles read that. Summaries
 * are the sequence's, since masks and places are; making them reads its keys once. */
#include "attention/cuda/gpu.h"
#include "rpc/base/log.h"

#include <math.h>
#include <string.h>

enum {
    LIVE_LAST = 128, /* live tokens that are always read, as on the CPU */
    LEAST = 256,     /* tokens read by default */
    HEADS_MAX = 64,  /* kv heads, of which single ones are brought: a word's bits */
    GRID_STEP = 64   /* pages by which recorded launches grow */
};

/* All summaries, and the spreads behind them. */
static size_t summary_bytes(const struct ibidi_gpu *g, size_t room) {
    return g->m->n_layers * g->m->n_kv_heads * room * ibidi_cu_summary_bytes(g->shape.head_dim);
}

static size_t spread_bytes(const struct ibidi_gpu *g) {
    return g->m->n_layers * g->m->n_kv_heads * 2 * g->shape.head_dim * sizeof(float);
}

/* The device has no room for them: asked once, or every token would ask again. */
static void give_up_summaries(const struct ibidi_gpu *g, const ibid_seq *s) {
    s->gpu->no_summaries = true;
    ibid_log(IBID_LOG_WARN,
             "the GPU has no room for %zu MiB of page summaries: the answer reads all of its "
             "context; a smaller --gpu-pool leaves more",
             summary_bytes(g, s->gpu->page_room) >> 20);
}

/* Room for summaries of all the sequence's pages; forgets those that are not its any more. NOMEM:
 * it has none, and reads everything. */
static ibid_err ready_summaries(struct ibidi_gpu *g, ibid_seq *s) {
    struct ibidi_gpu_seq *q = s->gpu;
    size_t n_layers = g->m->n_layers, kept = q->n_stored_pages + s->live_kept / IBIDI_CU_PAGE;
    ibid_err err = IBID_OK;
    if (q->no_summaries) return IBID_NOMEM;
    if (!q->summed && !(q->summed = ibid_calloc(n_layers, sizeof *q->summed)))
        return ibid_fail(IBID_NOMEM, "no memory to select pages");
    if (q->summary_room != q->page_room || q->summary_segs != s->n_segs) {
        memset(q->summed, 0, n_layers * sizeof *q->summed);
        q->summary_room = 0;
        err = ibidi_gpu_reserve(g, &q->summaries, summary_bytes(g, q->page_room) + spread_bytes(g));
        if (err == IBID_NOMEM) give_up_summaries(g, s);
        if (err) return err;
        q->summary_room = q->page_room;
        q->summary_segs = s->n_segs;
    }
    /* Some are made again, so that spreads are: of those kept, the last ones may always be read. */
    size_t again = kept > LIVE_LAST / IBIDI_CU_PAGE + 1 ? kept - LIVE_LAST / IBIDI_CU_PAGE - 1 : 0;
    for (size_t l = 0; l < n_layers; l++)
        if (q->summed[l] > kept) q->summed[l] = again;
    s->live_kept = SIZE_MAX / 2;
    return IBID_OK;
}

static bool has_summaries(const struct ibidi_gpu *g, const struct ibidi_gpu_seq *q) {
    for (size_t l = 0; l < g->m->n_layers; l++)
        if (q->summed[l] < q->n_stored_pages) return false;
    return true;
}

/* While all of a streamed sequence comes by anyway, for steps that will choose. */
static ibid_err plan_summaries(struct ibidi_gpu *g, ibid_seq *s, ibidi_gpu_choice *c) {
    struct ibidi_gpu_seq *q = s->gpu;
    ibid_err err = ready_summaries(g, s);
    if (err == IBID_NOMEM) return IBID_OK;
    if (err || has_summaries(g, q)) return err;
    c->summarises = true;
    c->seq = s;
    c->c = (ibidi_cu_choosing){.room = (uint32_t)q->summary_room,
                               .n = (uint32_t)q->n_stored_pages,
                               .last = (uint32_t)q->n_stored_pages,
                               .pool = ibidi_pages_memory(g->pages)};
    return IBID_OK;
}

ibid_err ibidi_gpu_choice_plan(struct ibidi_gpu *g, const ibid_step *step, ibidi_gpu_choice *c) {
    ibid_seq *s = step->seq;
    ibid_select *x = step->select;
    struct ibidi_gpu_seq *q = s->gpu;
    memset(c, 0, sizeof *c);
    if (step->will_select && q->streamed && !x) return plan_summaries(g, s, c);
    if (!x || x->share >= 1 || step->n != 1 || step->positions[0] < s->end) return IBID_OK;
    size_t live = s->base > LIVE_LAST ? (s->base - LIVE_LAST) / IBIDI_CU_PAGE : 0;
    size_t n = q->n_stored_pages + s->base / IBIDI_CU_PAGE + 1, last = q->n_stored_pages + live;
    uint64_t least = (x->least ? x->least : LEAST) / IBIDI_CU_PAGE;
    double want = fmax(ceil(x->share * (double)n), (double)(n - last + 1));
    want = fmax(want, (double)least);
    if (want >= (double)n) return IBID_OK;
    ibid_err err = ready_summaries(g, s);
    if (err == IBID_NOMEM) return IBID_OK;
    if (err) return err;
    c->select = x;
    c->seq = s;
    c->last_tokens = s->base + 1 - live * IBIDI_CU_PAGE;
    c->seen = s->base + 1;
    for (size_t i = 0; i < q->n_stored_pages; i++) {
        const ibidi_cu_page *p = &q->pages[i];
        uint64_t all = p->n < 64 ? (UINT64_C(1) << p->n) - 1 : UINT64_MAX;
        c->seen += (uint64_t)__builtin_popcountll(p->keep & all);
    }
    c->c = (ibidi_cu_choosing){.room = (uint32_t)q->summary_room,
                               .n = (uint32_t)n,
                               .last = (uint32_t)last,
                               .n_chosen = (uint32_t)want,
                               .pool = ibidi_pages_memory(g->pages)};
    c->fetches = q->streamed && !x->measure && g->m->n_kv_heads <= HEADS_MAX && has_summaries(g, q);
    return IBID_OK;
}

/* Where a choice's arrays lie in the scratch, whatever it will choose; returns what they take. */
static size_t place(const struct ibidi_gpu *g, ibidi_gpu_choice *c, uint8_t *base, size_t used) {
    size_t kv = g->m->n_kv_heads, slots = kv * c->c.room, at[7];
    size_t bytes[] = {slots * sizeof *c->c.pages,
                      slots * sizeof *c->c.cells,
                      slots * sizeof *c->c.which,
                      kv * (g->shape.group + 1) * c->c.room * sizeof *c->c.weight,
                      c->c.room * IBIDI_CU_PAGE * sizeof *c->mass,
                      kv * sizeof *c->c.read,
                      sizeof *c->recall};
    for (size_t i = 0; i < 7; i++) {
        at[i] = used;
        used = ibid_align_up(used + bytes[i], 256);
    }
    if (!base) return used;
    c->c.pages = (void *)(base + at[0]);
    c->c.cells = (void *)(base + at[1]);
    c->c.which = (void *)(base + at[2]);
    c->c.weight = (void *)(base + at[3]);
    c->mass = (void *)(base + at[4]);
    c->c.read = (void *)(base + at[5]);
    c->recall = (void *)(base + at[6]);
    return used;
}

/* What comes back of choices that fetch, and what they hold. */
static ibid_err place_fetched(struct ibidi_gpu *g, ibidi_gpu_choice *c, size_t n) {
    size_t total = 0, kv = g->m->n_kv_heads;
    for (size_t i = 0; i < n; i++)
        if (c[i].fetches) total += kv * c[i].c.n_chosen;
    ibid_err err = ibidi_gpu_reserve_host(g, &g->host_chosen, 2 * total * sizeof *c->which);
    if (err) return err;
    uint32_t *at = g->host_chosen.p;
    for (size_t i = 0; i < n; i++) {
        size_t slots = kv * c[i].c.n_chosen;
        if (!c[i].fetches) continue;
        c[i].which = at;
        c[i].cells = at + slots;
        at += 2 * slots;
        if (!(c[i].held = ibid_alloc(slots * sizeof(ibidi_block *))))
            return ibid_fail(IBID_NOMEM, "no memory for %zu chosen pages", slots);
    }
    return IBID_OK;
}

void ibidi_gpu_choices_drop(struct ibidi_gpu *g, ibidi_gpu_choice *c, size_t n) {
    for (size_t i = 0; i < n; i++) {
        ibidi_gpu_unhold(g, &c[i]);
        ibid_free(c[i].held);
        c[i].held = NULL;
    }
}

/* What of a choice goes to the device. from [n_layers]. */
static void fill_choosing(const struct ibidi_gpu *g, ibidi_gpu_choice *c, ibidi_cu_seq *seqs,
                          uint32_t *from) {
    const struct ibidi_gpu_seq *q = c->seq->gpu;
    ibidi_cu_choosing *a = &c->c;
    a->seq = q->view;
    a->summaries = q->summaries.p;
    a->spread = (float *)(void *)(a->summaries + summary_bytes(g, q->summary_room));
    c->fresh = 0;
    c->grid = ibid_align_up(a->last, GRID_STEP);
    for (size_t l = 0; l < g->m->n_layers; l++) {
        size_t fresh = q->summed[l] < a->last ? a->last - q->summed[l] : 0;
        from[l] = a->last - (uint32_t)fresh;
        if (fresh > c->fresh) c->fresh = fresh;
    }
    for (size_t h = 0; h < g->m->n_kv_heads; h++)
        seqs[h] = (ibidi_cu_seq){.pages = a->pages + h * a->n_chosen,
                                 .cells = a->cells + h * a->n_chosen,
                                 .turns = a->seq.turns};
}

ibid_err ibidi_gpu_choices_place(struct ibidi_gpu *g, ibidi_gpu_choice *c, size_t n,
                                 const ibidi_gpu_choosings *t) {
    size_t kv = g->m->n_kv_heads, n_layers = g->m->n_layers, used = 0;
    ibid_err err = IBID_OK;
    for (size_t i = 0; i < n; i++)
        if (ibidi_gpu_has_table(&c[i])) used = place(g, &c[i], NULL, used);
    if (used == 0) return IBID_OK;
    if ((err = ibidi_gpu_reserve(g, &g->chosen, used)) || (err = place_fetched(g, c, n)))
        return err;
    memset(t->seqs, 0, n * kv * sizeof *t->seqs);
    used = 0;
    for (size_t i = 0; i < n; i++) {
        if (!ibidi_gpu_has_table(&c[i])) continue;
        used = place(g, &c[i], g->chosen.p, used);
        c[i].there = t->d_c + i;
        c[i].c.from = t->d_from + i * n_layers;
        fill_choosing(g, &c[i], t->seqs + i * kv, t->from + i * n_layers);
        t->c[i] = c[i].c;
    }
    return IBID_OK;
}

ibid_err ibidi_gpu_choices_start(struct ibidi_gpu *g, const ibidi_gpu_choice *c, size_t n) {
    ibid_err err = IBID_OK;
    for (size_t i = 0; !err && i < n; i++) {
        if (!c[i].select) continue;
        err =
            ibid_device_fill(g->d, g->work, c[i].c.read, 0, g->m->n_kv_heads * sizeof *c[i].c.read);
        if (!err) err = ibid_device_fill(g->d, g->work, c[i].recall, 0, sizeof *c[i].recall);
    }
    return err;
}

/* In steady decoding every 64th token makes a page that wants a summary: a launch for one is always
 * there then, and mostly finds none. */
bool ibidi_gpu_choice_steady(const ibidi_gpu_choice *c) {
    return !c->select || (!c->fetches && c->fresh <= 1);
}

ibid_err ibidi_gpu_choose(struct ibidi_gpu *g, const ibidi_gpu_choice *c, size_t layer,
                          const float *q) {
    ibid_err err = ibidi_cu_summarise(g->work, &g->shape, c->there, layer, c->fresh ? c->fresh : 1);
    if (!c->select) return err;
    if (!err) err = ibidi_cu_choose(g->work, &g->shape, c->there, layer, c->grid, q);
    if (err || !c->fetches) return err;
    return ibid_device_download(g->d, g->work, c->which, c->c.which,
                                g->m->n_kv_heads * c->c.n_chosen * sizeof *c->which);
}

ibid_err ibidi_gpu_choice_mass(struct ibidi_gpu *g, const ibidi_gpu_choice *c,
                               const ibidi_cu_attend *a, const ibidi_cu_row *row,
                               const uint64_t *d_heads, uint32_t row_lo, uint32_t row_hi,
                               float *mass) {
    ibid_err err = IBID_OK;
    size_t n = c->c.n_chosen;
    for (size_t h = 0; !err && h < g->m->n_kv_heads; h++) {
        if ((err = ibid_device_fill(g->d, g->work, c->mass, 0,
                                    n * IBIDI_CU_PAGE * sizeof *c->mass)) ||
            (err = ibidi_cu_mass(g->work, &g->shape, a, row->tile0 + h * row->tiles, row->tiles,
                                 row->tile_rows == IBIDI_CU_TILE_FINE, n, d_heads, row_lo, row_hi,
                                 g->lse.p, c->mass)))
            break;
        err = ibidi_cu_spread_mass(g->work, c->c.which + h * n, n, c->seq->gpu->n_stored_pages,
                                   c->mass, mass);
    }
    return err;
}

ibid_err ibidi_gpu_choices_done(struct ibidi_gpu *g, const ibidi_gpu_choice *c, size_t n,
                                size_t n_layers) {
    size_t kv = g->m->n_kv_heads;
    ibid_err err = IBID_OK;
    for (size_t i = 0; !err && i < n; i++) {
        size_t *summed = ibidi_gpu_has_table(&c[i]) ? c[i].seq->gpu->summed : NULL;
        for (size_t l = 0; summed && l < n_layers; l++)
            if (summed[l] < c[i].c.last) summed[l] = c[i].c.last;
        if (!c[i].select) continue;
        uint32_t *read = ibid_calloc(kv, sizeof *read);
        if (!read) return ibid_fail(IBID_NOMEM, "no memory for what was read");
        float recall = 0;
        err = ibid_device_download(g->d, g->work, read, c[i].c.read, kv * sizeof *read);
        if (!err && c[i].select->measure)
            err = ibid_device_download(g->d, g->work, &recall, c[i].recall, sizeof recall);
        ibid_err e = ibid_device_sync(g->d, g->work);
        if (!err) err = e;
        if (!err && c[i].select->measure) {
            c[i].select->recall += (double)recall;
            c[i].select->n_recall += n_layers * g->m->n_heads;
        }
        for (size_t h = 0; !err && h < kv; h++) c[i].select->read += read[h];
        if (!err) {
            c[i].select->read += n_layers * kv * c[i].last_tokens;
            c[i].select->seen += n_layers * kv * c[i].seen;
        }
        ibid_free(read);
    }
    return err;
}
