/* The room: every client call over inproc, then the real ibid-retriever over ipc, killed while it
 * catches up. No attention room runs here, so searches go by words and say so. argv[1]: the
 * program. This process is the store's writer. */
#include "support.h"

#include "retriever/retriever_room.h"
#include "rpc/bus/schema.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *program;

static void connect_to(const t_store *t, bool inproc, ibid_client **c) {
    char url[IBID_BUS_URL_MAX];
    assert_ok(ibid_bus_url(t->dir, "retriever", inproc, url));
    assert_ok(ibid_client_open(url, c));
    for (int i = 0; i < 100; i++)
        if (ibid_client_ping(*c, 200, NULL, NULL) == IBID_OK) return;
    fail_msg("the retriever room does not answer: %s", ibid_err_detail());
}

static pid_t spawn(const t_store *t) {
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        (void)execl(program, program, "--data", t->dir, "--log-level", "error", "--map-size", "4G",
                    (char *)NULL);
        _exit(127);
    }
    return pid;
}

static void end(pid_t pid, int signal_number, int want) {
    int status;
    assert_int_equal(kill(pid, signal_number), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (want >= 0) assert_true(WIFEXITED(status) && WEXITSTATUS(status) == want);
}

static void first_is(ibid_client *c, const char *question, const char *want) {
    ibid_search_result f;
    ibid_search_request q = {.collection = t_str("c"), .question = t_str(question), .top = 1};
    assert_ok(ibid_ret_search(c, &q, &f));
    assert_int_equal(f.n, want ? 1 : 0);
    if (want) assert_true(t_eq(f.hits[0].id, want));
    ibid_search_result_close(&f);
}

static void no_faults(ibid_client *c) {
    ibid_buf b;
    uint64_t n = 99;
    ibid_buf_init(&b, 1 << 20);
    assert_ok(ibid_ret_verify(c, &b, &n));
    if (n) print_error("%s", b.data);
    assert_int_equal(n, 0);
    ibid_buf_fini(&b);
}

static void every_call(t_store *t, ibid_client *c) {
    ibid_search_result f;
    ibid_find_result m;
    ibid_reply status;
    uint64_t generation =
        t_put(t, "c", "a", "Tide table", "High water at noon. The X-15 flew.\n\nOther.",
              "{\"lang\":\"en\"}");
    t_put(t, "c", "b", "Menu", "Soup at noon.", "{\"lang\":\"fr\"}");
    ibid_filter filter = {t_str("lang"), t_str("en")};
    ibid_search_request q = {
        .collection = t_str("c"), .question = t_str("noon"), .filters = &filter, .n_filters = 1};
    assert_ok(ibid_ret_search(c, &q, &f));
    assert_int_equal(f.n, 1);
    assert_true(t_eq(f.hits[0].id, "a") && t_eq(f.hits[0].title, "Tide table"));
    assert_true(t_eq(f.hits[0].text, "High water at noon. The X-15 flew."));
    assert_true(f.hits[0].lexical > 0 && f.hits[0].keys == 0 && f.relevant);
    assert_true(f.degraded.n > 0 && f.generation == generation + 1);
    assert_true(f.total_ms > 0 && f.lexical_ms > 0);
    ibid_search_result_close(&f);
    first_is(c, "x15", "a");
    first_is(c, "soups", "b");
    first_is(c, "zebra", NULL);
    q = (ibid_search_request){.collection = t_str("nowhere"), .question = t_str("noon")};
    assert_err(ibid_ret_search(c, &q, &f), IBID_NOCOLLECTION);
    q = (ibid_search_request){.collection = t_str("c"), .question = t_str("  ")};
    assert_err(ibid_ret_search(c, &q, &f), IBID_INVAL);

    ibid_find_request fq = {
        .collection = t_str("c"), .document = t_str("a"), .query = t_str("NOON"), .min_score = -1};
    assert_ok(ibid_ret_find(c, &fq, &m));
    assert_int_equal(m.n, 1);
    assert_true(m.matches[0].exact && m.matches[0].start == 14 && m.matches[0].end == 18);
    assert_true(t_eq(m.matches[0].text, "noon") && m.degraded.n > 0);
    ibid_find_result_close(&m);
    fq.document = t_str("zzz");
    assert_err(ibid_ret_find(c, &fq, &m), IBID_NOTFOUND);

    assert_ok(ibid_ret_notify(c, generation));
    assert_ok(ibid_ret_reindex(c, t_str("c")));
    assert_ok(ibid_ret_reindex(c, t_str("")));
    assert_err(ibid_ret_reindex(c, t_str("nowhere")), IBID_NOCOLLECTION);
    first_is(c, "x15", "a");
    no_faults(c);
    assert_ok(ibid_ret_status(c, &status));
    const ibid_val *list = ibid_val_get(status.body, "collections");
    assert_int_equal(ibid_val_count(list), 1);
    assert_int_equal(ibid_get_u64(ibid_val_at(list, 0), "lexical_rows", 0), 3);
    assert_int_equal(ibid_get_u64(ibid_val_at(list, 0), "blocks", 0), 3);
    assert_true(ibid_get_u64(ibid_val_at(list, 0), "tokens", 0) > 0);
    /* so few are scored from the store: no copy */
    assert_int_equal(ibid_get_u64(ibid_val_at(list, 0), "keys_rows", 1), 0);
    ibid_reply_close(&status);
}

static void test_inproc(void **state) {
    (void)state;
    static const ibid_room_vtable *const rooms[] = {&ibid_retriever_room};
    t_store t;
    ibid_client *c;
    ibid_hosted *hosted;
    ibid_host_opts o = {.log_level = IBID_LOG_ERROR, .map_size = (uint64_t)4 << 30};
    t_open(&t);
    snprintf(o.data_dir, sizeof o.data_dir, "%s", t.dir);
    assert_ok(ibid_host_inproc(rooms, 1, &o, &hosted));
    connect_to(&t, true, &c);
    every_call(&t, c);
    ibid_client_close(c);
    ibid_hosted_close(hosted);
    t_close(&t);
}

static void test_process(void **state) {
    (void)state;
    t_store t;
    ibid_client *c;
    t_open(&t);
    pid_t pid = spawn(&t);
    connect_to(&t, false, &c);
    every_call(&t, c);
    end(pid, SIGTERM, 0);
    pid = spawn(&t);
    ibid_client_close(c);
    connect_to(&t, false, &c);
    first_is(c, "x15", "a");
    end(pid, SIGTERM, 0);
    ibid_client_close(c);
    t_close(&t);
}

static void pause_ms(uint64_t ms) {
    struct timespec d = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000};
    nanosleep(&d, NULL);
}

static void test_killed(void **state) {
    (void)state;
    enum { ROUNDS = 12, DOCS = 60 };
    t_store t;
    ibid_client *c;
    uint64_t seed = 31337;
    char id[64], text[700];
    print_message("seed %llu\n", (unsigned long long)seed);
    t_open(&t);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < DOCS; i++) {
            size_t len = (size_t)snprintf(text, sizeof text, "mark%dx%d", round, i);
            for (int w = 0; w < 80; w++)
                len += (size_t)snprintf(text + len, sizeof text - len, " %llu",
                                        (unsigned long long)(t_rnd(&seed) % 5000));
            snprintf(id, sizeof id, "d%llu", (unsigned long long)(t_rnd(&seed) % 300));
            if (i == DOCS - 1) snprintf(id, sizeof id, "last%d", round);
            t_put(&t, "c", id, "Numbers", text, NULL);
        }
        pid_t pid = spawn(&t); /* it catches up at once */
        pause_ms(t_rnd(&seed) % 120);
        end(pid, SIGKILL, -1);
    }
    pid_t pid = spawn(&t);
    connect_to(&t, false, &c);
    for (int round = 0; round < ROUNDS; round++) {
        snprintf(text, sizeof text, "mark%dx%d", round, DOCS - 1);
        snprintf(id, sizeof id, "last%d", round);
        first_is(c, text, id);
    }
    no_faults(c);
    end(pid, SIGKILL, -1);
    /* killed once more, with everything in place: nothing needs to be built again to answer */
    pid = spawn(&t);
    ibid_client_close(c);
    connect_to(&t, false, &c);
    first_is(c, text, id);
    no_faults(c);
    end(pid, SIGTERM, 0);
    ibid_client_close(c);
    t_close(&t);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_inproc),
        cmocka_unit_test(test_process),
        cmocka_unit_test(test_killed),
    };
    if (argc < 2) {
        fprintf(stderr, "usage: %s IBID-RETRIEVER\n", argv[0]);
        return 2;
    }
    program = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
