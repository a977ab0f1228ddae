/* How attention of a pass is cut up: steps into tiles of query rows, tiles into items, one for each
 * thread block. A step's cut depends on the step alone, so that its result does not depend on what
 * else is in the pass. Host code, pure but for memory. */
#ifndef IBID_ATTENTION_CUDA_PLAN_H
#define IBID_ATTENTION_CUDA_PLAN_H

#include "attention/cuda/layout.h"
#include "rpc/base/err.h"

#include <stdbool.h>

/* Thread blocks that a step is cut into: as many as the 132 units of an H200 run at once, so that
 * none is left for a second round that few units would work on. */
enum { IBIDI_CU_BLOCKS = 132 * IBIDI_CU_RESIDENT };

/* Rows [row0, row0 + n) of the pass: a step of a sequence. */
typedef struct ibidi_cu_piece {
    uint32_t seq, row0, n;
    const ibidi_cu_page *pages; /* of the sequence, on the host; stored ones ascend by start */
    uint32_t first_live;        /* pages before are stored ones */
    uint32_t n_turned;          /* ways its queries are turned, with not at all */
    uint32_t last_position, last_live; /* of its last row */
    /* Not 0: of one row that has chosen so many pages at each kv head, those of sequence chosen_seq
     * + kv head. */
    uint32_t n_chosen, chosen_seq;
} ibidi_cu_piece;

/* Fine tiles come first, and fine items. */
typedef struct ibidi_cu_plan {
    ibidi_cu_tile *tiles;
    ibidi_cu_item *items;
    size_t n_tiles[2], n_items[2]; /* [fine] */
    size_t tile_room, item_room;
    size_t n_turned;   /* fragments of turned queries */
    size_t max_turned; /* of a tile */
    size_t n_states;   /* row states of all partials */
} ibidi_cu_plan;

/* Whether a step of n rows has fine tiles: those of few rows, which decoding has. */
bool ibidi_cu_is_fine(const ibidi_cu_shape *m, size_t n);
/* Writes the plan, reusing its memory, and each row's tile0, tiles, tile_rows and pair0. */
ibid_err ibidi_cu_plan_make(const ibidi_cu_shape *m, const ibidi_cu_piece *pieces, size_t n_pieces,
                            ibidi_cu_row *rows, ibidi_cu_plan *out);
/* Adds empty items at the end, of tiles of one kind, until their number is a multiple of `to`:
 * grids that change less often. The plan has tiles of that kind alone. */
ibid_err ibidi_cu_plan_pad(ibidi_cu_plan *p, size_t to);
void ibidi_cu_plan_fini(ibidi_cu_plan *p);
#endif
