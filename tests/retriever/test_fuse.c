/* Fusion: what the formula says, whatever the order of the input. */
#include "support.h"

#include "retriever/fuse.h"

#include <math.h>

#define assert_near(a, b, tolerance) assert_true(fabs((a) - (b)) <= (tolerance))

static ibidi_candidate cand(uint64_t d, double keys, double lexical) {
    return (ibidi_candidate){.document = d, .block = d, .keys = keys, .lexical = lexical};
}

static void test_formula(void **state) {
    (void)state;
    ibidi_candidate c[3] = {cand(1, 0.2, 4), cand(2, 0.4, 0), cand(3, 0.9, 2)};
    ibidi_fuse(c, 3, 0.5, 8);
    assert_int_equal(c[0].document, 3);
    assert_near(c[0].score, 0.5 * 0.9 + 0.5 * 0.25, 1e-12);
    assert_int_equal(c[1].document, 1);
    assert_near(c[1].score, 0.5 * 0.2 + 0.5 * 0.5, 1e-12);
    assert_int_equal(c[2].document, 2);
    assert_near(c[2].score, 0.5 * 0.4, 1e-12);
}

static void test_weights(void **state) {
    (void)state;
    ibidi_candidate c[3] = {cand(1, 0.2, 4), cand(2, 0.4, 0), cand(3, 0.9, 2)};
    ibidi_fuse(c, 3, 1, 4);
    assert_int_equal(c[0].document, 3);
    assert_int_equal(c[1].document, 2);
    ibidi_fuse(c, 3, 0, 4);
    assert_int_equal(c[0].document, 1);
    assert_near(c[0].score, 1, 1e-12);
    assert_int_equal(c[2].document, 2);
    /* No word of the question counts: keys alone. */
    ibidi_fuse(c, 3, 0.5, 0);
    assert_int_equal(c[0].document, 3);
    assert_near(c[0].score, 0.9, 1e-12);
}

/* The best hit's share of what words could say opens the gate for all. */
static void test_gate(void **state) {
    (void)state;
    static const double best[] = {1, 2, 2.5, 3, 9, 20}, gate[] = {0, 0, 0.5, 1, 1, 1};
    for (size_t i = 0; i < 6; i++) {
        ibidi_candidate c[2] = {cand(1, 0.5, best[i]), cand(2, 0.5, 1)};
        ibidi_fuse(c, 2, 0.6, 10);
        assert_int_equal(c[0].document, 1);
        assert_near(c[0].score, 0.6 * 0.5 + 0.4 * gate[i] * fmin(best[i] / 10, 1), 1e-12);
        assert_near(c[1].score, 0.6 * 0.5 + 0.4 * gate[i] * 0.1, 1e-12);
    }
}

/* What holds the very code comes first, whatever the scores say; among such, by score. */
static void test_exact(void **state) {
    (void)state;
    ibidi_candidate c[4] = {cand(1, 0.9, 9), cand(2, -0.5, 0.1), cand(3, 0.8, 1), cand(4, 0.1, 1)};
    c[1].exact = c[3].exact = true;
    ibidi_fuse(c, 4, 0.5, 10);
    assert_int_equal(c[0].document, 4);
    assert_int_equal(c[1].document, 2);
    assert_int_equal(c[2].document, 1);
    assert_int_equal(c[3].document, 3);
}

static void test_missing(void **state) {
    (void)state;
    /* One search only: its own scores. */
    ibidi_candidate k[2] = {cand(1, 0.3, NAN), cand(2, 0.6, NAN)};
    ibidi_fuse(k, 2, 0.5, 10);
    assert_int_equal(k[0].document, 2);
    assert_near(k[0].score, 0.6, 1e-12);
    ibidi_candidate l[2] = {cand(1, NAN, 3), cand(2, NAN, 2)};
    ibidi_fuse(l, 2, 0.5, 10);
    assert_int_equal(l[0].document, 1);
    assert_near(l[0].score, 3, 1e-12);
    /* A missing score is no better than the lowest. */
    ibidi_candidate m[3] = {cand(1, NAN, 3), cand(2, 0.1, 3), cand(3, 0.9, 3)};
    ibidi_fuse(m, 3, 0.5, 10);
    assert_int_equal(m[0].document, 3);
    assert_near(m[1].score, m[2].score, 1e-12);
    assert_int_equal(m[1].document, 1); /* a tie goes by number */
    ibidi_fuse(NULL, 0, 0.5, 10);
    ibidi_candidate one[1] = {cand(9, 0.5, 4)};
    ibidi_fuse(one, 1, 0.5, 10);
    assert_near(one[0].score, 0.5 * 0.5 + 0.5 * 0.4, 1e-12);
}

static void test_order_free(void **state) {
    (void)state;
    uint64_t seed = 42;
    print_message("seed %llu\n", (unsigned long long)seed);
    for (int round = 0; round < 200; round++) {
        ibidi_candidate a[50], b[50];
        for (size_t i = 0; i < 50; i++)
            a[i] = b[i] = cand(i + 1, t_rnd(&seed) % 5 == 0 ? NAN : (double)(t_rnd(&seed) % 8) / 8,
                               (double)(t_rnd(&seed) % 6));
        for (size_t i = 49; i > 0; i--) {
            size_t j = t_rnd(&seed) % (i + 1);
            ibidi_candidate t = b[i];
            b[i] = b[j];
            b[j] = t;
        }
        ibidi_fuse(a, 50, 0.5, 10);
        ibidi_fuse(b, 50, 0.5, 10);
        for (size_t i = 0; i < 50; i++) {
            assert_near(a[i].score, b[i].score, 1e-9);
            if (i) assert_true(a[i - 1].score >= a[i].score);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_formula), cmocka_unit_test(test_weights),
        cmocka_unit_test(test_gate),    cmocka_unit_test(test_exact),
        cmocka_unit_test(test_missing), cmocka_unit_test(test_order_free),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
