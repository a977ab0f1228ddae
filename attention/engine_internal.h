/* What the engine's files share. The forward pass goes stretch by stretch: the rows of up to
 * IBIDI_CHUNKS chunks travel from layer to layer together, so that a context is laid out once a
 * layer for all of them; within a layer chunk by chunk, up to IBIDI_CHUNK rows of all steps, so
 * that scratch is bounded and weights serve many rows.
 *
 * engine.c          opening, checking, scratch, the layers in order, the output head
 * engine_linear.c   weights times activations, split into parts for the pool
 * engine_pack.c     weights in panels for integer arithmetic, and their file
 * engine_attend.c   attention of a chunk over segments and live rows; attention mass
 * engine_tiles.c    the context of steps with many rows, laid into tiles
 * engine_select.c   which pages a decoding row reads
 * engine_seq.c      sequences: segments, pages of live KV, export */
#ifndef IBID_ATTENTION_ENGINE_INTERNAL_H
#define IBID_ATTENTION_ENGINE_INTERNAL_H

#include "attention/engine.h"
#include "attention/engine_pack.h"
#include "attention/kernels/pool.h"
#include "rpc/base/mem.h"

enum {
    IBIDI_CHUNK = 512,   /* rows that pass a layer together */
    IBIDI_CHUNKS = 4,    /* of a stretch */
    IBIDI_WORD = 64,     /* tokens of a word of a mask: the kernels' key tile */
    IBIDI_PAGE = 64,     /* live tokens per page of f32 KV */
    IBIDI_PAGE_I8 = 512, /* and of q8_0: each call of attn_i8 rounds its queries anew */
    IBIDI_TILE = 192,    /* query rows (rows x heads of a kv head) an attention part takes */
    IBIDI_SPLIT = 1024,  /* least tokens of a split of a long context */
    IBIDI_SPLITS_MAX = 32,
    IBIDI_MANY = 64,     /* rows of a step from which on its context is laid into tiles */
    IBIDI_FEW_TASKS = 16 /* a step with fewer attention parts than this has its context split */
};

/* A segment in a sequence. cos and sin (negative) of its offset turn a query back by it, cos and
 * forth a key forth; NULL if it is 0. */
typedef struct ibidi_seg {
    ibid_segment s;
    uint64_t start; /* global position of its first token */
    size_t n_tokens;
    float *cos, *sin, *forth;
} ibidi_seg;

/* Live KV lies in pages of page_tokens tokens over all layers: [layer][kv head][K, V][token][dim],
 * q8_0's scales behind each V, so that growing copies nothing and each (page, layer, head) is a
 * view of its own. What no token has touched costs no memory. */
struct ibid_seq {
    ibid_engine *engine;
    ibidi_seg *segs;
    size_t n_segs, seg_room, n_stored; /* n_stored: tokens of all segments */
    uint64_t end;                      /* one past the last stored global position */
    uint8_t **pages;
    size_t n_pages, page_room;
    uint32_t *positions; /* [n_live], ascending */
    size_t n_live, live_room;
    size_t base;               /* live rows before the running forward */
    bool busy;                 /* part of the running forward */
    struct ibidi_gpu_seq *gpu; /* its pages there; pages is empty then (attention/cuda/gpu.h) */
    struct ibidi_pick *pick;   /* NULL until a step selects */
    bool picks;                /* the running forward's step does */
    size_t live_kept; /* of the live rows that the GPU's summaries know, those that stayed */
};

/* The rows of one step that are in the chunk: rows [row0, row0 + n) of the step lie at [at, at + n)
 * of the chunk. They shrink in the step's last layer to those still needed. */
typedef struct ibidi_piece {
    ibid_step *step;
    ibid_seq *seq;
    size_t row0, n, at, n_layers;
    size_t end;                    /* live rows of the sequence once this chunk is stored */
    size_t n_splits;               /* of the context; 1: none */
    size_t split;                  /* tokens in a split */
    size_t task0;                  /* its first attention task in the chunk */
    size_t partial0;               /* its first row state among the chunk's partial ones */
    struct ibidi_pick *pick;       /* NULL: it reads everything */
    struct ibidi_context *context; /* its step's; NULL: it is not laid */
} ibidi_piece;

/* Where a chunk begins and ends: rows [row0, ...) of step0 to [..., row1) of step1. */
typedef struct ibidi_chunk {
    size_t step0, row0, step1, row1;
} ibidi_chunk;

/* A token of a laid context: of a segment, or the live row `token` (segment n_segs). */
typedef struct ibidi_slot {
    uint32_t segment, token;
} ibidi_slot;

/* What the rows of one step in the stretch see: slots in the order of their positions, and how many
 * of those each row sees; and the tiles of one layer, [n_kv_heads, n_tiles], of which those of the
 * first n_laid slots are filled. */
typedef struct ibidi_context {
    const ibid_step *step;
    size_t slot0, sees0, tile0, n_tiles; /* in ibidi_laid's arrays */
    size_t live0;                        /* live number of the first row */
    size_t n_laid;
    size_t part0, first, n_parts; /* of the running lay: tiles [first, first + n_parts) a head */
} ibidi_context;

typedef struct ibidi_laid {
    ibidi_context *contexts;
    ibidi_slot *slots;
    uint32_t *sees;
    uint8_t *tiles;
    size_t n, room, slot_room, row_room, tile_room;
} ibidi_laid;

typedef struct ibidi_thread {
    void *matmul;              /* the kernels' scratch */
    float *q, *q_turned, *acc; /* [tile_rows * group, head_dim] */
    float *lse;                /* [tile_rows * group] */
    float *laid;               /* [2, IBID_KV_TILE, head_dim] keys, values */
    ibid_attn_state *state;
    uint32_t *visible;
} ibidi_thread;

/* Activations of a chunk; all row-major, ld in floats. What stays from one layer to the next lies
 * in arrays of the whole stretch. */
typedef struct ibidi_rows {
    float *x;         /* [n_embd] the residual stream; stays */
    float *h;         /* [wide] the normalised input, then attention's output */
    float *q;         /* [wide] queries, rotated and scaled; then what is added to x; stays */
    float *k, *v;     /* [n_kv_heads * head_dim] */
    float *gate, *up; /* [n_ff] */
    float *cos, *sin; /* [n_rot / 2] of the row's position; stay */
    float *lse;       /* [n_heads] */
    uint8_t *packed;  /* a linear layer's input as integers; NULL unless int8 */
    size_t room;      /* rows of a stretch there is space for */
} ibidi_rows;

struct ibid_engine {
    const ibid_model *m;
    const ibid_kernels *k;
    struct ibidi_gpu *gpu;                       /* NULL: the CPU computes */
    void (*lost)(void *arg, const char *detail); /* NULL once called */
    void *lost_arg;
    ibid_pool *pool;
    bool int8;
    ibidi_pack pack; /* empty unless int8 */
    size_t n_threads, group, q_dim, kv_dim, wide, tile_rows;
    float scale;            /* 1 / sqrt(head_dim) */
    ibid_kv_type live_type; /* q8_0 with int8, where head_dim allows it; else f32 */
    size_t page_tokens, page_bytes;
    void (*attn)(const ibid_attn_args *a);
    void (*attn_mass)(const ibid_attn_args *a, const float *lse, float *mass);

    ibidi_thread *threads;
    void *thread_block;

    ibidi_rows all;  /* the stretch's first row */
    ibidi_rows rows; /* the chunk's */
    void *row_block;
    ibid_step *steps; /* of the running forward */
    ibidi_chunk chunks[IBIDI_CHUNKS];
    size_t n_chunks;
    float *logits; /* [logit_rows, n_vocab] for batches of steps */
    size_t logit_rows;
    ibidi_piece *pieces;
    size_t n_pieces, piece_room;
    size_t n_rows; /* rows of the chunk now */
    ibid_attn_state *partial_state;
    float *partial_acc;
    size_t partial_room; /* row states */
    ibidi_laid laid;
};

/* cos and sin of position * freq, in double, rounded to float; sin times sign. */
void ibidi_rope_table(const ibid_rope *r, uint64_t position, float sign, float *cos, float *sin);

/* The piece that holds a row of the chunk. No piece is empty. */
const ibidi_piece *ibidi_piece_of(const ibid_engine *e, size_t row);

/* engine_seq.c */
/* Room for n live rows; the sequence is unchanged otherwise. */
ibid_err ibidi_seq_reserve(ibid_seq *s, size_t n);
/* A page at (layer, kv head) as a view of one head. */
ibid_kv_view ibidi_page_view(const ibid_seq *s, size_t page, size_t layer, size_t head);
/* Tokens [t0, t1) of one head as a view of their own; t0 a multiple of 64. */
ibid_kv_view ibidi_slice(const ibid_kv_view *v, size_t head, size_t t0, size_t t1);
/* One token of one head of a layer, from f32, into writable planes. */
void ibidi_put_keys(const ibid_kernels *k, const ibid_kv_view *v, size_t head, size_t token,
                    const float *src);
void ibidi_put_values(const ibid_kernels *k, const ibid_kv_view *v, size_t head, size_t token,
                      const float *src);

/* Keys and values of tokens [token, token + n) of a head as they lie, in f32: [n, head_dim]. */
void ibidi_unpack(const ibid_kernels *k, const ibid_kv_view *v, size_t head, size_t token, size_t n,
                  float *keys, float *values);

/* engine_linear.c */
typedef struct ibidi_out {
    const ibid_tensor *w;
    float *y;
    size_t ldy;
    const ibid_panels *panels; /* of w; NULL or without data: f32 arithmetic on w */
    float fine_above;          /* with panels: how x is rounded (kernels.h, q8_pack) */
} ibidi_out;
/* y[o][i, :] = w[o] x[i, :] for i < n; up to 3 matrices with the same input. swiglu: the first two
 * are gate and up, and gate becomes silu(gate) * up. */
void ibidi_linear(ibid_engine *e, const float *x, size_t ldx, size_t n, const ibidi_out *o,
                  size_t n_out, bool swiglu);
/* Calls fn(e, row) for rows [0, n), on the pool when there are many. */
void ibidi_each_row(ibid_engine *e, size_t n, void (*fn)(ibid_engine *e, size_t row, size_t layer),
                    size_t layer);

/* engine_attend.c */
/* How a step's context is split: a property of the step alone, so that a result does not depend on
 * what else is in the batch. */
void ibidi_plan_splits(const ibid_engine *e, ibidi_piece *p);
/* Row states that the pieces' partial results take. */
size_t ibidi_partials(ibid_engine *e);
/* Attention of all rows of the chunk: rows.q -> rows.h, then probes. */
void ibidi_attend(ibid_engine *e, size_t layer);

/* engine_tiles.c */
/* Begins a stretch: no context is laid. */
void ibidi_tiles_begin(ibid_engine *e);
/* Pieces of the stretch in order, their splits planned: what is laid for them. Errors: NOMEM. */
ibid_err ibidi_tiles_plan(ibid_engine *e, const ibidi_piece *p);
ibid_err ibidi_tiles_ready(ibid_engine *e);
/* The context of a piece's step, or NULL. */
ibidi_context *ibidi_context_of(ibid_engine *e, const ibidi_piece *p);
/* A layer begins: nothing is laid of it yet. */
void ibidi_tiles_layer(ibid_engine *e);
/* Lays what the chunk's pieces see, their live rows being stored. */
void ibidi_tiles_lay(ibid_engine *e, size_t layer);
const uint8_t *ibidi_tiles_of(const ibid_engine *e, const ibidi_context *c, size_t head);
/* How many leading tokens of its context a live row sees. */
uint32_t ibidi_row_sees(const ibid_engine *e, const ibidi_context *c, size_t live);
void ibidi_tiles_close(ibid_engine *e);

/* engine_select.c */
/* A page: tokens [start, start + n) of the context's index space (engine_attend.c). */
typedef struct ibidi_unit {
    size_t segment, t0; /* where it begins; segment n_segs: live rows */
    size_t start, n;
    uint64_t seen; /* bits of its tokens that are not masked */
} ibidi_unit;
/* A sequence's pages and what is known of them, and what its row has chosen at this layer. */
typedef struct ibidi_pick {
    ibidi_unit *units; /* [n] of the segments, then of live rows but the last ones */
    uint32_t *tokens;  /* [n] seen in each */
    size_t n, n_stored, room, n_segs;
    size_t seen;        /* by the row */
    uint8_t *summaries; /* [n_layers, n_kv_heads] of ibid_page_sums */
    float *spread;      /* [n_layers, n_kv_heads, 2, head_dim] of ibid_page_spread, all units */
    size_t *done;       /* [n_layers] units whose summaries are there */
    /* Of one row, [n_kv_heads] each. */
    float *padded;              /* [group, ibid_page_padded] */
    uint32_t *quads;            /* of ibid_page_query */
    float *query, *unit, *rank; /* of ibid_page_query */
    float *scores, *weight;     /* [group, room], [room] */
    uint32_t *heap;             /* [room] */
    uint64_t *chosen;           /* [room / 64] */
    struct ibidi_picked {
        uint64_t read;
        double recall;
    } * picked;
    void *block; /* of all arrays */
} ibidi_pick;
/* Before a step: sets the sequence's picks, base being set, and lists its pages if the step
 * selects. Errors: NOMEM. */
ibid_err ibidi_pick_ready(ibid_engine *e, const ibid_step *s);
void ibidi_pick_close(ibidi_pick *p);
/* Live rows from count on are gone. */
void ibidi_pick_truncate(ibid_seq *s);
/* Makes the summaries of a layer that are missing. */
void ibidi_pick_summarise(ibid_engine *e, const ibidi_piece *p, size_t layer);
/* Chooses for a kv head: q [group, head_dim]. The bitmap over units. */
const uint64_t *ibidi_pick_choose(const ibid_engine *e, const ibidi_piece *p, size_t layer,
                                  size_t head, const float *q, ibidi_thread *th);
/* Whether a kv head has chosen the page that token t0 of a segment begins. */
bool ibidi_pick_has(const ibidi_pick *p, size_t head, size_t segment, size_t t0);
/* Adds up what the kv heads have done at a layer. */
void ibidi_pick_count(const ibid_engine *e, const ibidi_piece *p);
#endif
