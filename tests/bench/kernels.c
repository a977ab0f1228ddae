/* Speed of the kernels on the shapes of the default model (SmolLM2-135M: width 576, feed-forward
 * 1536, KV width 192, vocabulary 49152, 30 layers, 9 heads of 64 over 3 KV heads). One JSON object
 * per line; every number is the median of several runs, since other programs may share the machine.
 *
 *   bench_kernels [backend ...]      default: every supported one but the reference */
#include "attention/kernels/kernels.h"
#include "attention/kernels/pool.h"
#include "rpc/base/mem.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { RUNS = 7, LAYERS = 30, WIDTH = 576, FF = 1536, KV = 192, VOCAB = 49152, PART = 32 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median seconds of one call, over RUNS timings of at least 30 ms each. */
static double measure(void (*fn)(void *), void *arg) {
    double t[RUNS];
    fn(arg);
    double begin = now();
    fn(arg);
    double once = now() - begin;
    int times = once > 0.03 ? 1 : (int)(0.03 / (once + 1e-9)) + 1;
    for (int r = 0; r < RUNS; r++) {
        begin = now();
        for (int i = 0; i < times; i++) fn(arg);
        t[r] = (now() - begin) / times;
    }
    qsort(t, RUNS, sizeof *t, by_value);
    return t[RUNS / 2];
}

static void *need(size_t bytes) {
    void *p = ibid_alloc_aligned(64, bytes);
    if (!p) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    memset(p, 1, bytes);
    return p;
}

static uint32_t rng = 1;
static uint32_t rnd(void) {
    return rng = rng * 1664525u + 1013904223u;
}

static float *random_floats(size_t n) {
    float *x = need(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (float)(rnd() >> 8) * 0x1p-23f - 1;
    return x;
}

/* ---- the machine ---- */

static volatile float sink;

#if defined(__x86_64__)
/* Twelve independent chains of fused multiply-adds: enough for any latency times width so far. */
#define FMA_CHAINS(V)                                                                              \
    "1: vfmadd231ps %%" V "0, %%" V "0, %%" V "1\n vfmadd231ps %%" V "0, %%" V "0, %%" V "2\n"     \
    "vfmadd231ps %%" V "0, %%" V "0, %%" V "3\n vfmadd231ps %%" V "0, %%" V "0, %%" V "4\n"        \
    "vfmadd231ps %%" V "0, %%" V "0, %%" V "5\n vfmadd231ps %%" V "0, %%" V "0, %%" V "6\n"        \
    "vfmadd231ps %%" V "0, %%" V "0, %%" V "7\n vfmadd231ps %%" V "0, %%" V "0, %%" V "8\n"        \
    "vfmadd231ps %%" V "0, %%" V "0, %%" V "9\n vfmadd231ps %%" V "0, %%" V "0, %%" V "10\n"       \
    "vfmadd231ps %%" V "0, %%" V "0, %%" V "11\n vfmadd231ps %%" V "0, %%" V "0, %%" V "12\n"      \
    "dec %0\n jnz 1b\n vzeroupper"
#define FMA_CLOBBERS                                                                               \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",       \
        "xmm11", "xmm12", "cc"

static void fma512(void *arg) {
    long n = *(long *)arg;
    __asm__ volatile("vpxor %%xmm0, %%xmm0, %%xmm0\n" FMA_CHAINS("zmm") : "+r"(n)::FMA_CLOBBERS);
}

static void fma256(void *arg) {
    long n = *(long *)arg;
    __asm__ volatile("vpxor %%xmm0, %%xmm0, %%xmm0\n" FMA_CHAINS("ymm") : "+r"(n)::FMA_CLOBBERS);
}

typedef struct buffer {
    const uint8_t *p;
    size_t n, parts;
    ibid_pool *pool;
} buffer;

__attribute__((target("avx2"))) static void read_part(void *arg, size_t part, size_t thread) {
    (void)thread;
    const buffer *b = arg;
    size_t size = b->n / b->parts;
    const uint8_t *p = b->p + part * size;
    __m256i s[4] = {0};
    for (size_t i = 0; i + 128 <= size; i += 128) {
        for (size_t j = 0; j < 4; j++) {
            s[j] = _mm256_xor_si256(s[j], _mm256_load_si256((const void *)(p + i + 32 * j)));
        }
    }
    s[0] = _mm256_xor_si256(_mm256_xor_si256(s[0], s[1]), _mm256_xor_si256(s[2], s[3]));
    sink = (float)_mm256_extract_epi32(s[0], 0);
}

static void read_all(void *arg) {
    buffer *b = arg;
    ibid_pool_run(b->pool, b->parts, read_part, b);
}

static void bench_machine(ibid_pool **pools, size_t n_pools) {
    long n = 1000000;
    if (__builtin_cpu_supports("fma")) {
        printf("{\"bench\":\"peak_fma256\",\"threads\":1,\"gflops\":%.1f}\n",
               12 * 16 * (double)n / measure(fma256, &n) * 1e-9);
    }
    if (__builtin_cpu_supports("avx512f")) {
        printf("{\"bench\":\"peak_fma512\",\"threads\":1,\"gflops\":%.1f}\n",
               12 * 32 * (double)n / measure(fma512, &n) * 1e-9);
    }
    buffer b = {.n = (size_t)256 << 20, .parts = 64};
    uint8_t *p = need(b.n);
    b.p = p;
    for (size_t i = 0; i < n_pools; i++) {
        b.pool = pools[i];
        printf("{\"bench\":\"read_memory\",\"threads\":%zu,\"gbps\":%.1f}\n",
               ibid_pool_size(b.pool), (double)b.n / measure(read_all, &b) * 1e-9);
    }
    ibid_free(p);
}
#else
static void bench_machine(ibid_pool **pools, size_t n_pools) {
    (void)pools;
    (void)n_pools;
}
#endif

/* ---- weights ---- */

static ibid_tensor random_weights(ibid_type type, size_t rows, size_t cols) {
    size_t block = type == IBID_Q4_1 ? 20 : type == IBID_Q4_0 ? 18 : 34;
    size_t bytes = cols / 32 * block;
    uint8_t *p = need(rows * bytes);
    for (size_t i = 0; i < rows * bytes; i++) p[i] = (uint8_t)(rnd() >> 24);
    uint16_t d = ibid_f32_to_f16(0.01f);
    for (size_t b = 0; b < rows * bytes / block; b++) {
        memcpy(p + b * block, &d, 2);
        if (type == IBID_Q4_1) memcpy(p + b * block + 2, &d, 2);
    }
    return (ibid_tensor){.type = type, .rows = rows, .cols = cols, .row_bytes = bytes, .data = p};
}

typedef struct product {
    const ibid_kernels *k;
    ibid_pool *pool;
    const ibid_tensor *w;
    size_t n_w, n; /* matrices in turn, rows of x */
    const float *x;
    float *y;
    uint8_t *scratch;
    size_t scratch_each;
    uint8_t *xq; /* x as integers, for panels; NULL: matmul on x */
    const ibid_panels *panels;
    float fine_above;
} product;

static void pack_part(void *arg, size_t part, size_t thread) {
    (void)thread;
    const product *p = arg;
    size_t i = part * 16, n = p->n - i < 16 ? p->n - i : 16, cols = p->w->cols;
    p->k->q8_pack(p->x + i * cols, cols, n, cols, p->fine_above,
                  p->xq + i / IBID_Q8_TILE * p->k->q8_bytes(cols));
}

static void product_part(void *arg, size_t part, size_t thread) {
    const product *p = arg;
    size_t r0 = part * PART, r1 = r0 + PART < p->w->rows ? r0 + PART : p->w->rows;
    if (p->xq) {
        p->k->matmul_q8(p->panels, r0, r1, p->xq, p->n, p->y, p->w->rows);
        return;
    }
    p->k->matmul(p->w, r0, r1, p->x, p->w->cols, p->n, p->y, p->w->rows,
                 p->scratch + thread * p->scratch_each);
}

static void all_products(void *arg) {
    product p = *(product *)arg;
    for (size_t i = 0; i < p.n_w; i++, p.w++, p.panels++) {
        if (p.xq) ibid_pool_run(p.pool, (p.n + 15) / 16, pack_part, &p);
        ibid_pool_run(p.pool, (p.w->rows + PART - 1) / PART, product_part, &p);
    }
}

static void bench_products(product *p, const char *what) {
    double macs = 0, bytes = 0;
    for (size_t i = 0; i < p->n_w; i++) {
        macs += (double)p->w[i].rows * (double)p->w[i].cols * (double)p->n;
        bytes += (double)p->w[i].rows * (double)p->w[i].row_bytes;
    }
    double s = measure(all_products, p);
    printf("{\"bench\":\"%s\",\"backend\":\"%s\",\"threads\":%zu,\"n\":%zu,\"us\":%.1f,"
           "\"gflops\":%.1f,\"weights_gbps\":%.2f}\n",
           what, p->k->name, ibid_pool_size(p->pool), p->n, s * 1e6, 2 * macs / s * 1e-9,
           bytes / s * 1e-9);
    fflush(stdout);
}

static void pack_weights(const ibid_tensor *w, ibid_panels *p) {
    if (!ibid_panels_shape(w, p)) abort();
    uint8_t *to = ibid_alloc_aligned(64, ibid_align_up(ibid_panels_bytes(p), 64));
    if (!to) abort();
    for (size_t i = 0; i * IBID_PANEL_ROWS < p->rows; i++)
        ibid_panels_pack(p, w, i, to + i * p->panel_bytes);
    p->data = to;
}

/* Sets of weights by integers, no group of x fine and all. */
static void bench_panels(product *p, const ibid_panels *panels, const char *what) {
    char name[64];
    p->xq = ibid_alloc_aligned(64, (p->n + IBID_Q8_TILE - 1) / IBID_Q8_TILE * p->k->q8_bytes(FF));
    if (!p->xq) abort();
    p->panels = panels;
    for (int fine = 0; fine < 2; fine++) {
        /* packs before every matrix; an engine would share */
        p->fine_above = fine ? 0 : INFINITY;
        snprintf(name, sizeof name, "%s_int%d", what, fine ? 15 : 8);
        bench_products(p, name);
    }
    ibid_free(p->xq);
    p->xq = NULL;
}

static void bench_matmul(const ibid_kernels *k, ibid_pool *pool) {
    enum { MAX_N = 512 };
    static const size_t shape[][2] = {{WIDTH, WIDTH}, {KV, WIDTH}, {FF, WIDTH}, {WIDTH, FF}};
    static ibid_tensor layers[LAYERS * 7], head[2];
    static ibid_panels panels[LAYERS * 7], head_panels[2];
    if (!head[0].data) {
        static const size_t of_layer[7] = {0, 1, 1, 0, 2, 2, 3}; /* q k v o gate up down */
        for (size_t i = 0; i < LAYERS * 7; i++) {
            const size_t *s = shape[of_layer[i % 7]];
            layers[i] = random_weights(IBID_Q4_1, s[0], s[1]);
            pack_weights(&layers[i], &panels[i]);
        }
        head[0] = random_weights(IBID_Q8_0, VOCAB, WIDTH);
        head[1] = random_weights(IBID_Q4_0, VOCAB, WIDTH);
        for (size_t i = 0; i < 2; i++) pack_weights(&head[i], &head_panels[i]);
    }
    size_t threads = ibid_pool_size(pool);
    product p = {
        .k = k, .pool = pool, .scratch_each = ibid_align_up(k->matmul_scratch(FF, MAX_N), 64)};
    p.scratch = need(p.scratch_each * threads);
    float *x = random_floats((size_t)MAX_N * FF), *y = need((size_t)MAX_N * FF * sizeof *y);
    p.x = x;
    p.y = y;
    static const size_t ns[] = {1, 3, 8, 64, 200, 512};
    for (size_t i = 0; i < sizeof ns / sizeof *ns; i++) {
        char what[64];
        p.n = ns[i];
        for (size_t s = 0; s < 4 && threads == 1 && p.n >= 64; s++) { /* one matrix: from cache */
            snprintf(what, sizeof what, "matmul_q4_1_%zux%zu", shape[s][0], shape[s][1]);
            p.w = &layers[s == 0 ? 0 : s == 1 ? 1 : s == 2 ? 4 : 6];
            p.n_w = 1;
            bench_products(&p, what);
        }
        p.w = layers;
        p.n_w = LAYERS * 7;
        bench_products(&p, "layers_q4_1");
        if (k->matmul_q8) bench_panels(&p, panels, "layers_q4_1");
    }
    for (size_t i = 0; i < 2; i++) {
        p.w = &head[i];
        p.n_w = 1;
        p.n = 1;
        bench_products(&p, i ? "head_q4_0" : "head_q8_0");
        if (k->matmul_q8) bench_panels(&p, &head_panels[i], i ? "head_q4_0" : "head_q8_0");
    }
    ibid_free(p.scratch);
    ibid_free(x);
    ibid_free(y);
}

/* ---- attention ---- */

typedef struct attend {
    const ibid_kernels *k;
    ibid_pool *pool;
    ibid_attn_args *args; /* one per KV head */
    size_t heads;
} attend;

static void attend_part(void *arg, size_t part, size_t thread) {
    (void)thread;
    const attend *a = arg;
    a->k->attn(&a->args[part]);
}

static void attend_all(void *arg) {
    attend *a = arg;
    ibid_pool_run(a->pool, a->heads, attend_part, a);
}

/* n_new query tokens of 3 heads each, the last of n_tokens, causal. */
static void bench_attn(const ibid_kernels *k, ibid_pool *pool, const char *what, ibid_kv_type type,
                       size_t n_tokens, size_t n_new) {
    enum { HEADS = 6, DIM = 64, GQA = 3 };
    static const size_t width[] = {4, 2, 1};
    static const char *const type_name[] = {"f32", "f16", "q8_0"};
    size_t n = n_tokens * HEADS * DIM, n_rows = n_new * GQA;
    float *f = random_floats(n), *q = random_floats(n_rows * DIM);
    void *kp = need(n * width[type]), *vp = need(n * width[type]);
    uint16_t *ks = need(n / 16), *vs = need(n / 16);
    k->kv_pack(type, f, n, kp, ks);
    k->kv_pack(type, f, n, vp, vs);
    ibid_kv_view kv = {type, n_tokens, HEADS, DIM, kp, vp, ks, vs};
    uint32_t *visible = need(n_rows * sizeof *visible);
    double pairs = 0;
    for (size_t r = 0; r < n_rows; r++) {
        visible[r] = (uint32_t)(n_tokens - n_new + r / GQA + 1);
        pairs += visible[r];
    }
    ibid_attn_state *state = need(HEADS * n_rows * sizeof *state);
    float *acc = need(HEADS * n_rows * DIM * sizeof *acc);
    memset(acc, 0, HEADS * n_rows * DIM * sizeof *acc);
    ibid_attn_args args[HEADS];
    for (size_t h = 0; h < HEADS; h++) {
        for (size_t r = 0; r < n_rows; r++) {
            state[h * n_rows + r] = (ibid_attn_state){.max = -INFINITY};
        }
        args[h] = (ibid_attn_args){
            .kv = &kv, .kv_head = h, .q = q, .n_rows = n_rows, .visible = visible};
        args[h].state = state + h * n_rows;
        args[h].acc = acc + h * n_rows * DIM;
    }
    attend a = {k, pool, args, HEADS};
    double s = measure(attend_all, &a) / HEADS;
    printf("{\"bench\":\"attn_%s\",\"backend\":\"%s\",\"threads\":%zu,\"kv\":\"%s\",\"tokens\":%zu,"
           "\"rows\":%zu,\"us_per_head\":%.1f,\"gflops\":%.1f,\"kv_gbps\":%.2f}\n",
           what, k->name, ibid_pool_size(pool), type_name[type], n_tokens, n_rows, s * 1e6,
           pairs * 4 * DIM / s * 1e-9,
           2 * (double)n_tokens * ((double)width[type] * DIM + (type == IBID_KV_Q8_0 ? 4 : 0)) / s *
               1e-9);
    fflush(stdout);
    ibid_free(f);
    ibid_free(q);
    ibid_free(kp);
    ibid_free(vp);
    ibid_free(ks);
    ibid_free(vs);
    ibid_free(visible);
    ibid_free(state);
    ibid_free(acc);
}

/* ---- the rest ---- */

typedef struct small {
    const ibid_kernels *k;
    float *x, *y;
    int8_t *keys;
    uint16_t *scale;
    size_t n;
    int32_t best[32];
    uint32_t at[32];
} small;

static void run_rmsnorm(void *arg) {
    small *s = arg;
    s->k->rmsnorm(s->x, s->y, 1e-5f, s->x, WIDTH);
}
static void run_rope(void *arg) {
    small *s = arg;
    s->k->rope(IBID_PAIR_NEXT, s->x, 9, 64, 64, s->y, s->y + 32);
}
static void run_swiglu(void *arg) {
    small *s = arg;
    s->k->swiglu(s->x, s->y, FF);
}
static void run_pack(void *arg) {
    small *s = arg;
    s->k->kv_pack(IBID_KV_Q8_0, s->y, KV, s->keys, s->scale);
}
static void run_maxsim(void *arg) {
    small *s = arg;
    s->k->maxsim_i8(s->keys, s->n, s->keys, 8000, 64, s->best, s->at);
}

static void bench_small(const ibid_kernels *k) {
    small s = {.k = k, .x = random_floats(FF), .y = random_floats(FF)};
    s.keys = need(8000 * 64);
    s.scale = need(64);
    for (size_t i = 0; i < 8000 * 64; i++) s.keys[i] = (int8_t)(rnd() >> 24);
    const struct {
        const char *name;
        void (*fn)(void *);
    } each[] = {{"rmsnorm_576", run_rmsnorm},
                {"rope_9x64", run_rope},
                {"swiglu_1536", run_swiglu},
                {"kv_pack_q8_0_192", run_pack}};
    for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
        for (size_t j = 0; j < FF; j++) s.x[j] = s.y[j];
        printf("{\"bench\":\"%s\",\"backend\":\"%s\",\"ns\":%.1f}\n", each[i].name, k->name,
               measure(each[i].fn, &s) * 1e9);
    }
    for (s.n = 1; s.n <= 32; s.n *= 4) {
        double t = measure(run_maxsim, &s);
        printf("{\"bench\":\"maxsim_8000x64\",\"backend\":\"%s\",\"queries\":%zu,\"us\":%.1f,"
               "\"gmacs\":%.1f,\"keys_gbps\":%.2f}\n",
               k->name, s.n, t * 1e6, (double)s.n * 8000 * 64 / t * 1e-9, 8000 * 64 / t * 1e-9);
    }
    fflush(stdout);
    ibid_free(s.x);
    ibid_free(s.y);
    ibid_free(s.keys);
    ibid_free(s.scale);
}

static void bench_backend(const ibid_kernels *k, ibid_pool **pools, size_t n_pools) {
    for (size_t i = 0; i < n_pools; i++) bench_matmul(k, pools[i]);
    for (size_t i = 0; i < n_pools; i++) {
        for (ibid_kv_type type = IBID_KV_F32; type <= IBID_KV_Q8_0; type++) {
            bench_attn(k, pools[i], "encode", type, 200, 200);
            bench_attn(k, pools[i], "prefill", type, 8000, 256);
            bench_attn(k, pools[i], "decode", type, 8000, 1);
        }
    }
    bench_small(k);
}

int main(int argc, char **argv) {
    ibid_pool *pools[2] = {NULL};
    for (size_t i = 0; i < 2; i++) {
        if (ibid_pool_open(i + 1, &pools[i])) return 1;
    }
    bench_machine(pools, 2);
    if (argc > 1) {
        for (int i = 1; i < argc; i++) {
            const ibid_kernels *k = NULL;
            if (ibid_kernels_get(argv[i], &k)) {
                fprintf(stderr, "%s\n", ibid_err_detail());
                return 1;
            }
            bench_backend(k, pools, 2);
        }
    } else {
        for (const ibid_kernels *const *k = ibid_kernels_all(); *k; k++) {
            bool slow = strcmp((*k)->name, "reference") == 0;
            if (!slow && (*k)->supported()) bench_backend(*k, pools, 2);
        }
    }
    for (size_t i = 0; i < 2; i++) ibid_pool_close(pools[i]);
    return 0;
}
