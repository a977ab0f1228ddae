/* What the parts of find share: one question to one document while it is being answered. */
#ifndef IBID_RETRIEVER_FIND_INTERNAL_H
#define IBID_RETRIEVER_FIND_INTERNAL_H

#include "retriever/candidates.h"
#include "retriever/engine.h"

typedef enum ibidi_match_kind {
    IBIDI_MATCH_EXACT,
    IBIDI_MATCH_FORM,
    IBIDI_MATCH_NAME,
    IBIDI_MATCH_SENTENCE,
    IBIDI_MATCH_DATE,
    IBIDI_MATCH_NUMBER,
    IBIDI_MATCH_QUOTE,
    IBIDI_MATCH_ADDRESS
} ibidi_match_kind;

typedef struct ibidi_match_span {
    uint64_t start, end;
    double score;
    ibidi_match_kind kind;
    uint32_t entity; /* or UINT32_MAX */
} ibidi_match_span;

typedef struct ibidi_finder {
    ibidi_retriever *r;
    ibidi_collection *c;
    ibid_snap *snap;
    const ibid_find_request *q;
    ibidi_question question;
    ibid_document doc;
    const ibid_chunk *chunks;
    size_t n_chunks;
    ibid_buf text;
    ibidi_candidates *found;
    ibidi_match_span *spans; /* the n_exact first ones exact, by position */
    size_t n, room, n_exact, most;
    double threshold, find_keys; /* of entities; of sentences, by the calibration */
    bool with_gain;
    size_t scored;  /* chunks */
    int32_t *best;  /* [n_entities, question tokens] */
    double *scores; /* [n_entities] probabilities */
    ibidi_asked asked;
    double *features; /* [n_entities, IBIDI_FEATURES] */
} ibidi_finder;

ibid_err ibidi_find_add(ibidi_finder *f, ibidi_match_span s);
/* The first exact match that ends behind a place; n_exact: none. */
size_t ibidi_find_exact_after(const ibidi_finder *f, uint64_t start);
bool ibidi_find_holds_exact(const ibidi_finder *f, uint64_t start, uint64_t end);
ibid_str ibidi_find_text(const ibidi_finder *f);
ibid_str ibidi_find_name(const ibidi_finder *f, size_t entity); /* its fullest form */

/* Adds entities that answer, kinds the question asks for, or sentences, best first. */
ibid_err ibidi_find_semantic(ibidi_finder *f, ibidi_matches *out);
#endif
