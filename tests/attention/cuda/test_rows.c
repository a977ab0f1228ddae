/* Row kernels, products, sampling: against double and the CPU's reference on random shapes. */
#include "attention/cuda/weights.h"
#include "tests/attention/cuda/kernel_fixture.h"

#include "rpc/base/mem.h"
#include "tests/support/quantise.h"

#include <math.h>
#include <string.h>

enum { MAX_ROWS = 72 };

static size_t up64(size_t n) {
    return ibid_align_up(n, 64);
}

/* h times its rows' scales against want [n, width]; pads are zeros. */
static double rounded_apart(const uint16_t *h, size_t ldh, const float *scale, const double *want,
                            size_t n, size_t width) {
    float *v = calloc(n * width, sizeof *v);
    CHECK(v, "no memory");
    for (size_t i = 0; i < n; i++) {
        for (size_t c = 0; c < ldh; c++) {
            float f = ibid_f16_to_f32(h[i * ldh + c]);
            if (c < width)
                v[i * width + c] = f * scale[i];
            else
                CHECK(h[i * ldh + c] == 0, "pad %zu of row %zu", c, i);
        }
    }
    double d = fx_apart(v, want, n * width);
    free(v);
    return d;
}

static void test_norm(void) {
    for (int round = 0; round < 12; round++) {
        bool with_y = fx_below(2), with_bias = fx_below(2), pick = round % 4 == 3;
        size_t width = 1 + fx_below(700), n = 2 + fx_below(5), ldy = width + fx_below(9);
        size_t ldh = up64(width), n_out = pick ? 2 : n;
        float big = round % 3 ? 1 : 3e7f; /* f16 alone would overflow */
        float *x = fx_normals(n * width, big), *y = fx_normals(n * ldy, big),
              *w = fx_normals(width, 1);
        float *bias = fx_normals(width, 1), ys[MAX_ROWS], scale[MAX_ROWS];
        uint32_t rows[2] = {(uint32_t)(n - 1), 0};
        double *want = calloc(n * width, sizeof *want), *sum = calloc(n * width, sizeof *sum);
        for (size_t i = 0; i < n; i++) ys[i] = 0.5f + fx_uniform();
        for (size_t i = 0; i < n_out; i++) {
            size_t r = pick ? rows[i] : i;
            double square = 0, *v = sum + r * width;
            for (size_t c = 0; c < width; c++) {
                v[c] = (double)x[r * width + c];
                if (with_y) v[c] += (double)y[r * ldy + c] * (double)ys[r];
                if (with_bias) v[c] += (double)bias[c];
                square += v[c] * v[c];
            }
            for (size_t c = 0; c < width; c++)
                want[i * width + c] = v[c] / sqrt(square / (double)width + 1e-5) * (double)w[c];
        }
        float *dx = fx_up(x, n * width * 4), *dy = fx_up(y, n * ldy * 4), *dw = fx_up(w, width * 4);
        float *db = fx_up(bias, width * 4), *dys = fx_up(ys, sizeof ys),
              *ds = fx_up(NULL, sizeof scale);
        uint32_t *dr = fx_up(rows, sizeof rows);
        uint16_t *dh = fx_up(NULL, n * ldh * 2), *h = malloc(n * ldh * 2);
        MUST(ibidi_cu_norm(fx.s, dx, with_y ? dy : NULL, ldy, with_y ? dys : NULL,
                           with_bias ? db : NULL, dw, 1e-5f, pick ? dr : NULL, n_out, width, dh,
                           ldh, ds));
        fx_down(h, dh, n_out * ldh * 2);
        fx_down(scale, ds, n_out * 4);
        double d = rounded_apart(h, ldh, scale, want, n_out, width);
        CHECK(d < 5e-4, "norm of %zu x %zu: %g", n, width, d);
        fx_down(y, dx, n * width * 4); /* y is as large */
        if (pick)
            CHECK(memcmp(y, x, n * width * 4) == 0, "picked rows change x");
        else
            CHECK((d = fx_apart(y, sum, n * width)) < 1e-6, "sum: %g", d);
        void *all[] = {dx, dy, dw, db, dys, ds, dr, dh}, *mine[] = {x, y, w, bias, want, sum, h};
        for (size_t i = 0; i < 8; i++) fx_free(all[i]);
        for (size_t i = 0; i < 7; i++) free(mine[i]);
    }
}

static void test_swiglu(void) {
    for (int round = 0; round < 6; round++) {
        size_t n = 1 + fx_below(4), width = 1 + fx_below(900), ldy = 2 * width, ldh = up64(width);
        float *y = fx_normals(n * ldy, round % 2 ? 1 : 300), ys[MAX_ROWS], scale[MAX_ROWS];
        double *want = calloc(n * width, sizeof *want);
        for (size_t i = 0; i < n; i++) ys[i] = 0.5f + fx_uniform();
        for (size_t i = 0; i < n * width; i++) {
            size_t r = i / width, c = i % width;
            double g = (double)y[r * ldy + c] * (double)ys[r];
            want[i] = g / (1 + exp(-g)) * (double)y[r * ldy + width + c] * (double)ys[r];
        }
        float *dy = fx_up(y, n * ldy * 4), *dys = fx_up(ys, sizeof ys),
              *ds = fx_up(NULL, sizeof scale);
        uint16_t *dh = fx_up(NULL, n * ldh * 2), *h = malloc(n * ldh * 2);
        MUST(ibidi_cu_swiglu(fx.s, dy, ldy, dys, n, width, dh, ldh, ds));
        fx_down(h, dh, n * ldh * 2);
        fx_down(scale, ds, n * 4);
        double d = rounded_apart(h, ldh, scale, want, n, width);
        CHECK(d < 5e-4, "swiglu of %zu x %zu: %g", n, width, d);
        MUST(ibidi_cu_scale_rows(fx.s, dy, ldy, dys, n, width));
        float *scaled = malloc(n * ldy * 4);
        fx_down(scaled, dy, n * ldy * 4);
        for (size_t i = 0; i < n * ldy; i++) {
            float w = i % ldy < width ? y[i] * ys[i / ldy] : y[i];
            CHECK(scaled[i] == w, "scaled %g, not %g", (double)scaled[i], (double)w);
        }
        fx_free(dy), fx_free(dys), fx_free(ds), fx_free(dh);
        free(y), free(want), free(h), free(scaled);
    }
}

/* ---- Products ---- */

typedef struct weights {
    ibid_tensor t;
    uint8_t *bytes;
    float *f; /* [rows, cols] */
    ibidi_cu_matrix m;
} weights;

static void make_row(ibid_type type, const float *v, size_t cols, uint8_t *out) {
    if (type == IBID_F32) memcpy(out, v, cols * sizeof *v);
    for (size_t c = 0; c < cols && (type == IBID_F16 || type == IBID_BF16); c++) {
        uint32_t bits;
        memcpy(&bits, v + c, sizeof bits);
        test_put_half(out + 2 * c,
                      type == IBID_F16 ? ibid_f32_to_f16(v[c]) : (uint16_t)(bits >> 16));
    }
    for (size_t c = 0; c < cols && ibid_type_block(type) > 1; c += ibid_type_block(type))
        out += test_quantise(type, v + c, ibid_f32_to_f16, out);
}

static weights make_weights(ibid_type type, size_t rows, size_t cols) {
    weights w = {.t = {.type = type, .rows = rows, .cols = cols}};
    float *v = fx_normals(rows * cols, 0.1f);
    w.t.row_bytes = ibid_type_row_bytes(type, cols);
    w.bytes = calloc(rows, w.t.row_bytes);
    w.f = malloc(rows * cols * sizeof *w.f);
    w.t.data = w.bytes;
    for (size_t r = 0; r < rows; r++) {
        make_row(type, v + r * cols, cols, w.bytes + r * w.t.row_bytes);
        fx.k->dequantize(type, w.bytes + r * w.t.row_bytes, w.f + r * cols, cols);
    }
    w.m = ibidi_cu_matrix_of(&w.t);
    uint8_t *packed = malloc(ibidi_cu_matrix_bytes(&w.m));
    for (size_t p = 0; p < w.m.panels; p++)
        MUST(ibidi_cu_pack_panel(&w.t, &w.m, p, packed + p * ibidi_cu_panel_bytes(&w.m)));
    w.m.data = fx_up(packed, ibidi_cu_matrix_bytes(&w.m));
    free(packed);
    free(v);
    return w;
}

static void free_weights(weights *w) {
    fx_free((void *)(uintptr_t)w->m.data);
    free(w->bytes);
    free(w->f);
}

static void test_product(void) {
    static const ibid_type types[] = {IBID_F32,  IBID_F16,  IBID_BF16, IBID_Q8_0,
                                      IBID_Q4_0, IBID_Q4_1, IBID_Q5_0, IBID_Q5_1,
                                      IBID_Q4_K, IBID_Q5_K, IBID_Q6_K};
    static const size_t counts[] = {1, 3, 8, 9, 17, 40, 64};
    double worst = 0;
    for (size_t i = 0; i < 22; i++) {
        weights w[3];
        size_t n_mats = 1 + i % 3, n = counts[i % 7], rows = 0, y0 = 0;
        size_t block = i % 11 >= 8 ? 256 : 32, cols = block * (1 + fx_below(block == 32 ? 20 : 3));
        if (types[i % 11] < 2 || types[i % 11] == IBID_BF16) cols -= fx_below(31);
        size_t ldh = up64(cols), n_pad = ibid_align_up(n, 8);
        for (size_t m = 0; m < n_mats; m++) {
            ibid_type type = types[m == 1 && block == 32 && cols % 32 == 0 ? (i + 3) % 8 : i % 11];
            w[m] = make_weights(type, 1 + fx_below(90), cols);
            rows += w[m].t.rows;
        }
        uint16_t *h = calloc(n_pad * ldh, 2);
        for (size_t k = 0; k < n * ldh; k++)
            if (k % ldh < cols) h[k] = ibid_f32_to_f16(fx_normal());
        uint16_t *dh = fx_up(h, n_pad * ldh * 2);
        size_t ldy = rows + 5;
        float *dy = fx_up(NULL, n * ldy * 4), *y = malloc(n * ldy * 4);
        float *dy2 = fx_up(NULL, n * ldy * 4), *y2 = malloc(n * ldy * 4);
        ibidi_cu_matrix mats[3] = {w[0].m, w[n_mats > 1].m, w[n_mats > 2 ? 2 : 0].m};
        MUST(ibidi_cu_product(fx.s, mats, n_mats, dh, ldh, n, dy, ldy));
        fx_down(y, dy, n * ldy * 4);
        for (size_t m = 0; m < n_mats; y0 += w[m++].t.rows) {
            double *want = calloc(n * w[m].t.rows, sizeof *want);
            float *got = calloc(n * w[m].t.rows, sizeof *got);
            uint16_t *dw = fx_up(NULL, w[m].t.rows * ldh * 2),
                     *full = malloc(w[m].t.rows * ldh * 2);
            for (size_t k = 0; k < n; k++) {
                for (size_t r = 0; r < w[m].t.rows; r++) {
                    got[k * w[m].t.rows + r] = y[k * ldy + y0 + r];
                    for (size_t c = 0; c < cols; c++)
                        want[k * w[m].t.rows + r] +=
                            (double)w[m].f[r * cols + c] * (double)ibid_f16_to_f32(h[k * ldh + c]);
                }
            }
            double d = fx_apart(got, want, n * w[m].t.rows);
            worst = fmax(worst, d);
            CHECK(d < 1e-3, "%s, %zu rows of %zu x %zu: %g", ibid_type_name(w[m].t.type), n,
                  w[m].t.rows, cols, d);
            /* Unpacked, and multiplied by the library. */
            MUST(ibidi_cu_unpack(fx.s, &w[m].m, 0, w[m].t.rows, dw));
            fx_down(full, dw, w[m].t.rows * ldh * 2);
            for (size_t k = 0; k < w[m].t.rows * ldh; k++) {
                float g = ibid_f16_to_f32(full[k]);
                float f = k % ldh < cols ? w[m].f[k / ldh * cols + k % ldh] : 0;
                CHECK(fabsf(g - f) <= 1e-3f * fabsf(f) + 4e-4f, "%s: weight %g, not %g",
                      ibid_type_name(w[m].t.type), (double)g, (double)f);
            }
            MUST(ibid_device_matmul(fx.d, fx.s, dw, w[m].t.rows, ldh, dh, n, dy2 + y0, ldy));
            fx_down(y2, dy2, n * ldy * 4);
            for (size_t k = 0; k < n; k++)
                for (size_t r = 0; r < w[m].t.rows; r++)
                    got[k * w[m].t.rows + r] = y2[k * ldy + y0 + r];
            d = fx_apart(got, want, n * w[m].t.rows);
            CHECK(d < 1e-3, "library: %g", d);
            fx_free(dw);
            free(want), free(got), free(full);
        }
        for (size_t k = 0; k < n; k++)
            CHECK(isnan(y[k * ldy + rows]), "a product wrote past its rows");
        for (size_t m = 0; m < n_mats; m++) free_weights(&w[m]);
        fx_free(dh), fx_free(dy), fx_free(dy2);
        free(h), free(y), free(y2);
    }
    printf("products: at most %.2g apart\n", worst);
}

static void test_embed(void) {
    static const ibid_type types[] = {IBID_F16, IBID_Q8_0, IBID_Q4_1};
    for (size_t i = 0; i < 3; i++) {
        enum { ROWS = 77, COLS = 160, N = 5 };
        weights w = make_weights(types[i], ROWS, COLS);
        ibidi_cu_row rows[N] = {
            {.token = 0}, {.token = 76}, {.token = 8}, {.token = 7}, {.token = 31}};
        ibidi_cu_row *dr = fx_up(rows, sizeof rows);
        float *dx = fx_up(NULL, sizeof(float[N][COLS])), x[N][COLS];
        MUST(ibidi_cu_embed(fx.s, &w.m, dr, N, dx));
        fx_down(x, dx, sizeof x);
        for (size_t k = 0; k < N * COLS; k++) {
            float want = w.f[rows[k / COLS].token * COLS + k % COLS], got = x[k / COLS][k % COLS];
            CHECK(fabsf(got - want) <= 1e-3f * fabsf(want) + 1e-4f, "token's weight %g, not %g",
                  (double)got, (double)want);
        }
        fx_free(dr), fx_free(dx);
        free_weights(&w);
    }
}

/* ---- Sampling ---- */

static void test_sample(void) {
    enum { N = 4, DRAWS = 200 };
    for (int round = 0; round < 4; round++) {
        size_t vocab = 5 + fx_below(3000), ld = vocab + fx_below(5);
        float *l = fx_normals(N * ld, 2), *dl, t[N], p[N], u[N];
        uint32_t token[N], *dt = fx_up(NULL, sizeof token);
        l[3] = l[4] = 20; /* equals: the first of them */
        dl = fx_up(l, N * ld * 4);
        float *d_t, *d_p, *d_u;
        for (int draw = 0; draw < DRAWS / (round + 1) / 10; draw++) {
            for (size_t i = 0; i < N; i++) {
                t[i] = i == 0 ? 0 : 0.5f + fx_uniform();
                p[i] = i == 3 ? 1 : 0.2f + 0.7f * fx_uniform();
                u[i] = draw == 0 ? 0 : draw == 1 ? 0.99999994f : fx_uniform();
            }
            d_t = fx_up(t, sizeof t), d_p = fx_up(p, sizeof p), d_u = fx_up(u, sizeof u);
            MUST(ibidi_cu_sample(fx.s, dl, ld, N, vocab, d_t, d_p, d_u, dt));
            fx_down(token, dt, sizeof token);
            CHECK(token[0] == 3, "greedy: %u", token[0]);
            for (size_t i = 1; i < N; i++) {
                /* In double: what is at least as probable, and all up to the token in order. */
                double all = 0, above = 0, kept = 0, before = 0, w, mine;
                const float *row = l + i * ld;
                CHECK(token[i] < vocab, "token %u of %zu", token[i], vocab);
                mine = exp((double)row[token[i]] / (double)t[i]);
                for (size_t v = 0; v < vocab; v++) {
                    w = exp((double)row[v] / (double)t[i]);
                    all += w;
                    if (w > mine) above += w;
                }
                CHECK(above < (double)p[i] * all * (1 + 1e-4), "token %u is outside of top-p",
                      token[i]);
                for (int pass = 0; pass < 2; pass++) {
                    for (size_t v = 0; v < vocab; v++) {
                        double higher = 0;
                        w = exp((double)row[v] / (double)t[i]);
                        for (size_t o = 0; o < vocab && pass == 0 && vocab < 600; o++) {
                            double wo = exp((double)row[o] / (double)t[i]);
                            if (wo > w) higher += wo;
                        }
                        if (pass || vocab >= 600 || higher >= (double)p[i] * all) continue;
                        kept += w;
                        if (v < token[i]) before += w;
                    }
                }
                if (vocab >= 600) continue;
                double at = (double)u[i] * kept, slack = 1e-4 * kept;
                CHECK(at >= before - slack && at <= before + mine + slack,
                      "draw %g of %g gave [%g, %g)", at, kept, before, before + mine);
            }
            fx_free(d_t), fx_free(d_p), fx_free(d_u);
        }
        fx_free(dl), fx_free(dt);
        free(l);
    }
}

/* What is not a number counts for nothing; all of that is no token. */
static void test_sample_broken(void) {
    enum { N = 4, V = 9 };
    float l[N][V], t[N] = {0, 1, 1, 0}, p[N] = {1, 1, 0.5f, 1}, u[N] = {0};
    uint32_t token[N], *dt = fx_up(NULL, sizeof token);
    for (size_t i = 0; i < N * V; i++) l[i / V][i % V] = i / V == 3 || i / V == 1 ? NAN : -INFINITY;
    l[0][5] = -3;
    l[1][7] = 2;
    l[2][4] = INFINITY;
    float *dl = fx_up(l, sizeof l), *d_t = fx_up(t, sizeof t), *d_p = fx_up(p, sizeof p),
          *d_u = fx_up(u, sizeof u);
    MUST(ibidi_cu_sample(fx.s, dl, V, N, V, d_t, d_p, d_u, dt));
    fx_down(token, dt, sizeof token);
    CHECK(token[0] == 5 && token[1] == 7 && token[2] == 4 && token[3] == UINT32_MAX, "%u %u %u %u",
          token[0], token[1], token[2], token[3]);
    fx_free(dl), fx_free(d_t), fx_free(d_p), fx_free(d_u), fx_free(dt);
}

int main(int argc, char **argv) {
    fx_start(argc > 1 ? strtoull(argv[1], NULL, 10) : 6001);
    test_norm();
    test_swiglu();
    test_product();
    test_embed();
    test_sample();
    test_sample_broken();
    fx_stop();
    printf("all passed\n");
    return 0;
}
