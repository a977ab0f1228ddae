#include "indexer/extract/frame.h"
#include "indexer/extract/internal.h"

#include <string.h>

static void put_u32(unsigned char *p, uint64_t v) {
    for (size_t i = 0; i < 4; i++) p[i] = (unsigned char)(v >> (8 * i));
}
static uint64_t get_uint(const char *p, size_t bytes) {
    uint64_t v = 0;
    for (size_t i = 0; i < bytes; i++) v |= (uint64_t)(unsigned char)p[i] << (8 * i);
    return v;
}

ibid_err ibidi_xt_frame_put(ibid_buf *out, const ibid_frame *f) {
    unsigned char head[IBIDI_FRAME_HEADER] = {(unsigned char)f->kind, (unsigned char)f->state};
    unsigned char fixed[12];
    size_t n_fixed = 0;
    ibid_str part[3] = {{"", 0}, {"", 0}, {"", 0}};
    if (f->kind == IBID_FRAME_BEGIN) {
        put_u32(fixed, f->id.n);
        put_u32(fixed + 4, f->title.n);
        n_fixed = 8;
        part[0] = f->id, part[1] = f->title, part[2] = f->metadata;
    } else if (f->kind == IBID_FRAME_NOTE) {
        put_u32(fixed, f->line);
        put_u32(fixed + 4, f->line >> 32);
        put_u32(fixed + 8, f->id.n);
        n_fixed = 12;
        part[0] = f->id, part[1] = f->text;
    } else {
        part[0] = f->text;
    }
    size_t n = n_fixed;
    for (size_t i = 0; i < 3; i++)
        if (!ibid_add_size(n, part[i].n, &n)) n = SIZE_MAX;
    if (n > IBIDI_FRAME_MAX) return ibid_fail(IBID_TOOBIG, "a frame of %zu bytes", n);
    put_u32(head + 4, n);
    ibid_err e = ibid_buf_append(out, head, sizeof head);
    if (!e) e = ibid_buf_append(out, fixed, n_fixed);
    for (size_t i = 0; !e && i < 3; i++) e = ibid_buf_append(out, part[i].s, part[i].n);
    return e;
}

ibid_err ibidi_xt_frame_header(const unsigned char header[IBIDI_FRAME_HEADER], ibid_frame *f,
                               size_t *payload) {
    uint64_t n = get_uint((const char *)header + 4, 4);
    bool state_ok = header[0] == IBID_FRAME_END
                        ? header[1] >= IBID_DOC_READY && header[1] <= IBID_DOC_FAILED
                        : header[1] == 0;
    if (header[0] < IBID_FRAME_BEGIN || header[0] > IBID_FRAME_DONE || !state_ok || header[2] ||
        header[3] || n > IBIDI_FRAME_MAX)
        return ibid_fail(IBID_PROTO, "the extractor sent a frame that is none");
    *f = (ibid_frame){.kind = (ibid_frame_kind)header[0], .state = (ibid_doc_state)header[1]};
    *payload = (size_t)n;
    return IBID_OK;
}

static bool is_utf8(ibid_str s) {
    uint32_t cp;
    for (size_t i = 0; i < s.n;) {
        size_t len = ibidi_xt_utf8_next(s.s + i, s.n - i, &cp);
        if (!len) return false;
        i += len;
    }
    return true;
}

ibid_err ibidi_xt_frame_payload(const char *p, size_t n, ibid_frame *f) {
    static const char bad[] = "the extractor sent a frame with wrong lengths or text";
    f->id = f->title = f->metadata = f->text = (ibid_str){"", 0};
    if (f->kind == IBID_FRAME_BEGIN) {
        uint64_t id = n >= 8 ? get_uint(p, 4) : 0, title = n >= 8 ? get_uint(p + 4, 4) : 0;
        if (n < 8 || id > IBID_EXTRACT_ID_MAX || title > IBID_EXTRACT_TITLE_MAX ||
            id + title > n - 8 || n - 8 - id - title > IBID_EXTRACT_METADATA_MAX)
            return ibid_fail(IBID_PROTO, "%s", bad);
        f->id = (ibid_str){p + 8, (size_t)id};
        f->title = (ibid_str){p + 8 + id, (size_t)title};
        f->metadata = (ibid_str){p + 8 + id + title, n - 8 - (size_t)(id + title)};
    } else if (f->kind == IBID_FRAME_NOTE) {
        uint64_t id = n >= 12 ? get_uint(p + 8, 4) : 0;
        if (n < 12 || id > n - 12) return ibid_fail(IBID_PROTO, "%s", bad);
        f->line = get_uint(p, 8);
        f->id = (ibid_str){p + 12, (size_t)id};
        f->text = (ibid_str){p + 12 + id, n - 12 - (size_t)id};
    } else {
        f->text = (ibid_str){p, n};
    }
    size_t cap = f->kind == IBID_FRAME_LOCATOR ? IBID_EXTRACT_LOCATOR_MAX
                 : f->kind == IBID_FRAME_TEXT  ? IBID_EXTRACT_PIECE_MAX
                 : f->kind == IBID_FRAME_DONE  ? 0
                                               : 4096;
    if (f->text.n > cap || !is_utf8(f->id) || !is_utf8(f->title) || !is_utf8(f->metadata) ||
        !is_utf8(f->text))
        return ibid_fail(IBID_PROTO, "%s", bad);
    return IBID_OK;
}
