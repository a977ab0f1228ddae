/* What this machine can do at most, with all threads: reading memory in order, and multiplying int8
 * numbers. Prints one JSON line; null where the CPU has no instruction for it.
 *
 * usage: bench_machine [--threads N] [--megabytes 512] [--runs 5] */
#include "attention/kernels/pool.h"
#include "rpc/base/clock.h"
#include "rpc/base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { LOOPS = 4000000, ACCUMULATORS = 12 };

typedef struct machine {
    ibid_pool *pool;
    const uint64_t *data;
    size_t n_words, n_parts;
    uint64_t *sums; /* [n_parts]: so that no work can be left out */
} machine;

static void read_part(void *arg, size_t part, size_t thread) {
    machine *m = arg;
    (void)thread;
    size_t from = m->n_words / m->n_parts * part, to = from + m->n_words / m->n_parts;
    const uint64_t *p = m->data;
    uint64_t a[8] = {0};
    for (size_t i = from; i + 64 <= to; i += 64) {
        /* A word of each line is enough to make the line come. */
        for (size_t j = 0; j < 8; j++) a[j] += p[i + 8 * j];
    }
    for (size_t j = 0; j < 8; j++) m->sums[part] += a[j];
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vnni"))) static uint64_t vnni512(void) {
    __m512i acc[ACCUMULATORS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    for (int j = 0; j < ACCUMULATORS; j++) acc[j] = _mm512_set1_epi32(j);
    for (int i = 0; i < LOOPS; i++) {
        for (int j = 0; j < ACCUMULATORS; j++) acc[j] = _mm512_dpbusd_epi32(acc[j], a, b);
        /* The compiler may not see that a and b stay the same. */
        __asm__ volatile("" : "+v"(a), "+v"(b));
    }
    for (int j = 1; j < ACCUMULATORS; j++) acc[0] = _mm512_add_epi32(acc[0], acc[j]);
    return (uint64_t)(uint32_t)_mm512_cvtsi512_si32(acc[0]);
}

__attribute__((target("avx2"))) static uint64_t maddubs256(void) {
    __m256i acc[ACCUMULATORS], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
    __m256i one = _mm256_set1_epi16(1);
    for (int j = 0; j < ACCUMULATORS; j++) acc[j] = _mm256_set1_epi32(j);
    for (int i = 0; i < LOOPS; i++) {
        for (int j = 0; j < ACCUMULATORS; j++) {
            __asm__ volatile("" : "+x"(a), "+x"(b)); /* or one product would do for all */
            __m256i product = _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), one);
            acc[j] = _mm256_add_epi32(acc[j], product);
        }
    }
    for (int j = 1; j < ACCUMULATORS; j++) acc[0] = _mm256_add_epi32(acc[0], acc[j]);
    return (uint64_t)(uint32_t)_mm256_extract_epi32(acc[0], 0);
}
#endif

typedef struct int8_unit {
    const char *name;
    uint64_t (*run)(void);
    double ops; /* multiplications and additions of one run on one thread */
} int8_unit;

static int8_unit int8_of_cpu(void) {
#if defined(__x86_64__)
    double per_byte = 2.0 * LOOPS * ACCUMULATORS;
    if (__builtin_cpu_supports("avx512vnni"))
        return (int8_unit){"avx512vnni", vnni512, 64 * per_byte};
    if (__builtin_cpu_supports("avx2")) return (int8_unit){"avx2", maddubs256, 32 * per_byte};
#endif
    return (int8_unit){NULL, NULL, 0};
}

typedef struct multiplying {
    int8_unit unit;
    uint64_t *sums;
} multiplying;

static void multiply_part(void *arg, size_t part, size_t thread) {
    multiplying *m = arg;
    (void)thread;
    m->sums[part] = m->unit.run();
}

/* Best of the runs, in seconds: what the machine can do is what it does undisturbed. */
static double best(ibid_pool *pool, int runs, void (*fn)(void *, size_t, size_t), void *arg) {
    double s = 0;
    for (int r = 0; r < runs; r++) {
        uint64_t start = ibid_now_ns();
        ibid_pool_run(pool, ibid_pool_size(pool), fn, arg);
        double t = ibid_ms_since(start) / 1e3;
        s = r == 0 || t < s ? t : s;
    }
    return s;
}

static int fail(const char *what) {
    (void)fprintf(stderr, "bench_machine: %s\n", what);
    return 2;
}

int main(int argc, char **argv) {
    size_t threads = 0, megabytes = 512;
    int runs = 5;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--threads") == 0)
            threads = strtoul(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--megabytes") == 0)
            megabytes = strtoul(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--runs") == 0)
            runs = (int)strtol(argv[i + 1], NULL, 10);
    }
    if (argc % 2 == 0 || megabytes < 100 || megabytes > 65536 || runs < 1)
        return fail("usage: bench_machine [--threads N] [--megabytes 512] [--runs 5]");
    ibid_pool *pool = NULL;
    if (ibid_pool_open(threads, &pool)) return fail(ibid_err_detail());
    threads = ibid_pool_size(pool);
    size_t bytes = megabytes << 20;
    uint64_t *data = ibid_alloc_aligned(64, bytes), *sums = ibid_calloc(threads, sizeof *sums);
    if (!data || !sums) return fail("no memory");
    for (size_t i = 0; i < bytes / sizeof *data; i++) data[i] = i;
    machine m = {pool, data, bytes / sizeof *data, threads, sums};
    double read_s = best(pool, runs, read_part, &m);
    multiplying x = {int8_of_cpu(), sums};
    double int8_s = x.unit.run ? best(pool, runs, multiply_part, &x) : 0;
    uint64_t sum = 0;
    for (size_t i = 0; i < threads; i++) sum += sums[i];
    printf("{\"case\":\"machine\",\"threads\":%zu,\"megabytes\":%zu,\"read_gb_per_s\":%.2f,",
           threads, megabytes, (double)bytes / read_s / 1e9);
    if (x.unit.run)
        printf("\"int8\":\"%s\",\"int8_tops\":%.3f,", x.unit.name,
               x.unit.ops * (double)threads / int8_s / 1e12);
    else
        printf("\"int8\":null,\"int8_tops\":null,");
    printf("\"check\":%llu}\n", (unsigned long long)(sum & 0xffff));
    ibid_free(data);
    ibid_free(sums);
    ibid_pool_close(pool);
    return 0;
}
