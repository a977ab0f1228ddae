/* The room: every client call over inproc, then the real ibid-kvstore over ipc, killed and
 * restarted. argv[1]: the ibid-kvstore program. */
#include "support.h"

#include "kvstore/kvstore_client.h"
#include "kvstore/kvstore_room.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *program;

typedef struct fixture {
    char data[256], store[300];
    ibid_hosted *hosted;
    pid_t pid;
    ibid_client *c;
    ibid_store *r; /* reading, in this process */
} fixture;

static void connect_to(fixture *f, bool inproc) {
    char url[IBID_BUS_URL_MAX];
    assert_ok(ibid_bus_url(f->data, "kvstore", inproc, url));
    if (!f->c) assert_ok(ibid_client_open(url, &f->c));
    for (int i = 0; i < 100; i++)
        if (ibid_client_ping(f->c, 200, NULL, NULL) == IBID_OK) return;
    fail_msg("the kvstore room does not answer: %s", ibid_err_detail());
}

static void prepare(fixture *f) {
    *f = (fixture){.pid = 0};
    make_dir(f->data);
    (void)snprintf(f->store, sizeof f->store, "%s/" IBID_STORE_FOLDER, f->data);
}

static void host(fixture *f) {
    static const ibid_room_vtable *const rooms[] = {&ibid_kvstore_room};
    ibid_host_opts o = {.log_level = IBID_LOG_ERROR};
    prepare(f);
    (void)snprintf(o.data_dir, sizeof o.data_dir, "%s", f->data);
    assert_ok(ibid_host_inproc(rooms, 1, &o, &f->hosted));
    connect_to(f, true);
    f->r = store_open_reader(f->store);
}

static void spawn(fixture *f) {
    f->pid = fork();
    assert_true(f->pid >= 0);
    if (f->pid == 0) {
        (void)execl(program, program, "--data", f->data, "--log-level", "error", (char *)NULL);
        _exit(127);
    }
    connect_to(f, false);
}

static void finish(fixture *f) {
    ibid_store_close(f->r);
    ibid_client_close(f->c);
    ibid_hosted_close(f->hosted);
    if (f->pid > 0) {
        int status = 0;
        (void)kill(f->pid, SIGTERM);
        assert_int_equal(waitpid(f->pid, &status, 0), f->pid);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 0);
    }
    drop_dir(f->data);
}

static void remote_collection(ibid_client *c) {
    static const int32_t tokens[] = {5, -6, 7};
    ibid_model_record m = {.fingerprint = hash_of("model m"),
                           .name = str("m"),
                           .path = str("/models/m.gguf"),
                           .arch = str("llama"),
                           .n_layers = T_LAYERS,
                           .n_heads = 4,
                           .n_kv_heads = T_HEADS,
                           .head_dim = T_DIM,
                           .n_ctx = 8192,
                           .n_vocab = 1000,
                           .prefix = hash_of("prefix"),
                           .prefix_tokens = tokens,
                           .n_prefix_tokens = 3,
                           .kv_type = IBID_KV_Q8_0,
                           .calibration = {"a\0b", 3},
                           .calibration_id = hash_of("calibration"),
                           .gates = str("gates")};
    assert_ok(ibid_kvc_model_put(c, &m));
    assert_ok(ibid_kvc_collection_create(c, str("c"), &m.fingerprint));
    assert_err(ibid_kvc_collection_create(c, str("c"), &m.fingerprint), IBID_EXISTS);
    assert_err(ibid_kvc_collection_create(c, str("a b"), &m.fingerprint), IBID_INVAL);
}

static ibid_err remote_document(ibid_client *c, const char *id, const uint64_t *b, size_t n,
                                uint64_t job, uint64_t *number, uint64_t *generation) {
    char text[100];
    ibid_chunk chunks[10];
    for (size_t i = 0; i < n; i++) {
        (void)snprintf(text + 10 * i, 11, "%09u\n", (unsigned)b[i]);
        chunks[i] = (ibid_chunk){10 * i, 10 * i + 10, str(i % 2 ? "" : "page 1"), b[i]};
    }
    ibid_document_put d = {.collection = str("c"),
                           .id = str(id),
                           .title = str("t"),
                           .source = str("/s"),
                           .metadata = str("{}"),
                           .content = hash_of(id),
                           .state = IBID_DOC_READY,
                           .text = {text, n * 10},
                           .chunks = chunks,
                           .n_chunks = n,
                           .job = job};
    return ibid_kvc_document_put(c, &d, number, generation);
}

static void no_faults(ibid_client *c) {
    ibid_buf text;
    uint64_t n = 99;
    ibid_buf_init(&text, 10000);
    assert_ok(ibid_kvc_verify(c, &text, &n));
    if (n) print_error("%s\n", text.data);
    assert_int_equal(n, 0);
    ibid_buf_fini(&text);
}

static void every_call(void **st) {
    (void)st;
    fixture f;
    host(&f);
    remote_collection(f.c);
    uint64_t job = 0, number = 0, generation = 0, numbers[3];
    ibid_job j = {.kind = str("index"),
                  .collection = str("c"),
                  .state = str("running"),
                  .stage = str("encode"),
                  .spec = {"\x81\x00", 2},
                  .report = {"\0\xff", 2}};
    assert_ok(ibid_kvc_job_put(f.c, &j, &job));
    test_block b[3];
    ibid_block_put puts[3];
    for (size_t i = 0; i < 3; i++) {
        block_make(&b[i], i, 30 + i * 50, job);
        puts[i] = b[i].put;
    }
    puts[2].values = NULL; /* keys only */
    assert_ok(ibid_kvc_blocks_put(f.c, puts, 3, numbers));
    puts[1].keys = NULL;
    assert_ok(ibid_kvc_blocks_put(f.c, puts, 2, numbers));
    assert_ok(ibid_kvc_blocks_put(f.c, puts, 0, NULL));
    ibid_hash prefix = hash_of("prefix"), other = hash_of("other calibration");
    assert_ok(ibid_kvc_prefix_put(f.c, &prefix, T_LAYERS, b[0].put.values, b[0].put.value_size));
    assert_ok(ibid_kvc_blocks_hold(f.c, job, numbers, 2));
    assert_ok(ibid_kvc_keys_put(f.c, &other, numbers[0], b[0].keys, 30, T_KEYS_DIM));
    assert_ok(remote_document(f.c, "d", numbers, 3, job, &number, &generation));
    assert_ok(ibid_kvc_touch(f.c, numbers, 3));
    assert_int_equal(generation, 1);

    ibid_snap *n = NULL;
    assert_ok(ibid_snap_begin(f.r, &n));
    for (size_t i = 0; i < 3; i++) {
        ibid_block got;
        ibid_kv_view v;
        assert_ok(ibid_snap_block(n, numbers[i], &got));
        assert_memory_equal(got.tokens, b[i].tokens, got.n_tokens * 4);
        assert_int_equal(got.refcount, 1);
        for (size_t l = 0; l < T_LAYERS; l++) {
            assert_err(ibid_snap_kv(n, numbers[i], l, &v), i < 2 ? IBID_OK : IBID_NOTFOUND);
            if (i < 2) assert_true(block_kv_equal(&b[i], l, &v));
        }
    }
    ibid_model_record m;
    ibid_hash fp = hash_of("model m");
    assert_ok(ibid_snap_model(n, &fp, &m));
    assert_int_equal(m.calibration.n, 3);
    assert_true(str_eq(m.gates, "gates"));
    assert_int_equal(m.prefix_tokens[1], -6);
    const ibid_chunk *chunks;
    size_t n_chunks;
    assert_ok(ibid_snap_chunks(n, number, &chunks, &n_chunks));
    assert_int_equal(n_chunks, 3);
    assert_true(str_eq(chunks[2].locator, "page 1") && str_eq(chunks[1].locator, ""));
    ibid_job got;
    assert_ok(ibid_snap_job(n, job, &got));
    assert_true(str_eq(got.stage, "encode") && got.spec.n == 2 && got.report.s[1] == '\xff');

    /* Errors come back as they are, with their text. */
    assert_err(remote_document(f.c, "d", (uint64_t[]){99}, 1, 0, NULL, NULL), IBID_NOTFOUND);
    assert_non_null(strstr(ibid_err_detail(), "put the block again"));
    assert_err(ibid_kvc_collection_drop(f.c, str("x")), IBID_NOCOLLECTION);
    assert_err(ibid_kvc_job_delete(f.c, 99), IBID_NOTFOUND);
    assert_ok(ibid_kvc_set_budget(f.c, 10));
    assert_err(ibid_kvc_blocks_put(f.c, puts, 1, numbers), IBID_BUDGET);
    j.id = job, j.state = str("done");
    assert_ok(ibid_kvc_job_put(f.c, &j, NULL));
    ibid_collected c;
    assert_ok(ibid_kvc_collect(f.c, &c));
    assert_int_equal(c.evicted, 2);
    assert_ok(ibid_kvc_set_budget(f.c, 0));
    no_faults(f.c);
    assert_ok(ibid_kvc_document_delete(f.c, str("c"), str("d"), &generation));
    assert_int_equal(generation, 2);
    assert_ok(ibid_kvc_collect(f.c, &c));
    assert_int_equal(c.orphans, 3);
    assert_ok(ibid_kvc_job_delete(f.c, job));
    assert_ok(ibid_kvc_collection_drop(f.c, str("c")));
    no_faults(f.c);
    ibid_snap_end(n);
    for (size_t i = 0; i < 3; i++) block_free(&b[i]);
    finish(&f);
}

/* A text beyond what travels plain, and a batch beyond what one call takes. */
static void large_messages(void **st) {
    (void)st;
    fixture f;
    host(&f);
    remote_collection(f.c);
    size_t size = 20 * 1024 * 1024 + 3;
    char *text = malloc(size);
    assert_non_null(text);
    for (size_t i = 0; i < size; i++) text[i] = (char)('a' + i * i / 7 % 26);
    ibid_document_put d = {.collection = str("c"),
                           .id = str("long"),
                           .state = IBID_DOC_READY,
                           .content = hash_of("long"),
                           .text = {text, size}};
    uint64_t number = 0;
    assert_ok(ibid_kvc_document_put(f.c, &d, &number, NULL));
    ibid_snap *n = NULL;
    ibid_buf got;
    ibid_buf_init(&got, size);
    assert_ok(ibid_snap_begin(f.r, &n));
    assert_ok(ibid_snap_text(n, number, &got));
    assert_int_equal(got.len, size);
    assert_memory_equal(got.data, text, size);
    ibid_snap_end(n);
    ibid_buf_fini(&got);
    free(text);
    test_block b;
    block_make(&b, 1, 65536, 0);
    ibid_block_put puts[3] = {b.put, b.put, b.put};
    uint64_t numbers[3];
    assert_true(3 * T_LAYERS * b.put.value_size > IBID_BLOCKS_PUT_MAX);
    assert_err(ibid_kvc_blocks_put(f.c, puts, 3, numbers), IBID_TOOBIG);
    assert_ok(ibid_kvc_blocks_put(f.c, puts, 1, numbers));
    block_free(&b);
    no_faults(f.c);
    finish(&f);
}

/* Bodies that break the lengths the schema cannot state. */
static void lying_messages(void **st) {
    (void)st;
    fixture f;
    host(&f);
    remote_collection(f.c);
    static const char *const methods[] = {"kvstore.touch",        "kvstore.blocks_hold",
                                          "kvstore.keys_put",     "kvstore.document_put",
                                          "kvstore.document_put", "kvstore.prefix_put"};
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        ibid_enc m;
        ibid_hash h = hash_of("x");
        ibid_enc_init(&m, 100000);
        ibid_enc_map(&m, NULL);
        if (i < 2) ibid_enc_bin(&m, "blocks", "1234567", 7);
        if (i == 1) ibid_enc_u64(&m, "job", 1);
        if (i == 2) {
            ibid_enc_bin(&m, "calibration", h.b, 32);
            ibid_enc_u64(&m, "block", 1);
            ibid_enc_u64(&m, "n_tokens", 65536);
            ibid_enc_u64(&m, "dim", 65536);
            ibid_enc_bin(&m, "keys", "12", 2);
        }
        if (i == 3 || i == 4) {
            ibid_enc_cstr(&m, "collection", "c");
            ibid_enc_cstr(&m, "id", "d");
            ibid_enc_u64(&m, "state", 1);
            ibid_enc_bin(&m, "content", h.b, 32);
        }
        if (i == 3) ibid_enc_bin(&m, "chunks", "123456789012345678901234\xff\xff\xff\xff", 28);
        if (i == 4) {
            ibid_enc_u64(&m, "text_bytes", 1u << 30);
            ibid_enc_bin(&m, "text_zstd", "not a frame", 11);
        }
        if (i == 5) {
            ibid_enc_bin(&m, "prefix", h.b, 31);
            ibid_enc_u64(&m, "n_layers", 3);
            ibid_enc_bin(&m, "values", "1234", 4);
        }
        ibid_enc_end(&m);
        assert_ok(ibid_enc_done(&m));
        assert_err(ibid_client_call(f.c, methods[i], &m, 5000, NULL), IBID_PROTO);
        ibid_enc_fini(&m);
    }
    no_faults(f.c);
    finish(&f);
}

/* The program: a second one on the same data refuses; killed at once after an acknowledgement it
 * has lost nothing, and this process's reader goes on through it all. */
static void the_process(void **st) {
    (void)st;
    fixture f;
    prepare(&f);
    spawn(&f);
    f.r = store_open_reader(f.store);
    remote_collection(f.c);
    ibid_store *second = NULL;
    assert_err(ibid_store_open(&(ibid_store_opts){.dir = f.store}, &second), IBID_BUSY);
    assert_non_null(strstr(ibid_err_detail(), "owns"));
    pid_t other = fork();
    if (other == 0) {
        int null = open("/dev/null", O_WRONLY);
        (void)dup2(null, 2);
        (void)execl(program, program, "--data", f.data, (char *)NULL);
        _exit(127);
    }
    int status = 0;
    assert_int_equal(waitpid(other, &status, 0), other);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 2);
    ibid_snap *n = NULL;
    assert_ok(ibid_snap_begin(f.r, &n));
    for (uint64_t round = 1; round <= 5; round++) {
        test_block b;
        uint64_t number, document;
        char id[20];
        (void)snprintf(id, sizeof id, "d%u", (unsigned)round);
        block_make(&b, round, 50, 0);
        assert_ok(ibid_kvc_blocks_put(f.c, &b.put, 1, &number));
        assert_ok(remote_document(f.c, id, &number, 1, 0, &document, NULL));
        (void)kill(f.pid, SIGKILL);
        assert_int_equal(waitpid(f.pid, &status, 0), f.pid);
        assert_ok(ibid_snap_renew(n));
        ibid_document d;
        ibid_kv_view v;
        assert_ok(ibid_snap_document(n, str("c"), str(id), &d));
        assert_int_equal(d.number, document);
        assert_ok(ibid_snap_kv(n, number, 1, &v));
        assert_true(block_kv_equal(&b, 1, &v));
        block_free(&b);
        assert_true(ibid_client_ping(f.c, 100, NULL, NULL) != IBID_OK);
        spawn(&f);
    }
    ibid_snap_end(n);
    assert_sound(f.r);
    no_faults(f.c);
    finish(&f);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_call),
        cmocka_unit_test(large_messages),
        cmocka_unit_test(lying_messages),
        cmocka_unit_test(the_process),
    };
    if (argc != 2) return 2;
    program = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
