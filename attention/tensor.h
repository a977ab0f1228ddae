/* The shapes every part of attention/ shares: weight tensors as they lie in a GGUF file, and views of
 * stored KV. Nothing here owns memory. */
#ifndef IBID_ATTENTION_TENSOR_H
#define IBID_ATTENTION_TENSOR_H

#include <stddef.h>
#include <stdint.h>

/* Values are ggml's type numbers, as a GGUF file stores them. Block layouts: ggml's specification
 * (ggml-common.h); BF16 and the K and 5-bit types are read by the next engine issue. */
typedef enum ibid_type {
    IBID_F32 = 0,
    IBID_F16 = 1,
    IBID_Q4_0 = 2, /* 32 weights: f16 d, 16 bytes of nibbles (low half first); w = d * (q - 8) */
    IBID_Q4_1 = 3, /* 32 weights: f16 d, f16 m, 16 bytes of nibbles; w = d * q + m */
    IBID_Q8_0 = 8  /* 32 weights: f16 d, 32 int8; w = d * q */
} ibid_type;

/* A matrix [rows, cols], row-major, each row row_bytes long. A vector has rows = 1. data is borrowed
 * from the mapped file; NULL where the architecture has no such tensor. */
typedef struct ibid_tensor {
    ibid_type type;
    size_t rows, cols, row_bytes;
    const void *data;
} ibid_tensor;

/* Bytes of a row of cols weights; 0 if the type is unknown or cols is not a whole number of blocks. */
size_t ibid_type_row_bytes(ibid_type type, size_t cols);
const char *ibid_type_name(ibid_type type);

/* KV element types; the numbers are stored on disk. q8_0 here keeps its scales in planes of their own
 * (one f16 per 32 values along head_dim), so that the int8 rows stay aligned. */
typedef enum ibid_kv_type { IBID_KV_F32 = 0, IBID_KV_F16 = 1, IBID_KV_Q8_0 = 2 } ibid_kv_type;

/* Keys and values of some consecutive tokens at one layer. K is rotated (RoPE) at the tokens' local
 * positions. Strides: head h, token t starts at (h * n_tokens + t) * head_dim elements; its scales
 * at (h * n_tokens + t) * (head_dim / 32). */
typedef struct ibid_kv_view {
    ibid_kv_type type;
    size_t n_tokens, n_kv_heads, head_dim;
    const void *k, *v;                  /* [n_kv_heads, n_tokens, head_dim] f32, f16 or int8 */
    const uint16_t *k_scale, *v_scale;  /* [n_kv_heads, n_tokens, head_dim / 32] f16; q8_0 only */
} ibid_kv_view;
#endif
