/* Streams: a ring of encoded events each, one lock for the table. Nothing here runs by itself: a
 * stream nobody asks for is noticed when its producer pushes or asks, and when another one begins.
 */
#include "rpc/base/clock.h"
#include "rpc/bus/bus.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { PATIENCE_MS = 60000, SLICE_MS = 100 };

struct event {
    char *data;
    size_t n;
};

struct ibid_stream {
    ibid_streams *table;
    uint64_t id;
    size_t refs;         /* the table's, the producer's, each waiting next's */
    struct event *ring;  /* [table->max_events] */
    uint64_t first, end; /* event numbers held: [first, end) */
    bool ended;          /* no more events: the last one is end - 1, or an error follows */
    bool cancelled;
    bool delivered; /* the end was handed out once */
    ibid_err error; /* what follows the last event, if not IBID_OK */
    char detail[512];
    uint64_t asked_ns; /* when the client last asked, or the stream began */
    size_t waiting;    /* next calls in progress */
    pthread_cond_t changed;
};

struct ibid_streams {
    pthread_mutex_t lock;
    size_t max_streams, max_events;
    uint64_t patience_ns;
    uint64_t next_id;
    bool stopped;
    ibid_stream **slot; /* [max_streams] */
};

ibid_err ibid_streams_open(size_t max_streams, size_t max_events, ibid_streams **out) {
    if (!max_streams || !max_events) return ibid_fail(IBID_INVAL, "streams of no events");
    ibid_streams *t = ibid_calloc(1, sizeof *t);
    ibid_stream **slot = ibid_calloc(max_streams, sizeof(ibid_stream *));
    if (!t || !slot) {
        ibid_free(t);
        ibid_free(slot);
        return ibid_fail(IBID_NOMEM, "out of memory for streams");
    }
    (void)pthread_mutex_init(&t->lock, NULL);
    t->max_streams = max_streams;
    t->max_events = max_events;
    t->patience_ns = PATIENCE_MS * UINT64_C(1000000);
    t->next_id = ibid_now_ns() | 1; /* ids of a room's earlier life must not fit */
    t->slot = slot;
    *out = t;
    return IBID_OK;
}

void ibid_streams_patience(ibid_streams *t, uint64_t ms) {
    (void)pthread_mutex_lock(&t->lock);
    t->patience_ns = ms * 1000000u;
    (void)pthread_mutex_unlock(&t->lock);
}

/* All below: the table's lock is held. */

static void unref(ibid_stream *s) {
    if (--s->refs) return;
    for (uint64_t i = s->first; i < s->end; i++) ibid_free(s->ring[i % s->table->max_events].data);
    (void)pthread_cond_destroy(&s->changed);
    ibid_free(s->ring);
    ibid_free(s);
}

static void cancel(ibid_stream *s) {
    s->cancelled = true;
    (void)pthread_cond_broadcast(&s->changed);
}

static void drop(ibid_streams *t, size_t i) {
    ibid_stream *s = t->slot[i];
    t->slot[i] = NULL;
    cancel(s);
    unref(s);
}

static bool forsaken(const ibid_stream *s) {
    return !s->waiting && ibid_now_ns() - s->asked_ns > s->table->patience_ns;
}

static size_t find(const ibid_streams *t, uint64_t id) {
    for (size_t i = 0; i < t->max_streams; i++)
        if (t->slot[i] && t->slot[i]->id == id) return i;
    return t->max_streams;
}

/* A free slot: an empty one, one forsaken or cancelled, or one whose end was delivered. */
static size_t free_slot(ibid_streams *t) {
    size_t found = t->max_streams, delivered = t->max_streams;
    for (size_t i = 0; i < t->max_streams; i++) {
        ibid_stream *s = t->slot[i];
        if (s && (s->cancelled || forsaken(s))) drop(t, i);
        if (!t->slot[i])
            found = i;
        else if (s->delivered)
            delivered = i;
    }
    if (found == t->max_streams && delivered < t->max_streams) {
        drop(t, delivered);
        found = delivered;
    }
    return found;
}

static void wait_ms(ibid_streams *t, ibid_stream *s, uint64_t until_ns) {
    uint64_t slice = ibid_now_ns() + SLICE_MS * UINT64_C(1000000);
    if (slice > until_ns) slice = until_ns;
    struct timespec at = {.tv_sec = (time_t)(slice / 1000000000u),
                          .tv_nsec = (long)(slice % 1000000000u)};
    (void)pthread_cond_timedwait(&s->changed, &t->lock, &at);
}

/* ---- Table ---- */

void ibid_streams_stop(ibid_streams *t) {
    (void)pthread_mutex_lock(&t->lock);
    t->stopped = true;
    for (size_t i = 0; i < t->max_streams; i++)
        if (t->slot[i]) cancel(t->slot[i]);
    (void)pthread_mutex_unlock(&t->lock);
}

void ibid_streams_close(ibid_streams *t) {
    if (!t) return;
    (void)pthread_mutex_lock(&t->lock);
    for (size_t i = 0; i < t->max_streams; i++)
        if (t->slot[i]) drop(t, i);
    (void)pthread_mutex_unlock(&t->lock);
    (void)pthread_mutex_destroy(&t->lock);
    ibid_free(t->slot);
    ibid_free(t);
}

/* ---- Producer ---- */

ibid_err ibid_stream_begin(ibid_streams *t, uint64_t *id, ibid_stream **out) {
    ibid_err e = IBID_OK;
    pthread_condattr_t a;
    ibid_stream *s = ibid_calloc(1, sizeof *s);
    struct event *ring = ibid_calloc(t->max_events, sizeof *ring);
    if (!s || !ring) {
        ibid_free(s);
        ibid_free(ring);
        return ibid_fail(IBID_NOMEM, "out of memory for a stream");
    }
    (void)pthread_condattr_init(&a);
    (void)pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&s->changed, &a);
    (void)pthread_condattr_destroy(&a);
    s->table = t;
    s->ring = ring;
    s->refs = 1;
    s->asked_ns = ibid_now_ns();
    (void)pthread_mutex_lock(&t->lock);
    size_t i = t->stopped ? t->max_streams : free_slot(t);
    if (t->stopped) {
        e = ibid_fail(IBID_UNAVAIL, "the room is closing");
    } else if (i == t->max_streams) {
        e = ibid_fail(IBID_BUSY, "%zu streams are running already", t->max_streams);
    } else {
        *id = s->id = t->next_id++;
        s->refs = 2;
        t->slot[i] = s;
        *out = s;
    }
    if (e) unref(s);
    (void)pthread_mutex_unlock(&t->lock);
    return e;
}

/* Waits for room in the ring; false when nobody wants the stream any more. */
static bool wait_for_room(ibid_stream *s) {
    ibid_streams *t = s->table;
    while (!s->cancelled) {
        if (s->end - s->first < t->max_events) return true;
        if (forsaken(s))
            cancel(s);
        else
            wait_ms(t, s, UINT64_MAX);
    }
    return false;
}

ibid_err ibid_stream_push(ibid_stream *s, const ibid_enc *event, bool last) {
    ibid_streams *t = s->table;
    ibid_err e = IBID_OK;
    if (event->err || event->depth || !event->buf.len)
        return ibid_fail(event->err ? event->err : IBID_INTERNAL, "an event was not finished");
    char *copy = ibid_alloc(event->buf.len);
    if (!copy) return ibid_fail(IBID_NOMEM, "out of memory for an event");
    memcpy(copy, event->buf.data, event->buf.len);
    (void)pthread_mutex_lock(&t->lock);
    if (s->ended) {
        e = ibid_fail(IBID_INTERNAL, "an event after the end of its stream");
    } else if (!wait_for_room(s)) {
        e = ibid_fail(IBID_CANCELLED, "the stream was cancelled");
    } else {
        s->ring[s->end % t->max_events] = (struct event){copy, event->buf.len};
        copy = NULL;
        s->end++;
        s->ended = last;
        (void)pthread_cond_broadcast(&s->changed);
    }
    (void)pthread_mutex_unlock(&t->lock);
    ibid_free(copy);
    return e;
}

void ibid_stream_fail(ibid_stream *s, ibid_err e, const char *detail) {
    ibid_streams *t = s->table;
    (void)pthread_mutex_lock(&t->lock);
    if (!s->ended) {
        s->ended = true;
        s->error = e ? e : IBID_INTERNAL;
        (void)snprintf(s->detail, sizeof s->detail, "%s",
                       detail && *detail ? detail : ibid_err_text(s->error));
        (void)pthread_cond_broadcast(&s->changed);
    }
    (void)pthread_mutex_unlock(&t->lock);
}

bool ibid_stream_cancelled(ibid_stream *s) {
    ibid_streams *t = s->table;
    (void)pthread_mutex_lock(&t->lock);
    if (!s->cancelled && forsaken(s)) cancel(s);
    bool cancelled = s->cancelled;
    (void)pthread_mutex_unlock(&t->lock);
    return cancelled;
}

void ibid_stream_release(ibid_stream *s) {
    if (!s) return;
    ibid_streams *t = s->table;
    (void)pthread_mutex_lock(&t->lock);
    if (!s->ended) { /* a producer that left without a word must not leave the client waiting */
        s->ended = true;
        s->error = IBID_INTERNAL;
        (void)snprintf(s->detail, sizeof s->detail, "the stream broke off");
        (void)pthread_cond_broadcast(&s->changed);
    }
    unref(s);
    (void)pthread_mutex_unlock(&t->lock);
}

/* ---- Consumer ---- */

/* What the client said it has: events before seq. */
static void acknowledge(ibid_stream *s, uint64_t seq) {
    while (s->first < seq && s->first < s->end) {
        struct event *ev = &s->ring[s->first % s->table->max_events];
        ibid_free(ev->data);
        *ev = (struct event){0};
        s->first++;
    }
    (void)pthread_cond_broadcast(&s->changed);
}

static ibid_err hand_out(ibid_stream *s, uint64_t seq, ibid_enc *reply) {
    if (seq < s->end) {
        const struct event *ev = &s->ring[seq % s->table->max_events];
        bool last = s->ended && !s->error && seq + 1 == s->end;
        s->delivered = s->delivered || last;
        ibid_enc_u64(reply, "seq", seq);
        ibid_enc_bool(reply, "last", last);
        ibid_enc_raw(reply, "event", ev->data, ev->n);
        return IBID_OK;
    }
    /* Nobody asked for this end: whoever waits may ask the room's next process. */
    if (s->table->stopped && s->cancelled && (!s->error || s->error == IBID_CANCELLED))
        return ibid_fail(IBID_UNAVAIL, "the room is stopping; ask again");
    if (s->cancelled && !s->error) return ibid_fail(IBID_CANCELLED, "the stream was cancelled");
    if (!s->ended) return ibid_fail(IBID_TIMEOUT, "no event in time");
    if (!s->error)
        return ibid_fail(IBID_INVAL, "the stream ended before event %llu", (unsigned long long)seq);
    s->delivered = true;
    return ibid_fail(s->error, "%s", s->detail);
}

ibid_err ibid_streams_next(ibid_streams *t, const ibid_call *call) {
    uint64_t id = ibid_get_u64(call->body, "stream", 0), seq = ibid_get_u64(call->body, "seq", 0);
    ibid_err e = IBID_OK;
    (void)pthread_mutex_lock(&t->lock);
    size_t i = find(t, id);
    ibid_stream *s = i < t->max_streams ? t->slot[i] : NULL;
    if (!s) {
        e = ibid_fail(IBID_NOTFOUND, "no stream %llu: it ended, or was given up",
                      (unsigned long long)id);
    } else if (seq < s->first || seq > s->end) {
        e = ibid_fail(IBID_INVAL, "event %llu is not at hand (%llu to %llu are)",
                      (unsigned long long)seq, (unsigned long long)s->first,
                      (unsigned long long)s->end);
    } else {
        s->refs++;
        s->waiting++;
        s->asked_ns = ibid_now_ns();
        acknowledge(s, seq);
        while (seq >= s->end && !s->ended && !s->cancelled && !ibid_call_closing(call) &&
               ibid_now_ns() < call->deadline_ns)
            wait_ms(t, s, call->deadline_ns);
        s->waiting--;
        s->asked_ns = ibid_now_ns();
        e = hand_out(s, seq, call->reply);
        unref(s);
    }
    (void)pthread_mutex_unlock(&t->lock);
    return e;
}

ibid_err ibid_streams_cancel(ibid_streams *t, const ibid_call *call) {
    (void)pthread_mutex_lock(&t->lock);
    size_t i = find(t, ibid_get_u64(call->body, "stream", 0));
    if (i < t->max_streams) drop(t, i);
    (void)pthread_mutex_unlock(&t->lock);
    return IBID_OK;
}
