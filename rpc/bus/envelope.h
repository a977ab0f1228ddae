/* The outer map of requests and replies, and the table of request ids a server has seen. No
 * sockets: pure functions, so that a fuzzer can drive them. Internal to rpc/bus. */
#ifndef IBID_BUS_ENVELOPE_H
#define IBID_BUS_ENVELOPE_H

#include "rpc/bus/msg.h"

enum { IBIDI_METHOD_MAX = 96, IBIDI_HEAD_MAX = 2048, IBIDI_ERROR_TEXT_MAX = 1024 };

/* A message is head bytes followed by the body's bytes: the body is copied once, into the socket's
 * own message. Both write the head; the caller appends the body, one encoded map. */
ibid_err ibidi_request_head(ibid_enc *e, uint64_t id, const char *method, uint64_t deadline_ms,
                            uint64_t sent_ms);
ibid_err ibidi_reply_head(ibid_enc *e, uint64_t id, ibid_err code, const char *error);
/* The body {}: what follows a head when there is nothing to say. */
extern const char ibidi_empty_body[1];

typedef struct ibidi_request {
    ibid_msg *msg;
    uint64_t id; /* also set when the rest could not be read, if it was readable; else 0 */
    char method[IBIDI_METHOD_MAX];
    uint64_t deadline_ms, sent_ms;
    const ibid_val *body; /* NULL if absent */
} ibidi_request;
/* Borrows data. r is always set: close r->msg with ibid_msg_close. Errors: PROTO, NOMEM. */
ibid_err ibidi_request_open(const void *data, size_t n, ibidi_request *r);

typedef struct ibidi_answer {
    ibid_msg *msg;
    uint64_t id;
    ibid_err code;
    char error[IBIDI_ERROR_TEXT_MAX];
    const ibid_val *body;
} ibidi_answer;
ibid_err ibidi_reply_open(const void *data, size_t n, ibidi_answer *r);

/* The last IBIDI_SEEN request ids. Not thread-safe. */
enum { IBIDI_SEEN = 8192 };
typedef struct ibidi_seen ibidi_seen;
ibidi_seen *ibidi_seen_open(void); /* NULL: out of memory */
void ibidi_seen_close(ibidi_seen *s);
/* Remembers id; true if it was there already. */
bool ibidi_seen_add(ibidi_seen *s, uint64_t id);
#endif
