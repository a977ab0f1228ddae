#include "attention/attention.h"
#include "rpc/base/clock.h"
#include "rpc/front/commands.h"
#include "rpc/front/markers.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Few blocks beat many (docs/design.md section 9), so by default an answer reads the best block,
 * and others only where the search could hardly tell them from it. */
enum { BLOCKS_AUTO_MAX = 3, BLOCKS_MAX = 256, CITATIONS_SHOWN = 16 };
static const double close_call = 0.8; /* of the best block's score */

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig) {
    (void)sig;
    interrupted = 1;
}

struct ask {
    ibid_cli *cli;
    ibid_service *s;
    double recompute;
    /* of the question in hand */
    json_t *id;
    const ibid_search_result *found;
    double retrieve_ms;
    uint64_t start_ns;
    bool streamed, wrote; /* streamed: some text of the answer is on the screen already */
    int status;
};

static const ibid_hit *hit_of(const struct ask *a, uint64_t document) {
    for (size_t i = 0; i < a->found->n; i++)
        if (a->found->hits[i].document == document) return &a->found->hits[i];
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
    for (size_t i = 0; i < a->found->n; i++)
        (void)json_array_append_new(list, json_pack("{s:o,s:I,s:f}", "document",
                                                    ibidi_json_str(a->found->hits[i].id), "chunk",
                                                    (json_int_t)a->found->hits[i].chunk, "score",
                                                    a->found->hits[i].score));
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
    (void)json_object_set_new(
        j, "plan",
        json_pack("{s:I,s:f}", "blocks", (json_int_t)a->found->n, "recompute", ev->recompute));
    (void)json_object_set_new(j, "finish", ev->finish ? json_string(ev->finish) : json_null());
    (void)json_object_set_new(
        j, "timings_ms",
        json_pack("{s:f,s:f,s:f,s:f}", "retrieve", a->retrieve_ms, "first_token",
                  found ? a->retrieve_ms + ev->first_token_ms : 0.0, "disk_wait", ev->kv_wait_ms,
                  "total", ibid_ms_since(a->start_ns)));
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
           ibidi_dim(), a->retrieve_ms, a->retrieve_ms + ev->first_token_ms,
           ibid_ms_since(a->start_ns) / 1000, (unsigned long long)ev->reused_tokens,
           (unsigned long long)ev->prompt_tokens, (unsigned long long)ev->recomputed_tokens,
           (unsigned long long)ev->encoded_tokens, why_encoded(ev), ibidi_plain());
}

static bool on_event(void *arg, const ibid_answer_event *ev) {
    struct ask *a = arg;
    const ibid_opts *o = &a->cli->o;
    if (ev->kind == IBID_ANSWER_TOKEN && o->stream) {
        if (o->json)
            (void)ibidi_json_print(json_pack("{s:o}", "token", ibidi_json_str(ev->text)));
        else
            (void)fwrite(ev->text.s, 1, ev->text.n, stdout), (void)fflush(stdout);
        a->streamed = true;
    }
    if (ev->kind == IBID_ANSWER_DONE) {
        if (o->json)
            a->status = ibidi_json_print(answer_json(a, ev));
        else
            print_answer(a, ev);
        a->wrote = true;
    }
    return !interrupted;
}

static ibid_err answer(struct ask *a, ibid_str text, const ibid_hash *model) {
    const ibid_opts *o = &a->cli->o;
    ibid_answer_block blocks[BLOCKS_MAX];
    for (size_t i = 0; i < a->found->n; i++) {
        const ibid_hit *h = &a->found->hits[i];
        blocks[i] = (ibid_answer_block){h->document, h->chunk, h->block, h->score};
    }
    ibid_answer_request q = {.model = *model,
                             .question = text,
                             .blocks = blocks,
                             .n_blocks = a->found->n,
                             .recompute = a->recompute,
                             .max_tokens = (uint32_t)o->max_tokens,
                             .temperature = o->temperature,
                             .top_p = o->top_p,
                             .seed = o->seed};
    return ibid_attn_answer(a->s->attention, &q, on_event, a);
}

static int not_found(struct ask *a) {
    if (a->cli->o.json) {
        int wrote = ibidi_json_print(answer_json(a, NULL));
        return wrote ? wrote : 1;
    }
    printf("The documents do not say: nothing in them is close enough to this question.\n");
    if (a->found->n) {
        printf("%sClosest: ", ibidi_dim());
        ibidi_print_line(a->found->hits[0].title, 80);
        printf(" (score %.3f). --always answers all the same.%s\n", a->found->hits[0].score,
               ibidi_plain());
    }
    return 1;
}

static ibid_err collection_model(ibid_service *s, const char *name, ibid_hash *model) {
    ibid_snap *n = NULL;
    ibid_collection c;
    ibid_err e = ibidi_service_store(s);
    if (!e) e = ibid_snap_begin(s->store, &n);
    if (!e) e = ibid_snap_collection(n, ibidi_str(name), &c);
    if (!e) *model = c.model;
    ibid_snap_end(n);
    return e;
}

/* One attempt: search, then answer. A room that went away, or a block that was replaced between the
 * two, is worth another attempt while nothing has been shown. */
static ibid_err attempt(struct ask *a, ibid_str text) {
    const ibid_opts *o = &a->cli->o;
    ibid_filter filters[IBID_OPT_LIST_MAX];
    ibid_hash model;
    ibid_search_result found = {0};
    ibid_search_request r = {.collection = ibidi_str(o->collection),
                             .question = text,
                             .chunks = true,
                             .top = o->blocks ? o->blocks : BLOCKS_AUTO_MAX,
                             .filters = filters,
                             .n_filters = ibidi_filters(o, filters)};
    uint64_t start = ibid_now_ns();
    ibid_err e = collection_model(a->s, o->collection, &model);
    if (!e) e = ibidi_search(a->s, &r, &found);
    if (e) return e;
    a->retrieve_ms = ibid_ms_since(start);
    a->found = &found;
    while (!o->blocks && found.n > 1 &&
           found.hits[found.n - 1].score < close_call * found.hits[0].score)
        found.n--;
    if (found.n == 0 || (!found.relevant && !o->always)) {
        a->status = not_found(a);
        a->wrote = true;
    } else {
        e = answer(a, text, &model);
    }
    ibid_search_result_close(&found);
    a->found = NULL;
    return e;
}

static int ask_one(void *arg, ibid_str text, json_t *id) {
    struct ask *a = arg;
    ibid_err e = IBID_OK;
    uint64_t since = 0;
    int replaced = 0;
    a->id = id;
    a->start_ns = ibid_now_ns();
    a->streamed = a->wrote = false;
    a->status = 0;
    while (!interrupted) {
        e = attempt(a, text);
        bool again = e == IBID_NOTFOUND ? ++replaced < 4 : e == IBID_UNAVAIL || e == IBID_BUSY;
        if (!again || a->streamed || a->wrote) break;
        if (e != IBID_NOTFOUND && !ibidi_service_again(a->s, &since)) break;
    }
    if (interrupted && !e) e = ibid_fail(IBID_CANCELLED, "interrupted");
    return e ? ibidi_report(a->cli, e) : a->status;
}

static ibid_err read_recompute(const char *text, double *out) {
    *out = -1;
    if (strcmp(text, "auto") == 0) return IBID_OK;
    char *end = NULL;
    *out = strtod(text, &end);
    if (end != text && *end == '\0' && isfinite(*out) && *out >= 0 && *out <= 1) return IBID_OK;
    return ibid_fail(IBID_INVAL, "--recompute: \"%s\" is neither auto nor a number from 0 to 1",
                     text);
}

int ibidi_cmd_ask(ibid_cli *cli) {
    ibid_service s = {0};
    struct ask a = {.cli = cli, .s = &s};
    ibid_err e = read_recompute(cli->o.recompute, &a.recompute);
    if (!e && cli->o.blocks > BLOCKS_MAX)
        e = ibid_fail(IBID_INVAL, "--blocks: at most %d", BLOCKS_MAX);
    if (!e && cli->o.max_tokens > UINT32_MAX)
        e = ibid_fail(IBID_INVAL, "--max-tokens is too large");
    if (!e) e = ibidi_service_open(&cli->o, true, &s);
    struct sigaction act = {.sa_handler = on_interrupt};
    (void)sigaction(SIGINT, &act, NULL);
    int status = e ? ibidi_report(cli, e) : ibidi_each_question(cli, ask_one, &a);
    ibidi_service_close(&s);
    return status;
}
