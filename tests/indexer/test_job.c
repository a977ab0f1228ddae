/* Jobs over the real rooms hosted in this process: every end state, unchanged and changed files,
 * pruning, shared blocks, small edits, forecasts, refusals, pause and cancel, removal, the cache of
 * find. */
#include "tests/indexer/pdf_write.h"
#include "tests/indexer/rooms.h"

static struct rooms rooms;

static int set_up(void **state) {
    (void)state;
    rooms_open(&rooms, NULL);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    rooms_close(&rooms);
    return 0;
}

/* Each test begins with no files. */
static int clear_files(void **state) {
    char cmd[1300];
    (void)state;
    (void)snprintf(cmd, sizeof cmd, "rm -rf '%s' && mkdir '%s'", rooms.files, rooms.files);
    return system(cmd);
}

static const ibid_file_result *result_of(const ibid_job_status *s, const char *name) {
    for (size_t i = 0; i < s->n_files; i++) {
        const ibid_file_result *f = &s->files[i];
        if (f->path.n > strlen(name) &&
            memcmp(f->path.s + f->path.n - strlen(name), name, strlen(name)) == 0)
            return f;
    }
    fail_msg("no result for %s", name);
    return NULL;
}

static void every_end_state(void **state) {
    (void)state;
    ibid_job_status s;
    char reason[256];
    ibid_buf pdf;
    ibid_buf_init(&pdf, 1 << 20);
    static const char *const pages[] = {"Page one has words.", "", "Page three too."};
    assert_ok(test_pdf(&pdf, pages, 3));
    file_put(&rooms, "scan.pdf", pdf.data, pdf.len);
    file_text(&rooms, "a.md", "# Whales\n\nThey sing at night.\n");
    file_text(&rooms, "b.html", "<title>B</title><p>Some words here.");
    file_text(&rooms, "c.jsonl",
              "{\"id\":\"one\",\"title\":\"T\",\"text\":\"First line.\"}\nbad\n"
              "{\"id\":\"two\",\"text\":\"\"}\n"
              "{\"id\":\"one\",\"text\":\"again\"}\n");
    file_text(&rooms, "d.txt", "caf\xE9 latte");
    file_text(&rooms, "e.txt", " \n");
    file_text(&rooms, "f.png", "\x89PNG");
    file_put(&rooms, "g.txt", "bin\0ary", 7);
    file_text(&rooms, "h.pdf", "this is no pdf");
    file_text(&rooms, ".hidden.txt", "never seen");
    index_all(&rooms, "states", (ibid_index_request){0}, &s);
    assert_int_equal(s.files_total, 9);
    assert_int_equal(s.files_done, 9);
    assert_int_equal(s.ready, 3);       /* a.md b.html one */
    assert_int_equal(s.partial, 2);     /* scan.pdf d.txt */
    assert_int_equal(s.empty, 2);       /* e.txt two */
    assert_int_equal(s.unsupported, 2); /* f.png g.txt */
    assert_int_equal(s.failed, 3);      /* h.pdf, a bad line, an id used twice */
    assert_int_equal(s.encoded_tokens + s.reused_tokens, s.tokens_total);
    assert_true(s.encoded_tokens > 0 && s.tokens_per_s > 0);
    ibid_job_status_close(&s);
    assert_int_equal(stored(&rooms, "states", "a.md", NULL).state, IBID_DOC_READY);
    assert_int_equal(stored(&rooms, "states", "a.md", NULL).n_chunks, 1);
    assert_int_equal(stored(&rooms, "states", "=one", NULL).state, IBID_DOC_READY);
    assert_int_equal(stored(&rooms, "states", "=two", NULL).state, IBID_DOC_EMPTY);
    assert_int_equal(stored(&rooms, "states", "scan.pdf", reason).state, IBID_DOC_PARTIAL);
    assert_string_equal(reason, "1 of 3 pages have no text: 2");
    assert_int_equal(stored(&rooms, "states", "e.txt", NULL).state, IBID_DOC_EMPTY);
    assert_int_equal(stored(&rooms, "states", "f.png", NULL).state, IBID_DOC_UNSUPPORTED);
    assert_int_equal(stored(&rooms, "states", "g.txt", NULL).state, IBID_DOC_UNSUPPORTED);
    assert_int_equal(stored(&rooms, "states", "h.pdf", NULL).state, IBID_DOC_FAILED);
    assert_int_equal(stored(&rooms, "states", ".hidden.txt", NULL).state, 0);

    /* Again: nothing is encoded, and what cannot be read now leaves the old version in place. */
    file_text(&rooms, "b.html", "");
    char path[900];
    (void)snprintf(path, sizeof path, "%s/a.md", rooms.files);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkdir(path, 0700), 0); /* a folder now: gone as a file */
    index_all(&rooms, "states", (ibid_index_request){0}, &s);
    assert_int_equal(s.encoded_tokens, 0);
    assert_int_equal(s.unchanged, 7); /* one two scan.pdf d e f g */
    ibid_job_status_close(&s);
    assert_int_equal(stored(&rooms, "states", "a.md", NULL).state, IBID_DOC_READY);
    assert_int_equal(stored(&rooms, "states", "b.html", NULL).state, IBID_DOC_EMPTY);
    verify_clean(&rooms);
    ibid_buf_fini(&pdf);
}

static void failure_keeps_the_old_version(void **state) {
    (void)state;
    ibid_job_status s;
    ibid_buf pdf;
    ibid_buf_init(&pdf, 1 << 20);
    static const char *const pages[] = {"Words on a page."};
    assert_ok(test_pdf(&pdf, pages, 1));
    file_put(&rooms, "x.pdf", pdf.data, pdf.len);
    index_all(&rooms, "keeps", (ibid_index_request){0}, &s);
    assert_int_equal(s.ready, 1);
    ibid_job_status_close(&s);
    file_put(&rooms, "x.pdf", pdf.data, 40);
    index_all(&rooms, "keeps", (ibid_index_request){0}, &s);
    assert_int_equal(s.failed, 1);
    const ibid_file_result *f = result_of(&s, "x.pdf");
    assert_non_null(memmem(f->reason.s, f->reason.n, "stays", 5));
    ibid_job_status_close(&s);
    assert_int_equal(stored(&rooms, "keeps", "x.pdf", NULL).state, IBID_DOC_READY);
    ibid_buf_fini(&pdf);
}

static void edits_reuse_and_prune_removes(void **state) {
    (void)state;
    ibid_job_status s;
    ibid_buf b;
    ibid_buf_init(&b, 1 << 24);
    prose(&b, 42, 120000);
    file_put(&rooms, "long.txt", b.data, b.len);
    file_text(&rooms, "gone.md", "# Gone\n\nsoon");
    index_all(&rooms, "edits", (ibid_index_request){0}, &s);
    assert_int_equal(s.ready, 2);
    uint64_t tokens = s.tokens_total;
    assert_int_equal(s.encoded_tokens, tokens);
    assert_int_equal(s.forecast_tokens, tokens);
    ibid_job_status_close(&s);
    uint64_t before = stored(&rooms, "edits", "long.txt", NULL).number;

    memcpy(b.data + b.len / 2, "An EDIT right here", 18);
    file_put(&rooms, "long.txt", b.data, b.len);
    char path[900];
    (void)snprintf(path, sizeof path, "%s/gone.md", rooms.files);
    assert_int_equal(unlink(path), 0);
    index_all(&rooms, "edits", (ibid_index_request){.prune = true}, &s);
    printf("%llu tokens, the edit encodes %llu\n", (unsigned long long)tokens,
           (unsigned long long)s.encoded_tokens);
    assert_true(s.encoded_tokens > 0 && s.encoded_tokens * 20 <= tokens);
    assert_int_equal(s.removed, 1);
    ibid_job_status_close(&s);
    assert_int_equal(stored(&rooms, "edits", "gone.md", NULL).state, 0);
    assert_int_equal(stored(&rooms, "edits", "long.txt", NULL).number, before);
    verify_clean(&rooms);
    ibid_buf_fini(&b);
}

static uint64_t first_block(const char *collection, const char *id, size_t *n_title,
                            ibid_buf *text) {
    ibid_snap *n = NULL;
    ibid_document d;
    const ibid_chunk *chunks;
    ibid_block block;
    size_t count = 0;
    assert_ok(ibid_snap_begin(rooms.store, &n));
    assert_ok(ibid_snap_document(n, cstr(collection), cstr(id), &d));
    assert_ok(ibid_snap_chunks(n, d.number, &chunks, &count));
    assert_int_equal(count, 1);
    assert_ok(ibid_snap_block(n, chunks[0].block, &block));
    *n_title = block.n_title;
    ibid_buf_clear(text);
    /* The tiny vocabulary's first tokens are bytes; merged ones follow and are checked elsewhere.
     */
    assert_ok(ibid_snap_text(n, d.number, text));
    assert_int_equal(chunks[0].start, 0);
    assert_int_equal(chunks[0].end, text->len);
    uint64_t number = chunks[0].block;
    ibid_snap_end(n);
    return number;
}

static void equal_chunks_are_stored_once(void **state) {
    (void)state;
    ibid_job_status s;
    ibid_buf text;
    size_t n_title = 0, other = 0;
    ibid_buf_init(&text, 1 << 20);
    file_text(&rooms, "s.jsonl",
              "{\"id\":\"p\",\"title\":\"Same title\",\"text\":\"Shared words stand here.\"}\n"
              "{\"id\":\"q\",\"title\":\"Same title\",\"text\":\"Shared words stand here.\"}\n"
              "{\"id\":\"r\",\"title\":\"Another\",\"text\":\"Shared words stand here.\"}\n"
              "{\"id\":\"u\",\"text\":\"Shared words stand here.\"}\n");
    index_all(&rooms, "shared", (ibid_index_request){0}, &s);
    assert_int_equal(s.ready, 4);
    assert_true(s.reused_tokens > 0);
    ibid_job_status_close(&s);
    uint64_t p = first_block("shared", "p", &n_title, &text);
    assert_true(n_title > 1);
    assert_string_equal(text.data, "Shared words stand here.");
    assert_int_equal(first_block("shared", "q", &other, &text), p);
    assert_int_not_equal(first_block("shared", "r", &other, &text), p);
    assert_int_not_equal(first_block("shared", "u", &other, &text), p);
    assert_int_equal(other, 0); /* no title, no title line */
    ibid_buf_fini(&text);
}

static void refusals(void **state) {
    (void)state;
    ibid_job_status s;
    uint64_t job = 0;
    file_text(&rooms, "a.txt", "Some words to index here.");
    /* A forecast alone changes nothing. */
    index_all(&rooms, "dry", (ibid_index_request){.dry_run = true}, &s);
    assert_true(s.forecast_tokens > 0 && s.forecast_bytes > 0 && s.free_bytes > 0);
    assert_int_equal(s.n_files, 0);
    ibid_job_status_close(&s);
    assert_int_equal(stored(&rooms, "dry", "a.txt", NULL).state, 0);
    /* The budget: refused before anything is encoded, unless forced. */
    assert_ok(ibid_kvc_set_budget(rooms.kv, 1));
    job_wait(&rooms, job_start(&rooms, "budget", rooms.files, (ibid_index_request){0}), &s);
    assert_true(str_is(s.state, "failed"));
    assert_int_equal(s.error, IBID_BUDGET);
    assert_int_equal(s.encoded_tokens, 0);
    printf("%.*s\n", (int)s.error_text.n, s.error_text.s);
    ibid_job_status_close(&s);
    assert_ok(ibid_kvc_set_budget(rooms.kv, 0));

    ibid_str missing = cstr("/nonexistent/file.txt"), relative = cstr("a.txt");
    ibid_index_request q = {.collection = cstr("c"), .paths = &missing, .n_paths = 1};
    assert_int_equal(ibid_idx_submit(rooms.idx, &q, &job), IBID_NOTFOUND);
    q.paths = &relative;
    assert_int_equal(ibid_idx_submit(rooms.idx, &q, &job), IBID_INVAL);
    ibid_str here = cstr(rooms.files);
    q.paths = &here;
    q.collection = cstr(".find");
    assert_int_equal(ibid_idx_submit(rooms.idx, &q, &job), IBID_INVAL);
    q.collection = cstr("c");
    q.model = cstr("no such model");
    assert_int_equal(ibid_idx_submit(rooms.idx, &q, &job), IBID_NOTFOUND);
    assert_int_equal(ibid_idx_status(rooms.idx, 999999, 0, 0, &s), IBID_NOTFOUND);
    assert_int_equal(ibid_idx_pause(rooms.idx, 999999), IBID_NOTFOUND);
}

static void another_model_is_refused(void **state) {
    (void)state;
    char path[700];
    ibid_model_info info;
    ibid_job_status s;
    uint64_t job = 0;
    ibid_test_gguf spec = ibid_test_gguf_small();
    spec.seed = 777;
    spec.head_dim = 32;
    spec.n_ctx = 2048;
    (void)snprintf(path, sizeof path, "%s/other.gguf", rooms.dir);
    assert_ok(ibid_test_write_gguf(path, &spec));
    assert_ok(ibid_attn_model_add(rooms.attn, path, "other", &info));
    file_text(&rooms, "a.txt", "Some words to index here.");
    index_all(&rooms, "bound", (ibid_index_request){0}, &s);
    ibid_job_status_close(&s);
    ibid_str here = cstr(rooms.files);
    const ibid_index_request q = {
        .collection = cstr("bound"), .model = cstr("other"), .paths = &here, .n_paths = 1};
    assert_int_equal(ibid_idx_submit(rooms.idx, &q, &job), IBID_MISMATCH);
    printf("%s\n", ibid_err_detail());
}

static void pause_resume_cancel(void **state) {
    (void)state;
    ibid_job_status s;
    ibid_buf b;
    uint64_t n = 0;
    ibid_buf_init(&b, 1 << 24);
    prose(&b, 5, 400000);
    file_put(&rooms, "one.txt", b.data, b.len / 2);
    file_put(&rooms, "two.txt", b.data + b.len / 2, b.len - b.len / 2);
    uint64_t job = job_start(&rooms, "pause", rooms.files, (ibid_index_request){0});
    do {
        assert_ok(ibid_idx_status(rooms.idx, job, 0, 50, &s));
        n = s.encoded_tokens;
        ibid_job_status_close(&s);
    } while (n == 0);
    assert_ok(ibid_idx_pause(rooms.idx, job));
    job_wait(&rooms, job, &s);
    assert_true(str_is(s.state, "paused"));
    uint64_t done = s.encoded_tokens, total = s.tokens_total;
    ibid_job_status_close(&s);
    assert_true(done < total);
    assert_ok(ibid_idx_resume(rooms.idx, 0, &n));
    assert_int_equal(n, 1);
    job_wait(&rooms, job, &s);
    assert_true(str_is(s.state, "done"));
    assert_int_equal(s.ready, 2);
    /* What was encoded before the pause was held for the job, and is not encoded again. */
    assert_int_equal(s.encoded_tokens + done, total);
    ibid_job_status_close(&s);
    assert_int_equal(ibid_idx_resume(rooms.idx, job, &n), IBID_INVAL);

    prose(&b, 6, 400000);
    file_put(&rooms, "three.txt", b.data + b.len - 300000, 300000);
    job = job_start(&rooms, "pause", rooms.files, (ibid_index_request){0});
    assert_ok(ibid_idx_cancel(rooms.idx, job));
    job_wait(&rooms, job, &s);
    assert_true(str_is(s.state, "cancelled"));
    ibid_job_status_close(&s);
    assert_int_equal(stored(&rooms, "pause", "three.txt", NULL).state, 0);
    verify_clean(&rooms);
    ibid_buf_fini(&b);
}

static void long_files_come_in_parts(void **state) {
    (void)state;
    ibid_job_status s;
    ibid_buf b;
    ibid_buf_init(&b, 1 << 26);
    prose(&b, 9, 17000000);
    file_put(&rooms, "huge.txt", b.data, b.len);
    /* A forecast only: the tiny model would take minutes to encode it. */
    index_all(&rooms, "parts", (ibid_index_request){.dry_run = true}, &s);
    assert_true(s.forecast_tokens > 1000000);
    printf("%llu tokens, %llu bytes of KV\n", (unsigned long long)s.forecast_tokens,
           (unsigned long long)s.forecast_bytes);
    ibid_job_status_close(&s);
    ibid_buf_fini(&b);
}

static void remove_and_cache(void **state) {
    (void)state;
    ibid_job_status s;
    char id[1000], path[900];
    file_text(&rooms, "a.txt", "Some words to find here.");
    index_all(&rooms, "rm", (ibid_index_request){0}, &s);
    ibid_job_status_close(&s);
    (void)snprintf(path, sizeof path, "%s/a.txt", rooms.files);
    assert_ok(ibid_idx_remove(rooms.idx, cstr("rm"), cstr(path)));
    assert_int_equal(ibid_idx_remove(rooms.idx, cstr("rm"), cstr(path)), IBID_NOTFOUND);
    assert_int_equal(stored(&rooms, "rm", "a.txt", NULL).state, 0);

    assert_ok(ibid_idx_cache_file(rooms.idx, cstr(""), cstr(path), id, sizeof id));
    assert_string_equal(id, path);
    assert_int_equal(stored(&rooms, ".find", "a.txt", NULL).state, IBID_DOC_READY);
    uint64_t generation = stored(&rooms, ".find", "a.txt", NULL).generation;
    assert_ok(ibid_idx_cache_file(rooms.idx, cstr(""), cstr(path), id, sizeof id));
    assert_int_equal(stored(&rooms, ".find", "a.txt", NULL).generation, generation);
    file_text(&rooms, "a.txt", "Other words now.");
    assert_ok(ibid_idx_cache_file(rooms.idx, cstr(""), cstr(path), id, sizeof id));
    assert_true(stored(&rooms, ".find", "a.txt", NULL).generation > generation);
    file_text(&rooms, "none.txt", "");
    (void)snprintf(path, sizeof path, "%s/none.txt", rooms.files);
    assert_int_equal(ibid_idx_cache_file(rooms.idx, cstr(""), cstr(path), id, sizeof id),
                     IBID_EMPTY);
    assert_int_equal(ibid_idx_cache_file(rooms.idx, cstr(""), cstr(rooms.files), id, sizeof id),
                     IBID_INVAL);
}

static void cache_keeps_its_quota(void **state) {
    (void)state;
    char id[1000], path[900], name[32];
    ibid_buf b;
    ibid_buf_init(&b, 1 << 20);
    prose(&b, 77, 8000);
    /* The quota is set in main: room for about two of these. */
    for (int i = 0; i < 5; i++) {
        (void)snprintf(name, sizeof name, "q%d.txt", i);
        b.data[0] = (char)('A' + i);
        file_put(&rooms, name, b.data, b.len);
        (void)snprintf(path, sizeof path, "%s/%s", rooms.files, name);
        assert_ok(ibid_idx_cache_file(rooms.idx, cstr(""), cstr(path), id, sizeof id));
    }
    assert_int_equal(stored(&rooms, ".find", "q4.txt", NULL).state, IBID_DOC_READY);
    assert_int_equal(stored(&rooms, ".find", "q0.txt", NULL).state, 0);
    ibid_buf_fini(&b);
}

int main(void) {
    (void)signal(SIGPIPE, SIG_IGN);
    (void)setenv("IBID_FIND_CACHE_BYTES", "2000000", 1);
#define TEST(name) cmocka_unit_test_setup(name, clear_files)
    const struct CMUnitTest tests[] = {TEST(every_end_state),
                                       TEST(failure_keeps_the_old_version),
                                       TEST(edits_reuse_and_prune_removes),
                                       TEST(equal_chunks_are_stored_once),
                                       TEST(refusals),
                                       TEST(pause_resume_cancel),
                                       TEST(long_files_come_in_parts),
                                       TEST(remove_and_cache),
                                       TEST(cache_keeps_its_quota),
                                       TEST(another_model_is_refused)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
