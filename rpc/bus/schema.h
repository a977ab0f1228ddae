/* The schema: one table of every field of every message body, read by the server (requests) and by the
 * client (replies). A method without a row here is refused, so a new method starts here.
 *
 * One row per field, in the section of its room at the end of this file:
 *
 *   FIELD(owner, side, name, type, need, cap)
 *     owner  "room.method"; "*.verb" for a method every room has (a room's own rows win over it);
 *            or the name of a sub-schema, which has no dot: "block_put"
 *     side   REQ (request), REP (reply), SUB (a sub-schema's field)
 *     name   the map key
 *     type   U64  I64  F64 (integers are accepted too)  BOOL  STR (text)  BIN (bytes)
 *            ANY (any value, not looked into)  MAP (a map, not looked into)
 *            MAP_OF("sub")      a map checked against a sub-schema
 *            ARRAY_OF("sub")    an array of such maps
 *            ARRAY(U64)         an array of plain values: U64 I64 F64 BOOL STR BIN (an element of text
 *                               or bytes may have DEFAULT bytes)
 *     need   REQUIRED or OPTIONAL
 *     cap    MAX(n): bytes of STR and BIN, elements of arrays, pairs of maps, largest value of U64.
 *            DEFAULT: 1 MiB for STR and BIN, 65536 elements or pairs, any number.
 *   NO_FIELDS("room.method", REQ)   states that a side has no fields. A method with a row on one side
 *            only needs nothing on the other; one with no field at all needs one NO_FIELDS row.
 *
 * Rules of the check: a field that is missing, nil where REQUIRED, or of another type is PROTO; one
 * past its cap is TOOBIG; both name method and field. nil counts as absent. Unknown fields are skipped,
 * so fields may be added later; they are never removed or given another type.
 *
 * The rows are read only where FIELD is defined (schema.c). */
#ifndef IBID_BUS_SCHEMA_H
#define IBID_BUS_SCHEMA_H

#include "rpc/bus/msg.h"

/* True when the method has at least one row. */
bool ibid_schema_knows(const char *method);
/* Checks a body (NULL reads as an empty map). Errors: NOTSUP (no rows for this method), PROTO, TOOBIG. */
ibid_err ibid_schema_check(const char *method, const ibid_val *body, bool is_request);
/* The table checks itself: sub-schemas exist, no field twice, caps fit their type. For a test. */
ibid_err ibid_schema_verify(void);
/* Calls fn for each method in the table's order, once ("*.ping" too). For tests and documents. */
void ibid_schema_each(void (*fn)(void *, const char *method), void *arg);
#endif

/* clang-format off */
#ifdef FIELD

/* ---- rows of every room (the bus itself) ---- */
NO_FIELDS("*.ping", REQ)
FIELD("*.ping", REP, "room", STR, REQUIRED, MAX(64))
FIELD("*.ping", REP, "pid", U64, REQUIRED, DEFAULT)
FIELD("*.ping", REP, "uptime_ms", U64, REQUIRED, DEFAULT)
FIELD("*.ping", REP, "version", STR, OPTIONAL, MAX(64))
FIELD("*.next", REQ, "stream", U64, REQUIRED, DEFAULT)
FIELD("*.next", REQ, "seq", U64, REQUIRED, DEFAULT)
FIELD("*.next", REP, "seq", U64, REQUIRED, DEFAULT)
FIELD("*.next", REP, "last", BOOL, REQUIRED, DEFAULT)
FIELD("*.next", REP, "event", MAP, REQUIRED, DEFAULT)
FIELD("*.cancel", REQ, "stream", U64, REQUIRED, DEFAULT)

/* ---- rows of kvstore: numbers in bins are little-endian (kvstore/wire.h) ---- */
FIELD("kvstore.collection_create", REQ, "name", STR, REQUIRED, MAX(64))
FIELD("kvstore.collection_create", REQ, "model", BIN, REQUIRED, MAX(32))
FIELD("kvstore.collection_drop", REQ, "name", STR, REQUIRED, MAX(64))
FIELD("kvstore.model_put", REQ, "fingerprint", BIN, REQUIRED, MAX(32))
FIELD("kvstore.model_put", REQ, "name", STR, REQUIRED, MAX(4096))
FIELD("kvstore.model_put", REQ, "path", STR, REQUIRED, MAX(65536))
FIELD("kvstore.model_put", REQ, "arch", STR, REQUIRED, MAX(4096))
FIELD("kvstore.model_put", REQ, "n_layers", U64, REQUIRED, DEFAULT)
FIELD("kvstore.model_put", REQ, "n_heads", U64, REQUIRED, DEFAULT)
FIELD("kvstore.model_put", REQ, "n_kv_heads", U64, REQUIRED, DEFAULT)
FIELD("kvstore.model_put", REQ, "head_dim", U64, REQUIRED, DEFAULT)
FIELD("kvstore.model_put", REQ, "n_ctx", U64, REQUIRED, DEFAULT)
FIELD("kvstore.model_put", REQ, "n_vocab", U64, REQUIRED, DEFAULT)
FIELD("kvstore.model_put", REQ, "prefix", BIN, REQUIRED, MAX(32))
FIELD("kvstore.model_put", REQ, "prefix_tokens", BIN, REQUIRED, MAX(262144))
FIELD("kvstore.model_put", REQ, "kv_type", U64, REQUIRED, MAX(2))
FIELD("kvstore.model_put", REQ, "calibration", BIN, REQUIRED, MAX(33554432))
FIELD("kvstore.model_put", REQ, "calibration_id", BIN, REQUIRED, MAX(32))
FIELD("kvstore.prefix_put", REQ, "prefix", BIN, REQUIRED, MAX(32))
FIELD("kvstore.prefix_put", REQ, "n_layers", U64, REQUIRED, MAX(65535))
FIELD("kvstore.prefix_put", REQ, "values", BIN, REQUIRED, MAX(100663296))
FIELD("kvstore.blocks_put", REQ, "blocks", ARRAY_OF("block_put"), REQUIRED, MAX(65536))
FIELD("kvstore.blocks_put", REP, "numbers", BIN, REQUIRED, MAX(524288))
FIELD("block_put", SUB, "model", BIN, REQUIRED, MAX(32))
FIELD("block_put", SUB, "prefix", BIN, REQUIRED, MAX(32))
FIELD("block_put", SUB, "kv_type", U64, REQUIRED, MAX(2))
FIELD("block_put", SUB, "n_title", U64, REQUIRED, MAX(65536))
FIELD("block_put", SUB, "tokens", BIN, REQUIRED, MAX(262144))
FIELD("block_put", SUB, "n_layers", U64, OPTIONAL, MAX(65535))
FIELD("block_put", SUB, "values", BIN, OPTIONAL, MAX(100663296))
FIELD("block_put", SUB, "calibration", BIN, OPTIONAL, MAX(32))
FIELD("block_put", SUB, "keys_dim", U64, OPTIONAL, MAX(65536))
FIELD("block_put", SUB, "keys", BIN, OPTIONAL, MAX(100663296))
FIELD("block_put", SUB, "job", U64, OPTIONAL, DEFAULT)
FIELD("kvstore.blocks_hold", REQ, "job", U64, REQUIRED, DEFAULT)
FIELD("kvstore.blocks_hold", REQ, "blocks", BIN, REQUIRED, MAX(33554432))
FIELD("kvstore.keys_put", REQ, "calibration", BIN, REQUIRED, MAX(32))
FIELD("kvstore.keys_put", REQ, "block", U64, REQUIRED, DEFAULT)
FIELD("kvstore.keys_put", REQ, "n_tokens", U64, REQUIRED, MAX(65536))
FIELD("kvstore.keys_put", REQ, "dim", U64, REQUIRED, MAX(65536))
FIELD("kvstore.keys_put", REQ, "keys", BIN, REQUIRED, MAX(100663296))
FIELD("kvstore.document_put", REQ, "collection", STR, REQUIRED, MAX(64))
FIELD("kvstore.document_put", REQ, "id", STR, REQUIRED, MAX(65536))
FIELD("kvstore.document_put", REQ, "title", STR, OPTIONAL, MAX(16777216))
FIELD("kvstore.document_put", REQ, "source", STR, OPTIONAL, MAX(16777216))
FIELD("kvstore.document_put", REQ, "metadata", STR, OPTIONAL, MAX(16777216))
FIELD("kvstore.document_put", REQ, "reason", STR, OPTIONAL, MAX(16777216))
FIELD("kvstore.document_put", REQ, "content", BIN, REQUIRED, MAX(32))
FIELD("kvstore.document_put", REQ, "state", U64, REQUIRED, MAX(5))
FIELD("kvstore.document_put", REQ, "text", BIN, OPTIONAL, MAX(100663296))
FIELD("kvstore.document_put", REQ, "text_zstd", BIN, OPTIONAL, MAX(100663296))
FIELD("kvstore.document_put", REQ, "text_bytes", U64, OPTIONAL, MAX(4294967296))
FIELD("kvstore.document_put", REQ, "chunks", BIN, OPTIONAL, MAX(100663296))
FIELD("kvstore.document_put", REQ, "locators", BIN, OPTIONAL, MAX(100663296))
FIELD("kvstore.document_put", REQ, "job", U64, OPTIONAL, DEFAULT)
FIELD("kvstore.document_put", REP, "number", U64, REQUIRED, DEFAULT)
FIELD("kvstore.document_put", REP, "generation", U64, REQUIRED, DEFAULT)
FIELD("kvstore.document_delete", REQ, "collection", STR, REQUIRED, MAX(64))
FIELD("kvstore.document_delete", REQ, "id", STR, REQUIRED, MAX(65536))
FIELD("kvstore.document_delete", REP, "generation", U64, REQUIRED, DEFAULT)
FIELD("kvstore.job_put", REQ, "id", U64, REQUIRED, DEFAULT)
FIELD("kvstore.job_put", REQ, "kind", STR, REQUIRED, MAX(64))
FIELD("kvstore.job_put", REQ, "collection", STR, OPTIONAL, MAX(64))
FIELD("kvstore.job_put", REQ, "state", STR, REQUIRED, MAX(64))
FIELD("kvstore.job_put", REQ, "stage", STR, OPTIONAL, MAX(64))
FIELD("kvstore.job_put", REQ, "spec", BIN, OPTIONAL, MAX(33554432))
FIELD("kvstore.job_put", REQ, "report", BIN, OPTIONAL, MAX(33554432))
FIELD("kvstore.job_put", REQ, "error", U64, OPTIONAL, MAX(65535))
FIELD("kvstore.job_put", REQ, "error_text", STR, OPTIONAL, MAX(65536))
FIELD("kvstore.job_put", REP, "id", U64, REQUIRED, DEFAULT)
FIELD("kvstore.job_delete", REQ, "id", U64, REQUIRED, DEFAULT)
FIELD("kvstore.touch", REQ, "blocks", BIN, REQUIRED, MAX(33554432))
NO_FIELDS("kvstore.collect", REQ)
FIELD("kvstore.collect", REP, "orphans", U64, REQUIRED, DEFAULT)
FIELD("kvstore.collect", REP, "evicted", U64, REQUIRED, DEFAULT)
FIELD("kvstore.collect", REP, "bytes", U64, REQUIRED, DEFAULT)
FIELD("kvstore.collect", REP, "more", BOOL, REQUIRED, DEFAULT)
FIELD("kvstore.set_budget", REQ, "kv_budget", U64, REQUIRED, DEFAULT)
NO_FIELDS("kvstore.verify", REQ)
FIELD("kvstore.verify", REP, "n_faults", U64, REQUIRED, DEFAULT)
FIELD("kvstore.verify", REP, "faults", STR, REQUIRED, DEFAULT)

/* ---- rows of attention ---- */

/* ---- rows of retriever ---- */

/* ---- rows of indexer ---- */
FIELD("indexer.submit", REQ, "collection", STR, REQUIRED, MAX(64))
FIELD("indexer.submit", REQ, "model", STR, OPTIONAL, MAX(255))
FIELD("indexer.submit", REQ, "paths", ARRAY(STR), REQUIRED, MAX(4096))
FIELD("indexer.submit", REQ, "prune", BOOL, OPTIONAL, DEFAULT)
FIELD("indexer.submit", REQ, "force", BOOL, OPTIONAL, DEFAULT)
FIELD("indexer.submit", REQ, "dry_run", BOOL, OPTIONAL, DEFAULT)
FIELD("indexer.submit", REP, "job", U64, REQUIRED, DEFAULT)
FIELD("indexer.resume", REQ, "job", U64, REQUIRED, DEFAULT) /* 0: every paused or interrupted one */
FIELD("indexer.resume", REP, "n", U64, REQUIRED, DEFAULT)
FIELD("indexer.pause", REQ, "job", U64, REQUIRED, DEFAULT)
FIELD("indexer.cancel", REQ, "job", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REQ, "job", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REQ, "from", U64, OPTIONAL, DEFAULT)
FIELD("indexer.status", REQ, "wait_ms", U64, OPTIONAL, DEFAULT)
FIELD("indexer.status", REP, "id", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "state", STR, REQUIRED, MAX(32))
FIELD("indexer.status", REP, "stage", STR, REQUIRED, MAX(32))
FIELD("indexer.status", REP, "collection", STR, REQUIRED, MAX(64))
FIELD("indexer.status", REP, "code", STR, REQUIRED, MAX(64))
FIELD("indexer.status", REP, "error_text", STR, REQUIRED, MAX(1024))
FIELD("indexer.status", REP, "files_total", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "files_done", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "documents", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "tokens_total", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "tokens_done", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "encoded_tokens", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "reused_tokens", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "kv_bytes", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "ready", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "partial", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "empty", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "unsupported", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "failed", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "unchanged", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "removed", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "forecast_tokens", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "forecast_bytes", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "free_bytes", U64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "tokens_per_s", F64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "seconds_left", F64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "forecast_s", F64, REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "files", ARRAY_OF("file_result"), REQUIRED, DEFAULT)
FIELD("indexer.status", REP, "next", U64, REQUIRED, DEFAULT)
FIELD("file_result", SUB, "path", STR, REQUIRED, DEFAULT)
FIELD("file_result", SUB, "id", STR, REQUIRED, DEFAULT)
FIELD("file_result", SUB, "state", STR, REQUIRED, MAX(32))
FIELD("file_result", SUB, "reason", STR, REQUIRED, DEFAULT)
FIELD("file_result", SUB, "chunks", U64, REQUIRED, DEFAULT)
FIELD("file_result", SUB, "encoded_tokens", U64, REQUIRED, DEFAULT)
FIELD("file_result", SUB, "reused_tokens", U64, REQUIRED, DEFAULT)
FIELD("indexer.remove", REQ, "collection", STR, REQUIRED, MAX(64))
FIELD("indexer.remove", REQ, "id", STR, REQUIRED, MAX(8192))
FIELD("indexer.cache_file", REQ, "model", STR, OPTIONAL, MAX(255))
FIELD("indexer.cache_file", REQ, "path", STR, REQUIRED, MAX(4096))
FIELD("indexer.cache_file", REP, "id", STR, REQUIRED, MAX(8192))
FIELD("indexer.cache_file", REP, "job", U64, REQUIRED, DEFAULT)

/* ---- rows of echo, the room of tests/rpc ---- */
FIELD("echo.echo", REQ, "data", BIN, OPTIONAL, MAX(134217728))
FIELD("echo.echo", REQ, "numbers", ARRAY(I64), OPTIONAL, MAX(1000))
FIELD("echo.echo", REQ, "point", MAP_OF("echo_point"), OPTIONAL, DEFAULT)
FIELD("echo.echo", REQ, "points", ARRAY_OF("echo_point"), OPTIONAL, MAX(4))
FIELD("echo.echo", REQ, "small", U64, OPTIONAL, MAX(10))
FIELD("echo.echo", REP, "data", BIN, REQUIRED, MAX(134217728))
FIELD("echo_point", SUB, "x", F64, REQUIRED, DEFAULT)
FIELD("echo_point", SUB, "name", STR, OPTIONAL, MAX(8))
FIELD("echo.fail", REQ, "code", STR, REQUIRED, MAX(64))
FIELD("echo.fail", REQ, "text", STR, REQUIRED, DEFAULT)
FIELD("echo.sleep", REQ, "ms", U64, REQUIRED, MAX(60000))
FIELD("echo.runs", REP, "runs", U64, REQUIRED, DEFAULT)
FIELD("echo.begin", REQ, "events", U64, REQUIRED, DEFAULT)
FIELD("echo.begin", REQ, "fail", BOOL, OPTIONAL, DEFAULT)
FIELD("echo.begin", REP, "stream", U64, REQUIRED, DEFAULT)

#endif
/* clang-format on */
