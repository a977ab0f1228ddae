/* Rows that read a share of their context on the device, against the CPU's engine that chooses
 * among the same stored pages: logits, probes, counts; beside rows that read everything; after live
 * rows were dropped; and from a pool that does not hold the context, against one that does. Pages
 * are whole ones here, so that the CPU's budget of tokens and the device's of pages are the same.
 */
#include "attention/engine_internal.h"
#include "attention/plan/gate.h"
#include "tests/support/check.h"
#include "tests/support/gguf_write.h"

#include "attention/cuda/device.h"
#include "attention/cuda/layout.h"
#ifdef IBIDI_EMULATED
#include "tests/support/emulator/device.h"
#endif

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { VOCAB = IBID_TEST_MIN_VOCAB, PAGE = 64, BLOCK = 2 * PAGE, BLOCKS = 6, LIVE = 70 };
enum { STORED = PAGE + BLOCKS * BLOCK, PAGES = STORED / PAGE };

typedef struct world {
    ibid_model *m;
    ibid_engine *cpu, *gpu;
    ibid_engine *small;           /* its pool does not hold a whole context; or NULL */
    ibid_kv_view *kv[1 + BLOCKS]; /* the prefix, then blocks encoded behind it */
} world;

static void tokens_of(size_t from, size_t n, uint32_t first, int32_t *tokens, uint32_t *positions) {
    for (size_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)(((from + i) * 89 + (from + i) * (from + i) % 31 + 7) % VOCAB);
        positions[i] = first + (uint32_t)i;
    }
}

static ibid_kv_view *encode(ibid_engine *e, const ibid_kv_view *prefix, size_t from, size_t n) {
    int32_t tokens[BLOCK];
    uint32_t positions[BLOCK];
    ibid_seq *s = NULL;
    ibid_kv_view *out = NULL;
    ibid_segment g = {.layers = prefix};
    MUST(ibid_seq_open(e, n, &s));
    if (prefix) MUST(ibid_seq_add_segment(s, &g));
    tokens_of(from, n, prefix ? PAGE : 0, tokens, positions);
    ibid_step step = {.seq = s, .tokens = tokens, .positions = positions, .n = n};
    MUST(ibid_engine_forward(e, &step, 1, NULL));
    MUST(ibid_gate_store(ibid_engine_model(e), s, 0, n, IBID_KV_F16, &out));
    ibid_seq_close(s);
    return out;
}

static void open_gpu(const world *w, size_t pool, bool graphs, ibid_engine **out) {
    ibid_engine_opts o = {.n_threads = 2, .backend = IBID_BACKEND_CUDA, .gpu_no_graphs = !graphs};
    o.gpu_kv = IBID_KV_F16;
    o.gpu_memory = pool;
    MUST(ibid_engine_open(w->m, &o, out));
}

/* cells: in the small pool, 0: none. */
static void open_world(world *w, const ibid_test_gguf *spec, size_t cells) {
    char path[] = "/tmp/ibid-gpu-select-XXXXXX";
    int fd = mkstemp(path);
    ibid_hash id = {{1}};
    CHECK(fd >= 0, "no temporary file");
    (void)close(fd);
    MUST(ibid_test_write_gguf(path, spec));
    MUST(ibid_model_open(path, &id, &w->m));
    (void)unlink(path);
    MUST(ibid_engine_open(w->m, &(ibid_engine_opts){.n_threads = 2}, &w->cpu));
    memset(w->kv, 0, sizeof w->kv);
    open_gpu(w, 64 << 20, true, &w->gpu);
    w->small = NULL;
    if (cells) open_gpu(w, cells * spec->n_kv_heads * ibidi_cu_head_bytes(64, 0), true, &w->small);
    w->kv[0] = encode(w->cpu, NULL, 0, PAGE);
    for (size_t i = 1; i <= BLOCKS; i++) w->kv[i] = encode(w->cpu, w->kv[0], 500 * i, BLOCK);
}

static void close_world(world *w) {
    for (size_t i = 0; i <= BLOCKS; i++) ibid_free(w->kv[i]);
    ibid_engine_close(w->small);
    ibid_engine_close(w->gpu);
    ibid_engine_close(w->cpu);
    ibid_model_close(w->m);
}

static void forward_for(ibid_engine *e, ibid_seq *s, size_t from, size_t n, uint32_t first,
                        bool will_select) {
    int32_t tokens[BLOCK];
    uint32_t positions[BLOCK];
    tokens_of(from, n, first, tokens, positions);
    ibid_step step = {
        .seq = s, .tokens = tokens, .positions = positions, .n = n, .will_select = will_select};
    MUST(ibid_engine_forward(e, &step, 1, NULL));
}

static void forward(ibid_engine *e, ibid_seq *s, size_t from, size_t n, uint32_t first) {
    forward_for(e, s, from, n, first, false);
}

/* first_id: 0: they are of no one else. */
static void add_blocks(const world *w, ibid_seq *s, uint64_t first_id) {
    for (size_t i = 0; i <= BLOCKS; i++) {
        ibid_segment g = {.layers = w->kv[i],
                          .local0 = i ? PAGE : 0,
                          .offset = i ? (i - 1) * BLOCK : 0,
                          .id = first_id ? first_id + i : 0};
        MUST(ibid_seq_add_segment(s, &g));
    }
}

/* All blocks, then `live` rows. */
static ibid_seq *start(const world *w, ibid_engine *e, size_t live, uint64_t first_id) {
    ibid_seq *s = NULL;
    MUST(ibid_seq_open(e, live, &s));
    add_blocks(w, s, first_id);
    for (size_t at = 0; at < live; at += LIVE)
        forward(e, s, 4000 + at, live - at < LIVE ? live - at : LIVE, STORED + (uint32_t)at);
    return s;
}

enum { ID = 9000 };

typedef struct outcome {
    float logits[VOCAB], mass[1 + BLOCKS][BLOCK];
    ibid_select select;
} outcome;

static ibid_step step_of(ibid_seq *s, const int32_t *token, const uint32_t *at, outcome *o,
                         ibid_probe *p, float **mass, uint64_t least, bool measure) {
    memset(o, 0, sizeof *o);
    for (size_t i = 0; i <= BLOCKS; i++) mass[i] = o->mass[i];
    o->select = (ibid_select){.share = 0.01, .least = least, .measure = measure};
    *p = (ibid_probe){.mass = mass, .n_rows = 1};
    return (ibid_step){.seq = s,
                       .tokens = token,
                       .positions = at,
                       .n = 1,
                       .n_logits = 1,
                       .logits = o->logits,
                       .probe = p,
                       .select = least ? &o->select : NULL};
}

/* One row behind `live` ones; least: tokens to read; 0: everything. */
static void decode_on(ibid_engine *e, ibid_seq *s, int32_t token, size_t live, uint64_t least,
                      bool measure, outcome *o) {
    uint32_t at = STORED + (uint32_t)live;
    float *mass[1 + BLOCKS];
    ibid_probe probe;
    ibid_step step = step_of(s, &token, &at, o, &probe, mass, least, measure);
    MUST(ibid_engine_forward(e, &step, 1, NULL));
}

/* The same, measured, and leaves the sequence as it was. */
static void decode(ibid_engine *e, ibid_seq *s, size_t live, uint64_t least, outcome *o) {
    decode_on(e, s, 77, live, least, least != 0, o);
    ibid_seq_truncate(s, live);
}

static double apart(const float *a, const float *b, size_t n) {
    double off = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - (double)b[i];
        off += d * d;
        size += (double)b[i] * (double)b[i];
    }
    return sqrt(off / size);
}

static size_t live_tail(size_t live) { /* live tokens that are always read, with the row */
    return live + 1 - (live > 128 ? (live - 128) / PAGE * PAGE : 0);
}

/* The same n pages of those that may be left out: as tokens on the CPU, as pages on the device. */
static void compare(const world *w, size_t live, size_t n, double *worst) {
    static outcome want, got, full, again;
    ibid_seq *c = start(w, w->cpu, live, ID), *g = start(w, w->gpu, live, ID);
    size_t tail = live_tail(live);
    size_t tail_pages = live / PAGE + 1 - (live + 1 - tail) / PAGE, heads = w->m->n_kv_heads;
    decode(w->cpu, c, live, tail + n * PAGE, &want);
    decode(w->gpu, g, live, (tail_pages + n) * PAGE, &got);
    decode(w->gpu, g, live, 0, &full);
    CHECK(full.select.seen == 0, "full attention counts %llu tokens",
          (unsigned long long)full.select.seen);
    CHECK(got.select.seen == want.select.seen && got.select.read == want.select.read,
          "%llu of %llu tokens read, %llu of %llu on the CPU", (unsigned long long)got.select.read,
          (unsigned long long)got.select.seen, (unsigned long long)want.select.read,
          (unsigned long long)want.select.seen);
    CHECK(got.select.read == w->m->n_layers * heads * (tail + n * PAGE), "%llu tokens read",
          (unsigned long long)got.select.read);
    double off = apart(got.logits, want.logits, VOCAB);
    double mass = apart(got.mass[0], want.mass[0], sizeof want.mass / sizeof(float));
    double from_full = apart(full.logits, want.logits, VOCAB);
    printf("%zu live rows, %zu pages: logits %.2g apart, mass %.2g; full attention's %.2g; recall "
           "%.3f, %.3f on the CPU\n",
           live, n, off, mass, from_full, got.select.recall / (double)got.select.n_recall,
           want.select.recall / (double)want.select.n_recall);
    CHECK(off < 4e-3 && mass < 1e-2, "logits %g apart, mass %g", off, mass);
    double recall = want.select.recall / (double)want.select.n_recall;
    CHECK(got.select.n_recall == want.select.n_recall && recall > 0.1 && recall < 0.99 &&
              fabs(got.select.recall - want.select.recall) < 2e-3 * want.select.recall,
          "recall %g of %llu, %g of %llu on the CPU", got.select.recall,
          (unsigned long long)got.select.n_recall, want.select.recall,
          (unsigned long long)want.select.n_recall);
    CHECK(from_full > 2 * off, "choosing changed nothing: %g", from_full);
    *worst = fmax(*worst, off);
    /* Dropped rows, others, dropped again: as before. */
    if (live > 150) {
        ibid_seq_truncate(g, 20);
        forward(w->gpu, g, 9000, 120, STORED + 20);
        forward(w->gpu, g, 9200, 90, STORED + 140);
        decode(w->gpu, g, 230, 6 * PAGE, &again);
        ibid_seq_truncate(g, 20);
        for (size_t at = 20, k; at < live; at += k) { /* the rows that start() gave */
            k = LIVE - at % LIVE < live - at ? LIVE - at % LIVE : live - at;
            forward(w->gpu, g, 4000 + at, k, STORED + (uint32_t)at);
        }
        decode(w->gpu, g, live, (tail_pages + n) * PAGE, &again);
        CHECK(again.select.read == got.select.read, "%llu tokens read",
              (unsigned long long)again.select.read);
        CHECK(apart(again.logits, want.logits, VOCAB) < 4e-3, "logits %g apart after a change",
              apart(again.logits, want.logits, VOCAB));
    }
    ibid_seq_close(c);
    ibid_seq_close(g);
}

/* One pass with a row that reads little, one that reads everything, one that reads more. */
static void batch(const world *w) {
    static outcome alone[3], got[3];
    static const uint64_t least[3] = {6 * PAGE, 0, 9 * PAGE};
    int32_t token = 77;
    uint32_t at = STORED + LIVE;
    float *mass[3][1 + BLOCKS];
    ibid_probe probes[3];
    ibid_step steps[3];
    ibid_seq *s[3];
    for (size_t i = 0; i < 3; i++) {
        s[i] = start(w, w->gpu, LIVE, ID);
        decode(w->gpu, s[i], LIVE, least[i], &alone[i]);
        steps[i] = step_of(s[i], &token, &at, &got[i], &probes[i], mass[i], least[i], i == 2);
    }
    MUST(ibid_engine_forward(w->gpu, steps, 3, NULL));
    for (size_t i = 0; i < 3; i++) {
        CHECK(apart(got[i].logits, alone[i].logits, VOCAB) < 1e-4, "row %zu in a batch: %g", i,
              apart(got[i].logits, alone[i].logits, VOCAB));
        CHECK(apart(got[i].mass[0], alone[i].mass[0], (1 + BLOCKS) * BLOCK) < 1e-4,
              "mass of row %zu in a batch", i);
        CHECK(got[i].select.read == alone[i].select.read, "row %zu in a batch", i);
        CHECK(i != 2 || fabs(got[i].select.recall - alone[i].select.recall) < 1e-4,
              "recall of row %zu in a batch", i);
        ibid_seq_close(s[i]);
    }
    CHECK(apart(got[0].logits, got[1].logits, VOCAB) > 1e-3, "choosing changed nothing");
}

static ibid_engine_gpu look_at(const ibid_engine *e) {
    ibid_engine_gpu look;
    CHECK(ibid_engine_gpu_look(e, &look), "no GPU");
    return look;
}

static void same(const outcome *got, const outcome *want, const char *what) {
    CHECK(memcmp(got->logits, want->logits, sizeof want->logits) == 0, "%s: logits differ", what);
    CHECK(memcmp(got->mass, want->mass, sizeof want->mass) == 0, "%s: masses differ", what);
    CHECK(got->select.read == want->select.read && got->select.seen == want->select.seen &&
              got->select.recall == want->select.recall,
          "%s: counts differ", what);
}

/* Steps of an answer that choose, recorded and not: the same bits, while pages of live rows come to
 * be chosen among, too, and now and then one is measured. */
static void record(const world *w) {
    enum { STEPS = 48, FIRST = 180 };
    static outcome want, got;
    ibid_engine *plain = NULL;
    open_gpu(w, 64 << 20, false, &plain);
    ibid_seq *a = start(w, w->gpu, FIRST, ID), *b = start(w, plain, FIRST, ID);
    uint64_t before = look_at(w->gpu).graph_steps;
    for (size_t i = 0; i < STEPS; i++) {
        int32_t token = (int32_t)(17 * i % VOCAB);
        uint64_t least = (6 + i / 20) * PAGE;
        decode_on(w->gpu, a, token, FIRST + i, least, i % 8 == 7, &got);
        decode_on(plain, b, token, FIRST + i, least, i % 8 == 7, &want);
        same(&got, &want, "recorded");
    }
    before = look_at(w->gpu).graph_steps - before;
    printf("%llu of %d steps that choose ran recorded\n", (unsigned long long)before, STEPS);
    CHECK(before > STEPS / 2 && look_at(plain).graph_steps == 0, "steps were not recorded");
    ibid_seq_close(a);
    ibid_seq_close(b);
    ibid_engine_close(plain);
}

/* ---- A pool that does not hold the context ---- */

/* Steps of an answer over a context that passes through the small pool, against the large one: bit
 * by bit the same. */
static void stream_one(const world *w, uint64_t id, size_t n) {
    static outcome want, got;
    static const struct {
        uint64_t least;
        bool measure;
        uint64_t passes; /* of all the context */
    } steps[9] = {{0, false, 1},        {6 * PAGE, false, 1}, {6 * PAGE, false, 0},
                  {6 * PAGE, false, 0}, {6 * PAGE, true, 1},  {7 * PAGE, false, 0},
                  {0, false, 1},        {5 * PAGE, false, 0}, {6 * PAGE, false, 0}};
    ibid_seq *g = start(w, w->gpu, LIVE, id), *s = start(w, w->small, LIVE, id);
    for (size_t i = 0; i < n; i++) {
        uint64_t before = look_at(w->small).streamed_steps;
        int32_t token = (int32_t)(31 * i % VOCAB);
#ifdef IBIDI_EMULATED
        uint64_t bytes = ibidi_emulator_uploaded();
#endif
        decode_on(w->small, s, token, LIVE + i, steps[i].least, steps[i].measure, &got);
#ifdef IBIDI_EMULATED
        size_t page = w->m->n_kv_heads * ibidi_cu_head_bytes(64, 0), layers = w->m->n_layers;
        bytes = ibidi_emulator_uploaded() - bytes;
        CHECK(steps[i].passes ? bytes > PAGES * layers * page : bytes < PAGES * layers * page / 2,
              "step %zu brought %llu bytes", i, (unsigned long long)bytes);
#endif
        decode_on(w->gpu, g, token, LIVE + i, steps[i].least, steps[i].measure, &want);
        same(&got, &want, "streamed");
        CHECK(look_at(w->small).streamed_steps - before == steps[i].passes, "step %zu streamed", i);
    }
    ibid_seq_close(g);
    ibid_seq_close(s);
}

/* A pass with rows of two streamed sequences that choose and one of one that reads all. */
static void stream_batch(const world *w) {
    static outcome want[3], got[3];
    static const uint64_t least[3] = {6 * PAGE, 0, 5 * PAGE};
    uint32_t at = STORED + LIVE;
    int32_t tokens[3] = {5, 9, 13};
    ibid_engine *engines[2] = {w->gpu, w->small};
    for (size_t e = 0; e < 2; e++) {
        float *mass[3][1 + BLOCKS];
        ibid_probe probes[3];
        ibid_step steps[3];
        ibid_seq *s[3];
        outcome *o = e ? got : want;
        for (size_t i = 0; i < 3; i++) {
            s[i] = start(w, engines[e], LIVE, i == 2 ? ID : ID + 100 * i);
            if (least[i]) decode(engines[e], s[i], LIVE, least[i], &o[i]); /* makes summaries */
        }
        for (size_t i = 0; i < 3; i++)
            steps[i] = step_of(s[i], &tokens[i], &at, &o[i], &probes[i], mass[i], least[i], false);
        MUST(ibid_engine_forward(engines[e], steps, 3, NULL));
        for (size_t i = 0; i < 3; i++) ibid_seq_close(s[i]);
    }
    for (size_t i = 0; i < 3; i++) same(&got[i], &want[i], "streamed in a batch");
}

/* A question's pass that knows what comes makes the summaries: nothing is streamed again. */
static void stream_forewarned(const world *w) {
    static outcome want, got;
    ibid_engine *engines[2] = {w->gpu, w->small};
    for (size_t e = 0; e < 2; e++) {
        ibid_seq *s = NULL;
        uint64_t before = look_at(engines[e]).streamed_steps;
        MUST(ibid_seq_open(engines[e], LIVE, &s));
        add_blocks(w, s, ID);
        forward_for(engines[e], s, 4000, LIVE, STORED, true);
        decode_on(engines[e], s, 3, LIVE, 6 * PAGE, false, e ? &got : &want);
        CHECK(look_at(engines[e]).streamed_steps - before == e, "streamed again");
        ibid_seq_close(s);
    }
    same(&got, &want, "forewarned");
}

/* Other sequences' live rows leave it no room for two layers: a typed error, and once they are gone
 * it is answered. */
static void stream_crowded(const world *w) {
    enum { OTHERS = 5 };
    ibid_seq *others[OTHERS], *s = NULL;
    int32_t token = 7;
    uint32_t at = STORED;
    ibid_step step = {.tokens = &token, .positions = &at, .n = 1};
    for (size_t i = 0; i < OTHERS; i++) {
        MUST(ibid_seq_open(w->small, LIVE, &others[i]));
        forward(w->small, others[i], 0, LIVE, 0);
    }
    MUST(ibid_seq_open(w->small, LIVE, &s));
    add_blocks(w, s, ID);
    step.seq = s;
    CHECK(ibid_engine_forward(w->small, &step, 1, NULL) == IBID_NOMEM, "a pool without room");
    for (size_t i = 0; i < OTHERS; i++) ibid_seq_close(others[i]);
    MUST(ibid_engine_forward(w->small, &step, 1, NULL));
    ibid_seq_close(s);
}

#ifdef IBIDI_EMULATED
/* No room for summaries: a row that would choose reads everything, and says so; others choose. */
static void no_room(const world *w) {
    static outcome full, got;
    ibid_seq *s = start(w, w->gpu, LIVE, ID);
    decode_on(w->gpu, s, 5, LIVE, 0, false, &full);
    ibid_seq_truncate(s, LIVE);
    ibidi_emulator_memory(ibidi_emulator_in_use() + 1024);
    for (size_t i = 0; i < 2; i++) {
        decode_on(w->gpu, s, 5, LIVE, 6 * PAGE, false, &got);
        ibid_seq_truncate(s, LIVE);
        CHECK(got.select.seen == 0, "%llu tokens seen", (unsigned long long)got.select.seen);
        same(&got, &full, "without room for summaries");
    }
    ibidi_emulator_memory(0);
    ibid_seq_close(s);
    s = start(w, w->gpu, LIVE, ID);
    decode_on(w->gpu, s, 5, LIVE, 6 * PAGE, false, &got);
    CHECK(got.select.seen > 0, "a sequence that has room does not choose");
    ibid_seq_close(s);
}
#endif

static void deep(void) {
    world w;
    ibid_test_gguf spec = {.n_layers = 8,
                           .n_embd = 128,
                           .n_heads = 4,
                           .n_kv_heads = 2,
                           .head_dim = 64,
                           .n_ff = 96,
                           .n_vocab = VOCAB,
                           .n_ctx = 2048,
                           .type = IBID_F16,
                           .seed = 7300};
    /* Two layers of the stored pages, three sequences' live rows, and what two of them choose. */
    open_world(&w, &spec, 2 * PAGES + 3 * 2 * spec.n_layers + 24);
    stream_one(&w, ID, 9);
    stream_one(&w, 0, 4);
    stream_forewarned(&w);
    stream_batch(&w);
    stream_crowded(&w);
#ifdef IBIDI_EMULATED
    no_room(&w);
#endif
    close_world(&w);
    printf("a context that passes through the pool is as others\n");
}

int main(void) {
    ibid_device *d = NULL;
    double worst = 0;
    ibid_err err = ibid_device_open(0, &d);
    if (err == IBID_NOTSUP) {
        printf("skipped: %s\n", ibid_err_detail());
        return 77;
    }
    MUST(err);
    ibid_device_close(d);
    for (size_t i = 0; i < 2; i++) {
        world w;
        ibid_test_gguf spec = {.n_layers = 2,
                               .n_embd = 256,
                               .n_heads = 4,
                               .n_kv_heads = i ? 1 : 2,
                               .n_ff = 224,
                               .n_vocab = VOCAB,
                               .n_ctx = 2048,
                               .type = i ? IBID_Q8_0 : IBID_F16,
                               .seed = 7100 + i,
                               .arch = i ? "qwen2" : NULL};
        open_world(&w, &spec, 0);
        compare(&w, LIVE, 4, &worst);
        compare(&w, LIVE, 9, &worst);
        compare(&w, 3 * LIVE, 5, &worst); /* a live page may be left out too */
        batch(&w);
        if (i) record(&w);
        close_world(&w);
    }
    deep();
    printf("all passed, logits %.2g apart at most\n", worst);
    return 0;
}
