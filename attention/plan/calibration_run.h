/* Finds a model's retrieval heads: the (layer, kv head) whose keys of a question's tokens lie
 * nearest to keys of the text that answers it.
 *
 * A sample text is cut into chunks, and questions are asked about each. Where the sample has lines
 * that start with "Q: ", each is a question about the text since the last one; the built-in sample
 * has one per chunk. From every chunk, also in a plain text, come pseudo-questions, after the
 * inverse cloze task (arXiv:1906.00300): a random sentence, most of its words dropped, a question
 * word before it. In a plain text a third of these sentences are left out of their chunk, so that
 * only what stands around them can be matched. Every (layer, kv head) is scored from one pass over
 * the sample by IDF-weighted MaxSim of centred, normalised keys: score(chunk) = sum over question
 * tokens t of idf(t) * max over the chunk's tokens j of <k_t, k_j>, divided by sum of idf(t). The
 * best head by mean reciprocal rank is taken, and another, up to four, as long as that earns 0.015
 * of it. Deterministic.
 *
 * Measured on the default model: one head (layer 9, head 0) finds the paragraph of an XQuAD
 * question first for 93.8 % of 633 questions, the two that the sample chooses for 95.4 %. Written
 * questions are what tells heads that match meaning from heads that match words: on
 * pseudo-questions alone, whose words stand in the chunk in that order, layer 3 looks best.
 * Questions centred by the text's mean do better than by their own. */
#ifndef IBID_ATTENTION_CALIBRATION_RUN_H
#define IBID_ATTENTION_CALIBRATION_RUN_H

#include "attention/plan/encode.h"
#include "kvstore/kvstore.h"

typedef struct ibid_cal_ranking { /* heads by how well each finds text alone, best first */
    ibid_head heads[2 * IBID_INPUTS_MAX];
    size_t n;
} ibid_cal_ranking;

/* sample: s NULL = the text built into the program. known: a calibration whose map is to be used
 * (a trained one) instead of the heads that are found, or NULL; thresholds come from the sample all
 * the same; if it names heads (for citations), no others are looked for. ranking may be NULL: it is
 * filled unless heads were named. report (may be NULL): a table for a person. A model without a
 * useful head gives no map, which is no error. End *out with ibid_calibration_fini. Errors: INVAL
 * (a sample too short to judge: under 16 chunks), MISMATCH (known is of another model), NOMEM,
 * CANCELLED. */
ibid_err ibid_calibrate(const ibid_reader *r, ibid_str sample, const ibid_calibration *known,
                        const atomic_bool *cancel, ibid_calibration *out, ibid_cal_ranking *ranking,
                        ibid_buf *report);

/* ---- Its parts, for measuring on other questions ---- */

typedef struct ibid_cal_question {
    const int32_t *tokens;
    size_t n;
    size_t chunk;        /* the right one */
    size_t mask0, mask1; /* its tokens [mask0, mask1) are left out */
} ibid_cal_question;

typedef struct ibid_cal_set {   /* borrowed */
    const ibid_reading *chunks; /* tokens and n only */
    size_t n_chunks;
    const ibid_cal_question *questions;
    size_t n_questions;
} ibid_cal_set;

typedef struct ibid_cal_score {
    double recall1, mrr, margin; /* margin: right chunk's score less the best wrong one's, mean */
    double null_mean, null_sd;   /* of the best wrong chunk's score */
    double right_low, right_middle; /* 2 % and 10 % quantile of the right chunk's score */
} ibid_cal_score;

/* Raw keys of a set at all heads. */
typedef struct ibid_cal_bank ibid_cal_bank;
ibid_err ibid_cal_bank_open(const ibid_reader *r, const ibid_cal_set *set,
                            const atomic_bool *cancel, ibid_cal_bank **out);
void ibid_cal_bank_close(ibid_cal_bank *b);
/* Sets the map's mean from the set's chunks. */
ibid_err ibid_cal_bank_means(const ibid_cal_bank *b, ibid_keymap *map);
/* How well the map's token keys find the right chunk. Errors: MISMATCH. */
ibid_err ibid_cal_bank_score(const ibid_cal_bank *b, const ibid_keymap *map, ibid_cal_score *out);

/* Mean reciprocal rank by words alone, IDF-weighted: what keys have to come up to. */
ibid_err ibid_cal_words(const ibid_model *m, const ibid_cal_set *set, double *mrr);

/* A sample as chunks and pseudo-questions, in memory of its own. */
typedef struct ibid_cal_sample {
    ibid_cal_set set;
    void *memory[5];
} ibid_cal_sample;
ibid_err ibid_cal_sample_open(const ibid_model *m, ibid_str text, ibid_cal_sample *out);
void ibid_cal_sample_close(ibid_cal_sample *s);

extern const unsigned char ibidi_sample_text[]; /* generated from plan/sample.txt */
extern const size_t ibidi_sample_text_size;
#endif
