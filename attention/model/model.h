/* One model: a GGUF file, memory-mapped, with its shape, weights, tokenizer and chat template.
 * Immutable after opening and safe to share between threads. */
#ifndef IBID_ATTENTION_MODEL_H
#define IBID_ATTENTION_MODEL_H

#include "attention/tensor.h"
#include "attention/tokenizer/tokenizer.h"
#include "rpc/base/err.h"
#include "rpc/base/hash.h"

typedef enum ibid_arch { IBID_ARCH_LLAMA = 1, IBID_ARCH_QWEN2 = 2, IBID_ARCH_QWEN3 = 3 } ibid_arch;

/* One transformer layer. wq [n_heads * head_dim, n_embd], wk and wv [n_kv_heads * head_dim,
 * n_embd], wo [n_embd, n_heads * head_dim], gate and up [n_ff, n_embd], down [n_embd, n_ff].
 * The rest is F32 and may be absent (data NULL): biases, added to what the matrix of the same
 * letter gives, and the norms of each head's query and key [1, head_dim], between bias and RoPE. */
typedef struct ibid_layer {
    ibid_tensor attn_norm, wq, wk, wv, wo;
    ibid_tensor ffn_norm, gate, up, down;
    ibid_tensor bq, bk, bv, bo;
    ibid_tensor q_norm, k_norm;
} ibid_layer;

/* RoPE. freq[i] = theta^(-2i/n_rot) / factor[i], factor from rope_freqs.weight where present,
 * all divided by the linear scaling factor where present. */
typedef struct ibid_rope {
    ibid_pairing pairing;
    size_t n_rot;      /* dimensions rotated, <= head_dim, even */
    const float *freq; /* [n_rot / 2], radians per position */
} ibid_rope;

typedef struct ibid_model {
    ibid_arch arch;
    const char *name; /* general.name, or the file's base name */
    size_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_ff, n_vocab, n_ctx;
    float norm_eps;
    ibid_rope rope;
    ibid_tensor embed;       /* [n_vocab, n_embd] */
    ibid_tensor output_norm; /* [1, n_embd] */
    ibid_tensor output;      /* [n_vocab, n_embd]; equals embed when tied */
    const ibid_layer *layers;
    const ibid_tokenizer *tokenizer;
    const struct ibid_template *chat; /* attention/tokenizer/template.h; NULL if not a known one */
    /* BLAKE2b-256 of the whole file's bytes: the model's identity everywhere. */
    ibid_hash fingerprint;
    uint64_t file_bytes;
} ibid_model;

/* Maps and checks the file: magic, version, counts, every offset and size against the file's
 * length, every tensor's shape against the hyper-parameters. A known fingerprint may be passed to
 * skip hashing the file (NULL: hash it). Caller closes. Errors: NOTFOUND, IO, CORRUPT (truncated or
 * lying file; the detail says which field), NOTSUP (an architecture, tensor type, RoPE scaling or
 * tokenizer this build does not read, by name). */
ibid_err ibid_model_open(const char *path, const ibid_hash *fingerprint, ibid_model **out);
void ibid_model_close(ibid_model *m);
/* As GGUF files name it. */
const char *ibid_arch_name(ibid_arch arch);
#endif
