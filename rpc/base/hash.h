/* Hashes. Identity: BLAKE2b-256 (RFC 7693, libsodium) over length-prefixed fields, so that no two
 * field lists give the same bytes. Checksums: XXH3-64 (xxhash), not for identity. */
#ifndef IBID_BASE_HASH_H
#define IBID_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

#define IBID_HASH_SIZE 32

typedef struct ibid_hash {
    uint8_t b[IBID_HASH_SIZE];
} ibid_hash;

typedef struct ibid_hasher {
    _Alignas(64) unsigned char state[384];
} ibid_hasher;

void ibid_hasher_init(ibid_hasher *h);
/* Adds one field: its length as 8 bytes little-endian, then its bytes. */
void ibid_hasher_field(ibid_hasher *h, const void *data, size_t n);
void ibid_hasher_u64(ibid_hasher *h, uint64_t v);
/* Adds bytes of a field without a length, for streaming a file whose hash stands alone. */
void ibid_hasher_raw(ibid_hasher *h, const void *data, size_t n);
ibid_hash ibid_hasher_final(ibid_hasher *h);

ibid_hash ibid_hash_bytes(const void *data, size_t n); /* plain BLAKE2b-256 of the bytes */
int ibid_hash_cmp(const ibid_hash *a, const ibid_hash *b);
void ibid_hash_hex(const ibid_hash *h, char out[65]);
uint64_t ibid_checksum(const void *data, size_t n); /* XXH3-64, seed 0 */
#endif
