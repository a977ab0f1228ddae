/* Template: attention over q8_0 KV in integers, online softmax by tiles of 64 keys. Approximate.
 *
 * Scores. A query is rounded to int8 per 32 dimensions, once per call. A tile's keys are turned so
 * that a 32-bit lane holds four dimensions of one key, as unsigned bytes (k + 128): dot products of
 * bytes then sum nothing across lanes, and start at -128 * sum(q) to make up for the offset.
 *
 * Values. A row's weights e = 2^(score - the tile's best) are multiplied by the values' scales,
 * relative to the tile's largest one, before they are rounded: so the values' bytes are used as
 * stored, four tokens to a lane. Weights get 16 bits, in two planes of 8 that each meet the values
 * once: one plane alone would lose the rest of the tile that holds the first token, whose weight is
 * huge and whose values are tiny. Where the tile's best weight is at most 1 / AQ_SPREAD of all that
 * the row has seen so far, this tile included, one plane errs below what int8 values do, and the
 * second is left out. Tiles whose best
 * weight is below 2^-AQ_NOTHING of what the row has seen change nothing.
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
    AQ_NOTHING = 24,
    AQ_STEP = 16, /* keys: a tile that is not full is cut to a multiple */
    AQ_AHEAD = 1  /* tiles */
};

typedef struct aq_rows {
    const ibid_attn_args *a;
    size_t row0, n, dim, groups;
    _Alignas(64) int8_t q[AQ_BATCH * AT_MAX_DIM]; /* [n, dim] */
    float scale[AQ_BATCH * AQ_GROUPS];            /* [n, groups]; times log2(e) */
    int32_t start[AQ_BATCH * AQ_GROUPS];
    float top[AQ_BATCH];   /* state.max * log2(e) */
    bool higher[AQ_BATCH]; /* top has grown */
} aq_rows;

typedef struct aq_tile {
    _Alignas(64) uint8_t keys[AT_MAX_DIM * AT_KEYS];    /* [dim / 4, AT_KEYS, 4], + 128 */
    _Alignas(64) int8_t values[AT_MAX_DIM * AT_KEYS];   /* [AT_KEYS / 4, dim, 4] */
    _Alignas(64) float k_scale[AQ_GROUPS * AT_KEYS];    /* [groups, AT_KEYS] */
    _Alignas(64) float v_scale[2][AQ_GROUPS * AT_KEYS]; /* 255 of v_max's 1, and 65535 */
    float v_max[AQ_GROUPS];
    /* Of keys that do not lie together, or of fewer than AT_KEYS: nothing is read past a view's
     * end. */
    _Alignas(64) int8_t copy[2][AT_MAX_DIM * AT_KEYS];
    _Alignas(64) uint16_t copy_scale[2][AQ_GROUPS * AT_KEYS];
} aq_tile;

/* Up to AT_ROWS rows with one plane of weights each, waiting to meet the values. */
typedef struct aq_pass {
    size_t n, row[AT_ROWS], used; /* used: leading tokens of the tile that may weigh something */
    float keep[AT_ROWS], scale[AT_ROWS];
    _Alignas(64) uint8_t p[AT_ROWS][AQ_GROUPS * AT_KEYS];
} aq_pass;

/* ---- Rows ---- */

static void aq_pack_row(aq_rows *x, size_t r) {
    const float *q = x->a->q + (x->row0 + r) * x->dim;
    for (size_t g = 0; g < x->groups; g++) {
        vf v[IBIDI_BLOCK / VL], max = v_zero();
        for (size_t i = 0; i < IBIDI_BLOCK / VL; i++) {
            v[i] = v_load(q + g * IBIDI_BLOCK + i * VL);
            max = v_max(max, v_abs(v[i]));
        }
        float d = v_hmax(max) / 127;
        vf inverse = v_set1(d > 0 ? 1 / d : 0);
        vi sum = vi_set1(0);
        for (size_t i = 0; i < IBIDI_BLOCK / VL; i++) {
            vi n = vi_round(v_mul(v[i], inverse));
            vi_store_i8(x->q + r * x->dim + g * IBIDI_BLOCK + i * VL, n);
            sum = vi_add(sum, n);
        }
        x->scale[r * x->groups + g] = d * 1.44269504f;
        x->start[r * x->groups + g] = -128 * vi_hsum(sum);
    }
}

static void aq_begin(aq_rows *x, const ibid_attn_args *a, size_t row0, size_t n) {
    x->a = a;
    x->row0 = row0;
    x->n = n;
    x->dim = a->kv->head_dim;
    x->groups = x->dim / IBIDI_BLOCK;
    for (size_t r = 0; r < n; r++) {
        aq_pack_row(x, r);
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

INLINE void aq_turn_keys(aq_tile *t, const int8_t *k, const size_t dim) {
    for (size_t i0 = 0; i0 < AT_KEYS; i0 += VL) {
        for (size_t d = 0; d < dim; d += VL * 4) {
            bool half = dim - d < VL * 4;
            vi m[VL];
            for (size_t i = 0; i < VL; i++) {
                const int8_t *from = k + (i0 + i) * dim + d;
                aq_fetch(from, dim);
                m[i] = vi_flip_signs(vi_load_row(from, half));
            }
            vi_transpose(m);
            uint8_t *to = t->keys + (d / 4 * AT_KEYS + i0) * 4;
            for (size_t j = 0; j < VL / 2; j++) vi_store(to + j * AT_KEYS * 4, m[j]);
            if (half) break;
            for (size_t j = VL / 2; j < VL; j++) vi_store(to + j * AT_KEYS * 4, m[j]);
        }
    }
}

INLINE void aq_turn_values(aq_tile *t, const int8_t *v, const size_t dim) {
    for (size_t i = 0; i < AT_KEYS; i += 4) {
        for (size_t d = 0; d < dim; d += VL * 4) {
            bool half = dim - d < VL * 4;
            vi m[4];
            for (size_t j = 0; j < 4; j++) {
                const int8_t *from = v + (i + j) * dim + d;
                aq_fetch(from, dim);
                m[j] = vi_load_row(from, half);
            }
            vi_quads(m);
            int8_t *to = t->values + i * dim + d * 4;
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
        float *s = t->v_scale[0] + g * AT_KEYS, *fine = t->v_scale[1] + g * AT_KEYS;
        vf max = v_load(s);
        for (size_t i = VL; i < AT_KEYS; i += VL) max = v_max(max, v_load(s + i));
        t->v_max[g] = v_hmax(max);
        vf inverse = v_set1(t->v_max[g] > 0 ? 255 / t->v_max[g] : 0);
        for (size_t i = 0; i < AT_KEYS; i += VL) {
            vf one = v_mul(v_load(s + i), inverse);
            v_store(s + i, one);
            v_store(fine + i, v_mul(one, v_set1(257)));
        }
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

INLINE void aq_load_dim(aq_tile *t, const ibid_attn_args *a, const aq_keys *s, const size_t dim) {
    const ibid_kv_view *kv = a->kv;
    const size_t groups = dim / IBIDI_BLOCK;
    size_t token = a->kv_head * kv->n_tokens;
    const int8_t *k = (const int8_t *)kv->k + token * dim, *v = (const int8_t *)kv->v + token * dim;
    const uint16_t *ks = kv->k_scale + token * groups, *vs = kv->v_scale + token * groups;
    if (s->together && s->n == AT_KEYS) {
        size_t at = s->first;
        k += at * dim, v += at * dim, ks += at * groups, vs += at * groups;
    } else {
        k = aq_gather(t->copy[0], k, s, dim);
        v = aq_gather(t->copy[1], v, s, dim);
        ks = aq_gather(t->copy_scale[0], ks, s, groups * sizeof *ks);
        vs = aq_gather(t->copy_scale[1], vs, s, groups * sizeof *vs);
    }
    aq_turn_keys(t, k, dim);
    aq_turn_values(t, v, dim);
    aq_turn_scales(ks, groups, t->k_scale);
    aq_turn_scales(vs, groups, t->v_scale[0]);
    aq_scale_values(t, groups);
}

__attribute__((noinline)) static void aq_load(aq_tile *t, const ibid_attn_args *a,
                                              const aq_keys *s) {
    switch (a->kv->head_dim) { /* the usual sizes, so that addresses are constants */
    case 64:
        aq_load_dim(t, a, s, 64);
        break;
    case 128:
        aq_load_dim(t, a, s, 128);
        break;
    default:
        aq_load_dim(t, a, s, a->kv->head_dim);
        break;
    }
}

/* ---- Scores ---- */

/* Scores of N rows for V vectors of keys from `key` on, in units of log 2. */
INLINE void aq_scores(const int N, const int V, const aq_rows *x, const aq_tile *t,
                      const size_t *row, size_t key, float (*out)[AT_KEYS]) {
    const int8_t *q[AT_ROWS];
    for (int i = 0; i < N; i++) q[i] = x->q + row[i] * x->dim;
    for (size_t g = 0; g < x->groups; g++) {
        vi sum[AT_ROWS][AT_VECS];
        for (int i = 0; i < N; i++) {
            vi start = vi_set1(x->start[row[i] * x->groups + g]);
            for (int v = 0; v < V; v++) sum[i][v] = start;
        }
        const uint8_t *keys = t->keys + (g * IBIDI_BLOCK / 4 * AT_KEYS + key) * 4;
#pragma GCC unroll 8
        for (size_t c = 0; c < IBIDI_BLOCK / 4; c++) {
            vi k[AT_VECS];
            for (int v = 0; v < V; v++) k[v] = vi_load(keys + (c * AT_KEYS + (size_t)(v * VL)) * 4);
            for (int i = 0; i < N; i++) {
                int32_t four;
                memcpy(&four, q[i] + g * IBIDI_BLOCK + 4 * c, 4);
                vi qv = vi_set1(four);
                for (int v = 0; v < V; v++) sum[i][v] = q8_dp(sum[i][v], k[v], qv);
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

/* N rows, V vectors of dimensions from col on, the tile's first TOKENS. */
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
        /* vi_pack_bytes puts the quads of four vectors of weights in this order. */
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
    s->n = s->used = 0;
}

/* ---- Softmax ---- */

enum { AQ_VECS = AT_KEYS / VL };

typedef struct aq_group {
    size_t n, row[AT_ROWS];
    uint64_t bits[AT_ROWS]; /* keys of the tile the row may use */
    _Alignas(64) float s[AT_ROWS][AT_KEYS];
} aq_group;

/* Reserves a place for a row. */
static size_t aq_place(aq_pass *s, const aq_rows *x, const aq_tile *t, size_t row, size_t used) {
    if (s->n == AT_ROWS) aq_flush(s, x, t);
    s->row[s->n] = row;
    if (used > s->used) s->used = used;
    return s->n++;
}

/* Weights e of a row to bytes: one plane, or two for 16 bits. */
INLINE void aq_round(const vf e[AQ_VECS], const aq_tile *t, size_t groups, uint8_t *high,
                     uint8_t *low) {
    const float *scale = t->v_scale[low != NULL];
    for (size_t g = 0; g < groups; g++) {
        for (size_t b = 0; b < AQ_VECS; b += 4) {
            vi n[4];
            size_t at = g * AT_KEYS + b * VL;
            for (size_t j = 0; j < 4; j++) {
                n[j] = vi_round(v_mul(e[b + j], v_load(scale + at + j * VL)));
            }
            if (low)
                vi_pack_halves(n, high + at, low + at);
            else
                vi_pack_bytes(n, high + at);
        }
    }
}

/* What a group's rows see of the first VECS vectors of a tile's keys, into their states; what they
 * weigh, to the passes. */
INLINE void aq_attend_keys(const size_t VECS, size_t used, aq_group *g, aq_rows *x,
                           const aq_tile *t, aq_pass *high, aq_pass *low) {
    _Alignas(64) float top[16], drop[16];
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
        top[i] = v_hmax(max);
        drop[i] = -fabsf(top[i] - x->top[g->row[i]]);
    }
    for (size_t i = g->n; i < 16; i++) drop[i] = 0;
    for (size_t i = 0; i < g->n; i += VL) {
        v_store(drop + i, v_exp(v_mul(v_load(drop + i), v_set1(0.693147181f))));
    }

    for (size_t i = 0; i < g->n; i++) {
        size_t row = g->row[i];
        float old = x->top[row];
        if (!(top[i] > -INFINITY) || top[i] < old - AQ_NOTHING) continue;
        vf e[AQ_VECS], sum = v_zero();
        for (size_t j = 0; j < AQ_VECS; j++) {
            e[j] = v_zero();
            if (j >= VECS) continue;
            e[j] = v_exp2_low(v_sub(v_load(g->s[i] + j * VL), v_set1(top[i])));
            sum = v_add(sum, e[j]);
        }
        float total = v_hsum(sum), keep = 1, w = drop[i];
        if (top[i] > old) {
            keep = drop[i];
            w = 1;
            x->top[row] = top[i];
            x->higher[row] = true;
        }
        ibid_attn_state *st = &x->a->state[x->row0 + row];
        st->sum = st->sum * keep + w * total;
        bool one = st->sum >= AQ_SPREAD * w;
        if (!one && low->n == AT_ROWS) { /* a row's high plane must come first: it scales acc */
            aq_flush(high, x, t);
            aq_flush(low, x, t);
        }
        size_t h = aq_place(high, x, t, row, used);
        high->keep[h] = keep;
        high->scale[h] = w * (one ? 1.0f / 255 : 256.0f / 65535);
        if (one) {
            aq_round(e, t, x->groups, high->p[h], NULL);
            continue;
        }
        size_t l = aq_place(low, x, t, row, used);
        low->keep[l] = 1;
        low->scale[l] = w * (1.0f / 65535);
        aq_round(e, t, x->groups, high->p[h], low->p[l]);
    }
}

static void aq_attend(aq_group *g, aq_rows *x, const aq_tile *t, aq_pass *high, aq_pass *low) {
    uint64_t any = 0;
    if (g->n == 0) return;
    for (size_t i = 0; i < g->n; i++) any |= g->bits[i];
    size_t used = 64 - (size_t)__builtin_clzll(any);
    aq_scores_any(g->n, x, t, g->row, used, g->s);
    if (used > 48)
        aq_attend_keys(64 / VL, used, g, x, t, high, low);
    else if (used > 32)
        aq_attend_keys(48 / VL, used, g, x, t, high, low);
    else if (used > 16)
        aq_attend_keys(32 / VL, used, g, x, t, high, low);
    else
        aq_attend_keys(16 / VL, used, g, x, t, high, low);
    g->n = 0;
}

static void aq_batch(aq_rows *x, aq_tile *t) {
    const ibid_attn_args *a = x->a;
    aq_group g;
    aq_pass high, low;
    g.n = high.n = low.n = high.used = low.used = 0;
    for (aq_keys keys = {.next = 0}; aq_next_keys(a, &keys), keys.n;) {
        bool loaded = false;
        for (size_t r = 0; r < x->n; r++) {
            uint64_t bits = aq_bits(&keys, a->visible[x->row0 + r]);
            if (!bits) continue;
            if (!loaded) aq_load(t, a, &keys);
            loaded = true;
            g.row[g.n] = r;
            g.bits[g.n++] = bits;
            if (g.n == AT_ROWS) aq_attend(&g, x, t, &high, &low);
        }
        aq_attend(&g, x, t, &high, &low);
        aq_flush(&high, x, t);
        aq_flush(&low, x, t);
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
        aq_batch(&x, &t);
        aq_end(&x);
    }
}
