/* Template: attention over q8_0 KV in integers, online softmax by tiles of 64 keys. Approximate.
 *
 * Scores. A query is rounded to int8 per 32 dimensions, once per call. A tile's keys are turned so
 * that a 32-bit lane holds four dimensions of one key: dot products of bytes then sum nothing
 * across lanes. They want one side unsigned: the query (q + 128), and start at -128 * sum(k) to
 * make up.
 *
 * Values. A row's weights e = 2^(score - the tile's best) are multiplied by the values' scales,
 * relative to the tile's largest one, before they are rounded: so the values' bytes are used as
 * stored, four tokens to a lane. Weights get 16 bits, in two planes of 8 that each meet the values
 * once: one plane alone would lose the rest of the tile that holds the first token, whose weight is
 * huge and whose values are tiny. Where the tile's best weight is at most 1 / AQ_SPREAD of all that
 * the row has seen so far, this tile included, one plane errs below what int8 values do, and the
 * second is left out.
 *
 * A tile whose best weight is below 1 / AQ_NOTHING of all that the row has seen changes nothing: a
 * third of what rows meet in 8,000 tokens, and about 1 / 1000 of what they should see there. All
 * counts for at most a tile of the best keys: else rows that look everywhere would stop looking.
 *
 * state.sum adds the weights before their rounding, which errs to both sides alike.
 *
 * As in simd_attn.h a row's result depends on that row, its visible count, the mask, the segment
 * and the state it came with only: rows share work, but each decides alone. */
#include "attention/kernels/internal.h"

#include <math.h>

enum {
    AQ_BATCH = 192, /* query rows that meet a tile while it is in cache */
    AQ_GROUPS = AT_MAX_DIM / IBIDI_BLOCK,
    AQ_SPREAD = 8,
    AQ_NOTHING_LOG2 = 14,
    AQ_NOTHING = 1 << AQ_NOTHING_LOG2,
    AQ_ONE = 255 << 8, /* a weight of 1 in both planes */
    AQ_STEP = 16,      /* keys: a tile that is not full is cut to a multiple */
    AQ_AHEAD = 1       /* tiles */
};

typedef struct aq_rows {
    const ibid_attn_args *a;
    size_t row0, n, dim, groups;
    _Alignas(64) uint8_t q[AQ_BATCH * AT_MAX_DIM];  /* [n, dim], + 128 */
    _Alignas(64) float scale[AQ_BATCH * AQ_GROUPS]; /* [n, groups]; times log2(e) */
    float top[AQ_BATCH];                            /* state.max * log2(e) */
    bool higher[AQ_BATCH];                          /* top has grown */
} aq_rows;

typedef struct aq_tile {
    _Alignas(64) int8_t keys[AT_MAX_DIM * AT_KEYS];    /* [dim / 4, AT_KEYS, 4] */
    _Alignas(64) int8_t values[AT_MAX_DIM * AT_KEYS];  /* [AT_KEYS / 4, dim, 4] */
    _Alignas(64) float k_scale[AQ_GROUPS * AT_KEYS];   /* [groups, AT_KEYS] */
    _Alignas(64) int32_t k_start[AQ_GROUPS * AT_KEYS]; /* [groups, AT_KEYS] */
    _Alignas(64) float v_scale[AQ_GROUPS * AT_KEYS];   /* AQ_ONE where it is v_max */
    float v_max[AQ_GROUPS];
    /* Of keys that do not lie together, or of fewer than AT_KEYS: nothing is read past a view's
     * end. */
    _Alignas(64) int8_t copy[2][AT_MAX_DIM * AT_KEYS];
    _Alignas(64) uint16_t copy_scale[2][AQ_GROUPS * AT_KEYS];
} aq_tile;

/* Rows with one plane of weights each, waiting to meet the values, AT_ROWS at a time. */
typedef struct aq_pass {
    size_t n, row[2 * AT_ROWS];
    size_t used; /* leading tokens of the tile that may weigh something */
    float keep[2 * AT_ROWS], scale[2 * AT_ROWS];
    _Alignas(64) uint8_t p[2 * AT_ROWS][AQ_GROUPS * AT_KEYS];
} aq_pass;

/* ---- Rows ---- */

/* The largest of n numbers and their opposites, somewhere in a vector. */
INLINE vf aq_top(const float *q, const size_t n) {
    vf max = v_abs(v_load(q));
    for (size_t i = VL; i < n; i += VL) max = v_max(max, v_abs(v_load(q + i)));
    return max;
}

/* n groups of `width` numbers of queries as bytes, + 128, and their scales times log2(e); VL groups
 * at a time so that their scales are computed together. */
INLINE void aq_pack_rows(const float *q, size_t n, const size_t width, uint8_t *bytes,
                         float *scale) {
    for (size_t i = 0; i < n; i += VL, q += VL * width) {
        _Alignas(64) float top[VL];
        size_t last = (n - i < VL ? n - i : VL) - 1;
        for (size_t j = 0; j < VL; j += 4) {
            vf m[4];
            for (size_t k = 0; k < 4; k++) {
                m[k] = aq_top(q + (j + k < last ? j + k : last) * width, width);
            }
            _mm_store_ps(top + j, v_max4(m[0], m[1], m[2], m[3]));
        }
        vf d = v_div(v_load(top), v_set1(127));
        v_store_n(scale + i, v_mul(d, v_set1(1.44269504f)), n - i);
        v_store(top, v_where_greater(d, v_zero(), v_div(v_set1(1), d), v_zero()));
        for (size_t j = 0; j <= last; j++) {
            vf inverse = v_set1(top[j]);
            int8_t *to = (int8_t *)bytes + (i + j) * width;
            for (size_t k = 0; k < width; k += VL) {
                vi_store_i8(to + k, vi_round(v_mul(v_load(q + j * width + k), inverse)));
            }
        }
    }
    for (size_t i = 0; i < n * width; i += VL * 4) {
        vi_store(bytes + i, vi_flip_signs(vi_load(bytes + i)));
    }
}

static void aq_begin(aq_rows *x, const ibid_attn_args *a, size_t row0, size_t n) {
    x->a = a;
    x->row0 = row0;
    x->n = n;
    x->dim = a->kv->head_dim;
    x->groups = x->dim / IBIDI_BLOCK;
    aq_pack_rows(a->q + row0 * x->dim, n * x->groups, IBIDI_BLOCK, x->q, x->scale);
    for (size_t r = 0; r < n; r++) {
        x->top[r] = a->state[row0 + r].max * 1.44269504f;
        x->higher[r] = false;
    }
}

static void aq_end(const aq_rows *x) {
    for (size_t r = 0; r < x->n; r++) {
        if (x->higher[r]) x->a->state[x->row0 + r].max = x->top[r] * 0.693147181f;
    }
}

/* ---- Tiles ---- */

/* What lies in the same place of a tile further on: few rows are bound by memory. */
INLINE void aq_fetch(const int8_t *p, size_t dim) {
    __builtin_prefetch((const void *)((uintptr_t)p + AQ_AHEAD * AT_KEYS * dim), 0, 1);
}

/* n keys [n, dim] to [dim / 4, n, 4]. */
INLINE void aq_turn_keys(int8_t *keys, const int8_t *k, const size_t n, const size_t dim) {
    for (size_t i0 = 0; i0 < n; i0 += VL) {
        for (size_t d = 0; d < dim; d += VL * 4) {
            bool half = dim - d < VL * 4;
            vi m[VL];
            for (size_t i = 0; i < VL; i++) {
                const int8_t *from = k + (i0 + i) * dim + d;
                aq_fetch(from, dim);
                m[i] = vi_load_row(from, half);
            }
            vi_transpose(m);
            int8_t *to = keys + (d / 4 * n + i0) * 4;
            for (size_t j = 0; j < VL / 2; j++) vi_store(to + j * n * 4, m[j]);
            if (half) break;
            for (size_t j = VL / 2; j < VL; j++) vi_store(to + j * n * 4, m[j]);
        }
    }
}

/* -128 times the sums of n turned keys' groups of `width` bytes: [groups, n]. */
INLINE void aq_sum_keys(int32_t *start, const int8_t *keys, const size_t n, const size_t groups,
                        const size_t width) {
    const vi ones = vi_set1(0x01010101);
    for (size_t g = 0; g < groups; g++, keys += width * n) {
        for (size_t i = 0; i < n; i += VL) {
            vi sum = vi_set1(0);
            for (size_t c = 0; c < width / 4; c++) {
                sum = q8_dp(sum, ones, vi_load(keys + (c * n + i) * 4));
            }
            vi_store(start + g * n + i, vi_sub(vi_set1(0), vi_sll(sum, 7)));
        }
    }
}

/* n values [n, dim] to [n / 4, dim, 4]. */
INLINE void aq_turn_values(int8_t *values, const int8_t *v, const size_t n, const size_t dim) {
    for (size_t i = 0; i < n; i += 4) {
        for (size_t d = 0; d < dim; d += VL * 4) {
            bool half = dim - d < VL * 4;
            vi m[4];
            for (size_t j = 0; j < 4; j++) {
                const int8_t *from = v + (i + j) * dim + d;
                aq_fetch(from, dim);
                m[j] = vi_load_row(from, half);
            }
            vi_quads(m);
            int8_t *to = values + i * dim + d * 4;
            vi_store(to, m[0]);
            vi_store(to + VL * 4, m[1]);
            if (half) break;
            vi_store(to + 2 * VL * 4, m[2]);
            vi_store(to + 3 * VL * 4, m[3]);
        }
    }
}

/* f16 [AT_KEYS, groups] to f32 [groups, AT_KEYS]. */
static void aq_turn_scales(const uint16_t *s, size_t groups, float *to) {
    _Alignas(64) float a[AQ_GROUPS * AT_KEYS], b[AQ_GROUPS * AT_KEYS];
    size_t n = groups * AT_KEYS;
    bool power = (groups & (groups - 1)) == 0;
    float *from = groups == 1 ? to : a, *other = b;
    for (size_t i = 0; i < n; i += VL) v_store(from + i, v_from_half(s + i));
    if (!power) {
        for (size_t i = 0; i < n; i++) to[i % groups * AT_KEYS + i / groups] = from[i];
        return;
    }
    for (size_t step = 1; step < groups; step *= 2) { /* evens to the front, odds behind them */
        float *into = 2 * step == groups ? to : other;
        for (size_t i = 0; i < n / 2; i += VL) {
            vf even, odd;
            v_unzip(v_load(from + 2 * i), v_load(from + 2 * i + VL), &even, &odd);
            v_store(into + i, even);
            v_store(into + n / 2 + i, odd);
        }
        other = from;
        from = into;
    }
}

static void aq_scale_values(aq_tile *t, size_t groups) {
    for (size_t g = 0; g < groups; g++) {
        float *s = t->v_scale + g * AT_KEYS;
        vf max = v_load(s);
        for (size_t i = VL; i < AT_KEYS; i += VL) max = v_max(max, v_load(s + i));
        t->v_max[g] = v_hmax(max);
        vf inverse = v_set1(t->v_max[g] > 0 ? AQ_ONE / t->v_max[g] : 0);
        for (size_t i = 0; i < AT_KEYS; i += VL) v_store(s + i, v_mul(v_load(s + i), inverse));
    }
}

/* The keys of a tile: up to AT_KEYS of the view's tokens that are not masked, in order. A mask so
 * costs nothing but the copy of what it parts. */
typedef struct aq_keys {
    size_t n, next; /* next: where the tile after this one begins to look */
    bool together;  /* tokens first .. first + n - 1; else those of at */
    uint32_t first, at[AT_KEYS];
} aq_keys;

static void aq_next_keys(const ibid_attn_args *a, aq_keys *s) {
    size_t n_tokens = a->kv->n_tokens, t = s->next;
    s->first = (uint32_t)t;
    s->together = t % 64 == 0 && (!a->masked || t >= n_tokens || !a->masked[t / 64]);
    if (s->together) {
        s->n = n_tokens - t < AT_KEYS ? n_tokens - t : AT_KEYS;
        s->next = t + s->n;
        return;
    }
    s->n = 0;
    while (t < n_tokens && s->n < AT_KEYS) {
        uint64_t seen = ~a->masked[t / 64] >> t % 64;
        size_t left = n_tokens - t < 64 - t % 64 ? n_tokens - t : 64 - t % 64, end = t + left;
        if (left < 64) seen &= (UINT64_C(1) << left) - 1;
        for (; seen && s->n < AT_KEYS; seen &= seen - 1) {
            s->at[s->n++] = (uint32_t)(t + (size_t)__builtin_ctzll(seen));
        }
        t = seen ? s->at[s->n - 1] + 1 : end;
    }
    s->next = t;
}

/* Which of the keys a row that sees [0, visible) may use. */
static uint64_t aq_bits(const aq_keys *s, size_t visible) {
    size_t n = s->n;
    if (s->together) {
        size_t see = visible > s->first ? visible - s->first : 0;
        if (see < n) n = see;
    } else if (s->at[n - 1] >= visible) {
        for (n = 0; s->at[n] < visible;) n++;
    }
    return n == 64 ? ~UINT64_C(0) : (UINT64_C(1) << n) - 1;
}

/* A copy of the keys' rows, and zeros up to a whole tile. */
INLINE const void *aq_gather(void *to, const void *from, const aq_keys *s, const size_t each) {
    uint8_t *row = to;
    for (size_t i = 0; i < s->n; i++, row += each) {
        size_t at = s->together ? s->first + i : s->at[i];
        memcpy(row, (const uint8_t *)from + at * each, each);
    }
    memset(row, 0, (AT_KEYS - s->n) * each);
    return to;
}

INLINE void aq_load_keys(aq_tile *t, const ibid_attn_args *a, const aq_keys *s, const size_t dim) {
    const ibid_kv_view *kv = a->kv;
    const size_t groups = dim / IBIDI_BLOCK;
    size_t token = a->kv_head * kv->n_tokens;
    const int8_t *k = (const int8_t *)kv->k + token * dim;
    const uint16_t *ks = kv->k_scale + token * groups;
    if (s->together && s->n == AT_KEYS) {
        k += s->first * dim, ks += s->first * groups;
    } else {
        k = aq_gather(t->copy[0], k, s, dim);
        ks = aq_gather(t->copy_scale[0], ks, s, groups * sizeof *ks);
    }
    aq_turn_keys(t->keys, k, AT_KEYS, dim);
    aq_sum_keys(t->k_start, t->keys, AT_KEYS, groups, IBIDI_BLOCK);
    aq_turn_scales(ks, groups, t->k_scale);
}

INLINE void aq_load_values(aq_tile *t, const ibid_attn_args *a, const aq_keys *s,
                           const size_t dim) {
    const ibid_kv_view *kv = a->kv;
    const size_t groups = dim / IBIDI_BLOCK;
    size_t token = a->kv_head * kv->n_tokens;
    const int8_t *v = (const int8_t *)kv->v + token * dim;
    const uint16_t *vs = kv->v_scale + token * groups;
    if (s->together && s->n == AT_KEYS) {
        v += s->first * dim, vs += s->first * groups;
    } else {
        v = aq_gather(t->copy[1], v, s, dim);
        vs = aq_gather(t->copy_scale[1], vs, s, groups * sizeof *vs);
    }
    aq_turn_values(t->values, v, AT_KEYS, dim);
    aq_turn_scales(vs, groups, t->v_scale);
    aq_scale_values(t, groups);
}

/* values: wanted too. */
__attribute__((noinline)) static void aq_load(aq_tile *t, const ibid_attn_args *a, const aq_keys *s,
                                              bool values) {
    switch (a->kv->head_dim) { /* the usual sizes, so that addresses are constants */
    case 64:
        aq_load_keys(t, a, s, 64);
        if (values) aq_load_values(t, a, s, 64);
        break;
    case 128:
        aq_load_keys(t, a, s, 128);
        if (values) aq_load_values(t, a, s, 128);
        break;
    default:
        aq_load_keys(t, a, s, a->kv->head_dim);
        if (values) aq_load_values(t, a, s, a->kv->head_dim);
        break;
    }
}

/* ---- Scores ---- */

/* Scores of N rows for V vectors of keys from `key` on, in units of log 2. */
INLINE void aq_scores(const int N, const int V, const aq_rows *x, const aq_tile *t,
                      const size_t *row, size_t key, float (*out)[AT_KEYS]) {
    const uint8_t *q[AT_ROWS];
    for (int i = 0; i < N; i++) q[i] = x->q + row[i] * x->dim;
    for (size_t g = 0; g < x->groups; g++) {
        vi sum[AT_ROWS][AT_VECS];
        for (int v = 0; v < V; v++) {
            vi start = vi_load(t->k_start + g * AT_KEYS + key + v * VL);
            for (int i = 0; i < N; i++) sum[i][v] = start;
        }
        const int8_t *keys = t->keys + (g * IBIDI_BLOCK / 4 * AT_KEYS + key) * 4;
#pragma GCC unroll 8
        for (size_t c = 0; c < IBIDI_BLOCK / 4; c++) {
            vi k[AT_VECS];
            for (int v = 0; v < V; v++) k[v] = vi_load(keys + (c * AT_KEYS + (size_t)(v * VL)) * 4);
            for (int i = 0; i < N; i++) {
                int32_t four;
                memcpy(&four, q[i] + g * IBIDI_BLOCK + 4 * c, 4);
                vi qv = vi_set1(four);
                for (int v = 0; v < V; v++) sum[i][v] = q8_dp(sum[i][v], qv, k[v]);
            }
        }
        vf ks[AT_VECS];
        for (int v = 0; v < V; v++) ks[v] = v_load(t->k_scale + g * AT_KEYS + key + v * VL);
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) {
            vf qs = v_set1(x->scale[row[i] * x->groups + g]);
#pragma GCC unroll 6
            for (int v = 0; v < V; v++) {
                vf s = v_mul(vi_to_float(sum[i][v]), ks[v]);
                float *to = out[i] + key + v * VL;
                v_store(to, g ? v_fma(s, qs, v_load(to)) : v_mul(s, qs));
            }
        }
    }
}

/* used: leading tokens of the tile that any of the rows sees. */
INLINE void aq_scores_used(const int N, const aq_rows *x, const aq_tile *t, const size_t *row,
                           size_t used, float (*out)[AT_KEYS]) {
    size_t key = 0;
    for (; key + AT_VECS * VL <= (used + AQ_STEP - 1) / AQ_STEP * AQ_STEP; key += AT_VECS * VL) {
        aq_scores(N, AT_VECS, x, t, row, key, out);
    }
    for (; key < used; key += AQ_STEP) aq_scores(N, AQ_STEP / VL, x, t, row, key, out);
}

static void aq_scores_any(size_t n, const aq_rows *x, const aq_tile *t, const size_t *row,
                          size_t used, float (*out)[AT_KEYS]) {
    switch (n) {
    case 1:
        aq_scores_used(1, x, t, row, used, out);
        break;
    case 2:
        aq_scores_used(2, x, t, row, used, out);
        break;
    case 3:
        aq_scores_used(3, x, t, row, used, out);
        break;
    case 4:
        aq_scores_used(4, x, t, row, used, out);
        break;
    case 5:
        aq_scores_used(5, x, t, row, used, out);
        break;
    default:
        aq_scores_used(AT_ROWS, x, t, row, used, out);
        break;
    }
}

/* ---- Weighted values ---- */

/* The pass's first N rows, V vectors of dimensions from col on, the tile's first TOKENS. */
INLINE void aq_values(const int N, const int V, const size_t TOKENS, const aq_pass *s,
                      const aq_rows *x, const aq_tile *t, size_t col) {
    enum { PER_GROUP = IBIDI_BLOCK / VL };
    vi sum[AT_ROWS][AT_VECS];
    for (int i = 0; i < N; i++) {
        for (int v = 0; v < V; v++) sum[i][v] = vi_set1(0);
    }
    const int8_t *values = t->values + col * 4;
    size_t group = col / IBIDI_BLOCK, ld = x->dim * 4;
    const uint8_t *p = s->p[0] + group * AT_KEYS;
    /* All of it unrolled: as a loop, compilers copy the sums on every round. */
#pragma GCC unroll 16
    for (size_t quad = 0; quad < TOKENS / 4; quad++, values += ld) {
        /* vi_pack_planes puts the quads of four vectors of weights in this order. */
        size_t at = quad / VL * VL + quad % (VL / 4) * 4 + quad % VL / (VL / 4);
        vi b[AT_VECS];
        for (int v = 0; v < V; v++) b[v] = vi_load(values + v * VL * 4);
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) {
            vi w = vi_set1(0);
            for (int v = 0; v < V; v++) {
                if (v % PER_GROUP == 0) {
                    int32_t four;
                    memcpy(&four, p + i * AQ_GROUPS * AT_KEYS + v / PER_GROUP * AT_KEYS + at * 4,
                           4);
                    w = vi_set1(four);
                }
                sum[i][v] = q8_dp(sum[i][v], w, b[v]);
            }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < N; i++) {
        float *acc = x->a->acc + (x->row0 + s->row[i]) * x->dim + col;
        vf keep = v_set1(s->keep[i]);
#pragma GCC unroll 6
        for (int v = 0; v < V; v++) {
            vf w = v_set1(s->scale[i] * t->v_max[group + (size_t)(v / PER_GROUP)]);
            vf old = v_mul(v_load(acc + v * VL), keep);
            v_store(acc + v * VL, v_fma(vi_to_float(sum[i][v]), w, old));
        }
    }
}

INLINE void aq_values_cols(const int N, const size_t TOKENS, const aq_pass *s, const aq_rows *x,
                           const aq_tile *t) {
    size_t col = 0;
    for (; col + AT_VECS * VL <= x->dim; col += AT_VECS * VL) {
        aq_values(N, AT_VECS, TOKENS, s, x, t, col);
    }
    if (col < x->dim) aq_values(N, 32 / VL < AT_VECS ? 32 / VL : AT_VECS, TOKENS, s, x, t, col);
}

INLINE void aq_values_used(const int N, const aq_pass *s, const aq_rows *x, const aq_tile *t) {
    if (s->used > 48)
        aq_values_cols(N, 64, s, x, t);
    else if (s->used > 32)
        aq_values_cols(N, 48, s, x, t);
    else if (s->used > 16)
        aq_values_cols(N, 32, s, x, t);
    else
        aq_values_cols(N, 16, s, x, t);
}

/* The first AT_ROWS rows, or all there are, meet the values. */
static void aq_flush(aq_pass *s, const aq_rows *x, const aq_tile *t) {
    switch (s->n) {
    case 0:
        break;
    case 1:
        aq_values_used(1, s, x, t);
        break;
    case 2:
        aq_values_used(2, s, x, t);
        break;
    case 3:
        aq_values_used(3, s, x, t);
        break;
    case 4:
        aq_values_used(4, s, x, t);
        break;
    case 5:
        aq_values_used(5, s, x, t);
        break;
    default:
        aq_values_used(AT_ROWS, s, x, t);
        break;
    }
    s->n = s->n > AT_ROWS ? s->n - AT_ROWS : 0;
    for (size_t i = 0; i < s->n; i++) {
        s->row[i] = s->row[AT_ROWS + i];
        s->keep[i] = s->keep[AT_ROWS + i];
        s->scale[i] = s->scale[AT_ROWS + i];
        for (size_t b = 0; b < x->groups * AT_KEYS; b += VL * 4) {
            vi_store(s->p[i] + b, vi_load(s->p[AT_ROWS + i] + b));
        }
    }
}

/* ---- Softmax ---- */

/* Every step is taken for all rows of a group before the next: so that sums across lanes are of
 * four rows at once, and nothing waits for a branch that depends on them. */
enum { AQ_VECS = AT_KEYS / VL, AQ_FOURS = (AT_ROWS + 3) / 4 * 4 };
_Static_assert((int)AQ_FOURS <= (int)VL, "a group's rows fill part of a vector");

typedef struct aq_group {
    size_t n, row[AT_ROWS];
    uint32_t live;                          /* a bit for each row that the tile changes */
    uint64_t bits[AT_ROWS];                 /* keys of the tile the row may use */
    _Alignas(64) float s[AT_ROWS][AT_KEYS]; /* scores, then weights */
    _Alignas(64) float wide[AQ_FOURS][VL];  /* what is to be summed up over a row's lanes */
    _Alignas(64) float top[VL], old[VL], seen[VL], keep[VL], weight[VL], sum[VL];
} aq_group;

/* The rows' best scores, and what the rows' sums (keep) and this tile's (weight) are worth from now
 * on, as shares of the better of both bests. */
INLINE void aq_tops(const size_t VECS, aq_group *g, const aq_rows *x) {
    for (size_t i = 0; i < g->n; i++) {
        vf max = v_set1(-INFINITY);
        for (size_t j = 0; j < VECS; j++) {
            vf s = v_load(g->s[i] + j * VL);
            if (g->bits[i] != ~UINT64_C(0)) {
                s = v_pick((uint32_t)(g->bits[i] >> (j * VL)), s, v_set1(-INFINITY));
                v_store(g->s[i] + j * VL, s);
            }
            max = v_max(max, s);
        }
        v_store(g->wide[i], max);
        g->old[i] = x->top[g->row[i]];
        g->seen[i] = x->a->state[x->row0 + g->row[i]].sum;
    }
    for (size_t i = 0; i < g->n; i += 4) {
        _mm_store_ps(g->top + i, v_max4(v_load(g->wide[i]), v_load(g->wide[i + 1]),
                                        v_load(g->wide[i + 2]), v_load(g->wide[i + 3])));
    }
    vf top = v_load(g->top), old = v_load(g->old), seen = v_min(v_load(g->seen), v_set1(AT_KEYS));
    vf drop = v_exp(v_mul(v_sub(v_min(top, old), v_max(top, old)), v_set1(0.693147181f)));
    v_store(g->keep, v_where_greater(top, old, drop, v_set1(1)));
    vf weight = v_where_greater(top, old, v_set1(1), drop);
    v_store(g->weight, weight);
    g->live = v_greater(top, v_set1(-INFINITY)) & ((1u << g->n) - 1) &
              ~v_greater(seen, v_mul(weight, v_set1(AQ_NOTHING)));
}

/* Scores to weights, as shares of the tile's best, and their sums. */
INLINE void aq_weigh(const size_t VECS, aq_group *g) {
    for (uint32_t live = g->live; live; live &= live - 1) {
        size_t i = (size_t)__builtin_ctz(live);
        vf sum = v_zero(), top = v_set1(g->top[i]);
        for (size_t j = 0; j < VECS; j++) {
            vf e = v_exp2_low(v_sub(v_load(g->s[i] + j * VL), top));
            v_store(g->s[i] + j * VL, e);
            sum = v_add(sum, e);
        }
        v_store(g->wide[i], sum);
    }
    for (size_t i = 0; i < g->n; i += 4) {
        _mm_store_ps(g->sum + i, v_sum4(v_load(g->wide[i]), v_load(g->wide[i + 1]),
                                        v_load(g->wide[i + 2]), v_load(g->wide[i + 3])));
    }
}

/* A row's weights to two planes of bytes. half: to the nearest in the high one alone. */
INLINE void aq_round(const size_t VECS, const float *e, const aq_tile *t, size_t groups,
                     uint16_t half, uint8_t *high, uint8_t *low) {
    for (size_t g = 0; g < groups; g++) {
        for (size_t b = 0; b < AQ_VECS; b += 4) {
            vi n[4];
            size_t at = g * AT_KEYS + b * VL;
            for (size_t j = 0; j < 4; j++) {
                n[j] = vi_set1(0);
                if (b + j >= VECS) continue;
                n[j] = vi_round(v_mul(v_load(e + (b + j) * VL), v_load(t->v_scale + at + j * VL)));
            }
            vi_split_planes(vi_pack_half(n[0], n[1]), vi_pack_half(n[2], n[3]), half, high + at,
                            low + at);
        }
    }
}

/* What a group's rows see of the first VECS vectors of a tile's keys, into their states; what they
 * weigh, to the passes. */
INLINE void aq_attend_keys(const size_t VECS, aq_group *g, aq_rows *x, const aq_tile *t,
                           aq_pass *high, aq_pass *low) {
    aq_tops(VECS, g, x);
    aq_weigh(VECS, g);
    for (uint32_t live = g->live; live; live &= live - 1) {
        size_t i = (size_t)__builtin_ctz(live), row = g->row[i], h = high->n, l = low->n;
        float w = g->weight[i];
        x->higher[row] |= g->top[i] > g->old[i];
        x->top[row] = g->top[i] > g->old[i] ? g->top[i] : g->old[i];
        ibid_attn_state *st = &x->a->state[x->row0 + row];
        st->sum = st->sum * g->keep[i] + w * g->sum[i];
        bool one = st->sum >= AQ_SPREAD * w;
        high->row[h] = low->row[l] = row;
        high->keep[h] = g->keep[i];
        high->scale[h] = w * (256.0f / AQ_ONE);
        low->keep[l] = 1;
        low->scale[l] = w * (1.0f / AQ_ONE);
        aq_round(VECS, g->s[i], t, x->groups, one ? 128 : 0, high->p[h], low->p[l]);
        high->n = h + 1;
        low->n = l + !one;
    }
}

static void aq_attend(aq_group *g, aq_rows *x, const aq_tile *t, aq_pass *high, aq_pass *low) {
    uint64_t any = 0;
    if (g->n == 0) return;
    for (size_t i = 0; i < g->n; i++) any |= g->bits[i];
    size_t used = 64 - (size_t)__builtin_clzll(any);
    aq_scores_any(g->n, x, t, g->row, used, g->s);
    if (used > 48)
        aq_attend_keys(64 / VL, g, x, t, high, low);
    else if (used > 32)
        aq_attend_keys(48 / VL, g, x, t, high, low);
    else if (used > 16)
        aq_attend_keys(32 / VL, g, x, t, high, low);
    else
        aq_attend_keys(16 / VL, g, x, t, high, low);
    g->n = 0;
    if (used > high->used) high->used = used;
    if (used > low->used) low->used = used;
    if (high->n >= AT_ROWS) aq_flush(high, x, t);
    if (low->n < AT_ROWS) return;
    aq_flush(high, x, t); /* a row's high plane comes first: it scales acc */
    aq_flush(low, x, t);
}

/* ---- Mass ---- */

/* What the rows of a group give the tile's keys, lse given in units of log 2. */
static void aq_give(aq_group *g, const aq_rows *x, const aq_tile *t, const aq_keys *keys,
                    const float *lse, float *mass) {
    uint64_t any = 0;
    if (g->n == 0) return;
    for (size_t i = 0; i < g->n; i++) any |= g->bits[i];
    aq_scores_any(g->n, x, t, g->row, 64 - (size_t)__builtin_clzll(any), g->s);
    for (size_t i = 0; i < g->n; i++) {
        vf shift = v_set1(lse[g->row[i]]);
        _Alignas(64) float e[AT_KEYS];
        for (size_t j = 0; j < AQ_VECS; j++) {
            vf s = v_min(v_sub(v_load(g->s[i] + j * VL), shift), v_zero());
            s = v_pick((uint32_t)(g->bits[i] >> (j * VL)), s, v_set1(-INFINITY));
            v_store(e + j * VL, v_exp2_low(s));
        }
        if (keys->together) {
            float *to = mass + keys->first;
            for (size_t j = 0; j < keys->n; j += VL)
                v_store_n(to + j, v_add(v_load_n(to + j, keys->n - j), v_load(e + j)), keys->n - j);
        } else {
            for (size_t j = 0; j < keys->n; j++) mass[keys->at[j]] += e[j];
        }
    }
    g->n = 0;
}

/* ---- All tiles ---- */

/* lse NULL: attention; else mass, lse in units of log 2. */
INLINE void aq_batch(aq_rows *x, const ibid_attn_args *a, size_t row0, aq_tile *t, const float *lse,
                     float *mass) {
    aq_group g = {.n = 0};
    aq_pass high, low;
    high.n = low.n = high.used = low.used = 0;
    for (aq_keys keys = {.next = 0}; aq_next_keys(a, &keys), keys.n;) {
        bool loaded = false;
        for (size_t r = 0; r < x->n; r++) {
            uint64_t bits = aq_bits(&keys, a->visible[row0 + r]);
            if (!bits) continue;
            if (!loaded) aq_load(t, a, &keys, !lse);
            loaded = true;
            g.row[g.n] = r;
            g.bits[g.n++] = bits;
            if (g.n < AT_ROWS) continue;
            if (lse)
                aq_give(&g, x, t, &keys, lse, mass);
            else
                aq_attend(&g, x, t, &high, &low);
        }
        if (lse) {
            aq_give(&g, x, t, &keys, lse, mass);
            continue;
        }
        aq_attend(&g, x, t, &high, &low);
        aq_flush(&high, x, t);
        aq_flush(&low, x, t);
        high.used = low.used = 0;
    }
}

static void simd_attn_mass_i8(const ibid_attn_args *a, const float *lse, float *mass) {
    if (!attn_fits(a) || a->kv->type != IBID_KV_Q8_0) {
        simd_attn_mass(a, lse, mass);
        return;
    }
    aq_rows x;
    aq_tile t;
    float log2_of[AQ_BATCH];
    x.dim = a->kv->head_dim;
    x.groups = x.dim / IBIDI_BLOCK;
    for (size_t row0 = 0; row0 < a->n_rows; row0 += AQ_BATCH) {
        x.n = a->n_rows - row0 < AQ_BATCH ? a->n_rows - row0 : AQ_BATCH;
        aq_pack_rows(a->q + row0 * x.dim, x.n * x.groups, IBIDI_BLOCK, x.q, x.scale);
        for (size_t r = 0; r < x.n; r++) log2_of[r] = lse[row0 + r] * 1.44269504f;
        aq_batch(&x, a, row0, &t, log2_of, mass);
    }
}

/* The first tile, while the queries are rounded. */
static void aq_fetch_first(const ibid_attn_args *a) {
    const ibid_kv_view *kv = a->kv;
    size_t n = kv->n_tokens < AT_KEYS ? kv->n_tokens : AT_KEYS, dim = kv->head_dim;
    size_t token = a->kv_head * kv->n_tokens;
    for (size_t i = 0; i < n * dim; i += 64) {
        __builtin_prefetch((const int8_t *)kv->k + token * dim + i, 0, 1);
        __builtin_prefetch((const int8_t *)kv->v + token * dim + i, 0, 1);
    }
}

static void simd_attn_i8(const ibid_attn_args *a) {
    if (!attn_fits(a) || a->kv->type != IBID_KV_Q8_0) {
        simd_attn(a);
        return;
    }
    aq_rows x;
    aq_tile t;
    aq_fetch_first(a);
    for (size_t r = 0; r < a->n_rows; r += AQ_BATCH) {
        aq_begin(&x, a, r, a->n_rows - r < AQ_BATCH ? a->n_rows - r : AQ_BATCH);
        aq_batch(&x, a, r, &t, NULL, NULL);
        aq_end(&x);
    }
}
