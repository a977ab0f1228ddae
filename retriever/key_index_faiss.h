/* The approximate index of one collection's token keys, for collections too large to be scanned
 * whole. Sole includer of FAISS is key_index_faiss.c.
 *
 * FAISS finds near *tokens*; from them come candidate blocks, and exact MaxSim over the candidates'
 * stored keys decides (maxsim.h). One row per token, in the order added; a table says which block
 * each range of rows belongs to. Nothing is ever taken out: a block that is no longer alive is
 * passed over when searching, and when such rows are many the caller builds the index again and
 * swaps.
 *
 * On disk, in a folder of its own: keys-GENERATION.faiss, and "keys.manifest", which names it with
 * size and checksum and carries the block table, the store's generation and the calibration:
 *   0  "IKM1"  4 u32 version 1  8 u64 generation  16 calibration [32]  48 u32 dim  52 u32 0
 *   56 u64 rows  64 u64 blocks  72 u64 size and 80 u64 XXH3-64 of the .faiss file
 *   88 blocks * { u64 block, u32 tokens, u32 0 }   then u64 XXH3-64 of all before; little-endian
 * Both are written aside and renamed, the manifest last. Derived data: anything wrong with it is an
 * error of ibidi_keyindex_load and the caller builds it again. One thread at a time, except
 * ibidi_keyindex_candidates. */
#ifndef IBID_RETRIEVER_KEY_INDEX_H
#define IBID_RETRIEVER_KEY_INDEX_H

#include "retriever/maxsim.h"
#include "retriever/view.h"

typedef struct ibidi_keyindex ibidi_keyindex;

typedef struct ibidi_keyindex_opts {
    uint64_t flat_max; /* rows up to which vectors are kept as they are; 0 = 16384 */
    uint64_t ivf_min;  /* rows from which clusters are used; 0 = 1M */
    size_t threads;    /* of OpenMP, for building; 0 = 1 */
} ibidi_keyindex_opts;

typedef struct ibidi_keyindex_stamp {
    uint64_t generation; /* of the store */
    ibid_hash calibration;
    size_t dim;
} ibidi_keyindex_stamp;

/* Builds from the stored keys of all blocks of the view (those of another calibration are left
 * out). Renews the snapshot when it ages. */
ibid_err ibidi_keyindex_build(const ibidi_keyindex_opts *o, const ibidi_keyindex_stamp *stamp,
                              ibid_snap *snap, const ibidi_view *view, ibidi_keyindex **out);
void ibidi_keyindex_close(ibidi_keyindex *x);
/* Adds the blocks of the view that are not in it yet; the stamp's generation moves to `generation`.
 */
ibid_err ibidi_keyindex_extend(ibidi_keyindex *x, ibid_snap *snap, const ibidi_view *view,
                               uint64_t generation);

ibid_err ibidi_keyindex_save(const ibidi_keyindex *x, const char *dir);
/* want->generation is not compared (the caller replays from the one found) but may not be passed.
 * Errors: NOTFOUND (none there), CORRUPT, MISMATCH (another calibration, or newer than the store).
 */
ibid_err ibidi_keyindex_load(const char *dir, const ibidi_keyindex_stamp *want,
                             const ibidi_keyindex_opts *o, ibidi_keyindex **out);
void ibidi_keyindex_remove(const char *dir);
/* Reads a manifest's bytes: block table into *blocks (ibid_free). Pure, for fuzzing. CORRUPT. */
ibid_err ibidi_manifest_read(const void *data, size_t n, ibidi_keyindex_stamp *stamp,
                             uint64_t *rows, uint64_t *file_size, uint64_t *file_sum,
                             ibidi_live **blocks, size_t *n_blocks);

const ibidi_keyindex_stamp *ibidi_keyindex_stamped(const ibidi_keyindex *x);
uint64_t ibidi_keyindex_rows(const ibidi_keyindex *x);
uint64_t ibidi_keyindex_trained_rows(const ibidi_keyindex *x); /* rows when it was built */
bool ibidi_keyindex_has(const ibidi_keyindex *x, uint64_t block);
uint64_t ibidi_keyindex_dead_rows(const ibidi_keyindex *x, const ibidi_view *view);
const char *ibidi_keyindex_kind(const ibidi_keyindex *x); /* "Flat", "SQ8", "IVF1024,SQ8" */

/* The up to `max` live blocks with the best partial scores (a question token's best hit in a block,
 * weighted; tokens without a hit there count nothing), from the k nearest rows of each question
 * token. blocks [max] out, best first. *all: every row was among them. */
ibid_err ibidi_keyindex_candidates(const ibidi_keyindex *x, const ibidi_asking *q,
                                   const ibidi_view *view, size_t k, uint64_t *blocks, size_t max,
                                   size_t *n, bool *all);
/* The mean |stored - indexed| over every `step`-th block's rows (verify): half a step of a 1/127
 * grid at most, where rows stand for the tokens they should. */
ibid_err ibidi_keyindex_compare(ibidi_keyindex *x, ibid_snap *snap, size_t step, double *mean);
#endif
