/* Vectors of 8 floats for the simd_*.h templates: AVX2, FMA, F16C. */
#ifndef IBID_ATTENTION_KERNELS_SIMD_AVX2_H
#define IBID_ATTENTION_KERNELS_SIMD_AVX2_H

#include "attention/kernels/internal.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

enum {
    VL = 8,      /* lanes */
    MM_ROWS = 3, /* rows of x one matmul tile takes: 3 x 4 sums, 3 x, 1 w fill the 16 registers */
    AT_ROWS = 6, /* rows of q one attention tile takes */
    AT_VECS = 2, /* and how many vectors of columns */
    MS_ROWS = 4, /* queries one maxsim tile takes */
    MS_VECS = 2  /* and vectors of keys */
};

typedef __m256 vf;
typedef __m256i vi;

INLINE vf v_zero(void) {
    return _mm256_setzero_ps();
}
INLINE vf v_set1(float f) {
    return _mm256_set1_ps(f);
}
INLINE vf v_load(const float *p) {
    return _mm256_loadu_ps(p);
}
INLINE void v_store(float *p, vf v) {
    _mm256_storeu_ps(p, v);
}
INLINE vi first_lanes(size_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n >= 8 ? 8 : (int)n),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
/* The first n lanes, the rest 0; reads no further. */
INLINE vf v_load_n(const float *p, size_t n) {
    return _mm256_maskload_ps(p, first_lanes(n));
}
INLINE void v_store_n(float *p, vf v, size_t n) {
    _mm256_maskstore_ps(p, first_lanes(n), v);
}
INLINE vf v_add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
INLINE vf v_sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
INLINE vf v_mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
INLINE vf v_div(vf a, vf b) {
    return _mm256_div_ps(a, b);
}
INLINE vf v_fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
INLINE vf v_max(vf a, vf b) {
    return _mm256_max_ps(a, b);
}
INLINE vf v_min(vf a, vf b) {
    return _mm256_min_ps(a, b);
}
INLINE vf v_abs(vf a) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}
INLINE float v_hmax(vf a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
INLINE float v_hsum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
/* a where bit i of bits is set, else b. */
INLINE vf v_pick(uint32_t bits, vf a, vf b) {
    const vi lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    vi set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane);
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(set));
}

/* x where a > b, else y. */
INLINE vf v_where_greater(vf a, vf b, vf x, vf y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

/* A bit for each lane where a > b. */
INLINE uint32_t v_greater(vf a, vf b) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

/* The sums of a, b, c, d over their lanes, in one order always. */
INLINE __m128 v_sum4(vf a, vf b, vf c, vf d) {
    __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 lo = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
    __m256 hi = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
    __m256 s = _mm256_add_ps(lo, hi); /* two (a, b, c, d) */
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

/* And the largest of each. */
INLINE __m128 v_max4(vf a, vf b, vf c, vf d) {
    __m256 ab = _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 cd = _mm256_max_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 lo = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
    __m256 hi = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
    __m256 s = _mm256_max_ps(lo, hi);
    return _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

/* exp(x), relative error below 2e-7; 0 below about -87, finite above 88. */
INLINE vf v_exp(vf x) {
    const vf low = _mm256_set1_ps(-87.0f);
    vf tiny = _mm256_cmp_ps(x, low, _CMP_LT_OQ);
    x = _mm256_min_ps(_mm256_max_ps(x, low), _mm256_set1_ps(88.3762589f));
    vf n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    vf p = _mm256_set1_ps(1.0f / 720);
    p = v_fma(p, r, v_set1(1.0f / 120));
    p = v_fma(p, r, v_set1(1.0f / 24));
    p = v_fma(p, r, v_set1(1.0f / 6));
    p = v_fma(p, r, v_set1(0.5f));
    p = v_fma(p, r, v_set1(1.0f));
    p = v_fma(p, r, v_set1(1.0f));
    vi power =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(tiny, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

/* Turns pairs (a, b) by the angles of VL / 2 cosines and sines. */
INLINE vf v_rotate(vf x, const float *cos, const float *sin) {
    const vi twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    vf c = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cos)), twice);
    vf s = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(sin)), twice);
    vf swapped = _mm256_permute_ps(x, 0xb1);
    return _mm256_fmaddsub_ps(x, c, _mm256_mul_ps(swapped, s));
}

/* One block's 32 weights d * q + m. */
INLINE void v_nibbles(const uint8_t *q, vf d, vf m, vf out[4]) {
    const vi low = _mm256_set1_epi32(15);
    for (int j = 0; j < 2; j++) {
        vi i = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(q + 8 * j)));
        out[j] = v_fma(_mm256_cvtepi32_ps(_mm256_and_si256(i, low)), d, m);
        out[j + 2] = v_fma(_mm256_cvtepi32_ps(_mm256_srli_epi32(i, 4)), d, m);
    }
}
INLINE vf v_half_set1(const void *p) {
    return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(ibidi_u16_at(p))));
}
/* d, m: the block's scale and offset. */
INLINE void v_block_q4_0(const uint8_t *p, float d, vf out[4]) {
    v_nibbles(p + 2, v_set1(d), v_set1(-8 * d), out);
}
INLINE void v_block_q4_1(const uint8_t *p, float d, float m, vf out[4]) {
    v_nibbles(p + 4, v_set1(d), v_set1(m), out);
}
INLINE vf v_from_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}
INLINE vf v_from_half(const void *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE vf v_from_bf16(const void *p) {
    vi wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE void v_to_half(void *p, vf v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
/* Rounds to nearest even; v within [-127, 127]. */
INLINE void v_to_i8(int8_t *p, vf v) {
    vi i = _mm256_cvtps_epi32(v);
    __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packs_epi16(w, w));
}

INLINE vi vi_load(const void *p) {
    return _mm256_loadu_si256((const __m256i *)p);
}
INLINE void vi_store(void *p, vi v) {
    _mm256_storeu_si256((__m256i *)p, v);
}
/* VL * 4 bytes, or the first 32 and zeros: here both are the same. */
INLINE vi vi_load_row(const void *p, bool half) {
    (void)half;
    return _mm256_loadu_si256((const __m256i *)p);
}
INLINE vf vi_as_float(vi v) {
    return _mm256_castsi256_ps(v);
}
/* Byte b of each lane, sign-extended, as a float. */
INLINE vf vi_byte(vi v, int b) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * b), 24));
}
/* The f16 in the low (0) or high (1) half of each lane. */
INLINE vf vi_half(vi v, int b) {
    vi low = b ? _mm256_srli_epi32(v, 16) : _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
    vi both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(both));
}

/* Transposes 8 x 8 lanes. */
INLINE void vi_transpose(vi m[8]) {
    vi t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(m[i], m[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) { /* m[i + c]: column c of each 128-bit lane, rows i .. i + 3 */
        m[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        m[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        m[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        m[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        t[c] = _mm256_permute2x128_si256(m[c], m[c + 4], 0x20);
        t[c + 4] = _mm256_permute2x128_si256(m[c], m[c + 4], 0x31);
    }
    for (int c = 0; c < 8; c++) m[c] = t[c];
}

INLINE vi vi_set1(int32_t i) {
    return _mm256_set1_epi32(i);
}

/* Walsh-Hadamard over the lanes, not normalised: x with lanes h apart swapped, plus x with the
 * sign of its higher lanes turned. */
INLINE vf v_butterflies(vf x) {
    const vf one = _mm256_set1_ps(1), minus = _mm256_set1_ps(-1);
    x = v_fma(x, v_pick(0xf0, minus, one), _mm256_permute2f128_ps(x, x, 0x01));
    x = v_fma(x, v_pick(0xcc, minus, one), _mm256_permute_ps(x, 0x4e));
    return v_fma(x, v_pick(0xaa, minus, one), _mm256_permute_ps(x, 0xb1));
}

/* For simd_q8.h. */
enum {
    Q8_ROWS = 4,    /* rows of x a tile takes */
    Q8_AHEAD = 2048 /* bytes of weights fetched ahead of use */
};
INLINE vi vi_add(vi a, vi b) {
    return _mm256_add_epi32(a, b);
}
INLINE vi vi_sub(vi a, vi b) {
    return _mm256_sub_epi32(a, b);
}
INLINE vi vi_sll(vi a, unsigned n) {
    return _mm256_slli_epi32(a, (int)n);
}
INLINE int32_t vi_hsum(vi a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
/* To nearest even. */
INLINE vi vi_round(vf v) {
    return _mm256_cvtps_epi32(v);
}
INLINE vf vi_to_float(vi v) {
    return _mm256_cvtepi32_ps(v);
}
/* Lanes within [-128, 127], a byte each. */
INLINE void vi_store_i8(int8_t *p, vi v) {
    __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packs_epi16(w, w));
}
/* The low and the high four bits of each byte. */
INLINE vi vi_low4(vi v) {
    return _mm256_and_si256(v, _mm256_set1_epi8(15));
}
INLINE vi vi_high4(vi v) {
    return vi_low4(_mm256_srli_epi16(v, 4));
}
/* acc + the sum of four products of unsigned by signed bytes; q8_dp_small: u below 16. */
#ifdef IBIDI_VNNI
/* All that AVX-VNNI adds. Without it this is compiled for tests only, whose CPUs may know the same
 * instruction by its AVX-512 VL encoding (tests/attention/avxvnni_evex.c). */
INLINE vi vi_dpbusd(vi acc, vi u, vi x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, u, x);
#else
    return _mm256_dpbusd_epi32(acc, u, x);
#endif
}
INLINE vi q8_dp(vi acc, vi u, vi x) {
    return vi_dpbusd(acc, u, x);
}
INLINE vi q8_dp_small(vi acc, vi u, vi x) {
    return vi_dpbusd(acc, u, x);
}
#else
INLINE vi q8_dp_small(vi acc, vi u, vi x) {
    vi pairs = _mm256_maddubs_epi16(u, x);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
/* Pairs of products of full bytes would saturate 16 bits: by nibbles. */
INLINE vi q8_dp(vi acc, vi u, vi x) {
    vi low = _mm256_maddubs_epi16(vi_low4(u), x), high = _mm256_maddubs_epi16(vi_high4(u), x);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
}
#endif

/* For simd_attn_q8.h. */
/* 2^x, relative error below 8e-5, for x <= 0; 0 below -100. */
INLINE vf v_exp2_low(vf x) {
    const vf low = _mm256_set1_ps(-100.0f);
    vf tiny = _mm256_cmp_ps(x, low, _CMP_LT_OQ);
    x = _mm256_max_ps(x, low);
    vf n = _mm256_floor_ps(x), r = _mm256_sub_ps(x, n);
    vf p = v_fma(v_set1(0.0780245215f), r, v_set1(0.2260671556f));
    p = v_fma(p, r, v_set1(0.6958335042f));
    p = v_fma(p, r, v_set1(0.9999251962f));
    vi bits =
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
    return _mm256_andnot_ps(tiny, _mm256_castsi256_ps(bits));
}
/* floor(log2(x)), x above 0 and not tiny. */
INLINE vf v_log2_floor(vf x) {
    vi exponent = _mm256_srli_epi32(_mm256_castps_si256(x), 23);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(exponent, _mm256_set1_epi32(127)));
}
/* The even and the odd lanes of a and b. */
INLINE void v_unzip(vf a, vf b, vf *even, vf *odd) {
    __m256d e = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    __m256d o = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
    *even = _mm256_castpd_ps(_mm256_permute4x64_pd(e, 0xd8));
    *odd = _mm256_castpd_ps(_mm256_permute4x64_pd(o, 0xd8));
}
/* Signed bytes to unsigned ones, + 128. */
INLINE vi vi_flip_signs(vi v) {
    return _mm256_xor_si256(v, _mm256_set1_epi8((char)0x80));
}
/* Rows of VL * 4 bytes to vectors whose lanes hold a byte of each row, columns in order. */
INLINE void vi_quads(vi m[4]) {
    const vi at = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (int i = 0; i < 4; i++) m[i] = _mm256_permutevar8x32_epi32(m[i], at);
    vi l01 = _mm256_unpacklo_epi8(m[0], m[1]), h01 = _mm256_unpackhi_epi8(m[0], m[1]);
    vi l23 = _mm256_unpacklo_epi8(m[2], m[3]), h23 = _mm256_unpackhi_epi8(m[2], m[3]);
    m[0] = _mm256_unpacklo_epi16(l01, l23);
    m[1] = _mm256_unpackhi_epi16(l01, l23);
    m[2] = _mm256_unpacklo_epi16(h01, h23);
    m[3] = _mm256_unpackhi_epi16(h01, h23);
}
/* Lanes of 16 bits, one vector of them; and two of those to two planes of bytes: their high bytes
 * once `half` (of every 16 bits) is added, at most 255, and their low ones. The four bytes at
 * 4 * (4i + j) are lanes 4i .. 4i + 3 of the vector j of four. */
INLINE vi vi_pack_half(vi m, vi n) {
    return _mm256_packus_epi32(m, n);
}
INLINE vi vi_high_bytes(vi a, vi b) { /* rounded, of two vectors of vi_pack_half's */
    const vi half = _mm256_set1_epi16(128);
    a = _mm256_srli_epi16(_mm256_adds_epu16(a, half), 8);
    b = _mm256_srli_epi16(_mm256_adds_epu16(b, half), 8);
    return _mm256_packus_epi16(a, b);
}
INLINE void vi_split_planes(vi a, vi b, uint16_t half, uint8_t *high, uint8_t *low) {
    const vi byte = _mm256_set1_epi16(255), add = _mm256_set1_epi16((short)half);
    vi_store(low, _mm256_packus_epi16(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte)));
    a = _mm256_srli_epi16(_mm256_adds_epu16(a, add), 8);
    b = _mm256_srli_epi16(_mm256_adds_epu16(b, add), 8);
    vi_store(high, _mm256_packus_epi16(a, b));
}

/* For simd_maxsim.h. */
INLINE vi vi_max(vi a, vi b) {
    return _mm256_max_epi32(a, b);
}
/* index where a > b in the lane, else old. */
INLINE vi vi_pick_greater(vi a, vi b, vi index, vi old) {
    return _mm256_blendv_epi8(old, index, _mm256_cmpgt_epi32(a, b));
}
INLINE int32_t vi_hmax(vi a) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
/* Bytes 0 and 2, or 1 and 3, of each lane as two numbers of 16 bits. */
INLINE vi vi_even_bytes(vi v) {
    return _mm256_and_si256(v, _mm256_set1_epi16(255));
}
INLINE vi vi_odd_bytes(vi v) {
    return _mm256_srli_epi16(v, 8);
}
INLINE vi vi_madd(vi a, vi b) {
    return _mm256_madd_epi16(a, b);
}
#endif
