#include "retriever/maxsim.h"

#include <math.h>

enum { PART = 32 }; /* blocks a thread takes at a time */

double ibidi_maxsim_keys(const ibid_kernels *k, const ibidi_asking *q, const int8_t *keys,
                         size_t n_tokens, int32_t *best) {
    double s = 0;
    if (n_tokens == 0) return 0;
    k->maxsim_i8(q->keys, q->n, keys, n_tokens, q->dim, best, NULL);
    for (size_t t = 0; t < q->n; t++) s += q->weights[t] * best[t];
    return s / (q->sum * 127.0 * 127.0);
}

typedef struct place {
    const int8_t *keys; /* NULL: not scored */
    size_t n_tokens;
} place;

typedef struct scan {
    const ibid_kernels *kernels;
    const ibidi_asking *q;
    const place *places;
    size_t n;
    int32_t *best; /* [threads, q->n] */
    float *scores;
} scan;

static void scan_part(void *arg, size_t part, size_t thread) {
    const scan *s = arg;
    size_t end = (part + 1) * PART < s->n ? (part + 1) * PART : s->n;
    for (size_t i = part * PART; i < end; i++)
        s->scores[i] =
            s->places[i].keys
                ? (float)ibidi_maxsim_keys(s->kernels, s->q, s->places[i].keys,
                                           s->places[i].n_tokens, s->best + thread * s->q->n)
                : NAN;
}

/* A snapshot belongs to one thread, so the places are looked up first. */
static ibid_err find_places(ibid_snap *snap, const ibidi_keyindex *x, const ibidi_asking *q,
                            const uint64_t *blocks, size_t n, place *places, size_t *scored) {
    size_t hint = 0, n_tokens;
    *scored = 0;
    for (size_t i = 0; i < n; i++) {
        ibid_keys keys;
        const int8_t *there = x ? ibidi_keyindex_keys(x, blocks[i], &hint, &n_tokens) : NULL;
        if (there) {
            places[i] = (place){there, n_tokens};
            ++*scored;
            continue;
        }
        ibid_err e = ibid_snap_keys(snap, blocks[i], &keys);
        places[i] = (place){NULL, 0};
        if (e == IBID_NOTFOUND) continue;
        if (e) return e;
        if (keys.dim != q->dim || ibid_hash_cmp(&keys.calibration, &q->calibration) != 0 ||
            keys.n_tokens == 0)
            continue;
        places[i] = (place){keys.data, keys.n_tokens};
        ++*scored;
    }
    return IBID_OK;
}

static bool same_keys(const ibidi_keyindex *x, const ibidi_asking *q) {
    ibidi_keyindex_stamp s = ibidi_keyindex_told(x).stamp;
    return s.dim == q->dim && ibid_hash_cmp(&s.calibration, &q->calibration) == 0;
}

ibid_err ibidi_maxsim_blocks(const ibid_kernels *k, ibid_pool *pool, ibid_snap *snap,
                             const ibidi_keyindex *x, const ibidi_asking *q, const uint64_t *blocks,
                             size_t n, float *scores, size_t *scored) {
    size_t threads = pool ? ibid_pool_size(pool) : 1;
    if (x && !same_keys(x, q)) x = NULL;
    if (q->dim == 0 || q->dim % 32 || !(q->sum > 0))
        return ibid_fail(IBID_INVAL, "token keys of %zu dimensions cannot be scored", q->dim);
    place *places = ibid_calloc(n, sizeof *places);
    int32_t *best = ibid_calloc(threads * q->n, sizeof *best);
    ibid_err e = places && best ? find_places(snap, x, q, blocks, n, places, scored)
                                : ibid_fail(IBID_NOMEM, "out of memory for %zu blocks", n);
    if (!e) {
        scan s = {k, q, places, n, best, scores};
        size_t parts = (n + PART - 1) / PART;
        if (pool)
            ibid_pool_run(pool, parts, scan_part, &s);
        else
            for (size_t i = 0; i < parts; i++) scan_part(&s, i, 0);
    }
    ibid_free(best);
    ibid_free(places);
    return e;
}
