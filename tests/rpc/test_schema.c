/* The schema table: sound in itself, and its check says what is wrong and where. */
#include "rpc/bus/schema.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void test_table(void **state) {
    (void)state;
    ibid_err e = ibid_schema_verify();
    if (e) print_error("%s\n", ibid_err_detail());
    assert_int_equal(e, IBID_OK);
    assert_true(ibid_schema_knows("echo.echo"));
    assert_true(ibid_schema_knows("kvstore.ping"));
    assert_true(ibid_schema_knows("attention.next"));
    assert_false(ibid_schema_knows("kvstore.no_such_method"));
    assert_false(ibid_schema_knows("ping"));
    assert_false(ibid_schema_knows("echo_point"));
    assert_int_equal(ibid_schema_check("kvstore.no_such_method", NULL, true), IBID_NOTSUP);
}

/* Checks one body written by fn; detail: what the error's text must contain. */
static void expect(const char *method, bool request, void (*fn)(ibid_enc *), ibid_err want,
                   const char *detail) {
    ibid_enc e;
    ibid_msg *m = NULL;
    ibid_enc_init(&e, 8 << 20);
    ibid_enc_map(&e, NULL);
    fn(&e);
    ibid_enc_end(&e);
    assert_int_equal(ibid_enc_done(&e), IBID_OK);
    assert_int_equal(ibid_msg_open(e.buf.data, e.buf.len, &m), IBID_OK);
    ibid_err got = ibid_schema_check(method, ibid_msg_root(m), request);
    if (got != want) print_error("%s: %s\n", method, ibid_err_detail());
    assert_int_equal(got, want);
    if (want && !strstr(ibid_err_detail(), detail)) fail_msg("%s", ibid_err_detail());
    ibid_msg_close(m);
    ibid_enc_fini(&e);
}

static void nothing(ibid_enc *e) {
    (void)e;
}
static void good(ibid_enc *e) {
    ibid_enc_array(e, "points");
    for (int i = 0; i < 4; i++) {
        ibid_enc_map(e, NULL);
        ibid_enc_i64(e, "x", -i);
        ibid_enc_end(e);
    }
    ibid_enc_end(e);
    ibid_enc_u64(e, "small", 10);
    ibid_enc_nil(e, "point");
    ibid_enc_cstr(e, "field_of_next_year", "?");
}
static void bad_type(ibid_enc *e) {
    ibid_enc_cstr(e, "small", "10");
}
static void bad_negative(ibid_enc *e) {
    ibid_enc_i64(e, "small", -1);
}
static void bad_value(ibid_enc *e) {
    ibid_enc_u64(e, "small", 11);
}
static void bad_element(ibid_enc *e) {
    ibid_enc_array(e, "numbers");
    ibid_enc_i64(e, NULL, 1);
    ibid_enc_f64(e, NULL, 1.5);
    ibid_enc_end(e);
}
static void bad_nested(ibid_enc *e) {
    ibid_enc_array(e, "points");
    ibid_enc_map(e, NULL);
    ibid_enc_f64(e, "x", 1);
    ibid_enc_end(e);
    ibid_enc_map(e, NULL);
    ibid_enc_f64(e, "x", 1);
    ibid_enc_cstr(e, "name", "nine long");
    ibid_enc_end(e);
    ibid_enc_end(e);
}
static void bad_missing_nested(ibid_enc *e) {
    ibid_enc_map(e, "point");
    ibid_enc_end(e);
}
static void bad_many(ibid_enc *e) {
    ibid_enc_array(e, "points");
    for (int i = 0; i < 5; i++) {
        ibid_enc_map(e, NULL);
        ibid_enc_i64(e, "x", i);
        ibid_enc_end(e);
    }
    ibid_enc_end(e);
}
static void bad_list(ibid_enc *e) {
    ibid_enc_map(e, "points");
    ibid_enc_end(e);
}
static void nil_required(ibid_enc *e) {
    ibid_enc_nil(e, "code");
    ibid_enc_cstr(e, "text", "");
}
static void text_past_default(ibid_enc *e) {
    size_t n = (1 << 20) + 1;
    ibid_enc_cstr(e, "code", "x");
    memset(ibid_enc_bin_reserve(e, "text", n), 'x', n);
}
static void text_at_default(ibid_enc *e) {
    size_t n = 1 << 20;
    ibid_enc_cstr(e, "code", "x");
    memset(ibid_enc_bin_reserve(e, "text", n), 'x', n);
}

static void test_check(void **state) {
    (void)state;
    expect("echo.echo", true, nothing, IBID_OK, "");
    expect("echo.echo", true, good, IBID_OK, "");
    expect("echo.echo", false, nothing, IBID_PROTO, "echo.echo: data is missing");
    expect("echo.echo", true, bad_type, IBID_PROTO, "echo.echo: small must be an integer");
    expect("echo.echo", true, bad_negative, IBID_PROTO, "small must be an integer >= 0");
    expect("echo.echo", true, bad_value, IBID_TOOBIG, "small is larger than 10");
    expect("echo.echo", true, bad_element, IBID_PROTO, "numbers[1] must be an integer");
    expect("echo.echo", true, bad_nested, IBID_TOOBIG, "points[1].name is larger than 8 bytes");
    expect("echo.echo", true, bad_missing_nested, IBID_PROTO, "point.x is missing");
    expect("echo.echo", true, bad_many, IBID_TOOBIG, "points is larger than 4 elements");
    expect("echo.echo", true, bad_list, IBID_PROTO, "points must be an array");
    expect("echo.fail", true, nil_required, IBID_PROTO, "code is missing");
    expect("echo.fail", true, text_past_default, IBID_TOOBIG, "text is larger than 1048576 bytes");
    expect("echo.fail", true, text_at_default, IBID_OK, "");
    expect("any.cancel", true, nothing, IBID_PROTO, "any.cancel: stream is missing");
    expect("any.cancel", false, nothing, IBID_OK, "");
    assert_int_equal(ibid_schema_check("any.ping", NULL, true), IBID_OK);
    assert_int_equal(ibid_schema_check("any.ping", NULL, false), IBID_PROTO);
}

static void count(void *arg, const char *method) {
    assert_non_null(strchr(method, '.'));
    ++*(size_t *)arg;
}

static void test_each(void **state) {
    (void)state;
    size_t n = 0;
    ibid_schema_each(count, &n);
    assert_true(n >= 8);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_table), cmocka_unit_test(test_check),
                                       cmocka_unit_test(test_each)};
    return cmocka_run_group_tests_name("schema", tests, NULL, NULL);
}
