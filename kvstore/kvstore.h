/* The store: documents, chunks, blocks, KV, token keys, jobs, in one LMDB environment. Truth lives
 * here; everything else can be rebuilt from it.
 *
 * Two halves. Reading: any process maps the environment read-only and reads in place through a
 * snapshot. Writing: one process (ibid-kvstore) owns the writer; others send it messages through
 * kvstore/kvstore_client.h, which mirrors the write half below struct by struct.
 *
 * Opening the same folder twice in one process gives handles on one shared environment (LMDB forbids
 * a double open), so that all rooms can be hosted in one process.
 *
 * Layout of tables: docs/design.md section 3; byte formats: docs/format.md. */
#ifndef IBID_KVSTORE_H
#define IBID_KVSTORE_H

#include "attention/tensor.h"
#include "rpc/base/err.h"
#include "rpc/base/hash.h"
#include "rpc/base/mem.h"

#include <stdbool.h>
#include <stdint.h>

#define IBID_STORE_FOLDER "store" /* inside the data folder */

typedef struct ibid_store ibid_store;
typedef struct ibid_snap ibid_snap;

typedef struct ibid_store_opts {
    const char *dir;    /* the store's folder (created by a writer) */
    bool readonly;      /* a reader: fails with NOTFOUND while no writer ever created the store */
    uint64_t map_size;  /* bytes; 0 = 1 TiB, or less where the address space is limited */
    uint64_t kv_budget; /* bytes of KV kept; 0 = no limit. Writers only */
} ibid_store_opts;

ibid_err ibid_store_open(const ibid_store_opts *o, ibid_store **out);
void ibid_store_close(ibid_store *s);

/* ---- What is stored ------------------------------------------------------------------------- */

typedef struct ibid_str { /* borrowed bytes, not NUL-terminated unless said */
    const char *s;
    size_t n;
} ibid_str;

typedef enum ibid_doc_state {
    IBID_DOC_READY = 1,
    IBID_DOC_PARTIAL = 2,     /* some of it had no text; reason says what */
    IBID_DOC_EMPTY = 3,       /* no text in it */
    IBID_DOC_UNSUPPORTED = 4, /* a format ibid does not read */
    IBID_DOC_FAILED = 5
} ibid_doc_state;
const char *ibid_doc_state_name(ibid_doc_state s); /* "ready", ... */

typedef struct ibid_collection {
    ibid_str name; /* [A-Za-z0-9._-]{1,64} */
    ibid_hash model;
    uint64_t number, documents, chunks, text_bytes, created_ms;
} ibid_collection;

typedef struct ibid_document {
    uint64_t number;
    ibid_str collection, id, title;
    ibid_str source;   /* canonical path of the file it came from, or "" */
    ibid_str metadata; /* JSON object, or "" */
    ibid_str reason;   /* why it is not READY, for a person; "" if ready */
    ibid_hash content; /* of the source bytes and title: equal means unchanged */
    ibid_doc_state state;
    uint64_t text_bytes, n_chunks, generation, indexed_ms;
} ibid_document;

typedef struct ibid_chunk {
    uint64_t start, end; /* byte range in the normalised text */
    ibid_str locator;    /* "page 3", "# Heading > Sub", "line 7"; "" if none */
    uint64_t block;
} ibid_chunk;

typedef struct ibid_block {
    uint64_t number;
    ibid_hash hash;      /* see ibid_block_hash */
    ibid_hash model, prefix;
    ibid_kv_type kv_type;
    size_t n_tokens;
    size_t n_title;      /* the first n_title tokens are the title line: no byte range, never cited */
    const int32_t *tokens; /* [n_tokens], title first */
    uint64_t refcount, last_use_ms;
    bool has_kv;         /* false: evicted, or keys only; encode again before use */
} ibid_block;

/* Token keys of a block at the retrieval heads: from before RoPE, centred, normalised, int8
 * (round(127 * x / max|x| over the unit vector's fixed scale 1.0: value = q / 127)). */
typedef struct ibid_keys {
    ibid_hash calibration;
    size_t n_tokens, dim;   /* dim = heads * head_dim; covers every token of the block */
    const int8_t *data;     /* [n_tokens, dim], 64-byte aligned is not promised */
} ibid_keys;

/* BLAKE2b-256 over length-prefixed (tenant "", model, KV type, layout version, RoPE id, prefix,
 * n_title, token ids). */
ibid_hash ibid_block_hash(const ibid_hash *model, const ibid_hash *prefix, ibid_kv_type type,
                          size_t n_title, const int32_t *tokens, size_t n_tokens);

typedef struct ibid_model_record {
    ibid_hash fingerprint;
    ibid_str name, path, arch; /* path: the GGUF file, absolute */
    uint64_t n_layers, n_heads, n_kv_heads, head_dim, n_ctx, n_vocab;
    ibid_hash prefix;            /* current prefix id */
    const int32_t *prefix_tokens;
    size_t n_prefix_tokens;
    ibid_kv_type kv_type;        /* for new blocks */
    ibid_str calibration;        /* attention/plan/calibration.h's own encoding; empty = none yet */
    ibid_hash calibration_id;    /* hash of it; all zero = none */
    ibid_str gates;              /* verdicts on KV types (attention_gate.c); empty = none yet */
} ibid_model_record;

typedef struct ibid_job {
    uint64_t id;
    ibid_str kind;       /* "index", "reindex", "recode" */
    ibid_str collection;
    ibid_str state;      /* "queued", "running", "paused", "done", "cancelled", "failed" */
    ibid_str stage;      /* "scan", "extract", "forecast", "encode", "commit" */
    ibid_str spec;       /* the indexer's own MessagePack: paths, options, resume point */
    ibid_str report;     /* the indexer's own MessagePack: counts, per-file results, rates */
    ibid_err error;
    ibid_str error_text;
    uint64_t created_ms, updated_ms;
} ibid_job;

typedef struct ibid_change { /* one generation: what a derived index must replay */
    uint64_t generation;
    uint64_t collection;     /* number */
    uint64_t document;       /* number; the same number keeps its identity over an update */
    bool removed;            /* the document is gone; otherwise it was added or replaced */
    const uint64_t *added, *dropped; /* blocks this document newly uses / no longer uses */
    size_t n_added, n_dropped;
} ibid_change;

typedef struct ibid_store_stats {
    uint64_t generation, collections, documents, chunks, blocks, blocks_evicted;
    uint64_t kv_bytes, key_bytes, text_bytes, file_bytes, map_size, kv_budget, orphan_blocks;
} ibid_store_stats;

/* ---- Reading: snapshots ---------------------------------------------------------------------- */

/* One LMDB read transaction; belongs to one thread at a time. Everything "borrowed" below is valid
 * until ibid_snap_end or ibid_snap_renew of that snapshot. Snapshots hold back page reuse, so they are
 * for one request; one older than the age cap (60 s) answers BUSY, and the caller renews it and looks
 * its blocks up again. */
ibid_err ibid_snap_begin(ibid_store *s, ibid_snap **out);
ibid_err ibid_snap_renew(ibid_snap *n);
void ibid_snap_end(ibid_snap *n);
uint64_t ibid_snap_generation(const ibid_snap *n);
ibid_err ibid_snap_stats(ibid_snap *n, ibid_store_stats *out);

/* Strings of results lie in the map or in the snapshot's arena: borrowed. NOTFOUND / NOCOLLECTION. */
ibid_err ibid_snap_collection(ibid_snap *n, ibid_str name, ibid_collection *out);
ibid_err ibid_snap_collection_by_number(ibid_snap *n, uint64_t number, ibid_collection *out);
ibid_err ibid_snap_document(ibid_snap *n, ibid_str collection, ibid_str id, ibid_document *out);
ibid_err ibid_snap_document_by_number(ibid_snap *n, uint64_t number, ibid_document *out);
/* Appends the normalised text, decompressed. */
ibid_err ibid_snap_text(ibid_snap *n, uint64_t document, ibid_buf *out);
/* All chunks in order; the array lies in the snapshot's arena. */
ibid_err ibid_snap_chunks(ibid_snap *n, uint64_t document, const ibid_chunk **out, size_t *n_out);
/* NOTFOUND unless a block with this hash and exactly these tokens is stored. */
ibid_err ibid_snap_block_find(ibid_snap *n, const ibid_hash *hash, size_t n_title,
                              const int32_t *tokens, size_t n_tokens, ibid_block *out);
ibid_err ibid_snap_block(ibid_snap *n, uint64_t block, ibid_block *out);
/* The KV of one layer, in place in the map. Verifies header and, the first time this process reads
 * this value since it was written or opened, its checksum. Errors: NOTFOUND (evicted), CORRUPT. */
ibid_err ibid_snap_kv(ibid_snap *n, uint64_t block, size_t layer, ibid_kv_view *out);
ibid_err ibid_snap_prefix_kv(ibid_snap *n, const ibid_hash *prefix, size_t layer,
                             ibid_kv_view *out);

/* Where the KV of one layer lies, for those who want it in memory before it is read. Nothing of the
 * value itself was read yet. Borrowed from the snapshot; while that is open, the calls below may be
 * made from any thread. */
typedef struct ibid_kv_place {
    const void *value; /* [size] */
    size_t size, layer;
    uint64_t block, epoch;
} ibid_kv_place;
/* out [n_layers]. Errors: NOTFOUND (evicted, or fewer layers), CORRUPT. */
ibid_err ibid_snap_kv_places(ibid_snap *n, uint64_t block, size_t n_layers, ibid_kv_place *out);
/* What ibid_snap_kv does, at a place. Errors: CORRUPT. */
ibid_err ibid_kv_place_open(ibid_store *s, const ibid_kv_place *p, ibid_kv_view *out);
/* Bytes of the value's pages that are not in memory (mincore); 0 where that cannot be said. */
size_t ibid_kv_place_missing(const ibid_kv_place *p);
/* Asks the kernel to read the values of places [n] soon (MADV_WILLNEED), neighbours in one piece. */
void ibid_kv_places_willneed(const ibid_kv_place *p, size_t n);
ibid_err ibid_snap_keys(ibid_snap *n, uint64_t block, ibid_keys *out);
ibid_err ibid_snap_model(ibid_snap *n, const ibid_hash *fingerprint, ibid_model_record *out);

/* Iterations call fn for each item in key order; a non-zero return of fn stops and is returned. */
ibid_err ibid_snap_each_collection(ibid_snap *n, ibid_err (*fn)(void *, const ibid_collection *),
                                   void *arg);
ibid_err ibid_snap_each_model(ibid_snap *n, ibid_err (*fn)(void *, const ibid_model_record *),
                              void *arg);
/* Documents of a collection by ascending number, those with number > after. */
ibid_err ibid_snap_each_document(ibid_snap *n, ibid_str collection, uint64_t after,
                                 ibid_err (*fn)(void *, const ibid_document *), void *arg);
/* Where a block is used: (document number, chunk index). */
ibid_err ibid_snap_each_use(ibid_snap *n, uint64_t block,
                            ibid_err (*fn)(void *, uint64_t document, uint64_t chunk), void *arg);
ibid_err ibid_snap_each_block(ibid_snap *n, ibid_err (*fn)(void *, const ibid_block *), void *arg);
/* Changes with generation > after, ascending, without a gap. Errors: NOTFOUND when that history was
 * compacted away, or `after` is later than the store (it was restored): rebuild from the documents
 * instead. */
ibid_err ibid_snap_each_change(ibid_snap *n, uint64_t after,
                               ibid_err (*fn)(void *, const ibid_change *), void *arg);
ibid_err ibid_snap_job(ibid_snap *n, uint64_t id, ibid_job *out);
ibid_err ibid_snap_each_job(ibid_snap *n, ibid_err (*fn)(void *, const ibid_job *), void *arg);

/* ---- Writing (the writer's process only) ------------------------------------------------------ */

typedef struct ibid_block_put {
    ibid_hash model, prefix;
    ibid_kv_type kv_type;
    size_t n_title, n_tokens;
    const int32_t *tokens;
    size_t n_layers;
    size_t value_size;     /* every layer's value has this size: ibid_kv_value_size */
    const void *const *values; /* [n_layers] sealed KV values; owner 0, set by the store; NULL = none */
    ibid_hash calibration; /* of the keys; keys NULL = none */
    const int8_t *keys;    /* [n_tokens, keys_dim] */
    size_t keys_dim;
    uint64_t job;          /* holds the block until the job's document is committed or the job ends */
} ibid_block_put;

typedef struct ibid_document_put {
    ibid_str collection, id, title, source, metadata, reason;
    ibid_hash content;
    ibid_doc_state state;
    ibid_str text; /* normalised, UTF-8; empty unless READY or PARTIAL */
    const ibid_chunk *chunks;
    size_t n_chunks;
    uint64_t job;
} ibid_document_put;

/* All are durable when they return IBID_OK (fsynced), and all or nothing. Errors of every one:
 * DISKFULL (nothing changed; reads go on), IO (the store has stopped acknowledging: reopen). */
/* The model must be stored already. Errors: INVAL (name), EXISTS, NOTFOUND (no such model). */
ibid_err ibid_store_collection_create(ibid_store *s, ibid_str name, const ibid_hash *model);
ibid_err ibid_store_collection_drop(ibid_store *s, ibid_str name);
ibid_err ibid_store_model_put(ibid_store *s, const ibid_model_record *m);
ibid_err ibid_store_prefix_put(ibid_store *s, const ibid_hash *prefix, size_t n_layers,
                               const void *const *values, size_t value_size);
/* Stores several blocks in one transaction; existing equal ones are kept, gain a hold, and get KV or
 * keys they lacked, or whose check fails: after CORRUPT from a read, encode and put again. numbers[n]
 * out. A block put without a job is an orphan until a document uses it; ibid-kvstore leaves it two
 * minutes for that. Errors: MISMATCH (hash equal, tokens not), BUDGET, INVAL, CORRUPT (a value fails its
 * own check), NOTFOUND (no such job), CANCELLED (the job has ended). */
ibid_err ibid_store_blocks_put(ibid_store *s, const ibid_block_put *b, size_t n, uint64_t *numbers);
/* Takes a hold of existing blocks for a job, so that eviction and orphan collection spare them. */
ibid_err ibid_store_blocks_hold(ibid_store *s, uint64_t job, const uint64_t *blocks, size_t n);
/* Replaces token keys (recalibration): one call per batch. */
ibid_err ibid_store_keys_put(ibid_store *s, const ibid_hash *calibration, uint64_t block,
                             const int8_t *keys, size_t n_tokens, size_t dim);
/* Adds or replaces a document atomically: chunk list, text, refcounts, uses, change row; drops the
 * job's holds of its blocks. Errors: NOCOLLECTION, NOTFOUND (a chunk's block is not stored), MISMATCH (a
 * block of another model than the collection's), INVAL, TOOBIG. */
ibid_err ibid_store_document_put(ibid_store *s, const ibid_document_put *d, uint64_t *number,
                                 uint64_t *generation);
ibid_err ibid_store_document_delete(ibid_store *s, ibid_str collection, ibid_str id,
                                    uint64_t *generation);
/* id 0 creates a job and sets *id. Jobs that end (done, cancelled, failed) release their holds. */
ibid_err ibid_store_job_put(ibid_store *s, const ibid_job *j, uint64_t *id);
ibid_err ibid_store_job_delete(ibid_store *s, uint64_t id);
/* Remembers use times in memory; flushed in batches. */
void ibid_store_touch(ibid_store *s, const uint64_t *blocks, size_t n);
/* Deletes blocks that no document uses and no job holds; then evicts least-recently-used KV (never
 * held, never text) until the budget holds. Counts what it did. Bounded work per call. */
typedef struct ibid_collected {
    uint64_t orphans, evicted, bytes;
    bool more;
} ibid_collected;
ibid_err ibid_store_collect(ibid_store *s, ibid_collected *out);
ibid_err ibid_store_set_budget(ibid_store *s, uint64_t kv_budget);

/* Walks everything: every checksum, hash, refcount, use, chunk range, text, change row. Calls
 * report for each fault (a sentence). *faults counts them. Works on a reader too. */
ibid_err ibid_store_verify(ibid_store *s, void (*report)(void *, const char *fault), void *arg,
                           uint64_t *faults);
#endif
