/* Stands in for rpc/base/hash.c where its libraries are not there (tools/gpu-check): nothing
 * checked there hashes, and what would hash ends the program rather than give a wrong hash. */
#include "rpc/base/hash.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void refuse(void) {
    (void)fputs("hashing in a build without it\n", stderr);
    abort();
}

void ibid_hasher_init(ibid_hasher *h) {
    (void)h;
    refuse();
}

void ibid_hasher_raw(ibid_hasher *h, const void *data, size_t n) {
    (void)h, (void)data, (void)n;
    refuse();
}

ibid_hash ibid_hasher_final(ibid_hasher *h) {
    (void)h;
    refuse();
    return (ibid_hash){{0}};
}

ibid_hash ibid_hash_bytes(const void *data, size_t n) {
    (void)data, (void)n;
    refuse();
    return (ibid_hash){{0}};
}

int ibid_hash_cmp(const ibid_hash *a, const ibid_hash *b) {
    return memcmp(a->b, b->b, sizeof a->b);
}

void ibid_hash_hex(const ibid_hash *h, char out[65]) {
    for (size_t i = 0; i < IBID_HASH_SIZE; i++) (void)snprintf(out + 2 * i, 3, "%02x", h->b[i]);
}

uint64_t ibid_checksum(const void *data, size_t n) {
    (void)data, (void)n;
    refuse();
    return 0;
}
