#include "attention/plan/citation.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static ibid_cite_block block(const char *text) {
    return (ibid_cite_block){.text = text, .n_text = strlen(text)};
}

static size_t choose(const char *answer, const char *question, const ibid_cite_block *b, size_t n,
                     size_t quotes, size_t bytes, ibid_cite *out) {
    ibid_cite_options o = {quotes, bytes};
    size_t n_out = 99;
    assert_int_equal(
        ibid_cite_choose(answer, strlen(answer), question, strlen(question), b, n, &o, out, &n_out),
        IBID_OK);
    return n_out;
}

static bool quote_is(const ibid_cite_block *b, const ibid_cite *c, const char *text) {
    return c->end - c->start == strlen(text) &&
           memcmp(b[c->block].text + c->start, text, strlen(text)) == 0;
}

static void test_best_sentence(void **state) {
    (void)state;
    ibid_cite_block b[] = {
        block("The mill was old. It burned in 1804. Nobody was hurt."),
        block("The tower was built by Ada Quill in 1871. It is 31 metres tall. The sea is near."),
    };
    ibid_cite out[3];
    assert_int_equal(choose("It is 31 metres tall.", "How tall is the tower?", b, 2, 3, 300, out),
                     1);
    assert_int_equal(out[0].block, 1);
    assert_true(quote_is(b, &out[0], "It is 31 metres tall."));
    assert_int_equal(choose("Ada Quill", "Who built the tower?", b, 2, 3, 300, out), 1);
    assert_true(quote_is(b, &out[0], "The tower was built by Ada Quill in 1871."));
    /* Two facts, two places. */
    assert_int_equal(
        choose("Ada Quill built it; the mill burned in 1804", "What happened?", b, 2, 3, 300, out),
        2);
    assert_true(out[0].weight >= out[1].weight);
    assert_int_equal(
        choose("Ada Quill built it; the mill burned in 1804", "What happened?", b, 2, 1, 300, out),
        1);
}

static void test_nothing(void **state) {
    (void)state;
    ibid_cite_block b[] = {block("One sentence about herons."), block("")};
    ibid_cite out[3];
    assert_int_equal(choose("", "Q?", b, 2, 3, 300, out), 0);
    assert_int_equal(choose("...", "Q?", b, 2, 3, 300, out), 0);
    assert_int_equal(choose("completely different words", "Q?", b, 2, 3, 300, out), 0);
    assert_int_equal(choose("herons", "Q?", b, 0, 3, 300, out), 0);
}

/* Attention decides between two sentences that share the answer's words equally. */
static void test_attention(void **state) {
    (void)state;
    const char *text = "In May the gate was red. In June the gate was red.";
    uint64_t ends[] = {24, 50};
    float first[] = {0.9f, 0.1f}, second[] = {0.1f, 0.9f};
    ibid_cite_block b = block(text);
    ibid_cite out[3];
    b.n_tokens = 2;
    b.ends = ends;
    b.mass = first;
    assert_int_equal(choose("red", "Which colour?", &b, 1, 3, 300, out), 1);
    assert_int_equal(out[0].start, 0);
    b.mass = second;
    assert_int_equal(choose("red", "Which colour?", &b, 1, 3, 300, out), 1);
    assert_int_equal(out[0].start, 25);
}

static void test_long_sentence_is_cut(void **state) {
    (void)state;
    char text[2000] = "";
    for (int i = 0; i < 60; i++) strcat(text, "caf\xC3\xA9 na\xC3\xAFve ");
    strcat(text, "the password was swordfish and ");
    for (int i = 0; i < 40; i++) strcat(text, "\xE6\x97\xA5\xE6\x9C\xAC\xE8\xAA\x9E ");
    ibid_cite_block b = block(text);
    ibid_cite out[3];
    for (size_t limit = 10; limit < 300; limit += 7) {
        assert_int_equal(choose("swordfish", "What was the password?", &b, 1, 1, limit, out), 1);
        assert_true(out[0].end - out[0].start <= limit);
        assert_true((text[out[0].start] & 0xC0) != 0x80 && (text[out[0].end] & 0xC0) != 0x80);
        char quote[400] = "";
        memcpy(quote, text + out[0].start, out[0].end - out[0].start);
        assert_non_null(strstr(quote, "swordfish"));
    }
}

static void test_sentence_ends(void **state) {
    (void)state;
    const char *t = "J. R. Smith paid 3.5 crowns. He said \"no.\" Then\nleft\n\nHeading";
    size_t a = ibid_sentence_end(t, strlen(t), 0);
    assert_int_equal(a, strlen("J. R. Smith paid 3.5 crowns."));
    size_t b = ibid_sentence_end(t, strlen(t), a + 1);
    assert_memory_equal(t + b - 5, "\"no.\"" + 0, 5);
    size_t c = ibid_sentence_end(t, strlen(t), b + 1);
    assert_memory_equal(t + c - 4, "left", 4);
    assert_int_equal(ibid_sentence_end(t, strlen(t), c + 2), strlen(t));
}

/* Random texts and answers: quotes always lie inside, on character boundaries, within the limits.
 */
static void test_random(void **state) {
    (void)state;
    static const char *const piece[] = {
        "a", " ", ". ", "\n\n", "\xC3\xA9", "tower", "31", "\xF0\x9F\x98\x80", "? ", "Wren ", "\""};
    unsigned seed = 20260101;
    printf("seed %u\n", seed);
    for (int round = 0; round < 2000; round++) {
        char text[2][600] = {"", ""}, answer[200] = "";
        for (int t = 0; t < 2; t++)
            for (int i = rand_r(&seed) % 100; i > 0; i--)
                strcat(text[t], piece[(size_t)rand_r(&seed) % 11]);
        for (int i = rand_r(&seed) % 20; i > 0; i--)
            strcat(answer, piece[(size_t)rand_r(&seed) % 11]);
        ibid_cite_block b[] = {block(text[0]), block(text[1])};
        ibid_cite out[3];
        size_t limit = 5 + (size_t)rand_r(&seed) % 60,
               n = choose(answer, "tower", b, 2, 3, limit, out);
        assert_true(n <= 3);
        for (size_t i = 0; i < n; i++) {
            const ibid_cite_block *x = &b[out[i].block];
            assert_true(out[i].start < out[i].end && out[i].end <= x->n_text);
            assert_true(out[i].end - out[i].start <= limit);
            assert_true((x->text[out[i].start] & 0xC0) != 0x80);
            assert_true(out[i].end == x->n_text || (x->text[out[i].end] & 0xC0) != 0x80);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_best_sentence), cmocka_unit_test(test_nothing),
        cmocka_unit_test(test_attention),     cmocka_unit_test(test_long_sentence_is_cut),
        cmocka_unit_test(test_sentence_ends), cmocka_unit_test(test_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
