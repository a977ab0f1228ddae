/* Tokenizers against llama.cpp's ids (tests/golden/tokenizer.bin, made by make_tokenizer.py), and
 * their own properties: tokens tile the text, long runs stay linear, controls stay out. */
#include "attention/model/model.h"
#include "attention/tokenizer/internal.h"
#include "rpc/base/mem.h"
#include "rpc/base/sanitized.h"
#include "tests/support/gguf_write.h"
#include "tests/support/test_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <zstd.h>

#include <cmocka.h>

static const uint64_t seed = 20261121;

typedef struct golden {
    const unsigned char *at, *end;
    char *data;
    size_t n_texts;
    ibid_gguf_str *texts;
    const unsigned char *vocab, *runs;
    size_t vocab_bytes;
} golden;

static uint64_t varint(golden *g) {
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        assert_true(g->at < g->end);
        unsigned char b = *g->at++;
        v |= (uint64_t)(b & 0x7F) << shift;
        if (b < 0x80) break;
    }
    return v;
}

static ibid_gguf_str bytes(golden *g) {
    ibid_gguf_str s = {.n = (size_t)varint(g)};
    assert_true(s.n <= (size_t)(g->end - g->at));
    s.data = (const char *)g->at;
    g->at += s.n;
    return s;
}

static void golden_open(golden *g) {
    const size_t max = 16 << 20;
    char *packed = ibid_alloc(max);
    FILE *f = fopen("tests/golden/tokenizer.bin", "rb");
    assert_non_null(f);
    size_t n = fread(packed, 1, max, f);
    assert_int_equal(fclose(f), 0);
    g->data = ibid_alloc(max);
    size_t size = ZSTD_decompress(g->data, max, packed, n);
    assert_false(ZSTD_isError(size));
    ibid_free(packed);
    g->at = (const unsigned char *)g->data;
    g->end = g->at + size;
    assert_memory_equal(g->at, "IBTK\2\0\0\0", 8);
    g->at += 8;
    g->n_texts = (size_t)varint(g);
    g->texts = ibid_calloc(g->n_texts, sizeof *g->texts);
    for (size_t i = 0; i < g->n_texts; i++) g->texts[i] = bytes(g);
    ibid_gguf_str vocab = bytes(g);
    g->vocab = (const unsigned char *)vocab.data;
    g->vocab_bytes = vocab.n;
    g->runs = g->at;
}

static void golden_close(golden *g) {
    ibid_free(g->texts);
    ibid_free(g->data);
}

/* Tokens cover the text without gap or overlap, and each token's bytes are the text's. Bytes that
 * the vocabulary lacks belong to a neighbour, which is then longer than its token. */
static void check_tiling(const ibid_tokenizer *t, const char *text, size_t n, const ibid_token *v,
                         size_t n_tokens) {
    size_t lacking = 0;
    for (size_t i = 0; i < n; i++) lacking += t->byte_id[(unsigned char)text[i]] < 0;
    if (n_tokens == 0) assert_int_equal(lacking, n);
    for (size_t i = 0; i < n_tokens; i++) {
        size_t len;
        const char *b = ibid_token_bytes(t, v[i].id, &len);
        assert_non_null(b);
        assert_int_equal(v[i].start, i ? v[i - 1].end : 0);
        assert_true(v[i].end >= v[i].start + len);
        size_t extra = (size_t)(v[i].end - v[i].start) - len;
        assert_true(extra <= lacking);
        lacking -= extra;
        if (!extra) assert_memory_equal(b, text + v[i].start, len);
    }
    if (n_tokens) {
        assert_int_equal(v[n_tokens - 1].end, n);
        assert_int_equal(lacking, 0);
    }
}

static void replay_run(golden *g, const ibid_gguf *default_vocab, const ibid_gguf *small_vocab) {
    char name[64] = {0};
    unsigned vocabulary = *g->at++;
    ibid_gguf_str pre = bytes(g);
    assert_true(pre.n < sizeof name);
    memcpy(name, pre.data, pre.n);
    bool special = *g->at++ != 0;
    size_t n = (size_t)varint(g), wrong = 0;
    const ibid_gguf *from = vocabulary ? small_vocab : default_vocab;
    ibid_tokenizer *t = NULL;
    if (from) assert_int_equal(ibidi_tokenizer_open(from, name, &t), IBID_OK);
    for (size_t i = 0; i < n; i++) {
        ibid_token *v = NULL;
        size_t n_ids = (size_t)varint(g), n_got = n_ids;
        bool same = true;
        if (t) {
            assert_int_equal(ibid_tokenize(t, g->texts[i].data, g->texts[i].n, special, &v, &n_got),
                             IBID_OK);
            check_tiling(t, g->texts[i].data, g->texts[i].n, v, n_got);
        }
        for (size_t j = 0; j < n_ids; j++) {
            int32_t id = (int32_t)varint(g);
            same = same && (!t || (j < n_got && v[j].id == id));
        }
        if (!same || n_got != n_ids) {
            if (wrong++ < 5)
                print_error("%s: text %zu differs: %zu tokens, llama.cpp has %zu: \"%.*s\"\n", name,
                            i, n_got, n_ids, (int)g->texts[i].n, g->texts[i].data);
        }
        ibid_free(v);
    }
    if (t)
        print_message("%s, vocabulary %u, parse_special %d: %zu texts\n", name, vocabulary, special,
                      n);
    assert_int_equal(wrong, 0);
    ibidi_tokenizer_close(t);
}

/* Runs over the default model's vocabulary are stepped over when the model is not there; main()
 * then reports the program as skipped. */
static void equals_llama_cpp(void **state) {
    (void)state;
    golden g = {0};
    ibid_gguf *model = NULL, *small = NULL;
    const char *path = ibid_test_model_path();
    golden_open(&g);
    assert_int_equal(ibid_gguf_parse(g.vocab, g.vocab_bytes, "small vocabulary", &small), IBID_OK);
    if (path) assert_int_equal(ibid_gguf_open(path, &model), IBID_OK);
    size_t n_runs = (size_t)varint(&g);
    assert_true(n_runs >= 10 && g.n_texts >= 10000);
    for (size_t i = 0; i < n_runs; i++) replay_run(&g, model, small);
    if (model) {
        ibid_tokenizer *t = NULL;
        assert_int_equal(ibidi_tokenizer_open(model, NULL, &t), IBID_OK);
        size_t n_end = (size_t)varint(&g), n_ours = 0;
        for (size_t i = 0; i < n_end; i++)
            assert_true(ibid_tokenizer_is_end(t, (int32_t)varint(&g)));
        for (size_t i = 0; i < ibid_tokenizer_size(t); i++)
            n_ours += ibid_tokenizer_is_end(t, (int32_t)i);
        assert_int_equal(n_ours, n_end);
        ibidi_tokenizer_close(t);
    }
    ibid_gguf_close(model);
    ibid_gguf_close(small);
    golden_close(&g);
}

static ibid_tokenizer *small_tokenizer(const char *pre) {
    ibid_test_gguf spec = ibid_test_gguf_small();
    ibid_buf b;
    ibid_gguf *g = NULL;
    ibid_tokenizer *t = NULL;
    ibid_buf_init(&b, 1 << 24);
    assert_int_equal(ibid_test_build_gguf(&spec, &b), IBID_OK);
    assert_int_equal(ibid_gguf_parse(b.data, b.len, "small", &g), IBID_OK);
    assert_int_equal(ibidi_tokenizer_open(g, pre, &t), IBID_OK);
    ibid_gguf_close(g);
    ibid_buf_fini(&b);
    return t;
}

static uint64_t next_random(uint64_t *s) {
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

/* Any bytes: tokens tile them, their bytes are the text, and the same bytes give the same tokens.
 */
static void bytes_tile(void **state) {
    (void)state;
    static const char *const pres[] = {"smollm", "gpt-2", "default", "llama-bpe", "qwen2"};
    uint64_t random = seed;
    print_message("seed %llu\n", (unsigned long long)seed);
    for (size_t p = 0; p < sizeof pres / sizeof *pres; p++) {
        ibid_tokenizer *t = small_tokenizer(pres[p]);
        for (int i = 0; i < 2000; i++) {
            char text[300];
            size_t n = next_random(&random) % sizeof text, n_tokens = 0;
            bool few = i % 2; /* few kinds of bytes: more merges */
            for (size_t j = 0; j < n; j++)
                text[j] = few ? "the and\xC3\xA9 12\n' \xFF"[next_random(&random) % 17]
                              : (char)next_random(&random);
            ibid_token *v = NULL;
            assert_int_equal(ibid_tokenize(t, text, n, false, &v, &n_tokens), IBID_OK);
            check_tiling(t, text, n, v, n_tokens);
            for (size_t j = 0; j < n_tokens; j++) assert_false(ibid_token_is_control(t, v[j].id));
            ibid_free(v);
        }
        ibidi_tokenizer_close(t);
    }
}

/* The heap for long words and the scan for short ones do the same merges: a long word is also
 * merged naively here. */
static void long_words_merge_alike(void **state) {
    (void)state;
    ibid_tokenizer *t = small_tokenizer("gpt-2");
    uint64_t random = seed;
    for (int round = 0; round < 300; round++) {
        char text[400];
        size_t n = 20 + next_random(&random) % 300, n_ids = n, n_tokens = 0;
        int32_t ids[400];
        for (size_t i = 0; i < n; i++) text[i] = "theandingonres"[next_random(&random) % 14];
        for (size_t i = 0; i < n; i++) ids[i] = t->byte_id[(unsigned char)text[i]];
        for (;;) {
            const ibidi_merge *best = NULL;
            size_t at = 0;
            for (size_t i = 0; i + 1 < n_ids; i++) {
                const ibidi_merge *m = ibidi_merge_find(t, ids[i], ids[i + 1]);
                if (m && (!best || m->rank < best->rank)) best = m, at = i;
            }
            if (!best) break;
            ids[at] = best->made;
            memmove(&ids[at + 1], &ids[at + 2], (n_ids - at - 2) * sizeof *ids);
            n_ids--;
        }
        ibid_token *v = NULL;
        assert_int_equal(ibid_tokenize(t, text, n, false, &v, &n_tokens), IBID_OK);
        assert_int_equal(n_tokens, n_ids);
        for (size_t i = 0; i < n_ids; i++) assert_int_equal(v[i].id, ids[i]);
        ibid_free(v);
    }
    ibidi_tokenizer_close(t);
}

static void controls_only_when_asked(void **state) {
    (void)state;
    static const char text[] = "<|im_start|>user\nthe <|im_end|>";
    ibid_tokenizer *t = small_tokenizer(NULL);
    ibid_token *v = NULL;
    size_t n = 0, len;
    assert_int_equal(ibid_tokenizer_control(t, "<|im_end|>"), 2);
    assert_int_equal(ibid_tokenizer_control(t, "<|im_end|"), -1);
    assert_int_equal(ibid_tokenizer_control(t, "t"), -1);
    assert_int_equal(ibid_tokenize(t, text, sizeof text - 1, true, &v, &n), IBID_OK);
    assert_true(n > 3);
    assert_int_equal(v[0].id, 1);
    assert_int_equal(v[n - 1].id, 2);
    assert_int_equal(v[n - 1].end, sizeof text - 1);
    ibid_free(v);
    assert_int_equal(ibid_tokenize(t, text, sizeof text - 1, false, &v, &n), IBID_OK);
    for (size_t i = 0; i < n; i++) assert_true(v[i].id >= IBID_TEST_BYTE_TOKEN);
    ibid_free(v);
    assert_true(ibid_tokenizer_is_end(t, 2) && ibid_tokenizer_is_end(t, 0));
    assert_false(ibid_tokenizer_is_end(t, 1) || ibid_tokenizer_is_end(t, -1));
    assert_null(ibid_token_bytes(t, -1, &len));
    assert_null(ibid_token_bytes(t, (int32_t)ibid_tokenizer_size(t), &len));
    assert_int_equal(ibid_tokenize(t, "", 0, false, &v, &n), IBID_OK);
    assert_int_equal(n, 0);
    ibid_free(v);
    ibidi_tokenizer_close(t);
}

static void too_long_is_refused(void **state) {
    (void)state;
    ibid_tokenizer *t = small_tokenizer(NULL);
    ibid_token *v = NULL;
    size_t n = 0;
    /* The length is looked at before the text is. */
    assert_int_equal(ibid_tokenize(t, "x", ((size_t)1 << 31) + 1, false, &v, &n), IBID_TOOBIG);
    ibidi_tokenizer_close(t);
}

/* The Nth allocation fails: a typed error, nothing leaked (as the sanitizer build sees). */
static void allocations_fail(void **state) {
    (void)state;
    ibid_tokenizer *t = small_tokenizer(NULL);
    char text[500];
    memset(text, 'a', sizeof text);
    memcpy(text + 200, "<|im_end|>", 10);
    int failures = 0;
    for (uint64_t nth = 1; nth < 50; nth++) {
        ibid_token *v = NULL;
        size_t n = 0;
        ibid_alloc_fail_at(nth);
        ibid_err e = ibid_tokenize(t, text, sizeof text, true, &v, &n);
        ibid_alloc_fail_at(0);
        if (e) assert_int_equal(e, IBID_NOMEM);
        failures += e != IBID_OK;
        ibid_free(v);
        if (!e) break;
    }
    assert_true(failures >= 5 && failures < 49);
    ibidi_tokenizer_close(t);
}

enum { RUN_MIB = IBID_SANITIZED ? 1 : 16, SECONDS_PER_MIB = IBID_SANITIZED ? 8 : 1 };

/* 16 MiB of one character: at most a second per MiB. Sanitizers slow every access down, so that
 * their builds only take a shorter run and a wider bound. */
static void runs_are_linear(void **state) {
    (void)state;
    const size_t mib = RUN_MIB;
    const char *path = ibid_test_model_path();
    ibid_gguf *g = NULL;
    ibid_tokenizer *t = NULL;
    if (path) {
        assert_int_equal(ibid_gguf_open(path, &g), IBID_OK);
        assert_int_equal(ibidi_tokenizer_open(g, NULL, &t), IBID_OK);
        ibid_gguf_close(g);
    } else {
        t = small_tokenizer(NULL);
    }
    char *text = ibid_alloc(mib << 20);
    for (const char *c = "a =1\n'"; *c; c++) {
        ibid_token *v = NULL;
        size_t n = 0;
        memset(text, *c, mib << 20);
        clock_t start = clock(); /* of this process: other tests run beside it */
        assert_int_equal(ibid_tokenize(t, text, mib << 20, false, &v, &n), IBID_OK);
        double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
        print_message("%zu MiB of '%c': %zu tokens, %.2f s\n", mib, *c == '\n' ? 'n' : *c, n,
                      seconds);
        assert_int_equal(v[n - 1].end, mib << 20);
        assert_true(seconds <= (double)(mib * SECONDS_PER_MIB));
        ibid_free(v);
    }
    ibid_free(text);
    ibidi_tokenizer_close(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equals_llama_cpp),       cmocka_unit_test(bytes_tile),
        cmocka_unit_test(long_words_merge_alike), cmocka_unit_test(controls_only_when_asked),
        cmocka_unit_test(too_long_is_refused),    cmocka_unit_test(allocations_fail),
        cmocka_unit_test(runs_are_linear),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed ? 1 : ibid_test_model_exit();
}
