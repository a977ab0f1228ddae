/* Messages: MessagePack maps with text keys, so that any language with nng and MessagePack can talk to
 * a room. This file is the codec: bytes in, bytes out, no sockets.
 *
 * A request is  {v:1, id:u64, method:"room.verb", deadline_ms:u64, sent_ms:u64, body:{...}}
 * a reply is    {v:1, id:u64, code:"ok"|..., error:"", body:{...}}
 * id is unique among all clients (start at a random 64-bit number, count up): a server drops an id it
 * has seen. deadline_ms counts from sent_ms, the sender's wall clock (0 or absent: from receipt). A
 * reply with id 0 answers a request that could not be read.
 * Field names and types of every body: rpc/bus/schema.h. Unknown fields are skipped; missing ones take
 * the reader's default or fail with PROTO where required; sizes are capped before allocation. */
#ifndef IBID_BUS_MSG_H
#define IBID_BUS_MSG_H

#include "rpc/base/err.h"
#include "rpc/base/mem.h"

#include <stdbool.h>
#include <stdint.h>

/* ---- Writing. Errors stick: the first one is kept and returned by ibid_enc_done; calls after it do
 * nothing. Maps and arrays are counted for you (written as map32 / array32). ---- */
typedef struct ibid_enc {
    ibid_buf buf;
    ibid_err err;
    size_t depth;
    size_t start[16]; /* where each open container's count lies */
    uint32_t count[16];
    bool is_map[16];
} ibid_enc;

void ibid_enc_init(ibid_enc *e, size_t cap); /* cap: most bytes of the message */
void ibid_enc_fini(ibid_enc *e);
/* IBID_OK when every container was closed and nothing failed. */
ibid_err ibid_enc_done(ibid_enc *e);

/* key NULL inside an array, required inside a map. */
void ibid_enc_map(ibid_enc *e, const char *key);
void ibid_enc_array(ibid_enc *e, const char *key);
void ibid_enc_end(ibid_enc *e); /* closes the innermost map or array */
void ibid_enc_u64(ibid_enc *e, const char *key, uint64_t v);
void ibid_enc_i64(ibid_enc *e, const char *key, int64_t v);
void ibid_enc_f64(ibid_enc *e, const char *key, double v);
void ibid_enc_bool(ibid_enc *e, const char *key, bool v);
void ibid_enc_str(ibid_enc *e, const char *key, const char *s, size_t n); /* UTF-8 by convention */
void ibid_enc_cstr(ibid_enc *e, const char *key, const char *s);
void ibid_enc_bin(ibid_enc *e, const char *key, const void *data, size_t n);
void ibid_enc_nil(ibid_enc *e, const char *key);
/* One value that is already MessagePack (the buffer of another encoder, done); not checked again. */
void ibid_enc_raw(ibid_enc *e, const char *key, const void *data, size_t n);
/* Reserves n bytes of a bin and returns where to write them (valid until the next call), or NULL. */
void *ibid_enc_bin_reserve(ibid_enc *e, const char *key, size_t n);

/* ---- Reading. A message is decoded once into a tree; values are borrowed from the message bytes,
 * which must outlive it. ---- */
typedef struct ibid_msg ibid_msg;
typedef struct ibid_val ibid_val; /* one value of the tree; NULL reads as "absent" everywhere */

/* Limits: depth 16, no count larger than the bytes left could hold (checked before anything is
 * allocated), so the tree takes at most a small multiple of n. Errors: PROTO (not MessagePack, trailing
 * bytes, too deep), NOMEM. Of equal keys in a map the first one counts. */
ibid_err ibid_msg_open(const void *data, size_t n, ibid_msg **out);
void ibid_msg_close(ibid_msg *m);
const ibid_val *ibid_msg_root(const ibid_msg *m);

const ibid_val *ibid_val_get(const ibid_val *map, const char *key); /* NULL if absent */
size_t ibid_val_count(const ibid_val *v);                           /* of an array or map; else 0 */
const ibid_val *ibid_val_at(const ibid_val *array, size_t i);
/* The i-th pair of a map; false past the end or for a key that is not text. */
bool ibid_val_pair(const ibid_val *map, size_t i, const char **key, size_t *key_n,
                   const ibid_val **value);

/* Optional fields: the default when absent or of another type. */
uint64_t ibid_get_u64(const ibid_val *map, const char *key, uint64_t def);
int64_t ibid_get_i64(const ibid_val *map, const char *key, int64_t def);
double ibid_get_f64(const ibid_val *map, const char *key, double def);
bool ibid_get_bool(const ibid_val *map, const char *key, bool def);
/* Text or binary; false (and NULL, 0) when absent or of another type. */
bool ibid_get_str(const ibid_val *map, const char *key, const char **s, size_t *n);
bool ibid_get_bin(const ibid_val *map, const char *key, const void **p, size_t *n);
/* Array elements and bare values. Integers convert where they fit; f64 takes integers too; str also
 * reads as bin and bin as str (other languages mix them up). */
bool ibid_val_u64(const ibid_val *v, uint64_t *out);
bool ibid_val_i64(const ibid_val *v, int64_t *out);
bool ibid_val_f64(const ibid_val *v, double *out);
bool ibid_val_str(const ibid_val *v, const char **s, size_t *n);
bool ibid_val_bin(const ibid_val *v, const void **p, size_t *n);
bool ibid_val_bool(const ibid_val *v, bool *out);
bool ibid_val_is_map(const ibid_val *v);
bool ibid_val_is_array(const ibid_val *v);
bool ibid_val_is_nil(const ibid_val *v); /* nil, or NULL */
bool ibid_val_is_text(const ibid_val *v);
#endif
