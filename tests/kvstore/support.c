#include "support.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

void make_dir(char out[256]) {
    const char *tmp = getenv("TMPDIR");
    (void)snprintf(out, 256, "%s/ibid-kvstore-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    assert_non_null(mkdtemp(out));
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) {
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

void drop_dir(const char *dir) {
    (void)nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

ibid_str str(const char *s) {
    return (ibid_str){s, strlen(s)};
}

bool str_eq(ibid_str a, const char *b) {
    return a.n == strlen(b) && memcmp(a.s, b, a.n) == 0;
}

ibid_hash hash_of(const char *s) {
    return ibid_hash_bytes(s, strlen(s));
}

uint64_t rnd(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1du;
}

static void fill(void *p, size_t n, uint64_t seed) {
    uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
    uint8_t *b = p;
    for (size_t i = 0; i < n; i++) b[i] = (uint8_t)(rnd(&state) >> 40);
}

void block_make(test_block *b, uint64_t seed, size_t n_tokens, uint64_t job) {
    *b = (test_block){.tokens = malloc(n_tokens * sizeof *b->tokens),
                      .keys = malloc(n_tokens * T_KEYS_DIM)};
    assert_true(b->tokens && b->keys);
    for (size_t i = 0; i < n_tokens; i++) b->tokens[i] = (int32_t)(seed * 1000 + i);
    fill(b->keys, n_tokens * T_KEYS_DIM, seed + 7);
    ibid_kv_shape shape = {IBID_KV_Q8_0, n_tokens, T_HEADS, T_DIM};
    size_t size;
    assert_ok(ibid_kv_value_size(&shape, &size));
    for (size_t l = 0; l < T_LAYERS; l++) {
        b->values[l] = malloc(size);
        assert_non_null(b->values[l]);
        fill(b->values[l], size, seed * 100 + l);
        assert_ok(ibid_kv_value_seal(&shape, 0, l, b->values[l], size));
    }
    b->put = (ibid_block_put){.model = hash_of("model m"),
                              .prefix = hash_of("prefix"),
                              .kv_type = IBID_KV_Q8_0,
                              .n_title = n_tokens > 2 ? 2 : 0,
                              .n_tokens = n_tokens,
                              .tokens = b->tokens,
                              .n_layers = T_LAYERS,
                              .value_size = size,
                              .values = (const void *const *)b->values,
                              .calibration = hash_of("calibration"),
                              .keys = b->keys,
                              .keys_dim = T_KEYS_DIM,
                              .job = job};
}

void block_free(test_block *b) {
    for (size_t l = 0; l < T_LAYERS; l++) free(b->values[l]);
    free(b->tokens);
    free(b->keys);
}

bool block_kv_equal(const test_block *b, size_t layer, const ibid_kv_view *v) {
    ibid_kv_shape shape = {IBID_KV_Q8_0, b->put.n_tokens, T_HEADS, T_DIM};
    ibid_kv_view want;
    size_t rows = T_HEADS * b->put.n_tokens, n = rows * T_DIM, scales = rows * (T_DIM / 32) * 2;
    if (ibid_kv_value_planes(&shape, b->values[layer], &want) != IBID_OK) return false;
    return v->type == want.type && v->n_tokens == want.n_tokens && v->n_kv_heads == T_HEADS &&
           v->head_dim == T_DIM && memcmp(v->k, want.k, n) == 0 && memcmp(v->v, want.v, n) == 0 &&
           memcmp(v->k_scale, want.k_scale, scales) == 0 &&
           memcmp(v->v_scale, want.v_scale, scales) == 0;
}

uint64_t block_put(ibid_store *s, uint64_t seed, size_t n_tokens, uint64_t job) {
    test_block b;
    uint64_t number = 0;
    block_make(&b, seed, n_tokens, job);
    assert_ok(ibid_store_blocks_put(s, &b.put, 1, &number));
    block_free(&b);
    assert_true(number > 0);
    return number;
}

ibid_store *store_open(const char *dir, uint64_t kv_budget) {
    ibid_store *s = NULL;
    assert_ok(ibid_store_open(&(ibid_store_opts){.dir = dir, .kv_budget = kv_budget}, &s));
    return s;
}

ibid_store *store_open_reader(const char *dir) {
    ibid_store *s = NULL;
    assert_ok(ibid_store_open(&(ibid_store_opts){.dir = dir, .readonly = true}, &s));
    return s;
}

void collection_make(ibid_store *s, const char *name) {
    static const int32_t prefix_tokens[] = {1, 2, 3};
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
                           .prefix_tokens = prefix_tokens,
                           .n_prefix_tokens = 3,
                           .kv_type = IBID_KV_Q8_0};
    assert_ok(ibid_store_model_put(s, &m));
    assert_ok(ibid_store_collection_create(s, str(name), &m.fingerprint));
}

uint64_t job_make(ibid_store *s) {
    ibid_job j = {.kind = str("index"), .state = str("running"), .stage = str("encode")};
    uint64_t id = 0;
    assert_ok(ibid_store_job_put(s, &j, &id));
    assert_true(id > 0);
    return id;
}

void job_finish(ibid_store *s, uint64_t id, const char *state) {
    ibid_job j = {.id = id, .kind = str("index"), .state = str(state)};
    assert_ok(ibid_store_job_put(s, &j, NULL));
}

ibid_err document_put(ibid_store *s, const char *collection, const char *id, const uint64_t *blocks,
                      size_t n, uint64_t job, uint64_t *number, uint64_t *generation) {
    char *text = malloc(n * 10 + 1);
    ibid_chunk *chunks = calloc(n + 1, sizeof *chunks);
    assert_true(text && chunks);
    for (size_t i = 0; i < n; i++) {
        (void)snprintf(text + 10 * i, 11, "%09u\n", (unsigned)(blocks[i] % 1000000000));
        chunks[i] = (ibid_chunk){10 * i, 10 * i + 10, str(i % 2 ? "line" : ""), blocks[i]};
    }
    ibid_document_put d = {.collection = str(collection),
                           .id = str(id),
                           .title = str("a title"),
                           .source = str("/files/a.txt"),
                           .metadata = str("{\"k\":\"v\"}"),
                           .content = ibid_hash_bytes(text, n * 10),
                           .state = n ? IBID_DOC_READY : IBID_DOC_EMPTY,
                           .reason = str(n ? "" : "no text"),
                           .text = {text, n * 10},
                           .chunks = chunks,
                           .n_chunks = n,
                           .job = job};
    ibid_err e = ibid_store_document_put(s, &d, number, generation);
    free(chunks);
    free(text);
    return e;
}

static void keep_first(void *arg, const char *fault) {
    char *first = arg;
    if (!*first) (void)snprintf(first, 512, "%s", fault);
}

uint64_t faults_of(ibid_store *s, char first[512]) {
    uint64_t n = 0;
    first[0] = '\0';
    assert_ok(ibid_store_verify(s, keep_first, first, &n));
    return n;
}

void assert_sound(ibid_store *s) {
    char first[512];
    uint64_t n = faults_of(s, first);
    if (n) print_error("%llu faults, the first: %s\n", (unsigned long long)n, first);
    assert_int_equal(n, 0);
}

void stats_of(ibid_store *s, ibid_store_stats *out) {
    ibid_snap *n = NULL;
    assert_ok(ibid_snap_begin(s, &n));
    assert_ok(ibid_snap_stats(n, out));
    ibid_snap_end(n);
}
