#include "rpc/front/asking.h"
#include "rpc/front/options.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static int nothing(ibid_cli *cli) {
    (void)cli;
    return 0;
}

/* The table the parser reads in the program lives in ibid_main.c; these two are enough here. Bits as in
 * options.c: index 1 << 3, search 1 << 4. */
const ibid_command ibidi_commands[] = {
    {"index", 1 << 3, "PATH...", "index", "", 1, 8, nothing},
    {"search", 1 << 4, "QUESTION", "search", "", 0, 1, nothing},
    {NULL, 0, NULL, NULL, NULL, 0, 0, NULL},
};

static char ini_path[] = "/tmp/ibid-options-XXXXXX";

static void write_ini(const char *text) {
    FILE *f = fopen(ini_path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

static ibid_err parse(ibid_cli *cli, const char **argv) {
    static char copies[16][128];
    static char *args[17];
    int argc = 0;
    for (; argv[argc]; argc++) {
        (void)snprintf(copies[argc], sizeof copies[argc], "%s", argv[argc]);
        args[argc] = copies[argc];
    }
    args[argc] = NULL;
    const ibid_command *cmd;
    return ibidi_cli_parse(argc, args, cli, &cmd);
}

static void test_later_wins(void **state) {
    (void)state;
    ibid_cli cli;
    write_ini("[ibid]\ntop = 3\ncollection = from-file\nfilter = a=b\n");
    assert_int_equal(parse(&cli, (const char *[]){"ibid", "search", "--config", ini_path, "q", NULL}), 0);
    assert_int_equal(cli.o.top, 3);
    assert_string_equal(cli.o.collection, "from-file");
    assert_int_equal(cli.o.n_filters, 1);
    assert_int_equal(cli.n_args, 1);
    ibidi_cli_fini(&cli);

    assert_int_equal(setenv("IBID_TOP", "4", 1), 0);
    assert_int_equal(parse(&cli, (const char *[]){"ibid", "search", "--config", ini_path, "q", NULL}), 0);
    assert_int_equal(cli.o.top, 4);
    ibidi_cli_fini(&cli);
    assert_int_equal(
        parse(&cli, (const char *[]){"ibid", "search", "--top", "5", "--config", ini_path, "q", NULL}), 0);
    assert_int_equal(cli.o.top, 5);
    ibidi_cli_fini(&cli);
    assert_int_equal(unsetenv("IBID_TOP"), 0);
}

static void test_refused(void **state) {
    (void)state;
    static const char *const bad[][6] = {
        {"ibid", "fly"},
        {"ibid", "search", "--prune", "q"},
        {"ibid", "search", "--nonsense", "q"},
        {"ibid", "search", "--top"},
        {"ibid", "search", "--top", "five", "q"},
        {"ibid", "search", "--top", "-1", "q"},
        {"ibid", "search", "--top", "99999999999999999999999", "q"},
        {"ibid", "search", "--filter", "novalue", "q"},
        {"ibid", "search", "two", "words"},
        {"ibid", "index"},
    };
    write_ini("");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ibid_cli cli;
        const char *argv[7] = {0};
        memcpy(argv, bad[i], sizeof bad[i]);
        ibid_err_clear();
        assert_int_equal(parse(&cli, argv), IBID_INVAL);
        assert_true(strlen(ibid_err_detail()) > 10);
        ibidi_cli_fini(&cli);
    }
    ibid_cli cli;
    write_ini("[ibid]\nno-such-key = 1\n");
    assert_int_equal(parse(&cli, (const char *[]){"ibid", "search", "--config", ini_path, "q", NULL}),
                     IBID_INVAL);
    assert_non_null(strstr(ibid_err_detail(), "no-such-key"));
    ibidi_cli_fini(&cli);
    assert_int_equal(parse(&cli, (const char *[]){"ibid", "search", "--config", "/nonexistent", "q", NULL}),
                     IBID_NOTFOUND);
    ibidi_cli_fini(&cli);
}

static void test_units_and_flags(void **state) {
    (void)state;
    ibid_cli cli;
    write_ini("[ibid]\njson = yes\nprune = 0\n");
    assert_int_equal(parse(&cli, (const char *[]){"ibid", "index", "--kv-budget", "3G", "--config", ini_path,
                                                  "a", "b", NULL}),
                     0);
    assert_int_equal(cli.o.kv_budget, (uint64_t)3 << 30);
    assert_true(cli.o.json);
    assert_false(cli.o.prune);
    assert_int_equal(cli.n_args, 2);
    ibidi_cli_fini(&cli);
}

/* --attention in words. */
static void test_attention(void **state) {
    static const struct {
        const char *text;
        double share;
        bool recall;
    } good[] = {{"full", 0, false},
                {"select", 0.2, false},
                {"select,recall", 0.2, true},
                {"select=0.05", 0.05, false},
                {"select=1,recall", 1, true}};
    static const char *const bad[] = {"",          "Full",        "select=",         "select=0",
                                      "select=-1", "select=1.01", "select=nan",      "select=0.1x",
                                      "selected",  "select=,recall", "select,recall=1", "full,recall"};
    double share;
    bool recall;
    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(ibidi_read_attention(good[i].text, &share, &recall), IBID_OK);
        assert_true(share == good[i].share && recall == good[i].recall);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(ibidi_read_attention(bad[i], &share, &recall), IBID_INVAL);
}

int main(void) {
    int fd = mkstemp(ini_path);
    if (fd < 0) return 1;
    (void)close(fd);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_later_wins),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_units_and_flags),
        cmocka_unit_test(test_attention),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    (void)unlink(ini_path);
    return failed;
}
