/* Which files a path means. Folders are read in byte order of their names, so that two runs agree.
 */
#ifndef IBID_INDEXER_WALK_H
#define IBID_INDEXER_WALK_H

#include "kvstore/kvstore.h"

#include <sys/types.h>

typedef struct ibid_walk_file {
    char *path;         /* canonical */
    const char *reason; /* NULL: a regular file; else why it is not read (static text) */
} ibid_walk_file;

typedef struct ibid_walk {
    ibid_walk_file *files;
    size_t n, room;
    size_t unread;  /* folders that could not be read: nothing below them is known */
    dev_t skip_dev; /* a folder left out (our own data); 0, 0: none */
    ino_t skip_ino;
} ibid_walk;

/* Adds the file or the folder's files to the list. path: absolute; symbolic links in it are
 * resolved, those met below it are left alone (their targets, if below it too, are met by
 * themselves). Names that begin with a dot and special files are passed over in silence below a
 * folder; given by name, a special file is listed with a reason. A path that does not exist is
 * listed with a reason. Errors: NOMEM, IO, TOOBIG (more than ten million files). */
ibid_err ibid_walk_add(ibid_walk *w, const char *path);
void ibid_walk_fini(ibid_walk *w);

/* Opens a canonical path for reading, following no symbolic link in any part of it. Refuses what is
 * no regular file. Errors: NOTFOUND, IO, NOTSUP. */
ibid_err ibid_walk_open(const char *path, int *fd, uint64_t *size);
#endif
