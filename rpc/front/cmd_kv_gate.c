#include "attention/attention.h"
#include "rpc/front/commands.h"
#include "rpc/front/files.h"

#include <math.h>
#include <stdio.h>

enum { TEXT_MAX = 32 << 20 };

/* JSON has no infinity, which is what logits that are not numbers give. */
static double bounded(double x) {
    return isfinite(x) ? x : 1e300;
}

static json_t *gate_json(const ibid_kv_gate *g) {
    json_t *types = json_array();
    for (size_t i = 0; i < g->n_types; i++) {
        const ibid_kv_verdict *v = &g->types[i];
        (void)json_array_append_new(types, json_pack("{s:s,s:I,s:f,s:f,s:f,s:b,s:b}", "type",
                                                     v->type, "positions", (json_int_t)v->positions,
                                                     "kl_mean", bounded(v->kl_mean), "kl_p99",
                                                     bounded(v->kl_p99), "top1", v->top1, "passed",
                                                     v->passed, "forced", v->forced));
    }
    return json_pack("{s:s,s:s,s:o}", "model", g->name, "kv_type", g->kv_type, "types", types);
}

static void print_gate(const ibid_kv_gate *g) {
    printf("%s, stored as %s\n%-6s %9s %12s %12s %8s  %s\n", g->name, g->kv_type, "type",
           "positions", "mean KL", "99th perc.", "top-1", "verdict");
    for (size_t i = 0; i < g->n_types; i++) {
        const ibid_kv_verdict *v = &g->types[i];
        printf("%-6s %9llu %12.2e %12.2e %6.2f %%  %s\n", v->type, (unsigned long long)v->positions,
               v->kl_mean, v->kl_p99, 100 * v->top1,
               v->passed   ? "passes"
               : v->forced ? "fails, used all the same"
                           : "fails");
    }
}

/* 1 where the type the model is stored in is refused from now on. */
static int status_of(const ibid_kv_gate *g) {
    for (size_t i = 0; i < g->n_types; i++) {
        const ibid_kv_verdict *v = &g->types[i];
        if (__builtin_strcmp(v->type, g->kv_type) == 0) return v->passed || v->forced ? 0 : 1;
    }
    return 0;
}

int ibidi_cmd_kv_gate(ibid_cli *cli) {
    ibid_service s = {0};
    ibid_kv_gate g;
    ibid_buf text;
    ibid_buf_init(&text, TEXT_MAX);
    const char *model = cli->n_args ? cli->args[0] : cli->o.model ? cli->o.model : "";
    ibid_err e = cli->o.text ? ibidi_append_file(cli->o.text, &text) : IBID_OK;
    ibid_str t = {cli->o.text ? (text.data ? text.data : "") : NULL, text.len};
    if (!e) e = ibidi_service_open(&cli->o, true, &s);
    if (!e) e = ibid_attn_kv_gate(s.attention, model, t, 0, cli->o.force, &g);
    int status;
    if (e) {
        status = ibidi_report(cli, e);
    } else if (cli->o.json) {
        status = ibidi_json_print(gate_json(&g));
        if (!status) status = status_of(&g);
    } else {
        print_gate(&g);
        status = status_of(&g);
    }
    ibidi_service_close(&s);
    ibid_buf_fini(&text);
    return status;
}
