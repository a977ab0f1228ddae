/* Vectors of 16 floats for the simd_*.h templates: AVX-512 F, BW, VL, DQ. */
#ifndef IBID_ATTENTION_KERNELS_SIMD_AVX512_H
#define IBID_ATTENTION_KERNELS_SIMD_AVX512_H

#include "attention/kernels/internal.h"

#include <immintrin.h>

#define IBIDI_512 1
#define INLINE static inline __attribute__((always_inline))

enum {
    VL = 16,     /* lanes */
    MM_ROWS = 6, /* rows of x one matmul tile takes: 6 x 4 sums, 6 x, 1 w fill the 32 registers */
    AT_ROWS = 6, /* rows of q one attention tile takes */
    AT_VECS = 4, /* and how many vectors of columns */
    MS_ROWS = 8, /* queries one maxsim tile takes */
    MS_VECS = 2  /* and vectors of keys */
};

typedef __m512 vf;
typedef __m512i vi;

INLINE vf v_zero(void) {
    return _mm512_setzero_ps();
}
INLINE vf v_set1(float f) {
    return _mm512_set1_ps(f);
}
INLINE vf v_load(const float *p) {
    return _mm512_loadu_ps(p);
}
INLINE void v_store(float *p, vf v) {
    _mm512_storeu_ps(p, v);
}
INLINE __mmask16 first_lanes(size_t n) {
    return (__mmask16)(n >= 16 ? 0xffffu : (1u << n) - 1);
}
/* The first n lanes, the rest 0; reads no further. */
INLINE vf v_load_n(const float *p, size_t n) {
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
INLINE void v_store_n(float *p, vf v, size_t n) {
    _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
INLINE vf v_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
INLINE vf v_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
INLINE vf v_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
INLINE vf v_div(vf a, vf b) {
    return _mm512_div_ps(a, b);
}
INLINE vf v_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
INLINE vf v_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
INLINE vf v_min(vf a, vf b) {
    return _mm512_min_ps(a, b);
}
INLINE vf v_abs(vf a) {
    return _mm512_abs_ps(a);
}
INLINE float v_hmax(vf a) {
    return _mm512_reduce_max_ps(a);
}
INLINE float v_hsum(vf a) {
    return _mm512_reduce_add_ps(a);
}
/* a where bit i of bits is set, else b. */
INLINE vf v_pick(uint32_t bits, vf a, vf b) {
    return _mm512_mask_blend_ps((__mmask16)bits, b, a);
}

/* x where a > b, else y. */
INLINE vf v_where_greater(vf a, vf b, vf x, vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}

/* A bit for each lane where a > b. */
INLINE uint32_t v_greater(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}

/* The sums of a, b, c, d over their lanes, in one order always. */
INLINE __m128 v_sum4(vf a, vf b, vf c, vf d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 lo = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 hi = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 s = _mm512_add_ps(lo, hi); /* four (a, b, c, d) */
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

/* And the largest of each. */
INLINE __m128 v_max4(vf a, vf b, vf c, vf d) {
    __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 lo = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 hi = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 s = _mm512_max_ps(lo, hi);
    __m256 h = _mm256_max_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    return _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

/* exp(x), relative error below 2e-7; 0 below about -104, finite above 88. */
INLINE vf v_exp(vf x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-110.0f)), _mm512_set1_ps(88.3762589f));
    vf n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    vf p = _mm512_set1_ps(1.0f / 720);
    p = v_fma(p, r, v_set1(1.0f / 120));
    p = v_fma(p, r, v_set1(1.0f / 24));
    p = v_fma(p, r, v_set1(1.0f / 6));
    p = v_fma(p, r, v_set1(0.5f));
    p = v_fma(p, r, v_set1(1.0f));
    p = v_fma(p, r, v_set1(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Turns pairs (a, b) by the angles of VL / 2 cosines and sines. */
INLINE vf v_rotate(vf x, const float *cos, const float *sin) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    vf c = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(cos)));
    vf s = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(sin)));
    vf swapped = _mm512_permute_ps(x, 0xb1);
    return _mm512_fmaddsub_ps(x, c, _mm512_mul_ps(swapped, s));
}

/* One block's 32 weights. A table of the 16 values a nibble stands for turns each into its weight
 * by one permute, which reads only the index's low four bits. */
INLINE void v_nibbles(const uint8_t *q, vf table, vf out[2]) {
    vi i = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)q));
    out[0] = _mm512_permutexvar_ps(i, table);
    out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(i, 4), table);
}
INLINE vf v_iota(float from) {
    return _mm512_add_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_ps(from));
}
INLINE vf v_half_set1(const void *p) {
    return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(ibidi_u16_at(p))));
}
/* d, m: the block's scale and offset. */
INLINE void v_block_q4_0(const uint8_t *p, float d, vf out[2]) {
    v_nibbles(p + 2, _mm512_mul_ps(v_set1(d), v_iota(-8)), out);
}
INLINE void v_block_q4_1(const uint8_t *p, float d, float m, vf out[2]) {
    v_nibbles(p + 4, v_fma(v_set1(d), v_iota(0), v_set1(m)), out);
}
INLINE vf v_from_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
INLINE vf v_from_half(const void *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE vf v_from_bf16(const void *p) {
    vi wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE void v_to_half(void *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
/* Rounds to nearest even; v within [-127, 127]. */
INLINE void v_to_i8(int8_t *p, vf v) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

INLINE vi vi_load(const void *p) {
    return _mm512_loadu_si512(p);
}
INLINE void vi_store(void *p, vi v) {
    _mm512_storeu_si512(p, v);
}
/* VL * 4 bytes, or the first 32 and zeros. */
INLINE vi vi_load_row(const void *p, bool half) {
    if (!half) return _mm512_loadu_si512(p);
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)p));
}
INLINE vf vi_as_float(vi v) {
    return _mm512_castsi512_ps(v);
}
/* Byte b of each lane, sign-extended, as a float. */
INLINE vf vi_byte(vi v, int b) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, (unsigned)(24 - 8 * b)), 24));
}
/* The f16 in the low (0) or high (1) half of each lane. */
INLINE vf vi_half(vi v, int b) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(b ? _mm512_srli_epi32(v, 16) : v));
}

/* Transposes 16 x 16 lanes. */
INLINE void vi_transpose(vi m[16]) {
    vi t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* m[i + c]: column c of each 128-bit lane, rows i .. i + 3 */
        m[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        m[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        m[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        m[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        t[c] = _mm512_shuffle_i32x4(m[c], m[c + 4], 0x88);
        t[c + 4] = _mm512_shuffle_i32x4(m[c], m[c + 4], 0xdd);
        t[c + 8] = _mm512_shuffle_i32x4(m[c + 8], m[c + 12], 0x88);
        t[c + 12] = _mm512_shuffle_i32x4(m[c + 8], m[c + 12], 0xdd);
    }
    for (int c = 0; c < 4; c++) {
        m[c] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0x88);
        m[c + 8] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0xdd);
        m[c + 4] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0x88);
        m[c + 12] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0xdd);
    }
}

INLINE vi vi_set1(int32_t i) {
    return _mm512_set1_epi32(i);
}

/* Walsh-Hadamard over the lanes, not normalised: x with lanes h apart swapped, plus x with the
 * sign of its higher lanes turned. */
INLINE vf v_butterflies(vf x) {
    const vf one = _mm512_set1_ps(1), minus = _mm512_set1_ps(-1);
    x = v_fma(x, v_pick(0xff00, minus, one), _mm512_shuffle_f32x4(x, x, 0x4e));
    x = v_fma(x, v_pick(0xf0f0, minus, one), _mm512_shuffle_f32x4(x, x, 0xb1));
    x = v_fma(x, v_pick(0xcccc, minus, one), _mm512_permute_ps(x, 0x4e));
    return v_fma(x, v_pick(0xaaaa, minus, one), _mm512_permute_ps(x, 0xb1));
}

/* For simd_q8.h. */
enum {
    Q8_ROWS = 8,    /* rows of x a tile takes */
    Q8_AHEAD = 2048 /* bytes of weights fetched ahead of use */
};
INLINE vi vi_add(vi a, vi b) {
    return _mm512_add_epi32(a, b);
}
INLINE vi vi_sub(vi a, vi b) {
    return _mm512_sub_epi32(a, b);
}
INLINE vi vi_sll(vi a, unsigned n) {
    return _mm512_slli_epi32(a, n);
}
INLINE int32_t vi_hsum(vi a) {
    return _mm512_reduce_add_epi32(a);
}
/* To nearest even. */
INLINE vi vi_round(vf v) {
    return _mm512_cvtps_epi32(v);
}
INLINE vf vi_to_float(vi v) {
    return _mm512_cvtepi32_ps(v);
}
/* Lanes within [-128, 127], a byte each. */
INLINE void vi_store_i8(int8_t *p, vi v) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(v));
}
/* The low and the high four bits of each byte. */
INLINE vi vi_low4(vi v) {
    return _mm512_and_si512(v, _mm512_set1_epi8(15));
}
INLINE vi vi_high4(vi v) {
    return vi_low4(_mm512_srli_epi16(v, 4));
}
/* acc + the sum of four products of unsigned by signed bytes; q8_dp_small: u below 16. */
#ifdef IBIDI_VNNI
INLINE vi q8_dp(vi acc, vi u, vi x) {
    return _mm512_dpbusd_epi32(acc, u, x);
}
INLINE vi q8_dp_small(vi acc, vi u, vi x) {
    return _mm512_dpbusd_epi32(acc, u, x);
}
#else
INLINE vi q8_dp_small(vi acc, vi u, vi x) {
    vi pairs = _mm512_maddubs_epi16(u, x);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
/* Pairs of products of full bytes would saturate 16 bits: by nibbles. */
INLINE vi q8_dp(vi acc, vi u, vi x) {
    vi low = _mm512_maddubs_epi16(vi_low4(u), x), high = _mm512_maddubs_epi16(vi_high4(u), x);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(low, _mm512_set1_epi16(1)));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
}
#endif

/* For simd_attn_q8.h. */
/* 2^x, relative error below 8e-5, for x from -infinity (0) to 0. */
INLINE vf v_exp2_low(vf x) {
    vf r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x - floor(x) */
    vf p = v_fma(v_set1(0.0780245215f), r, v_set1(0.2260671556f));
    p = v_fma(p, r, v_set1(0.6958335042f));
    p = v_fma(p, r, v_set1(0.9999251962f));
    return _mm512_scalef_ps(p, x); /* by 2^floor(x) */
}
/* floor(log2(x)), x above 0. */
INLINE vf v_log2_floor(vf x) {
    return _mm512_getexp_ps(x);
}
/* The even and the odd lanes of a and b. */
INLINE void v_unzip(vf a, vf b, vf *even, vf *odd) {
    const vi at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *even = _mm512_permutex2var_ps(a, at, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(at, _mm512_set1_epi32(1)), b);
}
/* Signed bytes to unsigned ones, + 128. */
INLINE vi vi_flip_signs(vi v) {
    return _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80));
}
/* Rows of VL * 4 bytes to vectors whose lanes hold a byte of each row, columns in order. */
INLINE void vi_quads(vi m[4]) {
    const vi at = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int i = 0; i < 4; i++) m[i] = _mm512_permutexvar_epi32(at, m[i]);
    vi l01 = _mm512_unpacklo_epi8(m[0], m[1]), h01 = _mm512_unpackhi_epi8(m[0], m[1]);
    vi l23 = _mm512_unpacklo_epi8(m[2], m[3]), h23 = _mm512_unpackhi_epi8(m[2], m[3]);
    m[0] = _mm512_unpacklo_epi16(l01, l23);
    m[1] = _mm512_unpackhi_epi16(l01, l23);
    m[2] = _mm512_unpacklo_epi16(h01, h23);
    m[3] = _mm512_unpackhi_epi16(h01, h23);
}
/* Lanes of 16 bits, one vector of them; and two of those to two planes of bytes: their high bytes
 * once `half` (of every 16 bits) is added, at most 255, and their low ones. The four bytes at
 * 4 * (4i + j) are lanes 4i .. 4i + 3 of the vector j of four. */
INLINE vi vi_pack_half(vi m, vi n) {
    return _mm512_packus_epi32(m, n);
}
INLINE vi vi_high_bytes(vi a, vi b) { /* rounded, of two vectors of vi_pack_half's */
    const vi half = _mm512_set1_epi16(128);
    a = _mm512_srli_epi16(_mm512_adds_epu16(a, half), 8);
    b = _mm512_srli_epi16(_mm512_adds_epu16(b, half), 8);
    return _mm512_packus_epi16(a, b);
}
INLINE void vi_split_planes(vi a, vi b, uint16_t half, uint8_t *high, uint8_t *low) {
    const vi byte = _mm512_set1_epi16(255), add = _mm512_set1_epi16((short)half);
    vi_store(low, _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte)));
    a = _mm512_srli_epi16(_mm512_adds_epu16(a, add), 8);
    b = _mm512_srli_epi16(_mm512_adds_epu16(b, add), 8);
    vi_store(high, _mm512_packus_epi16(a, b));
}

/* For simd_maxsim.h. */
INLINE vi vi_max(vi a, vi b) {
    return _mm512_max_epi32(a, b);
}
/* index where a > b in the lane, else old. */
INLINE vi vi_pick_greater(vi a, vi b, vi index, vi old) {
    return _mm512_mask_mov_epi32(old, _mm512_cmpgt_epi32_mask(a, b), index);
}
INLINE int32_t vi_hmax(vi a) {
    return _mm512_reduce_max_epi32(a);
}
/* Bytes 0 and 2, or 1 and 3, of each lane as two numbers of 16 bits. */
INLINE vi vi_even_bytes(vi v) {
    return _mm512_and_si512(v, _mm512_set1_epi16(255));
}
INLINE vi vi_odd_bytes(vi v) {
    return _mm512_srli_epi16(v, 8);
}
INLINE vi vi_madd(vi a, vi b) {
    return _mm512_madd_epi16(a, b);
}
#endif
