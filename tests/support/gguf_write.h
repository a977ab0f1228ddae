/* Writes small, complete GGUF files of the architectures that are read, for tests: random weights
 * from a seed, a byte-level vocabulary with a few merges, and ChatML control tokens. Same spec,
 * same bytes. */
#ifndef IBID_TEST_GGUF_WRITE_H
#define IBID_TEST_GGUF_WRITE_H

#include "attention/tensor.h"
#include "rpc/base/err.h"
#include "rpc/base/mem.h"

#include <stdbool.h>
#include <stdint.h>

/* Ids in every written vocabulary: 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>, then the 256
 * bytes from id 3 on (byte b is id 3 + b), then merged tokens ("th", "the", " t", ...), then unused
 * ones. */
enum { IBID_TEST_BYTE_TOKEN = 3, IBID_TEST_MIN_VOCAB = 288 };

typedef struct ibid_test_gguf {
    size_t n_layers, n_embd, n_heads, n_kv_heads, n_ff;
    size_t n_vocab; /* at least IBID_TEST_MIN_VOCAB */
    size_t n_ctx;
    ibid_type type; /* of the matrices (norms stay f32) */
    uint64_t seed;
    bool tied; /* no output.weight: the logits use the embedding */
    /* The rest may stay zero. */
    size_t head_dim;       /* 0: n_embd / n_heads; otherwise written as key and value length */
    size_t n_rot;          /* 0: head_dim */
    float rope_theta;      /* 0: 10000 */
    float rope_linear;     /* 0: no scaling; otherwise llama.rope.scaling.factor, type "linear" */
    bool rope_freqs;       /* write rope_freqs.weight (factors from 1 to 4) */
    const char *pre;       /* NULL: "smollm" */
    const char *rope_type; /* of the scaling, when rope_linear is set; NULL: "linear" */
    const char *arch;      /* NULL: "llama"; "qwen2" has biases of q, k and v, "qwen3" head norms */
    bool biases;           /* llama: biases of q, k, v and the output */
    float key_outlier; /* 0: none; otherwise the first rows of every attn_k are this much larger */
} ibid_test_gguf;

/* A spec that is small, quick and valid: 2 layers, n_embd 64, 4 heads, 2 kv heads, n_ff 96, 512
 * tokens of context, F32, tied. */
ibid_test_gguf ibid_test_gguf_small(void);

/* Appends the file to an initialised buffer, or writes it to a path (truncating it). Columns must
 * be whole blocks of the type (32, or 256) for the quantised ones. Errors: INVAL (spec), NOMEM,
 * TOOBIG, IO.
 */
ibid_err ibid_test_build_gguf(const ibid_test_gguf *spec, ibid_buf *out);
ibid_err ibid_test_write_gguf(const char *path, const ibid_test_gguf *spec);
#endif
