/* A stored calibration: round trip, damage, token keys. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "attention/plan/calibration.h"
#include "rpc/bus/msg.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static uint64_t seed = 1;

static float random_float(float most) {
    seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (float)((double)(seed >> 33) / 2147483648.0 * 2 - 1) * most;
}

/* A map with every part there can be; out 0: raw parts only. */
static ibid_keymap *make_map(uint32_t inputs, uint32_t head_dim, uint32_t raw, uint32_t out,
                             uint32_t hidden) {
    ibid_keymap s = {.head_dim = head_dim,
                     .n_inputs = inputs,
                     .n_raw = raw,
                     .out = out,
                     .hidden = hidden,
                     .norm = hidden > 0,
                     .has_gain = out > 0,
                     .has_question_mean = out > 0};
    ibid_keymap *m = NULL;
    for (uint32_t i = 0; i < inputs; i++) s.inputs[i] = (ibid_head){3 + i, i % 3};
    for (uint32_t i = 0; i < raw; i++) s.raw[i] = inputs - 1 - i;
    for (uint32_t i = 0; i < raw; i++) s.raw_weight[i] = (float)(1 + i);
    s.out_weight = 2;
    assert_int_equal(ibid_keymap_open(&s, &m), IBID_OK);
    size_t d = ibid_keymap_input(m);
    for (size_t i = 0; i < d; i++) m->mean[i] = random_float(1);
    for (size_t i = 0; m->gain && i < d; i++) m->gain[i] = 1 + random_float(0.5f);
    for (size_t i = 0; m->gain && i < d; i++) m->question_mean[i] = random_float(1);
    for (size_t i = 0; i < out; i++) m->b0[i] = random_float(0.1f);
    for (size_t i = 0; i < hidden; i++) m->b1[i] = random_float(0.5f);
    for (size_t i = 0; i < out * d; i++) m->w0[i] = ibid_f32_to_f16(random_float(0.2f));
    for (size_t i = 0; i < hidden * d; i++) m->w1[i] = ibid_f32_to_f16(random_float(0.3f));
    for (size_t i = 0; i < (size_t)out * hidden; i++)
        m->w2[i] = ibid_f32_to_f16(random_float(0.3f));
    assert_true(ibid_keymap_settle(m));
    return m;
}

static void fill(ibid_calibration *c, ibid_keymap *map) {
    memset(c, 0, sizeof *c);
    c->map = map;
    c->n_heads = 2;
    c->head_dim = 64;
    c->heads[0] = (ibid_head){9, 0};
    c->heads[1] = (ibid_head){4, 2};
    c->null_mean = 0.5f;
    c->null_sd = 0.04f;
    c->relevant = 0.58f;
    c->find = 0.52f;
    c->recall1 = 0.9f;
    c->margin = 0.1f;
    c->keys_weight = 0.4f;
    strcpy(c->note, "made by a test");
}

static void encode(ibid_calibration *c, ibid_buf *out) {
    ibid_buf_init(out, 8 << 20);
    assert_int_equal(ibid_calibration_encode(c, out), IBID_OK);
}

static void assert_same_map(const ibid_keymap *a, const ibid_keymap *b) {
    size_t d = ibid_keymap_input(a);
    assert_int_equal(ibid_keymap_dim(a), ibid_keymap_dim(b));
    assert_int_equal(a->norm, b->norm);
    assert_memory_equal(a->inputs, b->inputs, sizeof a->inputs);
    assert_memory_equal(a->raw, b->raw, sizeof a->raw);
    assert_memory_equal(a->raw_weight, b->raw_weight, sizeof a->raw_weight);
    assert_memory_equal(a->mean, b->mean, d * sizeof(float));
    assert_int_equal(a->gain != NULL, b->gain != NULL);
    if (a->gain) assert_memory_equal(a->gain, b->gain, d * sizeof(float));
    if (a->gain) assert_memory_equal(a->question_mean, b->question_mean, d * sizeof(float));
    if (!a->out) return;
    assert_true(fabsf(a->out_weight - b->out_weight) == 0);
    assert_memory_equal(a->w0, b->w0, a->out * d * 2);
    assert_memory_equal(a->b0, b->b0, a->out * sizeof(float));
    if (!a->hidden) return;
    assert_memory_equal(a->w1, b->w1, a->hidden * d * 2);
    assert_memory_equal(a->b1, b->b1, a->hidden * sizeof(float));
    assert_memory_equal(a->w2, b->w2, (size_t)a->out * a->hidden * 2);
}

static void round_trip(void **state) {
    static const uint32_t shapes[][5] = {
        {3, 64, 3, 0, 0}, {8, 64, 1, 64, 256}, {24, 32, 0, 96, 0}, {2, 128, 0, 32, 32}};
    ibid_calibration a, b;
    ibid_buf e, again;
    ibid_hash none = {{0}};
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const uint32_t *s = shapes[i];
        fill(&a, make_map(s[0], s[1], s[2], s[3], s[4]));
        a.head_dim = s[1];
        encode(&a, &e);
        assert_int_not_equal(ibid_hash_cmp(&a.id, &none), 0);
        assert_int_equal(ibid_calibration_decode(e.data, e.len, &b), IBID_OK);
        assert_same_map(a.map, b.map);
        ibid_keymap *map = b.map;
        b.map = a.map;
        assert_memory_equal(&a, &b, sizeof a);
        b.map = map;
        encode(&b, &again); /* the same bytes */
        assert_int_equal(again.len, e.len);
        assert_memory_equal(again.data, e.data, e.len);
        ibid_buf_fini(&again);
        /* The id follows what makes keys, and nothing else. */
        a.relevant += 0.1f;
        encode(&a, &again);
        assert_int_equal(ibid_hash_cmp(&a.id, &b.id), 0);
        ibid_buf_fini(&again);
        a.map->mean[5] += 0.001f;
        encode(&a, &again);
        assert_int_not_equal(ibid_hash_cmp(&a.id, &b.id), 0);
        ibid_buf_fini(&again);
        ibid_calibration brief;
        assert_int_equal(ibid_calibration_decode_brief(e.data, e.len, &b.id, &brief), IBID_OK);
        assert_null(brief.map);
        assert_int_equal(brief.dim, b.dim);
        assert_int_equal(brief.dim, ibid_keymap_dim(b.map));
        assert_int_equal(ibid_hash_cmp(&brief.id, &b.id), 0);
        ibid_buf_fini(&e);
        ibid_calibration_fini(&a);
        ibid_calibration_fini(&b);
    }
}

static void no_head(void **state) {
    ibid_calibration a, b;
    ibid_buf e;
    ibid_hash none = {{0}};
    (void)state;
    fill(&a, NULL);
    a.n_heads = 0;
    encode(&a, &e);
    assert_int_equal(ibid_hash_cmp(&a.id, &none), 0);
    assert_int_equal(ibid_calibration_decode(e.data, e.len, &b), IBID_OK);
    assert_null(b.map);
    assert_int_equal(b.dim, 0);
    assert_int_equal(ibid_hash_cmp(&b.id, &none), 0);
    ibid_buf_fini(&e);
    a.n_heads = IBID_HEADS_MAX + 1;
    ibid_buf_init(&e, 1 << 20);
    assert_int_equal(ibid_calibration_encode(&a, &e), IBID_INVAL);
    ibid_buf_fini(&e);
}

/* Version 1, as earlier builds wrote it: {v, head_dim, heads, mean, numbers}, raw parts only. It is
 * read, its id is of its bytes, and it is written back as it was. */
static void version_1(void **state) {
    ibid_calibration c, brief;
    ibid_enc e;
    ibid_buf again;
    float values[2 * 32 + 6], *v = values;
    (void)state;
    for (int i = 0; i < 70; i++) values[i] = (float)i / 8;
    ibid_enc_init(&e, 1 << 20);
    ibid_enc_map(&e, NULL);
    ibid_enc_u64(&e, "v", 1);
    ibid_enc_u64(&e, "head_dim", 32);
    ibid_enc_array(&e, "heads");
    for (uint64_t i = 0; i < 4; i++) ibid_enc_u64(&e, NULL, i);
    ibid_enc_end(&e);
    ibid_enc_bin(&e, "mean", v, 64 * sizeof *v); /* little-endian here, as on all our machines */
    ibid_enc_bin(&e, "numbers", v + 64, 6 * sizeof *v);
    ibid_enc_end(&e);
    assert_int_equal(ibid_enc_done(&e), IBID_OK);
    ibid_hash id = ibid_hash_bytes(e.buf.data, e.buf.len);
    assert_int_equal(ibid_calibration_decode(e.buf.data, e.buf.len, &c), IBID_OK);
    assert_int_equal(ibid_hash_cmp(&c.id, &id), 0);
    assert_int_equal(c.n_heads, 2);
    assert_int_equal(c.heads[1].layer, 2);
    assert_int_equal(c.heads[1].kv_head, 3);
    assert_int_equal(ibid_keymap_dim(c.map), 64);
    assert_true(fabsf(c.map->mean[63] - 63.0f / 8) == 0);
    assert_true(fabsf(c.relevant - 66.0f / 8) == 0);
    encode(&c, &again);
    assert_int_equal(again.len, e.buf.len);
    assert_memory_equal(again.data, e.buf.data, again.len);
    assert_int_equal(ibid_hash_cmp(&c.id, &id), 0);
    assert_int_equal(ibid_calibration_decode_brief(again.data, again.len, &id, &brief), IBID_OK);
    assert_int_equal(brief.dim, 64);
    ibid_buf_fini(&again);
    ibid_enc_fini(&e);
    ibid_calibration_fini(&c);
}

/* No damage is read as a calibration with other sizes than fit; none harms. */
static void damage(void **state) {
    ibid_calibration a, b;
    ibid_buf e;
    (void)state;
    fill(&a, make_map(3, 32, 1, 32, 32));
    encode(&a, &e);
    for (size_t n = 0; n < e.len; n += n < 600 ? 1 : 97) {
        char *cut = malloc(n + 1);
        memcpy(cut, e.data, n);
        assert_int_equal(ibid_calibration_decode(cut, n, &b), IBID_CORRUPT);
        free(cut);
    }
    for (size_t i = 0; i < e.len; i += i < 500 ? 1 : 13) {
        for (int bit = 0; bit < 8; bit++) {
            char *bad = malloc(e.len);
            memcpy(bad, e.data, e.len);
            bad[i] = (char)(bad[i] ^ (1 << bit));
            ibid_err r = ibid_calibration_decode(bad, e.len, &b);
            assert_true(r == IBID_OK || r == IBID_CORRUPT || r == IBID_NOTSUP || r == IBID_TOOBIG);
            if (r == IBID_OK) {
                assert_true(b.n_heads <= IBID_HEADS_MAX && b.dim == ibid_keymap_dim(b.map));
                assert_true(!b.map || ibid_keymap_settle(b.map));
                ibid_calibration_fini(&b);
            }
            free(bad);
        }
    }
    ibid_buf_fini(&e);
    ibid_calibration_fini(&a);
}

/* The definition of head.h in double, one token. */
static void naive_key(const ibid_keymap *m, bool question, const float *raw, double *out) {
    size_t d = m->head_dim, dim = ibid_keymap_input(m);
    const float *mean = question && m->question_mean ? m->question_mean : m->mean;
    double x[IBID_INPUT_MAX], y[IBID_OUT_MAX];
    for (size_t i = 0; i < dim; i++)
        x[i] = ((double)raw[i] - (double)mean[i]) * (m->gain ? (double)m->gain[i] : 1);
    for (size_t h = 0; m->norm && h < m->n_inputs; h++) {
        double len = 0;
        for (size_t i = h * d; i < h * d + d; i++) len += x[i] * x[i];
        for (size_t i = h * d; i < h * d + d; i++) x[i] = len > 0 ? x[i] / sqrt(len) : 0;
    }
    for (size_t p = 0; p < m->n_raw; p++, out += d) {
        const double *part = x + m->raw[p] * d;
        double len = 0;
        for (size_t i = 0; i < d; i++) len += part[i] * part[i];
        for (size_t i = 0; i < d; i++)
            out[i] = len > 0 ? part[i] / sqrt(len) * (double)m->raw_weight[p] : 0;
    }
    for (size_t o = 0; o < m->out; o++) {
        y[o] = (double)m->b0[o];
        for (size_t i = 0; i < dim; i++) y[o] += (double)ibid_f16_to_f32(m->w0[o * dim + i]) * x[i];
    }
    for (size_t h = 0; h < m->hidden; h++) {
        double z = (double)m->b1[h];
        for (size_t i = 0; i < dim; i++) z += (double)ibid_f16_to_f32(m->w1[h * dim + i]) * x[i];
        z = 0.5 * z * (1 + tanh(sqrt(2 / 3.14159265358979) * (z + 0.044715 * z * z * z)));
        for (size_t o = 0; o < m->out; o++)
            y[o] += (double)ibid_f16_to_f32(m->w2[o * m->hidden + h]) * z;
    }
    double len = 0;
    for (size_t o = 0; o < m->out; o++) len += y[o] * y[o];
    for (size_t o = 0; o < m->out; o++)
        out[o] = len > 0 ? y[o] / sqrt(len) * (double)m->out_weight : 0;
}

/* Against the definition, with every backend, and the same keys whatever comes with them. */
static void token_keys(void **state) {
    static const uint32_t shapes[][5] = {
        {2, 32, 2, 0, 0}, {8, 64, 1, 64, 256}, {5, 32, 0, 32, 0}, {3, 64, 0, 128, 96}};
    enum { N = 300 };
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const uint32_t *s = shapes[i];
        ibid_keymap *m = make_map(s[0], s[1], s[2], s[3], s[4]);
        size_t in = ibid_keymap_input(m), dim = ibid_keymap_dim(m);
        float *raw = malloc(N * in * sizeof *raw);
        double *want = calloc(dim, sizeof *want);
        int8_t *got = malloc(N * dim), *alone = malloc(dim);
        for (size_t k = 0; k < N * in; k++) raw[k] = random_float(4);
        memcpy(raw, m->mean, m->head_dim * sizeof *raw); /* a raw part without a direction */
        for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
            if (!(*k)->supported()) continue;
            for (int question = 0; question < 2; question++) {
                assert_int_equal(ibid_token_keys(m, *k, question, raw, N, got), IBID_OK);
                for (size_t t = 0; t < N; t += 7) {
                    naive_key(m, question, raw + t * in, want);
                    double length = 0;
                    for (size_t j = 0; j < dim; j++) {
                        assert_true(fabs(127 * want[j] - got[t * dim + j]) <= 0.502);
                        length += want[j] * want[j];
                    }
                    assert_true(length < 1.0001);
                    assert_int_equal(ibid_token_keys(m, *k, question, raw + t * in, 1, alone),
                                     IBID_OK);
                    assert_memory_equal(alone, got + t * dim, dim);
                }
            }
        }
        free(raw);
        free(want);
        free(got);
        free(alone);
        ibid_keymap_close(m);
    }
}

/* Sizes that do not fit, and numbers that are none. */
static void refused(void **state) {
    ibid_keymap *m = NULL, s = {.head_dim = 64, .n_inputs = 1, .n_raw = 1, .raw_weight = {1}};
    (void)state;
    assert_int_equal(ibid_keymap_open(&s, &m), IBID_OK);
    assert_true(ibid_keymap_settle(m));
    m->mean[3] = NAN;
    assert_false(ibid_keymap_settle(m));
    m->mean[3] = 0;
    m->raw[0] = 1;
    assert_false(ibid_keymap_settle(m));
    ibid_keymap_close(m);
    ibid_keymap bad[] = {s, s, s, s, s, s};
    bad[0].head_dim = 20;
    bad[1].n_inputs = 0;
    bad[2].n_inputs = IBID_INPUTS_MAX + 1;
    bad[3].out = 33;
    bad[4].hidden = 32;
    bad[5].n_raw = 0;
    for (size_t i = 0; i < 6; i++) assert_int_equal(ibid_keymap_open(&bad[i], &m), IBID_INVAL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trip), cmocka_unit_test(no_head),    cmocka_unit_test(version_1),
        cmocka_unit_test(damage),     cmocka_unit_test(token_keys), cmocka_unit_test(refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
