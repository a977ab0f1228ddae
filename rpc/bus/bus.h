/* The bus: requests and replies between rooms over nng (ipc:// between processes, inproc:// inside
 * one). Sole includer of nng: bus_nng.c.
 *
 * Traps handled there (docs/design.md section 2): RESENDTIME infinite and a server that drops a
 * request id it has already seen; RECVMAXSZ set before listening, and checked again by us because
 * inproc ignores it; sockets 0600; a listener that went deaf (see bus_nng.c). Long answers are streams, pulled by next(stream, seq). */
#ifndef IBID_BUS_H
#define IBID_BUS_H

#include "rpc/bus/msg.h"

enum {
    IBID_BUS_MESSAGE_MAX = 96 * 1024 * 1024,
    IBID_BUS_DEADLINE_MS = 30000, /* default of a call */
    IBID_BUS_URL_MAX = 128
};

/* ---- Server ---- */
typedef struct ibid_server ibid_server;
typedef struct ibid_call {
    uint64_t id;          /* request id; also this thread's log id while the handler runs */
    uint64_t deadline_ns; /* ibid_now_ns() time after which nobody waits for the reply */
    const ibid_val *body; /* never NULL; valid while the handler runs */
    ibid_enc *reply;      /* inside the reply's body map: add fields. Ignored if the handler fails */
    const ibid_server *server;
} ibid_call;
/* True once the server is being closed: a handler that waits for something gives up, with UNAVAIL. */
bool ibid_call_closing(const ibid_call *call);

/* Returns the request's outcome; on failure the reply carries code and ibid_err_detail(). */
typedef ibid_err (*ibid_handler)(void *room, const ibid_call *call);

typedef struct ibid_method {
    const char *name; /* "kvstore.blocks_put" */
    ibid_handler fn;
} ibid_method;

typedef struct ibid_server_opts {
    const char *url;
    const ibid_method *methods; /* "<room>.ping" is added by the bus */
    size_t n_methods;           /* 0: methods ends with {NULL, NULL} */
    void *room;        /* handed to every handler */
    size_t n_workers;  /* handlers running at once; 0 = 4. A handler that waits (next, status with
                        * wait) holds one all the while, and ping needs one too: count them in */
    const char *name;  /* room name, for ping and logs */
} ibid_server_opts;

/* Listens and serves on its own threads until closed. Bodies are checked against schema.h before a
 * handler sees them. Errors: UNAVAIL (address in use by a live server: the detail says so), IO. */
ibid_err ibid_server_open(const ibid_server_opts *o, ibid_server **out);
/* Stops taking requests, lets running handlers finish, frees. Replies that a peer does not read are
 * given up after two seconds. NULL is fine. */
void ibid_server_close(ibid_server *s);

/* ---- Client: safe to use from several threads at once. Connects lazily and again after a restart of
 * the server. ---- */
typedef struct ibid_client ibid_client;
typedef struct ibid_reply {
    ibid_msg *msg;
    const ibid_val *body;
    void *raw; /* the bytes it borrows from */
} ibid_reply;

ibid_err ibid_client_open(const char *url, ibid_client **out);
void ibid_client_close(ibid_client *c);

/* One request. body: an encoder whose root map the caller opened and closed, or NULL for {}; it is
 * not freed. deadline_ms 0 = IBID_BUS_DEADLINE_MS. On the room's own failure returns its code with its
 * text as detail. Errors besides: UNAVAIL (nobody answers at that address within two seconds or the
 * deadline, or the server went away while we waited), TIMEOUT, TOOBIG, PROTO (the reply breaks the
 * schema). A request is never sent twice by itself.
 * out may be NULL; else close with ibid_reply_close. */
ibid_err ibid_client_call(ibid_client *c, const char *method, const ibid_enc *body,
                          uint64_t deadline_ms, ibid_reply *out);
/* The two halves of a typed call: begin opens a body of at most cap bytes; after its fields were added,
 * finish closes it, sends it as ibid_client_call does, and frees it in every case. */
void ibid_request_begin(ibid_enc *body, size_t cap);
ibid_err ibid_request_finish(ibid_client *c, const char *method, ibid_enc *body,
                             uint64_t deadline_ms, ibid_reply *out);
void ibid_reply_close(ibid_reply *r);
/* IBID_OK when the room answers a ping within timeout_ms. Fills pid and uptime if not NULL. */
ibid_err ibid_client_ping(ibid_client *c, uint64_t timeout_ms, uint64_t *pid, uint64_t *uptime_ms);

/* ---- Addresses ----
 * ipc://DIR/run/ROOM.sock for the data folder DIR (absolute), or, where that path is too long for a
 * UNIX socket, a 0700 folder named by DIR's hash under XDG_RUNTIME_DIR or /tmp. Creates the folder
 * (0700). inproc gives inproc://ibid-HASH/ROOM. Beside each socket lies ROOM.sock.lock, held by the
 * server that owns the address; it stays when the server ends. */
ibid_err ibid_bus_url(const char *data_dir, const char *room, bool inproc,
                      char url[IBID_BUS_URL_MAX]);

/* ---- Streams, server side: a bounded queue of MessagePack events per stream ----
 * The producer appends events; the client asks next(stream, seq) and gets event number seq, waiting up
 * to its deadline. Events before the last acknowledged seq are freed. A stream nobody asked for 60 s
 * is cancelled. */
typedef struct ibid_streams ibid_streams; /* a table of streams, owned by a room */
typedef struct ibid_stream ibid_stream;   /* one stream, counted reference */

ibid_err ibid_streams_open(size_t max_streams, size_t max_events, ibid_streams **out);
/* Closing a room with streams: ibid_streams_stop, join the producers, ibid_server_close,
 * ibid_streams_close. stop cancels every stream, wakes who waits (UNAVAIL, as for new ones). */
void ibid_streams_stop(ibid_streams *t);
void ibid_streams_close(ibid_streams *t); /* producers and handlers must have ended */
/* Another patience than 60 s for streams nobody asks for (tests). */
void ibid_streams_patience(ibid_streams *t, uint64_t ms);
/* BUSY when the table is full of streams somebody still wants. *id goes to the client. */
ibid_err ibid_stream_begin(ibid_streams *t, uint64_t *id, ibid_stream **out);
/* Copies one encoded value (an ibid_enc whose root map is closed). last: the final event. Waits while
 * the queue is full. CANCELLED when the client cancelled or went away: stop producing. */
ibid_err ibid_stream_push(ibid_stream *s, const ibid_enc *event, bool last);
/* Ends the stream with an error: after the events before it, next answers e with this detail. */
void ibid_stream_fail(ibid_stream *s, ibid_err e, const char *detail);
bool ibid_stream_cancelled(ibid_stream *s);
void ibid_stream_release(ibid_stream *s); /* by the producer, after last or fail */
/* Handlers a room lists in its methods table; `room` must be the ibid_streams. Because a room's own
 * handlers get the room, wrap them: they are one line each.
 *   next   {stream:u64, seq:u64} -> {seq, last:bool, event:{...}}; TIMEOUT if none came in time (ask
 *          again for the same seq); NOTFOUND for a stream that is unknown or was given up
 *   cancel {stream:u64} -> {}; an unknown stream is fine */
ibid_err ibid_streams_next(ibid_streams *t, const ibid_call *call);
ibid_err ibid_streams_cancel(ibid_streams *t, const ibid_call *call);
#endif
