/* What the store's tests share: a temporary folder, generated blocks and documents. */
#ifndef IBID_TEST_KVSTORE_SUPPORT_H
#define IBID_TEST_KVSTORE_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kvstore/kv_value.h"
#include "kvstore/kvstore.h"

#include <string.h>

#define assert_ok(call)                                                                            \
    do {                                                                                           \
        ibid_err e_ = (call);                                                                      \
        if (e_) print_error("%s: %s: %s\n", #call, ibid_err_code(e_), ibid_err_detail());          \
        assert_int_equal(e_, IBID_OK);                                                             \
    } while (0)
#define assert_err(call, want)                                                                     \
    do {                                                                                           \
        ibid_err e_ = (call);                                                                      \
        if (e_ != (want))                                                                          \
            print_error("%s: %s: %s\n", #call, ibid_err_code(e_), ibid_err_detail());              \
        assert_int_equal(e_, want);                                                                \
    } while (0)

enum { T_LAYERS = 3, T_HEADS = 2, T_DIM = 32, T_KEYS_DIM = 32 };

/* A folder under TMPDIR (or /tmp), removed whole by drop_dir. */
void make_dir(char out[256]);
void drop_dir(const char *dir);

ibid_str str(const char *s);
bool str_eq(ibid_str a, const char *b);
ibid_hash hash_of(const char *s);

/* xorshift64*: the tests' only source of randomness. */
uint64_t rnd(uint64_t *state);

/* A block whose tokens, KV and keys follow from seed; owns its memory. */
typedef struct test_block {
    int32_t *tokens;
    void *values[T_LAYERS];
    int8_t *keys;
    ibid_block_put put;
} test_block;
void block_make(test_block *b, uint64_t seed, size_t n_tokens, uint64_t job);
void block_free(test_block *b);
/* True when the view holds exactly what block_make wrote at this layer. */
bool block_kv_equal(const test_block *b, size_t layer, const ibid_kv_view *v);
/* Makes, puts and frees; returns the number. */
uint64_t block_put(ibid_store *s, uint64_t seed, size_t n_tokens, uint64_t job);

ibid_store *store_open(const char *dir, uint64_t kv_budget);
ibid_store *store_open_reader(const char *dir);
/* A model "m" and a collection of it. */
void collection_make(ibid_store *s, const char *name);
uint64_t job_make(ibid_store *s);
void job_finish(ibid_store *s, uint64_t id, const char *state);

/* A document whose i-th chunk is the i-th 10 bytes of a text of n * 10 bytes. */
ibid_err document_put(ibid_store *s, const char *collection, const char *id, const uint64_t *blocks,
                      size_t n, uint64_t job, uint64_t *number, uint64_t *generation);
/* verify() finds nothing; otherwise prints what it found and fails. */
void assert_sound(ibid_store *s);
/* Faults that verify() counts; the first one's sentence in first. */
uint64_t faults_of(ibid_store *s, char first[512]);
void stats_of(ibid_store *s, ibid_store_stats *out);
#endif
