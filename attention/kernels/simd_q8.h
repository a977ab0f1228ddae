/* Template: activations rounded to integers, against panels of quantised weights (panel.h).
 *
 * A group of 32 values of x is d (q + r / 128), q of 8 bits; r, of 8 bits too, only where the group
 * is fine, and 0 elsewhere. With weights dw u + m, sum w x = dw d sum(u q) + m d sum(q): the first
 * sum is exact in int32, the last known per row of x. Weights without an offset of their own start
 * the first sum at -zero * sum(q) instead, exactly too. Each output adds up its groups in column
 * order, so that it depends on its row of x and of w only; that a tile goes through r for all its
 * rows if one of them is fine there changes no bit of the others.
 *
 * Which groups are fine: the error of a group grows with its largest value, and a few channels of a
 * transformer's activations are ten and more times as large as the rest. Two planes for the one
 * group in seven that has them cost a tenth of the time and take away three quarters of the KL
 * divergence (docs/performance.md). */
#include "attention/kernels/internal.h"
#include "attention/kernels/panel.h"

/* Rows of x go by tiles of 8, so that a kernel finds all rows of a group at fixed distances. Rows
 * that a tile lacks are not read, but for their `fine`. */
enum { Q8_TILE = IBID_Q8_TILE };

typedef struct q8_x {
    int8_t *q, *r;  /* [groups, 8 rows, 32] */
    float *d, *sum; /* [groups, 8]: sum = d * sum(q + r / 128) */
    int32_t *isum;  /* [groups, 2, 8]: of 128 q + r, the first and the last 16 columns */
    uint8_t *fine;  /* [groups, 8] */
} q8_x;

static size_t simd_q8_bytes(size_t cols) {
    return (cols / 32 * (size_t)Q8_TILE * (32 + 32 + 4 + 4 + 8 + 1) + 63) & ~(size_t)63;
}

INLINE q8_x q8_at(const void *tile, size_t cols) {
    size_t n = cols / 32 * Q8_TILE;
    q8_x x = {.q = (int8_t *)(uintptr_t)tile};
    x.r = x.q + 32 * n;
    x.d = (float *)(void *)(x.r + 32 * n);
    x.sum = x.d + n;
    x.isum = (int32_t *)(void *)(x.sum + n);
    x.fine = (uint8_t *)(x.isum + 2 * n);
    return x;
}

INLINE float q8_top(const float *x) {
    vf max = v_zero();
    for (int i = 0; i < 32; i += VL) max = v_max(max, v_abs(v_load(x + i)));
    return v_hmax(max);
}

/* at: which row of which group of the tile. */
INLINE void q8_pack_group(const float *v, float top, bool fine, const q8_x *x, size_t g, size_t i) {
    size_t at = g * Q8_TILE + i;
    float d = top / 127, inverse = d > 0 ? 127 / top : 0;
    if (!(inverse < INFINITY)) inverse = d = 0; /* all below about 1e-37: nothing to keep */
    vi sum[2] = {vi_set1(0), vi_set1(0)};
    for (int c = 0; c < 32; c += VL) {
        vf w = v_mul(v_load(v + c), v_set1(inverse));
        vi high = vi_round(w), low = vi_set1(0);
        if (fine) low = vi_round(v_mul(v_sub(w, vi_to_float(high)), v_set1(128)));
        vi_store_i8(x->q + 32 * at + c, high);
        vi_store_i8(x->r + 32 * at + c, low);
        sum[c / 16] = vi_add(sum[c / 16], vi_add(vi_sll(high, 7), low));
    }
    int32_t first = vi_hsum(sum[0]), last = vi_hsum(sum[1]);
    x->d[at] = d;
    /* As floats, exactly: a NaN rounds to INT32_MIN, and two of those have no int32 sum. */
    x->sum[at] = d * (((float)first + (float)last) / 128);
    x->isum[2 * g * Q8_TILE + i] = first;
    x->isum[(2 * g + 1) * Q8_TILE + i] = last;
    x->fine[at] = fine;
}

static void q8_pack_row(const float *v, size_t cols, float fine_above, const q8_x *x, size_t i) {
    float squares = 0;
    for (size_t g = 0; g < cols / 32; g++) {
        float top = q8_top(v + 32 * g);
        x->d[g * Q8_TILE + i] = top;
        squares += top * top;
    }
    float least = fine_above * sqrtf(squares / (float)(cols / 32));
    for (size_t g = 0; g < cols / 32; g++) {
        float top = x->d[g * Q8_TILE + i];
        q8_pack_group(v + 32 * g, top, !(top < least), x, g, i);
    }
}

static void simd_q8_pack(const float *v, size_t ldv, size_t n, size_t cols, float fine_above,
                         void *xq) {
    for (size_t i = 0; i < n; i += Q8_TILE, v += Q8_TILE * ldv) {
        q8_x x = q8_at((uint8_t *)xq + i / Q8_TILE * simd_q8_bytes(cols), cols);
        if (n - i < Q8_TILE) memset(x.fine, 0, cols / 32 * Q8_TILE);
        for (size_t j = 0; j < Q8_TILE && i + j < n; j++)
            q8_pack_row(v + j * ldv, cols, fine_above, &x, j);
    }
}

/* What a tile is made for; constants wherever it is inlined. */
typedef struct q8_kind {
    int bits, n_scales;
    bool has_offset;
} q8_kind;

INLINE vi q8_weights(const q8_kind k, const uint8_t *u, int step) {
    if (k.bits == 8) return vi_load(u + step * 64);
    vi v = vi_load(u + step % 4 * 64);
    return step < 4 ? vi_low4(v) : vi_high4(v);
}

INLINE vi q8_dot(const q8_kind k, vi acc, vi u, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return k.bits == 8 ? q8_dp(acc, u, vi_set1(four)) : q8_dp_small(acc, u, vi_set1(four));
}

/* dot[i] += columns 4 step0 .. 4 step1 - 1 of a group. x: rows 32 apart. */
INLINE void q8_steps(const int N, const q8_kind k, const uint8_t *u, const int step0,
                     const int step1, const int8_t *x, vi dot[]) {
#pragma GCC unroll 8
    for (int j = step0; j < step1; j++) {
        vi v = q8_weights(k, u, j);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) dot[i] = q8_dot(k, dot[i], v, x + 32 * i + 4 * j);
    }
}

/* One group, or the half of it that shares scale s; r too if a row of the tile is fine here. i0:
 * the first of N rows. */
INLINE void q8_add(const int N, const q8_kind k, const ibid_panels *w, const uint8_t *group,
                   size_t at, const int s, const q8_x *x, size_t g, size_t i0, vf sum[]) {
    const uint8_t *u = group + 32 * (size_t)(k.n_scales + k.has_offset) + 4 * at;
    const int step0 = s * 4, step1 = k.n_scales == 1 ? 8 : step0 + 4;
    size_t row = g * Q8_TILE + i0;
    vf d = v_from_half(group + 32 * (size_t)s + 2 * at);
    vi dot[Q8_ROWS];
    uint64_t fine;
    int shift = 7; /* from isum to dot */
    memcpy(&fine, x->fine + g * Q8_TILE, sizeof fine);
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) dot[i] = vi_set1(0);
    q8_steps(N, k, u, step0, step1, x->q + 32 * row, dot);
    if (fine) {
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) dot[i] = vi_sll(dot[i], 7);
        q8_steps(N, k, u, step0, step1, x->r + 32 * row, dot);
        d = v_mul(d, v_set1(1.0f / 128));
        shift = 0;
    }
    vf m = k.has_offset ? v_from_half(group + 32 * (size_t)k.n_scales + 2 * at) : v_zero();
    const int32_t *isum = x->isum + 2 * g * Q8_TILE + i0;
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
        if (k.has_offset) {
            sum[i] = v_fma(m, v_set1(x->sum[row + (size_t)i]), sum[i]);
        } else {
            int32_t q = k.n_scales == 1 ? isum[i] + isum[Q8_TILE + i] : isum[s * Q8_TILE + i];
            dot[i] = vi_sub(dot[i], vi_set1(w->zero * (q >> shift)));
        }
        sum[i] = v_fma(vi_to_float(dot[i]), v_mul(d, v_set1(x->d[row + (size_t)i])), sum[i]);
    }
}

/* N rows of x's tile from i0 on, against VL weight rows, `at` rows into their panel. */
INLINE void q8_tile(const int N, const q8_kind k, const ibid_panels *w, const uint8_t *panel,
                    size_t at, const q8_x *x, size_t i0, float *y, size_t ldy, size_t rows) {
    vf sum[Q8_ROWS];
    for (int i = 0; i < N; i++) sum[i] = v_zero();
    for (size_t g = 0; g < w->cols / 32; g++, panel += w->group_bytes) {
        for (size_t ahead = 0; ahead < w->group_bytes; ahead += 64)
            __builtin_prefetch(panel + Q8_AHEAD + ahead);
        for (int s = 0; s < k.n_scales; s++) q8_add(N, k, w, panel, at, s, x, g, i0, sum);
    }
    y += i0 * ldy;
    for (int i = 0; i < N; i++) v_store_n(y + (size_t)i * ldy, sum[i], rows);
}

INLINE void q8_rows(const q8_kind k, const ibid_panels *w, size_t row0, size_t row1, const void *xq,
                    size_t n, float *y, size_t ldy) {
    for (size_t r = row0; r < row1; r += VL) {
        const uint8_t *panel = w->data + r / IBID_PANEL_ROWS * w->panel_bytes;
        size_t rows = row1 - r < VL ? row1 - r : VL, at = r % IBID_PANEL_ROWS;
        for (size_t i = 0; i < n; i += Q8_TILE) {
            q8_x x = q8_at((const uint8_t *)xq + i / Q8_TILE * simd_q8_bytes(w->cols), w->cols);
            size_t in = n - i < Q8_TILE ? n - i : Q8_TILE, j = 0;
            float *to = y + i * ldy + r;
            for (; j + Q8_ROWS <= in; j += Q8_ROWS)
                q8_tile(Q8_ROWS, k, w, panel, at, &x, j, to, ldy, rows);
            for (; Q8_ROWS > 4 && j + 4 <= in; j += 4)
                q8_tile(4, k, w, panel, at, &x, j, to, ldy, rows);
            for (; j + 2 <= in; j += 2) q8_tile(2, k, w, panel, at, &x, j, to, ldy, rows);
            if (j < in) q8_tile(1, k, w, panel, at, &x, j, to, ldy, rows);
        }
    }
}

static void simd_matmul_q8(const ibid_panels *w, size_t row0, size_t row1, const void *xq, size_t n,
                           float *y, size_t ldy) {
    if (w->bits == 4 && w->has_offset)
        q8_rows((q8_kind){4, 1, true}, w, row0, row1, xq, n, y, ldy);
    else if (w->bits == 4)
        q8_rows((q8_kind){4, 1, false}, w, row0, row1, xq, n, y, ldy);
    else if (w->has_offset)
        q8_rows((q8_kind){8, 1, true}, w, row0, row1, xq, n, y, ldy);
    else if (w->n_scales == 1)
        q8_rows((q8_kind){8, 1, false}, w, row0, row1, xq, n, y, ldy);
    else
        q8_rows((q8_kind){8, 2, false}, w, row0, row1, xq, n, y, ldy);
}
