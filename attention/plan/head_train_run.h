/* Trains a retrieval head for a model on a text: `ibid model calibrate --train`.
 *
 * The text is cut into chunks and pseudo-questions as a plain calibration sample is. Inputs are the
 * keys of up to eight heads of the model's first layers, those that find text best as they are.
 * Every sixth pair of chunks is held out; the trained projection is kept only if it finds more of
 * them by their questions than the raw heads do. */
#ifndef IBID_ATTENTION_HEAD_TRAIN_RUN_H
#define IBID_ATTENTION_HEAD_TRAIN_RUN_H

#include "attention/plan/calibration_run.h"
#include "attention/plan/head_train.h"

enum { IBID_TRAIN_TEXT_MAX = 4 << 20, IBID_TRAIN_INPUTS = 8 };

/* A text as chunks and questions. Indexes run over all of it. */
typedef struct ibid_train_texts {
    ibid_reading *chunks; /* tokens and n only */
    size_t n_chunks;
    ibid_cal_question *questions; /* in order of their chunks */
    size_t n_questions;
    ibid_cal_sample *samples; /* that own the tokens */
    size_t n_samples;
} ibid_train_texts;
/* Errors: INVAL (under 128 chunks), TOOBIG (over IBID_TRAIN_TEXT_MAX bytes), NOMEM. */
ibid_err ibid_train_texts_open(const ibid_model *m, ibid_str text, ibid_train_texts *out);
void ibid_train_texts_close(ibid_train_texts *t);

/* Vectors of a teacher, a sentence embedding model: f32 little-endian, of every chunk and then of
 * every question in the order of ibid_train_texts_write. NULL data: none. */
typedef struct ibid_teacher {
    const void *data;
    size_t n; /* bytes */
} ibid_teacher;

typedef struct ibid_train_result {
    double raw_mrr, trained_mrr, gain, gain_error; /* of held-out questions; the mean and standard
                                                    * error of their differences */
    size_t n_held_out;
    bool kept;
} ibid_train_result;

/* raw: the calibration by head search, with a map. ranking: heads, best first. known: *out if kept,
 * for ibid_calibrate; the caller ends it with ibid_calibration_fini either way. report may be NULL.
 * o: steps, seed, n_threads, progress count, 0 = default. Errors: INVAL, TOOBIG, NOMEM, CANCELLED.
 */
ibid_err ibid_calibrate_train(const ibid_reader *r, const ibid_train_texts *texts,
                              ibid_teacher teacher, const ibid_calibration *raw,
                              const ibid_cal_ranking *ranking, const ibid_train_opts *o,
                              ibid_calibration *known, ibid_train_result *result, ibid_buf *report);

/* One JSON object a line: {"chunk": i, "text": ...}, then {"question": i, "chunk": j, "text": ...}:
 * what a teacher is to read. */
ibid_err ibid_train_texts_write(const ibid_model *m, const ibid_train_texts *t, ibid_buf *out);
#endif
