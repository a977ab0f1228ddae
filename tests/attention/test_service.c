/* The attention room over a real store, hosted in one process: a small random model, and the
 * default one where it is there. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "attention/attention.h"
#include "attention/attention_room.h"
#include "attention/kernels/kernels.h"
#include "attention/plan/calibration.h"
#include "kvstore/kvstore_client.h"
#include "kvstore/kvstore_room.h"
#include "tests/support/gguf_write.h"
#include "tests/support/test_model.h"

#include <math.h>
#include <pthread.h>

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
    ibid_model_info model;
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

static void make_data(fixture *f) {
    memset(f, 0, sizeof *f);
    (void)snprintf(f->data, sizeof f->data, "/tmp/ibid-test-XXXXXX");
    assert_non_null(mkdtemp(f->data));
}

static void remove_data(fixture *f) {
    char command[400];
    (void)snprintf(command, sizeof command, "rm -rf '%s'", f->data);
    assert_int_equal(system(command), 0);
}

static int set_up(void **state) {
    fixture *f = calloc(1, sizeof *f);
    ibid_test_gguf spec = ibid_test_gguf_small();
    spec.n_ctx = 2048;
    spec.seed = 7;
    make_data(f);
    (void)snprintf(f->gguf, sizeof f->gguf, "%s/small.gguf", f->data);
    assert_ok(ibid_test_write_gguf(f->gguf, &spec));
    start(f);
    assert_ok(ibid_attn_model_add(f->at, f->gguf, "small", &f->model));
    *state = f;
    return 0;
}

static int tear_down(void **state) {
    fixture *f = *state;
    stop(f);
    remove_data(f);
    free(f);
    return 0;
}

/* ---- Helpers ---- */

static ibid_str str(const char *s) {
    return (ibid_str){s, strlen(s)};
}

typedef struct doc {
    uint64_t number, blocks[8];
    size_t n;
} doc;

/* A document of one chunk per text: the texts joined by line feeds. */
static doc put_document(fixture *f, const char *id, const char *title, const char *const *texts,
                        size_t n, ibid_encode_result *r) {
    doc d = {.n = n};
    ibid_encode_block b[8];
    ibid_tokens t[8], head;
    ibid_chunk chunks[8];
    char *all = calloc(1, 65536);
    uint64_t generation, job = 0;
    (void)ibid_kvc_collection_create(f->kv, str("c"), &f->model.fingerprint);
    ibid_job j = {.kind = str("index"), .state = str("running")};
    assert_ok(ibid_kvc_job_put(f->kv, &j, &job));
    assert_ok(ibid_attn_tokenize(f->at, &f->model.fingerprint, str(title), &head));
    for (size_t i = 0; i < n; i++) {
        assert_ok(ibid_attn_tokenize(f->at, &f->model.fingerprint, str(texts[i]), &t[i]));
        int32_t *ids = calloc(head.n + t[i].n, sizeof *ids);
        memcpy(ids, head.ids, head.n * sizeof *ids);
        memcpy(ids + head.n, t[i].ids, t[i].n * sizeof *ids);
        b[i] = (ibid_encode_block){head.n, head.n + t[i].n, ids};
        chunks[i] = (ibid_chunk){.start = strlen(all), .locator = str("")};
        strcat(all, texts[i]);
        chunks[i].end = strlen(all);
        strcat(all, "\n");
    }
    assert_ok(ibid_attn_encode(f->at, &f->model.fingerprint, job, b, n, d.blocks, r));
    for (size_t i = 0; i < n; i++) chunks[i].block = d.blocks[i];
    ibid_document_put p = {.collection = str("c"),
                           .id = str(id),
                           .title = str(title),
                           .state = IBID_DOC_READY,
                           .text = str(all),
                           .chunks = chunks,
                           .n_chunks = n,
                           .job = job};
    assert_ok(ibid_kvc_document_put(f->kv, &p, &d.number, &generation));
    j.id = job;
    j.state = str("done");
    assert_ok(ibid_kvc_job_put(f->kv, &j, &job));
    for (size_t i = 0; i < n; i++) {
        free((void *)(uintptr_t)b[i].tokens);
        ibid_free(t[i].ids);
    }
    ibid_free(head.ids);
    free(all);
    return d;
}

typedef struct result {
    char streamed[8192], text[8192], quote[4][512];
    uint64_t start[4], end[4], document[4];
    size_t n_citations, n_tokens, stop_after;
    ibid_answer_event done;
    char finish[16];
} result;

static bool on_event(void *arg, const ibid_answer_event *ev) {
    result *r = arg;
    if (ev->kind == IBID_ANSWER_TOKEN) {
        size_t at = strlen(r->streamed);
        (void)snprintf(r->streamed + at, sizeof r->streamed - at, "%.*s", (int)ev->text.n,
                       ev->text.s);
        if (++r->n_tokens == r->stop_after) return false;
    }
    if (ev->kind == IBID_ANSWER_DONE) {
        (void)snprintf(r->text, sizeof r->text, "%.*s", (int)ev->text.n, ev->text.s);
        (void)snprintf(r->finish, sizeof r->finish, "%s", ev->finish);
        r->done = *ev;
        r->n_citations = ev->n_citations < 4 ? ev->n_citations : 4;
        for (size_t i = 0; i < r->n_citations; i++) {
            const ibid_citation *c = &ev->citations[i];
            (void)snprintf(r->quote[i], sizeof r->quote[i], "%.*s", (int)c->quote.n, c->quote.s);
            r->start[i] = c->start;
            r->end[i] = c->end;
            r->document[i] = c->document;
        }
    }
    return true;
}

/* Of what is asked from now on. */
static ibid_answer_mode mode;
static double attention_share;
static bool attention_recall;

static ibid_err ask(fixture *f, const char *question, const doc *d, size_t n, uint32_t max_tokens,
                    double recompute, result *r) {
    ibid_answer_block b[8];
    for (size_t i = 0; i < n; i++)
        b[i] = (ibid_answer_block){d->number, i, d->blocks[i], 1.0 - 0.1 * (double)i};
    ibid_answer_request q = {.model = f->model.fingerprint,
                             .question = str(question),
                             .blocks = b,
                             .n_blocks = n,
                             .recompute = recompute,
                             .max_tokens = max_tokens,
                             .mode = mode,
                             .attention_share = attention_share,
                             .attention_recall = attention_recall};
    size_t stop_after = r->stop_after;
    memset(r, 0, sizeof *r);
    r->stop_after = stop_after;
    return ibid_attn_answer(f->at, &q, on_event, r);
}

static const char *const texts[] = {"The red barn stands on the hill near the old mill.",
                                    "The mill was built in 1846 by two brothers from the coast.",
                                    "Their sister kept the books and sold the flour."};

/* ---- Models ---- */

static void models(void **state) {
    fixture *f = *state;
    ibid_model_info m;
    char hex[65];
    assert_string_equal(f->model.name, "small");
    assert_string_equal(f->model.template_name, "chatml");
    assert_true(f->model.calibrated);
    assert_ok(ibid_attn_model_info(f->at, "", &m));
    assert_memory_equal(&m.fingerprint, &f->model.fingerprint, sizeof m.fingerprint);
    ibid_hash_hex(&m.fingerprint, hex);
    assert_ok(ibid_attn_model_info(f->at, hex, &m));
    assert_ok(ibid_attn_model_info(f->at, "small", &m));
    assert_int_equal(ibid_attn_model_info(f->at, "large", &m), IBID_NOTFOUND);
    assert_non_null(strstr(ibid_err_detail(), "small"));
    assert_int_equal(ibid_attn_model_add(f->at, "/nowhere/x.gguf", "", &m), IBID_NOTFOUND);
    assert_int_equal(ibid_attn_model_add(f->at, "x.gguf", "", &m), IBID_INVAL);
    assert_ok(ibid_attn_model_add(f->at, f->gguf, "", &m));
    assert_string_equal(m.name, "small");
}

/* A second model does not become the default, and cannot take the first one's name. */
static void second_model(void **state) {
    fixture *f = *state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_model_info m;
    char path[400];
    spec.n_ctx = 2048;
    spec.seed = 8;
    (void)snprintf(path, sizeof path, "%s/other.gguf", f->data);
    assert_ok(ibid_test_write_gguf(path, &spec));
    assert_int_equal(ibid_attn_model_add(f->at, path, "small", &m), IBID_EXISTS);
    assert_ok(ibid_attn_model_add(f->at, path, "other", &m));
    assert_memory_not_equal(&m.fingerprint, &f->model.fingerprint, sizeof m.fingerprint);
    stop(f);
    start(f);
    assert_ok(ibid_attn_model_info(f->at, "", &m));
    assert_string_equal(m.name, "small");
}

static void another_file(void **state) {
    fixture *f = *state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_model_info m;
    spec.n_ctx = 2048;
    spec.seed = 9;
    stop(f);
    assert_ok(ibid_test_write_gguf(f->gguf, &spec));
    start(f);
    assert_int_equal(ibid_attn_model_info(f->at, "small", &m), IBID_MISMATCH);
    assert_int_equal(unlink(f->gguf), 0);
    assert_int_equal(ibid_attn_model_info(f->at, "small", &m), IBID_NOTFOUND);
}

/* ---- Tokens, blocks, keys ---- */

static void tokenize(void **state) {
    fixture *f = *state;
    const char *s = "the thin <|im_end|> caf\xC3\xA9 \xFF";
    ibid_tokens t;
    assert_ok(ibid_attn_tokenize(f->at, &f->model.fingerprint, str(s), &t));
    assert_true(t.n > 5);
    assert_int_equal(t.ends[t.n - 1], strlen(s));
    for (size_t i = 0; i < t.n; i++) {
        assert_true(t.ids[i] > 2); /* control tokens are text here */
        if (i) assert_true(t.ends[i] > t.ends[i - 1]);
    }
    ibid_free(t.ids);
    assert_ok(ibid_attn_tokenize(f->at, &f->model.fingerprint, str(""), &t));
    assert_int_equal(t.n, 0);
    ibid_free(t.ids);
    ibid_hash wrong = {{1}};
    assert_int_equal(ibid_attn_tokenize(f->at, &wrong, str("x"), &t), IBID_NOTFOUND);
}

static void encode_twice(void **state) {
    fixture *f = *state;
    ibid_encode_result r;
    doc a = put_document(f, "a", "Title\n", texts, 3, &r);
    assert_int_equal(r.encoded_blocks, 3);
    assert_int_equal(r.reused_tokens, 0);
    uint64_t tokens = r.encoded_tokens;
    doc b = put_document(f, "b", "Title\n", texts, 3, &r);
    assert_int_equal(r.encoded_blocks, 0);
    assert_int_equal(r.reused_tokens, tokens);
    assert_memory_equal(a.blocks, b.blocks, sizeof a.blocks[0] * 3);
    const char *twice[] = {texts[0], "Something else.", "Something else."};
    doc c = put_document(f, "c", "Title\n", twice, 3, &r);
    assert_int_equal(r.encoded_blocks, 1);
    assert_int_equal(c.blocks[0], a.blocks[0]);
    assert_int_equal(c.blocks[1], c.blocks[2]);
}

static void bad_blocks(void **state) {
    fixture *f = *state;
    int32_t ids[IBID_BLOCK_TOKENS_MAX + 1] = {5, 1000000};
    uint64_t number;
    const ibid_hash *m = &f->model.fingerprint;
    ibid_encode_block b = {0, 2, ids};
    assert_int_equal(ibid_attn_encode(f->at, m, 0, &b, 1, &number, NULL), IBID_INVAL);
    b = (ibid_encode_block){0, 0, ids};
    assert_int_equal(ibid_attn_encode(f->at, m, 0, &b, 1, &number, NULL), IBID_INVAL);
    b = (ibid_encode_block){3, 1, ids};
    assert_int_equal(ibid_attn_encode(f->at, m, 0, &b, 1, &number, NULL), IBID_INVAL);
    b = (ibid_encode_block){0, IBID_BLOCK_TOKENS_MAX + 1, ids};
    assert_int_not_equal(ibid_attn_encode(f->at, m, 0, &b, 1, &number, NULL), IBID_OK);
    assert_ok(ibid_attn_encode(f->at, m, 0, NULL, 0, NULL, NULL));
}

static void question_keys(void **state) {
    fixture *f = *state;
    ibid_question_keys k;
    assert_ok(ibid_attn_question_keys(f->at, &f->model.fingerprint, str("Who built it?"), &k));
    assert_true(k.n > 3);
    assert_int_equal(k.dim, 0); /* heads of 16 give no token keys */
    ibid_free(k.ids);
    char *longest = malloc(4001);
    memset(longest, 'x', 4000);
    longest[4000] = '\0';
    ibid_err e = ibid_attn_question_keys(f->at, &f->model.fingerprint, str(longest), &k);
    free(longest);
    assert_int_equal(e, IBID_CONTEXT);
}

/* ---- Answers ---- */

static void answer(void **state) {
    fixture *f = *state;
    static result r, again;
    ibid_encode_result enc;
    doc d = put_document(f, "a", "Title\n", texts, 3, &enc);
    assert_ok(ask(f, "Who built the mill?", &d, 3, 24, -1, &r));
    assert_string_equal(r.streamed, r.text);
    assert_int_equal(r.done.encoded_tokens, 0);
    assert_true(r.done.completion_tokens <= 24);
    assert_int_equal(r.done.reused_tokens + r.done.recomputed_tokens, enc.encoded_tokens);
    assert_true(r.done.prompt_tokens > enc.encoded_tokens);
    assert_true(r.done.kv_bytes_read > 0);
    assert_true(r.done.first_token_ms > 0 && r.done.total_ms >= r.done.first_token_ms);
    assert_ok(ask(f, "Who built the mill?", &d, 3, 24, -1, &again));
    assert_string_equal(again.text, r.text);
    assert_ok(ask(f, "Who built the mill?", &d, 3, 24, 1, &again));
    assert_int_equal(again.done.recomputed_tokens, enc.encoded_tokens);
    assert_int_equal(again.done.reused_tokens, 0);
    assert_ok(ask(f, "Who built the mill?", &d, 0, 8, -1, &again));
    assert_int_equal(again.n_citations, 0);
    stop(f);
    start(f);
    assert_ok(ask(f, "Who built the mill?", &d, 3, 24, -1, &again));
    assert_string_equal(again.text, r.text);
    assert_int_equal(again.done.encoded_tokens, 0);
}

/* The answer's tokens read a share of the context, and say which; a share of all is full attention.
 */
static void selecting(void **state) {
    static const double wrong[] = {-0.1, 1.5, NAN, INFINITY};
    fixture *f = *state;
    static char text[6][256];
    static result full, r;
    const char *long_texts[6];
    ibid_encode_result enc;
    for (size_t i = 0; i < 6; i++) {
        for (size_t k = 0; k < 230; k++) text[i][k] = (char)('a' + (i * 31 + k * k) % 26);
        long_texts[i] = text[i];
    }
    doc d = put_document(f, "long", "Title\n", long_texts, 6, &enc);
    assert_true(enc.encoded_tokens > 1000);
    assert_ok(ask(f, "Who built the mill?", &d, 6, 24, 0, &full));
    assert_true(full.done.attention_share == 1 && full.done.attention_recall < 0);
    assert_true(full.done.completion_tokens > 1);
    attention_share = 0.3;
    attention_recall = true;
    for (int i = 0; i < 2; i++) {
        assert_ok(ask(f, "Who built the mill?", &d, 6, 24, 0.3 * i, &r));
        assert_string_equal(r.streamed, r.text);
        assert_true(r.done.attention_share >= 0.3 && r.done.attention_share < 0.4);
        assert_true(r.done.attention_recall > 0.2 && r.done.attention_recall < 1);
    }
    attention_share = 1;
    assert_ok(ask(f, "Who built the mill?", &d, 6, 24, 0, &r));
    assert_string_equal(r.text, full.text);
    assert_true(r.done.attention_share == 1 && r.done.attention_recall < 0);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        attention_share = wrong[i];
        assert_int_equal(ask(f, "Who?", &d, 6, 8, 0, &r), IBID_INVAL);
    }
    attention_share = 0;
    attention_recall = false;
}

/* Words of the blocks, as they stand there, quoted with their sentence. */
static void extract(void **state) {
    fixture *f = *state;
    static result r, again;
    ibid_encode_result enc;
    doc d = put_document(f, "a", "Title\n", texts, 3, &enc);
    mode = IBID_ANSWER_EXTRACT;
    for (int share = 0; share < 2; share++) {
        assert_ok(ask(f, "When was the mill built?", &d, 3, 24, share * 0.5, &r));
        assert_string_equal(r.done.mode, "extract");
        assert_string_equal(r.finish, "stop");
        assert_string_equal(r.streamed, r.text);
        assert_true(r.text[0] && r.done.evidence > 0 && r.done.evidence <= 1);
        assert_int_equal(r.n_citations, 1);
        assert_non_null(strstr(r.quote[0], r.text));
        assert_true(r.done.completion_tokens > 0 && r.done.completion_tokens <= 24);
        assert_ok(ask(f, "When was the mill built?", &d, 3, 24, share * 0.5, &again));
        assert_string_equal(again.text, r.text);
        assert_string_equal(again.quote[0], r.quote[0]);
    }
    assert_ok(ask(f, "When?", &d, 0, 24, 0, &r));
    assert_string_equal(r.text, "");
    assert_int_equal(r.n_citations, 0);
    assert_int_equal(ask(f, "", &d, 1, 24, 0, &r), IBID_INVAL);
    r.stop_after = 1;
    assert_int_equal(ask(f, "When was the mill built?", &d, 3, 24, 0, &r), IBID_CANCELLED);
    r.stop_after = 0;
    mode = IBID_ANSWER_AUTO;
    assert_ok(ask(f, "When was the mill built?", &d, 3, 8, 0, &r));
    assert_string_equal(r.done.mode, "extract");
    assert_ok(ask(f, "Why was the mill built?", &d, 3, 8, 0, &r));
    assert_string_equal(r.done.mode, "generate");
    mode = IBID_ANSWER_GENERATE;
}

static void context(void **state) {
    fixture *f = *state;
    static result r;
    ibid_encode_result enc;
    doc d = put_document(f, "a", "Title\n", texts, 1, &enc);
    assert_int_equal(ask(f, "Who?", &d, 1, 2048, -1, &r), IBID_CONTEXT);
    assert_non_null(strstr(ibid_err_detail(), "2048"));
    assert_int_equal(ask(f, "", &d, 1, 8, -1, &r), IBID_INVAL);
}

static void gone(void **state) {
    fixture *f = *state;
    static result r;
    ibid_encode_result enc;
    uint64_t generation;
    doc d = put_document(f, "a", "Title\n", texts, 2, &enc), other = d;
    other.blocks[0] = 4711;
    assert_int_equal(ask(f, "Who?", &other, 1, 8, -1, &r), IBID_NOTFOUND);
    assert_ok(ibid_kvc_document_delete(f->kv, str("c"), str("a"), &generation));
    assert_int_equal(ask(f, "Who?", &d, 2, 8, -1, &r), IBID_NOTFOUND);
}

static void wrong_model(void **state) {
    fixture *f = *state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    static result r;
    ibid_encode_result enc;
    char path[400];
    doc d = put_document(f, "a", "Title\n", texts, 1, &enc);
    spec.n_ctx = 2048;
    spec.seed = 8;
    (void)snprintf(path, sizeof path, "%s/other.gguf", f->data);
    assert_ok(ibid_test_write_gguf(path, &spec));
    assert_ok(ibid_attn_model_add(f->at, path, "other", &f->model));
    assert_int_equal(ask(f, "Who?", &d, 1, 8, -1, &r), IBID_MISMATCH);
}

static void cancel(void **state) {
    fixture *f = *state;
    static result r;
    ibid_encode_result enc;
    doc d = put_document(f, "a", "Title\n", texts, 3, &enc);
    r.stop_after = 1;
    assert_int_equal(ask(f, "Who built the mill?", &d, 3, 1024, 0, &r), IBID_CANCELLED);
    assert_int_equal(r.n_tokens, 1);
    r.stop_after = 0;
    assert_ok(ask(f, "Who built the mill?", &d, 3, 8, 0, &r));
}

/* KV beyond the budget goes, the answer stays the same, and says what it encoded again. */
static void evicted(void **state) {
    fixture *f = *state;
    static result r, again;
    ibid_encode_result enc;
    ibid_collected c;
    doc d = put_document(f, "a", "Title\n", texts, 3, &enc);
    assert_ok(ask(f, "Who built the mill?", &d, 3, 16, 0, &r));
    assert_ok(ibid_kvc_set_budget(f->kv, 1));
    do assert_ok(ibid_kvc_collect(f->kv, &c));
    while (c.more);
    assert_ok(ask(f, "Who built the mill?", &d, 3, 16, 0, &again));
    assert_string_equal(again.text, r.text);
    assert_int_equal(again.done.encoded_tokens, enc.encoded_tokens);
    assert_ok(ibid_kvc_set_budget(f->kv, 0));
    assert_ok(ask(f, "Who built the mill?", &d, 3, 16, 0, &again));
    assert_ok(ask(f, "Who built the mill?", &d, 3, 16, 0, &again));
    assert_string_equal(again.text, r.text);
    assert_int_equal(again.done.encoded_tokens, 0);
}

typedef struct asker {
    fixture *f;
    doc d;
    result r;
    ibid_err e;
} asker;

static void *ask_thread(void *arg) {
    asker *a = arg;
    a->e = ask(a->f, "Who built the mill?", &a->d, 3, 32, 0, &a->r);
    return NULL;
}

static void together(void **state) {
    fixture *f = *state;
    ibid_encode_result enc;
    pthread_t t[4];
    asker *a = calloc(4, sizeof *a);
    doc d = put_document(f, "a", "Title\n", texts, 3, &enc);
    for (size_t i = 0; i < 4; i++) {
        a[i] = (asker){.f = f, .d = d};
        assert_int_equal(pthread_create(&t[i], NULL, ask_thread, &a[i]), 0);
    }
    const char *more[] = {"While they ask, another text is read.", "And one more."};
    (void)put_document(f, "b", "Title\n", more, 2, &enc);
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(pthread_join(t[i], NULL), 0);
        assert_int_equal(a[i].e, IBID_OK);
        assert_string_equal(a[i].r.text, a[0].r.text);
    }
    free(a);
}

static ibid_hash keys_of(fixture *f, uint64_t block, size_t *dim) {
    ibid_snap *s = NULL;
    ibid_keys k;
    assert_ok(ibid_snap_begin(f->store, &s));
    assert_ok(ibid_snap_keys(s, block, &k));
    ibid_hash id = k.calibration;
    *dim = k.dim;
    ibid_snap_end(s);
    return id;
}

/* Stores a calibration of two raw heads, of layers 3 and 8, as the model's, and starts anew with
 * it. */
static ibid_hash plant_calibration(fixture *f) {
    static const ibid_head heads[] = {{8, 2}, {3, 0}};
    ibid_calibration c = {.head_dim = 64, .n_heads = 1, .keys_weight = 0.5f, .heads = {{9, 0}}};
    ibid_model_record rec;
    ibid_snap *s = NULL;
    ibid_buf b;
    ibid_buf_init(&b, 1 << 20);
    assert_ok(ibid_keymap_open_raw(heads, 2, 64, &c.map));
    for (size_t i = 0; i < ibid_keymap_input(c.map); i++) c.map->mean[i] = (float)(i % 7) / 8;
    assert_ok(ibid_calibration_encode(&c, &b));
    assert_ok(ibid_snap_begin(f->store, &s));
    assert_ok(ibid_snap_model(s, &f->model.fingerprint, &rec));
    rec.calibration = (ibid_str){b.data, b.len};
    rec.calibration_id = c.id;
    assert_ok(ibid_kvc_model_put(f->kv, &rec));
    ibid_snap_end(s);
    stop(f);
    start(f);
    ibid_hash id = c.id;
    ibid_calibration_fini(&c);
    ibid_buf_fini(&b);
    return id;
}

/* Another calibration, of other layers; the keys of every block follow, of evicted ones too. */
static void recalibrate(fixture *f) {
    ibid_encode_result enc;
    ibid_question_keys q;
    ibid_collected c;
    ibid_buf report, sample;
    size_t dim;
    ibid_hash planted = plant_calibration(f);
    doc d = put_document(f, "a", "Title\n", texts, 2, &enc);
    ibid_buf_init(&report, 1 << 20);
    ibid_buf_init(&sample, 1 << 20);
    assert_ok(ibid_attn_question_keys(f->at, &f->model.fingerprint, str("Who?"), &q));
    assert_int_equal(q.dim, 128);
    ibid_hash first = q.calibration, id = keys_of(f, d.blocks[0], &dim);
    assert_memory_equal(&first, &planted, sizeof first);
    assert_memory_equal(&first, &id, sizeof id);
    assert_int_equal(dim, q.dim);
    ibid_free(q.ids);
    assert_ok(ibid_kvc_set_budget(f->kv, 1));
    do assert_ok(ibid_kvc_collect(f->kv, &c));
    while (c.more);
    const char *more[] = {"Another text, kept.", "And yet another."};
    assert_ok(ibid_kvc_set_budget(f->kv, 0));
    doc kept = put_document(f, "b", "Title\n", more, 2, &enc);
    assert_int_equal(ibid_attn_calibrate(f->at, "", str("Too short."), &report), IBID_INVAL);
    for (int i = 0; i < 40; i++)
        assert_ok(
            ibid_buf_printf(&sample,
                            "House number %d has %d rooms and a garden with %d old trees. Its "
                            "owner paid %d crowns for it and has lived there since %d.\n\n",
                            i * 7, i * 3 + 1, i * 5 + 2, i * 131 + 77, 1900 + i));
    assert_ok(ibid_attn_calibrate(f->at, "", (ibid_str){sample.data, sample.len}, &report));
    assert_non_null(strstr(report.data, "token keys derived for 4 blocks"));
    assert_ok(ibid_attn_question_keys(f->at, &f->model.fingerprint, str("Who?"), &q));
    assert_memory_not_equal(&first, &q.calibration, sizeof first);
    uint64_t blocks[] = {d.blocks[0], d.blocks[1], kept.blocks[0], kept.blocks[1]};
    for (size_t i = 0; i < 4; i++) {
        id = keys_of(f, blocks[i], &dim);
        assert_memory_equal(&id, &q.calibration, sizeof id);
        assert_int_equal(dim, q.dim);
    }
    ibid_free(q.ids);
    /* The model added again: what the program knows better is used, what it has made stays. */
    first = q.calibration;
    assert_ok(ibid_attn_model_add(f->at, ibid_test_model_path(), "", &f->model));
    assert_ok(ibid_attn_question_keys(f->at, &f->model.fingerprint, str("Who?"), &q));
    assert_memory_equal(&first, &q.calibration, sizeof first);
    ibid_free(q.ids);
    ibid_buf_fini(&report);
    ibid_buf_fini(&sample);
}

/* A model of random weights has no head that finds text: it is said, and questions have no keys, so
 * that search goes by words. */
static void no_retrieval_head(void **state) {
    fixture *f = *state;
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_model_info m;
    ibid_question_keys k;
    ibid_buf report;
    ibid_hash none = {{0}};
    ibid_encode_result enc;
    char path[300];
    ibid_buf_init(&report, 1 << 20);
    spec.n_ctx = 2048;
    spec.seed = 3;
    spec.n_layers = 3;
    spec.n_embd = 128; /* heads of 32 */
    (void)snprintf(path, sizeof path, "%s/random.gguf", f->data);
    assert_ok(ibid_test_write_gguf(path, &spec));
    assert_ok(ibid_attn_model_add(f->at, path, "random", &m));
    assert_int_equal(m.head_dim, 32);
    assert_int_equal(m.key_dim, 0);
    assert_true(m.calibrated);
    assert_ok(ibid_attn_question_keys(f->at, &m.fingerprint, str("Who built it?"), &k));
    assert_true(k.n > 0);
    assert_int_equal(k.dim, 0);
    assert_memory_equal(&k.calibration, &none, sizeof none);
    ibid_free(k.ids);
    assert_ok(ibid_attn_calibrate(f->at, "random", (ibid_str){NULL, 0}, &report));
    print_message("%s", report.data);
    assert_non_null(strstr(report.data, "search will be by words only"));
    f->model = m;
    (void)put_document(f, "a", "Title\n", texts, 2, &enc);
    assert_int_equal(enc.encoded_blocks, 2);
    /* There is nothing to train either. */
    ibid_calibrate_request q = {.model = "random"};
    ibid_buf text;
    ibid_buf_init(&text, 1 << 20);
    for (int i = 0; i < 700; i++)
        assert_ok(ibid_buf_printf(&text,
                                  "In year %d the town of number %d built %d houses by its river. "
                                  "They were sold to %d families for %d crowns each.\n\n",
                                  1200 + i, i * 31 % 997, i * 7 % 93, i % 19, i * 13));
    q.train = (ibid_str){text.data, text.len};
    assert_int_equal(ibid_attn_calibrate_as(f->at, &q, &report), IBID_INVAL);
    q.pairs = true;
    ibid_buf_clear(&report);
    assert_ok(ibid_attn_calibrate_as(f->at, &q, &report));
    assert_memory_equal(report.data, "{\"chunk\": 0, \"text\": \"In year 1200", 34);
    ibid_buf_fini(&text);
    ibid_buf_fini(&report);
}

static void status(void **state) {
    fixture *f = *state;
    ibid_reply r = {0};
    assert_ok(ibid_attn_status(f->at, &r));
    assert_int_equal(ibid_val_count(ibid_val_get(r.body, "models")), 1);
    ibid_reply_close(&r);
}

/* ---- The default model ---- */

static const char *const facts[] = {
    "The lighthouse keeper of Skerry Rock was named Halvard Brekke. He lived there for twenty "
    "years "
    "with a goat. In winter the boat came only once a month.",
    "The ferry to the mainland costs four crowns. Children under six travel free.",
    "The island's only school closed in 1962. Its bell now hangs in the church."};

static void real_model(void **state) {
    const char *path = ibid_test_model_path();
    fixture f;
    static result r, full;
    ibid_encode_result enc;
    ibid_question_keys k;
    (void)state;
    if (!path) skip();
    make_data(&f);
    start(&f);
    assert_ok(ibid_attn_model_add(f.at, path, "", &f.model));
    assert_true(f.model.calibrated);
    assert_ok(ibid_attn_question_keys(f.at, &f.model.fingerprint, str("Who kept the light?"), &k));
    assert_true(k.dim >= 64);
    assert_int_equal(f.model.key_dim, k.dim);
    ibid_free(k.ids);
    doc d = put_document(&f, "skerry", "Skerry Rock\n", facts, 3, &enc);
    assert_ok(ask(&f, "What was the name of the lighthouse keeper?", &d, 1, 0, -1, &r));
    print_message("answer: %s\nquote: %s\n", r.text, r.quote[0]);
    assert_non_null(strstr(r.text, "Halvard Brekke"));
    assert_true(r.n_citations >= 1);
    assert_non_null(strstr(r.quote[0], "Halvard Brekke"));
    assert_int_equal(r.document[0], d.number);
    assert_int_equal(r.done.encoded_tokens, 0);
    for (size_t i = 0; i < r.n_citations; i++)
        assert_memory_equal(r.quote[i], facts[0] + r.start[i], r.end[i] - r.start[i]);
    assert_ok(ask(&f, "What was the name of the lighthouse keeper?", &d, 1, 0, 1, &full));
    print_message("recomputed: %s\n", full.text);
    assert_ok(ask(&f, "What was the name of the lighthouse keeper?", &d, 3, 0, -1, &full));
    print_message("three blocks: %s\n", full.text);
    mode = IBID_ANSWER_AUTO;
    assert_ok(ask(&f, "What was the name of the lighthouse keeper?", &d, 1, 0, -1, &r));
    mode = IBID_ANSWER_GENERATE;
    assert_string_equal(r.done.mode, "extract");
    assert_string_equal(r.text, "Halvard Brekke");
    assert_int_equal(r.n_citations, 1);
    assert_memory_equal(r.quote[0], facts[0] + r.start[0], r.end[0] - r.start[0]);
    assert_non_null(strstr(r.quote[0], "Halvard Brekke"));
    recalibrate(&f);
    stop(&f);
    remove_data(&f);
}

/* The kernels that a running room says it has. */
static void check_kernels(fixture *f, const char *want) {
    ibid_reply r = {0};
    const char *got = NULL;
    size_t n = 0;
    assert_ok(ibid_attn_status(f->at, &r));
    assert_true(ibid_val_str(ibid_val_get(r.body, "kernels"), &got, &n));
    print_message("%.*s kernels\n", (int)n, got);
    assert_int_equal(n, strlen(want));
    assert_memory_equal(got, want, n);
    ibid_reply_close(&r);
}

/* A whole answer with the backend that IBID_KERNELS names. */
static void one_answer(void **state) {
    const char *path = ibid_test_model_path(), *forced = getenv("IBID_KERNELS");
    fixture f;
    static result r;
    ibid_encode_result enc;
    (void)state;
    if (!path) skip();
    assert_non_null(forced);
    make_data(&f);
    start(&f);
    check_kernels(&f, forced);
    assert_ok(ibid_attn_model_add(f.at, path, "", &f.model));
    doc d = put_document(&f, "skerry", "Skerry Rock\n", facts, 1, &enc);
    assert_ok(ask(&f, "What was the name of the lighthouse keeper?", &d, 1, 24, -1, &r));
    print_message("answer: %s\n", r.text);
    assert_non_null(strstr(r.text, "Halvard Brekke"));
    assert_true(r.n_citations >= 1);
    assert_non_null(strstr(r.quote[0], "Halvard Brekke"));
    stop(&f);
    remove_data(&f);
}

/* For the tests with forced backends: one answer only. */
static int answer_once(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(one_answer)};
    const ibid_kernels *k = NULL;
    if (ibid_kernels_get(NULL, &k) == IBID_NOTSUP) {
        (void)fprintf(stderr, "%s\n", ibid_err_detail());
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL) ? 1 : ibid_test_model_exit();
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "--answer") == 0) return answer_once();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(models, set_up, tear_down),
        cmocka_unit_test_setup_teardown(second_model, set_up, tear_down),
        cmocka_unit_test_setup_teardown(another_file, set_up, tear_down),
        cmocka_unit_test_setup_teardown(tokenize, set_up, tear_down),
        cmocka_unit_test_setup_teardown(encode_twice, set_up, tear_down),
        cmocka_unit_test_setup_teardown(bad_blocks, set_up, tear_down),
        cmocka_unit_test_setup_teardown(question_keys, set_up, tear_down),
        cmocka_unit_test_setup_teardown(no_retrieval_head, set_up, tear_down),
        cmocka_unit_test_setup_teardown(answer, set_up, tear_down),
        cmocka_unit_test_setup_teardown(selecting, set_up, tear_down),
        cmocka_unit_test_setup_teardown(extract, set_up, tear_down),
        cmocka_unit_test_setup_teardown(context, set_up, tear_down),
        cmocka_unit_test_setup_teardown(gone, set_up, tear_down),
        cmocka_unit_test_setup_teardown(wrong_model, set_up, tear_down),
        cmocka_unit_test_setup_teardown(cancel, set_up, tear_down),
        cmocka_unit_test_setup_teardown(evicted, set_up, tear_down),
        cmocka_unit_test_setup_teardown(together, set_up, tear_down),
        cmocka_unit_test_setup_teardown(status, set_up, tear_down),
        cmocka_unit_test(real_model),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed ? 1 : ibid_test_model_exit();
}
