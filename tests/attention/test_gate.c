/* What storing KV in a type costs: measuring it, and refusing what costs too much. */
#include "attention/plan/gate_run.h"
#include "rpc/base/mem.h"
#include "tests/support/gguf_write.h"
#include "tests/support/test_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

/* After cmocka.h: without it the checkers do not know that fail ends a test. */
static void assert_ok(ibid_err e) {
    if (e) fail_msg("%s: %s", ibid_err_code(e), ibid_err_detail());
}

/* ---- Comparing ---- */

static void same_logits(void **state) {
    (void)state;
    float a[4] = {1, 2, 3, -1};
    ibid_gate_tally t = {0};
    for (int i = 0; i < 5; i++) assert_ok(ibid_gate_add(&t, a, a, 4, 2));
    ibid_gate_score s = ibid_gate_score_of(&t);
    double p = exp(3) / (exp(1) + exp(2) + exp(3) + exp(-1));
    assert_int_equal(s.n, 5);
    assert_true(s.kl_mean == 0 && s.kl_p99 == 0 && s.top1 == 1);
    assert_true(fabs(s.ppl_ref - 1 / p) < 1e-9 && s.ppl_ref == s.ppl_test);
    assert_true(ibid_gate_passes(&s));
    ibid_gate_fini(&t);
}

/* Two outcomes with p = 3/4 against q = 1/4: KL = 3/4 log 3 - 1/4 log 3. */
static void known_divergence(void **state) {
    (void)state;
    float a[2] = {logf(3), 0}, b[2] = {0, logf(3)}, huge[2] = {1e30f, -1e30f}, nan[2] = {NAN, 0};
    ibid_gate_tally t = {0};
    assert_ok(ibid_gate_add(&t, a, b, 2, -1));
    ibid_gate_score s = ibid_gate_score_of(&t);
    assert_true(fabs(s.kl_mean - 0.5 * log(3)) < 1e-6);
    assert_true(s.top1 == 0 && s.ppl_ref == 0 && !ibid_gate_passes(&s));
    assert_ok(ibid_gate_add(&t, huge, huge, 2, 0));
    s = ibid_gate_score_of(&t);
    assert_true(isfinite(s.kl_mean) && s.top1 == 0.5 && s.ppl_ref == 1);
    assert_ok(ibid_gate_add(&t, a, nan, 2, 0));
    s = ibid_gate_score_of(&t);
    assert_true(isinf(s.kl_mean) && !ibid_gate_passes(&s));
    ibid_gate_fini(&t);
    s = ibid_gate_score_of(&t);
    assert_true(s.n == 0 && !ibid_gate_passes(&s));
}

/* ---- Measuring ---- */

typedef struct opened {
    ibid_buf file;
    ibid_model *m;
    ibid_engine *e;
} opened;

static void open_small(opened *o, float outlier) {
    ibid_test_gguf spec = ibid_test_gguf_small();
    char path[] = "/tmp/ibid-gate-XXXXXX";
    int fd = mkstemp(path);
    spec.head_dim = 32;
    spec.key_outlier = outlier;
    assert_true(fd >= 0);
    (void)close(fd);
    assert_ok(ibid_test_write_gguf(path, &spec));
    assert_ok(ibid_model_open(path, NULL, &o->m));
    (void)unlink(path);
    assert_ok(ibid_engine_open(o->m, &(ibid_engine_opts){.n_threads = 1}, &o->e));
}

static void close_opened(opened *o) {
    ibid_engine_close(o->e);
    ibid_model_close(o->m);
}

static void measure(const opened *o, size_t positions, ibid_gate_score *out) {
    static const ibid_kv_type types[] = {IBID_KV_F32, IBID_KV_F16, IBID_KV_Q8_0};
    ibid_gate_job j = {.engine = o->e, .positions = positions, .types = types, .n_types = 3};
    assert_ok(ibid_gate_run(&j, out));
    for (size_t i = 0; i < 3; i++)
        print_message("%s: %zu positions, KL %.2e (p99 %.2e), top-1 %.4f, perplexity %.3f %.3f\n",
                      ibid_kv_type_name(types[i]), out[i].n, out[i].kl_mean, out[i].kl_p99,
                      out[i].top1, out[i].ppl_ref, out[i].ppl_test);
}

static void small_model(void **state) {
    (void)state;
    opened o = {0};
    ibid_gate_score s[3];
    open_small(&o, 0);
    measure(&o, 500, s);
    assert_int_equal(s[0].n, 500);
    assert_true(s[0].kl_mean < 1e-9 && s[0].top1 == 1); /* stored f32 is what was live */
    assert_true(s[1].kl_mean < s[2].kl_mean);
    assert_true(ibid_gate_passes(&s[1]));
    close_opened(&o);
}

/* A few key dimensions far larger than the others of their group: 8 bits do not hold the rest. */
static void outliers(void **state) {
    (void)state;
    opened o = {0};
    ibid_gate_score s[3];
    open_small(&o, 300);
    measure(&o, 500, s);
    assert_true(s[0].kl_mean < 1e-9);
    assert_false(ibid_gate_passes(&s[2]));
    close_opened(&o);
}

static void refused(void **state) {
    (void)state;
    opened o = {0};
    ibid_gate_score s;
    ibid_kv_type type = IBID_KV_F16;
    open_small(&o, 0);
    ibid_gate_job j = {
        .engine = o.e, .text = {"too short", 9}, .positions = 10, .types = &type, .n_types = 1};
    assert_int_equal(ibid_gate_run(&j, &s), IBID_INVAL);
    atomic_bool stop = true;
    j.text.s = NULL;
    j.cancel = &stop;
    assert_int_equal(ibid_gate_run(&j, &s), IBID_CANCELLED);
    close_opened(&o);
}

static void default_model(void **state) {
    (void)state;
    opened o = {0};
    ibid_gate_score s[3];
    const char *path = ibid_test_model_path();
    if (!path) skip();
    assert_ok(ibid_model_open(path, &(ibid_hash){{0}}, &o.m));
    assert_ok(ibid_engine_open(o.m, &(ibid_engine_opts){.n_threads = 0}, &o.e));
    measure(&o, 512, s);
    assert_true(s[0].kl_mean < 1e-9);
    assert_true(ibid_gate_passes(&s[1]));
    assert_true(ibid_gate_passes(&s[2]));
    close_opened(&o);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_logits), cmocka_unit_test(known_divergence),
        cmocka_unit_test(small_model), cmocka_unit_test(outliers),
        cmocka_unit_test(refused),     cmocka_unit_test(default_model),
    };
    int failed = cmocka_run_group_tests_name("gate", tests, NULL, NULL);
    return failed ? 1 : ibid_test_model_exit();
}
