/* Which KV types a model may be stored in: what was measured, kept in its record, and refusing a
 * type that costs too much. A type is measured when a model is added with it; for a record from
 * before there were gates, when the first document is read. */
#include "attention/attention_internal.h"

#include <string.h>

enum {
    FIRST_POSITIONS = 512, /* of the measurement nobody asked for */
    GATES_VERSION = 1,
    ENCODING_MAX = 65536
};

/* ---- Verdicts as the model's record holds them ---- */

ibid_err ibidi_gates_encode(const ibidi_gates *g, ibid_buf *out) {
    ibid_enc e;
    bool any = false;
    for (size_t i = 0; i < IBID_GATE_TYPES; i++) any = any || g->of[i].known;
    if (!any) return IBID_OK;
    ibid_enc_init(&e, ENCODING_MAX);
    ibid_enc_map(&e, NULL);
    ibid_enc_u64(&e, "v", GATES_VERSION);
    ibid_enc_array(&e, "types");
    for (size_t i = 0; i < IBID_GATE_TYPES; i++) {
        const ibidi_verdict *v = &g->of[i];
        if (!v->known) continue;
        ibid_enc_map(&e, NULL);
        ibid_enc_cstr(&e, "type", ibid_kv_type_name((ibid_kv_type)i));
        ibid_enc_u64(&e, "positions", v->score.n);
        ibid_enc_f64(&e, "kl_mean", v->score.kl_mean);
        ibid_enc_f64(&e, "kl_p99", v->score.kl_p99);
        ibid_enc_f64(&e, "top1", v->score.top1);
        ibid_enc_bool(&e, "forced", v->forced);
        ibid_enc_end(&e);
    }
    ibid_enc_end(&e);
    ibid_enc_end(&e);
    ibid_err err = ibid_enc_done(&e);
    if (!err) err = ibid_buf_append(out, e.buf.data, e.buf.len);
    ibid_enc_fini(&e);
    return err;
}

void ibidi_gates_decode(ibid_str data, ibidi_gates *out) {
    ibid_msg *m = NULL;
    memset(out, 0, sizeof *out);
    if (data.n == 0 || ibid_msg_open(data.s, data.n, &m)) return;
    const ibid_val *root = ibid_msg_root(m), *types = ibid_val_get(root, "types");
    if (ibid_get_u64(root, "v", 0) != GATES_VERSION) types = NULL;
    for (size_t i = 0; i < ibid_val_count(types); i++) {
        const ibid_val *v = ibid_val_at(types, i);
        ibid_kv_type type;
        if (!ibid_kv_type_from_name(ibidi_get_str(v, "type"), &type)) continue;
        /* What is missing reads as a type that failed. */
        out->of[type] = (ibidi_verdict){.known = true,
                                        .forced = ibid_get_bool(v, "forced", false),
                                        .score = {.n = ibid_get_u64(v, "positions", 0),
                                                  .kl_mean = ibid_get_f64(v, "kl_mean", 1),
                                                  .kl_p99 = ibid_get_f64(v, "kl_p99", 1),
                                                  .top1 = ibid_get_f64(v, "top1", 0)}};
    }
    ibid_msg_close(m);
}

/* ---- Measuring ---- */

static bool allowed(const ibidi_verdict *v) {
    return v->known && (v->forced || ibid_gate_passes(&v->score));
}

/* Measures types; their verdicts go to m. force: also allows those that fail. */
static ibid_err measure(ibidi_room *r, ibidi_loaded *m, const ibid_kv_type *types, size_t n,
                        ibid_str text, size_t positions, bool force) {
    ibid_engine_opts o = {.kernels = r->opts.kernels[0] ? r->opts.kernels : NULL,
                          .n_threads = r->opts.threads};
    ibid_gate_score scores[IBID_GATE_TYPES];
    ibid_gate_job j = {.sched = &m->sched,
                       .text = text,
                       .positions = positions,
                       .types = types,
                       .n_types = n,
                       .cancel = &r->closing};
    ibid_err e = ibid_engine_open(m->model, &o, &j.engine);
    if (!e) e = ibid_gate_run(&j, scores);
    ibid_engine_close(j.engine);
    if (e) return e;
    (void)pthread_mutex_lock(&m->lock);
    for (size_t i = 0; i < n; i++) {
        ibidi_verdict *v = &m->gates.of[types[i]];
        bool passes = ibid_gate_passes(&scores[i]);
        /* What was allowed once stays so, until it passes by itself. */
        *v = (ibidi_verdict){scores[i], true, !passes && (force || v->forced)};
        ibid_log(IBID_LOG_INFO, "%s: %s KV: mean KL %.1e, same likeliest token %.2f %%: %s",
                 m->path, ibid_kv_type_name(types[i]), scores[i].kl_mean, 100 * scores[i].top1,
                 passes      ? "passes"
                 : v->forced ? "fails, used all the same"
                             : "fails");
    }
    (void)pthread_mutex_unlock(&m->lock);
    return IBID_OK;
}

static ibidi_verdict verdict_of(ibidi_loaded *m, ibid_kv_type type) {
    (void)pthread_mutex_lock(&m->lock);
    ibidi_verdict v = m->gates.of[type];
    (void)pthread_mutex_unlock(&m->lock);
    return v;
}

ibid_err ibidi_gate_add(ibidi_room *r, ibidi_loaded *m, ibid_kv_type type, bool force) {
    ibidi_verdict v = verdict_of(m, type);
    ibid_err e = IBID_OK;
    if (type == IBID_KV_F32) return IBID_OK; /* nothing is rounded */
    if (!v.known || (force && !allowed(&v)))
        e = measure(r, m, &type, 1, (ibid_str){NULL, 0}, FIRST_POSITIONS, force);
    if (e) return e;
    v = verdict_of(m, type);
    if (allowed(&v)) return IBID_OK;
    return ibid_fail(IBID_INEXACT,
                     "%s KV changes what this model says: mean KL divergence %.1e (at most %.0e), "
                     "same likeliest token at %.1f %% of positions (at least %.0f %%); add it with "
                     "--kv-type %s, or with --force to use %s all the same",
                     ibid_kv_type_name(type), v.score.kl_mean, IBID_GATE_KL, 100 * v.score.top1,
                     100 * IBID_GATE_TOP1, type == IBID_KV_Q8_0 ? "f16" : "f32",
                     ibid_kv_type_name(type));
}

ibid_err ibidi_gate_check(ibidi_room *r, ibidi_loaded *m) {
    ibid_kv_type type = m->reader.kv_type;
    ibidi_verdict v = verdict_of(m, type);
    if (type == IBID_KV_F32 || allowed(&v)) return IBID_OK;
    (void)pthread_mutex_lock(&r->load_lock);
    ibid_err e = IBID_OK;
    v = verdict_of(m, type);
    if (!v.known) {
        e = measure(r, m, &type, 1, (ibid_str){NULL, 0}, FIRST_POSITIONS, false);
        if (!e) e = ibidi_model_save(r, m);
    }
    (void)pthread_mutex_unlock(&r->load_lock);
    v = verdict_of(m, type);
    if (e || allowed(&v)) return e;
    return ibid_fail(IBID_INEXACT,
                     "%s KV changes what model %s says: mean KL divergence %.1e (at most %.0e), "
                     "same likeliest token at %.1f %% of positions (at least %.0f %%); allow it "
                     "with `ibid kv-gate --force`, or add the model with --kv-type %s in a new "
                     "data folder",
                     ibid_kv_type_name(type), m->name, v.score.kl_mean, IBID_GATE_KL,
                     100 * v.score.top1, 100 * IBID_GATE_TOP1,
                     type == IBID_KV_Q8_0 ? "f16" : "f32");
}

/* ---- attention.kv_gate ---- */

static void put_verdict(ibid_enc *e, ibid_kv_type type, const ibidi_verdict *v) {
    ibid_enc_map(e, NULL);
    ibid_enc_cstr(e, "type", ibid_kv_type_name(type));
    ibid_enc_u64(e, "positions", v->score.n);
    ibid_enc_f64(e, "kl_mean", v->score.kl_mean);
    ibid_enc_f64(e, "kl_p99", v->score.kl_p99);
    ibid_enc_f64(e, "top1", v->score.top1);
    ibid_enc_bool(e, "passed", ibid_gate_passes(&v->score));
    ibid_enc_bool(e, "forced", v->forced);
    ibid_enc_end(e);
}

ibid_err ibidi_kv_gate(void *room, const ibid_call *call) {
    ibidi_room *r = room;
    ibidi_loaded *m = NULL;
    const void *p = NULL;
    ibid_kv_type types[] = {IBID_KV_F16, IBID_KV_Q8_0};
    ibid_str text = {NULL, 0};
    if (ibid_get_bin(call->body, "text", &p, &text.n)) text.s = p ? p : "";
    size_t positions = ibid_get_u64(call->body, "positions", IBID_GATE_POSITIONS);
    ibid_err e = ibidi_model_find(r, ibidi_get_str(call->body, "model"), &m);
    if (e) return e;
    size_t n = ibid_kv_type_fits(m->model, IBID_KV_Q8_0) ? 2 : 1;
    e = measure(r, m, types, n, text, positions, ibid_get_bool(call->body, "force", false));
    if (e) return e;
    (void)pthread_mutex_lock(&r->load_lock);
    e = ibidi_model_save(r, m);
    (void)pthread_mutex_unlock(&r->load_lock);
    if (e) return e;
    ibid_enc_cstr(call->reply, "name", m->name);
    ibid_enc_cstr(call->reply, "kv_type", ibid_kv_type_name(m->reader.kv_type));
    ibid_enc_array(call->reply, "types");
    for (size_t i = 0; i < n; i++) {
        ibidi_verdict v = verdict_of(m, types[i]);
        put_verdict(call->reply, types[i], &v);
    }
    ibid_enc_end(call->reply);
    return IBID_OK;
}
