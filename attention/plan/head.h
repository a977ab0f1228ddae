/* How raw keys become token keys: the retrieval head of a model.
 *
 * Input: the keys of some (layer, kv head) pairs, from before RoPE, side by side: D numbers.
 *   x = (raw - mean) * gain per channel; a question's tokens may have a mean of their own; with
 *   norm, each head's part of x is then divided by its length.
 * A token key is the concatenation of weighted parts of length 1:
 *   raw parts:  x at one of the inputs
 *   projection: y = W0 x + b0 + W2 gelu(W1 x + b1), gelu in its tanh form
 * times 127, rounded to int8. The squares of the weights sum to 1, so a MaxSim score of token keys
 * is the weighted mean of the parts' cosines. A model without training has raw parts only; the
 * residual form is that of arXiv:2510.12327. */
#ifndef IBID_ATTENTION_HEAD_H
#define IBID_ATTENTION_HEAD_H

#include "attention/kernels/kernels.h"

enum {
    IBID_HEAD_DIM_MAX = 256,
    IBID_INPUTS_MAX = 24,
    IBID_INPUT_MAX = 2048,  /* D */
    IBID_RAW_MAX = 8,       /* raw parts */
    IBID_HIDDEN_MAX = 1024, /* rows of W1 */
    IBID_OUT_MAX = 128,     /* of the projection */
    IBID_KEY_DIM_MAX = 2048 /* of a token key */
};

typedef struct ibid_head {
    uint32_t layer, kv_head;
} ibid_head;

/* Sizes first: ibid_keymap_open fills the pointers in, all into one block of memory. */
typedef struct ibid_keymap {
    uint32_t head_dim, n_inputs; /* D = head_dim * n_inputs */
    uint32_t n_raw, out, hidden; /* out 0: no projection; hidden 0: W0 x + b0 only */
    bool norm, has_gain, has_question_mean;
    ibid_head inputs[IBID_INPUTS_MAX];
    uint32_t raw[IBID_RAW_MAX]; /* indexes of inputs */
    float raw_weight[IBID_RAW_MAX], out_weight;
    float *mean, *gain, *question_mean; /* [D] gain and question_mean NULL without */
    float *b0, *b1;                     /* [out] and [hidden] */
    uint16_t *w0, *w1, *w2;             /* f16 [out, D], [hidden, D], [out, hidden], row-major */
} ibid_keymap;

/* A map of the given sizes, all else 0. Errors: INVAL (sizes out of range, a key dimension that is
 * not a multiple of 32), NOMEM. Free with ibid_keymap_close. */
ibid_err ibid_keymap_open(const ibid_keymap *sizes, ibid_keymap **out);
void ibid_keymap_close(ibid_keymap *m);
/* Raw parts of equal weight of n heads, nothing else: what head search gives. */
ibid_err ibid_keymap_open_raw(const ibid_head *heads, size_t n, size_t head_dim, ibid_keymap **out);
ibid_err ibid_keymap_copy(const ibid_keymap *m, ibid_keymap **out);
/* Whether all numbers are finite and the indexes and weights within range; scales the weights so
 * that their squares sum to 1. */
bool ibid_keymap_settle(ibid_keymap *m);

size_t ibid_keymap_input(const ibid_keymap *m);  /* D */
size_t ibid_keymap_dim(const ibid_keymap *m);    /* of a token key; 0 for NULL */
size_t ibid_keymap_layers(const ibid_keymap *m); /* layers to run for the inputs */

/* Token keys [n, dim] of raw keys [n, D] f32. kernels NULL: the fastest. A token's key depends on
 * its raw key only. Errors: NOMEM. */
ibid_err ibid_token_keys(const ibid_keymap *m, const ibid_kernels *kernels, bool question,
                         const float *raw, size_t n, int8_t *out);
/* The first step alone: x [n, D] from raw; x and raw may be equal. */
void ibid_keymap_inputs(const ibid_keymap *m, bool question, const float *raw, size_t n, float *x);
/* z [n] through gelu, in place. */
void ibid_gelu(float *z, size_t n);
#endif
