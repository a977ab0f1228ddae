#include "indexer/indexer.h"
#include "kvstore/kvstore_client.h"
#include "rpc/front/commands.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* A document's id as the user may write it: the id itself, or a path to the file it came from. */
static ibid_err find_document(ibid_snap *n, ibid_str collection, const char *name,
                              ibid_document *out) {
    ibid_err e = ibid_snap_document(n, collection, ibidi_str(name), out);
    if (e != IBID_NOTFOUND) return e;
    char *real = realpath(name, NULL);
    if (real) e = ibid_snap_document(n, collection, ibidi_str(real), out);
    free(real);
    if (e == IBID_NOTFOUND)
        return ibid_fail(e, "collection %.*s has no document \"%s\"; ibid list shows them",
                         (int)collection.n, collection.s, name);
    return e;
}

/* ---- list ---- */

static ibid_err list_document(void *arg, const ibid_document *d) {
    json_t *j = json_pack("{s:o,s:o,s:s,s:o,s:I,s:I,s:o,s:I}", "document", ibidi_json_str(d->id),
                          "title", ibidi_json_str(d->title), "state", ibid_doc_state_name(d->state),
                          "reason", ibidi_json_str(d->reason), "chunks", (json_int_t)d->n_chunks,
                          "text_bytes", (json_int_t)d->text_bytes, "source",
                          ibidi_json_str(d->source), "indexed_ms", (json_int_t)d->indexed_ms);
    if (d->metadata.n)
        (void)json_object_set_new(j, "metadata", json_loadb(d->metadata.s, d->metadata.n, 0, NULL));
    return json_array_append_new(arg, j) == 0 ? IBID_OK : IBID_NOMEM;
}

int ibidi_cmd_list(ibid_cli *cli) {
    ibid_service s;
    ibid_snap *n = NULL;
    ibid_collection c;
    json_t *docs = json_array(), *d;
    size_t i;
    ibid_err e = ibidi_service_open(&cli->o, false, &s);
    if (!e) e = ibidi_service_store(&s);
    if (!e) e = ibid_snap_begin(s.store, &n);
    if (!e) e = ibid_snap_collection(n, ibidi_str(cli->o.collection), &c);
    if (!e) e = ibid_snap_each_document(n, ibidi_str(cli->o.collection), 0, list_document, docs);
    ibid_snap_end(n);
    int status = json_array_size(docs) ? 0 : 1;
    if (e) {
        status = ibidi_report(cli, e);
    } else if (cli->o.json) {
        int wrote = ibidi_json_print(
            json_pack("{s:s,s:O}", "collection", cli->o.collection, "documents", docs));
        status = wrote ? wrote : status;
    } else {
        json_array_foreach(docs, i, d) {
            char bytes[32];
            const char *reason = json_string_value(json_object_get(d, "reason"));
            printf(
                "%-11s %5lld chunks %9s  %s%s%s%s%s\n",
                json_string_value(json_object_get(d, "state")),
                (long long)json_integer_value(json_object_get(d, "chunks")),
                ibidi_bytes((uint64_t)json_integer_value(json_object_get(d, "text_bytes")), bytes),
                json_string_value(json_object_get(d, "document")), ibidi_dim(), *reason ? ": " : "",
                reason, ibidi_plain());
        }
    }
    json_decref(docs);
    ibidi_service_close(&s);
    return status;
}

/* ---- show ---- */

static ibid_err read_range(const char *text, uint64_t size, uint64_t *start, uint64_t *end) {
    *start = 0;
    *end = size;
    if (!text) return IBID_OK;
    char *colon = NULL, *rest = NULL;
    errno = 0;
    *start = strtoull(text, &colon, 10);
    if (*colon == ':') *end = colon[1] ? strtoull(colon + 1, &rest, 10) : (rest = colon + 1, size);
    if (errno || colon == text || *colon != ':' || *rest || *start > *end || *end > size ||
        *text == '-')
        return ibid_fail(IBID_INVAL,
                         "--range: \"%s\" is not S:E with S <= E <= %llu (bytes of the text)", text,
                         (unsigned long long)size);
    return IBID_OK;
}

int ibidi_cmd_show(ibid_cli *cli) {
    ibid_service s;
    ibid_snap *n = NULL;
    ibid_document d;
    ibid_buf text;
    uint64_t start = 0, end = 0;
    ibid_buf_init(&text, (size_t)4 << 30);
    ibid_err e = ibidi_service_open(&cli->o, false, &s);
    if (!e) e = ibidi_service_store(&s);
    if (!e) e = ibid_snap_begin(s.store, &n);
    if (!e) e = find_document(n, ibidi_str(cli->o.collection), cli->args[0], &d);
    if (!e && d.text_bytes) e = ibid_snap_text(n, d.number, &text);
    if (!e) e = read_range(cli->o.range, text.len, &start, &end);
    int status = 0;
    if (e) {
        status = ibidi_report(cli, e);
        if (e == IBID_NOTFOUND) status = 1;
    } else if (cli->o.json) {
        status = ibidi_json_print(json_pack(
            "{s:o,s:o,s:s,s:o,s:o,s:I,s:I,s:I,s:o}", "document", ibidi_json_str(d.id), "title",
            ibidi_json_str(d.title), "state", ibid_doc_state_name(d.state), "reason",
            ibidi_json_str(d.reason), "source", ibidi_json_str(d.source), "start",
            (json_int_t)start, "end", (json_int_t)end, "text_bytes", (json_int_t)text.len, "text",
            ibidi_json_text(text.data ? text.data + start : "", end - start)));
    } else if (end > start) {
        if (fwrite(text.data + start, 1, end - start, stdout) != end - start) status = 2;
    }
    ibid_snap_end(n);
    ibid_buf_fini(&text);
    ibidi_service_close(&s);
    return status;
}

/* ---- rm ---- */

static ibid_err remove_one(ibid_cli *cli, ibid_service *s, const char *name) {
    ibid_snap *n = NULL;
    ibid_document d;
    char *id = NULL;
    ibid_err e = ibid_snap_begin(s->store, &n);
    if (!e) e = find_document(n, ibidi_str(cli->o.collection), name, &d);
    if (!e && !(id = ibid_strndup(d.id.s, d.id.n))) e = IBID_NOMEM;
    ibid_snap_end(n);
    if (!e) e = ibid_idx_remove(s->indexer, ibidi_str(cli->o.collection), ibidi_str(id));
    ibid_free(id);
    return e;
}

int ibidi_cmd_rm(ibid_cli *cli) {
    ibid_service s;
    ibid_err e = ibidi_service_open(&cli->o, true, &s);
    if (!e) e = ibidi_service_store(&s);
    int status = e ? ibidi_report(cli, e) : 0;
    size_t removed = 0;
    for (size_t i = 0; !e && i < cli->n_args; i++) {
        ibid_err one = remove_one(cli, &s, cli->args[i]);
        if (!one)
            removed++;
        else {
            int st = ibidi_report(cli, one);
            if (one == IBID_NOTFOUND) st = 1;
            status = st > status ? st : status;
        }
    }
    if (!e && cli->o.json) {
        if (status == 0)
            status = ibidi_json_print(json_pack("{s:I}", "removed", (json_int_t)removed));
    } else if (removed) {
        printf("removed %zu document%s\n", removed, removed == 1 ? "" : "s");
    }
    ibidi_service_close(&s);
    return status;
}

/* ---- find ---- */

struct place { /* where the text lies that find searches */
    char collection[80], id[4096];
};

/* An indexed document, unless the name is a file that changed since; otherwise a file, through the
 * cache of files read for find. */
static ibid_err find_place(ibid_cli *cli, ibid_service *s, const char *name, struct place *out) {
    ibid_snap *n = NULL;
    ibid_document d;
    struct stat st;
    bool file = stat(name, &st) == 0 && S_ISREG(st.st_mode), indexed = false;
    if (ibidi_service_store(s) == IBID_OK && ibid_snap_begin(s->store, &n) == IBID_OK &&
        find_document(n, ibidi_str(cli->o.collection), name, &d) == IBID_OK &&
        d.id.n < sizeof out->id) {
        uint64_t changed_ms = file ? (uint64_t)st.st_mtim.tv_sec * 1000 : 0;
        indexed = d.text_bytes > 0 && (!file || changed_ms < d.indexed_ms);
        (void)snprintf(out->id, sizeof out->id, "%.*s", (int)d.id.n, d.id.s);
        (void)snprintf(out->collection, sizeof out->collection, "%s", cli->o.collection);
    }
    ibid_snap_end(n);
    if (indexed) return IBID_OK;
    if (!file)
        return ibid_fail(IBID_NOTFOUND, "\"%s\" is neither a file nor a document of collection %s",
                         name, cli->o.collection);
    char *real = realpath(name, NULL);
    if (!real) return ibid_fail_errno(errno, "cannot read", name);
    (void)snprintf(out->collection, sizeof out->collection, ".find");
    uint64_t since = 0;
    ibid_err e;
    do
        e = ibid_idx_cache_file(s->indexer, ibidi_str(cli->o.model), ibidi_str(real), out->id,
                                sizeof out->id);
    while (ibidi_room_away(e) && ibidi_service_again(s, &since));
    free(real);
    return e;
}

/* Prints like grep: line number, the match in its line, at most `context` bytes on either side. */
static void print_match(const ibid_match *m, const ibid_buf *text, size_t context) {
    size_t line = 1, from = m->start, to = m->end;
    for (size_t i = 0; i < m->start; i++) line += text->data[i] == '\n';
    while (from > 0 && m->start - from < context && text->data[from - 1] != '\n') from--;
    while (to < text->len && to - m->end < context && text->data[to] != '\n') to++;
    while (from > 0 && (text->data[from] & 0xC0) == 0x80) from--;
    while (to < text->len && (text->data[to] & 0xC0) == 0x80) to++;
    printf("%s%zu:%s ", ibidi_dim(), line, ibidi_plain());
    ibidi_print_line((ibid_str){text->data + from, m->start - from}, SIZE_MAX);
    printf("%s", ibidi_mark());
    ibidi_print_line((ibid_str){text->data + m->start, m->end - m->start}, SIZE_MAX);
    printf("%s", ibidi_plain());
    ibidi_print_line((ibid_str){text->data + m->end, to - m->end}, SIZE_MAX);
    if (!m->exact) printf("%s  (%.3f)%s", ibidi_dim(), m->score, ibidi_plain());
    if (m->locator.n)
        printf("%s  %.*s%s", ibidi_dim(), (int)m->locator.n, m->locator.s, ibidi_plain());
    putchar('\n');
}

static ibid_err print_matches(ibid_service *s, const struct place *p, const ibid_find_result *r,
                              size_t context) {
    ibid_snap *n = NULL;
    ibid_document d;
    ibid_buf text;
    ibid_buf_init(&text, (size_t)4 << 30);
    ibid_err e = ibidi_service_store(s);
    if (!e) e = ibid_snap_begin(s->store, &n);
    if (!e) e = ibid_snap_document(n, ibidi_str(p->collection), ibidi_str(p->id), &d);
    if (!e) e = ibid_snap_text(n, d.number, &text);
    for (size_t i = 0; !e && i < r->n; i++)
        if (r->matches[i].end <= text.len) print_match(&r->matches[i], &text, context);
    ibid_snap_end(n);
    ibid_buf_fini(&text);
    return e;
}

static json_t *candidates_json(const ibid_find_result *r) {
    json_t *list = json_array();
    for (size_t i = 0; i < r->n_candidates; i++) {
        const ibid_find_candidate *c = &r->candidates[i];
        json_t *features = json_array();
        for (size_t j = 0; j < c->n_features; j++)
            (void)json_array_append_new(features, json_real(c->features[j]));
        (void)json_array_append_new(
            list, json_pack("{s:o,s:I,s:f,s:o}", "name", ibidi_json_str(c->name), "mentions",
                            (json_int_t)c->mentions, "score", c->score, "features", features));
    }
    return list;
}

static json_t *matches_json(const ibid_find_result *r, bool explain) {
    json_t *list = json_array();
    for (size_t i = 0; i < r->n; i++) {
        const ibid_match *m = &r->matches[i];
        json_t *o =
            json_pack("{s:I,s:I,s:o,s:f,s:o,s:o}", "start", (json_int_t)m->start, "end",
                      (json_int_t)m->end, "text", ibidi_json_str(m->text), "score", m->score,
                      "kind", ibidi_json_str(m->kind), "locator", ibidi_json_str(m->locator));
        if (o && m->entity) {
            (void)json_object_set_new(o, "entity", json_integer((json_int_t)m->entity));
            (void)json_object_set_new(o, "name", ibidi_json_str(m->name));
        }
        (void)json_array_append_new(list, o);
    }
    json_t *all =
        json_pack("{s:o,s:b,s:f,s:f,s:{s:f}}", "matches", list, "more", r->more, "threshold",
                  r->threshold, "coverage", r->coverage, "timings_ms", "total", r->total_ms);
    if (all && explain) (void)json_object_set_new(all, "candidates", candidates_json(r));
    return all;
}

int ibidi_cmd_find(ibid_cli *cli) {
    ibid_service s;
    struct place p;
    ibid_find_result r = {0};
    ibid_err e = ibidi_service_open(&cli->o, true, &s);
    if (!e) e = find_place(cli, &s, cli->args[1], &p);
    if (!e) {
        ibid_find_request q = {.collection = ibidi_str(p.collection),
                               .document = ibidi_str(p.id),
                               .query = ibidi_str(cli->args[0]),
                               .exact_only = cli->o.exact_only,
                               .fast = cli->o.fast,
                               .explain = cli->o.explain,
                               .min_score = cli->o.min_score,
                               .max_matches = cli->o.max_matches};
        uint64_t since = 0;
        do e = ibid_ret_find(s.retriever, &q, &r);
        while (ibidi_room_away(e) && ibidi_service_again(&s, &since));
    }
    int status = r.n ? 0 : 1;
    if (!e && cli->o.json) {
        int wrote = ibidi_json_print(matches_json(&r, cli->o.explain));
        status = wrote ? wrote : status;
    } else if (!e) {
        e = print_matches(&s, &p, &r, cli->o.context);
        if (!e && r.n == 0) printf("no match\n");
        if (!e && r.more)
            fprintf(stderr, "the list ends at %zu matches; --max-matches shows more\n", r.n);
    }
    if (e) status = ibidi_report(cli, e);
    ibid_find_result_close(&r);
    ibidi_service_close(&s);
    return status;
}

/* ---- verify, reindex ---- */

static void add_lines(json_t *list, const ibid_buf *b, const char *where) {
    for (size_t at = 0; at < b->len;) {
        size_t end = at;
        while (end < b->len && b->data[end] != '\n') end++;
        json_t *text = ibidi_json_text(b->data + at, end - at);
        if (end > at)
            (void)json_array_append_new(list, json_pack("{s:s,s:O}", "in", where, "fault", text));
        json_decref(text);
        at = end + 1;
    }
}

int ibidi_cmd_verify(ibid_cli *cli) {
    ibid_service s;
    ibid_buf out;
    uint64_t in_store = 0, in_index = 0;
    json_t *faults = json_array(), *f;
    size_t i;
    ibid_buf_init(&out, 1 << 20);
    ibid_err e = ibidi_service_open(&cli->o, true, &s);
    uint64_t since = 0;
    while (!e) {
        ibid_buf_clear(&out);
        e = ibid_kvc_verify(s.kvstore, &out, &in_store);
        if (!ibidi_room_away(e) || !ibidi_service_again(&s, &since)) break;
        e = IBID_OK;
    }
    if (!e) add_lines(faults, &out, "store");
    while (!e) {
        ibid_buf_clear(&out);
        e = ibid_ret_verify(s.retriever, &out, &in_index);
        if (!ibidi_room_away(e) || !ibidi_service_again(&s, &since)) break;
        e = IBID_OK;
    }
    if (!e) add_lines(faults, &out, "index");
    int status = in_store + in_index ? 2 : 0;
    if (e) {
        status = ibidi_report(cli, e);
    } else if (cli->o.json) {
        int wrote = ibidi_json_print(json_pack("{s:b,s:I,s:O}", "clean", in_store + in_index == 0,
                                               "n_faults", (json_int_t)(in_store + in_index),
                                               "faults", faults));
        status = wrote ? wrote : status;
    } else {
        json_array_foreach(faults, i, f)
            printf("%s: %s\n", json_string_value(json_object_get(f, "in")),
                   json_string_value(json_object_get(f, "fault")));
        if (in_store + in_index == 0)
            printf("clean: every checksum, count and index stamp holds\n");
        else
            printf("%llu faults in the store, %llu in the indexes (ibid reindex rebuilds those)\n",
                   (unsigned long long)in_store, (unsigned long long)in_index);
    }
    json_decref(faults);
    ibid_buf_fini(&out);
    ibidi_service_close(&s);
    return status;
}

int ibidi_cmd_reindex(ibid_cli *cli) {
    ibid_service s;
    bool all = strcmp(cli->o.collection, "default") == 0 && cli->n_args == 0;
    ibid_err e = ibidi_service_open(&cli->o, true, &s);
    if (!e) e = ibid_ret_reindex(s.retriever, all ? ibidi_str("") : ibidi_str(cli->o.collection));
    int status = e ? ibidi_report(cli, e) : 0;
    if (!e && cli->o.json)
        status = ibidi_json_print(json_pack("{s:b}", "rebuilt", true));
    else if (!e)
        printf("the key index and the lexical index were rebuilt from the store\n");
    ibidi_service_close(&s);
    return status;
}
