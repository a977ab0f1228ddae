#include "indexer/walk.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { DEPTH_MAX = 128, FILES_MAX = 10000000 };

static ibid_err list_file(ibid_walk *w, const char *path, const char *reason) {
    if (w->n >= FILES_MAX) return ibid_fail(IBID_TOOBIG, "more than ten million files");
    if (w->n == w->room) {
        size_t room = w->room ? w->room * 2 : 64;
        ibid_walk_file *grown = ibid_realloc(w->files, room * sizeof *grown);
        if (!grown) return ibid_fail(IBID_NOMEM, "out of memory for a list of files");
        w->files = grown;
        w->room = room;
    }
    char *copy = ibid_strdup(path);
    if (!copy) return ibid_fail(IBID_NOMEM, "out of memory for a list of files");
    w->files[w->n++] = (ibid_walk_file){copy, reason};
    return IBID_OK;
}

static int by_bytes(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

static int visible(const struct dirent *d) {
    return d->d_name[0] != '.';
}

/* Reads the folder open at fd, whose path is in `path`; both are the caller's. */
static ibid_err walk_folder(ibid_walk *w, int fd, ibid_buf *path, unsigned depth) {
    struct dirent **names = NULL;
    int n = depth < DEPTH_MAX ? scandirat(fd, ".", &names, visible, by_bytes) : -1;
    if (n < 0) {
        w->unread++;
        return IBID_OK;
    }
    ibid_err e = IBID_OK;
    size_t len = path->len;
    for (int i = 0; !e && i < n; i++) {
        struct stat st;
        const char *name = names[i]->d_name;
        if (fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW) != 0) continue; /* gone already */
        e = ibid_buf_printf(path, "%s%s", len > 1 ? "/" : "", name);
        if (!e && S_ISREG(st.st_mode)) {
            e = list_file(w, path->data, NULL);
        } else if (!e && S_ISDIR(st.st_mode) &&
                   !(st.st_dev == w->skip_dev && st.st_ino == w->skip_ino)) {
            int below = openat(fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
            if (below < 0)
                w->unread++;
            else
                e = walk_folder(w, below, path, depth + 1);
            if (below >= 0) (void)close(below);
        }
        path->len = len;
        path->data[len] = '\0';
    }
    for (int i = 0; i < n; i++) free(names[i]); /* scandirat's own allocations */
    free(names);
    return e;
}

ibid_err ibid_walk_add(ibid_walk *w, const char *path) {
    char real[PATH_MAX];
    struct stat st;
    if (path[0] != '/') return ibid_fail(IBID_INVAL, "%s is not an absolute path", path);
    if (!realpath(path, real) || lstat(real, &st) != 0)
        return list_file(w, path, errno == ENOENT ? "no such file" : "it cannot be reached");
    if (S_ISREG(st.st_mode)) return list_file(w, real, NULL);
    if (!S_ISDIR(st.st_mode)) return list_file(w, real, "neither a file nor a folder");
    int fd = open(real, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) return list_file(w, real, "the folder cannot be read");
    ibid_buf at;
    ibid_buf_init(&at, 64 * 1024);
    ibid_err e = ibid_buf_puts(&at, real);
    if (!e) e = walk_folder(w, fd, &at, 0);
    (void)close(fd);
    ibid_buf_fini(&at);
    return e;
}

void ibid_walk_fini(ibid_walk *w) {
    for (size_t i = 0; i < w->n; i++) ibid_free(w->files[i].path);
    ibid_free(w->files);
    w->files = NULL;
    w->n = w->room = 0;
}

ibid_err ibid_walk_open(const char *path, int *out, uint64_t *size) {
    struct stat st;
    struct open_how how = {.flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK,
                           .resolve = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    int fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
    /* A kernel or sandbox without openat2: at least the last part is no link. */
    if (fd < 0 && (errno == ENOSYS || errno == EPERM))
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    if (fd < 0) return ibid_fail_errno(errno, "cannot open", path);
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        (void)close(fd);
        return ibid_fail(IBID_NOTSUP, "not a regular file");
    }
    *out = fd;
    *size = (uint64_t)st.st_size;
    return IBID_OK;
}
