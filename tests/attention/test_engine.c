/* The engine against the naive double-precision forward pass: plain causal passes, blocks at
 * offsets, masked rows, attention mass, raw keys. On every backend this machine has. */
#include "tests/support/engine_fixture.h"
#include "tests/support/naive_llama.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
/* clang-format off */
#include <cmocka.h>
/* clang-format on */

enum { N = 150, PREFIX = 9, ASK = 14 };
static const size_t block_sizes[] = {70, 1, 64, 33};
enum { BLOCKS = sizeof block_sizes / sizeof *block_sizes };

static void must(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_text(e), ibid_err_detail());
}

static double diff(const float *a, const double *b, size_t n) {
    double max = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= max)) max = d;
    }
    return max;
}

static void check_causal(const ibid_test_gguf *spec, const char *kernels) {
    fx_model f;
    naive_kv kv;
    ibid_seq *s = NULL;
    int32_t tokens[N];
    fx_open(&f, spec, kernels, 1);
    size_t vocab = f.m->n_vocab;
    float *logits = calloc(N * vocab, sizeof *logits);
    double *expected = calloc(N * vocab, sizeof *expected);
    uint32_t *positions = fx_positions(3, N);
    fx_tokens(f.m, spec->seed, tokens, N);
    must(ibid_seq_open(f.e, 0, &s));
    fx_forward(f.e, s, 3, tokens, N, N, logits);
    naive_kv_init(&kv, f.m, N);
    naive_run(&kv, tokens, positions, N, expected, NULL, NULL);
    double d = diff(logits, expected, N * vocab);
    printf("causal pass, seed %llu, %s: max |logit diff| %.2g\n", (unsigned long long)spec->seed,
           kernels, d);
    assert_true(d < 1e-4);
    /* Keys before RoPE. */
    float *keys = calloc(N * f.m->head_dim, sizeof *keys);
    must(ibid_seq_raw_keys(s, 1, f.m->n_kv_heads - 1, 5, 100, keys));
    size_t width = f.m->n_kv_heads * f.m->head_dim, dim = f.m->head_dim;
    for (size_t i = 0; i < 100; i++) {
        assert_true(diff(keys + i * dim, kv.k + (N + 5 + i) * width + width - dim, dim) < 1e-4);
    }
    fx_kv stored = fx_export(f.m, s, 20, 70, 7, IBID_KV_F32);
    must(ibid_engine_stored_keys(f.e, &stored.layers[1], 3 + 20 - 7, 0, keys));
    for (size_t i = 0; i < 70; i++) {
        assert_true(diff(keys + i * dim, kv.k + (N + 20 + i) * width, dim) < 1e-4);
    }
    fx_kv_free(&stored);
    ibid_seq_close(s);
    naive_kv_fini(&kv);
    free(keys);
    free(logits);
    free(expected);
    free(positions);
    fx_close(&f);
}

static void test_causal(void **state) {
    (void)state;
    for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
        if (!(*k)->supported()) continue;
        for (size_t i = 0; i < FX_SHAPES; i++) check_causal(&fx_shapes[i], (*k)->name);
    }
}

/* A prefix, blocks encoded behind it, and where each stands. */
typedef struct context {
    fx_kv prefix, blocks[BLOCKS];
    naive_kv naive_prefix, naive_blocks[BLOCKS]; /* naive_blocks hold the prefix first */
    int32_t tokens[512];                         /* prefix, blocks, question */
    size_t offset[BLOCKS], end;
} context;

/* gap: unused positions before each block after the first. */
static void encode(fx_model *f, context *c, uint64_t seed, size_t gap) {
    ibid_segment prefix = {0};
    size_t at = PREFIX, offset = 0;
    fx_tokens(f->m, seed, c->tokens, 512);
    c->prefix = fx_encode(f->e, NULL, 0, c->tokens, PREFIX, IBID_KV_F32);
    prefix.layers = c->prefix.layers;
    uint32_t *positions = fx_positions(0, 512);
    naive_kv_init(&c->naive_prefix, f->m, PREFIX);
    naive_run(&c->naive_prefix, c->tokens, positions, PREFIX, NULL, NULL, NULL);
    for (size_t b = 0; b < BLOCKS; b++) {
        size_t n = block_sizes[b];
        c->blocks[b] = fx_encode(f->e, &prefix, PREFIX, c->tokens + at, n, IBID_KV_F32);
        naive_kv_init(&c->naive_blocks[b], f->m, PREFIX + n);
        naive_kv_append(&c->naive_blocks[b], &c->naive_prefix, 0, PREFIX, 0);
        naive_run(&c->naive_blocks[b], c->tokens + at, positions + PREFIX, n, NULL, NULL, NULL);
        c->offset[b] = offset;
        offset += n + gap;
        at += n;
    }
    c->end = PREFIX + offset - gap;
    free(positions);
}

static void forget(context *c) {
    fx_kv_free(&c->prefix);
    naive_kv_fini(&c->naive_prefix);
    for (size_t b = 0; b < BLOCKS; b++) {
        fx_kv_free(&c->blocks[b]);
        naive_kv_fini(&c->naive_blocks[b]);
    }
}

static size_t tokens_before(size_t block) {
    size_t n = PREFIX;
    for (size_t b = 0; b < block; b++) n += block_sizes[b];
    return n;
}

/* Masks: every third token of blocks 0, 2 and 3, computed again in context. masks NULL: none. */
static bool chosen(size_t block, size_t token) {
    return block != 1 && token % 3 == 1;
}

static void open_segments(fx_model *f, const context *c, uint64_t (*masks)[2], ibid_seq **s) {
    ibid_segment prefix = {.layers = c->prefix.layers};
    must(ibid_seq_open(f->e, 8, s));
    must(ibid_seq_add_segment(*s, &prefix));
    for (size_t b = 0; b < BLOCKS; b++) {
        ibid_segment g = {.layers = c->blocks[b].layers, .local0 = PREFIX, .offset = c->offset[b]};
        if (masks) g.masked = masks[b];
        must(ibid_seq_add_segment(*s, &g));
    }
}

/* The naive context: prefix and blocks at their places, without what is computed again. */
static void open_naive(fx_model *f, const context *c, bool masked, naive_kv *kv) {
    naive_kv_init(kv, f->m, 1024);
    naive_kv_append(kv, &c->naive_prefix, 0, PREFIX, 0);
    for (size_t b = 0; b < BLOCKS; b++) {
        for (size_t t = 0; t < block_sizes[b]; t++) {
            if (masked && chosen(b, t)) continue;
            naive_kv_append(kv, &c->naive_blocks[b], PREFIX + t, 1, (uint32_t)c->offset[b]);
        }
    }
}

static void check_blocks(const ibid_test_gguf *spec, const char *kernels, size_t gap, bool masked) {
    fx_model f;
    context c;
    naive_kv kv;
    ibid_seq *s = NULL;
    uint64_t masks[BLOCKS][2] = {{0}};
    int32_t tokens[512];
    uint32_t positions[512];
    size_t n = 0;
    fx_open(&f, spec, kernels, 1);
    encode(&f, &c, spec->seed + 100, gap);
    for (size_t b = 0; masked && b < BLOCKS; b++) {
        for (size_t t = 0; t < block_sizes[b]; t++) {
            if (!chosen(b, t)) continue;
            masks[b][t / 64] |= UINT64_C(1) << t % 64;
            tokens[n] = c.tokens[tokens_before(b) + t];
            positions[n++] = (uint32_t)(PREFIX + c.offset[b] + t);
        }
    }
    for (size_t i = 0; i < ASK; i++) {
        tokens[n] = c.tokens[tokens_before(BLOCKS) + i];
        positions[n++] = (uint32_t)(c.end + i);
    }
    size_t vocab = f.m->n_vocab;
    float *logits = calloc(n * vocab, sizeof *logits);
    double *expected = calloc(n * vocab, sizeof *expected);
    open_segments(&f, &c, masked ? masks : NULL, &s);
    ibid_step step = {.seq = s,
                      .tokens = tokens,
                      .positions = positions,
                      .n = n,
                      .n_logits = n,
                      .logits = logits};
    must(ibid_engine_forward(f.e, &step, 1, NULL));
    open_naive(&f, &c, masked, &kv);
    naive_run(&kv, tokens, positions, n, expected, NULL, NULL);
    double d = diff(logits, expected, n * vocab);
    printf("blocks, seed %llu, %s, gap %zu%s: max |logit diff| %.2g\n",
           (unsigned long long)spec->seed, kernels, gap, masked ? ", masked" : "", d);
    assert_true(d < 1e-4);
    ibid_seq_close(s);
    naive_kv_fini(&kv);
    forget(&c);
    free(logits);
    free(expected);
    fx_close(&f);
}

static void test_blocks(void **state) {
    (void)state;
    for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
        if (!(*k)->supported()) continue;
        for (size_t i = 0; i < FX_SHAPES; i++) {
            check_blocks(&fx_shapes[i], (*k)->name, 0, false);
            check_blocks(&fx_shapes[i], (*k)->name, 11, i % 2 == 0);
            check_blocks(&fx_shapes[i], (*k)->name, 0, true);
        }
    }
}

/* Attention mass of the question, all heads and some, against naive. */
static void check_probe(const ibid_test_gguf *spec, const char *kernels, const uint64_t *heads) {
    fx_model f;
    context c;
    naive_kv kv;
    ibid_seq *s = NULL;
    float *mass[BLOCKS + 1];
    size_t n_heads = 0, at = 0;
    double to_stored = 0, total = 0, *expected = calloc(1024, sizeof *expected);
    fx_open(&f, spec, kernels, 2);
    encode(&f, &c, spec->seed + 200, 5);
    for (size_t i = 0; i < BLOCKS + 1; i++) mass[i] = calloc(256, sizeof **mass);
    for (size_t i = 0; i < f.m->n_layers * f.m->n_heads; i++) {
        n_heads += !heads || (heads[i / 64] >> i % 64 & 1);
    }
    uint32_t *positions = fx_positions((uint32_t)c.end, ASK);
    const int32_t *tokens = c.tokens + tokens_before(BLOCKS);
    ibid_probe probe = {.heads = heads, .mass = mass, .n_rows = ASK};
    ibid_step step = {
        .seq = s, .tokens = tokens, .positions = positions, .n = ASK, .probe = &probe};
    open_segments(&f, &c, NULL, &step.seq);
    must(ibid_engine_forward(f.e, &step, 1, NULL));

    open_naive(&f, &c, false, &kv);
    size_t stored = kv.n;
    naive_run(&kv, tokens, positions, ASK, NULL, expected, heads);
    double worst = 0;
    for (size_t i = 0; i < BLOCKS + 1; i++) {
        size_t n = i ? block_sizes[i - 1] : PREFIX;
        for (size_t t = 0; t < n; t++, at++) {
            total += (double)mass[i][t];
            worst = fmax(worst, fabs((double)mass[i][t] - expected[at]));
        }
    }
    assert_int_equal(at, stored);
    for (size_t i = 0; i < stored; i++) to_stored += expected[i];
    printf("probe, seed %llu, %s, %zu heads: max |mass diff| %.2g, sum %.6f of %zu\n",
           (unsigned long long)spec->seed, kernels, n_heads, worst, total, ASK * n_heads);
    assert_true(worst < 1e-5);
    /* Every row gives 1 a head, of which a little goes to live rows. */
    assert_true(fabs(total - to_stored) < 1e-4);
    assert_true(total < (double)(ASK * n_heads) && total > 0.5 * (double)(ASK * n_heads));
    for (size_t i = 0; i < BLOCKS + 1; i++) free(mass[i]);
    ibid_seq_close(step.seq);
    naive_kv_fini(&kv);
    forget(&c);
    free(positions);
    free(expected);
    fx_close(&f);
}

static void test_probe(void **state) {
    static const uint64_t some[1] = {0x5A6};
    (void)state;
    for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
        if (!(*k)->supported()) continue;
        for (size_t i = 0; i < FX_SHAPES; i++) {
            check_probe(&fx_shapes[i], (*k)->name, NULL);
            check_probe(&fx_shapes[i], (*k)->name, some);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_causal),
        cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_probe),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
