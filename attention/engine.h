/* The engine: the forward pass of one model over token rows that see stored KV segments and their own
 * live KV. One primitive, ibid_engine_forward, serves encoding of blocks (many sequences in one batch),
 * questions over stored blocks, partial recomputation, and decoding (continuous batching: any set of
 * sequences may take part in a call).
 *
 * A sequence = stored segments (the prefix, blocks; borrowed KV views, K rotated at local positions)
 * in ascending global position, plus live rows computed here (f32, K rotated at global positions).
 * A query at global position p sees a segment with its rotation undone by the segment's offset d:
 * R(p)q . R(n+d)k = R(p-d)q . R(n)k (docs/design.md section 4), so stored keys are never touched.
 *
 * One engine runs one forward at a time; callers serialise (attention/plan/scheduler). Sequences belong
 * to one engine. Errors: INVAL (positions not ascending, unknown token), NOMEM, CONTEXT (position past
 * the model's context), CANCELLED. */
#ifndef IBID_ATTENTION_ENGINE_H
#define IBID_ATTENTION_ENGINE_H

#include "attention/kernels/kernels.h"
#include "attention/model/model.h"

#include <stdatomic.h>

typedef struct ibid_engine ibid_engine;
typedef struct ibid_seq ibid_seq;

/* auto: a GPU if there is one that works and takes the model, else the CPU. cuda: or an error, NOTSUP.
 * int8 and kernels are the CPU's; on a GPU weights and activations are f16 at most, sums f32, results
 * of a row may differ by rounding with what shares its batch, and rows that need no logits cost as
 * others. */
typedef enum ibid_backend {
    IBID_BACKEND_CPU = 0,
    IBID_BACKEND_CUDA = 1,
    IBID_BACKEND_AUTO = 2
} ibid_backend;

typedef struct ibid_engine_opts {
    const char *kernels; /* NULL: the fastest */
    size_t n_threads;    /* 0: physical cores */
    /* Integer arithmetic for quantised weights and for attention, where the kernels can: several
     * times as fast. Approximate (docs/performance.md has its KL divergence), but as deterministic
     * as without: a row's result does not depend on what shares its batch. */
    bool int8;
    const char *cache; /* folder for the weights as int8 wants them; NULL: made at each start */
    ibid_backend backend;
    /* On a GPU: bytes for KV there (0: most of what the weights leave free), and its type, q8_0
     * unless f16 is asked for. */
    size_t gpu_memory;
    ibid_kv_type gpu_kv;
    bool gpu_no_graphs; /* each kernel is launched by itself, for comparison */
    /* Called once, by the forward that finds the device lost (detail: its error). */
    void (*lost)(void *arg, const char *detail);
    void *lost_arg;
} ibid_engine_opts;

ibid_err ibid_engine_open(const ibid_model *m, const ibid_engine_opts *o, ibid_engine **out);
void ibid_engine_close(ibid_engine *e);
const ibid_model *ibid_engine_model(const ibid_engine *e);
/* "cpu" or "cuda". */
const char *ibid_engine_backend(const ibid_engine *e);
/* Whether steps may have their token drawn (ibid_draw): on a GPU. */
bool ibid_engine_draws(const ibid_engine *e);
/* The GPU and its KV pool as of the last forward; from any thread. False on the CPU. */
typedef struct ibid_engine_gpu {
    char name[64];
    uint64_t memory, pool, pool_used; /* bytes */
    uint64_t hits, misses, evicted;   /* blocks; of streamed contexts, pages */
    uint64_t graph_steps;             /* decoding steps run as a recorded graph */
    uint64_t streamed_steps;          /* passes that brought all of a context too large for the pool */
} ibid_engine_gpu;
bool ibid_engine_gpu_look(const ibid_engine *e, ibid_engine_gpu *out);
/* The device is gone and with it every sequence; only ending the process brings it back. */
bool ibid_engine_lost(const ibid_engine *e);

/* A run of consecutive tokens with stored KV. Token j has local position local0 + j and global
 * position local0 + offset + j. layers[l] must stay valid while the sequence lives. masked: bitmap of
 * rows that no query may see at any layer (they are recomputed live), or NULL; borrowed. */
typedef struct ibid_segment {
    const ibid_kv_view *layers; /* [n_layers], borrowed */
    uint64_t local0, offset;
    const uint64_t *masked;
    /* Names the KV for a device that keeps it from one sequence to the next: equal numbers, equal KV.
     * 0: nothing is kept. */
    uint64_t id;
} ibid_segment;

/* live_hint: live rows expected (storage grows as needed). */
ibid_err ibid_seq_open(ibid_engine *e, size_t live_hint, ibid_seq **out);
void ibid_seq_close(ibid_seq *s);
/* Segments come in ascending, non-overlapping global positions. */
ibid_err ibid_seq_add_segment(ibid_seq *s, const ibid_segment *g);
/* A sequence of its own that goes on from the same segments and a copy of the live rows: several
 * continuations of one beginning in one call. live_hint: rows expected beyond those. Errors: NOMEM;
 * NOTSUP on a GPU. */
ibid_err ibid_seq_fork(const ibid_seq *s, size_t live_hint, ibid_seq **out);
size_t ibid_seq_live_count(const ibid_seq *s);
/* Drops live rows from `count` on. */
void ibid_seq_truncate(ibid_seq *s, size_t count);

/* Packs live rows [row0, row0 + n) of a layer into the planes of a view the caller prepared (type,
 * shape and writable plane pointers; ibid_kv_value_planes). shift is subtracted from the rows' global
 * positions, K being rotated back by it (0 when block-local and global positions coincide). */
ibid_err ibid_seq_export(const ibid_seq *s, size_t layer, size_t row0, size_t n, uint64_t shift,
                         const ibid_kv_view *planes);
/* Keys of live rows before RoPE at one (layer, kv head): out [n, head_dim] f32. */
ibid_err ibid_seq_raw_keys(const ibid_seq *s, size_t layer, size_t kv_head, size_t row0, size_t n,
                           float *out);
/* The same from stored KV: un-rotates token j by local position local0 + j. out [n_tokens, head_dim] */
ibid_err ibid_engine_stored_keys(const ibid_engine *e, const ibid_kv_view *kv, uint64_t local0,
                                 size_t kv_head, float *out);

/* Attention mass that rows of a step gave to stored segments, summed over the chosen query heads and
 * rows: mass[g][t] += probability, g the segment's index in the sequence. heads: bitmap over
 * layer * n_heads + head; NULL = all. Costs one more pass over the keys of those heads. */
typedef struct ibid_probe {
    const uint64_t *heads;
    float *const *mass; /* [n_segments]; NULL entries are skipped */
    size_t row0, n_rows; /* rows of the step that count */
} ibid_probe;

/* A token drawn where the logits are, so that they need not come here: from temperature (0: the
 * largest, the first of equals), top_p (1: all) and a number in [0, 1), as sample.cu says. */
typedef struct ibid_draw {
    float temperature, top_p, uniform;
    int32_t token; /* the result */
} ibid_draw;

/* Decoding that reads a part of its context's KV: each (layer, kv head) attends to the pages of 64
 * tokens whose summaries promise its query most attention (kernels/select.h), besides the first
 * page and the last live tokens, and takes the rest for nothing. For steps of one row; others read
 * all. */
typedef struct ibid_select {
    double share;    /* of the tokens the row sees, 0 < share; from 1 on: all of them */
    uint64_t least;  /* tokens read at least; 0: 256 */
    bool measure;    /* reads everything too, to know the recall */
    /* Added to by the forward, over layers and kv heads. */
    uint64_t read, seen; /* tokens attended to; tokens that the row sees */
    /* Of each query head's attention over everything, the share on what was read. */
    double recall;
    uint64_t n_recall; /* how many are summed in recall */
} ibid_select;

typedef struct ibid_step {
    ibid_seq *seq;
    const int32_t *tokens;     /* [n] */
    const uint32_t *positions; /* [n] global, strictly ascending, above those of live rows */
    size_t n;
    size_t n_logits; /* logits wanted for the last n_logits rows, <= n */
    float *logits;   /* [n_logits, n_vocab] */
    /* NULL, or instead of logits (n_logits 1, logits NULL): where ibid_engine_draws. INVAL if no logit
     * is above -infinity. */
    ibid_draw *draw;
    const ibid_probe *probe; /* NULL: none */
    ibid_select *select;     /* NULL: full attention */
    bool will_select;        /* later steps of the sequence will: what that needs may be made now */
    size_t n_layers; /* layers to run: 0 = all; fewer leaves logits impossible (n_logits must be 0) */
    /* NULL, or called before a layer is computed, on the caller's thread, perhaps more than once for
     * a layer: the segments' KV at that layer may be brought in and checked here. An error ends the
     * call. */
    ibid_err (*ready)(void *arg, size_t layer);
    void *ready_arg;
} ibid_step;

/* Appends each step's rows to its sequence. A live row sees: every unmasked stored row at a lower
 * global position, every live row of its sequence at a position <= its own. On error the sequences are
 * as before the call. cancel (may be NULL) is looked at between layers. Deterministic for any thread
 * count. */
ibid_err ibid_engine_forward(ibid_engine *e, ibid_step *steps, size_t n_steps,
                             const atomic_bool *cancel);
#endif
