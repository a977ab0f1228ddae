/* The real kvstore, attention and indexer rooms, hosted in this process or as processes of their
 * own, over a temporary folder and a tiny random model. */
#ifndef IBID_TEST_INDEXER_ROOMS_H
#define IBID_TEST_INDEXER_ROOMS_H

#include "attention/attention.h"
#include "attention/attention_room.h"
#include "indexer/indexer.h"
#include "indexer/indexer_room.h"
#include "kvstore/kvstore_client.h"
#include "kvstore/kvstore_room.h"
#include "tests/support/gguf_write.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define assert_ok(expr)                                                                            \
    do {                                                                                           \
        ibid_err got_ = (expr);                                                                    \
        if (got_) fail_msg("%s: %s: %s", #expr, ibid_err_code(got_), ibid_err_detail());           \
    } while (0)

struct rooms {
    char dir[512], data[600], files[600], model[600];
    const char *bin; /* folder of the programs; NULL: hosted in this process */
    ibid_hosted *hosted;
    pid_t pid[3];
    ibid_client *kv, *attn, *idx;
    ibid_store *store;
};

static const char *const room_names[] = {"kvstore", "attention", "indexer"};

static inline void room_spawn(struct rooms *r, size_t which) {
    char program[700];
    (void)snprintf(program, sizeof program, "%s/ibid-%s", r->bin, room_names[which]);
    r->pid[which] = fork();
    assert_true(r->pid[which] >= 0);
    if (r->pid[which] == 0) {
        (void)execl(program, program, "--data", r->data, "--log-level", "error", "--threads", "2",
                    (char *)NULL);
        _exit(127);
    }
}

static inline void room_kill(struct rooms *r, size_t which, int sig) {
    if (r->pid[which] <= 0) return;
    (void)kill(r->pid[which], sig);
    (void)waitpid(r->pid[which], NULL, 0);
    r->pid[which] = 0;
}

static inline void room_wait(ibid_client *c) {
    for (int i = 0; i < 200; i++) {
        if (ibid_client_ping(c, 500, NULL, NULL) == IBID_OK) return;
        (void)usleep(50000);
    }
    fail_msg("a room does not answer: %s", ibid_err_detail());
}

static inline ibid_client *room_connect(struct rooms *r, const char *room) {
    char url[IBID_BUS_URL_MAX];
    ibid_client *c = NULL;
    assert_ok(ibid_bus_url(r->data, room, r->bin == NULL, url));
    assert_ok(ibid_client_open(url, &c));
    return c;
}

static inline void rooms_open(struct rooms *r, const char *bin) {
    static const ibid_room_vtable *const vtables[] = {&ibid_kvstore_room, &ibid_attention_room,
                                                      &ibid_indexer_room};
    const char *tmp = getenv("TMPDIR");
    memset(r, 0, sizeof *r);
    r->bin = bin;
    (void)snprintf(r->dir, sizeof r->dir, "%.300s/ibid-index-XXXXXX", tmp ? tmp : "/tmp");
    assert_non_null(mkdtemp(r->dir));
    (void)snprintf(r->data, sizeof r->data, "%s/data", r->dir);
    (void)snprintf(r->files, sizeof r->files, "%s/files", r->dir);
    (void)snprintf(r->model, sizeof r->model, "%s/tiny.gguf", r->dir);
    assert_int_equal(mkdir(r->data, 0700), 0);
    assert_int_equal(mkdir(r->files, 0700), 0);
    ibid_test_gguf spec = ibid_test_gguf_small();
    spec.type = IBID_Q8_0;
    spec.n_ctx = 2048;
    spec.head_dim = 32; /* q8_0 KV comes in groups of 32 */
    assert_ok(ibid_test_write_gguf(r->model, &spec));
    if (bin) {
        for (size_t i = 0; i < 3; i++) { /* in the order of their dependence */
            ibid_client *c = room_connect(r, room_names[i]);
            room_spawn(r, i);
            room_wait(c);
            ibid_client_close(c);
        }
    } else {
        ibid_host_opts o = {.log_level = IBID_LOG_ERROR, .threads = 2};
        (void)snprintf(o.data_dir, sizeof o.data_dir, "%s", r->data);
        assert_ok(ibid_host_inproc(vtables, 3, &o, &r->hosted));
    }
    r->kv = room_connect(r, "kvstore");
    r->attn = room_connect(r, "attention");
    r->idx = room_connect(r, "indexer");
    room_wait(r->kv);
    room_wait(r->attn);
    room_wait(r->idx);
    ibid_model_info info;
    assert_ok(ibid_attn_model_add(r->attn, r->model, "tiny", &info));
    char dir[700];
    (void)snprintf(dir, sizeof dir, "%s/%s", r->data, IBID_STORE_FOLDER);
    const ibid_store_opts so = {.dir = dir, .readonly = true};
    assert_ok(ibid_store_open(&so, &r->store));
}

static inline void rooms_close(struct rooms *r) {
    char cmd[600];
    ibid_store_close(r->store);
    ibid_client_close(r->idx);
    ibid_client_close(r->attn);
    ibid_client_close(r->kv);
    ibid_hosted_close(r->hosted);
    for (size_t i = 3; i > 0; i--) room_kill(r, i - 1, SIGTERM);
    (void)snprintf(cmd, sizeof cmd, "rm -rf '%s'", r->dir);
    assert_int_equal(system(cmd), 0);
}

static inline void file_put(const struct rooms *r, const char *name, const void *p, size_t n) {
    char path[900];
    (void)snprintf(path, sizeof path, "%s/%s", r->files, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(p, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static inline void file_text(const struct rooms *r, const char *name, const char *text) {
    file_put(r, name, text, strlen(text));
}

static inline ibid_str cstr(const char *s) {
    return (ibid_str){s, strlen(s)};
}

static inline bool str_is(ibid_str a, const char *b) {
    return a.n == strlen(b) && memcmp(a.s, b, a.n) == 0;
}

static inline uint64_t job_start(struct rooms *r, const char *collection, const char *path,
                                 ibid_index_request opts) {
    ibid_str p = cstr(path);
    uint64_t job = 0;
    opts.collection = cstr(collection);
    opts.paths = &p;
    opts.n_paths = 1;
    assert_ok(ibid_idx_submit(r->idx, &opts, &job));
    return job;
}

/* Waits for a job's end (or pause); fails after a while. The caller closes the status. */
static inline void job_wait(struct rooms *r, uint64_t job, ibid_job_status *s) {
    uint64_t from = 0;
    bool over = false;
    for (int i = 0; i < 1200; i++) {
        ibid_err e = ibid_idx_status(r->idx, job, over ? 0 : from, over ? 0 : 300, s);
        if (e == IBID_UNAVAIL || e == IBID_TIMEOUT) {
            (void)usleep(100000);
            continue;
        }
        if (e) fail_msg("status of job %llu: %s", (unsigned long long)job, ibid_err_detail());
        if (over) return;
        /* Once it is over, ask again for all results. */
        over = !str_is(s->state, "queued") && !str_is(s->state, "running");
        from = s->next;
        ibid_job_status_close(s);
    }
    fail_msg("job %llu does not end", (unsigned long long)job);
}

static inline void index_all(struct rooms *r, const char *collection, ibid_index_request opts,
                             ibid_job_status *s) {
    job_wait(r, job_start(r, collection, r->files, opts), s);
    if (!str_is(s->state, "done"))
        fail_msg("the job is %.*s: %.*s", (int)s->state.n, s->state.s, (int)s->error_text.n,
                 s->error_text.s);
}

/* The state of a file's document as stored: a copy of the row without its strings. NULL reason
 * buffer is fine. NOTFOUND gives state 0. */
static inline ibid_document stored(struct rooms *r, const char *collection, const char *name,
                                   char reason[256]) {
    char id[900];
    ibid_snap *n = NULL;
    ibid_document d = {0};
    if (name[0] == '=')
        (void)snprintf(id, sizeof id, "%s", name + 1);
    else
        (void)snprintf(id, sizeof id, "%s/%s", r->files, name);
    assert_ok(ibid_snap_begin(r->store, &n));
    ibid_err e = ibid_snap_document(n, cstr(collection), cstr(id), &d);
    if (e) {
        memset(&d, 0, sizeof d);
        assert_true(e == IBID_NOTFOUND || e == IBID_NOCOLLECTION);
    } else if (reason) {
        (void)snprintf(reason, 256, "%.*s", (int)d.reason.n, d.reason.s);
    }
    ibid_snap_end(n);
    d.collection = d.id = d.title = d.source = d.metadata = d.reason = (ibid_str){"", 0};
    return d;
}

static inline void verify_clean(struct rooms *r) {
    ibid_buf faults;
    uint64_t n = 0;
    ibid_buf_init(&faults, 1 << 20);
    assert_ok(ibid_kvc_verify(r->kv, &faults, &n));
    if (n) fail_msg("the store has %llu faults: %s", (unsigned long long)n, faults.data);
    ibid_buf_fini(&faults);
}

/* Prose from a seed: paragraphs of sentences, about 9 bytes a token with the tiny vocabulary's
 * bytes. */
static inline void prose(ibid_buf *b, uint64_t seed, size_t bytes) {
    static const char *const words[] = {"river",  "stone",  "light", "the",    "of",    "a",
                                        "engine", "garden", "and",   "slow",   "year",  "letter",
                                        "found",  "winter", "to",    "copper", "under", "bridge"};
    size_t from = b->len;
    while (b->len - from < bytes) {
        for (int s = 0; s < 4; s++) {
            for (int w = 0; w < 9; w++) {
                seed = seed * 6364136223846793005u + 1442695040888963407u;
                assert_ok(ibid_buf_printf(b, "%s%s", w ? " " : "The ", words[(seed >> 33) % 18]));
            }
            assert_ok(ibid_buf_puts(b, s < 3 ? ". " : ".\n\n"));
        }
    }
}
#endif
