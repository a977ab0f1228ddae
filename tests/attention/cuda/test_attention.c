/* Queries, keys and values finished, turned, attended to and merged, and attention mass, on random
 * shapes: against the CPU's reference kernels, which see the same stored bytes. Odd lengths, one
 * token to 256 in a block, 1 to 64 blocks, groups of 1 to 8 heads, head sizes 64, 96, 128 and 256,
 * q8_0 and f16 pages, masks, offsets, several sequences in a pass. */
#include "attention/cuda/plan.h"
#include "tests/attention/cuda/kernel_fixture.h"

#include <math.h>
#include <string.h>

enum { MAX_SEQS = 3, MAX_BLOCKS = 64, MAX_PAGES = 512, MAX_ROWS = 48 };

typedef struct seq {
    ibidi_cu_page pages[MAX_PAGES];
    uint32_t cells[MAX_PAGES];
    size_t n_pages, first_live, n_blocks, n_live; /* live: with the pass's rows */
    uint64_t offset[MAX_BLOCKS];
    size_t first_page[MAX_BLOCKS + 1];
    uint32_t end;
} seq;

typedef struct world {
    ibidi_cu_shape m;
    size_t n_seqs, n_rows, n_cells;
    seq seqs[MAX_SEQS];
    ibidi_cu_row rows[MAX_ROWS];
    ibidi_cu_piece pieces[MAX_SEQS];
    uint8_t *pool; /* on the host */
    size_t head_bytes;
    float freq[128];
} world;

static uint8_t *head_at(const world *w, uint32_t cell, size_t head) {
    return w->pool + (cell * w->m.n_kv_heads + head) * w->head_bytes;
}

static ibid_kv_view view_of(const world *w, uint32_t cell, size_t head, size_t n) {
    size_t plane = ibidi_cu_plane_bytes(w->m.head_dim, w->m.q8);
    ibid_kv_view v = {.type = w->m.q8 ? IBID_KV_Q8_0 : IBID_KV_F16,
                      .n_tokens = n,
                      .n_kv_heads = 1,
                      .head_dim = w->m.head_dim};
    v.k = head_at(w, cell, head);
    v.v = (const uint8_t *)v.k + plane;
    if (w->m.q8) {
        v.k_scale = (const uint16_t *)(const void *)((const uint8_t *)v.k + 2 * plane);
        v.v_scale = v.k_scale + IBIDI_CU_PAGE * w->m.head_dim / 32;
    }
    return v;
}

static void angles(const world *w, uint64_t position, float sign, float *c, float *s) {
    for (size_t i = 0; i < w->m.n_rot / 2; i++) {
        c[i] = (float)cos((double)position * (double)w->freq[i]);
        s[i] = sign * (float)sin((double)position * (double)w->freq[i]);
    }
}

/* Random KV in a token of a page; outlying keys make some tokens weigh much. */
static void fill_token(world *w, uint32_t cell, size_t token) {
    size_t dim = w->m.head_dim;
    float *v = malloc(dim * sizeof *v);
    for (size_t h = 0; h < w->m.n_kv_heads; h++) {
        ibid_kv_view p = view_of(w, cell, h, IBIDI_CU_PAGE);
        for (int plane = 0; plane < 2; plane++) {
            float size = fx_below(8) ? 1 : 3;
            for (size_t d = 0; d < dim; d++) v[d] = size * fx_normal();
            uint8_t *at =
                (uint8_t *)(uintptr_t)(plane ? p.v : p.k) + token * dim * (w->m.q8 ? 1 : 2);
            uint16_t *scale = (uint16_t *)(uintptr_t)(plane ? p.v_scale : p.k_scale);
            fx.k->kv_pack(p.type, v, dim, at, scale ? scale + token * dim / 32 : NULL);
        }
    }
    free(v);
}

static uint32_t add_page(world *w, seq *s, ibidi_cu_page p, uint32_t *order) {
    CHECK(s->n_pages < MAX_PAGES && w->n_cells < MAX_SEQS * MAX_PAGES, "too many pages");
    uint32_t cell = order[w->n_cells++];
    s->pages[s->n_pages] = p;
    s->cells[s->n_pages++] = cell;
    return cell;
}

static void make_seq(world *w, seq *s, size_t n_blocks, size_t most, size_t n_live, bool masks,
                     uint32_t *order) {
    uint32_t at = (uint32_t)fx_below(4);
    for (size_t b = 0; b < n_blocks; b++) {
        size_t n = most == 1 ? 1 : 1 + fx_below(most);
        bool turned = fx_below(4) != 0;
        s->offset[b] = turned ? at + 1 : 0; /* never more than the position */
        at += 1 + (uint32_t)fx_below(2);
        s->first_page[b] = s->n_pages;
        for (size_t t = 0; t < n; t += IBIDI_CU_PAGE) {
            size_t here = n - t < IBIDI_CU_PAGE ? n - t : IBIDI_CU_PAGE;
            ibidi_cu_page p = {.start = at + (uint32_t)t, .n = (uint32_t)here, .keep = UINT64_MAX};
            if (masks) p.keep = fx_below(9) ? fx_below(UINT64_MAX) | 1 : 0;
            p.turn = turned ? (uint32_t)b + 1 : 0;
            uint32_t cell = add_page(w, s, p, order);
            for (size_t j = 0; j < here; j++) fill_token(w, cell, j);
        }
        at += (uint32_t)n;
    }
    s->n_blocks = n_blocks;
    s->first_page[n_blocks] = s->first_live = s->n_pages;
    s->end = at;
    for (size_t t = 0; t < n_live; t += IBIDI_CU_PAGE) {
        ibidi_cu_page p = {.start = (uint32_t)t, .n = IBIDI_CU_PAGE, .keep = UINT64_MAX, .live = 1};
        uint32_t cell = add_page(w, s, p, order);
        for (size_t j = 0; j < IBIDI_CU_PAGE && t + j < n_live; j++) fill_token(w, cell, j);
    }
    s->n_live = n_live;
}

typedef struct device_side {
    uint8_t *pool;
    ibidi_cu_row *rows;
    ibidi_cu_seq *seqs, host[MAX_SEQS];
    ibidi_cu_tile *tiles;
    ibidi_cu_item *items;
    ibidi_cu_plan plan;
    uint16_t *turned, *h;
    float *q, *acc, *state, *lse;
    size_t ldh;
} device_side;

static void upload(world *w, device_side *d, const float *q) {
    ibidi_cu_shape *m = &w->m;
    size_t q_dim = (size_t)m->n_heads * m->head_dim;
    memset(d, 0, sizeof *d);
    MUST(ibidi_cu_plan_make(m, w->pieces, w->n_seqs, w->rows, &d->plan));
    size_t n_tiles = d->plan.n_tiles[0] + d->plan.n_tiles[1];
    size_t n_items = d->plan.n_items[0] + d->plan.n_items[1];
    d->pool = fx_up(w->pool, w->n_cells * m->n_kv_heads * w->head_bytes);
    for (size_t i = 0; i < w->n_seqs; i++) {
        seq *s = &w->seqs[i];
        float *turns = calloc((s->n_blocks + 1) * m->n_rot, sizeof *turns);
        for (size_t b = 0; b < s->n_blocks; b++)
            angles(w, s->offset[b], -1, turns + b * m->n_rot, turns + b * m->n_rot + m->n_rot / 2);
        uint32_t cells[2 * MAX_PAGES]; /* layer 1 of 2 */
        memset(cells, 0xff, sizeof cells);
        memcpy(cells + MAX_PAGES, s->cells, sizeof s->cells);
        d->host[i] = (ibidi_cu_seq){.pages = fx_up(s->pages, sizeof s->pages),
                                    .cells = fx_up(cells, sizeof cells),
                                    .turns = fx_up(turns, (s->n_blocks + 1) * m->n_rot * 4),
                                    .room = MAX_PAGES,
                                    .first_live = (uint32_t)s->first_live};
        free(turns);
    }
    d->seqs = fx_up(d->host, sizeof d->host);
    d->rows = fx_up(w->rows, w->n_rows * sizeof *w->rows);
    d->tiles = fx_up(d->plan.tiles, n_tiles * sizeof *d->tiles);
    d->items = fx_up(d->plan.items, n_items * sizeof *d->items);
    d->turned = fx_up(NULL, d->plan.n_turned * m->head_dim * IBIDI_CU_TURNED);
    d->acc = fx_up(NULL, d->plan.n_states * m->head_dim * 4);
    d->state = fx_up(NULL, d->plan.n_states * 8);
    d->lse = fx_up(NULL, w->n_rows * m->n_heads * 4);
    d->ldh = (q_dim + 63) / 64 * 64;
    d->h = fx_up(NULL, w->n_rows * d->ldh * 2);
    d->q = fx_up(q, w->n_rows * q_dim * 4);
}

static void drop(world *w, device_side *d) {
    void *all[] = {d->pool, d->rows,  d->seqs, d->tiles, d->items, d->turned,
                   d->acc,  d->state, d->lse,  d->h,     d->q};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) fx_free(all[i]);
    for (size_t i = 0; i < w->n_seqs; i++) {
        fx_free((void *)(uintptr_t)d->host[i].pages);
        fx_free((void *)(uintptr_t)d->host[i].cells);
        fx_free((void *)(uintptr_t)d->host[i].turns);
    }
    ibidi_cu_plan_fini(&d->plan);
}

static ibidi_cu_attend args_of(const device_side *d) {
    return (ibidi_cu_attend){.tiles = d->tiles,
                             .items = d->items,
                             .rows = d->rows,
                             .seqs = d->seqs,
                             .pool = d->pool,
                             .turned = d->turned,
                             .layer = 1,
                             .acc = d->acc,
                             .state = d->state};
}

static void attend(const world *w, device_side *d) {
    ibidi_cu_attend a = args_of(d);
    ibidi_cu_plan *p = &d->plan;
    for (int fine = 1; fine >= 0; fine--) {
        size_t tile = fine ? 0 : p->n_tiles[1], item = fine ? 0 : p->n_items[1];
        MUST(ibidi_cu_turn(fx.s, &w->m, d->tiles + tile, p->n_tiles[fine], p->max_turned, fine,
                           d->seqs, d->q, d->turned));
        a.items = d->items + item;
        MUST(ibidi_cu_attention(fx.s, &w->m, &a, p->n_items[fine], fine));
    }
    MUST(ibidi_cu_merge(fx.s, &w->m, &a, w->n_rows, d->h, d->ldh, d->lse));
}

/* ---- The reference ---- */

typedef struct visit {
    const ibid_kv_view *kv;
    uint64_t masked;
    uint32_t visible;
    const float *q; /* turned and spread */
    const ibidi_cu_page *page;
    size_t n_page;
} visit;

/* Calls fn for every page of a row's sequence with its query at a head as the page wants it. */
static void each_page(const world *w, size_t row, size_t head, const float *q,
                      void (*fn)(const visit *v, void *arg), void *arg) {
    const ibidi_cu_row *r = &w->rows[row];
    const seq *s = &w->seqs[r->seq];
    size_t dim = w->m.head_dim, half = w->m.n_rot / 2;
    for (size_t i = 0; i < s->n_pages; i++) {
        const ibidi_cu_page *p = &s->pages[i];
        float turned[IBIDI_CU_DIM_MAX], c[128], sn[128];
        uint32_t see = p->live ? r->live + 1 : r->position;
        ibid_kv_view kv = view_of(w, s->cells[i], head / w->m.group, p->n);
        visit v = {.kv = &kv, .masked = ~p->keep, .q = turned, .page = p, .n_page = i};
        v.visible = see <= p->start ? 0 : see - p->start < p->n ? see - p->start : p->n;
        memcpy(turned, q, dim * sizeof *q);
        if (p->turn) {
            angles(w, s->offset[p->turn - 1], -1, c, sn);
            fx.k->rope(w->m.pair_next ? IBID_PAIR_NEXT : IBID_PAIR_HALF, turned, 1, dim, 2 * half,
                       c, sn);
        }
        if (w->m.q8) fx.k->hadamard(turned, dim);
        /* In base e, as the CPU's kernels want them. */
        for (size_t d = 0; d < dim; d++) turned[d] *= 0.69314718056f;
        fn(&v, arg);
    }
}

typedef struct sums {
    ibid_attn_state state;
    float acc[IBIDI_CU_DIM_MAX];
    float lse;
    double *mass; /* [pages, 64] */
} sums;

static void add_page_attention(const visit *v, void *arg) {
    sums *s = arg;
    ibid_attn_args a = {.kv = v->kv,
                        .q = v->q,
                        .n_rows = 1,
                        .visible = &v->visible,
                        .masked = &v->masked,
                        .state = &s->state,
                        .acc = s->acc};
    fx.k->attn(&a);
}

static void add_page_mass(const visit *v, void *arg) {
    sums *s = arg;
    float mass[IBIDI_CU_PAGE] = {0};
    ibid_attn_args a = {
        .kv = v->kv, .q = v->q, .n_rows = 1, .visible = &v->visible, .masked = &v->masked};
    if (v->page->live) return;
    fx.k->attn_mass(&a, &s->lse, mass);
    for (size_t j = 0; j < v->page->n; j++)
        s->mass[v->n_page * IBIDI_CU_PAGE + j] += (double)mass[j];
}

static void check_attention(world *w, double *worst) {
    size_t dim = w->m.head_dim, q_dim = w->m.n_heads * dim, first = 0;
    float sharp = 3; /* shows what rounding does to scores */
    float *q = fx_normals(w->n_rows * q_dim, sharp * w->m.score_scale);
    double *want = calloc(w->n_rows * q_dim, sizeof *want), *mass[MAX_SEQS];
    double *lse = calloc(w->n_rows * w->m.n_heads, sizeof *lse);
    uint64_t heads[4] = {0x5a5a5a5a5a5a5a5bu, 0, 0, 0}, *d_heads = fx_up(heads, sizeof heads);
    device_side d;
    for (size_t i = 0; i < MAX_SEQS; i++)
        mass[i] = calloc(MAX_PAGES * IBIDI_CU_PAGE, sizeof(double));
    for (size_t i = 0; i < w->n_rows * w->m.n_heads; i++) {
        size_t row = i / w->m.n_heads, head = i % w->m.n_heads;
        sums s = {.state = {.max = -INFINITY}, .mass = mass[w->rows[row].seq]};
        each_page(w, row, head, q + i * dim, add_page_attention, &s);
        s.lse = logf(s.state.sum) + s.state.max;
        lse[i] = (double)s.lse * 1.4426950408889634;
        for (size_t c = 0; c < dim; c++) want[i * dim + c] = (double)(s.acc[c] / s.state.sum);
        if ((row - w->pieces[w->rows[row].seq].row0) % 3 != 2 && heads[0] >> head & 1)
            each_page(w, row, head, q + i * dim, add_page_mass, &s);
    }
    upload(w, &d, q);
    attend(w, &d);
    uint16_t *h = malloc(w->n_rows * d.ldh * 2);
    float *got = malloc(w->n_rows * q_dim * 4), *got_lse = malloc(w->n_rows * w->m.n_heads * 4);
    fx_down(h, d.h, w->n_rows * d.ldh * 2);
    fx_down(got_lse, d.lse, w->n_rows * w->m.n_heads * 4);
    for (size_t i = 0; i < w->n_rows * q_dim; i++)
        got[i] = ibid_f16_to_f32(h[i / q_dim * d.ldh + i % q_dim]);
    for (size_t i = 0; i < w->n_seqs; i++) {
        const ibidi_cu_piece *p = &w->pieces[i];
        double off = fx_apart(got + p->row0 * q_dim, want + p->row0 * q_dim, p->n * q_dim);
        worst[0] = fmax(worst[0], off);
        CHECK(off < 1e-3, "attention of %u rows, %u heads of %zu, group %u, %s: %g", p->n,
              w->m.n_heads, dim, w->m.group, w->m.q8 ? "q8_0" : "f16", off);
    }
    for (size_t i = 0; i < w->n_rows * w->m.n_heads; i++)
        CHECK(fabs((double)got_lse[i] - lse[i]) < 2e-2, "lse %g, not %g", (double)got_lse[i],
              lse[i]);
    ibidi_cu_attend a = args_of(&d);
    for (size_t i = 0; i < w->n_seqs; i++) {
        const ibidi_cu_piece *p = &w->pieces[i];
        bool fine = ibidi_cu_is_fine(&w->m, p->n);
        size_t stored = w->seqs[i].first_live, n_mass = stored * IBIDI_CU_PAGE, n_tiles = 0;
        n_tiles = w->rows[p->row0].tiles * w->m.n_kv_heads;
        first = w->rows[p->row0].tile0;
        float *zero = calloc(n_mass + 1, 4), *dm = fx_up(zero, n_mass * 4 + 4);
        for (uint32_t r = 0; r < p->n; r++) /* rows that count are not one run here */
            if (r % 3 != 2)
                MUST(ibidi_cu_mass(fx.s, &w->m, &a, first, n_tiles, fine, stored, d_heads,
                                   p->row0 + r, p->row0 + r + 1, d.lse, dm));
        fx_down(zero, dm, n_mass * 4);
        double off = fx_apart(zero, mass[i], n_mass);
        worst[1] = fmax(worst[1], off);
        CHECK(off < 5e-3, "mass: %g", off);
        fx_free(dm);
        free(zero);
    }
    drop(w, &d);
    fx_free(d_heads);
    void *mine[] = {q, want, lse, h, got, got_lse, mass[0], mass[1], mass[2]};
    for (size_t i = 0; i < 9; i++) free(mine[i]);
}

/* ---- Worlds ---- */

static void set_shape(world *w, uint32_t dim, uint32_t n_kv, uint32_t group, bool q8) {
    w->m = (ibidi_cu_shape){.n_heads = n_kv * group, .n_kv_heads = n_kv, .head_dim = dim};
    w->m.group = group;
    w->m.n_rot = fx_below(3) ? dim : dim / 2;
    w->m.pair_next = (int32_t)fx_below(2);
    w->m.q8 = q8;
    w->m.eps = 1e-6f;
    w->m.score_scale = (float)(1.4426950408889634 / sqrt((double)dim));
    w->head_bytes = ibidi_cu_head_bytes(dim, q8);
    for (size_t i = 0; i < w->m.n_rot / 2; i++)
        w->freq[i] = (float)pow(10000, -2.0 * (double)i / (double)w->m.n_rot);
}

static uint32_t *cell_order(size_t n) {
    uint32_t *order = malloc(n * sizeof *order);
    for (size_t i = 0; i < n; i++) order[i] = (uint32_t)i;
    return order;
}

static void add_step(world *w, size_t i, size_t n_rows) {
    seq *s = &w->seqs[i];
    ibidi_cu_piece *p = &w->pieces[i];
    *p = (ibidi_cu_piece){.seq = (uint32_t)i, .row0 = (uint32_t)w->n_rows, .n = (uint32_t)n_rows};
    p->pages = s->pages;
    p->first_live = (uint32_t)s->first_live;
    p->n_turned = (uint32_t)s->n_blocks + 1;
    for (size_t r = 0; r < n_rows; r++) {
        ibidi_cu_row *row = &w->rows[w->n_rows++];
        *row = (ibidi_cu_row){.seq = (uint32_t)i, .live = (uint32_t)(s->n_live - n_rows + r)};
        /* Some rows stand inside the stored ones, as recomputed ones do. */
        row->position = s->end + (uint32_t)(s->n_live - n_rows + r);
        if (n_rows > 3 && s->end > 40) row->position -= s->end / 2;
        p->last_position = row->position;
        p->last_live = row->live;
    }
}

static void one_world(uint32_t dim, uint32_t n_kv, uint32_t group, bool q8, size_t n_seqs,
                      size_t n_blocks, size_t most, size_t n_rows, bool masks, double *worst) {
    static world w;
    size_t cells = MAX_SEQS * MAX_PAGES;
    memset(&w, 0, sizeof w);
    set_shape(&w, dim, n_kv, group, q8);
    w.n_seqs = n_seqs;
    w.pool = calloc(cells * n_kv, w.head_bytes);
    CHECK(w.pool, "no memory");
    uint32_t *order = cell_order(cells);
    for (size_t i = 0; i < n_seqs; i++) {
        size_t rows = i == 0 ? n_rows : 1 + fx_below(12), live = rows + fx_below(3) * fx_below(80);
        make_seq(&w, &w.seqs[i], i ? fx_below(3) : n_blocks, most, live, masks, order);
        add_step(&w, i, rows);
    }
    check_attention(&w, worst);
    free(order);
    free(w.pool);
}

static void test_attention(size_t rounds) {
    static const uint32_t dims[] = {64, 96, 128, 256}, groups[] = {1, 2, 3, 4, 5, 7, 8};
    double worst[2] = {0, 0};
    for (size_t i = 0; i < rounds; i++) {
        size_t most = i % 4 == 0 ? 1 : i % 4 == 1 ? 256 : 100, blocks = 1 + fx_below(6);
        if (i % 9 == 4) blocks = i % 18 == 4 ? 64 : 0, most = 20;
        one_world(dims[i % 4], 1 + (uint32_t)fx_below(2), groups[i % 7], i / 4 % 2,
                  1 + i % MAX_SEQS, blocks, most, i % 3 ? 1 : 1 + fx_below(24), i % 5 == 3, worst);
    }
    printf("attention: at most %.2g apart; mass %.2g\n", worst[0], worst[1]);
}

/* ---- Finishing heads ---- */

static void finish_reference(const world *w, float *v, size_t n, const float *bias,
                             const float *norm, const float *c, const float *s) {
    size_t dim = w->m.head_dim;
    if (bias) fx.k->add(v, bias, n * dim);
    for (size_t h = 0; norm && h < n; h++)
        fx.k->rmsnorm(v + h * dim, norm, w->m.eps, v + h * dim, dim);
    if (c)
        fx.k->rope(w->m.pair_next ? IBID_PAIR_NEXT : IBID_PAIR_HALF, v, n, dim, w->m.n_rot, c, s);
}

/* What lies in a page, as floats, keys spread back. */
static void read_token(const world *w, uint32_t cell, size_t head, size_t token, bool value,
                       float *out) {
    ibid_kv_view p = view_of(w, cell, head, IBIDI_CU_PAGE);
    size_t dim = w->m.head_dim, at = token * dim;
    const uint16_t *scale = value ? p.v_scale : p.k_scale;
    fx.k->kv_unpack(p.type, (const uint8_t *)(value ? p.v : p.k) + at * (w->m.q8 ? 1 : 2),
                    scale ? scale + at / 32 : NULL, dim, out);
    if (!value && w->m.q8) fx.k->hadamard(out, dim);
}

static void check_heads(uint32_t dim, uint32_t n_kv, uint32_t group, bool q8, bool with_bias,
                        bool with_norm) {
    static world w;
    enum { N = 5, CELLS = 4 };
    memset(&w, 0, sizeof w);
    set_shape(&w, dim, n_kv, group, q8);
    uint32_t cells[2 * CELLS] = {0, 0, 0, 0, 3, 1, 2, 0};
    size_t q_dim = w.m.n_heads * dim, kv = n_kv * dim, width = q_dim + 2 * kv, ldy = width + 3;
    float *y = fx_normals(N * ldy, 1), *b = fx_normals(width, 1), *norm = fx_normals(2 * dim, 1);
    float scale[N], c[N * 128], s[N * 128], *q = malloc(N * q_dim * 4);
    size_t half = w.m.n_rot / 2;
    w.n_cells = CELLS;
    w.pool = malloc(CELLS * n_kv * w.head_bytes);
    for (size_t i = 0; i < N; i++) {
        w.rows[i] =
            (ibidi_cu_row){.position = (uint32_t)(1000 + 7 * i), .live = (uint32_t)(61 + i)};
        scale[i] = 0.5f + fx_uniform();
        angles(&w, w.rows[i].position, 1, c + i * half, s + i * half);
    }
    ibidi_cu_seq seq = {.cells = fx_up(cells, sizeof cells), .room = CELLS, .first_live = 1};
    float *db = fx_up(b, width * 4), *dn = fx_up(norm, 2 * dim * 4),
          *dq = fx_up(NULL, N * q_dim * 4);
    uint8_t *pool = fx_up(NULL, CELLS * n_kv * w.head_bytes);
    ibidi_cu_heads a = {.y = fx_up(y, N * ldy * 4),
                        .y_scale = fx_up(scale, sizeof scale),
                        .ldy = ldy,
                        .bq = with_bias ? db : NULL,
                        .bk = with_bias ? db + q_dim : NULL,
                        .bv = with_bias ? db + q_dim + kv : NULL,
                        .q_norm = with_norm ? dn : NULL,
                        .k_norm = with_norm ? dn + dim : NULL,
                        .cos = fx_up(c, N * half * 4),
                        .sin = fx_up(s, N * half * 4),
                        .rows = fx_up(w.rows, N * sizeof *w.rows),
                        .seqs = fx_up(&seq, sizeof seq),
                        .layer = 1,
                        .pool = pool,
                        .q = dq};
    MUST(ibidi_cu_finish_heads(fx.s, &w.m, &a, N));
    fx_down(q, dq, N * q_dim * 4);
    fx_down(w.pool, pool, CELLS * n_kv * w.head_bytes);
    for (size_t i = 0; i < N; i++) {
        float *v = y + i * ldy, got[IBIDI_CU_DIM_MAX];
        double want[2048];
        for (size_t k = 0; k < width; k++) v[k] *= scale[i];
        finish_reference(&w, v, w.m.n_heads, with_bias ? b : NULL, with_norm ? norm : NULL,
                         c + i * half, s + i * half);
        finish_reference(&w, v + q_dim, n_kv, with_bias ? b + q_dim : NULL,
                         with_norm ? norm + dim : NULL, c + i * half, s + i * half);
        finish_reference(&w, v + q_dim + kv, n_kv, with_bias ? b + q_dim + kv : NULL, NULL, NULL,
                         NULL);
        for (size_t k = 0; k < q_dim; k++) want[k] = (double)v[k] * (double)w.m.score_scale;
        double off = fx_apart(q + i * q_dim, want, q_dim);
        CHECK(off < 1e-5, "queries of %u: %g", dim, off);
        uint32_t live = w.rows[i].live, cell = cells[CELLS + 1 + live / IBIDI_CU_PAGE];
        for (size_t h = 0; h < 2 * n_kv; h++) {
            for (size_t k = 0; k < dim; k++) want[k] = (double)v[q_dim + h * dim + k];
            read_token(&w, cell, h % n_kv, live % IBIDI_CU_PAGE, h >= n_kv, got);
            off = fx_apart(got, want, dim);
            CHECK(off < (q8 ? 8e-3 : 5e-4), "%s of %u, %s: %g", h < n_kv ? "keys" : "values", dim,
                  q8 ? "q8_0" : "f16", off);
        }
    }
    const void *all[] = {seq.cells, a.y, a.y_scale, a.cos, a.sin, a.rows, a.seqs, db, dn, dq, pool};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) fx_free((void *)(uintptr_t)all[i]);
    free(y), free(b), free(norm), free(q), free(w.pool);
}

static void test_heads(void) {
    static const uint32_t dims[] = {64, 96, 128, 256};
    for (uint32_t i = 0; i < 16; i++)
        check_heads(dims[i % 4], 1 + i % 3, 1 + i % 2, i / 4 % 2, i / 2 % 2, i % 3 == 1);
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 6002;
    fx_start(seed);
    test_heads();
    test_attention(argc > 2 ? strtoull(argv[2], NULL, 10) : 36);
    fx_stop();
    printf("all passed\n");
    return 0;
}
