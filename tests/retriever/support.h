/* What the retriever's tests share: a real store filled with small documents whose token keys come
 * from a toy model: a word's token is its hash, and words of one group ("boat", "ship") have near
 * keys. */
#ifndef IBID_TEST_RETRIEVER_SUPPORT_H
#define IBID_TEST_RETRIEVER_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "retriever/engine.h"

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

enum { T_DIM = 64 };

void t_dir(char out[256]); /* a fresh folder with a folder "store" in it */
void t_drop(const char *dir);
ibid_str t_str(const char *s);
bool t_eq(ibid_str a, const char *b);
uint64_t t_rnd(uint64_t *state); /* xorshift64* */
double t_normal(uint64_t *state);
void t_unit(uint64_t *state, float *v, size_t n); /* a random direction */
void t_quantise(const float *v, size_t n, int8_t *out);

/* The toy model. t_tokens: white-space separated words; ends are bytes of the text. */
void t_key(int32_t token, int8_t out[T_DIM]);
int32_t t_token(const char *word, size_t n);
ibid_err t_tokenize(void *arg, const ibid_hash *model, ibid_str text, ibid_tokens *out);
ibid_err t_question_keys(void *arg, const ibid_hash *model, ibid_str question,
                         ibid_question_keys *out);
extern const ibidi_retriever_hooks t_hooks;

typedef struct t_store {
    char dir[256];
    ibid_store *s;
    ibid_hash model, calibration;
    uint64_t job;
} t_store;

/* A writer on a fresh store with the toy model, calibrated, and collection "c". */
void t_open(t_store *t);
void t_close(t_store *t); /* removes the folder */
/* Stores a calibration whose id depends on version, thresholds given. */
void t_calibrate(t_store *t, float version, float relevant, float find);
void t_collection(t_store *t, const char *name);

/* One chunk per paragraph (split at blank lines). Returns the generation. */
uint64_t t_put(t_store *t, const char *collection, const char *id, const char *title,
               const char *text, const char *metadata);
void t_delete(t_store *t, const char *collection, const char *id);

ibidi_retriever_opts t_opts(const t_store *t);
/* Ids of the hits joined by spaces, in order. */
void t_search(ibidi_retriever *r, const char *collection, const char *question, size_t top,
              char out[1024]);
void t_flip(const char *path, long offset); /* one byte; negative: from the end */
void t_truncate(const char *path, double share);
bool t_glob(const char *dir, const char *prefix, const char *suffix, char out[512]);
#endif
