/* Whether stored KV is read or encoded again: the choice, what it rests on, and the room's answers
 * over a store whose file was taken out of the page cache. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "attention/attention_internal.h"
#include "kvstore/kvstore_room.h"
#include "rpc/base/clock.h"
#include "tests/support/gguf_write.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define assert_ok(call)                                                                            \
    do {                                                                                           \
        ibid_err ok_e = (call);                                                                    \
        if (ok_e) fail_msg("%s: %s: %s", #call, ibid_err_code(ok_e), ibid_err_detail());           \
    } while (0)

/* ---- The choice ---- */

static void choices(void **state) {
    static const struct {
        double bytes_per_s, tokens_per_s;
        uint64_t missing, tokens;
        bool encoding;
        ibid_load_choice want;
    } c[] = {
        {0, 0, 0, 200, false, IBID_LOAD_READ},
        {1, 1e9, 0, 200, true, IBID_LOAD_READ},
        {0, 0, 1, 200, false, IBID_LOAD_TIME_DISK},
        {0, 2000, 2400000, 200, true, IBID_LOAD_TIME_DISK},
        {2e9, 0, 2400000, 200, false, IBID_LOAD_READ},
        {2e7, 0, 2400000, 200, false, IBID_LOAD_TIME_ENCODER},
        /* 200 tokens take 0.1 s: 2.4 MB load as fast at 24 MB/s, and a fifth slower at 20. */
        {24e6, 2000, 2400000, 200, false, IBID_LOAD_READ},
        {20.1e6, 2000, 2400000, 200, false, IBID_LOAD_READ},
        {19.9e6, 2000, 2400000, 200, false, IBID_LOAD_ENCODE},
        {20.1e6, 2000, 2400000, 200, true, IBID_LOAD_ENCODE},
        {23.9e6, 2000, 2400000, 200, true, IBID_LOAD_ENCODE},
        {24.1e6, 2000, 2400000, 200, true, IBID_LOAD_READ},
        {19.9e6, 2000, 1200000, 200, false, IBID_LOAD_READ}, /* half of it is in memory */
        {1e-300, 2000, UINT64_MAX, 1, false, IBID_LOAD_ENCODE},
    };
    (void)state;
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        ibid_load_rates r = {c[i].bytes_per_s, c[i].tokens_per_s};
        ibid_load_choice got = ibid_load_choose(&r, c[i].missing, c[i].tokens, c[i].encoding);
        if (got != c[i].want) fail_msg("row %zu: %d, not %d", i, (int)got, (int)c[i].want);
    }
}

static void meter(void **state) {
    const uint64_t s = 1000000000;
    ibid_load_meter m = {0};
    (void)state;
    ibid_load_encoded(&m, 40, s); /* too short, but there is nothing else */
    assert_true(ibid_load_rates_now(&m, s).tokens_per_s == 40);
    ibid_load_encoded(&m, 40, s / 100);
    assert_true(ibid_load_rates_now(&m, s).tokens_per_s == 40);
    ibid_load_encoded(&m, 500, s);
    assert_true(ibid_load_rates_now(&m, s).tokens_per_s > 40);
    assert_true(ibid_load_rates_now(&m, s).bytes_per_s == 0);
    ibid_load_came(&m, 1000, s, true, 5 * s);
    assert_true(ibid_load_rates_now(&m, 6 * s).bytes_per_s == 0);
    ibid_load_came(&m, 1000, s, false, 5 * s);
    assert_true(ibid_load_rates_now(&m, 6 * s).bytes_per_s == 1000);
    ibid_load_came(&m, 500, s, true, 5 * s); /* at least that: nothing new */
    assert_true(ibid_load_rates_now(&m, 6 * s).bytes_per_s == 1000);
    ibid_load_came(&m, 500, s, false, 5 * s);
    double now = ibid_load_rates_now(&m, 6 * s).bytes_per_s;
    assert_true(now < 1000 && now > 500);
    assert_true(ibid_load_rates_now(&m, (6 + IBID_LOAD_STALE_S) * s).bytes_per_s == 0);
    ibid_load_came(&m, 100, s, false, (7 + IBID_LOAD_STALE_S) * s);
    assert_true(ibid_load_rates_now(&m, (8 + IBID_LOAD_STALE_S) * s).bytes_per_s == 100);
}

/* ---- The room ---- */

enum { N = 6, LAYERS = 12 };

typedef struct fixture {
    char data[256];
    ibid_host_opts o;
    ibid_hosted *hosted;
    ibidi_room *room;
    ibid_client *kv, *at;
    ibid_model_info model;
    uint64_t blocks[N], document, other;
} fixture;

static void start(fixture *f) {
    static const ibid_room_vtable *const rooms[] = {&ibid_kvstore_room};
    char url[IBID_BUS_URL_MAX];
    void *room;
    f->o = (ibid_host_opts){.log_level = IBID_LOG_ERROR, .threads = 2, .inproc = true};
    (void)snprintf(f->o.data_dir, sizeof f->o.data_dir, "%s", f->data);
    assert_ok(ibid_host_inproc(rooms, 1, &f->o, &f->hosted));
    assert_ok(ibid_attention_room.open(&f->o, &room));
    f->room = room;
    assert_ok(ibid_bus_url(f->data, "kvstore", true, url));
    assert_ok(ibid_client_open(url, &f->kv));
    assert_ok(ibid_bus_url(f->data, "attention", true, url));
    assert_ok(ibid_client_open(url, &f->at));
}

static void stop(fixture *f) {
    ibid_client_close(f->kv);
    ibid_client_close(f->at);
    ibid_attention_room.close(f->room);
    ibid_hosted_close(f->hosted);
}

static void text_of(size_t i, char *out, size_t room) {
    size_t at = 0;
    while (at < 200)
        at += (size_t)snprintf(out + at, room - at, "Barrel %zu of row %zu holds %zu pints. ", at,
                               i, at * 7 + i * 13);
}

/* A document of n blocks, numbered from `first`. */
static uint64_t put_document(fixture *f, const char *id, size_t first, size_t n, uint64_t *blocks) {
    char text[512], all[8192] = "";
    ibid_encode_block b[N];
    ibid_chunk chunks[N];
    ibid_tokens t[N];
    uint64_t job = 0, number, generation;
    ibid_job j = {.kind = {"index", 5}, .state = {"running", 7}};
    assert_ok(ibid_kvc_job_put(f->kv, &j, &job));
    for (size_t i = 0; i < n; i++) {
        text_of(first + i, text, sizeof text);
        assert_ok(ibid_attn_tokenize(f->at, &f->model.fingerprint, (ibid_str){text, strlen(text)},
                                     &t[i]));
        b[i] = (ibid_encode_block){0, t[i].n, t[i].ids};
        chunks[i] = (ibid_chunk){.start = strlen(all), .locator = {"", 0}};
        (void)strcat(all, text);
        chunks[i].end = strlen(all);
    }
    assert_ok(ibid_attn_encode(f->at, &f->model.fingerprint, job, b, n, blocks, NULL));
    for (size_t i = 0; i < n; i++) chunks[i].block = blocks[i];
    ibid_document_put p = {.collection = {"c", 1},
                           .id = {id, strlen(id)},
                           .state = IBID_DOC_READY,
                           .text = {all, strlen(all)},
                           .chunks = chunks,
                           .n_chunks = n,
                           .job = job};
    assert_ok(ibid_kvc_document_put(f->kv, &p, &number, &generation));
    for (size_t i = 0; i < n; i++) ibid_free(t[i].ids);
    return number;
}

static int set_up(void **state) {
    fixture *f = calloc(1, sizeof *f);
    ibid_test_gguf spec = ibid_test_gguf_small();
    char gguf[300];
    uint64_t block;
    spec.n_ctx = 4096;
    spec.n_layers = LAYERS;
    spec.n_kv_heads = spec.n_heads;
    spec.seed = 11;
    (void)snprintf(f->data, sizeof f->data, "/tmp/ibid-test-XXXXXX");
    assert_non_null(mkdtemp(f->data));
    (void)snprintf(gguf, sizeof gguf, "%s/small.gguf", f->data);
    assert_ok(ibid_test_write_gguf(gguf, &spec));
    start(f);
    assert_ok(ibid_attn_model_add(f->at, gguf, "small", &f->model));
    assert_ok(ibid_kvc_collection_create(f->kv, (ibid_str){"c", 1}, &f->model.fingerprint));
    f->other = put_document(f, "other", 100, 1, &block);
    f->document = put_document(f, "asked", 0, N, f->blocks);
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

typedef struct result {
    char text[4096];
    ibid_answer_event done;
} result;

static bool on_event(void *arg, const ibid_answer_event *ev) {
    result *r = arg;
    if (ev->kind != IBID_ANSWER_DONE) return true;
    (void)snprintf(r->text, sizeof r->text, "%.*s", (int)ev->text.n, ev->text.s);
    r->done = *ev;
    return true;
}

static void ask(fixture *f, double recompute, result *r) {
    ibid_answer_block b[N];
    for (size_t i = 0; i < N; i++)
        b[i] = (ibid_answer_block){f->document, i, f->blocks[i], 1.0 - 0.1 * (double)i};
    ibid_answer_request q = {.model = f->model.fingerprint,
                             .question = {"How many pints?", 15},
                             .blocks = b,
                             .n_blocks = N,
                             .recompute = recompute,
                             .max_tokens = 16};
    memset(r, 0, sizeof *r);
    assert_ok(ibid_attn_answer(f->at, &q, on_event, r));
}

static void store_path(const fixture *f, char *out, size_t room) {
    (void)snprintf(out, room, "%s/" IBID_STORE_FOLDER "/data.mdb", f->data);
}

/* A new process as far as the store goes: what the asked document's blocks need is not in memory,
 * but for pages that were read to get here. Returns how much is not. */
static uint64_t make_cold(fixture *f) {
    char path[400];
    ibid_snap *snap = NULL;
    ibid_kv_place at[LAYERS];
    const ibid_chunk *chunks;
    ibid_block rec;
    size_t n;
    ibidi_loaded *m;
    uint64_t missing = 0;
    stop(f);
    start(f);
    assert_ok(ibidi_model_get(f->room, &f->model.fingerprint, &m));
    assert_ok(ibid_snap_begin(f->room->store, &snap));
    /* Small rows are read here, so that nothing is read ahead from them later. */
    assert_ok(ibid_snap_chunks(snap, f->document, &chunks, &n));
    for (size_t i = 0; i < N; i++) {
        assert_ok(ibid_snap_block(snap, f->blocks[i], &rec));
        assert_ok(ibid_snap_kv_places(snap, f->blocks[i], LAYERS, at));
    }
    store_path(f, path, sizeof path);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(fsync(fd), 0);
    assert_int_equal(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    (void)close(fd);
    for (size_t i = 0; i < N; i++) {
        assert_ok(ibid_snap_kv_places(snap, f->blocks[i], LAYERS, at));
        for (size_t l = 0; l < LAYERS; l++) missing += ibid_kv_place_missing(&at[l]);
    }
    ibid_snap_end(snap);
    return missing;
}

static void set_rates(fixture *f, double bytes_per_s, double tokens_per_s) {
    ibid_load_meter *m = &f->room->models->meter;
    atomic_store(&m->bytes_per_s, bytes_per_s);
    atomic_store(&m->tokens_per_s, tokens_per_s);
    atomic_store(&m->disk_ns, ibid_now_ns());
}

static bool cannot_be_cold(uint64_t missing) {
    if (missing) return false;
    print_message("this file system keeps the file in memory: nothing to test\n");
    return true;
}

/* A disk that is slow, one that is fast and one nobody knows: the same answer. */
static void same_answer(void **state) {
    fixture *f = *state;
    static result warm, r;
    uint64_t missing;
    ask(f, 0, &warm);
    assert_string_equal(warm.done.encoded_why, "");
    assert_int_equal(warm.done.kv_bytes_from_disk, 0);
    if (cannot_be_cold(missing = make_cold(f))) skip();
    set_rates(f, 1e12, 1);
    ask(f, 0, &r);
    print_message("%llu bytes were not in memory, %llu were read, %.2f ms waited for\n",
                  (unsigned long long)missing, (unsigned long long)r.done.kv_bytes_from_disk,
                  r.done.kv_wait_ms);
    assert_string_equal(r.text, warm.text);
    assert_int_equal(r.done.encoded_tokens, 0);
    assert_true(r.done.kv_bytes_from_disk > 0);
    ask(f, 0, &r);
    assert_int_equal(r.done.kv_bytes_from_disk, 0);

    assert_true(make_cold(f) > 0);
    set_rates(f, 1, 1e6);
    ask(f, 0, &r);
    print_message("slow disk: %llu tokens encoded, %llu reused: %s\n",
                  (unsigned long long)r.done.encoded_tokens,
                  (unsigned long long)r.done.reused_tokens, r.done.encoded_why);
    assert_string_equal(r.text, warm.text);
    assert_string_equal(r.done.encoded_why, "slow_disk");
    assert_true(r.done.encoded_tokens > 0);
    assert_int_equal(r.done.encoded_tokens + r.done.reused_tokens, warm.done.reused_tokens);

    assert_true(make_cold(f) > 0);
    ask(f, 0, &r); /* measures the disk first, and perhaps the encoder */
    assert_string_equal(r.text, warm.text);
    assert_true(atomic_load(&f->room->models->meter.bytes_per_s) > 0);
    print_message("unknown disk: %.1f MB/s, %llu tokens encoded\n",
                  atomic_load(&f->room->models->meter.bytes_per_s) / 1e6,
                  (unsigned long long)r.done.encoded_tokens);
}

static void assert_same_plane(const void *a, const void *b, size_t n) {
    if (n) assert_memory_equal(a, b, n);
}

/* What is encoded again is what is stored, bit for bit, in batches of any size. */
static void same_bits(void **state) {
    fixture *f = *state;
    ibid_snap *snap = NULL;
    ibidi_loaded *m = f->room->models;
    ibid_reading t[N];
    ibid_block rec;
    for (size_t from = 0; from < 2; from++) {
        size_t done = 0, n = from ? 1 : N;
        memset(t, 0, sizeof t);
        assert_ok(ibid_snap_begin(f->room->store, &snap));
        for (size_t i = 0; i < n; i++) {
            assert_ok(ibid_snap_block(snap, f->blocks[i + from], &rec));
            t[i].tokens = rec.tokens;
            t[i].n = rec.n_tokens;
        }
        while (done < n) assert_ok(ibid_read_some(&m->reader, t, n, &done, true, NULL, NULL));
        for (size_t i = 0; i < n; i++)
            for (size_t l = 0; l < m->model->n_layers; l++) {
                ibid_kv_view a, *b = &t[i].kv.layers[l];
                assert_ok(ibid_snap_kv(snap, f->blocks[i + from], l, &a));
                assert_int_equal(a.type, b->type);
                size_t values = a.n_kv_heads * a.n_tokens * a.head_dim;
                size_t plane = a.type == IBID_KV_F16 ? values * 2 : values;
                assert_same_plane(a.k, b->k, plane);
                assert_same_plane(a.v, b->v, plane);
                size_t scales = a.type == IBID_KV_Q8_0 ? values / 32 * 2 : 0;
                assert_same_plane(a.k_scale, b->k_scale, scales);
                assert_same_plane(a.v_scale, b->v_scale, scales);
            }
        for (size_t i = 0; i < n; i++) ibid_kv_blob_fini(&t[i].kv);
        ibid_snap_end(snap);
    }
}

/* Changes a byte of one stored value in the file, while nobody has it open. */
static void damage(fixture *f, size_t block, size_t layer) {
    ibid_snap *snap = NULL;
    ibid_kv_view v;
    unsigned char key[IBID_KV_HEADER]; /* owner, layer and checksum: no other value has it */
    char path[400];
    long at = -1;
    assert_ok(ibid_snap_begin(f->room->store, &snap));
    assert_ok(ibid_snap_kv(snap, f->blocks[block], layer, &v));
    memcpy(key, (const unsigned char *)v.k - sizeof key, sizeof key);
    ibid_snap_end(snap);
    stop(f);
    store_path(f, path, sizeof path);
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    unsigned char *all = malloc(64u << 20);
    size_t n = fread(all, 1, 64u << 20, file);
    for (size_t i = 0; at < 0 && i + sizeof key <= n; i += 16)
        if (memcmp(all + i, key, sizeof key) == 0) at = (long)i;
    assert_true(at >= 0);
    assert_int_equal(fseek(file, at + 9, SEEK_SET), 0);
    assert_int_equal(fputc(key[9] ^ 0x10, file), key[9] ^ 0x10);
    assert_int_equal(fclose(file), 0);
    free(all);
    start(f);
}

/* Damage found between two layers: the block is encoded again, and the answer stays the same. */
static void damaged(void **state) {
    fixture *f = *state;
    static result whole, r;
    for (int share = 0; share < 2; share++) {
        ask(f, share * 0.3, &whole);
        damage(f, 2, 7);
        ask(f, share * 0.3, &r);
        assert_string_equal(r.text, whole.text);
        assert_string_equal(r.done.encoded_why, "damaged");
        assert_int_equal(r.done.recomputed_tokens, whole.done.recomputed_tokens);
        assert_true(r.done.encoded_tokens > 0);
        stop(f);
        start(f);
        ask(f, share * 0.3, &r); /* it was put back */
        assert_string_equal(r.text, whole.text);
        assert_string_equal(r.done.encoded_why, "");
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(choices),   cmocka_unit_test(meter),   cmocka_unit_test(same_answer),
        cmocka_unit_test(same_bits), cmocka_unit_test(damaged),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
