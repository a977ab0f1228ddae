#include "rpc/front/cmd_eval.h"
#include "attention/attention.h"
#include "indexer/indexer.h"
#include "rpc/base/clock.h"
#include "rpc/base/hash.h"
#include "rpc/bus/host.h"
#include "rpc/front/pull.h"
#include "rpc/front/supervisor.h"

#include <errno.h>
#include <ftw.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig) {
    (void)sig;
    interrupted = 1;
}

ibid_err ibidi_eval_go_on(void) {
    return interrupted ? ibid_fail(IBID_CANCELLED, "interrupted; nothing was kept of this run")
                       : IBID_OK;
}

void ibidi_eval_say(const ibidi_eval *ev, const char *fmt, ...) {
    if (ev->cli->o.json) return;
    va_list ap;
    va_start(ap, fmt);
    (void)fputs("ibid: ", stderr);
    (void)vfprintf(stderr, fmt, ap);
    (void)fputc('\n', stderr);
    va_end(ap);
}

void ibidi_eval_progress(const ibidi_eval *ev, uint64_t *since_ns, const char *what, size_t done,
                         size_t all) {
    if (*since_ns == 0) *since_ns = ibid_now_ns();
    if (ibid_ms_since(*since_ns) < 10000) return;
    ibidi_eval_say(ev, "%s: %zu of %zu", what, done, all);
    *since_ns = ibid_now_ns();
}

/* ---- systems ---- */

static void set_hybrid(ibid_search_request *q) {
    (void)q;
}
static void set_keys(ibid_search_request *q) {
    q->keys_only = true;
}
static void set_lexical(ibid_search_request *q) {
    q->lexical_only = true;
}

static const ibidi_system systems[] = {
    {"lexical", set_lexical},
    {"keys", set_keys},
    {"hybrid", set_hybrid},
};
enum { N_SYSTEMS = sizeof systems / sizeof *systems };

static ibid_err add_system(const char *name, size_t n, const ibidi_system *out[IBIDI_SYSTEMS_MAX],
                           size_t *n_out) {
    char known[256] = "";
    for (size_t i = 0; i < N_SYSTEMS; i++) {
        if (strlen(systems[i].name) == n && memcmp(systems[i].name, name, n) == 0) {
            if (*n_out == IBIDI_SYSTEMS_MAX)
                return ibid_fail(IBID_INVAL, "--system: at most %d of them", IBIDI_SYSTEMS_MAX);
            out[(*n_out)++] = &systems[i];
            return IBID_OK;
        }
        size_t at = strlen(known);
        (void)snprintf(known + at, sizeof known - at, "%s%s", i ? ", " : "", systems[i].name);
    }
    return ibid_fail(IBID_INVAL, "--system: there is no system \"%.*s\"; there are %s", (int)n,
                     name, known);
}

ibid_err ibidi_eval_systems(const ibid_opts *o, const ibidi_system *out[IBIDI_SYSTEMS_MAX],
                            size_t *n) {
    ibid_err e = IBID_OK;
    *n = 0;
    for (size_t i = 0; o->systems.n == 0 && i < N_SYSTEMS; i++) out[(*n)++] = &systems[i];
    for (size_t i = 0; !e && i < o->systems.n; i++)
        for (const char *p = o->systems.v[i]; !e && *p;) {
            size_t len = strcspn(p, ",");
            if (len) e = add_system(p, len, out, n);
            p += len + (p[len] == ',');
        }
    if (!e && *n == 0) e = ibid_fail(IBID_INVAL, "--system: none named");
    return e;
}

/* ---- begin and end ---- */

ibid_err ibidi_eval_begin(ibid_cli *cli, ibidi_eval *ev) {
    *ev = (ibidi_eval){.cli = cli, .o = cli->o};
    struct sigaction act = {.sa_handler = on_interrupt};
    (void)sigaction(SIGINT, &act, NULL);
    (void)sigaction(SIGTERM, &act, NULL);
    const char *base = getenv("TMPDIR");
    /* Short, for sockets lie in it and their paths are limited. */
    if (!base || !*base || strlen(base) > 30) base = "/tmp";
    (void)snprintf(ev->folder, sizeof ev->folder, "%s/ibid-eval-XXXXXX", base);
    if (!mkdtemp(ev->folder)) {
        ibid_err e = ibid_fail_errno(errno, "cannot create a folder", ev->folder);
        ev->folder[0] = '\0';
        return e;
    }
    (void)snprintf(ev->data, sizeof ev->data, "%s/data", ev->folder);
    (void)snprintf(ev->jsonl, sizeof ev->jsonl, "%s/documents.jsonl", ev->folder);
    if (!cli->o.data) ev->o.data = ev->data;
    if (cli->o.out && !(ev->out = fopen(cli->o.out, "w")))
        return ibid_fail_errno(errno, "cannot write", cli->o.out);
    return IBID_OK;
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *at) {
    (void)st;
    (void)type;
    (void)at;
    return remove(path);
}

void ibidi_eval_end(ibidi_eval *ev) {
    bool was = false;
    if (ev->s.data[0] && !ev->cli->o.data) (void)ibidi_supervisor_stop(ev->s.data, &was);
    ibidi_service_close(&ev->s);
    if (ev->folder[0]) (void)nftw(ev->folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    if (ev->out) (void)fclose(ev->out);
    ev->out = NULL;
    ev->folder[0] = '\0';
}

/* ---- a model ---- */

struct wanted {
    const char *name; /* NULL: any */
    char *path, *found;
};

static ibid_err take_model(void *arg, const ibid_model_record *m) {
    struct wanted *w = arg;
    if (w->path ||
        (w->name && (strlen(w->name) != m->name.n || memcmp(w->name, m->name.s, m->name.n) != 0)))
        return IBID_OK;
    w->path = ibid_strndup(m->path.s, m->path.n);
    w->found = ibid_strndup(m->name.s, m->name.n);
    return w->path && w->found ? IBID_OK : IBID_NOMEM;
}

/* The file of the model to measure: --model FILE.gguf; or a model of the user's own data folder, by
 * its name or the first; or the default model's file there. */
static ibid_err model_file(const ibidi_eval *ev, struct wanted *w) {
    char home[4096], path[4096 + 16];
    ibid_store *store = NULL;
    ibid_snap *n = NULL;
    w->name = ev->o.model && *ev->o.model ? ev->o.model : NULL;
    if (w->name && access(w->name, R_OK) == 0)
        return (w->path = realpath(w->name, NULL)) ? IBID_OK
                                                   : ibid_fail_errno(errno, "cannot read", w->name);
    ibid_err e = ibid_host_data_dir(NULL, home);
    if (e) return e;
    (void)snprintf(path, sizeof path, "%s/" IBID_STORE_FOLDER, home);
    ibid_store_opts so = {.dir = path, .readonly = true, .map_size = ev->o.map_size};
    if (ibid_store_open(&so, &store) == IBID_OK && ibid_snap_begin(store, &n) == IBID_OK)
        e = ibid_snap_each_model(n, take_model, w);
    ibid_snap_end(n);
    ibid_store_close(store);
    for (const ibid_known_model *k = ibidi_known_models(); !e && !w->path && k->name; k++) {
        (void)snprintf(path, sizeof path, "%s/models/%s", home, k->file);
        if ((w->name && strcmp(w->name, k->name) != 0) || access(path, R_OK) != 0) continue;
        w->path = ibid_strdup(path);
        w->found = ibid_strdup(k->name);
    }
    if (!e && !w->path)
        e = ibid_fail(IBID_NOTFOUND,
                      "no model%s%s under %s; ibid model pull smollm2 first, or give --model "
                      "FILE.gguf",
                      w->name ? " " : "", w->name ? w->name : "", home);
    return e;
}

static ibid_err ensure_model(ibidi_eval *ev) {
    ibid_model_info info;
    struct wanted w = {0};
    bool file = ev->o.model && access(ev->o.model, R_OK) == 0;
    ibid_err e = IBID_NOTFOUND;
    if (!file) e = ibid_attn_model_info(ev->s.attention, ev->o.model ? ev->o.model : "", &info);
    if (e != IBID_NOTFOUND) return e;
    e = model_file(ev, &w);
    if (!e) {
        ibidi_eval_say(ev, "adding the model %s to a folder of this run's own; it is calibrated",
                       w.path);
        ibid_model_choice c = {.path = w.path, .name = w.found ? w.found : "", .kv_type = NULL};
        e = ibid_attn_model_add_as(ev->s.attention, &c, &info);
    }
    if (file) ev->o.model = NULL; /* the only one there */
    ibid_free(w.path);
    ibid_free(w.found);
    return e;
}

ibid_err ibidi_eval_serve(ibidi_eval *ev) {
    ibid_err e = ibidi_eval_go_on();
    if (!e) e = ibidi_service_open(&ev->o, true, &ev->s);
    return e ? e : ensure_model(ev);
}

/* ---- indexing ---- */

static bool state_is(const ibid_job_status *st, const char *name) {
    return st->state.n == strlen(name) && memcmp(st->state.s, name, st->state.n) == 0;
}

/* Follows the job to its end. Interrupted, the job is cancelled. */
static ibid_err follow(ibidi_eval *ev, uint64_t job) {
    uint64_t since = 0, said = 0, from = 0;
    for (;;) {
        ibid_job_status st;
        ibid_err e = ibidi_eval_go_on();
        if (e) {
            (void)ibid_idx_cancel(ev->s.indexer, job);
            return ibidi_eval_go_on();
        }
        e = ibid_idx_status(ev->s.indexer, job, from, 500, &st);
        if ((ibidi_room_away(e) || e == IBID_NOTFOUND) && ibidi_service_again(&ev->s, &since))
            continue;
        if (e) return e;
        since = 0;
        from = st.next;
        bool over = !state_is(&st, "running") && !state_is(&st, "queued") && st.n_files == 0;
        ibidi_eval_progress(ev, &said, "tokens read", st.tokens_done, st.tokens_total);
        if (over && !state_is(&st, "done"))
            e = ibid_fail(st.error ? st.error : IBID_CANCELLED, "indexing ended as %.*s: %.*s",
                          (int)st.state.n, st.state.s, (int)st.error_text.n, st.error_text.s);
        if (over && !e && st.failed + st.empty + st.unsupported)
            ibidi_eval_say(ev, "%llu documents have no text or could not be read: never found",
                           (unsigned long long)(st.failed + st.empty + st.unsupported));
        if (over && !e && st.encoded_tokens)
            ibidi_eval_say(ev, "indexed %llu documents, %llu tokens encoded (%.0f a second)",
                           (unsigned long long)(st.ready + st.partial),
                           (unsigned long long)st.encoded_tokens, st.tokens_per_s);
        ibid_job_status_close(&st);
        if (over) return e;
    }
}

ibid_err ibidi_eval_index_file(ibidi_eval *ev, const char *path) {
    ibid_str one = ibidi_str(path);
    ibid_index_request q = {.collection = ibidi_str(ev->collection),
                            .model = ibidi_str(ev->o.model),
                            .paths = &one,
                            .n_paths = 1};
    uint64_t job = 0, since = 0;
    ibid_err e;
    do e = ibid_idx_submit(ev->s.indexer, &q, &job);
    while (ibidi_room_away(e) && ibidi_service_again(&ev->s, &since));
    return e ? e : follow(ev, job);
}

/* Names the collection after the documents' content. */
static ibid_err name_collection(ibidi_eval *ev, const char *kind) {
    char block[65536], hex[65];
    ibid_hasher h;
    FILE *f = fopen(ev->jsonl, "rb");
    if (!f) return ibid_fail_errno(errno, "cannot read", ev->jsonl);
    ibid_hasher_init(&h);
    for (size_t n; (n = fread(block, 1, sizeof block, f)) > 0;) ibid_hasher_raw(&h, block, n);
    (void)fclose(f);
    ibid_hash content = ibid_hasher_final(&h);
    ibid_hash_hex(&content, hex);
    (void)snprintf(ev->collection, sizeof ev->collection, "eval-%s-%.8s", kind, hex);
    return IBID_OK;
}

ibid_err ibidi_eval_index(ibidi_eval *ev, const char *kind) {
    bool given = strcmp(ev->o.collection, "default") != 0;
    if (given && !ev->cli->o.data)
        return ibid_fail(IBID_INVAL, "--collection needs --data, the folder it lies in");
    ibid_err e = ibidi_eval_serve(ev);
    if (given) (void)snprintf(ev->collection, sizeof ev->collection, "%s", ev->o.collection);
    if (e || given) return e;
    e = name_collection(ev, kind);
    return e ? e : ibidi_eval_index_file(ev, ev->jsonl);
}

/* ---- output ---- */

json_t *ibidi_interval_json(const ibidi_interval *i) {
    return json_pack("{s:f,s:f,s:f}", "mean", i->mean, "low", i->low, "high", i->high);
}

ibid_err ibidi_eval_line(ibidi_eval *ev, json_t *j) {
    int bad = 0;
    if (ev->out)
        bad = !j || json_dumpf(j, ev->out, JSON_COMPACT | JSON_REAL_PRECISION(6)) != 0 ||
              fputc('\n', ev->out) == EOF;
    json_decref(j);
    return bad ? ibid_fail_errno(errno, "cannot write", ev->cli->o.out) : IBID_OK;
}

int ibidi_cmd_eval(ibid_cli *cli) {
    static const struct {
        const char *name;
        int (*run)(ibid_cli *);
    } kinds[] = {{"retrieval", ibidi_eval_retrieval},
                 {"qa", ibidi_eval_answers},
                 {"find", ibidi_eval_find},
                 {"long", ibidi_eval_long}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(cli->args[0], kinds[i].name) == 0) return kinds[i].run(cli);
    return ibidi_report(
        cli, ibid_fail(IBID_INVAL, "eval %s: not one of retrieval, qa, find, long", cli->args[0]));
}
