#include "rpc/base/hash.h"
#include "rpc/bus/bus.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* mkdir -p with mode 0700 for what is new. path is changed and restored. */
static ibid_err make_folders(char *path) {
    for (char *p = path + 1;; p++) {
        if (*p != '/' && *p) continue;
        char c = *p;
        *p = '\0';
        if (mkdir(path, 0700) != 0 && errno != EEXIST) {
            ibid_err e = ibid_fail_errno(errno, "cannot create the folder", path);
            *p = c;
            return e;
        }
        *p = c;
        if (!c) return IBID_OK;
    }
}

/* A folder in a place others can write to must be ours alone, or somebody else could sit on it. */
static ibid_err private_folder(const char *path) {
    struct stat st;
    if (mkdir(path, 0700) != 0 && errno != EEXIST)
        return ibid_fail_errno(errno, "cannot create the folder", path);
    if (lstat(path, &st) != 0) return ibid_fail_errno(errno, "cannot look at", path);
    if (!S_ISDIR(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 077))
        return ibid_fail(IBID_IO, "%s is not a folder of this user alone; remove it", path);
    return IBID_OK;
}

/* Two spellings of one folder must give one address. */
static ibid_err canonical(const char *data_dir, char out[PATH_MAX]) {
    if (!data_dir || data_dir[0] != '/')
        return ibid_fail(IBID_INVAL, "the data folder must be an absolute path, not %s",
                         data_dir ? data_dir : "NULL");
    if (realpath(data_dir, out)) return IBID_OK;
    size_t n = strlen(data_dir);
    while (n > 1 && data_dir[n - 1] == '/') n--;
    if (n >= PATH_MAX) return ibid_fail(IBID_INVAL, "the data folder's path is too long");
    memcpy(out, data_dir, n);
    out[n] = '\0';
    return IBID_OK;
}

static ibid_err short_folder(const char *hash, char *out, size_t room) {
    const char *run = getenv("XDG_RUNTIME_DIR");
    int n = 0;
    if (run && run[0] == '/') n = snprintf(out, room, "%s/ibid-%s", run, hash);
    /* XDG_RUNTIME_DIR itself may be too long, or gone. */
    if (n <= 0 || (size_t)n > 64 || access(run, W_OK | X_OK) != 0)
        (void)snprintf(out, room, "/tmp/ibid-%u-%s", (unsigned)geteuid(), hash);
    return private_folder(out);
}

ibid_err ibid_bus_url(const char *data_dir, const char *room, bool inproc,
                      char url[IBID_BUS_URL_MAX]) {
    char dir[PATH_MAX], path[PATH_MAX + 64], folder[128], hex[65];
    if (strlen(room) > 24 || strchr(room, '/'))
        return ibid_fail(IBID_INVAL, "a room named %s", room);
    ibid_err e = canonical(data_dir, dir);
    if (e) return e;
    if (!inproc) {
        (void)snprintf(path, sizeof path, "%s/run", dir);
        e = make_folders(path);
        if (!e) e = canonical(data_dir, dir); /* exists now: symbolic links are resolved */
        if (e) return e;
    }
    ibid_hash h = ibid_hash_bytes(dir, strlen(dir));
    ibid_hash_hex(&h, hex);
    hex[16] = '\0';
    if (inproc) {
        (void)snprintf(url, IBID_BUS_URL_MAX, "inproc://ibid-%s/%s", hex, room);
        return IBID_OK;
    }
    int n = snprintf(path, sizeof path, "%s/run/%s.sock", dir, room);
    if (n > 0 && (size_t)n < sizeof((struct sockaddr_un *)0)->sun_path) {
        (void)snprintf(url, IBID_BUS_URL_MAX, "ipc://%.110s", path);
        return IBID_OK;
    }
    e = short_folder(hex, folder, sizeof folder);
    if (!e) (void)snprintf(url, IBID_BUS_URL_MAX, "ipc://%.90s/%.24s.sock", folder, room);
    return e;
}
