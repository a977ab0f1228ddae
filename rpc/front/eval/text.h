/* Text as the measures see it: normalised answers, their words, and what they share. Pure.
 *
 * Two ways to normalise. SQUAD is the SQuAD v1.1 script's order (lower case, punctuation away,
 * articles away, white space to one space) with every Unicode punctuation mark, not ASCII's alone.
 * KTRLF is the same with ASCII punctuation alone, as the KTRL+F authors' script has it.
 * Departures, both in the direction of other languages: letters are lowered one by one (no final
 * sigma rule); words of scripts that are written without spaces (Han, kana, Thai ...) are single
 * characters, as in MLQA's script. */
#ifndef IBID_FRONT_EVAL_TEXT_H
#define IBID_FRONT_EVAL_TEXT_H

#include "kvstore/kvstore.h"
#include "rpc/base/mem.h"

typedef enum ibidi_norm { IBIDI_NORM_SQUAD, IBIDI_NORM_KTRLF } ibidi_norm;

/* Appends the normalised text. Bytes that are not UTF-8 are dropped. Errors: NOMEM, TOOBIG. */
ibid_err ibidi_eval_normal(ibidi_norm how, ibid_str text, ibid_buf *out);

/* Code points of UTF-8 text, one allocation (ibid_free); bytes that are not UTF-8 are skipped. */
ibid_err ibidi_eval_points(ibid_str text, int32_t **out, size_t *n);
/* Words of a text as counted in "words per answer": runs without white space; characters of scripts
 * without spaces count one each. */
size_t ibidi_eval_word_count(ibid_str text);

/* The following compare an answer with one gold answer, both as they stand; they normalise (SQUAD).
 * *out: exact 0/1; f1 of the words as multisets; contains 0/1: gold's words occur in the answer in
 * a row (whole words, so "3" is not in "31"). Errors: NOMEM, TOOBIG. */
typedef struct ibidi_qa_scores {
    double exact, f1, contains;
} ibidi_qa_scores;
ibid_err ibidi_eval_qa(ibid_str answer, ibid_str gold, ibidi_qa_scores *out);
/* The best of several golds, each measure for itself. */
ibid_err ibidi_eval_qa_best(ibid_str answer, const ibid_str *golds, size_t n, ibidi_qa_scores *out);
#endif
