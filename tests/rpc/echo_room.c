#include "tests/rpc/echo_room.h"
#include "rpc/base/mem.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct echo_room {
    ibid_server *server;
    ibid_streams *streams;
    _Atomic uint64_t runs, cancelled;
    _Atomic int producers;
};

static ibid_err do_echo(void *room, const ibid_call *call) {
    echo_room *r = room;
    const void *data = "";
    size_t n = 0;
    r->runs++;
    (void)ibid_get_bin(call->body, "data", &data, &n);
    ibid_enc_bin(call->reply, "data", data ? data : "", n);
    return IBID_OK;
}

static ibid_err do_fail(void *room, const ibid_call *call) {
    echo_room *r = room;
    const char *code = NULL, *text = NULL;
    char name[65] = "";
    size_t n = 0, m = 0;
    r->runs++;
    (void)ibid_get_str(call->body, "code", &code, &n);
    (void)ibid_get_str(call->body, "text", &text, &m);
    memcpy(name, code, n);
    return ibid_fail(ibid_err_from_code(name), "%.*s", (int)m, text);
}

static ibid_err do_sleep(void *room, const ibid_call *call) {
    echo_room *r = room;
    r->runs++;
    (void)usleep((useconds_t)(ibid_get_u64(call->body, "ms", 0) * 1000));
    return IBID_OK;
}

static ibid_err do_runs(void *room, const ibid_call *call) {
    echo_room *r = room;
    ibid_enc_u64(call->reply, "runs", r->runs);
    return IBID_OK;
}

struct producer {
    echo_room *room;
    ibid_stream *stream;
    uint64_t events;
    bool fail;
};

static void *produce(void *arg) {
    struct producer *p = arg;
    ibid_err e = IBID_OK;
    for (uint64_t i = 0; i < p->events && !e; i++) {
        ibid_enc ev;
        ibid_enc_init(&ev, 4096);
        ibid_enc_map(&ev, NULL);
        ibid_enc_u64(&ev, "i", i);
        ibid_enc_end(&ev);
        e = ibid_stream_push(p->stream, &ev, !p->fail && i + 1 == p->events);
        ibid_enc_fini(&ev);
    }
    while (!p->events && !ibid_stream_cancelled(p->stream)) (void)usleep(5000);
    if (e == IBID_CANCELLED) p->room->cancelled++;
    if (!e && p->fail) ibid_stream_fail(p->stream, IBID_DISKFULL, "no room for more events");
    ibid_stream_release(p->stream);
    p->room->producers--;
    ibid_free(p);
    return NULL;
}

static ibid_err do_begin(void *room, const ibid_call *call) {
    echo_room *r = room;
    uint64_t id = 0;
    pthread_t t;
    struct producer *p = ibid_calloc(1, sizeof *p);
    if (!p) return ibid_fail(IBID_NOMEM, "out of memory");
    *p = (struct producer){.room = r,
                           .events = ibid_get_u64(call->body, "events", 0),
                           .fail = ibid_get_bool(call->body, "fail", false)};
    ibid_err e = ibid_stream_begin(r->streams, &id, &p->stream);
    if (e) {
        ibid_free(p);
        return e;
    }
    r->producers++;
    if (pthread_create(&t, NULL, produce, p) != 0) {
        r->producers--;
        ibid_stream_release(p->stream);
        ibid_free(p);
        return ibid_fail(IBID_NOMEM, "no thread");
    }
    (void)pthread_detach(t);
    ibid_enc_u64(call->reply, "stream", id);
    return IBID_OK;
}

static ibid_err do_next(void *room, const ibid_call *call) {
    return ibid_streams_next(((echo_room *)room)->streams, call);
}

static ibid_err do_cancel(void *room, const ibid_call *call) {
    return ibid_streams_cancel(((echo_room *)room)->streams, call);
}

static const ibid_method methods[] = {
    {"echo.echo", do_echo},     {"echo.fail", do_fail},
    {"echo.sleep", do_sleep},   {"echo.runs", do_runs},
    {"echo.begin", do_begin},   {"echo.next", do_next},
    {"echo.cancel", do_cancel}, {NULL, NULL},
};

ibid_err echo_open(const char *url, size_t n_workers, echo_room **out) {
    echo_room *r = ibid_calloc(1, sizeof *r);
    if (!r) return ibid_fail(IBID_NOMEM, "out of memory");
    ibid_server_opts o = {
        .url = url, .methods = methods, .room = r, .n_workers = n_workers, .name = "echo"};
    ibid_err e = ibid_streams_open(4, 8, &r->streams);
    if (!e) e = ibid_server_open(&o, &r->server);
    if (e) {
        ibid_streams_close(r->streams);
        ibid_free(r);
        return e;
    }
    *out = r;
    return IBID_OK;
}

void echo_close(echo_room *r) {
    if (!r) return;
    ibid_streams_stop(r->streams);
    ibid_server_close(r->server);
    while (r->producers) (void)usleep(1000);
    ibid_streams_close(r->streams);
    ibid_free(r);
}

uint64_t echo_runs(echo_room *r) {
    return r->runs;
}

uint64_t echo_cancelled(echo_room *r) {
    return r->cancelled;
}

void echo_patience(echo_room *r, uint64_t ms) {
    ibid_streams_patience(r->streams, ms);
}

static ibid_err vt_open(const ibid_host_opts *o, void **room) {
    char url[IBID_BUS_URL_MAX];
    echo_room *r = NULL;
    ibid_err e = ibid_bus_url(o->data_dir, "echo", o->inproc, url);
    if (!e) e = echo_open(url, o->workers, &r);
    *room = r;
    return e;
}

static void vt_close(void *room) {
    echo_close(room);
}

const ibid_room_vtable echo_vtable = {"echo", vt_open, vt_close};
