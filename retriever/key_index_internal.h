/* Between the key index's own files. */
#ifndef IBID_RETRIEVER_KEY_INDEX_INTERNAL_H
#define IBID_RETRIEVER_KEY_INDEX_INTERNAL_H

#include "retriever/key_index.h"

enum { IBIDI_KEYS_PATH = 4300, IBIDI_CELL_GROUP = 64 };
#define IBIDI_NO_ROWS UINT64_MAX

typedef struct ibidi_keyrow { /* keys of one block */
    uint64_t block, panel;
    uint32_t n_tokens;
    bool dead;
} ibidi_keyrow;

/* Where the parts of a .cells file lie. */
typedef struct ibidi_keyplan {
    uint64_t cells, starts, posts, keys, size;
} ibidi_keyplan;

struct ibidi_keyindex {
    ibidi_keyindex_stamp stamp;
    uint8_t *map;
    uint64_t size, rows, trained_rows, n_posts;
    const int8_t *cells;    /* [n_cells, dim] */
    const uint64_t *starts; /* [n_cells + 1] */
    const uint32_t *posts;  /* [n_posts] */
    const uint8_t *keys;    /* panels of all blocks */
    ibidi_keyrow *blocks;   /* [n], ascending block */
    size_t n, n_cells, probes;
    uint64_t *extra; /* ascending */
    size_t n_extra, room_extra;
    uint64_t dead_rows, extra_rows;
};

ibid_err ibidi_keyplan_make(uint64_t dim, uint64_t panels, uint64_t cells, uint64_t posts,
                            ibidi_keyplan *out);
uint64_t ibidi_keyplan_panels(const ibidi_manifest *m); /* of all its blocks */
/* Block i's keys; token t's among them as a row. */
ibid_key_panels ibidi_keyindex_block(const ibidi_keyindex *x, size_t i);
void ibidi_keyindex_row(const ibidi_keyindex *x, size_t i, size_t t, int8_t *key);
void ibidi_keyindex_path(char out[IBIDI_KEYS_PATH], const char *dir, uint64_t generation,
                         bool aside);
/* Opens what a manifest describes, at `path` (the file may still lie aside). sum: check it. */
ibid_err ibidi_keyindex_map(const char *path, ibidi_manifest *m, bool sum, ibidi_keyindex **out);
/* Puts a file that lies aside, of an index opened from there, in its place and names it. */
ibid_err ibidi_keyindex_publish(const ibidi_keyindex *x, const char *dir);

/* Spherical k-means over rows [n, dim], n >= k: centroids [k, dim] (key_index_faiss.c). */
ibid_err ibidi_cells_train(const float *rows, size_t n, size_t dim, size_t k, size_t rounds,
                           size_t threads, float *centroids);
#endif
