/* One Unicode form and one layout for all text: see extract.h for the rules.
 *
 * Text passes two stages. Mapping drops or replaces code points and gathers the rest in `carry`;
 * composing (NFC) then runs over `carry` up to a character that cannot combine with what comes
 * later, so that pieces may be cut anywhere and memory stays small however long a line is. */
#include "indexer/extract/internal.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

/* CARRY is small because ordering a long run of combining marks takes time quadratic in its length.
 */
enum { CARRY = 8 * 1024, BUFFER_MAX = 1024 * 1024, OUT_FLUSH = 32 * 1024 };

ibid_err ibidi_xt_norm_init(ibidi_xt_norm *n, const ibid_extract_sink *sink) {
    *n = (ibidi_xt_norm){.sink = sink};
    ibid_buf_init(&n->carry, BUFFER_MAX);
    ibid_buf_init(&n->out, BUFFER_MAX);
    return IBID_OK;
}

void ibidi_xt_norm_fini(ibidi_xt_norm *n) {
    ibid_buf_fini(&n->carry);
    ibid_buf_fini(&n->out);
}

static ibid_err hand_on(ibidi_xt_norm *n) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < n->out.len;) {
        size_t len = ibidi_xt_utf8_cut(n->out.data + i, n->out.len - i, IBID_EXTRACT_PIECE_MAX);
        e = n->sink->text(n->sink->arg, (ibid_str){n->out.data + i, len});
        i += len;
    }
    ibid_buf_clear(&n->out);
    return e;
}

/* Writes what stands between the last visible character and the next one. */
static ibid_err open_gap(ibidi_xt_norm *n) {
    ibid_err e = IBID_OK;
    size_t before = n->out.len;
    if (n->total > 0) { /* nothing blank at the start */
        e = ibid_buf_append(&n->out, "\n\n", n->newlines);
        if (!e) e = ibid_buf_append(&n->out, n->gap, n->n_gap);
    }
    n->total += n->out.len - before;
    n->newlines = 0;
    n->n_gap = 0;
    if (!e && n->has_locator) {
        n->has_locator = false;
        e = hand_on(n);
        if (!e) e = n->sink->locator(n->sink->arg, (ibid_str){n->locator, n->n_locator});
    }
    return e;
}

/* Composed text, without CR and control characters, into the output. */
static ibid_err emit(ibidi_xt_norm *n, const char *p, size_t len) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < len;) {
        char c = p[i];
        if (c == '\n') {
            if (n->newlines < 2) n->newlines++;
            n->n_gap = 0;
            i++;
        } else if (c == ' ' || c == '\t') {
            if (n->n_gap < sizeof n->gap) n->gap[n->n_gap++] = c;
            i++;
        } else {
            size_t end = i + 1;
            while (end < len && p[end] != '\n' && p[end] != ' ' && p[end] != '\t') end++;
            if (n->newlines || n->n_gap || n->has_locator) e = open_gap(n);
            if (!e) e = ibid_buf_append(&n->out, p + i, end - i);
            n->total += end - i;
            i = end;
            if (!e && n->out.len >= OUT_FLUSH) e = hand_on(n);
        }
    }
    return e;
}

/* True for characters that NFC never changes and that never join a character before them. */
static bool quiet(uint32_t cp) {
    return cp < 0x300 || (cp >= 0x400 && cp <= 0x482) || (cp >= 0x2010 && cp <= 0x2027) ||
           (cp >= 0x3001 && cp <= 0x3029) || (cp >= 0x3041 && cp <= 0x3096) ||
           (cp >= 0x30A1 && cp <= 0x30FA) || (cp >= 0x4E00 && cp <= 0x9FFF) ||
           (cp >= 0xAC00 && cp <= 0xD7A3) || (cp >= 0xFF01 && cp <= 0xFF5E);
}

static ibid_err compose(ibidi_xt_norm *n, const char *p, size_t len) {
    bool plain = true;
    for (size_t i = 0; plain && i < len;) {
        uint32_t cp = 0;
        size_t step = ibidi_xt_utf8_next(p + i, len - i, &cp);
        plain = step > 0 && quiet(cp);
        i += step;
    }
    if (plain) return emit(n, p, len);
    utf8proc_uint8_t *made = NULL;
    utf8proc_ssize_t got = utf8proc_map((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)len, &made,
                                        (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    if (got < 0)
        return ibid_fail(got == UTF8PROC_ERROR_NOMEM ? IBID_NOMEM : IBID_INTERNAL,
                         "composing text failed: %s", utf8proc_errmsg(got));
    ibid_err e = emit(n, (const char *)made, (size_t)got);
    free(made); /* utf8proc's own allocation */
    return e;
}

/* Where carry can be cut: before its last quiet character (a later mark could still join that one),
 * or, where there is none, before its last character that is no mark, or at its end. */
static size_t safe_cut(const ibid_buf *b) {
    size_t starter = 0;
    for (size_t i = b->len; i > 0;) {
        i--;
        while (i > 0 && ((unsigned char)b->data[i] & 0xC0) == 0x80) i--;
        uint32_t cp = 0;
        if (!ibidi_xt_utf8_next(b->data + i, b->len - i, &cp)) continue;
        if (i > 0 && quiet(cp)) return i;
        if (!starter && utf8proc_get_property((utf8proc_int32_t)cp)->combining_class == 0)
            starter = i;
    }
    return starter ? starter : b->len;
}

static ibid_err settle(ibidi_xt_norm *n, bool all) {
    size_t cut = all ? n->carry.len : safe_cut(&n->carry);
    if (!cut) return IBID_OK;
    ibid_err e = compose(n, n->carry.data, cut);
    memmove(n->carry.data, n->carry.data + cut, n->carry.len - cut);
    n->carry.len -= cut;
    return e;
}

/* What a code point becomes: itself, a space, a line feed, or nothing (0). */
static uint32_t map_char(uint32_t cp) {
    if (cp == '\n' || cp == '\t') return cp;
    if (cp == '\f' || cp == '\v' || cp == 0x85 || cp == 0x2028 || cp == 0x2029) return '\n';
    if (cp < 0x20 || (cp >= 0x7F && cp < 0xA0)) return 0;
    if (cp == 0xA0 || cp == 0x2007 || cp == 0x202F) return ' ';
    if (cp == 0xAD || cp == 0x200B || cp == 0x2060 || cp == 0xFEFF) return 0;
    if (cp == 0x200E || cp == 0x200F || (cp >= 0x202A && cp <= 0x202E) ||
        (cp >= 0x2066 && cp <= 0x2069))
        return 0; /* direction marks: invisible, and they can make text lie about its order */
    return cp;
}

ibid_err ibidi_xt_norm_text(ibidi_xt_norm *n, const char *p, size_t len) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < len;) {
        size_t run = i;
        while (run < len && run - i < CARRY && p[run] >= 0x20 && p[run] < 0x7F) run++;
        if (run > i) {
            n->after_cr = false;
            e = ibid_buf_append(&n->carry, p + i, run - i);
            i = run;
        } else {
            uint32_t cp = 0xFFFD;
            size_t step = ibidi_xt_utf8_next(p + i, len - i, &cp);
            i += step ? step : 1;
            bool crlf = n->after_cr && cp == '\n';
            n->after_cr = cp == '\r';
            uint32_t to = cp == '\r' ? '\n' : map_char(cp);
            char utf8[4];
            if (!crlf && to) e = ibid_buf_append(&n->carry, utf8, ibidi_xt_utf8_put(to, utf8));
        }
        if (!e && n->carry.len >= CARRY) e = settle(n, false);
    }
    return e;
}

ibid_err ibidi_xt_norm_puts(ibidi_xt_norm *n, const char *s) {
    return ibidi_xt_norm_text(n, s, strlen(s));
}

ibid_err ibidi_xt_norm_break(ibidi_xt_norm *n, size_t blank) {
    ibid_err e = settle(n, true);
    n->after_cr = false;
    n->n_gap = 0;
    if (n->newlines < blank + 1) n->newlines = blank + 1;
    return e;
}

ibid_err ibidi_xt_norm_locator(ibidi_xt_norm *n, const char *s, size_t len) {
    ibid_err e = settle(n, true);
    n->n_locator = ibidi_xt_utf8_cut(s, len, sizeof n->locator);
    memcpy(n->locator, s, n->n_locator);
    n->has_locator = true;
    return e;
}

ibid_err ibidi_xt_norm_flush(ibidi_xt_norm *n) {
    ibid_err e = settle(n, true);
    return e ? e : hand_on(n);
}

static ibid_err line_text(void *arg, ibid_str piece) {
    return ibid_buf_append(arg, piece.s, piece.n);
}

ibid_err ibidi_xt_norm_line(const char *p, size_t n, size_t max, ibid_buf *out) {
    ibid_buf b;
    ibid_buf_init(&b, BUFFER_MAX);
    ibid_extract_sink sink = {.arg = &b, .text = line_text};
    ibidi_xt_norm norm;
    ibid_err e = ibidi_xt_norm_init(&norm, &sink);
    /* Four times the limit is enough to fill it: composing shrinks text by less. */
    if (!e) e = ibidi_xt_norm_text(&norm, p, ibidi_xt_utf8_cut(p, n, 4 * max));
    if (!e) e = ibidi_xt_norm_flush(&norm);
    bool gap = false;
    size_t start = out->len;
    for (size_t i = 0; !e && i < b.len;) {
        uint32_t cp;
        size_t step = ibidi_xt_utf8_next(b.data + i, b.len - i, &cp);
        if (!step) break;
        if (cp == ' ' || cp == '\n' || cp == '\t') {
            gap = true;
        } else {
            if (out->len - start + step + 1 > max) break;
            if (gap && out->len > start) e = ibid_buf_append(out, " ", 1);
            if (!e) e = ibid_buf_append(out, b.data + i, step);
            gap = false;
        }
        i += step;
    }
    ibidi_xt_norm_fini(&norm);
    ibid_buf_fini(&b);
    return e;
}
