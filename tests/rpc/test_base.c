/* rpc/base: errors, memory, hashes, the shape of a log line. */
#include "rpc/base/err.h"
#include "rpc/base/hash.h"
#include "rpc/base/log.h"
#include "rpc/base/mem.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static void test_errors(void **state) {
    (void)state;
    static const ibid_err all[] = {
#define X(sym, val, code, text) IBID_##sym,
        IBID_ERR_MAP(X)
#undef X
    };
    const size_t n = sizeof all / sizeof all[0];
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(ibid_err_from_code(ibid_err_code(all[i])), all[i]);
        assert_true(strlen(ibid_err_text(all[i])) > 0);
        for (size_t j = 0; j < i; j++) {
            assert_int_not_equal(all[i], all[j]);
            assert_string_not_equal(ibid_err_code(all[i]), ibid_err_code(all[j]));
        }
    }
    assert_int_equal(ibid_err_from_code("from the future"), IBID_INTERNAL);
    assert_string_equal(ibid_err_code((ibid_err)9999), "internal");
}

static void *other_thread(void *arg) {
    (void)arg;
    (void)ibid_fail(IBID_IO, "not yours");
    return NULL;
}

static void test_detail(void **state) {
    (void)state;
    pthread_t t;
    assert_int_equal(ibid_fail(IBID_BUSY, "block %d", 7), IBID_BUSY);
    assert_int_equal(pthread_create(&t, NULL, other_thread, NULL), 0);
    (void)pthread_join(t, NULL);
    assert_string_equal(ibid_err_detail(), "block 7");
    assert_int_equal(ibid_fail(IBID_IO, "outer: %s", ibid_err_detail()), IBID_IO);
    assert_string_equal(ibid_err_detail(), "outer: block 7");
    assert_int_equal(ibid_fail(IBID_OK, "never ok"), IBID_INTERNAL);
    ibid_err_clear();
    assert_string_equal(ibid_err_detail(), "");
    assert_int_equal(ibid_fail_errno(ENOSPC, "cannot write", "/x"), IBID_DISKFULL);
    assert_non_null(strstr(ibid_err_detail(), "cannot write /x: "));
    assert_int_equal(ibid_fail_errno(ENOENT, "a", "b"), IBID_NOTFOUND);
    assert_int_equal(ibid_fail_errno(EIO, "a", NULL), IBID_IO);
    char longer[4000];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    (void)ibid_fail(IBID_IO, "%s", longer);
    assert_true(strlen(ibid_err_detail()) < 1100);
}

static void test_buf(void **state) {
    (void)state;
    ibid_buf b;
    ibid_buf_init(&b, 10);
    assert_int_equal(ibid_buf_puts(&b, "12345"), IBID_OK);
    assert_int_equal(ibid_buf_printf(&b, "%s", "67890"), IBID_OK);
    assert_int_equal(ibid_buf_append(&b, "!", 1), IBID_TOOBIG);
    assert_int_equal(ibid_buf_printf(&b, "%d", 1), IBID_TOOBIG);
    assert_int_equal(ibid_buf_reserve(&b, SIZE_MAX), IBID_TOOBIG);
    assert_int_equal(b.len, 10);
    assert_string_equal(b.data, "1234567890");
    ibid_buf_clear(&b);
    assert_string_equal(b.data, "");
    assert_int_equal(ibid_buf_append(&b, NULL, 0), IBID_OK);
    ibid_buf_fini(&b);
    assert_int_equal(ibid_buf_puts(&b, "again"), IBID_OK);
    ibid_buf_fini(&b);
}

static void test_arena(void **state) {
    (void)state;
    ibid_arena *a = NULL;
    const size_t cap = 200000;
    assert_int_equal(ibid_arena_open(cap, &a), IBID_OK);
    for (size_t round = 0; round < 3; round++) {
        size_t got = 0;
        for (unsigned char *p; (p = ibid_arena_alloc(a, 1000)) != NULL; got += 1000) {
            assert_int_equal((uintptr_t)p % 16, 0);
            for (size_t i = 0; i < 1000; i++) assert_int_equal(p[i], 0);
            memset(p, 0xa5, 1000);
        }
        assert_in_range(got, cap / 2, cap);
        assert_in_range(ibid_arena_used(a), got, cap);
        ibid_arena_reset(a);
        assert_int_equal(ibid_arena_used(a), 0);
    }
    assert_null(ibid_arena_alloc(a, cap + 1));
    assert_null(ibid_arena_alloc(a, SIZE_MAX - 4));
    assert_string_equal(ibid_arena_copy(a, "text", 4), "text");
    ibid_arena_close(a);
    ibid_arena_close(NULL);
}

static void test_alloc_hook(void **state) {
    (void)state;
    ibid_alloc_fail_at(2);
    void *first = ibid_alloc(1), *second = ibid_calloc(1, 1), *third = ibid_strdup("x");
    assert_non_null(first);
    assert_null(second);
    assert_non_null(third);
    ibid_free(first);
    ibid_free(third);
    ibid_buf b;
    ibid_buf_init(&b, 100);
    ibid_alloc_fail_at(1);
    assert_int_equal(ibid_buf_puts(&b, "x"), IBID_NOMEM);
    assert_int_equal(ibid_buf_puts(&b, "x"), IBID_OK);
    ibid_buf_fini(&b);
    ibid_arena *a = NULL;
    ibid_alloc_fail_at(1);
    assert_int_equal(ibid_arena_open(10, &a), IBID_NOMEM);
    assert_null(ibid_calloc(SIZE_MAX / 2, 3));
    assert_null(ibid_strndup("x", SIZE_MAX));
    size_t n = 5;
    assert_false(ibid_add_size(SIZE_MAX, 1, &n));
    assert_false(ibid_mul_size(SIZE_MAX / 2, 3, &n));
    assert_int_equal(n, 5);
    void *p = ibid_alloc_aligned(4096, 10);
    assert_int_equal((uintptr_t)p % 4096, 0);
    ibid_free(p);
}

/* The 512-bit vector of RFC 7693 is for another size; these are BLAKE2b-256 of "" and "abc". */
static void test_hash(void **state) {
    (void)state;
    static const struct {
        const char *in, *hex;
    } known[] = {
        {"", "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8"},
        {"abc", "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319"},
    };
    char hex[65];
    for (size_t i = 0; i < 2; i++) {
        ibid_hash h = ibid_hash_bytes(known[i].in, strlen(known[i].in));
        ibid_hash_hex(&h, hex);
        assert_string_equal(hex, known[i].hex);
    }
    ibid_hasher a, b;
    ibid_hasher_init(&a);
    ibid_hasher_raw(&a, "a", 1);
    ibid_hasher_raw(&a, "bc", 2);
    ibid_hash h = ibid_hasher_final(&a);
    ibid_hash_hex(&h, hex);
    assert_string_equal(hex, known[1].hex);
    /* Length-prefixed fields: ("ab", "c") is not ("a", "bc"). */
    ibid_hasher_init(&a);
    ibid_hasher_field(&a, "ab", 2);
    ibid_hasher_field(&a, "c", 1);
    ibid_hasher_init(&b);
    ibid_hasher_field(&b, "a", 1);
    ibid_hasher_field(&b, "bc", 2);
    ibid_hash ha = ibid_hasher_final(&a), hb = ibid_hasher_final(&b);
    assert_int_not_equal(ibid_hash_cmp(&ha, &hb), 0);
    assert_true(ibid_checksum("", 0) == UINT64_C(0x2d06800538d394c2)); /* XXH3-64 of nothing */
    assert_true(ibid_checksum("abc", 3) != ibid_checksum("abd", 3));
}

static void test_log(void **state) {
    (void)state;
    int p[2], saved = dup(STDERR_FILENO);
    char line[4096];
    assert_int_equal(pipe(p), 0);
    (void)dup2(p[1], STDERR_FILENO);
    ibid_log_init("test", IBID_LOG_INFO);
    ibid_log(IBID_LOG_DEBUG, "not seen");
    ibid_log_request(42);
    ibid_log(IBID_LOG_INFO, "say \"hi\"\\\n%s", "\x01");
    ibid_log_request(0);
    (void)dup2(saved, STDERR_FILENO);
    (void)close(saved);
    (void)close(p[1]);
    ssize_t n = read(p[0], line, sizeof line - 1);
    (void)close(p[0]);
    assert_true(n > 0);
    line[n] = '\0';
    assert_memory_equal(line, "{\"time\":\"20", 11);
    assert_int_equal(line[9 + 23], 'Z');
    static const char rest[] = ",\"level\":\"info\",\"room\":\"test\",\"request\":42,"
                               "\"text\":\"say \\\"hi\\\"\\\\\\u000a\\u0001\"}\n";
    assert_string_equal(line + 9 + 25, rest);
}

/* A text longer than a line holds is cut; the line stays one JSON object. */
static void test_log_long(void **state) {
    (void)state;
    int p[2], saved = dup(STDERR_FILENO);
    char text[3000], line[8192];
    memset(text, 1, sizeof text - 1); /* each becomes six bytes */
    text[sizeof text - 1] = '\0';
    assert_int_equal(pipe(p), 0);
    (void)dup2(p[1], STDERR_FILENO);
    ibid_log_init("test", IBID_LOG_INFO);
    ibid_log(IBID_LOG_WARN, "%s", text);
    (void)dup2(saved, STDERR_FILENO);
    (void)close(saved);
    (void)close(p[1]);
    ssize_t n = read(p[0], line, sizeof line - 1);
    (void)close(p[0]);
    assert_true(n > 1000);
    assert_memory_equal(line + n - 3, "\"}\n", 3);
    assert_ptr_equal(memchr(line, '\n', (size_t)n), line + n - 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_errors), cmocka_unit_test(test_detail),
        cmocka_unit_test(test_buf),    cmocka_unit_test(test_arena),
        cmocka_unit_test(test_hash),   cmocka_unit_test(test_alloc_hook),
        cmocka_unit_test(test_log),    cmocka_unit_test(test_log_long),
    };
    return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
