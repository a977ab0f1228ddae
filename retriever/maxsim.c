#include "retriever/maxsim.h"

#include <math.h>

enum { PART = 32 }; /* blocks a thread takes at a time */

double ibidi_maxsim_sum(const ibidi_asking *q, const int32_t *best) {
    double s = 0;
    for (size_t t = 0; t < q->n; t++) s += q->weights[t] * best[t];
    return s / (q->sum * 127.0 * 127.0);
}

double ibidi_maxsim_keys(const ibid_kernels *k, const ibidi_asking *q, const int8_t *keys,
                         size_t n_tokens, int32_t *best) {
    if (n_tokens == 0) return 0;
    k->maxsim_i8(q->keys, q->n, keys, n_tokens, q->dim, best, NULL);
    return ibidi_maxsim_sum(q, best);
}

typedef struct place { /* of a block's keys: in panels, or in rows, or neither: not scored */
    ibid_key_panels panels;
    const int8_t *rows;
    size_t n_tokens;
} place;

typedef struct scan {
    const ibid_kernels *kernels;
    const ibidi_asking *q;
    const place *places;
    size_t n;
    int32_t *best; /* [threads, PART, q->n] */
    float *scores;
} scan;

static void scan_part(void *arg, size_t part, size_t thread) {
    const scan *s = arg;
    const ibidi_asking *q = s->q;
    size_t end = (part + 1) * PART < s->n ? (part + 1) * PART : s->n, n = 0, at[PART];
    int32_t *best = s->best + thread * PART * q->n;
    ibid_key_panels panels[PART];
    for (size_t i = part * PART; i < end; i++) {
        const place *p = &s->places[i];
        if (p->panels.n) {
            panels[n] = p->panels;
            at[n++] = i;
        } else
            s->scores[i] =
                p->rows ? (float)ibidi_maxsim_keys(s->kernels, q, p->rows, p->n_tokens, best) : NAN;
    }
    if (n) s->kernels->maxsim_panels(q->keys, q->n, q->dim, panels, n, best);
    for (size_t i = 0; i < n; i++) s->scores[at[i]] = (float)ibidi_maxsim_sum(q, best + i * q->n);
}

/* A snapshot belongs to one thread, so the places are looked up first. */
static ibid_err find_places(ibid_snap *snap, const ibidi_keyindex *x, const ibidi_asking *q,
                            const uint64_t *blocks, size_t n, place *places, size_t *scored) {
    size_t hint = 0;
    *scored = 0;
    for (size_t i = 0; i < n; i++) {
        ibid_keys keys;
        places[i] = (place){.rows = NULL};
        if (x && ibidi_keyindex_keys(x, blocks[i], &hint, &places[i].panels)) {
            ++*scored;
            continue;
        }
        ibid_err e = ibid_snap_keys(snap, blocks[i], &keys);
        if (e == IBID_NOTFOUND) continue;
        if (e) return e;
        if (keys.dim != q->dim || ibid_hash_cmp(&keys.calibration, &q->calibration) != 0 ||
            keys.n_tokens == 0)
            continue;
        places[i] = (place){.rows = keys.data, .n_tokens = keys.n_tokens};
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
    int32_t *best = ibid_calloc(threads * PART * q->n, sizeof *best);
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
