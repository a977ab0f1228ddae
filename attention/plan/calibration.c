#include "attention/plan/calibration.h"

#include "rpc/bus/msg.h"

#include <math.h>
#include <string.h>

enum { CALIBRATION_VERSION = 2, ENCODING_MAX = 4 * 1024 * 1024, NUMBERS = 8, OLD_NUMBERS = 6 };

void ibid_calibration_fini(ibid_calibration *c) {
    ibid_keymap_close(c->map);
    memset(c, 0, sizeof *c);
}

/* ---- Numbers in bins, little-endian: floats as their 32 bits, halves as their 16 ---- */

static void put_floats(ibid_enc *e, const char *key, const float *x, size_t n) {
    uint8_t *p = ibid_enc_bin_reserve(e, key, n * 4);
    for (size_t i = 0; p && i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        for (size_t b = 0; b < 4; b++) p[4 * i + b] = (uint8_t)(bits >> (8 * b));
    }
}

static bool get_floats(const ibid_val *map, const char *key, float *x, size_t n) {
    const void *data = NULL;
    size_t size = 0;
    if (n == 0) return true;
    if (!ibid_get_bin(map, key, &data, &size) || size != n * 4) return false;
    const uint8_t *p = data;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = 0;
        for (size_t b = 0; b < 4; b++) bits |= (uint32_t)p[4 * i + b] << (8 * b);
        memcpy(&x[i], &bits, sizeof bits);
        if (!isfinite(x[i])) return false;
    }
    return true;
}

static void put_halves(ibid_enc *e, const char *key, const uint16_t *x, size_t n) {
    uint8_t *p = ibid_enc_bin_reserve(e, key, n * 2);
    for (size_t i = 0; p && i < n; i++) {
        p[2 * i] = (uint8_t)x[i];
        p[2 * i + 1] = (uint8_t)(x[i] >> 8);
    }
}

static bool get_halves(const ibid_val *map, const char *key, uint16_t *x, size_t n) {
    const void *data = NULL;
    size_t size = 0;
    if (n == 0) return true;
    if (!ibid_get_bin(map, key, &data, &size) || size != n * 2) return false;
    const uint8_t *p = data;
    for (size_t i = 0; i < n; i++) x[i] = (uint16_t)(p[2 * i] | p[2 * i + 1] << 8);
    return true;
}

static void put_heads(ibid_enc *e, const char *key, const ibid_head *h, size_t n) {
    ibid_enc_array(e, key);
    for (size_t i = 0; i < n; i++) {
        ibid_enc_u64(e, NULL, h[i].layer);
        ibid_enc_u64(e, NULL, h[i].kv_head);
    }
    ibid_enc_end(e);
}

static bool get_heads(const ibid_val *root, const char *key, size_t most, ibid_head *out,
                      uint32_t *n_out) {
    const ibid_val *heads = ibid_val_get(root, key);
    size_t n = ibid_val_count(heads);
    uint64_t layer, kv_head;
    if (!ibid_val_is_array(heads) || n % 2 || n / 2 > most) return false;
    for (size_t i = 0; i < n / 2; i++) {
        if (!ibid_val_u64(ibid_val_at(heads, 2 * i), &layer) || layer > UINT16_MAX ||
            !ibid_val_u64(ibid_val_at(heads, 2 * i + 1), &kv_head) || kv_head > UINT16_MAX)
            return false;
        out[i] = (ibid_head){(uint32_t)layer, (uint32_t)kv_head};
    }
    *n_out = (uint32_t)(n / 2);
    return true;
}

static bool get_u32(const ibid_val *root, const char *key, uint32_t most, uint32_t *out) {
    uint64_t v = ibid_get_u64(root, key, 0);
    *out = v <= most ? (uint32_t)v : 0;
    return v <= most;
}

/* ---- The map ---- */

/* What makes token keys, into an open map. Its bytes alone decide a calibration's id. */
static void put_map(ibid_enc *e, const ibid_keymap *m) {
    size_t d = ibid_keymap_input(m);
    ibid_enc_u64(e, "head_dim", m->head_dim);
    put_heads(e, "inputs", m->inputs, m->n_inputs);
    ibid_enc_u64(e, "norm", m->norm);
    put_floats(e, "mean", m->mean, d);
    if (m->gain) put_floats(e, "gain", m->gain, d);
    if (m->question_mean) put_floats(e, "question_mean", m->question_mean, d);
    ibid_enc_array(e, "raw");
    for (size_t i = 0; i < m->n_raw; i++) ibid_enc_u64(e, NULL, m->raw[i]);
    ibid_enc_end(e);
    put_floats(e, "raw_weight", m->raw_weight, m->n_raw);
    ibid_enc_u64(e, "out", m->out);
    ibid_enc_u64(e, "hidden", m->hidden);
    if (!m->out) return;
    put_floats(e, "out_weight", &m->out_weight, 1);
    put_halves(e, "w0", m->w0, m->out * d);
    put_floats(e, "b0", m->b0, m->out);
    if (!m->hidden) return;
    put_halves(e, "w1", m->w1, m->hidden * d);
    put_floats(e, "b1", m->b1, m->hidden);
    put_halves(e, "w2", m->w2, (size_t)m->out * m->hidden);
}

static ibid_err map_id(const ibid_keymap *m, ibid_hash *out) {
    ibid_enc e;
    ibid_enc_init(&e, ENCODING_MAX);
    ibid_enc_map(&e, NULL);
    put_map(&e, m);
    ibid_enc_end(&e);
    ibid_err err = ibid_enc_done(&e);
    if (!err) *out = ibid_hash_bytes(e.buf.data, e.buf.len);
    ibid_enc_fini(&e);
    return err;
}

static bool get_sizes(const ibid_val *root, ibid_keymap *s) {
    const ibid_val *raw = ibid_val_get(root, "raw");
    size_t n = ibid_val_count(raw);
    uint64_t at;
    uint32_t norm;
    if (!get_heads(root, "inputs", IBID_INPUTS_MAX, s->inputs, &s->n_inputs) || n > IBID_RAW_MAX)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (!ibid_val_u64(ibid_val_at(raw, i), &at) || at >= s->n_inputs) return false;
        s->raw[i] = (uint32_t)at;
    }
    s->n_raw = (uint32_t)n;
    s->has_gain = ibid_val_get(root, "gain") != NULL;
    s->has_question_mean = ibid_val_get(root, "question_mean") != NULL;
    bool good = get_u32(root, "norm", 1, &norm) && get_u32(root, "out", IBID_OUT_MAX, &s->out) &&
                get_u32(root, "head_dim", IBID_HEAD_DIM_MAX, &s->head_dim) &&
                get_u32(root, "hidden", IBID_HIDDEN_MAX, &s->hidden);
    s->norm = norm == 1;
    return good;
}

static bool get_parts(const ibid_val *root, ibid_keymap *m) {
    size_t d = ibid_keymap_input(m), out = m->out, hidden = m->hidden;
    return get_floats(root, "mean", m->mean, d) &&
           get_floats(root, "gain", m->gain, m->gain ? d : 0) &&
           get_floats(root, "question_mean", m->question_mean, m->question_mean ? d : 0) &&
           get_floats(root, "raw_weight", m->raw_weight, m->n_raw) &&
           get_floats(root, "out_weight", &m->out_weight, out ? 1 : 0) &&
           get_halves(root, "w0", m->w0, out * d) && get_floats(root, "b0", m->b0, out) &&
           get_halves(root, "w1", m->w1, hidden * d) && get_floats(root, "b1", m->b1, hidden) &&
           get_halves(root, "w2", m->w2, out * hidden);
}

static ibid_err damaged(void) {
    return ibid_fail(IBID_CORRUPT, "a stored calibration is damaged; run `ibid model calibrate`");
}

static ibid_err get_map(const ibid_val *root, ibid_keymap **out) {
    ibid_keymap sizes = {.head_dim = 0}, *m = NULL;
    if (!get_sizes(root, &sizes)) return damaged();
    ibid_err e = ibid_keymap_open(&sizes, &m);
    if (e == IBID_INVAL) return damaged();
    if (!e && (!get_parts(root, m) || !ibid_keymap_settle(m))) e = damaged();
    if (e)
        ibid_keymap_close(m);
    else
        *out = m;
    return e;
}

/* ---- Version 1: raw parts of equal weight ---- */

static void put_old(ibid_enc *e, const ibid_calibration *c) {
    const float numbers[OLD_NUMBERS] = {c->null_mean, c->null_sd, c->relevant,
                                        c->find,      c->recall1, c->margin};
    ibid_enc_u64(e, "v", 1);
    ibid_enc_u64(e, "head_dim", c->head_dim);
    put_heads(e, "heads", c->heads, c->n_heads);
    put_floats(e, "mean", c->map->mean, ibid_keymap_input(c->map));
    put_floats(e, "numbers", numbers, OLD_NUMBERS);
}

static ibid_err get_old_map(const ibid_val *root, const ibid_calibration *c, ibid_keymap **out) {
    ibid_keymap *m = NULL;
    ibid_err e = ibid_keymap_open_raw(c->heads, c->n_heads, c->head_dim, &m);
    if (e == IBID_INVAL) return damaged();
    if (!e && !get_floats(root, "mean", m->mean, ibid_keymap_input(m))) e = damaged();
    if (e)
        ibid_keymap_close(m);
    else
        *out = m;
    return e;
}

/* ---- The whole ---- */

static void put_new(ibid_enc *e, const ibid_calibration *c) {
    const float numbers[NUMBERS] = {c->null_mean, c->null_sd, c->relevant,   c->find,
                                    c->recall1,   c->margin,  c->keys_weight};
    ibid_enc_u64(e, "v", CALIBRATION_VERSION);
    put_heads(e, "heads", c->heads, c->n_heads);
    put_floats(e, "numbers", numbers, NUMBERS);
    if (c->has_model) ibid_enc_bin(e, "model", c->model.b, sizeof c->model.b);
    if (c->note[0]) ibid_enc_cstr(e, "note", c->note);
    if (c->map)
        put_map(e, c->map);
    else
        ibid_enc_u64(e, "head_dim", c->head_dim);
}

ibid_err ibid_calibration_encode(ibid_calibration *c, ibid_buf *out) {
    const ibid_hash none = {{0}};
    ibid_enc e;
    if (c->n_heads > IBID_HEADS_MAX || c->head_dim > IBID_HEAD_DIM_MAX ||
        (c->map && !ibid_keymap_settle(c->map)))
        return ibid_fail(IBID_INVAL, "a calibration of %u heads of %u", c->n_heads, c->head_dim);
    bool old = c->old && c->map;
    size_t start = out->len;
    ibid_enc_init(&e, ENCODING_MAX);
    ibid_enc_map(&e, NULL);
    if (old)
        put_old(&e, c);
    else
        put_new(&e, c);
    ibid_enc_end(&e);
    ibid_err err = ibid_enc_done(&e);
    if (!err) err = ibid_buf_append(out, e.buf.data, e.buf.len);
    ibid_enc_fini(&e);
    if (err) return err;
    c->dim = (uint32_t)ibid_keymap_dim(c->map);
    if (old)
        c->id = ibid_hash_bytes(out->data + start, out->len - start);
    else if (c->map)
        return map_id(c->map, &c->id);
    else
        c->id = none;
    return IBID_OK;
}

static bool get_small(const ibid_val *root, bool old, ibid_calibration *c) {
    float numbers[NUMBERS] = {0};
    const char *note = NULL;
    const void *model = NULL;
    size_t n = 0;
    if (((old || ibid_val_get(root, "heads")) &&
         !get_heads(root, "heads", IBID_HEADS_MAX, c->heads, &c->n_heads)) ||
        !get_u32(root, "head_dim", IBID_HEAD_DIM_MAX, &c->head_dim) ||
        !get_floats(root, "numbers", numbers, old ? OLD_NUMBERS : NUMBERS) ||
        (c->n_heads && !c->head_dim))
        return false;
    c->null_mean = numbers[0];
    c->null_sd = numbers[1];
    c->relevant = numbers[2];
    c->find = numbers[3];
    c->recall1 = numbers[4];
    c->margin = numbers[5];
    c->keys_weight = old ? IBID_KEYS_WEIGHT : numbers[6];
    if (!(c->keys_weight >= 0 && c->keys_weight <= 1)) return false;
    if (ibid_get_str(root, "note", &note, &n) && n <= IBID_NOTE_MAX && !memchr(note, 0, n))
        memcpy(c->note, note, n);
    if (ibid_get_bin(root, "model", &model, &n) && n == sizeof c->model.b) {
        memcpy(c->model.b, model, n);
        c->has_model = true;
    }
    return true;
}

/* Token key dimension without opening the map. */
static bool brief_dim(const ibid_val *root, ibid_calibration *c) {
    ibid_keymap sizes = {.head_dim = 0};
    if (c->old)
        c->dim = c->n_heads * c->head_dim;
    else if (ibid_val_get(root, "inputs") && !get_sizes(root, &sizes))
        return false;
    else
        c->dim = (uint32_t)ibid_keymap_dim(&sizes);
    return true;
}

static ibid_err decode(const void *data, size_t n, const ibid_hash *id, ibid_calibration *out) {
    ibid_msg *m = NULL;
    ibid_calibration c;
    memset(&c, 0, sizeof c);
    ibid_err err = ibid_msg_open(data, n, &m);
    if (err == IBID_PROTO) err = ibid_fail(IBID_CORRUPT, "a stored calibration cannot be read");
    if (err) return err;
    const ibid_val *root = ibid_msg_root(m);
    uint64_t version = ibid_get_u64(root, "v", 0);
    c.old = version == 1;
    if (version > CALIBRATION_VERSION)
        err = ibid_fail(IBID_NOTSUP, "a stored calibration has version %llu; this build reads %d",
                        (unsigned long long)version, CALIBRATION_VERSION);
    else if (!version || !get_small(root, c.old, &c) || !brief_dim(root, &c))
        err = damaged();
    if (!err && id) {
        c.id = *id;
    } else if (!err && c.old && c.n_heads) {
        err = get_old_map(root, &c, &c.map);
        c.id = ibid_hash_bytes(data, n);
    } else if (!err && !c.old && ibid_val_get(root, "inputs")) {
        err = get_map(root, &c.map);
        if (!err) err = map_id(c.map, &c.id);
    }
    ibid_msg_close(m);
    if (err)
        ibid_keymap_close(c.map);
    else
        *out = c;
    return err;
}

ibid_err ibid_calibration_decode(const void *data, size_t n, ibid_calibration *out) {
    return decode(data, n, NULL, out);
}

ibid_err ibid_calibration_decode_brief(const void *data, size_t n, const ibid_hash *id,
                                       ibid_calibration *out) {
    return decode(data, n, id, out);
}
