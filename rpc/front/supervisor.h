/* The supervisor: starts the four rooms, restarts them when they die, stops them cleanly.
 *
 * One per data folder, held by a lock on run/supervisor.lock. Each room logs to log/ROOM.log. A
 * room that dies is started again after a back-off (0.1 s doubling to 5 s, reset after 10 s of
 * health).
 *
 * Somebody must watch the watcher: the supervisor keeps one guard process, which only waits on a
 * pipe. When the supervisor dies without a goodbye, the guard becomes the next supervisor; when the
 * guard dies, the supervisor starts another. */
#ifndef IBID_FRONT_SUPERVISOR_H
#define IBID_FRONT_SUPERVISOR_H

#include "rpc/front/options.h"

#include <sys/types.h>

/* What a running supervisor says of itself in run/supervisor.json (rewritten by rename). */
typedef struct ibidi_room_state {
    const char *name;
    pid_t pid; /* 0: waiting to be started again */
    uint64_t restarts;
} ibidi_room_state;

enum { IBIDI_ROOMS = 4 };
extern const char *const ibidi_room_names[IBIDI_ROOMS]; /* in starting order */

/* Becomes the supervisor of data (absolute) until a signal; returns the exit status. */
int ibidi_supervise(const char *data, const ibid_opts *o);
/* pid of the running supervisor, 0 if there is none. */
pid_t ibidi_supervisor_pid(const char *data);
enum { IBIDI_START_MS = 60000 };
/* Returns when every room of the running supervisor answers. While there is no supervisor, starts
 * one in the background (its own session, output to log/supervisor.log). Errors: UNAVAIL, with
 * where to look, after budget_ms. */
ibid_err ibidi_supervisor_start(const char *data, const ibid_opts *o, uint64_t budget_ms);
/* Asks it to stop and waits; *was = false if none ran. */
ibid_err ibidi_supervisor_stop(const char *data, bool *was);
/* Fills restarts from run/supervisor.json (0 where unknown). */
void ibidi_supervisor_restarts(const char *data, uint64_t restarts[IBIDI_ROOMS]);
#endif
