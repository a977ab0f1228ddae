/* Documents: put, replace, delete; reference counts, uses, change history; collections. */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>

static char dir[256];
static ibid_store *s;

static int setup(void **st) {
    (void)st;
    make_dir(dir);
    s = store_open(dir, 0);
    collection_make(s, "c");
    return 0;
}

static int teardown(void **st) {
    (void)st;
    ibid_store_close(s);
    drop_dir(dir);
    return 0;
}

static uint64_t refs(uint64_t block) {
    ibid_snap *n = NULL;
    ibid_block b = {.number = 0};
    assert_ok(ibid_snap_begin(s, &n));
    ibid_err e = ibid_snap_block(n, block, &b);
    ibid_snap_end(n);
    return e ? UINT64_MAX : b.refcount;
}

static void put_and_read(void **st) {
    (void)st;
    uint64_t b[3], number, generation;
    for (uint64_t i = 0; i < 3; i++) b[i] = block_put(s, i, 20, 0);
    assert_ok(document_put(s, "c", "one", b, 3, 0, &number, &generation));
    assert_int_equal(generation, 1);
    ibid_snap *n = NULL;
    ibid_document d;
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_document(n, str("c"), str("one"), &d));
    assert_int_equal(d.number, number);
    assert_true(str_eq(d.collection, "c") && str_eq(d.id, "one") && str_eq(d.title, "a title"));
    assert_true(str_eq(d.source, "/files/a.txt") && str_eq(d.metadata, "{\"k\":\"v\"}"));
    assert_true(str_eq(d.reason, ""));
    assert_int_equal(d.state, IBID_DOC_READY);
    assert_string_equal(ibid_doc_state_name(d.state), "ready");
    assert_int_equal(d.n_chunks, 3);
    assert_int_equal(d.text_bytes, 30);
    assert_true(d.indexed_ms > 0);
    ibid_document by_number;
    assert_ok(ibid_snap_document_by_number(n, number, &by_number));
    assert_true(str_eq(by_number.id, "one"));
    ibid_buf text;
    ibid_buf_init(&text, 1000);
    assert_ok(ibid_snap_text(n, number, &text));
    assert_int_equal(text.len, 30);
    ibid_hash h = ibid_hash_bytes(text.data, text.len);
    assert_int_equal(ibid_hash_cmp(&h, &d.content), 0);
    ibid_buf_fini(&text);
    const ibid_chunk *c;
    size_t n_chunks;
    assert_ok(ibid_snap_chunks(n, number, &c, &n_chunks));
    assert_int_equal(n_chunks, 3);
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(c[i].block, b[i]);
        assert_int_equal(c[i].start, 10 * i);
        assert_true(str_eq(c[i].locator, i % 2 ? "line" : ""));
    }
    assert_err(ibid_snap_document(n, str("c"), str("two"), &d), IBID_NOTFOUND);
    assert_err(ibid_snap_document(n, str("x"), str("one"), &d), IBID_NOCOLLECTION);
    assert_err(ibid_snap_document_by_number(n, 77, &d), IBID_NOTFOUND);
    ibid_collection col;
    assert_ok(ibid_snap_collection(n, str("c"), &col));
    assert_int_equal(col.documents, 1);
    assert_int_equal(col.chunks, 3);
    assert_int_equal(col.text_bytes, 30);
    ibid_snap_end(n);
    assert_sound(s);
}

/* The same chunk in two documents, and twice in one, is stored once and counted by its uses. */
static void shared_chunks(void **st) {
    (void)st;
    uint64_t b1 = block_put(s, 1, 20, 0), b2 = block_put(s, 2, 20, 0);
    assert_ok(document_put(s, "c", "one", (uint64_t[]){b1, b2}, 2, 0, NULL, NULL));
    assert_int_equal(block_put(s, 1, 20, 0), b1);
    assert_ok(document_put(s, "c", "two", (uint64_t[]){b1, b1}, 2, 0, NULL, NULL));
    assert_int_equal(refs(b1), 3);
    assert_int_equal(refs(b2), 1);
    ibid_store_stats stats;
    stats_of(s, &stats);
    assert_int_equal(stats.blocks, 2);
    assert_int_equal(stats.chunks, 4);
    assert_sound(s);
    assert_ok(ibid_store_document_delete(s, str("c"), str("one"), NULL));
    assert_int_equal(refs(b1), 2);
    assert_int_equal(refs(b2), 0);
    ibid_collected c;
    assert_ok(ibid_store_collect(s, &c));
    assert_int_equal(c.orphans, 1);
    assert_int_equal(refs(b2), UINT64_MAX);
    assert_int_equal(refs(b1), 2);
    assert_err(ibid_store_document_delete(s, str("c"), str("one"), NULL), IBID_NOTFOUND);
    assert_ok(ibid_store_document_delete(s, str("c"), str("two"), NULL));
    assert_ok(ibid_store_collect(s, &c));
    assert_int_equal(c.orphans, 1);
    assert_sound(s);
    stats_of(s, &stats);
    assert_int_equal(stats.blocks + stats.documents + stats.chunks + stats.text_bytes, 0);
}

typedef struct seen_change {
    uint64_t generation, document, added[8], dropped[8];
    size_t n_added, n_dropped, calls;
    bool removed;
} seen_change;

static ibid_err see_change(void *arg, const ibid_change *c) {
    seen_change *v = arg;
    *v = (seen_change){c->generation, c->document,  {0},          {0},
                       c->n_added,    c->n_dropped, v->calls + 1, c->removed};
    for (size_t i = 0; i < c->n_added; i++) v->added[i] = c->added[i];
    for (size_t i = 0; i < c->n_dropped; i++) v->dropped[i] = c->dropped[i];
    return IBID_OK;
}

static ibid_err see_use(void *arg, uint64_t document, uint64_t chunk) {
    uint64_t *sum = arg;
    *sum = *sum * 100 + document * 10 + chunk;
    return IBID_OK;
}

/* A replaced document keeps its number; what it keeps is not touched, what it loses is dropped. */
static void update(void **st) {
    (void)st;
    uint64_t b[4], first, second, generation;
    for (uint64_t i = 0; i < 4; i++) b[i] = block_put(s, i, 20, 0);
    assert_ok(document_put(s, "c", "d", (uint64_t[]){b[0], b[1], b[2]}, 3, 0, &first, NULL));
    assert_ok(document_put(s, "c", "d", (uint64_t[]){b[3], b[0]}, 2, 0, &second, &generation));
    assert_int_equal(first, second);
    assert_int_equal(generation, 2);
    assert_int_equal(refs(b[0]), 1);
    assert_int_equal(refs(b[1]), 0);
    assert_int_equal(refs(b[2]), 0);
    assert_int_equal(refs(b[3]), 1);
    ibid_snap *n = NULL;
    assert_ok(ibid_snap_begin(s, &n));
    seen_change c = {.calls = 0};
    assert_ok(ibid_snap_each_change(n, 1, see_change, &c));
    assert_int_equal(c.calls, 1);
    assert_int_equal(c.generation, 2);
    assert_int_equal(c.document, first);
    assert_false(c.removed);
    assert_int_equal(c.n_added, 1);
    assert_int_equal(c.added[0], b[3]);
    assert_int_equal(c.n_dropped, 2);
    assert_int_equal(c.dropped[0], b[1]);
    assert_int_equal(c.dropped[1], b[2]);
    uint64_t uses = 0;
    assert_ok(ibid_snap_each_use(n, b[0], see_use, &uses));
    assert_int_equal(uses, first * 10 + 1);
    assert_sound(s);
    assert_ok(ibid_store_document_delete(s, str("c"), str("d"), &generation));
    assert_ok(ibid_snap_renew(n));
    assert_int_equal(ibid_snap_generation(n), 3);
    assert_ok(ibid_snap_each_change(n, 2, see_change, &c));
    assert_true(c.removed);
    assert_int_equal(c.n_dropped, 2);
    c.calls = 0;
    assert_ok(ibid_snap_each_change(n, 3, see_change, &c));
    assert_int_equal(c.calls, 0);
    assert_err(ibid_snap_each_change(n, 4, see_change, &c), IBID_NOTFOUND);
    ibid_snap_end(n);
}

/* Many chunks and much text span several rows; growing and shrinking leaves no row behind. */
static void large_documents(void **st) {
    (void)st;
    enum { N = 700 };
    uint64_t b = block_put(s, 1, 20, 0);
    uint64_t *blocks = malloc(N * sizeof *blocks);
    assert_non_null(blocks);
    for (size_t i = 0; i < N; i++) blocks[i] = b;
    static const size_t sizes[] = {700, 256, 255, 257, 1, 0, 512};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        assert_ok(document_put(s, "c", "d", blocks, sizes[i], 0, NULL, NULL));
        assert_int_equal(refs(b), sizes[i]);
        assert_sound(s);
    }
    free(blocks);
    size_t size = 3 * 1024 * 1024 + 17;
    char *text = malloc(size);
    assert_non_null(text);
    uint64_t state = 42, number = 0;
    for (size_t i = 0; i < size; i++) text[i] = (char)('a' + rnd(&state) % 26);
    ibid_chunk c = {size - 5, size, str("end"), b};
    ibid_document_put d = {.collection = str("c"),
                           .id = str("big"),
                           .state = IBID_DOC_PARTIAL,
                           .reason = str("two pages had no text"),
                           .text = {text, size},
                           .chunks = &c,
                           .n_chunks = 1};
    assert_ok(ibid_store_document_put(s, &d, &number, NULL));
    ibid_snap *n = NULL;
    ibid_buf got;
    ibid_buf_init(&got, size);
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_text(n, number, &got));
    assert_int_equal(got.len, size);
    assert_memory_equal(got.data, text, size);
    ibid_buf_fini(&got);
    ibid_buf_init(&got, size - 1);
    assert_err(ibid_snap_text(n, number, &got), IBID_TOOBIG);
    ibid_buf_fini(&got);
    ibid_snap_end(n);
    d.text.n = 1024 * 1024;
    c = (ibid_chunk){0, 5, str(""), b};
    assert_ok(ibid_store_document_put(s, &d, NULL, NULL));
    assert_sound(s);
    free(text);
}

static void bad_puts_change_nothing(void **st) {
    (void)st;
    uint64_t b = block_put(s, 1, 20, 0), number = 0;
    assert_ok(document_put(s, "c", "d", &b, 1, 0, &number, NULL));
    assert_err(document_put(s, "x", "d", &b, 1, 0, NULL, NULL), IBID_NOCOLLECTION);
    assert_err(document_put(s, "c", "", &b, 1, 0, NULL, NULL), IBID_INVAL);
    assert_err(document_put(s, "c", "d", (uint64_t[]){b, 99}, 2, 0, NULL, NULL), IBID_NOTFOUND);
    assert_err(document_put(s, "c", "d", (uint64_t[]){UINT64_MAX}, 1, 0, NULL, NULL),
               IBID_NOTFOUND);
    ibid_chunk c = {2, 9, str(""), b};
    ibid_document_put d = {.collection = str("c"),
                           .id = str("d"),
                           .state = IBID_DOC_READY,
                           .text = str("12345678"),
                           .chunks = &c,
                           .n_chunks = 1};
    assert_err(ibid_store_document_put(s, &d, NULL, NULL), IBID_INVAL);
    c = (ibid_chunk){5, 4, str(""), b};
    assert_err(ibid_store_document_put(s, &d, NULL, NULL), IBID_INVAL);
    c = (ibid_chunk){0, 4, str(""), b};
    d.state = IBID_DOC_FAILED;
    assert_err(ibid_store_document_put(s, &d, NULL, NULL), IBID_INVAL);
    d.state = (ibid_doc_state)9;
    assert_err(ibid_store_document_put(s, &d, NULL, NULL), IBID_INVAL);
    /* A block of another model does not enter the collection. */
    test_block other;
    uint64_t foreign;
    block_make(&other, 5, 20, 0);
    other.put.model = hash_of("another model");
    assert_ok(ibid_store_blocks_put(s, &other.put, 1, &foreign));
    assert_err(document_put(s, "c", "d", &foreign, 1, 0, NULL, NULL), IBID_MISMATCH);
    block_free(&other);
    ibid_snap *n = NULL;
    ibid_document got;
    assert_ok(ibid_snap_begin(s, &n));
    assert_int_equal(ibid_snap_generation(n), 1);
    assert_ok(ibid_snap_document(n, str("c"), str("d"), &got));
    assert_int_equal(got.n_chunks, 1);
    ibid_snap_end(n);
    assert_int_equal(refs(b), 1);
    assert_sound(s);
}

static ibid_err list_documents(void *arg, const ibid_document *d) {
    ibid_buf *b = arg;
    return ibid_buf_printf(b, "%.*s/%.*s ", (int)d->collection.n, d->collection.s, (int)d->id.n,
                           d->id.s);
}

static ibid_err list_collections(void *arg, const ibid_collection *c) {
    ibid_buf *b = arg;
    return ibid_buf_printf(b, "%.*s:%u ", (int)c->name.n, c->name.s, (unsigned)c->documents);
}

static void collections(void **st) {
    (void)st;
    ibid_hash m = hash_of("model m"), unknown = hash_of("unknown");
    assert_err(ibid_store_collection_create(s, str("c"), &m), IBID_EXISTS);
    assert_err(ibid_store_collection_create(s, str("new"), &unknown), IBID_NOTFOUND);
    static const char *const bad[] = {
        "", "a b", "a/b", "\xc3\xa4",
        "12345678901234567890123456789012345678901234567890123456789012345"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_err(ibid_store_collection_create(s, str(bad[i]), &m), IBID_INVAL);
    assert_err(ibid_store_collection_create(s, (ibid_str){"a\0b", 3}, &m), IBID_INVAL);
    assert_ok(ibid_store_collection_create(s, str("Other.2_x-y"), &m));
    uint64_t b = block_put(s, 1, 20, 0), first = 0;
    static const char *const ids[] = {"z", "y", "x"};
    for (size_t i = 0; i < 3; i++)
        assert_ok(document_put(s, "c", ids[i], &b, 1, 0, i ? NULL : &first, NULL));
    assert_ok(document_put(s, "Other.2_x-y", "z", &b, 1, 0, NULL, NULL));
    ibid_snap *n = NULL;
    ibid_buf out;
    ibid_buf_init(&out, 10000);
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_each_document(n, str("c"), 0, list_documents, &out));
    assert_string_equal(out.data, "c/z c/y c/x ");
    ibid_buf_clear(&out);
    assert_ok(ibid_snap_each_document(n, str("c"), first, list_documents, &out));
    assert_string_equal(out.data, "c/y c/x ");
    ibid_buf_clear(&out);
    assert_ok(ibid_snap_each_collection(n, list_collections, &out));
    assert_string_equal(out.data, "Other.2_x-y:1 c:3 ");
    ibid_collection col, by_number;
    assert_ok(ibid_snap_collection(n, str("c"), &col));
    assert_ok(ibid_snap_collection_by_number(n, col.number, &by_number));
    assert_true(str_eq(by_number.name, "c"));
    assert_err(ibid_snap_collection_by_number(n, 99, &by_number), IBID_NOCOLLECTION);
    assert_int_equal(refs(b), 4);
    assert_ok(ibid_store_collection_drop(s, str("c")));
    assert_err(ibid_store_collection_drop(s, str("c")), IBID_NOCOLLECTION);
    assert_int_equal(refs(b), 1);
    assert_ok(ibid_snap_renew(n));
    assert_int_equal(ibid_snap_generation(n), 7);
    assert_err(ibid_snap_collection(n, str("c"), &col), IBID_NOCOLLECTION);
    assert_ok(ibid_snap_document(n, str("Other.2_x-y"), str("z"), &(ibid_document){.number = 0}));
    ibid_snap_end(n);
    assert_sound(s);
    /* The same name again is another collection. */
    assert_ok(ibid_store_collection_create(s, str("c"), &m));
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_collection(n, str("c"), &by_number));
    assert_true(by_number.number > 1);
    assert_int_equal(by_number.documents, 0);
    ibid_snap_end(n);
    ibid_buf_fini(&out);
}

/* A committed document releases the job's holds of its blocks, and of no others. */
static void documents_release_holds(void **st) {
    (void)st;
    uint64_t job = job_make(s), a = block_put(s, 1, 20, job), b = block_put(s, 2, 20, job);
    assert_ok(document_put(s, "c", "d", &a, 1, job, NULL, NULL));
    assert_ok(ibid_store_document_delete(s, str("c"), str("d"), NULL));
    ibid_collected c;
    assert_ok(ibid_store_collect(s, &c));
    assert_int_equal(c.orphans, 1);
    assert_int_equal(refs(a), UINT64_MAX);
    assert_int_equal(refs(b), 0);
    assert_sound(s);
}

int main(void) {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(put_and_read),
        T(shared_chunks),
        T(update),
        T(large_documents),
        T(collections),
        T(bad_puts_change_nothing),
        T(documents_release_holds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
