/* Logging: JSON lines to stderr (a file under the supervisor), one object a line:
 *   {"time":"2026-01-02T03:04:05.678Z","level":"info","room":"kvstore","request":7,"text":"..."}
 * Thread-safe. The request id is per thread and 0 when there is none. */
#ifndef IBID_BASE_LOG_H
#define IBID_BASE_LOG_H

#include <stdint.h>

typedef enum ibid_log_level {
    IBID_LOG_ERROR,
    IBID_LOG_WARN,
    IBID_LOG_INFO,
    IBID_LOG_DEBUG
} ibid_log_level;

/* room: static string naming the process; default level INFO (WARN until the first call). */
void ibid_log_init(const char *room, ibid_log_level level);
void ibid_log_request(uint64_t request_id);
void ibid_log(ibid_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
#endif
