/* Template: the best int8 dot product of each query over many keys, exact. Keys are taken MS_KEYS
 * at a time and turned, so that one vector holds four dimensions of VL keys and no sums across
 * lanes are needed until the end. */
#include "attention/kernels/internal.h"

enum { MS_KEYS = MS_VECS * VL, MS_MAX_DIM = 512 };

#ifndef IBIDI_VNNI
INLINE void ms_query(const int8_t *q, uint32_t out[2]) {
    for (int j = 0; j < 2; j++) {
        int16_t pair[2] = {q[j], q[j + 2]};
        memcpy(&out[j], pair, 4);
    }
}
INLINE vi ms_start(vi start, const vi k[2]) {
    (void)k;
    return start;
}
#endif

typedef struct ms_tile {
    _Alignas(64) vi keys[MS_MAX_DIM / 4 * MS_PLANES][MS_VECS];
    vi start[MS_VECS];
    size_t n; /* vectors' worth of dimensions: dim / 4 * MS_PLANES */
} ms_tile;

/* Keys j0 .. j0 + MS_KEYS; past the end the last one stands in, which changes no maximum. */
static void ms_load(ms_tile *t, const int8_t *k, size_t n_keys, size_t dim, size_t j0) {
    t->n = dim / 4 * MS_PLANES;
    for (size_t v = 0; v < MS_VECS; v++) {
        vi start = vi_set1(0);
        for (size_t d = 0; d < dim; d += VL * 4) {
            bool half = dim - d < VL * 4;
            vi m[VL];
            for (size_t i = 0; i < VL; i++) {
                size_t j = j0 + v * VL + i;
                m[i] = vi_load_row(k + (j < n_keys ? j : n_keys - 1) * dim + d, half);
            }
            vi_transpose(m);
            for (size_t c = 0; c < (half ? 8 : VL); c++) {
                vi plane[MS_PLANES];
                ms_expand(m[c], plane);
                start = ms_start(start, plane);
                for (size_t p = 0; p < MS_PLANES; p++) {
                    t->keys[(d / 4 + c) * MS_PLANES + p][v] = plane[p];
                }
            }
        }
        t->start[v] = start;
    }
}

typedef struct ms_best {
    vi value, index; /* per lane; the first of equal ones */
} ms_best;

INLINE void ms_rows(const int N, const ms_tile *t, const uint32_t *q, size_t ldq, size_t j0,
                    ms_best *best) {
    vi sum[MS_ROWS][MS_VECS];
    for (int i = 0; i < N; i++) {
        for (int v = 0; v < MS_VECS; v++) sum[i][v] = t->start[v];
    }
    for (size_t c = 0; c < t->n; c++) {
        for (int i = 0; i < N; i++) {
            vi qv = vi_set1((int32_t)q[(size_t)i * ldq + c]);
            for (int v = 0; v < MS_VECS; v++) sum[i][v] = ms_dot(sum[i][v], qv, t->keys[c][v]);
        }
    }
    for (int i = 0; i < N; i++) {
        for (int v = 0; v < MS_VECS; v++) {
            vi index = vi_set1((int32_t)(uint32_t)(j0 + (size_t)(v * VL)));
            best[i].index = vi_pick_greater(sum[i][v], best[i].value, index, best[i].index);
            best[i].value = vi_max(best[i].value, sum[i][v]);
        }
    }
}

static void ms_any(size_t n, const ms_tile *t, const uint32_t *q, size_t ldq, size_t j0,
                   ms_best *best) {
    switch (n) {
    case 1:
        ms_rows(1, t, q, ldq, j0, best);
        break;
    case 2:
        ms_rows(2, t, q, ldq, j0, best);
        break;
    case 3:
        ms_rows(3, t, q, ldq, j0, best);
        break;
    case 4:
        ms_rows(4, t, q, ldq, j0, best);
        break;
    case 5:
        ms_rows(5, t, q, ldq, j0, best);
        break;
    default:
        ms_rows(MS_ROWS, t, q, ldq, j0, best);
        break;
    }
}

/* index holds the first key of the lane's vector; the lane gives the rest. */
static void ms_finish(const ms_best *b, size_t n_keys, int32_t *best, uint32_t *arg) {
    int32_t value[VL];
    uint32_t index[VL];
    vi_store(value, b->value);
    vi_store(index, b->index);
    int32_t top = INT32_MIN;
    uint32_t at = UINT32_MAX;
    for (uint32_t i = 0; i < VL; i++) {
        uint32_t j = index[i] + i;
        if (j >= n_keys) j = (uint32_t)n_keys - 1; /* a lane past the end holds the last key */
        if (value[i] > top || (value[i] == top && j < at)) {
            top = value[i];
            at = j;
        }
    }
    *best = top;
    if (arg) *arg = at;
}

/* Up to MS_BATCH queries share each turned tile of keys. */
enum { MS_BATCH = 5 * MS_ROWS };

static void ms_batch(const int8_t *q, size_t n_q, const int8_t *k, size_t n_keys, size_t dim,
                     int32_t *best, uint32_t *arg) {
    ms_tile t;
    ms_best top[MS_BATCH];
    uint32_t query[MS_BATCH * (MS_MAX_DIM / 4 * MS_PLANES)];
    size_t ldq = dim / 4 * MS_PLANES;
    for (size_t i = 0; i < n_q; i++) {
        for (size_t d = 0; d < dim / 4; d++) {
            ms_query(q + i * dim + 4 * d, query + i * ldq + d * MS_PLANES);
        }
        top[i].value = vi_set1(INT32_MIN);
        top[i].index = vi_set1(0);
    }
    for (size_t j0 = 0; j0 < n_keys; j0 += MS_KEYS) {
        ms_load(&t, k, n_keys, dim, j0);
        for (size_t i = 0; i < n_q; i += MS_ROWS) {
            ms_any(n_q - i < MS_ROWS ? n_q - i : MS_ROWS, &t, query + i * ldq, ldq, j0, top + i);
        }
    }
    for (size_t i = 0; i < n_q; i++) ms_finish(&top[i], n_keys, best + i, arg ? arg + i : NULL);
}

static void simd_maxsim_i8(const int8_t *q, size_t n_q, const int8_t *k, size_t n_keys, size_t dim,
                           int32_t *best, uint32_t *arg) {
    if (dim % 32 || dim > MS_MAX_DIM || n_keys > INT32_MAX) {
        ibidi_kernels_reference.maxsim_i8(q, n_q, k, n_keys, dim, best, arg);
        return;
    }
    for (size_t i = 0; i < n_q; i += MS_BATCH) {
        size_t n = n_q - i < MS_BATCH ? n_q - i : MS_BATCH;
        ms_batch(q + i * dim, n, k, n_keys, dim, best + i, arg ? arg + i : NULL);
    }
}
