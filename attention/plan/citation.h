/* Where an answer comes from: the sentences of the blocks it was written from, as byte ranges of
 * their documents. Pure: no model, no store.
 *
 * A sentence counts by the answer's words it holds (case-folded; a word that few sentences hold
 * counts more, one the question has already counts half), by the longest run of words it shares
 * with the answer, and by the attention the answer's tokens gave it. A sentence that shares no word
 * with the answer is never cited. Titles have no byte range, so they cannot be. */
#ifndef IBID_ATTENTION_CITATION_H
#define IBID_ATTENTION_CITATION_H

#include "kvstore/kvstore.h"

typedef struct ibid_cite_block {
    ibid_str text;       /* the document's whole normalised text */
    uint64_t start, end; /* the chunk in it */
    /* [n_tokens] where each token behind the title ends in the document, and the attention it got;
     * both NULL: unknown. */
    const uint64_t *token_ends;
    const float *mass;
    size_t n_tokens;
} ibid_cite_block;

typedef struct ibid_cite {
    size_t block;        /* index of the ibid_cite_block */
    uint64_t start, end; /* in the document's text; whole UTF-8 characters, no white space around */
    double weight;       /* 0..1 */
} ibid_cite;

/* At most max_quotes of at most quote_bytes each into out [max_quotes], heaviest first. Blocks in
 * descending relevance (it breaks ties). Errors: NOMEM. */
ibid_err ibid_cite_find(ibid_str answer, ibid_str question, const ibid_cite_block *blocks, size_t n,
                        size_t max_quotes, size_t quote_bytes, ibid_cite *out, size_t *n_out);

/* The quote for a passage [start, end) of a text: the sentence [from, to) around it or, where that
 * is longer than quote_bytes, as much of it as fits to both sides of the passage, cut between
 * words. Only the byte range of *out is set. */
void ibid_cite_around(ibid_str text, uint64_t start, uint64_t end, uint64_t from, uint64_t to,
                      size_t quote_bytes, ibid_cite *out);

/* Ends of tokens in a document: pieces [n] are the tokens' bytes in order, which together are the
 * text from start to end, but for bytes that no token stands for. */
void ibid_cite_token_ends(ibid_str text, uint64_t start, uint64_t end, const ibid_str *pieces,
                          size_t n, uint64_t *ends);
#endif
