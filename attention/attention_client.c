#include "attention/attention.h"
#include "attention/wire.h"

#include <stdio.h>
#include <string.h>

enum {
    ADD_MS = 30 * 60 * 1000,
    ENCODE_MS = 10 * 60 * 1000,
    NEXT_MS = 20 * 1000,
    NEXT_WAITS = 90, /* half an hour without an event */
    TEXT_MAX = 32 * 1024 * 1024
};

static void put_hash(ibid_enc *e, const char *key, const ibid_hash *h) {
    ibid_enc_bin(e, key, h->b, sizeof h->b);
}

static bool get_hash(const ibid_val *m, const char *key, ibid_hash *out) {
    const void *p = NULL;
    size_t n = 0;
    if (!ibid_get_bin(m, key, &p, &n) || n != sizeof out->b) return false;
    memcpy(out->b, p, n);
    return true;
}

static ibid_err broken(const char *what) {
    return ibid_fail(IBID_PROTO, "the attention room's reply to %s is broken", what);
}

/* ---- Models ---- */

static void copy_str(const ibid_val *m, const char *key, char *to, size_t room) {
    const char *s = "";
    size_t n = 0;
    if (!ibid_get_str(m, key, &s, &n)) n = 0;
    (void)snprintf(to, room, "%.*s", (int)(n < room ? n : room - 1), s);
}

static ibid_err get_info(const ibid_val *body, ibid_model_info *out) {
    const ibid_val *m = ibid_val_get(body, "model");
    memset(out, 0, sizeof *out);
    if (!get_hash(m, "fingerprint", &out->fingerprint)) return broken("model_info");
    copy_str(m, "name", out->name, sizeof out->name);
    copy_str(m, "arch", out->arch, sizeof out->arch);
    copy_str(m, "path", out->path, sizeof out->path);
    copy_str(m, "template", out->template_name, sizeof out->template_name);
    out->n_layers = ibid_get_u64(m, "n_layers", 0);
    out->n_heads = ibid_get_u64(m, "n_heads", 0);
    out->n_kv_heads = ibid_get_u64(m, "n_kv_heads", 0);
    out->head_dim = ibid_get_u64(m, "head_dim", 0);
    out->n_ctx = ibid_get_u64(m, "n_ctx", 0);
    out->n_vocab = ibid_get_u64(m, "n_vocab", 0);
    out->kv_bytes_per_token = ibid_get_u64(m, "kv_bytes_per_token", 0);
    out->file_bytes = ibid_get_u64(m, "file_bytes", 0);
    out->calibrated = ibid_get_bool(m, "calibrated", false);
    out->key_dim = ibid_get_u64(m, "key_dim", 0);
    copy_str(m, "backend", out->backend, sizeof out->backend);
    out->loaded = true;
    return IBID_OK;
}

static ibid_err info_call(ibid_client *c, const char *method, ibid_enc *e, ibid_model_info *out) {
    ibid_reply r = {0};
    ibid_model_info scratch;
    ibid_err err = ibid_request_finish(c, method, e, ADD_MS, &r);
    if (!err) err = get_info(r.body, out ? out : &scratch);
    ibid_reply_close(&r);
    return err;
}

ibid_err ibid_attn_model_add_as(ibid_client *c, const ibid_model_choice *choice,
                                ibid_model_info *out) {
    ibid_enc e;
    ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
    ibid_enc_cstr(&e, "path", choice->path);
    ibid_enc_cstr(&e, "name", choice->name ? choice->name : "");
    if (choice->kv_type) ibid_enc_cstr(&e, "kv_type", choice->kv_type);
    if (choice->force) ibid_enc_bool(&e, "force", true);
    return info_call(c, "attention.model_add", &e, out);
}

ibid_err ibid_attn_model_add(ibid_client *c, const char *path, const char *name,
                             ibid_model_info *out) {
    return ibid_attn_model_add_as(c, &(ibid_model_choice){.path = path, .name = name}, out);
}

ibid_err ibid_attn_model_info(ibid_client *c, const char *model, ibid_model_info *out) {
    ibid_enc e;
    ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
    ibid_enc_cstr(&e, "model", model ? model : "");
    return info_call(c, "attention.model_info", &e, out);
}

ibid_err ibid_attn_calibrate(ibid_client *c, const char *model, ibid_str sample, ibid_buf *report) {
    return ibid_attn_calibrate_as(c, &(ibid_calibrate_request){.model = model, .sample = sample},
                                  report);
}

ibid_err ibid_attn_calibrate_as(ibid_client *c, const ibid_calibrate_request *q, ibid_buf *report) {
    ibid_enc e;
    ibid_reply r = {0};
    const char *s = "";
    size_t n = 0;
    ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
    ibid_enc_cstr(&e, "model", q->model ? q->model : "");
    if (q->sample.s) ibid_enc_bin(&e, "sample", q->sample.s, q->sample.n);
    if (q->train.s) ibid_enc_bin(&e, "train", q->train.s, q->train.n);
    if (q->teacher.s) ibid_enc_bin(&e, "teacher", q->teacher.s, q->teacher.n);
    ibid_enc_bool(&e, "pairs", q->pairs);
    ibid_err err = ibid_request_finish(c, "attention.calibrate", &e, ADD_MS, &r);
    if (!err && report && ibid_get_str(r.body, "report", &s, &n))
        err = ibid_buf_append(report, s, n);
    ibid_reply_close(&r);
    return err;
}

static void get_verdict(const ibid_val *v, ibid_kv_verdict *out) {
    copy_str(v, "type", out->type, sizeof out->type);
    out->positions = ibid_get_u64(v, "positions", 0);
    out->kl_mean = ibid_get_f64(v, "kl_mean", 0);
    out->kl_p99 = ibid_get_f64(v, "kl_p99", 0);
    out->top1 = ibid_get_f64(v, "top1", 0);
    out->passed = ibid_get_bool(v, "passed", false);
    out->forced = ibid_get_bool(v, "forced", false);
}

ibid_err ibid_attn_kv_gate(ibid_client *c, const char *model, ibid_str text, uint64_t positions,
                           bool force, ibid_kv_gate *out) {
    ibid_enc e;
    ibid_reply r = {0};
    memset(out, 0, sizeof *out);
    ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
    ibid_enc_cstr(&e, "model", model ? model : "");
    if (text.s) ibid_enc_bin(&e, "text", text.s, text.n);
    if (positions) ibid_enc_u64(&e, "positions", positions);
    ibid_enc_bool(&e, "force", force);
    ibid_err err = ibid_request_finish(c, "attention.kv_gate", &e, ADD_MS, &r);
    const ibid_val *types = ibid_val_get(r.body, "types");
    size_t most = sizeof out->types / sizeof *out->types;
    for (size_t i = 0; !err && i < ibid_val_count(types) && i < most; i++)
        get_verdict(ibid_val_at(types, i), &out->types[out->n_types++]);
    if (!err) {
        copy_str(r.body, "name", out->name, sizeof out->name);
        copy_str(r.body, "kv_type", out->kv_type, sizeof out->kv_type);
    }
    ibid_reply_close(&r);
    return err;
}

/* ---- Tokens and blocks ---- */

ibid_err ibid_attn_tokenize(ibid_client *c, const ibid_hash *model, ibid_str text,
                            ibid_tokens *out) {
    ibid_enc e;
    ibid_reply r = {0};
    const void *p = NULL;
    size_t size = 0;
    memset(out, 0, sizeof *out);
    if (text.n > TEXT_MAX)
        return ibid_fail(IBID_TOOBIG, "a text of %zu bytes; at most %d a call", text.n, TEXT_MAX);
    ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
    put_hash(&e, "model", model);
    ibid_enc_bin(&e, "text", text.s, text.n);
    ibid_err err = ibid_request_finish(c, "attention.tokenize", &e, ENCODE_MS, &r);
    if (err) return err;
    uint64_t n = ibid_get_u64(r.body, "n", 0);
    if (!ibid_get_bin(r.body, "tokens", &p, &size) || n > size) {
        err = broken("tokenize");
        goto done;
    }
    /* One allocation freed by its ids: they lie first, the ends behind them, aligned. */
    size_t ids_bytes = ibid_align_up((size_t)n * sizeof *out->ids, sizeof *out->ends);
    int32_t *ids = ibid_alloc(ids_bytes + (size_t)n * sizeof *out->ends + 1);
    if (!ids) {
        err = ibid_fail(IBID_NOMEM, "no memory for %llu tokens", (unsigned long long)n);
        goto done;
    }
    uint64_t *ends = (uint64_t *)(void *)((char *)ids + ids_bytes);
    err = ibidi_wire_tokens_get(p, size, (size_t)n, ids, ends);
    if (!err && n && ends[n - 1] > text.n) err = broken("tokenize");
    if (err)
        ibid_free(ids);
    else
        *out = (ibid_tokens){ids, ends, (size_t)n};
done:
    ibid_reply_close(&r);
    return err;
}

ibid_err ibid_attn_encode(ibid_client *c, const ibid_hash *model, uint64_t job,
                          const ibid_encode_block *blocks, size_t n, uint64_t *numbers,
                          ibid_encode_result *out) {
    ibid_enc e;
    ibid_reply r = {0};
    if (n > IBID_ENCODE_BLOCKS_MAX)
        return ibid_fail(IBID_TOOBIG, "%zu blocks in one call; at most %d", n,
                         IBID_ENCODE_BLOCKS_MAX);
    ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
    put_hash(&e, "model", model);
    ibid_enc_u64(&e, "job", job);
    ibid_enc_array(&e, "blocks");
    for (size_t i = 0; i < n; i++) {
        ibid_enc_map(&e, NULL);
        ibid_enc_u64(&e, "n_title", blocks[i].n_title);
        ibidi_wire_ids_put(&e, "tokens", blocks[i].tokens, blocks[i].n_tokens);
        ibid_enc_end(&e);
    }
    ibid_enc_end(&e);
    ibid_err err = ibid_request_finish(c, "attention.encode", &e, ENCODE_MS, &r);
    if (err) return err;
    const ibid_val *list = ibid_val_get(r.body, "numbers");
    if (ibid_val_count(list) != n) err = broken("encode");
    for (size_t i = 0; !err && i < n; i++)
        if (!ibid_val_u64(ibid_val_at(list, i), &numbers[i])) err = broken("encode");
    if (!err && out)
        *out = (ibid_encode_result){.encoded_tokens = ibid_get_u64(r.body, "encoded_tokens", 0),
                                    .reused_tokens = ibid_get_u64(r.body, "reused_tokens", 0),
                                    .encoded_blocks = ibid_get_u64(r.body, "encoded_blocks", 0),
                                    .ms = ibid_get_f64(r.body, "ms", 0)};
    ibid_reply_close(&r);
    return err;
}

/* ---- Questions ---- */

ibid_err ibid_attn_question_keys(ibid_client *c, const ibid_hash *model, ibid_str question,
                                 ibid_question_keys *out) {
    ibid_enc e;
    ibid_reply r = {0};
    const void *ids = NULL, *keys = NULL;
    size_t ids_n = 0, keys_n = 0;
    memset(out, 0, sizeof *out);
    ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
    put_hash(&e, "model", model);
    ibid_enc_str(&e, "question", question.s, question.n);
    ibid_err err = ibid_request_finish(c, "attention.question_keys", &e, 0, &r);
    if (err) return err;
    ibid_question_keys k = {.dim = (size_t)ibid_get_u64(r.body, "dim", 0)};
    bool good = ibid_get_bin(r.body, "ids", &ids, &ids_n) && ids_n % 4 == 0 &&
                ibid_get_bin(r.body, "keys", &keys, &keys_n) &&
                get_hash(r.body, "calibration", &k.calibration) && k.dim <= 65536;
    k.n = ids_n / 4;
    if (!good || keys_n != k.n * k.dim) {
        err = broken("question_keys");
    } else if (!(k.ids = ibid_alloc(ids_n + keys_n + 1))) {
        err = ibid_fail(IBID_NOMEM, "no memory for a question's keys");
    } else {
        k.keys = (int8_t *)(k.ids + k.n);
        ibidi_wire_ids_get(ids, k.n, k.ids);
        if (keys_n) memcpy(k.keys, keys, keys_n);
        *out = k;
    }
    ibid_reply_close(&r);
    return err;
}

ibid_err ibid_attn_likelihoods(ibid_client *c, const ibid_hash *model, ibid_str prompt,
                               const ibid_str *texts, size_t n, double *out) {
    ibid_enc e;
    ibid_reply r = {0};
    ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
    put_hash(&e, "model", model);
    ibid_enc_str(&e, "prompt", prompt.s, prompt.n);
    ibid_enc_array(&e, "texts");
    for (size_t i = 0; i < n; i++) ibid_enc_str(&e, NULL, texts[i].s, texts[i].n);
    ibid_enc_end(&e);
    ibid_err err = ibid_request_finish(c, "attention.likelihoods", &e, 0, &r);
    if (err) return err;
    const ibid_val *list = ibid_val_get(r.body, "logs");
    if (ibid_val_count(list) != n) err = broken("likelihoods");
    for (size_t i = 0; !err && i < n; i++)
        if (!ibid_val_f64(ibid_val_at(list, i), &out[i])) err = broken("likelihoods");
    ibid_reply_close(&r);
    return err;
}

static void put_question(ibid_enc *e, const ibid_answer_request *q) {
    put_hash(e, "model", &q->model);
    ibid_enc_str(e, "question", q->question.s, q->question.n);
    ibid_enc_array(e, "blocks");
    for (size_t i = 0; i < q->n_blocks; i++) {
        ibid_enc_map(e, NULL);
        ibid_enc_u64(e, "document", q->blocks[i].document);
        ibid_enc_u64(e, "chunk", q->blocks[i].chunk);
        ibid_enc_u64(e, "block", q->blocks[i].block);
        ibid_enc_f64(e, "score", q->blocks[i].score);
        ibid_enc_end(e);
    }
    ibid_enc_end(e);
    ibid_enc_f64(e, "recompute", q->recompute);
    ibid_enc_u64(e, "max_tokens", q->max_tokens);
    ibid_enc_f64(e, "temperature", q->temperature);
    ibid_enc_f64(e, "top_p", q->top_p);
    ibid_enc_u64(e, "seed", q->seed);
    ibid_enc_u64(e, "max_quotes", q->max_quotes);
    ibid_enc_u64(e, "quote_bytes", q->quote_bytes);
    ibid_enc_u64(e, "mode", (uint64_t)q->mode);
    if (q->attention_share != 0) ibid_enc_f64(e, "attention_share", q->attention_share);
    if (q->attention_recall) ibid_enc_bool(e, "attention_recall", true);
}

static ibid_str str_of(const ibid_val *m, const char *key) {
    ibid_str s = {"", 0};
    return ibid_get_str(m, key, &s.s, &s.n) ? s : (ibid_str){"", 0};
}

static ibid_err read_citations(const ibid_val *list, ibid_citation **out, size_t *n) {
    *n = ibid_val_count(list);
    ibid_citation *c = ibid_calloc(*n + 1, sizeof *c);
    if (!c) return ibid_fail(IBID_NOMEM, "no memory for %zu citations", *n);
    for (size_t i = 0; i < *n; i++) {
        const ibid_val *v = ibid_val_at(list, i);
        c[i] = (ibid_citation){.document = ibid_get_u64(v, "document", 0),
                               .chunk = ibid_get_u64(v, "chunk", 0),
                               .start = ibid_get_u64(v, "start", 0),
                               .end = ibid_get_u64(v, "end", 0),
                               .quote = str_of(v, "quote"),
                               .weight = ibid_get_f64(v, "weight", 0)};
    }
    *out = c;
    return IBID_OK;
}

static void read_reasons(const ibid_val *list, ibid_answer_event *ev) {
    size_t at = 0, n = ibid_val_count(list);
    for (size_t i = 0; i < n && at < sizeof ev->encoded_why; i++) {
        const char *s = "";
        size_t len = 0;
        if (!ibid_val_str(ibid_val_at(list, i), &s, &len)) continue;
        int put = snprintf(ev->encoded_why + at, sizeof ev->encoded_why - at, "%s%.*s",
                           at ? ", " : "", (int)len, s);
        at += put > 0 ? (size_t)put : 0;
    }
}

static void read_numbers(const ibid_val *v, ibid_answer_event *ev) {
    ibid_str finish = str_of(v, "finish");
    ev->finish = finish.n == 6 && memcmp(finish.s, "length", 6) == 0 ? "length" : "stop";
    ev->prompt_tokens = ibid_get_u64(v, "prompt_tokens", 0);
    ev->reused_tokens = ibid_get_u64(v, "reused_tokens", 0);
    ev->recomputed_tokens = ibid_get_u64(v, "recomputed_tokens", 0);
    ev->encoded_tokens = ibid_get_u64(v, "encoded_tokens", 0);
    read_reasons(ibid_val_get(v, "encoded_why"), ev);
    ev->completion_tokens = ibid_get_u64(v, "completion_tokens", 0);
    ev->kv_bytes_from_disk = ibid_get_u64(v, "kv_bytes_from_disk", 0);
    ev->kv_wait_ms = ibid_get_f64(v, "kv_wait_ms", 0);
    ev->kv_bytes_read = ibid_get_u64(v, "kv_bytes_read", 0);
    ev->recompute = ibid_get_f64(v, "recompute", 0);
    ibid_str mode = str_of(v, "mode");
    ev->mode = mode.n == 7 && memcmp(mode.s, "extract", 7) == 0 ? "extract" : "generate";
    ev->evidence = ibid_get_f64(v, "evidence", 0);
    ev->attention_share = ibid_get_f64(v, "attention_share", 1);
    ev->attention_recall = ibid_get_f64(v, "attention_recall", -1);
    ev->first_token_ms = ibid_get_f64(v, "first_token_ms", 0);
    ev->total_ms = ibid_get_f64(v, "total_ms", 0);
}

static ibid_err hand_on(const ibid_val *v, bool (*on_event)(void *, const ibid_answer_event *),
                        void *arg) {
    ibid_str kind = str_of(v, "kind");
    ibid_answer_event ev = {.kind = IBID_ANSWER_PROGRESS, .text = str_of(v, "text")};
    ibid_citation *citations = NULL;
    ibid_err e = IBID_OK;
    if (kind.n == 5 && memcmp(kind.s, "token", 5) == 0) ev.kind = IBID_ANSWER_TOKEN;
    if (kind.n == 4 && memcmp(kind.s, "done", 4) == 0) {
        ev.kind = IBID_ANSWER_DONE;
        read_numbers(v, &ev);
        e = read_citations(ibid_val_get(v, "citations"), &citations, &ev.n_citations);
        ev.citations = citations;
    }
    if (!e && !on_event(arg, &ev)) e = ibid_fail(IBID_CANCELLED, "the answer was cancelled");
    ibid_free(citations);
    return e;
}

static void cancel(ibid_client *c, uint64_t stream) {
    ibid_enc e;
    ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
    ibid_enc_u64(&e, "stream", stream);
    (void)ibid_request_finish(c, "attention.cancel", &e, 0, NULL);
}

ibid_err ibid_attn_answer(ibid_client *c, const ibid_answer_request *q,
                          bool (*on_event)(void *, const ibid_answer_event *), void *arg) {
    ibid_enc e;
    ibid_reply r = {0};
    uint64_t stream, seq = 0;
    bool last = false;
    size_t waits = 0;
    ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
    put_question(&e, q);
    ibid_err err = ibid_request_finish(c, "attention.answer", &e, 0, &r);
    if (err) return err;
    stream = ibid_get_u64(r.body, "stream", 0);
    ibid_reply_close(&r);
    while (!err && !last) {
        r = (ibid_reply){0};
        ibid_request_begin(&e, IBID_BUS_MESSAGE_MAX - 4096);
        ibid_enc_u64(&e, "stream", stream);
        ibid_enc_u64(&e, "seq", seq);
        err = ibid_request_finish(c, "attention.next", &e, NEXT_MS, &r);
        if (err == IBID_TIMEOUT) { /* nothing yet: ask again for the same one */
            err = ++waits < NEXT_WAITS ? IBID_OK : err;
            continue;
        }
        if (err) break;
        waits = 0;
        last = ibid_get_bool(r.body, "last", false);
        err = hand_on(ibid_val_get(r.body, "event"), on_event, arg);
        if (err == IBID_CANCELLED && !last) cancel(c, stream);
        ibid_reply_close(&r);
        seq++;
    }
    return err;
}

ibid_err ibid_attn_status(ibid_client *c, ibid_reply *out) {
    return ibid_client_call(c, "attention.status", NULL, 0, out);
}
