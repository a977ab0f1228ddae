#include "attention/plan/sampler.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
/* clang-format off */
#include <cmocka.h>
/* clang-format on */

enum { N = 1000, DRAWS = 40000 };

static void must(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_text(e), ibid_err_detail());
}

static void test_greedy(void **state) {
    ibid_sampler *s = NULL;
    int32_t t = -1;
    float logits[] = {1, 3, NAN, 3, -INFINITY};
    (void)state;
    must(ibid_sampler_open(5, 0, 0.5, 1, &s));
    must(ibid_sampler_pick(s, logits, &t));
    assert_int_equal(t, 1); /* the lower id of two equals */
    logits[4] = INFINITY;
    must(ibid_sampler_pick(s, logits, &t));
    assert_int_equal(t, 4);
    for (int i = 0; i < 5; i++) logits[i] = i % 2 ? NAN : -INFINITY;
    assert_int_equal(ibid_sampler_pick(s, logits, &t), IBID_INVAL);
    ibid_sampler_close(s);
}

static void test_refuses(void **state) {
    ibid_sampler *s = NULL;
    (void)state;
    assert_int_equal(ibid_sampler_open(5, -1, 1, 1, &s), IBID_INVAL);
    assert_int_equal(ibid_sampler_open(5, (double)NAN, 1, 1, &s), IBID_INVAL);
    assert_int_equal(ibid_sampler_open(5, 1, 1.1, 1, &s), IBID_INVAL);
    assert_int_equal(ibid_sampler_open(0, 1, 1, 1, &s), IBID_INVAL);
    assert_null(s);
}

static void make_logits(float *logits) {
    for (size_t i = 0; i < N; i++) logits[i] = (float)sin((double)i * 12.9898) * 4;
}

/* The same seed gives the same tokens, another seed others. */
static void test_seed(void **state) {
    float logits[N];
    int32_t a, b, c;
    size_t same = 0;
    ibid_sampler *s[3] = {NULL};
    (void)state;
    make_logits(logits);
    must(ibid_sampler_open(N, 0.8, 0.9, 42, &s[0]));
    must(ibid_sampler_open(N, 0.8, 0.9, 42, &s[1]));
    must(ibid_sampler_open(N, 0.8, 0.9, 43, &s[2]));
    for (int i = 0; i < 200; i++) {
        must(ibid_sampler_pick(s[0], logits, &a));
        must(ibid_sampler_pick(s[1], logits, &b));
        must(ibid_sampler_pick(s[2], logits, &c));
        assert_int_equal(a, b);
        same += a == c;
    }
    assert_true(same < 50);
    for (int i = 0; i < 3; i++) ibid_sampler_close(s[i]);
}

typedef struct weighed {
    double p;
    int32_t id;
} weighed;

static int by_weight(const void *x, const void *y) {
    const weighed *a = x, *b = y;
    if (a->p != b->p) return a->p > b->p ? -1 : 1;
    return (a->id > b->id) - (a->id < b->id);
}

/* Frequencies against the distribution worked out in full: the nucleus exactly, and chi-squared. */
static void check_distribution(double temperature, double top_p, uint64_t seed) {
    float logits[N];
    static size_t count[N];
    weighed w[N];
    double total = 0, kept = 0, chi = 0;
    size_t nucleus = 0, cells = 0, rest_count = 0;
    ibid_sampler *s = NULL;
    make_logits(logits);
    for (size_t i = 0; i < N; i++) {
        w[i] = (weighed){exp((double)logits[i] / temperature), (int32_t)i};
        total += w[i].p;
        count[i] = 0;
    }
    qsort(w, N, sizeof *w, by_weight);
    double share = top_p > 0 ? top_p : 1;
    while (nucleus < N && kept < share * total * (1 - 1e-12)) kept += w[nucleus++].p;
    must(ibid_sampler_open(N, temperature, top_p, seed, &s));
    for (size_t i = 0; i < DRAWS; i++) {
        int32_t t = -1;
        must(ibid_sampler_pick(s, logits, &t));
        count[t]++;
    }
    for (size_t i = nucleus; i < N; i++) assert_int_equal(count[w[i].id], 0);
    double rest = 0;
    for (size_t i = 0; i < nucleus; i++) {
        double expected = w[i].p / kept * DRAWS, off = (double)count[w[i].id] - expected;
        if (expected < 10) {
            rest += expected;
            rest_count += count[w[i].id];
            continue;
        }
        chi += off * off / expected;
        cells++;
    }
    if (rest > 10) chi += ((double)rest_count - rest) * ((double)rest_count - rest) / rest, cells++;
    double sigmas = (chi - (double)cells) / sqrt(2 * (double)cells);
    printf("temperature %g, top_p %g, seed %llu: nucleus %zu, chi-squared %.1f over %zu cells\n",
           temperature, top_p, (unsigned long long)seed, nucleus, chi, cells);
    assert_true(fabs(sigmas) < 5);
    ibid_sampler_close(s);
}

static void test_distribution(void **state) {
    (void)state;
    check_distribution(1, 1, 7);
    check_distribution(1, 0, 8); /* 0: all take part */
    check_distribution(0.7, 0.9, 9);
    check_distribution(2, 0.3, 10);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_seed),
        cmocka_unit_test(test_distribution),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
