/* Occurrences of a query in a text, whatever their case, Unicode form and white space. Pure.
 *
 * Both are folded to NFKD with case folding; default-ignorable characters vanish (soft hyphens,
 * joiners) and a run of white space is one space. An occurrence begins and ends at whole characters
 * of the text with all their marks: "e" is not found in an e with an accent, however that is
 * encoded. */
#ifndef IBID_RETRIEVER_FOLDED_H
#define IBID_RETRIEVER_FOLDED_H

#include "kvstore/kvstore.h"
#include "retriever/words.h"

typedef struct ibidi_occurrence {
    uint64_t start, end; /* bytes of the text */
    bool same;           /* the very bytes of the query, white space around it left out */
} ibidi_occurrence;

/* Up to max, in order, not overlapping. *out: ibid_free. A query without a visible character has
 * none. Errors: NOMEM. */
ibid_err ibidi_occurrences(ibid_str text, ibid_str query, size_t max, ibidi_occurrence **out,
                           size_t *n);

/* Runs of words with the stems of the query's words, in its order, nothing but other characters
 * between them. Same order and limits; `same` is false. A query of function words alone has none.
 */
ibid_err ibidi_stemmed_occurrences(ibidi_words *w, ibid_str text, ibid_str query, size_t max,
                                   ibidi_occurrence **out, size_t *n);
#endif
