/* Whether stored KV that is not in memory is read from disk, or its tokens are encoded again:
 * whatever is faster here. Knows no store and no messages; ibid_load_choose is a pure function. */
#ifndef IBID_ATTENTION_LOAD_H
#define IBID_ATTENTION_LOAD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ibid_load_rates { /* 0: not known */
    double bytes_per_s, tokens_per_s;
} ibid_load_rates;

typedef enum ibid_load_choice {
    IBID_LOAD_READ = 0,
    IBID_LOAD_ENCODE = 1,
    IBID_LOAD_TIME_DISK = 2,    /* cannot be said before the disk was measured */
    IBID_LOAD_TIME_ENCODER = 3, /* ... before an encoding was */
} ibid_load_choice;

/* For a block of `tokens`, `missing` bytes of whose KV are not in memory. Encoding must win by a
 * fifth to be begun, and lose to be given up; encoding: what was chosen last. A block that loads in
 * 20 ms is read without asking how fast encoding is. */
ibid_load_choice ibid_load_choose(const ibid_load_rates *r, uint64_t missing, uint64_t tokens,
                                  bool encoding);

/* What a process has seen of its disk and its encoder. Zeroed at first; any thread at any time. */
typedef struct ibid_load_meter {
    _Atomic double bytes_per_s, tokens_per_s;
    atomic_uint_fast64_t disk_ns; /* when the disk was measured last, ibid_now_ns() */
    atomic_bool encoding;         /* the last choice */
} ibid_load_meter;

enum { IBID_LOAD_STALE_S = 60 }; /* a disk's speed older than this is not believed */

/* The rates as they stand at now_ns. */
ibid_load_rates ibid_load_rates_now(ibid_load_meter *m, uint64_t now_ns);
/* Tokens of one pass of the encoder. Passes too short to show its pace count only when there is no
 * other. */
void ibid_load_encoded(ibid_load_meter *m, uint64_t tokens, uint64_t ns);
/* Bytes that came from disk. at_least: something else took part of the time, so the disk may be
 * faster than that; this raises an estimate that stands, and makes none. */
void ibid_load_came(ibid_load_meter *m, uint64_t bytes, uint64_t ns, bool at_least,
                    uint64_t now_ns);
#endif
