#include "attention/wire.h"

void ibidi_wire_ids_put(ibid_enc *e, const char *key, const int32_t *ids, size_t n) {
    uint8_t *p = ibid_enc_bin_reserve(e, key, 4 * n);
    for (size_t i = 0; p && i < n; i++)
        for (size_t b = 0; b < 4; b++) p[4 * i + b] = (uint8_t)((uint32_t)ids[i] >> (8 * b));
}

void ibidi_wire_ids_get(const void *data, size_t n, int32_t *ids) {
    const uint8_t *p = data;
    for (size_t i = 0; i < n; i++, p += 4)
        ids[i] = (int32_t)((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 |
                           (uint32_t)p[3] << 24);
}

static ibid_err put_number(uint64_t v, ibid_buf *out) {
    uint8_t bytes[10];
    size_t n = 0;
    do {
        bytes[n++] = (uint8_t)((v & 0x7F) | (v > 0x7F ? 0x80 : 0));
        v >>= 7;
    } while (v);
    return ibid_buf_append(out, bytes, n);
}

ibid_err ibidi_wire_tokens_put(const ibid_token *t, size_t n, ibid_buf *out) {
    ibid_err e = IBID_OK;
    for (size_t i = 0; !e && i < n; i++) {
        e = put_number((uint64_t)(uint32_t)t[i].id, out);
        if (!e) e = put_number(t[i].end - (i ? t[i - 1].end : 0), out);
    }
    if (e == IBID_TOOBIG)
        e = ibid_fail(IBID_TOOBIG, "a text of %zu tokens is more than a message holds; send less",
                      n);
    return e;
}

static bool get_number(const uint8_t **p, const uint8_t *end, uint64_t *out) {
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 63; shift += 7) {
        if (*p == end) return false;
        uint8_t b = *(*p)++;
        v |= (uint64_t)(b & 0x7F) << shift;
        if (b < 0x80) {
            *out = v;
            return true;
        }
    }
    return false;
}

ibid_err ibidi_wire_tokens_get(const void *data, size_t size, size_t n, int32_t *ids,
                               uint64_t *ends) {
    const uint8_t *p = data, *end = size ? p + size : p;
    uint64_t at = 0, id, more;
    for (size_t i = 0; i < n; i++) {
        if (!get_number(&p, end, &id) || !get_number(&p, end, &more) || id > INT32_MAX ||
            __builtin_add_overflow(at, more, &at))
            return ibid_fail(IBID_PROTO, "a reply with tokens is broken");
        ids[i] = (int32_t)id;
        ends[i] = at;
    }
    return p == end ? IBID_OK : ibid_fail(IBID_PROTO, "a reply with tokens is broken");
}
