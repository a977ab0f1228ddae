/* The retriever room, as other rooms see it: search over token keys and words, find in one
 * document. These calls send messages to ibid-retriever (room "retriever"); handlers:
 * retriever_service.c. */
#ifndef IBID_RETRIEVER_H
#define IBID_RETRIEVER_H

#include "kvstore/kvstore.h"
#include "rpc/bus/bus.h"

/* The key that stands for the document's own id. */
#define IBID_FILTER_DOCUMENT "@document"

typedef struct ibid_filter { /* document metadata: the value at KEY, as text, equals VALUE */
    ibid_str key, value;
} ibid_filter;

typedef struct ibid_search_request {
    ibid_str collection, question;
    size_t top;                 /* 0 = 10 */
    bool chunks;                /* several chunks of one document; otherwise the best one each */
    const ibid_filter *filters; /* all must hold */
    size_t n_filters;
    bool keys_only, lexical_only; /* for measuring; default both, fused */
} ibid_search_request;

typedef struct ibid_hit {
    uint64_t document, chunk, block; /* numbers; chunk is the index in its document */
    ibid_str id, title, locator;
    uint64_t start, end; /* bytes of the normalised text */
    ibid_str text;
    double score, keys, lexical; /* fused; MaxSim 0..1; BM25 (0 = no word matched) */
} ibid_hit;

typedef struct ibid_search_result {
    const ibid_hit *hits; /* descending score */
    size_t n;
    bool relevant;    /* something found answers the question: relevance is at least a half */
    double relevance; /* 0..1 (retriever/relevance.h) */
    /* Share of the collection's tokens, or of the document's that a filter asks for, whose keys
     * were compared with the question's exactly. 1 up to the size that is scanned whole, and with
     * words alone, which are looked up everywhere. Above, the key index's cells look at the others
     * by what is near them, and pick those that are compared. */
    double coverage;
    double keys_ms, lexical_ms, total_ms;
    uint64_t generation; /* of the store the answer reflects */
    ibid_str degraded;   /* why only words were searched; "" = keys too, or as asked */
    ibid_reply reply;    /* everything above lies here */
    ibid_hit *storage;
} ibid_search_result;

/* Brings the index forward to the store's current generation first, so a document that was
 * acknowledged is found. Errors: NOCOLLECTION, INVAL (empty question), UNAVAIL. */
ibid_err ibid_ret_search(ibid_client *c, const ibid_search_request *q, ibid_search_result *out);
void ibid_search_result_close(ibid_search_result *r);

typedef struct ibid_find_request {
    ibid_str collection, document, query; /* document: its id */
    bool exact_only;
    bool fast;          /* without the model's pass over candidates */
    bool explain;       /* list the candidates too */
    double min_score;   /* < 0: the calibrated threshold, and what lies close to the best */
    size_t max_matches; /* 0 = 1000000, which is the most */
} ibid_find_request;

typedef struct ibid_match {
    uint64_t start, end;
    ibid_str text, locator;
    double score; /* 0..1 */
    bool exact;
    /* "exact": the query's bytes, or they in another case or Unicode form; "form": other forms of
     * its words, or of the name it is; "name": an entity that answers it; "sentence". */
    ibid_str kind;
    uint64_t entity; /* matches of one entity share a number; 0: of none */
    ibid_str name;   /* the entity's fullest form, or "" */
} ibid_match;

typedef struct ibid_find_candidate { /* an entity of the document */
    ibid_str name;
    uint64_t mentions;
    double score;
    const double *features; /* [n_features] retriever/rank.h */
    size_t n_features;
} ibid_find_candidate;

typedef struct ibid_find_result {
    const ibid_match *matches; /* exact ones by position, then others by descending score */
    size_t n;
    bool more;                       /* the list was cut at max_matches: there may be others */
    double total_ms, coverage;       /* share of the document's blocks that was scored */
    double threshold;                /* in force: what min_score was, or the calibrated one */
    ibid_str degraded;               /* why there are exact matches only; "" = both (or as asked) */
    ibid_find_candidate *candidates; /* if asked for, best first */
    size_t n_candidates;
    ibid_reply reply;
    ibid_match *storage;
    double *features;
} ibid_find_result;

ibid_err ibid_ret_find(ibid_client *c, const ibid_find_request *q, ibid_find_result *out);
void ibid_find_result_close(ibid_find_result *r);

/* A hint that the store moved on: start catching up now. */
ibid_err ibid_ret_notify(ibid_client *c, uint64_t generation);
/* Throws the derived indexes away and builds them from the store ("" = every collection). */
ibid_err ibid_ret_reindex(ibid_client *c, ibid_str collection);
/* Checks both indexes against the store: stamps, counts, a sample of rows. A line per fault. */
ibid_err ibid_ret_verify(ibid_client *c, ibid_buf *faults, uint64_t *n_faults);
/* Collections, tokens, generations, file sizes: MessagePack map for `ibid status`. */
ibid_err ibid_ret_status(ibid_client *c, ibid_reply *out);
#endif
