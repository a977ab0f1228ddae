#include "attention/attention.h"
#include "indexer/indexer.h"
#include "rpc/front/commands.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig) {
    (void)sig;
    interrupted = 1;
}

static json_t *status_json(const ibid_job_status *st, json_t *files) {
    return json_pack("{s:I,s:o,s:o,s:o,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:f,s:f,s:{"
                     "s:I,s:I,s:I,s:f},"
                     "s:o}",
                     "job", (json_int_t)st->id, "state", ibidi_json_str(st->state), "stage",
                     ibidi_json_str(st->stage), "collection", ibidi_json_str(st->collection),
                     "files_total", (json_int_t)st->files_total, "files_done",
                     (json_int_t)st->files_done, "documents", (json_int_t)st->documents, "ready",
                     (json_int_t)st->ready, "partial", (json_int_t)st->partial, "empty",
                     (json_int_t)st->empty, "unsupported", (json_int_t)st->unsupported, "failed",
                     (json_int_t)st->failed, "unchanged", (json_int_t)st->unchanged, "removed",
                     (json_int_t)st->removed, "encoded_tokens", (json_int_t)st->encoded_tokens,
                     "reused_tokens", (json_int_t)st->reused_tokens, "tokens_per_s",
                     st->tokens_per_s, "seconds_left", st->seconds_left, "forecast", "tokens",
                     (json_int_t)st->forecast_tokens, "bytes", (json_int_t)st->forecast_bytes,
                     "free_bytes", (json_int_t)st->free_bytes, "seconds", st->forecast_s, "files",
                     files ? files : json_array());
}

static json_t *file_json(const ibid_file_result *f) {
    return json_pack("{s:o,s:o,s:o,s:o,s:I,s:I,s:I}", "path", ibidi_json_str(f->path), "document",
                     ibidi_json_str(f->id), "state", ibidi_json_str(f->state), "reason",
                     ibidi_json_str(f->reason), "chunks", (json_int_t)f->chunks, "encoded_tokens",
                     (json_int_t)f->encoded_tokens, "reused_tokens", (json_int_t)f->reused_tokens);
}

static void progress_line(const ibid_job_status *st, bool terminal) {
    char left[32] = "", line[256];
    if (st->seconds_left >= 0) (void)ibidi_seconds(st->seconds_left, left);
    int n = snprintf(
        line, sizeof line, "%.*s  %llu/%llu files  %llu/%llu tokens  %.0f tokens/s%s%s",
        (int)st->stage.n, st->stage.s, (unsigned long long)st->files_done,
        (unsigned long long)st->files_total, (unsigned long long)st->tokens_done,
        (unsigned long long)st->tokens_total, st->tokens_per_s, *left ? "  left " : "", left);
    (void)n;
    (void)fprintf(stderr, terminal ? "\r\033[K%s" : "%s\n", line);
}

static void print_file(const ibid_file_result *f) {
    if (f->state.n == 9 && memcmp(f->state.s, "unchanged", 9) == 0) return;
    printf("%-11.*s %.*s", (int)f->state.n, f->state.s, (int)f->path.n, f->path.s);
    if (f->id.n && (f->id.n != f->path.n || memcmp(f->id.s, f->path.s, f->id.n) != 0))
        printf(" [%.*s]", (int)f->id.n, f->id.s);
    if (f->reason.n)
        printf("%s: %.*s%s", ibidi_dim(), (int)f->reason.n, f->reason.s, ibidi_plain());
    putchar('\n');
}

static bool state_is(const ibid_job_status *st, const char *name) {
    return st->state.n == strlen(name) && memcmp(st->state.s, name, st->state.n) == 0;
}

/* What went wrong with the job itself, for stderr; nothing for one that is done. */
static void print_ending(const ibid_job_status *st) {
    if (state_is(st, "paused"))
        (void)fprintf(stderr, "ibid: job %llu is paused; ibid index --resume finishes it\n",
                      (unsigned long long)st->id);
    else if (!state_is(st, "done"))
        (void)fprintf(stderr, "ibid: %s: job %llu ended as %.*s: %.*s\n", ibid_err_code(st->error),
                      (unsigned long long)st->id, (int)st->state.n, st->state.s,
                      (int)st->error_text.n, st->error_text.s);
}

static int finish(const ibid_cli *cli, const ibid_job_status *st, json_t *files) {
    uint64_t good = st->ready + st->partial + st->unchanged + st->removed;
    int status = state_is(st, "done") ? (good || cli->o.dry_run ? 0 : st->failed ? 2 : 1) : 2;
    print_ending(st);
    if (cli->o.json) {
        json_t *j = status_json(st, files);
        if (st->error)
            (void)json_object_set_new(j, "error",
                                      json_pack("{s:s,s:o}", "code", ibid_err_code(st->error),
                                                "message", ibidi_json_str(st->error_text)));
        int wrote = ibidi_json_print(j);
        return wrote ? wrote : status;
    }
    char a[32], b[32];
    if (cli->o.dry_run)
        printf("forecast: %llu tokens, %s of KV, about %s\n",
               (unsigned long long)st->forecast_tokens, ibidi_bytes(st->forecast_bytes, a),
               ibidi_seconds(st->forecast_s, b));
    else
        printf("%s%llu ready%s, %llu unchanged, %llu partial, %llu empty, %llu unsupported, %llu "
               "failed, %llu removed; %llu tokens encoded (%.0f/s), %llu reused\n",
               ibidi_bold(), (unsigned long long)st->ready, ibidi_plain(),
               (unsigned long long)st->unchanged, (unsigned long long)st->partial,
               (unsigned long long)st->empty, (unsigned long long)st->unsupported,
               (unsigned long long)st->failed, (unsigned long long)st->removed,
               (unsigned long long)st->encoded_tokens, st->tokens_per_s,
               (unsigned long long)st->reused_tokens);
    return status;
}

/* Follows a job to its end (or its pause), printing results as they come. */
static int follow(ibid_cli *cli, ibid_service *s, uint64_t job) {
    bool terminal = isatty(STDERR_FILENO), paused = false;
    json_t *files = cli->o.json ? json_array() : NULL;
    uint64_t from = 0, since = 0;
    unsigned ticks = 0;
    for (;;) {
        ibid_job_status st;
        if (interrupted && !paused) paused = ibid_idx_pause(s->indexer, job) == IBID_OK;
        ibid_err e = ibid_idx_status(s->indexer, job, from, 500, &st);
        /* NOTFOUND too: its row was there, so an indexer just started has not got its store yet. */
        if ((ibidi_room_away(e) || e == IBID_NOTFOUND) && ibidi_service_again(s, &since)) continue;
        if (e) {
            json_decref(files);
            return ibidi_report(cli, e);
        }
        since = 0;
        if (terminal && !cli->o.json) (void)fputs("\r\033[K", stderr);
        for (size_t i = 0; i < st.n_files; i++) {
            if (files)
                (void)json_array_append_new(files, file_json(&st.files[i]));
            else
                print_file(&st.files[i]);
        }
        from = st.next;
        bool over = !state_is(&st, "running") && !state_is(&st, "queued");
        if (over && st.n_files == 0) {
            int status = finish(cli, &st, files);
            ibid_job_status_close(&st);
            return status;
        }
        if (!over && (terminal || ticks++ % 10 == 9)) progress_line(&st, terminal);
        bool idle = st.n_files == 0;
        ibid_job_status_close(&st);
        if (idle) (void)poll(NULL, 0, 10); /* a job not yet resumed is answered at once */
    }
}

/* Canonical paths of what is to be indexed; every one must exist, or its documents must be
 * prunable. */
static ibid_err canonical_paths(const ibid_cli *cli, char **real, ibid_str *paths) {
    for (size_t i = 0; i < cli->n_args; i++) {
        real[i] = realpath(cli->args[i], NULL);
        if (!real[i]) return ibid_fail_errno(errno, "cannot index", cli->args[i]);
        paths[i] = ibidi_str(real[i]);
    }
    return IBID_OK;
}

static ibid_err submit(const ibid_cli *cli, ibid_service *s, uint64_t *job) {
    enum { MAX = 256 };
    char *real[MAX] = {0};
    ibid_str paths[MAX];
    if (cli->n_args > MAX) return ibid_fail(IBID_TOOBIG, "at most %d paths at a time", MAX);
    ibid_err e = canonical_paths(cli, real, paths);
    ibid_index_request q = {.collection = ibidi_str(cli->o.collection),
                            .model = ibidi_str(cli->o.model),
                            .paths = paths,
                            .n_paths = cli->n_args,
                            .prune = cli->o.prune,
                            .force = cli->o.force,
                            .dry_run = cli->o.dry_run};
    /* Submitting twice is harmless: what the first job did is unchanged for the second. */
    uint64_t since = 0;
    while (!e) {
        e = ibid_idx_submit(s->indexer, &q, job);
        if (!ibidi_room_away(e) || !ibidi_service_again(s, &since)) break;
        e = IBID_OK;
    }
    for (size_t i = 0; i < cli->n_args; i++) free(real[i]);
    return e;
}

static ibid_err last_unfinished(void *arg, const ibid_job *j) {
    ibid_str st = j->state;
    bool over = (st.n == 4 && memcmp(st.s, "done", 4) == 0) ||
                (st.n == 9 && memcmp(st.s, "cancelled", 9) == 0) ||
                (st.n == 6 && memcmp(st.s, "failed", 6) == 0);
    if (!over) *(uint64_t *)arg = j->id;
    return IBID_OK;
}

/* Puts every unfinished job to work; *job = the newest of them, 0 if there is none. */
static ibid_err resume(ibid_service *s, uint64_t *job) {
    uint64_t n = 0;
    ibid_snap *snap = NULL;
    ibid_err e = ibidi_service_store(s);
    if (!e) e = ibid_snap_begin(s->store, &snap);
    if (!e) e = ibid_snap_each_job(snap, last_unfinished, job);
    ibid_snap_end(snap);
    uint64_t since = 0;
    while (!e) {
        e = ibid_idx_resume(s->indexer, 0, &n);
        if (!ibidi_room_away(e) || !ibidi_service_again(s, &since)) break;
        e = IBID_OK;
    }
    return e;
}

int ibidi_cmd_index(ibid_cli *cli) {
    ibid_service s = {0};
    uint64_t job = 0;
    ibid_err e = IBID_OK;
    if (cli->n_args == 0 && !cli->o.resume)
        e = ibid_fail(IBID_INVAL, "index needs PATH..., or --resume; see ibid index --help");
    if (!e) e = ibidi_service_open(&cli->o, true, &s);
    struct sigaction act = {.sa_handler = on_interrupt};
    (void)sigaction(SIGINT, &act, NULL);
    (void)sigaction(SIGTERM, &act, NULL);
    if (!e && cli->o.resume) e = resume(&s, &job);
    if (!e && cli->n_args > 0) e = submit(cli, &s, &job);
    int status;
    if (e) {
        status = ibidi_report(cli, e);
    } else if (job == 0) {
        status = cli->o.json ? ibidi_json_print(json_pack("{s:n}", "job"))
                             : (printf("no job is unfinished\n"), 0);
    } else if (cli->o.detach) {
        status = cli->o.json ? ibidi_json_print(json_pack("{s:I}", "job", (json_int_t)job))
                             : (printf("job %llu\n", (unsigned long long)job), 0);
    } else {
        status = follow(cli, &s, job);
    }
    ibidi_service_close(&s);
    return status;
}

/* ---- jobs ---- */

static ibid_err list_job(void *arg, const ibid_job *j) {
    return json_array_append_new(
               arg,
               json_pack("{s:I,s:o,s:o,s:o,s:o,s:s,s:o,s:I,s:I}", "id", (json_int_t)j->id, "kind",
                         ibidi_json_str(j->kind), "collection", ibidi_json_str(j->collection),
                         "state", ibidi_json_str(j->state), "stage", ibidi_json_str(j->stage),
                         "code", ibid_err_code(j->error), "error", ibidi_json_str(j->error_text),
                         "created_ms", (json_int_t)j->created_ms, "updated_ms",
                         (json_int_t)j->updated_ms)) == 0
               ? IBID_OK
               : IBID_NOMEM;
}

static ibid_err job_number(const char *text, uint64_t *out) {
    char *end = NULL;
    errno = 0;
    *out = strtoull(text, &end, 10);
    if (errno || end == text || *end || *text == '-' || *out == 0)
        return ibid_fail(IBID_INVAL, "\"%s\" is not a job's number; ibid jobs lists them", text);
    return IBID_OK;
}

static ibid_err steer(const ibid_cli *cli, ibid_service *s) {
    uint64_t job = 0, n = 0;
    ibid_err e = IBID_OK;
    if (cli->o.pause_job && !(e = job_number(cli->o.pause_job, &job)))
        e = ibid_idx_pause(s->indexer, job);
    if (!e && cli->o.resume_job && !(e = job_number(cli->o.resume_job, &job)))
        e = ibid_idx_resume(s->indexer, job, &n);
    if (!e && cli->o.cancel_job && !(e = job_number(cli->o.cancel_job, &job)))
        e = ibid_idx_cancel(s->indexer, job);
    return e;
}

int ibidi_cmd_jobs(ibid_cli *cli) {
    ibid_service s;
    ibid_snap *n = NULL;
    bool steering = cli->o.pause_job || cli->o.resume_job || cli->o.cancel_job;
    json_t *jobs = json_array();
    ibid_err e = ibidi_service_open(&cli->o, steering, &s);
    if (!e && steering) e = steer(cli, &s);
    if (!e) e = ibidi_service_store(&s);
    if (!e) e = ibid_snap_begin(s.store, &n);
    if (!e) e = ibid_snap_each_job(n, list_job, jobs);
    ibid_snap_end(n);
    int status = json_array_size(jobs) ? 0 : 1;
    if (e) {
        status = ibidi_report(cli, e);
    } else if (cli->o.json) {
        int wrote = ibidi_json_print(json_pack("{s:O}", "jobs", jobs));
        status = wrote ? wrote : status;
    } else {
        size_t i;
        json_t *j;
        json_array_foreach(jobs, i, j)
            printf("%-5lld %-8s %-10s %-9s %-20s %s\n",
                   (long long)json_integer_value(json_object_get(j, "id")),
                   json_string_value(json_object_get(j, "kind")),
                   json_string_value(json_object_get(j, "state")),
                   json_string_value(json_object_get(j, "stage")),
                   json_string_value(json_object_get(j, "collection")),
                   json_string_value(json_object_get(j, "error")));
    }
    json_decref(jobs);
    ibidi_service_close(&s);
    return status;
}
