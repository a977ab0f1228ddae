/* A stored calibration: round trip, damage, token keys. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "attention/plan/calibration.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void fill(ibid_calibration *c, uint32_t heads, uint32_t dim) {
    memset(c, 0, sizeof *c);
    c->n_heads = heads;
    c->head_dim = dim;
    for (uint32_t i = 0; i < heads; i++) c->heads[i] = (ibid_head){3 + i, i};
    for (uint32_t i = 0; i < heads * dim; i++) c->mean[i] = (float)i / 7.0f - 1.0f;
    c->null_mean = 0.5f;
    c->null_sd = 0.04f;
    c->relevant = 0.58f;
    c->find = 0.52f;
    c->recall1 = 0.9f;
    c->margin = 0.1f;
}

static void encode(ibid_calibration *c, ibid_buf *out) {
    ibid_buf_init(out, 1 << 20);
    assert_int_equal(ibid_calibration_encode(c, out), IBID_OK);
}

static void round_trip(void **state) {
    static ibid_calibration a, b;
    ibid_buf e, again;
    ibid_hash none = {{0}};
    (void)state;
    fill(&a, 3, 64);
    encode(&a, &e);
    assert_int_not_equal(ibid_hash_cmp(&a.id, &none), 0);
    assert_int_equal(ibid_calibration_decode(e.data, e.len, &b), IBID_OK);
    assert_memory_equal(&a, &b, sizeof a);
    encode(&b, &again); /* the same bytes, so the same id */
    assert_int_equal(again.len, e.len);
    assert_memory_equal(again.data, e.data, e.len);
    a.mean[5] += 0.001f;
    ibid_buf_fini(&again);
    encode(&a, &again);
    assert_int_not_equal(ibid_hash_cmp(&a.id, &b.id), 0);
    ibid_buf_fini(&e);
    ibid_buf_fini(&again);
}

static void no_head(void **state) {
    static ibid_calibration a, b;
    ibid_buf e;
    ibid_hash none = {{0}};
    (void)state;
    fill(&a, 0, 16);
    encode(&a, &e);
    assert_int_equal(ibid_hash_cmp(&a.id, &none), 0);
    assert_int_equal(ibid_calibration_decode(e.data, e.len, &b), IBID_OK);
    assert_int_equal(b.n_heads, 0);
    assert_int_equal(ibid_hash_cmp(&b.id, &none), 0);
    ibid_buf_fini(&e);
    fill(&a, IBID_HEADS_MAX, 64);
    a.n_heads++;
    ibid_buf_init(&e, 1 << 20);
    assert_int_equal(ibid_calibration_encode(&a, &e), IBID_INVAL);
    ibid_buf_fini(&e);
}

/* No damage is read as a calibration with other heads or sizes than fit; none harms. */
static void damage(void **state) {
    static ibid_calibration a, b;
    ibid_buf e;
    (void)state;
    fill(&a, 2, 64);
    encode(&a, &e);
    for (size_t n = 0; n < e.len; n++) {
        char *cut = malloc(n + 1);
        memcpy(cut, e.data, n);
        assert_int_equal(ibid_calibration_decode(cut, n, &b), IBID_CORRUPT);
        free(cut);
    }
    for (size_t i = 0; i < e.len && i < 400; i++) {
        for (int bit = 0; bit < 8; bit++) {
            char *bad = malloc(e.len);
            memcpy(bad, e.data, e.len);
            bad[i] = (char)(bad[i] ^ (1 << bit));
            ibid_err r = ibid_calibration_decode(bad, e.len, &b);
            assert_true(r == IBID_OK || r == IBID_CORRUPT || r == IBID_NOTSUP || r == IBID_TOOBIG);
            if (r == IBID_OK) {
                assert_true(b.n_heads <= IBID_HEADS_MAX && b.head_dim <= IBID_HEAD_DIM_MAX);
                for (size_t k = 0; k < (size_t)b.n_heads * b.head_dim; k++)
                    assert_true(isfinite(b.mean[k]));
            }
            free(bad);
        }
    }
    ibid_buf_fini(&e);
}

/* Against the definition in double. */
static void token_keys(void **state) {
    static ibid_calibration c;
    enum { N = 5, D = 32, H = 2 };
    float raw[N * D * H];
    int8_t out[N * D * H];
    uint64_t seed = 1;
    (void)state;
    fill(&c, H, D);
    for (size_t i = 0; i < N * D * H; i++) {
        seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
        raw[i] = (float)(seed >> 40) / 1e6f - 8.0f;
    }
    memcpy(raw, c.mean, sizeof(float) * D); /* a key that is the mean: no direction */
    ibid_token_keys(&c, raw, N, out);
    for (size_t t = 0; t < N; t++) {
        for (size_t h = 0; h < H; h++) {
            double norm = 0, x[D];
            for (size_t i = 0; i < D; i++) {
                x[i] = (double)raw[(t * H + h) * D + i] - (double)c.mean[h * D + i];
                norm += x[i] * x[i];
            }
            for (size_t i = 0; i < D; i++) {
                double want = norm > 0 ? 127 * x[i] / sqrt(norm) / sqrt(H) : 0;
                assert_true(fabs(want - out[(t * H + h) * D + i]) <= 0.5001);
            }
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trip),
        cmocka_unit_test(no_head),
        cmocka_unit_test(damage),
        cmocka_unit_test(token_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
