/* What find may return of one document: its spans and entities (spans.h) and sentences, with the
 * stored tokens each covers. Made when a document is first searched, then kept in memory for the
 * documents searched last. */
#ifndef IBID_RETRIEVER_CANDIDATES_H
#define IBID_RETRIEVER_CANDIDATES_H

#include "retriever/engine.h"
#include "retriever/rank.h"
#include "retriever/spans.h"

typedef struct ibidi_place { /* tokens of one chunk, its title's tokens not counted */
    uint32_t chunk, from, to;
} ibidi_place;

typedef struct ibidi_sentence_at {
    uint64_t start, end; /* bytes of the document's text */
    ibidi_place at;
} ibidi_sentence_at;

typedef struct ibidi_candidates {
    struct ibidi_candidates *next;
    size_t refs, bytes;
    uint64_t document, generation; /* the document's, as the store counts them */
    ibid_hash model, content;
    ibidi_spans spans;
    ibidi_place *places; /* [spans.n] */
    ibidi_sentence_at *sentences;
    size_t n_sentences;
    uint64_t *stems; /* of entity i: stems[stem_at[i]] to [stem_at[i + 1]) */
    size_t *stem_at; /* [n_entities + 1] */
    float *tokens;   /* [n_entities] tokens a word of the best form */
    double *base;    /* [n_entities] ln P(name | "Names:"); NAN: not asked yet */
} ibidi_candidates;

typedef struct ibidi_candidate_cache {
    pthread_mutex_t mu;
    ibidi_candidates *first; /* last used first */
    size_t bytes;
} ibidi_candidate_cache;
ibid_err ibidi_candidate_cache_open(ibidi_candidate_cache **out);
void ibidi_candidate_cache_close(ibidi_candidate_cache *c);

typedef struct ibidi_searched { /* the document; all borrowed */
    ibidi_retriever *r;
    ibid_snap *snap;
    const ibid_document *doc;
    const ibid_hash *model;
    ibid_str text;
    const ibid_chunk *chunks;
    size_t n_chunks;
} ibidi_searched;

/* Give back with ibidi_candidates_release. Errors: NOMEM, CORRUPT, UNAVAIL and TIMEOUT (nobody
 * tells the tokens' places). */
ibid_err ibidi_candidates_get(const ibidi_searched *d, ibidi_candidates **out);
void ibidi_candidates_release(ibidi_retriever *r, ibidi_candidates *c);
#endif
