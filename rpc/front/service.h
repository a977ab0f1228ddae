/* A command's link to the running service: the data folder, the rooms' clients, the store to read.
 */
#ifndef IBID_FRONT_SERVICE_H
#define IBID_FRONT_SERVICE_H

#include "kvstore/kvstore.h"
#include "rpc/bus/bus.h"
#include "rpc/front/options.h"

typedef struct ibid_service {
    char data[4096]; /* absolute */
    const ibid_opts *o;
    ibid_client *kvstore, *attention, *retriever, *indexer; /* opened by ibidi_service_open */
    ibid_store *store; /* read-only; NULL until ibidi_service_store */
} ibid_service;

/* Finds the data folder; with `rooms`, makes sure the service runs (starts it in the background and
 * says so on stderr) and opens clients. Closing with ibidi_service_close is always allowed. */
ibid_err ibidi_service_open(const ibid_opts *o, bool rooms, ibid_service *s);
/* Opens the store for reading. NOTFOUND with a hint when nothing was ever indexed here. */
ibid_err ibidi_service_store(ibid_service *s);
void ibidi_service_close(ibid_service *s);
/* Opens the clients of the rooms, whether they run or not; starts nothing. */
ibid_err ibidi_service_connect(ibid_service *s);
/* After a call to a room that failed: brings the service up again and pauses shortly. True: repeat
 * the call. False: a minute has passed since the first failure, or the service does not start.
 * *since_ns is the moment of that failure; the caller sets it to 0 at first and after a success. */
bool ibidi_service_again(ibid_service *s, uint64_t *since_ns);
/* The errors of a room that is away: killed, or not yet ready after its start. */
bool ibidi_room_away(ibid_err e);
#endif
