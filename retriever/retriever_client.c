#include "retriever/retriever.h"

#include <string.h>

enum {
    SEARCH_MS = 120 * 1000, /* the first search after a restart may build an index */
    UPKEEP_MS = 30 * 60 * 1000,
    REQUEST_MAX = 4 * 1024 * 1024
};

static void put_str(ibid_enc *m, const char *key, ibid_str s) {
    ibid_enc_str(m, key, s.s ? s.s : "", s.n);
}

static ibid_str get_str(const ibid_val *m, const char *key) {
    ibid_str s = {"", 0};
    if (!ibid_get_str(m, key, &s.s, &s.n)) s = (ibid_str){"", 0};
    return s;
}

static ibid_hit get_hit(const ibid_val *v) {
    return (ibid_hit){.document = ibid_get_u64(v, "document", 0),
                      .chunk = ibid_get_u64(v, "chunk", 0),
                      .block = ibid_get_u64(v, "block", 0),
                      .id = get_str(v, "id"),
                      .title = get_str(v, "title"),
                      .locator = get_str(v, "locator"),
                      .start = ibid_get_u64(v, "start", 0),
                      .end = ibid_get_u64(v, "end", 0),
                      .text = get_str(v, "text"),
                      .score = ibid_get_f64(v, "score", 0),
                      .keys = ibid_get_f64(v, "keys", 0),
                      .lexical = ibid_get_f64(v, "lexical", 0)};
}

ibid_err ibid_ret_search(ibid_client *c, const ibid_search_request *q, ibid_search_result *out) {
    ibid_enc m;
    *out = (ibid_search_result){.n = 0};
    ibid_request_begin(&m, REQUEST_MAX);
    put_str(&m, "collection", q->collection);
    put_str(&m, "question", q->question);
    ibid_enc_u64(&m, "top", q->top);
    ibid_enc_bool(&m, "chunks", q->chunks);
    ibid_enc_bool(&m, "keys_only", q->keys_only);
    ibid_enc_bool(&m, "lexical_only", q->lexical_only);
    ibid_enc_array(&m, "filters");
    for (size_t i = 0; i < q->n_filters; i++) {
        ibid_enc_map(&m, NULL);
        put_str(&m, "key", q->filters[i].key);
        put_str(&m, "value", q->filters[i].value);
        ibid_enc_end(&m);
    }
    ibid_enc_end(&m);
    ibid_err e = ibid_request_finish(c, "retriever.search", &m, SEARCH_MS, &out->reply);
    if (e) return e;
    const ibid_val *body = out->reply.body, *hits = ibid_val_get(body, "hits");
    size_t n = ibid_val_count(hits);
    if (!(out->storage = ibid_calloc(n, sizeof *out->storage))) {
        ibid_search_result_close(out);
        return ibid_fail(IBID_NOMEM, "out of memory for %zu hits", n);
    }
    for (size_t i = 0; i < n; i++) out->storage[i] = get_hit(ibid_val_at(hits, i));
    out->hits = out->storage;
    out->n = n;
    out->relevant = ibid_get_bool(body, "relevant", false);
    out->relevance = ibid_get_f64(body, "relevance", 0);
    out->coverage = ibid_get_f64(body, "coverage", 1);
    out->keys_ms = ibid_get_f64(body, "keys_ms", 0);
    out->lexical_ms = ibid_get_f64(body, "lexical_ms", 0);
    out->total_ms = ibid_get_f64(body, "total_ms", 0);
    out->generation = ibid_get_u64(body, "generation", 0);
    out->degraded = get_str(body, "degraded");
    return IBID_OK;
}

void ibid_search_result_close(ibid_search_result *r) {
    ibid_free(r->storage);
    ibid_reply_close(&r->reply);
    *r = (ibid_search_result){.n = 0};
}

static ibid_err read_candidates(const ibid_val *list, ibid_find_result *out) {
    size_t n = ibid_val_count(list), numbers = 0, at = 0;
    for (size_t i = 0; i < n; i++)
        numbers += ibid_val_count(ibid_val_get(ibid_val_at(list, i), "features"));
    out->candidates = ibid_calloc(n, sizeof *out->candidates);
    out->features = ibid_calloc(numbers, sizeof *out->features);
    if (!out->candidates || !out->features)
        return ibid_fail(IBID_NOMEM, "out of memory for %zu candidates", n);
    for (size_t i = 0; i < n; i++) {
        const ibid_val *v = ibid_val_at(list, i), *f = ibid_val_get(v, "features");
        ibid_find_candidate *c = &out->candidates[i];
        *c = (ibid_find_candidate){get_str(v, "name"), ibid_get_u64(v, "mentions", 0),
                                   ibid_get_f64(v, "score", 0), out->features + at,
                                   ibid_val_count(f)};
        for (size_t j = 0; j < c->n_features; j++)
            if (!ibid_val_f64(ibid_val_at(f, j), &out->features[at++]))
                return ibid_fail(IBID_PROTO, "a candidate's feature is no number");
    }
    out->n_candidates = n;
    return IBID_OK;
}

ibid_err ibid_ret_find(ibid_client *c, const ibid_find_request *q, ibid_find_result *out) {
    ibid_enc m;
    *out = (ibid_find_result){.n = 0};
    ibid_request_begin(&m, REQUEST_MAX);
    put_str(&m, "collection", q->collection);
    put_str(&m, "document", q->document);
    put_str(&m, "query", q->query);
    ibid_enc_bool(&m, "exact_only", q->exact_only);
    ibid_enc_bool(&m, "fast", q->fast);
    ibid_enc_bool(&m, "explain", q->explain);
    ibid_enc_f64(&m, "min_score", q->min_score);
    ibid_enc_u64(&m, "max_matches", q->max_matches);
    ibid_err e = ibid_request_finish(c, "retriever.find", &m, SEARCH_MS, &out->reply);
    if (e) return e;
    const ibid_val *body = out->reply.body, *matches = ibid_val_get(body, "matches");
    size_t n = ibid_val_count(matches);
    if (!(out->storage = ibid_calloc(n, sizeof *out->storage))) {
        ibid_find_result_close(out);
        return ibid_fail(IBID_NOMEM, "out of memory for %zu matches", n);
    }
    for (size_t i = 0; i < n; i++) {
        const ibid_val *v = ibid_val_at(matches, i);
        out->storage[i] = (ibid_match){.start = ibid_get_u64(v, "start", 0),
                                       .end = ibid_get_u64(v, "end", 0),
                                       .text = get_str(v, "text"),
                                       .locator = get_str(v, "locator"),
                                       .score = ibid_get_f64(v, "score", 0),
                                       .exact = ibid_get_bool(v, "exact", false),
                                       .kind = get_str(v, "kind"),
                                       .entity = ibid_get_u64(v, "entity", 0),
                                       .name = get_str(v, "name")};
    }
    if ((e = read_candidates(ibid_val_get(body, "candidates"), out))) {
        ibid_find_result_close(out);
        return e;
    }
    out->threshold = ibid_get_f64(body, "threshold", 0);
    out->matches = out->storage;
    out->n = n;
    out->more = ibid_get_bool(body, "more", false);
    out->total_ms = ibid_get_f64(body, "total_ms", 0);
    out->coverage = ibid_get_f64(body, "coverage", 0);
    out->degraded = get_str(body, "degraded");
    return IBID_OK;
}

void ibid_find_result_close(ibid_find_result *r) {
    ibid_free(r->storage);
    ibid_free(r->candidates);
    ibid_free(r->features);
    ibid_reply_close(&r->reply);
    *r = (ibid_find_result){.n = 0};
}

ibid_err ibid_ret_notify(ibid_client *c, uint64_t generation) {
    ibid_enc m;
    ibid_request_begin(&m, REQUEST_MAX);
    ibid_enc_u64(&m, "generation", generation);
    return ibid_request_finish(c, "retriever.notify", &m, 0, NULL);
}

ibid_err ibid_ret_reindex(ibid_client *c, ibid_str collection) {
    ibid_enc m;
    ibid_request_begin(&m, REQUEST_MAX);
    put_str(&m, "collection", collection);
    return ibid_request_finish(c, "retriever.reindex", &m, UPKEEP_MS, NULL);
}

ibid_err ibid_ret_verify(ibid_client *c, ibid_buf *faults, uint64_t *n_faults) {
    ibid_enc m;
    ibid_reply r = {.msg = NULL};
    ibid_request_begin(&m, REQUEST_MAX);
    ibid_err e = ibid_request_finish(c, "retriever.verify", &m, UPKEEP_MS, &r);
    if (e) return e;
    ibid_str s = get_str(r.body, "faults");
    *n_faults = ibid_get_u64(r.body, "n_faults", 0);
    e = ibid_buf_append(faults, s.s, s.n);
    ibid_reply_close(&r);
    return e;
}

ibid_err ibid_ret_status(ibid_client *c, ibid_reply *out) {
    return ibid_client_call(c, "retriever.status", NULL, 0, out);
}
