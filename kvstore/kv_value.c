#include "kvstore/kv_value.h"
#include "kvstore/record.h"
#include "rpc/base/hash.h"
#include "rpc/base/mem.h"

#include <string.h>

enum {
    PLANE_ALIGN = 64,
    SCALE_GROUP = 32,
    TOKENS_MAX = 65536,
    HEADS_MAX = 1024,
    HEAD_DIM_MAX = 4096,
    SUMMED_FROM = 16 /* the checksum covers everything behind itself */
};
#define VALUE_MAX ((size_t)1 << 30)

static const uint8_t magic[4] = {'I', 'K', 'V', '1'};

static bool type_known(unsigned type) {
    return type == IBID_KV_F32 || type == IBID_KV_F16 || type == IBID_KV_Q8_0;
}

static ibid_err shape_check(const ibid_kv_shape *s) {
    if (!type_known((unsigned)s->type)) return ibid_fail(IBID_INVAL, "unknown KV type");
    if (s->n_tokens == 0 || s->n_kv_heads == 0 || s->head_dim == 0)
        return ibid_fail(IBID_INVAL, "a KV value needs at least one token, head and dimension");
    if (s->n_tokens > TOKENS_MAX || s->n_kv_heads > HEADS_MAX || s->head_dim > HEAD_DIM_MAX)
        return ibid_fail(IBID_TOOBIG, "KV of %zu tokens, %zu heads of %zu is beyond the limits",
                         s->n_tokens, s->n_kv_heads, s->head_dim);
    if (s->type == IBID_KV_Q8_0 && s->head_dim % SCALE_GROUP != 0)
        return ibid_fail(IBID_INVAL, "q8_0 KV needs a head size that is a multiple of 32, not %zu",
                         s->head_dim);
    return IBID_OK;
}

/* Bytes of one K or V plane, and of one scales plane (0 unless q8_0), unpadded. The limits above
 * keep every product below 2^40. */
static size_t plane_bytes(const ibid_kv_shape *s, size_t n_tokens) {
    size_t element = s->type == IBID_KV_F32 ? 4 : s->type == IBID_KV_F16 ? 2 : 1;
    return s->n_kv_heads * n_tokens * s->head_dim * element;
}

static size_t scale_bytes(const ibid_kv_shape *s, size_t n_tokens) {
    if (s->type != IBID_KV_Q8_0) return 0;
    return s->n_kv_heads * n_tokens * (s->head_dim / SCALE_GROUP) * 2;
}

static size_t class_tokens(size_t n) {
    if (n <= 64) return 64;
    if (n <= 128) return 128;
    return ibid_align_up(n, 256);
}

ibid_err ibid_kv_value_size(const ibid_kv_shape *s, size_t *out) {
    ibid_err e = shape_check(s);
    if (e) return e;
    size_t tokens = class_tokens(s->n_tokens);
    size_t size = IBID_KV_HEADER + 2 * ibid_align_up(plane_bytes(s, tokens), PLANE_ALIGN) +
                  2 * ibid_align_up(scale_bytes(s, tokens), PLANE_ALIGN);
    if (size > VALUE_MAX)
        return ibid_fail(IBID_TOOBIG, "a KV value of %zu bytes is beyond the limit of 1 GiB", size);
    *out = size;
    return IBID_OK;
}

/* Byte offsets of the four planes and the first byte behind them. */
static size_t plane_offsets(const ibid_kv_shape *s, size_t at[4]) {
    size_t kv = ibid_align_up(plane_bytes(s, s->n_tokens), PLANE_ALIGN);
    size_t scales = ibid_align_up(scale_bytes(s, s->n_tokens), PLANE_ALIGN);
    at[0] = IBID_KV_HEADER;
    at[1] = at[0] + kv;
    at[2] = at[1] + kv;
    at[3] = at[2] + scales;
    return at[3] + scales;
}

ibid_err ibid_kv_value_planes(const ibid_kv_shape *s, const void *base, ibid_kv_view *out) {
    ibid_err e = shape_check(s);
    if (e) return e;
    size_t at[4];
    (void)plane_offsets(s, at);
    const uint8_t *p = base;
    bool scaled = s->type == IBID_KV_Q8_0;
    *out = (ibid_kv_view){
        .type = s->type,
        .n_tokens = s->n_tokens,
        .n_kv_heads = s->n_kv_heads,
        .head_dim = s->head_dim,
        .k = p + at[0],
        .v = p + at[1],
        .k_scale = scaled ? (const void *)(p + at[2]) : NULL,
        .v_scale = scaled ? (const void *)(p + at[3]) : NULL,
    };
    return IBID_OK;
}

ibid_err ibid_kv_value_seal(const ibid_kv_shape *s, uint64_t owner, size_t layer, void *value,
                            size_t size) {
    size_t want;
    ibid_err e = ibid_kv_value_size(s, &want);
    if (e) return e;
    if (size != want)
        return ibid_fail(IBID_INVAL, "a KV value of this shape has %zu bytes, not %zu", want, size);
    if (layer > UINT16_MAX) return ibid_fail(IBID_TOOBIG, "layer %zu is beyond 65535", layer);
    uint8_t *p = value;
    size_t at[4], kv = plane_bytes(s, s->n_tokens), scales = scale_bytes(s, s->n_tokens);
    size_t end = plane_offsets(s, at);
    memset(p + at[0] + kv, 0, at[1] - at[0] - kv);
    memset(p + at[1] + kv, 0, at[2] - at[1] - kv);
    memset(p + at[2] + scales, 0, at[3] - at[2] - scales);
    memset(p + at[3] + scales, 0, size - at[3] - scales);
    (void)end;
    memset(p, 0, IBID_KV_HEADER);
    memcpy(p, magic, sizeof magic);
    ibidi_store16(p + 4, IBID_KV_VERSION);
    p[6] = (uint8_t)s->type;
    ibidi_store64(p + 16, owner);
    ibidi_store32(p + 24, (uint32_t)s->n_tokens);
    ibidi_store16(p + 28, (uint16_t)s->n_kv_heads);
    ibidi_store16(p + 30, (uint16_t)s->head_dim);
    ibidi_store16(p + 32, (uint16_t)layer);
    ibidi_store64(p + 40, size);
    ibidi_store64(p + 8, ibid_checksum(p + SUMMED_FROM, size - SUMMED_FROM));
    return IBID_OK;
}

ibid_err ibid_kv_value_open(const void *value, size_t size, bool deep, uint64_t *owner,
                            size_t *layer, ibid_kv_view *out) {
    const uint8_t *p = value;
    if (size < IBID_KV_HEADER)
        return ibid_fail(IBID_CORRUPT, "a KV value of %zu bytes is shorter than its header", size);
    if (memcmp(p, magic, sizeof magic) != 0)
        return ibid_fail(IBID_CORRUPT, "a KV value does not start with IKV1");
    if (ibidi_load16(p + 4) != IBID_KV_VERSION)
        return ibid_fail(IBID_CORRUPT,
                         "a KV value has version %u; this build reads %d: index into a new data "
                         "folder",
                         ibidi_load16(p + 4), IBID_KV_VERSION);
    if (!type_known(p[6]) || p[7] != 0 || ibidi_load16(p + 34) != 0 || ibidi_load32(p + 36) != 0)
        return ibid_fail(IBID_CORRUPT, "a KV value has an unknown type or a set reserved byte");
    ibid_kv_shape s = {.type = (ibid_kv_type)p[6],
                       .n_tokens = ibidi_load32(p + 24),
                       .n_kv_heads = ibidi_load16(p + 28),
                       .head_dim = ibidi_load16(p + 30)};
    size_t want;
    if (ibid_kv_value_size(&s, &want) != IBID_OK)
        return ibid_fail(IBID_CORRUPT,
                         "a KV value names a shape that cannot be: %zu tokens, %zu heads "
                         "of %zu",
                         s.n_tokens, s.n_kv_heads, s.head_dim);
    if (want != size || ibidi_load64(p + 40) != size)
        return ibid_fail(IBID_CORRUPT, "a KV value has %zu bytes where its shape needs %zu", size,
                         want);
    if (deep && ibidi_load64(p + 8) != ibid_checksum(p + SUMMED_FROM, size - SUMMED_FROM))
        return ibid_fail(IBID_CORRUPT, "a KV value fails its checksum");
    if (owner) *owner = ibidi_load64(p + 16);
    if (layer) *layer = ibidi_load16(p + 32);
    return ibid_kv_value_planes(&s, value, out);
}
