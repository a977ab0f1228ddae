/* The whole engine on the device against the CPU's, on tiny random models of every architecture:
 * plain passes, stored blocks behind offsets, recomputation, probes, decoding, batches; the pool's
 * eviction and sharing; failing calls and a lost device. */
#include "attention/cuda/device.h"
#include "attention/cuda/layout.h"
#include "attention/cuda/pages.h"
#include "attention/plan/recompute.h"
#include "tests/support/check.h"
#include "tests/support/emulator/device.h"
#include "tests/support/gguf_write.h"

#include "rpc/base/mem.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static size_t models = 3; /* the emulator is slow; a GPU takes all 6 */

enum { VOCAB = IBID_TEST_MIN_VOCAB, MAX_TOKENS = 200, PREFIX = 7, N_BLOCKS = 4, QUESTION = 9 };

typedef struct world {
    ibid_model *m;
    ibid_engine *cpu, *gpu;
} world;

static void open_model(world *w, const ibid_test_gguf *spec) {
    char path[] = "/tmp/ibid-gpu-XXXXXX";
    int fd = mkstemp(path);
    ibid_hash id = {{1}}; /* known, so that nothing hashes it */
    CHECK(fd >= 0, "no temporary file");
    (void)close(fd);
    MUST(ibid_test_write_gguf(path, spec));
    MUST(ibid_model_open(path, &id, &w->m));
    (void)unlink(path);
}

static void open_world(world *w, const ibid_test_gguf *spec, ibid_kv_type kv, size_t memory) {
    open_model(w, spec);
    MUST(ibid_engine_open(w->m, &(ibid_engine_opts){.n_threads = 2}, &w->cpu));
    MUST(ibid_engine_open(
        w->m,
        &(ibid_engine_opts){
            .n_threads = 2, .backend = IBID_BACKEND_CUDA, .gpu_kv = kv, .gpu_memory = memory},
        &w->gpu));
    CHECK(strcmp(ibid_engine_backend(w->gpu), "cuda") == 0, "%s", ibid_engine_backend(w->gpu));
}

static void close_world(world *w) {
    ibid_engine_close(w->gpu);
    ibid_engine_close(w->cpu);
    ibid_model_close(w->m);
}

static ibid_test_gguf spec_of(size_t i) {
    static const ibid_type types[] = {IBID_F32,  IBID_F16,  IBID_Q8_0,
                                      IBID_Q4_0, IBID_Q4_1, IBID_BF16};
    ibid_test_gguf s = {.n_layers = 2,
                        .n_embd = 256,
                        .n_heads = 4,
                        .n_kv_heads = i % 2 ? 1 : 2,
                        .n_ff = 224,
                        .n_vocab = VOCAB,
                        .n_ctx = 2048,
                        .type = types[i % 6],
                        .seed = 7000 + i,
                        .tied = i % 2};
    if (i % 3 == 1) s.arch = "qwen2", s.rope_theta = 1000000;
    if (i % 3 == 2) s.arch = "qwen3", s.head_dim = 128, s.rope_theta = 1000000;
    if (i % 3 == 0) s.rope_freqs = true, s.biases = i % 2;
    return s;
}

static int32_t token_at(size_t i) {
    return (int32_t)((i * 97 + 41 + i * i % 13) % VOCAB);
}

static void fill(int32_t *tokens, uint32_t *positions, size_t n, size_t from, uint32_t first) {
    for (size_t i = 0; i < n; i++) {
        tokens[i] = token_at(from + i);
        positions[i] = first + (uint32_t)i;
    }
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

static size_t top(const float *l) {
    size_t best = 0;
    for (size_t v = 1; v < VOCAB; v++)
        if (l[v] > l[best]) best = v;
    return best;
}

/* Logits of n tokens, the last ones one by one. */
static float *plain(ibid_engine *e, size_t n, size_t decoded) {
    int32_t tokens[MAX_TOKENS];
    uint32_t positions[MAX_TOKENS];
    float *logits = calloc(n * VOCAB, sizeof *logits);
    ibid_seq *s = NULL;
    fill(tokens, positions, n, 0, 3);
    MUST(ibid_seq_open(e, n, &s));
    for (size_t at = 0, k = n - decoded; at < n; at += k, k = 1) {
        ibid_step step = {.seq = s, .tokens = tokens + at, .positions = positions + at, .n = k};
        step.n_logits = k;
        step.logits = logits + at * VOCAB;
        MUST(ibid_engine_forward(e, &step, 1, NULL));
    }
    ibid_seq_close(s);
    return logits;
}

static void test_plain(void) {
    size_t agree = 0, all = 0;
    for (size_t i = 0; i < models; i++) {
        for (int kv = IBID_KV_F16; kv <= IBID_KV_Q8_0; kv++) {
            world w;
            ibid_test_gguf spec = spec_of(i);
            size_t n = i == 0 && kv == IBID_KV_F16 ? 70 : models > 3 ? 130 : 20;
            open_world(&w, &spec, (ibid_kv_type)kv, 0);
            float *want = plain(w.cpu, n, 0), *got = plain(w.gpu, n, 5);
            double d = apart(got, want, n * VOCAB);
            for (size_t r = 0; r < n; r++) agree += top(got + r * VOCAB) == top(want + r * VOCAB);
            all += n;
            printf("%s %s, %s KV: %.2g apart\n", spec.arch ? spec.arch : "llama",
                   ibid_type_name(spec.type), kv == IBID_KV_F16 ? "f16" : "q8_0", d);
            CHECK(d < (kv == IBID_KV_F16 ? 4e-3 : 2e-2), "%g", d);
            free(want), free(got);
            close_world(&w);
        }
    }
    printf("top-1 agrees in %zu of %zu\n", agree, all);
    CHECK(agree * 100 >= all * 99, "top-1");
}

/* ---- Stored blocks ---- */

typedef struct stored {
    ibid_kv_view layers[4];
    void *memory[16];
    size_t n_memory;
} stored;

static void *planes(stored *st, size_t bytes) {
    void *p = ibid_alloc_aligned(64, ibid_align_up(bytes, 64));
    CHECK(p, "no memory");
    st->memory[st->n_memory++] = p;
    return p;
}

/* A block encoded behind the prefix by an engine, as KV of a type. */
static void encode(ibid_engine *e, const ibid_segment *prefix, size_t from, uint32_t first,
                   size_t n, ibid_kv_type type, stored *st) {
    int32_t tokens[MAX_TOKENS];
    uint32_t positions[MAX_TOKENS];
    const ibid_model *m = ibid_engine_model(e);
    size_t count = m->n_kv_heads * n * m->head_dim;
    ibid_seq *s = NULL;
    memset(st, 0, sizeof *st);
    fill(tokens, positions, n, from, first);
    MUST(ibid_seq_open(e, n, &s));
    if (prefix) MUST(ibid_seq_add_segment(s, prefix));
    ibid_step step = {.seq = s, .tokens = tokens, .positions = positions, .n = n};
    MUST(ibid_engine_forward(e, &step, 1, NULL));
    for (size_t l = 0; l < m->n_layers; l++) {
        ibid_kv_view *v = &st->layers[l];
        *v = (ibid_kv_view){
            .type = type, .n_tokens = n, .n_kv_heads = m->n_kv_heads, .head_dim = m->head_dim};
        v->k = planes(st, count * 4);
        v->v = planes(st, count * 4);
        if (type == IBID_KV_Q8_0) v->k_scale = planes(st, count / 16);
        if (type == IBID_KV_Q8_0) v->v_scale = planes(st, count / 16);
        MUST(ibid_seq_export(s, l, 0, n, 0, v));
    }
    ibid_seq_close(s);
}

static void drop(stored *st) {
    while (st->n_memory) ibid_free(st->memory[--st->n_memory]);
}

typedef struct corpus {
    stored prefix, blocks[N_BLOCKS];
    ibid_segment first;
    ibid_placed_block placed[N_BLOCKS];
    int32_t tokens[N_BLOCKS][MAX_TOKENS], question[QUESTION];
    size_t sizes[N_BLOCKS];
} corpus;

static void make_corpus(corpus *c, ibid_engine *e, ibid_kv_type type, uint64_t id) {
    static const size_t sizes[N_BLOCKS] = {65, 7, 1, 10};
    uint32_t unused[MAX_TOKENS];
    uint64_t at = PREFIX;
    encode(e, NULL, 0, 0, PREFIX, type, &c->prefix);
    c->first = (ibid_segment){.layers = c->prefix.layers, .id = id};
    for (size_t b = 0; b < N_BLOCKS; b++) {
        c->sizes[b] = sizes[b];
        fill(c->tokens[b], unused, sizes[b], 50 * b + 11, 0);
        encode(e, &c->first, 50 * b + 11, PREFIX, sizes[b], type, &c->blocks[b]);
        c->placed[b] = (ibid_placed_block){.layers = c->blocks[b].layers,
                                           .tokens = c->tokens[b],
                                           .local0 = PREFIX,
                                           .offset = at - PREFIX,
                                           .id = id ? id + b + 1 : 0};
        at += sizes[b];
    }
    fill(c->question, unused, QUESTION, 500, 0);
}

static void free_corpus(corpus *c) {
    drop(&c->prefix);
    for (size_t b = 0; b < N_BLOCKS; b++) drop(&c->blocks[b]);
}

static void ask(ibid_engine *e, const corpus *c, double share, float *logits, size_t *recomputed) {
    ibid_asked a;
    ibid_question q = {.prefix = &c->first,
                       .blocks = c->placed,
                       .n_blocks = N_BLOCKS,
                       .tokens = c->question,
                       .n = QUESTION,
                       .share = share};
    MUST(ibid_question_run(e, &q, 4, NULL, &a, logits));
    if (recomputed) *recomputed = a.choice.n_rows;
    ibid_asked_close(&a);
}

/* One causal pass over everything, live but for the prefix. */
static void causal(ibid_engine *e, const corpus *c, float *logits) {
    enum { ALL = 65 + 7 + 1 + 10 + QUESTION };
    int32_t tokens[ALL];
    uint32_t positions[ALL];
    size_t n = 0;
    ibid_seq *s = NULL;
    for (size_t b = 0; b < N_BLOCKS; b++)
        for (size_t i = 0; i < c->sizes[b]; i++) tokens[n++] = c->tokens[b][i];
    for (size_t i = 0; i < QUESTION; i++) tokens[n++] = c->question[i];
    for (size_t i = 0; i < n; i++) positions[i] = PREFIX + (uint32_t)i;
    MUST(ibid_seq_open(e, n, &s));
    MUST(ibid_seq_add_segment(s, &c->first));
    ibid_step step = {.seq = s, .tokens = tokens, .positions = positions, .n = n, .n_logits = 1};
    step.logits = logits;
    MUST(ibid_engine_forward(e, &step, 1, NULL));
    ibid_seq_close(s);
}

static void test_stored(void) {
    for (size_t i = 0; i < models; i++) {
        ibid_kv_type kv = i % 2 ? IBID_KV_F16 : IBID_KV_Q8_0;
        float want[VOCAB], got[VOCAB], again[VOCAB];
        world w;
        corpus c;
        size_t n_want, n_got;
        ibid_test_gguf spec = spec_of(i);
        open_world(&w, &spec, kv, 0);
        make_corpus(&c, w.cpu, i % 3 == 2 ? IBID_KV_F32 : kv, 100 * (i + 1));
        ask(w.cpu, &c, 0, want, NULL);
        ask(w.gpu, &c, 0, got, NULL);
        double d = apart(got, want, VOCAB), oracle;
        CHECK(d < 2e-2, "stored: %g", d);
        ask(w.gpu, &c, 0, again, NULL); /* from the pool this time */
        CHECK(memcmp(got, again, sizeof got) == 0, "a second question differs");
        ask(w.cpu, &c, 0.4, want, &n_want);
        ask(w.gpu, &c, 0.4, got, &n_got);
        CHECK(n_want == n_got, "recomputed %zu, not %zu", n_got, n_want);
        ask(w.gpu, &c, 1, got, NULL); /* the oracle: all recomputed is one causal pass */
        causal(w.gpu, &c, again);
        oracle = apart(got, again, VOCAB);
        CHECK(oracle < 1e-3, "recompute 1 is %g off the causal pass", oracle);
        causal(w.cpu, &c, want);
        d = fmax(d, apart(again, want, VOCAB));
        CHECK(d < 2e-2, "causal: %g", d);
        printf("model %zu: stored %.2g apart, oracle %.2g\n", i, d, oracle);
        free_corpus(&c);
        /* KV encoded on the device, used by the CPU. */
        make_corpus(&c, w.gpu, kv, 0);
        ask(w.cpu, &c, 0, want, NULL);
        ask(w.gpu, &c, 0, got, NULL);
        d = apart(got, want, VOCAB);
        CHECK(d < 2e-2, "encoded on the device: %g", d);
        free_corpus(&c);
        close_world(&w);
    }
}

/* ---- Decoding: recorded steps, tokens drawn on the device ---- */

enum { DECODED = 24 };

typedef struct decoded {
    float logits[DECODED][VOCAB], mass[MAX_TOKENS];
    int32_t drawn[DECODED];
} decoded;

/* Steps behind a question over stored blocks, of two sequences together from the middle on; every
 * third token is drawn there, the others' logits come here. */
static void decode(ibid_engine *e, const corpus *c, bool draws, decoded *out) {
    ibid_asked a[2];
    float *mass[N_BLOCKS + 1] = {NULL, out->mass};
    ibid_question q = {.prefix = &c->first, .blocks = c->placed, .n_blocks = N_BLOCKS};
    q.tokens = c->question;
    q.n = QUESTION;
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < 2; i++) {
        q.share = i ? 0.9 : 0; /* the second one's live rows cross a page's end */
        MUST(ibid_question_run(e, &q, DECODED, NULL, &a[i], out->logits[0]));
    }
    for (size_t i = 0; i < DECODED; i++) {
        ibid_step steps[2];
        uint32_t at[2] = {a[0].position++, a[1].position};
        int32_t token = token_at(900 + i);
        ibid_probe probe = {.mass = mass, .n_rows = 1};
        ibid_draw draw = {.temperature = i % 2 ? 0.8f : 0, .top_p = 0.9f, .uniform = 0.37f};
        float other[VOCAB];
        size_t n = i < DECODED / 2 ? 1 : 2;
        for (size_t k = 0; k < n; k++)
            steps[k] = (ibid_step){
                .seq = a[k].seq, .tokens = &token, .positions = &at[k], .n = 1, .n_logits = 1};
        steps[0].probe = &probe;
        steps[0].logits = out->logits[i];
        steps[1].logits = other;
        if (draws && i % 3 == 2) steps[0].draw = &draw, steps[0].logits = NULL;
        if (n == 2) a[1].position++;
        MUST(ibid_engine_forward(e, steps, n, NULL));
        out->drawn[i] = draw.token;
    }
    for (size_t i = 0; i < 2; i++) ibid_asked_close(&a[i]);
}

static void test_decoding(void) {
    world w;
    corpus c;
    ibid_engine *plain = NULL;
    ibid_engine_gpu look;
    ibid_test_gguf spec = spec_of(0);
    decoded *got = calloc(3, sizeof *got), *want = got + 1, *drawn = got + 2;
    spec.n_layers = 1;
    open_world(&w, &spec, IBID_KV_Q8_0, 8 << 20);
    MUST(ibid_engine_open(w.m,
                          &(ibid_engine_opts){.n_threads = 2,
                                              .backend = IBID_BACKEND_CUDA,
                                              .gpu_memory = 8 << 20,
                                              .gpu_no_graphs = true},
                          &plain));
    make_corpus(&c, w.cpu, IBID_KV_Q8_0, 40);
    decode(plain, &c, false, want);
    decode(w.gpu, &c, false, got);
    CHECK(memcmp(got, want, sizeof *got) == 0, "recorded steps differ");
    CHECK(ibid_engine_gpu_look(w.gpu, &look) && look.graph_steps > DECODED / 2,
          "only %llu steps were recorded ones", (unsigned long long)look.graph_steps);
    printf("%llu of %d steps ran recorded\n", (unsigned long long)look.graph_steps, DECODED);
    CHECK(look.hits > 0 && look.pool_used > 0, "the pool is not used");
    CHECK(ibid_engine_gpu_look(plain, &look) && look.graph_steps == 0, "recorded all the same");
    decode(w.gpu, &c, true, drawn);
    for (size_t i = 0; i < DECODED; i++) {
        if (i % 3 != 2) {
            CHECK(memcmp(drawn->logits[i], want->logits[i], sizeof want->logits[i]) == 0,
                  "beside drawn tokens logits differ");
            continue;
        }
        double all = 0, above = 0, t = 0.8,
               mine = exp((double)want->logits[i][drawn->drawn[i]] / t);
        for (size_t v = 0; v < VOCAB; v++) {
            double weight = exp((double)want->logits[i][v] / t);
            all += weight;
            if (weight > mine) above += weight;
        }
        if (i % 2)
            CHECK(above < 0.9 * all, "token %d is outside of top-p", drawn->drawn[i]);
        else
            CHECK((size_t)drawn->drawn[i] == top(want->logits[i]), "greedy: %d", drawn->drawn[i]);
    }
    ibid_draw draw = {.top_p = 1};
    ibid_step bad = {.n_logits = 1, .draw = &draw};
    MUST(ibid_seq_open(w.cpu, 1, &bad.seq));
    CHECK(ibid_engine_forward(w.cpu, &bad, 1, NULL) == IBID_INVAL, "the CPU draws");
    ibid_seq_close(bad.seq);
    ibid_engine_close(plain);
    free_corpus(&c);
    close_world(&w);
    free(got);
}

/* ---- The pool, and failing ---- */

static void test_pool(void) {
    ibid_device *d = NULL;
    ibidi_cu_stream s = NULL;
    ibidi_pages *p = NULL;
    ibidi_block *a, *b, *c, *again;
    uint32_t cell;
    MUST(ibid_device_open(0, &d));
    MUST(ibid_device_stream_open(d, &s));
    MUST(ibidi_pages_open(d, s, 512, 12, 1, &p));
    MUST(ibidi_pages_pin(p, 1, 2, 2, &a));
    MUST(ibidi_pages_pin(p, 2, 2, 2, &b));
    MUST(ibidi_pages_pin(p, 3, 2, 2, &c));
    CHECK(ibidi_pages_take(p, &cell) == IBID_NOMEM, "a full pool gave a cell");
    CHECK(ibidi_pages_pin(p, 4, 2, 2, &again) == IBID_NOMEM, "a full pool took a block");
    c->loaded = 2;
    ibidi_pages_unpin(p, b);
    ibidi_pages_unpin(p, c);
    ibidi_pages_unpin(p, a);
    MUST(ibidi_pages_pin(p, 3, 2, 2, &again)); /* still there */
    CHECK(again == c && c->loaded == 2, "a block was lost");
    CHECK(ibidi_pages_pin(p, 3, 2, 3, &again) == IBID_INVAL, "a block of another shape");
    MUST(ibidi_pages_take(p, &cell)); /* b, used longest ago, makes room */
    MUST(ibidi_pages_pin(p, 1, 2, 2, &again));
    CHECK(again == a, "the wrong block was evicted");
    MUST(ibidi_pages_pin(p, 3, 2, 2, &again)); /* shared: pinned twice */
    ibidi_pages_unpin(p, again);
    ibidi_pages_stats st = ibidi_pages_look(p);
    CHECK(st.evicted == 1 && st.in_use == 9 && st.pinned_blocks == 2, "%llu evicted, %zu in use",
          (unsigned long long)st.evicted, st.in_use);
    MUST(ibidi_pages_pin(p, 0, 1, 3, &b)); /* of one sequence only */
    ibidi_pages_unpin(p, b);
    CHECK(ibidi_pages_look(p).in_use == 9, "a private block stayed");
    ibidi_pages_close(p);
    ibid_device_stream_close(d, s);
    ibid_device_close(d);
}

#ifdef IBIDI_EMULATED
static void count_lost(void *arg, const char *detail) {
    CHECK(strstr(detail, "lost"), "%s", detail);
    ++*(size_t *)arg;
}

/* Every call of the device that fails is reported, and the engine goes on; a lost device is seen.
 */
static void test_faults(void) {
    world w;
    corpus c;
    ibid_test_gguf spec = spec_of(1);
    float want[VOCAB], got[VOCAB];
    size_t failed = 0, told = 0;
    ibid_asked a;
    spec.n_layers = 1;
    open_world(&w, &spec, IBID_KV_F16, (size_t)16 * 1024 * 1024);
    ibid_engine_close(w.gpu);
    MUST(ibid_engine_open(w.m,
                          &(ibid_engine_opts){.n_threads = 2,
                                              .backend = IBID_BACKEND_CUDA,
                                              .gpu_kv = IBID_KV_F16,
                                              .gpu_memory = (size_t)16 * 1024 * 1024,
                                              .lost = count_lost,
                                              .lost_arg = &told},
                          &w.gpu));
    make_corpus(&c, w.cpu, IBID_KV_F16, 0);
    ibid_question q = {.prefix = &c.first, .blocks = c.placed, .n_blocks = N_BLOCKS, .n = QUESTION};
    q.tokens = c.question;
    ask(w.gpu, &c, 0, want, NULL);
    size_t before = ibidi_emulator_in_use();
    for (uint64_t nth = 1;; nth += 1 + nth / 8) {
        ibidi_emulator_fail_at(nth, false);
        ibid_err err = ibid_question_run(w.gpu, &q, 4, NULL, &a, got);
        ibidi_emulator_fail_at(0, false);
        if (!err) {
            ibid_asked_close(&a);
            break;
        }
        CHECK(err == IBID_BACKEND && !ibid_engine_lost(w.gpu), "%s", ibid_err_text(err));
        failed++;
    }
    CHECK(failed > 10, "only %zu calls failed", failed);
    ask(w.gpu, &c, 0, got, NULL);
    CHECK(memcmp(got, want, sizeof got) == 0, "after failures the answer differs");
    CHECK(ibidi_emulator_in_use() == before, "device memory leaks");
    ibidi_emulator_fail_at(12, true);
    CHECK(ibid_question_run(w.gpu, &q, 4, NULL, &a, got) == IBID_BACKEND, "a lost device answers");
    CHECK(ibid_engine_lost(w.gpu), "a lost device goes unseen");
    CHECK(ibid_question_run(w.gpu, &q, 4, NULL, &a, got) == IBID_BACKEND, "it answers again");
    CHECK(told == 1, "the room was told %zu times", told);
    ibidi_emulator_fail_at(0, false);
    ibid_engine_close(w.gpu); /* one that does not even open: only auto goes on without */
    for (int i = 0; i < 2; i++) {
        ibid_engine_opts o = {.n_threads = 1, .backend = i ? IBID_BACKEND_AUTO : IBID_BACKEND_CUDA};
        w.gpu = NULL;
        ibidi_emulator_fail_at(3, false);
        ibid_err err = ibid_engine_open(w.m, &o, &w.gpu);
        ibidi_emulator_fail_at(0, false);
        CHECK(err == (i ? IBID_OK : IBID_BACKEND), "opening: %s", ibid_err_text(err));
    }
    CHECK(strcmp(ibid_engine_backend(w.gpu), "cpu") == 0, "auto took a GPU that fails");
    free_corpus(&c);
    close_world(&w);
    CHECK(ibidi_emulator_in_use() == 0, "%zu bytes of device memory are left",
          ibidi_emulator_in_use());
    printf("%zu failing calls reported\n", failed);
}

/* The second of three like steps is recorded: a call that fails meanwhile leaves the step to run
 * launch by launch, or fails it, and then it can be taken again. */
static void test_recording_faults(void) {
    ibid_test_gguf spec = spec_of(1);
    size_t failed = 0, refused = 0;
    world w;
    spec.n_layers = 1;
    open_model(&w, &spec);
    for (uint64_t nth = 0;; nth++) {
        ibid_engine_opts o = {.n_threads = 1,
                              .backend = IBID_BACKEND_CUDA,
                              .gpu_memory = 1 << 20,
                              .gpu_no_graphs = nth == 0};
        static float want[3][VOCAB];
        float got[3][VOCAB];
        ibid_engine_gpu look;
        ibid_seq *s = NULL;
        ibid_err err;
        uint64_t left = 0;
        MUST(ibid_engine_open(w.m, &o, &w.gpu));
        MUST(ibid_seq_open(w.gpu, 8, &s));
        for (uint32_t i = 0; i < 3; i++) {
            int32_t token = token_at(i);
            ibid_step step = {.seq = s, .tokens = &token, .positions = &i, .n = 1, .n_logits = 1};
            step.logits = got[i];
            if (i == 1) ibidi_emulator_fail_at(nth, false);
            err = ibid_engine_forward(w.gpu, &step, 1, NULL);
            if (i == 1) left = ibidi_emulator_failing();
            ibidi_emulator_fail_at(0, false);
            if (!err) continue;
            CHECK(i == 1 && err == IBID_BACKEND, "step %u: %s", i, ibid_err_text(err));
            failed++;
            MUST(ibid_engine_forward(w.gpu, &step, 1, NULL));
        }
        if (nth == 0) memcpy(want, got, sizeof want);
        CHECK(memcmp(got, want, sizeof want) == 0, "after call %llu failed, steps differ",
              (unsigned long long)nth);
        CHECK(ibid_engine_gpu_look(w.gpu, &look), "no GPU");
        refused += nth && look.graph_steps == 0;
        ibid_seq_close(s);
        ibid_engine_close(w.gpu);
        if (left) break; /* so many calls are never made */
    }
    CHECK(failed > 2 && refused > 3, "%zu failed, %zu were not recorded", failed, refused);
    CHECK(ibidi_emulator_in_use() == 0, "device memory leaks");
    ibid_model_close(w.m);
    printf("%zu steps failed while recorded, %zu ran without\n", failed, refused);
}

/* A pool too small for all blocks at once: those of before make room; too small for one question: a
 * typed error, and the next smaller one is answered. */
static void test_small_pool(void) {
    world w;
    corpus c;
    ibid_test_gguf spec = spec_of(0);
    float want[VOCAB], got[VOCAB];
    ibid_asked a;
    size_t cell = spec.n_kv_heads * ibidi_cu_head_bytes(64, 0);
    open_world(&w, &spec, IBID_KV_F16, 15 * cell); /* two layers, 6 pages stored and 1 live */
    make_corpus(&c, w.cpu, IBID_KV_F16, 50);
    ask(w.gpu, &c, 0, want, NULL);
    for (size_t b = 0; b < N_BLOCKS; b++) c.placed[b].id += 1000; /* others, as far as it knows */
    ask(w.gpu, &c, 0, got, NULL);
    CHECK(memcmp(got, want, sizeof got) == 0, "after eviction the answer differs");
    ibid_question q = {.prefix = &c.first, .blocks = c.placed, .n_blocks = N_BLOCKS, .n = QUESTION};
    q.tokens = c.question;
    q.share = 1; /* needs a live page more */
    ibid_err err = ibid_question_run(w.gpu, &q, 4, NULL, &a, got);
    CHECK(err == IBID_NOMEM, "a pool that is too small: %s", ibid_err_text(err));
    ask(w.gpu, &c, 0, got, NULL);
    CHECK(memcmp(got, want, sizeof got) == 0, "after an error the answer differs");
    free_corpus(&c);
    close_world(&w);
}
#endif

int main(int argc, char **argv) {
    ibid_device *d = NULL;
    ibid_err err = ibid_device_open(0, &d);
    if (err == IBID_NOTSUP) {
        printf("skipped: %s\n", ibid_err_detail());
        return 77;
    }
    MUST(err);
    (void)argv;
    if (argc > 1) models = 6;
    (void)setvbuf(stdout, NULL, _IOLBF, 0);
    ibid_device_close(d);
    printf("%s\n", ibid_device_library());
    test_pool();
#ifdef IBIDI_EMULATED
    test_recording_faults();
    test_faults();
    test_small_pool();
#endif
    test_decoding();
    test_stored();
    test_plain();
    printf("all passed\n");
    return 0;
}
