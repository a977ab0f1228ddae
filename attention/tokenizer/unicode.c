#include "attention/tokenizer/internal.h"

struct range {
    uint32_t first, last;
    uint8_t cls;
};

#include "attention/tokenizer/unicode_table.h"

/* The code points of Unicode's White_Space property. */
static bool is_space(uint32_t c) {
    return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
           c == 0x205F || c == 0x3000;
}

ibidi_class ibidi_unicode_class(uint32_t cp) {
    if (cp < 0x80) {
        if ((cp | 0x20) >= 'a' && (cp | 0x20) <= 'z') return IBIDI_LETTER;
        if (cp >= '0' && cp <= '9') return IBIDI_NUMBER;
    }
    if (is_space(cp)) return IBIDI_SPACE;
    size_t low = 0, high = sizeof ranges / sizeof *ranges;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (cp > ranges[mid].last)
            low = mid + 1;
        else if (cp < ranges[mid].first)
            high = mid;
        else
            return (ibidi_class)ranges[mid].cls;
    }
    return IBIDI_OTHER;
}

/* The length of the well-formed UTF-8 sequence at s (Unicode, table 3-7), or 0. */
static size_t utf8_length(const unsigned char *s, size_t n) {
    unsigned char a = s[0], low = 0x80, high = 0xBF;
    size_t len = a < 0x80 ? 1 : a >= 0xC2 && a <= 0xDF ? 2 : a >= 0xE0 && a <= 0xEF ? 3 : 4;
    if (len == 1) return 1;
    if ((a < 0xC2 || a > 0xF4) || len > n) return 0;
    if (a == 0xE0) low = 0xA0;
    if (a == 0xED) high = 0x9F;
    if (a == 0xF0) low = 0x90;
    if (a == 0xF4) high = 0x8F;
    if (s[1] < low || s[1] > high) return 0;
    for (size_t i = 2; i < len; i++)
        if (s[i] < 0x80 || s[i] > 0xBF) return 0;
    return len;
}

uint32_t ibidi_utf8_decode(const char *text, size_t n, size_t *len) {
    const unsigned char *s = (const unsigned char *)text;
    *len = utf8_length(s, n);
    switch (*len) {
    case 1:
        return s[0];
    case 2:
        return (uint32_t)(s[0] & 0x1F) << 6 | (uint32_t)(s[1] & 0x3F);
    case 3:
        return (uint32_t)(s[0] & 0x0F) << 12 | (uint32_t)(s[1] & 0x3F) << 6 |
               (uint32_t)(s[2] & 0x3F);
    case 4:
        return (uint32_t)(s[0] & 0x07) << 18 | (uint32_t)(s[1] & 0x3F) << 12 |
               (uint32_t)(s[2] & 0x3F) << 6 | (uint32_t)(s[3] & 0x3F);
    default:
        *len = 1;
        return 0x110000u + s[0];
    }
}
