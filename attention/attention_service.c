/* The attention room: bus messages to models, encoding and answers. */
#include "attention/attention_internal.h"
#include "attention/plan/likelihood.h"
#include "attention/tokenizer/template.h"
#include "attention/wire.h"
#include "rpc/base/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    WORKERS = 16,
    STREAMS = 16,
    EVENTS = 8192,
    REPORT_MAX = 16 * 1024 * 1024,
    STORE_WAIT_MS = 20000
};

/* ---- Reading bodies: the schema has checked presence, types and caps ---- */

bool ibidi_get_hash(const ibid_val *map, const char *key, ibid_hash *out) {
    const void *p = NULL;
    size_t n = 0;
    if (!ibid_get_bin(map, key, &p, &n) || n != sizeof out->b) return false;
    memcpy(out->b, p, n);
    return true;
}

ibid_str ibidi_get_str(const ibid_val *map, const char *key) {
    ibid_str s = {"", 0};
    return ibid_get_str(map, key, &s.s, &s.n) ? s : (ibid_str){"", 0};
}

static ibid_err get_model(ibidi_room *r, const ibid_val *body, ibidi_loaded **out) {
    ibid_hash h;
    if (!ibidi_get_hash(body, "model", &h))
        return ibid_fail(IBID_PROTO, "field model is not 32 bytes");
    return ibidi_model_get(r, &h, out);
}

/* ---- Models ---- */

static void put_info(ibid_enc *e, ibidi_loaded *m) {
    const ibid_model *x = m->model;
    uint64_t kv = 0;
    for (size_t l = 0; l < x->n_layers; l++) kv += ibid_kv_view_bytes(&m->prefix_kv.layers[l]);
    (void)pthread_mutex_lock(&m->lock);
    bool calibrated = m->calibrated;
    uint64_t key_dim = m->cal.dim;
    ibid_enc_map(e, "model");
    ibid_enc_bin(e, "fingerprint", x->fingerprint.b, sizeof x->fingerprint.b);
    ibid_enc_cstr(e, "name", m->name);
    ibid_enc_cstr(e, "arch", ibid_arch_name(x->arch));
    ibid_enc_cstr(e, "path", m->path);
    (void)pthread_mutex_unlock(&m->lock);
    ibid_enc_cstr(e, "template", x->chat ? x->chat->name : "none");
    ibid_enc_u64(e, "n_layers", x->n_layers);
    ibid_enc_u64(e, "n_heads", x->n_heads);
    ibid_enc_u64(e, "n_kv_heads", x->n_kv_heads);
    ibid_enc_u64(e, "head_dim", x->head_dim);
    ibid_enc_u64(e, "n_ctx", x->n_ctx);
    ibid_enc_u64(e, "n_vocab", x->n_vocab);
    ibid_enc_u64(e, "kv_bytes_per_token", kv / m->reader.n_prefix);
    ibid_enc_u64(e, "file_bytes", x->file_bytes);
    ibid_enc_bool(e, "calibrated", calibrated);
    ibid_enc_u64(e, "key_dim", key_dim);
    ibid_enc_cstr(e, "backend", ibid_engine_backend(m->engine));
    ibid_enc_end(e);
}

static ibid_err do_model_add(void *room, const ibid_call *call) {
    ibidi_loaded *m = NULL;
    ibidi_adding a = {.path = ibidi_get_str(call->body, "path"),
                      .name = ibidi_get_str(call->body, "name"),
                      .kv_type = ibidi_get_str(call->body, "kv_type"),
                      .force = ibid_get_bool(call->body, "force", false)};
    ibid_err e = ibidi_model_add(room, &a, &m);
    if (!e) put_info(call->reply, m);
    return e;
}

static ibid_err do_model_info(void *room, const ibid_call *call) {
    ibidi_loaded *m = NULL;
    ibid_err e = ibidi_model_find(room, ibidi_get_str(call->body, "model"), &m);
    if (!e) put_info(call->reply, m);
    return e;
}

static ibid_err do_calibrate(void *room, const ibid_call *call) {
    ibidi_loaded *m = NULL;
    ibid_buf report;
    ibid_buf_init(&report, REPORT_MAX);
    ibid_err e = ibidi_model_find(room, ibidi_get_str(call->body, "model"), &m);
    ibidi_calibrating c = {.sample = ibidi_get_str(call->body, "sample"),
                           .train = ibidi_get_str(call->body, "train"),
                           .teacher = ibidi_get_str(call->body, "teacher"),
                           .report = &report};
    if (!e && ibid_get_bool(call->body, "pairs", false))
        e = ibidi_model_train_texts(m, c.train, &report);
    else if (!e)
        e = ibidi_model_calibrate(room, m, &c);
    if (!e) ibid_enc_str(call->reply, "report", report.data ? report.data : "", report.len);
    ibid_buf_fini(&report);
    return e;
}

/* ---- Tokens and blocks ---- */

static ibid_err do_tokenize(void *room, const ibid_call *call) {
    ibidi_loaded *m = NULL;
    ibid_token *t = NULL;
    size_t n = 0;
    ibid_str text = ibidi_get_str(call->body, "text");
    ibid_buf packed;
    ibid_buf_init(&packed, IBID_BUS_MESSAGE_MAX - 65536);
    ibid_err e = get_model(room, call->body, &m);
    if (!e) e = ibid_tokenize(m->model->tokenizer, text.s, text.n, false, &t, &n);
    if (!e) e = ibidi_wire_tokens_put(t, n, &packed);
    if (!e) {
        ibid_enc_u64(call->reply, "n", n);
        ibid_enc_bin(call->reply, "tokens", packed.data ? packed.data : "", packed.len);
    }
    ibid_free(t);
    ibid_buf_fini(&packed);
    return e;
}

static ibid_err read_blocks(const ibid_val *list, ibid_encode_block **out, size_t *n_out) {
    size_t n = ibid_val_count(list);
    if (n > IBID_ENCODE_BLOCKS_MAX)
        return ibid_fail(IBID_TOOBIG, "%zu blocks in one call; at most %d", n,
                         IBID_ENCODE_BLOCKS_MAX);
    ibid_encode_block *b = ibid_calloc(n + 1, sizeof *b + IBID_BLOCK_TOKENS_MAX * sizeof(int32_t));
    if (!b) return ibid_fail(IBID_NOMEM, "no memory for %zu blocks", n);
    int32_t *tokens = (int32_t *)(void *)(b + n + 1);
    for (size_t i = 0; i < n; i++) {
        const ibid_val *v = ibid_val_at(list, i);
        const void *p = NULL;
        size_t bytes = 0;
        if (!ibid_get_bin(v, "tokens", &p, &bytes) || bytes % 4 ||
            bytes > IBID_BLOCK_TOKENS_MAX * sizeof *tokens) {
            ibid_free(b);
            return ibid_fail(IBID_INVAL, "block %zu has more than %d tokens, or a broken one", i,
                             IBID_BLOCK_TOKENS_MAX);
        }
        ibidi_wire_ids_get(p, bytes / 4, tokens);
        b[i] = (ibid_encode_block){
            .n_title = ibid_get_u64(v, "n_title", 0), .n_tokens = bytes / 4, .tokens = tokens};
        tokens += IBID_BLOCK_TOKENS_MAX;
    }
    *out = b;
    *n_out = n;
    return IBID_OK;
}

static ibid_err do_encode(void *room, const ibid_call *call) {
    ibidi_loaded *m = NULL;
    ibid_encode_block *b = NULL;
    ibid_encode_result out = {0};
    uint64_t numbers[IBID_ENCODE_BLOCKS_MAX];
    size_t n = 0;
    ibid_err e = get_model(room, call->body, &m);
    if (!e) e = read_blocks(ibid_val_get(call->body, "blocks"), &b, &n);
    if (!e)
        e = ibidi_encode(room, m, ibid_get_u64(call->body, "job", 0), b, n, call, numbers, &out);
    ibid_free(b);
    if (e) return e;
    ibid_enc_array(call->reply, "numbers");
    for (size_t i = 0; i < n; i++) ibid_enc_u64(call->reply, NULL, numbers[i]);
    ibid_enc_end(call->reply);
    ibid_enc_u64(call->reply, "encoded_tokens", out.encoded_tokens);
    ibid_enc_u64(call->reply, "reused_tokens", out.reused_tokens);
    ibid_enc_u64(call->reply, "encoded_blocks", out.encoded_blocks);
    ibid_enc_f64(call->reply, "ms", out.ms);
    return IBID_OK;
}

/* ---- Questions ---- */

static ibid_err question_keys(ibidi_loaded *m, const ibid_calibration *cal, ibid_ids *ids,
                              int8_t **keys) {
    ibid_reader reader = m->reader;
    reader.urgent = true;
    if (reader.n_prefix + ids->n > m->model->n_ctx)
        return ibid_fail(IBID_CONTEXT, "the question has %zu tokens; %zu fit the model's context",
                         ids->n, m->model->n_ctx - reader.n_prefix);
    *keys = ibid_alloc(ids->n * cal->dim + 1);
    if (!*keys) return ibid_fail(IBID_NOMEM, "no memory for a question's keys");
    ibid_sched_question_begin(&m->sched);
    ibid_err e = ibid_read_question(&reader, ids->ids, ids->n, cal, *keys);
    ibid_sched_question_end(&m->sched);
    return e;
}

static ibid_err do_question_keys(void *room, const ibid_call *call) {
    ibidi_loaded *m = NULL;
    ibid_ids ids = {NULL, 0};
    int8_t *keys = NULL;
    ibid_calibration *cal = ibid_calloc(1, sizeof *cal);
    ibid_err e = cal ? get_model(room, call->body, &m) : ibid_fail(IBID_NOMEM, "out of memory");
    if (!e) e = ibid_prompt_keys(m->model, ibidi_get_str(call->body, "question"), &ids);
    if (!e) {
        ibidi_model_calibration(m, cal);
        e = question_keys(m, cal, &ids, &keys);
    }
    if (!e) {
        ibid_enc_u64(call->reply, "dim", cal->dim);
        ibidi_wire_ids_put(call->reply, "ids", ids.ids, ids.n);
        ibid_enc_bin(call->reply, "keys", keys, ids.n * cal->dim);
        ibid_enc_bin(call->reply, "calibration", cal->id.b, sizeof cal->id.b);
    }
    ibid_free(ids.ids);
    ibid_free(keys);
    ibid_free(cal);
    return e;
}

static ibid_err likelihoods(ibidi_loaded *m, const ibid_ids *prompt, const ibid_ids *texts,
                            size_t n, double *out) {
    ibid_sched_question_begin(&m->sched);
    ibid_err e = ibid_likelihoods(m->engine, &m->sched, prompt, texts, n, out);
    ibid_sched_question_end(&m->sched);
    return e;
}

static ibid_err as_ids(const ibid_model *m, ibid_str text, ibid_ids *out) {
    ibid_token *t = NULL;
    size_t n = 0;
    ibid_err e = ibid_tokenize(m->tokenizer, text.s, text.n, false, &t, &n);
    if (!e && !(out->ids = ibid_alloc(n * sizeof *out->ids + 1)))
        e = ibid_fail(IBID_NOMEM, "no memory for %zu tokens", n);
    for (size_t i = 0; i < n && !e; i++) out->ids[i] = t[i].id;
    out->n = e ? 0 : n;
    ibid_free(t);
    return e;
}

static ibid_err do_likelihoods(void *room, const ibid_call *call) {
    ibidi_loaded *m = NULL;
    ibid_ids prompt = {NULL, 0}, texts[IBID_LIKELIHOOD_TEXTS];
    double out[IBID_LIKELIHOOD_TEXTS];
    const ibid_val *list = ibid_val_get(call->body, "texts");
    size_t n = ibid_val_count(list), got = 0;
    memset(texts, 0, sizeof texts);
    ibid_err e = n <= IBID_LIKELIHOOD_TEXTS
                     ? get_model(room, call->body, &m)
                     : ibid_fail(IBID_TOOBIG, "%zu texts; at most %d", n, IBID_LIKELIHOOD_TEXTS);
    if (!e) e = as_ids(m->model, ibidi_get_str(call->body, "prompt"), &prompt);
    for (; got < n && !e; got++) {
        ibid_str s;
        if (!ibid_val_str(ibid_val_at(list, got), &s.s, &s.n))
            e = ibid_fail(IBID_PROTO, "text %zu is none", got);
        else
            e = as_ids(m->model, s, &texts[got]);
    }
    if (!e) e = likelihoods(m, &prompt, texts, n, out);
    if (!e) {
        ibid_enc_array(call->reply, "logs");
        for (size_t i = 0; i < n; i++) ibid_enc_f64(call->reply, NULL, out[i]);
        ibid_enc_end(call->reply);
    }
    ibid_free(prompt.ids);
    for (size_t i = 0; i < got; i++) ibid_free(texts[i].ids);
    return e;
}

static ibid_err do_answer(void *room, const ibid_call *call) {
    return ibidi_answer_begin(room, call);
}

static ibid_err do_next(void *room, const ibid_call *call) {
    return ibid_streams_next(((ibidi_room *)room)->streams, call);
}

static ibid_err do_cancel(void *room, const ibid_call *call) {
    ibidi_answer_cancel(room, ibid_get_u64(call->body, "stream", 0));
    return ibid_streams_cancel(((ibidi_room *)room)->streams, call);
}

static void put_backend(ibid_enc *e, const ibidi_loaded *m) {
    ibid_engine_gpu g;
    ibid_enc_cstr(e, "backend", ibid_engine_backend(m->engine));
    if (!ibid_engine_gpu_look(m->engine, &g)) return;
    ibid_enc_cstr(e, "device", g.name);
    ibid_enc_u64(e, "gpu_pool", g.pool);
    ibid_enc_u64(e, "gpu_pool_used", g.pool_used);
    ibid_enc_u64(e, "gpu_blocks_hit", g.hits);
    ibid_enc_u64(e, "gpu_blocks_missed", g.misses);
    ibid_enc_u64(e, "gpu_blocks_evicted", g.evicted);
    ibid_enc_u64(e, "gpu_graph_steps", g.graph_steps);
    ibid_enc_u64(e, "gpu_streamed_steps", g.streamed_steps);
}

static void put_status(ibid_enc *e, ibidi_loaded *m) {
    char hex[65];
    uint64_t questions, encoders;
    ibid_sched_counts(&m->sched, &questions, &encoders);
    ibid_hash_hex(&m->model->fingerprint, hex);
    ibid_enc_map(e, NULL);
    ibid_enc_cstr(e, "name", m->name);
    ibid_enc_cstr(e, "fingerprint", hex);
    (void)pthread_mutex_lock(&m->lock);
    ibid_enc_bool(e, "calibrated", m->calibrated);
    ibid_enc_u64(e, "retrieval_heads", m->cal.n_heads);
    ibid_enc_u64(e, "key_dim", m->cal.dim);
    ibid_enc_f64(e, "sample_recall1", m->cal.recall1);
    ibid_enc_u64(e, "encoded_tokens", m->encoded_tokens);
    ibid_enc_u64(e, "reused_tokens", m->reused_tokens);
    ibid_enc_u64(e, "answers", m->answers);
    ibid_enc_u64(e, "completion_tokens", m->completion_tokens);
    (void)pthread_mutex_unlock(&m->lock);
    put_backend(e, m);
    ibid_enc_u64(e, "questions_waiting", questions);
    ibid_enc_u64(e, "encoders_waiting", encoders);
    ibid_enc_end(e);
}

static ibid_err do_status(void *room, const ibid_call *call) {
    ibidi_room *r = room;
    const ibid_kernels *k = NULL;
    ibid_err e = ibid_kernels_get(r->opts.kernels[0] ? r->opts.kernels : NULL, &k);
    if (e) return e;
    ibid_enc_cstr(call->reply, "kernels", k->name);
    ibid_enc_u64(call->reply, "threads", r->opts.threads);
    (void)pthread_mutex_lock(&r->lock);
    ibidi_loaded *m = r->models;
    ibid_enc_u64(call->reply, "answers_running", r->n_answering);
    (void)pthread_mutex_unlock(&r->lock);
    ibid_enc_array(call->reply, "models"); /* the list only grows, at its end */
    for (; m; m = m->next) put_status(call->reply, m);
    ibid_enc_end(call->reply);
    return IBID_OK;
}

static const ibid_method methods[] = {
    {"attention.model_add", do_model_add},
    {"attention.model_info", do_model_info},
    {"attention.calibrate", do_calibrate},
    {"attention.kv_gate", ibidi_kv_gate},
    {"attention.tokenize", do_tokenize},
    {"attention.encode", do_encode},
    {"attention.question_keys", do_question_keys},
    {"attention.likelihoods", do_likelihoods},
    {"attention.answer", do_answer},
    {"attention.next", do_next},
    {"attention.cancel", do_cancel},
    {"attention.status", do_status},
    {NULL, NULL},
};

/* ---- Opening and closing ---- */

/* IBID_KV_TYPE (f32, f16, q8_0): for models added from now on; for measuring. */
static ibid_err kv_type_from_environment(ibid_kv_type *out) {
    static const char *const names[] = {"f32", "f16", "q8_0"};
    const char *given = getenv("IBID_KV_TYPE");
    *out = IBID_KV_Q8_0;
    if (!given || !*given) return IBID_OK;
    for (size_t i = 0; i < 3; i++) {
        if (strcmp(given, names[i]) != 0) continue;
        *out = (ibid_kv_type)i;
        return IBID_OK;
    }
    return ibid_fail(IBID_INVAL, "IBID_KV_TYPE is %s; it can be f32, f16 or q8_0", given);
}

static void room_close(void *room) {
    ibidi_room *r = room;
    if (!r) return;
    atomic_store(&r->closing, true);
    if (r->streams) ibid_streams_stop(r->streams);
    ibidi_answers_stop(r);
    ibid_server_close(r->server);
    ibid_streams_close(r->streams);
    ibidi_models_close(r);
    ibid_client_close(r->kvstore);
    ibid_store_close(r->store);
    (void)pthread_mutex_destroy(&r->lock);
    (void)pthread_mutex_destroy(&r->load_lock);
    (void)pthread_cond_destroy(&r->idle);
    ibid_free(r);
}

/* At a first start the store's writer may still be about to create it. */
static ibid_err open_store(const ibid_host_opts *o, ibid_store **out) {
    char dir[IBID_HOST_PATH_MAX + 16];
    uint64_t start = ibid_now_ns();
    (void)snprintf(dir, sizeof dir, "%s/" IBID_STORE_FOLDER, o->data_dir);
    ibid_store_opts so = {.dir = dir, .readonly = true, .map_size = o->map_size};
    ibid_err e = ibid_store_open(&so, out);
    while (e == IBID_NOTFOUND && !o->inproc && ibid_ms_since(start) < STORE_WAIT_MS) {
        (void)usleep(100000);
        e = ibid_store_open(&so, out);
    }
    return e;
}

static ibid_err open_parts(ibidi_room *r, const ibid_host_opts *o) {
    char url[IBID_BUS_URL_MAX];
    ibid_err e = kv_type_from_environment(&r->kv_type);
    if (!e) e = ibid_bus_url(o->data_dir, "kvstore", o->inproc, url);
    if (!e) e = ibid_client_open(url, &r->kvstore);
    if (!e) e = open_store(o, &r->store);
    if (!e) e = ibid_streams_open(STREAMS, EVENTS, &r->streams);
    if (!e) e = ibid_bus_url(o->data_dir, "attention", o->inproc, url);
    ibid_server_opts s = {.url = url,
                          .methods = methods,
                          .room = r,
                          .n_workers = o->workers ? o->workers : WORKERS,
                          .name = "attention"};
    return e ? e : ibid_server_open(&s, &r->server);
}

static ibid_err room_open(const ibid_host_opts *o, void **room) {
    ibidi_room *r = ibid_calloc(1, sizeof *r);
    if (!r) return ibid_fail(IBID_NOMEM, "no memory for the attention room");
    r->opts = *o;
    (void)pthread_mutex_init(&r->lock, NULL);
    (void)pthread_mutex_init(&r->load_lock, NULL);
    (void)pthread_cond_init(&r->idle, NULL);
    ibid_err e = open_parts(r, o);
    if (e)
        room_close(r);
    else
        *room = r;
    return e;
}

const ibid_room_vtable ibid_attention_room = {"attention", room_open, room_close};
