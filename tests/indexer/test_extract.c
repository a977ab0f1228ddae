/* Extractors and normalisation, in process: tricky samples of every format, damaged bytes, and
 * every allocation failing once. */
#include "tests/indexer/collect.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <utf8proc.h>

static struct collected *extract_n(ibid_format f, const char *name, const void *p, size_t n) {
    ibid_extract_sink sink;
    struct collected *c = collect_open(&sink);
    /* Exactly n bytes, so that a sanitizer sees the first byte read past them. */
    char *copy = malloc(n ? n : 1);
    assert_non_null(copy);
    memcpy(copy, p, n);
    assert_int_equal(ibid_extract(f, name, copy, n, &sink), IBID_OK);
    assert_false(c->inside);
    free(copy);
    return c;
}

static struct collected *extract(ibid_format f, const char *name, const char *text) {
    return extract_n(f, name, text, strlen(text));
}

static void is_text(struct collected *c, const char *text) {
    assert_int_equal(c->n, 1);
    assert_string_equal(c->docs[0].text.data, text);
}

/* ---- Normalisation ---- */

static void normalises(void **state) {
    (void)state;
    struct collected *c = extract(IBID_FORMAT_TEXT, "a.txt",
                                  "\xEF\xBB\xBF\n\n  one  \r\ntwo\t \rthree\n\n\n\nfour\x07"
                                  "\xC2\xAD\xC2\xA0"
                                  "five\xE2\x80\xA8six   \n \n");
    is_text(c, "one\ntwo\nthree\n\nfour five\nsix");
    collect_close(c);
    /* e + combining acute, Hangul jamo, a compatibility singleton. */
    c = extract(IBID_FORMAT_TEXT, "a.txt", "e\xCC\x81 \xE1\x84\x80\xE1\x85\xA1 \xE2\x84\xAB");
    is_text(c, "\xC3\xA9 \xEA\xB0\x80 \xC3\x85");
    collect_close(c);
}

static void composes_across_pieces(void **state) {
    (void)state;
    /* The mark lies on either side of every possible cut of the carry and of the decoder's pieces.
     */
    for (size_t at = 8180; at < 8200; at++) {
        char *text = malloc(40000);
        assert_non_null(text);
        memset(text, 'x', 40000);
        memcpy(text + at, "e\xCC\x81", 3);
        memcpy(text + 4 * at - 30, "o\xCC\x88", 3);
        struct collected *c = extract_n(IBID_FORMAT_TEXT, "a.txt", text, 40000);
        assert_int_equal(c->docs[0].text.len, 40000 - 2);
        assert_memory_equal(c->docs[0].text.data + at, "\xC3\xA9", 2);
        collect_close(c);
        free(text);
    }
}

/* Random text in pieces: the result must be what utf8proc makes of the whole, and already normal.
 */
static void random_text_is_nfc(void **state) {
    (void)state;
    static const uint32_t pick[] = {'a',    'e',    'o',    ' ',    '\n',   0x301,
                                    0x308,  0x323,  0x1100, 0x1161, 0x11A8, 0xAC00,
                                    0x3042, 0x3099, 0x4E00, 0x915,  0x93C,  0x212B};
    uint64_t seed = 20260101;
    printf("seed %llu\n", (unsigned long long)seed);
    for (int round = 0; round < 200; round++) {
        char text[6000];
        size_t n = 0;
        while (n < 5900) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            n += ibidi_xt_utf8_put(pick[(seed >> 33) % (sizeof pick / sizeof *pick)], text + n);
        }
        struct collected *c = extract_n(IBID_FORMAT_TEXT, "a.txt", text, n);
        ibid_str got = {c->docs[0].text.data, c->docs[0].text.len};
        utf8proc_uint8_t *again = NULL;
        utf8proc_ssize_t len =
            utf8proc_map((const utf8proc_uint8_t *)got.s, (utf8proc_ssize_t)got.n, &again,
                         (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
        assert_int_equal(len, got.n);
        assert_memory_equal(again, got.s, got.n);
        free(again);
        collect_close(c);
    }
}

static void character_sets(void **state) {
    (void)state;
    struct collected *c = extract_n(IBID_FORMAT_TEXT, "a.txt", "\xFF\xFEH\0i\0\x3D\xD8\0\xDE", 10);
    is_text(c, "Hi\xF0\x9F\x98\x80");
    assert_int_equal(c->docs[0].state, IBID_DOC_READY);
    collect_close(c);
    c = extract_n(IBID_FORMAT_TEXT, "a.txt", "\xFE\xFF\0H\0i\xD8\x3D", 8); /* ends in half a pair */
    is_text(c, "Hi\xEF\xBF\xBD");
    collect_close(c);
    c = extract(IBID_FORMAT_TEXT, "a.txt", "caf\xE9 \x93quoted\x94 \x80");
    is_text(c, "caf\xC3\xA9 \xE2\x80\x9Cquoted\xE2\x80\x9D \xE2\x82\xAC");
    assert_int_equal(c->docs[0].state, IBID_DOC_PARTIAL);
    assert_non_null(strstr(c->docs[0].reason, "Windows-1252"));
    collect_close(c);
    c = extract(IBID_FORMAT_TEXT, "a.txt", "\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9 \xED\xA0\x80 ok");
    assert_int_equal(c->docs[0].state, IBID_DOC_PARTIAL);
    collect_close(c);
    c = extract(IBID_FORMAT_TEXT, "a.txt",
                "\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9 \xC3 \xC3\xA9\xC3\xA9 ok");
    is_text(c, "\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9\xC3\xA9 \xEF\xBF\xBD \xC3\xA9\xC3\xA9 ok");
    assert_non_null(strstr(c->docs[0].reason, "byte 11"));
    collect_close(c);
    c = extract_n(IBID_FORMAT_TEXT, "a.txt", "text\0more", 9);
    assert_int_equal(c->docs[0].state, IBID_DOC_UNSUPPORTED);
    assert_int_equal(c->docs[0].text.len, 0);
    collect_close(c);
    c = extract_n(IBID_FORMAT_HTML, "a.html", "\x01\x02\x03\x04<p>\x05\x06", 9);
    assert_int_equal(c->docs[0].state, IBID_DOC_UNSUPPORTED);
    collect_close(c);
}

static void empty_files(void **state) {
    (void)state;
    static const ibid_format all[] = {IBID_FORMAT_TEXT, IBID_FORMAT_MARKDOWN, IBID_FORMAT_HTML,
                                      IBID_FORMAT_JSONL};
    static const char *const contents[] = {"", " \n\t\r\n ", "\xEF\xBB\xBF"};
    for (size_t f = 0; f < 4; f++)
        for (size_t i = 0; i < 3; i++) {
            struct collected *c = extract(all[f], "some name.md", contents[i]);
            if (all[f] == IBID_FORMAT_JSONL && i == 1) {
                collect_close(c); /* blank lines with a tab: a bad line, reported */
                continue;
            }
            assert_int_equal(c->n, 1);
            assert_int_equal(c->docs[0].state, IBID_DOC_EMPTY);
            assert_string_equal(c->docs[0].title.data, "some name");
            collect_close(c);
        }
}

/* ---- Text ---- */

static void text_titles(void **state) {
    (void)state;
    static const struct {
        const char *text, *title;
    } cases[] = {{"The Whale\n\nCall me.", "The Whale"},
                 {"\n\nThe Whale  \r\n\r\nCall me.", "The Whale"},
                 {"This is a sentence.\n\nMore", "report v2.1"},
                 {"no blank line\nafter it", "report v2.1"},
                 {"12345\n\nno letters", "report v2.1"},
                 {"only line", "report v2.1"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct collected *c = extract(IBID_FORMAT_TEXT, "report v2.1.txt", cases[i].text);
        assert_string_equal(c->docs[0].title.data, cases[i].title);
        collect_close(c);
    }
}

static void text_locators(void **state) {
    (void)state;
    ibid_buf b;
    ibid_buf_init(&b, 1 << 20);
    for (int i = 1; i <= 100; i++)
        assert_int_equal(ibid_buf_printf(&b, "This is line number %04d of the file here\r\n", i),
                         IBID_OK);
    struct collected *c = extract(IBID_FORMAT_TEXT, "a.txt", b.data);
    assert_in_range(c->docs[0].n_locators, 7, 10);
    /* Each locator's number is that of the line at its offset. */
    unsigned long at;
    int line, read;
    for (const char *p = c->docs[0].locators.data;
         sscanf(p, "%lu line %d\n%n", &at, &line, &read) == 2; p += read) {
        char want[64];
        (void)snprintf(want, sizeof want, "This is line number %04d", line);
        assert_memory_equal(c->docs[0].text.data + at, want, strlen(want));
    }
    collect_close(c);
    ibid_buf_fini(&b);
}

static void huge_line(void **state) {
    (void)state;
    size_t n = 5000000;
    char *text = malloc(n);
    assert_non_null(text);
    memset(text, ' ', n);
    text[0] = 'a';
    text[n - 1] = 'b';
    struct collected *c = extract_n(IBID_FORMAT_TEXT, "a.txt", text, n);
    assert_int_equal(c->docs[0].text.len, 1026); /* a run of spaces is at most 1024 long */
    collect_close(c);
    for (size_t i = 0; i + 2 <= n; i += 2) memcpy(text + i, "\xCC\x81", 2); /* marks only */
    c = extract_n(IBID_FORMAT_TEXT, "a.txt", text, 200000);
    assert_int_equal(c->docs[0].text.len, 200000);
    collect_close(c);
    free(text);
}

/* ---- Markdown ---- */

static void markdown_structure(void **state) {
    (void)state;
    struct collected *c =
        extract(IBID_FORMAT_MARKDOWN, "a.md",
                "---\ntitle: \"Front\"\n---\n"
                "## Sub *first* &amp; more\n"
                "Intro `code` [link](http://x) ![alt](i.png)\nsoft\\\nhard &copy;&#x41;&bogus;\n"
                "# Main\n"
                "- one\n- two\n  - deep\n    1. x\n    2. y\n- three\n\n"
                "3. p\n\n   q\n4. r\n\n"
                "| A | B |\n|---|---|\n| 1 | 2 |\n\n"
                "```c\nint f(void) {\n    return 0;\n}\n```\n"
                "> quote\n> more\n\n"
                "<div>Hi <b>bold</b><script>bad()</script><!-- - > c --> end</div>\n\n"
                "after <span>inline</span>\n");
    assert_string_equal(c->docs[0].title.data, "Main");
    is_text(c, "Sub first & more\n\nIntro code link alt soft\nhard \xC2\xA9"
               "A&bogus;\n\nMain\n\n"
               "- one\n- two\n  - deep\n    1. x\n    2. y\n- three\n\n3. p\n\n  q\n\n4. r\n\n"
               "A | B\n1 | 2\n\nint f(void) {\n    return 0;\n}\n\nquote more\n\nHi bold end\n\n"
               "after inline");
    assert_string_equal(c->docs[0].locators.data, "0 # Sub first & more\n60 # Main\n");
    collect_close(c);
}

static void markdown_deep(void **state) {
    (void)state;
    ibid_buf b;
    ibid_buf_init(&b, 1 << 20);
    for (int i = 0; i < 5000; i++) assert_int_equal(ibid_buf_puts(&b, "> "), IBID_OK);
    assert_int_equal(ibid_buf_puts(&b, "end\n\n"), IBID_OK);
    for (int i = 0; i < 200; i++)
        assert_int_equal(ibid_buf_printf(&b, "%*s- item %d\n", 2 * i, "", i), IBID_OK);
    struct collected *c = extract(IBID_FORMAT_MARKDOWN, "a.md", b.data);
    assert_non_null(strstr(c->docs[0].text.data, "end"));
    assert_non_null(strstr(c->docs[0].text.data, "item 199"));
    collect_close(c);
    ibid_buf_fini(&b);
}

/* ---- HTML ---- */

static void html_structure(void **state) {
    (void)state;
    struct collected *c = extract(
        IBID_FORMAT_HTML, "a.html",
        "<!doctype html><title>The &eacute;&nbsp;title</title><style>x{}</style>"
        "<h1>Head\n  one</h1><p>Para <b>bold</b> &lt;tag&gt; &amp;  x<br>next<img alt='a cat'>"
        "<ul><li>one<li>two<ul><li>deep</ul><li>three</ul><ol><li>a</li><li><p>b</p></li></ol>"
        "<table><tr><th>A<th>B<tr><td>1<td>2</table><pre>\n code\n   here\n</pre>"
        "<h2>Sub</h2><p>unclosed <i>broken <p>next</div></span><script>alert(1)</script>"
        "<noscript>no</noscript><svg><text>no</text></svg>");
    assert_string_equal(c->docs[0].title.data, "The \xC3\xA9 title");
    is_text(c, "Head one\n\nPara bold <tag> & x\nnexta cat\n\n- one\n- two\n  - deep\n- three\n\n"
               "1. a\n2. b\n\nA | B\n1 | 2\n\n code\n   here\n\nSub\n\nunclosed broken\n\nnext");
    assert_non_null(strstr(c->docs[0].locators.data, "0 # Head one\n"));
    assert_non_null(strstr(c->docs[0].locators.data, " # Head one > Sub\n"));
    collect_close(c);
    c = extract(IBID_FORMAT_HTML, "page.html", "<p>no title <b>at</b> all");
    assert_string_equal(c->docs[0].title.data, "page");
    collect_close(c);
}

static void html_deep(void **state) {
    (void)state;
    static const char *const tags[] = {"<div>", "<b>", "<ul><li>", "<table><tr><td>", "<pre>"};
    for (size_t t = 0; t < 5; t++) {
        ibid_buf b;
        ibid_buf_init(&b, 1 << 20);
        for (int i = 0; i < 5000; i++) assert_int_equal(ibid_buf_puts(&b, tags[t]), IBID_OK);
        assert_int_equal(ibid_buf_puts(&b, "core"), IBID_OK);
        struct collected *c = extract(IBID_FORMAT_HTML, "a.html", b.data);
        assert_non_null(strstr(c->docs[0].text.data, "core"));
        collect_close(c);
        ibid_buf_fini(&b);
    }
}

/* ---- JSONL ---- */

static void jsonl_lines(void **state) {
    (void)state;
    struct collected *c = extract(
        IBID_FORMAT_JSONL, "a.jsonl",
        "{\"id\":\"a\",\"title\":\"T\\nx\",\"text\":\"one  \\r\\ntwo\","
        "\"metadata\":{\"b\":1,\"a\":\"x\"}}\r\n"
        "\nnot json\n{\"id\":7,\"text\":\"\"}\n{\"id\":\"c\"}\n[1]\n"
        "{\"id\":\"\",\"text\":\"x\"}\n{\"id\":\"n\",\"text\":\"a\\u0000b\"}\n"
        "{\"id\":\"t\",\"title\":3,\"text\":\"x\"}\n{\"id\":\"m\",\"metadata\":[],\"text\":\"x\"}\n"
        "{\"id\":\"z\",\"text\":\"last\",\"title\":null}");
    assert_int_equal(c->n, 3);
    assert_string_equal(c->docs[0].id.data, "a");
    assert_string_equal(c->docs[0].title.data, "T x");
    assert_string_equal(c->docs[0].text.data, "one\ntwo");
    assert_string_equal(c->docs[0].metadata.data, "{\"a\":\"x\",\"b\":1}");
    assert_string_equal(c->docs[0].locators.data, "0 line 1\n");
    assert_string_equal(c->docs[1].id.data, "7");
    assert_int_equal(c->docs[1].state, IBID_DOC_EMPTY);
    assert_string_equal(c->docs[2].id.data, "z");
    assert_string_equal(c->docs[2].locators.data, "0 line 11\n");
    static const char *const notes[] = {
        "3 not JSON", "5 it has no \"text\"", "6 not a JSON object", "7 its \"id\" is empty",
        "8 not JSON", "9 \"title\"",          "10 \"metadata\""};
    const char *p = c->notes.data;
    for (size_t i = 0; i < 7; i++) {
        assert_non_null(p);
        p = strstr(p, notes[i]);
        assert_non_null(p);
    }
    collect_close(c);
}

/* ---- Names, and no memory ---- */

static void formats_by_name(void **state) {
    (void)state;
    assert_int_equal(ibid_format_of("A.TXT"), IBID_FORMAT_TEXT);
    assert_int_equal(ibid_format_of("x.tar.Html"), IBID_FORMAT_HTML);
    assert_int_equal(ibid_format_of("x.pdf"), IBID_FORMAT_PDF);
    assert_int_equal(ibid_format_of("pdf"), IBID_FORMAT_NONE);
    assert_int_equal(ibid_format_of("x.png"), IBID_FORMAT_NONE);
}

static ibid_err quiet_begin(void *a, ibid_str b, ibid_str c, ibid_str d) {
    return (void)a, (void)b, (void)c, (void)d, IBID_OK;
}
static ibid_err quiet_str(void *a, ibid_str b) {
    return (void)a, (void)b, IBID_OK;
}
static ibid_err quiet_end(void *a, ibid_doc_state s, const char *r) {
    return (void)a, (void)s, (void)r, IBID_OK;
}
static ibid_err quiet_note(void *a, uint64_t l, ibid_str b, const char *r) {
    return (void)a, (void)l, (void)b, (void)r, IBID_OK;
}

static void every_allocation_fails_once(void **state) {
    (void)state;
    const ibid_extract_sink sink = {NULL, quiet_begin, quiet_str, quiet_str, quiet_end, quiet_note};
    static const struct {
        ibid_format f;
        const char *text;
    } cases[] = {{IBID_FORMAT_TEXT, "Title\n\ncaf\xE9 e\xCC\x81"},
                 {IBID_FORMAT_MARKDOWN, "# A &copy;\n\n- x\n\n## B\n\ntext"},
                 {IBID_FORMAT_HTML, "<title>x</title><h1>A</h1><h2>B</h2><ul><li>c</ul>"},
                 {IBID_FORMAT_JSONL, "{\"id\":\"a\",\"title\":\"t\",\"text\":\"b\"}"}};
    for (size_t i = 0; i < 4; i++) {
        size_t failed = 0;
        for (uint64_t nth = 1;; nth++) {
            ibid_alloc_fail_at(nth);
            ibid_err e =
                ibid_extract(cases[i].f, "n.txt", cases[i].text, strlen(cases[i].text), &sink);
            ibid_alloc_fail_at(0);
            if (!e) break;
            assert_true(e == IBID_NOMEM || e == IBID_TOOBIG);
            failed++;
            assert_in_range(nth, 1, 10000);
        }
        assert_true(failed > 2);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(normalises),
                                       cmocka_unit_test(composes_across_pieces),
                                       cmocka_unit_test(random_text_is_nfc),
                                       cmocka_unit_test(character_sets),
                                       cmocka_unit_test(empty_files),
                                       cmocka_unit_test(text_titles),
                                       cmocka_unit_test(text_locators),
                                       cmocka_unit_test(huge_line),
                                       cmocka_unit_test(markdown_structure),
                                       cmocka_unit_test(markdown_deep),
                                       cmocka_unit_test(html_structure),
                                       cmocka_unit_test(html_deep),
                                       cmocka_unit_test(jsonl_lines),
                                       cmocka_unit_test(formats_by_name),
                                       cmocka_unit_test(every_allocation_fails_once)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
