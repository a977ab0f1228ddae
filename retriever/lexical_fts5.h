/* The lexical index of one collection: one row per chunk with its document's title, in SQLite FTS5
 * with its own content. Sole includer of sqlite3 is lexical_fts5.c.
 *
 * The file is derived data. It carries a stamp (schema, collection, the store's generation it
 * reflects) and, while nothing is being written, a seal beside it: size and checksum of the whole
 * file. Opened with a broken seal, a failed check, another stamp or a foreign format, it is thrown
 * away with a log line and starts empty at generation 0; the caller then fills it from the store.
 *
 * Not for two threads at once, except ibidi_lexical_search. CORRUPT from any call means: reset it
 * and fill it again. */
#ifndef IBID_RETRIEVER_LEXICAL_H
#define IBID_RETRIEVER_LEXICAL_H

#include "kvstore/kvstore.h"

typedef struct ibidi_lexical ibidi_lexical;

/* identity: text that must be equal for the file to be ours ("3 notes 1700000000000"). The folder
 * of path exists. Errors: BUSY (another process has it open), DISKFULL, IO, NOMEM. */
ibid_err ibidi_lexical_open(const char *path, const char *identity, ibidi_lexical **out);
/* Seals what is committed. NULL is fine. */
void ibidi_lexical_close(ibidi_lexical *l);
uint64_t ibidi_lexical_generation(const ibidi_lexical *l); /* 0: empty, fill it */
/* Throws the file away and starts an empty one. */
ibid_err ibidi_lexical_reset(ibidi_lexical *l);

/* Changes: begin, any of remove and add, commit with the generation now reflected (0 keeps the old
 * stamp: more is to come) or rollback. */
ibid_err ibidi_lexical_begin(ibidi_lexical *l);
ibid_err ibidi_lexical_remove(ibidi_lexical *l, uint64_t document);
/* chunk < 2^24, document < 2^39. */
ibid_err ibidi_lexical_add(ibidi_lexical *l, uint64_t document, uint64_t chunk, ibid_str title,
                           ibid_str text);
ibid_err ibidi_lexical_commit(ibidi_lexical *l, uint64_t generation);
void ibidi_lexical_rollback(ibidi_lexical *l);
/* Moves the log into the file and writes the seal, if anything was written since. */
ibid_err ibidi_lexical_seal(ibidi_lexical *l);

typedef struct ibidi_lexical_hit {
    uint64_t document, chunk;
    double score; /* BM25 (k1 1.2, b 0.75), above 0 */
} ibidi_lexical_hit;

/* The best `limit` chunks that hold any word of the question, best first. No character of the
 * question has a meaning as syntax. *out is freed with ibid_free; *all: there are no more than
 * these. */
ibid_err ibidi_lexical_search(ibidi_lexical *l, ibid_str question, size_t limit,
                              ibidi_lexical_hit **out, size_t *n, bool *all);
/* The greatest BM25 a text could have for the question, were every word in it without end: 2.2 (k1
 * + 1) times the sum of the words' inverse frequencies, function words left out; 0: no word. */
ibid_err ibidi_lexical_most(ibidi_lexical *l, ibid_str question, double *out);
/* Chunks that a look-up means: those that hold a code of the question (a word of letters and digits
 * that at most IBIDI_CODE_ROWS chunks hold), or all words of a question of at most
 * IBIDI_LOOKUP_WORDS, if at most IBIDI_LOOKUP_ROWS do. *out is freed with ibid_free. */
enum { IBIDI_CODE_ROWS = 3, IBIDI_LOOKUP_WORDS = 3, IBIDI_LOOKUP_ROWS = 10 };
ibid_err ibidi_lexical_exact(ibidi_lexical *l, ibid_str question, ibidi_lexical_hit **out,
                             size_t *n);
/* Share 0..1 of the question's word weight (inverse frequency in this index and 300 rows more that
 * hold none of the words, so that a share means the same in a small one; function words left out)
 * that a text holds; 0 when the question has no word. */
ibid_err ibidi_lexical_share(ibidi_lexical *l, ibid_str question, ibid_str title, ibid_str text,
                             double *out);

ibid_err ibidi_lexical_rows(ibidi_lexical *l, uint64_t *out);
/* Rows of one document. */
ibid_err ibidi_lexical_document_rows(ibidi_lexical *l, uint64_t document, uint64_t *out);
/* SQLite's and FTS5's own integrity checks. Errors: CORRUPT with what they say. */
ibid_err ibidi_lexical_check(ibidi_lexical *l);
uint64_t ibidi_lexical_bytes(const ibidi_lexical *l);
#endif
