/* What must not matter: who shares the batch, how many threads work, how rows are cut into calls,
 * what was cancelled or truncated before. And what is refused. */
#include "tests/support/engine_fixture.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* clang-format off */
#include <cmocka.h>
/* clang-format on */

enum { SEQS = 7, VOCAB_ROOM = 512 };
static const size_t lengths[SEQS] = {200, 1, 64, 333, 17, 96, 150}; /* more than a chunk together */

static void must(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_text(e), ibid_err_detail());
}

/* A shape whose contexts are long enough to be split when decoding. */
static ibid_test_gguf long_shape(void) {
    ibid_test_gguf spec = fx_shapes[2];
    spec.n_ctx = 8192;
    return spec;
}

typedef struct result {
    float *encoded[SEQS]; /* all live keys and values at the last layer, then logits of a decode */
    size_t n[SEQS];
} result;

/* Encodes SEQS sequences behind a stored prefix and takes two decode steps; all in common calls, or
 * one by one. */
static result run_all(ibid_engine *e, bool together) {
    const ibid_model *m = ibid_engine_model(e);
    result r = {.n = {0}};
    ibid_seq *seqs[SEQS];
    ibid_step steps[SEQS], decode[SEQS];
    int32_t tokens[SEQS][512], prefix[1500];
    uint32_t *positions[SEQS];
    size_t n_prefix = 1300, width = 2 * m->n_kv_heads * m->head_dim;
    fx_tokens(m, 99, prefix, n_prefix);
    fx_kv kv = fx_encode(e, NULL, 0, prefix, n_prefix, IBID_KV_Q8_0);
    ibid_segment g = {.layers = kv.layers};
    for (size_t i = 0; i < SEQS; i++) {
        size_t n = lengths[i];
        fx_tokens(m, i, tokens[i], 512);
        positions[i] = fx_positions((uint32_t)n_prefix, n + 2);
        must(ibid_seq_open(e, 0, &seqs[i]));
        must(ibid_seq_add_segment(seqs[i], &g));
        r.n[i] = n * width + 2 * m->n_vocab;
        r.encoded[i] = calloc(r.n[i], sizeof(float));
        steps[i] = (ibid_step){.seq = seqs[i],
                               .tokens = tokens[i],
                               .positions = positions[i],
                               .n = n,
                               .n_logits = i == 2,
                               .logits = r.encoded[i]};
    }
    for (size_t i = 0; !together && i < SEQS; i++) must(ibid_engine_forward(e, &steps[i], 1, NULL));
    if (together) must(ibid_engine_forward(e, steps, SEQS, NULL));
    for (size_t d = 0; d < 2; d++) {
        for (size_t i = 0; i < SEQS; i++) {
            size_t at = lengths[i] + d;
            decode[i] = (ibid_step){.seq = seqs[i],
                                    .tokens = tokens[i] + at,
                                    .positions = positions[i] + at,
                                    .n = 1,
                                    .n_logits = 1};
            decode[i].logits = r.encoded[i] + lengths[i] * width + d * m->n_vocab;
            if (!together) must(ibid_engine_forward(e, &decode[i], 1, NULL));
        }
        if (together) must(ibid_engine_forward(e, decode, SEQS, NULL));
    }
    for (size_t i = 0; i < SEQS; i++) {
        fx_kv own = fx_export(m, seqs[i], 0, lengths[i], 0, IBID_KV_F32);
        const ibid_kv_view *v = &own.layers[m->n_layers - 1];
        memcpy(r.encoded[i], v->k, lengths[i] * width / 2 * sizeof(float));
        memcpy(r.encoded[i] + lengths[i] * width / 2, v->v, lengths[i] * width / 2 * sizeof(float));
        fx_kv_free(&own);
        ibid_seq_close(seqs[i]);
        free(positions[i]);
    }
    fx_kv_free(&kv);
    return r;
}

static void same(const result *a, const result *b) {
    for (size_t i = 0; i < SEQS; i++) {
        assert_memory_equal(a->encoded[i], b->encoded[i], a->n[i] * sizeof(float));
    }
}

static void forget(result *r) {
    for (size_t i = 0; i < SEQS; i++) free(r->encoded[i]);
}

static void check_same_bits(const ibid_kernels *k, bool int8) {
    ibid_test_gguf spec = long_shape();
    result first;
    for (size_t threads = 1; threads <= 3; threads++) {
        fx_model f;
        fx_open_with(&f, &spec,
                     &(ibid_engine_opts){.kernels = k->name, .n_threads = threads, .int8 = int8});
        result one = run_all(f.e, false);
        result all = run_all(f.e, true);
        same(&one, &all);
        if (threads == 1)
            first = one;
        else {
            same(&first, &one);
            forget(&one);
        }
        forget(&all);
        fx_close(&f);
    }
    forget(&first);
}

static void test_same_bits(void **state) {
    (void)state;
    for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
        if (!(*k)->supported() || strcmp((*k)->name, "reference") == 0) continue;
        check_same_bits(*k, false);
        if ((*k)->matmul_q8) check_same_bits(*k, true);
    }
}

/* N rows over stored tokens, some masked, some computed again in between: in one step, whose
 * context is laid into tiles, and in steps too short for that. Logits of the last row. */
static void ask(ibid_engine *e, const fx_kv *kv, const uint64_t *masked, size_t each,
                float *logits) {
    enum { N = 150, FIRST = 1000 };
    const ibid_model *m = ibid_engine_model(e);
    int32_t tokens[N];
    uint32_t positions[N];
    ibid_seq *s;
    fx_tokens(m, 77, tokens, N);
    for (uint32_t i = 0; i < N; i++) /* the masked ones of the second block first */
        positions[i] = i < 40 ? 600 + 64 + i : FIRST + i;
    must(ibid_seq_open(e, N, &s));
    for (size_t b = 0; b < 2; b++) {
        ibid_segment g = {.layers = kv[b].layers, .local0 = 30 * b, .offset = 570 * b};
        if (b) g.masked = masked;
        must(ibid_seq_add_segment(s, &g));
    }
    for (size_t at = 0; at < N; at += each) {
        ibid_step step = {.seq = s, .tokens = tokens + at, .positions = positions + at};
        step.n = N - at < each ? N - at : each;
        step.n_logits = at + step.n == N;
        step.logits = logits;
        must(ibid_engine_forward(e, &step, 1, NULL));
    }
    ibid_seq_close(s);
}

static void test_laid(void **state) {
    enum { STORED = 333 };
    ibid_test_gguf spec = long_shape();
    uint64_t masked[6] = {0, (UINT64_C(1) << 40) - 1, 0x5555};
    int32_t tokens[2][STORED];
    (void)state;
    fx_model exact, f;
    fx_open(&exact, &spec, "reference", 2);
    size_t vocab = exact.m->n_vocab;
    fx_kv kv[2];
    for (uint32_t b = 0; b < 2; b++) {
        fx_tokens(exact.m, b, tokens[b], STORED);
        kv[b] = fx_encode(exact.e, NULL, 30 * b, tokens[b], STORED, IBID_KV_Q8_0);
    }
    float *want = calloc(vocab, sizeof *want), *got = calloc(vocab, sizeof *got);
    float *few = calloc(vocab, sizeof *few);
    ask(exact.e, kv, masked, 150, want);
    for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
        if (!(*k)->supported() || !(*k)->attn_tiles) continue;
        fx_open_with(&f, &spec,
                     &(ibid_engine_opts){.kernels = (*k)->name, .n_threads = 2, .int8 = true});
        ask(f.e, kv, masked, 150, got);
        ask(f.e, kv, masked, 50, few);
        double laid = fx_kl(want, got, vocab), not_laid = fx_kl(want, few, vocab);
        double apart = fx_kl(few, got, vocab);
        printf("%s: KL to exact %.2g laid, %.2g not, %.2g between\n", (*k)->name, laid, not_laid,
               apart);
        assert_true(laid < 2e-3 && not_laid < 2e-3 && apart < 2e-3);
        assert_true(memcmp(got, few, vocab * sizeof *got) != 0); /* two ways were taken */
        masked[3] = masked[4] = ~UINT64_C(0);                    /* what is seen matters */
        ask(f.e, kv, masked, 150, few);
        assert_true(fx_kl(got, few, vocab) > 3 * apart);
        masked[3] = masked[4] = 0;
        fx_close(&f);
    }
    for (size_t b = 0; b < 2; b++) fx_kv_free(&kv[b]);
    free(want);
    free(got);
    free(few);
    fx_close(&exact);
}

/* More rows than travel the layers together, in one call and in two: the same bits. */
static void test_stretches(void **state) {
    enum { N = 2600 };
    ibid_test_gguf spec = long_shape();
    int32_t *tokens = calloc(N, sizeof *tokens);
    (void)state;
    for (int int8 = 0; int8 < 2; int8++) {
        fx_model f;
        ibid_seq *s[2];
        fx_open_with(&f, &spec, &(ibid_engine_opts){.n_threads = 2, .int8 = int8});
        fx_tokens(f.m, 5, tokens, N);
        float *one = calloc(f.m->n_vocab, sizeof *one), *two = calloc(f.m->n_vocab, sizeof *two);
        for (size_t i = 0; i < 2; i++) must(ibid_seq_open(f.e, 0, &s[i]));
        fx_forward(f.e, s[0], 0, tokens, N, 1, one);
        fx_forward(f.e, s[1], 0, tokens, 1300, 0, NULL);
        fx_forward(f.e, s[1], 1300, tokens + 1300, N - 1300, 1, two);
        assert_memory_equal(one, two, f.m->n_vocab * sizeof *one);
        for (size_t i = 0; i < 2; i++) ibid_seq_close(s[i]);
        free(one);
        free(two);
        fx_close(&f);
    }
    free(tokens);
}

/* Decoding over a long context, split, against the same rows inside one long pass, not split. */
static void test_split(void **state) {
    ibid_test_gguf spec = long_shape();
    fx_model f;
    ibid_seq *s = NULL;
    enum { N = 3000, LAST = 5 };
    int32_t *tokens = calloc(N, sizeof *tokens);
    (void)state;
    fx_open(&f, &spec, NULL, 2);
    size_t vocab = f.m->n_vocab;
    float *want = calloc(LAST * vocab, sizeof *want), *got = calloc(LAST * vocab, sizeof *got);
    fx_tokens(f.m, 3, tokens, N);
    must(ibid_seq_open(f.e, 0, &s));
    fx_forward(f.e, s, 0, tokens, N, LAST, want);
    assert_int_equal(ibid_seq_live_count(s), N);
    ibid_seq_truncate(s, N - LAST);
    assert_int_equal(ibid_seq_live_count(s), N - LAST);
    for (uint32_t i = 0; i < LAST; i++) {
        fx_forward(f.e, s, N - LAST + i, tokens + N - LAST + i, 1, 1, got + i * vocab);
    }
    double live = fx_max_diff(want, got, LAST * vocab);
    ibid_seq_close(s);
    /* The same from stored KV, cut into two segments at an odd place; masks on both. */
    must(ibid_seq_open(f.e, 0, &s));
    fx_forward(f.e, s, 0, tokens, N - LAST, 0, NULL);
    fx_kv a = fx_export(f.m, s, 0, 1003, 0, IBID_KV_F32);
    fx_kv b = fx_export(f.m, s, 1003, N - LAST - 1003, 700, IBID_KV_F32);
    ibid_seq_close(s);
    uint64_t none[64] = {0};
    ibid_segment ga = {.layers = a.layers, .masked = none};
    ibid_segment gb = {.layers = b.layers, .local0 = 303, .offset = 700, .masked = none};
    must(ibid_seq_open(f.e, 0, &s));
    must(ibid_seq_add_segment(s, &ga));
    must(ibid_seq_add_segment(s, &gb));
    fx_forward(f.e, s, N - LAST, tokens + N - LAST, LAST, LAST, got);
    double stored = fx_max_diff(want, got, LAST * vocab);
    printf("split: max |logit diff| live %.2g, stored %.2g\n", live, stored);
    assert_true(live < 1e-4 && stored < 1e-4);
    ibid_seq_close(s);
    fx_kv_free(&a);
    fx_kv_free(&b);
    free(tokens);
    free(want);
    free(got);
    fx_close(&f);
}

static void test_truncate(void **state) {
    fx_model f;
    ibid_seq *s = NULL;
    int32_t tokens[300];
    float a[VOCAB_ROOM], b[VOCAB_ROOM];
    (void)state;
    fx_open(&f, &fx_shapes[1], NULL, 1);
    fx_tokens(f.m, 8, tokens, 300);
    must(ibid_seq_open(f.e, 300, &s));
    fx_forward(f.e, s, 0, tokens, 70, 1, a);
    ibid_seq_truncate(s, 50);
    fx_forward(f.e, s, 50, tokens + 100, 150, 0, NULL); /* something else */
    ibid_seq_truncate(s, 300);                          /* more than there is: nothing */
    assert_int_equal(ibid_seq_live_count(s), 200);
    ibid_seq_truncate(s, 50);
    fx_forward(f.e, s, 50, tokens + 50, 20, 1, b);
    assert_memory_equal(a, b, f.m->n_vocab * sizeof *a);
    ibid_seq_close(s);
    fx_close(&f);
}

static void *set_soon(void *arg) {
    usleep(500);
    atomic_store((atomic_bool *)arg, true);
    return NULL;
}

static void test_cancel(void **state) {
    ibid_test_gguf spec = long_shape();
    fx_model f;
    ibid_seq *s = NULL;
    int32_t tokens[900];
    float want[VOCAB_ROOM], got[VOCAB_ROOM];
    size_t cancelled = 0;
    (void)state;
    spec.n_layers = 6;
    fx_open(&f, &spec, NULL, 2);
    fx_tokens(f.m, 9, tokens, 900);
    uint32_t *positions = fx_positions(0, 900);
    must(ibid_seq_open(f.e, 0, &s));
    fx_forward(f.e, s, 0, tokens, 10, 0, NULL);
    ibid_step step = {.seq = s,
                      .tokens = tokens + 10,
                      .positions = positions + 10,
                      .n = 890,
                      .n_logits = 1,
                      .logits = want};
    must(ibid_engine_forward(f.e, &step, 1, NULL));
    ibid_seq_truncate(s, 10);
    step.logits = got;
    for (int i = 0; i < 5; i++) {
        atomic_bool cancel = i == 0;
        pthread_t t;
        assert_int_equal(pthread_create(&t, NULL, set_soon, &cancel), 0);
        ibid_err e = ibid_engine_forward(f.e, &step, 1, &cancel);
        pthread_join(t, NULL);
        if (e) {
            assert_int_equal(e, IBID_CANCELLED);
            assert_int_equal(ibid_seq_live_count(s), 10);
            cancelled++;
        }
        if (!e) ibid_seq_truncate(s, 10);
    }
    assert_true(cancelled > 0);
    must(ibid_engine_forward(f.e, &step, 1, NULL));
    assert_memory_equal(want, got, f.m->n_vocab * sizeof *want);
    ibid_seq_close(s);
    free(positions);
    fx_close(&f);
}

/* Some rows' logits, a probe of other rows, and a step that stops after one layer, all in one
 * batch, give what each gives alone with everything computed. */
static void test_needed_rows(void **state) {
    enum { N = 60, P = 100 };
    fx_model f;
    int32_t tokens[P + N];
    ibid_seq *s[4];
    (void)state;
    fx_open(&f, &fx_shapes[2], NULL, 2);
    size_t vocab = f.m->n_vocab, dim = f.m->head_dim;
    fx_tokens(f.m, 21, tokens, P + N);
    fx_kv kv = fx_encode(f.e, NULL, 0, tokens, P, IBID_KV_F32);
    ibid_segment g = {.layers = kv.layers};
    uint32_t *positions = fx_positions(P, N);
    float *logits[4], mass[4][P], keys[2][N * 64];
    for (size_t i = 0; i < 4; i++) {
        must(ibid_seq_open(f.e, N, &s[i]));
        must(ibid_seq_add_segment(s[i], &g));
        logits[i] = calloc(N * vocab, sizeof(float));
        memset(mass[i], 0, sizeof mass[i]);
    }
    float *of[4] = {mass[0], mass[1], mass[2], mass[3]};
    ibid_probe probes[] = {{.mass = &of[0], .row0 = 4, .n_rows = 11},
                           {.mass = &of[1], .row0 = 4, .n_rows = 11},
                           {.mass = &of[2], .row0 = 4, .n_rows = 11}};
    ibid_step all = {.seq = s[0],
                     .tokens = tokens + P,
                     .positions = positions,
                     .n = N,
                     .n_logits = N,
                     .logits = logits[0],
                     .probe = &probes[0]};
    must(ibid_engine_forward(f.e, &all, 1, NULL));
    ibid_step some[3] = {all, all, all};
    some[0].seq = s[1], some[0].n_logits = 3, some[0].logits = logits[1],
    some[0].probe = &probes[1];
    some[1].seq = s[2], some[1].n_logits = 0, some[1].probe = &probes[2];
    some[2].seq = s[3], some[2].n_logits = 0, some[2].probe = NULL, some[2].n_layers = 2;
    must(ibid_engine_forward(f.e, some, 3, NULL));
    assert_memory_equal(logits[0] + (N - 3) * vocab, logits[1], 3 * vocab * sizeof(float));
    assert_memory_equal(mass[0], mass[1], sizeof mass[0]);
    assert_memory_equal(mass[0], mass[2], sizeof mass[0]);
    assert_true(mass[0][0] > 0);
    must(ibid_seq_raw_keys(s[0], 1, 0, 0, N, keys[0]));
    must(ibid_seq_raw_keys(s[3], 1, 0, 0, N, keys[1]));
    assert_memory_equal(keys[0], keys[1], N * dim * sizeof(float));
    for (size_t i = 0; i < 4; i++) {
        ibid_seq_close(s[i]);
        free(logits[i]);
    }
    free(positions);
    fx_kv_free(&kv);
    fx_close(&f);
}

/* Continuations of one beginning, in copies of it and in one call, against each alone behind the
 * whole beginning; the rows of the beginning fill more than a page. */
static void test_fork(void **state) {
    enum { P = 100, N = 90, WAYS = 3, MORE = 7 };
    (void)state;
    for (size_t shape = 1; shape < 3; shape++) {
        fx_model f;
        int32_t tokens[P + N], more[MORE];
        ibid_seq *s[WAYS + 1] = {NULL};
        ibid_step steps[WAYS];
        float *want = NULL, *got[WAYS];
        fx_open(&f, &fx_shapes[shape], NULL, 2);
        size_t vocab = f.m->n_vocab;
        want = calloc(MORE * vocab, sizeof *want);
        fx_tokens(f.m, 31, tokens, P + N);
        fx_kv kv = fx_encode(f.e, NULL, 0, tokens, P, IBID_KV_F32);
        ibid_segment g = {.layers = kv.layers, .offset = 5};
        uint32_t *positions = fx_positions(P + 5, N + MORE);
        must(ibid_seq_open(f.e, 0, &s[0]));
        must(ibid_seq_add_segment(s[0], &g));
        fx_forward(f.e, s[0], P + 5, tokens + P, N, 0, NULL);
        for (size_t i = 0; i < WAYS; i++) {
            must(ibid_seq_fork(s[0], MORE, &s[i + 1]));
            assert_int_equal(ibid_seq_live_count(s[i + 1]), N);
            got[i] = calloc(MORE * vocab, sizeof(float));
            steps[i] = (ibid_step){.seq = s[i + 1],
                                   .tokens = tokens + 10 * i,
                                   .positions = positions + N,
                                   .n = MORE,
                                   .n_logits = MORE,
                                   .logits = got[i]};
        }
        must(ibid_engine_forward(f.e, steps, WAYS, NULL));
        assert_int_equal(ibid_seq_live_count(s[0]), N);
        for (size_t i = 0; i < WAYS; i++) {
            memcpy(more, tokens + 10 * i, sizeof more);
            fx_forward(f.e, s[0], P + 5 + N, more, MORE, MORE, want);
            assert_memory_equal(want, got[i], MORE * vocab * sizeof *want);
            ibid_seq_truncate(s[0], N);
            free(got[i]);
        }
        for (size_t i = 0; i <= WAYS; i++) ibid_seq_close(s[i]);
        free(want);
        free(positions);
        fx_kv_free(&kv);
        fx_close(&f);
    }
}

/* Each wrong step is refused with its code, and the sequence keeps working. */
static void test_refuses(void **state) {
    fx_model f, other;
    ibid_seq *s = NULL, *foreign = NULL;
    int32_t tokens[4] = {1, 2, 3, 4};
    uint32_t positions[4] = {0, 1, 2, 3}, bad_order[4] = {0, 2, 2, 3}, late[2] = {1023, 1024};
    float logits[4 * VOCAB_ROOM], again[4 * VOCAB_ROOM];
    (void)state;
    fx_open(&f, &fx_shapes[0], NULL, 1);
    fx_open(&other, &fx_shapes[0], NULL, 1);
    must(ibid_seq_open(f.e, 0, &s));
    must(ibid_seq_open(other.e, 0, &foreign));
    ibid_step good = {.seq = s,
                      .tokens = tokens,
                      .positions = positions,
                      .n = 4,
                      .n_logits = 4,
                      .logits = logits};
    ibid_step twice[2] = {good, good}, step = good;
    assert_int_equal(ibid_engine_forward(f.e, twice, 2, NULL), IBID_INVAL);
    step.seq = foreign;
    assert_int_equal(ibid_engine_forward(f.e, &step, 1, NULL), IBID_INVAL);
    step = good, step.positions = bad_order;
    assert_int_equal(ibid_engine_forward(f.e, &step, 1, NULL), IBID_INVAL);
    step = good, step.n_logits = 5;
    assert_int_equal(ibid_engine_forward(f.e, &step, 1, NULL), IBID_INVAL);
    step = good, step.n_layers = 1;
    assert_int_equal(ibid_engine_forward(f.e, &step, 1, NULL), IBID_INVAL);
    step = good, step.n_layers = 3;
    assert_int_equal(ibid_engine_forward(f.e, &step, 1, NULL), IBID_INVAL);
    step = good, step.positions = late, step.n = 2, step.n_logits = 1;
    assert_int_equal(ibid_engine_forward(f.e, &step, 1, NULL), IBID_CONTEXT);
    ibid_probe probe = {.row0 = 3, .n_rows = 2};
    step = good, step.probe = &probe;
    assert_int_equal(ibid_engine_forward(f.e, &step, 1, NULL), IBID_INVAL);
    int32_t unknown[2] = {5, (int32_t)f.m->n_vocab}, negative[1] = {-1};
    step = good, step.tokens = unknown, step.n = 2, step.n_logits = 0;
    assert_int_equal(ibid_engine_forward(f.e, &step, 1, NULL), IBID_INVAL);
    step.tokens = negative, step.n = 1;
    assert_int_equal(ibid_engine_forward(f.e, &step, 1, NULL), IBID_INVAL);
    assert_int_equal(ibid_seq_live_count(s), 0);
    must(ibid_engine_forward(f.e, &good, 1, NULL));
    assert_int_equal(ibid_engine_forward(f.e, &good, 1, NULL),
                     IBID_INVAL); /* not above live rows */
    assert_int_equal(ibid_seq_live_count(s), 4);

    /* Segments: after live rows, overlapping, of another shape, past the context. */
    fx_kv kv = fx_export(f.m, s, 0, 4, 0, IBID_KV_F32);
    ibid_segment g = {.layers = kv.layers};
    assert_int_equal(ibid_seq_add_segment(s, &g), IBID_INVAL);
    assert_int_equal(ibid_seq_export(s, 0, 1, 4, 0, kv.layers), IBID_INVAL);
    assert_int_equal(ibid_seq_export(s, 2, 0, 4, 0, kv.layers), IBID_INVAL);
    assert_int_equal(ibid_seq_raw_keys(s, 0, 2, 0, 4, logits), IBID_INVAL);
    assert_int_equal(ibid_engine_stored_keys(f.e, kv.layers, 0, 2, logits), IBID_INVAL);
    ibid_seq_close(s);
    must(ibid_seq_open(f.e, 0, &s));
    must(ibid_seq_add_segment(s, &g));
    assert_int_equal(ibid_seq_add_segment(s, &g), IBID_INVAL);
    g.offset = f.m->n_ctx - 3;
    assert_int_equal(ibid_seq_add_segment(s, &g), IBID_CONTEXT);
    kv.layers[1].n_tokens = 3;
    g.offset = 10;
    assert_int_equal(ibid_seq_add_segment(s, &g), IBID_INVAL);
    ibid_seq_close(s);

    /* Each allocation of a first forward fails in turn: reported, and the next call works. */
    size_t failed = 0;
    for (uint64_t nth = 1; nth < 60; nth++) {
        fx_model fresh;
        fx_open(&fresh, &fx_shapes[0], NULL, 2);
        must(ibid_seq_open(fresh.e, 0, &s));
        step = good, step.seq = s, step.logits = again;
        ibid_alloc_fail_at(nth);
        ibid_err e = ibid_engine_forward(fresh.e, &step, 1, NULL);
        ibid_alloc_fail_at(0);
        if (e) {
            assert_int_equal(e, IBID_NOMEM);
            assert_int_equal(ibid_seq_live_count(s), 0);
            must(ibid_engine_forward(fresh.e, &step, 1, NULL));
            failed++;
        }
        assert_memory_equal(logits, again, sizeof(float) * f.m->n_vocab);
        ibid_seq_close(s);
        fx_close(&fresh);
        if (!e) break;
    }
    assert_true(failed >= 4 && failed < 59);
    fx_kv_free(&kv);
    ibid_seq_close(foreign);
    fx_close(&other);
    fx_close(&f);
}

/* After the first token, decoding allocates only for a new page of KV. */
static void test_no_allocation(void **state) {
    fx_model f;
    ibid_seq *s = NULL;
    int32_t tokens[64];
    float logits[VOCAB_ROOM];
    (void)state;
    fx_open(&f, &fx_shapes[1], NULL, 2);
    fx_tokens(f.m, 4, tokens, 64);
    must(ibid_seq_open(f.e, 64, &s));
    fx_forward(f.e, s, 0, tokens, 1, 1, logits);
    ibid_alloc_fail_at(1);
    for (uint32_t i = 1; i < 64; i++) fx_forward(f.e, s, i, tokens + i, 1, 1, logits);
    /* The trap is still set: nothing was allocated. */
    void *p = ibid_alloc(1);
    ibid_alloc_fail_at(0);
    assert_null(p);
    ibid_seq_close(s);
    fx_close(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits),   cmocka_unit_test(test_laid),
        cmocka_unit_test(test_stretches),   cmocka_unit_test(test_split),
        cmocka_unit_test(test_truncate),    cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_needed_rows), cmocka_unit_test(test_fork),
        cmocka_unit_test(test_refuses),     cmocka_unit_test(test_no_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
