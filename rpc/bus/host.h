/* What every room's main shares: options, signals, start and stop. A room is a library with an open and
 * a close; host.c makes it a process (ibid_host_main) or a guest in somebody else's process together
 * with other rooms (ibid_host_inproc: tests, one-shot commands). Same code, same messages.
 *
 *   static const ibid_room_vtable room = {"kvstore", open_room, close_room};   // kvstore_service.c
 *   int main(int argc, char **argv) { return ibid_host_main(argc, argv, &ibid_kvstore_room); }
 *
 * open is expected to build its address with
 *   ibid_bus_url(o->data_dir, "kvstore", o->inproc, url)
 * open what it needs, and end with ibid_server_open: from then on it answers "<room>.ping", which is
 * what the supervisor takes for readiness. */
#ifndef IBID_BUS_HOST_H
#define IBID_BUS_HOST_H

#include "rpc/base/err.h"
#include "rpc/base/log.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { IBID_HOST_PATH_MAX = 4096 };

typedef struct ibid_host_opts {
    char data_dir[IBID_HOST_PATH_MAX]; /* absolute; exists when a room's open runs */
    ibid_log_level log_level;
    size_t threads;     /* for computing; 0 = the room decides (all cores) */
    size_t workers;     /* handlers at once; 0 = the room decides */
    uint64_t map_size;  /* ibid_store_opts.map_size; 0 = its default */
    uint64_t kv_budget; /* bytes of KV kept; 0 = no limit */
    char kernels[32];   /* kernel backend by name; "" = the best one here */
    bool f32;           /* no integer arithmetic */
    char backend[8];    /* "auto" (also ""), "cpu" or "cuda" */
    uint64_t gpu_pool;  /* bytes of KV on a GPU; 0 = most of what the weights leave free */
    bool inproc;        /* hosted with other rooms: build addresses with this */
} ibid_host_opts;

typedef struct ibid_room_vtable {
    const char *name; /* static: "kvstore" */
    /* On failure leaves nothing behind and sets a detail. o is valid until close returns. */
    ibid_err (*open)(const ibid_host_opts *o, void **room);
    /* Closes the server first (running handlers finish), then frees. */
    void (*close)(void *room);
} ibid_room_vtable;

/* Where the data lies: arg if not NULL or "", else $IBID_DATA, else $XDG_DATA_HOME/ibid, else
 * $HOME/.local/share/ibid; made absolute, not created. out holds IBID_HOST_PATH_MAX bytes.
 * Errors: INVAL (no home, too long). */
ibid_err ibid_host_data_dir(const char *arg, char *out);

/* Fills o from the command line (it is zeroed first, log level INFO):
 *   --data DIR --log-level error|warn|info|debug --threads N --workers N --map-size BYTES
 *   --kv-budget BYTES --kernels NAME --arithmetic int8|f32 --backend auto|cpu|cuda --gpu-pool BYTES
 * (also as --name=value; BYTES take K, M, G, T: 1024s)
 * Errors: INVAL with a detail naming the option. *help is set for --help and -h. */
ibid_err ibid_host_parse(int argc, char **argv, ibid_host_opts *o, bool *help);

/* The whole main of a room: parses, creates the data folder (0700), starts logging, blocks SIGINT,
 * SIGTERM and SIGHUP before any thread exists, ignores SIGPIPE, asks to be told of its parent's death
 * (and stops then), opens the room, waits for a signal, closes it. Returns the exit status: 0 clean
 * stop, 2 bad usage or failed start (the reason is on stderr), 3 given up (below). */
int ibid_host_main(int argc, char **argv, const ibid_room_vtable *room);

/* For a room that cannot go on in this process, such as one whose GPU is gone: logs why, and ends
 * ibid_host_main as a signal would, but with status 3, so that the supervisor starts the room again.
 * From any thread; more than once is as good as once. Hosted with other rooms it only logs. */
void ibid_host_give_up(const ibid_host_opts *o, ibid_err err, const char *why);

/* Opens rooms in the order given, in this process, over inproc:// ; the order is the one of their
 * dependence (kvstore, attention, retriever, indexer). o->data_dir must be set; inproc is set for them.
 * Touches neither signals nor the log level. On failure those already open are closed again. */
typedef struct ibid_hosted ibid_hosted;
ibid_err ibid_host_inproc(const ibid_room_vtable *const *rooms, size_t n, const ibid_host_opts *o,
                          ibid_hosted **out);
void ibid_hosted_close(ibid_hosted *h); /* in reverse order; NULL is fine */
#endif
