/* Characters of UTF-8 text. */
#ifndef IBID_ATTENTION_CHARS_H
#define IBID_ATTENTION_CHARS_H

#include <stdbool.h>
#include <stdint.h>
#include <utf8proc.h>

/* The character at p, its length in *len (1 for a byte that is none, which is -1). n > 0. */
static inline int32_t ibidi_char_at(const char *p, size_t n, size_t *len) {
    utf8proc_int32_t c = -1;
    utf8proc_ssize_t k = utf8proc_iterate((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)n, &c);
    *len = k > 0 ? (size_t)k : 1;
    return k > 0 ? c : -1;
}

/* Letters, marks and numbers. */
static inline bool ibidi_is_word_char(int32_t c) {
    utf8proc_category_t g = c < 0 ? UTF8PROC_CATEGORY_CN : utf8proc_category(c);
    return g >= UTF8PROC_CATEGORY_LU && g <= UTF8PROC_CATEGORY_NO;
}
#endif
