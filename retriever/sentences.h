/* Sentences of a chunk. Pure. */
#ifndef IBID_RETRIEVER_SENTENCES_H
#define IBID_RETRIEVER_SENTENCES_H

#include "kvstore/kvstore.h"

typedef struct ibidi_sentence { /* bytes of the text, white space around it left out */
    size_t start, end;
} ibidi_sentence;

/* Unicode sentence boundaries (UAX #29, by ICU); a single line feed inside a paragraph ends none,
 * unless a list item, heading or table row follows. *out: ibid_free. Errors: NOMEM, BACKEND. */
ibid_err ibidi_sentences(ibid_str text, ibidi_sentence **out, size_t *n);
#endif
