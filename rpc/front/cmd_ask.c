#include "rpc/base/clock.h"
#include "rpc/front/asking.h"
#include "rpc/front/commands.h"
#include "rpc/front/markers.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CITATIONS_SHOWN = 16 };

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig) {
    (void)sig;
    interrupted = 1;
}

struct ask {
    ibid_cli *cli;
    ibid_service *s;
    ibidi_ask_options options;
    /* of the question in hand */
    json_t *id;
    const ibidi_asked *asked;
    bool streamed; /* some text of the answer is on the screen already */
    int status;
};

static const ibid_hit *hit_of(const struct ask *a, uint64_t document) {
    for (size_t i = 0; i < a->asked->found->n; i++)
        if (a->asked->found->hits[i].document == document) return &a->asked->found->hits[i];
    return NULL;
}

static json_t *citations_json(const struct ask *a, const ibid_answer_event *ev) {
    json_t *list = json_array();
    for (size_t i = 0; i < ev->n_citations; i++) {
        const ibid_citation *c = &ev->citations[i];
        const ibid_hit *h = hit_of(a, c->document);
        if (!h) continue;
        (void)json_array_append_new(
            list, json_pack("{s:o,s:o,s:I,s:I,s:o,s:o}", "document", ibidi_json_str(h->id), "title",
                            ibidi_json_str(h->title), "start", (json_int_t)c->start, "end",
                            (json_int_t)c->end, "locator", ibidi_json_str(h->locator), "quote",
                            ibidi_json_str(c->quote)));
    }
    return list;
}

static json_t *blocks_json(const struct ask *a) {
    json_t *list = json_array();
    for (size_t i = 0; i < a->asked->found->n; i++)
        (void)json_array_append_new(list,
                                    json_pack("{s:o,s:I,s:f}", "document",
                                              ibidi_json_str(a->asked->found->hits[i].id), "chunk",
                                              (json_int_t)a->asked->found->hits[i].chunk, "score",
                                              a->asked->found->hits[i].score));
    return list;
}

/* The reply of the contract; ev NULL = nothing relevant was found. */
static json_t *answer_json(const struct ask *a, const ibid_answer_event *ev) {
    static const ibid_answer_event nothing;
    bool found = ev != NULL;
    if (!found) ev = &nothing;
    json_t *j = json_object();
    if (a->id) (void)json_object_set(j, "id", a->id);
    (void)json_object_set_new(j, "found", json_boolean(found));
    (void)json_object_set_new(j, "answer", ibidi_json_str(ev->text));
    (void)json_object_set_new(j, "mode", ev->mode ? json_string(ev->mode) : json_null());
    (void)json_object_set_new(j, "evidence", json_real(ev->evidence));
    (void)json_object_set_new(j, "relevance", json_real(a->asked->found->relevance));
    (void)json_object_set_new(j, "coverage", json_real(a->asked->found->coverage));
    (void)json_object_set_new(j, "citations", citations_json(a, ev));
    (void)json_object_set_new(j, "blocks", blocks_json(a));
    (void)json_object_set_new(
        j, "usage",
        json_pack("{s:I,s:I,s:I,s:I,s:s,s:I,s:I,s:I}", "prompt_tokens",
                  (json_int_t)ev->prompt_tokens, "reused_tokens", (json_int_t)ev->reused_tokens,
                  "recomputed_tokens", (json_int_t)ev->recomputed_tokens, "encoded_tokens",
                  (json_int_t)ev->encoded_tokens, "encoded_why", ev->encoded_why,
                  "completion_tokens", (json_int_t)ev->completion_tokens, "kv_bytes_read",
                  (json_int_t)ev->kv_bytes_read, "kv_bytes_from_disk",
                  (json_int_t)ev->kv_bytes_from_disk));
    json_t *usage = json_object_get(j, "usage");
    if (found) (void)json_object_set_new(usage, "attention_share", json_real(ev->attention_share));
    if (found && ev->attention_recall >= 0)
        (void)json_object_set_new(usage, "attention_recall", json_real(ev->attention_recall));
    (void)json_object_set_new(j, "plan",
                              json_pack("{s:I,s:f}", "blocks", (json_int_t)a->asked->found->n,
                                        "recompute", ev->recompute));
    (void)json_object_set_new(j, "finish", ev->finish ? json_string(ev->finish) : json_null());
    (void)json_object_set_new(
        j, "timings_ms",
        json_pack("{s:f,s:f,s:f,s:f}", "retrieve", a->asked->retrieve_ms, "first_token",
                  found ? a->asked->retrieve_ms + ev->first_token_ms : 0.0, "disk_wait",
                  ev->kv_wait_ms, "total", ibid_ms_since(a->asked->start_ns)));
    return j;
}

static const char *why_encoded(const ibid_answer_event *ev) {
    if (strstr(ev->encoded_why, "slow_disk"))
        return " (faster than reading their KV from this disk)";
    if (strstr(ev->encoded_why, "damaged")) return " (their stored KV was damaged)";
    return ev->encoded_why[0] ? " (their KV had been evicted)" : "";
}

static void print_answer(const struct ask *a, const ibid_answer_event *ev) {
    ibid_str quotes[CITATIONS_SHOWN];
    size_t places[CITATIONS_SHOWN],
        n = ev->n_citations < CITATIONS_SHOWN ? ev->n_citations : CITATIONS_SHOWN;
    for (size_t i = 0; i < n; i++) quotes[i] = ev->citations[i].quote;
    if (!a->streamed) {
        ibidi_marker_places(ev->text, quotes, n, places);
        for (size_t at = 0; at <= ev->text.n; at++) {
            for (size_t i = 0; i < n; i++)
                if (places[i] == at) printf(" %s[%zu]%s", ibidi_bold(), i + 1, ibidi_plain());
            if (at < ev->text.n) putchar(ev->text.s[at]);
        }
    }
    printf("\n");
    for (size_t i = 0; i < n; i++) {
        const ibid_citation *c = &ev->citations[i];
        const ibid_hit *h = hit_of(a, c->document);
        printf("\n%s[%zu]%s ", ibidi_bold(), i + 1, ibidi_plain());
        printf("\"");
        ibidi_print_line(c->quote, c->quote.n);
        printf("\"\n    %s%.*s  %.*s:%llu-%llu", ibidi_dim(), h ? (int)h->title.n : 0,
               h ? h->title.s : "", h ? (int)h->id.n : 0, h ? h->id.s : "",
               (unsigned long long)c->start, (unsigned long long)c->end);
        if (h && h->locator.n) printf("  %.*s", (int)h->locator.n, h->locator.s);
        printf("%s\n", ibidi_plain());
    }
    printf("\n%sretrieved in %.0f ms, first token after %.0f ms, %.1f s in all; %llu of %llu "
           "prompt tokens "
           "reused, %llu recomputed, %llu encoded now%s%s\n",
           ibidi_dim(), a->asked->retrieve_ms, a->asked->retrieve_ms + ev->first_token_ms,
           ibid_ms_since(a->asked->start_ns) / 1000, (unsigned long long)ev->reused_tokens,
           (unsigned long long)ev->prompt_tokens, (unsigned long long)ev->recomputed_tokens,
           (unsigned long long)ev->encoded_tokens, why_encoded(ev), ibidi_plain());
    if (ev->attention_share < 1) {
        printf("%seach token of the answer read %.0f %% of its context", ibidi_dim(),
               100 * ev->attention_share);
        if (ev->attention_recall >= 0)
            printf(", where %.1f %% of its attention lay", 100 * ev->attention_recall);
        printf("%s\n", ibidi_plain());
    }
}

static bool on_event(void *arg, ibidi_asked *asked, const ibid_answer_event *ev) {
    struct ask *a = arg;
    a->asked = asked;
    const ibid_opts *o = &a->cli->o;
    if (ev->kind == IBID_ANSWER_TOKEN && o->stream) {
        if (o->json)
            (void)ibidi_json_print(json_pack("{s:o}", "token", ibidi_json_str(ev->text)));
        else
            (void)fwrite(ev->text.s, 1, ev->text.n, stdout), (void)fflush(stdout);
        a->streamed = asked->shown = true;
    }
    if (ev->kind == IBID_ANSWER_DONE) {
        if (o->json)
            a->status = ibidi_json_print(answer_json(a, ev));
        else
            print_answer(a, ev), ibidi_print_coverage(asked->found->coverage);
        asked->shown = true;
    }
    return true;
}

static int not_found(struct ask *a) {
    if (a->cli->o.json) {
        int wrote = ibidi_json_print(answer_json(a, NULL));
        return wrote ? wrote : 1;
    }
    printf("The documents do not say: nothing in them is close enough to this question.\n");
    if (a->asked->found->n) {
        printf("%sClosest: ", ibidi_dim());
        ibidi_print_line(a->asked->found->hits[0].title, 80);
        printf(" (relevance %.2f of the 0.50 it takes). --always answers all the same.%s\n",
               a->asked->found->relevance, ibidi_plain());
    }
    ibidi_print_coverage(a->asked->found->coverage);
    return 1;
}

static void on_nothing(void *arg, ibidi_asked *asked) {
    struct ask *a = arg;
    a->asked = asked;
    a->status = not_found(a);
}

static int ask_one(void *arg, ibid_str text, json_t *id) {
    struct ask *a = arg;
    ibidi_ask_calls calls = {on_event, on_nothing, a, &interrupted};
    a->id = id;
    a->streamed = false;
    a->status = 0;
    ibid_err e = ibidi_ask(a->s, &a->options, text, &calls);
    a->asked = NULL;
    return e ? ibidi_report(a->cli, e) : a->status;
}

int ibidi_cmd_ask(ibid_cli *cli) {
    ibid_service s = {0};
    ibid_filter filters[IBID_OPT_LIST_MAX + 1];
    struct ask a = {.cli = cli, .s = &s};
    a.options = (ibidi_ask_options){.collection = cli->o.collection,
                                    .filters = filters,
                                    .n_filters = ibidi_filters(&cli->o, filters),
                                    .blocks = cli->o.blocks,
                                    .always = cli->o.always,
                                    .max_tokens = (uint32_t)cli->o.max_tokens,
                                    .temperature = cli->o.temperature,
                                    .top_p = cli->o.top_p,
                                    .seed = cli->o.seed};
    ibid_err e = ibidi_read_recompute(cli->o.recompute, &a.options.recompute);
    if (!e) e = ibidi_read_mode(cli->o.mode, &a.options.mode);
    if (!e)
        e = ibidi_read_attention(cli->o.attention, &a.options.attention_share,
                                 &a.options.attention_recall);
    if (!e && cli->o.max_tokens > UINT32_MAX)
        e = ibid_fail(IBID_INVAL, "--max-tokens is too large");
    if (!e) e = ibidi_service_open(&cli->o, true, &s);
    struct sigaction act = {.sa_handler = on_interrupt};
    (void)sigaction(SIGINT, &act, NULL);
    int status = e ? ibidi_report(cli, e) : ibidi_each_question(cli, ask_one, &a);
    ibidi_service_close(&s);
    return status;
}
