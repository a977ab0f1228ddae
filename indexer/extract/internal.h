/* What the files of indexer/extract share. */
#ifndef IBID_EXTRACT_INTERNAL_H
#define IBID_EXTRACT_INTERNAL_H

#include "indexer/extract/extract.h"

/* ---- Character sets (charset.c) ---- */
typedef enum ibidi_xt_charset {
    IBIDI_UTF8,
    IBIDI_UTF8_DAMAGED, /* mostly UTF-8: bad bytes become U+FFFD */
    IBIDI_UTF16LE,
    IBIDI_UTF16BE,
    IBIDI_WINDOWS_1252,
    IBIDI_BINARY
} ibidi_xt_charset;

typedef struct ibidi_xt_encoding {
    ibidi_xt_charset set;
    size_t bom;       /* bytes to skip */
    size_t bad;       /* sequences that are not UTF-8 */
    size_t first_bad; /* where the first one lies */
} ibidi_xt_encoding;

ibidi_xt_encoding ibidi_xt_charset_detect(const char *p, size_t n);
/* Hands the bytes on as valid UTF-8, in pieces of at most 64 KiB that end between characters. */
ibid_err ibidi_xt_charset_decode(const ibidi_xt_encoding *enc, const char *p, size_t n,
                                 ibid_err (*fn)(void *arg, const char *p, size_t n), void *arg);
/* READY, PARTIAL with a reason, or UNSUPPORTED with a reason. */
ibid_doc_state ibidi_xt_charset_state(const ibidi_xt_encoding *enc,
                                      char reason[IBID_EXTRACT_REASON_MAX]);
/* Whole text as UTF-8: *out points into p where it is UTF-8 already, else into buf. */
ibid_err ibidi_xt_charset_whole(const ibidi_xt_encoding *enc, const char *p, size_t n,
                                ibid_buf *buf, ibid_str *out);
/* Decodes one sequence: its length, or 0 when it is not well-formed UTF-8. */
size_t ibidi_xt_utf8_next(const char *p, size_t n, uint32_t *cp);
size_t ibidi_xt_utf8_put(uint32_t cp, char out[4]);
/* The longest prefix of at most max bytes that ends between characters. */
size_t ibidi_xt_utf8_cut(const char *p, size_t n, size_t max);

/* ---- Normalisation (normal.c): one document's text on its way to the sink ---- */
typedef struct ibidi_xt_norm {
    const ibid_extract_sink *sink;
    ibid_buf carry; /* mapped text that may still combine with what follows */
    ibid_buf out;   /* normalised, not yet handed on */
    char gap[1024]; /* spaces and tabs that come before the next visible character */
    size_t n_gap;
    size_t newlines; /* to come before it, 0 to 2 */
    bool after_cr;   /* a LF now belongs to the CR before it */
    uint64_t total;  /* bytes of text so far */
    bool has_locator;
    char locator[IBID_EXTRACT_LOCATOR_MAX];
    size_t n_locator;
} ibidi_xt_norm;

ibid_err ibidi_xt_norm_init(ibidi_xt_norm *n, const ibid_extract_sink *sink);
void ibidi_xt_norm_fini(ibidi_xt_norm *n);
ibid_err ibidi_xt_norm_text(ibidi_xt_norm *n, const char *p,
                            size_t len); /* valid UTF-8, whole characters */
ibid_err ibidi_xt_norm_puts(ibidi_xt_norm *n, const char *s);
/* Starts a new line, or leaves `blank` blank lines (0 or 1), once text follows. Never at the start.
 */
ibid_err ibidi_xt_norm_break(ibidi_xt_norm *n, size_t blank);
/* Takes effect at the next visible character. */
ibid_err ibidi_xt_norm_locator(ibidi_xt_norm *n, const char *s, size_t len);
ibid_err ibidi_xt_norm_flush(ibidi_xt_norm *n);
/* A short string (title, locator, id) by the same rules, on one line, cut to at most max bytes. */
ibid_err ibidi_xt_norm_line(const char *p, size_t n, size_t max, ibid_buf *out);

/* ---- Parts ---- */
typedef struct ibidi_xt_headings { /* the path of headings we are under */
    char *text[6];
} ibidi_xt_headings;
/* Enters a heading; appends "# A > B" to out. */
ibid_err ibidi_xt_headings_enter(ibidi_xt_headings *h, unsigned level, const char *s, size_t n,
                                 ibid_buf *out);
void ibidi_xt_headings_fini(ibidi_xt_headings *h);

/* The file name without its ending, as a title. */
ibid_err ibidi_xt_title_of_name(const char *name, ibid_buf *out);
/* A whole document without text. */
ibid_err ibidi_xt_state(const ibid_extract_sink *sink, const char *name, ibid_doc_state state,
                        const char *reason);
/* Ends a document: EMPTY when no text came, else the state of its character set. */
ibid_err ibidi_xt_finish(ibidi_xt_norm *n, const ibidi_xt_encoding *enc);

ibid_err ibidi_xt_text(const char *name, const char *p, size_t n, const ibid_extract_sink *sink);
ibid_err ibidi_xt_markdown(const char *name, const char *p, size_t n,
                           const ibid_extract_sink *sink);
ibid_err ibidi_xt_html(const char *name, const char *p, size_t n, const ibid_extract_sink *sink);
ibid_err ibidi_xt_jsonl(const char *name, const char *p, size_t n, const ibid_extract_sink *sink);
/* "&copy;" to UTF-8; an unknown one stays as it is. */
ibid_err ibidi_xt_entity_decode(const char *p, size_t n, ibid_buf *out);
#endif
