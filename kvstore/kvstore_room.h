/* The kvstore room for ibid-kvstore and for hosting in one process: rpc/bus/host.h. It owns the store in
 * DATA/store as its only writer, answers kvstore/kvstore_client.h, and keeps house: use times are
 * written, orphans collected, KV evicted down to the budget, slots of dead readers freed. */
#ifndef IBID_KVSTORE_ROOM_H
#define IBID_KVSTORE_ROOM_H

#include "rpc/bus/host.h"

extern const ibid_room_vtable ibid_kvstore_room;
#endif
