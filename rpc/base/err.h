/* Errors: one enum for every room, 0 = ok. Values travel on the wire and are written to disk (job
 * rows), so they are explicit and append-only.
 *
 * A function that can fail returns ibid_err. The detail (which file, which count, what to do) goes
 * into a per-thread text set where the failure happens, with ibid_fail(); callers pass the code up
 * unchanged, and whoever answers the user (a service reply, the CLI) reads ibid_err_detail(). */
#ifndef IBID_BASE_ERR_H
#define IBID_BASE_ERR_H

#include <stdbool.h>
#include <stddef.h>

/* X(symbol, value, stable code seen by users, text) */
#define IBID_ERR_MAP(X)                                                                            \
    X(OK, 0, "ok", "no error")                                                                     \
    X(INVAL, 1, "invalid_argument", "an argument is not valid")                                    \
    X(NOMEM, 2, "out_of_memory", "out of memory")                                                  \
    X(IO, 3, "io_error", "reading or writing failed")                                              \
    X(NOTFOUND, 4, "not_found", "no such thing")                                                   \
    X(EXISTS, 5, "already_exists", "it exists already")                                            \
    X(CORRUPT, 6, "corrupt", "stored bytes fail their check")                                      \
    X(NOTSUP, 7, "not_supported", "not supported")                                                 \
    X(TOOBIG, 8, "too_large", "larger than the limit")                                             \
    X(CONTEXT, 9, "context_length_exceeded", "the request is longer than the model's context")     \
    X(DISKFULL, 10, "disk_full", "the disk is full")                                               \
    X(TIMEOUT, 11, "deadline_exceeded", "the deadline passed")                                     \
    X(CANCELLED, 12, "cancelled", "cancelled")                                                     \
    X(BUSY, 13, "busy", "busy, try again")                                                         \
    X(UNAVAIL, 14, "unavailable", "the service does not answer")                                   \
    X(MISMATCH, 15, "fingerprint_mismatch", "made by another model, calibration or layout")        \
    X(PROTO, 16, "protocol_error", "a message breaks the schema")                                  \
    X(NOCOLLECTION, 17, "unknown_collection", "no such collection")                                \
    X(BUDGET, 18, "budget_exceeded", "larger than the KV budget")                                  \
    X(BACKEND, 19, "backend_error", "a library or device failed")                                  \
    X(INTERNAL, 20, "internal", "a bug in ibid")                                                   \
    X(EMPTY, 21, "empty", "no text in it")                                                         \
    X(INEXACT, 22, "kv_gate_failed", "the KV type is too inexact for this model")

typedef enum ibid_err {
#define X(sym, val, code, text) IBID_##sym = val,
    IBID_ERR_MAP(X)
#undef X
} ibid_err;

/* Stable short code ("disk_full") and one-line text; both static, never NULL. */
const char *ibid_err_code(ibid_err e);
const char *ibid_err_text(ibid_err e);
/* IBID_INTERNAL for a code this build does not know. */
ibid_err ibid_err_from_code(const char *code);

/* Sets this thread's detail text and returns e: `return ibid_fail(IBID_IO, "cannot read %s: %s; "
 * "check its permissions", path, strerror(errno));`. Never returns IBID_OK. */
ibid_err ibid_fail(ibid_err e, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* This thread's last detail ("" if none). Valid until the next ibid_fail on this thread. */
const char *ibid_err_detail(void);
void ibid_err_clear(void);
/* Maps errno of a failed system call: ENOSPC/EDQUOT -> DISKFULL, ENOMEM -> NOMEM,
 * ENOENT -> NOTFOUND, anything else -> IO. Sets the detail from what, path and strerror. */
ibid_err ibid_fail_errno(int err, const char *what, const char *path);

#endif
