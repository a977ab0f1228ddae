/* The plan's oracles: recompute 1 is one ordinary causal pass, one block alone is one, narrower KV
 * stays near f32; and that exactly the heaviest tokens are chosen. On small random models and,
 * where it is there, the default model. */
#include "attention/plan/recompute.h"
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

enum { PREFIX = 21, ASK = 17, BLOCKS = 4, ROOM = 512 };
static const size_t sizes[BLOCKS] = {64, 90, 1, 129};

static void must(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_text(e), ibid_err_detail());
}

/* Prefix and blocks stored in one KV type, and all token ids in position order. */
typedef struct corpus {
    fx_kv prefix, blocks[BLOCKS];
    ibid_segment prefix_segment;
    ibid_placed_block placed[BLOCKS];
    int32_t tokens[ROOM];
    size_t n_blocks, n;
} corpus;

static void corpus_open(corpus *c, ibid_engine *e, uint64_t seed, size_t n_blocks,
                        ibid_kv_type type) {
    memset(c, 0, sizeof *c);
    fx_tokens(ibid_engine_model(e), seed, c->tokens, ROOM);
    c->prefix = fx_encode(e, NULL, 0, c->tokens, PREFIX, type);
    c->prefix_segment.layers = c->prefix.layers;
    c->n = PREFIX;
    for (size_t b = 0; b < n_blocks; b++) {
        c->blocks[b] = fx_encode(e, &c->prefix_segment, PREFIX, c->tokens + c->n, sizes[b], type);
        c->placed[b] = (ibid_placed_block){.layers = c->blocks[b].layers,
                                           .tokens = c->tokens + c->n,
                                           .local0 = PREFIX,
                                           .offset = c->n - PREFIX};
        c->n += sizes[b];
    }
    c->n_blocks = n_blocks;
}

static void corpus_close(corpus *c) {
    fx_kv_free(&c->prefix);
    for (size_t b = 0; b < c->n_blocks; b++) fx_kv_free(&c->blocks[b]);
}

static ibid_question question_of(const corpus *c, double share) {
    return (ibid_question){.prefix = &c->prefix_segment,
                           .blocks = c->placed,
                           .n_blocks = c->n_blocks,
                           .tokens = c->tokens + c->n,
                           .n = ASK,
                           .share = share};
}

/* Logits of the question's last token by one ordinary causal pass; free() them. */
static float *causal(ibid_engine *e, const corpus *c) {
    ibid_seq *s = NULL;
    float *logits = calloc(ibid_engine_model(e)->n_vocab, sizeof *logits);
    must(ibid_seq_open(e, c->n + ASK, &s));
    fx_forward(e, s, 0, c->tokens, c->n + ASK, 1, logits);
    ibid_seq_close(s);
    return logits;
}

static float *asked(ibid_engine *e, const corpus *c, double share, size_t *n_rows) {
    ibid_asked a;
    ibid_question q = question_of(c, share);
    float *logits = calloc(ibid_engine_model(e)->n_vocab, sizeof *logits);
    must(ibid_question_run(e, &q, 4, NULL, &a, logits));
    assert_int_equal(a.position, c->n + ASK);
    if (n_rows) *n_rows = a.choice.n_rows;
    ibid_asked_close(&a);
    return logits;
}

/* The same rows as share 1, fed in batches of 100 by hand. */
static float *in_batches(ibid_engine *e, const corpus *c) {
    ibid_choice choice;
    ibid_seq *s = NULL;
    float *logits = calloc(ibid_engine_model(e)->n_vocab, sizeof *logits);
    must(ibid_choice_init(&choice, c->placed, c->n_blocks));
    must(ibid_seq_open(e, 0, &s));
    must(ibid_seq_add_segment(s, &c->prefix_segment));
    for (size_t b = 0; b < c->n_blocks; b++) {
        ibid_segment g = {.layers = c->placed[b].layers,
                          .local0 = c->placed[b].local0,
                          .offset = c->placed[b].offset,
                          .masked = choice.masks[b]};
        must(ibid_seq_add_segment(s, &g));
    }
    must(ibid_choose(&choice, c->placed, NULL, 1));
    for (size_t i = 0; i < choice.n_rows; i += 100) {
        ibid_step step = {.seq = s, .tokens = choice.tokens + i, .positions = choice.positions + i};
        step.n = choice.n_rows - i < 100 ? choice.n_rows - i : 100;
        must(ibid_engine_forward(e, &step, 1, NULL));
    }
    fx_forward(e, s, (uint32_t)c->n, c->tokens + c->n, ASK, 1, logits);
    ibid_seq_close(s);
    ibid_choice_fini(&choice);
    return logits;
}

static void check_oracles(ibid_engine *e, const char *what) {
    corpus c;
    size_t vocab = ibid_engine_model(e)->n_vocab, n_rows, least = 0;
    corpus_open(&c, e, 1, BLOCKS, IBID_KV_F32);
    float *want = causal(e, &c), *all = asked(e, &c, 1, &n_rows), *cut = in_batches(e, &c);
    float *none = asked(e, &c, 0, &least);
    printf("%s: recompute 1 against a causal pass: max |logit diff| %.2g; in batches %.2g; "
           "recompute 0 is %.2g off\n",
           what, fx_max_diff(want, all, vocab), fx_max_diff(want, cut, vocab),
           fx_max_diff(want, none, vocab));
    assert_int_equal(n_rows, c.n - PREFIX);
    assert_int_equal(least, 0);
    assert_true(fx_max_diff(want, all, vocab) <= 1e-3);
    assert_true(fx_max_diff(want, cut, vocab) <= 1e-3);
    /* The oracle can tell: without recomputing, several blocks are something else. */
    assert_true(fx_max_diff(want, none, vocab) > 5e-3);
    free(want);
    free(all);
    free(cut);
    free(none);
    corpus_close(&c);

    corpus_open(&c, e, 2, 1, IBID_KV_F32);
    want = causal(e, &c);
    none = asked(e, &c, 0, NULL);
    printf("%s: one block alone: max |logit diff| %.2g\n", what, fx_max_diff(want, none, vocab));
    assert_true(fx_max_diff(want, none, vocab) <= 1e-3);
    free(want);
    free(none);
    corpus_close(&c);
}

static void check_kv_types(ibid_engine *e, const char *what) {
    static const struct {
        const char *name;
        ibid_kv_type type;
        double most; /* KL in nats */
    } types[] = {{"f16", IBID_KV_F16, 1e-5}, {"q8_0", IBID_KV_Q8_0, 2e-3}};
    corpus c;
    size_t vocab = ibid_engine_model(e)->n_vocab;
    corpus_open(&c, e, 3, BLOCKS, IBID_KV_F32);
    float *want = asked(e, &c, 0, NULL);
    corpus_close(&c);
    for (size_t i = 0; i < 2; i++) {
        if (types[i].type == IBID_KV_Q8_0 && ibid_engine_model(e)->head_dim % 32) continue;
        corpus_open(&c, e, 3, BLOCKS, types[i].type);
        float *got = asked(e, &c, 0, NULL);
        double kl = fx_kl(want, got, vocab);
        printf("%s: %s KV against f32: KL %.2g, max |logit diff| %.2g\n", what, types[i].name, kl,
               fx_max_diff(want, got, vocab));
        assert_true(kl >= -1e-7 && kl < types[i].most);
        free(got);
        corpus_close(&c);
    }
    free(want);
}

static void test_small_models(void **state) {
    (void)state;
    for (size_t i = 0; i < FX_SHAPES; i++) {
        fx_model f;
        char what[32];
        (void)snprintf(what, sizeof what, "seed %llu", (unsigned long long)fx_shapes[i].seed);
        fx_open(&f, &fx_shapes[i], NULL, 2);
        check_oracles(f.e, what);
        check_kv_types(f.e, what);
        fx_close(&f);
    }
}

static void test_default_model(void **state) {
    const char *path = fx_default_model();
    ibid_model *m = NULL;
    ibid_engine *e = NULL;
    (void)state;
    if (!path) skip();
    must(ibid_model_open(path, &(ibid_hash){{0}}, &m));
    must(ibid_engine_open(m, NULL, &e));
    check_oracles(e, "default model");
    check_kv_types(e, "default model");
    ibid_engine_close(e);
    ibid_model_close(m);
}

/* What is chosen, given masses: count, order, ties, the exact first block left out. */
static void test_choose(void **state) {
    fx_model f;
    corpus c;
    ibid_choice choice;
    float mass[BLOCKS][160], *rows[BLOCKS];
    uint64_t seed = 5;
    (void)state;
    fx_open(&f, &fx_shapes[0], NULL, 1);
    corpus_open(&c, f.e, 4, BLOCKS, IBID_KV_F32);
    for (size_t b = 0; b < BLOCKS; b++) {
        rows[b] = mass[b];
        for (size_t t = 0; t < sizes[b]; t++) mass[b][t] = (float)(fx_random(&seed) % 50);
    }
    size_t total = c.n - PREFIX;
    for (int percent = 5; percent < 100; percent += 30) {
        size_t want = (size_t)ceil(percent / 100.0 * (double)total), n = 0;
        size_t most = total - sizes[0];
        must(ibid_choice_init(&choice, c.placed, BLOCKS));
        must(ibid_choose(&choice, c.placed, rows, percent / 100.0));
        assert_int_equal(choice.n_rows, want < most ? want : most);
        /* Nothing chosen is lighter, or as light and later, than something left out. */
        float lightest = INFINITY;
        size_t lightest_at = 0;
        for (size_t i = 0; i < choice.n_rows; i++) {
            size_t at = choice.positions[i] - PREFIX, b = 0;
            assert_true(i == 0 || choice.positions[i] > choice.positions[i - 1]);
            assert_int_equal(choice.tokens[i], c.tokens[PREFIX + at]);
            while (at >= sizes[b]) at -= sizes[b++];
            assert_true(b > 0);
            if (mass[b][at] <= lightest) lightest = mass[b][at], lightest_at = choice.positions[i];
        }
        for (size_t b = 0; b < BLOCKS; b++) {
            for (size_t t = 0; t < sizes[b]; t++) {
                size_t at = PREFIX + c.placed[b].offset + t;
                bool in = choice.masks[b][t / 64] >> t % 64 & 1;
                n += in;
                if (b == 0) assert_false(in);
                if (b > 0 && !in)
                    assert_true(mass[b][t] < lightest ||
                                (mass[b][t] == lightest && at > lightest_at));
            }
        }
        assert_int_equal(n, choice.n_rows);
        ibid_choice_fini(&choice);
    }
    corpus_close(&c);
    fx_close(&f);
}

/* A share between brings the logits closer to the causal pass, on average over questions. */
static void test_share_helps(void **state) {
    fx_model f;
    double off[3] = {0};
    static const double shares[3] = {0, 0.3, 0.7};
    (void)state;
    fx_open(&f, &fx_shapes[2], NULL, 2);
    for (uint64_t seed = 20; seed < 32; seed++) {
        corpus c;
        corpus_open(&c, f.e, seed, BLOCKS, IBID_KV_F32);
        float *want = causal(f.e, &c);
        for (size_t i = 0; i < 3; i++) {
            float *got = asked(f.e, &c, shares[i], NULL);
            off[i] += fx_kl(want, got, f.m->n_vocab);
            free(got);
        }
        free(want);
        corpus_close(&c);
    }
    printf("KL to the causal pass, 12 questions: share 0 %.3g, 0.3 %.3g, 0.7 %.3g\n", off[0] / 12,
           off[1] / 12, off[2] / 12);
    assert_true(off[1] < off[0] && off[2] < off[1]);
    fx_close(&f);
}

static void test_errors(void **state) {
    fx_model f;
    corpus c;
    ibid_asked a;
    atomic_bool cancel = true;
    (void)state;
    fx_open(&f, &fx_shapes[0], NULL, 1);
    corpus_open(&c, f.e, 6, BLOCKS, IBID_KV_F32);
    float *logits = calloc(f.m->n_vocab, sizeof *logits);
    ibid_question q = question_of(&c, 0.5);
    assert_int_equal(ibid_question_run(f.e, &q, 0, &cancel, &a, logits), IBID_CANCELLED);
    assert_null(a.seq);
    q.share = 1.5;
    assert_int_equal(ibid_question_run(f.e, &q, 0, NULL, &a, logits), IBID_INVAL);
    q.share = 0;
    q.n = f.m->n_ctx - c.n + 1;
    assert_int_equal(ibid_question_run(f.e, &q, 0, NULL, &a, logits), IBID_CONTEXT);
    assert_non_null(strstr(ibid_err_detail(), "1025"));
    assert_non_null(strstr(ibid_err_detail(), "1024"));
    /* A question with nothing stored is a plain prompt. */
    float *want = calloc(f.m->n_vocab, sizeof *want);
    ibid_seq *s = NULL;
    ibid_question plain = {.tokens = c.tokens, .n = 30, .share = 0.3};
    must(ibid_question_run(f.e, &plain, 0, NULL, &a, logits));
    must(ibid_seq_open(f.e, 0, &s));
    fx_forward(f.e, s, 0, c.tokens, 30, 1, want);
    assert_memory_equal(logits, want, f.m->n_vocab * sizeof *want);
    ibid_asked_close(&a);
    ibid_seq_close(s);
    /* Every allocation that fails is reported and leaves nothing behind (see the sanitizer run). */
    q = question_of(&c, 0.5);
    size_t failed = 0;
    for (uint64_t nth = 1; nth < 100; nth++) {
        ibid_alloc_fail_at(nth);
        ibid_err e = ibid_question_run(f.e, &q, 0, NULL, &a, logits);
        ibid_alloc_fail_at(0);
        if (!e) {
            ibid_asked_close(&a);
            break;
        }
        assert_int_equal(e, IBID_NOMEM);
        failed++;
    }
    assert_true(failed > 8 && failed < 99);
    free(want);
    free(logits);
    corpus_close(&c);
    fx_close(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_choose),        cmocka_unit_test(test_small_models),
        cmocka_unit_test(test_share_helps),   cmocka_unit_test(test_errors),
        cmocka_unit_test(test_default_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
