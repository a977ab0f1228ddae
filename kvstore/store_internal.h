/* Inside the store: LMDB without its types (store_lmdb.c), and the records of every table
 * (tables.c). Byte formats: docs/format.md. */
#ifndef IBID_STORE_INTERNAL_H
#define IBID_STORE_INTERNAL_H

#include "kvstore/kv_value.h"
#include "kvstore/kvstore.h"
#include "kvstore/record.h"

#include <pthread.h>

/* ---- Tables. Order is part of no format: LMDB finds them by name; the number salts checksums, so
 * it is append-only. ---- */
#define IBIDI_TABLE_MAP(X)                                                                         \
    X(META, "meta")                                                                                \
    X(MODEL, "model") X(PREFIX, "prefix") X(COLLECTION, "collection")                              \
        X(COLLECTION_NO, "collection_no") X(DOCUMENT_ID, "document_id") X(DOCUMENT, "document")    \
            X(MEMBER, "member") X(TEXT, "text") X(CHUNK, "chunk") X(BLOCK_HASH, "block_hash")      \
                X(BLOCK, "block") X(BLOCK_STATE, "block_state") X(USE, "use") X(HOLD, "hold")      \
                    X(ORPHAN, "orphan") X(LRU, "lru") X(KV, "kv") X(KEYS, "keys")                  \
                        X(CHANGE, "change") X(JOB, "job")

typedef enum ibidi_table {
#define X(sym, name) IBIDI_##sym,
    IBIDI_TABLE_MAP(X)
#undef X
        IBIDI_N_TABLES
} ibidi_table;
const char *ibidi_table_name(ibidi_table t);

typedef struct ibidi_slice {
    const uint8_t *p;
    size_t n;
} ibidi_slice;

/* Keys: numbers big-endian, so that byte order is number order. */
typedef struct ibidi_key {
    uint8_t b[72];
    size_t n;
} ibidi_key;
ibidi_key ibidi_key_1(uint64_t a);
ibidi_key ibidi_key_2(uint64_t a, uint64_t b);
ibidi_key ibidi_key_3(uint64_t a, uint64_t b, uint64_t c);
ibidi_key ibidi_key_hash(const ibid_hash *h);
ibidi_key ibidi_key_hash_u16(const ibid_hash *h, size_t v);
ibidi_key ibidi_key_u64_hash(uint64_t a, const ibid_hash *h);
ibidi_key ibidi_key_u64_u16(uint64_t a, size_t v);
ibidi_key ibidi_key_str(ibid_str s); /* at most 64 bytes */

/* ---- One shared environment per folder and process ---- */
typedef struct ibidi_verified ibidi_verified; /* which KV values this process has checked */
typedef struct ibidi_touch {
    uint64_t block, ms;
} ibidi_touch;

/* What handles on one environment share besides LMDB. */
typedef struct ibidi_shared {
    pthread_mutex_t write_mu; /* one writing call at a time, its reopening included */
    pthread_mutex_t mu;       /* guards what follows */
    ibidi_verified *verified;
    ibidi_touch *touched;
    size_t n_touched, room_touched;
    uint64_t clock_ms;    /* last use time given out; never runs backwards */
    uint64_t snap_age_ns; /* the cap */
    uint64_t history_max; /* change rows kept */
} ibidi_shared;

typedef struct ibidi_env ibidi_env;
/* first_writer: this handle made the process the store's writer. Errors: NOTFOUND (a reader before
 * any writer), BUSY (another process writes), NOTSUP, CORRUPT, IO, NOMEM. */
ibid_err ibidi_env_acquire(const char *dir, bool writer, uint64_t map_size, ibidi_env **out,
                           bool *first_writer);
void ibidi_env_release(ibidi_env *v, bool writer);
ibidi_shared *ibidi_env_shared(ibidi_env *v);
void ibidi_env_info(ibidi_env *v, uint64_t *file_bytes, uint64_t *map_size);
/* A commit failed: nothing is acknowledged until ibidi_env_heal reopened the environment. */
void ibidi_env_break(ibidi_env *v);
ibid_err ibidi_env_heal(ibidi_env *v);
ibid_err ibidi_env_grow(ibidi_env *v);
void ibidi_env_reader_check(ibidi_env *v); /* frees slots of dead readers; at most once a minute */

/* ---- Transactions: caller's storage ---- */
typedef struct ibidi_txn {
    ibidi_env *env;
    void *mdb;
    bool write;
    bool map_full; /* a put found no room in the map */
    bool failed;   /* reading or writing the file failed: reopen before going on */
    uint64_t put_bytes;
} ibidi_txn;

ibid_err ibidi_txn_begin(ibidi_env *v, bool write, ibidi_txn *t);
ibid_err ibidi_txn_commit(ibidi_txn *t); /* ends it either way */
void ibidi_txn_abort(ibidi_txn *t);      /* fine on an ended or zeroed one */

/* Raw rows (KV values). NOTFOUND sets no detail. */
ibid_err ibidi_raw_get(ibidi_txn *t, ibidi_table tab, const ibidi_key *k, ibidi_slice *out);
ibid_err ibidi_raw_reserve(ibidi_txn *t, ibidi_table tab, const ibidi_key *k, size_t n, void **out);
ibid_err ibidi_del(ibidi_txn *t, ibidi_table tab, const ibidi_key *k); /* NOTFOUND */
/* Records: a checksum over table, key and payload before the payload, padded to 8 bytes. */
ibid_err ibidi_get(ibidi_txn *t, ibidi_table tab, const ibidi_key *k, ibidi_rd *out);
ibid_err ibidi_put(ibidi_txn *t, ibidi_table tab, const ibidi_key *k, const void *payload,
                   size_t n);
ibid_err ibidi_put_wr(ibidi_txn *t, ibidi_table tab, const ibidi_key *k, const ibidi_wr *w);
/* Opens a raw value as a record. */
ibid_err ibidi_record_open(ibidi_table tab, ibidi_slice key, ibidi_slice value, ibidi_rd *out);

typedef struct ibidi_cursor {
    ibidi_slice key, value; /* of the row it stands on */
    void *mdb;
    ibidi_txn *txn;
    ibidi_table tab;
} ibidi_cursor;
ibid_err ibidi_cursor_open(ibidi_txn *t, ibidi_table tab, ibidi_cursor *c);
void ibidi_cursor_close(ibidi_cursor *c);
/* Each NOTFOUND past the end. seek: the first row with a key >= k. */
ibid_err ibidi_cursor_first(ibidi_cursor *c);
ibid_err ibidi_cursor_seek(ibidi_cursor *c, const ibidi_key *k);
ibid_err ibidi_cursor_next(ibidi_cursor *c);
ibid_err
ibidi_cursor_del(ibidi_cursor *c); /* the row it stands on; next then gives the one after */
ibid_err ibidi_cursor_record(ibidi_cursor *c, ibidi_rd *out);
ibid_err ibidi_count(ibidi_txn *t, ibidi_table tab, uint64_t *rows);

/* ---- Checked KV values ---- */
ibid_err ibidi_verified_open(ibidi_verified **out);
void ibidi_verified_close(ibidi_verified *v);
/* epoch: how often the owner's KV was written; a new one forgets what was known. */
bool ibidi_verified_has(ibidi_verified *v, uint64_t owner, uint64_t epoch, size_t layer);
void ibidi_verified_add(ibidi_verified *v, uint64_t owner, uint64_t epoch, size_t layer);

/* ---- Records ---- */
enum {
    IBIDI_FORMAT = 1,
    IBIDI_CHUNKS_PER_ROW = 256,
    IBIDI_TEXT_PER_ROW = 1024 * 1024,
    IBIDI_NAME_MAX = 64
};

typedef struct ibidi_state { /* the one row of meta: all u64, in this order */
    uint64_t format, generation, next_collection, next_document, next_block, next_job;
    uint64_t history_floor; /* changes up to this generation were compacted away */
    uint64_t collections, documents, chunks, blocks, blocks_evicted;
    uint64_t kv_bytes, key_bytes, text_bytes, orphans, kv_budget;
} ibidi_state;

typedef struct ibidi_block_state { /* what changes about a block: all u64, in this order */
    uint64_t refcount, holds, last_use_ms;
    uint64_t epoch;    /* counts writings of its KV */
    uint64_t n_layers; /* of the stored KV; 0 = none */
    uint64_t value_size;
    uint64_t key_bytes; /* n_tokens * dim of the token keys; 0 = none */
} ibidi_block_state;

typedef struct ibidi_document { /* ibid_document as stored */
    ibid_document d;
    uint64_t collection;
} ibidi_document;

ibid_err ibidi_state_get(ibidi_txn *t, ibidi_state *out);
ibid_err ibidi_state_put(ibidi_txn *t, const ibidi_state *s);
ibid_err ibidi_collection_get(ibidi_txn *t, ibid_str name, ibid_collection *out); /* NOCOLLECTION */
ibid_err ibidi_collection_by_number(ibidi_txn *t, uint64_t number, ibid_collection *out);
ibid_err ibidi_collection_decode(ibidi_slice key, ibidi_rd r, ibid_collection *out);
ibid_err ibidi_collection_put(ibidi_txn *t, const ibid_collection *c);
/* number of the document with this id; NOTFOUND. */
ibid_err ibidi_document_lookup(ibidi_txn *t, uint64_t collection, ibid_str id, uint64_t *number);
ibidi_key ibidi_document_id_key(uint64_t collection, ibid_str id);
ibid_err ibidi_document_get(ibidi_txn *t, uint64_t number, ibidi_document *out);
ibid_err ibidi_document_write(ibidi_txn *t, const ibidi_document *d);
/* Appends to *chunks (ibid_alloc'ed, *n long); locators lie in the map. want: as the document says.
 */
ibid_err ibidi_chunks_get(ibidi_txn *t, uint64_t document, uint64_t want, ibid_arena *a,
                          ibid_chunk **out);
ibid_err ibidi_chunk_get(ibidi_txn *t, uint64_t document, uint64_t n, ibid_chunk *out);
ibid_err ibidi_chunks_put(ibidi_txn *t, uint64_t document, const ibid_chunk *c, size_t n);
ibid_err ibidi_text_get(ibidi_txn *t, uint64_t document, uint64_t bytes, ibid_buf *out);
/* n_old, n_rows: rows to delete beyond what a new version overwrites. */
ibid_err ibidi_rows_trim(ibidi_txn *t, ibidi_table tab, uint64_t document, uint64_t from);
ibid_err ibidi_block_get(ibidi_txn *t, uint64_t number, ibid_arena *a, ibid_block *out);
ibid_err ibidi_block_decode(uint64_t number, ibidi_rd r, ibid_arena *a, ibid_block *out);
ibid_err ibidi_block_write(ibidi_txn *t, const ibid_block *b);
ibid_err ibidi_block_number(ibidi_txn *t, const ibid_hash *hash, uint64_t *number);
ibid_err ibidi_block_state_get(ibidi_txn *t, uint64_t number, ibidi_block_state *out);
ibid_err ibidi_block_state_put(ibidi_txn *t, uint64_t number, const ibidi_block_state *s);
void ibidi_block_state_show(const ibidi_block_state *s, ibid_block *out);
ibid_err ibidi_keys_get(ibidi_txn *t, uint64_t number, ibid_keys *out);
ibid_err ibidi_keys_write(ibidi_txn *t, uint64_t number, const ibid_keys *k);
ibid_err ibidi_model_decode(ibidi_slice key, ibidi_rd r, ibid_arena *a, ibid_model_record *out);
ibid_err ibidi_model_write(ibidi_txn *t, const ibid_model_record *m);
ibid_err ibidi_job_decode(uint64_t id, ibidi_rd r, ibid_job *out);
ibid_err ibidi_job_write(ibidi_txn *t, const ibid_job *j);
bool ibidi_job_ended(const ibid_job *j);
ibid_err ibidi_change_decode(uint64_t generation, ibidi_rd r, ibid_arena *a, ibid_change *out);
ibid_err ibidi_change_write(ibidi_txn *t, const ibid_change *c);
/* A prefix's KV values carry the first 8 bytes of its id as owner. */
uint64_t ibidi_prefix_owner(const ibid_hash *prefix);
/* A record that does not decode: CORRUPT naming table and key. */
ibid_err ibidi_corrupt(ibidi_table tab, const uint8_t *key, size_t n);

/* ---- Handles and writing ---- */
struct ibid_store {
    ibidi_env *env;
    ibidi_shared *shared;
    bool readonly;
};

struct ibid_snap {
    ibid_store *store;
    ibidi_txn t;
    ibid_arena *arena;
    uint64_t begun_ns;
    ibidi_state state;
};

typedef struct ibidi_writer {
    ibid_store *store;
    ibidi_txn t;
    ibidi_state st; /* written back when the transaction commits */
    ibid_arena *arena;
} ibidi_writer;

/* Runs fn in a write transaction and commits it if fn succeeds. fn may run twice (the map grew), so
 * it changes nothing but *w and outputs it sets anew. */
typedef ibid_err (*ibidi_write_fn)(ibidi_writer *w, void *arg);
ibid_err ibidi_write(ibid_store *s, ibidi_write_fn fn, void *arg);
uint64_t ibidi_clock(ibid_store *s); /* use time in ms, never backwards */

/* Counts of a block and its places in the orphan and LRU tables, kept together. */
ibid_err ibidi_block_update(ibidi_writer *w, uint64_t number, const ibidi_block_state *old,
                            const ibidi_block_state *now);
ibid_err ibidi_hold_take(ibidi_writer *w, uint64_t job, uint64_t block, ibidi_block_state *st);
ibid_err ibidi_hold_drop(ibidi_writer *w, uint64_t job, uint64_t block, ibidi_block_state *st);
ibid_err ibidi_holds_end(ibidi_writer *w, uint64_t job);
ibid_err ibidi_job_live(ibidi_txn *t, uint64_t job); /* NOTFOUND, CANCELLED */
ibid_err ibidi_documents_drop(ibidi_writer *w, ibid_collection *c);
ibid_err ibidi_touch_flush(ibid_store *s);
/* Collects orphans last used at least min_age_ms ago. */
ibid_err ibidi_collect(ibid_store *s, uint64_t min_age_ms, ibid_collected *out);
#endif
