/* JSON lines: each line one document, {"id", "title", "text", "metadata"}. A bad line is reported
 * with its number, the others go on. Locators: "line N". */
#include "indexer/extract/internal.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The id: text, or a whole number written as text. False with a reason otherwise. */
static bool read_id(const json_t *line, char *room, size_t size, ibid_str *id, const char **why) {
    const json_t *v = json_object_get(line, "id");
    if (json_is_integer(v)) {
        int n = snprintf(room, size, "%lld", (long long)json_integer_value(v));
        *id = (ibid_str){room, (size_t)n};
        return true;
    }
    *why = v ? "\"id\" is neither text nor a whole number" : "it has no \"id\"";
    if (!json_is_string(v)) return false;
    *id = (ibid_str){json_string_value(v), json_string_length(v)};
    *why = "its \"id\" is empty or longer than 4096 bytes";
    if (id->n == 0 || id->n > IBID_EXTRACT_ID_MAX) return false;
    *why = "its \"id\" holds control characters";
    for (size_t i = 0; i < id->n; i++)
        if ((unsigned char)id->s[i] < 0x20 || id->s[i] == 0x7F) return false;
    return true;
}

/* A document whose id, title, metadata and text were checked. */
static ibid_err document(const ibid_extract_sink *sink, uint64_t number, ibid_str id,
                         const json_t *line, ibid_str metadata, const ibidi_xt_encoding *enc) {
    ibidi_xt_norm norm;
    ibid_buf title;
    char name[40];
    ibid_buf_init(&title, 64 * 1024);
    ibid_err e = ibidi_xt_norm_init(&norm, sink);
    const json_t *t = json_object_get(line, "title"), *text = json_object_get(line, "text");
    if (!e && json_is_string(t))
        e = ibidi_xt_norm_line(json_string_value(t), json_string_length(t), IBID_EXTRACT_TITLE_MAX,
                               &title);
    if (!e)
        e = sink->begin(sink->arg, id, (ibid_str){title.data ? title.data : "", title.len},
                        metadata);
    int n = snprintf(name, sizeof name, "line %llu", (unsigned long long)number);
    if (!e) e = ibidi_xt_norm_locator(&norm, name, (size_t)n);
    if (!e) e = ibidi_xt_norm_text(&norm, json_string_value(text), json_string_length(text));
    if (!e) e = ibidi_xt_finish(&norm, enc);
    ibidi_xt_norm_fini(&norm);
    ibid_buf_fini(&title);
    return e;
}

static ibid_err read_line(const ibid_extract_sink *sink, uint64_t number, const char *p, size_t n,
                          const ibidi_xt_encoding *enc) {
    json_error_t bad;
    char room[32], why_room[IBID_EXTRACT_REASON_MAX];
    const char *why = NULL;
    char *metadata = NULL;
    ibid_str id = {"", 0};
    json_t *line = NULL;
    if (n > IBID_EXTRACT_LINE_MAX) {
        why = "the line is longer than 64 MiB";
    } else if (!(line = json_loadb(p, n, 0, &bad))) {
        (void)snprintf(why_room, sizeof why_room, "not JSON: %s (column %d)", bad.text, bad.column);
        why = why_room;
    } else if (!json_is_object(line)) {
        why = "not a JSON object";
    } else if (read_id(line, room, sizeof room, &id, &why)) {
        const json_t *title = json_object_get(line, "title");
        const json_t *meta = json_object_get(line, "metadata");
        why = NULL;
        if (!json_is_string(json_object_get(line, "text")))
            why = "it has no \"text\"";
        else if (title && !json_is_string(title) && !json_is_null(title))
            why = "\"title\" is not text";
        else if (meta && !json_is_object(meta) && !json_is_null(meta))
            why = "\"metadata\" is not an object";
        else if (json_is_object(meta) && json_object_size(meta) > 0) {
            metadata = json_dumps(meta, JSON_COMPACT | JSON_SORT_KEYS);
            if (!metadata || strlen(metadata) > IBID_EXTRACT_METADATA_MAX)
                why = "\"metadata\" is larger than 64 KiB";
        }
    }
    ibid_str meta_text = {metadata ? metadata : "", metadata ? strlen(metadata) : 0};
    ibid_err e = why ? sink->note(sink->arg, number, id, why)
                     : document(sink, number, id, line, meta_text, enc);
    free(metadata); /* jansson's own allocation */
    json_decref(line);
    return e;
}

ibid_err ibidi_xt_jsonl(const char *name, const char *p, size_t n, const ibid_extract_sink *sink) {
    char reason[IBID_EXTRACT_REASON_MAX];
    ibidi_xt_encoding enc = ibidi_xt_charset_detect(p, n);
    ibid_buf buf;
    ibid_str all;
    uint64_t number = 0, lines = 0;
    ibid_buf_init(&buf, IBID_EXTRACT_INPUT_MAX);
    if (enc.set == IBIDI_BINARY)
        return ibidi_xt_state(sink, name, ibidi_xt_charset_state(&enc, reason), reason);
    ibid_err e = ibidi_xt_charset_whole(&enc, p, n, &buf, &all);
    /* What was replaced is a matter of the file; a line of it may well be whole. */
    ibidi_xt_encoding line_enc = enc.set == IBIDI_WINDOWS_1252 ? enc : (ibidi_xt_encoding){0};
    for (size_t i = 0; !e && i < all.n;) {
        const char *lf = memchr(all.s + i, '\n', all.n - i);
        size_t end = lf ? (size_t)(lf - all.s) : all.n, len = end - i;
        number++;
        while (len > 0 && (all.s[i + len - 1] == '\r' || all.s[i + len - 1] == ' ')) len--;
        if (len > 0) {
            lines++;
            bool damaged =
                enc.set == IBIDI_UTF8_DAMAGED && memmem(all.s + i, len, "\xEF\xBF\xBD", 3);
            e = read_line(sink, number, all.s + i, len, damaged ? &enc : &line_enc);
        }
        i = end + 1;
    }
    if (!e && !lines) e = ibidi_xt_state(sink, name, IBID_DOC_EMPTY, "there is no line in it");
    ibid_buf_fini(&buf);
    return e;
}
