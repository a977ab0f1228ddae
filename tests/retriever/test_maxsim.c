/* Exact MaxSim over a real store against plain sums in double, and the view's counts. */
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static double slow_score(const ibidi_asking *q, const int8_t *keys, size_t n) {
    double total = 0;
    for (size_t t = 0; t < q->n; t++) {
        double best = -INFINITY;
        for (size_t j = 0; j < n; j++) {
            double dot = 0;
            for (size_t d = 0; d < q->dim; d++)
                dot += (double)q->keys[t * q->dim + d] * keys[j * q->dim + d];
            best = fmax(best, dot / (127.0 * 127.0));
        }
        total += q->weights[t] * best;
    }
    return total / q->sum;
}

typedef struct many {
    uint64_t numbers[300];
    int8_t *keys[300];
    size_t lens[300];
    size_t n;
} many;

static void put_many(t_store *t, many *m, uint64_t *seed) {
    m->n = 300;
    for (size_t i = 0; i < m->n; i++) {
        size_t n = 1 + t_rnd(seed) % 200;
        int32_t tokens[200];
        float v[T_DIM];
        m->keys[i] = malloc(n * T_DIM);
        m->lens[i] = n;
        for (size_t j = 0; j < n; j++) {
            tokens[j] = (int32_t)(t_rnd(seed) % 49152);
            t_unit(seed, v, T_DIM);
            t_quantise(v, T_DIM, m->keys[i] + j * T_DIM);
        }
        ibid_block_put b = {.model = t->model,
                            .prefix = ibid_hash_bytes("p", 1),
                            .kv_type = IBID_KV_Q8_0,
                            .n_tokens = n,
                            .tokens = tokens,
                            .calibration = t->calibration,
                            .keys = m->keys[i],
                            .keys_dim = T_DIM,
                            .job = t->job};
        assert_ok(ibid_store_blocks_put(t->s, &b, 1, &m->numbers[i]));
    }
}

static void test_against_double(void **state) {
    (void)state;
    uint64_t seed = 99;
    t_store t;
    many *m = calloc(1, sizeof *m);
    ibid_snap *snap;
    ibid_pool *pool;
    print_message("seed %llu\n", (unsigned long long)seed);
    t_open(&t);
    ibid_job job = {.kind = t_str("index"), .collection = t_str("c"), .state = t_str("running")};
    assert_ok(ibid_store_job_put(t.s, &job, &t.job));
    put_many(&t, m, &seed);
    assert_ok(ibid_snap_begin(t.s, &snap));
    assert_ok(ibid_pool_open(2, &pool));
    int8_t qk[20 * T_DIM];
    double weights[20], sum = 0;
    float v[T_DIM], scores[2][302];
    for (size_t i = 0; i < 20; i++) {
        t_unit(&seed, v, T_DIM);
        t_quantise(v, T_DIM, qk + i * T_DIM);
        sum += weights[i] = 0.1 + (double)(t_rnd(&seed) % 100) / 20;
    }
    ibidi_asking q = {.keys = qk,
                      .n = 20,
                      .dim = T_DIM,
                      .calibration = t.calibration,
                      .weights = weights,
                      .sum = sum};
    for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
        size_t scored;
        if (!(*k)->supported()) continue;
        uint64_t blocks[302];
        memcpy(blocks, m->numbers, 300 * sizeof *blocks);
        blocks[300] = 999999; /* not stored */
        blocks[301] = m->numbers[0];
        assert_ok(ibidi_maxsim_blocks(*k, NULL, snap, NULL, &q, blocks, 302, scores[0], &scored));
        assert_int_equal(scored, 301);
        assert_ok(ibidi_maxsim_blocks(*k, pool, snap, NULL, &q, blocks, 302, scores[1], &scored));
        assert_true(isnan(scores[0][300]));
        for (size_t i = 0; i < 300; i++) {
            double want = slow_score(&q, m->keys[i], m->lens[i]);
            assert_true(fabs(scores[0][i] - want) < 1e-6);
            assert_true(scores[0][i] == scores[1][i]);
        }
        assert_true(scores[0][301] == scores[0][0]);
        /* keys of another calibration or dimension are not scored */
        ibidi_asking other = q;
        other.calibration = ibid_hash_bytes("other", 5);
        assert_ok(ibidi_maxsim_blocks(*k, NULL, snap, NULL, &other, blocks, 302, scores[0], &scored));
        assert_int_equal(scored, 0);
        other = q;
        other.dim = 32;
        assert_ok(ibidi_maxsim_blocks(*k, NULL, snap, NULL, &other, blocks, 302, scores[0], &scored));
        assert_int_equal(scored, 0);
        other.dim = 33;
        assert_err(ibidi_maxsim_blocks(*k, NULL, snap, NULL, &other, blocks, 302, scores[0], &scored),
                   IBID_INVAL);
    }
    ibid_pool_close(pool);
    ibid_snap_end(snap);
    for (size_t i = 0; i < m->n; i++) free(m->keys[i]);
    free(m);
    t_close(&t);
}

/* A question that repeats a block's own tokens scores 1 there (up to int8 rounding). */
static void test_self(void **state) {
    (void)state;
    int8_t keys[5 * T_DIM];
    double weights[5] = {1, 2, 3, 4, 5};
    int32_t best[5];
    const ibid_kernels *k;
    for (int32_t i = 0; i < 5; i++) t_key(i * 31, keys + i * T_DIM);
    ibidi_asking q = {.keys = keys, .n = 5, .dim = T_DIM, .weights = weights, .sum = 15};
    assert_ok(ibid_kernels_get(NULL, &k));
    assert_true(fabs(ibidi_maxsim_keys(k, &q, keys, 5, best) - 1) < 0.02);
    assert_true(ibidi_maxsim_keys(k, &q, keys, 1, best) < 0.7);
}

static void test_view(void **state) {
    (void)state;
    ibidi_view v = {.n = 0};
    int32_t a[] = {5, 7, 5, 9}, b[] = {7}, ids[] = {5, 7, 11, -1, 1 << 28};
    double w[5], sum;
    ibid_block ba = {.number = 20, .n_tokens = 4, .tokens = a},
               bb = {.number = 10, .n_tokens = 1, .tokens = b};
    assert_ok(ibidi_view_add(&v, &ba));
    assert_ok(ibidi_view_add(&v, &bb));
    assert_ok(ibidi_view_add(&v, &bb)); /* there already */
    assert_int_equal(v.n, 2);
    assert_int_equal(v.tokens, 5);
    assert_int_equal(v.blocks[0].block, 10);
    assert_int_equal(ibidi_view_at(&v, 20), 1);
    assert_int_equal(ibidi_view_at(&v, 15), 2);
    ibidi_view_idf(&v, ids, 5, w, &sum);
    assert_true(fabs(w[0] - log((2 - 1 + 0.5) / 1.5 + 1)) < 1e-12);
    assert_true(fabs(w[1] - log((2 - 2 + 0.5) / 2.5 + 1)) < 1e-12);
    assert_true(w[2] > w[0] && w[2] == w[3] && w[2] == w[4]);
    assert_true(fabs(sum - (w[0] + w[1] + 3 * w[2])) < 1e-12);
    ibidi_view_drop(&v, 20);
    ibidi_view_drop(&v, 20);
    assert_int_equal(v.n, 1);
    assert_int_equal(v.df[5], 0);
    assert_int_equal(v.df[7], 1);
    int32_t bad[] = {-4};
    ibid_block bc = {.number = 30, .n_tokens = 1, .tokens = bad};
    assert_err(ibidi_view_add(&v, &bc), IBID_CORRUPT);
    assert_int_equal(v.n, 1);
    ibidi_view_fini(&v);
    /* random adds and drops end where a fresh view does */
    uint64_t seed = 5;
    bool in[200] = {false};
    print_message("seed %llu\n", (unsigned long long)seed);
    for (int i = 0; i < 5000; i++) {
        uint64_t n = t_rnd(&seed) % 200;
        int32_t tokens[3] = {(int32_t)n, (int32_t)(n % 7), (int32_t)(n % 3)};
        ibid_block blk = {.number = n, .n_tokens = 3, .tokens = tokens};
        if (t_rnd(&seed) & 1) {
            assert_ok(ibidi_view_add(&v, &blk));
            in[n] = true;
        } else {
            ibidi_view_drop(&v, n);
            in[n] = false;
        }
    }
    size_t n = 0;
    uint32_t df[200] = {0};
    for (uint64_t i = 0; i < 200; i++)
        if (in[i]) {
            assert_int_equal(v.blocks[n++].block, i);
            for (uint64_t id = 0; id < 200; id++) df[id] += id == i || id == i % 7 || id == i % 3;
        }
    assert_int_equal(v.n, n);
    assert_memory_equal(v.df, df, sizeof df);
    ibidi_view_fini(&v);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_double),
        cmocka_unit_test(test_self),
        cmocka_unit_test(test_view),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
