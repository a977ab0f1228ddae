#include "tests/support/engine_fixture.h"

#include "attention/model/gguf.h"
#include "attention/model/internal.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* clang-format off */
#include <cmocka.h>
/* clang-format on */

#define SHAPE(...)                                                                                 \
    { .n_ctx = 1024, .n_vocab = 288, __VA_ARGS__ }

const ibid_test_gguf fx_shapes[FX_SHAPES] = {
    SHAPE(.n_layers = 2, .n_embd = 64, .n_heads = 2, .n_kv_heads = 2, .n_ff = 96, .type = IBID_F32,
          .seed = 11, .tied = true),
    SHAPE(.n_layers = 2, .n_embd = 128, .n_heads = 4, .n_kv_heads = 2, .n_ff = 160,
          .type = IBID_Q8_0, .seed = 12),
    SHAPE(.n_layers = 3, .n_embd = 192, .n_heads = 3, .n_kv_heads = 1, .n_ff = 256,
          .type = IBID_Q4_1, .seed = 13, .tied = true, .rope_freqs = true),
    SHAPE(.n_layers = 2, .n_embd = 128, .n_heads = 8, .n_kv_heads = 2, .n_ff = 96, .type = IBID_F16,
          .seed = 14, .head_dim = 32, .n_rot = 16, .rope_linear = 2),
    SHAPE(.n_layers = 2, .n_embd = 96, .n_heads = 6, .n_kv_heads = 2, .n_ff = 64, .type = IBID_F32,
          .seed = 15, .rope_theta = 100000),
    SHAPE(.n_layers = 2, .n_embd = 64, .n_heads = 4, .n_kv_heads = 2, .n_ff = 64, .type = IBID_Q4_0,
          .seed = 16, .tied = true, .head_dim = 64),
};

static void must(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_text(e), ibid_err_detail());
}

static void *need(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    assert_non_null(p);
    return p;
}

void fx_open_with(fx_model *f, const ibid_test_gguf *spec, const ibid_engine_opts *o) {
    ibid_gguf *g = NULL;
    ibid_hash fingerprint = {0};
    memset(f, 0, sizeof *f);
    ibid_buf_init(&f->file, (size_t)64 << 20);
    must(ibid_test_build_gguf(spec, &f->file));
    must(ibid_gguf_parse(f->file.data, f->file.len, "test model", &g));
    must(ibidi_model_build(g, &fingerprint, &f->m));
    must(ibid_engine_open(f->m, o, &f->e));
}

void fx_open(fx_model *f, const ibid_test_gguf *spec, const char *kernels, size_t n_threads) {
    fx_open_with(f, spec, &(ibid_engine_opts){.kernels = kernels, .n_threads = n_threads});
}

void fx_close(fx_model *f) {
    ibid_engine_close(f->e);
    ibid_model_close(f->m);
    ibid_buf_fini(&f->file);
}

const char *fx_default_model(void) {
    static char path[4096];
    const char *given = getenv("IBID_TEST_MODEL"), *data = getenv("XDG_DATA_HOME");
    const char *home = getenv("HOME"), *must_be = getenv("IBID_TEST_REQUIRE_MODEL");
    static const char name[] = "ibid/models/SmolLM2-135M-Instruct.Q4_1.gguf";
    if (given && *given)
        (void)snprintf(path, sizeof path, "%s", given);
    else if (data && *data)
        (void)snprintf(path, sizeof path, "%s/%s", data, name);
    else
        (void)snprintf(path, sizeof path, "%s/.local/share/%s", home ? home : "", name);
    if (access(path, R_OK) == 0) return path;
    if (must_be && strcmp(must_be, "1") == 0) fail_msg("the default model is not at %s", path);
    return NULL;
}

uint64_t fx_random(uint64_t *s) { /* splitmix64 */
    uint64_t z = *s += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

void fx_tokens(const ibid_model *m, uint64_t seed, int32_t *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = (int32_t)(fx_random(&seed) % m->n_vocab);
}

uint32_t *fx_positions(uint32_t first, size_t n) {
    uint32_t *p = need(n, sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = first + (uint32_t)i;
    return p;
}

fx_kv fx_export(const ibid_model *m, const ibid_seq *s, size_t row0, size_t n, uint64_t shift,
                ibid_kv_type type) {
    static const size_t width[] = {4, 2, 1};
    size_t values = n * m->n_kv_heads * m->head_dim, plane = values * width[type];
    size_t scales = type == IBID_KV_Q8_0 ? values / 32 * 2 : 0;
    size_t layer_bytes = 2 * (ibid_align_up(plane, 64) + ibid_align_up(scales, 64));
    fx_kv kv = {.layers = need(m->n_layers, sizeof *kv.layers), .n_layers = m->n_layers};
    uint8_t *p = kv.memory = aligned_alloc(64, m->n_layers * layer_bytes + 64);
    assert_non_null(p);
    for (size_t l = 0; l < m->n_layers; l++) {
        ibid_kv_view v = {
            .type = type, .n_tokens = n, .n_kv_heads = m->n_kv_heads, .head_dim = m->head_dim};
        v.k = p;
        v.v = p + ibid_align_up(plane, 64);
        if (scales) {
            v.k_scale = (const uint16_t *)(void *)(p + 2 * ibid_align_up(plane, 64));
            v.v_scale = v.k_scale + ibid_align_up(scales, 64) / 2;
        }
        p += layer_bytes;
        must(ibid_seq_export(s, l, row0, n, shift, &v));
        kv.layers[l] = v;
    }
    return kv;
}

void fx_kv_free(fx_kv *kv) {
    free(kv->layers);
    free(kv->memory);
}

fx_kv fx_encode(ibid_engine *e, const ibid_segment *prefix, uint32_t first, const int32_t *tokens,
                size_t n, ibid_kv_type type) {
    ibid_seq *s = NULL;
    must(ibid_seq_open(e, n, &s));
    if (prefix) must(ibid_seq_add_segment(s, prefix));
    fx_forward(e, s, first, tokens, n, 0, NULL);
    fx_kv kv = fx_export(ibid_engine_model(e), s, 0, n, 0, type);
    ibid_seq_close(s);
    return kv;
}

void fx_forward(ibid_engine *e, ibid_seq *s, uint32_t first, const int32_t *tokens, size_t n,
                size_t n_logits, float *logits) {
    uint32_t *positions = fx_positions(first, n);
    ibid_step step = {.seq = s,
                      .tokens = tokens,
                      .positions = positions,
                      .n = n,
                      .n_logits = n_logits,
                      .logits = logits};
    must(ibid_engine_forward(e, &step, 1, NULL));
    free(positions);
}

double fx_max_diff(const float *a, const float *b, size_t n) {
    double max = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        if (!(d <= max)) max = d; /* NaN, too */
    }
    return max;
}

static double log_sum(const float *x, size_t n) {
    double max = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) max = fmax(max, (double)x[i]);
    for (size_t i = 0; i < n; i++) sum += exp((double)x[i] - max);
    return max + log(sum);
}

double fx_kl(const float *a, const float *b, size_t n) {
    double la = log_sum(a, n), lb = log_sum(b, n), kl = 0;
    for (size_t i = 0; i < n; i++) {
        double p = (double)a[i] - la, q = (double)b[i] - lb;
        kl += exp(p) * (p - q);
    }
    return kl;
}
