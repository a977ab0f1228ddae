/* The key index over real token keys: what an exact scan costs, what the cells' candidates cost and
 * how many of the exact ten best they keep. Not a test; no threshold.
 *
 *   bench_keys DIR [--dim 128] [--tokens N] [--grow TIMES] [--questions 300] [--probes N]
 *              [--max 2000] [--threads 2] [--from DIM0 --to DIM1]
 *
 * --max: candidates; twice and four times as many are tried too.
 * DIR holds keys made by an encoder: keys.i8 [tokens, dim], ids.i32 [tokens], blocks.u32 (tokens of
 * each block), and of questions q.i8, qids.i32, qblocks.u32 (pairs: the block the question came
 * from, its tokens). --from and --to: only those numbers of each key (one head's). --grow adds
 * copies of every block with noise in its keys (a tenth of their length) and a twentieth of the ids
 * moved: SYNTHETIC, for time and memory at sizes there is no text for, not for recall. */
#include "support.h"

#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

enum { BATCH = 512, TOP = 10 };

typedef struct options {
    const char *dir;
    size_t dim, tokens, grow, questions, probes, max, threads, from, to;
} options;

typedef struct real {
    int8_t *keys, *qkeys;
    int32_t *ids, *qids;
    uint32_t *blocks, *qblocks;
    size_t tokens, n, n_q; /* n_q questions: n_q pairs */
} real;

static void *slurp(const char *dir, const char *name, size_t *bytes) {
    char path[600];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END) != 0) {
        (void)fprintf(stderr, "bench_keys: cannot read %s\n", path);
        exit(2);
    }
    *bytes = (size_t)ftell(f);
    rewind(f);
    void *p = malloc(*bytes + 1);
    if (!p || fread(p, 1, *bytes, f) != *bytes) exit(2);
    fclose(f);
    return p;
}

/* Keeps numbers [from, to) of each key and makes them as long as the whole was. */
static void cut(int8_t *keys, size_t n, const options *o, size_t file_dim) {
    for (size_t i = 0; i < n; i++) {
        double norm = 0;
        for (size_t d = o->from; d < o->to; d++)
            norm += (double)keys[i * file_dim + d] * keys[i * file_dim + d];
        for (size_t d = o->from; d < o->to; d++)
            keys[i * o->dim + d - o->from] =
                norm > 0 ? (int8_t)lrint(127.0 * keys[i * file_dim + d] / sqrt(norm)) : 0;
    }
}

static real read_real(options *o) {
    real r;
    size_t bytes, qbytes, file_dim = o->dim;
    r.blocks = slurp(o->dir, "blocks.u32", &bytes);
    r.n = bytes / 4;
    r.ids = slurp(o->dir, "ids.i32", &bytes);
    r.keys = slurp(o->dir, "keys.i8", &qbytes);
    if (qbytes / file_dim < bytes / 4) bytes = qbytes / file_dim * 4;
    r.tokens = 0; /* the encoder may still write: whole blocks that are in all files */
    size_t n = 0;
    while (n < r.n && (r.tokens + r.blocks[n]) * 4 <= bytes && (!o->tokens || r.tokens < o->tokens))
        r.tokens += r.blocks[n++];
    r.n = n;
    r.qblocks = slurp(o->dir, "qblocks.u32", &bytes);
    r.n_q = bytes / 8;
    r.qids = slurp(o->dir, "qids.i32", &bytes);
    r.qkeys = slurp(o->dir, "q.i8", &qbytes);
    size_t at = 0;
    n = 0;
    while (n < r.n_q && (at + r.qblocks[2 * n + 1]) * 4 <= bytes &&
           (at + r.qblocks[2 * n + 1]) * file_dim <= qbytes && n < o->questions)
        at += r.qblocks[2 * n++ + 1];
    r.n_q = n;
    if (o->to) {
        o->dim = o->to - o->from;
        cut(r.keys, r.tokens, o, file_dim);
        cut(r.qkeys, at, o, file_dim);
    }
    return r;
}

/* ---- The store ---- */
static void perturb(uint64_t *seed, int8_t *keys, int32_t *ids, size_t n, size_t dim) {
    for (size_t i = 0; i < n; i++) {
        double norm = 0, at[512];
        if (t_rnd(seed) % 20 == 0) ids[i] = (int32_t)(t_rnd(seed) % 49152);
        for (size_t d = 0; d < dim; d++) {
            at[d] = keys[i * dim + d] + 12.7 / sqrt((double)dim) * 3 * t_normal(seed);
            norm += at[d] * at[d];
        }
        for (size_t d = 0; d < dim; d++)
            keys[i * dim + d] = (int8_t)lrint(127.0 * at[d] / sqrt(norm));
    }
}

static void fill(t_store *t, const options *o, const real *r, ibid_snap *snap, ibidi_view *view) {
    uint64_t seed = 11, *numbers = malloc(BATCH * sizeof *numbers);
    for (size_t copy = 0; copy <= o->grow; copy++) {
        size_t at = 0;
        for (size_t i = 0; i < r->n; i += BATCH) {
            ibid_block_put put[BATCH];
            size_t n = r->n - i < BATCH ? r->n - i : BATCH, start = at, len;
            for (size_t j = 0; j < n; j++) at += r->blocks[i + j];
            len = at - start;
            int8_t *keys = malloc(len * o->dim);
            int32_t *ids = malloc(len * sizeof *ids);
            memcpy(keys, r->keys + start * o->dim, len * o->dim);
            memcpy(ids, r->ids + start, len * sizeof *ids);
            if (copy) perturb(&seed, keys, ids, len, o->dim);
            for (size_t j = 0, k = 0; j < n; k += r->blocks[i + j++])
                put[j] = (ibid_block_put){.model = t->model,
                                          .prefix = ibid_hash_bytes("p", 1),
                                          .kv_type = IBID_KV_Q8_0,
                                          .n_tokens = r->blocks[i + j],
                                          .tokens = ids + k,
                                          .calibration = t->calibration,
                                          .keys = keys + k * o->dim,
                                          .keys_dim = o->dim,
                                          .job = t->job};
            assert_ok(ibid_store_blocks_put(t->s, put, n, numbers));
            assert_ok(ibid_snap_renew(snap));
            for (size_t j = 0; j < n; j++) {
                ibid_block b;
                assert_ok(ibid_snap_block(snap, numbers[j], &b));
                assert_ok(ibidi_view_add(view, &b));
            }
            free(keys);
            free(ids);
        }
    }
    free(numbers);
}

/* ---- Measuring ---- */
typedef struct ranked {
    uint64_t block;
    float score;
} ranked;

static int best_first(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->score != y->score) return x->score < y->score ? 1 : -1;
    return (x->block > y->block) - (x->block < y->block);
}

static int by_number(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double cpu_ms(void) {
    struct rusage u;
    (void)getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e3 +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e3;
}

typedef struct bench {
    options o;
    const ibid_kernels *k;
    ibid_pool *pool;
    ibid_snap *snap;
    ibidi_view view;
    ibidi_keyindex *x;
    uint64_t *all; /* [view.n] */
    float *scores;
    ranked *order;
} bench;

static size_t rank(bench *b, const ibidi_keyindex *x, const ibidi_asking *q, const uint64_t *blocks,
                   size_t n) {
    size_t scored;
    assert_ok(ibidi_maxsim_blocks(b->k, b->pool, b->snap, x, q, blocks, n, b->scores, &scored));
    for (size_t i = 0; i < n; i++) b->order[i] = (ranked){blocks[i], b->scores[i]};
    qsort(b->order, n, sizeof *b->order, best_first);
    return n < TOP ? n : TOP;
}

static void report(const char *what, double *ms, size_t n, double cpu) {
    qsort(ms, n, sizeof *ms, by_value);
    printf("  %-34s p50 %7.2f  p99 %7.2f  best %7.2f ms;  cpu %7.2f ms a question\n", what,
           ms[n / 2], ms[n * 99 / 100], ms[0], cpu / (double)n);
}

/* What `what` costs over all questions: 0 a scan of the store, 1 of the index's copy, 2 candidates
 * alone, 3 candidates and exact scores. best [questions, TOP]: the exact best, from 1. */
static void run(bench *b, const char *name, int what, const ibidi_asking *q, size_t n,
                uint64_t *best) {
    double *ms = malloc(n * sizeof *ms), total = 0;
    uint64_t *found = malloc(b->o.max * sizeof *found);
    size_t kept = 0, wanted = 0, candidates = 0;
    assert_ok(ibid_snap_renew(b->snap));
    for (size_t i = 0; i < n; i++) {
        double cpu = cpu_ms();
        uint64_t start = ibid_now_ns();
        size_t m = b->view.n, top = 0;
        const uint64_t *blocks = b->all;
        bool all;
        if (what >= 2) {
            assert_ok(ibidi_keyindex_candidates(b->x, b->k, b->pool, &q[i], b->o.probes, found,
                                                b->o.max, &m, &all));
            blocks = found;
            candidates += m;
        }
        if (what == 3) qsort(found, m, sizeof *found, by_number); /* as a search does */
        if (what != 2) top = rank(b, what ? b->x : NULL, &q[i], blocks, m);
        ms[i] = ibid_ms_since(start);
        total += cpu_ms() - cpu;
        for (size_t j = 0; j < top; j++) {
            if (what == 1) best[i * TOP + j] = b->order[j].block;
            if (what < 3) continue;
            wanted++;
            for (size_t l = 0; l < TOP; l++) kept += b->order[j].block == best[i * TOP + l];
        }
    }
    report(name, ms, n, total);
    if (what == 3)
        printf("  recall of the exact ten best       %.4f, %.0f candidates, %zu probes\n",
               (double)kept / (double)wanted, (double)candidates / (double)n, b->o.probes);
    free(ms);
    free(found);
}

static void measure(bench *b, const real *r) {
    ibidi_asking *q = calloc(r->n_q, sizeof *q);
    uint64_t *best = calloc(r->n_q * TOP, sizeof *best);
    size_t at = 0, n_tokens = 0;
    for (size_t i = 0; i < r->n_q; i++) {
        size_t n = r->qblocks[2 * i + 1];
        double *w = malloc(n * sizeof *w);
        q[i] = (ibidi_asking){.ids = r->qids + at,
                              .keys = r->qkeys + at * b->o.dim,
                              .n = n,
                              .dim = b->o.dim,
                              .calibration = ibidi_keyindex_told(b->x).stamp.calibration,
                              .weights = w};
        ibidi_view_idf(&b->view, q[i].ids, n, w, &q[i].sum);
        at += n;
        n_tokens += n;
    }
    printf("%zu questions of %.1f tokens\n", r->n_q, (double)n_tokens / (double)r->n_q);
    size_t few = r->n_q < 30 ? r->n_q : 30;
    run(b, "exact scan, keys in the store", 0, q, few, best);
    run(b, "exact scan, keys side by side", 1, q, r->n_q, best);
    run(b, "candidates", 2, q, r->n_q, best);
    for (size_t i = 0; i < 3; i++, b->o.max *= 2)
        run(b, "candidates and exact scores", 3, q, r->n_q, best);
    for (size_t i = 0; i < r->n_q; i++) free((double *)(uintptr_t)q[i].weights);
    free(q);
    free(best);
}

static bool read_options(options *o, int argc, char **argv) {
    static const char *const names[] = {"--dim", "--tokens",  "--grow", "--questions", "--probes",
                                        "--max", "--threads", "--from", "--to"};
    *o = (options){.dim = 128, .questions = 300, .max = 2000, .threads = 2};
    size_t *const at[] = {&o->dim, &o->tokens,  &o->grow, &o->questions, &o->probes,
                          &o->max, &o->threads, &o->from, &o->to};
    if (argc < 2 || argc % 2) return false;
    o->dir = argv[1];
    for (int i = 2; i < argc; i += 2) {
        size_t j = 0;
        while (j < 9 && strcmp(argv[i], names[j]) != 0) j++;
        if (j == 9) return false;
        *at[j] = strtoul(argv[i + 1], NULL, 10);
    }
    return o->dim && o->dim <= 512 && o->max && (!o->to || (o->from < o->to && o->to <= o->dim));
}

int main(int argc, char **argv) {
    static bench b;
    t_store t;
    if (!read_options(&b.o, argc, argv)) {
        (void)fprintf(stderr, "usage: bench_keys DIR [--dim 128] [--tokens N] [--grow TIMES] "
                              "[--questions 300]\n  [--probes N] [--max 2000] [--threads 2] "
                              "[--from DIM0 --to DIM1]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    ibid_log_init("bench", IBID_LOG_WARN);
    real r = read_real(&b.o);
    t_open(&t);
    ibid_job job = {.kind = t_str("index"), .collection = t_str("c"), .state = t_str("running")};
    assert_ok(ibid_store_job_put(t.s, &job, &t.job));
    assert_ok(ibid_kernels_get(NULL, &b.k));
    assert_ok(ibid_pool_open(b.o.threads, &b.pool));
    assert_ok(ibid_snap_begin(t.s, &b.snap));
    fill(&t, &b.o, &r, b.snap, &b.view);
    ibidi_keyindex_opts o = {.cells_min = 1, .threads = b.o.threads, .kernels = b.k};
    ibidi_keyindex_stamp stamp = {1, t.calibration, b.o.dim};
    double cpu = cpu_ms();
    uint64_t start = ibid_now_ns();
    assert_ok(ibidi_keyindex_build(&o, &stamp, b.snap, &b.view, t.dir, &b.x));
    ibidi_keyindex_facts f = ibidi_keyindex_told(b.x);
    printf("%zu blocks, %llu tokens of %zu numbers%s; %s\n", b.view.n,
           (unsigned long long)b.view.tokens, b.o.dim, b.o.grow ? ", SYNTHETIC growth" : "",
           b.k->name);
    printf("built in %.1f s (cpu %.1f s): %zu cells, %zu probes, %.1f bytes a token\n",
           ibid_ms_since(start) / 1e3, (cpu_ms() - cpu) / 1e3, f.cells, f.probes,
           (double)f.bytes / (double)f.rows);
    if (!b.o.probes) b.o.probes = f.probes;
    b.all = malloc(b.view.n * sizeof *b.all);
    b.scores = malloc(b.view.n * sizeof *b.scores);
    b.order = malloc(b.view.n * sizeof *b.order);
    for (size_t i = 0; i < b.view.n; i++) b.all[i] = b.view.blocks[i].block;
    measure(&b, &r);
    start = ibid_now_ns();
    ibidi_keyindex *again;
    assert_ok(ibidi_keyindex_load(t.dir, &stamp, &again));
    printf("opened again in %.0f ms\n", ibid_ms_since(start));
    ibidi_keyindex_close(again);
    ibidi_keyindex_close(b.x);
    ibidi_view_fini(&b.view);
    ibid_snap_end(b.snap);
    ibid_pool_close(b.pool);
    t_close(&t);
    return 0;
}
