/* The indexer as a room that rpc/bus/host.h can run: a process of its own or a guest. */
#ifndef IBID_INDEXER_ROOM_H
#define IBID_INDEXER_ROOM_H

#include "rpc/bus/host.h"

/* Needs kvstore and attention to be there when it works, not when it opens. Environment:
 * IBID_FIND_CACHE_BYTES, the KV bytes the hidden ".find" collection may keep (256 MiB). */
extern const ibid_room_vtable ibid_indexer_room;
#endif
