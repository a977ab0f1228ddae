/* Time: monotonic for deadlines and timings, wall clock for records only. */
#ifndef IBID_BASE_CLOCK_H
#define IBID_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t ibid_now_ns(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
static inline double ibid_ms_since(uint64_t start_ns) {
    return (double)(ibid_now_ns() - start_ns) / 1e6;
}
static inline uint64_t ibid_wall_ms(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000u + (uint64_t)t.tv_nsec / 1000000u;
}
#endif
