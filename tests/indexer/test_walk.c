/* Which files a path means, on a folder of every kind of thing. */
#include "indexer/walk.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[PATH_MAX];

static void make(const char *name) {
    char path[PATH_MAX];
    (void)snprintf(path, sizeof path, "%.2000s/%s", root, name);
    int fd = open(path, O_CREAT | O_WRONLY | O_EXCL, 0600);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, "x", 1), 1);
    (void)close(fd);
}

static void make_dir(const char *name) {
    char path[PATH_MAX];
    (void)snprintf(path, sizeof path, "%.2000s/%s", root, name);
    assert_int_equal(mkdir(path, 0700), 0);
}

static void link_to(const char *target, const char *name) {
    char path[PATH_MAX];
    (void)snprintf(path, sizeof path, "%.2000s/%s", root, name);
    assert_int_equal(symlink(target, path), 0);
}

static int set_up(void **state) {
    (void)state;
    const char *tmp = getenv("TMPDIR");
    char dir[PATH_MAX], fifo[PATH_MAX];
    (void)snprintf(dir, sizeof dir, "%.1000s/ibid-walk-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(dir) || !realpath(dir, root)) return -1;
    make("b.txt");
    make("a.txt");
    make("Z.md");
    make(".hidden");
    make_dir("sub");
    make("sub/c.txt");
    make_dir("sub/deep");
    make("sub/deep/d.txt");
    make_dir(".git");
    make(".git/config");
    make_dir("data");
    make("data/own.txt");
    make("sub.txt");
    link_to("/etc", "out");
    link_to("/etc/passwd", "passwd.txt");
    link_to("a.txt", "alias.txt");
    link_to("..", "sub/up");
    (void)snprintf(fifo, sizeof fifo, "%.2000s/pipe.txt", root);
    return mkfifo(fifo, 0600);
}

static int tear_down(void **state) {
    (void)state;
    char cmd[PATH_MAX + 16];
    (void)snprintf(cmd, sizeof cmd, "rm -rf '%s'", root);
    return system(cmd);
}

static void lists_files_in_order(void **state) {
    (void)state;
    ibid_walk w = {0};
    struct stat st;
    char data[PATH_MAX];
    (void)snprintf(data, sizeof data, "%.2000s/data", root);
    assert_int_equal(stat(data, &st), 0);
    w.skip_dev = st.st_dev;
    w.skip_ino = st.st_ino;
    assert_int_equal(ibid_walk_add(&w, root), IBID_OK);
    static const char *const want[] = {"Z.md",      "a.txt",          "b.txt",
                                       "sub/c.txt", "sub/deep/d.txt", "sub.txt"};
    assert_int_equal(w.n, 6);
    assert_int_equal(w.unread, 0);
    for (size_t i = 0; i < 6; i++) {
        assert_string_equal(w.files[i].path + strlen(root) + 1, want[i]);
        assert_null(w.files[i].reason);
    }
    ibid_walk_fini(&w);
}

static void named_things(void **state) {
    (void)state;
    ibid_walk w = {0};
    char path[PATH_MAX];
    static const char *const names[] = {"alias.txt", "pipe.txt", "gone.txt", ".hidden"};
    for (size_t i = 0; i < 4; i++) {
        (void)snprintf(path, sizeof path, "%.2000s/%s", root, names[i]);
        assert_int_equal(ibid_walk_add(&w, path), IBID_OK);
    }
    assert_int_equal(w.n, 4);
    assert_string_equal(w.files[0].path + strlen(root), "/a.txt"); /* the link's target */
    assert_null(w.files[0].reason);
    assert_non_null(w.files[1].reason);
    assert_string_equal(w.files[2].reason, "no such file");
    assert_null(w.files[3].reason);
    assert_int_equal(ibid_walk_add(&w, "relative"), IBID_INVAL);
    ibid_walk_fini(&w);
}

static void opens_no_links(void **state) {
    (void)state;
    int fd = -1;
    uint64_t size = 0;
    char path[PATH_MAX];
    (void)snprintf(path, sizeof path, "%.2000s/a.txt", root);
    assert_int_equal(ibid_walk_open(path, &fd, &size), IBID_OK);
    assert_int_equal(size, 1);
    (void)close(fd);
    static const char *const bad[] = {"alias.txt", "pipe.txt", "sub", "gone.txt", "out/passwd"};
    for (size_t i = 0; i < 5; i++) {
        (void)snprintf(path, sizeof path, "%.2000s/%s", root, bad[i]);
        assert_int_not_equal(ibid_walk_open(path, &fd, &size), IBID_OK);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(lists_files_in_order),
                                       cmocka_unit_test(named_things),
                                       cmocka_unit_test(opens_no_links)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
