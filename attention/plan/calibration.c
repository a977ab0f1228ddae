#include "attention/plan/calibration.h"

#include "rpc/bus/msg.h"

#include <math.h>
#include <string.h>

enum { CALIBRATION_VERSION = 1, ENCODING_MAX = 256 * 1024 };

/* ---- Token keys ---- */

void ibid_token_keys(const ibid_calibration *c, const float *raw, size_t n, int8_t *out) {
    size_t d = c->head_dim, dim = c->n_heads * d;
    float part = c->n_heads ? 1.0f / sqrtf((float)c->n_heads) : 0;
    for (size_t t = 0; t < n; t++) {
        for (size_t h = 0; h < c->n_heads; h++) {
            const float *x = raw + t * dim + h * d, *m = c->mean + h * d;
            int8_t *y = out + t * dim + h * d;
            double norm = 0;
            for (size_t i = 0; i < d; i++) norm += (double)(x[i] - m[i]) * (double)(x[i] - m[i]);
            float scale = norm > 0 ? 127.0f * part / (float)sqrt(norm) : 0;
            for (size_t i = 0; i < d; i++) y[i] = (int8_t)lrintf((x[i] - m[i]) * scale);
        }
    }
}

/* ---- Encoding: floats as their 32 bits, little-endian ---- */

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

static bool shape_ok(uint64_t n_heads, uint64_t head_dim) {
    if (n_heads == 0) return head_dim <= IBID_HEAD_DIM_MAX;
    return n_heads <= IBID_HEADS_MAX && head_dim > 0 && head_dim <= IBID_HEAD_DIM_MAX;
}

static ibid_hash id_of(const ibid_calibration *c, const void *data, size_t n) {
    ibid_hash none = {{0}};
    return c->n_heads ? ibid_hash_bytes(data, n) : none;
}

ibid_err ibid_calibration_encode(ibid_calibration *c, ibid_buf *out) {
    ibid_enc e;
    size_t dim = (size_t)c->n_heads * c->head_dim;
    const float numbers[] = {c->null_mean, c->null_sd, c->relevant, c->find, c->recall1, c->margin};
    if (!shape_ok(c->n_heads, c->head_dim))
        return ibid_fail(IBID_INVAL, "a calibration of %u heads of %u", c->n_heads, c->head_dim);
    ibid_enc_init(&e, ENCODING_MAX);
    ibid_enc_map(&e, NULL);
    ibid_enc_u64(&e, "v", CALIBRATION_VERSION);
    ibid_enc_u64(&e, "head_dim", c->head_dim);
    ibid_enc_array(&e, "heads");
    for (size_t i = 0; i < c->n_heads; i++) {
        ibid_enc_u64(&e, NULL, c->heads[i].layer);
        ibid_enc_u64(&e, NULL, c->heads[i].kv_head);
    }
    ibid_enc_end(&e);
    put_floats(&e, "mean", c->mean, dim);
    put_floats(&e, "numbers", numbers, sizeof numbers / sizeof *numbers);
    ibid_enc_end(&e);
    ibid_err err = ibid_enc_done(&e);
    size_t start = out->len;
    if (!err) err = ibid_buf_append(out, e.buf.data, e.buf.len);
    if (!err) c->id = id_of(c, out->data + start, out->len - start);
    ibid_enc_fini(&e);
    return err;
}

static bool get_heads(const ibid_val *root, ibid_calibration *c) {
    const ibid_val *heads = ibid_val_get(root, "heads");
    size_t n = ibid_val_count(heads);
    uint64_t dim = ibid_get_u64(root, "head_dim", UINT64_MAX), layer, kv_head;
    if (!ibid_val_is_array(heads) || n % 2 || !shape_ok(n / 2, dim)) return false;
    c->n_heads = (uint32_t)(n / 2);
    c->head_dim = (uint32_t)dim;
    for (size_t i = 0; i < c->n_heads; i++) {
        if (!ibid_val_u64(ibid_val_at(heads, 2 * i), &layer) || layer > UINT16_MAX ||
            !ibid_val_u64(ibid_val_at(heads, 2 * i + 1), &kv_head) || kv_head > UINT16_MAX)
            return false;
        c->heads[i] = (ibid_head){(uint32_t)layer, (uint32_t)kv_head};
    }
    return true;
}

ibid_err ibid_calibration_decode(const void *data, size_t n, ibid_calibration *out) {
    ibid_msg *m = NULL;
    ibid_calibration c;
    float numbers[6];
    memset(&c, 0, sizeof c);
    ibid_err err = ibid_msg_open(data, n, &m);
    if (err == IBID_PROTO) err = ibid_fail(IBID_CORRUPT, "a stored calibration cannot be read");
    if (err) goto done;
    const ibid_val *root = ibid_msg_root(m);
    uint64_t version = ibid_get_u64(root, "v", 0);
    if (version > CALIBRATION_VERSION) {
        err = ibid_fail(IBID_NOTSUP, "a stored calibration has version %llu; this build reads %d",
                        (unsigned long long)version, CALIBRATION_VERSION);
        goto done;
    }
    bool good = version && get_heads(root, &c);
    size_t dim = (size_t)c.n_heads * c.head_dim;
    good = good && get_floats(root, "mean", c.mean, dim) && get_floats(root, "numbers", numbers, 6);
    if (!good) {
        err =
            ibid_fail(IBID_CORRUPT, "a stored calibration is damaged; run `ibid model calibrate`");
        goto done;
    }
    c.null_mean = numbers[0];
    c.null_sd = numbers[1];
    c.relevant = numbers[2];
    c.find = numbers[3];
    c.recall1 = numbers[4];
    c.margin = numbers[5];
    c.id = id_of(&c, data, n);
    *out = c;
done:
    ibid_msg_close(m);
    return err;
}
