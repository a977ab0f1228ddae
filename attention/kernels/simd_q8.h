/* int8 activations against quantised weights by VNNI; for the avx512vnni backend only.
 *
 * Every type's weight is d * u + m with u an unsigned byte: Q4_1 as stored, Q4_0 with m = -8 d,
 * Q8_0 with u = q + 128 and m = -128 d. For x = dx * qx over a group of 32 columns, sum w x = d dx
 * sum(u qx) + m dx sum(qx), the first sum exact in int32, the last known per row of x. A panel of
 * 32 weight rows is repacked once per call so that one vector holds four columns of 16 rows: 8
 * products cover a group, and no sums across lanes are needed. Each output adds up its groups in
 * column order, whatever the grouping. */
#include "attention/kernels/internal.h"

enum { Q8_ROWS = 6, Q8_PANEL = 32 };

/* A row of x: qx [cols], then dx and dx * sum(qx) [cols / 32] each. */
static size_t q8_bytes(size_t cols) {
    return (cols + cols / 32 * 2 * sizeof(float) + 63) & ~(size_t)63;
}

INLINE void q8_pack_group(const float *x, int8_t *q, float *d, float *dsum) {
    vf a = v_load(x), b = v_load(x + 16);
    float max = v_hmax(v_max(v_abs(a), v_abs(b)));
    float scale = max / 127, inverse = scale > 0 ? 127 / max : 0;
    if (!(inverse < INFINITY)) inverse = scale = 0; /* all below about 1e-37: nothing to keep */
    vi ia = _mm512_cvtps_epi32(v_mul(a, v_set1(inverse)));
    vi ib = _mm512_cvtps_epi32(v_mul(b, v_set1(inverse)));
    _mm_storeu_si128((__m128i *)(void *)q, _mm512_cvtepi32_epi8(ia));
    _mm_storeu_si128((__m128i *)(void *)(q + 16), _mm512_cvtepi32_epi8(ib));
    *d = scale;
    *dsum = scale * (float)_mm512_reduce_add_epi32(_mm512_add_epi32(ia, ib));
}

static void simd_q8_pack(const float *x, size_t ldx, size_t n, size_t cols, void *xq) {
    for (size_t i = 0; i < n; i++) {
        int8_t *q = (int8_t *)xq + i * q8_bytes(cols);
        float *d = (float *)(void *)(q + cols);
        for (size_t g = 0; g < cols / 32; g++) {
            q8_pack_group(x + i * ldx + 32 * g, q + 32 * g, d + g, d + cols / 32 + g);
        }
    }
}

typedef struct q8_panel {
    uint8_t *u;     /* [cols / 4, 32 rows, 4] */
    float (*d)[32]; /* [cols / 32, 32 rows] */
    float (*m)[32];
} q8_panel;

static size_t simd_matmul_q8_scratch(size_t cols) {
    return Q8_PANEL * cols + cols / 32 * 2 * sizeof(float[32]);
}

/* The u of two groups from group g of a row, or of the last one and anything. */
INLINE vi q8_unsigned(ibid_type type, const uint8_t *row, size_t g, bool half) {
    size_t g1 = half ? g : g + 1;
    if (type == IBID_Q8_0) {
        const uint8_t *a = row + g * IBIDI_Q8_0_BYTES + 2, *b = row + g1 * IBIDI_Q8_0_BYTES + 2;
        vi v = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)a));
        v = _mm512_inserti64x4(v, _mm256_loadu_si256((const __m256i *)(const void *)b), 1);
        return _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80));
    }
    size_t skip = type == IBID_Q4_1 ? 4 : 2;
    const uint8_t *a = row + row_offset(type, 32 * g) + skip;
    const uint8_t *b = row + row_offset(type, 32 * g1) + skip;
    __m256i both = _mm256_setr_m128i(_mm_loadu_si128((const __m128i *)(const void *)a),
                                     _mm_loadu_si128((const __m128i *)(const void *)b));
    __m256i nibble = _mm256_set1_epi8(15);
    vi low = _mm512_castsi256_si512(_mm256_and_si256(both, nibble));
    vi high = _mm512_castsi256_si512(_mm256_and_si256(_mm256_srli_epi16(both, 4), nibble));
    return _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
}

INLINE void q8_scale(ibid_type type, const uint8_t *block, float *d, float *m) {
    *d = half_at(block);
    *m = type == IBID_Q4_1 ? half_at(block + 2) : *d * (type == IBID_Q4_0 ? -8.0f : -128.0f);
}

INLINE void q8_repack_type(ibid_type type, const ibid_tensor *w, size_t r0, size_t rows,
                           const q8_panel *p) {
    size_t groups = w->cols / 32;
    const uint8_t *row[Q8_PANEL];
    for (size_t r = 0; r < Q8_PANEL; r++) { /* the last row stands in for missing ones */
        row[r] = (const uint8_t *)w->data + (r0 + (r < rows ? r : rows - 1)) * w->row_bytes;
        for (size_t g = 0; g < groups; g++) {
            q8_scale(type, row[r] + row_offset(type, 32 * g), &p->d[g][r], &p->m[g][r]);
        }
    }
    for (size_t h = 0; h < Q8_PANEL; h += 16) {
        for (size_t g = 0; g < groups; g += 2) {
            bool half = g + 1 == groups;
            vi t[16];
            for (size_t r = 0; r < 16; r++) t[r] = q8_unsigned(type, row[h + r], g, half);
            vi_transpose(t);
            uint8_t *to = p->u + g * 32 * Q8_PANEL + h * 4;
            for (size_t j = 0; j < (half ? 8 : 16); j++) vi_store(to + j * 4 * Q8_PANEL, t[j]);
        }
    }
}

static void q8_repack(const ibid_tensor *w, size_t r0, size_t rows, const q8_panel *p) {
    if (w->type == IBID_Q4_0)
        q8_repack_type(IBID_Q4_0, w, r0, rows, p);
    else if (w->type == IBID_Q4_1)
        q8_repack_type(IBID_Q4_1, w, r0, rows, p);
    else
        q8_repack_type(IBID_Q8_0, w, r0, rows, p);
}

/* N rows of x against the panel's 32 weight rows. */
INLINE void q8_tile(const int N, const q8_panel *p, size_t cols, const int8_t *xq, size_t stride,
                    float *y, size_t ldy, size_t rows) {
    vf sum[Q8_ROWS][2];
    size_t groups = cols / 32;
    for (int i = 0; i < N; i++) sum[i][0] = sum[i][1] = v_zero();
    for (size_t g = 0; g < groups; g++) {
        vi dot[Q8_ROWS][2];
        for (int i = 0; i < N; i++) dot[i][0] = dot[i][1] = _mm512_setzero_si512();
        const uint8_t *u = p->u + g * 32 * Q8_PANEL;
        for (int j = 0; j < 8; j++) {
            vi u0 = vi_load(u + j * 4 * Q8_PANEL), u1 = vi_load(u + j * 4 * Q8_PANEL + 64);
            for (int i = 0; i < N; i++) {
                int32_t four;
                memcpy(&four, xq + (size_t)i * stride + g * 32 + (size_t)(4 * j), 4);
                vi x = _mm512_set1_epi32(four);
                dot[i][0] = _mm512_dpbusd_epi32(dot[i][0], u0, x);
                dot[i][1] = _mm512_dpbusd_epi32(dot[i][1], u1, x);
            }
        }
        vf d0 = v_load(p->d[g]), d1 = v_load(p->d[g] + 16);
        vf m0 = v_load(p->m[g]), m1 = v_load(p->m[g] + 16);
        for (int i = 0; i < N; i++) {
            const float *scale = (const float *)(const void *)(xq + (size_t)i * stride + cols);
            vf dx = v_set1(scale[g]), dsum = v_set1(scale[groups + g]);
            sum[i][0] = v_fma(m0, dsum, sum[i][0]);
            sum[i][1] = v_fma(m1, dsum, sum[i][1]);
            sum[i][0] = v_fma(_mm512_cvtepi32_ps(dot[i][0]), v_mul(d0, dx), sum[i][0]);
            sum[i][1] = v_fma(_mm512_cvtepi32_ps(dot[i][1]), v_mul(d1, dx), sum[i][1]);
        }
    }
    for (int i = 0; i < N; i++) {
        float *to = y + (size_t)i * ldy;
        v_store_n(to, sum[i][0], rows);
        if (rows > 16) v_store_n(to + 16, sum[i][1], rows - 16);
    }
}

static void simd_matmul_q8(const ibid_tensor *w, size_t row0, size_t row1, const void *xq, size_t n,
                           float *y, size_t ldy, void *scratch) {
    size_t cols = w->cols, stride = q8_bytes(cols);
    q8_panel p = {.u = scratch};
    p.d = (void *)(p.u + Q8_PANEL * cols);
    p.m = p.d + cols / 32;
    for (size_t r0 = row0; r0 < row1; r0 += Q8_PANEL) {
        size_t rows = row1 - r0 < Q8_PANEL ? row1 - r0 : Q8_PANEL;
        q8_repack(w, r0, rows, &p);
        const int8_t *x = xq;
        float *to = y + r0;
        size_t i = 0;
        for (; i + Q8_ROWS <= n; i += Q8_ROWS, x += Q8_ROWS * stride, to += Q8_ROWS * ldy) {
            q8_tile(Q8_ROWS, &p, cols, x, stride, to, ldy, rows);
        }
        for (; i + 2 <= n; i += 2, x += 2 * stride, to += 2 * ldy) {
            q8_tile(2, &p, cols, x, stride, to, ldy, rows);
        }
        if (i < n) q8_tile(1, &p, cols, x, stride, to, ldy, rows);
    }
}
