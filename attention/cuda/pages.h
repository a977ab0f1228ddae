/* Device memory for KV: cells of one size, each a page at a layer (layout.h). Live rows take single
 * cells; stored blocks take theirs for all layers at once and stay after use, for the next request:
 * the block used longest ago makes room, but never one that a sequence has pinned.
 *
 * Not thread-safe: the engine's callers take turns. */
#ifndef IBID_ATTENTION_CUDA_PAGES_H
#define IBID_ATTENTION_CUDA_PAGES_H

#include "attention/cuda/device.h"

typedef struct ibidi_pages ibidi_pages;

/* A stored block in the pool; or a page of one at a layer, of a context that the pool does not hold
 * (n_layers and n_pages 1). */
typedef struct ibidi_block {
    uint64_t key; /* 0: of one sequence only, dropped with its pin */
    uint32_t n_layers, n_pages;
    size_t loaded;  /* layers [0, loaded) are there; the loader raises it */
    uint64_t heads; /* of a single page: bitmap of the kv heads that are there */
    size_t pins;
    struct ibidi_block *newer, *older; /* among those unpinned */
    struct ibidi_block *next;          /* with the same hash */
    uint32_t cells[];                  /* [n_layers, n_pages] */
} ibidi_block;

typedef struct ibidi_pages_stats {
    size_t cells, in_use, pinned_blocks, blocks;
    uint64_t hits, misses, evicted; /* blocks */
} ibidi_pages_stats;

/* At least one cell; fewer than wanted if the device has not as many, never fewer than least.
 * Zeroed. Errors: NOMEM, BACKEND. */
ibid_err ibidi_pages_open(ibid_device *d, ibidi_cu_stream s, size_t cell_bytes, size_t want,
                          size_t least, ibidi_pages **out);
void ibidi_pages_close(ibidi_pages *p);
uint8_t *ibidi_pages_memory(const ibidi_pages *p);
size_t ibidi_pages_cell_bytes(const ibidi_pages *p);
ibidi_pages_stats ibidi_pages_look(const ibidi_pages *p);

/* A cell for live rows. NOMEM: all are pinned; says how many. */
ibid_err ibidi_pages_take(ibidi_pages *p, uint32_t *cell);
void ibidi_pages_give(ibidi_pages *p, uint32_t cell);

/* The block of a key, pinned once more; new ones have loaded 0. A block of another shape than asked
 * for is not that block: INVAL. */
ibid_err ibidi_pages_pin(ibidi_pages *p, uint64_t key, size_t n_layers, size_t n_pages,
                         ibidi_block **out);
void ibidi_pages_unpin(ibidi_pages *p, ibidi_block *b);
#endif
