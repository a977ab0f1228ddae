#include "retriever/fuse.h"

#include <math.h>
#include <stdlib.h>

static int best_first(const void *a, const void *b) {
    const ibidi_candidate *x = a, *y = b;
    if (x->exact != y->exact) return x->exact ? -1 : 1;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    if (x->document != y->document) return x->document < y->document ? -1 : 1;
    return x->chunk < y->chunk ? -1 : x->chunk > y->chunk;
}

void ibidi_fuse(ibidi_candidate *c, size_t n, double keys_weight, double most) {
    double low_keys = INFINITY, low_words = INFINITY;
    for (size_t i = 0; i < n; i++) {
        if (c[i].keys < low_keys) low_keys = c[i].keys; /* not so for NAN */
        if (c[i].lexical < low_words) low_words = c[i].lexical;
    }
    bool both = isfinite(low_keys) && isfinite(low_words) && most > 0;
    for (size_t i = 0; i < n; i++) {
        double keys = isnan(c[i].keys) ? low_keys : c[i].keys;
        double words = isnan(c[i].lexical) ? low_words : c[i].lexical;
        if (both)
            c[i].score = keys_weight * keys + (1 - keys_weight) * fmin(words / most, 1);
        else
            c[i].score = !isnan(c[i].keys) ? c[i].keys : isnan(c[i].lexical) ? 0 : c[i].lexical;
    }
    if (n) qsort(c, n, sizeof *c, best_first);
}
