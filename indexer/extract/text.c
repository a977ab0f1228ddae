/* Plain text. Streams: a file of any length is never held. Locators: "line N". */
#include "indexer/extract/internal.h"

#include <stdio.h>
#include <string.h>

enum { LOCATOR_EVERY = 512 }; /* bytes of text between two locators */

struct text {
    ibidi_xt_norm norm;
    uint64_t line;
    size_t since; /* bytes since the last locator */
    bool line_start, after_cr;
};

/* One line's number where enough text came since the last one. */
static ibid_err locate(struct text *t) {
    char name[40];
    int n = snprintf(name, sizeof name, "line %llu", (unsigned long long)t->line);
    t->since = 0;
    return ibidi_xt_norm_locator(&t->norm, name, (size_t)n);
}

static ibid_err piece(void *arg, const char *p, size_t n) {
    struct text *t = arg;
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < n;) {
        if (t->line_start && t->since >= LOCATOR_EVERY) e = locate(t);
        size_t end = i;
        while (end < n && p[end] != '\n' && p[end] != '\r') end++;
        bool ended = end < n;
        if (ended) end++;
        if (!e) e = ibidi_xt_norm_text(&t->norm, p + i, end - i);
        bool lf_of_crlf = t->after_cr && end == i + 1 && p[i] == '\n';
        t->line += ended && !lf_of_crlf;
        t->after_cr = ended && p[end - 1] == '\r';
        t->line_start = ended;
        t->since += end - i;
        i = end;
    }
    return e;
}

/* The first line as a title, or nothing in *out when it does not look like one. */
static ibid_err first_line(const char *p, size_t n, ibid_buf *out) {
    size_t i = 0;
    while (i < n && (p[i] == '\n' || p[i] == '\r' || p[i] == ' ')) i++;
    size_t end = i;
    while (end < n && p[end] != '\n' && p[end] != '\r') end++;
    size_t next = end;
    if (next < n && p[next] == '\r') next++;
    if (next < n && p[next] == '\n') next++;
    while (next < n && (p[next] == ' ' || p[next] == '\t')) next++;
    bool blank_after = next > end && next < n && (p[next] == '\n' || p[next] == '\r');
    size_t len = end - i;
    while (len > 0 && p[i + len - 1] == ' ') len--;
    if (!blank_after || len < 2 || len > 100 || strchr(".,;:!?", p[i + len - 1])) return IBID_OK;
    bool letter = false;
    for (size_t k = i; k < i + len; k++)
        letter |= (unsigned char)p[k] >= 0x80 || ((p[k] | 32) >= 'a' && (p[k] | 32) <= 'z');
    return letter ? ibidi_xt_norm_line(p + i, len, IBID_EXTRACT_TITLE_MAX, out) : IBID_OK;
}

static ibid_err take_head(void *arg, const char *p, size_t n) {
    return ibid_buf_append(arg, p, n);
}

ibid_err ibidi_xt_text(const char *name, const char *p, size_t n, const ibid_extract_sink *sink) {
    char reason[IBID_EXTRACT_REASON_MAX];
    ibidi_xt_encoding enc = ibidi_xt_charset_detect(p, n);
    if (enc.set == IBIDI_BINARY)
        return ibidi_xt_state(sink, name, ibidi_xt_charset_state(&enc, reason), reason);
    ibid_buf title, head;
    struct text t = {.line = 1, .line_start = true, .since = LOCATOR_EVERY};
    ibid_buf_init(&title, 64 * 1024);
    ibid_buf_init(&head, 64 * 1024);
    ibid_err e = ibidi_xt_norm_init(&t.norm, sink);
    if (!e) e = ibidi_xt_charset_decode(&enc, p, n < 4096 ? n : 4096, take_head, &head);
    if (!e && head.len) {
        /* The cut at 4096 bytes may have split the last character; the title lies far before it. */
        size_t whole = ibidi_xt_utf8_cut(head.data, head.len, head.len > 2048 ? 2048 : head.len);
        e = first_line(head.data, whole, &title);
    }
    if (!e && !title.len) e = ibidi_xt_title_of_name(name, &title);
    if (!e)
        e = sink->begin(sink->arg, (ibid_str){"", 0},
                        (ibid_str){title.data ? title.data : "", title.len}, (ibid_str){"", 0});
    if (!e) e = ibidi_xt_charset_decode(&enc, p, n, piece, &t);
    if (!e) e = ibidi_xt_finish(&t.norm, &enc);
    ibidi_xt_norm_fini(&t.norm);
    ibid_buf_fini(&title);
    ibid_buf_fini(&head);
    return e;
}
