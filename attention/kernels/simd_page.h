/* A page's best token (ibid_page_look) by products of bytes: codes 0 to 15 unsigned, coefficients
 * signed. 256 bits for every backend: eight times the four dimensions of two tokens. */
#include <immintrin.h>

enum { PAGE_HEADS = 4 /* whose sums stay in registers */ };

/* A head's coefficients at a page, four bytes a quad. Returns 7.5 times their sum. */
static float page_coefficients(const ibid_page_look *p, size_t page, size_t head, int32_t *out) {
    __m128i sum = _mm_setzero_si128();
    for (size_t i = 0; i < p->n; i++) {
        const float *steps = p->steps + 4 * (p->quads[i] * p->room + page);
        __m128 c = _mm_mul_ps(_mm_loadu_ps(p->q + 4 * (head * p->n + i)), _mm_loadu_ps(steps));
        __m128i v = _mm_cvtps_epi32(c), w = _mm_packs_epi32(v, v);
        sum = _mm_add_epi32(sum, v);
        out[i] = _mm_cvtsi128_si32(_mm_packs_epi16(w, w));
    }
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    return 7.5f * (float)_mm_cvtsi128_si32(sum);
}

static int page_largest(__m256i v) {
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}

typedef int32_t page_bytes[IBID_PAGE_LOOK_MAX]; /* a head's coefficients */

/* most[h]: the largest sum of a token of the page. */
static inline __attribute__((always_inline)) void
page_heads(const ibid_page_look *p, size_t page, const page_bytes *c, size_t heads, int *most) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i best[PAGE_HEADS];
    for (size_t h = 0; h < heads; h++) best[h] = _mm256_set1_epi32(INT32_MIN);
    for (size_t part = 0; part < 128; part += 32) {
        __m256i even[PAGE_HEADS], odd[PAGE_HEADS];
        for (size_t h = 0; h < heads; h++) even[h] = odd[h] = _mm256_setzero_si256();
        for (size_t i = 0; i < p->n; i++) {
            const uint8_t *at = p->codes + (p->quads[i] * p->room + page) * 128 + part;
            __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)at);
            __m256i x = _mm256_and_si256(v, low);
            __m256i y = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
            for (size_t h = 0; h < heads; h++) {
                __m256i k = _mm256_set1_epi32(c[h][i]);
                even[h] = _mm256_add_epi16(even[h], _mm256_maddubs_epi16(x, k));
                odd[h] = _mm256_add_epi16(odd[h], _mm256_maddubs_epi16(y, k));
            }
        }
        for (size_t h = 0; h < heads; h++) {
            best[h] = _mm256_max_epi32(best[h], _mm256_madd_epi16(even[h], ones));
            best[h] = _mm256_max_epi32(best[h], _mm256_madd_epi16(odd[h], ones));
        }
    }
    for (size_t h = 0; h < heads; h++) most[h] = page_largest(best[h]);
}

static void page_score(const ibid_page_look *p, size_t page, float *score, size_t ld) {
    page_bytes c[PAGE_HEADS];
    float base[PAGE_HEADS];
    int most[PAGE_HEADS];
    for (size_t g = 0; g < p->group; g += PAGE_HEADS) {
        size_t heads = p->group - g < PAGE_HEADS ? p->group - g : PAGE_HEADS;
        for (size_t h = 0; h < heads; h++) base[h] = page_coefficients(p, page, g + h, c[h]);
        switch (heads) { /* constants unroll */
        case 1:
            page_heads(p, page, c, 1, most);
            break;
        case 2:
            page_heads(p, page, c, 2, most);
            break;
        case 3:
            page_heads(p, page, c, 3, most);
            break;
        default:
            page_heads(p, page, c, PAGE_HEADS, most);
        }
        for (size_t h = 0; h < heads; h++)
            score[(g + h) * ld] += p->unit[g + h] * ((float)most[h] - base[h]);
    }
}

static void simd_page_scores(const ibid_page_look *p, size_t n_pages, float *score, size_t ld) {
    for (size_t i = 0; i < n_pages; i++) page_score(p, i, score + i, ld);
}
