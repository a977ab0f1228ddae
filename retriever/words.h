/* Words of a text as the lexical index sees them. Pure: no database here.
 *
 * A word is a run of letters, digits and marks; it is folded (NFKC, case, diacritics of Latin,
 * Greek, Cyrillic, Hebrew and Arabic) and, if it is English-looking (a-z), stemmed (Snowball
 * "english"). Codes and names are findable whole and in parts: "X-15" gives x15, x, 15;
 * "192.168.0.1" itself and its numbers; "RFC7693" rfc7693, rfc, 7693; "1,000" 1000; "C++" c++ and
 * c; "Watson's" watson. Scripts written without spaces (Han, Kana, Thai, ...) and Hangul give pairs
 * of characters, and each character alone. A symbol such as an emoji is a word of its own. */
#ifndef IBID_RETRIEVER_WORDS_H
#define IBID_RETRIEVER_WORDS_H

#include "rpc/base/err.h"

#include <stdint.h>

enum {
    IBIDI_WORD_MAX = 128
}; /* bytes of a word; longer ones are cut, in texts and questions alike */

typedef struct ibidi_word {
    const char *s; /* folded and stemmed UTF-8, valid during the callback */
    size_t n;
    size_t start, end; /* source bytes */
    bool extra;        /* another form of a word that was or will be given: no length of its own */
    bool stop;         /* an English function word, before stemming */
} ibidi_word;

/* One thread at a time. */
typedef struct ibidi_words ibidi_words;
ibid_err ibidi_words_open(ibidi_words **out);
void ibidi_words_close(ibidi_words *w);

/* Calls fn for each word in order; a non-zero return of fn stops and is returned. Invalid UTF-8
 * bytes separate words. query: of a run of characters without spaces only the pairs are given,
 * unless the run has one character. */
int ibidi_words_each(ibidi_words *w, const char *text, size_t n, bool query,
                     int (*fn)(void *, const ibidi_word *), void *arg);
#endif
