/* An independent forward pass of the llama architecture, for checking the engine: straight loops in
 * double over weights read one by one, no code shared with the engine or its kernels. Keys are kept
 * un-rotated and rotated explicitly at their global positions, so nothing of the engine's query
 * turning, segments, masks or merging is in here. Slow: small models only. */
#ifndef IBID_TEST_NAIVE_LLAMA_H
#define IBID_TEST_NAIVE_LLAMA_H

#include "attention/model/model.h"

/* Keys and values of some tokens at all layers, in any order of positions. */
typedef struct naive_kv {
    const ibid_model *m;
    size_t n, room;
    double *k, *v; /* [layer, room, n_kv_heads * head_dim], k before RoPE */
    uint32_t *position;
} naive_kv;

/* Aborts when memory is out, as everything here does. */
void naive_kv_init(naive_kv *kv, const ibid_model *m, size_t room);
void naive_kv_fini(naive_kv *kv);
/* Appends entries [first, first + n) of another, their positions raised by shift. */
void naive_kv_append(naive_kv *kv, const naive_kv *from, size_t first, size_t n, uint32_t shift);

/* Appends n rows at ascending positions to kv; a row sees every entry at a position up to its own.
 * logits [n, n_vocab], or NULL. mass, if given, [entries before the call]: += the attention that
 * the rows give each of them, summed over rows, layers and those heads whose bit (layer * n_heads +
 * head) is set in heads (NULL: all). */
void naive_run(naive_kv *kv, const int32_t *tokens, const uint32_t *positions, size_t n,
               double *logits, double *mass, const uint64_t *heads);
#endif
