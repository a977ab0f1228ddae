#include "rpc/bus/host.h"
#include "rpc/base/mem.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- Options ---- */

ibid_err ibid_host_data_dir(const char *arg, char *out) {
    const char *env = getenv("IBID_DATA"), *xdg = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    const char *dir = arg && *arg ? arg : env, *tail = "";
    char cwd[PATH_MAX] = "";
    if (!dir || !*dir) {
        dir = xdg && *xdg ? xdg : home;
        tail = xdg && *xdg ? "/ibid" : "/.local/share/ibid";
    }
    if (!dir || !*dir)
        return ibid_fail(IBID_INVAL, "HOME is not set: say where the data lies with --data DIR");
    if (dir[0] != '/' && !getcwd(cwd, sizeof cwd))
        return ibid_fail_errno(errno, "cannot find the current folder", "");
    int n = snprintf(out, IBID_HOST_PATH_MAX, "%s%s%s%s", cwd, *cwd ? "/" : "", dir, tail);
    if (n < 0 || n >= IBID_HOST_PATH_MAX)
        return ibid_fail(IBID_INVAL, "the data folder's path is too long");
    return IBID_OK;
}

/* A count, with K, M, G or T where bytes are meant. */
static ibid_err parse_number(const char *name, const char *text, bool bytes, uint64_t *out) {
    static const char units[] = "KMGT";
    char *end = NULL;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    bool bad = end == text || errno || text[0] == '-';
    const char *unit = bytes && *end ? strchr(units, *end) : NULL;
    if (unit) {
        for (const char *u = units; u <= unit; u++)
            bad = bad || __builtin_mul_overflow(v, 1024u, &v);
        end++;
    }
    if (bad || *end) return ibid_fail(IBID_INVAL, "--%s: %s is not a number", name, text);
    *out = v;
    return IBID_OK;
}

static ibid_err parse_level(const char *text, ibid_log_level *out) {
    static const char *const names[] = {"error", "warn", "info", "debug"};
    for (int i = 0; i < 4; i++) {
        if (strcmp(text, names[i]) != 0) continue;
        *out = (ibid_log_level)i;
        return IBID_OK;
    }
    return ibid_fail(IBID_INVAL, "--log-level: %s is not error, warn, info or debug", text);
}

static ibid_err set_option(ibid_host_opts *o, const char *name, const char *value,
                           const char **data) {
    uint64_t n = 0;
    ibid_err e = IBID_OK;
    if (strcmp(name, "data") == 0) {
        *data = value;
    } else if (strcmp(name, "log-level") == 0) {
        e = parse_level(value, &o->log_level);
    } else if (strcmp(name, "threads") == 0 || strcmp(name, "workers") == 0) {
        e = parse_number(name, value, false, &n);
        if (!e && n > 1024) e = ibid_fail(IBID_INVAL, "--%s: at most 1024", name);
        if (!e) *(name[0] == 't' ? &o->threads : &o->workers) = (size_t)n;
    } else if (strcmp(name, "map-size") == 0) {
        e = parse_number(name, value, true, &o->map_size);
    } else if (strcmp(name, "kv-budget") == 0) {
        e = parse_number(name, value, true, &o->kv_budget);
    } else if (strcmp(name, "kernels") == 0) {
        if (strlen(value) >= sizeof o->kernels)
            e = ibid_fail(IBID_INVAL, "--kernels: too long");
        else
            (void)snprintf(o->kernels, sizeof o->kernels, "%s", value);
    } else if (strcmp(name, "arithmetic") == 0) {
        o->f32 = strcmp(value, "f32") == 0;
        if (!o->f32 && strcmp(value, "int8") != 0)
            e = ibid_fail(IBID_INVAL, "--arithmetic: %s is not int8 or f32", value);
    } else if (strcmp(name, "backend") == 0) {
        if (strcmp(value, "auto") != 0 && strcmp(value, "cpu") != 0 && strcmp(value, "cuda") != 0)
            e = ibid_fail(IBID_INVAL, "--backend: %s is not auto, cpu or cuda", value);
        else
            (void)snprintf(o->backend, sizeof o->backend, "%s", value);
    } else if (strcmp(name, "gpu-pool") == 0) {
        e = parse_number(name, value, true, &o->gpu_pool);
    } else {
        e = ibid_fail(IBID_INVAL, "unknown option --%s", name);
    }
    return e;
}

ibid_err ibid_host_parse(int argc, char **argv, ibid_host_opts *o, bool *help) {
    const char *data = NULL;
    ibid_err e = IBID_OK;
    memset(o, 0, sizeof *o);
    o->log_level = IBID_LOG_INFO;
    *help = false;
    for (int i = 1; i < argc && !e; i++) {
        char name[32];
        const char *arg = argv[i], *eq = strchr(arg, '='), *value;
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            *help = true;
            continue;
        }
        if (strncmp(arg, "--", 2) != 0) return ibid_fail(IBID_INVAL, "unexpected argument %s", arg);
        size_t n = eq ? (size_t)(eq - arg) - 2 : strlen(arg) - 2;
        if (n >= sizeof name) return ibid_fail(IBID_INVAL, "unknown option %s", arg);
        memcpy(name, arg + 2, n);
        name[n] = '\0';
        if (!eq && i + 1 >= argc) return ibid_fail(IBID_INVAL, "--%s needs a value", name);
        value = eq ? eq + 1 : argv[++i];
        e = set_option(o, name, value, &data);
    }
    return e || *help ? e : ibid_host_data_dir(data, o->data_dir);
}

/* ---- A process ---- */

enum { CLOSE_S = 10 };

static ibid_err create_data_dir(const char *dir) {
    char path[IBID_HOST_PATH_MAX];
    (void)snprintf(path, sizeof path, "%s", dir);
    for (char *p = path + 1;; p++) {
        if (*p != '/' && *p) continue;
        char c = *p;
        *p = '\0';
        if (mkdir(path, 0700) != 0 && errno != EEXIST)
            return ibid_fail_errno(errno, "cannot create the data folder", path);
        *p = c;
        if (!c) return IBID_OK;
    }
}

/* Before any thread exists: the signals a service stops for are taken by sigwait only. */
static void take_signals(sigset_t *stops) {
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    (void)sigemptyset(stops);
    (void)sigaddset(stops, SIGINT);
    (void)sigaddset(stops, SIGTERM);
    (void)sigaddset(stops, SIGHUP);
    (void)pthread_sigmask(SIG_BLOCK, stops, NULL);
    (void)sigaction(SIGPIPE, &ignore, NULL);
}

static void usage(const ibid_room_vtable *v, FILE *to) {
    (void)fprintf(to,
                  "usage: ibid-%s [--data DIR] [--log-level error|warn|info|debug] [--threads N]\n"
                  "       [--workers N] [--map-size BYTES] [--kv-budget BYTES] [--kernels NAME]\n"
                  "       [--arithmetic int8|f32] [--backend auto|cpu|cuda] [--gpu-pool BYTES]\n"
                  "Usually started by `ibid up`. BYTES take K, M, G or T.\n"
                  "example: ibid-%s --data ~/.local/share/ibid --log-level debug\n",
                  v->name, v->name);
}

static atomic_bool gave_up;

void ibid_host_give_up(const ibid_host_opts *o, ibid_err err, const char *why) {
    if (atomic_exchange(&gave_up, !o->inproc)) return;
    ibid_log(IBID_LOG_ERROR, "cannot go on: %s: %s", ibid_err_code(err), why);
    if (!o->inproc) (void)kill(getpid(), SIGTERM);
}

int ibid_host_main(int argc, char **argv, const ibid_room_vtable *v) {
    ibid_host_opts o;
    bool help = false;
    void *room = NULL;
    sigset_t stops;
    int sig = 0;
    pid_t parent = getppid();
    ibid_err e = ibid_host_parse(argc, argv, &o, &help);
    if (e) (void)fprintf(stderr, "ibid-%s: %s\n", v->name, ibid_err_detail());
    if (e || help) usage(v, e ? stderr : stdout);
    if (e || help) return e ? 2 : 0;
    ibid_log_init(v->name, o.log_level);
    take_signals(&stops);
    (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) return 0; /* it died before the line above: nobody wants us */
    e = create_data_dir(o.data_dir);
    if (!e) e = v->open(&o, &room);
    if (e) {
        ibid_log(IBID_LOG_ERROR, "cannot start: %s: %s", ibid_err_code(e), ibid_err_detail());
        return 2;
    }
    while (sigwait(&stops, &sig) != 0) {
    }
    bool failed = atomic_load(&gave_up);
    ibid_log(IBID_LOG_INFO, "stopping: %s", failed ? "it cannot go on" : strsignal(sig));
    /* A room whose supervisor was killed is stopped by nobody else, and its locks keep the next one
     * out: should closing hang (seen in nng's), SIGALRM ends it. What is stored survives that. */
    (void)signal(SIGALRM, SIG_DFL);
    (void)alarm(CLOSE_S);
    v->close(room);
    (void)alarm(0);
    return failed ? 3 : 0;
}

/* ---- Several rooms in one process ---- */

struct ibid_hosted {
    ibid_host_opts opts;
    size_t n;
    struct {
        const ibid_room_vtable *v;
        void *room;
    } open[8];
};

ibid_err ibid_host_inproc(const ibid_room_vtable *const *rooms, size_t n, const ibid_host_opts *o,
                          ibid_hosted **out) {
    ibid_err e = IBID_OK;
    ibid_hosted *h = ibid_calloc(1, sizeof *h);
    if (!h) return ibid_fail(IBID_NOMEM, "out of memory for the rooms");
    h->opts = *o;
    h->opts.inproc = true;
    if (n > sizeof h->open / sizeof h->open[0]) e = ibid_fail(IBID_INVAL, "%zu rooms", n);
    if (!e && o->data_dir[0] != '/') e = ibid_fail(IBID_INVAL, "data_dir must be absolute");
    if (!e) e = create_data_dir(o->data_dir);
    for (size_t i = 0; i < n && !e; i++) {
        e = rooms[i]->open(&h->opts, &h->open[i].room);
        if (e) break;
        h->open[i].v = rooms[i];
        h->n = i + 1;
    }
    if (e) goto done;
    *out = h;
    h = NULL;
done:
    ibid_hosted_close(h);
    return e;
}

void ibid_hosted_close(ibid_hosted *h) {
    if (!h) return;
    while (h->n) {
        h->n--;
        h->open[h->n].v->close(h->open[h->n].room);
    }
    ibid_free(h);
}
