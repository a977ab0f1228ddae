/* One collection's derived state: view (memory), lexical index and key index (files), and how they
 * are brought forward to the store's generation.
 *
 * Bringing forward is idempotent: a change only says *which* documents and blocks to look at again;
 * what is true of them is read from the snapshot. So a replay may start too early, overlap a
 * rebuild, or be cut off anywhere. */
#ifndef IBID_RETRIEVER_COLLECTION_H
#define IBID_RETRIEVER_COLLECTION_H

#include "retriever/key_index.h"
#include "retriever/lexical_fts5.h"
#include "retriever/maxsim.h"
#include "retriever/view.h"

#include <pthread.h>

enum { IBIDI_DIR_MAX = 4160, IBIDI_NAME_MAX = 72 };

typedef struct ibidi_collection {
    pthread_rwlock_t lock;    /* read: search; write: everything that changes the fields below */
    pthread_mutex_t building; /* held by whoever builds the key index, before the lock */
    uint64_t number, created_ms;
    char name[IBIDI_NAME_MAX], dir[IBIDI_DIR_MAX];
    ibid_hash model;
    bool loaded;         /* view and lexical are open */
    uint64_t generation; /* of the store; view and lexical reflect it */
    uint64_t changed;    /* the last generation that changed something here */
    ibidi_view view;
    ibidi_lexical *lexical;
    ibidi_keyindex *keys; /* NULL: not opened yet, or too small a collection; follows the view */
    uint64_t changed_ns;  /* ibid_now_ns of the last change, for choosing a quiet moment */
} ibidi_collection;

/* index_dir: the folder that holds one folder per collection; both are created. */
ibid_err ibidi_collection_open(const char *index_dir, const ibid_collection *c,
                               ibidi_collection **out);
void ibidi_collection_close(ibidi_collection *c);

/* Brings view and lexical index to the snapshot's generation, which may move forward when the
 * snapshot is renewed on the way. Under the write lock. Afterwards c->generation is the snapshot's,
 * or it failed and the next call goes on from what was committed. *moved: something changed. */
ibid_err ibidi_collection_catch_up(ibidi_collection *c, ibid_snap *snap, bool *moved);
/* Throws view and lexical index away; the next catch-up makes them again. Under the write lock. */
ibid_err ibidi_collection_forget(ibidi_collection *c);
/* NOTFOUND unless a document of this number is in this collection. */
ibid_err ibidi_collection_holds(const ibidi_collection *c, ibid_snap *snap, uint64_t document,
                                ibid_document *out);
#endif
