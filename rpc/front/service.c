#include "rpc/front/service.h"
#include "rpc/base/clock.h"
#include "rpc/bus/host.h"
#include "rpc/front/supervisor.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>

static ibid_err open_client(const ibid_service *s, const char *room, ibid_client **out) {
    char url[IBID_BUS_URL_MAX];
    ibid_err e = ibid_bus_url(s->data, room, false, url);
    return e ? e : ibid_client_open(url, out);
}

ibid_err ibidi_service_connect(ibid_service *s) {
    ibid_err e = open_client(s, "kvstore", &s->kvstore);
    if (!e) e = open_client(s, "attention", &s->attention);
    if (!e) e = open_client(s, "retriever", &s->retriever);
    if (!e) e = open_client(s, "indexer", &s->indexer);
    return e;
}

ibid_err ibidi_service_open(const ibid_opts *o, bool rooms, ibid_service *s) {
    *s = (ibid_service){.o = o};
    ibid_err e = ibid_host_data_dir(o->data, s->data);
    if (e || !rooms) return e;
    if (ibidi_supervisor_pid(s->data) == 0) {
        (void)fprintf(stderr, "ibid: starting the service for %s (ibid down stops it)\n", s->data);
        e = ibidi_supervisor_start(s->data, o, IBIDI_START_MS);
    }
    return e ? e : ibidi_service_connect(s);
}

ibid_err ibidi_service_store(ibid_service *s) {
    if (s->store) return IBID_OK;
    char dir[4096 + 8];
    (void)snprintf(dir, sizeof dir, "%s/" IBID_STORE_FOLDER, s->data);
    ibid_store_opts o = {.dir = dir, .readonly = true, .map_size = s->o->map_size};
    ibid_err e = ibid_store_open(&o, &s->store);
    if (e == IBID_NOTFOUND)
        return ibid_fail(e, "nothing is stored under %s yet: ibid index PATH comes first", s->data);
    return e;
}

void ibidi_service_close(ibid_service *s) {
    ibid_store_close(s->store);
    ibid_client_close(s->kvstore);
    ibid_client_close(s->attention);
    ibid_client_close(s->retriever);
    ibid_client_close(s->indexer);
    *s = (ibid_service){0};
}

bool ibidi_room_away(ibid_err e) {
    return e == IBID_UNAVAIL || e == IBID_TIMEOUT || e == IBID_BUSY;
}

bool ibidi_service_again(ibid_service *s, uint64_t *since_ns) {
    if (*since_ns == 0) *since_ns = ibid_now_ns();
    double spent = ibid_ms_since(*since_ns);
    if (spent >= IBIDI_START_MS) return false;
    uint64_t left = IBIDI_START_MS - (uint64_t)spent;
    if (ibidi_supervisor_start(s->data, s->o, left) != IBID_OK) return false;
    (void)poll(NULL, 0, 50); /* the rooms answer, but one may still be opening another's socket */
    return true;
}
