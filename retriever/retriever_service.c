/* The retriever room: bus messages to the engine's calls. */
#include "retriever/engine.h"
#include "retriever/retriever_room.h"
#include "rpc/base/log.h"

#include <stdlib.h>
#include <string.h>

enum { WORKERS = 4, FAULTS_MAX = 1 << 20, FILTERS_MAX = 64 };

typedef struct retriever_room {
    ibidi_retriever *engine;
    ibid_client *attention;
    ibid_server *server;
} retriever_room;

static ibid_str get_str(const ibid_val *m, const char *key) {
    ibid_str s = {"", 0};
    if (!ibid_get_str(m, key, &s.s, &s.n)) s = (ibid_str){"", 0};
    return s;
}

static void put_str(ibid_enc *e, const char *key, ibid_str s) {
    ibid_enc_str(e, key, s.s ? s.s : "", s.n);
}

/* ---- What the engine asks of attention ---- */
static ibid_err question_keys(void *arg, const ibid_hash *model, ibid_str question,
                              ibid_question_keys *out) {
    return ibid_attn_question_keys(((retriever_room *)arg)->attention, model, question, out);
}

static ibid_err tokenize(void *arg, const ibid_hash *model, ibid_str text, ibid_tokens *out) {
    return ibid_attn_tokenize(((retriever_room *)arg)->attention, model, text, out);
}

static ibid_err likelihoods(void *arg, const ibid_hash *model, ibid_str prompt,
                            const ibid_str *texts, size_t n, double *out) {
    return ibid_attn_likelihoods(((retriever_room *)arg)->attention, model, prompt, texts, n, out);
}

/* ---- Handlers ---- */
static ibid_err read_filters(const ibid_val *list, ibid_filter *out, size_t *n) {
    *n = ibid_val_count(list);
    if (*n > FILTERS_MAX) return ibid_fail(IBID_TOOBIG, "%zu filters; at most %d", *n, FILTERS_MAX);
    for (size_t i = 0; i < *n; i++) {
        const ibid_val *f = ibid_val_at(list, i);
        out[i] = (ibid_filter){get_str(f, "key"), get_str(f, "value")};
    }
    return IBID_OK;
}

static void put_hit(ibid_enc *e, const ibid_hit *h) {
    ibid_enc_map(e, NULL);
    ibid_enc_u64(e, "document", h->document);
    ibid_enc_u64(e, "chunk", h->chunk);
    ibid_enc_u64(e, "block", h->block);
    put_str(e, "id", h->id);
    put_str(e, "title", h->title);
    put_str(e, "locator", h->locator);
    ibid_enc_u64(e, "start", h->start);
    ibid_enc_u64(e, "end", h->end);
    put_str(e, "text", h->text);
    ibid_enc_f64(e, "score", h->score);
    ibid_enc_f64(e, "keys", h->keys);
    ibid_enc_f64(e, "lexical", h->lexical);
    ibid_enc_end(e);
}

static ibid_err on_search(void *room, const ibid_call *call) {
    ibid_filter filters[FILTERS_MAX];
    ibidi_found found;
    const ibid_val *b = call->body;
    ibid_search_request q = {.collection = get_str(b, "collection"),
                             .question = get_str(b, "question"),
                             .top = (size_t)ibid_get_u64(b, "top", 0),
                             .chunks = ibid_get_bool(b, "chunks", false),
                             .filters = filters,
                             .keys_only = ibid_get_bool(b, "keys_only", false),
                             .lexical_only = ibid_get_bool(b, "lexical_only", false)};
    ibid_err e = read_filters(ibid_val_get(b, "filters"), filters, &q.n_filters);
    if (!e) e = ibidi_retriever_search(((retriever_room *)room)->engine, &q, &found);
    if (e) return e;
    ibid_enc_array(call->reply, "hits");
    for (size_t i = 0; i < found.n; i++) put_hit(call->reply, &found.hits[i]);
    ibid_enc_end(call->reply);
    ibid_enc_bool(call->reply, "relevant", found.relevant);
    ibid_enc_f64(call->reply, "relevance", found.relevance);
    ibid_enc_f64(call->reply, "coverage", found.coverage);
    ibid_enc_f64(call->reply, "keys_ms", found.keys_ms);
    ibid_enc_f64(call->reply, "lexical_ms", found.lexical_ms);
    ibid_enc_f64(call->reply, "total_ms", found.total_ms);
    ibid_enc_u64(call->reply, "generation", found.generation);
    if (found.degraded) ibid_enc_cstr(call->reply, "degraded", found.degraded);
    ibidi_found_close(&found);
    return IBID_OK;
}

static void put_candidates(ibid_enc *e, const ibidi_matches *found) {
    if (!found->n_candidates) return;
    ibid_enc_array(e, "candidates");
    for (size_t i = 0; i < found->n_candidates; i++) {
        const ibid_find_candidate *c = &found->candidates[i];
        ibid_enc_map(e, NULL);
        put_str(e, "name", c->name);
        ibid_enc_u64(e, "mentions", c->mentions);
        ibid_enc_f64(e, "score", c->score);
        ibid_enc_array(e, "features");
        for (size_t j = 0; j < c->n_features; j++) ibid_enc_f64(e, NULL, c->features[j]);
        ibid_enc_end(e);
        ibid_enc_end(e);
    }
    ibid_enc_end(e);
}

static ibid_err on_find(void *room, const ibid_call *call) {
    ibidi_matches found;
    const ibid_val *b = call->body;
    ibid_find_request q = {.collection = get_str(b, "collection"),
                           .document = get_str(b, "document"),
                           .query = get_str(b, "query"),
                           .exact_only = ibid_get_bool(b, "exact_only", false),
                           .fast = ibid_get_bool(b, "fast", false),
                           .explain = ibid_get_bool(b, "explain", false),
                           .min_score = ibid_get_f64(b, "min_score", -1),
                           .max_matches = (size_t)ibid_get_u64(b, "max_matches", 0)};
    ibid_err e = ibidi_retriever_find(((retriever_room *)room)->engine, &q, &found);
    if (e) return e;
    ibid_enc_array(call->reply, "matches");
    for (size_t i = 0; i < found.n; i++) {
        const ibid_match *m = &found.matches[i];
        ibid_enc_map(call->reply, NULL);
        ibid_enc_u64(call->reply, "start", m->start);
        ibid_enc_u64(call->reply, "end", m->end);
        put_str(call->reply, "text", m->text);
        put_str(call->reply, "locator", m->locator);
        ibid_enc_f64(call->reply, "score", m->score);
        ibid_enc_bool(call->reply, "exact", m->exact);
        put_str(call->reply, "kind", m->kind);
        if (m->entity) ibid_enc_u64(call->reply, "entity", m->entity);
        if (m->name.n) put_str(call->reply, "name", m->name);
        ibid_enc_end(call->reply);
    }
    ibid_enc_end(call->reply);
    put_candidates(call->reply, &found);
    ibid_enc_bool(call->reply, "more", found.more);
    ibid_enc_f64(call->reply, "threshold", found.threshold);
    ibid_enc_f64(call->reply, "total_ms", found.total_ms);
    ibid_enc_f64(call->reply, "coverage", found.coverage);
    if (found.degraded) ibid_enc_cstr(call->reply, "degraded", found.degraded);
    ibidi_matches_close(&found);
    return IBID_OK;
}

static ibid_err on_notify(void *room, const ibid_call *call) {
    (void)call;
    ibidi_retriever_notify(((retriever_room *)room)->engine);
    return IBID_OK;
}

static ibid_err on_reindex(void *room, const ibid_call *call) {
    return ibidi_retriever_reindex(((retriever_room *)room)->engine,
                                   get_str(call->body, "collection"));
}

static ibid_err on_verify(void *room, const ibid_call *call) {
    ibid_buf faults;
    uint64_t n = 0;
    ibid_buf_init(&faults, FAULTS_MAX);
    ibid_err e = ibidi_retriever_verify(((retriever_room *)room)->engine, &faults, &n);
    if (!e) {
        ibid_enc_str(call->reply, "faults", faults.data ? faults.data : "", faults.len);
        ibid_enc_u64(call->reply, "n_faults", n);
    }
    ibid_buf_fini(&faults);
    return e;
}

static ibid_err on_status(void *room, const ibid_call *call) {
    return ibidi_retriever_status(((retriever_room *)room)->engine, call->reply);
}

static const ibid_method methods[] = {
    {"retriever.search", on_search},
    {"retriever.find", on_find},
    {"retriever.notify", on_notify},
    {"retriever.reindex", on_reindex},
    {"retriever.verify", on_verify},
    {"retriever.status", on_status},
    {NULL, NULL},
};

/* ---- Opening ---- */
static void close_room(void *room) {
    retriever_room *r = room;
    ibid_server_close(r->server);
    ibidi_retriever_close(r->engine);
    ibid_client_close(r->attention);
    ibid_free(r);
}

/* For measuring: where scanning gives way to the key index. */
static uint64_t env_u64(const char *name) {
    const char *s = getenv(name);
    return s ? strtoull(s, NULL, 10) : 0;
}

static ibid_err open_room(const ibid_host_opts *o, void **out) {
    char url[IBID_BUS_URL_MAX], attention[IBID_BUS_URL_MAX];
    retriever_room *r = ibid_calloc(1, sizeof *r);
    if (!r) return ibid_fail(IBID_NOMEM, "out of memory for the retriever");
    ibidi_retriever_opts opts = {
        .data_dir = o->data_dir,
        .map_size = o->map_size,
        .threads = o->threads,
        .kernels = o->kernels,
        .exact_tokens = env_u64("IBID_EXACT_TOKENS"),
        .keys.cells_min = env_u64("IBID_CELLS_TOKENS"),
        .hooks = {r, question_keys, tokenize, likelihoods},
    };
    ibid_err e = ibid_bus_url(o->data_dir, "retriever", o->inproc, url);
    if (!e) e = ibid_bus_url(o->data_dir, "attention", o->inproc, attention);
    if (!e) e = ibid_client_open(attention, &r->attention);
    if (!e) e = ibidi_retriever_open(&opts, &r->engine);
    if (!e) e = ibidi_engine_keeper_start(r->engine);
    ibid_server_opts server = {.url = url,
                               .methods = methods,
                               .room = r,
                               .n_workers = o->workers ? o->workers : WORKERS,
                               .name = "retriever"};
    if (!e) e = ibid_server_open(&server, &r->server);
    if (e) {
        close_room(r);
        return e;
    }
    *out = r;
    return IBID_OK;
}

const ibid_room_vtable ibid_retriever_room = {"retriever", open_room, close_room};
