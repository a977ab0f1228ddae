/* Blocks: content addressing, KV in place, keys, holds, orphans, budget and eviction. */
#include "support.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char dir[256];

static int setup(void **st) {
    (void)st;
    make_dir(dir);
    return 0;
}

static int teardown(void **st) {
    (void)st;
    drop_dir(dir);
    return 0;
}

static void reader_before_any_writer(void **st) {
    (void)st;
    ibid_store *s = NULL;
    assert_err(ibid_store_open(&(ibid_store_opts){.dir = dir, .readonly = true}, &s),
               IBID_NOTFOUND);
    assert_err(ibid_store_open(&(ibid_store_opts){.dir = "", .readonly = true}, &s), IBID_INVAL);
}

/* Everything put is read back the same, through another handle, before and after a restart. */
static void put_and_read(void **st) {
    (void)st;
    ibid_store *s = store_open(dir, 0);
    test_block b[4];
    ibid_block_put puts[4];
    uint64_t numbers[4];
    static const size_t sizes[] = {1, 64, 100, 300};
    for (size_t i = 0; i < 4; i++) {
        block_make(&b[i], i + 1, sizes[i], 0);
        puts[i] = b[i].put;
    }
    assert_ok(ibid_store_blocks_put(s, puts, 4, numbers));
    for (int round = 0; round < 2; round++) {
        ibid_store *r = store_open_reader(dir);
        ibid_snap *n = NULL;
        assert_ok(ibid_snap_begin(r, &n));
        for (size_t i = 0; i < 4; i++) {
            ibid_block got;
            ibid_hash h = ibid_block_hash(&b[i].put.model, &b[i].put.prefix, IBID_KV_Q8_0,
                                          b[i].put.n_title, b[i].tokens, sizes[i]);
            assert_ok(ibid_snap_block_find(n, &h, b[i].put.n_title, b[i].tokens, sizes[i], &got));
            assert_int_equal(got.number, numbers[i]);
            assert_int_equal(got.n_tokens, sizes[i]);
            assert_memory_equal(got.tokens, b[i].tokens, sizes[i] * sizeof(int32_t));
            assert_int_equal((uintptr_t)got.tokens % 4, 0);
            assert_true(got.has_kv);
            assert_int_equal(got.refcount, 0);
            for (int again = 0; again < 2; again++)
                for (size_t l = 0; l < T_LAYERS; l++) {
                    ibid_kv_view v;
                    assert_ok(ibid_snap_kv(n, numbers[i], l, &v));
                    assert_int_equal((uintptr_t)v.k % 64, 0);
                    assert_int_equal((uintptr_t)v.v % 64, 0);
                    assert_true(block_kv_equal(&b[i], l, &v));
                }
            ibid_kv_view v;
            assert_err(ibid_snap_kv(n, numbers[i], T_LAYERS, &v), IBID_NOTFOUND);
            ibid_kv_place at[T_LAYERS + 1];
            assert_err(ibid_snap_kv_places(n, numbers[i], T_LAYERS + 1, at), IBID_NOTFOUND);
            assert_ok(ibid_snap_kv_places(n, numbers[i], T_LAYERS, at));
            for (size_t l = 0; l < T_LAYERS; l++) {
                assert_ok(ibid_kv_place_open(r, &at[l], &v));
                assert_true(block_kv_equal(&b[i], l, &v));
                assert_int_equal(ibid_kv_place_missing(&at[l]), 0); /* it was just read */
            }
            ibid_keys keys;
            assert_ok(ibid_snap_keys(n, numbers[i], &keys));
            assert_int_equal(keys.dim, T_KEYS_DIM);
            assert_memory_equal(keys.data, b[i].keys, sizes[i] * T_KEYS_DIM);
            /* The hash alone finds nothing: other tokens, other title. */
            int32_t other = -1;
            assert_err(ibid_snap_block_find(n, &h, 0, &other, 1, &got), IBID_NOTFOUND);
        }
        ibid_block none;
        assert_err(ibid_snap_block(n, 999, &none), IBID_NOTFOUND);
        ibid_snap_end(n);
        ibid_store_close(r);
        assert_sound(s);
        ibid_store_close(s);
        s = store_open(dir, 0);
    }
    ibid_store_close(s);
    for (size_t i = 0; i < 4; i++) block_free(&b[i]);
}

/* Takes the store's file out of the page cache, but for pages that somebody has mapped. */
static void drop_from_cache(void) {
    char path[512];
    (void)snprintf(path, sizeof path, "%s/data.mdb", dir);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(fsync(fd), 0);
    assert_int_equal(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    (void)close(fd);
}

/* Values on disk alone are seen to be there, come when asked for, and are what was stored. */
static void cold_values(void **st) {
    (void)st;
    test_block b;
    ibid_kv_place at[T_LAYERS];
    ibid_snap *n = NULL;
    ibid_kv_view v;
    uint64_t number;
    size_t missing = 0, left = 1;
    ibid_store *s = store_open(dir, 0);
    block_make(&b, 4, 200, 0);
    assert_ok(ibid_store_blocks_put(s, &b.put, 1, &number));
    ibid_store_close(s);
    drop_from_cache();
    s = store_open(dir, 0);
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_kv_places(n, number, T_LAYERS, at));
    drop_from_cache(); /* what was read ahead of the pages above */
    for (size_t l = 0; l < T_LAYERS; l++) missing += ibid_kv_place_missing(&at[l]);
    print_message("%zu bytes of %zu were not in memory\n", missing, T_LAYERS * at[0].size);
    ibid_kv_places_willneed(at, T_LAYERS);
    for (int ms = 0; left && ms < 10000; ms += 10) {
        left = 0;
        for (size_t l = 0; l < T_LAYERS; l++) left += ibid_kv_place_missing(&at[l]);
        if (left) (void)usleep(10000);
    }
    assert_int_equal(left, 0);
    for (size_t l = 0; l < T_LAYERS; l++) {
        assert_ok(ibid_kv_place_open(s, &at[l], &v));
        assert_true(block_kv_equal(&b, l, &v));
    }
    ibid_snap_end(n);
    ibid_store_close(s);
    block_free(&b);
}

static void equal_blocks_are_one(void **st) {
    (void)st;
    ibid_store *s = store_open(dir, 0);
    uint64_t a = block_put(s, 1, 50, 0), b = block_put(s, 1, 50, 0), c = block_put(s, 2, 50, 0);
    assert_int_equal(a, b);
    assert_int_not_equal(a, c);
    /* Twice in one batch, and with another title length it is another block. */
    test_block x;
    uint64_t numbers[3];
    block_make(&x, 3, 20, 0);
    ibid_block_put puts[3] = {x.put, x.put, x.put};
    puts[2].n_title = 5;
    assert_ok(ibid_store_blocks_put(s, puts, 3, numbers));
    assert_int_equal(numbers[0], numbers[1]);
    assert_int_not_equal(numbers[0], numbers[2]);
    ibid_store_stats stats;
    stats_of(s, &stats);
    assert_int_equal(stats.blocks, 4);
    assert_int_equal(stats.orphan_blocks, 4);
    block_free(&x);
    assert_sound(s);
    ibid_store_close(s);
}

static void bad_puts_are_refused(void **st) {
    (void)st;
    ibid_store *s = store_open(dir, 0);
    test_block b;
    uint64_t number;
    block_make(&b, 1, 20, 0);
    ibid_block_put p = b.put;
    p.n_tokens = 0;
    assert_err(ibid_store_blocks_put(s, &p, 1, &number), IBID_INVAL);
    p = b.put, p.n_title = 21;
    assert_err(ibid_store_blocks_put(s, &p, 1, &number), IBID_INVAL);
    p = b.put, p.kv_type = IBID_KV_F16;
    assert_err(ibid_store_blocks_put(s, &p, 1, &number), IBID_INVAL);
    p = b.put, p.n_tokens = 19;
    assert_err(ibid_store_blocks_put(s, &p, 1, &number), IBID_INVAL);
    p = b.put, p.value_size -= 64;
    assert_err(ibid_store_blocks_put(s, &p, 1, &number), IBID_CORRUPT);
    p = b.put, p.job = 5;
    assert_err(ibid_store_blocks_put(s, &p, 1, &number), IBID_NOTFOUND);
    void *swapped[T_LAYERS] = {b.values[1], b.values[0], b.values[2]};
    p = b.put, p.values = (const void *const *)swapped;
    assert_err(ibid_store_blocks_put(s, &p, 1, &number), IBID_INVAL);
    ((uint8_t *)b.values[0])[100] ^= 1;
    assert_err(ibid_store_blocks_put(s, &b.put, 1, &number), IBID_CORRUPT);
    ibid_store *r = store_open_reader(dir);
    assert_err(ibid_store_collect(r, NULL), IBID_INVAL);
    ibid_store_close(r);
    ibid_store_stats stats;
    stats_of(s, &stats);
    assert_int_equal(stats.blocks, 0);
    block_free(&b);
    ibid_store_close(s);
}

/* Keys first, KV later; other calibrations replace. */
static void parts_are_added(void **st) {
    (void)st;
    ibid_store *s = store_open(dir, 0);
    test_block b;
    uint64_t number, again;
    block_make(&b, 1, 20, 0);
    ibid_block_put keys_only = b.put, kv_only = b.put;
    keys_only.values = NULL;
    kv_only.keys = NULL;
    assert_ok(ibid_store_blocks_put(s, &keys_only, 1, &number));
    ibid_snap *n = NULL;
    ibid_block got;
    ibid_kv_view v;
    ibid_keys keys;
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_block(n, number, &got));
    assert_false(got.has_kv);
    assert_err(ibid_snap_kv(n, number, 0, &v), IBID_NOTFOUND);
    assert_ok(ibid_store_blocks_put(s, &kv_only, 1, &again));
    assert_int_equal(number, again);
    assert_err(ibid_snap_kv(n, number, 0, &v),
               IBID_NOTFOUND); /* the old snapshot stays as it was */
    assert_ok(ibid_snap_renew(n));
    assert_ok(ibid_snap_kv(n, number, 0, &v));
    assert_true(block_kv_equal(&b, 0, &v));
    assert_ok(ibid_snap_keys(n, number, &keys));
    ibid_hash other = hash_of("another calibration");
    int8_t fresh[20 * 16];
    for (size_t i = 0; i < sizeof fresh; i++) fresh[i] = (int8_t)i;
    assert_err(ibid_store_keys_put(s, &other, number, fresh, 19, 16), IBID_INVAL);
    assert_err(ibid_store_keys_put(s, &other, 77, fresh, 20, 16), IBID_NOTFOUND);
    assert_ok(ibid_store_keys_put(s, &other, number, fresh, 20, 16));
    assert_ok(ibid_snap_renew(n));
    assert_ok(ibid_snap_keys(n, number, &keys));
    assert_int_equal(keys.dim, 16);
    assert_memory_equal(keys.data, fresh, sizeof fresh);
    assert_int_equal(ibid_hash_cmp(&keys.calibration, &other), 0);
    ibid_snap_end(n);
    assert_sound(s);
    block_free(&b);
    ibid_store_close(s);
}

static void models_and_prefixes(void **st) {
    (void)st;
    ibid_store *s = store_open(dir, 0);
    collection_make(s, "c");
    ibid_hash fp = hash_of("model m"), prefix = hash_of("prefix"), none = hash_of("none");
    test_block b;
    block_make(&b, 9, 33, 0);
    assert_ok(ibid_store_prefix_put(s, &prefix, T_LAYERS, b.put.values, b.put.value_size));
    assert_ok(ibid_store_prefix_put(s, &prefix, T_LAYERS, b.put.values, b.put.value_size));
    ibid_snap *n = NULL;
    assert_ok(ibid_snap_begin(s, &n));
    for (size_t l = 0; l < T_LAYERS; l++) {
        ibid_kv_view v;
        assert_ok(ibid_snap_prefix_kv(n, &prefix, l, &v));
        assert_true(block_kv_equal(&b, l, &v));
        assert_err(ibid_snap_prefix_kv(n, &none, l, &v), IBID_NOTFOUND);
    }
    ibid_model_record m;
    assert_ok(ibid_snap_model(n, &fp, &m));
    assert_true(str_eq(m.name, "m") && str_eq(m.path, "/models/m.gguf") && str_eq(m.arch, "llama"));
    assert_int_equal(m.n_layers, T_LAYERS);
    assert_int_equal(m.n_ctx, 8192);
    assert_int_equal(m.n_prefix_tokens, 3);
    assert_int_equal(m.prefix_tokens[2], 3);
    assert_int_equal(m.calibration.n, 0);
    assert_err(ibid_snap_model(n, &none, &m), IBID_NOTFOUND);
    m.calibration = str("calibration bytes");
    m.calibration_id = hash_of("calibration bytes");
    m.fingerprint = fp, m.name = str("renamed"), m.path = m.arch = str("x");
    m.n_prefix_tokens = 0;
    assert_ok(ibid_store_model_put(s, &m));
    assert_ok(ibid_snap_renew(n));
    assert_ok(ibid_snap_model(n, &fp, &m));
    assert_true(str_eq(m.name, "renamed") && str_eq(m.calibration, "calibration bytes"));
    ibid_snap_end(n);
    assert_sound(s);
    block_free(&b);
    ibid_store_close(s);
}

/* A job's hold keeps a block that nothing uses; the job's end lets it go. */
static void holds_and_orphans(void **st) {
    (void)st;
    ibid_store *s = store_open(dir, 0);
    uint64_t job = job_make(s), other = job_make(s);
    uint64_t held = block_put(s, 1, 10, job), loose = block_put(s, 2, 10, 0);
    uint64_t both[] = {held, held};
    assert_ok(ibid_store_blocks_hold(s, job, both, 2)); /* no second hold */
    assert_ok(ibid_store_blocks_hold(s, other, both, 1));
    assert_err(ibid_store_blocks_hold(s, job, (const uint64_t[]){held, 999}, 2), IBID_NOTFOUND);
    assert_err(ibid_store_blocks_hold(s, 99, both, 1), IBID_NOTFOUND);
    assert_sound(s);
    ibid_collected c;
    assert_ok(ibid_store_collect(s, &c));
    assert_int_equal(c.orphans, 1);
    ibid_snap *n = NULL;
    ibid_block got;
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_block(n, held, &got));
    assert_err(ibid_snap_block(n, loose, &got), IBID_NOTFOUND);
    job_finish(s, job, "done");
    assert_ok(ibid_store_collect(s, &c));
    assert_int_equal(c.orphans, 0);
    assert_sound(s);
    assert_ok(ibid_store_job_delete(s, other));
    assert_ok(ibid_store_collect(s, &c));
    assert_int_equal(c.orphans, 1);
    assert_true(c.bytes > 0);
    assert_ok(ibid_snap_renew(n));
    assert_err(ibid_snap_block(n, held, &got), IBID_NOTFOUND);
    /* A job that has ended takes no more. */
    test_block b;
    uint64_t number;
    block_make(&b, 1, 10, job);
    assert_err(ibid_store_blocks_put(s, &b.put, 1, &number), IBID_CANCELLED);
    block_free(&b);
    ibid_snap_end(n);
    ibid_store_stats stats;
    stats_of(s, &stats);
    assert_int_equal(stats.blocks + stats.kv_bytes + stats.key_bytes + stats.orphan_blocks, 0);
    assert_sound(s);
    ibid_store_close(s);
}

/* Numbers are never given out twice, over deletion and restart. */
static void numbers_are_not_reused(void **st) {
    (void)st;
    uint64_t last = 0;
    for (int i = 0; i < 3; i++) {
        ibid_store *s = store_open(dir, 0);
        uint64_t number = block_put(s, 1, 10, 0);
        assert_true(number > last);
        last = number;
        assert_ok(ibid_store_collect(s, NULL));
        ibid_store_close(s);
    }
}

static uint64_t evicted_of(ibid_store *s, const uint64_t *blocks, size_t n) {
    ibid_snap *snap = NULL;
    uint64_t bits = 0;
    assert_ok(ibid_snap_begin(s, &snap));
    for (size_t i = 0; i < n; i++) {
        ibid_block b;
        assert_ok(ibid_snap_block(snap, blocks[i], &b));
        if (!b.has_kv) bits |= 1u << i;
    }
    ibid_snap_end(snap);
    return bits;
}

/* Least recently used goes first, held never; text, tokens and keys stay; a put brings KV back. */
static void budget_evicts(void **st) {
    (void)st;
    test_block probe;
    block_make(&probe, 3, 40, 0);
    uint64_t one = T_LAYERS * probe.put.value_size;
    ibid_store *s = store_open(dir, 5 * one);
    collection_make(s, "c");
    uint64_t job = job_make(s), b[5];
    for (uint64_t i = 0; i < 5; i++) b[i] = block_put(s, i + 1, 40, i == 1 ? job : 0);
    assert_ok(document_put(s, "c", "d", b, 5, 0, NULL, NULL));
    ibid_collected c;
    assert_ok(ibid_store_collect(s, &c));
    assert_int_equal(c.evicted + c.orphans, 0);
    (void)usleep(3000);
    ibid_store_touch(s, b, 1); /* the first is now the most recent */
    assert_ok(ibid_store_set_budget(s, 2 * one));
    assert_ok(ibid_store_collect(s, &c));
    assert_int_equal(c.evicted, 3);
    assert_int_equal(c.bytes, 3 * one);
    assert_false(c.more);
    assert_int_equal(evicted_of(s, b, 5), 1u << 2 | 1u << 3 | 1u << 4);
    assert_sound(s);
    ibid_store_stats stats;
    stats_of(s, &stats);
    assert_int_equal(stats.kv_bytes, 2 * one);
    assert_int_equal(stats.blocks_evicted, 3);
    assert_int_equal(stats.kv_budget, 2 * one);
    /* Held KV stays even beyond the budget. */
    assert_ok(ibid_store_set_budget(s, 1));
    assert_ok(ibid_store_collect(s, &c));
    assert_int_equal(c.evicted, 1);
    assert_int_equal(evicted_of(s, b, 5), 0x1f & ~(1u << 1));
    assert_ok(ibid_store_collect(s, &c));
    assert_false(c.more);
    /* One block alone over the budget is refused; with room its KV comes back under its number. */
    uint64_t number;
    assert_err(ibid_store_blocks_put(s, &probe.put, 1, &number), IBID_BUDGET);
    assert_ok(ibid_store_set_budget(s, 0));
    assert_ok(ibid_store_blocks_put(s, &probe.put, 1, &number));
    assert_int_equal(number, b[2]);
    ibid_snap *n = NULL;
    ibid_kv_view v;
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_kv(n, number, 1, &v));
    assert_true(block_kv_equal(&probe, 1, &v));
    ibid_snap_end(n);
    assert_sound(s);
    block_free(&probe);
    ibid_store_close(s);
}

static ibid_err count_block(void *arg, const ibid_block *b) {
    uint64_t *sum = arg;
    *sum += b->number + b->n_tokens * 1000 + (uint64_t)b->tokens[b->n_tokens - 1] * 100000;
    return IBID_OK;
}

static ibid_err stop_at_once(void *arg, const ibid_block *b) {
    (void)b;
    ++*(uint64_t *)arg;
    return IBID_CANCELLED;
}

static void iterate_blocks(void **st) {
    (void)st;
    ibid_store *s = store_open(dir, 0);
    uint64_t want = 0, got = 0, calls = 0;
    for (uint64_t i = 1; i <= 20; i++) {
        uint64_t number = block_put(s, i, i, 0);
        want += number + i * 1000 + (i * 1000 + i - 1) * 100000;
    }
    ibid_snap *n = NULL;
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_each_block(n, count_block, &got));
    assert_int_equal(got, want);
    assert_err(ibid_snap_each_block(n, stop_at_once, &calls), IBID_CANCELLED);
    assert_int_equal(calls, 1);
    ibid_snap_end(n);
    ibid_store_close(s);
}

int main(void) {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(reader_before_any_writer),
        T(put_and_read),
        T(cold_values),
        T(equal_blocks_are_one),
        T(bad_puts_are_refused),
        T(parts_are_added),
        T(models_and_prefixes),
        T(holds_and_orphans),
        T(numbers_are_not_reused),
        T(budget_evicts),
        T(iterate_blocks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
