#include "rpc/front/files.h"

#include <errno.h>
#include <stdio.h>

ibid_err ibidi_append_file(const char *path, ibid_buf *out) {
    char block[65536];
    FILE *f = fopen(path, "rb");
    if (!f) return ibid_fail_errno(errno, "cannot read", path);
    ibid_err e = IBID_OK;
    for (size_t n; !e && (n = fread(block, 1, sizeof block, f)) > 0;)
        e = ibid_buf_append(out, block, n);
    if (!e && ferror(f)) e = ibid_fail_errno(errno, "cannot read", path);
    (void)fclose(f);
    return e;
}
