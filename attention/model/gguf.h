/* Reads a GGUF file, version 2 or 3, little-endian: typed metadata and the table of tensors.
 *
 * Nothing in the file is believed: every count, length, type, offset and size is checked against
 * the file's length before anything is read or allocated, so that memory stays below a small
 * multiple of the file's size. What a getter returns borrows from the mapping. A file that another
 * process shortens while it is mapped is outside of what can be checked. Source: the GGUF
 * specification (ggml, docs/gguf.md). */
#ifndef IBID_ATTENTION_GGUF_H
#define IBID_ATTENTION_GGUF_H

#include "rpc/base/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Value types, numbered as in the file. */
typedef enum ibid_gguf_type {
    IBID_GGUF_U8 = 0,
    IBID_GGUF_I8 = 1,
    IBID_GGUF_U16 = 2,
    IBID_GGUF_I16 = 3,
    IBID_GGUF_U32 = 4,
    IBID_GGUF_I32 = 5,
    IBID_GGUF_F32 = 6,
    IBID_GGUF_BOOL = 7,
    IBID_GGUF_STRING = 8,
    IBID_GGUF_ARRAY = 9,
    IBID_GGUF_U64 = 10,
    IBID_GGUF_I64 = 11,
    IBID_GGUF_F64 = 12
} ibid_gguf_type;

/* Bytes of the file, not NUL-terminated. */
typedef struct ibid_gguf_str {
    const char *data;
    size_t n;
} ibid_gguf_str;

/* dims[0] is the length of a row. type is ggml's number; readable says whether this build reads it,
 * and only then bytes is known and [data, data + bytes) is checked to lie in the file. */
typedef struct ibid_gguf_tensor {
    ibid_gguf_str name;
    uint32_t type, n_dims;
    uint64_t dims[4]; /* 1 beyond n_dims; none is 0 */
    bool readable;
    uint64_t bytes;
    const void *data; /* aligned to general.alignment (at least 8) if the file's start is */
} ibid_gguf_tensor;

typedef struct ibid_gguf ibid_gguf;

/* Maps path read-only. Errors: NOTFOUND, IO, NOMEM, CORRUPT, NOTSUP. */
ibid_err ibid_gguf_open(const char *path, ibid_gguf **out);
/* The same over n bytes that the caller keeps until closing; label names them in details. */
ibid_err ibid_gguf_parse(const void *data, size_t n, const char *label, ibid_gguf **out);
void ibid_gguf_close(ibid_gguf *g);

/* The whole file. */
const void *ibid_gguf_bytes(const ibid_gguf *g, size_t *n);
const char *ibid_gguf_label(const ibid_gguf *g);
bool ibid_gguf_has(const ibid_gguf *g, const char *key);

/* Getters. An absent key leaves *out as it was: IBID_OK if required is false, else IBID_CORRUPT. A
 * value of another type is IBID_CORRUPT. u64 takes every integer type but no negative value; f32
 * takes both float types. */
ibid_err ibid_gguf_get_u64(const ibid_gguf *g, const char *key, bool required, uint64_t *out);
ibid_err ibid_gguf_get_f32(const ibid_gguf *g, const char *key, bool required, float *out);
ibid_err ibid_gguf_get_bool(const ibid_gguf *g, const char *key, bool required, bool *out);
ibid_err ibid_gguf_get_str(const ibid_gguf *g, const char *key, bool required, ibid_gguf_str *out);
/* An array of I32 elements; *out points into the file, not aligned: read it with ibid_gguf_i32_at.
 */
ibid_err ibid_gguf_get_i32s(const ibid_gguf *g, const char *key, bool required, const void **out,
                            size_t *n);
int32_t ibid_gguf_i32_at(const void *array, size_t i);
/* An array of strings; *out is one allocation (ibid_free). */
ibid_err ibid_gguf_get_strs(const ibid_gguf *g, const char *key, bool required, ibid_gguf_str **out,
                            size_t *n);

size_t ibid_gguf_n_tensors(const ibid_gguf *g);
/* By place in name order. */
const ibid_gguf_tensor *ibid_gguf_tensor_at(const ibid_gguf *g, size_t i);
const ibid_gguf_tensor *ibid_gguf_tensor_find(const ibid_gguf *g, const char *name);
/* ggml's name for a tensor type number, or "?". */
const char *ibid_gguf_tensor_type_name(uint32_t type);
/* A string of the file made safe to print: at most 63 bytes, others than printable ASCII as '?'. */
const char *ibid_gguf_show(ibid_gguf_str s, char buf[64]);
#endif
