/* Small models, stored KV in plain memory, and comparing, for the tests of the engine. Everything
 * here fails the running cmocka test when it cannot do its work. */
#ifndef IBID_TEST_ENGINE_FIXTURE_H
#define IBID_TEST_ENGINE_FIXTURE_H

#include "attention/engine.h"
#include "tests/support/gguf_write.h"

/* Shapes with 1, 2, 3 and 4 query heads per kv head; tied and not; every weight type; partial,
 * scaled and factored RoPE; a head size the vector kernels do not take. */
extern const ibid_test_gguf fx_shapes[];
enum { FX_SHAPES = 6 };

typedef struct fx_model {
    ibid_buf file;
    ibid_model *m;
    ibid_engine *e;
} fx_model;
void fx_open(fx_model *f, const ibid_test_gguf *spec, const char *kernels, size_t n_threads);
void fx_open_with(fx_model *f, const ibid_test_gguf *spec, const ibid_engine_opts *o);
void fx_close(fx_model *f);

/* The default model's path, or NULL if it is not there; if it must be there, fails instead. */
const char *fx_default_model(void);

uint64_t fx_random(uint64_t *state);
void fx_tokens(const ibid_model *m, uint64_t seed, int32_t *out, size_t n);
/* [n] from first on; free() it */
uint32_t *fx_positions(uint32_t first, size_t n);

/* KV of some rows of a sequence, as stored: [n_layers] views over memory of its own. */
typedef struct fx_kv {
    ibid_kv_view *layers;
    size_t n_layers;
    void *memory;
} fx_kv;
fx_kv fx_export(const ibid_model *m, const ibid_seq *s, size_t row0, size_t n, uint64_t shift,
                ibid_kv_type type);
void fx_kv_free(fx_kv *kv);
/* Encodes tokens behind a prefix (NULL: none) at positions from `first` and stores them. */
fx_kv fx_encode(ibid_engine *e, const ibid_segment *prefix, uint32_t first, const int32_t *tokens,
                size_t n, ibid_kv_type type);
/* Appends rows to a sequence at positions from `first` on. */
void fx_forward(ibid_engine *e, ibid_seq *s, uint32_t first, const int32_t *tokens, size_t n,
                size_t n_logits, float *logits);

double fx_max_diff(const float *a, const float *b, size_t n);
/* Kullback-Leibler divergence of the distribution of logits b from that of a, in nats. */
double fx_kl(const float *a, const float *b, size_t n);
#endif
