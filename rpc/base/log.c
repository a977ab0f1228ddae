#include "rpc/base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *_Atomic log_room = "ibid";
static _Atomic int log_level = IBID_LOG_WARN;
static _Thread_local uint64_t log_request;

void ibid_log_init(const char *room, ibid_log_level level) {
    atomic_store(&log_room, room);
    atomic_store(&log_level, (int)level);
}

void ibid_log_request(uint64_t request_id) {
    log_request = request_id;
}

/* Appends s to out as the inside of a JSON string, as far as it fits. */
static size_t json_escape(char *out, size_t room, const char *s) {
    size_t n = 0;
    for (; *s && n + 7 < room; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\') {
            out[n++] = '\\';
            out[n++] = (char)c;
        } else if (c < 0x20) {
            n += (size_t)snprintf(out + n, room - n, "\\u%04x", c);
        } else {
            out[n++] = (char)c;
        }
    }
    out[n] = '\0';
    return n;
}

void ibid_log(ibid_log_level level, const char *fmt, ...) {
    static const char *const names[] = {"error", "warn", "info", "debug"};
    if ((int)level > atomic_load(&log_level)) return;
    char text[1024], escaped[2048], line[2304], stamp[32];
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    (void)json_escape(escaped, sizeof escaped, text);
    struct timespec now;
    struct tm utc;
    (void)clock_gettime(CLOCK_REALTIME, &now);
    (void)gmtime_r(&now.tv_sec, &utc);
    (void)strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%S", &utc);
    int n = snprintf(line, sizeof line,
                     "{\"time\":\"%s.%03ldZ\",\"level\":\"%s\",\"room\":\"%s\",\"request\":%llu,"
                     "\"text\":\"%s\"}\n",
                     stamp, now.tv_nsec / 1000000, names[level], atomic_load(&log_room),
                     (unsigned long long)log_request, escaped);
    /* One write per line, so that lines of several processes never interleave. */
    if (n > 0) {
        size_t len = (size_t)n < sizeof line ? (size_t)n : sizeof line - 1;
        ssize_t ignored = write(STDERR_FILENO, line, len);
        (void)ignored;
    }
}
