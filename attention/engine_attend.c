/* Attention of a chunk. A task is one kv head of a tile of rows of one step, over the whole context
 * or, when a step has few rows, over one split of it; the pool takes tasks in any order. Splits are
 * merged in ascending order by log-sum-exp, so results do not depend on the number of threads.
 *
 * A step's context is its segments' tokens, then its live rows, in one index space. A query at
 * position p, rotated for p, is turned back by a segment's offset d, once per (segment, head):
 * R(-d) R(p) q = R(p - d) q. */
#include "attention/engine_internal.h"

#include <math.h>
#include <string.h>

typedef struct task {
    const ibidi_piece *p;
    size_t head, row0, n; /* kv head; rows of the chunk */
    size_t split;
    size_t first; /* number of its first row state, if partial */
} task;

typedef struct attend_job {
    ibid_engine *e;
    size_t layer, n_tasks;
} attend_job;

static size_t n_tiles(const ibid_engine *e, size_t rows) {
    return (rows + e->tile_rows - 1) / e->tile_rows;
}

void ibidi_plan_splits(const ibid_engine *e, ibidi_piece *p) {
    size_t context = p->seq->n_stored + p->seq->base + p->step->n;
    p->n_splits = 1;
    p->split = context;
    if (p->pick) return; /* little is left to split */
    if (n_tiles(e, p->step->n) * e->m->n_kv_heads >= IBIDI_FEW_TASKS) return;
    if (context < 2 * IBIDI_SPLIT) return;
    size_t split = (context + IBIDI_SPLITS_MAX - 1) / IBIDI_SPLITS_MAX;
    p->split = split > IBIDI_SPLIT ? ibid_align_up(split, IBIDI_WORD) : IBIDI_SPLIT;
    p->n_splits = (context + p->split - 1) / p->split;
}

static size_t n_states(const ibid_engine *e, const ibidi_piece *p) {
    return p->n_splits > 1 ? p->n_splits * p->n * e->m->n_heads : 0;
}

size_t ibidi_partials(ibid_engine *e) {
    size_t n = 0;
    for (size_t i = 0; i < e->n_pieces; i++) {
        e->pieces[i].partial0 = n;
        n += n_states(e, &e->pieces[i]);
    }
    return n;
}

/* Number of the row state (split, kv head, row of the piece, 0). */
static size_t state_at(const ibid_engine *e, const ibidi_piece *p, size_t split, size_t head,
                       size_t row) {
    return p->partial0 + ((split * e->m->n_kv_heads + head) * p->n + row) * e->group;
}

static size_t plan_tasks(ibid_engine *e) {
    size_t n = 0;
    for (size_t i = 0; i < e->n_pieces; i++) {
        ibidi_piece *p = &e->pieces[i];
        p->task0 = n;
        n += n_tiles(e, p->n) * e->m->n_kv_heads * p->n_splits;
    }
    return n;
}

static task task_at(const ibid_engine *e, size_t i) {
    size_t lo = 0, hi = e->n_pieces; /* the last piece that begins at or before i */
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        if (e->pieces[mid].task0 <= i)
            lo = mid;
        else
            hi = mid;
    }
    const ibidi_piece *p = &e->pieces[lo];
    i -= p->task0;
    size_t head = i % e->m->n_kv_heads, rest = i / e->m->n_kv_heads;
    size_t row = rest / p->n_splits * e->tile_rows;
    task t = {.p = p, .head = head, .row0 = p->at + row, .split = rest % p->n_splits};
    t.n = p->n - row < e->tile_rows ? p->n - row : e->tile_rows;
    t.first = state_at(e, p, t.split, head, row);
    return t;
}

static uint32_t row_position(const ibidi_piece *p, size_t row) {
    return p->step->positions[p->row0 + row - p->at];
}

/* Queries of n rows at one kv head side by side: [n, group, head_dim]. */
static void gather(const ibid_engine *e, size_t head, size_t row0, size_t n, float *q) {
    size_t width = e->group * e->m->head_dim;
    for (size_t r = 0; r < n; r++) {
        memcpy(q + r * width, e->rows.q + (row0 + r) * e->wide + head * width, width * sizeof *q);
    }
}

/* The task of a piece whose context is laid. */
static void attend_tiles(ibid_engine *e, const task *t, ibidi_thread *th, ibid_attn_state *state,
                         float *acc) {
    size_t n = t->n * e->group, live = t->p->seq->base + t->p->row0 + t->row0 - t->p->at;
    for (size_t r = 0; r < n; r++) {
        th->visible[r] = ibidi_row_sees(e, t->p->context, live + r / e->group);
    }
    e->k->hadamard(th->q, n * e->m->head_dim);
    ibid_tiles_args a = {.tiles = ibidi_tiles_of(e, t->p->context, t->head),
                         .head_dim = e->m->head_dim,
                         .n_rows = n,
                         .q = th->q,
                         .visible = th->visible,
                         .state = state,
                         .acc = acc};
    e->k->attn_tiles(&a);
}

/* How many of a segment's tokens from t0 on each query row sees (those at lower positions); false
 * if none sees any. */
static bool see_segment(const ibidi_seg *g, size_t t0, size_t t1, const ibidi_piece *p, size_t row0,
                        size_t n, size_t group, uint32_t *visible) {
    uint64_t first = g->start + t0;
    if (row_position(p, row0 + n - 1) <= first) return false;
    for (size_t r = 0; r < n; r++) {
        uint64_t at = row_position(p, row0 + r), see = at > first ? at - first : 0;
        if (see > t1 - t0) see = t1 - t0;
        for (size_t g0 = 0; g0 < group; g0++) visible[r * group + g0] = (uint32_t)see;
    }
    return true;
}

/* Queries as keys want them: turned back by their segment's offset (NULL: live keys), and spread
 * where the keys are (ibid_kv_view). */
static const float *turned(const ibid_engine *e, const ibidi_seg *g, ibid_kv_type type,
                           const float *q, size_t n, float *space) {
    const ibid_model *m = e->m;
    bool turn = g && g->cos, spread = type == IBID_KV_Q8_0;
    if (!turn && !spread) return q;
    memcpy(space, q, n * m->head_dim * sizeof *q);
    if (turn) e->k->rope(m->rope.pairing, space, n, m->head_dim, m->rope.n_rot, g->cos, g->sin);
    if (spread) e->k->hadamard(space, n * m->head_dim);
    return space;
}

/* The part of the context's tokens [lo, hi) that lies in a stretch of n tokens beginning at `from`,
 * its ends rounded down to whole words of a mask. */
static bool overlap(size_t lo, size_t hi, size_t from, size_t n, size_t *t0, size_t *t1) {
    *t0 = lo > from ? (lo - from) / IBIDI_WORD * IBIDI_WORD : 0;
    *t1 = hi - from >= n ? n : (hi - from) / IBIDI_WORD * IBIDI_WORD;
    return *t0 < *t1;
}

static void attend_segments(ibid_engine *e, const task *t, ibidi_thread *th, size_t layer,
                            size_t lo, size_t hi, ibid_attn_args *a) {
    const ibid_seq *s = t->p->seq;
    size_t from = 0, t0, t1;
    for (size_t i = 0; i < s->n_segs && from < hi; from += s->segs[i++].n_tokens) {
        const ibidi_seg *g = &s->segs[i];
        if (from + g->n_tokens <= lo || !overlap(lo, hi, from, g->n_tokens, &t0, &t1)) continue;
        if (!see_segment(g, t0, t1, t->p, t->row0, t->n, e->group, th->visible)) continue;
        ibid_kv_view view = ibidi_slice(&g->s.layers[layer], t->head, t0, t1);
        a->kv = &view;
        a->q = turned(e, g, view.type, th->q, a->n_rows, th->q_turned);
        a->masked = g->s.masked ? g->s.masked + t0 / 64 : NULL;
        e->attn(a);
    }
}

static void attend_live(ibid_engine *e, const task *t, ibidi_thread *th, size_t layer, size_t lo,
                        size_t hi, ibid_attn_args *a) {
    const ibid_seq *s = t->p->seq;
    size_t end = t->p->end, t0, t1;
    if (hi <= s->n_stored || !overlap(lo, hi, s->n_stored, end, &t0, &t1)) return;
    size_t first = s->base + t->p->row0 + t->row0 - t->p->at; /* live number of the task's row 0 */
    if (t1 > first + t->n) t1 = first + t->n; /* what comes after the last row is unseen */
    a->q = turned(e, NULL, e->live_type, th->q, a->n_rows, th->q_turned);
    a->masked = NULL;
    for (size_t n; t0 < t1; t0 += n) {
        size_t from = t0 % e->page_tokens, left = e->page_tokens - from;
        n = t1 - t0 < left ? t1 - t0 : left;
        ibid_kv_view page = ibidi_page_view(s, t0 / e->page_tokens, layer, t->head);
        ibid_kv_view view = ibidi_slice(&page, 0, from, from + n);
        for (size_t r = 0; r < t->n; r++) {
            size_t see = first + r + 1 > t0 ? first + r + 1 - t0 : 0;
            if (see > n) see = n;
            for (size_t g = 0; g < e->group; g++) th->visible[r * e->group + g] = (uint32_t)see;
        }
        a->kv = &view;
        e->attn(a);
    }
}

/* The pages a row has chosen, run by run, and the live tokens behind them. */
static void attend_chosen(ibid_engine *e, const task *t, ibidi_thread *th, size_t layer,
                          ibid_attn_args *a) {
    const ibidi_pick *p = t->p->pick;
    const uint64_t *chosen = ibidi_pick_choose(e, t->p, layer, t->head, th->q, th);
    size_t lo, hi, live = t->p->seq->n_stored;
    for (size_t i = 0; i < p->n; i++) {
        if (!(chosen[i / 64] >> i % 64 & 1)) continue;
        lo = p->units[i].start;
        while (i + 1 < p->n && (chosen[(i + 1) / 64] >> (i + 1) % 64 & 1)) i++;
        hi = p->units[i].start + p->units[i].n;
        attend_segments(e, t, th, layer, lo, hi, a);
        attend_live(e, t, th, layer, lo, hi, a);
    }
    live += (p->n - p->n_stored) * IBIDI_WORD;
    attend_live(e, t, th, layer, live, SIZE_MAX, a);
}

/* A finished row of one head: its output to rows.h, its log-sum-exp for probes. */
static void finish_row(ibid_engine *e, size_t row, size_t head, const ibid_attn_state *st,
                       const float *acc) {
    size_t dim = e->m->head_dim;
    float *out = e->rows.h + row * e->wide + head * dim, inverse = 1 / st->sum;
    for (size_t d = 0; d < dim; d++) out[d] = acc[d] * inverse;
    e->rows.lse[row * e->m->n_heads + head] = logf(st->sum) + st->max;
}

/* The task of a row that selects; measured, what full attention's log-sum-exp would be too. */
static void attend_selected(ibid_engine *e, const task *t, ibidi_thread *th, size_t layer) {
    size_t dim = e->m->head_dim;
    ibid_attn_args a = {
        .n_rows = e->group, .visible = th->visible, .state = th->state, .acc = th->acc};
    const float *lse = e->rows.lse + t->row0 * e->m->n_heads + t->head * e->group;
    for (int full = 0; full <= t->p->step->select->measure; full++) {
        for (size_t g = 0; g < e->group; g++) th->state[g] = (ibid_attn_state){.max = -INFINITY};
        memset(th->acc, 0, e->group * dim * sizeof *th->acc);
        if (!full) {
            attend_chosen(e, t, th, layer, &a);
            for (size_t g = 0; g < e->group; g++)
                finish_row(e, t->row0, t->head * e->group + g, &th->state[g], th->acc + g * dim);
            continue;
        }
        attend_segments(e, t, th, layer, 0, SIZE_MAX, &a);
        attend_live(e, t, th, layer, 0, SIZE_MAX, &a);
        for (size_t g = 0; g < e->group; g++) {
            double all = log((double)th->state[g].sum) + (double)th->state[g].max;
            t->p->pick->picked[t->head].recall += fmin(exp((double)lse[g] - all), 1);
        }
    }
}

static void attend_part(void *arg, size_t part, size_t thread) {
    const attend_job *j = arg;
    ibid_engine *e = j->e;
    /* Later rows see more: begin with them, so that the threads end together. */
    task t = task_at(e, j->n_tasks - 1 - part);
    ibidi_thread *th = &e->threads[thread];
    bool split = t.p->n_splits > 1;
    size_t dim = e->m->head_dim, n = t.n * e->group;
    ibid_attn_state *state = split ? e->partial_state + t.first : th->state;
    float *acc = split ? e->partial_acc + t.first * dim : th->acc;
    for (size_t i = 0; i < n; i++) state[i] = (ibid_attn_state){.max = -INFINITY};
    memset(acc, 0, n * dim * sizeof *acc);
    gather(e, t.head, t.row0, t.n, th->q);
    if (t.p->pick) {
        attend_selected(e, &t, th, j->layer);
        return;
    }
    ibid_attn_args a = {.n_rows = n, .visible = th->visible, .state = state, .acc = acc};
    size_t lo = t.split * t.p->split, hi = lo + t.p->split;
    if (t.split + 1 == t.p->n_splits) hi = SIZE_MAX;
    if (t.p->context) {
        attend_tiles(e, &t, th, state, acc);
    } else {
        attend_segments(e, &t, th, j->layer, lo, hi, &a);
        attend_live(e, &t, th, j->layer, lo, hi, &a);
    }
    if (split) return;
    for (size_t i = 0; i < n; i++) {
        finish_row(e, t.row0 + i / e->group, t.head * e->group + i % e->group, &state[i],
                   acc + i * dim);
    }
}

/* Merges the splits of one row, all heads, into the first. */
static void merge_row(ibid_engine *e, size_t row, size_t layer) {
    (void)layer;
    size_t dim = e->m->head_dim;
    const ibidi_piece *p = ibidi_piece_of(e, row);
    if (p->n_splits == 1) return;
    for (size_t h = 0; h < e->m->n_heads; h++) {
        size_t first = state_at(e, p, 0, h / e->group, row - p->at) + h % e->group;
        for (size_t s = 1; s < p->n_splits; s++) {
            size_t other = state_at(e, p, s, h / e->group, row - p->at) + h % e->group;
            ibid_attn_merge(&e->partial_state[first], e->partial_acc + first * dim,
                            &e->partial_state[other], e->partial_acc + other * dim, dim);
        }
        finish_row(e, row, h, &e->partial_state[first], e->partial_acc + first * dim);
    }
}

/* ---- Attention mass ---- */

enum { PROBE_TOKENS = 256 };

typedef struct probe_job {
    ibid_engine *e;
    const ibidi_piece *p;
    size_t layer, row0, n; /* rows of the chunk that count */
} probe_job;

static bool head_counts(const ibid_engine *e, const ibid_probe *probe, size_t layer, size_t head) {
    size_t bit = layer * e->m->n_heads + head;
    return !probe->heads || (probe->heads[bit / 64] >> bit % 64 & 1);
}

/* The chosen heads of a kv head, n rows: q and lse of [n, chosen]. Returns how many are chosen. */
static size_t gather_chosen(const probe_job *j, size_t kv_head, size_t row0, size_t n,
                            ibidi_thread *th) {
    const ibid_engine *e = j->e;
    size_t dim = e->m->head_dim, at = 0, first = kv_head * e->group;
    for (size_t r = row0; r < row0 + n; r++) {
        for (size_t h = first; h < first + e->group; h++) {
            if (!head_counts(e, j->p->step->probe, j->layer, h)) continue;
            memcpy(th->q + at * dim, e->rows.q + r * e->wide + h * dim, dim * sizeof *th->q);
            th->lse[at++] = e->rows.lse[r * e->m->n_heads + h];
        }
    }
    return at / n;
}

/* Tokens [t0, t1) of a segment: rows and heads in ascending order, whoever runs it. Of a row that
 * selects, tokens of one page: what a kv head did not read, it gave nothing. */
static void probe_range(const probe_job *j, size_t segment, size_t t0, size_t t1,
                        ibidi_thread *th) {
    const ibid_engine *e = j->e;
    const ibidi_seg *g = &j->p->seq->segs[segment];
    float *mass = j->p->step->probe->mass[segment] + t0;
    for (size_t h = 0; h < e->m->n_kv_heads; h++) {
        if (j->p->pick && !ibidi_pick_has(j->p->pick, h, segment, t0)) continue;
        ibid_kv_view view = ibidi_slice(&g->s.layers[j->layer], h, t0, t1);
        for (size_t r = 0; r < j->n; r += e->tile_rows) {
            size_t row0 = j->row0 + r, n = j->n - r < e->tile_rows ? j->n - r : e->tile_rows;
            size_t n_chosen = gather_chosen(j, h, row0, n, th);
            if (!n_chosen || !see_segment(g, t0, t1, j->p, row0, n, n_chosen, th->visible))
                continue;
            ibid_attn_args a = {.kv = &view, .n_rows = n * n_chosen, .visible = th->visible};
            a.q = turned(e, g, view.type, th->q, a.n_rows, th->q_turned);
            a.masked = g->s.masked ? g->s.masked + t0 / 64 : NULL;
            e->attn_mass(&a, th->lse, mass);
        }
    }
}

static size_t range_tokens(const ibidi_piece *p) {
    return p->pick ? IBIDI_WORD : PROBE_TOKENS;
}

static size_t n_ranges(const ibidi_piece *p, size_t segment) {
    if (!p->step->probe->mass[segment]) return 0;
    return (p->seq->segs[segment].n_tokens + range_tokens(p) - 1) / range_tokens(p);
}

static void probe_part(void *arg, size_t part, size_t thread) {
    const probe_job *j = arg;
    size_t i = 0;
    for (; part >= n_ranges(j->p, i); i++) part -= n_ranges(j->p, i);
    size_t each = range_tokens(j->p), t0 = part * each, n = j->p->seq->segs[i].n_tokens;
    probe_range(j, i, t0, n - t0 < each ? n : t0 + each, &j->e->threads[thread]);
}

static void probe_piece(ibid_engine *e, const ibidi_piece *p, size_t layer) {
    const ibid_probe *probe = p->step->probe;
    size_t lo = probe->row0 > p->row0 ? probe->row0 : p->row0, hi = probe->row0 + probe->n_rows;
    size_t n = 0;
    if (hi > p->row0 + p->n) hi = p->row0 + p->n;
    if (lo >= hi) return;
    probe_job j = {.e = e, .p = p, .layer = layer, .row0 = p->at + lo - p->row0, .n = hi - lo};
    for (size_t i = 0; i < p->seq->n_segs; i++) n += n_ranges(p, i);
    ibid_pool_run(e->pool, n, probe_part, &j);
}

void ibidi_attend(ibid_engine *e, size_t layer) {
    attend_job j = {.e = e, .layer = layer};
    bool split = false;
    (void)ibidi_partials(e);
    j.n_tasks = plan_tasks(e);
    for (size_t i = 0; i < e->n_pieces; i++)
        if (e->pieces[i].pick) ibidi_pick_summarise(e, &e->pieces[i], layer);
    ibidi_tiles_lay(e, layer);
    ibid_pool_run(e->pool, j.n_tasks, attend_part, &j);
    for (size_t i = 0; i < e->n_pieces; i++) split |= e->pieces[i].n_splits > 1;
    if (split) ibidi_each_row(e, e->n_rows, merge_row, layer);
    for (size_t i = 0; i < e->n_pieces; i++) {
        if (e->pieces[i].pick) ibidi_pick_count(e, &e->pieces[i]);
        if (e->pieces[i].step->probe) probe_piece(e, &e->pieces[i], layer);
    }
}
