/* Files that the user names. */
#ifndef IBID_FRONT_FILES_H
#define IBID_FRONT_FILES_H

#include "rpc/base/mem.h"

/* Appends a file's bytes; the buffer's cap is the limit. Errors: NOTFOUND, IO, TOOBIG, NOMEM. */
ibid_err ibidi_append_file(const char *path, ibid_buf *out);
#endif
