/* Linear layers on the pool: a part is some weight rows times some rows of x. */
#include "attention/engine_internal.h"

enum {
    PANEL = 64, /* weight rows of a part: what the kernels unpack at once */
    FEW = 8,    /* rows of x: memory is the limit, and weights are streamed ... */
    RUNS = 2,   /* ... in as many long runs per thread: 1.6 times as fast as by 32 rows in turns */
    LEAST_ROWS = 64, /* of x, in a part: below, unpacking weights would weigh too much */
    PARTS_PER_THREAD = 8,
    ROWS_PER_PART = 8
};

typedef struct linear_job {
    ibid_engine *e;
    const float *x;
    size_t ldx, n;
    const ibidi_out *out;
    bool swiglu;
    bool packed;          /* x as integers, in rows.packed */
    size_t packed_bytes;  /* of a tile */
    size_t panel, n_cuts; /* of x's rows */
} linear_job;

/* Where a cut of x's rows begins: at a tile. */
static size_t cut_at(const linear_job *j, size_t cut) {
    return cut == j->n_cuts ? j->n : j->n * cut / j->n_cuts / IBID_Q8_TILE * IBID_Q8_TILE;
}

static void linear_part(void *arg, size_t part, size_t thread) {
    const linear_job *j = arg;
    const ibid_kernels *k = j->e->k;
    size_t cut = part % j->n_cuts, panel = part / j->n_cuts, o = 0;
    size_t i0 = cut_at(j, cut), n = cut_at(j, cut + 1) - i0;
    for (;; o++) { /* which matrix, which of its panels */
        size_t n_panels = (j->out[o].w->rows + j->panel - 1) / j->panel;
        if (panel < n_panels) break;
        panel -= n_panels;
    }
    size_t r0 = panel * j->panel, rows = j->out[o].w->rows, r1 = r0 + j->panel;
    if (r1 > rows) r1 = rows;
    for (size_t w = o; w <= o + j->swiglu; w++) {
        const ibidi_out *out = &j->out[w];
        float *y = out->y + i0 * out->ldy;
        if (j->packed)
            k->matmul_q8(out->panels, r0, r1,
                         j->e->rows.packed + i0 / IBID_Q8_TILE * j->packed_bytes, n, y, out->ldy);
        else
            k->matmul(out->w, r0, r1, j->x + i0 * j->ldx, j->ldx, n, y, out->ldy,
                      j->e->threads[thread].matmul);
    }
    if (!j->swiglu) return;
    for (size_t i = i0; i < i0 + n; i++) {
        k->swiglu(j->out[0].y + i * j->out[0].ldy + r0, j->out[1].y + i * j->out[1].ldy + r0,
                  r1 - r0);
    }
}

static void pack_part(void *arg, size_t part, size_t thread) {
    const linear_job *j = arg;
    size_t i = part * IBID_Q8_TILE, n = j->n - i < IBID_Q8_TILE ? j->n - i : IBID_Q8_TILE;
    (void)thread;
    j->e->k->q8_pack(j->x + i * j->ldx, j->ldx, n, j->out[0].w->cols, j->out[0].fine_above,
                     j->e->rows.packed + part * j->packed_bytes);
}

/* Whatever the number of rows, so that a row's result does not depend on what shares its batch. */
static void pack(linear_job *j, size_t n_out) {
    for (size_t i = 0; i < n_out; i++) {
        if (!j->out[i].panels || !j->out[i].panels->data) return;
    }
    j->packed = true;
    j->packed_bytes = j->e->k->q8_bytes(j->out[0].w->cols);
    ibid_pool_run(j->e->pool, (j->n + IBID_Q8_TILE - 1) / IBID_Q8_TILE, pack_part, j);
}

void ibidi_linear(ibid_engine *e, const float *x, size_t ldx, size_t n, const ibidi_out *o,
                  size_t n_out, bool swiglu) {
    linear_job j = {.e = e, .x = x, .ldx = ldx, .n = n, .out = o, .swiglu = swiglu, .n_cuts = 1};
    size_t n_panels = 0, want = PARTS_PER_THREAD * e->n_threads;
    if (n == 0) return;
    size_t n_w = swiglu ? 1 : n_out, rows = 0;
    for (size_t i = 0; i < n_w; i++) rows += o[i].w->rows;
    j.panel = n <= FEW ? ibid_align_up(rows / (RUNS * e->n_threads) + 1, IBID_PANEL_ROWS) : PANEL;
    for (size_t i = 0; i < n_w; i++) n_panels += (o[i].w->rows + j.panel - 1) / j.panel;
    if (e->n_threads > 1) {
        while (n_panels * j.n_cuts < want && n / (j.n_cuts + 1) >= LEAST_ROWS) j.n_cuts++;
    }
    pack(&j, n_out);
    ibid_pool_run(e->pool, n_panels * j.n_cuts, linear_part, &j);
}

typedef struct row_job {
    ibid_engine *e;
    size_t n, layer;
    void (*fn)(ibid_engine *e, size_t row, size_t layer);
} row_job;

static void row_part(void *arg, size_t part, size_t thread) {
    const row_job *j = arg;
    (void)thread;
    size_t end = (part + 1) * ROWS_PER_PART;
    for (size_t i = part * ROWS_PER_PART; i < end && i < j->n; i++) j->fn(j->e, i, j->layer);
}

void ibidi_each_row(ibid_engine *e, size_t n, void (*fn)(ibid_engine *e, size_t row, size_t layer),
                    size_t layer) {
    row_job j = {.e = e, .n = n, .layer = layer, .fn = fn};
    ibid_pool_run(e->pool, (n + ROWS_PER_PART - 1) / ROWS_PER_PART, row_part, &j);
}
