/* Training a retrieval head: the gradient against finite differences, the same result for any
 * number of threads, what it learns on data made for it, and on a real model. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "attention/plan/head_train_run.h"
#include "rpc/base/mem.h"
#include "tests/support/ready.h"
#include "tests/support/test_model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEAD = 32, INPUTS = 2, D = HEAD * INPUTS, CHUNKS = 60, PER = 12, ASKED = 6 };

static uint64_t seed = 20261121;

static float random_float(void) {
    seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (float)((double)(seed >> 33) / 1073741824.0 - 1);
}

/* A toy language of 40 meanings. A token's key: loud channels that say nothing, and quiet ones that
 * say what it means. A chunk's tokens mean something; a question asks in other words. */
typedef struct toy {
    uint16_t rows[CHUNKS * (PER + 2 * ASKED) * D];
    float weight[CHUNKS * (PER + 2 * ASKED)];
    ibid_train_chunk chunks[CHUNKS];
    ibid_train_question questions[2 * CHUNKS];
    float teacher[3 * CHUNKS * 8];
    ibid_train_set set;
    ibid_keymap *map;
} toy;

static void put_row(toy *t, size_t row, const float *meaning) {
    for (size_t i = 0; i < D; i++) {
        float v = i < D / 2 ? 3 * random_float() : meaning[i] + 0.1f * random_float();
        t->rows[row * D + i] = ibid_f32_to_f16(v);
    }
    t->weight[row] = 1 + fabsf(random_float());
}

static toy *make_toy(uint32_t out, uint32_t hidden, bool teacher) {
    enum { MEANINGS = 40 };
    static float meanings[MEANINGS][D];
    toy *t = calloc(1, sizeof *t);
    size_t row = 0;
    seed = 20261121;
    for (size_t m = 0; m < MEANINGS; m++)
        for (size_t i = 0; i < D; i++) meanings[m][i] = random_float();
    for (size_t c = 0; c < CHUNKS; c++) {
        size_t what[PER];
        t->chunks[c] = (ibid_train_chunk){row, PER};
        for (size_t i = 0; i < PER; i++) {
            what[i] = (size_t)((random_float() + 1) * (MEANINGS / 2 - 0.01f));
            put_row(t, row++, meanings[what[i]]);
        }
        for (size_t q = 0; q < 2; q++) {
            t->questions[2 * c + q] = (ibid_train_question){row, ASKED, c, q ? 3 : 0, q ? 5 : 0};
            for (size_t i = 0; i < ASKED; i++)
                put_row(t, row++, meanings[what[(i * 2 + (q && i < 3 ? 5 : 0)) % PER]]);
        }
    }
    for (size_t i = 0; i < 3 * CHUNKS; i++) {
        double length = 0;
        for (size_t k = 0; k < 8; k++) {
            t->teacher[i * 8 + k] = random_float();
            length += (double)t->teacher[i * 8 + k] * (double)t->teacher[i * 8 + k];
        }
        for (size_t k = 0; k < 8; k++) t->teacher[i * 8 + k] /= (float)sqrt(length);
    }
    t->set = (ibid_train_set){.rows = t->rows,
                              .weight = t->weight,
                              .chunks = t->chunks,
                              .n_chunks = CHUNKS,
                              .questions = t->questions,
                              .n_questions = 2 * CHUNKS,
                              .teacher = teacher ? t->teacher : NULL,
                              .teacher_dim = 8};
    ibid_keymap shape = {.head_dim = HEAD,
                         .n_inputs = INPUTS,
                         .out = out,
                         .hidden = hidden,
                         .has_gain = true,
                         .out_weight = 1,
                         .inputs = {{0, 0}, {1, 0}}};
    assert_int_equal(ibid_keymap_open(&shape, &t->map), IBID_OK);
    for (size_t i = 0; i < D; i++) t->map->gain[i] = i < D / 2 ? 0.6f : 1.7f;
    return t;
}

static void drop(toy *t) {
    ibid_keymap_close(t->map);
    free(t);
}

/* Along random directions, (loss(p + h v) - loss(p - h v)) / 2h = gradient . v; MaxSim is smooth
 * but where two tokens tie, so a few directions may be off. */
static void check_gradient(uint32_t hidden, bool teacher) {
    toy *t = make_toy(32, hidden, teacher);
    ibidi_trainer *r = NULL;
    const ibid_kernels *reference = NULL;
    size_t n = 0, bad = 0, tried = 0;
    assert_int_equal(ibid_kernels_get("reference", &reference), IBID_OK);
    ibid_train_opts o = {.batch = 8, .kernels = reference, .n_threads = 2, .lambda = 0.6f};
    assert_int_equal(ibidi_trainer_open(&t->set, &o, t->map, &r), IBID_OK);
    float *p = ibidi_trainer_parameters(r, &n);
    float *start = malloc(n * sizeof *start), *g = malloc(n * sizeof *g),
          *v = malloc(n * sizeof *v);
    memcpy(start, p, n * sizeof *p);
    ibidi_trainer_draw(r);
    double loss = ibidi_trainer_loss(r);
    memcpy(g, ibidi_trainer_gradient(r), n * sizeof *g);
    /* Each group of parameters alone: w0, w1, b1, w2, scale. */
    size_t ends[] = {32 * D, 32 * D + hidden * D, 32 * D + hidden * D + hidden, n - 1, n}, from = 0;
    for (size_t group = 0; group < 5; from = ends[group++]) {
        for (size_t k = 0; k < 6 && ends[group] > from; k++, tried++) {
            double along = 0, length = 0, h = 2e-3;
            for (size_t i = 0; i < n; i++) {
                v[i] = i >= from && i < ends[group] ? g[i] + random_float() * 1e-3f : 0;
                if (k) v[i] *= 1 + random_float();
                length += (double)v[i] * (double)v[i];
            }
            for (size_t i = 0; i < n; i++) v[i] /= (float)sqrt(length);
            for (size_t i = 0; i < n; i++) along += (double)g[i] * (double)v[i];
            for (size_t i = 0; i < n; i++) p[i] = start[i] + (float)h * v[i];
            double up = ibidi_trainer_loss(r);
            for (size_t i = 0; i < n; i++) p[i] = start[i] - (float)h * v[i];
            double down = ibidi_trainer_loss(r), found = (up - down) / (2 * h);
            bad += fabs(found - along) > 0.03 * fabs(along) + 2e-4;
            if (fabs(found - along) > 0.03 * fabs(along) + 2e-4)
                print_message("group %zu: %g by differences, %g by gradient\n", group, found,
                              along);
        }
    }
    print_message("loss %.4f, %zu of %zu directions off\n", loss, bad, tried);
    assert_true(bad * 10 <= tried);
    ibidi_trainer_close(r);
    free(start);
    free(g);
    free(v);
    drop(t);
}

static void gradient(void **state) {
    (void)state;
    check_gradient(0, false);
    check_gradient(32, false);
    check_gradient(64, true);
}

/* Share of questions whose chunk scores best among all. */
static double recall(const toy *t) {
    const ibid_kernels *k = NULL;
    size_t dim = ibid_keymap_dim(t->map), right = 0;
    float raw[PER * D];
    int8_t q[ASKED * IBID_OUT_MAX], c[CHUNKS][PER * IBID_OUT_MAX];
    int32_t best[ASKED];
    assert_int_equal(ibid_kernels_get(NULL, &k), IBID_OK);
    for (size_t i = 0; i < CHUNKS; i++) {
        k->kv_unpack(IBID_KV_F16, t->rows + t->chunks[i].row0 * D, NULL, PER * D, raw);
        assert_int_equal(ibid_token_keys(t->map, NULL, false, raw, PER, c[i]), IBID_OK);
    }
    for (size_t i = 0; i < 2 * CHUNKS; i++) {
        size_t winner = 0;
        double top = -1e9;
        k->kv_unpack(IBID_KV_F16, t->rows + t->questions[i].row0 * D, NULL, ASKED * D, raw);
        assert_int_equal(ibid_token_keys(t->map, NULL, true, raw, ASKED, q), IBID_OK);
        for (size_t j = 0; j < CHUNKS; j++) {
            double sum = 0;
            k->maxsim_i8(q, ASKED, c[j], PER, dim, best, NULL);
            for (size_t w = 0; w < ASKED; w++)
                sum += (double)t->weight[t->questions[i].row0 + w] * best[w];
            if (sum > top) {
                top = sum;
                winner = j;
            }
        }
        right += winner == t->questions[i].chunk;
    }
    return (double)right / (2 * CHUNKS);
}

static void learns(void **state) {
    (void)state;
    toy *t = make_toy(32, 64, false);
    double loss[2] = {0, 0};
    ibid_train_opts one = {.steps = 1, .batch = 16, .rate = 1e-9f, .n_threads = 2};
    assert_int_equal(ibid_head_train(&t->set, &one, t->map), IBID_OK);
    loss[0] = recall(t);
    ibid_train_opts o = {.steps = 150, .batch = 16, .n_threads = 2};
    assert_int_equal(ibid_head_train(&t->set, &o, t->map), IBID_OK);
    loss[1] = recall(t);
    print_message("recall@1 %.3f at principal components, %.3f trained\n", loss[0], loss[1]);
    assert_true(loss[1] > loss[0] + 0.1);
    drop(t);
}

static void same_for_any_threads(void **state) {
    (void)state;
    toy *a = make_toy(32, 32, true), *b = make_toy(32, 32, true);
    ibid_train_opts o = {.steps = 12, .batch = 12, .n_threads = 1};
    assert_int_equal(ibid_head_train(&a->set, &o, a->map), IBID_OK);
    o.n_threads = 3;
    assert_int_equal(ibid_head_train(&b->set, &o, b->map), IBID_OK);
    assert_memory_equal(a->map->w0, b->map->w0, 32 * D * 2);
    assert_memory_equal(a->map->w1, b->map->w1, 32 * D * 2);
    assert_memory_equal(a->map->w2, b->map->w2, 32 * 32 * 2);
    assert_memory_equal(a->map->b1, b->map->b1, 32 * sizeof(float));
    drop(a);
    drop(b);
}

static void cancel_at_10(void *arg, size_t step, size_t steps, double loss) {
    (void)steps;
    (void)loss;
    if (step == 10) atomic_store((atomic_bool *)arg, true);
}

static void stops(void **state) {
    (void)state;
    toy *t = make_toy(32, 32, false);
    atomic_bool cancel = false;
    ibid_train_opts o = {
        .batch = 8, .n_threads = 2, .cancel = &cancel, .progress = cancel_at_10, .arg = &cancel};
    assert_int_equal(ibid_head_train(&t->set, &o, t->map), IBID_CANCELLED);
    t->set.n_questions = 6; /* of three chunks */
    atomic_store(&cancel, false);
    assert_int_equal(ibid_head_train(&t->set, &o, t->map), IBID_INVAL);
    drop(t);
}

/* ---- The default model ---- */

static void open_model(ready *x) {
    ibid_engine_opts o = {.int8 = true};
    memset(x, 0, sizeof *x);
    assert_int_equal(ready_open(x, ibid_test_model_path(), &o, &ibid_wording_default), IBID_OK);
}

static void read_file(const char *path, ibid_buf *out) {
    char block[4096];
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    for (size_t n; (n = fread(block, 1, sizeof block, f)) > 0;)
        assert_int_equal(ibid_buf_append(out, block, n), IBID_OK);
    (void)fclose(f);
    assert_int_equal(ibid_buf_puts(out, "\n\n"), IBID_OK);
}

/* On this project's pages as they once were (tests/support/pages: those of today change, and with
 * them what a hundred steps can win): what is kept beat the raw heads clearly on pages that were
 * held out, and a hundred steps never cost rank against the untrained projection. */
static void real_model(void **state) {
    static const char *const pages[] = {
        "tests/support/pages/design.md", "tests/support/pages/performance.md",
        "tests/support/pages/format.md", "tests/support/pages/README.md",
        "attention/plan/sample.txt",     "tools/sample/bridge.md",
        "tools/sample/railway.md",       "tools/sample/lighthouse.txt"};
    ready x;
    ibid_buf text, report, pairs;
    ibid_train_texts texts;
    ibid_calibration raw = {.head_dim = 64, .n_heads = 1, .keys_weight = 0.5f}, known;
    ibid_cal_ranking ranking = {.heads = {{9, 0}, {7, 0}, {5, 1}, {5, 2}, {3, 1}, {2, 1}, {8, 2}},
                                .n = 7};
    ibid_train_result result;
    ibid_train_opts o = {.steps = 100, .batch = 32}, none = {.steps = 1, .rate = 1e-9f};
    double before = 0;
    (void)state;
    if (!ibid_test_model_path()) return;
    open_model(&x);
    ibid_buf_init(&text, 4 << 20);
    ibid_buf_init(&report, 1 << 20);
    ibid_buf_init(&pairs, 16 << 20);
    for (size_t i = 0; i < sizeof pages / sizeof *pages; i++) read_file(pages[i], &text);
    assert_int_equal(ibid_train_texts_open(x.m, (ibid_str){text.data, 2000}, &texts), IBID_INVAL);
    assert_int_equal(ibid_train_texts_open(x.m, (ibid_str){text.data, text.len}, &texts), IBID_OK);
    for (size_t i = 0; i + 1 < texts.n_questions; i++)
        assert_true(texts.questions[i].chunk <= texts.questions[i + 1].chunk);
    assert_int_equal(ibid_train_texts_write(x.m, &texts, &pairs), IBID_OK);
    size_t lines = 0;
    for (size_t i = 0; i < pairs.len; i++) lines += pairs.data[i] == '\n';
    assert_int_equal(lines, texts.n_chunks + texts.n_questions);
    raw.heads[0] = ranking.heads[0];
    assert_int_equal(ibid_keymap_open_raw(raw.heads, 1, 64, &raw.map), IBID_OK);
    ibid_teacher wrong = {text.data, 1000};
    assert_int_equal(
        ibid_calibrate_train(&x.r, &texts, wrong, &raw, &ranking, &o, &known, &result, NULL),
        IBID_INVAL);
    for (int trained = 0; trained < 2; trained++) {
        before = trained ? result.trained_mrr : 0;
        ibid_buf_clear(&report);
        assert_int_equal(ibid_calibrate_train(&x.r, &texts, (ibid_teacher){NULL, 0}, &raw, &ranking,
                                              trained ? &o : &none, &known, &result, &report),
                         IBID_OK);
        print_message("%s", report.data);
        assert_int_equal(result.kept, result.gain > 2 * result.gain_error);
        if (result.kept) assert_int_equal(ibid_keymap_dim(known.map), 64);
        if (!trained) ibid_calibration_fini(&known);
    }
    assert_true(result.n_held_out >= 40);
    assert_true(result.trained_mrr > before - 0.02);
    assert_true(result.trained_mrr > result.raw_mrr);
    ibid_calibration_fini(&known);
    ibid_calibration_fini(&raw);
    ibid_train_texts_close(&texts);
    ibid_buf_fini(&text);
    ibid_buf_fini(&report);
    ibid_buf_fini(&pairs);
    ready_close(&x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gradient),
        cmocka_unit_test(learns),
        cmocka_unit_test(same_for_any_threads),
        cmocka_unit_test(stops),
        cmocka_unit_test(real_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : ibid_test_model_exit();
}
