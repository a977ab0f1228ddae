#include "attention/attention.h"
#include "indexer/indexer.h"
#include "retriever/retriever.h"
#include "rpc/front/commands.h"
#include "rpc/front/supervisor.h"

#include <stdio.h>
#include <string.h>

int ibidi_cmd_up(ibid_cli *cli) {
    ibid_service s;
    ibid_err e = ibidi_service_open(&cli->o, false, &s);
    if (!e && cli->o.foreground) return ibidi_supervise(s.data, &cli->o);
    bool running = !e && ibidi_supervisor_pid(s.data) != 0;
    if (!e) e = ibidi_supervisor_start(s.data, &cli->o, IBIDI_START_MS);
    if (e) return ibidi_report(cli, e);
    if (cli->o.json)
        return ibidi_json_print(json_pack("{s:b,s:I,s:s}", "started", !running, "pid",
                                          (json_int_t)ibidi_supervisor_pid(s.data), "data",
                                          s.data));
    printf("ibid %s for %s (process %ld)\n", running ? "was running already" : "is up", s.data,
           (long)ibidi_supervisor_pid(s.data));
    return 0;
}

int ibidi_cmd_down(ibid_cli *cli) {
    ibid_service s;
    bool was = false;
    ibid_err e = ibidi_service_open(&cli->o, false, &s);
    if (!e) e = ibidi_supervisor_stop(s.data, &was);
    if (e) return ibidi_report(cli, e);
    if (cli->o.json) return ibidi_json_print(json_pack("{s:b}", "stopped", was));
    printf(was ? "stopped\n" : "nothing was running for %s\n", s.data);
    return 0;
}

int ibidi_cmd_version(ibid_cli *cli) {
    if (cli->o.json) return ibidi_json_print(json_pack("{s:s}", "version", IBID_VERSION));
    printf("ibid %s\n", IBID_VERSION);
    return 0;
}

/* ---- status ---- */

static json_t *room_status(const ibid_service *s, size_t i, uint64_t restarts, bool *ready) {
    ibid_client *clients[IBIDI_ROOMS] = {s->kvstore, s->attention, s->retriever, s->indexer};
    uint64_t pid = 0, uptime = 0;
    ibid_err e = clients[i] ? ibid_client_ping(clients[i], 1000, &pid, &uptime) : IBID_UNAVAIL;
    *ready = e == IBID_OK;
    return json_pack("{s:s,s:b,s:I,s:f,s:I}", "room", ibidi_room_names[i], "ready", *ready, "pid",
                     (json_int_t)pid, "uptime_s", (double)uptime / 1000, "restarts",
                     (json_int_t)restarts);
}

static ibid_err add_collection(void *arg, const ibid_collection *c) {
    char model[65];
    ibid_hash_hex(&c->model, model);
    (void)json_array_append_new(
        arg, json_pack("{s:o,s:I,s:I,s:I,s:s}", "name", ibidi_json_str(c->name), "documents",
                       (json_int_t)c->documents, "chunks", (json_int_t)c->chunks, "text_bytes",
                       (json_int_t)c->text_bytes, "model", model));
    return IBID_OK;
}

static ibid_err add_model(void *arg, const ibid_model_record *m) {
    char hex[65];
    ibid_hash_hex(&m->fingerprint, hex);
    (void)json_array_append_new(
        arg, json_pack("{s:o,s:o,s:s,s:o,s:I,s:b}", "name", ibidi_json_str(m->name), "architecture",
                       ibidi_json_str(m->arch), "fingerprint", hex, "file", ibidi_json_str(m->path),
                       "context", (json_int_t)m->n_ctx, "calibrated", m->calibration.n > 0));
    return IBID_OK;
}

static ibid_err add_job(void *arg, const ibid_job *j) {
    (void)json_array_append_new(
        arg, json_pack("{s:I,s:o,s:o,s:o,s:o,s:o}", "id", (json_int_t)j->id, "kind",
                       ibidi_json_str(j->kind), "collection", ibidi_json_str(j->collection),
                       "state", ibidi_json_str(j->state), "stage", ibidi_json_str(j->stage),
                       "error", ibidi_json_str(j->error_text)));
    return IBID_OK;
}

/* What the store says of itself; absent while nothing was ever stored. */
static void store_status(ibid_service *s, json_t *out) {
    ibid_snap *n = NULL;
    ibid_store_stats st;
    if (ibidi_service_store(s) != IBID_OK || ibid_snap_begin(s->store, &n) != IBID_OK) return;
    json_t *collections = json_array(), *models = json_array(), *jobs = json_array();
    (void)ibid_snap_each_collection(n, add_collection, collections);
    (void)ibid_snap_each_model(n, add_model, models);
    (void)ibid_snap_each_job(n, add_job, jobs);
    if (ibid_snap_stats(n, &st) == IBID_OK)
        (void)json_object_set_new(
            out, "store",
            json_pack("{s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "generation",
                      (json_int_t)st.generation, "documents", (json_int_t)st.documents, "blocks",
                      (json_int_t)st.blocks, "blocks_evicted", (json_int_t)st.blocks_evicted,
                      "kv_bytes", (json_int_t)st.kv_bytes, "key_bytes", (json_int_t)st.key_bytes,
                      "text_bytes", (json_int_t)st.text_bytes, "file_bytes",
                      (json_int_t)st.file_bytes, "kv_budget", (json_int_t)st.kv_budget));
    (void)json_object_set_new(out, "collections", collections);
    (void)json_object_set_new(out, "models", models);
    (void)json_object_set_new(out, "jobs", jobs);
    ibid_snap_end(n);
}

static void add_reply(json_t *out, const char *name, ibid_err e, ibid_reply *r) {
    if (e) return;
    (void)json_object_set_new(out, name, ibidi_json_value(r->body));
    ibid_reply_close(r);
}

/* Where a model runs, if the attention room has it open. */
static void print_backend(const json_t *j, const json_t *model) {
    char used[32], pool[32];
    const char *hex = json_string_value(json_object_get(model, "fingerprint"));
    size_t i;
    json_t *v;
    json_array_foreach(json_object_get(json_object_get(j, "attention"), "models"), i, v) {
        const char *of = json_string_value(json_object_get(v, "fingerprint"));
        const char *backend = json_string_value(json_object_get(v, "backend"));
        const char *device = json_string_value(json_object_get(v, "device"));
        if (!hex || !of || !backend || strcmp(hex, of) != 0) continue;
        printf(", runs on %s", device ? device : backend);
        if (device)
            printf(" (KV there: %s of %s)",
                   ibidi_bytes((uint64_t)json_integer_value(json_object_get(v, "gpu_pool_used")),
                               used),
                   ibidi_bytes((uint64_t)json_integer_value(json_object_get(v, "gpu_pool")), pool));
    }
    printf("\n");
}

static void print_status(const json_t *j) {
    char a[32], b[32], c[32];
    size_t i;
    json_t *v;
    printf("%sdata%s  %s\n\n%sprocesses%s\n", ibidi_bold(), ibidi_plain(),
           json_string_value(json_object_get(j, "data")), ibidi_bold(), ibidi_plain());
    json_array_foreach(json_object_get(j, "rooms"), i, v) {
        bool ready = json_is_true(json_object_get(v, "ready"));
        printf("  %-10s %-8s", json_string_value(json_object_get(v, "room")),
               ready ? "ready" : "down");
        if (ready)
            printf(" pid %-8lld up %s", (long long)json_integer_value(json_object_get(v, "pid")),
                   ibidi_seconds(json_real_value(json_object_get(v, "uptime_s")), a));
        long long again = json_integer_value(json_object_get(v, "restarts"));
        printf(again ? "  restarted %lld times\n" : "\n", again);
    }
    printf("\n%smodels%s\n", ibidi_bold(), ibidi_plain());
    json_array_foreach(json_object_get(j, "models"), i, v) {
        printf("  %-28s %s, context %lld, %s", json_string_value(json_object_get(v, "name")),
               json_string_value(json_object_get(v, "architecture")),
               (long long)json_integer_value(json_object_get(v, "context")),
               json_is_true(json_object_get(v, "calibrated")) ? "calibrated" : "no retrieval head");
        print_backend(j, v);
    }
    printf("\n%scollections%s\n", ibidi_bold(), ibidi_plain());
    json_array_foreach(json_object_get(j, "collections"), i, v)
        printf("  %-28s %lld documents, %lld chunks, %s of text\n",
               json_string_value(json_object_get(v, "name")),
               (long long)json_integer_value(json_object_get(v, "documents")),
               (long long)json_integer_value(json_object_get(v, "chunks")),
               ibidi_bytes((uint64_t)json_integer_value(json_object_get(v, "text_bytes")), a));
    const json_t *st = json_object_get(j, "store");
    if (st)
        printf("\n%sdisk%s\n  KV %s, token keys %s, text %s, store file %s\n", ibidi_bold(),
               ibidi_plain(),
               ibidi_bytes((uint64_t)json_integer_value(json_object_get(st, "kv_bytes")), a),
               ibidi_bytes((uint64_t)json_integer_value(json_object_get(st, "key_bytes")), b),
               ibidi_bytes((uint64_t)json_integer_value(json_object_get(st, "text_bytes")), c),
               ibidi_bytes((uint64_t)json_integer_value(json_object_get(st, "file_bytes")),
                           (char[32]){0}));
    printf("\n%sjobs%s\n", ibidi_bold(), ibidi_plain());
    json_array_foreach(json_object_get(j, "jobs"), i, v) {
        const char *state = json_string_value(json_object_get(v, "state"));
        if (strcmp(state, "done") == 0) continue;
        printf("  %-4lld %-10s %-10s %s\n", (long long)json_integer_value(json_object_get(v, "id")),
               state, json_string_value(json_object_get(v, "stage")),
               json_string_value(json_object_get(v, "collection")));
    }
}

int ibidi_cmd_status(ibid_cli *cli) {
    ibid_service s;
    ibid_reply r;
    ibid_err e = ibidi_service_open(&cli->o, false, &s);
    if (e) return ibidi_report(cli, e);
    bool up = ibidi_supervisor_pid(s.data) != 0;
    if (up) e = ibidi_service_connect(&s); /* status only looks: it never starts a service */
    if (e) return ibidi_report(cli, e);
    json_t *j = json_pack("{s:s,s:b}", "data", s.data, "running", up), *rooms = json_array();
    uint64_t restarts[IBIDI_ROOMS] = {0};
    bool ready[IBIDI_ROOMS] = {false};
    if (up) ibidi_supervisor_restarts(s.data, restarts);
    for (size_t i = 0; i < IBIDI_ROOMS; i++)
        (void)json_array_append_new(rooms, room_status(&s, i, restarts[i], &ready[i]));
    (void)json_object_set_new(j, "rooms", rooms);
    /* in the order of ibidi_room_names */
    if (ready[1]) add_reply(j, "attention", ibid_attn_status(s.attention, &r), &r);
    if (ready[2]) add_reply(j, "retriever", ibid_ret_status(s.retriever, &r), &r);
    store_status(&s, j);
    int status = 0;
    if (cli->o.json) {
        status = ibidi_json_print(j);
    } else {
        print_status(j);
        json_decref(j);
    }
    ibidi_service_close(&s);
    return status;
}
