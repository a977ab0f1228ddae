/* Every vector backend this CPU runs, against the reference; and the reference's own corner cases.
 * Random inputs come from one fixed seed, printed at the start. */
#include "attention/kernels/kernels.h"

#include "rpc/base/mem.h"
#ifdef IBID_TEST_EVEX
#include "tests/attention/avxvnni_evex.h"
#endif

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SEED UINT64_C(0x1b1d5eed)

static uint64_t rng_state;

static uint32_t rnd(void) { /* splitmix64 */
    uint64_t z = rng_state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

static float rnd_float(float scale) { /* in [-scale, scale) */
    return scale * ((float)(rnd() >> 8) * 0x1p-23f - 1);
}

static void fill(float *x, size_t n, float scale) {
    for (size_t i = 0; i < n; i++) x[i] = rnd_float(scale);
}

static void *need(size_t bytes) {
    void *p = ibid_alloc_aligned(64, bytes ? bytes : 64);
    assert_non_null(p);
    memset(p, 0, bytes);
    return p;
}

static const ibid_kernels *ref;
static const ibid_kernels *tested[8];
static size_t n_tested;
static const ibid_kernels *fastest;

static void find_backends(void) {
    for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
        if (strcmp((*k)->name, "reference") == 0)
            ref = *k;
        else if ((*k)->supported())
            tested[n_tested++] = *k;
        else
            printf("skipped, as this CPU cannot run it: %s\n", (*k)->name);
    }
    fastest = n_tested ? tested[n_tested - 1] : ref;
#ifdef IBID_TEST_EVEX
    if (avxvnni_evex.supported()) tested[n_tested++] = &avxvnni_evex;
#endif
    printf("seed 0x%llx, backends:", (unsigned long long)SEED);
    for (size_t i = 0; i < n_tested; i++) printf(" %s", tested[i]->name);
    printf("\n");
}

/* Weights in a block, its bytes, and where its f16 numbers lie (a second one at 0: none). */
typedef struct block_shape {
    size_t cols, bytes, d, m;
} block_shape;

static block_shape shape_of(ibid_type type) {
    switch (type) {
    case IBID_F32:
        return (block_shape){1, 4, 0, 0};
    case IBID_F16:
    case IBID_BF16:
        return (block_shape){1, 2, 0, 0};
    case IBID_Q4_0:
        return (block_shape){32, 18, 0, 0};
    case IBID_Q4_1:
        return (block_shape){32, 20, 0, 2};
    case IBID_Q5_0:
        return (block_shape){32, 22, 0, 0};
    case IBID_Q5_1:
        return (block_shape){32, 24, 0, 2};
    case IBID_Q8_0:
        return (block_shape){32, 34, 0, 0};
    case IBID_Q4_K:
        return (block_shape){256, 144, 0, 2};
    case IBID_Q5_K:
        return (block_shape){256, 176, 0, 2};
    case IBID_Q6_K:
        return (block_shape){256, 210, 208, 0};
    }
    abort();
}

static bool fits(ibid_type type, size_t cols) {
    return cols % shape_of(type).cols == 0;
}

/* cols, or the next larger number of them that is whole blocks. */
static size_t whole(ibid_type type, size_t cols) {
    size_t block = shape_of(type).cols;
    return (cols + block - 1) / block * block;
}

static void put_u16(uint8_t *p, uint16_t v) {
    memcpy(p, &v, 2);
}

static ibid_tensor random_weights(ibid_type type, size_t rows, size_t cols, float scale) {
    block_shape s = shape_of(type);
    size_t bytes = cols / s.cols * s.bytes;
    uint8_t *p = need(rows * bytes);
    ibid_tensor t = {.type = type, .rows = rows, .cols = cols, .row_bytes = bytes, .data = p};
    if (type == IBID_F32) {
        fill((float *)(void *)p, rows * cols, scale);
        return t;
    }
    if (type == IBID_F16) {
        for (size_t i = 0; i < rows * cols; i++)
            put_u16(p + 2 * i, ibid_f32_to_f16(rnd_float(scale)));
        return t;
    }
    if (type == IBID_BF16) {
        for (size_t i = 0; i < rows * cols; i++) {
            float f = rnd_float(scale);
            memcpy(p + 2 * i, (const uint8_t *)&f + 2, 2);
        }
        return t;
    }
    for (size_t i = 0; i < rows * bytes; i++) p[i] = (uint8_t)rnd();
    float part = s.cols == 256 ? 1.0f / 64 : 1; /* K types multiply by factors of their own */
    for (size_t b = 0; b < rows * cols / s.cols; b++, p += s.bytes) {
        put_u16(p + s.d, ibid_f32_to_f16(rnd_float(scale * part / 8)));
        if (s.m) put_u16(p + s.m, ibid_f32_to_f16(rnd_float(scale * part)));
    }
    return t;
}

static const ibid_type all_types[] = {IBID_F32,  IBID_F16,  IBID_Q4_0, IBID_Q4_1,
                                      IBID_Q8_0, IBID_Q5_0, IBID_Q5_1, IBID_Q4_K,
                                      IBID_Q5_K, IBID_Q6_K, IBID_BF16};
static const size_t n_types = sizeof all_types / sizeof *all_types;

/* ---- f16 ---- */

/* By the definition of the format, without bit tricks. */
static double half_value(uint32_t h) {
    double sign = h & 0x8000 ? -1 : 1;
    int exp = (int)(h >> 10 & 31);
    double frac = (double)(h & 0x3ff);
    if (exp == 31) return frac > 0 ? (double)NAN : sign * (double)INFINITY;
    return sign * (exp ? ldexp(1024 + frac, exp - 25) : ldexp(frac, -24));
}

static void test_f16_exhaustive(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        double want = half_value(h);
        float got = ibid_f16_to_f32((uint16_t)h);
        if (isnan(want)) {
            assert_true(isnan(got) != 0);
            assert_true(isnan(ibid_f16_to_f32(ibid_f32_to_f16(got))) != 0);
            continue;
        }
        assert_true((double)got == want && !signbit(got) == !(h & 0x8000));
        assert_int_equal(ibid_f32_to_f16(got), h);
    }
}

/* Between two neighbours everything rounds to the nearer one, the middle to the even one. */
static void test_f16_rounding(void **state) {
    (void)state;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        double a = half_value(h), b = h == 0x7bff ? 65536 : half_value(h + 1);
        float middle = (float)((a + b) / 2); /* exact: one bit more than f16 holds */
        uint32_t even = h & 1 ? h + 1 : h;
        assert_int_equal(ibid_f32_to_f16(middle), even);
        assert_int_equal(ibid_f32_to_f16(-middle), even | 0x8000);
        assert_int_equal(ibid_f32_to_f16(nextafterf(middle, 0)), h);
        assert_int_equal(ibid_f32_to_f16(nextafterf(middle, INFINITY)), h + 1);
    }
    assert_int_equal(ibid_f32_to_f16(1e30f), 0x7c00);
    assert_int_equal(ibid_f32_to_f16(-INFINITY), 0xfc00);
    assert_int_equal(ibid_f32_to_f16(1e-30f), 0);
}

/* ---- dispatch ---- */

static void test_get(void **state) {
    (void)state;
    const ibid_kernels *k = NULL;
    unsetenv("IBID_KERNELS");
    assert_int_equal(ibid_kernels_get(NULL, &k), IBID_OK);
    assert_ptr_equal(k, fastest);
    assert_int_equal(ibid_kernels_get("reference", &k), IBID_OK);
    assert_ptr_equal(k, ref);
    setenv("IBID_KERNELS", "reference", 1);
    assert_int_equal(ibid_kernels_get(NULL, &k), IBID_OK);
    assert_ptr_equal(k, ref);
    setenv("IBID_KERNELS", "abacus", 1);
    assert_int_equal(ibid_kernels_get(NULL, &k), IBID_NOTFOUND);
    assert_non_null(strstr(ibid_err_detail(), "reference"));
    unsetenv("IBID_KERNELS");
    for (const ibid_kernels *const *p = ibid_kernels_all(); *p; p++) {
        ibid_err want = (*p)->supported() ? IBID_OK : IBID_NOTSUP;
        assert_int_equal(ibid_kernels_get((*p)->name, &k), want);
    }
}

/* ---- weights ---- */

/* One block of each type by hand, from the layouts' definitions. */
static void test_dequantize_known(void **state) {
    (void)state;
    uint8_t q4_0[18] = {0}, q4_1[20] = {0}, q8_0[34] = {0};
    put_u16(q4_0, ibid_f32_to_f16(0.5f));
    put_u16(q4_1, ibid_f32_to_f16(0.5f));
    put_u16(q4_1 + 2, ibid_f32_to_f16(-3));
    put_u16(q8_0, ibid_f32_to_f16(0.25f));
    for (uint8_t j = 0; j < 16; j++) {
        q4_0[2 + j] = q4_1[4 + j] = (uint8_t)(j | (15 - j) << 4);
    }
    for (int j = 0; j < 32; j++) q8_0[2 + j] = (uint8_t)(int8_t)(j * 8 - 128);
    for (size_t b = 0; b <= n_tested; b++) {
        const ibid_kernels *k = b < n_tested ? tested[b] : ref;
        float out[32];
        k->dequantize(IBID_Q4_0, q4_0, out, 32);
        for (int j = 0; j < 16; j++) {
            assert_true(out[j] == 0.5f * (float)(j - 8));
            assert_true(out[j + 16] == 0.5f * (float)(15 - j - 8));
        }
        k->dequantize(IBID_Q4_1, q4_1, out, 32);
        for (int j = 0; j < 16; j++) {
            assert_true(out[j] == 0.5f * (float)j - 3);
            assert_true(out[j + 16] == 0.5f * (float)(15 - j) - 3);
        }
        k->dequantize(IBID_Q8_0, q8_0, out, 32);
        for (int j = 0; j < 32; j++) assert_true(out[j] == 0.25f * (float)(j * 8 - 128));
    }
}

static void test_dequantize_equal(void **state) {
    (void)state;
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t i = 0; i < n_types; i++) {
            for (size_t cols = 1; cols <= 1536; cols = cols < 40 ? cols + 1 : cols * 2 + 32) {
                if (!fits(all_types[i], cols)) continue;
                ibid_tensor w = random_weights(all_types[i], 1, cols, 1);
                float *want = need((cols + 1) * 4), *got = need((cols + 1) * 4);
                want[cols] = got[cols] = 42; /* nothing past the end is written */
                ref->dequantize(w.type, w.data, want, cols);
                tested[b]->dequantize(w.type, w.data, got, cols);
                /* equal as numbers: a zero weight may have either sign */
                for (size_t c = 0; c <= cols; c++) assert_true(got[c] == want[c]);
                ibid_free(want);
                ibid_free(got);
                ibid_free((void *)(uintptr_t)w.data);
            }
        }
    }
}

/* y against the reference: off by at most tol of the sum of |w| |x|, which bounds rounding whatever
 * the signs. */
static void check_products(const ibid_kernels *k, const ibid_tensor *w, const float *x, size_t ldx,
                           size_t n, double tol) {
    size_t ldy = w->rows + 3;
    float *want = need(n * ldy * 4), *got = need(n * ldy * 4), *row = need(w->cols * 4);
    void *scratch = need(k->matmul_scratch(w->cols, n));
    void *ref_scratch = need(ref->matmul_scratch(w->cols, n));
    for (size_t i = 0; i < n * ldy; i++) got[i] = 42;
    ref->matmul(w, 0, w->rows, x, ldx, n, want, ldy, ref_scratch);
    size_t cut = w->rows / 3; /* two calls: absolute row numbers */
    k->matmul(w, 0, cut, x, ldx, n, got, ldy, scratch);
    k->matmul(w, cut, w->rows, x, ldx, n, got, ldy, scratch);
    for (size_t r = 0; r < w->rows; r++) {
        ref->dequantize(w->type, (const uint8_t *)w->data + r * w->row_bytes, row, w->cols);
        for (size_t i = 0; i < n; i++) {
            double size = 1e-37;
            for (size_t c = 0; c < w->cols; c++)
                size += fabs((double)row[c] * (double)x[i * ldx + c]);
            double off = fabs((double)got[i * ldy + r] - (double)want[i * ldy + r]);
            if (!(off <= tol * size)) {
                fail_msg("%s type %d [%zu, %zu] n %zu: y[%zu, %zu] = %g, reference %g", k->name,
                         (int)w->type, w->rows, w->cols, n, i, r, (double)got[i * ldy + r],
                         (double)want[i * ldy + r]);
            }
        }
    }
    for (size_t i = 0; i < n; i++) {
        for (size_t r = w->rows; r < ldy; r++) assert_true(got[i * ldy + r] == 42);
    }
    ibid_free(want);
    ibid_free(got);
    ibid_free(row);
    ibid_free(scratch);
    ibid_free(ref_scratch);
}

static void test_matmul(void **state) {
    (void)state;
    const size_t ns[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 200};
    const size_t rows[] = {1, 7, 64, 100};
    const size_t cols[] = {32, 64, 96, 576, 768, 800, 1536};
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t t = 0; t < n_types; t++) {
            for (size_t i = 0; i < sizeof ns / sizeof *ns; i++) {
                size_t n = ns[i], r = rows[(i + t) % 4];
                size_t c = whole(all_types[t], cols[(i + 3 * t + b) % 7]), ldx = c + 5;
                ibid_tensor w = random_weights(all_types[t], r, c, 0.3f);
                float *x = need(n * ldx * 4);
                fill(x, n * ldx, 2);
                check_products(tested[b], &w, x, ldx, n, 1e-6);
                ibid_free(x);
                ibid_free((void *)(uintptr_t)w.data);
            }
        }
    }
}

/* Rows of any length of types without blocks; nothing past the end of x is read (ASan builds see
 * it). */
static void test_matmul_odd_columns(void **state) {
    (void)state;
    const size_t cols[] = {1, 7, 15, 17, 31, 33, 63, 100, 577, 769, 1000};
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t t = 0; t < n_types; t++) {
            if (!fits(all_types[t], 1)) continue;
            for (size_t j = 0; j < sizeof cols / sizeof *cols; j++) {
                for (size_t n = 1; n <= 9; n += 2) {
                    ibid_tensor w = random_weights(all_types[t], 9, cols[j], 1);
                    float *x = need(n * cols[j] * 4);
                    fill(x, n * cols[j], 1);
                    check_products(tested[b], &w, x, cols[j], n, 1e-6);
                    ibid_free(x);
                    ibid_free((void *)(uintptr_t)w.data);
                }
            }
        }
    }
}

static void test_matmul_extremes(void **state) {
    (void)state;
    const float scales[] = {0, 1e-30f, 1e4f};
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t t = 0; t < n_types; t++) {
            for (size_t s = 0; s < 3; s++) {
                for (size_t n = 1; n <= 7; n += 3) {
                    size_t cols = whole(all_types[t], 320);
                    ibid_tensor w = random_weights(all_types[t], 10, cols, 100);
                    float *x = need(n * cols * 4);
                    fill(x, n * cols, scales[s]);
                    check_products(tested[b], &w, x, cols, n, 1e-6);
                    ibid_free(x);
                    ibid_free((void *)(uintptr_t)w.data);
                }
            }
        }
    }
}

/* The contract: a row of x gives the same bits whatever stands beside it and however rows are
 * split. */
static void test_matmul_same_bits(void **state) {
    (void)state;
    enum { N = 23, ROWS = 75, COLS = 1536 };
    for (size_t b = 0; b < n_tested; b++) {
        const ibid_kernels *k = tested[b];
        for (size_t t = 0; t < n_types; t++) {
            ibid_tensor w = random_weights(all_types[t], ROWS, COLS, 0.5f);
            float *x = need(N * COLS * 4), *one = need(N * ROWS * 4), *all = need(N * ROWS * 4);
            void *scratch = need(k->matmul_scratch(COLS, N));
            fill(x, N * COLS, 1);
            for (size_t i = 0; i < N; i++) {
                for (size_t r = 0; r < ROWS; r += 10) {
                    size_t end = r + 10 < ROWS ? r + 10 : ROWS;
                    k->matmul(&w, r, end, x + i * COLS, COLS, 1, one + i * ROWS, ROWS, scratch);
                }
            }
            for (size_t n = 1; n <= N; n++) {
                k->matmul(&w, 0, ROWS, x, COLS, n, all, ROWS, scratch);
                assert_memory_equal(all, one, n * ROWS * 4);
            }
            ibid_free(x);
            ibid_free(one);
            ibid_free(all);
            ibid_free(scratch);
            ibid_free((void *)(uintptr_t)w.data);
        }
    }
}

enum { Q8_EVEN, Q8_ONE_HUGE, Q8_ZERO_GROUPS, Q8_SUBNORMAL, Q8_KINDS };

/* Activations as they are met at worst, by groups of 32. */
static void q8_shape(float *x, size_t cols, int kind) {
    for (size_t g = 0; g < cols / 32; g++, x += 32) {
        if (kind == Q8_ONE_HUGE) x[rnd() % 32] *= 3000;
        if (kind == Q8_ZERO_GROUPS && g % 2 == 0) memset(x, 0, 32 * sizeof *x);
        for (size_t c = 0; kind == Q8_SUBNORMAL && g % 2 == 0 && c < 32; c++)
            x[c] = rnd_float(1e-41f);
    }
}

/* Rows [from, to) alone: the same bits, and nothing else written. */
static void check_q8_window(const ibid_kernels *k, const ibid_panels *w, const void *xq, size_t n,
                            const float *all, size_t ldy, size_t from, size_t to) {
    float *y = need(n * ldy * 4);
    for (size_t i = 0; i < n * ldy; i++) y[i] = 42;
    k->matmul_q8(w, from, to, xq, n, y, ldy);
    for (size_t i = 0; i < n * ldy; i++) {
        bool in = i % ldy >= from && i % ldy < to;
        assert_true(in ? memcmp(&y[i], &all[i], 4) == 0 : y[i] == 42);
    }
    ibid_free(y);
}

/* The promised bound on int8 activations, and the same bits however rows are grouped. */
static void check_q8(const ibid_kernels *k, ibid_type type, float fine_above, size_t n, size_t rows,
                     size_t cols, float scale, int kind) {
    ibid_tensor w = random_weights(type, rows, cols, 0.5f);
    ibid_panels panels;
    assert_true(ibid_panels_shape(&w, &panels));
    uint8_t *packed = need(ibid_panels_bytes(&panels));
    for (size_t i = 0; i * IBID_PANEL_ROWS < rows; i++)
        ibid_panels_pack(&panels, &w, i, packed + i * panels.panel_bytes);
    panels.data = packed;
    size_t ldx = cols + 7, ldy = rows + 3, each = k->q8_bytes(cols);
    size_t half = rows / 2 / IBID_PANEL_ROWS * IBID_PANEL_ROWS;
    double steps = fine_above > 0 ? 254 : 254 * 128;
    /* Panels keep d and m of K types as f16; as random_weights makes them, d u and m are within 4.5
     */
    bool halves = shape_of(type).cols == 256;
    float *x = need(n * ldx * 4), *want = need(n * ldy * 4), *got = need(n * ldy * 4);
    float *one = need(ldy * 4), *row = need(cols * 4);
    size_t n_tiles = (n + IBID_Q8_TILE - 1) / IBID_Q8_TILE;
    uint8_t *xq = need(n_tiles * each), *own = need(each);
    void *ref_scratch = need(cols * 4);
    fill(x, n * ldx, scale);
    for (size_t i = 0; i < n; i++) q8_shape(x + i * ldx, cols, kind);
    for (size_t c = 0; c < 32; c++) x[c] = 0;
    for (size_t i = 0; i < n * ldy; i++) got[i] = 42;
    k->q8_pack(x, ldx, n, cols, fine_above, xq);
    k->matmul_q8(&panels, 0, half, xq, n, got, ldy);
    k->matmul_q8(&panels, half, rows, xq, n, got, ldy);
    ref->matmul(&w, 0, rows, x, ldx, n, want, ldy, ref_scratch);
    for (size_t r = 0; r < rows; r++) {
        ref->dequantize(type, (const uint8_t *)w.data + r * w.row_bytes, row, cols);
        for (size_t i = 0; i < n; i++) {
            double bound = 1e-37;
            for (size_t g = 0; g < cols; g += 32) {
                double max = 0, sum = 0, product = 0, x_sum = 0;
                for (size_t c = g; c < g + 32; c++) {
                    double v = fabs((double)x[i * ldx + c]), u = fabs((double)row[c]);
                    max = fmax(max, v);
                    sum += u;
                    x_sum += v;
                    product += u * v;
                }
                /* d * u and m may cancel, so f32 rounding counts in units of 256 steps */
                bound += sum * max / steps * 1.0001 + 1e-5 * (product + max);
                if (halves) bound += x_sum * 4.5 * 0x1p-11;
            }
            double off = fabs((double)got[i * ldy + r] - (double)want[i * ldy + r]);
            if (!(off <= bound)) {
                fail_msg("q8 type %d n %zu: y[%zu, %zu] = %g, reference %g", (int)type, n, i, r,
                         (double)got[i * ldy + r], (double)want[i * ldy + r]);
            }
        }
    }
    for (size_t i = 0; i < n; i++) {
        k->q8_pack(x + i * ldx, ldx, 1, cols, fine_above, own);
        k->matmul_q8(&panels, 0, rows, own, 1, one, ldy);
        assert_memory_equal(one, got + i * ldy, rows * 4);
        for (size_t r = rows; r < ldy; r++) assert_true(got[i * ldy + r] == 42);
    }
    if (rows > 16) check_q8_window(k, &panels, xq, n, got, ldy, 16, rows > 21 ? 21 : rows);
    void *all[] = {x, want, got, one, row, xq, own, packed, ref_scratch, (void *)(uintptr_t)w.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ibid_free(all[i]);
}

static void test_matmul_q8(void **state) {
    (void)state;
    const size_t ns[] = {1, 2, 5, 6, 7, 9, 63, 65}, rows[] = {1, 7, 16, 17, 64, 100};
    const size_t cols[] = {32, 64, 96, 576, 1536};
    const float scales[] = {1, 0, 1e-30f, 1e4f}, fine[] = {INFINITY, 1.0f, 0};
    size_t done = 0;
    for (size_t b = 0; b < n_tested; b++) {
        const ibid_kernels *k = tested[b];
        assert_true(!k->matmul_q8 == !k->q8_pack && !k->matmul_q8 == !k->q8_bytes);
        if (!k->matmul_q8) continue;
        for (size_t i = 0; i < 90; i++, done++) {
            check_q8(k, all_types[2 + i % 3], fine[i / 3 % 3], ns[i % 8], rows[i % 6], cols[i % 5],
                     i < 50 ? 1 : scales[i % 4], Q8_EVEN);
        }
        for (size_t n = 1; n <= 17; n++) { /* every rest of a tile, every kind, every type */
            for (size_t t = 0; t < n_types; t++) {
                ibid_type type = all_types[t];
                if (type == IBID_F32 || type == IBID_F16 || type == IBID_BF16) continue;
                float scale = (n + t) % 5 == 4 ? 1e30f : 1;
                check_q8(k, type, fine[(n + t) % 3], n, rows[(n + 2 * t) % 6],
                         whole(type, cols[n % 4]), scale, (int)((n + t) % Q8_KINDS));
            }
        }
    }
    if (!done) skip();
}

/* NaN and infinity in one row of x: whatever becomes of it, no other row changes. */
static void test_q8_nan(void **state) {
    (void)state;
    enum { N = 9, ROWS = 33, COLS = 96 };
    ibid_tensor w = random_weights(IBID_Q4_1, ROWS, COLS, 0.5f);
    ibid_panels p;
    assert_true(ibid_panels_shape(&w, &p));
    uint8_t *packed = need(ibid_panels_bytes(&p));
    for (size_t i = 0; i * IBID_PANEL_ROWS < ROWS; i++)
        ibid_panels_pack(&p, &w, i, packed + i * p.panel_bytes);
    p.data = packed;
    float x[N * COLS], bad[N * COLS];
    fill(x, N * COLS, 1);
    memcpy(bad, x, sizeof x);
    bad[3 * COLS + 5] = NAN;
    bad[3 * COLS + 40] = INFINITY;
    bad[3 * COLS + 70] = -3e38f;
    for (size_t b = 0; b < n_tested; b++) {
        const ibid_kernels *k = tested[b];
        for (int fine = 0; k->matmul_q8 && fine < 3; fine++) {
            float above = fine == 0 ? INFINITY : fine == 1 ? 1.0f : 0;
            float y[N * ROWS] = {0}, z[N * ROWS] = {0};
            void *xq = need((N + IBID_Q8_TILE - 1) / IBID_Q8_TILE * k->q8_bytes(COLS));
            k->q8_pack(x, COLS, N, COLS, above, xq);
            k->matmul_q8(&p, 0, ROWS, xq, N, y, ROWS);
            k->q8_pack(bad, COLS, N, COLS, above, xq);
            k->matmul_q8(&p, 0, ROWS, xq, N, z, ROWS);
            assert_memory_equal(y, z, 3 * ROWS * 4);
            assert_memory_equal(y + 4 * ROWS, z + 4 * ROWS, (N - 4) * ROWS * 4);
            ibid_free(xq);
        }
    }
    ibid_free(packed);
    ibid_free((void *)(uintptr_t)w.data);
}

/* ---- rows ---- */

static void near(float got, float want, double relative, double absolute, const char *what) {
    double off = fabs((double)got - (double)want);
    if (off <= relative * fabs((double)want) + absolute) return;
    fail_msg("%s: %.9g, reference %.9g", what, (double)got, (double)want);
}

static void test_rmsnorm(void **state) {
    (void)state;
    const float scales[] = {0, 1e-30f, 1, 1e4f};
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t n = 1; n <= 1536; n = n < 70 ? n + 1 : n * 2) {
            float *x = need(n * 4), *w = need(n * 4), *want = need(n * 4);
            fill(w, n, 2);
            fill(x, n, scales[n % 4]);
            ref->rmsnorm(x, w, 1e-5f, want, n);
            tested[b]->rmsnorm(x, w, 1e-5f, x, n); /* in place */
            for (size_t i = 0; i < n; i++) near(x[i], want[i], 2e-6, 1e-37, "rmsnorm");
            ibid_free(x);
            ibid_free(w);
            ibid_free(want);
        }
    }
}

static void test_rope(void **state) {
    (void)state;
    const size_t dims[][2] = {{64, 64}, {64, 32}, {96, 96}, {128, 20}, {6, 6}, {256, 256}};
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t i = 0; i < 2 * (sizeof dims / sizeof *dims); i++) {
            size_t dim = dims[i / 2][0], rot = dims[i / 2][1];
            ibid_pairing pairing = i % 2 ? IBID_PAIR_HALF : IBID_PAIR_NEXT;
            float x[3 * 256] = {0}, want[3 * 256], c[128], s[128];
            fill(x, 3 * dim, 10);
            memcpy(want, x, sizeof x);
            for (size_t j = 0; j < rot / 2; j++) {
                float angle = rnd_float(3.14159f);
                c[j] = cosf(angle);
                s[j] = sinf(angle);
            }
            ref->rope(pairing, want, 3, dim, rot, c, s);
            tested[b]->rope(pairing, x, 3, dim, rot, c, s);
            for (size_t j = 0; j < 3 * dim; j++) near(x[j], want[j], 0, 2e-6, "rope");
        }
    }
}

static void test_hadamard(void **state) {
    (void)state;
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t n = 32; n <= 256; n += 32) {
            float x[256], want[256], was[256];
            fill(x, n, n % 64 ? 3 : 2000);
            memcpy(want, x, sizeof x);
            memcpy(was, x, sizeof x);
            ref->hadamard(want, n);
            tested[b]->hadamard(x, n);
            for (size_t i = 0; i < n; i++)
                near(x[i], want[i], 2e-6, n % 64 ? 3e-6 : 2e-3, "hadamard");
            tested[b]->hadamard(x, n); /* its own inverse */
            for (size_t i = 0; i < n; i++)
                near(x[i], was[i], 2e-6, n % 64 ? 5e-6 : 3e-3, "hadamard twice");
        }
        for (size_t n = 0; n < 3; n++) { /* nothing, subnormals, huge */
            float x[32], want[32], scale = n == 0 ? 0 : n == 1 ? 1e-40f : 1e36f;
            fill(x, 32, scale);
            memcpy(want, x, sizeof x);
            ref->hadamard(want, 32);
            tested[b]->hadamard(x, 32);
            for (size_t i = 0; i < 32; i++)
                near(x[i], want[i], 2e-6, 6e-6 * (double)scale + 3e-44, "hadamard of extremes");
        }
        float one[32] = {[5] = 1}; /* column 5: -1 where i and 5 share an odd number of bits */
        tested[b]->hadamard(one, 32);
        for (unsigned i = 0; i < 32; i++)
            near(one[i] * sqrtf(32), __builtin_parity(i & 5) ? -1 : 1, 1e-6, 0, "hadamard of one");
    }
}

static void test_swiglu_add(void **state) {
    (void)state;
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t n = 1; n <= 1536; n = n < 70 ? n + 1 : n * 2) {
            float *g = need(n * 4), *u = need(n * 4), *want = need(n * 4);
            fill(g, n, n % 2 ? 5 : 200);
            fill(u, n, 3);
            memcpy(want, g, n * 4);
            ref->swiglu(want, u, n);
            tested[b]->swiglu(g, u, n);
            for (size_t i = 0; i < n; i++) near(g[i], want[i], 2e-6, 1e-33, "swiglu");
            ref->add(want, u, n);
            memcpy(u, g, n * 4);
            tested[b]->add(g, g, n);
            for (size_t i = 0; i < n; i++) assert_true(g[i] == u[i] + u[i]);
            ibid_free(g);
            ibid_free(u);
            ibid_free(want);
        }
    }
}

static void test_kv_pack(void **state) {
    (void)state;
    enum { N = 32 * 40 };
    float src[N], back[N], back_ref[N];
    for (size_t i = 0; i < N; i++) {
        static const float scale[] = {0, 1e-30f, 1e-4f, 1, 50, 60000};
        src[i] = rnd_float(scale[i / 32 % 6]);
    }
    for (size_t i = 0; i < 32; i++) src[32 + i] = i == 5 ? -3 : 0; /* one value only */
    const size_t width[] = {4, 2, 1};
    for (size_t b = 0; b < 2 * n_tested; b++) { /* with scales of 64 and of 32 values */
        const ibid_kernels *k = tested[b / 2];
        for (ibid_kv_type type = IBID_KV_F32; type <= IBID_KV_Q8_0; type++) {
            size_t n = type == IBID_KV_Q8_0 ? N - b % 2 * 32 : N - 3, group = n % 64 ? 32 : 64;
            uint8_t got[N * 4] = {0}, want[N * 4] = {0};
            uint16_t scale[N / 32] = {0}, want_scale[N / 32] = {0};
            k->kv_pack(type, src, n, got, scale);
            ref->kv_pack(type, src, n, want, want_scale);
            assert_memory_equal(got, want, n * width[type]);
            assert_memory_equal(scale, want_scale, sizeof scale);
            k->kv_unpack(type, got, scale, n, back);
            ref->kv_unpack(type, got, scale, n, back_ref);
            assert_memory_equal(back, back_ref, n * 4);
            for (size_t i = 0; i < n; i++) {
                float max = 0;
                for (size_t j = i / group * group; j < (i / group + 1) * group && j < n; j++) {
                    max = fmaxf(max, fabsf(src[j]));
                }
                double v = fabs((double)src[i]), bound = 0;
                if (type == IBID_KV_F16) bound = fmax(v * 0x1p-11, 0x1p-25);
                /* half a step, and the scale's own rounding where it clamps; a scale below f16's
                 * least subnormal is 0 */
                if (type == IBID_KV_Q8_0) bound = (double)max / 127 * 0.5 * 1.13 + 127 * 0x1p-25;
                assert_true(fabs((double)back[i] - (double)src[i]) <= bound);
            }
        }
    }
}

/* Where roundings might part: ties, signed zeros, subnormals, the least and the largest scales. */
static void test_kv_pack_edges(void **state) {
    (void)state;
    enum { GROUPS = 9, N = 32 * GROUPS };
    static const float top[GROUPS] = {63.5f,          0,       1e-42f, 7e-6f, 4e-6f, 3.8e-6f,
                                      65504 * 127.0f, 1.9e-3f, 127};
    float src[N];
    for (size_t i = 0; i < N; i++) {
        size_t g = i / 32;
        src[i] = i % 32 == 7 ? -top[g] : rnd_float(top[g]);
        if (g == 0 && i % 32 != 7) src[i] = 0.25f * (float)((int)(rnd() % 255) - 127); /* ties */
        if (g == 1) src[i] = i % 2 ? -0.0f : 0.0f;
        if (g == 8 && i % 32 != 7) src[i] = (float)((int)(rnd() % 254) - 127) + 0.5f; /* ties */
    }
    for (size_t b = 0; b < n_tested; b++) {
        int8_t got[N], want[N];
        uint16_t scale[GROUPS], want_scale[GROUPS];
        float back[N], want_back[N];
        tested[b]->kv_pack(IBID_KV_Q8_0, src, N, got, scale);
        ref->kv_pack(IBID_KV_Q8_0, src, N, want, want_scale);
        assert_memory_equal(scale, want_scale, sizeof scale);
        assert_memory_equal(got, want, sizeof got);
        tested[b]->kv_unpack(IBID_KV_Q8_0, got, scale, N, back);
        ref->kv_unpack(IBID_KV_Q8_0, got, scale, N, want_back);
        assert_memory_equal(back, want_back, sizeof back);
    }
}

/* ---- attention ---- */

typedef struct segment {
    ibid_kv_view kv;
    void *k, *v;
    uint16_t *ks, *vs;
} segment;

static segment random_segment(ibid_kv_type type, size_t n_tokens, size_t heads, size_t dim,
                              float scale) {
    size_t n = n_tokens * heads * dim;
    const size_t width[] = {4, 2, 1};
    float *f = need(n * 4);
    segment s = {.k = need(n * width[type]), .v = need(n * width[type])};
    if (type == IBID_KV_Q8_0) {
        s.ks = need(n / 32 * 2);
        s.vs = need(n / 32 * 2);
    }
    fill(f, n, scale);
    ref->kv_pack(type, f, n, s.k, s.ks);
    fill(f, n, 2);
    ref->kv_pack(type, f, n, s.v, s.vs);
    ibid_free(f);
    s.kv = (ibid_kv_view){.type = type,
                          .n_tokens = n_tokens,
                          .n_kv_heads = heads,
                          .head_dim = dim,
                          .k = s.k,
                          .v = s.v,
                          .k_scale = s.ks,
                          .v_scale = s.vs};
    return s;
}

static void free_segment(segment *s) {
    ibid_free(s->k);
    ibid_free(s->v);
    ibid_free(s->ks);
    ibid_free(s->vs);
}

typedef struct rows {
    size_t n, dim;
    float *q, *acc;
    uint32_t *visible;
    ibid_attn_state *state;
} rows;

static rows new_rows(size_t n, size_t dim, float scale) {
    rows r = {.n = n, .dim = dim, .q = need(n * dim * 4), .acc = need(n * dim * 4)};
    r.visible = need(n * 4);
    r.state = need(n * sizeof *r.state);
    fill(r.q, n * dim, scale);
    for (size_t i = 0; i < n; i++) r.state[i] = (ibid_attn_state){.max = -INFINITY};
    return r;
}

static rows copy_rows(const rows *from) {
    rows r = new_rows(from->n, from->dim, 0);
    memcpy(r.q, from->q, r.n * r.dim * 4);
    memcpy(r.acc, from->acc, r.n * r.dim * 4);
    memcpy(r.visible, from->visible, r.n * 4);
    memcpy(r.state, from->state, r.n * sizeof *r.state);
    return r;
}

static void free_rows(rows *r) {
    ibid_free(r->q);
    ibid_free(r->acc);
    ibid_free(r->visible);
    ibid_free(r->state);
}

static ibid_attn_args args_of(const segment *s, size_t head, rows *r, const uint64_t *masked) {
    return (ibid_attn_args){.kv = &s->kv,
                            .kv_head = head,
                            .q = r->q,
                            .n_rows = r->n,
                            .visible = r->visible,
                            .masked = masked,
                            .state = r->state,
                            .acc = r->acc};
}

/* Compares finished outputs acc / sum and log-sum-exps. spread: how large scores are, whose
 * rounding in f32 the exponential turns into a relative error. */
static void same_rows(const rows *got, const rows *want, double spread, const char *what) {
    double tol = 3e-6 + 4e-7 * spread;
    for (size_t r = 0; r < want->n; r++) {
        ibid_attn_state g = got->state[r], w = want->state[r];
        if (!(w.max > -INFINITY)) {
            assert_true(g.max == w.max && g.sum == w.sum);
            for (size_t d = 0; d < want->dim; d++) assert_true(got->acc[r * got->dim + d] == 0);
            continue;
        }
        double lse_g = (double)g.max + log((double)g.sum),
               lse_w = (double)w.max + log((double)w.sum);
        if (!(fabs(lse_g - lse_w) <= tol))
            fail_msg("%s: row %zu lse %g, %g", what, r, lse_g, lse_w);
        for (size_t d = 0; d < want->dim; d++) {
            double a = (double)got->acc[r * got->dim + d] / (double)g.sum;
            double b = (double)want->acc[r * want->dim + d] / (double)w.sum;
            if (!(fabs(a - b) <= 2 * tol)) {
                fail_msg("%s: row %zu dim %zu: %g, reference %g", what, r, d, a, b);
            }
        }
    }
}

static void test_attn(void **state) {
    (void)state;
    const size_t ns[] = {1, 2, 3, 4, 5, 6, 7, 9, 63, 65, 200};
    const size_t tokens[] = {1, 5, 31, 32, 33, 63, 64, 65, 130, 200};
    const size_t dims[] = {64, 32, 96, 128, 256};
    for (size_t b = 0; b < n_tested; b++) {
        for (ibid_kv_type type = IBID_KV_F32; type <= IBID_KV_Q8_0; type++) {
            for (size_t i = 0; i < 40; i++) {
                size_t n = ns[i % 11], t = tokens[(i * 7 + 3) % 10], dim = dims[i % 5];
                float big = i % 4 == 3 ? 30 : 1; /* scores differ by some +-200 */
                segment s = random_segment(type, t, 2, dim, big);
                rows x = new_rows(n, dim, 8 / sqrtf((float)dim));
                uint64_t masked[4] = {0};
                for (size_t m = 0; m < 4; m++) masked[m] = (uint64_t)rnd() << 32 | rnd();
                if (i % 5 == 1) masked[0] = ~UINT64_C(0);
                for (size_t r = 0; r < n; r++) {
                    x.visible[r] = (uint32_t)(i % 3 == 0   ? t
                                              : i % 3 == 1 ? rnd() % (t + 1)
                                                           : (r < t ? r : t));
                }
                rows y = copy_rows(&x);
                for (size_t head = 0; head < 2; head++) { /* the second call continues the first */
                    ibid_attn_args a = args_of(&s, head, &x, i % 2 ? masked : NULL);
                    tested[b]->attn(&a);
                    a = args_of(&s, head, &y, i % 2 ? masked : NULL);
                    ref->attn(&a);
                }
                /* a score's terms add up to about big * 2 sqrt(dim) in size */
                same_rows(&x, &y, (double)big * 4 * sqrt((double)dim), tested[b]->name);
                free_rows(&x);
                free_rows(&y);
                free_segment(&s);
            }
        }
    }
}

/* Rows that see nothing keep every bit of what they had, signs of zero included. */
static void test_attn_untouched(void **state) {
    (void)state;
    uint64_t masked[3] = {~UINT64_C(0), ~UINT64_C(0), ~UINT64_C(0)};
    for (size_t b = 0; b <= n_tested; b++) {
        const ibid_kernels *k = b < n_tested ? tested[b] : ref;
        segment s = random_segment(IBID_KV_Q8_0, 150, 1, 64, 1);
        rows x = new_rows(13, 64, 1);
        for (size_t r = 0; r < 13; r++) {
            x.visible[r] = r % 2 ? 150 : 0;
            if (r % 3 == 0) continue; /* some have seen something before, some not */
            x.state[r] = (ibid_attn_state){.max = 3, .sum = 1.5f};
            fill(x.acc + r * 64, 64, 1);
            x.acc[r * 64] = -0.0f;
        }
        rows y = copy_rows(&x);
        ibid_attn_args a = args_of(&s, 0, &x, masked);
        k->attn(&a);
        assert_memory_equal(x.acc, y.acc, 13 * 64 * 4);
        assert_memory_equal(x.state, y.state, 13 * sizeof *x.state);
        a.masked = NULL;
        k->attn(&a);
        for (size_t r = 0; r < 13; r++) {
            int same = memcmp(x.acc + r * 64, y.acc + r * 64, 256) == 0;
            assert_int_equal(same, r % 2 == 0);
        }
        free_rows(&x);
        free_rows(&y);
        free_segment(&s);
    }
}

/* A key far below the best weighs nothing, one far above takes all, and scores of -infinity count
 * as unseen: never a NaN. */
static void test_attn_infinite(void **state) {
    (void)state;
    for (size_t b = 0; b <= n_tested; b++) {
        const ibid_kernels *k = b < n_tested ? tested[b] : ref;
        segment s = random_segment(IBID_KV_F32, 70, 1, 32, 1);
        float *keys = s.k;
        memset(keys, 0, 70 * 32 * 4);
        for (size_t t = 0; t < 70; t++) keys[t * 32] = t < 66 ? -3e38f : t == 66 ? 200 : -200;
        rows x = new_rows(2, 32, 0);
        x.q[0] = 10; /* 10 * -3e38 = -infinity */
        x.q[32] = 1;
        x.visible[0] = 66; /* only -infinities: as if it saw nothing */
        x.visible[1] = 70;
        ibid_attn_args a = args_of(&s, 0, &x, NULL);
        k->attn(&a);
        if (k != ref) { /* the reference's scores are double and do not overflow */
            assert_true(x.state[0].max == -INFINITY && x.state[0].sum == 0 && x.acc[0] == 0);
        }
        assert_true(x.state[1].max == 200 && x.state[1].sum == 1);
        for (size_t d = 0; d < 32; d++) {
            assert_true(x.acc[32 + d] == ((const float *)s.v)[66 * 32 + d]);
            assert_true(!isnan(x.acc[d]));
        }
        free_rows(&x);
        free_segment(&s);
    }
}

/* Attending to two parts apart and merging the states equals attending to the whole. */
static void test_attn_merge(void **state) {
    (void)state;
    enum { TOKENS = 150, DIM = 64, N = 7 };
    for (size_t b = 0; b <= n_tested; b++) {
        const ibid_kernels *k = b < n_tested ? tested[b] : ref;
        segment s = random_segment(IBID_KV_F16, TOKENS, 1, DIM, 3);
        for (size_t cut = 0; cut <= TOKENS; cut += 30) {
            uint64_t head[3], tail[3]; /* masks that split the tokens at cut */
            for (size_t m = 0; m < 3; m++) {
                size_t from = m * 64;
                head[m] = cut <= from        ? ~UINT64_C(0)
                          : cut >= from + 64 ? 0
                                             : ~UINT64_C(0) << (cut - from);
                tail[m] = ~head[m];
            }
            rows whole = new_rows(N, DIM, 1);
            for (size_t r = 0; r < N; r++) whole.visible[r] = (uint32_t)(TOKENS - 20 * r);
            rows first = copy_rows(&whole), second = copy_rows(&whole);
            ibid_attn_args a = args_of(&s, 0, &whole, NULL);
            k->attn(&a);
            a = args_of(&s, 0, &first, head);
            k->attn(&a);
            a = args_of(&s, 0, &second, tail);
            k->attn(&a);
            for (size_t r = 0; r < N; r++) {
                ibid_attn_merge(&first.state[r], first.acc + r * DIM, &second.state[r],
                                second.acc + r * DIM, DIM);
            }
            same_rows(&first, &whole, 24, "merge");
            free_rows(&whole);
            free_rows(&first);
            free_rows(&second);
        }
        free_segment(&s);
    }
}

/* The contract: a row's bits do not depend on the rows beside it. */
static void test_attn_same_bits(void **state) {
    (void)state;
    enum { TOKENS = 200, DIM = 64, N = 40 };
    for (size_t b = 0; b < n_tested; b++) {
        for (ibid_kv_type type = IBID_KV_F32; type <= IBID_KV_Q8_0; type++) {
            segment s = random_segment(type, TOKENS, 1, DIM, 2);
            rows all = new_rows(N, DIM, 1);
            for (size_t r = 0; r < N; r++) all.visible[r] = rnd() % (TOKENS + 1);
            rows one = copy_rows(&all);
            ibid_attn_args a = args_of(&s, 0, &all, NULL);
            tested[b]->attn(&a);
            for (size_t r = 0; r < N; r++) {
                a = args_of(&s, 0, &one, NULL);
                a.q += r * DIM;
                a.acc += r * DIM;
                a.state += r;
                a.visible += r;
                a.n_rows = 1;
                tested[b]->attn(&a);
            }
            assert_memory_equal(all.acc, one.acc, N * DIM * 4);
            assert_memory_equal(all.state, one.state, N * sizeof *all.state);
            free_rows(&all);
            free_rows(&one);
            free_segment(&s);
        }
    }
}

/* The masses of a row's tokens add up to 1 over all it sees, and agree with the reference. */
static void test_attn_mass(void **state) {
    (void)state;
    enum { TOKENS = 137, N = 11 };
    const size_t dims[] = {32, 64, 256};
    for (size_t b = 0; b < n_tested; b++) {
        for (ibid_kv_type type = IBID_KV_F32; type <= IBID_KV_Q8_0; type++) {
            size_t dim = dims[type];
            segment s = random_segment(type, TOKENS, 2, dim, 2);
            rows x = new_rows(N, dim, 0.5f);
            uint64_t masked[3] = {0x5555, 0, 0xf0};
            for (size_t r = 0; r < N; r++) x.visible[r] = (uint32_t)(r * 13);
            ibid_attn_args a = args_of(&s, 1, &x, masked);
            tested[b]->attn(&a);
            float lse[N], got[TOKENS + 1] = {0}, want[TOKENS + 1] = {0};
            size_t seeing = 0;
            for (size_t r = 0; r < N; r++) {
                lse[r] = x.state[r].max + logf(x.state[r].sum);
                if (x.state[r].max > -INFINITY) seeing++;
            }
            got[TOKENS] = 42;
            tested[b]->attn_mass(&a, lse, got);
            ref->attn_mass(&a, lse, want);
            double total = 0;
            for (size_t t = 0; t < TOKENS; t++) {
                near(got[t], want[t], 3e-5, 1e-7, "attn_mass"); /* scores are sums of up to 64 */
                total += (double)got[t];
            }
            assert_true(got[TOKENS] == 42);
            assert_true(fabs(total - (double)seeing) < 1e-4);
            free_rows(&x);
            free_segment(&s);
        }
    }
}

/* ---- attention in integers ---- */

/* Queries as attn_i8 rounds them: with these the exact attention differs by the rounding of the
 * weights only. */
static void round_groups(float *x, size_t n, size_t group) {
    for (size_t i = 0; i < n; i += group) {
        float max = 0;
        for (size_t c = 0; c < group; c++) max = fmaxf(max, fabsf(x[i + c]));
        float d = max / 127, inverse = d > 0 ? 1 / d : 0;
        for (size_t c = 0; c < group; c++) x[i + c] = d * rintf(x[i + c] * inverse);
    }
}

/* A tile's weights are off by half a step each: of 1/255 of its largest if they add up to 8 times
 * that or more, else of 1/65280. So outputs by tile / 510 / 8 of the largest value; sums by what
 * exp2 is. Tiles that weigh next to nothing are left out, which random keys hardly make. values are
 * within 2. */
static void same_rows_i8(const rows *got, const rows *want, size_t tile, double spread,
                         const char *what) {
    double tol = 2e-4 + 1e-6 * spread, out = 2 * ((double)tile / 510.0 / 8 + 2 * tol);
    for (size_t r = 0; r < want->n; r++) {
        ibid_attn_state g = got->state[r], w = want->state[r];
        if (!(w.max > -INFINITY)) {
            assert_true(g.max == w.max && g.sum == w.sum);
            for (size_t d = 0; d < want->dim; d++) assert_true(got->acc[r * got->dim + d] == 0);
            continue;
        }
        double off = (double)g.max + log((double)g.sum) - (double)w.max - log((double)w.sum);
        if (!(fabs(off) <= tol)) fail_msg("%s: row %zu lse off by %g", what, r, off);
        for (size_t d = 0; d < want->dim; d++) {
            double a = (double)got->acc[r * got->dim + d] / (double)g.sum;
            double b = (double)want->acc[r * want->dim + d] / (double)w.sum;
            if (!(fabs(a - b) <= out))
                fail_msg("%s: row %zu dim %zu: %g, reference %g", what, r, d, a, b);
        }
    }
}

/* Also a row alone: the same bits; and a second head after the first. */
static void check_attn_i8(const ibid_kernels *k, size_t i, size_t n, size_t tokens, size_t dim) {
    static const uint32_t edges[] = {0, 1, 15, 16, 17, 32, 63, 64, 65, 1000};
    float big = i % 4 == 3 ? 30 : 1;
    segment s = random_segment(IBID_KV_Q8_0, tokens, 2, dim, big);
    rows x = new_rows(n, dim, 8 / sqrtf((float)dim));
    uint64_t masked[4] = {~UINT64_C(0)};
    for (size_t m = i % 5 == 1; m < 4; m++) masked[m] = (uint64_t)rnd() << 32 | rnd();
    for (size_t r = 0; r < n; r++) x.visible[r] = i % 3 ? edges[(r + i) % 10] : (uint32_t)tokens;
    if (n > 2) memset(x.q + dim, 0, dim * 4); /* scores of zero */
    rows y = copy_rows(&x), one = copy_rows(&x);
    round_groups(y.q, n * dim, 32);
    for (size_t head = 0; head < 2; head++) {
        ibid_attn_args a = args_of(&s, head, &x, i % 2 ? masked : NULL);
        k->attn_i8(&a);
        a = args_of(&s, head, &y, i % 2 ? masked : NULL);
        ref->attn(&a);
        for (size_t r = 0; r < n; r++) {
            a = args_of(&s, head, &one, i % 2 ? masked : NULL);
            a.q += r * dim;
            a.acc += r * dim;
            a.state += r;
            a.visible += r;
            a.n_rows = 1;
            k->attn_i8(&a);
        }
    }
    for (size_t r = 0; r < n; r++) {
        bool same = memcmp(x.acc + r * dim, one.acc + r * dim, dim * 4) == 0 &&
                    memcmp(&x.state[r], &one.state[r], sizeof *one.state) == 0;
        if (!same)
            fail_msg("%s %zu: n %zu tokens %zu dim %zu: row %zu alone differs", k->name, i, n,
                     tokens, dim, r);
    }
    same_rows_i8(&x, &y, 64, (double)big * 4 * sqrt((double)dim), k->name);
    /* a segment where nothing is visible, merged, changes no bit */
    rows none = new_rows(n, dim, 1);
    ibid_attn_args a = args_of(&s, 0, &none, NULL);
    k->attn_i8(&a);
    for (size_t r = 0; r < n; r++)
        ibid_attn_merge(&x.state[r], x.acc + r * dim, &none.state[r], none.acc + r * dim, dim);
    assert_memory_equal(x.acc, one.acc, n * dim * 4);
    assert_memory_equal(x.state, one.state, n * sizeof *x.state);
    free_rows(&x);
    free_rows(&y);
    free_rows(&one);
    free_rows(&none);
    free_segment(&s);
}

/* A row that weighs all keys alike goes on seeing them, however many they are. */
static void test_attn_i8_flat(void **state) {
    (void)state;
    enum { TOKENS = 40000, DIM = 32 };
    size_t done = 0;
    segment s = random_segment(IBID_KV_Q8_0, TOKENS, 1, DIM, 1);
    for (size_t b = 0; b < n_tested; b++) {
        if (!tested[b]->attn_i8) continue;
        rows x = new_rows(1, DIM, 1);
        memset(x.q, 0, DIM * sizeof *x.q);
        x.visible[0] = TOKENS;
        ibid_attn_args a = args_of(&s, 0, &x, NULL);
        tested[b]->attn_i8(&a);
        assert_true(fabs((double)x.state[0].sum / TOKENS - 1) < 1e-3 && x.state[0].max == 0);
        free_rows(&x);
        done++;
    }
    free_segment(&s);
    if (!done) skip();
}

static void test_attn_i8(void **state) {
    (void)state;
    const size_t ns[] = {1, 2, 3, 5, 6, 7, 13, 191, 193};
    const size_t tokens[] = {1, 5, 15, 16, 17, 31, 33, 63, 64, 65, 130, 200};
    const size_t dims[] = {32, 64, 96, 128, 160, 256};
    size_t done = 0;
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t i = 0; tested[b]->attn_i8 && i < 108; i++, done++)
            check_attn_i8(tested[b], i, ns[i % 9], tokens[(i * 7 + i / 12) % 12], dims[i / 3 % 6]);
    }
    if (!done) skip();
}

/* Against the reference with the queries as they are rounded. */
static void test_attn_mass_i8(void **state) {
    (void)state;
    enum { TOKENS = 137, N = 13 };
    const size_t dims[] = {32, 64, 96, 256};
    size_t done = 0;
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t i = 0; tested[b]->attn_mass_i8 && i < 8; i++, done++) {
            size_t dim = dims[i / 2];
            segment s = random_segment(IBID_KV_Q8_0, TOKENS, 2, dim, 2);
            rows x = new_rows(N, dim, 0.5f);
            uint64_t masked[3] = {0x5555, 0, 0xf0};
            for (size_t r = 0; r < N; r++) x.visible[r] = (uint32_t)(r * 12);
            rows y = copy_rows(&x);
            round_groups(y.q, N * dim, 32);
            ibid_attn_args a = args_of(&s, 1, &x, i % 2 ? masked : NULL);
            ibid_attn_args rounded = args_of(&s, 1, &y, i % 2 ? masked : NULL);
            ref->attn(&rounded);
            float lse[N], got[TOKENS + 1] = {0}, want[TOKENS + 1] = {0};
            for (size_t r = 0; r < N; r++) lse[r] = y.state[r].max + logf(y.state[r].sum);
            got[TOKENS] = 42;
            tested[b]->attn_mass_i8(&a, lse, got);
            ref->attn_mass(&rounded, lse, want);
            for (size_t t = 0; t < TOKENS; t++) near(got[t], want[t], 3e-4, 1e-6, "attn_mass_i8");
            assert_true(got[TOKENS] == 42);
            free_rows(&x);
            free_rows(&y);
            free_segment(&s);
        }
    }
    if (!done) skip();
}

/* f32 KV of one head, and the same in tiles. */
typedef struct tiled {
    size_t n, dim, bytes;
    float *k, *v;
    uint8_t *tiles;
} tiled;

static void lay(const ibid_kernels *k, const tiled *t, size_t n) {
    for (size_t i = 0; i < n; i += IBID_KV_TILE) {
        size_t in = n - i < IBID_KV_TILE ? n - i : IBID_KV_TILE;
        k->kv_tile_pack(t->k + i * t->dim, t->v + i * t->dim, in, t->dim,
                        t->tiles + i / IBID_KV_TILE * t->bytes);
    }
}

static void tiles_attn(const ibid_kernels *k, const tiled *t, rows *x, size_t row0, size_t n) {
    ibid_tiles_args a = {.tiles = t->tiles,
                         .head_dim = t->dim,
                         .n_rows = n,
                         .q = x->q + row0 * t->dim,
                         .visible = x->visible + row0,
                         .state = x->state + row0,
                         .acc = x->acc + row0 * t->dim};
    k->attn_tiles(&a);
}

/* Against exact attention over what the tiles hold. A row alone gives the same bits, also where the
 * context ends with what it sees. */
static void check_attn_tiles(const ibid_kernels *k, size_t i, size_t n, size_t tokens, size_t dim) {
    float big = i % 4 == 3 ? 30 : 1;
    tiled t = {.n = tokens, .dim = dim, .bytes = k->kv_tile_bytes(dim)};
    t.k = need(tokens * dim * 4);
    t.v = need(tokens * dim * 4);
    t.tiles = ibid_alloc_aligned(64, (tokens + IBID_KV_TILE - 1) / IBID_KV_TILE * t.bytes);
    fill(t.k, tokens * dim, big);
    for (size_t j = 0; j < tokens; j++) fill(t.v + j * dim, dim, j % 7 == 3 ? 2 : 0.1f);
    rows x = new_rows(n, dim, 8 / sqrtf((float)dim));
    for (size_t r = 0; r < n; r++) { /* the first rows may see nothing */
        size_t see = i % 3 ? tokens * (r + 1) / n + i % 2 * (r % 2) : tokens;
        x.visible[r] = (uint32_t)(see < tokens ? see : tokens);
        if (r && x.visible[r] < x.visible[r - 1]) x.visible[r] = x.visible[r - 1];
    }
    if (n > 2) memset(x.q + dim, 0, dim * 4); /* scores of zero */
    rows y = copy_rows(&x), one = copy_rows(&x);
    lay(k, &t, tokens);
    tiles_attn(k, &t, &x, 0, n);
    round_groups(y.q, n * dim, 64);
    float *exact[] = {need(tokens * dim * 4), need(tokens * dim * 4)};
    memcpy(exact[0], t.k, tokens * dim * 4);
    memcpy(exact[1], t.v, tokens * dim * 4);
    round_groups(exact[0], tokens * dim, 64);
    round_groups(exact[1], tokens * dim, 64);
    ibid_kv_view kv = {.type = IBID_KV_F32,
                       .n_tokens = tokens,
                       .n_kv_heads = 1,
                       .head_dim = dim,
                       .k = exact[0],
                       .v = exact[1]};
    ibid_attn_args a = {
        .kv = &kv, .q = y.q, .n_rows = n, .visible = y.visible, .state = y.state, .acc = y.acc};
    ref->attn(&a);
    same_rows_i8(&x, &y, IBID_KV_TILE, (double)big * 4 * sqrt((double)dim), k->name);
    for (size_t r = 0; r < n; r++) {
        lay(k, &t, r % 2 ? tokens : x.visible[r]);
        tiles_attn(k, &t, &one, r, 1);
        if (memcmp(x.acc + r * dim, one.acc + r * dim, dim * 4) != 0 ||
            memcmp(&x.state[r], &one.state[r], sizeof *one.state) != 0)
            fail_msg("%s %zu: n %zu tokens %zu dim %zu: row %zu alone differs", k->name, i, n,
                     tokens, dim, r);
    }
    for (size_t r = 0; r < n; r++) x.visible[r] = 0;
    tiles_attn(k, &t, &x, 0, n);
    assert_memory_equal(x.acc, one.acc, n * dim * 4);
    assert_memory_equal(x.state, one.state, n * sizeof *x.state);
    free_rows(&x);
    free_rows(&y);
    free_rows(&one);
    ibid_free(exact[0]);
    ibid_free(exact[1]);
    ibid_free(t.k);
    ibid_free(t.v);
    ibid_free(t.tiles);
}

static void test_attn_tiles(void **state) {
    (void)state;
    const size_t ns[] = {1, 2, 3, 5, 6, 7, 13, 100, 191, 193};
    const size_t tokens[] = {1, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 300};
    const size_t dims[] = {64, 128, 192, 256};
    size_t done = 0;
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t i = 0; tested[b]->attn_tiles && i < 130; i++, done++)
            check_attn_tiles(tested[b], i, ns[i % 10], tokens[(i * 7 + i / 13) % 13],
                             dims[i / 3 % 4]);
    }
    if (!done) skip();
}

/* ---- maxsim ---- */

static void test_maxsim(void **state) {
    (void)state;
    const size_t dims[] = {32, 64, 96, 128, 256, 512, 544};
    const size_t keys[] = {1, 2, 15, 16, 17, 63, 64, 65, 200, 1000};
    const size_t queries[] = {1, 2, 3, 4, 5, 6, 7, 13, 31};
    for (size_t b = 0; b < n_tested; b++) {
        for (size_t i = 0; i < 90; i++) {
            size_t dim = dims[i % 7], n_keys = keys[i % 10], n_q = queries[i % 9];
            int8_t *q = need(n_q * dim), *k = need(n_keys * dim);
            int32_t got[31], want[31];
            uint32_t got_at[31], want_at[31];
            for (size_t j = 0; j < n_q * dim; j++) q[j] = (int8_t)(i % 3 == 2 ? -128 : (int)rnd());
            for (size_t j = 0; j < n_keys * dim; j++)
                k[j] = (int8_t)(i % 3 == 2 ? -128 : (int)rnd());
            for (size_t j = 0; j < n_keys && i % 3 == 1; j++) {
                /* many equal keys: the first of the best must be named */
                size_t from = rnd() % 5;
                if (from < j) memcpy(k + j * dim, k + from * dim, dim);
            }
            ref->maxsim_i8(q, n_q, k, n_keys, dim, want, want_at);
            tested[b]->maxsim_i8(q, n_q, k, n_keys, dim, got, i % 4 ? got_at : NULL);
            assert_memory_equal(got, want, n_q * 4);
            if (i % 4) assert_memory_equal(got_at, want_at, n_q * 4);
            ibid_free(q);
            ibid_free(k);
        }
    }
}

/* Panels of several blocks against the reference on the same keys in rows, extreme bytes too. */
static void test_maxsim_panels(void **state) {
    (void)state;
    const size_t dims[] = {32, 64, 96, 128, 256, 512, 544}, lens[] = {1, 15, 16, 17, 32, 33, 155};
    const size_t queries[] = {1, 2, 5, 8, 9, 16, 17, 31, 33, 70};
    const int8_t extreme[] = {-128, 127, 0, -1};
    enum { BLOCKS = 3 };
    for (size_t i = 0; i < 140; i++) {
        size_t dim = dims[i % 7], n_q = queries[i % 10];
        int8_t *q = need(n_q * dim), *k[BLOCKS], key[544];
        uint8_t *panels[BLOCKS];
        ibid_key_panels of[BLOCKS];
        int32_t want[BLOCKS * 70], got[BLOCKS * 70];
        for (size_t j = 0; j < n_q * dim; j++)
            q[j] = i % 3 == 2 ? extreme[rnd() % 4] : (int8_t)(i % 3 == 1 ? -128 : (int)rnd());
        for (size_t b = 0; b < BLOCKS; b++) {
            size_t n = lens[(i / 7 + b) % 7];
            k[b] = need(n * dim);
            panels[b] = need(ibid_key_panels_of(n) * IBID_KEY_PANEL * dim);
            for (size_t j = 0; j < n * dim; j++)
                k[b][j] =
                    i % 3 == 2 ? extreme[rnd() % 4] : (int8_t)(i % 3 == 1 ? -128 : (int)rnd());
            ibid_key_panels_pack(k[b], n, dim, panels[b]);
            for (size_t j = 0; j < n; j++) {
                ibid_key_panels_unpack(panels[b], j, dim, key);
                assert_memory_equal(key, k[b] + j * dim, dim);
            }
            of[b] = (ibid_key_panels){panels[b], ibid_key_panels_of(n)};
            ref->maxsim_i8(q, n_q, k[b], n, dim, want + b * n_q, NULL);
        }
        ref->maxsim_panels(q, n_q, dim, of, BLOCKS, got);
        assert_memory_equal(got, want, BLOCKS * n_q * 4);
        for (size_t t = 0; t < n_tested; t++) {
            memset(got, 0, sizeof got);
            tested[t]->maxsim_panels(q, n_q, dim, of, BLOCKS, got);
            assert_memory_equal(got, want, BLOCKS * n_q * 4);
        }
        for (size_t b = 0; b < BLOCKS; b++) {
            ibid_free(k[b]);
            ibid_free(panels[b]);
        }
        ibid_free(q);
    }
}

int main(void) {
    rng_state = SEED;
    find_backends();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f16_exhaustive),
        cmocka_unit_test(test_f16_rounding),
        cmocka_unit_test(test_get),
        cmocka_unit_test(test_dequantize_known),
        cmocka_unit_test(test_dequantize_equal),
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_matmul_odd_columns),
        cmocka_unit_test(test_matmul_extremes),
        cmocka_unit_test(test_matmul_same_bits),
        cmocka_unit_test(test_matmul_q8),
        cmocka_unit_test(test_q8_nan),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_hadamard),
        cmocka_unit_test(test_swiglu_add),
        cmocka_unit_test(test_kv_pack),
        cmocka_unit_test(test_kv_pack_edges),
        cmocka_unit_test(test_attn),
        cmocka_unit_test(test_attn_untouched),
        cmocka_unit_test(test_attn_infinite),
        cmocka_unit_test(test_attn_merge),
        cmocka_unit_test(test_attn_same_bits),
        cmocka_unit_test(test_attn_mass),
        cmocka_unit_test(test_attn_i8),
        cmocka_unit_test(test_attn_i8_flat),
        cmocka_unit_test(test_attn_mass_i8),
        cmocka_unit_test(test_attn_tiles),
        cmocka_unit_test(test_maxsim),
        cmocka_unit_test(test_maxsim_panels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
