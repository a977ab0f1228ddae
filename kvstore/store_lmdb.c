/* The only file that knows LMDB: environments, transactions, rows, cursors.
 *
 * One environment per folder and process (LMDB forbids a double open: closing one would drop the
 * other's file locks), found by the folder's device and inode. Everything that replaces the mapping
 * (growing, following another process's growth, becoming the writer, reopening after a failed
 * commit) closes the environment and opens it anew behind a gate that first lets this process's
 * transactions end. */
#include "kvstore/store_internal.h"
#include "rpc/base/clock.h"
#include "rpc/base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <lmdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { MAX_READERS = 512, GATE_WAIT_MS = 5000, READER_CHECK_MS = 60000, SNAP_AGE_S = 60 };
#define MAP_DEFAULT ((uint64_t)1 << 40)
#define HISTORY_DEFAULT 100000u
#define DISK_RESERVE                                                                               \
    ((uint64_t)4 << 20) /* free bytes below which a failed write means a full disk */

struct ibidi_env {
    ibidi_env *next;
    dev_t dev;
    ino_t ino;
    pid_t pid; /* a forked child must not use its parent's environment */
    char *path;
    size_t refs, writers;
    int lock_fd;

    pthread_mutex_t mu; /* guards what follows */
    pthread_cond_t idle;
    size_t active; /* transactions open in this process */
    bool gated, broken, writable;
    MDB_env *mdb;
    MDB_dbi dbi[IBIDI_N_TABLES];
    uint64_t map_size, reader_check_ns;

    ibidi_shared shared;
};

static pthread_mutex_t registry_mu = PTHREAD_MUTEX_INITIALIZER;
static ibidi_env *registry;

static const char *const table_names[IBIDI_N_TABLES] = {
#define X(sym, name) [IBIDI_##sym] = name,
    IBIDI_TABLE_MAP(X)
#undef X
};

const char *ibidi_table_name(ibidi_table t) {
    return table_names[t];
}

ibidi_shared *ibidi_env_shared(ibidi_env *v) {
    return &v->shared;
}

/* ---- Errors -----------------------------------------------------------------------------------
 */

/* LMDB reports a short write as EIO, so ask the file system and the process's own limit. */
static bool disk_is_full(const ibidi_env *v, uint64_t wanted) {
    struct statvfs f;
    if (statvfs(v->path, &f) == 0 && (uint64_t)f.f_bavail * f.f_frsize < DISK_RESERVE + wanted)
        return true;
    struct rlimit lim;
    struct stat st;
    char file[PATH_MAX];
    (void)snprintf(file, sizeof file, "%s/data.mdb", v->path);
    return getrlimit(RLIMIT_FSIZE, &lim) == 0 && lim.rlim_cur != RLIM_INFINITY &&
           stat(file, &st) == 0 && (uint64_t)st.st_size + DISK_RESERVE + wanted > lim.rlim_cur;
}

static ibid_err fail_mdb(const ibidi_env *v, int rc, const char *what, uint64_t wanted) {
    const char *text = mdb_strerror(rc);
    switch (rc) {
    case MDB_NOTFOUND:
        return IBID_NOTFOUND;
    case MDB_MAP_FULL:
        return ibid_fail(IBID_DISKFULL,
                         "the store's map of %llu bytes is full; start ibid-kvstore with "
                         "a larger map size",
                         (unsigned long long)v->map_size);
    case MDB_READERS_FULL:
        return ibid_fail(IBID_BUSY, "all %d reader slots of the store are taken; try again",
                         MAX_READERS);
    case MDB_TXN_FULL:
        return ibid_fail(IBID_TOOBIG, "one change touches too many pages; split it");
    case MDB_VERSION_MISMATCH:
        return ibid_fail(IBID_NOTSUP, "%s was made by another LMDB version", v->path);
    case MDB_INVALID:
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_INCOMPATIBLE:
        return ibid_fail(IBID_CORRUPT, "%s in %s: %s", what, v->path, text);
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return ibid_fail(IBID_DISKFULL, "the disk of %s is full; free space and try again",
                         v->path);
    case ENOMEM:
        return ibid_fail(IBID_NOMEM, "%s in %s: %s", what, v->path, text);
    case ENOENT:
        return ibid_fail(IBID_NOTFOUND, "no store in %s yet", v->path);
    case EIO:
        if (disk_is_full(v, wanted))
            return ibid_fail(IBID_DISKFULL, "the disk of %s is full; free space and try again",
                             v->path);
        return ibid_fail(IBID_IO, "%s in %s: %s", what, v->path, text);
    case EINVAL:
    case MDB_BAD_VALSIZE:
    case MDB_BAD_TXN:
        return ibid_fail(IBID_INTERNAL, "%s in %s: %s", what, v->path, text);
    default:
        return ibid_fail(IBID_IO, "%s in %s: %s", what, v->path, text);
    }
}

/* After these the state of the file on disk is in doubt. */
static bool rc_breaks(int rc) {
    return rc != MDB_MAP_FULL && rc != MDB_NOTFOUND && rc != ENOMEM && rc != MDB_TXN_FULL &&
           rc != EINVAL && rc != MDB_BAD_VALSIZE;
}

static ibid_err fail_txn(ibidi_txn *t, int rc, const char *what) {
    if (rc == MDB_MAP_FULL) t->map_full = true;
    if (t->write && rc_breaks(rc)) t->failed = true;
    return fail_mdb(t->env, rc, what, t->put_bytes);
}

/* ---- Opening an environment ---------------------------------------------------------------------
 */

/* LMDB numbers pages it never wrote (freed again in the same transaction), so a sound file may end
 * before its last page; one that was cut off looks the same. Filling the gap with zeroes makes
 * reading a lost page an error that LMDB reports, instead of SIGBUS. Takes no disk space. */
static ibid_err fill_length(const ibidi_env *v, MDB_env *env) {
    MDB_envinfo info;
    MDB_stat ms;
    struct stat st;
    char file[PATH_MAX];
    (void)snprintf(file, sizeof file, "%s/data.mdb", v->path);
    (void)mdb_env_info(env, &info);
    (void)mdb_env_stat(env, &ms);
    if (stat(file, &st) != 0) return ibid_fail_errno(errno, "cannot look at", file);
    uint64_t want = ((uint64_t)info.me_last_pgno + 1) * ms.ms_psize;
    if ((uint64_t)st.st_size < want && truncate(file, (off_t)want) != 0)
        return ibid_fail_errno(errno, "cannot lengthen", file);
    return IBID_OK;
}

static int open_dbis(ibidi_env *v, MDB_txn *txn, unsigned flags) {
    for (size_t i = 0; i < IBIDI_N_TABLES; i++) {
        int rc = mdb_dbi_open(txn, table_names[i], flags, &v->dbi[i]);
        if (rc) return rc;
    }
    return 0;
}

/* A new file's name is durable only with its folder. */
static ibid_err sync_folder(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return ibid_fail_errno(errno, "cannot open", path);
    int rc = fsync(fd), err = errno;
    (void)close(fd);
    return rc == 0 ? IBID_OK : ibid_fail_errno(err, "cannot write", path);
}

/* Opens every table; a writer creates them, with the first state row, in one transaction. */
static ibid_err open_tables(ibidi_env *v, MDB_env *env, bool rw) {
    MDB_txn *txn = NULL;
    int rc = mdb_txn_begin(env, NULL, MDB_RDONLY, &txn);
    if (!rc) {
        rc = open_dbis(v, txn, 0);
        if (rc)
            mdb_txn_abort(txn);
        else
            rc = mdb_txn_commit(txn);
    }
    if (rc == MDB_NOTFOUND && !rw) return ibid_fail(IBID_NOTFOUND, "no store in %s yet", v->path);
    if (rc != MDB_NOTFOUND) return rc ? fail_mdb(v, rc, "cannot open the tables", 0) : IBID_OK;

    rc = mdb_txn_begin(env, NULL, 0, &txn);
    if (!rc) {
        rc = open_dbis(v, txn, MDB_CREATE);
        ibidi_txn t = {.env = v, .mdb = txn, .write = true};
        const ibidi_state first = {.format = IBIDI_FORMAT,
                                   .next_collection = 1,
                                   .next_document = 1,
                                   .next_block = 1,
                                   .next_job = 1};
        ibid_err e = rc ? IBID_OK : ibidi_state_put(&t, &first);
        if (rc || e)
            mdb_txn_abort(txn);
        else
            rc = mdb_txn_commit(txn);
        if (e) return e;
    }
    return rc ? fail_mdb(v, rc, "cannot create the tables", 0) : sync_folder(v->path);
}

static int open_at(const ibidi_env *v, bool rw, uint64_t size, MDB_env **out) {
    MDB_env *env = NULL;
    int rc = mdb_env_create(&env);
    if (rc) return rc;
    (void)mdb_env_set_maxreaders(env, MAX_READERS);
    (void)mdb_env_set_maxdbs(env, IBIDI_N_TABLES);
    if (size) rc = mdb_env_set_mapsize(env, size);
    /* No WRITEMAP: a stray write must not reach the data, and a full disk must not raise SIGBUS. */
    if (!rc) rc = mdb_env_open(env, v->path, MDB_NOTLS | (rw ? 0 : MDB_RDONLY), 0600);
    if (rc)
        mdb_env_close(env);
    else
        *out = env;
    return rc;
}

/* size 0: what the file says. Smaller maps are tried where the address space is limited. */
static ibid_err open_mdb(ibidi_env *v, bool rw, uint64_t size) {
    static const unsigned shifts[] = {36, 33, 30, 28};
    MDB_env *env = NULL;
    int rc = open_at(v, rw, size, &env);
    for (size_t i = 0; rc == ENOMEM && i < sizeof shifts / sizeof *shifts; i++) {
        uint64_t smaller = (uint64_t)1 << shifts[i];
        if (size && smaller >= size) continue;
        rc = open_at(v, rw, smaller, &env);
    }
    if (rc) return fail_mdb(v, rc, "cannot open the store", 0);
    int dead = 0;
    (void)mdb_reader_check(env, &dead);
    ibid_err e = rw ? fill_length(v, env) : IBID_OK;
    if (!e) e = open_tables(v, env, rw);
    if (e) {
        mdb_env_close(env);
        return e;
    }
    MDB_envinfo info;
    (void)mdb_env_info(env, &info);
    v->map_size = info.me_mapsize;
    v->mdb = env;
    v->writable = rw;
    return IBID_OK;
}

/* ---- The gate -----------------------------------------------------------------------------------
 */

static ibid_err gate_close(ibidi_env *v) {
    struct timespec until;
    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += GATE_WAIT_MS / 1000;
    int rc = 0;
    (void)pthread_mutex_lock(&v->mu);
    while (v->gated && rc == 0) rc = pthread_cond_timedwait(&v->idle, &v->mu, &until);
    bool mine = rc == 0;
    if (mine) v->gated = true;
    while (mine && v->active && rc == 0) rc = pthread_cond_timedwait(&v->idle, &v->mu, &until);
    bool ok = mine && v->active == 0;
    if (mine && !ok) v->gated = false;
    (void)pthread_cond_broadcast(&v->idle);
    (void)pthread_mutex_unlock(&v->mu);
    return ok ? IBID_OK
              : ibid_fail(IBID_BUSY, "readers in this process hold the store's map; try again");
}

static void gate_open(ibidi_env *v) {
    (void)pthread_mutex_lock(&v->mu);
    v->gated = false;
    (void)pthread_cond_broadcast(&v->idle);
    (void)pthread_mutex_unlock(&v->mu);
}

static ibid_err enter(ibidi_env *v) {
    (void)pthread_mutex_lock(&v->mu);
    while (v->gated) (void)pthread_cond_wait(&v->idle, &v->mu);
    bool ok = v->mdb != NULL;
    if (ok) v->active++;
    (void)pthread_mutex_unlock(&v->mu);
    return ok ? IBID_OK
              : ibid_fail(IBID_IO,
                          "the store in %s could not be reopened; look at its disk, "
                          "then restart",
                          v->path);
}

static void leave(ibidi_env *v) {
    (void)pthread_mutex_lock(&v->mu);
    if (--v->active == 0) (void)pthread_cond_broadcast(&v->idle);
    (void)pthread_mutex_unlock(&v->mu);
}

/* Closes and opens behind the gate. On failure the old size is tried once more, so that readers of
 * this process go on. */
static ibid_err reopen(ibidi_env *v, bool rw, uint64_t size) {
    ibid_err e = gate_close(v);
    if (e) return e;
    bool was_rw = v->writable;
    uint64_t was_size = v->map_size;
    if (v->mdb) mdb_env_close(v->mdb);
    v->mdb = NULL;
    e = open_mdb(v, rw, size);
    if (e) {
        char why[512];
        (void)snprintf(why, sizeof why, "%s", ibid_err_detail());
        (void)open_mdb(v, was_rw, was_size);
        e = ibid_fail(e, "%s", why);
    }
    gate_open(v);
    return e;
}

void ibidi_env_break(ibidi_env *v) {
    (void)pthread_mutex_lock(&v->mu);
    v->broken = true;
    (void)pthread_mutex_unlock(&v->mu);
}

ibid_err ibidi_env_heal(ibidi_env *v) {
    (void)pthread_mutex_lock(&v->mu);
    bool broken = v->broken || !v->mdb;
    (void)pthread_mutex_unlock(&v->mu);
    if (!broken) return IBID_OK;
    ibid_err e = reopen(v, true, v->map_size);
    ibidi_txn t = {0};
    ibidi_state st;
    if (!e) e = ibidi_txn_begin(v, false, &t);
    if (!e) e = ibidi_state_get(&t, &st);
    ibidi_txn_abort(&t);
    if (e) return e;
    ibid_log(IBID_LOG_WARN, "store reopened after a failed write, at generation %llu",
             (unsigned long long)st.generation);
    (void)pthread_mutex_lock(&v->mu);
    v->broken = false;
    (void)pthread_mutex_unlock(&v->mu);
    return IBID_OK;
}

ibid_err ibidi_env_grow(ibidi_env *v) {
    uint64_t was = v->map_size, want = was * 2;
    if (want < was) return ibid_fail(IBID_DISKFULL, "the store's map cannot grow further");
    ibid_err e = reopen(v, true, want);
    if (!e && v->map_size <= was)
        e = ibid_fail(IBID_DISKFULL,
                      "the store's map of %llu bytes is full and the address space is "
                      "limited",
                      (unsigned long long)was);
    return e;
}

void ibidi_env_reader_check(ibidi_env *v) {
    uint64_t now = ibid_now_ns();
    (void)pthread_mutex_lock(&v->mu);
    bool due = now - v->reader_check_ns >= (uint64_t)READER_CHECK_MS * 1000000u;
    if (due) v->reader_check_ns = now;
    (void)pthread_mutex_unlock(&v->mu);
    int dead = 0;
    if (!due || enter(v) != IBID_OK) return;
    if (mdb_reader_check(v->mdb, &dead) == 0 && dead > 0)
        ibid_log(IBID_LOG_INFO, "freed the store's reader slots of %d dead readers", dead);
    leave(v);
}

void ibidi_env_info(ibidi_env *v, uint64_t *file_bytes, uint64_t *map_size) {
    struct stat st;
    char file[PATH_MAX];
    (void)snprintf(file, sizeof file, "%s/data.mdb", v->path);
    *file_bytes = stat(file, &st) == 0 ? (uint64_t)st.st_blocks * 512u : 0;
    *map_size = v->map_size;
}

/* ---- The registry -------------------------------------------------------------------------------
 */

static ibid_err make_dirs(const char *dir) {
    char path[PATH_MAX];
    if (strlen(dir) >= sizeof path) return ibid_fail(IBID_INVAL, "the store's path is too long");
    (void)snprintf(path, sizeof path, "%s", dir);
    for (char *p = path + 1; *p; p++) {
        if (*p != '/') continue;
        *p = '\0';
        if (mkdir(path, 0700) != 0 && errno != EEXIST)
            return ibid_fail_errno(errno, "cannot create", path);
        *p = '/';
    }
    if (mkdir(path, 0700) != 0 && errno != EEXIST)
        return ibid_fail_errno(errno, "cannot create", path);
    return IBID_OK;
}

/* One writing process per store: LMDB would let two alternate, but each would believe its own
 * memory. */
static ibid_err lock_writer(ibidi_env *v) {
    char file[PATH_MAX], pid[32];
    (void)snprintf(file, sizeof file, "%s/writer.lock", v->path);
    int fd = open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return ibid_fail_errno(errno, "cannot open", file);
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        int err = errno;
        ssize_t n = pread(fd, pid, sizeof pid - 1, 0);
        pid[n > 0 ? n : 0] = '\0';
        (void)close(fd);
        if (err != EWOULDBLOCK) return ibid_fail_errno(err, "cannot lock", file);
        return ibid_fail(IBID_BUSY, "another ibid-kvstore (process %s) owns %s; stop it first", pid,
                         v->path);
    }
    int n = snprintf(pid, sizeof pid, "%ld", (long)getpid());
    /* Only for the message above; a full disk must not keep a writer from opening. */
    if (ftruncate(fd, 0) != 0 || pwrite(fd, pid, (size_t)n, 0) != n)
        ibid_log(IBID_LOG_DEBUG, "cannot write %s: %s", file, strerror(errno));
    v->lock_fd = fd;
    return IBID_OK;
}

static void unlock_writer(ibidi_env *v) {
    if (v->lock_fd >= 0) (void)close(v->lock_fd);
    v->lock_fd = -1;
}

static void env_free(ibidi_env *v) {
    if (v->mdb) mdb_env_close(v->mdb);
    unlock_writer(v);
    ibidi_verified_close(v->shared.verified);
    ibid_free(v->shared.touched);
    (void)pthread_mutex_destroy(&v->shared.mu);
    (void)pthread_mutex_destroy(&v->shared.write_mu);
    (void)pthread_mutex_destroy(&v->mu);
    (void)pthread_cond_destroy(&v->idle);
    ibid_free(v->path);
    ibid_free(v);
}

static ibid_err env_new(const char *dir, const struct stat *st, ibidi_env **out) {
    ibidi_env *v = ibid_calloc(1, sizeof *v);
    if (!v) return ibid_fail(IBID_NOMEM, "out of memory for a store");
    v->dev = st->st_dev;
    v->ino = st->st_ino;
    v->pid = getpid();
    v->lock_fd = -1;
    v->reader_check_ns = ibid_now_ns();
    v->shared.snap_age_ns = (uint64_t)SNAP_AGE_S * 1000000000u;
    v->shared.history_max = HISTORY_DEFAULT;
    (void)pthread_mutex_init(&v->mu, NULL);
    (void)pthread_cond_init(&v->idle, NULL);
    (void)pthread_mutex_init(&v->shared.mu, NULL);
    (void)pthread_mutex_init(&v->shared.write_mu, NULL);
    ibid_err e = ibidi_verified_open(&v->shared.verified);
    if (!e && !(v->path = ibid_strdup(dir))) e = ibid_fail(IBID_NOMEM, "out of memory for a store");
    if (e)
        env_free(v);
    else
        *out = v;
    return e;
}

/* The registry's mutex is held. */
static ibid_err acquire(const char *dir, const struct stat *st, bool writer, uint64_t map_size,
                        ibidi_env **out, bool *first_writer) {
    ibidi_env *v = registry;
    while (v && !(v->dev == st->st_dev && v->ino == st->st_ino && v->pid == getpid())) v = v->next;
    bool fresh = v == NULL;
    ibid_err e = fresh ? env_new(dir, st, &v) : IBID_OK;
    if (e) return e;
    bool first = writer && v->writers == 0;
    if (first) e = lock_writer(v);
    if (!e && fresh)
        e = open_mdb(v, writer, map_size ? map_size : MAP_DEFAULT);
    else if (!e && first && !v->writable)
        e = reopen(v, true, v->map_size);
    if (e) {
        if (first) unlock_writer(v);
        if (fresh) env_free(v);
        return e;
    }
    if (fresh) {
        v->next = registry;
        registry = v;
    }
    v->refs++;
    if (writer) v->writers++;
    *first_writer = first;
    *out = v;
    return IBID_OK;
}

ibid_err ibidi_env_acquire(const char *dir, bool writer, uint64_t map_size, ibidi_env **out,
                           bool *first_writer) {
    ibid_err e = writer ? make_dirs(dir) : IBID_OK;
    struct stat st;
    if (!e && stat(dir, &st) != 0) e = ibid_fail_errno(errno, "cannot open the store in", dir);
    if (e) return e;
    char file[PATH_MAX];
    (void)snprintf(file, sizeof file, "%s/data.mdb", dir);
    if (!writer && access(file, F_OK) != 0)
        return ibid_fail(IBID_NOTFOUND, "no store in %s yet; start ibid-kvstore", dir);
    (void)pthread_mutex_lock(&registry_mu);
    e = acquire(dir, &st, writer, map_size, out, first_writer);
    (void)pthread_mutex_unlock(&registry_mu);
    return e;
}

void ibidi_env_release(ibidi_env *v, bool writer) {
    (void)pthread_mutex_lock(&registry_mu);
    if (writer && --v->writers == 0) unlock_writer(v);
    v->refs--;
    (void)pthread_mutex_lock(&v->mu);
    bool busy = v->active > 0;
    (void)pthread_mutex_unlock(&v->mu);
    if (v->refs == 0 && !busy) {
        ibidi_env **at = &registry;
        while (*at != v) at = &(*at)->next;
        *at = v->next;
        env_free(v);
    } else if (v->refs == 0) {
        /* Unmapping under a snapshot would crash its reader; the next open finds this one again. */
        ibid_log(IBID_LOG_ERROR, "store %s closed while snapshots of it are open", v->path);
    }
    (void)pthread_mutex_unlock(&registry_mu);
}

/* ---- Transactions -------------------------------------------------------------------------------
 */

ibid_err ibidi_txn_begin(ibidi_env *v, bool write, ibidi_txn *t) {
    *t = (ibidi_txn){.env = v, .write = write};
    for (int again = 0;; again++) {
        ibid_err e = enter(v);
        if (e) return e;
        MDB_txn *txn = NULL;
        int rc = mdb_txn_begin(v->mdb, NULL, write ? 0 : MDB_RDONLY, &txn), dead = 0;
        if (rc == 0) {
            t->mdb = txn;
            return IBID_OK;
        }
        if (rc == MDB_READERS_FULL) (void)mdb_reader_check(v->mdb, &dead);
        leave(v);
        if (rc == MDB_MAP_RESIZED && again < 3)
            e = reopen(v, v->writable, 0);
        else if (rc != MDB_READERS_FULL || dead == 0 || again)
            e = fail_txn(t, rc, "cannot begin");
        if (e) return e;
    }
}

ibid_err ibidi_txn_commit(ibidi_txn *t) {
    int rc = mdb_txn_commit(t->mdb);
    t->mdb = NULL;
    ibid_err e = IBID_OK;
    if (rc) {
        e = fail_txn(t, rc, "cannot commit");
        if (rc != MDB_MAP_FULL) t->failed = true;
    }
    leave(t->env);
    return e;
}

void ibidi_txn_abort(ibidi_txn *t) {
    if (!t->mdb) return;
    mdb_txn_abort(t->mdb);
    t->mdb = NULL;
    leave(t->env);
}

/* ---- Rows ---------------------------------------------------------------------------------------
 */

static MDB_val as_val(const void *p, size_t n) {
    /* LMDB's interface has no const; it does not write through keys. */
    return (MDB_val){.mv_size = n, .mv_data = (void *)(uintptr_t)p};
}

ibid_err ibidi_raw_get(ibidi_txn *t, ibidi_table tab, const ibidi_key *k, ibidi_slice *out) {
    MDB_val key = as_val(k->b, k->n), val = {0};
    int rc = mdb_get(t->mdb, t->env->dbi[tab], &key, &val);
    if (rc) return fail_txn(t, rc, "cannot read");
    *out = (ibidi_slice){val.mv_data, val.mv_size};
    return IBID_OK;
}

ibid_err ibidi_raw_reserve(ibidi_txn *t, ibidi_table tab, const ibidi_key *k, size_t n,
                           void **out) {
    MDB_val key = as_val(k->b, k->n), val = {.mv_size = n};
    t->put_bytes += n;
    int rc = mdb_put(t->mdb, t->env->dbi[tab], &key, &val, MDB_RESERVE);
    if (rc) return fail_txn(t, rc, "cannot write");
    *out = val.mv_data;
    return IBID_OK;
}

ibid_err ibidi_del(ibidi_txn *t, ibidi_table tab, const ibidi_key *k) {
    MDB_val key = as_val(k->b, k->n);
    int rc = mdb_del(t->mdb, t->env->dbi[tab], &key, NULL);
    return rc ? fail_txn(t, rc, "cannot delete") : IBID_OK;
}

ibid_err ibidi_count(ibidi_txn *t, ibidi_table tab, uint64_t *rows) {
    MDB_stat st;
    int rc = mdb_stat(t->mdb, t->env->dbi[tab], &st);
    if (rc) return fail_txn(t, rc, "cannot count");
    *rows = st.ms_entries;
    return IBID_OK;
}

ibid_err ibidi_cursor_open(ibidi_txn *t, ibidi_table tab, ibidi_cursor *c) {
    MDB_cursor *mc = NULL;
    int rc = mdb_cursor_open(t->mdb, t->env->dbi[tab], &mc);
    if (rc) return fail_txn(t, rc, "cannot read");
    *c = (ibidi_cursor){.mdb = mc, .txn = t, .tab = tab};
    return IBID_OK;
}

void ibidi_cursor_close(ibidi_cursor *c) {
    if (c->mdb) mdb_cursor_close(c->mdb);
    c->mdb = NULL;
}

static ibid_err move(ibidi_cursor *c, MDB_val *key, MDB_cursor_op op) {
    MDB_val val = {0};
    int rc = mdb_cursor_get(c->mdb, key, &val, op);
    if (rc) return fail_txn(c->txn, rc, "cannot read");
    c->key = (ibidi_slice){key->mv_data, key->mv_size};
    c->value = (ibidi_slice){val.mv_data, val.mv_size};
    return IBID_OK;
}

ibid_err ibidi_cursor_first(ibidi_cursor *c) {
    MDB_val key = {0};
    return move(c, &key, MDB_FIRST);
}

ibid_err ibidi_cursor_next(ibidi_cursor *c) {
    MDB_val key = {0};
    return move(c, &key, MDB_NEXT);
}

ibid_err ibidi_cursor_seek(ibidi_cursor *c, const ibidi_key *k) {
    MDB_val key = as_val(k->b, k->n);
    return move(c, &key, MDB_SET_RANGE);
}

ibid_err ibidi_cursor_del(ibidi_cursor *c) {
    int rc = mdb_cursor_del(c->mdb, 0);
    return rc ? fail_txn(c->txn, rc, "cannot delete") : IBID_OK;
}
