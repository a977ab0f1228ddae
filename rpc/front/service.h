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
/* Starts the service again if a room did not answer (UNAVAIL, TIMEOUT): true if it is up now. */
bool ibidi_service_recover(ibid_service *s);
#endif
