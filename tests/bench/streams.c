/* Answers at the same time, through the plans and the scheduler as the room runs them, without
 * stores and messages: tokens per second of all together, once every one of them decodes.
 *
 *   bench_streams MODEL.gguf [--context 2000] [--tokens 64] [--runs 5] [--temperature 0]
 *                 [--threads N] [--int8 0|1] [--cache DIR]
 *
 * One line of JSON for 1, 2, 4 and 8 streams each: the best and the median of the runs, which take
 * turns so that a busy machine troubles all alike. Each stream has KV of its own. user_ms: the
 * process's time on all cores per token, in the best run; ratio: best to the best of one stream. */
#include "attention/plan/answer.h"
#include "attention/plan/prompt.h"
#include "rpc/base/clock.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

enum { BLOCK = 200, BLOCKS_MAX = 64, STREAMS_MAX = 8, RUNS_MAX = 99, CASES = 4 };
static const size_t streams_of[CASES] = {1, 2, 4, 8};

typedef struct options {
    const char *model;
    size_t context, tokens;
    int n_runs;
    double temperature;
    ibid_engine_opts engine;
} options;

typedef struct bench {
    options o;
    ibid_model *m;
    ibid_engine *e;
    ibid_sched sched;
    ibid_kv_blob prefix_kv;
    ibid_reader r;
    int32_t tokens[BLOCKS_MAX][BLOCK];
    size_t n_blocks;
    uint64_t seed;
    ibid_kv_blob kv[STREAMS_MAX][BLOCKS_MAX];
    ibid_ids question;
} bench;

/* One measurement: from the moment all streams decode until the first has ended. */
typedef struct window {
    pthread_mutex_t lock;
    size_t n_streams, decoding, tokens;
    bool closed;
    uint64_t start, end;
    double user_start, user_end;
} window;

typedef struct stream {
    bench *b;
    window *w;
    size_t number, ticks;
} stream;

static void check(ibid_err e) {
    if (!e) return;
    (void)fprintf(stderr, "bench_streams: %s: %s\n", ibid_err_text(e), ibid_err_detail());
    exit(2);
}

static double user_ms(void) {
    struct rusage u;
    (void)getrusage(RUSAGE_SELF, &u);
    return (double)u.ru_utime.tv_sec * 1e3 + (double)u.ru_utime.tv_usec / 1e3;
}

static void close_window(window *w) {
    if (w->closed) return;
    w->closed = true;
    w->end = ibid_now_ns();
    w->user_end = user_ms();
}

/* The second tick of the last stream opens the window: by then nothing is new to any cache. */
static ibid_err tick(void *arg) {
    stream *s = arg;
    window *w = s->w;
    (void)pthread_mutex_lock(&w->lock);
    if (w->decoding == w->n_streams && !w->closed) w->tokens++;
    if (++s->ticks == 2 && ++w->decoding == w->n_streams) {
        w->start = ibid_now_ns();
        w->user_start = user_ms();
    }
    /* The rest only keeps the others company until all have come. */
    if (w->decoding == w->n_streams && w->tokens >= s->b->o.tokens * w->n_streams) close_window(w);
    bool over = w->closed;
    (void)pthread_mutex_unlock(&w->lock);
    return over ? ibid_fail(IBID_CANCELLED, "measured") : IBID_OK;
}

static void *run_stream(void *arg) {
    stream *s = arg;
    bench *b = s->b;
    ibid_placed_block placed[BLOCKS_MAX];
    ibid_answered out;
    for (size_t i = 0; i < b->n_blocks; i++)
        placed[i] =
            (ibid_placed_block){b->kv[s->number][i].layers, b->tokens[i], b->r.n_prefix, i * BLOCK, 0};
    ibid_answer_plan p = {.blocks = placed,
                          .n_blocks = b->n_blocks,
                          .question = b->question.ids,
                          .n_question = b->question.n,
                          .max_tokens = b->o.tokens * 3 + 256,
                          .temperature = b->o.temperature,
                          .top_p = 0.9,
                          .seed = b->seed + s->number,
                          .tick = tick,
                          .arg = s};
    ibid_sched_question_begin(&b->sched);
    ibid_err e = ibid_answer_run(&b->r, &p, &out);
    ibid_sched_question_end(&b->sched);
    if (e != IBID_CANCELLED) check(e);
    (void)pthread_mutex_lock(&s->w->lock);
    close_window(s->w);
    (void)pthread_mutex_unlock(&s->w->lock);
    ibid_buf_fini(&out.text);
    return NULL;
}

static window measure(bench *b, size_t n) {
    pthread_t t[STREAMS_MAX];
    stream s[STREAMS_MAX];
    window w = {.n_streams = n};
    (void)pthread_mutex_init(&w.lock, NULL);
    for (size_t i = 0; i < n; i++) {
        s[i] = (stream){.b = b, .w = &w, .number = i};
        if (pthread_create(&t[i], NULL, run_stream, &s[i]) != 0)
            check(ibid_fail(IBID_NOMEM, "no thread"));
    }
    for (size_t i = 0; i < n; i++) (void)pthread_join(t[i], NULL);
    (void)pthread_mutex_destroy(&w.lock);
    return w;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void run_all(bench *b) {
    static double rate[CASES][RUNS_MAX], user[CASES], best[CASES];
    uint64_t batches[CASES] = {0}, decoded[CASES] = {0}, late[CASES] = {0};
    for (int r = 0; r < b->o.n_runs; r++) {
        for (size_t c = 0; c < CASES; c++) {
            uint64_t was[] = {b->sched.batches, b->sched.decoded, b->sched.late};
            window w = measure(b, streams_of[c]);
            for (int again = 0; w.tokens < 8 * streams_of[c]; again++) { /* an answer ended early */
                if (again == 20) check(ibid_fail(IBID_INVAL, "all answers are too short"));
                b->seed += STREAMS_MAX;
                w = measure(b, streams_of[c]);
            }
            rate[c][r] = 1e9 * (double)w.tokens / (double)(w.end - w.start);
            batches[c] += b->sched.batches - was[0];
            decoded[c] += b->sched.decoded - was[1];
            late[c] += b->sched.late - was[2];
            if (rate[c][r] <= best[c]) continue;
            best[c] = rate[c][r];
            user[c] = (w.user_end - w.user_start) / (double)w.tokens;
        }
    }
    for (size_t c = 0; c < CASES; c++) {
        qsort(rate[c], (size_t)b->o.n_runs, sizeof(double), by_value);
        printf("{\"case\":\"answers\",\"streams\":%zu,\"context\":%zu,\"temperature\":%g,"
               "\"tokens_per_s\":%.1f,\"median\":%.1f,\"ratio\":%.2f,\"user_ms\":%.2f,"
               "\"rows_per_batch\":%.2f,\"late\":%llu,\"runs\":%d}\n",
               streams_of[c], b->n_blocks * BLOCK, b->o.temperature, best[c],
               rate[c][b->o.n_runs / 2], best[c] / best[0], user[c],
               (double)decoded[c] / (double)batches[c], (unsigned long long)late[c], b->o.n_runs);
    }
}

/* ---- Opening ---- */

static void open_blocks(bench *b) {
    ibid_reading t[BLOCKS_MAX] = {{0}};
    size_t done = 0, n = b->n_blocks;
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < BLOCK; k++) /* past the control tokens */
            b->tokens[i][k] = (int32_t)(64 + (i * BLOCK + k) * 7919 % (b->m->n_vocab - 64));
        t[i] = (ibid_reading){.tokens = b->tokens[i], .n = BLOCK};
    }
    while (done < n) check(ibid_read_some(&b->r, t, n, &done, true, NULL, NULL));
    for (size_t i = 0; i < n; i++) {
        b->kv[0][i] = t[i].kv;
        for (size_t s = 1; s < STREAMS_MAX; s++)
            check(ibid_kv_blob_copy(t[i].kv.layers, b->m->n_layers, &b->kv[s][i]));
    }
}

static void open_bench(bench *b) {
    static const char text[] = "Go on with this list, and do not stop.";
    ibid_ids prefix;
    check(ibid_model_open(b->o.model, NULL, &b->m));
    check(ibid_engine_open(b->m, &b->o.engine, &b->e));
    ibid_sched_init(&b->sched);
    check(ibid_prompt_prefix(b->m, &ibid_wording_default, &prefix));
    check(
        ibid_read_prefix(b->m, b->e, &b->sched, prefix.ids, prefix.n, IBID_KV_Q8_0, &b->prefix_kv));
    b->r = (ibid_reader){.model = b->m,
                         .engine = b->e,
                         .sched = &b->sched,
                         .kv_type = IBID_KV_Q8_0,
                         .prefix = {.layers = b->prefix_kv.layers},
                         .n_prefix = prefix.n};
    ibid_free(prefix.ids);
    check(ibid_prompt_question(b->m, &ibid_wording_default, (ibid_str){text, sizeof text - 1},
                               &b->question));
    open_blocks(b);
}

static void close_bench(bench *b) {
    for (size_t s = 0; s < STREAMS_MAX; s++)
        for (size_t i = 0; i < b->n_blocks; i++) ibid_kv_blob_fini(&b->kv[s][i]);
    ibid_kv_blob_fini(&b->prefix_kv);
    ibid_free(b->question.ids);
    ibid_sched_fini(&b->sched);
    ibid_engine_close(b->e);
    ibid_model_close(b->m);
}

static bool read_option(options *o, const char *name, const char *value) {
    if (strcmp(name, "--context") == 0)
        o->context = strtoul(value, NULL, 10);
    else if (strcmp(name, "--tokens") == 0)
        o->tokens = strtoul(value, NULL, 10);
    else if (strcmp(name, "--runs") == 0)
        o->n_runs = (int)strtol(value, NULL, 10);
    else if (strcmp(name, "--temperature") == 0)
        o->temperature = strtod(value, NULL);
    else if (strcmp(name, "--threads") == 0)
        o->engine.n_threads = strtoul(value, NULL, 10);
    else if (strcmp(name, "--int8") == 0)
        o->engine.int8 = strcmp(value, "1") == 0;
    else if (strcmp(name, "--cache") == 0)
        o->engine.cache = value;
    else
        return false;
    return true;
}

static bool read_options(options *o, int argc, char **argv) {
    *o = (options){.context = 2000, .tokens = 64, .n_runs = 5, .engine = {.int8 = true}};
    if (argc < 2 || argc % 2) return false;
    o->model = argv[1];
    for (int i = 2; i < argc; i += 2)
        if (!read_option(o, argv[i], argv[i + 1])) return false;
    return o->n_runs >= 1 && o->n_runs <= RUNS_MAX && o->tokens >= 8 && o->tokens <= 1024 &&
           o->context >= BLOCK && o->context <= (size_t)BLOCK * BLOCKS_MAX;
}

int main(int argc, char **argv) {
    static bench b;
    if (!read_options(&b.o, argc, argv)) {
        (void)fprintf(stderr, "usage: bench_streams MODEL.gguf [--context 2000] [--tokens 64] "
                              "[--runs 5] [--temperature 0]\n  [--threads N] [--int8 0|1] "
                              "[--cache DIR]\n");
        return 2;
    }
    b.n_blocks = b.o.context / BLOCK;
    open_bench(&b);
    run_all(&b);
    close_bench(&b);
    return 0;
}
