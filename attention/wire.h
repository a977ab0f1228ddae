/* What client and service of the attention room agree on beyond the rows of rpc/bus/schema.h.
 * Numbers in bins are little-endian. */
#ifndef IBID_ATTENTION_WIRE_H
#define IBID_ATTENTION_WIRE_H

#include "attention/tokenizer/tokenizer.h"
#include "rpc/bus/msg.h"

/* Token ids as i32. */
void ibidi_wire_ids_put(ibid_enc *e, const char *key, const int32_t *ids, size_t n);
void ibidi_wire_ids_get(const void *data, size_t n, int32_t *ids); /* n ids, 4 bytes each */

/* Tokens of a text, for each its id and how many bytes after the last one's end it ends, as LEB128
 * numbers: three to four bytes a token. Errors: TOOBIG (more than a message holds). */
ibid_err ibidi_wire_tokens_put(const ibid_token *t, size_t n, ibid_buf *out);
/* ids [n] and ends [n]. Errors: PROTO. */
ibid_err ibidi_wire_tokens_get(const void *data, size_t size, size_t n, int32_t *ids,
                               uint64_t *ends);
#endif
