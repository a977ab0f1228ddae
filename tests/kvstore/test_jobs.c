/* Jobs, change history, snapshots' age, handles. */
#include "support.h"

#include "kvstore/store_internal.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static char dir[256];
static ibid_store *s;

static int setup(void **st) {
    (void)st;
    make_dir(dir);
    s = store_open(dir, 0);
    collection_make(s, "c");
    return 0;
}

static int teardown(void **st) {
    (void)st;
    ibid_store_close(s);
    drop_dir(dir);
    return 0;
}

static ibid_err sum_jobs(void *arg, const ibid_job *j) {
    *(uint64_t *)arg = *(uint64_t *)arg * 10 + j->id;
    return IBID_OK;
}

static void jobs(void **st) {
    (void)st;
    uint64_t id = 0, second, all = 0;
    ibid_job j = {.kind = str("index"),
                  .collection = str("c"),
                  .state = str("queued"),
                  .stage = str("scan"),
                  .spec = {"\x80\0x", 3},
                  .created_ms = 5};
    assert_ok(ibid_store_job_put(s, &j, &id));
    assert_int_equal(id, 1);
    ibid_snap *n = NULL;
    ibid_job got;
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_job(n, id, &got));
    assert_true(str_eq(got.kind, "index") && str_eq(got.collection, "c") &&
                str_eq(got.stage, "scan"));
    assert_int_equal(got.spec.n, 3);
    assert_memory_equal(got.spec.s, "\x80\0x", 3);
    uint64_t created = got.created_ms;
    assert_true(created > 5 && got.updated_ms == created);
    j.id = id, j.state = str("failed"), j.error = IBID_DISKFULL,
    j.error_text = str("the disk is full");
    j.report = str("report");
    assert_ok(ibid_store_job_put(s, &j, NULL));
    assert_ok(ibid_snap_renew(n));
    assert_ok(ibid_snap_job(n, id, &got));
    assert_int_equal(got.error, IBID_DISKFULL);
    assert_int_equal(got.created_ms, created);
    assert_true(str_eq(got.error_text, "the disk is full") && str_eq(got.report, "report"));
    second = job_make(s);
    assert_int_equal(second, 2);
    assert_ok(ibid_snap_renew(n));
    assert_ok(ibid_snap_each_job(n, sum_jobs, &all));
    assert_int_equal(all, 12);
    assert_ok(ibid_store_job_delete(s, id));
    assert_err(ibid_store_job_delete(s, id), IBID_NOTFOUND);
    assert_err(ibid_store_job_put(s, &j, NULL), IBID_NOTFOUND);
    j.kind = str("");
    assert_err(ibid_store_job_put(s, &j, NULL), IBID_INVAL);
    assert_ok(ibid_snap_renew(n));
    assert_err(ibid_snap_job(n, id, &got), IBID_NOTFOUND);
    ibid_snap_end(n);
    /* They are there after a restart, and their numbers go on. */
    ibid_store_close(s);
    s = store_open(dir, 0);
    assert_int_equal(job_make(s), 3);
    assert_sound(s);
}

static ibid_err count_change(void *arg, const ibid_change *c) {
    (void)c;
    ++*(uint64_t *)arg;
    return IBID_OK;
}

/* Old history goes; who needs it is told to rebuild. */
static void history_is_bounded(void **st) {
    (void)st;
    uint64_t b = block_put(s, 1, 10, 0), calls = 0;
    s->shared->history_max = 5;
    for (int i = 0; i < 12; i++) {
        char id[20];
        (void)snprintf(id, sizeof id, "d%d", i % 4);
        assert_ok(document_put(s, "c", id, &b, 1, 0, NULL, NULL));
    }
    ibid_snap *n = NULL;
    assert_ok(ibid_snap_begin(s, &n));
    assert_int_equal(ibid_snap_generation(n), 12);
    assert_err(ibid_snap_each_change(n, 6, count_change, &calls), IBID_NOTFOUND);
    assert_err(ibid_snap_each_change(n, 0, count_change, &calls), IBID_NOTFOUND);
    assert_int_equal(calls, 0);
    assert_ok(ibid_snap_each_change(n, 7, count_change, &calls));
    assert_int_equal(calls, 5);
    ibid_snap_end(n);
    assert_sound(s);
}

static void old_snapshots_answer_busy(void **st) {
    (void)st;
    uint64_t b = block_put(s, 1, 10, 0);
    ibid_snap *n = NULL;
    ibid_block got;
    ibid_kv_view v;
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_block(n, b, &got));
    s->shared->snap_age_ns = 5000000;
    (void)usleep(20000);
    assert_err(ibid_snap_block(n, b, &got), IBID_BUSY);
    assert_err(ibid_snap_kv(n, b, 0, &v), IBID_BUSY);
    assert_ok(ibid_snap_renew(n));
    s->shared->snap_age_ns = 60000000000u;
    assert_ok(ibid_snap_kv(n, b, 0, &v));
    ibid_snap_end(n);
}

/* One environment however often a folder is opened, under whatever name, by readers first. */
static void handles_share(void **st) {
    (void)st;
    char link[300], other[600];
    (void)snprintf(link, sizeof link, "%s-link", dir);
    (void)snprintf(other, sizeof other, "%s/../%s", dir, strrchr(dir, '/') + 1);
    assert_int_equal(symlink(dir, link), 0);
    ibid_store_close(s);
    ibid_store *r1 = store_open_reader(link), *w = NULL, *w2 = NULL;
    assert_ok(ibid_store_open(&(ibid_store_opts){.dir = other}, &w));
    assert_ok(ibid_store_open(&(ibid_store_opts){.dir = dir}, &w2));
    assert_ptr_equal(r1->env, w->env);
    assert_ptr_equal(w->env, w2->env);
    uint64_t b = block_put(w, 1, 10, 0);
    ibid_snap *n = NULL;
    ibid_block got;
    assert_ok(ibid_snap_begin(r1, &n));
    assert_ok(ibid_snap_block(n, b, &got));
    ibid_store_close(w2);
    assert_int_equal(block_put(w, 1, 10, 0), b);
    ibid_store_close(w);
    assert_ok(ibid_snap_block(n, b, &got)); /* readers go on */
    ibid_snap_end(n);
    ibid_store_close(r1);
    (void)unlink(link);
    s = store_open(dir, 0);
    assert_sound(s);
}

/* Reader slots run out with a typed error, come back when snapshots end, and those of a process
 * that was killed are taken back. */
static void reader_slots(void **st) {
    (void)st;
    enum { MANY = 600, OTHERS = 300 };
    static ibid_snap *snaps[MANY];
    size_t n = 0;
    ibid_err e = IBID_OK;
    for (; n < MANY && !e; n += !e) e = ibid_snap_begin(s, &snaps[n]);
    assert_int_equal(e, IBID_BUSY);
    assert_true(n >= 126);
    size_t slots = n;
    while (n > 0) ibid_snap_end(snaps[--n]);

    int ready[2];
    assert_int_equal(pipe(ready), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        ibid_store *r = NULL;
        if (ibid_store_open(&(ibid_store_opts){.dir = dir, .readonly = true}, &r)) _exit(1);
        for (size_t i = 0; i < OTHERS; i++)
            if (ibid_snap_begin(r, &snaps[i])) _exit(1);
        if (write(ready[1], "x", 1) != 1) _exit(1);
        (void)pause();
    }
    char x;
    assert_int_equal(read(ready[0], &x, 1), 1);
    (void)close(ready[0]);
    (void)close(ready[1]);
    (void)kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    for (; n < slots; n++) assert_ok(ibid_snap_begin(s, &snaps[n]));
    while (n > 0) ibid_snap_end(snaps[--n]);
}

/* A map that is too small grows under readers that come and go. */
static atomic_bool stop_reading;
static void *read_on(void *arg) {
    ibid_store *r = arg;
    uintptr_t bad = 0;
    while (!stop_reading) {
        ibid_snap *n = NULL;
        ibid_kv_view v;
        ibid_store_stats stats;
        if (ibid_snap_begin(r, &n) != IBID_OK || ibid_snap_stats(n, &stats) != IBID_OK ||
            (stats.blocks && ibid_snap_kv(n, 1, 0, &v) != IBID_OK))
            bad++;
        ibid_snap_end(n);
    }
    return (void *)bad;
}

static void the_map_grows(void **st) {
    (void)st;
    char small[300];
    (void)snprintf(small, sizeof small, "%s/small", dir);
    ibid_store *w = NULL, *r = NULL;
    assert_ok(ibid_store_open(&(ibid_store_opts){.dir = small, .map_size = 1 << 20}, &w));
    r = store_open_reader(small);
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, read_on, r), 0);
    for (uint64_t i = 0; i < 100; i++) (void)block_put(w, i, 256, 0);
    stop_reading = true;
    void *bad = NULL;
    assert_int_equal(pthread_join(t, &bad), 0);
    assert_null(bad);
    ibid_store_stats stats;
    stats_of(w, &stats);
    assert_true(stats.map_size >= 8 << 20);
    assert_true(stats.kv_bytes > 8 << 20);
    assert_sound(w);
    ibid_store_close(r);
    ibid_store_close(w);
}

/* Readers and writers in threads: nothing seen is ever half done. */
typedef struct watcher {
    ibid_store *r;
    uint64_t wrong, looks;
} watcher;

static void *watch(void *arg) {
    watcher *w = arg;
    while (!stop_reading) {
        ibid_snap *n = NULL;
        ibid_document d;
        const ibid_chunk *c;
        size_t count;
        if (ibid_snap_begin(w->r, &n) == IBID_OK &&
            ibid_snap_document(n, str("c"), str("d"), &d) == IBID_OK) {
            bool ok = ibid_snap_chunks(n, d.number, &c, &count) == IBID_OK && count == d.n_chunks;
            for (size_t i = 0; ok && i < count; i++) {
                ibid_kv_view v;
                ok = c[i].block == c[0].block + i % 3 && c[i].end <= d.text_bytes &&
                     ibid_snap_kv(n, c[i].block, 0, &v) == IBID_OK;
            }
            w->wrong += !ok;
            w->looks++;
        }
        ibid_snap_end(n);
    }
    return NULL;
}

static void readers_see_whole_documents(void **st) {
    (void)st;
    watcher w = {.r = store_open_reader(dir)};
    pthread_t t;
    stop_reading = false;
    assert_int_equal(pthread_create(&t, NULL, watch, &w), 0);
    for (uint64_t i = 0; i < 60; i++) {
        uint64_t b[12];
        for (uint64_t k = 0; k < 3; k++) b[k] = block_put(s, 3 * i + k, 20, 0);
        for (size_t k = 3; k < 12; k++) b[k] = b[k % 3];
        assert_ok(document_put(s, "c", "d", b, 3 * (1 + i % 4), 0, NULL, NULL));
        assert_ok(ibid_store_collect(s, NULL));
    }
    stop_reading = true;
    assert_int_equal(pthread_join(t, NULL), 0);
    ibid_store_close(w.r);
    assert_int_equal(w.wrong, 0);
    assert_true(w.looks > 0);
    assert_sound(s);
}

int main(void) {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(jobs),         T(history_is_bounded), T(old_snapshots_answer_busy),   T(handles_share),
        T(reader_slots), T(the_map_grows),      T(readers_see_whole_documents),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
