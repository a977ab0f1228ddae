#include "rpc/bus/msg.h"

#include <msgpack/pack.h>
#include <string.h>

enum { MAP32 = 0xdf, ARRAY32 = 0xdd, NIL = 0xc0, HEAD32 = 5 };

static void stick(ibid_enc *e, ibid_err err) {
    if (!e->err) e->err = err;
}

static void put(ibid_enc *e, const void *data, size_t n) {
    if (!e->err) stick(e, ibid_buf_append(&e->buf, data, n));
}

/* msgpack-c's packer writes through this. Its return value is not needed: errors stick. */
static int write_cb(void *arg, const char *data, size_t n) {
    put(arg, data, n);
    return 0;
}

static msgpack_packer packer(ibid_enc *e) {
    return (msgpack_packer){.data = e, .callback = write_cb};
}

/* Before every value: writes its key and counts it. False: write nothing. */
static bool begin(ibid_enc *e, const char *key) {
    if (e->err) return false;
    if (e->depth == 0) {
        if (key || e->buf.len) stick(e, ibid_fail(IBID_INTERNAL, "a message has one root, no key"));
        return !e->err;
    }
    size_t d = e->depth - 1;
    if (e->is_map[d] != (key != NULL)) {
        stick(e, ibid_fail(IBID_INTERNAL, "keys belong into maps only: %s", key ? key : "(none)"));
        return false;
    }
    if (e->count[d] == UINT32_MAX) {
        stick(e, ibid_fail(IBID_TOOBIG, "a container of a message is full"));
        return false;
    }
    e->count[d]++;
    if (key) {
        msgpack_packer p = packer(e);
        size_t n = strlen(key);
        (void)msgpack_pack_str(&p, n);
        put(e, key, n);
    }
    return !e->err;
}

void ibid_enc_init(ibid_enc *e, size_t cap) {
    memset(e, 0, sizeof *e);
    ibid_buf_init(&e->buf, cap);
}

void ibid_enc_fini(ibid_enc *e) {
    ibid_buf_fini(&e->buf);
}

ibid_err ibid_enc_done(ibid_enc *e) {
    if (e->err == IBID_TOOBIG)
        return ibid_fail(e->err, "a message would pass its limit of %zu bytes", e->buf.cap);
    if (e->err) return ibid_fail(e->err, "a message could not be written");
    if (e->depth || !e->buf.len)
        return ibid_fail(IBID_INTERNAL, "a message was not finished (%zu open)", e->depth);
    return IBID_OK;
}

static void open_container(ibid_enc *e, const char *key, bool is_map) {
    static const size_t deepest = sizeof e->start / sizeof e->start[0];
    if (!begin(e, key)) return;
    if (e->depth == deepest) {
        stick(e, ibid_fail(IBID_INTERNAL, "a message is nested deeper than %zu", deepest));
        return;
    }
    const uint8_t head[HEAD32] = {is_map ? MAP32 : ARRAY32};
    e->start[e->depth] = e->buf.len + 1;
    e->count[e->depth] = 0;
    e->is_map[e->depth] = is_map;
    put(e, head, sizeof head);
    if (!e->err) e->depth++;
}

void ibid_enc_map(ibid_enc *e, const char *key) {
    open_container(e, key, true);
}

void ibid_enc_array(ibid_enc *e, const char *key) {
    open_container(e, key, false);
}

void ibid_enc_end(ibid_enc *e) {
    if (e->err) return;
    if (!e->depth) {
        stick(e, ibid_fail(IBID_INTERNAL, "a message closes more than it opened"));
        return;
    }
    size_t d = --e->depth;
    for (size_t i = 0; i < 4; i++)
        e->buf.data[e->start[d] + i] = (char)(uint8_t)(e->count[d] >> (24 - 8 * i));
}

void ibid_enc_u64(ibid_enc *e, const char *key, uint64_t v) {
    if (!begin(e, key)) return;
    msgpack_packer p = packer(e);
    (void)msgpack_pack_uint64(&p, v);
}

void ibid_enc_i64(ibid_enc *e, const char *key, int64_t v) {
    if (!begin(e, key)) return;
    msgpack_packer p = packer(e);
    (void)msgpack_pack_int64(&p, v);
}

void ibid_enc_f64(ibid_enc *e, const char *key, double v) {
    if (!begin(e, key)) return;
    msgpack_packer p = packer(e);
    (void)msgpack_pack_double(&p, v);
}

void ibid_enc_bool(ibid_enc *e, const char *key, bool v) {
    if (!begin(e, key)) return;
    msgpack_packer p = packer(e);
    (void)(v ? msgpack_pack_true(&p) : msgpack_pack_false(&p));
}

void ibid_enc_nil(ibid_enc *e, const char *key) {
    const uint8_t nil = NIL;
    if (begin(e, key)) put(e, &nil, 1);
}

/* A value longer than its header can say is refused before anything of it is written. */
static bool fits32(ibid_enc *e, size_t n) {
    if (n > UINT32_MAX) stick(e, ibid_fail(IBID_TOOBIG, "a value of %zu bytes", n));
    return !e->err;
}

void ibid_enc_str(ibid_enc *e, const char *key, const char *s, size_t n) {
    if (!fits32(e, n) || !begin(e, key)) return;
    msgpack_packer p = packer(e);
    (void)msgpack_pack_str(&p, n);
    put(e, s, n);
}

void ibid_enc_cstr(ibid_enc *e, const char *key, const char *s) {
    ibid_enc_str(e, key, s, strlen(s));
}

void ibid_enc_bin(ibid_enc *e, const char *key, const void *data, size_t n) {
    if (!fits32(e, n) || !begin(e, key)) return;
    msgpack_packer p = packer(e);
    (void)msgpack_pack_bin(&p, n);
    put(e, data, n);
}

void *ibid_enc_bin_reserve(ibid_enc *e, const char *key, size_t n) {
    if (!fits32(e, n) || !begin(e, key)) return NULL;
    msgpack_packer p = packer(e);
    (void)msgpack_pack_bin(&p, n);
    if (!e->err) stick(e, ibid_buf_reserve(&e->buf, n));
    if (e->err) return NULL;
    void *at = e->buf.data + e->buf.len;
    e->buf.len += n;
    e->buf.data[e->buf.len] = '\0';
    return at;
}

void ibid_enc_raw(ibid_enc *e, const char *key, const void *data, size_t n) {
    if (n == 0) stick(e, ibid_fail(IBID_INTERNAL, "an empty value in a message"));
    if (begin(e, key)) put(e, data, n);
}
