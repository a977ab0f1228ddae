/* The bus over both transports: one suite, run for ipc:// and for inproc://. */
#include "rpc/base/clock.h"
#include "rpc/base/mem.h"
#include "rpc/bus/envelope.h"
#include "tests/rpc/echo_room.h"

#include <nng/nng.h>
#include <nng/protocol/reqrep0/req.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <setjmp.h>

#include <cmocka.h>

struct fixture {
    bool inproc;
    char dir[64], url[IBID_BUS_URL_MAX];
    echo_room *room;
    ibid_client *c;
};

static struct fixture fx;

#define ok(e)                                                                                      \
    do {                                                                                           \
        ibid_err e_ = (e);                                                                         \
        if (e_) print_error("%s: %s\n", ibid_err_code(e_), ibid_err_detail());                     \
        assert_int_equal(e_, IBID_OK);                                                             \
    } while (0)

static int group_setup(void **state) {
    (void)state;
    (void)snprintf(fx.dir, sizeof fx.dir, "/tmp/ibid-test-XXXXXX");
    assert_non_null(mkdtemp(fx.dir));
    ok(ibid_bus_url(fx.dir, "echo", fx.inproc, fx.url));
    return 0;
}

static int group_teardown(void **state) {
    char path[256];
    (void)state;
    (void)snprintf(path, sizeof path, "%s/run/echo.sock", fx.dir);
    (void)unlink(path);
    (void)snprintf(path, sizeof path, "%s/run/echo.sock.lock", fx.dir);
    (void)unlink(path);
    (void)snprintf(path, sizeof path, "%s/run/echo.sock2.lock", fx.dir);
    (void)unlink(path);
    (void)snprintf(path, sizeof path, "%s/run", fx.dir);
    (void)rmdir(path);
    return rmdir(fx.dir);
}

static int setup(void **state) {
    (void)state;
    ok(echo_open(fx.url, 12, &fx.room));
    ok(ibid_client_open(fx.url, &fx.c));
    return 0;
}

static int teardown(void **state) {
    (void)state;
    ibid_client_close(fx.c);
    echo_close(fx.room);
    fx.c = NULL;
    fx.room = NULL;
    return 0;
}

/* ---- Calls in one line each ---- */

static ibid_err call_echo(ibid_client *c, const void *data, size_t n, uint64_t ms,
                          ibid_reply *out) {
    ibid_enc b;
    ibid_enc_init(&b, SIZE_MAX / 2);
    ibid_enc_map(&b, NULL);
    ibid_enc_bin(&b, "data", data, n);
    ibid_enc_end(&b);
    ibid_err e = ibid_client_call(c, "echo.echo", &b, ms, out);
    ibid_enc_fini(&b);
    return e;
}

static ibid_err call_u64(ibid_client *c, const char *method, const char *key, uint64_t v,
                         uint64_t ms) {
    ibid_enc b;
    ibid_enc_init(&b, 1024);
    ibid_enc_map(&b, NULL);
    ibid_enc_u64(&b, key, v);
    ibid_enc_end(&b);
    ibid_err e = ibid_client_call(c, method, &b, ms, NULL);
    ibid_enc_fini(&b);
    return e;
}

static ibid_err call_begin(uint64_t events, bool fail, uint64_t *stream) {
    ibid_enc b;
    ibid_reply r;
    ibid_enc_init(&b, 1024);
    ibid_enc_map(&b, NULL);
    ibid_enc_u64(&b, "events", events);
    ibid_enc_bool(&b, "fail", fail);
    ibid_enc_end(&b);
    ibid_err e = ibid_client_call(fx.c, "echo.begin", &b, 5000, &r);
    if (!e) *stream = ibid_get_u64(r.body, "stream", 0);
    ibid_enc_fini(&b);
    ibid_reply_close(&r);
    return e;
}

static ibid_err call_next(uint64_t stream, uint64_t seq, uint64_t ms, uint64_t *i, bool *last) {
    ibid_enc b;
    ibid_reply r;
    ibid_enc_init(&b, 1024);
    ibid_enc_map(&b, NULL);
    ibid_enc_u64(&b, "stream", stream);
    ibid_enc_u64(&b, "seq", seq);
    ibid_enc_end(&b);
    ibid_err e = ibid_client_call(fx.c, "echo.next", &b, ms, &r);
    if (!e) {
        *i = ibid_get_u64(ibid_val_get(r.body, "event"), "i", UINT64_MAX);
        *last = ibid_get_bool(r.body, "last", false);
    }
    ibid_enc_fini(&b);
    ibid_reply_close(&r);
    return e;
}

/* ---- Calls ---- */

static void test_echo(void **state) {
    (void)state;
    ibid_reply r;
    const void *p;
    size_t n;
    ok(call_echo(fx.c, "hello", 5, 0, &r));
    assert_true(ibid_get_bin(r.body, "data", &p, &n));
    assert_int_equal(n, 5);
    assert_memory_equal(p, "hello", 5);
    ibid_reply_close(&r);
    ok(ibid_client_call(fx.c, "echo.echo", NULL, 0, &r)); /* no body at all */
    assert_true(ibid_get_bin(r.body, "data", &p, &n));
    assert_int_equal(n, 0);
    ibid_reply_close(&r);
    uint64_t pid = 0, up = UINT64_MAX;
    ok(ibid_client_ping(fx.c, 1000, &pid, &up));
    assert_int_equal(pid, getpid());
    assert_true(up < 60000);
}

static void test_errors_travel(void **state) {
    (void)state;
    static const struct {
        const char *code;
        ibid_err e;
    } want[] = {{"disk_full", IBID_DISKFULL},
                {"context_length_exceeded", IBID_CONTEXT},
                {"no_such_code", IBID_INTERNAL}};
    for (size_t i = 0; i < 3; i++) {
        ibid_enc b;
        ibid_enc_init(&b, 1024);
        ibid_enc_map(&b, NULL);
        ibid_enc_cstr(&b, "code", want[i].code);
        ibid_enc_cstr(&b, "text", "42 of 40 tokens");
        ibid_enc_end(&b);
        assert_int_equal(ibid_client_call(fx.c, "echo.fail", &b, 0, NULL), want[i].e);
        assert_string_equal(ibid_err_detail(), "42 of 40 tokens");
        ibid_enc_fini(&b);
    }
    assert_int_equal(ibid_client_call(fx.c, "echo.nothing", NULL, 0, NULL), IBID_NOTSUP);
    assert_non_null(strstr(ibid_err_detail(), "echo.nothing"));
    assert_int_equal(ibid_client_call(fx.c, "echo.sleep", NULL, 0, NULL), IBID_PROTO);
    assert_non_null(strstr(ibid_err_detail(), "ms is missing"));
    assert_int_equal(call_u64(fx.c, "echo.sleep", "ms", 99999999, 0), IBID_TOOBIG);
    ok(ibid_client_ping(fx.c, 1000, NULL, NULL));
}

static void test_big(void **state) {
    (void)state;
    const size_t n = (size_t)64 << 20;
    ibid_reply r;
    const void *p;
    size_t m;
    uint8_t *data = ibid_alloc(n);
    assert_non_null(data);
    for (size_t i = 0; i < n; i++) data[i] = (uint8_t)(i * 2654435761u >> 13);
    ok(call_echo(fx.c, data, n, 60000, &r));
    assert_true(ibid_get_bin(r.body, "data", &p, &m));
    assert_int_equal(m, n);
    assert_memory_equal(p, data, n);
    ibid_reply_close(&r);
    ibid_free(data);
}

static void test_oversize(void **state) {
    (void)state;
    const size_t n = (size_t)IBID_BUS_MESSAGE_MAX;
    uint8_t *data = ibid_calloc(1, n);
    assert_non_null(data);
    assert_int_equal(call_echo(fx.c, data, n, 5000, NULL), IBID_TOOBIG);
    assert_int_equal(echo_runs(fx.room), 0);
    ibid_free(data);
    ok(ibid_client_ping(fx.c, 1000, NULL, NULL));
}

static void test_unfinished_body(void **state) {
    (void)state;
    ibid_enc b;
    ibid_enc_init(&b, 64);
    ibid_enc_map(&b, NULL);
    assert_int_equal(ibid_client_call(fx.c, "echo.echo", &b, 0, NULL), IBID_INTERNAL);
    ibid_enc_cstr(&b, "data", "more than the sixty-four bytes that this encoder may ever hold, so");
    assert_int_equal(ibid_client_call(fx.c, "echo.echo", &b, 0, NULL), IBID_TOOBIG);
    ibid_enc_fini(&b);
}

/* ---- Many at once ---- */

enum { THREADS = 8, CALLS = 500 };
static _Atomic uint64_t wrong;

static void *many(void *arg) {
    uint64_t who = (uint64_t)(uintptr_t)arg;
    for (uint64_t i = 0; i < CALLS; i++) {
        uint64_t sent[16];
        ibid_reply r;
        const void *p;
        size_t n;
        for (size_t k = 0; k < 16; k++) sent[k] = who << 32 | i << 8 | k;
        ibid_err e = call_echo(fx.c, sent, sizeof sent, 30000, &r);
        if (e || !ibid_get_bin(r.body, "data", &p, &n) || n != sizeof sent ||
            memcmp(p, sent, n) != 0)
            wrong++;
        if (!e) ibid_reply_close(&r);
    }
    return NULL;
}

static void test_threads(void **state) {
    (void)state;
    pthread_t t[THREADS];
    wrong = 0;
    for (uintptr_t i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&t[i], NULL, many, (void *)i), 0);
    for (size_t i = 0; i < THREADS; i++) (void)pthread_join(t[i], NULL);
    assert_int_equal(wrong, 0);
    assert_int_equal(echo_runs(fx.room), THREADS * CALLS);
}

/* ---- Time ---- */

static void test_deadline(void **state) {
    (void)state;
    uint64_t start = ibid_now_ns();
    assert_int_equal(call_u64(fx.c, "echo.sleep", "ms", 1000, 100), IBID_TIMEOUT);
    double ms = ibid_ms_since(start);
    assert_true(ms > 90 && ms < 900);
    ok(ibid_client_ping(fx.c, 1000, NULL, NULL));
}

static void *sleeper(void *arg) {
    (void)arg;
    (void)call_u64(fx.c, "echo.sleep", "ms", 400, 5000);
    return NULL;
}

/* Requests whose deadline passes while every worker is busy are never begun. */
static void test_deadline_before_start(void **state) {
    (void)state;
    pthread_t t[12];
    for (size_t i = 0; i < 12; i++) assert_int_equal(pthread_create(&t[i], NULL, sleeper, NULL), 0);
    while (echo_runs(fx.room) < 12) (void)usleep(1000);
    assert_int_equal(call_echo(fx.c, "x", 1, 50, NULL), IBID_TIMEOUT);
    for (size_t i = 0; i < 12; i++) (void)pthread_join(t[i], NULL);
    ok(ibid_client_ping(fx.c, 1000, NULL, NULL));
    (void)usleep(50000);
    assert_int_equal(echo_runs(fx.room), 12);
}

/* ---- Servers that come and go ---- */

static void test_nobody(void **state) {
    (void)state;
    char url[IBID_BUS_URL_MAX + 8];
    ibid_client *c = NULL;
    (void)snprintf(url, sizeof url, "%s2", fx.url);
    ok(ibid_client_open(url, &c));
    uint64_t start = ibid_now_ns();
    assert_int_equal(call_echo(c, "x", 1, 200, NULL), IBID_UNAVAIL);
    assert_true(ibid_ms_since(start) < 1000);
    start = ibid_now_ns();
    assert_int_equal(call_echo(c, "x", 1, 30000, NULL), IBID_UNAVAIL);
    assert_true(ibid_ms_since(start) < 4000);
    echo_room *late = NULL;
    ok(echo_open(url, 1, &late));
    ok(call_echo(c, "x", 1, 5000, NULL));
    ibid_client_close(c);
    echo_close(late);
}

static void test_in_use(void **state) {
    (void)state;
    echo_room *second = NULL;
    assert_int_equal(echo_open(fx.url, 1, &second), IBID_UNAVAIL);
    assert_non_null(strstr(ibid_err_detail(), "in use"));
    ok(ibid_client_ping(fx.c, 1000, NULL, NULL));
}

static void test_restart_between(void **state) {
    (void)state;
    for (int i = 0; i < 3; i++) {
        ok(call_echo(fx.c, "x", 1, 5000, NULL));
        echo_close(fx.room);
        fx.room = NULL;
        ok(echo_open(fx.url, 2, &fx.room));
        /* The first call may meet the dying pipe; it says so, and the next one works. */
        ibid_err e = call_echo(fx.c, "x", 1, 5000, NULL);
        if (e) assert_int_equal(e, IBID_UNAVAIL);
        ok(call_echo(fx.c, "x", 1, 5000, NULL));
        assert_int_equal(echo_runs(fx.room), e ? 1 : 2);
    }
}

struct late_call {
    ibid_err e;
    double ms;
};

static void *call_sleep(void *arg) {
    struct late_call *l = arg;
    uint64_t start = ibid_now_ns();
    l->e = call_u64(fx.c, "echo.sleep", "ms", 300, 20000);
    l->ms = ibid_ms_since(start);
    return NULL;
}

/* A server that closes lets a running handler finish, and its reply arrives. */
static void test_close_during(void **state) {
    (void)state;
    pthread_t t;
    struct late_call l = {0};
    assert_int_equal(pthread_create(&t, NULL, call_sleep, &l), 0);
    while (echo_runs(fx.room) < 1) (void)usleep(1000);
    echo_close(fx.room);
    fx.room = NULL;
    (void)pthread_join(t, NULL);
    assert_int_equal(l.e, IBID_OK);
    ok(echo_open(fx.url, 2, &fx.room));
    (void)call_echo(fx.c, "x", 1, 5000, NULL);
    ok(call_echo(fx.c, "x", 1, 5000, NULL));
}

static pid_t serve_elsewhere(void) {
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        (void)execl("/proc/self/exe", "test_bus", "--serve", fx.url, (char *)NULL);
        _exit(127);
    }
    return pid;
}

/* Peers that connect and run make nng 1.5.2's listener deaf; ours must hear again, and calls on
 * older connections must not notice. */
static void test_deaf_listener(void **state) {
    (void)state;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    ibid_client *c = NULL;
    ok(ibid_client_open(fx.url, &fx.c));
    pid_t pid = serve_elsewhere();
    while (ibid_client_ping(fx.c, 1000, NULL, NULL) != IBID_OK) {
    }
    (void)snprintf(a.sun_path, sizeof a.sun_path, "%.100s", fx.url + strlen("ipc://"));
    for (int i = 0; i < 50; i++) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
        (void)close(fd);
    }
    uint64_t start = ibid_now_ns();
    ibid_err e = IBID_TIMEOUT;
    ok(ibid_client_open(fx.url, &c));
    while (e && ibid_ms_since(start) < 20000) e = ibid_client_ping(c, 500, NULL, NULL);
    ok(e);
    ibid_client_close(c);
    e = ibid_client_ping(fx.c, 1000, NULL, NULL); /* its connection may have been closed */
    if (e) assert_int_equal(e, IBID_UNAVAIL);
    ok(ibid_client_ping(fx.c, 1000, NULL, NULL));
    ibid_client_close(fx.c);
    fx.c = NULL;
    (void)kill(pid, SIGKILL);
    (void)waitpid(pid, NULL, 0);
}

static void *call_long_sleep(void *arg) {
    struct late_call *l = arg;
    uint64_t start = ibid_now_ns();
    l->e = call_u64(fx.c, "echo.sleep", "ms", 20000, 20000);
    l->ms = ibid_ms_since(start);
    return NULL;
}

/* ipc only: another process, killed while it works for us; then its successor at the same address.
 */
static void test_kill(void **state) {
    (void)state;
    pthread_t t[3];
    struct late_call l[3] = {{0}};
    uint64_t first = 0, second = 0;
    ok(ibid_client_open(fx.url, &fx.c));
    pid_t pid = serve_elsewhere();
    while (ibid_client_ping(fx.c, 1000, &first, NULL) != IBID_OK) {
    }
    assert_int_equal(first, pid);
    for (size_t i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&t[i], NULL, call_long_sleep, &l[i]), 0);
    (void)usleep(200000);
    (void)kill(pid, SIGKILL);
    (void)waitpid(pid, NULL, 0);
    pid = serve_elsewhere(); /* finds the socket file its predecessor left */
    for (size_t i = 0; i < 3; i++) {
        (void)pthread_join(t[i], NULL);
        assert_int_equal(l[i].e, IBID_UNAVAIL);
        assert_true(l[i].ms < 3000);
    }
    while (ibid_client_ping(fx.c, 1000, &second, NULL) != IBID_OK) {
    }
    assert_int_equal(second, pid);
    ibid_reply r;
    ok(ibid_client_call(fx.c, "echo.runs", NULL, 0, &r));
    assert_int_equal(ibid_get_u64(r.body, "runs", 99), 0); /* nothing was sent again */
    ibid_reply_close(&r);
    (void)kill(pid, SIGTERM);
    int status = 0;
    (void)waitpid(pid, &status, 0);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    ibid_client_close(fx.c);
    fx.c = NULL;
}

static void test_socket_mode(void **state) {
    (void)state;
    struct stat st;
    assert_int_equal(stat(fx.url + strlen("ipc://"), &st), 0);
    assert_true(S_ISSOCK(st.st_mode));
    assert_int_equal(st.st_mode & 0777, 0600);
}

/* ---- A peer that is not ours ---- */

static nng_socket raw_open(void) {
    nng_socket s;
    assert_int_equal(nng_req0_open(&s), 0);
    assert_int_equal(nng_socket_set_ms(s, NNG_OPT_REQ_RESENDTIME, NNG_DURATION_INFINITE), 0);
    assert_int_equal(nng_socket_set_ms(s, NNG_OPT_RECVTIMEO, 300), 0);
    assert_int_equal(nng_dial(s, fx.url, NULL, 0), 0);
    return s;
}

/* Sends bytes; fills the reply's code ("" if none came). */
static void raw_exchange(nng_socket s, const void *data, size_t n, char code[64], uint64_t *id) {
    void *buf = NULL;
    size_t m = 0;
    code[0] = '\0';
    assert_int_equal(nng_send(s, (void *)(uintptr_t)data, n, 0), 0);
    if (nng_recv(s, &buf, &m, NNG_FLAG_ALLOC) != 0) return;
    ibidi_answer a;
    ok(ibidi_reply_open(buf, m, &a));
    (void)snprintf(code, 64, "%s", ibid_err_code(a.code));
    *id = a.id;
    ibid_msg_close(a.msg);
    nng_free(buf, m);
}

static void request_bytes(ibid_buf *out, uint64_t id, const char *method, uint64_t deadline_ms,
                          uint64_t sent_ms) {
    ibid_enc head;
    ok(ibidi_request_head(&head, id, method, deadline_ms, sent_ms));
    ibid_buf_init(out, 1 << 20);
    ok(ibid_buf_append(out, head.buf.data, head.buf.len));
    ok(ibid_buf_append(out, ibidi_empty_body, 1));
    ibid_enc_fini(&head);
}

static void test_duplicates(void **state) {
    (void)state;
    char code[64];
    uint64_t id = 0;
    ibid_buf b;
    nng_socket s = raw_open();
    request_bytes(&b, 4711, "echo.echo", 1000, 0);
    raw_exchange(s, b.data, b.len, code, &id);
    assert_string_equal(code, "ok");
    assert_int_equal(id, 4711);
    raw_exchange(s, b.data, b.len, code, &id);
    assert_string_equal(code, ""); /* no answer */
    assert_int_equal(echo_runs(fx.room), 1);
    ibid_buf_fini(&b);
    request_bytes(&b, 4712, "echo.echo", 1000, ibid_wall_ms() - 5000);
    raw_exchange(s, b.data, b.len, code, &id);
    assert_string_equal(code, "deadline_exceeded");
    assert_int_equal(echo_runs(fx.room), 1);
    ibid_buf_fini(&b);
    (void)nng_close(s);
}

static void test_garbage(void **state) {
    (void)state;
    static const char *const bad[] = {"",
                                      "\x80",
                                      "\xc1",
                                      "\x93\x01\x02",
                                      "\xdd\xff\xff\xff\xff",
                                      "\x81\xa1v\x02",
                                      "\x82\xa1v\x01\xa2id\x05"};
    char code[64];
    uint64_t id = 0;
    nng_socket s = raw_open();
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        raw_exchange(s, bad[i], strlen(bad[i]), code, &id);
        assert_string_equal(code, "protocol_error");
    }
    (void)nng_close(s);
    assert_int_equal(echo_runs(fx.room), 0);
    ok(ibid_client_ping(fx.c, 1000, NULL, NULL));
}

/* ---- Streams ---- */

static void test_stream(void **state) {
    (void)state;
    uint64_t id = 0, i = 0;
    bool last = false;
    ok(call_begin(100, false, &id)); /* the ring holds 8: the producer waits for us */
    for (uint64_t seq = 0; seq < 100; seq++) {
        if (seq == 20) (void)usleep(50000);
        ok(call_next(id, seq, 5000, &i, &last));
        assert_int_equal(i, seq);
        assert_int_equal(last, seq == 99);
    }
    ok(call_next(id, 99, 5000, &i, &last)); /* a lost reply may be asked for again */
    assert_true(last);
    assert_int_equal(call_next(id, 100, 1000, &i, &last), IBID_INVAL);
    assert_int_equal(call_next(id, 3, 1000, &i, &last), IBID_INVAL); /* given away long ago */
}

static void test_stream_error(void **state) {
    (void)state;
    uint64_t id = 0, i = 0;
    bool last = true;
    ok(call_begin(2, true, &id));
    ok(call_next(id, 0, 5000, &i, &last));
    ok(call_next(id, 1, 5000, &i, &last));
    assert_false(last);
    assert_int_equal(call_next(id, 2, 5000, &i, &last), IBID_DISKFULL);
    assert_string_equal(ibid_err_detail(), "no room for more events");
}

static void test_stream_cancel(void **state) {
    (void)state;
    uint64_t id = 0, i = 0;
    bool last = false;
    ok(call_begin(1000000, false, &id));
    ok(call_next(id, 0, 5000, &i, &last));
    ok(call_u64(fx.c, "echo.cancel", "stream", id, 5000));
    uint64_t start = ibid_now_ns();
    while (!echo_cancelled(fx.room) && ibid_ms_since(start) < 5000) (void)usleep(1000);
    assert_int_equal(echo_cancelled(fx.room), 1);
    assert_int_equal(call_next(id, 1, 1000, &i, &last), IBID_NOTFOUND);
    ok(call_u64(fx.c, "echo.cancel", "stream", id, 5000)); /* twice is fine */
}

static void test_stream_abandoned(void **state) {
    (void)state;
    uint64_t id = 0, more = 0;
    echo_patience(fx.room, 200);
    ok(call_begin(1000000, false, &id));
    uint64_t start = ibid_now_ns();
    while (!echo_cancelled(fx.room) && ibid_ms_since(start) < 5000) (void)usleep(1000);
    assert_int_equal(echo_cancelled(fx.room), 1);
    for (int n = 0; n < 3; n++) ok(call_begin(1, false, &more)); /* its place is free again */
}

/* BUSY while all are wanted; streams whose end was delivered make room at once. */
static void test_stream_table(void **state) {
    (void)state;
    uint64_t id[5] = {0}, i = 0;
    bool last = false;
    for (int n = 0; n < 4; n++) ok(call_begin(1, false, &id[n]));
    assert_int_equal(call_begin(1, false, &id[4]), IBID_BUSY);
    ok(call_next(id[2], 0, 5000, &i, &last));
    assert_true(last);
    ok(call_begin(1, false, &id[4]));
    ok(call_next(id[4], 0, 5000, &i, &last));
    ok(call_next(id[0], 0, 5000, &i, &last));
}

/* Nothing is produced and the room closes: who waits is told, soon. */
static uint64_t silent;

static void *wait_next(void *arg) {
    struct late_call *l = arg;
    uint64_t i, start = ibid_now_ns();
    bool last;
    l->e = call_next(silent, 0, 20000, &i, &last);
    l->ms = ibid_ms_since(start);
    return NULL;
}

static void test_close_while_waiting(void **state) {
    (void)state;
    pthread_t t;
    struct late_call l = {0};
    ok(call_begin(0, false, &silent));
    assert_int_equal(pthread_create(&t, NULL, wait_next, &l), 0);
    (void)usleep(100000);
    echo_close(fx.room);
    fx.room = NULL;
    (void)pthread_join(t, NULL);
    assert_int_equal(l.e, IBID_UNAVAIL);
    assert_true(l.ms < 2000);
}

static void test_streams_stop(void **state) {
    (void)state;
    ibid_streams *t = NULL;
    ibid_stream *s = NULL, *refused = NULL;
    uint64_t id = 0;
    ok(ibid_streams_open(2, 2, &t));
    ok(ibid_stream_begin(t, &id, &s));
    ibid_streams_stop(t);
    assert_true(ibid_stream_cancelled(s));
    assert_int_equal(ibid_stream_begin(t, &id, &refused), IBID_UNAVAIL);
    ibid_stream_release(s);
    ibid_streams_close(t);
}

/* ---- Main ---- */

static int serve(const char *url) {
    echo_room *r = NULL;
    sigset_t set;
    int sig = 0;
    (void)sigemptyset(&set);
    (void)sigaddset(&set, SIGTERM);
    (void)pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (echo_open(url, 8, &r)) {
        (void)fprintf(stderr, "%s\n", ibid_err_detail());
        return 1;
    }
    (void)sigwait(&set, &sig);
    echo_close(r);
    return 0;
}

int main(int argc, char **argv) {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest both[] = {
        T(test_echo),
        T(test_errors_travel),
        T(test_big),
        T(test_oversize),
        T(test_unfinished_body),
        T(test_threads),
        T(test_deadline),
        T(test_deadline_before_start),
        T(test_nobody),
        T(test_in_use),
        T(test_restart_between),
        T(test_close_during),
        T(test_duplicates),
        T(test_garbage),
        T(test_stream),
        T(test_stream_error),
        T(test_stream_cancel),
        T(test_stream_abandoned),
        T(test_stream_table),
        T(test_close_while_waiting),
        T(test_streams_stop),
    };
    const struct CMUnitTest ipc_only[] = {T(test_socket_mode), cmocka_unit_test(test_deaf_listener),
                                          cmocka_unit_test(test_kill)};
    if (argc == 3 && strcmp(argv[1], "--serve") == 0) return serve(argv[2]);
    if (argc == 3 && strcmp(argv[1], "--only") == 0) cmocka_set_test_filter(argv[2]);
    int failed = cmocka_run_group_tests_name("bus over ipc", both, group_setup, group_teardown);
    failed += cmocka_run_group_tests_name("ipc only", ipc_only, group_setup, group_teardown);
    fx.inproc = true;
    failed += cmocka_run_group_tests_name("bus over inproc", both, group_setup, group_teardown);
    return failed;
}
