/* Template: exact attention of query rows over one stored segment, online softmax by tiles of 64
 * keys.
 *
 * A tile's keys are unpacked and turned so that one vector holds one dimension of VL keys: scores
 * need no sums across lanes, and a tile serves all query rows of the kv head. Values are unpacked
 * as they lie. Then AT_ROWS rows at a time: scores, exp, weighted values, all by one register-tiled
 * product.
 *
 * A row's result depends on that row, its visible count, the mask and the segment only, bit for
 * bit: tiles begin at multiples of 64 tokens, and rows that share a register tile do not mix. */
#include "attention/kernels/internal.h"

#include <math.h>

enum { AT_KEYS = IBIDI_KEY_TILE, AT_MAX_DIM = 256 };

/* N rows a[i][0 .. k) times b [k, ldb], V vectors of columns from b on: out[i] = that, added to
 * keep[i] * out[i] if keep is given. */
INLINE void rows_times(const int N, const int V, const float *const *a, size_t k, const float *b,
                       size_t ldb, float *const *out, size_t col, const float *keep) {
    vf sum[AT_ROWS][AT_VECS];
    for (int i = 0; i < N; i++) {
        for (int v = 0; v < V; v++) {
            sum[i][v] = keep ? v_mul(v_set1(keep[i]), v_load(out[i] + col + v * VL)) : v_zero();
        }
    }
    for (size_t j = 0; j < k; j++) {
        vf bv[AT_VECS];
        for (int v = 0; v < V; v++) bv[v] = v_load(b + j * ldb + col + (size_t)(v * VL));
        for (int i = 0; i < N; i++) {
            vf av = v_set1(a[i][j]);
            for (int v = 0; v < V; v++) sum[i][v] = v_fma(av, bv[v], sum[i][v]);
        }
    }
    for (int i = 0; i < N; i++) {
        for (int v = 0; v < V; v++) v_store(out[i] + col + v * VL, sum[i][v]);
    }
}

INLINE void rows_times_cols(const int N, const float *const *a, size_t k, const float *b,
                            size_t ldb, float *const *out, size_t cols, const float *keep) {
    size_t col = 0;
    for (; col + AT_VECS * VL <= cols; col += AT_VECS * VL) {
        rows_times(N, AT_VECS, a, k, b, ldb, out, col, keep);
    }
    /* What is left is 32 columns on a machine whose tile is 64 wide. */
    if (col < cols)
        rows_times(N, 32 / VL < AT_VECS ? 32 / VL : AT_VECS, a, k, b, ldb, out, col, keep);
}

/* cols: a multiple of 32. */
static void rows_times_any(size_t n, const float *const *a, size_t k, const float *b, size_t ldb,
                           float *const *out, size_t cols, const float *keep) {
    switch (n) {
    case 1:
        rows_times_cols(1, a, k, b, ldb, out, cols, keep);
        break;
    case 2:
        rows_times_cols(2, a, k, b, ldb, out, cols, keep);
        break;
    case 3:
        rows_times_cols(3, a, k, b, ldb, out, cols, keep);
        break;
    case 4:
        rows_times_cols(4, a, k, b, ldb, out, cols, keep);
        break;
    case 5:
        rows_times_cols(5, a, k, b, ldb, out, cols, keep);
        break;
    default:
        rows_times_cols(AT_ROWS, a, k, b, ldb, out, cols, keep);
        break;
    }
}

/* VL keys from token t0 of one head (those past n_tokens repeat the last), turned: dst[d * AT_KEYS
 * + i] is dimension d of key i. */
static void turn_keys(const ibid_kv_view *kv, size_t head, size_t t0, float *dst) {
    size_t dim = kv->head_dim, at[VL];
    size_t per_lane = kv->type == IBID_KV_Q8_0 ? 4 : kv->type == IBID_KV_F16 ? 2 : 1;
    for (size_t i = 0; i < VL; i++) {
        size_t t = t0 + i < kv->n_tokens ? t0 + i : kv->n_tokens - 1;
        at[i] = (head * kv->n_tokens + t) * dim;
    }
    for (size_t d = 0; d < dim; d += VL * per_lane) {
        /* One vector takes VL * 4 bytes of a key: with 16 lanes of int8 that may be more than is
         * left. */
        bool half = dim - d < VL * per_lane;
        vi m[VL];
        for (size_t i = 0; i < VL; i++) {
            m[i] = vi_load_row((const uint8_t *)kv->k + (at[i] + d) * (4 / per_lane), half);
        }
        vi_transpose(m);
        size_t lanes = half ? VL / 2 : VL;
        if (kv->type == IBID_KV_F32) {
            for (size_t j = 0; j < lanes; j++) v_store(dst + (d + j) * AT_KEYS, vi_as_float(m[j]));
        } else if (kv->type == IBID_KV_F16) {
            for (size_t j = 0; j < lanes; j++) {
                v_store(dst + (d + 2 * j) * AT_KEYS, vi_half(m[j], 0));
                v_store(dst + (d + 2 * j + 1) * AT_KEYS, vi_half(m[j], 1));
            }
        } else {
            for (size_t g = 0; g < lanes / 8; g++) { /* 8 lanes of 4 values share a scale */
                uint16_t s[VL];
                for (size_t i = 0; i < VL; i++) s[i] = kv->k_scale[(at[i] + d) / 32 + g];
                vf scale = v_from_half(s);
                for (size_t j = 8 * g; j < 8 * g + 8; j++) {
                    float *to = dst + (d + 4 * j) * AT_KEYS;
                    for (int b = 0; b < 4; b++) {
                        v_store(to + b * AT_KEYS, v_mul(scale, vi_byte(m[j], b)));
                    }
                }
            }
        }
    }
}

typedef struct attn_tile {
    _Alignas(64) float keys[AT_MAX_DIM * AT_KEYS]; /* [head_dim, AT_KEYS] */
    _Alignas(64) float space[AT_KEYS * AT_MAX_DIM];
    const float *values; /* [n, head_dim]; in space, or the segment's own if f32 */
    size_t t0, n;
} attn_tile;

static void load_keys(attn_tile *t, const ibid_attn_args *a, size_t t0) {
    t->t0 = t0;
    t->n = a->kv->n_tokens - t0 < AT_KEYS ? a->kv->n_tokens - t0 : AT_KEYS;
    for (size_t i = 0; i < AT_KEYS; i += VL) {
        /* Whole vectors are read of scores: those of no key must be numbers too. */
        turn_keys(a->kv, a->kv_head, i < t->n ? t0 + i : t0, t->keys + i);
    }
}

static void load_values(attn_tile *t, const ibid_attn_args *a) {
    const ibid_kv_view *kv = a->kv;
    size_t at = (a->kv_head * kv->n_tokens + t->t0) * kv->head_dim;
    if (kv->type == IBID_KV_F32) {
        t->values = (const float *)kv->v + at;
        return;
    }
    size_t width = kv->type == IBID_KV_F16 ? 2 : 1;
    simd_kv_unpack(kv->type, (const uint8_t *)kv->v + at * width,
                   kv->type == IBID_KV_Q8_0 ? kv->v_scale + at / 32 : NULL, t->n * kv->head_dim,
                   t->space);
    t->values = t->space;
}

/* Up to AT_ROWS rows that each see some key of the tile. */
typedef struct attn_group {
    size_t n, row[AT_ROWS];
    uint64_t bits[AT_ROWS]; /* keys of the tile the row sees */
    _Alignas(64) float p[AT_ROWS][AT_KEYS];
} attn_group;

/* Fills g->p with scores; returns how many leading keys of the tile any row of the group sees. */
static size_t group_scores(attn_group *g, const attn_tile *t, const ibid_attn_args *a) {
    const float *q[AT_ROWS];
    float *out[AT_ROWS];
    uint64_t any = 0;
    for (size_t i = 0; i < g->n; i++) {
        q[i] = a->q + g->row[i] * a->kv->head_dim;
        out[i] = g->p[i];
        any |= g->bits[i];
    }
    size_t used = 64 - (size_t)__builtin_clzll(any);
    rows_times_any(g->n, q, a->kv->head_dim, t->keys, AT_KEYS, out, used > 32 ? 64 : 32, NULL);
    return used;
}

/* Turns the scores of a row into weights; false if none of them is a number above -infinity. keep:
 * what the row's old sums are still worth. */
INLINE bool row_softmax(float *p, uint64_t bits, ibid_attn_state *st, float *keep) {
    vf s[AT_KEYS / VL], max = v_set1(-INFINITY), sum = v_zero();
    for (size_t j = 0; j < AT_KEYS / VL; j++) {
        s[j] = v_pick((uint32_t)(bits >> (j * VL)), v_load(p + j * VL), v_set1(-INFINITY));
        max = v_max(max, s[j]);
    }
    float old = st->max, top = v_hmax(max);
    if (!(top > -INFINITY)) return false;
    if (old > top) top = old;
    for (size_t j = 0; j < AT_KEYS / VL; j++) {
        vf e = v_exp(v_sub(s[j], v_set1(top)));
        e = v_pick((uint32_t)(bits >> (j * VL)), e, v_zero());
        sum = v_add(sum, e);
        v_store(p + j * VL, e);
    }
    *keep = !(old > -INFINITY) ? 0 : old == top ? 1 : expf(old - top);
    st->sum = st->sum * *keep + v_hsum(sum);
    st->max = top;
    return true;
}

static void group_attend(attn_group *g, const attn_tile *t, const ibid_attn_args *a) {
    if (g->n == 0) return;
    size_t used = group_scores(g, t, a), n = 0, dim = a->kv->head_dim;
    const float *p[AT_ROWS];
    float *acc[AT_ROWS], keep[AT_ROWS];
    for (size_t i = 0; i < g->n; i++) {
        if (!row_softmax(g->p[i], g->bits[i], &a->state[g->row[i]], &keep[n])) continue;
        p[n] = g->p[i];
        acc[n++] = a->acc + g->row[i] * dim;
    }
    if (n) rows_times_any(n, p, used, t->values, dim, acc, dim, keep);
    g->n = 0;
}

static void group_mass(attn_group *g, const attn_tile *t, const ibid_attn_args *a, const float *lse,
                       float *mass) {
    if (g->n == 0) return;
    group_scores(g, t, a);
    for (size_t i = 0; i < g->n; i++) {
        vf shift = v_set1(lse[g->row[i]]);
        for (size_t j = 0; j < t->n; j += VL) {
            vf e = v_exp(v_sub(v_load(g->p[i] + j), shift));
            e = v_pick((uint32_t)(g->bits[i] >> j), e, v_zero());
            float *to = mass + t->t0 + j;
            v_store_n(to, v_add(v_load_n(to, t->n - j), e), t->n - j);
        }
    }
    g->n = 0;
}

static bool attn_fits(const ibid_attn_args *a) {
    return a->kv->head_dim % 32 == 0 && a->kv->head_dim <= AT_MAX_DIM;
}

/* lse NULL: attention; else its mass per token. */
INLINE void attn_tiles(const ibid_attn_args *a, const float *lse, float *mass) {
    attn_tile t;
    attn_group g;
    g.n = 0;
    for (size_t t0 = 0; t0 < a->kv->n_tokens; t0 += AT_KEYS) {
        bool loaded = false;
        for (size_t r = 0; r < a->n_rows; r++) {
            uint64_t bits = ibidi_visible_bits(a, r, t0);
            if (!bits) continue;
            if (!loaded) {
                load_keys(&t, a, t0);
                if (!lse) load_values(&t, a);
                loaded = true;
            }
            g.row[g.n] = r;
            g.bits[g.n++] = bits;
            if (g.n < AT_ROWS) continue;
            if (lse)
                group_mass(&g, &t, a, lse, mass);
            else
                group_attend(&g, &t, a);
        }
        if (lse)
            group_mass(&g, &t, a, lse, mass);
        else
            group_attend(&g, &t, a);
    }
}

static void simd_attn(const ibid_attn_args *a) {
    if (attn_fits(a))
        attn_tiles(a, NULL, NULL);
    else
        ibidi_kernels_reference.attn(a);
}

static void simd_attn_mass(const ibid_attn_args *a, const float *lse, float *mass) {
    if (attn_fits(a))
        attn_tiles(a, lse, mass);
    else
        ibidi_kernels_reference.attn_mass(a, lse, mass);
}
