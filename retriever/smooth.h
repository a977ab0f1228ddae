/* Scores that hear their neighbours: passages about the same thing tend to answer the same question
 * (the cluster hypothesis; as score regularization in Diaz, CIKM 2005,
 * doi:10.1145/1099554.1099722). A passage whose likes rank high rises, one that matched by chance
 * sinks. Pure. */
#ifndef IBID_RETRIEVER_SMOOTH_H
#define IBID_RETRIEVER_SMOOTH_H

#include "retriever/fuse.h"
#include "retriever/view.h"

enum {
    IBIDI_SMOOTH_POOL = 200, /* best candidates that take part */
    IBIDI_SMOOTH_NEAR = 5    /* neighbours of each */
};

/* c [n] as ibidi_fuse left them. Of those that are not exact, the best IBIDI_SMOOTH_POOL:
 *
 *   score_i += a * (mean_i - score_i)
 *   a = 0.6 * gate * max(0, 1 - lead / 0.5), lead = 1 - (mean of the next ten scores) / best
 *
 * mean_i is that of the scores of i's IBIDI_SMOOTH_NEAR nearest, weighted by the square of their
 * likeness: the cosine of what the two blocks hold, each distinct token id at ln((N + 1) / (df +
 * 0.5)), ids in more than a quarter of the collection's N blocks left out; of the same block, 1.
 * Then all are drawn apart again, score_i = best - (highest - score_i) / (1 - a), best being the
 * best score before, so that a share of the best score means what it meant; what follows the pool
 * is lowered to stay below it.
 *
 * gate is what ibidi_fuse returned: where words say nothing, their likeness says nothing either. A
 * best candidate that stands out by itself keeps its place. Sorted again, the exact ones first.
 * With gate 0, a best score of 0 or less, or fewer than 3 candidates, nothing happens. Errors:
 * NOMEM. */
ibid_err ibidi_smooth(ibidi_candidate *c, size_t n, const ibidi_view *v, double gate);
#endif
