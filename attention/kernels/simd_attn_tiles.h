/* Template: attention of many rows over KV in tiles (kernels.h, kv_tile_pack), online softmax by
 * tiles of IBID_KV_TILE keys. Approximate as attn_i8 is (simd_attn_q8.h says how weights are
 * rounded and what is left out); what differs is that nothing is turned here, that a key, a value
 * and a query have one scale per 64 dimensions, and that a tile is twice as long: what is done once
 * per row, tile and group costs a quarter.
 *
 * A row that sees a whole tile takes its values' scales relative to the tile's largest; one that
 * sees part of it, relative to the largest it sees. So a row's result depends on that row and on
 * what it sees, not on tokens behind it, nor on where a context was cut. */
#include "attention/kernels/internal.h"

#include <float.h>
#include <math.h>

enum {
    TL_KEYS = IBID_KV_TILE,
    TL_WIDTH = 64, /* dimensions that share a scale */
    TL_GROUPS = AT_MAX_DIM / TL_WIDTH,
    TL_VECS = TL_KEYS / VL
};

typedef struct tl_tile {
    int8_t *keys;     /* [dim / 4, TL_KEYS, 4] */
    int8_t *values;   /* [TL_KEYS / 4, dim, 4] */
    float *k_scale;   /* [groups, TL_KEYS] */
    int32_t *k_start; /* [groups, TL_KEYS]: -128 times the sum of a key's bytes */
    float *v_scale;   /* [groups, TL_KEYS] */
    float *v_part;    /* [groups, TL_KEYS]: v_scale, AQ_ONE where it is v_max */
    float *v_max;     /* [groups] */
} tl_tile;

static size_t simd_kv_tile_bytes(size_t dim) {
    size_t groups = dim / TL_WIDTH;
    return 2 * dim * TL_KEYS + 4 * groups * TL_KEYS * sizeof(float) + 64;
}

INLINE tl_tile tl_at(const void *tiles, size_t i, size_t dim) {
    size_t n = dim / TL_WIDTH * TL_KEYS;
    tl_tile t = {.keys = (int8_t *)(uintptr_t)tiles + i * simd_kv_tile_bytes(dim)};
    t.values = t.keys + dim * TL_KEYS;
    t.k_scale = (float *)(void *)(t.values + dim * TL_KEYS);
    t.k_start = (int32_t *)(void *)(t.k_scale + n);
    t.v_scale = (float *)(void *)(t.k_start + n);
    t.v_part = t.v_scale + n;
    t.v_max = t.v_part + n;
    return t;
}

/* ---- Packing ---- */

/* n rows of `groups` times TL_WIDTH numbers as bytes, zeros behind them, and their scales [groups,
 * TL_KEYS]; four rows at a time so that no sum over lanes is waited for. */
static void tl_round(const float *x, size_t n, size_t groups, int8_t *to, float *scale) {
    const size_t dim = groups * TL_WIDTH;
    _Alignas(64) float inverse[TL_KEYS];
    for (size_t g = 0; g < groups; g++, scale += TL_KEYS) {
        const float *from = x + g * TL_WIDTH;
        for (size_t i = 0; i < TL_KEYS; i += 4) {
            vf m[4];
            for (size_t j = 0; j < 4; j++)
                m[j] = i + j < n ? aq_top(from + (i + j) * dim, TL_WIDTH) : v_zero();
            _mm_store_ps(scale + i, v_max4(m[0], m[1], m[2], m[3]));
        }
        for (size_t i = 0; i < TL_KEYS; i += VL) { /* nothing is kept of what has no inverse */
            vf d = v_div(v_load(scale + i), v_set1(127));
            d = v_where_greater(d, v_set1(FLT_MIN), d, v_zero());
            v_store(scale + i, d);
            v_store(inverse + i, v_where_greater(d, v_zero(), v_div(v_set1(1), d), v_zero()));
        }
        for (size_t i = 0; i < n; i++) {
            const float *row = from + i * dim;
            for (size_t d = 0; d < TL_WIDTH; d += VL) {
                vi q = vi_round(v_mul(v_load(row + d), v_set1(inverse[i])));
                vi_store_i8(to + i * dim + g * TL_WIDTH + d, q);
            }
        }
    }
    memset(to + n * dim, 0, (TL_KEYS - n) * dim);
}

/* The scales of a row's values as shares of the largest of n, AQ_ONE at most; returns that. What is
 * behind them counts for nothing. */
INLINE float tl_parts(const float *scale, size_t n, float *part) {
    vf max = v_zero();
    for (size_t i = 0; i < n; i += VL) max = v_max(max, v_load_n(scale + i, n - i));
    float top = v_hmax(max);
    vf inverse = v_set1(top > 0 ? AQ_ONE / top : 0);
    for (size_t i = 0; i < TL_KEYS; i += VL) {
        v_store(part + i, i < n ? v_mul(v_load_n(scale + i, n - i), inverse) : v_zero());
    }
    return top;
}

static void simd_kv_tile_pack(const float *k, const float *v, size_t n, size_t dim, void *tile) {
    _Alignas(64) int8_t rows[2][TL_KEYS * AT_MAX_DIM];
    const size_t groups = dim / TL_WIDTH;
    tl_tile t = tl_at(tile, 0, dim);
    tl_round(k, n, groups, rows[0], t.k_scale);
    tl_round(v, n, groups, rows[1], t.v_scale);
    aq_turn_keys(t.keys, rows[0], TL_KEYS, dim);
    aq_sum_keys(t.k_start, t.keys, TL_KEYS, groups, TL_WIDTH);
    aq_turn_values(t.values, rows[1], TL_KEYS, dim);
    for (size_t g = 0; g < groups; g++) {
        t.v_max[g] = tl_parts(t.v_scale + g * TL_KEYS, n, t.v_part + g * TL_KEYS);
    }
}

/* ---- Rows ---- */

typedef struct tl_rows {
    size_t n, dim, groups;
    const uint32_t *visible;
    float *acc;
    _Alignas(64) uint8_t q[AQ_BATCH * AT_MAX_DIM]; /* [n, dim], + 128 */
    /* Vectors are read from any row on. */
    _Alignas(64) float scale[AQ_BATCH * TL_GROUPS + VL]; /* [n, groups]; times log2(e) */
    float top[AQ_BATCH + VL], sum[AQ_BATCH + VL];        /* the state; max times log2(e) */
    float least[AQ_BATCH + VL];                          /* tl_least */
} tl_rows;

/* Rows with one plane of weights each, waiting to meet the values, AT_ROWS at a time. */
typedef struct tl_pass {
    size_t n;
    size_t used;             /* leading tokens of the tile that may weigh something */
    float *acc[2 * AT_ROWS]; /* past the last one, a row of nobody's */
    float keep[2 * AT_ROWS], scale[2 * AT_ROWS][TL_GROUPS];
    _Alignas(64) float spare[AT_MAX_DIM];
    _Alignas(64) uint8_t p[2 * AT_ROWS * TL_GROUPS * TL_KEYS]; /* [rows, groups, TL_KEYS] */
} tl_pass;

/* AT_ROWS rows from one on; those past the last repeat it and count for nothing. */
typedef struct tl_group {
    size_t first, n, row[AT_ROWS];
    size_t used;          /* leading keys of the tile that any of them sees */
    bool whole;           /* all of them see all of the tile */
    size_t sees[AT_ROWS]; /* keys of the tile */
    uint32_t live;        /* a bit for each row that the tile changes */
    uint32_t both;        /* and for those whose weights need two planes */
    float by[AT_ROWS];    /* what scores are still to be multiplied by */
    const float *part[AT_ROWS];
    float v_max[AT_ROWS][TL_GROUPS];
    _Alignas(64) float own[AT_ROWS][TL_GROUPS * TL_KEYS]; /* parts of rows that see part of it */
    _Alignas(64) float s[AT_ROWS][TL_KEYS];               /* scores */
    _Alignas(64) float wide[AQ_FOURS][VL]; /* what is to be summed up over a row's lanes */
    _Alignas(64) float top[VL], keep[VL], weight[VL], tile_sum[VL];
} tl_group;

/* ---- Scores ---- */

/* Of all rows for AT_VECS vectors of keys from `key` on. */
INLINE void tl_scores(const size_t GROUPS, const tl_rows *x, const tl_tile *t, tl_group *g,
                      size_t key) {
    const uint8_t *q[AT_ROWS];
    for (int i = 0; i < AT_ROWS; i++) q[i] = x->q + g->row[i] * x->dim;
    for (size_t group = 0; group < GROUPS; group++) {
        vi sum[AT_ROWS][AT_VECS];
        for (int v = 0; v < AT_VECS; v++) {
            vi start = vi_load(t->k_start + group * TL_KEYS + key + v * VL);
            for (int i = 0; i < AT_ROWS; i++) sum[i][v] = start;
        }
        const int8_t *keys = t->keys + (group * TL_WIDTH / 4 * TL_KEYS + key) * 4;
#pragma GCC unroll 16
        for (size_t c = 0; c < TL_WIDTH / 4; c++) {
            vi k[AT_VECS];
            for (int v = 0; v < AT_VECS; v++)
                k[v] = vi_load(keys + (c * TL_KEYS + (size_t)(v * VL)) * 4);
            for (int i = 0; i < AT_ROWS; i++) {
                int32_t four;
                memcpy(&four, q[i] + group * TL_WIDTH + 4 * c, 4);
                vi qv = vi_set1(four);
                for (int v = 0; v < AT_VECS; v++) sum[i][v] = q8_dp(sum[i][v], qv, k[v]);
            }
        }
        vf ks[AT_VECS];
        for (int v = 0; v < AT_VECS; v++)
            ks[v] = v_load(t->k_scale + group * TL_KEYS + key + v * VL);
#pragma GCC unroll 6
        for (int i = 0; i < AT_ROWS; i++) {
            vf qs = v_set1(x->scale[g->row[i] * GROUPS + group]);
#pragma GCC unroll 4
            for (int v = 0; v < AT_VECS; v++) {
                vf s = v_mul(vi_to_float(sum[i][v]), ks[v]);
                float *to = g->s[i] + key + v * VL;
                if (GROUPS > 1) s = group ? v_fma(s, qs, v_load(to)) : v_mul(s, qs);
                v_store(to, s);
            }
        }
    }
}

/* Scores of the tile, in units of log 2 once multiplied by g->by, and each row's largest. */
INLINE void tl_score(const size_t GROUPS, const tl_rows *x, const tl_tile *t, tl_group *g) {
    for (size_t key = 0; key < g->used; key += AT_VECS * VL) tl_scores(GROUPS, x, t, g, key);
    for (int i = 0; i < AT_ROWS; i++) {
        g->by[i] = GROUPS > 1 ? 1 : x->scale[g->row[i]];
        vf best[2] = {v_set1(-INFINITY), v_set1(-INFINITY)};
        for (size_t j = 0; j < TL_VECS; j++) {
            vf s = v_load(g->s[i] + j * VL);
            if (!g->whole) { /* without what the row does not see */
                size_t n = g->sees[i] > j * VL ? g->sees[i] - j * VL : 0;
                s = v_pick(n < VL ? (1u << n) - 1 : ~UINT32_C(0), s, v_set1(-INFINITY));
                v_store(g->s[i] + j * VL, s);
            }
            best[j & 1] = v_max(best[j & 1], s);
        }
        v_store(g->wide[i], v_max(best[0], best[1]));
    }
}

/* ---- Softmax ---- */

/* The score up to which a tile's best changes nothing (AQ_NOTHING), to a factor of 2. */
INLINE vf tl_least(vf top, vf sum) {
    return v_add(top, v_sub(v_log2_floor(v_min(sum, v_set1(AT_KEYS))), v_set1(AQ_NOTHING_LOG2)));
}

/* As aq_tops: what the rows' sums and this tile's are worth from now on. */
INLINE void tl_tops(const tl_rows *x, tl_group *g) {
    for (size_t i = 0; i < AT_ROWS; i += 4) {
        _mm_store_ps(g->top + i, v_max4(v_load(g->wide[i]), v_load(g->wide[i + 1]),
                                        v_load(g->wide[i + 2]), v_load(g->wide[i + 3])));
    }
    vf by = v_load_n(g->by, AT_ROWS), top = v_mul(v_load(g->top), by);
    vf old = v_load(x->top + g->first);
    /* Decided without the exponentials, for which all that follows would wait. */
    g->live = v_greater(top, v_load(x->least + g->first)) & ((1u << g->n) - 1);
    vf drop = v_exp(v_mul(v_sub(v_min(top, old), v_max(top, old)), v_set1(0.693147181f)));
    vf weight = v_where_greater(top, old, v_set1(1), drop);
    v_store(g->keep, v_where_greater(top, old, drop, v_set1(1)));
    v_store(g->weight, weight);
    v_store(g->top, top);
    /* By what was seen before the tile: so that nothing waits for the tile's sum. */
    vf seen = v_mul(v_load(x->sum + g->first), v_load(g->keep));
    g->both = v_greater(v_mul(weight, v_set1(AQ_SPREAD)), seen);
}

/* A row's scores to weights in one plane of bytes or in two; their sum, yet over lanes, to
 * g->wide. */
INLINE void tl_weigh_row(const size_t GROUPS, const bool TWO, tl_group *g, size_t i, uint8_t *high,
                         uint8_t *low) {
    vf sum = v_zero(), top = v_set1(-g->top[i]), by = v_set1(g->by[i]);
    for (size_t j = 0; j < TL_VECS; j += 4) {
        vf e[4];
        for (size_t k = 0; k < 4; k++)
            e[k] = v_exp2_low(v_fma(v_load(g->s[i] + (j + k) * VL), by, top));
        sum = v_add(sum, v_add(v_add(e[0], e[1]), v_add(e[2], e[3])));
        for (size_t group = 0; group < GROUPS; group++) {
            size_t at = group * TL_KEYS + j * VL;
            vi n[4];
            for (size_t k = 0; k < 4; k++)
                n[k] = vi_round(v_mul(e[k], v_load(g->part[i] + at + k * VL)));
            vi a = vi_pack_half(n[0], n[1]), b = vi_pack_half(n[2], n[3]);
            if (TWO)
                vi_split_planes(a, b, 0, high + at, low + at);
            else
                vi_store(high + at, vi_high_bytes(a, b));
        }
    }
    v_store(g->wide[i], sum);
}

/* The tile's weights to the passes, and its shares of the rows' states. */
INLINE void tl_weigh(const size_t GROUPS, tl_rows *x, tl_group *g, tl_pass *high, tl_pass *low) {
    const size_t each = GROUPS * TL_KEYS;
    for (uint32_t live = g->live; live; live &= live - 1) {
        size_t i = (size_t)__builtin_ctz(live), h = high->n++, l = low->n;
        high->acc[h] = x->acc + g->row[i] * GROUPS * TL_WIDTH;
        high->keep[h] = g->keep[i];
        for (size_t group = 0; group < GROUPS; group++)
            high->scale[h][group] = g->weight[i] * g->v_max[i][group] * (256.0f / AQ_ONE);
        if (!(g->both >> i & 1)) { /* nearly always */
            tl_weigh_row(GROUPS, false, g, i, high->p + h * each, NULL);
            continue;
        }
        tl_weigh_row(GROUPS, true, g, i, high->p + h * each, low->p + l * each);
        low->acc[l] = high->acc[h];
        low->keep[l] = 1;
        for (size_t group = 0; group < GROUPS; group++)
            low->scale[l][group] = high->scale[h][group] * (1.0f / 256);
        low->n = l + 1;
    }
    for (size_t i = 0; i < AT_ROWS; i += 4) {
        _mm_store_ps(g->tile_sum + i, v_sum4(v_load(g->wide[i]), v_load(g->wide[i + 1]),
                                             v_load(g->wide[i + 2]), v_load(g->wide[i + 3])));
    }
    vf old_sum = v_load(x->sum + g->first), old_top = v_load(x->top + g->first);
    vf sum = v_fma(old_sum, v_load(g->keep), v_mul(v_load(g->weight), v_load(g->tile_sum)));
    vf top = v_max(old_top, v_load(g->top));
    v_store(x->sum + g->first, v_pick(g->live, sum, old_sum));
    v_store(x->top + g->first, v_pick(g->live, top, old_top));
    v_store(x->least + g->first, v_pick(g->live, tl_least(top, sum), v_load(x->least + g->first)));
}

/* ---- Weighted values ---- */

/* The pass's first N rows, AT_VECS vectors of dimensions from col on, the tile's first 4 QUADS
 * tokens. */
INLINE void tl_values(const int N, const size_t QUADS, const size_t GROUPS, const tl_pass *s,
                      const tl_tile *t, size_t col) {
    vi sum[AT_ROWS][AT_VECS];
    const size_t group = col / TL_WIDTH, dim = GROUPS * TL_WIDTH;
    const uint8_t *p = s->p + group * TL_KEYS;
    const int8_t *values = t->values + col * 4;
    for (int i = 0; i < N; i++) {
        for (int v = 0; v < AT_VECS; v++) sum[i][v] = vi_set1(0);
    }
    /* All of it unrolled: as a loop, compilers move the sums on every round. */
#pragma GCC unroll 32
    for (size_t quad = 0; quad < QUADS; quad++) {
        /* vi_high_bytes puts the quads of four vectors of weights in this order. */
        size_t at = quad / VL * VL + quad % (VL / 4) * 4 + quad % VL / (VL / 4);
        vi b[AT_VECS];
        for (int v = 0; v < AT_VECS; v++) b[v] = vi_load(values + quad * dim * 4 + v * VL * 4);
#pragma GCC unroll 6
        for (int r = 0; r < N; r++) {
            int32_t four;
            memcpy(&four, p + (size_t)r * GROUPS * TL_KEYS + at * 4, 4);
            vi w = vi_set1(four);
            for (int v = 0; v < AT_VECS; v++) sum[r][v] = q8_dp(sum[r][v], w, b[v]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < N; i++) {
        float *acc = s->acc[i] + col;
        vf keep = v_set1(s->keep[i]), w = v_set1(s->scale[i][group]);
#pragma GCC unroll 4
        for (int v = 0; v < AT_VECS; v++) {
            vf old = v_mul(v_load(acc + v * VL), keep);
            v_store(acc + v * VL, v_fma(vi_to_float(sum[i][v]), w, old));
        }
    }
}

/* Functions of their own: merged, compilers keep the sums of one in memory for the other's sake. */
#define TL_VALUES(name, rows, quads)                                                               \
    __attribute__((noinline)) static void name(const tl_pass *s, const tl_tile *t,                 \
                                               size_t groups) {                                    \
        if (groups == 1 && AT_VECS * VL == TL_WIDTH) {                                             \
            tl_values(rows, quads, 1, s, t, 0);                                                    \
            return;                                                                                \
        }                                                                                          \
        for (size_t col = 0; col < groups * TL_WIDTH; col += AT_VECS * VL)                         \
            tl_values(rows, quads, groups, s, t, col);                                             \
    }
TL_VALUES(tl_values_whole, AT_ROWS, TL_KEYS / 4)
TL_VALUES(tl_values_half, AT_ROWS, TL_KEYS / 8)
TL_VALUES(tl_values_few, AT_ROWS / 2, TL_KEYS / 4)

/* The first AT_ROWS rows, or all there are, meet the values. */
static void tl_flush(tl_pass *s, const tl_tile *t, size_t groups) {
    for (size_t i = s->n; i < AT_ROWS; i++) {
        s->acc[i] = s->spare;
        s->keep[i] = 0;
        memset(s->scale[i], 0, sizeof s->scale[i]);
    }
    if (s->n > AT_ROWS / 2 && s->used > TL_KEYS / 2)
        tl_values_whole(s, t, groups);
    else if (s->n > AT_ROWS / 2)
        tl_values_half(s, t, groups);
    else if (s->n)
        tl_values_few(s, t, groups);
    s->n = s->n > AT_ROWS ? s->n - AT_ROWS : 0;
    for (size_t i = 0; i < s->n; i++) {
        s->acc[i] = s->acc[AT_ROWS + i];
        s->keep[i] = s->keep[AT_ROWS + i];
        memcpy(s->scale[i], s->scale[AT_ROWS + i], sizeof s->scale[i]);
    }
    memcpy(s->p, s->p + AT_ROWS * groups * TL_KEYS, s->n * groups * TL_KEYS);
}

/* ---- A tile ---- */

/* Which rows, from the first on, and what each sees of the tile that begins at token t0. */
INLINE void tl_begin(tl_group *g, const tl_rows *x, const tl_tile *t, size_t first, size_t t0) {
    g->first = first;
    g->n = x->n - first < AT_ROWS ? x->n - first : AT_ROWS;
    g->whole = x->visible[first] >= t0 + TL_KEYS;
    g->used = g->whole ? TL_KEYS : 0;
    for (size_t i = 0; i < AT_ROWS; i++) {
        g->row[i] = first + (i < g->n ? i : g->n - 1);
        g->part[i] = t->v_part;
        memcpy(g->v_max[i], t->v_max, sizeof g->v_max[i]);
    }
    for (size_t i = 0; !g->whole && i < AT_ROWS; i++) {
        size_t sees = x->visible[g->row[i]] - t0;
        g->sees[i] = sees < TL_KEYS ? sees : TL_KEYS;
        g->used = g->sees[i]; /* they ascend */
        if (g->sees[i] == TL_KEYS) continue;
        g->part[i] = g->own[i];
        for (size_t k = 0; k < x->groups; k++) {
            g->v_max[i][k] =
                tl_parts(t->v_scale + k * TL_KEYS, g->sees[i], g->own[i] + k * TL_KEYS);
        }
    }
}

INLINE void tl_meet(const size_t GROUPS, tl_rows *x, const tl_tile *t, size_t row0, size_t t0,
                    tl_pass *high, tl_pass *low) {
    tl_group g;
    size_t bytes = simd_kv_tile_bytes(x->dim), n_groups = (x->n - row0 + AT_ROWS - 1) / AT_ROWS;
    size_t share = (bytes / 64 + n_groups - 1) / n_groups * 64;
    const uint8_t *next = (const uint8_t *)t->keys + bytes, *end = next + bytes;
    for (size_t r = row0; r < x->n; r += AT_ROWS) {
        for (size_t i = 0; i < share && next < end; i += 64, next += 64)
            __builtin_prefetch(next, 0, 2);
        tl_begin(&g, x, t, r, t0);
        tl_score(GROUPS, x, t, &g);
        tl_tops(x, &g);
        if (!g.live) continue;
        tl_weigh(GROUPS, x, &g, high, low);
        if (g.used > high->used) high->used = g.used;
        if (g.used > low->used) low->used = g.used;
        if (high->n >= AT_ROWS) tl_flush(high, t, GROUPS);
        if (low->n < AT_ROWS) continue;
        tl_flush(high, t, GROUPS); /* a row's high plane comes first: it scales acc */
        tl_flush(low, t, GROUPS);
    }
    tl_flush(high, t, GROUPS);
    tl_flush(low, t, GROUPS);
    high->used = low->used = 0;
}

static void tl_batch(tl_rows *x, const void *tiles) {
    tl_pass high, low;
    high.n = low.n = high.used = low.used = 0;
    memset(high.spare, 0, sizeof high.spare);
    memset(low.spare, 0, sizeof low.spare);
    size_t row0 = 0;
    for (size_t t0 = 0; t0 < x->visible[x->n - 1]; t0 += TL_KEYS) {
        tl_tile t = tl_at(tiles, t0 / TL_KEYS, x->dim);
        while (x->visible[row0] <= t0) row0++;
        switch (x->groups) {
        case 1:
            tl_meet(1, x, &t, row0, t0, &high, &low);
            break;
        case 2:
            tl_meet(2, x, &t, row0, t0, &high, &low);
            break;
        default:
            tl_meet(x->groups, x, &t, row0, t0, &high, &low);
            break;
        }
    }
}

static void simd_attn_tiles(const ibid_tiles_args *a) {
    tl_rows x;
    x.dim = a->head_dim;
    x.groups = a->head_dim / TL_WIDTH;
    memset(x.top, 0, sizeof x.top);
    memset(x.sum, 0, sizeof x.sum);
    memset(x.least, 0, sizeof x.least);
    for (size_t r = 0; r < a->n_rows; r += AQ_BATCH) {
        x.n = a->n_rows - r < AQ_BATCH ? a->n_rows - r : AQ_BATCH;
        x.visible = a->visible + r;
        x.acc = a->acc + r * x.dim;
        aq_pack_rows(a->q + r * x.dim, x.n * x.groups, TL_WIDTH, x.q, x.scale);
        for (size_t i = 0; i < x.n; i++) {
            x.top[i] = a->state[r + i].max * 1.44269504f;
            x.sum[i] = a->state[r + i].sum;
        }
        for (size_t i = 0; i < x.n; i += VL) {
            vf top = v_load(x.top + i), least = tl_least(top, v_load(x.sum + i));
            v_store(x.least + i, v_where_greater(top, v_set1(-INFINITY), least, top));
        }
        /* A score of -infinity times 0 is no number. */
        for (size_t i = 0; i < x.n * x.groups; i++) x.scale[i] = fmaxf(x.scale[i], 1e-30f);
        tl_batch(&x, a->tiles);
        for (size_t i = 0; i < x.n; i++) {
            ibid_attn_state *st = &a->state[r + i];
            if (x.top[i] > st->max * 1.44269504f) st->max = x.top[i] * 0.693147181f;
            st->sum = x.sum[i];
        }
    }
}
