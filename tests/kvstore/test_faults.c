/* What goes wrong: kill -9, flipped bits, a full disk, failing allocations, and a long random walk
 * against a model in memory. */
#include "support.h"

#include "kvstore/store_internal.h"
#include "rpc/base/sanitized.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SEED = 20240607 };
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

/* ---- kill -9 ---- */

/* Document i has 1 + i % 5 chunks of blocks made from seeds i*8.. ; ids repeat, so that some puts
 * replace. After each acknowledgement the child writes i to the pipe. */
static void write_until_killed(uint64_t from, int ack) {
    ibid_store *s = NULL;
    if (ibid_store_open(&(ibid_store_opts){.dir = dir}, &s) != IBID_OK) _exit(3);
    for (uint64_t i = from;; i++) {
        uint64_t blocks[5], n = 1 + i % 5;
        char id[32];
        (void)snprintf(id, sizeof id, "d%u", (unsigned)(i % 17));
        for (uint64_t k = 0; k < n; k++) blocks[k] = block_put(s, i * 8 + k, 40, 0);
        if (document_put(s, "c", id, blocks, n, 0, NULL, NULL) != IBID_OK) _exit(4);
        if (write(ack, &i, sizeof i) != (ssize_t)sizeof i) _exit(5);
        if (i % 3 == 0 && ibid_store_collect(s, NULL) != IBID_OK) _exit(6);
    }
}

/* The document of step i, whole. */
static bool document_is(ibid_store *s, uint64_t i) {
    ibid_snap *n = NULL;
    ibid_document d;
    const ibid_chunk *c;
    size_t count = 0;
    char id[32];
    (void)snprintf(id, sizeof id, "d%u", (unsigned)(i % 17));
    assert_ok(ibid_snap_begin(s, &n));
    bool ok = ibid_snap_document(n, str("c"), str(id), &d) == IBID_OK && d.n_chunks == 1 + i % 5 &&
              ibid_snap_chunks(n, d.number, &c, &count) == IBID_OK;
    for (size_t k = 0; ok && k < count; k++) {
        test_block b;
        ibid_kv_view v;
        ibid_block have;
        block_make(&b, i * 8 + k, 40, 0);
        ok = ibid_snap_block(n, c[k].block, &have) == IBID_OK &&
             memcmp(have.tokens, b.tokens, 40 * sizeof(int32_t)) == 0;
        for (size_t l = 0; ok && l < T_LAYERS; l++)
            ok = ibid_snap_kv(n, c[k].block, l, &v) == IBID_OK && block_kv_equal(&b, l, &v);
        block_free(&b);
    }
    ibid_snap_end(n);
    return ok;
}

static void killed_at_random(void **st) {
    (void)st;
    ibid_store *s = store_open(dir, 0);
    collection_make(s, "c");
    ibid_store_close(s);
    uint64_t state = SEED, next = 0, acknowledged = 0;
    for (int round = 0; round < 50; round++) {
        int ack[2];
        assert_int_equal(pipe(ack), 0);
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            (void)close(ack[0]);
            write_until_killed(next, ack[1]);
        }
        (void)close(ack[1]);
        (void)usleep((useconds_t)(5000 + rnd(&state) % 200000));
        (void)kill(child, SIGKILL);
        int status = 0;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        uint64_t i, last = UINT64_MAX;
        while (read(ack[0], &i, sizeof i) == (ssize_t)sizeof i) last = i;
        (void)close(ack[0]);
        s = store_open(dir, 0);
        assert_sound(s);
        if (last != UINT64_MAX) {
            acknowledged += last + 1 - next;
            /* The last acknowledged one, or the one after it, which was committed but not reported.
             */
            uint64_t first = last > 16 ? last - 16 : 0;
            for (uint64_t k = first + (last > 16); k <= last; k++)
                assert_true(document_is(s, k) || (k + 17 == last + 1 && document_is(s, last + 1)));
            next = last + 1;
        }
        assert_ok(ibid_store_collect(s, NULL));
        assert_sound(s);
        ibid_store_close(s);
    }
    printf("kill -9: %u documents acknowledged in 50 rounds, seed %d\n", (unsigned)acknowledged,
           SEED);
    assert_true(acknowledged > 20);
}

/* ---- Flipped bits ---- */

/* Flips one bit in every place of the data file where `what` lies; returns how many. */
static size_t flip(const void *what, size_t n, size_t at) {
    char path[300];
    (void)snprintf(path, sizeof path, "%s/data.mdb", dir);
    int fd = open(path, O_RDWR);
    struct stat st;
    assert_true(fd >= 0 && fstat(fd, &st) == 0);
    uint8_t *file = malloc((size_t)st.st_size);
    assert_non_null(file);
    assert_int_equal(pread(fd, file, (size_t)st.st_size, 0), st.st_size);
    size_t found = 0;
    uint8_t *p = file, *end = file + st.st_size;
    while ((p = memmem(p, (size_t)(end - p), what, n))) {
        uint8_t bad = (uint8_t)(p[at] ^ 0x10);
        assert_int_equal(pwrite(fd, &bad, 1, p - file + (off_t)at), 1);
        p += n;
        found++;
    }
    assert_int_equal(fsync(fd), 0);
    (void)close(fd);
    free(file);
    return found;
}

/* What is wrong after each flip, seen by reads and by verify; the next case starts from new data.
 */
static void flips_are_detected(void **st) {
    (void)st;
    static const char *const cases[] = {"kv",      "tokens", "keys",  "text",   "title",
                                        "locator", "job",    "model", "prefix", "change"};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *what = cases[i];
        drop_dir(dir);
        ibid_store *s = store_open(dir, 0);
        collection_make(s, "c");
        test_block b, p;
        uint64_t number, document;
        block_make(&b, 77, 100, 0);
        block_make(&p, 78, 30, 0);
        ibid_hash prefix = hash_of("prefix"), fp = hash_of("model m");
        assert_ok(ibid_store_blocks_put(s, &b.put, 1, &number));
        assert_ok(ibid_store_prefix_put(s, &prefix, T_LAYERS, p.put.values, p.put.value_size));
        static const char text[] = "0123456789 a text that zstd cannot make shorter: qzxjvkwpf";
        ibid_chunk chunk = {0, 5, str("a locator of its own"), number};
        ibid_document_put d = {.collection = str("c"),
                               .id = str("d"),
                               .title = str("a title of its own"),
                               .state = IBID_DOC_READY,
                               .text = str(text),
                               .chunks = &chunk,
                               .n_chunks = 1};
        assert_ok(ibid_store_document_put(s, &d, &document, NULL));
        ibid_job j = {
            .kind = str("index"), .state = str("paused"), .report = str("a report of its own")};
        uint64_t job;
        assert_ok(ibid_store_job_put(s, &j, &job));
        assert_sound(s);
        ibid_store_close(s);

        size_t found = 0;
        uint8_t change[16];
        ibidi_store64(change, 1);
        ibidi_store64(change + 8, document);
        if (!strcmp(what, "kv")) found = flip((const uint8_t *)b.values[1] + 1000, 64, 3);
        if (!strcmp(what, "tokens")) found = flip(b.tokens + 10, 64, 5);
        if (!strcmp(what, "keys")) found = flip(b.keys + 500, 64, 7);
        if (!strcmp(what, "text")) found = flip("shorter: qzxjvkwpf", 18, 2);
        if (!strcmp(what, "title")) found = flip("a title of its own", 18, 2);
        if (!strcmp(what, "locator")) found = flip("a locator of its own", 20, 2);
        if (!strcmp(what, "job")) found = flip("a report of its own", 19, 2);
        if (!strcmp(what, "model")) found = flip("/models/m.gguf", 14, 2);
        if (!strcmp(what, "prefix")) found = flip((const uint8_t *)p.values[2] + 500, 64, 9);
        /* collection, document, removed, one added: the row's payload */
        uint8_t row[48] = {0};
        ibidi_store64(row, 1), ibidi_store64(row + 8, document), ibidi_store64(row + 24, 1);
        ibidi_store64(row + 40, number);
        if (!strcmp(what, "change")) found = flip(row, sizeof row, 40);
        if (!found) print_error("payload of %s not found\n", what);
        assert_true(found > 0);

        s = store_open(dir, 0);
        ibid_snap *n = NULL;
        ibid_block blk;
        ibid_kv_view v;
        ibid_keys keys;
        ibid_document doc;
        ibid_buf buf;
        ibid_buf_init(&buf, 1000);
        const ibid_chunk *cs;
        size_t nc;
        ibid_job gj;
        ibid_model_record m;
        assert_ok(ibid_snap_begin(s, &n));
#define WANT(name) (!strcmp(what, name) ? IBID_CORRUPT : IBID_OK)
        assert_err(ibid_snap_block(n, number, &blk), WANT("tokens"));
        assert_err(ibid_snap_kv(n, number, 1, &v), WANT("kv"));
        assert_err(ibid_snap_kv(n, number, 1, &v), WANT("kv")); /* and not only the first time */
        assert_ok(ibid_snap_kv(n, number, 0, &v));
        assert_err(ibid_snap_keys(n, number, &keys), WANT("keys"));
        assert_err(ibid_snap_document(n, str("c"), str("d"), &doc), WANT("title"));
        if (strcmp(what, "title")) {
            assert_err(ibid_snap_text(n, document, &buf), WANT("text"));
            assert_err(ibid_snap_chunks(n, document, &cs, &nc), WANT("locator"));
        }
        assert_err(ibid_snap_job(n, job, &gj), WANT("job"));
        assert_err(ibid_snap_model(n, &fp, &m), WANT("model"));
        assert_err(ibid_snap_prefix_kv(n, &prefix, 2, &v), WANT("prefix"));
        ibid_snap_end(n);
        ibid_buf_fini(&buf);
        char first[512];
        if (faults_of(s, first) == 0) fail_msg("verify does not see the flip in %s", what);
        /* Putting the block again, as a client that met CORRUPT does, repairs KV and keys. */
        if (!strcmp(what, "kv") || !strcmp(what, "keys")) {
            uint64_t again;
            assert_ok(ibid_store_blocks_put(s, &b.put, 1, &again));
            assert_int_equal(again, number);
            assert_sound(s);
        }
        ibid_store_close(s);
        block_free(&b);
        block_free(&p);
    }
}

/* ---- What verify must see beyond flipped bits: rows that are sound one by one and wrong together
 * ---- */

static ibid_err wrong_refcount(ibidi_writer *w, void *arg) {
    uint64_t block = *(uint64_t *)arg;
    ibidi_block_state st;
    ibid_err e = ibidi_block_state_get(&w->t, block, &st);
    st.refcount++;
    return e ? e : ibidi_block_state_put(&w->t, block, &st);
}

static ibid_err dangling_use(ibidi_writer *w, void *arg) {
    ibidi_key k = ibidi_key_3(*(uint64_t *)arg, 999, 0);
    return ibidi_put(&w->t, IBIDI_USE, &k, NULL, 0);
}

static ibid_err missing_block(ibidi_writer *w, void *arg) {
    ibidi_key k = ibidi_key_1(*(uint64_t *)arg);
    ibid_err e = ibidi_del(&w->t, IBIDI_BLOCK, &k);
    return e ? e : ibidi_del(&w->t, IBIDI_BLOCK_STATE, &k);
}

static ibid_err chunk_beyond_text(ibidi_writer *w, void *arg) {
    ibid_chunk c = {0, 11, {"", 0}, *(uint64_t *)arg};
    return ibidi_chunks_put(&w->t, 1, &c, 1);
}

static ibid_err wrong_keys(ibidi_writer *w, void *arg) {
    ibid_keys k = {.n_tokens = 3, .dim = 2, .data = (const int8_t *)"123456"};
    return ibidi_keys_write(&w->t, *(uint64_t *)arg, &k);
}

static ibid_err missing_kv(ibidi_writer *w, void *arg) {
    ibidi_key k = ibidi_key_u64_u16(*(uint64_t *)arg, 1);
    return ibidi_del(&w->t, IBIDI_KV, &k);
}

static ibid_err missing_change(ibidi_writer *w, void *arg) {
    (void)arg;
    ibidi_key k = ibidi_key_1(1);
    return ibidi_del(&w->t, IBIDI_CHANGE, &k);
}

static ibid_err hold_of_nobody(ibidi_writer *w, void *arg) {
    ibidi_key k = ibidi_key_2(55, *(uint64_t *)arg);
    return ibidi_put(&w->t, IBIDI_HOLD, &k, NULL, 0);
}

static ibid_err moved_row(ibidi_writer *w, void *arg) {
    /* A sound record under a key it was not written for. */
    ibidi_key from = ibidi_key_1(*(uint64_t *)arg), to = ibidi_key_1(*(uint64_t *)arg + 1000);
    ibidi_slice v;
    void *room;
    ibid_err e = ibidi_raw_get(&w->t, IBIDI_BLOCK_STATE, &from, &v);
    uint8_t copy[256];
    if (e || v.n > sizeof copy) return e ? e : IBID_INTERNAL;
    memcpy(copy, v.p, v.n);
    e = ibidi_raw_reserve(&w->t, IBIDI_BLOCK_STATE, &to, v.n, &room);
    if (!e) memcpy(room, copy, v.n);
    return e;
}

static ibid_err wrong_total(ibidi_writer *w, void *arg) {
    (void)arg;
    w->st.kv_bytes += 64;
    return IBID_OK;
}

static void verify_finds(void **st) {
    (void)st;
    static const struct {
        ibidi_write_fn damage;
        const char *sentence;
    } cases[] = {
        {wrong_refcount, "counts 2 uses"},    {dangling_use, "claims a use"},
        {missing_block, "which is missing"},  {chunk_beyond_text, "outside the text"},
        {wrong_keys, "token keys are 3 x 2"}, {missing_kv, "is missing"},
        {missing_change, "changes jump"},     {hold_of_nobody, "holds block"},
        {moved_row, "block_state"},           {wrong_total, "bytes of KV"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        drop_dir(dir);
        ibid_store *s = store_open(dir, 0);
        collection_make(s, "c");
        uint64_t b = block_put(s, 1, 20, 0);
        assert_ok(document_put(s, "c", "d", &b, 1, 0, NULL, NULL));
        assert_ok(document_put(s, "c", "e", &b, 0, 0, NULL, NULL));
        assert_sound(s);
        assert_ok(ibidi_write(s, cases[i].damage, &b));
        char first[512];
        if (faults_of(s, first) == 0 || !strstr(first, cases[i].sentence))
            fail_msg("case %zu: verify says \"%s\", not \"%s\"", i, first, cases[i].sentence);
        ibid_store_close(s);
    }
}

/* A file that is cut off is an error, never SIGBUS. */
static void cut_off_files(void **st) {
    (void)st;
    for (int part = 1; part < 8; part++) {
        drop_dir(dir);
        ibid_store *s = store_open(dir, 0);
        collection_make(s, "c");
        for (uint64_t i = 0; i < 20; i++) (void)block_put(s, i, 60, 0);
        ibid_store_close(s);
        char path[300];
        struct stat before;
        (void)snprintf(path, sizeof path, "%s/data.mdb", dir);
        assert_int_equal(stat(path, &before), 0);
        assert_int_equal(truncate(path, before.st_size * part / 8), 0);
        s = NULL;
        ibid_err e = ibid_store_open(&(ibid_store_opts){.dir = dir}, &s);
        if (e == IBID_OK) {
            uint64_t faults = 0;
            e = ibid_store_verify(s, NULL, NULL, &faults);
            assert_true(e != IBID_OK || faults > 0);
            ibid_store_close(s);
        }
    }
    drop_dir(dir);
    assert_int_equal(mkdir(dir, 0700), 0);
    char path[300];
    (void)snprintf(path, sizeof path, "%s/data.mdb", dir);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    for (int i = 0; i < 10000; i++) (void)fputs("nonsense ", f);
    (void)fclose(f);
    ibid_store *s = NULL;
    assert_err(ibid_store_open(&(ibid_store_opts){.dir = dir}, &s), IBID_CORRUPT);
    assert_err(ibid_store_open(&(ibid_store_opts){.dir = dir, .readonly = true}, &s), IBID_CORRUPT);
}

/* ---- A full disk ---- */

/* Fills the store in dir until it answers DISKFULL; what was acknowledged is read, and after room
 * is made (more_room) writing goes on in the same handle. Exits 0, or the line that failed. */
#define NEED(x)                                                                                    \
    do {                                                                                           \
        if (!(x)) {                                                                                \
            fprintf(stderr, "line %d: %s\n", __LINE__, ibid_err_detail());                         \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)
static int fill_disk(void (*more_room)(void)) {
    ibid_store *s = NULL;
    NEED(ibid_store_open(&(ibid_store_opts){.dir = dir, .map_size = 1 << 30}, &s) == IBID_OK);
    collection_make(s, "c");
    uint64_t acknowledged = 0, number = 0;
    ibid_err e = IBID_OK;
    test_block b;
    for (uint64_t i = 0; i < 100000 && !e; i++) {
        block_make(&b, i, 256, 0);
        e = ibid_store_blocks_put(s, &b.put, 1, &number);
        if (!e) e = document_put(s, "c", "d", &number, 1, 0, NULL, NULL);
        block_free(&b);
        if (!e) acknowledged = number;
    }
    NEED(e == IBID_DISKFULL);
    NEED(acknowledged > 3);
    /* Reads go on, in this handle and in a new one; what was acknowledged is whole. */
    for (int k = 0; k < 2; k++) {
        ibid_store *r = NULL;
        ibid_snap *n = NULL;
        ibid_kv_view v;
        uint64_t faults = 1;
        NEED(ibid_store_open(&(ibid_store_opts){.dir = dir, .readonly = true}, &r) == IBID_OK);
        NEED(ibid_snap_begin(r, &n) == IBID_OK);
        for (uint64_t i = 1; i <= acknowledged; i++) NEED(ibid_snap_kv(n, i, 0, &v) == IBID_OK);
        ibid_snap_end(n);
        NEED(ibid_store_verify(s, NULL, NULL, &faults) == IBID_OK && faults == 0);
        ibid_store_close(r);
        /* Still full: refused again with the same code, and nothing breaks. */
        for (uint64_t i = 0; i < 3; i++) {
            block_make(&b, 500000 + i, 4096, 0);
            NEED(ibid_store_blocks_put(s, &b.put, 1, &number) == IBID_DISKFULL);
            block_free(&b);
        }
    }
    more_room();
    block_make(&b, 600000, 4096, 0);
    NEED(ibid_store_blocks_put(s, &b.put, 1, &number) == IBID_OK);
    block_free(&b);
    uint64_t faults = 1;
    NEED(ibid_store_verify(s, NULL, NULL, &faults) == IBID_OK && faults == 0);
    ibid_store_close(s);
    return 0;
}

static void remount_larger(void) {
    (void)mount("tmpfs", dir, "tmpfs", MS_REMOUNT, "size=64m");
}

static void raise_limit(void) {
    struct rlimit lim;
    (void)getrlimit(RLIMIT_FSIZE, &lim);
    lim.rlim_cur = lim.rlim_max;
    (void)setrlimit(RLIMIT_FSIZE, &lim);
}

/* In a child: its own mount namespace, so that nothing is left mounted. 77: mounting is not
 * permitted. */
static int on_small_tmpfs(void) {
    uid_t uid = getuid();
    if (unshare(CLONE_NEWNS | (uid ? CLONE_NEWUSER : 0)) != 0) return 77;
    if (uid) {
        char map[64];
        int n = snprintf(map, sizeof map, "0 %u 1", (unsigned)uid);
        int fd = open("/proc/self/uid_map", O_WRONLY);
        if (fd < 0 || write(fd, map, (size_t)n) != n) return 77;
        (void)close(fd);
    }
    if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
        mount("tmpfs", dir, "tmpfs", 0, "size=16m") != 0)
        return 77;
    return fill_disk(remount_larger);
}

static int under_file_limit(void) {
    struct rlimit lim;
    (void)signal(SIGXFSZ, SIG_IGN);
    if (getrlimit(RLIMIT_FSIZE, &lim) != 0) return 77;
    lim.rlim_cur = 16 << 20;
    if (setrlimit(RLIMIT_FSIZE, &lim) != 0) return 77;
    return fill_disk(raise_limit);
}

static int in_child(int (*fn)(void)) {
    (void)fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) _exit(fn());
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFSIGNALED(status)) fail_msg("killed by signal %d", WTERMSIG(status));
    return WEXITSTATUS(status);
}

static void full_disk(void **st) {
    (void)st;
    int rc = in_child(on_small_tmpfs);
    if (rc == 77) {
        print_message("mounting is not permitted here\n");
        skip();
    }
    assert_int_equal(rc, 0);
}

static void file_size_limit(void **st) {
    (void)st;
    int rc = in_child(under_file_limit);
    if (rc == 77) skip();
    assert_int_equal(rc, 0);
}

/* ---- Little address space: the map is made smaller, and data still goes in ---- */
static int in_little_space(void) {
    struct rlimit lim = {(rlim_t)4 << 30, (rlim_t)4 << 30};
    ibid_store *s = NULL;
    ibid_store_stats stats;
    if (IBID_SANITIZED || setrlimit(RLIMIT_AS, &lim) != 0) return 77;
    NEED(ibid_store_open(&(ibid_store_opts){.dir = dir}, &s) == IBID_OK);
    stats_of(s, &stats);
    NEED(stats.map_size >= 1 << 28 && stats.map_size <= (uint64_t)4 << 30);
    (void)block_put(s, 1, 100, 0);
    assert_sound(s);
    ibid_store_close(s);
    return 0;
}

static void little_address_space(void **st) {
    (void)st;
    int rc = in_child(in_little_space);
    if (rc == 77) skip();
    assert_int_equal(rc, 0);
}

/* ---- Failing allocations ---- */

static ibid_err scenario(void) {
    ibid_store *s = NULL;
    ibid_snap *n = NULL;
    ibid_hash model = hash_of("model m");
    uint64_t numbers[2], document = 0;
    ibid_kv_view v;
    ibid_document d;
    const ibid_chunk *c;
    size_t count;
    ibid_buf text;
    test_block b;
    block_make(&b, 1, 30, 0);
    ibid_block_put puts[2] = {b.put, b.put};
    puts[1].n_title = 3;
    ibid_buf_init(&text, 1000);
    ibid_model_record m = {.fingerprint = model, .name = str("m")};
    ibid_err e = ibid_store_open(&(ibid_store_opts){.dir = dir}, &s);
    if (!e) e = ibid_store_model_put(s, &m);
    if (!e) e = ibid_store_collection_create(s, str("c"), &model);
    if (!e) e = ibid_store_blocks_put(s, puts, 2, numbers);
    if (!e) e = document_put(s, "c", "d", numbers, 2, 0, &document, NULL);
    if (!e) ibid_store_touch(s, numbers, 2);
    if (!e) e = ibid_snap_begin(s, &n);
    if (!e) e = ibid_snap_kv(n, numbers[0], 0, &v);
    if (!e) e = ibid_snap_document(n, str("c"), str("d"), &d);
    if (!e) e = ibid_snap_chunks(n, document, &c, &count);
    if (!e) e = ibid_snap_text(n, document, &text);
    ibid_snap_end(n);
    if (!e) e = ibid_store_document_delete(s, str("c"), str("d"), NULL);
    if (!e) e = ibid_store_collect(s, NULL);
    ibid_store_close(s);
    ibid_buf_fini(&text);
    block_free(&b);
    return e;
}

static void every_allocation_fails_once(void **st) {
    (void)st;
    uint64_t nth = 1, failed = 0;
    for (;; nth++) {
        drop_dir(dir);
        ibid_alloc_fail_at(nth);
        ibid_err e = scenario();
        ibid_alloc_fail_at(0);
        assert_true(e == IBID_OK || e == IBID_NOMEM);
        failed += e != IBID_OK;
        ibid_store *s = store_open(dir, 0);
        assert_sound(s);
        ibid_store_close(s);
        if (e == IBID_OK && nth > 100) break;
        assert_true(nth < 2000);
    }
    printf("%u of %u allocations failed with a clean error\n", (unsigned)failed, (unsigned)nth);
    assert_true(failed > 20);
}

/* ---- A random walk against a model ---- */

enum { M_DOCS = 12, M_BLOCKS = 30, M_CHUNKS = 9 };
typedef struct model {
    bool there[M_DOCS];
    size_t n[M_DOCS];
    uint64_t seed[M_DOCS][M_CHUNKS];
    uint64_t generation;
} model;

static void compare(ibid_store *s, const model *m) {
    ibid_snap *n = NULL;
    uint64_t refs[M_BLOCKS] = {0}, documents = 0, chunks = 0;
    assert_ok(ibid_snap_begin(s, &n));
    assert_int_equal(ibid_snap_generation(n), m->generation);
    for (size_t i = 0; i < M_DOCS; i++) {
        char id[16];
        ibid_document d;
        const ibid_chunk *c;
        size_t count;
        (void)snprintf(id, sizeof id, "doc %zu", i);
        ibid_err e = ibid_snap_document(n, str("c"), str(id), &d);
        assert_int_equal(e, m->there[i] ? IBID_OK : IBID_NOTFOUND);
        if (e) continue;
        documents++;
        assert_ok(ibid_snap_chunks(n, d.number, &c, &count));
        assert_int_equal(count, m->n[i]);
        chunks += count;
        for (size_t k = 0; k < count; k++) {
            ibid_block b;
            assert_ok(ibid_snap_block(n, c[k].block, &b));
            assert_int_equal(b.tokens[0], (int32_t)(m->seed[i][k] * 1000));
            refs[m->seed[i][k]]++;
        }
    }
    for (uint64_t seed = 0; seed < M_BLOCKS; seed++) {
        test_block b;
        ibid_block got;
        block_make(&b, seed, 16, 0);
        ibid_hash h =
            ibid_block_hash(&b.put.model, &b.put.prefix, IBID_KV_Q8_0, b.put.n_title, b.tokens, 16);
        ibid_err e = ibid_snap_block_find(n, &h, b.put.n_title, b.tokens, 16, &got);
        if (refs[seed]) assert_ok(e);
        if (!e) assert_int_equal(got.refcount, refs[seed]);
        ibid_kv_view v;
        if (!e && got.has_kv) {
            assert_ok(ibid_snap_kv(n, got.number, 0, &v));
            assert_true(block_kv_equal(&b, 0, &v));
        }
        block_free(&b);
    }
    ibid_store_stats stats;
    assert_ok(ibid_snap_stats(n, &stats));
    assert_int_equal(stats.documents, documents);
    assert_int_equal(stats.chunks, chunks);
    ibid_snap_end(n);
    assert_sound(s);
}

static void random_walk(void **st) {
    (void)st;
    test_block probe;
    block_make(&probe, 0, 16, 0);
    uint64_t state = SEED, one = T_LAYERS * probe.put.value_size;
    block_free(&probe);
    ibid_store *s = store_open(dir, 12 * one);
    collection_make(s, "c");
    model m = {.generation = 0};
    printf("random walk, seed %d\n", SEED);
    for (int step = 0; step < 600; step++) {
        size_t i = rnd(&state) % M_DOCS;
        char id[16];
        (void)snprintf(id, sizeof id, "doc %zu", i);
        uint64_t what = rnd(&state) % 10, job = 0;
        if (what < 6) {
            uint64_t blocks[M_CHUNKS];
            job = rnd(&state) % 2 ? job_make(s) : 0;
            m.n[i] = rnd(&state) % (M_CHUNKS + 1);
            for (size_t k = 0; k < m.n[i]; k++) {
                m.seed[i][k] = rnd(&state) % M_BLOCKS;
                blocks[k] = block_put(s, m.seed[i][k], 16, job);
            }
            assert_ok(document_put(s, "c", id, blocks, m.n[i], job, NULL, NULL));
            m.there[i] = true;
            m.generation++;
        } else if (what < 8) {
            assert_err(ibid_store_document_delete(s, str("c"), str(id), NULL),
                       m.there[i] ? IBID_OK : IBID_NOTFOUND);
            m.generation += m.there[i];
            m.there[i] = false;
        } else if (what == 8) {
            assert_ok(ibid_store_collect(s, NULL));
        } else {
            uint64_t touched[] = {1, 2, 3, rnd(&state) % 50};
            ibid_store_touch(s, touched, 4);
            if (rnd(&state) % 8 == 0) {
                ibid_store_close(s);
                s = store_open(dir, 12 * one);
            }
        }
        if (job && rnd(&state) % 2) job_finish(s, job, "done");
        if (step % 5 == 0) compare(s, &m);
    }
    compare(s, &m);
    ibid_store_close(s);
}

int main(void) {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(killed_at_random),
        T(flips_are_detected),
        T(verify_finds),
        T(cut_off_files),
        T(full_disk),
        T(file_size_limit),
        T(little_address_space),
        T(every_allocation_fails_once),
        T(random_walk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
