#include "rpc/base/err.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char detail[1024];

const char *ibid_err_code(ibid_err e) {
    switch (e) {
#define X(sym, val, code, text)                                                                    \
    case IBID_##sym:                                                                               \
        return code;
        IBID_ERR_MAP(X)
#undef X
    }
    return "internal";
}

const char *ibid_err_text(ibid_err e) {
    switch (e) {
#define X(sym, val, code, text)                                                                    \
    case IBID_##sym:                                                                               \
        return text;
        IBID_ERR_MAP(X)
#undef X
    }
    return "unknown error";
}

ibid_err ibid_err_from_code(const char *code) {
#define X(sym, val, name, text)                                                                    \
    if (strcmp(code, name) == 0) return IBID_##sym;
    IBID_ERR_MAP(X)
#undef X
    return IBID_INTERNAL;
}

ibid_err ibid_fail(ibid_err e, const char *fmt, ...) {
    /* Formatted aside first: an argument may be the old detail itself. */
    char text[sizeof detail];
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    memcpy(detail, text, sizeof detail);
    return e == IBID_OK ? IBID_INTERNAL : e;
}

const char *ibid_err_detail(void) {
    return detail;
}

void ibid_err_clear(void) {
    detail[0] = '\0';
}

ibid_err ibid_fail_errno(int err, const char *what, const char *path) {
    ibid_err e = IBID_IO;
    if (err == ENOSPC || err == EDQUOT) e = IBID_DISKFULL;
    if (err == ENOMEM) e = IBID_NOMEM;
    if (err == ENOENT || err == ENOTDIR) e = IBID_NOTFOUND;
    char text[128];
    const char *msg = strerror_r(err, text, sizeof text);
    return ibid_fail(e, "%s %s: %s", what, path ? path : "", msg);
}
