#include "rpc/front/supervisor.h"
#include "rpc/base/clock.h"
#include "rpc/base/log.h"
#include "rpc/base/mem.h"
#include "rpc/bus/bus.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

const char *const ibidi_room_names[IBIDI_ROOMS] = {"kvstore", "attention", "retriever", "indexer"};

enum {
    BACKOFF_MIN_MS = 100,
    BACKOFF_MAX_MS = 5000,
    HEALTHY_MS = 10000,
    STOP_MS = 15000,  /* then SIGKILL: LMDB and the jobs survive that */
    LOCK_MS = 2000,   /* the one before may take so long to let go of the lock */
    GUARD_MS = 1000,  /* the guard goes first: it knows the options of the service that died */
    LAUNCH_MS = 3000, /* a supervisor that was started has its lock by then, or failed */
    LOG_KEEP = 8 * 1024 * 1024
};

struct room {
    pid_t pid;
    uint64_t restarts, started_ns, next_ns, backoff_ms;
};

struct supervisor {
    const char *data;
    const ibid_opts *o;
    struct room room[IBIDI_ROOMS];
    pid_t guard;
    int guard_pipe; /* write end: a byte on it means a planned end */
    int lock;
    bool stopping;
};

static int open_file(const char *data, const char *name, int flags) {
    char path[4096];
    if ((size_t)snprintf(path, sizeof path, "%s/%s", data, name) >= sizeof path) return -1;
    return open(path, flags | O_CLOEXEC, 0600);
}

static ibid_err make_folders(const char *data) {
    static const char *const names[] = {"", "/run", "/log", "/models"};
    char path[4096];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if ((size_t)snprintf(path, sizeof path, "%s%s", data, names[i]) >= sizeof path)
            return ibid_fail(IBID_INVAL, "the data folder's path is too long");
        for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
            *slash = '\0';
            (void)mkdir(path, 0700);
            *slash = '/';
        }
        if (mkdir(path, 0700) != 0 && errno != EEXIST)
            return ibid_fail_errno(errno, "cannot create", path);
    }
    return IBID_OK;
}

/* ---- The lock that says who supervises ---- */

/* A lock of the open file (not flock's): others can ask who holds it without taking it. */
static struct flock whole_file(void) {
    return (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET};
}

/* Tries for LOCK_MS: a room that was being started when its supervisor was killed holds the lock
 * until its exec. */
static int take_lock(const char *data) {
    int fd = open_file(data, "run/supervisor.lock", O_RDWR | O_CREAT);
    if (fd < 0) return -1;
    uint64_t start = ibid_now_ns();
    struct flock lock = whole_file();
    while (fcntl(fd, F_OFD_SETLK, &lock) != 0) {
        if ((errno != EAGAIN && errno != EACCES && errno != EINTR) ||
            ibid_ms_since(start) > LOCK_MS)
            return close(fd), -1;
        (void)poll(NULL, 0, 20);
    }
    /* Of one width, written over the last one's: a reader never finds half a number. */
    char pid[32];
    int n = snprintf(pid, sizeof pid, "%-20ld\n", (long)getpid());
    if (pwrite(fd, pid, (size_t)n, 0) != n || ftruncate(fd, n) != 0) return close(fd), -1;
    return fd;
}

pid_t ibidi_supervisor_pid(const char *data) {
    int fd = open_file(data, "run/supervisor.lock", O_RDONLY);
    if (fd < 0) return 0;
    long pid = 0;
    struct flock lock = whole_file();
    char text[32] = "";
    if (fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK &&
        pread(fd, text, sizeof text - 1, 0) > 0)
        pid = strtol(text, NULL, 10);
    (void)close(fd);
    return pid > 1 ? (pid_t)pid : 0;
}

/* ---- Rooms ---- */

static bool program_path(const char *name, char *out, size_t room) {
    ssize_t n = readlink("/proc/self/exe", out, room - 1);
    if (n <= 0) return false;
    out[n] = '\0';
    char *slash = strrchr(out, '/');
    return slash && (size_t)snprintf(slash + 1, room - (size_t)(slash + 1 - out), "%s", name) <
                        room - (size_t)(slash + 1 - out);
}

/* A log that passed its size is kept as NAME.1; the older one goes. */
static int open_log(const char *data, const char *name) {
    char path[4096], old[4100];
    struct stat st;
    if ((size_t)snprintf(path, sizeof path, "%s/log/%s.log", data, name) >= sizeof path) return -1;
    if (stat(path, &st) == 0 && st.st_size > LOG_KEEP) {
        (void)snprintf(old, sizeof old, "%s.1", path);
        (void)rename(path, old);
    }
    return open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void redirect(int log) {
    int null = open("/dev/null", O_RDONLY);
    if (null >= 0) (void)dup2(null, STDIN_FILENO);
    if (log >= 0) {
        (void)dup2(log, STDOUT_FILENO);
        (void)dup2(log, STDERR_FILENO);
    }
}

static void unblock_signals(void) {
    sigset_t none;
    (void)sigemptyset(&none);
    (void)sigprocmask(SIG_SETMASK, &none, NULL);
}

/* What rooms and a supervisor that takes over are told alike. */
struct words {
    const char *argv[32];
    size_t n;
    char threads[32], budget[32], map[32], pool[32];
};

static void add_word(struct words *w, const char *word) {
    w->argv[w->n++] = word;
}

static void add_option(struct words *w, const char *name, const char *value) {
    if (!value) return;
    add_word(w, name);
    add_word(w, value);
}

static const char *number(char text[32], uint64_t value) {
    (void)snprintf(text, 32, "%llu", (unsigned long long)value);
    return value ? text : NULL;
}

static void add_options(struct words *w, const char *data, const ibid_opts *o) {
    add_option(w, "--data", data);
    add_option(w, "--log-level", o->log_level);
    add_option(w, "--threads", number(w->threads, o->threads));
    add_option(w, "--kv-budget", number(w->budget, o->kv_budget));
    add_option(w, "--map-size", number(w->map, o->map_size));
    add_option(w, "--arithmetic", o->arithmetic);
    add_option(w, "--kernels", o->kernels);
    add_option(w, "--backend", o->backend);
    add_option(w, "--gpu-pool", number(w->pool, o->gpu_pool));
}

/* In the child: never returns. */
static void exec_room(const struct supervisor *s, const char *name, pid_t parent) {
    char program[4096], file[64];
    struct words w = {.n = 0};
    (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(1); /* the supervisor died before the line above */
    redirect(open_log(s->data, name));
    unblock_signals();
    (void)setpgid(0, 0); /* Ctrl-C at a terminal is the supervisor's business */
    (void)snprintf(file, sizeof file, "ibid-%s", name);
    add_word(&w, file);
    add_options(&w, s->data, s->o);
    if (program_path(file, program, sizeof program)) (void)execv(program, (char *const *)w.argv);
    (void)dprintf(STDERR_FILENO, "cannot run %s: %s\n", program, strerror(errno));
    _exit(127);
}

static void start_room(struct supervisor *s, size_t i) {
    struct room *r = &s->room[i];
    pid_t self = getpid(), pid = fork();
    if (pid == 0) exec_room(s, ibidi_room_names[i], self);
    r->started_ns = ibid_now_ns();
    if (pid < 0) {
        ibid_log(IBID_LOG_ERROR, "cannot fork for %s: %s", ibidi_room_names[i], strerror(errno));
        r->next_ns = r->started_ns + (uint64_t)BACKOFF_MAX_MS * 1000000;
        return;
    }
    r->pid = pid;
    ibid_log(IBID_LOG_INFO, "started %s as process %ld", ibidi_room_names[i], (long)pid);
}

static void room_died(struct supervisor *s, size_t i, int status) {
    struct room *r = &s->room[i];
    uint64_t now = ibid_now_ns();
    if (now - r->started_ns > (uint64_t)HEALTHY_MS * 1000000 || r->backoff_ms == 0)
        r->backoff_ms = BACKOFF_MIN_MS;
    else
        r->backoff_ms = r->backoff_ms * 2 > BACKOFF_MAX_MS ? BACKOFF_MAX_MS : r->backoff_ms * 2;
    r->pid = 0;
    r->next_ns = now + r->backoff_ms * 1000000;
    if (s->stopping) return;
    r->restarts++;
    if (WIFSIGNALED(status))
        ibid_log(IBID_LOG_WARN, "%s was killed by signal %d; starting it again in %llu ms",
                 ibidi_room_names[i], WTERMSIG(status), (unsigned long long)r->backoff_ms);
    else
        ibid_log(IBID_LOG_WARN, "%s ended with status %d; starting it again in %llu ms",
                 ibidi_room_names[i], WEXITSTATUS(status), (unsigned long long)r->backoff_ms);
}

/* ---- The guard ---- */

/* In the child: waits for the pipe's end; a byte first means a planned stop. Becomes the supervisor
 * otherwise. Never returns. */
static void guard_main(const struct supervisor *s, int pipe_end) {
    (void)signal(SIGINT, SIG_IGN);
    unblock_signals();
    (void)prctl(PR_SET_NAME, "ibid-guard");
    char bye;
    ssize_t n;
    do n = read(pipe_end, &bye, 1);
    while (n < 0 && errno == EINTR);
    if (n > 0) _exit(0);
    char program[4096];
    (void)program_path("ibid", program, sizeof program);
    (void)signal(SIGINT, SIG_DFL);
    ibid_log(IBID_LOG_WARN, "the supervisor died; its guard takes over");
    struct words w = {.argv = {"ibid", "up", "--foreground"}, .n = 3};
    add_options(&w, s->data, s->o);
    (void)execv(program, (char *const *)w.argv);
    _exit(127);
}

static void start_guard(struct supervisor *s) {
    int ends[2];
    if (s->guard_pipe >= 0) (void)close(s->guard_pipe);
    s->guard_pipe = -1;
    s->guard = 0;
    if (pipe2(ends, O_CLOEXEC) != 0) return;
    pid_t pid = fork();
    if (pid == 0) {
        (void)close(ends[1]);
        (void)close(s->lock); /* else the lock outlives the supervisor */
        guard_main(s, ends[0]);
    }
    (void)close(ends[0]);
    if (pid < 0) {
        (void)close(ends[1]);
        return;
    }
    s->guard = pid;
    s->guard_pipe = ends[1];
}

static void dismiss_guard(struct supervisor *s) {
    if (s->guard_pipe < 0) return;
    ssize_t ignored = write(s->guard_pipe, "q", 1);
    (void)ignored;
    (void)close(s->guard_pipe);
    s->guard_pipe = -1;
}

/* ---- The loop ---- */

static void write_state(const struct supervisor *s) {
    char path[4096], fresh[4100];
    (void)snprintf(path, sizeof path, "%s/run/supervisor.json", s->data);
    (void)snprintf(fresh, sizeof fresh, "%s.new", path);
    json_t *j = json_pack("{s:I}", "supervisor", (json_int_t)getpid());
    for (size_t i = 0; i < IBIDI_ROOMS; i++)
        (void)json_object_set_new(j, ibidi_room_names[i],
                                  json_pack("{s:I,s:I}", "pid", (json_int_t)s->room[i].pid,
                                            "restarts", (json_int_t)s->room[i].restarts));
    if (j && json_dump_file(j, fresh, JSON_COMPACT) == 0) (void)rename(fresh, path);
    json_decref(j);
}

void ibidi_supervisor_restarts(const char *data, uint64_t restarts[IBIDI_ROOMS]) {
    char path[4096];
    (void)snprintf(path, sizeof path, "%s/run/supervisor.json", data);
    json_t *j = json_load_file(path, 0, NULL);
    for (size_t i = 0; i < IBIDI_ROOMS; i++)
        restarts[i] = (uint64_t)json_integer_value(
            json_object_get(json_object_get(j, ibidi_room_names[i]), "restarts"));
    json_decref(j);
}

/* A planned end leaves no state: what is found without a supervisor is one's that was killed. */
static void remove_state(const char *data) {
    char path[4096];
    (void)snprintf(path, sizeof path, "%s/run/supervisor.json", data);
    (void)unlink(path);
}

static bool state_left(const char *data) {
    char path[4096];
    (void)snprintf(path, sizeof path, "%s/run/supervisor.json", data);
    return access(path, F_OK) == 0;
}

static void reap(struct supervisor *s) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (pid == s->guard) {
            s->guard = 0;
            if (!s->stopping) start_guard(s);
            continue;
        }
        for (size_t i = 0; i < IBIDI_ROOMS; i++)
            if (s->room[i].pid == pid) room_died(s, i, status);
    }
}

/* Starts what is due; returns the milliseconds until the next start is, -1 for never. */
static int start_due(struct supervisor *s) {
    uint64_t now = ibid_now_ns();
    int wait = -1;
    for (size_t i = 0; i < IBIDI_ROOMS; i++) {
        struct room *r = &s->room[i];
        if (r->pid == 0 && r->next_ns <= now) start_room(s, i);
        if (r->pid != 0) continue;
        int ms = (int)((r->next_ns - now) / 1000000) + 1;
        if (wait < 0 || ms < wait) wait = ms;
    }
    return wait;
}

/* Stops the callers of the store before the store itself. */
static void stop_rooms(struct supervisor *s) {
    s->stopping = true;
    for (size_t i = IBIDI_ROOMS; i-- > 0;) {
        struct room *r = &s->room[i];
        if (r->pid == 0) continue;
        (void)kill(r->pid, SIGTERM);
        uint64_t start = ibid_now_ns();
        while (r->pid != 0) {
            reap(s);
            if (r->pid != 0 && ibid_ms_since(start) > STOP_MS) {
                ibid_log(IBID_LOG_WARN, "%s does not stop; killing it", ibidi_room_names[i]);
                (void)kill(r->pid, SIGKILL);
                start = ibid_now_ns();
            }
            if (r->pid != 0) (void)poll(NULL, 0, 10);
        }
    }
}

int ibidi_supervise(const char *data, const ibid_opts *o) {
    struct supervisor s = {.data = data, .o = o, .guard_pipe = -1};
    ibid_log_init("supervisor", IBID_LOG_INFO);
    if (make_folders(data) != IBID_OK) {
        (void)fprintf(stderr, "ibid: %s\n", ibid_err_detail());
        return 2;
    }
    s.lock = take_lock(data);
    if (s.lock < 0) {
        (void)fprintf(stderr, "ibid: another ibid supervises %s already\n", data);
        return 2;
    }
    sigset_t set;
    (void)sigemptyset(&set);
    (void)sigaddset(&set, SIGINT);
    (void)sigaddset(&set, SIGTERM);
    (void)sigaddset(&set, SIGHUP);
    (void)sigaddset(&set, SIGCHLD);
    (void)sigprocmask(SIG_BLOCK, &set, NULL);
    (void)signal(SIGPIPE, SIG_IGN);
    int sig = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (sig < 0) return 2;
    start_guard(&s);
    for (bool stop = false; !stop;) {
        int wait = start_due(&s);
        write_state(&s);
        struct pollfd p = {.fd = sig, .events = POLLIN};
        (void)poll(&p, 1, wait);
        struct signalfd_siginfo info;
        while (read(sig, &info, sizeof info) == (ssize_t)sizeof info)
            stop |= info.ssi_signo == SIGINT || info.ssi_signo == SIGTERM;
        reap(&s);
    }
    ibid_log(IBID_LOG_INFO, "stopping");
    dismiss_guard(&s);
    stop_rooms(&s);
    remove_state(data);
    ibid_log(IBID_LOG_INFO, "stopped");
    (void)close(sig);
    (void)close(s.lock);
    return 0;
}

/* ---- From outside ---- */

/* The room's process as the supervisor now in office says, 0 if there is none. Old rooms may still
 * answer for a moment after their supervisor was killed: theirs is not this number. */
static uint64_t room_pid(const char *data, size_t i) {
    char path[4096];
    (void)snprintf(path, sizeof path, "%s/run/supervisor.json", data);
    pid_t supervisor = ibidi_supervisor_pid(data);
    json_t *j = json_load_file(path, 0, NULL);
    json_int_t author = json_integer_value(json_object_get(j, "supervisor"));
    json_int_t pid =
        json_integer_value(json_object_get(json_object_get(j, ibidi_room_names[i]), "pid"));
    json_decref(j);
    return supervisor != 0 && author == supervisor && pid > 0 ? (uint64_t)pid : 0;
}

static bool room_ready(const char *data, size_t i) {
    char url[IBID_BUS_URL_MAX];
    ibid_client *c = NULL;
    uint64_t expected = room_pid(data, i), pid = 0;
    if (expected == 0 || ibid_bus_url(data, ibidi_room_names[i], false, url) != IBID_OK ||
        ibid_client_open(url, &c) != IBID_OK)
        return false;
    bool answers = ibid_client_ping(c, 1000, &pid, NULL) == IBID_OK;
    ibid_client_close(c);
    return answers && pid == expected;
}

static ibid_err launch(const char *data, const ibid_opts *o) {
    pid_t pid = fork();
    if (pid < 0) return ibid_fail_errno(errno, "cannot fork", "");
    if (pid == 0) {
        /* A second fork, so that the supervisor is nobody's child and cannot get a terminal. */
        (void)setsid();
        if (fork() != 0) _exit(0);
        redirect(open_log(data, "supervisor"));
        (void)chdir("/");
        _exit(ibidi_supervise(data, o));
    }
    (void)waitpid(pid, NULL, 0);
    return IBID_OK;
}

ibid_err ibidi_supervisor_start(const char *data, const ibid_opts *o, uint64_t budget_ms) {
    uint64_t start = ibid_now_ns(), launched = 0;
    size_t ready = 0;
    ibid_err e = make_folders(data);
    while (!e) {
        bool due = launched ? ibid_ms_since(launched) > LAUNCH_MS
                            : ibid_ms_since(start) > GUARD_MS || !state_left(data);
        if (due && ibidi_supervisor_pid(data) == 0) {
            e = launch(data, o);
            launched = ibid_now_ns();
            ready = 0;
        }
        while (ready < IBIDI_ROOMS && room_ready(data, ready)) ready++;
        if (e || ready == IBIDI_ROOMS) break;
        if (ibid_ms_since(start) > (double)budget_ms)
            e = ibid_fail(IBID_UNAVAIL,
                          "ibid-%s does not start; see %s/log/%s.log and %s/log/supervisor.log",
                          ibidi_room_names[ready], data, ibidi_room_names[ready], data);
        (void)poll(NULL, 0, 20);
    }
    return e;
}

ibid_err ibidi_supervisor_stop(const char *data, bool *was) {
    pid_t pid = ibidi_supervisor_pid(data);
    *was = pid != 0;
    if (pid == 0) return IBID_OK;
    if (kill(pid, SIGTERM) != 0) return ibid_fail_errno(errno, "cannot stop the supervisor", "");
    uint64_t start = ibid_now_ns();
    while (ibidi_supervisor_pid(data) == pid) {
        if (ibid_ms_since(start) > (IBIDI_ROOMS + 1) * STOP_MS)
            return ibid_fail(IBID_TIMEOUT, "process %ld does not stop; see %s/log", (long)pid,
                             data);
        (void)poll(NULL, 0, 20);
    }
    return IBID_OK;
}
