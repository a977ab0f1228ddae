/* Extraction: the bytes of one file in, normalised text with locators out.
 *
 * Parsers never run inside the indexer: each file is read by a child process, ibid-extract, under
 * limits (extract/child.h). The pure part here is bytes in, calls out, so that a fuzzer can drive
 * it.
 *
 * Normalised text (all byte ranges in ibid refer to it): UTF-8, NFC; lines end with LF; no control
 * characters but LF and TAB; no zero-width characters (soft hyphen, zero-width space, byte order
 * mark); no-break spaces are spaces; no spaces at the end of a line; never more than one blank line
 * in a row; a run of more than 1024 spaces is shortened; nothing blank at either end. */
#ifndef IBID_EXTRACT_H
#define IBID_EXTRACT_H

#include "kvstore/kvstore.h"

typedef enum ibid_format {
    IBID_FORMAT_NONE = 0, /* a name ibid does not read */
    IBID_FORMAT_TEXT,
    IBID_FORMAT_MARKDOWN,
    IBID_FORMAT_HTML,
    IBID_FORMAT_PDF,
    IBID_FORMAT_JSONL
} ibid_format;

/* By the name's ending, whatever its case. */
ibid_format ibid_format_of(const char *name);
const char *ibid_format_name(ibid_format f); /* "text", ...; "none" */

enum {
    IBID_EXTRACT_VERSION = 1, /* part of every content hash: raise it when the output changes */
    IBID_EXTRACT_TITLE_MAX = 1024,
    IBID_EXTRACT_ID_MAX = 4096,
    IBID_EXTRACT_LOCATOR_MAX = 512,
    IBID_EXTRACT_METADATA_MAX = 64 * 1024,
    IBID_EXTRACT_REASON_MAX = 512,
    IBID_EXTRACT_PIECE_MAX = 64 * 1024, /* most bytes of one text call */
    IBID_EXTRACT_INPUT_MAX = 512 * 1024 * 1024,
    IBID_EXTRACT_LINE_MAX = 64 * 1024 * 1024 /* of a .jsonl file */
};

/* Where the documents of a file go. For each document: begin, then text and locators in order, then
 * end. A locator names the place of the text after it, until the next one. note reports a line that
 * is not a document (JSONL); it comes between documents. Strings are borrowed for the call; all are
 * UTF-8. A non-zero return stops the extraction and is returned. */
typedef struct ibid_extract_sink {
    void *arg;
    /* id "": the file itself. */
    ibid_err (*begin)(void *arg, ibid_str id, ibid_str title, ibid_str metadata);
    ibid_err (*locator)(void *arg, ibid_str name);
    ibid_err (*text)(void *arg, ibid_str piece);
    ibid_err (*end)(void *arg, ibid_doc_state state, const char *reason);
    ibid_err (*note)(void *arg, uint64_t line, ibid_str id, const char *reason);
} ibid_extract_sink;

/* Extracts every format but PDF. name: the file's name without folders, for titles.
 * Titles: text: the first line if it looks like one (at most 100 bytes, not ending like a sentence,
 * a blank line after it), else the name without its ending. Markdown: the first level-1 heading,
 * else `title:` of the front matter, else the name. HTML: <title>, else the first heading, else the
 * name. PDF: the name. JSONL: the line's own, may be "". Errors: those of the sink, NOMEM, TOOBIG.
 * Bad content is no error: it ends in a document state. */
ibid_err ibid_extract(ibid_format f, const char *name, const void *data, size_t n,
                      const ibid_extract_sink *sink);
/* PDF through pdftotext, a process of its own that inherits this one's limits. fd: the file. */
ibid_err ibid_extract_pdf(const char *name, int fd, const ibid_extract_sink *sink);
#endif
