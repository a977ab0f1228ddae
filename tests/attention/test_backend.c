/* What the room does when it is to run models on a GPU: it does, or it says why not, by a typed
 * error that names the way out; and it goes on answering. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "attention/attention.h"
#include "attention/attention_room.h"
#include "kvstore/kvstore_room.h"
#include "tests/support/gguf_write.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char data[] = "/tmp/ibid-test-XXXXXX", gguf[300];

static int set_up(void **state) {
    (void)state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    assert_non_null(mkdtemp(data));
    (void)snprintf(gguf, sizeof gguf, "%s/small.gguf", data);
    assert_int_equal(ibid_test_write_gguf(gguf, &spec), IBID_OK);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    char command[400];
    (void)snprintf(command, sizeof command, "rm -rf '%s'", data);
    return system(command);
}

/* Adds the model in a room that was told a backend. */
static ibid_err add(const char *backend, ibid_model_info *info, char detail[512]) {
    static const ibid_room_vtable *const rooms[] = {&ibid_kvstore_room, &ibid_attention_room};
    static ibid_host_opts o;
    ibid_hosted *hosted = NULL;
    ibid_client *c = NULL;
    ibid_reply r;
    char url[IBID_BUS_URL_MAX];
    o = (ibid_host_opts){.log_level = IBID_LOG_ERROR, .threads = 2, .gpu_pool = 64 << 20};
    (void)snprintf(o.data_dir, sizeof o.data_dir, "%s", data);
    (void)snprintf(o.backend, sizeof o.backend, "%s", backend);
    assert_int_equal(ibid_host_inproc(rooms, 2, &o, &hosted), IBID_OK);
    assert_int_equal(ibid_bus_url(data, "attention", true, url), IBID_OK);
    assert_int_equal(ibid_client_open(url, &c), IBID_OK);
    ibid_err e = ibid_attn_model_add(c, gguf, "small", info);
    (void)snprintf(detail, 512, "%s", e ? ibid_err_detail() : "");
    assert_int_equal(ibid_attn_status(c, &r), IBID_OK); /* it goes on */
    ibid_reply_close(&r);
    ibid_client_close(c);
    ibid_hosted_close(hosted);
    return e;
}

static void test_cuda(void **state) {
    (void)state;
    ibid_model_info info;
    char detail[512];
    ibid_err e = add("cuda", &info, detail);
    printf("cuda: %s %s\n", ibid_err_code(e), detail);
    if (!e) { /* a machine with a GPU that takes the model */
        assert_string_equal(info.backend, "cuda");
        return;
    }
    assert_int_equal(e, IBID_NOTSUP);
    assert_true(strstr(detail, "without a CUDA toolkit") || strstr(detail, "no GPU") ||
                strstr(detail, "on the GPU; it takes"));
    assert_non_null(strstr(detail, "--backend"));
}

static void test_cpu(void **state) {
    (void)state;
    ibid_model_info info;
    char detail[512];
    assert_int_equal(add("cpu", &info, detail), IBID_OK);
    assert_string_equal(info.backend, "cpu");
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cuda), cmocka_unit_test(test_cpu)};
    return cmocka_run_group_tests_name("backend", tests, set_up, tear_down);
}
