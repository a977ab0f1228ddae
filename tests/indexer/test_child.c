/* The extractor as a process: frames, PDF, and every limit really enforced. */
#include "indexer/extract/child.h"
#include "rpc/base/sanitized.h"
#include "tests/indexer/pdf_write.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static char program[4096];

static int set_up(void **state) {
    (void)state;
    return (int)ibid_extract_program(program, sizeof program);
}

static int file_of(const void *p, size_t n) {
    int fd = memfd_create("sample", MFD_CLOEXEC);
    assert_true(fd >= 0);
    for (size_t i = 0; i < n;) {
        ssize_t done = write(fd, (const char *)p + i, n - i);
        assert_true(done > 0);
        i += (size_t)done;
    }
    return fd;
}

struct outcome {
    ibid_err e;
    char detail[600], reason[600], locators[600], title[200];
    ibid_doc_state state;
    ibid_buf text;
    size_t docs, notes;
};

static void run(struct outcome *o, ibid_format f, const void *p, size_t n,
                const ibid_extract_limits *l) {
    ibid_extraction *x = NULL;
    ibid_frame frame = {0};
    int fd = file_of(p, n);
    memset(o, 0, sizeof *o);
    ibid_buf_init(&o->text, (size_t)1 << 30);
    o->e = ibid_extraction_open(program, fd, "the name.txt", f, l, &x);
    while (!o->e && frame.kind != IBID_FRAME_DONE) {
        o->e = ibid_extraction_next(x, &frame);
        if (o->e) break;
        if (frame.kind == IBID_FRAME_BEGIN)
            (void)snprintf(o->title, sizeof o->title, "%.*s", (int)frame.title.n, frame.title.s);
        if (frame.kind == IBID_FRAME_TEXT)
            assert_int_equal(ibid_buf_append(&o->text, frame.text.s, frame.text.n), IBID_OK);
        if (frame.kind == IBID_FRAME_LOCATOR)
            (void)snprintf(o->locators + strlen(o->locators), 100, "%zu %.*s;", o->text.len,
                           (int)frame.text.n, frame.text.s);
        o->notes += frame.kind == IBID_FRAME_NOTE;
        if (frame.kind == IBID_FRAME_END) {
            o->docs++;
            o->state = frame.state;
            (void)snprintf(o->reason, sizeof o->reason, "%.*s", (int)frame.text.n, frame.text.s);
        }
    }
    (void)snprintf(o->detail, sizeof o->detail, "%s", o->e ? ibid_err_detail() : "");
    ibid_extraction_close(x);
    (void)close(fd);
    /* Nothing is left behind. */
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
    assert_int_equal(errno, ECHILD);
}

static void reads_documents(void **state) {
    (void)state;
    struct outcome o;
    run(&o, IBID_FORMAT_MARKDOWN, "# A\n\ntext\n", 10, NULL);
    assert_int_equal(o.e, IBID_OK);
    assert_string_equal(o.text.data, "A\n\ntext");
    assert_string_equal(o.title, "A");
    ibid_buf_fini(&o.text);
    static const char lines[] = "{\"id\":1,\"text\":\"a\"}\nbad\n{\"id\":2,\"text\":\"b\"}\n";
    run(&o, IBID_FORMAT_JSONL, lines, sizeof lines - 1, NULL);
    assert_int_equal(o.e, IBID_OK);
    assert_int_equal(o.docs, 2);
    assert_int_equal(o.notes, 1);
    ibid_buf_fini(&o.text);
}

static void pdf_pages(void **state) {
    (void)state;
    struct outcome o;
    ibid_buf b;
    ibid_buf_init(&b, 1 << 20);
    static const char two_lines[] = "This is a rather long first line of a paragraph which\n"
                                    "goes on in the next line.";
    const char *const pages[] = {two_lines, "", "Third page.", ""};
    assert_int_equal(test_pdf(&b, pages, 4), IBID_OK);
    run(&o, IBID_FORMAT_PDF, b.data, b.len, NULL);
    assert_int_equal(o.e, IBID_OK);
    assert_string_equal(o.text.data,
                        "This is a rather long first line of a paragraph which goes on "
                        "in the next line.\n\nThird page.");
    assert_string_equal(o.locators, "0 page 1;81 page 3;");
    assert_int_equal(o.state, IBID_DOC_PARTIAL);
    assert_string_equal(o.reason, "2 of 4 pages have no text: 2, 4");
    assert_string_equal(o.title, "the name");
    ibid_buf_fini(&o.text);
    ibid_buf_clear(&b);
    static const char *const scans[] = {"", ""};
    assert_int_equal(test_pdf(&b, scans, 2), IBID_OK);
    run(&o, IBID_FORMAT_PDF, b.data, b.len, NULL);
    assert_int_equal(o.e, IBID_OK);
    assert_int_equal(o.state, IBID_DOC_EMPTY);
    ibid_buf_fini(&o.text);
    /* Cut off in the middle, and plain nonsense: an end state, no crash. */
    for (size_t n = 0; n < b.len; n += 97) {
        run(&o, IBID_FORMAT_PDF, b.data, n, NULL);
        assert_int_equal(o.e, IBID_OK);
        assert_true(o.state == IBID_DOC_FAILED || o.state == IBID_DOC_EMPTY);
        ibid_buf_fini(&o.text);
    }
    char noise[4096];
    uint64_t seed = 99;
    for (size_t i = 0; i < sizeof noise; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        noise[i] = (char)(seed >> 40);
    }
    memcpy(noise, "%PDF-1.7\n", 9);
    run(&o, IBID_FORMAT_PDF, noise, sizeof noise, NULL);
    assert_int_equal(o.e, IBID_OK);
    assert_int_equal(o.state, IBID_DOC_FAILED);
    assert_true(strlen(o.reason) > 10);
    ibid_buf_fini(&o.text);
    ibid_buf_fini(&b);
}

/* Text whose normalisation takes long: combining marks only. */
static char *slow_text(size_t n) {
    char *p = malloc(n);
    assert_non_null(p);
    for (size_t i = 0; i + 2 <= n; i += 2) memcpy(p + i, i % 4 ? "\xCC\x81" : "\xCC\xA3", 2);
    return p;
}

static void time_is_limited(void **state) {
    (void)state;
    struct outcome o;
    size_t n = 40 << 20;
    char *p = slow_text(n);
    const ibid_extract_limits cpu = {.cpu_s = 1};
    run(&o, IBID_FORMAT_TEXT, p, n, &cpu);
    printf("processor time: %s\n", o.detail);
    assert_int_equal(o.e, IBID_TIMEOUT);
    ibid_buf_fini(&o.text);
    const ibid_extract_limits idle = {.idle_ms = 1};
    run(&o, IBID_FORMAT_HTML, p, n, &idle);
    printf("silence: %s\n", o.detail);
    assert_int_equal(o.e, IBID_TIMEOUT);
    ibid_buf_fini(&o.text);
    atomic_bool stop = true;
    const ibid_extract_limits stopped = {.stop = &stop};
    run(&o, IBID_FORMAT_TEXT, p, n, &stopped);
    assert_int_equal(o.e, IBID_CANCELLED);
    ibid_buf_fini(&o.text);
    free(p);
}

static void memory_is_limited(void **state) {
    (void)state;
    struct outcome o;
    if (IBID_SANITIZED) skip(); /* a sanitizer's shadow does not fit into any limit */
    size_t n = 24 << 20;
    char *p = malloc(n);
    assert_non_null(p);
    for (size_t i = 0; i < n; i += 4) memcpy(p + i, "<p>x", 4);
    const ibid_extract_limits l = {.memory = (uint64_t)128 << 20};
    run(&o, IBID_FORMAT_HTML, p, n, &l);
    printf("memory: %s\n", o.detail);
    assert_int_equal(o.e, IBID_TOOBIG);
    assert_non_null(strstr(o.detail, "128 MiB"));
    ibid_buf_fini(&o.text);
    free(p);
}

static void output_is_limited(void **state) {
    (void)state;
    struct outcome o;
    size_t n = 3 << 20;
    char *p = malloc(n);
    assert_non_null(p);
    memset(p, 'x', n);
    const ibid_extract_limits l = {.output = 1 << 20};
    run(&o, IBID_FORMAT_TEXT, p, n, &l);
    printf("output: %s\n", o.detail);
    assert_int_equal(o.e, IBID_TOOBIG);
    assert_in_range(o.text.len, 0, 1 << 20);
    ibid_buf_fini(&o.text);
    free(p);
}

/* Programs that are no extractor: frames are checked, not believed. */
static void output_is_not_trusted(void **state) {
    (void)state;
    struct outcome o;
    char real[4096];
    memcpy(real, program, sizeof real);
    static const char *const liars[] = {"/bin/echo", "/bin/false", "/nonexistent/program"};
    static const ibid_err want[] = {IBID_PROTO, IBID_IO, IBID_NOTFOUND};
    for (size_t i = 0; i < 3; i++) {
        (void)snprintf(program, sizeof program, "%s", liars[i]);
        run(&o, IBID_FORMAT_TEXT, "x", 1, NULL);
        assert_int_equal(o.e, want[i]);
        ibid_buf_fini(&o.text);
    }
    memcpy(program, real, sizeof real);
}

static void frames_round_trip(void **state) {
    (void)state;
    ibid_buf b;
    ibid_buf_init(&b, 1 << 20);
    const ibid_frame in = {
        .kind = IBID_FRAME_BEGIN, .id = {"id", 2}, .title = {"title", 5}, .metadata = {"{}", 2}};
    ibid_frame out;
    size_t n = 0;
    assert_int_equal(ibidi_xt_frame_put(&b, &in), IBID_OK);
    const char *payload = b.data + IBIDI_FRAME_HEADER;
    assert_int_equal(ibidi_xt_frame_header((const unsigned char *)b.data, &out, &n), IBID_OK);
    assert_int_equal(ibidi_xt_frame_payload(payload, n, &out), IBID_OK);
    assert_int_equal(out.title.n, 5);
    assert_memory_equal(out.metadata.s, "{}", 2);
    for (size_t cut = 0; cut < 8; cut++)
        assert_int_equal(ibidi_xt_frame_payload(payload, cut, &out), IBID_PROTO);
    b.data[IBIDI_FRAME_HEADER] = 100; /* an id longer than the frame */
    assert_int_equal(ibidi_xt_frame_payload(payload, n, &out), IBID_PROTO);
    static const unsigned char bad[][8] = {{0},    {7},    {1, 1},
                                           {4, 0}, {4, 6}, {3, 0, 0, 0, 1, 0, 3, 0}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(ibidi_xt_frame_header(bad[i], &out, &n), IBID_PROTO);
    out = (ibid_frame){.kind = IBID_FRAME_TEXT};
    assert_int_equal(ibidi_xt_frame_payload("\xC3", 1, &out), IBID_PROTO);
    ibid_buf_fini(&b);
}

int main(void) {
    (void)signal(SIGPIPE, SIG_IGN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_documents),   cmocka_unit_test(pdf_pages),
        cmocka_unit_test(time_is_limited),   cmocka_unit_test(memory_is_limited),
        cmocka_unit_test(output_is_limited), cmocka_unit_test(output_is_not_trusted),
        cmocka_unit_test(frames_round_trip)};
    return cmocka_run_group_tests(tests, set_up, NULL);
}
