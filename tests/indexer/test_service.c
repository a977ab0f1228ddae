/* The real programs. argv[1]: their folder. ibid-indexer is killed at random moments while it
 * indexes and finishes all the same; a large text is forecast within a bound on its memory. */
#include "tests/indexer/rooms.h"

#include "rpc/base/clock.h"
#include "rpc/base/sanitized.h"

static const char *bin;

static uint64_t draw(uint64_t *seed, uint64_t n) {
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (*seed >> 33) % n;
}

static void killed_and_resumed(void **state) {
    (void)state;
    enum { FILES = 60, KILLS = 12 };
    struct rooms r;
    ibid_job_status s;
    ibid_buf b;
    uint64_t seed = 20260304, kills = 0;
    printf("seed %llu\n", (unsigned long long)seed);
    rooms_open(&r, bin);
    ibid_buf_init(&b, 1 << 24);
    for (uint64_t i = 0; i < FILES; i++) {
        char name[32];
        ibid_buf_clear(&b);
        prose(&b, 1000 + i, 12000);
        (void)snprintf(name, sizeof name, "f%02llu.txt", (unsigned long long)i);
        file_put(&r, name, b.data, b.len);
    }
    uint64_t job = job_start(&r, "killed", r.files, (ibid_index_request){0});
    for (; kills < KILLS; kills++) {
        (void)usleep((useconds_t)(20000 + draw(&seed, 500000)));
        room_kill(&r, 2, SIGKILL);
        ibid_snap *n = NULL;
        ibid_job row;
        assert_ok(ibid_snap_begin(r.store, &n));
        assert_ok(ibid_snap_job(n, job, &row));
        bool over = str_is(row.state, "done");
        ibid_snap_end(n);
        room_spawn(&r, 2);
        room_wait(r.idx);
        if (over) break;
    }
    job_wait(&r, job, &s);
    printf("killed %llu times; %llu ready, %llu unchanged, state %.*s\n", (unsigned long long)kills,
           (unsigned long long)s.ready, (unsigned long long)s.unchanged, (int)s.state.n, s.state.s);
    assert_true(kills >= 3);
    assert_true(str_is(s.state, "done"));
    /* Documents committed before a kill count as the job's own. */
    assert_int_equal(s.ready, FILES);
    assert_int_equal(s.documents, FILES);
    ibid_job_status_close(&s);
    ibid_snap *n = NULL;
    ibid_collection c;
    assert_ok(ibid_snap_begin(r.store, &n));
    assert_ok(ibid_snap_collection(n, cstr("killed"), &c));
    assert_int_equal(c.documents, FILES);
    ibid_snap_end(n);
    verify_clean(&r);
    index_all(&r, "killed", (ibid_index_request){0}, &s);
    assert_int_equal(s.unchanged, FILES);
    assert_int_equal(s.encoded_tokens, 0);
    ibid_job_status_close(&s);
    ibid_buf_fini(&b);
    rooms_close(&r);
}

/* The other rooms go away in the midst of a job: it waits for them. */
static void others_killed(void **state) {
    (void)state;
    struct rooms r;
    ibid_job_status s;
    ibid_buf b;
    rooms_open(&r, bin);
    ibid_buf_init(&b, 1 << 24);
    prose(&b, 3, 250000);
    file_put(&r, "long.txt", b.data, b.len);
    uint64_t job = job_start(&r, "others", r.files, (ibid_index_request){0});
    for (size_t which = 0; which < 2; which++) {
        (void)usleep(400000);
        room_kill(&r, 1 - which, SIGKILL);
        (void)usleep(300000);
        room_spawn(&r, 1 - which);
        room_wait(which ? r.kv : r.attn);
    }
    job_wait(&r, job, &s);
    assert_true(str_is(s.state, "done"));
    assert_int_equal(s.ready, 1);
    ibid_job_status_close(&s);
    verify_clean(&r);
    ibid_buf_fini(&b);
    rooms_close(&r);
}

static uint64_t peak_kib(pid_t pid) {
    char path[64], line[256];
    unsigned long long kib = 0;
    (void)snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "VmHWM: %llu", &kib) == 1) break;
    (void)fclose(f);
    return kib;
}

/* IBID_TEST_TEXT_MB (default 40): how much text. The bound does not grow with it. */
static void large_text_in_little_memory(void **state) {
    (void)state;
    struct rooms r;
    ibid_job_status s;
    ibid_buf b;
    const char *set = getenv("IBID_TEST_TEXT_MB");
    size_t mb = set ? strtoull(set, NULL, 10) : 40;
    char path[900];
    rooms_open(&r, bin);
    ibid_buf_init(&b, 1 << 24);
    (void)snprintf(path, sizeof path, "%s/large.txt", r.files);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    for (size_t i = 0; i < mb; i++) {
        ibid_buf_clear(&b);
        prose(&b, i, 1 << 20);
        assert_int_equal(fwrite(b.data, 1, b.len, f), b.len);
    }
    assert_int_equal(fclose(f), 0);
    uint64_t start = ibid_now_ns();
    uint64_t job = job_start(&r, "large", r.files, (ibid_index_request){.dry_run = true});
    job_wait(&r, job, &s);
    assert_true(str_is(s.state, "done"));
    uint64_t peak = peak_kib(r.pid[2]);
    printf("%zu MB: %llu tokens forecast in %.1f s, the indexer's peak is %llu MiB\n", mb,
           (unsigned long long)s.forecast_tokens, ibid_ms_since(start) / 1000,
           (unsigned long long)(peak >> 10));
    assert_true(s.forecast_tokens > mb * 50000);
    /* Not under a sanitizer: its shadow memory is counted with the indexer's own. */
    assert_true(IBID_SANITIZED || peak < 512 * 1024);
    ibid_job_status_close(&s);
    ibid_buf_fini(&b);
    rooms_close(&r);
}

int main(int argc, char **argv) {
    (void)signal(SIGPIPE, SIG_IGN);
    bin = argc > 1 ? argv[1] : NULL;
    if (!bin) return fprintf(stderr, "usage: %s FOLDER\n", argv[0]), 2;
    const struct CMUnitTest tests[] = {cmocka_unit_test(killed_and_resumed),
                                       cmocka_unit_test(others_killed),
                                       cmocka_unit_test(large_text_in_little_memory)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
