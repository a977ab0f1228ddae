#include "rpc/base/clock.h"
#include "rpc/front/commands.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- shared with ask ---- */

static int one_line(ibid_cli *cli, const char *line, size_t number,
                    int (*fn)(void *, ibid_str, json_t *), void *arg) {
    json_error_t why;
    json_t *j = json_loads(line, 0, &why);
    json_t *text = json_object_get(j, "text"), *id = json_object_get(j, "id");
    if (!json_is_string(text)) {
        json_decref(j);
        return ibidi_report(cli,
                            ibid_fail(IBID_INVAL, "%s:%zu: not a JSON object with \"text\": %s",
                                      cli->o.queries, number, j ? "text is missing" : why.text));
    }
    int status = fn(arg, (ibid_str){json_string_value(text), json_string_length(text)}, id);
    json_decref(j);
    return status;
}

int ibidi_each_question(ibid_cli *cli, int (*fn)(void *, ibid_str, json_t *), void *arg) {
    if (!cli->o.queries) {
        if (cli->n_args == 0)
            return ibidi_report(
                cli, ibid_fail(IBID_INVAL, "no question; see ibid %s --help", cli->command));
        return fn(arg, ibidi_str(cli->args[0]), NULL);
    }
    if (cli->n_args > 0)
        return ibidi_report(cli,
                            ibid_fail(IBID_INVAL, "a question and --queries together; give one"));
    FILE *f = strcmp(cli->o.queries, "-") == 0 ? stdin : fopen(cli->o.queries, "r");
    if (!f) return ibidi_report(cli, ibid_fail_errno(errno, "cannot read", cli->o.queries));
    cli->o.json = true; /* one result line each */
    char *line = NULL;
    size_t room = 0, number = 0;
    int worst = 1;
    bool found = false;
    while (getline(&line, &room, f) >= 0) {
        number++;
        if (line[strspn(line, " \t\r\n")] == '\0') continue;
        int status = one_line(cli, line, number, fn, arg);
        found |= status == 0;
        if (status == 2) worst = 2;
        if (ferror(stdout)) break; /* nobody reads the answers any more */
    }
    free(line);
    if (f != stdin) (void)fclose(f);
    return worst == 2 ? 2 : found ? 0 : 1;
}

ibid_err ibidi_search(ibid_service *s, const ibid_search_request *q, ibid_search_result *out) {
    uint64_t since = 0;
    ibid_err e;
    do e = ibid_ret_search(s->retriever, q, out);
    while (ibidi_room_away(e) && ibidi_service_again(s, &since));
    return e;
}

size_t ibidi_filters(const ibid_opts *o, ibid_filter *out) {
    for (size_t i = 0; i < o->n_filters; i++) {
        const char *eq = strchr(o->filters[i], '=');
        out[i] = (ibid_filter){{o->filters[i], (size_t)(eq - o->filters[i])}, ibidi_str(eq + 1)};
    }
    if (!o->document) return o->n_filters;
    out[o->n_filters] = (ibid_filter){ibidi_str(IBID_FILTER_DOCUMENT), ibidi_str(o->document)};
    return o->n_filters + 1;
}

void ibidi_print_coverage(double coverage) {
    if (coverage >= 1) return;
    printf(
        "%s%.3g %% of the text was compared with the question token by token, chosen by an index "
        "over all of it%s\n",
        ibidi_dim(), 100 * coverage, ibidi_plain());
}

/* ---- search ---- */

struct search {
    ibid_cli *cli;
    ibid_service *s;
};

static json_t *hit_json(const ibid_hit *h) {
    return json_pack("{s:o,s:o,s:I,s:I,s:I,s:o,s:o,s:f,s:{s:f,s:f}}", "document",
                     ibidi_json_str(h->id), "title", ibidi_json_str(h->title), "chunk",
                     (json_int_t)h->chunk, "start", (json_int_t)h->start, "end", (json_int_t)h->end,
                     "locator", ibidi_json_str(h->locator), "text", ibidi_json_str(h->text),
                     "score", h->score, "scores", "keys", h->keys, "lexical", h->lexical);
}

static void print_hit(size_t rank, const ibid_hit *h) {
    printf("%s%zu. %.*s%s", ibidi_bold(), rank, (int)h->title.n, h->title.s, ibidi_plain());
    printf("%s  %.*s:%llu-%llu", ibidi_dim(), (int)h->id.n, h->id.s, (unsigned long long)h->start,
           (unsigned long long)h->end);
    if (h->locator.n) printf("  %.*s", (int)h->locator.n, h->locator.s);
    printf("  score %.3f (keys %.3f, words %.2f)%s\n   ", h->score, h->keys, h->lexical,
           ibidi_plain());
    ibidi_print_line(h->text, 300);
    printf("\n");
}

static int search_one(void *arg, ibid_str text, json_t *id) {
    struct search *q = arg;
    const ibid_opts *o = &q->cli->o;
    ibid_filter filters[IBID_OPT_LIST_MAX + 1];
    ibid_search_request r = {.collection = ibidi_str(o->collection),
                             .question = text,
                             .top = o->top,
                             .chunks = o->chunks,
                             .filters = filters,
                             .n_filters = ibidi_filters(o, filters),
                             .keys_only = o->keys_only,
                             .lexical_only = o->lexical_only};
    ibid_search_result res;
    uint64_t start = ibid_now_ns();
    ibid_err e = ibidi_search(q->s, &r, &res);
    if (e) return ibidi_report(q->cli, e);
    double total = ibid_ms_since(start);
    int status = res.n ? 0 : 1;
    if (o->json) {
        json_t *j = json_object(), *hits = json_array();
        if (id) (void)json_object_set(j, "id", id);
        for (size_t i = 0; i < res.n; i++)
            (void)json_array_append_new(hits, hit_json(&res.hits[i]));
        (void)json_object_set_new(j, "hits", hits);
        (void)json_object_set_new(j, "relevant", json_boolean(res.relevant));
        (void)json_object_set_new(j, "relevance", json_real(res.relevance));
        (void)json_object_set_new(j, "coverage", json_real(res.coverage));
        (void)json_object_set_new(j, "timings_ms",
                                  json_pack("{s:f,s:f,s:f}", "keys", res.keys_ms, "lexical",
                                            res.lexical_ms, "total", total));
        if (ibidi_json_print(j)) status = 2;
    } else {
        for (size_t i = 0; i < res.n; i++) print_hit(i + 1, &res.hits[i]);
        if (res.n == 0)
            printf("nothing found\n");
        else
            printf("%s%zu hits in %.1f ms%s%s\n", ibidi_dim(), res.n, total,
                   res.relevant ? "" : "; none of them seems to answer this", ibidi_plain());
        if (res.n) ibidi_print_coverage(res.coverage);
    }
    ibid_search_result_close(&res);
    return status;
}

int ibidi_cmd_search(ibid_cli *cli) {
    ibid_service s;
    struct search q = {cli, &s};
    ibid_err e = ibidi_service_open(&cli->o, true, &s);
    int status = e ? ibidi_report(cli, e) : ibidi_each_question(cli, search_one, &q);
    ibidi_service_close(&s);
    return status;
}
