/* Choosing pages on the device, on random shapes: summaries, what is chosen and in which order, and
 * mass brought back to its pages, against the CPU's functions and plain loops. Head sizes 64, 96,
 * 128 and 256, partial RoPE, both pairings, q8_0 and f16 pages, masks, empty pages, offsets, live
 * pages. */
#include "attention/cuda/select.h"
#include "attention/kernels/select.h"
#include "tests/attention/cuda/kernel_fixture.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PAGES = 700, TURNS = 5, HEADS = 16 };

typedef struct world {
    ibidi_cu_shape m;
    ibid_page_shape shape;
    size_t n, last, n_chosen, summary_bytes, head_bytes;
    ibidi_cu_page pages[MAX_PAGES];
    uint32_t cells[MAX_PAGES];
    float turns[TURNS][IBIDI_CU_DIM_MAX];
    uint8_t *pool;
    float *q;
    ibidi_cu_choosing d, *there; /* its pointers are the device's; itself, there */
} world;

static void make(world *w, size_t round) {
    static const uint32_t dims[] = {64, 96, 128, 256}, groups[] = {1, 3, 4, 8};
    memset(w, 0, sizeof *w);
    uint32_t dim = dims[round % 4], kv = 1 + (uint32_t)fx_below(2), group = groups[fx_below(4)];
    uint32_t n_rot = fx_below(3) ? dim : dim / 4;
    w->m = (ibidi_cu_shape){.n_heads = kv * group,
                            .n_kv_heads = kv,
                            .head_dim = dim,
                            .n_rot = n_rot,
                            .group = group,
                            .pair_next = fx_below(2) != 0,
                            .q8 = round / 4 % 2 != 0};
    w->shape = (ibid_page_shape){dim, n_rot, w->m.pair_next ? IBID_PAIR_NEXT : IBID_PAIR_HALF};
    w->summary_bytes = ibid_page_bytes(&w->shape);
    CHECK(w->summary_bytes == ibidi_cu_summary_bytes(dim), "a page of another size");
    w->head_bytes = ibidi_cu_head_bytes(dim, w->m.q8);
    w->n = round % 5 == 4 ? 300 + fx_below(MAX_PAGES - 300) : 1 + fx_below(40);
    size_t tail = fx_below(w->n < 4 ? w->n : 4); /* live pages at the end */
    w->last = w->n - tail;
    w->n_chosen = tail + 1 + fx_below(w->n - tail);
    for (size_t t = 0; t < TURNS; t++)
        for (size_t i = 0; i < n_rot / 2; i++) {
            w->turns[t][i] = cosf((float)(i * 7 + t));
            w->turns[t][n_rot / 2 + i] = sinf((float)(i * 7 + t));
        }
    for (size_t i = 0; i < w->n; i++) {
        size_t j = fx_below(i + 1); /* cells in a random order */
        w->cells[i] = w->cells[j];
        w->cells[j] = (uint32_t)i;
        bool live = i >= w->last;
        w->pages[i] = (ibidi_cu_page){.keep = UINT64_MAX,
                                      .start = (uint32_t)(64 * i),
                                      .n = live || fx_below(3) ? 64 : 1 + (uint32_t)fx_below(64),
                                      .turn = live ? 0 : (uint32_t)fx_below(TURNS + 1),
                                      .live = live};
        if (!live && fx_below(3) == 0) w->pages[i].keep = fx_below(4) ? fx_below(UINT64_MAX) : 0;
    }
}

static ibid_kv_view view_of(const world *w, size_t page, size_t head) {
    size_t dim = w->m.head_dim;
    const uint8_t *at = w->pool + (w->cells[page] * w->m.n_kv_heads + head) * w->head_bytes;
    ibid_kv_view v = {.type = w->m.q8 ? IBID_KV_Q8_0 : IBID_KV_F16,
                      .n_tokens = IBIDI_CU_PAGE,
                      .n_kv_heads = 1,
                      .head_dim = dim,
                      .k = at};
    if (w->m.q8)
        v.k_scale =
            (const uint16_t *)(const void *)(at + 2 * ibidi_cu_plane_bytes((uint32_t)dim, true));
    return v;
}

/* Keys that lie about a direction of their page, so that pages differ. */
static void fill(world *w) {
    size_t dim = w->m.head_dim, heads = w->n * w->m.n_kv_heads;
    float mean[IBIDI_CU_DIM_MAX], key[IBIDI_CU_DIM_MAX];
    w->pool = calloc(heads, w->head_bytes);
    for (size_t i = 0; i < heads; i++) {
        ibid_kv_view v = view_of(w, i / w->m.n_kv_heads, i % w->m.n_kv_heads);
        float spread = 0.1f + fx_uniform();
        for (size_t d = 0; d < dim; d++) mean[d] = 0.5f * fx_normal();
        for (size_t t = 0; t < IBIDI_CU_PAGE; t++) {
            for (size_t d = 0; d < dim; d++) key[d] = mean[d] + spread * fx_normal();
            if (w->m.q8) fx.k->hadamard(key, dim);
            fx.k->kv_pack(v.type, key, dim, (uint8_t *)(uintptr_t)v.k + t * dim * (w->m.q8 ? 1 : 2),
                          w->m.q8 ? (uint16_t *)(uintptr_t)v.k_scale + t * dim / 32 : NULL);
        }
    }
    w->q = fx_normals(w->m.n_heads * dim, 2.0f / sqrtf((float)dim));
}

static void upload(world *w) {
    size_t kv = w->m.n_kv_heads;
    uint32_t cells[2 * MAX_PAGES]; /* layer 1 of 2 */
    uint32_t zeros[HEADS] = {0};
    memset(cells, 0xff, sizeof cells);
    memcpy(cells + MAX_PAGES, w->cells, sizeof w->cells);
    float *turns = calloc(TURNS * w->m.n_rot, sizeof *turns);
    for (size_t t = 0; t < TURNS; t++)
        memcpy(turns + t * w->m.n_rot, w->turns[t], w->m.n_rot * sizeof *turns);
    w->d = (ibidi_cu_choosing){.seq = {.pages = fx_up(w->pages, sizeof w->pages),
                                       .cells = fx_up(cells, sizeof cells),
                                       .turns = fx_up(turns, TURNS * w->m.n_rot * sizeof *turns),
                                       .room = MAX_PAGES},
                               .room = MAX_PAGES,
                               .n = (uint32_t)w->n,
                               .last = (uint32_t)w->last,
                               .n_chosen = (uint32_t)w->n_chosen,
                               .pool = fx_up(w->pool, w->n * kv * w->head_bytes),
                               .summaries = fx_up(NULL, 2 * kv * MAX_PAGES * w->summary_bytes),
                               .spread = fx_up(NULL, 2 * kv * 2 * w->m.head_dim * 4),
                               .weight = fx_up(NULL, kv * (w->m.group + 1) * MAX_PAGES * 4),
                               .pages = fx_up(NULL, kv * w->n_chosen * sizeof(ibidi_cu_page)),
                               .cells = fx_up(NULL, kv * w->n_chosen * 4),
                               .which = fx_up(NULL, kv * w->n_chosen * 4),
                               .read = fx_up(zeros, kv * 4)};
    w->there = fx_up(&w->d, sizeof w->d);
    free(turns);
}

static void drop(world *w) {
    const void *all[] = {w->d.seq.pages, w->d.seq.cells, w->d.seq.turns, w->d.pool,
                         w->d.summaries, w->d.spread,    w->d.weight,    w->d.pages,
                         w->d.cells,     w->d.which,     w->d.read};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) fx_free((void *)(uintptr_t)all[i]);
    fx_free(w->there);
    free(w->pool);
    free(w->q);
}

static uint32_t tokens_in(const ibidi_cu_page *p) {
    return (uint32_t)__builtin_popcountll(p->n < 64 ? p->keep & ((UINT64_C(1) << p->n) - 1)
                                                    : p->keep);
}

/* The CPU's summary of a page, from the same stored bytes. */
static void want_summary(const world *w, size_t page, size_t head, const ibid_page_sums *out) {
    const ibidi_cu_page *p = &w->pages[page];
    size_t dim = w->m.head_dim, half = w->m.n_rot / 2;
    float keys[IBIDI_CU_PAGE * IBIDI_CU_DIM_MAX], back[IBIDI_CU_DIM_MAX];
    ibid_kv_view v = view_of(w, page, head);
    fx.k->kv_unpack(v.type, v.k, v.k_scale, IBIDI_CU_PAGE * dim, keys);
    if (w->m.q8) fx.k->hadamard(keys, IBIDI_CU_PAGE * dim);
    const float *turn = p->turn ? w->turns[p->turn - 1] : NULL;
    for (size_t i = 0; turn && i < half; i++) back[i] = -turn[half + i];
    if (turn) fx.k->rope(w->shape.pairing, keys, IBIDI_CU_PAGE, dim, w->m.n_rot, turn, back);
    ibid_page_summary(&w->shape, keys, p->n, p->keep, out, 0);
}

static ibid_page_sums sums_of(const world *w, void *sums, size_t head) {
    uint8_t *at = (uint8_t *)sums + head * MAX_PAGES * w->summary_bytes;
    return ibid_page_sums_at(&w->shape, at, MAX_PAGES);
}

/* Dimension i in the order of quads. */
static size_t in_order(const world *w, size_t i) {
    bool half = w->shape.pairing == IBID_PAIR_HALF && i / 2 < w->shape.n_rot / 2;
    return half ? i / 2 + i % 2 * w->shape.n_rot / 2 : i;
}

static bool near(float a, float b, float more) {
    return fabsf(a - b) <= 2e-3f * fabsf(b) + more;
}

static void check_summaries(const world *w, void *got) {
    static _Alignas(64) uint8_t memory[64 * IBIDI_CU_DIM_MAX];
    ibid_page_sums want = ibid_page_sums_at(&w->shape, memory, 1);
    size_t dim = w->m.head_dim, other = 0, all = 0;
    for (size_t i = 0; i < w->last * w->m.n_kv_heads; i++) {
        size_t page = i % w->last, head = i / w->last;
        ibid_page_sums have = sums_of(w, got, head);
        want_summary(w, page, head, &want);
        for (size_t k = 0; k < dim; k++) {
            size_t at = k / 4 * MAX_PAGES + page, d = in_order(w, k);
            float step = have.steps[at * 4 + k % 4];
            if (!tokens_in(&w->pages[page])) {
                CHECK(step == 0, "a page without tokens has a step of %g", (double)step);
                continue;
            }
            /* A unit of f16 or two: sums of 64 in another order. */
            CHECK(near(ibid_f16_to_f32(have.means[page * dim + d]), ibid_f16_to_f32(want.means[d]),
                       2e-4f),
                  "mean of page %zu, head %zu, dimension %zu", page, head, d);
            CHECK(near(step, want.steps[k], 2e-4f), "page %zu, head %zu, step %zu: %g, not %g",
                  page, head, k, (double)step, (double)want.steps[k]);
            /* Codes may be neighbours; where all keys are equal, a step is only rounding. */
            float off =
                ibid_f16_to_f32(have.means[page * dim + d]) - ibid_f16_to_f32(want.means[d]);
            for (size_t t = 0; t < IBIDI_CU_PAGE; t++) {
                uint8_t a = have.codes[(at * 32 + t / 2) * 4 + k % 4];
                uint8_t b = want.codes[(k / 4 * 32 + t / 2) * 4 + k % 4];
                int x = t % 2 ? a >> 4 : a & 15, y = t % 2 ? b >> 4 : b & 15;
                float key = off + ((float)x - 7.5f) * step - ((float)y - 7.5f) * want.steps[k];
                CHECK(fabsf(key) <= 1.01f * step + 3e-3f,
                      "page %zu, head %zu, dimension %zu, token %zu: %d, not %d", page, head, d, t,
                      x, y);
                other += x != y && step > 1e-2f;
                all++;
            }
        }
    }
    CHECK(other <= all / 50, "%zu of %zu codes are others", other, all);
}

/* Weights in double, by the CPU's functions from the device's own summaries. */
static void want_weights(const world *w, void *got, const float *got_spread, size_t head,
                         double *weight) {
    static float score[8][MAX_PAGES];
    size_t dim = w->m.head_dim, group = w->m.group, n = ibid_page_quads(&w->shape);
    float spread[IBIDI_CU_DIM_MAX], most[IBIDI_CU_DIM_MAX], scaled[8 * IBIDI_CU_DIM_MAX];
    float rank[IBIDI_CU_DIM_MAX / 4], unit[8];
    uint32_t quads[IBIDI_CU_DIM_MAX / 4];
    const float *q = w->q + head * group * dim;
    ibid_page_sums sums = sums_of(w, got, head);
    ibid_page_spread(&w->shape, &sums, w->last, spread, most);
    float root[2] = {0}, largest[2] = {0}; /* in another order: compared as sums */
    for (size_t d = 0; d < dim; d++) {
        root[0] += spread[d];
        root[1] += got_spread[head * 2 * dim + d];
        largest[0] += most[d];
        largest[1] += got_spread[(head * 2 + 1) * dim + d];
    }
    CHECK(near(root[1], root[0], 1e-6f) && near(largest[1], largest[0], 1e-6f), "spread %g %g",
          (double)root[1], (double)largest[1]);
    ibid_page_query ask = {.quads = quads, .q = scaled, .unit = unit, .rank = rank};
    ibid_page_ask(&w->shape, q, group, spread, most, &ask);
    ibid_page_look look = {.steps = sums.steps,
                           .codes = sums.codes,
                           .quads = quads,
                           .q = scaled,
                           .unit = unit,
                           .room = MAX_PAGES,
                           .n = n,
                           .group = group};
    memset(score, 0, sizeof score);
    fx.k->page_scores(&look, w->last, score[0], MAX_PAGES);
    for (size_t i = 0; i < w->n; i++) weight[i] = 0;
    for (size_t g = 0; g < group; g++) {
        double most_g = -INFINITY, sum = 0, at[MAX_PAGES];
        for (size_t i = 0; i < w->last; i++) {
            if (!tokens_in(&w->pages[i])) continue;
            at[i] = (double)score[g][i];
            for (size_t d = 0; d < dim; d++)
                at[i] += (double)ibid_f16_to_f32(sums.means[i * dim + d]) * (double)q[g * dim + d];
            most_g = fmax(most_g, at[i]);
        }
        for (size_t i = 0; i < w->last; i++)
            if (tokens_in(&w->pages[i])) sum += exp2(at[i] - most_g);
        for (size_t i = 0; i < w->last; i++)
            if (tokens_in(&w->pages[i])) weight[i] += exp2(at[i] - most_g) / sum;
    }
}

/* Chosen pages ascend, are the sequence's own, hold those always read, and none left out weighs
 * more than one that was chosen. */
static void check_chosen(const world *w, size_t head, void *sums, const float *spread,
                         const ibidi_cu_page *pages, const uint32_t *cells, const uint32_t *which,
                         uint32_t read) {
    double weight[MAX_PAGES], least = INFINITY;
    bool chosen[MAX_PAGES] = {false};
    size_t n = 0, could = 0, tokens = 0;
    want_weights(w, sums, spread, head, weight);
    for (size_t i = 0; i < w->n; i++) could += i == 0 || i >= w->last || tokens_in(&w->pages[i]);
    for (; n < w->n_chosen && which[n] != UINT32_MAX; n++) {
        uint32_t i = which[n];
        CHECK(i < w->n && (n == 0 || i > which[n - 1]), "page %u behind %u", i, which[n - !!n]);
        CHECK(memcmp(&pages[n], &w->pages[i], sizeof *pages) == 0 && cells[n] == w->cells[i],
              "page %u is not itself", i);
        chosen[i] = true;
        if (i < w->last) tokens += tokens_in(&w->pages[i]);
        if (i > 0 && i < w->last) {
            CHECK(tokens_in(&w->pages[i]) > 0, "page %u has nothing to read", i);
            least = fmin(least, weight[i]);
        }
    }
    CHECK(n == (could < w->n_chosen ? could : w->n_chosen), "%zu pages of %zu, %zu wanted", n,
          could, w->n_chosen);
    for (size_t i = n; i < w->n_chosen; i++)
        CHECK(which[i] == UINT32_MAX && pages[i].n == 0 && pages[i].keep == 0, "slot %zu", i);
    CHECK(read == tokens, "%u tokens read, not %zu", read, tokens);
    for (size_t i = 0; i < w->n; i++) {
        if (i == 0 || i >= w->last) CHECK(chosen[i], "page %zu is always read", i);
        if (!chosen[i] && tokens_in(&w->pages[i]))
            CHECK(weight[i] <= least * (1 + 1e-4), "page %zu weighs %g, one chosen %g", i,
                  weight[i], least);
    }
}

static void check_mass(const world *w, const uint32_t *which) {
    size_t n = w->n_chosen * IBIDI_CU_PAGE, all = w->last * IBIDI_CU_PAGE;
    if (w->last == 0) return;
    float *chosen = fx_normals(n, 1), *before = fx_normals(all, 1);
    float *got = calloc(all, sizeof *got);
    float *d_chosen = fx_up(chosen, n * 4), *d_mass = fx_up(before, all * 4);
    MUST(ibidi_cu_spread_mass(fx.s, w->d.which, w->n_chosen, w->last, d_chosen, d_mass));
    fx_down(got, d_mass, all * 4);
    for (size_t i = 0; i < w->n_chosen; i++)
        for (size_t j = 0; which[i] < w->last && j < IBIDI_CU_PAGE; j++)
            before[which[i] * IBIDI_CU_PAGE + j] += chosen[i * IBIDI_CU_PAGE + j];
    CHECK(memcmp(before, got, all * sizeof *got) == 0, "mass went elsewhere");
    fx_free(d_chosen);
    fx_free(d_mass);
    free(chosen);
    free(before);
    free(got);
}

static void one(size_t round) {
    static world w;
    make(&w, round);
    fill(&w);
    upload(&w);
    size_t kv = w.m.n_kv_heads, slots = kv * w.n_chosen, first = fx_below(w.last + 1);
    float *q = fx_up(w.q, w.m.n_heads * w.m.head_dim * 4);
    size_t of_layer = kv * MAX_PAGES * w.summary_bytes, spreads = kv * 2 * w.m.head_dim;
    uint8_t *sums = aligned_alloc(64, of_layer);
    float *spread = calloc(spreads, sizeof *spread);
    ibidi_cu_page *pages = calloc(slots, sizeof *pages);
    uint32_t *cells = calloc(slots, 4), *which = calloc(slots, 4), read[HEADS];
    for (size_t go = 0; go < 2; go++) { /* up to page `first`, then the others */
        ibidi_cu_choosing d = w.d;
        uint32_t from[2] = {0, go ? (uint32_t)first : 0};
        d.from = fx_up(from, sizeof from);
        if (!go) d.last = (uint32_t)first;
        ibidi_cu_choosing *there = fx_up(&d, sizeof d);
        MUST(ibidi_cu_summarise(fx.s, &w.m, there, 1, d.last - from[1] + fx_below(3)));
        if (go) MUST(ibidi_cu_choose(fx.s, &w.m, w.there, 1, w.last + fx_below(9), q));
        fx_down(read, w.d.read, kv * 4); /* waits */
        fx_free(there);
        fx_free((void *)(uintptr_t)d.from);
    }
    fx_down(sums, w.d.summaries + of_layer, of_layer);
    fx_down(spread, w.d.spread + spreads, spreads * sizeof *spread);
    fx_down(pages, w.d.pages, slots * sizeof *pages);
    fx_down(cells, w.d.cells, slots * 4);
    fx_down(which, w.d.which, slots * 4);
    check_summaries(&w, sums);
    for (size_t h = 0; h < kv; h++)
        check_chosen(&w, h, sums, spread, pages + h * w.n_chosen, cells + h * w.n_chosen,
                     which + h * w.n_chosen, read[h]);
    check_mass(&w, which);
    fx_free(q);
    free(sums);
    free(spread);
    free(pages);
    free(cells);
    free(which);
    drop(&w);
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 7001;
    size_t rounds = argc > 2 ? strtoul(argv[2], NULL, 10) : 24;
    fx_start(seed);
    for (size_t i = 0; i < rounds; i++) one(i);
    printf("seed %llu: %zu shapes\n", (unsigned long long)seed, rounds);
    fx_stop();
    return 0;
}
