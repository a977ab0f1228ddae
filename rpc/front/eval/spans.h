/* KTRL+F's measures of a list of found spans against the gold list: List EM F1 and List Overlap F1
 * (arXiv 2311.08329), as the authors' published evaluation computes them rather than as the paper's
 * prose has it. Pure.
 *
 *   EM       each side a multiset of normalised strings; credit is the size of their intersection;
 *            precision and recall over max(1, length of the list).
 *   Overlap  of two strings: their longest common substring, as Python's difflib finds it, its
 *            habit of passing over popular characters of strings of 200 and more included.
 *            Precision: each prediction's best share over the golds. Recall: the golds in order
 *            each take the best prediction that no earlier gold took.
 * One departure: among predictions of equal share a gold takes the last one; the published code
 * leaves ties of long lists to numpy's unstable sort. */
#ifndef IBID_FRONT_EVAL_SPANS_H
#define IBID_FRONT_EVAL_SPANS_H

#include "kvstore/kvstore.h"
#include "rpc/base/mem.h"

typedef struct ibidi_span_scores {
    double em_p, em_r, em_f1;
    double overlap_p, overlap_r, overlap_f1;
} ibidi_span_scores;

/* Errors: NOMEM, TOOBIG. */
ibid_err ibidi_eval_spans(const ibid_str *found, size_t n_found, const ibid_str *gold,
                          size_t n_gold, ibidi_span_scores *out);

/* Length in code points of the longest common substring, as difflib.SequenceMatcher(None, a,
 * b).find_longest_match says. work [2 * (n_b + 1)]. */
size_t ibidi_eval_common(const int32_t *a, size_t n_a, const int32_t *b, size_t n_b, size_t *work);

/* Every capitalised phrase of a text: the baseline that shows what Overlap alone proves. Runs of
 * words that begin with a capital, joined by one space, or by one of "of", "the", "and", "for",
 * "de" between two of them; function words that a sentence began with are cut off. Spans borrow the
 * text. *out: ibid_free. */
ibid_err ibidi_eval_capitalised(ibid_str text, ibid_str **out, size_t *n);
#endif
