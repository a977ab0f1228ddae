/* The engine's other half where it runs on a GPU: the forward pass of a chunk of rows on the
 * device. engine.c checks steps and keeps sequences' positions and segments as ever; here live
 * where KV lies on the device, weights, and the order of kernels. Internal to the engine
 * (engine_internal.h).
 *
 * gpu.c          opening: weights, the pool, scratch
 * gpu_seq.c      a sequence's pages: blocks pinned, live cells, tables; reading pages back
 * gpu_load.c     stored KV to the pool, layer by layer, through pinned staging
 * gpu_select.c   rows that read a share of their context
 * gpu_forward.c  a pass
 * gpu_graph.c    decoding passes, recorded and run again
 *
 * A context that the pool does not hold is streamed: a pass that reads all of it has room for two
 * layers, which take turns, and one that selects has the pages it chose brought, and keeps them as
 * the pool keeps blocks. */
#ifndef IBID_ATTENTION_CUDA_GPU_H
#define IBID_ATTENTION_CUDA_GPU_H

#include "attention/cuda/device.h"
#include "attention/cuda/launch.h"
#include "attention/cuda/pages.h"
#include "attention/cuda/plan.h"
#include "attention/cuda/select.h"
#include "attention/engine_internal.h"

enum {
    IBIDI_GPU_CHUNK = 512, /* rows of a pass */
    IBIDI_GPU_LOGITS = 64, /* rows that meet the output head together */
    IBIDI_GPU_STAGES = 2,  /* staging buffers */
    IBIDI_GPU_GRAPHS = 32, /* recorded passes kept */
    IBIDI_GPU_PARTS = 64,  /* steps in a recorded pass at most */
    IBIDI_GPU_TURNED =
        1u << 28, /* bytes of turned queries in a pass, about: longer steps are cut */
};

/* Memory that grows; its contents are lost when it does. */
typedef struct ibidi_gpu_room {
    void *p;
    size_t bytes;
} ibidi_gpu_room;

typedef struct ibidi_gpu_layer {
    ibidi_cu_matrix qkv[3], wo, ffn[2], down;
    const float *attn_norm, *ffn_norm, *bq, *bk, *bv, *bo, *q_norm, *k_norm; /* NULL: none */
} ibidi_gpu_layer;

/* All that the arguments of a pass's launches depend on; zeroed before it is filled, padding too.
 */
typedef struct ibidi_gpu_key {
    uint64_t n_rows, n_layers, n_wanted, n_tiles[2], n_items[2], max_turned, draws;
    const void *memory[16];
    struct {
        uint64_t n_pages, lo, hi;               /* of its probe */
        uint64_t selects, measured, grid, room; /* of its choice, */
        uint64_t n_chosen;                      /* if it is probed */
    } parts[IBIDI_GPU_PARTS];
} ibidi_gpu_key;

typedef struct ibidi_gpu_graph {
    ibidi_gpu_key key;
    uint64_t used; /* a clock; 0: never */
    bool refused;  /* the device would not record it */
    ibid_device_graph *graph;
} ibidi_gpu_graph;

struct ibidi_gpu {
    ibid_device *d;
    ibidi_cu_stream work, copy;
    ibid_device_event *copied;    /* the last layer's KV is in the pool */
    ibid_device_event *passed[2]; /* a streamed layer of that parity was computed */
    const ibid_model *m;
    const ibid_kernels *k; /* the CPU's: packing KV of another type */
    ibidi_cu_shape shape;
    size_t kv_dim, q_dim;
    ibidi_gpu_room weights;
    ibidi_gpu_layer *layers;
    const float *output_norm;
    ibidi_cu_matrix embed, output;
    ibidi_pages *pages;
    ibid_kv_type kv_type;

    struct {
        uint8_t *p; /* pinned */
        ibid_device_event *done;
        bool open; /* done was recorded and not waited for */
    } stages[IBIDI_GPU_STAGES];
    size_t stage_bytes, stage, staged;
    ibidi_gpu_room landing; /* as long as a stage */

    char name[64];
    size_t memory, pool_bytes;
    struct {
        _Atomic uint64_t used, hits, misses, evicted, graph_steps, streamed_steps;
    } noted; /* for whoever looks from another thread */

    /* Of a pass. */
    ibidi_gpu_room chosen, x, y, h, h_scale, y_scale, q, tables, turned, acc, state, lse, unpacked,
        logits, mass, drawn;
    uint32_t *host_drawn; /* pinned, [IBIDI_GPU_LOGITS] */
    ibidi_gpu_graph graphs[IBIDI_GPU_GRAPHS];
    uint64_t graph_clock;
    bool no_graphs;
    /* Pinned: rows, sequences, cos, sin, tiles, items, as in `tables`; what streamed sequences
     * chose, and where it came to lie. */
    ibidi_gpu_room host_tables, host_chosen;
    uint64_t serial; /* of sequences */
    ibidi_cu_plan plan;
};

/* What a sequence has on the device. */
struct ibidi_gpu_seq {
    ibidi_block **blocks; /* [n_segs] pinned; none of a streamed sequence */
    size_t n_blocks;
    bool streamed;
    /* Of a streamed sequence, while a pass reads all: its pages at two layers. */
    ibidi_block *window;
    uint64_t serial;
    uint32_t *live; /* [n_live pages, n_layers] cells */
    size_t n_live, live_room;
    ibidi_cu_page *pages; /* on the host */
    uint32_t *owner;      /* [n_stored_pages] the segment a page is of */
    size_t n_pages, page_room, n_stored_pages;
    ibidi_gpu_room table; /* pages, cells, turns */
    uint8_t *uploaded;    /* what the table holds */
    size_t uploaded_bytes;
    ibidi_cu_seq view; /* into the table */
    size_t n_turns;
    ibidi_gpu_room summaries; /* of ibidi_cu_choosing, and its spread behind them */
    size_t summary_room, summary_segs;
    bool no_summaries; /* the device has no room for them */
    size_t *summed;  /* [n_layers] pages whose summaries are there */
    uint8_t *mirror; /* pages of a layer read back */
    size_t mirror_bytes, mirror_page0, mirror_layer;
};

ibid_err ibidi_gpu_open(const ibid_model *m, const ibid_engine_opts *o, ibid_pool *pool,
                        const ibid_kernels *k, struct ibidi_gpu **out);
void ibidi_gpu_close(struct ibidi_gpu *g);
ibid_kv_type ibidi_gpu_kv_type(const struct ibidi_gpu *g);
size_t ibidi_gpu_cell_bytes(const struct ibidi_gpu *g);
bool ibidi_gpu_lost(const struct ibidi_gpu *g);
void ibidi_gpu_look(const struct ibidi_gpu *g, ibid_engine_gpu *out);
/* Brings what ibidi_gpu_look says up to date. */
void ibidi_gpu_note(struct ibidi_gpu *g);
ibid_err ibidi_gpu_reserve(struct ibidi_gpu *g, ibidi_gpu_room *r, size_t bytes);
/* The same in pinned host memory; no copy from or to it may be under way. */
ibid_err ibidi_gpu_reserve_host(struct ibidi_gpu *g, ibidi_gpu_room *r, size_t bytes);

static inline size_t ibidi_gpu_pages_of(size_t tokens) {
    return (tokens + IBIDI_CU_PAGE - 1) / IBIDI_CU_PAGE;
}

/* Pins a sequence's blocks, or has it streamed if they do not fit, and gives it cells for live rows
 * [0, n_live). */
ibid_err ibidi_gpu_seq_ready(struct ibidi_gpu *g, ibid_seq *s, size_t n_live);
/* Brings its table up to date (masks may have changed); all: with a window, if it is streamed, for
 * a pass that reads everything. */
ibid_err ibidi_gpu_seq_place(struct ibidi_gpu *g, ibid_seq *s, bool all);
/* After the pass, whether it failed or not: the window goes back to the pool. */
void ibidi_gpu_seq_leave(struct ibidi_gpu *g, ibid_seq *s);
void ibidi_gpu_seq_close(struct ibidi_gpu *g, struct ibidi_gpu_seq *q);
/* Live pages of a layer that hold rows [row0, row0 + n), for ibidi_gpu_page. */
ibid_err ibidi_gpu_seq_read(const ibid_seq *s, size_t layer, size_t row0, size_t n);
/* A page read back at a kv head. */
const uint8_t *ibidi_gpu_page(const ibid_seq *s, size_t page, size_t layer, size_t head);

/* Begins to bring what is missing of a step's stored KV at a layer; work waits for it. */
ibid_err ibidi_gpu_load(struct ibidi_gpu *g, const ibid_step *step, size_t layer);
ibid_err ibidi_gpu_loaded(struct ibidi_gpu *g);

/* What a part of one row that selects needs in a pass. */
typedef struct ibidi_gpu_choice {
    ibid_select *select; /* NULL: it reads everything, */
    bool summarises;     /* and has summaries made meanwhile */
    ibid_seq *seq;
    ibidi_cu_choosing c;
    const ibidi_cu_choosing *there; /* c among the pass's tables */
    size_t fresh;                   /* pages of a layer to be summarised, at most */
    size_t grid;                    /* pages that launches are made for */
    float *mass;                    /* [n_chosen, 64] of a kv head */
    float *recall; /* [1] summed over layers and heads; read only if that is measured */
    uint64_t seen, last_tokens;
    size_t copy; /* the row, once more, that reads everything, if recall is measured */
    /* What it chose is brought, of a streamed sequence without a window: */
    bool fetches;
    uint32_t *which, *cells; /* [n_kv_heads, n_chosen] pinned host memory */
    ibidi_block **held;      /* pages of the layer, pinned */
    size_t n_held;
} ibidi_gpu_choice;
static inline bool ibidi_gpu_has_table(const ibidi_gpu_choice *c) {
    return c->select || c->summarises;
}
/* Waits for what was chosen at a layer, brings the pages that are missing in the pool, and tells
 * the device where they lie. */
ibid_err ibidi_gpu_fetch(struct ibidi_gpu *g, ibidi_gpu_choice *c, size_t layer);
/* Unpins what a choice holds; nothing may be under way that reads it. */
void ibidi_gpu_unhold(struct ibidi_gpu *g, ibidi_gpu_choice *c);

/* ---- gpu_select.c ---- */
/* Whether a step selects, whose sequence is ready, and among what. */
ibid_err ibidi_gpu_choice_plan(struct ibidi_gpu *g, const ibid_step *step, ibidi_gpu_choice *c);
/* Tables of n choices in pinned memory, and where they will lie on the device. */
typedef struct ibidi_gpu_choosings {
    ibidi_cu_seq *seqs;   /* [n, n_kv_heads] what they will have chosen */
    ibidi_cu_choosing *c; /* [n] */
    uint32_t *from;       /* [n, n_layers] */
    const ibidi_cu_choosing *d_c;
    const uint32_t *d_from;
} ibidi_gpu_choosings;
/* Gives n choices, whose sequences are placed, their scratch, and fills their tables. What they
 * hold is dropped by ibidi_gpu_choices_drop. */
ibid_err ibidi_gpu_choices_place(struct ibidi_gpu *g, ibidi_gpu_choice *c, size_t n,
                                 const ibidi_gpu_choosings *tables);
/* On the stream before any of them chooses. */
ibid_err ibidi_gpu_choices_start(struct ibidi_gpu *g, const ibidi_gpu_choice *c, size_t n);
/* Whether what a choice puts on the stream can be recorded. */
bool ibidi_gpu_choice_steady(const ibidi_gpu_choice *c);
/* Puts the choosing, or summarising, at a layer on the stream. q [n_heads, head_dim] of the row. */
ibid_err ibidi_gpu_choose(struct ibidi_gpu *g, const ibidi_gpu_choice *c, size_t layer,
                          const float *q);
/* ibidi_cu_mass for a row that selects: of what it read, into mass [64 stored pages]. */
ibid_err ibidi_gpu_choice_mass(struct ibidi_gpu *g, const ibidi_gpu_choice *c,
                               const ibidi_cu_attend *a, const ibidi_cu_row *row,
                               const uint64_t *d_heads, uint32_t row_lo, uint32_t row_hi,
                               float *mass);
void ibidi_gpu_choices_drop(struct ibidi_gpu *g, ibidi_gpu_choice *c, size_t n);
/* After the pass over n_layers layers, which succeeded: notes the summaries that there are now, and
 * adds to the steps' counts. */
ibid_err ibidi_gpu_choices_done(struct ibidi_gpu *g, const ibidi_gpu_choice *c, size_t n,
                                size_t n_layers);

/* Puts a pass on the work stream: put(arg), or what it put there when it was recorded under an
 * equal key. put may be called once to run and once to be recorded; it must neither wait nor
 * allocate. */
ibid_err ibidi_gpu_put_recorded(struct ibidi_gpu *g, const ibidi_gpu_key *key,
                                ibid_err (*put)(const void *arg), const void *arg);
void ibidi_gpu_graphs_close(struct ibidi_gpu *g);

/* Runs checked steps, whose sequences have base set. */
ibid_err ibidi_gpu_forward(ibid_engine *e, ibid_step *steps, size_t n_steps,
                           const atomic_bool *cancel);
#endif
