/* The shapes every part of attention/ shares: weight tensors as they lie in a GGUF file, and views
 * of stored KV. Nothing here owns memory. */
#ifndef IBID_ATTENTION_TENSOR_H
#define IBID_ATTENTION_TENSOR_H

#include <stddef.h>
#include <stdint.h>

/* Values are ggml's type numbers, as a GGUF file stores them. Block layouts: ggml's specification
 * (ggml-common.h). d and m are f16. */
typedef enum ibid_type {
    IBID_F32 = 0,
    IBID_F16 = 1,
    IBID_Q4_0 = 2, /* 32 weights: f16 d, 16 bytes of nibbles (low half first); w = d * (q - 8) */
    IBID_Q4_1 = 3, /* 32 weights: f16 d, f16 m, 16 bytes of nibbles; w = d * q + m */
    IBID_Q5_0 = 6, /* 32 weights: d, u32 of high bits, nibbles as Q4_0; w = d * (q - 16) */
    IBID_Q5_1 = 7, /* 32 weights: d, m, u32 of high bits, nibbles; w = d * q + m */
    IBID_Q8_0 = 8, /* 32 weights: f16 d, 32 int8; w = d * q */
    /* 256 weights: d, m, 12 bytes of 6-bit factors s, t of each 32, nibbles; w = d s q - m t */
    IBID_Q4_K = 12,
    IBID_Q5_K = 13, /* the same with 32 bytes of high bits before the nibbles */
    /* 256 weights: 128 bytes of nibbles, 64 of high bit pairs, an int8 factor s of each 16, d;
     * w = d s (q - 32) */
    IBID_Q6_K = 14,
    IBID_BF16 = 30 /* the high half of an F32 */
} ibid_type;

/* Which dimensions of a head RoPE turns together: 2i and 2i + 1 (GGUF's llama), or i and
 * i + n_rot / 2 (qwen2, qwen3). */
typedef enum ibid_pairing { IBID_PAIR_NEXT = 0, IBID_PAIR_HALF = 1 } ibid_pairing;

/* A matrix [rows, cols], row-major, each row row_bytes long. A vector has rows = 1. data is
 * borrowed from the mapped file; NULL where the architecture has no such tensor. */
typedef struct ibid_tensor {
    ibid_type type;
    size_t rows, cols, row_bytes;
    const void *data;
} ibid_tensor;

/* Bytes of a row of cols weights; 0 if the type is unknown or cols is not a whole number of blocks.
 */
size_t ibid_type_row_bytes(ibid_type type, size_t cols);
const char *ibid_type_name(ibid_type type);
/* Weights in a block: 1 (not quantised), 32 or 256; 0 if the type is unknown. */
size_t ibid_type_block(ibid_type type);
/* Columns [32 group, 32 group + 32) of a row of a quantised type as weight = d * u + m, exactly but
 * for one rounding of the sum, d * u being exact: d[0], m[0] for the first 16, d[1], m[1] (the same
 * except in Q6_K) for the last. u is below 16, 32, 64 or 256. Defined in kernels/weights.c. */
void ibid_weights_split(ibid_type type, const void *row, size_t group, uint8_t u[32], float d[2],
                        float m[2]);

/* KV element types; the numbers are stored on disk. q8_0 here keeps its scales in planes of their
 * own (one f16 per 32 values along head_dim), so that the int8 rows stay aligned. */
typedef enum ibid_kv_type { IBID_KV_F32 = 0, IBID_KV_F16 = 1, IBID_KV_Q8_0 = 2 } ibid_kv_type;

/* Keys and values of some consecutive tokens at one layer. K is rotated (RoPE) at the tokens' local
 * positions. Keys of q8_0 are then spread: each 32 dimensions times the Walsh-Hadamard matrix
 * (ibid_kernels.hadamard; arXiv:2404.00456), since a few large dimensions would leave the others
 * few of the 8 bits. Queries are spread to meet them. Strides: head h, token t starts at (h *
 * n_tokens + t) * head_dim elements; its scales at (h * n_tokens + t) * (head_dim / 32). */
typedef struct ibid_kv_view {
    ibid_kv_type type;
    size_t n_tokens, n_kv_heads, head_dim;
    const void *k, *v;                 /* [n_kv_heads, n_tokens, head_dim] f32, f16 or int8 */
    const uint16_t *k_scale, *v_scale; /* [n_kv_heads, n_tokens, head_dim / 32] f16; q8_0 only */
} ibid_kv_view;
#endif
