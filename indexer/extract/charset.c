/* Which character set a file is in, and its bytes as UTF-8. */
#include "indexer/extract/internal.h"

#include <stdio.h>
#include <string.h>

size_t ibidi_xt_utf8_next(const char *p, size_t n, uint32_t *cp) {
    const unsigned char *s = (const unsigned char *)p;
    if (n == 0) return 0;
    if (s[0] < 0x80) return *cp = s[0], 1;
    size_t len = s[0] >= 0xF0 ? 4 : s[0] >= 0xE0 ? 3 : 2;
    if (s[0] < 0xC2 || s[0] > 0xF4 || n < len) return 0;
    uint32_t c = s[0] & (0xFFu >> (len + 1));
    for (size_t i = 1; i < len; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0;
        c = c << 6 | (s[i] & 0x3F);
    }
    if (len == 3 && (c < 0x800 || (c >= 0xD800 && c <= 0xDFFF))) return 0;
    if (len == 4 && (c < 0x10000 || c > 0x10FFFF)) return 0;
    *cp = c;
    return len;
}

size_t ibidi_xt_utf8_put(uint32_t cp, char out[4]) {
    if (cp < 0x80) return out[0] = (char)cp, 1;
    size_t len = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    for (size_t i = len - 1; i > 0; i--, cp >>= 6) out[i] = (char)(0x80 | (cp & 0x3F));
    out[0] = (char)((len == 2 ? 0xC0 : len == 3 ? 0xE0 : 0xF0) | cp);
    return len;
}

size_t ibidi_xt_utf8_cut(const char *p, size_t n, size_t max) {
    if (n <= max) return n;
    while (max > 0 && ((unsigned char)p[max] & 0xC0) == 0x80) max--;
    return max;
}

/* Length of the run of ASCII bytes at p, eight at a time. */
static size_t ascii_run(const char *p, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t w;
        memcpy(&w, p + i, 8);
        if (w & 0x8080808080808080u) break;
    }
    while (i < n && (unsigned char)p[i] < 0x80) i++;
    return i;
}

static size_t count_controls(const char *p, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)p[i];
        count += c < 0x20 && c != '\n' && c != '\r' && c != '\t' && c != '\f' && c != 0x1B;
    }
    return count;
}

ibidi_xt_encoding ibidi_xt_charset_detect(const char *p, size_t n) {
    ibidi_xt_encoding e = {.set = IBIDI_UTF8};
    const unsigned char *s = (const unsigned char *)p;
    if (n >= 4 && memcmp(p, "\xFF\xFE\0\0", 4) == 0) return e.set = IBIDI_BINARY, e;
    if (n >= 2 && s[0] == 0xFF && s[1] == 0xFE)
        return (ibidi_xt_encoding){.set = IBIDI_UTF16LE, .bom = 2};
    if (n >= 2 && s[0] == 0xFE && s[1] == 0xFF)
        return (ibidi_xt_encoding){.set = IBIDI_UTF16BE, .bom = 2};
    if (n >= 3 && memcmp(p, "\xEF\xBB\xBF", 3) == 0) e.bom = 3;
    if (n > 0 && memchr(p, '\0', n)) return e.set = IBIDI_BINARY, e;

    size_t good = 0;
    for (size_t i = e.bom; i < n;) {
        uint32_t cp;
        size_t run = ascii_run(p + i, n - i);
        if (run) {
            i += run;
            continue;
        }
        size_t len = ibidi_xt_utf8_next(p + i, n - i, &cp);
        good += len > 0;
        if (!len && e.bad++ == 0) e.first_bad = i;
        i += len ? len : 1;
    }
    /* More than a few control characters, and over a hundredth: not text in any of these sets. */
    if (count_controls(p, n) > 4 + n / 100)
        e.set = IBIDI_BINARY;
    else if (e.bad)
        e.set = good > 3 * e.bad ? IBIDI_UTF8_DAMAGED : IBIDI_WINDOWS_1252;
    return e;
}

ibid_doc_state ibidi_xt_charset_state(const ibidi_xt_encoding *enc,
                                      char reason[IBID_EXTRACT_REASON_MAX]) {
    reason[0] = '\0';
    if (enc->set == IBIDI_BINARY) {
        (void)snprintf(reason, IBID_EXTRACT_REASON_MAX, "a binary file, not text");
        return IBID_DOC_UNSUPPORTED;
    }
    if (enc->set == IBIDI_WINDOWS_1252) {
        (void)snprintf(reason, IBID_EXTRACT_REASON_MAX,
                       "not UTF-8 (byte %zu): read as Windows-1252; save it as UTF-8 if letters "
                       "look wrong",
                       enc->first_bad);
        return IBID_DOC_PARTIAL;
    }
    if (enc->set == IBIDI_UTF8_DAMAGED) {
        (void)snprintf(reason, IBID_EXTRACT_REASON_MAX,
                       "%zu places are not UTF-8 (the first at byte %zu): U+FFFD stands there",
                       enc->bad, enc->first_bad);
        return IBID_DOC_PARTIAL;
    }
    return IBID_DOC_READY;
}

/* Bytes 0x80 to 0x9F of Windows-1252; its five holes become U+FFFD. */
static const uint16_t high_1252[32] = {
    0x20AC, 0xFFFD, 0x201A, 0x0192, 0x201E, 0x2026, 0x2020, 0x2021, 0x02C6, 0x2030, 0x0160,
    0x2039, 0x0152, 0xFFFD, 0x017D, 0xFFFD, 0xFFFD, 0x2018, 0x2019, 0x201C, 0x201D, 0x2022,
    0x2013, 0x2014, 0x02DC, 0x2122, 0x0161, 0x203A, 0x0153, 0xFFFD, 0x017E, 0x0178};

/* One character at p in the given set: its code point and the bytes it took. */
static size_t next_char(ibidi_xt_charset set, const unsigned char *p, size_t n, uint32_t *cp) {
    if (set == IBIDI_WINDOWS_1252) {
        *cp = p[0] >= 0x80 && p[0] < 0xA0 ? high_1252[p[0] - 0x80] : p[0];
        return 1;
    }
    if (set == IBIDI_UTF16LE || set == IBIDI_UTF16BE) {
        bool le = set == IBIDI_UTF16LE;
        *cp = 0xFFFD;
        if (n < 2) return n;
        uint32_t a = le ? (uint32_t)(p[0] | p[1] << 8) : (uint32_t)(p[1] | p[0] << 8);
        if (a < 0xD800 || a > 0xDFFF) return *cp = a, 2;
        if (a > 0xDBFF || n < 4) return 2;
        uint32_t b = le ? (uint32_t)(p[2] | p[3] << 8) : (uint32_t)(p[3] | p[2] << 8);
        if (b < 0xDC00 || b > 0xDFFF) return 2;
        *cp = 0x10000 + ((a - 0xD800) << 10) + (b - 0xDC00);
        return 4;
    }
    size_t len = ibidi_xt_utf8_next((const char *)p, n, cp);
    if (len) return len;
    *cp = 0xFFFD;
    return 1;
}

ibid_err ibidi_xt_charset_decode(const ibidi_xt_encoding *enc, const char *p, size_t n,
                                 ibid_err (*fn)(void *arg, const char *p, size_t n), void *arg) {
    enum { PIECE = 32 * 1024 };
    ibid_err e = IBID_OK;
    size_t i = enc->bom < n ? enc->bom : n;
    if (enc->set == IBIDI_BINARY) return IBID_OK;
    if (enc->set == IBIDI_UTF8) {
        while (!e && i < n) {
            size_t len = ibidi_xt_utf8_cut(p + i, n - i, PIECE);
            e = fn(arg, p + i, len);
            i += len;
        }
        return e;
    }
    char piece[PIECE + 4];
    size_t used = 0;
    while (!e && i < n) {
        uint32_t cp;
        i += next_char(enc->set, (const unsigned char *)p + i, n - i, &cp);
        used += ibidi_xt_utf8_put(cp, piece + used);
        if (used < PIECE && i < n) continue;
        e = fn(arg, piece, used);
        used = 0;
    }
    return e;
}

static ibid_err append(void *arg, const char *p, size_t n) {
    return ibid_buf_append(arg, p, n);
}

ibid_err ibidi_xt_charset_whole(const ibidi_xt_encoding *enc, const char *p, size_t n,
                                ibid_buf *buf, ibid_str *out) {
    if (enc->set == IBIDI_UTF8) {
        *out = (ibid_str){p + enc->bom, n - enc->bom};
        return IBID_OK;
    }
    ibid_err e = ibidi_xt_charset_decode(enc, p, n, append, buf);
    if (!e) *out = (ibid_str){buf->data ? buf->data : "", buf->len};
    return e;
}
