/* The byte layout of one stored KV value: one block's (or prefix's) keys and values at one layer.
 *
 *   0   u32 magic "IKV1"     4  u16 version 2      6  u8 type (ibid_kv_type)   7  u8 0
 *   8   u64 checksum: XXH3-64 of bytes [16, size) of the value
 *   16  u64 owner: block number, or prefix number
 *   24  u32 n_tokens        28  u16 n_kv_heads    30  u16 head_dim
 *   32  u16 layer           34  u16 0             36  u32 0         40  u64 size of the value
 *   48  K plane, V plane, then for q8_0 K scales, V scales; each padded to 64 bytes; then zeroes up
 *       to the size class (the size that 64, 128 or 256 tokens need; larger: the next multiple of
 * 256)
 *
 * Little-endian. An LMDB value on overflow pages starts 16 bytes into a page, so byte 48 is 64-byte
 * aligned there. Pure functions over memory: no database here, so that a fuzzer can drive them. */
#ifndef IBID_KV_VALUE_H
#define IBID_KV_VALUE_H

#include "attention/tensor.h"
#include "rpc/base/err.h"

#include <stdint.h>

enum { IBID_KV_HEADER = 48, IBID_KV_VERSION = 2 };

typedef struct ibid_kv_shape {
    ibid_kv_type type;
    size_t n_tokens, n_kv_heads, head_dim;
} ibid_kv_shape;

/* Bytes of a whole value, size class included. Errors: INVAL (a zero dimension, head_dim not a
 * multiple of 32 for q8_0), TOOBIG (n_tokens > 65536 and the like). */
ibid_err ibid_kv_value_size(const ibid_kv_shape *s, size_t *out);
/* Where the planes lie in the value at base: fills a view with pointers into it (scales NULL unless
 * q8_0). The view's pointers are writable memory if base is. */
ibid_err ibid_kv_value_planes(const ibid_kv_shape *s, const void *base, ibid_kv_view *out);
/* Writes header and zero padding into value [size]; the planes are already filled. */
ibid_err ibid_kv_value_seal(const ibid_kv_shape *s, uint64_t owner, size_t layer, void *value,
                            size_t size);
/* Checks magic, version, type, dimensions, size against `size`, and with `deep` the checksum; then
 * fills the view. Errors: CORRUPT with a detail. */
ibid_err ibid_kv_value_open(const void *value, size_t size, bool deep, uint64_t *owner,
                            size_t *layer, ibid_kv_view *out);
#endif
