/* A small room for the tests of the bus: it echoes, fails, sleeps, and streams. */
#ifndef IBID_TESTS_ECHO_ROOM_H
#define IBID_TESTS_ECHO_ROOM_H

#include "rpc/bus/bus.h"
#include "rpc/bus/host.h"

typedef struct echo_room echo_room;

ibid_err echo_open(const char *url, size_t n_workers, echo_room **out);
void echo_close(echo_room *r);
uint64_t echo_runs(echo_room *r);      /* handlers that were begun */
uint64_t echo_cancelled(echo_room *r); /* producers that ended because nobody wanted their stream */
void echo_patience(echo_room *r, uint64_t ms);

extern const ibid_room_vtable echo_vtable;
#endif
