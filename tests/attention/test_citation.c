/* Citations from given texts, tokens and masses; whole characters; answers that loop. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "attention/plan/answer.h"
#include "attention/plan/citation.h"

#include <stdlib.h>
#include <string.h>

static ibid_str str(const char *s) {
    return (ibid_str){s, strlen(s)};
}

static ibid_cite_block whole(const char *text) {
    return (ibid_cite_block){.text = str(text), .end = strlen(text)};
}

static size_t find(const char *answer, const char *question, const ibid_cite_block *b, size_t n,
                   size_t bytes, ibid_cite *out) {
    size_t n_out = 0;
    assert_int_equal(ibid_cite_find(str(answer), str(question), b, n, 3, bytes, out, &n_out),
                     IBID_OK);
    for (size_t i = 0; i < n_out; i++) {
        const ibid_cite_block *at = &b[out[i].block];
        assert_true(out[i].start >= at->start && out[i].end <= at->end);
        assert_true(out[i].start < out[i].end && out[i].end - out[i].start <= bytes);
        assert_true((at->text.s[out[i].start] & 0xC0) != 0x80);
        assert_true(out[i].end == at->text.n || (at->text.s[out[i].end] & 0xC0) != 0x80);
    }
    return n_out;
}

static void assert_quote(const ibid_cite_block *b, const ibid_cite *c, const char *want) {
    assert_int_equal(c->end - c->start, strlen(want));
    assert_memory_equal(b[c->block].text.s + c->start, want, strlen(want));
}

static const char *const mill =
    "The mill stood by Dr. J. Barnes' house. It was built in 1846 by two "
    "brothers.  Nobody lives there now! \"Sold,\" says a sign.\n\nA new "
    "paragraph about flour";

static void sentence(void **state) {
    ibid_cite c[3];
    ibid_cite_block b[] = {whole("Cats sleep a lot. Dogs do not."), whole(mill)};
    (void)state;
    assert_int_equal(find("In 1846.", "When was the mill built?", b, 2, 300, c), 1);
    assert_int_equal(c[0].block, 1);
    assert_quote(b, c, "It was built in 1846 by two brothers.");
    assert_true(find("The mill stood by the house of Barnes", "Where?", b, 2, 300, c) >= 1);
    assert_quote(b, c, "The mill stood by Dr. J. Barnes' house.");
    assert_true(find("FLOUR is in a new paragraph", "What?", b, 2, 300, c) >= 1);
    assert_quote(b, c, "A new paragraph about flour");
}

static void nothing(void **state) {
    ibid_cite c[3];
    ibid_cite_block b[] = {whole(mill)};
    (void)state;
    assert_int_equal(find("", "When?", b, 1, 300, c), 0);
    assert_int_equal(find("Zebras graze quietly", "When?", b, 1, 300, c), 0);
    assert_int_equal(find("1846", "When?", b, 0, 300, c), 0);
}

/* The chunk's bounds hold even where a sentence goes on. */
static void bounds(void **state) {
    ibid_cite c[3];
    ibid_cite_block b = whole(mill);
    (void)state;
    b.start = 47; /* inside the sentence about 1846 */
    b.end = 70;
    assert_int_equal(find("built in 1846", "When?", &b, 1, 300, c), 1);
    assert_true(c[0].start >= 47 && c[0].end <= 70);
}

static void long_sentence(void **state) {
    ibid_cite c[3];
    char text[4096] = "";
    (void)state;
    for (int i = 0; i < 100; i++) strcat(text, "caf\xC3\xA9 na\xC3\xAFve \xE2\x80\x94 ");
    strcat(text, "the treasure lies under the oak ");
    for (int i = 0; i < 100; i++) strcat(text, "\xC3\xA9t\xC3\xA9 \xE4\xB8\xAD ");
    ibid_cite_block b = whole(text);
    assert_int_equal(find("The treasure lies under the oak", "Where?", &b, 1, 120, c), 1);
    char quote[121] = "";
    memcpy(quote, text + c[0].start, c[0].end - c[0].start);
    assert_non_null(strstr(quote, "treasure lies under the oak"));
    for (size_t bytes = 1; bytes < 40; bytes++)
        (void)find("The treasure lies under the oak", "Where?", &b, 1, bytes, c);
}

/* Where words do not decide, attention does. */
static void mass(void **state) {
    ibid_cite c[3];
    const char *text = "Blue is cold. Blue is calm.";
    ibid_cite_block b = whole(text);
    uint64_t ends[] = {13, 27};
    float m[] = {0.1f, 0.9f};
    (void)state;
    b.token_ends = ends;
    b.mass = m;
    b.n_tokens = 2;
    assert_int_equal(find("Blue.", "Which?", &b, 1, 300, c), 1);
    assert_quote(&b, c, "Blue is calm.");
    m[0] = 2;
    assert_int_equal(find("Blue.", "Which?", &b, 1, 300, c), 1);
    assert_quote(&b, c, "Blue is cold.");
}

static void two_sources(void **state) {
    ibid_cite c[3];
    ibid_cite_block b[] = {whole("Ada wrote the notes in Paris. It rained."),
                           whole("Brun printed a map in Lisbon. It was dry.")};
    (void)state;
    assert_int_equal(find("Ada wrote the notes, and Brun printed a map.", "Who?", b, 2, 300, c), 2);
    assert_int_not_equal(c[0].block, c[1].block);
}

static void token_ends(void **state) {
    const char *text = "xx caf\xC3\xA9\x01 au lait";
    ibid_str pieces[] = {{"caf\xC3", 4}, {"\xA9", 1}, {" au", 3}, {" lait", 5}};
    uint64_t ends[4];
    (void)state;
    ibid_cite_token_ends(str(text), 3, strlen(text), pieces, 4, ends);
    assert_int_equal(ends[0], 7);
    assert_int_equal(ends[1], 8);
    assert_int_equal(ends[2], 12); /* past the byte that has no token */
    assert_int_equal(ends[3], strlen(text));
}

/* Random texts, answers made of pieces of them: bounds and characters hold (checked in find). */
static void random_texts(void **state) {
    static const char *const bits[] = {
        "a",     " ",  ".",    "\n",        "1846",         "\xC3\xA9", "\xF0\x9F\x98\x80",
        "word ", "! ", "\xFF", "The end. ", "\xE4\xB8\xAD", "\"",       ")"};
    uint64_t seed = 20240601;
    ibid_cite c[3];
    (void)state;
    print_message("seed %llu\n", (unsigned long long)seed);
    for (int round = 0; round < 3000; round++) {
        char text[600] = "", answer[200] = "";
        for (int i = 0; i < 60; i++) {
            seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
            const char *bit = bits[(seed >> 33) % 14];
            strcat(text, bit);
            if ((seed >> 50) % 5 == 0) strcat(answer, bit);
        }
        ibid_cite_block b = whole(text);
        /* A chunk starts and ends at characters. */
        (void)find(answer, "word", &b, 1, 1 + (seed >> 40) % 60, c);
    }
}

static void characters(void **state) {
    const char *text = "  caf\xC3\xA9 \xE4\xB8\xAD\xFFx  ";
    ibid_utf8_stream s;
    ibid_buf out;
    (void)state;
    ibid_utf8_stream_init(&s);
    ibid_buf_init(&out, 1000);
    for (size_t i = 0; text[i]; i++) {
        assert_int_equal(ibid_utf8_stream_put(&s, text + i, 1, false, &out), IBID_OK);
        assert_true(out.len == 0 || (unsigned char)out.data[out.len - 1] != 0xC3);
    }
    assert_int_equal(ibid_utf8_stream_put(&s, "\xE4\xB8", 2, true, &out), IBID_OK);
    assert_string_equal(out.data, "caf\xC3\xA9 \xE4\xB8\xAD\xEF\xBF\xBDx  \xEF\xBF\xBD");
    ibid_buf_fini(&out);
    ibid_utf8_stream_fini(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sentence),   cmocka_unit_test(nothing),
        cmocka_unit_test(bounds),     cmocka_unit_test(long_sentence),
        cmocka_unit_test(mass),       cmocka_unit_test(two_sources),
        cmocka_unit_test(token_ends), cmocka_unit_test(random_texts),
        cmocka_unit_test(characters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : 0;
}
