/* Times the engine on one model and prints a JSON line per case: median of the runs, tokens/s and
 * ms.
 *
 * usage: bench_engine MODEL.gguf [--threads N] [--kernels NAME] [--runs N] [--int8 0|1]
 *   [--cache DIR] [--only CASE] [--serve 1]
 *
 * With --serve 1 it reads commands from standard input instead, one a line, measures each once and
 * answers with a line: so that another engine can be measured in turn.
 *
 *   prefill N        N tokens at once, logits of the last
 *   decode N [K]     32 steps over N stored tokens (q8_0), for K sequences in one batch (1)
 *   live N           32 steps over N tokens computed before
 *   blocks           eight blocks of 200 tokens in one batch, behind a prefix
 *   stored N [S]     first token of a 32-token question over N stored tokens, share S of which is
 *                    computed again (0)
 *   load             opening the model and an engine
 *   memory           peak and present size of this process
 *   model            work and bytes of the model, for shares of what the machine can do
 *
 * "decode" and "blocks" read KV filled with small numbers. "stored" reads the KV of the text that
 * the program comes with, each 200 tokens encoded alone behind the prefix, once: how much
 * arithmetic attention takes depends on how sharp it is. */
#include "attention/plan/calibration_run.h"
#include "attention/plan/recompute.h"
#include "rpc/base/clock.h"
#include "rpc/base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    RUNS_MAX = 99,
    STEPS = 32,
    STREAMS_MAX = 16,
    BLOCKS = 8,
    BLOCK_TOKENS = 200,
    PREFIX = 40,
    ASK = 32
};

typedef struct bench {
    const char *path, *only;
    ibid_engine_opts o;
    ibid_model *m;
    ibid_engine *e;
    bool serve;
    int n_runs;
    int32_t *tokens;
    uint32_t *positions;
    float *logits; /* [STREAMS_MAX, n_vocab] */
    ibid_seq *live;
    size_t n_live;
    ibid_kv_blob prefix, *stored; /* [n_ctx / BLOCK_TOKENS], the first n_stored of them encoded */
    size_t n_stored;
} bench;

/* One measurement. */
typedef struct sample {
    const char *name;
    size_t context, tokens; /* tokens computed in the time */
    double share, ms;
} sample;

static void check(ibid_err e) {
    if (!e) return;
    (void)fprintf(stderr, "bench_engine: %s: %s\n", ibid_err_text(e), ibid_err_detail());
    exit(2);
}

static void *need(size_t n, size_t size) {
    void *p = ibid_calloc(n, size);
    if (!p) check(ibid_fail(IBID_NOMEM, "%zu times %zu bytes", n, size));
    return p;
}

/* ---- Stored KV ---- */

/* KV of n tokens at all layers; layers own their planes in one block at layers[0].k. */
static ibid_kv_view *make_kv(const ibid_model *m, size_t n, ibid_kv_type type) {
    static const size_t width[] = {4, 2, 1};
    size_t values = n * m->n_kv_heads * m->head_dim,
           plane = ibid_align_up(values * width[type], 64);
    size_t scales = ibid_align_up(values / 32 * 2, 64), layer = 2 * (plane + scales);
    ibid_kv_view *v = need(m->n_layers, sizeof *v);
    uint8_t *p = ibid_alloc_aligned(64, m->n_layers * layer);
    if (!p) check(ibid_fail(IBID_NOMEM, "the KV of %zu tokens", n));
    for (size_t i = 0; i < m->n_layers * layer; i++)
        p[i] = (uint8_t)((i * 2654435761u >> 24 & 0x7f) - 64);
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
    if (!v) return;
    ibid_free((void *)(uintptr_t)v[0].k);
    ibid_free(v);
}

/* n tokens of the text from `from` on, at positions from `at` on. */
static void forward(const bench *b, ibid_seq *s, size_t from, size_t at, size_t n,
                    size_t n_logits) {
    ibid_step step = {.seq = s,
                      .tokens = b->tokens + from,
                      .positions = b->positions + at,
                      .n = n,
                      .n_logits = n_logits,
                      .logits = b->logits};
    check(ibid_engine_forward(b->e, &step, 1, NULL));
}

/* The prefix, and one block after another until there are n. */
static void encode_stored(bench *b, size_t n) {
    ibid_seq *s = NULL;
    if (!b->prefix.memory) {
        check(ibid_seq_open(b->e, PREFIX, &s));
        forward(b, s, 0, 0, PREFIX, 0);
        check(ibid_kv_blob_export(b->m, s, 0, PREFIX, 0, IBID_KV_Q8_0, &b->prefix));
        ibid_seq_close(s);
    }
    ibid_segment g = {.layers = b->prefix.layers};
    for (; b->n_stored < n; b->n_stored++) {
        check(ibid_seq_open(b->e, BLOCK_TOKENS, &s));
        check(ibid_seq_add_segment(s, &g));
        forward(b, s, PREFIX + b->n_stored * BLOCK_TOKENS, PREFIX, BLOCK_TOKENS, 0);
        check(ibid_kv_blob_export(b->m, s, 0, BLOCK_TOKENS, 0, IBID_KV_Q8_0,
                                  &b->stored[b->n_stored]));
        ibid_seq_close(s);
    }
}

/* ---- The cases ---- */

static sample run_prefill(const bench *b, size_t n) {
    ibid_seq *s = NULL;
    check(ibid_seq_open(b->e, n, &s));
    uint64_t start = ibid_now_ns();
    forward(b, s, 0, 0, n, 1);
    double ms = ibid_ms_since(start);
    ibid_seq_close(s);
    return (sample){"prefill", n, n, 0, ms};
}

/* k sequences, each over n stored tokens of its own, one token of each a step. */
static sample run_decode(const bench *b, size_t n, size_t k) {
    ibid_kv_view *kv[STREAMS_MAX] = {NULL};
    ibid_step steps[STREAMS_MAX];
    uint64_t start = 0;
    for (size_t i = 0; i < k; i++) {
        kv[i] = make_kv(b->m, n, IBID_KV_Q8_0);
        ibid_segment g = {.layers = kv[i]};
        steps[i] = (ibid_step){.tokens = b->tokens + i,
                               .n = 1,
                               .n_logits = 1,
                               .logits = b->logits + i * b->m->n_vocab};
        check(ibid_seq_open(b->e, STEPS + 1, &steps[i].seq));
        check(ibid_seq_add_segment(steps[i].seq, &g));
    }
    for (size_t t = 0; t <= STEPS; t++) {
        if (t == 1) start = ibid_now_ns(); /* the first brings what comes into the caches */
        for (size_t i = 0; i < k; i++) steps[i].positions = b->positions + n + t;
        check(ibid_engine_forward(b->e, steps, k, NULL));
    }
    double ms = ibid_ms_since(start);
    for (size_t i = 0; i < k; i++) {
        ibid_seq_close(steps[i].seq);
        free_kv(kv[i]);
    }
    return (sample){k == 1 ? "decode" : "streams", n, STEPS * k, 0, ms};
}

/* The sequence is kept for the next time. */
static sample run_live(bench *b, size_t n) {
    if (!b->live) check(ibid_seq_open(b->e, n + STEPS + 1, &b->live));
    if (b->n_live < n) forward(b, b->live, b->n_live, b->n_live, n - b->n_live, 1);
    if (b->n_live < n) b->n_live = n;
    if (b->n_live > n) b->n_live = n;
    ibid_seq_truncate(b->live, n);
    forward(b, b->live, n, n, 1, 1);
    uint64_t start = ibid_now_ns();
    for (size_t t = 1; t <= STEPS; t++) forward(b, b->live, n + t, n + t, 1, 1);
    double ms = ibid_ms_since(start);
    ibid_seq_truncate(b->live, n);
    return (sample){"live", n, STEPS, 0, ms};
}

static sample run_blocks(const bench *b) {
    ibid_kv_view *prefix = make_kv(b->m, PREFIX, IBID_KV_Q8_0);
    ibid_segment g = {.layers = prefix};
    ibid_step steps[BLOCKS];
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
    double ms = ibid_ms_since(start);
    free_kv(prefix);
    return (sample){"blocks", PREFIX, BLOCKS * BLOCK_TOKENS, 0, ms};
}

/* Time to first token: a question over stored blocks behind a prefix. */
static sample run_stored(bench *b, size_t n, double share) {
    size_t n_blocks = n / BLOCK_TOKENS;
    ibid_placed_block *blocks = need(n_blocks + 1, sizeof *blocks);
    ibid_asked a;
    encode_stored(b, n_blocks);
    ibid_segment g = {.layers = b->prefix.layers};
    for (size_t i = 0; i < n_blocks; i++) {
        blocks[i] = (ibid_placed_block){.layers = b->stored[i].layers,
                                        .tokens = b->tokens + PREFIX + i * BLOCK_TOKENS,
                                        .local0 = PREFIX,
                                        .offset = i * BLOCK_TOKENS};
    }
    ibid_question q = {.prefix = &g,
                       .blocks = blocks,
                       .n_blocks = n_blocks,
                       .tokens = b->tokens + b->m->n_ctx - ASK,
                       .n = ASK,
                       .share = share};
    uint64_t start = ibid_now_ns();
    check(ibid_question_run(b->e, &q, 64, NULL, &a, b->logits));
    double ms = ibid_ms_since(start);
    size_t rows = a.choice.n_rows + ASK;
    ibid_asked_close(&a);
    ibid_free(blocks);
    return (sample){"stored", n_blocks * BLOCK_TOKENS, rows, share, ms};
}

/* Opens a second engine beside this one. Hashing the file is not part of it: the fingerprint is
 * known from the store at every start but the first. */
static sample run_load(const bench *b) {
    ibid_model *m = NULL;
    ibid_engine *e = NULL;
    uint64_t start = ibid_now_ns();
    check(ibid_model_open(b->path, &b->m->fingerprint, &m));
    check(ibid_engine_open(m, &b->o, &e));
    double ms = ibid_ms_since(start);
    ibid_engine_close(e);
    ibid_model_close(m);
    return (sample){"load", 0, 0, 0, ms};
}

static void print_memory(void) {
    char line[256];
    unsigned long long peak = 0, now = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f)) {
        if (strncmp(line, "VmHWM:", 6) == 0) peak = strtoull(line + 6, NULL, 10);
        if (strncmp(line, "VmRSS:", 6) == 0) now = strtoull(line + 6, NULL, 10);
    }
    if (f) (void)fclose(f);
    printf("{\"case\":\"memory\",\"peak_bytes\":%llu,\"bytes\":%llu}\n", peak * 1024, now * 1024);
}

static void print_model(const bench *b) {
    const ibid_model *m = b->m;
    double macs = 0, bytes = 0;
    for (size_t l = 0; l < m->n_layers; l++) {
        const ibid_layer *y = &m->layers[l];
        const ibid_tensor *w[] = {&y->wq, &y->wk, &y->wv, &y->wo, &y->gate, &y->up, &y->down};
        for (size_t i = 0; i < sizeof w / sizeof *w; i++) {
            macs += (double)w[i]->rows * (double)w[i]->cols;
            bytes += (double)w[i]->rows * (double)w[i]->row_bytes;
        }
    }
    double head = (double)m->output.rows * (double)m->output.row_bytes;
    double kv = 2.0 * (double)(m->n_layers * m->n_kv_heads * m->head_dim);
    printf("{\"case\":\"model\",\"name\":\"%s\",\"layer_macs\":%.0f,\"weight_bytes\":%.0f,"
           "\"kv_values\":%.0f,\"attention_width\":%zu,\"n_layers\":%zu,\"n_ctx\":%zu}\n",
           m->name, macs, bytes + head, kv, m->n_heads * m->head_dim, m->n_layers, m->n_ctx);
}

static bool run_case(bench *b, const char *name, size_t n, double extra, sample *out) {
    size_t most =
        b->m->n_ctx > STEPS + PREFIX + ASK + 8 ? b->m->n_ctx - STEPS - PREFIX - ASK - 8 : 0;
    bool sized = n > 0 && n <= most;
    if (strcmp(name, "prefill") == 0 && sized)
        *out = run_prefill(b, n);
    else if (strcmp(name, "decode") == 0 && sized && extra <= STREAMS_MAX)
        *out = run_decode(b, n, extra >= 1 ? (size_t)extra : 1);
    else if (strcmp(name, "live") == 0 && sized)
        *out = run_live(b, n);
    else if (strcmp(name, "stored") == 0 && sized && extra >= 0 && extra <= 1)
        *out = run_stored(b, n, extra);
    else if (strcmp(name, "blocks") == 0)
        *out = run_blocks(b);
    else if (strcmp(name, "load") == 0)
        *out = run_load(b);
    else
        return false;
    return true;
}

static void print_sample(const sample *s, double best, int runs) {
    printf("{\"case\":\"%s\",\"context\":%zu,\"share\":%g,\"tokens\":%zu,\"ms\":%.3f,"
           "\"best_ms\":%.3f,\"tokens_per_s\":%.1f,\"runs\":%d}\n",
           s->name, s->context, s->share, s->tokens, s->ms, best, 1e3 * (double)s->tokens / s->ms,
           runs);
    (void)fflush(stdout);
}

/* ---- One command a line ---- */

static int serve(bench *b) {
    char line[256], name[32];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long long n = 0;
        double extra = 0;
        sample s;
        int fields = sscanf(line, "%31s %llu %lf", name, &n, &extra);
        if (fields >= 1 && strcmp(name, "quit") == 0) break;
        if (fields >= 1 && strcmp(name, "memory") == 0)
            print_memory();
        else if (fields >= 1 && strcmp(name, "model") == 0)
            print_model(b);
        else if (fields >= 1 && run_case(b, name, n, extra, &s))
            print_sample(&s, s.ms, 1);
        else
            printf("{\"error\":\"no such case, or not with this size\"}\n");
        (void)fflush(stdout);
    }
    return 0;
}

/* ---- All of them ---- */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void repeat(bench *b, const char *name, size_t n, double extra) {
    double ms[RUNS_MAX];
    sample s;
    if ((b->only && strcmp(b->only, name) != 0) || !run_case(b, name, n, extra, &s)) return;
    for (int r = 0; r < b->n_runs; r++) {
        (void)run_case(b, name, n, extra, &s);
        ms[r] = s.ms;
    }
    qsort(ms, (size_t)b->n_runs, sizeof *ms, by_value);
    s.ms = ms[b->n_runs / 2];
    print_sample(&s, ms[0], b->n_runs);
}

static void run_all(bench *b) {
    static const size_t sizes[] = {128, 512, 2048};
    for (size_t i = 0; i < 3; i++) repeat(b, "prefill", sizes[i], 0);
    repeat(b, "blocks", 0, 0);
    for (size_t i = 0; i < 3; i++) repeat(b, "decode", sizes[i], 1);
    repeat(b, "decode", 2000, 4);
    repeat(b, "decode", 8000, 1);
    repeat(b, "live", 128, 0);
    repeat(b, "stored", 8000, 0);
    repeat(b, "stored", 8000, 0.15);
    repeat(b, "load", 0, 0);
}

static bool read_option(bench *b, const char *name, const char *value) {
    if (strcmp(name, "--threads") == 0)
        b->o.n_threads = strtoul(value, NULL, 10);
    else if (strcmp(name, "--kernels") == 0)
        b->o.kernels = value;
    else if (strcmp(name, "--runs") == 0)
        b->n_runs = (int)strtol(value, NULL, 10);
    else if (strcmp(name, "--int8") == 0)
        b->o.int8 = strcmp(value, "1") == 0;
    else if (strcmp(name, "--cache") == 0)
        b->o.cache = value;
    else if (strcmp(name, "--only") == 0)
        b->only = value;
    else if (strcmp(name, "--serve") == 0)
        b->serve = strcmp(value, "1") == 0;
    else
        return false;
    return true;
}

static bool read_options(bench *b, int argc, char **argv) {
    if (argc < 2 || argc % 2) return false;
    b->path = argv[1];
    for (int i = 2; i < argc; i += 2) {
        if (!read_option(b, argv[i], argv[i + 1])) return false;
    }
    return b->n_runs >= 1 && b->n_runs <= RUNS_MAX;
}

/* The program's sample text, again and again up to the context's length. */
static void fill_text(bench *b) {
    ibid_token *text = NULL;
    size_t n = 0;
    check(ibid_tokenize(b->m->tokenizer, (const char *)ibidi_sample_text, ibidi_sample_text_size,
                        false, &text, &n));
    for (size_t i = 0; i < b->m->n_ctx; i++) {
        b->tokens[i] = text[i % n].id;
        b->positions[i] = (uint32_t)i;
    }
    ibid_free(text);
}

int main(int argc, char **argv) {
    bench b = {.n_runs = 5};
    if (!read_options(&b, argc, argv)) {
        (void)fprintf(
            stderr, "usage: bench_engine MODEL.gguf [--threads N] [--kernels NAME] [--runs N] "
                    "[--int8 0|1] [--cache DIR]\n  [--only prefill|blocks|decode|live|stored|load] "
                    "[--serve 1]\n");
        return 2;
    }
    /* The cache of packed weights is found by the fingerprint. */
    check(ibid_model_open(b.path, NULL, &b.m));
    check(ibid_engine_open(b.m, &b.o, &b.e));
    b.tokens = need(b.m->n_ctx, sizeof *b.tokens);
    b.positions = need(b.m->n_ctx, sizeof *b.positions);
    b.logits = need(STREAMS_MAX * b.m->n_vocab, sizeof *b.logits);
    b.stored = need(b.m->n_ctx / BLOCK_TOKENS + 1, sizeof *b.stored);
    fill_text(&b);
    int status = 0;
    if (b.serve)
        status = serve(&b);
    else
        run_all(&b);
    ibid_seq_close(b.live);
    ibid_kv_blob_fini(&b.prefix);
    for (size_t i = 0; i < b.n_stored; i++) ibid_kv_blob_fini(&b.stored[i]);
    ibid_free(b.stored);
    ibid_free(b.tokens);
    ibid_free(b.positions);
    ibid_free(b.logits);
    ibid_engine_close(b.e);
    ibid_model_close(b.m);
    return status;
}
