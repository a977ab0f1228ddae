/* Refusing KV types over a real store, hosted in one process. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "attention/attention.h"
#include "attention/attention_room.h"
#include "kvstore/kvstore_client.h"
#include "kvstore/kvstore_room.h"
#include "tests/support/gguf_write.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define assert_ok(call)                                                                            \
    do {                                                                                           \
        ibid_err ok_e = (call);                                                                    \
        if (ok_e) fail_msg("%s: %s: %s", #call, ibid_err_code(ok_e), ibid_err_detail());           \
    } while (0)

typedef struct fixture {
    char data[256], gguf[300];
    ibid_hosted *hosted;
    ibid_client *kv, *at;
    ibid_store *store;
} fixture;

static void start(fixture *f) {
    static const ibid_room_vtable *const rooms[] = {&ibid_kvstore_room, &ibid_attention_room};
    static ibid_host_opts o;
    char url[IBID_BUS_URL_MAX], dir[300];
    o = (ibid_host_opts){.log_level = IBID_LOG_ERROR, .threads = 2};
    (void)snprintf(o.data_dir, sizeof o.data_dir, "%s", f->data);
    assert_ok(ibid_host_inproc(rooms, 2, &o, &f->hosted));
    assert_ok(ibid_bus_url(f->data, "kvstore", true, url));
    assert_ok(ibid_client_open(url, &f->kv));
    assert_ok(ibid_bus_url(f->data, "attention", true, url));
    assert_ok(ibid_client_open(url, &f->at));
    (void)snprintf(dir, sizeof dir, "%s/" IBID_STORE_FOLDER, f->data);
    assert_ok(ibid_store_open(&(ibid_store_opts){.dir = dir, .readonly = true}, &f->store));
}

static void stop(fixture *f) {
    ibid_store_close(f->store);
    ibid_client_close(f->kv);
    ibid_client_close(f->at);
    ibid_hosted_close(f->hosted);
}

/* A model whose keys have a few dimensions so large that 8 bits lose the others. */
static int set_up(void **state) {
    fixture *f = calloc(1, sizeof *f);
    ibid_test_gguf spec = ibid_test_gguf_small();
    spec.n_ctx = 2048;
    spec.head_dim = 32;
    spec.key_outlier = 300;
    (void)snprintf(f->data, sizeof f->data, "/tmp/ibid-test-XXXXXX");
    assert_non_null(mkdtemp(f->data));
    (void)snprintf(f->gguf, sizeof f->gguf, "%s/outlier.gguf", f->data);
    assert_ok(ibid_test_write_gguf(f->gguf, &spec));
    start(f);
    *state = f;
    return 0;
}

static int tear_down(void **state) {
    fixture *f = *state;
    char command[400];
    stop(f);
    (void)snprintf(command, sizeof command, "rm -rf '%s'", f->data);
    assert_int_equal(system(command), 0);
    free(f);
    return 0;
}

static ibid_err add(fixture *f, const char *kv_type, bool force, ibid_model_info *m) {
    ibid_model_choice c = {.path = f->gguf, .name = "m", .kv_type = kv_type, .force = force};
    return ibid_attn_model_add_as(f->at, &c, m);
}

/* first: so that a block is a new one. */
static ibid_err encode(fixture *f, const ibid_model_info *m, int32_t first) {
    int32_t tokens[20];
    ibid_encode_block b = {.n_tokens = 20, .tokens = tokens};
    ibid_encode_result r;
    uint64_t number = 0, job = 0;
    for (int32_t i = 0; i < 20; i++) tokens[i] = first + i;
    ibid_job j = {.kind = {"index", 5}, .state = {"running", 7}};
    assert_ok(ibid_kvc_job_put(f->kv, &j, &job));
    return ibid_attn_encode(f->at, &m->fingerprint, job, &b, 1, &number, &r);
}

static const ibid_kv_verdict *verdict(const ibid_kv_gate *g, const char *type) {
    for (size_t i = 0; i < g->n_types; i++)
        if (strcmp(g->types[i].type, type) == 0) return &g->types[i];
    fail_msg("no verdict on %s", type);
    return NULL;
}

static void refused_when_added(void **state) {
    fixture *f = *state;
    ibid_model_info m;
    ibid_kv_gate g;
    assert_int_equal(add(f, NULL, false, &m), IBID_INEXACT);
    assert_non_null(strstr(ibid_err_detail(), "--kv-type f16"));
    assert_non_null(strstr(ibid_err_detail(), "--force"));
    assert_int_equal(ibid_attn_model_info(f->at, "m", &m), IBID_NOTFOUND); /* nothing was kept */
    assert_int_equal(add(f, "q4", false, &m), IBID_INVAL);
    assert_ok(add(f, "f16", false, &m));
    assert_ok(encode(f, &m, 20));
    assert_int_equal(add(f, "q8_0", true, &m), IBID_EXISTS);
    assert_ok(ibid_attn_kv_gate(f->at, "m", (ibid_str){NULL, 0}, 300, false, &g));
    assert_string_equal(g.kv_type, "f16");
    assert_true(verdict(&g, "f16")->passed && verdict(&g, "f16")->positions == 300);
    assert_false(verdict(&g, "q8_0")->passed);
    assert_true(verdict(&g, "q8_0")->kl_mean > 1e-3);
    assert_ok(encode(f, &m, 50)); /* its own type is fine */
}

static void forced(void **state) {
    fixture *f = *state;
    ibid_model_info m;
    ibid_kv_gate g;
    assert_ok(add(f, "q8_0", true, &m));
    assert_ok(encode(f, &m, 20));
    stop(f);
    start(f); /* it stands in the record */
    assert_ok(encode(f, &m, 50));
    assert_ok(add(f, "q8_0", false, &m));
    assert_ok(ibid_attn_kv_gate(f->at, "m", (ibid_str){NULL, 0}, 300, false, &g));
    assert_true(!verdict(&g, "q8_0")->passed && verdict(&g, "q8_0")->forced);
    assert_true(verdict(&g, "f16")->passed && !verdict(&g, "f16")->forced);
    assert_ok(encode(f, &m, 80));
}

/* A record from before there were gates: the first new block asks, what is stored stays readable.
 */
static void old_record(void **state) {
    fixture *f = *state;
    ibid_model_info m;
    ibid_model_record rec;
    ibid_kv_gate g;
    ibid_snap *s = NULL;
    assert_ok(add(f, "q8_0", true, &m));
    assert_ok(encode(f, &m, 20));
    assert_ok(ibid_snap_begin(f->store, &s));
    assert_ok(ibid_snap_model(s, &m.fingerprint, &rec));
    assert_true(rec.gates.n > 0 && rec.kv_type == IBID_KV_Q8_0);
    rec.gates = (ibid_str){"", 0};
    assert_ok(ibid_kvc_model_put(f->kv, &rec));
    ibid_snap_end(s);
    stop(f);
    start(f);
    assert_ok(encode(f, &m, 20)); /* stored already */
    assert_int_equal(encode(f, &m, 50), IBID_INEXACT);
    assert_non_null(strstr(ibid_err_detail(), "ibid kv-gate --force"));
    stop(f);
    start(f); /* the verdict was kept */
    assert_int_equal(encode(f, &m, 50), IBID_INEXACT);
    assert_int_equal(add(f, NULL, false, &m), IBID_INEXACT);
    assert_ok(ibid_attn_kv_gate(f->at, "m", (ibid_str){NULL, 0}, 300, true, &g));
    assert_true(verdict(&g, "q8_0")->forced);
    assert_ok(encode(f, &m, 50));
}

static void bad_requests(void **state) {
    fixture *f = *state;
    ibid_kv_gate g;
    ibid_model_info m;
    assert_int_equal(ibid_attn_kv_gate(f->at, "m", (ibid_str){NULL, 0}, 0, false, &g),
                     IBID_NOTFOUND);
    assert_ok(add(f, "f32", false, &m));
    assert_int_equal(ibid_attn_kv_gate(f->at, "m", (ibid_str){"short", 5}, 0, false, &g),
                     IBID_INVAL);
    ibid_str text = {"The keeper lit the lamp at dusk, and the ships turned home.", 59};
    assert_ok(ibid_attn_kv_gate(f->at, "m", text, 0, false, &g));
    assert_true(g.types[0].positions > 10 && g.types[0].positions < 60);
    assert_string_equal(g.kv_type, "f32");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(refused_when_added, set_up, tear_down),
        cmocka_unit_test_setup_teardown(forced, set_up, tear_down),
        cmocka_unit_test_setup_teardown(old_record, set_up, tear_down),
        cmocka_unit_test_setup_teardown(bad_requests, set_up, tear_down),
    };
    return cmocka_run_group_tests_name("gate_room", tests, NULL, NULL);
}
