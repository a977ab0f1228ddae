/* The key index: recall of its candidates against the exact scan through every change, what is
 * alive, files and their damage. */
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCKS = 1200, TOKENS = 64, TOPICS = 60, QUESTION = 12 };

/* Clustered keys: each block draws its tokens from three topics' directions, as prose does. */
typedef struct world {
    t_store t;
    ibid_snap *snap;
    ibidi_view view;
    float *topics;
    ibidi_keyindex_stamp stamp;
} world;

static void token_near(const world *w, size_t topic, uint64_t *seed, int8_t *out) {
    float noise[T_DIM], v[T_DIM];
    t_unit(seed, noise, T_DIM);
    for (size_t i = 0; i < T_DIM; i++) v[i] = w->topics[topic * T_DIM + i] + 0.8f * noise[i];
    t_quantise(v, T_DIM, out);
}

static uint64_t put_block(world *w, uint64_t *seed) {
    int32_t tokens[TOKENS];
    int8_t keys[TOKENS * T_DIM];
    uint64_t number;
    size_t topics[3];
    for (size_t i = 0; i < 3; i++) topics[i] = t_rnd(seed) % TOPICS;
    for (size_t i = 0; i < TOKENS; i++) {
        tokens[i] = (int32_t)(t_rnd(seed) % 49152);
        token_near(w, topics[i % 3], seed, keys + i * T_DIM);
    }
    ibid_block_put b = {.model = w->t.model,
                        .prefix = ibid_hash_bytes("p", 1),
                        .kv_type = IBID_KV_Q8_0,
                        .n_tokens = TOKENS,
                        .tokens = tokens,
                        .calibration = w->t.calibration,
                        .keys = keys,
                        .keys_dim = T_DIM,
                        .job = w->t.job};
    assert_ok(ibid_store_blocks_put(w->t.s, &b, 1, &number));
    return number;
}

static void add_blocks(world *w, size_t n, uint64_t *seed) {
    uint64_t *numbers = malloc(n * sizeof *numbers);
    for (size_t i = 0; i < n; i++) numbers[i] = put_block(w, seed);
    assert_ok(ibid_snap_renew(w->snap));
    for (size_t i = 0; i < n; i++) {
        ibid_block b;
        assert_ok(ibid_snap_block(w->snap, numbers[i], &b));
        assert_ok(ibidi_view_add(&w->view, &b));
    }
    free(numbers);
}

static void world_open(world *w, size_t blocks, uint64_t *seed) {
    memset(w, 0, sizeof *w);
    print_message("seed %llu\n", (unsigned long long)*seed);
    t_open(&w->t);
    ibid_job job = {.kind = t_str("index"), .collection = t_str("c"), .state = t_str("running")};
    assert_ok(ibid_store_job_put(w->t.s, &job, &w->t.job));
    w->topics = malloc(TOPICS * T_DIM * sizeof *w->topics);
    for (size_t i = 0; i < TOPICS; i++) t_unit(seed, w->topics + i * T_DIM, T_DIM);
    assert_ok(ibid_snap_begin(w->t.s, &w->snap));
    w->stamp = (ibidi_keyindex_stamp){5, w->t.calibration, T_DIM};
    add_blocks(w, blocks, seed);
}

static void world_close(world *w) {
    ibidi_view_fini(&w->view);
    ibid_snap_end(w->snap);
    free(w->topics);
    t_close(&w->t);
}

typedef struct question {
    int8_t keys[QUESTION * T_DIM];
    double weights[QUESTION];
    ibidi_asking q;
} question;

static void make_question(const world *w, uint64_t *seed, question *q) {
    size_t topics[2] = {t_rnd(seed) % TOPICS, t_rnd(seed) % TOPICS};
    q->q = (ibidi_asking){.keys = q->keys,
                          .n = QUESTION,
                          .dim = T_DIM,
                          .calibration = w->t.calibration,
                          .weights = q->weights};
    for (size_t i = 0; i < QUESTION; i++) {
        token_near(w, topics[i % 2], seed, q->keys + i * T_DIM);
        q->q.sum += q->weights[i] = 0.5 + (double)(t_rnd(seed) % 60) / 10;
    }
}

typedef struct ranked {
    uint64_t block;
    float score;
} ranked;

static int best_first(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    return (x->score < y->score) - (x->score > y->score);
}

static void exact_order(const world *w, const ibidi_asking *q, ranked *out) {
    const ibid_kernels *k;
    size_t n = w->view.n, scored;
    uint64_t *blocks = malloc(n * sizeof *blocks);
    float *scores = malloc(n * sizeof *scores);
    for (size_t i = 0; i < n; i++) blocks[i] = w->view.blocks[i].block;
    assert_ok(ibid_kernels_get(NULL, &k));
    assert_ok(ibidi_maxsim_blocks(k, NULL, w->snap, NULL, q, blocks, n, scores, &scored));
    assert_int_equal(scored, n);
    for (size_t i = 0; i < n; i++) out[i] = (ranked){blocks[i], scores[i]};
    qsort(out, n, sizeof *out, best_first);
    free(blocks);
    free(scores);
}

static const ibid_kernels *kernels(void) {
    const ibid_kernels *k;
    assert_ok(ibid_kernels_get(NULL, &k));
    return k;
}

static ibidi_keyindex_opts with_cells(void) {
    return (ibidi_keyindex_opts){.cells_min = 1000, .cell_rows = 64, .kernels = kernels()};
}

static void build_index(world *w, const ibidi_keyindex_opts *o, ibidi_keyindex **x) {
    assert_ok(ibidi_keyindex_build(o, &w->stamp, w->snap, &w->view, w->t.dir, x));
    assert_ok(ibidi_keyindex_sync(*x, &w->view));
}

static int by_number(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Share of the exact 10 best that are among the candidates and what is not in the index yet. Of
 * those, every block's exact score is the same from the index's copy as from the store. */
static double recall(const world *w, const ibidi_keyindex *x, size_t max, uint64_t seed) {
    ibidi_keyindex_facts f = ibidi_keyindex_told(x);
    size_t hits = 0, total = 0, scored[2];
    ranked *order = malloc(w->view.n * sizeof *order);
    uint64_t *found = malloc((max + f.n_extra) * sizeof *found);
    float *scores = malloc(2 * (max + f.n_extra) * sizeof *scores);
    for (int round = 0; round < 30; round++) {
        question q;
        size_t n;
        bool all;
        make_question(w, &seed, &q);
        exact_order(w, &q.q, order);
        assert_ok(
            ibidi_keyindex_candidates(x, kernels(), NULL, &q.q, f.probes, found, max, &n, &all));
        assert_true(n <= max);
        if (f.n_extra) memcpy(found + n, f.extra, f.n_extra * sizeof *found);
        n += f.n_extra;
        qsort(found, n, sizeof *found, by_number);
        for (size_t i = 0; i < 10 && i < w->view.n; i++, total++)
            hits += bsearch(&order[i].block, found, n, sizeof *found, by_number) != NULL;
        for (size_t i = 0; i < n; i++) { /* alive, and none twice */
            assert_true(ibidi_view_at(&w->view, found[i]) < w->view.n);
            assert_true(i == 0 || found[i] > found[i - 1]);
        }
        for (int i = 0; i < 2; i++)
            assert_ok(ibidi_maxsim_blocks(kernels(), NULL, w->snap, i ? x : NULL, &q.q, found, n,
                                          scores + (size_t)i * n, &scored[i]));
        assert_int_equal(scored[0], scored[1]);
        assert_memory_equal(scores, scores + n, n * sizeof *scores);
    }
    free(order);
    free(found);
    free(scores);
    return (double)hits / (double)total;
}

static void assert_recall(const char *when, const world *w, const ibidi_keyindex *x) {
    double r = recall(w, x, BLOCKS / 6, 1234);
    print_message("recall of the exact ten best %s: %.4f\n", when, r);
    assert_true(r >= 0.98);
}

/* Through additions, removals, replacement, return, reload and compaction. */
static void test_recall(void **state) {
    (void)state;
    uint64_t seed = 7, differ;
    world w;
    ibidi_keyindex *x, *y;
    ibidi_keyindex_opts o = with_cells();
    world_open(&w, BLOCKS, &seed);
    build_index(&w, &o, &x);
    ibidi_keyindex_facts f = ibidi_keyindex_told(x);
    assert_int_equal(f.rows, BLOCKS * TOKENS);
    assert_true(f.cells > BLOCKS / 2 && f.cells < BLOCKS * 2);
    assert_int_equal(f.n_extra + f.dead_rows, 0);
    assert_recall("built", &w, x);
    assert_ok(ibidi_keyindex_compare(x, w.snap, 50, &differ));
    assert_int_equal(differ, 0);

    size_t before = w.view.n; /* added */
    add_blocks(&w, 60, &seed);
    for (size_t i = before; i < w.view.n; i++)
        for (int twice = 0; twice < 2; twice++)
            assert_ok(ibidi_keyindex_follow(x, w.view.blocks[i].block, TOKENS, true));
    f = ibidi_keyindex_told(x);
    assert_int_equal(f.n_extra, 60);
    assert_int_equal(f.extra_rows, 60 * TOKENS);
    assert_recall("after additions", &w, x);

    uint64_t gone[200]; /* removed, of the file and of what came since */
    for (size_t i = 0; i < 200; i++) {
        gone[i] = w.view.blocks[i < 190 ? i * 5 : before + i - 190].block;
        ibidi_keyindex_follow(x, gone[i], TOKENS, false);
    }
    for (size_t i = 0; i < 200; i++) ibidi_view_drop(&w.view, gone[i]);
    f = ibidi_keyindex_told(x);
    assert_int_equal(f.n_extra, 50);
    assert_int_equal(f.dead_rows, 190 * TOKENS);
    assert_recall("after removals", &w, x);

    for (size_t i = 0; i < 20; i++) { /* come back, as a document that is put again does */
        ibid_block b;
        assert_ok(ibid_snap_block(w.snap, gone[i], &b));
        assert_ok(ibidi_view_add(&w.view, &b));
        assert_ok(ibidi_keyindex_follow(x, gone[i], TOKENS, true));
    }
    assert_int_equal(ibidi_keyindex_told(x).dead_rows, 170 * TOKENS);
    assert_recall("after some came back", &w, x);

    assert_ok(ibidi_keyindex_load(w.t.dir, &w.stamp, &y));
    assert_ok(ibidi_keyindex_sync(y, &w.view));
    f = ibidi_keyindex_told(y);
    assert_int_equal(f.n_extra, 50);
    assert_int_equal(f.dead_rows, 170 * TOKENS);
    assert_recall("after a reload", &w, y);
    ibidi_keyindex_close(y);

    w.stamp.generation++;
    build_index(&w, &o, &y); /* while the old one is open */
    f = ibidi_keyindex_told(y);
    assert_int_equal(f.rows, w.view.tokens);
    assert_int_equal(f.n_extra + f.dead_rows, 0);
    assert_recall("after compaction", &w, y);
    assert_recall("of the old index, whose file is gone", &w, x);
    ibidi_keyindex_close(x);
    ibidi_keyindex_close(y);
    world_close(&w);
}

static void assert_same_answers(const world *w, const ibidi_keyindex *a, const ibidi_keyindex *b) {
    uint64_t seed = 55, fa[100], fb[100];
    size_t probes = ibidi_keyindex_told(a).probes;
    ibid_pool *pool;
    assert_ok(ibid_pool_open(2, &pool));
    assert_int_equal(probes, ibidi_keyindex_told(b).probes);
    for (int i = 0; i < 10; i++) {
        question q;
        size_t na, nb;
        bool all;
        make_question(w, &seed, &q);
        assert_ok(ibidi_keyindex_candidates(a, kernels(), NULL, &q.q, probes, fa, 100, &na, &all));
        assert_ok(ibidi_keyindex_candidates(b, kernels(), pool, &q.q, probes, fb, 100, &nb, &all));
        assert_int_equal(na, nb);
        assert_memory_equal(fa, fb, na * sizeof *fa);
    }
    ibid_pool_close(pool);
}

/* A manifest as version 2 wrote it: the same but for its first 8 bytes. */
static void make_old(const char *manifest) {
    uint8_t data[1 << 15];
    FILE *f = fopen(manifest, "r+b");
    assert_non_null(f);
    size_t n = fread(data, 1, sizeof data, f);
    assert_true(n > 16 && n < sizeof data);
    memcpy(data, "IKM2\2\0\0", 8);
    uint64_t sum = ibid_checksum(data, n - 8);
    for (size_t i = 0; i < 8; i++) data[n - 8 + i] = (uint8_t)(sum >> (8 * i));
    rewind(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static void test_files(void **state) {
    (void)state;
    uint64_t seed = 8;
    world w;
    char path[512], manifest[300];
    ibidi_keyindex_opts kinds[2] = {with_cells(), {.kernels = kernels()}};
    world_open(&w, 200, &seed);
    snprintf(manifest, sizeof manifest, "%s/keys.manifest", w.t.dir);
    for (size_t i = 0; i < 2; i++) {
        ibidi_keyindex *x, *y = NULL;
        assert_err(ibidi_keyindex_load(w.t.dir, &w.stamp, &y), IBID_NOTFOUND);
        build_index(&w, &kinds[i], &x);
        assert_true((ibidi_keyindex_told(x).cells > 0) == (i == 0));
        assert_ok(ibidi_keyindex_load(w.t.dir, &w.stamp, &y));
        assert_same_answers(&w, x, y);
        ibidi_keyindex_close(y);
        /* another calibration, another dimension, a store that went back */
        ibidi_keyindex_stamp want = w.stamp;
        want.calibration = ibid_hash_bytes("x", 1);
        assert_err(ibidi_keyindex_load(w.t.dir, &want, &y), IBID_MISMATCH);
        want = w.stamp;
        want.dim = 32;
        assert_err(ibidi_keyindex_load(w.t.dir, &want, &y), IBID_MISMATCH);
        want = w.stamp;
        want.generation = 4;
        assert_err(ibidi_keyindex_load(w.t.dir, &want, &y), IBID_MISMATCH);
        ibidi_keyindex_close(x);
        /* damage to either file */
        for (int how = 0; how < 7; how++) {
            build_index(&w, &kinds[i], &x);
            ibidi_keyindex_close(x); /* a map of a file that is cut off must not be read */
            assert_true(t_glob(w.t.dir, "keys-", ".cells", path));
            switch (how) {
            case 0:
                t_truncate(path, 0.7);
                break;
            case 1:
                t_flip(path, -1000);
                break;
            case 2:
                t_flip(path, 10);
                break;
            case 3:
                unlink(path);
                break;
            case 4:
                t_flip(manifest, 100);
                break;
            case 5:
                make_old(manifest);
                break;
            default:
                t_truncate(manifest, 0.5);
            }
            assert_err(ibidi_keyindex_load(w.t.dir, &w.stamp, &y), IBID_CORRUPT);
        }
        ibidi_keyindex_remove(w.t.dir);
        assert_false(t_glob(w.t.dir, "keys", "", path));
    }
    world_close(&w);
}

/* No blocks at all, and blocks whose keys are another calibration's. */
static void test_empty(void **state) {
    (void)state;
    uint64_t seed = 10;
    ibidi_keyindex_opts o = with_cells();
    o.cells_min = 1;
    for (int i = 0; i < 2; i++) {
        world w;
        ibidi_keyindex *x;
        question q;
        uint64_t found[4];
        size_t n;
        bool all;
        world_open(&w, i ? 3 : 0, &seed);
        make_question(&w, &seed, &q);
        if (i) w.stamp.calibration = ibid_hash_bytes("x", 1);
        build_index(&w, &o, &x);
        assert_int_equal(ibidi_keyindex_told(x).rows, 0);
        assert_int_equal(ibidi_keyindex_told(x).n_extra, w.view.n);
        assert_ok(ibidi_keyindex_candidates(x, kernels(), NULL, &q.q, 4, found, 4, &n, &all));
        assert_int_equal(n, 0);
        assert_true(all);
        ibidi_keyindex_close(x);
        world_close(&w);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recall),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_empty),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
