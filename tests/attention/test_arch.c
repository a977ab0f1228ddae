/* Every architecture with every weight type, on tiny random models of tests/support/gguf_write:
 * against what llama.cpp gave for the same files (golden/arch.bin, told in golden/make_arch.py),
 * and against a forward pass in double. What llama.cpp leaves apart from ours is its rounding of
 * activations in front of weights that are not F32, so tolerances are by type; that leaving any
 * part of an architecture out would exceed them twice is a test of its own.
 *
 * For make_arch.py: --write DIR writes the files and prints their names, --logits FILE prints what
 * the engine gives for a file as raw floats. */
#include "tests/support/engine_fixture.h"
#include "tests/support/naive_llama.h"

#include "rpc/base/hash.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
/* clang-format off */
#include <cmocka.h>
/* clang-format on */

enum { N_TOKENS = 24, VOCAB = IBID_TEST_MIN_VOCAB, N_FULL = 3, N_TYPES = 11, N_ARCHS = 4 };
enum { N_CASES = 3 * N_TYPES + 1 };

static const size_t full_rows[N_FULL] = {5, 14, N_TOKENS - 1};

/* Largest share that llama.cpp's rounding has in the logits' root mean square. */
static const struct {
    ibid_type type;
    double tolerance;
} types[N_TYPES] = {{IBID_F32, 5e-6},  {IBID_F16, 2e-3},  {IBID_BF16, 1.2e-2}, {IBID_Q8_0, 4e-2},
                    {IBID_Q4_0, 4e-2}, {IBID_Q4_1, 4e-2}, {IBID_Q5_0, 4e-2},   {IBID_Q5_1, 4e-2},
                    {IBID_Q4_K, 4e-2}, {IBID_Q5_K, 4e-2}, {IBID_Q6_K, 4e-2}};

/* Cases go by architecture, then type; odd types have tied heads. The last case is a llama with
 * biases, in F32. */
static ibid_test_gguf spec_of(size_t i) {
    ibid_test_gguf s = {.n_layers = 2,
                        .n_embd = 256,
                        .n_heads = 4,
                        .n_kv_heads = 2,
                        .n_ff = 256,
                        .n_vocab = VOCAB,
                        .n_ctx = 64,
                        .type = types[i % N_TYPES].type,
                        .seed = 4000 + i,
                        .tied = i % N_TYPES % 2};
    switch (i / N_TYPES) {
    case 0: /* as Llama 3 */
        s.rope_theta = 500000;
        s.rope_freqs = true;
        break;
    case 1:
        s.arch = "qwen2";
        s.n_heads = 8;
        s.rope_theta = 1000000;
        break;
    case 2: /* heads wider together than the model */
        s.arch = "qwen3";
        s.head_dim = 128;
        s.rope_theta = 1000000;
        break;
    default:
        s.biases = true;
        s.n_kv_heads = 4;
        break;
    }
    return s;
}

static int32_t token_at(size_t i) {
    return (int32_t)((i * 97 + 41) % VOCAB);
}

static void must(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_text(e), ibid_err_detail());
}

/* Logits of all tokens. */
static float *run(const ibid_model *m, const char *kernels, bool int8) {
    int32_t tokens[N_TOKENS];
    uint32_t positions[N_TOKENS];
    ibid_engine *e = NULL;
    ibid_seq *s = NULL;
    float *logits = calloc(N_TOKENS * m->n_vocab, sizeof *logits);
    assert_non_null(logits);
    for (size_t i = 0; i < N_TOKENS; i++) {
        tokens[i] = token_at(i);
        positions[i] = (uint32_t)i;
    }
    must(ibid_engine_open(m, &(ibid_engine_opts){.kernels = kernels, .n_threads = 2, .int8 = int8},
                          &e));
    must(ibid_seq_open(e, N_TOKENS, &s));
    ibid_step step = {.seq = s,
                      .tokens = tokens,
                      .positions = positions,
                      .n = N_TOKENS,
                      .n_logits = N_TOKENS,
                      .logits = logits};
    must(ibid_engine_forward(e, &step, 1, NULL));
    ibid_seq_close(s);
    ibid_engine_close(e);
    return logits;
}

/* ---- against llama.cpp ---- */

typedef struct golden {
    uint64_t file, weights; /* checksum of the file; of weights as the gguf package has them */
    float logits[N_FULL][VOCAB];
} golden;

static golden *read_golden(void) {
    static const char path[] = "tests/golden/arch.bin";
    char head[16] = {0};
    golden *g = calloc(N_CASES, sizeof *g);
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("%s is missing: make it with tests/golden/make_arch.py", path);
    assert_non_null(g);
    assert_int_equal(fread(head, 1, sizeof head, f), sizeof head);
    assert_memory_equal(head, "IBAR\1\0\0\0", 8);
    for (size_t i = 0; i < N_CASES; i++) {
        assert_int_equal(fread(&g[i].file, sizeof g->file, 1, f), 1);
        assert_int_equal(fread(&g[i].weights, sizeof g->weights, 1, f), 1);
        assert_int_equal(fread(g[i].logits, sizeof g->logits, 1, f), 1);
    }
    assert_int_equal(fgetc(f), EOF);
    fclose(f);
    return g;
}

/* Root mean square of the golden rows' difference, over that of the rows. */
static double apart(const golden *g, const float *logits) {
    double off = 0, size = 0;
    for (size_t i = 0; i < N_FULL; i++) {
        for (size_t v = 0; v < VOCAB; v++) {
            double want = (double)g->logits[i][v];
            double d = (double)logits[full_rows[i] * VOCAB + v] - want;
            off += d * d;
            size += want * want;
        }
    }
    return sqrt(off / size);
}

static void open_case(fx_model *f, size_t i) {
    ibid_test_gguf spec = spec_of(i);
    fx_open(f, &spec, NULL, 1);
}

static const char *case_name(size_t i, char buf[64]) {
    ibid_test_gguf s = spec_of(i);
    (void)snprintf(buf, 64, "%s%s %s%s", s.arch ? s.arch : "llama", s.biases ? " with biases" : "",
                   ibid_type_name(s.type), s.tied ? " tied" : "");
    return buf;
}

/* Over the bits of a matrix's weights, -0 as 0. */
static uint64_t weights_sum(const ibid_tensor *w) {
    const ibid_kernels *k = NULL;
    float *row = calloc(w->cols, sizeof *row);
    uint64_t sum = 0;
    assert_non_null(row);
    must(ibid_kernels_get(NULL, &k));
    for (size_t r = 0; r < w->rows; r++) {
        k->dequantize(w->type, (const uint8_t *)w->data + r * w->row_bytes, row, w->cols);
        for (size_t c = 0; c < w->cols; c++) {
            float f = row[c] + 0.0f;
            uint32_t bits;
            memcpy(&bits, &f, sizeof bits);
            sum = sum * 1000003 + bits;
        }
    }
    free(row);
    return sum;
}

static void test_golden(void **state) {
    (void)state;
    golden *g = read_golden();
    for (size_t i = 0; i < N_CASES; i++) {
        fx_model f;
        char name[64];
        open_case(&f, i);
        if (ibid_checksum(f.file.data, f.file.len) != g[i].file)
            fail_msg("%s: the file is not the one that golden/arch.bin was made from",
                     case_name(i, name));
        if (weights_sum(&f.m->layers[1].down) != g[i].weights)
            fail_msg("%s: weights differ from the gguf package's", case_name(i, name));
        float *logits = run(f.m, NULL, false);
        double d = apart(&g[i], logits);
        printf("%-24s %.2g\n", case_name(i, name), d);
        if (!(d <= types[i % N_TYPES].tolerance)) fail_msg("%s: %.3g away from llama.cpp", name, d);
        free(logits);
        fx_close(&f);
    }
    free(g);
}

/* A few cases with f32 and int8, on whatever backend this machine chooses: what valgrind has the
 * patience for. int8 may be off by as much as test_int8 allows it, besides. */
static void test_few(void **state) {
    static const size_t few[] = {0, 5, 2 * N_TYPES + 8}; /* llama F32 and Q4_1, qwen3 Q4_K */
    const ibid_kernels *k = NULL;
    golden *g = read_golden();
    (void)state;
    must(ibid_kernels_get(NULL, &k));
    for (size_t i = 0; i < sizeof few / sizeof *few; i++) {
        fx_model f;
        char name[64];
        double most = types[few[i] % N_TYPES].tolerance;
        open_case(&f, few[i]);
        for (int int8 = 0; int8 < (k->matmul_q8 ? 2 : 1); int8++) {
            float *logits = run(f.m, NULL, int8);
            double d = apart(&g[few[i]], logits);
            printf("%-24s %s, %s kernels: %.2g\n", case_name(few[i], name), int8 ? "int8" : "f32",
                   k->name, d);
            if (!(d <= most + 3e-2 * int8)) fail_msg("%s: %.3g away from llama.cpp", name, d);
            free(logits);
        }
        fx_close(&f);
    }
    free(g);
}

/* ---- what leaving something out would do ---- */

/* Changes part number `part` of a model; NULL if the model has no such part, else its name. */
static const char *leave_out(ibid_model *m, ibid_layer *l, int part, bool tied, float *freq) {
    ibid_tensor *biases[] = {&l->bq, &l->bk, &l->bv, &l->bo}, *norms[] = {&l->q_norm, &l->k_norm};
    static const char *const names[] = {"q bias",       "k bias", "v bias",  "output bias",
                                        "q norm",       "k norm", "pairing", "frequency factors",
                                        "output matrix"};
    switch (part) {
    case 0:
    case 1:
    case 2:
    case 3:
        if (!biases[part]->data) return NULL;
        *biases[part] = (ibid_tensor){0};
        break;
    case 4:
    case 5:
        if (!norms[part - 4]->data) return NULL;
        *norms[part - 4] = (ibid_tensor){0};
        break;
    case 6:
        m->rope.pairing = m->arch == IBID_ARCH_LLAMA ? IBID_PAIR_HALF : IBID_PAIR_NEXT;
        break;
    case 7:
        if (m->arch != IBID_ARCH_LLAMA) return NULL;
        for (size_t i = 0; i < m->rope.n_rot / 2; i++)
            freq[i] = (float)pow(500000, -2.0 * (double)i / (double)m->rope.n_rot);
        m->rope.freq = freq;
        break;
    default:
        if (tied) return NULL;
        m->output = m->embed;
        break;
    }
    return names[part];
}

enum { N_PARTS = 9 };

static void test_parts_count(void **state) {
    (void)state;
    golden *g = read_golden();
    size_t left_out = 0;
    for (size_t i = 0; i < N_CASES; i++) {
        fx_model f;
        char name[64];
        open_case(&f, i);
        for (int part = 0; part < N_PARTS; part++) {
            float freq[64];
            ibid_model m = *f.m;
            ibid_layer layers[2] = {f.m->layers[0], f.m->layers[1]};
            if (spec_of(i).biases && part == 7) continue; /* has no factors */
            m.layers = layers;
            const char *what = leave_out(&m, &layers[0], part, spec_of(i).tied, freq);
            if (!leave_out(&m, &layers[1], part, spec_of(i).tied, freq)) continue;
            float *logits = run(&m, NULL, false);
            double d = apart(&g[i], logits), most = types[i % N_TYPES].tolerance;
            if (i % N_TYPES == 0 || !(d > 2 * most))
                printf("%s without %s: %.2g\n", case_name(i, name), what, d);
            assert_true(d > 2 * most);
            free(logits);
            left_out++;
        }
        fx_close(&f);
    }
    assert_true(left_out > 3 * N_CASES);
    free(g);
}

/* ---- against a forward pass in double ---- */

static void check_naive(const fx_model *f, const double *want, const char *kernels,
                        const char *name) {
    float *logits = run(f->m, kernels, false);
    double off = 0, size = 0;
    for (size_t i = 0; i < N_TOKENS * VOCAB; i++) {
        off = fmax(off, fabs((double)logits[i] - want[i]));
        size += want[i] * want[i] / (N_TOKENS * VOCAB);
    }
    if (!(off <= 2e-5 * sqrt(size)))
        fail_msg("%s, %s kernels: off by %.3g of the logits' size", name, kernels,
                 off / sqrt(size));
    free(logits);
}

static void test_naive(void **state) {
    (void)state;
    double *want = calloc(N_TOKENS * VOCAB, sizeof *want);
    int32_t tokens[N_TOKENS];
    uint32_t positions[N_TOKENS];
    assert_non_null(want);
    for (size_t i = 0; i < N_TOKENS; i++) {
        tokens[i] = token_at(i);
        positions[i] = (uint32_t)i;
    }
    for (size_t i = 0; i < N_CASES; i++) {
        fx_model f;
        naive_kv kv;
        char name[64];
        open_case(&f, i);
        naive_kv_init(&kv, f.m, N_TOKENS);
        naive_run(&kv, tokens, positions, N_TOKENS, want, NULL, NULL);
        for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
            if ((*k)->supported()) check_naive(&f, want, (*k)->name, case_name(i, name));
        }
        naive_kv_fini(&kv);
        fx_close(&f);
    }
    free(want);
}

/* Stored KV behind an offset, which the pairing of RoPE enters by other ways: the same logits as
 * with everything live. */
static void test_stored(void **state) {
    (void)state;
    enum { STORED = 10, MOVED = 7 };
    for (size_t i = 0; i < N_CASES; i += N_TYPES) {
        fx_model f;
        int32_t tokens[N_TOKENS];
        float *want = calloc(N_TOKENS * VOCAB, sizeof *want), *got = calloc(VOCAB, sizeof *got);
        ibid_seq *s = NULL;
        assert_non_null(want);
        assert_non_null(got);
        open_case(&f, i);
        for (size_t t = 0; t < N_TOKENS; t++) tokens[t] = token_at(t);
        must(ibid_seq_open(f.e, N_TOKENS, &s));
        fx_forward(f.e, s, MOVED, tokens, N_TOKENS, N_TOKENS, want);
        ibid_seq_close(s);
        fx_kv kv = fx_encode(f.e, NULL, 0, tokens, STORED, IBID_KV_F32);
        must(ibid_seq_open(f.e, N_TOKENS, &s));
        ibid_segment g = {.layers = kv.layers, .local0 = 0, .offset = MOVED};
        must(ibid_seq_add_segment(s, &g));
        fx_forward(f.e, s, MOVED + STORED, tokens + STORED, N_TOKENS - STORED, 1, got);
        double d = fx_max_diff(got, want + (N_TOKENS - 1) * VOCAB, VOCAB);
        if (!(d < 1e-4)) fail_msg("case %zu: stored KV is off by %.3g", i, d);
        ibid_seq_close(s);
        fx_kv_free(&kv);
        fx_close(&f);
        free(want);
        free(got);
    }
}

/* Integer arithmetic on panels of each type, on every backend that has it, against the exact one.
 */
static void test_int8(void **state) {
    (void)state;
    for (size_t i = 0; i < N_CASES; i++) {
        fx_model f;
        char name[64];
        open_case(&f, i);
        float *exact = run(f.m, NULL, false);
        for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
            if (!(*k)->supported() || !(*k)->matmul_q8) continue;
            double off = 0, size = 0;
            float *logits = run(f.m, (*k)->name, true);
            for (size_t v = 0; v < N_TOKENS * VOCAB; v++) {
                off += pow((double)logits[v] - (double)exact[v], 2);
                size += pow((double)exact[v], 2);
            }
            off = sqrt(off / size);
            if (i % 4 == 0) printf("%-24s %-12s %.2g\n", case_name(i, name), (*k)->name, off);
            if (!(off <= 3e-2))
                fail_msg("%s, %s kernels: int8 is %.3g away", case_name(i, name), (*k)->name, off);
            free(logits);
        }
        free(exact);
        fx_close(&f);
    }
}

/* Prefill and then token by token, as an answer is made: the golden's last row. */
static void test_decode(void **state) {
    enum { PREFILL = N_TOKENS - 4, CASE = 5 };
    golden *g = read_golden();
    fx_model f;
    int32_t tokens[N_TOKENS];
    float logits[VOCAB];
    (void)state;
    open_case(&f, CASE);
    for (size_t t = 0; t < N_TOKENS; t++) tokens[t] = token_at(t);
    for (int int8 = 0; int8 < 2; int8++) {
        ibid_engine *e = NULL;
        ibid_seq *s = NULL;
        double off = 0, size = 0;
        must(ibid_engine_open(f.m, &(ibid_engine_opts){.n_threads = 2, .int8 = int8}, &e));
        must(ibid_seq_open(e, N_TOKENS, &s));
        fx_forward(e, s, 0, tokens, PREFILL, 1, logits);
        for (uint32_t t = PREFILL; t < N_TOKENS; t++) fx_forward(e, s, t, tokens + t, 1, 1, logits);
        ibid_seq_close(s);
        ibid_engine_close(e);
        for (size_t v = 0; v < VOCAB; v++) {
            double want = (double)g[CASE].logits[N_FULL - 1][v];
            off += pow((double)logits[v] - want, 2);
            size += want * want;
        }
        off = sqrt(off / size);
        printf("token by token, %s: %.2g\n", int8 ? "int8" : "f32", off);
        assert_true(off <= types[CASE % N_TYPES].tolerance + 3e-2 * int8);
    }
    fx_close(&f);
    free(g);
}

/* ---- for make_arch.py ---- */

static int write_files(const char *folder) {
    for (size_t i = 0; i < N_CASES; i++) {
        ibid_test_gguf spec = spec_of(i);
        ibid_buf b;
        char path[4096];
        (void)snprintf(path, sizeof path, "%s/%02zu.gguf", folder, i);
        ibid_buf_init(&b, (size_t)1 << 30);
        if (ibid_test_build_gguf(&spec, &b) || ibid_test_write_gguf(path, &spec)) return 1;
        printf("%s %llu\n", path, (unsigned long long)ibid_checksum(b.data, b.len));
        ibid_buf_fini(&b);
    }
    return 0;
}

static int print_logits(const char *path) {
    ibid_model *m = NULL;
    if (ibid_model_open(path, NULL, &m)) {
        fprintf(stderr, "%s\n", ibid_err_detail());
        return 1;
    }
    float *logits = run(m, NULL, false);
    size_t n = N_TOKENS * m->n_vocab;
    int rc = fwrite(logits, sizeof *logits, n, stdout) != n;
    free(logits);
    ibid_model_close(m);
    return rc;
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden), cmocka_unit_test(test_parts_count),
        cmocka_unit_test(test_naive),  cmocka_unit_test(test_stored),
        cmocka_unit_test(test_int8),   cmocka_unit_test(test_decode)};
    const struct CMUnitTest few[] = {cmocka_unit_test(test_few), cmocka_unit_test(test_decode)};
    if (argc == 2 && strcmp(argv[1], "--few") == 0) return cmocka_run_group_tests(few, NULL, NULL);
    if (argc == 3 && strcmp(argv[1], "--write") == 0) return write_files(argv[2]);
    if (argc == 3 && strcmp(argv[1], "--logits") == 0) return print_logits(argv[2]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
