/* Little-endian loads and stores, and the bounded reader and writer of table records. Stored bytes
 * are never trusted: a reader that runs past its end turns bad and stays so, and whoever decodes a
 * record asks ibidi_rd_done once at the end. */
#ifndef IBID_KVSTORE_RECORD_H
#define IBID_KVSTORE_RECORD_H

#include "kvstore/kvstore.h"

#include <string.h>

static inline uint16_t ibidi_load16(const uint8_t *p) {
    return (uint16_t)(p[0] | p[1] << 8);
}
static inline uint32_t ibidi_load32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static inline uint64_t ibidi_load64(const uint8_t *p) {
    return (uint64_t)ibidi_load32(p) | (uint64_t)ibidi_load32(p + 4) << 32;
}
static inline void ibidi_store16(uint8_t *p, uint16_t v) {
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}
static inline void ibidi_store32(uint8_t *p, uint32_t v) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(v >> (8 * i));
}
static inline void ibidi_store64(uint8_t *p, uint64_t v) {
    for (int i = 0; i < 8; i++) p[i] = (uint8_t)(v >> (8 * i));
}
static inline uint64_t ibidi_load64be(const uint8_t *p) {
    return __builtin_bswap64(ibidi_load64(p));
}

/* ---- Reading ---- */
typedef struct ibidi_rd {
    const uint8_t *p;
    size_t n, at;
    bool bad;
} ibidi_rd;

uint32_t ibidi_rd_u32(ibidi_rd *r);
uint64_t ibidi_rd_u64(ibidi_rd *r);
ibid_hash ibidi_rd_hash(ibidi_rd *r);
/* n bytes in place; NULL (and bad) when there are fewer. */
const uint8_t *ibidi_rd_bytes(ibidi_rd *r, size_t n);
ibid_str ibidi_rd_str(ibidi_rd *r); /* u32 length, bytes */
void ibidi_rd_pad(ibidi_rd *r);     /* to the next multiple of 8 */
/* True when nothing was missing and at most seven zero bytes are left. */
bool ibidi_rd_done(const ibidi_rd *r);

/* ---- Writing: the first error sticks ---- */
typedef struct ibidi_wr {
    ibid_buf b;
    ibid_err e;
} ibidi_wr;

void ibidi_wr_init(ibidi_wr *w);
void ibidi_wr_fini(ibidi_wr *w);
void ibidi_wr_u32(ibidi_wr *w, uint32_t v);
void ibidi_wr_u64(ibidi_wr *w, uint64_t v);
void ibidi_wr_hash(ibidi_wr *w, const ibid_hash *h);
void ibidi_wr_bytes(ibidi_wr *w, const void *p, size_t n);
void ibidi_wr_str(ibidi_wr *w, ibid_str s);
void ibidi_wr_pad(ibidi_wr *w);
#endif
