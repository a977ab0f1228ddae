/* Template: the best int8 dot product of each query over many keys, exact. One vector holds four
 * dimensions of VL keys, so no sums across lanes are needed until the end: keys lie so already
 * (maxsim_panels), or a few at a time are turned (maxsim_i8). Keys are unsigned here, + 128, which
 * adds 128 * sum(q) to every product of a query q and so changes no maximum's place. */
#include "attention/kernels/internal.h"

enum { MS_KEYS = MS_VECS * VL, MS_MAX_DIM = 512, MS_BATCH = 32 /* queries at a time */ };

#ifdef IBIDI_VNNI
enum { MS_PLANES = 1 };
INLINE void ms_expand(vi column, vi out[MS_PLANES]) {
    out[0] = column;
}
INLINE vi ms_dot(vi acc, vi q, vi k) {
    return q8_dp(acc, k, q);
}
#else
enum { MS_PLANES = 2 };
/* Bytes 0 and 2, then 1 and 3, of each lane as pairs of 16 bits. */
INLINE void ms_expand(vi column, vi out[MS_PLANES]) {
    out[0] = vi_even_bytes(column);
    out[1] = vi_odd_bytes(column);
}
INLINE vi ms_dot(vi acc, vi q, vi k) {
    return vi_add(acc, vi_madd(q, k));
}
#endif

typedef struct ms_question { /* up to MS_BATCH queries */
    const uint8_t *q;        /* per query and four dimensions: MS_PLANES words */
    size_t n, dim, stride;   /* stride: bytes from one query to the next */
    int32_t bias[MS_BATCH];  /* 128 * sum(q) */
    uint8_t room[MS_PLANES == 1 ? 1 : MS_BATCH * MS_MAX_DIM * 2];
} ms_question;

static void ms_ask(ms_question *a, const int8_t *q, size_t n, size_t dim) {
    a->n = n;
    a->dim = dim;
    a->stride = dim * MS_PLANES;
    for (size_t i = 0; i < n; i++) {
        vi sum = vi_set1(0);
        for (size_t d = 0; d < dim; d += 4 * VL)
            sum = q8_dp(sum, vi_set1((int32_t)0x80808080u),
                        vi_load_row(q + i * dim + d, dim - d < 4 * VL));
        a->bias[i] = vi_hsum(sum);
    }
    a->q = (const uint8_t *)q;
    if (MS_PLANES == 1) return;
    for (size_t i = 0; i < n * dim; i += 4) {
        int16_t pair[4] = {q[i], q[i + 2], q[i + 1], q[i + 3]};
        memcpy(a->room + 2 * i, pair, sizeof pair);
    }
    a->q = a->room;
}

INLINE vi ms_word(const uint8_t *q) {
    int32_t w;
    memcpy(&w, q, 4);
    return vi_set1(w);
}

/* Sums of N queries from q on and the V vectors of keys of a panel, or of V panels. */
INLINE void ms_rows(const int N, const int V, const uint8_t *panels, size_t dim, const uint8_t *q,
                    size_t stride, vi sum[MS_ROWS][MS_VECS]) {
    const size_t apart =
        (int)VL == (int)IBID_KEY_PANEL ? VL * dim : VL * 4; /* bytes between vectors */
    for (int i = 0; i < N; i++) {
        for (int v = 0; v < V; v++) sum[i][v] = vi_set1(0);
    }
    for (size_t c = 0; c < dim / 4; c++) {
        vi k[MS_VECS][MS_PLANES];
        for (int v = 0; v < V; v++)
            ms_expand(vi_load(panels + c * 4 * IBID_KEY_PANEL + (size_t)v * apart), k[v]);
        for (int i = 0; i < N; i++) {
            for (int p = 0; p < MS_PLANES; p++) {
                vi w = ms_word(q + (size_t)i * stride + (c * MS_PLANES + (size_t)p) * 4);
                for (int v = 0; v < V; v++) sum[i][v] = ms_dot(sum[i][v], w, k[v][p]);
            }
        }
    }
}

/* index: NULL, or per lane the first key of the vector that held the best, of equal ones the
 * first. */
INLINE void ms_tile(const int N, const int V, const uint8_t *panels, const ms_question *a,
                    size_t at, size_t j0, vi *best, vi *index) {
    vi sum[MS_ROWS][MS_VECS];
    ms_rows(N, V, panels, a->dim, a->q + at * a->stride, a->stride, sum);
    for (int i = 0; i < N; i++) {
        for (int v = 0; v < V; v++) {
            if (index) {
                vi j = vi_set1((int32_t)(uint32_t)(j0 + (size_t)(v * VL)));
                index[at + (size_t)i] =
                    vi_pick_greater(sum[i][v], best[at + (size_t)i], j, index[at + (size_t)i]);
            }
            best[at + (size_t)i] = vi_max(best[at + (size_t)i], sum[i][v]);
        }
    }
}

#define MS_CASE(N)                                                                                 \
    case N:                                                                                        \
        ms_tile(N, V, panels, a, at, j0, best, index);                                             \
        break
INLINE void ms_some(const int V, const uint8_t *panels, const ms_question *a, size_t j0, vi *best,
                    vi *index) {
    size_t parts = (a->n + MS_ROWS - 1) / MS_ROWS;
    for (size_t part = 0, at = 0; part < parts; part++) { /* of equal size, or nearly */
        size_t n = (a->n - at) / (parts - part);
        switch (n) {
            MS_CASE(1);
            MS_CASE(2);
            MS_CASE(3);
#if IBIDI_512
            MS_CASE(4);
            MS_CASE(5);
            MS_CASE(6);
            MS_CASE(7);
#endif
        default:
            ms_tile(MS_ROWS, V, panels, a, at, j0, best, index);
        }
        at += n;
    }
}
#undef MS_CASE

static void ms_whole(const uint8_t *panels, const ms_question *a, vi *best) {
    ms_some(MS_VECS, panels, a, 0, best, NULL);
}
static void ms_last(const uint8_t *panels, const ms_question *a, vi *best) {
    ms_some((int)VL == (int)IBID_KEY_PANEL ? 1 : MS_VECS, panels, a, 0, best, NULL);
}
static void ms_indexed(const uint8_t *panels, const ms_question *a, size_t j0, vi *best,
                       vi *index) {
    ms_some(MS_VECS, panels, a, j0, best, index);
}

static void simd_maxsim_panels(const int8_t *q, size_t n_q, size_t dim, const ibid_key_panels *k,
                               size_t n, int32_t *best) {
    if (dim % 32 || dim > MS_MAX_DIM) {
        ibidi_kernels_reference.maxsim_panels(q, n_q, dim, k, n, best);
        return;
    }
    ms_question a;
    const size_t step = MS_KEYS / IBID_KEY_PANEL, bytes = dim * IBID_KEY_PANEL;
    for (size_t at = 0; at < n_q; at += MS_BATCH) {
        ms_ask(&a, q + at * dim, n_q - at < MS_BATCH ? n_q - at : MS_BATCH, dim);
        for (size_t b = 0; b < n; b++) {
            vi top[MS_BATCH];
            size_t p = 0;
            for (size_t i = 0; i < a.n; i++) top[i] = vi_set1(INT32_MIN);
            for (; p + step <= k[b].n; p += step) ms_whole(k[b].panels + p * bytes, &a, top);
            if (p < k[b].n) ms_last(k[b].panels + p * bytes, &a, top);
            for (size_t i = 0; i < a.n; i++) best[b * n_q + at + i] = vi_hmax(top[i]) - a.bias[i];
        }
    }
}

/* ---- Keys in rows ---- */
/* Turns keys j0 .. j0 + MS_KEYS; past the end the last one stands in. */
static void ms_turn(uint8_t *panels, const int8_t *k, size_t n_keys, size_t dim, size_t j0) {
    const size_t apart = (int)VL == (int)IBID_KEY_PANEL ? VL * dim : VL * 4;
    for (size_t v = 0; v < MS_VECS; v++) {
        for (size_t d = 0; d < dim; d += VL * 4) {
            bool half = dim - d < VL * 4;
            vi m[VL];
            for (size_t i = 0; i < VL; i++) {
                size_t j = j0 + v * VL + i;
                m[i] = vi_load_row(k + (j < n_keys ? j : n_keys - 1) * dim + d, half);
            }
            vi_transpose(m);
            for (size_t c = 0; c < (half ? 8 : VL); c++)
                vi_store(panels + v * apart + (d / 4 + c) * 4 * IBID_KEY_PANEL,
                         vi_flip_signs(m[c]));
        }
    }
}

/* index holds the first key of the lane's vector; the lane gives the rest. */
static uint32_t ms_first(vi best, vi at, size_t n_keys, int32_t *top) {
    int32_t value[VL];
    uint32_t index[VL], first = UINT32_MAX;
    vi_store(value, best);
    vi_store(index, at);
    *top = INT32_MIN;
    for (uint32_t i = 0; i < VL; i++) {
        uint32_t j = index[i] + i;
        if (j >= n_keys) j = (uint32_t)n_keys - 1; /* a lane past the end holds the last key */
        if (value[i] > *top || (value[i] == *top && j < first)) {
            *top = value[i];
            first = j;
        }
    }
    return first;
}

static void simd_maxsim_i8(const int8_t *q, size_t n_q, const int8_t *k, size_t n_keys, size_t dim,
                           int32_t *best, uint32_t *arg) {
    if (dim % 32 || dim > MS_MAX_DIM || n_keys > INT32_MAX) {
        ibidi_kernels_reference.maxsim_i8(q, n_q, k, n_keys, dim, best, arg);
        return;
    }
    _Alignas(64) uint8_t panels[MS_KEYS * MS_MAX_DIM];
    ms_question a;
    for (size_t at = 0; at < n_q; at += MS_BATCH) {
        vi top[MS_BATCH], index[MS_BATCH];
        int32_t value;
        ms_ask(&a, q + at * dim, n_q - at < MS_BATCH ? n_q - at : MS_BATCH, dim);
        for (size_t i = 0; i < a.n; i++) {
            top[i] = vi_set1(INT32_MIN);
            index[i] = vi_set1(0);
        }
        for (size_t j0 = 0; j0 < n_keys; j0 += MS_KEYS) {
            ms_turn(panels, k, n_keys, dim, j0);
            if (arg)
                ms_indexed(panels, &a, j0, top, index);
            else
                ms_whole(panels, &a, top);
        }
        for (size_t i = 0; i < a.n; i++) {
            if (arg) arg[at + i] = ms_first(top[i], index[i], n_keys, &value);
            best[at + i] = vi_hmax(top[i]) - a.bias[i];
        }
    }
}
