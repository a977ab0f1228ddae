/* Every extractor that parses in process, over any bytes. The first byte chooses the format. What
 * comes out must keep the promises of extract.h: documents in order, UTF-8 without control
 * characters. */
#include "indexer/extract/internal.h"

#include <stdlib.h>
#include <string.h>

struct check {
    bool inside;
    char last;
    uint64_t bytes;
};

static void must(bool ok) {
    if (!ok) abort();
}

static void must_be_text(ibid_str s, bool lines) {
    uint32_t cp = 0;
    for (size_t i = 0; i < s.n;) {
        size_t len = ibidi_xt_utf8_next(s.s + i, s.n - i, &cp);
        must(len > 0);
        must(cp >= 0x20 || (lines && (cp == '\n' || cp == '\t')));
        i += len;
    }
}

static ibid_err begin(void *arg, ibid_str id, ibid_str title, ibid_str metadata) {
    struct check *c = arg;
    must(!c->inside && id.n <= IBID_EXTRACT_ID_MAX && title.n <= IBID_EXTRACT_TITLE_MAX);
    must_be_text(id, false);
    must_be_text(title, false);
    must(metadata.n <= IBID_EXTRACT_METADATA_MAX);
    *c = (struct check){.inside = true};
    return IBID_OK;
}
static ibid_err locator(void *arg, ibid_str name) {
    must(((struct check *)arg)->inside && name.n <= IBID_EXTRACT_LOCATOR_MAX);
    must_be_text(name, false);
    return IBID_OK;
}
static ibid_err text(void *arg, ibid_str piece) {
    struct check *c = arg;
    must(c->inside && piece.n > 0 && piece.n <= IBID_EXTRACT_PIECE_MAX);
    must_be_text(piece, true);
    must(c->bytes > 0 || (piece.s[0] != '\n' && piece.s[0] != ' '));
    for (size_t i = 0; i < piece.n; i++) {
        must(!(piece.s[i] == '\n' && (c->last == ' ' || c->last == '\t')));
        c->last = piece.s[i];
    }
    c->bytes += piece.n;
    return IBID_OK;
}
static ibid_err end(void *arg, ibid_doc_state state, const char *reason) {
    struct check *c = arg;
    must(c->inside && c->last != '\n' && c->last != ' ');
    must((state == IBID_DOC_READY) == (reason[0] == '\0'));
    must((c->bytes > 0) == (state == IBID_DOC_READY || state == IBID_DOC_PARTIAL));
    c->inside = false;
    return IBID_OK;
}
static ibid_err note(void *arg, uint64_t line, ibid_str id, const char *reason) {
    (void)id;
    must(!((struct check *)arg)->inside && line > 0 && reason[0]);
    return IBID_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const ibid_format formats[] = {IBID_FORMAT_TEXT, IBID_FORMAT_MARKDOWN, IBID_FORMAT_HTML,
                                          IBID_FORMAT_JSONL};
    struct check c = {0};
    const ibid_extract_sink sink = {&c, begin, locator, text, end, note};
    if (size == 0) return 0;
    ibid_err e = ibid_extract(formats[data[0] % 4], "name.md", data + 1, size - 1, &sink);
    must(e == IBID_OK || e == IBID_TOOBIG || e == IBID_NOMEM);
    must(e || !c.inside);
    return 0;
}
