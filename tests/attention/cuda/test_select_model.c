/* Rows that read a share of their context on the device, against the CPU's engine that chooses
 * among the same stored pages: logits, probes, counts; beside rows that read everything; after live
 * rows were dropped. Pages are whole ones here, so that the CPU's budget of tokens and the device's
 * of pages are the same. */
#include "attention/engine_internal.h"
#include "attention/plan/gate.h"
#include "tests/support/check.h"
#include "tests/support/gguf_write.h"

#include "attention/cuda/device.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { VOCAB = IBID_TEST_MIN_VOCAB, PAGE = 64, BLOCK = 2 * PAGE, BLOCKS = 6, LIVE = 70 };
enum { STORED = PAGE + BLOCKS * BLOCK, PAGES = STORED / PAGE };

typedef struct world {
    ibid_model *m;
    ibid_engine *cpu, *gpu;
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

static void open_world(world *w, const ibid_test_gguf *spec) {
    char path[] = "/tmp/ibid-gpu-select-XXXXXX";
    int fd = mkstemp(path);
    ibid_hash id = {{1}};
    CHECK(fd >= 0, "no temporary file");
    (void)close(fd);
    MUST(ibid_test_write_gguf(path, spec));
    MUST(ibid_model_open(path, &id, &w->m));
    (void)unlink(path);
    MUST(ibid_engine_open(w->m, &(ibid_engine_opts){.n_threads = 2}, &w->cpu));
    MUST(ibid_engine_open(w->m,
                          &(ibid_engine_opts){.n_threads = 2,
                                              .backend = IBID_BACKEND_CUDA,
                                              .gpu_kv = IBID_KV_F16,
                                              .gpu_memory = 64 << 20},
                          &w->gpu));
    w->kv[0] = encode(w->cpu, NULL, 0, PAGE);
    for (size_t i = 1; i <= BLOCKS; i++) w->kv[i] = encode(w->cpu, w->kv[0], 500 * i, BLOCK);
}

static void close_world(world *w) {
    for (size_t i = 0; i <= BLOCKS; i++) ibid_free(w->kv[i]);
    ibid_engine_close(w->gpu);
    ibid_engine_close(w->cpu);
    ibid_model_close(w->m);
}

static void forward(ibid_engine *e, ibid_seq *s, size_t from, size_t n, uint32_t first) {
    int32_t tokens[BLOCK];
    uint32_t positions[BLOCK];
    tokens_of(from, n, first, tokens, positions);
    ibid_step step = {.seq = s, .tokens = tokens, .positions = positions, .n = n};
    MUST(ibid_engine_forward(e, &step, 1, NULL));
}

/* All blocks, then `live` rows. */
static ibid_seq *start(const world *w, ibid_engine *e, size_t live) {
    ibid_seq *s = NULL;
    MUST(ibid_seq_open(e, live, &s));
    for (size_t i = 0; i <= BLOCKS; i++) {
        ibid_segment g = {.layers = w->kv[i],
                          .local0 = i ? PAGE : 0,
                          .offset = i ? (i - 1) * BLOCK : 0,
                          .id = 9000 + i};
        MUST(ibid_seq_add_segment(s, &g));
    }
    for (size_t at = 0; at < live; at += LIVE)
        forward(e, s, 4000 + at, live - at < LIVE ? live - at : LIVE, STORED + (uint32_t)at);
    return s;
}

typedef struct outcome {
    float logits[VOCAB], mass[1 + BLOCKS][BLOCK];
    ibid_select select;
} outcome;

static ibid_step step_of(ibid_seq *s, const int32_t *token, const uint32_t *at, outcome *o,
                         ibid_probe *p, float **mass, uint64_t least) {
    memset(o, 0, sizeof *o);
    for (size_t i = 0; i <= BLOCKS; i++) mass[i] = o->mass[i];
    o->select = (ibid_select){.share = 0.01, .least = least};
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

/* One row behind `live` ones; least: tokens to read; 0: everything. Leaves the sequence as it was.
 */
static void decode(ibid_engine *e, ibid_seq *s, size_t live, uint64_t least, outcome *o) {
    int32_t token = 77;
    uint32_t at = STORED + (uint32_t)live;
    float *mass[1 + BLOCKS];
    ibid_probe probe;
    ibid_step step = step_of(s, &token, &at, o, &probe, mass, least);
    MUST(ibid_engine_forward(e, &step, 1, NULL));
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
    ibid_seq *c = start(w, w->cpu, live), *g = start(w, w->gpu, live);
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
    printf("%zu live rows, %zu pages: logits %.2g apart, mass %.2g; full attention's %.2g\n", live,
           n, off, mass, from_full);
    CHECK(off < 4e-3 && mass < 1e-2, "logits %g apart, mass %g", off, mass);
    CHECK(from_full > 2 * off, "choosing changed nothing: %g", from_full);
    *worst = fmax(*worst, off);
    /* Dropped rows, others, dropped again: as before. */
    if (live > 150) {
        ibid_seq_truncate(g, 20);
        forward(w->gpu, g, 9000, 120, STORED + 20);
        forward(w->gpu, g, 9200, 90, STORED + 140);
        decode(w->gpu, g, 230, 6 * PAGE, &again);
        ibid_seq_truncate(g, 20);
        for (size_t at = 20; at < live; at += 50) {
            size_t k = live - at < 50 ? live - at : 50, first = at;
            for (size_t i = 0; i < k; i++) { /* the rows that start() gave */
                size_t row = first + i, from = 4000 + row / LIVE * LIVE + row % LIVE;
                forward(w->gpu, g, from, 1, STORED + (uint32_t)row);
            }
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
        s[i] = start(w, w->gpu, LIVE);
        decode(w->gpu, s[i], LIVE, least[i], &alone[i]);
        steps[i] = step_of(s[i], &token, &at, &got[i], &probes[i], mass[i], least[i]);
    }
    MUST(ibid_engine_forward(w->gpu, steps, 3, NULL));
    for (size_t i = 0; i < 3; i++) {
        CHECK(apart(got[i].logits, alone[i].logits, VOCAB) < 1e-4, "row %zu in a batch: %g", i,
              apart(got[i].logits, alone[i].logits, VOCAB));
        CHECK(apart(got[i].mass[0], alone[i].mass[0], (1 + BLOCKS) * BLOCK) < 1e-4,
              "mass of row %zu in a batch", i);
        CHECK(got[i].select.read == alone[i].select.read, "row %zu in a batch", i);
        ibid_seq_close(s[i]);
    }
    CHECK(apart(got[0].logits, got[1].logits, VOCAB) > 1e-3, "choosing changed nothing");
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
        open_world(&w, &spec);
        compare(&w, LIVE, 4, &worst);
        compare(&w, LIVE, 9, &worst);
        compare(&w, 3 * LIVE, 5, &worst); /* a live page may be left out too */
        batch(&w);
        close_world(&w);
    }
    printf("all passed, logits %.2g apart at most\n", worst);
    return 0;
}
