/* The codec: what is written reads back; damaged bytes never do harm. */
#include "rpc/bus/envelope.h"
#include "rpc/bus/msg.h"
#include "tests/rpc/walk.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static void write_sample(ibid_enc *e) {
    ibid_enc_init(e, 1 << 20);
    ibid_enc_map(e, NULL);
    ibid_enc_u64(e, "u", UINT64_MAX);
    ibid_enc_i64(e, "i", INT64_MIN);
    ibid_enc_f64(e, "f", -0.125);
    ibid_enc_bool(e, "yes", true);
    ibid_enc_nil(e, "nil");
    ibid_enc_str(e, "text", "gr\xc3\xbc\xc3\x9f", 6);
    ibid_enc_bin(e, "bin", "\0\xff", 2);
    memcpy(ibid_enc_bin_reserve(e, "later", 300), (char[300]){7}, 300);
    ibid_enc_array(e, "list");
    for (int64_t i = -40; i < 40; i++) ibid_enc_i64(e, NULL, i * i * i * i * i * i);
    ibid_enc_map(e, NULL);
    ibid_enc_end(e);
    ibid_enc_end(e);
    ibid_enc_raw(e, "raw", "\x93\x01\x02\x03", 4);
    ibid_enc_cstr(e, "empty", "");
    ibid_enc_end(e);
    assert_int_equal(ibid_enc_done(e), IBID_OK);
}

static void test_round_trip(void **state) {
    (void)state;
    ibid_enc e;
    ibid_msg *m = NULL;
    const char *s;
    const void *p;
    size_t n;
    int64_t i;
    uint64_t u;
    write_sample(&e);
    assert_int_equal(ibid_msg_open(e.buf.data, e.buf.len, &m), IBID_OK);
    const ibid_val *r = ibid_msg_root(m);
    assert_int_equal(ibid_val_count(r), 11);
    assert_true(ibid_get_u64(r, "u", 0) == UINT64_MAX);
    assert_true(ibid_get_i64(r, "i", 0) == INT64_MIN);
    assert_true(ibid_get_f64(r, "f", 0) == -0.125);
    assert_true(ibid_get_f64(r, "i", 0) == (double)INT64_MIN);
    assert_true(ibid_get_bool(r, "yes", false));
    assert_true(ibid_val_is_nil(ibid_val_get(r, "nil")));
    assert_true(ibid_get_str(r, "text", &s, &n));
    assert_int_equal(n, 6);
    assert_memory_equal(s, "gr\xc3\xbc\xc3\x9f", 6);
    assert_true(ibid_get_bin(r, "later", &p, &n));
    assert_int_equal(n, 300);
    assert_true(ibid_get_str(r, "empty", &s, &n));
    assert_non_null(s);
    assert_int_equal(n, 0);
    const ibid_val *list = ibid_val_get(r, "list");
    assert_int_equal(ibid_val_count(list), 81);
    for (int64_t k = -40; k < 40; k++) {
        assert_true(ibid_val_i64(ibid_val_at(list, (size_t)(k + 40)), &i));
        assert_true(i == k * k * k * k * k * k);
    }
    assert_true(ibid_val_is_map(ibid_val_at(list, 80)));
    assert_null(ibid_val_at(list, 81));
    assert_true(ibid_val_u64(ibid_val_at(ibid_val_get(r, "raw"), 2), &u));
    assert_int_equal(u, 3);
    /* Absent, or of another type: the default. */
    assert_int_equal(ibid_get_u64(r, "missing", 5), 5);
    assert_int_equal(ibid_get_u64(r, "i", 5), 5);
    assert_int_equal(ibid_get_i64(r, "u", 5), 5); /* does not fit */
    assert_false(ibid_get_str(r, "u", &s, &n));
    assert_null(s);
    assert_null(ibid_val_get(NULL, "x"));
    assert_int_equal(ibid_get_u64(NULL, "x", 9), 9);
    ibid_msg_close(m);
    ibid_enc_fini(&e);
}

static void test_encoder_misuse(void **state) {
    (void)state;
    ibid_enc e;
    ibid_enc_init(&e, 100);
    assert_int_equal(ibid_enc_done(&e), IBID_INTERNAL); /* nothing */
    ibid_enc_map(&e, NULL);
    assert_int_equal(ibid_enc_done(&e), IBID_INTERNAL); /* open */
    ibid_enc_u64(&e, NULL, 1);                          /* no key in a map */
    assert_int_equal(ibid_enc_done(&e), IBID_INTERNAL);
    ibid_enc_fini(&e);
    ibid_enc_init(&e, 100);
    ibid_enc_end(&e);
    assert_int_equal(ibid_enc_done(&e), IBID_INTERNAL);
    ibid_enc_fini(&e);
    ibid_enc_init(&e, 100);
    ibid_enc_map(&e, NULL);
    assert_null(ibid_enc_bin_reserve(&e, "b", 101));
    ibid_enc_end(&e);
    assert_int_equal(ibid_enc_done(&e), IBID_TOOBIG);
    assert_non_null(strstr(ibid_err_detail(), "100"));
    ibid_enc_fini(&e);
    ibid_enc_init(&e, 1000);
    for (int i = 0; i < 17; i++) ibid_enc_array(&e, NULL);
    for (int i = 0; i < 17; i++) ibid_enc_end(&e);
    assert_int_equal(ibid_enc_done(&e), IBID_INTERNAL); /* too deep */
    ibid_enc_fini(&e);
    for (uint64_t nth = 1; nth < 12; nth++) { /* every allocation may fail */
        ibid_alloc_fail_at(nth);
        ibid_enc_init(&e, 4096);
        ibid_enc_map(&e, NULL);
        for (int i = 0; i < 100; i++) ibid_enc_cstr(&e, "key", "value");
        ibid_enc_end(&e);
        ibid_err got = ibid_enc_done(&e);
        ibid_alloc_fail_at(0);
        assert_true(got == IBID_OK || got == IBID_NOMEM);
        ibid_enc_fini(&e);
    }
}

static void expect_open(const char *bytes, size_t n, ibid_err want) {
    ibid_msg *m = NULL;
    assert_int_equal(ibid_msg_open(bytes, n, &m), want);
    if (want == IBID_OK)
        ibid_msg_close(m);
    else
        assert_null(m);
}

static void test_refused(void **state) {
    (void)state;
#define B(s) s, sizeof s - 1
    expect_open(B(""), IBID_PROTO);
    expect_open(B("\xc1"), IBID_PROTO);
    expect_open(B("\xc0\xc0"), IBID_PROTO); /* trailing */
    expect_open(B("\xdd\xff\xff\xff\xff"),
                IBID_PROTO); /* four thousand million elements, none there */
    expect_open(B("\xdf\xff\xff\xff\xff\x01"), IBID_PROTO);
    expect_open(B("\xdb\xff\xff\xff\xff\x01"), IBID_PROTO);
    expect_open(B("\xc6\x00\x00"), IBID_PROTO);
    expect_open(B("\xcf\x00"), IBID_PROTO);
    expect_open(B("\x81\x01"), IBID_PROTO);
    expect_open(B("\xd4\x01\x02"), IBID_OK); /* an extension: skipped */
    expect_open(B("\xc7\x02\x01zz"), IBID_OK);
    char deep[18];
    memset(deep, 0x91, sizeof deep);
    deep[16] = (char)0xc0;
    expect_open(deep, 17, IBID_OK); /* sixteen arrays around a nil */
    deep[16] = (char)0x91;
    deep[17] = (char)0xc0;
    expect_open(deep, 18, IBID_PROTO);
}

static uint64_t rng = 0x1b1d5eed;
static uint64_t next_random(void) {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
}

static void test_damage(void **state) {
    (void)state;
    ibid_enc e;
    char copy[4096];
    size_t readable = 0;
    (void)printf("seed 0x1b1d5eed, 100000 mutations\n");
    write_sample(&e);
    assert_true(e.buf.len < sizeof copy);
    for (int round = 0; round < 100000; round++) {
        size_t n = e.buf.len;
        memcpy(copy, e.buf.data, n);
        for (uint64_t k = next_random() % 4 + 1; k; k--)
            copy[next_random() % n] = (char)next_random();
        if (next_random() % 4 == 0) n = next_random() % n;
        readable += walk_message(copy, n) ? 1 : 0;
    }
    assert_in_range(readable, 1000, 99000); /* damage of both kinds was met */
    ibid_enc_fini(&e);
}

static void test_out_of_memory(void **state) {
    (void)state;
    ibid_enc e;
    ibid_msg *m = NULL;
    write_sample(&e);
    ibid_alloc_fail_at(1);
    assert_int_equal(ibid_msg_open(e.buf.data, e.buf.len, &m), IBID_NOMEM);
    ibid_alloc_fail_at(0);
    assert_null(m);
    ibid_enc_fini(&e);
}

static void test_envelopes(void **state) {
    (void)state;
    ibid_enc e;
    ibidi_request q;
    ibidi_answer a;
    assert_int_equal(ibidi_request_head(&e, 77, "kvstore.touch", 1000, 5), IBID_OK);
    assert_int_equal(ibid_buf_append(&e.buf, ibidi_empty_body, 1), IBID_OK);
    assert_int_equal(ibidi_request_open(e.buf.data, e.buf.len, &q), IBID_OK);
    assert_int_equal(q.id, 77);
    assert_string_equal(q.method, "kvstore.touch");
    assert_int_equal(q.deadline_ms, 1000);
    assert_int_equal(q.sent_ms, 5);
    assert_true(ibid_val_is_map(q.body));
    ibid_msg_close(q.msg);
    ibid_enc_fini(&e);
    assert_int_equal(ibidi_reply_head(&e, 78, IBID_BUDGET, "too much"), IBID_OK);
    assert_int_equal(ibid_buf_append(&e.buf, ibidi_empty_body, 1), IBID_OK);
    assert_int_equal(ibidi_reply_open(e.buf.data, e.buf.len, &a), IBID_OK);
    assert_int_equal(a.id, 78);
    assert_int_equal(a.code, IBID_BUDGET);
    assert_string_equal(a.error, "too much");
    ibid_msg_close(a.msg);
    ibid_enc_fini(&e);
}

static void test_seen(void **state) {
    (void)state;
    ibidi_seen *s = ibidi_seen_open();
    assert_non_null(s);
    for (uint64_t id = 1; id <= 3 * IBIDI_SEEN; id++) {
        assert_false(ibidi_seen_add(s, id << 20));
        assert_true(ibidi_seen_add(s, id << 20));
        if (id > 100) assert_true(ibidi_seen_add(s, (id - 100) << 20));
    }
    for (uint64_t id = 2 * IBIDI_SEEN + 1; id <= 3 * IBIDI_SEEN; id++)
        assert_true(ibidi_seen_add(s, id << 20));
    assert_false(ibidi_seen_add(s, UINT64_C(1) << 20)); /* forgotten long ago */
    ibidi_seen_close(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),    cmocka_unit_test(test_encoder_misuse),
        cmocka_unit_test(test_refused),       cmocka_unit_test(test_damage),
        cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_envelopes),
        cmocka_unit_test(test_seen),
    };
    return cmocka_run_group_tests_name("msg", tests, NULL, NULL);
}
