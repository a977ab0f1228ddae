#include "retriever/sentences.h"

#include <string.h>
#include <unicode/ubrk.h>
#include <unicode/utext.h>

/* A line feed that only wraps a paragraph reads as a space (one byte each, so offsets stay). */
static void unwrap(char *s, size_t n) {
    for (size_t i = 1; i + 1 < n; i++) {
        if (s[i] != '\n' || s[i - 1] == '\n' || s[i + 1] == '\n') continue;
        if (strchr("-*+#|>\t", s[i + 1]) || (s[i + 1] >= '0' && s[i + 1] <= '9')) continue;
        s[i] = ' ';
    }
}

static bool blank(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static ibid_err walk(const char *s, size_t n, UBreakIterator *b, ibidi_sentence *out,
                     size_t *count) {
    int32_t from = ubrk_first(b);
    for (int32_t to = ubrk_next(b); to != UBRK_DONE; from = to, to = ubrk_next(b)) {
        size_t start = (size_t)from, end = (size_t)to;
        while (start < end && blank(s[start])) start++;
        while (end > start && blank(s[end - 1])) end--;
        if (end > start && end <= n) out[(*count)++] = (ibidi_sentence){start, end};
    }
    return IBID_OK;
}

ibid_err ibidi_sentences(ibid_str text, ibidi_sentence **out, size_t *n) {
    UErrorCode status = U_ZERO_ERROR;
    UText *ut = NULL;
    UBreakIterator *b = NULL;
    ibid_err e = IBID_OK;
    *out = NULL;
    *n = 0;
    if (text.n == 0) return IBID_OK;
    if (text.n > INT32_MAX) return ibid_fail(IBID_TOOBIG, "a chunk of %zu bytes", text.n);
    char *copy = ibid_strndup(text.s, text.n);
    if (!copy) return ibid_fail(IBID_NOMEM, "out of memory for a chunk");
    unwrap(copy, text.n);
    ut = utext_openUTF8(NULL, copy, (int64_t)text.n, &status);
    b = ubrk_open(UBRK_SENTENCE, "en", NULL, 0, &status);
    if (U_SUCCESS(status)) ubrk_setUText(b, ut, &status);
    if (U_FAILURE(status)) {
        e = ibid_fail(IBID_BACKEND, "ICU sentence boundaries: %s", u_errorName(status));
        goto done;
    }
    size_t most = 0;
    (void)ubrk_first(b);
    while (ubrk_next(b) != UBRK_DONE) most++;
    *out = ibid_calloc(most, sizeof **out);
    e = *out ? walk(copy, text.n, b, *out, n)
             : ibid_fail(IBID_NOMEM, "out of memory for sentences");
done:
    if (b) ubrk_close(b);
    if (ut) utext_close(ut);
    ibid_free(copy);
    return e;
}
