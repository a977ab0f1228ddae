#include "retriever/fuse.h"

#include <math.h>
#include <stdlib.h>

typedef struct spread {
    double mean, sd, low;
    size_t n;
} spread;

static double keys_of(const ibidi_candidate *c) {
    return c->keys;
}

static double lexical_of(const ibidi_candidate *c) {
    return c->lexical;
}

static spread measure(const ibidi_candidate *c, size_t n, double (*get)(const ibidi_candidate *)) {
    spread s = {.low = INFINITY};
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++) {
        double v = get(&c[i]);
        if (isnan(v)) continue;
        sum += v;
        if (v < s.low) s.low = v;
        s.n++;
    }
    if (!s.n) return s;
    s.mean = sum / (double)s.n;
    for (size_t i = 0; i < n; i++) {
        double v = get(&c[i]);
        if (!isnan(v)) squares += (v - s.mean) * (v - s.mean);
    }
    s.sd = sqrt(squares / (double)s.n);
    return s;
}

static double standard(const spread *s, double v) {
    if (isnan(v)) v = s->low;
    return s->sd > 1e-9 ? (v - s->mean) / s->sd : 0;
}

static int best_first(const void *a, const void *b) {
    const ibidi_candidate *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    if (x->document != y->document) return x->document < y->document ? -1 : 1;
    return x->chunk < y->chunk ? -1 : x->chunk > y->chunk;
}

void ibidi_fuse(ibidi_candidate *c, size_t n, double keys_weight) {
    spread k = measure(c, n, keys_of), l = measure(c, n, lexical_of);
    for (size_t i = 0; i < n; i++) {
        if (k.n && l.n)
            c[i].score = keys_weight * standard(&k, c[i].keys) +
                         (1 - keys_weight) * standard(&l, c[i].lexical);
        else
            c[i].score = !isnan(c[i].keys) ? c[i].keys : isnan(c[i].lexical) ? 0 : c[i].lexical;
    }
    if (n) qsort(c, n, sizeof *c, best_first);
}
