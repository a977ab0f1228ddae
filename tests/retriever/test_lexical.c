/* Words, the FTS5 index, and what it does when its file is damaged. */
#include "support.h"

#include "retriever/words.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Words ---- */
typedef struct listing {
    char s[4096];
    size_t n;
} listing;

static int list_word(void *arg, const ibidi_word *w) {
    listing *l = arg;
    if (l->n + w->n + 2 < sizeof l->s) {
        if (l->n) l->s[l->n++] = ' ';
        memcpy(l->s + l->n, w->s, w->n);
        l->n += w->n;
        l->s[l->n] = '\0';
    }
    return 0;
}

static void expect_words(const char *text, bool query, const char *want) {
    ibidi_words *w;
    listing l = {.n = 0, .s = ""};
    assert_ok(ibidi_words_open(&w));
    assert_int_equal(ibidi_words_each(w, text, strlen(text), query, list_word, &l), 0);
    assert_string_equal(l.s, want);
    ibidi_words_close(w);
}

static void test_words(void **state) {
    (void)state;
    expect_words("The running dogs", false, "the run dog");
    expect_words("X-15", false, "x15 x 15");
    expect_words("X15", false, "x15 x 15");
    expect_words("RFC7693, RFC-7693", false, "rfc7693 rfc 7693 rfc7693 rfc 7693");
    expect_words("192.168.0.1", false, "192.168.0.1 192 168 0 1");
    expect_words("1,000 and 1,2", false, "1000 and 1 2");
    expect_words("e-mail", false, "email e mail");
    expect_words("Watson's don't O\xE2\x80\x99"
                 "Brien",
                 false, "watson don't obrien o brien");
    expect_words("C++ C# c", false, "c c++ c c# c");
    expect_words("na\xC3\xAFve CAF\xC3\x89 cafe\xCC\x81", false, "naiv cafe cafe");
    expect_words("Stra\xC3\x9F"
                 "e",
                 false, "strass");
    expect_words("\xEF\xBC\xB2\xEF\xBC\xA6\xEF\xBC\xA3", false, "rfc"); /* full width */
    expect_words("\xE6\x9D\xB1\xE4\xBA\xAC\xE9\x83\xBD", false,
                 "\xE6\x9D\xB1 \xE6\x9D\xB1\xE4\xBA\xAC \xE4\xBA\xAC \xE4\xBA\xAC\xE9\x83\xBD "
                 "\xE9\x83\xBD");
    expect_words("\xE6\x9D\xB1\xE4\xBA\xAC\xE9\x83\xBD", true,
                 "\xE6\x9D\xB1\xE4\xBA\xAC \xE4\xBA\xAC\xE9\x83\xBD");
    expect_words("\xE4\xBA\xAC", true, "\xE4\xBA\xAC");
    expect_words("\xF0\x9F\x9A\x80 go \xF0\x9F\x91\x8D\xF0\x9F\x8F\xBD", false,
                 "\xF0\x9F\x9A\x80 go \xF0\x9F\x91\x8D");
    expect_words("\" OR ( * ^ NEAR", false, "or near");
    expect_words("\xFF\xFE"
                 "ok\xC3",
                 false, "ok");
    expect_words("", false, "");
    expect_words("foo_bar/baz", false, "foo_bar/baz foo bar baz");
}

/* Whatever the bytes, words stay within their bounds and inside the text. */
static int check_word(void *arg, const ibidi_word *w) {
    assert_true(w->n > 0 && w->n <= IBIDI_WORD_MAX);
    assert_true(w->start < w->end && w->end <= *(size_t *)arg);
    return 0;
}

static void test_words_random(void **state) {
    (void)state;
    uint64_t seed = 20240611;
    static const char *const bits[] = {"a",
                                       "Z",
                                       "9",
                                       "-",
                                       "'",
                                       ".",
                                       ",",
                                       "\xE6\x9D\xB1",
                                       "\xCC\x81",
                                       "\xC3",
                                       " ",
                                       "\xF0\x9F\x9A\x80",
                                       "\xE2\x80\x8D",
                                       "\xEA\xB0\x80",
                                       "\xE0\xB8\x81",
                                       "+",
                                       "#",
                                       "000"};
    ibidi_words *w;
    assert_ok(ibidi_words_open(&w));
    print_message("seed %llu\n", (unsigned long long)seed);
    for (int i = 0; i < 3000; i++) {
        char text[4096];
        size_t n = 0, parts = t_rnd(&seed) % (i % 100 == 0 ? 1000 : 40);
        for (size_t j = 0; j < parts; j++) {
            const char *b = bits[t_rnd(&seed) % (sizeof bits / sizeof *bits)];
            memcpy(text + n, b, strlen(b));
            n += strlen(b);
        }
        char *exact = malloc(n ? n : 1); /* its end is where a sanitizer watches */
        memcpy(exact, text, n);
        assert_int_equal(ibidi_words_each(w, exact, n, i & 1, check_word, &n), 0);
        free(exact);
    }
    ibidi_words_close(w);
}

/* ---- The index ---- */
static const char *const docs[][2] = {
    {"Lighthouses", "The keepers of the lighthouse were running out of oil."},
    {"Aircraft", "The X-15 flew at Mach 6 from Edwards."},
    {"Standards", "RFC7693 defines BLAKE2. Its address was 192.168.0.1 in the example."},
    {"\xE6\x9D\xB1\xE4\xBA\xAC",
     "\xE6\x9D\xB1\xE4\xBA\xAC\xE3\x81\xAF\xE6\x97\xA5\xE6\x9C\xAC\xE3\x81\xAE"
     "\xE9\xA6\x96\xE9\x83\xBD\xE3\x81\xA7\xE3\x81\x99"},
    {"Food", "A na\xC3\xAFve caf\xC3\xA9 owner served cr\xC3\xA8me br\xC3\xBBl\xC3\xA9"
             "e."},
    {"Launch", "Ready \xF0\x9F\x9A\x80 steady go, said C++ and \"OR\" quoted NEAR nobody."},
};
enum { N_DOCS = sizeof docs / sizeof *docs };

static void fill(ibidi_lexical *l, uint64_t generation) {
    assert_ok(ibidi_lexical_begin(l));
    for (size_t i = 0; i < N_DOCS; i++)
        assert_ok(ibidi_lexical_add(l, i + 1, i % 3, t_str(docs[i][0]), t_str(docs[i][1])));
    assert_ok(ibidi_lexical_commit(l, generation));
}

static uint64_t first_hit(ibidi_lexical *l, const char *question) {
    ibidi_lexical_hit *h;
    size_t n;
    bool all;
    assert_ok(ibidi_lexical_search(l, t_str(question), 10, &h, &n, &all));
    uint64_t document = n ? h[0].document : 0;
    for (size_t i = 0; i < n; i++) assert_true(h[i].score > 0);
    for (size_t i = 1; i < n; i++) assert_true(h[i - 1].score >= h[i].score);
    if (n) assert_int_equal(h[0].chunk, (document - 1) % 3);
    ibid_free(h);
    return document;
}

static void check_all(ibidi_lexical *l) {
    assert_int_equal(first_hit(l, "who keeps lighthouses?"), 1);
    assert_int_equal(first_hit(l, "run"), 1);
    assert_int_equal(first_hit(l, "x15"), 2);
    assert_int_equal(first_hit(l, "X-15"), 2);
    assert_int_equal(first_hit(l, "rfc 7693"), 3);
    assert_int_equal(first_hit(l, "192.168.0.1"), 3);
    assert_int_equal(first_hit(l, "\xE9\xA6\x96\xE9\x83\xBD"), 4);
    assert_int_equal(first_hit(l, "\xE9\x83\xBD"), 4); /* one character */
    assert_int_equal(first_hit(l, "naive creme brulee"), 5);
    assert_int_equal(first_hit(l, "CAFE"), 5);
    assert_int_equal(first_hit(l, "\xF0\x9F\x9A\x80"), 6);
    assert_int_equal(first_hit(l, "c++"), 6);
    assert_int_equal(first_hit(l, "6"), 2);
    assert_int_equal(first_hit(l, "food"), 5); /* title */
    assert_int_equal(first_hit(l, "of"), 1);   /* a function word alone is still a word */
    assert_int_equal(first_hit(l, "zebra"), 0);
    assert_int_equal(first_hit(l, "?"), 0);
    assert_int_equal(first_hit(l, ""), 0);
    static const char *const hostile[] = {"\"",
                                          "\"\"\"",
                                          "oil OR",
                                          "NOT oil",
                                          "NEAR(a b, 3)",
                                          "title:oil",
                                          "oil*",
                                          "^oil",
                                          "{title}: oil",
                                          "(((oil",
                                          "a AND",
                                          "-oil",
                                          "oil\" OR \"the",
                                          "'; DROP TABLE chunk; --",
                                          "\\",
                                          "+ + +"};
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        uint64_t d = first_hit(l, hostile[i]);
        if (strstr(hostile[i], "oil")) assert_int_equal(d, 1);
    }
}

typedef struct where {
    char dir[256], path[300], seal[320];
} where;

static void place(where *w) {
    t_dir(w->dir);
    snprintf(w->path, sizeof w->path, "%s/words.sqlite", w->dir);
    snprintf(w->seal, sizeof w->seal, "%s.seal", w->path);
}

static void test_index(void **state) {
    (void)state;
    where w;
    ibidi_lexical *l;
    uint64_t rows;
    double share;
    place(&w);
    assert_ok(ibidi_lexical_open(w.path, "1 c 5", &l));
    assert_int_equal(ibidi_lexical_generation(l), 0);
    fill(l, 7);
    check_all(l);
    assert_ok(ibidi_lexical_check(l));
    assert_ok(ibidi_lexical_share(l, t_str("Who is the keeper of a lighthouse zebra?"),
                                  t_str(docs[0][0]), t_str(docs[0][1]), &share));
    assert_true(share > 0.4 && share < 0.9);
    assert_ok(ibidi_lexical_share(l, t_str("zebra stripes"), t_str(docs[0][0]), t_str(docs[0][1]),
                                  &share));
    assert_true(share == 0);
    /* replaced and removed */
    assert_ok(ibidi_lexical_begin(l));
    assert_ok(ibidi_lexical_remove(l, 2));
    assert_ok(ibidi_lexical_remove(l, 1));
    assert_ok(ibidi_lexical_add(l, 1, 0, t_str("T"), t_str("nothing about lamps")));
    assert_ok(ibidi_lexical_commit(l, 8));
    assert_int_equal(first_hit(l, "x15"), 0);
    assert_int_equal(first_hit(l, "keepers oil"), 0);
    assert_int_equal(first_hit(l, "lamp"), 1);
    assert_ok(ibidi_lexical_rows(l, &rows));
    assert_int_equal(rows, N_DOCS - 1);
    assert_ok(ibidi_lexical_document_rows(l, 2, &rows));
    assert_int_equal(rows, 0);
    /* rolled back */
    assert_ok(ibidi_lexical_begin(l));
    assert_ok(ibidi_lexical_remove(l, 1));
    ibidi_lexical_rollback(l);
    assert_int_equal(first_hit(l, "lamp"), 1);
    ibidi_lexical_close(l);
    assert_ok(ibidi_lexical_open(w.path, "1 c 5", &l));
    assert_int_equal(ibidi_lexical_generation(l), 8);
    assert_int_equal(first_hit(l, "lamp"), 1);
    ibidi_lexical_close(l);
    t_drop(w.dir);
}

/* Every kind of damage: the file is given up, starts empty, and works when filled again. */
static void damage(const where *w, int how) {
    char wal[320];
    FILE *f;
    snprintf(wal, sizeof wal, "%s-wal", w->path);
    switch (how) {
    case 0:
        t_truncate(w->path, 0.5);
        break;
    case 1:
        t_truncate(w->path, 0.001);
        break;
    case 2:
        t_flip(w->path, 3);
        break;
    case 3:
        t_flip(w->path, -700);
        break;
    case 4:
        t_flip(w->path, 6000);
        break;
    case 5: /* an unsealed file, cut */
        unlink(w->seal);
        t_truncate(w->path, 0.6);
        break;
    case 6:
        f = fopen(w->path, "wb");
        assert_non_null(f);
        for (int i = 0; i < 9000; i++) fputc(i * 7 & 255, f);
        fclose(f);
        unlink(w->seal);
        break;
    case 7:
        f = fopen(w->seal, "wb");
        assert_non_null(f);
        fputs("ibid-seal 1 12 ff\n", f);
        fclose(f);
        break;
    default:
        t_truncate(w->path, 0); /* an empty file is no database of ours */
    }
}

static void test_damage(void **state) {
    (void)state;
    for (int how = 0; how < 9; how++) {
        where w;
        ibidi_lexical *l;
        place(&w);
        assert_ok(ibidi_lexical_open(w.path, "1 c 5", &l));
        fill(l, 7);
        ibidi_lexical_close(l);
        assert_int_equal(access(w.seal, F_OK), 0);
        damage(&w, how);
        assert_ok(ibidi_lexical_open(w.path, "1 c 5", &l));
        assert_int_equal(ibidi_lexical_generation(l), 0);
        fill(l, 9);
        check_all(l);
        ibidi_lexical_close(l);
        t_drop(w.dir);
    }
}

static void test_identity(void **state) {
    (void)state;
    where w;
    ibidi_lexical *l, *second;
    place(&w);
    assert_ok(ibidi_lexical_open(w.path, "1 c 5", &l));
    fill(l, 7);
    ibidi_lexical_close(l);
    assert_ok(ibidi_lexical_open(w.path, "1 c 6", &l)); /* the collection was made anew */
    assert_int_equal(ibidi_lexical_generation(l), 0);
    assert_int_equal(first_hit(l, "oil"), 0);
    fill(l, 3);
    assert_err(ibidi_lexical_open(w.path, "1 c 6", &second), IBID_BUSY);
    check_all(l);
    ibidi_lexical_close(l);
    t_drop(w.dir);
}

/* A process that dies between begin and commit, or after commit without closing. */
static void test_crash(void **state) {
    (void)state;
    for (int committed = 0; committed < 2; committed++) {
        where w;
        ibidi_lexical *l;
        place(&w);
        assert_ok(ibidi_lexical_open(w.path, "1 c 5", &l));
        fill(l, 7);
        ibidi_lexical_close(l);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            if (ibidi_lexical_open(w.path, "1 c 5", &l) || ibidi_lexical_begin(l) ||
                ibidi_lexical_remove(l, 1) || (committed && ibidi_lexical_commit(l, 8)))
                _exit(1);
            _exit(0);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_int_equal(status, 0);
        assert_ok(ibidi_lexical_open(w.path, "1 c 5", &l));
        assert_int_equal(ibidi_lexical_generation(l), committed ? 8 : 7);
        assert_int_equal(first_hit(l, "oil"), committed ? 0 : 1);
        assert_ok(ibidi_lexical_check(l));
        ibidi_lexical_close(l);
        t_drop(w.dir);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_words),    cmocka_unit_test(test_words_random),
        cmocka_unit_test(test_index),    cmocka_unit_test(test_damage),
        cmocka_unit_test(test_identity), cmocka_unit_test(test_crash),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
