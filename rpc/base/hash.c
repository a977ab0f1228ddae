#include "rpc/base/hash.h"

#include <sodium.h>
#include <string.h>
#include <xxhash.h>

_Static_assert(sizeof(crypto_generichash_state) <= sizeof(((ibid_hasher *)0)->state),
               "ibid_hasher is too small for libsodium's state");

static crypto_generichash_state *state(ibid_hasher *h) {
    return (crypto_generichash_state *)(void *)h->state;
}

void ibid_hasher_init(ibid_hasher *h) {
    (void)crypto_generichash_init(state(h), NULL, 0, IBID_HASH_SIZE);
}

void ibid_hasher_raw(ibid_hasher *h, const void *data, size_t n) {
    if (n) (void)crypto_generichash_update(state(h), data, n);
}

void ibid_hasher_u64(ibid_hasher *h, uint64_t v) {
    uint8_t le[8];
    for (int i = 0; i < 8; i++) le[i] = (uint8_t)(v >> (8 * i));
    ibid_hasher_raw(h, le, sizeof le);
}

void ibid_hasher_field(ibid_hasher *h, const void *data, size_t n) {
    ibid_hasher_u64(h, n);
    ibid_hasher_raw(h, data, n);
}

ibid_hash ibid_hasher_final(ibid_hasher *h) {
    ibid_hash out;
    (void)crypto_generichash_final(state(h), out.b, sizeof out.b);
    return out;
}

ibid_hash ibid_hash_bytes(const void *data, size_t n) {
    ibid_hash out;
    (void)crypto_generichash(out.b, sizeof out.b, data, n, NULL, 0);
    return out;
}

int ibid_hash_cmp(const ibid_hash *a, const ibid_hash *b) {
    return memcmp(a->b, b->b, sizeof a->b);
}

void ibid_hash_hex(const ibid_hash *h, char out[65]) {
    (void)sodium_bin2hex(out, 65, h->b, sizeof h->b);
}

uint64_t ibid_checksum(const void *data, size_t n) {
    return XXH3_64bits(data, n);
}
