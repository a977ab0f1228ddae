/* Is there an answer: what each piece of evidence does, in collections of any size. */
#include "support.h"

#include "retriever/relevance.h"

#include <math.h>
#include <string.h>

static ibidi_evidence of(const double *keys, size_t n, size_t blocks, double share) {
    double copy[3000];
    ibidi_evidence v = {.share = share};
    assert_true(n <= 3000);
    memcpy(copy, keys, n * sizeof *keys);
    assert_int_equal(ibidi_evidence_keys(copy, n, blocks, 0.6, 0.05, &v), n > 0);
    return v;
}

static void assert_near(double a, double b) {
    if (fabs(a - b) > 1e-9) print_error("%.12g is not %.12g\n", a, b);
    assert_true(fabs(a - b) <= 1e-9);
}

/* Missing neighbours are wrong chunks as calibration saw them; what is no number is none. */
static void test_few(void **state) {
    (void)state;
    const double one[] = {0.8}, three[] = {0.5, NAN, 0.8, 0.7};
    ibidi_evidence v = of(one, 1, 1, 0);
    assert_near(v.best, 4);
    assert_near(v.ahead, 4);
    v = of(three, 4, 3, 0);
    assert_near(v.best, 4);
    assert_near(v.ahead, (0.8 - (0.7 + 0.5 + 3 * 0.6) / 5) / 0.05);
    double none[] = {NAN};
    assert_false(ibidi_evidence_keys(none, 1, 1, 0.6, 0.05, &v));
}

/* The next 28th of the collection, in whatever order. */
static void test_many(void **state) {
    (void)state;
    static double keys[3000];
    for (size_t i = 0; i < 3000; i++) keys[i] = 0.9 - 0.0001 * (double)(i * 7 % 3000);
    static const size_t blocks[] = {300, 2800, 100000}, next[] = {10, 100, 2000};
    for (size_t k = 0; k < 3; k++) {
        ibidi_evidence v = of(keys, 3000, blocks[k], 0);
        assert_near(v.best, 6);
        assert_near(v.ahead, 0.0001 * (double)(next[k] + 1) / 2 / 0.05);
    }
    ibidi_evidence v = of(keys, 0, 10, 0.5);
    assert_near(v.share, 0.5);
}

/* More of any evidence is more; unlike text is refused, the question's words in one clearly best
 * chunk are not. */
static void test_verdict(void **state) {
    (void)state;
    ibidi_evidence low = {0, 0.5, 0.2}, high = {3, 3, 0.75};
    assert_true(ibidi_relevance(&low) < 0.1 && ibidi_relevance(&high) > 0.9);
    for (int i = 0; i < 3; i++) {
        ibidi_evidence v = low;
        *(i == 0 ? &v.best : i == 1 ? &v.ahead : &v.share) += 0.3;
        assert_true(ibidi_relevance(&v) > ibidi_relevance(&low));
    }
    /* A code that keys know nothing of. */
    ibidi_evidence code = {-0.5, 1, 1};
    assert_true(ibidi_relevance(&code) >= IBIDI_RELEVANT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_few),
        cmocka_unit_test(test_many),
        cmocka_unit_test(test_verdict),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
