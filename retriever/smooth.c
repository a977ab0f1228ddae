#include "retriever/smooth.h"

#include "rpc/base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NEXT = 10, NONE = -1 };

/* Chosen by cross-validation (docs/quality.md, "Neighbours"). */
static const double STRENGTH = 0.6, STANDS_OUT = 0.5;

typedef struct pool {
    ibidi_candidate *c;
    size_t n;
    double *like;            /* [n, n] cosines; the lower half is filled */
    const ibidi_live **live; /* [n] what each holds; NULL: unknown */
} pool;

/* ---- Likeness ---- */
static double weight(const ibidi_view *v, int32_t id) {
    double df = v->df[id], all = (double)v->n;
    return df * 4 > all ? 0 : log((all + 1) / (df + 0.5));
}

typedef struct holder { /* of one token id: candidates in a list, the last first */
    int32_t candidate, next;
} holder;

/* Adds up what candidate i shares with each before it, then joins their lists. */
static void share(pool *p, const ibidi_view *v, size_t i, int32_t *heads, holder *holders,
                  int32_t *n_holders) {
    const ibidi_live *l = p->live[i];
    double *row = p->like + i * p->n;
    for (uint32_t k = 0; k < l->n_ids; k++) {
        double w = weight(v, l->ids[k]);
        if (w <= 0) continue;
        int32_t *head = &heads[l->ids[k]];
        for (int32_t h = *head; h != NONE; h = holders[h].next) row[holders[h].candidate] += w * w;
        row[i] += w * w;
        holders[*n_holders] = (holder){(int32_t)i, *head};
        *head = (*n_holders)++;
    }
}

static ibid_err find_likeness(pool *p, const ibidi_view *v) {
    size_t n_ids = 0, entries = 0;
    for (size_t i = 0; i < p->n; i++) {
        size_t at = ibidi_view_at(v, p->c[i].block);
        if (at == v->n || !v->blocks[at].n_ids) continue;
        const ibidi_live *l = p->live[i] = &v->blocks[at];
        entries += l->n_ids;
        if ((size_t)l->ids[l->n_ids - 1] >= n_ids) n_ids = (size_t)l->ids[l->n_ids - 1] + 1;
    }
    int32_t *heads = ibid_alloc(n_ids * sizeof *heads), n_holders = 0;
    holder *holders = ibid_alloc(entries * sizeof *holders);
    ibid_err e =
        heads && holders ? IBID_OK : ibid_fail(IBID_NOMEM, "out of memory for %zu ids", entries);
    for (size_t i = 0; i < n_ids && !e; i++) heads[i] = NONE;
    for (size_t i = 0; i < p->n && !e; i++)
        if (p->live[i]) share(p, v, i, heads, holders, &n_holders);
    for (size_t i = 0; i < p->n && !e; i++)
        for (size_t j = 0; j < i; j++) {
            double both = p->like[i * p->n + i] * p->like[j * p->n + j];
            double *x = &p->like[i * p->n + j];
            *x = both > 0 ? *x / sqrt(both) : 0;
            if (p->c[i].block == p->c[j].block) *x = 1;
        }
    ibid_free(holders);
    ibid_free(heads);
    return e;
}

/* ---- Scores ---- */
/* Mean score of the nearest of i; its own where nothing is like it. */
static double near_mean(const pool *p, size_t i) {
    double like[IBIDI_SMOOTH_NEAR], score[IBIDI_SMOOTH_NEAR], sum = 0, weights = 0;
    size_t n = 0;
    for (size_t j = 0; j < p->n; j++) {
        double x = j < i ? p->like[i * p->n + j] : p->like[j * p->n + i];
        if (j == i || x <= 0 || (n == IBIDI_SMOOTH_NEAR && x <= like[n - 1])) continue;
        size_t at = n < IBIDI_SMOOTH_NEAR ? n++ : n - 1;
        for (; at && like[at - 1] < x; at--) {
            like[at] = like[at - 1];
            score[at] = score[at - 1];
        }
        like[at] = x;
        score[at] = p->c[j].score;
    }
    for (size_t k = 0; k < n; k++) {
        sum += like[k] * like[k] * score[k];
        weights += like[k] * like[k];
    }
    return weights > 0 ? sum / weights : p->c[i].score;
}

static double strength(const ibidi_candidate *c, size_t n, double gate) {
    size_t next = n - 1 < NEXT ? n - 1 : NEXT;
    double sum = 0;
    for (size_t i = 1; i <= next; i++) sum += c[i].score;
    double lead = 1 - sum / (double)next / c[0].score;
    return STRENGTH * gate * fmax(0, 1 - lead / STANDS_OUT);
}

/* Means lie closer together than what they are of: draws them apart again. The rest [n, all) keep
 * their distance from the last. */
static void set_scores(ibidi_candidate *c, const double *score, size_t n, size_t all, double a) {
    double best = c[0].score, top = score[0], low = best;
    for (size_t i = 1; i < n; i++) top = fmax(top, score[i]);
    for (size_t i = 0; i < n; i++) {
        c[i].score = best - (top - score[i]) / (1 - a);
        low = fmin(low, c[i].score);
    }
    double drop = n < all ? fmax(c[n].score - low, 0) : 0;
    for (size_t i = n; i < all; i++) c[i].score -= drop;
}

ibid_err ibidi_smooth(ibidi_candidate *c, size_t n, const ibidi_view *v, double gate) {
    while (n && c->exact) {
        c++;
        n--;
    }
    if (n < 3 || gate <= 0 || c[0].score <= 0) return IBID_OK;
    pool p = {.c = c, .n = n < IBIDI_SMOOTH_POOL ? n : IBIDI_SMOOTH_POOL};
    double a = strength(c, p.n, gate);
    if (a <= 0) return IBID_OK;
    double *score = ibid_alloc(p.n * sizeof *score);
    p.like = ibid_calloc(p.n * p.n, sizeof *p.like);
    p.live = ibid_calloc(p.n, sizeof *p.live);
    ibid_err e = score && p.like && p.live
                     ? find_likeness(&p, v)
                     : ibid_fail(IBID_NOMEM, "out of memory for %zu candidates", p.n);
    for (size_t i = 0; i < p.n && !e; i++)
        score[i] = c[i].score + a * (near_mean(&p, i) - c[i].score);
    if (!e) set_scores(c, score, p.n, n, a);
    if (!e) ibidi_candidates_sort(c, p.n);
    ibid_free(score);
    ibid_free(p.like);
    ibid_free(p.live);
    return e;
}
