/* The write half as messages. Numbers in arrays travel as little-endian bytes in one bin; a long
 * text travels compressed, so that every document the store takes fits a message. */
#include "kvstore/kvstore_client.h"
#include "kvstore/wire.h"

#include <zstd.h>

enum {
    WRITE_MS = 120000,
    TOUCH_MS = 2000, /* a hint on the way of a question: better lost than waited for */
    VERIFY_MS = 3600000,
    TEXT_PLAIN_MAX = 16 * 1024 * 1024
};

static void enc_str(ibid_enc *m, const char *key, ibid_str s) {
    ibid_enc_str(m, key, s.s ? s.s : "", s.n);
}

static void enc_hash(ibid_enc *m, const char *key, const ibid_hash *h) {
    ibid_enc_bin(m, key, h->b, sizeof h->b);
}

static void enc_u64s(ibid_enc *m, const char *key, const uint64_t *v, size_t n) {
    uint8_t *p = ibid_enc_bin_reserve(m, key, n * 8);
    for (size_t i = 0; p && i < n; i++) ibidi_store64(p + 8 * i, v[i]);
}

static void enc_tokens(ibid_enc *m, const char *key, const int32_t *v, size_t n) {
    uint8_t *p = ibid_enc_bin_reserve(m, key, n * 4);
    for (size_t i = 0; p && i < n; i++) ibidi_store32(p + 4 * i, (uint32_t)v[i]);
}

static void enc_values(ibid_enc *m, const void *const *values, size_t n, size_t size) {
    size_t bytes = 0;
    if (!ibid_mul_size(n, size, &bytes)) bytes = SIZE_MAX / 2; /* refused by the encoder's cap */
    uint8_t *p = ibid_enc_bin_reserve(m, "values", bytes);
    for (size_t i = 0; p && i < n; i++) memcpy(p + i * size, values[i], size);
}

static ibid_err finish_u64(ibid_client *c, const char *method, ibid_enc *m, const char *key,
                           uint64_t *out) {
    ibid_reply r = {.msg = NULL};
    ibid_err e = ibid_request_finish(c, method, m, WRITE_MS, &r);
    if (!e && out) *out = ibid_get_u64(r.body, key, 0);
    if (!e) ibid_reply_close(&r);
    return e;
}

ibid_err ibid_kvc_collection_create(ibid_client *c, ibid_str name, const ibid_hash *model) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    enc_str(&m, "name", name);
    enc_hash(&m, "model", model);
    return ibid_request_finish(c, "kvstore.collection_create", &m, WRITE_MS, NULL);
}

ibid_err ibid_kvc_collection_drop(ibid_client *c, ibid_str name) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    enc_str(&m, "name", name);
    return ibid_request_finish(c, "kvstore.collection_drop", &m, WRITE_MS, NULL);
}

ibid_err ibid_kvc_model_put(ibid_client *c, const ibid_model_record *r) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    enc_hash(&m, "fingerprint", &r->fingerprint);
    enc_str(&m, "name", r->name);
    enc_str(&m, "path", r->path);
    enc_str(&m, "arch", r->arch);
    ibid_enc_u64(&m, "n_layers", r->n_layers);
    ibid_enc_u64(&m, "n_heads", r->n_heads);
    ibid_enc_u64(&m, "n_kv_heads", r->n_kv_heads);
    ibid_enc_u64(&m, "head_dim", r->head_dim);
    ibid_enc_u64(&m, "n_ctx", r->n_ctx);
    ibid_enc_u64(&m, "n_vocab", r->n_vocab);
    enc_hash(&m, "prefix", &r->prefix);
    enc_tokens(&m, "prefix_tokens", r->prefix_tokens, r->n_prefix_tokens);
    ibid_enc_u64(&m, "kv_type", (uint64_t)r->kv_type);
    ibid_enc_bin(&m, "calibration", r->calibration.s, r->calibration.n);
    enc_hash(&m, "calibration_id", &r->calibration_id);
    if (r->gates.n) ibid_enc_bin(&m, "gates", r->gates.s, r->gates.n);
    return ibid_request_finish(c, "kvstore.model_put", &m, WRITE_MS, NULL);
}

ibid_err ibid_kvc_prefix_put(ibid_client *c, const ibid_hash *prefix, size_t n_layers,
                             const void *const *values, size_t value_size) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    enc_hash(&m, "prefix", prefix);
    ibid_enc_u64(&m, "n_layers", n_layers);
    enc_values(&m, values, n_layers, value_size);
    return ibid_request_finish(c, "kvstore.prefix_put", &m, WRITE_MS, NULL);
}

static void enc_block(ibid_enc *m, const ibid_block_put *b) {
    ibid_enc_map(m, NULL);
    enc_hash(m, "model", &b->model);
    enc_hash(m, "prefix", &b->prefix);
    ibid_enc_u64(m, "kv_type", (uint64_t)b->kv_type);
    ibid_enc_u64(m, "n_title", b->n_title);
    enc_tokens(m, "tokens", b->tokens, b->n_tokens);
    if (b->values) {
        ibid_enc_u64(m, "n_layers", b->n_layers);
        enc_values(m, b->values, b->n_layers, b->value_size);
    }
    if (b->keys) {
        size_t bytes = 0;
        if (!ibid_mul_size(b->n_tokens, b->keys_dim, &bytes)) bytes = SIZE_MAX / 2;
        enc_hash(m, "calibration", &b->calibration);
        ibid_enc_u64(m, "keys_dim", b->keys_dim);
        ibid_enc_bin(m, "keys", b->keys, bytes);
    }
    if (b->job) ibid_enc_u64(m, "job", b->job);
    ibid_enc_end(m);
}

ibid_err ibid_kvc_blocks_put(ibid_client *c, const ibid_block_put *b, size_t n, uint64_t *numbers) {
    ibid_enc m;
    uint64_t values = 0, rest = 0;
    if (n == 0) return IBID_OK;
    for (size_t i = 0; i < n; i++) {
        values += b[i].values ? (uint64_t)b[i].n_layers * b[i].value_size : 0;
        rest += b[i].n_tokens * 4 + (b[i].keys ? b[i].n_tokens * b[i].keys_dim : 0) + 512;
    }
    if (values > IBID_BLOCKS_PUT_MAX)
        return ibid_fail(IBID_TOOBIG, "%llu bytes of KV in one call; send at most %d at once",
                         (unsigned long long)values, IBID_BLOCKS_PUT_MAX);
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    if (!m.err) m.err = ibid_buf_reserve(&m.buf, values + rest);
    ibid_enc_array(&m, "blocks");
    for (size_t i = 0; i < n; i++) enc_block(&m, &b[i]);
    ibid_enc_end(&m);
    ibid_reply r = {.msg = NULL};
    ibid_err e = ibid_request_finish(c, "kvstore.blocks_put", &m, WRITE_MS, &r);
    if (e) return e;
    const void *p = NULL;
    size_t bytes = 0;
    if (!ibid_get_bin(r.body, "numbers", &p, &bytes) || bytes != n * 8)
        e = ibid_fail(IBID_PROTO, "the reply to blocks_put has %zu bytes of numbers for %zu blocks",
                      bytes, n);
    for (size_t i = 0; i < n && !e; i++) numbers[i] = ibidi_load64((const uint8_t *)p + 8 * i);
    ibid_reply_close(&r);
    return e;
}

ibid_err ibid_kvc_blocks_hold(ibid_client *c, uint64_t job, const uint64_t *blocks, size_t n) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    ibid_enc_u64(&m, "job", job);
    enc_u64s(&m, "blocks", blocks, n);
    return ibid_request_finish(c, "kvstore.blocks_hold", &m, WRITE_MS, NULL);
}

ibid_err ibid_kvc_keys_put(ibid_client *c, const ibid_hash *calibration, uint64_t block,
                           const int8_t *keys, size_t n_tokens, size_t dim) {
    ibid_enc m;
    size_t bytes = 0;
    if (!ibid_mul_size(n_tokens, dim, &bytes)) bytes = SIZE_MAX / 2;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    enc_hash(&m, "calibration", calibration);
    ibid_enc_u64(&m, "block", block);
    ibid_enc_u64(&m, "n_tokens", n_tokens);
    ibid_enc_u64(&m, "dim", dim);
    ibid_enc_bin(&m, "keys", keys, bytes);
    return ibid_request_finish(c, "kvstore.keys_put", &m, WRITE_MS, NULL);
}

/* ---- Documents ---- */
static void enc_chunks(ibid_enc *m, const ibid_chunk *c, size_t n) {
    size_t locators = 0;
    uint8_t *p = ibid_enc_bin_reserve(m, "chunks", n * IBIDI_WIRE_CHUNK);
    for (size_t i = 0; i < n; i++) {
        locators += c[i].locator.n;
        if (!p) continue;
        ibidi_store64(p, c[i].start);
        ibidi_store64(p + 8, c[i].end);
        ibidi_store64(p + 16, c[i].block);
        ibidi_store32(p + 24, (uint32_t)c[i].locator.n);
        p += IBIDI_WIRE_CHUNK;
    }
    p = ibid_enc_bin_reserve(m, "locators", locators);
    for (size_t i = 0; p && i < n; i++) {
        if (c[i].locator.n) memcpy(p, c[i].locator.s, c[i].locator.n);
        p += c[i].locator.n;
    }
}

static void enc_text(ibid_enc *m, ibid_str text) {
    if (text.n <= TEXT_PLAIN_MAX) {
        ibid_enc_bin(m, "text", text.s ? text.s : "", text.n);
        return;
    }
    size_t bound = ZSTD_compressBound(text.n);
    void *frame = ibid_alloc(bound);
    size_t n = frame ? ZSTD_compress(frame, bound, text.s, text.n, 1) : 0;
    if (!frame || ZSTD_isError(n)) {
        if (!m->err)
            m->err = ibid_fail(IBID_NOMEM, "out of memory to send a text of %zu bytes", text.n);
    } else {
        ibid_enc_u64(m, "text_bytes", text.n);
        ibid_enc_bin(m, "text_zstd", frame, n);
    }
    ibid_free(frame);
}

ibid_err ibid_kvc_document_put(ibid_client *c, const ibid_document_put *d, uint64_t *number,
                               uint64_t *generation) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    enc_str(&m, "collection", d->collection);
    enc_str(&m, "id", d->id);
    enc_str(&m, "title", d->title);
    enc_str(&m, "source", d->source);
    enc_str(&m, "metadata", d->metadata);
    enc_str(&m, "reason", d->reason);
    enc_hash(&m, "content", &d->content);
    ibid_enc_u64(&m, "state", (uint64_t)d->state);
    enc_text(&m, d->text);
    enc_chunks(&m, d->chunks, d->n_chunks);
    if (d->job) ibid_enc_u64(&m, "job", d->job);
    ibid_reply r = {.msg = NULL};
    ibid_err e = ibid_request_finish(c, "kvstore.document_put", &m, WRITE_MS, &r);
    if (e) return e;
    if (number) *number = ibid_get_u64(r.body, "number", 0);
    if (generation) *generation = ibid_get_u64(r.body, "generation", 0);
    ibid_reply_close(&r);
    return IBID_OK;
}

ibid_err ibid_kvc_document_delete(ibid_client *c, ibid_str collection, ibid_str id,
                                  uint64_t *generation) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    enc_str(&m, "collection", collection);
    enc_str(&m, "id", id);
    return finish_u64(c, "kvstore.document_delete", &m, "generation", generation);
}

/* ---- Jobs and upkeep ---- */
ibid_err ibid_kvc_job_put(ibid_client *c, const ibid_job *j, uint64_t *id) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    ibid_enc_u64(&m, "id", j->id);
    enc_str(&m, "kind", j->kind);
    enc_str(&m, "collection", j->collection);
    enc_str(&m, "state", j->state);
    enc_str(&m, "stage", j->stage);
    ibid_enc_bin(&m, "spec", j->spec.s, j->spec.n);
    ibid_enc_bin(&m, "report", j->report.s, j->report.n);
    ibid_enc_u64(&m, "error", (uint64_t)j->error);
    enc_str(&m, "error_text", j->error_text);
    return finish_u64(c, "kvstore.job_put", &m, "id", id);
}

ibid_err ibid_kvc_job_delete(ibid_client *c, uint64_t id) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    ibid_enc_u64(&m, "id", id);
    return ibid_request_finish(c, "kvstore.job_delete", &m, WRITE_MS, NULL);
}

ibid_err ibid_kvc_touch(ibid_client *c, const uint64_t *blocks, size_t n) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    enc_u64s(&m, "blocks", blocks, n);
    return ibid_request_finish(c, "kvstore.touch", &m, TOUCH_MS, NULL);
}

ibid_err ibid_kvc_collect(ibid_client *c, ibid_collected *out) {
    ibid_enc m;
    ibid_reply r = {.msg = NULL};
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    ibid_err e = ibid_request_finish(c, "kvstore.collect", &m, WRITE_MS, &r);
    if (e) return e;
    if (out)
        *out = (ibid_collected){.orphans = ibid_get_u64(r.body, "orphans", 0),
                                .evicted = ibid_get_u64(r.body, "evicted", 0),
                                .bytes = ibid_get_u64(r.body, "bytes", 0),
                                .more = ibid_get_bool(r.body, "more", false)};
    ibid_reply_close(&r);
    return IBID_OK;
}

ibid_err ibid_kvc_set_budget(ibid_client *c, uint64_t kv_budget) {
    ibid_enc m;
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    ibid_enc_u64(&m, "kv_budget", kv_budget);
    return ibid_request_finish(c, "kvstore.set_budget", &m, WRITE_MS, NULL);
}

ibid_err ibid_kvc_verify(ibid_client *c, ibid_buf *out, uint64_t *n_faults) {
    ibid_enc m;
    ibid_reply r = {.msg = NULL};
    ibid_request_begin(&m, IBID_BUS_MESSAGE_MAX);
    ibid_err e = ibid_request_finish(c, "kvstore.verify", &m, VERIFY_MS, &r);
    if (e) return e;
    const char *text = NULL;
    size_t n = 0;
    *n_faults = ibid_get_u64(r.body, "n_faults", 0);
    if (ibid_get_str(r.body, "faults", &text, &n)) {
        size_t room = out->cap - out->len;
        e = ibid_buf_append(out, text, n < room ? n : room);
    }
    ibid_reply_close(&r);
    return e;
}
