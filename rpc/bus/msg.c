/* Reading. Two steps: our own scan walks the bytes once without allocating and settles everything
 * an attacker could choose (depth, counts against the bytes that are left, truncation, trailing
 * bytes); then msgpack-c builds its tree from bytes known to be sound. msgpack-c alone allocates an
 * array's claimed size before it has seen the elements. */
#include "rpc/bus/msg.h"

#include <msgpack/unpack.h>
#include <string.h>

enum { DEPTH_MAX = 16 };

struct ibid_msg {
    msgpack_zone zone;
    msgpack_object root;
};

/* ibid_val is msgpack_object seen from outside. */
static const msgpack_object *obj(const ibid_val *v) {
    return (const msgpack_object *)(const void *)v;
}

static const ibid_val *val(const msgpack_object *o) {
    return (const ibid_val *)(const void *)o;
}

/* ---- The scan ---- */

struct scan {
    const uint8_t *p, *end;
    size_t depth;
    uint64_t left[DEPTH_MAX]; /* values still to come in each open container */
};

/* What follows a value's first byte: bytes of length, then payload or children. */
struct shape {
    unsigned len_bytes; /* 0, 1, 2 or 4 */
    uint64_t fixed;     /* payload bytes (or children) known from the first byte */
    unsigned per_child; /* 0: a scalar; 1: array; 2: map */
};

static bool shape_of(uint8_t b, struct shape *s) {
    *s = (struct shape){0};
    if (b <= 0x7f || b >= 0xe0) return true;                          /* fixint */
    if (b <= 0x8f) return s->fixed = b & 15u, s->per_child = 2, true; /* fixmap */
    if (b <= 0x9f) return s->fixed = b & 15u, s->per_child = 1, true; /* fixarray */
    if (b <= 0xbf) return s->fixed = b & 31u, true;                   /* fixstr */
    switch (b) {
    case 0xc0: /* nil, false, true */
    case 0xc2:
    case 0xc3:
        return true;
    case 0xc4: /* bin */
    case 0xc5:
    case 0xc6:
        return s->len_bytes = 1u << (b - 0xc4), true;
    case 0xc7: /* ext: one more byte of type */
    case 0xc8:
    case 0xc9:
        return s->len_bytes = 1u << (b - 0xc7), s->fixed = 1, true;
    case 0xca:
        return s->fixed = 4, true; /* float */
    case 0xcb:
        return s->fixed = 8, true;
    case 0xcc: /* uint, int */
    case 0xcd:
    case 0xce:
    case 0xcf:
        return s->fixed = 1u << (b - 0xcc), true;
    case 0xd0:
    case 0xd1:
    case 0xd2:
    case 0xd3:
        return s->fixed = 1u << (b - 0xd0), true;
    case 0xd4: /* fixext */
    case 0xd5:
    case 0xd6:
    case 0xd7:
    case 0xd8:
        return s->fixed = 1u + (1u << (b - 0xd4)), true;
    case 0xd9: /* str */
    case 0xda:
    case 0xdb:
        return s->len_bytes = 1u << (b - 0xd9), true;
    case 0xdc: /* array */
    case 0xdd:
        return s->len_bytes = 2u << (b - 0xdc), s->per_child = 1, true;
    case 0xde: /* map */
    case 0xdf:
        return s->len_bytes = 2u << (b - 0xde), s->per_child = 2, true;
    default:
        return false; /* 0xc1 */
    }
}

static ibid_err scan_value(struct scan *s) {
    struct shape shape;
    if (s->p == s->end) return ibid_fail(IBID_PROTO, "a message ends too early");
    if (!shape_of(*s->p++, &shape)) return ibid_fail(IBID_PROTO, "a message is not MessagePack");
    if ((size_t)(s->end - s->p) < shape.len_bytes)
        return ibid_fail(IBID_PROTO, "a message ends inside a length");
    uint64_t n = 0;
    for (unsigned i = 0; i < shape.len_bytes; i++) n = n << 8 | *s->p++;
    n += shape.fixed;
    uint64_t bytes = shape.per_child ? n * shape.per_child : n; /* a child takes a byte or more */
    if (bytes > (uint64_t)(s->end - s->p))
        return ibid_fail(IBID_PROTO, "a message claims %llu more bytes than it has",
                         (unsigned long long)(bytes - (uint64_t)(s->end - s->p)));
    if (!shape.per_child) {
        s->p += n;
        return IBID_OK;
    }
    if (s->depth == DEPTH_MAX)
        return ibid_fail(IBID_PROTO, "a message is nested deeper than %d", DEPTH_MAX);
    s->left[s->depth++] = bytes;
    return IBID_OK;
}

static ibid_err scan_all(const void *data, size_t n) {
    struct scan s = {.p = data, .end = (const uint8_t *)data + n};
    ibid_err e = scan_value(&s);
    while (!e && s.depth) {
        if (s.left[s.depth - 1] == 0) {
            s.depth--;
            continue;
        }
        s.left[s.depth - 1]--;
        e = scan_value(&s);
    }
    if (!e && s.p != s.end) return ibid_fail(IBID_PROTO, "bytes after the end of a message");
    return e;
}

/* ---- The tree ---- */

ibid_err ibid_msg_open(const void *data, size_t n, ibid_msg **out) {
    enum { ZONE_CHUNK = 8192 };
    ibid_msg *m = NULL;
    bool zone = false;
    size_t off = 0;
    msgpack_unpack_return r;
    ibid_err e = scan_all(data, n);
    if (e) goto done;
    m = ibid_calloc(1, sizeof *m);
    if (!m || !msgpack_zone_init(&m->zone, ZONE_CHUNK)) {
        e = ibid_fail(IBID_NOMEM, "out of memory for a message of %zu bytes", n);
        goto done;
    }
    zone = true;
    r = msgpack_unpack(data, n, &off, &m->zone, &m->root);
    if (r == MSGPACK_UNPACK_NOMEM_ERROR)
        e = ibid_fail(IBID_NOMEM, "out of memory for a message of %zu bytes", n);
    else if (r != MSGPACK_UNPACK_SUCCESS)
        e = ibid_fail(IBID_PROTO, "a message is not MessagePack");
    if (e) goto done;
    *out = m;
    m = NULL;
done:
    if (m && zone) msgpack_zone_destroy(&m->zone);
    ibid_free(m);
    return e;
}

void ibid_msg_close(ibid_msg *m) {
    if (!m) return;
    msgpack_zone_destroy(&m->zone);
    ibid_free(m);
}

const ibid_val *ibid_msg_root(const ibid_msg *m) {
    return m ? val(&m->root) : NULL;
}

static bool is(const ibid_val *v, msgpack_object_type t) {
    return v && obj(v)->type == t;
}

bool ibid_val_is_map(const ibid_val *v) {
    return is(v, MSGPACK_OBJECT_MAP);
}

bool ibid_val_is_array(const ibid_val *v) {
    return is(v, MSGPACK_OBJECT_ARRAY);
}

bool ibid_val_is_nil(const ibid_val *v) {
    return !v || is(v, MSGPACK_OBJECT_NIL);
}

bool ibid_val_is_text(const ibid_val *v) {
    return is(v, MSGPACK_OBJECT_STR);
}

const ibid_val *ibid_val_get(const ibid_val *map, const char *key) {
    if (!ibid_val_is_map(map)) return NULL;
    size_t n = strlen(key);
    const msgpack_object_map *m = &obj(map)->via.map;
    for (uint32_t i = 0; i < m->size; i++) {
        const msgpack_object *k = &m->ptr[i].key;
        if (k->type == MSGPACK_OBJECT_STR && k->via.str.size == n &&
            memcmp(k->via.str.ptr, key, n) == 0)
            return val(&m->ptr[i].val);
    }
    return NULL;
}

size_t ibid_val_count(const ibid_val *v) {
    if (ibid_val_is_map(v)) return obj(v)->via.map.size;
    return ibid_val_is_array(v) ? obj(v)->via.array.size : 0;
}

const ibid_val *ibid_val_at(const ibid_val *array, size_t i) {
    if (!ibid_val_is_array(array) || i >= obj(array)->via.array.size) return NULL;
    return val(&obj(array)->via.array.ptr[i]);
}

bool ibid_val_pair(const ibid_val *map, size_t i, const char **key, size_t *key_n,
                   const ibid_val **value) {
    if (!ibid_val_is_map(map) || i >= obj(map)->via.map.size) return false;
    const msgpack_object_kv *kv = &obj(map)->via.map.ptr[i];
    if (kv->key.type != MSGPACK_OBJECT_STR) return false;
    *key = kv->key.via.str.ptr;
    *key_n = kv->key.via.str.size;
    *value = val(&kv->val);
    return true;
}

bool ibid_val_u64(const ibid_val *v, uint64_t *out) {
    if (!is(v, MSGPACK_OBJECT_POSITIVE_INTEGER)) return false;
    *out = obj(v)->via.u64;
    return true;
}

bool ibid_val_i64(const ibid_val *v, int64_t *out) {
    if (is(v, MSGPACK_OBJECT_NEGATIVE_INTEGER)) {
        *out = obj(v)->via.i64;
        return true;
    }
    if (!is(v, MSGPACK_OBJECT_POSITIVE_INTEGER) || obj(v)->via.u64 > INT64_MAX) return false;
    *out = (int64_t)obj(v)->via.u64;
    return true;
}

bool ibid_val_f64(const ibid_val *v, double *out) {
    if (is(v, MSGPACK_OBJECT_FLOAT32) || is(v, MSGPACK_OBJECT_FLOAT64))
        *out = obj(v)->via.f64;
    else if (is(v, MSGPACK_OBJECT_POSITIVE_INTEGER))
        *out = (double)obj(v)->via.u64;
    else if (is(v, MSGPACK_OBJECT_NEGATIVE_INTEGER))
        *out = (double)obj(v)->via.i64;
    else
        return false;
    return true;
}

bool ibid_val_bool(const ibid_val *v, bool *out) {
    if (!is(v, MSGPACK_OBJECT_BOOLEAN)) return false;
    *out = obj(v)->via.boolean;
    return true;
}

bool ibid_val_bin(const ibid_val *v, const void **p, size_t *n) {
    *p = NULL;
    *n = 0;
    if (is(v, MSGPACK_OBJECT_BIN)) {
        *p = obj(v)->via.bin.ptr;
        *n = obj(v)->via.bin.size;
    } else if (is(v, MSGPACK_OBJECT_STR)) {
        *p = obj(v)->via.str.ptr;
        *n = obj(v)->via.str.size;
    } else {
        return false;
    }
    if (!*p) *p = ""; /* msgpack-c gives no address for an empty one in places */
    return true;
}

bool ibid_val_str(const ibid_val *v, const char **s, size_t *n) {
    const void *p;
    bool ok = ibid_val_bin(v, &p, n);
    *s = p;
    return ok;
}

uint64_t ibid_get_u64(const ibid_val *map, const char *key, uint64_t def) {
    uint64_t v;
    return ibid_val_u64(ibid_val_get(map, key), &v) ? v : def;
}

int64_t ibid_get_i64(const ibid_val *map, const char *key, int64_t def) {
    int64_t v;
    return ibid_val_i64(ibid_val_get(map, key), &v) ? v : def;
}

double ibid_get_f64(const ibid_val *map, const char *key, double def) {
    double v;
    return ibid_val_f64(ibid_val_get(map, key), &v) ? v : def;
}

bool ibid_get_bool(const ibid_val *map, const char *key, bool def) {
    bool v;
    return ibid_val_bool(ibid_val_get(map, key), &v) ? v : def;
}

bool ibid_get_str(const ibid_val *map, const char *key, const char **s, size_t *n) {
    return ibid_val_str(ibid_val_get(map, key), s, n);
}

bool ibid_get_bin(const ibid_val *map, const char *key, const void **p, size_t *n) {
    return ibid_val_bin(ibid_val_get(map, key), p, n);
}
