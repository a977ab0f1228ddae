/* Time to the first token over stored blocks, through the attention room on a real store, with
 * nothing of it in memory, all of it in the page cache, and asked before: one JSON line each.
 *
 * usage: bench_stored MODEL.gguf TEXT FOLDER [TOKENS [RUNS]]
 *
 * Blocks of 200 tokens are cut from TEXT and kept in a store made in FOLDER (removed at the end):
 * that file system's disk is measured. "cold disk" and "page cache" open the rooms anew each time;
 * for "cold disk" the file is then taken out of the page cache, and missing_bytes, from mincore,
 * says how much of the blocks' KV was really gone. */
#include "attention/attention_internal.h"
#include "kvstore/kvstore_room.h"
#include "rpc/base/clock.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 200, BLOCKS_MAX = 256, LAYERS_MAX = 256, RUNS_MAX = 99 };

static void check(ibid_err e) {
    if (!e) return;
    (void)fprintf(stderr, "bench_stored: %s: %s\n", ibid_err_code(e), ibid_err_detail());
    exit(2);
}

typedef struct bench {
    char data[1024];
    ibid_host_opts o;
    ibid_hosted *hosted;
    ibidi_room *room;
    ibidi_loaded *m;
    ibid_client *kv, *at;
    ibid_model_info model;
    uint64_t blocks[BLOCKS_MAX], document;
    size_t n;
} bench;

static void start(bench *b) {
    static const ibid_room_vtable *const rooms[] = {&ibid_kvstore_room};
    char url[IBID_BUS_URL_MAX];
    void *room;
    b->o = (ibid_host_opts){.log_level = IBID_LOG_ERROR, .inproc = true};
    (void)snprintf(b->o.data_dir, sizeof b->o.data_dir, "%s", b->data);
    check(ibid_host_inproc(rooms, 1, &b->o, &b->hosted));
    check(ibid_attention_room.open(&b->o, &room));
    b->room = room;
    check(ibid_bus_url(b->data, "kvstore", true, url));
    check(ibid_client_open(url, &b->kv));
    check(ibid_bus_url(b->data, "attention", true, url));
    check(ibid_client_open(url, &b->at));
    if (b->n) check(ibidi_model_get(b->room, &b->model.fingerprint, &b->m));
}

static void stop(bench *b) {
    ibid_client_close(b->kv);
    ibid_client_close(b->at);
    ibid_attention_room.close(b->room);
    ibid_hosted_close(b->hosted);
}

static char *read_text(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    char *s = malloc(1 << 20);
    if (!f || !s) check(ibid_fail(IBID_IO, "%s cannot be read", path));
    *n = fread(s, 1, 1 << 20, f);
    (void)fclose(f);
    return s;
}

static void fill(bench *b, const char *path, size_t tokens) {
    size_t n;
    char *text = read_text(path, &n);
    ibid_tokens t;
    ibid_encode_block blocks[BLOCKS_MAX];
    ibid_chunk chunks[BLOCKS_MAX];
    uint64_t job = 0, generation;
    ibid_job j = {.kind = {"index", 5}, .state = {"running", 7}};
    check(ibid_attn_tokenize(b->at, &b->model.fingerprint, (ibid_str){text, n}, &t));
    b->n = tokens / BLOCK;
    if (b->n == 0 || b->n > BLOCKS_MAX || b->n * BLOCK > t.n)
        check(ibid_fail(IBID_INVAL, "%zu tokens, of a text of %zu", tokens, t.n));
    for (size_t i = 0; i < b->n; i++) {
        blocks[i] = (ibid_encode_block){0, BLOCK, t.ids + i * BLOCK};
        chunks[i] = (ibid_chunk){.start = i ? t.ends[i * BLOCK - 1] : 0,
                                 .end = t.ends[(i + 1) * BLOCK - 1],
                                 .locator = {"", 0}};
    }
    check(ibid_kvc_job_put(b->kv, &j, &job));
    check(ibid_attn_encode(b->at, &b->model.fingerprint, job, blocks, b->n, b->blocks, NULL));
    for (size_t i = 0; i < b->n; i++) chunks[i].block = b->blocks[i];
    check(ibid_kvc_collection_create(b->kv, (ibid_str){"c", 1}, &b->model.fingerprint));
    ibid_document_put p = {.collection = {"c", 1},
                           .id = {"d", 1},
                           .state = IBID_DOC_READY,
                           .text = {text, t.ends[b->n * BLOCK - 1]},
                           .chunks = chunks,
                           .n_chunks = b->n,
                           .job = job};
    check(ibid_kvc_document_put(b->kv, &p, &b->document, &generation));
    ibid_free(t.ids);
    free(text);
}

/* What of the blocks' KV is not in memory; drop: after what can go was sent away. */
static uint64_t missing(bench *b, bool drop) {
    char path[1200];
    ibid_snap *snap = NULL;
    ibid_kv_place at[LAYERS_MAX];
    const ibid_chunk *chunks;
    size_t n_chunks, n_layers = b->m->model->n_layers;
    uint64_t bytes = 0;
    check(ibid_snap_begin(b->room->store, &snap));
    check(ibid_snap_chunks(snap, b->document, &chunks, &n_chunks)); /* rows, not values */
    for (int pass = drop ? 0 : 1; pass < 2; pass++) {
        for (size_t i = 0; i < b->n; i++) {
            ibid_block rec;
            check(ibid_snap_block(snap, b->blocks[i], &rec));
            check(ibid_snap_kv_places(snap, b->blocks[i], n_layers, at));
            for (size_t l = 0; pass && l < n_layers; l++) bytes += ibid_kv_place_missing(&at[l]);
        }
        if (pass) break;
        (void)snprintf(path, sizeof path, "%s/" IBID_STORE_FOLDER "/data.mdb", b->data);
        int fd = open(path, O_RDWR);
        if (fd < 0 || fsync(fd) != 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0)
            check(ibid_fail(IBID_IO, "%s cannot be taken out of the page cache", path));
        (void)close(fd);
    }
    ibid_snap_end(snap);
    return bytes;
}

static bool on_event(void *arg, const ibid_answer_event *ev) {
    if (ev->kind == IBID_ANSWER_DONE) *(ibid_answer_event *)arg = *ev;
    return true;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(bench *b, const char *how, size_t runs) {
    bool cold = how[0] == 'c', anew = how[0] != 'w';
    double ms[RUNS_MAX], wait[RUNS_MAX];
    uint64_t gone = 0;
    ibid_answer_event ev = {0};
    ibid_answer_block blocks[BLOCKS_MAX];
    for (size_t i = 0; i < b->n; i++)
        blocks[i] = (ibid_answer_block){b->document, i, b->blocks[i], 1 - 1e-3 * (double)i};
    ibid_answer_request q = {
        .model = b->model.fingerprint,
        .question = {"What does the keeper write about the lamp and the sea?", 54},
        .blocks = blocks,
        .n_blocks = b->n,
        .max_tokens = 1};
    for (size_t i = 0; i < runs; i++) {
        if (anew) {
            stop(b);
            start(b);
        }
        gone = missing(b, cold);
        check(ibid_attn_answer(b->at, &q, on_event, &ev));
        ms[i] = ev.first_token_ms;
        wait[i] = ev.kv_wait_ms;
    }
    qsort(ms, runs, sizeof *ms, by_size);
    qsort(wait, runs, sizeof *wait, by_size);
    printf("{\"case\": \"stored\", \"how\": \"%s\", \"tokens\": %zu, \"first_token_ms\": %.1f, "
           "\"min_ms\": %.1f, \"wait_ms\": %.1f, \"kv_bytes\": %llu, \"missing_bytes\": %llu, "
           "\"encoded_tokens\": %llu, \"encoded_why\": \"%s\", \"disk_mb_per_s\": %.0f, "
           "\"encode_tokens_per_s\": %.0f}\n",
           how, b->n * BLOCK, ms[runs / 2], ms[0], wait[runs / 2],
           (unsigned long long)ev.kv_bytes_read, (unsigned long long)gone,
           (unsigned long long)ev.encoded_tokens, ev.encoded_why,
           atomic_load(&b->m->meter.bytes_per_s) / 1e6, atomic_load(&b->m->meter.tokens_per_s));
    (void)fflush(stdout);
}

int main(int argc, char **argv) {
    static bench b;
    char command[1200];
    if (argc < 4) {
        (void)fprintf(stderr, "usage: %s MODEL.gguf TEXT FOLDER [TOKENS [RUNS]]\n", argv[0]);
        return 2;
    }
    size_t tokens = argc > 4 ? strtoul(argv[4], NULL, 10) : 2000;
    size_t runs = argc > 5 ? strtoul(argv[5], NULL, 10) : 5;
    if (runs == 0 || runs > RUNS_MAX) runs = 5;
    (void)snprintf(b.data, sizeof b.data, "%s/bench-XXXXXX", argv[3]);
    if (!mkdtemp(b.data)) check(ibid_fail(IBID_IO, "no folder in %s", argv[3]));
    start(&b);
    check(ibid_attn_model_add(b.at, argv[1], "", &b.model));
    fill(&b, argv[2], tokens);
    check(ibidi_model_get(b.room, &b.model.fingerprint, &b.m));
    measure(&b, "cold disk", runs);
    measure(&b, "page cache", runs);
    measure(&b, "warm", runs);
    stop(&b);
    (void)snprintf(command, sizeof command, "rm -rf '%s'", b.data);
    return system(command) == 0 ? 0 : 2;
}
