/* The retriever room for ibid-retriever and for hosting in one process: rpc/bus/host.h. It reads
 * the store in DATA/store, owns the derived files in DATA/index, and answers retriever/retriever.h.
 */
#ifndef IBID_RETRIEVER_ROOM_H
#define IBID_RETRIEVER_ROOM_H

#include "rpc/bus/host.h"

extern const ibid_room_vtable ibid_retriever_room;
#endif
