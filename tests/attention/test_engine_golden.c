/* Replays golden/logits.bin: what llama.cpp computes for the default model over one text (the
 * format is told in golden/make_logits.py). The engine multiplies by the exact Q4_1 weights in f32,
 * which is the function of the F32 re-export, so the first section must match closely; llama.cpp
 * itself rounds activations to 8 bits on the Q4_1 file, so the second must agree only where its two
 * best differ. */
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

static void must(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_text(e), ibid_err_detail());
}

typedef struct reader {
    char *data;
    size_t at, n;
} reader;

static void take(reader *r, void *to, size_t n) {
    if (n > r->n - r->at) fail_msg("golden/logits.bin ends early, at byte %zu", r->n);
    memcpy(to, r->data + r->at, n);
    r->at += n;
}

static uint32_t take_u32(reader *r) {
    uint32_t v;
    take(r, &v, sizeof v);
    return v;
}

static reader read_golden(void) {
    static const char path[] = "tests/golden/logits.bin";
    FILE *f = fopen(path, "rb");
    reader r = {0};
    if (!f) fail_msg("%s is missing: make it with tests/golden/make_logits.py", path);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    r.n = (size_t)ftell(f);
    rewind(f);
    r.data = malloc(r.n);
    assert_non_null(r.data);
    assert_int_equal(fread(r.data, 1, r.n, f), r.n);
    fclose(f);
    return r;
}

typedef struct row {
    int32_t top[2];
    float logit[2], lse;
} row;

static size_t best_of(const float *x, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++) {
        if (x[i] > x[best]) best = i;
    }
    return best;
}

/* One section against our logits; margin: count only rows whose two best differ by more. */
static void check_section(reader *r, const float *logits, size_t n, size_t vocab, const char *what,
                          float margin, double most_lse) {
    size_t counted = 0, equal = 0;
    double lse_diff = 0, full_diff = 0;
    for (size_t i = 0; i < n; i++) {
        row g;
        const float *own = logits + i * vocab;
        double sum = 0;
        take(r, g.top, sizeof g.top);
        take(r, g.logit, sizeof g.logit);
        take(r, &g.lse, sizeof g.lse);
        for (size_t v = 0; v < vocab; v++) sum += exp((double)own[v] - (double)g.lse);
        lse_diff = fmax(lse_diff, fabs(log(sum)));
        if (!(g.logit[0] - g.logit[1] > margin)) continue;
        counted++;
        equal += best_of(own, vocab) == (size_t)g.top[0];
    }
    uint32_t n_full = take_u32(r);
    for (uint32_t i = 0; i < n_full; i++) {
        uint32_t p = take_u32(r);
        assert_true(p < n);
        for (size_t v = 0; v < vocab; v++) {
            float want;
            take(r, &want, sizeof want);
            full_diff = fmax(full_diff, fabs((double)want - (double)logits[p * vocab + v]));
        }
    }
    printf("%s: top-1 equal on %zu of %zu positions%s; log-sum-exp differs by at most %.2g, logits "
           "of %u whole rows by %.2g\n",
           what, equal, counted, margin >= 0 ? " with a margin above 0.1" : "", lse_diff, n_full,
           full_diff);
    assert_true(counted >= 500);
    assert_true((double)equal >= 0.99 * (double)counted);
    assert_true(lse_diff < most_lse);
}

static void test_golden(void **state) {
    const char *path = fx_default_model();
    ibid_model *m = NULL;
    ibid_engine *e = NULL;
    ibid_seq *s = NULL;
    char magic[4];
    (void)state;
    if (!path) skip();
    reader r = read_golden();
    take(&r, magic, 4);
    assert_memory_equal(magic, "IBLG", 4);
    assert_int_equal(take_u32(&r), 1);
    size_t n = take_u32(&r), vocab = take_u32(&r);
    r.at += take_u32(&r); /* the text */
    must(ibid_model_open(path, &(ibid_hash){{0}}, &m));
    assert_int_equal(vocab, m->n_vocab);
    assert_true(n >= 500 && n < m->n_ctx);
    int32_t *tokens = calloc(n, sizeof *tokens);
    take(&r, tokens, n * sizeof *tokens);
    float *logits = calloc(n * vocab, sizeof *logits);
    must(ibid_engine_open(m, NULL, &e));
    must(ibid_seq_open(e, n, &s));
    fx_forward(e, s, 0, tokens, n, n, logits);
    check_section(&r, logits, n, vocab, "F32 re-export", -1, 5e-3);
    check_section(&r, logits, n, vocab, "Q4_1", 0.1f, 1);
    assert_int_equal(r.at, r.n);
    ibid_seq_close(s);
    ibid_engine_close(e);
    ibid_model_close(m);
    free(r.data);
    free(tokens);
    free(logits);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_golden)};
    if (!fx_default_model()) return 77;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
