/* Trains the projection of a retrieval head (head.h) on questions about known chunks.
 *
 * A batch is some chunks and one question about each. The score of question i and chunk j is the
 * IDF-weighted MaxSim of their projected keys; the loss is the cross entropy of the softmax over
 * the batch's chunks against the right one (InfoNCE, arXiv:1807.03748, on MaxSim scores as in
 * arXiv:2004.12832) and, where a teacher's vectors are given, lambda times its divergence from the
 * teacher's own softmax. The temperature is learned. The sentence a pseudo-question was made of is
 * left out of its chunk (arXiv:1906.00300). Half of a batch are runs of neighbouring chunks: near
 * ones are the hard ones. Start: the principal components of the inputs, scaled by the fourth root
 * of their variance. Adam (arXiv:1412.6980) with a cosine from `rate` to 0.
 *
 * Deterministic for a seed and a backend, whatever the number of threads. */
#ifndef IBID_ATTENTION_HEAD_TRAIN_H
#define IBID_ATTENTION_HEAD_TRAIN_H

#include "attention/kernels/pool.h"
#include "attention/plan/head.h"

#include <stdatomic.h>

typedef struct ibid_train_chunk {
    size_t row0, n; /* its tokens' rows of the set */
} ibid_train_chunk;

typedef struct ibid_train_question {
    size_t row0, n, chunk;
    size_t mask0, mask1; /* tokens [mask0, mask1) of the chunk are left out */
} ibid_train_question;

typedef struct ibid_train_set { /* borrowed */
    const uint16_t *rows;       /* f16 [n_rows, D] raw keys */
    const float *weight;        /* [n_rows] IDF of a question's tokens */
    const ibid_train_chunk *chunks;
    size_t n_chunks;
    const ibid_train_question *questions; /* in order of their chunks */
    size_t n_questions;
    /* [n_chunks, teacher_dim], then [n_questions, teacher_dim], unit vectors; or NULL. */
    const float *teacher;
    size_t teacher_dim;
} ibid_train_set;

typedef struct ibid_train_opts { /* 0: the default in brackets */
    size_t steps, batch;         /* [600], [48] */
    float rate, lambda;          /* [0.002], [0.7] */
    uint64_t seed;               /* [1] */
    size_t n_threads;            /* as ibid_pool_open */
    const ibid_kernels *kernels; /* NULL: the fastest */
    const atomic_bool *cancel;   /* or NULL */
    void (*progress)(void *arg, size_t step, size_t steps, double loss); /* or NULL */
    void *arg;
} ibid_train_opts;

/* map: inputs, mean and gain set, norm off, out and maybe hidden above 0; w0, b0, w1, b1, w2 are
 * filled. Errors: INVAL (under 8 chunks with questions), NOMEM, CANCELLED. */
ibid_err ibid_head_train(const ibid_train_set *set, const ibid_train_opts *o, ibid_keymap *map);

/* ---- Its parts, for the test of the gradient ---- */
typedef struct ibidi_trainer ibidi_trainer;
ibid_err ibidi_trainer_open(const ibid_train_set *set, const ibid_train_opts *o,
                            const ibid_keymap *map, ibidi_trainer **out);
void ibidi_trainer_close(ibidi_trainer *t);
/* All parameters in a row, [n]: w0, w1, b1, w2, log of the scores' scale; and what the last call of
 * _loss found for them. */
float *ibidi_trainer_parameters(ibidi_trainer *t, size_t *n);
const float *ibidi_trainer_gradient(const ibidi_trainer *t);
/* Takes the next batch. */
void ibidi_trainer_draw(ibidi_trainer *t);
/* Loss of the current batch; fills the gradient too. */
double ibidi_trainer_loss(ibidi_trainer *t);
#endif
