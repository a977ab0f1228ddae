/* What the store costs: blocks_put with fsync, directly and over ipc, snapshots, look-ups. Values
 * have the default model's shape (30 layers, 3 heads of 64, q8_0, 256 tokens: 3 MB of KV a block).
 * Usage: bench_kvstore FOLDER [IBID_KVSTORE]. The folder is made and stays. */
#include "support.h"

#include "kvstore/kvstore_client.h"
#include "rpc/base/clock.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LAYERS = 30, HEADS = 3, DIM = 64, TOKENS = 256, BLOCKS = 96, BATCH = 8 };

static void *values[LAYERS];
static int32_t tokens[BLOCKS * 3][TOKENS];
static int8_t keys[TOKENS * DIM];
static size_t value_size;

static void fill_put(ibid_block_put *p, size_t i) {
    for (size_t t = 0; t < TOKENS; t++) tokens[i][t] = (int32_t)(i * 7919 + t);
    *p = (ibid_block_put){.model = hash_of("bench"),
                          .kv_type = IBID_KV_Q8_0,
                          .n_tokens = TOKENS,
                          .tokens = tokens[i],
                          .n_layers = LAYERS,
                          .value_size = value_size,
                          .values = (const void *const *)values,
                          .keys = keys,
                          .keys_dim = DIM};
}

static void rate(const char *what, uint64_t start) {
    double s = ibid_ms_since(start) / 1e3, mb = (double)BLOCKS * LAYERS * (double)value_size / 1e6;
    printf("%s: %.0f MB of KV in %.2f s: %.0f MB/s, %.1f ms a batch of %d blocks\n", what, mb, s,
           mb / s, s * 1e3 * BATCH / BLOCKS, BATCH);
}

static ibid_err put_all(ibid_store *s, ibid_client *c, size_t first) {
    uint64_t numbers[BATCH];
    ibid_block_put p[BATCH];
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < BLOCKS && !e; i += BATCH) {
        for (size_t k = 0; k < BATCH; k++) fill_put(&p[k], first + i + k);
        e = c ? ibid_kvc_blocks_put(c, p, BATCH, numbers)
              : ibid_store_blocks_put(s, p, BATCH, numbers);
    }
    return e;
}

static ibid_err reads(ibid_store *s) {
    enum { N = 100000 };
    ibid_snap *n = NULL;
    ibid_block b;
    ibid_kv_view v;
    ibid_err e = IBID_OK;
    uint64_t start = ibid_now_ns();
    for (int i = 0; i < N && !e; i++) {
        e = ibid_snap_begin(s, &n);
        ibid_snap_end(n);
    }
    printf("snapshot begin and end: %.2f us\n", ibid_ms_since(start) * 1e3 / N);
    if (!e) e = ibid_snap_begin(s, &n);
    ibid_block_put p;
    ibid_hash h[BLOCKS];
    for (size_t i = 0; i < BLOCKS; i++) {
        fill_put(&p, i);
        h[i] = ibid_block_hash(&p.model, &p.prefix, p.kv_type, 0, tokens[i], TOKENS);
    }
    start = ibid_now_ns();
    for (size_t i = 0; i < N && !e; i++)
        e = ibid_snap_block_find(n, &h[i % BLOCKS], 0, tokens[i % BLOCKS], TOKENS, &b);
    printf("block_find: %.2f us\n", ibid_ms_since(start) * 1e3 / N);
    for (int round = 0; round < 2 && !e; round++) {
        start = ibid_now_ns();
        for (uint64_t i = 0; i < (uint64_t)BLOCKS * LAYERS && !e; i++)
            e = ibid_snap_kv(n, 1 + i / LAYERS, i % LAYERS, &v);
        printf("kv, %s: %.2f us a value\n", round ? "again" : "first reading (checksum)",
               ibid_ms_since(start) * 1e3 / (BLOCKS * LAYERS));
    }
    ibid_snap_end(n);
    return e;
}

/* Blocks nobody uses are collected after each batch, so that the next one's pages come from the
 * free list, where LMDB has to find runs of them. */
static ibid_err churn(ibid_store *s) {
    uint64_t numbers[BATCH], start = ibid_now_ns();
    ibid_block_put p[BATCH];
    ibid_store_stats before = {0}, after = {0};
    stats_of(s, &before);
    ibid_err e = IBID_OK;
    for (size_t i = 0; i < BLOCKS && !e; i += BATCH) {
        ibid_collected c = {.more = true};
        for (size_t k = 0; k < BATCH; k++) fill_put(&p[k], 2 * BLOCKS + i + k);
        e = ibid_store_blocks_put(s, p, BATCH, numbers);
        while (!e && c.more) e = ibid_store_collect(s, &c);
    }
    if (!e) rate("blocks_put with collection", start);
    stats_of(s, &after);
    printf("file: %.0f MB before, %.0f MB after\n", (double)before.file_bytes / 1e6,
           (double)after.file_bytes / 1e6);
    return e;
}

static ibid_err over_ipc(const char *data, const char *program) {
    char url[IBID_BUS_URL_MAX];
    ibid_client *c = NULL;
    ibid_err e = ibid_bus_url(data, "kvstore", false, url);
    if (!e) e = ibid_client_open(url, &c);
    if (e) return e;
    pid_t pid = fork();
    if (pid == 0) {
        (void)execl(program, program, "--data", data, (char *)NULL);
        _exit(127);
    }
    e = IBID_UNAVAIL;
    for (int i = 0; i < 50 && e; i++) e = ibid_client_ping(c, 200, NULL, NULL);
    uint64_t start = ibid_now_ns();
    if (!e) e = put_all(NULL, c, BLOCKS);
    if (!e) rate("blocks_put over ipc", start);
    ibid_client_close(c);
    (void)kill(pid, SIGTERM);
    (void)waitpid(pid, NULL, 0);
    return e;
}

int main(int argc, char **argv) {
    if (argc < 2) return fprintf(stderr, "usage: %s FOLDER [IBID_KVSTORE]\n", argv[0]), 2;
    char dir[4096];
    (void)snprintf(dir, sizeof dir, "%s/" IBID_STORE_FOLDER, argv[1]);
    ibid_kv_shape shape = {IBID_KV_Q8_0, TOKENS, HEADS, DIM};
    ibid_store *s = NULL;
    ibid_err e = ibid_kv_value_size(&shape, &value_size);
    for (size_t l = 0; l < LAYERS && !e; l++) {
        values[l] = calloc(1, value_size);
        e = values[l] ? ibid_kv_value_seal(&shape, 0, l, values[l], value_size) : IBID_NOMEM;
    }
    if (!e) e = ibid_store_open(&(ibid_store_opts){.dir = dir}, &s);
    uint64_t start = ibid_now_ns();
    if (!e) e = put_all(s, NULL, 0);
    if (!e) rate("blocks_put directly", start);
    ibid_store_close(s);
    s = NULL;
    if (!e) e = ibid_store_open(&(ibid_store_opts){.dir = dir}, &s);
    if (!e) e = reads(s);
    if (!e) e = churn(s);
    ibid_store_close(s);
    if (!e && argc > 2) e = over_ipc(argv[1], argv[2]);
    for (size_t l = 0; l < LAYERS; l++) free(values[l]);
    if (e) fprintf(stderr, "%s: %s\n", ibid_err_code(e), ibid_err_detail());
    return e ? 2 : 0;
}
