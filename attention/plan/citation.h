/* Citations: which bytes of which documents an answer rests on (docs/design.md section 6).
 *
 * Two witnesses are combined. Attention: the mass that the retrieval heads' query heads gave to
 * each block token while the answer was decoded. Overlap: the answer's words that stand in the
 * text, weighted by how rare they are among the blocks, so that names and numbers count and "the"
 * does not. Candidates are whole sentences of the chunk; a sentence longer than quote_bytes is cut,
 * at word boundaries, to the window around its best words. A quote is a copy of its byte range by
 * construction, and the caller's check against the stored text comes on top.
 *
 * Pure functions: no model, no store. */
#ifndef IBID_ATTENTION_CITATION_H
#define IBID_ATTENTION_CITATION_H

#include "rpc/base/err.h"

#include <stddef.h>
#include <stdint.h>

/* One block of the plan, as the answer saw it. */
typedef struct ibid_cite_block {
    uint64_t document, chunk;
    const char *text; /* the chunk's text (without its title line) */
    size_t n_text;
    uint64_t doc_start;   /* where the chunk starts in the document's normalised text */
    size_t n_tokens;      /* tokens of the chunk, title's excluded */
    const uint64_t *ends; /* [n_tokens] byte offset in text where each token ends */
    const float *mass;    /* [n_tokens] attention mass, or NULL */
} ibid_cite_block;

typedef struct ibid_cite_options {
    size_t max_quotes, quote_bytes; /* 0 = 3 and 300 */
} ibid_cite_options;

typedef struct ibid_cite {
    size_t block;      /* index into blocks */
    size_t start, end; /* bytes of that block's text: on UTF-8 boundaries, no outer white space */
    double weight;     /* descending; > 0 */
} ibid_cite;

/* Chooses at most max_quotes quotes into out (room for max_quotes; 3 when 0). None when the answer
 * has no words, or nothing supports it. question: its words count little, since the answer repeats
 * them wherever it is found. Errors: NOMEM. */
ibid_err ibid_cite_choose(const char *answer, size_t n_answer, const char *question,
                          size_t n_question, const ibid_cite_block *blocks, size_t n_blocks,
                          const ibid_cite_options *o, ibid_cite *out, size_t *n_out);

/* End of the sentence that starts at `from`: one past its final punctuation and closing quotes; a
 * blank line always ends one. Abbreviations of one letter ("J. Smith") and numbers ("3.5") do not.
 */
size_t ibid_sentence_end(const char *text, size_t n, size_t from);
#endif
