#include "rpc/front/eval/rank.h"
#include "rpc/base/mem.h"

#include <math.h>
#include <stdlib.h>

enum { CUT = 10 };
const size_t ibidi_recall_depths[IBIDI_RECALLS] = {1, 5, 10, 100};

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int descending(const void *a, const void *b) {
    return ascending(b, a);
}

static double dcg(const double *gains, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n && i < CUT; i++) sum += gains[i] / log2((double)i + 2);
    return sum;
}

void ibidi_rank(const double *gains, size_t n, double *judged, size_t n_judged,
                ibidi_rank_scores *out) {
    *out = (ibidi_rank_scores){0};
    if (n_judged == 0) return;
    qsort(judged, n_judged, sizeof *judged, descending);
    double best = dcg(judged, n_judged);
    if (best > 0) out->ndcg10 = dcg(gains, n) / best;
    for (size_t i = 0; i < n; i++) {
        if (gains[i] <= 0) continue;
        if (out->mrr10 == 0 && i < CUT) out->mrr10 = 1 / (double)(i + 1);
        for (size_t k = 0; k < IBIDI_RECALLS; k++)
            if (i < ibidi_recall_depths[k]) out->recall[k] += 1 / (double)n_judged;
    }
}

uint64_t ibidi_random(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15ULL;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
}

/* A number below n, each equally likely to within 2^-32 (n is far below that). */
static size_t below(uint64_t *state, size_t n) {
    return (size_t)(((ibidi_random(state) >> 32) * (uint64_t)n) >> 32);
}

ibid_err ibidi_bootstrap(const double *a, const double *b, size_t n, uint64_t seed,
                         ibidi_interval *out) {
    *out = (ibidi_interval){0};
    if (n == 0 || n > UINT32_MAX) return ibid_fail(IBID_INVAL, "a bootstrap over %zu questions", n);
    double *diff = ibid_calloc(n, sizeof *diff),
           *means = ibid_calloc(IBIDI_RESAMPLES, sizeof *means);
    ibid_err e = diff && means ? IBID_OK : IBID_NOMEM;
    for (size_t i = 0; !e && i < n; i++) diff[i] = b[i] - (a ? a[i] : 0);
    for (size_t r = 0; !e && r < IBIDI_RESAMPLES; r++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++) sum += diff[below(&seed, n)];
        means[r] = sum / (double)n;
    }
    if (!e) {
        out->mean = ibidi_mean(diff, n);
        out->low = ibidi_percentile(means, IBIDI_RESAMPLES, 0.025);
        out->high = ibidi_percentile(means, IBIDI_RESAMPLES, 0.975);
    }
    ibid_free(diff);
    ibid_free(means);
    return e;
}

double ibidi_mean(const double *v, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += v[i];
    return n ? sum / (double)n : 0;
}

double ibidi_percentile(double *v, size_t n, double p) {
    if (n == 0) return 0;
    qsort(v, n, sizeof *v, ascending);
    double rank = ceil(p * (double)n);
    size_t at = rank < 1 ? 0 : (size_t)rank - 1;
    return v[at < n ? at : n - 1];
}

size_t ibidi_fold(const char *id, size_t folds) {
    uint64_t h = 0xCBF29CE484222325ULL;
    for (; *id; id++) h = (h ^ (unsigned char)*id) * 0x100000001B3ULL;
    return folds ? (size_t)(h % folds) : 0;
}
