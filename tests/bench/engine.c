/* Times the engine on one model and prints a JSON line per case: median of the runs, tokens/s or
 * ms.
 *
 * usage: bench_engine MODEL.gguf [--threads N] [--kernels NAME] [--runs N] [--int8 0|1] [--only
 * CASE] cases: prefill blocks decode stored recompute Stored KV is filled with small random values:
 * timing does not depend on them. */
#include "attention/plan/recompute.h"
#include "rpc/base/clock.h"
#include "rpc/base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RUNS_MAX = 99 };

typedef struct bench {
    ibid_model *m;
    ibid_engine *e;
    const char *kernels, *only;
    bool int8;
    size_t n_threads;
    int n_runs;
    int32_t *tokens;
    uint32_t *positions;
    float *logits;
} bench;

static void check(ibid_err e) {
    if (!e) return;
    (void)fprintf(stderr, "bench_engine: %s: %s\n", ibid_err_text(e), ibid_err_detail());
    exit(2);
}

static void *need(size_t n, size_t size) {
    void *p = ibid_calloc(n, size);
    if (!p) check(IBID_NOMEM);
    return p;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(const bench *b, const char *name, size_t context, size_t n_tokens, double *ms) {
    qsort(ms, (size_t)b->n_runs, sizeof *ms, by_value);
    double median = ms[b->n_runs / 2];
    printf("{\"case\":\"%s\",\"context\":%zu,\"tokens\":%zu,\"ms\":%.2f,\"best_ms\":%.2f,"
           "\"tokens_per_s\":%.1f,\"runs\":%d}\n",
           name, context, n_tokens, median, ms[0], 1e3 * (double)n_tokens / median, b->n_runs);
    (void)fflush(stdout);
}

static bool wanted(const bench *b, const char *name) {
    return !b->only || strcmp(b->only, name) == 0;
}

static void forward(const bench *b, ibid_seq *s, size_t from, size_t n, size_t n_logits) {
    ibid_step step = {.seq = s,
                      .tokens = b->tokens,
                      .positions = b->positions + from,
                      .n = n,
                      .n_logits = n_logits,
                      .logits = b->logits};
    check(ibid_engine_forward(b->e, &step, 1, NULL));
}

static void bench_prefill(const bench *b) {
    static const size_t sizes[] = {128, 512, 2048};
    double ms[RUNS_MAX];
    for (size_t i = 0; i < 3; i++) {
        ibid_seq *s = NULL;
        check(ibid_seq_open(b->e, sizes[i], &s));
        for (int r = -1; r < b->n_runs; r++) {
            ibid_seq_truncate(s, 0);
            uint64_t start = ibid_now_ns();
            forward(b, s, 0, sizes[i], 1);
            if (r >= 0) ms[r] = ibid_ms_since(start);
        }
        report(b, "prefill", sizes[i], sizes[i], ms);
        ibid_seq_close(s);
    }
}

/* KV of n tokens at all layers; layers own their planes in one block at layers[0].k. */
static ibid_kv_view *make_kv(const ibid_model *m, size_t n, ibid_kv_type type) {
    static const size_t width[] = {4, 2, 1};
    size_t values = n * m->n_kv_heads * m->head_dim,
           plane = ibid_align_up(values * width[type], 64);
    size_t scales = ibid_align_up(values / 32 * 2, 64), layer = 2 * (plane + scales);
    ibid_kv_view *v = need(m->n_layers, sizeof *v);
    uint8_t *p = ibid_alloc_aligned(64, m->n_layers * layer);
    if (!p) check(IBID_NOMEM);
    for (size_t i = 0; i < m->n_layers * layer; i++) p[i] = (uint8_t)(i * 2654435761u >> 24 & 0x3f);
    for (size_t l = 0; l < m->n_layers; l++, p += layer) {
        v[l] = (ibid_kv_view){.type = type,
                              .n_tokens = n,
                              .n_kv_heads = m->n_kv_heads,
                              .head_dim = m->head_dim,
                              .k = p,
                              .v = p + plane};
        uint16_t *s = (uint16_t *)(void *)(p + 2 * plane);
        for (size_t i = 0; i < scales; i++) s[i] = 0x1800; /* 2^-9 */
        v[l].k_scale = s;
        v[l].v_scale = s + scales / 2;
    }
    return v;
}

static void free_kv(ibid_kv_view *v) {
    ibid_free((void *)(uintptr_t)v[0].k);
    ibid_free(v);
}

enum { BLOCKS = 8, BLOCK_TOKENS = 200, PREFIX = 40, ASK = 32 };

static void bench_blocks(const bench *b) {
    double ms[RUNS_MAX];
    ibid_kv_view *prefix = make_kv(b->m, PREFIX, IBID_KV_Q8_0);
    ibid_segment g = {.layers = prefix};
    ibid_step steps[BLOCKS];
    for (int r = -1; r < b->n_runs; r++) {
        uint64_t start = ibid_now_ns();
        for (size_t i = 0; i < BLOCKS; i++) {
            steps[i] = (ibid_step){.tokens = b->tokens + i * BLOCK_TOKENS,
                                   .positions = b->positions + PREFIX,
                                   .n = BLOCK_TOKENS};
            check(ibid_seq_open(b->e, BLOCK_TOKENS, &steps[i].seq));
            check(ibid_seq_add_segment(steps[i].seq, &g));
        }
        check(ibid_engine_forward(b->e, steps, BLOCKS, NULL));
        for (size_t i = 0; i < BLOCKS; i++) ibid_seq_close(steps[i].seq);
        if (r >= 0) ms[r] = ibid_ms_since(start);
    }
    report(b, "blocks", PREFIX, BLOCKS * BLOCK_TOKENS, ms);
    free_kv(prefix);
}

static void bench_decode(const bench *b) {
    static const size_t contexts[] = {128, 2000};
    enum { STEPS = 32 };
    double ms[RUNS_MAX];
    for (size_t i = 0; i < 2; i++) {
        ibid_kv_view *kv = make_kv(b->m, contexts[i], IBID_KV_Q8_0);
        ibid_segment g = {.layers = kv};
        ibid_seq *s = NULL;
        check(ibid_seq_open(b->e, STEPS, &s));
        check(ibid_seq_add_segment(s, &g));
        for (int r = -1; r < b->n_runs; r++) {
            ibid_seq_truncate(s, 0);
            uint64_t start = ibid_now_ns();
            for (size_t t = 0; t < STEPS; t++) forward(b, s, contexts[i] + t, 1, 1);
            if (r >= 0) ms[r] = ibid_ms_since(start);
        }
        report(b, "decode", contexts[i], STEPS, ms);
        ibid_seq_close(s);
        free_kv(kv);
    }
}

/* Time to first token: a question over stored blocks behind a prefix. */
static void ask(const bench *b, const char *name, size_t n_blocks, double share) {
    double ms[RUNS_MAX];
    ibid_kv_view *prefix = make_kv(b->m, PREFIX, IBID_KV_Q8_0);
    ibid_segment g = {.layers = prefix};
    ibid_placed_block *blocks = need(n_blocks, sizeof *blocks);
    size_t rows = 0;
    for (size_t i = 0; i < n_blocks; i++) {
        blocks[i] = (ibid_placed_block){.layers = make_kv(b->m, BLOCK_TOKENS, IBID_KV_Q8_0),
                                        .tokens = b->tokens + i,
                                        .local0 = PREFIX,
                                        .offset = i * BLOCK_TOKENS};
    }
    ibid_question q = {.prefix = &g,
                       .blocks = blocks,
                       .n_blocks = n_blocks,
                       .tokens = b->tokens,
                       .n = ASK,
                       .share = share};
    for (int r = -1; r < b->n_runs; r++) {
        ibid_asked a;
        uint64_t start = ibid_now_ns();
        check(ibid_question_run(b->e, &q, 64, NULL, &a, b->logits));
        if (r >= 0) ms[r] = ibid_ms_since(start);
        rows = a.choice.n_rows + ASK;
        ibid_asked_close(&a);
    }
    report(b, name, PREFIX + n_blocks * BLOCK_TOKENS, rows, ms);
    for (size_t i = 0; i < n_blocks; i++) free_kv((ibid_kv_view *)(uintptr_t)blocks[i].layers);
    ibid_free(blocks);
    free_kv(prefix);
}

static bool read_options(bench *b, int argc, char **argv) {
    for (int i = 2; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--threads") == 0)
            b->n_threads = strtoul(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--kernels") == 0)
            b->kernels = argv[i + 1];
        else if (strcmp(argv[i], "--runs") == 0)
            b->n_runs = (int)strtol(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--int8") == 0)
            b->int8 = strcmp(argv[i + 1], "1") == 0;
        else if (strcmp(argv[i], "--only") == 0)
            b->only = argv[i + 1];
        else
            return false;
    }
    return argc >= 2 && argc % 2 == 0 && b->n_runs >= 1 && b->n_runs <= RUNS_MAX;
}

int main(int argc, char **argv) {
    bench b = {.n_runs = 5};
    if (!read_options(&b, argc, argv)) {
        (void)fprintf(stderr,
                      "usage: bench_engine MODEL.gguf [--threads N] [--kernels NAME] "
                      "[--runs N] [--int8 0|1] [--only prefill|blocks|decode|stored|recompute]\n");
        return 2;
    }
    check(ibid_model_open(argv[1], &(ibid_hash){{0}}, &b.m));
    check(ibid_engine_open(b.m, &(ibid_engine_opts){b.kernels, b.n_threads, b.int8}, &b.e));
    b.tokens = need(b.m->n_ctx, sizeof *b.tokens);
    b.positions = need(b.m->n_ctx, sizeof *b.positions);
    b.logits = need(b.m->n_vocab, sizeof *b.logits);
    for (size_t i = 0; i < b.m->n_ctx; i++) {
        b.tokens[i] = (int32_t)((i * 7919 + 1234) % b.m->n_vocab);
        b.positions[i] = (uint32_t)i;
    }
    if (wanted(&b, "prefill")) bench_prefill(&b);
    if (wanted(&b, "blocks")) bench_blocks(&b);
    if (wanted(&b, "decode")) bench_decode(&b);
    if (wanted(&b, "stored")) ask(&b, "stored", 40, 0);
    if (wanted(&b, "recompute")) ask(&b, "recompute 0.15", 40, 0.15);
    ibid_free(b.tokens);
    ibid_free(b.positions);
    ibid_free(b.logits);
    ibid_engine_close(b.e);
    ibid_model_close(b.m);
    return 0;
}
