/* A sink that writes down what an extractor says, for the tests of indexer/extract. */
#ifndef IBID_TEST_COLLECT_H
#define IBID_TEST_COLLECT_H

#include "indexer/extract/internal.h"

/* cmocka.h needs these four before it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <string.h>

enum { COLLECT_DOCS = 64 };

struct collected_doc {
    ibid_buf id, title, metadata, text, locators; /* locators: "AT name\n" each */
    ibid_doc_state state;
    char reason[IBID_EXTRACT_REASON_MAX];
    size_t n_locators;
};

struct collected {
    struct collected_doc docs[COLLECT_DOCS];
    size_t n;
    bool inside;
    ibid_buf notes; /* "LINE reason\n" each */
};

static inline void collect_put(ibid_buf *b, ibid_str s) {
    assert_int_equal(ibid_buf_append(b, s.s, s.n), IBID_OK);
}

static inline ibid_err collect_begin(void *arg, ibid_str id, ibid_str title, ibid_str metadata) {
    struct collected *c = arg;
    assert_false(c->inside);
    assert_in_range(c->n, 0, COLLECT_DOCS - 1);
    c->inside = true;
    struct collected_doc *d = &c->docs[c->n];
    ibid_buf *bufs[] = {&d->id, &d->title, &d->metadata, &d->text, &d->locators};
    for (size_t i = 0; i < 5; i++) ibid_buf_init(bufs[i], (size_t)1 << 30);
    collect_put(&d->id, id);
    collect_put(&d->title, title);
    collect_put(&d->metadata, metadata);
    collect_put(&d->text, (ibid_str){"", 0});
    collect_put(&d->locators, (ibid_str){"", 0});
    return IBID_OK;
}
static inline ibid_err collect_locator(void *arg, ibid_str name) {
    struct collected *c = arg;
    assert_true(c->inside);
    struct collected_doc *d = &c->docs[c->n];
    d->n_locators++;
    assert_int_equal(ibid_buf_printf(&d->locators, "%zu %.*s\n", d->text.len, (int)name.n, name.s),
                     IBID_OK);
    return IBID_OK;
}
static inline ibid_err collect_text(void *arg, ibid_str piece) {
    struct collected *c = arg;
    assert_true(c->inside);
    assert_in_range(piece.n, 0, IBID_EXTRACT_PIECE_MAX);
    collect_put(&c->docs[c->n].text, piece);
    return IBID_OK;
}
static inline ibid_err collect_end(void *arg, ibid_doc_state state, const char *reason) {
    struct collected *c = arg;
    assert_true(c->inside);
    c->inside = false;
    c->docs[c->n].state = state;
    (void)snprintf(c->docs[c->n].reason, sizeof c->docs[c->n].reason, "%s", reason);
    c->n++;
    return IBID_OK;
}
static inline ibid_err collect_note(void *arg, uint64_t line, ibid_str id, const char *reason) {
    struct collected *c = arg;
    (void)id;
    assert_false(c->inside);
    assert_int_equal(ibid_buf_printf(&c->notes, "%llu %s\n", (unsigned long long)line, reason),
                     IBID_OK);
    return IBID_OK;
}

static inline struct collected *collect_open(ibid_extract_sink *sink) {
    struct collected *c = ibid_calloc(1, sizeof *c);
    assert_non_null(c);
    ibid_buf_init(&c->notes, 1 << 20);
    *sink = (ibid_extract_sink){c,           collect_begin, collect_locator, collect_text,
                                collect_end, collect_note};
    return c;
}

static inline void collect_close(struct collected *c) {
    for (size_t i = 0; i < c->n; i++) {
        struct collected_doc *d = &c->docs[i];
        ibid_buf *bufs[] = {&d->id, &d->title, &d->metadata, &d->text, &d->locators};
        for (size_t k = 0; k < 5; k++) ibid_buf_fini(bufs[k]);
    }
    ibid_buf_fini(&c->notes);
    ibid_free(c);
}
#endif
