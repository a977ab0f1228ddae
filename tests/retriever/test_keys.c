/* The FAISS key index: recall of its candidates against the exact scan, files and their damage. */
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
    assert_ok(ibidi_maxsim_blocks(k, NULL, w->snap, q, blocks, n, scores, &scored));
    assert_int_equal(scored, n);
    for (size_t i = 0; i < n; i++) out[i] = (ranked){blocks[i], scores[i]};
    qsort(out, n, sizeof *out, best_first);
    free(blocks);
    free(scores);
}

/* Share of the exact 10 best that are among the candidates. */
static double recall(const world *w, const ibidi_keyindex *x, size_t k, size_t max, uint64_t seed) {
    ranked *order = malloc(w->view.n * sizeof *order);
    uint64_t *found = malloc(max * sizeof *found);
    size_t hits = 0, total = 0;
    for (int round = 0; round < 30; round++) {
        question q;
        size_t n;
        bool all;
        make_question(w, &seed, &q);
        exact_order(w, &q.q, order);
        assert_ok(ibidi_keyindex_candidates(x, &q.q, &w->view, k, found, max, &n, &all));
        assert_true(n <= max);
        for (size_t i = 0; i < 10; i++, total++)
            for (size_t j = 0; j < n; j++)
                if (found[j] == order[i].block) {
                    hits++;
                    break;
                }
    }
    free(order);
    free(found);
    return (double)hits / (double)total;
}

static void test_recall(void **state) {
    (void)state;
    uint64_t seed = 7;
    world w;
    world_open(&w, BLOCKS, &seed);
    static const struct {
        ibidi_keyindex_opts o;
        const char *kind;
    } kinds[] = {{{1000000, 0, 1}, "Flat"}, {{1000, 1000000, 1}, "SQ8"}, {{1000, 1000, 1}, "IVF"}};
    for (size_t i = 0; i < 3; i++) {
        ibidi_keyindex *x;
        double mean;
        assert_ok(ibidi_keyindex_build(&kinds[i].o, &w.stamp, w.snap, &w.view, &x));
        assert_memory_equal(ibidi_keyindex_kind(x), kinds[i].kind, strlen(kinds[i].kind));
        assert_int_equal(ibidi_keyindex_rows(x), BLOCKS * TOKENS);
        /* the defaults of a search: 512 rows a token, up to 2000 blocks; here a sixth of them */
        double r = recall(&w, x, 512, BLOCKS / 6, 1234);
        print_message("%s: recall of the exact ten best among %d candidates: %.4f\n",
                      ibidi_keyindex_kind(x), BLOCKS / 6, r);
        assert_true(r >= 0.98);
        assert_ok(ibidi_keyindex_compare(x, w.snap, 50, &mean));
        assert_true(mean < (i == 0 ? 1e-6 : 0.005));
        ibidi_keyindex_close(x);
    }
    world_close(&w);
}

static void assert_same_answers(const world *w, const ibidi_keyindex *a, const ibidi_keyindex *b) {
    uint64_t seed = 55, fa[100], fb[100];
    for (int i = 0; i < 10; i++) {
        question q;
        size_t na, nb;
        bool all;
        make_question(w, &seed, &q);
        assert_ok(ibidi_keyindex_candidates(a, &q.q, &w->view, 128, fa, 100, &na, &all));
        assert_ok(ibidi_keyindex_candidates(b, &q.q, &w->view, 128, fb, 100, &nb, &all));
        assert_int_equal(na, nb);
        assert_memory_equal(fa, fb, na * sizeof *fa);
    }
}

static void test_files(void **state) {
    (void)state;
    uint64_t seed = 8;
    world w;
    char path[512], manifest[300];
    ibidi_keyindex_opts kinds[3] = {{1000000, 0, 1}, {1000, 1000000, 1}, {1000, 1000, 1}};
    world_open(&w, 200, &seed);
    snprintf(manifest, sizeof manifest, "%s/keys.manifest", w.t.dir);
    for (size_t i = 0; i < 3; i++) {
        ibidi_keyindex *x, *y = NULL;
        assert_err(ibidi_keyindex_load(w.t.dir, &w.stamp, &kinds[i], &y), IBID_NOTFOUND);
        assert_ok(ibidi_keyindex_build(&kinds[i], &w.stamp, w.snap, &w.view, &x));
        assert_ok(ibidi_keyindex_save(x, w.t.dir));
        assert_ok(ibidi_keyindex_load(w.t.dir, &w.stamp, &kinds[i], &y));
        assert_string_equal(ibidi_keyindex_kind(x), ibidi_keyindex_kind(y));
        assert_same_answers(&w, x, y);
        ibidi_keyindex_close(y);
        /* another calibration, another dimension, a store that went back */
        ibidi_keyindex_stamp want = w.stamp;
        want.calibration = ibid_hash_bytes("x", 1);
        assert_err(ibidi_keyindex_load(w.t.dir, &want, &kinds[i], &y), IBID_MISMATCH);
        want = w.stamp;
        want.dim = 32;
        assert_err(ibidi_keyindex_load(w.t.dir, &want, &kinds[i], &y), IBID_MISMATCH);
        want = w.stamp;
        want.generation = 4;
        assert_err(ibidi_keyindex_load(w.t.dir, &want, &kinds[i], &y), IBID_MISMATCH);
        /* damage to either file */
        for (int how = 0; how < 6; how++) {
            assert_ok(ibidi_keyindex_save(x, w.t.dir));
            assert_true(t_glob(w.t.dir, "keys-", ".faiss", path));
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
            default:
                t_truncate(manifest, 0.5);
            }
            assert_err(ibidi_keyindex_load(w.t.dir, &w.stamp, &kinds[i], &y), IBID_CORRUPT);
        }
        ibidi_keyindex_remove(w.t.dir);
        assert_false(t_glob(w.t.dir, "keys", "", path));
        ibidi_keyindex_close(x);
    }
    world_close(&w);
}

/* New blocks are added in place; dead ones are passed over. */
static void test_extend(void **state) {
    (void)state;
    uint64_t seed = 9;
    world w;
    ibidi_keyindex *x;
    ibidi_keyindex_opts o = {1000, 1000, 1};
    world_open(&w, 150, &seed);
    assert_ok(ibidi_keyindex_build(&o, &w.stamp, w.snap, &w.view, &x));
    uint64_t gone = w.view.blocks[3].block;
    add_blocks(&w, 30, &seed);
    assert_ok(ibidi_keyindex_extend(x, w.snap, &w.view, 6));
    assert_int_equal(ibidi_keyindex_rows(x), 180 * TOKENS);
    assert_int_equal(ibidi_keyindex_stamped(x)->generation, 6);
    assert_ok(ibidi_keyindex_extend(x, w.snap, &w.view, 7)); /* nothing twice */
    assert_int_equal(ibidi_keyindex_rows(x), 180 * TOKENS);
    assert_true(ibidi_keyindex_has(x, gone));
    double before = recall(&w, x, 512, 180, 77);
    ibidi_view_drop(&w.view, gone);
    assert_int_equal(ibidi_keyindex_dead_rows(x, &w.view), TOKENS);
    for (int i = 0; i < 20; i++) {
        question q;
        uint64_t found[180];
        size_t n;
        bool all;
        make_question(&w, &seed, &q);
        assert_ok(ibidi_keyindex_candidates(x, &q.q, &w.view, 100000, found, 180, &n, &all));
        assert_false(all); /* IVF looks into some of its lists */
        assert_true(n >= 90);
        for (size_t j = 0; j < n; j++) assert_true(found[j] != gone);
    }
    assert_true(before >= 0.98);
    ibidi_keyindex_close(x);
    world_close(&w);
}

static void test_empty(void **state) {
    (void)state;
    uint64_t seed = 10;
    world w;
    ibidi_keyindex *x;
    ibidi_keyindex_opts o = {.threads = 1};
    world_open(&w, 0, &seed);
    assert_ok(ibidi_keyindex_build(&o, &w.stamp, w.snap, &w.view, &x));
    question q;
    uint64_t found[4];
    size_t n;
    bool all;
    make_question(&w, &seed, &q);
    assert_ok(ibidi_keyindex_candidates(x, &q.q, &w.view, 10, found, 4, &n, &all));
    assert_int_equal(n, 0);
    assert_true(all);
    ibidi_keyindex_close(x);
    world_close(&w);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recall),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_extend),
        cmocka_unit_test(test_empty),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
