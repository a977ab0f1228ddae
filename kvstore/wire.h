/* What client and service agree on beyond the rows of rpc/bus/schema.h. */
#ifndef IBID_KVSTORE_WIRE_H
#define IBID_KVSTORE_WIRE_H

#include "kvstore/record.h"

/* One element of document_put's "chunks": u64 start, u64 end, u64 block, u32 length of its locator;
 * the locators' texts follow each other in "locators". */
enum { IBIDI_WIRE_CHUNK = 28, IBIDI_WIRE_FAULTS_MAX = 1024 * 1024 };
#define IBIDI_WIRE_TEXT_MAX ((uint64_t)4 << 30)
#endif
