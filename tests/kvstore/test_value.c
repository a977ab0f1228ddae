/* The KV value codec: sizes, planes, and every way a value can lie. */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>

static size_t size_of(ibid_kv_type type, size_t tokens, size_t heads, size_t dim) {
    size_t n = 0;
    assert_ok(ibid_kv_value_size(&(ibid_kv_shape){type, tokens, heads, dim}, &n));
    return n;
}

static void sizes_follow_classes(void **st) {
    (void)st;
    /* f16, 64 tokens, 3 heads of 64: two planes of 64*3*64*2. */
    assert_int_equal(size_of(IBID_KV_F16, 1, 3, 64), 48 + 2 * 24576);
    assert_int_equal(size_of(IBID_KV_F16, 64, 3, 64), 48 + 2 * 24576);
    assert_int_equal(size_of(IBID_KV_F16, 65, 3, 64), 48 + 2 * 2 * 24576);
    assert_int_equal(size_of(IBID_KV_F16, 129, 3, 64), 48 + 2 * 4 * 24576);
    assert_int_equal(size_of(IBID_KV_F16, 257, 3, 64), 48 + 2 * 8 * 24576);
    assert_int_equal(size_of(IBID_KV_F32, 256, 3, 64), 48 + 2 * 256 * 3 * 64 * 4);
    /* q8_0: one byte a value and one f16 a 32. */
    assert_int_equal(size_of(IBID_KV_Q8_0, 256, 3, 64),
                     48 + 2 * 256 * 3 * 64 + 2 * 256 * 3 * 2 * 2);
    size_t n;
    assert_err(ibid_kv_value_size(&(ibid_kv_shape){IBID_KV_Q8_0, 4, 3, 48}, &n), IBID_INVAL);
    assert_err(ibid_kv_value_size(&(ibid_kv_shape){IBID_KV_F32, 0, 3, 48}, &n), IBID_INVAL);
    assert_err(ibid_kv_value_size(&(ibid_kv_shape){IBID_KV_F32, 4, 0, 48}, &n), IBID_INVAL);
    assert_err(ibid_kv_value_size(&(ibid_kv_shape){(ibid_kv_type)9, 4, 3, 48}, &n), IBID_INVAL);
    assert_err(ibid_kv_value_size(&(ibid_kv_shape){IBID_KV_F32, 65537, 3, 48}, &n), IBID_TOOBIG);
    assert_err(ibid_kv_value_size(&(ibid_kv_shape){IBID_KV_F32, 65536, 1024, 4096}, &n),
               IBID_TOOBIG);
}

static void round_trip(void **st) {
    (void)st;
    static const ibid_kv_type types[] = {IBID_KV_F32, IBID_KV_F16, IBID_KV_Q8_0};
    for (size_t t = 0; t < 3; t++)
        for (size_t tokens = 1; tokens < 300; tokens += 37) {
            ibid_kv_shape s = {types[t], tokens, 3, 32};
            size_t size = size_of(types[t], tokens, 3, 32), layer;
            uint8_t *p = malloc(size);
            assert_non_null(p);
            memset(p, 0x5a, size);
            assert_ok(ibid_kv_value_seal(&s, 77, 5, p, size));
            ibid_kv_view v, planes;
            uint64_t owner;
            assert_ok(ibid_kv_value_open(p, size, true, &owner, &layer, &v));
            assert_ok(ibid_kv_value_planes(&s, p, &planes));
            assert_true(v.k == planes.k && v.v == planes.v && v.k_scale == planes.k_scale &&
                        v.v_scale == planes.v_scale);
            assert_int_equal(owner, 77);
            assert_int_equal(layer, 5);
            assert_int_equal(v.n_tokens, tokens);
            assert_ptr_equal(v.k, p + IBID_KV_HEADER);
            assert_int_equal(((const uint8_t *)v.v - p - IBID_KV_HEADER) % 64, 0);
            assert_true((v.k_scale != NULL) == (types[t] == IBID_KV_Q8_0));
            size_t element = types[t] == IBID_KV_F32 ? 4 : types[t] == IBID_KV_F16 ? 2 : 1;
            const uint8_t *k = v.k;
            for (size_t i = 0; i < tokens * 3 * 32 * element; i++) assert_int_equal(k[i], 0x5a);
            free(p);
        }
}

/* Every single bit of a value, flipped, is found. */
static void every_flip_is_found(void **st) {
    (void)st;
    ibid_kv_shape s = {IBID_KV_Q8_0, 3, 1, 32};
    size_t size = size_of(IBID_KV_Q8_0, 3, 1, 32);
    uint8_t *p = malloc(size);
    assert_non_null(p);
    for (size_t i = 0; i < size; i++) p[i] = (uint8_t)(i * 31);
    assert_ok(ibid_kv_value_seal(&s, 1, 0, p, size));
    ibid_kv_view v;
    for (size_t bit = 0; bit < size * 8; bit++) {
        p[bit / 8] = (uint8_t)(p[bit / 8] ^ 1u << bit % 8);
        assert_err(ibid_kv_value_open(p, size, true, NULL, NULL, &v), IBID_CORRUPT);
        p[bit / 8] = (uint8_t)(p[bit / 8] ^ 1u << bit % 8);
    }
    assert_ok(ibid_kv_value_open(p, size, true, NULL, NULL, &v));
    for (size_t n = 0; n < size; n += 7)
        assert_err(ibid_kv_value_open(p, n, true, NULL, NULL, &v), IBID_CORRUPT);
    /* Without `deep` the planes are not read. */
    p[size - 1] ^= 1;
    assert_ok(ibid_kv_value_open(p, size, false, NULL, NULL, &v));
    free(p);
}

static void seal_refuses_wrong_sizes(void **st) {
    (void)st;
    ibid_kv_shape s = {IBID_KV_F32, 3, 1, 32};
    size_t size = size_of(IBID_KV_F32, 3, 1, 32);
    uint8_t *p = calloc(1, size);
    assert_non_null(p);
    assert_err(ibid_kv_value_seal(&s, 1, 0, p, size - 1), IBID_INVAL);
    assert_err(ibid_kv_value_seal(&s, 1, 65536, p, size), IBID_TOOBIG);
    free(p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_follow_classes),
        cmocka_unit_test(round_trip),
        cmocka_unit_test(every_flip_is_found),
        cmocka_unit_test(seal_refuses_wrong_sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
