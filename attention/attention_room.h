/* The attention room for ibid-attention and for hosting in one process: rpc/bus/host.h. It reads
 * the store in place, sends what it encodes to the kvstore room, and answers attention/attention.h.
 */
#ifndef IBID_ATTENTION_ROOM_H
#define IBID_ATTENTION_ROOM_H

#include "rpc/bus/host.h"

extern const ibid_room_vtable ibid_attention_room;
#endif
