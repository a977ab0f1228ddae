/* Smoothing: worked by hand, then against the formula written out plainly. */
#include "support.h"

#include "retriever/smooth.h"
#include "rpc/base/mem.h"

#include <math.h>

#define assert_near(a, b, tolerance) assert_true(fabs((a) - (b)) <= (tolerance))

static ibidi_candidate cand(uint64_t block, double score) {
    return (ibidi_candidate){
        .document = block, .block = block, .keys = score, .lexical = 1, .score = score};
}

static void add(ibidi_view *v, uint64_t number, const int32_t *ids, size_t n) {
    ibid_block b = {.number = number, .n_tokens = n, .tokens = ids};
    assert_ok(ibidi_view_add(v, &b));
}

/* Twelve blocks; token 9 is in all of them, 1, 2 and 4 in two, the others in one. */
static void small_view(ibidi_view *v) {
    add(v, 1, (int32_t[]){1, 2, 4, 9, 9}, 5);
    add(v, 2, (int32_t[]){9, 3, 2, 1}, 4);
    add(v, 3, (int32_t[]){4, 5, 9}, 3);
    for (int32_t i = 4; i <= 12; i++) add(v, (uint64_t)i, (int32_t[]){9, 10 + i}, 2);
}

static void test_formula(void **state) {
    (void)state;
    ibidi_view v = {.n = 0};
    small_view(&v);
    /* Squared weights: two = ln(13 / 2.5)^2 = 2.718, one = ln(13 / 1.5)^2 = 4.663.
     * Likeness, squared: 1 and 2: 4 two / (3 (2 two + one)) = 0.3588; 1 and 3: two / (3 (two +
     * one)) = 0.1227. The next three scores have mean 0.4, so the lead is 1/3 and a = 0.2. They
     * become 0.8 * 0.6 + 0.2 * 0.474513 = 0.574903, 0.52, 0.44 and 0.3 (like none of them), and
     * then lie 1 / 0.8 times as far below 0.6 as below the first. */
    ibidi_candidate c[4] = {cand(1, 0.6), cand(2, 0.5), cand(3, 0.4), cand(4, 0.3)};
    assert_ok(ibidi_smooth(c, 4, &v, 1));
    assert_int_equal(c[0].block, 1);
    assert_near(c[0].score, 0.6, 1e-12);
    assert_int_equal(c[1].block, 2);
    assert_near(c[1].score, 0.531372, 1e-6);
    assert_int_equal(c[2].block, 3);
    assert_near(c[2].score, 0.431372, 1e-6);
    assert_near(c[3].score, 0.256372, 1e-6);
    /* Half the gate, half the way: a = 0.2; 0.58, 0.52 and 0.5. */
    ibidi_candidate h[3] = {cand(1, 0.6), cand(2, 0.5), cand(4, 0.5)};
    assert_ok(ibidi_smooth(h, 3, &v, 0.5));
    assert_near(h[1].score, 0.6 - 0.06 / 0.8, 1e-12);
    assert_near(h[2].score, 0.6 - 0.08 / 0.8, 1e-12);
    ibidi_view_fini(&v);
}

static void test_left_alone(void **state) {
    (void)state;
    ibidi_view v = {.n = 0};
    small_view(&v);
    ibidi_candidate clear[3] = {cand(1, 0.9), cand(2, 0.4), cand(3, 0.3)};
    assert_ok(ibidi_smooth(clear, 3, &v, 1)); /* the first stands out */
    assert_near(clear[1].score, 0.4, 0);
    ibidi_candidate shut[3] = {cand(1, 0.6), cand(2, 0.5), cand(3, 0.5)};
    assert_ok(ibidi_smooth(shut, 3, &v, 0));
    assert_near(shut[1].score, 0.5, 0);
    ibidi_candidate low[3] = {cand(1, 0), cand(2, -0.1), cand(3, -0.2)};
    assert_ok(ibidi_smooth(low, 3, &v, 1));
    assert_near(low[2].score, -0.2, 0);
    assert_ok(ibidi_smooth(NULL, 0, &v, 1));
    ibidi_candidate gone[3] = {cand(100, 0.6), cand(101, 0.5), cand(1, 0.5)};
    assert_ok(ibidi_smooth(gone, 3, &v, 1)); /* blocks the view has not got */
    assert_near(gone[0].score, 0.6, 0);
    ibidi_view_fini(&v);
}

static void test_exact_stay_first(void **state) {
    (void)state;
    ibidi_view v = {.n = 0};
    small_view(&v);
    ibidi_candidate c[4] = {cand(12, 0.1), cand(1, 0.6), cand(2, 0.5), cand(4, 0.5)};
    c[0].exact = true;
    assert_ok(ibidi_smooth(c, 4, &v, 1));
    assert_int_equal(c[0].block, 12);
    assert_near(c[0].score, 0.1, 0);
    assert_true(c[2].block == 2 && c[2].score > 0.5);
    ibidi_view_fini(&v);
}

/* One block in two documents is its own double. */
static void test_same_block(void **state) {
    (void)state;
    ibidi_view v = {.n = 0};
    small_view(&v);
    ibidi_candidate c[3] = {cand(5, 0.6), cand(6, 0.5), cand(6, 0.4)};
    c[2].document = 7;
    assert_ok(ibidi_smooth(c, 3, &v, 1));
    /* The others have 0.45, a quarter less than the best: a = 0.3; 0.6, 0.47 and 0.43. */
    assert_near(c[0].score, 0.6, 1e-12);
    assert_near(c[1].score, 0.6 - 0.13 / 0.7, 1e-12);
    assert_near(c[2].score, 0.6 - 0.17 / 0.7, 1e-12);
    ibidi_view_fini(&v);
}

enum { BLOCKS = 400, IDS = 120, MANY = 260 };

static double likeness(bool (*has)[IDS], const double *w, size_t x, size_t y) {
    double both = 0, a = 0, b = 0;
    for (size_t t = 0; t < IDS; t++) {
        both += has[x][t] && has[y][t] ? w[t] * w[t] : 0;
        a += has[x][t] ? w[t] * w[t] : 0;
        b += has[y][t] ? w[t] * w[t] : 0;
    }
    return a > 0 && b > 0 ? both / sqrt(a * b) : 0;
}

static void test_against_plain(void **state) {
    (void)state;
    static bool has[BLOCKS][IDS];
    static ibidi_candidate c[MANY], before[MANY];
    double w[IDS];
    uint64_t seed = 7;
    ibidi_view v = {.n = 0};
    print_message("seed %llu\n", (unsigned long long)seed);
    for (size_t b = 0; b < BLOCKS; b++) {
        int32_t ids[IDS];
        size_t n = 0;
        for (size_t t = 0; t < IDS; t++) {
            has[b][t] = t_rnd(&seed) % (t < 5 ? 2 : 10) == 0;
            if (has[b][t]) ids[n++] = (int32_t)t;
        }
        if (!n) ids[n++] = IDS; /* a token of no one else's */
        add(&v, b, ids, n);
    }
    for (size_t t = 0; t < IDS; t++) {
        double df = 0;
        for (size_t b = 0; b < BLOCKS; b++) df += has[b][t];
        w[t] = df * 4 > BLOCKS ? 0 : log((BLOCKS + 1) / (df + 0.5));
    }
    for (size_t i = 0; i < MANY; i++) c[i] = cand(i, 1 - (double)i / 1000);
    memcpy(before, c, sizeof c);
    assert_ok(ibidi_smooth(c, MANY, &v, 1));
    double a = 0.6 * (1 - 0.0055 / 0.5), want[IBIDI_SMOOTH_POOL], top = 0;
    for (size_t i = 0; i < IBIDI_SMOOTH_POOL; i++) {
        double sum = 0, weights = 0;
        bool taken[MANY] = {false};
        taken[i] = true;
        for (size_t near = 0; near < IBIDI_SMOOTH_NEAR; near++) {
            size_t best = MANY;
            double most = 0;
            for (size_t j = 0; j < IBIDI_SMOOTH_POOL; j++) {
                double x = taken[j] ? 0 : likeness(has, w, i, j);
                if (x > most) {
                    most = x;
                    best = j;
                }
            }
            if (best == MANY) break;
            taken[best] = true;
            sum += most * most * before[best].score;
            weights += most * most;
        }
        want[i] = before[i].score;
        if (weights > 0) want[i] += a * (sum / weights - want[i]);
        top = fmax(top, want[i]);
    }
    for (size_t k = 0; k < IBIDI_SMOOTH_POOL; k++) {
        assert_near(c[k].score, 1 - (top - want[c[k].block]) / (1 - a), 1e-9);
        assert_true(k == 0 || c[k - 1].score >= c[k].score);
    }
    for (size_t k = IBIDI_SMOOTH_POOL; k < MANY; k++) {
        assert_int_equal(c[k].block, k);
        assert_true(c[k].score <= c[IBIDI_SMOOTH_POOL - 1].score);
        assert_near(c[k].score - c[MANY - 1].score, before[k].score - before[MANY - 1].score, 1e-9);
    }
    ibidi_view_fini(&v);
}

static void test_memory(void **state) {
    (void)state;
    ibidi_view v = {.n = 0};
    small_view(&v);
    for (uint64_t nth = 1;; nth++) {
        ibidi_candidate c[3] = {cand(1, 0.6), cand(2, 0.5), cand(3, 0.5)};
        ibid_alloc_fail_at(nth);
        ibid_err e = ibidi_smooth(c, 3, &v, 1);
        ibid_alloc_fail_at(0);
        if (!e) {
            assert_true(nth == 6);
            break;
        }
        assert_int_equal(e, IBID_NOMEM);
        assert_near(c[1].score, 0.5, 0);
    }
    ibidi_view_fini(&v);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_formula),          cmocka_unit_test(test_left_alone),
        cmocka_unit_test(test_exact_stay_first), cmocka_unit_test(test_same_block),
        cmocka_unit_test(test_against_plain),    cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
