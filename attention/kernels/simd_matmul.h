/* Template: weights times activations, over the vectors of simd_avx2.h or simd_avx512.h.
 *
 * Every output is summed in one order, whatever n, the rows' split and the path taken: columns in
 * chunks of MM_CHUNK; within a chunk VL interleaved partial sums by fused multiply-add in column
 * order, added up by v_sum4; chunks added in order. So y[i, r] depends on row i of x and row r of w
 * only, bit for bit.
 *
 * Few rows of x (decode): the weights stream by as stored and are unpacked in registers. More rows:
 * panels of MM_PANEL weight rows are unpacked once into scratch (L2), then tiles of MM_ROWS rows of
 * x (L1) meet four weight rows at a time. */
#include "attention/kernels/internal.h"

enum {
    MM_CHUNK = 768,  /* columns; a multiple of every block */
    MM_PANEL = 64,   /* weight rows unpacked at once: 192 KB of scratch */
    MM_AHEAD = 6144, /* bytes of weights fetched ahead of use when streaming */
    MM_STREAM = 4,   /* rows of x that share a pass over the weights when streaming */
    MM_STREAMED = 8  /* most rows of x for which streaming pays, in passes */
};

/* Types that decoding streams as stored. The others' groups are unpacked one by one, slower, before
 * anything is multiplied: where their speed counts they are multiplied as panels (simd_q8.h). */
INLINE bool streams(ibid_type type) {
    return type == IBID_F32 || type == IBID_F16 || type == IBID_BF16 || type == IBID_Q4_0 ||
           type == IBID_Q4_1 || type == IBID_Q8_0;
}

/* Bytes from the start of a row of such a type to column c (a multiple of the block). */
INLINE size_t row_offset(ibid_type type, size_t c) {
    switch (type) {
    case IBID_F32:
        return c * 4;
    case IBID_F16:
    case IBID_BF16:
        return c * 2;
    case IBID_Q4_0:
        return c / IBIDI_BLOCK * IBIDI_Q4_0_BYTES;
    case IBID_Q4_1:
        return c / IBIDI_BLOCK * IBIDI_Q4_1_BYTES;
    default:
        return c / IBIDI_BLOCK * IBIDI_Q8_0_BYTES;
    }
}

/* Scale and offset (0 where the type has none) of one block. */
typedef struct block_scale {
    float d, m;
} block_scale;

INLINE bool has_blocks(ibid_type type) {
    return type != IBID_F32 && type != IBID_F16 && type != IBID_BF16;
}

/* Those of the blocks in columns [c0, c1) of four rows, converted four at a time and left in
 * memory, from where a load spreads each over a vector for free: permutes would compete with
 * unpacking nibbles. */
INLINE void block_scales(ibid_type type, const uint8_t *const row[4], size_t c0, size_t c1,
                         block_scale out[][4]) {
    if (!has_blocks(type)) return;
    for (size_t c = c0; c < c1; c += 32) {
        size_t at = row_offset(type, c);
        uint32_t bits[4];
        for (int r = 0; r < 4; r++) {
            if (type == IBID_Q4_1)
                memcpy(&bits[r], row[r] + at, 4);
            else
                bits[r] = ibidi_u16_at(row[r] + at);
        }
        __m128i four = _mm_setr_epi32((int)bits[0], (int)bits[1], (int)bits[2], (int)bits[3]);
        _mm256_storeu_ps(&out[(c - c0) / 32][0].d, _mm256_cvtph_ps(four));
    }
}

/* 32 weights from column c of a row. */
INLINE void v_weights(ibid_type type, const uint8_t *row, size_t c, block_scale s,
                      vf out[32 / VL]) {
    const uint8_t *p = row + row_offset(type, c);
    switch (type) {
    case IBID_F32:
        for (int j = 0; j < 32 / VL; j++) out[j] = v_load((const float *)(const void *)p + j * VL);
        return;
    case IBID_F16:
        for (int j = 0; j < 32 / VL; j++) out[j] = v_from_half(p + 2 * j * VL);
        return;
    case IBID_BF16:
        for (int j = 0; j < 32 / VL; j++) out[j] = v_from_bf16(p + 2 * j * VL);
        return;
    case IBID_Q4_0:
        v_block_q4_0(p, s.d, out);
        return;
    case IBID_Q4_1:
        v_block_q4_1(p, s.d, s.m, out);
        return;
    default: /* Q8_0 */
        break;
    }
    vf d = v_set1(s.d);
    for (int j = 0; j < 32 / VL; j++) {
        out[j] = v_mul(d, v_from_i8((const int8_t *)p + 2 + j * VL));
    }
}

/* The last n < 32 weights of a row, from column c, followed by zeros; types without blocks. */
INLINE void v_weights_tail(ibid_type type, const uint8_t *row, size_t c, size_t n,
                           vf out[32 / VL]) {
    float buf[32] = {0};
    for (size_t j = 0; j < n; j++) {
        if (type == IBID_F32)
            memcpy(&buf[j], row + 4 * (c + j), 4);
        else if (type == IBID_BF16)
            buf[j] = ibidi_bf16_to_f32(ibidi_u16_at(row + 2 * (c + j)));
        else
            buf[j] = ibid_f16_to_f32(ibidi_u16_at(row + 2 * (c + j)));
    }
    for (int j = 0; j < 32 / VL; j++) out[j] = v_load(buf + j * VL);
}

INLINE float half_at(const uint8_t *p) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(ibidi_u16_at(p))));
}

INLINE void unpack_row(ibid_type type, const uint8_t *row, size_t c0, size_t c1, float *dst) {
    vf w[32 / VL];
    size_t c = c0;
    for (; c + 32 <= c1; c += 32, dst += 32) {
        const uint8_t *p = row + row_offset(type, c);
        block_scale s = {0, 0};
        if (has_blocks(type)) s.d = half_at(p);
        if (type == IBID_Q4_1) s.m = half_at(p + 2);
        v_weights(type, row, c, s, w);
        for (int j = 0; j < 32 / VL; j++) v_store(dst + j * VL, w[j]);
    }
    if (c == c1) return;
    v_weights_tail(type, row, c, c1 - c, w);
    for (int j = 0; j < 32 / VL; j++) v_store(dst + j * VL, w[j]);
}

/* The same for a type that does not stream. */
static void unpack_groups(ibid_type type, const uint8_t *row, size_t c0, size_t c1, float *dst) {
    for (size_t c = c0; c < c1; c += 32, dst += 32) {
        uint8_t u[32];
        float d[2], m[2];
        ibid_weights_split(type, row, c / 32, u, d, m);
        for (int j = 0; j < 16; j++) dst[j] = d[0] * (float)u[j] + m[0];
        for (int j = 16; j < 32; j++) dst[j] = d[1] * (float)u[j] + m[1];
    }
}

/* Columns [c0, c1) of a row; writes zeros up to the next multiple of 32. */
static void simd_unpack(ibid_type type, const uint8_t *row, size_t c0, size_t c1, float *dst) {
    switch (type) {
    case IBID_F32:
        unpack_row(IBID_F32, row, c0, c1, dst);
        break;
    case IBID_F16:
        unpack_row(IBID_F16, row, c0, c1, dst);
        break;
    case IBID_Q4_0:
        unpack_row(IBID_Q4_0, row, c0, c1, dst);
        break;
    case IBID_Q4_1:
        unpack_row(IBID_Q4_1, row, c0, c1, dst);
        break;
    case IBID_Q8_0:
        unpack_row(IBID_Q8_0, row, c0, c1, dst);
        break;
    case IBID_BF16:
        unpack_row(IBID_BF16, row, c0, c1, dst);
        break;
    case IBID_Q5_0:
    case IBID_Q5_1:
    case IBID_Q4_K:
    case IBID_Q5_K:
    case IBID_Q6_K:
        unpack_groups(type, row, c0, c1, dst);
        break;
    }
}

static void simd_dequantize(ibid_type type, const void *row, float *dst, size_t n) {
    size_t whole = n & ~(size_t)31;
    simd_unpack(type, row, 0, whole, dst);
    if (whole == n) return;
    float tail[32];
    simd_unpack(type, row, whole, n, tail);
    memcpy(dst + whole, tail, (n - whole) * sizeof *dst);
}

/* y[0 .. rows) = or += the four sums. */
INLINE void put4(float *y, vf a[4], size_t rows, bool add) {
    __m128 s = v_sum4(a[0], a[1], a[2], a[3]);
    if (rows == 4) {
        if (add) s = _mm_add_ps(_mm_loadu_ps(y), s);
        _mm_storeu_ps(y, s);
        return;
    }
    float f[4];
    _mm_storeu_ps(f, s);
    for (size_t i = 0; i < rows; i++) y[i] = add ? y[i] + f[i] : f[i];
}

/* N rows of x against four unpacked weight rows, k columns. */
INLINE void panel_tile(const int N, const float *w, size_t ldw, const float *x, size_t ldx,
                       size_t k, float *y, size_t ldy, size_t rows, bool add) {
    vf sum[MM_ROWS][4], xv[MM_ROWS];
    for (int i = 0; i < N; i++) {
        for (int r = 0; r < 4; r++) sum[i][r] = v_zero();
    }
    size_t c = 0;
    for (; c + VL <= k; c += VL) {
        for (int i = 0; i < N; i++) xv[i] = v_load(x + (size_t)i * ldx + c);
        for (int r = 0; r < 4; r++) {
            vf wv = v_load(w + (size_t)r * ldw + c);
            for (int i = 0; i < N; i++) sum[i][r] = v_fma(wv, xv[i], sum[i][r]);
        }
    }
    if (c < k) {
        for (int i = 0; i < N; i++) xv[i] = v_load_n(x + (size_t)i * ldx + c, k - c);
        for (int r = 0; r < 4; r++) {
            vf wv = v_load(w + (size_t)r * ldw + c);
            for (int i = 0; i < N; i++) sum[i][r] = v_fma(wv, xv[i], sum[i][r]);
        }
    }
    for (int i = 0; i < N; i++) put4(y + (size_t)i * ldy, sum[i], rows, add);
}

static void panel_tiles(size_t n, const float *w, size_t ldw, const float *x, size_t ldx, size_t k,
                        float *y, size_t ldy, size_t rows, bool add) {
    switch (n) {
    case 1:
        panel_tile(1, w, ldw, x, ldx, k, y, ldy, rows, add);
        break;
    case 2:
        panel_tile(2, w, ldw, x, ldx, k, y, ldy, rows, add);
        break;
#ifdef IBIDI_512
    case 3:
        panel_tile(3, w, ldw, x, ldx, k, y, ldy, rows, add);
        break;
    case 4:
        panel_tile(4, w, ldw, x, ldx, k, y, ldy, rows, add);
        break;
    case 5:
        panel_tile(5, w, ldw, x, ldx, k, y, ldy, rows, add);
        break;
#endif
    default:
        panel_tile(MM_ROWS, w, ldw, x, ldx, k, y, ldy, rows, add);
        break;
    }
}

static void matmul_panels(const ibid_tensor *w, size_t row0, size_t row1, const float *x,
                          size_t ldx, size_t n, float *y, size_t ldy, float *panel) {
    for (size_t p0 = row0; p0 < row1; p0 += MM_PANEL) {
        size_t rows = row1 - p0 < MM_PANEL ? row1 - p0 : MM_PANEL;
        for (size_t c0 = 0; c0 < w->cols; c0 += MM_CHUNK) {
            size_t k = w->cols - c0 < MM_CHUNK ? w->cols - c0 : MM_CHUNK;
            size_t ldw = (k + 31) & ~(size_t)31;
            for (size_t r = 0; r < rows; r++) {
                simd_unpack(w->type, (const uint8_t *)w->data + (p0 + r) * w->row_bytes, c0, c0 + k,
                            panel + r * ldw);
            }
            /* A tile always reads four rows: what lies in the spare ones is summed and dropped. */
            for (size_t r = rows; r % 4; r++) memset(panel + r * ldw, 0, ldw * sizeof *panel);
            for (size_t i = 0; i < n; i += MM_ROWS) {
                for (size_t r = 0; r < rows; r += 4) {
                    panel_tiles(n - i < MM_ROWS ? n - i : MM_ROWS, panel + r * ldw, ldw,
                                x + i * ldx + c0, ldx, k, y + i * ldy + p0 + r, ldy,
                                rows - r < 4 ? rows - r : 4, c0 > 0);
                }
            }
        }
    }
}

/* N rows of x against the weight rows [row0, row1) as stored. */
INLINE void stream(ibid_type type, const int N, const ibid_tensor *w, size_t row0, size_t row1,
                   const float *x, size_t ldx, float *y, size_t ldy) {
    for (size_t r0 = row0; r0 < row1; r0 += 4) {
        size_t rows = row1 - r0 < 4 ? row1 - r0 : 4;
        const uint8_t *row[4];
        for (size_t r = 0; r < 4; r++) { /* the last row stands in for missing ones */
            row[r] = (const uint8_t *)w->data + (r0 + (r < rows ? r : rows - 1)) * w->row_bytes;
        }
        for (size_t c0 = 0; c0 < w->cols; c0 += MM_CHUNK) {
            size_t c1 = w->cols - c0 < MM_CHUNK ? w->cols : c0 + MM_CHUNK, c = c0;
            vf sum[MM_STREAM][4], wv[32 / VL], xv[MM_STREAM][32 / VL];
            for (int i = 0; i < N; i++) {
                for (int r = 0; r < 4; r++) sum[i][r] = v_zero();
            }
            block_scale scale[MM_CHUNK / 32][4];
            block_scales(type, row, c0, c1, scale);
            for (; c + 32 <= c1; c += 32) {
                /* Four rows of a block each, in one place: ask for the place AHEAD of it. */
                const uint8_t *ahead = row[0] + 4 * row_offset(type, c) + MM_AHEAD;
                for (size_t at = 0; at < 4 * row_offset(type, 32); at += 64) {
                    _mm_prefetch((const char *)ahead + at, _MM_HINT_T0);
                }
                const block_scale *s = scale[(c - c0) / 32];
                for (int r = 0; r < 4; r++) {
                    v_weights(type, row[r], c, s[r], wv);
                    for (int j = 0; j < 32 / VL; j++) {
                        for (int i = 0; i < N; i++) {
                            vf xj = v_load(x + (size_t)i * ldx + c + (size_t)(j * VL));
                            sum[i][r] = v_fma(wv[j], xj, sum[i][r]);
                        }
                    }
                }
            }
            if (c < c1) {
                for (int i = 0; i < N; i++) {
                    for (size_t j = 0; j < 32 / VL; j++) {
                        size_t at = c + j * VL;
                        const float *xi = x + (size_t)i * ldx;
                        xv[i][j] = at < c1 ? v_load_n(xi + at, c1 - at) : v_zero();
                    }
                }
                for (int r = 0; r < 4; r++) {
                    v_weights_tail(type, row[r], c, c1 - c, wv);
                    for (size_t j = 0; j < 32 / VL && c + j * VL < c1; j++) {
                        for (int i = 0; i < N; i++) {
                            sum[i][r] = v_fma(wv[j], xv[i][j], sum[i][r]);
                        }
                    }
                }
            }
            for (int i = 0; i < N; i++) put4(y + (size_t)i * ldy + r0, sum[i], rows, c0 > 0);
        }
    }
}

INLINE void stream_type(ibid_type type, const ibid_tensor *w, size_t row0, size_t row1,
                        const float *x, size_t ldx, size_t n, float *y, size_t ldy) {
    switch (n) {
    case 1:
        stream(type, 1, w, row0, row1, x, ldx, y, ldy);
        break;
    case 2:
        stream(type, 2, w, row0, row1, x, ldx, y, ldy);
        break;
    case 3:
        stream(type, 3, w, row0, row1, x, ldx, y, ldy);
        break;
    default:
        stream(type, MM_STREAM, w, row0, row1, x, ldx, y, ldy);
        break;
    }
}

static void stream_any(const ibid_tensor *w, size_t row0, size_t row1, const float *x, size_t ldx,
                       size_t n, float *y, size_t ldy) {
    switch (w->type) {
    case IBID_F32:
        stream_type(IBID_F32, w, row0, row1, x, ldx, n, y, ldy);
        break;
    case IBID_F16:
        stream_type(IBID_F16, w, row0, row1, x, ldx, n, y, ldy);
        break;
    case IBID_Q4_0:
        stream_type(IBID_Q4_0, w, row0, row1, x, ldx, n, y, ldy);
        break;
    case IBID_Q4_1:
        stream_type(IBID_Q4_1, w, row0, row1, x, ldx, n, y, ldy);
        break;
    case IBID_BF16:
        stream_type(IBID_BF16, w, row0, row1, x, ldx, n, y, ldy);
        break;
    default:
        stream_type(IBID_Q8_0, w, row0, row1, x, ldx, n, y, ldy);
        break;
    }
}

static void simd_matmul(const ibid_tensor *w, size_t row0, size_t row1, const float *x, size_t ldx,
                        size_t n, float *y, size_t ldy, void *scratch) {
    if (n > MM_STREAMED || !streams(w->type)) {
        matmul_panels(w, row0, row1, x, ldx, n, y, ldy, scratch);
        return;
    }
    for (size_t i = 0; i < n; i += MM_STREAM) {
        size_t some = n - i < MM_STREAM ? n - i : MM_STREAM;
        stream_any(w, row0, row1, x + i * ldx, ldx, some, y + i * ldy, ldy);
    }
}

static size_t simd_matmul_scratch(size_t cols, size_t n) {
    (void)n;
    size_t chunk = cols < MM_CHUNK ? cols : MM_CHUNK;
    return MM_PANEL * ((chunk + 31) & ~(size_t)31) * sizeof(float);
}
