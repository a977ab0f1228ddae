/* Decoding over chosen pages: summaries, their scores and what is chosen against plain loops; a row
 * that chooses against one whose masks hide what it left out, and against full attention where it
 * may choose everything; and what must not matter. Random: seeds below. */
#include "attention/engine_internal.h"
#include "attention/kernels/select.h"
#include "tests/support/engine_fixture.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
/* clang-format off */
#include <cmocka.h>
/* clang-format on */

enum { VOCAB_ROOM = 512, SEED = 20240610 };

static void must(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_text(e), ibid_err_detail());
}

static float random_value(uint64_t *s) {
    float sum = 0; /* about normal */
    for (int i = 0; i < 4; i++) sum += (float)(fx_random(s) >> 40) / (float)(1 << 24) - 0.5f;
    return 2 * sum;
}

/* ---- Pages ---- */

static const ibid_page_shape shapes[] = {{64, 64, IBID_PAIR_NEXT},   {128, 128, IBID_PAIR_HALF},
                                         {96, 32, IBID_PAIR_NEXT},   {80, 20, IBID_PAIR_HALF},
                                         {256, 256, IBID_PAIR_HALF}, {8, 4, IBID_PAIR_NEXT}};
enum { SHAPES = sizeof shapes / sizeof *shapes };

enum { DIM = 256, ROOM = 3, BYTES = ROOM * 64 * DIM };

/* Dimension i in the order of quads. */
static size_t in_order(const ibid_page_shape *s, size_t i) {
    bool half = s->pairing == IBID_PAIR_HALF && i / 2 < s->n_rot / 2;
    return half ? i / 2 + i % 2 * s->n_rot / 2 : i;
}

static int code_at(const ibid_page_sums *p, size_t i, size_t page, size_t t) {
    uint8_t two = p->codes[((i / 4 * p->room + page) * 32 + t / 2) * 4 + i % 4];
    return t % 2 ? two >> 4 : two & 15;
}

/* A key as its page's summary knows it. */
static void recalled(const ibid_page_shape *s, const ibid_page_sums *sums, size_t page, size_t t,
                     float *key) {
    for (size_t i = 0; i < s->head_dim; i++) {
        size_t d = in_order(s, i);
        float step = sums->steps[(i / 4 * sums->room + page) * 4 + i % 4];
        key[d] = ibid_f16_to_f32(sums->means[page * ibid_page_padded(s) + d]) +
                 step * ((float)code_at(sums, i, page, t) - 7.5f);
    }
}

/* Keys come back to half a step; those that do not count are copies of one that does. */
static void test_summary(void **state) {
    uint64_t seed = SEED;
    (void)state;
    for (size_t round = 0; round < 40 * SHAPES; round++) {
        const ibid_page_shape *s = &shapes[round % SHAPES];
        size_t dim = s->head_dim, n = 1 + fx_random(&seed) % 64;
        uint64_t all = n < 64 ? (UINT64_C(1) << n) - 1 : UINT64_MAX;
        uint64_t seen = round % 3 ? all : (fx_random(&seed) & all) | UINT64_C(1) << (n - 1);
        float keys[64 * DIM], key[DIM], most[DIM] = {0}, spread[DIM], top[DIM];
        float wide = 0.01f + 3 * fabsf(random_value(&seed));
        _Alignas(64) uint8_t memory[BYTES] = {0};
        ibid_page_sums sums = ibid_page_sums_at(s, memory, ROOM);
        size_t page = round % ROOM;
        assert_true(ROOM * ibid_page_bytes(s) <= BYTES && ibid_page_bytes(s) % 64 == 0);
        for (size_t i = 0; i < dim; i++) {
            float mean = 4 * random_value(&seed);
            for (size_t t = 0; t < n; t++) keys[t * dim + i] = mean + wide * random_value(&seed);
        }
        ibid_page_summary(s, keys, n, seen, &sums, page);
        for (size_t t = 0; t < n; t++) {
            if (!(seen >> t & 1)) continue;
            recalled(s, &sums, page, t, key);
            for (size_t d = 0; d < dim; d++) {
                uint16_t mean = sums.means[page * ibid_page_padded(s) + d];
                float far = fabsf(keys[t * dim + d] - ibid_f16_to_f32(mean));
                most[d] = fmaxf(most[d], far);
            }
        }
        for (size_t t = 0; t < 64; t++) {
            size_t of = t < n && seen >> t & 1 ? t : (size_t)__builtin_ctzll(seen);
            recalled(s, &sums, page, t, key);
            for (size_t d = 0; d < dim; d++)
                assert_true(fabsf(key[d] - keys[of * dim + d]) <=
                            most[d] / 15 * 1.001f + 1e-5f * fabsf(key[d]));
        }
        ibid_page_spread(s, &sums, ROOM, spread, top);
        for (size_t d = 0; d < dim; d++) { /* the other pages' steps are 0 */
            assert_true(fabsf(spread[d] - most[d] / 7.5f) <= 1e-5f * most[d]);
            assert_true(fabsf(top[d] - most[d] / 7.5f) <= 1e-6f * most[d]);
        }
    }
}

/* Of a head at a page, against a plain loop. q [dim] as it was asked with. */
static void check_score(const char *name, const ibid_page_shape *s, const ibid_page_sums *sums,
                        const ibid_page_look *p, const float *q, float unit, size_t page,
                        double got) {
    double best = -INFINITY, most = 0, all = 0;
    for (size_t t = 0; t < 64; t++) {
        double sum = 0;
        for (size_t i = 0; i < 4 * p->n; i++) {
            size_t at = 4 * p->quads[i / 4] + i % 4;
            double c = (double)(q[in_order(s, at)] *
                                sums->steps[(at / 4 * sums->room + page) * 4 + at % 4]);
            sum += c * (code_at(sums, at, page, t) - 7.5);
            if (t) continue;
            most = fmax(most, fabs(c));
            all += fabs(c);
        }
        best = fmax(best, sum);
    }
    assert_true(most <= 127.01 * (double)unit && 15 * all <= 28001 * (double)unit);
    /* Half a unit for each coefficient, at codes that are 7.5 away at most. */
    if (fabs(got - best) > (double)unit * 7.5 * sqrt(4.0 * (double)p->n))
        fail_msg("%s: %g, not %g", name, got, best);
}

/* The quads are those of most weight; a page's score is that of its best token over them, on every
 * CPU's kernels. */
static void test_best_token(void **state) {
    enum { GROUP = 9 };
    uint64_t seed = SEED + 2;
    (void)state;
    for (size_t round = 0; round < 20 * SHAPES; round++) {
        const ibid_page_shape *s = &shapes[round % SHAPES];
        size_t dim = s->head_dim, group = 1 + fx_random(&seed) % GROUP, n = ibid_page_quads(s);
        float keys[64 * DIM], q[GROUP * DIM], spread[DIM], most[DIM], rank[DIM / 4], unit[GROUP];
        float scaled[GROUP * DIM];
        uint32_t quads[DIM / 4];
        bool taken[DIM / 4] = {false};
        _Alignas(64) uint8_t memory[BYTES];
        ibid_page_sums sums = ibid_page_sums_at(s, memory, ROOM);
        for (size_t page = 0; page < ROOM; page++) {
            float wide = 0.1f + fabsf(random_value(&seed));
            for (size_t i = 0; i < 64 * dim; i++) keys[i] = wide * random_value(&seed);
            ibid_page_summary(s, keys, 64, UINT64_MAX, &sums, page);
        }
        for (size_t i = 0; i < group * dim; i++) q[i] = random_value(&seed);
        ibid_page_spread(s, &sums, ROOM, spread, most);
        ibid_page_query ask = {.quads = quads, .q = scaled, .unit = unit, .rank = rank};
        ibid_page_ask(s, q, group, spread, most, &ask);
        for (size_t i = 0; i < n; i++) {
            assert_true(quads[i] < dim / 4 && (i == 0 || quads[i] > quads[i - 1]));
            taken[quads[i]] = true;
        }
        for (size_t i = 0; i < dim / 4; i++)
            for (size_t j = 0; j < dim / 4 && taken[i]; j++)
                assert_true(taken[j] || rank[i] >= rank[j]);
        ibid_page_look look = {.steps = sums.steps,
                               .codes = sums.codes,
                               .room = ROOM,
                               .quads = quads,
                               .q = scaled,
                               .unit = unit,
                               .n = n,
                               .group = group};
        for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
            float score[GROUP * ROOM] = {0};
            if (!(*k)->supported()) continue;
            (*k)->page_scores(&look, ROOM, score, ROOM);
            for (size_t i = 0; i < group * ROOM; i++)
                check_score((*k)->name, s, &sums, &look, q + i / ROOM * dim, unit[i / ROOM],
                            i % ROOM, (double)score[i]);
        }
    }
}

/* What is no number chooses something, and nothing beside it. */
static void test_broken_query(void **state) {
    (void)state;
    for (size_t round = 0; round < 4 * SHAPES; round++) {
        const ibid_page_shape *s = &shapes[round % SHAPES];
        size_t n = ibid_page_quads(s), dim = s->head_dim;
        float q[DIM], spread[DIM], rank[DIM / 4], unit[1], scaled[DIM + 1];
        uint32_t quads[DIM / 4 + 1];
        for (size_t d = 0; d < dim; d++) {
            q[d] = round / SHAPES < 2 || d % 3 == 0 ? NAN : 1;
            spread[d] = round / SHAPES % 2 ? INFINITY : 1;
        }
        quads[n] = 77;
        scaled[4 * n] = 77;
        ibid_page_query ask = {.quads = quads, .q = scaled, .unit = unit, .rank = rank};
        ibid_page_ask(s, q, 1, spread, spread, &ask);
        for (size_t i = 0; i < n; i++)
            assert_true(quads[i] < dim / 4 && (i == 0 || quads[i] > quads[i - 1]));
        assert_int_equal(quads[n], 77);
        assert_true(scaled[4 * n] == 77);
    }
}

static void test_choose(void **state) {
    enum { N = 300 };
    uint64_t seed = SEED + 1;
    (void)state;
    for (size_t round = 0; round < 200; round++) {
        float weight[N], scores[N], want[N];
        uint32_t tokens[N], heap[N];
        uint64_t chosen[N / 64 + 1] = {1}, before[N / 64 + 1];
        size_t n = 1 + fx_random(&seed) % N, budget = fx_random(&seed) % (64 * n), total = 0;
        double sum = 0;
        for (size_t i = 0; i < n; i++) {
            scores[i] = 3 * random_value(&seed);
            if (i % 7 == 3) scores[i] = scores[i / 2]; /* equals */
            tokens[i] = (uint32_t)(fx_random(&seed) % 65);
            weight[i] = 0;
            if (tokens[i]) sum += exp((double)scores[i]);
            want[i] = tokens[i] ? scores[i] : -INFINITY;
        }
        ibid_page_weigh(scores, tokens, n, weight);
        for (size_t i = 0; i < n; i++) {
            double share = tokens[i] ? exp((double)want[i]) / sum : 0;
            assert_true(fabs((double)weight[i] - share) <= 1e-5 * share + 1e-12);
        }
        memcpy(before, chosen, sizeof chosen);
        size_t got = ibid_page_choose(weight, tokens, n, budget, heap, chosen);
        for (size_t i = 0; i < n; i++)
            if (chosen[i / 64] >> i % 64 & 1) total += tokens[i];
        assert_int_equal(got, total);
        /* The same by looking for the best again and again. */
        size_t have = tokens[0];
        while (have < budget) {
            size_t best = n;
            for (size_t i = 0; i < n; i++) {
                if (!tokens[i] || (before[i / 64] >> i % 64 & 1)) continue;
                if (best == n || weight[i] > weight[best]) best = i;
            }
            if (best == n) break;
            before[best / 64] |= UINT64_C(1) << best % 64;
            have += tokens[best];
        }
        assert_memory_equal(before, chosen, sizeof chosen);
    }
}

/* ---- Rows ---- */

enum { PREFIX = 30, BLOCK = 200, BLOCKS = 9, LIVE = 300, STEPS = 4 };

typedef struct world {
    fx_model f;
    fx_kv kv[1 + BLOCKS];
    uint64_t masks[1 + BLOCKS][4];
    int32_t tokens[4096];
} world;

static size_t length_of(size_t i) {
    return i ? BLOCK - (i % 3) * 8 : PREFIX;
}

static void open_world(world *w, ibid_test_gguf spec, const char *kernels, size_t threads,
                       ibid_kv_type type) {
    memset(w, 0, sizeof *w);
    spec.n_ctx = 8192;
    fx_open(&w->f, &spec, kernels, threads);
    fx_tokens(w->f.m, SEED, w->tokens, 4096);
    w->kv[0] = fx_encode(w->f.e, NULL, 0, w->tokens, PREFIX, type);
    ibid_segment prefix = {.layers = w->kv[0].layers};
    for (size_t i = 1; i <= BLOCKS; i++)
        w->kv[i] = fx_encode(w->f.e, &prefix, PREFIX, w->tokens + i * BLOCK, length_of(i), type);
}

static void close_world(world *w) {
    for (size_t i = 0; i <= BLOCKS; i++) fx_kv_free(&w->kv[i]);
    fx_close(&w->f);
}

/* A sequence over all blocks with LIVE rows behind. Returns the position of the next row. */
static uint32_t start(world *w, ibid_seq **s) {
    uint64_t offset = 0;
    must(ibid_seq_open(w->f.e, 0, s));
    for (size_t i = 0; i <= BLOCKS; i++) {
        ibid_segment g = {.layers = w->kv[i].layers,
                          .local0 = i ? PREFIX : 0,
                          .offset = i ? offset : 0,
                          .masked = i % 2 ? w->masks[i] : NULL};
        must(ibid_seq_add_segment(*s, &g));
        if (i) offset += length_of(i);
    }
    uint32_t at = (uint32_t)(PREFIX + offset);
    fx_forward(w->f.e, *s, at, w->tokens + 2500, LIVE, 0, NULL);
    return at + LIVE;
}

static void decode(world *w, ibid_seq *s, uint32_t at, size_t i, ibid_select *x, float *logits) {
    ibid_step step = {.seq = s,
                      .tokens = w->tokens + 3000 + i,
                      .positions = &at,
                      .n = 1,
                      .n_logits = 1,
                      .logits = logits,
                      .select = x};
    must(ibid_engine_forward(w->f.e, &step, 1, NULL));
}

/* All pages may be chosen: full attention, but for the order in which it is summed. */
static void test_everything(void **state) {
    (void)state;
    for (size_t i = 0; i < FX_SHAPES; i++) {
        world w;
        ibid_seq *a = NULL, *b = NULL;
        float want[VOCAB_ROOM], got[VOCAB_ROOM];
        open_world(&w, fx_shapes[i], NULL, 2, IBID_KV_F32);
        for (size_t k = 0; k < 40; k++) w.masks[3][k / 20] |= UINT64_C(1) << (k % 20 * 3);
        uint32_t at = start(&w, &a);
        (void)start(&w, &b);
        for (uint32_t k = 0; k < STEPS; k++) {
            ibid_select x = {.share = 0.5, .least = UINT32_MAX, .measure = true};
            decode(&w, a, at + k, k, NULL, want);
            decode(&w, b, at + k, k, &x, got);
            assert_true(fx_max_diff(want, got, w.f.m->n_vocab) < 1e-4);
            assert_int_equal(x.read, x.seen);
            assert_int_equal(x.n_recall, w.f.m->n_layers * w.f.m->n_heads);
            assert_true(fabs(x.recall / (double)x.n_recall - 1) < 1e-5);
        }
        ibid_seq_close(a);
        ibid_seq_close(b);
        close_world(&w);
    }
}

/* With one layer and one kv head, masks can say what was left out: then full attention gives the
 * same, and what it gave up is what was measured. */
static void test_masks(void **state) {
    (void)state;
    for (int type = IBID_KV_F32; type <= IBID_KV_Q8_0; type++) {
        world w;
        ibid_seq *a = NULL, *b = NULL;
        float want[VOCAB_ROOM], got[VOCAB_ROOM];
        ibid_test_gguf spec = fx_shapes[2];
        spec.n_layers = 1;
        open_world(&w, spec, NULL, 1, (ibid_kv_type)type);
        uint32_t at = start(&w, &a);
        ibid_select x = {.share = 0.3, .measure = true};
        decode(&w, a, at, 0, &x, got);
        const ibidi_pick *p = a->pick;
        size_t left_out = 0, live_out = 0;
        for (size_t i = 0; i < p->n; i++) {
            if (p->chosen[i / 64] >> i % 64 & 1) continue;
            const ibidi_unit *u = &p->units[i];
            if (u->segment > BLOCKS) live_out++;
            if (u->segment <= BLOCKS) w.masks[u->segment][u->t0 / 64] = ~UINT64_C(0);
            left_out += u->n;
        }
        assert_int_equal(x.read + left_out, x.seen);
        assert_true((double)x.read >= 0.3 * (double)x.seen &&
                    (double)x.read < 0.3 * (double)x.seen + 64);
        assert_true(x.recall > 0 && x.recall < (double)x.n_recall);
        /* Again over the same KV, every block with its mask; live pages as a block of their own. */
        uint64_t offset = 0, live_mask[(LIVE + 63) / 64] = {0};
        fx_kv live = fx_export(w.f.m, a, 0, LIVE, 0, IBID_KV_F32);
        for (size_t i = p->n_stored; i < p->n; i++)
            if (!(p->chosen[i / 64] >> i % 64 & 1)) live_mask[p->units[i].t0 / 64] = ~UINT64_C(0);
        must(ibid_seq_open(w.f.e, 0, &b));
        for (size_t i = 0; i <= BLOCKS; i++) {
            ibid_segment g = {.layers = w.kv[i].layers,
                              .local0 = i ? PREFIX : 0,
                              .offset = i ? offset : 0,
                              .masked = w.masks[i]};
            must(ibid_seq_add_segment(b, &g));
            if (i) offset += length_of(i);
        }
        ibid_segment g = {.layers = live.layers, .local0 = at - LIVE, .masked = live_mask};
        must(ibid_seq_add_segment(b, &g));
        decode(&w, b, at, 0, NULL, want);
        printf("masks: kv type %d, %zu of %zu tokens left out, %zu live pages of them, recall "
               "%.3f, max |logit diff| %.2g\n",
               type, left_out, (size_t)x.seen, live_out, x.recall / (double)x.n_recall,
               fx_max_diff(want, got, w.f.m->n_vocab));
        assert_true(fx_max_diff(want, got, w.f.m->n_vocab) < 1e-4);
        ibid_seq_close(a);
        ibid_seq_close(b);
        fx_kv_free(&live);
        close_world(&w);
    }
}

/* More read, more recalled; and a choice by summaries is worth more than one of the last pages. */
static void test_share(void **state) {
    static const double shares[] = {0.15, 0.3, 0.6};
    world w;
    ibid_seq *s = NULL;
    float logits[VOCAB_ROOM];
    double before = 0;
    (void)state;
    open_world(&w, fx_shapes[2], NULL, 2, IBID_KV_F16);
    uint32_t at = start(&w, &s);
    for (size_t i = 0; i < 3; i++) {
        ibid_select x = {.share = shares[i], .measure = true};
        ibid_seq_truncate(s, LIVE);
        decode(&w, s, at, 0, &x, logits);
        double share = (double)x.read / (double)x.seen, recall = x.recall / (double)x.n_recall;
        printf("share: %.3f read, recall %.3f\n", share, recall);
        assert_true(share >= shares[i] && share < shares[i] + 0.05);
        assert_true(recall > before && recall > share);
        before = recall;
    }
    ibid_seq_close(s);
    close_world(&w);
}

/* Alone or in a batch, on one thread or three, fresh or after other rows were dropped. */
static void test_same_bits(void **state) {
    float first[2][VOCAB_ROOM], got[2][VOCAB_ROOM], full[VOCAB_ROOM];
    float mass[2][1 + BLOCKS][BLOCK];
    (void)state;
    for (size_t threads = 1; threads <= 3; threads++) {
        world w;
        ibid_seq *s[3];
        uint32_t at = 0;
        float *of[1 + BLOCKS], *other[1 + BLOCKS];
        open_world(&w, fx_shapes[1], NULL, threads, IBID_KV_Q8_0);
        for (size_t i = 0; i < 3; i++) at = start(&w, &s[i]);
        for (size_t i = 0; i <= BLOCKS; i++) {
            of[i] = mass[0][i];
            other[i] = mass[1][i];
        }
        memset(mass, 0, sizeof mass);
        ibid_select x = {.share = 0.2}, y = {.share = 0.4};
        ibid_probe probe = {.mass = of, .n_rows = 1}, again = {.mass = other, .n_rows = 1};
        ibid_step steps[3];
        for (size_t i = 0; i < 3; i++)
            steps[i] = (ibid_step){.seq = s[i],
                                   .tokens = w.tokens + 7,
                                   .positions = &at,
                                   .n = 1,
                                   .n_logits = 1,
                                   .logits = i < 2 ? got[i] : full};
        steps[0].select = &x;
        steps[0].probe = &probe;
        steps[1].select = &y;
        must(ibid_engine_forward(w.f.e, steps, 3, NULL));
        if (threads == 1) memcpy(first, got, sizeof got);
        assert_memory_equal(first, got, sizeof got);
        /* A block's whole attention goes to what was read of it. */
        double sum = 0;
        for (size_t i = 0; i <= BLOCKS; i++)
            for (size_t t = 0; t < length_of(i); t++) sum += (double)mass[0][i][t];
        assert_true(sum > 0 && sum < (double)(w.f.m->n_layers * w.f.m->n_heads) * 1.001);
        /* Dropped, others in their place, dropped again. */
        ibid_seq_truncate(s[0], 100);
        fx_forward(w.f.e, s[0], at - LIVE + 100, w.tokens + 900, 250, 0, NULL);
        ibid_select z = {.share = 0.2};
        uint32_t later = at - LIVE + 350;
        ibid_step step = {
            .seq = s[0], .tokens = w.tokens, .positions = &later, .n = 1, .select = &z};
        must(ibid_engine_forward(w.f.e, &step, 1, NULL));
        ibid_seq_truncate(s[0], 100);
        fx_forward(w.f.e, s[0], at - LIVE + 100, w.tokens + 2600, LIVE - 100, 0, NULL);
        steps[0].probe = &again;
        steps[0].select = &z;
        must(ibid_engine_forward(w.f.e, steps, 1, NULL));
        assert_memory_equal(first[0], got[0], sizeof got[0]);
        assert_memory_equal(mass[0], mass[1], sizeof mass[0]);
        for (size_t i = 0; i < 3; i++) ibid_seq_close(s[i]);
        close_world(&w);
    }
}

static void test_refuses(void **state) {
    static const double bad[] = {0, -0.5, NAN};
    fx_model f;
    ibid_seq *s = NULL;
    int32_t tokens[3] = {5, 6, 7};
    uint32_t at[3] = {0, 1, 2};
    float logits[VOCAB_ROOM], want[VOCAB_ROOM];
    (void)state;
    fx_open(&f, &fx_shapes[0], NULL, 1);
    must(ibid_seq_open(f.e, 0, &s));
    for (size_t i = 0; i < 3; i++) {
        ibid_select x = {.share = bad[i]};
        ibid_step step = {.seq = s, .tokens = tokens, .positions = at, .n = 1, .select = &x};
        assert_int_equal(ibid_engine_forward(f.e, &step, 1, NULL), IBID_INVAL);
    }
    /* Several rows, or everything: full attention, and nothing is counted. */
    ibid_select x = {.share = 0.1};
    ibid_step step = {
        .seq = s, .tokens = tokens, .positions = at, .n = 3, .n_logits = 1, .logits = want};
    must(ibid_engine_forward(f.e, &step, 1, NULL));
    ibid_seq_truncate(s, 0);
    step.logits = logits;
    step.select = &x;
    must(ibid_engine_forward(f.e, &step, 1, NULL));
    assert_memory_equal(want, logits, f.m->n_vocab * sizeof *want);
    assert_int_equal(x.seen, 0);
    ibid_seq_close(s);
    fx_close(&f);
}

/* ---- The default model ---- */

enum { TEXT = 2600, GIVEN = 24, TEXT_ROOM = 8192 };

static size_t read_sample(const ibid_model *m, int32_t *ids) {
    static char text[65536];
    ibid_token *t = NULL;
    size_t n = 0, n_ids = 0;
    FILE *f = fopen("attention/plan/sample.txt", "rb");
    assert_non_null(f);
    n = fread(text, 1, sizeof text, f);
    (void)fclose(f);
    must(ibid_tokenize(m->tokenizer, text, n, false, &t, &n_ids));
    assert_true(n_ids >= TEXT + GIVEN && n_ids <= TEXT_ROOM);
    for (size_t i = 0; i < n_ids; i++) ids[i] = t[i].id;
    ibid_free(t);
    return n_ids;
}

/* The text's next tokens, given one by one behind its stored beginning; logits [GIVEN, n_vocab]. */
static void give(ibid_engine *e, const fx_kv *kv, const int32_t *ids, ibid_select *x,
                 float *logits) {
    size_t vocab = ibid_engine_model(e)->n_vocab;
    ibid_segment g = {.layers = kv->layers};
    ibid_seq *s = NULL;
    must(ibid_seq_open(e, GIVEN, &s));
    must(ibid_seq_add_segment(s, &g));
    for (uint32_t i = 0; i < GIVEN; i++) {
        uint32_t at = TEXT + i;
        ibid_step step = {.seq = s,
                          .tokens = ids + at,
                          .positions = &at,
                          .n = 1,
                          .n_logits = 1,
                          .logits = logits + i * vocab,
                          .select = x};
        must(ibid_engine_forward(e, &step, 1, NULL));
    }
    ibid_seq_close(s);
}

/* On a real text a small share holds most of the attention, and says nearly the same. Bounds with
 * room: measured 0.83 and 0.90 of the attention, 0.012 and 0.007 nats, 23 and 22 of 24 tokens. */
static void test_default_model(void **state) {
    static const struct {
        double share, recall, kl, same;
    } least[] = {{0.2, 0.78, 0.06, 0.8}, {0.4, 0.86, 0.04, 0.8}};
    const char *path = fx_default_model();
    ibid_model *m = NULL;
    ibid_engine *e = NULL;
    int32_t *ids = calloc(TEXT_ROOM, sizeof *ids);
    (void)state;
    if (!path) {
        free(ids);
        skip();
    }
    must(ibid_model_open(path, NULL, &m));
    must(ibid_engine_open(m, &(ibid_engine_opts){.int8 = true}, &e));
    (void)read_sample(m, ids);
    fx_kv kv = fx_encode(e, NULL, 0, ids, TEXT, IBID_KV_Q8_0);
    size_t vocab = m->n_vocab;
    float *want = calloc(GIVEN * vocab, sizeof *want), *got = calloc(GIVEN * vocab, sizeof *got);
    give(e, &kv, ids, NULL, want);
    for (size_t k = 0; k < 2; k++) {
        ibid_select x = {.share = least[k].share, .measure = true};
        double kl = 0, same = 0;
        give(e, &kv, ids, &x, got);
        for (size_t i = 0; i < GIVEN; i++) {
            size_t a = 0, b = 0;
            for (size_t v = 1; v < vocab; v++) {
                if (want[i * vocab + v] > want[i * vocab + a]) a = v;
                if (got[i * vocab + v] > got[i * vocab + b]) b = v;
            }
            same += a == b ? 1.0 / GIVEN : 0;
            kl += fx_kl(want + i * vocab, got + i * vocab, vocab) / GIVEN;
        }
        double recall = x.recall / (double)x.n_recall, read = (double)x.read / (double)x.seen;
        printf("default model: %.3f read, recall %.3f, KL divergence %.4f nats, %.3f the same "
               "likeliest token\n",
               read, recall, kl, same);
        assert_true(read < least[k].share + 0.05);
        assert_true(recall > least[k].recall && kl < least[k].kl && same > least[k].same);
    }
    free(ids);
    free(want);
    free(got);
    fx_kv_free(&kv);
    ibid_engine_close(e);
    ibid_model_close(m);
}

enum { NEEDLES = 6, SENTENCE = 64 };
static const char *const houses[NEEDLES] = {"Alder", "Juniper", "Rowan", "Elm", "Poplar", "Yew"};
static const unsigned numbers[NEEDLES] = {482199, 351807, 609374, 275518, 940263, 716485};

static size_t ids_of(const ibid_model *m, const char *text, int32_t *out) {
    ibid_token *t = NULL;
    size_t n = 0;
    must(ibid_tokenize(m->tokenizer, text, strlen(text), false, &t, &n));
    assert_true(n <= SENTENCE / 2);
    for (size_t i = 0; i < n; i++) out[i] = t[i].id;
    ibid_free(t);
    return n;
}

/* A needle's question and answer, which begins at token *split. */
static size_t needle(const ibid_model *m, size_t i, int32_t *out, size_t *split) {
    char text[128];
    (void)snprintf(text, sizeof text, "\n\nThe secret number of %s house is", houses[i]);
    *split = ids_of(m, text, out);
    (void)snprintf(text, sizeof text, " %u.\n\n", numbers[i]);
    return *split + ids_of(m, text, out + *split);
}

/* How many tokens of all answers are the likeliest, each token a step. */
static size_t ask_all(ibid_engine *e, const fx_kv *kv, size_t stored, double share, size_t *all) {
    const ibid_model *m = ibid_engine_model(e);
    float *logits = calloc(m->n_vocab, sizeof *logits);
    size_t right = 0;
    *all = 0;
    for (size_t k = 0; k < NEEDLES; k++) {
        int32_t ids[SENTENCE];
        size_t split = 0, n = needle(m, k, ids, &split);
        ibid_segment g = {.layers = kv->layers};
        ibid_select x = {.share = share, .least = 1};
        ibid_seq *s = NULL;
        must(ibid_seq_open(e, SENTENCE, &s));
        must(ibid_seq_add_segment(s, &g));
        for (size_t i = 0; i + 1 < n; i++) {
            uint32_t at = (uint32_t)(stored + i);
            ibid_step step = {.seq = s,
                              .tokens = ids + i,
                              .positions = &at,
                              .n = 1,
                              .n_logits = 1,
                              .logits = logits,
                              .select = share < 1 ? &x : NULL};
            size_t best = 0;
            must(ibid_engine_forward(e, &step, 1, NULL));
            for (size_t v = 1; v < m->n_vocab; v++)
                if (logits[v] > logits[best]) best = v;
            if (i + 1 < split) continue;
            right += (int32_t)best == ids[i + 1];
            (*all)++;
        }
        ibid_seq_close(s);
    }
    free(logits);
    return right;
}

/* Numbers hidden in a text are found by choosing as they are by full attention. Measured: 46 tokens
 * of 54, full attention 44; 13 where pages rank by their keys' means alone. */
static void test_needles(void **state) {
    const char *path = fx_default_model();
    ibid_model *m = NULL;
    ibid_engine *e = NULL;
    size_t n = 0, all = 0, split;
    (void)state;
    if (!path) skip();
    int32_t *text = calloc(TEXT_ROOM, sizeof *text), *ids = calloc(TEXT_ROOM, sizeof *ids);
    must(ibid_model_open(path, NULL, &m));
    must(ibid_engine_open(m, &(ibid_engine_opts){.int8 = true}, &e));
    (void)read_sample(m, text);
    for (size_t i = 0; i <= NEEDLES; i++) {
        size_t part = TEXT / (NEEDLES + 1);
        memcpy(ids + n, text + i * part, part * sizeof *ids);
        n += part;
        if (i < NEEDLES) n += needle(m, i, ids + n, &split);
    }
    fx_kv kv = fx_encode(e, NULL, 0, ids, n, IBID_KV_Q8_0);
    size_t full = ask_all(e, &kv, n, 1, &all), some = ask_all(e, &kv, n, 0.1, &all);
    printf("needles: of %zu tokens full attention has %zu right, a tenth of the context %zu\n", all,
           full, some);
    assert_true(2 * full > all && 8 * some >= 7 * full);
    free(text);
    free(ids);
    fx_kv_free(&kv);
    ibid_engine_close(e);
    ibid_model_close(m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_summary),      cmocka_unit_test(test_best_token),
        cmocka_unit_test(test_broken_query), cmocka_unit_test(test_choose),
        cmocka_unit_test(test_everything),   cmocka_unit_test(test_masks),
        cmocka_unit_test(test_share),        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_refuses),      cmocka_unit_test(test_default_model),
        cmocka_unit_test(test_needles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
