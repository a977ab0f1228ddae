#include "indexer/extract/child.h"
#include "rpc/base/clock.h"
#include "rpc/base/sanitized.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { STDERR_KEPT = 400 };

struct ibid_extraction {
    pid_t pid;
    int out, err;
    ibid_extract_limits limits;
    ibid_buf in; /* bytes read, not yet handed out as frames */
    size_t used; /* of them */
    uint64_t total;
    enum { OUTSIDE, INSIDE, OVER } place; /* between documents, in one, after DONE */
    char said[STDERR_KEPT + 1];
    size_t n_said;
};

ibid_err ibid_extract_program(char *out, size_t room) {
    const char *set = getenv("IBID_EXTRACT");
    if (set && *set) {
        if (strlen(set) >= room) return ibid_fail(IBID_INVAL, "IBID_EXTRACT is too long");
        memcpy(out, set, strlen(set) + 1);
        return IBID_OK;
    }
    static const char *const places[] = {"ibid-extract", "../libexec/ibid/ibid-extract",
                                         "../bin/ibid-extract"};
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0) return ibid_fail_errno(errno, "reading", "/proc/self/exe");
    self[n] = '\0';
    char *slash = strrchr(self, '/');
    if (slash) *slash = '\0';
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        int len = snprintf(out, room, "%s/%s", self, places[i]);
        if (len > 0 && (size_t)len < room && access(out, X_OK) == 0) return IBID_OK;
    }
    return ibid_fail(IBID_NOTFOUND,
                     "ibid-extract is not beside %s: install it there or set "
                     "IBID_EXTRACT",
                     self);
}

/* In the child, between fork and exec: only calls that are safe there. */
static void become_extractor(const char *program, char *const argv[], int file, int out, int err,
                             const ibid_extract_limits *l) {
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    (void)setpgid(0, 0);
    sigset_t none;
    (void)sigemptyset(&none);
    (void)sigprocmask(SIG_SETMASK, &none, NULL);
    (void)signal(SIGPIPE, SIG_DFL);
    /* The three may lie on 0..2 already: move them out of the way first. */
    file = fcntl(file, F_DUPFD, 10);
    out = fcntl(out, F_DUPFD, 10);
    err = fcntl(err, F_DUPFD, 10);
    if (dup2(file, 0) < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0) _exit(126);
    (void)close_range(3, ~0U, 0);
    /* The soft limit's signal says what happened; the hard one follows a second later. */
    struct rlimit cpu = {.rlim_cur = l->cpu_s, .rlim_max = l->cpu_s + 1};
    (void)setrlimit(RLIMIT_CPU, &cpu);
    const struct rlimit none_of_it = {0, 0}, files = {64, 64}, memory = {l->memory, l->memory};
    (void)setrlimit(RLIMIT_CORE, &none_of_it);
    (void)setrlimit(RLIMIT_NOFILE, &files);
    if (!IBID_SANITIZED) { /* their shadow fits nowhere, and TSan writes a file when it starts */
        (void)setrlimit(RLIMIT_FSIZE, &none_of_it);
        (void)setrlimit(RLIMIT_AS, &memory);
    }
    (void)execv(program, argv);
    _exit(127);
}

ibid_err ibid_extraction_open(const char *program, int fd, const char *name, ibid_format format,
                              const ibid_extract_limits *limits, ibid_extraction **out) {
    int o[2] = {-1, -1}, r[2] = {-1, -1};
    struct stat st;
    ibid_err e = IBID_OK;
    ibid_extraction *x = ibid_calloc(1, sizeof *x);
    if (!x) return ibid_fail(IBID_NOMEM, "out of memory for an extraction");
    x->pid = -1, x->out = -1, x->err = -1;
    ibid_buf_init(&x->in, 4 * IBIDI_FRAME_MAX);
    if (limits) x->limits = *limits;
    uint64_t size = fstat(fd, &st) == 0 && st.st_size > 0 ? (uint64_t)st.st_size : 0;
    if (!x->limits.cpu_s) x->limits.cpu_s = 60 + size / (1024 * 1024);
    if (!x->limits.idle_ms) x->limits.idle_ms = 120000;
    if (!x->limits.memory) x->limits.memory = (uint64_t)1 << 30;
    if (!x->limits.output) x->limits.output = (uint64_t)1 << 30;
    if (lseek(fd, 0, SEEK_SET) < 0) e = ibid_fail_errno(errno, "reading", name);
    if (!e && (pipe2(o, O_CLOEXEC) != 0 || pipe2(r, O_CLOEXEC) != 0))
        e = ibid_fail_errno(errno, "opening a pipe for", name);
    if (!e) {
        char *argv[] = {(char *)program, (char *)ibid_format_name(format), (char *)name, NULL};
        (void)fcntl(o[1], F_SETPIPE_SZ, 1024 * 1024);
        x->pid = fork();
        if (x->pid == 0) become_extractor(program, argv, fd, o[1], r[1], &x->limits);
        if (x->pid < 0) e = ibid_fail_errno(errno, "starting", program);
    }
    if (o[1] >= 0) (void)close(o[1]);
    if (r[1] >= 0) (void)close(r[1]);
    x->out = o[0];
    x->err = r[0];
    if (!e && fcntl(x->err, F_SETFL, O_NONBLOCK) != 0)
        e = ibid_fail_errno(errno, "opening a pipe for", name);
    if (e)
        ibid_extraction_close(x);
    else
        *out = x;
    return e;
}

void ibid_extraction_close(ibid_extraction *x) {
    if (!x) return;
    if (x->pid > 0) {
        /* The group as well: pdftotext may still run. setpgid may not have happened yet. */
        (void)kill(-x->pid, SIGKILL);
        (void)kill(x->pid, SIGKILL);
        while (waitpid(x->pid, NULL, 0) < 0 && errno == EINTR) continue;
    }
    if (x->out >= 0) (void)close(x->out);
    if (x->err >= 0) (void)close(x->err);
    ibid_buf_fini(&x->in);
    ibid_free(x);
}

static void hear(ibid_extraction *x) {
    char buf[512];
    for (;;) {
        ssize_t n = read(x->err, buf, sizeof buf);
        if (n <= 0) break;
        for (ssize_t i = 0; i < n && x->n_said < STDERR_KEPT; i++)
            x->said[x->n_said++] = (unsigned char)buf[i] < 0x20 || buf[i] == 0x7F ? ' ' : buf[i];
    }
    while (x->n_said > 0 && x->said[x->n_said - 1] == ' ') x->n_said--;
    x->said[x->n_said] = '\0';
}

/* The pipe ended before DONE: why? */
static ibid_err ended(ibid_extraction *x) {
    int status = 0;
    pid_t pid = x->pid;
    hear(x);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    (void)kill(-pid, SIGKILL);
    x->pid = -1;
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGXCPU)
        return ibid_fail(IBID_TIMEOUT, "reading it took more than %llu seconds of processor time",
                         (unsigned long long)x->limits.cpu_s);
    if (WIFSIGNALED(status))
        return ibid_fail(IBID_IO, "the extractor was killed by it (signal %d)%s%s",
                         WTERMSIG(status), x->n_said ? ": " : "", x->said);
    if (WEXITSTATUS(status) == 3)
        return ibid_fail(IBID_TOOBIG, "reading it needs more memory than %llu MiB",
                         (unsigned long long)(x->limits.memory >> 20));
    if (WEXITSTATUS(status) == 127)
        return ibid_fail(IBID_NOTFOUND, "ibid-extract cannot be started");
    return ibid_fail(IBID_IO, "the extractor failed (status %d)%s%s", WEXITSTATUS(status),
                     x->n_said ? ": " : "", x->said);
}

/* Waits for bytes and reads some. EMPTY at the end of the pipe. */
static ibid_err fill(ibid_extraction *x) {
    uint64_t start = ibid_now_ns();
    struct pollfd p[2] = {{.fd = x->out, .events = POLLIN}, {.fd = x->err, .events = POLLIN}};
    if (x->used) {
        memmove(x->in.data, x->in.data + x->used, x->in.len - x->used);
        x->in.len -= x->used;
        x->used = 0;
    }
    ibid_err e = ibid_buf_reserve(&x->in, IBIDI_FRAME_MAX);
    while (!e) {
        if (x->limits.stop && atomic_load(x->limits.stop))
            return ibid_fail(IBID_CANCELLED, "stopped while reading it");
        if (ibid_ms_since(start) >= (double)x->limits.idle_ms)
            return ibid_fail(IBID_TIMEOUT, "the extractor was silent for %llu seconds",
                             (unsigned long long)(x->limits.idle_ms / 1000));
        int wait = x->limits.idle_ms < 100 ? (int)x->limits.idle_ms : 100;
        int n = poll(p, 2, wait);
        if (n < 0 && errno != EINTR) return ibid_fail_errno(errno, "waiting for", "ibid-extract");
        if (n <= 0) continue;
        if (p[1].revents) {
            hear(x);
            if (p[1].revents & POLLHUP) p[1].fd = -1;
        }
        if (!p[0].revents) continue;
        ssize_t got = read(x->out, x->in.data + x->in.len, IBIDI_FRAME_MAX);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return ibid_fail_errno(errno, "reading from", "ibid-extract");
        if (got == 0) return IBID_EMPTY;
        x->in.len += (size_t)got;
        x->total += (uint64_t)got;
        if (x->total > x->limits.output)
            return ibid_fail(IBID_TOOBIG, "it holds more than %llu MiB of text",
                             (unsigned long long)(x->limits.output >> 20));
        return IBID_OK;
    }
    return e;
}

static ibid_err in_order(ibid_extraction *x, ibid_frame_kind kind) {
    bool inside = kind == IBID_FRAME_LOCATOR || kind == IBID_FRAME_TEXT || kind == IBID_FRAME_END;
    if (x->place == OVER || inside != (x->place == INSIDE))
        return ibid_fail(IBID_PROTO, "the extractor sent frames out of order");
    if (kind == IBID_FRAME_BEGIN) x->place = INSIDE;
    if (kind == IBID_FRAME_END) x->place = OUTSIDE;
    if (kind == IBID_FRAME_DONE) x->place = OVER;
    return IBID_OK;
}

ibid_err ibid_extraction_next(ibid_extraction *x, ibid_frame *out) {
    size_t need = IBIDI_FRAME_HEADER, payload = 0;
    ibid_err e = IBID_OK;
    bool head = false;
    while (!e) {
        if (x->in.len - x->used < need) {
            e = fill(x);
            if (e == IBID_EMPTY) return ended(x);
            continue;
        }
        if (head) break;
        e = ibidi_xt_frame_header((const unsigned char *)x->in.data + x->used, out, &payload);
        need = IBIDI_FRAME_HEADER + payload;
        head = true;
    }
    if (!e) e = ibidi_xt_frame_payload(x->in.data + x->used + IBIDI_FRAME_HEADER, payload, out);
    if (!e) e = in_order(x, out->kind);
    if (!e) x->used += need;
    return e;
}
