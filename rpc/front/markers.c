#include "rpc/front/markers.h"

#include <ctype.h>
#include <string.h>
#include <strings.h>

static bool is_word(char c) {
    return isalnum((unsigned char)c) || (c & 0x80);
}

/* The next word at or after *at; false at the end. */
static bool next_word(ibid_str t, size_t *at, ibid_str *word) {
    while (*at < t.n && !is_word(t.s[*at])) ++*at;
    size_t start = *at;
    while (*at < t.n && is_word(t.s[*at])) ++*at;
    *word = (ibid_str){t.s + start, *at - start};
    return word->n > 0;
}

static bool contains_word(ibid_str text, ibid_str word) {
    ibid_str w;
    for (size_t at = 0; next_word(text, &at, &w);)
        if (w.n == word.n && strncasecmp(w.s, word.s, w.n) == 0) return true;
    return false;
}

static size_t shared_words(ibid_str sentence, ibid_str quote) {
    size_t n = 0, at = 0;
    for (ibid_str w; next_word(sentence, &at, &w);)
        if (w.n >= 3 && contains_word(quote, w)) n++;
    return n;
}

/* One past the sentence that starts at `from`: its final punctuation, or the text's end. */
static size_t sentence_end(ibid_str t, size_t from) {
    for (size_t i = from; i < t.n; i++) {
        bool stop = t.s[i] == '.' || t.s[i] == '!' || t.s[i] == '?' || t.s[i] == '\n';
        if (stop && (i + 1 == t.n || isspace((unsigned char)t.s[i + 1]))) return i + 1;
    }
    return t.n;
}

void ibidi_marker_places(ibid_str answer, const ibid_str *quotes, size_t n, size_t *places) {
    size_t end = answer.n;
    while (end > 0 && isspace((unsigned char)answer.s[end - 1])) end--;
    for (size_t q = 0; q < n; q++) {
        size_t best = 0;
        places[q] = end;
        for (size_t from = 0; from < end;) {
            size_t to = sentence_end(answer, from);
            size_t shared = shared_words((ibid_str){answer.s + from, to - from}, quotes[q]);
            if (shared > best) {
                best = shared;
                places[q] = to < end ? to : end;
            }
            from = to;
        }
    }
}
