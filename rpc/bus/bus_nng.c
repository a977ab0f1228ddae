/* The only file that knows nng (1.5).
 *
 * Server: one REP socket, one context and one thread per worker. A worker receives, runs the
 * handler, sends, and receives again.
 *
 * Client: one REQ socket with one pipe, and a slot (context + aio) per call in flight, reused. What
 * nng would do by itself and we do not want:
 *   - re-send after a time: RESENDTIME is infinite on socket and contexts;
 *   - re-send on reconnect: with an infinite RESENDTIME nng resets a request whose pipe closes
 *     (ECONNRESET). A request still waiting for a pipe is aborted by us when the pipe it waited for
 *     closes (REM_POST). Either way the caller hears UNAVAIL and decides;
 *   - wait for ever for a peer: a call waits two seconds for a pipe.
 * Should a request still arrive twice, the server drops ids it has seen.
 *
 * nng 1.5.2 has a fault (nanomsg/nng #1518): an ipc peer that connects and is gone before the
 * listener wrote its greeting makes the listener stop taking connections for ever, while connecting
 * still seems to work. Its own test for a stale socket file does just that to a live server. So
 *   - a server takes a lock file (PATH.lock) and removes a stale socket file itself;
 *   - a client dials on its first call, not before, and does not close while it is being greeted;
 *   - a server knocks at its own door now and then, and opens a second listener at the same address
 * if nobody opens; calls on connections made before go on. A client whose first call on a
 * connection ends without a reply dials again.
 *
 * Its dialer, too, may stop for ever: seen when a peer was killed while connections were made. A
 * client replaces a dialer that has brought no connection for two seconds. */
#include "rpc/base/clock.h"
#include "rpc/base/log.h"
#include "rpc/bus/bus.h"
#include "rpc/bus/envelope.h"
#include "rpc/bus/schema.h"

#include <errno.h>
#include <fcntl.h>
#include <nng/nng.h>
#include <nng/protocol/reqrep0/rep.h>
#include <nng/protocol/reqrep0/req.h>
#include <pthread.h>
#include <sodium.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    WORKERS = 4,
    SEND_MS = 30000,       /* a reply to a peer that does not read */
    CLOSE_GRACE_MS = 2000, /* the same, while closing */
    CONNECT_MS = 2000,
    RECONNECT_MIN_MS = 10,
    RECONNECT_MAX_MS = 200,
    IDLE_SLOTS = 32,
    KNOCK_EVERY_MS = 2000,
    KNOCK_MS = 2000,
    GREETING_MS = 300,
    /* nng's own limit leaves room for its header; ours is the one that is reported. */
    WIRE_MAX = IBID_BUS_MESSAGE_MAX + 64
};

static ibid_err from_nng(int rv, const char *what, const char *url) {
    ibid_err e = IBID_IO;
    switch (rv) {
    case NNG_ENOMEM:
        e = IBID_NOMEM;
        break;
    case NNG_ETIMEDOUT:
        e = IBID_TIMEOUT;
        break;
    case NNG_EADDRINUSE:
        return ibid_fail(IBID_UNAVAIL, "%s %s: address in use by a live server", what, url);
    case NNG_ECONNREFUSED:
    case NNG_ECONNRESET:
    case NNG_ECONNSHUT:
    case NNG_ECLOSED:
        e = IBID_UNAVAIL;
        break;
    case NNG_EMSGSIZE:
        e = IBID_TOOBIG;
        break;
    case NNG_EADDRINVAL:
    case NNG_EINVAL:
        e = IBID_INVAL;
        break;
    default:
        break;
    }
    return ibid_fail(e, "%s %s: %s", what, url, nng_strerror(rv));
}

/* One nng message from a head and a body's bytes: the body's only copy. */
static ibid_err join(const ibid_enc *head, const void *body, size_t n, nng_msg **out) {
    size_t total;
    if (!ibid_add_size(head->buf.len, n, &total) || total > IBID_BUS_MESSAGE_MAX)
        return ibid_fail(IBID_TOOBIG, "a message of %zu bytes; the limit is %d", n,
                         IBID_BUS_MESSAGE_MAX);
    if (nng_msg_alloc(out, total) != 0)
        return ibid_fail(IBID_NOMEM, "out of memory for a message of %zu bytes", total);
    char *at = nng_msg_body(*out);
    memcpy(at, head->buf.data, head->buf.len);
    memcpy(at + head->buf.len, body, n);
    return IBID_OK;
}

/* ---- Server ---- */

enum worker_state { IDLE, RECEIVING, WORKING, SENDING };

struct worker {
    ibid_server *server;
    nng_ctx ctx;
    nng_aio *aio;
    bool have_ctx, have_thread;
    enum worker_state state; /* under server->lock */
    pthread_t thread;
};

struct ibid_server {
    nng_socket socket;
    nng_listener listener;
    bool have_socket;
    char *url, *name;
    const ibid_method *methods;
    size_t n_methods;
    void *room;
    uint64_t started_ns;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    _Atomic bool closing;
    ibidi_seen *seen; /* under lock */
    size_t n_workers, running;
    struct worker *workers;
    int lock_fd;    /* of PATH.lock; -1 */
    pthread_t door; /* sees that connections are taken (ipc only) */
    bool have_door;
    uint64_t visitors; /* connections taken so far; under lock */
};

bool ibid_call_closing(const ibid_call *call) {
    return call->server && atomic_load(&call->server->closing);
}

static ibid_err ping(const ibid_server *s, const ibid_call *call) {
    ibid_enc_cstr(call->reply, "room", s->name);
    ibid_enc_u64(call->reply, "pid", (uint64_t)getpid());
    ibid_enc_u64(call->reply, "uptime_ms", (ibid_now_ns() - s->started_ns) / 1000000u);
    ibid_enc_cstr(call->reply, "version", IBID_VERSION);
    return IBID_OK;
}

static const ibid_method *find_method(const ibid_server *s, const char *name) {
    for (size_t i = 0; i < s->n_methods; i++)
        if (strcmp(s->methods[i].name, name) == 0) return &s->methods[i];
    return NULL;
}

static bool is_ping(const ibid_server *s, const char *method) {
    size_t n = strlen(s->name);
    return strncmp(method, s->name, n) == 0 && strcmp(method + n, ".ping") == 0;
}

/* Time left on this machine's clock; a clock set back or forward costs or gives at most the
 * deadline. */
static ibid_err deadline_of(const ibidi_request *r, uint64_t *deadline_ns) {
    uint64_t wait = r->deadline_ms ? r->deadline_ms : IBID_BUS_DEADLINE_MS, now = ibid_wall_ms();
    uint64_t passed = r->sent_ms && now > r->sent_ms ? now - r->sent_ms : 0;
    if (passed >= wait)
        return ibid_fail(IBID_TIMEOUT, "%s: the deadline of %llu ms passed before it was begun",
                         r->method, (unsigned long long)wait);
    if (wait > UINT64_C(86400000) * 365) wait = UINT64_C(86400000) * 365;
    *deadline_ns = ibid_now_ns() + (wait - passed) * 1000000u;
    return IBID_OK;
}

/* Runs the request's handler; out: the reply's body, one map. */
static ibid_err run_request(ibid_server *s, const ibidi_request *r, ibid_enc *out) {
    ibid_call call = {.id = r->id, .body = r->body, .reply = out, .server = s};
    const ibid_method *m = find_method(s, r->method);
    bool pinged = is_ping(s, r->method);
    if (!m && !pinged)
        return ibid_fail(IBID_NOTSUP, "the room %s has no method %s", s->name, r->method);
    ibid_err e = deadline_of(r, &call.deadline_ns);
    if (!e) e = ibid_schema_check(r->method, r->body, true);
    if (e) return e;
    ibid_enc_map(out, NULL);
    e = m ? m->fn(s->room, &call) : ping(s, &call);
    if (e) return e;
    ibid_enc_end(out);
    return ibid_enc_done(out);
}

/* Answers the bytes of a request. *out NULL: say nothing (a request seen before, or no memory). */
static void answer(ibid_server *s, nng_msg *in, nng_msg **out) {
    static const char empty_map[] = {(char)0x80};
    ibidi_request r = {0};
    ibid_enc head = {0}, body = {0};
    bool seen = false;
    ibid_err e;
    *out = NULL;
    ibid_err_clear();
    ibid_enc_init(&body, IBID_BUS_MESSAGE_MAX - IBIDI_HEAD_MAX);
    if (nng_msg_len(in) > IBID_BUS_MESSAGE_MAX)
        e = ibid_fail(IBID_TOOBIG, "a request of %zu bytes; the limit is %d", nng_msg_len(in),
                      IBID_BUS_MESSAGE_MAX);
    else
        e = ibidi_request_open(nng_msg_body(in), nng_msg_len(in), &r);
    if (!e) {
        /* A request without a body reads as one with an empty map; handlers never see NULL. */
        ibid_msg *empty = NULL;
        if (!r.body) e = ibid_msg_open(empty_map, sizeof empty_map, &empty);
        if (!r.body && !e) r.body = ibid_msg_root(empty);
        (void)pthread_mutex_lock(&s->lock);
        seen = !e && ibidi_seen_add(s->seen, r.id);
        (void)pthread_mutex_unlock(&s->lock);
        ibid_log_request(r.id);
        if (seen)
            ibid_log(IBID_LOG_WARN, "%s arrived twice; dropped", r.method);
        else if (!e)
            e = run_request(s, &r, &body);
        ibid_msg_close(empty);
    }
    if (!seen) {
        const char *text = e ? ibid_err_detail() : "";
        if (e && !*text) text = ibid_err_text(e);
        if (e) ibid_log(IBID_LOG_INFO, "%s: %s: %s", r.method, ibid_err_code(e), text);
        ibid_err sent = ibidi_reply_head(&head, r.id, e, text);
        if (!sent && e)
            sent = join(&head, ibidi_empty_body, sizeof ibidi_empty_body, out);
        else if (!sent)
            sent = join(&head, body.buf.data, body.buf.len, out);
        if (sent) ibid_log(IBID_LOG_ERROR, "%s: no reply: %s", r.method, ibid_err_detail());
    }
    ibid_log_request(0);
    ibid_msg_close(r.msg);
    ibid_enc_fini(&head);
    ibid_enc_fini(&body);
}

/* Moves on unless the server closes and there is nothing left to lose. */
static bool enter(struct worker *w, enum worker_state state) {
    ibid_server *s = w->server;
    (void)pthread_mutex_lock(&s->lock);
    bool go = state != RECEIVING || !s->closing;
    w->state = state;
    /* Begun under the lock, so that close finds it and can cancel it. */
    if (go && state == RECEIVING) nng_ctx_recv(w->ctx, w->aio);
    if (go && state == SENDING) nng_ctx_send(w->ctx, w->aio);
    (void)pthread_mutex_unlock(&s->lock);
    return go;
}

static void *worker_main(void *arg) {
    struct worker *w = arg;
    ibid_server *s = w->server;
    for (;;) {
        nng_aio_set_timeout(w->aio, NNG_DURATION_INFINITE);
        if (!enter(w, RECEIVING)) break;
        nng_aio_wait(w->aio);
        int rv = nng_aio_result(w->aio);
        if (rv == NNG_ECANCELED || rv == NNG_ECLOSED) break;
        if (rv != 0) {
            ibid_log(IBID_LOG_WARN, "receiving: %s", nng_strerror(rv));
            (void)usleep(10000); /* out of memory or descriptors: no busy loop */
            continue;
        }
        nng_msg *in = nng_aio_get_msg(w->aio), *out = NULL;
        (void)enter(w, WORKING);
        answer(s, in, &out);
        nng_msg_free(in);
        if (!out) continue;
        nng_aio_set_timeout(w->aio, SEND_MS);
        nng_aio_set_msg(w->aio, out);
        (void)enter(w, SENDING);
        nng_aio_wait(w->aio);
        rv = nng_aio_result(w->aio);
        if (rv != 0) {
            ibid_log(IBID_LOG_WARN, "a reply was not taken: %s", nng_strerror(rv));
            nng_msg_free(out);
        }
    }
    (void)pthread_mutex_lock(&s->lock);
    w->state = IDLE;
    s->running--;
    (void)pthread_cond_broadcast(&s->changed);
    (void)pthread_mutex_unlock(&s->lock);
    return NULL;
}

static void cond_init(pthread_cond_t *c) {
    pthread_condattr_t a;
    (void)pthread_condattr_init(&a);
    (void)pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    (void)pthread_cond_init(c, &a);
    (void)pthread_condattr_destroy(&a);
}

static struct timespec at_ns(uint64_t ns) {
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000u),
                             .tv_nsec = (long)(ns % 1000000000u)};
}

/* NULL unless the address is a path. */
static const char *path_of(const char *url) {
    return strncmp(url, "ipc://", 6) == 0 ? url + 6 : NULL;
}

static uint64_t in_ms(uint64_t ms) {
    return ibid_now_ns() + ms * UINT64_C(1000000);
}

/* Whoever holds the lock owns the address, so a socket file found there is a dead server's. */
static ibid_err own_address(ibid_server *s, const char *path) {
    char file[IBID_BUS_URL_MAX + 8];
    struct stat st;
    (void)snprintf(file, sizeof file, "%s.lock", path);
    s->lock_fd = open(file, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (s->lock_fd < 0) return ibid_fail_errno(errno, "cannot create", file);
    if (flock(s->lock_fd, LOCK_EX | LOCK_NB) != 0)
        return errno == EWOULDBLOCK ? from_nng(NNG_EADDRINUSE, "cannot listen at", s->url)
                                    : ibid_fail_errno(errno, "cannot lock", file);
    if (lstat(path, &st) != 0) return IBID_OK;
    if (!S_ISSOCK(st.st_mode)) return ibid_fail(IBID_IO, "%s is in the way: not a socket", path);
    return unlink(path) == 0 ? IBID_OK : ibid_fail_errno(errno, "cannot remove", path);
}

static int add_listener(ibid_server *s) {
    nng_listener *l = &s->listener;
    int rv = nng_listener_create(l, s->socket, s->url);
    if (!rv) rv = nng_listener_set_size(*l, NNG_OPT_RECVMAXSZ, WIRE_MAX);
    if (!rv && path_of(s->url)) rv = nng_listener_set_int(*l, NNG_OPT_IPC_PERMISSIONS, 0600);
    return rv ? rv : nng_listener_start(*l, 0);
}

static void visitor_cb(nng_pipe pipe, nng_pipe_ev ev, void *arg) {
    ibid_server *s = arg;
    (void)pipe;
    (void)ev;
    (void)pthread_mutex_lock(&s->lock);
    s->visitors++;
    (void)pthread_cond_broadcast(&s->changed);
    (void)pthread_mutex_unlock(&s->lock);
}

static ibid_err server_listen(ibid_server *s) {
    const char *path = path_of(s->url);
    ibid_err e = path ? own_address(s, path) : IBID_OK;
    if (e) return e;
    int rv = nng_rep0_open(&s->socket);
    if (rv) return from_nng(rv, "cannot open", s->url);
    s->have_socket = true;
    rv = nng_socket_set_size(s->socket, NNG_OPT_RECVMAXSZ, WIRE_MAX);
    if (!rv) rv = nng_pipe_notify(s->socket, NNG_PIPE_EV_ADD_POST, visitor_cb, s);
    if (!rv) rv = add_listener(s);
    return rv ? from_nng(rv, "cannot listen at", s->url) : IBID_OK;
}

/* ---- The door: see the head of this file ---- */

/* Waits on the server's condition until test or time is out; the lock is held. */
static bool wait_visitor(ibid_server *s, uint64_t before, uint64_t until_ns) {
    struct timespec t = at_ns(until_ns);
    while (s->visitors == before && !s->closing)
        if (pthread_cond_timedwait(&s->changed, &s->lock, &t) != 0) break;
    return s->visitors != before;
}

static void greeted_cb(nng_pipe pipe, nng_pipe_ev ev, void *arg) {
    (void)pipe;
    (void)ev;
    atomic_store((_Atomic bool *)arg, true);
}

/* Connects to ourselves. False if the listener did not take the connection. */
static bool knock(ibid_server *s, uint64_t before) {
    nng_socket visitor;
    _Atomic bool greeted = false;
    if (nng_req0_open(&visitor) != 0) return true; /* out of something; no news of the door */
    int rv = nng_pipe_notify(visitor, NNG_PIPE_EV_ADD_POST, greeted_cb, &greeted);
    if (!rv) rv = nng_dial(visitor, s->url, NULL, NNG_FLAG_NONBLOCK);
    (void)pthread_mutex_lock(&s->lock);
    bool taken = rv != 0 || wait_visitor(s, before, in_ms(KNOCK_MS)) || s->closing;
    (void)pthread_mutex_unlock(&s->lock);
    for (int i = 0; i < GREETING_MS / 10 && !atomic_load(&greeted) && !rv; i++) (void)usleep(10000);
    (void)nng_close(visitor);
    return taken;
}

static void *door_main(void *arg) {
    ibid_server *s = arg;
    (void)pthread_mutex_lock(&s->lock);
    while (!s->closing) {
        uint64_t before = s->visitors;
        if (wait_visitor(s, before, in_ms(KNOCK_EVERY_MS)) || s->closing) {
            struct timespec t = at_ns(in_ms(100)); /* a busy door works */
            if (!s->closing) (void)pthread_cond_timedwait(&s->changed, &s->lock, &t);
            continue;
        }
        (void)pthread_mutex_unlock(&s->lock);
        if (!knock(s, before) && !knock(s, before)) { /* once may be a machine out of breath */
            (void)nng_listener_close(s->listener);
            (void)unlink(path_of(s->url));
            int rv = add_listener(s);
            ibid_log(IBID_LOG_WARN, "%s took no connections any more; listening anew: %s", s->url,
                     rv ? nng_strerror(rv) : "ok");
        }
        (void)pthread_mutex_lock(&s->lock);
    }
    (void)pthread_mutex_unlock(&s->lock);
    return NULL;
}

static ibid_err start_worker(ibid_server *s, struct worker *w) {
    w->server = s;
    int rv = nng_ctx_open(&w->ctx, s->socket);
    w->have_ctx = rv == 0;
    if (!rv) rv = nng_aio_alloc(&w->aio, NULL, NULL);
    if (rv) return from_nng(rv, "cannot serve", s->url);
    (void)pthread_mutex_lock(&s->lock);
    s->running++;
    (void)pthread_mutex_unlock(&s->lock);
    if (pthread_create(&w->thread, NULL, worker_main, w) == 0) {
        w->have_thread = true;
        return IBID_OK;
    }
    (void)pthread_mutex_lock(&s->lock);
    s->running--;
    (void)pthread_mutex_unlock(&s->lock);
    return ibid_fail(IBID_NOMEM, "cannot start a thread to serve %s", s->url);
}

ibid_err ibid_server_open(const ibid_server_opts *o, ibid_server **out) {
    ibid_err e = IBID_OK;
    ibid_server *s = ibid_calloc(1, sizeof *s);
    if (!s) return ibid_fail(IBID_NOMEM, "out of memory for a server");
    (void)pthread_mutex_init(&s->lock, NULL);
    cond_init(&s->changed);
    s->n_workers = o->n_workers ? o->n_workers : WORKERS;
    s->url = ibid_strdup(o->url);
    s->name = ibid_strdup(o->name);
    s->seen = ibidi_seen_open();
    s->workers = ibid_calloc(s->n_workers, sizeof *s->workers);
    s->methods = o->methods;
    s->n_methods = o->n_methods;
    s->room = o->room;
    s->started_ns = ibid_now_ns();
    s->lock_fd = -1;
    if (!s->url || !s->name || !s->seen || !s->workers) {
        e = ibid_fail(IBID_NOMEM, "out of memory for a server");
        goto done;
    }
    while (!o->n_methods && s->methods && s->methods[s->n_methods].name) s->n_methods++;
    for (size_t i = 0; i < s->n_methods && !e; i++)
        if (!ibid_schema_knows(s->methods[i].name))
            e = ibid_fail(IBID_INTERNAL, "%s has no rows in rpc/bus/schema.h", s->methods[i].name);
    if (!e) e = server_listen(s);
    for (size_t i = 0; i < s->n_workers && !e; i++) e = start_worker(s, &s->workers[i]);
    if (!e && path_of(s->url)) s->have_door = pthread_create(&s->door, NULL, door_main, s) == 0;
    if (e) goto done;
    ibid_log(IBID_LOG_INFO, "%s serves at %s with %zu workers", s->name, s->url, s->n_workers);
    *out = s;
    s = NULL;
done:
    ibid_server_close(s);
    return e;
}

static void cancel_workers(ibid_server *s, enum worker_state state) {
    for (size_t i = 0; i < s->n_workers; i++)
        if (s->workers[i].have_thread && s->workers[i].state == state)
            nng_aio_cancel(s->workers[i].aio);
}

/* Waits for the workers: those who receive are woken at once, those whose reply nobody reads after
 * a grace, those in a handler are waited for. */
static void stop_workers(ibid_server *s) {
    (void)pthread_mutex_lock(&s->lock);
    atomic_store(&s->closing, true);
    (void)pthread_cond_broadcast(&s->changed);
    cancel_workers(s, RECEIVING);
    uint64_t grace = in_ms(CLOSE_GRACE_MS);
    while (s->running) {
        struct timespec t = at_ns(in_ms(50));
        (void)pthread_cond_timedwait(&s->changed, &s->lock, &t);
        if (ibid_now_ns() > grace) cancel_workers(s, SENDING);
    }
    (void)pthread_mutex_unlock(&s->lock);
    for (size_t i = 0; i < s->n_workers; i++)
        if (s->workers[i].have_thread) (void)pthread_join(s->workers[i].thread, NULL);
    if (s->have_door) (void)pthread_join(s->door, NULL);
}

void ibid_server_close(ibid_server *s) {
    if (!s) return;
    if (s->workers) stop_workers(s);
    for (size_t i = 0; s->workers && i < s->n_workers; i++) {
        if (s->workers[i].have_ctx) (void)nng_ctx_close(s->workers[i].ctx);
        nng_aio_free(s->workers[i].aio);
    }
    if (s->have_socket) (void)nng_close(s->socket);
    if (s->lock_fd >= 0) (void)close(s->lock_fd); /* the file stays: removing it would race */
    ibidi_seen_close(s->seen);
    (void)pthread_cond_destroy(&s->changed);
    (void)pthread_mutex_destroy(&s->lock);
    ibid_free(s->workers);
    ibid_free(s->name);
    ibid_free(s->url);
    ibid_free(s);
}

/* ---- Client ---- */

struct slot { /* one call in flight, or one waiting to be used again */
    nng_ctx ctx;
    nng_aio *aio;
    struct slot *next;
    int pipe;  /* the pipe in place when it began; under client->lock */
    bool lost; /* that pipe closed */
};

struct ibid_client {
    nng_socket socket;
    bool have_socket;
    char *url;
    _Atomic uint64_t next_id;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_mutex_t dial_lock;
    bool dialed; /* this and the next two: under dial_lock */
    nng_dialer dialer;
    uint64_t dialed_ns;
    int pipe;         /* 0: not connected */
    uint64_t lost_ns; /* when the last pipe closed */
    bool proven;      /* a reply came over it */
    nng_pipe handle;
    struct slot *busy, *idle;
    size_t n_idle;
};

static void pipe_cb(nng_pipe pipe, nng_pipe_ev ev, void *arg) {
    ibid_client *c = arg;
    int id = nng_pipe_id(pipe);
    (void)pthread_mutex_lock(&c->lock);
    if (ev == NNG_PIPE_EV_ADD_POST) {
        c->pipe = id;
        c->handle = pipe;
        c->proven = false;
    } else {
        if (c->pipe == id) c->pipe = 0;
        c->lost_ns = ibid_now_ns();
        for (struct slot *s = c->busy; s; s = s->next) {
            if (s->pipe != id) continue;
            s->lost = true;
            nng_aio_abort(s->aio, NNG_ECONNRESET);
        }
    }
    (void)pthread_cond_broadcast(&c->changed);
    (void)pthread_mutex_unlock(&c->lock);
}

static int client_prepare(ibid_client *c) {
    int rv = nng_req0_open(&c->socket);
    if (rv) return rv;
    c->have_socket = true;
    rv = nng_socket_set_ms(c->socket, NNG_OPT_REQ_RESENDTIME, NNG_DURATION_INFINITE);
    if (!rv) rv = nng_socket_set_size(c->socket, NNG_OPT_RECVMAXSZ, WIRE_MAX);
    if (!rv) rv = nng_pipe_notify(c->socket, NNG_PIPE_EV_ADD_POST, pipe_cb, c);
    if (!rv) rv = nng_pipe_notify(c->socket, NNG_PIPE_EV_REM_POST, pipe_cb, c);
    return rv;
}

/* On the first call: a client that never calls must not knock and run. */
static ibid_err client_dial(ibid_client *c) {
    nng_dialer d = NNG_DIALER_INITIALIZER;
    int rv = 0;
    (void)pthread_mutex_lock(&c->dial_lock);
    if (c->dialed) goto done;
    rv = nng_dialer_create(&d, c->socket, c->url);
    if (!rv) rv = nng_dialer_set_size(d, NNG_OPT_RECVMAXSZ, WIRE_MAX);
    if (!rv) rv = nng_dialer_set_ms(d, NNG_OPT_RECONNMINT, RECONNECT_MIN_MS);
    if (!rv) rv = nng_dialer_set_ms(d, NNG_OPT_RECONNMAXT, RECONNECT_MAX_MS);
    if (!rv) rv = nng_dialer_start(d, NNG_FLAG_NONBLOCK);
    if (rv) (void)nng_dialer_close(d);
    c->dialed = rv == 0;
    c->dialer = d;
    c->dialed_ns = ibid_now_ns();
done:
    (void)pthread_mutex_unlock(&c->dial_lock);
    return rv ? from_nng(rv, "cannot dial", c->url) : IBID_OK;
}

/* After a call that got no connection: the next one dials anew. */
static void drop_dialer(ibid_client *c) {
    (void)pthread_mutex_lock(&c->dial_lock);
    (void)pthread_mutex_lock(&c->lock);
    bool connected = c->pipe != 0;
    uint64_t since = c->lost_ns > c->dialed_ns ? c->lost_ns : c->dialed_ns;
    (void)pthread_mutex_unlock(&c->lock);
    if (c->dialed && !connected && ibid_ms_since(since) >= CONNECT_MS) {
        (void)nng_dialer_close(c->dialer);
        c->dialed = false;
    }
    (void)pthread_mutex_unlock(&c->dial_lock);
}

ibid_err ibid_client_open(const char *url, ibid_client **out) {
    ibid_err e = IBID_OK;
    uint64_t first = 0;
    ibid_client *c = ibid_calloc(1, sizeof *c);
    if (!c) return ibid_fail(IBID_NOMEM, "out of memory for a client");
    (void)pthread_mutex_init(&c->lock, NULL);
    (void)pthread_mutex_init(&c->dial_lock, NULL);
    cond_init(&c->changed);
    randombytes_buf(&first, sizeof first);
    atomic_store(&c->next_id, first);
    c->url = ibid_strdup(url);
    if (!c->url) {
        e = ibid_fail(IBID_NOMEM, "out of memory for a client");
        goto done;
    }
    int rv = client_prepare(c);
    if (rv) {
        e = from_nng(rv, "cannot open a client of", url);
        goto done;
    }
    *out = c;
    c = NULL;
done:
    ibid_client_close(c);
    return e;
}

static void slot_free(struct slot *s) {
    if (!s) return;
    (void)nng_ctx_close(s->ctx);
    nng_aio_free(s->aio);
    ibid_free(s);
}

/* Lets a connection that is being made be greeted before it is closed. */
static void await_greeting(ibid_client *c) {
    struct timespec t = at_ns(in_ms(GREETING_MS));
    if (!c->dialed || !path_of(c->url) || access(path_of(c->url), F_OK) != 0) return;
    (void)pthread_mutex_lock(&c->lock);
    while (!c->pipe && pthread_cond_timedwait(&c->changed, &c->lock, &t) == 0) {
    }
    (void)pthread_mutex_unlock(&c->lock);
}

void ibid_client_close(ibid_client *c) {
    if (!c) return;
    if (c->have_socket) await_greeting(c);
    while (c->idle) {
        struct slot *next = c->idle->next;
        slot_free(c->idle);
        c->idle = next;
    }
    if (c->have_socket) (void)nng_close(c->socket);
    (void)pthread_cond_destroy(&c->changed);
    (void)pthread_mutex_destroy(&c->dial_lock);
    (void)pthread_mutex_destroy(&c->lock);
    ibid_free(c->url);
    ibid_free(c);
}

static ibid_err slot_new(ibid_client *c, struct slot **out) {
    struct slot *s = ibid_calloc(1, sizeof *s);
    if (!s) return ibid_fail(IBID_NOMEM, "out of memory for a call");
    int rv = nng_ctx_open(&s->ctx, c->socket);
    if (rv) {
        ibid_free(s);
        return from_nng(rv, "cannot call", c->url);
    }
    rv = nng_ctx_set_ms(s->ctx, NNG_OPT_REQ_RESENDTIME, NNG_DURATION_INFINITE);
    if (!rv) rv = nng_aio_alloc(&s->aio, NULL, NULL);
    if (rv) {
        slot_free(s);
        return from_nng(rv, "cannot call", c->url);
    }
    *out = s;
    return IBID_OK;
}

/* Waits for a pipe and takes a slot that is bound to it. */
static ibid_err slot_take(ibid_client *c, uint64_t deadline_ns, struct slot **out) {
    uint64_t patience = in_ms(CONNECT_MS);
    struct timespec t = at_ns(patience < deadline_ns ? patience : deadline_ns);
    struct slot *s = NULL;
    ibid_err e = client_dial(c);
    if (e) return e;
    (void)pthread_mutex_lock(&c->lock);
    if (c->idle) {
        s = c->idle;
        c->idle = s->next;
        c->n_idle--;
    }
    (void)pthread_mutex_unlock(&c->lock);
    if (!s) e = slot_new(c, &s);
    if (e) return e;
    (void)pthread_mutex_lock(&c->lock);
    while (!c->pipe && pthread_cond_timedwait(&c->changed, &c->lock, &t) == 0) {
    }
    if (c->pipe) {
        s->pipe = c->pipe;
        s->lost = false;
        s->next = c->busy;
        c->busy = s;
    } else {
        e = ibid_fail(IBID_UNAVAIL, "nobody answers at %s", c->url);
    }
    (void)pthread_mutex_unlock(&c->lock);
    if (e) {
        slot_free(s);
        drop_dialer(c);
    } else {
        *out = s;
    }
    return e;
}

/* rv: how the call ended. Unless it ended well the slot is not used again (its context may still
 * expect a reply), and what the end says about the connection is noted. */
static void slot_give(ibid_client *c, struct slot *s, int rv) {
    bool redial = false;
    nng_pipe handle = {0};
    (void)pthread_mutex_lock(&c->lock);
    struct slot **at = &c->busy;
    while (*at != s) at = &(*at)->next;
    *at = s->next;
    if (c->pipe == s->pipe) {
        if (rv == 0) c->proven = true;
        if (rv == NNG_ECONNRESET) c->pipe = 0; /* its REM_POST is on the way */
        redial = rv == NNG_ETIMEDOUT && !c->proven;
        handle = c->handle;
    }
    bool keep = rv == 0 && c->n_idle < IDLE_SLOTS;
    if (keep) {
        s->next = c->idle;
        c->idle = s;
        c->n_idle++;
    }
    (void)pthread_mutex_unlock(&c->lock);
    if (redial) (void)nng_pipe_close(handle);
    if (!keep) slot_free(s);
}

/* Begins one operation unless the pipe is gone already, and waits for its end. */
static int slot_run(ibid_client *c, struct slot *s, uint64_t deadline_ns,
                    void (*begin)(nng_ctx, nng_aio *)) {
    uint64_t now = ibid_now_ns();
    if (now >= deadline_ns) return NNG_ETIMEDOUT;
    uint64_t ms = (deadline_ns - now + 999999u) / 1000000u;
    nng_aio_set_timeout(s->aio, ms > INT32_MAX ? INT32_MAX : (nng_duration)ms);
    (void)pthread_mutex_lock(&c->lock);
    bool lost = s->lost;
    if (!lost) begin(s->ctx, s->aio);
    (void)pthread_mutex_unlock(&c->lock);
    if (lost) return NNG_ECONNRESET;
    nng_aio_wait(s->aio);
    return nng_aio_result(s->aio);
}

static ibid_err call_failed(const ibid_client *c, const char *method, int rv, bool sent) {
    if (rv == NNG_ETIMEDOUT)
        return ibid_fail(IBID_TIMEOUT, "%s: no reply from %s in time", method, c->url);
    if (rv == NNG_ECONNRESET || rv == NNG_ECLOSED || rv == NNG_ECANCELED)
        return ibid_fail(IBID_UNAVAIL, "%s: the server at %s went away %s", method, c->url,
                         sent ? "before it replied" : "before it was asked");
    return from_nng(rv, method, c->url);
}

/* One attempt; *sent: nng took the message, which is ours no more. */
static int attempt(ibid_client *c, struct slot *s, nng_msg *msg, uint64_t deadline_ns, bool *sent,
                   nng_msg **out) {
    nng_msg_header_clear(msg);
    nng_aio_set_msg(s->aio, msg);
    int rv = slot_run(c, s, deadline_ns, nng_ctx_send);
    if (rv) return rv;
    *sent = true;
    nng_aio_set_msg(s->aio, NULL);
    rv = slot_run(c, s, deadline_ns, nng_ctx_recv);
    if (!rv) *out = nng_aio_get_msg(s->aio);
    return rv;
}

/* Sends a request and waits for the bytes of its reply. Takes msg. A connection that breaks before
 * it took the message is no harm: the message waits for the next one. */
static ibid_err exchange(ibid_client *c, const char *method, nng_msg *msg, uint64_t deadline_ns,
                         nng_msg **out) {
    ibid_err e = IBID_OK;
    bool sent = false;
    int rv;
    do {
        struct slot *s = NULL;
        e = slot_take(c, deadline_ns, &s);
        if (e) break;
        rv = attempt(c, s, msg, deadline_ns, &sent, out);
        slot_give(c, s, rv);
        if (rv) e = call_failed(c, method, rv, sent);
    } while (e && !sent && rv == NNG_ECONNRESET);
    if (!sent) nng_msg_free(msg);
    return e;
}

/* Reads a reply: the room's own failure becomes ours, a good body goes to out. */
static ibid_err read_reply(const char *method, uint64_t id, nng_msg *raw, ibid_reply *out) {
    ibidi_answer a = {0};
    ibid_err e = ibidi_reply_open(nng_msg_body(raw), nng_msg_len(raw), &a);
    if (!e && a.id != id && a.id != 0)
        e = ibid_fail(IBID_PROTO, "%s: the reply answers another request", method);
    if (!e && a.code) e = ibid_fail(a.code, "%s", a.error[0] ? a.error : ibid_err_text(a.code));
    if (!e && a.id != id) e = ibid_fail(IBID_PROTO, "%s: a reply without an id", method);
    if (!e) e = ibid_schema_check(method, a.body, false);
    if (!e && out) {
        *out = (ibid_reply){.msg = a.msg, .body = a.body, .raw = raw};
        return IBID_OK;
    }
    ibid_msg_close(a.msg);
    nng_msg_free(raw);
    return e;
}

ibid_err ibid_client_call(ibid_client *c, const char *method, const ibid_enc *body,
                          uint64_t deadline_ms, ibid_reply *out) {
    ibid_enc head = {0};
    nng_msg *msg = NULL, *raw = NULL;
    if (out) *out = (ibid_reply){0};
    if (!deadline_ms) deadline_ms = IBID_BUS_DEADLINE_MS;
    if (deadline_ms > UINT64_C(86400000) * 365) deadline_ms = UINT64_C(86400000) * 365;
    uint64_t deadline_ns = ibid_now_ns() + deadline_ms * 1000000u;
    uint64_t id = atomic_fetch_add(&c->next_id, 1);
    if (id == 0) id = atomic_fetch_add(&c->next_id, 1); /* 0 means: no id */
    if (body && (body->err || body->depth || !body->buf.len))
        return ibid_fail(body->err ? body->err : IBID_INTERNAL, "%s: its body was not finished",
                         method);
    ibid_err e = ibidi_request_head(&head, id, method, deadline_ms, ibid_wall_ms());
    if (!e && body)
        e = join(&head, body->buf.data, body->buf.len, &msg);
    else if (!e)
        e = join(&head, ibidi_empty_body, sizeof ibidi_empty_body, &msg);
    ibid_enc_fini(&head);
    if (!e) e = exchange(c, method, msg, deadline_ns, &raw);
    return e ? e : read_reply(method, id, raw, out);
}

void ibid_reply_close(ibid_reply *r) {
    if (!r) return;
    ibid_msg_close(r->msg);
    if (r->raw) nng_msg_free(r->raw);
    *r = (ibid_reply){0};
}

/* The room's name is the last part of the address, without ".sock". */
static void ping_method(const char *url, char out[IBIDI_METHOD_MAX]) {
    const char *name = strrchr(url, '/');
    name = name ? name + 1 : url;
    size_t n = strlen(name);
    if (n > 5 && strcmp(name + n - 5, ".sock") == 0) n -= 5;
    if (n > IBIDI_METHOD_MAX - 8) n = IBIDI_METHOD_MAX - 8;
    (void)snprintf(out, IBIDI_METHOD_MAX, "%.*s.ping", (int)n, name);
}

ibid_err ibid_client_ping(ibid_client *c, uint64_t timeout_ms, uint64_t *pid, uint64_t *uptime_ms) {
    char method[IBIDI_METHOD_MAX];
    ibid_reply r = {0};
    ping_method(c->url, method);
    ibid_err e = ibid_client_call(c, method, NULL, timeout_ms, &r);
    if (!e && pid) *pid = ibid_get_u64(r.body, "pid", 0);
    if (!e && uptime_ms) *uptime_ms = ibid_get_u64(r.body, "uptime_ms", 0);
    ibid_reply_close(&r);
    return e;
}
