/* The thread pool: every part once, all done on return, sane thread numbers, also when workers
 * sleep between jobs. Meant to run under ThreadSanitizer too. */
#include "attention/kernels/pool.h"

#include "rpc/base/mem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

enum { MAX_PARTS = 257, MAX_THREADS = 5 };

typedef struct job {
    int done[MAX_PARTS]; /* not atomic: the pool's own synchronisation must do */
    size_t by[MAX_THREADS];
    size_t n_threads;
    int stamp;
} job;

static void one_part(void *arg, size_t part, size_t thread) {
    job *j = arg;
    assert_true(thread < j->n_threads);
    j->done[part] += j->stamp;
    j->by[thread]++;
}

static void run_and_check(ibid_pool *p, size_t n_parts, int stamp) {
    job j = {.n_threads = ibid_pool_size(p), .stamp = stamp};
    ibid_pool_run(p, n_parts, one_part, &j);
    size_t total = 0;
    for (size_t i = 0; i < MAX_PARTS; i++) assert_int_equal(j.done[i], i < n_parts ? stamp : 0);
    for (size_t i = 0; i < MAX_THREADS; i++) total += j.by[i];
    assert_int_equal(total, n_parts);
}

static void test_every_part_once(void **state) {
    (void)state;
    for (size_t n_threads = 1; n_threads <= MAX_THREADS; n_threads++) {
        ibid_pool *p = NULL;
        assert_int_equal(ibid_pool_open(n_threads, &p), IBID_OK);
        assert_int_equal(ibid_pool_size(p), n_threads);
        for (int round = 1; round <= 400; round++) {
            run_and_check(p, (size_t)round * 37 % (MAX_PARTS + 1), round);
        }
        ibid_pool_close(p);
    }
}

static void test_after_sleep(void **state) {
    (void)state;
    ibid_pool *p = NULL;
    assert_int_equal(ibid_pool_open(3, &p), IBID_OK);
    for (int round = 1; round <= 20; round++) {
        nanosleep(&(struct timespec){.tv_nsec = round % 4 * 1000000L}, NULL);
        run_and_check(p, 64, round);
        run_and_check(p, 2, round);
    }
    ibid_pool_close(p);
}

static void slow_part(void *arg, size_t part, size_t thread) {
    (void)thread;
    nanosleep(&(struct timespec){.tv_nsec = 2000000L}, NULL);
    ((int *)arg)[part] = 1;
}

/* The caller runs out of parts first and has to sleep until the workers are out. */
static void test_waits_for_slow_parts(void **state) {
    (void)state;
    ibid_pool *p = NULL;
    assert_int_equal(ibid_pool_open(4, &p), IBID_OK);
    for (int round = 0; round < 20; round++) {
        int done[9] = {0};
        ibid_pool_run(p, 9, slow_part, done);
        for (size_t i = 0; i < 9; i++) assert_int_equal(done[i], 1);
    }
    ibid_pool_close(p);
}

static void test_default_size_and_idle_close(void **state) {
    (void)state;
    ibid_pool *p = NULL;
    assert_int_equal(ibid_pool_open(0, &p), IBID_OK);
    assert_true(ibid_pool_size(p) >= 1);
    ibid_pool_close(p);
    ibid_pool_close(NULL);
    assert_int_equal(ibid_pool_open(100000, &p), IBID_BACKEND);
}

static void test_out_of_memory(void **state) {
    (void)state;
    ibid_pool *p = NULL;
    for (uint64_t nth = 1; nth <= 2; nth++) {
        ibid_alloc_fail_at(nth);
        assert_int_equal(ibid_pool_open(2, &p), IBID_NOMEM);
        assert_null(p);
    }
    ibid_alloc_fail_at(0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_part_once),
        cmocka_unit_test(test_after_sleep),
        cmocka_unit_test(test_waits_for_slow_parts),
        cmocka_unit_test(test_default_size_and_idle_close),
        cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
