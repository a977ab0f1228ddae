/* The index of one collection's token keys: a derived, memory-mapped copy of them in block order,
 * turned for the kernel that scores them (ibid_key_panels), and, for collections too large to be
 * scanned whole, cells: centroids of tokens, each with the blocks that have a token near it.
 *
 * A search takes each question token's nearest cells, adds up for every block what its best cell
 * would score, and so gets candidates; exact MaxSim over the candidates' keys decides (maxsim.h).
 *
 * A file is never changed. What came since is searched exactly from the store (extra), what is gone
 * is passed over (dead), both told by ibidi_keyindex_follow; when they are many the caller builds
 * again and swaps. A build writes the file and opens it like any other, so answers before and after
 * a restart are the same.
 *
 * On disk: keys-GENERATION.cells, and "keys.manifest", which names it with size and checksum and
 * carries the block table:
 *   0  "IKM3"  4 u32 version 3  8 u64 generation  16 calibration [32]  48 u32 dim  52 u32 probes
 *   56 u64 rows  64 u64 blocks  72 u64 size and 80 u64 XXH3-64 of the .cells file
 *   88 u64 cells  96 u64 postings  104 u64 rows when the cells were trained
 *   112 blocks * { u64 block, u32 tokens, u32 0 }, ascending   then u64 XXH3-64 of all before
 * The .cells file: centroids i8 [cells, dim], u64 starts [cells + 1], u32 postings (indexes into
 * the block table, ascending in a cell), and each block's keys in panels, from a new panel on; each
 * part from a multiple of 64 bytes. Little-endian. Both are written aside and renamed, the manifest
 * last. Derived data: anything wrong is an error of ibidi_keyindex_load and the caller builds it
 * again. */
#ifndef IBID_RETRIEVER_KEY_INDEX_H
#define IBID_RETRIEVER_KEY_INDEX_H

#include "attention/kernels/kernels.h"
#include "attention/kernels/pool.h"
#include "kvstore/kvstore.h"
#include "retriever/view.h"

struct ibidi_asking; /* maxsim.h */

typedef struct ibidi_keyindex ibidi_keyindex;

typedef struct ibidi_keyindex_opts {
    uint64_t min_rows;   /* tokens from which a collection has the copy; 0 = 32768 */
    uint64_t cells_min;  /* tokens from which there are cells; 0 = 1M */
    uint64_t cell_rows;  /* tokens a cell stands for; 0 = 40 */
    uint64_t extra_rows; /* tokens not in it up to which it is never built again; 0 = 65536 */
    size_t threads;      /* for building; 0 = 1 */
    const ibid_kernels *kernels;
} ibidi_keyindex_opts;

typedef struct ibidi_keyindex_stamp {
    uint64_t generation; /* of the store */
    ibid_hash calibration;
    size_t dim;
} ibidi_keyindex_stamp;

/* Writes the files from the stored keys of all blocks of the view (those of another calibration are
 * left out) and opens them. Renews the snapshot when it ages. May run while another index of the
 * folder is searched. */
ibid_err ibidi_keyindex_build(const ibidi_keyindex_opts *o, const ibidi_keyindex_stamp *stamp,
                              ibid_snap *snap, const ibidi_view *view, const char *dir,
                              ibidi_keyindex **out);
/* want->generation may not be passed. Errors: NOTFOUND (none there), CORRUPT, MISMATCH (another
 * calibration, or newer than the store). Call ibidi_keyindex_sync before searching. */
ibid_err ibidi_keyindex_load(const char *dir, const ibidi_keyindex_stamp *want,
                             ibidi_keyindex **out);
void ibidi_keyindex_close(ibidi_keyindex *x);
void ibidi_keyindex_remove(const char *dir);

typedef struct ibidi_manifest { /* what a manifest says; blocks: ibid_free */
    ibidi_keyindex_stamp stamp;
    uint64_t rows, file_size, file_sum, n_cells, n_posts, trained_rows;
    size_t probes, n_blocks;
    ibidi_live *blocks; /* ids NULL */
} ibidi_manifest;
/* Reads a manifest's bytes. Pure, for fuzzing. CORRUPT, NOMEM. */
ibid_err ibidi_manifest_read(const void *data, size_t n, ibidi_manifest *out);

/* ---- What is alive ---- */
/* Makes dead and extra what they are for this view. */
ibid_err ibidi_keyindex_sync(ibidi_keyindex *x, const ibidi_view *view);
/* A block came to life or went. */
ibid_err ibidi_keyindex_follow(ibidi_keyindex *x, uint64_t block, size_t n_tokens, bool alive);

typedef struct ibidi_keyindex_facts {
    ibidi_keyindex_stamp stamp;
    uint64_t rows, dead_rows, extra_rows, trained_rows, bytes; /* of the file */
    size_t cells, probes;
    const uint64_t *extra; /* [n_extra] live blocks that are not in the file, ascending */
    size_t n_extra;
} ibidi_keyindex_facts;
ibidi_keyindex_facts ibidi_keyindex_told(const ibidi_keyindex *x);

/* ---- Searching; any number of threads ---- */
/* A block's keys; false if they are not in the file. *hint: where the one before was (0 at first);
 * ascending blocks then cost nothing. */
bool ibidi_keyindex_keys(const ibidi_keyindex *x, uint64_t block, size_t *hint,
                         ibid_key_panels *out);
/* The up to `max` live blocks of the file with the best sums, best first. A block that none of a
 * question token's nearest `probes` cells holds is given the last of their scores for it. pool
 * NULL: this thread only; else the caller holds it. blocks [max] out. *all: every live block of the
 * file was touched. */
ibid_err ibidi_keyindex_candidates(const ibidi_keyindex *x, const ibid_kernels *k, ibid_pool *pool,
                                   const struct ibidi_asking *q, size_t probes, uint64_t *blocks,
                                   size_t max, size_t *n, bool *all);
/* Blocks, of every step-th, whose keys differ from the stored ones (verify). */
ibid_err ibidi_keyindex_compare(const ibidi_keyindex *x, ibid_snap *snap, size_t step,
                                uint64_t *differ);
#endif
