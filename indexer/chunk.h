/* Cutting a document into chunks, and the title line that heads each block.
 *
 * Boundaries depend on what lies nearby only, so that an edit changes the chunks around it and no
 * others. Two rules give that:
 *   - Text is tokenised in slabs that end at paragraph ends chosen by their own last bytes
 *     (ibid_chunk_slab), so token ids depend on nearby text only.
 *   - A chunk ends at the best kind of place between its bounds (heading, paragraph, line after a
 *     sentence, sentence, line, word); among equals at the one whose nearby bytes have the lowest
 * hash. Two runs of cuts that started at different places meet at such a place soon and stay
 * together. */
#ifndef IBID_INDEXER_CHUNK_H
#define IBID_INDEXER_CHUNK_H

#include "attention/attention.h"

enum {
    IBID_CHUNK_MIN = 96,    /* tokens, but for a document's last chunk */
    IBID_TITLE_TOKENS = 24, /* of a title; a line feed follows */
    IBID_SLAB_MIN = 32 * 1024,
    IBID_SLAB_MAX = 1024 * 1024
};

typedef struct ibid_locator { /* holds from its offset to the next one's */
    uint64_t at;
    ibid_str name;
} ibid_locator;

typedef struct ibid_cut {
    uint64_t start, end;     /* bytes */
    size_t token0, n_tokens; /* its tokens: exactly these bytes */
    ibid_str locator;        /* borrowed from the locators */
} ibid_cut;

/* Cuts text [n] with n_tokens tokens ending at ends[] (the last one at n) into chunks of at most
 * max_tokens tokens, in order, without overlap; white space between chunks belongs to none. A text
 * of at most max_tokens tokens is one chunk. Pure. *out: one allocation (ibid_free). Errors: INVAL
 * (ends not ascending or not ending at n; max_tokens under IBID_CHUNK_MIN + 16), NOMEM. */
ibid_err ibid_chunk_cut(ibid_str text, const uint64_t *ends, size_t n_tokens,
                        const ibid_locator *locators, size_t n_locators, size_t max_tokens,
                        ibid_cut **out, size_t *n_out);

/* Bytes of the next slab of a text, all of it when it is short. Never 0 unless n is. */
size_t ibid_chunk_slab(const char *p, size_t n);

/* How much of a title to keep, given its tokens' ends: the bytes of at most IBID_TITLE_TOKENS
 * tokens, cut at the end of a word where there is one. */
size_t ibid_chunk_title(ibid_str title, const uint64_t *ends, size_t n_tokens);
#endif
