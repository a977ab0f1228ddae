#include "attention/attention.h"
#include "rpc/front/commands.h"
#include "rpc/front/files.h"
#include "rpc/front/pull.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static void say(const char *text) {
    (void)fprintf(stderr, "ibid: %s\n", text);
}

static json_t *info_json(const ibid_model_info *m) {
    char hex[65];
    ibid_hash_hex(&m->fingerprint, hex);
    return json_pack("{s:s,s:s,s:s,s:s,s:s,s:I,s:I,s:I,s:I,s:b,s:I,s:s}", "name", m->name,
                     "architecture", m->arch, "fingerprint", hex, "file", m->path, "template",
                     m->template_name, "layers", (json_int_t)m->n_layers, "context",
                     (json_int_t)m->n_ctx, "kv_bytes_per_token", (json_int_t)m->kv_bytes_per_token,
                     "file_bytes", (json_int_t)m->file_bytes, "calibrated", m->calibrated,
                     "key_dim", (json_int_t)m->key_dim, "backend", m->backend);
}

static int show_info(const ibid_cli *cli, const ibid_model_info *m) {
    if (cli->o.json) return ibidi_json_print(info_json(m));
    char bytes[32];
    printf("%s: %s, %llu layers, context %llu, %s of KV a token, %s\n", m->name, m->arch,
           (unsigned long long)m->n_layers, (unsigned long long)m->n_ctx,
           ibidi_bytes(m->kv_bytes_per_token, bytes),
           m->key_dim ? "retrieval head found" : "no retrieval head: search by words only");
    return 0;
}

static ibid_err add_file(const ibid_opts *o, ibid_service *s, const char *path, const char *name,
                         ibid_model_info *m) {
    char *real = realpath(path, NULL);
    if (!real) return ibid_fail_errno(errno, "cannot read", path);
    say("reading the model, encoding its prefix and finding its retrieval heads");
    ibid_model_choice choice = {
        .path = real, .name = name, .kv_type = o->kv_type, .force = o->force};
    ibid_err e = ibid_attn_model_add_as(s->attention, &choice, m);
    free(real);
    return e;
}

static ibid_err pull(ibid_cli *cli, ibid_service *s, const char *name, ibid_model_info *m) {
    char dir[4096 + 16], path[8192], line[256];
    const ibid_known_model *k = ibidi_known_model(name);
    if (!k)
        return ibid_fail(IBID_NOTFOUND,
                         "no known model \"%s\"; known: smollm2. Any other: ibid model add "
                         "FILE.gguf",
                         name);
    (void)snprintf(dir, sizeof dir, "%s/models", s->data);
    if (mkdir(dir, 0700) != 0 && errno != EEXIST)
        return ibid_fail_errno(errno, "cannot create", dir);
    ibid_err e = ibidi_pull(k, dir, cli->o.from, say, path, sizeof path);
    if (e) return e;
    (void)snprintf(line, sizeof line, "%s", k->licence);
    say(line);
    return add_file(&cli->o, s, path, cli->o.name ? cli->o.name : k->name, m);
}

static ibid_err list_model(void *arg, const ibid_model_record *m) {
    char hex[65];
    ibid_hash_hex(&m->fingerprint, hex);
    return json_array_append_new(
               arg, json_pack("{s:o,s:o,s:s,s:o,s:I,s:b}", "name", ibidi_json_str(m->name),
                              "architecture", ibidi_json_str(m->arch), "fingerprint", hex, "file",
                              ibidi_json_str(m->path), "context", (json_int_t)m->n_ctx,
                              "calibrated", m->calibration.n > 0)) == 0
               ? IBID_OK
               : IBID_NOMEM;
}

static int list(ibid_cli *cli, ibid_service *s) {
    ibid_snap *n = NULL;
    json_t *models = json_array(), *m;
    size_t i;
    ibid_err e = ibidi_service_store(s);
    if (!e) e = ibid_snap_begin(s->store, &n);
    if (!e) e = ibid_snap_each_model(n, list_model, models);
    ibid_snap_end(n);
    int status = json_array_size(models) ? 0 : 1;
    if (e == IBID_NOTFOUND) e = IBID_OK; /* an empty data folder has no models */
    if (e) {
        status = ibidi_report(cli, e);
    } else if (cli->o.json) {
        int wrote = ibidi_json_print(json_pack("{s:O}", "models", models));
        status = wrote ? wrote : status;
    } else {
        json_array_foreach(models, i, m)
            printf("%-24s %.16s  %s\n", json_string_value(json_object_get(m, "name")),
                   json_string_value(json_object_get(m, "fingerprint")),
                   json_string_value(json_object_get(m, "file")));
        if (!status) return json_decref(models), 0;
        printf("no model yet: ibid model pull smollm2, or ibid model add FILE.gguf\n");
    }
    json_decref(models);
    return status;
}

static int calibrate(ibid_cli *cli, ibid_service *s) {
    ibid_buf sample, report, train, teacher;
    ibid_buf_init(&sample, 16 << 20);
    ibid_buf_init(&report, 32 << 20);
    ibid_buf_init(&train, 16 << 20);
    ibid_buf_init(&teacher, 64 << 20);
    const ibid_opts *o = &cli->o;
    ibid_err e = o->sample ? ibidi_append_file(o->sample, &sample) : IBID_OK;
    for (size_t i = 0; !e && i < o->train.n; i++) {
        e = ibidi_append_file(o->train.v[i], &train);
        if (!e) e = ibid_buf_puts(&train, "\n\n");
    }
    if (!e && o->teacher) e = ibidi_append_file(o->teacher, &teacher);
    if (!e && (o->teacher || o->pairs) && !o->train.n)
        e = ibid_fail(IBID_INVAL, "--teacher and --pairs need the text: --train FILE");
    ibid_calibrate_request q = {.model = cli->n_args > 1 ? cli->args[1]
                                         : o->model      ? o->model
                                                         : "",
                                .sample = {sample.data, sample.len},
                                .train = {train.data, train.len},
                                .teacher = {teacher.data, teacher.len},
                                .pairs = o->pairs};
    if (!e) e = ibid_attn_calibrate_as(s->attention, &q, &report);
    int status = 0;
    if (e)
        status = ibidi_report(cli, e);
    else if (cli->o.json)
        status = ibidi_json_print(
            json_pack("{s:o}", "report", ibidi_json_text(report.data, report.len)));
    else
        (void)fputs(report.data ? report.data : "", stdout);
    ibid_buf_fini(&sample);
    ibid_buf_fini(&report);
    ibid_buf_fini(&train);
    ibid_buf_fini(&teacher);
    return status;
}

int ibidi_cmd_model(ibid_cli *cli) {
    ibid_service s = {0};
    ibid_model_info m;
    const char *verb = cli->args[0], *what = cli->n_args > 1 ? cli->args[1] : NULL;
    bool adds = strcmp(verb, "add") == 0, pulls = strcmp(verb, "pull") == 0;
    bool lists = strcmp(verb, "list") == 0, calibrates = strcmp(verb, "calibrate") == 0;
    ibid_err e = IBID_OK;
    if (!adds && !pulls && !lists && !calibrates)
        e = ibid_fail(IBID_INVAL, "model %s: not one of add, list, pull, calibrate", verb);
    else if (adds && !what)
        e = ibid_fail(IBID_INVAL, "model add needs a GGUF FILE");
    if (!e) e = ibidi_service_open(&cli->o, !lists, &s);
    int status = 2;
    if (e) {
        status = ibidi_report(cli, e);
    } else if (lists) {
        status = list(cli, &s);
    } else if (calibrates) {
        status = calibrate(cli, &s);
    } else {
        e = adds ? add_file(&cli->o, &s, what, cli->o.name ? cli->o.name : "", &m)
                 : pull(cli, &s, what ? what : "smollm2", &m);
        status = e ? ibidi_report(cli, e) : show_info(cli, &m);
    }
    ibidi_service_close(&s);
    return status;
}
