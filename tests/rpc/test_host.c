/* Options, the data folder, a room as a process, rooms as guests. */
#include "rpc/base/clock.h"
#include "tests/rpc/echo_room.h"

#include <ftw.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char dir[64];

static int group_setup(void **state) {
    (void)state;
    (void)snprintf(dir, sizeof dir, "/tmp/ibid-test-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *w) {
    (void)st;
    (void)kind;
    (void)w;
    return remove(path);
}

static int group_teardown(void **state) {
    (void)state;
    return nftw(dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

#define PARSE(o, help, ...)                                                                        \
    ibid_host_parse((int)(sizeof((char *[]){"room", __VA_ARGS__}) / sizeof(char *)),               \
                    (char *[]){"room", __VA_ARGS__}, o, help)

static void test_parse(void **state) {
    (void)state;
    ibid_host_opts o;
    bool help;
    assert_int_equal(PARSE(&o, &help, "--data", "/d", "--threads=3", "--workers", "5", "--map-size",
                           "64M", "--kv-budget=2G", "--log-level", "debug", "--kernels", "avx2",
                           "--arithmetic", "f32"),
                     IBID_OK);
    assert_true(o.f32);
    assert_int_equal(PARSE(&o, &help, "--arithmetic", "f64"), IBID_INVAL);
    assert_int_equal(PARSE(&o, &help, "--data", "/d", "--threads=3", "--workers", "5", "--map-size",
                           "64M", "--kv-budget=2G", "--log-level", "debug", "--kernels", "avx2"),
                     IBID_OK);
    assert_false(o.f32);
    assert_string_equal(o.data_dir, "/d");
    assert_int_equal(o.threads, 3);
    assert_int_equal(o.workers, 5);
    assert_true(o.map_size == UINT64_C(64) << 20);
    assert_true(o.kv_budget == UINT64_C(2) << 30);
    assert_int_equal(o.log_level, IBID_LOG_DEBUG);
    assert_string_equal(o.kernels, "avx2");
    assert_false(help);
    assert_int_equal(PARSE(&o, &help, "-h"), IBID_OK);
    assert_true(help);
    assert_int_equal(PARSE(&o, &help, "--data"), IBID_INVAL);
    assert_int_equal(PARSE(&o, &help, "--threads", "many"), IBID_INVAL);
    assert_non_null(strstr(ibid_err_detail(), "--threads"));
    assert_int_equal(PARSE(&o, &help, "--threads", "-1"), IBID_INVAL);
    assert_int_equal(PARSE(&o, &help, "--threads", "2K"), IBID_INVAL);
    assert_int_equal(PARSE(&o, &help, "--map-size", "99999999999T"), IBID_INVAL);
    assert_int_equal(PARSE(&o, &help, "--map-size", ""), IBID_INVAL);
    assert_int_equal(PARSE(&o, &help, "--log-level", "loud"), IBID_INVAL);
    assert_int_equal(PARSE(&o, &help, "--colour", "red"), IBID_INVAL);
    assert_int_equal(PARSE(&o, &help, "stray"), IBID_INVAL);
}

static void test_data_dir(void **state) {
    (void)state;
    char out[IBID_HOST_PATH_MAX];
    (void)setenv("IBID_DATA", "/env", 1);
    (void)setenv("XDG_DATA_HOME", "/xdg", 1);
    (void)setenv("HOME", "/home/x", 1);
    assert_int_equal(ibid_host_data_dir("/arg", out), IBID_OK);
    assert_string_equal(out, "/arg");
    assert_int_equal(ibid_host_data_dir("rel/dir", out), IBID_OK);
    assert_int_equal(out[0], '/');
    assert_string_equal(out + strlen(out) - 8, "/rel/dir");
    assert_int_equal(ibid_host_data_dir(NULL, out), IBID_OK);
    assert_string_equal(out, "/env");
    (void)unsetenv("IBID_DATA");
    assert_int_equal(ibid_host_data_dir("", out), IBID_OK);
    assert_string_equal(out, "/xdg/ibid");
    (void)unsetenv("XDG_DATA_HOME");
    assert_int_equal(ibid_host_data_dir(NULL, out), IBID_OK);
    assert_string_equal(out, "/home/x/.local/share/ibid");
    (void)unsetenv("HOME");
    assert_int_equal(ibid_host_data_dir(NULL, out), IBID_INVAL);
    (void)setenv("HOME", "/tmp", 1);
}

static void test_url(void **state) {
    (void)state;
    char a[IBID_BUS_URL_MAX], b[IBID_BUS_URL_MAX], path[512], expected[128];
    struct stat st;
    assert_int_equal(ibid_bus_url(dir, "kvstore", false, a), IBID_OK);
    (void)snprintf(expected, sizeof expected, "ipc://%s/run/kvstore.sock", dir);
    assert_string_equal(a, expected);
    (void)snprintf(path, sizeof path, "%s/run", dir);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    (void)snprintf(path, sizeof path, "%s/", dir);
    assert_int_equal(ibid_bus_url(dir, "kvstore", true, a), IBID_OK);
    assert_int_equal(ibid_bus_url(path, "kvstore", true, b), IBID_OK);
    assert_string_equal(a, b); /* two spellings of one folder */
    assert_memory_equal(a, "inproc://ibid-", 14);
    /* A path too long for a socket lies elsewhere, in a folder of ours alone. */
    (void)snprintf(path, sizeof path, "%s/%0120d", dir, 0);
    (void)unsetenv("XDG_RUNTIME_DIR");
    assert_int_equal(ibid_bus_url(path, "kvstore", false, a), IBID_OK);
    assert_memory_equal(a, "ipc:///tmp/ibid-", 16);
    assert_true(strlen(a) < 100);
    *strrchr(a, '/') = '\0';
    assert_int_equal(lstat(a + 6, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    assert_int_equal(chmod(a + 6, 0777), 0);
    assert_int_equal(ibid_bus_url(path, "kvstore", false, b),
                     IBID_IO); /* others could write there */
    (void)rmdir(a + 6);
    (void)setenv("XDG_RUNTIME_DIR", dir, 1);
    assert_int_equal(ibid_bus_url(path, "kvstore", false, a), IBID_OK);
    assert_memory_equal(a + 6, dir, strlen(dir));
    assert_int_equal(ibid_bus_url("relative", "kvstore", false, a), IBID_INVAL);
    assert_int_equal(ibid_bus_url(dir, "../kvstore", false, a), IBID_INVAL);
}

static void test_inproc(void **state) {
    (void)state;
    static ibid_host_opts o;
    ibid_hosted *h = NULL;
    ibid_client *c = NULL;
    char url[IBID_BUS_URL_MAX];
    const ibid_room_vtable *rooms[] = {&echo_vtable}, *twice[] = {&echo_vtable, &echo_vtable};
    (void)snprintf(o.data_dir, sizeof o.data_dir, "%s", dir);
    assert_int_equal(ibid_host_inproc(rooms, 1, &o, &h), IBID_OK);
    assert_int_equal(ibid_bus_url(dir, "echo", true, url), IBID_OK);
    assert_int_equal(ibid_client_open(url, &c), IBID_OK);
    assert_int_equal(ibid_client_ping(c, 2000, NULL, NULL), IBID_OK);
    ibid_hosted_close(h);
    assert_int_equal(ibid_client_ping(c, 100, NULL, NULL), IBID_UNAVAIL);
    ibid_client_close(c);
    h = NULL;
    assert_int_equal(ibid_host_inproc(twice, 2, &o, &h),
                     IBID_UNAVAIL); /* the first is closed again */
    assert_null(h);
    assert_int_equal(ibid_host_inproc(rooms, 1, &o, &h), IBID_OK);
    ibid_hosted_close(h);
    ibid_hosted_close(NULL);
}

static pid_t start_room(const char *log_level) {
    pid_t pid = fork();
    if (pid == 0) {
        (void)execl("/proc/self/exe", "echo", "--data", dir, "--log-level", log_level,
                    (char *)NULL);
        _exit(127);
    }
    return pid;
}

static void test_process(void **state) {
    (void)state;
    char url[IBID_BUS_URL_MAX];
    ibid_client *c = NULL;
    uint64_t pid = 0;
    int status = 0;
    assert_int_equal(ibid_bus_url(dir, "echo", false, url), IBID_OK);
    pid_t child = start_room("error");
    assert_int_equal(ibid_client_open(url, &c), IBID_OK);
    uint64_t start = ibid_now_ns();
    while (ibid_client_ping(c, 1000, &pid, NULL) && ibid_ms_since(start) < 10000) {
    }
    assert_int_equal(pid, child);
    (void)kill(child, SIGTERM);
    (void)waitpid(child, &status, 0);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    child = start_room("shout"); /* bad usage */
    (void)waitpid(child, &status, 0);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 2);
    ibid_client_close(c);
}

/* The room's parent dies without a word: the room stops. */
static void test_orphan(void **state) {
    (void)state;
    int p[2], status = 0;
    pid_t room = 0;
    assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
    assert_int_equal(pipe(p), 0);
    pid_t parent = fork();
    if (parent == 0) {
        pid_t r = start_room("error");
        if (write(p[1], &r, sizeof r) != (ssize_t)sizeof r) _exit(1);
        (void)pause();
        _exit(0);
    }
    assert_int_equal(read(p[0], &room, sizeof room), sizeof room);
    char url[IBID_BUS_URL_MAX];
    ibid_client *c = NULL;
    assert_int_equal(ibid_bus_url(dir, "echo", false, url), IBID_OK);
    assert_int_equal(ibid_client_open(url, &c), IBID_OK);
    uint64_t start = ibid_now_ns();
    while (ibid_client_ping(c, 1000, NULL, NULL) && ibid_ms_since(start) < 10000) {
    }
    (void)kill(parent, SIGKILL);
    (void)waitpid(parent, &status, 0);
    assert_int_equal(waitpid(room, &status, 0), room); /* ours now */
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    ibid_client_close(c);
    (void)close(p[0]);
    (void)close(p[1]);
}

/* ---- A room that cannot go on ---- */

static void *give_up(void *arg) {
    (void)usleep(50000);
    ibid_host_give_up(arg, IBID_BACKEND, "GPU lost: as a test says");
    ibid_host_give_up(arg, IBID_BACKEND, "said before");
    return NULL;
}

static pthread_t giving_up;

static ibid_err doomed_open(const ibid_host_opts *o, void **room) {
    *room = &giving_up;
    return pthread_create(&giving_up, NULL, give_up, (void *)(uintptr_t)o) == 0
               ? IBID_OK
               : ibid_fail(IBID_NOMEM, "no thread");
}

static void doomed_close(void *room) {
    (void)pthread_join(*(pthread_t *)room, NULL);
}

static const ibid_room_vtable doomed_vtable = {"doomed", doomed_open, doomed_close};

/* It says why, once, and ends with a status of its own, which a supervisor answers by starting it
 * again; beside other rooms in one process it only says so. */
static void test_give_up(void **state) {
    (void)state;
    static ibid_host_opts o;
    const ibid_room_vtable *rooms[] = {&doomed_vtable};
    ibid_hosted *h = NULL;
    char text[4096] = "";
    int p[2], status = 0;
    size_t n = 0;
    assert_int_equal(pipe(p), 0);
    pid_t pid = fork();
    if (pid == 0) {
        (void)dup2(p[1], STDERR_FILENO);
        (void)close(p[0]);
        (void)close(p[1]);
        (void)execl("/proc/self/exe", "doomed", "--data", dir, (char *)NULL);
        _exit(127);
    }
    (void)close(p[1]);
    for (ssize_t got; n < sizeof text - 1 && (got = read(p[0], text + n, sizeof text - 1 - n)) > 0;)
        n += (size_t)got;
    (void)close(p[0]);
    (void)waitpid(pid, &status, 0);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    assert_non_null(strstr(text, "cannot go on: backend_error: GPU lost: as a test says"));
    assert_null(strstr(text, "said before"));
    (void)snprintf(o.data_dir, sizeof o.data_dir, "%s", dir);
    assert_int_equal(ibid_host_inproc(rooms, 1, &o, &h), IBID_OK);
    (void)usleep(100000);
    ibid_hosted_close(h); /* nothing ended this process */
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parse),   cmocka_unit_test(test_data_dir),
        cmocka_unit_test(test_url),     cmocka_unit_test(test_inproc),
        cmocka_unit_test(test_process), cmocka_unit_test(test_orphan),
        cmocka_unit_test(test_give_up),
    };
    if (argc > 1)
        return ibid_host_main(argc, argv,
                              strcmp(argv[0], "doomed") == 0 ? &doomed_vtable : &echo_vtable);
    return cmocka_run_group_tests_name("host", tests, group_setup, group_teardown);
}
