#include "retriever/relevance.h"

#include <math.h>
#include <stdlib.h>

enum { NEXT_MIN = 5, NEXT_MAX = 2000, NEXT_PART = 28 };
/* Of best, share and ahead; at 0 they weigh what leaves one in twenty answerable questions out. */
static const double of_best = 0.28, of_share = 4.47, of_ahead = 1.38, of_none = -4.02;

static int descending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

bool ibidi_evidence_keys(double *keys, size_t n, size_t blocks, double null_mean, double null_sd,
                         ibidi_evidence *out) {
    size_t m = 0, next = blocks / NEXT_PART, i = 1;
    double sum = 0;
    for (size_t k = 0; k < n; k++)
        if (!isnan(keys[k])) keys[m++] = keys[k];
    if (m == 0) return false;
    qsort(keys, m, sizeof *keys, descending);
    next = next < NEXT_MIN ? NEXT_MIN : next > NEXT_MAX ? NEXT_MAX : next;
    if (next > m - 1) next = m - 1;
    for (; i <= next; i++) sum += keys[i];
    for (; i <= NEXT_MIN; i++) sum += null_mean;
    out->best = (keys[0] - null_mean) / null_sd;
    out->ahead = (keys[0] - sum / (double)(i - 1)) / null_sd;
    return true;
}

double ibidi_relevance(const ibidi_evidence *e) {
    return 1 /
           (1 + exp(-(of_none + of_best * e->best + of_share * e->share + of_ahead * e->ahead)));
}
