/* Choosing a format's extractor, and what the extractors share. */
#include "indexer/extract/extract.h"
#include "indexer/extract/internal.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

ibid_format ibid_format_of(const char *name) {
    static const struct {
        const char *ending;
        ibid_format format;
    } known[] = {{".txt", IBID_FORMAT_TEXT},    {".text", IBID_FORMAT_TEXT},
                 {".md", IBID_FORMAT_MARKDOWN}, {".markdown", IBID_FORMAT_MARKDOWN},
                 {".html", IBID_FORMAT_HTML},   {".htm", IBID_FORMAT_HTML},
                 {".xhtml", IBID_FORMAT_HTML},  {".pdf", IBID_FORMAT_PDF},
                 {".jsonl", IBID_FORMAT_JSONL}, {".ndjson", IBID_FORMAT_JSONL}};
    const char *dot = strrchr(name, '.');
    for (size_t i = 0; dot && i < sizeof known / sizeof *known; i++)
        if (strcasecmp(dot, known[i].ending) == 0) return known[i].format;
    return IBID_FORMAT_NONE;
}

const char *ibid_format_name(ibid_format f) {
    static const char *const names[] = {"none", "text", "markdown", "html", "pdf", "jsonl"};
    return (size_t)f < sizeof names / sizeof *names ? names[f] : "none";
}

ibid_err ibidi_xt_title_of_name(const char *name, ibid_buf *out) {
    const char *slash = strrchr(name, '/');
    const char *base = slash ? slash + 1 : name;
    size_t n = strlen(base);
    const char *dot = strrchr(base, '.');
    if (dot && dot > base && ibid_format_of(base) != IBID_FORMAT_NONE) n = (size_t)(dot - base);
    /* A name is bytes: those that are not UTF-8 become U+FFFD. */
    ibidi_xt_encoding enc = {.set = IBIDI_UTF8_DAMAGED};
    ibid_buf text;
    ibid_str whole;
    ibid_buf_init(&text, 64 * 1024);
    ibid_err e = ibidi_xt_charset_whole(&enc, base, n, &text, &whole);
    if (!e) e = ibidi_xt_norm_line(whole.s, whole.n, IBID_EXTRACT_TITLE_MAX, out);
    ibid_buf_fini(&text);
    return e;
}

ibid_err ibidi_xt_state(const ibid_extract_sink *sink, const char *name, ibid_doc_state state,
                        const char *reason) {
    ibid_buf title;
    ibid_buf_init(&title, 64 * 1024);
    ibid_err e = ibidi_xt_title_of_name(name, &title);
    if (!e)
        e = sink->begin(sink->arg, (ibid_str){"", 0},
                        (ibid_str){title.data ? title.data : "", title.len}, (ibid_str){"", 0});
    if (!e) e = sink->end(sink->arg, state, reason);
    ibid_buf_fini(&title);
    return e;
}

ibid_err ibidi_xt_finish(ibidi_xt_norm *n, const ibidi_xt_encoding *enc) {
    char reason[IBID_EXTRACT_REASON_MAX];
    ibid_err e = ibidi_xt_norm_flush(n);
    if (e) return e;
    if (n->total == 0) return n->sink->end(n->sink->arg, IBID_DOC_EMPTY, "there is no text in it");
    return n->sink->end(n->sink->arg, ibidi_xt_charset_state(enc, reason), reason);
}

ibid_err ibidi_xt_headings_enter(ibidi_xt_headings *h, unsigned level, const char *s, size_t n,
                                 ibid_buf *out) {
    if (level < 1 || level > 6) return IBID_OK;
    char *copy = ibid_strndup(s, ibidi_xt_utf8_cut(s, n, 120));
    if (!copy) return ibid_fail(IBID_NOMEM, "out of memory for a heading");
    for (size_t i = level - 1; i < 6; i++) {
        ibid_free(h->text[i]);
        h->text[i] = NULL;
    }
    h->text[level - 1] = copy;
    ibid_err e = ibid_buf_puts(out, "#");
    bool first = true;
    for (size_t i = 0; !e && i < level; i++) {
        if (!h->text[i]) continue;
        e = ibid_buf_puts(out, first ? " " : " > ");
        if (!e) e = ibid_buf_puts(out, h->text[i]);
        first = false;
    }
    return e;
}

void ibidi_xt_headings_fini(ibidi_xt_headings *h) {
    for (size_t i = 0; i < 6; i++) ibid_free(h->text[i]);
    *h = (ibidi_xt_headings){{NULL}};
}

ibid_err ibid_extract(ibid_format f, const char *name, const void *data, size_t n,
                      const ibid_extract_sink *sink) {
    if (n > IBID_EXTRACT_INPUT_MAX)
        return ibidi_xt_state(sink, name, IBID_DOC_UNSUPPORTED,
                              "larger than 512 MiB: split it into smaller files");
    switch (f) {
    case IBID_FORMAT_TEXT:
        return ibidi_xt_text(name, data, n, sink);
    case IBID_FORMAT_MARKDOWN:
        return ibidi_xt_markdown(name, data, n, sink);
    case IBID_FORMAT_HTML:
        return ibidi_xt_html(name, data, n, sink);
    case IBID_FORMAT_JSONL:
        return ibidi_xt_jsonl(name, data, n, sink);
    case IBID_FORMAT_PDF:
    case IBID_FORMAT_NONE:
        break;
    }
    return ibid_fail(IBID_INVAL, "%s files are not read here", ibid_format_name(f));
}
